"""Proves that the overlay makes a model the one with resized tables, and gives the old one back.

    python -m pytest tests/test_overlay.py

Every comparison is with `full_table_model`: the library's own class, embedding, head, loss and
autograd on tables that were resized by hand. Rows and weights are random and of the same size.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny_models import (
    CPU, FAMILIES, FIRST_NEW_ID, NUM_NEW, TABLE_ROWS, full_table_model, make_batch, make_model,
    make_overlay, random_ids, random_rows,
)  # fmt: skip
from torch import nn

import overlay as overlay_module
from config import Config, UserError
from machine import StepBatch, StepPlan, accumulate, recompute_layers
from overlay import (
    HeadFormula, LossScale, Optimizer, WakeOverlay, check_ids, check_model, dense_weight,
    output_mode, spherical_rows, starting_rows, subtoken_mean,
)  # fmt: skip

# 20 new words have the ids 257..276; 257..263 fall on padding rows of a 264-row table.
VOCAB_SIZE = FIRST_NEW_ID + NUM_NEW
CASES = [(family, "auto") for family in FAMILIES]  # auto: as the family's head is, tied or not
CASES += [("qwen2_tied", "separate"), ("gemma2", "separate"), ("qwen2_untied", "shared")]


def make_pair(family: str, output_rows: str = "auto", dtype=torch.float32):
    """(model, overlay over it, the full-table reference)"""
    overlay = make_overlay(family, output_rows, dtype)
    reference = full_table_model(
        overlay.model, FIRST_NEW_ID, overlay.input_rows.data, overlay.output_rows
    )
    return overlay.model, overlay, reference


def run_accumulate(overlay: WakeOverlay, batch: StepBatch, micro_batch_size: int = 8) -> float:
    """Accumulate a step's gradients in the overlay -> mean loss."""
    plan = StepPlan(micro_batch_size, num_recomputed_layers=0)
    loss, _ = accumulate(plan, batch, overlay, CPU, LossScale(), prepare_next=lambda: None)
    return loss.item() / batch.y.numel()


def dense_input_grad(overlay: WakeOverlay) -> torch.Tensor:
    """The gradient of the rows in use, in a (N, H) tensor."""
    return torch.zeros_like(overlay.grad).index_add(0, overlay.used, overlay.input_grad)


def all_gradients(overlay: WakeOverlay) -> torch.Tensor:
    """(2 N, H): both sides' gradients, one below the other."""
    return torch.cat([dense_input_grad(overlay), overlay.grad]).clone()


def update(optimizer: Optimizer) -> None:
    """One step with gradients as they are."""
    optimizer.gradient_norm()
    optimizer.update(1, learning_rate=0.01)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """The largest difference is at most `tolerance` of the reference's largest entry."""
    assert ours.shape == theirs.shape
    difference = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert difference <= tolerance, f"relative difference {difference}"


# ---- The installed model is the model with resized tables ----------------------------------------


# bf16 keeps 8 bits; sums of 32 products differ in order, and short inputs use the rows in fp32.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("family, output_rows", CASES)
@torch.no_grad()
def test_logits_and_loss_equal_those_of_full_tables(family, output_rows, dtype, tolerance):
    model, overlay, reference = make_pair(family, output_rows, dtype)
    overlay.install()
    for ids in (random_ids(2, 9), random_ids(1, 8)):  # generating, at most 8, has its own path
        ours, theirs = model(input_ids=ids).logits, reference(input_ids=ids).logits
        assert ours.dtype == theirs.dtype and ours.shape == (*ids.shape, VOCAB_SIZE)
        assert_close(ours, theirs, tolerance)
        labels = torch.where(torch.arange(ids.shape[1]) == 3, -100, ids)
        losses = [m(input_ids=ids, labels=labels).loss for m in (model, reference)]
        assert_close(*losses, tolerance)
        # The hand-written path of training gives the same numbers.
        hidden = overlay.body(inputs_embeds=overlay.embed(ids), use_cache=False).last_hidden_state
        losses = overlay.loss(hidden[:, :-1], labels[:, 1:])[0]
        flat = theirs[:, :-1].flatten(0, 1).float()
        truth = nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), reduction="none")
        assert_close(losses.flatten(), truth, tolerance)


