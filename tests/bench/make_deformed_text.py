"""Make a text in which more than a third of the words are invented, from a public-domain one.

    python tests/bench/make_deformed_text.py SOURCE.txt OUT_FOLDER [flat|wrapped|verse]

The SHA-256 of a word's place decides how the word is deformed, so the same source gives the same
files. Of the words of four letters and more, two of three are changed: blended with another word of
the text, with a vowel moved or a consonant doubled, or with an ending. A few deformations of a word
come back and most occur once, as in a book of portmanteaus. OUT_FOLDER gets corpus.txt, the new
text, and lexicon.txt, all its invented words. tests/bench/bench_learning.py trains on what this
makes of the King James Bible (Debian's bible-kjv-text, see configs/sample/make_model.py).

With a third argument the lines of the text are laid out anew: `flat` joins eight to a paragraph,
`wrapped` breaks these paragraphs at 70 columns, `verse` breaks each line after seven words and puts
every third one in quotes.
"""

import hashlib
import re
import sys
import textwrap
from pathlib import Path

VOWELS, ENDINGS = "aeiou", ("ling", "soever", "ous", "ery", "ance", "ward", "some", "full")
MAX_BYTES = 1_300_000


def number(*key) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode("utf-8")).digest()[:8], "big")


def deform(word: str, variant: int, others: list[str]) -> str:
    """Make variant 0, 1, 2, ... of a word, always the same one."""
    pick = number(word, variant)
    other, kind, pick = others[pick % len(others)], pick // 7 % 4, pick // 31
    middle = len(word) // 2
    if kind == 0:
        return word[: middle + 1] + other[len(other) // 2 :]
    if kind == 1:
        places = [i for i, letter in enumerate(word) if letter in VOWELS]
        if places:
            place = places[pick % len(places)]
            vowel = VOWELS[(VOWELS.index(word[place]) + 1 + pick % 4) % 5]
            word = word[:place] + vowel + word[place + 1 :]
        return word[:middle] + word[middle] + word[middle:]
    if kind == 2:
        return other[: max(len(other) // 2, 2)] + word[middle:]
    return word + ENDINGS[pick % len(ENDINGS)]


def make(source: str) -> tuple[str, list[str]]:
    """Deform a text -> (new text, its invented words in order of appearance)."""
    source = source.encode("utf-8")[:MAX_BYTES].decode("utf-8", "ignore")
    ordinary = {word.lower() for word in re.findall(r"[A-Za-z]+", source)}
    others = sorted(word for word in ordinary if len(word) >= 4)
    place, lexicon = 0, {}

    def change(match: re.Match) -> str:
        nonlocal place
        place += 1
        word, dice = match[0], number("place", place)
        if not word.islower() or dice % 100 >= 78:
            return word
        # A third of the deformed places take one of three usual variants, the rest a rarer one.
        variant = dice // 100 % 3 if dice // 1000 % 3 == 0 else 3 + dice // 3000 % 400
        new = deform(word, variant, others)
        if new in ordinary:
            return word
        lexicon[new] = None
        return new

    text = re.sub(r"(?<![A-Za-z'])[A-Za-z]{4,}(?![A-Za-z'])", change, source)
    return text, list(lexicon)


def lay_out(text: str, layout: str) -> str:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if layout == "verse":
        words = [line.split() for line in lines]
        verses = ["\n".join(" ".join(w[i : i + 7]) for i in range(0, len(w), 7)) for w in words]
        return "\n\n".join(v if i % 3 else f'"{v}"' for i, v in enumerate(verses)) + "\n"
    paragraphs = [" ".join(lines[i : i + 8]) for i in range(0, len(lines), 8)]
    if layout == "wrapped":
        paragraphs = [textwrap.fill(p, 70, break_on_hyphens=False) for p in paragraphs]
    return "\n\n".join(paragraphs) + "\n"


def main(source_path: str, out_folder: str, layout: str | None = None) -> None:
    text, lexicon = make(Path(source_path).read_text(encoding="utf-8"))
    text = lay_out(text, layout) if layout else text
    words = re.findall(r"[A-Za-z]+", text)
    known = set(lexicon)
    out = Path(out_folder)
    out.mkdir(parents=True, exist_ok=True)
    (out / "corpus.txt").write_text(text, encoding="utf-8")
    (out / "lexicon.txt").write_text("\n".join(lexicon) + "\n", encoding="utf-8")
    share = sum(word in known for word in words) / len(words)
    print(f"{len(text):,} characters, {len(words):,} words, {share:.1%} invented,", end=" ")
    print(f"{len(lexicon):,} types")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[3:] not in ([], ["flat"], ["wrapped"], ["verse"]):
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
