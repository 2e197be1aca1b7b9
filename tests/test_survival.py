"""A run survives full disks, bad folders and stops, and goes on exactly as if nothing had happened.

    python -m pytest tests/test_survival.py

Real trainings, in this process, of a model of 14,000 parameters. What is proved of SIGKILL, of the
command line and of a lost RUN_DIR stands in test_train_cli.py, of single sentries and folders in
test_recover.py, and of all at once, hundreds of times, in torture/torture.py.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
import torch
import yaml
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_models import edit_state, tiny_settings, wait_for

import extend_tokenizer
import recover
import train
from config import UserError, load_config
from extend_tokenizer import plan_new_words, read_corpus

pytestmark = pytest.mark.usefixtures("quick")
NOT_COMPARED = ("step_seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    return tiny_settings(tmp_path_factory.mktemp("tiny"))


def run(settings: dict, run_dir: Path, *, fresh=False, step=None, **changes) -> dict:
    path = run_dir.with_suffix(".yaml")
    values = settings | {"run_dir": str(run_dir)} | changes
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return train.train(path, fresh=fresh, step=step)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in folder.glob("step_??????/state.json"))


def last_save(run_dir: Path, folder: str = "snapshots", step: int = 8) -> dict:
    """Read all of a save that must not depend on what happened on the way: rows, statistics,
    records, samples, best loss."""
    path = run_dir / folder / f"step_{step:06d}"
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    for name in ("files", "sha256", "versions", "config"):
        del state[name]
    records = [json.loads(line) for line in (path / "metrics.jsonl").open(encoding="utf-8")]
    records = [{k: v for k, v in r.items() if k not in NOT_COMPARED} for r in records]
    tensors = {n: t.numpy().tobytes() for n, t in load_file(path / "rows.safetensors").items()}
    samples = (path / "samples.md").read_text(encoding="utf-8")
    return {"state": state, "records": records, "samples": samples, **tensors}


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory) -> dict:
    """Make a run of eight steps that nothing disturbs, and read its last save."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    run(settings, run_dir)
    return last_save(run_dir)


class Killed(BaseException):
    """This is no error, so nothing may catch it."""


def die_at(monkeypatch, wanted: int) -> None:
    """Let training end without warning after the step, as a kill would end it."""
    real = train.Progress.step

    def step(self, number: int, *arguments) -> None:
        if number == wanted:
            monkeypatch.setattr(train.Progress, "step", real)
            raise Killed
        real(self, number, *arguments)

    monkeypatch.setattr(train.Progress, "step", step)


# ---- Continuing is exact -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quantization, output_rows",
    [("none", "separate"), ("none", "shared"), ("none", "frozen"), ("nf4", "separate")],
)
def test_n_steps_kill_n_steps_equal_2n(settings, tmp_path, monkeypatch, quantization, output_rows):
    """Rows, statistics, learning rate, losses, samples and best loss are the same bit for bit."""
    kind = {"quantization": quantization, "output_rows": output_rows}
    kind["prompts"] = ["the glimock saw"]
    run(settings, tmp_path / "straight", **kind)
    die_at(monkeypatch, 5)
    with pytest.raises(Killed):
        run(settings, tmp_path / "run", **kind)
    assert steps(tmp_path / "run" / "snapshots") == [2, 4]
    torch.manual_seed(999)  # a save holds no random state, and nothing depends on the global one
    run(settings, tmp_path / "run", **kind)
    wanted, got = (last_save(tmp_path / name) for name in ("straight", "run"))
    num_sets = {"shared": 1, "frozen": 2, "separate": 2}[output_rows]
    assert "random_state" not in wanted["state"]
    statistics = [name for name in wanted if name.endswith("mean_square")]
    assert len(statistics) == (4 if output_rows == "separate" else 2)
    assert sum(name in wanted for name in ("input_rows", "output_rows")) == num_sets
    assert got == wanted
    run_dir = tmp_path / "run"  # what the killed run wrote after its last save is gone
    saved = run_dir / "snapshots" / "step_000008" / "metrics.jsonl"
    assert (run_dir / "metrics.jsonl").read_bytes() == saved.read_bytes()
    keys = [(record["step"], record["kind"]) for record in got["records"]]
    assert keys == sorted(set(keys), key=lambda key: (key[0], key[1] == "eval"))
    assert [key for key in keys if key[1] == "train"] == [(n, "train") for n in range(1, 9)]


@hypothesis.settings(max_examples=2, deadline=None, derandomize=True, database=None)
@hypothesis.given(kills=st.sets(st.integers(1, 8), min_size=1, max_size=3))
def test_a_run_killed_after_any_steps_equals_a_straight_one(
    settings, straight, tmp_path_factory, kills
):
    run_dir = tmp_path_factory.mktemp("killed") / "run"
    for step in sorted(kills):  # a step is done again after a kill, until a save is past it
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            die_at(patch, step)
            run(settings, run_dir)
    run(settings, run_dir)
    assert last_save(run_dir) == straight


