"""Compare what recipes teach: bits per byte of held-out text at 0, 1/3, 2/3 and the end of a run.

    python tests/bench/make_deformed_text.py kjv.txt deformed
    python tests/bench/bench_learning.py MODEL_FOLDER deformed      every recipe, base model first
    python tests/bench/bench_learning.py MODEL_FOLDER deformed --steps 600 default devlog
    python tests/bench/bench_learning.py MODEL_FOLDER deformed --untie default

--untie copies the table into a head of its own. Every step has 16 x 128 tokens, the seed is 42 and
the body is not quantized. A recipe is the keys of Config that it changes. Recipes whose names begin
with "try" are ideas that did not become options; they are kept here with their code. Prints one
JSON line a recipe.

What was lost with these ideas, or gained (300 steps, separate rows at 2e-3 without coupling, where
the plain mean has 1.878 bits per byte; one H100, torch 2.11.0, 2026-11-22):

    sub-tokens weighted by length                             1.919 (shared rows, 5e-4; mean: 1.916)
    sub-tokens weighted by position                           1.898
    rows scaled to the mean norm of the table                 2.285
    hidden state before the word, added to its output row     1.917
    measured log probability of the rest, on the first piece  1.924
    measured log probability of the rest, on the mean         1.955
    update clipped row by row                                 1.984
    Adafactor's row statistics to the power 0.5, 0            1.772, 1.796
    input rate x 4 with output 1e-3                           1.862
    input rate x 0.25 with output 4e-3                        1.924

Second forms of words that started at their first form's mean lost too: 1.632 against 1.602 bits
per byte on a wrapped text (docs/measurements.md). Kinship of the two forms, with the strength of
the other features, gained 0.001; with four times that strength it lost 0.004.

With coupling the plain mean has 1.681: row statistics to the power 0.5 give 1.676 there, and where
it has 1.627, the lexicon itself as extra text gives 1.616.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from config import Config
from env_shim import apply
from extend_tokenizer import NewWords, plan_new_words, read_corpus
from machine import Worker, agree, device_name, find_worker, fit_to_machine, run_step
from overlay import (
    LossScale, Optimizer, WakeOverlay, dense_weight, is_tied, output_mode, share_gradient_,
    sharing_matrices, starting_rows, subtoken_mean,
)  # fmt: skip
from recover import untie_head
from train import (
    Data, base_bits_per_byte, held_out_loss, learning_rate_at, load_data, load_model, prepare_step,
    split_text, versions,
)  # fmt: skip

ALONE = {"row_coupling": 0.0, "kin_coupling": 0.0}  # every row learns from its own gradient alone
PLAIN = {**ALONE, "output_rows": "shared", "learning_rate": 5e-4}
SHARED = {**ALONE, "output_rows": "shared", "learning_rate": 2e-3, "row_coupling": 1.0}
SEPARATE = {**ALONE, "output_rows": "separate", "learning_rate": 2e-3}
RECIPES: dict[str, dict] = {
    "default": {},
    "spaced": {"token_matching": "spaced"},
    "devlog": {
        **ALONE, "token_matching": "plain", "init": "spherical", "output_rows": "frozen",
        "learning_rate": 5e-4,
    },
    "mean, shared, 5e-4": PLAIN,
    "mean, shared, 2e-3": {**PLAIN, "learning_rate": 2e-3},
    "mean, separate, 5e-4": {**SEPARATE, "learning_rate": 5e-4},
    "mean, separate, 2e-3": SEPARATE,
    "coupled, shared": SHARED,
    "coupled, separate": {**SEPARATE, "row_coupling": 1.0},
    "coupled x 4, shared": {**SHARED, "row_coupling": 4.0},
    "coupled x 4, separate": {**SEPARATE, "row_coupling": 4.0},
    "coupled x 16, separate": {**SEPARATE, "row_coupling": 16.0},
    "coupled x 4, separate, 1e-3": {**SEPARATE, "learning_rate": 1e-3, "row_coupling": 4.0},
    "coupled, shared, 1e-3": {**SHARED, "learning_rate": 1e-3},
    "kin, shared": {**SHARED, "row_coupling": 4.0, "kin_coupling": 2.0},
    "kin, separate": {**SEPARATE, "row_coupling": 4.0, "kin_coupling": 2.0},
    "kin x 2, separate": {**SEPARATE, "row_coupling": 4.0, "kin_coupling": 4.0},
    "kin, separate, 4e-3": {
        **SEPARATE, "learning_rate": 4e-3, "row_coupling": 4.0, "kin_coupling": 2.0,
    },
    "LoRA, 2e-4": {"lora_rank": 16, "learning_rate": 2e-4},
    "LoRA, 5e-4": {"lora_rank": 16, "learning_rate": 5e-4},
    "LoRA, 1e-3": {"lora_rank": 16, "learning_rate": 1e-3},
    "try coupled shared, lexicon as text": {**SHARED, "lexicon_text": True},
    "try length-weighted mean": {**PLAIN, "init": "length"},
    "try last heavy in, first heavy out": {**SEPARATE, "init": "ends"},
    "try norm matched": {**SEPARATE, "init": "norm"},
    "try hidden state in the output rows": {**SEPARATE, "init": "hidden"},
    "try first piece + measured continuation": {**SEPARATE, "init": "first_bias"},
    "try mean + measured continuation": {**SEPARATE, "init": "mean_bias"},
    "try row clip": {**SEPARATE, "row_clip": True},
    "try row power 0.5": {**SEPARATE, "row_power": 0.5},
    "try row power 0": {**SEPARATE, "row_power": 0.0},
    "try in 4e-3, out 1e-3": {**SEPARATE, "learning_rate": 1e-3, "input_rate": 4.0},
    "try in 1e-3, out 4e-3": {**SEPARATE, "learning_rate": 4e-3, "input_rate": 0.25},
}  # fmt: skip
TRIED_UPDATES = ("row_clip", "row_power", "input_rate")
TRIED_STARTS = ("length", "ends", "norm", "hidden", "first_bias", "mean_bias")


# ---- First values that were tried ----------------------------------------------------------------


def weighted_mean(table: Tensor, spellings: list[list[int]], weights: list[list[float]]) -> Tensor:
    rows = []
    for ids, own in zip(spellings, weights):
        own = torch.tensor(own, dtype=torch.float32, device=table.device)
        rows.append(own / own.sum() @ table[torch.tensor(ids, device=table.device)].float())
    return torch.stack(rows)


class Continuations:
    """What the base model expects at the words where they stand, spelled, in the training text.

    after:       (N,) mean log probability of a word's pieces after the first; NaN if it never came
    before:      (N, H) mean hidden state before a word; zeros if it never came
    mean_hidden: (H,) over all positions
    """

    def __init__(self, config: Config, model: nn.Module, words: NewWords):
        self.words, self.table = words, dense_weight(model.get_output_embeddings())
        self.by_first_piece: dict[int, list[tuple[list[int], int]]] = {}
        for number, pieces in enumerate(words.spellings):
            self.by_first_piece.setdefault(pieces[0], []).append((pieces, number))
        self.sums, self.counts = (torch.zeros(len(words.words)) for _ in range(2))
        self.before = torch.zeros(len(words.words), self.table.shape[1])
        self.mean_hidden, seen = torch.zeros(self.table.shape[1]), 0
        halves = [split_text(text, config.val_fraction)[0] for text in read_corpus(config)]
        ids = torch.tensor(words.base.encode("".join(halves), add_special_tokens=False).ids)
        for x in ids[: len(ids) // 512 * 512].view(-1, 512).split(32):
            hidden, log_probs = self.expect(model, x)
            self.mean_hidden += hidden.sum((0, 1))
            seen += hidden.shape[0] * hidden.shape[1]
            for row in range(len(x)):
                self.add(x[row].tolist(), hidden[row], log_probs[row])
        self.after = self.sums / self.counts
        self.before /= self.counts.clamp(min=1)[:, None]
        self.mean_hidden /= seen

    @torch.no_grad()
    def expect(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, 511, H) before each next token, and its log probability (B, 511)."""
        x = x.to(self.table.device)
        hidden = model.base_model(x, use_cache=False).last_hidden_state[:, :-1]
        parts = zip(hidden.flatten(0, 1).split(2048), x[:, 1:].flatten().split(2048))
        log_probs = [
            torch.log_softmax((h @ self.table.T).float(), -1).gather(1, y[:, None])[:, 0]
            for h, y in parts
        ]
        return hidden.float().cpu(), torch.cat(log_probs).view(len(x), -1).cpu()

    def add(self, ids: list[int], hidden: Tensor, log_probs: Tensor) -> None:
        for position in range(1, 500):
            for pieces, number in self.by_first_piece.get(ids[position], ()):
                if ids[position : position + len(pieces)] == pieces:
                    self.sums[number] += log_probs[position : position + len(pieces) - 1].sum()
                    self.counts[number] += 1
                    self.before[number] += hidden[position - 1]


