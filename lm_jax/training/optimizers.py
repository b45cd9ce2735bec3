"""Optimizers: from gradients to updates, for any tree of ParamSpecs and on any mesh.

Every optimizer is a rule that turns gradients into directions (`RULES`, mostly optax's own), followed by the same three
things: weight decay where a spec asks for it, the parameter's peak rate, and the schedule. Decay is decoupled for all
of them (Loshchilov and Hutter 2019): a step takes `rate * weight_decay * weight` off. Clipping and the average of the
weights belong to the training step, which also guards it; `clip_norm` and `ema` are read there.

State is made like the parameters, shardings included, so `jax.eval_shape(optimizer.init, abstract parameters)` on a
mesh tells how all of it is laid out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from lm_jax.errors import ConfigError
from lm_jax.models.parametrization import STANDARD, Scale
from lm_jax.params import Array, ParamSpec, Role, Tree, decay_mask, map_specs, role
from lm_jax.sharding import on_whole_matrices
from lm_jax.training.schedules import SCHEDULES

# --------------------------------------------------------------------------------------------------------------- config

_POSITIVE = (lambda v: 0 < v < math.inf, "a finite number above 0")
_NOT_NEGATIVE = (lambda v: 0 <= v < math.inf, "a finite number, 0 or more")
_BELOW_ONE = (lambda v: 0 <= v < 1, "a number from 0 to below 1")
_SHARE = (lambda v: 0 <= v <= 1, "a number from 0 to 1")
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "learning_rate": _POSITIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "final_fraction": _SHARE,
    "decay_fraction": (lambda v: 0 < v <= 1, "a number above 0, at most 1"),
    "weight_decay": _NOT_NEGATIVE,
    "clip_norm": _POSITIVE,
    "ema": (lambda v: 0 < v < 1, "a number between 0 and 1"),
    "b1": _BELOW_ONE,
    "b2": _BELOW_ONE,
    "eps": _POSITIVE,
    "momentum": _BELOW_ONE,
    "momentum_warmup_steps": _NOT_NEGATIVE,
    "newton_schulz_steps": (lambda v: v >= 1, "1 or more"),
    "embedding_rate": _POSITIVE,
    "head_rate": _POSITIVE,
    "vector_rate": _POSITIVE,
}
_OPTIONAL = ("clip_norm", "ema", "embedding_rate", "head_rate", "vector_rate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters follow their gradients.

    Attributes:
      name: `adamw`, `adafactor`, `sgd`, `lion` or `muon`.
      learning_rate: the peak rate. With Muon that of the weight matrices. With Adafactor relative to a layer's own size
        (its RMS), as in the paper: 0.01 is usual.
      schedule: `constant`, `linear`, `cosine`, `inverse_sqrt` or `wsd`; `schedules.py` defines them.
      warmup_steps: steps of linear warm-up. It may exceed the run's steps: the run then ends on the same slope.
      final_fraction: the rate at the end over the peak (linear, cosine, wsd).
      decay_fraction: the share of the run's steps, at its end, in which wsd decays.
      weight_decay: decoupled decay, times the current rate; 0 for none.
      clip_norm: gradients are scaled down to this global norm where theirs is larger; None for no clipping.
      ema: decay of the average of the weights that evaluation uses; None for no average.
      b1, b2: decays of the averages of AdamW and Lion, and of Muon's Adam groups.
      eps: what Adam adds to its denominator.
      momentum: of SGD (`trace = momentum * trace + gradient`) and of Muon (Nesterov).
      momentum_warmup_steps: Muon's momentum rises linearly from 0.85 over so many steps; 0 for none.
      newton_schulz_steps: Muon's iterations towards an orthogonal update.
      embedding_rate, head_rate, vector_rate: peak rates of what Muon leaves to Adam: embeddings (a tied table is one),
        the output projection, and gains and other vectors. None: `learning_rate` times 1, 1/3 and 1/6.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 100
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    ema: float | None = None
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    momentum_warmup_steps: int = 300
    newton_schulz_steps: int = 5
    embedding_rate: float | None = None
    head_rate: float | None = None
    vector_rate: float | None = None

    def __post_init__(self) -> None:
        for key, known in (("name", RULES), ("schedule", SCHEDULES)):
            if getattr(self, key) not in known:
                raise ConfigError(
                    f"optimizer.{key}", f"{getattr(self, key)!r} is not known", f"use one of {', '.join(known)}"
                )
        for key, (allowed, remedy) in _RANGES.items():
            value = getattr(self, key)
            if value is None and key in _OPTIONAL:
                continue
            if not allowed(value):  # NaN fails every comparison
                raise ConfigError(f"optimizer.{key}", f"{value} is out of range", f"use {remedy}")
        for key in ("embedding_rate", "head_rate", "vector_rate"):
            if self.name != "muon" and getattr(self, key) is not None:
                raise ConfigError(f"optimizer.{key}", f"only muon has such a rate, not {self.name}", "leave it None")

    def peak_rate(self, role: Role) -> float:
        """The peak rate of parameters of a role."""
        if self.name != "muon" or role == "matrix":
            return self.learning_rate
        # The defaults' ratios are those of the best rates found for tinyshakespeare (0.81M parameters, 2,000 steps of
        # 768 characters): 0.03 for matrices and embeddings, 0.01 for the head, 0.005 for vectors.
        given, ratio = {
            "embedding": (self.embedding_rate, 1.0),
            "head": (self.head_rate, 1 / 3),
            "vector": (self.vector_rate, 1 / 6),
        }[role]
        return self.learning_rate * ratio if given is None else given


# ------------------------------------------------------------------------------------------------------------- assembly


def make_optimizer(
    config: OptimizerConfig, specs: Tree, steps: int, scale: Scale = STANDARD
) -> optax.GradientTransformation:
    """The optimizer of a config for parameters with these specs, in a run of so many steps.

    Its `update` needs the parameters as well as the gradients. `scale` is the model's (`TransformerConfig.scale`).
    """
    # Gradients shrink as the model grows, and what is added to their size is to shrink with them (Yang et al. 2022,
    # appendix B.3; Dey et al. 2025, table 1).
    sized = dataclasses.replace(config, eps=config.eps / (scale.width * scale.depth))
    return optax.chain(
        _scaled(RULES[config.name](sized, specs), multipliers(config, specs, scale)),
        optax.add_decayed_weights(config.weight_decay, decay_mask(specs)),
        _descend(peak_rates(config, specs), SCHEDULES[config.schedule](config, steps)),
    )


def peak_rates(config: OptimizerConfig, specs: Tree) -> Tree:
    """Each parameter's peak rate: a float a leaf; `multipliers` come on top of it."""
    return map_specs(lambda s: config.peak_rate(role(s)), specs)


