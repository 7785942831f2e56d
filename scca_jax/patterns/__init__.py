"""Attention patterns of SCCA and its peers.

`relation` defines which keys a head sees, `named` has the patterns from the
literature, and `strings` reads and writes a pattern as one string. The package
exports everything in their `__all__`.
"""

from scca_jax.patterns.named import *  # noqa: F403
from scca_jax.patterns.relation import *  # noqa: F403
from scca_jax.patterns.strings import *  # noqa: F403
