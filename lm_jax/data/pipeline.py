"""From a `DataConfig` to rows: the one way that training and evaluation get their text."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from lm_jax.data import cache, mixture, tokenizers
from lm_jax.data.config import DataConfig
from lm_jax.data.corpus import SIDES
from lm_jax.data.fim import FillInTheMiddle, FimReader, plan_of
from lm_jax.data.joined import Joined, ShardedPlan, Shards, is_sharded
from lm_jax.data.mixture import Mixture
from lm_jax.data.opened import Opened, open_source, open_sources
from lm_jax.data.packing import Rows, TokenReader
from lm_jax.data.sources import SUFFIXES, find_files
from lm_jax.data.tokenizers import Tokenizer
from lm_jax.errors import ConfigError, UserError


@dataclasses.dataclass(frozen=True)
class TextSet:
    """Some text in rows.

    Attributes:
      store: its tokens.
      plan: its rows; one pass over them is `plan.rows_per_epoch`.
      targets: targets that the loss counts, in one pass over all of it.
      bytes_per_target: bytes of UTF-8 for each target, for bits per byte: loss / ln 2 / bytes_per_target.
    """

    store: TokenReader
    plan: Rows
    targets: int
    bytes_per_target: float


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Text, ready to train on.

    Attributes:
      tokenizer: what made the tokens; `tokenizer.vocab_size` is the smallest vocabulary of a model for them.
      train: rows in random order, epoch after epoch.
      held_out: rows in order, or None where `data.held_out` is 0.
      test: rows in order, or None where `data.test` is 0.
      held_out_by_source: of a mixture, what is held out of each source.
      data: a fingerprint of the tokens: source, tokenizer, settings.
      description: a line for a person.
      notes: more lines: what was dropped, passed over or altered. Show them.
    """

    config: DataConfig
    tokenizer: Tokenizer
    train: TextSet
    held_out: TextSet | None
    test: TextSet | None
    held_out_by_source: Mapping[str, TextSet]
    data: str
    description: str
    notes: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Of what row `n` is: `data`, the rows' length, and the seed."""
        return self.train.plan.fingerprint

    def consumed(self, rows: int) -> dict[str, int]:
        """How many of the first rows are of each source of a mixture; empty without one."""
        plan = self.train.plan
        return plan.consumed(rows) if isinstance(plan, Mixture) else {}

    def check_epochs(self, rows: int) -> None:
        """Refuses a run that would read its source too often.

        Args:
          rows: all rows that the run will have consumed: steps times batch size.

        Raises:
          ConfigError: names how many passes that is.
        """
        plan, most = self.train.plan, self.config.max_epochs
        if isinstance(plan, Mixture):
            mixture.check_epochs(self.config.mixture, plan, rows, most)
        elif rows > most * plan.rows_per_epoch:
            passes = rows / plan.rows_per_epoch
            raise ConfigError(
                "data.max_epochs",
                f"the run asks for {passes:.1f} passes over the source's {plan.pairs:,} tokens; {most} are allowed",
                f"train on {most * plan.pairs:,} tokens or fewer, add text (data.source), or raise data.max_epochs",
            )


def prepare(config: DataConfig, *, length: int, seed: int) -> Prepared:
    """Tokenises a source, or finds it in the cache, and plans its rows.

    Args:
      config: what to read.
      length: tokens a row.
      seed: of the order of documents and rows.

    Raises:
      UserError: for a source that cannot be used; says which file and line.
    """
    tokenizer, opened = open_sources(config)
    sets = {
        name: {side: _text_set(one, side, length) for side in _sides(one, config)}
        | {"train": _train_set(one, length, seed, config, tokenizer)}
        for name, one in opened.items()
    }
    notes = [(name, note) for name, one in opened.items() for note in _notes(one, tokenizer, config)]
    notes += [(name, note) for name, of in sets.items() for note in _packed(of["train"].plan)]
    by_side = {side: {name: of[side] for name, of in sets.items() if side in of} for side in SIDES}
    if config.mixture:
        train = _mixed(config, by_side["train"], opened, seed)
        shares = train.plan.way.removeprefix(", ")
        description = (
            f"{_count(len(opened), 'source')}, vocabulary {tokenizer.vocab_size:,} ({tokenizer.kind}), {shares}"
        )
        notes = [(name, _describe(one, tokenizer)) for name, one in opened.items()] + notes
    else:
        train, description = sets[""]["train"], _describe(opened[""], tokenizer)
    return Prepared(
        config=config,
        tokenizer=tokenizer,
        train=train,
        held_out=_together(by_side["held_out"], opened),
        test=_together(by_side["test"], opened),
        held_out_by_source=by_side["held_out"] if len(by_side["held_out"]) > 1 else {},
        data=opened[""].content if not config.mixture else cache.digest(*(one.content for one in opened.values())),
        description=description,
        notes=tuple(f"{name}: {note}" if name else note for name, note in notes),
    )


