"""Proves in thirty scripts and spellings that a new word is one token and other text stays exact.

    python -m pytest tests/test_languages.py         (5 s on 2 busy CPU cores, 2026-11-26)
    WAKE2VEC_TOKENIZERS=FOLDER python -m pytest tests/test_languages.py

The second command tries the tokenizer of every folder in FOLDER that has a tokenizer.json too.
A line of each language has its word in mid-sentence, after a quote and at the start of a line, or
wherever a script without blanks between words has it.
"""

import os
import unicodedata
from pathlib import Path

import pytest
from tiny_tokenizers import KINDS, decode, encode, extended, write_run
from tokenizers.pre_tokenizers import ByteLevel

from extend_tokenizer import SPACE, NewWords, format_report

# name -> (word, text with {} where the word stands)
LANGUAGES = {
    "English, both apostrophes": ("rockn'rill", "the {} came, '{}' they said.\n{} went. It’s so."),
    "English, curly apostrophe": ("rockn’rill", "the {} came, ‘{}’ they said.\n{} went. It's so."),
    "English, ligature": ("ﬁshrun", 'the {} came, "{}" they said.\n{} went to ﬁsh.'),
    "Irish": ("fiánna", "tháinig {} aréir, “{}” arsa sé.\n{} ag imeacht, café."),
    "German": ("größerlich", "Der {} Mann; „{}“ rief er.\n{} war es. Die Straße ist groß."),
    "Turkish, dotted i": ("gülmekçi", 'O gün {} geldi; "{}" dedi.\n{} sustu. İstanbul ılık.'),
    "Turkish, short": ("çalı", "bir {} ve gül diye; “{}” dedi.\n{} ve dal."),
    "Turkish, longer": ("çalışıl", "bir {} ve kuş diye; “{}” dedi.\n{} ve taş."),
    "Catalan": ("col·legiava", "el {} va dir «{}» avui.\n{} i la novel·la."),
    "Polish": ("żółwiołek", "ten {} mówi: „{}” dziś.\n{} i żółw."),
    "Vietnamese": ("nguyệtthuỷ", "một {} nói “{}” hôm nay.\n{} và tiếng Việt đẹp."),
    "Greek, final sigma": ("θαλασσόπους", "ο {} ήρθε· «{}», είπε.\n{} πάλι. Η θάλασσα, ο λόγος."),
    "Russian": ("лунобродец", "и {} пришёл, «{}» сказал.\n{} ушёл в лунную ночь."),
    "Ukrainian": ("зор’яник", "цей {} каже: «{}» сьогодні.\n{} і сім’я."),
    "Armenian": ("լուսնագետիկ", "այս {} եկավ, «{}» ասաց։\n{} գնաց գիշերը։"),
    "Georgian": ("მთვარისხე", "ეს {} მოვიდა, „{}“ თქვა.\n{} წავიდა ღამით."),
    "Arabic": ("قمرستان", "جاء {} في الليل، «{}» قال.\n{} هنا. كتاب جميل."),
    "Arabic, vowel signs": ("قَمَرٌستان", "جَاءَ {} في اللَّيْل، «{}» قال.\n{} هنا."),
    "Persian, joiners": ("ماه\u200cشهری", "او {} دید و «{}» گفت.\n{} رفت. کتاب\u200cها."),
    "Hebrew": ("ירחולם", 'בא {} בלילה, "{}" אמר.\n{} כאן. ספר יפה, צה״ל.'),
    "Hebrew, points": ("יְרֵחוֹלָם", "בָּא {} בַּלַּיְלָה, „{}” אמר.\n{} כאן."),
    "Amharic": ("ጨረቃወንዝ", "ይህ {} መጣ፣ «{}» አለ።\n{} ሄደ።"),
    "Hindi": ("चंद्रपुष्पी", "एक {} आई, “{}” बोली।\n{} गई। हिन्दी भाषा की किताब।"),
    "Bengali": ("চন্দ্রনদিকা", "এক {} এল, “{}” বলল।\n{} গেল। বাংলা ভাষা।"),
    "Tamil": ("நிலாநதிமா", "ஒரு {} வந்தது, “{}” என்றது.\n{} போனது. தமிழ் மொழி."),
    "Korean": ("달그림자꽃", "그는 {} 보았다, “{}” 말했다.\n{} 예쁘다. 한국어 책."),
    "Chinese": ("龘龘江", "他看见{}在夜里，“{}”他说。\n{}很美。中文书。"),
    "Japanese": ("月影ノ川", "彼は{}を見た。「{}」と言った。\n{}は美しい。日本語の本。"),
    "Thai": ("จันทร์บุรีนิ", "เขาเห็น{}ในคืนนั้น “{}” เขาพูด\n{}สวย ภาษาไทย"),
    "Khmer": ("ព្រះចន្ទទន្លេ", "គាត់ឃើញ{}យប់នោះ «{}»\n{}ស្អាត ភាសាខ្មែរ"),
}  # fmt: skip
TEXTS = {
    name: (unicodedata.normalize("NFC", word), "\n" + unicodedata.normalize("NFC", text))
    for name, (word, text) in LANGUAGES.items()
}
FOLDER = os.environ.get("WAKE2VEC_TOKENIZERS")
REAL = sorted(path.parent for path in Path(FOLDER).glob("*/tokenizer.json")) if FOLDER else []
MISREAD = "no space before them, and decoders would misread their letters without one"


