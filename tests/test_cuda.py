"""What only a CUDA GPU shows: memory, fused work, CUDA graphs, float16, two cards. Else skipped.

    python -m pytest tests/test_cuda.py

GPU kernels add in an order of their own, so runs are compared within a tolerance.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from bench_14b import CardInputs
from tiny_models import save_folder, step_losses, write_words
from transformers import Qwen2Config, Qwen2ForCausalLM

import train
from extend_tokenizer import Config
from overlay import chunked_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
ROOT = Path(__file__).resolve().parent.parent
SHAPE = {
    "vocab_size": 264, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> dict:
    """Settings of a short run: a random Qwen2 of 27 million weights, large enough to fill MiB."""
    folder = tmp_path_factory.mktemp("cuda")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    return {
        "model_name": str(save_folder(model, folder / "model")), **write_words(folder),
        "device": "cuda", "seq_len": 64, "effective_batch_size": 32, "max_steps": 8,
        "learning_rate": 0.01, "log_every": 1, "eval_every": 8, "save_every": 4,
        "snapshot_every": 4, "prompts": ["the glimock saw"],
    }  # fmt: skip


@pytest.fixture(autouse=True)
def whole_card():
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def run(values: dict, run_dir: Path, **changes) -> list[float]:
    train.train(Config(**{**values, "run_dir": str(run_dir), **changes}))
    return step_losses(run_dir)


@pytest.fixture(scope="module")
def eager(values, tmp_path_factory) -> list[float]:
    """Losses without fused work, CUDA graphs or recomputed layers, in one micro-batch."""
    folder = tmp_path_factory.mktemp("eager")
    return run(values, folder, compile="false", gradient_checkpointing="false")


@pytest.mark.parametrize(
    "changes",
    [
        {"compile": "false", "gradient_checkpointing": "true"},
        {"gradient_checkpointing": "true"},
        {"micro_batch_size": 8},
        {"compute_dtype": "float16"},
        {},
    ],
    ids=str,
)
def test_every_way_to_run_a_step_gives_the_same_losses(values, eager, tmp_path, capsys, changes):
    found = run(values, tmp_path / "run", **changes)
    assert found == pytest.approx(eager, rel=5e-3)
    says = capsys.readouterr().out
    assert ("as CUDA graphs" in says) == (
        "compute_dtype" not in changes and "compile" not in changes
    )
    assert (", fused" in says) == ("compile" not in changes)
    recomputed = 6 if changes.get("gradient_checkpointing") == "true" else 0
    assert f"{recomputed} of 6 layers recomputed" in says


def test_out_of_memory_in_mid_run_halves_the_micro_batch(
    values, eager, tmp_path, monkeypatch, capsys
):
    """A real one: after three steps the allocator may take half of what a step takes."""
    real, steps = train.accumulate, []

    def accumulate(batch, *rest):
        if not steps or steps[-1] is not batch:
            steps.append(batch)
            if len(steps) == 2:
                torch.cuda.reset_peak_memory_stats()
            if len(steps) == 4:
                torch.cuda.empty_cache()
                stays, most = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
                limit = torch.cuda.memory_reserved() + (most - stays) // 2
                total = torch.cuda.get_device_properties(0).total_memory
                torch.cuda.set_per_process_memory_fraction(limit / total)
        return real(batch, *rest)

    monkeypatch.setattr(train, "accumulate", accumulate)
    found = run(values, tmp_path / "run", compile="false", gradient_checkpointing="false")
    assert found == pytest.approx(eager, rel=5e-3)
    assert "step 4: out of GPU memory; the step is repeated with micro_batch_size 16" in (
        capsys.readouterr().out
    )


def test_out_of_memory_in_a_capture_leaves_a_run_without_graphs(
    values, eager, tmp_path, monkeypatch, capsys
):
    """In the midst of a backward pass, with a layer's input on its way."""
    real, passes = train.HostInputs.take, []

    def take(inputs, number):
        hidden_states = real(inputs, number)
        if torch.cuda.is_current_stream_capturing() and number == 3:
            passes.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden_states

    monkeypatch.setattr(train.HostInputs, "take", take)
    found = run(values, tmp_path / "run", gradient_checkpointing="true")
    assert found == pytest.approx(eager, rel=5e-3) and len(passes) == 1
    assert ", fused, not as CUDA graphs: out of memory" in capsys.readouterr().out


