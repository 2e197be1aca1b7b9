"""Make old and new Colab images importable, and say what a machine lacks for training.

    python env_shim.py        the doctor: versions, GPU, image, what was patched, what to install

Exit 1 where training could not start, with the pip line that mends it; else 0. In a notebook, call
apply() before torch and transformers are imported, and doctor() for the same report.

apply() tries each function of PATCHES: each names the versions and the symptom it answers, acts
only there, and prints one line when it does. remove() undoes them all.
Cost: importing this file 55 ms, apply() 5 ms, check_environment() 7 ms, the doctor 3 s, most of it
torch's import (2 CPU cores, torch 2.13.0, 2026-11-22).
"""

import argparse
import functools
import importlib.machinery
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import types
from collections.abc import Callable

# Package -> (oldest supported, newest tried). requirements.txt says the same, with the reasons.
SUPPORTED = {
    "torch": ("2.9.0", "2.13.0"),
    "transformers": ("4.57.6", "5.23.0"),
    "accelerate": ("1.12.0", "1.15.0"),
    "bitsandbytes": ("0.46.1", "0.50.2"),
    "pyyaml": ("6.0.1", "6.0.3"),
    "matplotlib": ("3.10.0", "3.11.2"),
}
OLDEST_PYTHON = "3.10"  # torch 2.9 wants it; transformers 5.23 wants 3.11
COLAB_IMAGES = {"4.57.6": "2026.01", "5.0.0": "2026.02"}  # known by their transformers
NO_CUDA = (
    "device: 'cuda' was asked for but torch sees no CUDA GPU; use device=cpu, "
    "or choose a GPU runtime (Colab: Runtime > Change runtime type)"
)
# What a patch returns when it acted: the line to print, and the function that undoes it.
# (Hints with "| None" are quoted here: under 3.9 the file must load, to say that 3.9 is too old.)
Patch = tuple[str, Callable]
# Name of a patch in force -> what it returned; a file that is pasted again keeps the record.
ACTIVE_PATCHES = globals().get("ACTIVE_PATCHES", {})


