"""Find, verify, list, export, look at and import what a run saved.

    python recover.py RUN_DIR                              what is there, what train.py goes on from
    python recover.py export RUN_DIR OUT --format merged   an ordinary model folder; or peft, rows
    python recover.py neighbours RUN_DIR [word ...]        what is near a word, before and after
    python recover.py import SEED_FILE.pt RUN_DIR          a sentry of the original notebooks

A sentry is a folder step_000020/ with rows.safetensors (fp32 rows and optimizer statistics),
words.txt, metrics.jsonl, samples.md and state.json, which is written last and holds size and
SHA-256 of the others: without a state.json that agrees, a folder is no sentry. Only `import` reads
a pickle, and of that tensors and numbers alone. Where only sentry_dir survived, give it as RUN_DIR.
"""

import argparse
import dataclasses
import errno
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
from collections.abc import Iterator
from pathlib import Path

import numpy

COPY_CHUNK_BYTES = 16 * 2**20
ROWS_AT_ONCE = 4096  # 80 MiB in fp32 at a hidden size of 5,120
MARKER = "state.json"
NOT_KNOWN = "not known"  # what an import cannot say in its state; agrees with anything
PATIENCE_SECONDS = 60.0  # a copy of 1.7 GiB to a mounted Drive takes about that
FLOAT_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # a BF16 is the upper half of an F32


class SentryError(ValueError):
    """A save that cannot be used, or none where one is needed; one line for each problem."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclasses.dataclass(frozen=True)
class Sentry:
    """A saved step: its folder, its step and its state.json."""

    path: Path
    step: int
    state: dict


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def fault_point(name: str, step: int) -> None:
    """Test hook: die here by SIGKILL where WAKE2VEC_FAULT is `name@step` (tests/torture.py)."""
    if os.environ.get("WAKE2VEC_FAULT") == f"{name}@{step}":
        os.kill(os.getpid(), signal.SIGKILL)


def sync(path: Path) -> None:
    """Have the operating system put a file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Network file systems that cannot sync a folder say so; there the files' own sync must do.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def copy_bytes(reader, writer, count: int) -> None:
    """Copy count bytes between open files, a chunk at a time."""
    while count and (chunk := reader.read(min(count, COPY_CHUNK_BYTES))):
        writer.write(chunk)
        count -= len(chunk)


def file_record(path: Path) -> dict:
    """{'size': bytes, 'sha256': hex} of a file, read in chunks; the hash releases Python's lock."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(COPY_CHUNK_BYTES):
            digest.update(chunk)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def as_json_text(value: dict) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file; offset and size in bytes."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file in the order of their bytes. Raises: SentryError."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, path.stat().st_size)))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            place = 8 + length + begin, end - begin
            found[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), *place)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SentryError(f"{path}: not a safetensors file") from None
    return dict(sorted(found.items(), key=lambda item: item[1].offset))


def row_blocks(
    tensor: StoredTensor, stop: int | None = None
) -> Iterator[tuple[int, numpy.ndarray]]:
    """(number of the first row, rows in fp32) of the rows before `stop`, ROWS_AT_ONCE each."""
    num_rows, width = tensor.shape[0], math.prod(tensor.shape[1:])
    stop = num_rows if stop is None else stop
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset)
        for start in range(0, stop, ROWS_AT_ONCE):
            count = min(ROWS_AT_ONCE, stop - start)
            data = file.read(count * tensor.size // num_rows)
            block = numpy.frombuffer(data, FLOAT_TYPES[tensor.dtype])
            if tensor.dtype == "BF16":
                block = (block.astype("<u4") << 16).view("<f4")
            yield start, block.astype("<f4", copy=False).reshape(count, width)


def as_stored(rows: numpy.ndarray, dtype: str) -> bytes:
    """Finite fp32 rows in a table's dtype, rounded to nearest even as torch does."""
    if dtype == "BF16":
        bits = numpy.ascontiguousarray(rows).view("<u4")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return rows.astype(FLOAT_TYPES[dtype]).tobytes()


