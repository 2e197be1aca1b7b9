"""Run the whole test suite in an environment of its own for each set of versions we support.

    python tests/torture/run_matrix.py                      oldest, middle, newest, then a table
    python tests/torture/run_matrix.py oldest newest --venvs DIR    two of them, kept in DIR
    python tests/torture/run_matrix.py --install-only       make the environments, run nothing

`oldest` takes the lower bounds of requirements.txt, which env_shim.SUPPORTED has too. `newest`
takes what pip gives today (torch aside), and says which of it is newer than the newest tried of
env_shim.SUPPORTED. The exit status is 1 if an installation or a suite failed. `newest` is brought
up to date at each start, and another environment is installed again only if its list of packages
has changed. Making one took 130 s (2 CPU cores, 2026-11-22).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import env_shim

# torch 2.9 is not in `oldest`: for Linux x86-64 PyPI has 2.9.1 only as a CUDA wheel of 900 MB that
# needs NVIDIA's packages besides (looked up 2026-11-22); the CPU wheel to be had is 2.13.0.
TORCH = "torch==2.13.0"
PARALLEL = ["-n", "2", "--dist", "loadfile"]  # as the README says; two files at a time
TEST_TOOLS = ["pytest", "pytest-xdist", "hypothesis", "peft==0.21.2", "ipykernel", "nbclient"]
# transformers 5.0.0 is Colab's 2026.02 image; bitsandbytes 0.49 is where CPU weights are repacked.
MIDDLE = {"transformers": "5.0.0", "accelerate": "1.12.0", "bitsandbytes": "0.49.1"}


def requirements_of(name: str) -> dict[str, str]:
    """Package -> what the environment `name` asks pip for, torch aside; "" is the newest."""
    wanted = {package: f"=={oldest}" for package, (oldest, _) in env_shim.SUPPORTED.items()}
    del wanted["torch"]
    if name == "newest":
        return dict.fromkeys(wanted, "")
    if name == "middle":
        wanted |= {package: f"=={version}" for package, version in MIDDLE.items()}
    return wanted


def versions_in(folder: Path) -> dict[str, str]:
    """Package -> version that pip put into an environment, by its name in lower case."""
    command = [str(python_of(folder)), "-m", "pip", "list", "--format", "json"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {package["name"].lower(): package["version"] for package in json.loads(listing)}


def newer_than_tried(found: dict[str, str]) -> list[str]:
    """Say which packages are newer than env_shim.SUPPORTED knows, a line each."""
    number = env_shim.version_tuple
    return [
        f"{package} {found[package]} is newer than {newest}, the newest tried of env_shim.SUPPORTED"
        for package, (_, newest) in env_shim.SUPPORTED.items()
        if number(found.get(package, "")) > number(newest)
    ]


def python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install(name: str, folder: Path) -> None:
    """Make the environment, or do nothing if it was made from the same list of packages.

    Raises: CalledProcessError when pip fails; its own words stand above.
    """
    packages = [package + version for package, version in requirements_of(name).items()]
    packages += TEST_TOOLS
    marker = folder / "installed.txt"  # written last: an interrupted installation is done again
    wanted = "\n".join([TORCH, *packages]) + "\n"
    done = marker.is_file() and marker.read_text(encoding="utf-8") == wanted
    if done and name != "newest":
        return
    print(f"{name}: installing {TORCH} {' '.join(packages)} in {folder}", flush=True)
    if not python_of(folder).is_file():
        venv.create(folder, with_pip=True)
    pip = [str(python_of(folder)), "-m", "pip", "install", "-q"]
    pip += ["--upgrade"] if name == "newest" else []
    # torch first, so that nothing else picks another build of it
    subprocess.run([*pip, TORCH], check=True)
    subprocess.run([*pip, TORCH, *packages], check=True)
    marker.write_text(wanted, encoding="utf-8")


def run_suite(folder: Path) -> tuple[str, float, bool]:
    """Run the tests; returns pytest's closing counts, seconds, and whether all passed."""
    started = time.perf_counter()
    command = [str(python_of(folder)), "-m", "pytest", "-q", *PARALLEL, "tests"]
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:  # shown as it comes: a suite takes minutes
            print(line, end="", flush=True)
            lines.append(line)
    counts = re.sub(r" in [\d.]+s.*| *=+ *", "", lines[-1].strip()) if lines else "no output"
    return counts, time.perf_counter() - started, process.returncode == 0


def table(rows: list[tuple[str, dict, str, float]]) -> str:
    lines = ["| environment | torch | transformers | accelerate | bitsandbytes | tests | seconds |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, found, counts, seconds in rows:
        packages = ("torch", "transformers", "accelerate", "bitsandbytes")
        versions = [found.get(package, "-") for package in packages]
        lines.append(f"| {name} | {' | '.join(versions)} | {counts} | {seconds:.0f} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    names = ["oldest", "middle", "newest"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"from {names}; default all")
    default = Path(tempfile.gettempdir()) / "wake2vec_venvs"
    parser.add_argument("--venvs", type=Path, default=default, metavar="DIR", help=f"{default}")
    parser.add_argument("--install-only", action="store_true")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.names) - set(names))
    if unknown:
        parser.error(f"unknown environment {unknown[0]!r}, allowed: {', '.join(names)}")
    rows, all_passed = [], True
    for name in args.names or names:
        folder = (args.venvs / name).absolute()
        try:
            install(name, folder)
        except subprocess.CalledProcessError:
            rows.append((name, {}, "not installed", 0.0))
            all_passed = False
            continue
        found = versions_in(folder)
        for line in newer_than_tried(found):
            print(f"{name}: {line}", flush=True)
        if not args.install_only:
            counts, seconds, passed = run_suite(folder)
            rows.append((name, found, counts, seconds))
            all_passed = all_passed and passed
    if rows:
        print(table(rows), flush=True)
    return 0 if all_passed else 1


if __name__ == "__main__" and "__file__" in globals():
    sys.exit(main(sys.argv[1:]))
