"""What every test stands on: the CPU, a cache of its own, a mesh of one device."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

# Before jax is imported by anything. A machine with an accelerator says JAX_PLATFORMS itself.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Tokenizers, token shards and compiled programs of the user's own runs must neither help nor disturb a test. Each
# process of pytest-xdist has a folder of its own; what tests start themselves inherits it.
_CACHE = tempfile.mkdtemp(prefix="lm_jax_tests_")
os.environ["LM_JAX_CACHE"] = _CACHE

import jax  # noqa: E402
from hypothesis import settings  # noqa: E402

from lm_jax.sharding import one_device_mesh  # noqa: E402

# A change passes or fails for what it changes: `make test` draws the same examples every time, `make test-full` new
# ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("new", print_blob=True)


def pytest_configure(config: pytest.Config) -> None:
    """Which examples hypothesis draws."""
    settings.load_profile("same" if config.getoption("markexpr") == "not slow" else "new")


def pytest_unconfigure(config: pytest.Config) -> None:
    """The cache goes with the process that made it."""
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture
def mesh() -> Iterator[jax.sharding.Mesh]:
    """A mesh of one device with the axes of every layout, entered for the length of the test."""
    one = one_device_mesh()
    with jax.set_mesh(one):
        yield one
