"""What a model reads: the config's section, and what of it cannot be."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Literal

from lm_jax.data import mixture, tokenizers
from lm_jax.data.mixture import MixtureSource
from lm_jax.data.packing import PACKINGS
from lm_jax.data.sources import EMBEDDED, Policy
from lm_jax.errors import ConfigError

SMALLEST_VOCABULARY = 300  # 256 bytes, unknown, boundary, and some characters


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a model reads.

    Attributes:
      source: a file, a directory or a glob of `.txt`, `.jsonl` and `.parquet` files, or several; or "python", the
        embedded default: the source text of the running interpreter's own standard library (`./python` is a folder of
        that name); or a folder that launch.prepare_data wrote, tokens, tokenizer and what is held out with it.
      mixture: several sources instead of the one, by name, each with a weight; see `MixtureSource`.
      weights_by: what the weights of a mixture count, "tokens" (rows, which are all but full) or "documents".
      field: the field of a `.jsonl` line, or the column of a `.parquet` file, that holds the text.
      prompt_field: the field of a prompt that stands before the text of `field`: the model reads it, the loss does not
        count it; None for none.
      tokenizer: "bytes"; "characters" (those of the source); "sentencepiece" (learnt from the source on first use);
        or the path of one that is there already: a folder that launch.train_tokenizer wrote, a `.model` file of
        sentencepiece, a `tokenizer.json` of Hugging Face, a `.tiktoken` file.
      vocab_size: ids of a "sentencepiece" tokenizer; the others have their own.
      boundary: whether a boundary token stands before and after every document.
      held_out: the share of documents that is never trained on, by a stable hash of their text; of a source with a
        single document, the last such share of its characters.
      test: the share of documents that is kept for the end (`launch.evaluate --split=test`), by the same hash: neither
        trained on nor looked at while training.
      packing: how documents share rows: "split" cuts the text of all of them into rows; "best_fit" and "first_fit" cut
        no document that fits a row, at the price of some padding.
      truncate: whether a document that is longer than a row is cut short instead of going on in another row; with
        "best_fit" and "first_fit".
      fim_rate: the share of documents that are rewritten for filling in the middle, see `fim.py`; held-out text is not.
      fim_spm_rate: of those, the share whose suffix stands first.
      fim_tokens: the special tokens before prefix, suffix and middle; a "sentencepiece" tokenizer is learnt with them.
      max_epochs: the most passes over the source that a run may ask for.
      bad_documents: "refuse" stops at what cannot be a document (bad UTF-8, a broken line, no text in the field, too
        large), "drop" leaves it out and counts it.
      altered_documents: what is done with a document that the tokenizer does not give back unchanged: "refuse" stops at
        the first, "accept" counts them.
      max_document_bytes: the largest document; a document is encoded in memory, in some 15 times its size.
      cache: where tokenizers and tokens are kept; None is $LM_JAX_CACHE, else ~/.cache/lm_jax.
      threads: threads that read rows.
    """

    source: str | tuple[str, ...] = EMBEDDED
    mixture: dict[str, MixtureSource] = dataclasses.field(default_factory=dict)
    weights_by: Literal["tokens", "documents"] = "tokens"
    field: str = "text"
    prompt_field: str | None = None
    tokenizer: str = "sentencepiece"
    vocab_size: int = 4096
    boundary: bool = True
    held_out: float = 0.1
    test: float = 0.0
    packing: str = "split"
    truncate: bool = False
    fim_rate: float = 0.0
    fim_spm_rate: float = 0.5
    fim_tokens: tuple[str, str, str] = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    max_epochs: int = 8
    bad_documents: Literal["refuse", "drop"] = "refuse"
    altered_documents: Literal["refuse", "accept"] = "refuse"
    max_document_bytes: int = 2**28
    cache: str | None = None
    threads: int = 2

    def __post_init__(self) -> None:
        mixture.check(self.mixture)
        if self.mixture and self.source != EMBEDDED:
            problem = f"{self.source!r} is given beside data.mixture, which names the sources itself"
            raise ConfigError("data.source", problem, "give one of the two")
        names = (self.source,) if isinstance(self.source, str) else self.source
        if not names or not all(names):
            raise ConfigError("data.source", "is empty", f'give a file, a directory or a glob, or "{EMBEDDED}"')
        if not self.field:
            raise ConfigError("data.field", "is empty", 'give the field that holds the text, such as "text"')
        if self.tokenizer not in tokenizers.NAMES and not tokenizers.is_path(self.tokenizer):
            near = difflib.get_close_matches(self.tokenizer, tokenizers.NAMES, n=1)
            known = f"give {', '.join(tokenizers.NAMES)} or the path of a tokenizer"
            raise ConfigError(
                "data.tokenizer", f"{self.tokenizer!r} is unknown", f"did you mean {near[0]}?" if near else known
            )
        if self.tokenizer == "sentencepiece" and not SMALLEST_VOCABULARY <= self.vocab_size <= 2**20:
            remedy = f"give {SMALLEST_VOCABULARY} to {2**20}: 256 are for bytes"
            raise ConfigError("data.vocab_size", f"{self.vocab_size} is no size of a vocabulary", remedy)
        if not 0 <= self.held_out <= 0.5:  # false for NaN
            raise ConfigError("data.held_out", f"{self.held_out} is no share to hold out", "give 0 (none) to 0.5")
        if not 0 <= self.test <= 0.5:
            raise ConfigError("data.test", f"{self.test} is no share to keep for a test", "give 0 (none) to 0.5")
        if self.packing not in PACKINGS:
            near = difflib.get_close_matches(self.packing, PACKINGS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"give one of {', '.join(PACKINGS)}"
            raise ConfigError("data.packing", f"{self.packing!r} is unknown", hint)
        if self.truncate and self.packing == "split":
            problem = 'goes with data.packing = "best_fit" or "first_fit": "split" leaves nothing out'
            raise ConfigError("data.truncate", problem)
        for name in ("fim_rate", "fim_spm_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.{name}", f"{getattr(self, name)} is no share", "give 0 to 1")
        if len(set(self.fim_tokens)) < 3:
            raise ConfigError("data.fim_tokens", f"{self.fim_tokens} are not three tokens", "give each part its own")
        if self.fim_rate and self.truncate:
            problem = "does not go with data.truncate: of many documents it would leave out the middle"
            raise ConfigError("data.fim_rate", problem)
        if self.fim_rate and self.prompt_field is not None:
            raise ConfigError("data.fim_rate", "does not go with data.prompt_field: a prompt must stay in front")
        if self.prompt_field is not None and self.prompt_field in ("", self.field):
            raise ConfigError("data.prompt_field", f"{self.prompt_field!r} is no other field than data.field")
        if self.weights_by not in ("tokens", "documents"):
            raise ConfigError("data.weights_by", f"{self.weights_by!r} is unknown", "give tokens or documents")
        if self.bad_documents not in ("refuse", "drop"):
            raise ConfigError("data.bad_documents", f"{self.bad_documents!r} is unknown", "give refuse or drop")
        if self.altered_documents not in ("refuse", "accept"):
            raise ConfigError(
                "data.altered_documents", f"{self.altered_documents!r} is unknown", "give refuse or accept"
            )
        for name in ("max_epochs", "max_document_bytes", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name}", f"{getattr(self, name)} is too small", "give 1 or more")

    @property
    def policy(self) -> Policy:
        return Policy(self.field, self.bad_documents, self.max_document_bytes, self.prompt_field)

    def parts(self) -> dict[str, tuple[str, DataConfig]]:
        """By name, what prefix the keys of a source have in messages, and a config with that source alone.

        A config without a mixture has one part, of no name.
        """
        if not self.mixture:
            return {"": ("data", self)}
        return {
            name: (
                f"data.mixture.{name}",
                dataclasses.replace(
                    self,
                    mixture={},
                    source=one.source,
                    field=one.field or self.field,
                    prompt_field=one.prompt_field or self.prompt_field,
                ),
            )
            for name, one in self.mixture.items()
        }
