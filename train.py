"""Train the rows of a lexicon's words in a frozen language model; the same command continues a run.

    python train.py configs/sample.yaml                     the sample: CPU, offline, 36 s
    python train.py configs/qwen14b.yaml                    Qwen2.5-14B in NF4 on a 15 GB card
    python train.py configs/qwen14b.yaml --dry-run          memory plan, without loading weights
    python train.py configs/sample.yaml max_steps=20 --fresh    start over, the old run kept aside
    torchrun --nproc-per-node 2 train.py CONFIG             the same steps on two cards

A step takes effective_batch_size sequences of seq_len tokens through the frozen body, in
micro-batches. The loss over base tokens and new words gives gradients to the new rows alone. The
gradients are clipped and shared among kin, and Adafactor moves the rows. The loss is the mean over
all predicted tokens of the step, in nats, so it does not depend on the micro-batch. Every random
choice follows from seed and step. overlay.py has the formulas and machine.py says what makes them
fast. `train_steps`, near the end, is the loop. A 14B step of 2,048 tokens takes 0.29 s on an H200
of which 14 GiB are used (2026-11-26, docs/measurements.md).

RUN_DIR gets config.yaml, tokenizer/, metrics.jsonl, loss_table.md, loss.png and samples.md. Saves
go to RUN_DIR/snapshots on the local disk. From there they are copied to sentry_dir and verified; if
none is given, RUN_DIR/sentries gets them as hard links, which take no room. A save is made every
save_every steps, at the end, and at every evaluation with a new lowest held-out loss. Each folder
keeps the newest keep_sentries and the one of the lowest loss.
"""

if __name__ == "__main__" and "__file__" in globals():
    from env_shim import end_at_ctrl_c

    end_at_ctrl_c()  # while the other imports last

import bisect
import collections
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import re
import shlex
import signal
import statistics
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# If this file is pasted into a notebook below the others, their names are there already.
if "check_environment" not in globals():
    from env_shim import apply, check_environment, installed_version
if "UserError" not in globals():
    from config import (
        Config, UserError, command_line_parser, load_config,
        parse_command_line, replacing, run_command, write_config, write_text,
    )  # fmt: skip
if "NewWords" not in globals():
    from extend_tokenizer import (
        LEAD, NewWords, encode_pieces, extend, format_report, new_words_hash, pieces,
        plan_new_words, read_corpus, save_new_words,
    )  # fmt: skip

SAMPLE_TOKENS = 48  # length of the continuation of each prompt
SLOW_START_NOTICE_SECONDS = 30.0  # a mounted Drive may hang while the saves are read
SLOW_LOOP_SECONDS = 2.0  # an evaluation that takes longer shows that it goes on

# ---- Before torch is imported --------------------------------------------------------------------


def parse_arguments(argv: list[str]):
    parser = command_line_parser("  python train.py configs/sample.yaml max_steps=60")
    parser.add_argument("--dry-run", action="store_true", help="print the memory plan and stop")
    parser.add_argument("--fresh", action="store_true", help="start over, the old run kept aside")
    parser.add_argument("--step", type=int, help="continue from the sentry of this step alone")
    return parse_command_line(parser, argv)


def check_options(config: Config, fresh: bool, step: int | None) -> None:
    """Raise a UserError for wrong options and missing packages, before anything is read."""
    problems = check_environment(config.device, config.quantization)
    if fresh and step is not None:
        problems.append("--fresh starts over, --step continues: give one of the two")
    if (fresh or step is not None) and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        # torchrun repeats the whole command at a restart, and --fresh would begin again each time.
        problems.append(
            "--fresh and --step do not go with torchrun --max-restarts; run once without"
        )
    if config.tensorboard and not installed_version("tensorboard"):
        problems.append("tensorboard: true, but the package is missing; pip install tensorboard")
    if problems:
        raise UserError(*problems)


def check_start(arguments) -> None:
    """Raise a UserError if the config is wrong, or if `check_options` finds a mistake."""
    config = load_config(arguments.config, *arguments.overrides)
    if not arguments.dry_run:
        check_options(config, arguments.fresh, arguments.step)


# torch takes two seconds to import; help and plain mistakes should not wait for it.
if __name__ == "__main__" and "__file__" in globals():
    ARGUMENTS = parse_arguments(sys.argv[1:])
    apply()
    if run_command(check_start, ARGUMENTS):
        raise SystemExit(1)

import torch
from tokenizers import Tokenizer
from torch import Tensor

if "WakeOverlay" not in globals():
    from overlay import (
        FLOAT16_LOSS_SCALE, LossScale, Optimizer, WakeOverlay, check_ids, check_model, dense_weight,
        is_tied, output_mode, sharing_matrices, starting_rows,
    )  # fmt: skip
if "Worker" not in globals():
    from machine import (
        StepBatch, StepPlan, Worker, agree, all_reduce_sum, barrier, check_same_run, device_name,
        dry_run, find_worker, fit_to_machine, free_cached_memory, host_copies, join_processes,
        known_errors_in_one_line, leave_processes, load_model, peak_gib, run_step,
        smaller_if_needed,
    )  # fmt: skip
if "SentryWriter" not in globals():
    from recover import (
        NOT_KNOWN, Sentry, SentryWriter, by_held_out_loss, continue_prompt, export_problems,
        in_notebook, load_file, loading_line, mark_new_words, pick_sentry, prompt_ids, read_marker,
        sentry_folders, set_aside, untouched_model,
    )  # fmt: skip

# ---- Data ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Data:
    """This is the tokenized corpus: training and held-out stream, and the held-out text itself.

    train, val: (tokens,) int64; val_ends: (val tokens,) character position where each token ends.
    Sequence i of a stream is x = stream[i T : i T + T], with y = stream[i T + 1 : i T + T + 1].
    """

    train: Tensor
    val: Tensor
    val_ends: Tensor
    val_text: str
    bos_id: int | None
    sha256: str


