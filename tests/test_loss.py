"""Proves the chunked loss against float64, and that a float16 overflow loses and repeats nothing.

    python -m pytest tests/test_loss.py

The truth is the docstring's formula in float64; "plain" is the same formula in the working dtype,
through the library's cross entropy and autograd. The chunked loss may be no worse than plain.
"""

import math
import types
import weakref

import pytest
import torch
from tiny_models import CPU, make_batch, make_overlay
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import overlay as overlay_module
from machine import StepPlan, accumulate
from overlay import (
    FLOAT16_LOSS_SCALE, PLAIN_HEAD, HeadFormula, LossScale, chunked_cross_entropy, forward_backward,
)  # fmt: skip

HIDDEN_SIZE = 16
PADDING_ROWS = 9


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Make every boundary be met: 8 positions a chunk, 16 a group, 10 rows a block."""
    monkeypatch.setattr(overlay_module, "LOSS_CHUNK_POSITIONS", 8)
    monkeypatch.setattr(overlay_module, "LOSS_GROUP_POSITIONS", 16)
    monkeypatch.setattr(overlay_module, "ROW_BLOCK", 10)


def make_inputs(num_base: int, num_new: int, num_positions: int, dtype=torch.float32) -> dict:
    """Make random arguments; the table has padding rows of size 100, some labels are ignored."""
    generator = torch.Generator().manual_seed(num_base + 7 * num_new + 13 * num_positions)
    base_rows = torch.randn(num_base + PADDING_ROWS, HIDDEN_SIZE, generator=generator)
    base_rows[num_base:] = 100.0
    labels = torch.randint(num_base + num_new, (num_positions,), generator=generator)
    labels[2::7] = -100
    labels[4::11] = -1
    return {
        "hidden_states": torch.randn(num_positions, HIDDEN_SIZE, generator=generator).to(dtype),
        "labels": labels,
        "base_rows": base_rows.to(dtype),
        "first_new_id": num_base,
        "new_rows": torch.randn(num_new, HIDDEN_SIZE, generator=generator),
    }


def formula(inputs: dict, dtype: torch.dtype, head: HeadFormula, scale: float):
    """Give losses, d hidden and d new rows of scale * losses.sum(), by autograd in `dtype`."""
    hidden = inputs["hidden_states"].to(dtype).requires_grad_()
    new_rows = inputs["new_rows"].detach().clone().requires_grad_()
    base_rows = inputs["base_rows"][: inputs["first_new_id"]].to(dtype)
    logits = torch.cat([hidden @ base_rows.T, hidden @ new_rows.to(dtype).T], dim=1)
    logits = logits if dtype == torch.float64 else logits.float()
    if head.bias is not None:
        num_base, num_new = len(base_rows), len(new_rows)
        logits = logits + torch.cat([head.bias[:num_base].to(dtype), torch.zeros(num_new)])
    logits = head.scale * logits
    logits = head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits
    labels = inputs["labels"].clamp(min=-1)
    losses = functional.cross_entropy(logits, labels, reduction="none", ignore_index=-1)
    (scale * losses.sum()).backward()
    return losses.detach(), hidden.grad, new_rows.grad


def error(found: Tensor, truth: Tensor) -> float:
    """Give the largest error relative to the largest entry."""
    assert found.shape == truth.shape and found.isfinite().all()
    largest = truth.abs().max().item() if truth.numel() else 0.0
    return (found.double() - truth).abs().max().item() / largest if largest else 0.0


# The tolerance is a few roundings in fp32, and in bf16 one of d(logits), which both methods make.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize(
    "logit_scale, softcap, has_bias",
    [(1.0, None, False), (1.0, 3.0, False), (0.125, None, False), (0.25, 3.0, True)],
)
@pytest.mark.parametrize("num_positions", [1, 8, 16, 37])
@pytest.mark.parametrize("num_base, num_new", [(5, 0), (64, 1), (130, 10), (70, 33)])
def test_losses_and_gradients_are_no_worse_than_plain(
    num_base, num_new, num_positions, logit_scale, softcap, has_bias, dtype, tolerance
):
    inputs, scale = make_inputs(num_base, num_new, num_positions, dtype), 0.37
    generator = torch.Generator().manual_seed(5)
    bias = torch.randn(num_base + PADDING_ROWS, generator=generator) if has_bias else None
    head = HeadFormula(logit_scale, softcap, bias)
    truth = formula(inputs, torch.float64, head, scale)
    plain = formula(inputs, dtype, head, scale)
    rows_grad = torch.zeros(num_new, HIDDEN_SIZE)
    losses, grad = chunked_cross_entropy(
        **inputs, new_rows_grad=rows_grad, scale=scale, formula=head
    )
    assert losses.dtype == grad.dtype == torch.float32
    for ours, theirs, true in zip((losses, grad, rows_grad), plain, truth):
        assert error(ours, true.double()) <= error(theirs, true.double()) + tolerance
    ignored = inputs["labels"] < 0
    assert (losses[ignored] == 0).all() and (grad[ignored] == 0).all()


def test_without_scale_there_is_no_gradient_and_the_same_loss():
    inputs = make_inputs(70, 33, 37)
    losses, grad = chunked_cross_entropy(**inputs)
    assert grad is None
    assert torch.equal(losses, chunked_cross_entropy(**inputs, scale=1.0)[0])


def test_without_new_rows_it_is_the_base_models_loss():
    inputs = make_inputs(130, 0, 37)
    truth = formula(inputs, torch.float64, PLAIN_HEAD, 1.0)
    losses, grad = chunked_cross_entropy(**{**inputs, "new_rows": None}, scale=1.0)
    assert error(losses, truth[0]) <= 1e-6 and error(grad, truth[1].double()) <= 1e-6


def test_row_gradients_are_added_to_what_is_there():
    inputs = make_inputs(64, 33, 20)
    first, again = torch.zeros(33, HIDDEN_SIZE), torch.full((33, HIDDEN_SIZE), 2.0)
    for rows_grad in (first, again):
        chunked_cross_entropy(**inputs, new_rows_grad=rows_grad, scale=1.0)
    torch.testing.assert_close(again, first + 2.0)


@pytest.mark.parametrize("num_base, num_new", [(5, 0), (64, 1), (130, 37), (1024, 400)])
def test_uniform_logits_give_the_logarithm_of_the_vocabulary_exactly(num_base, num_new):
    inputs = make_inputs(num_base, num_new, 20)
    inputs["hidden_states"].zero_()
    inputs["labels"].clamp_(min=0)
    losses, _ = chunked_cross_entropy(**inputs)
    assert torch.equal(losses, torch.tensor(float(num_base + num_new)).log().expand(20))


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_stay_finite_and_right(size):
    inputs = make_inputs(64, 33, 20)
    inputs["hidden_states"] *= size
    truth = formula(inputs, torch.float64, PLAIN_HEAD, 1.0)
    rows_grad = torch.zeros(33, HIDDEN_SIZE)
    losses, grad = chunked_cross_entropy(**inputs, new_rows_grad=rows_grad, scale=1.0)
    for ours, true in zip((losses, grad, rows_grad), truth):
        assert error(ours, true.double()) <= 1e-6


class Largest(TorchDispatchMode):
    """This records how many elements the largest tensor that any operation returned has."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        old = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            # A view of an argument holds no memory of its own.
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in old:
                self.num_elements = max(self.num_elements, tensor.numel())
        return out


