"""Proves how a run fits itself to a machine: memory, fused pieces, CUDA graphs, and out of memory.

    python -m pytest tests/test_machine.py     (CPU; what only a GPU shows is in tests/test_cuda.py)

A function of the memory that a pass takes stands in for the card, and a function of what it
compiles stands in for the compiler. The models are real ones, and tiny.
"""

import contextlib
import dataclasses
import errno
import gc
import inspect
import json
import math
import os
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny_models import (
    CPU, FAMILIES, FIRST_NEW_ID, REFUSED, make_batch, make_model, make_overlay, random_ids,
    save_folder, tiny_settings,
)  # fmt: skip
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

import machine
import train
from config import GIB, Config, UserError
from machine import (
    GraphedPass, Parking, StepPlan, attend_causally, capture, choose_plan, dry_run, find_rotary,
    find_worker, fit_to_machine, fuse_and_prove, host_copies, known_errors_in_one_line, load_model,
    measure_peak, memory_plan, model_without_weights, num_expert_weights, recompute_layers,
    relative_difference, run_step, undo_fusing,
)  # fmt: skip
from overlay import LossScale, WakeOverlay, find_body, forward_backward, is_tied


def make_config(**changes) -> Config:
    return Config(**{"model_name": "-", "lexicon": "-", "corpus": "-", "run_dir": "-"} | changes)


def same(found: list[Tensor], wanted: list[Tensor], tolerance: float = 0.0) -> bool:
    """Compare bit by bit, or by the norm of the difference as a share of the norm."""
    if not tolerance:
        return all(map(torch.equal, found, wanted))
    return max(map(relative_difference, wanted, found)) <= tolerance


def rounding(dtype: torch.dtype) -> float:
    """bfloat16 loses its mask when it is fused, and transformers 4.57 gave it one before: another
    kernel of attention rounds otherwise."""
    return 0.02 if dtype == torch.bfloat16 else 0.0


# ---- This process --------------------------------------------------------------------------------


def on_a_card(monkeypatch, config: Config, capability=(9, 0), rank: int = 0):
    """find_worker on a machine with one GPU of 80 GiB -> (worker, shares of it set as a limit)"""
    shares = []
    card = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 1, set_device=lambda device: None,
        get_device_capability=lambda device: capability,
        get_device_properties=lambda device: SimpleNamespace(total_memory=80 * GIB),
        set_per_process_memory_fraction=lambda share, device: shares.append(share),
    )  # fmt: skip
    monkeypatch.setattr(torch, "cuda", card)
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": rank + 1}.items():
        monkeypatch.setenv(name, str(value))
    return find_worker(config), shares


@pytest.mark.parametrize(
    "capability, changes, dtype, share",
    [
        ((8, 0), {}, torch.bfloat16, 1.0),
        ((7, 5), {}, torch.float16, 1.0),  # a T4
        ((7, 5), {"compute_dtype": "float32"}, torch.float32, 1.0),
        ((9, 0), {"max_gpu_gib": 20.0}, torch.bfloat16, 0.25),
        ((9, 0), {"max_gpu_gib": 90.0}, torch.bfloat16, 1.0),
    ],
)
def test_a_card_gives_the_dtype_and_a_run_its_own_cap(
    monkeypatch, capability, changes, dtype, share
):
    worker, shares = on_a_card(monkeypatch, make_config(**changes), capability)
    assert (worker.device, worker.dtype) == (torch.device("cuda", 0), dtype)
    assert shares == [share]  # 1.0 lifts the cap of an earlier run in this process


def test_processes_that_do_not_come_are_one_line(monkeypatch):
    def rendezvous(*_, **__):
        raise RuntimeError("The client socket has timed out after 7200s\nmore of it")

    monkeypatch.setattr(machine.dist, "rendezvous", rendezvous)
    with pytest.raises(UserError) as caught:
        machine.join_processes(machine.Worker(1, 2, torch.device("cpu"), torch.float32, "a CPU"))
    assert str(caught.value) == (
        "process 1 ends: the others cannot be reached: The client socket has timed out after 7200s"
        " (GLOO_SOCKET_IFNAME names the network interface, if it is the wrong one)"
    )


def test_more_processes_than_cards(monkeypatch):
    with pytest.raises(UserError) as error:
        on_a_card(monkeypatch, make_config(), rank=1)
    assert str(error.value) == (
        "process 1 ends: this machine has 1 GPU(s), and each process needs its own; start no more"
    )


# ---- Memory --------------------------------------------------------------------------------------


def qwen_14b(**changes) -> nn.Module:
    shape = {
        "hidden_size": 5120, "num_hidden_layers": 48, "vocab_size": 152_064,
        "num_attention_heads": 40, "num_key_value_heads": 8, "intermediate_size": 13_824,
        "tie_word_embeddings": False,
    } | changes  # fmt: skip
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
    model.tie_weights()  # transformers 5.0.0 ties nothing on the meta device by itself
    return model


@pytest.mark.parametrize("micro, seq_len, measured", [(16, 128, 11.23), (8, 512, 11.66)])
def test_the_plan_is_within_eight_percent_of_what_was_measured(micro, seq_len, measured):
    """The peaks are those of an H100 on 2026-11-22, with all layers recomputed. The inputs of the
    layers, 0.94 and 1.88 GiB, then waited on the host; now they stay on the card."""
    config = make_config(seq_len=seq_len, effective_batch_size=micro)
    plan = memory_plan(qwen_14b(), 44_223, config, micro)
    inputs = 48 * micro * seq_len * 5120 * 2 / GIB
    assert plan["total"] == pytest.approx(measured + inputs, rel=0.08)