def split_text(text: str, val_fraction: float, parts: int = 10) -> tuple[str, str]:
    """Cut off the end of each of `parts` equal pieces as held-out text, at line ends if possible.

    So the held-out text comes from all parts of the book. The text is cut before anything is
    shuffled, so the held-out text shares no sequence with the training text. The cut depends on the
    text and val_fraction alone.
    """
    # The cuts alternate: the end of a training piece, the end of a held-out piece, and so on.
    cuts = [0]
    for part in range(1, parts + 1):
        for position in (part - val_fraction, part):
            wanted = round(len(text) * position / parts)
            # A line end within a twentieth of a piece is preferred, so that no word is cut.
            line_end = text.find("\n", wanted, wanted + len(text) // (20 * parts) + 1)
            cut = line_end + 1 if line_end >= 0 else wanted
            cuts.append(len(text) if position == parts else cut)
    pieces = [text[start:end] for start, end in zip(cuts, cuts[1:])]
    return "".join(pieces[0::2]), "".join(pieces[1::2])


def encode_text(tokenizer: Tokenizer, text: str) -> tuple[Tensor, Tensor]:
    """Return the ids of a text and where each ends in it, in characters: (tokens,) int64 each."""
    ids, ends, start, parts = [], [], 0, pieces(text)
    for part, (part_ids, offsets) in zip(parts, encode_pieces(tokenizer, parts)):
        ids.append(torch.tensor(part_ids))
        ends.append(torch.tensor([end for _, end in offsets]) + start - (len(LEAD) if start else 0))
        start += len(part)
    return torch.cat(ids), torch.cat(ends)


def load_data(config: Config, words: NewWords, texts: list[str]) -> Data:
    """Split and tokenize the corpus; texts: what read_corpus returned.

    Raises: UserError if the training or the held-out text is shorter than one sequence
    """
    # Each file is split for itself, so that each has its share of the held-out text.
    halves = [split_text(text, config.val_fraction) for text in texts]
    train_text, val_text = ("".join(half) for half in zip(*halves))
    # No BOS inside the streams: `sequences` puts one before each sequence if the base wants it.
    train, _ = encode_text(words.tokenizer, train_text)
    val, val_ends = encode_text(words.tokenizer, val_text)
    for name, stream, change in (
        ("train", train, "give more text"), ("val", val, "raise val_fraction"),
    ):  # fmt: skip
        if len(stream) <= config.seq_len:
            raise UserError(
                f"corpus: the {name} text has {len(stream)} tokens, fewer than a sequence of"
                f" {config.seq_len} and its last target; {change} or lower seq_len"
            )
    return Data(
        train=train,
        val=val,
        val_ends=val_ends,
        val_text=val_text,
        bos_id=words.bos_id,
        sha256=hashlib.sha256("\0".join(texts).encode("utf-8")).hexdigest(),
    )


def count_sequences(stream: Tensor, seq_len: int) -> int:
    """Count the whole sequences that a stream holds, with a target for each token."""
    return (len(stream) - 1) // seq_len


def sequences(
    stream: Tensor, numbers: Tensor, seq_len: int, bos_id: int | None
) -> tuple[Tensor, Tensor]:
    """Return the inputs x and next tokens y of sequences by number, each (len(numbers), seq_len).

    If the base tokenizer puts a BOS before a text, BOS takes the place of each first input.
    """
    positions = numbers[:, None] * seq_len + torch.arange(seq_len)  # (sequences, seq_len)
    x, y = stream[positions], stream[positions + 1]
    if bos_id is not None:
        x[:, 0] = bos_id
    return x, y


def step_sequence_numbers(step: int, batch_size: int, num_sequences: int, seed: int) -> Tensor:
    """Choose the sequences of a step (1, 2, ...) -> (batch_size,) numbers.

    Epoch e takes the sequences in an order drawn from seed and e. So the step number suffices, and
    a continued run needs no saved state of the data order.
    """
    positions = torch.arange((step - 1) * batch_size, step * batch_size)
    epochs, numbers = positions // num_sequences, []
    for epoch in epochs.unique().tolist():  # a step can lie in two or more
        # Up to a million epochs, no two pairs of seed and epoch share a generator.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(num_sequences, generator=generator)
        numbers.append(order[positions[epochs == epoch] % num_sequences])
    return torch.cat(numbers)


# ---- Model ---------------------------------------------------------------------------------------


def build_overlay(config: Config, worker: Worker, words: NewWords, continuing: bool) -> WakeOverlay:
    """Load the model and put the overlay into it, with the rows of step 0.

    A run that continues gets rows of zeros here, and load_rows fills them from its save. To compute
    first values that nobody needs would take 3 s for the 14B on two CPU cores.
    """
    model = load_model(config, worker)
    check_model(model, words.first_new_id)
    check_ids(model, words.first_new_id, torch.tensor([i for ids in words.spellings for i in ids]))
    for problem in export_problems(config, model) if worker.rank == 0 else []:
        worker.say(f"warning: {problem}")
    mode = output_mode(config.output_rows, is_tied(model))
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    rows = []  # (N, H) for the input side and, unless the sides share them, for the output side
    for module in modules[: 1 if mode == "shared" else 2]:
        table = dense_weight(module)[: words.first_new_id]  # (V, H)
        if continuing:
            rows.append(torch.zeros(len(words.words), table.shape[1]))
        else:
            rows.append(starting_rows(table, words.spellings, config))
    overlay = WakeOverlay(
        model, words.first_new_id, *rows, train_output=mode != "frozen",
        offload_input_table=worker.device.type == "cuda",
    )  # fmt: skip
    overlay.install()
    return overlay


# ---- A step --------------------------------------------------------------------------------------


def prepare_step(
    step: int, overlay: WakeOverlay, data: Data, config: Config, worker: Worker
) -> StepBatch:
    """Look up the step's sequences and begin their copy to the device, without waiting for it."""
    num_sequences = count_sequences(data.train, config.seq_len)
    numbers = step_sequence_numbers(step, config.effective_batch_size, num_sequences, config.seed)
    x, y = sequences(data.train, numbers, config.seq_len, data.bos_id)  # (sequences, seq_len)
    # Every process knows the whole step, and takes its own part of it.
    parts = [ids.tensor_split(worker.world_size)[worker.rank] for ids in (x, y)]
    base_embeds = overlay.base_embed(parts[0])
    # From pinned memory the copy runs beside the computation.
    if worker.device.type == "cuda":
        parts = [part.pin_memory().to(worker.device, non_blocking=True) for part in parts]
    return StepBatch(step, *parts, base_embeds, x, numbers)


def learning_rate_at(step: int, config: Config) -> float:
    """Rise linearly to the peak at warmup_ratio x max_steps, then fall as a cosine.

    The cosine would reach 0 one step after the last one, so that every step trains.
    """
    warmup_steps = round(config.warmup_ratio * config.max_steps)  # 0 if there is no warm-up
    if step <= warmup_steps:
        return config.learning_rate * step / warmup_steps
    share = (step - warmup_steps) / (config.max_steps + 1 - warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def check_finite(step: int, loss: float, norm: float, batch: StepBatch) -> None:
    """Raise a UserError before the update if the loss or the gradient is not finite."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(
            f"step {step}: loss {loss}, gradient norm {norm} on sequences"
            f" {batch.sequence_numbers.tolist()}; stopped before the update, what is saved is"
            " whole: continue with compute_dtype float32 or bfloat16, or start over with --fresh"
            " and a lower learning_rate"
        )


# ---- Evaluation ----------------------------------------------------------------------------------


def has_bar(worker: Worker) -> bool:
    """Say whether this process draws bars: the first one, on a terminal or in a notebook."""
    return worker.rank == 0 and (sys.stderr.isatty() or in_notebook())


def shown(items: Sequence, what: str, worker: Worker) -> Iterator:
    """Yield the items; if that takes long, show `what` by a bar, or by one line where none is."""
    from tqdm.auto import tqdm

    began, said = time.monotonic(), has_bar(worker)  # a bar says it already
    # At the place of the bar of the steps, which is not drawn meanwhile.
    how = {"leave": False, "position": 0, "disable": not has_bar(worker)}
    for number, item in enumerate(tqdm(items, what, delay=SLOW_LOOP_SECONDS, mininterval=1, **how)):
        if not said and time.monotonic() - began > SLOW_LOOP_SECONDS:
            worker.say(f"{what}: {number} of {len(items)}")
            said = True
        yield item


def held_out_batches(
    data: Data, config: Config, worker: Worker, micro_batch_size: int, what: str
) -> Iterator[Tensor]:
    """Yield the numbers of this process's held-out sequences, one micro-batch at a time.

    what: "evaluating" or the like, for the bar or line that shows how far it is
    """
    numbers = torch.arange(count_sequences(data.val, config.seq_len))
    mine = numbers.tensor_split(worker.world_size)[worker.rank]
    # Of no numbers, torch makes one empty part; there may be more processes than sequences.
    yield from shown([part for part in mine.split(micro_batch_size) if len(part)], what, worker)


def sum_over_processes(sums: Tensor, worker: Worker) -> list | float:
    """Sum what each process found in its share; the barrier waits longest for a slow process."""
    sums = sums.to(worker.device)
    barrier(worker)
    all_reduce_sum(worker, sums)
    return sums.tolist()


def count_held_out_bytes(data: Data, seq_len: int) -> int:
    """Count the UTF-8 bytes of the text that the held-out targets stand for.

    The first token of the first sequence is an input and no target, so its text is not counted.
    """
    end = data.val_ends[count_sequences(data.val, seq_len) * seq_len]
    return len(data.val_text[data.val_ends[0] : end].encode("utf-8"))


@torch.no_grad()
def held_out_loss(
    overlay: WakeOverlay, data: Data, config: Config, worker: Worker, micro_batch_size: int
) -> dict[str, float]:
    """Evaluate every held-out sequence, split over the processes.

    -> val_loss: nats per predicted token
       val_bits_per_byte: bits per byte of the text of these tokens, whatever the vocabulary
       val_loss_new_words, val_loss_ordinary: val_loss over one kind of target
    """
    # Sums in float64: a book has 100,000 targets, and fp32 would lose their last digits.
    sums = torch.zeros(2, 2, dtype=torch.float64)  # (ordinary, new) targets x (nats, count)
    for numbers in held_out_batches(data, config, worker, micro_batch_size, "evaluating"):
        x, y = sequences(data.val, numbers, config.seq_len, data.bos_id)
        hidden = overlay.body(inputs_embeds=overlay.embed(x), use_cache=False).last_hidden_state
        losses = overlay.loss(hidden, y)[0].double().cpu()  # (B, T)
        for kind, of_kind in enumerate((y < overlay.first_new_id, y >= overlay.first_new_id)):
            sums[kind] += torch.stack([losses[of_kind].sum(), of_kind.sum()])
    (nats, count), (new_nats, new_count) = sum_over_processes(sums, worker)
    num_bytes = count_held_out_bytes(data, config.seq_len)
    return {
        "val_loss": (new_nats + nats) / (new_count + count),
        "val_bits_per_byte": (new_nats + nats) / math.log(2) / num_bytes,
        "val_loss_new_words": new_nats / max(new_count, 1),
        "val_loss_ordinary": nats / max(count, 1),
    }


@torch.no_grad()
def base_bits_per_byte(
    overlay: WakeOverlay, data: Data, config: Config, worker: Worker, micro_batch_size: int,
    tokenizer: Tokenizer,
) -> float:  # fmt: skip
    """Measure the bits per byte of the unextended base model, with its own tokenizer.

    Each sequence here is the text of one held-out sequence of ours, so both models see the same
    characters of context.
    """
    ends, seq_len = data.val_ends.tolist(), config.seq_len
    total, what = torch.zeros((), dtype=torch.float64), "evaluating the base model"
    for numbers in held_out_batches(data, config, worker, micro_batch_size, what):
        firsts = (numbers * seq_len).tolist()
        pairs = [base_sequence(tokenizer, data, ends, first, seq_len) for first in firsts]
        # The body is causal, so what fills up a short sequence at its end cannot matter.
        width = max(len(ids) for ids, _ in pairs)
        x = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in pairs])  # (B, width)
        y = torch.tensor([targets + [-100] * (width - len(targets)) for _, targets in pairs])
        body = overlay.body(inputs_embeds=overlay.base_embed(x), use_cache=False)
        losses, _ = overlay.loss(body.last_hidden_state, y, base_only=True)
        total += losses.double().sum().cpu()
    nats = sum_over_processes(total, worker)
    return nats / math.log(2) / count_held_out_bytes(data, seq_len)


def base_sequence(
    tokenizer, data: Data, ends: list[int], first: int, seq_len: int
) -> tuple[list[int], list[int]]:
    """Return (inputs, targets) in base tokens for the held-out sequence that begins at `first`.

    The text of that sequence's first token is context and no target, as in our own sequences.
    """
    # Our first token's text is encoded too, because some tokenizers put a space before a text. If
    # that token is a later byte of a letter, the text begins where the letter does.
    middle = ends[first]
    begin = bisect.bisect_left(ends, middle)
    start = ends[begin - 1] if begin else 0
    text = data.val_text[start : ends[first + seq_len]]
    encoding = tokenizer.encode(text, add_special_tokens=False)
    spans = zip(encoding.ids, encoding.offsets)
    targets = [i if end > middle - start else -100 for i, (_, end) in spans]
    if data.bos_id is None:
        return encoding.ids[:-1], targets[1:]
    targets = [i for i in targets if i >= 0]  # a BOS stands in the place of the first token
    return [data.bos_id, *targets[:-1]], targets


def sample(
    model, tokenizer: Tokenizer, first_new_id: float, config: Config, worker: Worker
) -> tuple[list[str], float]:
    """Continue each prompt -> the texts, new words marked **so**, and their share of the tokens.

    The random numbers come from the seed alone, so at every evaluation they are the same.
    """
    texts, new, how = [], [], {"max_new_tokens": SAMPLE_TOKENS, "top_p": 0.95, "top_k": 0}
    for prompt in shown(config.prompts, "continuing the prompts", worker):
        ids = continue_prompt(model, tokenizer, prompt, config.seed, **how)
        texts.append(mark_new_words(ids, tokenizer, first_new_id))
        new += [token >= first_new_id for token in ids[len(prompt_ids(tokenizer, prompt)) :]]
    return texts, sum(new) / max(len(new), 1)


def sample_section(title: str, texts: list[str], remark: str = "") -> str:
    """Make a section of samples.md."""
    return f"## {title}\n\n{remark}" + "".join(f"> {' '.join(t.split())}\n\n" for t in texts)


def first_samples(samples: str) -> list[tuple[str, str]]:
    """List (title, first text) of the first and of the last section of samples.md."""
    # A model may write control characters, and a terminal would obey them.
    samples = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in samples)
    found = re.findall(r"^## (.+?)$.*?^> (.+?)$", samples, re.MULTILINE | re.DOTALL)
    return [found[0], found[-1]] if len(found) > 1 else found


# ---- Records -------------------------------------------------------------------------------------


def loss_table(records: list[dict]) -> str:
    """Make the run's loss table in Markdown: one line for each evaluation, ready to paste."""
    lines, best, train_loss = ["| Step | Train | Val | Notes |", "|---|---|---|---|"], math.inf, "-"
    for record in records:
        if record["kind"] == "train":
            train_loss = f"{record['loss']:.4f}"
            continue
        notes = [f"{record['val_bits_per_byte']:.3f} bits/byte"]
        if best == math.inf:
            notes.append(
                f"base model {record['base_bits_per_byte']:.3f},"
                f" uniform loss {record['uniform_loss']:.2f}"
            )
        if record["val_loss"] < best:
            best = record["val_loss"]
            notes.append("best")
        notes += record["warnings"]
        row = f"{record['val_loss']:.4f} | {'; '.join(notes)}"
        lines.append(f"| {record['step']} | {train_loss} | {row} |")
    return "\n".join(lines) + "\n"


def plot_losses(records: list[dict], path: Path) -> None:
    """Draw nats per token beside the uniform line, and bits per byte beside the base model's."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state in a notebook

    trained = [record for record in records if record["kind"] == "train"]
    evaluated = [record for record in records if record["kind"] == "eval"]
    # Two panels: nats depend on the vocabulary, bits per byte do not.
    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2)
    held_out = {"label": "held-out", "color": "tab:orange", "marker": "."}
    for axes, rows, name, style in (
        (left, trained, "loss", {"label": "train", "color": "tab:blue", "lw": 1}),
        (left, evaluated, "val_loss", held_out),
        (right, evaluated, "val_bits_per_byte", held_out),
    ):
        axes.plot([r["step"] for r in rows], [r[name] for r in rows], **style)
    first, uniform, base = evaluated[0], "uniform guess, ln(vocabulary)", "unextended base model"
    left.axhline(first["uniform_loss"], color="tab:red", ls=":", label=uniform)
    right.axhline(first["base_bits_per_byte"], color="tab:green", ls="--", label=base)
    left.set(xlabel="step", ylabel="loss, nats per predicted token", title="Loss")
    right.set(xlabel="step", ylabel="bits per byte of held-out text")
    right.set_title("Against the base model")
    for axes in (left, right):
        # From zero, so that a small gain does not look large.
        axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    with replacing(path) as part:
        figure.savefig(part, format="png")


@dataclasses.dataclass
class Records:
    """This keeps metrics.jsonl and what is made of it; a continued run takes its save's copy."""

    folder: Path
    config: Config
    lines: list[str] = dataclasses.field(default_factory=list)
    samples: str = ""
    board: object = None
    picture: object = None  # the plot in a notebook

    def __post_init__(self):
        write_text(self.folder / "metrics.jsonl", "".join(self.lines))
        write_text(self.folder / "samples.md", self.samples)
        if self.last_evaluation():
            self.draw()
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.folder / "tensorboard")

    def parsed(self) -> list[dict]:
        return [json.loads(line) for line in self.lines]

    def add(self, record: dict) -> None:
        self.lines.append(json.dumps(record) + "\n")
        # Appended line by line: after a kill all but the last line is there.
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(self.lines[-1])
        if self.board:
            for name, value in record.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{record['kind']}/{name}", value, record["step"])
        if record["kind"] == "eval":
            self.draw()

    def last_evaluation(self) -> dict:
        return next((r for r in reversed(self.parsed()) if r["kind"] == "eval"), {})

    def draw(self) -> None:
        records = self.parsed()
        write_text(self.folder / "loss_table.md", loss_table(records))
        plot_losses(records, self.folder / "loss.png")
        if in_notebook():
            from IPython.display import Image, display

            plot = Image((self.folder / "loss.png").read_bytes())
            if self.picture:
                self.picture.update(plot)
            else:
                self.picture = display(plot, display_id=True)

    def show_texts(self) -> None:
        """Display the table and the samples in a notebook, where the plot is shown already."""
        if in_notebook():
            from IPython.display import Markdown, display

            display(Markdown(f"{loss_table(self.parsed())}\n{self.samples}"))

    def add_samples(self, section: str) -> None:
        self.samples += section
        write_text(self.folder / "samples.md", self.samples)


class Progress:
    """This prints process 0's lines, and below them a bar on a terminal or in a notebook.

    The time left counts the steps, evaluations and saves that are still to come, each with what the
    last ones took.
    """

    def __init__(self, worker: Worker, config: Config, first_step: int):
        from tqdm.auto import tqdm

        self.worker, self.config = worker, config
        self.recent = collections.deque(maxlen=20)  # seconds of the last steps
        self.seconds = {"step": 0.0, "evaluation": 0.0, "save": 0.0}
        self.bar = tqdm(
            initial=first_step, total=config.max_steps, mininterval=2, disable=not has_bar(worker),
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )  # fmt: skip

    def timed(self, what: str, call: Callable):
        """Call and return; the next one of its kind is expected to take as long."""
        began = time.monotonic()
        result = call()
        self.seconds[what] = time.monotonic() - began
        return result

    def left(self, step: int) -> datetime.timedelta:
        """Estimate the time that is left after a step, and before its own evaluation and save."""
        end, config = self.config.max_steps, self.config
        seconds = (end - step) * self.seconds["step"]
        for what, every in (("evaluation", config.eval_every), ("save", config.save_every)):
            seconds += (math.ceil(end / every) - (step - 1) // every) * self.seconds[what]
        return datetime.timedelta(seconds=round(seconds))

    def step(self, step: int, line: str, seconds: float) -> None:
        """Count a step, and every log_every steps print its line with the time that is left."""
        self.recent.append(seconds)
        self.seconds["step"] = statistics.median(self.recent)  # the first step is a slow one
        self.bar.set_postfix_str(f"{self.left(step)} left", refresh=False)
        self.bar.update()
        if step % self.config.log_every == 0 or step == self.config.max_steps:
            self.say(f"{line}  {self.left(step)} left")

    def say(self, text: str) -> None:
        """Print a line at once; the bar leaves the screen meanwhile."""
        with self.bar.external_write_mode():
            self.worker.say(text)

    def close(self) -> None:
        self.bar.set_postfix_str("")  # nothing is left
        self.bar.close()


# The lines of steps and evaluations have less than 80 columns, so that no terminal wraps them.


def step_line(record: dict, max_steps: int) -> str:
    peak = f"  {record['peak_vram_gib']:.1f} GiB" if "peak_vram_gib" in record else ""
    return (
        f"step {record['step']}/{max_steps}  loss {record['loss']:.4f}"
        f"  lr {record['learning_rate']:.1e}  {record['step_seconds']:.2f} s/step{peak}"
    )


def eval_line(record: dict) -> str:
    lines = [
        f"step {record['step']}  held-out loss {record['val_loss']:.4f}"
        f"  {record['val_bits_per_byte']:.3f} bits/byte"
        f" (base model {record['base_bits_per_byte']:.3f})",
        f"  new words {record['val_loss_new_words']:.2f}, others"
        f" {record['val_loss_ordinary']:.2f}, blind guess {record['uniform_loss']:.2f}",
    ]
    return "\n".join([*lines, *(f"warning: {text}" for text in record["warnings"])])


def what_bits_mean(trained: float, base: float) -> str:
    """Say in words how much better or worse the trained model predicts the held-out text."""
    less = 100 * (1 - trained / base)
    meaning = f"the text surprises the trained model {less:.0f} % less than the untouched one"
    if less < 0:
        meaning = f"worse by {-less:.0f} %: do not use these rows; train longer, or on more text"
    return f"bits per byte of held-out text: untouched {base:.3f}, trained {trained:.3f}: {meaning}"


def closing_lines(config: Config, step: int, records: Records) -> str:
    """Sum up a run: what was learnt, one text of both models, where all lies, how to go on."""
    folder, last = shlex.quote(config.run_dir), records.last_evaluation()
    local, durable = save_folders(config)
    best = next((path.name for path in by_held_out_loss(local, durable)), "none")
    learnt = [what_bits_mean(last["val_bits_per_byte"], last["base_bits_per_byte"])]
    for title, text in first_samples(records.samples):
        learnt.append(f"{title}: {textwrap.shorten(text, 300, placeholder=' ...')}")
    prompt = shlex.quote(config.prompts[0]) if config.prompts else '"a prompt"'
    return "\n".join([
        *(textwrap.fill(line, 79, subsequent_indent="    ") for line in learnt),
        f"in {folder}: loss.png, loss_table.md, samples.md",
        f"saves in {durable}, the best is {best}: --step best",
        f"continue  python train.py {folder}/config.yaml max_steps={2 * step}",
        f"generate  python recover.py generate {folder} {prompt}",
        f"export    python recover.py export {folder} OUT --format merged",
    ])  # fmt: skip


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "accelerate", "bitsandbytes")
    return {"python": sys.version.split()[0]} | {name: installed_version(name) for name in names}


# ---- Starting and continuing ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Start:
    """A run starts from these: its words, its data, and a save, which is None for a new run."""

    words: NewWords
    data: Data
    sentry: Sentry | None


def save_folders(config: Config) -> list[Path]:
    """Return the two folders of a run's saves: the local one and the durable one."""
    run_dir = Path(config.run_dir)
    return [run_dir / "snapshots", Path(config.sentry_dir or run_dir / "sentries")]


def run_identity(config: Config, words: NewWords, data: Data) -> dict:
    """Collect the facts that a save must share with this run to continue it."""
    return {
        "model_name": config.model_name,
        "model_revision": config.model_revision,
        "words_sha256": new_words_hash(words.words, words.first_new_id),
        "corpus_sha256": data.sha256,
    }


def lock_run(run_dir: Path):
    """Hold RUN_DIR for this process; the lock ends with the process, however it dies.

    Raises: UserError if another training holds it, or if nothing can be written
    """
    from filelock import FileLock, Timeout

    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        return FileLock(run_dir / ".lock").acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"run_dir: another training is using {run_dir}; wait for it, or give another run_dir"
        ) from None
    except OSError as error:
        raise UserError(f"run_dir: {error}; give a folder that can be written") from None


