"""Start runs of train.py as forks of a process that has the libraries imported already.

    process = start(train_command, tmp_path / "log", {}, "config.yaml")
    status, out, errors = finish(process, tmp_path / "log")

A run of a tiny model takes a second of CPU this way, and ten as `python train.py` (2026-11-25). The
forking process is multiprocessing's own: the threads of this one would not live on in a fork.
"""

import gc
import multiprocessing
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What a run imports by itself sooner or later; pytest, because the test file is imported too.
LIBRARIES = [
    "torch", "transformers", "bitsandbytes", "accelerate", "filelock", "pytest",
    "transformers.models.qwen2.modeling_qwen2", "transformers.integrations.bitsandbytes",
    "transformers.generation.utils", "matplotlib.figure", "matplotlib.backends.backend_agg",
]  # fmt: skip
NOISE = ("Loading weights", "kernels-community", "[Gloo]", "[W")  # what libraries say


def start(function, log: Path, environment: dict[str, str], *arguments, daemon: bool = True):
    """Call the function in a fork; `log`.out and `log`.err get what it prints. -> the process

    environment: variables of the fork. TEST_STDOUT and TEST_STDERR replace the two files.
    daemon: whether the fork ends with the tests; a daemon can have no children
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    parts = function, str(log), environment, arguments
    process = context.Process(target=in_fork, args=parts, daemon=daemon)
    process.start()
    return process


def in_fork(function, log: str, environment: dict[str, str], arguments: tuple) -> None:
    """Set the fork up and call the function. A SystemExit's status becomes the process's own."""
    import matplotlib.figure
    import torch

    os.environ.update(environment)
    os.chdir(ROOT)
    for number, name in ((1, "out"), (2, "err")):
        path = environment.get(f"TEST_STD{name.upper()}", f"{log}.{name}")
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOCTTY), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    torch.set_num_threads(1)
    # Plots are two thirds of such a short run, and garbage collection is half a second.
    matplotlib.figure.Figure.savefig = lambda _, path, **options: Path(path).touch()
    gc.freeze()
    try:
        function(*arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def own_lines(path: Path) -> str:
    """Read what a process printed, less empty lines and what libraries say."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return "\n".join(line for line in lines if line and not any(n in line for n in NOISE))


def finish(process, log: Path, seconds: float = 300) -> tuple[int | None, str, str]:
    """Wait for the end -> (exit status, stdout, stderr); a process that does not end is killed, and
    its status is None."""
    process.join(seconds)
    status = process.exitcode
    process.kill()
    return status, *(own_lines(log.with_name(f"{log.name}.{name}")) for name in ("out", "err"))
