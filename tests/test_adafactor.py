"""Proves that our Adafactor is transformers' Adafactor, and a whole run the same in plain PyTorch.

python -m pytest tests/test_adafactor.py
"""

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    FIRST_NEW_ID, full_table_model, make_model, random_rows, save_model, write_words,
)  # fmt: skip
from torch import Tensor, nn
from transformers.optimization import Adafactor

import train
from extend_tokenizer import Config
from overlay import WakeOverlay

SETTINGS = {
    "eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": None,
    "weight_decay": 0.0, "scale_parameter": False, "relative_step": False, "warmup_init": False,
}  # fmt: skip
NUM_STEPS = 20


def library_rows(rows: Tensor, grads: list[Tensor], learning_rates: list[float]) -> nn.Parameter:
    """What transformers' Adafactor makes of the same gradients."""
    parameter = nn.Parameter(rows.clone())
    optimizer = Adafactor([parameter], lr=1.0, **SETTINGS)
    for grad, learning_rate in zip(grads, learning_rates):
        optimizer.param_groups[0]["lr"] = learning_rate
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach()


def zero_statistics(num_rows: int, hidden_size: int) -> dict[str, Tensor]:
    return {"row": torch.zeros(num_rows), "column": torch.zeros(hidden_size)}


def assert_same_path(ours: Tensor, theirs: Tensor, start: Tensor) -> None:
    """Equal to 1e-6 of the way that the rows went, beside fp32's own rounding of the rows."""
    moved = (theirs - start).abs().max()
    assert moved > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * moved.item())


def make_gradients(num_rows: int, hidden_size: int, share: float) -> list[Tensor]:
    """Sizes from 1e-5 to 300, by row, column and step; `share` of the rows have one in a step."""
    generator = torch.Generator().manual_seed(num_rows)
    row_size = 10 ** (torch.rand(num_rows, 1, generator=generator) * 4 - 4)
    column_size = 10 ** (torch.rand(hidden_size, generator=generator) * 2 - 1)
    grads = []
    for step in range(NUM_STEPS):
        grad = torch.randn(num_rows, hidden_size, generator=generator) * row_size * column_size
        grads.append(
            grad * (torch.rand(num_rows, 1, generator=generator) < share) * 3 ** (step % 4)
        )
    return grads


# 4,096 rows are a block
@pytest.mark.parametrize("touched_only", [False, True])
@pytest.mark.parametrize("num_rows, share", [(37, 1.0), (37, 0.3), (5000, 0.9), (9000, 0.5)])
def test_twenty_steps_equal_transformers_adafactor(num_rows, share, touched_only):
    start = torch.zeros(num_rows, 6)  # so that the rows are the sum of the updates
    grads = make_gradients(num_rows, 6, share)
    learning_rates = [5e-4 * (step + 1) for step in range(NUM_STEPS)]
    rows, statistics = start.clone(), zero_statistics(num_rows, 6)
    for i, grad in enumerate(grads):
        touched = grad.abs().sum(dim=1).nonzero().flatten() if touched_only else None
        part = grad[touched] if touched_only else grad
        train.adafactor_update(rows, part, statistics, i + 1, learning_rates[i], touched=touched)
    assert_same_path(rows, library_rows(start, grads, learning_rates), start)
    never = torch.stack(grads).abs().sum(dim=(0, 2)) == 0
    assert torch.equal(rows[never], start[never])


@pytest.mark.parametrize("touched_only", [False, True])
def test_grad_scale_is_a_factor_of_the_gradient(touched_only):
    start, grads = torch.zeros(37, 6), make_gradients(37, 6, 1.0)
    scales = [0.5 ** (step % 5) for step in range(NUM_STEPS)]
    rows, statistics = start.clone(), zero_statistics(37, 6)
    for step, (grad, scale) in enumerate(zip(grads, scales), 1):
        before = grad.clone()
        touched = torch.arange(37) if touched_only else None
        train.adafactor_update(rows, grad, statistics, step, 1e-3, scale, touched)
        assert torch.equal(grad, before)
    scaled = [grad * scale for grad, scale in zip(grads, scales)]
    assert_same_path(rows, library_rows(start, scaled, [1e-3] * NUM_STEPS), start)


def test_a_step_in_which_no_row_was_used_moves_nothing():
    rows, statistics = torch.ones(5, 3), zero_statistics(5, 3)
    none = torch.empty(0, dtype=torch.int64)
    train.adafactor_update(rows, torch.empty(0, 3), statistics, 1, 1e-3, touched=none)
    assert torch.equal(rows, torch.ones(5, 3))
    grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    train.adafactor_update(rows, grad, statistics, 2, 1e-3)
    expected = library_rows(torch.ones(5, 3), [torch.zeros(5, 3), grad], [1e-3, 1e-3])
    assert_same_path(rows, expected, torch.ones(5, 3))


