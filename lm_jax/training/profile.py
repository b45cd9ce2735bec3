"""An XProf trace of some steps of a run: where the time goes, on the devices and on the host."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from etils import epath

from lm_jax import paths
from lm_jax.errors import UserError

FOLDER = "profile"


def parse_steps(text: str, total: int) -> range:
    """`10:15` as the steps 10 to 15, both included. Steps count from 1, as everywhere.

    Raises:
      UserError: where it does not read so, or no such steps are in a run of `total` steps.
    """
    match = re.fullmatch(r"\s*(\d+):(\d+)\s*", text)
    if match is None:
        raise UserError(f"--profile_steps={text} does not name steps\nwrite FIRST:LAST, as --profile_steps=10:15")
    first, last = int(match[1]), int(match[2])
    if not 1 <= first <= last:
        raise UserError(
            f"--profile_steps={text}: the first step must be 1 or more, and not after the last\n"
            "write FIRST:LAST, as --profile_steps=10:15"
        )
    if last > total:
        raise UserError(f"--profile_steps={text}: the run ends at step {total}")
    return range(first, last + 1)


class StepTrace:
    """Runs steps, and traces some of them into the run's folder.

    Every process writes its own file, all of them into one folder that XProf shows as one session.

    Args:
      directory: the run's.
      steps: which steps, by number; None for none.
      tell: takes a line for the user.
    """

    def __init__(self, directory: epath.Path, steps: range | None, tell: Callable[[str], Any]) -> None:
        self._steps = steps or range(0)
        self._root, self._tell = directory / FOLDER, tell
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._done: list[int] = []
        self._began = False

    def __enter__(self) -> StepTrace:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, number: int, step: Callable[..., Any], *args: Any) -> Any:
        """`step(*args)`, which is the step of that number."""
        if not self._began:
            self._began = True
            if self._steps and number > self._steps[0]:  # resumed behind the first of them
                asked = f"--profile_steps={self._steps[0]}:{self._steps[-1]}"
                self._tell(f"{asked}: the run goes on at step {number}, so {self._left(number)}")
        if number not in self._steps:
            return step(*args)
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="lm_jax_profile_")
            jax.profiler.start_trace(self._folder.name)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            out = step(*args)
            if number == self._steps[-1]:
                jax.block_until_ready(out)  # what is still on its way would be cut off
        self._done.append(number)
        if number == self._steps[-1]:
            self.close()
        return out

    def _left(self, number: int) -> str:
        last = self._steps[-1]
        return "nothing is traced" if number > last else f"steps {number} to {last} are traced"

    def close(self) -> None:
        """Ends a trace that is under way, and puts it into the run's folder."""
        if self._folder is None:
            return
        jax.profiler.stop_trace()
        if not self._done:  # the first of the steps failed, and its error is what counts
            self._folder.cleanup()
            self._folder = None
            return
        first, last = self._done[0], self._done[-1]
        name = f"steps_{first}_{last}"
        target = self._root / "plugins" / "profile" / name  # where XProf looks
        for file in sorted(Path(self._folder.name).rglob("*")):
            if file.is_file():  # named after the host: there may be several processes on one
                kind = file.name.partition(".")[2] if file.name.endswith(".gz") else file.suffix.lstrip(".")
                kind = "xplane.pb" if file.name.endswith(".xplane.pb") else kind
                paths.write_bytes_atomic(target / f"process_{jax.process_index()}.{kind}", file.read_bytes())
        self._folder.cleanup()
        self._folder = None
        self._tell(
            f"trace of steps {first} to {last}: {target}; look at it with "
            f"`pip install xprof` and `xprof --logdir {self._root}`"
        )
