"""Proves what a person reads of a run, letter by letter: progress, continued prompts, loss table.

python -m pytest tests/test_records.py
"""

import dataclasses
import datetime
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
    config = dataclasses.replace(CONFIG, prompts=(prompt,))
    texts, share = train.sample(model, tokenizer, FIRST_NEW_ID, config, CPU)
    assert share == pytest.approx(sum(i >= FIRST_NEW_ID for i in more) / len(more))
    return texts[0]


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


def test_samples_show_the_untouched_model_first_and_the_last_step_last():
    samples = train.sample_section("The untouched model", ["one\n two", "three"])
    assert train.first_samples(samples) == [("The untouched model", "one two")]
    samples += train.sample_section("Step 10", ["four **x**", "five"], "New words: 3 %.\n\n")
    assert samples == (
        "## The untouched model\n\n> one two\n\n> three\n\n"
        "## Step 10\n\nNew words: 3 %.\n\n> four **x**\n\n> five\n\n"
    )
    wanted = [("The untouched model", "one two"), ("Step 10", "four **x**")]
    assert train.first_samples(samples) == wanted
    assert train.first_samples("## a\n\n> \x1b[2Jb\n\n") == [("a", "\ufffd[2Jb")]
    assert train.first_samples("") == []


def test_what_bits_per_byte_mean_in_words():
    assert train.what_bits_mean(1.5, 3.0) == (
        "bits per byte of held-out text: untouched 3.000, trained 1.500: the text surprises the"
        " trained model 50 % less than the untouched one"
    )
    assert train.what_bits_mean(3.3, 3.0) == (
        "bits per byte of held-out text: untouched 3.000, trained 3.300: worse by 10 %: do not use"
        " these rows; train longer, or on more text"
    )


EVALUATION = {
    "step": 2990, "val_loss": 14.6601, "val_bits_per_byte": 1.982, "base_bits_per_byte": 13.371,
    "val_loss_new_words": 11.81, "val_loss_ordinary": 14.52, "uniform_loss": 12.19, "warnings": [],
}  # fmt: skip
STEP = {
    "step": 2990, "loss": 14.7688, "learning_rate": 2e-3, "step_seconds": 6.852,
    "peak_vram_gib": 12.84,
}  # fmt: skip


def test_no_line_of_a_long_run_wraps_on_80_columns():
    line = f"{train.step_line(STEP, 3000)}  {datetime.timedelta(seconds=20559)} left"
    assert line == ("step 2990/3000  loss 14.7688  lr 2.0e-03  6.85 s/step  12.8 GiB  5:42:39 left")
    assert len(line) < 80 and all(
        len(text) < 80 for text in train.eval_line(EVALUATION).splitlines()
    )


# ---- Time ----------------------------------------------------------------------------------------


def progress_of(**changes) -> train.Progress:
    return train.Progress(CPU, dataclasses.replace(CONFIG, **changes), first_step=0)


@pytest.mark.parametrize(
    "max_steps, eval_every, save_every", [(100, 50, 20), (55, 10, 7), (9, 50, 4)]
)
def test_the_time_left_counts_steps_evaluations_and_saves(max_steps, eval_every, save_every):
    """As the loop does: an evaluation and a save come after their step, and after the last one."""
    progress = progress_of(max_steps=max_steps, eval_every=eval_every, save_every=save_every)
    progress.seconds = {"step": 2.0, "evaluation": 1000.0, "save": 100_000.0}
    for step in range(1, max_steps + 1):
        to_come = range(step, max_steps + 1)
        evaluations = sum(n % eval_every == 0 or n == max_steps for n in to_come)
        saves = sum(n % save_every == 0 or n == max_steps for n in to_come)
        wanted = 2 * (max_steps - step) + 1000 * evaluations + 100_000 * saves
        assert progress.left(step).total_seconds() == wanted


def test_what_was_timed_is_expected_again_and_a_slow_first_step_is_forgotten(monkeypatch):
    progress, clock = progress_of(max_steps=300, eval_every=300), iter([10.0, 17.0])
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    assert progress.timed("evaluation", lambda: "record") == "record"
    assert progress.seconds["evaluation"] == 7.0
    progress.step(1, "", 60.0)
    assert progress.left(1).total_seconds() == 299 * 60 + 7
    for step in range(2, 101):
        progress.step(step, "", 1.0)
        assert progress.left(step).total_seconds() == 7 + (300 - step) * (30.5 if step == 2 else 1)
    for step in range(101, 113):  # another program shares the machine from here on
        progress.step(step, "", 2.0)
    assert progress.left(112).total_seconds() == 7 + 188 * 2


@pytest.mark.parametrize("rank, terminal", [(0, False), (0, True), (1, False), (1, True)])
def test_progress_is_lines_of_the_first_process_and_a_bar_on_its_terminal(
    rank, terminal, capsys, monkeypatch
):
    """Under torchrun all processes write to one terminal, so the others say nothing."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    config = dataclasses.replace(CONFIG, max_steps=4, log_every=2)
    progress = train.Progress(dataclasses.replace(CPU, rank=rank), config, first_step=0)
    progress.step(1, "step one", 1800.0)
    progress.step(2, "step two", 1800.0)
    progress.say("a word")
    progress.close()
    found = capsys.readouterr()
    assert found.out == ("" if rank else "step two  1:00:00 left\na word\n")
    assert ("2/4 [" in found.err) == ("1:00:00 left]" in found.err) == (terminal and not rank)
    assert terminal or not found.err


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_an_evaluation_that_takes_long_shows_that_it_goes_on(
    terminal, seconds, capsys, monkeypatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(train, "SLOW_LOOP_SECONDS", 0.5)
    numbers = []
    for item in train.shown(range(0, 40, 10), "evaluating", CPU):
        time.sleep(seconds)
        numbers.append(item)
    found = capsys.readouterr()
    slow = seconds > 0
    assert numbers == [0, 10, 20, 30]
    assert found.out == ("evaluating: 2 of 4\n" if slow and not terminal else "")
    assert ("evaluating" in found.err) == (slow and terminal)
