"""Make tiny random models and runs of each family that the configs name: no network, no weights.

    make_model("gemma2")                       2 layers, hidden size 32, every weight random
    save_model("gemma2", tmp_path / "model")   the same beside a tokenizer: a model_name for Config
    make_overlay("gemma2"), make_batch(overlay)   20 new words over it, and the sequences of a step
    full_table_model(model, first_new_id, input_rows, output_rows)    the reference, tables resized
    Config(**tiny_settings(tmp_path, "gemma2", max_steps=4))          a run of a few seconds

A new family is one line in FAMILIES, LOOK_ALIKES or REFUSED. Making one takes 10 ms (2 CPU cores,
2026-11-22).
"""

import copy
import json
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from machine import StepBatch, Worker
from overlay import WakeOverlay, is_tied, output_mode
from recover import file_record, state_hash

CPU = Worker(0, 1, torch.device("cpu"), torch.float32, "a CPU")  # the only process of a run
NUM_NEW = 20
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
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            "tie_word_embeddings": False,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
    ),
    # Their layers are elsewhere than in model.layers.
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {"tie_word_embeddings": False}),
    "opt": (  # its rows are narrower than its hidden states
        "OPTForCausalLM",
        "OPTConfig",
        {"tie_word_embeddings": True, "ffn_dim": 48, "word_embed_proj_dim": 16},
    ),
    # Their heads have a bias, or a scale.
    "phi": ("PhiForCausalLM", "PhiConfig", {"tie_word_embeddings": False}),
    "cohere": (
        "CohereForCausalLM",
        "CohereConfig",
        {"tie_word_embeddings": True, "logit_scale": 0.25},
    ),
    "granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        {"tie_word_embeddings": True, "logits_scaling": 8.0, "embedding_multiplier": 3.0},
    ),
    "mamba": (  # no attention; its embedding is called otherwise
        "MambaForCausalLM",
        "MambaConfig",
        {"tie_word_embeddings": True, "state_size": 8, "time_step_rank": 4},
    ),
    "gemma3_4b": (  # an ordinary decoder inside a model of texts and pictures
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {"query_pre_attn_scalar": 16, "sliding_window": 8},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
            },
            "mm_tokens_per_image": 4,
        },
    ),
}

# These have the parts of the others, and compute something else with them.
LOOK_ALIKES = {
    # Its MLP has the four attributes of Qwen's, and a norm before down_proj.
    "bitnet": ("BitNetForCausalLM", "BitNetConfig", {"tie_word_embeddings": True}),
    # Its MLP multiplies what goes in and comes out.
    "falcon_h1": (
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {
            "tie_word_embeddings": False,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 2,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mlp_multipliers": [2.0, 0.5],
            "lm_head_multiplier": 0.5,
        },
    ),
    # Its attention makes a mask of its own from the causal one and the values.
    "doge": ("DogeForCausalLM", "DogeConfig", {"tie_word_embeddings": True}),
}

T5_SHAPE = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}

# name -> (model class, config class, what differs from SHAPE, the UserError's text)
SERVES = "the overlay serves causal language models with one embedding and one linear head"
REFUSED = {
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5_SHAPE,
        f"T5ForConditionalGeneration has no input embedding and output head of one text; {SERVES}",
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
        "Gemma3nForCausalLM looks its tokens up in a second table, embed_tokens_per_layer, which"
        f" has no rows for new words; {SERVES}",
    ),
    "bert_encoder": (
        "BertModel",
        "BertConfig",
        {},
        f"BertModel has no input embedding and output head of one text; {SERVES}",
    ),
}


def make_model(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes
) -> nn.Module:
    """Make a random model in eval mode, frozen; weights so large that logits differ by units."""
    model_class, config_class, changes = (FAMILIES | LOOK_ALIKES | REFUSED)[family][:3]
    changes = changes | sizes
    if text := changes.get("text_config"):
        changes = {**changes, "text_config": SHAPE | text}
    else:
        changes = SHAPE | changes
    config = getattr(transformers, config_class)(**changes)
    model = getattr(transformers, model_class)(config)
    fill_with_random_weights(model, seed)
    return model.to(dtype).requires_grad_(False).eval()