def test_the_plan_counts_what_the_config_changes():
    model, tied = qwen_14b(), qwen_14b(tie_word_embeddings=True)

    def plan(model, **changes):
        return memory_plan(model, 44_223, make_config(**changes), 16)

    half, full = plan(model), plan(model, compute_dtype="float32")
    for name in ("base head rows", "base rows of two steps", "layer inputs"):
        assert full[name] == 2 * half[name], name
    rows, table = 44_223 * 5120 * 4 / GIB, 152_064 * 5120 * 2 / GIB
    assert half["host memory"] == 2 * rows + table and plan(tied)["host memory"] == rows
    assert plan(tied)["new rows"] == rows and half["new rows"] == 2 * rows
    assert plan(tied, output_rows="separate")["new rows"] == 2 * rows


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_counts_every_weight_of_the_body(family):
    model = make_model(family)
    plan = memory_plan(model, 20, make_config(quantization="none", compute_dtype="float32"), 1)
    weights = sum(weight.numel() for weight in model.parameters())
    if not is_tied(model):  # one of the two tables is kept on the card
        weights -= model.get_output_embeddings().weight.numel()
    assert plan["body"] + plan["base head rows"] == pytest.approx(4 * weights / GIB)


def test_a_matrix_in_4_bits_is_counted_as_bitsandbytes_stores_it_with_its_scales():
    functional = pytest.importorskip("bitsandbytes.functional")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    model, nf4 = make_model("llama_untied", head_dim=64, **sizes), 0
    wanted = sum(p.numel() for p in model.parameters() if p.dim() == 1) * 2  # norms in 16 bits
    for module in find_body(model)[1].modules():
        if isinstance(module, nn.Linear):
            packed, state = functional.quantize_4bit(
                module.weight, compress_statistics=True, quant_type="nf4"
            )
            nf4 += packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    plan = memory_plan(model, 20, make_config(), 1)
    assert plan["body"] == pytest.approx((wanted + nf4) / GIB, rel=1e-6) and nf4


def base_folder(folder: Path, **settings) -> Config:
    """A model folder with a config.json alone, which is all that a plan reads."""
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return dataclasses.replace(make_config(), model_name=str(folder))


QWEN3_30B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "vocab_size": 151_936, "tie_word_embeddings": False,
}  # fmt: skip


def test_the_plan_of_a_mixture_of_experts_counts_all_of_them_in_16_bits(tmp_path, capsys):
    """Each of 128 experts has three matrices in each of 48 layers; bitsandbytes leaves them. Before
    transformers 5 they are linear layers, which it takes to 4 bits."""
    config = base_folder(tmp_path, **QWEN3_30B)
    experts, attention = 48 * 128 * 3 * 2048 * 768, 48 * 2 * 2048 * (32 + 4) * 128
    plan = memory_plan(model_without_weights(config), 20, config, 1)
    nf4, in_16_bits = 0.5 + 1 / 64 + 1 / 4096, num_expert_weights(model_without_weights(config)) > 0
    wanted = ((2 if in_16_bits else nf4) * experts + attention * nf4) / GIB
    assert plan["body"] == pytest.approx(wanted, rel=0.002)  # and routers and norms
    dry_run(config, 151_669, 20)
    text = capsys.readouterr().out
    assert re.search(r"T4 +does not fit", text)
    assert not in_16_bits or f"not in 4 bits: {experts:,} weights of experts, 54.00 GiB" in text


@pytest.mark.parametrize("family", ["gpt2", "gemma3_4b", "opt", "mamba", "falcon_h1"])
def test_a_plan_needs_no_names_of_sizes(family, tmp_path, capsys):
    config = base_folder(tmp_path, **make_model(family).config.to_dict())
    dry_run(config, FIRST_NEW_ID, 20)
    assert re.search(r"T4 +fits, micro_batch_size 16", capsys.readouterr().out)


@pytest.mark.parametrize("size", [1, 4])
def test_a_plan_takes_the_largest_micro_batch_below_the_cap(size, tmp_path, capsys):
    config = base_folder(tmp_path, **make_model("gpt2").config.to_dict())
    model = model_without_weights(config)
    fits, too_much = (memory_plan(model, 20, config, n)["total"] for n in (size, 2 * size))
    dry_run(dataclasses.replace(config, max_gpu_gib=(fits + too_much) / 2), FIRST_NEW_ID, 20)
    assert f"\nmicro_batch_size {size} x {16 // size}, " in capsys.readouterr().out


def test_a_plan_of_the_text_part_of_a_picture_model(tmp_path, capsys):
    """Training loads Llama 4's text part alone; transformers 4.57.6 has no sizes outside of it."""
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
            "num_key_value_heads": 1, "intermediate_size": 48, "intermediate_size_mlp": 48,
            "num_local_experts": 2, "vocab_size": 264, "pad_token_id": 0}  # fmt: skip
    config = base_folder(tmp_path, model_type="llama4", text_config=text)
    assert type(model_without_weights(config)).__name__ == "Llama4ForCausalLM"
    dry_run(config, FIRST_NEW_ID, 20)
    assert re.search(r"T4 +fits, micro_batch_size 16", capsys.readouterr().out)


def test_a_plan_for_a_model_that_training_refuses_is_the_same_line(tmp_path):
    config = base_folder(tmp_path, **make_model("gemma3n").config.to_dict())
    with pytest.raises(UserError) as caught:
        dry_run(config, FIRST_NEW_ID, 20)
    assert str(caught.value) == REFUSED["gemma3n"][3]


