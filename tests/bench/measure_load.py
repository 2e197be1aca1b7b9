"""Measure what machine.load_model takes of the card and of host memory while it loads a checkpoint.

    python tests/bench/measure_load.py FOLDER              Qwen2.5-14B's widths, 12 of its 48 layers
    python tests/bench/measure_load.py FOLDER --layers 2   the same on less disk (4.2 GB)

If FOLDER holds no model yet, random bf16 weights are written there first, in safetensors shards of
3.9 GB as the hub has them: 9.7 GB for 12 layers. A process of its own then loads the model, and one
JSON line says, in GiB:

    card_*      the most that was allocated while loading, and what stays
    host_*      the same for anonymous memory beyond what the imports take (RssAnon, read every
                10 ms); a shard is mapped, and its pages count to no one
    input_table the device where the input table is

On an H100 (torch 2.11.0, 2026-11-22) the card held 3.15 GiB at the most and 3.04 after
(transformers 5.0.0 and 5.17.0; 3.18 at the most on 4.57.6), the host 0.2 GiB more, and it took 5 s.
At that time the input table was loaded to the host. Now the overlay brings it there, after loading,
so the card should show 1.45 GiB more here (by arithmetic).
"""

import argparse
import importlib
import json
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save_file

from config import GIB, Config
from env_shim import apply
from machine import device_name, find_worker, load_model
from train import versions

WIDTHS = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40,
          "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False}  # fmt: skip
SHARD_BYTES = 3.9e9


def write_checkpoint(folder: Path, num_layers: int) -> None:
    """Write random weights of a Qwen2 model, named as the library names them, shard by shard."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**WIDTHS, num_hidden_layers=num_layers, architectures=["Qwen2ForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Qwen2ForCausalLM(config).named_parameters()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shard, shard_bytes, files = {}, 0, {}

    def write() -> None:
        name = f"model-{len(set(files.values())) + 1:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        weight = torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(0.02).cpu()
        if shard_bytes + weight.nbytes > SHARD_BYTES:
            write()
            shard_bytes = 0
        shard[name] = weight
        shard_bytes += weight.nbytes
    write()
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def anonymous_gib() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 2**20


def measure(folder: str) -> dict:
    """Load the model and say what it took; runs in a process of its own."""
    apply()
    for name in ("transformers", "accelerate", "bitsandbytes"):
        importlib.import_module(name)  # what the libraries take is not the model's
    config = Config(model_name=folder, lexicon="-", corpus="-", run_dir="-", max_gpu_gib=14.0)
    worker = find_worker(config)
    if worker.device.type == "cuda":
        torch.zeros(1, device=worker.device)  # CUDA's own memory is not the model's
    before, readings, loaded = anonymous_gib(), [], threading.Event()

    def watch() -> None:
        while not loaded.wait(0.01):
            readings.append(anonymous_gib())

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    model = load_model(config, worker)
    seconds = time.perf_counter() - began
    loaded.set()
    thread.join()
    result = {
        "device": device_name(worker), "seconds": round(seconds, 1),
        "host_most_gib": round(max(readings) - before, 2),
        "host_after_gib": round(anonymous_gib() - before, 2),
        "input_table": str(model.get_input_embeddings().weight.device),
    }  # fmt: skip
    if worker.device.type == "cuda":
        result["card_most_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        result["card_after_gib"] = round(torch.cuda.memory_allocated() / GIB, 2)
    return result | versions()


def main(argv: list[str]) -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if not (arguments.folder / "model.safetensors.index.json").exists():
        write_checkpoint(arguments.folder, arguments.layers)
    stored = sum(file.stat().st_size for file in arguments.folder.glob("*.safetensors"))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        measured = pool.submit(measure, str(arguments.folder)).result()
    sizes = {"layers": arguments.layers, "checkpoint_gib": round(stored / GIB, 2)}
    print(json.dumps(sizes | measured))


if __name__ == "__main__":
    main(sys.argv[1:])
