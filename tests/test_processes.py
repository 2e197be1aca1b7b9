"""Several processes train one run: same sequences, same losses, one of them writes, none hangs.

    python -m pytest tests/test_processes.py        (62 s on 2 shared CPU cores, 2026-11-25)

Processes are forks with torch imported, started with the variables that torchrun sets, on gloo; one
test starts them by torchrun's own agent. torture/torture_processes.py kills one of two at random
moments, many times.
"""

import datetime
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import tiny_settings, wait_for_step

import machine
import overlay
import recover
import train
from config import Config, UserError, run_command

BATCH = 12
DEAD = (
    "process {} ends: another process of this run died or cannot be reached; start the same command"
    " again"
)
OTHER = (
    "process {} has another {} than process 0; every process needs the same command and the same"
    " files"
)
FOREVER = {"max_steps": 5000, "save_every": 5000, "eval_every": 5000}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    sizes = {"effective_batch_size": BATCH, "micro_batch_size": 1, "eval_every": 8}
    return tiny_settings(tmp_path_factory.mktemp("tiny"), **sizes)


def worker(config: str, *overrides: str) -> None:
    """Do in a fork what `python train.py CONFIG OVERRIDES` does if torchrun starts it."""
    environment, rank = os.environ, os.environ["RANK"]
    seconds = float(environment.get("TEST_STEP_TIMEOUT_SECONDS", 60))
    machine.STEP_TIMEOUT = datetime.timedelta(seconds=seconds)
    if environment.get("TEST_SLOW_RANK") == rank:
        real = train.load_model
        train.load_model = lambda *arguments: (time.sleep(3), real(*arguments))[1]
    if seconds := environment.get("TEST_SLOW_SAVES"):
        write = recover.write_sentry
        recover.write_sentry = lambda *arguments: (time.sleep(float(seconds)), write(*arguments))[1]
    if environment.get("TEST_BROKEN_RANK") == rank:
        train.load_data = lambda *_: 1 / 0
    if status := run_command(train.main, config, *overrides):
        sys.exit(status)


def write_config(settings: dict, run_dir: Path) -> str:
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings | {"run_dir": str(run_dir)}), encoding="utf-8")
    return str(path)


class Group:
    """Starts the processes of one run; the logs lie beside the run folder."""

    def __init__(
        self, settings: dict, run_dir: Path, world: int, own=(), ranks=None, **environment: str
    ):
        """Start them.

        own:   for each process the key=value overrides that only it gets
        ranks: the processes to start, if not all
        """
        config = write_config(settings, run_dir)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.logs, self.processes = [], []
        for rank in range(world) if ranks is None else ranks:
            log = run_dir.with_name(f"{run_dir.name}_{rank}")
            variables = environment | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            overrides = own[rank] if own else []
            self.processes.append(forked.start(worker, log, variables, config, *overrides))
            self.logs.append(log)

    def finish(self, seconds: float = 120) -> list[tuple[int | None, str]]:
        """Wait for all -> (exit status, output less what libraries say) of each process."""
        deadline = time.monotonic() + seconds
        ended = []
        for process, log in zip(self.processes, self.logs):
            left = max(deadline - time.monotonic(), 0.1)
            status, out, errors = forked.finish(process, log, left)
            ended.append((status, "\n".join(filter(None, (out, errors)))))
        assert all(status is not None for status, _ in ended), f"still running: {ended}"
        return ended


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
    """Compare losses to 1e-6, as the contract says, and rows to 1e-4 of a row's norm.

    Adafactor divides each gradient by its own size, so rounding a small one is as much as rounding
    a whole step.
    """
    assert losses(run_dir) == pytest.approx(losses(other), rel=1e-6)
    wanted, got = rows(other), rows(run_dir)
    assert wanted.keys() == got.keys()
    for name in wanted:
        difference = (got[name] - wanted[name]).norm(dim=-1) / wanted[name].norm(dim=-1)
        assert difference.max() < 1e-4, name


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory) -> Path:
    """Make a run of one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    train_with(settings, run_dir, 1)
    return run_dir


# ---- The same training ---------------------------------------------------------------------------


def one_of(world: int, rank: int) -> machine.Worker:
    return machine.Worker(rank, world, torch.device("cpu"), torch.float32, "")


class NoOverlay:
    base_embed = staticmethod(lambda x: x)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_the_shares_are_the_whole_batch(settings, tmp_path, world):
    """Each sequence of a step is in one share, in the order of a single process."""
    config, stream = Config(**settings), torch.arange(1000)
    data = train.Data(stream, stream, stream, "", None, "")
    for step in (1, 2, 50):
        workers = [one_of(world, rank) for rank in range(world)]
        parts = [train.prepare_step(step, NoOverlay, data, config, worker) for worker in workers]
        numbers = train.step_sequence_numbers(step, BATCH, 999 // 16, config.seed)
        wanted = numbers[:, None] * 16 + torch.arange(16)
        assert torch.equal(torch.cat([part.x for part in parts]), wanted)
        assert torch.equal(torch.cat([part.y for part in parts]), wanted + 1)
        assert all(torch.equal(part.all_ids, wanted) for part in parts)


@pytest.mark.parametrize("output_rows, world", [("separate", 3), ("shared", 2)])
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
    """micro_batch_size auto may find another size on each card. Only process 0 writes."""
    config, stream = Config(**settings), torch.zeros(20 * 16 + 1)
    data = train.Data(stream, stream, stream, "", None, "")
    seen = [
        numbers
        for rank, size in enumerate((4, 1, 3))
        for numbers in train.held_out_batches(data, config, one_of(3, rank), size, "")
    ]
    assert max(map(len, seen)) == 4 and torch.equal(torch.cat(seen), torch.arange(20))
    assert not list(train.held_out_batches(data, config, one_of(30, 29), 4, ""))
    own = [[], ["micro_batch_size=3", f"run_dir={tmp_path / 'other'}"]]
    train_with(settings, tmp_path / "run", 2, own=own)
    assert_same(tmp_path / "run", alone)
    assert not (tmp_path / "other").exists()


def test_the_lowest_loss_scale_is_everyones():
    """All take the lowest, because a sentry holds process 0's alone."""
    scale = overlay.LossScale(65536.0, good_steps=7)
    scale.agree(65536.0)
    assert scale == overlay.LossScale(65536.0, good_steps=7)
    scale.agree(16384.0)
    assert scale == overlay.LossScale(16384.0, good_steps=0)