def test_inputs_of_recomputed_layers_leave_the_card(values):
    """Six layers' inputs, 64 x 128 x 512 bf16: 8 MiB each; five of them are elsewhere."""
    config = Config(**{**values, "run_dir": "-", "quantization": "none"})
    place = train.find_place(config)
    model = train.load_model(config, place)
    found = []
    for inputs in (CardInputs, train.HostInputs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "HostInputs", inputs)
            train.recompute_layers(model.model, 6)
        embeds = torch.randn(64, 128, 512, device="cuda", dtype=place.dtype, generator=seeded())
        embeds.requires_grad_()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        hidden_states = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        kept_mib = (torch.cuda.memory_allocated() - before) / 2**20
        (grad,) = torch.autograd.grad(hidden_states.float().square().mean(), embeds)
        found.append((kept_mib, grad.float()))
    assert found[0][0] - found[1][0] > 4.5 * 8
    difference = (found[0][1] - found[1][1]).abs().max() / found[0][1].abs().max()
    assert difference < 1e-2


def seeded() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_input_table_never_comes_to_the_card(values, quantization):
    config = Config(**{**values, "run_dir": "-", "quantization": quantization})
    model = train.load_model(config, train.find_place(config))
    assert model.get_input_embeddings().weight.device.type == "cpu"
    assert model.lm_head.weight.device.type == "cuda"
    assert {p.device.type for p in model.model.layers.parameters()} == {"cuda"}
    assert not [m for m in model.modules() if hasattr(m, "_hf_hook")]
    quantized = type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert quantized == (quantization == "nf4")


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_the_chunked_loss_against_float64(dtype, tolerance):
    make = {"device": "cuda", "generator": seeded()}
    hidden = torch.randn(600, 256, **make).to(dtype)
    base, new = (torch.randn(n, 256, **make).mul_(0.1) for n in (5000, 700))
    base, labels = base.to(dtype), torch.randint(5700, (600,), **make)
    labels[::50] = -100
    grad_rows = torch.zeros_like(new)
    found = chunked_cross_entropy(hidden, labels, base, 5000, new, grad_rows, 1 / 600)
    exact = hidden.double().requires_grad_(), new.double().requires_grad_()
    logits = torch.cat([exact[0] @ base.double().T, exact[0] @ exact[1].T], dim=1)
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    (wanted.sum() / 600).backward()
    for ours, theirs in zip((*found, grad_rows), (wanted, exact[0].grad, exact[1].grad)):
        assert (ours - theirs).abs().max() / theirs.abs().max() < tolerance


def test_a_stopped_run_continues(values, eager, tmp_path):
    values = {**values, "compile": "false", "gradient_checkpointing": "false"}
    run_dir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "step_line", stop_after_four)
        assert train.train(Config(**values, run_dir=str(run_dir)))["stopped"] == "SIGTERM"
    assert train.train(Config(**values, run_dir=str(run_dir)))["step"] == 8
    assert step_losses(run_dir) == pytest.approx(eager, rel=5e-3)


def stop_after_four(record: dict, _run, line=train.step_line) -> str:
    if record["step"] == 4:
        os.kill(os.getpid(), 15)
    return line(record, _run)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_two_cards_take_the_same_steps(values, eager, tmp_path):
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump({**values, "run_dir": str(tmp_path / "run")}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"]
    subprocess.run([*command, str(config)], cwd=ROOT, check=True)
    assert step_losses(tmp_path / "run") == pytest.approx(eager, rel=5e-3)
