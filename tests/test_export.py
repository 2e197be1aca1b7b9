"""What leaves the project loads elsewhere: exports against the overlay's own logits; refusals.

    python -m pytest tests/test_export.py

Every case has a tiny random model, a real extended tokenizer and a sentry of random rows. The
reference is the base model with the overlay installed, read from its own folder.
"""

import base64
import dataclasses
import importlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, make_model, random_rows, save_model
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import recover
from config import Config, UserError, run_command
from extend_tokenizer import extend, new_words_hash, read_corpus, save_new_words
from overlay import WakeOverlay, is_tied, spherical_rows, subtoken_mean
from recover import main, write_sentry

WORDS = ["riverrun", "bababad", "quark", "phizàphiz", "thunderwhist", "gnarlybird", "wassaily"]
TEXTS = [
    f"the {a} and a {b} went past" for a in WORDS[:5] for b in ("quark", "stone")
]  # ten texts, with and without a second new word
EVAL = {
    "kind": "eval", "step": 40, "val_loss": 4.5, "val_bits_per_byte": 1.75,
    "base_bits_per_byte": 2.25, "uniform_loss": 5.6, "warnings": [],
}  # fmt: skip


def make_run(
    folder: Path,
    family: str = "qwen2_untied",
    dtype: torch.dtype = torch.float32,
    separate: bool | None = None,
    **settings,
) -> Path:
    """A run folder as train.py leaves it: tokenizer/, config.yaml and one sentry of random rows."""
    model = save_model(family, folder / "model", dtype)
    # Beside a qwen2 config.json, transformers 5 makes a Qwen2Tokenizer, which adds <|endoftext|>
    # where there is none; all real ones have it.
    for path in model.glob("tokenizer*.json"):
        text = path.read_text(encoding="utf-8").replace("<|end|>", "<|endoftext|>")
        path.write_text(text, encoding="utf-8")
    (folder / "lexicon.txt").write_text("\n".join(WORDS), encoding="utf-8")
    (folder / "corpus.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    config = Config(
        model_name=str(model), lexicon=str(folder / "lexicon.txt"),
        corpus=str(folder / "corpus.txt"), run_dir=str(folder / "run"), quantization="none",
        **settings,
    )  # fmt: skip
    new = extend(config, read_corpus(config))
    save_new_words(config, new)
    config = json.loads(json.dumps(dataclasses.asdict(config)))
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    base = AutoModelForCausalLM.from_pretrained(model)
    tensors = {"input_rows": random_rows(base, len(WORDS), seed=1)}
    if "untied" in family if separate is None else separate:
        tensors["output_rows"] = random_rows(base, len(WORDS), seed=2)
    state = {
        "step": 40, "model_name": str(model), "model_revision": None, "config": config,
        "words_sha256": new_words_hash(WORDS, new.first_new_id), "corpus_sha256": "c0ffee",
        "first_new_id": new.first_new_id, "num_new_tokens": len(WORDS),
    }  # fmt: skip
    texts = {
        "metrics.jsonl": json.dumps(EVAL) + "\n",
        "samples.md": "",
        "words.txt": "\n".join(WORDS) + "\n",
    }
    write_sentry(folder / "run" / "snapshots", tensors, texts, state)
    return folder / "run"


def overlay_logits(run: Path, base: Path | None = None) -> list[torch.Tensor]:
    """The reference: logits of the ten texts from the base model with the overlay installed."""
    sentry = recover.newest_sentry(run)
    rows = recover.trained_rows(sentry)
    model = AutoModelForCausalLM.from_pretrained(base or run.parent / "model", dtype="auto")
    WakeOverlay(
        model, sentry.state["first_new_id"], rows["input_rows"], rows.get("output_rows")
    ).install()
    return logits_of(model, AutoTokenizer.from_pretrained(run / "tokenizer"), sentry)


@torch.no_grad()
def logits_of(model, tokenizer, sentry) -> list[torch.Tensor]:
    """(seq, vocabulary) fp32 of each text; every text holds a new word as one token."""
    encoded = [tokenizer(text, return_tensors="pt").input_ids for text in TEXTS]
    assert all((ids >= sentry.state["first_new_id"]).any() for ids in encoded)
    return [model(input_ids=ids).logits[0].float() for ids in encoded]


def assert_same(ours: list[torch.Tensor], reference: list[torch.Tensor], relative: float) -> None:
    for a, b in zip(ours, reference):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= relative * b.abs().max()
        assert torch.equal(a.argmax(-1), b.argmax(-1))


CASES = [
    ("qwen2_untied", None), ("qwen2_tied", None), ("qwen2_tied", True), ("llama_untied", False),
    ("llama_tied", None), ("mistral", True), ("gemma2", None), ("gemma2", True), ("phi3", True),
    ("gpt_neox", True), ("phi", True), ("gpt2", None), ("gpt2", True), ("opt", None),
    ("gemma3_4b", None), ("gemma3_4b", True), ("mamba", None),
]  # fmt: skip


