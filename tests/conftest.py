"""Where pytest runs files side by side (-n 2), one thread each: threads of two runs that wait for
each other on shared cores make both many times as long."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