@torch.no_grad()
def fill_with_random_weights(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        random = torch.randn(parameter.shape, generator=generator)
        # Norms stay near what they are; matrices get random numbers.
        parameter.copy_(0.3 * random if parameter.dim() > 1 else parameter + 0.1 * random)


def make_tokenizer() -> Tokenizer:
    """Make a byte-level tokenizer of FIRST_NEW_ID ids: one token a byte, and <|endoftext|>.

    Transformers 5 would add <|endoftext|> to a qwen2 tokenizer that has none.
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
    """Write model and tokenizer as an ordinary local folder."""
    model.save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def full_table_model(
    model: nn.Module, first_new_id: int, input_rows: Tensor, output_rows: Tensor | None = None
) -> nn.Module:
    """Copy the untouched model with resized tables: its rows below first_new_id, then the new ones.

    This is the independent reference: the library's own resizing, head, loss and autograd. If
    output_rows is None, the head uses input_rows too, and is tied if the model's own head is.
    """
    full = copy.deepcopy(model)
    if output_rows is not None and is_tied(model):
        full.config.get_text_config().tie_word_embeddings = full.config.tie_word_embeddings = False
        head = full.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
    full._init_weights = lambda _: None  # xLSTM's fails on a lone table; each row is set below
    full.resize_token_embeddings(first_new_id + len(input_rows), mean_resizing=False)
    head = full.get_output_embeddings()
    rows = input_rows if output_rows is None else output_rows
    with torch.no_grad():
        full.get_input_embeddings().weight[first_new_id:] = input_rows
        head.weight[first_new_id:] = rows
        if head.bias is not None:
            head.bias[first_new_id:] = 0
    return full.eval()


def random_rows(model: nn.Module, num_rows: int, seed: int) -> Tensor:
    """Make (num_rows, H) fp32 of the size of the model's own rows."""
    generator, width = (
        torch.Generator().manual_seed(seed),
        model.get_input_embeddings().weight.shape[1],
    )
    return 0.3 * torch.randn(num_rows, width, generator=generator)


def make_overlay(
    family: str = "qwen2_untied",
    output_rows: str = "auto",
    dtype: torch.dtype = torch.float32,
    num_new: int = NUM_NEW,
) -> WakeOverlay:
    """Put an overlay of random rows over a random model; it is not installed."""
    model = make_model(family, dtype)
    mode = output_mode(output_rows, is_tied(model))
    rows = [random_rows(model, num_new, seed) for seed in (1, 2)[: 1 if mode == "shared" else 2]]
    return WakeOverlay(model, FIRST_NEW_ID, *rows, train_output=mode != "frozen")


def random_ids(*shape: int, seed: int = 3) -> Tensor:
    """Draw ids, half of them of NUM_NEW new words."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(0, FIRST_NEW_ID, shape, generator=generator)
    new = torch.randint(FIRST_NEW_ID, FIRST_NEW_ID + NUM_NEW, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, new, base)


def make_batch(overlay: WakeOverlay, size: int = 8, seq_len: int = 10) -> StepBatch:
    """Make a step's sequences; together they hold every new id as input and as target."""
    stream = random_ids(size * seq_len + 1)
    stream[1 : NUM_NEW + 1] = torch.arange(FIRST_NEW_ID, FIRST_NEW_ID + NUM_NEW)
    x, y = stream[:-1].view(size, seq_len), stream[1:].view(size, seq_len)
    return StepBatch(1, x, y, overlay.base_embed(x), x, torch.arange(size))


def write_words(folder: Path, num_words: int = 20) -> dict[str, str]:
    """Write a lexicon of invented words, and a text with each of them often -> Config's keys."""
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


def tiny_settings(folder: Path, family: str = "qwen2_untied", **changes) -> dict:
    """Give Config's keys for a run of a few seconds on a CPU, with all its files in `folder`."""
    return {
        "model_name": str(save_model(family, folder / "model")), **write_words(folder),
        "run_dir": str(folder / "run"), "quantization": "none", "device": "cpu", "seq_len": 16,
        "effective_batch_size": 4, "micro_batch_size": 4, "max_steps": 8, "learning_rate": 0.01,
        "log_every": 1, "eval_every": 4, "save_every": 2, "val_fraction": 0.1,
    } | changes  # fmt: skip


def step_losses(run_dir: Path) -> list[float]:
    """Read the training losses in a run folder's metrics.jsonl, step by step."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]


def wait_for(condition, what: str) -> None:
    """Wait until the condition holds, for five minutes at the most; then `what` has failed."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def wait_for_step(run_dir: Path, step: int) -> None:
    """Wait until metrics.jsonl of a run in progress shows the step."""
    metrics, line = run_dir / "metrics.jsonl", f'"step": {step}, "kind": "train"'
    wait_for(lambda: metrics.exists() and line in metrics.read_text(), "the run got not so far")


def edit_state(path: Path, **changes) -> None:
    """Change what a sentry says of itself; sizes and hashes agree with its files again."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8")) | changes
    state["files"]["rows.safetensors"] = file_record(path / "rows.safetensors")
    state["sha256"] = state_hash(state)
    (path / "state.json").write_text(json.dumps(state), encoding="utf-8")
