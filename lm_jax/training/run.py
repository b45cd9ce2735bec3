"""A run's whole config: a field a section, and the checks that cross sections."""

import dataclasses
import math
from typing import Any

from lm_jax.data.pipeline import DataConfig
from lm_jax.data.tokenizers import is_path, open_path
from lm_jax.errors import ConfigError
from lm_jax.models.transformer import REMAT, TransformerConfig
from lm_jax.sharding import MeshConfig
from lm_jax.training.checkpoint import CheckpointConfig
from lm_jax.training.optimizers import OptimizerConfig

_OF_BYTES = 257  # a boundary too; characters have fewer, or are few beside the rest


def _at_least(section: str, config: Any, least: dict[str, int]) -> None:
    """Raises ConfigError for the first field of a section that is below its least value; None passes."""
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise ConfigError(f"{section}.{name}", f"{value} is too small", f"use {low} or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The section `train`.

    Attributes:
      steps: how many steps; or
      tokens: how many tokens, rounded up to whole steps. One of the two is given.
      batch_size: rows of a step, over all devices.
      length: tokens of a row.
      seed: of initial values, of the order of the data, and of whatever else is random.
      microbatches: into how many parts a step's rows are cut; changes memory and nothing else.
      remat: what the backward pass computes again instead of keeping: `none`, `dots` (all but products with weights),
        `attention` (all but attention's outputs), `full`; `offload` keeps products with weights in the host's memory;
        `auto` is the first of none, dots, attention and full that fits.
      memory_gb: what `auto` may fill of a device, in GB; None: nine tenths of what it has.
      z_loss: weight of `log(Z)^2` in the loss; 0: none.
      max_bad_steps: the run ends after so many steps in a row whose loss or gradient was not finite; none of them is
        applied.
      init_from: another run's folder, whose weights this one starts from; None: fresh weights.
      wandb: project of Weights & Biases to log to; None: none.
    """

    steps: int | None = 1000
    tokens: int | None = None
    batch_size: int = 16
    length: int = 256
    seed: int = 0
    microbatches: int = 1
    remat: str = "none"
    memory_gb: float | None = None
    z_loss: float = 0.0
    max_bad_steps: int = 10
    init_from: str | None = None
    wandb: str | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.tokens is None):
            both = self.steps is not None
            problem = (
                f"both steps={self.steps} and tokens={self.tokens} are given"
                if both
                else "neither steps nor tokens is given"
            )
            raise ConfigError("train.steps", problem, "give one of train.steps and train.tokens, and the other as None")
        least = {
            "steps": 1,
            "tokens": 1,
            "batch_size": 1,
            "length": 1,
            "seed": 0,
            "microbatches": 1,
            "max_bad_steps": 1,
        }
        _at_least("train", self, least)
        if self.remat not in (*REMAT, "auto"):
            known = ", ".join((*REMAT, "auto"))
            raise ConfigError("train.remat", f"unknown policy {self.remat!r}", f"use one of {known}")
        if self.memory_gb is not None and not 0 < self.memory_gb < math.inf:
            raise ConfigError("train.memory_gb", f"{self.memory_gb} is out of range", "use a number above 0, or None")
        if not 0 <= self.z_loss < math.inf:
            raise ConfigError("train.z_loss", f"{self.z_loss} is out of range", "use 0, or a small number such as 1e-4")
        if self.batch_size % self.microbatches:
            problem = f"{self.microbatches} does not divide train.batch_size = {self.batch_size}"
            raise ConfigError("train.microbatches", problem, "use a divisor of the batch size")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.length

    @property
    def total_steps(self) -> int:
        """How many steps the run takes in all."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None  # __post_init__ has seen to it
        return -(-self.tokens // self.tokens_per_step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The section `evaluation`.

    Attributes:
      every: steps between evaluations; there is always one before the first step and one after the last. None: only
        those.
      batches: batches of each set; None: all of it.
      sets: further texts to evaluate on, by name (a source as in `data.source`).
      prompt: what the samples along the way continue; None: no samples. Empty: the beginning of a document.
      sample_tokens: how many tokens a sample has.
    """

    every: int | None = None
    batches: int | None = None
    sets: dict[str, str] = dataclasses.field(default_factory=dict)
    prompt: str | None = ""
    sample_tokens: int = 200

    def __post_init__(self) -> None:
        _at_least("evaluation", self, {"every": 1, "batches": 1, "sample_tokens": 1})
        for name in self.sets:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ConfigError(f"evaluation.sets.{name}", "is no name of letters, digits, '-' and '_'")

    def due(self, step: int, total: int) -> bool:
        """Whether the model is evaluated after this step of so many."""
        return step == total or (self.every is not None and step % self.every == 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run."""

    model: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)

    def with_vocab(self, ids: int) -> "RunConfig":
        """The config with the tokenizer's vocabulary filled in where the model leaves it open.

        Raises:
          ConfigError: where the model has fewer ids than the tokenizer.
        """
        vocab = self.model.vocab
        if vocab is not None and vocab < ids:
            problem = f"{vocab} ids are fewer than the {ids} of the tokenizer"
            raise ConfigError("model.vocab", problem, f"use {ids} or more, or leave it open")
        return dataclasses.replace(self, model=dataclasses.replace(self.model, vocab=vocab or ids))

    def with_likely_vocab(self) -> "RunConfig":
        """The config with the vocabulary that its tokenizer will have, as far as that is known before there is one."""
        if self.model.vocab is not None:
            return self
        data = self.data
        if is_path(data.tokenizer):
            return self.with_vocab(open_path(data.tokenizer, data.boundary).vocab_size)
        return self.with_vocab(data.vocab_size if data.tokenizer == "sentencepiece" else _OF_BYTES)

    def check_layout(self, devices: int) -> None:
        """Raises ConfigError where the mesh does not fit the devices, or does not divide what is split over it."""
        size = self.mesh.sizes(devices)
        rows, train, model = size["data"] * size["fsdp"], self.train, self.model
        if train.batch_size % (rows * train.microbatches):
            parts = f"data={size['data']} x fsdp={size['fsdp']} x microbatches={train.microbatches}"
            nearest = max(1, round(train.batch_size / (rows * train.microbatches))) * rows * train.microbatches
            problem = f"{train.batch_size} rows cannot be split evenly over {parts}"
            raise ConfigError("train.batch_size", problem, f"the nearest that fits is {nearest}")
        split: list[tuple[str, int | None, tuple[str, ...]]] = [
            ("train.length", train.length, ("sequence",)),
            ("model.heads", model.heads, ("tensor",)),
            ("model.kv_heads", model.key_heads, ("tensor",)),
            ("model.feed_forward_dim", model.inner, ("tensor",)),
            ("model.vocab", model.vocab, ("tensor",)),
            ("model.embed", model.embed, ("fsdp",)),
        ]
        if self.mesh.split_residual:
            split.append(("train.length", train.length, ("sequence", "tensor")))
        if self.mesh.context == "all_to_all":
            split.append(("model.heads", model.heads, ("tensor", "sequence")))
        for name, value, axes in split:
            pieces = math.prod(size[a] for a in axes)
            if value is not None and value % pieces:
                near = max(1, round(value / pieces)) * pieces
                over = " x ".join(f"mesh.{a}" for a in axes)
                problem = f"{value} cannot be split evenly over {over} = {pieces}"
                raise ConfigError(name, problem, f"the nearest that fits is {near}, or choose a divisor for {over}")
        pieces = 2 * size["sequence"]  # see `ring_order`
        if self.mesh.context == "ring" and model.window is None and pieces > 2 and train.length % pieces:
            near = max(1, round(train.length / pieces)) * pieces
            problem = f"{train.length} cannot be cut into the {pieces} parts of a ring over mesh.sequence"
            raise ConfigError("train.length", problem, f"the nearest that fits is {near}")
