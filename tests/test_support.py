"""The helper that gives a test a process of its own."""

import time
from pathlib import Path

import jax
import psutil
import pytest

from tests.support.processes import run_module, run_python


def test_a_child_has_the_devices_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    done = run_python("import jax, sys; print(len(jax.devices()), jax.default_backend(), sys.argv[1])", "x", devices=3)
    assert done.stdout.split() == ["3", "cpu", "x"]


def test_a_script_imports_the_project_from_any_folder(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import lm_jax; print(lm_jax.__version__)")
    assert run_python(script, cwd=tmp_path).stdout.strip()


def test_a_failure_shows_the_end_of_the_output() -> None:
    code = "import sys; print('said'); sys.exit('meant')"
    with pytest.raises(AssertionError, match=r"(?s)exit status 1.*said.*meant"):
        run_python(code)
    assert run_python(code, check=False).returncode == 1


def test_a_module_runs_as_a_user_starts_it() -> None:
    assert "usage" in run_module("json.tool", "--help").stdout


def test_time_out_ends_grandchildren_too(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    sleep = "[sys.executable, '-c', 'import time; time.sleep(600)']"
    code = (
        f"import subprocess, sys; p = subprocess.Popen({sleep}); open({str(file)!r}, 'w').write(str(p.pid)); p.wait()"
    )
    with pytest.raises(AssertionError, match="not done after 3 s"):
        run_python(code, timeout=3)
    pid = int(file.read_text())
    for _ in range(1000):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.01)
    pytest.fail(f"process {pid} lives on")


def test_the_mesh_fixture_is_entered(mesh: jax.sharding.Mesh) -> None:
    assert jax.sharding.get_abstract_mesh().axis_names == mesh.axis_names