# What a parameter's learning rate is multiplied by is the width over the base's to the power that stands here, by the
# optimizer and the parameter's role; 0 where none stands. With `n` the width, a weight matrix is to change by order
# 1/n a number, everything else by order 1, and gradients are of order 1/n (Yang et al. 2022, table 8):
#   - Adam's and Lion's directions are of order 1, whatever the gradient;
#   - SGD's are the gradient. It keeps the gradient's size, so clipping must not act: the global norm is not of one
#     order at every width (with `clip_norm` 1 the embedding's change went with width^0.3, without it with width^0.02);
#   - Adafactor's are of the size of the weight: n^-0.5 for a matrix, which starts at fan_in^-0.5;
#   - Muon's matrices have a spectral norm that depends on nothing but their proportions, and a weight matrix is to
#     change by just that (Yang et al. 2023, arXiv:2310.17813); the rest is Adam's.
WIDTH_POWERS: dict[str, dict[Role, float]] = {
    "adamw": {"matrix": -1.0},
    "lion": {"matrix": -1.0},
    "adafactor": {"matrix": -0.5},
    "sgd": {"embedding": 1.0, "head": 1.0, "vector": 1.0},
    "muon": {},
}
# The same of the depth, for what is in blocks: their branches are divided by it, and so are their gradients. All but
# SGD forget the gradient's size.
DEPTH_POWERS: dict[str, float] = {"adamw": 0.0, "lion": 0.0, "adafactor": 0.0, "sgd": 1.0, "muon": 0.0}


def multipliers(config: OptimizerConfig, specs: Tree, scale: Scale) -> Tree:
    """What each parameter's direction is multiplied by, so that one learning rate serves models of every size: a float
    a leaf. The one place for per-parameter multipliers.

    Weight decay is not multiplied: a step takes the same share off a weight at every size (Dey et al. 2025, table 1).
    """

    def one(spec: ParamSpec) -> float:
        depth = scale.depth ** DEPTH_POWERS[config.name] if "layers" in spec.axes else 1.0
        return float(depth * scale.width ** WIDTH_POWERS[config.name].get(role(spec), 0.0))

    return map_specs(one, specs)


