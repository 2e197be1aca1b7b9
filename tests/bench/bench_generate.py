"""Compare `recover.py generate` with the untouched model's own generation, in tokens per second.

    python tests/bench/bench_generate.py configs/sample/model --new 341
    python tests/bench/bench_generate.py MODEL_FOLDER --new 44223 --quantization nf4 --device cuda

In one process both continue the same prompt with the same settings, one sequence with a cache, and
take turns. Ours has the overlay installed, and decodes and shows each token as it comes. The ratio
is the median over the turns of our speed to the base model's in the same turn. The new rows are
random, apart for input and output; speed does not depend on their values. Prints one JSON line.
The sample's model, one thread of 2 shared CPU cores, --turns 9: 0.92 (13 ms a token), in NF4 0.98
(30 ms) (torch 2.13.0, 2026-11-26).
"""

import argparse
import functools
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from config import Config
from env_shim import apply
from extend_tokenizer import base_tokenizer
from machine import device_name, find_worker, load_model
from overlay import WakeOverlay, dense_weight
from recover import TextStream, continue_prompt
from train import versions


PROMPT = "And in the morning the people of the city came to the river"


def tokens_per_second(model, tokenizer, num_tokens: int, streamer: TextStream | None) -> float:
    how = {"max_new_tokens": num_tokens, "top_p": 0.95, "top_k": 0, "use_cache": True}
    began = time.perf_counter()
    ids = continue_prompt(model, tokenizer, PROMPT, 42, streamer=streamer, **how)  # waits
    seconds = time.perf_counter() - began
    num_made = len(ids) - len(tokenizer.encode(PROMPT).ids)
    assert num_made == num_tokens, "generation ended early"
    return num_tokens / seconds


def time_in_turns(
    overlay: WakeOverlay, tokenizer, num_tokens: int, num_turns: int
) -> tuple[list[float], list[float]]:
    """Tokens per second of the base model, and with the overlay, turn by turn."""
    base, ours = [], []
    for _ in range(num_turns + 1):
        overlay.uninstall()
        base.append(tokens_per_second(overlay.model, tokenizer, num_tokens, None))
        overlay.install()
        show = functools.partial(print, end="", flush=True, file=sys.stderr)
        stream = TextStream(tokenizer, overlay.first_new_id, ("", ""), show)
        ours.append(tokens_per_second(overlay.model, tokenizer, num_tokens, stream))
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
    overlay = WakeOverlay(model, size, *rows)
    base, ours = time_in_turns(overlay, base_tokenizer(config), a.tokens, a.turns)
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
