"""Many robust fits at once: the Huber loss of log residuals, minimised by Levenberg and Marquardt's method on weights.

A scaling law is fitted from thousands of starts and refitted to hundreds of resampled tables. Each is a problem of
four or five parameters, so all of them take their steps together, as arrays. Legend: `P` problems, `M` points, `K`
parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.optimize
from numpy.typing import NDArray

Array = NDArray[np.float64]
# theta_PK -> log losses f_PM, and their derivatives J_PKM.
Model = Callable[[Array], tuple[Array, Array]]

DELTA = 1e-3  # of log loss: Hoffmann et al. (2022), section 3.3
_LARGEST, _SMALLEST = 1e10, 1e-12  # of the damping
_CHUNK = 200_000  # problems x points that take steps together: larger ones leave the processor's cache


def huber(residuals: Array, delta: float = DELTA) -> Array:
    """r^2 / 2 for |r| below delta, and a line of slope delta beyond (Huber, 1964)."""
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def minimise(
    model: Model,
    start_PK: Array,
    y: Array,
    weights: Array,
    *,
    steps: int,
    delta: float = DELTA,
    tolerance: float = 1e-10,
) -> tuple[Array, Array]:
    """Minimises sum_M weights * huber(model(theta) - y), for each of P problems from its own start.

    Steps take turns between two matrices in the place of the second derivatives: that of iteratively reweighted least
    squares, which bounds the objective from above and goes down from anywhere, but slowly where most residuals are
    larger than delta; and Newton's, of the points within delta alone, which is fast once these points stay the same.
    Each has a damping of its own, which falls where a step lowers the objective and rises where it does not.

    Args:
      model: of any number of problems at a time.
      start_PK: where each problem starts.
      y: log losses, (M,) or (P, M).
      weights: of the points, (M,) or (P, M), not negative.
      steps: at most so many.
      delta: of the Huber loss.
      tolerance: a problem has ended when no step of either kind changes its objective by more, relatively.

    Returns:
      The parameters (P, K) and the objectives (P,).
    """
    problems, points = len(start_PK), y.shape[-1]
    chunk = max(1, _CHUNK // points)
    if problems > chunk:
        parts = [slice(i, i + chunk) for i in range(0, problems, chunk)]
        done = [
            minimise(
                model,
                start_PK[part],
                y if y.ndim == 1 else y[part],
                weights if weights.ndim == 1 else weights[part],
                steps=steps,
                delta=delta,
                tolerance=tolerance,
            )
            for part in parts
        ]
        return np.concatenate([theta for theta, _ in done]), np.concatenate([value for _, value in done])
    y_PM, weights_PM = (np.broadcast_to(x, (problems, points)) for x in (y, weights))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return _descend(model, start_PK, y_PM, weights_PM, steps, delta, tolerance)


def _descend(
    model: Model, start_PK: Array, y_PM: Array, weights_PM: Array, steps: int, delta: float, tolerance: float
) -> tuple[Array, Array]:
    best_PK = start_PK.copy()
    best_P = np.full(len(start_PK), np.inf)
    alive = np.arange(len(start_PK))  # which problems have not ended; all below is of these
    theta = best_PK.copy()
    f, J = model(theta)
    r = f - y_PM
    value = np.sum(weights_PM * huber(r, delta), axis=1)
    damping = np.full((2, len(alive)), 1e-2)
    still = np.zeros(len(alive), int)  # steps in a row that changed nothing
    diagonal = np.arange(start_PK.shape[1])
    for step in range(steps):
        kind = step % 2
        size = np.abs(r)
        slope = weights_PM * np.where(size <= delta, r, delta * np.sign(r))
        curvature = weights_PM * (np.minimum(1.0, delta / np.maximum(size, 1e-300)) if kind == 0 else size <= delta)
        gradient = (J @ slope[:, :, None])[:, :, 0]
        H = (J * curvature[:, None, :]) @ J.swapaxes(1, 2)
        scale = np.maximum(H[:, diagonal, diagonal], 1e-14 * np.max(H[:, diagonal, diagonal], axis=1)[:, None])
        H[:, diagonal, diagonal] += damping[kind][:, None] * scale + 1e-300
        trial = theta - _solve(H, gradient)
        f, J_trial = model(trial)
        r_trial = f - y_PM
        value_trial = np.sum(weights_PM * huber(r_trial, delta), axis=1)
        better = value_trial < value
        gained = np.where(better, value - value_trial, 0.0)
        still = np.where(gained <= tolerance * value, still + 1, 0)
        damping[kind] = np.clip(damping[kind] * np.where(better, 0.2, 5.0), _SMALLEST, _LARGEST)
        theta, r = np.where(better[:, None], trial, theta), np.where(better[:, None], r_trial, r)
        J, value = np.where(better[:, None, None], J_trial, J), np.where(better, value_trial, value)
        on = still < 6
        if not on.all() and (step % 8 == 7 or not on.any()):
            best_PK[alive], best_P[alive] = theta, value
            alive, theta, r, J, value, still = alive[on], theta[on], r[on], J[on], value[on], still[on]
            damping, y_PM, weights_PM = damping[:, on], y_PM[on], weights_PM[on]
            if not len(alive):
                break
    best_PK[alive], best_P[alive] = theta, value
    return best_PK, best_P


def _solve(H_PKK: Array, g_PK: Array) -> Array:
    """H^-1 g; no step where H is singular."""
    H_PKK = np.where(np.isfinite(H_PKK), H_PKK, 0.0)
    try:
        step = np.linalg.solve(H_PKK, g_PK[:, :, None])[:, :, 0]
    except np.linalg.LinAlgError:
        step = (np.linalg.pinv(H_PKK) @ g_PK[:, :, None])[:, :, 0]
    return np.where(np.isfinite(step), step, 0.0)


def polish(model: Model, start_K: Array, y_M: Array, *, delta: float = DELTA) -> tuple[Array, float]:
    """One problem from one start by scipy's L-BFGS, until rounding stops it.

    The objective is the sum, in units of delta^2: scipy compares what a step gains with the larger of the objective and
    one, so that a mean of 1e-6 would end the descent long before the minimum (Besiroglu et al., 2024).

    Returns:
      The parameters (K,) and the objective.
    """

    def objective(theta_K: Array) -> tuple[float, Array]:
        f, J = model(theta_K[None])
        r = f[0] - y_M
        slope = np.where(np.abs(r) <= delta, r, delta * np.sign(r))
        return float(np.sum(huber(r, delta))) / delta**2, (J[0] @ slope) / delta**2

    options = {"maxiter": 10_000, "maxfun": 20_000, "ftol": 1e-16, "gtol": 1e-10, "maxcor": 20}
    found = scipy.optimize.minimize(objective, start_K, jac=True, method="L-BFGS-B", options=options)
    return np.asarray(found.x, np.float64), float(found.fun) * delta**2
