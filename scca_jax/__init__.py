"""Shifted Cross Chunk Attention (arXiv 2312.07305) for JAX."""

import jax

from scca_jax import patterns, receptive_field
from scca_jax.dispatch import attention
from scca_jax.patterns import AttentionPattern, HeadPattern, Mixture

__all__ = [
  "AttentionPattern",
  "HeadPattern",
  "Mixture",
  "__version__",
  "attention",
  "patterns",
  "receptive_field",
]

__version__ = "0.1.0"

# Patterns have no arrays: `jit`, `checkpoint` and `vmap` take them as static
# arguments. They are registered here because this file runs before any module
# of the package, and `patterns` itself does not import jax.
for _pattern in (AttentionPattern, HeadPattern, Mixture):
  jax.tree_util.register_static(_pattern)
