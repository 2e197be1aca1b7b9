"""What loading a checkpoint takes of the card and of host memory, through train.load_model.

    python tests/measure_load.py FOLDER                Qwen2.5-14B's widths, 12 of its 48 layers
    python tests/measure_load.py FOLDER --layers 2     the same on less disk (4.2 GB)

FOLDER gets random bf16 weights in safetensors shards of 3.9 GB, like the hub's, where it has none;
9.7 GB with 12 layers. Loads in a process of its own and prints one JSON line. On the card: the most
allocated while loading, what stays, and where the input table is. On the host: the most anonymous
memory over what imports take (RssAnon; a shard is mapped, its pages count to no one), every 10 ms.
On an H100 (torch 2.11.0, 2026-11-22): 3.15 GiB at the most, 3.04 after (transformers 5.0.0 and
5.17.0; 4.57.6: 3.18), 0.2 GiB of host memory, 5 s.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

WIDTHS = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40,
          "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False}  # fmt: skip
SHARD_BYTES = 3.9e9
CODE = """
import json, sys, threading, time
sys.path.insert(0, {root!r})
import torch
import train
from extend_tokenizer import Config

def resident(kind):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(kind)) / 2**20

config = Config(model_name={folder!r}, lexicon="-", corpus="-", run_dir="-", max_gpu_gib=14.0)
train.apply()
place = train.find_place(config)
import transformers, bitsandbytes, accelerate
if place.device.type == "cuda":
    torch.zeros(1, device=place.device)
before, most, loading = resident("RssAnon"), 0.0, True

def watch():
    global most
    while loading:
        most = max(most, resident("RssAnon"))
        time.sleep(0.01)

thread = threading.Thread(target=watch)
thread.start()
began = time.perf_counter()
model = train.load_model(config, place)
seconds = time.perf_counter() - began
loading = False
thread.join()
result = dict(
    seconds=round(seconds, 1), host_most_gib=round(most - before, 2),
    host_after_gib=round(resident("RssAnon") - before, 2),
    input_table=str(model.get_input_embeddings().weight.device),
)
if place.device.type == "cuda":
    result |= dict(
        gpu=torch.cuda.get_device_name(),
        card_most_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2),
        card_after_gib=round(torch.cuda.memory_allocated() / 2**30, 2),
    )
print(json.dumps(result | train.versions()))
"""


def write_checkpoint(folder: Path, num_layers: int) -> None:
    """Random weights of a Qwen2 model, named as the library names them, shard by shard."""
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
    code = CODE.format(root=sys.path[0], folder=str(arguments.folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    result = {"layers": arguments.layers, "checkpoint_gib": round(stored / 2**30, 2)}
    print(json.dumps(result | json.loads(done.stdout.splitlines()[-1])))


if __name__ == "__main__":
    main(sys.argv[1:])
