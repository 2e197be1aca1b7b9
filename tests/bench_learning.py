"""What training teaches: bits per byte of held-out text at 0, 1/3, 2/3 and the end, by recipe.

    python tests/make_deformed_text.py kjv.txt deformed
    python tests/bench_learning.py MODEL_FOLDER deformed        every recipe, base model first
    python tests/bench_learning.py MODEL_FOLDER deformed --steps 600 default devlog
    python tests/bench_learning.py MODEL_FOLDER deformed --untie default    head copied from table

One JSON line each. 16 x 128 tokens a step, seed 42, the body not quantized. A recipe is the keys of
Config that it changes; recipes whose names begin with "try" are ideas that did not become options,
kept here with the code that tried them.

Losers (300 steps, separate rows at 2e-3 without coupling, where the plain mean has 1.878; one H100,
2026-11-22): sub-tokens weighted by length 1.919 (shared rows at 5e-4, mean there 1.916), by
position 1.898; norm matched 2.285; hidden state before the word in its output row 1.917; first
piece, or mean, with the measured log probability of the rest 1.924, 1.955; update clipped row by
row 1.984; Adafactor's row statistics to the power 0.5 or 0 1.772, 1.796 (with coupling no gain:
1.676 against 1.681); input rate x 4 with output 1e-3 1.862, x 0.25 with output 4e-3 1.924; with
coupling, the lexicon itself as extra text 1.616 against 1.627.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

import overlay as overlay_module
import train
from extend_tokenizer import Config, base_tokenizer, extend

PLAIN = {"output_rows": "shared", "learning_rate": 5e-4, "row_coupling": 0.0}
SHARED = {"output_rows": "shared", "learning_rate": 2e-3, "row_coupling": 1.0}
SEPARATE = {"output_rows": "separate", "learning_rate": 2e-3, "row_coupling": 0.0}
RECIPES: dict[str, dict] = {
    "default": {},
    "devlog": {
        "token_matching": "plain", "init": "spherical", "output_rows": "frozen",
        "learning_rate": 5e-4, "row_coupling": 0.0,
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
OWN_KEYS = ("row_clip", "row_power", "input_rate", "lexicon_text")
OWN_INITS = ("length", "ends", "norm", "hidden", "first_bias", "mean_bias")


def weighted_mean(table, spellings: list[list[int]], weights: list[list[float]]):
    rows = []
    for ids, own in zip(spellings, weights):
        own = torch.tensor(own, dtype=torch.float32, device=table.device)
        rows.append(own / own.sum() @ table[torch.tensor(ids, device=table.device)].float())
    return torch.stack(rows)


@torch.no_grad()
def continuation_statistics(config: Config, model, words) -> tuple[torch.Tensor, ...]:
    """From one pass of the base model over the training text, spelled: for each word the mean log
    probability of its pieces after the first (NaN where it does not occur), the mean hidden state
    before it (zero where none), and the mean hidden state over all positions."""
    base = base_tokenizer(config)
    text = "".join(train.split_text(t, config.val_fraction)[0] for t in train.read_corpus(config))
    ids = torch.tensor(base.encode(text, add_special_tokens=False).ids)
    table = model.get_output_embeddings().weight
    spelled: dict[int, list[tuple[tuple[int, ...], int]]] = {}
    for number, pieces in enumerate(words.spellings):
        spelled.setdefault(pieces[0], []).append((tuple(pieces), number))
    sums, counts = torch.zeros(len(words.words)), torch.zeros(len(words.words))
    before = torch.zeros(len(words.words), table.shape[1])
    mean_hidden, seen = torch.zeros(table.shape[1]), 0
    listed = ids.tolist()
    for start in range(0, len(ids) - 1, 512 * 32):
        x = ids[start : start + 512 * 32]
        x = x[: len(x) // 512 * 512].view(-1, 512)
        if not len(x):
            break
        hidden = model.base_model(x.to(table.device), use_cache=False).last_hidden_state
        hidden = hidden[:, :-1].flatten(0, 1)
        log_probs = torch.cat([
            torch.log_softmax((h @ table.T).float(), -1).gather(1, y[:, None])[:, 0]
            for h, y in zip(hidden.split(2048), x[:, 1:].flatten().to(table.device).split(2048))
        ]).view(len(x), -1).cpu()  # fmt: skip
        hidden = hidden.view(len(x), -1, table.shape[1]).float().cpu()
        mean_hidden += hidden.sum((0, 1))
        seen += hidden.shape[0] * hidden.shape[1]
        for row in range(len(x)):
            offset = start + row * 512
            for place in range(1, 500):
                for pieces, number in spelled.get(listed[offset + place], ()):
                    if tuple(listed[offset + place : offset + place + len(pieces)]) == pieces:
                        sums[number] += log_probs[row, place : place + len(pieces) - 1].sum()
                        counts[number] += 1
                        before[number] += hidden[row, place - 1]
    return sums / counts, before / counts.clamp(min=1)[:, None], mean_hidden / seen


def own_rows(config: Config, model, words, init: str):
    """Initialisations that were tried: (input rows, output rows)."""
    modules = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [overlay_module.dense_weight(m)[: words.first_new_id] for m in modules]
    rows = [overlay_module.subtoken_mean(table, words.spellings) for table in tables]
    pieces = base_tokenizer(config)
    if init == "length":
        size = {i: len(pieces.decode([i]).strip()) or 1 for ids in words.spellings for i in ids}
        weights = [[size[i] for i in ids] for ids in words.spellings]
        rows = [weighted_mean(table, words.spellings, weights) for table in tables]
    elif init == "ends":
        for side, factor in enumerate((2.0, 0.5)):
            weights = [[factor**n for n in range(len(ids))] for ids in words.spellings]
            rows[side] = weighted_mean(tables[side], words.spellings, weights)
    elif init == "norm":
        sizes = [table.float().norm(dim=1).mean() for table in tables]
        rows = [r * (size / r.norm(dim=1, keepdim=True)) for r, size in zip(rows, sizes)]
    elif init in ("hidden", "first_bias", "mean_bias"):
        rest, before, mean_hidden = continuation_statistics(config, model, words)
        rest = torch.where(rest.isnan(), rest[~rest.isnan()].mean(), rest).to(tables[1].device)
        direction = (mean_hidden / mean_hidden.square().sum()).to(tables[1].device)
        if init == "hidden":
            shift = before.to(tables[1].device) - mean_hidden.to(tables[1].device)
            shift[before.abs().sum(1).to(shift.device) == 0] = 0
            rows[1] = rows[1] + 0.01 * shift
        elif init == "first_bias":
            first = torch.tensor([ids[0] for ids in words.spellings], device=tables[1].device)
            rows[1] = tables[1][first].float() + 0.25 * rest[:, None] * direction
        else:
            rows[1] = rows[1] + 0.25 * rest[:, None] * direction
    return rows


def own_update(recipe: dict):
    """adafactor_update with the variations that were tried."""

    def update(rows, grad, mean_squares, step, learning_rate, grad_scale=1.0, touched=None, _=None):
        learning_rate *= recipe.get("input_rate", 1.0) if touched is not None else 1.0
        num_rows, hidden_size = rows.shape
        grad = grad * grad_scale
        decay = 1.0 - step**-0.8
        row, column = mean_squares["row"], mean_squares["column"]
        row.mul_(decay).add_((1 - decay) * 1e-30)
        new = grad.square().mean(1) * (1 - decay)
        row[slice(None) if touched is None else touched] += new
        column.mul_(decay).add_(grad.square().sum(0) / num_rows + 1e-30, alpha=1 - decay)
        factor = (row if touched is None else row[touched]) / row.mean()
        factor = factor.clamp(min=1e-12) ** (-recipe.get("row_power", 1.0) / 2)
        step_rows = grad * factor[:, None] * column.rsqrt()
        rms = (step_rows.square().sum() / (num_rows * hidden_size)).sqrt().clamp(min=1.0)
        step_rows /= rms
        if recipe.get("row_clip"):
            step_rows /= step_rows.square().mean(1, keepdim=True).sqrt().clamp(min=1.0)
        if touched is None:
            rows -= learning_rate * step_rows
        else:
            rows[touched] -= learning_rate * step_rows

    return update


def untie(model) -> None:
    head, table = nn.Linear(1, 1, bias=False), model.get_input_embeddings().weight
    head.weight = nn.Parameter(table.detach().clone(), requires_grad=False)
    model.set_output_embeddings(head)
    model.config.tie_word_embeddings = False


def say(**values) -> None:
    print(json.dumps(values), flush=True)


def run(name: str, recipe: dict, model, config: Config, place: train.Place, base_bits: dict):
    began = time.perf_counter()
    init, own = recipe.get("init"), {key: recipe[key] for key in OWN_KEYS if key in recipe}
    keys = {k: v for k, v in recipe.items() if k not in OWN_KEYS and v not in OWN_INITS}
    config = dataclasses.replace(config, **keys)
    words = extend(config, save=False)
    data = train.load_data(config, words)
    if recipe.get("lexicon_text"):
        listed = words.tokenizer.encode(" ".join(words.lexicon.words), add_special_tokens=False).ids
        data = dataclasses.replace(data, train=torch.cat([torch.tensor(listed), data.train]))
    rows, output, train_output = train.first_rows(config, model, words)
    if init in OWN_INITS:
        rows, mine = own_rows(config, model, words, init)
        output = None if output is None else mine
    overlay = train.WakeOverlay(model, words.first_new_id, rows, output, train_output)
    overlay.install()
    optimizer, original = train.Optimizer(overlay), train.adafactor_update
    if set(own) - {"lexicon_text"}:
        train.adafactor_update = own_update(own)
    fit = train.fit_to_machine(overlay, data, config, place)
    if "bits" not in base_bits:
        base_bits["bits"] = train.evaluate_base(overlay, data, config, place, 16)
        say(recipe="base model, nothing trained", bits_per_byte=round(base_bits["bits"], 4))
    marks = [0, config.max_steps // 3, 2 * config.max_steps // 3, config.max_steps]
    bits, scale, result = [], train.LossScale(), {}
    for step in range(config.max_steps + 1):
        if step:
            batch = train.prepare_step(step, overlay, data, config, place)
            train.accumulate(batch, overlay, place, fit, scale)
            gradients = optimizer.gradients()
            norm = sum(torch.linalg.vector_norm(g).square() for _, g, _ in gradients).sqrt().item()
            rate = train.learning_rate_at(step, config)
            grad_scale = min(1.0, config.max_grad_norm / (norm + 1e-6))
            optimizer.update(gradients, step, rate, grad_scale, config.row_coupling)
        if step in marks:
            result = train.evaluate(overlay, data, config, place, 16)
            bits.append(round(result["val_bits_per_byte"], 4))
    train.adafactor_update = original
    overlay.uninstall()
    say(
        recipe=name,
        steps=config.max_steps,
        bits_per_byte=bits,
        val_loss=round(result["val_loss"], 3),
        new_words=round(result["val_loss_new_words"], 3),
        ordinary=round(result["val_loss_ordinary"], 3),
        uniform_loss=round(math.log(overlay.vocab_size), 2),
        seconds=round(time.perf_counter() - began, 1),
    )


def main(argv: list[str]) -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--untie", action="store_true")
    arguments = parser.parse_intermixed_args(argv)
    text = Path(arguments.text)
    config = Config(
        model_name=arguments.model, lexicon=str(text / "lexicon.txt"),
        corpus=str(text / "corpus.txt"), run_dir=str(text / "run"), quantization="none",
        max_steps=arguments.steps,
    )  # fmt: skip
    train.apply()
    place = train.find_place(config)
    model = train.load_model(config, place)
    if arguments.untie:
        untie(model)
    device = torch.cuda.get_device_name() if place.device.type == "cuda" else "cpu"
    say(device=device, dtype=str(place.dtype), untied=arguments.untie, **train.versions())
    base_bits: dict = {}
    for name in arguments.recipes or RECIPES:
        run(name, RECIPES[name], model, config, place, base_bits)
        train.fuse_elementwise = lambda *_: None  # once for all recipes: they share the model


if __name__ == "__main__":
    main(sys.argv[1:])
