"""Attention patterns of SCCA and its peers.

`relation` defines which keys a head sees, `named` has the patterns of the
literature, and `strings` reads and writes a pattern as one string. This package
has all that they list in `__all__`.
"""

from scca_jax.patterns.named import *  # noqa: F403
from scca_jax.patterns.relation import *  # noqa: F403
from scca_jax.patterns.strings import *  # noqa: F403
