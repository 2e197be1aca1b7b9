"""Compare the chunked loss with the plain one: time, peak memory, and error against float64.

    python tests/bench/bench_loss.py             sizes of Qwen2.5-14B on a GPU, small on a CPU
    python tests/bench/bench_loss.py --hidden 2048 --tokens 512 --dtype float32

For each vocabulary the plain loss comes first (logits of all rows, F.cross_entropy, autograd), then
the chunked one with each of CHUNKS as LOSS_CHUNK_POSITIONS. Prints one JSON object a line:

    seconds     the median of --repeats passes, after one that warms up
    peak_gib    what a pass takes beside its inputs; null on a CPU, where nothing counts it
    error_*     the largest error, relative to the largest entry of the float64 truth, on the first
                --truth positions; the truth of Qwen2.5-14B's tables takes 12 GiB of the card

It takes 18 s on 2 CPU cores (torch 2.13.0, 2026-11-22). On an H200 (torch 2.11.0, bf16, 2026-11-26)
with Qwen2.5-14B's vocabulary the plain loss takes 87 ms and 5.7 GiB. In chunks of 256 it is 22 ms
and 1.44 GiB, of which 0.84 are the new rows' gradient; the errors of the row gradients are 5.5e-4
and 2.0e-4.
"""

import argparse
import functools
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import overlay
from config import GIB

# (base rows, new rows): Qwen2.5-14B, Llama 3, TinyLlama with the devlog's words; no new rows
GPU_VOCABULARIES = [(151_665, 44_223), (128_256, 44_195), (32_000, 44_585), (151_665, 0)]
CPU_VOCABULARIES = [(16_000, 4_000), (4_000, 4_000), (16_000, 0)]
CHUNKS = [64, 128, 256, 512, 1024]


def make_inputs(num_base: int, num_new: int, args: argparse.Namespace) -> dict:
    """Make tensors that give logits of a few units, like a model's; every 50th label is ignored."""
    generator = torch.Generator(args.device).manual_seed(0)
    options = {"generator": generator, "device": args.device}
    labels = torch.randint(num_base + num_new, (args.tokens,), **options)
    labels[::50] = -100
    size = 2.0 / args.hidden**0.5
    # Tables are padded, Qwen2.5-14B's to 152,064 rows; an odd number of columns multiplies slowly.
    num_rows = -(-num_base // 64) * 64
    base_rows = torch.randn(num_rows, args.hidden, **options).mul_(size).to(args.dtype)
    return {
        "hidden_states": torch.randn(args.tokens, args.hidden, **options).to(args.dtype),
        "labels": labels,
        "base_rows": base_rows,
        "first_new_id": num_base,
        "new_rows": torch.randn(num_new, args.hidden, **options).mul_(size),
    }


def plain(inputs: dict, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, d hidden and d new rows, by the library's cross entropy and autograd."""
    hidden = inputs["hidden_states"].detach().requires_grad_()
    new_rows = inputs["new_rows"].detach().requires_grad_()
    base_rows = inputs["base_rows"][: inputs["first_new_id"]]
    logits = torch.cat([hidden @ base_rows.T, hidden @ new_rows.to(hidden.dtype).T], dim=1)
    losses = functional.cross_entropy(logits.float(), inputs["labels"], reduction="none")
    (losses.sum() * scale).backward()
    return losses.detach(), hidden.grad, new_rows.grad


def chunked(inputs: dict, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    rows_grad = torch.zeros_like(inputs["new_rows"])
    losses, grad = overlay.chunked_cross_entropy(**inputs, new_rows_grad=rows_grad, scale=scale)
    return losses, grad, rows_grad


def truth(inputs: dict, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same in float64, in closed form; `inputs` are the first positions alone."""
    hidden, new_rows = inputs["hidden_states"].double(), inputs["new_rows"].double()
    base_rows = inputs["base_rows"][: inputs["first_new_id"]].double()
    logits = torch.cat([hidden @ base_rows.T, hidden @ new_rows.T], dim=1)
    labels = inputs["labels"]
    losses = functional.cross_entropy(logits, labels, reduction="none")
    d_logits = logits.softmax(dim=1)
    d_logits[torch.arange(len(labels), device=labels.device), labels.clamp(min=0)] -= 1.0
    d_logits *= scale * (labels >= 0)[:, None]
    split = inputs["first_new_id"]
    grad = d_logits[:, :split] @ base_rows + d_logits[:, split:] @ new_rows
    return losses, grad, d_logits[:, split:].T @ hidden


def measure(method, inputs: dict, repeats: int) -> dict:
    """Time a pass -> its median seconds, and the memory that it adds."""
    on_gpu, seconds, peak = inputs["labels"].is_cuda, [], None
    for _ in range(repeats + 1):
        gc.collect()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began = time.perf_counter()
        method(inputs, 1 / len(inputs["labels"]))
        if on_gpu:
            torch.cuda.synchronize()
            peak = round((torch.cuda.max_memory_allocated() - before) / GIB, 3)
        seconds.append(time.perf_counter() - began)
    return {"seconds": round(statistics.median(seconds[1:]), 5), "peak_gib": peak}


def errors(method, inputs: dict, num_positions: int) -> dict:
    """Find the largest errors against float64, relative to the truth's largest entry."""
    part = {n: inputs[n][:num_positions] for n in ("hidden_states", "labels")}
    results = [function(inputs | part, 1 / num_positions) for function in (method, truth)]
    found = {}
    for name, ours, true in zip(("loss", "grad_hidden", "grad_rows"), *results):
        if true.numel():
            difference = (ours.double() - true).abs().max() / true.abs().max()
            found[f"error_{name}"] = float(f"{difference.item():.2g}")
    return found


def bench(name: str, method, inputs: dict, args: argparse.Namespace, **facts) -> None:
    """Print one line for a method; a pass that does not fit is a line too."""
    line = {"method": name, "num_base": inputs["first_new_id"], "num_new": len(inputs["new_rows"])}
    line |= {"tokens": args.tokens, "hidden_size": args.hidden, **facts}
    try:
        line |= measure(method, inputs, args.repeats) | errors(method, inputs, args.truth)
    except torch.OutOfMemoryError:
        line["out_of_memory"] = True
    print(json.dumps(line), flush=True)


def main(argv: list[str]) -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    dtype_type = functools.partial(getattr, torch)
    parser.add_argument(
        "--dtype", type=dtype_type, default=torch.bfloat16 if on_gpu else torch.float32
    )
    parser.add_argument("--hidden", type=int, default=5120 if on_gpu else 256)
    parser.add_argument("--tokens", type=int, default=2048 if on_gpu else 512)
    parser.add_argument("--repeats", type=int, default=10 if on_gpu else 3)
    parser.add_argument("--truth", type=int, default=64, help="positions compared with float64")
    args = parser.parse_args(argv)
    if args.device == "cpu":
        torch.set_num_threads(2)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    facts = {"device": device, "torch": torch.__version__, "dtype": str(args.dtype)}
    print(json.dumps(facts), flush=True)
    for num_base, num_new in GPU_VOCABULARIES if args.device == "cuda" else CPU_VOCABULARIES:
        inputs = make_inputs(num_base, num_new, args)
        bench("plain", plain, inputs, args)
        for chunk in (size for size in CHUNKS if size <= args.tokens):
            overlay.LOSS_CHUNK_POSITIONS = chunk
            bench("chunked", chunked, inputs, args, chunk_positions=chunk)
        del inputs


if __name__ == "__main__":
    main(sys.argv[1:])
