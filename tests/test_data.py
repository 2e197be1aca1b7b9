"""The text is cut, ordered and measured as promised: right values by hand or from transformers.

    python -m pytest tests/test_data.py

Nothing here asks the function under test for the wanted value. The order of the data is looked at
where training gets it, in `prepare_step`.
"""

import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import (
    CPU, FIRST_NEW_ID, NUM_NEW, full_table_model, make_model, make_overlay, make_tokenizer,
    save_folder, tiny_settings,
)  # fmt: skip
from tokenizers import Tokenizer, processors
from torch.nn import functional
from transformers import AutoModelForCausalLM

import machine
import train
from config import Config, UserError
from extend_tokenizer import pieces, plan_new_words, read_corpus

VOCAB_SIZE = FIRST_NEW_ID + NUM_NEW


def config_of(**changes) -> Config:
    names = dict.fromkeys(("model_name", "lexicon", "corpus", "run_dir"), "not read")
    return Config(**names | {"seq_len": 4, "effective_batch_size": 6} | changes)


# ---- The held-out split --------------------------------------------------------------------------


def test_the_held_out_text_is_the_end_of_each_tenth():
    """Of 100 letters and a fraction of 0.3, the last three of every ten."""
    text = "".join(chr(0x4E00 + i) for i in range(100))
    held_out = "".join(c for i, c in enumerate(text) if i % 10 in (7, 8, 9))
    train_text = "".join(c for i, c in enumerate(text) if i % 10 < 7)
    assert train.split_text(text, 0.3) == (train_text, held_out)


@pytest.mark.parametrize("line_end, cut", [(89, 90), (90, 91), (95, 96), (96, 90)])
def test_a_cut_waits_for_a_line_end_within_a_twentieth_of_a_piece(line_end, cut):
    """Pieces of 100 characters are to be cut at 90; a line end among the next six is preferred."""
    piece = "a" * line_end + "\n" + "b" * (99 - line_end)
    train_text, val_text = train.split_text(piece * 10, 0.1)
    # The cut between two pieces waits as well, and finds no line end.
    assert (train_text, val_text) == (piece[:cut] * 10, piece[cut:] * 10)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    lines=st.lists(st.integers(0, 30), max_size=60),
    val_fraction=st.floats(0, 0.5, exclude_min=True),
    last_line_ends=st.booleans(),
)
def test_no_character_is_lost_or_in_both_halves(lines, val_fraction, last_line_ends):
    """Every letter of the text is another one, so a half says from where it took each."""
    letters = map(chr, range(0x4E00, 0xA000))
    text = "\n".join("".join(next(letters) for _ in range(size)) for size in lines)
    text += "\n" * last_line_ends
    halves = train.split_text(text, val_fraction)
    assert Counter(halves[0]) + Counter(halves[1]) == Counter(text)
    for half in halves:
        kept = half.replace("\n", "")
        assert kept == "".join(sorted(kept))
    # No cut is further than a twentieth of a piece from where it should be, rounding aside.
    assert abs(len(halves[1]) - val_fraction * len(text)) <= 10 * (len(text) / 200 + 2)


def test_each_file_has_its_share_and_no_token_of_one_half_is_in_the_other(tmp_path):
    """Decoded, the two streams are the two halves of each file; a changed text has another hash."""
    for name, letter, lines in (("one", "é", 50), ("two", "€", 100)):
        text = "".join(f"{letter} {i:02} glimock\n" for i in range(lines))
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    values = tiny_settings(tmp_path, val_fraction=0.2, seq_len=8)
    values["corpus"] = [str(tmp_path / "one.txt"), str(tmp_path / "two.txt")]
    config = Config(**values)
    texts = read_corpus(config)
    words = plan_new_words(config, texts)
    data = train.load_data(config, words, texts)
    decoded = [words.tokenizer.decode(part.tolist()) for part in (data.train, data.val)]
    for number, letter in enumerate("é€"):
        mine = texts[number].splitlines()
        found = [[line for line in half.splitlines() if letter in line] for half in decoded]
        assert sorted(found[0] + found[1]) == sorted(mine)
        assert len(found[1]) == len(mine) / 5
    assert data.val_text == decoded[1]
    assert (data.train >= FIRST_NEW_ID).sum() == 120 and (data.val >= FIRST_NEW_ID).sum() == 30
    other = train.load_data(config, words, [texts[0], texts[1] + " "])
    moved = train.load_data(config, words, [texts[0] + texts[1][:9], texts[1][9:]])
    assert len({data.sha256, other.sha256, moved.sha256}) == 3


