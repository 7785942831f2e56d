"""The patterns against masks drawn by hand and the relation, pair by pair."""

import dataclasses
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scca_jax import patterns
from scca_jax.patterns import AttentionPattern, HeadPattern


def _drawn(*rows):
  return np.array([[c == "x" for c in row] for row in rows])


def _sees(head, p, k, n, boundary, causality):
  """Whether query p sees key k: the definition, one pair at a time."""
  w, o, s, r = head.chunk_size, head.offset, head.shift, head.dilation
  if head.select is not None and p % r != head.select:
    return False
  if causality == "slot":
    query, key = (p - o) % n, (k + s - o) % n
    in_order = key <= query
  else:
    if boundary == "local" and w is not None:
      chunk = math.floor((p - o) / w)
      if (chunk + 1) * w + o - s <= 0:
        s = 0
    elif boundary == "local" and r > 1 and p < s:
      s = 0
    query, key = p - o, k + s - o
    in_order = k <= p
  if not in_order or (query - key) % r:
    return False
  if w is not None and math.floor(query / w) != math.floor(key / w):
    return False
  return head.window is None or 0 <= (query - key) // r < head.window


def _mask(pattern, n):
  return np.array(
    [
      [
        [
          _sees(head, p, k, n, pattern.boundary, pattern.causality)
          for k in range(n)
        ]
        for p in range(n)
      ]
      for head in pattern.heads
    ]
  )


@st.composite
def head_patterns(draw):
  chunk_size = draw(st.none() | st.integers(1, 9))
  dilation = draw(st.integers(1, 4))
  return HeadPattern(
    chunk_size=chunk_size,
    offset=0 if chunk_size is None else draw(st.integers(-3, 9)),
    shift=draw(st.integers(0, 12)),
    dilation=dilation,
    window=draw(st.none() | st.integers(1, 6)),
    select=draw(st.none() | st.integers(0, dilation - 1)),
  )


MODES = st.sampled_from(
  [("drop", "position"), ("local", "position"), ("drop", "slot")]
)


@settings(deadline=None, max_examples=300)
@given(
  st.lists(head_patterns(), min_size=1, max_size=4), MODES, st.integers(1, 14)
)
def test_masks_follow_the_relation(heads, mode, n):
  pattern = AttentionPattern(tuple(heads), *mode)
  expected = _mask(pattern, n)
  np.testing.assert_array_equal(pattern.visible(n), expected)
  assert pattern.num_pairs(n) == expected.sum()


@st.composite
def named_patterns(draw):
  n = draw(st.integers(1, 40))
  num_heads = draw(st.integers(1, 9))
  return (
    patterns.make(
      draw(st.sampled_from(patterns.NAMES)), num_heads=num_heads, seq_len=n
    ),
    n,
  )


@settings(deadline=None, max_examples=100)
@given(named_patterns())
def test_no_query_of_a_named_pattern_sees_the_future(drawn):
  pattern, n = drawn
  assert not np.triu(pattern.visible(n), 1).any()
  assert pattern.num_pairs(n) == pattern.visible(n).sum()


def test_the_shifted_head_of_scca_fixed_is_as_drawn():
  mask = patterns.scca_fixed(2, 4).visible(8)
  np.testing.assert_array_equal(
    mask[1],
    _drawn(
      "x.......",
      "xx......",
      "xx......",
      "xx......",
      "..xxx...",
      "..xxxx..",
      "..xxxx..",
      "..xxxx..",
    ),
  )
  np.testing.assert_array_equal(mask[0], patterns.local(1, 4).visible(8)[0])


def test_a_shifted_dilated_head_is_as_drawn():
  mask = patterns.sda(2, 2).visible(6)
  np.testing.assert_array_equal(
    mask[1],
    _drawn("......", "x.....", ".x....", "x.x...", ".x.x..", "x.x.x."),
  )


def test_s2_moves_queries_with_their_keys():
  np.testing.assert_array_equal(
    patterns.s2(2, 4).visible(6)[1],
    _drawn("x.....", "xx....", "..x...", "..xx..", "..xxx.", "..xxxx"),
  )


def test_slot_causality_leaks_at_the_wrap_as_drawn():
  pattern = dataclasses.replace(patterns.s2(2, 4), causality="slot")
  # Rolled by half a chunk, the last chunk joins the end and the start.
  np.testing.assert_array_equal(
    pattern.visible(8)[1],
    _drawn(
      "x.....xx",
      "xx....xx",
      "..x.....",
      "..xx....",
      "..xxx...",
      "..xxxx..",
      "......x.",
      "......xx",
    ),
  )


