"""Proves that each patch of env_shim answers its symptom alone, and what the doctor says.

    python -m pytest -q tests/test_env_shim.py                         offline, seconds
    WAKE2VEC_REALENV=1 python -m pytest -q tests/test_env_shim.py -m realenv
                      the triton.ops failure and its cure with the real packages: 143 s, 2.3 GB

Fake packages stand in a folder of their own; `python -S` imports them and sees nothing else.
"""

import ast
import os
import re
import subprocess
import sys
import types
import venv
from pathlib import Path

import pytest

import env_shim
import run_matrix

ROOT = Path(env_shim.__file__).parent
HEAVY = {"torch", "transformers", "accelerate", "bitsandbytes", "triton", "matplotlib", "yaml"}
OLD_COLAB = {
    "torch": "2.9.0+cu126",
    "transformers": "4.57.6",
    "accelerate": "1.12.0",
    "bitsandbytes": "0.45.0",
    "pyyaml": "6.0.3",
    "matplotlib": "3.10.0",
}
NEW_COLAB = {**OLD_COLAB, "transformers": "5.0.0", "bitsandbytes": "0.49.1"}


@pytest.fixture(autouse=True)
def no_patch_before_or_after(monkeypatch):
    for name in ("HF_DEACTIVATE_ASYNC_LOAD", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(env_shim, "ACTIVE_PATCHES", {})
    yield
    env_shim.remove()


def fake_torch(version: str, gpus: tuple = (), cuda_is_up: bool = False) -> types.SimpleNamespace:
    cuda = types.SimpleNamespace(
        is_available=lambda: bool(gpus),
        is_initialized=lambda: cuda_is_up,
        device_count=lambda: len(gpus),
        get_device_properties=lambda index: gpus[index],
    )
    return types.SimpleNamespace(__version__=version, cuda=cuda)


def gpu(name: str, gib: float, major: int, minor: int) -> types.SimpleNamespace:
    memory = int(gib * 2**30)
    return types.SimpleNamespace(name=name, total_memory=memory, major=major, minor=minor)


@pytest.fixture
def machine(monkeypatch):
    """Make this process look like a machine with these packages, Python 3.12.11, and these GPUs."""

    def pretend(versions: dict, colab: bool = False, gpus: tuple = (), cuda_is_up: bool = False):
        monkeypatch.setattr(env_shim, "installed_version", lambda name: versions.get(name, ""))
        monkeypatch.setattr(env_shim.platform, "python_version", lambda: "3.12.11")
        monkeypatch.setattr(env_shim, "has_nvidia_driver", lambda: bool(gpus))
        monkeypatch.setattr(env_shim.sys, "platform", "linux")
        for name in env_shim.SUPPORTED:
            monkeypatch.setitem(sys.modules, name, None)
        torch = fake_torch(versions["torch"], gpus, cuda_is_up) if "torch" in versions else None
        monkeypatch.setitem(sys.modules, "torch", torch)
        monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
        if colab:
            monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")

    return pretend


# ---- triton.ops ----------------------------------------------------------------------------------


def make_site(folder: Path, versions: dict, files: dict) -> Path:
    """A folder of fake packages: their recorded versions, and files given as path -> text."""
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info" / "METADATA"
        info.parent.mkdir(parents=True)
        info.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8")
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return folder


TRITON = {"triton/__init__.py": ""}
REAL_OPS = {
    "triton/ops/__init__.py": "",
    "triton/ops/matmul_perf_model.py": (
        "early_config_prune = estimate_matmul_time = lambda *a: 'real'\n"
    ),
}
# As in bitsandbytes 0.45.0: a submodule is imported whole before the one that needs triton.ops.
BITSANDBYTES = {
    "bitsandbytes/__init__.py": "from . import functional, kernels\n",
    "bitsandbytes/functional.py": "print('functional imported')\n",
    "bitsandbytes/kernels.py": (
        "import triton\n"
        "from triton.ops.matmul_perf_model import early_config_prune, estimate_matmul_time\n"
    ),
}
OLD_PAIR = {"triton": "3.5.0", "bitsandbytes": "0.45.0"}
STAND_IN = (
    "env_shim: bitsandbytes 0.45.0, triton 3.5.0: stand-in for triton.ops, "
    "which this bitsandbytes imports\n"
)


def run_with(site: Path, code: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    command = [sys.executable, "-S", "-B", "-c", code]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def output_with(site: Path, code: str) -> str:
    done = run_with(site, code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bitsandbytes_imports_only_with_the_stand_in(tmp_path):
    site = make_site(tmp_path, OLD_PAIR, {**TRITON, **BITSANDBYTES})
    assert "No module named 'triton.ops'" in run_with(site, "import bitsandbytes").stderr
    assert output_with(site, "import env_shim; env_shim.apply(); import bitsandbytes") == (
        STAND_IN + "functional imported\n"
    )


def test_a_half_imported_bitsandbytes_is_purged(tmp_path):
    site = make_site(tmp_path, OLD_PAIR, {**TRITON, **BITSANDBYTES})
    code = """
import sys, env_shim
try:
    import bitsandbytes
except ModuleNotFoundError as error:
    print(error, "bitsandbytes.functional" in sys.modules)
env_shim.apply()
import bitsandbytes
"""
    assert output_with(site, code) == (
        "functional imported\nNo module named 'triton.ops' True\n"
        + STAND_IN
        + "functional imported\n"
    )


def test_the_stand_in_has_spec_path_parent_and_answers(tmp_path):
    site = make_site(tmp_path, OLD_PAIR, {**TRITON, **BITSANDBYTES})
    code = """
import importlib.util, sys, env_shim
env_shim.apply(verbose=False)
print(importlib.util.find_spec("triton.ops").name)
print(importlib.util.find_spec("triton.ops.matmul_perf_model").parent)
import triton.ops.matmul_perf_model
model = sys.modules['triton.ops.matmul_perf_model']
print(triton.ops.__spec__.name, triton.ops.__path__, triton.ops.matmul_perf_model is model)
print(model.early_config_prune(["a", "b"], {}, key=1), model.estimate_matmul_time(1, num_warps=2))
print(importlib.util.find_spec("triton.ops.other"))
"""
    assert output_with(site, code).splitlines() == [
        "triton.ops",
        "triton.ops",
        "triton.ops [] True",
        "['a', 'b'] 0.0",
        "None",
    ]


def test_a_real_triton_ops_wins(tmp_path):
    site = make_site(tmp_path, OLD_PAIR, {**TRITON, **REAL_OPS, **BITSANDBYTES})
    code = """
import env_shim
print(env_shim.apply())
from triton.ops.matmul_perf_model import early_config_prune
print(early_config_prune([]))
"""
    assert output_with(site, code) == "[]\nreal\n"


def test_a_real_triton_ops_that_comes_later_wins_over_the_stand_in(tmp_path):
    site = make_site(tmp_path / "site", OLD_PAIR, TRITON)
    other = make_site(tmp_path / "other", {}, REAL_OPS)
    code = f"""
import triton, env_shim
print(len(env_shim.apply(verbose=False)))
triton.__path__.append({str(other / "triton")!r})
from triton.ops.matmul_perf_model import early_config_prune
print(early_config_prune([]))
"""
    assert output_with(site, code) == "1\nreal\n"


@pytest.mark.parametrize(
    ("versions", "files"),
    [
        ({"triton": "3.5.0", "bitsandbytes": "0.45.1"}, TRITON),
        ({"triton": "3.5.0", "bitsandbytes": "0.50.2"}, TRITON),
        ({"triton": "3.5.0"}, TRITON),
        ({"bitsandbytes": "0.45.0"}, {}),
        ({}, {}),
    ],
)
def test_silence_where_nothing_needs_triton_ops(tmp_path, versions, files):
    site = make_site(tmp_path, versions, files)
    code = "import sys, env_shim; n = len(sys.meta_path); env_shim.apply(); "
    assert output_with(site, code + "print(len(sys.meta_path) - n)") == "0\n"


def test_stand_in_once_however_often_pasted_and_undone_by_remove(tmp_path):
    site = make_site(tmp_path, OLD_PAIR, {**TRITON, **BITSANDBYTES})
    code = f"""
import importlib.util, sys
before = list(sys.meta_path)
source = open({str(ROOT / "env_shim.py")!r}, encoding="utf-8").read()
cell = {{"__name__": "__main__"}}
for _ in range(3):
    exec(source, cell)
    cell["apply"]()
    cell["apply"]()
print(len(sys.meta_path) - len(before))
import triton.ops.matmul_perf_model
cell["remove"]()
print(sys.meta_path == before, hasattr(triton, "ops"), importlib.util.find_spec("triton.ops"))
print([name for name in sys.modules if name.startswith("triton.")])
print(len(cell["apply"](verbose=False)))
"""
    assert output_with(site, code) == STAND_IN + "1\nTrue False None\n[]\n1\n"


# ---- accelerate ----------------------------------------------------------------------------------


@pytest.fixture
def accelerate_module(monkeypatch):
    """The real accelerate, as it answers beside a bitsandbytes older than 0.46."""
    module = pytest.importorskip("accelerate.accelerator")
    from accelerate.state import AcceleratorState

    monkeypatch.setattr(module, "is_bitsandbytes_multi_backend_available", lambda: False)
    monkeypatch.setattr(module, "is_xpu_available", lambda *a, **k: False)
    monkeypatch.setattr(
        env_shim,
        "installed_version",
        lambda name: {"accelerate": "1.12.0", "bitsandbytes": "0.45.5"}.get(name, ""),
    )
    yield module
    AcceleratorState._reset_state(reset_partial_state=True)


def quantized_model(device_map: dict):
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model.is_loaded_in_4bit, model.hf_device_map = True, device_map
    return model


def test_accelerate_takes_cpu_layers_and_keeps_the_rest_of_prepare_model(accelerate_module):
    import torch

    accelerator = accelerate_module.Accelerator(cpu=True, mixed_precision="bf16")
    model = quantized_model({"a": 0, "b": "cpu"})
    with pytest.raises(ValueError, match="CPU or disk offload"):
        accelerator.prepare_model(quantized_model({"a": 0, "b": "cpu"}))
    original = accelerate_module.Accelerator.prepare_model
    question = accelerate_module.is_bitsandbytes_multi_backend_available
    assert env_shim.apply(verbose=False) == [
        "bitsandbytes 0.45.5: accelerate may prepare a model with layers on the CPU"
    ]
    assert accelerator.prepare_model(model) is model
    assert model in accelerator._models
    inner = []
    model[0].register_forward_hook(lambda module, args, output: inner.append(output.dtype))
    assert model(torch.zeros(1, 4)).dtype == torch.float32  # outputs are converted back
    assert inner == [torch.bfloat16]  # autocast is still wrapped around forward
    with pytest.raises(ValueError, match="CPU or disk offload"):
        accelerator.prepare_model(quantized_model({"a": 0, "b": "disk"}))
    assert env_shim.apply() == []
    assert accelerate_module.Accelerator.prepare_model is original
    env_shim.remove()
    assert accelerate_module.is_bitsandbytes_multi_backend_available is question
    with pytest.raises(ValueError, match="CPU or disk offload"):
        accelerator.prepare_model(quantized_model({"a": 0, "b": "cpu"}))


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_accelerate_asks_the_question_of_quantized_models_alone(
    accelerate_module, monkeypatch, bits
):
    """So that answering it True changes nothing for others: prepare_model itself stays."""
    import torch

    asked = []
    question = "is_bitsandbytes_multi_backend_available"
    monkeypatch.setattr(accelerate_module, question, lambda: asked.append(1) or True)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model.hf_device_map = {"a": "cpu", "b": 0}
    if bits:
        setattr(model, f"is_loaded_in_{bits}bit", True)
    accelerator = accelerate_module.Accelerator(cpu=True)
    assert accelerator.prepare_model(model, device_placement=True) is model
    assert bool(asked) == bool(bits)


def test_accelerate_is_patched_when_it_is_imported_not_before(tmp_path):
    files = {
        "accelerate/__init__.py": "from .accelerator import Accelerator\n",
        "accelerate/accelerator.py": (
            "class Accelerator:\n    def prepare_model(self, model):\n"
            "        return is_bitsandbytes_multi_backend_available()\n"
            "def is_bitsandbytes_multi_backend_available():\n    return False\n"
        ),
    }
    site = make_site(tmp_path, {"accelerate": "1.12.0", "bitsandbytes": "0.45.5"}, files)
    code = """
import sys, env_shim
before = list(sys.meta_path)
env_shim.apply()
print("accelerate" in sys.modules)
from accelerate import Accelerator
print(Accelerator().prepare_model(None))
env_shim.remove()
print(Accelerator().prepare_model(None), sys.meta_path == before)
"""
    assert output_with(site, code).splitlines() == [
        "env_shim: bitsandbytes 0.45.5: accelerate may prepare a model with layers on the CPU",
        "False",
        "True",
        "False True",
    ]


def test_accelerate_is_left_alone_beside_bitsandbytes_0_46(machine):
    machine({"accelerate": "1.12.0", "bitsandbytes": "0.46.0"})
    assert env_shim.apply() == []
    machine({"bitsandbytes": "0.45.5"})
    assert env_shim.apply() == []


# ---- environment variables -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "acts"),
    [("4.57.6", False), ("5.0.0", True), ("5.3.0", True), ("5.4.0", False), ("5.23.0", False)],
)
def test_weights_load_one_by_one_on_transformers_5_0_to_5_3(machine, capsys, version, acts):
    machine({"transformers": version})
    line = f"transformers {version}: HF_DEACTIVATE_ASYNC_LOAD=1, loads weights one by one"
    assert env_shim.apply() == ([line] if acts else [])
    assert capsys.readouterr().out == (f"env_shim: {line}\n" if acts else "")
    assert os.environ.get("HF_DEACTIVATE_ASYNC_LOAD") == ("1" if acts else None)
    assert env_shim.apply() == []
    env_shim.remove()
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


def test_a_variable_the_user_set_is_kept(machine, monkeypatch):
    machine({"transformers": "5.0.0", "torch": "2.9.0"}, gpus=(gpu("T4", 15, 7, 5),))
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "0")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert env_shim.apply() == []
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD")
    assert len(env_shim.apply(verbose=False)) == 1
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "0")  # the user's word after ours
    env_shim.remove()
    assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "0"
    assert "PYTORCH_ALLOC_CONF" not in os.environ


