"""The order of a ring's positions, what each device computes when, and what is refused; `multi_device/check_context.py`
has the values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from lm_jax.kernels.flash_attention import AttentionMask, LocalGlobal, flash_attention
from lm_jax.kernels.flash_attention.ring import parts_of, ring_order, steps_of
from lm_jax.sharding import AXES

MASKS = {
    "causal": AttentionMask(),
    "narrow window": AttentionMask(window=20),
    "a window of one": AttentionMask(window=1),
    "one device's window": AttentionMask(window=25),
    "wide window": AttentionMask(window=100),
    "not causal": AttentionMask(causal=False),
    "window both ways": AttentionMask(causal=False, window=30),
}


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_each_device_has_an_early_and_a_late_chunk(parts: int) -> None:
    order = ring_order(48 * parts, parts)
    np.testing.assert_array_equal(np.sort(order), np.arange(48 * parts))
    for i, here in enumerate(order.reshape(parts, 2, 24)):
        for chunk, positions in zip((i, 2 * parts - 1 - i), here, strict=True):
            np.testing.assert_array_equal(positions, np.arange(24) + 24 * chunk)


def test_the_order_is_plain_where_work_is_even_without() -> None:
    np.testing.assert_array_equal(ring_order(24, 4, window=5), np.arange(24))
    np.testing.assert_array_equal(ring_order(24, 4, causal=False), np.arange(24))
    np.testing.assert_array_equal(ring_order(24, 1), np.arange(24))


@pytest.mark.parametrize("n", [2, 4, 8])
def test_each_device_has_the_same_work_in_each_step(n: int) -> None:
    T = 256
    at = ring_order(n * T, n).reshape(n, T)
    live = np.array([[(at[i][:, None] >= at[(i - s) % n]).sum() for s in range(n)] for i in range(n)])
    assert live.max() / live.min() < 1.02
    np.testing.assert_array_equal(live.sum(), n * T * (n * T + 1) // 2)


def computed(mask: AttentionMask, i: int, n: int, T: int, by_distance: bool) -> tuple[np.ndarray, list[int]]:
    """`[T, n T]`: how often a query of device `i` meets a key (by true position, as the mask of the part allows), and
    how many pairs each step computes; distances are checked where scores depend on them."""
    order = ring_order(n * T, n, mask.window, mask.causal).reshape(n, T)
    seen, work = np.zeros((T, n * T), int), []
    for step in range(steps_of(mask, n * T, n)):
        sender = (i - step) % n
        work.append(0)
        for part in parts_of(mask, T, n, jnp.int32(i), step, by_distance):
            q0, k0, apart = int(part.queries.start), int(part.keys.start), int(part.distance)
            queries, keys = np.arange(q0, q0 + part.queries.size), np.arange(k0, k0 + part.keys.size)
            here = AttentionMask(part.causal, mask.window, q_offset=jnp.int32(apart))
            see = np.asarray(here.allowed(len(queries), len(keys)))[0]
            np.add.at(seen, (queries[:, None], order[sender][keys]), see)
            work[-1] += int(see.sum())
            true = order[i][queries][:, None] - order[sender][keys]
            assumed = apart + np.arange(len(queries))[:, None] - np.arange(len(keys))
            if by_distance:
                np.testing.assert_array_equal(true, assumed)
    return seen, work


@pytest.mark.parametrize("by_distance", [False, True])
@pytest.mark.parametrize("mask", list(MASKS))
def test_each_query_meets_each_key_that_it_sees_once(mask: str, by_distance: bool) -> None:
    n, T, m = 4, 24, MASKS[mask]
    work = []
    for i in range(n):
        seen, by_step = computed(m, i, n, T, by_distance)
        order = ring_order(n * T, n, m.window, m.causal)[i * T : (i + 1) * T]
        np.testing.assert_array_equal(seen, m.by_position(order[:, None], np.arange(n * T)))
        work.append(by_step)
    if mask == "causal":
        assert all(one == work[0] for one in work), work


def test_a_window_goes_only_as_far_as_it_reaches() -> None:
    reach = {1: 1, 2: 2, 25: 2, 26: 3, 49: 3, 1000: 4}
    assert {w: steps_of(AttentionMask(window=w), 96, 4) for w in reach} == reach
    assert steps_of(AttentionMask(), 96, 4) == 4


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(
    context: str, sizes: tuple[int, int, int, int], T: int = 64, S: int = 64, N: int = 8, **of_mask: Any
) -> str:
    """What a call is refused with on a mesh that is only described."""
    mesh = AbstractMesh(sizes, AXES, (AxisType.Explicit,) * 4)
    shapes = [jax.ShapeDtypeStruct((2, L, heads, 8), jnp.float32) for L, heads in ((T, N), (S, 2), (S, 2))]
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError) as e:
        jax.eval_shape(
            lambda q, k, v: flash_attention(q, k, v, mask=AttentionMask(**of_mask), context=context), *shapes
        )
    return str(e.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"T": 32}, "these are 32 and 64"),
        ({"T": 60, "S": 60}, "4 devices hold 8 chunks, which do not divide a length of 60: use 64"),
        ({"T": 66, "S": 66, "window": 3}, "4 devices hold 4 chunks, which do not divide a length of 66: use 64"),
        ({"prefix_length": 3}, "no mask.prefix_length"),
        ({"pattern": LocalGlobal()}, "no mask.pattern"),
        ({"kv_length": 3, "q_offset": 1}, "no mask.kv_length, no mask.q_offset"),
        ({"q_offset": np.zeros(2, np.int32)}, "no mask.q_offset"),
    ],
)
def test_what_cannot_go_round_a_ring_is_refused(changes: dict[str, Any], said: str) -> None:
    assert said in refused("ring", (1, 1, 4, 1), **changes)


def test_heads_that_devices_cannot_share_are_refused() -> None:
    said = refused("all_to_all", (1, 1, 4, 2), N=12)
    assert "12 query heads of q_BTNH among tensor=2 x sequence=4 = 8 devices" in said
    assert "mesh.sequence=3" in said


def test_an_unknown_context_is_refused() -> None:
    assert "context is 'rings': use one of gather, ring, all_to_all" in refused("rings", (1, 1, 1, 1))


def test_a_length_that_cannot_be_cut_has_no_order() -> None:
    with pytest.raises(ValueError, match="use 64"):
        ring_order(60, 4)
