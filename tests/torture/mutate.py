"""Puts small faults into the code, one at a time, and says which of them no test notices.

    python tests/torture/mutate.py [COUNT] [--only config.py] [--jobs 2]

Each fault is one replacement of text in one script. It is made in a copy of the repository, and the
tests that should notice it run there until the first failure. The faults are spread over what the
README promises: data order, held-out split, loss, gradients, schedule, optimizer, saves, exports,
ids and forms of words, limits of the config, error texts. Prints a line a fault and a table of the
survivors; the exit status is 1 if there is one that EXPECTED does not name. COUNT takes the first
faults of a fixed random order. Each test run is a fork of this process, which has the libraries
imported already.
"""

import argparse
import ast
import gc
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Script -> the test files that should notice a fault in it, unless the fault names others. A file
# may be followed by :: and one of its tests.
TESTS = {
    "config.py": "config",
    "env_shim.py": "env_shim",
    "extend_tokenizer.py": "word_forms extend_tokenizer",
    "overlay.py": "overlay loss adafactor",
    "machine.py": "machine overlay",
    "recover.py": "recover export",
    "train.py": "data records survival",
}
# What the tests import sooner or later, beside what forked.py names.
LIBRARIES = (
    "hypothesis", "peft", "torch._dynamo", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.models.gemma2.modeling_gemma2",
)  # fmt: skip
SECONDS = 300  # a fault that makes the tests hang is noticed too
# Survivors that change nothing a user could see, and why: (script, old text) -> reason.
EXPECTED = {
    (
        "recover.py",
        "sync(part / name)\n            fault_point",
    ): "the whole folder is synced before"
    " it gets its name; synced here too, so that the read back asks the disk or mount",
    (
        "extend_tokenizer.py",
        'normalized=matching == "plain"',
    ): "texts are in composed form, in which both match the same",
    (
        "train.py",
        "if step <= warmup_steps:",
    ): "the warm-up's last rate and the cosine's first are both the peak",
}