@pytest.mark.parametrize(
    ("torch", "gpus", "cuda_is_up", "acts"),
    [
        ("2.9.0", 1, False, True),
        ("2.13.0+cpu", 1, False, True),
        ("2.9.0", 1, True, False),  # the allocator has read its settings
        ("2.9.0", 0, False, False),
        ("2.8.0", 1, False, False),  # does not read PYTORCH_ALLOC_CONF
    ],
)
def test_cuda_segments_grow_where_cuda_is_not_up(machine, torch, gpus, cuda_is_up, acts):
    machine({"torch": torch}, gpus=(gpu("T4", 15, 7, 5),) * gpus, cuda_is_up=cuda_is_up)
    line = "PYTORCH_ALLOC_CONF=expandable_segments:True, against fragmented GPU memory"
    assert env_shim.apply(verbose=False) == ([line] if acts else [])
    assert os.environ.get("PYTORCH_ALLOC_CONF") == ("expandable_segments:True" if acts else None)
    env_shim.remove()
    assert "PYTORCH_ALLOC_CONF" not in os.environ


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


# ---- what the machine lacks ----------------------------------------------------------------------


def test_supported_versions_are_those_of_requirements_txt():
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    entries = re.findall(r"((?:^#.*\n)+)^([a-z]+)>=([\d.]+)$", text, re.MULTILINE)
    assert {name: oldest for _, name, oldest in entries} == {
        name: oldest for name, (oldest, _) in env_shim.SUPPORTED.items()
    }
    for reason, name, oldest in entries:
        newest = env_shim.SUPPORTED[name][1]
        tried = re.findall(r"[Tt]ried\s+up\s+to\s+([\d.]*\d)", reason.replace("#", " "))
        assert tried == [newest], name
        assert oldest.startswith(re.search(r"(\d[\d.]*): ", reason).group(1)), f"{name}: no reason"
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(entries)


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("2.9", (2, 9, 0)),
        ("2.13.0+cu130", (2, 13, 0)),
        ("5.0.0rc1", (5, 0, 0)),
        ("0.45.1.dev0", (0, 45, 1)),
        ("", (0, 0, 0)),
    ],
)
def test_version_tuple(version, numbers):
    assert env_shim.version_tuple(version) == numbers


