"""Proves that `recover.py generate` writes what the model with the run's rows says, as it comes.

    python -m pytest tests/test_generate.py

A tiny random model, a real extended tokenizer, and two sentries of random rows (test_export.py
makes them). The reference is model.generate without streaming.
"""

import io
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_export import make_run
from tiny_models import FIRST_NEW_ID, edit_state, make_tokenizer
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModelForCausalLM

import recover
from config import Config, UserError
from overlay import WakeOverlay
from recover import TextStream, generate, main, write_sentry

PROMPT, SHORT = "the riverrun", {"max_new_tokens": 12}


def with_step_60(run: Path) -> Path:
    """Add a sentry of the same rows in another order, as step 60."""
    sentry = recover.newest_sentry(run)
    tensors = {n: t.flip(0) for n, t in load_file(sentry.path / "rows.safetensors").items()}
    files = {p.name: p for p in sentry.path.iterdir()}
    texts = {name: files[name].read_text() for name in ("metrics.jsonl", "samples.md", "words.txt")}
    write_sentry(run / "snapshots", tensors, texts, sentry.state | {"step": 60})
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return with_step_60(make_run(tmp_path_factory.mktemp("generate"), device="cpu"))


def reference(run: Path, seed: int = 42, step: int | None = 60, prompt=PROMPT, **how) -> str:
    """What the base model writes with a sentry's rows; step None: the untouched one."""
    model = AutoModelForCausalLM.from_pretrained(run.parent / "model", dtype=torch.float32)
    folder = run / "tokenizer" if step else run.parent / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if step:
        rows = load_file(run / "snapshots" / f"step_{step:06d}" / "rows.safetensors")
        WakeOverlay(model, FIRST_NEW_ID, rows["input_rows"], rows.get("output_rows")).install()
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    settings = {"do_sample": True, "top_p": 0.95, "top_k": 0, **SHORT} | how
    torch.manual_seed(seed)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)
    return tokenizer.decode(out[0].tolist())


# ---- The text ------------------------------------------------------------------------------------


def test_the_text_is_that_of_model_generate_and_the_seed_decides_it(run: Path, capsys) -> None:
    """One call, as in a notebook: a text for the folder, the text back, and the same printed."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    text = generate(str(run), PROMPT, **SHORT)
    assert torch.equal(torch.get_rng_state(), before)
    assert text == reference(run) and text.startswith(PROMPT)
    assert capsys.readouterr().out == text + "\n"
    assert generate(run, PROMPT, **SHORT) == text
    other = generate(run, PROMPT, seed=7, **SHORT)
    assert other == reference(run, seed=7) != text


@pytest.mark.parametrize("family, separate", [("gemma2", None), ("qwen2_tied", True)])
def test_shared_and_separate_rows_of_tied_models(family, separate, tmp_path: Path) -> None:
    run = with_step_60(make_run(tmp_path, family, separate=separate, device="cpu"))
    assert generate(run, PROMPT, **SHORT) == reference(run)


def test_the_rows_of_a_gpus_run_are_tried_out_where_there_is_none(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    run = with_step_60(make_run(tmp_path, device="cuda"))
    assert generate(run, PROMPT, **SHORT) == reference(run)


def test_options(run: Path, capsys) -> None:
    """Each option of the command line reaches model.generate; temperature 0 is greedy."""
    for options, how in (
        (["--temperature", "0.5", "--top-p", "0.8"], {"temperature": 0.5, "top_p": 0.8}),
        (["--temperature", "0"], {"do_sample": False, "top_p": None, "top_k": None}),
        (["--max-new-tokens", "3", "--seed", "7"], {"max_new_tokens": 3, "seed": 7}),
        (["--step", "40"], {"step": 40}),
    ):
        main("generate", str(run), PROMPT, "--max-new-tokens", "12", *options)
        assert capsys.readouterr().out == reference(run, **how) + "\n", options


def test_base_model_too(run: Path, monkeypatch, capsys) -> None:
    """The untouched model writes first, for every prompt; it knows the word only by its letters."""
    base, trained = reference(run, step=None), reference(run)
    assert base != trained
    both = f"---- the untouched model\n{base}\n---- step 60\n{trained}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n{PROMPT}\n"))
    main("generate", str(run), "--base-model-too", "--max-new-tokens", "12")
    assert capsys.readouterr().out == both + both


# ---- As it comes ---------------------------------------------------------------------------------


def shown(*pieces: str | list[int]) -> tuple[list[str], TextStream]:
    """Give a stream the ids of texts and words one after another -> all that it showed."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(" glim", normalized=False)])
    parts: list[str] = []
    stream = TextStream(tokenizer, FIRST_NEW_ID, ("<", ">"), parts.append)
    ids = [i for p in pieces for i in (p if isinstance(p, list) else tokenizer.encode(p).ids)]
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert stream.text == tokenizer.decode(ids)
    return parts, stream


