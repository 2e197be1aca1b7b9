"""Proves that our Adafactor is transformers' Adafactor, and a whole run the same in plain PyTorch.

python -m pytest tests/test_adafactor.py
"""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    FIRST_NEW_ID, full_table_model, make_model, make_overlay, random_rows, tiny_settings,
)  # fmt: skip
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.optimization import Adafactor

import recover
import train
from config import Config, write_config
from extend_tokenizer import extend, plan_new_words, read_corpus, save_new_words
from overlay import Optimizer, adafactor_update, share_gradient_, sharing_matrices

SETTINGS = {
    "eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": None,
    "weight_decay": 0.0, "scale_parameter": False, "relative_step": False, "warmup_init": False,
}  # fmt: skip
NUM_STEPS = 20


def library_rows(rows: Tensor, grads: list[Tensor], learning_rates: list[float]) -> nn.Parameter:
    """Let transformers' Adafactor move the rows by the same gradients."""
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
    """They are equal to 1e-6 of the way that the rows went, beside fp32's rounding of the rows."""
    moved = (theirs - start).abs().max()
    assert moved > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * moved.item())


def make_gradients(num_rows: int, hidden_size: int, share: float) -> list[Tensor]:
    """Make gradients of sizes from 1e-5 to 300; in each step `share` of the rows have one."""
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


# 4,096 rows are a block.
@pytest.mark.parametrize("num_rows, share", [(37, 1.0), (37, 0.3), (5000, 0.9), (9000, 0.5)])
def test_twenty_steps_equal_transformers_adafactor(num_rows, share):
    start = torch.zeros(num_rows, 6)  # so that the rows are the sum of the updates
    grads = make_gradients(num_rows, 6, share)
    learning_rates = [5e-4 * (step + 1) for step in range(NUM_STEPS)]
    rows, statistics = start.clone(), zero_statistics(num_rows, 6)
    for step, (grad, learning_rate) in enumerate(zip(grads, learning_rates), 1):
        adafactor_update(rows, grad, statistics, step, learning_rate)
    assert_same_path(rows, library_rows(start, grads, learning_rates), start)
    never = torch.stack(grads).abs().sum(dim=(0, 2)) == 0
    assert torch.equal(rows[never], start[never])


def test_grad_scale_is_a_factor_of_the_gradient():
    start, grads = torch.zeros(37, 6), make_gradients(37, 6, 1.0)
    scales = [0.5 ** (step % 5) for step in range(NUM_STEPS)]
    rows, statistics = start.clone(), zero_statistics(37, 6)
    for step, (grad, scale) in enumerate(zip(grads, scales), 1):
        before = grad.clone()
        adafactor_update(rows, grad, statistics, step, 1e-3, scale)
        assert torch.equal(grad, before)
    scaled = [grad * scale for grad, scale in zip(grads, scales)]
    assert_same_path(rows, library_rows(start, scaled, [1e-3] * NUM_STEPS), start)


def test_a_step_without_any_gradient_moves_nothing():
    rows, statistics = torch.ones(5, 3), zero_statistics(5, 3)
    adafactor_update(rows, torch.zeros(5, 3), statistics, 1, 1e-3)
    assert torch.equal(rows, torch.ones(5, 3))
    grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    adafactor_update(rows, grad, statistics, 2, 1e-3)
    expected = library_rows(torch.ones(5, 3), [torch.zeros(5, 3), grad], [1e-3, 1e-3])
    assert_same_path(rows, expected, torch.ones(5, 3))


# ---- What the rows share -------------------------------------------------------------------------

CPU = torch.device("cpu")


def made_up_words(num_words: int) -> tuple[list[str], list[list[int]]]:
    """Words of one to eight letters out of four, many of them kin, and their base ids."""
    rng = random.Random(num_words)
    words = ["".join(rng.choices("abcd", k=rng.randint(1, 8))) for _ in range(num_words)]
    return words, [rng.choices(range(60), k=rng.randint(1, 4)) for _ in words]


def dense_sharing(words, spellings, row_coupling: float, kin_coupling: float) -> Tensor:
    """I + c / sqrt(N) 1 1^T + k Phi diag(1 / sqrt(n_f)) Phi^T as one (N, N) matrix in float64."""
    have = {}
    for i, (word, ids) in enumerate(zip(words, spellings)):
        features = {("first", ids[0]), ("last", ids[-1]), ("is", word)}
        for size in (2, 3, 4):
            if len(word) >= size:
                features |= {("begins", word[:size]), ("ends", word[-size:])}
        for feature in features:
            have.setdefault(feature, []).append(i)
    num_words = len(words)
    matrix = torch.eye(num_words, dtype=torch.float64) + row_coupling / num_words**0.5
    for (what, _), kin in have.items():
        if len(kin) >= (2 if what == "is" else 3):
            phi = torch.zeros(num_words, dtype=torch.float64).index_fill(0, torch.tensor(kin), 1.0)
            matrix += kin_coupling / len(kin) ** 0.5 * torch.outer(phi, phi)
    return matrix


