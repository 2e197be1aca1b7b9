"""Time a training step on Qwen2.5-14B's shapes with random NF4 weights, and measure its memory.

    python tests/bench/bench_14b.py                    every method, one JSON line each
    python tests/bench/bench_14b.py ours               one of them; several can be named
    python tests/bench/bench_14b.py --shape tiny --device cpu       does the program run?
    torchrun --nproc-per-node 2 tests/bench/bench_14b.py ours --sequences 32

A step has 2,048 tokens and 44,223 new rows, the head is untied, and the output rows train apart.

    body        forward and backward of the frozen body alone
    floor       the same with the loss over the base head; nothing trains
    recomputed  the step of train.py, eager, with all layers recomputed in backward, as in floor
    eager       the same with as few layers recomputed as --cap allows
    ours        the same with fused pieces and CUDA graphs: what a run does
    peers       the original method (all words in one resized table, the library's loss, a gradient
                of the whole table) and PEFT's TrainableTokens, without clipping and optimizer

The allocator is capped at --cap GiB for all but the peers. The methods before `ours` take turns in
one process. The fused pieces stay in the model, so the peers after `ours` are fused too. Peaks are
what the allocator reports. One H100 (torch 2.11.0, transformers 5.17.0, bitsandbytes 0.50.2,
2026-11-26): ours 0.30 s and 12.9 GiB; one H200: 0.29 s. On 2026-11-22, 32 x 128 tokens took 0.350,
0.349 and 0.344 s on two of one host, and 0.650, 0.647 and 0.645 s on one.
"""

import argparse
import dataclasses
import functools
import gc
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from config import Config
from env_shim import apply, keep_cpu_weights_plain
from machine import (
    StepPlan, Worker, agree, device_name, find_worker, fit_to_machine, join_processes,
    leave_processes, peak_gib, recompute_layers, run_step,
)  # fmt: skip
from overlay import LossScale, Optimizer, WakeOverlay, sharing_matrices
from train import Data, prepare_step, sequences, versions

SHAPES = {
    "14b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48,
            "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 640},
}  # fmt: skip
WORDS = {"14b": (151665, 44223), "tiny": (601, 300)}  # base tokens, new words
IN_TURNS = ("body", "floor", "recomputed", "eager")
METHODS = (*IN_TURNS, "ours", "peers")
SHARED_OUT = ("recomputed", "eager", "ours")  # with several processes each takes its share
TURNS = 3


# ---- A model of random numbers -------------------------------------------------------------------


