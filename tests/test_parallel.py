"""Attention over a mesh against attention on one device."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import scca_jax
from scca_jax import patterns, sharding
from scca_jax.patterns import AttentionPattern, HeadPattern

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


def _check(
  pattern,
  mesh,
  *,
  kv_heads,
  seq_len=SEQ,
  segment_ids=None,
  implementation="reference",
):
  one = pattern if isinstance(pattern, AttentionPattern) else pattern[0]
  inputs = _inputs(one.num_heads, seq_len, kv_heads)
  got = _run(
    lambda *x: scca_jax.attention(
      *x,
      pattern,
      mesh=mesh,
      segment_ids=segment_ids,
      implementation=implementation,
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
      if name != "scca_near"
    )
  )


CHUNKED = ("local", "s2", "scca_fixed", "scca_flow", "dilated", "longmixed")


# Of 8 pieces all queries need keys from in front, of 2 the first few; and
# shifts are longer than a piece, or shorter.
@pytest.mark.parametrize("num_pieces", [8, 2])
@pytest.mark.parametrize("boundary", ["drop", "local"])
def test_pieces_together_are_the_sequence(boundary, num_pieces):
  pattern = _named(boundary)
  _check(
    pattern,
    _mesh(sequence=num_pieces),
    kv_heads=pattern.num_heads,
    segment_ids=_segments(SEQ) if boundary == "drop" else None,
  )


def test_each_device_runs_its_own_heads():
  # Five query heads of a key head, whose patterns differ; two shards of them.
  pattern = _named("local", num_heads=2)
  _check(
    pattern,
    _mesh(tensor=2, sequence=2, data=2),
    kv_heads=pattern.num_heads // 5,
  )


def test_the_implementation_for_one_device_serves_the_pieces():
  pattern = patterns.mix(
    patterns.scca_fixed(2, 8), patterns.scca_flow(4, 8, 8), patterns.sda(2, 2)
  )
  _check(
    pattern,
    _mesh(tensor=2, sequence=4),
    kv_heads=4,
    segment_ids=_segments(SEQ),
    implementation="xla",
  )


@pytest.mark.parametrize("seq_len", [1, 37, 70])
def test_lengths_need_not_fit(seq_len):
  pattern = patterns.mix(
    patterns.scca_fixed(2, 8), patterns.scca_flow(2, 8, 9), patterns.dense(2)
  )
  _check(pattern, _mesh(sequence=8), kv_heads=3, seq_len=seq_len)


def test_patterns_are_mixed_by_their_log_sum_exp():
  mixture = (
    patterns.dilated(4, 8, 2),
    patterns.dilated(4, 32, 4),
    patterns.scca_fixed(4, 16),
  )
  _check(mixture, _mesh(fsdp=2, sequence=4), kv_heads=2)


def test_keys_that_wrap_round_are_exchanged_whole():
  pattern = patterns.mix(
    dataclasses.replace(patterns.scca_fixed(2, 16), causality="slot"),
    dataclasses.replace(patterns.s2(2, 16), causality="slot"),
  )
  _check(pattern, _mesh(sequence=4), kv_heads=2)
  inputs = _inputs(4, 63, 4)
  with pytest.raises(NotImplementedError, match="63 tokens"):
    scca_jax.attention(*inputs[:3], pattern, mesh=_mesh(sequence=4))


def _heads():
  return st.builds(
    lambda chunk_size, offset, shift, dilation, window, select: HeadPattern(
      chunk_size=chunk_size,
      offset=offset if chunk_size else 0,
      shift=shift,
      dilation=dilation,
      window=window,
      select=None if select is None else select % dilation,
    ),
    st.none() | st.sampled_from([2, 4, 8, 16]),
    st.sampled_from([0, 0, 3, 8]),
    st.integers(0, 40),
    st.integers(1, 4),
    st.none() | st.integers(1, 12),
    st.none() | st.integers(0, 3),
  )


@hypothesis.settings(
  max_examples=hypothesis.settings.default.max_examples // 16
)
@hypothesis.given(
  heads=st.lists(_heads(), min_size=6, max_size=6),
  num_pieces=st.sampled_from([2, 4]),
  boundary=st.sampled_from(["drop", "local"]),
  seq_len=st.integers(20, 64),
  segmented=st.booleans(),
)
def test_drawn_patterns_are_the_same_in_pieces(
  heads, num_pieces, boundary, seq_len, segmented
):
  _check(
    AttentionPattern(tuple(heads), boundary),
    _mesh(sequence=num_pieces),
    kv_heads=2,
    seq_len=seq_len,
    segment_ids=_segments(seq_len) if segmented else None,
  )
