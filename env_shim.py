"""Make old and new Colab images importable, and say what a machine lacks for training.

    python env_shim.py        the doctor: versions, image, GPU, what was patched, what to install

The doctor exits with 1 if training could not start, after a line that says how to mend it, else
with 0. In a notebook, call apply() before torch and transformers are imported, and doctor() for the
same report. Each of PATCHES answers one symptom of certain versions. On other versions, and if
somebody has patched by hand already, a patch does nothing. Only a restart of Python undoes one.

Cost: importing this file 55 ms, apply() 5 ms, check_environment() 7 ms, the doctor 3 s, most of it
torch's import (2 CPU cores, torch 2.13.0, 2026-11-22).
"""

import argparse
import importlib.abc
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import signal
import sys


def end_at_ctrl_c() -> None:
    """Have Ctrl-C end this process with one line, for as long as its imports last.

    They take seconds. An exception would show a traceback, or torch (2.13.0) would swallow it and
    leave numpy broken. A notebook's process must go on, so there nothing changes.
    """
    if "IPython" not in sys.modules:
        signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"stopped by SIGINT\n") and 1))


# ---- What is installed ---------------------------------------------------------------------------

# Package -> (oldest supported, newest tried). requirements.txt says the same, with the reasons.
SUPPORTED = {
    "torch": ("2.9.0", "2.13.0"),
    "transformers": ("4.57.6", "5.24.0"),
    "safetensors": ("0.8.0", "0.8.0"),
    "accelerate": ("1.12.0", "1.15.0"),
    "bitsandbytes": ("0.46.1", "0.50.2"),
    "pyyaml": ("6.0.1", "6.0.4"),
    "matplotlib": ("3.10.0", "3.11.2"),
}
OLDEST_PYTHON = "3.10"  # torch 2.9 needs it; transformers 5.24 needs 3.11


