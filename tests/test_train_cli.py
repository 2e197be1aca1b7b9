"""Proves how train.py behaves on a command line: errors, --help, --dry-run, kills and continuing.

    python -m pytest tests/test_train_cli.py        (31 s on 2 shared CPU cores, 2026-11-25)

What a user can cause ends with status 1 and the exact lines given here: what the settings show
before torch is imported, and what the files show before the model is loaded, for the model folder
of those tests has no weights. Kills are of real processes here. That a continued run is the same
bit for bit, in NF4 and with each kind of output rows too, is proved in test_survival.py. Runs are
forks here; test_notebook.py runs `python train.py` itself.
"""

import fcntl
import json
import os
import pty
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import forked
import pytest
import yaml
from tiny_models import tiny_settings, wait_for, wait_for_step

from config import config_table

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "bitsandbytes", "accelerate", "matplotlib")
# Found on PYTHONPATH before any other: the interpreter imports it first.
NO_HEAVY_IMPORTS = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in {HEAVY}:
            raise RuntimeError(f"{{name}} was imported")
sys.meta_path.insert(0, Refuse())
"""
END = b"\x04"
FOREVER = ("max_steps=5000", "save_every=5000", "eval_every=5000")


@pytest.fixture(scope="module", autouse=True)
def project_folder():
    """Commands run in the project's folder, as the README's do, and on one thread: if threads wait
    for each other on shared cores, these runs take ten times as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


# ---- Before torch --------------------------------------------------------------------------------


