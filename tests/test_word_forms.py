"""Proves that a new word is one token wherever it stands, and that the report says where it is not.

    python -m pytest tests/test_word_forms.py        (39 s on 2 busy CPU cores, 2026-11-26)

A word that the corpus also has without a space before it has two forms with a row each. The places
and counts that are expected come from Python's own `re` or stand here as numbers.
"""

import dataclasses
import json
import re
import unicodedata
from pathlib import Path

import pytest
from bench.check_vocabularies import layouts
from tiny_models import make_tokenizer
from tiny_tokenizers import (
    KINDS, TEXT, byte_level, contents, decode, encode, extended, plan, saved, write_run,
)  # fmt: skip
from tokenizers import Tokenizer

from config import UserError
from extend_tokenizer import (
    NewWords, encode_pieces, format_report, pieces, read_lexicon, save_new_words,
)  # fmt: skip

BYTE_LEVEL, SENTENCEPIECE = ("qwen", "gpt2"), ("llama2", "metaspace")
# Each word at line starts, after quotes and spaces
BOOK = (
    'riverrun past the riverrun, "riverrun" —kotoi\n kotoi and naïvo\nkotoi (kotoi)  naïvo\nnaïvo\n'
)
WORDS = ["riverrun", "onlyspace", "kotoi", "naïvo"]


@pytest.fixture
def run(tmp_path):
    """Give run(kind, lexicon, corpus, **settings): the Config of a run, its files written."""
    return lambda kind="qwen", lexicon=WORDS, corpus=f"{BOOK}an onlyspace\n", **keys: write_run(
        tmp_path, kind, lexicon, corpus, **keys
    )


def found(new: NewWords, text: str) -> list[str]:
    """List what the new tokens of a text match, "▁" shown as a space."""
    ids = encode(new.tokenizer, text)
    forms = [new.forms[i - new.first_new_id] for i in ids if i >= new.first_new_id]
    return [form.content.replace("▁", " ") for form in forms]


def occurrences(words: list[str], text: str) -> int:
    """Count the words in a text with `re`: the longest first, no letter or digit beside them."""
    longest_first = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    return len(re.findall(rf"(?<!\w)(?:{longest_first})(?!\w)", text))


# Two forms


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_is_one_token_wherever_it_stands(run, kind):
    from transformers import AutoTokenizer

    config = run(kind)
    new = saved(config)
    loaded = AutoTokenizer.from_pretrained(Path(config.run_dir, "tokenizer"))
    rows = {new.first_new_id + i for i, form in enumerate(new.forms) if form.word == "riverrun"}
    assert len(rows) == 2
    for text in (
        "riverrun", "\nriverrun", '"riverrun', " riverrun", "a riverrun b", "'riverrun'",
        "(riverrun", "—riverrun", "a  riverrun", "\triverrun", "riverrun\r\nriverrun",
        "riverrun-riverrun",
    ):  # fmt: skip
        ids = loaded(text)["input_ids"]
        assert sum(i in rows for i in ids) == text.count("riverrun")
        assert not set("riverun") & {loaded.decode([i]) for i in ids}  # nothing is left of it
        if decode(new.base, encode(new.base, text)) == text:
            assert loaded.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", KINDS)
def test_second_forms_come_after_all_first_ones(run, kind):
    new = plan(run(kind))
    assert new.num_words == 4 and new.words == [*WORDS, "riverrun", "kotoi", "naïvo"]
    space = "▁" if kind in SENTENCEPIECE else " "
    line_start = "naïvo" if kind in SENTENCEPIECE else "\nnaïvo"
    second = ["riverrun", "kotoi", line_start]
    assert contents(new) == [space + word for word in WORDS] + second
    for content, ids in zip(second, new.spellings[4:]):
        text = content if content[0] == "\n" else f"\n{content}"
        skip = len(encode(new.base, "\n")) if content[0] != "\n" or kind in SENTENCEPIECE else 0
        assert ids == encode(new.base, text)[skip:]


