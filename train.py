"""Train the rows of a lexicon's words in a frozen language model; the same command continues a run.

    python train.py configs/sample.yaml                     the sample: CPU, offline, 20 s
    python train.py configs/qwen14b.yaml                    Qwen2.5-14B in NF4 on a 15 GB card
    python train.py configs/qwen14b.yaml --dry-run          memory plan, without loading weights
    python train.py configs/sample.yaml max_steps=20 --fresh
    torchrun --nproc-per-node 2 train.py CONFIG             the same steps on two cards

A step: effective_batch_size sequences in micro-batches through the frozen body; the loss over base
and new vocabulary gives gradients to the new rows alone; clip; Adafactor. Every position of every
sequence has one target and counts once, so the loss is nats per predicted token whatever the
micro-batch. Of the 330 ms that a 14B step of 2,048 tokens takes on an H100, the body's matrix
products have 194, dequantizing its weights 54, the loss 27, attention 13, and the rest, elementwise
work and the update of two row sets, 42 (README, "Speed and memory"). RUN_DIR gets config.yaml,
tokenizer/, metrics.jsonl, loss_table.md, loss.png, samples.md, snapshots/ (whole saves on the local
disk) and sentries/ (verified copies; or sentry_dir).
"""

import base64
import contextlib
import dataclasses
import datetime
import errno
import fcntl
import functools
import gc
import hashlib
import inspect
import json
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

# Pasted into a notebook below the other four, their names are there already.
if "check_environment" not in globals():
    from env_shim import apply, check_environment, installed_version, keep_cpu_weights_plain
if "Config" not in globals():
    from extend_tokenizer import (
        Config, ConfigError, NewWords, base_files, base_tokenizer, command_line_parser, divisors,
        extend, format_report, load_config, new_words_hash, one_line, plan_new_words, read_corpus,
        read_lexicon, run_command, save_new_words, write_config, write_text,
    )  # fmt: skip
if "SentryWriter" not in globals():
    from recover import (
        Sentry, SentryError, SentryWriter, pick_sentry, read_tensors, sentry_folders, set_aside,
        sync, write_tensors,
    )  # fmt: skip

EXAMPLE = "  python train.py configs/sample.yaml max_steps=60"
GIB = 2**30
SPARE_GIB, GRAPH_SPARE_GIB = 0.5, 1.2  # left free beside a pass; beside one kept in CUDA graphs
SAMPLE_TOKENS = 48  # tokens that continue each prompt
RUN_FILES = {  # in RUN_DIR, beside the tokens' cache
    ".launch", "config.yaml", "lexicon.txt", "tokenizer", "tokenizer.new", "tokenizer.old",
    "metrics.jsonl", "loss_table.md", "loss.png", "samples.md", "snapshots", "sentries",
    "tensorboard",
}  # fmt: skip
TOKEN_STREAMS = ("train", "val", "val_ends")
CLEAR_LINE = "\r\x1b[K"  # a terminal's current one
START_PATIENCE_SECONDS = 30.0  # for a mounted Drive that hangs while the saves are read
SILENCE = datetime.timedelta(minutes=3)  # of another process in a step; then it is taken for dead
PATIENCE = datetime.timedelta(hours=2)  # with another's download, or its disk
FLOAT16_LOSS_SCALE = 65536.0  # halved at each overflow, doubled after 200 steps without one
# A run may continue although these differ: they change how it runs, not what it computes. The
# content of lexicon and corpus is compared by hash.
HARMLESS_KEYS = {
    "compute_dtype", "device", "micro_batch_size", "max_steps", "gradient_checkpointing", "compile",
    "log_every", "eval_every", "save_every", "snapshot_every", "keep_sentries", "run_dir",
    "sentry_dir", "max_gpu_gib", "prompts", "tensorboard", "trust_remote_code", "lexicon", "corpus",
    "lexicon_min_count", "lexicon_min_base_tokens",
}  # fmt: skip
# But all processes of one run evaluate, save and end at the same step.
LOCAL_KEYS = HARMLESS_KEYS - {"max_steps", "eval_every", "save_every", "snapshot_every"}

# ---- Before torch: command line, memory plan -----------------------------------------------------


def parse_arguments(argv: list[str]):
    parser = command_line_parser(EXAMPLE)
    parser.add_argument("--dry-run", action="store_true", help="print the memory plan and stop")
    parser.add_argument(
        "--fresh", action="store_true", help="start over; the old run is kept aside"
    )
    parser.add_argument(
        "--step", type=int, help="continue from the sentry of this step and no other"
    )
    return parser.parse_intermixed_args(argv)


def number_bytes(config: Config) -> int:
    """Of a weight, or of an activation, on a card."""
    return 4 if config.compute_dtype == "float32" else 2


def memory_plan(
    shape: dict, num_new: int, config: Config, micro_batch_size: int
) -> dict[str, float]:
    """GiB that training takes on a card, by part; 'total' is the peak the allocator will report,
    'host memory' what it takes beside the card: layer inputs, save buffers, an untied input table.

    shape: the model's config.json. Activations are those of a decoder layer with gated MLP, every
    layer recomputed unless gradient_checkpointing is false. On Qwen2.5-14B's shapes at 16 x 128
    this says 11.10 GiB, at 8 x 512 11.38; measured: 11.23, 11.66 (README, "Speed and memory").
    """
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    heads, inner = shape["num_attention_heads"], shape["intermediate_size"]
    head_dim = shape.get("head_dim") or hidden // heads
    kv_dim = head_dim * shape.get("num_key_value_heads", heads)
    width = number_bytes(config)
    linear = layers * (2 * hidden * head_dim * heads + 2 * hidden * kv_dim + 3 * hidden * inner)
    # NF4: 4 bits, one byte of scale for 64 weights, and 4 bytes for 256 of those scales.
    body = linear * (0.5 + 1 / 64 + 4 / 64 / 256 if config.quantization == "nf4" else width)
    tokens = micro_batch_size * config.seq_len
    gemma = shape.get("model_type", "").startswith("gemma")  # some of its files leave the key out
    untied = not shape.get("tie_word_embeddings", gemma)
    separate = untied if config.output_rows == "auto" else config.output_rows != "shared"
    row_set, base_columns = 4 * num_new * hidden, shape["vocab_size"]
    step_tokens = config.effective_batch_size * config.seq_len
    loss = (
        min(tokens, 2048) * num_new * 4 + min(tokens, 256) * base_columns * 6 + tokens * hidden * 10
    )
    layer = tokens * width * (4.5 * inner + 1.2 * hidden + 4 * kv_dim) + 2 * width * hidden * inner
    kept = layers * (config.gradient_checkpointing == "false")
    inputs = tokens * hidden * width
    plan = {
        "body": body,
        "base head rows": width * base_columns * hidden,
        "new rows": row_set * (2 if separate else 1),
        "gradients": row_set * (config.output_rows != "frozen")
        + 4 * min(step_tokens, num_new) * hidden,
        "base rows of two steps": 2 * step_tokens * hidden * width,
        # recomputed layers' inputs wait on the host, but for two on their way
        "activations": 2 * inputs + kept * kept_layer_bytes(shape, tokens, config),
        "loss chunk or one layer": max(loss, layer),
    }
    plan["total"] = sum(plan.values())
    # torch pins a buffer as the next power of two
    pinned = [row_set] * (2 if separate else 1) + [(layers - kept) * inputs] * (kept < layers)
    plan["host memory"] = sum(2 ** math.ceil(math.log2(size)) for size in pinned)
    plan["host memory"] += width * base_columns * hidden * untied
    return {name: size / GIB for name, size in plan.items()}


def kept_layer_bytes(shape: dict, tokens: int, config: Config) -> float:
    """What a layer that is not recomputed keeps for backward, its input included: of the 14B at
    16 x 128, 0.29 GiB in eager mode, 0.20 with fused elementwise work (measured, see README)."""
    inner, hidden = shape["intermediate_size"], shape["hidden_size"]
    numbers = 4 * inner + 3.8 * hidden if config.compile == "false" else 2 * inner + 4.7 * hidden
    return tokens * number_bytes(config) * numbers


def dry_run(config: Config) -> None:
    """Print the memory plan line by line, the micro-batch it would try, and which cards it fits."""
    words = plan_new_words(config)
    shape, num_new = json.loads(words.files["config.json"]), len(words.words)
    cap = config.max_gpu_gib or 14.0
    sizes = [config.micro_batch_size]
    if config.micro_batch_size == "auto":
        sizes = divisors(config.effective_batch_size)
    plans = {size: memory_plan(shape, num_new, config, size) for size in sizes}
    micro = max((size for size in sizes if plans[size]["total"] <= cap), default=min(sizes))
    margin = cap - plans[micro]["total"]
    for name, gib in plans[micro].items():
        print(f"{name:26} {gib:8.2f} GiB")
        if name == "total":
            print(f"{'margin':26} {margin:8.2f} GiB under {cap:g}")
    accumulation = config.effective_batch_size // micro
    print(f"micro_batch_size {micro} x {accumulation}, seq_len {config.seq_len}")
    if config.gradient_checkpointing == "auto":
        layers = shape["num_hidden_layers"]
        layer = kept_layer_bytes(shape, micro * config.seq_len, config) / GIB
        spare = SPARE_GIB if config.compile == "false" else GRAPH_SPARE_GIB
        kept = max(min(int((margin - spare) / layer), layers), 0)
        peak = plans[micro]["total"] + kept * layer
        print(f"about {kept} of {layers} layers can keep their activations: peak {peak:.2f} GiB")
    size = plans[micro]["new rows"] * GIB * (1 + 1 / shape["hidden_size"])
    print(f"bytes per sentry {round(size):,}")
    for card, usable in (("T4", 14.0), ("L4", 21.8), ("A100 40 GB", 39.0), ("H100 80 GB", 78.5)):
        fits = [size for size in sizes if plans[size]["total"] <= usable]
        print(f"{card:11} {f'fits, micro_batch_size {max(fits)}' if fits else 'does not fit'}")


def check_files(config: Config) -> None:
    """Say in the first second all that is missing or empty; what is there is read again later."""
    reads = [(base_files, config), (read_corpus, config)]
    if config.lexicon != "from_corpus":
        reads.append((read_lexicon, config.lexicon))
    problems = []
    for read, source in reads:
        try:
            read(source)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)


def before_torch(arguments) -> None:
    """What needs no torch: a wrong config, a missing file or package is said, the memory plan."""
    config = load_config(arguments.config, *arguments.overrides)
    if not arguments.dry_run:
        if problems := check_environment(config.device, config.quantization):
            raise ConfigError(*problems)
    check_files(config)
    if arguments.dry_run:
        dry_run(config)


