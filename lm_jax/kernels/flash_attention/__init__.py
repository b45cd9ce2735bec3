"""Attention: one description of masks, one function, an implementation a file."""

from lm_jax.kernels.flash_attention.api import IMPLEMENTATIONS, flash_attention
from lm_jax.kernels.flash_attention.bias import DistanceTable, PositionBias, Slopes
from lm_jax.kernels.flash_attention.implementation import ATTENDED
from lm_jax.kernels.flash_attention.mask import PATTERNS, AttentionMask, LocalGlobal, Strided
from lm_jax.kernels.flash_attention.ring import ring_order

__all__ = [
    "ATTENDED",
    "IMPLEMENTATIONS",
    "PATTERNS",
    "AttentionMask",
    "DistanceTable",
    "LocalGlobal",
    "PositionBias",
    "Slopes",
    "Strided",
    "flash_attention",
    "ring_order",
]
