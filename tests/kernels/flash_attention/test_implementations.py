"""Every implementation against the reference in float64: value, log-sum-exp and all gradients, over one grid.

`xla` runs in float64 itself, where only a wrong formula can differ. The TPU kernels run in Pallas's interpreter with
its race detector, a sample of the grid in the fast tests and all of it in the slow ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_jax.kernels.flash_attention import AttentionMask, pallas_tpu_forward, reference, xla
from lm_jax.kernels.flash_attention.implementation import Call
from tests.kernels.flash_attention.cases import (
    MASKS,
    OPTIONS,
    SHAPES,
    Options,
    Shape,
    arguments,
    check,
    expected,
    value_and_gradients,
)
from tests.support.races import assert_no_races, detected

TOLERANCE: dict[Any, float] = {np.float32: 2e-6, jnp.bfloat16: 1.5e-2, jnp.float16: 2e-3}
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
# Short rows in the interpreter, which takes its time; its blocks and chunks are small enough for tiles of every kind.
SHORT = Shape(B=2, T=300, S=300, N=2, K=1, H=16)
SAMPLE = {"segments", "all parts"}  # of the masks, for TPU in the fast tests


def slow_unless(fast: bool, *values: Any) -> Any:
    return pytest.param(*values, marks=() if fast else pytest.mark.slow)


# --- xla -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["kept", "in loops"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With the probabilities that the forward pass kept, and as long rows are computed."""
    if request.param == "in loops":
        jax.clear_caches()  # a call's program is known by its arguments
        monkeypatch.setattr(xla, "kept_probabilities", lambda call: 0)
        yield
        jax.clear_caches()
    else:
        yield


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("mask", list(MASKS))
def test_xla_on_every_mask(mask: str) -> None:
    check("xla", Shape(), MASKS[mask])


@pytest.mark.parametrize("options", [o for o in OPTIONS if o != "plain"])
def test_xla_with_every_option(options: str) -> None:
    check("xla", Shape(), MASKS["segments"], OPTIONS[options])


@pytest.mark.parametrize("shape", list(SHAPES))
def test_xla_on_every_shape(shape: str) -> None:
    check("xla", SHAPES[shape], MASKS["causal"])
    check("xla", SHAPES[shape], MASKS["all parts"], OPTIONS["all"])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_xla_in_every_dtype(dtype: Any) -> None:
    check("xla", Shape(), MASKS["segments"], OPTIONS["sinks"], dtype, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("mask", "options"), [("causal", "plain"), ("window", "all"), ("all parts", "table"), ("segments", "slopes")]
)
def test_xla_on_long_rows(mask: str, options: str) -> None:
    """Where it loops over blocks and computes the probabilities again in the backward pass."""
    check("xla", Shape(B=1, T=2100, S=2100, N=2, K=1, H=8), MASKS[mask], OPTIONS[options])


# --- pallas_tpu ------------------------------------------------------------------------------------------------------


def check_tpu(*a: Any, cores: int = 2, **k: Any) -> None:
    """`check` of the TPU kernels, and that neither races on so many cores."""
    with detected(cores) as seen:
        check("pallas_tpu", *a, **k)
    assert_no_races(seen, kernels=2)


@pytest.mark.parametrize("mask", [slow_unless(m in SAMPLE, m) for m in MASKS])
def test_tpu_on_every_mask(mask: str) -> None:
    check_tpu(SHORT, MASKS[mask], dtype=np.float32, tolerance=TOLERANCE[np.float32])


@pytest.mark.parametrize("options", [slow_unless(o == "all", o) for o in OPTIONS if o not in ("plain", "table")])
def test_tpu_with_every_option(options: str) -> None:
    check_tpu(SHORT, MASKS["segments"], OPTIONS[options], np.float32, TOLERANCE[np.float32])


@pytest.mark.parametrize("shape", [slow_unless(s == "more keys", s) for s in SHAPES])
def test_tpu_on_every_shape(shape: str) -> None:
    s = SHAPES[shape].replace(H=8)
    check_tpu(s, MASKS["all parts"], OPTIONS["sinks"], np.float32, TOLERANCE[np.float32])


@pytest.mark.parametrize("H", [slow_unless(False, h) for h in HEAD_DIMS])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_tpu_with_every_head_dim_and_dtype(H: int, dtype: Any) -> None:
    check_tpu(SHORT.replace(T=200, S=200, H=H), MASKS["causal"], dtype=dtype, tolerance=TOLERANCE[dtype])


def test_tpu_in_bfloat16() -> None:
    check_tpu(SHORT, MASKS["causal"], dtype=jnp.bfloat16, tolerance=TOLERANCE[jnp.bfloat16])


