"""Tiny random models of each family that the configs name, for the tests: no network, no weights.

    make_model("gemma2")                       2 layers, hidden size 32, every weight random
    save_model("gemma2", tmp_path / "model")   the same beside a tokenizer: a model_name for Config
    full_table_model(model, first_new_id, input_rows, output_rows)    the reference, tables resized

A new family is one line in FAMILIES or REFUSED. Making one takes 10 ms (2 CPU cores, 2026-11-22).
"""

import copy
import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

FIRST_NEW_ID = 257  # 256 bytes and one special token
TABLE_ROWS = 264  # 7 padding rows, as Qwen2.5-14B's table has 399
SHAPE = {
    "vocab_size": TABLE_ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip

# name -> (model class, config class, what differs from SHAPE)
FAMILIES = {
    "qwen2_untied": ("Qwen2ForCausalLM", "Qwen2Config", {"tie_word_embeddings": False}),
    "qwen2_tied": ("Qwen2ForCausalLM", "Qwen2Config", {"tie_word_embeddings": True}),
    "llama_untied": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": False}),
    "llama_tied": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"tie_word_embeddings": True, "vocab_size": FIRST_NEW_ID},  # no padding rows
    ),
    "mistral": (
        "MistralForCausalLM",
        "MistralConfig",
        {"tie_word_embeddings": False, "sliding_window": None},
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "final_logit_softcapping": 5.0,  # small, so that it bends the logits of a random model
            "attn_logit_softcapping": 2.0,
            "attn_implementation": "eager",  # the only one that caps attention
        },
    ),
    "gemma3": (  # its embedding scales, in every version; Gemma 2's in newer ones than 5.0.0
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 8},
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {"tie_word_embeddings": False}),
}

WITH_LAYERS = "the overlay serves models with their decoder layers in model.base_model.layers"
UNKNOWN_LOGITS = (  # a pattern: the number is the model's own
    r"computes logits from its hidden states in a way the overlay does not know"
    r" \(relative difference \S+ on a probe\); it cannot be trained exactly"
)
T5_SHAPE = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}

# name -> (model class, config class, what differs from SHAPE, the OverlayError's text)
SERVES = "the overlay serves causal language models with one embedding and one linear head"
REFUSED = {
    "cohere": (
        "CohereForCausalLM",
        "CohereConfig",
        {"logit_scale": 0.0625},
        f"CohereForCausalLM {UNKNOWN_LOGITS}",
    ),
    "phi_head_bias": (
        "PhiForCausalLM",
        "PhiConfig",
        {},
        f"PhiForCausalLM has a Linear head with a bias or no weight; {SERVES}",
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5_SHAPE,
        f"T5ForConditionalGeneration has no input embedding and output head of one text; {SERVES}",
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 2},
        f"GPT2LMHeadModel has no such layers; {WITH_LAYERS}",
    ),
    "gemma3n": (  # a second embedding, looked up layer by layer
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            "vocab_size_per_layer_input": TABLE_ROWS,
            "hidden_size_per_layer_input": 8,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        f"Gemma3nForCausalLM {UNKNOWN_LOGITS}",
    ),
    "bert_encoder": (
        "BertModel",
        "BertConfig",
        {},
        f"BertModel has no input embedding and output head of one text; {SERVES}",
    ),
}

if transformers.__version__.startswith("4."):  # its base_model_prefix names an attribute it lacks
    REFUSED["gemma3"] = (
        *FAMILIES.pop("gemma3"),
        (f"Gemma3ForCausalLM has no such layers; {WITH_LAYERS}"),
    )


def make_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A random model in eval mode, frozen; its weights are so large that logits differ by units."""
    model_class, config_class, changes = (FAMILIES | REFUSED)[family][:3]
    config = getattr(transformers, config_class)(**{**SHAPE, **changes})
    model = getattr(transformers, model_class)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            random = torch.randn(parameter.shape, generator=generator)
            # norms stay near what they are, matrices get random numbers
            parameter.copy_(0.3 * random if parameter.dim() > 1 else parameter + 0.1 * random)
    return model.to(dtype).requires_grad_(False).eval()


def make_tokenizer() -> Tokenizer:
    """Byte-level, one token a byte, and <|endoftext|>: FIRST_NEW_ID ids.

    <|endoftext|>, because transformers 5 adds it to a qwen2 tokenizer that has none.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def save_model(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    return save_folder(make_model(family, dtype), folder)


def save_folder(model: nn.Module, folder: Path) -> Path:
    """Model and tokenizer as an ordinary local folder."""
    model.save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def full_table_model(
    model: nn.Module, first_new_id: int, input_rows: Tensor, output_rows: Tensor | None = None
) -> nn.Module:
    """A copy of the untouched model with resized tables: rows below first_new_id, then the new.

    The independent reference: the library's own embedding, head, loss and autograd. Trainable.
    output_rows None: the head uses input_rows too, and is tied where the model ties its own.
    """
    config = copy.deepcopy(model.config)
    config.vocab_size = first_new_id + len(input_rows)
    config.tie_word_embeddings = config.tie_word_embeddings and output_rows is None
    full = type(model)(config).to(model.dtype)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = {"model.embed_tokens.weight": input_rows}
    rows["lm_head.weight"] = input_rows if output_rows is None else output_rows
    for name, new in rows.items():
        state[name] = torch.cat([state[name][:first_new_id], new.to(model.dtype)])
    full.load_state_dict(state)
    return full.eval()


def random_rows(model: nn.Module, num_rows: int, seed: int) -> Tensor:
    """(num_rows, hidden) fp32, of the size of the model's own rows."""
    generator = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(num_rows, model.config.hidden_size, generator=generator)


def write_words(folder: Path, num_words: int = 20) -> dict[str, str]:
    """A lexicon of invented words, and a text that holds each of them often -> Config's keys."""
    words = [
        a + b for a in ("glim", "bor", "vash", "tru", "quen") for b in ("ock", "ish", "ump", "ael")
    ]
    words = words[:num_words]
    lines = [
        f"the {words[i % num_words]} saw a {words[(3 * i + i // 7) % num_words]} by day {i}\n"
        for i in range(160)
    ]
    (folder / "lexicon.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (folder / "corpus.txt").write_text("".join(lines), encoding="utf-8")
    return {"lexicon": str(folder / "lexicon.txt"), "corpus": str(folder / "corpus.txt")}


def step_losses(run_dir: Path) -> list[float]:
    """The training losses in a run folder's metrics.jsonl, step by step."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]