def installed_version(package: str) -> str:
    """Return the version that pip recorded, "" if the package is missing. Imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def version_tuple(version: str) -> tuple[int, int, int]:
    """Turn a version into numbers: "2.13.0+cu130" -> (2, 13, 0), "2.9" -> (2, 9, 0), "" -> 0s."""
    numbers = [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]
    return tuple((numbers + [0, 0, 0])[:3])


# ---- The patches ---------------------------------------------------------------------------------
# apply() calls a patch with the installed version of the package that it is for. The patch acts and
# returns the line to print, or "" if it is not needed or in force already.


class TritonOpsStandIn(importlib.abc.Loader):
    """This finds and makes triton.ops, with the two functions that bitsandbytes' kernels import.

    The import system itself gives such modules their spec, path and place in the parent. A bare
    module put into sys.modules has no spec, and find_spec("triton.ops") then raises ValueError.
    """

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name in ("triton.ops", "triton.ops.matmul_perf_model"):
            return importlib.util.spec_from_loader(name, self, is_package=name == "triton.ops")
        return None

    def exec_module(self, module: object) -> None:
        # triton asks both before it tries kernel settings: none is dropped, and each costs nothing
        module.early_config_prune = lambda configs, *args, **kwargs: configs
        module.estimate_matmul_time = lambda *args, **kwargs: 0.0


def stand_in_for_triton_ops(version: str) -> str:
    """Let bitsandbytes up to 0.45.0 be imported although triton 3.2 and newer have no triton.ops.

    For a Trainer of your own; train.py asks for bitsandbytes 0.46.1. Without this patch the import
    fails with "No module named 'triton.ops'", and transformers 4.57 reports "Could not import
    module 'validate_bnb_backend_availability'". The stand-in is asked last of all finders, so a
    real triton.ops is found before it.
    """
    try:
        if importlib.util.find_spec("triton.ops"):
            return ""
    except (ImportError, ValueError):  # no triton; a stand-in by hand, which has no spec
        return ""
    sys.meta_path.append(TritonOpsStandIn())
    if "bitsandbytes" not in sys.modules:
        # A failed import leaves submodules behind, and the next one would find only these halves.
        for name in [name for name in sys.modules if name.startswith("bitsandbytes.")]:
            del sys.modules[name]
    return f"bitsandbytes {version}: stand-in for triton.ops, which this bitsandbytes imports"


def allow_cpu_layers_in_accelerate(version: str) -> str:
    """Let accelerate prepare a quantized model that has layers on the CPU.

    For a Trainer of your own beside bitsandbytes older than 0.46; train.py asks for 0.46.1. Without
    this patch: "You can't train a model that has been loaded in 8-bit or 4-bit precision with CPU
    or disk offload". accelerate asks whether bitsandbytes can compute on a CPU, and bitsandbytes
    says so only from 0.46 on. The question is asked of quantized models alone, so that nothing
    changes for other models, and layers on a disk are still refused.
    """
    try:
        from accelerate import accelerator, utils  # 2 s

        question = utils.is_bitsandbytes_multi_backend_available
    except (ImportError, OSError, AttributeError):
        return ""  # no accelerate that asks, or a torch that does not import: see torch_problems
    if accelerator.is_bitsandbytes_multi_backend_available is not question:
        return ""
    accelerator.is_bitsandbytes_multi_backend_available = lambda: True
    return f"bitsandbytes {version}: accelerate may prepare a model with layers on the CPU"


def load_weights_one_by_one(version: str) -> str:
    """Make transformers 5.0 to 5.3 quantize each weight before it loads the next ones.

    Without this patch threads load 4-bit weights faster than these are quantized. Loading then
    peaks far above the size of the 4-bit model and runs out of memory. transformers 5.4 and newer
    load one by one themselves if they quantize.
    """
    if "HF_DEACTIVATE_ASYNC_LOAD" in os.environ:
        return ""
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    return f"transformers {version}: HF_DEACTIVATE_ASYNC_LOAD=1, loads weights one by one"


def has_nvidia_driver() -> bool:
    return shutil.which("nvidia-smi") is not None or os.path.exists("/dev/nvidiactl")


def grow_cuda_segments(version: str) -> str:
    """Let torch's allocator grow its segments of GPU memory, on an NVIDIA GPU under Linux.

    Without this patch every torch so far can run out of memory with gigabytes reserved but not in
    use. The allocator reads PYTORCH_ALLOC_CONF when CUDA starts. Once CUDA has started, this patch
    does nothing. torch 2.9 and
    newer read PYTORCH_ALLOC_CONF; an older PYTORCH_CUDA_ALLOC_CONF counts as the user's choice.
    """
    torch = sys.modules.get("torch")
    cuda_is_up = torch is not None and torch.cuda.is_initialized()
    chosen = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ)
    if chosen or cuda_is_up or sys.platform != "linux" or not has_nvidia_driver():
        return ""
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return "PYTORCH_ALLOC_CONF=expandable_segments:True, against fragmented GPU memory"


PATCHES = (  # each with its package, the first version that needs it, the first that does not
    (stand_in_for_triton_ops, "bitsandbytes", "0", "0.45.1"),
    (load_weights_one_by_one, "transformers", "5.0", "5.4"),
    (grow_cuda_segments, "torch", "2.9", "99"),
    (allow_cpu_layers_in_accelerate, "bitsandbytes", "0", "0.46"),  # last: it imports torch
)
# The lines of the patches in force, for the doctor. A file pasted again keeps them.
PATCHED = globals().get("PATCHED", [])


def apply(verbose: bool = True) -> list[str]:
    """Put in force what this machine needs. Returns, and prints, a line for each new patch."""
    lines = []
    for patch, package, first, end in PATCHES:
        version = installed_version(package)
        needed = version_tuple(first) <= version_tuple(version) < version_tuple(end)
        if version and needed and (line := patch(version)):
            lines.append(line)
            if verbose:
                print(f"env_shim: {line}", flush=True)
    PATCHED.extend(lines)
    return lines


def keep_cpu_weights_plain(model: object) -> int:
    """Keep 4-bit weights on a CPU with AVX512-BF16 in the layout that can be trained through.

    Call it after loading. Returns the number of layers changed. bitsandbytes 0.49 and newer repack
    these weights in place at the first evaluation forward, and from then on no gradient passes
    through them. torch warns "bitsandbytes::gemv_4bit: an autograd kernel was not registered", or
    training fails with "a view of a leaf Variable that requires grad is being used in an in-place
    operation".
    """
    layers = [m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


# ---- The check -----------------------------------------------------------------------------------


def package_problems(package: str) -> list[str]:
    """Say whether a package is missing, too old, or imported in another version than installed."""
    version, oldest, problems = installed_version(package), SUPPORTED[package][0], []
    pip = f'run: pip install "{package}>={oldest}"'
    if not version:
        return [f"{package} is not installed; {pip}"]
    if version_tuple(version) < version_tuple(oldest):
        problems.append(f"{package} {version} is older than {oldest}, the oldest supported; {pip}")
    loaded = getattr(sys.modules.get(package), "__version__", version)
    if version_tuple(loaded) != version_tuple(version):
        stale = f"{package} {version} is installed but {loaded} is already imported"
        problems.append(f"{stale}; restart the session (Colab: Runtime > Restart session)")
    return problems


def torch_problems(need_gpu: bool) -> list[str]:
    """Import an installed torch, and say if the import fails or if a needed GPU is not there."""
    version = installed_version("torch")
    if not version:
        return []
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: its CUDA libraries are broken
        reason = str(error).strip().partition("\n")[0]
        pip = f'pip install --force-reinstall "torch>={SUPPORTED["torch"][0]}"'
        return [f"torch {version} is installed but does not import ({reason}); run: {pip}"]
    if need_gpu and not torch.cuda.is_available():
        missing = "device: 'cuda' was asked for but torch sees no CUDA GPU; use device=cpu, or "
        return [missing + "choose a GPU runtime (Colab: Runtime > Change runtime type)"]
    return []


def check_environment(device: str = "auto", quantization: str = "nf4") -> list[str]:
    """Say what would stop training here, a line each with what mends it; [] if it can start.

    Imports nothing, except torch if device is "cuda". train.py asks before anything else.
    """
    python, problems = platform.python_version(), []
    if version_tuple(python) < version_tuple(OLDEST_PYTHON):
        older = f"Python {python} is older than {OLDEST_PYTHON}, the oldest supported"
        problems.append(f"{older}; run with Python {OLDEST_PYTHON} or newer")
    for package in SUPPORTED:
        if package != "bitsandbytes" or quantization != "none":
            problems += package_problems(package)
    return problems + (torch_problems(need_gpu=True) if device == "cuda" else [])


# ---- The doctor ----------------------------------------------------------------------------------

COLAB_IMAGES = {"4.57.6": "2026.01", "5.0.0": "2026.02"}  # transformers' version -> the image's


def describe_image() -> str:
    """Guess from transformers' version which Colab image this is."""
    if "COLAB_RELEASE_TAG" not in os.environ:
        return "not Colab"
    version = installed_version("transformers")
    if version in COLAB_IMAGES:
        return f"looks like Colab {COLAB_IMAGES[version]}"
    return f"Colab, unknown image (none we know has transformers {version or 'missing'})"