def tensor_header(entries: dict[str, tuple[str, list[int], int]]) -> bytes:
    """The beginning of a safetensors file of the tensors name -> (dtype, shape, bytes)."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, size) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, tensors: dict) -> None:
    """Write numpy arrays in the safetensors format, without the whole-file copy in memory that the
    library's own writer makes, and without holding Python's lock while training goes on."""
    names = {"float32": "F32", "float16": "F16", "int64": "I64", "uint8": "U8"}
    entries = {n: (names[str(a.dtype)], list(a.shape), a.nbytes) for n, a in tensors.items()}
    with open(path, "wb") as file:
        file.write(tensor_header(entries))
        for array in tensors.values():
            data = memoryview(array.reshape(-1)).cast("B") if array.size else b""
            for start in range(0, len(data), COPY_CHUNK_BYTES):
                file.write(data[start : start + COPY_CHUNK_BYTES])


def read_tensors(path: Path) -> dict:
    """A safetensors file as numpy arrays."""
    from safetensors.numpy import load_file

    return load_file(path)


# ------------------------------------------------------------------------------------------------
# Sentries
# ------------------------------------------------------------------------------------------------


def commit_folder(part: Path, target: Path, state: dict) -> None:
    """Rename a finished part folder to its name and put the marker in, each step synced.

    A folder of that name can only be what a kill left behind, so it goes first.
    """
    for path in part.iterdir():
        sync(path)
    sync(part)
    fault_point("before_rename", state["step"])
    if target.exists():
        (target / MARKER).unlink(missing_ok=True)  # from here on it is no sentry
        shutil.rmtree(target)
    part.rename(target)
    fault_point("before_marker", state["step"])
    marker = target / (MARKER + ".part")
    marker.write_text(as_json_text(state), encoding="utf-8")
    sync(marker)
    marker.rename(target / MARKER)
    sync(target)
    sync(target.parent)
    fault_point("after_marker", state["step"])


def discard(*folders: Path) -> None:
    """Give a full disk back the space of what did not become a sentry."""
    for folder in folders:
        if not (folder / MARKER).exists():
            shutil.rmtree(folder, ignore_errors=True)


def write_sentry(folder: Path, tensors: dict, texts: dict[str, str], state: dict) -> Path:
    """Write folder/step_NNNNNN/ under a temporary name beside it, sync, rename, marker last.

    tensors: name -> numpy array; texts: file name -> content; state: what state.json holds; gets
    'files'. Raises: OSError (disk full, read-only); the sentries before it are untouched.
    """
    target = folder / f"step_{state['step']:06d}"
    part = folder / f".{target.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write_tensors(part / "rows.safetensors", tensors)
        fault_point("rows_written", state["step"])
        for name, text in texts.items():
            (part / name).write_text(text, encoding="utf-8")
        state["files"] = {path.name: file_record(path) for path in sorted(part.iterdir())}
        commit_folder(part, target, state)
    except OSError:
        discard(part, target)
        raise
    return target


def copy_sentry(source: Path, folder: Path) -> Path:
    """Copy a sentry into another folder: temporary name, read back, compare, rename, marker last.

    One that is there and whole stays as it is: after a restart most are.
    Raises: OSError where that folder fails; SentryError where it hands back other bytes.
    """
    state = read_json(source / MARKER)
    target, part = folder / source.name, folder / f".{source.name}.part"
    try:
        return check_sentry(target, state).path
    except SentryError:
        shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for name, record in state["files"].items():
            with open(source / name, "rb") as reader, open(part / name, "wb") as writer:
                copy_bytes(reader, writer, record["size"])
            sync(part / name)
            fault_point("copied", state["step"])
            if file_record(part / name) != record:
                raise SentryError(f"{part / name}: read back other bytes than were written")
        fault_point("verified", state["step"])
        commit_folder(part, target, state)
    except (OSError, SentryError):
        discard(part, target)
        raise
    return target


def sentry_folders(*folders: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything named like a sentry, newest first, whole or not; of the same step,
    those of the first folder come first. Raises: SentryError where a folder does not answer."""
    found = []
    for folder in folders:
        try:
            paths = list(folder.iterdir()) if folder.is_dir() else []
        except OSError as error:  # a mount that went away
            raise SentryError(f"{folder}: cannot be read: {error.strerror}") from None
        for path in paths:
            match = re.fullmatch(r"step_(\d{6,})", path.name)
            if match and path.is_dir():
                found.append((int(match[1]), path))
    return sorted(found, key=lambda entry: -entry[0])


def prune(folder: Path, keep: int, spare: tuple[Path | None, ...] = ()) -> None:
    """Delete all but the newest `keep` committed sentries and those in `spare`; called only after
    a newer one is whole. Without a marker, or .part, they are leavings of a kill and go too.
    """
    committed = [path for _, path in sentry_folders(folder) if (path / MARKER).exists()]
    for step, path in sentry_folders(folder):
        if path not in committed[:keep] and path not in spare:
            (path / MARKER).unlink(missing_ok=True)
            fault_point("pruning", step)
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".step_*.part"):
        shutil.rmtree(path, ignore_errors=True)


def check_sentry(path: Path, expected: dict) -> Sentry:
    """Read a sentry and prove it whole: marker, `expected` state values, sizes, hashes, finite.

    Memory: ROWS_AT_ONCE rows in fp32. Raises: SentryError with the reason, in words for a person.
    """
    try:
        state = read_json(path / MARKER)
        files, step = state["files"], int(state["step"])
        records = {name: (record["size"], record["sha256"]) for name, record in files.items()}
        records["rows.safetensors"]
    except FileNotFoundError:
        raise SentryError(f"{path}: no {MARKER}; the save was cut off before its end") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise SentryError(f"{path}: {MARKER} is damaged") from None
    if path.name != f"step_{step:06d}":
        raise SentryError(f"{path}: {MARKER} is of step {step}")
    for name, wanted in expected.items():
        if state.get(name) not in (wanted, NOT_KNOWN):
            raise SentryError(f"{path}: other {name} ({state.get(name)!r} instead of {wanted!r})")
    try:
        for name, (wanted, sha256) in records.items():
            if not (path / name).is_file():
                raise SentryError(f"{path}: {name} is missing")
            if (size := (path / name).stat().st_size) != wanted:
                raise SentryError(f"{path}: {name} is {size:,} bytes instead of {wanted:,}")
            if file_record(path / name)["sha256"] != sha256:
                raise SentryError(f"{path}: {name} does not have the SHA-256 that {MARKER} says")
        for name, tensor in stored_tensors(path / "rows.safetensors").items():
            blocks = row_blocks(tensor) if tensor.dtype in FLOAT_TYPES else ()
            if not all(numpy.isfinite(rows).all() for _, rows in blocks):
                raise SentryError(f"{path}: {name} holds NaN or infinity")
    except OSError as error:
        raise SentryError(f"{path}: cannot be read: {error.strerror}") from None
    return Sentry(path, step, state)


