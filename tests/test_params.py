"""One declaration, and what is derived from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax import params
from lm_jax.params import Normal, ParamSpec, initialize, ones, scaled_normal, stack, unstacked, zeros

SPECS = {
    "embedding": ParamSpec((64, 8), ("vocab", "embed"), Normal(0.02), fan_in=(), decay=False),
    "blocks": {
        "norm": {"gain": ParamSpec((3, 8), ("layers", "norm"), ones, fan_in=(), decay=False)},
        "out": ParamSpec((3, 2, 4, 8), ("layers", "heads", "head_dim", "embed"), scaled_normal(8), fan_in=(1, 2)),
    },
    "output": ParamSpec((8, 64), ("embed", "vocab"), scaled_normal(8)),
}
NAMES = ["blocks/norm/gain", "blocks/out", "embedding", "output"]


def test_names_count_roles_and_decay() -> None:
    assert list(params.named(SPECS)) == NAMES
    assert params.count(SPECS) == 64 * 8 + 3 * 8 + 3 * 2 * 4 * 8 + 8 * 64
    assert [params.role(s) for s in params.named(SPECS).values()] == ["vector", "matrix", "embedding", "head"]
    assert params.decay_mask(SPECS) == {
        "embedding": False,
        "blocks": {"norm": {"gain": False}, "out": True},
        "output": True,
    }
    assert params.describe(SPECS)["blocks/out"] == {
        "shape": [3, 2, 4, 8],
        "axes": ["layers", "heads", "head_dim", "embed"],
        "fan_in": [1, 2],
        "decay": True,
        "role": "matrix",
    }


def test_stacked_and_back() -> None:
    one = ParamSpec((2, 4, 8), ("heads", "head_dim", "embed"), zeros, fan_in=(0, 1))
    stacked = stack({"a": {"w": one}}, 5)["a"]["w"]
    assert stacked == ParamSpec((5, 2, 4, 8), ("layers", "heads", "head_dim", "embed"), zeros, fan_in=(1, 2))
    assert unstacked(stacked) == one == unstacked(one)


def test_initial_values() -> None:
    values = initialize({"w": ParamSpec((200, 100), ("embed", "vocab"), scaled_normal(200))} | SPECS, jax.random.key(0))
    assert abs(float(jnp.std(values["w"])) - 200**-0.5) < 0.02 * 200**-0.5
    assert abs(float(jnp.std(values["embedding"])) - 0.02) < 0.002
    assert (values["blocks"]["norm"]["gain"] == 1).all()
    shapes = jax.eval_shape(lambda key: initialize(SPECS, key, jnp.bfloat16), jax.random.key(0))
    assert {str(a.dtype) for a in jax.tree.leaves(shapes)} == {"bfloat16"}


def test_a_key_is_a_matter_of_the_name_alone() -> None:
    before = initialize(SPECS, jax.random.key(0))
    more = SPECS | {"a_new_one": SPECS["output"], "blocks": SPECS["blocks"] | {"another": SPECS["output"]}}
    after = initialize(more, jax.random.key(0))
    for path in ("embedding", "output"):
        np.testing.assert_array_equal(before[path], after[path])
    np.testing.assert_array_equal(before["blocks"]["out"], after["blocks"]["out"])
    assert not np.array_equal(after["a_new_one"], after["output"])  # another name, another key
    assert not np.array_equal(after["blocks"]["another"], after["a_new_one"])
    other = initialize(SPECS, jax.random.key(1))
    assert not np.array_equal(other["output"], before["output"])


def test_wrong_declarations_are_refused() -> None:
    with pytest.raises(ValueError, match="one name a dimension"):
        ParamSpec((2, 3), ("embed",), zeros)
    with pytest.raises(ValueError, match="does not have"):
        ParamSpec((2, 3), ("embed", "vocab"), zeros, fan_in=(2,))
