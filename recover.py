"""Write, verify, list, export, try out and import what a run saved, and look at its words.

    python recover.py RUN_DIR                              what is there, what train.py goes on from
    python recover.py export RUN_DIR OUT --format merged   an ordinary model folder; or peft, rows;
                                                           --push NAME/REPO sends it to the hub
    python recover.py generate RUN_DIR ["prompt"]          what the trained model writes
    python recover.py neighbours RUN_DIR [word ...]        what is near a word, before and after
    python recover.py import SEED_FILE.pt RUN_DIR          a sentry of the original notebooks

A sentry is one saved step: a folder step_000020/ with rows.safetensors (fp32 rows and optimizer
statistics), words.txt, metrics.jsonl, samples.md and state.json. state.json is the marker. It is
written last and holds size and SHA-256 of the other files, and a hash of itself. A folder is a
sentry only if its files agree with its marker. Only `import` reads a pickle, and it takes tensors
and numbers alone from it. If nothing but the sentry_dir of a run survived, give that folder as
RUN_DIR.

export, generate and neighbours take the newest whole sentry, or that of --step; --step best takes
the one with the lowest held-out loss. In a notebook, generate("RUN_DIR", "prompt") returns the
text; if there is no prompt, it asks for one after another.
"""

if __name__ == "__main__" and "__file__" in globals():
    from env_shim import end_at_ctrl_c

    end_at_ctrl_c()  # while the other imports last

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError

import huggingface_hub
import psutil
import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import normalize

if "check_environment" not in globals():
    from env_shim import apply, check_environment, installed_version
if "UserError" not in globals():
    from config import (
        GIB, KEYS, Config, UserError, one_line, read_json, replacing, run_command, sync, write_json,
    )  # fmt: skip
if "new_words_hash" not in globals():
    from extend_tokenizer import (
        base_tokenizer, is_sentencepiece, new_words_hash, shown_content,
    )  # fmt: skip
if "WakeOverlay" not in globals():
    from overlay import (
        FLOAT16_LOSS_SCALE, ROW_BLOCK, WakeOverlay, is_tied, model_errors_in_one_line, output_mode,
        starting_rows,
    )  # fmt: skip
if "Worker" not in globals():
    from machine import (
        auto_class, find_worker, free_cached_memory, hide_bars_in_logs, load_model,
        model_without_weights,
    )  # fmt: skip

MARKER = "state.json"
NOT_KNOWN = "not known"  # stands in an imported state for a fact that no check can compare
LOADING_TIME = " (30 GB take about a minute)"  # one H100, 2026-11-25, docs/measurements.md
SLOW_COPY_NOTICE_SECONDS = 60.0  # copying 1.7 GiB to a mounted Drive takes about a minute
READ_BYTES = 16 * 2**20
VALUES_AT_ONCE = 20 * 2**20  # 80 MiB of fp32

# ---- Write ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sentry:
    """This is one saved step: its folder, its number and the content of its state.json."""

    path: Path
    step: int
    state: dict


def fault_point(name: str, step: int) -> None:
    """Die by SIGKILL if WAKE2VEC_FAULT is `name@step`; the tests kill and disturb saves here."""
    if os.environ.get("WAKE2VEC_FAULT") == f"{name}@{step}":
        os.kill(os.getpid(), signal.SIGKILL)


def file_record(path: Path) -> dict:
    """Read a file and return {"size": bytes, "sha256": hex}."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def state_hash(state: dict) -> str:
    """Hash what a marker says, but for this hash itself (SHA-256, hex)."""
    rest = {name: value for name, value in state.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file. The library orders the tensors by dtype and name.

    Memory: nothing beside the tensors. safetensors 0.8.0 stops another thread for 0.005 s while it
            writes 1.7 GiB; 0.7.0 held Python's lock to the end and made a whole copy
    Raises: OSError if the disk is full
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # the library wraps the system's error into its own
        raise OSError(one_line(error)) from None
    path.chmod(mode)  # safetensors 0.8.0 leaves a file that nobody but its owner can read


@contextlib.contextmanager
def new_sentry(target: Path, state: dict) -> Iterator[Path]:
    """Yield a folder to fill, then give it the name `target`, and last write its marker.

    Each of the three is on the disk before the next one begins. If `target` is there already, it is
    a damaged sentry or was left by a kill, and it is replaced.
    """
    try:
        with replacing(target) as part:
            part.mkdir(parents=True)
            yield part
            fault_point("before_rename", state["step"])
        fault_point("before_marker", state["step"])
        write_json(target / MARKER, state)
    except OSError:
        if not (target / MARKER).exists():  # give a full disk its space back
            shutil.rmtree(target, ignore_errors=True)
        raise
    fault_point("after_marker", state["step"])


def write_sentry(folder: Path, tensors: dict, texts: dict[str, str], state: dict) -> Path:
    """Write the sentry of state["step"] and return its folder, folder/step_NNNNNN.

    texts: file name -> content
    Raises: OSError (disk full, read-only); the sentries before it are untouched
    """
    state, target = dict(state), folder / f"step_{state['step']:06d}"
    with new_sentry(target, state) as part:
        save_tensors(tensors, part / "rows.safetensors")
        fault_point("rows_written", state["step"])
        for name, text in texts.items():
            (part / name).write_text(text, encoding="utf-8")
        state["files"] = {path.name: file_record(path) for path in sorted(part.iterdir())}
        state["sha256"] = state_hash(state)
    return target


# ---- Verify --------------------------------------------------------------------------------------


def read_marker(path: Path) -> tuple[dict, dict[str, tuple]]:
    """Read a sentry's state and its files: name -> (size, SHA-256). Raises: UserError."""
    try:
        state = read_json(path / MARKER)
        step = int(state["step"])
        files = {name: (file["size"], file["sha256"]) for name, file in state["files"].items()}
        files["rows.safetensors"]
        if state.get("sha256", state_hash(state)) != state_hash(state):  # older saves have no hash
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"{path}: no {MARKER}; the save was cut off before its end") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: {MARKER} is damaged") from None
    if path.name != f"step_{step:06d}":
        raise UserError(f"{path}: {MARKER} is of step {step}")
    return state, files


def check_files(path: Path, expected: dict) -> Sentry:
    """Read a sentry; prove that its state has the `expected` values and its files are unchanged.

    Raises: UserError with the reason in words; OSError if the folder does not answer
    """
    state, files = read_marker(path)
    for name, wanted in expected.items():
        if state.get(name) not in (wanted, NOT_KNOWN):
            key = name.replace("words_sha256", "lexicon's words").replace("_sha256", "")
            values = f" ({state.get(name)!r} instead of {wanted!r})" if key == name else ""
            raise UserError(f"{path}: other {key}{values}")
    for name, (size, sha256) in files.items():
        if not (path / name).is_file():
            raise UserError(f"{path}: {name} is missing")
        if (found := (path / name).stat().st_size) != size:  # seen without reading the file
            raise UserError(f"{path}: {name} is {found:,} bytes instead of {size:,}")
        if file_record(path / name)["sha256"] != sha256:
            raise UserError(f"{path}: {name} does not have the SHA-256 that {MARKER} says")
    return Sentry(path, int(state["step"]), state)


def check_sentry(path: Path, expected: dict) -> Sentry:
    """Read a sentry and prove it whole: `check_files`, and every number is finite.

    Memory: 200 MiB; the file is mapped and not loaded
    Raises: UserError with the reason in words
    """
    try:
        sentry = check_files(path, expected)
        for name, tensor in mapped_tensors(path / "rows.safetensors").items():
            blocks = tensor.flatten().split(VALUES_AT_ONCE)
            if not all(block.isfinite().all() for block in blocks):
                raise UserError(f"{path}: {name} holds NaN or infinity")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return sentry