def test_check_names_what_is_missing_or_old_and_the_pip_line(machine):
    machine({**NEW_COLAB, "transformers": "4.9.2", "matplotlib": "3.9.9"})
    too_old = '{} {} is older than {}, the oldest supported; run: pip install "{}>={}"'
    assert env_shim.check_environment() == [
        too_old.format("transformers", "4.9.2", "4.57.6", "transformers", "4.57.6"),
        too_old.format("matplotlib", "3.9.9", "3.10.0", "matplotlib", "3.10.0"),
    ]
    machine({name: version for name, version in NEW_COLAB.items() if name != "bitsandbytes"})
    assert env_shim.check_environment() == [
        'bitsandbytes is not installed; run: pip install "bitsandbytes>=0.46.1"'
    ]
    assert env_shim.check_environment(quantization="none") == []
    machine(
        {**NEW_COLAB, "transformers": "6.0.0", "torch": "3.0.0"}
    )  # newer than tried: no problem
    assert env_shim.check_environment() == []


def test_check_asks_torch_for_a_gpu_only_when_cuda_is_asked_for(machine):
    machine(NEW_COLAB)
    line = (
        "device: 'cuda' was asked for but torch sees no CUDA GPU; use device=cpu, "
        "or choose a GPU runtime (Colab: Runtime > Change runtime type)"
    )
    assert env_shim.check_environment("cuda") == [line]
    assert env_shim.check_environment("cpu") == env_shim.check_environment("auto") == []
    machine(NEW_COLAB, gpus=(gpu("Tesla T4", 14.7, 7, 5),))
    assert env_shim.check_environment("cuda") == []