def pick_sentry(
    folders: list[Path], expected: dict, step: int | None = None
) -> tuple[Sentry | None, list[str]]:
    """The newest whole sentry across folders, by integer step, and why newer ones were passed over.

    None only where no folder holds anything named like a sentry. `step` asks for that one alone.
    Raises: SentryError where there are saves but none can be continued, or where `step` is missing.
    """
    skipped = []
    for number, path in sentry_folders(*folders):
        if step in (None, number):
            try:
                return check_sentry(path, expected), skipped
            except SentryError as error:
                skipped += error.problems
    if step is not None:
        places = ", ".join(map(str, folders))
        raise SentryError(*skipped, f"no whole sentry of step {step} in {places}")
    if skipped:
        raise SentryError(
            *skipped, "nothing here can be continued; --fresh starts over and keeps this aside"
        )
    return None, []


def set_aside(folders: list[Path], chosen: Sentry) -> None:
    """Rename what is newer than the sentry that a run continues from: it is never counted again."""
    for step, path in sentry_folders(*folders):
        if step > chosen.step:
            names = (path.with_name(f"{path.name}.aside-{n}") for n in itertools.count(1))
            try:
                path.rename(next(name for name in names if not name.exists()))
            except OSError as error:
                raise SentryError(f"{path}: cannot be put aside: {error.strerror}") from None


class SentryWriter:
    """Saves while training goes on: one thread writes to the local disk, another copies to the
    durable folder.

    A failure of the local disk reaches the training loop at its next `check`. A durable folder
    that hangs, fills or goes away costs one warning; copying goes on with the newest save once it
    is back.
    """

    def __init__(self, local: Path, durable: Path, keep: int, say=print):
        self.local, self.durable, self.keep, self.say = local, durable, keep, say
        self.writing: threading.Thread | None = None
        self.copying: threading.Thread | None = None
        self.guard = threading.Lock()  # over `waiting`, `in_copy`, and whether `copying` goes on
        self.error: Exception | None = None
        self.waiting: Path | None = None  # the newest local sentry that is not copied yet
        self.in_copy: Path | None = None
        self.copy_began = 0.0
        self.warned = False
        self.newest_step = 0
        self.durable_step: int | None = None  # newest step known to be whole in the durable folder

    def save(self, tensors: dict, texts: dict[str, str], state: dict, durable: bool) -> None:
        """Begin a save; waits only for the local write before it. The tensors must not change until
        `finish_local` was called, here or by the caller."""
        self.finish_local()
        arguments = tensors, texts, state, durable
        self.writing = threading.Thread(target=self.write, args=arguments, daemon=True)
        self.writing.start()

    def write(self, tensors: dict, texts: dict[str, str], state: dict, durable: bool) -> None:
        try:
            path = write_sentry(self.local, tensors, texts, state)
            with self.guard:
                spare = self.waiting, self.in_copy
            prune(self.local, self.keep, spare)
            if durable:
                self.hand_over(path, state["step"])
        except OSError as error:
            self.error = SentryError(
                f"{self.local}: step {state['step']} could not be saved: {error}; the sentry before"
                " it is intact: make room, then run the same command again"
            )
        except Exception as error:  # not swallowed: `check` raises it in the training thread
            self.error = error

    def hand_over(self, path: Path, step: int) -> None:
        """Leave the newest sentry for the copying thread, and say once if that thread is stuck."""
        if self.durable == self.local:
            return
        with self.guard:
            self.waiting, self.newest_step = path, step
            if self.copying is None or not self.copying.is_alive():
                self.copying = threading.Thread(target=self.copy, daemon=True)
                self.copy_began = time.monotonic()
                self.copying.start()
        waited = time.monotonic() - self.copy_began
        if waited > PATIENCE_SECONDS:
            self.warn(f"has not taken a copy for {waited:.0f} s")

    def warn(self, what: str) -> None:
        if not self.warned:
            since = "all steps" if self.durable_step is None else f"steps after {self.durable_step}"
            self.say(
                f"warning: {self.durable} {what}; {since} up to {self.newest_step} are on the local"
                " disk only. Training goes on, and copying when the folder answers again."
            )
        self.warned = True

    def copy(self) -> None:
        while True:
            with self.guard:
                self.in_copy, self.waiting = self.waiting, None
                if (path := self.in_copy) is None:
                    self.copying = None
                    return
            self.copy_began = time.monotonic()
            try:
                copy_sentry(path, self.durable)
                prune(self.durable, self.keep)
            except (OSError, ValueError) as error:
                self.warn(f"refuses: {error}")
                continue
            self.durable_step = step = int(path.name.removeprefix("step_"))
            if self.warned:
                self.say(f"{self.durable} answers again; step {step} is there, verified")
            self.warned = False

    def check(self) -> None:
        """Raise what went wrong on the local disk, once, in the training thread."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def finish_local(self) -> None:
        if self.writing is not None:
            self.writing.join()
            self.writing = None
        self.check()

    def finish(self, timeout_seconds: float = 60.0) -> None:
        """Wait for the local write, and a while for the durable copy; say what is not there."""
        self.finish_local()
        if (copying := self.copying) is not None:
            copying.join(timeout_seconds)
        if self.newest_step and self.durable_step != self.newest_step:
            held = "nothing" if self.durable_step is None else f"step {self.durable_step}"
            self.say(
                f"warning: {self.durable} holds {held}; step {self.newest_step} is in {self.local}"
                " alone: copy it by hand before this machine goes away"
            )


# ------------------------------------------------------------------------------------------------
# The run folder and its base model
# ------------------------------------------------------------------------------------------------


def run_settings(run_dir: Path) -> dict:
    """RUN_DIR/config.yaml as train.py wrote it; {} where only sentries survived."""
    import yaml

    path = run_dir / "config.yaml"
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        settings = None
    if not isinstance(settings, dict):
        raise SentryError(f"{path}: not readable; delete it, train.py writes it again")
    return settings


def saves_of(run_dir: Path) -> tuple[list[Path], dict]:
    """(folders that may hold sentries of this run, the state values that those must have)."""
    if not run_dir.is_dir():
        raise SentryError(f"{run_dir}: no such folder; give the run_dir or the sentry_dir of a run")
    settings, report = run_settings(run_dir), run_dir / "tokenizer" / "report.json"
    expected = {n: settings[n] for n in ("model_name", "model_revision") if n in settings}
    if report.is_file():
        expected["words_sha256"] = read_json(report)["new_words_sha256"]
    durable = Path(settings.get("sentry_dir") or run_dir / "sentries")
    return [run_dir / "snapshots", durable, run_dir], expected


def list_saves(run_dir: Path) -> None:
    """Print every save with step, place, size and state, and what train.py would continue from.

    Raises: SentryError where nothing can be continued.
    """
    folders, expected = saves_of(run_dir)
    rows, chosen = [("step", "folder", "MiB", "state")], None
    for step, path in sentry_folders(*folders):
        try:
            sentry = check_sentry(path, expected)
            state, chosen = "whole", chosen or sentry
            names = [n for n in ("words_sha256", "corpus_sha256") if sentry.state[n] != NOT_KNOWN]
            expected = {n: sentry.state[n] for n in names} | expected
        except SentryError as error:
            state = str(error).removeprefix(f"{path}: ")
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        rows.append((f"{step:,}", str(path.parent), f"{size / 2**20:,.1f}", state))
    width = max(len(row[1]) for row in rows)
    for step, folder, size, state in rows:
        print(f"{step:>10}  {folder:{width}}  {size:>10}  {state}")
    if chosen is None:
        raise SentryError(f"{run_dir}: nothing here can be continued")
    print(
        f"train.py would continue from {chosen.path}: step {chosen.step:,} of"
        f" {chosen.state['config']['max_steps']:,}, {chosen.state['num_new_tokens']:,} new words of"
        f" {chosen.state['model_name']}"
    )


def newest_sentry(run_dir: Path) -> Sentry:
    """The sentry that export and neighbours use: the one that train.py would continue from."""
    folders, expected = saves_of(run_dir)
    sentry, skipped = pick_sentry(folders, expected)
    for reason in skipped:
        print(f"passed over: {reason}")
    if sentry is None:
        raise SentryError(f"{run_dir}: holds no sentry; train.py has not saved there yet")
    return sentry


def new_words(run_dir: Path) -> tuple[dict, list[str], list[list[int]]]:
    """(report.json, the new words in order of their ids, the base ids that spelled each).

    The base tokenizer is the extended one without what extend_tokenizer.py put in.
    """
    from tokenizers import Tokenizer

    folder = run_dir / "tokenizer"
    if not (folder / "report.json").is_file():
        raise SentryError(
            f"{folder}: missing; python extend_tokenizer.py CONFIG run_dir={run_dir} makes it again"
        )
    report, spec = read_json(folder / "report.json"), read_json(folder / "tokenizer.json")
    first, vocab = report["base_size"], spec["model"]["vocab"]
    if report["matching"] == "whole_word":
        contents = sorted((text for text, i in vocab.items() if i >= first), key=vocab.get)
        spec["model"]["vocab"] = {text: i for text, i in vocab.items() if i < first}
    else:
        contents = [token["content"] for token in spec["added_tokens"] if token["id"] >= first]
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < first]
    base = Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    if report["matching"] == "whole_word":
        spellings = [[token.id for token in base.model.tokenize(text)] for text in contents]
    else:
        spellings = [e.ids for e in base.encode_batch(contents, add_special_tokens=False)]
    words = [text.removeprefix(" ").removeprefix("\u2581") for text in contents]
    digest = hashlib.sha256("\n".join([str(first), *words]).encode()).hexdigest()
    if digest != report["new_words_sha256"]:  # made as extend_tokenizer.py makes it
        raise SentryError(f"{folder}: tokenizer.json does not hold report.json's words")
    return report, words, spellings


def base_file(settings: dict, name: str) -> Path | None:
    """A file of the base model, in its local folder or from the hub's cache; None: it has none."""
    folder = Path(settings["model_name"]).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(str(folder), name, revision=settings["model_revision"]))
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError):
        raise SentryError(
            f"model {folder}: neither a local folder nor found on the hub; --base names its folder"
        ) from None