@pytest.mark.parametrize("window", [slow_unless(False, None), 300])
def test_tpu_forward_cuts_chunks_into_parts(window: int | None) -> None:
    """Chunks longer than their parts, as on the chips; open ones in small bodies, and keys and queries left over."""
    a = {n: jnp.asarray(x, jnp.float32) for n, x in arguments(Shape(B=1, T=1400, S=1400, N=1, K=1, H=8)).items()}
    ids = jnp.arange(1400)[None] // 1300
    mask = AttentionMask(causal=False, window=window, q_segment_ids=ids, kv_segment_ids=ids)
    call = Call(a["q"], a["k"], a["v"], mask, 0.3)
    out, lse = pallas_tpu_forward.forward(
        call, pallas_tpu_forward.ForwardBlocks(1024, 1536, 512, 512, True), interpret=True
    )
    want, want_lse = reference.attend(call)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6)


# --- what numbers can do ---------------------------------------------------------------------------------------------


def late_spike(a: dict[str, np.ndarray]) -> None:
    a["k"][:, -20] = 12 * a["q"][:, -10, :1]


def first_keys_far_below(a: dict[str, np.ndarray]) -> None:
    a["k"][:, :128] = -6 * np.sign(a["q"][:, -1:, :1])


def large(a: dict[str, np.ndarray]) -> None:
    a["q"] *= 30
    a["k"] *= 30


@pytest.mark.parametrize("change", [late_spike, first_keys_far_below, large])
@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_scores_of_any_size(implementation: str, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A maximum that comes late, early or nowhere near 0 leaves the sums exact; float32's exp ends at 88."""

    def changed(*a: Any, **k: Any) -> dict[str, np.ndarray]:
        made = arguments(*a, **k)
        change(made)
        return made

    monkeypatch.setattr("tests.kernels.flash_attention.cases.arguments", changed)
    # Scores of hundreds are known to 1e-5 in float32, and so are their exponentials.
    # One core: what these numbers do is not a matter of order, and the second takes as long again to compile.
    checked = (
        functools.partial(check_tpu, cores=1) if implementation == "pallas_tpu" else functools.partial(check, "xla")
    )
    checked(SHORT.replace(B=1), MASKS["causal"], dtype=np.float32, tolerance=2e-4)


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_what_is_not_a_number_shows(implementation: str) -> None:
    """A query of NaN gives NaN and no other query does; its gradient reaches the keys that it saw. (A sum that is not
    above zero must not be taken for a query that sees nothing.)"""
    a = {n: x.astype(np.float32) for n, x in arguments(SHORT.replace(B=1, T=130, S=130)).items()}
    a["q"][0, 60, 0, 3] = np.nan
    got = value_and_gradients(implementation, a, AttentionMask(), Options())
    wrong = np.isnan(got["out"][0]).any(-1)  # [T, N]
    assert wrong[60, 0] and wrong.sum() == 1 and np.isnan(got["lse"][0, 60, 0])
    assert np.isnan(got["d q"][0, 60, 0]).any()
    assert all(np.isnan(got[n][0, :61]).any(-1).all() for n in ("d k", "d v"))


@pytest.mark.parametrize("implementation", ["xla", slow_unless(False, "pallas_tpu")])
@settings(max_examples=12, deadline=None)
@given(st.data())
def test_random_calls(implementation: str, data: Any) -> None:
    shape = data.draw(st.sampled_from([Shape(1, 150, 150, 2, 1, 8), Shape(2, 33, 140, 2, 2, 8)]))
    mask = data.draw(st.sampled_from(list(MASKS)))
    options = data.draw(st.sampled_from([n for n in OPTIONS if n != "table" or implementation == "xla"]))
    window = data.draw(st.one_of(st.none(), st.integers(1, 200)))

    def masked(s: Shape) -> AttentionMask:
        made = MASKS[mask](s)
        return made if window is None else dataclasses.replace(made, window=window)

    if implementation == "xla":
        check(implementation, shape, masked, OPTIONS[options])
        return
    # Slopes give scores up to 90 here, which float32 knows to 5e-6, and their exponentials with them; the slopes' own
    # gradient is a sum of such terms of both signs.
    tolerance = 3e-5 if options in ("slopes", "all") else TOLERANCE[np.float32]
    check(implementation, shape, masked, OPTIONS[options], np.float32, tolerance)


def test_the_comparison_can_fail() -> None:
    """A window one key too narrow, a head's slope a little off: the grid would see both."""
    shape = Shape(T=100, S=100)
    a = arguments(shape)
    want = expected(a, AttentionMask(window=40), Options())
    got = expected(a, AttentionMask(window=39), Options())
    for name in want:
        difference = np.linalg.norm(want[name] - got[name]) / np.linalg.norm(want[name])
        assert difference > 100 * TOLERANCE[np.float32], name