def test_a_text_of_one_sequence_needs_a_token_more_for_its_last_target():
    """Both halves of the text have 50 tokens, one a byte."""
    words = SimpleNamespace(tokenizer=make_tokenizer(), bos_id=None)
    data = train.load_data(config_of(val_fraction=0.5, seq_len=49), words, ["a" * 100])
    assert train.count_sequences(data.train, 49) == train.count_sequences(data.val, 49) == 1
    with pytest.raises(UserError) as caught:
        train.load_data(config_of(val_fraction=0.5, seq_len=50), words, ["a" * 100])
    assert str(caught.value) == (
        "corpus: the train text has 50 tokens, fewer than a sequence of 50 and its last target;"
        " give more text or lower seq_len"
    )


def test_a_text_in_several_pieces_has_the_ids_and_places_of_the_whole_one():
    tokenizer, text = make_tokenizer(), "été là 😀 nr 7\n" * 10_000
    assert len(pieces(text)) == 3  # of 65,536 characters and more
    ids, ends = train.encode_text(tokenizer, text)
    whole = tokenizer.encode(text, add_special_tokens=False)
    assert ids.tolist() == whole.ids and ends.tolist() == [end for _, end in whole.offsets]


# ---- Sequences and epochs ------------------------------------------------------------------------


def test_targets_are_the_inputs_shifted_by_one_and_bos_takes_the_first_place():
    stream = torch.arange(11)
    assert [train.count_sequences(torch.arange(n), 5) for n in (5, 6, 10, 11)] == [0, 1, 1, 2]
    x, y = train.sequences(stream, torch.tensor([1, 0]), 5, None)
    assert x.tolist() == [[5, 6, 7, 8, 9], [0, 1, 2, 3, 4]]
    assert y.tolist() == [[6, 7, 8, 9, 10], [1, 2, 3, 4, 5]]
    x, y = train.sequences(stream, torch.tensor([1, 0]), 5, 99)
    assert x.tolist() == [[99, 6, 7, 8, 9], [99, 1, 2, 3, 4]]
    assert y.tolist() == [[6, 7, 8, 9, 10], [1, 2, 3, 4, 5]]
    assert stream.tolist() == list(range(11))


class NoOverlay:
    base_embed = staticmethod(lambda x: x)