@pytest.mark.parametrize("family, separate", CASES)
def test_logits_are_the_overlays(
    family: str, separate: bool | None, tmp_path: Path, monkeypatch
) -> None:
    """Untied, tied, padded and not, shared and separate rows. 1e-5: fp32 products of other shapes.

    The adapter is loaded by the lines that stand in its card, run as they stand there, beside it.
    """
    peft = pytest.importorskip("peft")
    run, out = make_run(tmp_path, family, separate=separate), tmp_path / "out"
    reference, sentry = overlay_logits(run), recover.newest_sentry(run)
    main("export", str(run), str(out), "--format", "merged")
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.get_text_config().vocab_size == len(tokenizer) == 257 + len(WORDS)
    assert is_tied(model) == (is_tied(make_model(family)) and not separate)
    assert model.config.tie_word_embeddings == is_tied(model)
    assert_same(logits_of(model, tokenizer, sentry), reference, 1e-5)

    if family == "phi":  # peft 0.21 computes its logits without the head's bias
        with pytest.raises(UserError, match="^export: the model's head has a bias, which PEFT's "):
            main("export", str(run), str(tmp_path / "peft"), "--format", "peft")
        return
    main("export", str(run), str(tmp_path / "peft"), "--format", "peft")
    card = (tmp_path / "peft" / "README.md").read_text(encoding="utf-8")
    names, code = {}, re.search(r"```python\n(.+?)```", card, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    assert isinstance(names["model"], peft.PeftModel)
    assert_same(logits_of(names["model"].eval(), names["tokenizer"], sentry), reference, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_keeps_base_rows_bitwise_and_rounds_new_ones(dtype, tmp_path: Path) -> None:
    run = make_run(tmp_path, "qwen2_untied", dtype)
    main("export", str(run), str(tmp_path / "out"), "--format", "merged")
    base = load_file(tmp_path / "model" / "model.safetensors")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    rows = recover.trained_rows(recover.newest_sentry(run))
    assert list(merged) == list(base)
    for name, table in (
        ("model.embed_tokens.weight", rows["input_rows"]),
        ("lm_head.weight", rows["output_rows"]),
    ):
        old, new = base.pop(name), merged.pop(name)
        assert new.dtype == dtype and len(new) == 257 + len(WORDS)
        assert torch.equal(new[:257].view(torch.int16), old[:257].view(torch.int16))
        assert torch.equal(new[257:], table.to(dtype))
    assert all(torch.equal(base[name], merged[name]) for name in base)


def shard(model: Path, num_files: int) -> None:
    """Turn a single-file checkpoint into one of num_files files, tensors dealt out in turn."""
    tensors = load_file(model / "model.safetensors")
    names = [f"model-{i + 1:05d}-of-{num_files:05d}.safetensors" for i in range(num_files)]
    weight_map = {name: names[i % num_files] for i, name in enumerate(tensors)}
    for file in names:
        part = {n: t for n, t in tensors.items() if weight_map[n] == file}
        save_file(part, model / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (model / "model.safetensors").unlink()


SHARDED = [("qwen2_untied", None), ("qwen2_tied", True), ("phi", True)]


@pytest.mark.parametrize("family, separate", SHARDED)
def test_sharded_checkpoint(family: str, separate: bool | None, tmp_path: Path) -> None:
    """Of the phi, whose head has a bias, weight and bias of the head lie in different files."""
    run = make_run(tmp_path, family, separate=separate)
    reference = overlay_logits(run)
    shard(tmp_path / "model", 3)
    main("export", str(run), str(tmp_path / "out"), "--format", "merged")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sizes = 0
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert {n for n, f in index["weight_map"].items() if f == file.name} == set(
                opened.keys()
            )
            sizes += sum(opened.get_tensor(n).nbytes for n in opened.keys())  # noqa: SIM118
    assert len(files) == 3 and index["metadata"]["total_size"] == sizes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert_same(logits_of(model, tokenizer, recover.newest_sentry(run)), reference, 1e-5)
    gone = tmp_path / "model" / files[1].name
    gone.unlink()
    with pytest.raises(UserError) as caught:
        main("export", str(run), str(tmp_path / "again"), "--format", "merged")
    assert str(caught.value) == f"{gone}: missing; --base names another model folder"


def test_a_scalar_among_the_weights_and_weights_that_are_gone(tmp_path: Path) -> None:
    run, file = make_run(tmp_path), tmp_path / "model" / "model.safetensors"
    scalar = {"model.scale": torch.tensor(2.5)}
    save_file(load_file(file) | scalar, file, metadata={"format": "pt"})
    main("export", str(run), str(tmp_path / "out"), "--format", "merged")
    assert load_file(tmp_path / "out" / "model.safetensors")["model.scale"] == 2.5
    file.unlink()
    with pytest.raises(UserError) as caught:
        main("export", str(run), str(tmp_path / "peft"), "--format", "peft")
    assert str(caught.value) == f"{file}: missing; --base names another model folder"


def pickled(model: Path, num_files: int) -> None:
    """Turn a checkpoint into pytorch_model.bin, in which a tied head is the embedding once more."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    if num_files == 1:
        torch.save(tensors, model / "pytorch_model.bin")
        return
    files = [f"pytorch_model-{i + 1:05d}-of-{num_files:05d}.bin" for i in range(num_files)]
    weight_map = {name: files[i % num_files] for i, name in enumerate(tensors)}
    for file in files:
        torch.save({n: t for n, t in tensors.items() if weight_map[n] == file}, model / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize("num_files", [1, 2])
@pytest.mark.parametrize("family, separate", [("llama_untied", None), ("qwen2_tied", None)])
def test_a_base_in_pytorch_model_bin_is_exported_as_safetensors(
    family: str, separate: bool | None, num_files: int, tmp_path: Path
) -> None:
    run = make_run(tmp_path, family, separate=separate)
    reference = overlay_logits(run)
    pickled(tmp_path / "model", num_files)
    main("export", str(run), str(tmp_path / "out"), "--format", "merged")
    assert not list((tmp_path / "out").glob("*.bin*"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert_same(logits_of(model, tokenizer, recover.newest_sentry(run)), reference, 1e-5)


def test_a_second_embedding_in_a_layer_that_predicts_several_tokens(tmp_path: Path) -> None:
    """GLM-4.5 and DeepSeek-V3 keep one there; transformers does not load it."""
    run, file = make_run(tmp_path), tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    second = {"model.layers.2.embed_tokens.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | second, file, metadata={"format": "pt"})
    reference = overlay_logits(run)
    for form in ("peft", "merged"):
        main("export", str(run), str(tmp_path / form), "--format", form)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert_same(logits_of(model, tokenizer, recover.newest_sentry(run)), reference, 1e-5)


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_an_export_that_computes_something_else_is_not_kept(form, tmp_path, monkeypatch) -> None:
    run, save = make_run(tmp_path), recover.save_tensors

    def save_other(tensors, path):
        save({name: tensor * 1.01 for name, tensor in tensors.items()}, path)

    monkeypatch.setattr(recover, "save_tensors", save_other)
    with pytest.raises(UserError, match=r"^export: its logits differ from those of training by "):
        main("export", str(run), str(tmp_path / "out"), "--format", form)
    # The same where the machine cannot hold the model and the rows alone are read back.
    memory = types.SimpleNamespace(available=1000)
    monkeypatch.setattr(recover.psutil, "virtual_memory", lambda: memory)
    with pytest.raises(UserError, match=r"^export: .+ does not hold the input_rows that were trai"):
        main("export", str(run), str(tmp_path / "out"), "--format", form)
    assert not (tmp_path / "out").exists()


def test_an_export_that_cannot_be_loaded_back_is_one_line(tmp_path, monkeypatch) -> None:
    def fail(*_):
        raise RuntimeError("size mismatch\n\tfor lm_head")

    run = make_run(tmp_path)
    monkeypatch.setattr(recover, "load_export", fail)
    with pytest.raises(UserError) as caught:
        main("export", str(run), str(tmp_path / "out"), "--format", "merged")
    line = "export: it cannot be loaded back: size mismatch for lm_head"
    assert str(caught.value) == line and not (tmp_path / "out").exists()


def test_a_pickle_that_cannot_be_mapped_is_told_with_what_to_do(tmp_path) -> None:
    """Before torch 1.6 it was no zip file."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    advice = "load the model once with transformers, save it with save_pretrained, and give that"
    with pytest.raises(UserError) as caught:
        recover.mapped_tensors(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: cannot be mapped; {advice} folder as --base (")
    assert "\n" not in line


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_rows_are_read_back_where_the_model_is_too_large(form, tmp_path, monkeypatch, capsys):
    run, memory = make_run(tmp_path), types.SimpleNamespace(available=1000)
    monkeypatch.setattr(recover.psutil, "virtual_memory", lambda: memory)
    main("export", str(run), str(tmp_path / "out"), "--format", form)
    text = "(its rows were read back, and no logits compared: that takes 0.0 GiB, and 0.0 are free)"
    assert text in capsys.readouterr().out


def test_what_cannot_be_exported_is_said_before_training(tmp_path: Path) -> None:
    run, file = make_run(tmp_path), tmp_path / "model" / "model.safetensors"
    config, model = Config(**recover.run_settings(run)), make_model("qwen2_untied")
    assert recover.export_problems(config, model) == []
    tensors = load_file(file)
    tensors["table"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    assert recover.export_problems(config, model) == [
        f"only the rows of this run can be exported: model {tmp_path / 'model'}: no one tensor in"
        " its files is that of model.embed_tokens; found lm_head.weight"
    ]


def test_base_model_from_the_hubs_cache(tmp_path: Path) -> None:
    """Offline, by hub id and revision: only files that are needed are asked for."""
    run = make_run(tmp_path)
    main("export", str(run), str(tmp_path / "local"), "--format", "merged")
    shard(tmp_path / "model", 3)
    repo, commit = (
        tmp_path / "hub" / "models--someone--tiny",
        "0123456789abcdef0123456789abcdef01234567",
    )
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(tmp_path / "model", repo / "snapshots" / commit)
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    code = """
import sys
from recover import main, run_command
for n, base in enumerate(sys.argv[2:]):
    command = "export", sys.argv[1], f"out_{n}", "--format", "merged", "--base", base
    print("status", run_command(main, *command))
"""
    bases = "someone/tiny", "someone/else", "no/such/folder"
    env["PYTHONPATH"] = str(Path(recover.__file__).parent)
    command = [sys.executable, "-c", code, str(run), *bases]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert re.findall(r"status \d", done.stdout) == ["status 0", "status 1", "status 1"]
    lines = done.stderr.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"model {base}" for base in bases[1:]]
    assert all("--base" in line for line in lines)
    ours = {}
    for file in (tmp_path / "out_0").glob("*.safetensors"):
        ours |= load_file(file)
    wanted = load_file(tmp_path / "local" / "model.safetensors")
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[n], wanted[n]) for n in wanted)


def test_merged_model_generates_new_words_in_a_pipeline(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (tmp_path / "model" / "generation_config.json").write_text('{"do_sample": false}')
    main("export", str(run), str(tmp_path / "out"), "--format", "merged")
    generate = pipeline("text-generation", str(tmp_path / "out"), device="cpu")
    assert not generate.model.generation_config.do_sample
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"do_sample": false}'
    tokenizer = generate.tokenizer
    new_ids = list(range(257, 257 + len(WORDS)))
    only_new = lambda *_: new_ids  # noqa: E731
    text = generate("the", max_new_tokens=3, prefix_allowed_tokens_fn=only_new)[0]["generated_text"]
    assert len(text.split()) >= 3 and all(word in "".join(WORDS) for word in text[3:].split())
    assert sum(i >= 257 for i in tokenizer(text).input_ids) == 3


def test_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    main("export", str(run), str(tmp_path / "out"), "--format", "rows")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"rows.safetensors", "rows.json", "words.txt", "README.md"}
    rows, saved = load_file(tmp_path / "out" / "rows.safetensors"), recover.newest_sentry(run)
    assert rows.keys() == {"input_rows", "output_rows"}
    for name, table in recover.trained_rows(saved).items():
        assert rows[name].dtype == torch.float32 and torch.equal(rows[name], table)
    facts = json.loads((tmp_path / "out" / "rows.json").read_text(encoding="utf-8"))
    assert facts == {
        "model_name": str(tmp_path / "model"), "model_revision": None, "step": 40,
        "first_new_id": 257, "num_new_tokens": len(WORDS),
        "words": {word: 257 + i for i, word in enumerate(WORDS)}, "second_forms": {},
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    for word, i in facts["words"].items():
        assert tokenizer.decode([i]).strip() == word


def test_rows_from_what_survived(tmp_path: Path) -> None:
    """A copy of the run folder elsewhere, and the durable folder alone; the base model is gone."""
    run = make_run(tmp_path / "a")
    wanted = load_file(run / "snapshots" / "step_000040" / "rows.safetensors")["input_rows"]
    shutil.copytree(run, tmp_path / "copy")
    shutil.copytree(run / "snapshots", tmp_path / "drive")
    shutil.rmtree(tmp_path / "a")
    for source in ("copy", "drive"):
        out = tmp_path / f"out_{source}"
        main("export", str(tmp_path / source), str(out), "--format", "rows")
        assert torch.equal(load_file(out / "rows.safetensors")["input_rows"], wanted)
    with pytest.raises(UserError, match=r"drive/tokenizer: report.json is missing; python ext"):
        main("export", str(tmp_path / "drive"), str(tmp_path / "m"), "--format", "merged")
    with pytest.raises(UserError, match="--base names its folder"):
        main("export", str(tmp_path / "copy"), str(tmp_path / "m"), "--format", "merged")
    for name in ("tokenizer.json", "report.json"):
        whole = (tmp_path / "copy" / "tokenizer" / name).read_bytes()
        (tmp_path / "copy" / "tokenizer" / name).write_bytes(whole[:9])
        with pytest.raises(UserError, match=f"copy/tokenizer: {name} is damaged; python extend"):
            main("export", str(tmp_path / "copy"), str(tmp_path / "m"), "--format", "merged")
        (tmp_path / "copy" / "tokenizer" / name).write_bytes(whole)
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".m*"))
    save_model("qwen2_untied", tmp_path / "moved")
    moved = "--base", str(tmp_path / "moved")
    main("export", str(tmp_path / "copy"), str(tmp_path / "m"), "--format", "merged", *moved)
    assert (tmp_path / "m" / "model.safetensors").exists()


def test_refuses_a_folder_with_files(tmp_path: Path) -> None:
    run, out = make_run(tmp_path), tmp_path / "out"
    out.mkdir()
    main("export", str(run), str(out), "--format", "merged")  # an empty folder is fine
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(UserError) as caught:
        main("export", str(run), str(out), "--format", "rows")
    assert (
        str(caught.value)
        == f"{out}: holds files; give another folder, or --force to write over them"
    )
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    main("export", str(run), str(out), "--format", "peft", "--force")
    main("export", str(run), str(out), "--format", "merged", "--force")
    assert (out / "notes.txt").read_text() == "mine"
    names = {path.name for path in out.iterdir()}
    assert "model.safetensors" in names and not any(name.startswith("adapter") for name in names)
    main("export", str(run), str(out), "--format", "rows", "--force")
    names = {path.name for path in out.iterdir()}
    assert "rows.safetensors" in names and not names & {"model.safetensors", "config.json"}
    for place in (run, tmp_path / "model"):
        with pytest.raises(UserError, match="is the run or the base model itself"):
            main("export", str(run), str(place), "--format", "merged", "--force")


@pytest.mark.parametrize(
    "form, library", [("rows", None), ("merged", "transformers"), ("peft", "peft")]
)
def test_card(form: str, library: str | None, tmp_path: Path) -> None:
    run, base_card = make_run(tmp_path), tmp_path / "model" / "README.md"
    for text in (None, "no front matter", "---\nlicense: [\n---\n", "---\nlanguage: en\n---\n"):
        if text:
            base_card.write_text(text)
        main("export", str(run), str(tmp_path / "a"), "--format", form, "--force")
        card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
        assert "Licence of the base model: see the base model." in card
    base_card.write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nHi\n")
    main("export", str(run), str(tmp_path / "b"), "--format", form)
    card = (tmp_path / "b" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0" and front["tags"] == ["wake2vec"]
    assert front.get("library_name") == library
    assert "base_model" not in front  # it would be taken for a hub id
    assert not {"report.json", "words.tsv"} & {p.name for p in (tmp_path / "b").iterdir()}
    for promised in (
        "7 new words", "ids 257 to 263", "riverrun, bababad", "init subtoken_mean", "seed 42",
        "Trained for 40 steps", "1.750 bits per byte at step 40", "without the words: 2.250",
        "| 40 | 4.5000 | 1.750 |", "## Loading", "Licence of the base model: apache-2.0.",
    ):  # fmt: skip
        assert promised in card
    assert f"kin_coupling {Config.kin_coupling}, max_steps" in card
    assert "THIS_FOLDER" not in card and ("from_pretrained" in card) == (form != "rows")
    assert card.count('from_pretrained("b"') == {"rows": 0, "merged": 2, "peft": 2}[form]
    assert ("AutoPeftModelForCausalLM" in card) == (form == "peft")
    assert ("load_in_4bit=True" in card) == (form != "rows")
    assert (tmp_path / "b" / "words.txt").read_text(encoding="utf-8").splitlines() == WORDS


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_the_cards_lines_load_in_four_bits(form: str, tmp_path: Path, monkeypatch) -> None:
    """With what the card says to add. New rows are no linear layer, so they stay as they are."""
    pytest.importorskip("peft")
    run = make_run(tmp_path)
    main("export", str(run), str(tmp_path / "out"), "--format", form)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.+?)```", card, re.DOTALL)[1]
    option = re.search(r"`(quantization_config=.+?)`", card, re.DOTALL)[1].replace("\n", " ")
    code = "from transformers import BitsAndBytesConfig\n" + code
    names, code = {}, code.replace('dtype="auto")', f'dtype="auto", {option})')
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    model, sentry = names["model"].eval(), recover.newest_sentry(run)
    assert "Params4bit" in {type(p).__name__ for p in model.parameters()}
    logits = logits_of(model, names["tokenizer"], sentry)
    assert logits[0].shape[1] == 264 and logits[0].isfinite().all()
    rows = recover.trained_rows(sentry)["input_rows"]
    new = model.get_input_embeddings()(torch.tensor([[257]])).flatten()
    assert torch.equal(new, rows[0])


def test_an_adapter_over_a_table_with_more_padding_than_new_words(
    tmp_path: Path, monkeypatch
) -> None:
    """The table stays as long as it is, and beside the padding's logits all are the overlay's."""
    pytest.importorskip("peft")
    monkeypatch.setitem(SHAPE, "vocab_size", 300)
    run = make_run(tmp_path)
    main("export", str(run), str(tmp_path / "out"), "--format", "peft")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    names, code = {}, re.search(r"```python\n(.+?)```", card, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    logits = logits_of(names["model"].eval(), names["tokenizer"], recover.newest_sentry(run))
    assert logits[0].shape[1] == 300
    assert_same([part[:, :264] for part in logits], overlay_logits(run), 1e-5)


@pytest.mark.parametrize("family, separate", [("qwen2_untied", None), ("qwen2_tied", None)])
def test_a_merged_folder_keeps_the_rules_of_vllm_and_llama_cpp(
    family: str, separate: bool | None, tmp_path: Path
) -> None:
    """vLLM (vocab_parallel_embedding) wants tables of exactly config.vocab_size rows.
    llama.cpp's convert_hf_to_gguf wants every id below it and in use once, and writes for an added
    token what encoding and decoding it gives."""
    run, out = make_run(tmp_path, family, separate=separate), tmp_path / "out"
    main("export", str(run), str(out), "--format", "merged")
    settings = json.loads((out / "config.json").read_text())
    tokenizer, tensors = AutoTokenizer.from_pretrained(out), load_file(out / "model.safetensors")
    size = settings["vocab_size"]
    assert size == len(tokenizer) == 264
    names = {"model.embed_tokens.weight", "lm_head.weight"} & set(tensors)
    assert ("lm_head.weight" in names) != settings["tie_word_embeddings"]
    assert all(len(tensors[name]) == size for name in names)
    vocab = tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(size))
    for token, i in tokenizer.get_added_vocab().items():
        ids = tokenizer.encode(token, add_special_tokens=False)
        assert ids == [i] and tokenizer.decode(ids) == token
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    assert all(i < 257 for i in special)  # a special token would never be shown


def test_a_phi_keeps_the_class_of_tokenizer_that_llama_cpp_asks_for(tmp_path: Path) -> None:
    """Beside its config.json the class changes nothing: transformers takes tokenizer.json."""
    run, out = make_run(tmp_path, "phi3"), tmp_path / "out"
    for path in (tmp_path / "model" / "tokenizer.json", run / "tokenizer" / "tokenizer.json"):
        spec = json.loads(path.read_text(encoding="utf-8"))
        spec["pre_tokenizer"]["use_regex"] = False  # not as GPT-2's
        path.write_text(json.dumps(spec), encoding="utf-8")
    settings = tmp_path / "model" / "tokenizer_config.json"
    for name, kept in (("GPT2Tokenizer", True), ("LlamaTokenizer", False)):
        settings.write_text(json.dumps({"tokenizer_class": name}), encoding="utf-8")
        main("export", str(run), str(out), "--format", "merged", "--force")
        found = json.loads((out / "tokenizer_config.json").read_text("utf-8"))["tokenizer_class"]
        assert found == (name if kept else "PreTrainedTokenizerFast")
        loaded = json.loads(AutoTokenizer.from_pretrained(out).backend_tokenizer.to_str())
        assert (loaded["pre_tokenizer"], loaded["model"]) == (spec["pre_tokenizer"], spec["model"])


# ---- The hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Answer for the hub at its client's network edge; what was sent is (method, path, body)."""
    import huggingface_hub

    if not hasattr(huggingface_hub, "set_client_factory"):
        pytest.skip("this huggingface_hub is older than 1.0 and uses requests")
    network = huggingface_hub.errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0]
    httpx, sent = importlib.import_module(network), []

    def answer(request):
        path = request.url.path
        if path != "/api/agent-harnesses":  # asked by huggingface_hub 2.4 for its own sake
            sent.append((request.method, path, request.content))
        if "authorization" not in request.headers or refusing in path:
            return httpx.Response(401, json={"error": "Invalid credentials"})
        files = json.loads(request.content)["files"] if "/preupload/" in path else []
        return httpx.Response(200, json={
            "name": "me", "url": "https://huggingface.co/me/words", "errors": [], "warnings": [],
            "files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                      for f in files],
            "commitUrl": "https://huggingface.co/me/words/commit/1", "commitOid": "1",
        })  # fmt: skip

    refusing = "no path"

    def refuse(what: str) -> None:
        nonlocal refusing
        refusing = what

    transport = httpx.MockTransport(answer)
    huggingface_hub.set_client_factory(lambda: httpx.Client(transport=transport))
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    yield sent, refuse
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


def test_push_shows_and_sends_the_files_of_this_export_alone(hub, tmp_path, capsys) -> None:
    sent, _ = hub
    run, out = make_run(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    main("export", str(run), str(out), "--format", "merged", "--force", "--push", "me/words")
    names = sorted(path.name for path in out.iterdir() if path.name != "notes.txt")
    printed = capsys.readouterr().out.splitlines()
    first = printed.index("to the hub as me/words, private if it is new:")
    shown = printed[first + 1 : -1]
    assert [line.split()[-1] for line in shown] == names
    assert printed[-1] == "https://huggingface.co/me/words/commit/1"
    assert (
        f"{(out / 'model.safetensors').stat().st_size / 1000:.1f} kB"
        in shown[names.index("model.safetensors")]
    )
    calls = [(method, path) for method, path, _ in sent]
    assert calls[0] == ("GET", "/api/whoami-v2") and calls[1] == ("POST", "/api/repos/create")
    created = json.loads(sent[1][2])
    assert (created["name"], created["organization"]) == ("words", "me")
    private = created.get("private") or created.get("visibility") == "private"  # 1.x, 2.x
    assert private
    assert calls[-1] == ("POST", "/api/models/me/words/commit/main")
    lines = [json.loads(line) for line in sent[-1][2].splitlines()]
    assert lines[0]["value"]["summary"] == "Step 40 as merged"
    files = {line["value"]["path"]: line["value"]["content"] for line in lines[1:]}
    assert sorted(files) == names
    for name in names:
        assert base64.b64decode(files[name]) == (out / name).read_bytes()
    assert 'from_pretrained("me/words"' in (out / "README.md").read_text(encoding="utf-8")


def test_what_the_hub_refuses_is_one_line_and_found_before_the_files_are_made(
    hub, tmp_path, capsys, monkeypatch
) -> None:
    sent, refuse = hub
    run, out = make_run(tmp_path), tmp_path / "out"
    export = ("export", str(run), str(out), "--format", "rows", "--push")
    refuse("whoami")
    capsys.readouterr()
    for repo in ("me/words", "a/b/c"):
        assert run_command(main, *export, repo) == 1
        error = capsys.readouterr().err
        assert error.startswith("--push: ") and error.count("\n") == 1
        assert not out.exists()
    assert [path for _, path, _ in sent] == ["/api/whoami-v2"]
    refuse("commit")
    assert run_command(main, *export, "me/words") == 1
    assert "--push: " in capsys.readouterr().err and (out / "README.md").is_file()


@pytest.mark.parametrize("table", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_base_table_is_the_models_own_without_padding(table: str, tmp_path: Path) -> None:
    """What rows of step 0 are made of; overlay.py makes them here as it does in training."""
    run = make_run(tmp_path, dtype=torch.bfloat16)
    weight = load_file(tmp_path / "model" / "model.safetensors")[table]
    base = recover.base_tables(recover.config_with_base(recover.run_settings(run), None))
    assert len(weight) == 264 and torch.equal(base.table(table, 257), weight[:257])
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    wrong = tensors | {table: tensors[table].to(torch.int8)}
    save_file(wrong, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{table} is torch.int8 \(264, 32\)"):
        base.table(table, 257)


def test_spellings_are_those_that_training_used(tmp_path: Path) -> None:
    for matching in ("spaced", "bare", "plain"):
        run = make_run(tmp_path / matching, token_matching=matching)
        config = Config(**recover.run_settings(run))
        new, saved = extend(config, read_corpus(config)), recover.saved_words(run)
        assert (saved.words, saved.spellings) == (new.words, new.spellings)
        assert (saved.first_new_id, saved.sha256) == (257, new.report["new_words_sha256"])


def test_tokenizer_files_of_other_words_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    changed = {"tokenizer.json": ("quark", "quirk"), "words.tsv": ("\tquark\t", "\tquirk\t")}
    for name, (old, new) in changed.items():
        path = run / "tokenizer" / name
        whole = path.read_text(encoding="utf-8")
        assert old in whole
        path.write_text(whole.replace(old, new), encoding="utf-8")
        with pytest.raises(UserError, match="tokenizer: its files are not of the same words"):
            main("export", str(run), str(tmp_path / "out"), "--format", "merged")
        path.write_text(whole, encoding="utf-8")
    main("export", str(run), str(tmp_path / "out"), "--format", "merged")


def test_a_run_folder_without_words_tsv(tmp_path: Path, capsys) -> None:
    """A run of before is read where the words' spellings are not needed; else a line says what
    makes them."""
    run = make_run(tmp_path)
    (run / "tokenizer" / "words.tsv").unlink()
    main(str(run))
    assert "step 40 of 3,000, 7 new words" in capsys.readouterr().out
    main("export", str(run), str(tmp_path / "rows"), "--format", "rows")
    for command in (
        ("export", str(run), str(tmp_path / "m"), "--format", "merged"), ("neighbours", str(run)),
        ("import", str(seed_file(tmp_path / "seed.pt")), str(run)),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            main(*command)
        assert str(caught.value) == (
            f"{run / 'tokenizer'}: words.tsv is missing; python extend_tokenizer.py CONFIG"
            f" run_dir={run} makes it again"
        )


def test_spellings_on_a_sentencepiece_style_tokenizer(tmp_path: Path) -> None:
    run = make_run(tmp_path, "llama_untied")
    letters = ["<unk>", "\u2581", *map(chr, range(32, 127)), "ph", "r", "ri", "ver", "ve"]
    vocab = {
        text: i for i, text in enumerate(dict.fromkeys([*letters, "\u2581th", "\u2581t", "à"]))
    }
    merges = [("\u2581", "t"), ("\u2581t", "h"), ("r", "i"), ("v", "e"), ("ve", "r"), ("p", "h")]
    base = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True))
    base.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    base.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    base.add_special_tokens(["<s>"])
    base.save(str(tmp_path / "model" / "tokenizer.json"))
    config = Config(**recover.run_settings(run))
    new = extend(config, read_corpus(config))
    save_new_words(config, new)
    saved = recover.saved_words(run)
    assert new.matching == "both" and new.forms[0].content.startswith("\u2581")
    assert (saved.words, saved.spellings) == (new.words, new.spellings)
    assert any(len(ids) < len(word) for word, ids in zip(saved.words, saved.spellings))
    for found, scores in (("few of", False), ("the new words too", True)):
        if scores:
            (tmp_path / "model" / "tokenizer.model").write_bytes(b"scores")
        facts = {"auto": "AutoModelForCausalLM", "folder": "out"}
        card = recover.how_to_load("merged", facts, saved, tmp_path / "model")
        assert f"llama.cpp finds {found}" in card and ("begin a prompt" in card) == scores


def test_neighbours(tmp_path: Path, capsys) -> None:
    """A word that was moved onto a base token's row, and another onto a second word's."""
    run = make_run(tmp_path)
    sentry = recover.newest_sentry(run)
    tensors = load_file(sentry.path / "rows.safetensors")
    table = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    rows = subtoken_mean(table[:257], recover.saved_words(run).spellings)
    token = AutoTokenizer.from_pretrained(run / "tokenizer").convert_tokens_to_ids("z")
    rows[WORDS.index("quark")] = 3 * table[token]
    rows[WORDS.index("bababad")] = 5 * rows[WORDS.index("riverrun")]
    texts = {
        p.name: p.read_text(encoding="utf-8")
        for p in sentry.path.iterdir()
        if p.suffix != ".safetensors"
    }
    texts.pop("state.json")
    write_sentry(
        run / "snapshots", tensors | {"input_rows": rows}, texts, sentry.state | {"step": 60}
    )
    main("neighbours", str(run), "--num", "3", "quark", "bababad")
    text = capsys.readouterr().out
    assert re.search(r"quark, after\n  base tokens  'z' 1\.00", text)
    assert re.search(r"bababad, after\n.+\n  new words    riverrun 1\.00", text)
    assert not re.search(r"bababad, before\n.+\n  new words    riverrun 1\.00", text)
    assert not re.search(r"quark, (before|after)\n.+\n  new words .*quark", text)
    moved = text.split("most moved")[1].splitlines()[1:4]
    assert {line.split()[0] for line in moved[:2]} == {"quark", "bababad"}
    assert float(moved[2].split()[1]) == 0.0
    norms = table[:257].norm(dim=1)
    assert re.search(rf"base tokens +{norms.mean():.3f} +{norms.std(correction=0):.3f}\n", text)
    with pytest.raises(UserError, match="'stone': no new word of"):
        main("neighbours", str(run), "stone")


# ---- A seed of the original notebooks ------------------------------------------------------------

GAP = 3  # new ids in the table's padding, which the notebooks never trained: 399 on Qwen2.5


def seed_file(path: Path, **changes) -> Path:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(len(WORDS) - GAP, 32, generator=generator).half()
    seed = {"embeddings": rows, "step": 1180, "wake_start": 257 + GAP, "num_wake": len(rows)}
    torch.save(seed | changes, path)
    return path


SIDES = [("shared", []), ("frozen", ["input_rows"]), ("auto", ["input_rows", "output_rows"])]


@pytest.mark.parametrize("init", ["subtoken_mean", "spherical"])
@pytest.mark.parametrize("output_rows, trained", SIDES)
def test_import(init: str, output_rows: str, trained: list[str], tmp_path: Path) -> None:
    """Their rows as they are, the others as training would begin; every key that train.py reads."""
    run = make_run(tmp_path, init=init, output_rows=output_rows)
    shutil.rmtree(run / "snapshots")
    seed = seed_file(tmp_path / "seed.pt")
    main("import", str(seed), str(run))
    sentry = recover.newest_sentry(run)
    tensors = load_file(sentry.path / "rows.safetensors")
    wanted = torch.load(seed, weights_only=True)["embeddings"].float()
    assert sentry.step == 1180 and sentry.path.parent == run / "snapshots"
    assert torch.equal(tensors["input_rows"][GAP:], wanted)
    spellings = recover.saved_words(run).spellings
    tables = load_file(tmp_path / "model" / "model.safetensors")
    first = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = tables[name][:257]
        if init == "spherical":
            first[name] = spherical_rows(table, len(WORDS), 1.5, 42)
        else:
            first[name] = subtoken_mean(table, spellings)
    assert torch.equal(tensors["input_rows"][:GAP], first["model.embed_tokens.weight"][:GAP])
    assert ("output_rows" in tensors) == (output_rows != "shared")
    if output_rows != "shared":
        assert torch.equal(tensors["output_rows"], first["lm_head.weight"])
    for name in trained or ["input_rows"]:
        assert tensors[f"{name}.row_mean_square"].tolist() == [0.0] * len(WORDS)
        assert tensors[f"{name}.column_mean_square"].tolist() == [0.0] * 32
    assert len(tensors) == (1 if output_rows == "shared" else 2) + 2 * len(trained or [0])
    state = sentry.state
    assert state["optimizer_step"] == 0 and state["sequences_seen"] == 1180 * 16
    assert state["loss_scale"] == {"value": 65536.0, "good_steps": 0}
    assert state["config"] == recover.run_settings(run)
    source = (Path(recover.__file__).parent / "train.py").read_text(encoding="utf-8")
    read = set(re.findall(r'state(?:\.get\(|\[)"(\w+)"', source)) - {"files"}
    assert read and read <= state.keys()


class Code:
    """This is a pickle that makes a folder when it is read."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_import_runs_no_code_of_the_file(tmp_path: Path) -> None:
    run, seed, made = make_run(tmp_path), tmp_path / "seed.pt", tmp_path / "made"
    torch.save({"embeddings": torch.ones(2, 32), "step": 1, "optimizer": Code(made)}, seed)
    with pytest.raises(UserError, match="no sentry of the original notebooks"):
        main("import", str(seed), str(run))
    assert not made.exists()


def test_import_gives_the_second_forms_of_words_the_rows_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "TEXTS", [*TEXTS, "quark and quark"])
    run, rows = make_run(tmp_path), torch.arange(7 * 32.0).view(7, 32)
    shutil.rmtree(run / "snapshots")
    new = recover.saved_words(run)
    assert new.words == [*WORDS, "quark"]
    seed = {"embeddings": rows, "step": 5, "wake_start": new.first_new_id, "num_wake": 7}
    torch.save(seed, tmp_path / "seed.pt")
    main("import", str(tmp_path / "seed.pt"), str(run))
    saved = load_file(run / "snapshots" / "step_000005" / "rows.safetensors")["input_rows"]
    assert torch.equal(saved, torch.cat([rows, rows[WORDS.index("quark")][None]]))


def test_import_refuses(tmp_path: Path) -> None:
    run = make_run(tmp_path)

    def refusal(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            main("import", str(path), str(run))
        assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
        return str(caught.value).removeprefix(f"{path}: ")

    seed, rows = tmp_path / "seed.pt", torch.zeros(len(WORDS) - GAP, 32).half()
    nan = rows.clone()
    nan[1, 2] = torch.nan
    assert refusal(seed_file(seed, embeddings=nan)) == "'embeddings' holds NaN or infinity"
    assert refusal(seed_file(seed, num_wake=3)) == "(4, 32) rows, num_wake 3, step 1180"
    wrong = "this run's new ids are 257 to 263, its rows 32 wide"
    text = refusal(seed_file(seed, embeddings=rows[:3], num_wake=3))
    assert text == f"3 rows of 32 from id 260 on; {wrong}"
    text = refusal(seed_file(seed, embeddings=rows[:, :8]))
    assert text == f"4 rows of 8 from id 260 on; {wrong}"
    text = refusal(seed_file(seed, wake_start=250))
    assert text == f"4 rows of 32 from id 250 on; {wrong}"
    text = refusal(seed_file(seed, embeddings=torch.zeros(14, 32), num_wake=14, wake_start=250))
    assert text == f"14 rows of 32 from id 250 on; {wrong}"  # the last one is right
    kept = "no sentry of the original notebooks, which hold 'embeddings', 'step', 'wake_start'"
    for changes in ({"embeddings": Path("x")}, {"step": "x"}, {"embeddings": [1]}):
        assert refusal(seed_file(seed, **changes)).startswith(kept)
    data = seed_file(seed).read_bytes()
    for bad in (b"", b"no zip", data[: len(data) // 2]):
        seed.write_bytes(bad)
        assert refusal(seed).startswith(kept)
    text = refusal(seed_file(seed, step=40))
    assert text == f"{run}: has saves of its own; give a new run_dir"
    (run / "config.yaml").unlink()
    assert refusal(seed).startswith(f"{run / 'config.yaml'}: missing")


# ---- The command line ----------------------------------------------------------------------------


def test_command_line(tmp_path: Path, capsys) -> None:
    """Exit status and one line on stderr, from a real process; usage errors have status 2."""
    run = make_run(tmp_path)
    command = [sys.executable, recover.__file__, "export", str(run), str(run), "--format", "rows"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "Traceback" not in done.stderr
    capsys.readouterr()
    main(str(run))
    chosen = run / "snapshots" / "step_000040"
    listed = capsys.readouterr().out
    assert f"continue from {chosen}: step 40 of 3,000, 7 new words" in listed
    for command, status in ((("export", str(run)), 2), (("--help",), 0)):
        with pytest.raises(SystemExit) as caught:
            main(*command)
        assert caught.value.code == status
    assert capsys.readouterr().out.count("recover.py") > 3


@pytest.mark.parametrize("form", ["rows", "peft", "merged"])
def test_an_export_onto_a_full_disk_is_one_line_and_leaves_nothing(
    form: str, tmp_path: Path, capsys
) -> None:
    """A limit on the size of files stands for the disk."""
    run, limits = make_run(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    try:
        status = run_command(main, "export", str(run), str(tmp_path / "out"), "--format", form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert status == 1 and error.count("\n") == 1 and "File too large" in error
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