# One fault: script, its text, the faulty text[, tests that should notice, if not those of TESTS].
# ruff: noqa: E501
# fmt: off
FAULTS = [
    # Settings: limits, types, unknown keys, what makes another run, files written safely.
    ("config.py", '"tokens a sequence", low=2)', '"tokens a sequence", low=1)'),
    ("config.py", 'low=0.0, high=1.0)', 'low=0.0)'),
    ("config.py", 'above=0.0, high=0.5)', 'above=0.0, high=0.6)'),
    ("config.py", 'low=0, high=10**9)', 'low=0)'),
    ("config.py", 'result <= limits.get("above", -math.inf)', 'result < limits.get("above", -math.inf)'),
    ("config.py", 'too_low or result > limits.get("high", result)', 'too_low'),
    ("config.py", 'if math.isinf(result):', 'if False:'),
    ("config.py", 'micro != "auto" and effective % micro:', 'micro != "auto" and effective < micro:'),
    ("config.py", 'WHOLE, int)', 'WHOLE, lambda t: int(t, 0))', "config properties"),
    ("config.py", 'lambda t: t in ("true", "yes", "on")', 'lambda t: t in ("true", "on")'),
    ("config.py", '(as_written and isinstance(value, bool))', 'False'),
    ("config.py", 'elif name in values:', 'elif False:'),
    ("config.py", 'elif name in overridden:', 'elif False:'),
    ("config.py", 'problems.append(f"unknown key {name!r}, {nearest_key(str(name))}")', 'continue'),
    ("config.py", 'meant = ALIASES.get(name.lower(), close[0])', 'meant = close[0]'),
    ("config.py", 'if problems:\n        where', 'if problems[1:]:\n        where'),
    ("config.py", 'or as random directions", choices', 'or as random directions", changes_run=False, choices'),
    ("config.py", 'setting(0.1, "share of the corpus held out", above', 'setting(0.1, "share of the corpus held out", changes_run=False, above', "config survival::test_each_key_of_a_changed_config"),
    ("config.py", 'before=0.0, low=0.0)', 'low=0.0)', "config survival::test_a_save_of_the_old_format_is_continued"),
    ("config.py", 'before="exact_string", choices', 'choices', "config survival::test_a_save_of_the_old_format_is_continued"),
    ("config.py", 'before="spaced", choices', 'choices', "config survival::test_a_save_of_the_old_format_is_continued"),
    ("config.py", 'sort_keys=False, allow_unicode=True)', 'sort_keys=True, allow_unicode=True)'),
    ("config.py", 'for inner in (*part.rglob("*"), part):\n            sync(inner)', 'pass', "power_loss"),
    ("config.py", 'for inner in (*part.rglob("*"), part):', 'for inner in (part,):', "power_loss"),
    ("config.py", 'for inner in (*part.rglob("*"), part):', 'for inner in part.rglob("*"):', "power_loss"),
    ("config.py", 'part.replace(path)\n        sync(path.parent)', 'part.replace(path)', "power_loss"),
    ("config.py", 'if old.exists() and not path.exists():\n        old.rename(path)', 'if False:\n        pass', "config power_loss"),
    ("config.py", 'if not path.is_dir() or error.errno not in', 'if error.errno not in'),
    ("config.py", 'part.write_bytes(text.encode())', 'part.write_bytes(text.encode().replace(b"\\r", b""))'),
    ("config.py", '[:500]', '[:50]', "config export::test_an_export_onto_a_full_disk_is_one_line_and_leaves_nothing"),
    ("config.py", 'print(str(error), file=sys.stderr)\n        return 1', 'print(str(error), file=sys.stderr)\n        return 0'),
    ("config.py", 'indent=1, ensure_ascii=False', 'indent=1'),

    # The environment: which patch acts when, what the check says.
    ("env_shim.py", 'version_tuple(first) <= version_tuple(version) < version_tuple(end)', 'version_tuple(first) <= version_tuple(version) <= version_tuple(end)'),
    ("env_shim.py", 'version_tuple(first) <= version_tuple(version) < version_tuple(end)', 'version_tuple(version) < version_tuple(end)'),
    ("env_shim.py", 'version.partition("+")[0]', 'version'),
    ("env_shim.py", 'if "HF_DEACTIVATE_ASYNC_LOAD" in os.environ:', 'if False:'),
    ("env_shim.py", 'if chosen or cuda_is_up or', 'if chosen or'),
    ("env_shim.py", 'del sys.modules[name]', 'pass'),
    ("env_shim.py", 'layer.support_avx512bf16_for_cpu = False', 'pass'),
    ("env_shim.py", 'version_tuple(version) < version_tuple(oldest):', 'version_tuple(version) <= version_tuple(oldest):'),
    ("env_shim.py", 'if version_tuple(loaded) != version_tuple(version):', 'if False:'),
    ("env_shim.py", 'if need_gpu and not torch.cuda.is_available():', 'if need_gpu and False:'),
    ("env_shim.py", 'if package != "bitsandbytes" or quantization != "none":', 'if True:'),
    ("env_shim.py", 'if gpu.major < 8:', 'if gpu.major < 7:'),
    ("env_shim.py", 'return 1 if problems else 0', 'return 0'),
    ("env_shim.py", 'sys.stderr if name == "problem" else sys.stdout', 'sys.stdout'),

    # Words and ids: lexicons, known words, forms, spellings, reports, saved tokenizers.
    ("extend_tokenizer.py", '"outer blanks": str.strip,', ''),
    ("extend_tokenizer.py", 'unicodedata.normalize("NFC", line)', 'unicodedata.normalize("NFD", line)'),
    ("extend_tokenizer.py", 'texts.append(unicodedata.normalize("NFC", text))', 'texts.append(text)'),
    ("extend_tokenizer.py", 'read_text(path, "corpus").removeprefix("\\ufeff")', 'read_text(path, "corpus")'),
    ("extend_tokenizer.py", 'if reserved and reserved.search(word):', 'if False:'),
    ("extend_tokenizer.py", 'if "," in word or ";" in word:', 'if "," in word:'),
    ("extend_tokenizer.py", 'return None if any(map(str.isalnum, word)) else', 'return None if True else'),
    ("extend_tokenizer.py", 'if count >= config.lexicon_min_count', 'if count > config.lexicon_min_count'),
    ("extend_tokenizer.py", 'len(ids) >= config.lexicon_min_base_tokens]', 'len(ids) > config.lexicon_min_base_tokens]'),
    ("extend_tokenizer.py", 'if kept.exists() and not fresh:', 'if kept.exists():', "extend_tokenizer survival::test_fresh_makes_a_lexicon_from_the_corpus_anew"),
    ("extend_tokenizer.py", 'config.lexicon_skip_capitalized and word[0].isupper()', 'False'),
    ("extend_tokenizer.py", 'refusal(word, pattern) and word not in excluded', 'refusal(word, pattern)'),
    ("extend_tokenizer.py", 'with_bos[0] if with_bos[:1] != without[:1] else None', 'None'),
    ("extend_tokenizer.py", 'max(base.get_vocab().values()) + 1', 'len(base.get_vocab())'),
    ("extend_tokenizer.py", 'if len(ids) == 1 or is_entry(base, content)}', 'if is_entry(base, content)}'),
    ("extend_tokenizer.py", 'UNSPACED.fullmatch(word) else space + word for word in words]', 'False else space + word for word in words]'),
    ("extend_tokenizer.py", 'if word not in known[rule]]', 'if word not in vocab]'),
    ("extend_tokenizer.py", 'rule, matching = "one_token", "both" if matching == "both" else "spaced"', 'pass'),
    ("extend_tokenizer.py", '[form for form in forms if form.content not in single]', 'forms'),
    ("extend_tokenizer.py", 'for word in sorted(words):', 'for word in words:'),
    ("extend_tokenizer.py", 'return {word[:n] for word in words for n in range(1, len(word))}', 'return words'),
    ("extend_tokenizer.py", 'and not hidden and reads_well(base, word)', 'and reads_well(base, word)'),
    ("extend_tokenizer.py", 'and not hidden and reads_well(base, word)', 'and not hidden'),
    ("extend_tokenizer.py", 'words = {form for e in entries if e.isalpha() for form in (e, e.lower())}', 'words = {e for e in entries if e.isalpha()}'),
    ("extend_tokenizer.py", '"two" if blanks == "  " else blanks[-1:]', 'blanks[-1:]'),
    ("extend_tokenizer.py", 'if len(ids) > 1 and not is_entry(base, form.content)]', ']'),
    ("extend_tokenizer.py", 'single_word=f.place == WHOLE_WORD', 'single_word=False'),
    ("extend_tokenizer.py", 'normalized=matching == "plain"', 'normalized=True'),
    ("extend_tokenizer.py", 'tokenizer.model.ignore_merges = True', 'pass'),
    ("extend_tokenizer.py", r'''"|".join([*patterns, r"(?<=<)0(?=x[0-9A-F]{2}>)"])''', '"|".join(patterns)'),
    ("extend_tokenizer.py", r'''rf"(?<!{SPACE}){SPACE}(?:%s)(?![{LETTER}])"''', r'''rf"{SPACE}(?:%s)(?![{LETTER}])"'''),
    ("extend_tokenizer.py", '"\\n".join([str(first_new_id), *words])', '"\\n".join(words)'),
    ("extend_tokenizer.py", '"\\n".join([str(first_new_id), *words])', '"\\n".join([str(first_new_id), *sorted(words)])'),
    ("extend_tokenizer.py", 'texts = [LEAD + part if j else part', 'texts = [part if j else part'),
    ("extend_tokenizer.py", 'if not figures["new_tokens"]:', 'if False:'),
    ("extend_tokenizer.py", 'clean_up_tokenization_spaces": False', 'clean_up_tokenization_spaces": True'),
    ("extend_tokenizer.py", '"model_input_names": ["input_ids", "attention_mask"],', ''),
    ("extend_tokenizer.py", 'max(0, table_rows - new.first_new_id)', 'table_rows - new.first_new_id'),
    ("extend_tokenizer.py", 'round(100 * num_words / new.first_new_id, 2)', 'round(100 * num_words / len(new.words), 2)'),
    ("extend_tokenizer.py", 'first_bad_line = first_bad_line or bad_line(', 'first_bad_line = bad_line('),
    ("extend_tokenizer.py", 'line += piece.count("\\n")', 'pass'),
    ("extend_tokenizer.py", 'of_words.update(dict(zip(new.words[new.num_words :], counts[new.num_words :])))', 'pass'),
    ("extend_tokenizer.py", 'if started and any(', 'if False and any('),

    # The overlay: look-up, loss and its gradients, Adafactor, what rows share, first values.
    ("overlay.py", 'torch.where(is_new, input_ids - self.first_new_id, 0)', 'torch.where(is_new, input_ids - self.first_new_id - 1, 0)'),
    ("overlay.py", 'torch.where(is_new[..., None], rows * self.embed_scale(), base_embeds)', 'torch.where(is_new[..., None], rows, base_embeds)', "overlay families"),
    ("overlay.py", 'rows = grad[is_new].float() * self.embed_scale()', 'rows = grad[is_new].float()', "overlay families"),
    ("overlay.py", 'self.grad.zero_()\n\n    def loss', 'pass\n\n    def loss'),
    ("overlay.py", 'self.base_rows, len(self.base_rows) if base_only else self.first_new_id,', 'self.base_rows, self.first_new_id,', "overlay loss data"),
    ("overlay.py", 'None if base_only else self.logit_rows.detach(),', 'self.logit_rows.detach(),', "overlay loss data"),
    ("overlay.py", 'self.grad if self.train_output else None, scale, self.formula', 'self.grad, scale, self.formula', "overlay adafactor"),
    ("overlay.py", 'base[:, first_new_id:] = -math.inf', 'pass'),
    ("overlay.py", 'total += new.sub_(largest[:, None]).exp_().sum(dim=1)', 'new.sub_(largest[:, None]).exp_()'),
    ("overlay.py", 'largest = torch.maximum(largest, new.amax(dim=1))', 'pass', "loss overlay"),
    ("overlay.py", 'target = torch.where(in_base, target, new[position, new_label])', 'pass'),
    ("overlay.py", 'base[position, base_label] -= (in_base & valid).float()', 'base[position, base_label] -= in_base.float()', "loss overlay data"),
    ("overlay.py", 'new[position, new_label] -= (~in_base).float()', 'pass', "overlay adafactor"),
    ("overlay.py", 'torch.where(valid, largest + total.log() - target, 0.0)', 'largest + total.log() - target', "loss data"),
    ("overlay.py", 'weight = torch.where(valid, 1.0 / total, 0.0)[:, None]', 'weight = (1.0 / total)[:, None]', "loss data"),
    ("overlay.py", 'logits.mul_(slope)', 'pass', "overlay families"),
    ("overlay.py", 'slope = (1.0 - logits.square()).mul_(self.scale)', 'slope = 1.0 - logits.square()', "loss"),
    ("overlay.py", 'logits += self.bias[: logits.shape[-1]]', 'pass', "overlay families"),
    ("overlay.py", 'add_(matmul_fp32(d_block.T, hidden), alpha=scale)', 'add_(matmul_fp32(d_block.T, hidden))', "loss overlay"),
    ("overlay.py", 'grad_hidden += matmul_fp32(d_block, new_rows[block].to(hidden.dtype))', 'pass'),
    ("overlay.py", 'grad_hidden *= scale', 'pass'),
    ("overlay.py", 'scale = scale / FLOAT16_SOFTMAX_SCALE', 'pass', "loss"),
    ("overlay.py", 'self.good_steps % 200 == 0', 'self.good_steps % 100 == 0', "loss"),
    ("overlay.py", 'self.value, self.good_steps = self.value / 2, 0', 'self.value = self.value / 2', "loss"),
    ("overlay.py", 'if lowest < self.value:', 'if lowest > self.value:', "loss processes::test_the_lowest_loss_scale_is_everyones"),
    ("overlay.py", 'd_embeds.float() / loss_scale.value', 'd_embeds.float()', "loss"),
    ("overlay.py", 'decay = 1.0 - step**-0.8', 'decay = 1.0 - step**-0.7', "adafactor"),
    ("overlay.py", 'row.mul_(decay).add_(row_squares + 1e-30, alpha=1 - decay)', 'row.mul_(decay).add_(row_squares + 1e-30)', "adafactor"),
    ("overlay.py", 'column.mul_(decay).add_(column_squares + 1e-30, alpha=1 - decay)', 'column.copy_(column_squares + 1e-30)', "adafactor"),
    ("overlay.py", 'row_factor = (row / row.mean()).rsqrt()', 'row_factor = row.rsqrt()', "adafactor"),
    ("overlay.py", 'root_mean_square.clamp(min=1.0)', 'root_mean_square', "adafactor"),
    ("overlay.py", '.mul_(grad_scale).square_() / num_rows', '.square_() / num_rows', "adafactor data"),
    ("overlay.py", 'column_factor = column.rsqrt() * grad_scale', 'column_factor = column.rsqrt()', "adafactor data"),
    ("overlay.py", 'overlay.grad.index_add_(0, overlay.used, overlay.input_grad)', 'pass', "adafactor overlay"),
    ("overlay.py", 'for g in (overlay.grad, overlay.input_grad)]', 'for g in (overlay.grad, overlay.grad)]', "adafactor data"),
    ("overlay.py", 'overlay.grad.zero_()  # the buffer', '# the buffer', "adafactor"),
    ("overlay.py", 'found[f"{name}.column_mean_square"] = mean_squares["column"]', 'pass', "adafactor survival::test_n_steps_kill_n_steps_equal_2n"),
    ("overlay.py", 'KIN_LETTERS = (2, 3, 4)', 'KIN_LETTERS = (2, 3)', "adafactor"),
    ("overlay.py", 'KIN_MIN_WORDS = 3', 'KIN_MIN_WORDS = 2', "adafactor"),
    ("overlay.py", 'weight = kin_coupling / num_words.sqrt()', 'weight = kin_coupling / num_words', "adafactor"),
    ("overlay.py", 'weight[0] = row_coupling / math.sqrt(len(words))', 'weight[0] = row_coupling / len(words)', "adafactor"),
    ("overlay.py", 'return ["", *beginnings, *endings, ids[0], ~ids[-1], "=" + word]', 'return ["", *beginnings, *endings, ids[0], ~ids[-1]]', "adafactor word_forms"),
    ("overlay.py", 'columns += to_words @ (to_features @ columns)', 'columns.copy_(to_words @ (to_features @ columns))', "adafactor"),
    ("overlay.py", 'return "shared" if tied else "separate"', 'return "separate"', "overlay"),
    ("overlay.py", 'rows[block] = sums / lengths[:, None]', 'rows[block] = sums', "overlay"),
    ("overlay.py", 'std = math.sqrt((squares - total * total / count) / (count - 1))', 'std = math.sqrt(squares / count)', "overlay"),
    ("overlay.py", 'if reach[0, 4:].nan_to_num(0.0).any():', 'if False:', "overlay families"),
    ("overlay.py", 'if not least <= (1e-4 if', 'if not least <= (1.0 if', "overlay families"),
    ("overlay.py", 'self.uninstall()\n            raise', 'raise', "overlay"),

    # The machine: devices, shares, fusing proved, memory plan, the smaller step.
    ("machine.py", 'if config.effective_batch_size % world_size:', 'if False:', "processes::test_a_number_that_does_not_divide_the_batch"),
    ("machine.py", 'dtype = torch.bfloat16 if major >= 8 else torch.float16', 'dtype = torch.bfloat16 if major >= 7 else torch.float16', "machine::test_a_card_gives_the_dtype_and_a_run_its_own_cap"),
    ("machine.py", 'min((max_gpu_gib or math.inf) * GIB / total, 1.0)', '1.0', "machine::test_a_card_gives_the_dtype_and_a_run_its_own_cap"),
    ("machine.py", 'loss_scale.agree(min(scales))', 'pass', "processes::test_a_step_ends_with_the_same_numbers_in_every_process"),
    ("machine.py", 'return loss_sum, norm, stopping > 0', 'return loss_sum, norm, stop_asked', "processes::test_a_step_ends_with_the_same_numbers_in_every_process"),
    ("machine.py", 'different = [name for name in facts if facts[name] != everyone[0][name]]', 'different = []', "processes::test_what_all_processes_must_share"),
    ("machine.py", 'model.requires_grad_(False)  # after', '# after', "machine::test_loading_in_nf4_freezes_every_weight_and_says_what_stays_in_16_bits"),
    ("machine.py", '<= PIECE_TOLERANCE\n', '<= 1e9\n', "machine::test_a_piece_that_is_wrong_is_not_trained_with"),
    ("machine.py", 'if difference > PIECE_TOLERANCE:', 'if False:', "machine::test_a_piece_that_is_wrong_is_not_trained_with"),
    ("machine.py", 'difference.nan_to_num(nan=math.inf).item()', 'difference.item()', "machine::test_a_piece_that_is_wrong_is_not_trained_with machine::test_a_captured_pass_is_used_if_it_gives_what_the_eager_one_gives"),
    ("machine.py", 'if difference > PASS_TOLERANCE:', 'if False:', "machine::test_a_captured_pass_is_used_if_it_gives_what_the_eager_one_gives"),
    ("machine.py", 'function = compiled if torch.is_grad_enabled() else original', 'function = compiled', "machine::test_fused_pieces_serve_training_alone_and_in_its_dtype"),
    ("machine.py", 'and not getattr(shape, "sliding_window", None):', ':', "machine::test_attention_without_a_mask_is_the_same_to_the_bit"),
    ("machine.py", 'total += run_pass(overlay, *inputs, scale, loss_scale, after_loss).sum()', 'total = run_pass(overlay, *inputs, scale, loss_scale, after_loss).sum()', "machine::test_out_of_memory_halves_the_micro_batch_and_repeats_the_step overlay machine data"),
    ("machine.py", 'all_reduce_sum(worker, overlay.input_grad)', 'pass', "processes::test_same_losses_and_rows_as_one_process"),
    ("machine.py", 'sums.append(dist.all_reduce(bucket, async_op=True))', 'pass', "processes::test_same_losses_and_rows_as_one_process"),
    ("machine.py", 'eval_micro_batch_size = max(size // 2, 1)', 'eval_micro_batch_size = size // 2', "machine::test_out_of_memory_ends_a_run_that_cannot_shrink machine"),
    ("machine.py", 'plan.micro_batch_size = plan.eval_micro_batch_size = max(', 'plan.micro_batch_size = max(', "machine::test_out_of_memory_halves_the_micro_batch_and_repeats_the_step"),
    ("machine.py", 'while worker.device.type == "cuda" and not', 'while False and not', "machine::test_an_evaluation_takes_fewer_sequences_where_the_graphs_leave_little_memory"),
    ("machine.py", 'return plan.eval_micro_batch_size == 1', 'return True', "machine::test_an_evaluation_takes_fewer_sequences_where_the_graphs_leave_little_memory"),
    ("machine.py", 'plan.graph = plan.parking = None', 'plan.parking = None', "machine::test_out_of_memory_lets_the_graphs_go"),
    ("machine.py", 'plan.graph = plan.parking = None', 'plan.graph = None', "machine::test_out_of_memory_gives_back_the_host_memory_of_parked_layers"),
    ("machine.py", 'left = min(can_carry, self.room) - count * inputs', 'left = min(can_carry, self.room)', "machine::test_as_many_layers_are_parked_as_bus_and_host_take"),
    ("machine.py", 'left = min(can_carry, self.room)', 'left = can_carry', "machine::test_as_many_layers_are_parked_as_bus_and_host_take"),
    ("machine.py", 'count * carried + COPIES_BEHIND * layer, self', 'count * carried, self', "machine::test_as_many_layers_are_parked_as_bus_and_host_take"),
    ("machine.py", 'or has_gaps or is_full:', 'or has_gaps:', "machine::test_parked_layers_give_the_same_bits"),
    ("machine.py", 'weakref.finalize(memory, cuda.cudaHostUnregister, place)', 'pass', "machine::test_pinned_memory_is_unpinned_when_it_is_collected"),
    ("machine.py", 'if name not in buffers:', 'if True:', "machine::test_a_second_save_is_copied_to_the_memory_of_the_first"),
    ("machine.py", 'saves = sum(rows.nbytes for rows in {overlay.input_rows, overlay.logit_rows})', 'saves = 0', "machine::test_parked_activations_leave_the_host_its_saves"),
    ("machine.py", 'or is_weight or', 'or', "machine::test_parked_layers_give_the_same_bits"),
    ("machine.py", 'fused = tokens_before_heads(fused)', 'pass', "machine::test_the_fused_rotary_embedding_takes_q_and_k_as_they_lie_in_memory"),
    ("machine.py", 'if more or named:', 'if False:', "machine::test_a_call_that_says_where_the_heads_are_is_passed_on"),
    ("overlay.py", 'del base_logits  #', 'pass  #', "loss::test_the_logits_of_one_chunk_and_of_one_group_are_there_at_a_time"),
    ("machine.py", 'for module in linears[:-1]:', 'for module in linears:', "machine::test_a_recomputed_layer_dequantizes_its_matrices_twice"),
    ("machine.py", 'if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):', 'if error.errno not in (errno.ENOSPC,):', "machine::test_a_full_disk_a_quota_and_a_read_only_disk_are_one_line_and_other_errors_are_not"),
    ("machine.py", '"gradients": row_set + 4', '"gradients": 4', "machine::test_the_plan_is_within_eight_percent_of_what_was_measured machine::test_the_plan_counts_what_the_config_changes machine"),
    ("machine.py", 'nf4_bytes = 0.5 + 1 / 64 + 4 / 64 / 256', 'nf4_bytes = 0.5', "machine::test_a_matrix_in_4_bits_is_counted_as_bitsandbytes_stores_it_with_its_scales"),
    ("machine.py", 'if plans[size]["total"] <= cap)', 'if True)', "machine::test_a_plan_takes_the_largest_micro_batch_below_the_cap"),

    # Saves: order of writing, hashes, what counts as whole, picking, pruning, copying.
    ("recover.py", 'digest.update(chunk)', 'digest.update(chunk[:1])', "recover properties"),
    ("recover.py", 'path.chmod(mode)', 'pass'),
    ("recover.py", 'if not (target / MARKER).exists():', 'if False:'),
    ("recover.py", 'write_json(target / MARKER, state)', '(target / MARKER).write_text(json.dumps(state))', "power_loss"),
    ("recover.py", 'with replacing(target) as part:\n            part.mkdir(parents=True)\n            yield part', 'target.mkdir(parents=True, exist_ok=True)\n        for part in [target]:\n            yield part', "power_loss recover"),
    ("recover.py", 'state, target = dict(state), folder', 'state, target = state, folder'),
    ("recover.py", 'raise ValueError\n    except FileNotFoundError', 'pass\n    except FileNotFoundError', "properties"),
    ("recover.py", 'if path.name != f"step_{step:06d}":', 'if False:'),
    ("recover.py", 'if state.get(name) not in (wanted, NOT_KNOWN):', 'if False:'),
    ("recover.py", 'if state.get(name) not in (wanted, NOT_KNOWN):', 'if state.get(name) != wanted:', "recover export"),
    ("recover.py", 'if not (path / name).is_file():', 'if False:'),
    ("recover.py", '!= size:  # seen', '< size:  # seen', "recover properties"),
    ("recover.py", 'if file_record(path / name)["sha256"] != sha256:', 'if False:', "recover"),
    ("recover.py", 'if not all(block.isfinite().all() for block in blocks):', 'if False:', "recover"),
    ("recover.py", 'split(VALUES_AT_ONCE)', 'split(VALUES_AT_ONCE)[:1]', "recover"),
    ("recover.py", 'return sorted(found, key=lambda entry: -entry[0])', 'return sorted(found, key=lambda entry: -entry[1].stat().st_mtime)', "recover"),
    ("recover.py", 're.fullmatch(r"step_(\\d{6,})", path.name)\n            if match', 're.match(r"step_(\\d{6,})", path.name)\n            if match', "recover survival::test_a_step_by_name_and_what_was_newer"),
    ("recover.py", 'found.append((loss, -step, path))', 'found.append((loss, step, path))', "recover"),
    ("recover.py", 'found.append((loss, -step, path))', 'found.append((-loss, -step, path))', "recover"),
    ("recover.py", 'in sentry_folders(*folders) if step in (None, number)]', 'in sentry_folders(*folders)]', "recover generate"),
    ("recover.py", 'skipped += error.problems\n', 'pass\n', "recover"),
    ("recover.py", 'if path == chosen.path:\n            return', 'if path == chosen.path:\n            continue', "recover"),
    ("recover.py", 'for _, path in sentry_folders(folder) if (path / MARKER).exists()]', 'for _, path in sentry_folders(folder)]', "recover"),
    ("recover.py", 'kept = newest_and_best(folder, keep)', 'kept = newest_and_best(folder, keep - 1)', "recover survival::test_keep_sentries"),
    ("recover.py", '+ by_held_out_loss(folder)[:1]', '', "recover"),
    ("recover.py", 'if path not in (*kept, spare):', 'if path not in kept:', "recover"),
    ("recover.py", '(path / MARKER).unlink(missing_ok=True)', 'pass', "recover power_loss"),
    ("recover.py", 'for path in folder.glob(".step_*"):', 'for path in ():', "recover"),
    ("recover.py", 'return check_files(target, state).path', 'return target if target.exists() else 1 / 0', "recover"),
    ("recover.py", 'if file_record(part / name) != record:', 'if False:', "recover"),
    ("recover.py", 'sync(part / name)\n            fault_point', 'fault_point', "power_loss recover"),
    ("recover.py", 'self.finish_local()\n        self.writing = self.pool', 'self.writing = self.pool', "recover"),
    ("recover.py", 'in newest_and_best(self.local, 1)]', 'in newest_and_best(self.local, 1)[:1]]', "recover survival::test_the_save_of_the_lowest_held_out_loss_is_made_and_kept"),
    ("recover.py", 'if step >= self.first_step]', ']', "recover survival::test_damaged_local_saves_never_replace_their_copies"),
    ("recover.py", 'copy_sentry(self.in_copy, self.durable, self.copy_file)\n                prune(self.durable, self.keep)', 'prune(self.durable, self.keep)\n                copy_sentry(self.in_copy, self.durable, self.copy_file)', "recover"),
    ("recover.py", 'step = waiting[-(len(tried) % 2)]', 'step = waiting[0]', "recover"),
    ("recover.py", 'prune(self.local, self.keep, spare=self.in_copy)', 'prune(self.local, self.keep)', "recover"),
    ("recover.py", 'except OSError:\n        shutil.copyfile(source, target)', 'except OSError:\n        pass', "recover"),
    ("recover.py", 'link_or_copy if durable.parent == local.parent else shutil.copyfile', 'shutil.copyfile', "recover survival::test_without_a_sentry_dir_the_two_folders_share_their_files"),

    # Exports, generation, import, and what they need of the base.
    ("recover.py", 'known["model_name"] = base or str(folder)', 'known["model_name"] = str(folder)', "export::test_base_model_from_the_hubs_cache"),
    ("recover.py", 'if new_words_hash(words, first) != sha256 or texts', 'if texts', "export::test_tokenizer_files_of_other_words_are_refused"),
    ("recover.py", 'if out.is_dir() and any(out.iterdir()) and not force:', 'if False:', "export::test_refuses_a_folder_with_files"),
    ("recover.py", 'if out in (run_dir.resolve(), Path(config.model_name).resolve()):', 'if False:', "export::test_refuses_a_folder_with_files export::test_command_line"),
    ("recover.py", 'stale.unlink()', 'pass', "export::test_refuses_a_folder_with_files export::test_push_shows_and_sends_the_files_of_this_export_alone"),
    ("recover.py", 'sync(part / name)\n        (part', '(part', "power_loss"),
    ("recover.py", 'sync(out)', 'pass', "power_loss"),
    ("recover.py", 'ignore_patterns("report.json", "words.tsv")', 'ignore_patterns("words.tsv")', "export::test_push_shows_and_sends_the_files_of_this_export_alone export::test_card"),
    ("recover.py", 'private=True, exist_ok=True', 'exist_ok=True', "export::test_push_shows_and_sends_the_files_of_this_export_alone"),
    ("recover.py", 'allow_patterns=names, commit', 'commit', "export::test_push_shows_and_sends_the_files_of_this_export_alone"),
    ("recover.py", 'enumerate(words, facts["first_new_id"]):', 'enumerate(words):', "export::test_rows export::test_card"),
    ("recover.py", '"token_indices": list(range(num_base, size)),', '"token_indices": list(range(num_base - 1, size - 1)),', "export::test_logits_are_the_overlays"),
    ("recover.py", 'text["vocab_size"] = vocab_size', 'pass', "export::test_logits_are_the_overlays"),
    ("recover.py", 'section["tie_word_embeddings"] = tied', 'pass', "export::test_logits_are_the_overlays"),
    ("recover.py", 'missing = table.new_zeros(first_new_id - len(table), *table.shape[1:])', 'missing = table[:0]', "families::test_a_table_one_row_short_of_its_tokenizer"),
    ("recover.py", 'return table[:num_rows]', 'return table', "export::test_a_base_table_is_the_models_own_without_padding"),
    ("recover.py", 'total_size += sum(tensor.nbytes for tensor in tensors.values())', 'pass', "export::test_sharded_checkpoint"),
    ("recover.py", 'if not difference <= (1e-4 if', 'if not difference <= (1e4 if', "export::test_an_export_that_computes_something_else_is_not_kept"),
    ("recover.py", 'raise UserError(f"export: {names[side]} does not hold', 'print(f"export: {names[side]} does not hold', "export::test_an_export_that_computes_something_else_is_not_kept"),
    ("recover.py", 'raise UserError(f"export: it cannot be loaded back', 'raise UserError(f"export: {one_line(error)}") from error\n        raise UserError(f"export: it cannot be loaded back', "export::test_an_export_that_cannot_be_loaded_back_is_one_line"),
    ("recover.py", 'if not evals:', 'if True:', "export::test_card export::test_rows_from_what_survived"),
    ("recover.py", 'near_new[i, n] = -2.0', 'pass', "export::test_neighbours"),
    ("recover.py", 'new.spellings[: new.num_words], config)', 'new.spellings, config)[: new.num_words] * 2', "export::test_spellings_are_those_that_training_used export::test_neighbours export::test_import"),
    ("recover.py", 'if is_new or not self.tokenizer.decode(self.ids).endswith("\\ufffd"):', 'if True:', "generate::test_half_letters_are_held_back_until_they_are_whole"),
    ("recover.py", 'torch.manual_seed(seed)', 'pass', "generate::test_the_text_is_that_of_model_generate_and_the_seed_decides_it"),
    ("recover.py", 'with torch.random.fork_rng([model.device] if ids.is_cuda else []):', 'if True:', "records::test_sampling_leaves_the_random_state generate::test_the_text_is_that_of_model_generate_and_the_seed_decides_it"),
    ("recover.py", 'if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:', 'if temperature < 0 or not 0 < top_p <= 1:', "generate::test_refusals"),
    ("recover.py", '0 if temperature else 1}', '0}', "generate::test_options"),
    ("recover.py", 'overlay.first_new_id = first\n', 'pass\n', "generate::test_base_model_too"),
    ("recover.py", 'config = dataclasses.replace(config, device="auto")', 'pass', "generate::test_the_rows_of_a_gpus_run_are_tried_out_where_there_is_none"),
    ("recover.py", 'if start < first or rows.shape != (last + 1 - start, width):', 'if rows.shape != (last + 1 - start, width):', "export::test_import_refuses"),
    ("recover.py", 'tensors["input_rows"][start - first : new.num_words] = rows', 'tensors["input_rows"][: len(rows)] = rows', "export::test_import"),
    ("recover.py", 'tensors["input_rows"][new.num_words :] = tensors["input_rows"][of_first_forms]', 'pass', "export::test_import_gives_the_second_forms_of_words_the_rows_of_the_first"),
    ("recover.py", 'map_location="cpu", weights_only=True)\n        rows', 'map_location="cpu", weights_only=False)\n        rows', "export::test_import_runs_no_code_of_the_file"),
    ("recover.py", 'if not rows.isfinite().all():', 'if False:', "export::test_import_refuses"),
    ("recover.py", '"optimizer_step": 0,', '"optimizer_step": step,', "adafactor"),
    ("recover.py", 'cannot be mapped; load the model once', 'cannot be mapped', "export::test_a_pickle_that_cannot_be_mapped_is_told_with_what_to_do"),

    # Data: the split, sequences, epochs, shares of processes.
    ("train.py", 'cuts.append(len(text) if position == parts else cut)', 'cuts.append(len(text) - 1 if position == parts else cut)', "data"),
    ("train.py", 'cut = line_end + 1 if line_end >= 0 else wanted', 'cut = line_end if line_end >= 0 else wanted', "data"),
    ("train.py", 'for position in (part - val_fraction, part):', 'for position in (part - 1 + val_fraction, part):', "data"),
    ("train.py", 'return "".join(pieces[0::2]), "".join(pieces[1::2])', 'return "".join(pieces[0::2]), "".join(pieces[1::2])[1:]', "data"),
    ("train.py", 'return "".join(pieces[0::2]), "".join(pieces[1::2])', 'return text, "".join(pieces[1::2])', "data"),
    ("train.py", 'halves = [split_text(text, config.val_fraction) for text in texts]', 'halves = [split_text("".join(texts), config.val_fraction)]', "data"),
    ("train.py", '"\\0".join(texts).encode("utf-8")', '"".join(texts).encode("utf-8")', "data"),
    ("train.py", 'start - (len(LEAD) if start else 0))', 'start)', "data word_forms"),
    ("train.py", 'if len(stream) <= config.seq_len:', 'if len(stream) < config.seq_len:', "data train_cli::test_texts_that_cannot_be_used"),
    ("train.py", 'return (len(stream) - 1) // seq_len', 'return len(stream) // seq_len', "data"),
    ("train.py", 'stream[positions], stream[positions + 1]', 'stream[positions], stream[positions]', "data"),
    ("train.py", 'x[:, 0] = bos_id', 'x[0] = bos_id', "data"),
    ("train.py", 'manual_seed(seed * 1_000_003 + epoch)', 'manual_seed(seed * 1_000_003)', "data"),
    ("train.py", 'manual_seed(seed * 1_000_003 + epoch)', 'manual_seed(epoch)', "data"),
    ("train.py", 'manual_seed(seed * 1_000_003 + epoch)', 'manual_seed(seed + epoch)', "data"),
    ("train.py", 'for epoch in epochs.unique().tolist():', 'for epoch in [epochs[0].item()] * len(epochs.unique()):', "data"),
    ("train.py", 'order = torch.randperm(num_sequences, generator=generator)', 'order = torch.randint(num_sequences, (num_sequences,), generator=generator)', "data"),
    ("train.py", 'arange((step - 1) * batch_size, step * batch_size)', 'arange(step * batch_size, (step + 1) * batch_size)', "data adafactor"),
    ("train.py", '[ids.tensor_split(worker.world_size)[worker.rank] for', '[ids.tensor_split(max(worker.world_size, 2))[worker.rank] for', "data"),
    ("train.py", 'base_embeds, x, numbers)', 'base_embeds, parts[0], numbers)', "data processes"),

    # The step: schedule, clipping, what is checked before the update.
    ("train.py", '(config.max_steps + 1 - warmup_steps)', '(config.max_steps - warmup_steps)', "data"),
    ("train.py", 'if step <= warmup_steps:', 'if step < warmup_steps:', "data"),
    ("train.py", 'config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))', 'config.learning_rate * (1 - share)', "data"),
    ("train.py", 'warmup_steps = round(config.warmup_ratio * config.max_steps)', 'warmup_steps = int(config.warmup_ratio * config.max_steps)', "data survival::test_every_step_trains"),
    ("train.py", 'if not (math.isfinite(loss) and math.isfinite(norm)):', 'if not math.isfinite(loss):', "survival::test_not_finite_stops_before_the_update"),
    ("train.py", 'clip = min(1.0, config.max_grad_norm / (norm + 1e-6))', 'clip = config.max_grad_norm / (norm + 1e-6)', "data"),
    ("train.py", 'clip = min(1.0, config.max_grad_norm / (norm + 1e-6))', 'clip = 1.0', "data"),
    ("train.py", 'loss = loss_sum / tokens_per_step', 'loss = loss_sum / len(batch.x) / config.seq_len', "data processes::test_same_losses_and_rows_as_one_process"),
    ("train.py", 'optimizer.update(run.optimizer_step + 1, learning_rate, clip)', 'optimizer.update(step, learning_rate, clip)', "adafactor"),
    ("train.py", 'learning_rate = learning_rate_at(step, config)', 'learning_rate = learning_rate_at(step - 1, config)', "adafactor"),
    ("train.py", 'run.loss_scale.step_done()', 'pass', "survival::test_a_continued_run_keeps_its_loss_scale"),

    # Evaluation: which bytes, which targets, which context.
    ("train.py", '.encode("utf-8"))\n\n\n@torch', ')\n\n\n@torch', "data"),
    ("train.py", 'data.val_text[data.val_ends[0] : end]', 'data.val_text[:end]', "data"),
    ("train.py", 'end = data.val_ends[count_sequences(data.val, seq_len) * seq_len]', 'end = data.val_ends[-1]', "data"),
    ("train.py", '(new_nats + nats) / math.log(2) / num_bytes', '(new_nats + nats) / num_bytes', "data"),
    ("train.py", '"val_loss": (new_nats + nats) / (new_count + count)', '"val_loss": nats / count', "data"),
    ("train.py", '"val_loss_new_words": new_nats / max(new_count, 1)', '"val_loss_new_words": new_nats / max(count, 1)', "data"),
    ("train.py", 'begin = bisect.bisect_left(ends, middle)', 'begin = first', "data"),
    ("train.py", 'if end > middle - start else -100', 'if True else -100', "data"),
    ("train.py", 'return encoding.ids[:-1], targets[1:]', 'return encoding.ids[1:], targets[1:]', "data"),
    ("train.py", 'return [data.bos_id, *targets[:-1]], targets', 'return [targets[0], *targets[:-1]], targets', "data"),
    ("train.py", 'targets + [-100] * (width', 'targets + [0] * (width', "data"),
    ("train.py", 'total += losses.double().sum().cpu()', 'total = losses.double().sum().cpu()', "data"),
    ("train.py", 'y, base_only=True)', 'y)', "data"),
    ("train.py", 'numbers.tensor_split(worker.world_size)[worker.rank]', 'numbers.tensor_split(worker.world_size + 1)[worker.rank]', "data processes::test_the_held_out_text_is_read_once_whatever_each_process_fits"),
    ("train.py", 'new += [token >= first_new_id for token in ids[len(prompt_ids(tokenizer, prompt)) :]]', 'new += [token >= first_new_id for token in ids]', "records"),
    ("train.py", 'if record["val_loss"] > uniform:', 'if False:', "data"),
    ("train.py", 'self.best_val_loss = min(self.best_val_loss, record["val_loss"])', 'self.best_val_loss = record["val_loss"]', "survival::test_the_last_step_is_saved_and_an_evaluated_one_only_if_it_is_the_best"),

    # Records and progress.
    ("train.py", 'if record["val_loss"] < best:', 'if record["val_loss"] > best:', "records"),
    ("train.py", 'if c.isprintable() or c == "\\n" else', 'if True else', "records"),
    ("train.py", 'less = 100 * (1 - trained / base)', 'less = 100 * (trained / base - 1)', "records"),
    ("train.py", 'seconds = (end - step) * self.seconds["step"]', 'seconds = end * self.seconds["step"]', "records"),
    ("train.py", 'self.seconds["step"] = statistics.median(self.recent)', 'self.seconds["step"] = max(self.recent)', "records"),
    ("train.py", 'write_text(self.folder / "metrics.jsonl", "".join(self.lines))', 'pass', "survival::test_n_steps_kill_n_steps_equal_2n"),
    ("train.py", '(self.step % self.config.log_every == 0 or self.is_done())', 'self.step % self.config.log_every == 0', "train_cli::test_lines_and_records_come_every_log_every_steps_and_at_the_end"),

    # Starting, continuing, stopping.
    ("train.py", 'FileLock(run_dir / ".lock").acquire(timeout=0)', 'contextlib.nullcontext()', "survival::test_a_second_training_of_a_run_is_refused_and_disturbs_nothing"),
    ("train.py", 'if not folder.parent.is_dir():', 'if False:', "survival::test_a_durable_folder_that_takes_nothing_is_found_before_anything_is_loaded"),
    ("train.py", 'file.write(b"wake2vec")', 'pass', "survival::test_a_durable_folder_that_takes_nothing_is_found_before_anything_is_loaded"),
    ("train.py", 'if fresh and worker.rank == 0:\n        start_over(config)', 'if False:\n        start_over(config)', "survival::test_fresh_keeps_the_old_run_aside_in_both_folders"),
    ("train.py", 'if sentry is None or sentry.step < config.max_steps or not settings.exists():', 'if True:', "survival::test_a_finished_run_keeps_its_settings"),
    ("train.py", 'if not path.name.startswith("old-") and path.name != ".lock":', 'if path.name != ".lock":', "survival::test_fresh_keeps_the_old_run_aside_in_both_folders survival::test_fresh_moves_everything_and_only_when_the_new_run_can_start"),
    ("train.py", 'problems.append(lexicon_change(path / "words.txt", words.words))', 'pass', "survival::test_a_changed_lexicon_is_named_in_words_and_other_changes_beside_it"),
    ("train.py", 'problems.append("corpus: its text is not', '("corpus: its text is not', "survival::test_a_changed_lexicon_is_named_in_words_and_other_changes_beside_it train_cli::test_what_continuing_refuses"),
    ("train.py", 'if field.metadata["changes_run"] and before != now:', 'if False:', "survival::test_each_key_of_a_changed_config"),
    ("train.py", 'old.get(field.name, field.metadata.get("before"))', 'old.get(field.name)', "survival::test_a_save_of_the_old_format_is_continued"),
    ("train.py", 'if name not in tensors or tensors[name].shape != tensor.shape:', 'if False:', "survival::test_a_save_whose_rows_do_not_fit_the_run_is_refused_by_name"),
    ("train.py", 'sentry.step + (sentry.path.parent != local) if sentry else 0', '0', "survival::test_damaged_local_saves_never_replace_their_copies survival::test_a_start_mends_the_durable_copy_of_what_it_continues_from"),
    ("train.py", 'set_aside(folders, sentry)', 'pass', "survival::test_a_step_by_name_and_what_was_newer"),
    ("train.py", '"loss_scale": dataclasses.asdict(self.loss_scale),', '"loss_scale": {},', "survival::test_a_continued_run_keeps_its_loss_scale"),
    ("train.py", 'LossScale(**state.get("loss_scale", {}))', 'LossScale()', "survival::test_a_continued_run_keeps_its_loss_scale"),
    ("train.py", '"optimizer_step": self.optimizer_step,', '"optimizer_step": self.step,', "adafactor"),
    ("train.py", 'best_val_loss=state.get("best_val_loss") or math.inf', 'best_val_loss=math.inf', "survival::test_n_steps_kill_n_steps_equal_2n"),
    ("train.py", 'base_bits_per_byte=state.get("base_bits_per_byte"),', 'base_bits_per_byte=None,', "survival::test_n_steps_kill_n_steps_equal_2n survival::test_a_run_killed_after_any_steps_equals_a_straight_one"),
    ("train.py", 'step=state.get("step", 0), optimizer', 'step=0, optimizer', "survival::test_n_steps_kill_n_steps_equal_2n"),
    ("train.py", 'or run.is_best() or run.is_done() or stopping:', 'or run.is_done() or stopping:', "survival::test_the_save_of_the_lowest_held_out_loss_is_made_and_kept"),
    ("train.py", 'or run.is_best() or run.is_done() or stopping:', 'or run.is_best() or run.is_done():', "survival::test_a_stop_signal_at_any_moment_leaves_a_sentry"),
    ("train.py", 'or run.is_best() or run.is_done() or stopping:', 'or run.is_best() or stopping:', "survival::test_the_last_step_is_saved_and_an_evaluated_one_only_if_it_is_the_best"),
    ("train.py", 'run.writer.check()', 'pass', "survival::test_a_save_that_fails_in_the_background_ends_the_run_long_before_the_next_one"),
    ("train.py", 'self.__exit__()  # a second', '# a second', "survival::test_a_second_stop_signal_ends_at_once"),
    ("train.py", 'run.writer.finish()', 'run.writer.finish_local()', "survival::test_a_durable_folder_in_trouble"),
    ("train.py", 'if fresh and step is not None:', 'if False:', "survival::test_fresh_is_said_as_on_the_command_line_too_and_never_with_a_step"),
    ("train.py", 'fresh = fresh or "--fresh" in overrides', 'pass', "survival::test_fresh_is_said_as_on_the_command_line_too_and_never_with_a_step"),
    ("train.py", 'and not installed_version("tensorboard"):', 'and False:', "survival::test_tensorboard_without_its_package_is_refused_before_anything_is_loaded"),
    ("train.py", 'keys += ["max_steps", "eval_every", "save_every"]', 'pass', "processes::test_what_all_processes_must_share"),
]
# fmt: on


