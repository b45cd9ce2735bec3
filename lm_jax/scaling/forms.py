"""Forms of scaling laws: the loss of a model of N parameters after D tokens.

A form is fitted in the logarithms of its terms, and with log N and log D counted from their means: there the
parameters are nearly independent of each other, while log A and alpha are not (a law fitted around 1e9 parameters says
little of the term's size at one parameter). Legend: `P` laws, `M` points, `K` parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lm_jax.scaling.minimise import Array

_LARGEST = 690.0  # a logarithm that a float still holds, with room for sums


@dataclass(frozen=True)
class Form:
    """What fitting and using a law need to know of its form.

    theta is what is fitted, around a centre (the means of log N and log D); constants are what papers print. The loss
    rises with A / N^alpha + B / D^beta, so that one formula finds the optimum of every form.
    """

    equation: str
    names: tuple[str, ...]  # of the constants
    log_loss: Callable[[Array, Array, Array], tuple[Array, Array]]  # theta_PK, n_M, d_M -> f_PM, J_PKM
    constants: Callable[[Array, float, float], Array]  # theta_PK, centre of n, of d -> constants_PK
    theta: Callable[[Array], Array]  # constants_PK -> theta_PK around the centre (0, 0)
    starts: Callable[[float, float, float], Array]  # centre of n, of d, mean log loss -> theta_PK
    terms: Callable[[Array], Array]  # constants_PK -> A, alpha, B, beta as (P, 4)
    positive: tuple[str, ...]  # the constants that must be above zero for the law to mean anything


def _exp(x: Array) -> Array:
    """Finite for every draw: percentiles of infinities are no numbers."""
    return np.exp(np.clip(x, -_LARGEST, _LARGEST))


def _chinchilla(theta: Array, n: Array, d: Array) -> tuple[Array, Array]:
    e, a, b, alpha, beta = (theta[:, i, None] for i in range(5))
    terms = np.stack([e + 0 * n, a - alpha * n, b - beta * d])
    top = terms.max(axis=0)
    shares = np.exp(terms - top)
    total = shares.sum(axis=0)
    shares /= total
    return top + np.log(total), np.stack([shares[0], shares[1], shares[2], -n * shares[1], -d * shares[2]], axis=1)


def _chinchilla_constants(theta: Array, n0: float, d0: float) -> Array:
    e, a, b, alpha, beta = theta.T
    return np.stack([_exp(e), _exp(a + alpha * n0), _exp(b + beta * d0), alpha, beta], axis=1)


def _chinchilla_theta(constants: Array) -> Array:
    return np.concatenate([np.log(constants[:, :3]), constants[:, 3:]], axis=1)


def _chinchilla_starts(n0: float, d0: float, y0: float) -> Array:
    """The grid of Hoffmann et al. (2022), and one of shares in the mean loss, which suits losses of any scale."""
    halves, fives = (0.0, 0.5, 1.0, 1.5, 2.0), tuple(range(0, 26, 5))
    grid = np.array(list(itertools.product((-1.0, -0.5, 0.0, 0.5, 1.0), fives, fives, halves, halves)))
    grid[:, 1] -= grid[:, 3] * n0
    grid[:, 2] -= grid[:, 4] * d0
    exponents = (0.1, 0.3, 0.6, 1.0)
    shares = np.array(list(itertools.product((0.1, 0.5, 0.9), (0.1, 0.5, 0.9), (0.0,), exponents, exponents)))
    floor, split = shares[:, 0].copy(), shares[:, 1].copy()
    shares[:, 0] = y0 + np.log(floor)
    shares[:, 1] = y0 + np.log((1 - floor) * split)
    shares[:, 2] = y0 + np.log((1 - floor) * (1 - split))
    return np.concatenate([grid, shares])


def _chinchilla_terms(constants: Array) -> Array:
    return constants[:, [1, 3, 2, 4]]


def _kaplan(theta: Array, n: Array, d: Array) -> tuple[Array, Array]:
    """theta: log of Nc^p, log Dc, p = alpha_N / alpha_D, alpha_D."""
    u, v, p, s = (theta[:, i, None] for i in range(4))
    terms = np.stack([u - p * n, v - d + 0 * u])
    top = terms.max(axis=0)
    shares = np.exp(terms - top)
    total = shares.sum(axis=0)
    shares /= total
    log_sum = top + np.log(total)
    return s * log_sum, np.stack([s * shares[0], s * shares[1], -s * n * shares[0], log_sum], axis=1)


def _kaplan_constants(theta: Array, n0: float, d0: float) -> Array:
    u, v, p, s = theta.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.stack([_exp(u / p + n0), _exp(v + d0), p * s, s], axis=1)


def _kaplan_theta(constants: Array) -> Array:
    n_c, d_c, alpha_n, alpha_d = constants.T
    return np.stack([alpha_n / alpha_d * np.log(n_c), np.log(d_c), alpha_n / alpha_d, alpha_d], axis=1)


def _kaplan_starts(n0: float, d0: float, y0: float) -> Array:
    exponents, ratios, shares = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8), (0.2, 0.5, 0.8, 1.2, 2.0), (0.02, 0.2, 0.5, 0.8, 0.98)
    grid = np.array(list(itertools.product(shares, (0.0,), ratios, exponents)))
    share = grid[:, 0].copy()
    grid[:, 0] = y0 / grid[:, 3] + np.log(share)
    grid[:, 1] = y0 / grid[:, 3] + np.log1p(-share)
    return grid


def _kaplan_terms(constants: Array) -> Array:
    n_c, d_c, alpha_n, alpha_d = constants.T
    p = alpha_n / alpha_d
    with np.errstate(over="ignore", invalid="ignore"):
        return np.stack([n_c**p, p, d_c, np.ones_like(p)], axis=1)


FORMS = {
    # Hoffmann et al. (2022), arXiv:2203.15556, equations 2 and 10.
    "chinchilla": Form(
        equation="L = E + A / N^alpha + B / D^beta",
        names=("E", "A", "B", "alpha", "beta"),
        log_loss=_chinchilla,
        constants=_chinchilla_constants,
        theta=_chinchilla_theta,
        starts=_chinchilla_starts,
        terms=_chinchilla_terms,
        positive=("alpha", "beta"),
    ),
    # Kaplan et al. (2020), arXiv:2001.08361, equation 1.5. Its loss goes to zero: there is no E to be asked for.
    "kaplan": Form(
        equation="L = ((Nc / N)^(alpha_N / alpha_D) + Dc / D)^alpha_D",
        names=("Nc", "Dc", "alpha_N", "alpha_D"),
        log_loss=_kaplan,
        constants=_kaplan_constants,
        theta=_kaplan_theta,
        starts=_kaplan_starts,
        terms=_kaplan_terms,
        positive=("alpha_N", "alpha_D"),
    ),
}