@contextlib.contextmanager
def notice_if_slow(worker: Worker, text: str) -> Iterator[None]:
    """Say `text` if the block takes long: a mounted Drive can hang for minutes, and a start without
    a word looks like a crash."""
    timer = threading.Timer(SLOW_START_NOTICE_SECONDS, worker.say, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_sentry_dir(config: Config) -> None:
    """Raise a UserError if sentry_dir cannot take a save, before anything is loaded.

    Its parent must be there. If a Drive is not mounted, the folder would be made on the local disk,
    and the saves would be lost with the machine.
    """
    if config.sentry_dir:
        folder = Path(config.sentry_dir)
        if not folder.parent.is_dir():
            raise UserError(
                f"sentry_dir: {folder.parent} is missing, in which {folder.name} would be made;"
                " mount the Drive, or make that folder"
            )
        try:
            folder.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"wake2vec")
        except OSError as error:
            raise UserError(f"sentry_dir: {error}; give a folder that can be written") from None


def prepare_start(config: Config, worker: Worker, fresh: bool, step: int | None) -> Start:
    """Make words and data, and find the save to continue from.

    Process 0 comes first and writes the folder. The other processes read it afterwards, so they
    make the same words and find the same save. --fresh moves the old run aside after words and data
    are made, so a run that cannot start leaves the old one in place.
    Raises: UserError; the folder is then as it was
    """
    if worker.rank == 0:
        with notice_if_slow(worker, f"still waiting for {config.sentry_dir}"):
            check_sentry_dir(config)
    texts = read_corpus(config)
    words = extend(config, texts, fresh)
    data = load_data(config, words, texts)
    if fresh and worker.rank == 0:
        start_over(config)
    sentry = find_sentry(config, words, data, worker, step)
    if worker.rank == 0:
        save_new_words(config, words)
        settings = Path(config.run_dir, "config.yaml")
        if sentry is None or sentry.step < config.max_steps or not settings.exists():
            write_config(config)  # a finished run keeps the settings that it was trained with
    worker.say(format_report(words.report))
    return Start(words, data, sentry)


