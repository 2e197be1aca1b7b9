"""Proves how a run fits itself to the machine: where the model goes, what is fused and captured,
out-of-memory, and the plan beforehand.

python -m pytest tests/test_fit.py        (CPU; what only a GPU shows is in tests/test_cuda.py)
"""

import contextlib
import dataclasses
import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import (
    FAMILIES, FIRST_NEW_ID, make_model, random_rows, save_model, step_losses, write_words,
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

    def accumulate(batch, overlay, *rest):
        if not seen or seen[-1] is not batch:
            seen.append(batch)

        def one_micro_batch(overlay, x, *rest):
            result = plain(overlay, x, *rest)
            if len(seen) in failing and len(x) > micro_batch_size:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return result

        monkeypatch.setattr(train, "forward_backward", one_micro_batch)
        return real(batch, overlay, *rest)

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
        "step 2: out of GPU memory with micro_batch_size 1 and all layers recomputed; what is saved"
        " is whole: free the GPU, or start over with --fresh and a lower seq_len"
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
        self.captured, self.recomputed, self.prepared = [], None, []
        for name in ("empty_cache", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * train.GIB, 80 * train.GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 18 * train.GIB)
        monkeypatch.setattr(train, "fuse_elementwise", lambda *_: None)
        monkeypatch.setattr(train, "prepare_step", self.prepare_step)
        monkeypatch.setattr(train, "capture", lambda *parts: self.captured.append(parts[1:]))
        monkeypatch.setattr(train, "recompute_layers", self.recompute)

        def peak_bytes(overlay, batch, size, recomputed):
            gib = gib_of(size, 48 - recomputed)
            return gib and gib * train.GIB

        monkeypatch.setattr(train, "peak_bytes", peak_bytes)
        for name in ("restore_rotary", "attend_causally"):
            monkeypatch.setattr(train, name, lambda model: None)
        overlay = SimpleNamespace(
            body=SimpleNamespace(layers=range(48)), model=[None], dtype=torch.bfloat16
        )
        config = settings(tmp_path, effective_batch_size=16, micro_batch_size="auto")
        config = dataclasses.replace(config, **{"max_gpu_gib": 14.0, **changes})
        place = train.Place(0, world, torch.device("cuda", 0), dtype, "")
        self.fit = train.fit_to_machine(overlay, None, config, place)

    def recompute(self, body, num_layers: int) -> None:
        self.recomputed = num_layers

    def prepare_step(self, step: int, *_) -> SimpleNamespace:
        self.prepared.append(step)
        return SimpleNamespace(all_ids=torch.ones(9), x=torch.ones(1, 16))


def test_the_largest_micro_batch_that_fits_and_divides(monkeypatch, tmp_path):
    found = Fitted(monkeypatch, tmp_path, lambda size, kept: 10 + 0.2 * size + 0.1 * kept)
    assert found.fit.micro_batch_size == 16 and found.captured == []
    assert found.prepared == [1, 2]  # in training too the next step's rows lie beside a step's
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


@pytest.mark.parametrize("size, advice", [(1, "lower seq_len"), (4, "set a smaller one, or auto")])
def test_a_card_that_is_too_small(monkeypatch, tmp_path, size, advice):
    with pytest.raises(ConfigError) as error:
        Fitted(monkeypatch, tmp_path, lambda size, kept: None, micro_batch_size=size)
    line = f"the GPU cannot hold micro_batch_size {size} of 16 tokens; {advice}"
    assert str(error.value) == line


# ---- Attention, fused pieces, CUDA graphs --------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_without_a_mask_is_the_same_to_the_bit(monkeypatch, family):
    """In a CUDA graph too, for which the library makes a dense mask; and in generation, which asks
    one token of a cache."""
    model, seen = make_model(family), []
    ids = torch.randint(0, FIRST_NEW_ID, (2, 24), generator=torch.Generator().manual_seed(0))
    wanted = model(input_ids=ids, use_cache=False).logits
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    continued = model.generate(ids[:1], **greedy)
    kind = model.config._attn_implementation
    train.attend_causally(model)
    has_window = getattr(model.config, "sliding_window", None)
    causal = model.config._attn_implementation == "causal_sdpa"
    assert causal == (kind == "sdpa" and not has_window) and causal != family.startswith("gemma")
    assert torch.equal(model.generate(ids[:1], **greedy), continued)
    real = torch.nn.functional.scaled_dot_product_attention

    def attention(*arguments, attn_mask=None, **keywords):
        seen.append(attn_mask)
        return real(*arguments, attn_mask=attn_mask, **keywords)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, wanted)
    assert not causal or seen == [None] * len(model.model.layers)


