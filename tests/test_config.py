"""Proves that wrong settings end in exact lines, and that a file is replaced whole or not at all.

    python -m pytest tests/test_config.py        (3 s on 2 CPU cores, 2026-11-25)

Settings: what YAML and command line may say, and the line for each thing they may not say. Files:
a child process is killed at each of its file operations, one after the other.
"""

import dataclasses
import errno
import os
import shutil
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from config import (
    ALIASES, Config, UserError, command_line_parser, config_table, load_config, nearest_key,
    read_json, replacing, run_command, sync, write_config, write_json, write_text,
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
    """Return the error lines without the path that stands in front of each."""
    with pytest.raises(UserError) as caught:
        load(*arguments, **keys)
    heads, lines = zip(*(problem.split("a.yaml: ", 1) for problem in caught.value.problems))
    assert len(set(heads)) == 1 and str(caught.value) == "\n".join(caught.value.problems)
    return list(lines)


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads_and_comes_back_from_a_run_folder(path, tmp_path):
    config = load_config(path, f"run_dir={tmp_path}")
    assert config.model_name and load_config(path).run_dir
    write_config(config)
    assert load_config(tmp_path / "config.yaml") == config


def test_the_config_of_a_run_folder_has_all_keys_in_the_order_of_the_table(tmp_path):
    path = tmp_path / "config.yaml"
    write_config(Config(model_name="m", lexicon="é", corpus="c", run_dir=str(tmp_path)))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line.split(":")[0] for line in lines if line[0] != "-"] == KEYS
    assert "lexicon: é" in lines


def test_defaults(load):
    config = load("")
    assert config == Config(model_name="m", lexicon="w.txt", corpus="t.txt", run_dir="runs/a")
    assert config.corpus == ("t.txt",) and config.prompts == ()
    assert (config.token_matching, config.learning_rate, config.seq_len) == ("both", 2e-3, 128)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_which_keys_make_another_run():
    """A run can be continued with other values of every key but these."""
    fields = dataclasses.fields(Config)
    assert {field.name for field in fields if field.metadata["changes_run"]} == {
        "model_name", "model_revision", "quantization", "known_words", "token_matching", "init",
        "init_radius", "output_rows", "seq_len", "effective_batch_size", "learning_rate",
        "warmup_ratio", "row_coupling", "kin_coupling", "max_grad_norm", "val_fraction", "seed",
    }  # fmt: skip


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
        "'token_matching' is 'x'; allowed: both, spaced, bare, plain",
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
        ("trust_remote_code", "yes", True),
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


# key -> just too low, the lowest, the highest, just too high.
LIMITS = {
    "lexicon_min_count": (0, 1, 10**12, None), "lexicon_min_base_tokens": (1, 2, 10**12, None),
    "init_radius": (0, 1e-30, 1e30, None), "seq_len": (1, 2, 10**12, None),
    "micro_batch_size": (0, 1, 16, None), "max_steps": (0, 1, 10**12, None),
    "learning_rate": (0, 1e-30, 1e30, None), "warmup_ratio": (-0.01, 0, 1, 1.01),
    "row_coupling": (-0.1, 0, 1e30, None), "kin_coupling": (-0.1, 0, 1e30, None),
    "max_grad_norm": (0, 1e-30, 1e30, None), "log_every": (0, 1, 10**12, None),
    "eval_every": (0, 1, 10**12, None), "save_every": (0, 1, 10**12, None),
    "keep_sentries": (0, 1, 10**12, None), "val_fraction": (0, 1e-30, 0.5, 0.51),
    "seed": (-1, 0, 10**9, 10**9 + 1), "max_gpu_gib": (0, 1e-30, 1e30, None),
    "max_host_gib": (-0.1, 0, 1e30, None), "effective_batch_size": (0, 1, 10**12, None),
}  # fmt: skip