def prepare_evaluation(
    config: DataConfig, tokenizer: Tokenizer, source: str | tuple[str, ...], *, length: int, key: str = "data.source"
) -> TextSet:
    """All of another text, in order, in the ids of a tokenizer that is there already.

    Args:
      config: how text is read; its source, tokenizer and `held_out` do not count.
      tokenizer: of the model that is evaluated.
      source: as in `DataConfig`.
      length: tokens a row.
      key: the config key that messages about the source name.

    Raises:
      UserError: for a source that cannot be used, and for text that the tokenizer cannot encode.
    """
    plain = dataclasses.replace(config, mixture={}, source=source, held_out=0.0, test=0.0)
    if config.prompt_field and not is_sharded(source) and _plain_text(source, key):
        plain = dataclasses.replace(plain, prompt_field=None)  # such files have no fields
    one = open_source(plain, tokenizer, key)
    for note in _notes(one, tokenizer, None):
        print(f"{one.label}: {note}", file=sys.stderr)
    return _text_set(one, "train", length)


def _plain_text(source: str | tuple[str, ...], key: str) -> bool:
    return all(path.suffix.lower() == ".txt" for path in find_files(source, key).paths)


# ----------------------------------------------------------------------------------------------------------------- rows


def _sides(one: Opened, config: DataConfig) -> list[str]:
    """What a config holds out of a source; of a corpus in shards, what was held out when it was prepared."""
    if isinstance(one.tokens, Shards):
        return [side for side in ("held_out", "test") if one.has(side) and (config.held_out or side == "test")]
    return [side for side, share in (("held_out", config.held_out), ("test", config.test)) if share]


def _train_set(one: Opened, length: int, seed: int, config: DataConfig, tokenizer: Tokenizer) -> TextSet:
    """Rows to train on, as the config says."""
    fim = _fim(config, tokenizer, seed)
    return _text_set(one, "train", length, seed, fim, packing=config.packing, truncate=config.truncate)


def _text_set(
    one: Opened, side: str, length: int, seed: int | None = None, fim: FillInTheMiddle | None = None, **packed: Any
) -> TextSet:
    """Rows of a side of a source; without more words in order, split, all of the text."""
    plan: Rows
    reader: TokenReader
    try:
        if isinstance(one.tokens, Shards):
            plan = ShardedPlan(one.tokens, side, fim, one.root, length=length, seed=seed, **packed)
            reader = one.tokens.reader(fim)
        else:
            plan = plan_of(one.tokens, side, fim, length=length, seed=seed, content=one.content, **packed)
            reader = one.tokens if fim is None else FimReader(fim, one.tokens, one.tokens.lengths)
    except UserError as error:
        what = {"train": "the text", "held_out": "what is held out", "test": "what is kept for the test"}[side]
        raise UserError(f"{one.label}: {what} is too short: {error}") from None
    counted = one.tokens.manifest
    targets = counted["targets"][side]
    if not targets:
        raise UserError(f"{one.label}: it is all prompts (data.prompt_field): nothing is left for the loss to count")
    return TextSet(reader, plan, targets, counted["predicted_bytes"][side] / targets)


def _fim(config: DataConfig, tokenizer: Tokenizer, seed: int) -> FillInTheMiddle | None:
    """How documents are rewritten, with the tokenizer's special tokens; None where they are not.

    Raises:
      ConfigError: where the tokenizer has not all of them.
    """
    if not config.fim_rate:
        return None
    missing = [name for name in config.fim_tokens if name not in tokenizer.special]
    if missing:
        there = ", ".join(list(tokenizer.special)[:8]) or "none"
        raise ConfigError(
            "data.fim_tokens",
            f"the tokenizer has no special token {missing[0]!r}; it has {there}",
            "name those that it has, or train one with them: launch.train_tokenizer --special=..",
        )
    prefix, suffix, middle = (tokenizer.special[name] for name in config.fim_tokens)
    edge = 0 if tokenizer.boundary is None else 1
    return FillInTheMiddle(config.fim_rate, config.fim_spm_rate, prefix, suffix, middle, edge, seed)


