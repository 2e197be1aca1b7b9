"""Proves what a person reads of a run, letter by letter: progress, continued prompts, loss table.

python -m pytest tests/test_records.py
"""

import dataclasses
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from tiny_models import CPU, FIRST_NEW_ID, make_tokenizer
from tokenizers import AddedToken

import train
from config import Config

CONFIG = Config(model_name="-", lexicon="-", corpus="-", run_dir="-")


def continue_with(prompt: str, *pieces: str | int) -> str:
    """Give what `sample` shows if the model continues the prompt by these texts and new ids."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(" glim", normalized=False)])
    assert tokenizer.token_to_id(" glim") == FIRST_NEW_ID
    more = [i for p in pieces for i in ([p] if isinstance(p, int) else tokenizer.encode(p).ids)]

    def generate(ids, **_):
        return torch.cat([ids, torch.tensor([more])], dim=1)

    model = SimpleNamespace(device=torch.device("cpu"), generate=generate)
    words = SimpleNamespace(tokenizer=tokenizer, first_new_id=FIRST_NEW_ID)
    return train.sample(model, dataclasses.replace(CONFIG, prompts=(prompt,)), words)[0]


def test_new_words_are_marked_with_their_blank_outside():
    found = continue_with("the river", FIRST_NEW_ID, " and", FIRST_NEW_ID, FIRST_NEW_ID, ".")
    assert found == "the river **glim** and **glim** **glim**."


def test_letters_of_several_bytes_come_out_whole():
    """Half a letter decodes to a replacement sign, and the next byte takes that back."""
    assert continue_with("naïve", " café", FIRST_NEW_ID, "é") == "naïve café **glim**é"


def test_sampling_leaves_the_random_state():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    continue_with("the river", " and")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_loss_table():
    facts = {"uniform_loss": 7.758, "base_bits_per_byte": 3.3714}
    evaluations = [
        {"val_loss": 6.06, "val_bits_per_byte": 1.982, "warnings": []},
        {"val_loss": 8.0, "val_bits_per_byte": 2.6, "warnings": ["above the uniform loss 7.76"]},
        {"val_loss": 4.66, "val_bits_per_byte": 1.524, "warnings": []},
    ]
    records = [{"kind": "eval", "step": 10 * i, **facts, **e} for i, e in enumerate(evaluations)]
    records.insert(1, {"kind": "train", "step": 9, "loss": 5.25})
    assert train.loss_table(records).splitlines() == [
        "| Step | Train | Val | Notes |",
        "|---|---|---|---|",
        "| 0 | - | 6.0600 | 1.982 bits/byte; base model 3.371, uniform loss 7.76; best |",
        "| 10 | 5.2500 | 8.0000 | 2.600 bits/byte; above the uniform loss 7.76 |",
        "| 20 | 5.2500 | 4.6600 | 1.524 bits/byte; best |",
    ]


@pytest.mark.parametrize("rank, terminal", [(0, False), (0, True), (1, False), (1, True)])
def test_progress_is_lines_of_the_first_process_and_a_bar_on_its_terminal(
    rank, terminal, capsys, monkeypatch
):
    """Under torchrun all processes write to one terminal, so the others say nothing."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    config = dataclasses.replace(CONFIG, max_steps=4, log_every=2)
    progress = train.Progress(dataclasses.replace(CPU, rank=rank), config, first_step=0)
    progress.began = time.monotonic() - 3600.0  # as if the two steps had taken an hour
    progress.step(1, "step one")
    progress.step(2, "step two")
    progress.say("a word")
    progress.close()
    found = capsys.readouterr()
    assert found.out == ("" if rank else "step two  1:00:00 left\na word\n")
    assert ("2/4" in found.err) == (terminal and not rank)
    assert terminal or not found.err
