"""What the back end `cudnn` cannot cut into dense calls.

What it computes is tested in test_backends, what it refuses by its declaration
in test_contract.
"""

import jax.numpy as jnp
import pytest

from scca_jax import patterns
from scca_jax.backends import cudnn
from scca_jax.patterns import AttentionPattern, HeadPattern


@pytest.mark.parametrize(
  ("pattern", "said"),
  [
    (patterns.scca_fixed(2, 8, 12), "chunk_size=8"),
    (AttentionPattern((HeadPattern(window=4, shift=1),) * 2), "windows"),
    (AttentionPattern((HeadPattern(window=4, chunk_size=8),) * 2), "windows"),
  ],
)
def test_what_is_not_dense_on_pieces_is_refused(pattern, said):
  x = jnp.zeros((1, 9, 2, 8))
  with pytest.raises(NotImplementedError, match=said):
    cudnn.attention(
      x,
      x,
      x,
      pattern,
      segment_ids=None,
      query_offset=0,
      scale=1.0,
      dense_implementation="xla",
    )
