"""What a checkpoint says of itself, and whether that fits the run that wants it.

The manifest lists every leaf of the state with shape, dtype, PRNG implementation and fingerprint. The metadata carry
the run's identity (what must be the same for a resume to be the same run) and its config (what may differ, and is then
told). Both are JSON, sealed with a checksum.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lm_jax.errors import UserError
from lm_jax.params import path_name

Array = jax.Array
Tree = Any
Leaves = dict[str, Any]  # arrays, or what stands for them, by name

FORMAT = 1
IDENTITY = ("tokenizer", "data", "seed", "model", "dtype", "prng")  # what `checkpoint.accept` may name


class Damaged(Exception):
    """A checkpoint that cannot be trusted. The message names the leaf or the file."""


# --------------------------------------------------------------------------------------------------------------- leaves


def is_key(leaf: Any) -> bool:
    """Whether a leaf holds typed PRNG keys."""
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def implementation(leaf: Any) -> str:
    """The name of the PRNG that a leaf's keys belong to (`threefry2x32`, `rbg`, ...); empty for other leaves."""
    return _key_data(leaf.dtype)[0] if is_key(leaf) else ""


@functools.cache
def _key_data(dtype: Any) -> tuple[str, tuple[int, ...], str]:
    """Of a key dtype: its PRNG, and the shape and dtype of one key's data."""
    found: list[str] = []

    def look(key: Array) -> Array:  # abstract keys tell it under a trace only
        found.append(str(jax.random.key_impl(key)))
        return jax.random.key_data(key)

    data = jax.eval_shape(look, jax.ShapeDtypeStruct((), dtype))
    return found[0], data.shape, str(data.dtype)


def named_leaves(tree: Tree) -> Leaves:
    """A tree's leaves by name (`params/blocks/attention/query`), in the tree's order."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {path_name(path): leaf for path, leaf in pairs}
    if len(leaves) < len(pairs):
        raise ValueError("two leaves of this tree have the same name")
    return leaves


def describe(leaf: Any) -> dict[str, Any]:
    """A leaf as the manifest lists it, but for its fingerprint. Of keys, shape and dtype are those of their data."""
    if not is_key(leaf):
        return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "prng": ""}
    name, shape, dtype = _key_data(leaf.dtype)
    return {"shape": [*leaf.shape, *shape], "dtype": dtype, "prng": name}


def text_of(record: Mapping[str, Any]) -> str:
    """`float32 [3, 4]`, or `float32 [3, 4] (threefry2x32 keys)`."""
    keys = f" ({record['prng']} keys)" if record["prng"] else ""
    return f"{record['dtype']} {record['shape']}{keys}"


def mismatches(saved: Mapping[str, Any], wanted: Mapping[str, Any], accept: Iterable[str] = ()) -> list[str]:
    """One line for each leaf that differs between a manifest's records and those wanted; both values in each.

    Args:
      saved: the manifest's records by name.
      wanted: `describe` of the leaves wanted, by name. Leaves that are only in `saved` count as well.
      accept: `dtype` lets dtypes differ, `prng` the kinds of keys (and with them the shape of their data).
    """
    lines = []
    for name, want in wanted.items():
        have = saved.get(name)
        if have is None:
            lines.append(f"{name} is not in the checkpoint; here it is {text_of(want)}")
            continue
        keys = bool(have["prng"]) and bool(want["prng"])
        other_keys = keys and "prng" in accept
        other_dtype = not keys and "dtype" in accept
        same = (
            (have["prng"] == want["prng"] or other_keys)
            and (have["shape"] == want["shape"] or other_keys)
            and (have["dtype"] == want["dtype"] or other_keys or (other_dtype and not have["prng"]))
        )
        if not same:
            lines.append(f"{name} is {text_of(have)} in the checkpoint and {text_of(want)} here")
    lines += [
        f"{name} is {text_of(have)} in the checkpoint and not here"
        for name, have in saved.items()
        if name not in wanted
    ]
    return lines


def shorten(lines: list[str], most: int = 2) -> str:
    """The first of some lines, and how many more there are."""
    more = f"; and {len(lines) - most} more" if len(lines) > most else ""
    return "\n".join(lines[:most]) + more


# --------------------------------------------------------------------------------------------------------- sealed JSON


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON content with its checksum, as one JSON object."""
    content = json.loads(json.dumps(content))  # what will be read back: keys as text, tuples as lists
    return {"crc32": zlib.crc32(_canonical(content).encode()), "content": content}


def unseal(text: bytes, name: str) -> dict[str, Any]:
    """What `seal` was given.

    Raises:
      Damaged: where the text is no sealed JSON or does not match its checksum; names `name`.
    """
    try:
        sealed = json.loads(text)
        content, checksum = sealed["content"], sealed["crc32"]
        intact = isinstance(content, dict) and zlib.crc32(_canonical(content).encode()) == checksum
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise Damaged(f"{name} cannot be read") from e
    if not intact:
        raise Damaged(f"{name} does not match its checksum")
    return content


# ------------------------------------------------------------------------------------------------------------- identity


def compare(old: Mapping[str, Any], new: Mapping[str, Any], accept: Iterable[str] = ()) -> list[str]:
    """Whether a run may go on from a checkpoint.

    Args:
      old: the metadata of the checkpoint: `identity` (names to texts that must be the same), `config` (may differ).
      new: the same of the run that wants to go on.
      accept: names of the identity that may differ all the same (`checkpoint.accept`).

    Returns:
      One line for every difference in the config, and for every accepted one in the identity.

    Raises:
      UserError: where the identity differs in something not accepted; names it with both values.
    """
    names = dict.fromkeys((*old["identity"], *new["identity"]))
    pairs = {n: (old["identity"].get(n, "not stated"), new["identity"].get(n, "not stated")) for n in names}
    differ = {n: pair for n, pair in pairs.items() if pair[0] != pair[1]}
    refused = [n for n in differ if n not in accept]
    if refused:
        shown = {n: _where_they_differ(*map(str, differ[n])) for n in refused}
        said = "; ".join(f"{n}: {a} in the checkpoint, {b} now" for n, (a, b) in shown.items())
        names_text = ", ".join(f'"{n}"' for n in refused)
        raise UserError(
            f"the checkpoint belongs to a run with another {' and '.join(refused)}\n{said}\n"
            f"give another workdir, or go on all the same with checkpoint.accept = ({names_text},)"
        )
    lines = [f"{n}: {_clip(a)} -> {_clip(b)} (by checkpoint.accept)" for n, (a, b) in differ.items()]
    was, now = _flat(old.get("config", {})), _flat(new.get("config", {}))
    for key in dict.fromkeys((*was, *now)):
        a, b = was.get(key, "not set"), now.get(key, "not set")
        if a != b:
            lines.append(f"{key}: {_clip(a)} -> {_clip(b)}")
    return lines


def _clip(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _where_they_differ(a: str, b: str) -> tuple[str, str]:
    """Two texts, cut to the part where they are first different."""
    pairs = enumerate(zip(a, b, strict=False))
    at = next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
    begin = at - 20 if at > 30 and max(len(a), len(b)) > 60 else 0
    first, second = ("..." * bool(begin) + _clip(text[begin:]) for text in (a, b))
    return first, second


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config by dotted keys, its values as JSON would hand them back."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