def _scaled(rule: optax.GradientTransformation, factors: Tree) -> optax.GradientTransformation:
    """A rule with its directions multiplied, leaf by leaf. Its state is the rule's own: a checkpoint looks the same."""
    if all(factor == 1 for factor in jax.tree.leaves(factors)):
        return rule

    def update(updates: Tree, state: optax.OptState, params: Tree | None = None) -> tuple[Tree, optax.OptState]:
        directions, state = rule.update(updates, state, params)
        return jax.tree.map(lambda factor, u: factor * u, factors, directions), state

    return optax.GradientTransformation(rule.init, update)


def _descend(rates: Tree, fraction: optax.Schedule) -> optax.GradientTransformation:
    """Against the direction, by each leaf's peak rate times the schedule's fraction."""

    def init(params: Tree) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(
        updates: Tree, state: optax.ScaleByScheduleState, params: Tree | None = None
    ) -> tuple[Tree, optax.ScaleByScheduleState]:
        del params
        now = fraction(state.count)
        scaled = jax.tree.map(lambda rate, u: (-rate * now) * u, rates, updates)
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def ema_update(ema: Tree, params: Tree, decay: float, step: ArrayLike) -> Tree:
    """The average of the weights after update number `step` (0-based): decay * ema + (1 - decay) * params.

    The decay starts small, min(decay, (1 + step) / (10 + step)), so that the first weights do not linger.
    """
    t = jnp.asarray(step, jnp.float32)
    d = jnp.minimum(decay, (1 + t) / (10 + t))
    return jax.tree.map(lambda e, p: e + (1 - d) * (p.astype(e.dtype) - e), ema, params)


# ---------------------------------------------------------------------------------------------------------------- rules


def _adam(config: OptimizerConfig, specs: Tree) -> optax.GradientTransformation:
    """Kingma and Ba 2015; with the decay that follows, AdamW."""
    del specs
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)


def _lion(config: OptimizerConfig, specs: Tree) -> optax.GradientTransformation:
    """Chen et al. 2023: the sign of an average."""
    del specs
    return optax.scale_by_lion(b1=config.b1, b2=config.b2)


def _sgd(config: OptimizerConfig, specs: Tree) -> optax.GradientTransformation:
    """Gradient descent with heavy-ball momentum."""
    del specs
    return optax.trace(decay=config.momentum)


def _adafactor(config: OptimizerConfig, specs: Tree) -> optax.GradientTransformation:
    """Shazeer and Stern 2018, without momentum: second moments by rows and columns where both are 128 or more."""
    del config
    return optax.chain(optax.scale_by_factored_rms(), _relative_step(specs))


def _relative_step(specs: Tree) -> optax.GradientTransformation:
    """Adafactor's update clipping and relative step: u / max(1, rms(u)) * max(1e-3, rms(weight)), a layer at a time."""

    def one(spec: ParamSpec, u: Array, w: Array) -> Array:
        within = tuple(d for d, name in enumerate(spec.axes) if name != "layers")

        def rms(x: Array) -> Array:
            return jnp.sqrt(jnp.mean(jnp.square(x), axis=within, keepdims=True))

        return u / jnp.maximum(1.0, rms(u)) * jnp.maximum(1e-3, rms(w))

    return optax.stateless(lambda updates, params: map_specs(one, specs, updates, params))


def _muon(config: OptimizerConfig, specs: Tree) -> optax.GradientTransformation:
    """Muon for weight matrices, Adam for embeddings, the head and vectors."""
    labels = map_specs(lambda s: "matrix" if role(s) == "matrix" else "other", specs)
    return optax.partition({"matrix": scale_by_muon(config, specs), "other": _adam(config, specs)}, labels)


RULES: dict[str, Callable[[OptimizerConfig, Tree], optax.GradientTransformation]] = {
    "adamw": _adam,
    "adafactor": _adafactor,
    "sgd": _sgd,
    "lion": _lion,
    "muon": _muon,
}

# ----------------------------------------------------------------------------------------------------------------- Muon

