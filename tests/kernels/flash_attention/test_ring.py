"""The order of a ring's positions, what each device computes when, and what is refused; `multi_device/check_context.py`
has the values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from lm_jax.kernels.flash_attention import IMPLEMENTATIONS, AttentionMask, LocalGlobal, Slopes, flash_attention
from lm_jax.kernels.flash_attention.implementation import Call
from lm_jax.kernels.flash_attention.ring import Sums, parts_of, ring_order, steps_of
from lm_jax.sharding import AXES
from tests.kernels.flash_attention.cases import OPTIONS, Shape, arguments, expected, joined, packed

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


# --- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("implementation", "tolerance"), [("reference", 1e-12), ("xla", 1e-12), ("pallas_tpu", 3e-6)])
def test_parts_of_the_keys_make_a_whole(implementation: str, tolerance: float) -> None:
    """What a device does in a ring, without the ring: keys in three parts at traced distances, one of them unseen by
    all, merged; and gradients a part from the outcome of the whole."""
    part = IMPLEMENTATIONS[implementation]
    assert part.forward is not None and part.backward is not None
    bare, shape, options = implementation == "pallas_tpu", Shape(B=2, T=60, S=60, N=4, K=2), OPTIONS["all"]
    dtype = np.float32 if bare else np.float64
    a = {n: x.astype(dtype) for n, x in arguments(shape, options).items()}
    mask = joined(packed(shape), window=45)
    want = expected({n: x.astype(np.float64) for n, x in a.items()}, mask, options)

    def together(a: dict[str, jax.Array]) -> dict[str, Any]:
        def call(first: int, size: int) -> Call:
            k, v, ids = (x[:, first : first + size] for x in (a["k"], a["v"], mask.kv_segment_ids))
            here = joined(mask, kv_segment_ids=ids, q_offset=-jnp.asarray(first, jnp.int32))
            sinks = a["sinks"] if first == 0 else None
            return Call(a["q"], k, v, here, options.scale, options.soft_cap, Slopes(a["bias"]), sinks)

        calls = [call(0, 20), call(20, 24), call(44, 16)]
        sums = Sums(jnp.zeros_like(a["q"]), jnp.full_like(a["g_lse"], -jnp.inf))
        for c in calls:
            sums = sums.merged(Sums(*part.forward(c)[:2]))
        grads = [part.backward(c, *sums, None, a["g"], a["g_lse"]) for c in calls]
        got = {"out": sums.out_BTNH, "lse": sums.lse_BTN, "d sinks": grads[0].sinks_N}
        got |= {"d q": sum(g.q_BTNH for g in grads), "d bias": sum(g.position_bias for g in grads)}
        got |= {"d k": jnp.concatenate([g.k_BSKH for g in grads], 1)}
        return got | {"d v": jnp.concatenate([g.v_BSKH for g in grads], 1)}

    with jax.enable_x64(not bare):
        got = jax.jit(together)(a)
    assert set(got) == set(want)
    for name, x in got.items():
        x, y = np.asarray(x, np.float64), want[name]
        assert np.linalg.norm(x - y) < tolerance * np.linalg.norm(y), name


def test_merging_knows_rows_that_see_nothing() -> None:
    nothing = Sums(jnp.zeros((1, 1, 1, 2)), jnp.full((1, 1, 1), -jnp.inf))
    some = Sums(jnp.ones((1, 1, 1, 2)), jnp.full((1, 1, 1), 3.0))
    for a, b in ((nothing, some), (some, nothing)):
        for x, y in zip(a.merged(b), some, strict=True):
            np.testing.assert_array_equal(x, y)
    for x, y in zip(nothing.merged(nothing), nothing, strict=True):
        np.testing.assert_array_equal(x, y)


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
