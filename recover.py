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
import contextlib
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
from concurrent.futures import Future
from concurrent.futures.thread import ThreadPoolExecutor
from pathlib import Path

import numpy
import yaml
from safetensors.numpy import load_file as read_tensors
from tokenizers import Tokenizer

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


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file; offset and size in bytes."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    def first_rows(self, num_rows: int) -> "StoredTensor":
        shape, size = (num_rows, *self.shape[1:]), self.size // self.shape[0] * num_rows
        return dataclasses.replace(self, shape=shape, size=size)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file in the order of their bytes. Raises: SentryError."""
    found = {}
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, path.stat().st_size)))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            place = 8 + length + begin, end - begin
            found[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), *place)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SentryError(f"{path}: not a safetensors file") from None
    return dict(sorted(found.items(), key=lambda item: item[1].offset))


def row_blocks(tensor: StoredTensor) -> Iterator[numpy.ndarray]:
    """The rows of a tensor in fp32, ROWS_AT_ONCE each."""
    num_rows, width = tensor.shape[0], math.prod(tensor.shape[1:])
    for start in range(0, num_rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, num_rows - start)
        offset = tensor.offset + start * (tensor.size // num_rows)
        block = numpy.fromfile(tensor.path, FLOAT_TYPES[tensor.dtype], count * width, offset=offset)
        if tensor.dtype == "BF16":
            block = (block.astype("<u4") << 16).view("<f4")
        yield block.astype("<f4", copy=False).reshape(count, width)


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
    entries = {n: (names[str(a.dtype)], a.shape, a.nbytes) for n, a in tensors.items()}
    with open(path, "wb") as file:
        file.write(tensor_header(entries))
        for array in tensors.values():
            file.write(numpy.ascontiguousarray(array))


# ---- Sentries ------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_sentry(target: Path, state: dict) -> Iterator[Path]:
    """A folder to fill; then it is renamed to target and gets its marker last, each step synced.

    A target that is there can only be damaged, or what a kill left, so it goes first. What fails
    gives a full disk its space back.
    """
    part, step = target.with_name(f".{target.name}.part"), state["step"]
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for path in (*part.iterdir(), part):
            sync(path)
        fault_point("before_rename", step)
        if target.exists():
            (target / MARKER).unlink(missing_ok=True)  # from here on it is no sentry
            shutil.rmtree(target)
        part.rename(target)
        fault_point("before_marker", step)
        marker = target / (MARKER + ".part")
        write_json(marker, state)
        sync(marker)
        marker.rename(target / MARKER)
        sync(target)
        sync(target.parent)
        fault_point("after_marker", step)
    except (OSError, SentryError):
        for folder in (part, target):
            if not (folder / MARKER).exists():
                shutil.rmtree(folder, ignore_errors=True)
        raise


def write_sentry(folder: Path, tensors: dict, texts: dict[str, str], state: dict) -> Path:
    """Write folder/step_NNNNNN/: name -> numpy array, file name -> text; state gets 'files'.
    Raises: OSError (disk full, read-only); the sentries before it are untouched."""
    target = folder / f"step_{state['step']:06d}"
    with new_sentry(target, state) as part:
        write_tensors(part / "rows.safetensors", tensors)
        fault_point("rows_written", state["step"])
        for name, text in texts.items():
            (part / name).write_text(text, encoding="utf-8")
        state["files"] = {path.name: file_record(path) for path in sorted(part.iterdir())}
    return target


def copy_sentry(source: Path, folder: Path) -> Path:
    """Copy a sentry, each file read back and compared; one that is there and whole stays as it is.
    Raises: OSError where that folder fails; SentryError where it hands back other bytes."""
    state, target = read_json(source / MARKER), folder / source.name
    with contextlib.suppress(SentryError):
        return check_sentry(target, state).path
    with new_sentry(target, state) as part:
        for name, record in state["files"].items():
            with open(source / name, "rb") as reader, open(part / name, "wb") as writer:
                copy_bytes(reader, writer, record["size"])
            sync(part / name)
            fault_point("copied", state["step"])
            if file_record(part / name) != record:
                raise SentryError(f"{part / name}: read back other bytes than were written")
        fault_point("verified", state["step"])
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
    a newer one is whole. Without a marker, or .part, they are leavings of a kill and go too."""
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
            key = name.replace("words_sha256", "lexicon's words").replace("_sha256", "")
            raise SentryError(f"{path}: other {key} ({state.get(name)!r} instead of {wanted!r})")
    try:
        for name, (size, sha256) in records.items():
            if not (path / name).is_file():
                raise SentryError(f"{path}: {name} is missing")
            if (found := (path / name).stat().st_size) != size:  # told without reading it
                raise SentryError(f"{path}: {name} is {found:,} bytes instead of {size:,}")
            if file_record(path / name)["sha256"] != sha256:
                raise SentryError(f"{path}: {name} does not have the SHA-256 that {MARKER} says")
        for name, tensor in stored_tensors(path / "rows.safetensors").items():
            blocks = row_blocks(tensor) if tensor.dtype in FLOAT_TYPES else ()
            if not all(numpy.isfinite(rows).all() for rows in blocks):
                raise SentryError(f"{path}: {name} holds NaN or infinity")
    except OSError as error:
        raise SentryError(f"{path}: cannot be read: {error.strerror}") from None
    return Sentry(path, step, state)


