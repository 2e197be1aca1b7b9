"""Proves how train.py behaves on a command line: errors, --help, --dry-run, kills and continuing.

    python -m pytest tests/test_train_cli.py        (34 s on 2 CPU cores, 2026-11-22)

What a user can cause ends with status 1 and the exact lines given here, before torch is imported
where files and settings show it, and else before the model is loaded: the model folder of those
tests has no weights. Runs that are killed start as forks of a process that has torch imported.
"""

import fcntl
import importlib.metadata
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import wait_for, wait_for_step

from extend_tokenizer import config_table

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "configs" / "sample"
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
TINY = (
    "seq_len=32", "effective_batch_size=4", "val_fraction=0.02", "max_steps=6", "save_every=2",
    "snapshot_every=2", "log_every=1", "eval_every=6", "prompts=[]",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def project_folder():
    """Commands run in the project's folder, as the README's do, and on one thread: where two cores
    are shared, threads that wait for each other make these runs ten times as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def model_without_weights(tmp_path) -> Path:
    """The sample's model folder less its weights: loading it would fail with another message."""
    folder = tmp_path / "model"
    shutil.copytree(SAMPLE / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


# ---- Before torch --------------------------------------------------------------------------------


def light(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`python train.py ARGUMENTS` where importing torch, transformers and their like raises."""
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


@pytest.mark.parametrize("key", ["lexicon", "corpus"])
def test_a_missing_file(tmp_path, key):
    line = f"{tmp_path / 'none.txt'}: cannot be read: No such file or directory"
    assert_refused(tmp_path, [f"{key}={tmp_path / 'none.txt'}"], [line])


@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_all_missing_files_are_named_at_once(tmp_path, option):
    none = [tmp_path / "none.txt", tmp_path / "no.txt"]
    lines = [f"{path}: cannot be read: No such file or directory" for path in none]
    assert_refused(tmp_path, [f"corpus={none[0]}", f"lexicon={none[1]}", *option], lines)


def test_an_empty_lexicon(tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_text("\n\n", encoding="utf-8")
    line = f"{path}: no usable word (empty file); give one word a line"
    assert_refused(tmp_path, [f"lexicon={path}"], [line])


def test_an_empty_corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(" \n", encoding="utf-8")
    assert_refused(tmp_path, [f"corpus={path}"], [f"{path}: the corpus file is empty; give a text"])


def test_a_model_folder_that_is_not_there(tmp_path):
    folder = str(tmp_path / "nomodel")
    assert_refused(tmp_path, [f"model_name={folder}"], [f"model_name {folder!r}: no such folder"])


def test_a_model_folder_without_a_tokenizer(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(SAMPLE / "model" / "config.json", folder)
    line = f"model_name {str(folder)!r}: {folder} holds no tokenizer"
    assert_refused(tmp_path, [f"model_name={folder}"], [line])


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


def test_dry_run_plans_without_heavy_imports_and_writes_nothing(tmp_path):
    run_dir = tmp_path / "run"
    result = light(tmp_path, "configs/sample.yaml", "--dry-run", f"run_dir={run_dir}")
    assert (result.returncode, result.stderr) == (0, "")
    plan = dict(re.findall(r"^([a-z ]+?) +([\d.]+) GiB", result.stdout, re.MULTILINE))
    beside = ("total", "margin", "host memory")
    parts = [float(value) for name, value in plan.items() if name not in beside]
    assert len(parts) >= 5 and sum(parts) == pytest.approx(float(plan["total"]), abs=0.04)
    # input and output rows and their row statistics: 2 x 341 x (128 + 1) fp32
    assert "bytes per sentry 351,912\n" in result.stdout
    assert re.search(r"^T4 +fits, micro_batch_size 16$", result.stdout, re.MULTILINE)
    kept = r"^about 4 of 4 layers can keep their activations: peak ([\d.]+) GiB$"
    peak = float(re.search(kept, result.stdout, re.MULTILINE)[1])
    assert float(plan["total"]) - 0.05 <= peak <= float(plan["total"]) + 0.2
    assert not run_dir.exists()


# ---- With torch, before the model ----------------------------------------------------------------


def train_command(log: str, arguments: list[str], environment: dict[str, str]) -> None:
    """In a forked process: what `python train.py ARGUMENTS` does once torch is imported."""
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    sys.argv, sys.path[0] = ["train.py", *arguments], str(ROOT)
    try:
        runpy.run_path("train.py", run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


@pytest.fixture(scope="module")
def start():
    """A function that starts train.py in a process forked from one with torch imported; no copies
    of this process, whose threads a fork would break."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*HEAVY[:3], "matplotlib.figure", "pytest"])
    started = []

    def start_train(log: Path, arguments: list, **environment: str):
        arguments = ["configs/sample.yaml", *TINY, *map(str, arguments)]
        process = context.Process(target=train_command, args=(str(log), arguments, environment))
        process.start()
        started.append(process)
        return process

    yield start_train
    for process in started:
        process.kill()


def finish(process, log: Path) -> tuple[int, str, str]:
    """(exit status, stdout, stderr less what libraries say while loading)."""
    process.join(300)
    texts = [Path(f"{log}.{name}").read_text(encoding="utf-8") for name in ("out", "err")]
    own = [line for line in texts[1].splitlines() if "Loading weights" not in line and line.strip()]
    own = [line for line in own if "from kernels-community" not in line]
    return process.exitcode, texts[0], "\n".join(own)


def assert_no_model(start, tmp_path: Path, model: Path, arguments: list, lines: list[str]) -> None:
    log = tmp_path / "log"
    arguments = [f"model_name={model}", f"run_dir={tmp_path / 'run'}", *arguments]
    status, _, errors = finish(start(log, arguments), log)
    assert errors == "\n".join(lines)
    assert status == 1


def test_a_corpus_shorter_than_a_sequence(start, tmp_path, model_without_weights):
    path = tmp_path / "corpus.txt"
    path.write_text("And Ammerlune slept.\n", encoding="utf-8")
    arguments = [f"corpus={path}", "val_fraction=0.5"]
    log = tmp_path / "log"
    arguments += [f"model_name={model_without_weights}", f"run_dir={tmp_path / 'run'}"]
    status, _, errors = finish(start(log, arguments), log)
    assert re.fullmatch(
        r"corpus: the train text has \d+ tokens, fewer than a sequence of 32 and its last target;"
        r" give more text or lower seq_len",
        errors,
    )
    assert status == 1


def test_a_lexicon_whose_words_never_occur(start, tmp_path, model_without_weights):
    path = tmp_path / "lexicon.txt"
    path.write_text("zzzblorp\nqwxyz\n", encoding="utf-8")
    line = (
        f"{path}: none of its 2 new words matches in the corpus (spaced matching); check that the"
        " two belong together"
    )
    assert_no_model(start, tmp_path, model_without_weights, [f"lexicon={path}"], [line])


def test_cuda_asked_for_and_absent(start, tmp_path, model_without_weights):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    line = (
        "device: 'cuda' was asked for but torch sees no CUDA GPU; use device=cpu, or choose a GPU"
        " runtime (Colab: Runtime > Change runtime type)"
    )
    assert_no_model(start, tmp_path, model_without_weights, ["device=cuda"], [line])


def test_a_second_training_on_one_run_folder(start, tmp_path, model_without_weights):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with open(run_dir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = f"run_dir: another training is using {run_dir}; wait for it, or give another run_dir"
        assert_no_model(start, tmp_path, model_without_weights, [], [line])


# ---- Killed and continued ------------------------------------------------------------------------


def losses(run_dir: Path) -> list[tuple]:
    """(step, kind, loss) of metrics.jsonl: what must not depend on a kill."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["step"], r["kind"], r.get("loss", r.get("val_loss"))) for r in records]


def last_rows(run_dir: Path) -> bytes:
    return (run_dir / "sentries" / "step_000006" / "rows.safetensors").read_bytes()


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory) -> dict[str, Path]:
    """Run folders of six steps without a kill, by quantization."""
    folder = tmp_path_factory.mktemp("straight")
    runs = {name: (folder / name, folder / f"{name}_log") for name in ("none", "nf4")}
    for name, (run_dir, log) in runs.items():
        status, _, errors = finish(start(log, [f"run_dir={run_dir}", f"quantization={name}"]), log)
        assert status == 0, errors
    return {name: run_dir for name, (run_dir, _) in runs.items()}


def test_a_straight_run_logs_each_step_once(straight):
    found = losses(straight["nf4"])
    wanted = [(0, "eval")] + [(n, "train") for n in range(1, 7)] + [(6, "eval")]
    assert [entry[:2] for entry in found] == wanted


@pytest.mark.parametrize("name, fault", [("none", "rows_written@4"), ("nf4", "before_marker@4")])
def test_killed_in_a_save_and_continued_equals_straight(start, tmp_path, straight, name, fault):
    """SIGKILL in the middle of the second save; step 2 is the last whole one."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = [f"run_dir={run_dir}", f"quantization={name}"]
    killed = start(log, arguments, WAKE2VEC_FAULT=fault)
    killed.join(300)
    assert killed.exitcode == -signal.SIGKILL
    status, out, errors = finish(start(log, arguments), log)
    assert status == 0, errors
    assert f"continuing from {run_dir / 'snapshots' / 'step_000002'}, step 2\n" in out
    assert losses(run_dir) == losses(straight[name])
    assert last_rows(run_dir) == last_rows(straight[name])


def test_killed_from_outside_with_only_the_durable_folder_left(start, tmp_path, straight):
    """As on a notebook host: SIGKILL at any moment, the local disk is gone, the Drive is not."""
    run_dir, durable, log = tmp_path / "run", tmp_path / "drive", tmp_path / "log"
    arguments = [f"run_dir={run_dir}", f"sentry_dir={durable}", "quantization=nf4"]
    killed = start(log, arguments)
    wait_for((durable / "step_000002" / "state.json").exists, "no sentry came")
    killed.kill()
    killed.join()
    shutil.rmtree(run_dir)
    status, out, errors = finish(start(log, arguments), log)
    assert status == 0, errors
    assert re.search(rf"^continuing from {re.escape(str(durable))}/step_00000\d, ", out, re.M)
    assert losses(run_dir) == losses(straight["nf4"])
    rows = durable / "step_000006" / "rows.safetensors"
    assert rows.read_bytes() == last_rows(straight["nf4"])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_stop_signal_leaves_a_sentry_and_status_1(start, tmp_path, name):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = [f"run_dir={run_dir}", "quantization=none", "max_steps=5000", "save_every=5000"]
    process = start(log, [*arguments, "snapshot_every=5000", "eval_every=5000"])
    wait_for_step(run_dir, 3)
    os.kill(process.pid, getattr(signal, name))
    status, _, errors = finish(process, log)
    step = losses(run_dir)[-1][0]
    line = f"stopped by {name} at step {step}, saved; the same command goes on from there"
    heard = f"{name}: stopping after this step, saved; once more ends at once"
    assert (status, errors) == (1, f"{heard}\n{line}")
    assert (run_dir / "sentries" / f"step_{step:06d}" / "state.json").exists()


def test_what_continuing_refuses(start, tmp_path, straight):
    """Changed keys are named, a step that is not there too; the run's files stay as they were."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(straight["none"], run_dir)
    before = {p: p.stat().st_mtime_ns for p in run_dir.glob("s*/step_*/*")}
    changed = start(
        log, [f"run_dir={run_dir}", "quantization=none", "learning_rate=0.1", "seq_len=16"]
    )
    other_log = tmp_path / "other_log"
    _, _, errors = finish(changed, log)
    assert errors.splitlines() == [
        "seq_len: the run was started with 32, now it is 16",
        "learning_rate: the run was started with 0.01, now it is 0.1",
        "put these keys back to continue, or start over with --fresh (the old run is kept aside)",
    ]
    missing = start(other_log, [f"run_dir={run_dir}", "quantization=none", "--step", "3"])
    status, _, errors = finish(missing, other_log)
    folders = f"{run_dir / 'snapshots'}, {run_dir / 'sentries'}"
    assert (status, errors) == (1, f"no whole sentry of step 3 in {folders}")
    assert before and {p: p.stat().st_mtime_ns for p in run_dir.glob("s*/step_*/*")} == before


def test_fresh_starts_over_and_keeps_the_old_run(start, tmp_path, straight):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(straight["none"], run_dir)
    arguments = [f"run_dir={run_dir}", "quantization=none", "learning_rate=0.02", "--fresh"]
    status, out, errors = finish(start(log, arguments), log)
    assert status == 0, errors
    assert "continuing from" not in out
    assert losses(run_dir / "old-1") == losses(straight["none"])
    assert len(losses(run_dir)) == len(losses(straight["none"]))
    assert last_rows(run_dir) != last_rows(straight["none"])


def test_the_command_as_a_person_types_it(tmp_path):
    """No fork, no tricks: `python train.py`, to the loss table."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "train.py", "configs/sample.yaml", *TINY, f"run_dir={run_dir}"]
    result = subprocess.run([*command, "max_steps=2"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    table = (run_dir / "loss_table.md").read_text(encoding="utf-8")
    assert table.startswith("| Step | Train | Val | Notes |\n|---|---|---|---|\n| 0 | - | ")
    assert result.stdout.rstrip().endswith(table.rstrip())
    assert f"torch {importlib.metadata.version('torch')}" in result.stdout
