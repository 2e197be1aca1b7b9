"""Peak host memory of `recover.py export --format merged`, beside the tables that it rewrites.

    python tests/measure_merge.py --rows 152064 --new 44223 --hidden 1024 --dtype BF16

Writes a random sharded checkpoint (embedding, head, and as much again in other tensors) and a run
folder beside it, merges in a process of its own, and prints one JSON line. Peak is VmHWM: the
ru_maxrss of a child begins at its parent's.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parent.parent))
from recover import as_stored, tensor_header, write_sentry

MIB = 2**20
BYTES = {"F32": 4, "F16": 2, "BF16": 2}
CODE = """
import pathlib, sys
sys.path.insert(0, {folder!r})
import recover
recover.main("export", *sys.argv[1:], "--format", "merged")
lines = pathlib.Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


def write_random(path: Path, shapes: dict[str, tuple[int, int]], dtype: str) -> None:
    """A safetensors file of random tensors, a block of rows at a time."""
    sizes = {n: (dtype, list(s), s[0] * s[1] * BYTES[dtype]) for n, s in shapes.items()}
    rng = numpy.random.default_rng(0)
    with open(path, "wb") as file:
        file.write(tensor_header(sizes))
        for rows, width in shapes.values():
            for start in range(0, rows, 4096):
                block = rng.standard_normal((min(4096, rows - start), width), dtype="f4")
                file.write(as_stored(block, dtype))


def make_model(folder: Path, rows: int, hidden: int, dtype: str) -> None:
    """Three shards: embedding, other tensors, head."""
    folder.mkdir()
    shards = {
        "model-00001-of-00003.safetensors": {"model.embed_tokens.weight": (rows, hidden)},
        "model-00002-of-00003.safetensors": {
            f"model.layers.{i}.mlp.up_proj.weight": (rows // 8, hidden) for i in range(8)
        },
        "model-00003-of-00003.safetensors": {"lm_head.weight": (rows, hidden)},
    }
    for name, shapes in shards.items():
        write_random(folder / name, shapes, dtype)
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    config = {"model_type": "qwen2", "vocab_size": rows, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def make_run(folder: Path, model: Path, first_new_id: int, num_new: int, hidden: int) -> None:
    """A tokenizer of num_new added words and a sentry of random input and output rows."""
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
    digest = hashlib.sha256("\n".join([str(first_new_id), *words]).encode()).hexdigest()
    report = {"base_size": first_new_id, "matching": "spaced", "new_words_sha256": digest}
    (folder / "tokenizer" / "report.json").write_text(json.dumps(report), encoding="utf-8")
    rng = numpy.random.default_rng(1)
    names = ("input_rows", "output_rows")
    tensors = {name: rng.standard_normal((num_new, hidden), dtype="f4") for name in names}
    keys = (
        "init", "output_rows", "token_matching", "seq_len", "effective_batch_size", "learning_rate",
        "warmup_ratio", "max_steps", "quantization", "seed",
    )  # fmt: skip
    config = dict.fromkeys(keys, 0) | {"model_name": str(model), "model_revision": None}
    state = {
        "step": 1, "config": config, "model_name": str(model), "model_revision": None,
        "words_sha256": digest, "first_new_id": first_new_id, "num_new_tokens": num_new,
    }  # fmt: skip
    texts = {"words.txt": "\n".join(words) + "\n", "metrics.jsonl": ""}
    write_sentry(folder / "snapshots", tensors, texts, state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("rows", 152_064), ("new", 44_223), ("hidden", 1024), ("padding", 399)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=BYTES, default="BF16")
    parser.add_argument("--folder", help="where to write, default: a temporary folder")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        folder, first = Path(folder), a.rows - a.padding
        make_model(folder / "model", a.rows, a.hidden, a.dtype)
        make_run(folder / "run", folder / "model", first, a.new, a.hidden)
        code = CODE.format(folder=str(Path(__file__).parent.parent))
        began = time.perf_counter()
        command = [sys.executable, "-c", code, str(folder / "run"), str(folder / "out")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        size = BYTES[a.dtype] * a.hidden
        table, merged = a.rows * size / MIB, (first + a.new) * size / MIB
        print(json.dumps({
            **vars(a), "base_table_mib": round(table), "merged_table_mib": round(merged),
            "limit_mib": round(1.5 * table), "peak_mib": round(int(done.stdout.split()[-1]) / 1024),
            "seconds": round(seconds, 1),
        }))  # fmt: skip


if __name__ == "__main__":
    main()
