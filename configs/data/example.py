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
    )
    config.cleaning.languages = ("en",)
    config.lines.max_documents = 50


VARIANTS = {"web": web}


def get_config(variant: str = "") -> ConfigDict:
    config = defaults(PrepareConfig)
    config.raw.sources = "python"
    # Programs: no rule that asks for sentences.
    config.cleaning.rules = ("unicode", "repeated_paragraphs", "personal_data")
    # Licences and notices at the head of files.
    config.lines.max_documents = 8
    config.duplicates.threshold = 0.7
    config.tokens.vocab_size = 4096
    config.work.part_bytes = 2**22
    return vary(config, variant, VARIANTS)
