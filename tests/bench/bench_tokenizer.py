"""Measures how fast a big lexicon goes onto a real tokenizer, and how fast the result encodes.

    python tests/bench/bench_tokenizer.py MODEL_FOLDER LEXICON TEXT [--rounds 5] [--lines 1000000]

Prints JSON lines: seconds of wall clock, the best of all rounds. They tell how long it takes

- to extend, report and save, with a corpus of one line that holds every word of the lexicon once;
- to make the report's figures for TEXT;
- to encode TEXT with the base and with the extended tokenizer (MB/s), by turns in this process;
- to load the saved folder with AutoTokenizer, transformers being imported already.

--lines N also measures a made-up lexicon of N lines, seconds and peak memory, in a process of its
own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import Config
from extend_tokenizer import (
    corpus_figures, extend, pieces, plan_new_words, read_corpus, save_new_words,
)  # fmt: skip


def seconds(work, *arguments) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def extend_and_save(config: Config) -> None:
    save_new_words(config, extend(config, read_corpus(config)))


def say(**figures) -> None:
    print(json.dumps(figures), flush=True)


def bench(model: str, lexicon: str, text_path: str, rounds: int, run_dir: Path) -> None:
    keys = {"model_name": model, "lexicon": lexicon, "run_dir": str(run_dir)}
    say(model=model, lexicon=lexicon, text=text_path, cpus=os.cpu_count(), rounds=rounds)
    words = Path(lexicon).read_text(encoding="utf-8").split()
    (run_dir / "corpus.txt").write_text("a " + " ".join(words), encoding="utf-8")
    config = Config(corpus=str(run_dir / "corpus.txt"), **keys)
    best = min(seconds(extend_and_save, config) for _ in range(rounds))
    say(extend_and_save_seconds=round(best, 2))
    config = Config(corpus=text_path, **keys)
    texts = read_corpus(config)
    new = plan_new_words(config, texts)
    figures = seconds(corpus_figures, new, config.corpus, texts)
    say(report_seconds_for_text=round(figures, 2), text_bytes=len(texts[0].encode()))
    parts = pieces(texts[0])
    times = {"base": [], "extended": []}
    for _ in range(4 * rounds):  # by turns, so that a busy machine is unfair to neither
        times["base"].append(seconds(new.base.encode_batch_fast, parts))
        times["extended"].append(seconds(new.tokenizer.encode_batch_fast, parts))
    speed = {name: len(texts[0].encode()) / 1e6 / min(values) for name, values in times.items()}
    say(
        **{f"{name}_mb_per_second": round(value, 2) for name, value in speed.items()},
        extended_to_base=round(speed["extended"] / speed["base"], 3),
    )
    from transformers import AutoTokenizer, __version__

    folder = run_dir / "tokenizer"
    best = min(seconds(AutoTokenizer.from_pretrained, folder) for _ in range(rounds))
    say(reload_seconds=round(best, 2), transformers=__version__)


def bench_lines(model: str, lines: int, run_dir: Path) -> None:
    """Extend with a lexicon of `lines` words of four to six syllables, every tenth accented."""
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "al", "en", "ir")]

    def word(i: int) -> str:
        parts, n = [], i + 96**3
        while n:
            n, digit = divmod(n, 96)
            parts.append(syllables[digit])
        return "".join(parts) + "é" * (i % 10 == 0)

    path = run_dir / "words.txt"
    path.write_text("".join(f"{word(i)}\n" for i in range(lines)), encoding="utf-8")
    (run_dir / "one.txt").write_text(f"a {word(1)} b", encoding="utf-8")
    config = Config(
        model_name=model, lexicon=str(path), corpus=str(run_dir / "one.txt"), run_dir=str(run_dir)
    )
    took = seconds(extend_and_save, config)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    say(lexicon_lines=lines, extend_and_save_seconds=round(took, 1), peak_gib=round(peak, 2))


def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as aside:
        if arguments.only_lines:
            return bench_lines(arguments.model, arguments.lines, Path(aside))
        bench(arguments.model, arguments.lexicon, arguments.text, arguments.rounds, Path(aside))
    if arguments.lines:
        subprocess.run([sys.executable, *sys.argv, "--only-lines"], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name in ("model", "lexicon", "text"):
        parser.add_argument(name)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lines", type=int, default=0)
    parser.add_argument("--only-lines", action="store_true", help=argparse.SUPPRESS)
    main(parser.parse_args())