def mapped_tensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a file, safetensors or a base model's pytorch_model.bin.

    Only tensors are taken from a .bin, which is a pickle.
    Raises: UserError
    """
    if not path.is_file():  # of a base model; a sentry's files were looked for before
        raise UserError(f"{path}: missing; --base names another model folder")
    try:
        if path.suffix == ".bin":
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        with safe_open(path, "pt") as stored:
            return stored.get_tensors()
    except SafetensorError:
        raise UserError(f"{path}: not a safetensors file") from None
    except (RuntimeError, UnpicklingError) as error:
        raise UserError(
            f"{path}: cannot be mapped; load the model once with transformers, save it with"
            f" save_pretrained, and give that folder as --base ({one_line(error)[:150]})"
        ) from None


# ---- Pick ----------------------------------------------------------------------------------------


def sentry_folders(*folders: Path) -> list[tuple[int, Path]]:
    """List (step, path) of everything named like a sentry, whole or not, the newest first.

    Of the same step, the one in the first folder comes first.
    Raises: UserError if a folder does not answer
    """
    found = []
    for folder in folders:
        try:
            paths = list(folder.iterdir()) if folder.is_dir() else []
        except OSError as error:  # a mount that went away
            raise UserError(f"{folder}: cannot be read: {error.strerror}") from None
        for path in paths:
            match = re.fullmatch(r"step_(\d{6,})", path.name)
            if match and path.is_dir():
                found.append((int(match[1]), path))
    return sorted(found, key=lambda entry: -entry[0])


def by_held_out_loss(*folders: Path) -> list[Path]:
    """List the sentries that were saved at an evaluation, the lowest held-out loss first."""
    found = []
    for step, path in sentry_folders(*folders):
        with contextlib.suppress(UserError):  # no marker, or a damaged one
            if (loss := read_marker(path)[0].get("val_loss")) is not None:
                found.append((loss, -step, path))
    return [path for _, _, path in sorted(found, key=lambda entry: entry[:2])]


def newest_and_best(folder: Path, num: int) -> list[Path]:
    """List the newest `num` sentries with a marker, and the one with the lowest held-out loss."""
    newest = [path for _, path in sentry_folders(folder) if (path / MARKER).exists()][:num]
    return newest + by_held_out_loss(folder)[:1]


def pick_sentry(
    folders: list[Path], expected: dict, step: int | str | None = None
) -> tuple[Sentry | None, list[str]]:
    """Find the newest whole sentry of all folders, and say why newer ones were passed over.

    The sentry is None only if nothing is named like one. If `step` is given, only that step counts;
    "best" is the one with the lowest held-out loss.
    Raises: UserError if there are saves and none can be continued, or if `step` is missing
    """
    skipped = []
    wanted = [path for number, path in sentry_folders(*folders) if step in (None, number)]
    if step == "best":
        wanted = by_held_out_loss(*folders)
    for path in wanted:
        try:
            return check_sentry(path, expected), skipped
        except UserError as error:
            skipped += error.problems
    if step is not None:
        places = ", ".join(map(str, folders))
        which = "an evaluated step" if step == "best" else f"step {step}"
        raise UserError(*skipped, f"no whole sentry of {which} in {places}")
    if skipped:
        advice = "nothing here can be continued: put back what differs, give another run_dir, or"
        advice += " start over with --fresh, which keeps this aside"
        raise UserError(*skipped, advice)
    return None, []


def set_aside(folders: list[Path], chosen: Sentry) -> None:
    """Rename every save that comes before the one that a run continues from: newer ones, and
    damaged ones of the same step. So none of them counts, or is copied, ever again."""
    for _, path in sentry_folders(*folders):
        if path == chosen.path:
            return
        names = (path.with_name(f"{path.name}.aside-{n}") for n in itertools.count(1))
        try:
            path.rename(next(name for name in names if not name.exists()))
        except OSError as error:
            raise UserError(f"{path}: cannot be put aside: {error.strerror}") from None


def prune(folder: Path, keep: int, spare: Path | None = None) -> None:
    """Delete all sentries but the newest `keep`, the best one and `spare`, and what kills left.

    Call it only after the newest sentry was proved whole.
    """
    kept = newest_and_best(folder, keep)
    for step, path in sentry_folders(folder):
        if path not in (*kept, spare):
            (path / MARKER).unlink(missing_ok=True)  # from here on it is no sentry
            fault_point("pruning", step)
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".step_*"):  # the two names that `replacing` uses
        shutil.rmtree(path, ignore_errors=True)


# ---- Copy ----------------------------------------------------------------------------------------


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def copy_sentry(source: Path, folder: Path, copy: Callable = shutil.copyfile) -> Path:
    """Copy a sentry into `folder` and read each file back; a whole copy already there stays.

    Raises: OSError if `folder` fails; UserError if `folder` hands back other bytes
    """
    state, target = read_json(source / MARKER), folder / source.name
    # Not check_sentry: it maps the file, and a mount that goes away under a mapped file ends the
    # process by SIGBUS, the training included.
    with contextlib.suppress(UserError, OSError):
        return check_files(target, state).path
    with new_sentry(target, state) as part:
        for name, record in state["files"].items():
            copy(source / name, part / name)
            sync(part / name)
            fault_point("copied", state["step"])
            if file_record(part / name) != record:
                raise UserError(f"{part / name}: read back other bytes than were written")
        fault_point("verified", state["step"])
    return target


class SentryWriter:
    """This writes and copies saves while training goes on.

    One thread writes a save to the local disk; if that fails, training hears of it at its next
    `check`. Another thread copies the newest local sentry and the best one from first_step on, even
    from before this start. An older local one may be damaged, and must not replace a good copy of
    it. If the durable folder hangs, fills or goes away, there is one warning, and both are copied
    later. If both folders lie in the same one, the files are hard links and take no room; if they
    are the same, nothing is copied.
    """

    def __init__(
        self, local: Path, durable: Path, keep: int, say: Callable = print, first_step: int = 0
    ):
        self.local, self.durable, self.keep, self.say = local, durable, keep, say
        self.copy_file = link_or_copy if durable.parent == local.parent else shutil.copyfile
        self.first_step = first_step  # local sentries from here on are known to be whole
        self.pool = ThreadPoolExecutor(1)  # its thread writes one save after another
        self.writing: Future | None = None
        self.lock = threading.Lock()  # over `copying`, `in_copy`, and what is deleted locally
        self.copying: threading.Thread | None = None
        self.in_copy: Path | None = None
        self.copy_began = 0.0
        self.copied: list[int] = []  # these steps are in `durable`, copied or found there
        self.warned = False
        self.start_copying()

    def save(self, tensors: dict[str, Tensor], texts: dict[str, str], state: dict) -> None:
        """Begin a save; waits only for the local write of the one before.

        The tensors must not change until the next `finish_local` returns.
        """
        self.finish_local()
        self.writing = self.pool.submit(self.write, tensors, texts, state)

    def write(self, tensors: dict[str, Tensor], texts: dict[str, str], state: dict) -> None:
        try:
            write_sentry(self.local, tensors, texts, state)
            self.prune_local()
        except OSError as error:
            raise UserError(
                f"{self.local}: step {state['step']} could not be saved: {error}; the sentry before"
                " it is intact: make room, then run the same command again"
            ) from error
        self.start_copying()

    def prune_local(self) -> None:
        with self.lock:
            prune(self.local, self.keep, spare=self.in_copy)

    def to_copy(self) -> list[int]:
        """List the steps of the newest and the best local sentry, of those known to be whole."""
        steps = [int(path.name[5:]) for path in newest_and_best(self.local, 1)]
        return [step for step in steps if step >= self.first_step]

    def start_copying(self) -> None:
        """Have a thread copy what is not copied; warn once if the copy before is stuck."""
        if self.durable == self.local:
            return
        with self.lock:
            if self.copying is None or not self.copying.is_alive():
                self.copying = threading.Thread(target=self.copy, daemon=True)
                self.copy_began = time.monotonic()
                self.copying.start()
        if (waited := time.monotonic() - self.copy_began) > SLOW_COPY_NOTICE_SECONDS:
            self.warn(f"has not taken a copy for {waited:.0f} s")

    def copy(self) -> None:
        """Copy the newest local sentry and the best one, until each was tried."""
        tried = []
        while True:
            with self.lock:
                waiting = [s for s in self.to_copy() if s not in (*tried, *self.copied)]
                if not waiting:
                    self.in_copy = self.copying = None
                    return
                # In turn: new saves may come faster than a slow folder takes one.
                step = waiting[-(len(tried) % 2)]
                self.in_copy = self.local / f"step_{step:06d}"
            tried.append(step)
            self.copy_began = time.monotonic()
            try:
                copy_sentry(self.in_copy, self.durable, self.copy_file)
                prune(self.durable, self.keep)
            except (OSError, ValueError) as error:
                self.warn(f"refuses: {error}")
                continue
            self.copied.append(step)
            if self.warned:
                self.say(f"{self.durable} answers again; step {step} is there, verified")
            self.warned = False

    def warn(self, what: str) -> None:
        if not self.warned:
            since = f"steps after {max(self.copied)}" if self.copied else "all steps"
            self.say(
                f"warning: {self.durable} {what}; {since} up to {max(self.to_copy(), default=None)}"
                " are on the local disk only. Training goes on, and copying when the folder answers"
                " again."
            )
        self.warned = True

    def check(self) -> None:
        """Raise, in the training thread and once, what went wrong on the local disk."""
        if self.writing and self.writing.done():
            self.finish_local()

    def finish_local(self) -> None:
        """Wait for the local write. Raises: UserError if it failed."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def finish(self, timeout_seconds: float = 60.0) -> None:
        """Wait for the local write and a while for the copy; say what was not copied."""
        self.finish_local()
        if copying := self.copying:
            copying.join(timeout_seconds)
        # A copy in progress kept its sentry from being deleted. One save too many is no loss.
        with contextlib.suppress(OSError, UserError):
            self.prune_local()
        copied, step = max(self.copied, default=None), max(self.to_copy(), default=None)
        if self.durable != self.local and step not in (None, copied):
            held = "nothing" if copied is None else f"step {copied}"
            self.say(
                f"warning: {self.durable} holds {held}; step {step} is in {self.local} alone:"
                " copy it by hand before this machine goes away"
            )