def test_a_run_folder_copied_to_another_place_goes_on_there(
    settings, tmp_path, monkeypatch, straight
):
    (tmp_path / "here").mkdir()
    die_at(monkeypatch, 5)
    with pytest.raises(Killed):
        run(settings, tmp_path / "here" / "run")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(tmp_path / "here")
    run(settings, tmp_path / "there" / "run")
    assert last_save(tmp_path / "there" / "run") == straight
    assert not (tmp_path / "here").exists()


def test_a_clock_that_goes_backwards_changes_nothing(settings, tmp_path, monkeypatch, straight):
    """The newest save is the one of the highest step, whatever the times of the files."""
    die_at(monkeypatch, 5)
    with pytest.raises(Killed):
        run(settings, tmp_path / "run")
    for path in sorted((tmp_path / "run").rglob("*"), reverse=True):
        step = int(*re.findall(r"step_(\d+)", str(path)) or "0")
        os.utime(path, (10**9 - step, 10**9 - step))  # the older the step, the newer the file
    clock = iter(range(10**9, 0, -1))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    run(settings, tmp_path / "run")
    assert last_save(tmp_path / "run") == straight
    records = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").open(encoding="utf-8")]
    assert all(record.get("step_seconds", 1) > 0 for record in records)


def test_a_second_training_of_a_run_is_refused_and_disturbs_nothing(
    settings, tmp_path, monkeypatch, straight
):
    real, lines = train.Progress.step, []

    def step(self, number: int, *arguments) -> None:
        if number == 3:
            for fresh in (False, True):
                with pytest.raises(UserError) as caught:
                    run(settings, tmp_path / "run", fresh=fresh)
                lines.append(str(caught.value))
        real(self, number, *arguments)

    monkeypatch.setattr(train.Progress, "step", step)
    run(settings, tmp_path / "run")
    line = f"run_dir: another training is using {tmp_path / 'run'}; wait for it, or give another"
    assert lines == [f"{line} run_dir"] * 2 and not list((tmp_path / "run").glob("old-*"))
    assert last_save(tmp_path / "run") == straight


def test_continuing_from_the_durable_folder_alone(settings, tmp_path, monkeypatch, straight):
    durable = tmp_path / "drive" / "saves"
    durable.parent.mkdir()
    die_at(monkeypatch, 7)
    with pytest.raises(Killed):
        run(settings, tmp_path / "run", sentry_dir=str(durable))
    shutil.rmtree(tmp_path / "run")
    run(settings, tmp_path / "run", sentry_dir=str(durable))
    assert last_save(tmp_path / "run") == last_save(tmp_path / "drive", "saves") == straight


def test_damaged_local_saves_never_replace_their_copies(settings, tmp_path, monkeypatch, straight):
    """Not even if their hashes agree, of the same step or of an older one."""
    durable = tmp_path / "drive" / "saves"
    durable.parent.mkdir()
    die_at(monkeypatch, 7)
    with pytest.raises(Killed):
        run(settings, tmp_path / "run", sentry_dir=str(durable), keep_sentries=9)
    assert steps(durable) == [2, 4, 6]
    good = {path: path.read_bytes() for path in durable.rglob("*") if path.is_file()}
    for path in (tmp_path / "run" / "snapshots").glob("step_*"):
        tensors = load_file(path / "rows.safetensors")
        save_file({n: torch.full_like(t, torch.nan) for n, t in tensors.items()}, path / "rows.new")
        (path / "rows.new").replace(path / "rows.safetensors")
        edit_state(path)
    run(settings, tmp_path / "run", sentry_dir=str(durable), keep_sentries=9)
    assert last_save(tmp_path / "run") == last_save(tmp_path / "drive", "saves") == straight
    assert {path: path.read_bytes() for path in good} == good


def test_more_steps_later(settings, tmp_path, straight):
    """max_steps may grow; what was trained stays as it is."""
    run(settings, tmp_path / "run")
    result = run(settings, tmp_path / "run", max_steps=10)
    assert result["step"] == 10
    records = last_save(tmp_path / "run", step=10)["records"]
    assert records[: len(straight["records"])] == straight["records"]


def test_a_step_by_name_and_what_was_newer(settings, tmp_path, straight, capsys):
    run(settings, tmp_path / "run", keep_sentries=9)
    run(settings, tmp_path / "run", keep_sentries=9, step=4)
    assert f"continuing from {tmp_path / 'run' / 'snapshots' / 'step_000004'}, step 4" in (
        capsys.readouterr().out
    )
    assert last_save(tmp_path / "run") == straight
    aside = {path.name for path in (tmp_path / "run" / "snapshots").glob("*.aside-1")}
    assert aside == {"step_000006.aside-1", "step_000008.aside-1"}


@pytest.mark.parametrize("keep", [1, 2])
def test_keep_sentries(settings, tmp_path, keep):
    run(settings, tmp_path / "run", keep_sentries=keep, sentry_dir=str(tmp_path / "drive"))
    wanted = [2, 4, 6, 8][-keep:]
    assert steps(tmp_path / "run" / "snapshots") == wanted
    assert steps(tmp_path / "drive")[-1] == 8 and len(steps(tmp_path / "drive")) <= keep


