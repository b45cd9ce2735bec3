"""Times are the arithmetic's: FLOPs over the peak, bytes over the bandwidth, rings over their links."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import pytest

from lm_jax.hlo import Collective
from lm_jax.preflight.chips import CHIPS, Chip, target_of
from lm_jax.preflight.roofline import Link, Time, attends_in_kernels, links_of, seconds_of, step_time

PLAIN = Chip("TPU v5 lite", 2**34, memory_bandwidth=1e9, link=1e9, wraps=16, network=1e8)


def time_of(
    f: Callable, *shapes: tuple[int, ...], peak: float = 1e12, found: Sequence[Collective] = (), **given: float
) -> Time:
    """The bound of a jitted function of float32 arrays, compiled for this machine."""
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    text = jax.jit(f).lower(*arguments).compile().as_text()
    links = {("fsdp",): Link("ici", 1e9, 4), ("tensor",): Link("ici", 1e9, 2)}
    attention = (given.get("forward", 0.0), given.get("backward", 0.0))
    return step_time(text, list(found), PLAIN, peak, links, attention_flops=attention, head_dim=128)


def test_a_product_takes_its_flops_or_its_bytes() -> None:
    shapes = (300, 500), (500, 700)
    arithmetic = time_of(jnp.dot, *shapes, peak=1e6)
    assert arithmetic.compute == pytest.approx(2 * 300 * 500 * 700 / 1e6) and arithmetic.memory == 0
    moving = time_of(jnp.dot, *shapes, peak=1e15)
    assert moving.memory == pytest.approx(4 * (300 * 500 + 500 * 700 + 300 * 700) / 1e9) and moving.compute == 0
    assert (arithmetic.bound_by, moving.bound_by) == ("arithmetic", "memory bandwidth")


def test_a_loop_s_body_counts_as_often_as_it_runs_and_reads_its_slice() -> None:
    """Forty layers of [64, 64] on [32, 64]: each step reads its own layer, not all forty."""
    layers = 40

    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.dot(x, w), None), x, w)[0]

    arithmetic = time_of(f, (32, 64), (layers, 64, 64), peak=1e5)
    assert arithmetic.compute == pytest.approx(layers * 2 * 32 * 64 * 64 / 1e5, rel=1e-3)
    moving = time_of(f, (32, 64), (layers, 64, 64), peak=1e15)
    least = 4 * (64 * 64 + 2 * 32 * 64)  # a layer's weight, what goes in and what comes out
    assert layers * least / 1e9 <= moving.memory < 4 * layers * least / 1e9


def test_products_side_by_side() -> None:
    def f(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum("bmk,bkn->bmn", x, y)

    found = time_of(f, (16, 30, 50), (16, 50, 70), peak=1e6)
    assert found.compute == pytest.approx(16 * 2 * 30 * 50 * 70 / 1e6)


CUBLAS = """HloModule m