# ---- List ----------------------------------------------------------------------------------------


def run_settings(run_dir: Path) -> dict:
    """Read RUN_DIR/config.yaml; {} if only sentries survived."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return {}
    with contextlib.suppress(yaml.YAMLError):  # bytes that are not UTF-8 raise it too
        if isinstance(settings := yaml.safe_load(path.read_bytes()), dict):
            return settings
    raise UserError(f"{path}: not readable; delete it, train.py writes it again")


def read_tokenizer_file(run_dir: Path, name: str, read: Callable):
    """Read a file of RUN_DIR/tokenizer. Raises: UserError with the command that makes it again."""
    folder = run_dir / "tokenizer"
    try:
        return read(str(folder / name))
    except Exception:  # the tokenizers package raises nothing narrower
        what = "damaged" if (folder / name).is_file() else "missing"
        raise UserError(
            f"{folder}: {name} is {what}; python extend_tokenizer.py CONFIG run_dir={run_dir} makes"
            " it again"
        ) from None


def sentry_folders_and_identity(run_dir: Path) -> tuple[list[Path], dict]:
    """List the folders that may hold a run's sentries, and what their states must say."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder; give the run_dir or the sentry_dir of a run")
    folder = run_dir.resolve()
    if save := re.fullmatch(r"step_(\d{6,})", folder.name):
        parents = folder.parents  # the second one is the run, or the first one is its sentry_dir
        wanted = parents[1] if (parents[1] / "config.yaml").is_file() else parents[0]
        raise UserError(
            f"{run_dir}: is one save of a run; give {wanted}, and export, generate and neighbours"
            f" take --step {int(save[1])} for this save"
        )
    settings = run_settings(run_dir)
    identity = {n: settings[n] for n in ("model_name", "model_revision") if n in settings}
    if (run_dir / "tokenizer" / "report.json").is_file():
        report = read_tokenizer_file(run_dir, "report.json", read_json)
        identity["words_sha256"] = report["new_words_sha256"]
    durable = started_in(run_dir) / settings["sentry_dir"] if settings.get("sentry_dir") else None
    return [run_dir / "snapshots", durable or run_dir / "sentries", run_dir], identity


def started_in(run_dir: Path) -> Path:
    """Name the folder in which relative paths of a run's settings begin. If the run does not say
    so, it is the current folder."""
    try:
        return Path(read_json(run_dir / "tokenizer" / "report.json").get("started_in", ""))
    except (OSError, ValueError):
        return Path()


def list_saves(run_dir: Path) -> None:
    """Print every save, and the one to continue from. Raises: UserError if there is none."""
    folders, expected = sentry_folders_and_identity(run_dir)
    width, chosen = max(len(str(folder)) for folder in folders), None
    print(f"{'step':>10}  {'folder':{width}}  {'MiB':>10}  state")
    for step, path in sentry_folders(*folders):
        try:
            sentry = check_sentry(path, expected)
            found, chosen = "whole", chosen or sentry
            # Without config.yaml and report.json, the newest whole sentry says which run this is.
            names = [n for n in ("words_sha256", "corpus_sha256") if sentry.state[n] != NOT_KNOWN]
            expected = {n: sentry.state[n] for n in names} | expected
        except UserError as error:
            found = str(error).removeprefix(f"{path}: ")
        mib = sum(file.stat().st_size for file in path.iterdir() if file.is_file()) / 2**20
        print(f"{step:10,}  {path.parent!s:{width}}  {mib:10,.1f}  {found}")
    if chosen is None:
        raise UserError(f"{run_dir}: nothing here can be continued")
    print(
        f"train.py would continue from {chosen.path}: step {chosen.step:,} of"
        f" {chosen.state['config']['max_steps']:,}, {chosen.state['num_new_tokens']:,} new words of"
        f" {chosen.state['model_name']}"
    )


# ---- What an export needs: rows, words, base model -----------------------------------------------


def newest_sentry(run_dir: Path, step: int | str | None = None) -> Sentry:
    """Pick the sentry of `step`, or the one that train.py would continue from, and say what was
    passed over."""
    sentry, skipped = pick_sentry(*sentry_folders_and_identity(run_dir), step)
    for reason in skipped:
        print(f"passed over: {reason}")
    if sentry is None:
        raise UserError(f"{run_dir}: holds no sentry; train.py has not saved there yet")
    return sentry


def trained_rows(sentry: Sentry) -> dict[str, Tensor]:
    """Read the rows of a sentry, (num_new_tokens, hidden) fp32 each; the file is mapped."""
    tensors = load_file(sentry.path / "rows.safetensors")
    return {name: rows for name, rows in tensors.items() if name in ("input_rows", "output_rows")}


def config_with_base(settings: dict, base: str | None, run_dir: Path = Path()) -> Config:
    """Make a Config of saved settings; keys of older versions are left out, and --base wins.

    A local model folder is looked for where the run was started.
    """
    known = {name: value for name, value in settings.items() if name in KEYS}
    folder = started_in(run_dir) / Path(known["model_name"]).expanduser()
    if base or folder.is_dir():
        known["model_name"] = base or str(folder)
    return Config(**known)


@dataclasses.dataclass(frozen=True)
class SavedWords:
    """These are the new words of a run by their ids, and the base ids that spelled each of them.

    As in NewWords the rows from num_words on are second forms of words that stand before them.
    """

    first_new_id: int
    num_words: int
    words: list[str]
    spellings: list[list[int]]
    sha256: str
    tokenizer: Tokenizer
    load_with: str  # the class of transformers that loads the tokenizer's folder right


def words_table_columns(path: str) -> list[list[str]]:
    """Read words.tsv, as columns: the words, the texts that their tokens match, the base ids."""
    _, *lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
    rows = [line.split("\t") for line in lines]
    return [[row[column] for row in rows] for column in (1, 2, 3)]


def saved_words(run_dir: Path) -> SavedWords:
    """Read the words in RUN_DIR/tokenizer and prove that its three files belong together."""
    report = read_tokenizer_file(run_dir, "report.json", read_json)
    tokenizer = read_tokenizer_file(run_dir, "tokenizer.json", Tokenizer.from_file)
    words, texts, base_ids = read_tokenizer_file(run_dir, "words.tsv", words_table_columns)
    first, num, sha256 = report["base_size"], report["new_tokens"], report["new_words_sha256"]
    tokens = [tokenizer.id_to_token(i) or "" for i in range(first, first + len(words))]
    if new_words_hash(words, first) != sha256 or texts != list(map(shown_content, tokens)):
        raise UserError(f"{run_dir / 'tokenizer'}: its files are not of the same words")
    spellings = [[int(i) for i in ids.split()] for ids in base_ids]
    return SavedWords(first, num, words, spellings, sha256, tokenizer, report["load_with"])


