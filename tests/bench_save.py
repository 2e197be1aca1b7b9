"""How long a save of the 14B's rows holds training, and its threads take: one JSON line a save.

    python tests/bench_save.py OUT_FOLDER

44,223 x 5,120 fp32 rows twice, 1.69 GiB a save, three saves. The first figure is all that training
waits for (train.HostCopies.take and SentryWriter.save); the local write with its hashes and the
copy, read back and compared, run in the background. One H100: 0.034 s, 3.4 to 4.0 s, 3.9 to 4.2 s;
without a GPU, 2 cores: 0.18 s, 6 s, 3 to 6 s (2026-11-22).
"""

import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train
from recover import SentryWriter


def main(out: str, num_rows: int = 44223, hidden_size: int = 5120) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = {name: torch.randn(num_rows, hidden_size, device=device) for name in ("in", "out")}
    folder, copies = Path(out), train.HostCopies()
    copies.take(rows)  # as train_steps does before its first step
    writer = SentryWriter(folder / "snapshots", folder / "sentries", 2)
    for step in (20, 40, 60):
        began = time.perf_counter()
        writer.save(copies.take(rows), {}, {"step": step, "config": {}}, True)
        waited = time.perf_counter() - began
        writer.finish_local()
        written = time.perf_counter() - began
        writer.finish(600)
        print(json.dumps({
            "device": device, "training_waits_seconds": round(waited, 3),
            "local_write_seconds": round(written - waited, 2),
            "durable_copy_seconds": round(time.perf_counter() - began - written, 2),
        }), flush=True)  # fmt: skip
    shutil.rmtree(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