def compile_as(monkeypatch, change) -> None:
    """torch.compile gives the function itself, its results passed through `change`."""

    def stand_in(function, dynamic):
        def compiled(*arguments):
            outputs = function(*arguments)
            single = not isinstance(outputs, tuple)
            outputs = tuple(map(change, (outputs,) if single else outputs))
            return outputs[0] if single else outputs

        return compiled

    monkeypatch.setattr(torch, "compile", stand_in)


def losses_of(model) -> torch.Tensor:
    ids = torch.arange(24)[None]
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.fixture
def rotary():
    """The function for rotary embedding of Qwen 2, as it was before and is after."""
    modeling = train.restore_rotary(make_model("qwen2_untied"))[0]
    yield lambda: modeling.apply_rotary_pos_emb
    train.restore_rotary(make_model("qwen2_untied"))


def test_fused_pieces_serve_training_alone(monkeypatch, rotary):
    model, used = make_model("qwen2_untied"), []
    compile_as(monkeypatch, lambda output: used.append(1) or output)
    wanted = losses_of(model)
    train.fuse_elementwise(model, torch.float32)
    assert len(used) == 4 and hasattr(rotary(), "eager")  # a norm, a gate, and q and k, once each
    assert torch.equal(losses_of(model), wanted) and len(used) > 4
    used.clear()
    with torch.no_grad():
        assert torch.equal(losses_of(model), wanted) and not used


class BackwardIsWrong(torch.autograd.Function):
    forward = staticmethod(lambda context, x: x.clone())
    backward = staticmethod(lambda context, grad: grad * 1.1)


class BackwardFails(torch.autograd.Function):
    forward = staticmethod(lambda context, x: x.clone())

    @staticmethod
    def backward(context, grad):
        raise RuntimeError("PTXAS error: unsupported sm_75\nmore")


@pytest.mark.parametrize(
    "change, note",
    [
        (lambda x: x * 1.05, "a compiled piece differs by 0.05 of its largest value"),
        (lambda x: x * torch.nan, "a compiled piece differs by nan of its largest"),
        (BackwardIsWrong.apply, "a compiled piece differs by 0.1 of its largest value"),
        (BackwardFails.apply, "PTXAS error: unsupported sm_75"),
        # all pieces are right but the last, which has four dimensions: rotary embedding
        (lambda x: x * 0 + 7 if x.ndim == 4 else x, "a compiled piece differs by"),
    ],
    ids=["wrong", "not a number", "wrong backward", "no backward", "rotary alone"],
)
def test_a_piece_that_is_wrong_leaves_the_model_as_it_was(monkeypatch, rotary, change, note):
    model, fit = make_model("qwen2_untied"), train.Fit(1, 0)
    before = rotary()
    compile_as(monkeypatch, change)
    assert not train.try_to_fuse(fit, SimpleNamespace(model=[model], dtype=torch.float32))
    assert fit.note.startswith(f", not fused: {note}")
    assert rotary() is before
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_pieces_are_proved_in_the_dtype_that_trains(monkeypatch, rotary):
    """The new rows are fp32, and the model's first parameter once the overlay is in."""
    model, seen = make_model("qwen2_untied", torch.bfloat16), set()
    WakeOverlay(model, FIRST_NEW_ID, random_rows(model, 5, 1), random_rows(model, 5, 2)).install()
    compile_as(monkeypatch, lambda output: seen.add(output.dtype) or output)
    fit = train.Fit(1, 0)
    assert train.try_to_fuse(fit, SimpleNamespace(model=[model], dtype=torch.bfloat16))
    assert model.dtype == torch.float32 and seen == {torch.bfloat16}


def test_a_run_without_compile_undoes_what_an_earlier_one_fused(monkeypatch, rotary):
    before = rotary()
    compile_as(monkeypatch, lambda output: output)
    train.fuse_elementwise(make_model("qwen2_untied"), torch.float32)
    assert rotary() is not before
    train.restore_rotary(make_model("qwen2_untied"))  # as fit_to_machine does
    assert rotary() is before