def test_flow_is_as_drawn():
  mask = patterns.scca_flow(2, 2, num_chunks=2).visible(4)
  np.testing.assert_array_equal(mask[0], _drawn("x...", "xx..", "..x.", "..xx"))
  np.testing.assert_array_equal(mask[1], _drawn("....", "....", "xx..", "xx.."))


def test_local_boundary_gives_the_start_its_own_chunk():
  mask = dataclasses.replace(
    patterns.scca_flow(2, 2, 2), boundary="local"
  ).visible(4)
  np.testing.assert_array_equal(mask[1], _drawn("x...", "xx..", "xx..", "xx.."))
  mask = dataclasses.replace(patterns.sda(2, 2), boundary="local").visible(3)
  np.testing.assert_array_equal(mask[1], _drawn("x..", "x..", ".x."))


def test_dilated_heads_serve_their_own_queries():
  np.testing.assert_array_equal(
    patterns.dilated(2, 4, 2).visible(6)[1],
    _drawn("......", ".x....", "......", ".x.x..", "......", ".....x"),
  )


def test_dna_is_as_drawn():
  np.testing.assert_array_equal(
    patterns.dna(1, window=2, dilation=2).visible(5)[0],
    _drawn("x....", ".x...", "x.x..", ".x.x.", "..x.x"),
  )