@pytest.mark.parametrize("family, output_rows", CASES)
def test_greedy_generation_equals_that_of_full_tables(family, output_rows):
    model, overlay, reference = make_pair(family, output_rows)
    overlay.install()
    ids = random_ids(2, 6)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    ours, theirs = (m.generate(ids, attention_mask=mask, **settings) for m in (model, reference))
    assert torch.equal(ours, theirs)
    assert ours.shape == (2, 18)


def test_generation_reaches_the_new_ids():
    overlay = make_overlay()
    overlay.install()
    ids = random_ids(4, 6)
    mask = torch.ones_like(ids)
    out = overlay.model.generate(ids, attention_mask=mask, max_new_tokens=24, pad_token_id=0)
    assert (out[:, 6:] >= TABLE_ROWS).any()


@torch.no_grad()
def test_ids_on_padding_rows_of_the_base_table_come_from_the_overlay():
    model, overlay, reference = make_pair("qwen2_untied")
    for table in (model.model.embed_tokens.weight, model.lm_head.weight):
        table[FIRST_NEW_ID:] = 1000.0  # any use of a padding row would shift everything
    overlay.install()
    ids = torch.arange(FIRST_NEW_ID, TABLE_ROWS)[None]
    assert_close(model(input_ids=ids).logits, reference(input_ids=ids).logits, 1e-5)
    for row in range(FIRST_NEW_ID, TABLE_ROWS):
        assert torch.equal(
            overlay.embed(torch.tensor([[row]]))[0, 0], overlay.input_rows[row - 257]
        )


def test_padding_rows_of_the_base_table_change_no_gradient():
    grads = []
    for filling in (0.0, 1000.0):
        overlay = make_overlay("gemma2")
        with torch.no_grad():
            overlay.embedding.weight[FIRST_NEW_ID:] = filling
        run_accumulate(overlay, make_batch(overlay))
        grads.append(all_gradients(overlay))
    assert_close(*grads, 1e-6)


# ---- The old model afterwards --------------------------------------------------------------------


@pytest.mark.parametrize("family, output_rows", CASES)
def test_training_and_uninstalling_leave_the_base_bitwise_alone(family, output_rows):
    overlay = make_overlay(family, output_rows)
    model = overlay.model
    config, ids = copy.deepcopy(model.config.to_dict()), torch.arange(18).view(2, 9)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    parts = model.get_input_embeddings(), model.get_output_embeddings()
    base = dict(model.named_parameters())
    optimizer = Optimizer(overlay)
    rows_before = [tensor.clone() for tensor in optimizer.tensors().values()]
    overlay.install()
    assert model.config.get_text_config().vocab_size == overlay.vocab_size == VOCAB_SIZE
    batch = make_batch(overlay)
    for _ in range(2):
        run_accumulate(overlay, batch)
        update(optimizer)
    model(input_ids=batch.x, labels=batch.x).loss.backward()  # the library's own way, too
    assert not any(parameter.grad is not None for parameter in base.values())
    assert not any(torch.equal(a, b) for a, b in zip(rows_before, optimizer.tensors().values()))
    overlay.uninstall()
    assert (model.get_input_embeddings(), model.get_output_embeddings()) == parts
    assert model.config.to_dict() == config
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits)
        assert model(input_ids=ids, labels=ids).loss.isfinite()


def test_installing_twice_still_gives_the_old_model_back():
    overlay = make_overlay()
    overlay.install()
    overlay.install()
    overlay.uninstall()
    assert overlay.model.config.vocab_size == TABLE_ROWS
    assert type(overlay.model.get_input_embeddings()) is nn.Embedding


# ---- Gradients -----------------------------------------------------------------------------------


def reference_gradients(reference: nn.Module, batch: StepBatch):
    """(mean loss, gradient of the input table, of the head or None if tied), by plain autograd."""
    reference.requires_grad_(True)
    logits = reference(input_ids=batch.x).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.y.flatten())
    loss.backward()
    embedding = reference.get_input_embeddings().weight
    head = reference.get_output_embeddings().weight
    return loss.item(), embedding.grad, None if head is embedding else head.grad


