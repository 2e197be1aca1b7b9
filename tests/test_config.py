"""The settings: what YAML and command line may say, and the exact line for each thing they may not.

python -m pytest tests/test_config.py
"""

import dataclasses
from pathlib import Path

import pytest

from extend_tokenizer import (
    ALIASES, Config, ConfigError, command_line_parser, config_table, load_config, nearest_key,
    run_command,
)  # fmt: skip

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))
REQUIRED = "model_name: m\nlexicon: w.txt\ncorpus: t.txt\nrun_dir: runs/a\n"
KEYS = [field.name for field in dataclasses.fields(Config)]


@pytest.fixture
def load(tmp_path):
    def load(text: str, *overrides: str, required: str = REQUIRED) -> Config:
        path = tmp_path / "a.yaml"
        path.write_text(required + text, encoding="utf-8")
        return load_config(path, *overrides)

    return load


def problems(load, *arguments, **keys) -> list[str]:
    """The error lines without the path in front of each."""
    with pytest.raises(ConfigError) as caught:
        load(*arguments, **keys)
    heads, lines = zip(*(problem.split("a.yaml: ", 1) for problem in caught.value.problems))
    assert len(set(heads)) == 1 and str(caught.value) == "\n".join(caught.value.problems)
    return list(lines)


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads(path):
    config = load_config(path)
    assert config.model_name and config.run_dir


def test_defaults(load):
    config = load("")
    assert config == Config(model_name="m", lexicon="w.txt", corpus="t.txt", run_dir="runs/a")
    assert config.corpus == ("t.txt",) and config.prompts == ()
    assert (config.token_matching, config.learning_rate, config.seq_len) == ("spaced", 5e-4, 128)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_everything_wrong_is_told_at_once(load):
    text = "seed: 1\nlr: 5\nseed: 2\nseq_len: long\nlerning_rate: 1\nzzzz: 1\ntoken_matching: x\n"
    lines = problems(load, text, "quantisation=nf4", "max_steps", required="model_name: m\n")
    assert lines == [
        "unknown key 'lr', did you mean 'learning_rate'?",
        "key 'seed' stands there twice; keep one",
        "unknown key 'lerning_rate', did you mean 'learning_rate'?",
        f"unknown key 'zzzz', the keys are {', '.join(KEYS)}",
        "command line: unknown key 'quantisation', did you mean 'quantization'?",
        "command line: 'max_steps' is no override; write key=value",
        "missing key 'lexicon': text file, one word a line;"
        " or from_corpus: rare words of the corpus",
        "missing key 'corpus': UTF-8 text file, or a list of them",
        "'token_matching' is 'x'; allowed: spaced, bare, plain",
        "'seq_len' is 'long'; allowed: a whole number of at least 2",
        "'max_steps' is ''; allowed: a whole number of at least 1",
        "missing key 'run_dir': local run folder",
    ]


# Near enough to the key to be found without an entry in ALIASES.
NEAR = {
    "model": "model_name", "revision": "model_revision", "max_seq_len": "seq_len",
    "steps": "max_steps", "num_steps": "max_steps", "warmup": "warmup_ratio",
    "warmup_steps": "warmup_ratio", "out_dir": "run_dir", "matching": "token_matching",
    "activation_checkpointing": "gradient_checkpointing",
}  # fmt: skip


@pytest.mark.parametrize("name, key", (ALIASES | NEAR).items())
def test_what_other_tools_call_a_key_leads_to_it(name, key):
    assert nearest_key(name) == nearest_key(name.upper()) == f"did you mean {key!r}?"
    assert key in KEYS and name not in KEYS


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("learning_rate", "5e-4", 5e-4),  # PyYAML: a string
        ("learning_rate", "1e3", 1000.0),
        ("learning_rate", ".5", 0.5),
        ("learning_rate", "2", 2.0),
        ("max_steps", "010", 10),  # PyYAML: 8
        ("max_steps", "+7", 7),
        ("micro_batch_size", "auto", "auto"),
        ("micro_batch_size", "8", 8),
        ("trust_remote_code", "no", False),
        ("trust_remote_code", "On", True),
        ("tensorboard", "true", True),
        ("gradient_checkpointing", "True", "true"),
        ("model_revision", "1.10", "1.10"),  # PyYAML: 1.1
        ("model_revision", "no", "no"),  # PyYAML: False
        ("model_revision", "2024-01-01", "2024-01-01"),  # PyYAML: a date
        ("model_revision", "null", None),
        ("model_revision", "", None),
        ("max_gpu_gib", "~", None),
        ("max_gpu_gib", "14", 14.0),
        ("corpus", "[a.txt, b.txt]", ("a.txt", "b.txt")),
        ("prompts", "[no, 010, 'a: b']", ("no", "010", "a: b")),
        ("prompts", "[]", ()),
    ],
)
def test_values_of_yaml_command_line_and_notebook(load, key, text, value):
    required = "".join(line for line in REQUIRED.splitlines(True) if not line.startswith(key))
    config = load(f"{key}: {text}\n", required=required)
    assert getattr(config, key) == value and type(getattr(config, key)) is type(value)
    assert load("", f"{key}={text}") == config
    keys = {"model_name": "m", "lexicon": "w.txt", "corpus": "t.txt", "run_dir": "runs/a"}
    assert Config(**(keys | {key: value})) == config


