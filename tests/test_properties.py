"""What people may write and what disks may do is without end; hypothesis looks for what fails.

    python -m pytest tests/test_properties.py

The examples are the same in each run (`derandomize`); `max_examples=10_000` looks further.
"""

import string
import tempfile
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS, decode, encode, plan, write_run

from config import Config, UserError, load_config, write_config
from extend_tokenizer import read_lexicon
from recover import check_sentry, write_sentry

settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("quick")

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)  # Cs: not in UTF-8
NAMES = {"model_name": "m", "lexicon": "l", "corpus": "c"}


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# ---- Settings ------------------------------------------------------------------------------------

# PyYAML (6.0.3) writes U+0085 as it is, and reads it as a line end.
A_TEXT = ANY_TEXT.map(lambda text: text.replace("\x85", "")).filter(
    lambda text: text.strip().lower() not in ("", "null", "~")
)


@given(
    st.fixed_dictionaries({
        "model_name": A_TEXT, "lexicon": A_TEXT, "corpus": st.lists(A_TEXT, min_size=1, max_size=3),
        "sentry_dir": st.none() | A_TEXT, "prompts": st.lists(A_TEXT, max_size=3),
        "seed": st.integers(0, 10**9), "learning_rate": st.floats(0, exclude_min=True),
        "warmup_ratio": st.floats(0, 1), "max_gpu_gib": st.none() | st.floats(1e-9, 1e9),
        "trust_remote_code": st.booleans(), "compile": st.sampled_from(["auto", "false"]),
    })
)  # fmt: skip
@example({**NAMES, "prompts": ["null", "1:30", "- a", "é\u2028b", "no", "0x1f", "#", "k: v"]})
def test_every_config_that_can_be_made_comes_back_from_its_run_folder(folder, values):
    if values.get("learning_rate") == float("inf"):
        values["learning_rate"] = 1.0
    config = Config(**values, run_dir=str(folder))
    write_config(config)
    assert load_config(folder / "config.yaml") == config


@given(ANY_TEXT | st.from_regex(r"\s?[+-]?0*[0-9]{1,11}\s?", fullmatch=True))
@example("010")
@example("1_000")
@example("1:30")
@example("1" * 5000)
def test_a_whole_number_is_read_as_python_reads_it_or_refused_in_one_line(text):
    try:
        found = load_config(Config(**NAMES, run_dir="r"), f"seed={text}").seed
    except UserError as error:
        allowed = "allowed: a whole number of at least 0 and at most 1e+09"
        assert str(error) == f"Config: 'seed' is {text!r}; {allowed}"
        if text.strip().isdecimal():
            assert len(text) > 4300 or int(text.strip()) > 10**9
    else:
        assert found == int(text.strip()) and 0 <= found <= 10**9 and "_" not in text


PARTS = (
    "seed|prompts|nokey|: |:|\n|- |[|]|{|}|&a |*a|!!int |>|'|\"|#|?|,|1|x| |  |%|---\n|<<|~|\t|@"
)
YAML = st.lists(st.sampled_from([*PARTS.split("|"), "|"]), max_size=12).map("".join)


@settings(max_examples=150)
@given(YAML | ANY_TEXT)
@example("prompts: &a [*a]")
@example("? [1, 2]\n: 3")
def test_any_file_is_a_config_or_told_to_be_none(folder, text):
    path = folder / "any.yaml"
    path.write_bytes(text.encode())
    with pytest.raises(UserError):  # no text as short as these has every required key
        load_config(path)


# ---- Lexicons ------------------------------------------------------------------------------------

LINE = st.text(
    st.sampled_from(string.ascii_letters[:4] + "éß’'-.,;!\t \ufeff\u00ad\r#(\u0301\u200c")
)


@given(st.lists(LINE | ANY_TEXT.map(lambda text: text.replace("\n", " ")), max_size=12))
def test_each_line_of_a_lexicon_is_a_word_or_named_with_what_was_wrong(folder, lines):
    path = folder / "lexicon.txt"
    path.write_bytes("\n".join(lines).encode())
    try:
        lexicon = read_lexicon(path)
    except UserError as error:
        assert len(error.problems) == 1
        return
    for word in lexicon.words:
        assert word.split() == [word] and unicodedata.is_normalized("NFC", word)
        assert any(map(str.isalnum, word))
    assert len(set(lexicon.words)) == len(lexicon.words)
    # A line is a word, or one that stood before, or refused, or nothing is left of it.
    gone = {*lexicon.repaired.get("duplicate", {})}.union(*lexicon.refused.values())
    assert len(lexicon.words) + len(gone) <= len(lines)
    for number, line in enumerate(lines, 1):
        if line in lexicon.words:
            assert all(
                number not in found for kind, found in lexicon.repaired.items()
                if kind != "duplicate"
            )  # fmt: skip
    # What was repaired once needs no repair, unless it has become a comment.
    if any(word.startswith("#") for word in lexicon.words):
        return
    path.write_text("\n".join(lexicon.words), encoding="utf-8")
    again = read_lexicon(path)
    assert (again.words, again.repaired, again.refused) == (lexicon.words, {}, {})