def test_check_sees_a_package_installed_over_an_imported_one(machine, monkeypatch):
    machine(NEW_COLAB)
    stale = types.SimpleNamespace(__version__="4.57.6")
    monkeypatch.setitem(sys.modules, "transformers", stale)
    line = (
        "transformers 5.0.0 is installed but 4.57.6 is already imported; "
        "restart the session (Colab: Runtime > Restart session)"
    )
    assert env_shim.check_environment() == [line]


def test_check_refuses_an_old_python_and_the_file_still_loads_there(machine, monkeypatch):
    machine(NEW_COLAB)
    monkeypatch.setattr(env_shim.platform, "python_version", lambda: "3.9.18")
    assert env_shim.check_environment() == [
        "Python 3.9.18 is older than 3.10, the oldest supported; run with Python 3.10 or newer"
    ]
    # `X | None` outside quotes is a TypeError on 3.9, at import, before the check could speak.
    tree = ast.parse((ROOT / "env_shim.py").read_text(encoding="utf-8"), feature_version=(3, 9))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    hints = [function.returns for function in functions]
    hints += [arg.annotation for function in functions for arg in function.args.args]
    assert len(hints) > 40
    assert not [hint for hint in hints if hint and "BitOr" in ast.dump(hint)]


def test_nothing_heavy_is_imported_by_apply_or_check():
    code = "import sys, env_shim; env_shim.apply(); env_shim.check_environment(); "
    code += f"print(sorted({HEAVY!r} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_pasting_is_silent_and_does_nothing(capsys):
    before, variables = list(sys.meta_path), dict(os.environ)
    cell = {"__name__": "__main__"}
    exec((ROOT / "env_shim.py").read_text(encoding="utf-8"), cell)
    assert capsys.readouterr() == ("", "")
    assert sys.meta_path == before and dict(os.environ) == variables
    assert callable(cell["apply"]) and callable(cell["check_environment"])