def test_a_model_stored_in_another_quantization_is_told_from_nf4(tmp_path):
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    config = base_folder(tmp_path, model_type="gpt_oss", quantization_config=settings)
    for read in (model_without_weights, lambda config: load_model(config, CPU)):
        with pytest.raises(UserError) as caught:
            read(config)
        assert str(caught.value) == (
            f"quantization: {tmp_path} is stored quantized (mxfp4) and cannot become nf4; give"
            " none, or a model_name that is stored in 16 bits"
        )


def test_loading_in_nf4_freezes_every_weight_and_says_what_stays_in_16_bits(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 32}
    model = make_model("qwen3_moe", **sizes)
    config = make_config(model_name=str(save_folder(model, tmp_path)), device="cpu")
    loaded = load_model(config, CPU)
    assert not any(p.requires_grad for p in loaded.parameters())
    left = [p for p in loaded.parameters() if p.dim() == 3 and p.is_floating_point()]
    text = capsys.readouterr().out
    if left:
        weights = sum(p.numel() for p in left)
        assert weights == 2 * 4 * 3 * 64 * 64
        assert text == f"not in 4 bits: {weights:,} weights of experts, 0.00 GiB\n"
    else:  # before transformers 5 each expert is three linear layers
        assert text == "" and transformers.__version__.startswith("4.")


# ---- Fused pieces --------------------------------------------------------------------------------


def fuse(monkeypatch, overlay: WakeOverlay, change) -> str:
    """Fuse an overlay's model and return the remark. The compiler gives the piece itself, its
    results passed through `change`."""

    def stand_in(function, dynamic):
        def compiled(*arguments, **keywords):
            outputs = function(*arguments, **keywords)
            return tuple(map(change, outputs)) if type(outputs) is tuple else change(outputs)

        return compiled

    modeling, rotary = find_rotary(overlay.layers)
    if rotary:
        monkeypatch.setattr(modeling, "apply_rotary_pos_emb", rotary)  # put back after the test
    monkeypatch.setattr(torch, "compile", stand_in)
    plan = StepPlan(1, 0)
    fused = fuse_and_prove(plan, overlay, make_batch(overlay))
    assert fused == plan.remarks[0].startswith("fused") and len(plan.remarks) == 1
    return plan.remarks[0]


def train_once(overlay: WakeOverlay) -> list[Tensor]:
    """Give the losses of a training pass, and both sides' gradients."""
    batch = make_batch(overlay)
    overlay.begin_step(batch.all_ids)
    losses = forward_backward(overlay, batch.x, batch.y, batch.base_embeds, 1.0, LossScale())
    return [losses, overlay.input_grad.clone(), overlay.grad.clone()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_pieces_serve_training_alone_and_in_its_dtype(monkeypatch, family, dtype):
    """The rows are fp32, and the model's first parameter once the overlay is in."""
    overlay, used = make_overlay(family, dtype=dtype), set()
    overlay.install()
    wanted = train_once(overlay)
    note = lambda output: used.add((output.dim(), output.dtype)) or output  # noqa: E731
    assert fuse(monkeypatch, overlay, note) == "fused"
    # Norms and gates have three dimensions, rotary four. GPT-2 and OPT have none of these.
    dims = {"mamba": {3}, "gpt_neox": {4}, "phi": {4}, "gpt2": set(), "opt": set()}
    wanted_uses = {(dim, dtype) for dim in dims.get(family, {3, 4})}
    if family == "mamba":  # it adds up its residuals in fp32
        wanted_uses.add((3, torch.float32))
    if family == "qwen3_moe":  # before transformers 5 each expert takes its tokens out of the batch
        used.discard((2, dtype))
    assert used == wanted_uses
    used.clear()
    assert same(train_once(overlay), wanted, rounding(dtype)) and bool(used) == bool(wanted_uses)
    used.clear()
    with torch.no_grad():
        overlay.body(inputs_embeds=overlay.embed(random_ids(1, 9)))
    assert not used


@pytest.mark.parametrize("family", ["qwen2_untied", "gpt_neox", "phi"])
def test_the_fused_rotary_embedding_takes_q_and_k_as_they_lie_in_memory(monkeypatch, family):
    """Tokens before heads: the compiled function would copy what lies otherwise."""
    overlay, shapes = make_overlay(family), []
    note = lambda output: shapes.append(output.shape) or output  # noqa: E731
    assert fuse(monkeypatch, overlay, note) == "fused"
    shapes.clear()
    train_once(overlay)
    num_tokens = make_batch(overlay).x.shape[1]
    assert {shape[1] for shape in shapes if len(shape) == 4} == {num_tokens}


def test_a_call_that_says_where_the_heads_are_is_passed_on(monkeypatch):
    overlay = make_overlay()
    modeling, rotary = find_rotary(overlay.layers)
    q, k = torch.randn(2, 2, 5, 3, 8)  # (B, T, heads, D)
    cos, sin = torch.randn(2, 2, 5, 8)
    wanted = rotary(q, k, cos, sin, unsqueeze_dim=2)
    assert fuse(monkeypatch, overlay, lambda output: output) == "fused"
    fused = modeling.apply_rotary_pos_emb
    assert same(fused(q, k, cos, sin, unsqueeze_dim=2), wanted)
    # Before transformers 5 a fifth argument, which is not used, comes before it.
    more = list(inspect.signature(rotary).parameters)[4:-1]
    assert same(fused(q, k, cos, sin, *[None] * len(more), 2), wanted)


class WrongBackward(torch.autograd.Function):
    forward = staticmethod(lambda context, x: x.clone())
    backward = staticmethod(lambda context, grad: grad * 1.1)


class FailingBackward(torch.autograd.Function):
    forward = staticmethod(lambda context, x: x.clone())

    @staticmethod
    def backward(context, grad):
        raise RuntimeError("PTXAS error: unsupported sm_75\nmore")


@pytest.mark.parametrize(
    "change, remark",
    [
        (lambda x: x * 1.05, "not fused: "),
        (lambda x: x * torch.nan, "not fused: "),
        (WrongBackward.apply, "not fused: "),
        (FailingBackward.apply, "not fused: PTXAS error: unsupported sm_75"),
        # The rotary embedding has four dimensions, and the gate a size of its own.
        (lambda x: x * 1.05 if x.dim() == 4 else x, "not fused: "),
        (lambda x: x * 1.05 if x.shape[-1] == 48 else x, "fused but for Qwen2MLP"),
    ],
    ids=["wrong", "not a number", "wrong backward", "no backward", "rotary alone", "gate alone"],
)
def test_a_piece_that_is_wrong_is_not_trained_with(monkeypatch, change, remark):
    overlay, used = make_overlay(), []
    wanted = train_once(overlay)
    found = fuse(monkeypatch, overlay, lambda x: used.append(1) or change(x))
    assert found.startswith(remark) and used
    used.clear()
    assert same(train_once(overlay), wanted) and bool(used) == remark.startswith("fused")


def test_a_run_without_compile_undoes_what_an_earlier_one_fused(monkeypatch):
    """Rotary embedding is a function of the whole process, so the next model would use it too."""
    overlay, used = make_overlay(), []
    fuse(monkeypatch, make_overlay(), lambda output: used.append(1) or output)
    undo_fusing(overlay)  # fit_to_machine begins with this
    used.clear()
    train_once(overlay)
    assert not used


class ClampingMLP(Qwen2MLP):
    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=7.0), self.up_proj(x).clamp(-7.0, 7.0)
        return self.down_proj(self.act_fn(gate) * up)