def start(number: int, folder: Path) -> int | str:
    """Make the fault in a copy of the repository and start its tests -> process id, or why not."""
    script, old, new, *tests = FAULTS[number]
    text = (ROOT / script).read_text(encoding="utf-8")
    if text.count(old) != 1:
        return f"stale: the text stands {text.count(old)} times in {script}"
    ast.parse(text.replace(old, new))
    ignored = shutil.ignore_patterns(".*", "runs", "old-*")
    shutil.copytree(ROOT, folder / "copy", ignore=ignored)
    (folder / "copy" / script).write_text(text.replace(old, new), encoding="utf-8")
    if process := os.fork():
        return process
    run_tests(folder, (tests[0] if tests else TESTS[script]).split())


def run_tests(folder: Path, names: list[str]) -> None:
    """Run tests in the copy, in a process group of their own, and end this process."""
    import pytest

    os.setpgid(0, 0)
    signal.alarm(SECONDS)
    os.chdir(folder / "copy")
    out = os.open(folder / "out", os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    files = [f"tests/test_{name.replace('::', '.py::', 1)}" for name in names]
    files = [file if "::" in file else f"{file}.py" for file in files]
    options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={folder / 'temporary'}"]
    status = pytest.main([*options, *files])
    sys.stdout.flush()
    os._exit(status)


def verdict(status: int, folder: Path) -> str:
    """Say what the tests' exit status and output mean."""
    if os.WIFSIGNALED(status):
        return "noticed: the tests hang"
    if os.waitstatus_to_exitcode(status) == 0:
        return "SURVIVED"
    lines = (folder / "out").read_text(encoding="utf-8", errors="replace").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return f"noticed: {failed[0].split(' - ')[0] if failed else 'no test could run'}"


def try_faults(numbers: list[int], jobs: int) -> dict[int, str]:
    """Try each fault, `jobs` at the same time, and print what came of it -> number: verdict."""
    waiting, running, verdicts = list(numbers), {}, {}
    with tempfile.TemporaryDirectory(prefix="mutate_", ignore_cleanup_errors=True) as root:
        while waiting or running:
            if waiting and len(running) < jobs:
                number = waiting.pop(0)
                folder = Path(root, str(number))
                folder.mkdir()
                started = start(number, folder)
                if isinstance(started, int):
                    running[started] = number, folder
                    continue
                verdicts[number] = started
            else:
                process, status = os.wait()
                number, folder = running.pop(process)
                verdicts[number] = verdict(status, folder)
                shutil.rmtree(folder, ignore_errors=True)
            script, old, new, *_ = FAULTS[number]
            print(f"{number:3} {script:20} {old!r} -> {new!r}: {verdicts[number]}", flush=True)
    return verdicts


def main(arguments: argparse.Namespace) -> int:
    numbers = [i for i, fault in enumerate(FAULTS) if arguments.only in (None, fault[0])]
    random.Random(0).shuffle(numbers)
    sys.path.insert(0, str(ROOT / "tests"))
    for library in (*LIBRARIES, *importlib.import_module("forked").LIBRARIES):
        importlib.import_module(library)
    # A test's runs must come from its own copy of the repository, and so must this file.
    del sys.modules["forked"]
    sys.path.remove(str(ROOT / "tests"))
    gc.freeze()  # or each fork's first collection of garbage copies all of it
    verdicts = try_faults(numbers[: arguments.count], arguments.jobs)
    survivors = sorted(i for i in verdicts if verdicts[i] == "SURVIVED")
    stale = [i for i in verdicts if verdicts[i].startswith("stale")]
    print(f"\n{len(verdicts)} faults, {len(survivors)} survived, {len(stale)} stale")
    print("| script | fault | why it may survive |\n|---|---|---|")
    for i in survivors:
        script, old, new, *_ = FAULTS[i]
        print(f"| {script} | `{old}` -> `{new}` | {EXPECTED.get((script, old), 'UNEXPLAINED')} |")
    unexplained = [i for i in survivors if FAULTS[i][:2] not in EXPECTED]
    return 1 if unexplained or stale else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", nargs="?", type=int, help="how many faults; default: all")
    parser.add_argument("--only", metavar="SCRIPT", help="faults of one script")
    parser.add_argument("--jobs", type=int, default=1, help="faults at the same time")
    sys.exit(main(parser.parse_args()))
