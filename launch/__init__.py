"""The programs: each module here is one, run as `python -m launch.NAME`.

C++ libraries read these when they are first loaded, and would otherwise write notes of theirs between a program's own
lines. Whoever wants the notes sets the variables.
"""

import os
import sys
from types import TracebackType

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's and absl's: errors alone
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

# `python launch/train.py` puts this folder in front of the path, where `numbers` would hide the standard library's.
sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder) != os.path.dirname(os.path.realpath(__file__))]


def _told(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C while a program is still being loaded is no error either."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, value, trace)


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _told