@dataclasses.dataclass(frozen=True)
class BaseTables:
    """The base model's files, and its tables by tensor name; head None: it has none of its own."""

    settings: dict
    config: dict
    weight_map: dict[str, str]
    embedding: str
    head: str | None
    tied: bool

    def shard(self, file: str) -> dict[str, StoredTensor]:
        path = base_file(self.settings, file)
        if path is None:
            raise SentryError(f"{self.settings['model_name']}: {file} is missing")
        return stored_tensors(path)

    def table(self, name: str) -> StoredTensor:
        return self.shard(self.weight_map[name])[name]


def base_tables(settings: dict) -> BaseTables:
    """Read the base model's config.json and the names in its safetensors files; no weights."""
    names = ("config.json", "model.safetensors", "model.safetensors.index.json")
    config, single, index = (base_file(settings, name) for name in names)
    if config is None or not (single or index):
        raise SentryError(
            f"model {settings['model_name']}: no config.json or no model.safetensors there"
            " (--base names another folder)"
        )
    config = read_json(config)
    if single:
        weight_map = dict.fromkeys(stored_tensors(single), names[1])
    else:
        weight_map = read_json(index)["weight_map"]
    found = [
        [name for name in weight_map if re.search(rf"(^|\.)({pattern})\.weight$", name)]
        for pattern in ("embed_tokens|wte|embed_in", "lm_head|embed_out")
    ]
    if len(found[0]) != 1 or len(found[1]) > 1:
        raise SentryError(f"model {settings['model_name']}: no one embedding and head: {found}")
    tie = {**config, **config.get("text_config", {})}.get("tie_word_embeddings", False)
    head = found[1][0] if found[1] else None
    return BaseTables(settings, config, weight_map, found[0][0], head, tie or head is None)


