"""Writes the golden runs: `python -m tests.golden.make_runs`. Adds the conditions of this machine to those on record.

`--new` forgets what is on record: for a change that is meant to change the numbers.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.golden.dump_configs import names, resolved
from tests.support.golden_runs import FILE, conditions, losses


def main() -> None:
    runs = [] if "--new" in sys.argv or not FILE.exists() else json.loads(FILE.read_text())
    runs = [run for run in runs if run["conditions"] != conditions()]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LM_JAX_CACHE"] = str(Path(folder) / "cache")
        found = {name: losses(resolved(name), Path(folder)) for name in names()}
    runs.append({"conditions": conditions(), "losses": found})
    lines = ",\n".join(
        json.dumps({"conditions": run["conditions"]})[:-1]
        + ', "losses": {\n'
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in run["losses"].items())
        + "\n}}"
        for run in runs
    )
    FILE.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
