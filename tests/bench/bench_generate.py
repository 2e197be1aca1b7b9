"""Compare model.generate with the overlay installed and without, in tokens per second.

    python tests/bench/bench_generate.py configs/sample/model --new 341
    python tests/bench/bench_generate.py MODEL_FOLDER --new 44223 --quantization nf4 --device cuda

Both continue the same prompt greedily, one sequence with a cache, and take turns. The ratio is the
median over the turns of the overlay's speed to the base model's in the same turn. The new rows are
random, apart for input and output; speed does not depend on their values. Prints one JSON line. The
sample's model on 2 CPU cores: 0.90 (3.5 ms a token), in NF4 0.95 (7.6 ms) (torch 2.13.0,
2026-11-22).
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from config import Config
from env_shim import apply
from machine import device_name, find_worker, load_model
from overlay import WakeOverlay, dense_weight
from train import versions


@torch.no_grad()
def tokens_per_second(model, prompt: torch.Tensor, num_tokens: int) -> float:
    settings = {"do_sample": False, "max_new_tokens": num_tokens, "pad_token_id": 0}
    began = time.perf_counter()
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    if prompt.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    assert out.shape[1] == prompt.shape[1] + num_tokens, "generation ended early"
    return num_tokens / seconds


def time_in_turns(
    model, overlay: WakeOverlay, num_tokens: int, num_turns: int
) -> tuple[list[float], list[float]]:
    """Tokens per second of the base model, and with the overlay, turn by turn."""
    prompt = torch.arange(16, device=overlay.base_rows.device)[None] % overlay.first_new_id
    base, ours = [], []
    for _ in range(num_turns + 1):
        overlay.uninstall()
        base.append(tokens_per_second(model, prompt, num_tokens))
        overlay.install()
        ours.append(tokens_per_second(model, prompt, num_tokens))
    return base[1:], ours[1:]  # the first turn warms up


def main(argv: list[str]) -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("model", help="a local folder")
    parser.add_argument("--new", type=int, default=1000, help="new rows")
    parser.add_argument("--quantization", choices=("nf4", "none"), default="none")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--tokens", type=int, default=32, help="generated in a turn")
    parser.add_argument("--turns", type=int, default=25)
    a = parser.parse_args(argv)
    apply()
    config = Config(
        model_name=a.model, lexicon="-", corpus="-", run_dir="-", device=a.device,
        quantization=a.quantization,
    )  # fmt: skip
    worker = find_worker(config)
    model = load_model(config, worker)
    model.generation_config.eos_token_id = None  # so that both write all tokens
    size, hidden_size = dense_weight(model.get_output_embeddings()).shape
    rows = [torch.randn(a.new, hidden_size) * 0.02 for _ in range(2)]
    on_gpu = worker.device.type == "cuda"  # where a run has the input table on the host
    overlay = WakeOverlay(model, size, *rows, offload_input_table=on_gpu)
    base, ours = time_in_turns(model, overlay, a.tokens, a.turns)
    ratios = [with_overlay / alone for with_overlay, alone in zip(ours, base)]
    print(json.dumps({
        "device": device_name(worker), "dtype": str(worker.dtype), "quantization": a.quantization,
        "base_rows": size, "new_rows": a.new,
        "base_tokens_per_second": round(statistics.median(base), 1),
        "overlay_tokens_per_second": round(statistics.median(ours), 1),
        "ratio": round(statistics.median(ratios), 3), **versions(),
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