if __name__ == "__main__" and "__file__" in globals():
    ARGUMENTS = parse_arguments(sys.argv[1:])
    apply()
    STATUS = run_command(before_torch, ARGUMENTS)
    if STATUS or ARGUMENTS.dry_run:
        raise SystemExit(STATUS)

# ---- With torch: it takes two seconds to import --------------------------------------------------

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if "WakeOverlay" not in globals():
    from overlay import WakeOverlay, dense_weight, spherical_rows, subtoken_mean


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process runs: torchrun's rank and world size, its device and compute dtype."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    why: str
    group: dist.ProcessGroup | None = None  # where the processes wait for each other: `meet`

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def find_place(config: Config) -> Place:
    """Choose device and dtype, and join the other processes where torchrun started us.

    A GPU below compute capability 8.0 (a T4) computes in float16: torch.cuda.is_bf16_supported()
    says True there too, but counts emulation, which is slower than float32.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if config.effective_batch_size % world:
        raise ConfigError(
            f"{world} processes do not divide effective_batch_size {config.effective_batch_size};"
            f" start one of {', '.join(map(str, divisors(config.effective_batch_size)))}"
        )
    use_cuda = config.device != "cpu" and torch.cuda.is_available()
    if config.device == "cuda" and not use_cuda:
        raise ConfigError("device: 'cuda' was asked for but torch sees no CUDA GPU; use device=cpu")
    device, dtype, why = torch.device("cpu"), torch.float32, "a CPU"
    if use_cuda:
        number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= count:
            raise ConfigError(
                f"process {rank} ends: this machine has {count} GPU(s), and each process needs its"
                " own; start no more"
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
        capability = torch.cuda.get_device_capability(device)
        dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
        why = f"compute capability {capability[0]}.{capability[1]}"
        total = torch.cuda.get_device_properties(device).total_memory
        share = min((config.max_gpu_gib or math.inf) * GIB / total, 1.0)
        torch.cuda.set_per_process_memory_fraction(share, device)  # 1.0 undoes an earlier run's cap
    # Said outright, this switches off MKL's own choice of threads, which may follow the load:
    # another split of a sum is another last bit, and continued runs must have the same ones.
    torch.set_num_threads(torch.get_num_threads())
    if config.compute_dtype != "auto":
        dtype, why = getattr(torch, config.compute_dtype), "compute_dtype in the config"
    group = join_processes(rank, world, "nccl" if use_cuda else "gloo") if world > 1 else None
    return Place(rank, world, device, dtype, why, group)


def join_processes(rank: int, world: int, backend: str) -> dist.ProcessGroup:
    """Find the others where torchrun says. Raises: ConfigError where one of them does not come.

    In a step the others must come within SILENCE. The group returned is for `meet`: over gloo, on
    GPUs too, it notices at once when one of them has died.
    """
    try:
        if not dist.is_initialized():  # a notebook's second run has its group already
            store = next(dist.rendezvous("env://", timeout=datetime.timedelta(minutes=10)))[0]
            if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
                # torchrun 2.13 restarts on the old store, where the dead ones' addresses still
                # stand. Several nodes count their restarts each for itself: README, "Limits".
                attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                store = dist.PrefixStore(f"attempt_{attempt}", store)
            known = {"store": store, "rank": rank, "world_size": world}
            dist.init_process_group(backend, timeout=SILENCE, **known)
        dist.new_group(backend="gloo", timeout=SILENCE)  # can the others be reached at all?
        return dist.new_group(backend="gloo", timeout=PATIENCE)
    except RuntimeError as error:
        raise ConfigError(
            f"process {rank} ends: the others cannot be reached: {str(error).splitlines()[0]}"
            " (GLOO_SOCKET_IFNAME names the network interface, where it is the wrong one)"
        ) from error


def meet(place: Place) -> None:
    """Wait until all processes are here: one may have a model to download, or a slow disk."""
    if place.group:
        dist.barrier(group=place.group)


def add_up(place: Place, *tensors: Tensor) -> None:
    """Sum each tensor over all processes, in place."""
    if place.world > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


# ---- Data ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Data:
    """Token streams, and the held-out text they stand for.

    train, val: (tokens,) int64; val_ends: (val tokens,) character position where each token ends.
    Sequence i is x = stream[i T : i T + T] with targets y = stream[i T + 1 : i T + T + 1].
    """

    train: Tensor
    val: Tensor
    val_ends: Tensor
    val_text: str
    bos_id: int | None
    sha256: str


def split_text(text: str, val_fraction: float, parts: int = 10) -> tuple[str, str]:
    """Cut off the end of each of `parts` equal pieces as held-out text, at line ends if possible.

    Spread over the book, the held-out text is of all its chapters; cut before anything is shuffled,
    it shares no sequence with the training text, and it depends on text and fraction alone.
    """
    cuts = [0]
    for part in range(1, parts + 1):
        for place in (part - val_fraction, part):
            wanted = round(len(text) * place / parts)
            line_end = text.find("\n", wanted, wanted + len(text) // (20 * parts) + 1)
            cuts.append(len(text) if place == parts else line_end + 1 if line_end >= 0 else wanted)
    pieces = [text[start:end] for start, end in zip(cuts, cuts[1:])]
    return "".join(pieces[0::2]), "".join(pieces[1::2])


def tokens_hash(arrays: dict) -> bytes:
    return hashlib.sha256(b"".join(arrays[name].tobytes() for name in TOKEN_STREAMS)).digest()


def load_data(config: Config, words: NewWords) -> Data:
    """Tokenize the corpus, or read what an earlier start left in RUN_DIR/cache under the same hash.

    Raises: ConfigError where train or held-out text is shorter than one sequence.
    """
    texts = read_corpus(config)
    halves = [split_text(text, config.val_fraction) for text in texts]
    train_text, val_text = ("".join(half) for half in zip(*halves))
    words_hash = new_words_hash(words.words, words.first_new_id)
    key = [train_text, val_text, words_hash, words.tokenizer.to_str()]
    digest = hashlib.sha256("\0".join(key).encode("utf-8")).hexdigest()
    cache = Path(config.run_dir) / "cache" / f"tokens_{digest[:16]}.safetensors"
    arrays = None
    if cache.exists():
        with contextlib.suppress(SafetensorError):  # cut off by a machine's end
            arrays = read_tensors(cache)
    if arrays is None or tokens_hash(arrays) != bytes(arrays.get("sha256", b"")):
        train = words.tokenizer.encode(train_text, add_special_tokens=False)
        val = words.tokenizer.encode(val_text, add_special_tokens=False)
        arrays = {"train": train.ids, "val": val.ids, "val_ends": [end for _, end in val.offsets]}
        arrays = {name: torch.tensor(ids).numpy() for name, ids in arrays.items()}
        arrays["sha256"] = torch.tensor(list(tokens_hash(arrays)), dtype=torch.uint8).numpy()
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(f".part{os.getpid()}")
        write_tensors(part, arrays)
        sync(part)
        part.rename(cache)
    streams = {name: torch.from_numpy(arrays[name].copy()) for name in TOKEN_STREAMS}
    for name, change in (("train", "give more text"), ("val", "raise val_fraction")):
        if len(streams[name]) <= config.seq_len:
            raise ConfigError(
                f"corpus: the {name} text has {len(streams[name])} tokens, fewer than a sequence of"
                f" {config.seq_len} and its last target; {change} or lower seq_len"
            )
    text_hash = hashlib.sha256("\0".join(texts).encode("utf-8")).hexdigest()
    return Data(**streams, val_text=val_text, bos_id=words.bos_id, sha256=text_hash)


def count_sequences(stream: Tensor, seq_len: int) -> int:
    """How many whole sequences with a target for each token a stream holds."""
    return (len(stream) - 1) // seq_len


def sequences(
    stream: Tensor, numbers: Tensor, seq_len: int, bos_id: int | None
) -> tuple[Tensor, Tensor]:
    """(x, y), each (len(numbers), seq_len): every token of the stream but the first is one target.

    Where the base tokenizer puts a BOS before a text, it takes the place of each sequence's first
    input.
    """
    places = numbers[:, None] * seq_len + torch.arange(seq_len)
    x, y = stream[places], stream[places + 1]
    if bos_id is not None:
        x[:, 0] = bos_id
    return x, y


def step_sequence_numbers(step: int, batch_size: int, num_sequences: int, seed: int) -> Tensor:
    """The sequences of a step (1, 2, ...), by the step alone, so that continuing needs no state.

    Epoch e goes through the sequences in the order that seed and e give.
    """
    numbers = []
    for position in range((step - 1) * batch_size, step * batch_size):
        epoch, place = divmod(position, num_sequences)
        if not numbers or place == 0:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(num_sequences, generator=generator)
        numbers.append(order[place])
    return torch.stack(numbers)


# ---- Model ---------------------------------------------------------------------------------------


def placement(config: Config, place: Place) -> dict[str, str]:
    """device_map: all on the device, but beside a GPU an untied input table, which is only looked
    up and would take 1.45 GiB of the 14B's card. Checkpoints stored in 4 bits come whole."""
    from transformers import AutoConfig, AutoModelForCausalLM

    device, trust = str(place.device), {"trust_remote_code": config.trust_remote_code}
    if place.device.type == "cpu":
        return {"": device}
    shape = AutoConfig.from_pretrained(config.model_name, revision=config.model_revision, **trust)
    tied = shape.get_text_config().tie_word_embeddings
    if tied or getattr(shape, "quantization_config", None):
        return {"": device}
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(shape, **trust)
    table, device_map, prefix = module.get_input_embeddings(), {}, ""
    while module is not table:  # all that stands beside the way down to it; "" would cover it too
        children = dict(module.named_children())
        way = next(name for name, child in children.items() if table in child.modules())
        device_map |= {prefix + name: device for name in children if name != way}
        module, prefix = children[way], f"{prefix}{way}."
    return device_map | {prefix[:-1]: "cpu"}


def load_model(config: Config, place: Place):
    """The base model, frozen, its linear layers in NF4 (lm_head stays in compute dtype).

    Memory: weights go shard by shard to the device, and a 4-bit one is never whole there in 16 bits
    but for the one tensor being quantized (tests/measure_load.py; README, "Speed and memory").
    Raises: ConfigError with the library's reason in one line.
    """
    from accelerate.hooks import remove_hook_from_submodules
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    settings = {
        "revision": config.model_revision,
        "trust_remote_code": config.trust_remote_code,
        "dtype": place.dtype,  # defaults differ between transformers 4 and 5
    }
    if not sys.stderr.isatty():
        disable_progress_bar()
    # One advises a package for faster products on CPUs, the other tells what is asked for below.
    for name in ("bitsandbytes.backends.cpu.ops", "accelerate.big_modeling"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        settings["device_map"] = placement(config, place)
        if config.quantization == "nf4":
            # without the last no module may stay on the CPU; with it none there is quantized
            settings["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=place.dtype,
                llm_int8_enable_fp32_cpu_offload=len(settings["device_map"]) > 1,
            )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(config.model_name, **settings)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"model_name: {config.model_name}: {one_line(error)}") from error
    remove_hook_from_submodules(model)  # they would carry the input table to the card at each use
    model.requires_grad_(False)  # after a 4-bit load, versions differ in what is left trainable
    keep_cpu_weights_plain(model)
    return model.eval()


