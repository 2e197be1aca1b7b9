"""This file chooses device, processes, memory, and the fastest step that fits the card.

    worker = find_worker(config)                      # this process: rank, device, compute dtype
    plan = fit_to_machine(overlay, batches, config, worker)
    loss_sum, following = run_step(plan, batch, overlay, worker, loss_scale, prepare_next)

overlay.py says what a step computes. This file says how: in which micro-batches, with which layers
recomputed in backward or parked on the host, with which pieces fused, as CUDA graphs or not, on one
GPU or several. None of these choices changes the result beyond rounding. What replaces a piece of
the model is proved on the model itself before it is used. On an H200 of which 14 GiB are used, a
14B step of 2,048 tokens takes 0.29 s this way, and 0.33 s with nothing parked (2026-11-26). It took
0.43 s on an H100 without fused pieces and graphs too, and 5.8 s or more if one sequence at a time
goes through the model (2026-11-22, docs/measurements.md).
"""

import contextlib
import dataclasses
import datetime
import errno
import functools
import gc
import inspect
import math
import os
import sys
import types
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# If this file is pasted into a notebook below the others, their names are there already.
if "keep_cpu_weights_plain" not in globals():
    from env_shim import keep_cpu_weights_plain
if "UserError" not in globals():
    from config import GIB, Config, UserError, divisors, one_line
if "WakeOverlay" not in globals():
    from overlay import (
        FLOAT16_LOSS_SCALE, LOSS_CHUNK_POSITIONS, LOSS_GROUP_POSITIONS, ROW_BLOCK, LossScale,
        WakeOverlay, check_model, find_body, forward_backward, is_tied, output_mode,
    )  # fmt: skip

# GiB that stay free beside a pass, for what an evaluation and the allocator need. A pass captured
# in CUDA graphs keeps its memory between steps, so an evaluation's loss needs room of its own.
SPARE_GIB, GRAPH_SPARE_GIB = 0.5, 1.2
# On a CPU a model of at most this width runs on one thread. A step of the sample (128 wide) is 600
# to 1,200 short parallel sections, whose threads wait for each other: beside two other programs a
# step took 1.6 to 7.4 s on two threads and 0.3 to 0.5 s on one; alone, 0.16 and 0.20 s.
SMALL_HIDDEN_SIZE = 256
# Activations that wait on the host: smaller tensors than PARKED_BYTES stay on the card, and
# HOST_SPARE_GIB stay free, so that the host never swaps. Copies may be COPIES_BEHIND layers behind
# the computation.
PARKED_BYTES, HOST_SPARE_GIB, COPIES_BEHIND = 2**20, 2.0, 3
# A process that does not reach a step's sum within this time is taken for dead.
STEP_TIMEOUT = datetime.timedelta(minutes=3)
# The others wait at most this long for a process that downloads the model or has a slow disk.
START_TIMEOUT = datetime.timedelta(hours=2)
# How far fused pieces may be from eager ones, as a share of the norm: one piece, and a whole pass.
# bfloat16 rounds after each operation and a fused kernel once. Through the 48 layers of a random
# 14B this grows to 0.01 in the losses and 0.18 in the gradients (one H100, 2026-11-25).
PIECE_TOLERANCE, PASS_TOLERANCE = 0.02, 0.3


# ---- This process, and the others ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Worker:
    """This describes one process of a run: its rank, its device, and the dtype it computes in."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    why_dtype: str
    group: dist.ProcessGroup | None = None  # gloo, for barriers; None if there is one process

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def find_worker(config: Config) -> Worker:
    """Choose device and dtype for this process; torchrun's environment says which one it is.

    A GPU below compute capability 8.0, such as a T4, computes in float16. There
    torch.cuda.is_bf16_supported() says True too, but bfloat16 is emulated, slower than float32.

    Raises: UserError if this process has no GPU, or if the processes cannot share the work evenly
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if config.effective_batch_size % world_size:
        raise UserError(
            f"{world_size} processes do not divide effective_batch_size"
            f" {config.effective_batch_size}; start one of"
            f" {', '.join(map(str, divisors(config.effective_batch_size)))}"
        )
    # A CPU computes in float32, because it has no fast half precision for all operations.
    device, dtype, why = torch.device("cpu"), torch.float32, "a CPU"
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        device = choose_gpu(rank, config.max_gpu_gib)
        major, minor = torch.cuda.get_device_capability(device)
        dtype = torch.bfloat16 if major >= 8 else torch.float16
        why = f"compute capability {major}.{minor}"
    # Left to itself, MKL chooses the number of threads anew by the machine's load. Another number
    # splits sums differently, and a continued run differed in the last bits. Setting it stops this.
    torch.set_num_threads(torch.get_num_threads())
    if config.compute_dtype != "auto":
        dtype, why = getattr(torch, config.compute_dtype), "compute_dtype in the config"
    return Worker(rank, world_size, device, dtype, why)


