"""Kill real runs of the sample --kills times, spoil what they left, prove that nothing is lost.

    python tests/torture/torture.py --kills 200        (559 s, 2 shared CPU cores, 2026-11-22)

A chain is one run of configs/sample.yaml, 40 steps with a save each 4, in NF4 and in fp32 by turns,
killed by SIGKILL and started again by the same command until it ends. Kills come at random moments
or inside a save, at each of recover.py's fault points. Between runs sentries are damaged, and the
run folder is lost; during runs the local disk fills up, and the durable folder fills up, becomes
read-only, goes away or hangs. After each kill and at each end all that is whole must be bit for
bit what an undisturbed run had at that step; continuing must take the newest whole sentry and name
what it passed over. Runs are forks of this process, each 20th a `python train.py` of its own.
Needs Linux; root (small tmpfs mounts) for the full disks and the read-only folder.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
os.chdir(ROOT)
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bitsandbytes  # noqa: F401  imported once, here, for all forks
import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.figure  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from tiny_models import edit_state

import recover
import train
from config import run_command

LAST, EVERY = 40, 4
SETTINGS = (
    "seq_len=32", "effective_batch_size=8", "val_fraction=0.01", f"max_steps={LAST}",
    "eval_every=20", f"save_every={EVERY}", "log_every=1",
)  # fmt: skip
FAULTS = (
    "rows_written", "before_rename", "before_marker", "after_marker",
    "copied", "verified", "pruning",
)  # fmt: skip
NOT_COMPARED = ("step_seconds", "tokens_per_second")
SPOILED = "spoiled_by_torture"  # a file that marks what was damaged on purpose
ONE_RUN_SECONDS = 180  # a run that takes longer hangs

# ---- Damages: each takes the folder of a whole sentry --------------------------------------------


def truncate(path: Path, rng: random.Random) -> None:
    rows = path / "rows.safetensors"
    os.truncate(rows, rng.randrange(rows.stat().st_size))


def flip(path: Path, rng: random.Random) -> None:
    files = [p for p in path.iterdir() if p.name != "state.json" and p.stat().st_size]
    file = rng.choice(sorted(files))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def cut_json(path: Path, rng: random.Random) -> None:
    marker = path / "state.json"
    os.truncate(marker, rng.randrange(marker.stat().st_size - 2))


def put_nan(path: Path, rng: random.Random) -> None:
    rows = path / "rows.safetensors"
    data = bytearray(rows.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    place = begin + 4 * rng.randrange((len(data) - begin) // 4)
    data[place : place + 4] = b"\0\0\xc0\x7f"
    rows.write_bytes(data)
    edit_state(path)


def remove_file(path: Path, rng: random.Random) -> None:
    names = ("rows.safetensors", "metrics.jsonl", "samples.md", "words.txt")
    (path / rng.choice(names)).unlink()


DAMAGES: dict[str, Callable] = {
    "truncated rows": truncate,
    "flipped bit": flip,
    "missing marker": lambda path, rng: (path / "state.json").unlink(),
    "damaged JSON": cut_json,
    "NaN, hash right": put_nan,
    "other model": lambda path, rng: edit_state(path, model_name="someone/else"),
    "other words": lambda path, rng: edit_state(path, words_sha256="0" * 64),
    "missing file": remove_file,
}

# ---- Troubles: each takes a chain, begins, and gives back what ends it ---------------------------


def fill(folder: Path) -> Callable:
    """Leave no byte on the folder's small disk."""
    ballast = folder.parent / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while file.write(bytes(2**16)):
                pass
        except OSError:
            pass
    return ballast.unlink


def read_only(chain: "Chain") -> Callable:
    disk = chain.durable.parent

    def remount(how: str) -> None:
        for _ in range(200):  # busy while a file is open for writing
            if subprocess.run(["mount", "-o", f"remount,{how}", disk]).returncode == 0:
                return
            time.sleep(0.01)

    remount("ro")
    return lambda: remount("rw")


def gone(chain: "Chain") -> Callable:
    """The folder goes, and a file stands in its place, so that nobody can make it again."""
    away = chain.durable.with_name("away")
    if chain.durable.exists():
        chain.durable.rename(away)
    chain.durable.write_text("not a folder", encoding="utf-8")

    def back() -> None:
        chain.durable.unlink()
        if away.exists():
            away.rename(chain.durable)

    return back


