"""Proves that the README is true: its commands run, its tables are the program's, its files exist.

    python -m pytest tests/test_readme.py        (28 s on 2 CPU cores, 2026-11-22)

The Colab section is executed by tests/test_notebook.py, the test command by .ci/run.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from extend_tokenizer import config_table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = ["env_shim.py", "extend_tokenizer.py", "overlay.py", "recover.py", "train.py"]


def shell_blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    """The text below a heading, up to the next one."""
    assert f"\n## {title}\n" in README
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table_rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table's lines, less the head and its rule."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_first_command_by_line_25_and_no_more_than_330_lines():
    lines = README.splitlines()
    assert lines.index("```sh") + 1 < 25
    assert len(lines) <= 330


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


def test_the_config_table_is_the_dataclasss_and_its_command_prints_it():
    shown = table_rows(section("Settings"))
    assert shown == [[k, d, m.replace("|", "/")] for k, d, m in config_table()]
    [command] = re.findall(r"^python -c .*$", section("Settings"), re.MULTILINE)
    command = command.replace("python", f'"{sys.executable}"', 1)
    printed = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (printed.returncode, printed.stderr) == (0, "")
    assert printed.stdout in README


def test_the_file_table_names_every_script():
    names = [row[0].strip("`") for row in table_rows(section("Files"))]
    assert sorted(name for name in names if name.endswith(".py")) == SCRIPTS
    assert sorted(path.name for path in ROOT.glob("*.py")) == SCRIPTS
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_every_file_that_is_named_is_there():
    named = re.findall(r"(?<![\w/])(?:\w+\.py|(?:configs|tests)/[\w/.]*\w)", README)
    assert len(named) > 20
    others = {"convert_hf_to_gguf.py"}  # llama.cpp's
    assert [name for name in named if not (ROOT / name).exists()] == sorted(others & {*named})


@pytest.mark.parametrize("script", ["train.py", "recover.py", "extend_tokenizer.py"])
def test_every_option_that_is_named_is_in_help(script):
    text = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    commands = re.findall(rf"python {script} [^`\n#]*", README)
    options = {option for c in commands for option in re.findall(r"--[\w-]+", c)}
    if script == "train.py":
        options |= {"--fresh", "--step"}
    assert sorted(option for option in options if option not in text) == []


def test_no_path_but_colabs_own_is_absolute():
    assert re.findall(r"(?:^|[\s\"'(=`])(/(?!content/)\w[\w/]*)", README) == []


def test_copy_it_is_said_before_the_first_heading():
    assert "Copy it; it is not a library" in README.partition("\n## ")[0]


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    """The run folder of the README's first command, as written but for the folder."""
    run_dir = tmp_path_factory.mktemp("sample") / "run"
    command = [sys.executable, *shell_blocks()[0].split("&& ")[-1].split()[1:]]
    # One thread: where the cores are shared, two that wait for each other take ten times as long.
    result = subprocess.run(
        [*command, f"run_dir={run_dir}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert (run_dir / "loss_table.md").read_text(encoding="utf-8").strip() in result.stdout
    return run_dir


def test_the_sample_learns(sample):
    lines = (sample / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    first, *_, last = [record for record in records if record["kind"] == "eval"]
    assert last["val_loss"] < first["val_loss"] - 1.0
    assert last["val_loss"] < last["uniform_loss"] - 2.0
    assert last["val_bits_per_byte"] < last["base_bits_per_byte"] / 2
    assert last["warnings"] == []


def test_the_sample_table_is_the_samples(sample):
    """Losses to 0.02 nats: another processor rounds otherwise, and 60 steps carry that on."""
    shown = table_rows(section("What the sample shows"))
    made = {row[0]: row for row in table_rows((sample / "loss_table.md").read_text("utf-8"))}
    assert [row[0] for row in shown] == ["0", "20", "40", "60"]
    for step, train, val, notes in shown:
        for ours, theirs in zip((train, val), made[step][1:3]):
            if ours != "-":
                assert float(ours) == pytest.approx(float(theirs), abs=0.02)
        assert re.sub(r"[\d.]+", "", notes) == re.sub(r"[\d.]+", "", made[step][3])


def test_the_run_folder_holds_what_the_readme_says(sample):
    sentence = section("Files").partition("A run folder holds ")[2].partition("Losses are")[0]
    said = {name.rstrip("/") for name in re.findall(r"`([\w.]+/?)`", sentence)} - {"sentry_dir"}
    assert said == {path.name for path in sample.iterdir() if not path.name.startswith(".")}