def test_the_save_of_the_lowest_held_out_loss_is_made_and_kept(settings, tmp_path, monkeypatch):
    """Step 3 has it, between two regular saves. Both folders keep it beside the newest, the next
    start too, and a lower loss takes its place."""
    real, losses = train.held_out_loss, iter([9.0, 4.0, 5.0, 4.5, 3.0])  # of steps 0, 3, 6, 9, 12
    monkeypatch.setattr(train, "held_out_loss", lambda *a: real(*a) | {"val_loss": next(losses)})
    how = {"eval_every": 3, "save_every": 4, "keep_sentries": 1, "sentry_dir": str(tmp_path / "d")}
    folders = [tmp_path / "run" / "snapshots", tmp_path / "d"]
    for max_steps, wanted, best in ((6, [3, 6], 4.0), (9, [3, 9], 4.0), (12, [12], 3.0)):
        run(settings, tmp_path / "run", max_steps=max_steps, **how)
        assert [steps(folder) for folder in folders] == [wanted, wanted]
        sentry, _ = recover.pick_sentry(folders, {}, "best")
        assert (sentry.step, sentry.state["val_loss"]) == (wanted[0], best)


def test_without_a_sentry_dir_the_two_folders_share_their_files(settings, tmp_path):
    run(settings, tmp_path / "run", max_steps=2)
    local, durable = (tmp_path / "run" / n / "step_000002" for n in ("snapshots", "sentries"))
    for name in ("rows.safetensors", "words.txt", "metrics.jsonl", "samples.md"):
        assert (local / name).samefile(durable / name)
    run(settings, tmp_path / "other", max_steps=2, sentry_dir=str(tmp_path / "drive"))
    saves = (tmp_path / "other" / "snapshots" / "step_000002", tmp_path / "drive" / "step_000002")
    assert not saves[0].joinpath("rows.safetensors").samefile(saves[1] / "rows.safetensors")


def test_fresh_moves_everything_and_only_when_the_new_run_can_start(settings, tmp_path):
    """A user's own notes move too; only the lock and the runs put aside before stay."""
    run_dir = tmp_path / "run"
    run(settings, run_dir, max_steps=2)
    (run_dir / "notes.txt").write_text("mine")
    names = {path.name for path in run_dir.iterdir()}
    with pytest.raises(UserError, match="the val text has"):
        run(settings, run_dir, fresh=True, seq_len=2000, max_steps=2)
    with pytest.raises(UserError) as caught:
        run(settings, run_dir, fresh=True, step=2, max_steps=2)
    assert str(caught.value) == "--fresh starts over, --step continues: give one of the two"
    assert {path.name for path in run_dir.iterdir()} == names
    run(settings, run_dir, fresh=True, max_steps=2)
    kept = {path.name for path in (run_dir / "old-1").iterdir()}
    assert kept == names - {".lock"}
    assert {path.name for path in run_dir.iterdir()} == names - {"notes.txt"} | {"old-1"}
    assert (run_dir / "old-1" / "notes.txt").read_text() == "mine"


def test_fresh_is_said_as_on_the_command_line_too_and_never_with_a_step(settings, tmp_path):
    run(settings, tmp_path / "run", max_steps=1)
    train.train(tmp_path / "run.yaml", "max_steps=2", "--fresh")
    assert steps(tmp_path / "run" / "snapshots")[-1] == 2
    assert (tmp_path / "run" / "old-1" / "snapshots" / "step_000001").is_dir()
    with pytest.raises(UserError) as caught:
        run(settings, tmp_path / "run", fresh=True, step=2)
    assert str(caught.value) == "--fresh starts over, --step continues: give one of the two"
    assert not (tmp_path / "run" / "old-2").exists()


def test_fresh_makes_a_lexicon_from_the_corpus_anew(settings, tmp_path):
    """The old run's list of words goes aside with it, but not if the new run cannot start."""
    run_dir, changed = tmp_path / "run", {"lexicon": "from_corpus", "max_steps": 2}
    run(settings, run_dir, **changed)
    lexicon = run_dir / "lexicon.txt"
    lexicon.write_text("glimock\n", encoding="utf-8")  # as after an edit by hand
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="the val text has"):
        run(settings, run_dir, fresh=True, seq_len=1000, **changed)
    with pytest.raises(UserError, match="no word of the corpus occurs 999 times"):
        run(settings, run_dir, fresh=True, lexicon_min_count=999, **changed)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    run(settings, run_dir, fresh=True, **changed)
    assert (run_dir / "old-1" / "lexicon.txt").read_text(encoding="utf-8") == "glimock\n"
    assert len(lexicon.read_text(encoding="utf-8").splitlines()) > 1
    words = (run_dir / "snapshots" / "step_000002" / "words.txt").read_text(encoding="utf-8")
    taken = lexicon.read_text(encoding="utf-8")
    # Second forms come last.
    assert words.startswith(taken) and set(words.split()) == set(taken.split())