def hang(chain: "Chain") -> Callable:
    """Copies block while the flag is there: start() puts the hook in."""
    chain.flag.touch()
    return chain.flag.unlink


TROUBLES: dict[str, Callable] = {
    "local disk full": lambda chain: fill(chain.run_dir),
    "durable full": lambda chain: fill(chain.durable),
    "durable read-only": read_only,
    "durable gone": gone,
    "durable hangs": hang,
}
NEED_MOUNT = ("local disk full", "durable full", "durable read-only")

# ---- Runs ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Reference:
    """Holds what an undisturbed run had: hash of the rows at each save, metrics, samples, time."""

    rows: dict[int, str]
    metrics: list[dict]
    samples: str
    seconds: float


@dataclasses.dataclass
class Chain:
    """One training is killed and continued until its end; both its folders have own disks."""

    folder: Path
    quantization: str
    reference: Reference
    can_mount: bool
    log: Path = None
    began: float = 0.0  # when the last run of it was started

    def __post_init__(self):
        for disk in ("local", "drive"):
            (self.folder / disk).mkdir(parents=True)
            if self.can_mount:
                mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", self.folder / disk]
                subprocess.run(mount, check=True)
        self.run_dir, self.durable = self.folder / "local" / "run", self.folder / "drive" / "saves"
        self.flag, self.log = self.folder / "hang", self.folder / "log"

    def close(self) -> None:
        for disk in ("local", "drive"):
            if self.can_mount:
                subprocess.run(["umount", "-l", self.folder / disk])
        shutil.rmtree(self.folder)

    def sentries(self) -> list[tuple[int, Path]]:
        """List (step, path) of all folders named like a sentry, newest first, local ones first."""
        found = []
        for folder in (self.run_dir / "snapshots", self.durable):
            for path in folder.glob("step_*") if folder.is_dir() else ():
                if re.fullmatch(r"step_\d+", path.name):
                    found.append((int(path.name[5:]), path))
        return sorted(found, key=lambda entry: -entry[0])

    def whole(self) -> list[tuple[int, Path]]:
        """List the sentries that have a marker and were not damaged on purpose."""
        return [
            (step, path)
            for step, path in self.sentries()
            if (path / "state.json").exists() and not (path / SPOILED).exists()
        ]

    def reached(self) -> int:
        """Read the last step in metrics.jsonl, whose last line a kill may have cut."""
        path, step = self.run_dir / "metrics.jsonl", 0
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            if line.endswith("}"):
                step = json.loads(line)["step"]
        return step


def block_while(flag: Path) -> None:
    """Let a fork's copies to the durable folder wait while the flag is there; at its end the run
    waits a few seconds for them."""
    real = shutil.copyfile

    def copyfile(*paths: Path) -> None:
        while flag.exists():
            time.sleep(0.01)
        real(*paths)

    shutil.copyfile, recover.SLOW_COPY_NOTICE_SECONDS = copyfile, 0.3
    recover.SentryWriter.finish.__defaults__ = (3.0,)