def tried_rows(config: Config, model: nn.Module, words: NewWords, init: str) -> list[Tensor]:
    """Make [input rows, output rows] by an initialisation that was tried."""
    modules = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [dense_weight(module)[: words.first_new_id] for module in modules]
    spellings = words.spellings
    if init == "length":
        size = {i: len(words.base.decode([i]).strip()) or 1 for ids in spellings for i in ids}
        weights = [[size[i] for i in ids] for ids in spellings]
        return [weighted_mean(table, spellings, weights) for table in tables]
    if init == "ends":
        weights = [
            [[factor**n for n in range(len(ids))] for ids in spellings] for factor in (2, 0.5)
        ]
        return [weighted_mean(*side) for side in zip(tables, [spellings] * 2, weights)]
    rows = [subtoken_mean(table, spellings) for table in tables]
    if init == "norm":
        sizes = [table.float().norm(dim=1).mean() for table in tables]
        return [r * (size / r.norm(dim=1, keepdim=True)) for r, size in zip(rows, sizes)]
    seen, device = Continuations(config, model, words), tables[1].device
    if init == "hidden":
        shift = (seen.before - seen.mean_hidden) * (seen.counts > 0)[:, None]
        return [rows[0], rows[1] + 0.01 * shift.to(device)]
    after = torch.where(seen.after.isnan(), seen.after[~seen.after.isnan()].mean(), seen.after)
    direction = seen.mean_hidden / seen.mean_hidden.square().sum()
    bias = (0.25 * after[:, None] * direction).to(device)
    if init == "mean_bias":
        return [rows[0], rows[1] + bias]
    first = torch.tensor([ids[0] for ids in spellings], device=device)
    return [rows[0], tables[1][first].float() + bias]