def first_rows(
    config: Config, model, words: NewWords, sentry: Sentry | None = None
) -> tuple[Tensor, Tensor | None, bool]:
    """(input rows, output rows or None where shared, whether the output side trains) at step 0;
    zeros where a sentry's take their place: the 14B's means are 3 s of work on two CPU cores."""
    modules = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [dense_weight(module) for module in modules]
    tied = tables[0].data_ptr() == tables[1].data_ptr()
    mode = config.output_rows
    if mode == "auto":
        mode = "shared" if tied else "separate"
    rows = []
    for table in tables[:1] if mode == "shared" else tables:
        table = table[: words.first_new_id]
        if sentry:
            rows.append(torch.zeros(len(words.words), table.shape[1]))
        elif config.init == "subtoken_mean":
            rows.append(subtoken_mean(table, words.spellings))
        else:
            # one seed for both sides: the first runs' tables were one, new rows included
            rows.append(spherical_rows(table, len(words.words), config.init_radius, config.seed))
    return rows[0], rows[1] if len(rows) == 2 else None, mode != "frozen"


@functools.cache
def transfer_stream(device: torch.device) -> "torch.cuda.Stream":
    """The stream of layer inputs on their way; on a CPU one that does nothing."""
    return torch.get_device_module(device).Stream()


class HostInputs:
    """The inputs of recomputed layers, in host memory between forward and backward.

    On the card they take 20 MiB a layer of the 14B at 16 x 128, 0.9 GiB in all. One side stream
    carries them both ways in order, each layer's under the computation of the one before it.
    Memory: layers x B x T x H of the compute dtype on the host, pinned beside a GPU
    Source: the idea is Unsloth's, "offloaded gradient checkpointing"
    """

    def __init__(self, num_layers: int, device: torch.device):
        self.num_layers, self.device, self.buffer = num_layers, device, torch.empty(0)
        self.backend = torch.get_device_module(device)  # torch.cpu has streams that do nothing
        self.side, self.arriving = transfer_stream(device), {}

    def put(self, number: int, hidden_states: Tensor) -> "torch.cuda.Event":
        """Start one layer's input on its way; it must stay alive until the event returned."""
        if self.buffer.shape[1:] != hidden_states.shape:
            shape, pinned = (self.num_layers, *hidden_states.shape), hidden_states.is_cuda
            self.buffer = torch.empty(shape, dtype=hidden_states.dtype, pin_memory=pinned)
        return self.copy(self.buffer[number], hidden_states.detach())

    def copy(self, target: Tensor, source: Tensor) -> "torch.cuda.Event":
        self.side.wait_stream(self.backend.current_stream())
        with self.backend.stream(self.side):
            target.copy_(source, non_blocking=True)
        done = self.backend.Event()
        done.record(self.side)
        return done

    def fetch(self, number: int) -> tuple[Tensor, "torch.cuda.Event"]:
        hidden_states = torch.empty_like(self.buffer[number], device=self.device)
        return hidden_states, self.copy(hidden_states, self.buffer[number])

    def take(self, number: int) -> Tensor:
        """The layer's input back on the device, (B, T, H); the one before it starts to come."""
        hidden_states, here = self.arriving.pop(number, None) or self.fetch(number)
        if number > 0:
            self.arriving[number - 1] = self.fetch(number - 1)
        here.wait()
        return hidden_states.requires_grad_()


def recompute_layers(body, num_layers: int) -> None:
    """Have the first num_layers of body.layers recompute their activations in backward.

    The last ones keep theirs: backward frees them first. Our own wrapper on each layer, because the
    library's switch is for all layers, is reentrant by default in transformers 4 and not in 5, and
    asks for train mode.
    """
    device = next(body.layers.parameters()).device
    if device.type == "cuda":  # after a pass broken off, inputs still on their way to memory that
        torch.cuda.synchronize(device)  # goes with the wrappers of before
    inputs = HostInputs(num_layers, device)
    for number, layer in enumerate(body.layers):
        layer.__dict__.pop("forward", None)  # back to the class's own
        if number < num_layers:
            layer.forward = recomputing(layer.forward, number, inputs)


def recomputing(forward, number: int, inputs: HostInputs):
    """forward, but nothing it saves stays until backward, and its input waits on the host."""

    def call(hidden_states: Tensor, *arguments, **keywords):
        if not torch.is_grad_enabled():
            return forward(hidden_states, *arguments, **keywords)
        given, sent = [hidden_states], inputs.put(number, hidden_states)

        def run(*arguments, **keywords):
            source = given.pop() if given else inputs.take(number)
            return forward(source, *arguments, **keywords)

        outputs = checkpoint(
            run, *arguments, use_reentrant=False, preserve_rng_state=False,
            determinism_check="none", **keywords,
        )  # fmt: skip
        sent.wait()  # and only now may its memory be used again
        return outputs

    return call


