"""Tokens per second of model.generate with the overlay installed, beside the base model alone.

    python tests/bench_generate.py configs/sample/model --new 341
    python tests/bench_generate.py MODEL_FOLDER --new 44223 --quantization nf4 --device cuda

One JSON line. Both continue the same prompt greedily, one sequence with a cache, taking turns; the
ratio is the median over the turns of the overlay's speed to the base model's in the same turn. New
rows of random numbers, input and output side of their own; speed does not depend on values. The
sample's model on 2 CPU cores: 0.90 (3.5 ms a token); in NF4 0.95 (7.6 ms), 2026-11-22.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train
from extend_tokenizer import Config
from overlay import WakeOverlay, dense_weight


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


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a local folder")
    parser.add_argument("--new", type=int, default=1000, help="new rows")
    parser.add_argument("--quantization", choices=("nf4", "none"), default="none")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--tokens", type=int, default=32, help="generated in a turn")
    parser.add_argument("--turns", type=int, default=25)
    a = parser.parse_args(argv)
    train.apply()
    config = Config(
        model_name=a.model, lexicon="-", corpus="-", run_dir="-", device=a.device,
        quantization=a.quantization,
    )  # fmt: skip
    place = train.find_place(config)
    model = train.load_model(config, place)
    model.generation_config.eos_token_id = None  # so that both write all tokens
    size, hidden_size = dense_weight(model.get_output_embeddings()).shape
    rows = [torch.randn(a.new, hidden_size) * 0.02 for _ in range(2)]
    offload = place.device.type == "cuda"  # as in a run
    overlay = WakeOverlay(model, size, *rows, offload_input_table=offload)
    prompt = torch.arange(16, device=place.device)[None] % size
    base, ours = [], []
    for _ in range(a.turns + 1):
        overlay.uninstall()
        base.append(tokens_per_second(model, prompt, a.tokens))
        overlay.install()
        ours.append(tokens_per_second(model, prompt, a.tokens))
    ratios = [with_overlay / alone for with_overlay, alone in zip(ours[1:], base[1:])]  # 1 warms up
    print(json.dumps({
        "device": torch.cuda.get_device_name() if place.device.type == "cuda" else "cpu",
        "dtype": str(place.dtype), "quantization": a.quantization, "base_rows": size,
        "new_rows": a.new, "base_tokens_per_second": round(statistics.median(base[1:]), 1),
        "overlay_tokens_per_second": round(statistics.median(ours[1:]), 1),
        "ratio": round(statistics.median(ratios), 3), **train.versions(),
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