@pytest.mark.parametrize("kind", KINDS)
def test_first_ids_and_their_tokens_do_not_depend_on_the_corpus(run, kind):
    plans = [plan(run(kind, corpus=corpus)) for corpus in (BOOK, "no word of it", "kotoi")]
    assert [len(new.words) - new.num_words for new in plans] == [3, 0, 1]
    for new in plans:
        assert new.first_new_id == plans[0].first_new_id and new.num_words == 4
        assert new.words[:4] == WORDS and new.forms[:4] == plans[0].forms[:4]
        assert [new.tokenizer.token_to_id(content) for content in contents(new)[:4]] == list(
            range(new.first_new_id, new.first_new_id + 4)
        )


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_misread_words_take_the_line_end_in(run, kind):
    """A byte-level decoder takes the "ï" of a token "naïvo" for a byte, but not beside a blank."""
    new = plan(run(kind))
    assert found(new, "\nnaïvo") == found(new, "a\n\nnaïvo") == found(new, "\r\nnaïvo")
    assert found(new, "\nnaïvo") == ["\nnaïvo"] and found(new, "a naïvo") == [" naïvo"]
    assert found(new, "naïvo") == found(new, '"naïvo"') == []
    for text in ("a\nnaïvo", "naïvo", '"naïvo"', "a  naïvo", "\r\nnaïvo\r\n"):
        assert decode(new.tokenizer, encode(new.tokenizer, text)) == text
    table = saved(run(kind))
    assert "\\nnaïvo" in Path(run(kind).run_dir, "tokenizer/words.tsv").read_text("utf-8")
    assert table.report["words_decoding_wrongly"] == []


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_two_spaces_stay_one_entry_and_the_word_after_them_is_one_token(run, kind):
    new = plan(run(kind))
    assert found(new, "a  naïvo b") == ["naïvo"] and found(new, "a naïvo") == [" naïvo"]
    assert found(new, "naïvo") == [" naïvo"]  # the tokenizer puts a space before a text
    one_form = plan(run(kind, corpus="a naïvo"))
    assert found(one_form, "a  naïvo b") == []
    before = encode(new.base, "a  b")
    assert encode(new.tokenizer, "a  naïvo")[:-1] == before[: len(encode(new.base, "a  "))]


@pytest.mark.parametrize("kind", KINDS)
def test_forms_that_the_base_spells_with_one_token_get_no_row(run, kind):
    """The base has an entry for "orum", and none for it with a space."""
    new = extended(run(kind, ["orum", "riverrun"], "an orum riverrun\norum, riverrun\nriverrun"))
    assert new.words == ["orum", "riverrun", "riverrun"]
    assert encode(new.tokenizer, "\norum") == encode(new.base, "\norum")
    assert new.report["corpus"]["occurrences_as_one_token"] == 5


def test_spaced_matching_has_first_forms_alone(run):
    both, spaced = plan(run()), plan(run(token_matching="spaced"))
    assert spaced.forms == both.forms[:4] and spaced.spellings == both.spellings[:4]


# Whole texts