@pytest.mark.parametrize("row_coupling, kin_coupling", [(4.0, 2.0), (0.0, 2.0), (4.0, 0.0)])
@pytest.mark.parametrize("num_words", [1, 2, 3, 40, 400])
def test_shared_gradients_are_those_of_the_dense_formula(num_words, row_coupling, kin_coupling):
    words, spellings = made_up_words(num_words)
    sharing = sharing_matrices(words, spellings, row_coupling, kin_coupling, CPU)
    # more columns than a block has, so that there are two
    grad = torch.randn(num_words, 600, generator=torch.Generator().manual_seed(0))
    wanted = dense_sharing(words, spellings, row_coupling, kin_coupling) @ grad.double()
    results = []
    for _ in range(2):
        results.append(grad.clone())
        if sharing:
            share_gradient_(results[-1], *sharing)
    assert (results[0] - wanted).norm() <= 1e-6 * wanted.norm()
    assert torch.equal(*results)  # the same bits each time
    assert num_words < 40 or not torch.equal(results[0], grad)


def test_words_are_kin_by_beginnings_endings_and_outer_base_tokens():
    def kin_of_first(*words: str, spellings=None) -> list[bool]:
        spellings = spellings or [[i] for i in range(len(words))]
        grad = torch.zeros(len(words), 1)
        grad[0] = 1.0
        sharing = sharing_matrices(words, spellings, 0.0, 1.0, CPU)
        if sharing:
            share_gradient_(grad, *sharing)
        return (grad[1:, 0] > 0).tolist()

    assert kin_of_first("riverrun", "river", "rivulet", "stone") == [True, True, False]
    assert kin_of_first("riverrun", "gorun", "begun", "runaway") == [True, True, False]
    assert kin_of_first("riverrun", "runri", "unri", "nuri") == [False] * 3  # not the other way
    assert kin_of_first("riverrun", "rest", "rock", "even") == [False] * 3  # one letter is too few
    assert kin_of_first("riverrun", "river", "stone") == [False] * 2  # two words are not enough
    outer = [[7, 1, 8], [7, 2], [7, 3], [8, 4], [5, 7]]
    words = "riverrun", "abc", "def", "ghi", "jkl"
    assert kin_of_first(*words, spellings=outer) == [True, True, False, False]
    outer = [[1, 7, 8], [2, 8], [3, 8], [8, 4], [7, 5]]
    assert kin_of_first(*words, spellings=outer) == [True, True, False, False]


def test_two_forms_of_a_word_are_kin_though_they_are_only_two():
    """The second forms of words come last; nothing else is shared here."""
    words, spellings = ["riverrun", "stone", "riverrun"], [[1], [2], [3]]
    grad = torch.tensor([[1.0], [10.0], [100.0]])
    share_gradient_(grad, *sharing_matrices(words, spellings, 0.0, 2.0, CPU))
    both = 2.0 / 2**0.5 * (1.0 + 100.0)
    assert torch.allclose(grad, torch.tensor([[1.0 + both], [10.0], [100.0 + both]]))


def test_no_coupling_needs_no_matrices():
    assert sharing_matrices(*made_up_words(40), 0.0, 0.0, CPU) is None


def test_sharing_needs_memory_for_a_block_of_columns_alone():
    """Not for the sums over all features, which would be larger than the gradient itself."""
    words, spellings = made_up_words(3000)
    sharing = sharing_matrices(words, spellings, 4.0, 2.0, CPU)
    largest, grad = [0], torch.randn(3000, 2048)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, Tensor) and result.layout == torch.strided:
                if result.untyped_storage().data_ptr() != grad.untyped_storage().data_ptr():
                    largest[0] = max(largest[0], result.numel())
            return result

    with Watch():
        share_gradient_(grad, *sharing)
    assert 0 < largest[0] <= 256 * max(sharing[0].shape)