@pytest.mark.parametrize("option", [{"fresh": True}, {"step": 2}])
def test_what_torchrun_would_repeat_at_each_restart_is_refused(
    settings, tmp_path, monkeypatch, option
):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    with pytest.raises(UserError) as caught:
        run(settings, tmp_path / "run", **option)
    assert str(caught.value) == (
        "--fresh and --step do not go with torchrun --max-restarts; run once without"
    )
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")  # what torchrun sets without the option
    assert run(settings, tmp_path / "run", fresh=True, max_steps=1)["step"] == 1


def test_a_save_of_the_old_format_is_continued(settings, tmp_path, monkeypatch):
    """Until November 2026 a save held a random state, a config had another interval for snapshots,
    rows of kin shared nothing, and words were known and matched by one rule each."""
    old = {"kin_coupling": 0.0, "known_words": "exact_string", "token_matching": "spaced"}
    run(settings, tmp_path / "straight", **old)
    die_at(monkeypatch, 5)
    with pytest.raises(Killed):
        run(settings, tmp_path / "run", **old)
    for marker in (tmp_path / "run").glob("s*/step_*/state.json"):
        state = json.loads(marker.read_text(encoding="utf-8"))
        state["random_state"] = {"cpu": "zmtoL9Qo4qUBAAAA"}
        state["config"]["snapshot_every"] = 2
        for name in old:
            del state["config"][name]
        del state["sha256"]
        marker.write_text(json.dumps(state), encoding="utf-8")
    (tmp_path / "run" / "cache").mkdir()  # the tokens were kept there
    with pytest.raises(UserError, match="kin_coupling: the run was started with 0.0, now it is 2"):
        run(settings, tmp_path / "run")
    run(settings, tmp_path / "run", **old)
    assert last_save(tmp_path / "run") == last_save(tmp_path / "straight")


def test_a_refused_command_changes_nothing(settings, tmp_path):
    """The tokenizer stays too, because the rows were trained with it."""
    run_dir = tmp_path / "run"
    run(settings, run_dir, max_steps=2)
    before = {path: path.read_bytes() for path in (run_dir / "tokenizer").iterdir()}
    with pytest.raises(UserError, match="token_matching: the run was started with 'both'"):
        run(settings, run_dir, token_matching="bare", max_steps=2)
    config = (run_dir / "config.yaml").read_bytes()
    words = ["token_matching=bare"]
    with pytest.raises(UserError) as caught:
        extend_tokenizer.main(str(run_dir / "config.yaml"), *words)
    assert str(caught.value) == (
        f"run_dir: {run_dir} holds saves with another tokenizer; give another"
    )
    (run_dir / "tokenizer" / "report.json").write_text("cut o")  # a damaged one is made again
    extend_tokenizer.main(str(run_dir / "config.yaml"), "eval_every=1")
    assert {path: path.read_bytes() for path in (run_dir / "tokenizer").iterdir()} == before
    assert (run_dir / "config.yaml").read_bytes() == config


def test_a_finished_run_says_so_and_more_steps_say_what_changes(
    settings, tmp_path, capsys, monkeypatch
):
    """It says so without loading the model, and a durable folder still gets what it lacks."""
    durable = {"sentry_dir": str(tmp_path / "drive")}
    first = run(settings, tmp_path / "run", max_steps=2, **durable)
    closing = capsys.readouterr().out.split("bits per byte of held-out text: ")[1]
    before = last_save(tmp_path / "run", step=2)
    shutil.rmtree(tmp_path / "drive")
    with monkeypatch.context() as patch:
        patch.setattr(train, "build_run", None)
        assert run(settings, tmp_path / "run", max_steps=2, **durable) == first
    said = capsys.readouterr().out
    assert said.count("step 2 of 2: nothing left to do; raise max_steps\n") == 1
    assert said.endswith(closing)
    assert steps(tmp_path / "drive") == [2]
    assert last_save(tmp_path / "run", step=2) == before
    run(settings, tmp_path / "run", max_steps=3)
    line = "max_steps was 2: from here the learning rate is that of the new one\n"
    assert capsys.readouterr().out.count(line) == 1


def test_fresh_keeps_the_old_run_aside_in_both_folders(settings, tmp_path):
    durable = tmp_path / "drive"
    for _ in range(3):
        run(settings, tmp_path / "run", sentry_dir=str(durable), fresh=True, max_steps=2)
        assert steps(tmp_path / "run" / "snapshots") == steps(durable) == [2]
    for folder in (tmp_path / "run" / "old-1" / "snapshots", durable / "old-1", durable / "old-2"):
        assert steps(folder) == [2]
    assert (tmp_path / "run" / "old-2" / "metrics.jsonl").exists()