@pytest.fixture(scope="module", params=[*KINDS, *REAL], ids=lambda kind: Path(kind).name)
def new(request, tmp_path_factory) -> NewWords:
    """Extend a tokenizer by the words of all languages; the corpus is their texts."""
    lexicon = [word for word, _ in LANGUAGES.values()]
    corpus = "".join(text.format(*[word] * 3) for word, text in TEXTS.values()) + "\n"
    real = {} if request.param in KINDS else {"model_name": str(request.param)}
    kind = request.param if request.param in KINDS else "qwen"
    return extended(write_run(tmp_path_factory.mktemp("run"), kind, lexicon, corpus, **real))


def is_misread(new: NewWords, word: str) -> bool:
    """Tell whether a byte-level decoder takes each letter of the word for a byte.

    The second form of such a word has the line end before it. Words that begin with it need that
    too, which here is the longer Turkish one.
    """
    byte_level = not new.forms[0].content.startswith(SPACE)
    word = "çalı" if word.startswith("çalı") else word
    return byte_level and not word.isascii() and set(word) <= set(ByteLevel.alphabet())


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_word_of_the_language_is_one_token(new, name):
    word, text = TEXTS[name]
    for before, place in zip(text.split("{}"), ("in mid-sentence", "after a quote", "line start")):
        ids = encode(new.tokenizer, f"{before}{word}")
        wanted = [] if place == "after a quote" and is_misread(new, word) else [word]
        rows = [new.words[i - new.first_new_id] for i in ids if i >= new.first_new_id]
        assert (place, rows) == (place, wanted)


@pytest.mark.parametrize("name", LANGUAGES)
def test_text_of_the_language_stays_exact(new, name):
    word, text = TEXTS[name]
    ids = encode(new.tokenizer, text.format(*[word] * 3))
    assert decode(new.tokenizer, ids) == text.format(*[word] * 3)
    ordinary = text.replace("{}", "")
    assert encode(new.tokenizer, ordinary) == encode(new.base, ordinary)


def test_report_counts_what_the_languages_have(new):
    figures = new.report["corpus"]
    misread = sorted(word for word, _ in TEXTS.values() if is_misread(new, word))
    assert figures["occurrences"] == 3 * len(LANGUAGES)
    assert figures["occurrences_as_one_token"] == 3 * len(LANGUAGES) - len(misread)
    in_pieces = {MISREAD: len(misread)} if misread else {}
    assert {why: n["count"] for why, n in figures["occurrences_in_pieces"].items()} == in_pieces
    assert figures["ordinary_words_changed"] == 0, figures["ordinary_words_changed_examples"]
    assert figures["exact_round_trip"] and new.report["words_decoding_wrongly"] == []
    assert not misread or f"  in pieces {len(misread)}, {MISREAD}: " in format_report(new.report)


@pytest.mark.parametrize("kind", KINDS)
def test_a_soft_hyphen_in_a_lexicon_is_taken_out_and_one_in_a_text_stays(tmp_path, kind):
    """So a word that the text divides is another one, spelled as before."""
    corpus = "the riverrun was riv\u00aderrun\n"
    new = extended(write_run(tmp_path, kind, ["river\u00adrun"], corpus))
    assert new.words == ["riverrun"] and new.report["corpus"]["occurrences"] == 1
    assert encode(new.tokenizer, " riv\u00aderrun") == encode(new.base, " riv\u00aderrun")
    assert new.report["corpus"]["exact_round_trip"]