def base_file(config: Config, name: str) -> Path:
    """Find a file of the base model in its local folder or on the hub; it may not exist."""
    folder = Path(config.model_name).expanduser()
    if not folder.is_dir():
        wanted = {"revision": config.model_revision, "allow_patterns": [name]}
        try:
            folder = Path(huggingface_hub.snapshot_download(config.model_name, **wanted))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
            raise UserError(
                f"model {folder}: neither a local folder nor on the hub; --base names its folder"
            ) from None
    return folder / name


def weight_files(config: Config) -> dict[str, str]:
    """Read which file of the base model holds which tensor; no weights are loaded."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (path := base_file(config, single)).is_file():
            return dict.fromkeys(mapped_tensors(path), single)
        if (path := base_file(config, f"{single}.index.json")).is_file():
            return read_json(path)["weight_map"]
    return dict.fromkeys(mapped_tensors(base_file(config, "model.safetensors")))


@dataclasses.dataclass(frozen=True)
class BaseTables:
    """This says where the base model keeps its two tables: the tensors' names and files, and the
    paths of the modules that hold them, which may be called otherwise. If the files hold no head,
    `head` is the name that one would get, and weight_map lacks it."""

    config: Config
    weight_map: dict[str, str]
    embedding: str
    head: str
    embedding_path: str
    head_path: str
    tied: bool

    @property
    def head_bias(self) -> str:
        """Name the bias of the head, which the files may lack."""
        return self.head.removesuffix("weight") + "bias"

    def table(self, name: str, num_rows: int) -> Tensor:
        """Map the first rows of a table: without its padding, if num_rows is the base's size."""
        path = base_file(self.config, self.weight_map[name])
        table = mapped_tensors(path)[name]
        if table.ndim != 2 or not table.is_floating_point():
            raise UserError(f"{path}: {name} is {table.dtype} {tuple(table.shape)}")
        return table[:num_rows]


# How checkpoints call the two tables, where they do not call them as the model's module.
EMBEDDING_NAMES = ("embed_tokens", "wte", "embed_in", "word_embeddings", "embeddings", "embedding")
HEAD_NAMES = ("lm_head", "embed_out")


def stored_table(weight_map: dict[str, str], path: str, others: tuple[str, ...]) -> str | None:
    """Find the tensor of the module at `path`: by its whole path, or by the last part of it.

    A table inside a numbered layer is another one: GLM-4.5 and DeepSeek-V3 keep a second embedding
    in the layers that predict several tokens.
    """
    if f"{path}.weight" in weight_map:
        return f"{path}.weight"
    for last in (path.rpartition(".")[2], *others):
        pattern = rf"(?!.*\.\d+\.)(.*\.)?{last}\.weight"
        found = [name for name in weight_map if re.fullmatch(pattern, name)]
        if len(found) == 1:
            return found[0]
    return None


def export_problems(config: Config, model: torch.nn.Module) -> list[str]:
    """Say in words what an export as merged or peft would lack; asked before the first step."""
    try:
        base_tables(config, model)
    except UserError as error:
        return [f"only the rows of this run can be exported: {text}" for text in error.problems]
    return []


def base_tables(config: Config, model: torch.nn.Module | None = None) -> BaseTables:
    """Find the base model's tables by the names in its files and its modules; no weights.

    model: the model, if it is at hand and has no overlay. Raises: UserError
    """
    weight_map = weight_files(config)
    model = model or model_without_weights(config)
    modules = model.get_input_embeddings(), model.get_output_embeddings()
    paths = [next(p for p, m in model.named_modules() if m is module) for module in modules]
    embedding = stored_table(weight_map, paths[0], EMBEDDING_NAMES)
    head, tied = stored_table(weight_map, paths[1], HEAD_NAMES), is_tied(model)
    for name, path in ((embedding, paths[0]), (embedding if tied else head, paths[1])):
        if name is None:
            tables = [name for name in weight_map if re.search("embed|wte|head", name)]
            raise UserError(
                f"model {config.model_name}: no one tensor in its files is that of {path}; found"
                f" {', '.join(tables[:8])}"
            )
    return BaseTables(config, weight_map, embedding, head or "lm_head.weight", *paths, tied)


# ---- Export --------------------------------------------------------------------------------------

ROWS_ALONE = """`rows.safetensors` holds `input_rows`, and `output_rows` if the head has its own,
fp32, row i for the i-th line of `words.txt`; `rows.json` names model, words and ids."""
FOUR_BITS = """In 4 bits it takes a quarter of the memory. Import `BitsAndBytesConfig` from
transformers, and give the model `quantization_config=BitsAndBytesConfig(load_in_4bit=True,
bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)` beside `dtype`."""
LOADING = {  # the Python code of a card
    "merged": """from transformers import {auto}, {tokenizer}

tokenizer = {tokenizer}.from_pretrained("{folder}")
model = {auto}.from_pretrained("{folder}", dtype="auto")""",
    "peft": """from peft import AutoPeftModelForCausalLM
from transformers import {tokenizer}

tokenizer = {tokenizer}.from_pretrained("{folder}")
# If the head is tied and takes the same rows, PEFT warns of a missing lm_head key.
model = AutoPeftModelForCausalLM.from_pretrained("{folder}", dtype="auto")""",
    "resized peft": """from peft import PeftModel
from transformers import {auto}, {tokenizer}

tokenizer = {tokenizer}.from_pretrained("{folder}")
model = {auto}.from_pretrained("{model}", dtype="auto"){untie}
model.resize_token_embeddings({size}, mean_resizing=False)
model = PeftModel.from_pretrained(model, "{folder}")""",
}
UNTIE = """
import torch
head = model.get_output_embeddings()  # the new words have output rows of their own
head.weight = torch.nn.Parameter(head.weight.detach().clone())
for part in (model.config, model.config.get_text_config()):
    part.tie_word_embeddings = False"""
# What llama.cpp makes of an export (tests/bench/check_gguf.py).
LLAMA_CPP = {
    "byte-level": "llama.cpp finds the new words too, but also inside longer words.",
    "with scores": """llama.cpp finds the new words too, but also inside longer words. It puts no
space before a text: where transformers does, as for Llama-2, begin a prompt with one.""",
    "without scores": """llama.cpp finds few of the new words, because the base has no
tokenizer.model, from which it takes the scores of its entries: use transformers or what builds on
it.""",
}
# What an export may have left in a folder that --force writes into; a loader would mix them up.
STALE = ("model*.safetensors*", "adapter_*", "rows.*", "config.json", "generation_config.json")
LIBRARIES = {"rows": None, "merged": "transformers", "peft": "peft"}


def export(
    run_dir: Path, out: Path, form: str, force: bool, base: str | None, step: int | str | None,
    push: str | None,
) -> None:  # fmt: skip
    """Write what was learnt to OUT, with a model card, and send it to the hub as the repo `push`.

    All is written beside OUT first. Files that are in OUT are written over only with `force`.
    """
    if push:
        check_login(push)
    out, sentry = out.resolve(), newest_sentry(run_dir, step)
    config = config_with_base(sentry.state["config"], base, run_dir)
    if out.is_dir() and any(out.iterdir()) and not force:
        raise UserError(f"{out}: holds files; give another folder, or --force to write over them")
    if out in (run_dir.resolve(), Path(config.model_name).resolve()):
        raise UserError(f"{out}: is the run or the base model itself; give another folder")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        words = None if form == "rows" else saved_words(run_dir)  # proves the tokenizer whole
        if words:
            own = shutil.ignore_patterns("report.json", "words.tsv")  # paths of this machine
            shutil.copytree(run_dir / "tokenizer", part, ignore=own, dirs_exist_ok=True)
        write = {"rows": export_rows, "peft": export_peft, "merged": export_merged}[form]
        facts = {"folder": push or out.name} | write(sentry, config, part)
        checked = "" if form == "rows" else f" ({check_export(form, part, sentry, config)})"
        shutil.copy(sentry.path / "words.txt", part)
        loading = how_to_load(form, facts, words, part)
        card = model_card(sentry, config, loading, LIBRARIES[form])
        (part / "README.md").write_text(card, encoding="utf-8")
        names = put_in_place(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"step {sentry.step:,} as {form}: {out}{checked}")
    if push:
        upload(out, names, push, f"Step {sentry.step:,} as {form}")


