"""Proves that the scripts may be pasted into notebook cells: silent, harmless, no name twice.

    python -m pytest tests/test_paste.py        (9 s on 2 shared CPU cores, 2026-11-25)

A cell has no __file__, __name__ is "__main__", and sys.argv carries the kernel's own -f option.
tests/test_notebook.py does the same in a real Jupyter kernel.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ORDER = ("env_shim", "config", "extend_tokenizer", "overlay", "machine", "recover", "train")
# Names that a reader will call after pasting.
CALLED = {
    "env_shim": {"apply", "doctor", "check_environment"},
    "config": {"Config", "UserError", "load_config", "config_table"},
    "extend_tokenizer": {"NewWords", "plan_new_words", "extend"},
    "overlay": {"WakeOverlay", "chunked_cross_entropy", "forward_backward", "Optimizer"},
    "machine": {"Worker", "find_worker", "fit_to_machine", "memory_plan"},
    "recover": {
        "SentryWriter", "pick_sentry", "check_sentry", "write_sentry", "export", "generate",
    },
    "train": {"train", "held_out_loss", "learning_rate_at"},
}  # fmt: skip
# argv: source files to paste. What they import is imported before the watch begins, for a library's
# files are not ours to count. From then on a file opened, a folder changed, a process, a socket or
# a signal handler is named.
PASTE = """
import ast, builtins, importlib, os, sys
sources = [open(path, encoding="utf-8").read() for path in sys.argv[1:]]
ours = {"env_shim", "config", "extend_tokenizer", "overlay", "machine", "recover", "train"}
for node in [node for source in sources for node in ast.parse(source).body]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        continue
    for found in ast.walk(node):
        names = [found.module] if isinstance(found, ast.ImportFrom) else []
        names = [alias.name for alias in found.names] if isinstance(found, ast.Import) else names
        for name in set(names) - ours:
            importlib.import_module(name)
sys.argv[:] = ["launcher.py", "-f", "kernel.json"]
watched = ("open", "os.", "shutil.", "subprocess.", "socket.", "tempfile.", "signal.")
touched = []
def watch(event, arguments):
    if event.startswith(watched) and watching:
        touched.append((event, str(arguments)[:120]))
watching = False
sys.addaudithook(watch)
space, before = {"__name__": "__main__", "__builtins__": builtins}, dict(os.environ)
for source in sources:
    code = compile(source, "<cell>", "exec")
    watching = True
    exec(code, space)
    watching = False
assert not touched, touched
assert dict(os.environ) == before, "environment variables changed"
if "torch" in sys.modules:
    assert not sys.modules["torch"].cuda.is_initialized()
sys.stdout.write("NAMES " + " ".join(sorted(space)))
"""


def paste(files: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Paste the files one after another into one namespace of a fresh interpreter in `folder`."""
    command = [sys.executable, "-c", PASTE, *(str(ROOT / f"{name}.py") for name in files)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def assert_silent(result: subprocess.CompletedProcess, wanted: set[str]) -> None:
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("NAMES "), "the paste printed something"
    assert wanted <= set(result.stdout.split())


@pytest.mark.parametrize(
    "names",
    [["env_shim"], ["config"], ["config", "extend_tokenizer"], ["config", "overlay"], list(ORDER)],
    ids=" ".join,
)
def test_pasting_is_silent_touches_nothing_and_makes_one_namespace(tmp_path, names):
    """The folder is empty, so a script finds the names of others only where they were pasted.
    Tokenizers and the overlay need no more of ours than config.py."""
    assert_silent(paste(names, tmp_path), set().union(*(CALLED[name] for name in names)))
    assert not list(tmp_path.iterdir())


def test_the_readme_gives_this_order():
    found = re.search(r"in this order:((?:\s+(?:and )?`\w+\.py`,?)+)", README)
    assert re.findall(r"`(\w+)\.py`", found[1]) == list(ORDER)


def top_level_names(name: str) -> set[str]:
    """Name what a script defines at its top level; what it imports is not its own."""
    names = set()
    for node in ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return names


def test_no_name_is_defined_in_two_files():
    """A second definition would replace the first for the functions pasted above it."""
    owner = {}
    for name in ORDER:
        for defined in top_level_names(name) - {"main"}:
            assert defined not in owner, f"{defined} is in {owner[defined]}.py and {name}.py"
            owner[defined] = name


def test_no_file_hides_a_library_name_that_another_one_uses():
    """After pasting, a function called `json` or `sample` would hide an import of that name."""
    imported = {}
    for name in ORDER:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and node.col_offset == 0:
                if isinstance(node, ast.Import) or node.module not in ORDER:
                    names = {(n.asname or n.name).split(".")[0] for n in node.names}
                    imported.update(dict.fromkeys(names, name))
    for name in ORDER:
        assert not top_level_names(name) & set(imported), name


@pytest.mark.parametrize("name", ORDER)
def test_the_top_level_only_defines_and_imports(name):
    """No call stands alone at the top; `from __future__` would stay on for the cells below."""
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    guard = 'if __name__ == "__main__" and "__file__" in globals():'
    for node in ast.parse(source).body[1:]:
        assert not isinstance(node, (ast.Expr, ast.For, ast.While, ast.With, ast.Try)), node.lineno
        if isinstance(node, ast.If):
            line = source.splitlines()[node.lineno - 1]
            assert line == guard or re.fullmatch(r'if "\w+" not in globals\(\):', line), line
    assert "__future__" not in source