def choose_gpu(rank: int, max_gpu_gib: float | None) -> torch.device:
    """Take this process's own GPU, and cap what the allocator may use of it."""
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise UserError(
            f"process {rank} ends: this machine has {count} GPU(s), and each process needs its own;"
            " start no more"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    total = torch.cuda.get_device_properties(device).total_memory
    share = min((max_gpu_gib or math.inf) * GIB / total, 1.0)
    torch.cuda.set_per_process_memory_fraction(share, device)  # 1.0 lifts an earlier run's cap
    return device


def join_processes(worker: Worker) -> Worker:
    """Join the other processes of a run; the worker returned can call `barrier`.

    Raises: UserError if one of the others does not come
    """
    if worker.world_size == 1:
        return worker
    known = {"rank": worker.rank, "world_size": worker.world_size}
    # NCCL sums on the cards; gloo is for processes without one.
    backend = "nccl" if worker.device.type == "cuda" else "gloo"
    try:
        if not dist.is_initialized():  # a notebook's second run has its group already
            store = next(dist.rendezvous("env://", timeout=START_TIMEOUT))[0]
            # torchrun 2.13 restarts on the old store, which still holds the dead processes'
            # addresses. Under a prefix of its own, each attempt finds only its own.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"attempt_{attempt}", store)
            dist.init_process_group(backend, timeout=STEP_TIMEOUT, store=store, **known)
        # A process that waits on gloo notices at once that another one has died. On NCCL it does
        # not, so barriers use gloo.
        group = dist.new_group(backend="gloo", timeout=START_TIMEOUT)
    except RuntimeError as error:
        raise UserError(
            f"process {worker.rank} ends: the others cannot be reached:"
            f" {str(error).splitlines()[0]} (GLOO_SOCKET_IFNAME names the network interface, if it"
            " is the wrong one)"
        ) from error
    return dataclasses.replace(worker, group=group)


def barrier(worker: Worker) -> None:
    """Wait until all processes are here, even if one downloads a model or has a slow disk."""
    if worker.group:
        dist.barrier(group=worker.group)


def all_reduce_sum(worker: Worker, tensor: Tensor) -> None:
    """Sum a tensor over all processes, in place."""
    if worker.world_size > 1:
        dist.all_reduce(tensor)


def check_same_run(worker: Worker, facts: dict) -> None:
    """Raise a UserError if this process was started with other facts than process 0."""
    if worker.world_size > 1:
        everyone = [None] * worker.world_size  # all_gather_object fills it, in order of rank
        dist.all_gather_object(everyone, facts, group=worker.group)
        different = [name for name in facts if facts[name] != everyone[0][name]]
        if different:
            raise UserError(
                f"process {worker.rank} has another {', '.join(different)} than process 0; every"
                " process needs the same command and the same files"
            )


def leave_processes(worker: Worker) -> None:
    """Part in good order: a process that ends while others still talk to it can abort them."""
    if worker.world_size > 1:
        barrier(worker)
        dist.barrier()
        dist.destroy_process_group()


def agree(
    worker: Worker, loss_sum: Tensor, norm: Tensor, stop_asked: bool, loss_scale: LossScale
) -> tuple[float, float, bool]:
    """Make the step's one wait for the device -> (sum of losses, gradient norm, stop or not).

    All processes get the same values. The losses are summed. If one process was asked to stop, all
    stop. All take the lowest loss scale. The norm needs no sum, because its gradients are summed.
    """
    # (1 + world_size,): asked to stop; each process's loss scale
    told = torch.zeros(1 + worker.world_size)
    # Each process fills a place of its own, so the sum is a list of all loss scales.
    told[0], told[1 + worker.rank] = stop_asked, loss_scale.value
    summed = torch.cat([loss_sum[None], told.to(worker.device)])  # (2 + world_size,)
    all_reduce_sum(worker, summed)
    norm, loss_sum, stopping, *scales = torch.cat([norm[None], summed]).tolist()
    loss_scale.agree(min(scales))
    return loss_sum, norm, stopping > 0


@contextlib.contextmanager
def known_errors_in_one_line(run_dir: str, worker: Worker):
    """Turn a full disk, a full GPU and the death of another process into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise UserError(
            f"{run_dir}: {error}; the sentries there are intact: make room, then run the same"
            " command again"
        ) from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            "out of GPU memory; what is saved is whole: free the GPU, or continue with a smaller"
            f" micro_batch_size ({one_line(error)})"
        ) from error
    except RuntimeError as error:
        is_of_group = isinstance(error, dist.DistError) or "gloo" in str(error)
        if worker.world_size == 1 or not is_of_group:
            raise
        reason = one_line(error).split("] ", 1)[-1].split(" This is typically")[0]  # gloo's
        # If gloo's threads still run at the end of this process, they abort the process.
        if dist.is_initialized():
            dist.destroy_process_group(worker.group if worker.device.type == "cuda" else None)
        raise UserError(
            f"process {worker.rank} ends: another process of this run died or cannot be reached;"
            f" start the same command again ({reason})"
        ) from error


# ---- The base model ------------------------------------------------------------------------------


def from_pretrained(auto: type, config: Config, **settings):
    """Have one of transformers' Auto classes read the base model, or only its config.json.

    Raises: UserError with the library's reason in one line
    """
    source = {"revision": config.model_revision, "trust_remote_code": config.trust_remote_code}
    try:
        return auto.from_pretrained(config.model_name, **source, **settings)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"model_name: {config.model_name}: {one_line(error)}") from error


def read_model_config(config: Config):
    """Read the base model's config.json, as transformers has it.

    Raises: UserError if it cannot be read, or if the model is stored in another quantization than
            the NF4 that the config asks for
    """
    from transformers import AutoConfig

    shape = from_pretrained(AutoConfig, config)
    stored = getattr(shape, "quantization_config", None) or {}
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    if config.quantization == "nf4" and method not in (None, "bitsandbytes"):
        raise UserError(
            f"quantization: {config.model_name} is stored quantized ({method}) and cannot become"
            " nf4; give none, or a model_name that is stored in 16 bits"
        )
    return shape


def auto_class(config: Config) -> type:
    """Choose transformers' class for the base model."""
    return auto_class_of(read_model_config(config))


def auto_class_of(shape) -> type:
    """Choose the class for a transformers config; some text models come with a picture part."""
    import transformers

    wrapped = type(shape) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if wrapped and type(shape) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def random_model_of(shape, **settings) -> torch.nn.Module:
    """Make a model of a transformers config, of the class that from_pretrained would take.

    Of some models with several parts, Llama 4 for one, it takes the text part alone. from_config of
    transformers 4.57 does not.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = shape.get_text_config(decoder=True)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(shape), None)
    if getattr(model_class, "config_class", None) is type(text) is not type(shape):
        return model_class(text)
    return auto_class_of(shape).from_config(shape, **settings)


def hide_bars_in_logs() -> None:
    """Switch transformers' progress bars off where nobody sees them move."""
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()


def load_model(config: Config, worker: Worker):
    """Load the base model frozen; `quantization: nf4` turns all linear layers but lm_head to NF4.

    The experts of a mixture are one 3-D parameter a layer in transformers 5, and no linear layer.
    bitsandbytes leaves them in 16 bits, and a line says so.

    Memory: the model's, plus one tensor in 16 bits while it is quantized
            (tests/bench/measure_load.py)
    Raises: UserError with the library's reason in one line
    """
    from accelerate.hooks import remove_hook_from_submodules
    from transformers import BitsAndBytesConfig

    # The default of dtype differs between transformers 4 and 5.
    settings = {"dtype": worker.dtype, "device_map": {"": str(worker.device)}}
    if config.quantization == "nf4":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=worker.dtype,
        )  # fmt: skip
    hide_bars_in_logs()
    model = from_pretrained(auto_class(config), config, **settings)
    # accelerate's hooks would carry the input table to the card at each use.
    remove_hook_from_submodules(model)
    model.requires_grad_(False)  # after a 4-bit load, versions differ in what is left trainable
    keep_cpu_weights_plain(model)
    if config.quantization == "nf4" and (left := num_expert_weights(model)):
        gib = left * worker.dtype.itemsize / GIB
        worker.say(f"not in 4 bits: {left:,} weights of experts, {gib:.2f} GiB")
    return model.eval()


def num_expert_weights(model: torch.nn.Module) -> int:
    """Count the weights of experts that are one 3-D parameter, which stay in 16 bits under nf4."""
    found = [p for p in find_body(model)[1].parameters() if p.dim() == 3 and p.is_floating_point()]
    return sum(p.numel() for p in found if min(p.shape[1:]) > 16)  # convolutions are narrower


# ---- Memory --------------------------------------------------------------------------------------


def free_cached_memory() -> None:
    """Give back the GPU memory that a broken-off pass or an earlier run of this process left."""
    gc.collect()  # an error and its frames hold each other, and the frames hold tensors
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def device_name(worker: Worker) -> str:
    return torch.cuda.get_device_name() if worker.device.type == "cuda" else "CPU"


def host_memory(num_bytes: int) -> Tensor:
    """Make host memory, uint8. Beside a GPU it is pinned: the card copies to and from it by itself.

    torch's own pinned memory has a power of two as its size: up to twice what is needed.

    Raises: RuntimeError if the host cannot give or pin so much
    """
    memory = torch.empty(num_bytes, dtype=torch.uint8)
    if num_bytes and torch.cuda.is_initialized():
        place, cuda = memory.data_ptr(), torch.cuda.cudart()
        torch.cuda.check_error(cuda.cudaHostRegister(place, num_bytes, 0))
        weakref.finalize(memory, cuda.cudaHostUnregister, place)
    return memory


