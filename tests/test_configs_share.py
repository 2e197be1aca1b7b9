"""Proves what the YAML files in configs/ promise: they share a recipe and say what differs.

    python -m pytest tests/test_configs_share.py        (8 s on 2 CPU cores, 2026-11-25)

The memory estimates in the comments are compared with what `train.py --dry-run` computes.
"""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from config import load_config

CONFIGS = Path(__file__).parent.parent / "configs"
MODELS = ["llama3b", "llama8b", "mistral7b", "qwen14b", "smollm2", "tinyllama"]
# model type, hidden, layers, heads, key-value heads, MLP width, table rows, tied head, new words of
# a lexicon of 44,990
SHAPES = {
    "smollm2": ("llama", 576, 30, 9, 3, 1536, 49152, True, 44_300),
    "tinyllama": ("llama", 2048, 22, 32, 4, 5632, 32000, False, 44_585),
    "llama3b": ("llama", 3072, 28, 24, 8, 8192, 128256, True, 44_195),
    "llama8b": ("llama", 4096, 32, 32, 8, 14336, 128256, False, 44_195),
    "mistral7b": ("mistral", 4096, 32, 32, 8, 14336, 32000, False, 44_585),
    "qwen14b": ("qwen2", 5120, 48, 40, 8, 13824, 152064, False, 44_223),
    "qwen14b_devlog": ("qwen2", 5120, 48, 40, 8, 13824, 152064, False, 44_223),
}
SHAPE_KEYS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "tie_word_embeddings",
)  # fmt: skip


def text_of(name: str) -> str:
    return (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")


def values_of(name: str) -> dict:
    return dataclasses.asdict(load_config(CONFIGS / f"{name}.yaml"))


def differing_keys(a: str, b: str) -> set[str]:
    first, second = values_of(a), values_of(b)
    return {key for key in first if first[key] != second[key]}


def test_the_configs_are_these():
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    assert names == sorted([*MODELS, "qwen14b_devlog", "sample"])


@pytest.mark.parametrize("name", MODELS)
def test_models_share_all_but_name_and_folder(name):
    assert differing_keys(name, "qwen14b") <= {"model_name", "run_dir", "known_words"}
    below = [text_of(n).partition("# ---- Below this line")[2] for n in (name, "qwen14b")]
    assert below[0] == below[1] and len(below[0]) > 1000, "the shared part differs in its comments"


def test_the_devlog_run_is_the_original_to_the_letter():
    wanted = {
        "model_name": "Qwen/Qwen2.5-14B", "quantization": "nf4", "token_matching": "plain",
        "known_words": "exact_string",
        "init": "spherical", "init_radius": 1.5, "output_rows": "frozen", "micro_batch_size": 1,
        "effective_batch_size": 16, "seq_len": 128, "learning_rate": 5e-4, "warmup_ratio": 0.05,
        "max_steps": 3000, "save_every": 20, "eval_every": 50, "gradient_checkpointing": "true",
    }  # fmt: skip
    values = values_of("qwen14b_devlog")
    assert {key: values[key] for key in wanted} == wanted


def test_every_difference_from_the_devlog_is_said_in_its_line():
    text, devlog = text_of("qwen14b"), values_of("qwen14b_devlog")
    said = dict(re.findall(r"^(\w+):.*# devlog: ([\w.-]+)[;,]", text, re.MULTILINE))
    differing = differing_keys("qwen14b", "qwen14b_devlog") - {"run_dir"}
    assert said.keys() == differing
    for key, value in said.items():
        kind = type(devlog[key])
        assert kind(value) == devlog[key], key


@pytest.mark.parametrize("name", [*MODELS, "qwen14b_devlog", "sample"])
def test_each_config_says_what_it_needs_and_holds_no_absolute_path(name):
    text, values = text_of(name), values_of(name)
    assert f"#     python train.py configs/{name}.yaml\n" in text
    assert "# Licence: " in text
    assert values["run_dir"] == f"runs/{name}" and values["sentry_dir"] is None
    assert not re.search(r"(^|[\s=\"'])[/~][\w/]", text), "an absolute path"
    assert ("hf auth login" in text) == (name in ("llama3b", "llama8b", "mistral7b"))
    if name != "sample":
        assert re.search(r"# Disk: [\d.]+ GB .*GPU memory, an estimate", text)


@pytest.mark.parametrize("name", SHAPES)
def test_the_memory_estimate_is_the_memory_plans(name, tmp_path):
    from machine import memory_plan, model_without_weights

    *shape, num_new = SHAPES[name]
    (tmp_path / "config.json").write_text(json.dumps(dict(zip(SHAPE_KEYS, shape))), "utf-8")
    config = load_config(CONFIGS / f"{name}.yaml", f"model_name={tmp_path}")
    micro = 16 if config.micro_batch_size == "auto" else config.micro_batch_size
    plan = memory_plan(model_without_weights(config), num_new, config, micro)["total"]
    said = float(re.search(r"an estimate.*?: ([\d.]+) GiB", text_of(name))[1])
    assert said == pytest.approx(plan, rel=0.1, abs=0.3)  # the comment is rounded