@pytest.mark.parametrize("key", LIMITS)
def test_a_number_may_be_as_low_and_as_high_as_its_limits_and_no_more(load, key):
    below, lowest, highest, above = LIMITS[key]
    for value in (lowest, highest):
        assert getattr(load(f"{key}: {value}\n"), key) == value
    for value in (below, above):
        if value is not None:
            (line,) = problems(load, f"{key}: {value}\n")
            assert line.startswith(f"{key!r} is {str(value)!r}; allowed: ")


def test_every_number_has_its_limits_in_the_table():
    kinds = (int, int | str, float, float | None)
    assert {field.name for field in dataclasses.fields(Config) if field.type in kinds} == {*LIMITS}


def test_an_override_wins_and_is_given_once(load):
    assert load("seed: 1\n", "seed=2").seed == 2
    assert problems(load, "seed: 1\n", "seed=2", "run_dir=a", "seed=3") == [
        "command line: 'seed' is given twice; keep one"
    ]
    assert load("", "corpus=[a, b]").corpus == ("a", "b")
    assert load("", "run_dir=a=b").run_dir == "a=b"


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "words\n"])
def test_files_that_hold_no_keys(load, text):
    assert problems(load, text, required="") == ["not a flat list of 'key: value' lines"]


def test_unreadable_files(load, tmp_path):
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "gone.yaml")
    line = f"{tmp_path / 'gone.yaml'}: no such file; give the path of a YAML config"
    assert str(caught.value) == line
    assert problems(load, "a: [b\n")[0].startswith("not a readable YAML file: while parsing a flow")
    (tmp_path / "b.yaml").write_bytes(b"seed: \xff\n")
    for path in (tmp_path, tmp_path / "b.yaml"):
        with pytest.raises(UserError, match="not a readable YAML file: .*(directory|0xff)"):
            load_config(path)
    assert load("", required="\ufeff" + REQUIRED) == load("")  # as Windows writes it


def test_config_made_in_a_cell():
    keys = {"model_name": Path("m"), "lexicon": "w", "corpus": [Path("t")], "run_dir": Path("r")}
    config = Config(**keys, seq_len=64, learning_rate=1, gradient_checkpointing=True)
    assert (config.model_name, config.corpus, config.run_dir) == ("m", ("t",), "r")
    assert config.learning_rate == 1.0 and config.gradient_checkpointing == "true"
    assert load_config(config) == config
    assert load_config(config, "seed=7") == dataclasses.replace(config, seed=7)
    with pytest.raises(UserError) as caught:
        load_config(config, "lr=7")
    assert str(caught.value) == (
        "Config: command line: unknown key 'lr', did you mean 'learning_rate'?"
    )
    with pytest.raises(UserError) as caught:
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
        raise UserError("one", "two")

    assert run_command(fail) == 1 and capsys.readouterr().err == "one\ntwo\n"
    assert run_command(len, "abc") == 0
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


def test_an_interrupt_is_one_line_and_status_1(capsys):
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run_command(interrupted) == 1
    assert capsys.readouterr().err == "stopped by SIGINT\n"


