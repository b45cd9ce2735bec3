"""The slices of TPU pods: Google's published tables, and refusals that name the nearest slice."""

import pytest

from lm_jax.errors import UserError
from lm_jax.slices import GENERATIONS, slice_of, slices


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "accelerator_type", "machine_type"),
    [
        # cloud.google.com/tpu/docs/v5p: cores, chips, hosts
        ("v5p:2x2x1", 4, 1, "v5p-8", "ct5p-hightpu-4t"),
        ("v5p:2x2x2", 8, 2, "v5p-16", "ct5p-hightpu-4t"),
        ("v5p:2x4x4", 32, 8, "v5p-64", "ct5p-hightpu-4t"),
        ("v5p:4x4x4", 64, 16, "v5p-128", "ct5p-hightpu-4t"),
        ("v5p:4x8x8", 256, 64, "v5p-512", "ct5p-hightpu-4t"),
        ("v5p:8x8x16", 1024, 256, "v5p-2048", "ct5p-hightpu-4t"),
        ("v5p:16x16x24", 6144, 1536, "v5p-12288", "ct5p-hightpu-4t"),
        # cloud.google.com/tpu/docs/v6e and v5e: chips, virtual machines
        ("v6e:1x1", 1, 1, "v6e-1", "ct6e-standard-1t"),
        ("v6e:2x4", 8, 1, "v6e-8", "ct6e-standard-8t"),
        ("v6e:4x4", 16, 4, "v6e-16", "ct6e-standard-4t"),
        ("v6e:16x16", 256, 64, "v6e-256", "ct6e-standard-4t"),
        ("v5e:2x2", 4, 1, "v5litepod-4", "ct5lp-hightpu-4t"),
        ("v5e:2x4", 8, 1, "v5litepod-8", "ct5lp-hightpu-8t"),
        ("v5e:4x4", 16, 4, "v5litepod-16", "ct5lp-hightpu-4t"),
        ("v5e:8x8", 64, 16, "v5litepod-64", "ct5lp-hightpu-4t"),
        ("v4:4x4x4", 64, 16, "v4-128", "ct4p-hightpu-4t"),
        ("tpu7x:2x2x1", 4, 1, "tpu7x-8", "tpu7x-standard-4t"),
        ("tpu7x:4x4x4", 64, 16, "tpu7x-128", "tpu7x-standard-4t"),
    ],
)
def test_a_slice_is_as_published_under_both_of_its_names(name, chips, hosts, accelerator_type, machine_type):
    found = slice_of(name)
    assert (found.chips, found.hosts, found.accelerator_type) == (chips, hosts, accelerator_type)
    assert found.chips_per_host * found.hosts == chips
    assert found.machine_type == machine_type
    assert found.name == name
    assert slice_of(accelerator_type) == found


def test_an_accelerator_type_means_the_most_compact_shape_and_others_can_still_be_had():
    long = slice_of("v5p:4x4x16")
    assert long.accelerator_type == "v5p-512"
    assert slice_of(long.accelerator_type).topology == "4x8x8"


def test_other_names_of_a_generation():
    assert slice_of("v5litepod-16") == slice_of("v5e-16") == slice_of("V5E:4x4")


def test_every_listed_slice_is_found_again_by_its_name():
    for generation in GENERATIONS:
        found = list(slices(generation))
        assert [slice_of(s.name) for s in found] == found
        assert [s.chips for s in found] == sorted(s.chips for s in found)
        assert all(s.chips <= GENERATIONS[generation].most_chips for s in found)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("v5p:4x4x5", "v5p:4x4x4"),
        ("v5p:8x4x4", "v5p:4x4x8"),  # the edges in their order
        ("v5p:8x8", "v5p:4x4x4"),  # a dimension too few
        ("v5p:64", "v5p:4x4x4"),
        ("v5p:16x16x16x2", "v5p:16x16x24"),
        ("v5p:4x4x15", "v5p:4x4x16"),  # 4x8x8 has as many chips, and is less like what was asked for
        ("v5e:4x4x4", "v5e:8x8"),
        ("v5e:32x32", "v5e:16x16"),
        ("v6e-48", "v6e:8x8"),
        ("v5p-100", "v5p:4x4x4"),
        ("v5p-7", "v5p:2x2x1"),
        ("v5e:0x4", "v5e:1x1"),
    ],
)
def test_a_slice_that_cannot_be_had_names_the_nearest(wrong, nearest):
    with pytest.raises(UserError) as e:
        slice_of(wrong)
    lines = str(e.value).splitlines()
    assert len(lines) <= 3
    assert lines[0].startswith(f"{wrong} cannot be had")
    assert f"the nearest that can: {nearest} (" in lines[1]


@pytest.mark.parametrize(
    ("wrong", "words"), [("v5q:4x4", "did you mean v5"), ("", "names no TPU slice"), ("v5p", "names no TPU slice")]
)
def test_what_is_no_slice_at_all(wrong, words):
    with pytest.raises(UserError, match=words):
        slice_of(wrong)