def put_in_place(part: Path, out: Path) -> list[str]:
    """Move an export's files into `out`, each on the disk before it gets its name -> the names."""
    out.mkdir(parents=True, exist_ok=True)
    for stale in (path for pattern in STALE for path in out.glob(pattern)):
        stale.unlink()
    names = sorted(path.name for path in part.iterdir())
    for name in names:
        sync(part / name)
        (part / name).replace(out / name)
    sync(out)
    return names


def how_to_load(form: str, facts: dict, words: SavedWords | None, part: Path) -> str:
    """Write the card's section on loading; `words` is None for rows, which have no tokenizer."""
    if words is None:
        return ROWS_ALONE
    code = LOADING[facts.get("loading", form)].format(tokenizer=words.load_with, **facts)
    text = f"```python\n{code}\n```\n\n{FOUR_BITS}"
    if form == "peft":
        return text
    kind = "byte-level"
    if is_sentencepiece(words.tokenizer):
        kind = "with scores" if (part / "tokenizer.model").is_file() else "without scores"
    return f"{text}\n\n{LLAMA_CPP[kind]}"


@contextlib.contextmanager
def hub_errors_in_one_line() -> Iterator[None]:
    """Turn what the hub and the network refuse into a UserError."""
    network = HfHubHTTPError.__bases__[0]  # httpx's base of all errors, or requests'
    try:
        yield
    except (OSError, network, HFValidationError) as error:
        raise UserError(f"--push: {one_line(error)}") from error


def check_login(repo: str) -> None:
    """Ask the hub who is logged in, before minutes are spent on files. Raises: UserError."""
    from huggingface_hub.utils import validate_repo_id

    with hub_errors_in_one_line():
        validate_repo_id(repo)
        huggingface_hub.whoami()


def upload(out: Path, names: list[str], repo: str, message: str) -> None:
    """Show what is sent, and send it: the files of this export alone. Raises: UserError."""
    print(f"to the hub as {repo}, private if it is new:")
    for name in names:
        print(f"  {size_text((out / name).stat().st_size):>8}  {name}", flush=True)
    with hub_errors_in_one_line():
        huggingface_hub.create_repo(repo, private=True, exist_ok=True)
        commit = huggingface_hub.upload_folder(
            repo_id=repo, folder_path=out, allow_patterns=names, commit_message=message
        )
    print(commit.commit_url)


