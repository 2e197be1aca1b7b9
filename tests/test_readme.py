"""Proves that the README is true: its commands run, its tables are the program's, its files exist.

    python -m pytest tests/test_readme.py        (40 s on 2 CPU cores, 2026-11-25)

tests/test_notebook.py executes the Colab section, and .ci/run the test command. What
docs/measurements.md says of the sample, of commands and of files is checked here too.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from config import KEYS, config_table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASUREMENTS = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
SCRIPTS = [
    "config.py", "env_shim.py", "extend_tokenizer.py", "machine.py", "overlay.py", "recover.py",
    "train.py",
]  # fmt: skip
HEADINGS = [
    "The two commands", "How it works", "Your own book, in five steps", "Colab",
    "Using the result", "When not to use it", "Settings", "What is promised about saves", "Limits",
    "Glossary", "Files", "Sources and licence",
]  # fmt: skip
# Other projects' files, and the reader's own.
NOT_OURS = {"convert_hf_to_gguf.py"}


def shell_blocks(text: str = README) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def section(title: str, text: str = README) -> str:
    """The text below a heading, up to the next one."""
    assert f"\n## {title}\n" in text
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table_rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table's lines, without the head and its rule."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def commands(text: str, script: str) -> list[str]:
    """Every `python SCRIPT ...` of a text, in blocks and in sentences."""
    return re.findall(rf"(?:python|torchrun --\S+ \d+) {script} [^`\n#]*", text)


# ---- The page ------------------------------------------------------------------------------------


def test_first_command_by_line_25_and_no_more_than_200_lines():
    lines = README.splitlines()
    assert lines.index("```sh") + 1 <= 25
    assert len(lines) <= 200


def test_the_sections_and_their_order():
    assert re.findall(r"^## (.*)$", README, re.MULTILINE) == HEADINGS


def test_the_glossary_has_the_projects_own_words():
    words = re.findall(r"^- \*\*(.*?)\*\*: ", section("Glossary"), re.MULTILINE)
    assert words == ["row", "sentry", "devlog", "bits per byte"]


def test_every_link_leads_somewhere():
    found = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", README + MEASUREMENTS)
    links = [(path or "docs/measurements.md", anchor) for path, anchor in found]
    assert ("docs/loss.png", "") in links
    assert ("docs/measurements.md", "the-sample") in links
    for path, anchor in links:
        assert (ROOT / path).is_file()
        if anchor:
            titles = re.findall(r"^##+ (.*)$", (ROOT / path).read_text("utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]


def test_copy_it_and_the_missing_t4_are_said():
    assert "Copy it; it is not a library" in section("How it works")
    assert "No T4 was at hand" in section("Colab")


# ---- Its commands --------------------------------------------------------------------------------


def test_the_two_commands_start_from_a_bare_python():
    install = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt"
    sample, tests = shell_blocks()[:2]
    assert sample == f"{install} && python train.py configs/sample.yaml\n"
    pytest_command = "python -m pytest -q -n 2 --dist loadfile tests"
    assert tests == f"{install} -r tests/requirements.txt && {pytest_command}\n"


def test_ci_runs_the_readmes_own_test_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    extraction = re.search(r'^command="\$\((.*)\)"$', script, re.MULTILINE)[1]
    found = subprocess.run(["bash", "-c", extraction], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == shell_blocks()[1]
    assert re.search(r'^bash .* -c "\$command"', script, re.MULTILINE)
    assert "set -euo pipefail" in script and (ROOT / ".ci" / "run").stat().st_mode & 0o100
    assert [p for p in re.findall(r"tests/[\w/]+\.py", script) if not (ROOT / p).exists()] == []


@pytest.mark.parametrize("script", ["train.py", "recover.py", "extend_tokenizer.py"])
def test_every_option_that_is_named_is_in_help(script, monkeypatch, capsys):
    found = [*commands(README, script), *commands(MEASUREMENTS, script)]
    assert found
    options = {option for c in found for option in re.findall(r"(?<!\S)--[\w-]+", c)}
    options -= {option for c in found for option in re.findall(r"--\S+ \d+ train", c)}
    helps = [[]]
    if script == "train.py":
        options |= {"--fresh", "--dry-run"}
    if script == "recover.py":
        helps = [["export"], ["neighbours"]]
    for words in helps:
        monkeypatch.setattr(sys, "argv", [script, *words, "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    text = capsys.readouterr().out
    assert sorted(o for o in options if o not in text and "nproc" not in o) == []


def test_every_override_that_is_named_is_a_key():
    found = [c for s in SCRIPTS for text in (README, MEASUREMENTS) for c in commands(text, s)]
    names = {name for c in found for name in re.findall(r"(?<!\S)(\w+)=", c)}
    assert {"corpus", "lexicon", "run_dir", "sentry_dir"} <= names
    assert names <= set(KEYS)


def test_no_path_but_colabs_own_is_absolute():
    text = README + MEASUREMENTS
    assert re.findall(r"(?:^|[\s\"'(=`])(/(?!content/)\w[\w/]*)", text) == []


# ---- Its tables and files ------------------------------------------------------------------------


def test_the_settings_table_is_the_dataclasss():
    shown = table_rows(section("Settings"))
    assert shown == [[k, d, m.replace("|", "/")] for k, d, m in config_table()]


def test_the_file_table_names_every_script():
    names = [row[0].strip("`") for row in table_rows(section("Files"))]
    assert sorted(name for name in names if name.endswith(".py")) == SCRIPTS
    assert sorted(path.name for path in ROOT.glob("*.py")) == SCRIPTS
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("text", [README, MEASUREMENTS], ids=["README", "measurements"])
def test_every_file_that_is_named_is_there(text):
    named = set(re.findall(r"(?<![\w/])(?:\w+\.py|(?:configs|tests|docs)/[\w/.]*\w)", text))
    assert len(named) > 10
    assert {name for name in named if not (ROOT / name).exists()} <= NOT_OURS


def test_no_bench_or_torture_is_collected_as_a_test():
    for folder in ("bench", "torture"):
        paths = list((ROOT / "tests" / folder).glob("*.py"))
        assert paths and not [path.name for path in paths if path.name.startswith("test_")]


# ---- The sample ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    """The run folder of the README's first command, as written but for the folder."""
    run_dir = tmp_path_factory.mktemp("sample") / "run"
    command = [sys.executable, *shell_blocks()[0].split("&& ")[-1].split()[1:]]
    result = subprocess.run(
        [*command, f"run_dir={run_dir}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # other tests run beside this one
    )
    assert result.returncode == 0, result.stderr
    assert f"generate  python recover.py generate {run_dir} 'And in the morning" in result.stdout
    return run_dir


def evaluations(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "eval"]


def test_the_sample_learns(sample):
    first, *_, last = evaluations(sample)
    assert last["val_loss"] < first["val_loss"] - 1.0
    assert last["val_loss"] < last["uniform_loss"] - 2.0
    assert last["val_bits_per_byte"] < last["base_bits_per_byte"] / 2
    assert last["warnings"] == []


def test_the_figures_of_the_sample_are_its_own(sample):
    """To 0.01 bits: another processor rounds otherwise, and 60 steps carry that on."""
    last = evaluations(sample)[-1]
    trained, base = re.search(
        r"takes ([\d.]+) bits per byte instead of.* ([\d.]+)\.", README
    ).groups()
    assert float(trained) == pytest.approx(last["val_bits_per_byte"], abs=0.01)
    assert float(base) == pytest.approx(last["base_bits_per_byte"], abs=0.01)


def test_the_sample_table_is_the_samples(sample):
    """Losses to 0.02 nats, for the same reason."""
    shown = table_rows(section("The sample", MEASUREMENTS))
    made = {row[0]: row for row in table_rows((sample / "loss_table.md").read_text("utf-8"))}
    assert [row[0] for row in shown] == ["0", "20", "40", "60"]
    for step, train, val, notes in shown:
        for ours, theirs in zip((train, val), made[step][1:3]):
            if ours != "-":
                assert float(ours) == pytest.approx(float(theirs), abs=0.02)
        assert re.sub(r"[\d.]+", "", notes) == re.sub(r"[\d.]+", "", made[step][3])


def test_the_two_texts_continue_the_samples_prompt(sample):
    """The trained text has new words, marked as in samples.md, and the untouched model's has none.
    The texts themselves are not compared, because another processor may draw other tokens."""
    untouched, trained = re.findall(r"^> (.*)$", README, re.MULTILINE)
    lexicon = set((ROOT / "configs/sample/lexicon.txt").read_text(encoding="utf-8").split())
    last = (sample / "samples.md").read_text(encoding="utf-8").split("## Step ")[-1]
    prompt = os.path.commonprefix([untouched, trained])
    assert "And in the morning the people of the city" in prompt
    for text in (trained, last):
        assert prompt.strip() in text
        marked = re.findall(r"\*\*(.*?)\*\*", text)
        assert len(marked) > 1 and set(marked) <= lexicon
    assert "**" not in untouched and not lexicon & set(re.findall(r"\w+", untouched))


def test_the_run_folder_holds_what_the_readme_says(sample):
    sentence = section("Files").partition("A run folder holds ")[2].partition("Every loss")[0]
    said = {name.rstrip("/") for name in re.findall(r"`([\w.]+/?)`", sentence)} - {"sentry_dir"}
    assert said == {path.name for path in sample.iterdir() if not path.name.startswith(".")}