class TwoArgumentMLP(Qwen2MLP):
    def forward(self, x, scale):
        raise AssertionError


class PlainRMSNorm(nn.Module):
    def forward(self, x):
        return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()


def clamp(body) -> None:
    for layer in body.layers:
        layer.mlp.__class__ = ClampingMLP
        layer.post_attention_layernorm.weight *= 4.0  # so that the limits are met


def add_unused_mlp(body) -> None:
    body.extra = TwoArgumentMLP(body.config)


def take_weights_from_norms(body) -> None:
    for layer in body.layers:
        layer.input_layernorm = PlainRMSNorm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "family, change",
    [
        ("bitnet", None),  # its MLP has a norm in between
        ("falcon_h1", None),  # its MLP multiplies
        ("doge", None),  # its attention needs a mask of its own
        ("qwen2_untied", clamp),
        ("qwen2_untied", add_unused_mlp),
        ("qwen2_untied", take_weights_from_norms),
    ],
)
def test_a_model_that_computes_something_else_is_trained_as_it_is(
    monkeypatch, family, change, dtype
):
    """The compiler is exact here, so a difference would come from a piece that was replaced."""
    overlay = make_overlay(family, dtype=dtype)
    if change:
        change(overlay.body)
    wanted = train_once(overlay)
    remark = fuse(monkeypatch, overlay, lambda output: output)
    assert same(train_once(overlay), wanted, rounding(dtype))
    # A module that wants two arguments cannot be tried, so nothing is fused. A mask is dropped for
    # the sake of CUDA graphs, and only bfloat16 becomes those. On transformers 5.0.0 Doge gives the
    # same without its mask, and may then be fused.
    if not (family == "doge" and dtype == torch.bfloat16):
        assert remark.startswith("not fused") == (change is add_unused_mlp)
    left_eager = {"bitnet": "BitNetMLP", "falcon_h1": "FalconH1MLP"}.get(family, "")
    assert remark.partition(" but for ")[2] == ("ClampingMLP" if change is clamp else left_eager)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_without_a_mask_is_the_same_to_the_bit(monkeypatch, family):
    """This holds in a CUDA graph, for which the library makes a dense mask, and in generation,
    which asks one token of a cache."""
    model, masks, real = make_model(family), [], nn.functional.scaled_dot_product_attention
    ids = torch.randint(0, FIRST_NEW_ID, (2, 24), generator=torch.Generator().manual_seed(0))
    wanted = model(input_ids=ids, use_cache=False).logits
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    settings = model.config.get_text_config()
    continued, kind = model.generate(ids[:1], **greedy), settings._attn_implementation
    attend_causally(model)
    causal = settings._attn_implementation == "causal_sdpa"
    has_window = getattr(settings, "sliding_window", None)
    assert causal == (kind == "sdpa" and not has_window)
    assert causal != family.startswith(("gemma", "mamba"))
    assert torch.equal(model.generate(ids[:1], **greedy), continued)

    def attention(*arguments, attn_mask=None, **keywords):
        masks.append(attn_mask)
        return real(*arguments, attn_mask=attn_mask, **keywords)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, wanted)
    if family != "opt" or transformers.__version__ >= "5":  # OPT made a mask of its own before
        assert not causal or masks == [None] * len(find_body(model)[1])


# ---- CUDA graphs ---------------------------------------------------------------------------------


def raising(error: Exception):
    def work(*_):
        raise error

    return work


def capture_as(monkeypatch, graphed_pass) -> StepPlan:
    """Capture with this in the place of GraphedPass, on a text without a new word; the plan."""
    monkeypatch.setattr(machine, "GraphedPass", graphed_pass)
    overlay, plan = make_overlay(), StepPlan(2, 0)
    batch = make_batch(overlay)
    ids = batch.x % FIRST_NEW_ID
    capture(plan, overlay, dataclasses.replace(batch, x=ids, all_ids=ids))
    return plan