def shared_facts(config: Config, start: Start) -> dict:
    """Collect what all processes must have in common, as they train, evaluate and end together."""
    keys = [f.name for f in dataclasses.fields(config) if f.metadata["changes_run"]]
    keys += ["max_steps", "eval_every", "save_every"]
    facts = {key: getattr(config, key) for key in keys}
    step = start.sentry.step if start.sentry else 0
    return facts | run_identity(config, start.words, start.data) | {"step": step}


def start_over(config: Config) -> None:
    """Move all that is in RUN_DIR and in sentry_dir into old-1/, old-2/ ... there, for --fresh."""
    for folder in {Path(config.run_dir), Path(config.sentry_dir or config.run_dir)}:
        paths = list(folder.iterdir()) if folder.is_dir() else []
        # Moved and not deleted: --fresh by mistake costs nothing.
        aside = folder / f"old-{1 + sum(path.name.startswith('old-') for path in paths)}"
        for path in paths:
            if not path.name.startswith("old-") and path.name != ".lock":
                aside.mkdir(exist_ok=True)
                path.rename(aside / path.name)


PUT_BACK = "put these keys back to continue, or start over with --fresh (the old run is kept aside)"


def find_sentry(
    config: Config, words: NewWords, data: Data, worker: Worker, step: int | None
) -> Sentry | None:
    """Find the save to continue from and announce it; process 0 puts every newer one aside."""
    folders, identity = save_folders(config), run_identity(config, words, data)
    wait = f"still waiting for {folders[1]}: the newest sentry may be there, so nothing starts yet"
    with notice_if_slow(worker, wait):
        try:
            sentry, skipped = pick_sentry(folders, identity, step)
        except UserError:
            explain_another_run(folders, step, config, words, identity)
            raise
    if sentry is None:
        return None
    if problems := changed_keys(sentry.state.get("config", {}), config):
        raise UserError(*problems, PUT_BACK)
    for reason in skipped:
        worker.say(f"passed over: {reason}")
    worker.say(f"continuing from {sentry.path}, step {sentry.step}")
    if (before := sentry.state["config"].get("max_steps")) not in (None, config.max_steps):
        worker.say(f"max_steps was {before}: from here the learning rate is that of the new one")
    if worker.rank == 0:
        set_aside(folders, sentry)
    return sentry


