"""Kill one of two processes at random moments, again and again, and prove that nothing is lost.

    python tests/torture/torture_processes.py --kills 20     (131 s, 2 shared CPU cores, 2026-11-22)

Each chain is one run of configs/sample.yaml, 40 steps on two processes with a save each 4, started
again by the same command until it ends. After each kill the other process must end by itself
within a minute, with status 1 and one line; at the end rows, metrics and samples must be bit for
bit those of an undisturbed run on two processes.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

import bitsandbytes  # noqa: F401  imported once, here, for all forks
import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.figure  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

import train
from config import run_command

LAST = 40
SETTINGS = (
    "seq_len=32", "effective_batch_size=8", "val_fraction=0.01", f"max_steps={LAST}",
    "eval_every=20", "save_every=4", "log_every=1",
)  # fmt: skip
NOT_COMPARED = ("step_seconds", "tokens_per_second")
DEAD = "process {} ends: another process of this run died or cannot be reached; start the same"


def start(run_dir: Path, quantization: str) -> list[int]:
    """Start two forks with the variables that torchrun sets -> their ids. Their logs are
    RUN_DIR_0.log and RUN_DIR_1.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(2):
        if pid := os.fork():
            started.append(pid)
            continue
        status = 3
        try:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            descriptor = os.open(log_of(run_dir, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            torch.set_num_threads(1)
            arguments = [*SETTINGS, f"quantization={quantization}", f"run_dir={run_dir}"]
            status = run_command(train.main, "configs/sample.yaml", *arguments)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return started


def log_of(run_dir: Path, rank: int) -> Path:
    return run_dir.with_name(f"{run_dir.name}_{rank}.log")


def wait(pid: int, seconds: float) -> int | None:
    """Wait for the end -> exit status, negative for a signal; None if the process has not ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def result(run_dir: Path) -> tuple:
    """Read what must be the same bit for bit."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [{k: v for k, v in json.loads(x).items() if k not in NOT_COMPARED} for x in lines]
    final = run_dir / "snapshots" / f"step_{LAST:06d}"
    rows = hashlib.sha256((final / "rows.safetensors").read_bytes()).hexdigest()
    return rows, records, (run_dir / "samples.md").read_text(encoding="utf-8")


def run_and_kill(run_dir: Path, quantization: str, rng: random.Random, seconds: float) -> list[str]:
    """Start once, kill once -> [] or what is wrong; ["end"] if it was through before the kill."""
    for rank in range(2):
        log_of(run_dir, rank).write_text("", encoding="utf-8")
    pids, victim = start(run_dir, quantization), rng.randrange(2)
    while "micro_batch_size" not in log_of(run_dir, 0).read_text(encoding="utf-8"):
        if rng.random() < 0.002:  # now and then before the first step
            break
        time.sleep(0.01)
    if (status := wait(pids[victim], rng.uniform(0, 0.6) * seconds)) is None:
        os.kill(pids[victim], signal.SIGKILL)
        status = wait(pids[victim], 10)
    began, other = time.monotonic(), 1 - victim
    ended = wait(pids[other], 15)
    joined = "micro_batch_size" in log_of(run_dir, 0).read_text(encoding="utf-8")
    if ended is None and not joined:  # it waits for the other to join: torchrun ends it by SIGTERM
        os.kill(pids[other], signal.SIGTERM)
        ended = wait(pids[other], 45)
    statuses = {victim: status, other: ended}
    if set(statuses.values()) == {0}:
        return ["end"]
    last = (log_of(run_dir, other).read_text(encoding="utf-8").splitlines() or [""])[-1]
    if statuses == {victim: -signal.SIGKILL, other: 1} and last.startswith(DEAD.format(other)):
        print(f"process {victim} killed; the other ended {time.monotonic() - began:.1f} s later")
        return []
    if statuses == {victim: -signal.SIGKILL, other: -signal.SIGTERM} and not joined:
        print(f"process {victim} killed before they had joined; SIGTERM ended the other")
        return []
    if statuses == {victim: -signal.SIGKILL, other: 0}:
        return []  # its part was done
    return [f"statuses {statuses}, last line {last!r}, log {log_of(run_dir, other)}"]


def main(kills: int, seed: int) -> int:
    began, rng = time.monotonic(), random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="torture_processes_"))
    torch.set_num_threads(1)
    wanted, seconds, problems, done, chains, run_dir = {}, 0.0, [], 0, 0, None
    for name in ("nf4", "none"):
        start_of_run = time.monotonic()
        assert [wait(pid, 300) for pid in start(folder / name, name)] == [0, 0]
        seconds = time.monotonic() - start_of_run
        wanted[name] = result(folder / name)
    while (done < kills or run_dir is not None) and not problems:
        if run_dir is None:
            name = ("nf4", "none")[chains % 2]
            run_dir = folder / f"chain_{chains}"
        found = run_and_kill(run_dir, name, rng, seconds if done < kills else 1e6)
        done += found != ["end"]
        if found == ["end"]:
            chains, found = chains + 1, []
            if result(run_dir) != wanted[name]:
                found = [f"{run_dir}: not what an undisturbed run has"]
            run_dir = None
        problems += found
    for problem in problems:
        print(f"VIOLATION {problem}")
    print(f"kills    {done} of one of two processes, at random moments")
    print(f"chains   {chains} brought to their end, equal to the undisturbed run on two processes")
    print(f"losses   {len(problems)}")
    print(f"seconds  {time.monotonic() - began:.0f}", flush=True)
    if not problems:
        shutil.rmtree(folder)
    return 1 if problems else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    raise SystemExit(main(options.kills, options.seed))