# ------------------------------------------------------------------------------------------------
# Whole steps
# ------------------------------------------------------------------------------------------------

CASES = ["separate", "shared", "frozen"]


def plain_training(model, words_rows, numbers_of_steps, data, config, mode) -> dict[str, Tensor]:
    """The same run with none of our code but the data: full tables, autograd, library parts.

    Gradients of the base rows are dropped before clipping, because these rows are frozen.
    """
    input_rows, output_rows = words_rows
    full = full_table_model(model, FIRST_NEW_ID, input_rows, output_rows).requires_grad_(True)
    tables = {"input_rows": full.model.embed_tokens.weight}
    if mode == "separate":
        tables["output_rows"] = full.lm_head.weight
    rows = {n: nn.Parameter(table[FIRST_NEW_ID:].detach().clone()) for n, table in tables.items()}
    optimizer = Adafactor(rows.values(), lr=1.0, **SETTINGS)
    for step, numbers in enumerate(numbers_of_steps, 1):
        places = numbers[:, None] * config.seq_len + torch.arange(config.seq_len)
        full.zero_grad()
        logits = full(input_ids=data.train[places]).logits
        targets = data.train[places + 1].flatten()
        nn.functional.cross_entropy(logits.flatten(0, 1), targets).backward()
        for name, table in tables.items():
            rows[name].grad = table.grad[FIRST_NEW_ID:].clone()
        norm = nn.utils.clip_grad_norm_(rows.values(), config.max_grad_norm)
        assert norm > config.max_grad_norm  # or clipping would not be tried
        # warm-up over half of the steps, then cosine: 4 steps
        optimizer.param_groups[0]["lr"] = config.learning_rate * (0.5, 1.0, 0.5, 0.0)[step - 1]
        optimizer.step()
        with torch.no_grad():
            for name, table in tables.items():
                table[FIRST_NEW_ID:] = rows[name]
    return {name: parameter.detach() for name, parameter in rows.items()}


@pytest.mark.parametrize("mode", CASES)
def test_a_run_equals_the_same_run_in_plain_pytorch(mode, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "plot_losses", lambda *_: None)
    family = "qwen2_tied" if mode == "shared" else "qwen2_untied"
    config = Config(
        model_name=str(save_model(family, tmp_path / "model")), quantization="none", device="cpu",
        **write_words(tmp_path), run_dir=str(tmp_path / "run"), output_rows=mode, seq_len=16,
        effective_batch_size=4, micro_batch_size=2, max_steps=4, warmup_ratio=0.5,
        max_grad_norm=0.01, learning_rate=0.02, save_every=1, snapshot_every=1, keep_sentries=4,
        eval_every=4,
    )  # fmt: skip
    train.train(config)
    words = train.plan_new_words(config)
    data = train.load_data(config, words)
    model = make_model(family)
    tables = [model.model.embed_tokens.weight, model.lm_head.weight]
    start = [torch.stack([t[ids].mean(dim=0) for ids in words.spellings]) for t in tables]
    start = start[0], None if mode == "shared" else start[1]
    count = data.num_sequences(data.train, config.seq_len)
    numbers = [train.step_sequence_numbers(step, 4, count, config.seed) for step in range(1, 5)]
    wanted = plain_training(model, start, numbers, data, config, mode)
    saved = load_file(tmp_path / "run" / "sentries" / "step_000004" / "rows.safetensors")
    assert saved["input_rows"].shape == (len(words.words), 32)
    for name, rows in zip(("input_rows", "output_rows"), start):
        if name in wanted:
            moved = (wanted[name] - rows).abs().max().item()
            assert moved > 0.02
            # Adafactor divides by the gradient's size, which makes rounding of small entries large
            torch.testing.assert_close(saved[name], wanted[name], rtol=0, atol=1e-4 * moved)
        elif rows is not None:
            torch.testing.assert_close(saved[name], rows, rtol=0, atol=1e-7)


@pytest.mark.parametrize("mode", CASES)
def test_a_sentrys_tensors_are_the_optimizers_own(mode):
    model = make_model("qwen2_tied" if mode == "shared" else "qwen2_untied")
    output_rows = None if mode == "shared" else random_rows(model, 3, 2)
    overlay = WakeOverlay(
        model, FIRST_NEW_ID, random_rows(model, 3, 1), output_rows, mode != "frozen"
    )
    tensors = train.Optimizer(overlay).tensors()
    sets = ["input_rows", "output_rows"] if mode == "separate" else ["input_rows"]
    kept = ["input_rows"] if mode == "shared" else ["input_rows", "output_rows"]
    statistics = [f"{name}.{kind}_mean_square" for name in sets for kind in ("row", "column")]
    assert sorted(tensors) == sorted(kept + statistics)
    for name in kept:
        tensors[name].fill_(7.0)
        assert (getattr(overlay, name) == 7.0).all()