def starting_rows(
    table: StoredTensor, spellings: list[list[int]], first_new_id: int, settings: dict
) -> numpy.ndarray:
    """The rows, (len(spellings), hidden) fp32, that the first new words had at step 0, as
    overlay.py makes them: means of sub-token rows, or directions drawn from the seed.

    Memory: the rows, and ROWS_AT_ONCE rows of the table.
    """
    count, width = len(spellings), table.shape[1]
    if settings["init"] == "spherical":
        import torch

        total = squares = 0.0
        for _, block in row_blocks(table, first_new_id):
            total += block.sum(dtype="f8")
            squares += numpy.square(block, dtype="f8").sum()
        size = first_new_id * width
        norm = math.sqrt((squares - total * total / size) / (size - 1) * width)
        generator = torch.Generator().manual_seed(settings["seed"])
        rows = torch.randn(count, width, generator=generator)
        return rows.mul_(settings["init_radius"] * norm / rows.norm(dim=1, keepdim=True)).numpy()
    if settings["init"] != "subtoken_mean":
        raise SentryError(f"init {settings['init']!r}: recover.py cannot make these rows again")
    rows = numpy.zeros((count, width), "f4")
    lengths = numpy.array([len(ids) for ids in spellings])
    words, ids = numpy.repeat(numpy.arange(count), lengths), numpy.concatenate(spellings)
    for start, block in row_blocks(table, first_new_id):
        here = (ids >= start) & (ids < start + len(block))
        numpy.add.at(rows, words[here], block[ids[here] - start])
    return rows / lengths[:, None].astype("f4")


# ------------------------------------------------------------------------------------------------
# Export
# ------------------------------------------------------------------------------------------------