def test_the_full_logits_are_never_made():
    num_base, num_new, num_positions = 500, 60, 200
    inputs = make_inputs(num_base, num_new, num_positions)
    with Largest() as plain:
        formula(inputs, torch.float32, PLAIN_HEAD, 1.0)
    assert plain.num_elements == num_positions * (num_base + num_new)
    with Largest() as ours:
        chunked_cross_entropy(
            **inputs,
            new_rows_grad=torch.zeros(num_new, HIDDEN_SIZE),
            scale=1.0,
            formula=HeadFormula(softcap=5.0),
        )
    # The largest is a chunk of 8 over the base rows, 500 and 9 of padding, or all gradients.
    assert ours.num_elements == max(8 * (num_base + PADDING_ROWS), num_positions * HIDDEN_SIZE)


def test_the_logits_of_one_chunk_and_of_one_group_are_there_at_a_time(monkeypatch):
    """50 positions: four groups, the last one short, and seven chunks."""
    made, num_base = {"base": [], "new": []}, 500
    real_add, real_product = overlay_module.add_gradients_of_new_rows_, overlay_module.matmul_fp32

    def watched(kind: str, tensor: Tensor) -> Tensor:
        assert not any(reference() is not None for reference in made[kind])
        made[kind].append(weakref.ref(tensor))
        return tensor

    def add_gradients(d_new: Tensor, *arguments) -> None:
        real_add(watched("new", d_new), *arguments)

    def product(a: Tensor, b: Tensor) -> Tensor:
        result = real_product(a, b)
        return watched("base", result) if b.shape[1] == num_base + PADDING_ROWS else result

    monkeypatch.setattr(overlay_module, "add_gradients_of_new_rows_", add_gradients)
    monkeypatch.setattr(overlay_module, "matmul_fp32", product)
    rows_grad = torch.zeros(60, HIDDEN_SIZE)
    inputs = make_inputs(num_base, 60, 50)
    chunked_cross_entropy(**inputs, new_rows_grad=rows_grad, scale=1.0)
    assert (len(made["base"]), len(made["new"])) == (7, 4)


# ---- float16 -------------------------------------------------------------------------------------


class Stub:
    """This overlay's body is `64 * x` in float16, and its loss gradient is 2**-5 everywhere.

    Backward holds 2**-5 x loss scale x 64, which overflows float16 from a loss scale of 32,768 on.
    """

    def __init__(self):
        self.num_bodies = self.num_losses = 0
        self.added = []

    def embed(self, x: Tensor, base_embeds: Tensor) -> Tensor:
        return base_embeds

    def body(self, inputs_embeds: Tensor, use_cache: bool):
        self.num_bodies += 1
        return types.SimpleNamespace(last_hidden_state=64 * inputs_embeds)

    def loss(self, hidden_states: Tensor, y: Tensor, scale: float):
        self.num_losses += 1
        return torch.ones(y.shape), torch.full(hidden_states.shape, 2.0**-5)

    def add_input_gradient(self, x: Tensor, grad: Tensor) -> None:
        self.added.append(grad)