ENTRY %main (a: bf16[8,300,500], b: bf16[8,500,700]) -> bf16[8,300,700] {
  %a = bf16[8,300,500]{2,1,0} parameter(0)
  %b = bf16[8,500,700]{2,1,0} parameter(1)
  %both = (bf16[8,300,700]{2,1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  ROOT %out = bf16[8,300,700]{2,1,0} get-tuple-element(%both), index=0
}
"""  # noqa: E501 (a compiler's lines)


def test_a_gpu_library_s_product_takes_its_flops() -> None:
    found = step_time(CUBLAS, [], PLAIN, 1e6, {}, attention_flops=(0.0, 0.0), head_dim=128)
    assert found.compute == pytest.approx(8 * 2 * 300 * 500 * 700 / 1e6)
    assert not attends_in_kernels(CUBLAS)
    for kernel in ("__cudnn$fmhaSoftmax", "mosaic_gpu_v2"):  # the latter is what Pallas' kernels for Hopper are called
        assert attends_in_kernels(CUBLAS.replace("__cublas$lt$matmul", kernel))


STACKS = """HloModule m

%cut (s: bf16[40,64,64], i: s32[]) -> bf16[64,64] {
  %s = bf16[40,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,64,64]{2,1,0} dynamic-slice(%s, %i, %zero, %zero), dynamic_slice_sizes={1,64,64}
  ROOT %flat = bf16[64,64]{1,0} bitcast(%slice)
}

%work (x: bf16[64,64], read: bf16[40,64,64], put: bf16[40,64,64], on: f32[1000], n: s32[]) -> (bf16[40,64,64], f32[1000]) {
  %x = bf16[64,64]{1,0} parameter(0)
  %read = bf16[40,64,64]{2,1,0} parameter(1)
  %put = bf16[40,64,64]{2,1,0} parameter(2)
  %on = f32[1000]{0} parameter(3)
  %n = s32[] parameter(4)
  %zero2 = s32[] constant(0)
  %here = bf16[64,64]{1,0} fusion(%read, %n), kind=kLoop, calls=%cut
  %sum = bf16[64,64]{1,0} add(%x, %here)
  %one = bf16[1,64,64]{2,1,0} bitcast(%sum)
  %into = bf16[40,64,64]{2,1,0} dynamic-update-slice(%put, %one, %n, %zero2, %zero2)
  ROOT %out = (bf16[40,64,64]{2,1,0}, f32[1000]{0}) tuple(%into, %on)
}

ENTRY %main (a: bf16[64,64], b: bf16[40,64,64], c: bf16[40,64,64], d: f32[1000], e: s32[]) -> (bf16[40,64,64], f32[1000]) {
  %a = bf16[64,64]{1,0} parameter(0)
  %b = bf16[40,64,64]{2,1,0} parameter(1)
  %c = bf16[40,64,64]{2,1,0} parameter(2)
  %d = f32[1000]{0} parameter(3)
  %e = s32[] parameter(4)
  ROOT %all = (bf16[40,64,64]{2,1,0}, f32[1000]{0}) fusion(%a, %b, %c, %d, %e), kind=kOutput, calls=%work
}
"""  # noqa: E501 (a compiler's lines)


def test_of_a_stack_only_what_is_cut_or_put_is_moved() -> None:
    """Also in a fusion inside a fusion, and among several results, of which one is an operand handed on."""
    time = step_time(STACKS, [], PLAIN, 1e15, {}, attention_flops=(0.0, 0.0), head_dim=128)
    assert time.memory == pytest.approx((3 * 2 * 64 * 64 + 4) / 1e9)  # x, what is cut, what is put; the index


def test_of_what_is_cut_in_parts_only_the_parts_are_read() -> None:
    """Layers that are unrolled cut their weights out of the stack one by one."""
    cut = STACKS.replace("dynamic-slice(%s, %i, %zero, %zero), dynamic_slice_sizes={1,64,64}", "slice(%s), slice={}")
    time = step_time(cut, [], PLAIN, 1e15, {}, attention_flops=(0.0, 0.0), head_dim=128)
    assert time.memory == pytest.approx((3 * 2 * 64 * 64 + 4) / 1e9)
    cast = cut.replace("parameter(0)\n  %i =", "parameter(0)\n  %w = f32[40,64,64]{2,1,0} convert(%s)\n  %i =")
    cast = cast.replace("slice = bf16[1,64,64]{2,1,0} slice(%s)", "slice = f32[1,64,64]{2,1,0} slice(%w)")
    assert "convert(%s)" in cast and "slice(%w)" in cast
    time = step_time(cast, [], PLAIN, 1e15, {}, attention_flops=(0.0, 0.0), head_dim=128)
    assert time.memory == pytest.approx((3 * 2 * 64 * 64 + 4) / 1e9)  # in the dtype in which it lies there
    moving = time_of(lambda x: x[3:5] * 1.0, (40, 64, 64), peak=1e15)
    assert moving.memory == pytest.approx(2 * 4 * 2 * 64 * 64 / 1e9, rel=1e-3)


def sent(bytes_: int, overlaps: bool, loop: str = "") -> Collective:
    return Collective("all-gather", ("fsdp",), bytes_, 1, False, "bf16", "", loop, overlaps)


def test_what_runs_beside_other_work_costs_only_what_is_left_of_it() -> None:
    shapes = (300, 500), (500, 700)
    alone = time_of(jnp.dot, *shapes, peak=1e9)  # 0.21 s
    short, long = int(1e8), int(4e8)  # on four devices at 1 GB/s: 0.075 s and 0.3 s
    assert time_of(jnp.dot, *shapes, peak=1e9, found=[sent(short, True)]).total == pytest.approx(alone.total)
    assert time_of(jnp.dot, *shapes, peak=1e9, found=[sent(short, False)]).total == pytest.approx(alone.total + 0.075)
    beside = time_of(jnp.dot, *shapes, peak=1e9, found=[sent(long, True)])
    assert beside.total == pytest.approx(max(alone.total, 0.3), rel=1e-3)
    (sums,) = time_of(jnp.dot, *shapes, found=[sent(short, True), sent(3 * short, False)]).sent
    assert (sums.bytes, sums.overlaps) == (4 * short, 0.25) and sums.seconds == pytest.approx(0.3)


def test_attention_s_kernels_take_their_flops_at_the_rate_they_reach() -> None:
    plain = time_of(jnp.dot, (8, 8), (8, 8))
    both = time_of(jnp.dot, (8, 8), (8, 8), forward=1e12, backward=3e12)
    assert both.compute - plain.compute == pytest.approx(4 / 0.95, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [
        ("all-gather", 0.75),
        ("reduce-scatter", 0.75),
        ("all-reduce", 1.5),
        ("collective-permute", 1.0),
        ("all-to-all", 1.0),
    ],
)
def test_a_ring_of_four(kind: str, seconds: float) -> None:
    assert seconds_of(kind, 1e9, Link("ici", 1e9, 4)) == pytest.approx(seconds)


def places(shape: tuple[int, ...], slices: int = 1) -> list[list[int]]:
    """Devices of slices of a torus in order, as a mesh of (data, fsdp, sequence, tensor) would take them."""
    torus = list(itertools.product(*(range(n) for n in shape)))
    return [[s, *place, *[0] * (3 - len(shape)), 0] for s in range(slices) for place in torus]


def test_links_follow_from_where_a_group_lies() -> None:
    v5e, v5p, h200 = CHIPS["v5e"], CHIPS["v5p"], CHIPS["h200"]
    rows, pod = {"data": 16, "fsdp": 16, "sequence": 1, "tensor": 1}, target_of("v5e:16x16")
    whole = links_of(places((16, 16)), rows, ("data", "fsdp"), pod)
    assert whole == Link("ici", 4 * v5e.link, 256)  # two dimensions, each closed to a ring
    assert links_of(places((16, 16)), rows, ("fsdp",), pod) == Link("ici", 2 * v5e.link, 16)
    small = {"data": 4, "fsdp": 4, "sequence": 1, "tensor": 1}
    assert links_of(places((4, 4)), small, ("fsdp",), target_of("v5e:4x4")) == Link("ici", v5e.link, 4)  # a line
    cube = {"data": 1, "fsdp": 16, "sequence": 1, "tensor": 4}
    assert links_of(places((4, 4, 4)), cube, ("fsdp",), target_of("v5p:4x4x4")) == Link("ici", 4 * v5p.link, 16)
    two, pair = {"data": 2, "fsdp": 16, "sequence": 1, "tensor": 1}, target_of("v5e:4x4", 2)
    assert links_of(places((4, 4), 2), two, ("data",), pair) == Link("network", v5e.network, 2)
    assert links_of(places((4, 4), 2), two, ("fsdp",), pair).name == "ici"
    hosts, gpus = [[i // 8, 0, 0, 0, 0] for i in range(16)], target_of("h200:16")
    within, over = ({"data": d, "fsdp": 16 // d, "sequence": 1, "tensor": 1} for d in (2, 1))
    assert links_of(hosts, within, ("fsdp",), gpus) == Link("nvlink", h200.link, 8)
    assert links_of(hosts, over, ("fsdp",), gpus) == Link("network", 8 * h200.network, 16)
