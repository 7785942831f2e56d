"""The back end `cudnn`: how patterns are cut into dense calls.

Without a GPU the dense calls are made by XLA; what cuDNN itself computes is
tested on one, in test_gpu_backends.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scca_jax import patterns
from scca_jax.backends import cudnn, reference
from scca_jax.patterns import AttentionPattern, HeadPattern

CASES = {
  "dense": patterns.dense(4),
  "local": patterns.local(4, 16),
  "sliding": patterns.sliding(4, 10),
  "s2": patterns.s2(4, 16),
  "fixed": patterns.scca_fixed(4, 16),
  "fixed across groups": patterns.scca_fixed(6, 12, 3).interleaved(2),
  "flow": patterns.scca_flow(4, 16, 4),
  "flow local": dataclasses.replace(
    patterns.scca_flow(4, 16, 4), boundary="local"
  ),
  "odd offset": AttentionPattern(
    (HeadPattern(chunk_size=20, offset=-13), HeadPattern(chunk_size=200))
  ),
}


def _run(attention, pattern, inputs):
  query, key, value, cotangent = inputs

  @functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
  )
  def run(query, key, value):
    attend = functools.partial(
      attention,
      pattern=pattern,
      segment_ids=None,
      query_offset=0,
      scale=0.4,
    )
    output, vjp = jax.vjp(lambda *x: attend(*x)[0], query, key, value)
    return output, *vjp(cotangent)

  return run(query, key, value)


@pytest.mark.parametrize("seq_len", [5, 16, 37, 64])
@pytest.mark.parametrize("name", CASES)
def test_pieces_make_up_the_pattern(name, seq_len):
  pattern = CASES[name]
  random = np.random.default_rng(seq_len)
  heads = pattern.num_heads
  inputs = [
    jnp.asarray(random.normal(size=(2, seq_len, n, 8)), jnp.float32)
    for n in (heads, 2, 2, heads)
  ]
  attend = functools.partial(cudnn.attention, dense_implementation="xla")
  found = _run(attend, pattern, inputs)
  truth = _run(reference.attention, pattern, inputs)
  labels = ("output", "d_query", "d_key", "d_value")
  for label, a, b in zip(labels, found, truth, strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=label)


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
