"""Prepare every test process, whichever files it runs (-n 2 shares them out).

Two runs side by side get one thread each. Threads of both on shared cores would wait for each other
and make both runs many times as long. The shims that the installed versions need are put in here,
without their lines: tests compare exact output, and no command started from a test is the first to
report a shim.
"""

import os

from env_shim import apply

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
apply(verbose=False)