def explain_another_run(
    folders: list[Path], step: int | None, config: Config, words: NewWords, identity: dict
) -> None:
    """Raise a UserError that names all that the newest save does not share with this run.

    If a save does belong to this run, nothing is raised: it is damaged, as `pick_sentry` has said.
    """
    found = []  # for each readable save, the newest first, what it does not share
    for number, path in sentry_folders(*folders):
        if step not in (None, number):
            continue
        try:
            state, _ = read_marker(path)
        except UserError:
            continue  # no marker, or a damaged one: `pick_sentry` names it
        problems = changed_keys(state.get("config", {}), config)
        if state.get("words_sha256") not in (identity["words_sha256"], NOT_KNOWN):
            problems.append(lexicon_change(path / "words.txt", words.words))
        if state.get("corpus_sha256") not in (identity["corpus_sha256"], NOT_KNOWN):
            problems.append("corpus: its text is not the one that the run was started with")
        found.append(problems)
    if found and all(found):
        raise UserError(*found[0], PUT_BACK)


def changed_keys(old: dict, config: Config) -> list[str]:
    """Name every key whose change would make this another training."""
    problems = []
    for field in dataclasses.fields(config):
        before = old.get(field.name, field.metadata.get("before"))
        now = getattr(config, field.name)  # no list or tuple: JSON makes nothing else of it
        if field.metadata["changes_run"] and before != now:
            problems.append(f"{field.name}: the run was started with {before!r}, now it is {now!r}")
    return problems