def pick_sentry(
    folders: list[Path], expected: dict, step: int | None = None
) -> tuple[Sentry | None, list[str]]:
    """The newest whole sentry across folders, by integer step, and why newer ones were passed over;
    None only where nothing is named like a sentry. `step` asks for that one alone.

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
        advice = "nothing here can be continued: put back what differs, give another run_dir, or"
        advice += " start over with --fresh, which keeps this aside"
        raise SentryError(*skipped, advice)
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
    durable folder. A failure of the local disk reaches the training loop at its next `check`. A
    durable folder that hangs, fills or goes away costs one warning; once it is back, copying goes
    on with the newest save."""

    def __init__(self, local: Path, durable: Path, keep: int, say=print):
        self.local, self.durable, self.keep, self.say = local, durable, keep, say
        self.writing: Future | None = None
        self.copying: threading.Thread | None = None
        self.guard = threading.Lock()  # over `waiting`, `in_copy`, and whether `copying` goes on
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
        pool = ThreadPoolExecutor(1)
        self.writing = pool.submit(self.write, tensors, texts, state, durable)
        pool.shutdown(wait=False)  # its thread ends with this save

    def write(self, tensors: dict, texts: dict[str, str], state: dict, durable: bool) -> None:
        try:
            path = write_sentry(self.local, tensors, texts, state)
            with self.guard:
                spare = self.waiting, self.in_copy
            prune(self.local, self.keep, spare)
        except OSError as error:
            raise SentryError(
                f"{self.local}: step {state['step']} could not be saved: {error}; the sentry before"
                " it is intact: make room, then run the same command again"
            ) from error
        if durable:
            self.hand_over(path, state["step"])

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
        if self.writing and self.writing.done():
            self.finish_local()

    def finish_local(self) -> None:
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def finish(self, timeout_seconds: float = 60.0) -> None:
        """Wait for the local write, and a while for the durable copy; say what is not there."""
        self.finish_local()
        if copying := self.copying:
            copying.join(timeout_seconds)
        with self.guard:
            spare = self.waiting, self.in_copy
        with contextlib.suppress(OSError, SentryError):  # too many saves are no loss
            prune(self.local, self.keep, spare)  # of those that a copy held back until now
        if self.newest_step and self.durable_step != self.newest_step:
            held = "nothing" if self.durable_step is None else f"step {self.durable_step}"
            self.say(
                f"warning: {self.durable} holds {held}; step {self.newest_step} is in {self.local}"
                " alone: copy it by hand before this machine goes away"
            )


# ---- The run folder and its base model -----------------------------------------------------------


