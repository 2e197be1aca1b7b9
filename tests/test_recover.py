"""Saves survive what kills, disks and Drives do; one that does not is named with its reason.

    python -m pytest tests/test_recover.py

Sentries here are a few hundred bytes, made by hand; tests/torture.py kills real runs.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest
import yaml
from safetensors.numpy import load_file

import recover
from recover import (
    SentryError, SentryWriter, check_sentry, copy_sentry, main, pick_sentry, prune, sentry_folders,
    set_aside, write_sentry, write_tensors,
)  # fmt: skip

IDENTITY = {"model_name": "base", "model_revision": None, "words_sha256": "w", "corpus_sha256": "c"}
TEXTS = {"words.txt": "quark\n", "metrics.jsonl": "", "samples.md": ""}


def save(folder: Path, step: int, **changes) -> Path:
    """A whole sentry of `step`, each number of it being the step."""
    tensors = {"input_rows": numpy.full((3, 4), step, "f4"), "ids": numpy.arange(3)}
    state = {"step": step, **IDENTITY, "num_new_tokens": 3, "config": {"max_steps": 3000}} | changes
    return write_sentry(folder, tensors, TEXTS, state)


def steps(folder: Path) -> list[int]:
    return [step for step, path in sentry_folders(folder) if (path / "state.json").exists()]


def reason(path: Path, expected: dict = IDENTITY) -> str:
    with pytest.raises(SentryError) as caught:
        check_sentry(path, expected)
    assert len(caught.value.problems) == 1 and str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def forge(path: Path, **tensors) -> None:
    """Put other tensors in, with sizes and hashes that agree."""
    write_tensors(path / "rows.safetensors", tensors)
    data = (path / "rows.safetensors").read_bytes()
    state = json.loads((path / "state.json").read_text())
    state["files"]["rows.safetensors"] = {
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (path / "state.json").write_text(json.dumps(state))


# ---- One sentry ----------------------------------------------------------------------------------


def test_write_tensors_is_what_the_library_reads(tmp_path: Path) -> None:
    rng = numpy.random.default_rng(0)
    tensors = {
        "rows": rng.normal(size=(5, 3)).astype("f4"), "half": rng.normal(size=7).astype("f2"),
        "ids": rng.integers(-9, 9, (2, 2)), "state": numpy.arange(11, dtype="u1"),
        "é": numpy.zeros((0, 4), "f4"),
        "turned": rng.normal(size=(4, 6)).astype("f4").T,
    }  # fmt: skip
    write_tensors(tmp_path / "x.safetensors", tensors)
    read = recover.read_tensors(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, array in tensors.items():
        assert read[name].dtype == array.dtype and numpy.array_equal(read[name], array)


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


@pytest.mark.parametrize("value", [numpy.nan, numpy.inf, -numpy.inf])
def test_not_finite_with_a_right_hash(value: float, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(recover, "ROWS_AT_ONCE", 2)
    path, rows = save(tmp_path, 20), numpy.zeros((3, 4), "f4")
    forge(path, input_rows=rows, ids=numpy.arange(3))
    check_sentry(path, IDENTITY)
    rows[2, 3] = value
    forge(path, ids=numpy.arange(3), input_rows=rows)
    assert reason(path) == "input_rows holds NaN or infinity"


def test_no_safetensors_with_a_right_hash(tmp_path: Path) -> None:
    path = save(tmp_path, 20)
    forge(path)
    state = json.loads((path / "state.json").read_text())
    for data in (b"", b"\xff" * 40, b"\x02" + b"\0" * 7 + b"[]"):
        (path / "rows.safetensors").write_bytes(data)
        record = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        state["files"]["rows.safetensors"] = record
        (path / "state.json").write_text(json.dumps(state))
        with pytest.raises(SentryError, match="rows.safetensors: not a safetensors file"):
            check_sentry(path, IDENTITY)


def test_other_run_and_wrong_step(tmp_path: Path) -> None:
    path = save(tmp_path, 20)
    assert (
        reason(path, IDENTITY | {"model_name": "x"}) == "other model_name ('base' instead of 'x')"
    )
    assert (
        reason(path, IDENTITY | {"words_sha256": "v"})
        == "other lexicon's words ('w' instead of 'v')"
    )
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
    with pytest.raises(SentryError) as caught:
        pick_sentry([tmp_path], IDENTITY | {"model_name": "x"})
    assert len(caught.value.problems) == 4
    assert caught.value.problems[-1].startswith("nothing here can be continued: put")
    with pytest.raises(SentryError, match="no whole sentry of step 40 in "):
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
    with pytest.raises(SentryError) as caught:
        set_aside([tmp_path], check_sentry(tmp_path / "step_000020", IDENTITY))
    why = "Transport endpoint is not connected"
    assert str(caught.value) == f"{tmp_path / 'step_000040'}: cannot be put aside: {why}"
    monkeypatch.setattr(Path, "iterdir", gone)
    with pytest.raises(SentryError) as caught:
        pick_sentry([tmp_path], IDENTITY)
    assert str(caught.value) == f"{tmp_path}: cannot be read: {why}"


def test_set_aside_keeps_what_is_newer_under_another_name(tmp_path: Path) -> None:
    for round_ in (1, 2):
        for step in (20, 40):
            save(tmp_path, step)
        set_aside([tmp_path], check_sentry(tmp_path / "step_000020", IDENTITY))
        assert steps(tmp_path) == [20]
        assert (tmp_path / f"step_000040.aside-{round_}" / "state.json").exists()


def test_prune_keeps_the_newest_and_removes_leavings(tmp_path: Path) -> None:
    for step in (200, 1000, 40, 999_999, 1_000_000):
        save(tmp_path, step)
    (tmp_path / "step_000999").mkdir()  # no marker
    (tmp_path / ".step_000040.part").mkdir()
    (tmp_path / "step_000040.aside-1").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    prune(tmp_path, 2, (tmp_path / "step_000200", None))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "step_1000000",
        "step_999999",
        "step_000200",
        "step_000040.aside-1",
        "notes.txt",
    }


# ---- Writing and copying -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "point", ["rows_written", "before_rename", "before_marker", "after_marker"]
)
@pytest.mark.parametrize("leaving", [False, True])
def test_killed_inside_a_save(point: str, leaving: bool, tmp_path: Path) -> None:
    """SIGKILL at each fault point: the save before is whole, this one is whole or no sentry."""
    save(tmp_path, 20)
    if leaving:
        (tmp_path / "step_000040").mkdir()
    code = f"import test_recover as t; t.save(t.Path({str(tmp_path)!r}), 40)"
    folders = [str(Path(__file__).parent), str(Path(recover.__file__).parent)]
    child = os.environ | {"WAKE2VEC_FAULT": f"{point}@40", "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run([sys.executable, "-c", code], env=child, stderr=subprocess.PIPE)
    assert done.returncode == -signal.SIGKILL, done.stderr
    sentry, _ = pick_sentry([tmp_path], IDENTITY)
    assert sentry.step == (40 if point == "after_marker" else 20)
    save(tmp_path, 40)
    assert pick_sentry([tmp_path], IDENTITY)[0].step == 40
    prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000040"]


@pytest.mark.parametrize("failing", ["write_tensors", "file_record", "write_json", "sync"])
def test_full_local_disk(failing: str, tmp_path: Path, monkeypatch) -> None:
    """One clear error, the last sentry intact, and the space of the attempt given back."""
    writer = SentryWriter(tmp_path / "snapshots", tmp_path / "sentries", 3)
    save(tmp_path / "snapshots", 20)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(recover, failing, full)
    state = {"step": 40, **IDENTITY}
    writer.save({"input_rows": numpy.zeros((2, 2), "f4")}, TEXTS, state, durable=True)
    with pytest.raises(SentryError) as caught:
        writer.finish_local()
    assert str(caught.value) == (
        f"{tmp_path / 'snapshots'}: step 40 could not be saved: [Errno 28] No space left on device;"
        " the sentry before it is intact: make room, then run the same command again"
    )
    writer.check()  # said once
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["step_000020"]
    check_sentry(tmp_path / "snapshots" / "step_000020", IDENTITY)


def test_no_room_for_the_marker(tmp_path: Path, monkeypatch) -> None:
    """The disk is full after the rename: the folder without a marker goes too."""
    save(tmp_path, 20)
    real = recover.sync

    def full(path: Path) -> None:
        if path.name.startswith("state.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path)

    monkeypatch.setattr(recover, "sync", full)
    with pytest.raises(OSError):
        save(tmp_path, 40)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000020"]


def test_other_errors_of_the_writing_thread_reach_training(tmp_path: Path) -> None:
    writer = SentryWriter(tmp_path / "a", tmp_path / "b", 3)
    writer.save({"rows": numpy.zeros(2, "f8")}, TEXTS, {"step": 20}, durable=True)
    writer.writing.exception(timeout=10)  # waits
    with pytest.raises(KeyError, match="float64"):
        writer.check()


def test_file_systems_that_cannot_sync_a_folder(tmp_path: Path, monkeypatch) -> None:
    real = os.fsync

    def refuse(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    check_sentry(save(tmp_path, 20), IDENTITY)


def test_copy_is_byte_for_byte_and_read_back(tmp_path: Path, monkeypatch) -> None:
    source = save(tmp_path / "a", 20)
    target = copy_sentry(source, tmp_path / "b")
    assert {p.name: p.read_bytes() for p in source.iterdir()} == {
        p.name: p.read_bytes() for p in target.iterdir()
    }
    real = recover.file_record
    spoil = lambda path: real(path) | ({"size": 0} if path.name == "words.txt" else {})  # noqa: E731
    monkeypatch.setattr(recover, "file_record", spoil)
    with pytest.raises(SentryError, match=r"words.txt: read back other bytes than were written"):
        copy_sentry(source, tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


class Saves:
    """A SentryWriter, what it said, and one call for one save."""

    def __init__(self, folder: Path, keep: int = 3):
        self.said: list[str] = []
        self.local, self.durable = folder / "snapshots", folder / "drive" / "sentries"
        self.writer = SentryWriter(self.local, self.durable, keep, self.said.append)

    def save(self, step: int, durable: bool = True) -> None:
        state = {"step": step, **IDENTITY}
        self.writer.save({"input_rows": numpy.full((2, 2), step, "f4")}, TEXTS, state, durable)

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


def test_snapshots_alone_are_not_copied(tmp_path: Path) -> None:
    saves = Saves(tmp_path)
    saves.save(20, durable=False)
    saves.writer.finish()
    assert steps(saves.local) == [20] and not saves.durable.exists() and saves.said == []


@pytest.mark.parametrize("kind", ["file in its place", "read-only"])
def test_durable_folder_fails_and_comes_back(kind: str, tmp_path: Path, monkeypatch) -> None:
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    saves = Saves(tmp_path)
    if kind == "read-only":  # by hand: root, who runs this in a container, may write everywhere
        monkeypatch.setattr(recover, "copy_bytes", refuse)
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
        monkeypatch.undo()
    else:
        saves.durable.parent.unlink()
    saves.save(80)
    saves.writer.finish()
    assert saves.said[1:] == [f"{saves.durable} answers again; step 80 is there, verified"]
    check_sentry(saves.durable / "step_000080", IDENTITY)


def test_durable_folder_is_full(tmp_path: Path, monkeypatch) -> None:
    """What it holds stays; the half copy goes; the steps at risk are named."""
    saves, real = Saves(tmp_path, keep=1), recover.copy_bytes
    saves.save(20)
    saves.settle()

    def full(reader, writer, count: int) -> None:
        writer.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(recover, "copy_bytes", full)
    saves.save(40)
    saves.settle()
    assert [path.name for path in saves.durable.iterdir()] == ["step_000020"]
    assert "steps after 20 up to 40 are on the local disk only" in saves.said[0]
    saves.writer.finish()
    assert saves.said[1].startswith(f"warning: {saves.durable} holds step 20; step 40 is in ")
    monkeypatch.setattr(recover, "copy_bytes", real)
    saves.save(60)
    saves.writer.finish()
    assert steps(saves.durable) == [60] and "answers again" in saves.said[2]


def test_durable_folder_hangs(tmp_path: Path, monkeypatch) -> None:
    """Training waits for nothing, hears of it once, and the newest save is copied afterwards; what
    hangs in the copy is not pruned away under it, even with keep 1, only afterwards."""
    saves, real, gate = Saves(tmp_path, keep=1), recover.copy_bytes, threading.Event()

    def blocking(reader, writer, count: int) -> None:
        gate.wait(20)
        real(reader, writer, count)

    monkeypatch.setattr(recover, "copy_bytes", blocking)
    monkeypatch.setattr(recover, "PATIENCE_SECONDS", 0.1)
    began = time.monotonic()
    for step in (20, 40, 60, 80):
        saves.save(step)
        saves.writer.finish_local()
        time.sleep(0.15)
    saves.writer.finish(timeout_seconds=0.1)
    assert time.monotonic() - began < 10
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
    tmp_path: Path, monkeypatch
) -> None:
    saves, seen = Saves(tmp_path, keep=1), []
    saves.save(20)
    saves.settle()

    def watch(name: str, _step: int) -> None:
        if name == "verified":  # the copy is; nothing of it is in place yet
            seen.append(steps(saves.durable))

    monkeypatch.setattr(recover, "fault_point", watch)
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
        ("1,020", "snapshots", "other lexicon's words ('other' instead of 'w')"),
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
    with pytest.raises(SentryError) as caught:
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
def test_nothing_to_list_is_one_line_and_status_1(state: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    if state != "missing":
        run.mkdir()
    if state == "config damaged":
        (run / "config.yaml").write_text("a: [")
    done = subprocess.run(
        [sys.executable, recover.__file__, str(run)], capture_output=True, text=True
    )
    settings = run / "config.yaml"
    wanted = {
        "missing": f"{run}: no such folder; give the run_dir or the sentry_dir of a run\n",
        "empty": f"{run}: nothing here can be continued\n",
        "config damaged": f"{settings}: not readable; delete it, train.py writes it again\n",
    }
    assert (done.returncode, done.stderr) == (1, wanted[state])


def test_a_copied_run_folder_lists_its_own_saves(tmp_path: Path, capsys) -> None:
    save(tmp_path / "run" / "snapshots", 20)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    main(str(tmp_path / "copy"))
    assert str(tmp_path / "copy" / "snapshots") in capsys.readouterr().out
