"""Proves that our Adafactor is transformers' Adafactor, and a whole run the same in plain PyTorch.

python -m pytest tests/test_adafactor.py
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    FIRST_NEW_ID, full_table_model, make_model, random_rows, save_model, write_words,
)  # fmt: skip
from torch import Tensor, nn
from transformers.optimization import Adafactor

import recover
import train
from extend_tokenizer import Config, extend, write_config
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


# The references in float64: thousands of equal summands round in one direction.
@pytest.mark.parametrize("num_rows, share", [(37, 0.3), (5000, 0.9), (9000, 0.5), (37, 0.0)])
def test_one_gradient_for_all_untouched_rows_is_the_dense_call(num_rows, share):
    grads, generator = make_gradients(num_rows, 6, share)[:10], torch.Generator().manual_seed(1)
    rows, statistics = torch.zeros(num_rows, 6), zero_statistics(num_rows, 6)
    dense_rows, scaled = rows.double(), []
    dense_statistics = {kind: values.double() for kind, values in statistics.items()}
    learning_rates = [1e-3 * step for step in range(1, 11)]
    for step, (grad, rate) in enumerate(zip(grads, learning_rates), 1):
        touched = grad.abs().sum(dim=1).nonzero().flatten()
        others = 0.1 * torch.randn(6, generator=generator)
        dense = others.repeat(num_rows, 1).index_copy(0, touched, grad[touched]).double()
        part, kept = grad[touched], others.clone()
        train.adafactor_update(rows, part, statistics, step, rate, 0.7**step, touched, others)
        assert torch.equal(part, grad[touched]) and torch.equal(others, kept)
        train.adafactor_update(dense_rows, dense, dense_statistics, step, rate, 0.7**step)
        scaled.append(dense * 0.7**step)
    assert_same_path(rows.double(), dense_rows, torch.zeros(num_rows, 6))
    for kind, values in dense_statistics.items():  # fp32 sums over 9,000 rows: 4e-6
        torch.testing.assert_close(statistics[kind].double(), values, rtol=1e-5, atol=0)
    library = library_rows(torch.zeros_like(dense_rows), scaled, learning_rates)
    assert_same_path(rows.double(), library, torch.zeros(num_rows, 6))


# ---- The rows' coupling --------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", [0.0, 4.0])
@pytest.mark.parametrize("mode", ["separate", "shared", "frozen"])
def test_the_optimizer_moves_rows_by_their_own_and_the_common_gradient(mode, coupling):
    """As transformers' Adafactor would on grad + coupling / sqrt(N) x (sum of all rows of grad)."""
    num_rows, num_steps = 50, 10
    model = make_model("qwen2_tied" if mode == "shared" else "qwen2_untied")
    start = torch.zeros(num_rows, 32)
    output_rows = None if mode == "shared" else start.clone()
    overlay = WakeOverlay(model, FIRST_NEW_ID, start.clone(), output_rows, mode != "frozen")
    optimizer, generator = train.Optimizer(overlay), torch.Generator().manual_seed(0)
    dense = {name: [] for name in optimizer.mean_squares}
    for step in range(1, num_steps + 1):
        ids = FIRST_NEW_ID + torch.randint(num_rows // 2, (1, 12), generator=generator)
        overlay.begin_step(ids)
        overlay.input_grad.copy_(torch.randn(len(overlay.touched), 32, generator=generator))
        input_grad = start.index_copy(0, overlay.touched, overlay.input_grad)
        if mode != "frozen":
            overlay.output_grad.copy_(torch.randn(num_rows, 32, generator=generator) / 3)
        if mode == "shared":
            dense["input_rows"].append(input_grad + overlay.output_grad)
        else:
            dense["input_rows"].append(input_grad)
        if mode == "separate":
            dense["output_rows"].append(overlay.output_grad.clone())
        optimizer.update(optimizer.gradients(), step, 1e-3 * step, 0.7**step, coupling)
    learning_rates = [1e-3 * step for step in range(1, num_steps + 1)]
    for name, grads in dense.items():
        common = [coupling / num_rows**0.5 * grad.sum(dim=0) for grad in grads]
        wanted = [(g + c) * 0.7**step for step, (g, c) in enumerate(zip(grads, common), 1)]
        rows = getattr(overlay, name).data
        assert_same_path(rows, library_rows(start, wanted, learning_rates), start)
        never = torch.stack(grads).abs().sum(dim=(0, 2)) == 0
        assert never.any() == (mode != "shared" and name == "input_rows")
        assert (rows[never] != 0).all() if coupling else torch.equal(rows[never], start[never])
    if mode == "frozen":
        assert torch.equal(overlay.output_rows, start)


def test_the_optimizers_plain_update_has_no_coupling():
    moved = []
    for coupling in ((), (0.0,)):
        overlay = WakeOverlay(make_model("qwen2_tied"), FIRST_NEW_ID, torch.ones(5, 32))
        overlay.begin_step(torch.tensor([[FIRST_NEW_ID]]))
        overlay.output_grad[3] = torch.arange(32.0)
        optimizer = train.Optimizer(overlay)
        optimizer.update(optimizer.gradients(), 1, 1e-3, 1.0, *coupling)
        moved.append(overlay.input_rows.data)
    assert torch.equal(*moved)
    assert (moved[0] != 1).any(dim=1).tolist() == [False, False, False, True, False]


# ---- Whole steps ---------------------------------------------------------------------------------

CASES = ["separate", "shared", "frozen"]


def plain_training(model, words_rows, batches, data, config, mode) -> dict[str, Tensor]:
    """The same run with none of our code but the data: full tables, autograd, library parts.

    batches: (sequence numbers, share of config.learning_rate) of each step.

    Gradients of the base rows are dropped before clipping, because these rows are frozen. The rows
    are coupled after it.
    """
    input_rows, output_rows = words_rows
    full = full_table_model(model, FIRST_NEW_ID, input_rows, output_rows).requires_grad_(True)
    tables = {"input_rows": full.model.embed_tokens.weight}
    if mode == "separate":
        tables["output_rows"] = full.lm_head.weight
    rows = {n: nn.Parameter(table[FIRST_NEW_ID:].detach().clone()) for n, table in tables.items()}
    optimizer = Adafactor(rows.values(), lr=1.0, **SETTINGS)
    for numbers, rate in batches:
        places = numbers[:, None] * config.seq_len + torch.arange(config.seq_len)
        full.zero_grad()
        logits = full(input_ids=data.train[places]).logits
        targets = data.train[places + 1].flatten()
        nn.functional.cross_entropy(logits.flatten(0, 1), targets).backward()
        for name, table in tables.items():
            rows[name].grad = table.grad[FIRST_NEW_ID:].clone()
        norm = nn.utils.clip_grad_norm_(rows.values(), config.max_grad_norm)
        assert norm > config.max_grad_norm  # or clipping would not be tried
        for row_set in rows.values():
            row_set.grad += config.row_coupling / len(row_set) ** 0.5 * row_set.grad.sum(dim=0)
        optimizer.param_groups[0]["lr"] = config.learning_rate * rate
        optimizer.step()
        with torch.no_grad():
            for name, table in tables.items():
                table[FIRST_NEW_ID:] = rows[name]
    return {name: parameter.detach() for name, parameter in rows.items()}


def tiny_run(mode: str, folder: Path, **changes) -> Config:
    family = "qwen2_tied" if mode == "shared" else "qwen2_untied"
    return Config(
        model_name=str(save_model(family, folder / "model")), quantization="none", device="cpu",
        **write_words(folder), run_dir=str(folder / "run"), output_rows=mode, seq_len=16,
        effective_batch_size=4, micro_batch_size=2, warmup_ratio=0.5, max_grad_norm=0.01,
        learning_rate=0.02, save_every=1, snapshot_every=1, keep_sentries=4, eval_every=4,
        log_every=1, **changes,
    )  # fmt: skip


def assert_rows_are_plain_pytorchs(config: Config, mode: str, first: int, rates, seed_rows) -> None:
    """The run's last sentry against plain_training of the steps from first on, at these rates.

    seed_rows: input rows of the last words that did not begin at the mean of their spellings.
    """
    words = train.plan_new_words(config)
    data = train.load_data(config, words)
    model = make_model("qwen2_tied" if mode == "shared" else "qwen2_untied")
    tables = [model.model.embed_tokens.weight, model.lm_head.weight]
    start = [torch.stack([t[ids].mean(dim=0) for ids in words.spellings]) for t in tables]
    start[0][len(words.words) - len(seed_rows) :] = seed_rows
    start = start[0], None if mode == "shared" else start[1]
    count = train.count_sequences(data.train, config.seq_len)
    batches = [
        (train.step_sequence_numbers(step, 4, count, config.seed), rate)
        for step, rate in enumerate(rates, first)
    ]
    wanted = plain_training(model, start, batches, data, config, mode)
    name = f"step_{config.max_steps:06d}"
    saved = load_file(Path(config.run_dir, "sentries", name, "rows.safetensors"))
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
def test_a_run_equals_the_same_run_in_plain_pytorch(mode, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "plot_losses", lambda *_: None)
    config = tiny_run(mode, tmp_path, max_steps=4)
    train.train(config)
    rates = (0.5, 1.0, 0.5, 0.0)  # warm-up over half of the steps, then cosine
    assert_rows_are_plain_pytorchs(config, mode, 1, rates, torch.empty(0, 32))


@pytest.mark.parametrize("mode", CASES)
def test_an_imported_run_goes_on_at_its_step_with_new_statistics(mode, tmp_path, monkeypatch):
    """Learning rate and data of steps 5 to 8, Adafactor's decay from its own first update on."""
    monkeypatch.setattr(train, "plot_losses", lambda *_: None)
    config = tiny_run(mode, tmp_path, max_steps=8)
    num_new = len(extend(config).words)
    write_config(config)
    seed_rows = random_rows(make_model("qwen2_tied"), num_new - 3, seed=7).half()
    seed = {"embeddings": seed_rows, "step": 4}
    seed |= {"wake_start": FIRST_NEW_ID + 3, "num_wake": num_new - 3}
    torch.save(seed, tmp_path / "seed.pt")
    recover.main("import", str(tmp_path / "seed.pt"), config.run_dir)
    train.train(config)
    rates = [0.5 * (1 + math.cos(math.pi * n / 4)) for n in (1, 2, 3, 4)]
    assert_rows_are_plain_pytorchs(config, mode, 5, rates, seed_rows.float())
    records = Path(config.run_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(record) for record in records]
    steps = [(record["step"], record["kind"]) for record in records]
    assert steps == [(4, "eval"), *((step, "train") for step in (5, 6, 7, 8)), (8, "eval")]
    assert [r["learning_rate"] for r in records[1:5]] == pytest.approx([0.02 * r for r in rates])
    sentries = recover.sentry_folders(Path(config.run_dir, "sentries"))
    states = [json.loads((path / "state.json").read_text("utf-8")) for _, path in sentries]
    assert states[0]["step"] == 8  # which older ones are there depends on how fast copying is
    assert all(state["optimizer_step"] == state["step"] - 4 for state in states)


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