@pytest.mark.parametrize("micro_batch_size", [1, 8])
@pytest.mark.parametrize("family, output_rows", CASES)
def test_row_gradients_equal_autograds_on_full_tables(family, output_rows, micro_batch_size):
    _, overlay, reference = make_pair(family, output_rows)
    batch = make_batch(overlay)
    loss = run_accumulate(overlay, batch, micro_batch_size)
    true_loss, embedding_grad, head_grad = reference_gradients(reference, batch)
    assert loss == pytest.approx(true_loss, rel=1e-6)
    if overlay.output_rows is not None:
        truth = [embedding_grad[FIRST_NEW_ID:], head_grad[FIRST_NEW_ID:]]
        assert_close(dense_input_grad(overlay), truth[0], 1e-5)
        assert_close(overlay.grad, truth[1], 1e-5)
        norm = Optimizer(overlay).gradient_norm()
    else:  # shared rows have one gradient, the sum of both sides'
        total = embedding_grad if head_grad is None else embedding_grad + head_grad
        truth = [total[FIRST_NEW_ID:]]
        norm = Optimizer(overlay).gradient_norm()
        assert_close(overlay.grad, truth[0], 1e-5)
    assert_close(norm, torch.cat(truth).norm(), 1e-5)


def test_frozen_output_rows_get_no_gradient_and_do_not_move():
    _, overlay, reference = make_pair("qwen2_untied", "frozen")
    before, batch = overlay.output_rows.clone(), make_batch(overlay)
    run_accumulate(overlay, batch)
    _, embedding_grad, _ = reference_gradients(reference, batch)
    assert_close(dense_input_grad(overlay), embedding_grad[FIRST_NEW_ID:], 1e-5)
    assert not overlay.grad.any() and not overlay.output_rows.requires_grad
    optimizer = Optimizer(overlay)
    assert_close(optimizer.gradient_norm(), embedding_grad[FIRST_NEW_ID:].norm(), 1e-5)
    optimizer.update(1, learning_rate=0.01)
    assert torch.equal(overlay.output_rows, before)


@pytest.mark.parametrize("family", ["qwen2_untied", "gemma2"])
def test_gradients_do_not_depend_on_the_micro_batch(family):
    found = []
    for micro_batch_size in (8, 1, 2, 4):
        overlay = make_overlay(family)
        loss = run_accumulate(overlay, make_batch(overlay), micro_batch_size)
        found.append((torch.tensor(loss), all_gradients(overlay)))
    for other in found[1:]:
        for ours, whole in zip(other, found[0]):
            assert_close(ours, whole, 1e-5)


@pytest.mark.parametrize("output_rows", ["separate", "shared", "frozen"])
def test_a_step_starts_without_the_gradients_of_the_step_before(output_rows):
    overlay, found = make_overlay(output_rows=output_rows), []
    optimizer = Optimizer(overlay)
    for _ in range(2):
        run_accumulate(overlay, make_batch(overlay))
        found.append(all_gradients(overlay))
        optimizer.gradient_norm()
        optimizer.update(1, learning_rate=0.0)  # uses the gradients up, and moves nothing
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ["qwen2_untied", "gemma2", "phi3"])
def test_recomputing_layers_gives_the_same_bits(family):
    found = []
    for num_layers in (0, 1, 2, 0):  # the last as if nothing had been recomputed before
        overlay, calls = make_overlay(family), []
        for layer in overlay.layers:
            for part in (layer, layer.self_attn):
                part.register_forward_hook(lambda module, *_, calls=calls: calls.append(module))
        recompute_layers(overlay.layers, 2)
        recompute_layers(overlay.layers, num_layers)
        run_accumulate(overlay, make_batch(overlay))
        assert len(calls) == 4 + num_layers  # a recomputed layer's attention runs twice
        found.append(all_gradients(overlay))
    assert all(torch.equal(other, found[0]) for other in found[1:])


def test_every_new_row_is_trained():
    overlay = make_overlay()
    before = overlay.input_rows.clone(), overlay.output_rows.clone()
    run_accumulate(overlay, make_batch(overlay))
    assert overlay.used.tolist() == list(range(NUM_NEW))
    update(Optimizer(overlay))
    for old, new in zip(before, (overlay.input_rows, overlay.output_rows)):
        assert ((new - old).abs().amax(dim=1) > 1e-4).all()