def run_settings(run_dir: Path) -> dict:
    """RUN_DIR/config.yaml as train.py wrote it; {} where only sentries survived."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError:  # of bytes that are not UTF-8 too
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
        expected["words_sha256"] = tokenizer_file(report.parent, "report.json")["new_words_sha256"]
    durable = Path(settings.get("sentry_dir") or run_dir / "sentries")
    return [run_dir / "snapshots", durable, run_dir], expected


def list_saves(run_dir: Path) -> None:
    """Print every save, and what train.py would continue from. Raises: SentryError: from none."""
    folders, expected = saves_of(run_dir)
    width, chosen = max(len(str(folder)) for folder in folders), None
    print(f"{'step':>10}  {'folder':{width}}  {'MiB':>10}  state")
    for step, path in sentry_folders(*folders):
        try:
            sentry = check_sentry(path, expected)
            found, chosen = "whole", chosen or sentry
            names = [n for n in ("words_sha256", "corpus_sha256") if sentry.state[n] != NOT_KNOWN]
            expected = {n: sentry.state[n] for n in names} | expected
        except SentryError as error:
            found = str(error).removeprefix(f"{path}: ")
        mib = sum(file.stat().st_size for file in path.iterdir() if file.is_file()) / 2**20
        print(f"{step:10,}  {path.parent!s:{width}}  {mib:10,.1f}  {found}")
    if chosen is None:
        raise SentryError(f"{run_dir}: nothing here can be continued")
    print(
        f"train.py would continue from {chosen.path}: step {chosen.step:,} of"
        f" {chosen.state['config']['max_steps']:,}, {chosen.state['num_new_tokens']:,} new words of"
        f" {chosen.state['model_name']}"
    )


def newest_sentry(run_dir: Path) -> Sentry:
    """The sentry that export and neighbours use: the one that train.py would continue from."""
    sentry, skipped = pick_sentry(*saves_of(run_dir))
    for reason in skipped:
        print(f"passed over: {reason}")
    if sentry is None:
        raise SentryError(f"{run_dir}: holds no sentry; train.py has not saved there yet")
    return sentry


def tokenizer_file(folder: Path, name: str) -> dict:
    try:
        return read_json(folder / name)
    except (OSError, ValueError):
        what, run_dir = "damaged" if (folder / name).is_file() else "missing", folder.parent
        raise SentryError(
            f"{folder}: {name} is {what}; python extend_tokenizer.py CONFIG run_dir={run_dir} makes"
            " it again"
        ) from None


def new_words(run_dir: Path) -> tuple[dict, list[str], list[list[int]]]:
    """(report.json, the new words in order of their ids, the base ids that spelled each): the base
    tokenizer is the extended one without what extend_tokenizer.py put in."""
    folder = run_dir / "tokenizer"
    report, spec = (tokenizer_file(folder, name) for name in ("report.json", "tokenizer.json"))
    first, vocab, added = report["base_size"], spec["model"]["vocab"], spec["added_tokens"]
    spec["added_tokens"] = [token for token in added if token["id"] < first]
    if report["matching"] == "whole_word":
        contents = sorted((text for text, i in vocab.items() if i >= first), key=vocab.get)
        spec["model"]["vocab"] = {text: i for text, i in vocab.items() if i < first}
        model = Tokenizer.from_str(json.dumps(spec, ensure_ascii=False)).model
        spellings = [[token.id for token in model.tokenize(text)] for text in contents]
    else:
        contents = [token["content"] for token in added if token["id"] >= first]
        base = Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
        spellings = [e.ids for e in base.encode_batch(contents, add_special_tokens=False)]
    words = [text.removeprefix(" ").removeprefix("\u2581") for text in contents]
    digest = hashlib.sha256("\n".join([str(first), *words]).encode()).hexdigest()
    if digest != report["new_words_sha256"]:  # made as extend_tokenizer.py makes it
        raise SentryError(f"{folder}: tokenizer.json does not hold report.json's words")
    return report, words, spellings


def base_file(settings: dict, name: str) -> Path:
    """A file of the base model, in its local folder or from the hub; it may not exist."""
    folder = Path(settings["model_name"]).expanduser()
    if not folder.is_dir():
        from huggingface_hub import errors, snapshot_download

        try:
            revision = settings["model_revision"]
            folder = Path(snapshot_download(str(folder), revision=revision, allow_patterns=[name]))
        except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError):
            raise SentryError(
                f"model {folder}: neither a local folder nor on the hub; --base names its folder"
            ) from None
    return folder / name


def base_tensors(path: Path) -> dict[str, StoredTensor]:
    """stored_tensors of a file of the base model. Raises: SentryError, also where it is missing."""
    if not path.is_file():
        raise SentryError(f"{path}: missing; --base names another model folder")
    return stored_tensors(path)


@dataclasses.dataclass(frozen=True)
class BaseTables:
    """Which file holds which of the base model's tensors; head None: it has none of its own."""

    settings: dict
    weight_map: dict[str, str]
    embedding: str
    head: str | None
    tied: bool

    def table(self, name: str, num_rows: int) -> StoredTensor:
        """The first rows of a table, without its padding."""
        table = base_tensors(base_file(self.settings, self.weight_map[name]))[name]
        if table.shape[0] < num_rows or table.dtype not in FLOAT_TYPES:
            raise SentryError(f"{table.path}: {name} is {table.dtype} {table.shape}")
        return table.first_rows(num_rows)


