"""Make old and new Colab images importable, and say what a machine lacks for training.

    python env_shim.py        the doctor: versions, GPU, image, what was patched, what to install

Exit 1 where training could not start, with the pip line that mends it; else 0. In a notebook, call
apply() before torch and transformers are imported, and doctor() for the same report. Each of
PATCHES names the versions and the symptom it answers, acts only there, and prints one line when it
does; remove() undoes them all.
Cost: importing this file 55 ms, apply() 5 ms, check_environment() 7 ms, the doctor 3 s, most of it
torch's import (2 CPU cores, torch 2.13.0, 2026-11-22).
"""

import argparse
import importlib.machinery
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import types
from collections.abc import Iterator

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
# Name of a patch in force -> (its line, its generator); a file pasted again keeps the record.
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


# A patch is a generator, called with the version of the package it is for: where it is needed it
# acts, yields the line to print, and undoes all when it is asked again.

# What bitsandbytes' int8 kernels import of triton.ops: keep every configuration, cost 0.
TRITON_OPS = {
    "triton.ops": {},
    "triton.ops.matmul_perf_model": {
        "early_config_prune": lambda configs, *args, **kwargs: configs,
        "estimate_matmul_time": lambda *args, **kwargs: 0.0,
    },
}


def find_triton_ops(name: str, path: object = None, target: object = None) -> object:
    """Import finder of TRITON_OPS, the last on sys.meta_path: a real triton.ops is found before.

    The import system itself gives the modules their spec, path and place in the parent (a bare
    module put into sys.modules has no spec, and find_spec("triton.ops") then raises ValueError).
    """
    if name not in TRITON_OPS:
        return None
    loader = types.SimpleNamespace(create_module=lambda spec: None)
    loader.exec_module = lambda module: vars(module).update(TRITON_OPS[name])
    return importlib.machinery.ModuleSpec(name, loader, is_package=name == "triton.ops")


def stand_in_for_triton_ops(version: str) -> Iterator[str]:
    """bitsandbytes up to 0.45.0 beside triton 3.2 or newer: `import bitsandbytes` fails.

    Symptom: "No module named 'triton.ops'", or from transformers 4.57 "Could not import module
    'validate_bnb_backend_availability'". What a failed import left behind of bitsandbytes is
    purged, else the next import finds halves.
    """
    find_spec = importlib.machinery.PathFinder.find_spec
    triton = find_spec("triton")
    if triton is None or find_spec("triton.ops", triton.submodule_search_locations or []):
        return
    finder = types.SimpleNamespace(find_spec=find_triton_ops)
    sys.meta_path.append(finder)
    if "bitsandbytes" not in sys.modules:
        for name in [name for name in sys.modules if name.startswith("bitsandbytes.")]:
            del sys.modules[name]
    beside = f"triton {installed_version('triton') or 'of unknown version'}: stand-in"
    yield f"bitsandbytes {version}, {beside} for triton.ops, which this bitsandbytes imports"
    sys.meta_path.remove(finder)
    for name in TRITON_OPS:
        sys.modules.pop(name, None)
    if "triton" in sys.modules:
        vars(sys.modules["triton"]).pop("ops", None)


def allow_cpu_layers_in_accelerate(version: str) -> Iterator[str]:
    """bitsandbytes older than 0.46: accelerate's prepare_model refuses a device map with "cpu".

    Symptom: "You can't train a model that has been loaded in 8-bit or 4-bit precision with CPU or
    disk offload", from a Trainer; our own loop never asks. bitsandbytes from 0.46 on declares the
    feature that accelerate looks for. prepare_model stays as it is: one question, which it asks of
    quantized models alone, is answered True. A device map with "disk" stays refused.
    """
    name, question = "accelerate.accelerator", "is_bitsandbytes_multi_backend_available"
    answered = []
    if not installed_version("accelerate"):
        return

    def answer(module: types.ModuleType) -> None:
        answered.append((module, getattr(module, question)))
        setattr(module, question, lambda: True)

    def find_spec(wanted: str, path: object = None, target: object = None) -> object:
        """Import finder: answers when accelerate is imported (we do not: it takes 2 s)."""
        spec = importlib.machinery.PathFinder.find_spec(name, path) if wanted == name else None
        if spec is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: [execute(module), answer(module)]
        return spec

    finder = types.SimpleNamespace(find_spec=find_spec)
    sys.meta_path.insert(0, finder)
    if name in sys.modules:
        answer(sys.modules[name])
    yield f"bitsandbytes {version}: accelerate may prepare a model with layers on the CPU"
    sys.meta_path.remove(finder)
    for module, original in answered:
        setattr(module, question, original)


def hold_variable(name: str, value: str, line: str) -> Iterator[str]:
    """Set an environment variable; undone unless someone changed it since."""
    os.environ[name] = value
    yield line
    if os.environ.get(name) == value:
        del os.environ[name]


def load_weights_one_by_one(version: str) -> Iterator[str]:
    """transformers 5.0 to 5.3: 4-bit weights are loaded by threads that outrun the quantization.

    Symptom: loading peaks far above the size of the 4-bit model and runs out of memory. From 5.4
    on transformers itself loads one by one when it quantizes.
    """
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    if name not in os.environ:
        line = f"transformers {version}: {name}=1, loads weights one by one"
        yield from hold_variable(name, "1", line)


def has_nvidia_driver() -> bool:
    return shutil.which("nvidia-smi") is not None or os.path.exists("/dev/nvidiactl")