def test_only_the_input_rows_in_use_get_a_gradient():
    overlay = make_overlay()
    x = torch.tensor([[1, 259, 270, 259, 2]])
    overlay.begin_step(x)
    overlay.add_input_gradient(x, torch.arange(5.0)[None, :, None].expand(1, 5, 32))
    assert overlay.used.tolist() == [2, 13]
    assert torch.equal(overlay.input_grad, torch.tensor([[1.0 + 3.0], [2.0]]).expand(2, 32))


# ---- Rows at the start ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subtoken_mean_is_the_mean_of_the_spelling_rows(dtype, monkeypatch):
    monkeypatch.setattr(overlay_module, "ROW_BLOCK", 3)
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    spellings = [[4], [1, 2], [7, 7, 9], [0, 49, 3, 5, 6], [49], [8, 9], [2, 1]]
    rows = subtoken_mean(table, spellings)
    truth = torch.stack([table[ids].double().mean(dim=0) for ids in spellings])
    assert rows.dtype == torch.float32
    assert_close(rows, truth, 1e-6)
    assert torch.equal(rows[0], table[4].float()) and torch.equal(rows[4], table[49].float())


def test_spherical_rows_have_the_radius_of_the_first_runs(monkeypatch):
    monkeypatch.setattr(overlay_module, "ROW_BLOCK", 7)
    table = 3.0 + 0.5 * torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    rows = spherical_rows(table, 5, radius=1.5, seed=11)
    expected = 1.5 * table.std() * 8**0.5
    torch.testing.assert_close(rows.norm(dim=1), expected.expand(5), rtol=1e-6, atol=0)
    direction = torch.randn(5, 8, generator=torch.Generator().manual_seed(11))
    cosine = torch.cosine_similarity(rows, direction, dim=1)
    torch.testing.assert_close(cosine, torch.ones(5), rtol=1e-6, atol=0)
    assert torch.equal(rows, spherical_rows(table, 5, radius=1.5, seed=11))
    assert not torch.equal(rows, spherical_rows(table, 5, radius=1.5, seed=12))
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_start_as_the_config_says_and_both_sides_with_one_seed():
    tables = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    spellings, settings = [[4], [1, 2]], dict.fromkeys(("model_name", "lexicon", "corpus"), "-")
    for side in tables:
        config = Config(**settings, run_dir="-", init="subtoken_mean")
        assert torch.equal(starting_rows(side, spellings, config), subtoken_mean(side, spellings))
        config = Config(**settings, run_dir="-", init="spherical", init_radius=2.0, seed=7)
        assert torch.equal(
            starting_rows(side, spellings, config), spherical_rows(side, 2, radius=2.0, seed=7)
        )


def test_auto_shares_the_rows_if_the_head_is_tied():
    assert [output_mode("auto", tied) for tied in (True, False)] == ["shared", "separate"]
    for mode in ("shared", "separate", "frozen"):
        assert [output_mode(mode, tied) for tied in (True, False)] == [mode, mode]


# ---- What the overlay cannot serve ---------------------------------------------------------------


@pytest.mark.parametrize("output_rows", ["auto", "separate"])
def test_a_table_may_be_shorter_than_its_tokenizer(output_rows):
    """As Gemma 3 1B's, by one row. That token has no logit, and none of the others changes."""
    model = make_model("gemma3", vocab_size=FIRST_NEW_ID - 2)
    rows = [random_rows(model, NUM_NEW, seed) for seed in (1, 2)[: 1 + (output_rows != "auto")]]
    overlay = WakeOverlay(model, FIRST_NEW_ID, *rows)
    reference = full_table_model(model, FIRST_NEW_ID, *rows)
    overlay.install()
    stream = random_ids(81)
    stream[(stream >= FIRST_NEW_ID - 2) & (stream < FIRST_NEW_ID)] = 0
    x, y = stream[:-1].view(8, 10), stream[1:].view(8, 10)
    without = slice(FIRST_NEW_ID - 2, FIRST_NEW_ID)
    logits = reference(input_ids=x).logits.detach()
    logits[..., without] = -torch.inf
    with torch.no_grad():
        ours = model(input_ids=x).logits
    assert (ours[..., without] == -torch.inf).all() and ours.shape == logits.shape
    assert_close(ours.clamp(min=-1e9), logits.clamp(min=-1e9), 1e-5)
    loss = run_accumulate(overlay, StepBatch(1, x, y, overlay.base_embed(x), x, torch.arange(8)))
    assert loss == pytest.approx(nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()))
    with pytest.raises(UserError) as caught:
        check_ids(model, FIRST_NEW_ID, torch.tensor([3, FIRST_NEW_ID - 1, FIRST_NEW_ID]))
    assert str(caught.value) == (
        "corpus: it holds the token 256, for which Gemma3ForCausalLM has no row: its tables have"
        " 255 rows, its tokenizer 257 tokens; take that token out of the texts"
    )


