"""Saves survive what kills, disks and Drives do; one that does not is named with its reason.

    python -m pytest tests/test_recover.py

Sentries here are a few hundred bytes, made by hand; tests/torture/torture.py kills real runs. Disks
fill up, fail and hang at recover.py's fault points, where that can be said without its internals.
"""

import errno
import os
import re
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import edit_state

import recover
from config import UserError, run_command
from recover import (
    SentryWriter, check_sentry, copy_sentry, main, pick_sentry, prune, sentry_folders, set_aside,
    write_sentry,
)  # fmt: skip

IDENTITY = {"model_name": "base", "model_revision": None, "words_sha256": "w", "corpus_sha256": "c"}
TEXTS = {"words.txt": "quark\n", "metrics.jsonl": "", "samples.md": ""}


def save(folder: Path, step: int, **changes) -> Path:
    """A whole sentry of `step`, each number of it being the step."""
    tensors = {"input_rows": torch.full((3, 4), float(step)), "ids": torch.arange(3)}
    state = {"step": step, **IDENTITY, "num_new_tokens": 3, "config": {"max_steps": 3000}} | changes
    return write_sentry(folder, tensors, TEXTS, state)


def steps(folder: Path) -> list[int]:
    return [step for step, path in sentry_folders(folder) if (path / "state.json").exists()]


def reason(path: Path, expected: dict = IDENTITY) -> str:
    with pytest.raises(UserError) as caught:
        check_sentry(path, expected)
    assert len(caught.value.problems) == 1 and str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def forge(path: Path, data: bytes) -> None:
    """Put other bytes into rows.safetensors, with a size and a hash that agree."""
    (path / "rows.safetensors").write_bytes(data)
    edit_state(path)


@pytest.fixture
def at_fault_point(monkeypatch):
    """at_fault_point("copied", act): call act(step) whenever a save is at that point."""
    actions = {}

    def reached(name: str, step: int) -> None:
        if name in actions:
            actions[name](step)

    monkeypatch.setattr(recover, "fault_point", reached)
    return actions.__setitem__


def full(*_) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# ---- One sentry ----------------------------------------------------------------------------------


def test_a_sentrys_tensors_are_what_was_given_and_its_files_can_be_read_by_all(tmp_path) -> None:
    """safetensors 0.8.0 leaves rows.safetensors with mode 600 otherwise."""
    tensors = {
        "rows": torch.randn(5, 3), "half": torch.randn(7).half(), "ids": torch.randint(9, (2, 2)),
        "bytes": torch.arange(11, dtype=torch.uint8), "é": torch.zeros(0, 4),
        "number": torch.tensor(2.5),
    }  # fmt: skip
    state = {"step": 20}
    path = write_sentry(tmp_path, tensors, TEXTS, state)
    assert state == {"step": 20}
    check_sentry(path, state)
    read = load_file(path / "rows.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    modes = {file.stat().st_mode for file in path.iterdir()}
    assert len(modes) == 1 and modes.pop() & 0o444


def test_a_whole_sentry_passes_and_says_what_was_saved(tmp_path: Path) -> None:
    sentry = check_sentry(save(tmp_path, 20), IDENTITY)
    assert sentry.step == 20 and sentry.path == tmp_path / "step_000020"
    assert {p.name for p in sentry.path.iterdir()} == {*TEXTS, "rows.safetensors", "state.json"}
    assert set(sentry.state["files"]) == {*TEXTS, "rows.safetensors"}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["rows.safetensors", "words.txt"])
