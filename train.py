"""Train the rows of a lexicon's words in a frozen language model; the same command continues a run.

    python train.py configs/sample.yaml                     the sample: CPU, offline, half a minute
    python train.py configs/qwen14b.yaml                    Qwen2.5-14B in NF4 on a 15 GB card
    python train.py configs/qwen14b.yaml --dry-run          memory plan, without loading weights
    python train.py configs/sample.yaml max_steps=20 --fresh    start over, the old run kept aside
    torchrun --nproc-per-node 2 train.py CONFIG             the same steps on two cards

A step takes effective_batch_size sequences of seq_len tokens through the frozen body, in
micro-batches. The loss over base tokens and new words gives gradients to the new rows alone. The
gradients are clipped and shared among kin, and Adafactor moves the rows. Every position of every
sequence has one target and counts once, so the loss is nats per predicted token, whatever the
micro-batch. Every random choice follows from seed and step. overlay.py has the
formulas and machine.py says what makes them fast. `train_steps`, near the end, is the loop. A 14B
step of 2,048 tokens takes 0.34 s on an H100 of which 14 GiB are used (2026-11-22,
docs/measurements.md).

RUN_DIR gets config.yaml, tokenizer/, metrics.jsonl, loss_table.md, loss.png, samples.md, snapshots/
(whole saves on the local disk) and sentries/ (verified copies of them, or sentry_dir instead).
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# If this file is pasted into a notebook below the others, their names are there already.
if "check_environment" not in globals():
    from env_shim import apply, check_environment, installed_version
if "UserError" not in globals():
    from config import (
        Config, UserError, command_line_parser, load_config, replacing, run_command, write_config,
        write_text,
    )  # fmt: skip
if "NewWords" not in globals():
    from extend_tokenizer import (
        NewWords, base_tokenizer, extend, format_report, new_words_hash,
        plan_new_words, read_corpus, save_new_words,
    )  # fmt: skip

SAMPLE_TOKENS = 48  # length of the continuation of each prompt
SLOW_START_NOTICE_SECONDS = 30.0  # a mounted Drive may hang while the saves are read

# ---- Before torch is imported --------------------------------------------------------------------


def parse_arguments(argv: list[str]):
    parser = command_line_parser("  python train.py configs/sample.yaml max_steps=60")
    parser.add_argument("--dry-run", action="store_true", help="print the memory plan and stop")
    what = "start over; the old run is kept aside"
    parser.add_argument("--fresh", action="store_true", help=what)
    what = "continue from the sentry of this step and no other"
    parser.add_argument("--step", type=int, help=what)
    return parser.parse_intermixed_args(argv)


def check_start(arguments) -> None:
    """Raise a UserError if the config is wrong, or a package is missing that training needs."""
    config = load_config(arguments.config, *arguments.overrides)
    if not arguments.dry_run:
        if problems := check_environment(config.device, config.quantization):
            raise UserError(*problems)


# torch takes two seconds to import; help and plain mistakes should not wait for it.
if __name__ == "__main__" and "__file__" in globals():
    ARGUMENTS = parse_arguments(sys.argv[1:])
    apply()
    if run_command(check_start, ARGUMENTS):
        raise SystemExit(1)

import torch
from torch import Tensor

if "WakeOverlay" not in globals():
    from overlay import (
        FLOAT16_LOSS_SCALE, LossScale, Optimizer, WakeOverlay, dense_weight, is_tied, output_mode,
        sharing_matrices, starting_rows,
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
        Sentry, SentryWriter, continue_prompt, load_file, mark_new_words, pick_sentry, set_aside,
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


def load_data(config: Config, words: NewWords, texts: list[str]) -> Data:
    """Split and tokenize the corpus; texts: what read_corpus returned.

    Raises: UserError if the training or the held-out text is shorter than one sequence
    """
    # Each file is split for itself, so that each has its share of the held-out text.
    halves = [split_text(text, config.val_fraction) for text in texts]
    train_text, val_text = ("".join(half) for half in zip(*halves))
    # No BOS inside the streams: `sequences` puts one before each sequence if the base wants it.
    train = words.tokenizer.encode(train_text, add_special_tokens=False)
    val = words.tokenizer.encode(val_text, add_special_tokens=False)
    for name, stream, change in (
        ("train", train, "give more text"), ("val", val, "raise val_fraction"),
    ):  # fmt: skip
        if len(stream.ids) <= config.seq_len:
            raise UserError(
                f"corpus: the {name} text has {len(stream.ids)} tokens, fewer than a sequence of"
                f" {config.seq_len} and its last target; {change} or lower seq_len"
            )
    return Data(
        train=torch.tensor(train.ids),
        val=torch.tensor(val.ids),
        val_ends=torch.tensor([end for _, end in val.offsets]),
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
    numbers = []
    for position in range((step - 1) * batch_size, step * batch_size):
        epoch, index = divmod(position, num_sequences)
        # A step can lie in two epochs, so the order is drawn anew where the next one begins.
        if not numbers or index == 0:
            # Up to a million epochs, no two pairs of seed and epoch share a generator.
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(num_sequences, generator=generator)
        numbers.append(order[index])
    return torch.stack(numbers)


# ---- Model ---------------------------------------------------------------------------------------


def build_overlay(config: Config, worker: Worker, words: NewWords, continuing: bool) -> WakeOverlay:
    """Load the model and put the overlay into it, with the rows of step 0.

    A run that continues starts with zeros instead, because load_rows then copies the rows of its
    save over them. Computing the means of the 14B would take 3 s on two CPU cores.
    """
    model = load_model(config, worker)
    mode = output_mode(config.output_rows, is_tied(model.config))
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
    size = config.effective_batch_size
    num_sequences = count_sequences(data.train, config.seq_len)
    numbers = step_sequence_numbers(step, size, num_sequences, config.seed)
    x, y = sequences(data.train, numbers, config.seq_len, data.bos_id)  # (size, seq_len)
    # Every process knows the whole step, and takes its own part of it.
    first, end = (rank * size // worker.world_size for rank in (worker.rank, worker.rank + 1))
    parts = [x[first:end], y[first:end]]  # this process's share
    # From pinned memory the copy runs beside the computation.
    if worker.device.type == "cuda":
        parts = [part.pin_memory().to(worker.device, non_blocking=True) for part in parts]
    return StepBatch(step, *parts, overlay.base_embed(x[first:end]), x, numbers)


def learning_rate_at(step: int, config: Config) -> float:
    """Rise linearly to the peak at warmup_ratio x max_steps, then fall as a cosine to 0."""
    warmup_steps = round(config.warmup_ratio * config.max_steps)  # 0 if there is no warm-up
    if step <= warmup_steps:
        return config.learning_rate * step / warmup_steps
    share = (step - warmup_steps) / max(config.max_steps - warmup_steps, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


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


def my_micro_batches(num_sequences: int, micro_batch_size: int, worker: Worker) -> Iterator[range]:
    """Yield the numbers of this process's held-out sequences, one micro-batch at a time."""
    first, end = (num_sequences * r // worker.world_size for r in (worker.rank, worker.rank + 1))
    for start in range(first, end, micro_batch_size):
        yield range(start, min(start + micro_batch_size, end))


def count_held_out_bytes(data: Data, seq_len: int) -> int:
    """Count the UTF-8 bytes of the text that the held-out targets stand for.

    The first token of the first sequence is only an input, so the text begins where it ends.
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
    num_sequences = count_sequences(data.val, config.seq_len)
    # Sums in float64: a book has 100,000 targets, and fp32 would lose their last digits.
    sums = torch.zeros(2, 2, dtype=torch.float64)  # (ordinary, new) targets x (nats, count)
    for numbers in my_micro_batches(num_sequences, micro_batch_size, worker):
        x, y = sequences(data.val, torch.tensor(numbers), config.seq_len, data.bos_id)
        hidden = overlay.body(inputs_embeds=overlay.embed(x), use_cache=False).last_hidden_state
        losses = overlay.loss(hidden, y)[0].double().cpu()  # (B, T)
        for kind, of_kind in enumerate((y < overlay.first_new_id, y >= overlay.first_new_id)):
            sums[kind] += torch.stack([losses[of_kind].sum(), of_kind.sum()])
    sums = sums.to(worker.device)
    barrier(worker)
    all_reduce_sum(worker, sums)
    (nats, count), (new_nats, new_count) = sums.tolist()
    num_bytes = count_held_out_bytes(data, config.seq_len)
    return {
        "val_loss": (new_nats + nats) / (new_count + count),
        "val_bits_per_byte": (new_nats + nats) / math.log(2) / num_bytes,
        "val_loss_new_words": new_nats / max(new_count, 1),
        "val_loss_ordinary": nats / max(count, 1),
    }


@torch.no_grad()
def base_bits_per_byte(
    overlay: WakeOverlay, data: Data, config: Config, worker: Worker, micro_batch_size: int
) -> float:
    """Measure the bits per byte of the unextended base model, with its own tokenizer.

    Each sequence here is the text of one held-out sequence of ours, so both models see the same
    characters of context.
    """
    tokenizer = base_tokenizer(config)
    ends, seq_len = data.val_ends.tolist(), config.seq_len
    num_sequences = count_sequences(data.val, seq_len)
    total = torch.zeros(1, dtype=torch.float64)
    for numbers in my_micro_batches(num_sequences, micro_batch_size, worker):
        pairs = [
            base_sequence(tokenizer, data, ends, number * seq_len, seq_len) for number in numbers
        ]
        # The body is causal, so what fills up a short sequence at its end cannot matter.
        width = max(len(ids) for ids, _ in pairs)
        x = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in pairs])  # (B, width)
        y = torch.tensor([targets + [-100] * (width - len(targets)) for _, targets in pairs])
        body = overlay.body(inputs_embeds=overlay.base_embed(x), use_cache=False)
        losses, _ = overlay.loss(body.last_hidden_state, y, base_only=True)
        total += losses.double().sum().cpu()
    total = total.to(worker.device)
    barrier(worker)
    all_reduce_sum(worker, total)
    return total.item() / math.log(2) / count_held_out_bytes(data, seq_len)


def base_sequence(
    tokenizer, data: Data, ends: list[int], first: int, seq_len: int
) -> tuple[list[int], list[int]]:
    """Return (inputs, targets) in base tokens for the held-out sequence that begins at `first`.

    The text of that sequence's first token is context and no target, as in our own sequences.
    """
    # middle: where our first token ends. Without a BOS its text is the base model's context.
    middle, context = ends[first], ""
    if data.bos_id is None:
        context = data.val_text[ends[first - 1] if first else 0 : middle]
    text = context + data.val_text[middle : ends[first + seq_len]]
    encoding = tokenizer.encode(text, add_special_tokens=False)
    spans = zip(encoding.ids, encoding.offsets)
    targets = [i if end > len(context) else -100 for i, (_, end) in spans]
    if data.bos_id is None:
        return encoding.ids[:-1], targets[1:]
    return [data.bos_id, *encoding.ids[:-1]], targets


def sample(model, config: Config, words: NewWords) -> list[str]:
    """Continue each prompt with random numbers from the seed alone, and mark new words **so**."""
    texts, how = [], {"max_new_tokens": SAMPLE_TOKENS, "top_p": 0.95, "top_k": 0}
    for prompt in config.prompts:
        ids = continue_prompt(model, words.tokenizer, prompt, config.seed, **how)
        texts.append(mark_new_words(ids, words))
    return texts


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

    def __post_init__(self):
        write_text(self.folder / "metrics.jsonl", "".join(self.lines))
        write_text(self.folder / "samples.md", self.samples)
        if any(record["kind"] == "eval" for record in self.parsed()):
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

    def draw(self) -> None:
        records = self.parsed()
        write_text(self.folder / "loss_table.md", loss_table(records))
        plot_losses(records, self.folder / "loss.png")

    def add_samples(self, step: int, texts: list[str]) -> None:
        quotes = [f"> {' '.join(text.split())}\n\n" for text in texts]
        self.samples += f"## Step {step}\n\n" + "".join(quotes)
        write_text(self.folder / "samples.md", self.samples)


class Progress:
    """This prints process 0's lines, and below them a bar on a terminal or in a notebook."""

    def __init__(self, worker: Worker, config: Config, first_step: int):
        self.worker, self.config, self.first_step = worker, config, first_step
        self.began, self.bar = time.monotonic(), None
        if worker.rank == 0 and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            from tqdm.auto import tqdm

            self.bar = tqdm(initial=first_step, total=config.max_steps, mininterval=2, unit="step")

    def step(self, step: int, line: str) -> None:
        """Count a step, and every log_every steps print its line with the time that is left."""
        if self.bar is not None:
            self.bar.update()
        if step % self.config.log_every == 0 or step == self.config.max_steps:
            # The time so far has evaluations and saves in it, so the estimate has them too.
            a_step = (time.monotonic() - self.began) / (step - self.first_step)
            left = datetime.timedelta(seconds=round(a_step * (self.config.max_steps - step)))
            self.say(f"{line}  {left} left")

    def say(self, text: str) -> None:
        """Print a line at once; the bar leaves the screen meanwhile."""
        with self.bar.external_write_mode() if self.bar is not None else contextlib.nullcontext():
            self.worker.say(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def step_line(record: dict, run: "Run") -> str:
    bits = f"  {run.val_bits_per_byte:.3f} bits/byte held out" if run.val_bits_per_byte else ""
    peak = f"  peak {record['peak_vram_gib']:.1f} GiB" if "peak_vram_gib" in record else ""
    return (
        f"step {record['step']}/{run.config.max_steps}  loss {record['loss']:.4f}{bits}"
        f"  lr {record['learning_rate']:.2e}  {record['step_seconds']:.2f} s/step"
        f"  {record['tokens_per_second']:,.0f} tokens/s{peak}"
    )


def eval_line(record: dict) -> str:
    line = (
        f"step {record['step']}  held-out loss {record['val_loss']:.4f}"
        f" (uniform {record['uniform_loss']:.2f}; new words {record['val_loss_new_words']:.2f},"
        f" others {record['val_loss_ordinary']:.2f})  {record['val_bits_per_byte']:.3f} bits/byte"
        f" (base model {record['base_bits_per_byte']:.3f})"
    )
    return "\n".join([line, *(f"warning: {text}" for text in record["warnings"])])


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


def prepare_start(config: Config, worker: Worker, fresh: bool, step: int | None) -> Start:
    """Make words and data, and find the save to continue from.

    Process 0 comes first and writes the folder. The other processes read it afterwards, so they
    make the same words and find the same save. --fresh moves the old run aside after words and data
    are made, so a run that cannot start leaves the old one in place.
    Raises: UserError; the folder is then as it was
    """
    texts = read_corpus(config)
    words = extend(config, texts, fresh)
    data = load_data(config, words, texts)
    if fresh and worker.rank == 0:
        start_over(config)
    sentry = find_sentry(config, run_identity(config, words, data), worker, step)
    if worker.rank == 0:
        save_new_words(config, words)
        write_config(config)
    worker.say(format_report(words.report))
    return Start(words, data, sentry)


def shared_facts(config: Config, start: Start) -> dict:
    """Collect what all processes must have in common, as they train, evaluate and end together."""
    keys = [f.name for f in dataclasses.fields(config) if f.metadata["changes_run"]]
    keys += ["max_steps", "eval_every", "save_every"]
    facts = {key: getattr(config, key) for key in keys}
    step = start.sentry.step if start.sentry else 0
    return facts | run_identity(config, start.words, start.data) | {"step": step}


def as_json(config: Config) -> dict:
    """Return a Config as a save's state.json holds it, with lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


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


def find_sentry(config: Config, identity: dict, worker: Worker, step: int | None) -> Sentry | None:
    """Find the save to continue from and announce it; process 0 puts every newer one aside."""
    folders = save_folders(config)
    wait = f"still waiting for {folders[1]}: the newest sentry may be there, so nothing starts yet"
    # Reading a mounted Drive can hang for minutes, and a silent start looks like a crash.
    slow = threading.Timer(SLOW_START_NOTICE_SECONDS, worker.say, [wait])
    slow.daemon = True
    slow.start()
    try:
        sentry, skipped = pick_sentry(folders, identity, step)
    finally:
        slow.cancel()
    for reason in skipped:
        worker.say(f"passed over: {reason}")
    if sentry is None:
        return None
    compare_configs(sentry.state["config"], config)
    worker.say(f"continuing from {sentry.path}, step {sentry.step}")
    if (before := sentry.state["config"].get("max_steps")) not in (None, config.max_steps):
        worker.say(f"max_steps was {before}: from here the learning rate is that of the new one")
    if worker.rank == 0:
        set_aside(folders, sentry)
    return sentry


def compare_configs(old: dict, config: Config) -> None:
    """Raise a UserError that names every key whose change would make this another training."""
    new, problems = as_json(config), []
    for field in dataclasses.fields(config):
        before = old.get(field.name, field.metadata.get("before"))
        if field.metadata["changes_run"] and before != new[field.name]:
            problems.append(
                f"{field.name}: the run was started with {before!r}, now it is {new[field.name]!r}"
            )
    if problems:
        advice = "put these keys back to continue, or start over with --fresh (the old run is kept"
        raise UserError(*problems, f"{advice} aside)")


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
    val_bits_per_byte: float | None = None

    def save(self) -> None:
        """Begin a save in the background; training waits for the copy to the host alone."""
        if self.writer:
            self.writer.finish_local()  # so that the host holds one copy of the rows, not two
            state = {
                "step": self.step,
                **run_identity(self.config, self.words, self.data),
                "first_new_id": self.words.first_new_id,
                "num_new_tokens": len(self.words.words),
                "sequences_seen": self.step * self.config.effective_batch_size,
                "loss_scale": dataclasses.asdict(self.loss_scale),
                "optimizer_step": self.optimizer_step,
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
            self.writer.save(host_copies(self.optimizer.tensors()), texts, state)
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

    def evaluate(self) -> dict:
        """Evaluate, continue the prompts, record both, and return the record."""
        where = f"the evaluation at step {self.step}"
        return smaller_if_needed(self.evaluate_once, self.plan, self.overlay, self.worker, where)

    def evaluate_once(self) -> dict:
        """Evaluate once; the record comes last, so `evaluate` can repeat this after an error."""
        parts = (
            self.overlay, self.data, self.config, self.worker, self.plan.micro_batch_size,
        )  # fmt: skip
        if self.base_bits_per_byte is None:
            self.base_bits_per_byte = base_bits_per_byte(*parts)
        record = {"step": self.step, "kind": "eval"} | held_out_loss(*parts)
        uniform, base = math.log(self.overlay.vocab_size), self.base_bits_per_byte
        record |= {"uniform_loss": uniform, "base_bits_per_byte": base, "warnings": []}
        if record["val_loss"] > uniform:
            record["warnings"].append(
                f"above the uniform loss {uniform:.2f}: worse than a blind guess"
            )
        if record["val_bits_per_byte"] > base:
            record["warnings"].append(f"above the unextended base model's {base:.3f} bits/byte")
        # These two are only for the messages; nothing in training depends on them.
        self.best_val_loss = min(self.best_val_loss, record["val_loss"])
        self.val_bits_per_byte = record["val_bits_per_byte"]
        if self.records:
            texts = sample(self.overlay.model, self.config, self.words)
            self.records.add(record)
            if texts:
                self.records.add_samples(self.step, texts)
        barrier(self.worker)
        return record


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
    overlay = build_overlay(config, worker, words, continuing=bool(sentry))
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
    recomputed = f"{plan.num_recomputed_layers} of {len(run.overlay.body.layers)} layers recomputed"
    return (
        ", ".join(f"{name} {number}" for name, number in versions().items())
        + f"\n{device_name(worker)}, compute dtype {dtype} ({worker.why_dtype}); trainable"
        f" {num_words:,} words x {hidden_size:,}, ln(vocabulary of {size:,}) = {math.log(size):.2f}"
        f"\nmicro_batch_size {plan.micro_batch_size} x {accumulation} on {worker.world_size}"
        f" process(es), {config.effective_batch_size * config.seq_len:,} tokens a step, "
        + ", ".join([recomputed, *plan.remarks])
    )


def train_steps(run: Run, stop: StopRequest, progress: Progress) -> None:
    """Run the loop: accumulate, wait once, check, clip, update, log, evaluate, save, stop."""
    config, worker, optimizer = run.config, run.worker, run.optimizer
    prepare = functools.partial(
        prepare_step, overlay=run.overlay, data=run.data, config=config, worker=worker
    )
    tokens_per_step = config.effective_batch_size * config.seq_len
    batch = prepare(run.step + 1)
    while not run.is_done():
        step, began = run.step + 1, time.perf_counter()
        # Forward and backward of all micro-batches. Before the last backward, while the device is
        # still at work, the next step's sequences are looked up.
        prepare_next = functools.partial(prepare, step + 1)
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
        progress.step(step, step_line(record, run))
        if step % config.eval_every == 0 or run.is_done():
            progress.say(eval_line(run.evaluate()))
        if step % config.save_every == 0 or run.is_done() or stopping:
            run.save()
        if run.writer:
            run.writer.check()  # raises the error of a background save
        if stopping:
            stop.name = stop.name or "a signal to another process"
            return


def train_to_the_end(run: Run, stop: StopRequest) -> None:
    """Make the first evaluation, run the loop, and wait until the last save is written."""
    worker, config = run.worker, run.config
    if stop.name and worker.world_size == 1:
        return  # the signal came while the model was loaded
    if run.is_done():
        worker.say(f"step {run.step} of {config.max_steps}: nothing left to do; raise max_steps")
    if run.best_val_loss == math.inf:  # nothing evaluated yet: a new run, or an imported one
        worker.say(eval_line(run.evaluate()))
    progress = Progress(worker, config, run.step)
    try:
        train_steps(run, stop, progress)
    finally:
        progress.close()
        if run.writer:
            run.writer.finish()


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


def train(
    config: Config | str | Path, *overrides: str, fresh: bool = False, step: int | None = None
) -> dict:
    """Train or continue a run; config: a YAML path, with key=value overrides, or a Config.

    Returns the last evaluation's record with 'step' and 'stopped' (the signal's name or '').
    Raises: UserError with one line for each thing that the user can mend
    """
    if not isinstance(config, Config):
        config = load_config(config, *overrides)
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
        stop = held.enter_context(StopRequest())
        run = build_run(config, worker, start)
        worker.say(heading(run))
        train_to_the_end(run, stop)
        if run.records and run.records.lines:
            worker.say((Path(config.run_dir) / "loss_table.md").read_text(encoding="utf-8"))
        leave_processes(worker)
        records = run.records.parsed() if run.records else []
    evaluations = [record for record in records if record["kind"] == "eval"]
    return {**(evaluations[-1] if evaluations else {}), "step": run.step, "stopped": stop.name}


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
    dry_run(config, len(plan_new_words(config, read_corpus(config)).words))


if __name__ == "__main__" and "__file__" in globals():
    COMMAND, OPTIONS = main, {"fresh": ARGUMENTS.fresh, "step": ARGUMENTS.step}
    if ARGUMENTS.dry_run:
        COMMAND, OPTIONS = plan_memory, {}
    raise SystemExit(run_command(COMMAND, ARGUMENTS.config, *ARGUMENTS.overrides, **OPTIONS))
