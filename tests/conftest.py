"""What every test process starts with, whichever files it runs (-n 2 shares them out).

One thread each: threads of two runs that wait for each other on shared cores make both many times
as long. And the shims that the installed versions need, so that no command started from here is the
first to report them: exact output is compared, and pytest's own last line stays the last.
"""

import contextlib
import io
import os

from env_shim import apply

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
with contextlib.redirect_stdout(io.StringIO()):
    apply()