def lexicon_change(path: Path, words: list[str]) -> str:
    """Say how many words differ from those of a save."""
    before = path.read_text(encoding="utf-8").split() if path.is_file() else []
    added, gone = set(words) - set(before), set(before) - set(words)
    ids = "" if added or gone else "; the same words have other ids"
    return f"the lexicon changed: {len(added):,} words added, {len(gone):,} gone{ids}"


def load_rows(optimizer: Optimizer, sentry: Sentry) -> None:
    """Copy a save's rows and statistics into this run; each must have the shape of its place."""
    tensors = load_file(sentry.path / "rows.safetensors")
    for name, tensor in optimizer.tensors().items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise UserError(
                f"{sentry.path}: {name} is missing or not of shape {list(tensor.shape)}"
            )
        tensor.copy_(tensors[name])


def open_records(config: Config, sentry: Sentry | None, worker: Worker):
    """Open the records as they were at the save, and a writer of saves, for process 0 alone."""
    if worker.rank > 0:
        return None, None
    # The save has its own copy of the records, so lines of steps that are redone do not double.
    metrics, samples = (
        (sentry.path / name).read_text(encoding="utf-8") if sentry else ""
        for name in ("metrics.jsonl", "samples.md")
    )
    local, durable = save_folders(config)
    # The save that the run continues from was proved whole, and what is newer was put aside.
    first_step = sentry.step + (sentry.path.parent != local) if sentry else 0
    writer = SentryWriter(local, durable, config.keep_sentries, worker.say, first_step)
    lines = metrics.splitlines(keepends=True)
    return Records(Path(config.run_dir), config, lines, samples), writer