# A changed value for every key. Those of the first group would make another training.
REFUSED = {
    "quantization": "nf4", "token_matching": "plain", "init": "spherical", "init_radius": 2.0,
    "output_rows": "shared", "seq_len": 8, "effective_batch_size": 8, "learning_rate": 0.02,
    "warmup_ratio": 0.2, "row_coupling": 0.5, "kin_coupling": 0.5, "max_grad_norm": 2.0, "seed": 7,
    "val_fraction": 0.2, "model_name": "other", "model_revision": "main",
    "known_words": "exact_string",
}  # fmt: skip
ALLOWED = {
    "compute_dtype": "bfloat16", "device": "auto", "micro_batch_size": 2, "max_steps": 9,
    "gradient_checkpointing": "true", "compile": "false", "log_every": 3, "eval_every": 3,
    "save_every": 3, "keep_sentries": 5, "run_dir": "x", "sentry_dir": "y",
    "max_gpu_gib": 5.0, "max_host_gib": 2.0, "prompts": ["a"], "tensorboard": True,
    "trust_remote_code": True, "lexicon": "l", "corpus": "c", "lexicon_min_count": 7,
    "lexicon_min_base_tokens": 7, "lexicon_skip_capitalized": True, "lexicon_exclude": "e",
}  # fmt: skip


def test_each_key_of_a_changed_config(settings, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings | {"run_dir": "r"}), encoding="utf-8")
    config = load_config(path)
    old = json.loads(json.dumps(dataclasses.asdict(config)))
    assert {*REFUSED, *ALLOWED} == set(old), "a key is in neither group"
    for name, value in REFUSED.items():
        assert train.changed_keys(old, dataclasses.replace(config, **{name: value})) == [
            f"{name}: the run was started with {old[name]!r}, now it is {value!r}"
        ]
    for name, value in ALLOWED.items():
        value = tuple(value) if isinstance(value, list) else value
        assert not train.changed_keys(old, dataclasses.replace(config, **{name: value}))


def test_a_changed_lexicon_is_named_in_words_and_other_changes_beside_it(settings, tmp_path):
    run(settings, tmp_path / "run", max_steps=2)
    words = Path(settings["lexicon"]).read_text(encoding="utf-8").split()
    lexicon, corpus = tmp_path / "other.txt", tmp_path / "corpus.txt"
    lexicon.write_text("\n".join([*words[3:], "day", "by"]), encoding="utf-8")
    corpus.write_text(Path(settings["corpus"]).read_text(encoding="utf-8") + "more\n")
    changes = {"lexicon": str(lexicon), "corpus": str(corpus), "seed": 7, "max_steps": 2}
    for step in (None, 2):
        with pytest.raises(UserError) as caught:
            run(settings, tmp_path / "run", step=step, **changes)
        assert caught.value.problems == (
            "seed: the run was started with 42, now it is 7",
            "the lexicon changed: 2 words added, 3 gone",
            "corpus: its text is not the one that the run was started with",
            "put these keys back to continue, or start over with --fresh (the old run is kept"
            " aside)",
        )
    lexicon.write_text("\n".join(words[::-1]), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        run(settings, tmp_path / "run", lexicon=str(lexicon), max_steps=2)
    line = "the lexicon changed: 0 words added, 0 gone; the same words have other ids"
    assert caught.value.problems[0] == line
    # As a notebook's user does what the error advises.
    path = (tmp_path / "run").with_suffix(".yaml")
    assert train.train(load_config(path), "--fresh", "max_steps=1")["step"] == 1
    assert (tmp_path / "run" / "old-1" / "snapshots" / "step_000002").is_dir()


def test_the_last_step_is_saved_and_an_evaluated_one_only_if_it_is_the_best(
    settings, tmp_path, monkeypatch
):
    real, losses = train.held_out_loss, iter([1.0, 9.0, 8.0, 9.0])  # of steps 0, 2, 4, 5
    monkeypatch.setattr(train, "held_out_loss", lambda *a: real(*a) | {"val_loss": next(losses)})
    run(settings, tmp_path / "run", max_steps=5, save_every=100, eval_every=2)
    assert steps(tmp_path / "run" / "snapshots") == [5]


def test_a_continued_run_keeps_its_loss_scale(settings, tmp_path):
    """float16 alone has one; 200 good steps would double it."""
    how = {"compute_dtype": "float16", "keep_sentries": 1}
    run(settings, tmp_path / "run", max_steps=2, **how)
    for path in (tmp_path / "run").glob("s*/step_000002/state.json"):
        state = json.loads(path.read_text(encoding="utf-8"))
        assert state["loss_scale"] == {"value": 65536.0, "good_steps": 2}
        edit_state(path.parent, loss_scale={"value": 1024.0, "good_steps": 198})
    run(settings, tmp_path / "run", max_steps=4, **how)
    state = last_save(tmp_path / "run", step=4)["state"]
    assert state["loss_scale"] == {"value": 2048.0, "good_steps": 200}


def test_a_save_whose_rows_do_not_fit_the_run_is_refused_by_name(settings, tmp_path):
    run(settings, tmp_path / "run", max_steps=2)
    for path in (tmp_path / "run").glob("s*/step_000002"):
        tensors = load_file(path / "rows.safetensors")
        tensors["output_rows"] = tensors["output_rows"][1:].clone()
        save_file(tensors, path / "rows.safetensors")
        edit_state(path)
    with pytest.raises(UserError) as caught:
        run(settings, tmp_path / "run")
    path = tmp_path / "run" / "snapshots" / "step_000002"
    assert str(caught.value) == f"{path}: output_rows is missing or not of shape [20, 32]"


def test_tensorboard_without_its_package_is_refused_before_anything_is_loaded(
    settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "installed_version", lambda name: "")
    with pytest.raises(UserError) as caught:
        run(settings, tmp_path / "run", tensorboard=True)
    line = "tensorboard: true, but the package is missing; pip install tensorboard"
    assert str(caught.value) == line and not (tmp_path / "run").exists()


def test_a_finished_run_keeps_its_settings(settings, tmp_path):
    run(settings, tmp_path / "run", max_steps=4)
    path = tmp_path / "run" / "config.yaml"
    before = path.read_bytes()
    assert run(settings, tmp_path / "run", max_steps=2, log_every=7)["step"] == 4
    assert path.read_bytes() == before
    path.unlink()
    run(settings, tmp_path / "run", max_steps=2)
    assert load_config(path).max_steps == 2


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.25, 1.0])
def test_every_step_trains(settings, tmp_path, warmup_ratio):
    """The cosine from the peak ends one step past the last one; one step alone moves rows."""
    path = (tmp_path / "run").with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings | {"run_dir": "r"}), encoding="utf-8")
    config = load_config(path, "max_steps=8", f"warmup_ratio={warmup_ratio}", "learning_rate=1")
    rates = [train.learning_rate_at(step, config) for step in range(1, 9)]
    warm = round(8 * warmup_ratio)
    wanted = [step / warm for step in range(1, warm + 1)]
    wanted += [0.5 + 0.5 * math.cos(math.pi * n / (9 - warm)) for n in range(1, 9 - warm)]
    assert rates == pytest.approx(wanted) and min(rates) > 0
    run(settings, tmp_path / "run", max_steps=1, warmup_ratio=warmup_ratio)
    rows = load_file(tmp_path / "run" / "snapshots" / "step_000001" / "rows.safetensors")
    run(settings, tmp_path / "other", max_steps=1, learning_rate=1e-12)
    before = load_file(tmp_path / "other" / "snapshots" / "step_000001" / "rows.safetensors")
    assert (rows["input_rows"] - before["input_rows"]).abs().max() > 1e-3