def test_a_reader_that_ends_early_is_no_error_to_read_about():
    code = (
        "from config import run_command; raise SystemExit(run_command(print, 'a line\\n' * 10**5))"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout.readline() == b"a line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


SLOW_IMPORT = """
import time
print("importing", flush=True)
try:
    time.sleep(60)
except BaseException:
    print("swallowed")  # as torch does
"""


@pytest.mark.parametrize("script", ["train", "recover", "extend_tokenizer"])
def test_an_interrupt_while_a_script_still_imports_is_one_line_too(script, tmp_path):
    """A hashlib that takes a minute stands for torch, and for all that is imported before it."""
    (tmp_path / "hashlib.py").write_text(SLOW_IMPORT, encoding="utf-8")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, f"{script}.py"], env=environment, **pipes) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "stopped by SIGINT\n")
    assert process.returncode == 1
    (tmp_path / "hashlib.py").write_text("1 / 0", encoding="utf-8")
    command = [sys.executable, f"{script}.py"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert found.stderr.startswith("Traceback") and "ZeroDivisionError" in found.stderr


@pytest.mark.parametrize("script", ["config", "overlay", "machine"])
def test_files_that_are_no_commands_say_what_they_are(script, capsys):
    path = ROOT / f"{script}.py"
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out == path.read_text(encoding="utf-8").split('"""')[1] + "\n"


def test_an_error_that_is_no_user_error_keeps_its_traceback():
    error = UserError("one", "two")
    assert error.problems == ("one", "two") and str(error) == "one\ntwo"
    with pytest.raises(ValueError, match="x"):
        run_command(int, "x")


def test_importing_the_settings_imports_nothing_big():
    code = "import sys, config; print(*{'torch', 'transformers', 'numpy'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


# Files


def write_new(path: Path, is_folder: bool, text: str) -> None:
    """Replace `path` by a file with `text`, or by a folder with three files of it, one nested."""
    with replacing(path) as part:
        if is_folder:
            (part / "inner").mkdir(parents=True)
            for name in ("a", "b", "inner/c"):
                (part / name).write_text(text, encoding="utf-8")
        else:
            part.write_text(text, encoding="utf-8")


def contents(path: Path) -> dict[str, str]:
    """Map every file at or below `path` to its text; {} if there is none."""
    files = [path, *path.rglob("*")]
    return {str(f.relative_to(path)): f.read_text("utf-8") for f in files if f.is_file()}


KINDS = pytest.mark.parametrize("is_folder", [False, True], ids=["file", "folder"])
WHOLE = {False: ["."], True: ["a", "b", "inner/c"]}


@KINDS
def test_replacing_makes_and_replaces_and_leaves_nothing_else(tmp_path, is_folder):
    path = tmp_path / "x.y"
    for text in ("first", "second"):
        write_new(path, is_folder, text)
        assert contents(path) == dict.fromkeys(WHOLE[is_folder], text)
        assert os.listdir(tmp_path) == ["x.y"]


def test_a_folder_replaces_a_file(tmp_path):
    write_new(tmp_path / "x.y", False, "file")
    write_new(tmp_path / "x.y", True, "folder")
    assert contents(tmp_path / "x.y") == dict.fromkeys(WHOLE[True], "folder")
    assert os.listdir(tmp_path) == ["x.y"]


def killed_at(operation: int, path: Path, is_folder: bool) -> bool:
    """Replace `path` in a child process that SIGKILLs itself before its n-th file operation."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    remaining = iter(range(operation))

    def watch(event, arguments):
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            if next(remaining, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    write_new(path, is_folder, "new")
    os._exit(0)


@KINDS
@pytest.mark.parametrize("is_there", [True, False])
def test_a_kill_at_any_operation_leaves_the_old_or_the_new(tmp_path, is_folder, is_there):
    path, names = tmp_path / "x.y", WHOLE[is_folder]
    old, new = dict.fromkeys(names, "old") if is_there else {}, dict.fromkeys(names, "new")
    seen, operation, killed = [], 0, True
    while killed:
        for found in tmp_path.iterdir():
            subprocess.run(["rm", "-r", found], check=True)
        if is_there:
            write_new(path, is_folder, "old")
        killed = killed_at(operation, path, is_folder)
        operation += 1
        found = contents(path)
        if is_folder and is_there and not path.exists():  # between the two renames
            found = contents(tmp_path / ".x.y.old")
            seen.append("between")
        assert found in (old, new), operation
        seen.append("new" if found == new else "old")
        # The next call tells the caller the old state, and leaves nothing of the kill behind.
        with pytest.raises(ZeroDivisionError), replacing(path):
            raise ZeroDivisionError
        assert contents(path) == found and set(os.listdir(tmp_path)) <= {"x.y"}
    assert seen[0] == "old" and seen[-1] == "new" and operation > 3
    assert seen.count("between") == (is_folder and is_there)


@KINDS
@pytest.mark.parametrize("left", ["file", "folder"])
def test_what_a_kill_left_gets_into_nothing(tmp_path, is_folder, left):
    path = tmp_path / "x.y"
    write_new(path, is_folder, "old")
    for name in (".x.y.part", ".x.y.old"):
        if left == "folder":
            (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / ("stale" if left == "folder" else "")).write_text("stale", "utf-8")
    write_new(path, is_folder, "new")
    assert contents(path) == dict.fromkeys(WHOLE[is_folder], "new")
    assert os.listdir(tmp_path) == ["x.y"]


@KINDS
def test_an_exception_leaves_what_was_there(tmp_path, is_folder, monkeypatch):
    path = tmp_path / "x.y"
    write_new(path, is_folder, "old")

    def fail(*arguments, **keys):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("pathlib.Path.write_text", "config.sync", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(name, fail)
            with pytest.raises(OSError, match="No space left"):
                write_new(path, is_folder, "new")
        assert contents(path) == dict.fromkeys(WHOLE[is_folder], "old"), name
        assert os.listdir(tmp_path) == ["x.y"], name
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.mkdir()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["x.y"]


@KINDS
def test_contents_are_on_the_disk_before_names_and_names_before_the_old_goes(
    tmp_path, is_folder, monkeypatch
):
    path, calls, sync_now, rmtree = tmp_path / "x.y", [], sync, shutil.rmtree
    write_new(path, is_folder, "old")
    rename, replace = os.rename, os.replace

    def record(what, act):
        def recorded(*arguments, **keys):
            calls.append((what, *(Path(a).relative_to(tmp_path).as_posix() for a in arguments)))
            return act(*arguments, **keys)

        return recorded

    monkeypatch.setattr("config.sync", record("sync", sync_now))
    monkeypatch.setattr("os.rename", record("rename", rename))
    monkeypatch.setattr("os.replace", record("rename", replace))
    monkeypatch.setattr("shutil.rmtree", record("rmtree", rmtree))
    write_new(path, is_folder, "new")
    inner = ["", "/a", "/b", "/inner", "/inner/c"] if is_folder else [""]
    count = len(inner)
    assert sorted(calls[:count]) == [("sync", f".x.y.part{name}") for name in inner]
    aside, away = [("rename", "x.y", ".x.y.old")], [("rmtree", ".x.y.old")]
    expected = [
        *aside * is_folder,
        ("rename", ".x.y.part", "x.y"),
        ("sync", "."),
        *away * is_folder,
    ]
    assert calls[count:] == expected


def test_sync_asks_for_the_disk_and_tolerates_folders_that_cannot(tmp_path, monkeypatch):
    file, asked = tmp_path / "a", []
    file.write_bytes(b"a")

    def answering(code):
        def fsync(descriptor):
            asked.append(os.fstat(descriptor).st_ino)
            if code:
                raise OSError(code, os.strerror(code))

        return fsync

    def sync_answered(path, code):
        monkeypatch.setattr("os.fsync", answering(code))
        sync(path)

    for code in (0, errno.EINVAL, errno.ENOTSUP):
        sync_answered(tmp_path, code)
    sync_answered(file, 0)
    for path, code in [(tmp_path, errno.EIO), (file, errno.EINVAL), (file, errno.EIO)]:
        with pytest.raises(OSError) as caught:
            sync_answered(path, code)
        assert caught.value.errno == code
    folder_then_file = [tmp_path.stat().st_ino, file.stat().st_ino]
    assert asked == [i for i, n in zip(folder_then_file * 2, (3, 1, 1, 2)) for _ in range(n)]


def test_text_and_json_come_back(tmp_path):
    write_text(tmp_path / "a.txt", "é\r\n☂\n")
    assert (tmp_path / "a.txt").read_bytes() == "é\r\n☂\n".encode()
    value = {"é": [1, None, "☂"], "b": {"c": 0.1}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "☂" in (tmp_path / "a.json").read_text("utf-8")
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.txt"]
