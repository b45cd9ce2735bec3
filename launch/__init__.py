"""The programs: each module here is one, run as `python -m launch.NAME`.

C++ libraries read these when they are first loaded, and would otherwise write notes of theirs between a program's own
lines. Whoever wants the notes sets the variables.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's and absl's: errors alone
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
