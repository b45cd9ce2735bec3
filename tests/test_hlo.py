"""The reader of compiled programs, on pieces of text in the forms that XLA prints."""

from __future__ import annotations

import pytest

from lm_jax.hlo import collectives, measured

MESH = {"data": 2, "fsdp": 1, "sequence": 1, "tensor": 4}


def program(body: str, more: str = "") -> str:
    """An HLO module of one entry computation."""
    return f"HloModule jit_f, num_partitions=8\n\n{more}\nENTRY %main.1 (p: bf16[8,16]) -> bf16[8,16] {{\n{body}\n}}\n"


P = "  %p = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} parameter(0)\n"
SUM = "%sum (a: bf16[], b: bf16[]) -> bf16[] {\n  %a = bf16[] parameter(0)\n  ROOT %b = bf16[] parameter(1)\n}\n"


@pytest.mark.parametrize(
    ("groups", "axes", "parts"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("tensor",), 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("{}", ("data", "tensor"), 8),
        ("[2,4]<=[8]", ("tensor",), 4),
        ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("[1,8]<=[8]", ("data", "tensor"), 8),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("tensor",), 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ("data",), 2),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", ("data", "tensor"), 8),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", ("data",), 2),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", ("tensor",), 4),
    ],
)
def test_groups_are_axes_of_the_mesh(groups: str, axes: tuple[str, ...], parts: int) -> None:
    line = f"  ROOT %g = bf16[99]{{0}} all-gather(%p), channel_id=1, replica_groups={groups}, dimensions={{0}}"
    assert measured(program(P + line), MESH) == {("all-gather", axes): parts * 8 * 16 * 2}


def test_groups_of_one_device_move_nothing() -> None:
    line = "  ROOT %g = bf16[8,16]{1,0} all-reduce(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%sum"
    assert measured(program(P + line, SUM), MESH) == {}


@pytest.mark.parametrize(
    ("line", "kind", "size"),
    [
        ("bf16[2,16]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[8], to_apply=%sum", "reduce-scatter", 256),
        ("bf16[8,16]{1,0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%sum", "all-reduce", 256),
        ("bf16[8,16]{1,0} all-to-all(%p), replica_groups=[2,4]<=[8], dimensions={0}", "all-to-all", 256),
        ("bf16[8,16]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,2}}", "collective-permute", 256),
        ("(bf16[8,16], bf16[32,16]) all-gather-start(%p), replica_groups=[2,4]<=[8]", "all-gather", 1024),
    ],
)
def test_bytes_are_those_of_the_larger_side(line: str, kind: str, size: int) -> None:
    assert measured(program(f"{P}  ROOT %c = {line}", SUM), MESH) == {(kind, ("tensor",)): size}


def loop(condition: str, attributes: str = "") -> str:
    body = f"""%body (b: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {{
  %b = (s32[], bf16[8,16]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = bf16[8,16]{{1,0}} get-tuple-element(%b), index=1
  %r = bf16[8,16]{{1,0}} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %t = (s32[], bf16[8,16]{{1,0}}) tuple(%i, %r)
}}

%condition (c: (s32[], bf16[8,16])) -> pred[] {{
  %c = (s32[], bf16[8,16]{{1,0}}) parameter(0)
  %n = s32[] constant(7)
  %at = s32[] get-tuple-element(%c), index=0
{condition}
}}
"""
    calls = f"while(%start), condition=%condition, body=%body{attributes}"
    entry = f"""  %zero = s32[] constant(2)
  %start = (s32[], bf16[8,16]{{1,0}}) tuple(%zero, %p)
  %w = (s32[], bf16[8,16]{{1,0}}) {calls}
  ROOT %out = bf16[8,16]{{1,0}} get-tuple-element(%w), index=1"""
    return program(P + entry, SUM + body)


def test_a_loop_counts_as_often_as_it_runs() -> None:
    compare = "  ROOT %l = pred[] compare(%at, %n), direction=LT"
    assert measured(loop(compare), MESH) == {("all-reduce", ("tensor",)): 5 * 256}
    noted = ', backend_config={"known_trip_count":{"n":"11"}}'
    assert measured(loop(compare, noted), MESH) == {("all-reduce", ("tensor",)): 11 * 256}


def test_a_loop_without_a_count_is_refused() -> None:
    with pytest.raises(ValueError, match="trip count of w"):
        measured(loop("  ROOT %l = pred[] compare(%at, %at), direction=LT"), MESH)


CUT = """%cut (q: bf16[8,16], i: s32[]) -> bf16[2,16] {
  %q = bf16[8,16]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %d = bf16[2,16]{1,0} dynamic-slice(%q, %i, %i), dynamic_slice_sizes={2,16}
}
%apart (s: bf16[8,16]) -> (bf16[8,4], bf16[8,12]) {
  %s = bf16[8,16]{1,0} parameter(0)
  %s1 = bf16[8,4]{1,0} slice(%s), slice={[0:8], [0:4]}
  %s2 = bf16[8,12]{1,0} slice(%s), slice={[0:8], [4:16]}
  ROOT %both = (bf16[8,4]{1,0}, bf16[8,12]{1,0}) tuple(%s1, %s2)
}
"""
REDUCE = (
    P + "  %r = bf16[8,16]{1,0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%sum\n  %i = s32[] constant(0)\n"
)