def light(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run `python train.py ARGUMENTS` where importing torch, transformers and their like raises."""
    (tmp_path / "sitecustomize.py").write_text(NO_HEAVY_IMPORTS, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"}
    command = [sys.executable, "train.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def assert_refused(tmp_path: Path, arguments: list[str], lines: list[str]) -> None:
    run_dir = tmp_path / "run"
    result = light(tmp_path, "configs/sample.yaml", f"run_dir={run_dir}", *arguments)
    assert result.stderr == "".join(line + "\n" for line in lines)
    assert (result.returncode, result.stdout) == (1, "")
    assert not run_dir.exists(), "a refused run left files"


def test_the_guard_of_these_tests_works(tmp_path):
    """A run with nothing wrong must get as far as importing torch, and be stopped there."""
    result = light(tmp_path, "configs/sample.yaml", f"run_dir={tmp_path / 'run'}")
    assert "RuntimeError: torch was imported" in result.stderr


def test_unknown_and_mistyped_keys_are_all_named_at_once(tmp_path):
    lines = [
        "configs/sample.yaml: command line: unknown key 'lr', did you mean 'learning_rate'?",
        "configs/sample.yaml: 'max_steps' is 'many'; allowed: a whole number of at least 1",
        "configs/sample.yaml: 'device' is 'tpu'; allowed: auto, cuda, cpu",
    ]
    assert_refused(tmp_path, ["lr=3", "device=tpu", "max_steps=many"], [lines[0], *lines[1:][::-1]])


def test_a_config_that_is_not_there(tmp_path):
    result = light(tmp_path, "configs/nosuch.yaml")
    assert result.stderr == "configs/nosuch.yaml: no such file; give the path of a YAML config\n"
    assert (result.returncode, result.stdout) == (1, "")


def test_help_shows_an_example_first_and_every_key(tmp_path):
    result = light(tmp_path, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "usage: train.py CONFIG [key=value ...] [options]"
    assert lines[2] == "example:"
    example = lines[3].split()
    assert example[:2] == ["python", "train.py"] and Path(example[2]).is_file()
    shown = [line.split(maxsplit=2) for line in lines]
    for row in config_table():
        assert list(row) in shown, row
    for option in ("--dry-run", "--fresh", "--step"):
        assert option in result.stdout


@pytest.mark.parametrize(
    "arguments", [[], ["configs/sample.yaml", "--bogus"], ["configs/sample.yaml", "--step", "x"]]
)
def test_bad_usage_has_status_2(tmp_path, arguments):
    result = light(tmp_path, *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: train.py CONFIG [key=value ...] [options]\n")


@pytest.mark.parametrize("arguments", [[], ["--dry-run"]])
def test_without_a_config_the_error_says_what_to_do(tmp_path, arguments):
    assert light(tmp_path, *arguments).stderr.splitlines()[1:] == [
        "train.py: error: give a CONFIG, a YAML file with the settings. example:",
        "  python train.py configs/sample.yaml max_steps=60",
    ]


# ---- With torch, before the model ----------------------------------------------------------------


def train_command(*arguments: str) -> None:
    """Do what `python train.py ARGUMENTS` does."""
    sys.argv, sys.path[0] = ["train.py", *arguments], str(ROOT)
    runpy.run_path("train.py", run_name="__main__")


class Runs:
    """Starts train.py on the same settings again and again; the logs lie in the same folder."""

    def __init__(self, folder: Path, settings: dict):
        self.folder, self.path = folder, folder / "config.yaml"
        self.path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        self.number = 0

    def start(self, *arguments, **environment: str):
        self.number += 1
        log = self.folder / f"log_{self.number}"
        words = map(str, (self.path, *arguments))
        return forked.start(train_command, log, environment, *words), log

    def end(self, *arguments, **environment: str) -> tuple[int, str, str]:
        """Run to the end -> (exit status, stdout, stderr)."""
        return forked.finish(*self.start(*arguments, **environment))


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    return tiny_settings(tmp_path_factory.mktemp("tiny"), max_steps=6, eval_every=6)


@pytest.fixture
def runs(tmp_path, settings) -> Runs:
    return Runs(tmp_path, settings | {"run_dir": str(tmp_path / "run")})


@pytest.fixture
def without_weights(tmp_path, settings) -> Runs:
    """Give runs a model folder without weights, so that loading it ends with another line."""
    model, run_dir = tmp_path / "model", str(tmp_path / "run")
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(settings["model_name"], model, ignore=ignored)
    return Runs(tmp_path, settings | {"run_dir": run_dir, "model_name": str(model)})


def test_the_guard_of_the_next_tests_works(without_weights, tmp_path):
    """A run with nothing else wrong gets as far as the weights that are not there."""
    status, _, errors = without_weights.end()
    assert status == 1 and errors.startswith(f"model_name: {tmp_path / 'model'}: ")


SHORT = (
    "corpus: the train text has 5 tokens, fewer than a sequence of 16 and its last target; give"
    " more text or lower seq_len"
)
NEVER = (
    "{}: none of its 2 new words matches in the corpus (both matching); check that the two belong"
    " together"
)


@pytest.mark.parametrize(
    "key, text, line",
    [
        ("lexicon", None, "lexicon: {}: cannot be read: No such file or directory"),
        ("corpus", None, "corpus: {}: cannot be read: No such file or directory"),
        ("lexicon", "\n\n", "lexicon: {}: no usable word (empty file); give one word a line"),
        ("corpus", " \n", "{}: the corpus file is empty; give a text"),
        ("lexicon", "zzzblorp\nqwxyz\n", NEVER),
        ("corpus", "the glimock.\n", SHORT),
    ],
)
def test_texts_that_cannot_be_used(without_weights, tmp_path, key, text, line):
    """A dry run refuses them too, for a training with them would."""
    path = tmp_path / f"{key}.txt"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert without_weights.end(f"{key}={path}") == (1, "", line.format(path))
    if line != NEVER:
        assert without_weights.end(f"{key}={path}", "--dry-run") == (1, "", line.format(path))


def test_model_folders_that_cannot_be_used(without_weights, tmp_path):
    path = tmp_path / "none"
    line = f"model_name {str(path)!r}: no such folder"
    assert without_weights.end(f"model_name={path}") == (1, "", line)
    path.mkdir()
    shutil.copy(tmp_path / "model" / "config.json", path)
    line = f"model_name {str(path)!r}: {path} holds no tokenizer"
    assert without_weights.end(f"model_name={path}") == (1, "", line)


def test_cuda_asked_for_and_absent(without_weights):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    line = (
        "device: 'cuda' was asked for but torch sees no CUDA GPU; use device=cpu, or choose a GPU"
        " runtime (Colab: Runtime > Change runtime type)"
    )
    assert without_weights.end("device=cuda") == (1, "", line)


def test_dry_run_plans_without_weights_and_writes_nothing(without_weights, tmp_path):
    status, out, errors = without_weights.end("--dry-run", "micro_batch_size=auto")
    assert (status, errors) == (0, "")
    plan = dict(re.findall(r"^([a-z ]+?) +([\d.]+) GiB", out, re.MULTILINE))
    beside = ("total", "margin", "host memory")
    parts = [float(value) for name, value in plan.items() if name not in beside]
    assert 0 < float(plan["new rows"]) < 0.005  # 20 rows are not 0.00 GiB
    assert len(parts) >= 5 and sum(parts) == pytest.approx(float(plan["total"]), abs=0.04)
    # input and output rows and their row statistics: 2 x 20 x (32 + 1) fp32
    assert "bytes per sentry 5,280\n" in out
    assert re.search(r"^T4 +fits, micro_batch_size 4$", out, re.MULTILINE)
    assert out.endswith("whether the model's logits can be served is proved at the start of a run")
    kept = r"^about 2 of 2 layers can keep their activations: peak ([\d.]+) GiB$"
    peak = float(re.search(kept, out, re.MULTILINE)[1])
    assert float(plan["total"]) - 0.05 <= peak <= float(plan["total"]) + 0.2
    assert not (tmp_path / "run").exists()


# ---- Killed and continued ------------------------------------------------------------------------


def losses(run_dir: Path) -> list[tuple]:
    """Read (step, kind, loss) of every record: what must not depend on a kill."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["step"], r["kind"], r.get("loss", r.get("val_loss"))) for r in records]


def last_rows(run_dir: Path) -> bytes:
    return (run_dir / "sentries" / "step_000006" / "rows.safetensors").read_bytes()


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory) -> Path:
    """Make a run of six steps without a kill; its folder."""
    folder = tmp_path_factory.mktemp("straight")
    status, _, errors = Runs(folder, settings | {"run_dir": str(folder / "run")}).end()
    assert status == 0, errors
    return folder / "run"