def installed_version(package: str) -> str:
    """The version pip recorded, "" where there is none. Imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def version_tuple(version: str) -> tuple[int, int, int]:
    """Numbers to compare: "2.9" -> (2, 9, 0), "2.13.0+cu130" -> (2, 13, 0), "" -> (0, 0, 0)."""
    numbers = [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]
    return tuple((numbers + [0, 0, 0])[:3])


def is_between(package: str, first: str, end: str) -> bool:
    """Is the package installed in a version from `first` on and below `end`?"""
    version = installed_version(package)
    return bool(version) and version_tuple(first) <= version_tuple(version) < version_tuple(end)


def find_triton_ops(name: str, path: object = None, target: object = None) -> object:
    """Import finder: an empty triton.ops, and the two names of triton.ops.matmul_perf_model.

    It stands last on sys.meta_path: a real triton.ops is found before it is asked, and the import
    system itself gives the modules their spec, path and place in the parent (a bare module put into
    sys.modules has no spec, and find_spec("triton.ops") then raises ValueError).
    """
    if name not in ("triton.ops", "triton.ops.matmul_perf_model"):
        return None

    def fill(module: types.ModuleType) -> None:
        if name == "triton.ops.matmul_perf_model":
            # What bitsandbytes' int8 kernels ask of it at import: keep every configuration, cost 0.
            module.early_config_prune = lambda configs, *args, **kwargs: configs
            module.estimate_matmul_time = lambda *args, **kwargs: 0.0

    loader = types.SimpleNamespace(create_module=lambda spec: None, exec_module=fill)
    return importlib.machinery.ModuleSpec(name, loader, is_package=name == "triton.ops")


def stand_in_for_triton_ops() -> "Patch | None":
    """bitsandbytes up to 0.45.0 beside triton 3.2 or newer: `import bitsandbytes` fails.

    Symptom: "No module named 'triton.ops'", or from transformers 4.57 "Could not import module
    'validate_bnb_backend_availability'". What a failed import left behind of bitsandbytes is
    purged, else the next import finds halves. Not needed from bitsandbytes 0.45.1 on.
    """
    triton = importlib.machinery.PathFinder.find_spec("triton")
    if triton is None or not is_between("bitsandbytes", "0.0", "0.45.1"):
        return None
    folders = triton.submodule_search_locations
    if folders and importlib.machinery.PathFinder.find_spec("triton.ops", folders):
        return None
    finder = types.SimpleNamespace(find_spec=find_triton_ops)
    sys.meta_path.append(finder)
    if "bitsandbytes" not in sys.modules:
        for name in [name for name in sys.modules if name.startswith("bitsandbytes.")]:
            del sys.modules[name]

    def undo() -> None:
        sys.meta_path.remove(finder)
        for name in ("triton.ops.matmul_perf_model", "triton.ops"):
            sys.modules.pop(name, None)
        if "triton" in sys.modules:
            vars(sys.modules["triton"]).pop("ops", None)

    versions = f"bitsandbytes {installed_version('bitsandbytes')}, triton "
    versions += installed_version("triton") or "of unknown version"
    return f"{versions}: stand-in for triton.ops, which this bitsandbytes imports", undo


def wrap_prepare_model(accelerator_module: types.ModuleType) -> None:
    """Let Accelerator.prepare_model take a quantized model with layers on the CPU; all else stays.

    The original runs as it is, and for a quantized model one question it asks is answered True.
    """
    original = accelerator_module.Accelerator.prepare_model
    if hasattr(original, "wrapped_by_env_shim"):
        return

    @functools.wraps(original)
    def prepare_model(self: object, model: object, *args: object, **kwargs: object) -> object:
        is_4bit = getattr(model, "is_loaded_in_4bit", False)
        if not (is_4bit or getattr(model, "is_loaded_in_8bit", False)):
            return original(self, model, *args, **kwargs)
        question = accelerator_module.is_bitsandbytes_multi_backend_available
        accelerator_module.is_bitsandbytes_multi_backend_available = lambda: True
        try:
            return original(self, model, *args, **kwargs)
        finally:
            accelerator_module.is_bitsandbytes_multi_backend_available = question

    prepare_model.wrapped_by_env_shim = True
    accelerator_module.Accelerator.prepare_model = prepare_model


def find_accelerator(name: str, path: object = None, target: object = None) -> object:
    """Import finder: wraps prepare_model when accelerate is imported (we do not: it takes 2 s)."""
    if name != "accelerate.accelerator":
        return None
    spec = importlib.machinery.PathFinder.find_spec(name, path)
    if spec is not None:
        execute = spec.loader.exec_module

        def execute_and_wrap(module: types.ModuleType) -> None:
            execute(module)
            wrap_prepare_model(module)

        spec.loader.exec_module = execute_and_wrap
    return spec


def allow_cpu_layers_in_accelerate() -> "Patch | None":
    """bitsandbytes older than 0.46: accelerate's prepare_model refuses a device map with "cpu".

    Symptom: "You can't train a model that has been loaded in 8-bit or 4-bit precision with CPU or
    disk offload", from a Trainer; our own loop never asks. bitsandbytes from 0.46 on declares the
    feature that accelerate looks for. A device map with "disk" stays refused.
    """
    if not installed_version("accelerate") or not is_between("bitsandbytes", "0.0", "0.46"):
        return None
    finder = types.SimpleNamespace(find_spec=find_accelerator)
    sys.meta_path.insert(0, finder)
    if "accelerate.accelerator" in sys.modules:
        wrap_prepare_model(sys.modules["accelerate.accelerator"])

    def undo() -> None:
        sys.meta_path.remove(finder)
        module = sys.modules.get("accelerate.accelerator")
        if module and hasattr(module.Accelerator.prepare_model, "wrapped_by_env_shim"):
            module.Accelerator.prepare_model = module.Accelerator.prepare_model.__wrapped__

    version = installed_version("bitsandbytes")
    return f"bitsandbytes {version}: accelerate may prepare a model with layers on the CPU", undo


def set_variable(name: str, value: str) -> Callable:
    """Set an environment variable; returns what undoes it, unless someone changed it since."""
    os.environ[name] = value
    return lambda: os.environ.pop(name) if os.environ.get(name) == value else None


def load_weights_one_by_one() -> "Patch | None":
    """transformers 5.0 to 5.3: 4-bit weights are loaded by threads that outrun the quantization.

    Symptom: loading peaks far above the size of the 4-bit model and runs out of memory. From 5.4
    on transformers itself loads one by one when it quantizes.
    """
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    if name in os.environ or not is_between("transformers", "5.0", "5.4"):
        return None
    version = installed_version("transformers")
    return f"transformers {version}: {name}=1, loads weights one by one", set_variable(name, "1")


def has_nvidia_driver() -> bool:
    return shutil.which("nvidia-smi") is not None or os.path.exists("/dev/nvidiactl")


def grow_cuda_segments() -> "Patch | None":
    """Any torch on an NVIDIA GPU under Linux: out of memory with gigabytes reserved but not in use.

    The allocator reads the variable when CUDA starts, so it is set only before. torch 2.9 and later
    read PYTORCH_ALLOC_CONF; the older PYTORCH_CUDA_ALLOC_CONF still counts as the user's choice.
    """
    torch = sys.modules.get("torch")
    cuda_is_up = torch is not None and torch.cuda.is_initialized()
    chosen = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ)
    if chosen or cuda_is_up or sys.platform != "linux" or not has_nvidia_driver():
        return None
    if not is_between("torch", "2.9", "99"):
        return None
    name, value = "PYTORCH_ALLOC_CONF", "expandable_segments:True"
    return f"{name}={value}, against fragmented GPU memory", set_variable(name, value)


PATCHES = (
    stand_in_for_triton_ops,
    allow_cpu_layers_in_accelerate,
    load_weights_one_by_one,
    grow_cuda_segments,
)


def apply(verbose: bool = True) -> list[str]:
    """Put in force what this machine needs; returns, and prints, a line for each new patch."""
    lines = []
    for patch in PATCHES:
        if patch.__name__ in ACTIVE_PATCHES:
            continue
        acted = patch()
        if acted:
            ACTIVE_PATCHES[patch.__name__] = acted
            lines.append(acted[0])
            if verbose:
                print(f"env_shim: {acted[0]}", flush=True)
    return lines


def remove() -> None:
    """Undo what apply() did."""
    while ACTIVE_PATCHES:
        _, (_, undo) = ACTIVE_PATCHES.popitem()
        undo()


def keep_cpu_weights_plain(model: object) -> int:
    """Keep 4-bit weights on a CPU with AVX512-BF16 in the layout that can be trained through.

    bitsandbytes from 0.49 on repacks them in place at the first evaluation forward; from then on no
    gradient passes through them. torch warns "bitsandbytes::gemv_4bit: an autograd kernel was not
    registered", or training fails with "a view of a leaf Variable that requires grad is being used
    in an in-place operation". Call it after loading.

    Returns the number of layers changed; 0 where none would repack.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:  # then no layer of the model is one of its
        return 0
    num_changed = 0
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            num_changed += bool(getattr(module, "support_avx512bf16_for_cpu", False))
            module.support_avx512bf16_for_cpu = False
    return num_changed