def size_text(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000


def export_rows(sentry: Sentry, config: Config, part: Path) -> dict:
    """Write rows.safetensors, and rows.json with model, step and the id of every word."""
    save_tensors(trained_rows(sentry), part / "rows.safetensors")
    words = (sentry.path / "words.txt").read_text(encoding="utf-8").split()
    names = ("model_name", "model_revision", "step", "first_new_id", "num_new_tokens")
    facts = {name: sentry.state[name] for name in names}
    facts["words"], facts["second_forms"] = {}, {}
    for i, word in enumerate(words, facts["first_new_id"]):
        facts["second_forms" if word in facts["words"] else "words"][word] = i
    write_json(part / "rows.json", facts)
    return {}


def export_peft(sentry: Sentry, config: Config, part: Path) -> dict:
    """Write an adapter of PEFT's type TRAINABLE_TOKENS.

    Its tensors are named "delta" and hold the rows themselves (peft 0.21, tuners/trainable_tokens).
    """
    rows, state, base = trained_rows(sentry), sentry.state, base_tables(config)
    first, size = state["first_new_id"], state["first_new_id"] + state["num_new_tokens"]
    if base.head_bias in base.weight_map:
        raise UserError(
            "export: the model's head has a bias, which PEFT's trainable tokens leave out; use"
            " --format merged"
        )
    separate = "output_rows" in rows
    new_rows = {base.embedding_path: rows["input_rows"]}
    if separate or not base.tied:
        new_rows[base.head_path] = rows.get("output_rows", rows["input_rows"])
    num_base = len(base.table(base.embedding, first))
    tensors = {}
    for path, new in new_rows.items():
        # A copy for each side, because safetensors refuses to write the same memory twice.
        table = longer_table(new[:0], new, first - num_base)
        tensors[f"base_model.model.{path}.trainable_tokens_delta"] = table
    save_tensors(tensors, part / "adapter_model.safetensors")
    write_json(part / "adapter_config.json", {
        "peft_type": "TRAINABLE_TOKENS", "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": state["model_name"], "revision": state["model_revision"],
        "target_modules": list(new_rows), "init_weights": True,
        "token_indices": list(range(num_base, size)),
    })  # fmt: skip
    auto, untie = auto_class(config).__name__, UNTIE if base.tied and separate else ""
    facts = {"model": state["model_name"], "size": size, "auto": auto, "untie": untie}
    # AutoPeftModelForCausalLM brings the base to the right size; it unties no head.
    loads_alone = auto == "AutoModelForCausalLM" and not untie
    return facts | {"loading": "peft" if loads_alone else "resized peft"}


def export_merged(sentry: Sentry, config: Config, part: Path) -> dict:
    """Write an ordinary checkpoint, shard by shard as the base has it, with longer tables.

    Rows below first_new_id stay bitwise what they were. New rows are cast to the table's dtype, and
    the base's padding rows go. If the head is tied and the output rows are separate, the head
    becomes a tensor of its own.
    Memory: 1.3 x the new table, more if one shard holds both tables: 2,571 MiB for Qwen2.5-14B's,
            of 1,913 each (tests/bench/measure_merge.py --hidden 5120, 2 CPU cores, 2026-11-25).
            The files that are read are mapped, and the system takes their pages back
    """
    first, num = sentry.state["first_new_id"], sentry.state["num_new_tokens"]
    rows, base = trained_rows(sentry), base_tables(config)
    separate, bias = "output_rows" in rows, base.head_bias
    weight_map, new_rows = dict(base.weight_map), {base.embedding: rows["input_rows"]}
    if base.head in weight_map or separate:
        weight_map.setdefault(base.head, weight_map[base.embedding])
        new_rows[base.head] = rows.get("output_rows", rows["input_rows"])
    total_size, shards = 0, sorted(set(weight_map.values()))
    for shard in shards:
        tensors = dict(mapped_tensors(base_file(config, shard)))  # written without being loaded
        for name in (name for name in new_rows if weight_map[name] == shard):
            table = base.table(base.embedding if base.tied else name, first)
            tensors[name] = longer_table(table, new_rows[name], first)
        if bias in tensors:
            tensors[bias] = longer_table(tensors[bias][:first], torch.zeros(num), first)
        save_tensors(tensors, part / safetensors_name(shard))
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        weight_map = {name: safetensors_name(shard) for name, shard in weight_map.items()}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(part / "model.safetensors.index.json", index)
    write_model_settings(config, part, first + num, tied=base.tied and not separate)
    return {"auto": auto_class(config).__name__}


def write_model_settings(config: Config, part: Path, vocab_size: int, tied: bool) -> None:
    """Write the base's config.json with the size of the longer tables, and copy the base's
    generation_config.json."""
    settings = read_json(base_file(config, "config.json"))
    text = settings.get("text_config", settings)  # a section of its own in Gemma 3 4B
    text["vocab_size"] = vocab_size
    for section in (settings, text):
        section["tie_word_embeddings"] = tied
    write_json(part / "config.json", settings)
    # llama.cpp converts a Phi-4 by the class of its tokenizer. Beside a config.json of this type
    # transformers 4.57.6 and 5.24.0 take tokenizer.json as it is, whatever the class.
    named = base_file(config, "tokenizer_config.json")
    base_class = read_json(named).get("tokenizer_class") if named.is_file() else None
    if (settings.get("model_type"), base_class) == ("phi3", "GPT2Tokenizer"):
        own = read_json(part / named.name)
        write_json(part / named.name, own | {"tokenizer_class": base_class})
    if (generation := base_file(config, "generation_config.json")).is_file():
        shutil.copy(generation, part)


def longer_table(table: Tensor, new_rows: Tensor, first_new_id: int) -> Tensor:
    """Put new rows behind the base's, in its dtype; ids that the base has no row for get zeros."""
    missing = table.new_zeros(first_new_id - len(table), *table.shape[1:])
    return torch.cat([table, missing, new_rows.to(table.dtype)])


def safetensors_name(shard: str) -> str:
    return shard.replace("pytorch_model", "model").replace(".bin", ".safetensors")


@torch.no_grad()
def check_export(form: str, part: Path, sentry: Sentry, config: Config) -> str:
    """Load an export back and compare it with the overlay over the base -> what was compared.

    What is compared are the logits of sixteen tokens, base tokens and new words, on the CPU and in
    the dtype of the files. If they cannot be computed here, the rows are read back by their names.
    Raises: UserError if the export computes something else, or if it cannot be loaded
    """
    rows = trained_rows(sentry)
    if reason := why_not_loaded(form, config):
        compare_rows(form, part, rows, base_tables(config))
        return f"its rows were read back, and no logits compared: {reason}"
    try:
        found_by = load_export(form, part, sentry, config).eval()
    except Exception as error:  # a model's own code may raise anything
        raise UserError(f"export: it cannot be loaded back: {one_line(error)}") from error
    base = load_stored(config, config.model_name).eval()
    overlay = WakeOverlay(base, sentry.state["first_new_id"], **rows)
    ids = overlay.spread_ids(16)  # (1, 16)
    # Before the overlay is installed, because the two models may share parts.
    found = found_by(input_ids=ids, use_cache=False).logits.float()
    overlay.install()
    wanted = base(input_ids=ids, use_cache=False).logits.float()
    known = wanted.isfinite()  # all but the ids that the base's table has no row for
    difference = (wanted - found)[known].abs().max() / wanted[known].abs().max()
    if not difference <= (1e-4 if overlay.dtype == torch.float32 else 2e-2):
        raise UserError(
            f"export: its logits differ from those of training by {difference:.2g} of the largest"
        )
    return "loaded back: its logits are those of training"


def load_stored(config: Config, name: str | Path):
    """Load a model with plain transformers, on the CPU in the dtype of its files."""
    hide_bars_in_logs()
    # transformers ignores the revision if `name` is a local folder, as an export is.
    where = {"revision": config.model_revision, "trust_remote_code": config.trust_remote_code}
    return auto_class(config).from_pretrained(name, dtype="auto", **where)


def untie_head(model) -> None:
    """Give the head a copy of the table that it shares with the embedding, as the card's UNTIE."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for settings in (model.config, model.config.get_text_config()):
        settings.tie_word_embeddings = False


def load_export(form: str, part: Path, sentry: Sentry, config: Config):
    """Load an export as its card says."""
    if form == "merged":
        return load_stored(config, part)
    from peft import PeftModel

    model = load_stored(config, config.model_name)
    if is_tied(model) and "output_rows" in trained_rows(sentry):
        untie_head(model)
    size = sentry.state["first_new_id"] + sentry.state["num_new_tokens"]
    model.resize_token_embeddings(size, mean_resizing=False)
    return PeftModel.from_pretrained(model, part)


def why_not_loaded(form: str, config: Config) -> str:
    """Say why an export cannot be loaded back on this machine, or "" if it can."""
    if form == "peft" and not installed_version("peft"):
        return "peft is not installed"
    if "quantization_config" in read_json(base_file(config, "config.json")):
        return "the base model is stored quantized"
    files = {base_file(config, name) for name in weight_files(config).values()}
    need = 1.3 * sum(path.stat().st_size for path in files)  # one model at a time is in memory
    free = psutil.virtual_memory().available
    return f"that takes {need / GIB:.1f} GiB, and {free / GIB:.1f} are free" if need > free else ""


def compare_rows(form: str, part: Path, rows: dict[str, Tensor], base: BaseTables) -> None:
    """Raise a UserError if an export does not hold the rows where its loader looks for them."""
    names = {"input_rows": base.embedding, "output_rows": base.head}
    if form == "peft":
        paths = {"input_rows": base.embedding_path, "output_rows": base.head_path}
        names = {side: f"base_model.model.{paths[side]}.trainable_tokens_delta" for side in paths}
    tensors = {}
    for path in part.glob("*.safetensors"):
        tensors |= mapped_tensors(path)
    for side, wanted in rows.items():
        found = tensors[names[side]][-len(wanted) :]
        if not torch.equal(found, wanted.to(found.dtype)):
            raise UserError(f"export: {names[side]} does not hold the {side} that were trained")


def model_card(sentry: Sentry, config: Config, loading: str, library: str | None) -> str:
    """Write README.md of an export: base, words, recipe, steps, losses, licence, loading."""
    state, name, licence = sentry.state, sentry.state["model_name"], base_licence(config)
    words = (sentry.path / "words.txt").read_text(encoding="utf-8").split()
    first, num = state["first_new_id"], state["num_new_tokens"]
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    header = huggingface_hub.ModelCardData(
        base_model=name if on_hub else None, library_name=library, license=licence or "other",
        tags=["wake2vec"],
    )  # fmt: skip
    keys = (
        "init", "output_rows", "token_matching", "seq_len", "effective_batch_size", "learning_rate",
        "warmup_ratio", "row_coupling", "kin_coupling", "max_steps", "quantization", "seed",
    )  # fmt: skip
    # As saved: an older run had not every key, and a default would say that it did.
    settings = state["config"]
    recipe = ", ".join(f"{key} {settings[key]}" for key in keys if key in settings)
    return f"""---
{header.to_yaml()}
---
# {num:,} new words for {name}

Base model: {name}, revision {state["model_revision"] or "default"}, its weights frozen.
Licence of the base model: {licence or "see the base model"}.
New words: ids {first:,} to {first + num - 1:,}, in order in words.txt ({", ".join(words[:8])} ...).
Recipe: {recipe}.
Trained for {sentry.step:,} steps.{evaluations(sentry)}

## Loading

{loading}
"""


def evaluations(sentry: Sentry) -> str:
    """Tell the card how the held-out loss went: a sentence and a table; "" if there is none."""
    lines = (sentry.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evals = [record for record in map(json.loads, lines) if record["kind"] == "eval"]
    if not evals:
        return ""
    row = "| {step} | {val_loss:.4f} | {val_bits_per_byte:.3f} |"
    return "\n".join([
        " Held-out text: {val_bits_per_byte:.3f} bits per byte at step {step}; the base model"
        " without the words: {base_bits_per_byte:.3f}.\n".format(**evals[-1]),
        "| Step | Val, nats/token | Val, bits/byte |", "|---|---|---|",
        *(row.format(**record) for record in evals),
    ])  # fmt: skip


def base_licence(config: Config) -> str | None:
    """Find the licence that the base model's own card names."""
    try:
        card = huggingface_hub.metadata_load(base_file(config, "README.md"))
        return (card or {}).get("license")
    except (UserError, OSError, ValueError, yaml.YAMLError):  # no base at hand, no card, a bad one
        return None


# ---- Neighbours ----------------------------------------------------------------------------------


def neighbours(
    run_dir: Path, asked: list[str], num: int, base: str | None, step: int | str | None
) -> None:
    """Print what stands nearest to each word (default: the five that moved most).

    Nearest is by the cosine of input rows, among base tokens and among new words, before and after
    training. Norms and the longest moves come first.
    """
    sentry, new = newest_sentry(run_dir, step), saved_words(run_dir)
    if unknown := [word for word in asked if word not in new.words]:
        raise UserError(*(f"{word!r}: no new word of {run_dir}" for word in unknown))
    config = config_with_base(sentry.state["config"], base, run_dir)
    tables = base_tables(config)
    table = tables.table(tables.embedding, new.first_new_id)
    # One row stands for a word here, that of its first form.
    before = starting_rows(table, new.spellings[: new.num_words], config)
    after = trained_rows(sentry)["input_rows"][: new.num_words]
    moves = (after - before).norm(dim=1)
    moved = moves.argsort(descending=True)[:num].tolist()
    print(f"step {sentry.step:,}\n")
    print_norms({"base tokens": table, "new words, before": before, "new words, after": after})
    print(f"\n{'most moved':24} {'by':>8} {'cosine of before and after':>28}")
    for i, cosine in zip(moved, torch.cosine_similarity(before[moved], after[moved])):
        print(f"{new.words[i]:24} {moves[i]:8.3f} {cosine:28.3f}")
    chosen = [new.words.index(word) for word in asked] or moved[:5]
    near = {}  # "before" and "after" -> the chosen words' cosines to base tokens and to new words
    for when, rows in (("before", before), ("after", after)):
        near[when] = cosines(table, rows[chosen]), cosines(rows, rows[chosen])
    for n, i in enumerate(chosen):
        for when, (near_base, near_new) in near.items():
            near_new[i, n] = -2.0  # not the word itself
            tokens = nearest(near_base[:, n], num, lambda i: repr(new.tokenizer.decode([i])))
            print(f"\n{new.words[i]}, {when}")
            print(f"  base tokens  {tokens}")
            print(f"  new words    {nearest(near_new[:, n], num, new.words.__getitem__)}")


def print_norms(tables: dict[str, Tensor]) -> None:
    print(f"{'norms of input rows':24} {'mean':>8} {'std':>8}")
    for label, table in tables.items():
        norms = torch.cat([block.float().norm(dim=1) for block in table.split(ROW_BLOCK)])
        print(f"{label:24} {norms.mean():8.3f} {norms.std(correction=0):8.3f}")


def cosines(table: Tensor, chosen: Tensor) -> Tensor:
    """Compute the cosine of each row of a table with each chosen row.

    Shapes: table (V, H) of any float dtype, chosen (C, H) fp32 -> (V, C) fp32
    """
    chosen = normalize(chosen)
    return torch.cat([normalize(block.float()) @ chosen.T for block in table.split(ROW_BLOCK)])


def nearest(near: Tensor, num: int, name: Callable[[int], str]) -> str:
    """Write the names of the `num` largest cosines of one word, the largest first."""
    values, indices = near.topk(min(num, len(near)))
    return "  ".join(f"{name(i)} {value:.2f}" for value, i in zip(values, indices.tolist()))


# ---- Generate ------------------------------------------------------------------------------------


class TextStream:
    """Decodes ids as they come and marks new words; it is a `streamer` for model.generate.

    A letter of several bytes is a replacement sign until its last byte is there, so it is held back
    until then.
    """

    def __init__(
        self, tokenizer: Tokenizer, first_new_id: float, marks: tuple[str, str], show: Callable
    ):
        self.tokenizer, self.first_new_id = tokenizer, first_new_id
        self.marks, self.show = marks, show
        self.ids, self.text = [], ""  # the text has no marks

    def put(self, ids: Tensor) -> None:
        """Take the prompt's ids (1, tokens), or the next one (1,)."""
        for token in ids.flatten().tolist():
            is_new = token >= self.first_new_id
            if is_new:
                self.end()  # a word completes no letter
            self.ids.append(token)
            if is_new or not self.tokenizer.decode(self.ids).endswith("\ufffd"):
                self.end(is_new)

    def end(self, is_new: bool = False) -> None:
        """Show what was not shown yet; if `is_new`, it is a new word and gets the marks."""
        text = self.tokenizer.decode(self.ids)
        piece = text[len(os.path.commonprefix([text, self.text])) :]
        self.text = text
        if is_new and (word := piece.strip()):
            piece = piece.replace(word, word.join(self.marks), 1)
        self.show(piece)


def mark_new_words(ids: list[int], tokenizer: Tokenizer, first_new_id: float) -> str:
    """Decode ids, and put ** around every new word."""
    pieces = []
    stream = TextStream(tokenizer, first_new_id, ("**", "**"), pieces.append)
    stream.put(torch.tensor(ids))
    stream.end()
    return "".join(pieces)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Encode a prompt in Unicode's composed form, in which lexicon and corpus were read."""
    return tokenizer.encode(unicodedata.normalize("NFC", prompt)).ids


def continue_prompt(model, tokenizer: Tokenizer, prompt: str, seed: int, **how) -> list[int]:
    """Continue a prompt with the seed's own random numbers -> ids, those of the prompt too.

    how: what else model.generate takes
    """
    ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=model.device)  # (1, tokens)
    if not ids.numel():
        raise UserError(f"prompt: {prompt!r} has no tokens; give some text")
    with torch.random.fork_rng([model.device] if ids.is_cuda else []):
        torch.manual_seed(seed)
        mask = torch.ones_like(ids)
        what = f"{type(model).__name__} cannot continue a prompt"
        # Meanwhile the text goes out, and what reads it may end.
        with model_errors_in_one_line(what, "train it with prompts=null", OSError):
            out = model.generate(ids, attention_mask=mask, do_sample=True, pad_token_id=0, **how)
    return out[0].tolist()


