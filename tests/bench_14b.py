"""Speed and memory of a step on Qwen2.5-14B's shapes with random NF4 weights, one CUDA GPU.

    python tests/bench_14b.py                      all methods, one JSON line each, ratios last
    python tests/bench_14b.py ours                 ours and the floor alone
    python tests/bench_14b.py --shape tiny --device cpu ours     does the program run?

2,048 tokens a step, 44,223 new rows, head untied, separate output rows trained, the allocator
capped at --cap GiB for `ours` and the floor. The floor is the frozen body and the base head rows
with the same chunked loss and all layers recomputed, nothing trained; `ours` and the floor are
timed in turns, in one process. A step of `ours` is all of train.py's: look-ups, loss, gradients,
finite check, clipping, Adafactor on both row sets. The peers run last, with our fused pieces in the
model, without clipping and optimizer. Peaks are what the allocator reports.
"""

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import train
from extend_tokenizer import Config
from overlay import WakeOverlay

SHAPES = {
    "14b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48,
            "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064,
            "base": 151665, "new": 44223},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 640,
             "base": 601, "new": 300},
}  # fmt: skip


def random_model(shape: dict, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Qwen2 of these shapes: linear layers quantized to NF4 one by one, never whole in 16 bits."""
    import bitsandbytes as bnb

    sizes = {key: value for key, value in shape.items() if key not in ("base", "new")}
    config = Qwen2Config(**sizes, tie_word_embeddings=False)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    torch.manual_seed(0)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            weight = torch.randn(module.weight.shape, device=device, dtype=dtype) * 0.02
            linear = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=dtype,
                quant_type="nf4", device="meta",
            )  # fmt: skip
            linear.weight = bnb.nn.Params4bit(
                weight.cpu() if device.type == "cpu" else weight, requires_grad=False,
                quant_type="nf4", compress_statistics=True,
            )  # fmt: skip
            linear.weight = linear.weight.to(device)
            if module.bias is not None:
                linear.bias = nn.Parameter(
                    torch.zeros(module.out_features, device=device, dtype=dtype)
                )
            parent, _, child = name.rpartition(".")
            setattr(model.model.layers.get_submodule(parent), child, linear)
            del weight
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                fill = torch.ones if parameter.dim() == 1 else torch.randn
                value = fill(parameter.shape, device=device, dtype=dtype)
                value = value if parameter.dim() == 1 else value.mul_(0.02)
                setattr(module, name, nn.Parameter(value))
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    train.keep_cpu_weights_plain(model)
    return model.requires_grad_(False).eval()


@dataclasses.dataclass
class Bench:
    """What every method works with."""

    shape: dict
    config: Config
    place: train.Place
    model: nn.Module
    data: train.Data
    steps: int
    medians: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds, by method

    @property
    def tokens(self) -> int:
        return self.config.effective_batch_size * self.config.seq_len


def report(method: str, seconds: list[float], bench: Bench) -> None:
    """Print one JSON line; the first timing is warm-up and left out."""
    bench.medians[method] = median = statistics.median(seconds[1:])
    print(json.dumps({
        "method": method, "step_seconds": round(median, 4),
        "spread": round(max(seconds[1:]) - min(seconds[1:]), 4),
        "tokens_per_second": round(bench.tokens / median), "peak_gib": round(peak_gib(bench), 2),
    }), flush=True)  # fmt: skip


def peak_gib(bench: Bench) -> float:
    return (
        torch.cuda.max_memory_allocated() / train.GIB if bench.place.device.type == "cuda" else 0.0
    )


def clear(bench: Bench) -> None:
    gc.collect()
    if bench.place.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def timed(bench: Bench, step) -> float:
    if bench.place.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if bench.place.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def make_overlay(bench: Bench) -> WakeOverlay:
    rows = [torch.randn(bench.shape["new"], bench.shape["hidden_size"]) * 0.02 for _ in range(2)]
    offload = bench.place.device.type == "cuda"
    overlay = WakeOverlay(bench.model, bench.shape["base"], *rows, offload_input_table=offload)
    overlay.install()
    return overlay


class OurStep:
    """train.py's step on sequences of its own data pipeline."""

    def __init__(self, bench: Bench, overlay: WakeOverlay, fit: train.Fit):
        self.bench, self.overlay, self.fit = bench, overlay, fit
        self.optimizer, self.step, self.scale = train.Optimizer(overlay), 0, train.LossScale()
        self.batch = self.prepare(1)

    def prepare(self, step: int) -> train.StepBatch:
        return train.prepare_step(
            step, self.overlay, self.bench.data, self.bench.config, self.bench.place
        )

    def __call__(self) -> None:
        self.step += 1
        config, place = self.bench.config, self.bench.place
        following = []
        loss = train.accumulate(
            self.batch, self.overlay, place, self.fit, self.scale,
            lambda: following.append(self.prepare(self.step + 1)),
        )  # fmt: skip
        gradients = self.optimizer.gradients()
        squares = sum(torch.linalg.vector_norm(grad).square() for _, grad, _ in gradients)
        train.add_up(place, loss)
        _, norm = torch.stack([loss, squares.sqrt()]).tolist()
        coupling, grad_scale = config.row_coupling, min(1.0, 1.0 / (norm + 1e-6))
        self.optimizer.update(gradients, self.step, 5e-4, grad_scale, coupling)
        self.batch = following.pop()


class CardInputs(train.HostInputs):
    """What train.HostInputs is compared with: recomputed layers' inputs stay on the card."""

    def put(self, number: int, hidden_states: Tensor) -> "torch.cuda.Event":
        self.arriving[number] = hidden_states.detach()
        return self.backend.Event()

    def take(self, number: int) -> Tensor:
        return self.arriving.pop(number).requires_grad_()


def floor_step(bench: Bench, overlay: WakeOverlay, micro: int, with_head: bool = True):
    """Frozen body and base head rows, forward and gradient to the inputs."""
    numbers = torch.arange(bench.config.effective_batch_size)
    x, y = train.sequences(bench.data.train, numbers, bench.config.seq_len, None)
    x = x.clamp(max=bench.shape["base"] - 1)
    y = y.clamp(max=bench.shape["base"] - 1).to(bench.place.device)
    embeds = overlay.base_embed(x)

    def step() -> None:
        for start in range(0, len(x), micro):
            part = slice(start, start + micro)
            inputs = embeds[part].clone().requires_grad_()
            hidden = overlay.body(inputs_embeds=inputs, use_cache=False).last_hidden_state
            grad = torch.ones_like(hidden)
            if with_head:
                grad = overlay.loss(hidden.detach(), y[part], 1 / y.numel(), base_only=True)[1]
            hidden.backward(grad.to(hidden.dtype))

    return step


def original_method(bench: Bench, micro: int, peft: bool) -> None:
    """The table resized to all words, library loss, dense gradient; or PEFT's TrainableTokens."""
    shape, model, place = bench.shape, bench.model, bench.place
    total, first = shape["base"] + shape["new"], shape["base"]
    table = torch.randn(total, shape["hidden_size"], device=place.device, dtype=place.dtype) * 0.02
    model.model.embed_tokens = nn.Embedding(*table.shape, _weight=table)
    model.lm_head = nn.Linear(1, 1, bias=False)
    model.lm_head.weight = nn.Parameter(table.clone() if peft else table, requires_grad=False)
    model.config.vocab_size = total
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    if peft:
        from peft import TrainableTokensConfig, get_peft_model

        tokens = {"token_indices": list(range(first, total)), "target_modules": ["embed_tokens"]}
        model = get_peft_model(model, TrainableTokensConfig(**tokens))
        rows = [p for p in model.parameters() if p.requires_grad]
    else:
        rows = [nn.Parameter(table[first:].float())]
    numbers = torch.arange(bench.config.effective_batch_size)
    x, _ = train.sequences(bench.data.train, numbers, bench.config.seq_len, None)
    x = x.to(place.device)

    def step() -> None:
        for part in x.split(micro):
            if peft:
                loss = model(input_ids=part, labels=part, use_cache=False).loss
            else:
                new = nn.functional.embedding((part - first).clamp(min=0), rows[0]).to(place.dtype)
                base = nn.functional.embedding(part.clamp(max=first - 1), table)
                embeds = torch.where((part >= first)[..., None], new, base)
                loss = model(inputs_embeds=embeds, labels=part, use_cache=False).loss
            (loss / (len(x) // micro)).backward()
        for row in rows:
            row.grad = None

    name = f"{'PEFT TrainableTokens' if peft else 'original method'} {micro} x {len(x) // micro}"
    clear(bench)
    try:
        report(name, [timed(bench, step) for _ in range(3)], bench)
    except torch.OutOfMemoryError:
        print(json.dumps({"method": name, "out_of_memory": True}), flush=True)


def compare(bench: Bench, cap: float) -> None:
    """ours and the floor in turns: all layers recomputed, then as many as the cap asks for."""
    config, cuda = bench.config, bench.place.device.type == "cuda"
    if cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(cap * train.GIB / total, 1.0))
    overlay = make_overlay(bench)
    layers = len(bench.model.model.layers)
    results: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    recomputed: dict[str, int] = {}
    notes: dict[str, str] = {}

    def run(name: str, step, num_recomputed: int, inputs: type) -> None:
        train.HostInputs = inputs
        if not (isinstance(step, OurStep) and step.fit.graph):  # a graph replays what it has
            train.recompute_layers(bench.model.model, num_recomputed)
        clear(bench)
        step()
        results.setdefault(name, []).extend(timed(bench, step) for _ in range(bench.steps))
        peaks[name], recomputed[name] = peak_gib(bench), num_recomputed

    host, card = train.HostInputs, CardInputs
    eager = train.fit_to_machine(
        overlay, bench.data, dataclasses.replace(config, compile="false"), bench.place
    )
    micro = eager.micro_batch_size
    step = OurStep(bench, overlay, eager)
    methods = {
        "body": (floor_step(bench, overlay, micro, False), layers, card),
        "floor": (floor_step(bench, overlay, micro), layers, card),
        "ours, eager, all layers recomputed, their inputs on the card": (step, layers, card),
        "ours, eager, all layers recomputed": (step, layers, host),
        "ours, eager": (step, eager.recomputed, host),
    }
    for _ in range(3):
        for name, method in methods.items():
            run(name, *method)
    # Fused pieces stay in the model: from here on the floor is fused too, and the floor no longer.
    for name, inputs in (("ours, inputs on the card", card), ("ours", host)):
        train.HostInputs = inputs
        fit = train.fit_to_machine(overlay, bench.data, config, bench.place)
        ours = OurStep(bench, overlay, fit)
        for _ in range(3):
            run(name, ours, fit.recomputed, inputs)
        peaks[name], notes[name] = max(peaks[name], fit.peak_bytes / train.GIB), fit.note
        fit.graph = None
    for name, seconds in results.items():
        bench.medians[name] = median = statistics.median(seconds)
        print(json.dumps({
            "method": name, "micro_batch_size": micro, "seq_len": config.seq_len,
            "layers_recomputed": recomputed[name],
            "step_seconds": round(median, 4), "spread": round(max(seconds) - min(seconds), 4),
            "tokens_per_second": round(bench.tokens / median), "peak_gib": round(peaks[name], 2),
            "cap_gib": cap, "note": notes.get(name, ""),
        }), flush=True)  # fmt: skip
    overlay.uninstall()


def main(argv: list[str]) -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("methods", nargs="*", default=["ours", "peers"])
    parser.add_argument("--shape", default="14b", choices=SHAPES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cap", type=float, default=14.0, help="GiB for ours and the floor")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", help="float16: what a T4 computes in")
    parser.add_argument("--steps", type=int, default=6, help="timed steps in each of three turns")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.methods) - {"ours", "peers"}:
        parser.error(f"no method {', '.join(unknown)}; give ours (with the floor), peers, or both")
    train.apply()  # the allocator setting that a run has
    shape = SHAPES[arguments.shape]
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype) if device.type == "cuda" else torch.float32
    config = Config(
        model_name="random", lexicon="-", corpus="-", run_dir="-", seq_len=arguments.seq_len,
        effective_batch_size=arguments.sequences, max_gpu_gib=arguments.cap,
    )  # fmt: skip
    place = train.Place(0, 1, device, dtype, "benchmark")
    generator = torch.Generator().manual_seed(1)
    size = 200 * arguments.sequences * arguments.seq_len
    stream = torch.randint(0, shape["base"] + shape["new"], (size,), generator=generator)
    data = train.Data(stream, stream[:0], stream[:0], "", None, "")
    bench = Bench(shape, config, place, random_model(shape, device, dtype), data, arguments.steps)
    print(json.dumps({
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", **train.versions(),
    }))  # fmt: skip
    if "ours" in arguments.methods:
        compare(bench, arguments.cap)
    if "peers" in arguments.methods:
        train.recompute_layers(bench.model.model, 0)
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
        bench.model.model.embed_tokens = bench.model.lm_head = None
        for micro, peft in ((1, False), (4, False), (1, True)):
            clear(bench)
            original_method(bench, micro, peft)
    if floor := bench.medians.get("floor"):
        ratios = {name: round(seconds / floor, 3) for name, seconds in bench.medians.items()}
        print(json.dumps({"ratio_to_floor": ratios}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