def describe_gpus() -> list[str]:
    """Give a line for each GPU that torch sees: name, memory, capability, and the dtype for it."""
    torch, lines = sys.modules.get("torch"), []
    if torch is None:
        return ["unknown"]
    for index in range(torch.cuda.device_count()):
        gpu, dtype = torch.cuda.get_device_properties(index), "bfloat16"
        if gpu.major < 8:
            dtype = "below 8.0, so float16 with loss scaling "
            dtype += "(torch's is_bf16_supported() says True all the same: emulated)"
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        lines.append(f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, {capability}: {dtype}")
    return lines or ["none that torch sees; device auto means cpu"]


def doctor() -> int:
    """Print what is here, patched, and amiss; returns 1 if training could not start, else 0."""
    apply(verbose=False)
    problems = check_environment() + torch_problems(need_gpu=False)
    rows = [("python", platform.python_version())]
    for package, (oldest, newest) in SUPPORTED.items():
        version = installed_version(package) or "-"
        note = f"supported from {oldest}, tried up to {newest}"
        if version_tuple(version) > version_tuple(newest):
            note += f'; newer than tried: if it fails, run: pip install "{package}=={newest}"'
        rows.append((package, f"{version:<14} {note}"))
    rows.append(("image", describe_image()))
    rows += [("gpu", line) for line in describe_gpus()]
    rows += [("patched", line) for line in PATCHED or ["nothing"]]
    rows += [("problem", line) for line in problems]
    rows.append(("result", "training cannot start" if problems else "training can start"))
    for name, text in rows:
        stream = sys.stderr if name == "problem" else sys.stdout
        print(f"{name:<13} {text}", file=stream, flush=True)
    return 1 if problems else 0


def main(argv: list[str]) -> int:
    layout = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=layout).parse_args(argv)
    return doctor()


if __name__ == "__main__" and "__file__" in globals():
    sys.exit(main(sys.argv[1:]))
