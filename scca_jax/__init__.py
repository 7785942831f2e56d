"""Shifted Cross Chunk Attention (arXiv 2312.07305) for JAX."""

from scca_jax import patterns, receptive_field
from scca_jax.dispatch import attention

__all__ = ["attention", "patterns", "receptive_field"]