# ---- Disks ---------------------------------------------------------------------------------------


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_for_tensors(*_, **__):
    """Raise what safetensors 0.8.0 raises on a full disk."""
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("where", ["in the save", "in a small file"])
def test_a_full_local_disk(settings, tmp_path, monkeypatch, straight, where):
    """One line says it, the sentry before stays whole, and after making room the run goes on."""
    with monkeypatch.context() as patch:
        real = train.Records.add

        def fill_up(self, record: dict) -> None:
            real(self, record)
            if record["step"] == 3:
                snapshots = tmp_path / "run" / "snapshots"
                wait_for(lambda: steps(snapshots), "no save came")  # it is written beside us
                if where == "in the save":
                    patch.setattr(recover, "save_file", no_space_for_tensors)
                else:
                    patch.setattr(train, "write_text", no_space)

        patch.setattr(train.Records, "add", fill_up)
        with pytest.raises(UserError) as caught:
            run(settings, tmp_path / "run", max_steps=8)
    assert len(caught.value.problems) == 1
    line = str(caught.value)
    folder = tmp_path / "run" / ("snapshots" if where == "in the save" else "")
    assert line.startswith(f"{folder}: ") and "No space left on device" in line
    assert line.endswith("make room, then run the same command again")
    assert steps(tmp_path / "run" / "snapshots")[0] == 2
    run(settings, tmp_path / "run")
    assert last_save(tmp_path / "run") == straight


