"""How long a save of the 14B's rows holds training, and its threads take: one JSON line a save.

    python tests/bench/bench_save.py OUT_FOLDER

44,223 x 5,120 fp32 rows twice, 1.69 GiB a save, three saves. "training_waits" is all that training
waits for (host_copies and SentryWriter.save): 0.034 s on one H100 (2026-11-22). The local write
with its hashes, and the copy, read back and compared, run in the background. "other_thread_waited"
is the longest that another Python thread was kept from running meanwhile: 0.005 s while safetensors
0.8.0 writes the file, on 2 idle CPU cores (2026-11-25).
"""

import json
import shutil
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from machine import host_copies
from recover import SentryWriter


class Ticker(threading.Thread):
    """Sleeps a millisecond again and again; `longest` is the longest that one of these took."""

    def __init__(self):
        super().__init__(daemon=True)
        self.longest, self.stopped = 0.0, False
        self.start()

    def run(self) -> None:
        while not self.stopped:
            began = time.perf_counter()
            time.sleep(0.001)
            self.longest = max(self.longest, time.perf_counter() - began)


def main(out: str, num_rows: int = 44223, hidden_size: int = 5120) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = {name: torch.randn(num_rows, hidden_size, device=device) for name in ("in", "out")}
    folder = Path(out)
    buffers = {}
    host_copies(rows, buffers)  # makes the buffers, as a run's first save does
    writer = SentryWriter(folder / "snapshots", folder / "sentries", 2)
    for step in (20, 40, 60):
        began = time.perf_counter()
        writer.save(host_copies(rows, buffers), {}, {"step": step, "config": {}})
        waited, ticker = time.perf_counter() - began, Ticker()
        writer.finish_local()
        written = time.perf_counter() - began
        writer.finish(600)
        ticker.stopped = True
        print(json.dumps({
            "device": device, "training_waits_seconds": round(waited, 3),
            "local_write_seconds": round(written - waited, 2),
            "durable_copy_seconds": round(time.perf_counter() - began - written, 2),
            "other_thread_waited_seconds": round(ticker.longest, 4),
        }), flush=True)  # fmt: skip
    shutil.rmtree(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