def test_truncated_missing_and_wrong_hash(name: str, tmp_path: Path) -> None:
    file = save(tmp_path, 20) / name
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    assert reason(file.parent) == f"{name} is {len(data) - 1:,} bytes instead of {len(data):,}"
    file.write_bytes(data + b"x")
    assert reason(file.parent) == f"{name} is {len(data) + 1:,} bytes instead of {len(data):,}"
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert reason(file.parent) == f"{name} does not have the SHA-256 that state.json says"
    file.unlink()
    assert reason(file.parent) == f"{name} is missing"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"step": 20}', '{"step": "x", "files": {}}', '{"step": 20, "files": {}}',
     '{"step": 20, "files": {"rows.safetensors": 3}}', "\udcff"],
)  # fmt: skip
def test_marker_missing_or_damaged(text: str, tmp_path: Path) -> None:
    path = save(tmp_path, 20)
    (path / "state.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert reason(path) == "state.json is damaged"
    (path / "state.json").unlink()
    assert reason(path) == "no state.json; the save was cut off before its end"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_with_a_right_hash(value: float, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(recover, "VALUES_AT_ONCE", 8)
    path, file = save(tmp_path, 20), tmp_path / "rows.safetensors"
    tensors = {"ids": torch.arange(3), "input_rows": torch.zeros(3, 4)}
    save_file(tensors, file)
    forge(path, file.read_bytes())
    check_sentry(path, IDENTITY)
    tensors["input_rows"][2, 3] = value
    save_file(tensors, file)
    forge(path, file.read_bytes())
    assert reason(path) == "input_rows holds NaN or infinity"


def test_no_safetensors_with_a_right_hash(tmp_path: Path) -> None:
    path = save(tmp_path, 20)
    for data in (b"", b"\xff" * 40, b"\x02" + b"\0" * 7 + b"[]"):
        forge(path, data)
        with pytest.raises(UserError, match="rows.safetensors: not a safetensors file"):
            check_sentry(path, IDENTITY)


def test_saves_of_the_format_with_random_state_are_read(tmp_path: Path) -> None:
    random_state = {"python": [3, [1, 2], None], "torch": "AAAA"}
    path = save(tmp_path, 20, random_state=random_state)
    assert check_sentry(path, IDENTITY).state["random_state"] == random_state
    assert check_sentry(copy_sentry(path, tmp_path / "b"), IDENTITY).step == 20


def test_other_run_and_wrong_step(tmp_path: Path) -> None:
    path = save(tmp_path, 20)
    assert (
        reason(path, IDENTITY | {"model_name": "x"}) == "other model_name ('base' instead of 'x')"
    )
    assert reason(path, IDENTITY | {"words_sha256": "v"}) == "other lexicon's words"
    assert (
        reason(path, {"model_revision": "main"}) == "other model_revision (None instead of 'main')"
    )
    moved = path.rename(tmp_path / "step_000040")
    assert reason(moved) == "state.json is of step 20"
    imported = save(tmp_path, 60, corpus_sha256=recover.NOT_KNOWN)
    check_sentry(imported, IDENTITY)


def test_unreadable(tmp_path: Path, monkeypatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    path = save(tmp_path, 20)
    monkeypatch.setattr(recover, "file_record", refuse)
    assert reason(path) == "cannot be read: Permission denied"


# ---- Which one -----------------------------------------------------------------------------------


@pytest.mark.parametrize("newer, older", [(1_000_000, 999_999), (1000, 200), (20, 9)])
def test_newest_is_by_number(newer: int, older: int, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    save(folders[0], newer)
    save(folders[1], older)
    for order in (folders, folders[::-1]):
        assert pick_sentry(order, IDENTITY)[0].step == newer
        assert [step for step, _ in sentry_folders(*order)] == [newer, older]


def test_of_the_same_step_the_first_folder(tmp_path: Path) -> None:
    for names in ("ab", "ba"):
        folders = [tmp_path / name for name in names]
        for folder in folders:
            save(folder, 20)
        assert pick_sentry(folders, IDENTITY)[0].path.parent == folders[0]


def test_damaged_ones_are_passed_over_and_named(tmp_path: Path) -> None:
    for step in (20, 40, 60):
        save(tmp_path, step)
    (tmp_path / "step_000060" / "state.json").unlink()
    (tmp_path / "step_000040" / "words.txt").write_text("x")
    sentry, skipped = pick_sentry([tmp_path], IDENTITY)
    assert sentry.step == 20
    assert [line.split(":")[0] for line in skipped] == [
        str(tmp_path / "step_000060"), str(tmp_path / "step_000040"),
    ]  # fmt: skip
    with pytest.raises(UserError) as caught:
        pick_sentry([tmp_path], IDENTITY | {"model_name": "x"})
    assert len(caught.value.problems) == 4
    assert caught.value.problems[-1].startswith("nothing here can be continued: put")
    with pytest.raises(UserError, match="no whole sentry of step 40 in "):
        pick_sentry([tmp_path], IDENTITY, step=40)
    assert pick_sentry([tmp_path], IDENTITY, step=20)[0].step == 20
    assert pick_sentry([tmp_path / "none"], IDENTITY) == (None, [])


def test_folders_that_do_not_answer_are_one_line(tmp_path: Path, monkeypatch) -> None:
    """A mount that went away, and one that may not be written, when training starts."""
    save(tmp_path, 20)
    save(tmp_path, 40)

    def gone(_path, *_) -> None:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    monkeypatch.setattr(Path, "rename", gone)
    with pytest.raises(UserError) as caught:
        set_aside([tmp_path], check_sentry(tmp_path / "step_000020", IDENTITY))
    why = "Transport endpoint is not connected"
    assert str(caught.value) == f"{tmp_path / 'step_000040'}: cannot be put aside: {why}"
    monkeypatch.setattr(Path, "iterdir", gone)
    with pytest.raises(UserError) as caught:
        pick_sentry([tmp_path], IDENTITY)
    assert str(caught.value) == f"{tmp_path}: cannot be read: {why}"


def test_set_aside_keeps_what_is_newer_under_another_name(tmp_path: Path) -> None:
    for round_ in (1, 2):
        for step in (20, 40):
            save(tmp_path, step)
        set_aside([tmp_path], check_sentry(tmp_path / "step_000020", IDENTITY))
        assert steps(tmp_path) == [20]
        assert (tmp_path / f"step_000040.aside-{round_}" / "state.json").exists()


def test_the_best_is_the_one_with_the_lowest_held_out_loss(tmp_path: Path) -> None:
    """Only a save at an evaluation has a loss. Of equal ones the newest counts, and in place of a
    damaged one the next best."""
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, step, loss in ((a, 20, 4.5), (a, 40, 4.0), (b, 60, 4.0), (a, 80, None)):
        save(folder, step, val_loss=loss)
    save(a, 100)  # written before saves had the key
    save(a, 120, val_loss=1.0)
    (a / "step_000120" / "state.json").write_text("{")
    assert [path.name for path in recover.by_held_out_loss(a, b)] == [
        "step_000060", "step_000040", "step_000020",
    ]  # fmt: skip
    assert pick_sentry([a, b], IDENTITY, "best")[0].step == 60
    (b / "step_000060" / "words.txt").unlink()
    sentry, skipped = pick_sentry([a, b], IDENTITY, "best")
    assert sentry.step == 40 and skipped == [f"{b / 'step_000060'}: words.txt is missing"]
    prune(a, 1)
    assert steps(a) == [120, 40]
    with pytest.raises(UserError, match="no whole sentry of an evaluated step in "):
        pick_sentry([tmp_path / "none"], IDENTITY, "best")


def test_prune_keeps_the_newest_and_removes_leavings(tmp_path: Path) -> None:
    for step in (200, 1000, 40, 999_999, 1_000_000):
        save(tmp_path, step)
    (tmp_path / "step_000999").mkdir()  # no marker
    for leaving in (".step_000040.part", ".step_000060.old"):
        (tmp_path / leaving).mkdir()
    (tmp_path / "step_000040.aside-1").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    prune(tmp_path, 2, spare=tmp_path / "step_000200")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "step_1000000",
        "step_999999",
        "step_000200",
        "step_000040.aside-1",
        "notes.txt",
    }


# ---- Writing and copying -------------------------------------------------------------------------


def kill_at(point: str, act, *arguments) -> None:
    """Call act(*arguments) in a fork that dies by SIGKILL at that fault point."""
    if (pid := os.fork()) == 0:
        os.environ["WAKE2VEC_FAULT"] = point
        try:
            act(*arguments)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_set_aside_leaves_what_is_older_than_the_chosen_save(tmp_path: Path) -> None:
    for step in (20, 40, 60):
        save(tmp_path, step)
    set_aside([tmp_path], check_sentry(tmp_path / "step_000040", IDENTITY))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_000020", "step_000040", "step_000060.aside-1"]


def test_prune_never_counts_a_folder_without_a_marker(tmp_path: Path) -> None:
    """It is what a kill left; the whole save before it must stay."""
    save(tmp_path, 20)
    (save(tmp_path, 40) / "state.json").unlink()
    prune(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000020"]


@pytest.mark.parametrize(
    "point", ["rows_written", "before_rename", "before_marker", "after_marker"]
)
@pytest.mark.parametrize("leaving", [None, "empty", "damaged"])
def test_killed_inside_a_save(point: str, leaving: str | None, tmp_path: Path) -> None:
    """SIGKILL at each fault point: the save before is whole, this one is whole or no sentry."""
    save(tmp_path, 20)
    if leaving == "empty":
        (tmp_path / "step_000040").mkdir()
    elif leaving == "damaged":
        (save(tmp_path, 40) / "words.txt").write_text("other")
    kill_at(f"{point}@40", save, tmp_path, 40)
    sentry, _ = pick_sentry([tmp_path], IDENTITY)
    assert sentry.step == (40 if point == "after_marker" else 20)
    save(tmp_path, 40)
    assert pick_sentry([tmp_path], IDENTITY)[0].step == 40
    prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000040"]


@pytest.mark.parametrize(
    "point", ["copied", "verified", "before_rename", "before_marker", "after_marker"]
)
def test_killed_inside_a_copy(point: str, tmp_path: Path) -> None:
    """The same for the durable folder, and the copy after that is made."""
    durable, source = tmp_path / "drive", save(tmp_path, 40)
    save(durable, 20)
    kill_at(f"{point}@40", copy_sentry, source, durable)
    assert pick_sentry([durable], IDENTITY)[0].step == (40 if point == "after_marker" else 20)
    copy_sentry(source, durable)
    prune(durable, 1)
    assert [path.name for path in durable.iterdir()] == ["step_000040"]
    check_sentry(durable / "step_000040", IDENTITY)


def test_killed_while_an_old_save_is_deleted(tmp_path: Path) -> None:
    for step in (20, 40):
        save(tmp_path, step)
    kill_at("pruning@20", prune, tmp_path, 1)
    assert steps(tmp_path) == [40]  # half a save is no sentry
    prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000040"]


def test_everything_is_on_the_disk_before_the_marker_says_so(tmp_path: Path, monkeypatch) -> None:
    real, synced = os.fsync, []

    def fsync(descriptor: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    save(tmp_path, 20)
    part, target = ".step_000020.part", "step_000020"
    files = {f"{part}/{name}" for name in (*TEXTS, "rows.safetensors")}
    assert files < set(synced[:5]) and synced[4:] == [
        part, ".", f"{target}/.state.json.part", target,
    ]  # fmt: skip


@pytest.mark.parametrize("point", ["rows_written", "before_rename", "before_marker", "real"])
def test_full_local_disk(point: str, tmp_path: Path, at_fault_point) -> None:
    """One clear error, the last sentry intact, and the space of the attempt given back.

    A limit on the size of files stands for a disk that really is full while rows are written.
    """
    writer = SentryWriter(tmp_path / "snapshots", tmp_path / "sentries", 3)
    save(tmp_path / "snapshots", 20)
    why = "[Errno 28] No space left on device"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if point == "real":
        why = "Error while serializing: I/O error: File too large (os error 27)"
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    else:
        at_fault_point(point, full)
    try:
        writer.save({"input_rows": torch.zeros(2**17)}, TEXTS, {"step": 40, **IDENTITY})
        with pytest.raises(UserError) as caught:
            writer.finish_local()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == (
        f"{tmp_path / 'snapshots'}: step 40 could not be saved: {why}; the sentry before it is"
        " intact: make room, then run the same command again"
    )
    writer.check()  # said once
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["step_000020"]
    check_sentry(tmp_path / "snapshots" / "step_000020", IDENTITY)


def test_no_room_for_the_marker(tmp_path: Path, monkeypatch) -> None:
    """The disk is full after the rename: the folder without a marker goes too."""
    save(tmp_path, 20)
    monkeypatch.setattr(recover, "write_json", full)
    with pytest.raises(OSError):
        save(tmp_path, 40)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000020"]


def test_other_errors_of_the_writing_thread_reach_training(tmp_path: Path) -> None:
    writer = SentryWriter(tmp_path / "a", tmp_path / "b", 3)
    writer.save({"rows": [1.0]}, TEXTS, {"step": 20})
    writer.writing.exception(timeout=10)  # waits
    with pytest.raises(ValueError, match="Key `rows` is invalid"):
        writer.check()


def test_file_systems_that_cannot_sync_a_folder(tmp_path: Path, monkeypatch) -> None:
    real = os.fsync

    def refuse(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    check_sentry(save(tmp_path, 20), IDENTITY)


def test_copy_is_byte_for_byte_and_read_back(tmp_path: Path, at_fault_point) -> None:
    source = save(tmp_path / "a", 20)
    target = copy_sentry(source, tmp_path / "b")
    assert {p.name: p.read_bytes() for p in source.iterdir()} == {
        p.name: p.read_bytes() for p in target.iterdir()
    }
    written = tmp_path / "c" / ".step_000020.part" / "words.txt"
    at_fault_point("copied", lambda _: written.exists() and written.write_text("Quark\n"))
    with pytest.raises(UserError, match=r"words.txt: read back other bytes than were written"):
        copy_sentry(source, tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


def test_a_whole_copy_stays_and_a_damaged_one_is_made_again(tmp_path: Path) -> None:
    source = save(tmp_path / "a", 20)
    target = copy_sentry(source, tmp_path / "b")
    before = target.stat().st_ino
    assert copy_sentry(source, tmp_path / "b").stat().st_ino == before
    (target / "words.txt").write_text("Quark\n")
    assert copy_sentry(source, tmp_path / "b") == target
    check_sentry(target, IDENTITY)


class Saves:
    """A SentryWriter, what it said, and one call for one save."""

    def __init__(self, folder: Path, keep: int = 3):
        self.said: list[str] = []
        self.local, self.durable = folder / "snapshots", folder / "drive" / "sentries"
        self.writer = SentryWriter(self.local, self.durable, keep, self.said.append)

    def save(self, step: int) -> None:
        tensors = {"input_rows": torch.full((2, 2), float(step))}
        self.writer.save(tensors, TEXTS, {"step": step, **IDENTITY})

    def settle(self) -> None:
        self.writer.finish_local()
        if copying := self.writer.copying:
            copying.join(10)


def test_two_saves_in_a_row_are_both_whole(tmp_path: Path) -> None:
    saves = Saves(tmp_path)
    for step in (20, 40, 60, 80):
        saves.save(step)
    saves.writer.finish()
    assert steps(saves.local) == [80, 60, 40] and steps(saves.durable)[0] == 80
    for _, path in sentry_folders(saves.local, saves.durable):
        rows = load_file(check_sentry(path, IDENTITY).path / "rows.safetensors")["input_rows"]
        assert (rows == int(path.name[5:])).all()
    assert saves.said == []


def test_a_save_waits_for_the_one_before(tmp_path: Path, at_fault_point) -> None:
    """Otherwise the host would hold the rows of both, and an error of the first would be lost."""
    saves = Saves(tmp_path)
    at_fault_point("rows_written", lambda _: time.sleep(0.2))
    saves.save(20)
    saves.save(40)
    assert steps(saves.local) == [20]
    saves.writer.finish()
    assert steps(saves.local) == [40, 20]


def test_a_local_folder_that_is_the_durable_one_is_not_copied(tmp_path: Path, monkeypatch) -> None:
    """Pruning it as the durable folder would delete the save that is being written."""
    said, state = [], {"step": 20, **IDENTITY}
    monkeypatch.setattr(recover, "copy_sentry", lambda *_: said.append("copied"))
    writer = SentryWriter(tmp_path, tmp_path, 3, said.append)
    writer.save({"input_rows": torch.zeros(2)}, TEXTS, state)
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000020"] and said == []


def test_a_slow_folder_gets_the_newest_and_the_best_in_turn(tmp_path: Path, at_fault_point) -> None:
    """New saves come while each copy is made, so that there always is a newest one to copy."""
    local, durable = tmp_path / "snapshots", tmp_path / "drive"
    save(local, 20, val_loss=1.0)
    save(local, 40)
    copied = []

    def one_more(step: int) -> None:
        copied.append(step)
        if (newest := steps(local)[0]) < 100:
            save(local, newest + 20)

    at_fault_point("verified", one_more)
    SentryWriter(local, durable, 2).finish()
    assert copied == [40, 20, 80, 100] and steps(durable) == [100, 80, 20]


def test_files_are_copied_where_there_are_no_hard_links(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    source = save(tmp_path / "a", 20)
    linked = copy_sentry(source, tmp_path / "b", recover.link_or_copy)
    monkeypatch.setattr(os, "link", refuse)
    copied = copy_sentry(source, tmp_path / "c", recover.link_or_copy)
    for name in ("rows.safetensors", "words.txt"):
        assert (linked / name).samefile(source / name)
        assert not (copied / name).samefile(source / name)
        assert (copied / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("there", ["nothing", "whole", "damaged"])
def test_a_start_copies_the_save_that_was_left_alone(there: str, tmp_path: Path) -> None:
    """A run that continues and has nothing more to save brings its last save to the Drive."""
    for step in (20, 40):
        save(tmp_path / "snapshots", step)
    if there != "nothing":
        target = copy_sentry(tmp_path / "snapshots" / "step_000040", tmp_path / "drive/sentries")
    if there == "damaged":
        (target / "words.txt").unlink()
    saves = Saves(tmp_path)
    saves.writer.finish()
    assert steps(saves.durable) == [40] and saves.said == []
    check_sentry(saves.durable / "step_000040", IDENTITY)


@pytest.mark.parametrize("kind", ["file in its place", "read-only"])
def test_durable_folder_fails_and_comes_back(kind: str, tmp_path: Path, at_fault_point) -> None:
    def refuse(_step: int) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    saves = Saves(tmp_path)
    if kind == "read-only":  # by hand: root, who runs this in a container, may write everywhere
        at_fault_point("copied", refuse)
    else:
        saves.durable.parent.write_text("x")
    for step in (20, 40, 60):
        saves.save(step)
        saves.settle()
    assert steps(saves.local) == [60, 40, 20] and len(saves.said) == 1
    start = f"warning: {saves.durable} refuses: "
    end = (
        "; all steps up to 20 are on the local disk only. Training goes on, and copying when the"
        " folder answers again."
    )
    assert saves.said[0].startswith(start) and saves.said[0].endswith(end)
    if kind == "read-only":
        at_fault_point("copied", lambda _: None)
    else:
        saves.durable.parent.unlink()
    saves.save(80)
    saves.writer.finish()
    assert saves.said[1:] == [f"{saves.durable} answers again; step 80 is there, verified"]
    check_sentry(saves.durable / "step_000080", IDENTITY)


def test_durable_folder_is_full(tmp_path: Path, at_fault_point) -> None:
    """What it holds stays; the half copy goes; the steps at risk are named."""
    saves = Saves(tmp_path, keep=1)
    saves.save(20)
    saves.settle()
    at_fault_point("copied", full)
    saves.save(40)
    saves.settle()
    assert [path.name for path in saves.durable.iterdir()] == ["step_000020"]
    assert "steps after 20 up to 40 are on the local disk only" in saves.said[0]
    saves.writer.finish()
    assert saves.said[1].startswith(f"warning: {saves.durable} holds step 20; step 40 is in ")
    at_fault_point("copied", lambda _: None)
    saves.save(60)
    saves.writer.finish()
    assert steps(saves.durable) == [60] and "answers again" in saves.said[2]


def test_durable_folder_hangs(tmp_path: Path, monkeypatch, at_fault_point) -> None:
    """Training waits for nothing, hears of it once, and the newest save is copied afterwards; what
    hangs in the copy is not pruned away under it, even with keep 1, only afterwards."""
    saves, gate = Saves(tmp_path, keep=1), threading.Event()
    at_fault_point("copied", lambda _: gate.wait(20))
    monkeypatch.setattr(recover, "SLOW_COPY_NOTICE_SECONDS", 0.1)
    began = time.monotonic()
    for step in (20, 40, 60, 80):
        saves.save(step)
        saves.writer.finish_local()
        time.sleep(0.15)
    assert time.monotonic() - began < 10
    began = time.monotonic()
    saves.writer.finish(timeout_seconds=0.1)
    assert time.monotonic() - began < 4
    assert len(saves.said) == 2
    assert re.search(r"has not taken a copy for \d+ s; all steps up to", saves.said[0])
    assert saves.said[1].startswith(f"warning: {saves.durable} holds nothing; step 80 is in ")
    assert steps(saves.local) == [80, 20]  # 20 is in the copy
    gate.set()
    saves.writer.finish()
    assert steps(saves.durable) == steps(saves.local) == [80]
    assert [path.name for path in saves.durable.iterdir()] == ["step_000080"]
    assert "answers again" in saves.said[2]
    saves.save(100)
    saves.writer.finish()
    assert steps(saves.local) == steps(saves.durable) == [100]


def test_the_last_verified_copy_stays_until_the_next_is_verified(
    tmp_path: Path, at_fault_point
) -> None:
    saves, seen = Saves(tmp_path, keep=1), []
    saves.save(20)
    saves.settle()
    # Then the copy is verified, and nothing of it is in place yet.
    at_fault_point("verified", lambda _: seen.append(steps(saves.durable)))
    saves.save(40)
    saves.writer.finish()
    assert seen == [[20]] and steps(saves.durable) == [40]


# ---- Listing -------------------------------------------------------------------------------------


def test_listing(tmp_path: Path, capsys) -> None:
    for step in (200, 1000):
        save(tmp_path / "snapshots", step)
        save(tmp_path / "sentries", step)
    save(tmp_path / "snapshots", 1020, words_sha256="other")
    save(tmp_path / "snapshots", 1040)
    (tmp_path / "snapshots" / "step_001040" / "state.json").unlink()
    settings = {"model_name": "base", "model_revision": None, "sentry_dir": None}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "report.json").write_text('{"new_words_sha256": "w"}')
    main(str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    wanted = [
        ("step", "folder", "MiB", "state"),
        ("1,040", "snapshots", "no state.json; the save was cut off before its end"),
        ("1,020", "snapshots", "other lexicon's words"),
        ("1,000", "snapshots", "whole"), ("1,000", "sentries", "whole"),
        ("200", "snapshots", "whole"), ("200", "sentries", "whole"),
    ]  # fmt: skip
    assert len(lines) == len(wanted) + 1
    for line, parts in zip(lines, wanted):
        assert line.split()[0] == parts[0] and line.endswith(parts[-1]) and parts[1] in line
    chosen = tmp_path / "snapshots" / "step_001000"
    assert (
        lines[-1]
        == f"train.py would continue from {chosen}: step 1,000 of 3,000, 3 new words of base"
    )
    settings["model_name"] = "another"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError) as caught:
        main(str(tmp_path))
    assert str(caught.value) == f"{tmp_path}: nothing here can be continued"
    assert "other model_name ('base' instead of 'another')" in capsys.readouterr().out


def test_listing_of_the_durable_folder_and_of_another_sentry_dir(tmp_path: Path, capsys) -> None:
    save(tmp_path / "drive", 20)
    (tmp_path / "run").mkdir()
    settings = {"model_name": "base", "sentry_dir": str(tmp_path / "drive")}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    for folder in ("run", "drive"):
        main(str(tmp_path / folder))
        assert f"continue from {tmp_path / 'drive' / 'step_000020'}: " in capsys.readouterr().out


@pytest.mark.parametrize("state", ["missing", "empty", "config damaged"])
def test_nothing_to_list_is_one_line_and_status_1(state: str, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    if state != "missing":
        run.mkdir()
    if state == "config damaged":
        (run / "config.yaml").write_text("a: [")
    settings = run / "config.yaml"
    wanted = {
        "missing": f"{run}: no such folder; give the run_dir or the sentry_dir of a run\n",
        "empty": f"{run}: nothing here can be continued\n",
        "config damaged": f"{settings}: not readable; delete it, train.py writes it again\n",
    }
    assert run_command(main, str(run)) == 1 and capsys.readouterr().err == wanted[state]


def test_a_copied_run_folder_lists_its_own_saves(tmp_path: Path, capsys) -> None:
    save(tmp_path / "run" / "snapshots", 20)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    main(str(tmp_path / "copy"))
    assert str(tmp_path / "copy" / "snapshots") in capsys.readouterr().out
