"""Proves what the sample promises: a lexicon and a corpus that fit each other, and a small model.

    python -m pytest tests/test_sample.py        (3 seconds, offline)

That the remaining words are ordinary English cannot be shown offline;
configs/sample/model/README.md says how it was checked.
"""

import json
import re
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

SAMPLE = Path(__file__).parent.parent / "configs" / "sample"
MODEL = SAMPLE / "model"
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


@cache
def read_lexicon() -> list[str]:
    """Read the lines of the lexicon, as they are."""
    return (SAMPLE / "lexicon.txt").read_text(encoding="utf-8").split("\n")[:-1]


@cache
def read_corpus() -> str:
    """Read the corpus, as it is."""
    return (SAMPLE / "corpus.txt").read_text(encoding="utf-8")


def find_words() -> list[tuple[str, int]]:
    """List each lexicon word in the corpus and its position, a possessive 's left out."""
    lexicon = set(read_lexicon())
    found = [(m.group().removesuffix("'s"), m.start()) for m in WORD.finditer(read_corpus())]
    return [(word, start) for word, start in found if word in lexicon]


def test_lexicon_is_one_clean_word_a_line():
    words = read_lexicon()
    assert len(words) >= 320
    assert len({word.lower() for word in words}) == len(words), "a word twice"
    for word in words:
        assert WORD.fullmatch(word), word
        assert unicodedata.is_normalized("NFC", word), word


def test_lexicon_has_accents_apostrophes_and_capitals():
    words = read_lexicon()
    assert sum(not word.isascii() for word in words) >= 6
    assert sum("'" in word for word in words) >= 3
    assert sum(word[0].isupper() for word in words) >= 10


def test_no_word_differs_from_another_only_by_its_first_letters_case():
    """A lexicon word that opens a sentence would be another string, and so no token."""
    lexicon = set(read_lexicon())
    others = {word.lower() for word in lexicon if word[0].islower()}
    seen = {match.group() for match in WORD.finditer(read_corpus())}
    assert not {word for word in seen - lexicon if word.lower() in others}


def test_corpus_is_paragraphs_of_clean_text():
    text = read_corpus()
    assert len(text.encode("utf-8")) >= 44_000
    assert unicodedata.is_normalized("NFC", text)
    assert text.endswith(".\n") and "\r" not in text and "\t" not in text and "  " not in text
    paragraphs = text[:-1].split("\n\n")
    assert len(paragraphs) >= 100
    assert not [p for p in paragraphs if "\n" in p or p != p.strip() or not p]


def test_each_word_is_met_four_times_in_three_tenths_of_the_text():
    counts: Counter[str] = Counter()
    tenths: dict[str, set[int]] = {}
    for word, start in find_words():
        counts[word] += 1
        tenths.setdefault(word, set()).add(10 * start // len(read_corpus()))
    assert not [word for word in read_lexicon() if counts[word] < 4]
    assert not [word for word in read_lexicon() if len(tenths[word]) < 3]


def test_more_than_a_quarter_of_the_words_are_invented():
    share = len(find_words()) / len(WORD.findall(read_corpus()))
    assert 0.27 < share < 0.36


def test_the_model_is_small_and_its_parts_fit():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 4_000_000
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 2000
    assert tokenizer.token_to_id("<|endoftext|>") == config["eos_token_id"] == 1999
    assert config["vocab_size"] - tokenizer.get_vocab_size() >= 30, "no padding rows"
    assert not config["tie_word_embeddings"]
    with safe_open(MODEL / "model.safetensors", "pt") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == [2048, 128]
    for name, shape in shapes.items():
        assert len(shape) == 1 or not any(size % 64 for size in shape), name


@pytest.mark.parametrize(
    "text", ["The king went to the river.\n\nSo it was.", "Nívvy's glööm  — ǅ"]
)
def test_the_models_tokenizer_returns_the_text(text):
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_no_lexicon_word_is_a_token_of_the_model_already():
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    for word in read_lexicon():
        assert len(tokenizer.encode(" " + word).ids) > 1, word