def attend_causally(model) -> None:
    """Attention without a mask, as whole sequences need none; and the same in a CUDA graph as out
    of one, where the library makes a dense mask and copies keys and values for each query head
    (32 MiB a layer of the 14B at 16 x 128, an estimate). Models with sliding windows keep theirs.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    config = model.config.get_text_config()
    if config._attn_implementation == "sdpa" and not getattr(config, "sliding_window", None):
        AttentionInterface.register("causal_sdpa", sdpa_attention_forward)  # and no mask for it
        model.set_attn_implementation("causal_sdpa")


def fuse_elementwise(model, dtype: torch.dtype) -> None:
    """Compile RMSNorm, gated activation and rotary embedding into one kernel each, for training.

    These are memory-bound: fused they save 95 of the 407 ms that the kernels of a 14B step take on
    an H100. Pieces and not whole layers: a compiled layer recomputes its down projection too, which
    nothing needs (331 ms against 312). All pieces are compared with the originals in dtype, forward
    and backward, before one is used.
    Raises: RuntimeError or ImportError where there is no Triton or compiler, or other numbers.
    """
    torch._dynamo.reset()  # of an earlier run here; a piece has a kernel for each micro-batch tried
    torch._dynamo.config.recompile_limit = 64
    hidden_size = model.config.get_text_config().hidden_size
    modules = list(model.modules())
    norms = [module for module in modules if type(module).__name__.endswith("RMSNorm")]
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    gated = [module for module in modules if all(hasattr(module, name) for name in names)]
    modeling, rotary = restore_rotary(model)
    probe = torch.randn(4, 2, 64, hidden_size, device=model.device, dtype=dtype)
    forwards = {}
    for kind in {type(module) for module in norms}:
        same = [module for module in norms if type(module) is kind]
        size = same[0].weight.shape[0]
        fused = when_training(kind.forward, probe[0, ..., :size], before=(same[0],))
        forwards |= {module: types.MethodType(fused, module) for module in same}
    if gated:
        activation = gated[0].act_fn
        fused = when_training(lambda a, b: activation(a) * b, probe[0], probe[1])
        forwards |= {module: functools.partial(gated_mlp, module, fused) for module in gated}
    if rotary and list(inspect.signature(rotary).parameters)[:4] == ["q", "k", "cos", "sin"]:
        attention = getattr(model.base_model.layers[0], "self_attn", None)
        q, k, cos, sin = probe[..., : getattr(attention, "head_dim", 64)]
        rotary = when_training(rotary, q[:, None], k[:, None], after=(cos, sin))
    for module, forward in forwards.items():
        module.forward = forward
    if rotary:
        modeling.apply_rotary_pos_emb = rotary  # attention finds it by this name


def restore_rotary(model) -> tuple[types.ModuleType, Callable | None]:
    """The module of the model's layers and its function for rotary embedding, put back there as it
    was before an earlier run in this process fused it."""
    modeling = sys.modules[type(model.base_model.layers[0]).__module__]
    rotary = getattr(modeling, "apply_rotary_pos_emb", None)
    if rotary is not None:
        modeling.apply_rotary_pos_emb = rotary = getattr(rotary, "eager", rotary)
    return modeling, rotary


def when_training(original: Callable, *probes: Tensor, before=(), after=()) -> Callable:
    """`original`, compiled where gradients are on; shapes vary in evaluation and generation.

    before, after: its arguments that take no gradient
    Raises: RuntimeError where its results or gradients on the probes differ.
    """
    compiled, results = torch.compile(original, dynamic=False), []
    for function in (original, compiled):
        inputs = [probe.detach().clone().requires_grad_() for probe in probes]
        with torch.enable_grad():
            outputs = function(*before, *inputs, *after)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            grads = torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])
        results.append([tensor.detach().float() for tensor in (*outputs, *grads)])
    for wanted, got in zip(*results):
        difference = ((got - wanted).abs().max() / wanted.abs().max()).item()
        if not difference <= 0.03:  # bfloat16 rounds at each operation, the kernel once: 0.01
            raise RuntimeError(f"a compiled piece differs by {difference:.2g} of its largest value")

    def call(*arguments, **keywords):
        function = compiled if torch.is_grad_enabled() else original
        return function(*arguments, **keywords)

    call.eager = original
    return call


def gated_mlp(module, gate, hidden_states: Tensor) -> Tensor:
    """down(activation(gate(h)) * up(h)), as every model with these four attributes computes it."""
    return module.down_proj(gate(module.gate_proj(hidden_states), module.up_proj(hidden_states)))


# ---- A step --------------------------------------------------------------------------------------


@dataclasses.dataclass
class LossScale:
    """float16 alone: backward runs on gradients times `value`, a power of two."""

    value: float = 1.0
    good_steps: int = 0

    def overflowed(self) -> None:
        self.value, self.good_steps = self.value / 2, 0

    def agree(self, lowest: float) -> None:
        """Take the lowest of all processes, as the sentry of the first must serve them all."""
        if lowest < self.value:
            self.value, self.good_steps = lowest, 0

    def step_done(self) -> None:
        self.good_steps += 1
        if self.value < FLOAT16_LOSS_SCALE and self.good_steps % 200 == 0:
            self.value *= 2


def learning_rate_at(step: int, config: Config) -> float:
    """Linear warm-up to the peak at warmup_ratio x max_steps, then cosine to 0 at max_steps."""
    warmup_steps = round(config.warmup_ratio * config.max_steps)
    if step <= warmup_steps:
        return config.learning_rate * step / warmup_steps
    share = (step - warmup_steps) / max(config.max_steps - warmup_steps, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def forward_backward(
    overlay: WakeOverlay,
    x: Tensor,
    y: Tensor,
    base_embeds: Tensor,
    scale: float,
    loss_scale: LossScale,
    after_loss=None,
) -> Tensor:
    """One micro-batch: add the gradients of scale * (sum of losses) to the overlay's.

    Shapes: x, y (B, T) int64 on the card; base_embeds (B, T, H) -> losses (B, T) fp32.
    A float16 overflow halves the loss scale and repeats the pass, so no step is skipped.
    """
    with torch.no_grad():
        inputs_embeds = overlay.embed(x, base_embeds).requires_grad_()
    grad = None
    while True:
        hidden_states = overlay.body(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state
        if grad is None:
            losses, grad = overlay.loss(hidden_states.detach(), y, scale)
            if after_loss:
                after_loss()
        scaled = grad.to(hidden_states.dtype)
        if hidden_states.dtype == torch.float16:
            scaled = (grad * loss_scale.value).to(torch.float16)
        else:
            grad = losses  # its 40 MiB go before backward needs them
        (input_grad,) = torch.autograd.grad(hidden_states, inputs_embeds, scaled)
        finite = input_grad.dtype != torch.float16 or input_grad.isfinite().all().item()
        if finite or loss_scale.value <= 1.0 or not losses.isfinite().all():
            break  # not finite before backward: no scale can help
        loss_scale.overflowed()
    overlay.add_input_gradient(x, input_grad.float() / loss_scale.value)
    return losses


class GraphedPass:
    """forward_backward of one micro-batch shape as two CUDA graphs, up to the loss and after it.

    A 14B step is 9,000 kernel launches; on an H100 they take Python longer than the card takes to
    run them. Replaying them costs nothing. Memory: what a pass takes stays reserved between steps.
    """

    def __init__(self, overlay: WakeOverlay, shape: tuple[int, int], scale: float):
        device, hidden_size = overlay.base_rows.device, overlay.base_rows.shape[1]
        self.overlay, self.scale = overlay, scale
        # The graphs write into the host buffers of these wrappers (HostInputs): keep them.
        self.forwards = [layer.forward for layer in overlay.body.layers]
        self.inputs_embeds = torch.zeros(*shape, hidden_size, device=device, dtype=overlay.dtype)
        self.inputs_embeds.requires_grad_()
        self.labels = torch.zeros(shape, device=device, dtype=torch.int64)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate their workspaces outside the capture
            for _ in range(2):
                self.forward()
                self.backward()
            del self.hidden_states, self.grad, self.losses, self.input_grad
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.empty_cache()
        self.to_loss, self.to_inputs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.record(self.to_loss, self.forward)
        self.record(self.to_inputs, self.backward, self.to_loss.pool())

    def record(self, graph: "torch.cuda.CUDAGraph", work: Callable, pool=None) -> None:
        """Capture `work`. Out of memory there, the capture ends in good order before that is
        raised; broken off, it would leave the allocator in a capture for good."""
        failed = None
        with torch.cuda.graph(graph, pool=pool):
            try:
                work()
            except torch.OutOfMemoryError as error:
                failed = error
                main, side = torch.cuda.current_stream(), transfer_stream(self.labels.device)
                side.wait_stream(main)  # a layer's input may be on its way
                main.wait_stream(side)
        if failed:
            raise failed

    def forward(self) -> None:
        body = self.overlay.body(inputs_embeds=self.inputs_embeds, use_cache=False)
        self.hidden_states = body.last_hidden_state
        self.losses, self.grad = self.overlay.loss(
            self.hidden_states.detach(), self.labels, self.scale
        )

    def backward(self) -> None:
        upstream = self.grad.to(self.hidden_states.dtype)
        (self.input_grad,) = torch.autograd.grad(self.hidden_states, self.inputs_embeds, upstream)

    def __call__(self, x: Tensor, y: Tensor, base_embeds: Tensor, after_loss=None) -> Tensor:
        with torch.no_grad():
            self.inputs_embeds.copy_(self.overlay.embed(x, base_embeds))
        self.labels.copy_(y)
        self.to_loss.replay()
        if after_loss:
            after_loss()
        self.to_inputs.replay()
        self.overlay.add_input_gradient(x, self.input_grad)
        return self.losses


def adafactor_update(
    rows: Tensor,
    grad: Tensor,
    mean_squares: dict[str, Tensor],
    step: int,
    learning_rate: float,
    grad_scale: float = 1.0,
    touched: Tensor | None = None,
    untouched_grad: Tensor | None = None,
) -> None:
    """One Adafactor step on `rows`, in blocks, on grad x grad_scale. Equal to transformers'

        Adafactor(lr, eps=(1e-30, 1e-3), clip_threshold=1.0, decay_rate=-0.8, scale_parameter=False,
                  relative_step=False)

    Shapes: rows (N, H) fp32; grad (N, H) fp32, or (U, H) for the rows `touched` (U,), all others
            having untouched_grad (H,), or zero; mean_squares: 'row' (N,) and 'column' (H,), updated
            in place
    Memory: one temporary of 4,096 rows (80 MiB at H = 5,120); the library's are 2 x N x H.
    Source: Shazeer and Stern, "Adafactor", 2018
    """
    num_rows, hidden_size = rows.shape
    decay = 1.0 - step**-0.8
    blocks = [slice(s, min(s + 4096, len(grad))) for s in range(0, len(grad), 4096)]
    row_squares = torch.linalg.vector_norm(grad, dim=1).mul_(grad_scale).square_() / hidden_size
    column_squares = torch.linalg.vector_norm(grad, dim=0).mul_(grad_scale).square_() / num_rows
    row, column = mean_squares["row"], mean_squares["column"]
    if touched is not None:
        other = torch.zeros_like(column) if untouched_grad is None else untouched_grad * grad_scale
        column_squares += other.square() * ((num_rows - len(grad)) / num_rows)
        others = other.square().mean().repeat(num_rows)
        row_squares = others.index_copy_(0, touched, row_squares)
    row.mul_(decay).add_(row_squares + 1e-30, alpha=1 - decay)
    column.mul_(decay).add_(column_squares + 1e-30, alpha=1 - decay)
    all_factors, column_factor = (row / row.mean()).rsqrt(), column.rsqrt()
    row_factor = all_factors if touched is None else all_factors[touched]
    column_factor = column_factor * grad_scale
    total = torch.zeros((), device=grad.device)
    for block in blocks:
        norms = torch.linalg.vector_norm(grad[block] * column_factor, dim=1)
        total += norms.mul_(row_factor[block]).square_().sum()
    if untouched_grad is not None:
        others = all_factors.index_fill(0, touched, 0.0)
        total += others.square().sum() * (untouched_grad * column_factor).square().sum()
    clip = (total / (num_rows * hidden_size)).sqrt().clamp(min=1.0)
    rate = learning_rate / clip
    if untouched_grad is not None:  # the same direction for every row, so an outer product
        rows.addr_(others, untouched_grad * column_factor * -rate)
    row_factor = (row_factor * rate)[:, None]
    for block in blocks:
        update = grad[block] * column_factor
        if touched is None:
            rows[block].addcmul_(update, row_factor[block], value=-1)
        else:
            rows[touched[block]] -= update * row_factor[block]


class Optimizer:
    """Adafactor's statistics for the row sets that train, and the clipped update of all of them."""

    def __init__(self, overlay: WakeOverlay):
        self.overlay = overlay
        separate = overlay.output_rows is not None and overlay.train_output
        names = ["input_rows", "output_rows"] if separate else ["input_rows"]
        num_rows, hidden_size = overlay.input_rows.shape
        zeros = functools.partial(torch.zeros, device=overlay.input_rows.device)
        self.mean_squares = {
            name: {"row": zeros(num_rows), "column": zeros(hidden_size)} for name in names
        }

    @torch.no_grad()
    def gradients(self) -> list[tuple[str, Tensor, Tensor | None]]:
        """(row set, gradient, touched rows); that of shared rows is the sum of both sides'."""
        overlay = self.overlay
        if overlay.output_rows is None and overlay.train_output:
            # touched holds each row once, so this addition is deterministic
            overlay.output_grad.index_add_(0, overlay.touched, overlay.input_grad)
            overlay.input_grad.zero_()
            return [("input_rows", overlay.output_grad, None)]
        found = [("input_rows", overlay.input_grad, overlay.touched)]
        if "output_rows" in self.mean_squares:
            found.append(("output_rows", overlay.output_grad, None))
        return found

    @torch.no_grad()
    def update(
        self, gradients, step: int, learning_rate: float, grad_scale: float, coupling: float = 0.0
    ) -> None:
        """Move every row set; uses the gradients up.

        With coupling, coupling / sqrt(N) times the sum of all N rows' gradients is added to each.
        What all new words have in common (how often any of them comes, what such a word does to the
        next) is then learnt from every occurrence, and reaches words that training never sees.
        """
        for name, grad, touched in gradients:
            rows = getattr(self.overlay, name).data
            common = grad.sum(dim=0) * (coupling / math.sqrt(len(rows))) if coupling else None
            if common is not None:
                grad += common
            others = common if touched is not None else None
            state = self.mean_squares[name]
            adafactor_update(rows, grad, state, step, learning_rate, grad_scale, touched, others)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a sentry holds, by name; the tensors themselves, not copies."""
        found = {"input_rows": self.overlay.input_rows.data}
        if self.overlay.output_rows is not None:
            found["output_rows"] = self.overlay.output_rows.data
        for name, mean_squares in self.mean_squares.items():
            found[f"{name}.row_mean_square"] = mean_squares["row"]
            found[f"{name}.column_mean_square"] = mean_squares["column"]
        return found


# ---- Evaluation ----------------------------------------------------------------------------------


def shares(num_sequences: int, micro_batch_size: int, place: Place) -> Iterator[range]:
    """The numbers of this process's sequences, a micro-batch at a time; each process has its own
    micro_batch_size."""
    first, end = (num_sequences * rank // place.world for rank in (place.rank, place.rank + 1))
    for start in range(first, end, micro_batch_size):
        yield range(start, min(start + micro_batch_size, end))


@torch.no_grad()
def evaluate(
    overlay: WakeOverlay, data: Data, config: Config, place: Place, micro_batch_size: int
) -> dict[str, float]:
    """Loss on every held-out sequence, split over the processes.

    -> val_loss (nats per predicted token), val_bits_per_byte (of the text those tokens stand for,
    so comparable across vocabularies); val_loss_new_words, val_loss_ordinary by kind of target.
    """
    num_sequences = count_sequences(data.val, config.seq_len)
    sums = torch.zeros(2, 2, dtype=torch.float64)  # nats and count; on ordinary and new targets
    for numbers in shares(num_sequences, micro_batch_size, place):
        x, y = sequences(data.val, torch.tensor(numbers), config.seq_len, data.bos_id)
        hidden = overlay.body(inputs_embeds=overlay.embed(x), use_cache=False).last_hidden_state
        losses = overlay.loss(hidden, y)[0].double().cpu()
        for kind, of_kind in enumerate((y < overlay.first_new_id, y >= overlay.first_new_id)):
            sums[kind] += torch.stack([losses[of_kind].sum(), of_kind.sum()])
    sums = sums.to(place.device)
    meet(place)
    add_up(place, sums)
    (nats, count), (new_nats, new_count) = sums.tolist()
    text = data.val_text[data.val_ends[0] : data.val_ends[num_sequences * config.seq_len]]
    return {
        "val_loss": (new_nats + nats) / (new_count + count),
        "val_bits_per_byte": (new_nats + nats) / math.log(2) / len(text.encode("utf-8")),
        "val_loss_new_words": new_nats / max(new_count, 1),
        "val_loss_ordinary": nats / max(count, 1),
    }


@torch.no_grad()
def evaluate_base(
    overlay: WakeOverlay, data: Data, config: Config, place: Place, micro_batch_size: int
) -> float:
    """Bits per byte of the unextended base model with its own tokenizer, on the same held-out text.

    Each sequence is the text of one of ours, so both models see the same characters of context.
    """
    tokenizer = base_tokenizer(config)
    ends, seq_len = data.val_ends.tolist(), config.seq_len
    num_sequences = count_sequences(data.val, seq_len)
    total = torch.zeros(1, dtype=torch.float64)
    for numbers in shares(num_sequences, micro_batch_size, place):
        pairs = []
        for number in numbers:
            first, middle, context = number * seq_len, ends[number * seq_len], ""
            if data.bos_id is None:
                context = data.val_text[ends[first - 1] if first else 0 : middle]
            text = context + data.val_text[middle : ends[first + seq_len]]
            encoding = tokenizer.encode(text, add_special_tokens=False)
            targets = [
                i if end > len(context) else -100
                for i, (_, end) in zip(encoding.ids, encoding.offsets)
            ]
            ids = encoding.ids if data.bos_id is None else [data.bos_id, *encoding.ids]
            pairs.append((ids[:-1], targets[1:] if data.bos_id is None else targets))
        width = max(len(ids) for ids, _ in pairs)  # causal: what fills the ends cannot matter
        x = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in pairs])
        y = torch.tensor([targets + [-100] * (width - len(targets)) for _, targets in pairs])
        body = overlay.body(inputs_embeds=overlay.base_embed(x), use_cache=False)
        losses, _ = overlay.loss(body.last_hidden_state, y, base_only=True)
        total += losses.double().sum().cpu()
    total = total.to(place.device)
    meet(place)
    add_up(place, total)
    text = data.val_text[ends[0] : ends[num_sequences * seq_len]]
    return total.item() / math.log(2) / len(text.encode("utf-8"))


def sample(model, config: Config, words: NewWords) -> list[str]:
    """Continue each prompt with a fixed seed, new words marked **so**; the random state stays."""
    texts, device = [], model.device
    for prompt in config.prompts:
        ids = words.tokenizer.encode(prompt).ids
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            out = model.generate(
                torch.tensor([ids], device=device), max_new_tokens=SAMPLE_TOKENS, do_sample=True,
                top_p=0.95, top_k=0, pad_token_id=0,
                attention_mask=torch.ones(1, len(ids), device=device, dtype=torch.long),
            )[0].tolist()  # fmt: skip
        text = shorter = ""
        for end, token in enumerate(out, 1):
            longer = words.tokenizer.decode(out[:end])
            same = len(os.path.commonprefix([shorter, longer]))  # a later byte mends half a letter
            text, piece = text[: len(text) - len(shorter) + same], longer[same:]
            if token >= words.first_new_id:
                piece = piece.replace(piece.strip(), f"**{piece.strip()}**", 1)
            text, shorter = text + piece, longer
        texts.append(text)
    return texts


# ---- Records -------------------------------------------------------------------------------------


def loss_table(records: list[dict]) -> str:
    """The run's loss table in Markdown, one line an evaluation, ready to paste."""
    lines, best, train_loss = ["| Step | Train | Val | Notes |", "|---|---|---|---|"], math.inf, "-"
    for record in records:
        if record["kind"] == "train":
            train_loss = f"{record['loss']:.4f}"
            continue
        notes = [f"{record['val_bits_per_byte']:.3f} bits/byte"]
        if best == math.inf:
            notes.append(
                f"base model {record['base_bits_per_byte']:.3f},"
                f" uniform loss {record['uniform_loss']:.2f}"
            )
        if record["val_loss"] < best:
            best = record["val_loss"]
            notes.append("best")
        notes += record["warnings"]
        told = f"{record['val_loss']:.4f} | {'; '.join(notes)}"
        lines.append(f"| {record['step']} | {train_loss} | {told} |")
    return "\n".join(lines) + "\n"


