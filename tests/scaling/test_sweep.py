"""Combinators, names, and what a plan refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ml_collections import ConfigDict

from configs.base import base
from lm_jax import costs
from lm_jax.errors import UserError
from lm_jax.scaling.sweep import Points, Run, Sweep, plan, written


def runs(declare: Callable[[Sweep], Points], config: ConfigDict | None = None) -> tuple[Run, ...]:
    return plan(base() if config is None else config, declare).runs


def test_product_zip_and_chain_nest() -> None:
    def sweep(s: Sweep) -> Points:
        sizes = s.zip(s.each("model.embed", (64, 128)), s.each("model.layers", (2, 3)))
        return s.chain(s.product(sizes, s.each("train.batch_size", (8, 16))), s.each("model.layers", (9,)))

    found = [(r.config.model.embed, r.config.model.layers, r.config.train.batch_size) for r in runs(sweep)]
    assert found == [(64, 2, 8), (64, 2, 16), (128, 3, 8), (128, 3, 16), (256, 9, 16)]


def test_a_name_says_what_its_run_changes_and_no_more() -> None:
    rates: Callable[[Sweep], Points] = lambda s: s.each("optimizer.learning_rate", (3e-4, 1e-3))  # noqa: E731
    more: Callable[[Sweep], Points] = lambda s: s.chain(  # noqa: E731
        s.product(s.each("optimizer.name", ("muon",)), rates(s), s.seeds(2)), rates(s)
    )
    assert [r.name for r in runs(rates)] == ["learning_rate=0.0003", "learning_rate=0.001"]
    names = [r.name for r in runs(more)]
    assert names[:2] == ["optimizer=muon,learning_rate=0.0003,seed=0", "optimizer=muon,learning_rate=0.0003,seed=1"]
    assert names[4:] == [r.name for r in runs(rates)]  # adding runs to a sweep renames none


def test_a_word_that_two_keys_end_in_is_written_out() -> None:
    found = runs(lambda s: s.each("evaluation.every", (5,)))  # checkpoint.every is there too
    assert found[0].name == "evaluation.every=5"


def test_conditional_adds_leaves_out_and_derives() -> None:
    def sweep(s: Sweep) -> Points:
        def then(config: ConfigDict) -> Points | dict[str, object] | None:
            if config.optimizer.name == "sgd":
                return []
            if config.optimizer.name == "lion":
                return s.each("optimizer.learning_rate", (1e-4, 2e-4))
            return {"optimizer.weight_decay": 0.0} if config.optimizer.name == "muon" else None

        return s.conditional(s.each("optimizer.name", ("adamw", "sgd", "lion", "muon")), then)

    found = {r.name: r.config.optimizer for r in runs(sweep)}
    assert list(found) == [
        "optimizer=adamw",
        "optimizer=lion,learning_rate=0.0001",
        "optimizer=lion,learning_rate=0.0002",
        "optimizer=muon",
    ]
    assert found["optimizer=muon"].weight_decay == 0.0 and found["optimizer=adamw"].weight_decay == 0.1


def test_a_budget_becomes_tokens() -> None:
    def sweep(s: Sweep) -> Points:
        return s.budget([1e12, 3e13], s.each("model.embed", (64, 256)))

    for run in runs(sweep):
        flops = float(run.labels["budget"])
        per_step = costs.flops_per_token(run.config.with_likely_vocab().model, 256) * run.config.train.tokens_per_step
        assert run.config.train.steps is None
        assert abs(run.flops - flops) <= per_step / 2
        assert run.tokens == run.config.train.tokens


def test_seeds_count_from_the_config_s() -> None:
    config = base()
    config.train.seed = 7
    assert [r.config.train.seed for r in runs(lambda s: s.seeds(2), config)] == [7, 8]


def test_the_declared_config_stays_as_it_was() -> None:
    config = base()
    runs(lambda s: s.each("train.tokens", (10_000,)), config)
    assert config.train.steps == 1000 and config.train.tokens is None


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda s: s.each("optimizer.learning_rat", (1,)), "did you mean optimizer.learning_rate"),
        (lambda s: s.each("optimizer.learning_rate", ("fast",)), "'fast' is not a number"),
        (lambda s: s.each("model.heads", (7,)), "run heads=7: model.heads"),
        (lambda s: s.zip(s.seeds(2), s.seeds(3)), "2 and 3 points"),
        (lambda s: s.budget([1e3], s.seeds(1)), "less than one step of seed=0"),
        (lambda s: [], "declares no runs"),
        (lambda s: [{"train.seed": 1}], "no list of points"),
        (lambda s: s.chain(s.change("a", {"train.seed": 1}), s.change("a", {"train.seed": 2})), "two different runs"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_words(declare: Callable[[Sweep], Points], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(base(), declare)


def test_the_same_run_twice_is_left_out_by_name() -> None:
    def sweep(s: Sweep) -> Points:
        return s.chain(s.change("base"), s.change("as it is", {"train.seed": 0}), s.change("base"))

    found = plan(base(), sweep)
    assert [r.name for r in found.runs] == ["change=base"]
    assert found.notes == ("change=as_it_is is left out: it is change=base", "change=base is declared twice")


def test_fingerprints_tell_configs_apart() -> None:
    first, second = runs(lambda s: s.each("optimizer.eps", (1e-8, 1e-9)))
    assert first.fingerprint != second.fingerprint
    assert first.fingerprint == runs(lambda s: s.each("optimizer.eps", (1e-8,)))[0].fingerprint


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.5e12, "1.5e12"),
        (2.0**-9, "0.00195312"),
        (3e-05, "3e-5"),
        (None, "none"),
        (True, "true"),
        ((1, "a"), "1-a"),
        ("a b/c", "a_b_c"),
    ],
)
def test_values_in_names(value: object, text: str) -> None:
    assert written(value) == text


def test_long_names_are_cut_and_stay_apart() -> None:
    long = "x" * 300
    a, b = runs(lambda s: s.chain(s.change(long + "a", {"train.seed": 1}), s.change(long + "b", {"train.seed": 2})))
    assert a.name != b.name and max(len(a.name), len(b.name)) <= 150
