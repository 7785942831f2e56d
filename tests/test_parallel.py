"""Attention over a mesh against attention on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scca_jax
from scca_jax import patterns, sharding
from scca_jax.backends import parallel
from scca_jax.patterns import AttentionPattern

SEQ = 64
TOLERANCE = 2e-5
# The tests wait for the compiler, not for what it compiles.
QUICKLY = {"xla_backend_optimization_level": 0}


def _mesh(**sizes):
  return sharding.make_mesh(sharding.MeshConfig(**sizes))


def _inputs(num_heads, seq_len, kv_heads, batch=2):
  random = np.random.default_rng(0)
  shapes = [(batch, seq_len, n, 8) for n in (num_heads, kv_heads, kv_heads)]
  arrays = [random.normal(size=shape) for shape in (*shapes, shapes[0])]
  return [jnp.asarray(x, jnp.float32) for x in arrays]


def _segments(seq_len):
  """Documents that end within pieces, and padding."""
  ends = [seq_len // 3, seq_len // 3 * 2, seq_len - 3]
  ids = np.searchsorted(ends, np.arange(seq_len), side="right") + 1
  return jnp.asarray(np.stack([ids % 4, np.full(seq_len, 7)]), jnp.int32)


def _run(attend, inputs):
  @functools.partial(jax.jit, compiler_options=QUICKLY)
  def run(query, key, value, d_output):
    output, vjp = jax.vjp(attend, query, key, value)
    return output, *vjp(d_output)

  return run(*inputs)


def _check(pattern, mesh, *, kv_heads, seq_len=SEQ, segment_ids=None):
  one = pattern if isinstance(pattern, AttentionPattern) else pattern[0]
  inputs = _inputs(one.num_heads, seq_len, kv_heads)
  got = _run(
    lambda *x: parallel.attention(
      *x, pattern, mesh=mesh, segment_ids=segment_ids, implementation="xla"
    ),
    inputs,
  )
  expected = _run(
    lambda *x: scca_jax.attention(
      *x, pattern, segment_ids=segment_ids, implementation="reference"
    ),
    inputs,
  )
  for name, a, b in zip(
    ("output", "d_query", "d_key", "d_value"), got, expected, strict=True
  ):
    np.testing.assert_allclose(
      a, b, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name
    )


def _named(boundary="drop", num_heads=4, seq_len=SEQ):
  """Heads of every named pattern, in one call."""
  return patterns.mix(
    *(
      patterns.make(
        name,
        num_heads=num_heads,
        seq_len=seq_len,
        boundary=boundary,
        **({"chunk_size": 8} if name in CHUNKED else {}),
        **({"window": 7} if name in ("sliding", "dna") else {}),
      )
      for name in patterns.NAMES
    )
  )


CHUNKED = ("local", "s2", "scca_fixed", "scca_flow", "dilated", "longmixed")


@pytest.mark.parametrize("boundary", ["drop", "local"])
def test_pieces_together_are_the_sequence(boundary):
  pattern = _named(boundary)
  _check(
    pattern,
    _mesh(sequence=8),
    kv_heads=pattern.num_heads,
    segment_ids=_segments(SEQ) if boundary == "drop" else None,
  )