def test_a_step_ends_with_the_same_numbers_in_every_process(monkeypatch):
    """The other of two has a loss of 2, was asked to stop, and has a lower loss scale."""
    others = torch.tensor([2.0, 1.0, 0.0, 1024.0])  # loss, stop, the scales of both
    monkeypatch.setattr(machine, "all_reduce_sum", lambda worker, tensor: tensor.add_(others))
    scale = overlay.LossScale(65536.0, good_steps=7)
    found = machine.agree(one_of(2, 0), torch.tensor(3.0), torch.tensor(0.5), False, scale)
    assert found == (5.0, 0.5, True) and scale == overlay.LossScale(1024.0, good_steps=0)


@pytest.mark.parametrize("rank", ["0", "4"])
def test_a_number_that_does_not_divide_the_batch(settings, tmp_path, monkeypatch, rank):
    """Each process says it before it looks for the others."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "5")
    line = "5 processes do not divide effective_batch_size 12; start one of 1, 2, 3, 4, 6, 12"
    with pytest.raises(UserError) as caught:
        train.train(write_config(settings, tmp_path / "run"))
    assert str(caught.value) == line
    assert not (tmp_path / "run").exists()


def test_killed_and_continued_with_other_numbers(settings, tmp_path, alone):
    """Process 0 of 2 is killed in a save and the other ends with one line; then 3 go on, then 1."""
    run_dir = tmp_path / "run"
    killed = Group(settings, run_dir, 2, WAKE2VEC_FAULT="before_marker@4").finish()
    assert killed[0][0] == -signal.SIGKILL and killed[1][0] == 1
    (line,) = killed[1][1].splitlines()
    assert line.startswith(DEAD.format(1))
    train_with(settings, run_dir, 3)
    shutil.rmtree(run_dir / "snapshots" / "step_000008")
    shutil.rmtree(run_dir / "sentries" / "step_000008")
    said = train_with(settings, run_dir, 1)
    assert "continuing from" in said and "step 6\n" in said
    assert_same(run_dir, alone)


# ---- One command, one run folder, the same files -------------------------------------------------


def test_what_all_processes_must_share(settings, tmp_path):
    """max_steps sets the learning rate, and together with eval_every when all wait for all."""
    own = [[], ["max_steps=9", "eval_every=3", "micro_batch_size=2", "log_every=2"]]
    ended = Group(settings, tmp_path / "run", 2, own).finish()
    assert ended[1] == (1, OTHER.format(1, "max_steps, eval_every"))
    assert ended[0][0] == 1
    assert ended[0][1].splitlines()[-1].startswith(DEAD.format(0))


def test_other_files_than_process_0(settings, tmp_path):
    other = tmp_path / "corpus.txt"
    text = Path(settings["corpus"]).read_text(encoding="utf-8")
    other.write_text(text + "the glimock saw a borish\n", encoding="utf-8")
    ended = Group(settings, tmp_path / "run", 2, [[], [f"corpus={other}"]]).finish()
    assert ended[1] == (1, OTHER.format(1, "corpus_sha256"))
    assert ended[0][0] == 1
    assert ended[0][1].splitlines()[-1].startswith(DEAD.format(0))


def test_another_run_folder_than_process_0(settings, tmp_path, alone):
    """A second machine that does not share the folder has no save to continue from."""
    shutil.copytree(alone, tmp_path / "run")
    own = [[], [f"run_dir={tmp_path / 'other'}"]]
    ended = Group(settings | {"max_steps": 10}, tmp_path / "run", 2, own).finish()
    assert ended[1] == (1, OTHER.format(1, "step"))
    assert ended[0][0] == 1
    assert not (tmp_path / "other").exists()


# ---- Waiting, and not waiting for ever -----------------------------------------------------------


def test_a_slow_start_and_a_slow_disk_are_waited_for(settings, tmp_path, alone):
    """Process 1 needs longer to load than a process may be silent in a step, and so does process 0
    in a save, where it waits for the save before."""
    slow = {"TEST_SLOW_RANK": "1", "TEST_SLOW_SAVES": "3", "TEST_STEP_TIMEOUT_SECONDS": "2"}
    train_with(settings | {"save_every": 4}, tmp_path / "run", 2, **slow)
    assert_same(tmp_path / "run", alone)


def test_process_0_tells_an_error_before_it_waits_for_the_others(settings, tmp_path, alone):
    """The others wait for it until torchrun ends them by SIGTERM."""
    run_dir = tmp_path / "run"
    shutil.copytree(alone, run_dir)
    other = settings | {"learning_rate": 0.5}
    lines = (
        "learning_rate: the run was started with 0.01, now it is 0.5\n"
        "put these keys back to continue, or start over with --fresh (the old run is kept aside)"
    )
    assert Group(other, run_dir, 2, ranks=[0]).finish() == [(1, lines)]
    waiting = Group(other, run_dir, 2, ranks=[1])
    waiting.processes[0].join(1)
    os.kill(waiting.processes[0].pid, signal.SIGTERM)
    assert waiting.finish() == [(-signal.SIGTERM, "")]


def test_an_error_that_nobody_expected_ends_process_0_too(settings, tmp_path):
    ended = Group(settings, tmp_path / "run", 2, TEST_BROKEN_RANK="1").finish()
    assert ended[1][0] == 1 and ended[1][1].endswith("ZeroDivisionError: division by zero")
    assert ended[0][0] == 1
    assert ended[0][1].splitlines()[-1].startswith(DEAD.format(0))


def test_a_stop_signal_to_one_stops_all_at_one_step(settings, tmp_path):
    run_dir = tmp_path / "run"
    group = Group(settings | FOREVER, run_dir, 2)
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


# ---- torchrun ------------------------------------------------------------------------------------


def torchrun(log: str, config: str) -> None:
    """Do what `torchrun --standalone --nproc-per-node 2 --max-restarts 1 train.py CONFIG` does, by
    the same agent; the processes are forks."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, run_id="test",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork",
    )  # fmt: skip
    elastic_launch(launch, torchrun_worker)(log, config)


def torchrun_worker(log: str, config: str) -> None:
    number = os.environ["TORCHELASTIC_RESTART_COUNT"] + os.environ["RANK"]
    faults = {"WAKE2VEC_FAULT": "after_marker@4"}
    forked.in_fork(worker, f"{log}_{number}", faults, (config,))


def test_max_restarts_goes_on_by_itself(settings, tmp_path, alone):
    """Process 0 dies after the save of step 4, and torchrun restarts both; nobody types."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    config = write_config(settings | {"sentry_dir": str(run_dir / "snapshots")}, run_dir)
    agent = forked.start(torchrun, log, {}, str(log), config, daemon=False)
    status, _, errors = forked.finish(agent, log)
    assert status == 0, errors
    said = (tmp_path / "log_10.out").read_text(encoding="utf-8")
    assert f"continuing from {run_dir / 'snapshots' / 'step_000004'}, step 4\n" in said
    assert_same(run_dir, alone)