# ---- Updates that were tried ---------------------------------------------------------------------


class TriedOptimizer(Optimizer):
    """Adafactor with a recipe's variations of adafactor_update."""

    def __init__(self, overlay: WakeOverlay, sharing: tuple | None, recipe: dict):
        super().__init__(overlay, sharing)
        self.recipe = recipe

    def update_rows(self, name: str, step: int, learning_rate: float, grad_scale: float) -> None:
        recipe, rows, grad = self.recipe, getattr(self.overlay, name).data, self.overlay.grad
        if self.sharing:
            share_gradient_(grad, *self.sharing)
        grad = grad * grad_scale
        row, column = self.mean_squares[name]["row"], self.mean_squares[name]["column"]
        decay = 1.0 - step**-0.8
        row.mul_(decay).add_(grad.square().mean(1) + 1e-30, alpha=1 - decay)
        column.mul_(decay).add_(grad.square().mean(0) + 1e-30, alpha=1 - decay)
        factor = (row / row.mean()).clamp(min=1e-12) ** (-recipe.get("row_power", 1.0) / 2)
        change = grad * factor[:, None] * column.rsqrt()
        change /= change.square().mean().sqrt().clamp(min=1.0)
        if recipe.get("row_clip"):
            change /= change.square().mean(1, keepdim=True).sqrt().clamp(min=1.0)
        if name == "input_rows":
            learning_rate *= recipe.get("input_rate", 1.0)
        rows -= learning_rate * change


# ---- A recipe ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Bench:
    """This holds what every recipe works with."""

    config: Config
    worker: Worker
    model: nn.Module
    base_bits: float | None = None  # the base model's bits per byte


def say(**values) -> None:
    print(json.dumps(values), flush=True)


def make_data(recipe: dict, config: Config, words: NewWords) -> Data:
    data = load_data(config, words, read_corpus(config))
    if recipe.get("lexicon_text"):
        listed = words.tokenizer.encode(" ".join(words.lexicon.words), add_special_tokens=False).ids
        data = dataclasses.replace(data, train=torch.cat([torch.tensor(listed), data.train]))
    return data


def make_overlay(recipe: dict, config: Config, model: nn.Module, words: NewWords) -> WakeOverlay:
    mode = output_mode(config.output_rows, is_tied(model))
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    if recipe.get("init") in TRIED_STARTS:
        rows = tried_rows(config, model, words, recipe["init"])
    else:
        tables = [dense_weight(module)[: words.first_new_id] for module in modules]
        rows = [starting_rows(table, words.spellings, config) for table in tables]
    rows = rows[: 1 if mode == "shared" else 2]
    overlay = WakeOverlay(model, words.first_new_id, *rows, train_output=mode != "frozen")
    overlay.install()
    return overlay