def base_tables(settings: dict) -> BaseTables:
    """Read the base model's config.json and the names in its safetensors files; no weights."""
    index = base_file(settings, "model.safetensors.index.json")
    single = base_file(settings, "model.safetensors")
    if index.is_file() and not single.is_file():
        weight_map = read_json(index)["weight_map"]
    else:
        weight_map = dict.fromkeys(base_tensors(single), single.name)
    found = [
        [name for name in weight_map if re.search(rf"(^|\.)({pattern})\.weight$", name)]
        for pattern in ("embed_tokens|wte|embed_in", "lm_head|embed_out")
    ]
    if len(found[0]) != 1 or len(found[1]) > 1:
        raise SentryError(f"model {settings['model_name']}: no one embedding and head: {found}")
    config = read_json(base_file(settings, "config.json"))
    head = found[1][0] if found[1] else None
    tied = (config | config.get("text_config", {})).get("tie_word_embeddings", False)
    return BaseTables(settings, weight_map, found[0][0], head, tied or head is None)


def starting_rows(table: StoredTensor, spellings: list[list[int]], settings: dict) -> numpy.ndarray:
    """The rows, (len(spellings), hidden) fp32, that new words had at step 0, as overlay.py makes
    them: means of sub-token rows, or directions drawn from the seed; table: without padding.

    Memory: the rows, and ROWS_AT_ONCE rows of the table.
    """
    count, width = len(spellings), table.shape[1]
    if settings["init"] == "spherical":
        import torch

        total = squares = 0.0
        for block in row_blocks(table):
            total += block.sum(dtype="f8")
            squares += numpy.square(block, dtype="f8").sum()
        size = math.prod(table.shape)
        norm = math.sqrt((squares - total * total / size) / (size - 1) * width)
        generator = torch.Generator().manual_seed(settings["seed"])
        rows = torch.randn(count, width, generator=generator)
        return rows.mul_(settings["init_radius"] * norm / rows.norm(dim=1, keepdim=True)).numpy()
    if settings["init"] != "subtoken_mean":
        raise SentryError(f"init {settings['init']!r}: recover.py cannot make these rows again")
    rows, start = numpy.zeros((count, width), "f4"), 0
    lengths = numpy.array([len(ids) for ids in spellings])
    words, ids = numpy.repeat(numpy.arange(count), lengths), numpy.concatenate(spellings)
    for block in row_blocks(table):
        here = (ids >= start) & (ids < start + len(block))
        numpy.add.at(rows, words[here], block[ids[here] - start])
        start += len(block)
    return rows / lengths[:, None].astype("f4")


# ---- Export --------------------------------------------------------------------------------------

