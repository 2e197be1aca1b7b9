"""Proves how a run fits itself to the machine: where the model goes, and running out of GPU memory.

python -m pytest tests/test_fit.py        (CPU; what only a GPU shows is in tests/test_cuda.py)
"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import (
    FIRST_NEW_ID, make_model, random_rows, save_model, step_losses, write_words,
)  # fmt: skip

import train
from extend_tokenizer import Config, ConfigError
from overlay import WakeOverlay

CARD = train.Place(0, 1, torch.device("cuda", 0), torch.bfloat16, "")


def settings(folder: Path, family: str = "qwen2_untied", **changes) -> Config:
    values = {
        "model_name": str(save_model(family, folder / "model")), **write_words(folder),
        "run_dir": str(folder / "run"), "quantization": "none", "device": "cpu", "seq_len": 16,
        "effective_batch_size": 4, "micro_batch_size": 4, "max_steps": 6, "learning_rate": 0.01,
        "log_every": 1, "eval_every": 6, "save_every": 6, "snapshot_every": 6,
    }  # fmt: skip
    return Config(**{**values, **changes})


@pytest.mark.parametrize("family", ["qwen2_untied", "phi3"])
def test_an_untied_input_table_stays_off_the_card(tmp_path, family):
    device_map = train.placement(settings(tmp_path, family), CARD)
    assert device_map.pop("model.embed_tokens") == "cpu"
    assert device_map == dict.fromkeys(
        ["lm_head", "model.layers", "model.norm", "model.rotary_emb"], "cuda:0"
    )


def test_a_tied_table_and_a_cpu_need_no_such_map(tmp_path):
    config = settings(tmp_path, "qwen2_tied")
    assert train.placement(config, CARD) == {"": "cuda:0"}
    cpu = train.Place(0, 1, torch.device("cpu"), torch.float32, "")
    assert train.placement(settings(tmp_path), cpu) == {"": "cpu"}


def test_a_checkpoint_stored_in_four_bits_goes_to_the_card_whole(tmp_path):
    """The library refuses a module on the CPU unless the checkpoint's own settings allow it."""
    config = settings(tmp_path)
    path = Path(config.model_name) / "config.json"
    shape = json.loads(path.read_text(encoding="utf-8"))
    shape["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(shape), encoding="utf-8")
    assert train.placement(config, CARD) == {"": "cuda:0"}


def out_of_memory_at(monkeypatch, failing: set[int], micro_batch_size: int) -> None:
    """Steps of these numbers run out of memory after a micro-batch, where micro-batches are larger
    than micro_batch_size."""
    plain, real, seen = train.forward_backward, train.accumulate, []

    def accumulate(batch, overlay, config, place, fit, loss_scale):
        if not seen or seen[-1] is not batch:
            seen.append(batch)

        def one_micro_batch(overlay, x, *rest):
            result = plain(overlay, x, *rest)
            if len(seen) in failing and len(x) > micro_batch_size:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return result

        monkeypatch.setattr(train, "forward_backward", one_micro_batch)
        return real(batch, overlay, config, place, fit, loss_scale)

    monkeypatch.setattr(train, "accumulate", accumulate)


def test_out_of_memory_halves_the_micro_batch_and_repeats_the_step(tmp_path, monkeypatch, capsys):
    wanted = settings(tmp_path, micro_batch_size=1, run_dir=str(tmp_path / "undisturbed"))
    train.train(wanted)
    config = settings(tmp_path)
    out_of_memory_at(monkeypatch, {3}, 1)
    assert train.train(config)["step"] == 6
    lines = [line for line in capsys.readouterr().out.splitlines() if "out of GPU memory" in line]
    assert lines == [
        f"step 3: out of GPU memory; the step is repeated with micro_batch_size {size} and all"
        " layers recomputed"
        for size in (2, 1)
    ]
    undisturbed = step_losses(Path(wanted.run_dir))
    assert step_losses(Path(config.run_dir)) == pytest.approx(undisturbed, rel=1e-5)


def test_out_of_memory_with_single_sequences_ends_the_run(tmp_path, monkeypatch, capsys):
    out_of_memory_at(monkeypatch, {2}, 0)
    with pytest.raises(ConfigError) as error:
        train.train(settings(tmp_path, micro_batch_size=1))
    assert str(error.value) == (
        "step 2: out of GPU memory with micro_batch_size 1 and all layers recomputed; the last"
        " sentry is good: lower seq_len, or free the GPU"
    )
    assert capsys.readouterr().out.count("repeated with micro_batch_size 1 and all layers") == 1


def test_layer_inputs_come_back_each_to_its_layer_and_never_from_a_pass_before():
    inputs = train.HostInputs(3, torch.device("cpu"))
    first, second = torch.randn(2, 3, 1, 4, 8)
    for number, hidden_states in enumerate(first):
        inputs.put(number, hidden_states)
    assert torch.equal(inputs.take(2), first[2])  # layer 1's is on its way, and is not waited
    for number, hidden_states in enumerate(second):  # for: the pass ran out of memory
        inputs.put(number, hidden_states)
    found = [inputs.take(number) for number in (2, 1, 0)]
    assert torch.equal(torch.stack(found[::-1]), second)
    assert all(tensor.requires_grad and tensor.is_leaf for tensor in found)
    assert not inputs.arriving


@pytest.mark.parametrize(
    "gib_of_kept, limit, wanted",
    [
        (lambda kept: 10 + 0.2 * kept, 12.9, 14),
        (lambda kept: 10 + 0.2 * kept, 30.0, 48),  # all of them
        (lambda kept: 10 + 0.2 * kept, 10.1, 0),
        (lambda kept: 10 + (0.2 if kept <= 4 else 0.25) * kept, 12.9, 11),  # 14, 13, 12 do not fit
        (lambda kept: 10 + 0.2 * kept if kept <= 6 else None, 12.9, 6),  # out of memory above 6
        (lambda kept: 10 if kept == 0 else None, 12.9, 0),
    ],
)
def test_as_many_layers_keep_their_activations_as_fit(gib_of_kept, limit, wanted):
    def peak_of(recomputed: int) -> float | None:
        gib = gib_of_kept(48 - recomputed)
        return gib and gib * train.GIB

    assert train.kept_layers(peak_of, 10 * train.GIB, 48, limit * train.GIB) == wanted


class Fitted:
    """fit_to_machine on a card of which only the peaks are told: GiB of (micro-batch, layers that
    keep their activations), None where it runs out of memory."""

    def __init__(self, monkeypatch, tmp_path, gib_of, dtype=torch.bfloat16, world=1, **changes):
        self.captured, self.recomputed = [], None
        for name in ("empty_cache", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * train.GIB, 80 * train.GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 18 * train.GIB)
        monkeypatch.setattr(train, "fuse_elementwise", lambda model: None)
        monkeypatch.setattr(
            train, "prepare_step", lambda *_: SimpleNamespace(all_ids=torch.ones(9))
        )
        monkeypatch.setattr(train, "capture", lambda *parts: self.captured.append(parts[1:]))
        monkeypatch.setattr(train, "recompute_layers", self.recompute)

        def peak_bytes(overlay, batch, size, recomputed):
            gib = gib_of(size, 48 - recomputed)
            return gib and gib * train.GIB

        monkeypatch.setattr(train, "peak_bytes", peak_bytes)
        overlay = SimpleNamespace(body=SimpleNamespace(layers=range(48)), model=[None])
        config = settings(tmp_path, effective_batch_size=16, micro_batch_size="auto")
        config = dataclasses.replace(config, **{"max_gpu_gib": 14.0, **changes})
        place = train.Place(0, world, torch.device("cuda", 0), dtype, "")
        self.fit = train.fit_to_machine(overlay, None, config, place)

    def recompute(self, body, num_layers: int) -> None:
        self.recomputed = num_layers


def test_the_largest_micro_batch_that_fits_and_divides(monkeypatch, tmp_path):
    found = Fitted(monkeypatch, tmp_path, lambda size, kept: 10 + 0.2 * size + 0.1 * kept)
    assert found.fit.micro_batch_size == 16 and found.captured == []
    assert found.fit.note == ", fused, not as CUDA graphs: they would need 1.2 GiB more"
    assert found.fit.recomputed == found.recomputed == 45  # 13.2 + 3 x 0.1 of 14.0 less 0.5


def test_a_micro_batch_that_does_not_fit_is_passed_over(monkeypatch, tmp_path):
    peaks = {16: None, 8: 11.6}
    found = Fitted(
        monkeypatch, tmp_path, lambda size, kept: peaks[size] and peaks[size] + kept / 10
    )
    assert found.fit.micro_batch_size == 8 and found.fit.note == ", fused"
    assert found.captured[0][1:] == ((8, 16), 1 / 9)
    assert found.fit.recomputed == 36  # 11.6 + 12 x 0.1 of 14.0 less 1.2


@pytest.mark.parametrize(
    "changes, micro_batch_size, recomputed, note, graphs",
    [
        ({"max_gpu_gib": None}, 16, 0, ", fused", 1),  # all of the card, 78 GiB
        ({"gradient_checkpointing": "true"}, 16, 48, ", fused", 1),
        ({"gradient_checkpointing": "false"}, 16, 0, ", fused", 0),
        ({"compile": "false"}, 16, 42, "", 0),
        ({"dtype": torch.float16}, 16, 42, ", fused", 0),
        ({"world": 2}, 8, 44, ", fused", 1),
        ({"micro_batch_size": 4, "world": 8}, 2, 44, ", fused", 1),  # a share is 2 sequences
    ],
    ids=str,
)
def test_what_the_config_says_of_a_step(
    monkeypatch, tmp_path, changes, micro_batch_size, recomputed, note, graphs
):
    found = Fitted(monkeypatch, tmp_path, lambda size, kept: 11.5 + 0.3 * kept, **changes)
    if changes.get("gradient_checkpointing") == "false":
        note = ", fused, not as CUDA graphs: they would need 1.2 GiB more"  # 25.9 GiB told
    assert (found.fit.micro_batch_size, found.fit.recomputed) == (micro_batch_size, recomputed)
    assert (found.fit.note, len(found.captured), found.recomputed) == (note, graphs, recomputed)


def test_a_card_that_is_too_small(monkeypatch, tmp_path):
    with pytest.raises(ConfigError) as error:
        Fitted(monkeypatch, tmp_path, lambda size, kept: None)
    line = "the GPU cannot hold micro_batch_size 1 of 16 tokens; lower seq_len"
    assert str(error.value) == line


def test_the_peak_is_that_of_a_real_pass(monkeypatch):
    model = make_model("qwen2_untied")
    overlay = WakeOverlay(model, FIRST_NEW_ID, random_rows(model, 5, 1), random_rows(model, 5, 2))
    x = torch.randint(0, FIRST_NEW_ID + 5, (4, 8), generator=torch.Generator().manual_seed(0))
    batch = train.StepBatch(x, x, overlay.base_embed(x), x, torch.arange(4))
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    seen, real = [], train.forward_backward

    def seeing(overlay, x, *rest):
        seen.append((len(x), sum("forward" in layer.__dict__ for layer in model.model.layers)))
        return real(overlay, x, *rest)

    monkeypatch.setattr(train, "forward_backward", seeing)
    assert train.peak_bytes(overlay, batch, 2, 1) == 123 and seen == [(2, 1)]
    assert not overlay.output_grad.any() and not overlay.input_grad.any()  # its scale is 0

    def out_of_memory(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train, "forward_backward", out_of_memory)
    assert train.peak_bytes(overlay, batch, 4, 2) is None
