"""Checks on real vocabularies that a new word is one token wherever it stands: a Markdown table.

    python tests/bench/check_vocabularies.py MODELS_FOLDER LEXICON TEXT
    python tests/bench/check_vocabularies.py MODELS_FOLDER LEXICON TEXT --matchings both plain bare

Every fifth word of TEXT is replaced by one of the lexicon, and the result is laid out in four ways:
as TEXT is, hard-wrapped, as verse and as dialogue. There is a row for every folder in MODELS_FOLDER
that has a tokenizer.json, every token_matching and every layout. It tells

- the counts of known words, new words and second forms;
- how often new words occur, and how many of the occurrences are one token;
- how many ordinary words change their ids, each looked at where it stands;
- how many lines the base gives back exactly and the extended tokenizer does not;
- the tokens before and after, and the processor time of the base / of the extended tokenizer.

This is a command and no test. With 44,223 words and 400 kB of text a row takes 30 s (2 busy CPU
cores, 2026-11-26).
"""

import argparse
import re
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import Config
from extend_tokenizer import NewWords, encode_pieces, extend, pieces, read_lexicon


def mix(text: str, words: list[str]) -> str:
    """Replace every fifth word of `text` by one of `words`, spread over the whole lexicon."""
    count = 0

    def swap(match: re.Match) -> str:
        nonlocal count
        count += 1
        return match[0] if count % 5 else words[count * 7919 % len(words)]

    return re.sub(r"\w+", swap, text)


def layouts(text: str) -> dict[str, str]:
    """Lay `text` out as it is, hard-wrapped at 70 columns, in verses of 7 words and as dialogue."""
    words = text.split()

    def lines(size: int) -> list[str]:
        return [" ".join(words[i : i + size]) for i in range(0, len(words), size)]

    def wrap(line: str) -> str:
        return textwrap.fill(line, 70, break_long_words=False, break_on_hyphens=False)

    spoken = [f'"{line}"' if i % 2 else f"—{line}" for i, line in enumerate(lines(12))]
    return {
        "as it is": text,
        "wrapped": "\n".join(map(wrap, text.split("\n"))),
        "verse": "\n".join(lines(7)) + "\n",
        "dialogue": "\n".join(spoken) + "\n",
    }


def round_trip_failures(new: NewWords, text: str) -> int:
    """Count the lines that the base gives back exactly and the extended tokenizer does not."""

    def exact(tokenizer: Tokenizer, line: str) -> bool:
        ids = tokenizer.encode(line, add_special_tokens=False).ids
        return tokenizer.decode(ids, skip_special_tokens=False) == line

    lines = text.splitlines(keepends=True)
    return sum(not exact(new.tokenizer, line) and exact(new.base, line) for line in lines)


def encode_seconds(tokenizer: Tokenizer, text: str) -> float:
    """Take the processor time of encoding a text, the best of two, with empty caches each time."""
    parts, seconds = pieces(text), []
    for _ in range(2):
        clone = Tokenizer.from_str(tokenizer.to_str())
        start = time.process_time()
        for _ in encode_pieces(clone, parts):
            pass
        seconds.append(time.process_time() - start)
    return min(seconds)


COLUMNS = (
    "tokenizer", "matching", "layout", "known", "new", "second forms", "occurrences", "one token",
    "ordinary words altered", "inexact lines", "tokens before", "after", "speed",
)  # fmt: skip


def check(config: Config, layout: str, text: str) -> list:
    """Make one row of the table."""
    new = extend(config, [text])
    figures = new.report["corpus"]
    occurrences, hits = figures["occurrences"], figures["occurrences_as_one_token"]
    ordinary, altered = figures["ordinary_words"], figures["ordinary_words_changed"]
    speed = encode_seconds(new.base, text) / encode_seconds(new.tokenizer, text)
    return [
        Path(config.model_name).name, new.matching, layout, f"{new.report['known']:,}",
        f"{new.num_words:,}", f"{new.report['second_forms']:,}", f"{occurrences:,}",
        f"{hits / occurrences:.2%}", f"{altered:,} of {ordinary:,} ({altered / ordinary:.3%})",
        round_trip_failures(new, text), f"{figures['tokens_before']:,}",
        f"{figures['tokens_after']:,}", f"{speed:.2f}",
    ]  # fmt: skip


def main(models: str, lexicon: str, text_path: str, matchings: list[str]) -> None:
    text = Path(text_path).read_bytes().decode("utf-8")
    mixed = layouts(mix(text, read_lexicon(lexicon).words))
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    with tempfile.TemporaryDirectory() as run_dir:
        for folder in sorted(path.parent for path in Path(models).glob("*/tokenizer.json")):
            keys = {"lexicon": lexicon, "corpus": text_path, "run_dir": run_dir}
            for matching in matchings:
                config = Config(model_name=str(folder), token_matching=matching, **keys)
                for layout, laid_out in mixed.items():
                    row = check(config, layout, laid_out)
                    print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name in ("models", "lexicon", "text"):
        parser.add_argument(name)
    parser.add_argument("--matchings", nargs="+", default=["both", "spaced"])
    main(*vars(parser.parse_args()).values())
