"""Attention over a mesh against attention on one device.

The cases of all back ends are run over a sharded sequence in test_backends.
"""

import dataclasses
import functools

import attention_cases as cases
import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import scca_jax
from scca_jax import patterns, sharding
from scca_jax.patterns import AttentionPattern, HeadPattern, members

SEQ = 64


def _mesh(**sizes):
  return sharding.make_mesh(sharding.MeshConfig(**sizes))


def _segments(seq_len):
  """Documents that end within shards, and padding."""
  ends = [seq_len // 3, seq_len // 3 * 2, seq_len - 3]
  ids = np.searchsorted(ends, np.arange(seq_len), side="right") + 1
  return jnp.asarray(np.stack([ids % 4, np.full(seq_len, 7)]), jnp.int32)


def _check(
  pattern,
  mesh,
  *,
  kv_heads,
  seq_len=SEQ,
  segment_ids=None,
  implementation="reference",
):
  attend = functools.partial(
    scca_jax.attention,
    mesh=mesh,
    implementation=implementation,
    return_lse=True,
  )
  num_heads = members(pattern)[0].num_heads
  inputs = cases.make_inputs(num_heads, seq_len, kv_heads)
  cases.check(attend, pattern, inputs, segment_ids)


def test_each_device_runs_its_own_heads():
  # Five query heads of a key head, whose patterns differ; two shards of them.
  pattern = cases.ruled(cases.named(cases.ALL, SEQ, 8), boundary="local")
  pattern = dataclasses.replace(pattern, heads=pattern.heads[:40:2])
  _check(
    pattern,
    _mesh(tensor=2, sequence=2, data=2),
    kv_heads=pattern.num_heads // 5,
  )


def test_the_implementation_for_one_device_serves_the_shards():
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


@pytest.mark.parametrize(
  "seq_len", [pytest.param(1, marks=pytest.mark.slow), 70]
)
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


def test_halos_may_start_at_the_same_place():
  # The window's has 8 tokens, the other a whole shard.
  pattern = AttentionPattern(
    (
      HeadPattern(chunk_size=8, shift=8),
      HeadPattern(window=9),
      HeadPattern(window=9),
      HeadPattern(chunk_size=8, shift=8),
    )
  )
  _check(pattern, _mesh(sequence=2), kv_heads=4, seq_len=32)


def test_heads_with_unknown_fields_are_exchanged_whole():
  heads = (cases.NewHead(chunk_size=16, parity=1), cases.NewHead(chunk_size=16))
  _check(AttentionPattern(heads * 2), _mesh(sequence=4), kv_heads=2)


@pytest.mark.parametrize(
  ("pattern", "kv_heads", "sizes", "implementation"),
  [
    (
      patterns.mix(
        patterns.scca_fixed(4, 8), patterns.sda(2, 4), patterns.dense(1)
      ),
      1,
      {"sequence": 8},
      "reference",
    ),
    (
      patterns.mix(patterns.sda(2, 2), patterns.dense(2)),
      2,
      {"tensor": 2, "sequence": 4},
      "xla",
    ),
  ],
)
def test_keys_go_round_for_fewer_heads_than_devices(
  pattern, kv_heads, sizes, implementation
):
  _check(
    pattern,
    _mesh(**sizes),
    kv_heads=kv_heads,
    seq_len=61,
    segment_ids=_segments(61),
    implementation=implementation,
  )


def test_keys_that_wrap_round_are_exchanged_whole():
  pattern = patterns.mix(
    dataclasses.replace(patterns.scca_fixed(2, 16), causality="slot"),
    dataclasses.replace(patterns.s2(2, 16), causality="slot"),
  )
  _check(pattern, _mesh(sequence=4), kv_heads=2)
  inputs = cases.make_inputs(4, 63, 4)
  with pytest.raises(NotImplementedError, match="63 tokens"):
    scca_jax.attention(*inputs[:3], pattern, mesh=_mesh(sequence=4))


@hypothesis.settings(
  max_examples=hypothesis.settings.default.max_examples // 40
)
@hypothesis.given(
  heads=st.lists(
    cases.heads_drawn(
      st.sampled_from([2, 4, 8, 16]), st.sampled_from([0, 0, 3, 8])
    ),
    min_size=6,
    max_size=6,
  ),
  num_shards=st.sampled_from([2, 4]),
  boundary=st.sampled_from(["drop", "local"]),
  seq_len=st.integers(20, 64),
  segmented=st.booleans(),
)
def test_drawn_patterns_are_the_same_in_shards(
  heads, num_shards, boundary, seq_len, segmented
):
  _check(
    AttentionPattern(tuple(heads), boundary),
    _mesh(sequence=num_shards),
    kv_heads=2,
    seq_len=seq_len,
    segment_ids=_segments(seq_len) if segmented else None,
  )
