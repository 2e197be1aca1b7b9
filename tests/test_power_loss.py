"""A power cut at any moment leaves the old or the new, and never a part of either.

    python -m pytest tests/test_power_loss.py

A kill forgives a missing fsync, a power cut does not: what a program writes may be lost or torn
until the file is synced, and a name may be lost until its folder is synced. `Disk` watches the code
at its real calls. `images` lists everything that a power cut may leave at each of these moments,
and each image is read back as the next start reads it.
"""

import dataclasses
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_settings

import recover
from config import Config, clear_leavings, load_config, write_config
from extend_tokenizer import extend, read_corpus, save_new_words
from recover import copy_sentry, link_or_copy, pick_sentry, prune, saved_words, write_sentry

# The calls by which Python changes names, and the one that syncs.
CALLS = ("rename", "replace", "mkdir", "unlink", "remove", "rmdir", "link", "fsync")


class Disk:
    """This watches a folder. A moment holds the states that each file and folder may be left in.

    A file's state is its bytes, a folder's the numbers of its files and folders by name. The first
    state of each is the synced one, the last one is what programs see. What is there when the watch
    begins counts as synced.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch):
        self.root, self.held, self.states, self.moments = root, {}, {}, []
        self.states = {number: [state] for number, state in self.look().items()}
        for name in CALLS:
            patch.setattr(os, name, self.watched(getattr(os, name), name == "fsync"))

    def look(self) -> dict[int, bytes | dict[str, int]]:
        """Read all that is there: number of a file or folder -> its state."""
        found, folders = {}, [self.root]
        for folder in folders:
            names = found[self.number(folder)] = {}
            for path in folder.iterdir():
                names[path.name] = self.number(path)
                if path.is_dir():
                    folders.append(path)
                else:
                    found[names[path.name]] = path.read_bytes()
        return found

    def number(self, path: Path) -> int:
        """Name a file or folder by its inode; it is held open, so that no later one is named so."""
        number = path.stat().st_ino
        if number not in self.held:
            self.held[number] = os.open(path, os.O_RDONLY)
        return number

    def watched(self, call: Callable, syncs: bool) -> Callable:
        def watched_call(*arguments, **keywords):
            self.note()
            result = call(*arguments, **keywords)
            if syncs and (number := os.fstat(arguments[0]).st_ino) in self.states:
                del self.states[number][:-1]
            self.note()
            return result

        return watched_call

    def note(self) -> None:
        for number, state in self.look().items():
            states = self.states.setdefault(number, [type(state)()])  # new: empty on the disk
            if states[-1] != state:
                states.append(state)
        self.moments.append({number: list(states) for number, states in self.states.items()})

    def images(self, first_moment: int = 0) -> set:
        """List all that a power cut may leave at the moments from this one on."""
        root = self.number(self.root)
        return set().union(*(images(moment, root) for moment in self.moments[first_moment:]))


def images(moment: dict[int, list], number: int) -> set:
    """List the forms of a file, bytes, or of a folder, a set of (name, form), after a power cut."""
    states = moment[number]
    if isinstance(states[0], bytes):
        torn = states[-1][: len(states[-1]) // 2] if len(states) > 1 else states[-1]
        return {*states, torn}
    found = set()
    for names in states:
        # What `replacing` left half-written is deleted by the next start unread.
        names = {name: number for name, number in names.items() if not name.endswith(".part")}
        forms = [[(name, form) for form in images(moment, n)] for name, n in names.items()]
        found |= set(map(frozenset, itertools.product(*forms)))
    return found


def lay_down(form: bytes | frozenset, path: Path) -> Path:
    if isinstance(form, bytes):
        path.write_bytes(form)
    else:
        path.mkdir()
        for name, inner in form:
            lay_down(inner, path / name)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def watch(tmp_path) -> Iterator[Callable]:
    """watch(root, act, read): do act(), and read every image with read(path) -> (all that was read
    at any moment, all that was read from the end of act() on)."""
    disks = []

    def watch(root: Path, act: Callable, read: Callable, after: Callable = lambda: None) -> tuple:
        with pytest.MonkeyPatch.context() as patch:
            disks.append(disk := Disk(root, patch))
            act()
            disk.note()
            end = len(disk.moments) - 1
            after()
        results, copies = [], tmp_path / "images"
        copies.mkdir()
        for number, form in enumerate(everything := disk.images()):
            results.append((form, read(lay_down(form, copies / str(number)))))
        assert len(everything) > 1
        at_end = disk.images(end)
        return {r for _, r in results}, {result for form, result in results if form in at_end}

    yield watch
    for disk in disks:
        for descriptor in disk.held.values():
            os.close(descriptor)


# ---- Saves ---------------------------------------------------------------------------------------

IDENTITY = {"model_name": "base", "model_revision": None, "words_sha256": "w", "corpus_sha256": "c"}


def save(folder: Path, step: int, settings: dict | None = None) -> Path:
    state = {"step": step, **IDENTITY, "config": settings or {}, "val_loss": None}
    state |= {"first_new_id": 257, "num_new_tokens": 2}
    texts = {"words.txt": "quark\nriverrun\n", "metrics.jsonl": "", "samples.md": f"Step {step}\n"}
    return write_sentry(folder, {"input_rows": torch.full((2, 3), float(step))}, texts, state)


def picked_step(wanted: dict[int, dict]) -> Callable[[Path], int | None]:
    """Make a reader: the step that a start goes on from, whose files must all be those of `wanted`.

    The next start finds no save at all, or a whole one; it is never asked to mend anything.
    """

    def read(folder: Path) -> int | None:
        sentry, _ = pick_sentry([folder], IDENTITY)
        assert sentry is None or contents(sentry.path) == wanted[sentry.step]
        return sentry and sentry.step

    return read


@pytest.mark.parametrize("there", ["nothing", "a damaged one"])
def test_a_power_cut_in_a_save_leaves_the_save_before_or_the_whole_new_one(tmp_path, watch, there):
    """From its return on it is the new one, also while the old one is deleted."""
    folder = tmp_path / "snapshots"
    wanted = {2: contents(save(folder, 2)), 4: contents(save(tmp_path / "same", 4))}
    if there == "a damaged one":
        (save(folder, 4) / "rows.safetensors").write_bytes(b"torn")
    ever, at_end = watch(
        folder, lambda: save(folder, 4), picked_step(wanted), lambda: prune(folder, 1)
    )
    assert (ever, at_end) == ({2, 4}, {4})


@pytest.mark.parametrize("copy", [shutil.copyfile, link_or_copy])
def test_a_power_cut_in_a_copy_leaves_the_copy_before_or_the_whole_new_one(tmp_path, watch, copy):
    sources = {step: save(tmp_path / "snapshots", step) for step in (2, 4)}
    folder = tmp_path / "drive"
    copy_sentry(sources[2], folder, copy)
    wanted = {step: contents(path) for step, path in sources.items()}
    ever, at_end = watch(
        folder, lambda: copy_sentry(sources[4], folder, copy), picked_step(wanted),
        lambda: prune(folder, 1),
    )  # fmt: skip
    assert (ever, at_end) == ({2, 4}, {4})


# ---- What is replaced in a run folder ------------------------------------------------------------


def test_a_power_cut_leaves_the_old_or_the_new_config(tmp_path, watch):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    names = {"model_name": "m", "lexicon": "l", "corpus": "c", "run_dir": str(run_dir)}
    old, new = (Config(**names, max_steps=steps) for steps in (10, 20))
    write_config(old)
    read = lambda folder: load_config(folder / "config.yaml")  # noqa: E731
    ever, at_end = watch(run_dir, lambda: write_config(new), read)
    assert (ever, at_end) == ({old, new}, {new})


def test_a_power_cut_leaves_the_old_or_the_new_tokenizer(tmp_path, watch):
    """Between two renames it has another name, by which the next start finds it."""
    config = Config(**tiny_settings(tmp_path))
    texts, wanted = read_corpus(config), []
    words = [extend(config, texts)]
    lexicon = Path(config.lexicon).read_text(encoding="utf-8").split()
    Path(config.lexicon).write_text("\n".join(lexicon[3:]), encoding="utf-8")
    words.append(extend(config, texts))
    for new in reversed(words):
        save_new_words(config, new)
        wanted.append(contents(Path(config.run_dir, "tokenizer")))

    def read(run_dir: Path) -> int:
        clear_leavings(run_dir / "tokenizer")  # what the next `replacing` does first
        saved_words(run_dir)
        return wanted.index(contents(run_dir / "tokenizer"))

    run_dir = Path(config.run_dir)
    ever, at_end = watch(run_dir, lambda: save_new_words(config, words[1]), read)
    assert (ever, at_end) == ({0, 1}, {0})


def test_a_power_cut_leaves_each_file_of_an_export_old_or_new(tmp_path, watch):
    """An export is put in place file by file; at its end all are new."""
    settings = dataclasses.asdict(Config(**tiny_settings(tmp_path)))
    settings["corpus"] = list(settings["corpus"])
    run_dir, folder, wanted = tmp_path / "run", tmp_path / "exports", []
    for step in (2, 4):
        save(run_dir / "snapshots", step, settings | {"model_name": "base"})

    def export(step: int) -> None:
        command = ("export", str(run_dir), str(folder / "out"), "--format", "rows", "--force")
        recover.main(*command, "--base", settings["model_name"], "--step", str(step))

    for step in (4, 2):
        export(step)
        wanted.append(contents(folder / "out"))

    def read(path: Path) -> str:
        new = [
            next(n for n, files in enumerate(wanted) if files[name] == found)
            for name, found in contents(path / "out").items()
        ]
        return "all new" if not any(new) and len(new) == len(wanted[0]) else "on the way"

    ever, at_end = watch(folder, lambda: export(4), read)
    assert at_end == {"all new"}
