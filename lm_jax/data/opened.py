"""A source's tokens: found in the cache, made anew, or opened where launch.prepare_data left them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

from lm_jax.data import cache, tokenizers
from lm_jax.data.config import DataConfig
from lm_jax.data.corpus import Corpus, altered_document, tokenise
from lm_jax.data.joined import Shards, is_sharded
from lm_jax.data.sources import Files, find_files
from lm_jax.data.store import Store, whole
from lm_jax.data.tokenizers import Tokenizer
from lm_jax.data.tokenizers.tokenizer import DESCRIPTION
from lm_jax.errors import ConfigError

FORMAT = 1  # of what a cache entry holds: another number makes entries anew
SAMPLE = 8 * 2**20  # bytes that a vocabulary is learnt from: 2 s for 4,096 pieces on two cores (x86)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A source's tokens.

    Attributes:
      label: what to call the source in a message.
      tokens: a store, or a corpus in shards.
      content: a fingerprint of them.
      root: of the cache.
      ignored: files of other kinds that were passed over.
    """

    label: str
    tokens: Store | Shards
    content: str
    root: Path
    ignored: int = 0

    def has(self, side: str) -> bool:
        return self.tokens.manifest["documents"].get(side, 0) > 0

    @property
    def size(self) -> int:
        """Documents on all sides."""
        return sum(self.tokens.sizes) if isinstance(self.tokens, Shards) else len(self.tokens.lengths)


def open_sources(config: DataConfig) -> tuple[Tokenizer, dict[str, Opened]]:
    """The tokenizer of a config and the tokens of each of its sources, by name (one of no name without a mixture).

    Raises:
      UserError: for a source that cannot be used; says which file and line.
    """
    parts = config.parts()
    _refuse_twice(parts)
    tokenizer = _given(config, parts)
    if config.mixture and tokenizer is None:
        tokenizer = _learn_together(config, parts)
    opened = {name: open_source(part, tokenizer, f"{key}.source") for name, (key, part) in parts.items()}
    if tokenizer is None:
        tokenizer = tokenizers.load(Path(next(iter(opened.values())).tokens.directory))
    return tokenizer, opened


def _refuse_twice(parts: Mapping[str, tuple[str, DataConfig]]) -> None:
    """Raises ConfigError where two sources share a file: what one holds out the other would train on."""
    seen: dict[str, str] = {}
    for name, (key, part) in parts.items() if len(parts) > 1 else ():
        sharded = is_sharded(part.source)
        files = [Path(str(part.source)).expanduser()] if sharded else find_files(part.source, f"{key}.source").paths
        for file in map(os.path.realpath, files):
            if file in seen:
                problem = f"{file} is in {seen[file]} as well: what the one holds out the other would train on"
                raise ConfigError(f"{key}.source", problem, "name every file in one source")
            seen[file] = name


def open_source(config: DataConfig, tokenizer: Tokenizer | None, key: str) -> Opened:
    """The tokens of a config's one source.

    Args:
      tokenizer: None for one that is made of the source.
      key: the config key that messages about the source name.

    Raises:
      UserError: for a source that cannot be used, and for text that the tokenizer cannot encode.
    """
    root = cache.cache_root(config.cache)
    if is_sharded(config.source):
        folder = Path(str(config.source)).expanduser()
        shards = Shards(folder)
        own = tokenizers.load(folder)
        if tokenizer is not None and own.fingerprint != tokenizer.fingerprint:
            problem = f"{config.source} was prepared with another tokenizer, {own.kind} of {own.vocab_size:,} ids"
            raise ConfigError(key, problem, "prepare it with this run's, or take the tokenizer that lies in its folder")
        for name in ("test", "prompt_field"):
            if getattr(config, name) and not _has(shards, name):
                problem = f"{config.source} was prepared without: it has none"
                raise ConfigError(f"data.{name}", problem, "leave it out, or prepare the corpus with it")
        return Opened(str(config.source), shards, cache.digest(shards.content, own.fingerprint), root)
    files = find_files(config.source, key)
    store = Store(_entry(config, files, tokenizer, root))
    if config.altered_documents == "refuse" and store.manifest["documents"]["altered"]:
        # They were made while such documents were accepted.
        raise altered_document(files.label, store.manifest.get("altered", "some document does not come back"))
    return Opened(files.label, store, store.directory.name, root, files.ignored)


def _has(shards: Shards, name: str) -> bool:
    if name == "test":
        return bool(shards.manifest["documents"].get("test"))
    return shards.store(0).prompts is not None