# ---- the doctor ----------------------------------------------------------------------------------

T4_IS_OLD = (
    "below 8.0, so float16 with loss scaling "
    "(torch's is_bf16_supported() says True all the same: emulated)"
)


def test_doctor_on_the_old_colab_image(machine, capsys, monkeypatch, tmp_path):
    site = make_site(tmp_path, {}, TRITON)
    monkeypatch.syspath_prepend(str(site))
    t4 = gpu("Tesla T4", 14.74, 7, 5)
    machine({**OLD_COLAB, "triton": "3.5.0"}, colab=True, gpus=(t4,))
    assert env_shim.doctor() == 1
    out, err = capsys.readouterr()
    assert out == (
        "python        3.12.11\n"
        "torch         2.9.0+cu126    supported from 2.9.0, tried up to 2.13.0\n"
        "transformers  4.57.6         supported from 4.57.6, tried up to 5.23.0\n"
        "accelerate    1.12.0         supported from 1.12.0, tried up to 1.15.0\n"
        "bitsandbytes  0.45.0         supported from 0.46.1, tried up to 0.50.2\n"
        "pyyaml        6.0.3          supported from 6.0.1, tried up to 6.0.3\n"
        "matplotlib    3.10.0         supported from 3.10.0, tried up to 3.11.2\n"
        "image         looks like Colab 2026.01\n"
        f"gpu           Tesla T4, 14.7 GiB, compute capability 7.5: {T4_IS_OLD}\n"
        "patched       bitsandbytes 0.45.0, triton 3.5.0: stand-in for triton.ops, "
        "which this bitsandbytes imports\n"
        "patched       bitsandbytes 0.45.0: accelerate may prepare a model with layers on the CPU\n"
        "patched       PYTORCH_ALLOC_CONF=expandable_segments:True, against fragmented GPU memory\n"
        "result        training cannot start\n"
    )
    assert err == (
        "problem       bitsandbytes 0.45.0 is older than 0.46.1, the oldest supported; "
        'run: pip install "bitsandbytes>=0.46.1"\n'
    )


