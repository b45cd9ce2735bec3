"""lm_jax: language models in JAX, from raw text to a trained, evaluated and served model."""

__version__ = "0.1.0"