def test_half_letters_are_held_back_until_they_are_whole() -> None:
    half = make_tokenizer().encode("é").ids[:1]
    for pieces, wanted in (
        (["naïve €", [FIRST_NEW_ID], "😀é."], "naïve € <glim>😀é."),
        (["é", half], "é\ufffd"),  # the text ends in the middle of a letter
        ([half, [FIRST_NEW_ID], "."], "\ufffd <glim>."),
        (["a", half, "b"], "a\ufffdb"),
        (["\ufffd"], "\ufffd"),
        ([], ""),
    ):
        parts, _ = shown(*pieces)
        assert "".join(parts) == wanted
    parts, _ = shown("a😀b")
    assert [part for part in parts if part] == ["a", "😀", "b"]


def test_every_token_is_shown_when_it_comes(run: Path, monkeypatch) -> None:
    times: list[float] = []
    put = TextStream.put
    monkeypatch.setattr(TextStream, "put", lambda *a: (times.append(time.monotonic()), put(*a)))
    generate(run, PROMPT, **SHORT)
    assert len(times) == 13 and times == sorted(set(times))  # the prompt, and each of the tokens


def read_until(fd: int, wanted: str) -> str:
    """Read a terminal until it shows a text, or nobody writes to it any more."""
    found = ""
    while wanted not in found and select.select([fd], [], [], 120)[0]:
        try:
            found += os.read(fd, 4096).decode("utf-8", "replace")
        except OSError:
            break
    return found


def start(run: Path, *options: str, **streams) -> subprocess.Popen:
    script = str(Path(recover.__file__))
    command = [sys.executable, script, "generate", str(run), "--max-new-tokens", "5", *options]
    return subprocess.Popen(command, **streams)