def test_out_of_memory_in_a_capture_ends_it_in_good_order(monkeypatch):
    """Its streams join before the capture's end, and the error comes after it."""
    order = []

    class Stream:
        def __init__(self, name: str):
            self.name = name

        def wait_stream(self, other) -> None:
            order.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def graph(graph, pool):
        yield
        order.append("captured")

    def work() -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main"))
    monkeypatch.setattr(train, "transfer_stream", lambda device: Stream("side"))
    with pytest.raises(torch.OutOfMemoryError):
        train.GraphedPass.record(SimpleNamespace(labels=torch.zeros(1)), None, work)
    assert order == ["side waits for main", "main waits for side", "captured"]


def test_a_capture_that_fails(monkeypatch):
    """Out of memory: the run goes on without graphs. Anything else: nothing can go on there."""

    def graphed(error):
        def raising(*_):
            raise error

        monkeypatch.setattr(train, "GraphedPass", raising)
        fit = train.Fit(1, 0)
        train.capture(fit, None, (1, 2), 1.0)
        return fit

    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for error in (torch.OutOfMemoryError(), RuntimeError("CUDA error: out of memory")):
        fit = graphed(error)
        assert (fit.graph, fit.note) == (None, ", not as CUDA graphs: out of memory")
    with pytest.raises(ConfigError) as error:
        graphed(RuntimeError("operation not permitted\nwhen stream is capturing"))
    assert str(error.value) == (
        "the pass cannot become CUDA graphs; start again, in a notebook after a restart of its"
        " kernel, with compile: false (operation not permitted when stream is capturing)"
    )


def test_nothing_of_a_capture_without_memory_stays(monkeypatch):
    """Its error and frames hold each other, and with them the pass's tensors."""
    held = []

    class Pass:
        def __init__(self, *_):
            tensor = torch.zeros(9)
            held.append(weakref.ref(tensor))
            failed = torch.OutOfMemoryError("CUDA out of memory")
            try:
                raise failed
            finally:
                assert tensor is not None

    alive = []
    monkeypatch.setattr(train, "GraphedPass", Pass)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(held[0]()))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    gc.collect()
    gc.disable()
    try:
        train.capture(train.Fit(1, 0), None, (1, 2), 1.0)
    finally:
        gc.enable()
    assert alive == [None]