def grow_cuda_segments(version: str) -> Iterator[str]:
    """Any torch on an NVIDIA GPU under Linux: out of memory with gigabytes reserved but not in use.

    The allocator reads the variable when CUDA starts, so it is set only before. torch 2.9 and later
    read PYTORCH_ALLOC_CONF; the older PYTORCH_CUDA_ALLOC_CONF still counts as the user's choice.
    """
    torch = sys.modules.get("torch")
    cuda_is_up = torch is not None and torch.cuda.is_initialized()
    chosen = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ)
    if not chosen and not cuda_is_up and sys.platform == "linux" and has_nvidia_driver():
        name, value = "PYTORCH_ALLOC_CONF", "expandable_segments:True"
        yield from hold_variable(name, value, f"{name}={value}, against fragmented GPU memory")


PATCHES = (  # each with the package it is for, the first version and the first it is not for
    (stand_in_for_triton_ops, "bitsandbytes", "0", "0.45.1"),
    (allow_cpu_layers_in_accelerate, "bitsandbytes", "0", "0.46"),
    (load_weights_one_by_one, "transformers", "5.0", "5.4"),
    (grow_cuda_segments, "torch", "2.9", "99"),
)


def apply(verbose: bool = True) -> list[str]:
    """Put in force what this machine needs; returns, and prints, a line for each new patch."""
    lines = []
    for patch, package, first, end in PATCHES:
        name, version = patch.__name__, installed_version(package)
        is_for = version_tuple(first) <= version_tuple(version) < version_tuple(end)
        if name in ACTIVE_PATCHES or not version or not is_for:
            continue
        generator = patch(version)
        if line := next(generator, None):
            ACTIVE_PATCHES[name] = line, generator
            lines.append(line)
            if verbose:
                print(f"env_shim: {line}", flush=True)
    return lines


def remove() -> None:
    """Undo what apply() did."""
    while ACTIVE_PATCHES:
        _, (_, generator) = ACTIVE_PATCHES.popitem()
        next(generator, None)


def keep_cpu_weights_plain(model: object) -> int:
    """Keep 4-bit weights on a CPU with AVX512-BF16 in the layout that can be trained through.

    bitsandbytes from 0.49 on repacks them in place at the first evaluation forward; from then on no
    gradient passes through them. torch warns "bitsandbytes::gemv_4bit: an autograd kernel was not
    registered", or training fails with "a view of a leaf Variable that requires grad is being used
    in an in-place operation". Call it after loading; returns the number of layers changed.
    """
    layers = [m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def import_torch() -> tuple:
    """(torch, "") or (None, the problem): a torch with broken CUDA libraries raises at import."""
    try:
        import torch
    except (ImportError, OSError) as error:
        reason, version = str(error).strip().partition("\n")[0], installed_version("torch")
        pip = f'pip install --force-reinstall "torch>={SUPPORTED["torch"][0]}"'
        return None, f"torch {version} is installed but does not import ({reason}); run: {pip}"
    return torch, ""


def check_environment(device: str = "auto", quantization: str = "nf4") -> list[str]:
    """What would stop training here, a line each with what mends it; [] where it can start.

    Imports nothing, save torch where device is "cuda". train.py asks before anything else.
    """
    python, problems = platform.python_version(), []
    if version_tuple(python) < version_tuple(OLDEST_PYTHON):
        older = f"Python {python} is older than {OLDEST_PYTHON}, the oldest supported"
        problems.append(f"{older}; run with Python {OLDEST_PYTHON} or newer")
    for package, (oldest, _) in SUPPORTED.items():
        if package == "bitsandbytes" and quantization == "none":
            continue
        version, pip = installed_version(package), f'run: pip install "{package}>={oldest}"'
        loaded = getattr(sys.modules.get(package), "__version__", version)
        if not version:
            problems.append(f"{package} is not installed; {pip}")
        elif version_tuple(version) < version_tuple(oldest):
            older = f"{package} {version} is older than {oldest}, the oldest supported"
            problems.append(f"{older}; {pip}")
        if version and version_tuple(loaded) != version_tuple(version):
            stale = f"{package} {version} is installed but {loaded} is already imported"
            problems.append(f"{stale}; restart the session (Colab: Runtime > Restart session)")
    if device == "cuda" and installed_version("torch"):
        torch, problem = import_torch()
        if problem:
            problems.append(problem)
        elif not torch.cuda.is_available():
            missing = "device: 'cuda' was asked for but torch sees no CUDA GPU; use device=cpu, or "
            missing += "choose a GPU runtime (Colab: Runtime > Change runtime type)"
            problems.append(missing)
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
        gpu, dtype = torch.cuda.get_device_properties(index), "bfloat16"
        if gpu.major < 8:
            dtype = "below 8.0, so float16 with loss scaling "
            dtype += "(torch's is_bf16_supported() says True all the same: emulated)"
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        lines.append(f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, {capability}: {dtype}")
    return lines or ["none that torch sees; device auto means cpu"]


def doctor() -> int:
    """Print what is here, patched, and amiss; returns 1 where training could not start, else 0."""
    apply(verbose=False)
    rows = [("python", platform.python_version())]
    for package, (oldest, newest) in SUPPORTED.items():
        version = installed_version(package) or "-"
        note = f"supported from {oldest}, tried up to {newest}"
        if version_tuple(version) > version_tuple(newest):
            note += f'; newer than tried: if it fails, run: pip install "{package}=={newest}"'
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
    layout = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=layout).parse_args(argv)
    return doctor()


if __name__ == "__main__" and "__file__" in globals():
    sys.exit(main(sys.argv[1:]))
