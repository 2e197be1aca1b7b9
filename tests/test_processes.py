"""Several processes train one run: same sequences, same losses, one of them writes, none hangs.

    python -m pytest tests/test_processes.py        (74 s, 2 shared CPU cores, 2026-11-22)

Processes are forks with torch imported, started with the variables that torchrun sets, on gloo; one
test is torchrun itself. tests/torture_processes.py kills one of two at random moments, many times.
"""

import datetime
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import save_model, write_words
from waiting import wait_for_step

import recover
import train
from extend_tokenizer import run_command

ROOT = Path(__file__).resolve().parent.parent
BATCH = 12
DEAD = (
    "process {} ends: another process of this run died or cannot be reached; start the same command"
    " again"
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("tiny")
    return {
        "model_name": str(save_model("qwen2_untied", folder / "model")), **write_words(folder),
        "quantization": "none", "device": "cpu", "seq_len": 16, "effective_batch_size": BATCH,
        "max_steps": 8, "learning_rate": 0.01, "log_every": 1, "eval_every": 8, "save_every": 2,
        "snapshot_every": 2, "val_fraction": 0.1, "micro_batch_size": 1,
    }  # fmt: skip


def worker(
    log: str, config: str, overrides: list[str], environment: dict[str, str], fresh: bool
) -> None:
    """In a fork: `python train.py CONFIG OVERRIDES` as torchrun starts it, without the imports."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    train.plot_losses = lambda *_: None  # a third of such a short run
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    train.SILENCE = datetime.timedelta(seconds=float(environment.get("TEST_SILENCE_SECONDS", 60)))
    if environment.get("TEST_SLOW_RANK") == environment["RANK"]:
        real = train.load_model
        train.load_model = lambda *arguments: (time.sleep(4), real(*arguments))[1]
    if seconds := environment.get("TEST_SLOW_SAVES"):
        write = recover.write_sentry
        recover.write_sentry = lambda *arguments: (time.sleep(float(seconds)), write(*arguments))[1]
    if environment.get("TEST_BROKEN_RANK") == environment["RANK"]:
        train.load_data = lambda *_: 1 / 0
    status = run_command(train.main, config, *overrides, fresh=fresh)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Group:
    """The processes of one start; logs beside the run folder."""

    def __init__(
        self, settings: dict, run_dir: Path, world: int, own=(), fresh=False, **environment: str
    ):
        """own: for each process the key=value overrides that only it gets."""
        path = run_dir.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(settings | {"run_dir": str(run_dir)}), encoding="utf-8")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "transformers", "bitsandbytes", "pytest"])
        self.logs = [run_dir.with_name(f"{run_dir.name}_{rank}.log") for rank in range(world)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            overrides = list(own[rank]) if own else []
            arguments = str(log), str(path), overrides, environment | ranks | place, fresh
            self.processes.append(context.Process(target=worker, args=arguments, daemon=True))
            self.processes[-1].start()

    def finish(self, seconds: float = 60) -> list[tuple[int, str]]:
        """(exit status, output less what libraries say) of each process, all ended in time."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.1))
        statuses = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        assert None not in statuses, f"still running after {seconds} s: {statuses}"
        return [(status, self.read(rank)) for rank, status in enumerate(statuses)]

    def read(self, rank: int) -> str:
        lines = self.logs[rank].read_text(encoding="utf-8").splitlines()
        noise = ("Loading weights", "kernels-community", "[Gloo]", "[W")
        return "\n".join(line for line in lines if line and not any(n in line for n in noise))


def train_with(settings: dict, run_dir: Path, world: int, **more) -> str:
    ended = Group(settings, run_dir, world, **more).finish(300)
    assert [status for status, _ in ended] == [0] * world, ended
    return ended[0][1]


def losses(run_dir: Path) -> dict[tuple, float]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    found = {(r["step"], r["kind"]): r.get("loss", r.get("val_loss")) for r in records}
    assert len(found) == len(records), "a step twice"
    return found


def rows(run_dir: Path, step: int = 8) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "snapshots" / f"step_{step:06d}" / "rows.safetensors")