def host_copies(tensors: dict[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the host; a save is written from the copies.

    Training waits for this copy alone: 0.034 s for the 14B's 1.69 GiB (tests/bench/bench_save.py).
    buffers: host memory by name. It is empty before a run's first save, whose buffers the later
    saves use again: so the save before must be written by then.
    """
    copies = {}  # all copies are started first, and then waited for once
    for name, tensor in tensors.items():
        if name not in buffers:
            buffers[name] = host_memory(tensor.nbytes)
        copies[name] = buffers[name].view(tensor.dtype).view(tensor.shape)
        copies[name].copy_(tensor, non_blocking=True)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copies


def bytes_per_value(config: Config) -> int:
    """Count the bytes of one weight or activation on the card: 4 in float32, else 2."""
    return 4 if config.compute_dtype == "float32" else 2


def model_without_weights(config: Config) -> torch.nn.Module:
    """Make the base model on the meta device: it has every shape and no data. Raises: UserError."""
    shape = read_model_config(config)
    vars(shape).pop("quantization_config", None)  # no quantizer is asked for shapes
    try:
        with torch.device("meta"):  # 48 layers of the 14B take no memory this way
            model = random_model_of(shape, trust_remote_code=config.trust_remote_code)
        model.tie_weights()  # transformers 5.0.0 ties nothing on the meta device by itself
        return model
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model_name: {config.model_name}: {one_line(error)}") from error


def memory_plan(
    model: torch.nn.Module, num_new: int, config: Config, micro_batch_size: int
) -> dict[str, float]:
    """Estimate the GiB that training takes on a card, by part.

    'total' is the peak that the allocator would report. 'host memory' is not on the card: it is the
    save buffers and an untied input table. What max_host_gib caps comes on top of it.
    model: a model without weights, whose shapes are counted. Activations are counted as those of
    decoder layers with a gated MLP, all recomputed unless gradient_checkpointing is false.
    """
    width, inner, layers = bytes_per_value(config), layer_width(model), find_body(model)[1]
    table, tied = model.get_input_embeddings().weight, is_tied(model)
    vocab_size, hidden = table.shape
    tokens = micro_batch_size * config.seq_len
    step_tokens = config.effective_batch_size * config.seq_len
    row_set, inputs = 4 * num_new * hidden, tokens * hidden * width
    num_sets = 1 if output_mode(config.output_rows, tied) == "shared" else 2
    loss = min(tokens, LOSS_GROUP_POSITIONS) * num_new * 4
    loss += min(tokens, LOSS_CHUNK_POSITIONS) * vocab_size * 6
    layer = tokens * width * (4.5 * inner + 2 * hidden)
    layer += 2 * width * hidden * inner  # one layer's weights, dequantized
    kept = config.gradient_checkpointing == "false"
    plan = {
        "body": body_bytes(model, config),
        "base head rows": width * table.numel(),
        "new rows": row_set * num_sets,
        "gradients": row_set + 4 * min(step_tokens, num_new) * hidden,
        "base rows of two steps": 2 * step_tokens * hidden * width,
        "layer inputs": len(layers) * (kept_layer_bytes(model, tokens, config) if kept else inputs),
        "loss chunk or one layer": max(loss + tokens * hidden * 10, layer),
    }
    plan["total"] = sum(plan.values())  # all parts are on the card at the peak
    plan["host memory"] = num_sets * row_set + width * table.numel() * (not tied)
    return {name: size / GIB for name, size in plan.items()}


def body_bytes(model: torch.nn.Module, config: Config) -> float:
    """Count the bytes of all weights but the two tables: linear layers in NF4 if the config asks
    for it, and all others in the compute dtype."""
    tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    linear = {m.weight for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")}
    width, num_bytes = bytes_per_value(config), 0.0
    # NF4: 4 bits a weight, one byte of scale for 64 weights, and 4 bytes for 256 of these scales.
    nf4_bytes = 0.5 + 1 / 64 + 4 / 64 / 256
    for weight in model.parameters():  # each once, even if it has two places
        if weight not in tables:
            in_4_bits = weight in linear and config.quantization == "nf4"
            num_bytes += weight.numel() * (nf4_bytes if in_4_bits else width)
    return num_bytes


def layer_width(model: torch.nn.Module) -> int:
    """Find how many values a layer makes of one token at its widest place, mostly in its MLP.

    Of a mixture's experts, num_experts_per_tok work on a token. Gate and up projection are two
    places, even if they are one matrix.
    """
    active = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1
    widths = [1]
    for name, module in find_body(model)[1].named_modules():
        for of_module, weight in module.named_parameters(recurse=False):
            shape = weight.shape
            if hasattr(module, "in_features"):  # a 4-bit weight is packed into another shape
                shape = module.out_features, module.in_features
            if len(shape) in (2, 3):
                fused = 2 if "gate_up" in name + of_module else 1
                widths.append(max(shape[-2:]) // fused * (active if len(shape) == 3 else 1))
    return max(widths)


def kept_layer_bytes(model: torch.nn.Module, tokens: int, config: Config) -> float:
    """Estimate what a layer that is not recomputed keeps for backward, its input included.

    A 14B layer keeps 0.29 GiB at 16 x 128 tokens in eager mode, and 0.20 GiB with fused pieces
    (measured on an H100).
    """
    inner, hidden = layer_width(model), model.get_input_embeddings().weight.shape[1]
    values = 4 * inner + 3.8 * hidden if config.compile == "false" else 2 * inner + 4.7 * hidden
    return tokens * bytes_per_value(config) * values


def dry_run(config: Config, first_new_id: int, num_new: int) -> None:
    """Print the memory plan, the micro-batch that training would try, and which cards it fits.

    Raises: UserError for a model whose parts training would refuse
    """
    model, cap = model_without_weights(config), config.max_gpu_gib or 14.0
    _, layers = check_model(model, first_new_id)
    # A micro-batch that does not divide the step would leave a smaller one, and no graph for it.
    sizes = [config.micro_batch_size]
    if config.micro_batch_size == "auto":
        sizes = divisors(config.effective_batch_size)
    plans = {size: memory_plan(model, num_new, config, size) for size in sizes}
    micro = max((size for size in sizes if plans[size]["total"] <= cap), default=min(sizes))
    margin = cap - plans[micro]["total"]
    for name, gib in plans[micro].items():
        digits = 2 if gib >= 0.005 else 6  # the rows of a small model are not 0.00
        print(f"{name:26} {gib:8.{digits}f} GiB")
        if name == "total":
            print(f"{'margin':26} {margin:8.2f} GiB under {cap:g}")
    if config.quantization == "nf4" and (left := num_expert_weights(model)):
        gib = left * bytes_per_value(config) / GIB
        print(f"not in 4 bits: {left:,} weights of experts, {gib:.2f} GiB of the body")
    accumulation = config.effective_batch_size // micro
    print(f"micro_batch_size {micro} x {accumulation}, seq_len {config.seq_len}")
    hidden = model.get_input_embeddings().weight.shape[1]
    if config.gradient_checkpointing == "auto":
        inputs = micro * config.seq_len * hidden * bytes_per_value(config)
        layer = (kept_layer_bytes(model, micro * config.seq_len, config) - inputs) / GIB
        spare = SPARE_GIB if config.compile == "false" else GRAPH_SPARE_GIB
        kept = max(min(int((margin - spare) / layer), len(layers)), 0)
        print(
            f"about {kept} of {len(layers)} layers can keep their activations: peak"
            f" {plans[micro]['total'] + kept * layer:.2f} GiB"
        )
    print(f"bytes per sentry {round(plans[micro]['new rows'] * GIB * (1 + 1 / hidden)):,}")
    for card, usable in (("T4", 14.0), ("L4", 21.8), ("A100 40 GB", 39.0), ("H100 80 GB", 78.5)):
        fits = [size for size in sizes if plans[size]["total"] <= usable]
        print(f"{card:11} {f'fits, micro_batch_size {max(fits)}' if fits else 'does not fit'}")
    print("whether the model's logits can be served is proved at the start of a run")


# ---- Recomputing and parking layers --------------------------------------------------------------


def recompute_layers(
    layers: torch.nn.ModuleList, num_layers: int, parking: "Parking | None" = None
) -> None:
    """Have the first num_layers compute their activations again in backward.

    A recomputed layer keeps only its input: of the 14B at 16 x 128 tokens 20 MiB instead of 0.19
    GiB. With a `parking` these inputs wait on the host, and so do all activations of as many of the
    layers as it can take, which are then not recomputed. The two kinds are mixed evenly, so that
    the bus has the time of both. The last layers keep theirs, because backward comes to them first
    and frees them first. transformers has a switch of its own, but it recomputes all layers and
    acts in train mode only. It is reentrant by default in transformers 4.57 and not in 5.
    """
    num_parked = parking.takes(num_layers) if parking else 0
    # An attribute of a module hides its class's method; taken away, the method is back.
    for number, layer in enumerate(layers):
        linears = [part for part in layer.modules() if type(part).__name__ == "Linear4bit"]
        for module in (layer, *linears):
            module.__dict__.pop("forward", None)
        if number < num_layers and number * num_parked % num_layers >= num_parked:
            layer.forward = recomputing(layer.forward)
            for module in linears[:-1]:  # nothing needs the product with the last one again
                module.forward = functools.partial(linear_dequantized_once, module)
        if number < num_layers and parking:
            layer.forward = parking.park(layer.forward, begins_pass=number == 0)
    if num_layers and parking:
        layers[-1].forward = parking.end_forward(layers[-1].forward)


def recomputing(forward: Callable) -> Callable:
    """Wrap `forward` so that only its inputs stay until backward, which computes the rest again."""

    def call(*arguments, **keywords):
        if not torch.is_grad_enabled():
            return forward(*arguments, **keywords)
        # No layer draws random numbers in eval mode, so no generator state need be kept.
        return checkpoint(
            forward, *arguments, use_reentrant=False, preserve_rng_state=False,
            determinism_check="none", **keywords,
        )  # fmt: skip

    return call


def linear_dequantized_once(module: torch.nn.Module, x: Tensor) -> Tensor:
    """Do what an NF4 layer does; in a recomputed layer, backward finds the dequantized matrix.

    bitsandbytes dequantizes a matrix for the forward pass, for the recomputed one and for backward.
    Here autograd keeps what the forward pass made, and `checkpoint` drops that until it is
    recomputed. So a matrix is made twice. Those of a 14B layer take 0.4 GiB while it is at work.
    """
    from bitsandbytes.functional import dequantize_4bit

    if not torch.is_grad_enabled() or x.dtype != module.compute_dtype:
        return type(module).forward(module, x)
    matrix = dequantize_4bit(module.weight, module.weight.quant_state).to(x.dtype)  # (out, in)
    return torch.nn.functional.linear(x, matrix, module.bias)


class Parking:
    """This carries activations of some layers to the host in forward, and back in backward.

    Copies run on a stream of their own, beside the computation. It waits for a layer's copies when
    COPIES_BEHIND more layers are done; then the activations leave the card. In backward a layer's
    activations come back while the layer above is at work. CUDA graphs can hold all of it: host
    memory has its place from the first pass on, and between forward and backward nothing is on its
    way. Autograd gets the same bits back.
    """

    def __init__(self, overlay: WakeOverlay, sizes: tuple[float, float, float], room: float):
        """sizes in bytes: a layer's activations; its input; what the bus carries while a layer
        computes. room: bytes that the host has for them"""
        self.num_layers, self.sizes, self.room = len(overlay.layers), sizes, room
        self.stream = torch.cuda.Stream()
        self.weights = {p.untyped_storage().data_ptr() for p in overlay.body.parameters()}
        num_parked, (layer, inputs, _) = self.takes(self.num_layers), sizes
        waiting = num_parked * layer + (self.num_layers - num_parked) * inputs
        self.host = host_memory(int(waiting) if num_parked else 0)

    def takes(self, count: int) -> int:
        """Say how many of the first `count` layers can be parked, if the inputs of the others wait.

        The bus carries while these layers compute. COPIES_BEHIND layers may then still be on their
        way, and get the time of the later layers, which keep their activations.
        """
        layer, inputs, carried = self.sizes
        can_carry = min(count * carried + COPIES_BEHIND * layer, self.num_layers * carried)
        left = min(can_carry, self.room) - count * inputs
        return max(min(int(left / (layer - inputs)), count), 0)

    def park(self, forward: Callable, begins_pass: bool) -> Callable:
        """Wrap the forward of a layer that parks its activations."""

        def call(*arguments, **keywords):
            if not torch.is_grad_enabled():
                return forward(*arguments, **keywords)
            if begins_pass:
                self.layers, self.used = [], 0
            layer = types.SimpleNamespace(number=len(self.layers), on_host=[], on_card=[])
            self.layers.append(layer)
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                output = forward(*arguments, **keywords)
            layer.copied = self.copy(layer.on_host, layer.on_card)
            if layer.number >= COPIES_BEHIND:
                self.leave_card(self.layers[layer.number - COPIES_BEHIND])
            return output

        return call

    def pack(self, tensor: Tensor) -> object:
        """Give autograd the layer and a number, in the place of a large activation to be saved.

        Weights stay on the card, and so does what has gaps or finds no room on the host.
        """
        # With its grad_fn the tensor would hold itself through autograd, if a pass breaks off.
        tensor = tensor.detach()
        is_weight = tensor.untyped_storage().data_ptr() in self.weights
        reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride())) + 1
        end = self.used + tensor.nbytes
        has_gaps, is_full = reach != tensor.numel(), end > len(self.host)
        if tensor.nbytes < PARKED_BYTES or is_weight or has_gaps or is_full:
            return tensor
        host = self.host[self.used : end].view(tensor.dtype)
        self.used = end + -end % 512  # a place for any dtype
        layer = self.layers[-1]
        layer.on_host.append(host.as_strided(tensor.shape, tensor.stride()))
        layer.on_card.append(tensor)
        return layer, len(layer.on_card) - 1

    def copy(self, targets: list[Tensor], sources: list[Tensor]) -> "torch.cuda.Event":
        """Begin to copy each source to its target -> an event at the end of that."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for target, source in zip(targets, sources):
                target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def leave_card(self, layer: types.SimpleNamespace) -> None:
        torch.cuda.current_stream().wait_event(layer.copied)
        layer.on_card = None

    def end_forward(self, forward: Callable) -> Callable:
        """Wrap the forward of the last layer: wait for all copies; fetch when backward begins."""

        def call(*arguments, **keywords):
            output = forward(*arguments, **keywords)
            if torch.is_grad_enabled():
                for layer in self.layers[-COPIES_BEHIND:]:
                    self.leave_card(layer)
                hidden_states = output[0] if isinstance(output, tuple) else output
                hidden_states.register_hook(lambda _: self.fetch(self.layers[-1]))
            return output

        return call

    def fetch(self, layer: types.SimpleNamespace) -> None:
        """Begin to copy a layer's activations back, unless that has begun."""
        if layer.on_card is None:
            layer.on_card = [torch.empty_like(tensor, device="cuda") for tensor in layer.on_host]
            layer.copied = self.copy(layer.on_card, layer.on_host)

    def unpack(self, saved: object) -> Tensor:
        """Give autograd its tensor back, and begin to fetch those of the layer below."""
        if isinstance(saved, Tensor):
            return saved
        layer, index = saved
        self.fetch(layer)
        self.fetch(self.layers[max(layer.number - 1, 0)])
        torch.cuda.current_stream().wait_event(layer.copied)
        tensor, layer.on_card[index] = layer.on_card[index], None
        return tensor


# ---- Fused pieces --------------------------------------------------------------------------------


def fuse_elementwise(overlay: WakeOverlay) -> list[str]:
    """Compile RMSNorm, gated activation and rotary embedding into one kernel each, for training.

    Returns the kinds of modules that look like these but compute something else; they stay eager.
    These pieces are bound by memory: fused, they save 95 of the 407 ms that the kernels of a 14B
    step take on an H100. Whole layers gain less, because a compiled layer recomputes its down
    projection too, which nothing needs (331 ms instead of 312). Shapes vary in evaluation and
    generation, so without gradients the original pieces run. A class of modules is replaced only
    if its first module gives the same numbers both ways, forward and backward. The attributes alone
    prove nothing: BitNet's MLP has all four, but normalizes before `down_proj`, Falcon-H1's
    multiplies and DeepSeek-V4's clamps.
    """
    torch._dynamo.reset()  # an earlier run in this process may have compiled for other shapes
    torch._dynamo.config.recompile_limit = 64  # one kernel for each micro-batch size that is tried
    hidden_size, device = overlay.base_rows.shape[1], overlay.base_rows.device
    # Norms give values a third as large. So the probe reaches the limits of an MLP that clamps.
    probe = 3 * torch.randn(8, 64, hidden_size, device=device, dtype=overlay.dtype)
    compiled, is_same = {}, {}  # by kind: one compiled function, one proof
    for module in overlay.body.modules():
        kind = type(module)
        if kind.__name__.endswith("RMSNorm"):
            compiled[kind] = compiled.get(kind) or compiled_in_training(kind.forward)
            fused = types.MethodType(compiled[kind], module)
            width = module.weight.shape[-1] if hasattr(module, "weight") else hidden_size
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            compiled[kind] = compiled.get(kind) or compiled_in_training(
                gated_activation(module.act_fn)
            )
            fused, width = gated_mlp(module, compiled[kind]), module.gate_proj.in_features
        else:
            continue
        if kind not in is_same:
            eager, ours = (forward_and_gradient(f, probe[..., :width]) for f in (module, fused))
            is_same[kind] = max(map(relative_difference, eager, ours)) <= PIECE_TOLERANCE
        if is_same[kind]:
            module.forward = fused
    fuse_rotary(overlay.layers, probe)
    return [kind.__name__ for kind, same in is_same.items() if not same]


def fuse_rotary(layers: torch.nn.ModuleList, probe: Tensor) -> None:
    """Compile the model's function for rotary embedding.

    Raises: RuntimeError if the compiled function gives something else. The comparison of whole
    passes would not show an error of 5 %, because their rounding is larger
    """
    modeling, rotary = find_rotary(layers)
    names = list(inspect.signature(rotary).parameters) if rotary else []
    if names[:4] != ["q", "k", "cos", "sin"]:
        return
    fused = compiled_in_training(rotary)
    if "unsqueeze_dim" in names:
        fused = tokens_before_heads(fused)
    width = getattr(getattr(layers[0], "self_attn", None), "head_dim", 64)

    def turn(function: Callable, probe: Tensor) -> Tensor:
        q, k, cos, sin = probe.unflatten(1, (4, 16)).split(2)  # (2, 4 heads, 16, width) each
        return torch.stack(function(q, k, cos[:, 0].detach(), sin[:, 0].detach()))

    eager, ours = (
        forward_and_gradient(functools.partial(turn, function), probe[..., :width])
        for function in (fused.original, fused)
    )
    difference = max(map(relative_difference, eager, ours))
    if difference > PIECE_TOLERANCE:
        raise RuntimeError(f"fused rotary embedding differs from the eager one by {difference:.2g}")
    modeling.apply_rotary_pos_emb = fused


def tokens_before_heads(rotary: Callable) -> Callable:
    """Let a function for rotary embedding work on (B, T, heads, D) instead of (B, heads, T, D).

    That is how q and k lie in memory, and how their gradients come back from attention. A compiled
    function copies gradients that lie otherwise: 8 of the 553 ms of a 14B step of 8 x 512 tokens
    (one H200, 2026-11-26).
    """

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more, **named):
        if more or named:
            return rotary(q, k, cos, sin, *more, **named)
        q, k = rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
        return q.transpose(1, 2), k.transpose(1, 2)

    call.original = rotary.original
    return call


def forward_and_gradient(forward: Callable, probe: Tensor) -> list[Tensor]:
    """Return a piece's output for a probe, and the gradient of the output's sum for the probe."""
    probe = probe.detach().clone().requires_grad_()
    with torch.enable_grad():
        output = forward(probe)
        return [output.detach(), *torch.autograd.grad(output.sum(), probe)]


def relative_difference(wanted: Tensor, found: Tensor) -> float:
    """Divide the norm of the difference by that of `wanted`; NaN becomes infinity."""
    norm = torch.linalg.vector_norm
    difference = norm(found.float() - wanted.float()) / norm(wanted.float()).clamp(min=1e-30)
    return difference.nan_to_num(nan=math.inf).item()


def undo_fusing(overlay: WakeOverlay) -> None:
    """Put the original pieces back, those of an earlier run in this process too."""
    for module in overlay.body.modules():
        if module not in overlay.layers:  # a layer's own forward belongs to recompute_layers
            module.__dict__.pop("forward", None)
    modeling, rotary = find_rotary(overlay.layers)
    if rotary:
        modeling.apply_rotary_pos_emb = getattr(rotary, "original", rotary)
    if overlay.model.config.get_text_config()._attn_implementation == "causal_sdpa":
        overlay.model.set_attn_implementation("sdpa")


def find_rotary(layers: torch.nn.ModuleList) -> tuple[types.ModuleType, Callable | None]:
    """Find the Python module of the model's layers, and its function for rotary embedding.

    Attention looks the function up by name in that module at each call, so it can be replaced.
    """
    modeling = sys.modules[type(layers[0]).__module__]  # such as modeling_qwen2
    return modeling, getattr(modeling, "apply_rotary_pos_emb", None)


def compiled_in_training(original: Callable) -> Callable:
    """Wrap `original` so that its compiled form runs if gradients are on, and else itself."""
    # A function that an earlier run compiled is not compiled a second time.
    original = getattr(original, "original", original)
    compiled = torch.compile(original, dynamic=False)

    def call(*arguments, **keywords):
        function = compiled if torch.is_grad_enabled() else original
        return function(*arguments, **keywords)

    call.original = original
    return call


def gated_activation(activation: Callable) -> Callable:
    """Make the elementwise piece of a gated MLP: activation(gate) * up."""
    return lambda gate, up: activation(gate) * up


def gated_mlp(module: torch.nn.Module, gate: Callable) -> Callable:
    """Make the forward of most gated MLPs: down_proj(gate(gate_proj(h), up_proj(h)))."""

    def forward(hidden_states: Tensor) -> Tensor:
        gated = gate(module.gate_proj(hidden_states), module.up_proj(hidden_states))
        return module.down_proj(gated)

    return forward


def attend_causally(model: torch.nn.Module) -> None:
    """Let SDPA use its causal flag instead of a mask tensor.

    Our sequences have no padding, so the result is the same. While a CUDA graph is captured,
    transformers would otherwise build a dense (T, T) mask and expand keys and values to all query
    heads (an estimated 32 MiB a layer of the 14B at 16 x 128). Sliding windows need their mask.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    shape = model.config.get_text_config()
    if shape._attn_implementation == "sdpa" and not getattr(shape, "sliding_window", None):
        AttentionInterface.register("causal_sdpa", sdpa_attention_forward)  # a name without a mask
        model.set_attn_implementation("causal_sdpa")


def fuse_and_prove(plan: "StepPlan", overlay: WakeOverlay, batch: "StepBatch") -> bool:
    """Fuse what can be fused, and keep it only if the whole pass gives the same numbers.

    One sequence goes through the eager and the fused body, forward and backward, in the dtype of
    training. A piece that computes something else, a mask that was needed after all, and a compiler
    that fails all end here: the pieces are put back and a remark says why.
    """
    eager = pass_results(overlay, batch, 1, forward_backward)
    try:
        left_eager = fuse_elementwise(overlay)
        # Only CUDA graphs gain from this. They are for bfloat16, because a float16 pass may have to
        # be repeated and a graph cannot decide that.
        if overlay.dtype == torch.bfloat16:
            attend_causally(overlay.model)
        check_same(eager, pass_results(overlay, batch, 1, forward_backward))
    except (RuntimeError, ImportError, TypeError) as error:
        undo_fusing(overlay)
        plan.remarks.append(f"not fused: {str(error).strip().splitlines()[0]}")
        return False
    plan.remarks.append(" but for ".join(["fused", *left_eager]))
    return True


def pass_results(overlay: WakeOverlay, batch: "StepBatch", size: int, run_pass: Callable) -> list:
    """Copy the losses and input row gradients of the step's first `size` sequences, in fp32.

    Every second input becomes a new word first, because only the gradients of new words can be
    compared and a sequence may have no new word.
    """
    x = batch.x[:size].clone()
    inputs = x[:, ::2]  # (size, T / 2 rounded up), a view
    words = torch.arange(inputs.numel(), device=x.device) % len(overlay.input_rows)
    inputs.copy_(overlay.first_new_id + words.view_as(inputs))
    overlay.begin_step(torch.cat([batch.all_ids.flatten(), x.flatten().cpu()]))
    part = x, batch.y[:size], batch.base_embeds[:size]
    # Without a loss scale float16 rounds small gradients to nothing: at 16,384 tokens a step two
    # correct passes differed by 0.2 of the largest gradient.
    loss_scale = LossScale(FLOAT16_LOSS_SCALE if overlay.dtype == torch.float16 else 1.0)
    losses = run_pass(overlay, *part, 1.0 / batch.all_ids.numel(), loss_scale)
    return [losses.clone(), overlay.input_grad.clone()]


def check_same(wanted: list[Tensor], found: list[Tensor]) -> None:
    """Raise a RuntimeError if two passes differ by more than rounding."""
    difference = max(map(relative_difference, wanted, found))
    if difference > PASS_TOLERANCE:
        raise RuntimeError(f"the pass differs from the eager one by {difference:.2g}")


# ---- CUDA graphs ---------------------------------------------------------------------------------


class GraphedPass:
    """This is forward_backward for one micro-batch shape, as two CUDA graphs split after the loss.

    A 14B step is 9,000 kernel launches. On an H100 Python takes longer to launch them than the card
    takes to run them, and a replay launches them all at once. A T4 is 20 times slower, so there the
    launches do not matter. Memory: what one pass takes stays reserved between steps.
    """

    def __init__(self, overlay: WakeOverlay, shape: tuple[int, int], scale: float):
        device, hidden_size = overlay.base_rows.device, overlay.base_rows.shape[1]
        self.overlay, self.scale = overlay, scale
        self.embeds = torch.zeros(*shape, hidden_size, device=device, dtype=overlay.dtype)
        # embeds: (B, T, H); labels: (B, T)
        self.embeds.requires_grad_()
        self.labels = torch.zeros(shape, device=device, dtype=torch.int64)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate their workspaces outside the capture
            for _ in range(2):
                self.forward()
                self.backward()
            del self.hidden_states, self.grad, self.losses, self.d_embeds
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.empty_cache()
        # Two graphs, so that Python can start other work between them (after_loss).
        self.to_loss, self.to_inputs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.record(self.to_loss, self.forward)
        # The second graph reads what the first one made, so both share one pool of memory.
        self.record(self.to_inputs, self.backward, self.to_loss.pool())

    def record(self, graph: "torch.cuda.CUDAGraph", work: Callable, pool=None) -> None:
        """Capture `work`. If memory runs out while capturing, end the capture first and raise
        afterwards: an exception that leaves torch.cuda.graph early would leave the allocator in
        capture mode."""
        failed = None
        with torch.cuda.graph(graph, pool=pool):
            try:
                work()
            except torch.OutOfMemoryError as error:
                failed = error
        if failed:
            raise failed

    def forward(self) -> None:
        body = self.overlay.body(inputs_embeds=self.embeds, use_cache=False)
        self.hidden_states = body.last_hidden_state  # (B, T, H)
        hidden = self.hidden_states.detach()
        self.losses, self.grad = self.overlay.loss(hidden, self.labels, self.scale)

    def backward(self) -> None:
        grad = self.grad.to(self.hidden_states.dtype)
        (self.d_embeds,) = torch.autograd.grad(self.hidden_states, self.embeds, grad)

    def __call__(self, overlay, x, y, base_embeds, scale, loss_scale, after_loss=None) -> Tensor:
        """Do what forward_backward does; overlay and scale must be those of the capture.

        The losses returned are overwritten by the next call. loss_scale is not used.
        """
        with torch.no_grad():
            self.embeds.copy_(overlay.embed(x, base_embeds))
        self.labels.copy_(y)
        self.to_loss.replay()
        if after_loss:
            after_loss()
        self.to_inputs.replay()
        overlay.add_input_gradient(x, self.d_embeds)
        return self.losses


def capture(plan: "StepPlan", overlay: WakeOverlay, batch: "StepBatch") -> None:
    """Capture the plan's pass as CUDA graphs, or add a remark that says why not.

    Raises: UserError if an operation breaks off the capture, after which CUDA fails in this process
    """
    size, scale = plan.micro_batch_size, 1.0 / batch.all_ids.numel()
    try:
        # The eager pass comes first, because it may not fit beside the memory of the graphs.
        eager = pass_results(overlay, batch, size, forward_backward)
        free_cached_memory()
        graph = GraphedPass(overlay, (size, batch.x.shape[1]), scale)
        plan.captured_peak_bytes = torch.cuda.max_memory_allocated()
        check_same(eager, pass_results(overlay, batch, size, graph))
        plan.graph = graph
        plan.remarks.append("as CUDA graphs")
    except RuntimeError as error:
        memory = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
        if not memory and "differs" not in str(error):
            raise UserError(
                "the pass cannot become CUDA graphs; start again, in a notebook after a restart of"
                f" its kernel, with compile: false ({one_line(error.__context__ or error)})"
            ) from error
        plan.captured_peak_bytes = 0
        plan.remarks.append(f"not as CUDA graphs: {'out of memory' if memory else error}")
    free_cached_memory()


# ---- The fastest step that fits ------------------------------------------------------------------


@dataclasses.dataclass
class StepBatch:
    """This is one process's share of a step: x, y (B, T) int64, base_embeds (B, T, H) on device.

    all_ids (effective_batch_size, T) are the ids of all processes; sequence_numbers say where in
    the training text they stand.
    """

    step: int
    x: Tensor
    y: Tensor
    base_embeds: Tensor
    all_ids: Tensor
    sequence_numbers: Tensor


@dataclasses.dataclass
class StepPlan:
    """This says how a step runs on this machine; the remarks say it in words."""

    micro_batch_size: int
    num_recomputed_layers: int  # the first ones, and of these some are parked instead
    graph: GraphedPass | None = None
    parking: Parking | None = None  # says which
    remarks: list[str] = dataclasses.field(default_factory=list)
    captured_peak_bytes: int = 0  # peak of the capture; a replay shows none
    eval_micro_batch_size: int = 0  # smaller if little memory is left beside the graphs


def fit_to_machine(
    overlay: WakeOverlay, batches: list[StepBatch], config: Config, worker: Worker
) -> StepPlan:
    """Find the largest micro-batch that fits by trying real passes, then let as many layers keep
    their activations as the memory left over holds.

    batches: those of two steps. Training looks up the base rows of the next step while it works on
    one step, so both batches must be on the card while peaks are measured.
    """
    share, num_layers = len(batches[0].x), len(overlay.layers)
    sizes = divisors(share)[::-1]
    if config.micro_batch_size != "auto":
        sizes = [math.gcd(config.micro_batch_size, share)]
    plan = StepPlan(sizes[0], 0 if config.gradient_checkpointing == "false" else num_layers)
    if worker.device.type == "cpu":  # a CPU's memory is not the limit, so nothing is measured
        if overlay.grad.shape[1] <= SMALL_HIDDEN_SIZE:
            torch.set_num_threads(1)
        if config.gradient_checkpointing == "auto":
            plan.num_recomputed_layers = 0
        recompute_layers(overlay.layers, plan.num_recomputed_layers)
    else:
        fit_to_card(plan, sizes, overlay, batches[0], config)
    plan.eval_micro_batch_size = plan.micro_batch_size
    while worker.device.type == "cuda" and not evaluation_fits(plan, overlay, batches[0]):
        plan.eval_micro_batch_size //= 2
    return plan


def fit_to_card(
    plan: StepPlan, sizes: list[int], overlay: WakeOverlay, batch: StepBatch, config: Config
) -> None:
    """Do what fit_to_machine does, on a GPU: fuse, choose, park, and capture."""
    num_layers, measure = len(overlay.layers), functools.partial(measure_peak, overlay, batch)
    undo_fusing(overlay)
    recompute_layers(overlay.layers, plan.num_recomputed_layers)
    use_graph = config.compile != "false" and fuse_and_prove(plan, overlay, batch)
    use_graph = use_graph and overlay.dtype == torch.bfloat16
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    limit = min((config.max_gpu_gib or math.inf) * GIB, free)
    is_fixed = config.gradient_checkpointing != "auto"
    graphs_fit = choose_plan(plan, sizes, num_layers, measure, limit, use_graph, is_fixed)
    if plan.num_recomputed_layers and not is_fixed:
        size, parking = plan.micro_batch_size, find_parking(plan, overlay, batch, config)
        measure = functools.partial(measure, parking=parking)
        if parking and parking.takes(num_layers) and measure(size, num_layers):
            plan.parking, plan.num_recomputed_layers = parking, num_layers
            graphs_fit = choose_plan(plan, [size], num_layers, measure, limit, use_graph, is_fixed)
            num_parked = parking.takes(plan.num_recomputed_layers)
            plan.remarks.append(f"{num_parked} of these parked on the host instead")
    recompute_layers(overlay.layers, plan.num_recomputed_layers, plan.parking)
    free_cached_memory()
    if graphs_fit:
        capture(plan, overlay, batch)
    elif use_graph:
        plan.remarks.append(f"not as CUDA graphs: they would need {GRAPH_SPARE_GIB} GiB more")


def choose_plan(
    plan: StepPlan, sizes: list[int], num_layers: int, measure: Callable, limit: float,
    use_graph: bool, fixed_layers: bool,
) -> bool:  # fmt: skip
    """Set the plan's micro-batch and recomputed layers; returns whether graphs fit beside them.

    measure(size, num_recomputed) -> the pass's peak in bytes, or None if it does not fit; sizes:
    micro-batches to try, largest first; limit: bytes that the program may use
    Raises: UserError if not even the smallest micro-batch fits
    """
    peaks = ((size, measure(size, plan.num_recomputed_layers)) for size in sizes)
    plan.micro_batch_size, peak = next((pair for pair in peaks if pair[1] is not None), (0, 0))
    if not plan.micro_batch_size:
        advice = "lower seq_len" if sizes[-1] == 1 else "set a smaller one, or auto"
        raise UserError(f"the GPU cannot hold micro_batch_size {sizes[-1]}; {advice}")
    use_graph = use_graph and peak + GRAPH_SPARE_GIB * GIB <= limit
    limit -= (GRAPH_SPARE_GIB if use_graph else SPARE_GIB) * GIB  # what stays free
    if fixed_layers or not num_layers:
        return use_graph
    # Four layers show what one layer keeps. Then the number that should fit is tried.
    probed = min(4, num_layers)
    more = measure(plan.micro_batch_size, num_layers - probed)
    layer = max((more - peak) / probed, 0.02 * GIB) if more else limit
    kept = max(min(int((limit - peak) / layer), num_layers), 0)
    while kept and (measure(plan.micro_batch_size, num_layers - kept) or limit + 1) > limit:
        kept -= max(kept // 8, 1)  # each try is a real pass, so few of them
    plan.num_recomputed_layers = num_layers - kept
    return use_graph


def find_parking(
    plan: StepPlan, overlay: WakeOverlay, batch: StepBatch, config: Config
) -> Parking | None:
    """Measure what the bus carries, and pin what the host has left beside the buffers of a save.

    None if there is no room. None, and a remark, if the host cannot pin what should fit.
    """
    import psutil

    size = plan.micro_batch_size
    saves = sum(rows.nbytes for rows in {overlay.input_rows, overlay.logit_rows})
    room = psutil.virtual_memory().available - saves - HOST_SPARE_GIB * GIB
    room /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # the processes of this host
    room = min(room, math.inf if config.max_host_gib is None else config.max_host_gib * GIB)
    if room <= 0:  # as with max_host_gib: 0; the bus need not be measured
        return None
    layer = kept_layer_bytes(overlay.model, size * batch.x.shape[1], config)
    sizes = layer, batch.base_embeds[:size].nbytes, bus_bytes(overlay, batch, size)
    try:
        return Parking(overlay, sizes, room)
    except RuntimeError as error:
        plan.remarks.append(f"nothing parked: {one_line(error)}")
        return None


def bus_bytes(overlay: WakeOverlay, batch: StepBatch, size: int) -> float:
    """Count the bytes that the bus carries to the host while one layer computes in forward."""
    recompute_layers(overlay.layers, len(overlay.layers))
    embeds = overlay.embed(batch.x[:size], batch.base_embeds[:size]).detach().requires_grad_()
    card = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    host = host_memory(len(card))
    ratios = []
    for _ in range(3):  # the first time warms up, and a busy host makes a pass look longer
        begin, copied, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        begin.record()
        for _ in range(32):  # while they last, Python launches the pass: that does not count
            host.copy_(card, non_blocking=True)
        copied.record()
        overlay.body(inputs_embeds=embeds, use_cache=False)
        end.record()
        end.synchronize()
        ratios.append(copied.elapsed_time(end) / begin.elapsed_time(copied))
    return 32 * len(host) * min(ratios) / len(overlay.layers)


def measure_peak(
    overlay: WakeOverlay, batch: StepBatch, size: int, num_layers: int,
    parking: Parking | None = None,
) -> int | None:  # fmt: skip
    """The allocator's peak over a real pass of `size` sequences; None if it does not fit."""
    recompute_layers(overlay.layers, num_layers, parking)
    free_cached_memory()
    try:
        pass_results(overlay, batch, size, forward_backward)
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated()


@torch.no_grad()
def evaluation_fits(plan: StepPlan, overlay: WakeOverlay, batch: StepBatch) -> bool:
    """Try an evaluation of the plan's size, while the graphs hold their memory (14B: 2.8 GiB).

    The trial has twice as many tokens, because the base tokenizer makes more of the same text. A
    size of 1 counts as fitting: if an evaluation fails all the same, the training step shrinks too.
    """
    part = slice(plan.eval_micro_batch_size)
    embeds, labels = batch.base_embeds[part].repeat(2, 1, 1), batch.y[part].repeat(2, 1)
    try:
        hidden = overlay.body(inputs_embeds=embeds, use_cache=False).last_hidden_state
        overlay.loss(hidden, labels)
    except torch.OutOfMemoryError:
        return plan.eval_micro_batch_size == 1
    finally:
        free_cached_memory()
    return True


def run_step(
    plan: StepPlan, batch: StepBatch, overlay: WakeOverlay, worker: Worker, loss_scale: LossScale,
    prepare_next: Callable,
) -> tuple[Tensor, StepBatch]:  # fmt: skip
    """Accumulate the step's gradients in the overlay -> (sum of losses, the next step's batch)."""
    work = functools.partial(accumulate, plan, batch, overlay, worker, loss_scale, prepare_next)
    return smaller_if_needed(work, plan, overlay, worker, f"step {batch.step}")


def accumulate(
    plan: StepPlan, batch: StepBatch, overlay: WakeOverlay, worker: Worker, loss_scale: LossScale,
    prepare_next: Callable,
) -> tuple[Tensor, StepBatch]:  # fmt: skip
    """Run all micro-batches of this process's share of a step.

    Several processes sum the gradients of the new rows once a step. Those of the output rows go in
    buckets while the backward of the last micro-batch runs. Those of the input rows follow, for the
    words in use alone. prepare_next is called before the last backward, while a GPU still works.
    """
    overlay.begin_step(batch.all_ids)
    run_pass, scale = plan.graph or forward_backward, 1.0 / batch.all_ids.numel()
    total, following, sums = torch.zeros((), device=worker.device), None, []

    def before_last_backward() -> None:
        nonlocal following
        if worker.world_size > 1 and overlay.train_output:
            for bucket in overlay.grad.split(ROW_BLOCK):
                sums.append(dist.all_reduce(bucket, async_op=True))
        following = prepare_next()

    for start in range(0, len(batch.x), plan.micro_batch_size):
        part = slice(start, start + plan.micro_batch_size)
        inputs = batch.x[part], batch.y[part], batch.base_embeds[part]
        after_loss = before_last_backward if part.stop >= len(batch.x) else None
        total += run_pass(overlay, *inputs, scale, loss_scale, after_loss).sum()
    for handle in sums:
        handle.wait()  # for the card's stream, not for Python
    all_reduce_sum(worker, overlay.input_grad)
    return total, following


def smaller_if_needed(
    work: Callable, plan: StepPlan, overlay: WakeOverlay, worker: Worker, what: str
) -> object:
    """Call `work` and return its result; if the GPU's memory runs out, shrink the plan and retry.

    what: "step 20", or "the evaluation at step 20", for the line that reports a retry
    Raises: UserError if nothing can shrink. UserError if there are other processes, because a retry
            in one process alone would put its sums out of step with theirs
    """
    while True:
        try:
            return work()
        except torch.OutOfMemoryError:
            size, num_layers = plan.micro_batch_size, len(overlay.layers)
            if worker.world_size > 1:
                raise UserError(
                    f"{what}: process {worker.rank} is out of GPU memory with micro_batch_size"
                    f" {size}; set a smaller one"
                ) from None
            if size == 1 and plan.num_recomputed_layers == num_layers and not plan.graph:
                raise UserError(
                    f"{what}: out of GPU memory with micro_batch_size 1 and all layers recomputed;"
                    " what is saved is whole: free the GPU, or start over with --fresh and a lower"
                    " seq_len"
                ) from None
        # The same sequences in smaller parts: the step's result changes by rounding alone.
        plan.micro_batch_size = plan.eval_micro_batch_size = max(size // 2, 1)
        plan.num_recomputed_layers, plan.captured_peak_bytes = num_layers, 0
        plan.graph = plan.parking = None
        recompute_layers(overlay.layers, num_layers)
        free_cached_memory()
        worker.say(
            f"{what}: out of GPU memory; repeated with micro_batch_size {plan.micro_batch_size} and"
            " all layers recomputed"
        )


def peak_gib(plan: StepPlan, worker: Worker) -> float | None:
    """Return the most that was on the card so far, in GiB, or None on a CPU."""
    if worker.device.type == "cpu":
        return None
    return max(torch.cuda.max_memory_allocated(), plan.captured_peak_bytes) / GIB


if __name__ == "__main__" and "__file__" in globals():
    print(__doc__)