def test_a_straight_run_logs_each_step_once(straight):
    wanted = [(0, "eval")] + [(n, "train") for n in range(1, 7)] + [(6, "eval")]
    assert [entry[:2] for entry in losses(straight)] == wanted


@pytest.mark.parametrize("fault", ["rows_written@4", "before_marker@4"])
def test_killed_in_a_save_and_continued_equals_straight(runs, tmp_path, straight, fault):
    """SIGKILL comes in the middle of the second save, so step 2 is the last whole one."""
    run_dir = tmp_path / "run"
    assert runs.end(WAKE2VEC_FAULT=fault)[0] == -signal.SIGKILL
    status, out, errors = runs.end()
    assert status == 0, errors
    assert f"continuing from {run_dir / 'snapshots' / 'step_000002'}, step 2\n" in out
    assert losses(run_dir) == losses(straight)
    assert last_rows(run_dir) == last_rows(straight)


def test_killed_from_outside_with_only_the_durable_folder_left(runs, tmp_path, straight):
    """A notebook host ends like this: SIGKILL at any moment, and the Drive alone is left."""
    run_dir, durable = tmp_path / "run", tmp_path / "drive"
    killed, _ = runs.start(f"sentry_dir={durable}")
    wait_for((durable / "step_000002" / "state.json").exists, "no sentry came")
    killed.kill()
    killed.join()
    shutil.rmtree(run_dir)
    status, out, errors = runs.end(f"sentry_dir={durable}")
    assert status == 0, errors
    assert re.search(rf"^continuing from {re.escape(str(durable))}/step_00000\d, ", out, re.M)
    assert losses(run_dir) == losses(straight)
    assert (durable / "step_000006" / "rows.safetensors").read_bytes() == last_rows(straight)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_stop_signal_leaves_a_sentry_and_status_1(runs, tmp_path, name):
    """Meanwhile no second training can use the run's folder."""
    run_dir = tmp_path / "run"
    process, log = runs.start(*FOREVER)
    wait_for_step(run_dir, 3)
    line = f"run_dir: another training is using {run_dir}; wait for it, or give another run_dir"
    assert runs.end() == (1, "", line)
    os.kill(process.pid, getattr(signal, name))
    status, _, errors = forked.finish(process, log)
    step = losses(run_dir)[-1][0]
    line = f"stopped by {name} at step {step}, saved; the same command goes on from there"
    heard = f"{name}: stopping after this step, saved; once more ends at once"
    assert (status, errors) == (1, f"{heard}\n{line}")
    assert (run_dir / "sentries" / f"step_{step:06d}" / "state.json").exists()


