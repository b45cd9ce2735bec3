"""Python in a process of its own: other numbers of devices, launchers, exit statuses, signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_DEVICES = "--xla_force_host_platform_device_count"


def environment(devices: int | None = None, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, for a child on the CPU that can import the project from any folder.

    Args:
      devices: how many CPU devices jax simulates (None: as many as here).
      extra: variables that go over all others.
    """
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONUNBUFFERED="1")
    env["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    if devices is not None:
        others = re.sub(rf"{_DEVICES}=\S+", "", env.get("XLA_FLAGS", ""))
        env["XLA_FLAGS"] = f"{others} {_DEVICES}={devices}".strip()
    return env | dict(extra or {})


def run_python(
    code_or_path: str | Path,
    *args: str,
    devices: int | None = 8,
    timeout: float = 300,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    cwd: str | Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """Runs Python source (a str) or a script (a Path) in a process of its own, on simulated CPU devices.

    Args:
      code_or_path: source text, or the path of a script.
      args: its command line.
      devices: how many CPU devices jax simulates there (None: as many as here).
      timeout: seconds, after which it and all that it started are killed.
      check: whether an exit status other than 0 fails the test.
      env: environment variables that go over all others.
      cwd: the folder that it runs in.

    Raises:
      AssertionError: where it did not end in time, or (`check`) not with status 0; with the end of its output.
    """
    what = [str(code_or_path)] if isinstance(code_or_path, Path) else ["-c", code_or_path]
    return _run([sys.executable, *what, *args], environment(devices, env), timeout, check, cwd)


def run_module(
    module: str,
    *args: str,
    devices: int | None = None,
    timeout: float = 300,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    cwd: str | Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """`python -m module args`, as `run_python` runs source: for launchers, as a user starts them."""
    return _run([sys.executable, "-m", module, *args], environment(devices, env), timeout, check, cwd)


def _run(
    command: Sequence[str], env: Mapping[str, str], timeout: float, check: bool, cwd: str | Path
) -> subprocess.CompletedProcess[str]:
    process = subprocess.Popen(
        command,
        env=dict(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException as e:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        if isinstance(e, subprocess.TimeoutExpired):
            raise AssertionError(f"not done after {timeout} s{_ends(out, err)}") from None
        raise
    if check and process.returncode:
        raise AssertionError(f"exit status {process.returncode}{_ends(out, err)}")
    return subprocess.CompletedProcess(list(command), process.returncode, out, err)


def _ends(out: str, err: str, lines: int = 40) -> str:
    parts = (("stdout", out), ("stderr", err))
    return "".join(f"\n--- end of {name} ---\n" + "\n".join(text.splitlines()[-lines:]) for name, text in parts if text)