def test_a_save_that_fails_in_the_background_ends_the_run_long_before_the_next_one(
    settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(recover, "save_file", no_space_for_tensors)
    with pytest.raises(UserError, match="No space left on device"):
        run(settings, tmp_path / "run", max_steps=60, save_every=20, eval_every=100)
    records = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert 20 <= json.loads(records[-1])["step"] < 40


def test_a_run_folder_that_cannot_be_made(settings, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    run_dir = tmp_path / "file" / "run"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings | {"run_dir": str(run_dir)}), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        train.train(path)
    line = f"run_dir: [Errno 20] Not a directory: '{run_dir}'; give a folder that can be written"
    assert str(caught.value) == line


def test_errors_that_are_not_the_disks_keep_their_traceback(settings, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(train, "loss_table", broken)
    with pytest.raises(FileNotFoundError):
        run(settings, tmp_path / "run")


def at_first_step(patch, act) -> None:
    """Call act() when the first step is done, long before the first save."""
    real = train.Progress.step

    def step(self, number: int, *arguments) -> None:
        if number == 1:
            act()
        real(self, number, *arguments)

    patch.setattr(train.Progress, "step", step)


@pytest.mark.parametrize("trouble", ["missing", "a file", "read-only", "full"])
def test_a_durable_folder_that_takes_nothing_is_found_before_anything_is_loaded(
    settings, tmp_path, monkeypatch, trouble
):
    """A Drive that is not mounted must not be made on the local disk, and lost with it."""
    durable, loaded = tmp_path / "drive" / "saves", []
    monkeypatch.setattr(train, "read_corpus", lambda config: loaded.append(config))
    line = f"sentry_dir: {durable.parent} is missing, in which saves would be made; mount the Drive"
    line += ", or make that folder"
    if trouble != "missing":
        durable.parent.mkdir()
        line = f"sentry_dir: [Errno 17] File exists: '{durable}'; give a folder that can be written"
        durable.write_text("x") if trouble == "a file" else durable.mkdir()
    if trouble in ("read-only", "full"):  # root, who runs this in a container, may write everywhere
        number = {"read-only": errno.EROFS, "full": errno.ENOSPC}[trouble]

        def refuse(*_, **__):
            raise OSError(number, os.strerror(number))

        file = contextlib.nullcontext(SimpleNamespace(write=refuse))  # a full disk takes names
        make = refuse if trouble == "read-only" else lambda **_: file
        monkeypatch.setattr(train.tempfile, "TemporaryFile", make)
        line = f"sentry_dir: [Errno {number}] {os.strerror(number)}; give a folder that can be"
        line += " written"
    with pytest.raises(UserError) as caught:
        run(settings, tmp_path / "run", sentry_dir=str(durable))
    assert (str(caught.value), loaded) == (line, [])
    assert trouble != "missing" or not durable.parent.exists()


@pytest.mark.parametrize("trouble", ["gone", "read-only", "hangs", "full"])
def test_a_durable_folder_in_trouble(settings, tmp_path, monkeypatch, capsys, straight, trouble):
    """Training goes on to the same end. One warning names the steps at risk, and the last line says
    what to copy by hand. When the folder is back, the next run's saves are there."""
    durable, gate = tmp_path / "drive" / "saves", threading.Event()
    durable.parent.mkdir()
    before = set(threading.enumerate())
    with monkeypatch.context() as patch:
        if trouble == "gone":
            at_first_step(patch, lambda: durable.rmdir() or durable.write_text("not a folder"))
        elif trouble == "hangs":
            real = shutil.copyfile
            blocked = lambda *arguments: (gate.wait(30), real(*arguments))  # noqa: E731
            patch.setattr(shutil, "copyfile", blocked)
            patch.setattr(recover, "SLOW_COPY_NOTICE_SECONDS", 0.0)
            patch.setattr(recover.SentryWriter.finish, "__defaults__", (0.1,))
        elif trouble == "read-only":  # root, who runs this in a container, may write everywhere
            real_mkdir = Path.mkdir

            def mkdir(path: Path, *arguments, **keywords):
                if durable in (path, *path.parents):
                    raise OSError(errno.EROFS, "Read-only file system")
                real_mkdir(path, *arguments, **keywords)

            at_first_step(patch, lambda: patch.setattr(Path, "mkdir", mkdir))
        else:
            patch.setattr(shutil, "copyfile", no_space)
        result = run(settings, tmp_path / "run", sentry_dir=str(durable))
    gate.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)  # what hung is through before the next run begins
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning:" in line]
    warnings = [line for line in warnings if str(durable) in line]
    assert result["step"] == 8 and last_save(tmp_path / "run") == straight
    assert len(warnings) == 2, warnings
    assert "all steps up to " in warnings[0] and "are on the local disk only" in warnings[0]
    assert warnings[1] == (
        f"warning: {durable} holds nothing; step 8 is in {tmp_path / 'run' / 'snapshots'} alone:"
        " copy it by hand before this machine goes away"
    )
    if trouble == "gone":
        durable.unlink()
    run(settings, tmp_path / "run", sentry_dir=str(durable))  # nothing to train, one save to copy
    assert last_save(tmp_path / "drive", "saves") == straight


@pytest.mark.parametrize("spoiled", ["nothing", "rows", "words"])
def test_a_start_mends_the_durable_copy_of_what_it_continues_from(settings, tmp_path, spoiled):
    """A copy that is whole stays as it is; a damaged one, or one of other words, is made again."""
    durable = tmp_path / "drive"
    run(settings, tmp_path / "run", sentry_dir=str(durable))
    save, local = durable / "step_000008", tmp_path / "run" / "snapshots" / "step_000008"
    if spoiled == "rows":
        (save / "rows.safetensors").write_bytes(b"")
    elif spoiled == "words":
        edit_state(save, words_sha256="0")
    before = save.stat().st_ino, (save / "state.json").stat().st_mtime_ns
    run(settings, tmp_path / "run", sentry_dir=str(durable))
    after = save.stat().st_ino, (save / "state.json").stat().st_mtime_ns
    assert (before == after) == (spoiled == "nothing")
    for path in local.iterdir():
        assert (save / path.name).read_bytes() == path.read_bytes()


def test_copying_resumes_within_the_run(settings, tmp_path, monkeypatch, capsys, straight):
    durable, real, warn = tmp_path / "drive", train.Progress.step, recover.SentryWriter.warn
    warned = threading.Event()

    def step(self, number: int, *arguments) -> None:
        if number == 1:
            durable.rmdir()
            durable.write_text("not a folder")
        if number == 5:
            assert warned.wait(60)
            durable.unlink()
        real(self, number, *arguments)

    monkeypatch.setattr(recover.SentryWriter, "warn", lambda *a: (warn(*a), warned.set()))
    monkeypatch.setattr(train.Progress, "step", step)
    run(settings, tmp_path / "run", sentry_dir=str(durable))
    said = capsys.readouterr().out
    assert said.count("warning: ") - said.count("warning: above") == 1
    assert f"{durable} answers again; step " in said
    assert steps(durable)[-1] == 8 and last_save(tmp_path, "drive") == straight


# ---- Stops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_not_finite_stops_before_the_update(settings, tmp_path, monkeypatch, straight, what):
    """The line names the step and its sequences; rows stay those of the step before."""
    real, seen = train.run_step, []

    def run_step(plan, batch, overlay, *arguments):
        loss_sum, following = real(plan, batch, overlay, *arguments)
        seen.append(overlay.input_rows.clone())
        if len(seen) == 6:
            seen.append(overlay)
            if what == "loss":
                return loss_sum * torch.nan, following
            overlay.input_grad[0, 0] = torch.inf
        return loss_sum, following

    with monkeypatch.context() as patch:
        patch.setattr(train, "run_step", run_step)
        with pytest.raises(UserError) as caught:
            run(settings, tmp_path / "run")
    config = load_config((tmp_path / "run").with_suffix(".yaml"))
    texts = read_corpus(config)
    data = train.load_data(config, plan_new_words(config, texts), texts)
    num_sequences = train.count_sequences(data.train, config.seq_len)
    numbers = train.step_sequence_numbers(6, 4, num_sequences, config.seed).tolist()
    assert f" on sequences {numbers}; stopped before the update" in str(caught.value)
    assert str(caught.value).startswith("step 6: loss ")
    assert torch.equal(seen[-1].input_rows, seen[5])
    assert steps(tmp_path / "run" / "snapshots") == [2, 4]
    run(settings, tmp_path / "run")
    assert last_save(tmp_path / "run") == straight


@pytest.mark.parametrize("moment", ["evaluate", "update"])
def test_a_stop_signal_at_any_moment_leaves_a_sentry(
    settings, tmp_path, monkeypatch, straight, moment
):
    """A signal that comes too late for its own step ends the run after the next one."""
    owner = {"evaluate": train.Run, "update": train.Optimizer}[moment]
    real, calls = getattr(owner, moment), []

    def signalled(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, signalled)
        result = run(settings, tmp_path / "run", save_every=100)
    assert result["stopped"] == "SIGTERM" and result["step"] in (3, 5)
    best = {4} if moment == "evaluate" else set()  # the evaluation's own save
    assert set(steps(tmp_path / "run" / "snapshots")) == {*best, result["step"]}
    assert run(settings, tmp_path / "run")["step"] == 8
    assert last_save(tmp_path / "run") == straight


def test_a_second_stop_signal_ends_at_once(settings, tmp_path, monkeypatch):
    real = train.Optimizer.update

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(train.Optimizer, "update", signalled)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "run")
    assert not steps(tmp_path / "run" / "snapshots")