def random_model(shape: dict, worker: Worker) -> nn.Module:
    """Make a Qwen2 of these shapes, its linear layers quantized one by one: never whole in 16 bits.

    Both tables are on the device at first; the overlay moves the input table to the host.
    """
    config = Qwen2Config(**shape, tie_word_embeddings=False)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    torch.manual_seed(0)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.layers.set_submodule(name, random_nf4(module, worker))
    make = {"device": worker.device, "dtype": worker.dtype}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                if parameter.dim() == 1:
                    value = torch.ones(parameter.shape, **make)
                else:
                    value = random_weights(parameter, worker)
                setattr(module, name, nn.Parameter(value))
    with torch.device(worker.device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    keep_cpu_weights_plain(model)
    return model.requires_grad_(False).eval()


def random_weights(like: Tensor, worker: Worker) -> Tensor:
    return torch.randn(like.shape, device=worker.device, dtype=worker.dtype).mul_(0.02)


def random_nf4(linear: nn.Linear, worker: Worker) -> nn.Module:
    """Make an NF4 layer of the shape of `linear`, which is on the meta device."""
    import bitsandbytes as bnb

    quantized = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=worker.dtype,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    quantized.weight = bnb.nn.Params4bit(
        random_weights(linear.weight, worker), requires_grad=False, quant_type="nf4",
        compress_statistics=True,
    ).to(worker.device)  # fmt: skip
    if linear.bias is not None:
        bias = torch.zeros(linear.out_features, device=worker.device, dtype=worker.dtype)
        quantized.bias = nn.Parameter(bias)
    return quantized


# ---- What is timed -------------------------------------------------------------------------------


@dataclasses.dataclass
class Bench:
    """This holds what every method works with, and what was measured so far."""

    config: Config
    worker: Worker
    model: nn.Module
    data: Data
    num_base: int
    num_new: int
    num_steps: int
    medians: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds, by method

    def first_sequences(self) -> tuple[Tensor, Tensor]:
        """x, y of the shape of a step."""
        numbers = torch.arange(self.config.effective_batch_size)
        return sequences(self.data.train, numbers, self.config.seq_len, None)


@dataclasses.dataclass
class Method:
    """A step of one kind: a call of `run` is one step, done as the plan says."""

    name: str
    plan: StepPlan
    run: Callable[[], None]
    seconds: list[float] = dataclasses.field(default_factory=list)
    facts: dict = dataclasses.field(default_factory=dict)


def make_bench(arguments: argparse.Namespace) -> Bench:
    config = Config(
        model_name="random", lexicon="-", corpus="-", run_dir="-", device=arguments.device,
        compute_dtype=arguments.dtype, seq_len=arguments.seq_len, learning_rate=5e-4,
        effective_batch_size=arguments.sequences, max_gpu_gib=arguments.cap,
        kin_coupling=arguments.kin_coupling,
    )  # fmt: skip
    worker = join_processes(find_worker(config))
    num_base, num_new = WORDS[arguments.shape]
    model = random_model(SHAPES[arguments.shape], worker)
    generator = torch.Generator().manual_seed(1)
    size = 200 * arguments.sequences * arguments.seq_len
    stream = torch.randint(0, num_base + num_new, (size,), generator=generator)
    data = Data(stream, stream[:0], stream[:0], val_text="", bos_id=None, sha256="")
    return Bench(config, worker, model, data, num_base, num_new, arguments.steps)


def make_overlay(bench: Bench) -> WakeOverlay:
    hidden_size = bench.model.config.hidden_size
    rows = [torch.randn(bench.num_new, hidden_size) * 0.02 for _ in range(2)]
    on_gpu = bench.worker.device.type == "cuda"
    overlay = WakeOverlay(bench.model, bench.num_base, *rows, offload_input_table=on_gpu)
    overlay.install()
    return overlay


def fitted(bench: Bench, overlay: WakeOverlay, **changes) -> StepPlan:
    """Let fit_to_machine plan the step, as a run does."""
    config = dataclasses.replace(bench.config, **changes)
    batches = [prepare_step(step, overlay, bench.data, config, bench.worker) for step in (1, 2)]
    return fit_to_machine(overlay, batches, config, bench.worker)


def our_step(name: str, plan: StepPlan, bench: Bench, overlay: WakeOverlay) -> Method:
    """Do what train.py's loop does: look-ups, loss, gradients, one wait, clipping, Adafactor."""
    config, worker, loss_scale = bench.config, bench.worker, LossScale()
    words, spellings = made_up_words(bench.num_new)
    optimizer = Optimizer(overlay, sharing_matrices(
        words, spellings, config.row_coupling, config.kin_coupling, overlay.grad.device
    ))  # fmt: skip
    prepare = functools.partial(
        prepare_step, overlay=overlay, data=bench.data, config=config, worker=worker
    )
    step, batch = 0, prepare(1)

    def run() -> None:
        nonlocal step, batch
        step += 1
        prepare_next = functools.partial(prepare, step + 1)
        loss_sum, batch = run_step(plan, batch, overlay, worker, loss_scale, prepare_next)
        norm = optimizer.gradient_norm()
        loss_sum, norm, _ = agree(worker, loss_sum, norm, False, loss_scale)
        clip = min(1.0, config.max_grad_norm / (norm + 1e-6))
        optimizer.update(step, config.learning_rate, clip)
        tokens = config.effective_batch_size * config.seq_len
        method.facts = {"steps": step, "loss": round(loss_sum / tokens, 5), "norm": round(norm, 7)}
        if worker.world_size > 1:
            values = overlay.grad.numel() + overlay.input_grad.numel()
            method.facts["summed_mib_per_step"] = round(4 * values / 2**20)

    method = Method(name, plan, run)
    return method


def made_up_words(num: int) -> tuple[list[str], list[list[int]]]:
    """Words of two to four syllables and base ids for them, which share as much as real ones."""
    rng = random.Random(1)
    syllables = [a + b + c for a in "bdfglmnprst" for b in "aeiou" for c in ("", "n", "r", "s")]
    parts = [rng.choices(syllables, k=rng.randint(2, 4)) for _ in range(num)]
    return ["".join(p) for p in parts], [[syllables.index(s) for s in p] for p in parts]


def floor_step(name: str, plan: StepPlan, bench: Bench, overlay: WakeOverlay) -> Method:
    """Frozen body and base head rows, forward and gradient to the inputs; `body` has no head."""
    x, y = (ids.clamp(max=bench.num_base - 1) for ids in bench.first_sequences())
    embeds, y = overlay.base_embed(x), y.to(bench.worker.device)

    def run() -> None:
        for start in range(0, len(x), plan.micro_batch_size):
            part = slice(start, start + plan.micro_batch_size)
            inputs = embeds[part].clone().requires_grad_()
            hidden = overlay.body(inputs_embeds=inputs, use_cache=False).last_hidden_state
            if name == "body":
                grad = torch.ones_like(hidden)
            else:
                grad = overlay.loss(hidden.detach(), y[part], 1 / y.numel(), base_only=True)[1]
            hidden.backward(grad.to(hidden.dtype))

    return Method(name, plan, run)


# ---- The peers -----------------------------------------------------------------------------------


def resized_table(bench: Bench) -> Tensor:
    """Give the model one trained-size table for base tokens and new words -> (V + N, H)."""
    model = bench.model
    size = bench.num_base + bench.num_new
    like = torch.empty(size, model.config.hidden_size, device="meta")
    table = random_weights(like, bench.worker)
    model.model.embed_tokens = nn.Embedding(*table.shape, _weight=table)
    model.lm_head = nn.Linear(1, 1, bias=False)
    model.lm_head.weight = nn.Parameter(table, requires_grad=False)
    model.config.vocab_size = size
    model.requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return table


def original_method(micro: int, bench: Bench) -> Method:
    """All words in one table, which is the head too; the library's loss; a dense gradient."""
    table, first = resized_table(bench), bench.num_base
    row_set = nn.Parameter(table[first:].float())
    x = bench.first_sequences()[0].to(bench.worker.device)

    def run() -> None:
        for part in x.split(micro):
            new = nn.functional.embedding((part - first).clamp(min=0), row_set).to(table.dtype)
            base = nn.functional.embedding(part.clamp(max=first - 1), table)
            embeds = torch.where((part >= first)[..., None], new, base)
            loss = bench.model(inputs_embeds=embeds, labels=part, use_cache=False).loss
            (loss * micro / len(x)).backward()
        row_set.grad = None

    return Method("original method", StepPlan(micro, len(bench.model.model.layers)), run)


def peft_method(micro: int, bench: Bench) -> Method:
    """PEFT's TrainableTokens on the same table; the head keeps a table of its own."""
    from peft import TrainableTokensConfig, get_peft_model

    table = resized_table(bench)
    bench.model.lm_head.weight = nn.Parameter(table.clone(), requires_grad=False)
    indices = list(range(bench.num_base, len(table)))
    tokens = TrainableTokensConfig(token_indices=indices, target_modules=["embed_tokens"])
    model = get_peft_model(bench.model, tokens)
    x = bench.first_sequences()[0].to(bench.worker.device)

    def run() -> None:
        for part in x.split(micro):
            loss = model(input_ids=part, labels=part, use_cache=False).loss
            (loss * micro / len(x)).backward()
        model.zero_grad()

    return Method("PEFT TrainableTokens", StepPlan(micro, len(bench.model.model.layers)), run)


# ---- Timing and printing -------------------------------------------------------------------------


def clear(bench: Bench) -> None:
    gc.collect()
    if bench.worker.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def time_method(method: Method, bench: Bench, num_steps: int) -> None:
    """Add the seconds of num_steps steps to the method's, after one step that warms up."""
    clear(bench)
    for number in range(num_steps + 1):
        began = time.perf_counter()
        method.run()
        if bench.worker.device.type == "cuda":
            torch.cuda.synchronize()
        if number:
            method.seconds.append(time.perf_counter() - began)
    method.facts["peak_gib"] = peak_gib(method.plan, bench.worker)


def time_in_turns(methods: list[Method], bench: Bench) -> None:
    for _ in range(TURNS):
        for method in methods:
            if method.plan.graph is None:  # a graph replays the layers that it was captured with
                recompute_layers(
                    bench.model.model.layers, method.plan.num_recomputed_layers, method.plan.parking
                )
            time_method(method, bench, bench.num_steps)
    for method in methods:
        report(method, bench)


def report(method: Method, bench: Bench) -> None:
    """Print one JSON line for a method that was timed."""
    config, plan, seconds = bench.config, method.plan, method.seconds
    bench.medians[method.name] = median = statistics.median(seconds)
    peak = method.facts.pop("peak_gib")
    bench.worker.say(json.dumps({
        "method": method.name, "processes": bench.worker.world_size,
        "micro_batch_size": plan.micro_batch_size, "seq_len": config.seq_len,
        "layers_recomputed": plan.num_recomputed_layers,
        "step_seconds": round(median, 4), "spread": round(max(seconds) - min(seconds), 4),
        "tokens_per_second": round(config.effective_batch_size * config.seq_len / median),
        "peak_gib": peak and round(peak, 2), "cap_gib": config.max_gpu_gib,
        **method.facts, "remarks": plan.remarks,
    }))  # fmt: skip


def bench_overlay(names: list[str], bench: Bench) -> None:
    """Time all methods but the peers."""
    overlay = make_overlay(bench)
    if in_turns := [name for name in IN_TURNS if name in names]:
        eager = fitted(bench, overlay, compile="false")
        all_layers = dataclasses.replace(
            eager, num_recomputed_layers=len(overlay.layers), parking=None
        )
        methods = []
        for name in in_turns:
            make_step = floor_step if name in ("body", "floor") else our_step
            plan = eager if name == "eager" else all_layers
            methods.append(make_step(name, plan, bench, overlay))
        time_in_turns(methods, bench)
        del methods
    if "ours" in names:
        plan = fitted(bench, overlay)
        time_in_turns([our_step("ours", plan, bench, overlay)], bench)
    overlay.uninstall()


def bench_peers(bench: Bench) -> None:
    recompute_layers(bench.model.model.layers, 0)  # they use the library's own switch
    if bench.worker.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
    bench.model.model.embed_tokens = bench.model.lm_head = None
    for make_step, micro in ((original_method, 1), (original_method, 4), (peft_method, 1)):
        clear(bench)
        method = make_step(micro, bench)
        method.name += f" {micro} x {bench.config.effective_batch_size // micro}"
        try:
            time_method(method, bench, 2)
            report(method, bench)
        except torch.OutOfMemoryError:
            bench.worker.say(json.dumps({"method": method.name, "out_of_memory": True}))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("methods", nargs="*", default=list(METHODS))
    parser.add_argument("--shape", default="14b", choices=SHAPES)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--cap", type=float, default=14.0, help="GiB that the allocator may use")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--dtype", default="auto", help="float16: what a T4 computes in")
    parser.add_argument("--kin-coupling", type=float, default=Config.kin_coupling)
    parser.add_argument("--steps", type=int, default=6, help="timed steps in each of three turns")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.methods) - set(METHODS):
        parser.error(f"no method {', '.join(unknown)}; give some of {', '.join(METHODS)}")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and (alone := set(arguments.methods) - set(SHARED_OUT)):
        parser.error(f"{', '.join(alone)}: for one process; give some of {', '.join(SHARED_OUT)}")
    return arguments


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    apply()  # the allocator setting that a run has
    bench = make_bench(arguments)
    bench.worker.say(json.dumps({"gpu": device_name(bench.worker), **versions()}))
    bench_overlay(arguments.methods, bench)
    if "peers" in arguments.methods:
        bench_peers(bench)
    if floor := bench.medians.get("floor"):
        ratios = {name: round(seconds / floor, 3) for name, seconds in bench.medians.items()}
        bench.worker.say(json.dumps({"ratio_to_floor": ratios}))
    leave_processes(bench.worker)


if __name__ == "__main__":
    main(sys.argv[1:])
