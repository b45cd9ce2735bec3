"""A compiler's plan of memory is read to the byte."""

from __future__ import annotations

import pytest

from lm_jax.preflight.buffers import Dump, read

# A step of two layers of [64, 64] weights (whole: [64, 64]; a device's part: [16, 64]) on 8 rows. In the order of the
# schedule: 0 embed, 1 forward loop, 2 loss, 3 backward loop's layer again, 4 its gradient, 5 update.
ASSIGNMENT = """BufferAssignment:
allocation 0: size 8192, page 0, parameter 0, shape |f32[2,16,64]| at ShapeIndex {}, maybe-live-out:
 value: <1 param.0 @0> (size=8192,offset=0): f32[2,16,64]{2,1,0}
allocation 1: size 16384, page 0, parameter 1, shape |f32[2,2,16,64]| at ShapeIndex {}, maybe-live-out:
 value: <2 param.1 @0> (size=16384,offset=0): f32[2,2,16,64]{3,2,1,0}
allocation 2: size 512, page 0, parameter 2, shape |s32[8]| at ShapeIndex {}:
 value: <3 param.2 @0> (size=512,offset=0): s32[8]{0}
allocation 3: size 1024, page 0, output shape is |(f32[])|, maybe-live-out:
 value: <4 tuple.1{} @0> (size=1024,offset=0): (f32[]{:T(128)})
allocation 4: size 40960, page 0, preallocated-temp:
 value: <5 while.1{2} @0> (size=4096,offset=0): bf16[2,8,64]{2,1,0}
 value: <6 fusion.2 @0> (size=20480,offset=4096): f32[8,640]{1,0}
 value: <7 again.3 @0> (size=2048,offset=4096): bf16[8,128]{1,0}
 value: <8 grad.4{0} @0> (size=8192,offset=8192): bf16[1,64,64]{2,1,0}
 value: <9 sums.5{1} (phi) @0> (size=8192,offset=16384): f32[2,16,64]{2,1,0}
 value: <10 gathered.6 @0> (size=8192,offset=24576): bf16[1,64,64]{2,1,0}
 value: <11 shared.7 @0> (size=1024,offset=24576): bf16[8,64]{1,0}
allocation 5: size 65536, color 1, page 0, preallocated-temp:
 value: <12 fast.8 @1> (size=65536,offset=0): bf16[8,64]{1,0:S(1)}
allocation 6: size 4096, color 5, page 0, preallocated-temp:
 value: <13 away.9 @5> (size=4096,offset=0): f32[2,16,64]{2,1,0:S(5)}
"""
RANGES = """HloLiveRange (max 6):
  InstructionSequence:
    0:embed
    1:while.1
    2:fusion.2
    3:again.3
    4:grad.4
    5:update
  BufferLiveRange:
    while.1{2}:1-4
    fusion.2{}:2-2
    again.3{}:3-4
    grad.4{0}:4-5
    sums.5{1}:3-5
    gathered.6{}:3-4
    shared.7{}:4-4
  Live ranges at 4 (peak):
    nothing{}: 1 bytes
"""
PROGRAM = """HloModule jit_train_step

%body (p: f32[]) -> f32[] {
  %again.3 = bf16[8,128]{1,0} fusion(), metadata={op_name="jit(train_step)/transpose(jvp())/while/body/checkpoint/rematted_computation/mul"}
  %gathered.6 = bf16[1,64,64]{2,1,0} all-gather(), metadata={op_name="jit(train_step)/transpose(jvp())/while/body/checkpoint/rematted_computation/reshard"}
  ROOT %grad.4 = (bf16[1,64,64]{2,1,0}) fusion(), metadata={op_name="jit(train_step)/transpose(jvp())/while/body/dot_general"}
}

ENTRY %main (a: f32[2,16,64]) -> f32[] {
  %param.0 = f32[2,16,64]{2,1,0} parameter(0), metadata={op_name="state.params[\\'blocks\\'][\\'up\\']"}
  %param.1 = f32[2,2,16,64]{3,2,1,0} parameter(1), metadata={op_name="state.opt_state[0].mu[\\'blocks\\'][\\'up\\']"}
  %param.2 = s32[8]{0} parameter(2), metadata={op_name="batch[\\'tokens\\']"}
  %embed = f32[8]{0} fusion(), metadata={op_name="jit(train_step)/jvp()/take"}
  %while.1 = (s32[], s32[], bf16[2,8,64]{2,1,0}) while(), metadata={op_name="jit(train_step)/jvp()/while"}
  %fusion.2 = f32[8,640]{1,0} fusion(), metadata={op_name="jit(train_step)/jvp()/loss"}
  ROOT %update = f32[] fusion(), metadata={op_name="jit(train_step)/mul"}
}
"""  # noqa: E501 (a compiler's lines)
WEIGHTS = {(2, 16, 64), (16, 64), (2, 64, 64), (64, 64)}


def test_every_byte_of_the_fullest_instruction_has_its_class() -> None:
    plan = read(Dump(ASSIGNMENT, RANGES, PROGRAM), WEIGHTS)
    assert plan.classes == {
        "parameters": 8192,
        "gradients": 8192 + 8192,  # one layer's, whole, and the sums of all layers' parts
        "optimizer": 16384,
        "activations": 512 + 4096,  # the batch; the blocks' inputs
        "temporaries": 2048 + 8192,  # computed again; gathered (what shares its place is not counted twice)
    }
    # The heap is 40,960 bytes; the fullest instruction is the fifth, not the third, where the largest value is.
    assert plan.gaps == 40960 - (4096 + 2048 + 8192 + 8192 + 8192)
    assert plan.total == 8192 + 16384 + 512 + 40960 + 1024
    assert plan.host == 4096
    assert [value.name for _, value in plan.largest[:3]] == ["grad.4{0}", "sums.5{1}", "gathered.6{}"]


def test_texts_in_another_form_are_refused() -> None:
    with pytest.raises(ValueError, match="no allocation"):
        read(Dump("BufferAssignment v2\n", RANGES, PROGRAM), WEIGHTS)
    with pytest.raises(ValueError, match=r"when gathered.6\{\} is alive"):
        read(Dump(ASSIGNMENT, RANGES.replace("    gathered.6{}:3-4\n", ""), PROGRAM), WEIGHTS)
    with pytest.raises(ValueError, match="a value in a form"):
        read(Dump(ASSIGNMENT.replace("(size=4096,offset=0): bf16", "4096 at 0: bf16"), RANGES, PROGRAM), WEIGHTS)