def inputs_of_steps(config: Config, num_steps: int, num_sequences: int, world: int) -> list[int]:
    """List the first input of each sequence of the steps, as training gets them, rank by rank."""
    stream = torch.arange(num_sequences * config.seq_len + 3)  # three tokens are no sequence
    data, firsts = train.Data(stream, stream, stream, "", None, ""), []
    for step in range(1, num_steps + 1):
        for rank in range(world):
            worker = machine.Worker(rank, world, torch.device("cpu"), torch.float32, "")
            batch = train.prepare_step(step, NoOverlay, data, config, worker)
            assert len(batch.x) == config.effective_batch_size // world
            assert torch.equal(batch.y, batch.x + 1)
            firsts += batch.x[:, 0].tolist()
    return firsts


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("num_sequences", [4, 6, 10, 61])
def test_every_sequence_comes_once_an_epoch_and_in_another_order_each_epoch(num_sequences, world):
    """For steps that end with an epoch, lie in two epochs, and hold more than an epoch."""
    config, epochs = config_of(), 4
    num_steps = -(-epochs * num_sequences // 6)
    firsts = inputs_of_steps(config, num_steps, num_sequences, world)
    starts = range(0, epochs * num_sequences, num_sequences)
    orders = [tuple(firsts[start : start + num_sequences]) for start in starts]
    for order in orders:
        assert sorted(order) == [4 * i for i in range(num_sequences)]
    assert len(set(orders)) == epochs or (num_sequences == 4 and len(set(orders)) > 1)
    assert firsts == inputs_of_steps(config, num_steps, num_sequences, 1)
    again = inputs_of_steps(config_of(seed=43), num_steps, num_sequences, world)
    assert again != firsts
    # The next seed does not begin with an order of this one.
    assert tuple(again[:num_sequences]) not in orders[1:] or num_sequences == 4


# ---- Losses --------------------------------------------------------------------------------------


def silent_overlay():
    """Make an overlay whose logits are all zero: every token has the probability 1 / VOCAB_SIZE."""
    overlay = make_overlay()
    with torch.no_grad():
        overlay.base_rows.zero_()
        overlay.output_rows.zero_()
    return overlay


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
def test_bits_per_byte_count_the_bytes_of_letters_of_one_to_four_bytes(micro_batch_size):
    """Each character is a token. 25 of them hold four sequences of five targets, "é" to "a" """
    text = "aé€😀b" * 5
    data = train.Data(
        train=torch.zeros(9), val=torch.arange(25) % 5 + FIRST_NEW_ID - 2,
        val_ends=torch.arange(1, 26), val_text=text, bos_id=None, sha256="",
    )  # fmt: skip
    config = config_of(seq_len=5)
    found = train.held_out_loss(silent_overlay(), data, config, CPU, micro_batch_size)
    assert found["val_loss"] == pytest.approx(math.log(VOCAB_SIZE))
    # Four times a (1 byte), é (2), € (3), 😀 (4), b (1): 44 bytes, and 20 characters.
    assert found["val_bits_per_byte"] == pytest.approx(20 * math.log2(VOCAB_SIZE) / 44)


@pytest.mark.parametrize("bos_id", [None, 7])
def test_the_held_out_loss_of_each_kind_of_target_is_transformers_own(bos_id):
    overlay, config = make_overlay(), config_of(seq_len=6)
    generator = torch.Generator().manual_seed(5)
    val = torch.randint(FIRST_NEW_ID - 30, VOCAB_SIZE, (6 * 7 + 4,), generator=generator)
    ends = torch.arange(1, len(val) + 1)
    data = train.Data(val, val, ends, "a" * len(val), bos_id, "")
    x, y = val[:42].view(7, 6).clone(), val[1:43].view(7, 6)
    if bos_id is not None:
        x[:, 0] = bos_id
    full = full_table_model(make_model("qwen2_untied"), FIRST_NEW_ID, *parts_of(overlay))
    with torch.no_grad():
        logits = full(input_ids=x).logits.double().flatten(0, 1)
    losses = functional.cross_entropy(logits, y.flatten(), reduction="none").view(7, 6)
    is_new = y >= FIRST_NEW_ID
    found = train.held_out_loss(overlay, data, config, CPU, 3)
    assert found == pytest.approx(
        {
            "val_loss": losses.mean().item(),
            "val_bits_per_byte": losses.sum().item() / math.log(2) / 42,
            "val_loss_new_words": losses[is_new].mean().item(),
            "val_loss_ordinary": losses[~is_new].mean().item(),
        },
        rel=1e-5,
    )


def parts_of(overlay) -> tuple:
    return overlay.input_rows.detach(), overlay.output_rows.detach()


def folder_with_bos(folder, bos: bool) -> dict:
    """Write a model folder and a text with letters of one to four bytes -> Config's keys."""
    values = tiny_settings(folder, val_fraction=0.5, seq_len=6)
    if bos:
        tokenizer = make_tokenizer()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", FIRST_NEW_ID - 1)]
        )
        tokenizer.save(str(folder / "model" / "tokenizer.json"))
    text = "".join(f"é glimock € borish {i} 😀\nno vashump\n" for i in range(12))
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    return values


