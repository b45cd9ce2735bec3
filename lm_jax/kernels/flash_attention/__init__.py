"""Attention: one description of masks, one function, an implementation a file."""

from lm_jax.kernels.flash_attention.mask import AttentionMask
from lm_jax.kernels.flash_attention.xla import attention

__all__ = ["AttentionMask", "attention"]