@pytest.mark.parametrize("layout", ["as it is", "wrapped", "verse", "dialogue"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_occurrence_is_one_token_and_the_text_comes_back(run, kind, layout):
    words = ["riverrun", "kotoi", "arrah-na-poghue", "arrah", "rockn'rill", "x2y"]
    lines = [
        f"{words[i % 6]} {words[i // 6 % 6]} and, {words[i * 5 % 6]} {words[i * i % 6]};"
        f" the other {words[i * 7 % 6]}\n"
        for i in range(200)
    ]
    text = layouts("".join(lines))[layout]
    new = extended(run(kind, words, text))
    figures = new.report["corpus"]
    assert figures["occurrences"] == occurrences(words, text) == 1000
    assert figures["occurrences_as_one_token"] == figures["new_tokens"] == 1000
    assert figures["occurrences_in_pieces"] == {} and figures["exact_round_trip"]
    assert figures["ordinary_words"] == 600 and figures["ordinary_words_changed"] == 0
    ids = encode(new.tokenizer, text)
    assert decode(new.tokenizer, ids) == text
    assert sum(i >= new.first_new_id for i in ids) == 1000


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_ids_and_places_of_the_whole_text(run, kind):
    new = plan(run(kind))
    text = "the waters riverrun\r\nkotoi naïvo, \n\n  there...\n中文\n中文\n" * 2500
    parts = pieces(text)
    assert "".join(parts) == text and len(parts) == 3 and min(map(len, parts[:-1])) >= 65536
    for tokenizer in (new.base, new.tokenizer):
        whole = tokenizer.encode(text, add_special_tokens=False)
        ids, places, start = [], [], 0  # the places in all pieces but the first are one further
        for part, (part_ids, offsets) in zip(parts, encode_pieces(tokenizer, parts)):
            ids += part_ids
            places += [(start + a, start + b) for a, b in offsets]
            start += len(part) - (start == 0)
        assert ids == whole.ids and places == whole.offsets
    assert pieces("") == [] and pieces("short") == ["short"]


def test_texts_without_blanks_are_cut_at_line_ends():
    text = "龘龘江很美。\n" * 40_000
    assert "".join(pieces(text)) == text
    assert [len(part) % 7 for part in pieces(text)] == [0, 0, 0, 0, 0]


# Report


def test_report_says_why_occurrences_are_in_pieces(run):
    corpus = 'a naïvo, "naïvo" "naïvo"\nriverrun riverrun (riverrun)\n'
    new = extended(run(corpus=corpus))
    misread = "no space before them, and decoders would misread their letters without one"
    assert new.report["corpus"]["occurrences"] == 6
    assert new.report["corpus"]["occurrences_as_one_token"] == 4
    assert new.report["corpus"]["occurrences_in_pieces"] == {
        misread: {"count": 2, "examples": ["naïvo"]}
    }
    lines = format_report(new.report).split("\n")
    assert "occurrences of new words: 6, of which one token 4 (66.67%)" in lines
    assert f"  in pieces 2, {misread}: naïvo" in lines
    spaced = extended(run(corpus=corpus, token_matching="spaced"))
    assert spaced.report["corpus"]["occurrences_in_pieces"] == {
        "no space before them, which spaced matching does not see": {
            "count": 4, "examples": ["naïvo", "riverrun"],
        }
    }  # fmt: skip


def test_a_lexicon_that_hardly_occurs_is_warned_of(run):
    """Under 1 % of the tokens, or under 300 occurrences."""

    def warnings(corpus: str) -> list[str]:
        lines = format_report(extended(run(corpus=corpus)).report).split("\n")
        return [line for line in lines if line.startswith("warning")]

    assert warnings("the riverrun\n" * 300) == []
    assert warnings("the riverrun\n" * 299) == [
        "warning: the lexicon hardly occurs in the corpus (33.33% of the tokens, 299 times); its"
        " rows will not learn much"
    ]
    (rare,) = warnings("the riverrun\n" * 300 + " water" * 40_000)
    assert "(0.73% of the tokens, 300 times)" in rare


def test_counts_of_a_word_are_those_of_both_its_forms(run):
    config = run(corpus="a riverrun\nriverrun a kotoi\n")
    new = saved(config)
    assert list(zip(new.words, new.counts)) == [
        ("riverrun", 1), ("onlyspace", 0), ("kotoi", 1), ("naïvo", 0), ("riverrun", 1),
    ]  # fmt: skip
    assert new.report["corpus"]["new_words_seen_once"] == 1
    assert new.report["corpus"]["new_words_never_seen"] == 2
    assert new.report["new_tokens"] == 4 and new.report["second_forms"] == 1
    lines = Path(config.run_dir, "tokenizer/words.tsv").read_text("utf-8").splitlines()
    assert lines[1].startswith("382\triverrun\t riverrun\t") and lines[1].endswith("\t1")
    assert lines[5].startswith("386\triverrun\triverrun\t") and lines[5].endswith("\t1")


# Known words


def test_the_two_rules_for_known_words(run):
    """The base has "water" with a space alone, "orum" without one alone, and "the" both ways."""
    files = ["water", "orum", "the", "harbour", "riverrun"], "the orum riverrun water"
    one_token = extended(run("qwen", *files))
    exact = extended(run("qwen", *files, known_words="exact_string", token_matching="spaced"))
    assert one_token.words == ["orum", "riverrun"] and one_token.report["known"] == 3
    assert exact.words == ["water", "harbour", "riverrun"] and exact.report["known"] == 2
    for new in (one_token, exact):
        assert new.report["known_by_rule"] == {"one_token": 3, "exact_string": 2}


def with_more_words(config, words: str) -> None:
    """Give the run a byte-level tokenizer that was trained on `words` too."""
    tokenizer = byte_level(text=TEXT + words)
    Path(config.model_name, "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")


def test_a_word_that_must_match_without_a_space_and_is_one_token_there_gets_no_row(run):
    """ "Qu" begins "Quorum", so it cannot take the space in."""
    new = plan(run("qwen", ["Qu", "riverrun"], "a Qu riverrun"))
    assert len(encode(new.base, "Qu")) == 1 and len(encode(new.base, " Qu")) > 1
    assert new.words == ["riverrun"]


def test_a_word_of_a_script_without_blanks_is_known_as_it_stands_without_one(run):
    config = run("qwen", ["日本", "riverrun"], "a riverrun")
    with_more_words(config, "。日本。" * 40)
    new = plan(config)
    assert len(encode(new.base, "日本")) == 1 and len(encode(new.base, " 日本")) > 1
    assert new.words == ["riverrun"] and new.known_by_rule["one_token"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_that_only_follows_two_spaces_is_one_token(run, kind):
    new = extended(run(kind, ["riverrun"], "a  riverrun, the  riverrun\n"))
    assert new.report["corpus"]["occurrences_as_one_token"] == 2


def test_no_word_hides_a_longer_one(run):
    """The token " çalı" would match the beginning of "çalış" and leave no other way to spell it."""
    text = "bir çalı ve çalış\nçalı ve çalış\n"
    config = run(lexicon=["çalı", "çalış"], corpus=text)
    with_more_words(config, " çalış" * 900)
    new = extended(config)
    assert new.known_by_rule == {"one_token": 1, "exact_string": 0}
    assert new.words[:2] == ["çalı", "çalış"]  # the known word has a row, or it would be cut up
    assert found(new, "bir çalı ve çalış") == [" çalı", " çalış"]
    for lexicon in (["çalı", "çalış"], ["çalış", "çalı"]):  # in any order
        config = run(lexicon=lexicon, corpus=text)
        with_more_words(config, " çalışmak" * 900)
        new = extended(config)
        assert new.known_by_rule["one_token"] == 0
        assert found(new, "bir çalı ve çalış") == [" çalı", " çalış"]
        assert new.report["corpus"]["occurrences_as_one_token"] == 4
    new = extended(
        run(lexicon=["çalış", "çalı"], corpus="çalış\nçalı\nçalış")
    )  # nor at a line start
    assert contents(new) == [" çalış", " çalı", "\nçalış", "\nçalı"]
    assert found(new, "\nçalı\nçalış") == ["\nçalı", "\nçalış"]


def test_the_report_shows_what_a_misread_word_cuts_up(run):
    """A token with its space also matches the beginning of a longer word, and bare it would be
    misread."""
    new = extended(run(lexicon=["çalı"], corpus="bir çalı ve çalışma ile çalışma\n"))
    figures = new.report["corpus"]
    assert (figures["occurrences"], figures["occurrences_as_one_token"]) == (1, 1)
    assert (figures["ordinary_words"], figures["ordinary_words_changed"]) == (5, 2)
    assert figures["ordinary_words_changed_examples"] == ["çalışma"]
    assert figures["exact_round_trip"]


def test_words_that_never_match_are_an_error(run):
    config = run("llama2", ["ﬁshrun", "riverrun"], "the ﬁshrun riverrun")
    path = Path(config.model_name, "tokenizer.json")
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec["normalizer"]["normalizers"].insert(0, {"type": "NFKC"})  # it makes "fishrun" of the word
    path.write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        extended(config)
    assert str(caught.value) == (
        "lexicon: 1 new words can never match, because others hide them or the tokenizer rewrites"
        " their letters: ﬁshrun; take them out"
    )


# The lexicon as people have it


def test_lexicon_lines_as_people_write_them(tmp_path):
    lines = [
        "# my words", "", "riverrun\t17\ta gloss", "Kirjath-arba,", '"quoted"', "soft\u00adhyphen",
        "of the sea", "one,two", "a;b", "(bracket)", "C++", "rockn'rill", "“curly”", "end.", "-",
        "\ttabbed",
    ]  # fmt: skip
    (tmp_path / "w.txt").write_text("\n".join(lines), encoding="utf-8")
    lexicon = read_lexicon(tmp_path / "w.txt")
    assert lexicon.words == [
        "riverrun", "Kirjath-arba", "quoted", "softhyphen", "bracket", "C++", "rockn'rill", "curly",
        "end", "tabbed",
    ]  # fmt: skip
    assert lexicon.repaired == {
        "comment": {1: "# my words"}, "column after a tab": {3: "riverrun\t17\ta gloss"},
        "outer punctuation": {
            4: "Kirjath-arba,", 5: '"quoted"', 10: "(bracket)", 13: "“curly”", 14: "end.",
        },
        "soft hyphen": {6: "soft\u00adhyphen"}, "outer blanks": {16: "\ttabbed"},
    }  # fmt: skip
    assert lexicon.refused == {
        "blanks inside; a token is one word, so give each word a line": {7: "of the sea"},
        "a comma inside; give one word a line": {8: "one,two", 9: "a;b"},
        "no letter or digit": {15: "-"},
    }
    assert lexicon.origin == str(tmp_path / "w.txt")


@pytest.mark.parametrize("key", ["lexicon", "corpus"])
def test_utf16_without_a_mark_is_told_from_utf8(run, key):
    config = run(**{key: "riverrun\n".encode("utf-16-le")})
    path = config.lexicon if key == "lexicon" else config.corpus[0]
    with pytest.raises(UserError) as caught:
        extended(config)
    assert str(caught.value) == (
        f"{key}: {path}: holds zero bytes, as UTF-16 text does; save it as UTF-8"
    )


def test_from_corpus_leaves_out_what_it_is_told_to(run, tmp_path):
    keys = {"lexicon": "from_corpus", "lexicon_min_count": 2, "lexicon_min_base_tokens": 3}
    corpus = "an Jolkvan was vashkump and quxjit was Tirzvok\n" * 3
    (tmp_path / "not.txt").write_text("# no\nquxjit\n", encoding="utf-8")

    def words(**more) -> list[str]:
        return plan(write_run(tmp_path, "qwen", WORDS, corpus, **keys, **more)).words

    assert words() == ["Jolkvan", "vashkump", "quxjit", "Tirzvok"]
    assert words(lexicon_skip_capitalized=True) == ["vashkump", "quxjit"]
    exclude = {"lexicon_exclude": str(tmp_path / "not.txt")}
    assert words(**exclude) == ["Jolkvan", "vashkump", "Tirzvok"]
    assert words(lexicon_skip_capitalized=True, **exclude) == ["vashkump"]
    with pytest.raises(UserError) as caught:
        words(lexicon_exclude=str(tmp_path / "gone.txt"))
    assert str(caught.value) == (
        f"lexicon_exclude: {tmp_path / 'gone.txt'}: cannot be read: No such file or directory"
    )


def test_from_corpus_keeps_words_whole_and_says_where_it_wrote_them(run, tmp_path):
    """Vowel signs, joiners, points, the Catalan dot and soft hyphens are inside words."""
    words = ["चंद्रपुष्पी", "ירח\u05b8ולם", "ماه\u200cشهری", "col·legiava", "rockn’rill"]
    config = write_run(
        tmp_path, "qwen", WORDS, f"{' and '.join(words)}, " * 3, lexicon="from_corpus",
        lexicon_min_count=3,
    )  # fmt: skip
    new = saved(config)
    words = [unicodedata.normalize("NFC", word) for word in words]
    assert new.words[: new.num_words] == words
    kept = Path(config.run_dir, "lexicon.txt")
    line = f"lexicon: from the corpus: {', '.join(words)} ...; kept in {kept} for you to edit"
    assert line in format_report(new.report).split("\n") and kept.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lexicon", ["given", "from_corpus"])
def test_a_decomposed_corpus_has_the_same_words(run, tmp_path, kind, lexicon):
    text = unicodedata.normalize("NFD", "the Glimöck was an vashúmp and other\n" * 9)
    assert "ö" not in text
    keys = {"lexicon": "from_corpus"} if lexicon == "from_corpus" else {}
    new = extended(write_run(tmp_path, kind, ["Glimöck", "vashúmp"], text, **keys))
    assert new.words == ["Glimöck", "vashúmp"]
    assert new.report["corpus"]["occurrences_as_one_token"] == 18
    assert new.report["corpus"]["exact_round_trip"]


# Saved and loaded again


def test_a_bos_that_only_tokenizer_config_asks_for(run):
    """DeepSeek's tokenizer is so on transformers 4.57."""
    from transformers import AutoTokenizer

    for bos in ("<|im_start|>", {"content": "<|im_start|>", "__type": "AddedToken"}):
        config = run(settings={"add_bos_token": True, "bos_token": bos})
        new = saved(config)
        assert new.bos_id == new.base.token_to_id("<|im_start|>") == 381
        loaded = AutoTokenizer.from_pretrained(Path(config.run_dir, "tokenizer"))
        ids = loaded("a riverrun")["input_ids"]
        assert ids == [381, *encode(new.tokenizer, "a riverrun")]
        alone = Tokenizer.from_file(str(Path(config.run_dir, "tokenizer/tokenizer.json")))
        assert alone.encode("a riverrun").ids == ids
    for settings in (
        {"add_bos_token": False, "bos_token": "<|im_start|>"}, {"bos_token": "<|im_start|>"},
        {"add_bos_token": True}, {"add_bos_token": True, "bos_token": "<in no vocabulary>"},
    ):  # fmt: skip
        assert plan(run(settings=settings)).bos_id is None


def test_a_tokenizer_whose_ids_change_when_it_is_loaded_is_refused(run):
    """The library gives the ids of added tokens anew, in the order of the file."""
    config = run()
    spec = json.loads(make_tokenizer().to_str())
    special = spec["added_tokens"][0] | {"id": 262}
    spec["model"]["vocab"][special["content"]] = 262  # in the vocabulary, behind a gap of six
    ids = (*range(256, 262), 263, 264)
    others = [special | {"id": i, "content": f"<|dummy_{i}|>"} for i in ids]
    spec["added_tokens"] = sorted([special, *others], key=lambda token: token["id"])
    text = json.dumps(spec, ensure_ascii=False)
    Path(config.model_name, "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        saved(config)
    assert str(caught.value) == (
        f"model_name {config.model_name!r}: its tokenizer.json gives '<|dummy_256|>' the id 256,"
        " but when it is loaded the id is 257; repair its added_tokens, whose ids must follow the"
        " vocabulary without a gap"
    )
    # If planning does not see it, the written folder shows it.
    config = run()
    new = extended(config)
    swapped = dataclasses.replace(new, forms=new.forms[::-1])
    with pytest.raises(UserError) as caught:
        save_new_words(config, swapped)
    assert str(caught.value) == (
        f"model_name {config.model_name!r}: its tokenizer.json gives some tokens ids that change"
        " when it is loaded again, so new words would get others' ids; repair its added_tokens or"
        " take another model"
    )
    assert not Path(config.run_dir, "tokenizer").exists()