def _entry(config: DataConfig, files: Files, tokenizer: Tokenizer | None, root: Path) -> Path:
    """The cache entry of some files, its name a hash of all that decides its content; built where it is not there."""
    settings = {
        "format": FORMAT,
        "contents": _contents(files, root),
        "policy": _policy(config),
        "held_out": config.held_out,
        "tokenizer": tokenizer.fingerprint if tokenizer else _wish(config),
        **({"test": config.test} if config.test else {}),
    }

    def build(directory: Path) -> None:
        corpus = Corpus(files, config.policy, config.held_out, config.test)
        tokenise(corpus, tokenizer or _learn(config, {"": corpus}), directory, altered=config.altered_documents)

    return cache.entry(root, cache.digest(json.dumps(settings, sort_keys=True)), build, whole)


def _policy(config: DataConfig) -> dict[str, object]:
    """How documents are taken, without what is not asked for: entries from before it could be stay good."""
    return {name: value for name, value in dataclasses.asdict(config.policy).items() if value is not None}


def _contents(files: Files, root: Path) -> list[str]:
    hashes = cache.content_hashes(files.paths, root)
    return [f"{path.suffix.lower()} {h}" for path, h in zip(files.paths, hashes, strict=True)]


# ------------------------------------------------------------------------------------------------------- the tokenizer


def _given(config: DataConfig, parts: Mapping[str, tuple[str, DataConfig]]) -> Tokenizer | None:
    """The tokenizer that is there already: the config's, or that of a source which is tokens already."""
    made = {key: str(part.source) for key, part in parts.values() if is_sharded(part.source)}
    if config.tokenizer not in tokenizers.NAMES:
        return tokenizers.open_path(config.tokenizer, config.boundary)
    if not made:
        return None
    folder = next(iter(made.values()))
    own = tokenizers.load(Path(folder).expanduser())
    if config.tokenizer not in ("sentencepiece", own.kind):  # the default asks for nothing
        problem = f"{config.tokenizer!r} is not what {folder} was prepared with: {own.kind} of {own.vocab_size:,} ids"
        raise ConfigError("data.tokenizer", problem, "leave it out, or prepare the corpus with that one")
    return own


def _wish(config: DataConfig) -> list[object]:
    """What decides a tokenizer that is made of text, but for the text."""
    learnt = config.tokenizer == "sentencepiece"
    wish: list[object] = [config.tokenizer, config.boundary, config.vocab_size if learnt else None]
    return [*wish, *(config.fim_tokens if learnt and config.fim_rate else ())]


def _learn(config: DataConfig, corpora: Mapping[str, Corpus]) -> Tokenizer:
    """A tokenizer made of text; of several corpora, as much of each as their weights say."""
    if config.tokenizer == "bytes":
        return tokenizers.Bytes(config.boundary)
    if config.tokenizer == "characters":
        found = set[str]().union(*(corpus.characters() for corpus in corpora.values()))
        return tokenizers.Characters(found, config.boundary)
    weights = {name: max(weight for _, weight in config.mixture[name].pairs) if name else 1.0 for name in corpora}
    total = sum(weights.values())
    sample = [text for name, one in corpora.items() for text in one.sample(max(1, int(SAMPLE * weights[name] / total)))]
    special = config.fim_tokens if config.fim_rate else ()
    return tokenizers.train_sentencepiece(sample, config.vocab_size, config.boundary, special)


def _learn_together(config: DataConfig, parts: Mapping[str, tuple[str, DataConfig]]) -> Tokenizer:
    """The tokenizer that is made of all sources of a mixture, from the cache where it was made before."""
    root = cache.cache_root(config.cache)
    files = {name: find_files(part.source, f"{key}.source") for name, (key, part) in parts.items()}
    learnt = config.tokenizer == "sentencepiece"
    settings = {
        "format": FORMAT,
        "contents": [[name, _contents(one, root)] for name, one in files.items()],
        "policies": [_policy(part) for _, part in parts.values()],
        "weights": [one.pairs for one in config.mixture.values()] if learnt else None,
        "held_out": [config.held_out, config.test],
        "tokenizer": _wish(config),
    }

    def build(directory: Path) -> None:
        corpora = {
            name: Corpus(files[name], part.policy, part.held_out, part.test) for name, (_, part) in parts.items()
        }
        _learn(config, corpora).save(directory)

    def there(directory: Path) -> bool:
        return (directory / DESCRIPTION).exists()

    return tokenizers.load(cache.entry(root, cache.digest(json.dumps(settings, sort_keys=True)), build, there))