@pytest.mark.parametrize("factor", [1.0, 2.0, math.nan])
def test_a_captured_pass_is_used_if_it_gives_what_the_eager_one_gives(monkeypatch, factor):
    """Gradients are compared too, although only new words have one."""

    def replay(overlay, *inputs) -> Tensor:
        losses = forward_backward(overlay, *inputs)
        overlay.input_grad *= factor
        return losses

    plan = capture_as(monkeypatch, lambda *_: replay)
    assert plan.graph is (replay if factor == 1.0 else None)
    wanted = "as CUDA graphs" if factor == 1.0 else "not as CUDA graphs: the pass differs"
    assert len(plan.remarks) == 1 and plan.remarks[0].startswith(wanted)


@pytest.mark.parametrize(
    "kind, text", [(torch.OutOfMemoryError, ""), (RuntimeError, "CUDA error: out of memory")]
)
def test_a_capture_without_memory_leaves_a_run_without_graphs(monkeypatch, kind, text):
    """Nothing of it stays: the error and the frames that it names hold each other, and with them
    the pass's tensors, until they are collected."""
    held = []

    def graphed_pass(*_):
        tensor = torch.zeros(9)
        held.append(weakref.ref(tensor))
        error = kind(text)
        raise error

    gc.disable()
    try:
        plan = capture_as(monkeypatch, graphed_pass)
        assert held[0]() is None
    finally:
        gc.enable()
    assert (plan.graph, plan.remarks) == (None, ["not as CUDA graphs: out of memory"])


def test_after_any_other_error_in_a_capture_nothing_can_go_on(monkeypatch):
    with pytest.raises(UserError) as error:
        capture_as(monkeypatch, raising(RuntimeError("not permitted\nwhen stream is capturing")))
    assert str(error.value) == (
        "the pass cannot become CUDA graphs; start again, in a notebook after a restart of its"
        " kernel, with compile: false (not permitted when stream is capturing)"
    )


def test_out_of_memory_in_a_capture_is_raised_after_its_end(monkeypatch):
    """An exception that leaves torch.cuda.graph would leave the allocator in capture mode."""
    ended = []

    @contextlib.contextmanager
    def graph(graph, pool):
        yield
        ended.append(True)

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(torch.OutOfMemoryError):
        GraphedPass.record(None, None, raising(torch.OutOfMemoryError()))
    assert ended


# ---- The fastest step that fits ------------------------------------------------------------------


@pytest.mark.parametrize(
    "gib_of, limit, options, micro_batch_size, num_kept, graphs_fit",
    [
        # 1.2 GiB stay free beside graphs, 0.5 without; what is left goes to layers of 0.1 GiB.
        (lambda size, kept: 10 + size / 5 + kept / 10, 16.0, {}, 16, 16, True),
        (lambda size, kept: 10 + size / 5 + kept / 10, 14.0, {}, 16, 3, False),
        (lambda size, kept: 10 + size / 5 + kept / 10, 14.0, {"use_graph": False}, 16, 3, False),
        (lambda size, kept: 10 + kept / 10, 78.0, {}, 16, 48, True),  # all of them
        (lambda size, kept: 10 + kept / 10, 10.55, {}, 16, 0, False),
        (lambda size, kept: 11.6 + kept / 10 if size <= 8 else None, 14.0, {}, 8, 12, True),
        # Four layers take less than the others: 14, 13 and 12 are tried and do not fit.
        (lambda size, kept: 10 + (0.2 if kept <= 4 else 0.25) * kept, 14.1, {}, 16, 11, True),
        (lambda size, kept: 10 + kept / 5 if kept <= 6 else None, 14.1, {}, 16, 6, True),
        (lambda size, kept: 10 if kept == 0 else None, 14.1, {}, 16, 0, True),
        # There are fewer layers than the four that are measured.
        (lambda size, kept: 10 + kept, 12.3, {"num_layers": 2}, 16, 1, True),
        # The config says which layers keep theirs.
        (lambda size, kept: 10 + kept / 10, 78.0, {"kept": 0}, 16, 0, True),
        (lambda size, kept: 10 + kept / 10, 14.0, {"kept": 48}, 16, 48, False),
    ],
)
def test_the_largest_micro_batch_and_as_many_layers_as_fit(
    gib_of, limit, options, micro_batch_size, num_kept, graphs_fit
):
    """gib_of (micro-batch, layers that keep their activations): a pass's peak, None if too much."""
    num_layers, kept = options.get("num_layers", 48), options.get("kept")
    plan, use_graph = StepPlan(16, num_layers - (kept or 0)), options.get("use_graph", True)

    def measure(size: int, num_recomputed: int) -> float | None:
        gib = gib_of(size, num_layers - num_recomputed)
        return gib and gib * GIB

    found = choose_plan(
        plan, [16, 8, 4, 2, 1], num_layers, measure, limit * GIB, use_graph, kept is not None
    )
    assert plan.micro_batch_size == micro_batch_size
    assert num_layers - plan.num_recomputed_layers == num_kept
    assert found == graphs_fit


@pytest.mark.parametrize("size, advice", [(1, "lower seq_len"), (4, "set a smaller one, or auto")])
def test_a_card_that_is_too_small(size, advice):
    with pytest.raises(UserError) as error:
        choose_plan(StepPlan(size, 48), [size], 48, lambda *_: None, 14 * GIB, True, False)
    assert str(error.value) == f"the GPU cannot hold micro_batch_size {size}; {advice}"