def test_doctor_on_the_new_colab_image(machine, capsys):
    cards = (gpu("Tesla T4", 14.74, 7, 5), gpu("NVIDIA L4", 22.03, 8, 9))
    machine({**NEW_COLAB, "matplotlib": "3.12.0"}, colab=True, gpus=cards)
    assert env_shim.doctor() == 0
    out, err = capsys.readouterr()
    assert out == (
        "python        3.12.11\n"
        "torch         2.9.0+cu126    supported from 2.9.0, tried up to 2.13.0\n"
        "transformers  5.0.0          supported from 4.57.6, tried up to 5.23.0\n"
        "accelerate    1.12.0         supported from 1.12.0, tried up to 1.15.0\n"
        "bitsandbytes  0.49.1         supported from 0.46.1, tried up to 0.50.2\n"
        "pyyaml        6.0.3          supported from 6.0.1, tried up to 6.0.3\n"
        "matplotlib    3.12.0         supported from 3.10.0, tried up to 3.11.2; "
        'newer than tried: if it fails, run: pip install "matplotlib==3.11.2"\n'
        "image         looks like Colab 2026.02\n"
        f"gpu           Tesla T4, 14.7 GiB, compute capability 7.5: {T4_IS_OLD}\n"
        "gpu           NVIDIA L4, 22.0 GiB, compute capability 8.9: bfloat16\n"
        "patched       transformers 5.0.0: HF_DEACTIVATE_ASYNC_LOAD=1, loads weights one by one\n"
        "patched       PYTORCH_ALLOC_CONF=expandable_segments:True, against fragmented GPU memory\n"
        "result        training can start\n"
    )
    assert err == ""


