"""Proves what only a CUDA GPU shows: memory, fused pieces, CUDA graphs, float16, two cards.

    python -m pytest tests/test_cuda.py     (without a GPU all of it is skipped)

GPU kernels add in an order of their own, so runs are compared within a tolerance.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import save_folder, step_losses, tiny_settings
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

import machine
import train
from config import Config
from extend_tokenizer import plan_new_words, read_corpus
from overlay import LossScale, chunked_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
ROOT = Path(__file__).resolve().parent.parent
NUM_LAYERS = 6
SHAPE = {
    "vocab_size": 264, "hidden_size": 512, "intermediate_size": 2048,
    "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 8, "num_key_value_heads": 2,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
KEEP_ALL = {"compile": "false", "gradient_checkpointing": "false"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """Give the settings of a short run: a random Qwen2 of 23 million weights, which fill MiB."""
    folder = tmp_path_factory.mktemp("cuda")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    return tiny_settings(
        folder, model_name=str(save_folder(model, folder / "large")), device="cuda",
        quantization="nf4", seq_len=64, effective_batch_size=32, micro_batch_size="auto",
        eval_every=8, save_every=4, prompts=["the glimock saw"],
    )  # fmt: skip


@pytest.fixture(autouse=True)
def whole_card():
    """Let the next test have all of the card, whatever this one capped or kept."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    machine.free_cached_memory()


def run(settings: dict, run_dir: Path, **changes) -> list[float]:
    train.train(Config(**{**settings, "run_dir": str(run_dir), **changes}))
    return step_losses(run_dir)


@pytest.fixture(scope="module")
def eager(settings, tmp_path_factory) -> list[float]:
    """Give the losses without fused pieces, graphs or recomputed layers, in one micro-batch."""
    return run(settings, tmp_path_factory.mktemp("eager"), **KEEP_ALL)


@pytest.mark.parametrize(
    "changes, num_recomputed, remarks",
    [
        ({}, 0, "fused, as CUDA graphs"),
        ({"gradient_checkpointing": "true"}, NUM_LAYERS, "fused, as CUDA graphs"),
        ({"gradient_checkpointing": "false"}, 0, "fused, as CUDA graphs"),
        ({"micro_batch_size": 8}, 0, "fused, as CUDA graphs"),
        ({"compute_dtype": "float16"}, 0, "fused"),
        ({"compile": "false", "gradient_checkpointing": "true"}, NUM_LAYERS, ""),
    ],
    ids=str,
)
def test_every_way_to_run_a_step_gives_the_same_losses(
    settings, eager, tmp_path, capsys, changes, num_recomputed, remarks
):
    found = run(settings, tmp_path / "run", **changes)
    assert found == pytest.approx(eager, rel=5e-3)
    said = f"{num_recomputed} of {NUM_LAYERS} layers recomputed"
    said += f", {remarks}\n" if remarks else "\n"
    assert said in capsys.readouterr().out


def test_out_of_memory_in_mid_run_halves_the_micro_batch(
    settings, eager, tmp_path, monkeypatch, capsys
):
    """Memory really runs out: from step 4 on the allocator may take half of what a step takes."""
    real, steps = machine.accumulate, []

    def accumulate(plan, batch, *rest):
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
        return real(plan, batch, *rest)

    monkeypatch.setattr(machine, "accumulate", accumulate)
    found = run(settings, tmp_path / "run", **KEEP_ALL)
    assert found == pytest.approx(eager, rel=5e-3)
    line = "step 4: out of GPU memory; repeated with micro_batch_size 16 and all layers recomputed"
    assert line in capsys.readouterr().out


def test_out_of_memory_in_a_capture_leaves_a_run_without_graphs(
    settings, eager, tmp_path, monkeypatch, capsys
):
    """Memory runs out in the midst of a backward pass, while its third layer is recomputed."""
    real, captured = Qwen2DecoderLayer.forward, []

    @functools.wraps(real)
    def forward(*arguments, **keywords):
        if torch.cuda.is_current_stream_capturing():
            captured.append(1)
            if len(captured) == NUM_LAYERS + 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*arguments, **keywords)

    monkeypatch.setattr(Qwen2DecoderLayer, "forward", forward)
    found = run(settings, tmp_path / "run", gradient_checkpointing="true")
    assert found == pytest.approx(eager, rel=5e-3) and len(captured) == NUM_LAYERS + 3
    assert ", fused, not as CUDA graphs: out of memory\n" in capsys.readouterr().out


def seeded() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