LOADING = {
    "rows": """`rows.safetensors` holds `input_rows`, and `output_rows` where the head has its own,
fp32, row i for the i-th line of `words.txt`; `rows.json` names model, words and ids.""",
    "merged": """`AutoTokenizer.from_pretrained("THIS_FOLDER")` and
`AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")` of transformers load it.""",
    "peft": """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = AutoModelForCausalLM.from_pretrained("{model}", dtype="auto"){untie}
model.resize_token_embeddings({size}, mean_resizing=False)
model = PeftModel.from_pretrained(model, "THIS_FOLDER")
```

The base's table must be resized to {size:,} rows before the adapter is put on, even where that
makes it smaller: the new ids begin in its padding. Where the head is tied and takes the same rows,
PEFT warns of a missing lm_head key.""",
}
UNTIE = """
import torch
model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
model.config.tie_word_embeddings = False  # the new words have output rows of their own"""
# What an export may have left in a folder that --force writes into; a loader would mix them up.
STALE = ("model*.safetensors*", "adapter_*", "rows.*", "config.json", "generation_config.json")


def export(run_dir: Path, out: Path, form: str, force: bool, base: str | None) -> None:
    """Write what was learnt to OUT with a model card, aside first and then file by file in place;
    over files that are there only with `force`."""
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
        if form != "rows":
            new_words(run_dir)  # proves the tokenizer whole
            own = shutil.ignore_patterns("report.json")  # has paths of this machine
            shutil.copytree(run_dir / "tokenizer", part, ignore=own, dirs_exist_ok=True)
        write = {"rows": export_rows, "peft": export_peft, "merged": export_merged}[form]
        loading = write(sentry, settings, part)
        shutil.copy(sentry.path / "words.txt", part)
        card = model_card(sentry, settings, loading, form)
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
    return {name: rows for name, rows in tensors.items() if name in ("input_rows", "output_rows")}


def export_rows(sentry: Sentry, settings: dict, part: Path) -> str:
    """rows.safetensors, and rows.json with model, step, and the id of every word."""
    write_tensors(part / "rows.safetensors", trained_rows(sentry))
    words = (sentry.path / "words.txt").read_text(encoding="utf-8").split()
    names = ("model_name", "model_revision", "step", "first_new_id", "num_new_tokens")
    facts = {name: sentry.state[name] for name in names}
    facts["words"] = {word: i for i, word in enumerate(words, facts["first_new_id"])}
    write_json(part / "rows.json", facts)
    return LOADING["rows"]


def export_peft(sentry: Sentry, settings: dict, part: Path) -> str:
    """An adapter of PEFT's type TRAINABLE_TOKENS: the tensors hold the rows themselves (peft 0.21,
    tuners/trainable_tokens)."""
    rows, state, base = trained_rows(sentry), sentry.state, base_tables(settings)
    separate, size = "output_rows" in rows, state["first_new_id"] + state["num_new_tokens"]
    modules = {base.embedding.removesuffix(".weight"): rows["input_rows"]}
    if separate or not base.tied:
        head = (base.head or "lm_head.weight").removesuffix(".weight")
        modules[head] = rows.get("output_rows", rows["input_rows"])
    tensors = {f"base_model.model.{n}.trainable_tokens_delta": r for n, r in modules.items()}
    write_tensors(part / "adapter_model.safetensors", tensors)
    write_json(part / "adapter_config.json", {
        "peft_type": "TRAINABLE_TOKENS", "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": state["model_name"], "revision": state["model_revision"],
        "target_modules": [name.rpartition(".")[2] for name in modules], "init_weights": True,
        "token_indices": list(range(state["first_new_id"], size)),
    })  # fmt: skip
    untie = UNTIE if base.tied and separate else ""
    return LOADING["peft"].format(model=state["model_name"], size=size, untie=untie)