LOADING = {
    "rows": """`rows.safetensors` holds `input_rows`, and `output_rows` where the head has its own,
fp32, row i for the i-th line of `words.txt`; `rows.json` names model, words and ids.""",
    "merged": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")
```""",
    "peft": """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = AutoModelForCausalLM.from_pretrained("{model}", dtype="auto"){untie}
model.resize_token_embeddings({size}, mean_resizing=False)
model = PeftModel.from_pretrained(model, "THIS_FOLDER")
```

The base's table has {table_rows:,} rows, {padding} of them padding. It must be resized to {size:,}
before the adapter is put on, even where that makes it smaller: the new ids begin in the padding.
{tied}""",
}
UNTIE = """
import torch
model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
model.config.tie_word_embeddings = False  # the new words have output rows of their own"""
# What an export may have left in a folder that --force writes into; a loader would mix them up.
STALE = ("model*.safetensors*", "adapter_*", "rows.*", "config.json", "generation_config.json")


def export(run_dir: Path, out: Path, form: str, force: bool, base: str | None) -> None:
    """Write what was learnt to OUT with a model card, aside first and then file by file in place.

    Raises: SentryError where OUT holds files and not `force`.
    """
    out, sentry = out.resolve(), newest_sentry(run_dir)
    settings = sentry.state["config"] | ({"model_name": base} if base else {})
    if out.is_dir() and any(out.iterdir()) and not force:
        raise SentryError(f"{out}: holds files; give another folder, or --force to write over them")
    if out in (run_dir.resolve(), Path(settings["model_name"]).resolve()):
        raise SentryError(f"{out}: is the run or the base model itself; give another folder")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        if form == "rows":
            facts = export_rows(sentry, part)
        else:
            new_words(run_dir)  # proves the tokenizer whole
            own = shutil.ignore_patterns("report.json")  # has paths of this machine
            shutil.copytree(run_dir / "tokenizer", part, ignore=own, dirs_exist_ok=True)
            write = {"merged": export_merged, "peft": export_peft}[form]
            facts = write(sentry, base_tables(settings), part)
        shutil.copy(sentry.path / "words.txt", part)
        card = model_card(sentry, settings, LOADING[form].format(**facts), form)
        (part / "README.md").write_text(card, encoding="utf-8")
        out.mkdir(parents=True, exist_ok=True)
        for stale in (path for pattern in STALE for path in out.glob(pattern)):
            stale.unlink()
        for path in part.iterdir():
            path.replace(out / path.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"step {sentry.step:,} as {form}: {out}")


def trained_rows(sentry: Sentry) -> dict[str, numpy.ndarray]:
    tensors = read_tensors(sentry.path / "rows.safetensors")
    return {name: tensors[name] for name in ("input_rows", "output_rows") if name in tensors}


def export_rows(sentry: Sentry, part: Path) -> dict:
    """rows.safetensors, and rows.json with model, step, and the id of every word."""
    write_tensors(part / "rows.safetensors", trained_rows(sentry))
    words = (sentry.path / "words.txt").read_text(encoding="utf-8").split()
    names = ("model_name", "model_revision", "step", "first_new_id", "num_new_tokens")
    facts = {name: sentry.state[name] for name in names}
    facts["words"] = {word: i for i, word in enumerate(words, facts["first_new_id"])}
    (part / "rows.json").write_text(as_json_text(facts), encoding="utf-8")
    return {}


def export_peft(sentry: Sentry, base: BaseTables, part: Path) -> dict:
    """An adapter of PEFT's type TRAINABLE_TOKENS: the tensors hold the rows themselves.

    Source: peft 0.21, tuners/trainable_tokens
    """
    rows, first = trained_rows(sentry), sentry.state["first_new_id"]
    separate, size = "output_rows" in rows, first + sentry.state["num_new_tokens"]
    modules = {base.embedding.removesuffix(".weight"): rows["input_rows"]}
    if separate or not base.tied:
        head = (base.head or "lm_head.weight").removesuffix(".weight")
        modules[head] = rows.get("output_rows", rows["input_rows"])
    tensors = {f"base_model.model.{n}.trainable_tokens_delta": r for n, r in modules.items()}
    write_tensors(part / "adapter_model.safetensors", tensors)
    settings = {
        "peft_type": "TRAINABLE_TOKENS", "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": sentry.state["model_name"],
        "revision": sentry.state["model_revision"], "init_weights": True,
        "target_modules": [name.rpartition(".")[2] for name in modules],
        "token_indices": list(range(first, size)),
    }  # fmt: skip
    (part / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    table_rows = base.table(base.embedding).shape[0]
    tied = "PEFT warns of a missing lm_head key: the head is tied and takes the same rows."
    return {
        "model": sentry.state["model_name"], "size": size, "table_rows": table_rows,
        "padding": table_rows - first, "untie": UNTIE if base.tied and separate else "",
        "tied": tied if len(modules) == 1 else "",
    }  # fmt: skip


def export_merged(sentry: Sentry, base: BaseTables, part: Path) -> dict:
    """An ordinary checkpoint: the base's files byte by byte, embedding and head with the new rows.

    Rows below first_new_id stay bitwise what they were, new rows are cast to the table's dtype, the
    base's padding rows go. A tied head whose output rows are separate becomes a tensor of its own.
    Memory: chunks and ROWS_AT_ONCE rows; Qwen2.5-14B's tables (1,485 -> 1,913 MiB each): 496 MiB
            at the peak, 45 s (tests/measure_merge.py --hidden 5120, 2 CPU cores, 2026-11-22)
    """
    rows, first = stored_tensors(sentry.path / "rows.safetensors"), sentry.state["first_new_id"]
    size, table = first + sentry.state["num_new_tokens"], base.table(base.embedding)
    tied = base.tied and "output_rows" not in rows
    if table.shape[0] < first or table.dtype not in FLOAT_TYPES:
        raise SentryError(f"{table.path}: {base.embedding} is {table.dtype} {table.shape}")
    changed, weight_map = {base.embedding: (table, rows["input_rows"])}, dict(base.weight_map)
    if base.head or not tied:
        head = base.head or "lm_head.weight"
        weight_map.setdefault(head, weight_map[base.embedding])
        head_table = table if base.tied else base.table(head)
        changed[head] = (head_table, rows.get("output_rows", rows["input_rows"]))
    total = 0
    for file in sorted(set(weight_map.values())):
        stored, names = base.shard(file), [n for n in weight_map if weight_map[n] == file]
        plan = {name: changed.get(name) or (stored[name], None) for name in names}
        total += write_merged_file(plan, first, part / file)
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (part / "model.safetensors.index.json").write_text(as_json_text(index), encoding="utf-8")
    for config in (base.config, base.config.get("text_config")):
        if config is not None and "vocab_size" in config:
            config |= {"vocab_size": size, "tie_word_embeddings": tied}
    (part / "config.json").write_text(as_json_text(base.config), encoding="utf-8")
    if generation := base_file(base.settings, "generation_config.json"):
        shutil.copy(generation, part)
    return {}


def write_merged_file(
    plan: dict[str, tuple[StoredTensor, StoredTensor | None]], first_new_id: int, target: Path
) -> int:
    """One file of the merged model, plan: name -> (base tensor, new rows or None); bytes of all."""
    entries = {}
    for name, (tensor, new) in plan.items():
        num_rows = first_new_id + new.shape[0] if new else tensor.shape[0]
        size = tensor.size // tensor.shape[0] * num_rows
        entries[name] = tensor.dtype, [num_rows, *tensor.shape[1:]], size
    with open(target, "wb") as writer:
        writer.write(tensor_header(entries))
        for tensor, new in plan.values():
            with open(tensor.path, "rb") as reader:
                reader.seek(tensor.offset)
                kept = first_new_id if new else tensor.shape[0]
                copy_bytes(reader, writer, tensor.size // tensor.shape[0] * kept)
            for _, block in row_blocks(new) if new else ():
                writer.write(as_stored(block, tensor.dtype))
    sync(target)
    return sum(size for _, _, size in entries.values())


def model_card(sentry: Sentry, settings: dict, loading: str, form: str) -> str:
    """README.md of an export: base, words, recipe, steps, losses, licence, loading."""
    state, last = sentry.state, None
    words = (sentry.path / "words.txt").read_text(encoding="utf-8").split()
    table, result = ["| Step | Val, nats/token | Val, bits/byte |", "|---|---|---|"], ""
    for line in (sentry.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        if (record := json.loads(line))["kind"] == "eval":
            last, bits = record, record["val_bits_per_byte"]
            table.append(f"| {record['step']} | {record['val_loss']:.4f} | {bits:.3f} |")
    if last:
        result = (
            f" Held-out text: {last['val_bits_per_byte']:.3f} bits per byte at step {last['step']};"
            f" the base model without the words: {last['base_bits_per_byte']:.3f}."
        )
    keys = (
        "init", "output_rows", "token_matching", "seq_len", "effective_batch_size", "learning_rate",
        "warmup_ratio", "max_steps", "quantization", "seed",
    )  # fmt: skip
    recipe = ", ".join(f"{key} {settings[key]}" for key in keys)
    first, num, name = state["first_new_id"], state["num_new_tokens"], state["model_name"]
    licence, library = base_licence(settings), form.replace("merged", "transformers")
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    front = (f"base_model: {name}\n" if on_hub else "") + f"library_name: {library}\n"
    return "\n".join([
        f"---\n{front}license: {licence or 'other'}\ntags: [wake2vec]\n---",
        f"# {num:,} new words for {name}\n",
        f"Base model: {name}, revision {state['model_revision'] or 'default'}, its weights frozen.",
        f"Licence of the base model: {licence or 'see the base model'}.",
        f"New words: ids {first:,} to {first + num - 1:,}, in order in words.txt"
        f" ({', '.join(words[:8])} ...).",
        f"Recipe: {recipe}.",
        f"Trained for {sentry.step:,} steps.{result}\n",
        *(table if last else []),
        f"\n## Loading\n\n{loading}\n",
    ])  # fmt: skip


def base_licence(settings: dict) -> str | None:
    """The licence that the base model's own card names."""
    try:
        card = base_file(settings, "README.md")
    except SentryError:  # only the rows survived, the base model is not at hand
        return None
    text = card.read_text(encoding="utf-8") if card else ""
    found = re.match(r"---\n(?:.*\n)*?license: *(.+)\n(?:.*\n)*?---", text)
    return found[1].strip("\"' ") if found else None


# ------------------------------------------------------------------------------------------------
# Neighbours
# ------------------------------------------------------------------------------------------------


def directions(rows: numpy.ndarray) -> numpy.ndarray:
    return rows / numpy.linalg.norm(rows, axis=1, keepdims=True).clip(1e-30)


def print_moves(
    words: list[str],
    base_norms: numpy.ndarray,
    before: numpy.ndarray,
    after: numpy.ndarray,
    moved: numpy.ndarray,
) -> None:
    """Norms of base and new rows side by side, and the words in `moved` with how far they went."""
    norms = {"base tokens": base_norms}
    norms |= {"new words, before": numpy.linalg.norm(before, axis=1)}
    norms |= {"new words, after": numpy.linalg.norm(after, axis=1)}
    print(f"{'norms of input rows':24} {'mean':>8} {'std':>8}")
    for label, values in norms.items():
        print(f"{label:24} {values.mean():8.3f} {values.std():8.3f}")
    print(f"\n{'most moved':24} {'by':>8} {'cosine of before and after':>28}")
    cosines = (directions(before[moved]) * directions(after[moved])).sum(axis=1)
    for i, cosine in zip(moved, cosines):
        print(f"{words[i]:24} {numpy.linalg.norm(after[i] - before[i]):8.3f} {cosine:28.3f}")


def neighbours(run_dir: Path, asked: list[str], num: int, base: str | None) -> None:
    """Print what stands nearest to each word (default: the five that moved most) by the cosine of
    input rows, among base tokens and new words, before and after training; and norms, and moves."""
    from tokenizers import Tokenizer

    sentry = newest_sentry(run_dir)
    settings = sentry.state["config"] | ({"model_name": base} if base else {})
    report, words, spellings = new_words(run_dir)
    if unknown := [word for word in asked if word not in words]:
        raise SentryError(*(f"{word!r}: no new word of {run_dir}" for word in unknown))
    first, tables = report["base_size"], base_tables(settings)
    table = tables.table(tables.embedding)
    tokenizer = Tokenizer.from_file(str(run_dir / "tokenizer" / "tokenizer.json"))
    before = starting_rows(table, spellings, first, settings)
    after = trained_rows(sentry)["input_rows"]
    moves = numpy.linalg.norm(after - before, axis=1)
    moved = moves.argsort()[::-1][:num]
    places = [words.index(word) for word in asked] or moved[:5].tolist()
    queries = directions(numpy.concatenate([before[places], after[places]]))
    norms, near_base = [], []
    for _, block in row_blocks(table, first):
        norms.append(numpy.linalg.norm(block, axis=1))
        near_base.append(directions(block) @ queries.T)
    near_base = numpy.concatenate(near_base)
    print(f"step {sentry.step:,}\n")
    print_moves(words, numpy.concatenate(norms), before, after, moved)
    pairs = [(n, rows) for n in range(len(places)) for rows in (before, after)]
    for n, rows in pairs:
        column, when = (n, "before") if rows is before else (n + len(places), "after")
        place, near_new = places[n], directions(rows) @ queries[column]
        near_new[place] = -2.0
        print(f"\n{words[place]}, {when}")
        tokens = near_base[:, column].argsort()[::-1][:num]
        shown = (f"{tokenizer.decode([i])!r} {near_base[i, column]:.2f}" for i in tokens)
        print(f"  base tokens  {'  '.join(shown)}")
        shown = (f"{words[i]} {near_new[i]:.2f}" for i in near_new.argsort()[::-1][:num])
        print(f"  new words    {'  '.join(shown)}")


# ------------------------------------------------------------------------------------------------
# Import
# ------------------------------------------------------------------------------------------------


def import_seed(seed_file: Path, run_dir: Path, base: str | None) -> None:
    """Make a sentry in RUN_DIR/snapshots of a file of the original notebooks.

    They trained input rows alone, from id wake_start on. Those before it, and all output rows where
    the config keeps them apart (separate, frozen), get the configured initialisation. The step
    stays, and with it learning rate and data order; the optimizer begins anew, optimizer_step 0.
    """
    settings = run_settings(run_dir)
    if not settings:
        raise SentryError(f"{run_dir / 'config.yaml'}: missing; extend_tokenizer.py writes it")
    rows, step, start = read_seed(seed_file)
    report, words, spellings = new_words(run_dir)
    tables = base_tables(settings | ({"model_name": base} if base else {}))
    first = report["base_size"]
    table = tables.table(tables.embedding)
    wanted = (first + len(words) - start, table.shape[1])
    if start < first or rows.shape != wanted:
        raise SentryError(
            f"{seed_file}: {len(rows):,} rows of {rows.shape[1]:,} from id {start:,} on; this run's"
            f" new ids are {first:,} to {report['total'] - 1:,}, its rows {table.shape[1]:,} wide"
        )
    if any(saved >= step for saved, _ in sentry_folders(*saves_of(run_dir)[0])):
        raise SentryError(f"{run_dir}: has a save of step {step:,} or later; give a new run_dir")
    before = starting_rows(table, spellings[: start - first], first, settings)
    tensors = {"input_rows": numpy.concatenate([before, rows])}
    tensors |= untrained_tensors(tables, spellings, first, settings)
    state = {
        "step": step, "model_name": settings["model_name"],
        "model_revision": settings["model_revision"], "words_sha256": report["new_words_sha256"],
        "corpus_sha256": NOT_KNOWN, "first_new_id": first, "num_new_tokens": len(words),
        "sequences_seen": step * settings["effective_batch_size"], "optimizer_step": 0,
        "random_state": {}, "loss_scale": {"value": 65536.0, "good_steps": 0},
        "best_val_loss": math.inf, "base_bits_per_byte": None, "config": settings, "versions": {},
        "imported_from": seed_file.name,
    }  # fmt: skip
    texts = {"metrics.jsonl": "", "samples.md": "", "words.txt": "\n".join(words) + "\n"}
    path = write_sentry(run_dir / "snapshots", tensors, texts, state)
    print(f"{len(rows):,} rows of step {step:,} and {len(before):,} new ones: {path}")


def untrained_tensors(
    tables: BaseTables, spellings: list[list[int]], first_new_id: int, settings: dict
) -> dict[str, numpy.ndarray]:
    """What train.py saves beside input_rows, as it is at step 0: output rows, Adafactor's zeros."""
    tensors, mode = {}, settings["output_rows"]
    mode = ("shared" if tables.tied else "separate") if mode == "auto" else mode
    table = tables.table(tables.embedding if tables.tied else tables.head)
    if mode != "shared":
        tensors["output_rows"] = starting_rows(table, spellings, first_new_id, settings)
    for name in ("input_rows", "output_rows") if mode == "separate" else ("input_rows",):
        tensors[f"{name}.row_mean_square"] = numpy.zeros(len(spellings), "f4")
        tensors[f"{name}.column_mean_square"] = numpy.zeros(table.shape[1], "f4")
    return tensors


def read_seed(seed_file: Path) -> tuple[numpy.ndarray, int, int]:
    """(rows in fp32, step, id of the first row); only tensors and numbers are unpickled."""
    from pickle import UnpicklingError

    import torch

    try:
        seed = torch.load(seed_file, map_location="cpu", weights_only=True)
        rows = seed["embeddings"].float().numpy()
        step, start, count = (int(seed[name]) for name in ("step", "wake_start", "num_wake"))
    except (UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError,
            AttributeError) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:150]
        raise SentryError(
            f"{seed_file}: no sentry of the original notebooks, which hold 'embeddings', 'step',"
            f" 'wake_start' and 'num_wake' ({type(error).__name__}: {reason})"
        ) from None
    if rows.ndim != 2 or len(rows) != count or step < 0:
        raise SentryError(f"{seed_file}: {rows.shape} rows, num_wake {count}, step {step}")
    if not numpy.isfinite(rows).all():
        raise SentryError(f"{seed_file}: 'embeddings' holds NaN or infinity")
    return rows, step, start


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def recover_arguments(argv: list[str]) -> argparse.Namespace:
    """What follows the command; RUN_DIR alone lists it."""
    shapes = {
        "list": "RUN_DIR",
        "export": "export RUN_DIR OUT --format rows|peft|merged [--force] [--base FOLDER]",
        "neighbours": "neighbours RUN_DIR [word ...] [--num 10] [--base FOLDER]",
        "import": "import SEED_FILE.pt RUN_DIR [--base FOLDER]",
    }
    command, rest = (argv[0], argv[1:]) if argv and argv[0] in shapes else ("list", argv)
    parser = argparse.ArgumentParser(
        usage="\n       ".join(f"%(prog)s {shape}" for shape in shapes.values()),
        description="example:\n  python recover.py runs/sample\n\n" + __doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    if command == "import":
        parser.add_argument("seed_file", type=Path, metavar="SEED_FILE.pt")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    if command == "export":
        parser.add_argument("out", type=Path, metavar="OUT")
        parser.add_argument("--format", choices=("rows", "peft", "merged"), required=True)
        parser.add_argument(
            "--force", action="store_true", help="write into OUT though it has files"
        )
    if command == "neighbours":
        parser.add_argument("words", nargs="*", metavar="word", help="default: the five most moved")
        parser.add_argument("--num", type=int, default=10, help="neighbours of each kind (10)")
    if command != "list":
        parser.add_argument("--base", help="folder of the base model, where it moved")
    return parser.parse_intermixed_args(rest)


def main(*argv: str) -> None:
    """Run one command. Raises: SentryError, OSError (a full disk); the guard prints them."""
    a = recover_arguments(list(argv))
    if a.command == "list":
        list_saves(a.run_dir)
    elif a.command == "export":
        export(a.run_dir, a.out, a.format, a.force, a.base)
    elif a.command == "neighbours":
        neighbours(a.run_dir, a.words, a.num, a.base)
    else:
        import_seed(a.seed_file, a.run_dir, a.base)


if __name__ == "__main__" and "__file__" in globals():
    try:
        main(*sys.argv[1:])
    except (SentryError, OSError) as error:
        sys.exit(str(error))