def test_a_recomputed_layer_keeps_little_more_than_its_input(settings):
    """Six inputs of 64 x 128 x 512 in bfloat16 are 48 MiB. Without recomputing a layer keeps about
    160 MiB (by arithmetic)."""
    config = Config(**{**settings, "run_dir": "-", "quantization": "none"})
    body = train.load_model(config, machine.find_worker(config)).model
    shape = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    kept_bytes, grads = [], []
    for num_recomputed in (0, NUM_LAYERS):
        machine.recompute_layers(body.layers, num_recomputed)
        embeds = torch.randn(64, 128, 512, generator=seeded(), **shape)
        before = torch.cuda.memory_allocated()
        hidden_states = body(inputs_embeds=embeds, use_cache=False).last_hidden_state
        kept_bytes.append(torch.cuda.memory_allocated() - before)
        loss = hidden_states.float().square().mean()
        grads.append(torch.autograd.grad(loss, embeds)[0].float())
        del hidden_states, loss
    assert kept_bytes[1] < kept_bytes[0] / 4
    assert (grads[0] - grads[1]).abs().max() < 1e-2 * grads[0].abs().max()


def bits_of_a_pass(overlay, run_pass, x) -> list[torch.Tensor]:
    """Run a pass twice -> the second one's losses, and its gradients before they are added up."""
    grads, inputs = [], (x, x, overlay.base_embed(x.cpu()))
    overlay.add_input_gradient = lambda ids, grad: grads.append(grad.clone())
    losses = [run_pass(overlay, *inputs, 1 / x.numel(), LossScale()).clone() for _ in range(2)]
    return [losses[1], grads[1], overlay.grad.clone()]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_activations_come_back_from_the_host_bit_by_bit(settings, quantization, dtype):
    """Layers 0, 2 and 4 of six park theirs, and the others are recomputed, eager and in graphs."""
    changes = {"run_dir": "-", "quantization": quantization, "compute_dtype": dtype}
    config = Config(**{**settings, **changes})
    words = plan_new_words(config, read_corpus(config))
    overlay = train.build_overlay(config, machine.find_worker(config), words, continuing=False)
    machine.attend_causally(overlay.model)
    x = torch.randint(256, (64, 128), device="cuda", generator=seeded())
    parking = machine.Parking(overlay, (2.0**29, 2.0**28, 2.0**28 * 1.5), 2.0**40)
    assert parking.takes(NUM_LAYERS) == 3
    found, peaks = [], []
    for num_layers, waiting in ((0, None), (NUM_LAYERS, None), (NUM_LAYERS, parking)):
        machine.recompute_layers(overlay.layers, num_layers, waiting)
        overlay.begin_step(x.cpu())
        torch.cuda.reset_peak_memory_stats()
        found.append(bits_of_a_pass(overlay, machine.forward_backward, x))
        peaks.append(torch.cuda.max_memory_allocated())
    assert [len(layer.on_host) > 1 for layer in parking.layers] == [True, False] * 3
    assert max(peaks[1:]) < peaks[0]
    overlay.begin_step(x.cpu())
    graph = machine.GraphedPass(overlay, tuple(x.shape), 1 / x.numel())
    overlay.begin_step(x.cpu())
    found.append(bits_of_a_pass(overlay, graph, x))
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_input_table_waits_on_the_host_and_all_else_is_on_the_card(settings, quantization):
    config = Config(**{**settings, "run_dir": "-", "quantization": quantization})
    words = plan_new_words(config, read_corpus(config))
    overlay = train.build_overlay(config, machine.find_worker(config), words, continuing=False)
    assert overlay.embedding.weight.device.type == "cpu"
    weights = [overlay.head.weight, overlay.input_rows, overlay.output_rows]
    weights += overlay.layers.parameters()
    assert {weight.device.type for weight in weights} == {"cuda"}
    assert not [m for m in overlay.model.modules() if hasattr(m, "_hf_hook")]
    quantized = type(overlay.layers[0].mlp.up_proj).__name__ == "Linear4bit"
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


def stop_after_four(record: dict, _run, line=train.step_line) -> str:
    if record["step"] == 4:
        os.kill(os.getpid(), 15)
    return line(record, _run)


def test_a_stopped_run_continues(settings, eager, tmp_path, monkeypatch):
    config = Config(**{**settings, **KEEP_ALL, "run_dir": str(tmp_path / "run")})
    with monkeypatch.context() as patch:
        patch.setattr(train, "step_line", stop_after_four)
        assert train.train(config)["stopped"] == "SIGTERM"
    assert train.train(config)["step"] == 8
    assert step_losses(tmp_path / "run") == pytest.approx(eager, rel=5e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_two_cards_take_the_same_steps(settings, eager, tmp_path):
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump({**settings, "run_dir": str(tmp_path / "run")}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"]
    subprocess.run([*command, str(config)], cwd=ROOT, check=True)
    assert step_losses(tmp_path / "run") == pytest.approx(eager, rel=5e-3)