def _mixed(config: DataConfig, sets: Mapping[str, TextSet], opened: Mapping[str, Opened], seed: int) -> TextSet:
    """The rows of a mixture."""
    plans = {name: one.plan for name, one in sets.items()}
    documents = {name: opened[name].tokens.manifest["documents"]["train"] for name in plans}
    stages = mixture.stages_of(config.mixture, plans, documents if config.weights_by == "documents" else None)
    sizes = [opened[name].size for name in plans]
    plan = Mixture(list(plans), list(plans.values()), sizes, stages, seed)
    return TextSet(_joined(sets, sizes), plan, _targets(sets), _mean_bytes(sets))


def _together(sets: Mapping[str, TextSet], opened: Mapping[str, Opened]) -> TextSet | None:
    """All of a side of all sources, in order; None where there is nothing of it."""
    if not sets:
        return None
    if len(sets) == 1:
        return next(iter(sets.values()))
    sizes = [opened[name].size for name in sets]
    plan = mixture.side_by_side(list(sets), [one.plan for one in sets.values()], sizes)
    return TextSet(_joined(sets, sizes), plan, _targets(sets), _mean_bytes(sets))


def _joined(sets: Mapping[str, TextSet], sizes: list[int]) -> Joined:
    return Joined(sizes, [one.store for one in sets.values()].__getitem__)


def _targets(sets: Mapping[str, TextSet]) -> int:
    return sum(one.targets for one in sets.values())


def _mean_bytes(sets: Mapping[str, TextSet]) -> float:
    return sum(one.targets * one.bytes_per_target for one in sets.values()) / _targets(sets)


# ------------------------------------------------------------------------------------------------------- for the reader


def _describe(one: Opened, tokenizer: Tokenizer) -> str:
    manifest = one.tokens.manifest
    documents, tokens = manifest["documents"], manifest["tokens"]
    line = (
        f"{_amount(sum(manifest['bytes'].values()))}B of {one.label}: {_count(documents['train'], 'document')}, "
        f"{_amount(tokens['train'])}tokens, vocabulary {tokenizer.vocab_size:,} ({tokenizer.kind})"
    )
    if documents["held_out"]:
        line += f"; held out {_count(documents['held_out'], 'document')}, {_amount(tokens['held_out'])}tokens"
    if documents.get("test"):
        line += f"; for the test {_count(documents['test'], 'document')}, {_amount(tokens['test'])}tokens"
    return line


def _notes(one: Opened, tokenizer: Tokenizer, config: DataConfig | None) -> tuple[str, ...]:
    manifest, notes = one.tokens.manifest, []
    if isinstance(one.tokens, Shards) and config and config.held_out:
        tokens = manifest["tokens"]
        share = tokens.get("held_out", 0) / max(1, sum(tokens.get(side, 0) for side in SIDES))
        notes.append(
            f"held out is what was when it was prepared, {share:.1%} of its tokens, whatever data.held_out says"
        )
    if manifest["dropped"]:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in manifest["dropped"].items())
        notes.append(f"left out: {reasons}")
    if one.ignored:
        notes.append(f"passed over {_count(one.ignored, 'file')} of other kinds than {', '.join(SUFFIXES)}")
    if altered := manifest["documents"]["altered"]:
        notes.append(
            f"the tokenizer does not give {_count(altered, 'document')} back unchanged; "
            "bits per byte count the original bytes"
        )
    if config and config.tokenizer not in tokenizers.NAMES and tokenizer.caveat:
        notes.append(f"{config.tokenizer} may alter text: {tokenizer.caveat}")
    if config and config.tokenizer == "sentencepiece" and tokenizer.vocab_size < config.vocab_size:
        notes.append(
            f"the text is too small for {config.vocab_size:,} pieces: the vocabulary is {tokenizer.vocab_size:,}"
        )
    return tuple(notes)


def _packed(plan: Rows) -> list[str]:
    if not plan.way:
        return []
    share = plan.pairs / (plan.rows_per_epoch * plan.length)
    way = plan.way.removeprefix(", ")
    packed = "" if way.startswith("fill") else "packed by "
    notes = [f"{packed}{way}: {_count(plan.rows_per_epoch, 'row')} an epoch, {share:.1%} full"]
    if plan.left_out:
        total = plan.pairs + plan.left_out
        notes.append(f"truncated: {plan.left_out:,} of {total:,} tokens are beyond their row and never trained on")
    return notes


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def _amount(n: int) -> str:
    """A number with what goes before its unit: "12.3 M"."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} "
