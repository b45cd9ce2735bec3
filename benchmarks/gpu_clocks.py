"""What a GPU's clock and power were while something ran: a chip that slows down to keep within its power makes every
figure smaller, and two programs need not slow it down alike."""

from __future__ import annotations

import subprocess
import threading
import time
from statistics import median

COMMAND = ("nvidia-smi", "--id=0", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "250")


class Clocks:
    """Samples while it is open; nothing where there is no `nvidia-smi`. The card's settings stay as they are.

    Args:
      command: prints a line a sample, `MHz, W`.
    """

    def __init__(self, command: tuple[str, ...] = COMMAND) -> None:
        self.samples: list[tuple[float, float, float]] = []
        try:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            self.process = None
            return
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            try:
                clock, power = (float(part) for part in line.split(","))
            except ValueError:  # "[N/A]"
                continue
            self.samples.append((time.perf_counter(), clock, power))

    def during(self, spans: list[tuple[float, float]]) -> dict[str, float] | None:
        """Medians of the samples between these times of `time.perf_counter`: `MHz`, `W` and how many they are, `n`;
        None where there are none."""
        here = [s for s in self.samples if any(start <= s[0] <= end for start, end in spans)]
        if not here:
            return None
        return {"MHz": median(s[1] for s in here), "W": median(s[2] for s in here), "n": len(here)}

    def close(self) -> None:
        """Ends the sampling."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.reader.join(5)