def refusal(model: nn.Module) -> str:
    """The one line that refuses this model, which is then as it was before."""
    rows = [random_rows(model, 3, seed) for seed in (1, 2)]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    with pytest.raises(UserError) as caught:
        WakeOverlay(model, FIRST_NEW_ID, *rows).install()
    assert (model.get_input_embeddings(), model.get_output_embeddings()) == (embedding, head)
    assert model.config.vocab_size == TABLE_ROWS and len(caught.value.problems) == 1
    return str(caught.value)


def test_a_model_that_sees_what_follows_is_refused(monkeypatch):
    model = make_model("qwen2_untied")
    layer = model.model.layers[0]
    own = layer.forward

    def forward(hidden_states, *arguments, **keywords):
        return own(hidden_states.flip(1), *arguments, **keywords)

    monkeypatch.setattr(layer, "forward", forward)
    assert refusal(model) == (
        "Qwen2ForCausalLM lets a token see those that follow it; the overlay serves causal language"
        " models"
    )


@pytest.mark.parametrize("error", [RuntimeError, IndexError, AttributeError])
def test_what_a_models_own_code_raises_becomes_one_line(monkeypatch, error):
    model = make_model("qwen2_untied")

    def forward(*_, **__):
        raise error("sizes\ndiffer")

    monkeypatch.setattr(model.model.layers[1], "forward", forward)
    assert refusal(model) == (
        f"Qwen2ForCausalLM fails in a pass over eight tokens ({error.__name__}: sizes differ); the"
        " overlay serves causal language models with one embedding and one linear head"
    )


def test_a_model_in_which_the_library_finds_no_embedding_is_refused(monkeypatch):
    model = make_model("qwen2_untied")

    def fail():
        raise NotImplementedError("not auto-handled")

    monkeypatch.setattr(model, "get_input_embeddings", fail)
    with pytest.raises(UserError, match="^Qwen2ForCausalLM has no input embedding and output head"):
        check_model(model)


def test_a_model_that_keeps_the_size_of_its_last_batch_is_refused(monkeypatch):
    """As RecurrentGemma in transformers 4.57.6, which trains until a micro-batch is smaller."""
    model = make_model("qwen2_untied")
    layer, state = model.model.layers[0], []
    own = layer.forward

    def forward(hidden_states, *arguments, **keywords):
        last = state[-1] if state else hidden_states
        state.append(hidden_states.detach())
        return own(torch.stack([hidden_states, 0 * last]).sum(0), *arguments, **keywords)

    monkeypatch.setattr(layer, "forward", forward)
    assert "fails in a pass over eight tokens (RuntimeError: stack expects each" in refusal(model)


def test_a_model_that_rounds_otherwise_in_another_batch_is_served(monkeypatch):
    """Kernels for another size do: through 48 layers in bfloat16 the logits differed by 0.05."""
    model = make_model("qwen2_untied")
    layer = model.model.layers[0]
    own = layer.forward

    def forward(hidden_states, *arguments, **keywords):
        return own(hidden_states * (1 + 0.05 * len(hidden_states)), *arguments, **keywords)

    monkeypatch.setattr(layer, "forward", forward)
    rows = [random_rows(model, 3, seed) for seed in (1, 2)]
    WakeOverlay(model, FIRST_NEW_ID, *rows).install()


def test_a_model_that_makes_its_logits_from_the_base_table_is_refused(monkeypatch):
    model = make_model("qwen2_tied")

    class OwnHead(type(model)):
        def forward(self, input_ids, **keywords):
            out = self.model(input_ids, use_cache=False)
            logits = out.last_hidden_state @ self.model.embed_tokens.weight.T
            return SimpleNamespace(logits=logits)

    model.__class__ = OwnHead
    assert refusal(model) == (
        "OwnHead gives 264 logits for 260 tokens; the overlay serves causal language models with"
        " one embedding and one linear head"
    )