@pytest.mark.parametrize("row_coupling, kin_coupling", [(0.0, 0.0), (4.0, 0.0), (4.0, 2.0)])
@pytest.mark.parametrize("mode", ["separate", "shared", "frozen"])
def test_the_optimizer_moves_rows_by_their_own_and_their_kins_gradients(
    mode, row_coupling, kin_coupling
):
    """It does what transformers' Adafactor does on the gradients that the formula mixes; the norm
    is of the rows' own gradients."""
    num_rows, num_steps = 50, 10
    overlay, start = make_overlay(output_rows=mode, num_new=num_rows), torch.zeros(num_rows, 32)
    for row_set in overlay.parameters():
        row_set.data.zero_()  # so that the rows are the sum of the updates
    words, spellings = made_up_words(num_rows)
    optimizer = Optimizer(
        overlay, sharing_matrices(words, spellings, row_coupling, kin_coupling, CPU)
    )
    generator = torch.Generator().manual_seed(0)
    dense = {"input_rows": []} | ({"output_rows": []} if mode == "separate" else {})
    for step in range(1, num_steps + 1):
        ids = FIRST_NEW_ID + torch.randint(num_rows // 2, (1, 12), generator=generator)
        overlay.begin_step(ids)
        overlay.input_grad.copy_(torch.randn(len(overlay.used), 32, generator=generator))
        own = [start.index_copy(0, overlay.used, overlay.input_grad)]
        if mode != "frozen":
            overlay.grad.copy_(torch.randn(num_rows, 32, generator=generator) / 3)
            own.append(overlay.grad.clone())
        own = [sum(own)] if mode == "shared" else own
        for name, grad in zip(("input_rows", "output_rows"), own):
            dense[name].append(grad)
        torch.testing.assert_close(optimizer.gradient_norm(), torch.cat(own).norm())
        optimizer.update(step, 1e-3 * step, 0.7**step)
    learning_rates = [1e-3 * step for step in range(1, num_steps + 1)]
    mix = dense_sharing(words, spellings, row_coupling, kin_coupling)
    for name, grads in dense.items():
        wanted = [(mix @ g.double()).float() * 0.7**step for step, g in enumerate(grads, 1)]
        rows = getattr(overlay, name).data
        assert_same_path(rows, library_rows(start, wanted, learning_rates), start)
        never = torch.stack(grads).abs().sum(dim=(0, 2)) == 0
        assert never.any() == (mode != "shared" and name == "input_rows")
        assert (rows[never] != 0).all() if row_coupling else torch.equal(rows[never], start[never])
    if mode == "frozen":
        assert torch.equal(overlay.output_rows, start)


def test_without_sharing_a_row_learns_from_its_own_gradient_alone():
    overlay = make_overlay("qwen2_tied", num_new=5)
    before, optimizer = overlay.input_rows.clone(), Optimizer(overlay)
    overlay.begin_step(torch.tensor([[FIRST_NEW_ID]]))
    overlay.grad[3] = torch.arange(32.0)
    optimizer.gradient_norm()
    optimizer.update(1, 1e-3)
    moved = (overlay.input_rows != before).any(dim=1).tolist()
    assert moved == [False, False, False, True, False]


# ---- Whole steps ---------------------------------------------------------------------------------

CASES = ["separate", "shared", "frozen"]


def plain_training(model, words_rows, batches, data, config, mode, mix) -> dict[str, Tensor]:
    """Do the same run with none of our code but the data: full tables, autograd, library parts.

    batches: (sequence numbers, share of config.learning_rate) of each step.

    mix: what dense_sharing makes of the words. Gradients of the base rows are dropped before
    clipping, because these rows are frozen. The rows' gradients are mixed after it.
    """
    input_rows, output_rows = words_rows
    full = full_table_model(model, FIRST_NEW_ID, input_rows, output_rows).requires_grad_(True)
    tables = {"input_rows": full.model.embed_tokens.weight}
    if mode == "separate":
        tables["output_rows"] = full.lm_head.weight
    rows = {n: nn.Parameter(table[FIRST_NEW_ID:].detach().clone()) for n, table in tables.items()}
    optimizer = Adafactor(rows.values(), lr=1.0, **SETTINGS)
    for numbers, rate in batches:
        positions = numbers[:, None] * config.seq_len + torch.arange(config.seq_len)
        full.zero_grad()
        logits = full(input_ids=data.train[positions]).logits
        targets = data.train[positions + 1].flatten()
        nn.functional.cross_entropy(logits.flatten(0, 1), targets).backward()
        for name, table in tables.items():
            rows[name].grad = table.grad[FIRST_NEW_ID:].clone()
        norm = nn.utils.clip_grad_norm_(rows.values(), config.max_grad_norm)
        assert norm > config.max_grad_norm  # or clipping would not be tried
        for row_set in rows.values():
            row_set.grad = (mix @ row_set.grad.double()).float()
        optimizer.param_groups[0]["lr"] = config.learning_rate * rate
        optimizer.step()
        with torch.no_grad():
            for name, table in tables.items():
                table[FIRST_NEW_ID:] = rows[name]
    return {name: parameter.detach() for name, parameter in rows.items()}


def tiny_run(mode: str, folder: Path, **changes) -> Config:
    family = "qwen2_tied" if mode == "shared" else "qwen2_untied"
    changes |= {"save_every": 1, "keep_sentries": 4, "max_grad_norm": 0.01, "warmup_ratio": 0.5}
    changes |= {"output_rows": mode, "micro_batch_size": 2, "learning_rate": 0.02}
    return Config(**tiny_settings(folder, family, **changes))


def assert_rows_are_plain_pytorchs(config: Config, mode: str, first: int, rates, seed_rows) -> None:
    """Compare the run's last sentry with plain_training of the steps from first on, at these rates.

    seed_rows: input rows of the last words, if these did not begin at the mean of their spellings.
    """
    texts = read_corpus(config)
    words = plan_new_words(config, texts)
    data = train.load_data(config, words, texts)
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
    couplings = config.row_coupling, config.kin_coupling
    mix = dense_sharing(words.words, words.spellings, *couplings)
    wanted = plain_training(model, start, batches, data, config, mode, mix)
    name = f"step_{config.max_steps:06d}"
    saved = load_file(Path(config.run_dir, "sentries", name, "rows.safetensors"))
    assert saved["input_rows"].shape == (len(words.words), 32)
    for name, rows in zip(("input_rows", "output_rows"), start):
        if name in wanted:
            moved = (wanted[name] - rows).abs().max().item()
            assert moved > 0.02
            # Adafactor divides by the gradient's size, so rounding of small entries becomes large.
            torch.testing.assert_close(saved[name], wanted[name], rtol=0, atol=1e-4 * moved)
        elif rows is not None:
            torch.testing.assert_close(saved[name], rows, rtol=0, atol=1e-7)


@pytest.mark.parametrize("mode", CASES)
def test_a_run_equals_the_same_run_in_plain_pytorch(mode, tmp_path, quick):
    config = tiny_run(mode, tmp_path, max_steps=4)
    train.train(config)
    rates = (0.5, 1.0, 0.75, 0.25)  # warm-up over half of the steps, then a cosine to 0 at step 5
    assert_rows_are_plain_pytorchs(config, mode, 1, rates, torch.empty(0, 32))


@pytest.mark.parametrize("mode", CASES)
def test_an_imported_run_goes_on_at_its_step_with_new_statistics(mode, tmp_path, quick):
    """It takes learning rate and data of steps 5 to 8, and Adafactor begins anew at step 1."""
    config = tiny_run(mode, tmp_path, max_steps=8)
    words = extend(config, read_corpus(config))
    save_new_words(config, words)
    write_config(config)
    num_new = len(words.words)
    seed_rows = random_rows(make_model("qwen2_tied"), num_new - 3, seed=7).half()
    seed = {"embeddings": seed_rows, "step": 4}
    seed |= {"wake_start": FIRST_NEW_ID + 3, "num_wake": num_new - 3}
    torch.save(seed, tmp_path / "seed.pt")
    recover.main("import", str(tmp_path / "seed.pt"), config.run_dir)
    train.train(config)
    rates = [0.5 * (1 + math.cos(math.pi * n / 5)) for n in (1, 2, 3, 4)]
    assert_rows_are_plain_pytorchs(config, mode, 5, rates, seed_rows.float())
    records = Path(config.run_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(record) for record in records]
    steps = [(record["step"], record["kind"]) for record in records]
    assert steps == [(4, "eval"), *((step, "train") for step in (5, 6, 7, 8)), (8, "eval")]
    assert [r["learning_rate"] for r in records[1:5]] == pytest.approx([0.02 * r for r in rates])
    sentries = recover.sentry_folders(Path(config.run_dir, "sentries"))
    states = [json.loads((path / "state.json").read_text("utf-8")) for _, path in sentries]
    # Which older ones are there depends on how fast copying is.
    assert max(state["step"] for state in states) == 8
    assert all(state["optimizer_step"] == state["step"] - 4 for state in states)


@pytest.mark.parametrize("mode", CASES)
def test_a_sentrys_tensors_are_the_optimizers_own(mode):
    overlay = make_overlay(output_rows=mode)
    tensors = Optimizer(overlay).tensors()
    sets = ["input_rows", "output_rows"] if mode == "separate" else ["input_rows"]
    kept = ["input_rows"] if mode == "shared" else ["input_rows", "output_rows"]
    statistics = [f"{name}.{kind}_mean_square" for name in sets for kind in ("row", "column")]
    assert sorted(tensors) == sorted(kept + statistics)
    for name in kept:
        tensors[name].fill_(7.0)
        assert (getattr(overlay, name) == 7.0).all()