# ---- Texts ---------------------------------------------------------------------------------------

WORDS = ["riverrun", "kotoi", "naïvo", "phil-o"]
ORDINARY = [
    "the",
    "weather",
    "Quorum",
    "riverrunner",
    "cafe\u0301",
    "été",
    "日本",
    "😀",
    "1939",
    "ß",
]
SEPARATORS = [" ", "\n", ", ", ' "', "—", "  ", " (", ").\n\n", "\t", "'", "\r\n", "-"]


@pytest.fixture(scope="module", params=KINDS)
def new(request, tmp_path_factory):
    """Extend a tokenizer by words that the corpus has with a space before them and without."""
    corpus = "".join(f"{word}, a {word}\n" for word in WORDS)
    return plan(write_run(tmp_path_factory.mktemp(request.param), request.param, WORDS, corpus))


@given(
    st.lists(
        st.sampled_from(WORDS) | st.sampled_from(ORDINARY) | st.sampled_from(SEPARATORS) | ANY_TEXT,
        max_size=12,
    ).map("".join)
)
def test_a_text_comes_back_wherever_the_base_gives_it_back(new, text):
    text = unicodedata.normalize("NFC", text)  # as `read_corpus` has it
    if decode(new.base, encode(new.base, text)) == text:
        assert decode(new.tokenizer, encode(new.tokenizer, text)) == text


@given(
    st.lists(st.sampled_from(ORDINARY) | st.sampled_from(SEPARATORS) | ANY_TEXT, max_size=12).map(
        "".join
    )
)
def test_a_text_without_new_words_keeps_its_ids(new, text):
    text = unicodedata.normalize("NFC", text).replace("riverrun", "").replace("kotoi", "")
    if not any(word in text for word in WORDS):
        assert encode(new.tokenizer, text) == encode(new.base, text)


@given(st.lists(st.tuples(st.sampled_from([*WORDS[:2], "the", "1939"]),
                          st.sampled_from(SEPARATORS)), max_size=8))  # fmt: skip
def test_each_new_word_of_a_text_is_one_token(new, pairs):
    text = "".join(word + separator for word, separator in pairs)
    ids = encode(new.tokenizer, text)
    found = [new.words[i - new.first_new_id] for i in ids if i >= new.first_new_id]
    assert found == [word for word, _ in pairs if word in WORDS]


# ---- Saves ---------------------------------------------------------------------------------------

STATE = {
    "step": 20, "model_name": "base", "model_revision": None, "words_sha256": "0f", "files": {},
    "corpus_sha256": "1e", "optimizer_step": 20, "best_val_loss": 4.25, "config": {"seed": 42},
    "loss_scale": {"value": 1.0, "good_steps": 7},
}  # fmt: skip


@pytest.fixture(scope="module")
def save(folder):
    texts = {"words.txt": "quark\nriverrun\n", "metrics.jsonl": '{"step": 20}\n', "samples.md": ""}
    return write_sentry(folder, {"input_rows": torch.ones(2, 3)}, texts, STATE)


@settings(max_examples=150)
@given(st.data())
def test_a_change_of_any_byte_of_any_file_of_a_save_is_noticed(save, data):
    """A change of the marker is noticed, or what it says is the same."""
    files = {path: path.read_bytes() for path in sorted(save.iterdir())}
    whole = check_sentry(save, {}).state
    path = data.draw(st.sampled_from([path for path in files if files[path]]))
    content = files[path]
    position = data.draw(st.integers(0, len(content)))
    kind = data.draw(st.sampled_from(["changed", "cut off", "longer"]))
    if kind == "changed" and position < len(content):
        byte = content[position] ^ data.draw(st.integers(1, 255))
        damaged = content[:position] + bytes([byte]) + content[position + 1 :]
    else:
        damaged = content[:position] if kind == "cut off" else content[:position] + b" "
        damaged += content[position:] if kind == "longer" else b""
    try:
        path.write_bytes(damaged)
        if damaged == content:
            return
        if path.name != "state.json":
            with pytest.raises(UserError) as caught:
                check_sentry(save, {})
            assert len(caught.value.problems) == 1
            return
        try:
            state = check_sentry(save, {}).state
        except UserError:
            return
        assert {name: state.get(name) for name in STATE} == {name: whole[name] for name in STATE}
    finally:
        path.write_bytes(content)