_FIRST_MOMENTUM = 0.85  # modded-nanogpt's
_BATCH_AXES = ("layers", "experts")
_QUINTIC = (3.4445, -4.7750, 2.0315)


class MuonState(NamedTuple):
    step: Array  # int32: the updates made so far
    momentum: Tree


def scale_by_muon(config: OptimizerConfig, specs: Tree) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024): Nesterov momentum, made orthogonal matrix by matrix.

    optax.contrib.muon refuses arrays on explicit mesh axes and has no warm-up of the momentum. Leaves that are
    `optax.MaskedNode` are passed through.
    """
    first = min(_FIRST_MOMENTUM, config.momentum)
    warmup = float(config.momentum_warmup_steps)

    def init(params: Tree) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Tree, state: MuonState, params: Tree | None = None) -> tuple[Tree, MuonState]:
        del params
        warm = jnp.minimum(state.step / warmup, 1.0) if warmup else 1.0
        mu = first + (config.momentum - first) * warm
        momentum = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, state.momentum, updates)
        nesterov = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, momentum, updates)

        def one(spec: ParamSpec, u: Array) -> Array:
            return u if isinstance(u, optax.MaskedNode) else orthogonalize(u, spec, config.newton_schulz_steps)

        return map_specs(one, specs, nesterov), MuonState(optax.safe_increment(state.step), momentum)

    return optax.GradientTransformation(init, update)


def orthogonalize(x: Array, spec: ParamSpec, steps: int) -> Array:
    """`x` with the singular values of each of its matrices near one, times sqrt(max(1, fan-out / fan-in)).

    Args:
      x: shaped as its spec. Layers (and experts) are a batch of matrices; the dimensions of `fan_in` together are a
        matrix's rows, the others together its columns.
      spec: the parameter's.
      steps: Newton-Schulz iterations.
    """
    batch = tuple(d for d, name in enumerate(spec.axes) if name in _BATCH_AXES)
    columns = tuple(d for d in range(x.ndim) if d not in batch and d not in spec.fan_in)
    order = batch + spec.fan_in + columns
    fan_in, fan_out = (math.prod(x.shape[d] for d in dims) for dims in (spec.fan_in, columns))
    scale = math.sqrt(max(1.0, fan_out / fan_in))

    def matrices(y: Array) -> Array:
        flat = y.reshape(*y.shape[: max(1, len(batch))], fan_in, fan_out)
        return scale * newton_schulz(flat, steps).reshape(y.shape)

    y = x.transpose(order)
    y = on_whole_matrices(matrices, y, len(batch)) if batch else on_whole_matrices(matrices, y[None], 1)[0]
    return y.transpose(tuple(order.index(d) for d in range(x.ndim)))


def newton_schulz(x: Array, steps: int) -> Array:
    """Brings the singular values of matrices near one (0.68 to 1.13), without an SVD.

    The quintic iteration X <- aX + b(XX^T)X + c(XX^T)^2 X of Jordan et al. 2024, from X / |X|.

    Args:
      x: `[..., rows, columns]`, fp32. Matmuls run at the platform's default precision, which the iteration bears.
      steps: iterations; singular values above about 0.01 of |X| arrive in 5.
    """
    if x.shape[-2] > x.shape[-1]:
        return newton_schulz(x.mT, steps).mT
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    if x.shape[-1] < 2 * x.shape[-2]:
        return _iterate(x, steps)
    return jax.lax.platform_dependent(x, cpu=lambda y: _iterate_on_gram(y, steps), default=lambda y: _iterate(y, steps))


def _iterate(x: Array, steps: int) -> Array:
    a, b, c = _QUINTIC
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return x


def _iterate_on_gram(x: Array, steps: int) -> Array:
    """The same polynomial, built from S = XX^T alone and multiplied with X once at the end.

    Twice as fast for wide matrices on CPU (4 x 128 x 512 on two cores: 4.1 ms, not 8.7). Only for true fp32 matmuls: an
    error in S grows by a^2 an iteration, which bf16 or TF32 would not survive.
    """
    a, b, c = _QUINTIC
    s = x @ x.mT
    product = identity = jnp.eye(x.shape[-2], dtype=x.dtype)
    for i in range(steps):
        p = a * identity + b * s + c * (s @ s)
        product = p @ product if i else p
        if i < steps - 1:
            s = p @ s @ p
    return product @ x