def export_merged(sentry: Sentry, settings: dict, part: Path) -> str:
    """An ordinary checkpoint: the base's files byte by byte, embedding and head with the new rows.

    Rows below first_new_id stay bitwise what they were, new rows are cast to the table's dtype, the
    base's padding rows go. A tied head whose output rows are separate becomes a tensor of its own.
    Memory: chunks and ROWS_AT_ONCE rows; Qwen2.5-14B's tables (1,485 -> 1,913 MiB each): 501 MiB
            at the peak, 21 s (tests/measure_merge.py --hidden 5120, 2 CPU cores, 2026-11-22)
    """
    rows, first = stored_tensors(sentry.path / "rows.safetensors"), sentry.state["first_new_id"]
    base, separate = base_tables(settings), "output_rows" in rows
    embedding, weight_map = base.table(base.embedding, first), dict(base.weight_map)
    changed = {base.embedding: (embedding, rows["input_rows"])}
    if base.head or separate:
        head = base.head or "lm_head.weight"
        weight_map.setdefault(head, weight_map[base.embedding])
        kept = embedding if base.tied else base.table(head, first)
        changed[head] = kept, rows["output_rows" if separate else "input_rows"]
    total, files = 0, sorted(set(weight_map.values()))
    for file in files:
        stored = base_tensors(base_file(settings, file))
        pieces = {name: (tensor,) for name, tensor in stored.items()}
        pieces |= {n: tables for n, tables in changed.items() if weight_map[n] == file}
        total += write_pieces(part / file, pieces)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(part / "model.safetensors.index.json", index)
    config = read_json(base_file(settings, "config.json"))
    facts = {"vocab_size": first + sentry.state["num_new_tokens"]}
    facts["tie_word_embeddings"] = base.tied and not separate
    for place in (config, config.get("text_config", {})):
        if "vocab_size" in place:
            place |= facts
    write_json(part / "config.json", config)
    if (generation := base_file(settings, "generation_config.json")).is_file():
        shutil.copy(generation, part)
    return LOADING["merged"]


def write_pieces(path: Path, tensors: dict[str, tuple[StoredTensor, ...]]) -> int:
    """A safetensors file of base tensors, some followed by fp32 rows; bytes of all tensors."""
    entries = {}
    for name, (base, *new) in tensors.items():
        if new:
            base = base.first_rows(base.shape[0] + new[0].shape[0])
        entries[name] = base.dtype, base.shape, base.size
    with open(path, "wb") as writer:
        writer.write(tensor_header(entries))
        for base, *new in tensors.values():
            with open(base.path, "rb") as reader:
                reader.seek(base.offset)
                copy_bytes(reader, writer, base.size)
            for block in itertools.chain(*map(row_blocks, new)):
                writer.write(as_stored(block, base.dtype))
    sync(path)
    return sum(size for _, _, size in entries.values())


