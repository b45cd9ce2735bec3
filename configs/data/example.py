"""A corpus of the source text of Python's own standard library: works as it is, in a minute on two cores.

    python -m launch.prepare_data --config=configs/data/example.py --out=runs/corpus

With web pages or other prose of your own, `web` has the rules of Gopher and C4 as well:

    python -m launch.prepare_data --config=configs/data/example.py:web --config.raw.sources=FILES --out=runs/web
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import vary
from lm_jax.config import defaults
from lm_jax.corpus.config import PrepareConfig


def web(config: ConfigDict) -> None:
    """English prose: what is no page of sentences, or repeats itself, goes."""
    config.cleaning.rules = (
        "html",
        "unicode",
        "language",
        "repeated_paragraphs",
        "repeated_lines",
        "c4",
        "gopher_quality",
        "gopher_repetition",
        "personal_data",
    )  # C4's first: the page as a whole is judged by the lines that it is left with
    config.cleaning.languages = ("en",)
    config.lines.max_documents = 50


VARIANTS = {"web": web}


def get_config(variant: str = "") -> ConfigDict:
    config = defaults(PrepareConfig)
    config.raw.sources = "python"
    # Programs: no rule that asks for sentences, or takes out what stands there twice.
    config.cleaning.rules = ("unicode", "personal_data")
    config.work.part_bytes = 2**22
    return vary(config, variant, VARIANTS)