def test_a_cpu_takes_what_the_config_says():
    overlay = make_overlay()
    for changes, *wanted in (
        ({"effective_batch_size": 8}, 8, 0),
        ({"effective_batch_size": 8, "gradient_checkpointing": "true"}, 8, 2),
        # This process has 8 of 48 sequences, and takes what divides both numbers.
        ({"effective_batch_size": 48, "micro_batch_size": 12}, 4, 0),
    ):
        plan = fit_to_machine(overlay, [make_batch(overlay)] * 2, make_config(**changes), CPU)
        assert [plan.micro_batch_size, plan.num_recomputed_layers] == wanted


def test_an_evaluation_takes_fewer_sequences_where_the_graphs_leave_little_memory(monkeypatch):
    overlay, sizes = make_overlay(), []
    monkeypatch.setattr(machine, "fit_to_card", lambda *_: None)

    def loss(hidden, labels):
        sizes.append(len(labels))
        if len(labels) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(overlay, "loss", loss)
    worker = dataclasses.replace(CPU, device=torch.device("cuda"))
    config = make_config(effective_batch_size=8)
    plan = fit_to_machine(overlay, [make_batch(overlay)] * 2, config, worker)
    assert (plan.micro_batch_size, plan.eval_micro_batch_size, sizes) == (8, 2, [16, 8, 4])


# ---- Parked activations --------------------------------------------------------------------------


class InOrder:
    """Stands in for a stream: a CPU does one thing after another."""

    def wait_stream(self, stream) -> None: ...

    def wait_event(self, event) -> None: ...

    def record_event(self) -> object:
        return object()


@pytest.fixture
def no_streams(monkeypatch):
    """Let a Parking work on a CPU, and take tensors of the tiny models' size."""
    empty_like = torch.empty_like

    def on_the_cpu(tensor, **_):
        return empty_like(tensor)

    monkeypatch.setattr(torch, "empty_like", on_the_cpu)
    monkeypatch.setattr(torch.cuda, "Stream", InOrder)
    monkeypatch.setattr(torch.cuda, "current_stream", InOrder)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(machine, "PARKED_BYTES", 100)


@pytest.mark.parametrize(
    "carried, room, count, num_parked",
    [
        # Layers of 10 bytes with inputs of 2: 48 inputs are 96 bytes, and 8 more park a layer.
        (5.0, 2.0**40, 48, 18),  # (240 - 96) / 8
        (5.0, 2.0**40, 40, 18),  # (200 - 80) / 8, and three layers may be behind: 30 / 8
        (5.0, 2.0**40, 46, 18),  # (230 - 92) / 8, and the time of two more layers carries 10 / 8
        (50.0, 2.0**40, 48, 48),
        (1.9, 2.0**40, 48, 0),  # the bus does not even carry the inputs
        (5.0, 180.0, 48, 10),  # (180 - 96) / 8
        (5.0, 99.0, 48, 0),
        (5.0, 0.0, 48, 0),  # max_host_gib: 0
        (5.0, -1e9, 48, 0),  # the host is full already
    ],
)
def test_as_many_layers_are_parked_as_bus_and_host_take(
    no_streams, carried, room, count, num_parked
):
    overlay = SimpleNamespace(layers=range(48), body=nn.Linear(1, 1))
    assert Parking(overlay, (10.0, 2.0, carried), room).takes(count) == num_parked


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("parked", [[0, 1], [0], []])
@pytest.mark.parametrize("room", [2**16, 2**20])
def test_parked_layers_give_the_same_bits(monkeypatch, no_streams, fused, parked, room):
    """With little room most tensors find no place, and stay where they are."""
    overlay, plan = make_overlay(), StepPlan(8, 0)
    if fused:
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        machine.fuse_elementwise(overlay)
    wanted = take_step(overlay, plan)
    parking = Parking(overlay, (2.0**30, 0.0, 2.0**30), room=0)
    parking.takes, parking.host = lambda count: len(parked), machine.host_memory(room)
    recompute_layers(overlay.layers, 2, parking)
    for _ in range(2):
        assert same(take_step(overlay, plan), wanted)
    assert parking.used <= room
    weights = {weight.shape for weight in overlay.body.parameters()}
    on_host = [tensor for layer in parking.layers for tensor in layer.on_host]
    for shape in (tensor.shape for tensor in on_host):  # they are on the card anyway
        assert shape not in weights and shape[::-1] not in weights
    assert all(tensor.nbytes >= machine.PARKED_BYTES for tensor in on_host)
    if room == 2**20:  # a recomputed layer parks its input
        kinds = [len(layer.on_host) > 1 for layer in parking.layers]
        assert kinds == [number in parked for number in range(2)]
    assert all(tensor is None for layer in parking.layers for tensor in layer.on_card or [])
    with torch.no_grad():  # an evaluation parks nothing
        parking.layers = None
        overlay.body(inputs_embeds=torch.zeros(1, 4, 32), use_cache=False)


@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_pass_that_breaks_off_leaves_nothing_of_a_parking(no_streams, place):
    """1, 2: in the forward pass of a layer; 3: while layer 1 is recomputed."""
    overlay, calls = make_overlay(), []
    parking = Parking(overlay, (12_001.0, 6_000.0, 9_001.0), 2.0**20)
    assert parking.takes(2) == 1
    recompute_layers(overlay.layers, 2, parking)

    def full(*_):
        calls.append(1)
        if len(calls) == place:
            raise torch.OutOfMemoryError("CUDA out of memory")

    overlay.body.layers[0].mlp.act_fn = overlay.body.layers[1].mlp.act_fn = nn.SiLU()
    overlay.body.layers[0].mlp.act_fn.register_forward_hook(full)
    peak, left = measure_peak_of(overlay, parking), weakref.ref(parking)
    assert peak is None
    del parking
    recompute_layers(overlay.layers, 2)
    gc.collect()
    assert left() is None