def assert_same(run_dir: Path, other: Path) -> None:
    """Losses to 1e-6, the contract's; rows to 1e-4 of a row's norm: Adafactor divides each gradient
    by its own size, so that the rounding of a small one is that of a whole step."""
    assert losses(run_dir) == pytest.approx(losses(other), rel=1e-6)
    wanted, got = rows(other), rows(run_dir)
    assert wanted.keys() == got.keys()
    for name in wanted:
        difference = (got[name] - wanted[name]).norm(dim=-1) / wanted[name].norm(dim=-1)
        assert difference.max() < 1e-4, name


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory) -> Path:
    """A run of one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    train_with(settings, run_dir, 1)
    return run_dir


# ---- The same training ---------------------------------------------------------------------------


class NoOverlay:
    base_embed = staticmethod(lambda x: x)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_the_shares_are_the_whole_batch(settings, tmp_path, world):
    """Each sequence of a step is in one share, in the order of a single process."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings | {"run_dir": "r"}), encoding="utf-8")
    config, stream = train.load_config(path), torch.arange(1000)
    data = train.Data(stream, stream, stream, "", None, "")
    for step in (1, 2, 50):
        places = [train.Place(rank, world, torch.device("cpu"), None, "") for rank in range(world)]
        parts = [train.prepare_step(step, NoOverlay, data, config, place) for place in places]
        numbers = train.step_sequence_numbers(step, BATCH, 999 // 16, config.seed)
        wanted = numbers[:, None] * 16 + torch.arange(16)
        assert torch.equal(torch.cat([part.x for part in parts]), wanted)
        assert torch.equal(torch.cat([part.y for part in parts]), wanted + 1)
        assert all(torch.equal(part.all_ids, wanted) for part in parts)


@pytest.mark.parametrize(
    "output_rows, world", [("separate", 2), ("separate", 3), ("separate", 4), ("shared", 2)]
)
def test_same_losses_and_rows_as_one_process(settings, tmp_path, alone, output_rows, world):
    kind = settings | {"output_rows": output_rows}
    if output_rows != "separate":
        alone = tmp_path / "alone"
        train_with(kind, alone, 1)
    said = train_with(kind, tmp_path / "run", world)
    shares = f"micro_batch_size 1 x {BATCH // world} on {world} process(es)"
    assert f"{shares}, {BATCH * 16} tokens a step" in said
    assert_same(tmp_path / "run", alone)


def test_the_held_out_text_is_read_once_whatever_each_process_fits(settings, tmp_path, alone):
    """micro_batch_size: auto may find another one on each card."""
    seen = [
        number
        for rank, size in enumerate((4, 1, 3))
        for numbers in train.shares(20, size, train.Place(rank, 3, torch.device("cpu"), None, ""))
        for number in numbers
    ]
    assert seen == list(range(20))
    train_with(settings, tmp_path / "run", 2, own=[[], ["micro_batch_size=3"]])
    assert_same(tmp_path / "run", alone)


def test_the_lowest_loss_scale_is_everyones():
    """As rank 0's alone is in the sentry."""
    scale = train.LossScale(65536.0, good_steps=7)
    scale.agree(65536.0)
    assert scale == train.LossScale(65536.0, good_steps=7)
    scale.agree(16384.0)
    assert scale == train.LossScale(16384.0, good_steps=0)


def test_a_number_that_does_not_divide_the_batch(settings, tmp_path):
    """Each process says it before it looks for the others."""
    line = "5 processes do not divide effective_batch_size 12; start one of 1, 2, 3, 4, 6, 12"
    ended = Group(settings, tmp_path / "run", 5).finish()
    assert ended == [(1, line)] * 5
    assert not (tmp_path / "run").exists()


def test_killed_and_continued_with_other_numbers(settings, tmp_path, alone):
    """2 processes, rank 0 killed in a save: the other ends with one line; then 3, then 1."""
    run_dir = tmp_path / "run"
    killed = Group(settings, run_dir, 2, WAKE2VEC_FAULT="before_marker@4").finish()
    assert killed[0][0] == -signal.SIGKILL and killed[1][0] == 1
    (line,) = killed[1][1].splitlines()
    assert line.startswith(DEAD.format(1))
    train_with(settings | {"max_steps": 8}, run_dir, 3, WAKE2VEC_FAULT="")
    shutil.rmtree(run_dir / "snapshots" / "step_000008")
    shutil.rmtree(run_dir / "sentries" / "step_000008")
    said = train_with(settings, run_dir, 1)
    assert "continuing from" in said and "step 6\n" in said
    assert_same(run_dir, alone)


# ---- Who writes, who chooses ---------------------------------------------------------------------


def test_another_node_has_no_folder_and_writes_none(settings, tmp_path, alone):
    """Process 1 has a run_dir of its own, as on a second machine: it gets rows and state from
    process 0, and leaves nothing but the tokens' cache."""
    run_dir, node = tmp_path / "run", tmp_path / "node"
    own = [[], [f"run_dir={node}"]]
    Group(settings, run_dir, 2, own, WAKE2VEC_FAULT="after_marker@4").finish()
    shutil.rmtree(node)
    said = train_with(settings, run_dir, 2, own=own)
    assert "step_000004, step 4" in said
    assert_same(run_dir, alone)
    assert [path.name for path in node.iterdir()] == ["cache"]


def test_a_node_with_newer_sentries_must_be_the_first(settings, tmp_path):
    """Two machines, started the other way round, would begin again from nothing."""
    here, there = f"run_dir={tmp_path / 'here'}", f"run_dir={tmp_path / 'there'}"
    train_with(settings | {"max_steps": 2}, tmp_path / "run", 2, own=[[here], [there]])
    ended = Group(settings, tmp_path / "run", 2, own=[[there], [here]]).finish()
    folder = tmp_path / "there"
    assert ended[0] == (
        1,
        f"a sentry of step 2 lies on another node, and none so new in {folder / 'snapshots'} or"
        f" {folder / 'sentries'}: start that node as the first, copy its folders here, or move it"
        " away if it is of an older run",
    )
    assert ended[1] == (1, "process 1 ends: process 0 could not start and says why")
    assert not (folder / "snapshots").exists()


def test_keys_that_all_processes_must_share(settings, tmp_path):
    """max_steps sets the learning rate, and with eval_every when all wait for all."""
    own = [[], ["max_steps=9", "eval_every=3", "micro_batch_size=2"]]
    ended = Group(settings, tmp_path / "run", 2, own=own).finish()
    assert ended[1] == (
        1,
        "max_steps: process 0 has 8, process 1 9\neval_every: process 0 has 8, process 1 3\n"
        "give all processes the same",
    )
    assert ended[0][1].splitlines()[-1].startswith(DEAD.format(0))


def test_a_slow_start_is_waited_for(settings, tmp_path, alone):
    """Rank 1 needs longer to load than silence in a step may last."""
    train_with(settings, tmp_path / "run", 2, TEST_SLOW_RANK="1", TEST_SILENCE_SECONDS="2")
    assert_same(tmp_path / "run", alone)


def test_a_slow_disk_of_process_0_is_waited_for(settings, tmp_path, alone):
    """It waits for the save before; the others in the sum of a step would not wait so long."""
    train_with(settings, tmp_path / "run", 2, TEST_SLOW_SAVES="3", TEST_SILENCE_SECONDS="2")
    assert_same(tmp_path / "run", alone)


def test_an_error_of_process_0_ends_the_others(settings, tmp_path, alone):
    run_dir = tmp_path / "run"
    shutil.copytree(alone, run_dir)
    ended = Group(settings | {"learning_rate": 0.5}, run_dir, 2).finish()
    assert ended[0] == (
        1,
        "learning_rate: the run was started with 0.01, now it is 0.5\n"
        "put these keys back to continue, or start over with --fresh (the old run is kept aside)",
    )
    assert ended[1] == (1, "process 1 ends: process 0 could not start and says why")


def test_an_error_that_nobody_expected_ends_the_others_too(settings, tmp_path):
    ended = Group(settings, tmp_path / "run", 2, TEST_BROKEN_RANK="0").finish()
    assert ended[0][0] == 1 and ended[0][1].endswith("ZeroDivisionError: division by zero")
    assert ended[1] == (1, "process 1 ends: process 0 could not start and says why")


def test_a_locked_run_folder_ends_all_with_its_reason(settings, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with open(run_dir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = Group(settings, run_dir, 2).finish()
    line = f"run_dir: another training is using {run_dir}; wait for it, or give another run_dir"
    assert ended[0] == (1, line)
    assert ended[1] == (1, "process 1 ends: process 0 could not start and says why")


def test_a_restart_of_torchrun_begins_fresh_only_where_it_has_not(settings, tmp_path, alone):
    """What fails before the old run is put aside has not begun anew."""
    run_dir = tmp_path / "run"
    shutil.copytree(alone, run_dir)
    train_with(
        settings, run_dir, 1, fresh=True, TORCHELASTIC_RUN_ID="x", TORCHELASTIC_RESTART_COUNT="1"
    )
    assert (run_dir / "old-1").is_dir() and not (run_dir / "old-2").exists()
    said = train_with(settings, run_dir, 1, fresh=True, TORCHELASTIC_RUN_ID="x")
    assert "continuing from" in said and not (run_dir / "old-2").exists()  # of the same parent
    train_with(settings, run_dir, 1, fresh=True, TORCHELASTIC_RUN_ID="y")
    assert (run_dir / "old-2").is_dir()


def test_nodes_with_other_files(settings, tmp_path):
    other = tmp_path / "corpus.txt"
    text = Path(settings["corpus"]).read_text(encoding="utf-8")
    other.write_text(text + "the glimock saw a borish\n", encoding="utf-8")
    ended = Group(settings, tmp_path / "run", 2, [[], [f"corpus={other}"]]).finish()
    line = (
        "process 1 has another model, lexicon or corpus than process 0; every node needs the same"
        " files"
    )
    assert ended[1] == (1, line)
    assert ended[0][0] == 1
    assert ended[0][1].splitlines()[-1].startswith(DEAD.format(0))


def test_a_stop_signal_to_one_stops_all_at_one_step(settings, tmp_path):
    run_dir = tmp_path / "run"
    long = settings | {"max_steps": 5000, "save_every": 5000, "snapshot_every": 5000}
    group = Group(long | {"eval_every": 5000}, run_dir, 2)
    wait_for_step(run_dir, 3)
    os.kill(group.processes[1].pid, signal.SIGTERM)
    ended = group.finish()
    step = max(losses(run_dir))[0]
    assert (run_dir / "snapshots" / f"step_{step:06d}" / "state.json").exists()
    line = f"stopped by {{}} at step {step}, saved; the same command goes on from there"
    heard = "SIGTERM: stopping after this step, saved; once more ends at once"
    assert ended[1] == (1, f"{heard}\n{line.format('SIGTERM')}")
    assert ended[0][0] == 1
    assert ended[0][1].splitlines()[-1] == line.format("a signal to another process")


# ---- torchrun itself -----------------------------------------------------------------------------


def test_max_restarts_goes_on_by_itself(settings, tmp_path, alone):
    """torchrun's own restart: process 0 dies after the save of step 4, twice: locally, and in its
    copy, which the restart makes. Nobody types anything, and --fresh counts the first time only."""
    run_dir, path = tmp_path / "run", tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings | {"run_dir": str(run_dir)}), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    numbers = ["--nproc-per-node", "2", "--max-restarts", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WAKE2VEC_FAULT": "after_marker@4"}
    command = [*torchrun, *numbers, "train.py", str(path), "--fresh"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert f"continuing from {run_dir / 'snapshots' / 'step_000004'}, step 4\n" in done.stdout
    assert_same(run_dir, alone)
