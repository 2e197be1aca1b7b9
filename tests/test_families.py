"""Proves that each model family goes from extension to export, and others are refused in one line.

    python -m pytest tests/test_families.py

Every family in tiny_models.FAMILIES is a local folder with a byte-level tokenizer; the run is the
real `train.train`, continued from the middle, and its exports are read by plain transformers.
"""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    FAMILIES, FIRST_NEW_ID, NUM_NEW, REFUSED, make_model, random_rows, save_folder, tiny_settings,
)  # fmt: skip
from torch.nn import functional
from transformers import AutoTokenizer

import recover
import train
from config import Config, UserError
from extend_tokenizer import plan_new_words, read_corpus
from machine import auto_class
from overlay import WakeOverlay, is_tied


pytestmark = pytest.mark.usefixtures("quick")


def make_config(family: str, folder, **changes) -> Config:
    settings = {
        "seq_len": 24, "effective_batch_size": 8, "micro_batch_size": "auto", "max_steps": 20,
        "learning_rate": 0.02, "log_every": 10, "save_every": 10, "eval_every": 20,
        "prompts": ["the glimock saw"],
    }  # fmt: skip
    return Config(**tiny_settings(folder, family, **(settings | changes)))


def read_rows(config: Config, step: int) -> dict[str, torch.Tensor]:
    return load_file(f"{config.run_dir}/sentries/step_{step:06d}/rows.safetensors")


def library_loss(folder, config: Config, without: int | None = None) -> float:
    """Give held-out nats per token of an exported model and tokenizer, by transformers alone."""
    model = auto_class(config).from_pretrained(folder, dtype=torch.float32).eval()
    texts = read_corpus(config)
    data = train.load_data(config, plan_new_words(config, texts), texts)
    assert len(AutoTokenizer.from_pretrained(folder)) == FIRST_NEW_ID + NUM_NEW
    num_tokens = (len(data.val) - 1) // config.seq_len * config.seq_len
    x = data.val[:num_tokens].view(-1, config.seq_len)
    with torch.no_grad():
        logits = model(input_ids=x, use_cache=False).logits.flatten(0, 1)
    if without is not None:
        logits[:, without] = -torch.inf
    return functional.cross_entropy(logits, data.val[1 : num_tokens + 1]).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_from_extension_to_export(family, tmp_path):
    config = make_config(family, tmp_path)
    result = train.train(config)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text("utf-8").split("\n")[0])
    assert (first["step"], result["step"]) == (0, 20)
    assert result["val_loss"] < first["val_loss"]
    rows = read_rows(config, 20)
    model = make_model(family)
    untied, width = not is_tied(model), model.get_input_embeddings().weight.shape[1]
    assert ("output_rows" in rows) == untied
    assert rows["input_rows"].shape == (NUM_NEW, width)
    assert not torch.equal(rows["input_rows"], read_rows(config, 10)["input_rows"])

    # After a disconnect at step 15 the rest is done again, to the same bits.
    for folder in ("sentries", "snapshots"):
        shutil.rmtree(tmp_path / "run" / folder / "step_000020")
    again = train.train(config)
    assert again == result
    for name, tensor in read_rows(config, 20).items():
        assert torch.equal(tensor, rows[name]), name

    recover.main("export", config.run_dir, str(tmp_path / "rows"), "--format", "rows")
    exported = load_file(tmp_path / "rows" / "rows.safetensors")
    assert exported.keys() == {"input_rows", "output_rows"} & rows.keys()
    assert all(torch.equal(tensor, rows[name]) for name, tensor in exported.items())
    recover.main("export", config.run_dir, str(tmp_path / "merged"), "--format", "merged")
    assert library_loss(tmp_path / "merged", config) == pytest.approx(result["val_loss"], rel=1e-5)


def test_a_table_one_row_short_of_its_tokenizer(tmp_path):
    """As Gemma 3 1B and 270M: the last token, a special one, has no row and never comes."""
    config, short = make_config("gemma3", tmp_path), make_model("gemma3", vocab_size=256)
    save_folder(short, tmp_path / "model")
    result = train.train(config)
    recover.main("export", config.run_dir, str(tmp_path / "merged"), "--format", "merged")
    table = load_file(tmp_path / "merged" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(table[:256], short.get_input_embeddings().weight)
    assert not table[256].any() and torch.equal(table[257:], read_rows(config, 20)["input_rows"])
    # The exported model gives that token a logit of 0, and by that other losses.
    loss = library_loss(tmp_path / "merged", config, without=256)
    assert loss == pytest.approx(result["val_loss"], rel=1e-5)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(corpus.read_text(encoding="utf-8") + "<|endoftext|>", encoding="utf-8")
    with pytest.raises(UserError, match="^corpus: it holds the token 256, for which Gemma3ForCau"):
        train.train(dataclasses.replace(config, run_dir=str(tmp_path / "again")))


@pytest.mark.parametrize("family", ["gemma2", "phi3"])
def test_a_family_trains_in_nf4(family, tmp_path):
    """The body is in 4 bits through bitsandbytes, and the rows still learn."""
    pytest.importorskip("bitsandbytes")
    config = make_config(family, tmp_path, quantization="nf4", prompts=[])
    results = []
    for changes in ({}, {"run_dir": str(tmp_path / "untrained"), "learning_rate": 1e-30}):
        results.append(train.train(dataclasses.replace(config, **changes)))
    trained, untrained = results
    assert trained["val_loss"] < untrained["val_loss"]


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_the_overlay_cannot_serve_is_refused_in_one_line(family):
    model = make_model(family)
    rows = [random_rows(model, 3, seed) for seed in (1, 2)]
    with pytest.raises(UserError) as caught:
        WakeOverlay(model, FIRST_NEW_ID, *rows).install()
    (problem,) = caught.value.problems
    assert problem == REFUSED[family][3]


def test_a_model_too_large_for_float16_is_told_from_one_that_the_overlay_does_not_know():
    model = make_model("qwen2_untied").half()
    model.model.norm.weight.data.fill_(60_000.0)
    rows = [random_rows(model, 3, seed) for seed in (1, 2)]
    with pytest.raises(UserError) as caught:
        WakeOverlay(model, FIRST_NEW_ID, *rows).install()
    assert str(caught.value) == (
        "Qwen2ForCausalLM gives logits that are not finite in torch.float16; use compute_dtype"
        " bfloat16, or float32 on a card without it"
    )


def test_a_refused_family_stops_training_with_the_same_line(tmp_path):
    config = make_config("gemma3n", tmp_path)
    with pytest.raises(UserError) as caught:
        train.train(config)
    assert str(caught.value) == REFUSED["gemma3n"][3]