def measure_peak_of(overlay: WakeOverlay, parking: Parking) -> int | None:
    return measure_peak(overlay, make_batch(overlay), 2, 2, parking)


def test_pinned_memory_is_unpinned_when_it_is_collected(monkeypatch):
    pinned, cuda = set(), SimpleNamespace(cudaHostUnregister=lambda place: pinned.remove(place))
    cuda.cudaHostRegister = lambda place, size, flags: pinned.add(place) or size - 1000
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "check_error", lambda number: number and 1 / 0)
    assert machine.host_memory(1000).nbytes == 1000 and not pinned  # without a GPU
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert machine.host_memory(0).nbytes == 0 and not pinned
    memory = machine.host_memory(1000)
    assert memory.nbytes == 1000 and pinned == {memory.data_ptr()}
    del memory
    gc.collect()
    assert not pinned


def test_a_second_save_is_copied_to_the_memory_of_the_first():
    rows, buffers = {"rows": torch.randn(5, 3), "step": torch.tensor(7)}, {}
    first = host_copies(rows, buffers)
    assert all(torch.equal(first[name], rows[name]) for name in rows)
    rows["rows"] += 1
    assert not torch.equal(first["rows"], rows["rows"])  # training goes on
    again = host_copies(rows, buffers)
    assert torch.equal(again["rows"], rows["rows"])
    assert [again[name].data_ptr() for name in rows] == [first[name].data_ptr() for name in rows]
    assert {name: buffer.nbytes for name, buffer in buffers.items()} == {"rows": 60, "step": 8}


def test_a_host_that_cannot_pin_memory_parks_nothing(monkeypatch, no_streams):
    def full(size):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(machine, "host_memory", full)
    monkeypatch.setattr(machine, "bus_bytes", lambda *_: 1e9)
    overlay, plan = make_overlay(), StepPlan(2, 2)
    config = make_config(compile="false")
    assert machine.find_parking(plan, overlay, make_batch(overlay), config) is None
    assert plan.remarks == ["nothing parked: CUDA error: out of memory"]


@pytest.mark.parametrize("output_rows, num_sets", [("shared", 1), ("separate", 2)])
@pytest.mark.parametrize(
    "num_processes, max_host_gib, room", [("1", None, 3000), ("3", None, 1000), ("1", 2e-6, 2147)]
)
def test_parked_activations_leave_the_host_its_saves(
    monkeypatch, output_rows, num_sets, num_processes, max_host_gib, room
):
    """A save holds each row set once, and 2 GiB stay free."""
    overlay, found = make_overlay(output_rows=output_rows), []
    available = 2 * GIB + num_sets * overlay.input_rows.nbytes + 3000
    memory = SimpleNamespace(available=available)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr(machine, "bus_bytes", lambda *_: 1e9)
    monkeypatch.setattr(machine, "Parking", lambda overlay, sizes, room: found.append(room))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", num_processes)
    config = make_config(compile="false", max_host_gib=max_host_gib)
    machine.find_parking(StepPlan(2, 2), overlay, make_batch(overlay), config)
    assert int(found[0]) == room


def test_without_room_on_the_host_the_bus_is_not_measured(monkeypatch):
    monkeypatch.setattr(machine, "bus_bytes", None)
    overlay, plan = make_overlay(), StepPlan(2, 2)
    config = make_config(compile="false", max_host_gib=0.0)
    assert machine.find_parking(plan, overlay, make_batch(overlay), config) is None
    assert plan.remarks == []


def test_a_recomputed_layer_dequantizes_its_matrices_twice(monkeypatch):
    """All but the last one, which nothing needs again: six and one in each of two layers."""
    functional = pytest.importorskip("bitsandbytes.functional")
    from bitsandbytes.nn import Linear4bit, Params4bit

    overlay, calls, real = make_overlay(), [], functional.dequantize_4bit
    for name, module in list(overlay.body.layers.named_modules()):
        if isinstance(module, nn.Linear):
            has_bias, shape = module.bias is not None, (module.in_features, module.out_features)
            nf4 = Linear4bit(*shape, has_bias, torch.float32, quant_type="nf4")
            nf4.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            nf4.bias = module.bias
            overlay.body.layers.set_submodule(name, nf4.to("cpu"))
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *a: (calls.append(1), real(*a))[1])
    wanted = take_step(overlay, StepPlan(8, 0))
    alone = len(calls) // 14  # bitsandbytes itself: in backward, and in old versions in forward
    calls.clear()
    recompute_layers(overlay.layers, 2)
    assert same(take_step(overlay, StepPlan(8, 2)), wanted)
    assert len(calls) == 2 * (6 + 6 + alone) and alone in (1, 2)


# ---- Out of memory -------------------------------------------------------------------------------


def hold_at_most(overlay: WakeOverlay, num_sequences: int) -> list[int]:
    """Have larger passes run out of memory after their loss -> the sizes of all that are tried."""
    real, sizes = overlay.loss, []

    def loss(hidden_states, *arguments):
        sizes.append(len(hidden_states))
        result = real(hidden_states, *arguments)
        if len(hidden_states) > num_sequences:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    overlay.loss = loss
    return sizes


