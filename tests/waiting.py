"""Waiting for a run in progress, without torch: some tests must not have it imported."""

import time
from pathlib import Path


def wait_for(condition, what: str) -> None:
    """Until the condition holds, for five minutes at the most; `what` failed otherwise."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def wait_for_step(run_dir: Path, step: int) -> None:
    """Until metrics.jsonl of a run in progress shows the step."""
    metrics, line = run_dir / "metrics.jsonl", f'"step": {step}, "kind": "train"'
    wait_for(lambda: metrics.exists() and line in metrics.read_text(), "the run got not so far")