# ---- The run -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """This holds all parts of a run in progress; only process 0 has `records` and `writer`."""

    config: Config
    worker: Worker
    words: NewWords
    data: Data
    overlay: WakeOverlay
    optimizer: Optimizer
    loss_scale: LossScale
    plan: StepPlan
    records: Records | None
    writer: SentryWriter | None
    step: int
    optimizer_step: int  # less than step if the run was imported, as its optimizer began anew
    best_val_loss: float
    base_bits_per_byte: float | None
    evaluation: dict = dataclasses.field(default_factory=dict)  # the last one since this start
    buffers: dict = dataclasses.field(default_factory=dict)  # host memory of the saves

    def save(self) -> None:
        """Begin a save in the background; training waits for the copy to the host alone."""
        if self.writer:
            self.writer.finish_local()  # the buffers that this save takes are free again
            state = {
                "step": self.step,
                **run_identity(self.config, self.words, self.data),
                "first_new_id": self.words.first_new_id,
                "num_new_tokens": len(self.words.words),
                "sequences_seen": self.step * self.config.effective_batch_size,
                "loss_scale": dataclasses.asdict(self.loss_scale),
                "optimizer_step": self.optimizer_step,
                # The held-out loss at this very step: the save with the lowest one is the best.
                "val_loss": self.evaluation["val_loss"] if self.is_evaluated() else None,
                "best_val_loss": self.best_val_loss if self.best_val_loss < math.inf else None,
                "base_bits_per_byte": self.base_bits_per_byte,
                "config": dataclasses.asdict(self.config),
                "versions": versions(),
            }
            texts = {
                "metrics.jsonl": "".join(self.records.lines),
                "samples.md": self.records.samples,
                "words.txt": "\n".join(self.words.words) + "\n",
            }
            self.writer.save(host_copies(self.optimizer.tensors(), self.buffers), texts, state)
        barrier(self.worker)  # process 0 may have waited for the save before

    def log(self, loss: float, norm: float, learning_rate: float, seconds: float) -> dict:
        """Return the record of this step; every log_every steps and at the last step, keep it."""
        tokens = self.config.effective_batch_size * self.config.seq_len
        record = {
            "step": self.step, "kind": "train", "loss": loss, "learning_rate": learning_rate,
            "grad_norm": norm, "step_seconds": seconds, "tokens_per_second": tokens / seconds,
        }  # fmt: skip
        if (peak := peak_gib(self.plan, self.worker)) is not None:
            record["peak_vram_gib"] = peak
        if self.records and (self.step % self.config.log_every == 0 or self.is_done()):
            self.records.add(record)
        return record

    def is_done(self) -> bool:
        return self.step >= self.config.max_steps

    def is_evaluated(self) -> bool:
        return self.evaluation.get("step") == self.step

    def is_best(self) -> bool:
        return self.is_evaluated() and self.evaluation["val_loss"] == self.best_val_loss

    def evaluate(self) -> dict:
        """Evaluate, continue the prompts, record both, and return the record."""
        return self.smaller_if_needed(self.evaluate_once)

    def smaller_if_needed(self, evaluate: Callable):
        where = f"the evaluation at step {self.step}"
        return smaller_if_needed(evaluate, self.plan, self.overlay, self.worker, where)

    def parts(self) -> tuple:
        return self.overlay, self.data, self.config, self.worker, self.plan.eval_micro_batch_size

    def evaluate_base(self) -> None:
        """Measure the untouched model, once in a run, and have it continue the prompts."""
        base = self.words.base
        self.base_bits_per_byte = base_bits_per_byte(*self.parts(), base)
        if self.records and self.config.prompts:
            with untouched_model(self.overlay) as model:
                texts, _ = sample(model, base, math.inf, self.config, self.worker)
            self.records.add_samples(sample_section("The untouched model", texts))
        barrier(self.worker)

    def evaluate_once(self) -> dict:
        """Evaluate once; the record comes last, so `evaluate` can repeat this after an error."""
        record = {"step": self.step, "kind": "eval"} | held_out_loss(*self.parts())
        uniform, base = math.log(self.overlay.vocab_size), self.base_bits_per_byte
        record |= {"uniform_loss": uniform, "base_bits_per_byte": base, "warnings": []}
        if record["val_loss"] > uniform:
            record["warnings"].append(
                f"above the uniform loss {uniform:.2f}: worse than a blind guess"
            )
        if record["val_bits_per_byte"] > base:
            record["warnings"].append(f"above the unextended base model's {base:.3f} bits/byte")
        # Which saves are made and kept depends on these two, and nothing else in training.
        self.best_val_loss = min(self.best_val_loss, record["val_loss"])
        self.evaluation = record
        if self.records:
            section = self.sample_trained() if self.config.prompts else ""
            self.records.add(record)
            self.records.add_samples(section)
        barrier(self.worker)
        return record

    def sample_trained(self) -> str:
        """Continue the prompts with the rows as they are -> a section of samples.md."""
        model, words = self.overlay.model, self.words
        parts = model, words.tokenizer, words.first_new_id, self.config, self.worker
        texts, share = sample(*parts)
        in_corpus = (self.data.train >= words.first_new_id).double().mean().item()
        remark = f"New words: {share:.1%} of the tokens; in the corpus {in_corpus:.1%}.\n\n"
        return sample_section(f"Step {self.step}", texts, remark)