def test_on_a_terminal_it_asks_and_new_words_are_bold(run: Path) -> None:
    """Ctrl-C at the question ends it without a traceback."""
    ours, theirs = pty.openpty()
    process = start(run, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    ask = "prompt, or Enter to end: "
    assert f"step 60: loading {run.parent / 'model'}\r\n" in read_until(ours, ask)
    os.write(ours, f"{PROMPT}\n".encode())
    assert "the \033[1mriverrun\033[0m" in read_until(ours, ask)
    time.sleep(1)  # a signal between readline's print and its wait is seen at the next key alone
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in read_until(ours, "Traceback")
    os.close(ours)
    assert process.wait(60) == 0


def test_in_a_pipe_it_is_plain_text_alone(run: Path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\nthe quark\n\nnot read\n"))
    assert recover.run_command(main, "generate", str(run), "--max-new-tokens", "5") == 0
    texts = [reference(run, prompt=p, max_new_tokens=5) for p in (PROMPT, "the quark")]
    assert capfd.readouterr().out == "".join(f"{text}\n" for text in texts)


@pytest.mark.parametrize("lines", ["", "\n"])
def test_nothing_asked_for(lines: str, run: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert generate(run) == ""
    assert capsys.readouterr().out == ""


# ---- Which save, and what is refused -------------------------------------------------------------


def test_step_of_export_and_neighbours(run: Path, tmp_path: Path, capsys) -> None:
    for step in (40, 60):
        out, chosen = tmp_path / str(step), ["--step", str(step)]
        main("export", str(run), str(out), "--format", "rows", *chosen)
        rows = (run / "snapshots" / f"step_{step:06d}" / "rows.safetensors").read_bytes()
        assert (out / "rows.safetensors").read_bytes() == rows
        main("neighbors" if step == 40 else "neighbours", str(run), *chosen)
        assert capsys.readouterr().out.count(f"step {step}") == 2
    for command in (("export", str(run), str(tmp_path / "x"), "--format", "rows"),
                    ("neighbours", str(run)), ("generate", str(run), "a")):  # fmt: skip
        assert refusal(*command, "--step", "50") == (
            f"no whole sentry of step 50 in {run / 'snapshots'}, {run / 'sentries'}, {run}"
        )
    assert not (tmp_path / "x").exists()


def test_the_best_save_by_name(run: Path, tmp_path: Path, capsys) -> None:
    """Of steps 40 and 60 the one with the lower held-out loss at that very step."""
    with pytest.raises(UserError, match="no whole sentry of an evaluated step in "):
        generate(run, PROMPT, step="best", **SHORT)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for step, loss in ((40, 4.0), (60, 4.5)):
        edit_state(copy / "snapshots" / f"step_{step:06d}", val_loss=loss)
    assert generate(copy, PROMPT, step="best", **SHORT) == reference(run, step=40)
    main("export", str(copy), str(tmp_path / "x"), "--format", "rows", "--step", "best")
    assert "step 40 as rows: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main("export", str(copy), str(tmp_path / "x"), "--format", "rows", "--step", "bets")


def test_relative_paths_begin_where_the_run_was_started(tmp_path: Path, monkeypatch) -> None:
    """The base model and sentry_dir are found from everywhere, and the run's folder may move."""
    (tmp_path / "started").mkdir()
    monkeypatch.chdir(tmp_path / "started")
    run = with_step_60(make_run(Path(), device="cpu", sentry_dir="drive"))
    assert recover.run_settings(run)["model_name"] == "model"
    wanted = generate(run, PROMPT, **SHORT)
    shutil.move(run / "snapshots", "drive")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(run, tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert generate("moved", PROMPT, **SHORT) == wanted
    main("export", "moved", "out", "--format", "merged")
    main("neighbours", "moved", "quark")


def test_what_is_loaded_and_downloaded_is_said_with_its_size(tmp_path: Path, monkeypatch) -> None:
    import huggingface_hub

    def snapshot_download(name, dry_run=False, revision=None, allow_patterns=None):
        if name == "some/one":
            raise huggingface_hub.errors.LocalEntryNotFoundError("offline")
        assert dry_run and (revision, allow_patterns) == (None, ["*.safetensors"])
        sizes = {"some/where": (True, 29.5e9, 4e8), "some/here": (False, 2e6)}[name]
        return [SimpleNamespace(file_size=s, will_download=sizes[0]) for s in sizes[1:]]

    def line(name: object) -> str:
        keys = {"lexicon": "-", "corpus": "-", "run_dir": "-"}
        return recover.loading_line(Config(model_name=str(name), **keys))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    minute = " (30 GB take about a minute)"
    assert line("some/where") == (
        f"loading some/where, 29.9 GB{minute}; 29.9 GB of it are downloaded first"
    )
    assert line("some/here") == f"loading some/here, 2.0 MB{minute}"
    assert line("some/one") == "loading some/one"
    with open(tmp_path / "model.safetensors", "wb") as file:
        assert line(tmp_path) == f"loading {tmp_path}"  # a small one is there at once
        file.truncate(15 * 10**8)  # takes no room on the disk
        assert line(tmp_path) == f"loading {tmp_path}, 1.5 GB{minute}"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: None)  # before 1.0
    said = "loading some/where; what is not on this disk yet is downloaded first"
    assert line("some/where") == said


def refusal(*command: str) -> str:
    with pytest.raises(UserError) as caught:
        main(*command)
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_saves_own_folder_is_no_run(run: Path, tmp_path: Path, monkeypatch) -> None:
    """What to give is the run, or the sentry_dir that lies elsewhere."""
    drive = tmp_path / "drive"
    saves = [(run / "snapshots" / "step_000040", run), (drive / "step_000060", drive)]
    recover.copy_sentry(run / "snapshots" / "step_000060", drive)
    for save, wanted in saves:
        line = (
            f"{save}: is one save of a run; give {wanted}, and export, generate and neighbours take"
            f" --step {int(save.name[5:])} for this save"
        )
        assert refusal(str(save)) == line
        assert refusal("generate", str(save), "a") == line
        assert refusal("neighbours", str(save)) == line
        assert refusal("export", str(save), str(tmp_path / "x"), "--format", "rows") == line
    monkeypatch.chdir(saves[0][0])
    assert refusal(".").startswith(f".: is one save of a run; give {run}, and")


def test_refusals(run: Path, tmp_path: Path) -> None:
    none = make_run(tmp_path)
    for path in (none / "snapshots" / "step_000040").iterdir():
        path.unlink()
    (none / "snapshots" / "step_000040").rmdir()
    text = refusal("generate", str(none), "a")
    assert text == f"{none}: holds no sentry; train.py has not saved there yet"
    gone = tmp_path / "gone"
    text = refusal("generate", str(run), "a", "--base", str(gone))
    assert text == f"model {gone}: neither a local folder nor on the hub; --base names its folder"
    (gone / "sub").mkdir(parents=True)
    assert refusal("generate", str(run), "a", "--base", str(gone)).startswith(f"model_name: {gone}")
    assert refusal("generate", str(run), "") == "prompt: '' has no tokens; give some text"
    wrong = (
        "generate: temperature is at least 0, top_p above 0 and at most 1, max_new_tokens at"
        " least 1"
    )
    for option, value in (("temperature", "-1"), ("top-p", "0"), ("max-new-tokens", "0")):
        assert refusal("generate", str(run), "a", f"--{option}", value) == wrong


def test_a_model_whose_own_generate_fails_is_one_line(run: Path, monkeypatch) -> None:
    """As xLSTM's does in transformers 5.24.0, with the state that it keeps between tokens."""

    def generate(*_, **__):
        raise ValueError("matC_old has wrong shape,\ngot 4")

    monkeypatch.setattr("transformers.Qwen2ForCausalLM.generate", generate)
    assert refusal("generate", str(run), "a") == (
        "Qwen2ForCausalLM cannot continue a prompt (ValueError: matC_old has wrong shape, got 4);"
        " train it with prompts=null"
    )


def test_a_full_gpu_is_one_line(run: Path, monkeypatch) -> None:
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate 2 GiB")

    monkeypatch.setattr(recover, "load_model", full)
    assert re.fullmatch(
        r"out of GPU memory: end what .+ \(CUDA out of memory. Tried to allocate 2 GiB\)",
        refusal("generate", str(run), "a"),
    )


def test_a_prompt_in_decomposed_letters_meets_the_words_of_the_corpus() -> None:
    """Lexicon and corpus are read in composed form."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("rivérun", normalized=False)])
    composed, decomposed = "the rivérun", "the rive\u0301run"
    assert recover.prompt_ids(tokenizer, decomposed) == tokenizer.encode(composed).ids
    assert tokenizer.encode(decomposed).ids != tokenizer.encode(composed).ids