def plot_losses(records: list[dict], path: Path) -> None:
    """loss.png: nats per token beside the uniform line, bits per byte beside the base model's."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state in a notebook

    trained = [record for record in records if record["kind"] == "train"]
    evaluated = [record for record in records if record["kind"] == "eval"]
    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2)
    held_out = {"label": "held-out", "color": "tab:orange", "marker": "."}
    for axes, rows, name, style in (
        (left, trained, "loss", {"label": "train", "color": "tab:blue", "lw": 1}),
        (left, evaluated, "val_loss", held_out),
        (right, evaluated, "val_bits_per_byte", held_out),
    ):
        axes.plot([r["step"] for r in rows], [r[name] for r in rows], **style)
    first, uniform, base = evaluated[0], "uniform guess, ln(vocabulary)", "unextended base model"
    left.axhline(first["uniform_loss"], color="tab:red", ls=":", label=uniform)
    right.axhline(first["base_bits_per_byte"], color="tab:green", ls="--", label=base)
    left.set(xlabel="step", ylabel="loss, nats per predicted token", title="Loss")
    right.set(
        xlabel="step", ylabel="bits per byte of held-out text", title="Against the base model"
    )
    for axes in (left, right):
        axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png")
    part.replace(path)


@dataclasses.dataclass
class Records:
    """metrics.jsonl and all made of it. A continued run starts from the sentry's own copy."""

    folder: Path
    config: Config
    lines: list[str] = dataclasses.field(default_factory=list)
    samples: str = ""
    board: object = None

    def __post_init__(self):
        write_text(self.folder / "metrics.jsonl", "".join(self.lines))
        write_text(self.folder / "samples.md", self.samples)
        if any(record["kind"] == "eval" for record in self.parsed()):
            self.draw()
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.folder / "tensorboard")

    def parsed(self) -> list[dict]:
        return [json.loads(line) for line in self.lines]

    def add(self, record: dict) -> None:
        self.lines.append(json.dumps(record) + "\n")
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(self.lines[-1])
        if self.board:
            for name, value in record.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{record['kind']}/{name}", value, record["step"])
        if record["kind"] == "eval":
            self.draw()

    def draw(self) -> None:
        records = self.parsed()
        write_text(self.folder / "loss_table.md", loss_table(records))
        plot_losses(records, self.folder / "loss.png")

    def add_samples(self, step: int, texts: list[str]) -> None:
        quotes = [f"> {' '.join(text.split())}\n\n" for text in texts]
        self.samples += f"## Step {step}\n\n" + "".join(quotes)
        write_text(self.folder / "samples.md", self.samples)


class Progress:
    """On a terminal one line, redrawn every two seconds at most; elsewhere one every log_every."""

    def __init__(self, place: Place, config: Config, first_step: int):
        self.place, self.config, self.first_step = place, config, first_step
        self.terminal = place.rank == 0 and sys.stdout.isatty()
        self.drawn_at, self.seconds = 0.0, []

    def step(self, step: int, line: str, seconds: float) -> None:
        if step - self.first_step > 10 or self.config.max_steps - self.first_step <= 20:
            self.seconds.append(seconds)  # the first ten warm up
        if recent := self.seconds[-50:]:
            left = sum(recent) / len(recent) * (self.config.max_steps - step)
            line += f"  {datetime.timedelta(seconds=round(left))} left"
        if self.terminal and time.monotonic() - self.drawn_at > 2:
            self.drawn_at = time.monotonic()
            columns = shutil.get_terminal_size().columns  # a line that wraps cannot be taken back
            print(f"{CLEAR_LINE}{line[: columns - 1]}", end="", flush=True)
        logged = step % self.config.log_every == 0 or step == self.config.max_steps
        if not self.terminal and logged:
            self.place.say(line)

    def say(self, text: str) -> None:
        self.place.say(CLEAR_LINE + text if self.terminal else text)

    def close(self) -> None:
        if self.terminal:
            print(CLEAR_LINE, end="", flush=True)


# ---- Saving and continuing -----------------------------------------------------------------------


def lock_run(run_dir: Path):
    """Hold RUN_DIR for this process; the lock goes with the process, however it dies.

    Raises: ConfigError where another training holds it, or where nothing can be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "w")
    except OSError as error:
        raise ConfigError(f"run_dir: {error}; give a folder that can be written") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(
            f"run_dir: another training is using {run_dir}; wait for it, or give another run_dir"
        ) from None
    return lock


def start_over(config: Config) -> None:
    """--fresh: put the old run's files and sentries into old-1/, old-2/ ... where they stood; the
    tokens' cache, known by its content, and files of others stay."""
    for folder in {Path(config.run_dir), Path(config.sentry_dir or config.run_dir)}:
        if not folder.is_dir():
            continue
        own = RUN_FILES if folder == Path(config.run_dir) else ()
        names = [
            path
            for path in folder.iterdir()
            if path.name in own or path.name.lstrip(".").startswith("step_")
        ]
        if names:
            number = 1 + sum(path.name.startswith("old-") for path in folder.iterdir())
            (folder / f"old-{number}").mkdir()
            for path in names:
                path.rename(folder / f"old-{number}" / path.name)