def start(chain: Chain, fault: str, as_command: bool, *more: str) -> int:
    """Begin `train.py` on the chain's folders, in a fork or as a command -> the process id."""
    arguments = [
        "configs/sample.yaml", *SETTINGS, f"quantization={chain.quantization}", *more,
        f"run_dir={chain.run_dir}", f"sentry_dir={chain.durable}",
    ]  # fmt: skip
    if pid := os.fork():
        return pid
    status = 3
    try:
        os.environ["WAKE2VEC_FAULT"] = fault
        descriptor = os.open(chain.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if as_command:
            os.execv(sys.executable, [sys.executable, "train.py", *arguments])
        block_while(chain.flag)
        torch.set_num_threads(1)
        status = run_command(train.main, *arguments)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def watch(pid: int, moments: list[tuple[float, Callable]], log: Path, from_start: bool) -> int:
    """Wait for the end and call each function at its moment -> exit status, negative for a signal.

    Moments are seconds after the start, or after the first step began.
    """
    began, clock = time.monotonic(), time.monotonic() if from_start else None
    moments = sorted(moments, key=lambda entry: entry[0])
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if clock is None and "micro_batch_size" in log.read_text(encoding="utf-8"):
            clock = time.monotonic()
        while clock and moments and time.monotonic() - clock >= moments[0][0]:
            moments.pop(0)[1]()
        if time.monotonic() - began > ONE_RUN_SECONDS:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return 99
        time.sleep(0.005)


def undisturbed(folder: Path, quantization: str) -> Reference:
    chain = Chain(folder, quantization, None, can_mount=False)
    began = time.monotonic()
    status = watch(start(chain, "", False, "keep_sentries=100"), [], chain.log, True)
    assert status == 0, chain.log.read_text(encoding="utf-8")
    rows = {step: rows_hash(path) for step, path in chain.sentries()}
    assert sorted(rows) == list(range(EVERY, LAST + 1, EVERY)), sorted(rows)
    samples = (chain.run_dir / "samples.md").read_text(encoding="utf-8")
    found = Reference(rows, metrics(chain.run_dir), samples, time.monotonic() - began)
    chain.close()
    return found


def rows_hash(path: Path) -> str:
    return hashlib.sha256((path / "rows.safetensors").read_bytes()).hexdigest()


def metrics(folder: Path) -> list[dict]:
    """Read metrics.jsonl without what a clock measured."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k not in NOT_COMPARED} for r in records]


# ---- What must hold ------------------------------------------------------------------------------


@dataclasses.dataclass
class Tally:
    """Counts what was done, and holds every violation."""

    wanted_kills: int
    kills: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    damages: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    troubles: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    redone: list[int] = dataclasses.field(default_factory=list)
    runs: int = 0
    commands: int = 0
    resumes: int = 0
    chains: int = 0
    compared: int = 0
    violations: list[str] = dataclasses.field(default_factory=list)

    def inside(self) -> int:
        return sum(count for name, count in self.kills.items() if name != "random")

    def enough(self) -> bool:
        """Say whether the kills asked for are done, a quarter of them inside a save, and a
        twentieth of each damage."""
        share = self.wanted_kills // 20
        few = [name for name in DAMAGES if self.damages[name] < share]
        return (
            self.kills.total() >= self.wanted_kills
            and self.inside() >= self.wanted_kills / 4
            and not few
        )

    def require(self, true: bool, chain: Chain, what: str) -> None:
        if not true:
            kept = chain.folder.parent / f"violation_{len(self.violations)}.log"
            shutil.copy(chain.log, kept)
            whole = chain.whole()
            names = [
                f"{path.parent.name}/{path.name}{'' if (step, path) in whole else ' (not whole)'}"
                for step, path in chain.sentries()
            ]
            self.violations.append(f"{what} ({chain.quantization}; log {kept}; {names})")
            print(f"VIOLATION {self.violations[-1]}", flush=True)


def check_whole(tally: Tally, chain: Chain) -> None:
    """Require that all that claims to be whole is what the undisturbed run had at that step."""
    reference = chain.reference
    for step, path in chain.whole():
        tally.compared += 1
        tally.require(rows_hash(path) == reference.rows[step], chain, f"{path}: other rows")
        wanted = [record for record in reference.metrics if record["step"] <= step]
        tally.require(metrics(path) == wanted, chain, f"{path}: other metrics")


def check_lost_work(tally: Tally, chain: Chain) -> None:
    """Require that a kill costs no more than what came after the newest whole save.

    That is one interval, unless a save was cut off in its middle, while up to one more interval was
    trained.
    """
    if "micro_batch_size" not in chain.log.read_text(encoding="utf-8"):
        return  # killed before its first step, which is where metrics.jsonl becomes this run's
    newest = max([step for step, _ in chain.whole()], default=0)
    lost = chain.reached() - newest
    cut = [
        int(re.search(r"\d+", path.name)[0])
        for path in (chain.run_dir / "snapshots").glob("*step_*")
        if not (path / "state.json").exists()
        and not (path / SPOILED).exists()
        and path.stat().st_mtime > chain.began
    ]
    in_flight = max(cut, default=0)
    allowed = EVERY if in_flight <= newest else in_flight - newest + EVERY
    tally.redone.append(max(lost, 0))
    tally.require(lost <= allowed, chain, f"{lost} steps lost")
    tally.require(in_flight <= newest + EVERY, chain, f"two saves lost, {newest} to {in_flight}")


def check_start(tally: Tally, chain: Chain, expected: list[tuple[int, Path]]) -> None:
    """Require that the run took the newest whole sentry, or died before it could."""
    text = chain.log.read_text(encoding="utf-8")
    said = re.search(r"^continuing from (.+), step (\d+)$", text, re.MULTILINE)
    tally.resumes += said is not None
    if "micro_batch_size" not in text and not said:
        return
    wanted = expected[0][0] if expected else 0
    got = int(said[2]) if said else 0
    tally.require(got == wanted, chain, f"continued from {got} instead of {wanted}")


def check_end(tally: Tally, chain: Chain) -> None:
    """Compare rows, metrics and samples of a chain at its end, here and in the durable folder."""
    text, reference = chain.log.read_text(encoding="utf-8"), chain.reference
    tally.chains += 1
    final = {path.parent for step, path in chain.whole() if step == LAST}
    tally.require(bool(final), chain, "no whole sentry of the last step")
    warned = f"warning: {chain.durable} holds" in text
    tally.require(chain.durable in final or warned, chain, "durable folder without the last step")
    tally.require(metrics(chain.run_dir) == reference.metrics, chain, "other metrics at the end")
    samples = (chain.run_dir / "samples.md").read_text(encoding="utf-8")
    tally.require(samples == reference.samples, chain, "other samples at the end")


# ---- A chain -------------------------------------------------------------------------------------


def choose_fault(rng: random.Random, step: int) -> str:
    """Choose a fault point at one of the next three saves; pruning, at a sentry that goes then."""
    name = rng.choice(FAULTS)
    if name == "pruning":
        return f"pruning@{max(EVERY, step + EVERY * rng.randint(-2, 0))}"
    return f"{name}@{min(step + EVERY * rng.randint(1, 3), LAST)}"


def disturb(tally: Tally, rng: random.Random, chain: Chain, step: int) -> int:
    """Make one run of the chain, with a kill or a trouble or both -> its exit status."""
    tally.runs += 1
    as_command = tally.runs % 20 == 0
    tally.commands += as_command
    fault = choose_fault(rng, step) if rng.random() < 0.5 else ""
    names = [name for name in TROUBLES if chain.can_mount or name not in NEED_MOUNT]
    trouble = rng.choice(names) if rng.random() < 0.25 else ""
    if as_command and trouble == "durable hangs":
        trouble = ""  # the hook is in forks only
    left = chain.reference.seconds * max(LAST - step, EVERY) / LAST
    moments, undo = [], []

    def begin_trouble() -> None:
        undo.append(TROUBLES[trouble](chain))
        tally.troubles[trouble] += 1

    if trouble:
        moments.append((rng.uniform(0, 0.4) * left, begin_trouble))
    if trouble.startswith("durable") and rng.random() < 0.5:
        moments.append((rng.uniform(0.4, 0.8) * left, lambda: undo.pop()()))
    from_start = not trouble and rng.random() < 0.25
    chain.log.write_text("", encoding="utf-8")
    chain.began = time.time()
    pid = start(chain, fault, as_command)
    if not fault and trouble != "local disk full":
        moments.append((rng.uniform(0, 0.8) * left, lambda: os.kill(pid, signal.SIGKILL)))
    status = watch(pid, moments, chain.log, from_start)
    while undo:
        undo.pop()()
    if status == -signal.SIGKILL:
        tally.kills[fault.partition("@")[0] or "random"] += 1
    check_status(tally, chain, trouble, status)
    return status


def check_status(tally: Tally, chain: Chain, trouble: str, status: int) -> None:
    """Require 0, a kill, or, if the local disk was full, 1 with one line that says so."""
    if status == 1 and trouble == "local disk full":
        last = chain.log.read_text(encoding="utf-8").splitlines()[-1]
        clear = "No space left on device" in last and "make room" in last
        tally.require(clear, chain, f"a full disk ends with {last!r}")
        tally.require("Traceback" not in chain.log.read_text(), chain, "a traceback")
    else:
        tally.require(status in (0, -signal.SIGKILL), chain, f"exit status {status}")


def spoil(tally: Tally, rng: random.Random, chain: Chain) -> None:
    """Damage the newest sentry's copies, one or both, or lose the run folder; a whole one stays."""
    whole = chain.whole()
    if rng.random() < 0.1 and any(path.parent == chain.durable for _, path in whole):
        shutil.rmtree(chain.run_dir, ignore_errors=True)
        tally.damages["run folder lost"] += 1
        return
    newest = [path for step, path in whole if step == whole[0][0]]
    for path in newest if rng.random() < 0.4 else [rng.choice(newest)] if newest else []:
        if rng.random() < 0.75 and len(chain.whole()) > 1:
            kind = min(DAMAGES, key=lambda name: (tally.damages[name], rng.random()))
            DAMAGES[kind](path, rng)
            (path / SPOILED).touch()
            tally.damages[kind] += 1


def live_through(tally: Tally, rng: random.Random, chain: Chain) -> None:
    """Start, kill, check and spoil until the chain reaches its end."""
    while True:
        expected = chain.whole()
        newer = [path for step, path in chain.sentries() if expected and step > expected[0][0]]
        status = disturb(tally, rng, chain, expected[0][0] if expected else 0)
        check_start(tally, chain, expected)
        text = chain.log.read_text(encoding="utf-8")
        for path in newer if "continuing from" in text else ():
            tally.require(f"passed over: {path}: " in text, chain, f"{path} was not named")
        check_whole(tally, chain)
        if status in (0, 99) or len(tally.violations) > 20:
            break
        if status == -signal.SIGKILL:
            check_lost_work(tally, chain)
        spoil(tally, rng, chain)
    check_end(tally, chain)


def report(tally: Tally, seconds: float) -> None:
    def count(counter: collections.Counter) -> str:
        return ", ".join(f"{name} {n}" for name, n in sorted(counter.items()))

    redone = sorted(tally.redone)
    print(f"kills        {tally.kills.total()} ({count(tally.kills)})")
    print(f"inside save  {tally.inside()}")
    print(f"damages      {tally.damages.total()} ({count(tally.damages)})")
    print(f"troubles     {tally.troubles.total()} ({count(tally.troubles)})")
    print(f"runs         {tally.runs}, {tally.commands} of them commands; resumes {tally.resumes}")
    print(f"chains       {tally.chains} brought to their end, equal to the undisturbed run")
    print(f"sentries     {tally.compared} compared bit for bit")
    if redone:
        more = sum(n > EVERY for n in redone)
        print(
            f"redone       median {redone[len(redone) // 2]}, most {redone[-1]} steps of a save"
            f" interval of {EVERY}; more than it {more} times, all with a save cut off in its"
            " middle"
        )
    print(f"losses       {len(tally.violations)}")
    print(f"seconds      {seconds:.0f}", flush=True)


def main(kills: int, seed: int) -> int:
    began, rng, tally = time.monotonic(), random.Random(seed), Tally(kills)
    folder = Path(tempfile.mkdtemp(prefix="torture_"))
    torch.set_num_threads(1)
    (folder / "try").mkdir()
    tried = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder / "try"], capture_output=True)
    can_mount = tried.returncode == 0
    if can_mount:
        subprocess.run(["umount", folder / "try"])
    else:
        print(f"skipped, no mount here: {', '.join(NEED_MOUNT)}", flush=True)
    references = {name: undisturbed(folder / name, name) for name in ("nf4", "none")}
    for number in range(10**6):
        name = ("nf4", "none")[number % 2]
        chain = Chain(folder / f"chain_{number}", name, references[name], can_mount)
        try:
            live_through(tally, rng, chain)
        finally:
            chain.close()
        if number % 5 == 0:
            print(f"{tally.kills.total()} kills, {time.monotonic() - began:.0f} s", flush=True)
        if tally.enough() or len(tally.violations) > 20:
            break
    report(tally, time.monotonic() - began)
    if not tally.violations:
        shutil.rmtree(folder)
    return 1 if tally.violations else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    raise SystemExit(main(options.kills, options.seed))
