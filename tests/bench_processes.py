"""Tokens per second of data-parallel training on the 14B shapes, and what crosses the bus.

    torchrun --nproc-per-node 1 tests/bench_processes.py
    torchrun --nproc-per-node 2 tests/bench_processes.py        one JSON line from rank 0

32 x 128 tokens a step in all, whatever the number of processes; random NF4 weights, 44,223 new
rows, separate output rows trained: the step of tests/bench_14b.py with train.py's own reductions.
Two H100 of one host, three rounds: 0.350, 0.349, 0.344 s a step; one: 0.650, 0.647, 0.645 (torch
2.11.0, NCCL, 2026-11-22); 1.85 to 1.87 x.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import bench_14b
import torch
import torch.distributed as dist

import train
from extend_tokenizer import Config


def main(argv: list[str]) -> None:
    tiny = "--tiny" in argv
    train.apply()
    config = Config(
        model_name="random", lexicon="-", corpus="-", run_dir="-", device="cpu" if tiny else "cuda",
        seq_len=16 if tiny else 128, effective_batch_size=32, max_gpu_gib=None if tiny else 14.0,
    )  # fmt: skip
    place, shape = train.find_place(config), bench_14b.SHAPES["tiny" if tiny else "14b"]
    model = bench_14b.random_model(shape, place.device, place.dtype)
    generator = torch.Generator().manual_seed(1)
    size = 100 * config.effective_batch_size * config.seq_len
    stream = torch.randint(0, shape["base"] + shape["new"], (size,), generator=generator)
    data = train.Data(stream, stream[:0], stream[:0], "", None, "")
    bench = bench_14b.Bench(shape, config, place, model, data, 8)
    overlay = bench_14b.make_overlay(bench)
    fit = train.fit_to_machine(overlay, data, config, place)
    step = bench_14b.OurStep(bench, overlay, fit)
    step()
    step()
    seconds = statistics.median(bench_14b.timed(bench, step) for _ in range(bench.steps))
    wire = 4 * (overlay.output_grad.numel() + overlay.input_grad.numel())
    if place.rank == 0:
        print(json.dumps({
            "gpu": torch.cuda.get_device_name() if place.device.type == "cuda" else "cpu",
            "processes": place.world, "micro_batch_size": fit.micro_batch_size,
            "layers_recomputed": fit.recomputed, "note": fit.note,
            "step_seconds": round(seconds, 4), "tokens_per_second": round(bench.tokens / seconds),
            "summed_mib_per_step": round(wire / 2**20) if place.world > 1 else 0,
            **train.versions(),
        }), flush=True)  # fmt: skip
    if place.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
