"""Checks on real vocabularies what one token a word does to them, and prints a Markdown table.

    python tests/bench/check_vocabularies.py MODELS_FOLDER LEXICON TEXT

There is a row for every folder in MODELS_FOLDER that has a tokenizer.json, and every
token_matching. It tells

- the counts, and whether the new ids follow each other;
- how many new tokens are never reached or do not decode to their word;
- how many tokens a new word takes in a sentence;
- how many ordinary words of TEXT change their ids, each looked at where it stands;
- how many lines the base gives back exactly and the extended tokenizer does not: lines of TEXT,
  and of TEXT with every fifth word taken from the lexicon.

This is a command and no test. With 1 MB of text it takes a minute a tokenizer.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import Config
from extend_tokenizer import SPACE, NewWords, plan_new_words

MATCHINGS = ("plain", "bare", "spaced")


def mix(text: str, words: list[str]) -> str:
    """Replace every fifth word of `text` by one of `words`, spread over the whole lexicon."""
    count = 0

    def swap(match: re.Match) -> str:
        nonlocal count
        count += 1
        return match[0] if count % 5 else words[count * 7919 % len(words)]

    return re.sub(r"\w+", swap, text)


def altered_words(new: NewWords, text: str) -> tuple[int, int]:
    """Count (ordinary words, ordinary words whose ids changed) by character offsets.

    A word belongs to the lexicon if a new token covers it from end to end.
    """
    ordinary = altered = 0
    for line in text.splitlines():
        before, after = (
            t.encode(line, add_special_tokens=False) for t in (new.base, new.tokenizer)
        )
        marks = bytearray(len(line) + 1)
        for _, (start, end) in set(zip(before.ids, before.offsets)) ^ set(
            zip(after.ids, after.offsets)
        ):
            marks[start:end] = b"1" * (end - start)
        for i, (start, end) in zip(after.ids, after.offsets):
            start += line[start : start + 1] == " "
            around = line[max(0, start - 1) : start] + line[end : end + 1]
            if i >= new.first_new_id and not re.search(r"\w", around):
                marks[start:end] = b"2" * (end - start)
        for word in re.finditer(r"\w+", line):
            mark = marks[word.start() : word.end()]
            ordinary += b"2" not in mark
            altered += b"2" not in mark and b"1" in mark
    return ordinary, altered


def round_trip_failures(new: NewWords, text: str) -> int:
    """Count the lines that the base gives back exactly and the extended tokenizer does not."""

    def exact(tokenizer: Tokenizer, line: str) -> bool:
        ids = tokenizer.encode(line, add_special_tokens=False).ids
        return tokenizer.decode(ids, skip_special_tokens=False) == line

    lines = text.splitlines(keepends=True)
    return sum(not exact(new.tokenizer, line) and exact(new.base, line) for line in lines)


def check(config: Config, text: str, words: list[str]) -> list:
    """Make one row of the table."""
    new = plan_new_words(config, [text])
    alone = len(new.tokenizer.encode("a b", add_special_tokens=False).ids)
    tokens = unreached = 0
    for i, word in enumerate(new.words, new.first_new_id):
        ids = new.tokenizer.encode(f"a {word} b", add_special_tokens=False).ids
        tokens, unreached = tokens + len(ids) - alone, unreached + (i not in ids)
    sizes = range(new.first_new_id, new.first_new_id + len(new.words))
    wrong = sum(new.tokenizer.decode([i]).strip() != w for i, w in zip(sizes, new.words))
    ordinary, altered = altered_words(new, text)
    in_a_row = [new.tokenizer.token_to_id(content) for content in new.contents] == list(sizes)
    bare = sum(content[0] not in f" {SPACE}" for content in new.contents)
    return [
        new.matching, f"{new.first_new_id:,}", f"{len(new.lexicon.words) - len(new.words):,}",
        f"{len(new.words):,}", f"{new.first_new_id + len(new.words):,}",
        "yes" if in_a_row else "NO", unreached, wrong, f"{bare:,}",
        f"{altered:,} of {ordinary:,} ({altered / ordinary:.3%})", round_trip_failures(new, text),
        round_trip_failures(new, mix(text, words)), f"{tokens / len(new.words):.3f}",
    ]  # fmt: skip


COLUMNS = (
    "tokenizer", "matching", "base", "known", "new", "total", "ids in a row", "never reached",
    "decode wrongly", "bare forms", "ordinary words altered", "inexact lines",
    "inexact lines, 20 % lexicon", "tokens per new word",
)  # fmt: skip


def main(models: str, lexicon: str, text_path: str) -> None:
    text = Path(text_path).read_bytes().decode("utf-8")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    with tempfile.TemporaryDirectory() as run_dir:
        for folder in sorted(path.parent for path in Path(models).glob("*/tokenizer.json")):
            keys = {"lexicon": lexicon, "corpus": text_path, "run_dir": run_dir}
            for matching in MATCHINGS:
                config = Config(model_name=str(folder), token_matching=matching, **keys)
                row = check(config, text, Path(lexicon).read_text(encoding="utf-8").split())
                print(f"| {' | '.join(map(str, [folder.name, *row]))} |", flush=True)
                if row[0] == "whole_word":  # the same for every token_matching
                    break


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name in ("models", "lexicon", "text"):
        parser.add_argument(name)
    main(*vars(parser.parse_args()).values())