def compare_configs(
    old: dict,
    config: Config,
    may_differ: set[str] = HARMLESS_KEYS,
    whose: str = "the run was started with {!r}, now it is {!r}",
    advice: str = "put these keys back to continue, or start over with --fresh (the old run is kept"
    " aside)",
) -> None:
    """Raise a ConfigError naming every key whose change would make another training of this run."""
    new = json.loads(json.dumps(dataclasses.asdict(config)))
    problems = [
        f"{name}: {whose.format(old[name], value)}"
        for name, value in new.items()
        if name not in may_differ and old.get(name, value) != value
    ]
    if problems:
        raise ConfigError(*problems, advice)


def run_identity(config: Config, words: NewWords, data: Data) -> dict:
    """What a sentry must agree with to be this run's."""
    return {
        "model_name": config.model_name,
        "model_revision": config.model_revision,
        "words_sha256": new_words_hash(words.words, words.first_new_id),
        "corpus_sha256": data.sha256,
    }


def random_state() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {n: base64.b64encode(state.numpy().tobytes()).decode() for n, state in states.items()}


def restore_random_state(states: dict[str, str]) -> None:
    for name, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)


class HostCopies:
    """Buffers that a save is written from, pinned beside a GPU, reused (tests/bench_save.py)."""

    def __init__(self):
        self.buffers: dict[str, Tensor] = {}

    def take(self, tensors: dict[str, Tensor]) -> dict:
        for name, tensor in tensors.items():
            if name not in self.buffers:
                pinned = {"device": "cpu", "pin_memory": tensor.is_cuda}
                self.buffers[name] = torch.empty_like(tensor, **pinned)
            self.buffers[name].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {name: self.buffers[name].numpy() for name in tensors}


# ---- The run -------------------------------------------------------------------------------------


@dataclasses.dataclass
class StepBatch:
    """This process's share of a step: x, y (B, T), base_embeds (B, T, H) on the device; all ids."""

    x: Tensor
    y: Tensor
    base_embeds: Tensor
    all_ids: Tensor
    numbers: Tensor


@dataclasses.dataclass
class Fit:
    """How a step runs here: micro-batch, layers that recompute, CUDA graphs, and in words."""

    micro_batch_size: int
    recomputed: int
    graph: GraphedPass | None = None
    note: str = ""
    peak_bytes: int = 0  # of capturing; the allocator does not see what a replay uses