def test_flow_shifts_are_spread_and_rotate():
  shifts = [h.shift for h in patterns.scca_flow(4, 8, 8).heads]
  assert shifts == [0, 16, 32, 48]
  shifts = [h.shift for h in patterns.scca_flow(4, 8, 8, rotate=7).heads]
  assert shifts == [56, 8, 24, 40]


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_heads_together_cover_every_earlier_token(num_heads, w, m):
  for n in (m * w, m * w - w + 1):
    together = patterns.scca_flow(num_heads, w, m).visible(n).any(0)
    whole = together.sum() == n * (n + 1) // 2
    if num_heads >= m:
      assert whole
    elif n == m * w:
      assert not whole
  n = 3 * m
  together = patterns.sda(num_heads, m).visible(n).any(0)
  # With local boundaries or not, fewer heads than residues leave gaps.
  assert (together.sum() == n * (n + 1) // 2) == (num_heads >= m)


def test_longmixed_splits_heads_as_stated():
  for num_heads, sizes in ((9, (4, 3, 2)), (32, (16, 8, 8))):
    dilations = [h.dilation for h in patterns.longmixed(num_heads, 8).heads]
    assert tuple(dilations.count(d) for d in (1, 2, 4)) == sizes
  heads = patterns.longmixed(16, 8).heads
  assert [h.shift for h in heads] == [0] * 4 + [4] * 4 + [0, 1] * 2 + [
    0,
    1,
    2,
    3,
  ]


def test_interleaving_spreads_the_shifts_over_gqa_groups():
  pattern = patterns.scca_fixed(8, 4)
  spread = pattern.interleaved(4)
  assert [h.shift for h in spread.heads] == [0, 2] * 4
  assert sorted(map(hash, spread.heads)) == sorted(map(hash, pattern.heads))
  with pytest.raises(ValueError, match="num_kv_heads=3"):
    pattern.interleaved(3)


def test_mix_joins_heads():
  mixed = patterns.mix(patterns.local(2, 4), patterns.sda(2, 2))
  np.testing.assert_array_equal(
    mixed.visible(7),
    np.concatenate(
      [patterns.local(2, 4).visible(7), patterns.sda(2, 2).visible(7)]
    ),
  )
  with pytest.raises(ValueError, match="boundary"):
    patterns.mix(
      patterns.dense(1),
      dataclasses.replace(patterns.dense(1), boundary="local"),
    )


def test_a_schedule_asks_for_each_layer():
  layers = patterns.make_schedule(
    "scca_flow", num_heads=4, num_layers=3, seq_len=16, rotate="layer"
  )
  assert [p.heads[0].shift for p in layers] == [0, 4, 8]
  assert patterns.schedule(lambda layer: patterns.local(2, layer + 1), 2)[
    1
  ] == (patterns.local(2, 2))


def test_pairs_of_long_sequences_are_counted_without_a_mask():
  started = time.monotonic()
  n, w = 131072, 2048
  assert patterns.local(32, w).num_pairs(n) == 32 * n * (w + 1) // 2
  assert patterns.dense(32).num_pairs(n) == 32 * n * (n + 1) // 2
  # A quarter of the pairs for each residue, and none lost between them.
  sda = patterns.sda(4, 4).num_pairs(n)
  assert sda == n * (n + 1) // 2
  # Far from a timed test: a mask would have 5e11 entries.
  assert time.monotonic() - started < 30


def test_patterns_are_hashable_and_equal_by_value():
  assert hash(patterns.scca_fixed(4, 8)) == hash(patterns.scca_fixed(4, 8, 4))
  assert patterns.scca_fixed(4, 8) == patterns.scca_fixed(4, 8, 4)


def test_mixtures_count_shared_pairs_once_for_each_member():
  pair = (patterns.local(2, 4), patterns.dilated(2, 8, 2))
  mixture = patterns.mixture(*pair)
  assert mixture.num_heads == 2
  assert mixture.num_pairs(13) == sum(int(p.visible(13).sum()) for p in pair)
  assert patterns.members(mixture) == patterns.members(list(pair)) == pair
  assert patterns.members(pair[0]) == pair[:1]
  spread = patterns.mixture(patterns.sda(4, 4), patterns.scca_fixed(4, 2))
  assert spread.interleaved(2) == patterns.Mixture(
    tuple(member.interleaved(2) for member in spread.members)
  )
  for members, said in (
    ((), "at least one"),
    ((patterns.dense(2), patterns.dense(3)), "2, 3"),
    ((mixture,), "AttentionPatterns"),
  ):
    with pytest.raises(ValueError, match=said):
      patterns.mixture(*members)


def test_heads_say_which_fields_they_use():
  assert HeadPattern().in_use() == frozenset()
  head = HeadPattern(chunk_size=4, shift=np.int64(2), offset=0)
  assert head.in_use() == {"chunk_size", "shift"}
  assert repr(head) == "HeadPattern(chunk_size=4, shift=2)"


def test_a_repr_is_short():
  assert repr(patterns.scca_fixed(32, 2048)) == (
    "AttentionPattern(16 x HeadPattern(chunk_size=2048),"
    " 16 x HeadPattern(chunk_size=2048, shift=1024))"
  )
  local = dataclasses.replace(patterns.dense(1), boundary="local")
  assert repr(local) == "AttentionPattern(HeadPattern(), boundary='local')"
  flow = repr(patterns.scca_flow(32, 2048, 32))
  assert len(flow) < 300 and "26 more heads" in flow


@pytest.mark.parametrize(
  ("settings_", "said"),
  [
    ({"chunk_size": 0}, "chunk_size.*0"),
    ({"chunk_size": 2.5}, "chunk_size.*2.5"),
    ({"offset": 1}, "offset=1"),
    ({"shift": -1}, "shift.*-1"),
    ({"dilation": 0}, "dilation.*0"),
    ({"window": 0}, "window.*0"),
    ({"dilation": 2, "select": 2}, "select=2"),
    ({"dilation": True}, "dilation.*True"),
    ({"shift": 2**31}, "shift.*2147483648"),
  ],
)
def test_heads_that_cannot_be_are_refused(settings_, said):
  with pytest.raises(ValueError, match=said):
    HeadPattern(**settings_)


@pytest.mark.parametrize(
  ("make", "said"),
  [
    (lambda: AttentionPattern(()), "at least one head"),
    (lambda: patterns.dense(0), "num_heads"),
    (lambda: dataclasses.replace(patterns.dense(1), boundary="wrap"), "wrap"),
    (lambda: dataclasses.replace(patterns.dense(1), causality="none"), "none"),
    (
      lambda: dataclasses.replace(
        patterns.dense(1), boundary="local", causality="slot"
      ),
      "no meaning",
    ),
    (lambda: patterns.longmixed(4, 4, split=(1, 0)), "split"),
    (lambda: patterns.longmixed(4, 4, split=(1, 1, 1)), "sum to 1"),
    (lambda: patterns.make("flow", num_heads=2, seq_len=8), "scca_flow"),
    (
      lambda: patterns.make("local", num_heads=2, seq_len=8, window=3),
      "window.*chunk_size",
    ),
  ],
)
def test_patterns_that_cannot_be_are_refused(make, said):
  with pytest.raises(ValueError, match=said):
    make()