def test_doctor_on_a_plain_machine_without_bitsandbytes(machine, capsys):
    versions = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "accelerate": "1.15.0"}
    machine({**versions, "pyyaml": "6.0.3", "matplotlib": "3.11.2"})
    assert env_shim.doctor() == 1
    out, err = capsys.readouterr()
    assert out == (
        "python        3.12.11\n"
        "torch         2.13.0+cpu     supported from 2.9.0, tried up to 2.13.0\n"
        "transformers  5.23.0         supported from 4.57.6, tried up to 5.23.0\n"
        "accelerate    1.15.0         supported from 1.12.0, tried up to 1.15.0\n"
        "bitsandbytes  -              supported from 0.46.1, tried up to 0.50.2\n"
        "pyyaml        6.0.3          supported from 6.0.1, tried up to 6.0.3\n"
        "matplotlib    3.11.2         supported from 3.10.0, tried up to 3.11.2\n"
        "image         not Colab\n"
        "gpu           none that torch sees; device auto means cpu\n"
        "patched       nothing\n"
        "result        training cannot start\n"
    )
    assert err == (
        'problem       bitsandbytes is not installed; run: pip install "bitsandbytes>=0.46.1"\n'
    )


def test_image_is_unknown_where_its_transformers_is(machine):
    machine({"transformers": "5.23.0"}, colab=True)
    assert env_shim.describe_image() == (
        "Colab, unknown image (none we know has transformers 5.23.0)"
    )


def test_doctor_reports_a_torch_that_does_not_import_in_one_line(tmp_path):
    versions = {name: newest for name, (_, newest) in env_shim.SUPPORTED.items()}
    broken = "raise OSError('libcudart.so.12: cannot open shared object file\\nmore')\n"
    site = make_site(tmp_path, versions, {"torch/__init__.py": broken})
    done = run_with(site, "import sys, env_shim; sys.exit(env_shim.main([]))")
    assert done.returncode == 1
    line = (
        "torch 2.13.0 is installed but does not import (libcudart.so.12: cannot open shared object "
        'file); run: pip install --force-reinstall "torch>=2.9.0"'
    )
    assert done.stderr == f"problem       {line}\n"
    assert "gpu           unknown\n" in done.stdout
    code = "import env_shim; print(*env_shim.check_environment('cuda'), sep='\\n')"
    assert output_with(site, code) == line + "\n"


def test_command_line(machine, capsys):
    machine(NEW_COLAB)
    assert env_shim.main([]) == 0
    assert capsys.readouterr().out.endswith("result        training can start\n")
    script = [sys.executable, str(ROOT / "env_shim.py")]
    for argument, status, text in (("--help", 0, "the doctor"), ("now", 2, "unrecognized")):
        command = [*script, argument]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status and text in done.stdout + done.stderr


# ---- run_matrix.py -------------------------------------------------------------------------------


def test_matrix_takes_its_versions_from_the_one_table():
    oldest, newest = run_matrix.versions_of("oldest"), run_matrix.versions_of("newest")
    assert oldest["transformers"] == "4.57.6" and newest["bitsandbytes"] == "0.50.2"
    assert run_matrix.versions_of("middle") == {**oldest, **run_matrix.MIDDLE}
    assert run_matrix.TORCH == f"torch=={env_shim.SUPPORTED['torch'][1]}"


