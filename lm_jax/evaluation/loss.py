"""The loss of held-out text: what training reports along the way, and `launch.evaluate` for any text."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from lm_jax.objectives.objective import Objective, Terms

EvalStep = Callable[[Any, Any, Any, Any], tuple[Terms, Terms]]


def make_eval_step(objective: Objective) -> EvalStep:
    """`(params, frozen, extra, batch) -> (sums, weights)` of the objective's terms, to be jitted."""

    def eval_step(params: Any, frozen: Any, extra: Any, batch: Any) -> tuple[Terms, Terms]:
        sums, _ = objective.terms(params, frozen, extra, batch, jax.random.key(0))
        return sums, objective.weights(batch)

    return eval_step


def held_out_loss(
    eval_step: EvalStep, params: Any, frozen: Any, extra: Any, batches: Iterable[Any]
) -> tuple[float, int]:
    """The sum of the first term (cross-entropy, in nats) over all batches, and how many targets that were.

    Sums of batches are added up in double precision; the next batch runs while the last one's sum is read.
    """
    nats, targets = 0.0, 0
    waiting: tuple[Terms, Terms] | None = None
    for batch in batches:
        now = eval_step(params, frozen, extra, batch)
        if waiting is not None:
            nats, targets = _add(nats, targets, waiting)
        waiting = now
    return _add(nats, targets, waiting) if waiting is not None else (nats, targets)


def _add(nats: float, targets: int, result: tuple[Terms, Terms]) -> tuple[float, int]:
    sums, weights = jax.device_get(result)
    name = next(iter(sums))
    return nats + float(sums[name]), targets + int(weights[name])