class StopRequest:
    """SIGTERM or Ctrl-C asks for a save and an end after the step; a second signal ends at once."""

    def __init__(self):
        self.name, self.old = "", {}

    def __enter__(self):
        # SIGTERM is what a scheduler sends, SIGINT what Ctrl-C and the stop button send.
        for number in (signal.SIGTERM, signal.SIGINT):
            self.old[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def note(self, number: int, _frame) -> None:
        self.name = signal.Signals(number).name
        line = f"\n{self.name}: stopping after this step, saved; once more ends at once\n"
        os.write(2, line.encode())  # a signal can come in the middle of a print
        self.__exit__()  # a second signal meets the handlers from before, and ends at once


def build_run(config: Config, worker: Worker, start: Start) -> Run:
    """Build model, overlay and optimizer, fill the rows, and fit the step to the machine.

    The rows are those of step 0, or those of the save that the run continues from.
    """
    words, sentry = start.words, start.sentry
    state = sentry.state if sentry else {}
    worker.say(loading_line(config))
    overlay = build_overlay(config, worker, words, continuing=bool(sentry))
    check_ids(overlay.model, words.first_new_id, torch.cat([start.data.train, start.data.val]))
    optimizer = Optimizer(overlay, sharing_matrices(
        words.words, words.spellings, config.row_coupling, config.kin_coupling, overlay.grad.device
    ))  # fmt: skip
    records, writer = open_records(config, sentry, worker)
    if sentry:
        load_rows(optimizer, sentry)
    barrier(worker)  # all have read the save before process 0 may delete it
    loss_scale = LossScale()
    if worker.dtype == torch.float16:
        loss_scale = LossScale(**state.get("loss_scale", {}))
        if loss_scale.value == 1.0:  # a new run, or one that had another dtype until now
            loss_scale.value = FLOAT16_LOSS_SCALE
    batches = [prepare_step(step, overlay, start.data, config, worker) for step in (1, 2)]
    if worker.device.type == "cuda":
        worker.say("fitting a step to the card: trials, compiling and capture take up to a minute")
    plan = fit_to_machine(overlay, batches, config, worker)
    barrier(worker)
    return Run(
        config=config, worker=worker, words=words, data=start.data, overlay=overlay,
        optimizer=optimizer, loss_scale=loss_scale, plan=plan, records=records, writer=writer,
        step=state.get("step", 0), optimizer_step=state.get("optimizer_step", 0),
        best_val_loss=state.get("best_val_loss") or math.inf,
        base_bits_per_byte=state.get("base_bits_per_byte"),
    )  # fmt: skip


def heading(run: Run) -> str:
    """Say what runs: versions, device, sizes, and how a step is computed."""
    worker, config, plan = run.worker, run.config, run.plan
    num_words, hidden_size = run.overlay.input_rows.shape
    dtype, size = str(worker.dtype).removeprefix("torch."), run.overlay.vocab_size
    accumulation = config.effective_batch_size // worker.world_size // plan.micro_batch_size
    recomputed = f"{plan.num_recomputed_layers} of {len(run.overlay.layers)} layers recomputed"
    return (
        ", ".join(f"{name} {number}" for name, number in versions().items())
        + f"\n{device_name(worker)}, compute dtype {dtype} ({worker.why_dtype})"
        f"\ntrainable {num_words:,} rows x {hidden_size:,},"
        f" ln(vocabulary of {size:,}) = {math.log(size):.2f}"
        f"\nmicro_batch_size {plan.micro_batch_size} x {accumulation} on {worker.world_size}"
        f" process(es), {config.effective_batch_size * config.seq_len:,} tokens a step\n"
        + ", ".join([recomputed, *plan.remarks])
    )


def train_steps(run: Run, stop: StopRequest, progress: Progress) -> None:
    """Run the loop: accumulate, wait once, check, clip, update, log, evaluate, save, stop."""
    config, worker, optimizer = run.config, run.worker, run.optimizer
    parts = run.overlay, run.data, config, worker
    tokens_per_step = config.effective_batch_size * config.seq_len
    batch = prepare_step(run.step + 1, *parts)
    while not run.is_done():
        step, began = run.step + 1, time.perf_counter()
        # Forward and backward of all micro-batches. Before the last backward, while the device is
        # still at work, the next step's sequences are looked up.
        prepare_next = functools.partial(prepare_step, step + 1, *parts)
        loss_sum, following = run_step(
            run.plan, batch, run.overlay, worker, run.loss_scale, prepare_next
        )
        # The step's one wait for the device; every process gets the same three values.
        loss_sum, norm, stopping = agree(
            worker, loss_sum, optimizer.gradient_norm(), bool(stop.name), run.loss_scale
        )
        loss = loss_sum / tokens_per_step
        check_finite(step, loss, norm, batch)  # before anything is changed
        # As torch.nn.utils.clip_grad_norm_, but the factor goes into the update: no extra pass.
        clip = min(1.0, config.max_grad_norm / (norm + 1e-6))
        learning_rate = learning_rate_at(step, config)
        optimizer.update(run.optimizer_step + 1, learning_rate, clip)
        if worker.dtype == torch.float16:
            run.loss_scale.step_done()  # 200 steps without an overflow double it
        run.step, run.optimizer_step, batch = step, run.optimizer_step + 1, following
        record = run.log(loss, norm, learning_rate, time.perf_counter() - began)
        progress.step(step, step_line(record, config.max_steps), record["step_seconds"])
        if step % config.eval_every == 0 or run.is_done():
            progress.say(eval_line(progress.timed("evaluation", run.evaluate)))
        if step % config.save_every == 0 or run.is_best() or run.is_done() or stopping:
            progress.timed("save", run.save)
        if run.writer:
            run.writer.check()  # raises the error of a background save
        if stopping:
            stop.name = stop.name or "a signal to another process"
            return


def train_to_the_end(config: Config, worker: Worker, start: Start, stop: StopRequest) -> Run:
    """Load the model, evaluate, run the loop, and wait until the last save is written."""
    run = build_run(config, worker, start)
    worker.say(heading(run))
    progress = Progress(worker, config, run.step)
    try:
        # If a signal came while the model was loaded, a single process ends here. Several processes
        # take a step first, at whose end they agree to stop.
        if not (stop.name and worker.world_size == 1):
            if run.best_val_loss == math.inf:  # a new run, or an imported one
                run.smaller_if_needed(run.evaluate_base)
                progress.say(eval_line(progress.timed("evaluation", run.evaluate)))
            train_steps(run, stop, progress)
    finally:
        progress.close()
        if run.writer:
            run.writer.finish()
    return run


def nothing_left(config: Config, worker: Worker, sentry: Sentry) -> Records | None:
    """Return the records of a finished run, without loading its model."""
    worker.say(f"step {sentry.step} of {config.max_steps}: nothing left to do; raise max_steps")
    records, writer = open_records(config, sentry, worker)
    if writer:
        writer.finish()  # the durable folder gets what it lacks
    return records


def train(
    config: Config | str | Path, *overrides: str, fresh: bool = False, step: int | None = None
) -> dict:
    """Train or continue a run; config: a YAML path, with key=value overrides, or a Config.

    "--fresh" among the overrides is fresh=True, because the errors name it so.
    Returns the last evaluation's record with 'step' and 'stopped' (the signal's name or '').
    Raises: UserError with one line for each thing that the user can mend
    """
    fresh = fresh or "--fresh" in overrides
    config = load_config(config, *(text for text in overrides if text != "--fresh"))
    apply()
    check_options(config, fresh, step)
    free_cached_memory()  # in a notebook an earlier, stopped run may have left some
    worker = find_worker(config)
    with known_errors_in_one_line(config.run_dir, worker), contextlib.ExitStack() as held:
        if worker.rank == 0:
            # Before the others are joined: an error here ends process 0, and torchrun the others.
            held.enter_context(lock_run(Path(config.run_dir)))
            start = prepare_start(config, worker, fresh, step)
        worker = join_processes(worker)
        if worker.rank > 0:
            start = prepare_start(config, worker, fresh, step)
        check_same_run(worker, shared_facts(config, start))
        stop, saved = held.enter_context(StopRequest()), start.sentry
        # A save from `recover.py import` was not evaluated yet, so that run is not over.
        if saved and saved.step >= config.max_steps and saved.state.get("best_val_loss"):
            step, records = saved.step, nothing_left(config, worker, saved)
        else:
            run = train_to_the_end(config, worker, start, stop)
            step, records = run.step, run.records
        if records and not stop.name:
            worker.say(closing_lines(config, step, records))
            records.show_texts()
        leave_processes(worker)
    evaluation = records.last_evaluation() if records else {}
    return {**evaluation, "step": step, "stopped": stop.name}


def main(config_path: str, *overrides: str, fresh: bool = False, step: int | None = None) -> dict:
    """Call train() for the command line; a run stopped before its end ends with status 1."""
    result = train(config_path, *overrides, fresh=fresh, step=step)
    if result["stopped"]:
        where = f"at step {result['step']}, saved" if result["step"] else "before the first step"
        raise UserError(
            f"stopped by {result['stopped']} {where}; the same command goes on from there"
        )
    return result


def plan_memory(config_path: str, *overrides: str) -> None:
    """Make the words, count them, and print the memory plan, for --dry-run."""
    config = load_config(config_path, *overrides)
    texts = read_corpus(config)
    words = plan_new_words(config, texts)
    load_data(config, words, texts)  # refuses a text that is too short to train on
    dry_run(config, words.first_new_id, len(words.words))


if __name__ == "__main__" and "__file__" in globals():
    COMMAND, OPTIONS = main, {"fresh": ARGUMENTS.fresh, "step": ARGUMENTS.step}
    if ARGUMENTS.dry_run:
        COMMAND, OPTIONS = plan_memory, {}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    raise SystemExit(run_command(COMMAND, ARGUMENTS.config, *ARGUMENTS.overrides, **OPTIONS))