@pytest.mark.parametrize(
    ("uses", "kind"),
    [
        ("  ROOT %o = bf16[2,16] dynamic-slice(%r, %i, %i), dynamic_slice_sizes={2,16}", "reduce-scatter"),
        ("  ROOT %o = bf16[2,16] fusion(%r, %i), kind=kLoop, calls=%cut", "reduce-scatter"),
        ("  %b = bf16[8,16] copy(%r)\n  ROOT %o = bf16[2,16] fusion(%b, %i), calls=%cut", "reduce-scatter"),
        ("  %o = bf16[2,16] fusion(%r, %i), calls=%cut\n  ROOT %n = bf16[8,16] negate(%r)", "all-reduce"),
        ("  ROOT %n = bf16[8,16] copy(%r)", "all-reduce"),
        # Joined weights taken apart: each part is whole, until a device cuts its share out.
        ("  ROOT %a = (bf16[8,4], bf16[8,12]) fusion(%r), calls=%apart", "all-reduce"),
        (
            "  %a = (bf16[8,4], bf16[8,12]) fusion(%r), calls=%apart\n"
            "  %g = bf16[8,4] get-tuple-element(%a), index=0\n  %h = bf16[8,12] get-tuple-element(%a), index=1\n"
            "  %u = bf16[2,4] dynamic-slice(%g, %i, %i)\n  ROOT %v = bf16[2,12] dynamic-slice(%h, %i, %i)",
            "reduce-scatter",
        ),
    ],
)
def test_a_sum_that_is_only_cut_is_a_reduce_scatter(uses: str, kind: str) -> None:
    assert measured(program(REDUCE + uses, SUM + CUT), MESH) == {(kind, ("tensor",)): 256}


PUT = """%put (z: bf16[8,16], q: bf16[2,16], i: s32[]) -> bf16[8,16] {
  %z = bf16[8,16]{1,0} parameter(0)
  %q = bf16[2,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %d = bf16[8,16]{1,0} dynamic-update-slice(%z, %q, %i, %i)
}
"""


def test_a_sum_of_parts_put_in_place_is_an_all_gather() -> None:
    body = """  %part = bf16[2,16] slice(%p), slice={[0:2], [0:16]}
  %i = s32[] partition-id()
  %zero = bf16[] constant(0)
  %z = bf16[8,16] broadcast(%zero), dimensions={}
  %f = bf16[8,16] fusion(%z, %part, %i), kind=kLoop, calls=%put
  %f2 = bf16[8,16] copy(%f)
  ROOT %r = bf16[8,16] all-reduce(%f2), replica_groups=[2,4]<=[8], to_apply=%sum"""
    (found,) = collectives(program(P + body, SUM + PUT), MESH)
    assert (found.kind, found.bytes, found.as_all_reduce) == ("all-gather", 256, True)


def test_parts_of_a_joined_sum_are_told_apart() -> None:
    body = """  %r = (bf16[8,16], bf16[8,16]) all-reduce(%p, %p), replica_groups=[2,4]<=[8], to_apply=%sum
  %a = bf16[8,16] get-tuple-element(%r), index=0
  %b = bf16[8,16] get-tuple-element(%r), index=1
  %i = s32[] constant(0)
  %d = bf16[2,16] dynamic-slice(%a, %i, %i)
  ROOT %n = bf16[8,16] negate(%b)"""
    found = measured(program(P + body, SUM), MESH)
    assert found == {("reduce-scatter", ("tensor",)): 256, ("all-reduce", ("tensor",)): 256}


def test_an_asynchronous_fusion_counts_once() -> None:
    """As TPU writes it: started in one fusion, named again by one that computes meanwhile and by one that waits."""
    gather = "all-gather(%q), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}"

    def stage(name: str, root: str) -> str:
        return (
            f"%{name} (q: bf16[8,16]) -> bf16[32,16] {{\n  %q = bf16[8,16]{{1,0}} parameter(0)\n"
            f"  %g = bf16[32,16]{{1,0}} {gather}\n  ROOT %o = {root}\n}}\n"
        )

    more = (
        stage("start", 'bf16[32,16] custom-call(%g), custom_call_target="AsyncCollectiveStart"')
        + stage("meanwhile", "(bf16[8,16], bf16[32,16]) tuple(%q, %g)")
        + stage("wait", 'bf16[32,16] custom-call(%q, %g), custom_call_target="AsyncCollectiveDone"')
    )
    body = P + "\n".join(
        f"  %{name}.1 = bf16[32,16] fusion(%p), kind=kCustom, calls=%{name}" for name in ("start", "meanwhile", "wait")
    )
    (found,) = collectives(program(body, more), MESH)
    assert (found.kind, found.axes, found.bytes, found.times) == ("all-gather", ("tensor",), 1024, 1)