@pytest.mark.parametrize("bos", [False, True])
def test_the_base_models_bits_are_transformers_own_on_the_same_characters(tmp_path, bos):
    """What our first token of a sequence covers is context of both models, or BOS is."""
    config = Config(**folder_with_bos(tmp_path, bos))
    texts = read_corpus(config)
    words = plan_new_words(config, texts)
    data = train.load_data(config, words, texts)
    assert data.bos_id == (FIRST_NEW_ID - 1 if bos else None)
    assert FIRST_NEW_ID - 1 not in {*data.train.tolist(), *data.val.tolist()}
    overlay = make_overlay()
    overlay.install()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    ends, nats, num_bytes = data.val_ends.tolist(), 0.0, 0
    for first in range(0, (len(ends) - 1) // 6 * 6, 6):
        # Our token may be the second byte of a letter; then the letter is the context.
        start = min(ends[first - 1], ends[first] - 1) if first else 0
        context = data.val_text[start : ends[first]]
        text = data.val_text[ends[first] : ends[first + 6]]
        num_bytes += len(text.encode())
        before = [FIRST_NEW_ID - 1] if bos else tokenizer.encode(context).ids
        targets = tokenizer.encode(text, add_special_tokens=False).ids
        ids = torch.tensor([before + targets])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(before) - 1 : -1].double()
        nats += functional.cross_entropy(logits, torch.tensor(targets), reduction="sum").item()
    found = train.base_bits_per_byte(overlay, data, config, CPU, 4, words.base)
    assert found == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def records_of(config: Config) -> list[dict]:
    with open(f"{config.run_dir}/metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_the_logged_loss_is_nats_per_predicted_token(tmp_path, quick, micro_batch_size):
    """A model that knows nothing has ln(vocabulary) in each record, and its bits in the base's."""
    values = tiny_settings(tmp_path, max_steps=1, micro_batch_size=micro_batch_size)
    model = make_model("qwen2_untied")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    save_folder(model, tmp_path / "model")
    config = Config(**values)
    train.train(config)
    before, step, _ = records_of(config)
    assert step["loss"] == pytest.approx(math.log(VOCAB_SIZE))
    for name in ("val_loss", "val_loss_new_words", "val_loss_ordinary", "uniform_loss"):
        assert before[name] == pytest.approx(math.log(VOCAB_SIZE))
    # The base tokenizer has one token a byte, and the base's table 264 rows.
    assert before["base_bits_per_byte"] == pytest.approx(math.log2(264))
    assert step["tokens_per_second"] * step["step_seconds"] == pytest.approx(4 * 16)


def test_a_run_that_is_worse_than_a_guess_or_than_the_base_is_warned_of(
    tmp_path, quick, monkeypatch
):
    bad, good = ({"val_loss": loss, "val_bits_per_byte": bits} for loss, bits in ((6, 99), (5, 1)))
    kinds = {"val_loss_new_words": 1.0, "val_loss_ordinary": 1.0}
    results = iter([bad | kinds, good | kinds])
    monkeypatch.setattr(train, "held_out_loss", lambda *_: next(results))
    monkeypatch.setattr(train, "base_bits_per_byte", lambda *_: 2.25)
    config = Config(**tiny_settings(tmp_path, max_steps=1))
    train.train(config)
    before, _, after = records_of(config)
    assert before["warnings"] == [
        "above the uniform loss 5.62: worse than a blind guess",  # ln(277)
        "above the unextended base model's 2.250 bits/byte",
    ]
    assert after["warnings"] == []


# ---- Schedule and clipping -----------------------------------------------------------------------


def test_the_learning_rate_at_its_corners():
    """Up in a straight line over round(0.18 x 10) = 2 steps, down a cosine that would end at 11."""
    config = config_of(learning_rate=2.0, max_steps=10, warmup_ratio=0.18)
    rates = [train.learning_rate_at(step, config) for step in range(1, 11)]
    assert rates[:2] == [1.0, 2.0]
    assert rates[4] == pytest.approx(1.5)  # a third of the way: cos(60 degrees) = 1/2
    assert rates[7] == pytest.approx(0.5)  # two thirds
    assert rates[9] == pytest.approx(1 + math.cos(math.pi * 8 / 9))
    flat = config_of(learning_rate=2.0, max_steps=3, warmup_ratio=0.0)
    assert [train.learning_rate_at(s, flat) for s in (1, 2, 3)] == pytest.approx(
        [1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)]
    )
    climb = config_of(learning_rate=2.0, max_steps=4, warmup_ratio=1.0)
    assert [train.learning_rate_at(s, climb) for s in (1, 2, 3, 4)] == [0.5, 1.0, 1.5, 2.0]


def test_the_gradient_norm_is_that_of_all_rows_and_a_large_one_is_clipped_to_the_limit(
    tmp_path, quick
):
    """After one step Adafactor's statistics are the mean squares of the clipped gradient itself."""
    squares, norms = {}, {}
    for limit in (1e9, 0.01):
        values = {"max_steps": 1, "row_coupling": 0, "kin_coupling": 0, "max_grad_norm": limit}
        config = Config(**tiny_settings(tmp_path, **values | {"run_dir": f"{tmp_path}/{limit}"}))
        train.train(config)
        tensors = load_file(f"{config.run_dir}/snapshots/step_000001/rows.safetensors")
        norms[limit] = records_of(config)[1]["grad_norm"]
        sums = [tensors[f"{side}.row_mean_square"].double().sum().item() * 32
                for side in ("input_rows", "output_rows")]  # fmt: skip
        columns = [tensors[f"{side}.column_mean_square"].double().sum().item() * NUM_NEW
                   for side in ("input_rows", "output_rows")]  # fmt: skip
        assert min(sums) > 0 and columns == pytest.approx(sums, rel=1e-4)
        squares[limit] = sum(sums)
    assert norms[0.01] == norms[1e9] > 0.01
    assert math.sqrt(squares[1e9]) == pytest.approx(norms[1e9], rel=1e-5)
    assert math.sqrt(squares[0.01]) == pytest.approx(0.01, rel=1e-4)