class DoublingLinear(nn.Linear):
    """This head is a Linear and computes something else."""

    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


class ShiftedEmbedding(nn.Embedding):
    """The vectors of this embedding are not its rows."""

    def forward(self, input_ids):
        return 1 + super().forward(input_ids)


@pytest.mark.parametrize("part", ["embed_tokens", "lm_head"])
def test_a_layer_that_computes_something_of_its_own_is_refused(part):
    model = make_model("qwen2_untied")
    layer, kind = {
        "embed_tokens": (model.model.embed_tokens, ShiftedEmbedding),
        "lm_head": (model.lm_head, DoublingLinear),
    }[part]
    layer.__class__ = kind
    with pytest.raises(UserError, match=f"^Qwen2ForCausalLM has a {kind.__name__} "):
        WakeOverlay(model, FIRST_NEW_ID, random_rows(model, 2, 0)).install()
    assert model.config.vocab_size == TABLE_ROWS


def test_a_refused_model_is_given_back_untouched():
    overlay = make_overlay(output_rows="shared")
    model = overlay.model
    overlay.formulas = [HeadFormula(softcap=1.0)]  # as if the model's config said so
    with pytest.raises(UserError, match="^Qwen2ForCausalLM computes logits from its hidden"):
        overlay.install()
    assert model.config.vocab_size == TABLE_ROWS
    assert type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding


def test_a_model_without_a_list_of_layers_is_refused():
    model = make_model("qwen2_untied")
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(UserError) as caught:
        WakeOverlay(model, FIRST_NEW_ID, random_rows(model, NUM_NEW, 1))
    assert str(caught.value) == (
        "Qwen2ForCausalLM has no list of decoder layers beside its embedding; the overlay serves"
        " causal language models with one embedding and one linear head"
    )


def test_an_embedding_with_max_norm_is_refused():
    model = make_model("qwen2_untied")
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(UserError) as caught:
        check_model(model)
    assert str(caught.value) == (
        "Qwen2ForCausalLM has a Embedding as input embedding; the overlay serves causal language"
        " models with one embedding and one linear head"
    )


# ---- Quantized heads -----------------------------------------------------------------------------


@pytest.mark.parametrize("double_quantization", [False, True])
def test_a_4_bit_head_is_read_as_bitsandbytes_reads_it(double_quantization):
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    head = bnb.nn.Linear4bit(
        64, 96, bias=False, quant_type="nf4", compute_dtype=torch.float32,
        compress_statistics=double_quantization,
    )  # fmt: skip
    head.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=double_quantization
    )
    head = head.to("cpu")
    assert head.weight.dtype == torch.uint8  # it really is quantized
    ours = dense_weight(head)
    truth = bnb.functional.dequantize_4bit(head.weight.data, head.weight.quant_state)
    assert ours.shape == (96, 64) and torch.equal(ours, truth)
    assert 0.01 < (ours - weight).abs().mean() < 0.2
    # The layer itself computes the same, by its own kernel.
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(hidden @ ours.T, head(hidden), rtol=1e-4, atol=1e-4)


def test_an_8_bit_head_is_refused():
    bnb = pytest.importorskip("bitsandbytes")
    head = bnb.nn.Linear8bitLt(64, 96, bias=False, has_fp16_weights=False)
    head.weight.data = head.weight.data.to(torch.int8)
    with pytest.raises(UserError) as caught:
        dense_weight(head)
    assert str(caught.value) == (
        "Linear8bitLt holds torch.int8 weights; the overlay reads float or NF4 tables: load the"
        " model with quantization nf4 or none"
    )


def test_rows_are_added_to_the_same_bits_by_several_threads():
    """Thirty sums by two threads are the same bits, and the float64 sum to rounding."""
    torch.manual_seed(0)
    place, rows = torch.randint(0, 40, (2048,)), torch.randn(2048, 512)
    truth = torch.zeros(40, 512, dtype=torch.float64).index_add_(0, place, rows.double())
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sums = []
        for _ in range(30):
            sums.append(torch.zeros(40, 512))
            overlay_module.add_rows_(sums[-1], place, rows)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, sums[0]) for one in sums)
    assert torch.allclose(sums[0].double(), truth, atol=1e-4)
