"""What a checkpoint says of itself, and the comparison with the run that wants it."""

import jax
import jax.numpy as jnp
import pytest

from lm_jax.errors import UserError
from lm_jax.training.manifest import Damaged, compare, describe, implementation, mismatches, named_leaves, seal, unseal

IDENTITY = {"tokenizer": "bpe-1", "data": "books", "seed": "0", "model": "tiny", "dtype": "float32", "prng": "rbg"}


def _metadata(**changes: object) -> dict[str, object]:
    config = {"train": {"steps": 100, "batch_size": 8}, "mesh": {"data": 1}}
    return {"identity": IDENTITY | changes, "config": config}


def test_keys_are_described_by_their_data() -> None:
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        key = jax.random.key(0, impl=name)
        assert implementation(key) == implementation(jax.ShapeDtypeStruct(key.shape, key.dtype)) == name
    assert describe(jax.random.split(jax.random.key(0), 3)) == {
        "shape": [3, 2],
        "dtype": "uint32",
        "prng": "threefry2x32",
    }
    assert describe(jnp.zeros((2, 3), jnp.bfloat16)) == {"shape": [2, 3], "dtype": "bfloat16", "prng": ""}


def test_leaves_have_one_name_each() -> None:
    assert list(named_leaves({"b": {"c": 1}, "a": [2, 3]})) == ["a/0", "a/1", "b/c"]
    with pytest.raises(ValueError, match="same name"):
        named_leaves({"a": {"b": 1}, "a/b": 2})


def test_every_kind_of_mismatch_is_named_with_both_values() -> None:
    key = jax.random.key(0)
    saved = {
        "w": jnp.zeros((2, 3)),
        "dtype": jnp.zeros(2),
        "key": key,
        "raw": jnp.zeros(2, jnp.uint32),
        "more": jnp.zeros(1),
    }
    wanted = saved | {
        "w": jnp.zeros((2, 4)),
        "dtype": jnp.zeros(2, jnp.bfloat16),
        "key": jax.random.key(0, impl="rbg"),
        "raw": key,
        "less": jnp.zeros(1),
    }
    wanted.pop("more")
    records = [{name: describe(leaf) for name, leaf in tree.items()} for tree in (saved, wanted)]
    assert mismatches(records[0], records[0]) == []
    assert mismatches(*records) == [
        "w is float32 [2, 3] in the checkpoint and float32 [2, 4] here",
        "dtype is float32 [2] in the checkpoint and bfloat16 [2] here",
        "key is uint32 [2] (threefry2x32 keys) in the checkpoint and uint32 [4] (rbg keys) here",
        "raw is uint32 [2] in the checkpoint and uint32 [2] (threefry2x32 keys) here",
        "less is not in the checkpoint; here it is float32 [1]",
        "more is float32 [1] in the checkpoint and not here",
    ]
    accepted = mismatches(*records, accept=("dtype", "prng"))
    assert [line.split()[0] for line in accepted] == ["w", "raw", "less", "more"]


def test_a_seal_holds_what_json_holds() -> None:
    import json

    content = {"b": (1, 2.5, None), 3: "é", "a": {"deep": [True]}}
    text = json.dumps(seal(content))
    assert unseal(text.encode(), "x") == {"b": [1, 2.5, None], "3": "é", "a": {"deep": [True]}}


@pytest.mark.parametrize("change", [(b"1234", b"1235"), (b"rows", b"rowz"), (b"}", b""), (b'"content"', b'"c"')])
def test_a_changed_seal_is_damaged(change: tuple[bytes, bytes]) -> None:
    import json

    text = json.dumps(seal({"rows": 1234})).encode()
    with pytest.raises(Damaged, match="metadata"):
        unseal(text.replace(*change), "metadata")
    with pytest.raises(Damaged, match="metadata"):
        unseal(b"[1]", "metadata")


@pytest.mark.parametrize("name", IDENTITY)
def test_another_identity_is_refused_unless_accepted(name: str) -> None:
    old, new = _metadata(), _metadata(**{name: "other"})
    with pytest.raises(UserError) as caught:
        compare(old, new)
    text = str(caught.value)
    assert f"another {name}\n{name}: {IDENTITY[name]} in the checkpoint, other now" in text
    assert f'checkpoint.accept = ("{name}",)' in text and len(text.splitlines()) == 3
    assert compare(old, new, (name,)) == [f"{name}: {IDENTITY[name]} -> other (by checkpoint.accept)"]


def test_all_that_is_refused_is_named_at_once() -> None:
    with pytest.raises(UserError, match=r'(?s)another data and seed\n.*\("data", "seed",\)'):
        compare(_metadata(), _metadata(data="x", seed="y", model="z"), ("model",))


def test_other_settings_are_told() -> None:
    new = {"identity": IDENTITY, "config": {"train": {"steps": 200, "batch_size": 8, "clip": (1, 2)}, "mesh": {}}}
    assert compare(_metadata(), new) == [
        "train.steps: 100 -> 200",
        "mesh.data: 1 -> not set",
        "train.clip: not set -> [1, 2]",
    ]
    assert compare(_metadata(), _metadata()) == []
