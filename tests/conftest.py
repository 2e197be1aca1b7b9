"""Prepare every test process, whichever files it runs (-n 2 shares them out).

Two runs side by side get one thread each. Threads of both on shared cores would wait for each other
and make both runs many times as long. The shims that the installed versions need are put in here,
without their lines: tests compare exact output, and no command started from a test is the first to
report a shim.
"""

import functools
import gc
import os

import pytest

import env_shim

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
env_shim.apply(verbose=False)


# The files that take longest, the longest first: beside them the others find their place in time.
LONG = ["processes", "notebook", "survival", "readme", "export", "families", "train_cli", "machine"]


def pytest_configure(config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist would begin with the files of most tests


def pytest_collection_modifyitems(items: list) -> None:
    names = [f"test_{name}" for name in LONG]
    items.sort(key=lambda i: names.index(i.path.stem) if i.path.stem in names else len(names))


def pytest_runtest_call(item) -> None:
    """Let garbage collection, which each training and evaluation ask for, pass over what is there
    before the test: the half million objects of the imported libraries take a third of a second."""
    gc.freeze()


@pytest.fixture(scope="module")
def quick():
    """Leave out what takes half of a training of a few steps: plots, long samples, and asking pip
    for versions. One thread, because threads that wait for each other cost more on shared cores."""
    import torch

    import train

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    installed_version = functools.cache(env_shim.installed_version)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "plot_losses", lambda *_: None)
        patch.setattr(train, "SAMPLE_TOKENS", 8)
        patch.setattr(env_shim, "installed_version", installed_version)
        patch.setattr(train, "installed_version", installed_version)
        yield
    torch.set_num_threads(before)
