"""Peak host memory of `recover.py export --format merged`, beside the tables that it rewrites.

    python tests/bench/measure_merge.py --rows 152064 --new 44223 --hidden 1024

Writes a random sharded checkpoint (embedding, head, and as much again in other tensors) and a run
folder beside it, merges in a process of its own, and prints one JSON line. "private" is memory that
the process has for itself (RssAnon, looked at every 5 ms); "resident" counts the pages of mapped
files too, which the system takes back when it needs them (VmHWM). "start" is the process with its
imports and nothing read.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from config import Config
from extend_tokenizer import new_words_hash
from recover import write_sentry

MIB = 2**20
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
CODE = """
import sys, time
import recover, transformers
print("ready", flush=True)
time.sleep(0.5)
recover.check_export = lambda *_: "not loaded back"  # the files hold no whole model
recover.main("export", *sys.argv[1:], "--format", "merged")
lines = open("/proc/self/status").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


def make_model(folder: Path, rows: int, hidden: int, dtype: torch.dtype) -> None:
    """Write three shards: embedding, other tensors, head."""
    folder.mkdir()
    shards = {
        "model-00001-of-00003.safetensors": {"model.embed_tokens.weight": (rows, hidden)},
        "model-00002-of-00003.safetensors": {
            f"model.layers.{i}.mlp.up_proj.weight": (rows // 8, hidden) for i in range(8)
        },
        "model-00003-of-00003.safetensors": {"lm_head.weight": (rows, hidden)},
    }
    for file, shapes in shards.items():
        tensors = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    config = {"model_type": "qwen2", "vocab_size": rows, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def make_run(folder: Path, model: Path, first_new_id: int, num_new: int, hidden: int) -> None:
    """Write a tokenizer of num_new added words, and a sentry of random input and output rows."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate(alphabet)}
    vocab |= {f"{alphabet[0]}{i}": i for i in range(len(alphabet), first_new_id)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = [f"word{i}" for i in range(num_new)]
    tokenizer.add_tokens([AddedToken(f" {word}", normalized=False) for word in words])
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    digest = new_words_hash(words, first_new_id)
    report = {"base_size": first_new_id, "new_words_sha256": digest}
    (folder / "tokenizer" / "report.json").write_text(json.dumps(report), encoding="utf-8")
    lines = [f"{i}\t{word}\t {word}\t0\t1" for i, word in enumerate(words, first_new_id)]
    table = "\n".join(["id\tword\tmatches\tbase_ids\tcount", *lines])
    (folder / "tokenizer" / "words.tsv").write_text(table + "\n", encoding="utf-8")
    tensors = {name: torch.randn(num_new, hidden) for name in ("input_rows", "output_rows")}
    config = Config(model_name=str(model), lexicon="words.txt", corpus="none", run_dir=str(folder))
    state = {
        "step": 1, "config": vars(config), "model_name": str(model), "model_revision": None,
        "words_sha256": digest, "first_new_id": first_new_id, "num_new_tokens": num_new,
    }  # fmt: skip
    texts = {"words.txt": "\n".join(words) + "\n", "metrics.jsonl": ""}
    write_sentry(folder / "snapshots", tensors, texts, state)


def private_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


def merge(folder: Path) -> dict[str, float]:
    """Export in a process of its own and look at its memory all the while."""
    command = [sys.executable, "-c", CODE, str(folder / "run"), str(folder / "out")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        process.stdout.readline()
        start = peak = private_mib(process.pid)
        began = time.perf_counter()
        while process.poll() is None:
            peak = max(peak, private_mib(process.pid))
            time.sleep(0.005)
        seconds = time.perf_counter() - began - 0.5
        resident = int(process.stdout.read().split()[-1]) / 1024
    figures = {"start_mib": start, "peak_private_mib": peak, "peak_resident_mib": resident}
    return {**figures, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("rows", 152_064), ("new", 44_223), ("hidden", 1024), ("padding", 399)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=DTYPES, default="BF16")
    parser.add_argument("--folder", help="where to write, default: a temporary folder")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        folder, first = Path(folder), a.rows - a.padding
        make_model(folder / "model", a.rows, a.hidden, DTYPES[a.dtype])
        make_run(folder / "run", folder / "model", first, a.new, a.hidden)
        figures = merge(folder)
    size = DTYPES[a.dtype].itemsize * a.hidden / MIB
    figures |= {"base_table_mib": a.rows * size, "new_table_mib": (first + a.new) * size}
    figures["limit_mib"] = 1.5 * figures["new_table_mib"]
    print(json.dumps({**vars(a), **{name: round(value) for name, value in figures.items()}}))


if __name__ == "__main__":
    main()