def import_torch() -> "tuple[types.ModuleType | None, str]":
    """(torch, "") or (None, the problem): a torch with broken CUDA libraries raises at import."""
    try:
        import torch
    except (ImportError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        pip = f'pip install --force-reinstall "torch>={SUPPORTED["torch"][0]}"'
        version = installed_version("torch")
        return None, f"torch {version} is installed but does not import ({reason}); run: {pip}"
    return torch, ""


def check_environment(device: str = "auto", quantization: str = "nf4") -> list[str]:
    """What would stop training here, a line each with what mends it; [] where it can start.

    Imports nothing, save torch where device is "cuda". train.py asks before anything else.
    """
    problems = []
    if version_tuple(platform.python_version()) < version_tuple(OLDEST_PYTHON):
        problems.append(
            f"Python {platform.python_version()} is older than {OLDEST_PYTHON}, the oldest "
            f"supported; run with Python {OLDEST_PYTHON} or newer"
        )
    for package, (oldest, _) in SUPPORTED.items():
        version = installed_version(package)
        pip = f'run: pip install "{package}>={oldest}"'
        if package == "bitsandbytes" and quantization == "none":
            continue
        if not version:
            problems.append(f"{package} is not installed; {pip}")
        elif version_tuple(version) < version_tuple(oldest):
            problems.append(
                f"{package} {version} is older than {oldest}, the oldest supported; {pip}"
            )
        loaded = getattr(sys.modules.get(package), "__version__", version)
        if version and version_tuple(loaded) != version_tuple(version):
            problems.append(
                f"{package} {version} is installed but {loaded} is already imported; "
                "restart the session (Colab: Runtime > Restart session)"
            )
    if device == "cuda" and installed_version("torch"):
        torch, problem = import_torch()
        if problem or not torch.cuda.is_available():
            problems.append(problem or NO_CUDA)
    return problems


def describe_image() -> str:
    """Which Colab image this is, as far as its transformers tells."""
    if "COLAB_RELEASE_TAG" not in os.environ:
        return "not Colab"
    version = installed_version("transformers")
    if version in COLAB_IMAGES:
        return f"looks like Colab {COLAB_IMAGES[version]}"
    return f"Colab, unknown image (none we know has transformers {version or 'missing'})"


def describe_gpus(torch: types.ModuleType) -> list[str]:
    """A line for each GPU that torch sees: name, memory, capability and the dtype that follows."""
    lines = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        line = f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, compute capability "
        line += f"{gpu.major}.{gpu.minor}: "
        if (gpu.major, gpu.minor) >= (8, 0):
            lines.append(line + "bfloat16")
        else:
            lines.append(
                line + "below 8.0, so float16 with loss scaling "
                "(torch's is_bf16_supported() says True all the same: emulated)"
            )
    return lines or ["none that torch sees; device auto means cpu"]


def doctor() -> int:
    """Print what is here, patched, and amiss; returns 1 where training could not start, else 0."""
    apply(verbose=False)
    rows = [("python", platform.python_version())]
    for package, (oldest, newest) in SUPPORTED.items():
        version = installed_version(package) or "-"
        note = f"supported from {oldest}, tried up to {newest}"
        if version_tuple(version) > version_tuple(newest):
            note += "; newer than tried: if it fails, run: "
            note += f'pip install "{package}=={newest}"'
        rows.append((package, f"{version:<14} {note}"))
    rows.append(("image", describe_image()))
    problems = check_environment()
    if installed_version("torch"):
        torch, problem = import_torch()
        problems += [problem] if problem else []
        rows += [("gpu", line) for line in (describe_gpus(torch) if torch else ["unknown"])]
    rows += [("patched", line) for line, _ in ACTIVE_PATCHES.values()] or [("patched", "nothing")]
    rows += [("problem", line) for line in problems]
    rows.append(("result", "training cannot start" if problems else "training can start"))
    for name, text in rows:
        stream = sys.stderr if name == "problem" else sys.stdout
        print(f"{name:<13} {text}", file=stream, flush=True)
    return 1 if problems else 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    return doctor()


if __name__ == "__main__" and "__file__" in globals():
    sys.exit(main(sys.argv[1:]))