def test_the_peak_is_that_of_a_real_pass():
    overlay, calls = make_overlay(), []
    batch, sizes = make_batch(overlay), hold_at_most(overlay, 2)
    overlay.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    assert measure_peak(overlay, batch, 2, 1) == 0  # a CPU's allocator tells nothing
    assert sizes == [2] and len(calls) == 2  # layer 0 is recomputed
    assert measure_peak(overlay, batch, 4, 1) is None


def take_step(overlay: WakeOverlay, plan: StepPlan, worker=CPU) -> list[Tensor]:
    """Run a step -> its loss, and both sides' gradients."""
    batch = make_batch(overlay)
    total, following = run_step(plan, batch, overlay, worker, LossScale(), lambda: "next")
    assert following == "next"
    return [total, overlay.input_grad.clone(), overlay.grad.clone()]


def test_out_of_memory_halves_the_micro_batch_and_repeats_the_step(capsys):
    wanted = take_step(make_overlay(), StepPlan(2, 0))
    overlay, plan = make_overlay(), StepPlan(8, 0)
    sizes = hold_at_most(overlay, 2)
    assert same(take_step(overlay, plan), wanted)
    assert sizes == [8, 4, 2, 2, 2, 2] and plan.num_recomputed_layers == 2
    assert plan.micro_batch_size == plan.eval_micro_batch_size == 2
    line = "step 1: out of GPU memory; repeated with micro_batch_size {} and all layers recomputed"
    assert capsys.readouterr().out.splitlines() == [line.format(4), line.format(2)]


def test_out_of_memory_lets_the_graphs_go():
    errors = iter([torch.OutOfMemoryError(), AssertionError()])
    plan = StepPlan(8, 2, graph=lambda *_: raising(next(errors))(), captured_peak_bytes=9)
    assert same(take_step(make_overlay(), plan), take_step(make_overlay(), StepPlan(4, 0)))
    assert (plan.graph, plan.captured_peak_bytes) == (None, 0)


def test_out_of_memory_gives_back_the_host_memory_of_parked_layers(no_streams):
    overlay = make_overlay()
    parking = Parking(overlay, (12_001.0, 6_000.0, 1e9), 2.0**20)
    plan, held = StepPlan(8, 2, parking=parking), weakref.ref(parking)
    recompute_layers(overlay.layers, 2, parking)
    del parking
    hold_at_most(overlay, 4)
    take_step(overlay, plan)
    gc.collect()
    assert plan.micro_batch_size == 4 and held() is None


CANNOT_SHRINK = (
    "step 1: out of GPU memory with micro_batch_size 1 and all layers recomputed; what is saved is"
    " whole: free the GPU, or start over with --fresh and a lower seq_len"
)
OF_TWO = "step 1: process 0 is out of GPU memory with micro_batch_size 8; set a smaller one"


@pytest.mark.parametrize("size, world_size, line", [(1, 1, CANNOT_SHRINK), (8, 2, OF_TWO)])
def test_out_of_memory_ends_a_run_that_cannot_shrink(size, world_size, line):
    overlay = make_overlay()
    sizes = hold_at_most(overlay, 0)
    with pytest.raises(UserError) as error:
        take_step(overlay, StepPlan(size, 0), dataclasses.replace(CPU, world_size=world_size))
    assert str(error.value) == line
    assert sizes == ([1, 1] if world_size == 1 else [8])  # once more with all layers recomputed


def test_a_full_disk_a_quota_and_a_read_only_disk_are_one_line_and_other_errors_are_not():
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
        kind = OSError if number == errno.EIO else UserError
        with pytest.raises(kind) as caught, known_errors_in_one_line("runs/a", CPU):
            raise OSError(number, os.strerror(number))
        said = str(caught.value).removeprefix("runs/a: ").partition(";")[0]
        assert said == f"[Errno {number}] {os.strerror(number)}"


def test_out_of_memory_elsewhere_is_one_line():
    with pytest.raises(UserError) as error, known_errors_in_one_line("runs/a", CPU):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    assert str(error.value) == (
        "out of GPU memory; what is saved is whole: free the GPU, or continue with a smaller"
        " micro_batch_size (CUDA out of memory. Tried to allocate 2 GiB)"
    )


def test_out_of_memory_in_an_evaluation_repeats_it_without_graphs(
    quick, tmp_path, monkeypatch, capsys
):
    config = Config(**tiny_settings(tmp_path, prompts=["the glimock saw"]))
    real_sample, real_fit, tries, steps = train.sample, train.fit_to_machine, [], []

    def sample(*parts):
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError
        return real_sample(*parts)

    def fit_to_machine(overlay, batches, *rest):
        steps.extend(batch.step for batch in batches)
        return dataclasses.replace(real_fit(overlay, batches, *rest), graph=raising(AssertionError))

    monkeypatch.setattr(train, "sample", sample)
    monkeypatch.setattr(train, "fit_to_machine", fit_to_machine)
    assert train.train(config)["step"] == 8
    assert steps == [1, 2]  # in training too the next step's rows lie beside a step's
    assert capsys.readouterr().out.count("out of GPU memory") == 1
    records = Path(config.run_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kinds = [(record["step"], record["kind"]) for record in map(json.loads, records)]
    assert len(kinds) == len(set(kinds)) == 8 + 3  # nothing is recorded twice


def test_the_next_step_is_prepared_once_before_the_last_backward():
    """A GPU then still has the forward pass to work off."""
    overlay, order = make_overlay(), []
    overlay.layers[0].register_full_backward_hook(lambda *_: order.append("backward"))
    batch, plan = make_batch(overlay), StepPlan(3, 0)
    run_step(plan, batch, overlay, CPU, LossScale(), lambda: order.append("next"))
    assert order == ["backward", "backward", "next", "backward"]