def test_matrix_installs_once_and_again_after_an_interruption(tmp_path, monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(
        run_matrix.subprocess, "run", lambda command, check: commands.append(command)
    )
    monkeypatch.setattr(run_matrix.venv, "create", lambda folder, with_pip: folder.mkdir())
    folder = tmp_path / "oldest"
    run_matrix.install("oldest", folder)
    assert commands[0][-1] == "torch==2.13.0" and "bitsandbytes==0.46.1" in commands[1]
    run_matrix.install("oldest", folder)
    assert len(commands) == 2
    (folder / "installed.txt").unlink()
    monkeypatch.setattr(run_matrix.venv, "create", lambda folder, with_pip: None)
    run_matrix.install("oldest", folder)
    assert len(commands) == 4


def test_matrix_reports_a_failed_suite_and_a_failed_installation(tmp_path, monkeypatch, capsys):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text(
        "def test_a(): pass\ndef test_b(): assert False\n", encoding="utf-8"
    )
    monkeypatch.setattr(run_matrix, "ROOT", tmp_path)
    monkeypatch.setattr(run_matrix, "python_of", lambda folder: Path(sys.executable))

    def install(name: str, folder: Path) -> None:
        if name == "oldest":
            raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(run_matrix, "install", install)
    assert run_matrix.main(["oldest", "middle", "--venvs", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0] == "| oldest | 2.13.0 | 4.57.6 | 1.12.0 | 0.46.1 | not installed | 0 |"
    assert lines[1].startswith("| middle | 2.13.0 | 5.0.0 | 1.12.0 | 0.49.1 | 1 failed, 1 passed |")
    (tmp_path / "tests" / "test_a.py").write_text("def test_a(): pass\n", encoding="utf-8")
    assert run_matrix.main(["middle", "--venvs", str(tmp_path)]) == 0
    with pytest.raises(SystemExit, match="2"):
        run_matrix.main(["eldest"])
    assert "unknown environment 'eldest', allowed: oldest, middle" in capsys.readouterr().err


# ---- the real packages ---------------------------------------------------------------------------


@pytest.mark.realenv
@pytest.mark.skipif(os.environ.get("WAKE2VEC_REALENV") != "1", reason="needs WAKE2VEC_REALENV=1")
def test_real_bitsandbytes_0_45_0_beside_triton_3_2_imports_only_with_the_shim(tmp_path):
    """Makes an environment of 2.3 GB; 143 s on 2 busy CPU cores (2026-11-22)."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "torch==2.13.0"], check=True)
    packages = ["triton>=3.2", "bitsandbytes==0.45.0", "transformers==4.57.6"]
    subprocess.run([*pip, "torch==2.13.0", *packages], check=True)

    def run(code: str) -> subprocess.CompletedProcess:
        command = [python, "-B", "-c", code]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    ask_transformers = "from transformers.integrations import validate_bnb_backend_availability"
    assert "No module named 'triton.ops'" in run("import bitsandbytes").stderr
    symptom = "Could not import module 'validate_bnb_backend_availability'"
    assert symptom in run(ask_transformers).stderr
    with_shim = f"import env_shim; env_shim.apply(); import bitsandbytes; {ask_transformers}"
    done = run(with_shim + "; print(bitsandbytes.__version__)")
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert re.fullmatch(
        r"env_shim: bitsandbytes 0\.45\.0, triton 3\.\d+\.\d+: stand-in for triton\.ops, which "
        r"this bitsandbytes imports\n0\.45\.0\n",
        done.stdout,
    )
    after_failure = (
        "try:\n    import bitsandbytes\nexcept ModuleNotFoundError:\n    print('failed')\n"
    )
    done = run(after_failure + with_shim.replace("; ", "\n"))
    assert done.returncode == 0 and done.stdout.startswith("failed\n"), done.stderr
