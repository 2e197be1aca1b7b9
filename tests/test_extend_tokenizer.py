"""Proves that a lexicon word gets one token, ordinary text keeps its ids, and a saved folder loads.

    python -m pytest tests/test_extend_tokenizer.py        (40 s on 2 busy CPU cores, 2026-11-26)

The tokenizers are those of tiny_tokenizers.py. Figures on real vocabularies come from
tests/bench/check_vocabularies.py.
"""

import dataclasses
import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_tokenizers import (
    KINDS, TEXT, byte_level, contents, decode, encode, extended, plan, saved, write_run,
)  # fmt: skip
from tokenizers import Tokenizer, models

from config import Config, UserError, load_config
from extend_tokenizer import (
    Lexicon, any_of, base_tokenizer, extend, format_report, line_ranges, main, new_words_hash,
    pieces, read_corpus, read_lexicon, save_new_words,
)  # fmt: skip

ROOT = Path(__file__).parents[1]
ORDINARY = (
    TEXT + "Don't they?  Two  spaces, a_b, 3rd x2, (the) [other] the-other\n\n\tTabs\n 中文 🙂.\n"
)
# "wate", "thea": inside and at the start of ordinary words; the rest as people write them
LEXICON = [
    "wate", "riverrun", "paùpulation", "andrée's", "phiz-à-phiz", "arrah-na-poghue", "arrah", "é's",
    "naïvo", "日本", "кот", "Willingdone", "willingdone", "oe.g", "C++x", "x2y", "thea", "boa",
    "œuvré",
]  # fmt: skip
SENTENCES = [
    "{}", " {}", "{} ", "a {} b", "a {}, b", "({})", '"{}" said', "a\n{}\nb", "a\r\n{} b", "x{}y",
    "a  {}  b", "a {}y", "x{} b", "{0} {0}", "a-{}-b", "a {}'s", "_{}_", "the\u00a0{}\u00a0b",
    "1{}2", "🙂{}🙂",
]  # fmt: skip


@pytest.fixture
def make(tmp_path):
    """Give make(kind, **settings): the Config of a run with such a tokenizer, words and text."""

    def make(kind="qwen", lexicon=LEXICON, corpus=None, **keys):
        corpus = f"{ORDINARY}and {' and '.join(LEXICON)} came\n" if corpus is None else corpus
        return write_run(tmp_path, kind, lexicon, corpus, **keys)

    return make


# New words and their ids


@pytest.mark.parametrize("kind", ["qwen", "gpt2"])
def test_byte_level_ids_are_the_same_for_all_matchings(make, kind):
    base = KINDS[kind]()
    lexicon = ["there", *LEXICON, "harbour", "<|endoftext|>"]
    for matching in ("both", "spaced", "bare", "plain"):
        new = plan(make(kind, lexicon, corpus="\n".join(LEXICON), token_matching=matching))
        assert new.words[: new.num_words] == LEXICON and new.num_words == len(LEXICON)
        assert (len(new.words) > len(LEXICON)) == (matching == "both")
        assert len(new.lexicon.words) == len(LEXICON) + 2
        assert new.lexicon.refused == {"special token": {len(lexicon): "<|endoftext|>"}}
        assert new.first_new_id == base.get_vocab_size() == 382
        ids = [new.tokenizer.token_to_id(content) for content in contents(new)]
        assert ids == list(range(382, 382 + len(new.words)))
        assert new.tokenizer.get_vocab_size() == 382 + len(new.words)


@pytest.mark.parametrize("kind", ["llama2", "metaspace"])
def test_sentencepiece_words_are_known_as_whole_words(make, kind):
    base = KINDS[kind]()
    vocab = base.get_vocab()
    whole = [token[1:] for token in vocab if token[0] == "▁" and token[1:].isalpha()]
    whole = [word for word in whole if word not in vocab]
    parts = [token for token in vocab if token.isalpha() and "▁" + token not in vocab]
    assert len(whole) > 5 and len(parts) > 5
    lexicon = [*whole, *parts, "riverrun", "naïvo"]
    for rule in ("one_token", "exact_string"):  # entries without "▁" are pieces and no words
        new = extended(make(kind, lexicon, known_words=rule, token_matching="plain"))
        assert new.words == [*parts, "riverrun", "naïvo"] and new.report["known"] == len(whole)
        assert new.known_by_rule == {"one_token": len(whole), "exact_string": len(parts)}
        assert new.matching == "spaced"
    size = base.get_vocab_size()
    assert [new.tokenizer.token_to_id("▁" + word) for word in new.words] == list(
        range(size, size + len(new.words))
    )
    assert new.tokenizer.token_to_id("<pad>") == size - 1 == base.token_to_id("<pad>")


