"""Proves that each patch of env_shim answers its symptom alone, and what check and doctor say.

    python -m pytest -q tests/test_env_shim.py                         offline, 60 s on busy cores
    WAKE2VEC_REALENV=1 python -m pytest -q tests/test_env_shim.py -m realenv
                      the triton.ops failure and its cure with the real packages: 143 s, 2.3 GB

A machine is pretended with a folder of fake packages: `python -S` imports them and sees nothing
else. Its Python and its environment variables are real.
"""

import ast
import json
import os
import platform
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import env_shim

ROOT = Path(env_shim.__file__).parent
OLD_COLAB = {
    "torch": "2.9.0+cu126", "transformers": "4.57.6", "safetensors": "0.7.0",
    "accelerate": "1.12.0", "bitsandbytes": "0.45.0", "pyyaml": "6.0.3", "matplotlib": "3.10.0",
}  # fmt: skip
NEW_COLAB = OLD_COLAB | {"transformers": "5.0.0", "safetensors": "0.8.0", "bitsandbytes": "0.49.1"}
NEWEST = {package: newest for package, (_, newest) in env_shim.SUPPORTED.items()}
# The lines of the four patches.
STAND_IN = "bitsandbytes 0.45.0: stand-in for triton.ops, which this bitsandbytes imports"
ONE_BY_ONE = "transformers 5.0.0: HF_DEACTIVATE_ASYNC_LOAD=1, loads weights one by one"
SEGMENTS = "PYTORCH_ALLOC_CONF=expandable_segments:True, against fragmented GPU memory"
CPU_LAYERS = "bitsandbytes 0.45.0: accelerate may prepare a model with layers on the CPU"
VARIABLES = ("HF_DEACTIVATE_ASYNC_LOAD", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def make_site(folder: Path, versions: dict, files: dict | None = None) -> Path:
    """Make a folder of fake packages: their recorded versions, and files given as path -> text."""
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info" / "METADATA"
        info.parent.mkdir(parents=True)
        info.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8")
    for path, text in (files or {}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return folder


def fake_torch(*gpus: dict) -> dict:
    """Give the files of a torch that sees these GPUs."""
    cuda = f"""
from types import SimpleNamespace
def is_available(): return bool({gpus!r})
def is_initialized(): return False
def device_count(): return {len(gpus)}
def get_device_properties(index): return SimpleNamespace(**{gpus!r}[index])
"""
    return {"torch/__init__.py": "from . import cuda\n", "torch/cuda.py": cuda}


def run(site: Path, code: str, *, driver: bool = False, real: bool = False, **variables: str):
    """Run code beside env_shim, with the packages of `site` alone or before the real ones."""
    hidden = (*VARIABLES, "COLAB_RELEASE_TAG")
    environment = {name: text for name, text in os.environ.items() if name not in hidden}
    environment |= {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), **variables}
    start = f"import os, sys, env_shim\nenv_shim.has_nvidia_driver = lambda: {driver}\n"
    command = [sys.executable, *([] if real else ["-S"]), "-B", "-c", start + code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def output(site: Path, code: str, **settings) -> str:
    done = run(site, code, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- When the patches act ------------------------------------------------------------------------

TRITON = {"triton/__init__.py": ""}
QUESTION = "is_bitsandbytes_multi_backend_available"
ACCELERATE = {
    "accelerate/__init__.py": "",
    "accelerate/utils.py": f"def {QUESTION}(): return False\n",
    "accelerate/accelerator.py": f"from .utils import {QUESTION}\n",
}
OPS_BY_HAND = """import types
ops, model = types.ModuleType("triton.ops"), types.ModuleType("triton.ops.matmul_perf_model")
sys.modules.update({"triton.ops": ops, "triton.ops.matmul_perf_model": model})"""
OLD = {"bitsandbytes": "0.45.0"}
TORCH, TORCH_FILES = {"torch": "2.9.0"}, fake_torch()


@pytest.mark.parametrize(
    ("versions", "files", "before", "lines"),
    [
        (OLD, TRITON, "", [STAND_IN]),
        ({"bitsandbytes": "0.45.1"}, TRITON, "", []),
        ({"bitsandbytes": "0.50.2"}, TRITON, "", []),
        ({}, TRITON, "", []),
        (OLD, {}, "", []),
        (OLD, TRITON, OPS_BY_HAND, []),
        (OLD, TRITON, "sys.meta_path.append(env_shim.TritonOpsStandIn())", []),
        (OLD, ACCELERATE, "", [CPU_LAYERS]),
        ({"bitsandbytes": "0.45.5"}, ACCELERATE, "", [CPU_LAYERS.replace("45.0", "45.5")]),
        ({"bitsandbytes": "0.46.0"}, ACCELERATE, "", []),
        (OLD, ACCELERATE | {"accelerate/utils.py": "raise OSError('no libcudart')"}, "", []),
        (OLD, ACCELERATE | {"accelerate/utils.py": f"{QUESTION} = 1; del {QUESTION}"}, "", []),
        (OLD, ACCELERATE, f"import accelerate.accelerator as a; a.{QUESTION} = lambda: 1", []),
        ({"transformers": "4.57.6"}, {}, "", []),
        ({"transformers": "5.0.0"}, {}, "", [ONE_BY_ONE]),
        ({"transformers": "5.3.0"}, {}, "", [ONE_BY_ONE.replace("5.0.0", "5.3.0")]),
        ({"transformers": "5.4.0"}, {}, "", []),
        ({"transformers": "5.24.0"}, {}, "", []),
        ({"transformers": "5.0.0"}, {}, "os.environ['HF_DEACTIVATE_ASYNC_LOAD'] = '0'", []),
        (TORCH, TORCH_FILES, "", [SEGMENTS]),
        (TORCH, TORCH_FILES, "import torch", [SEGMENTS]),
        ({"torch": "2.13.0+cpu"}, TORCH_FILES, "", [SEGMENTS]),
        ({"torch": "2.8.0"}, TORCH_FILES, "", []),  # does not read PYTORCH_ALLOC_CONF
        (TORCH, TORCH_FILES, "import torch; torch.cuda.is_initialized = lambda: True", []),
        (TORCH, TORCH_FILES, "sys.platform = 'win32'", []),
        (TORCH, TORCH_FILES, "env_shim.has_nvidia_driver = lambda: False", []),
        (TORCH, TORCH_FILES, "os.environ['PYTORCH_ALLOC_CONF'] = 'backend:native'", []),
        (TORCH, TORCH_FILES, "os.environ['PYTORCH_CUDA_ALLOC_CONF'] = 'backend:native'", []),
    ],
)
def test_a_patch_acts_on_its_versions_alone_and_not_over_a_patch_by_hand(
    tmp_path, versions, files, before, lines
):
    """A patch that is not needed changes nothing; one that is needed prints its line."""
    code = f"""
{before}
def state():
    answer = getattr(sys.modules.get("accelerate.accelerator"), "{QUESTION}", None)
    return list(sys.meta_path), dict(os.environ), answer
before = state()
print(env_shim.apply(), state() != before)
"""
    printed = "".join(f"env_shim: {line}\n" for line in lines)
    site = make_site(tmp_path, versions, files)
    assert output(site, code, driver=True) == f"{printed}{lines} {bool(lines)}\n"


def test_every_patch_acts_once_however_often_the_file_is_pasted_or_imported(tmp_path):
    versions = OLD | TORCH | {"transformers": "5.0.0"}
    site = make_site(tmp_path, versions, TRITON | ACCELERATE)
    code = f"""
before, source = list(sys.meta_path), open({str(ROOT / "env_shim.py")!r}, encoding="utf-8").read()
cell = {{"__name__": "__main__"}}
exec(source, cell)
assert sys.meta_path == before
for _ in range(3):
    exec(source, cell)
    cell["has_nvidia_driver"] = env_shim.has_nvidia_driver
    cell["apply"]()
    cell["apply"]()
assert cell["PATCHED"] == {[STAND_IN, ONE_BY_ONE, SEGMENTS, CPU_LAYERS]}
assert env_shim.apply() == [] and len(sys.meta_path) == len(before) + 1
print(*(os.environ.get(name) for name in {VARIABLES}))
"""
    assert output(site, code, driver=True).splitlines() == [
        *(f"env_shim: {line}" for line in (STAND_IN, ONE_BY_ONE, SEGMENTS, CPU_LAYERS)),
        "1 expandable_segments:True None",
    ]


# ---- What the patches do -------------------------------------------------------------------------

REAL_OPS = {
    "triton/ops/__init__.py": "",
    "triton/ops/matmul_perf_model.py": "early_config_prune = lambda *a: 'real'\n",
}
# As in bitsandbytes 0.45.0: a submodule is imported whole before the one that needs triton.ops.
BITSANDBYTES = {
    "bitsandbytes/__init__.py": "from . import functional, kernels\n",
    "bitsandbytes/functional.py": "print('functional imported')\n",
    "bitsandbytes/kernels.py": (
        "from triton.ops.matmul_perf_model import early_config_prune, estimate_matmul_time\n"
    ),
}


def test_bitsandbytes_imports_only_with_the_stand_in_also_after_a_failed_import(tmp_path):
    site = make_site(tmp_path, OLD, TRITON | BITSANDBYTES)
    assert "No module named 'triton.ops'" in run(site, "import bitsandbytes").stderr
    with_shim = "env_shim.apply()\nimport bitsandbytes"
    expected = f"env_shim: {STAND_IN}\nfunctional imported\n"
    assert output(site, with_shim) == expected
    failed_before = "try: import bitsandbytes\nexcept ImportError: print('failed')\n"
    printed = output(site, failed_before + with_shim)
    assert printed == "functional imported\nfailed\n" + expected


def test_a_bitsandbytes_that_is_imported_whole_is_not_purged(tmp_path):
    site = make_site(tmp_path, OLD, TRITON | BITSANDBYTES | {"bitsandbytes/kernels.py": ""})
    code = "import bitsandbytes; env_shim.apply(); print('bitsandbytes.kernels' in sys.modules)"
    assert output(site, code).endswith("\nTrue\n")


def test_the_stand_in_has_spec_path_parent_and_answers(tmp_path):
    code = """
from importlib.util import find_spec
env_shim.apply(verbose=False)
print(find_spec("triton.ops").name, find_spec("triton.ops.matmul_perf_model").parent)
import triton.ops.matmul_perf_model
model = triton.ops.matmul_perf_model
print(triton.ops.__spec__.name, triton.ops.__path__, model is sys.modules[model.__name__])
print(model.early_config_prune(["a", "b"], {}, key=1), model.estimate_matmul_time(1, num_warps=2))
print(find_spec("triton.ops.other"))
"""
    assert output(make_site(tmp_path, OLD, TRITON), code).splitlines() == [
        "triton.ops triton.ops",
        "triton.ops [] True",
        "['a', 'b'] 0.0",
        "None",
    ]


def test_a_real_triton_ops_wins_also_if_it_comes_later(tmp_path):
    site = make_site(tmp_path / "real", OLD, TRITON | REAL_OPS)
    use = "from triton.ops.matmul_perf_model import early_config_prune as prune; print(prune([]))"
    assert output(site, f"print(env_shim.apply())\n{use}") == "[]\nreal\n"
    site = make_site(tmp_path / "without", OLD, TRITON)
    later = f"import triton; triton.__path__.append({str(tmp_path / 'real' / 'triton')!r})"
    code = f"print(env_shim.apply(verbose=False))\n{later}\n{use}"
    assert output(site, code) == f"[{STAND_IN!r}]\nreal\n"


def test_the_real_accelerate_takes_cpu_layers_and_keeps_the_rest_of_prepare_model(tmp_path):
    """Beside a bitsandbytes that says of itself what 0.45.0 says: nothing."""
    pytest.importorskip("accelerate")
    site = make_site(tmp_path, OLD, {"bitsandbytes/__init__.py": ""})
    code = """
import torch
from accelerate import Accelerator, accelerator as module

def prepare(where, quantized="is_loaded_in_4bit"):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    setattr(model, quantized, True)
    model.hf_device_map = {"a": 0, "b": where}
    try:
        return accelerator.prepare_model(model, device_placement=True)
    except ValueError as error:
        return "CPU or disk offload" in str(error) and "refused"

accelerator, original = Accelerator(cpu=True), Accelerator.prepare_model
assert prepare("cpu") == prepare("disk") == "refused"
env_shim.apply()
assert prepare("disk") == "refused" != prepare("cpu")
assert Accelerator.prepare_model is original  # so that its autocast, DDP and compile stay
# The question is asked of quantized models alone, so that its answer changes nothing for others.
asked = []
module.is_bitsandbytes_multi_backend_available = lambda: not asked.append(1)
for quantized in ("neither", "is_loaded_in_8bit", "is_loaded_in_4bit"):
    asked.clear()
    prepare("cpu", quantized)
    assert bool(asked) == (quantized != "neither")
"""
    # On transformers 5.0 to 5.3 another patch says its line first.
    assert output(site, code, real=True).splitlines()[-1] == f"env_shim: {CPU_LAYERS}"


# ---- 4-bit weights on a CPU ----------------------------------------------------------------------


def four_bit_layers():
    torch, bitsandbytes = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layers = [bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", bias=False) for _ in range(2)]
    return torch.nn.Sequential(*layers, torch.nn.Linear(64, 64)).to("cpu").requires_grad_(False)


def test_keep_cpu_weights_plain_counts_what_it_changed():
    model = four_bit_layers()
    model[0].support_avx512bf16_for_cpu, model[1].support_avx512bf16_for_cpu = True, False
    assert env_shim.keep_cpu_weights_plain(model) == 1
    assert [layer.support_avx512bf16_for_cpu for layer in model[:2]] == [False, False]
    assert not hasattr(model[2], "support_avx512bf16_for_cpu")
    assert env_shim.keep_cpu_weights_plain(model) == 0


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit:UserWarning")  # the symptom's warning
def test_training_goes_on_after_an_evaluation_forward_on_the_cpu():
    import torch

    def evaluate_then_train(model) -> torch.Tensor:
        with torch.no_grad():
            model.eval()(torch.ones(2, 64))
        inputs = torch.ones(2, 64, requires_grad=True)
        model.train()(inputs).sum().backward()
        return inputs.grad

    repacks = getattr(four_bit_layers()[0], "support_avx512bf16_for_cpu", False)
    model = four_bit_layers()
    assert env_shim.keep_cpu_weights_plain(model) == (2 if repacks else 0)
    untouched = torch.ones(2, 64, requires_grad=True)
    four_bit_layers().train()(untouched).sum().backward()
    assert torch.equal(evaluate_then_train(model), untouched.grad)
    if repacks:  # the symptom is still there: the day this fails, keep_cpu_weights_plain can go
        assert evaluate_then_train(four_bit_layers()) is None


# ---- The check -----------------------------------------------------------------------------------


def test_supported_versions_are_those_of_requirements_txt():
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    entries = re.findall(r"((?:^#.*\n)+)^([a-z]+)>=([\d.]+)$", text, re.MULTILINE)
    assert {name: oldest for _, name, oldest in entries} == {
        name: oldest for name, (oldest, _) in env_shim.SUPPORTED.items()
    }
    for reason, name, oldest in entries:
        tried = re.findall(r"[Tt]ried\s+up\s+to\s+([\d.]*\d)", reason.replace("#", " "))
        assert tried == [NEWEST[name]], name
        assert oldest.startswith(re.search(r"(\d[\d.]*): ", reason).group(1)), f"{name}: no reason"
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(entries)


def test_version_tuple():
    given = ("2.9", "2.9+cu126", "2.13.0+cu130", "5.0.0rc1", "0.45.1.dev0", "")
    numbers = [(2, 9, 0), (2, 9, 0), (2, 13, 0), (5, 0, 0), (0, 45, 1), (0, 0, 0)]
    assert [env_shim.version_tuple(version) for version in given] == numbers


def check(site: Path, arguments: str = "", before: str = "") -> list[str]:
    code = f"{before}\nprint(*env_shim.check_environment({arguments}), sep='\\n')"
    return output(site, code).split("\n")[:-1]


def test_check_names_what_is_missing_or_old_and_the_pip_line(tmp_path):
    site = make_site(tmp_path / "old", NEW_COLAB | {"transformers": "4.9.2", "safetensors": "0.7"})
    too_old = '{0} {1} is older than {2}, the oldest supported; run: pip install "{0}>={2}"'
    assert check(site) == [
        too_old.format("transformers", "4.9.2", "4.57.6"),
        too_old.format("safetensors", "0.7", "0.8.0"),
    ]
    some = {name: NEW_COLAB[name] for name in NEW_COLAB if name != "bitsandbytes"}
    site = make_site(tmp_path / "missing", some)
    assert check(site) == ['bitsandbytes is not installed; run: pip install "bitsandbytes>=0.46.1"']
    assert check(site, "quantization='none'") == [""]
    newer_than_tried = NEW_COLAB | {"transformers": "6.0.0", "torch": "3.0.0"}
    assert check(make_site(tmp_path / "newer", newer_than_tried)) == [""]


def test_check_asks_torch_for_a_gpu_only_if_cuda_is_asked_for(tmp_path):
    site = make_site(tmp_path / "cpu", NEW_COLAB, fake_torch())
    assert check(site, "'cuda'") == [
        "device: 'cuda' was asked for but torch sees no CUDA GPU; use device=cpu, "
        "or choose a GPU runtime (Colab: Runtime > Change runtime type)"
    ]
    assert check(site, "'cpu'") == check(site, "'auto'") == [""]
    assert check(make_site(tmp_path / "gpu", NEW_COLAB, fake_torch(T4)), "'cuda'") == [""]


def test_check_sees_a_package_installed_over_an_imported_one(tmp_path):
    old = {"transformers/__init__.py": "__version__ = '4.57.6'"}
    assert check(make_site(tmp_path, NEW_COLAB, old), before="import transformers") == [
        "transformers 5.0.0 is installed but 4.57.6 is already imported; "
        "restart the session (Colab: Runtime > Restart session)"
    ]


def test_check_refuses_an_old_python_and_the_file_still_loads_there(tmp_path):
    old = "env_shim.platform.python_version = lambda: '3.9.18'"
    assert check(make_site(tmp_path, NEW_COLAB), before=old) == [
        "Python 3.9.18 is older than 3.10, the oldest supported; run with Python 3.10 or newer"
    ]
    # `X | None` in a hint is a TypeError on 3.9, at import, before the check could speak.
    tree = ast.parse((ROOT / "env_shim.py").read_text(encoding="utf-8"), feature_version=(3, 9))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    hints = [function.returns for function in functions]
    hints += [argument.annotation for function in functions for argument in function.args.args]
    assert len(hints) > 30
    assert not [hint for hint in hints if hint and "BitOr" in ast.dump(hint)]


def test_apply_and_check_import_nothing_heavy(tmp_path):
    code = "env_shim.apply()\nenv_shim.check_environment()\nprint(*sys.modules)"
    loaded = output(tmp_path, code, real=True).splitlines()[-1].split()
    assert "env_shim" in loaded
    assert not {"triton", "yaml", *env_shim.SUPPORTED} & set(loaded)


# ---- The doctor ----------------------------------------------------------------------------------

T4 = {"name": "Tesla T4", "total_memory": int(14.74 * 2**30), "major": 7, "minor": 5}
L4 = {"name": "NVIDIA L4", "total_memory": int(22.03 * 2**30), "major": 8, "minor": 9}
T4_LINE = (
    "Tesla T4, 14.7 GiB, compute capability 7.5: below 8.0, so float16 with loss scaling "
    "(torch's is_bf16_supported() says True all the same: emulated)"
)
MISSING = 'problem       {0} is not installed; run: pip install "{0}>={1}"\n'


def doctor(site: Path, **settings) -> tuple[int, str, str]:
    done = run(site, "sys.exit(env_shim.main([]))", **settings)
    return done.returncode, done.stdout, done.stderr


def test_doctor_on_the_old_colab_image(tmp_path):
    site = make_site(tmp_path, OLD_COLAB, TRITON | ACCELERATE | fake_torch(T4))
    assert doctor(site, driver=True, COLAB_RELEASE_TAG="release-colab") == (
        1,
        f"python        {platform.python_version()}\n"
        "torch         2.9.0+cu126    supported from 2.9.0, tried up to 2.13.0\n"
        "transformers  4.57.6         supported from 4.57.6, tried up to 5.24.0\n"
        "safetensors   0.7.0          supported from 0.8.0, tried up to 0.8.0\n"
        "accelerate    1.12.0         supported from 1.12.0, tried up to 1.15.0\n"
        "bitsandbytes  0.45.0         supported from 0.46.1, tried up to 0.50.2\n"
        "pyyaml        6.0.3          supported from 6.0.1, tried up to 6.0.4\n"
        "matplotlib    3.10.0         supported from 3.10.0, tried up to 3.11.2\n"
        "image         looks like Colab 2026.01\n"
        f"gpu           {T4_LINE}\n"
        f"patched       {STAND_IN}\n"
        f"patched       {SEGMENTS}\n"
        f"patched       {CPU_LAYERS}\n"
        "result        training cannot start\n",
        "problem       safetensors 0.7.0 is older than 0.8.0, the oldest supported; "
        'run: pip install "safetensors>=0.8.0"\n'
        "problem       bitsandbytes 0.45.0 is older than 0.46.1, the oldest supported; "
        'run: pip install "bitsandbytes>=0.46.1"\n',
    )


def test_doctor_on_the_new_colab_image(tmp_path):
    site = make_site(tmp_path, NEW_COLAB | {"matplotlib": "3.12.0"}, fake_torch(T4, L4))
    status, out, err = doctor(site, driver=True, COLAB_RELEASE_TAG="release-colab")
    assert (status, err) == (0, "")
    assert out.endswith(
        "matplotlib    3.12.0         supported from 3.10.0, tried up to 3.11.2; "
        'newer than tried: if it fails, run: pip install "matplotlib==3.11.2"\n'
        "image         looks like Colab 2026.02\n"
        f"gpu           {T4_LINE}\n"
        "gpu           NVIDIA L4, 22.0 GiB, compute capability 8.9: bfloat16\n"
        f"patched       {ONE_BY_ONE}\n"
        f"patched       {SEGMENTS}\n"
        "result        training can start\n"
    )


def test_doctor_on_a_plain_machine_without_bitsandbytes(tmp_path):
    versions = {name: NEWEST[name] for name in NEWEST if name != "bitsandbytes"}
    status, out, err = doctor(make_site(tmp_path, versions, fake_torch()))
    assert (status, err) == (1, MISSING.format("bitsandbytes", "0.46.1"))
    assert "bitsandbytes  -              supported from 0.46.1, tried up to 0.50.2\n" in out
    assert out.endswith(
        "image         not Colab\n"
        "gpu           none that torch sees; device auto means cpu\n"
        "patched       nothing\n"
        "result        training cannot start\n"
    )


def test_doctor_on_a_machine_without_torch_or_with_one_that_does_not_import(tmp_path):
    versions = {name: NEWEST[name] for name in NEWEST if name != "torch"}
    status, out, err = doctor(make_site(tmp_path / "missing", versions))
    assert (status, err) == (
        1,
        MISSING.format("torch", "2.9.0"),
    ) and "gpu           unknown\n" in out
    broken = "raise OSError('libcudart.so.12: cannot open shared object file\\nmore')\n"
    site = make_site(tmp_path / "broken", NEWEST, {"torch/__init__.py": broken})
    line = (
        "torch 2.13.0 is installed but does not import (libcudart.so.12: cannot open shared object "
        'file); run: pip install --force-reinstall "torch>=2.9.0"'
    )
    status, out, err = doctor(site)
    assert (status, err) == (1, f"problem       {line}\n") and "gpu           unknown\n" in out
    assert check(site, "'cuda'") == [line]


def test_doctor_still_names_the_patches_of_an_earlier_apply(tmp_path):
    code = "env_shim.apply(verbose=False); env_shim.doctor()"
    assert f"\npatched       {ONE_BY_ONE}\n" in output(make_site(tmp_path, NEW_COLAB), code)


def test_image_is_unknown_if_its_transformers_is(tmp_path):
    site = make_site(tmp_path, {"transformers": "5.23.0"})
    printed = output(site, "print(env_shim.describe_image())", COLAB_RELEASE_TAG="release-colab")
    assert printed == "Colab, unknown image (none we know has transformers 5.23.0)\n"


def test_command_line():
    for argument, status, text in (("--help", 0, "the doctor"), ("now", 2, "unrecognized")):
        command = [sys.executable, str(ROOT / "env_shim.py"), argument]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status and text in done.stdout + done.stderr


# ---- tests/torture/run_matrix.py -----------------------------------------------------------------

# Stands in an environment's folder as its Python, and notes what pip is asked for.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
*pytest\\ -q*) echo "$SUITE in 1.00s"; case "$SUITE" in *failed*) exit 1 ;; esac ;;
*pip\\ list*) echo "$LIST" ;;
*) echo "$*" >> "$0.log"; exit "$PIP" ;;
esac
"""


FOUND = {"torch": "2.13.0+cpu", "transformers": "4.57.6", "accelerate": "1.12.0"}
LISTING = json.dumps([{"name": n, "version": v} for n, v in FOUND.items()])
VERSIONS = "2.13.0+cpu | 4.57.6 | 1.12.0 | -"


def fake_matrix(folder: Path, name: str) -> tuple[Path, list]:
    """Put the fake Python into the environment `name` -> it, and the command."""
    python = make_site(folder, {}, {f"{name}/bin/python": FAKE_PYTHON}) / f"{name}/bin/python"
    python.chmod(0o755)
    return python, [sys.executable, ROOT / "tests/torture/run_matrix.py", "--venvs", folder]


def test_matrix_installs_once_and_reports_failed_suites_and_installations(tmp_path):
    python, command = fake_matrix(tmp_path, "oldest")

    def assert_matrix(pip: str, suite: str, status: int, result: str) -> None:
        fake = os.environ | {"PIP": pip, "SUITE": suite, "LIST": LISTING}
        done = subprocess.run([*command, "oldest"], env=fake, capture_output=True, text=True)
        row = f"| oldest | {result} | 0 |\n"
        assert done.returncode == status and done.stdout.endswith(row), done.stderr
        assert "newer" not in done.stdout

    assert_matrix("1", "", 1, "- | - | - | - | not installed")  # and so it is installed again
    assert_matrix("0", "1 failed, 1 passed", 1, f"{VERSIONS} | 1 failed, 1 passed")
    assert_matrix("0", "2 passed", 0, f"{VERSIONS} | 2 passed")
    _, torch_alone, all_of_them = python.with_name("python.log").read_text("utf-8").splitlines()
    assert torch_alone.endswith("install -q torch==2.13.0")
    for name, (oldest, _) in env_shim.SUPPORTED.items():
        assert f" {name}=={'2.13.0' if name == 'torch' else oldest} " in all_of_them
    done = subprocess.run([*command, "eldest"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown environment 'eldest', allowed: oldest, middle, newest" in done.stderr


def test_matrix_newest_is_what_pip_gives_today_and_says_so(tmp_path):
    python, command = fake_matrix(tmp_path, "newest")
    newer = json.loads(LISTING.replace("4.57.6", "6.1.0"))
    fake = os.environ | {"PIP": "0", "SUITE": "2 passed", "LIST": json.dumps(newer)}
    for _ in range(2):  # brought up to date each time
        done = subprocess.run([*command, "newest"], env=fake, capture_output=True, text=True)
        line = f"newest: transformers 6.1.0 is newer than {NEWEST['transformers']}, the newest"
        assert f"{line} tried of env_shim.SUPPORTED\n" in done.stdout
        assert done.stdout.count(" is newer than ") == 1
        assert done.stdout.endswith("| newest | 2.13.0+cpu | 6.1.0 | 1.12.0 | - | 2 passed | 0 |\n")
    asked = python.with_name("python.log").read_text("utf-8").splitlines()
    assert len(asked) == 4 and all("install -q --upgrade torch==2.13.0" in line for line in asked)
    assert " transformers " in asked[1] and "transformers==" not in asked[1]


# ---- The real packages ---------------------------------------------------------------------------


@pytest.mark.realenv
@pytest.mark.skipif(os.environ.get("WAKE2VEC_REALENV") != "1", reason="needs WAKE2VEC_REALENV=1")
def test_real_bitsandbytes_0_45_0_beside_triton_3_2_imports_only_with_the_shim(tmp_path):
    """Makes an environment of 2.3 GB; 143 s on 2 busy CPU cores (2026-11-22)."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q", "torch==2.13.0"]
    subprocess.run(pip, check=True)
    packages = ["triton>=3.2", "bitsandbytes==0.45.0", "transformers==4.57.6"]
    subprocess.run([*pip, *packages], check=True)

    def with_real(code: str) -> subprocess.CompletedProcess:
        return subprocess.run([python, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True)

    bitsandbytes = "import bitsandbytes"
    transformers = "from transformers.integrations import validate_bnb_backend_availability"
    assert "No module named 'triton.ops'" in with_real(bitsandbytes).stderr
    symptom = "Could not import module 'validate_bnb_backend_availability'"
    assert symptom in with_real(transformers).stderr
    failed_before = f"try: {bitsandbytes}\nexcept ImportError: print('failed')\n"
    with_shim = f"import env_shim; env_shim.apply()\n{bitsandbytes}\n{transformers}\n"
    done = with_real(failed_before + with_shim + "print(bitsandbytes.__version__)")
    assert done.stdout == f"failed\nenv_shim: {STAND_IN}\n0.45.0\n", done.stderr