def test_what_continuing_refuses(runs, tmp_path, straight):
    """Changed keys are named, and a step that is not there; the run's files stay as they were."""
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*") if p.is_file()}
    status, _, errors = runs.end("learning_rate=0.1", "seq_len=8")
    assert status == 1 and errors.splitlines() == [
        "seq_len: the run was started with 16, now it is 8",
        "learning_rate: the run was started with 0.01, now it is 0.1",
        "put these keys back to continue, or start over with --fresh (the old run is kept aside)",
    ]
    status, _, errors = runs.end("--step", "3")
    folders = f"{run_dir / 'snapshots'}, {run_dir / 'sentries'}"
    assert (status, errors) == (1, f"no whole sentry of step 3 in {folders}")
    assert before == {p: p.stat().st_mtime_ns for p in run_dir.rglob("*") if p.is_file()}


def test_fresh_starts_over_and_keeps_the_old_run(runs, tmp_path, straight):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    status, out, errors = runs.end("learning_rate=0.02", "--fresh")
    assert status == 0, errors
    assert "continuing from" not in out
    assert losses(run_dir / "old-1") == losses(straight)
    assert len(losses(run_dir)) == len(losses(straight))
    assert last_rows(run_dir) != last_rows(straight)


# ---- Progress ------------------------------------------------------------------------------------


def test_lines_and_records_come_every_log_every_steps_and_at_the_end(runs, tmp_path):
    status, out, errors = runs.end("log_every=4")
    assert (status, errors) == (0, "")  # no bar
    assert re.findall(r"^step (\d)/6  loss [\d.]+  .* left$", out, re.MULTILINE) == ["4", "6"]
    assert [step for step, kind, _ in losses(tmp_path / "run") if kind == "train"] == [4, 6]


@pytest.fixture
def terminal():
    """Open a terminal of 80 columns -> (its path, a function that reads what was written to it)."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    received = bytearray()

    def receive() -> None:
        while not received.endswith(END):
            received.extend(os.read(master, 2**16))

    reader = threading.Thread(target=receive, daemon=True)
    reader.start()

    def read() -> str:
        """Read all that was written; nothing may be written afterwards."""
        os.write(slave, END)
        reader.join(60)
        return received.removesuffix(END).decode("utf-8")

    yield os.ttyname(slave), read
    os.close(master)
    os.close(slave)


def screen(text: str, columns: int) -> list[str]:
    """List the lines that a terminal shows in the end; a line that is too long is wrapped."""
    lines, column = [""], 0
    for character in text:
        if character == "\n":
            lines.append("")
        elif character == "\r":
            column = 0
        else:
            assert character.isprintable(), repr(character)
            if column == columns:
                lines.append("")
                column = 0
            lines[-1] = lines[-1][:column].ljust(column) + character + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def test_a_terminal_shows_one_bar_below_the_lines(runs, terminal):
    """Losses stay on the screen, and a bar that wrapped would leave its first half behind."""
    path, read = terminal
    status, _, _ = runs.end("prompts=[the glimock, a borish]", TEST_STDOUT=path, TEST_STDERR=path)
    _, start, written = read().partition("\r\nmicro_batch_size ")
    assert status == 0, written
    lines = screen(start + written, 80)
    shown = re.findall(r"step (\d)/6  loss [\d.]+  .* left$", "\n".join(lines), re.MULTILINE)
    assert shown == ["1", "2", "3", "4", "5", "6"]
    (bar,) = [line for line in lines if "%|" in line]
    assert "6/6 [" in bar and re.search(r"\[\d\d:\d\d\]$", bar) and len(bar) <= 80
    wrapped = [line for line in written.split("\r\n") if len(line.rpartition("\r")[2]) > 80]
    assert all(str(runs.folder) in line for line in wrapped)  # only a long path may


def test_lines_come_at_once_if_only_the_bar_is_on_a_terminal(runs, tmp_path, terminal):
    """A person types `python train.py CONFIG | tee log` and watches."""
    path, read = terminal
    process, log = runs.start(*FOREVER, TEST_STDERR=path)
    wait_for_step(tmp_path / "run", 3)
    process.kill()
    _, out, _ = forked.finish(process, log)
    assert "\nstep 2/5000  loss " in out
    assert "%|" not in out and "/5000 [" in read()