def test_out_of_memory_in_an_evaluation_lets_the_graphs_go(tmp_path, monkeypatch, capsys):
    prompts = ["the glimock saw"]
    wanted = settings(tmp_path, run_dir=str(tmp_path / "undisturbed"), prompts=prompts)
    train.train(wanted)
    real, seen = train.sample, []

    def sample(*parts):
        seen.append(1)
        if len(seen) == 1:
            raise torch.OutOfMemoryError
        return real(*parts)

    def fit_to_machine(*parts):
        fit = fitted(*parts)
        fit.graph = lambda x, y, base_embeds, after_loss: 1 / 0  # is never to run
        return fit

    fitted = train.fit_to_machine
    monkeypatch.setattr(train, "sample", sample)
    monkeypatch.setattr(train, "fit_to_machine", fit_to_machine)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    config = settings(tmp_path, prompts=prompts)
    assert train.train(config)["step"] == 6
    lines = [line for line in capsys.readouterr().out.splitlines() if "out of GPU memory" in line]
    assert lines == [
        "step 0: out of GPU memory in the evaluation; it is repeated, and the run goes on, without"
        " CUDA graphs"
    ]
    records = Path(config.run_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(records) == len(
        {json.dumps([json.loads(r)[k] for k in ("step", "kind")]) for r in records}
    )
    assert step_losses(Path(config.run_dir)) == step_losses(Path(wanted.run_dir))


def test_out_of_memory_elsewhere_is_one_line(tmp_path, monkeypatch):
    def update(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(train.Optimizer, "update", update)
    with pytest.raises(ConfigError) as error:
        train.train(settings(tmp_path))
    assert str(error.value) == (
        "out of GPU memory; what is saved is whole: free the GPU, or continue with a smaller"
        " micro_batch_size (CUDA out of memory. Tried to allocate 2 GiB)"
    )


def test_the_next_step_is_prepared_once_before_the_last_backward(monkeypatch):
    """So that a GPU still has the forward pass to work off."""
    model, order = make_model("qwen2_untied"), []
    overlay = WakeOverlay(model, FIRST_NEW_ID, random_rows(model, 5, 1), random_rows(model, 5, 2))
    x = torch.randint(0, FIRST_NEW_ID + 5, (6, 8), generator=torch.Generator().manual_seed(0))
    batch = train.StepBatch(x, x, overlay.base_embed(x), x, torch.arange(6))
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a: order.append("backward") or real(*a))
    place = train.Place(0, 1, torch.device("cpu"), torch.float32, "")
    train.accumulate(
        batch, overlay, place, train.Fit(2, 0), train.LossScale(), lambda: order.append("next")
    )
    assert order == ["backward", "backward", "next", "backward"]


# ---- Where it runs -------------------------------------------------------------------------------


def on_a_card(monkeypatch, config: Config, **environment: str) -> tuple[train.Place, list[float]]:
    """find_place on a machine that has one GPU of 80 GiB; and the shares of it set as a limit."""
    limits = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name, value in {
        "is_available": True, "device_count": 1, "set_device": None,
        "get_device_capability": (9, 0),
        "get_device_properties": SimpleNamespace(total_memory=80 * train.GIB),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: limits.append(share)
    )
    return train.find_place(config), limits


@pytest.mark.parametrize("max_gpu_gib, share", [(20.0, 0.25), (90.0, 1.0), (None, 1.0)])
def test_a_cap_is_of_its_own_run_alone(tmp_path, monkeypatch, max_gpu_gib, share):
    config = settings(tmp_path, device="auto", max_gpu_gib=max_gpu_gib)
    place, limits = on_a_card(monkeypatch, config)
    assert (place.device, place.dtype) == (torch.device("cuda", 0), torch.bfloat16)
    assert limits == [share]


def test_more_processes_than_cards(tmp_path, monkeypatch):
    with pytest.raises(ConfigError) as error:
        on_a_card(
            monkeypatch, settings(tmp_path, device="auto"), RANK="1", WORLD_SIZE="2", LOCAL_RANK="1"
        )
    assert str(error.value) == (
        "process 1 ends: this machine has 1 GPU(s), and each process needs its own; start no more"
    )


# ---- The plan ------------------------------------------------------------------------------------

QWEN_14B = {
    "model_type": "qwen2", "hidden_size": 5120, "num_hidden_layers": 48, "vocab_size": 152_064,
    "num_attention_heads": 40, "num_key_value_heads": 8, "intermediate_size": 13_824,
    "tie_word_embeddings": False,
}  # fmt: skip


def planned(**settings) -> Config:
    return Config(model_name="-", lexicon="-", corpus="-", run_dir="-", **settings)


@pytest.mark.parametrize("micro, seq_len, measured", [(16, 128, 11.23), (8, 512, 11.66)])
def test_the_plan_is_within_eight_percent_of_what_was_measured(micro, seq_len, measured):
    """On an H100, all layers recomputed (README, "Speed and memory")."""
    config = planned(seq_len=seq_len, effective_batch_size=micro)
    assert train.memory_plan(QWEN_14B, 44_223, config, micro)["total"] == pytest.approx(
        measured, rel=0.08
    )


def test_the_plan_counts_what_the_config_changes():
    def plan(shape=QWEN_14B, **changes):
        config = planned(seq_len=128, effective_batch_size=16, **changes)
        return train.memory_plan(shape, 44_223, config, 16)

    half, full = plan(), plan(compute_dtype="float32")
    for name in ("base head rows", "base rows of two steps", "activations"):
        assert full[name] == 2 * half[name], name
    rows, inputs, table = 44_223 * 5120 * 4, 48 * 2048 * 5120 * 2, 152_064 * 5120 * 2
    assert rows < inputs < train.GIB  # so that each is pinned as one GiB
    assert half["host memory"] == 3 + table / train.GIB
    gemma = {name: value for name, value in QWEN_14B.items() if name != "tie_word_embeddings"}
    assert plan(gemma | {"model_type": "gemma2"})["new rows"] == half["new rows"] / 2
    assert plan(gemma)["new rows"] == half["new rows"]


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