def test_float16_overflow_halves_the_scale_and_repeats_the_pass():
    stub, scale = Stub(), LossScale(65536.0, good_steps=7)
    x = torch.zeros(1, 3, dtype=torch.int64)
    calls = []
    forward_backward(
        stub, x, x, torch.ones(1, 3, 2, dtype=torch.float16), 1.0, scale, lambda: calls.append(1)
    )
    assert (stub.num_bodies, stub.num_losses, len(stub.added), len(calls)) == (3, 1, 1, 1)
    assert scale == LossScale(16384.0, good_steps=0)  # quartered: two overflows
    assert torch.equal(stub.added[0], torch.full((1, 3, 2), 2.0))  # 64 x 2**-5, unscaled


def test_without_overflow_there_is_one_pass_and_the_scale_stays():
    stub, scale = Stub(), LossScale(16384.0, good_steps=7)
    x = torch.zeros(1, 3, dtype=torch.int64)
    forward_backward(stub, x, x, torch.ones(1, 3, 2, dtype=torch.float16), 1.0, scale)
    assert (stub.num_bodies, stub.num_losses) == (1, 1)
    assert scale == LossScale(16384.0, good_steps=7)


def test_what_is_not_finite_before_backward_is_not_tried_again():
    """No scale can help, so there is one pass, and the loop then stops at the loss."""
    stub, scale = Stub(), LossScale(65536.0)
    x = torch.zeros(1, 3, dtype=torch.int64)
    nan = torch.full((1, 3), torch.nan), torch.full((1, 3, 2), torch.nan)
    stub.loss = lambda *_: nan
    forward_backward(stub, x, x, torch.ones(1, 3, 2, dtype=torch.float16), 1.0, scale)
    assert (stub.num_bodies, scale.value) == (1, 65536.0)


@pytest.mark.parametrize("start, doublings", [(16384.0, 2), (1.0, 16)])
def test_the_scale_grows_back_after_200_good_steps_and_no_further_than_its_start(start, doublings):
    scale, values = LossScale(start), []
    for _ in range(200 * (doublings + 3)):
        scale.step_done()
        values.append(scale.value)
    assert values[198::200] == [min(start * 2**n, 65536.0) for n in range(doublings + 3)]
    assert scale.value == FLOAT16_LOSS_SCALE == 65536.0


def test_a_lower_scale_of_another_process_is_taken_and_a_higher_one_is_not():
    scale = LossScale(1024.0, good_steps=7)
    scale.agree(1024.0)
    assert scale == LossScale(1024.0, good_steps=7)
    scale.agree(512.0)
    assert scale == LossScale(512.0, good_steps=0)


def test_a_float16_step_counts_each_micro_batch_once_whatever_overflows():
    """A scale that overflows many times gives a model the gradients of one that never does."""
    found = {}
    for start in (2.0**40, 1024.0):
        overlay, scale = make_overlay(dtype=torch.float16), LossScale(start)
        plan, batch = StepPlan(2, 0), make_batch(overlay, size=4, seq_len=15)
        total, _ = accumulate(plan, batch, overlay, CPU, scale, prepare_next=lambda: None)
        assert (scale.value < start) == (start == 2.0**40)
        assert math.log2(scale.value).is_integer()
        found[start] = total, overlay.grad, overlay.input_grad
    (loss, output, inputs), (loss2, output2, inputs2) = found.values()
    assert torch.equal(loss, loss2) and torch.equal(output, output2)
    assert inputs.isfinite().all()
    # float16 keeps 11 bits, and its smallest numbers round differently at another scale.
    assert error(inputs, inputs2.double()) <= 2**-9


def test_float16_gradients_keep_small_softmax_entries():
    """float16 alone would keep entries of 1e-6 to 3 %: they are below its normal numbers, 6e-5."""
    inputs = make_inputs(300, 96, 16, torch.float16)
    inputs["hidden_states"] *= 0.01
    inputs["hidden_states"][:, 0] = 4.0
    inputs["base_rows"][:, 0] = inputs["new_rows"][:, 0] = 0.0
    inputs["base_rows"][0, 0] = 3.45  # a token that has nearly all the probability: e**13.8
    scale = 1 / 2048
    truth = formula(inputs, torch.float64, PLAIN_HEAD, scale)
    rows_grad = torch.zeros(96, HIDDEN_SIZE)
    _, grad = chunked_cross_entropy(**inputs, new_rows_grad=rows_grad, scale=scale)
    assert error(grad, truth[1].double()) <= 2**-8
    # Rows that are no target have only small entries, and are judged by their own size.
    no_target = torch.ones(96, dtype=torch.bool)
    no_target[inputs["labels"][inputs["labels"] >= 300] - 300] = False
    assert truth[2][no_target].abs().max() < 1e-7
    assert error(rows_grad[no_target], truth[2][no_target].double()) <= 2**-9