def print_text(
    model, tokenizer: Tokenizer, first_new_id: float, prompt: str, seed: int, **how
) -> str:
    """Print prompt and continuation as they come, new words bold on a terminal -> the text."""
    marks = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    show = functools.partial(print, end="", flush=True)
    stream = TextStream(tokenizer, first_new_id, marks, show)
    continue_prompt(model, tokenizer, prompt, seed, streamer=stream, **how)
    print()
    return stream.text


@contextlib.contextmanager
def untouched_model(overlay: WakeOverlay) -> Iterator:
    """Lend the model as it was, with its own head. The overlay looks all ids up in the model's own
    table meanwhile, because on a GPU that table may lie on the host."""
    model, head = overlay.model, overlay.model.get_output_embeddings()
    first, overlay.first_new_id = overlay.first_new_id, overlay.base_vocab_size
    model.set_output_embeddings(overlay.head)
    overlay.set_vocab_size(overlay.base_vocab_size)
    try:
        yield model
    finally:
        overlay.first_new_id = first
        model.set_output_embeddings(head)
        overlay.set_vocab_size(overlay.vocab_size)


def in_notebook() -> bool:
    """Say whether this process is a notebook's kernel; `!python` in a cell is a process of its
    own."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def asked_prompts() -> Iterator[str]:
    """Ask for one prompt after another until an empty line, the end of the input, or Ctrl-C."""
    by_hand = sys.stdin.isatty() or in_notebook()
    try:
        while prompt := input("prompt, or Enter to end: " if by_hand else ""):
            yield prompt
    except (EOFError, KeyboardInterrupt):
        if by_hand:
            print()


def generate(
    run_dir: Path | str, prompt: str | None = None, *, step: int | str | None = None,
    temperature: float = 1.0, top_p: float = 0.95, max_new_tokens: int = 200,
    seed: int | None = None, base_model_too: bool = False, base: str | None = None,
) -> str:  # fmt: skip
    """Continue a prompt, or each one that is asked for, and print it -> the last text.

    The same seed (None: the run's) gives the same text. temperature 0 takes the likeliest token.
    Raises: UserError if there is no such sentry, no base model, or if an option is out of range
    """
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        what = "temperature is at least 0, top_p above 0 and at most 1, max_new_tokens at least 1"
        raise UserError(f"generate: {what}")
    sentry, new = newest_sentry(Path(run_dir), step), saved_words(Path(run_dir))
    config, text = config_with_base(sentry.state["config"], base, Path(run_dir)), ""
    base_file(config, "config.json")  # the line that says what to do if there is no base
    seed = config.seed if seed is None else seed
    how = {"max_new_tokens": max_new_tokens, "top_p": top_p, "use_cache": True}
    how |= {"temperature": temperature or 1.0, "top_k": 0 if temperature else 1}
    prompts = asked_prompts() if prompt is None else [prompt]
    try:
        overlay = trained_overlay(sentry, config)
        base_words = base_tokenizer(config) if base_model_too else None
        for prompt in prompts:
            if base_model_too:
                print("---- the untouched model")
                with untouched_model(overlay) as model:
                    print_text(model, base_words, math.inf, prompt, seed, **how)
                print(f"---- step {sentry.step:,}")
            text = print_text(overlay.model, new.tokenizer, new.first_new_id, prompt, seed, **how)
    except torch.OutOfMemoryError as error:
        advice = "end what else uses the GPU, in a notebook by a restart of its kernel"
        raise UserError(f"out of GPU memory: {advice} ({one_line(error)})") from error
    return text


def loading_line(config: Config) -> str:
    """Say what is loaded, and how much of it must be downloaded first."""
    name, folder = config.model_name, Path(config.model_name).expanduser()
    if folder.is_dir():
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        return f"loading {name}" + (f", {size_text(size)}{LOADING_TIME}" if size > 1e9 else "")
    wanted = {"revision": config.model_revision, "allow_patterns": ["*.safetensors"]}
    try:
        files = huggingface_hub.snapshot_download(name, dry_run=True, **wanted)
    except TypeError:  # before huggingface_hub 1.0 there was no dry_run
        return f"loading {name}; what is not on this disk yet is downloaded first"
    except (OSError, HFValidationError):  # no network: the loading itself says what is amiss
        return f"loading {name}"
    line = f"loading {name}, {size_text(sum(file.file_size for file in files))}{LOADING_TIME}"
    missing = sum(file.file_size for file in files if file.will_download)
    return f"{line}; {size_text(missing)} of it are downloaded first" if missing else line


def trained_overlay(sentry: Sentry, config: Config) -> WakeOverlay:
    """Load the base model as the run had it, and install the sentry's rows."""
    apply()
    if config.device == "cuda":  # a run of a GPU may be tried out where there is none
        config = dataclasses.replace(config, device="auto")
    if problems := check_environment(config.device, config.quantization):
        raise UserError(*problems)
    free_cached_memory()  # in a notebook, what an earlier run or call left
    print(f"step {sentry.step:,}: {loading_line(config)}", file=sys.stderr, flush=True)
    model = load_model(config, find_worker(config))
    overlay = WakeOverlay(model, sentry.state["first_new_id"], **trained_rows(sentry))
    overlay.install()
    return overlay


# ---- Import --------------------------------------------------------------------------------------


def import_seed(seed_file: Path, run_dir: Path, base: str | None) -> None:
    """Make a sentry in RUN_DIR/snapshots out of a file of the original notebooks.

    The notebooks trained input rows alone, from the id wake_start on. The second forms of words
    take the rows of the first ones. All other rows that the config asks for are as at step 0. The
    step number stays, so learning rate and data order go on from it. The optimizer begins anew.
    """
    settings = run_settings(run_dir)
    if not settings:
        raise UserError(f"{run_dir / 'config.yaml'}: missing; extend_tokenizer.py writes it")
    rows, step, start = read_seed(seed_file)
    new = saved_words(run_dir)
    first, last = new.first_new_id, new.first_new_id + new.num_words - 1
    tensors = untrained_tensors(config_with_base(settings, base, run_dir), new)
    width = tensors["input_rows"].shape[1]
    if start < first or rows.shape != (last + 1 - start, width):
        raise UserError(
            f"{seed_file}: {len(rows):,} rows of {rows.shape[1]:,} from id {start:,} on; this run's"
            f" new ids are {first:,} to {last:,}, its rows {width:,} wide"
        )
    if sentry_folders(*sentry_folders_and_identity(run_dir)[0]):
        raise UserError(f"{run_dir}: has saves of its own; give a new run_dir")
    tensors["input_rows"][start - first : new.num_words] = rows
    of_first_forms = [new.words.index(word) for word in new.words[new.num_words :]]
    tensors["input_rows"][new.num_words :] = tensors["input_rows"][of_first_forms]
    state = {
        "step": step, "model_name": settings["model_name"],
        "model_revision": settings["model_revision"], "words_sha256": new.sha256,
        "corpus_sha256": NOT_KNOWN, "first_new_id": first, "num_new_tokens": len(new.words),
        "sequences_seen": step * settings["effective_batch_size"], "optimizer_step": 0,
        "loss_scale": {"value": FLOAT16_LOSS_SCALE, "good_steps": 0},
        "best_val_loss": None, "base_bits_per_byte": None, "config": settings, "versions": {},
        "imported_from": seed_file.name,
    }  # fmt: skip
    texts = {"metrics.jsonl": "", "samples.md": "", "words.txt": "\n".join(new.words) + "\n"}
    path = write_sentry(run_dir / "snapshots", tensors, texts, state)
    print(f"{len(rows):,} rows of step {step:,} and {start - first:,} new ones: {path}")


def untrained_tensors(config: Config, new: SavedWords) -> dict[str, Tensor]:
    """Make what train.py saves, as it is at step 0: the rows, and Adafactor's zeros."""
    base = base_tables(config)
    mode, tables = output_mode(config.output_rows, base.tied), {"input_rows": base.embedding}
    if mode != "shared":
        tables["output_rows"] = base.embedding if base.tied else base.head
    tensors = {}
    for side, table in tables.items():
        rows = starting_rows(base.table(table, new.first_new_id), new.spellings, config)
        tensors[side] = rows
        if side == "input_rows" or mode == "separate":  # these rows will be trained
            tensors[f"{side}.row_mean_square"] = torch.zeros(len(rows))
            tensors[f"{side}.column_mean_square"] = torch.zeros(rows.shape[1])
    return tensors


def read_seed(seed_file: Path) -> tuple[Tensor, int, int]:
    """Read (rows in fp32, step, id of the first row); only tensors and numbers are unpickled."""
    try:
        seed = torch.load(seed_file, map_location="cpu", weights_only=True)
        rows = seed["embeddings"].float()
        step, start, count = (int(seed[name]) for name in ("step", "wake_start", "num_wake"))
    except (UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError,
            AttributeError) as error:  # fmt: skip
        raise UserError(
            f"{seed_file}: no sentry of the original notebooks, which hold 'embeddings', 'step',"
            f" 'wake_start' and 'num_wake' ({type(error).__name__}: {one_line(error)[:150]})"
        ) from None
    if rows.ndim != 2 or len(rows) != count or step < 0:
        raise UserError(f"{seed_file}: {tuple(rows.shape)} rows, num_wake {count}, step {step}")
    if not rows.isfinite().all():
        raise UserError(f"{seed_file}: 'embeddings' holds NaN or infinity")
    return rows, step, start


# ---- Command line --------------------------------------------------------------------------------


def step_or_best(text: str) -> int | str:
    return text if text == "best" else int(text)


COMMANDS = {"export": export, "generate": generate, "neighbours": neighbours, "import": import_seed}


def command_parser(command: str) -> argparse.ArgumentParser:
    """Make the parser of one of COMMANDS; "" lists the saves."""
    name, style = f"recover.py {command}".strip(), argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(name, description=__doc__, formatter_class=style)
    if command == "import":
        parser.add_argument("seed_file", type=Path, metavar="SEED_FILE.pt")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    if command == "export":
        parser.add_argument("out", type=Path, metavar="OUT")
        parser.add_argument("--format", dest="form", choices=LIBRARIES, required=True)
        parser.add_argument("--force", action="store_true", help="write though OUT has files")
        parser.add_argument("--push", metavar="NAME/REPO", help="to the hub; `hf auth login` first")
    if command == "neighbours":
        parser.add_argument("asked", nargs="*", metavar="word", help="default: the 5 most moved")
        parser.add_argument("--num", type=int, default=10, help="neighbours of each kind (10)")
    if command == "generate":
        parser.add_argument("prompt", nargs="?", help="default: ask for one after another")
        for option, kind, meaning in (
            ("--temperature", float, "0: always the likeliest token (1.0)"),
            ("--top-p", float, "share of the probability that tokens are drawn from (0.95)"),
            ("--max-new-tokens", int, "(200)"),
            ("--seed", int, "(the run's own)"),
        ):  # if it is not given, the function's own default holds
            parser.add_argument(option, type=kind, default=argparse.SUPPRESS, help=meaning)
        what = "first what the untouched model writes"
        parser.add_argument("--base-model-too", action="store_true", help=what)
    if command in ("export", "generate", "neighbours"):
        parser.add_argument("--step", type=step_or_best, help="a step, or best (the newest)")
    if command:
        parser.add_argument("--base", metavar="FOLDER", help="the base model, where it moved")
    return parser


def main(*argv: str) -> None:
    """Run one command. Raises: UserError, also for what the disk refuses."""
    argv = [{"neighbors": "neighbours"}.get(text, text) for text in argv[:1]] + list(argv[1:])
    command = argv.pop(0) if argv and argv[0] in COMMANDS else ""
    arguments = vars(command_parser(command).parse_intermixed_args(argv))
    try:
        COMMANDS.get(command, list_saves)(**arguments)
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk, a folder that may not be written
        raise UserError(one_line(error)) from error


if __name__ == "__main__" and "__file__" in globals():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    raise SystemExit(run_command(main, *sys.argv[1:]))
