"""Proves in real Jupyter kernels: pasting, %run, !python, import and the README's Colab recipe.

    python -m pytest tests/test_notebook.py        (49 s on 2 shared CPU cores, 2026-11-25)

Needs ipykernel and nbclient (tests/requirements.txt). The Colab recipe is the README's own text,
with the sample in place of the 14B model and local folders in place of those under /content.
"""

import importlib.metadata
import json
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("env_shim", "config", "extend_tokenizer", "overlay", "machine", "recover", "train")
# 4 sequences of 32 tokens a step and a handful of held-out ones: a run of a second.
TINY = (
    "quantization=none", "seq_len=32", "effective_batch_size=4", "val_fraction=0.02", "prompts=[]",
    "log_every=1",
)  # fmt: skip
TINY_TEXT = ", ".join(f'"{override}"' for override in TINY)
TABLE_HEAD = "| Step | Train | Val | Notes |\n|---|---|---|---|\n| 0 | - | "


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    """Kernels find this interpreter's `python` and `pip` first, and write in temporary folders."""
    folder = tmp_path_factory.mktemp("jupyter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        patch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("PIP_NO_INDEX", "1")  # what is installed must do
        patch.setenv("OMP_NUM_THREADS", "1")  # threads that share a core wait for each other
        yield


class Notebook:
    """Starts a kernel in a folder; `run` executes a cell and returns what it prints."""

    def __init__(self, folder: Path):
        self.manager, self.client = start_new_kernel(cwd=str(folder))

    def run(self, cell: str, stop_at: str = "") -> str:
        """Execute a cell, and press the stop button when a printed text contains `stop_at`.

        Raises: AssertionError with the traceback if the cell fails
        """
        printed = []

        def collect(message: dict) -> None:
            content = message["content"]
            if message["msg_type"] in ("stream", "error"):
                printed.append(content.get("text") or "\n".join(content["traceback"]))
                if stop_at and stop_at in printed[-1]:
                    self.manager.interrupt_kernel()
            elif message["msg_type"].endswith("display_data"):  # and update_display_data
                data = content["data"]
                text = "[picture]" if "image/png" in data else data.get("text/plain", "")
                printed.append(data.get("text/markdown", text))

        reply = self.client.execute_interactive(cell, output_hook=collect, timeout=300)
        text = "".join(printed)
        assert reply["content"]["status"] == "ok", text
        return text


@pytest.fixture(scope="module")
def pasted(tmp_path_factory):
    """Paste all scripts, in the README's order, into a notebook in a folder with configs/ alone."""
    folder = tmp_path_factory.mktemp("pasted")
    shutil.copytree(ROOT / "configs", folder / "configs")
    notebook = Notebook(folder)
    for name in ORDER:
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        assert notebook.run(source) == "", f"pasting {name}.py printed something"
    yield notebook
    notebook.client.stop_channels()
    notebook.manager.shutdown_kernel(now=True)


def table_of(text: str) -> list[str]:
    """List the steps of the loss table in a cell's output."""
    assert TABLE_HEAD in text
    return re.findall(r"^\| (\d+) \|", text[text.index(TABLE_HEAD) :], re.MULTILINE)


def test_pasted_train_takes_a_yaml(pasted):
    text = pasted.run(f'train("configs/sample.yaml", "max_steps=4", "run_dir=yaml", {TINY_TEXT})')
    assert table_of(text) == ["0", "4"]
    assert text.count("[picture]") == 2  # drawn after the first evaluation, then updated
    assert text.index("[picture]") < text.index("step 1/4  loss ")
    assert "export    python recover.py export yaml OUT --format merged" in text
    assert all(f"step {n}/4  loss " in text for n in (1, 2, 3, 4))
    assert re.search(r"\| [04]/4 \[", text), "no bar"


def test_pasted_train_takes_a_config_made_in_the_cell(pasted):
    text = pasted.run(
        'config = Config(model_name="configs/sample/model", lexicon="configs/sample/lexicon.txt",\n'
        '    corpus="configs/sample/corpus.txt", run_dir="made", quantization="none",\n'
        '    device="cpu", seq_len=32, effective_batch_size=4, val_fraction=0.02, max_steps=2)\n'
        "train(config)"
    )
    assert table_of(text) == ["0", "2"]


def test_the_stop_button_leaves_a_sentry_and_the_next_call_goes_on(pasted):
    cell = (
        f'r = train("configs/sample.yaml", "run_dir=stopped", "eval_every=9999", {TINY_TEXT},'
        ' "max_steps={steps}")\nprint(r["step"], r["stopped"] or "ended")'
    )
    text = pasted.run(cell.format(steps=9999), stop_at="step 2/9999")
    step = int(re.search(r"(\d+) SIGINT$", text, re.MULTILINE)[1])
    assert 2 <= step < 9999
    text = pasted.run(cell.format(steps=step + 1))
    assert re.search(rf"^continuing from stopped/.*step_{step:06d}, step {step}$", text, re.M)
    assert f"\n{step + 1} ended\n" in text


def test_a_mistake_in_a_cell_is_one_line_of_the_traceback(pasted):
    text = pasted.run(
        "try:\n    train('configs/sample.yaml', 'lr=1')\nexcept UserError as e:\n    print(e)"
    )
    assert text == (
        "configs/sample.yaml: command line: unknown key 'lr', did you mean 'learning_rate'?\n"
    )


def test_percent_run(pasted):
    """%run sets __file__, so the command line works; status 0 ends quietly."""
    text = pasted.run(
        f"%run {ROOT}/train.py configs/sample.yaml run_dir=run max_steps=2 {' '.join(TINY)}"
    )
    assert table_of(text) == ["0", "2"]
    assert "SystemExit" not in text


def test_import_train(pasted):
    text = pasted.run(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train as module\n"
        f'module.train("configs/sample.yaml", "max_steps=2", "run_dir=imported", {TINY_TEXT})'
    )
    assert table_of(text) == ["0", "2"]


# ---- The Colab recipe ----------------------------------------------------------------------------


def recipe() -> list[str]:
    """List the code cells of the README's Colab section."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("\n## Colab\n")[2].partition("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def run_recipe(folder: Path, skipped: str = "") -> list[str]:
    """Execute the recipe's cells in a new kernel, as after a disconnect -> outputs as text.

    skipped: a text in cells that are left out
    """
    places = {
        "/content/drive": str(folder / "drive"),
        "/content/run": str(folder / "local"),
        "configs/qwen14b.yaml": f"configs/sample.yaml max_steps=6 save_every=2 {' '.join(TINY)}",
    }
    cells = recipe()
    for old, new in places.items():
        assert any(old in cell for cell in cells), f"the recipe no longer says {old}"
        cells = [cell.replace(old, new) for cell in cells]
    cells = [cell if not skipped or skipped not in cell else "" for cell in cells]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [json.dumps(cell.outputs) for cell in notebook.cells]
    return [text.replace("\\r\\n", "\n").replace("\\n", "\n") for text in outputs]


def test_the_colab_recipe_and_the_same_cells_after_a_disconnect(tmp_path, monkeypatch):
    """At first the machine is lost in the middle (SIGKILL, local disk gone); the Drive stays."""
    assert 0 < len(recipe()) <= 5
    project = tmp_path / "drive" / "MyDrive" / "wake2vec"
    project.mkdir(parents=True)
    for name in [*(f"{name}.py" for name in ORDER), "requirements.txt"]:
        shutil.copy(ROOT / name, project)
    shutil.copytree(ROOT / "configs", project / "configs")
    colab = tmp_path / "google" / "colab"
    colab.mkdir(parents=True)
    mount = "def mount(path):\n    import os\n    assert os.path.isdir(path), path\n"
    (colab / "drive.py").write_text(mount, encoding="utf-8")
    (colab / "__init__.py").write_text("", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("WAKE2VEC_FAULT", "before_rename@4")
    outputs = run_recipe(tmp_path)
    assert "training can start" in outputs[1]
    assert not (project / "sentries" / "step_000006").exists()
    shutil.rmtree(tmp_path / "local")
    monkeypatch.delenv("WAKE2VEC_FAULT")
    outputs = run_recipe(tmp_path, skipped="pip install")
    assert f"continuing from {project / 'sentries' / 'step_000002'}, step 2\n" in outputs[2]
    assert (project / "sentries" / "step_000006" / "state.json").exists()
    assert f"torch {importlib.metadata.version('torch')}" in outputs[2]
    assert "bits per byte of held-out text: untouched " in outputs[2]
    assert "image/png" in outputs[3] and TABLE_HEAD in outputs[3]
