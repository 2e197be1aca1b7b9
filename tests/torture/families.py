"""Try the overlay on every causal language model that the installed transformers knows.

    python tests/torture/families.py               all, as a markdown table
    python tests/torture/families.py gpt2 mamba    some of them

Each family is a random model of two layers, with its head tied and untied. "exact" means that the
logits, the loss and the gradients of all new rows are those of the library's own model with
resized tables, in float32. Otherwise the table has the one line that refuses the model. Anything
else, a traceback or another number, is an error, and the exit status is then 1.
"""

import inspect
import json
import multiprocessing
import os
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
from tiny_models import (
    CPU, FIRST_NEW_ID, NUM_NEW, fill_with_random_weights, full_table_model, make_batch, random_rows,
)  # fmt: skip

from config import UserError
from machine import StepPlan, accumulate, random_model_of
from overlay import LossScale, Optimizer, WakeOverlay, check_model, is_tied

TIMEOUT_SECONDS = 90
TOLERANCE = 2e-4  # of the largest entry; float32, through recurrent and gated layers
# What is small in every family, under the names that configs use. A config takes what it knows.
SMALL = {
    "vocab_size": 264, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "emb_dim": 32,
    "embedding_size": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "ffn_hidden_size": 48, "dim_ff": 48, "dff": 48, "n_inner": 48, "feed_forward_hidden_size": 48,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16, "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2,
    "n_layers": 2, "decoder_layers": 2, "encoder_layers": 2, "num_decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "num_kv_heads": 2, "head_dim": 8, "rotary_dim": 4, "max_position_embeddings": 128,
    "n_positions": 128, "max_seq_len": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "index_head_dim": 16,
    "index_n_heads": 2, "index_topk": 64, "state_size": 8, "time_step_rank": 4, "mamba_d_state": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "mamba_n_groups": 1, "mamba_d_ssm": 64, "n_groups": 1, "mamba_expand": 2, "expand": 2,
    "lru_width": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "query_pre_attn_scalar": 16,
    "sliding_window": 8, "global_head_dim": 8, "num_global_key_value_heads": 2,
    "vocab_size_per_layer_input": 264, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
    "num_kv_shared_layers": 0, "image_size": 16, "patch_size": 8, "depth": 1, "num_channels": 3,
    "logits_scaling": 8.0, "logit_scale": 0.25, "lm_head_multiplier": 0.5,
    "final_logit_softcapping": 5.0, "logits_soft_cap": 5.0, "out_hidden_size": 32,
    "text_hidden_size": 32, "use_mamba_kernels": False,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
# Models that ask for one of these do not read a text alone, and the scripts must refuse them.
NOT_A_TEXT = ("pixel_values", "shared_kv_states")
# In the place of picture parts that need another package; only texts are tried.
PICTURES = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8,
    "model_args": {"embed_dim": 32},
}  # fmt: skip
# What a family needs beside these, because its sizes hang together.
SPECIAL = {
    **dict.fromkeys(
        (
            "qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm4v_moe_text", "glm_ocr_text",
            "hunyuan_vl_text", "paddleocr_vl_text", "qwen2_5_omni_text", "qwen3_vl_text",
            "qwen3_vl_moe_text",
        ),
        {"rope_parameters": MROPE, "rope_scaling": MROPE},
    ),
    "Glm4vMoe_text": {"rope_scaling": MROPE, "partial_rotary_factor": 1.0},  # in 4.57.6
    "ernie4_5_vl_moe_text": {"rope_parameters": MROPE | {"mrope_section": [1, 1, 2]}},
    "apertus1p5": {"image_token_offset": 100, "audio_token_offset": 200},
    "wavtokenizer_encoder": {"codebook_dim": 32, "codebook_size": 8},
    "apertus1p5_vision_tokenizer": {"codebook_size": 100},
    "blt_local_encoder": {"hidden_size_global": 32},
    "blt_local_decoder": {"hidden_size_global": 32},
    "chameleon": {"vocabulary_map": {"<image>": 3}},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma_text": {"top_k_experts": 2},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "glm5_next_text": {"num_key_value_heads": 4, "qk_rope_head_dim": 0},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1], "downsample_rate": "1/1",
        "vision_config": PICTURES | {"hidden_size": 64},
    },
    **dict.fromkeys(("fast_vlm", "perception_lm"), {"vision_config": PICTURES}),
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "molmo2_adapter": {"vision_feature_layer": [-1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "mllama_text_model": {"rope_scaling": ROPE},
    "transfo-xl": {"cutoffs": [100, 200], "div_val": 1, "d_embed": 32},
    "radio": {"video_temporal_patch_size": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "zamba": {"layer_types": ["hybrid", "hybrid"]},
    "chameleon_vqgan": {"num_embeddings": 8},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "gemma3n_text": {"activation_sparsity_pattern": [0.0] * 2, "intermediate_size": [48, 48]},
    "gemma3_text": {"final_logit_softcapping": None},  # as all of them have it
    "opt": {"word_embed_proj_dim": 16},
    "recurrent_gemma": {"block_types": ("recurrent", "attention")},
    "xlstm": {"num_blocks": 2},
    "dots3_note": {"num_key_value_heads": 4}, "dots3_note_text": {"num_key_value_heads": 4},
    "glm5_next": {"num_key_value_heads": 4}, "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gemma4_unified_assistant": {"hidden_size_per_layer_input": 0},
}  # fmt: skip


def small_settings(config_class: type, model_type: str) -> dict:
    """Choose the values of SMALL that this class knows, for its text and its picture part too."""
    default = config_class()
    defaults = default.to_dict()
    known = {*defaults, *inspect.signature(config_class.__init__).parameters}
    known |= set(getattr(config_class, "attribute_map", {}))
    settings = {name: value for name, value in SMALL.items() if name in known}
    if "vocab_size" not in known:  # a part that has no tokens
        settings = {name: n for name, n in settings.items() if not name.endswith("_token_id")}
    if "kv_lora_rank" in known:  # DeepSeek's attention: as many keys as queries
        settings |= {"num_key_value_heads": 4}
    num_layers = {defaults.get(name) for name in SMALL if "layer" in name}
    for name, values in defaults.items():
        if not isinstance(values, list | tuple):
            continue
        if name in settings:  # a list of sizes
            settings[name] = [settings[name]] * len(values)
        elif len(values) > 2 and len(values) in num_layers and isinstance(values[0], str):
            kinds = sorted(set(values))  # one layer of each kind, up to two
            settings[name] = [kinds[i % len(kinds)] for i in range(2)]
        elif len(values) > 2 and len(values) in num_layers:
            settings[name] = list(values[:2])
    for name in ("rope_parameters", "rope_scaling"):
        rope = defaults.get(name)
        if isinstance(rope, dict) and "mrope_section" in rope:
            settings[name] = rope | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
    for part in getattr(config_class, "sub_configs", {}):
        if part in known and getattr(default, part, None) is not None:
            part_class = type(getattr(default, part))
            part_type = part_class.model_type
            settings[part] = small_settings(part_class, part_type) | {"model_type": part_type}
    return settings | SPECIAL.get(model_type, {})


def make_family(model_type: str, tied: bool) -> nn.Module:
    """Make a random model of two layers. Raises: whatever the library does not like."""
    config_class = transformers.CONFIG_MAPPING[model_type]
    settings = small_settings(config_class, model_type)
    config = config_class(**settings)
    for part in (config, config.get_text_config(decoder=True)):
        part.tie_word_embeddings = tied
    model = random_model_of(config)
    fill_with_random_weights(model)
    model.tie_weights()
    return model.float().requires_grad_(False).eval()


def relative(ours: Tensor, truth: Tensor) -> float:
    """Divide the largest difference by the largest entry; NaN becomes infinity."""
    difference = (ours.double() - truth.double()).abs().max() / truth.double().abs().max()
    return difference.nan_to_num(nan=float("inf")).item()


def compare(model: nn.Module, tied: bool) -> dict[str, float]:
    """Compare logits, loss and row gradients of the overlay with those of resized tables."""

    rows = [random_rows(model, NUM_NEW, seed) for seed in (1, 2)[: 2 - tied]]
    reference = full_table_model(model, FIRST_NEW_ID, *rows).requires_grad_(True)
    overlay = WakeOverlay(model, FIRST_NEW_ID, *rows)
    overlay.install()
    batch = make_batch(overlay, 4, 10)
    with torch.no_grad():
        installed = model(input_ids=batch.x, use_cache=False).logits
    logits = reference(input_ids=batch.x, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.y.flatten())
    loss.backward()
    total, _ = accumulate(StepPlan(3, 0), batch, overlay, CPU, LossScale(), lambda: None)
    found = {
        "logits": relative(installed, logits.detach()),
        "loss": relative(total / batch.y.numel(), loss.detach()),
    }
    truth = reference.get_input_embeddings().weight.grad[FIRST_NEW_ID:]
    if tied:
        Optimizer(overlay).gradient_norm()  # adds up the two sides of shared rows
        return found | {"gradients": relative(overlay.grad, truth)}
    inputs = torch.zeros_like(overlay.grad).index_add(0, overlay.used, overlay.input_grad)
    outputs = reference.get_output_embeddings().weight.grad[FIRST_NEW_ID:]
    grads = max(relative(inputs, truth), relative(overlay.grad, outputs))
    return found | {"gradients": grads}


def read_a_text(model: nn.Module) -> None:
    """Prove that the tiny model fits together. Raises: whatever the library does not like."""
    ids = torch.arange(9)[None]
    try:
        model(input_ids=ids, use_cache=False)
    except Exception:  # GLM-4V of transformers 4.57.6 reads a text only if it has a mask
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def verdict(model_type: str, tied: bool) -> tuple[str, str]:
    """Try one family: ("exact", the largest difference), ("refused", why), ("not made", why) if no
    tiny model of it can be made or run, or ("WRONG", what)."""
    try:
        model = make_family(model_type, tied)
        check_model(model, FIRST_NEW_ID)
        read_a_text(model)
    except UserError as error:
        return "refused", str(error)
    except Exception as error:  # such as a missing package
        if not any(name in str(error) for name in NOT_A_TEXT):
            return "not made", f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    if is_tied(model) != tied:
        return "not made", "its head cannot be tied" if tied else "its head is always tied"
    try:
        differences = compare(model, tied)
    except UserError as error:
        return "refused", str(error)
    except Exception as error:
        return "WRONG", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    worst = max(differences, key=differences.get)
    if differences[worst] > TOLERANCE:
        return "WRONG", f"{worst} differ by {differences[worst]:.2g}"
    return "exact", f"{differences[worst]:.0e}"


def child(connection, model_type: str) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    connection.send([verdict(model_type, tied) for tied in (True, False)])


def in_a_process(model_type: str) -> list[tuple[str, str]]:
    """Get the verdicts, tied and untied, from a process of its own, which may hang or die."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(sender, model_type))
    process.start()
    sender.close()
    try:
        if receiver.poll(TIMEOUT_SECONDS):
            return receiver.recv()
        return [("no answer", f"in {TIMEOUT_SECONDS} s")] * 2
    except EOFError:
        return [("WRONG", "the process died")] * 2
    finally:
        process.kill()
        process.join()


def main(*families: str) -> int:
    names = transformers.models.auto.modeling_auto
    wrapped = [
        name
        for name in names.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        if name in transformers.CONFIG_MAPPING
    ]
    families = families or sorted({*names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *wrapped})
    print(f"transformers {transformers.__version__}, torch {torch.__version__}\n")
    print("| family | tied | untied | why |\n|---|---|---|---|")
    counts = Counter()
    for family in families:
        results = in_a_process(family)
        counts.update(kind for kind, _ in results)
        whys = dict.fromkeys(why for kind, why in results if kind != "exact")
        print(f"| {family} | {results[0][0]} | {results[1][0]} | {'; '.join(whys)} |", flush=True)
    print(f"\n{json.dumps(counts)}")
    return int(counts["WRONG"] > 0)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
