"""Which layouts are tried, in which order, and what is said of them; a stand-in compiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lm_jax.errors import Failure
from lm_jax.models.transformer import TransformerConfig
from lm_jax.preflight import page, search
from lm_jax.preflight.chips import Target, target_of
from lm_jax.preflight.search import Found, candidates
from lm_jax.preflight.verdict import Verdict
from lm_jax.sharding import MeshConfig
from lm_jax.training.run import RunConfig, TrainConfig

RUN = RunConfig(
    model=TransformerConfig(layers=2, embed=256, heads=4, vocab=1024, dtype="bfloat16"),
    mesh=MeshConfig(data=1, fsdp=-1),
    train=TrainConfig(batch_size=64, length=256, remat="full"),
)


def slice_with(memory: float, name: str = "v5e:2x2") -> Target:
    """One whose devices have so many bytes."""
    target = target_of(name)
    return dataclasses.replace(target, chip=dataclasses.replace(target.chip, memory=int(memory)))


def verdict(target: Target, need: float, seconds: float) -> Verdict:
    return {
        "topology": target.name,
        "chips": target.chips,
        "fits": need <= target.chip.memory,
        "bytes_per_device": {"compiler_total": int(need), "capacity": target.chip.memory},
        "step": {"seconds": seconds, "mfu": 0.5},
        "seconds": 30.0,
    }


def estimate(config: RunConfig, target: Target) -> dict[str, int]:
    """A stand-in for the estimate, which takes a second each: what remat keeps is cut by micro-batches, what a layer
    needs is split by `tensor`."""
    size, train = config.mesh.sizes(target.devices), config.train
    kept = {"full": 1, "attention": 2, "dots": 4, "none": 8}[train.remat]
    return {"total": int(8e8 / size["tensor"] + 1e9 * kept / train.microbatches)}


class Compiler:
    """A stand-in: what a layout needs is `need(config)`, and how long its step takes `seconds(config)`."""

    def __init__(self, need: Callable[[RunConfig, Target], float], seconds: Callable[[RunConfig], float]) -> None:
        self.need, self.seconds, self.asked = need, seconds, list[RunConfig]()

    def __call__(self, config: RunConfig, target: Target, **given: Any) -> Verdict:
        self.asked.append(config)
        given["tell"]("compiling (1 s)")
        return verdict(target, self.need(config, target), self.seconds(config))


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Compiler]]:
    monkeypatch.setattr(search, "predicted", estimate)

    def make(need: Callable[[RunConfig, Target], float], seconds: Callable[[RunConfig], float]) -> Compiler:
        made = Compiler(need, seconds)
        monkeypatch.setattr(search, "preflight", made)
        return made

    yield make


def test_candidates_are_what_fits_by_the_estimate_the_fastest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "predicted", estimate)
    target = slice_with(1e12)
    found = candidates(RUN, target)
    assert [g.seconds for g in found] == sorted(g.seconds for g in found)
    keys = [g.keys for g in found]
    assert {"train.remat": "none"} in keys and {} not in keys
    assert {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2} in keys
    assert not any("train.microbatches" in k for k in keys)  # nothing has to be cut
    assert not any(k.get("mesh.tensor") == 8 for k in keys)  # no four devices, no four heads
    room = 5e9  # `none` needs 8.8e9 uncut and 4.8e9 in two
    tight = [g for g in candidates(RUN, slice_with(room)) if "mesh.tensor" not in g.keys]
    assert {g.keys["train.remat"]: g.keys.get("train.microbatches", 1) for g in tight} == {
        "none": 2,
        "dots": 1,
        "attention": 1,
    }
    assert all(g.need <= room for g in candidates(RUN, slice_with(room)))
    assert candidates(RUN, slice_with(1e6)) == []
    assert len(candidates(RUN, target, 2)) == 2


def test_the_fastest_that_fits_stands_first_and_is_advised(compiling: Callable[..., Compiler]) -> None:
    target = slice_with(1e10)
    slow = {"full": 4.0, "attention": 2.0, "dots": 3.0, "none": 1.0}
    compiler = compiling(lambda c, t: 2e10 if c.train.remat == "none" else 1e9, lambda c: slow[c.train.remat])
    told: list[str] = []
    found = search.search(RUN, target, verdict(target, 1e9, 4.0), tries=4, tell=told.append)
    assert len(compiler.asked) == 4
    assert [f.fits for f in found] == sorted((f.fits for f in found), reverse=True)
    fitting = [f.seconds for f in found if f.fits]
    assert fitting == sorted(fitting)
    assert "1 of 4" in told[0] and "about 120 s left" in told[0] and "4 of 4" in told[-1]
    text = page.table(found, target.name)
    best = page.flags(found[0].keys)
    assert best.startswith("--config.") and text.endswith(f"faster ({found[0].seconds:.3g} s, not 4): {best}")


def test_what_the_compiler_finds_too_large_is_cut_finer(compiling: Callable[..., Compiler]) -> None:
    target = slice_with(1e10)
    compiler = compiling(lambda c, t: 4 * estimate(c, t)["total"], lambda c: 1.0)  # the estimate is that far off
    found = search.search(RUN, target, verdict(target, 1.1e10, 4.0), tries=3)
    assert [4 * estimate(c, target)["total"] <= 1e10 for c in compiler.asked] == [False, True, True]  # it learns
    assert found[0].fits
    assert page.table(found, target.name).endswith(f"this fits: {page.flags(found[0].keys)}")


def test_one_that_fails_is_passed_over(compiling: Callable[..., Compiler], monkeypatch: pytest.MonkeyPatch) -> None:
    target = slice_with(1e10)
    compiler = compiling(lambda c, t: 1e9, lambda c: 1.0)
    crashed: list[RunConfig] = []

    def crashing(config: RunConfig, on: Target, **given: Any) -> Verdict:
        if not crashed:
            crashed.append(config)
            raise Failure("no verdict: the compiler failed (status 1)")
        return compiler(config, on, **given)

    monkeypatch.setattr(search, "preflight", crashing)
    told: list[str] = []
    found = search.search(RUN, target, verdict(target, 1e9, 4.0), tries=2, tell=told.append)
    assert len(found) == 2 and any("the compiler failed" in line for line in told)


def test_where_nothing_fits_a_larger_slice_is_tried(
    compiling: Callable[..., Compiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "target_of", lambda name, slices=1: slice_with(1e10, name))
    target = slice_with(1e7)
    compiler = compiling(lambda c, t: 5e9, lambda c: 2.0 if c == RUN else 3.0)
    found = search.search(RUN, target, verdict(target, 1e9, 4.0), tries=4)
    assert found[0].verdict["topology"] == "v5e:2x4" and found[0].fits
    text = page.table(found, target.name)
    assert len(compiler.asked) == 4 and found[0].fits
    assert text.endswith(f"no layout fits v5e:2x2; this does: --topology=v5e:2x4 {page.flags(found[0].keys)}".rstrip())


def test_nothing_at_all() -> None:
    target = slice_with(1e6)
    found = [Found({}, verdict(target, 1e9, 4.0))]
    assert page.table(found, target.name).endswith(
        "nothing that was tried fits: take a larger slice, or a smaller batch"
    )