@pytest.mark.parametrize(
    "text, line",
    [
        ("seq_len: 1:30", "'seq_len' is '1:30'; allowed: a whole number of at least 2"),
        ("seq_len: 1", "'seq_len' is '1'; allowed: a whole number of at least 2"),
        ("seq_len: 12.0", "'seq_len' is '12.0'; allowed: a whole number of at least 2"),
        ("seq_len: no", "'seq_len' is 'no'; allowed: a whole number of at least 2"),
        ("seed: -1", "'seed' is '-1'; allowed: a whole number of at least 0 and at most 1e+09"),
        ("seed: 9999999999", "'seed' is '9999999999'; allowed: a whole number of at least 0 and at"
         " most 1e+09"),
        ("learning_rate: 1e400", "'learning_rate' is '1e400'; allowed: a number above 0"),
        ("prompts: [the, '']", "'prompts' is ['the', '']; allowed: text or a list of texts"),
        ("learning_rate: 0", "'learning_rate' is '0'; allowed: a number above 0"),
        ("learning_rate: nan", "'learning_rate' is 'nan'; allowed: a number above 0"),
        ("learning_rate: inf", "'learning_rate' is 'inf'; allowed: a number above 0"),
        ("val_fraction: 0.6", "'val_fraction' is '0.6'; allowed: a number above 0 and at most 0.5"),
        ("learning_rate:", "'learning_rate' is ''; allowed: a number above 0"),
        ("max_gpu_gib: 0", "'max_gpu_gib' is '0'; allowed: null or a number above 0"),
        (
            "micro_batch_size: big",
            "'micro_batch_size' is 'big'; allowed: auto or a whole number of at least 1",
        ),
        ("tensorboard: maybe", "'tensorboard' is 'maybe'; allowed: true or false"),
        ("tensorboard: 1", "'tensorboard' is '1'; allowed: true or false"),
        ("init: {a: b}", "'init' is {'a': 'b'}; allowed: subtoken_mean, spherical"),
        ("prompts: {a: b}", "'prompts' is {'a': 'b'}; allowed: text or a list of texts"),
        ("sentry_dir: [a]", "'sentry_dir' is ['a']; allowed: null or text"),
        (
            "micro_batch_size: 5",
            "'micro_batch_size' is 5, which does not divide effective_batch_size 16; use one of"
            " 1, 2, 4, 8, 16, or auto",
        ),
    ],
)  # fmt: skip
def test_wrong_values(load, text, line):
    assert problems(load, text + "\n") == [line]


def test_an_override_wins_and_the_last_one_last(load):
    assert load("seed: 1\n", "seed=2", "seed=3").seed == 3
    assert load("", "corpus=[a, b]").corpus == ("a", "b")
    assert load("", "run_dir=a=b").run_dir == "a=b"


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "words\n"])
def test_files_that_hold_no_keys(load, text):
    assert problems(load, text, required="") == ["not a flat list of 'key: value' lines"]


def test_unreadable_files(load, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "gone.yaml")
    line = f"{tmp_path / 'gone.yaml'}: no such file; give the path of a YAML config"
    assert str(caught.value) == line
    assert problems(load, "a: [b\n")[0].startswith("not a readable YAML file: while parsing a flow")
    (tmp_path / "b.yaml").write_bytes(b"seed: \xff\n")
    for path in (tmp_path, tmp_path / "b.yaml"):
        with pytest.raises(ConfigError, match="not a readable YAML file: .*(directory|0xff)"):
            load_config(path)
    assert load("", required="\ufeff" + REQUIRED) == load("")  # as Windows writes it


def test_config_made_in_a_cell():
    keys = {"model_name": Path("m"), "lexicon": "w", "corpus": [Path("t")], "run_dir": Path("r")}
    config = Config(**keys, seq_len=64, learning_rate=1, gradient_checkpointing=True)
    assert (config.model_name, config.corpus, config.run_dir) == ("m", ("t",), "r")
    assert config.learning_rate == 1.0 and config.gradient_checkpointing == "true"
    with pytest.raises(ConfigError) as caught:
        wrong = {"corpus": [], "seq_len": True, "sentry_dir": False, "tensorboard": None}
        Config(**keys | wrong, learning_rate=float("nan"))
    assert caught.value.problems == (
        "missing key 'corpus': UTF-8 text file, or a list of them",
        "'seq_len' is True; allowed: a whole number of at least 2",
        "'learning_rate' is nan; allowed: a number above 0",
        "'sentry_dir' is False; allowed: null or text",
        "'tensorboard' is None; allowed: true or false",
    )


def test_help_and_table_hold_every_key():
    table = {name: (default, meaning) for name, default, meaning in config_table()}
    assert list(table) == KEYS
    assert table["model_name"][0] == "-" and table["sentry_dir"][0] == "null"
    assert table["prompts"][0] == "[]" and table["tensorboard"][0] == "false"
    assert table["quantization"][1].endswith("(nf4 | none)")
    text = command_line_parser("  python x.py a.yaml").format_help()
    assert "python x.py a.yaml" in text and all(f"\n  {name} " in text for name in KEYS)


def test_run_command(capsys):
    def fail():
        raise ConfigError("one", "two")

    assert run_command(fail) == 1 and capsys.readouterr().err == "one\ntwo\n"
    assert run_command(len, "abc") == 0
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


def test_an_interrupt_is_one_line_and_status_1(capsys):
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run_command(interrupted) == 1
    assert capsys.readouterr().err == "stopped by SIGINT\n"