def test_a_stop_signal_while_the_model_loads_ends_before_the_first_step(
    settings, tmp_path, monkeypatch
):
    real = train.load_model
    monkeypatch.setattr(
        train, "load_model", lambda *a: (os.kill(os.getpid(), signal.SIGINT), real(*a))[1]
    )
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings | {"run_dir": str(tmp_path / "run")}), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        train.main(str(path))
    line = "stopped by SIGINT before the first step; the same command goes on from there"
    assert str(caught.value) == line and not (tmp_path / "run" / "snapshots").exists()


def test_a_stop_signal_ends_no_other_program(settings, tmp_path):
    """Afterwards the signals do what they did before."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run(settings, tmp_path / "run", max_steps=1)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_durable_folder_that_hangs_at_the_start_is_named(settings, tmp_path, monkeypatch, capsys):
    """Without these saves the run could begin again from nothing, so it waits and says so."""
    durable, real = tmp_path / "drive", train.pick_sentry
    monkeypatch.setattr(train, "SLOW_START_NOTICE_SECONDS", 0.05)
    monkeypatch.setattr(train, "pick_sentry", lambda *rest: (time.sleep(0.5), real(*rest))[1])
    assert run(settings, tmp_path / "run", sentry_dir=str(durable), max_steps=2)["step"] == 2
    line = f"still waiting for {durable}: the newest sentry may be there, so nothing starts yet"
    assert capsys.readouterr().out.splitlines().count(line) == 1