@pytest.mark.parametrize("matching", ["spaced", "bare", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_new_row_is_reached_and_decodes_to_its_word(make, kind, matching):
    new = plan(make(kind, token_matching=matching))
    for i, word in enumerate(new.words, new.first_new_id):
        ids = encode(new.tokenizer, f"a {word} b")
        assert i in ids
        if matching != "plain":
            assert decode(new.tokenizer, [i]).strip() == word
            assert sum(j >= new.first_new_id for j in ids) == 1
        if contents(new)[i - new.first_new_id][0] in " ▁":
            assert ids == [*encode(new.base, "a"), i, *encode(new.base, "a b")[1:]]


@pytest.mark.parametrize("matching", ["both", "spaced", "bare"])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_wherever_the_base_has_one(make, kind, matching):
    new = plan(make(kind, token_matching=matching))
    others = ["ordinary", "e\u0301a", "<|endoftext|>", "<0x41>", "</s>", "🙂", "a\u200db"]
    for sentence, word in itertools.product(SENTENCES, [*LEXICON, *others]):
        text = sentence.format(word)
        if decode(new.base, encode(new.base, text)) == text:
            assert decode(new.tokenizer, encode(new.tokenizer, text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_text_keeps_its_ids(make, kind):
    """Lexicon words inside ordinary ones included: "wat" in "water", "theat" in "theatre"."""
    bare = plan(make(kind, token_matching="bare"))
    assert encode(bare.tokenizer, ORDINARY) == encode(bare.base, ORDINARY)
    for text in ("foo<0x41>", "a<0x0A>b <0x0A>", "<unk", "  two   spaces", "▁", "²).", "x▁y"):
        assert encode(bare.tokenizer, text) == encode(bare.base, text)


def test_spaced_takes_the_space_in_unless_the_word_begins_a_longer_entry(make):
    vocab = byte_level().get_vocab()
    assert {"Ġweather", "ĠQuorum"} < set(vocab) and not {"wea", "quor", "Weather"} & set(vocab)
    new = plan(make(lexicon=["wea", "riverrun", "quor", "Weathe", "weatherly", "weà"]))
    assert contents(new) == ["wea", " riverrun", "quor", " Weathe", " weatherly", " weà"]
    assert encode(new.tokenizer, " weather") == encode(new.base, " weather")
    assert encode(new.tokenizer, "a wea b").count(new.first_new_id) == 1


def test_bare_writes_words_that_the_decoder_would_misread_with_their_space(make):
    words = ["riverrun", "naïvo", "日本", "кот", "œuvré"]
    new = plan(make(lexicon=words, token_matching="bare"))
    assert contents(new) == ["riverrun", " naïvo", "日本", "кот", "œuvré"]
    plain = plan(make(lexicon=words, token_matching="plain"))
    assert contents(plain) == words
    assert decode(plain.tokenizer, encode(plain.tokenizer, "a naïvo b")) != "a naïvo b"


def test_plain_is_what_add_tokens_does(make):
    new = plan(make(token_matching="plain"))
    reference = byte_level()
    reference.add_tokens(LEXICON)
    for sentence in SENTENCES:
        for word in LEXICON:
            text = sentence.format(word) + ORDINARY
            assert encode(new.tokenizer, text) == encode(reference, text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("matching", ["spaced", "bare"])
def test_spellings_are_the_base_ids_of_what_matches(make, kind, matching):
    new = plan(make(kind, token_matching=matching))
    for word, content, ids in zip(new.words, contents(new), new.spellings):
        before = "a" if content[0] in " ▁" else "\n"
        text = f"a {word}" if before == "a" else f"\n{word}"
        assert ids == encode(new.base, text)[len(encode(new.base, before)) :]


def test_compounds_match_whole_and_only_whole_in_sentencepiece(make):
    words = ["foo", "foo-bar", "foo-bar-baz", "don't-know", "a.b", "C++", "x_y"]
    new = plan(make("llama2", words, corpus="foo", token_matching="spaced"))
    first = new.first_new_id

    def found(text: str) -> list[int]:
        return [i - first for i in encode(new.tokenizer, text) if i >= first]

    assert found("a foo-bar-baz, foo-bar foo C++ x_y a.b don't-know.") == [2, 1, 0, 5, 6, 4, 3]
    assert found("a foo-bars foo-bar-bazzle xfoo-bar") == [0, 1]
    assert found("foos afoo C++x a.bc  foo") == []


def test_any_of_matches_the_longest_word():
    import re

    words = ["a", "ab", "abc-d", "abc-e", "b+", "é's"]
    pattern = re.compile(any_of(words))
    assert [pattern.match(w + "!")[0] for w in words] == words
    assert pattern.match("abc-x")[0] == "ab" and not pattern.match("xa")


def test_bos_id_is_what_the_base_puts_before_a_text(make):
    assert plan(make("qwen")).bos_id is None
    assert plan(make("llama2")).bos_id == 1


def test_hash_tells_words_order_and_first_id():
    value = new_words_hash(["é", "b"], 7)
    assert value == hashlib.sha256("7\né\nb".encode()).hexdigest()
    assert len({value, new_words_hash(["b", "é"], 7), new_words_hash(["é", "b"], 8)}) == 3


# Lexicon and corpus


def test_lexicon_repairs_and_refusals_by_line(make, tmp_path):
    lines = [
        "\ufeffriverrun", "willing\r", "\u00a0 outer\t", "cafe\u0301", "riverrun", "", "   ",
        "<|endoftext|>", "x<|im_start|>y", "two words", "nb\u00a0sp", "bell\x07", "zero\u200bwidth",
        "--", "🙂", "café", "نمی\u200cخواهم", "\ufeffсон", "क्\u200dष",
    ]  # fmt: skip
    new = plan(make(lexicon="\n".join(lines).encode()))
    assert new.lexicon.words == [
        "riverrun",
        "willing",
        "outer",
        "café",
        "نمی\u200cخواهم",
        "сон",
        "क्\u200dष",
    ]
    assert new.lexicon.repaired == {
        "byte order mark": {1: "\ufeffriverrun", 18: "\ufeffсон"},
        "carriage return": {2: "willing\r"}, "column after a tab": {3: "\u00a0 outer\t"},
        "outer blanks": {3: "\u00a0 outer", 7: "   "}, "not NFC": {4: "cafe\u0301"},
        "duplicate": {5: "riverrun", 16: "café"},
    }  # fmt: skip
    assert new.lexicon.refused == {
        "special token": {8: "<|endoftext|>", 9: "x<|im_start|>y"},
        "blanks inside; a token is one word, so give each word a line": {
            10: "two words", 11: "nb\u00a0sp",
        },
        "control character": {12: "bell\x07", 13: "zero\u200bwidth"},
        "no letter or digit": {14: "--", 15: "🙂"},
    }  # fmt: skip
    assert new.words == new.lexicon.words


def test_sentencepiece_refuses_its_sign_for_a_space(make):
    new = plan(make("llama2", ["river▁run", "riverrun"]))
    assert new.words == ["riverrun"] and new.lexicon.refused == {"special token": {1: "river▁run"}}


def test_line_ranges():
    assert line_ranges([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"
    assert line_ranges([5]) == "5"


def test_corpus_is_read_as_it_stands(make):
    assert read_corpus(make(corpus=b"\xef\xbb\xbfa\r\nb\rc\n")) == ["a\r\nb\rc\n"]


def test_pieces_cut_only_where_no_token_reaches_over(make):
    text = ("wall, \n\n  the waters\r\n\r\nthere...\n" * 9000)[:-1] + "  \n"
    parts = pieces(text)
    assert "".join(parts) == text and len(parts) == 5
    for kind in ("qwen", "gpt2"):
        base = KINDS[kind]()
        assert [i for part in parts for i in encode(base, part)] == encode(base, text)


def one_error(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        extended(config)
    assert not Path(config.run_dir).exists()
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
    return str(caught.value)


def test_error_lines(make, tmp_path):
    words, corpus, model = tmp_path / "words.txt", tmp_path / "corpus.txt", tmp_path / "model"
    assert one_error(make(lexicon=b"")) == (
        f"lexicon: {words}: no usable word (empty file); give one word a line"
    )
    assert one_error(make(lexicon=["--", "a b", "c d"])) == (
        f"lexicon: {words}: no usable word (no letter or digit: 1, blanks inside; a token is one "
        "word, so give each word a line: 2); give one word a line"
    )
    assert one_error(make(lexicon=b"ok\nr\xe9sum\n")) == (
        f"lexicon: {words}: not UTF-8: byte 0xe9 at offset 4, line 2; save it as UTF-8"
    )
    assert one_error(make(lexicon=["he", "water"])) == (
        f"{words}: the base vocabulary holds every word of the lexicon"
    )
    assert one_error(make(corpus="The weather was grey.\n")) == (
        f"{words}: none of its {len(LEXICON)} new words matches in the corpus (both "
        "matching); check that the two belong together"
    )
    assert (
        one_error(make(corpus=b"\xef\xbb\xbf \n"))
        == f"{corpus}: the corpus file is empty; give a text"
    )
    assert one_error(make(corpus=b"abc\xff")) == (
        f"corpus: {corpus}: not UTF-8: byte 0xff at offset 3, line 1; save it as UTF-8"
    )
    gone = tmp_path / "gone"
    for key in ("lexicon", "corpus"):
        config = dataclasses.replace(
            make(), **{key: (str(gone),) if key == "corpus" else str(gone)}
        )
        assert one_error(config) == f"{key}: {gone}: cannot be read: No such file or directory"
    config = dataclasses.replace(make(), model_name=str(gone))
    assert one_error(config) == f"model_name {str(gone)!r}: no such folder"
    config = make()
    (model / "tokenizer.json").unlink()
    assert one_error(config) == f"model_name {str(model)!r}: {model} holds no tokenizer"


def test_several_corpus_files_report_all_at_once(make, tmp_path):
    gone = tmp_path / "gone"
    with pytest.raises(UserError) as caught:
        read_corpus(make(corpus=b"", **{}))
    assert len(caught.value.problems) == 1
    config = dataclasses.replace(make(corpus=b""), corpus=(str(gone), str(tmp_path / "corpus.txt")))
    with pytest.raises(UserError) as caught:
        read_corpus(config)
    assert caught.value.problems == (
        f"corpus: {gone}: cannot be read: No such file or directory",
        f"{tmp_path / 'corpus.txt'}: the corpus file is empty; give a text",
    )


def test_damaged_tokenizers_are_refused(make, tmp_path):
    config, file = make(), tmp_path / "model" / "tokenizer.json"
    spec = json.loads(file.read_text(encoding="utf-8"))
    file.write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    assert one_error(config).startswith(
        f"model_name {config.model_name!r}: its tokenizer.json is damaged, or newer than the "
        "installed tokenizers package reads: "
    )
    spec["added_tokens"][-1]["id"] = 2000
    file.write_text(json.dumps(spec), encoding="utf-8")
    assert one_error(config) == (
        f"model_name {config.model_name!r}: its tokenizer.json gives '<|im_start|>' the id 2000,"
        " but when it is loaded the id is 381; repair its added_tokens, whose ids must follow the"
        " vocabulary without a gap"
    )


@pytest.mark.parametrize("highest", ["Q", "<|im_start|>"])
def test_ids_with_holes_keep_them(make, tmp_path, highest):
    """The new words come after the highest id, before and after loading, whoever has it."""
    config, file = make(), tmp_path / "model" / "tokenizer.json"
    spec = json.loads(file.read_text(encoding="utf-8"))
    vocab, added = spec["model"]["vocab"], spec["added_tokens"]
    vocab |= {token["content"]: token["id"] for token in added} | {highest: 2000}
    for token in added:
        token["id"] = vocab[token["content"]]
    file.write_text(json.dumps(spec), encoding="utf-8")
    new = saved(config)  # proves that the ids are the same when the folder is loaded
    assert new.first_new_id == 2001 and new.base.token_to_id(highest) == 2000
    text = ORDINARY + "".join(f"({form.content})" for form in new.forms) + " Q<|im_start|>"
    ids = encode(new.tokenizer, text)
    assert {i for i in ids if i > 2000} == set(range(2001, 2001 + len(new.forms)))
    assert decode(new.tokenizer, ids) == text and 2000 in ids
    text = "Thereafter they watched the wall"
    assert encode(new.tokenizer, text) == encode(new.base, text)


@pytest.mark.parametrize("kind", ["llama2", "metaspace"])
def test_the_name_of_a_byte_beside_a_new_word_stays_text(make, kind):
    new = plan(make(kind))
    text = "a riverrun<0x41> riverrun<0x0A>"
    ids = encode(new.tokenizer, text)
    assert sum(i >= new.first_new_id for i in ids) == 2
    assert decode(new.tokenizer, ids) == text


def test_other_tokenizer_types_are_refused(make, tmp_path):
    config = make()
    other = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    (tmp_path / "model" / "tokenizer.json").write_text(other.to_str(), encoding="utf-8")
    assert one_error(config) == (
        "the model's tokenizer is of type WordPiece; words can be added to byte-level BPE (Qwen, "
        "Llama 3, SmolLM2, GPT-2) and SentencePiece-style BPE (Llama-2, TinyLlama, Mistral v0.1)"
    )


# Lexicon from the corpus


def test_lexicon_from_corpus(make, tmp_path):
    corpus = f"{TEXT}Zyx-qvw zyx'qj Zyx-qvw. kjq\nkjq zyx'qj 'kjq' zyx'qj once-onzq 12345 12345 \n"
    keys = {"lexicon_min_count": 2, "lexicon_min_base_tokens": 3}
    config = dataclasses.replace(make(corpus=corpus), lexicon="from_corpus", **keys)
    base = base_tokenizer(config)
    new = plan(config)
    words = new.words[: new.num_words]
    assert words[:3] == ["zyx'qj", "kjq", "Zyx-qvw"]  # 3, 3 and 2 times; none of TEXT's short words
    assert not Path(config.run_dir).exists()
    spelled = len(encode(base, " kjq"))
    for least, is_in in ((spelled, True), (spelled + 1, False)):
        again = plan(dataclasses.replace(config, lexicon_min_base_tokens=least))
        assert ("kjq" in again.words) == is_in
    assert all(len(encode(base, " " + word)) >= 3 for word in words)
    assert all(corpus.count(word) >= 2 for word in words)
    assert saved(config).words[: len(words)] == words
    lexicon = Path(config.run_dir, "lexicon.txt")
    assert lexicon.read_bytes() == "".join(f"{word}\n" for word in words).encode()
    lexicon.write_text("zyx'qj\n\n", encoding="utf-8")  # people edit it
    assert saved(config).words == ["zyx'qj"] and lexicon.read_text("utf-8") == "zyx'qj\n\n"
    lexicon.unlink()
    with pytest.raises(UserError) as caught:
        extended(dataclasses.replace(config, lexicon_min_count=9))
    assert str(caught.value) == (
        "lexicon from_corpus: no word of the corpus occurs 9 times and takes 3 base tokens; lower "
        "lexicon_min_count or lexicon_min_base_tokens; for scripts without blanks between words "
        "give a lexicon file"
    )


# Report


def test_a_table_shorter_than_its_tokenizer_has_no_padding_rows(make):
    report = extended(make(model_config={"vocab_size": 381})).report
    assert report["base_size"] == 382
    assert (report["padding_rows"], report["new_ids_in_padding"]) == (0, 0)


def test_report_figures(make):
    corpus = "the riverrun, the riverrun weather wea was weas\nand wate water naïvo\n"
    lexicon = ["riverrun", "wea", "wate", "naïvo", "never", "he", "riverrun"]
    config = make(lexicon=lexicon, corpus=corpus, model_config={"vocab_size": 384})
    new = saved(config)
    report = new.report
    written = json.loads(Path(config.run_dir, "tokenizer/report.json").read_text("utf-8"))
    assert written == json.loads(json.dumps(report))
    expected = {
        "matching": "both", "base_size": 382, "lexicon_words": 6, "known": 1, "new_tokens": 5,
        "table_rows": 384, "padding_rows": 2, "new_ids_in_padding": 2, "total": 387,
        "expansion_percent": 1.31, "second_forms": 0, "lexicon": config.lexicon,
        "known_by_rule": {"one_token": 1, "exact_string": 1}, "words_decoding_wrongly": [],
        "repaired_lines": {"duplicate": {7: "riverrun"}}, "refused_lines": {},
        "load_with": "AutoTokenizer",
    }  # fmt: skip
    assert {key: report[key] for key in expected} == expected
    assert report["new_words_sha256"] == new_words_hash(new.words, 382)
    before = sum(len(encode(new.base, f" {word}")) for word in new.words) / 5
    assert report["tokens_per_new_word_before"] == round(before, 3)
    # "wea" and "wat" begin longer entries of the base: bare, two tokens
    assert contents(new) == [" riverrun", "wea", "wate", " naïvo", " never"]
    assert report["tokens_per_new_word_after"] == (1 + 2 + 2 + 1 + 1) / 5
    figures = report["corpus"]
    ids = encode(new.tokenizer, corpus)
    assert figures["tokens_before"] == len(encode(new.base, corpus))
    assert figures["tokens_after"] == len(ids)
    assert figures["new_tokens"] == sum(i >= 382 for i in ids) == 5
    assert (figures["new_words_seen_once"], figures["new_words_never_seen"]) == (3, 1)
    assert figures["bytes"] == len(corpus.encode())
    assert figures["ordinary_words"] == 7  # the the weather was weas and water
    assert figures["ordinary_words_changed"] == 0
    assert figures["exact_round_trip"] and figures["first_bad_line"] is None


def test_table_size_of_models_with_a_part_for_text(make):
    model_config = {"model_type": "gemma3", "text_config": {"vocab_size": 400}}
    assert extended(make(model_config=model_config)).report["table_rows"] == 400


def test_report_counts_ordinary_words_that_plain_cuts_up(make):
    corpus = "the water was riverrun\nthe Water a waters cold a b water wate\n"
    report = extended(
        make(lexicon=["wate", "riverrun"], corpus=corpus, token_matching="plain")
    ).report
    assert report["corpus"]["ordinary_words"] == 11
    assert report["corpus"]["ordinary_words_changed"] == 3
    assert report["corpus"]["ordinary_words_changed_examples"] == ["water", "waters"]


def test_report_says_where_the_round_trip_breaks(make, tmp_path):
    """It is the first of several such lines, here in the second of three pieces of the text."""
    many = "riverrun\n" * 8_000  # pieces have 65,536 characters and more
    config = make(
        corpus=f"{many}and so\na naïvo b\n{many}and so\nc naïvo\n", token_matching="plain"
    )
    report = extended(config).report
    assert report["words_decoding_wrongly"] == [
        "paùpulation", "andrée's", "phiz-à-phiz", "é's", "naïvo",
    ]  # fmt: skip
    assert report["corpus"]["first_bad_line"] == (
        f"{tmp_path / 'corpus.txt'}, line 8002: 'a naïvo b' comes back as 'a na\ufffdvo b'"
    )
    config = make("llama2", corpus="a riverrun\nx▁y\n")  # Llama-2 takes its sign for a space
    assert extended(config).report["corpus"]["first_bad_line"] == (
        f"{tmp_path / 'corpus.txt'}, line 2: 'x▁y' comes back as 'x y'; "
        "the base tokenizer is not exact either"
    )


def test_printed_report(make, tmp_path):
    corpus = "the riverrun, the riverrun water\nriverrun\n"
    words = tmp_path / "words.txt"
    lexicon = ["riverrun", "he", "two words", "riverrun", "w\u00e0s"]
    new = extended(make(lexicon=lexicon, corpus=corpus, model_config={"vocab_size": 383}))
    assert (
        format_report(new.report)
        == f"""\
| base vocabulary                   |       382 |
| words in lexicon                  |         3 |
| already known                     |         1 |
| new tokens                        |         2 |
| padding rows of the model's table |         1 |
| new ids that fall there           |         1 |
| final size                        |       384 |
| expansion                         |    0.52 % |
| second forms, without a space     |         1 |
| size with them                    |       385 |
both matching: 1.0 tokens per new word in a sentence, 5.5 before
lexicon: {words}
the base spells 1 of its words with one token in a sentence; 1 are entries of the base vocabulary \
as they stand
lexicon lines repaired, duplicate: 4: 'riverrun'
lexicon lines refused, blanks inside; a token is one word, so give each word a line: 3: 'two words'
corpus: 42 bytes, 26 tokens before, 9 after, 33.33% new; new words seen once 0, never 1 (words.tsv)
occurrences of new words: 3, of which one token 3 (100.00%)
warning: the lexicon hardly occurs in the corpus (33.33% of the tokens, 3 times); its rows will \
not learn much
ordinary words whose ids changed: 0 of 3 (0.00%): none
round trip of the corpus: exact"""
    )


def test_printed_report_says_what_else_there_is_to_know(make):
    text = format_report(extended(make("llama2")).report)
    assert "| padding rows of the model's table |   unknown |" in text
    assert "unknown: the model's folder has no config.json with a vocab_size" in text
    assert "both matching: 1.053 tokens per new word in a sentence, 6.684 before" in text
    text = format_report(
        extended(make(token_matching="plain", model_config={"vocab_size": 9})).report
    )
    assert "plain cuts up ordinary words, spaced and bare do not" in text
    assert "the model's table has only 9 rows" in text and "load the folder with" not in text
    assert "5 new words decode wrongly: paùpulation, andrée's, phiz-à-phiz, é's, naïvo" in text
    text = format_report(extended(make("gpt2", model_config={"model_type": "qwen2"})).report)
    assert text.endswith("load the folder with PreTrainedTokenizerFast.from_pretrained")


# Saving and loading


def files_of(config: Config) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(config.run_dir, "tokenizer").iterdir()}


def test_same_bytes_each_time(make):
    config = make()
    saved(config)
    first = files_of(config)
    assert set(first) == {"tokenizer.json", "tokenizer_config.json", "report.json", "words.tsv"}
    saved(config)
    assert files_of(config) == first
    assert [path.name for path in Path(config.run_dir).iterdir()] == ["tokenizer"]


@pytest.mark.parametrize(
    "name", ["os.rename", "os.replace", "os.fsync", "pathlib.Path.write_bytes"]
)
def test_a_save_that_fails_leaves_the_tokenizer_as_it_was(make, monkeypatch, name):
    config = make()
    saved(config)
    first = files_of(config)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(name, fail)
        with pytest.raises(UserError, match="run_dir .*: cannot be written: .*No space left"):
            saved(dataclasses.replace(config, token_matching="plain"))
    assert files_of(config) == first
    assert [path.name for path in Path(config.run_dir).iterdir()] == ["tokenizer"]


def test_extending_reads_the_corpus_nowhere_and_writes_nothing(make):
    config = make()
    texts = read_corpus(config)
    Path(config.corpus[0]).unlink()
    new = extend(config, texts)
    assert new.report["new_tokens"] == len(LEXICON)
    assert not Path(config.run_dir).exists()
    save_new_words(config, new)


@pytest.mark.parametrize("matching", ["spaced", "bare", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_words_table_says_what_each_row_is_made_of(make, kind, matching):
    lexicon = [*LEXICON, "neverseen"]
    config = make(kind, lexicon, token_matching=matching)
    new = saved(config)
    text = Path(config.run_dir, "tokenizer/words.tsv").read_bytes().decode("utf-8")
    header, *lines, end = text.split("\n")
    assert (header, end) == ("id\tword\tmatches\tbase_ids\tcount", "")
    ids, words, matches, base_ids, counts = zip(*(line.split("\t") for line in lines))
    first = new.base.get_vocab_size()
    assert list(map(int, ids)) == list(range(first, first + len(words)))
    assert list(words) == new.words and words[-1] == "neverseen" and len(words) > 10
    spellings = [list(map(int, text.split(" "))) for text in base_ids]
    assert spellings == new.spellings
    for word, match, spelling in zip(words, matches, spellings):
        assert match in (word, f" {word}")
        assert decode(new.base, spelling).strip() == word
        if match != word:  # in mid-sentence the base has these ids in this place
            before = len(encode(new.base, "a"))
            assert encode(new.base, f"a{match}")[before:] == spelling
        token = int(ids[words.index(word)])
        assert token in encode(new.tokenizer, f"a{match}" if match != word else f"({word}")
    in_corpus = encode(new.tokenizer, read_corpus(config)[0])
    assert list(map(int, counts)) == [in_corpus.count(int(i)) for i in ids]
    assert sum(map(int, counts)) == new.report["corpus"]["new_tokens"] and counts[-1] == "0"


def test_run_dir_that_cannot_be_written(make, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="run_dir .*file/run': cannot be written: .*directory"):
        saved(make(run_dir=str(tmp_path / "file" / "run")))


TEMPLATE = "{% for m in messages %}{{ m['content'] }}é{% endfor %}"
BASE_SETTINGS = {
    "tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True,
    "pad_token": {"content": "<pad>", "__type": "AddedToken"}, "unk_token": None,
    "extra_special_tokens": ["<|im_start|>"], "clean_up_tokenization_spaces": True,
    "auto_map": {"AutoTokenizer": ["x.Y", None]}, "chat_template": TEMPLATE,
    "model_max_length": 2048,
}  # fmt: skip


@pytest.mark.parametrize("beside", [None, "llama", "mistral", "qwen2"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_folder_loads_with_the_same_ids(make, kind, beside):
    """On the transformers that is installed; run_matrix.py runs it on old and new ones."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = BASE_SETTINGS | {
        "pad_token": "<|im_start|>" if kind in ("qwen", "gpt2") else "<pad>"
    }
    model_config = beside and {"model_type": beside, "vocab_size": 500}
    config = make(kind, settings=settings, model_config=model_config)
    Path(config.model_name, "tokenizer.model").write_bytes(b"scores")
    new = saved(config)
    folder = Path(config.run_dir, "tokenizer")
    for_llama_cpp = {"tokenizer.model", "added_tokens.json"} & {p.name for p in folder.iterdir()}
    assert len(for_llama_cpp) == (0 if kind in ("qwen", "gpt2") else 2)
    if for_llama_cpp:
        assert (folder / "tokenizer.model").read_bytes() == b"scores"
        texts = json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
        assert list(texts.values()) == list(range(new.first_new_id, new.tokenizer.get_vocab_size()))
        assert list(texts) == [content.replace("\u2581", " ") for content in contents(new)]
    if beside:
        (folder / "config.json").write_text(json.dumps(model_config), encoding="utf-8")
    # The one case where transformers 5 would take another pattern than tokenizer.json's.
    foreign = kind != "qwen" and beside == "qwen2"
    assert new.report["load_with"] == ("PreTrainedTokenizerFast" if foreign else "AutoTokenizer")
    loader = PreTrainedTokenizerFast if foreign else AutoTokenizer
    loaded = loader.from_pretrained(str(folder))
    texts = [sentence.format(word) for sentence in SENTENCES for word in LEXICON] + [
        ORDINARY,
        "</s>",
    ]
    for text in texts:
        assert loaded(text)["input_ids"] == new.tokenizer.encode(text).ids
        ids = encode(new.tokenizer, text)
        assert loaded.decode(ids) == decode(new.tokenizer, ids)
    assert len(loaded) == new.first_new_id + len(new.words)
    assert loaded.eos_token == ("</s>" if kind in ("llama2", "metaspace") else "<|endoftext|>")
    assert loaded.pad_token == settings["pad_token"] and loaded.chat_template == TEMPLATE
    assert loaded.model_max_length == 2048


def test_chat_template_file_and_special_tokens_map_are_kept(make, tmp_path):
    config = make(settings={"eos_token": None})
    model = tmp_path / "model"
    (model / "chat_template.jinja").write_bytes(TEMPLATE.encode())
    tokens = {
        "eos_token": {"content": "<|endoftext|>", "lstrip": False},
        "pad_token": "<|im_start|>",
    }
    (model / "special_tokens_map.json").write_text(json.dumps(tokens), encoding="utf-8")
    saved(config)
    files = files_of(config)
    assert files["chat_template.jinja"] == TEMPLATE.encode()
    settings = json.loads(files["tokenizer_config.json"])
    assert settings == {
        "eos_token": "<|endoftext|>", "pad_token": "<|im_start|>",
        "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip


# Where the base tokenizer comes from


def test_slow_tokenizer_files_go_through_transformers(make, tmp_path):
    config = make("gpt2")
    model = tmp_path / "model"
    base = Tokenizer.from_file(str(model / "tokenizer.json"))
    base.model.save(str(model))  # vocab.json and merges.txt
    (model / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<|endoftext|>"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (model / "config.json").write_text(
        '{"model_type": "gpt2", "vocab_size": 400}', encoding="utf-8"
    )
    new = extended(config)
    assert new.words == LEXICON and new.report["table_rows"] == 400
    for text in (ORDINARY, "a naïvo"):
        assert encode(new.base, text) == encode(base, text)


def test_hub_models_come_through_the_hub_cache(make, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision))
        if name == "some/where":
            return str(tmp_path / "model")
        raise LocalEntryNotFoundError("cannot reach\n the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    config = make(model_name="some/where", model_revision="v1")
    assert plan(config).words == LEXICON and asked == [("some/where", "v1")]
    assert one_error(dataclasses.replace(config, model_name="no/where")) == (
        "model_name 'no/where': no such folder, and the hub says: cannot reach the hub"
    )


# The command


def config_file(config: Config) -> Path:
    path = Path(config.lexicon).with_name("run.yaml")
    keys = {k: getattr(config, k) for k in ("model_name", "lexicon", "run_dir")}
    keys["corpus"] = list(config.corpus)
    path.write_text(json.dumps(keys), encoding="utf-8")
    return path


def test_main_prints_and_returns_and_leaves_the_resolved_config(make, capsys):
    """config.yaml is what recover.py reads, and itself a config of the same run."""
    config = make()
    new = main(str(config_file(config)), "token_matching=bare", "prompts=[the wat, é a]")
    assert new.matching == "bare"
    resolved = Path(config.run_dir, "config.yaml")
    given = load_config(config_file(config), "token_matching=bare", "prompts=[the wat, é a]")
    assert load_config(resolved) == given
    keys = [line.partition(":")[0] for line in resolved.read_text("utf-8").splitlines()]
    assert set(keys) >= {field.name for field in dataclasses.fields(Config)}
    assert capsys.readouterr().out == (
        f"{config.model_name} -> {config.run_dir}/tokenizer\n{format_report(new.report)}\n"
    )


def test_main_reads_each_corpus_file_once(make, monkeypatch):
    config, reads, read_bytes = make(), [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (reads.append(path), read_bytes(path))[1])
    main(str(config_file(config)))
    assert reads.count(Path(config.corpus[0])) == 1


def test_main_refuses_another_tokenizer_beside_saves(make):
    config = make()
    path, folder = str(config_file(config)), Path(config.run_dir)
    main(path)
    files, settings = files_of(config), (folder / "config.yaml").read_bytes()
    (folder / "snapshots" / "step_000020").mkdir(parents=True)
    for change in ("token_matching=plain", f"lexicon={folder / 'two.txt'}"):
        (folder / "two.txt").write_text("riverrun\nwat\n", encoding="utf-8")
        with pytest.raises(UserError) as caught:
            main(path, change)
        wrong = f"run_dir: {folder} holds saves with another tokenizer; give another"
        assert str(caught.value) == wrong and files_of(config) == files
    (folder / "tokenizer" / "report.json").write_text("{", encoding="utf-8")  # a damaged report
    main(path, "eval_every=1")  # is made again, and the run's settings stay as they were
    assert files_of(config) == files and (folder / "config.yaml").read_bytes() == settings


def test_command_exit_statuses(make, capsys):
    script, path = ROOT / "extend_tokenizer.py", config_file(make())

    def run(*arguments):
        return subprocess.run(
            [sys.executable, str(script), *map(str, arguments)],
            capture_output=True,
            encoding="utf-8",
        )

    main(str(path))
    assert "| new tokens " in capsys.readouterr().out
    wrong = run(path, "lexicon=/no/words.txt")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr == "lexicon: /no/words.txt: cannot be read: No such file or directory\n"
    assert run().returncode == 2


def test_no_transformers_and_no_torch_until_a_tokenizer_is_saved(make):
    code = (
        "import sys, extend_tokenizer as e; config = e.load_config(sys.argv[1]);"
        "print(e.format_report(e.extend(config, e.read_corpus(config)).report));"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules), 'heavy'"
    )
    command = [sys.executable, "-c", code, str(config_file(make()))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def test_extend_tokenizer_reads_a_lexicon_alone(tmp_path):
    (tmp_path / "w.txt").write_bytes(b"b\na\n")
    lexicon = read_lexicon(tmp_path / "w.txt")
    assert lexicon == Lexicon(["b", "a"], {}, {}, str(tmp_path / "w.txt"))
