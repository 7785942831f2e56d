"""The pieces for FlashAttention-3, tested with a dense attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.timing import fa3_peers
from scca_jax import attention, patterns
from scca_jax.patterns import AttentionPattern, HeadPattern


def _flash_mha(query, key, value, is_causal=False, window_size=(-1, -1)):
  """What `flash_attn3_jax.flash_mha` computes: places count from the end."""
  scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[3] ** -0.5
  rows = np.arange(query.shape[1])[:, None] + key.shape[1] - query.shape[1]
  columns = np.arange(key.shape[1])
  left, right = window_size
  seen = np.ones(scores.shape[2:], bool)
  if is_causal:
    seen &= columns <= rows
  if right >= 0:
    seen &= columns <= rows + right
  if left >= 0:
    seen &= columns >= rows - left
  weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
  return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


@pytest.mark.parametrize(
  "pattern",
  [
    patterns.dense(4),
    patterns.local(4, 16),
    patterns.scca_fixed(4, 16),
    patterns.scca_fixed(4, 16, shift=5),
    patterns.scca_flow(4, 16, 4),
    patterns.sda(8, 4),
    patterns.longmixed(8, 16),
    AttentionPattern((HeadPattern(chunk_size=16, shift=37),) * 2),
  ],
)
def test_pieces_make_up_the_pattern(pattern):
  seq_len, random = 64, np.random.default_rng(0)
  query, key, value = (
    jnp.asarray(random.normal(size=(2, seq_len, pattern.num_heads, 8)))
    for _ in range(3)
  )
  pieces = fa3_peers.Pieces(pattern, seq_len, _flash_mha)
  np.testing.assert_allclose(
    pieces.composed(query, key, value),
    attention(query, key, value, pattern, implementation="reference"),
    rtol=1e-4,
    atol=1e-5,
  )


@pytest.mark.parametrize(
  ("pattern", "seq_len"),
  [
    (patterns.sliding(2, 8), 64),
    (patterns.s2(4, 16), 64),
    (patterns.scca_fixed(4, 16), 60),
    (patterns.sda(4, 4), 62),
    (dataclasses.replace(patterns.scca_fixed(4, 16), boundary="local"), 64),
  ],
)
def test_other_patterns_are_refused(pattern, seq_len):
  with pytest.raises(NotImplementedError, match="FlashAttention-3"):
    fa3_peers.Pieces(pattern, seq_len, _flash_mha)