def model_card(sentry: Sentry, settings: dict, loading: str, form: str) -> str:
    """README.md of an export: base, words, recipe, steps, losses, licence, loading."""
    state, name, licence = sentry.state, sentry.state["model_name"], base_licence(settings)
    words = (sentry.path / "words.txt").read_text(encoding="utf-8").split()
    lines = (sentry.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evals = [record for record in map(json.loads, lines) if record["kind"] == "eval"]
    result, table = "", []
    if evals:
        last = evals[-1]
        result = (
            f" Held-out text: {last['val_bits_per_byte']:.3f} bits per byte at step {last['step']};"
            f" the base model without the words: {last['base_bits_per_byte']:.3f}."
        )
        table = ["| Step | Val, nats/token | Val, bits/byte |", "|---|---|---|"]
        row = "| {step} | {val_loss:.4f} | {val_bits_per_byte:.3f} |"
        table += [row.format(**record) for record in evals]
    keys = (
        "init", "output_rows", "token_matching", "seq_len", "effective_batch_size", "learning_rate",
        "warmup_ratio", "row_coupling", "max_steps", "quantization", "seed",
    )  # fmt: skip
    recipe = ", ".join(f"{key} {settings[key]}" for key in keys)
    first, num = state["first_new_id"], state["num_new_tokens"]
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    return "\n".join([
        "---", *([f"base_model: {name}"] if on_hub else []),
        f"library_name: {form.replace('merged', 'transformers')}",
        f"license: {licence or 'other'}\ntags: [wake2vec]\n---",
        f"# {num:,} new words for {name}\n",
        f"Base model: {name}, revision {state['model_revision'] or 'default'}, its weights frozen.",
        f"Licence of the base model: {licence or 'see the base model'}.",
        f"New words: ids {first:,} to {first + num - 1:,}, in order in words.txt"
        f" ({', '.join(words[:8])} ...).",
        f"Recipe: {recipe}.",
        f"Trained for {sentry.step:,} steps.{result}\n",
        *table,
        f"\n## Loading\n\n{loading}\n",
    ])  # fmt: skip


def base_licence(settings: dict) -> str | None:
    """The licence that the base model's own card names."""
    try:
        card = base_file(settings, "README.md")
    except SentryError:  # only the rows survived, the base model is not at hand
        return None
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    found = re.match(r"---\n(?:.*\n)*?license: *(.+)\n(?:.*\n)*?---", text)
    return found[1].strip("\"' ") if found else None


# ---- Neighbours and import -----------------------------------------------------------------------


def directions(rows: numpy.ndarray) -> numpy.ndarray:
    return rows / numpy.linalg.norm(rows, axis=1, keepdims=True).clip(1e-30)


def print_moves(words: list[str], norms: dict, sides: dict, moved: numpy.ndarray) -> None:
    """Norms side by side, and the words in `moved` with how far they went."""
    print(f"{'norms of input rows':24} {'mean':>8} {'std':>8}")
    for label, values in norms.items():
        print(f"{label:24} {values.mean():8.3f} {values.std():8.3f}")
    print(f"\n{'most moved':24} {'by':>8} {'cosine of before and after':>28}")
    before, after = (rows[moved] for rows in sides.values())
    moves = numpy.linalg.norm(after - before, axis=1)
    for i, move, cosine in zip(moved, moves, (directions(before) * directions(after)).sum(axis=1)):
        print(f"{words[i]:24} {move:8.3f} {cosine:28.3f}")


def nearest(names: list[str], cosines: numpy.ndarray, num: int) -> str:
    best = cosines.argsort()[::-1][:num]
    return "  ".join(f"{names[i]} {cosines[i]:.2f}" for i in best)


def neighbours(run_dir: Path, asked: list[str], num: int, base: str | None) -> None:
    """Print what stands nearest to each word (default: the five that moved most) by the cosine of
    input rows, among base tokens and new words, before and after training; and norms, and moves."""
    sentry = newest_sentry(run_dir)
    settings = sentry.state["config"] | ({"model_name": base} if base else {})
    report, words, spellings = new_words(run_dir)
    if unknown := [word for word in asked if word not in words]:
        raise SentryError(*(f"{word!r}: no new word of {run_dir}" for word in unknown))
    tables = base_tables(settings)
    table = tables.table(tables.embedding, report["base_size"])
    sides = {"before": starting_rows(table, spellings, settings)}
    sides["after"] = trained_rows(sentry)["input_rows"]
    moved = numpy.linalg.norm(sides["after"] - sides["before"], axis=1).argsort()[::-1][:num]
    chosen = [words.index(word) for word in asked] or moved[:5].tolist()
    queries = numpy.concatenate([directions(rows[chosen]) for rows in sides.values()]).T
    norms, near_base = [], []
    for block in row_blocks(table):
        norms.append(numpy.linalg.norm(block, axis=1))
        near_base.append(directions(block) @ queries)
    norms = {"base tokens": numpy.concatenate(norms)}
    norms |= {f"new words, {w}": numpy.linalg.norm(rows, axis=1) for w, rows in sides.items()}
    print(f"step {sentry.step:,}\n")
    print_moves(words, norms, sides, moved)
    near_base = numpy.concatenate(near_base)
    tokenizer = Tokenizer.from_file(str(run_dir / "tokenizer" / "tokenizer.json"))
    tokens = [repr(tokenizer.decode([i])) for i in range(len(near_base))]
    for n, place in enumerate(chosen):
        for column, (when, rows) in zip((n, n + len(chosen)), sides.items()):
            near_new = directions(rows) @ queries[:, column]
            near_new[place] = -2.0  # not the word itself
            print(f"\n{words[place]}, {when}")
            print(f"  base tokens  {nearest(tokens, near_base[:, column], num)}")
            print(f"  new words    {nearest(words, near_new, num)}")


def import_seed(seed_file: Path, run_dir: Path, base: str | None) -> None:
    """Make a sentry in RUN_DIR/snapshots of a file of the original notebooks, which trained input
    rows alone, from id wake_start on. All others that the config asks for are as at step 0. The
    step stays, and with it learning rate and data order; the optimizer begins anew."""
    settings = run_settings(run_dir)
    if not settings:
        raise SentryError(f"{run_dir / 'config.yaml'}: missing; extend_tokenizer.py writes it")
    rows, step, start = read_seed(seed_file)
    report, words, spellings = new_words(run_dir)
    first, last = report["base_size"], report["total"] - 1
    tables = base_tables(settings | ({"model_name": base} if base else {}))
    tensors = untrained_tensors(tables, spellings, first, settings)
    width = tensors["input_rows"].shape[1]
    if start < first or rows.shape != (last + 1 - start, width):
        raise SentryError(
            f"{seed_file}: {len(rows):,} rows of {rows.shape[1]:,} from id {start:,} on; this run's"
            f" new ids are {first:,} to {last:,}, its rows {width:,} wide"
        )
    if sentry_folders(*saves_of(run_dir)[0]):
        raise SentryError(f"{run_dir}: has saves of its own; give a new run_dir")
    tensors["input_rows"][start - first :] = rows
    state = {
        "step": step, "model_name": settings["model_name"],
        "model_revision": settings["model_revision"], "words_sha256": report["new_words_sha256"],
        "corpus_sha256": NOT_KNOWN, "first_new_id": first, "num_new_tokens": len(words),
        "sequences_seen": step * settings["effective_batch_size"], "optimizer_step": 0,
        "random_state": {}, "loss_scale": {"value": 65536.0, "good_steps": 0},
        "best_val_loss": None, "base_bits_per_byte": None, "config": settings, "versions": {},
        "imported_from": seed_file.name,
    }  # fmt: skip
    texts = {"metrics.jsonl": "", "samples.md": "", "words.txt": "\n".join(words) + "\n"}
    path = write_sentry(run_dir / "snapshots", tensors, texts, state)
    print(f"{len(rows):,} rows of step {step:,} and {start - first:,} new ones: {path}")


def untrained_tensors(base: BaseTables, spellings: list, first: int, settings: dict) -> dict:
    """What train.py saves, as it is at step 0: rows, and Adafactor's zeros."""
    mode, table = settings["output_rows"], base.table(base.embedding, first)
    if mode == "auto":
        mode = "shared" if base.tied else "separate"
    tensors = {"input_rows": starting_rows(table, spellings, settings)}
    if mode != "shared":
        head = table if base.tied else base.table(base.head, first)
        tensors["output_rows"] = starting_rows(head, spellings, settings)
    for name in list(tensors) if mode == "separate" else ["input_rows"]:
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


def main(*argv: str) -> None:
    """Run one command. Raises: SentryError, OSError (a full disk); the guard prints them."""
    commands = {"export": export, "neighbours": neighbours, "import": import_seed}
    command = argv[0] if argv and argv[0] in commands else ""
    name, style = f"recover.py {command}".strip(), argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(name, description=__doc__, formatter_class=style)
    if command == "import":
        parser.add_argument("seed_file", type=Path, metavar="SEED_FILE.pt")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    if command == "export":
        parser.add_argument("out", type=Path, metavar="OUT")
        forms = ("rows", "peft", "merged")
        parser.add_argument("--format", dest="form", choices=forms, required=True)
        parser.add_argument("--force", action="store_true", help="write though OUT has files")
    if command == "neighbours":
        parser.add_argument("asked", nargs="*", metavar="word", help="default: the 5 most moved")
        parser.add_argument("--num", type=int, default=10, help="neighbours of each kind (10)")
    if command:
        parser.add_argument("--base", metavar="FOLDER", help="the base model, where it moved")
    arguments = vars(parser.parse_intermixed_args(argv[1:] if command else argv))
    commands.get(command, list_saves)(**arguments)


if __name__ == "__main__" and "__file__" in globals():
    try:
        main(*sys.argv[1:])
    except (SentryError, OSError) as error:
        sys.exit(str(error))