def run(name: str, recipe: dict, bench: Bench) -> None:
    """Train by one recipe and print its line."""
    began, worker = time.perf_counter(), bench.worker
    known = {field.name for field in dataclasses.fields(Config)}
    keys = {k: v for k, v in recipe.items() if k in known and v not in TRIED_STARTS}
    config = dataclasses.replace(bench.config, **keys)
    words = plan_new_words(config, read_corpus(config))
    data = make_data(recipe, config, words)
    overlay = make_overlay(recipe, config, bench.model, words)
    if bench.base_bits is None:
        bench.base_bits = base_bits_per_byte(overlay, data, config, worker, 16, words.base)
        say(recipe="base model, nothing trained", bits_per_byte=round(bench.base_bits, 4))
    if "lora_rank" in recipe:
        overlay.uninstall()
        bits = train_lora(overlay, words, data, config, worker, recipe["lora_rank"])
        say(recipe=name, steps=config.max_steps, bits_per_byte=bits)
        return
    sharing = sharing_matrices(
        words.words, words.spellings, config.row_coupling, config.kin_coupling, worker.device
    )
    optimizer = Optimizer(overlay, sharing)
    if set(TRIED_UPDATES) & set(recipe):
        optimizer = TriedOptimizer(overlay, sharing, recipe)
    bits, result = train_rows(overlay, optimizer, data, config, worker)
    overlay.uninstall()
    say(
        recipe=name, steps=config.max_steps, bits_per_byte=bits,
        val_loss=round(result["val_loss"], 3),
        new_words=round(result["val_loss_new_words"], 3),
        ordinary=round(result["val_loss_ordinary"], 3),
        uniform_loss=round(math.log(overlay.vocab_size), 2),
        seconds=round(time.perf_counter() - began, 1),
    )  # fmt: skip


def train_rows(
    overlay: WakeOverlay, optimizer: Optimizer, data: Data, config: Config, worker: Worker
) -> tuple[list[float], dict]:
    """Train to max_steps -> (bits per byte at each third, the last evaluation)."""
    marks = [config.max_steps * third // 3 for third in range(4)]
    bits, loss_scale, result = [], LossScale(), {}
    prepare = functools.partial(
        prepare_step, overlay=overlay, data=data, config=config, worker=worker
    )
    batch = prepare(1)
    plan = fit_to_machine(overlay, [batch, prepare(2)], config, worker)
    for step in range(config.max_steps + 1):
        if step:
            prepare_next = functools.partial(prepare, step + 1)
            loss_sum, batch = run_step(plan, batch, overlay, worker, loss_scale, prepare_next)
            norm = agree(worker, loss_sum, optimizer.gradient_norm(), False, loss_scale)[1]
            clip = min(1.0, config.max_grad_norm / (norm + 1e-6))
            optimizer.update(step, learning_rate_at(step, config), clip)
        if step in marks:
            result = held_out_loss(overlay, data, config, worker, 16)
            bits.append(round(result["val_bits_per_byte"], 4))
    return bits, result


def train_lora(
    overlay: WakeOverlay, words: NewWords, data: Data, config: Config, worker: Worker, rank: int
) -> list[float]:
    """Train LoRA on all linear layers with the base tokenizer -> bits per byte at each third.

    The same number of steps and tokens as a run of rows, on the same text. AdamW without decay, the
    schedule and the clipping of a run of rows, alpha twice the rank.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(config.seed)
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    model = get_peft_model(overlay.model, settings)  # changes overlay.body in place
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    halves = [split_text(text, config.val_fraction)[0] for text in read_corpus(config)]
    base = words.base.encode("".join(halves), add_special_tokens=False)
    base_data, bits = dataclasses.replace(data, train=torch.tensor(base.ids)), []
    for step in range(config.max_steps + 1):
        if step:
            batch = prepare_step(step, overlay, base_data, config, worker)
            hidden = overlay.body(inputs_embeds=batch.base_embeds, use_cache=False)
            logits = (hidden.last_hidden_state @ overlay.base_rows.T).float()
            nn.functional.cross_entropy(logits.flatten(0, 1), batch.y.flatten()).backward()
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.param_groups[0]["lr"] = learning_rate_at(step, config)
            optimizer.step()
            optimizer.zero_grad()
        if step * 3 % config.max_steps < 3 and step * 3 // config.max_steps == len(bits):
            bits.append(round(base_bits_per_byte(overlay, data, config, worker, 16, words.base), 4))
    model.unload()
    overlay.model.requires_grad_(False)
    return bits


def main(argv: list[str]) -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--untie", action="store_true")
    arguments = parser.parse_intermixed_args(argv)
    if unknown := set(arguments.recipes) - set(RECIPES):
        parser.error(f"no recipe {', '.join(unknown)}; there are: {'; '.join(RECIPES)}")
    text = Path(arguments.text)
    config = Config(
        model_name=arguments.model, lexicon=str(text / "lexicon.txt"),
        corpus=str(text / "corpus.txt"), run_dir=str(text / "run"), quantization="none",
        max_steps=arguments.steps,
    )  # fmt: skip
    apply()
    worker = find_worker(config)
    bench = Bench(config, worker, load_model(config, worker))
    if arguments.untie:
        untie_head(bench.model)
    say(device=device_name(worker), dtype=str(worker.dtype), untied=arguments.untie, **versions())
    for name in arguments.recipes or RECIPES:
        run(name, RECIPES[name], bench)


if __name__ == "__main__":
    main(sys.argv[1:])