def prepare_step(
    step: int, overlay: WakeOverlay, data: Data, config: Config, place: Place
) -> StepBatch:
    """Look the step's sequences up and start their way to the card, which waits for none."""
    size = config.effective_batch_size
    num_sequences = count_sequences(data.train, config.seq_len)
    numbers = step_sequence_numbers(step, size, num_sequences, config.seed)
    x, y = sequences(data.train, numbers, config.seq_len, data.bos_id)
    share = slice(place.rank * size // place.world, (place.rank + 1) * size // place.world)
    parts = [x[share], y[share]]
    if place.device.type == "cuda":
        parts = [part.pin_memory().to(place.device, non_blocking=True) for part in parts]
    return StepBatch(*parts, overlay.base_embed(x[share]), x, numbers)


def accumulate(
    batch: StepBatch,
    overlay: WakeOverlay,
    place: Place,
    fit: Fit,
    loss_scale: LossScale,
    meanwhile: Callable | None = None,
) -> Tensor:
    """All micro-batches of this process's share -> sum of losses, 0-dim fp32; gradients in overlay.

    With several processes only the new rows' gradients cross, summed once a step: the output rows'
    in buckets under the last micro-batch's backward, the input rows' after it as the rows touched.
    meanwhile: called before that backward, when a GPU has a forward pass to work off.
    """
    overlay.begin_step(batch.all_ids)
    scale, handles, total = 1.0 / batch.all_ids.numel(), [], torch.zeros((), device=place.device)

    def before_last_backward() -> None:
        if place.world > 1 and overlay.output_grad is not None:
            for bucket in overlay.output_grad.split(4096):
                handles.append(dist.all_reduce(bucket, async_op=True))
        if meanwhile:
            meanwhile()

    for start in range(0, len(batch.x), fit.micro_batch_size):
        part = slice(start, start + fit.micro_batch_size)
        inputs = batch.x[part], batch.y[part], batch.base_embeds[part]
        after_loss = before_last_backward if part.stop >= len(batch.x) else None
        if fit.graph is not None:
            total += fit.graph(*inputs, after_loss).sum()
        else:
            total += forward_backward(overlay, *inputs, scale, loss_scale, after_loss).sum()
    for handle in handles:
        handle.wait()
    add_up(place, overlay.input_grad)
    return total


def peak_bytes(overlay: WakeOverlay, batch: StepBatch, size: int, recomputed: int) -> int | None:
    """The allocator's peak over a real pass of `size` sequences; None: it does not fit."""
    recompute_layers(overlay.body, recomputed)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    overlay.begin_step(batch.all_ids)
    part = batch.x[:size], batch.y[:size], batch.base_embeds[:size]
    try:
        forward_backward(overlay, *part, 0.0, LossScale())
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated()


def kept_layers(peak_of, peak: int, num_layers: int, limit: float) -> int:
    """How many of the last layers can keep their activations within `limit` bytes: the cost of four
    is measured, and then the whole number tried."""
    more = peak_of(max(num_layers - 4, 0))
    layer = max((more - peak) / 4, 0.02 * GIB) if more else limit
    kept = max(min(int((limit - peak) / layer), num_layers), 0)
    while kept > 0 and (peak_of(num_layers - kept) or limit + 1) > limit:
        kept -= max(kept // 8, 1)
    return kept


def largest_that_fits(
    fit: Fit, overlay: WakeOverlay, batch: StepBatch, sizes: list[int]
) -> tuple[Callable, int]:
    """Set the first of the sizes that runs; (layers recomputed -> its peak in bytes, that peak)."""
    for fit.micro_batch_size in sizes:
        peak_of = functools.partial(peak_bytes, overlay, batch, fit.micro_batch_size)
        if (peak := peak_of(fit.recomputed)) is not None:
            return peak_of, peak
    size, seq_len = sizes[-1], batch.x.shape[1]
    advice = "lower seq_len" if size == 1 else "set a smaller one, or auto"
    raise ConfigError(f"the GPU cannot hold micro_batch_size {size} of {seq_len} tokens; {advice}")


def fit_to_machine(overlay: WakeOverlay, data: Data, config: Config, place: Place) -> Fit:
    """Find the largest micro-batch that fits by trying real passes. Then let as many layers keep
    their activations as the memory left over holds.

    On a GPU elementwise work is fused; from compute capability 8.0 the pass is also captured in
    CUDA graphs. A T4 takes 20 x longer for a step's kernels than Python takes to launch them.
    """
    share = config.effective_batch_size // place.world
    sizes = divisors(share)[::-1]
    if config.micro_batch_size != "auto":
        sizes = [math.gcd(config.micro_batch_size, share)]
    num_layers = len(overlay.body.layers)
    fit = Fit(sizes[0], 0 if config.gradient_checkpointing == "false" else num_layers)
    if place.device.type == "cpu":
        fit.recomputed = num_layers if config.gradient_checkpointing == "true" else 0
        recompute_layers(overlay.body, fit.recomputed)
        return fit
    restore_rotary(overlay.model[0])
    fused = config.compile != "false" and try_to_fuse(fit, overlay)
    # float16 decides after each pass whether to repeat it, which no graph can
    use_graph = fused and place.dtype == torch.bfloat16
    if use_graph:
        attend_causally(overlay.model[0])
    # the second lies beside the first while that is worked on
    batch, _following = (prepare_step(step, overlay, data, config, place) for step in (1, 2))
    peak_of, peak = largest_that_fits(fit, overlay, batch, sizes)
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    limit = min(config.max_gpu_gib * GIB, free) if config.max_gpu_gib else free
    # Graphs keep their pass's memory to themselves; an evaluation's loss needs its own beside it.
    if use_graph and peak + GRAPH_SPARE_GIB * GIB > limit:
        use_graph = False
        fit.note += f", not as CUDA graphs: they would need {GRAPH_SPARE_GIB} GiB more"
    limit -= (GRAPH_SPARE_GIB if use_graph else SPARE_GIB) * GIB
    if config.gradient_checkpointing == "auto":
        fit.recomputed = num_layers - kept_layers(peak_of, peak, num_layers, limit)
    recompute_layers(overlay.body, fit.recomputed)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    if use_graph:
        capture(fit, overlay, (fit.micro_batch_size, config.seq_len), 1.0 / batch.all_ids.numel())
    return fit


def try_to_fuse(fit: Fit, overlay: WakeOverlay) -> bool:
    """Fuse elementwise work, or say in fit.note why not."""
    try:
        fuse_elementwise(overlay.model[0], overlay.dtype)
    except (RuntimeError, ImportError) as error:
        fit.note = f", not fused: {str(error).strip().splitlines()[0]}"
        return False
    fit.note = ", fused"
    return True


def capture(fit: Fit, overlay: WakeOverlay, shape: tuple[int, int], scale: float) -> None:
    """Make the pass CUDA graphs, or say in fit.note why not.

    Raises: ConfigError where an operation breaks a capture off, after which the process is no good.
    """
    try:
        fit.graph = GraphedPass(overlay, shape, scale)
        fit.note += ", as CUDA graphs"
        fit.peak_bytes = torch.cuda.max_memory_allocated()
    except RuntimeError as error:
        memory = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
        if not memory:  # an operation that no graph can hold
            raise ConfigError(
                "the pass cannot become CUDA graphs; start again, in a notebook after a restart of"
                f" its kernel, with compile: false ({one_line(error.__context__ or error)})"
            ) from error
        fit.note += ", not as CUDA graphs: out of memory"
    gc.collect()  # the error and the frames that it names hold each other, and the pass's tensors
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def plain_errors(config: Config, place: Place):
    """One line for a disk or GPU that is full, and for another process that died."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise SentryError(
            f"{config.run_dir}: {error}; the sentries there are intact: make room, then run the"
            " same command again"
        ) from error
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "out of GPU memory; what is saved is whole: free the GPU, or continue with a smaller"
            f" micro_batch_size ({one_line(error)})"
        ) from error
    except RuntimeError as error:
        if place.world == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = one_line(error).split("] ", 1)[-1].split(" This is typically")[0]  # gloo's
        # gloo's threads would abort this process at its end
        dist.destroy_process_group(place.group if place.device.type == "cuda" else None)
        raise SentryError(
            f"process {place.rank} ends: another process of this run died or cannot be reached;"
            f" start the same command again ({reason})"
        ) from error


class StopRequest:
    """SIGTERM or Ctrl-C asks for a sentry and an end after the step; a second one ends at once."""

    def __init__(self):
        self.name = ""
        self.old = {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self.old[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def note(self, number: int, _frame) -> None:
        self.name = signal.Signals(number).name
        line = f"\n{self.name}: stopping after this step, saved; once more ends at once\n"
        os.write(2, line.encode())  # print could be in the midst of another line
        for other, handler in self.old.items():
            signal.signal(other, handler)


@dataclasses.dataclass
class Run:
    """All parts of a run in progress."""

    config: Config
    place: Place
    words: NewWords
    data: Data
    model: object
    overlay: WakeOverlay
    optimizer: Optimizer
    records: Records | None
    writer: SentryWriter | None
    loss_scale: LossScale
    step: int
    best_val_loss: float
    base_bits_per_byte: float | None
    fit: Fit
    optimizer_step: int  # the step, but for an imported run: its statistics began later
    val_bits_per_byte: float | None = None
    host_copies: HostCopies = dataclasses.field(default_factory=HostCopies)

    def save(self, durable: bool) -> None:
        """Begin a whole save in the background; waits for nothing but the copy to host memory."""
        if self.writer is None:
            return
        self.writer.finish_local()  # the buffers belong to the save before until it is written
        state = {
            "step": self.step,
            **run_identity(self.config, self.words, self.data),
            "first_new_id": self.words.first_new_id,
            "num_new_tokens": len(self.words.words),
            "sequences_seen": self.step * self.config.effective_batch_size,
            "random_state": random_state(),
            "loss_scale": dataclasses.asdict(self.loss_scale),
            "optimizer_step": self.optimizer_step,
            "best_val_loss": self.best_val_loss if self.best_val_loss < math.inf else None,
            "base_bits_per_byte": self.base_bits_per_byte,
            "config": dataclasses.asdict(self.config),
            "versions": versions(),
        }
        texts = {
            "metrics.jsonl": "".join(self.records.lines),
            "samples.md": self.records.samples,
            "words.txt": "\n".join(self.words.words) + "\n",
        }
        self.writer.save(self.host_copies.take(self.optimizer.tensors()), texts, state, durable)

    def evaluate(self) -> dict:
        """Evaluate, record, and continue the prompts; the record. Where the memory that CUDA graphs
        keep is needed for it, they go."""
        try:
            return self.measure()
        except torch.OutOfMemoryError:
            if self.place.world > 1 or self.fit.graph is None:
                raise
        self.fit.graph, self.fit.peak_bytes = None, 0
        torch.cuda.empty_cache()
        self.place.say(
            f"step {self.step}: out of GPU memory in the evaluation; it is repeated, and the run"
            " goes on, without CUDA graphs"
        )
        return self.measure()

    def measure(self) -> dict:
        """One try of `evaluate`; what it records comes last."""
        record = {"step": self.step, "kind": "eval"}
        parts = self.overlay, self.data, self.config, self.place, self.fit.micro_batch_size
        if self.base_bits_per_byte is None:
            self.base_bits_per_byte = evaluate_base(*parts)
        record |= evaluate(*parts)
        record["uniform_loss"] = math.log(self.overlay.vocab_size)
        record["base_bits_per_byte"] = self.base_bits_per_byte
        record["warnings"] = []
        if record["val_loss"] > record["uniform_loss"]:
            record["warnings"].append(
                f"above the uniform loss {record['uniform_loss']:.2f}: worse than a blind guess"
            )
        if record["val_bits_per_byte"] > self.base_bits_per_byte:
            record["warnings"].append(
                f"above the unextended base model's {self.base_bits_per_byte:.3f} bits/byte"
            )
        self.best_val_loss = min(self.best_val_loss, record["val_loss"])
        self.val_bits_per_byte = record["val_bits_per_byte"]
        if self.records:
            prompts = self.config.prompts
            texts = sample(self.model, self.config, self.words) if prompts else []
            self.records.add(record)
            if prompts:
                self.records.add_samples(self.step, texts)
        meet(self.place)
        return record


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "accelerate", "bitsandbytes")
    return {"python": sys.version.split()[0]} | {name: installed_version(name) for name in names}


def heading(run: Run) -> str:
    """What a run says of itself at its start."""
    place, (num_words, hidden_size) = run.place, run.overlay.input_rows.shape
    device = torch.cuda.get_device_name() if place.device.type == "cuda" else "CPU"
    dtype, size = str(place.dtype).removeprefix("torch."), run.overlay.vocab_size
    return (
        ", ".join(f"{name} {number}" for name, number in versions().items())
        + f"\n{device}, compute dtype {dtype} ({place.why}); trainable {num_words:,} words x"
        f" {hidden_size:,}, ln(vocabulary of {size:,}) = {math.log(size):.2f}"
    )


def begin(config: Config, place: Place, fresh: bool, step: int | None, newest: int) -> Run:
    """Everything before the first step: words, data, model, and rows from a sentry or new ones."""
    run_dir = Path(config.run_dir)
    durable = Path(config.sentry_dir or run_dir / "sentries")
    folders = [run_dir / "snapshots", durable]
    words, data, sentry = prepare(config, place, fresh, step, folders, newest)
    if place.rank == 0:
        write_config(config)
        place.say(format_report(words.report))
    model = load_model(config, place)
    state = sentry.state if sentry else {}
    on_gpu, rows = place.device.type == "cuda", first_rows(config, model, words, sentry)
    overlay = WakeOverlay(model, words.first_new_id, *rows, offload_input_table=on_gpu)
    overlay.install()
    optimizer = Optimizer(overlay)
    records = writer = None
    if place.rank == 0:
        records, writer = open_records(config, durable, sentry, place)
    if sentry:
        if place.rank == 0:
            load_rows(optimizer, sentry)
        restore_random_state(state["random_state"])
    meet(place)
    if place.world > 1:  # the other nodes may not have the sentry's folder
        for tensor in optimizer.tensors().values():
            dist.broadcast(tensor, 0)
    scale = LossScale()
    if place.dtype == torch.float16:
        scale = LossScale(**state.get("loss_scale", {}))
        if scale.value == 1.0:  # new, or on another dtype until now
            scale.value = FLOAT16_LOSS_SCALE
    fit = fit_to_machine(overlay, data, config, place)
    meet(place)
    return Run(
        config, place, words, data, model, overlay, optimizer, records, writer, scale,
        state.get("step", 0), state.get("best_val_loss") or math.inf,
        state.get("base_bits_per_byte"), fit, state.get("optimizer_step", 0),
    )  # fmt: skip


def open_records(
    config: Config, durable: Path, sentry: Sentry | None, place: Place
) -> tuple[Records, SentryWriter]:
    """Records as they were at the sentry, and the writer of the next ones."""
    metrics, samples = (
        (sentry.path / name).read_text(encoding="utf-8") if sentry else ""
        for name in ("metrics.jsonl", "samples.md")
    )
    run_dir = Path(config.run_dir)
    writer = SentryWriter(run_dir / "snapshots", durable, config.keep_sentries, place.say)
    if sentry and sentry.path.parent == writer.local:  # its copy may be what was cut off
        writer.hand_over(sentry.path, sentry.step)
    return Records(run_dir, config, metrics.splitlines(keepends=True), samples), writer


def choose_start(
    config: Config, place: Place, fresh: bool, step: int | None, folders: list[Path], newest: int
) -> tuple[NewWords, Data, Sentry | None]:
    """Process 0's words, data and sentry; --fresh once these are there; the tokenizer at the end.

    newest: the newest step that another process has a sentry of, in a folder of its own; or -1
    Raises: ConfigError or SentryError, and leaves the run as it is.
    """
    # torchrun repeats its command at each restart; what it began is not begun again
    mark, run_id = Path(config.run_dir) / ".launch", os.environ.get("TORCHELASTIC_RUN_ID")
    launch = f"{run_id} {os.getppid()}"
    if run_id and mark.exists() and mark.read_text(encoding="utf-8") == launch:
        fresh, step = False, None
    words = extend(config, save=False)
    data = load_data(config, words)
    if fresh:  # now that the new run can start
        start_over(config)
        if config.lexicon == "from_corpus":  # is made anew
            words = extend(config, save=False)
            data = load_data(config, words)
    sentry = find_sentry(config, folders, run_identity(config, words, data), place, step)
    if run_id:
        write_text(mark, launch)
    if not (fresh or step) and newest > (sentry.step if sentry else -1):
        raise SentryError(
            f"a sentry of step {newest} lies on another node, and none so new in {folders[0]} or"
            f" {folders[1]}: start that node as the first, copy its folders here, or move it away"
            " if it is of an older run"
        )
    save_new_words(config, words)
    return words, data, sentry


def prepare(
    config: Config, place: Place, fresh: bool, step: int | None, folders: list[Path], newest: int
) -> tuple[NewWords, Data, Sentry | None]:
    """Words, data, and the sentry to continue from: rank 0's choice, and its error ends all."""
    if place.rank == 0:
        with heard_by_all(place):
            words, data, sentry = choose_start(config, place, fresh, step, folders, newest)
        if place.world > 1:
            identity = run_identity(config, words, data)
            chosen = sentry and (sentry.step, sentry.state)
            tell(place, (dataclasses.asdict(config), identity, chosen))
        return words, data, sentry
    if (message := tell(place, None)) is None:
        raise ConfigError(f"process {place.rank} ends: process 0 could not start and says why")
    # A lexicon made from the corpus and the token cache are there now.
    words = plan_new_words(config)
    data = load_data(config, words)
    settings, identity, chosen = message
    whose = f"process 0 has {{!r}}, process {place.rank} {{!r}}"
    compare_configs(settings, config, LOCAL_KEYS, whose, "give all processes the same")
    if identity != run_identity(config, words, data):
        raise ConfigError(
            f"process {place.rank} has another model, lexicon or corpus than process 0; every node"
            " needs the same files"
        )
    return words, data, Sentry(folders[0], *chosen) if chosen else None


def newest_elsewhere(place: Place, run_dir: Path) -> int:
    """The newest step that another process has a sentry of and this one has not, or -1."""
    steps = [-1]
    with contextlib.suppress(SentryError):  # a folder that cannot be read: process 0 will say it
        steps += [step for step, _ in sentry_folders(run_dir / "snapshots")]
    newest = torch.tensor(max(steps))
    if place.group:
        dist.all_reduce(newest, dist.ReduceOp.MAX, group=place.group)
    return newest.item() if newest > max(steps) else -1


@contextlib.contextmanager
def heard_by_all(place: Place):
    """An error of rank 0's start also ends the others, which wait for its word."""
    try:
        yield
    except Exception:  # whatever it is, it goes on after the others have heard
        if place.world > 1:
            tell(place, None)
        raise


def tell(place: Place, message: object) -> object:
    """Rank 0's message on every process, as JSON, however long it takes to come."""
    meet(place)
    text = bytearray(json.dumps(message).encode("utf-8"))
    size = torch.tensor(len(text))
    dist.broadcast(size, 0, group=place.group)
    data = torch.zeros(size.item(), dtype=torch.uint8)
    if place.rank == 0:
        data = torch.frombuffer(text, dtype=torch.uint8)
    dist.broadcast(data, 0, group=place.group)
    return json.loads(bytes(data.tolist()))


def find_sentry(
    config: Config, folders: list[Path], identity: dict, place: Place, step: int | None
) -> Sentry | None:
    """The sentry to continue from, said aloud; what is damaged and newer is put out of the way."""
    wait = f"still waiting for {folders[-1]}: the newest sentry may be there, so nothing starts yet"
    slow = threading.Timer(START_PATIENCE_SECONDS, place.say, [wait])
    slow.daemon = True
    slow.start()
    try:
        sentry, skipped = pick_sentry(folders, identity, step)
    finally:
        slow.cancel()
    for reason in skipped:
        place.say(f"passed over: {reason}")
    if sentry is None:
        return None
    compare_configs(sentry.state["config"], config)
    place.say(f"continuing from {sentry.path}, step {sentry.step}")
    if (before := sentry.state["config"].get("max_steps")) not in (None, config.max_steps):
        place.say(f"max_steps was {before}: from here the learning rate is that of the new one")
    set_aside(folders, sentry)
    return sentry


def load_rows(optimizer: Optimizer, sentry: Sentry) -> None:
    """Put a sentry's rows and statistics in place, each of the shape that this run has."""
    arrays = read_tensors(sentry.path / "rows.safetensors")
    for name, tensor in optimizer.tensors().items():
        if name not in arrays or list(arrays[name].shape) != list(tensor.shape):
            raise SentryError(
                f"{sentry.path}: {name} is missing or not of shape {list(tensor.shape)}"
            )
        tensor.copy_(torch.from_numpy(arrays[name].copy()))


def train_steps(run: Run, stop: StopRequest) -> None:
    """The loop: micro-batches, check, clip, update, log, evaluate, save."""
    config, place, overlay = run.config, run.place, run.overlay
    progress = Progress(place, config, run.step)
    tokens_per_step = config.effective_batch_size * config.seq_len
    num_layers = len(overlay.body.layers)
    fit = run.fit
    progress.say(
        f"micro_batch_size {fit.micro_batch_size} x"
        f" {config.effective_batch_size // place.world // fit.micro_batch_size} on {place.world}"
        f" process(es), {tokens_per_step:,} tokens a step, {fit.recomputed} of {num_layers} layers"
        f" recomputed{fit.note}"
    )
    if stop.name and place.world == 1:
        return  # asked for while the model was loaded
    if run.step >= config.max_steps:
        progress.say(f"step {run.step} of {config.max_steps}: nothing left to do; raise max_steps")
    if run.best_val_loss == math.inf:  # nothing evaluated yet: a new run, or an imported one
        progress.say(eval_line(run.evaluate()))
    if run.writer:
        run.host_copies.take(run.optimizer.tensors())  # makes the buffers now, not in a step
    batch, following = prepare_step(run.step + 1, overlay, run.data, config, place), []

    def prepare_next() -> None:
        following[:] = [prepare_step(run.step + 2, overlay, run.data, config, place)]

    while run.step < config.max_steps:  # a stop request ends it below, on all processes at once
        began, step = time.perf_counter(), run.step + 1
        try:
            loss_sum = accumulate(batch, overlay, place, fit, run.loss_scale, prepare_next)
        except torch.OutOfMemoryError:
            size = fit.micro_batch_size
            if place.world > 1:  # repeated here alone, the sums with the others would not match
                raise ConfigError(
                    f"step {step}: process {place.rank} is out of GPU memory with micro_batch_size"
                    f" {size}; set a smaller one"
                ) from None
            if size == 1 and fit.recomputed == num_layers and not fit.graph:
                raise ConfigError(
                    f"step {step}: out of GPU memory with micro_batch_size 1 and all layers"
                    " recomputed; what is saved is whole: free the GPU, or start over with --fresh"
                    " and a lower seq_len"
                ) from None
            fit.micro_batch_size = max(n for n in (1, *range(1, size)) if len(batch.x) % n == 0)
            fit.graph, fit.peak_bytes, fit.recomputed = None, 0, num_layers
            recompute_layers(overlay.body, num_layers)
            torch.cuda.empty_cache()
            progress.say(
                f"step {step}: out of GPU memory; the step is repeated with micro_batch_size"
                f" {fit.micro_batch_size} and all layers recomputed"
            )
            continue
        gradients = run.optimizer.gradients()
        squares = sum(torch.linalg.vector_norm(grad).square() for _, grad, _ in gradients)
        told = torch.zeros(1 + place.world)  # asked to stop; each process's loss scale
        told[0], told[1 + place.rank] = bool(stop.name), run.loss_scale.value
        numbers = torch.cat([loss_sum[None], told.to(place.device)])
        add_up(place, numbers)
        # the step's one wait
        norm, loss, stopping, *scales = torch.cat([squares.sqrt()[None], numbers]).tolist()
        run.loss_scale.agree(min(scales))
        loss /= tokens_per_step
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise SentryError(
                f"step {step}: loss {loss}, gradient norm {norm} on sequences"
                f" {batch.numbers.tolist()}; stopped before the update, what is saved is whole:"
                " continue with compute_dtype float32 or bfloat16, or start over with --fresh and a"
                " lower learning_rate"
            )
        learning_rate = learning_rate_at(step, config)
        grad_scale = min(1.0, config.max_grad_norm / (norm + 1e-6))
        run.optimizer_step += 1
        settings = run.optimizer_step, learning_rate, grad_scale, config.row_coupling
        run.optimizer.update(gradients, *settings)
        if place.dtype == torch.float16:
            run.loss_scale.step_done()
        run.step, batch = step, following.pop()
        seconds = time.perf_counter() - began
        record = {
            "step": step, "kind": "train", "loss": loss, "learning_rate": learning_rate,
            "grad_norm": norm, "step_seconds": seconds,
            "tokens_per_second": tokens_per_step / seconds,
        }  # fmt: skip
        if place.device.type == "cuda":
            record["peak_vram_gib"] = max(torch.cuda.max_memory_allocated(), fit.peak_bytes) / GIB
        last = step == config.max_steps or bool(stopping)
        if run.records and (step % config.log_every == 0 or last):
            run.records.add(record)
        progress.step(step, step_line(record, run), seconds)
        if step % config.eval_every == 0 or step == config.max_steps:
            progress.say(eval_line(run.evaluate()))
        if step % config.save_every == 0 or step % config.snapshot_every == 0 or last:
            run.save(durable=step % config.save_every == 0 or last)
            meet(place)  # process 0 may have waited for the save before
        if run.writer:
            run.writer.check()
        if stopping:
            stop.name = stop.name or "a signal to another process"
            break
    progress.close()


def step_line(record: dict, run: Run) -> str:
    bits = f"  {run.val_bits_per_byte:.3f} bits/byte held out" if run.val_bits_per_byte else ""
    peak = f"  peak {record['peak_vram_gib']:.1f} GiB" if "peak_vram_gib" in record else ""
    return (
        f"step {record['step']}/{run.config.max_steps}  loss {record['loss']:.4f}{bits}"
        f"  lr {record['learning_rate']:.2e}  {record['step_seconds']:.2f} s/step"
        f"  {record['tokens_per_second']:,.0f} tokens/s{peak}"
    )


def eval_line(record: dict) -> str:
    line = (
        f"step {record['step']}  held-out loss {record['val_loss']:.4f}"
        f" (uniform {record['uniform_loss']:.2f}; new words {record['val_loss_new_words']:.2f},"
        f" others {record['val_loss_ordinary']:.2f})  {record['val_bits_per_byte']:.3f} bits/byte"
        f" (base model {record['base_bits_per_byte']:.3f})"
    )
    return "\n".join([line, *(f"warning: {text}" for text in record["warnings"])])


def train(
    config: Config | str | Path, *overrides: str, fresh: bool = False, step: int | None = None
) -> dict:
    """Train, or continue, the run of a YAML path with key=value overrides, or of a Config.

    Returns the last evaluation's record with 'stopped' (the signal's name or ''); raises
    ConfigError, SentryError or OverlayError with one line for each thing that the user can mend.
    """
    if not isinstance(config, Config):
        config = load_config(config, *overrides)
    if fresh and step is not None:
        raise ConfigError("--fresh starts over, --step continues: give one of the two")
    apply()
    if problems := check_environment(config.device, config.quantization):
        raise ConfigError(*problems)
    if config.tensorboard and not installed_version("tensorboard"):
        raise ConfigError("tensorboard: true, but the package is missing; pip install tensorboard")
    gc.collect()  # in a notebook: what a stopped run before this one left
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    place = find_place(config)
    with plain_errors(config, place), contextlib.ExitStack() as held:
        newest = newest_elsewhere(place, Path(config.run_dir))
        if place.rank == 0:
            with heard_by_all(place):
                held.enter_context(lock_run(Path(config.run_dir)))
        stop = held.enter_context(StopRequest())
        run = begin(config, place, fresh, step, newest)
        place.say(heading(run))
        try:
            train_steps(run, stop)
        finally:
            if run.writer:
                run.writer.finish()
        if run.records and run.records.lines:
            place.say((Path(config.run_dir) / "loss_table.md").read_text(encoding="utf-8"))
        if place.world > 1:
            meet(place)
            dist.barrier()  # a process that ends while others still talk to it can abort them
            dist.destroy_process_group()
        records = run.records.parsed() if run.records else []
    evaluations = [record for record in records if record["kind"] == "eval"]
    return {**(evaluations[-1] if evaluations else {}), "step": run.step, "stopped": stop.name}


def main(config_path: str, *overrides: str, fresh: bool = False, step: int | None = None) -> dict:
    """train(), for the command line: a run stopped before its end is an error of status 1."""
    result = train(config_path, *overrides, fresh=fresh, step=step)
    if result["stopped"]:
        where = f"at step {result['step']}, saved" if result["step"] else "before the first step"
        raise ConfigError(
            f"stopped by {result['stopped']} {where}; the same command goes on from there"
        )
    return result


if __name__ == "__main__" and "__file__" in globals():
    OPTIONS = {"fresh": ARGUMENTS.fresh, "step": ARGUMENTS.step}
    raise SystemExit(run_command(main, ARGUMENTS.config, *ARGUMENTS.overrides, **OPTIONS))
