"""The patterns against masks drawn by hand and the relation, pair by pair."""

import dataclasses
import math
import time

import numpy as np
import pattern_strings
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scca_jax import patterns
from scca_jax.patterns import AttentionPattern, HeadPattern, relation


def _drawn(*rows):
  return np.array([[c == "x" for c in row] for row in rows])


def _sees(head, p, k, n, boundary, causality):
  """Whether query p sees key k: the definition, one pair at a time."""
  if head.own_chunk and k <= p:
    w, o = head.chunk_size, head.offset
    if math.floor((p - o) / w) == math.floor((k - o) / w):
      return True
  if k <= p and k < head.sinks:
    return True
  return _first_sees(head, p, k, n, boundary, causality)


def _first_sees(head, p, k, n, boundary, causality):
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
def head_patterns(draw, union=False):
  chunk_size = draw(st.none() | st.integers(1, 9))
  dilation = draw(st.integers(1, 4))
  if union:
    return HeadPattern(
      chunk_size=chunk_size,
      offset=0 if chunk_size is None else draw(st.integers(-3, 9)),
      shift=draw(
        st.integers(0, 12)
        | st.sampled_from([(chunk_size or 1) * c for c in (1, 2, 3)])
      ),
      dilation=dilation,
      window=draw(st.none() | st.integers(1, 6)),
      own_chunk=chunk_size is not None and draw(st.booleans()),
      sinks=draw(st.integers(0, 8)),
    )
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


@settings(max_examples=3 * settings.default.max_examples)
@given(
  st.lists(head_patterns(), min_size=1, max_size=4), MODES, st.integers(1, 14)
)
def test_masks_follow_the_relation(heads, mode, n):
  pattern = AttentionPattern(tuple(heads), *mode)
  expected = _mask(pattern, n)
  np.testing.assert_array_equal(pattern.visible(n), expected)
  assert pattern.num_pairs(n) == expected.sum()


@settings(deadline=None, max_examples=300)
@given(
  st.lists(head_patterns(union=True), min_size=1, max_size=4),
  st.sampled_from(["drop", "local"]),
  st.integers(1, 20),
)
def test_masks_of_unions_follow_the_relation(heads, boundary, n):
  pattern = AttentionPattern(tuple(heads), boundary)
  expected = _mask(pattern, n)
  np.testing.assert_array_equal(pattern.visible(n), expected)
  assert pattern.num_pairs(n) == expected.sum()


@settings(deadline=None, max_examples=300)
@given(
  st.lists(head_patterns() | head_patterns(union=True), min_size=1, max_size=4),
  st.sampled_from(["drop", "local"]),
  st.integers(1, 20),
)
def test_parts_are_disjoint_and_together_the_union(heads, boundary, n):
  pattern = AttentionPattern(tuple(heads), boundary)
  positions = np.arange(n)
  count = np.zeros((pattern.num_heads, n, n), int)
  for part in patterns.union_parts(pattern):
    assert not any(head.is_union for head in part.pattern.heads)
    seen = part.seen(positions[:, None], positions, n)
    np.add.at(count, list(part.heads), seen)
    if part.is_plain:
      np.testing.assert_array_equal(seen, part.pattern.visible(n))
  np.testing.assert_array_equal(count, pattern.visible(n))


def test_near_is_two_plain_parts_and_its_sinks():
  pattern = patterns.scca_near(4, 8, 4, sinks=2)
  far, own, sinks = patterns.union_parts(pattern)
  assert far.is_plain and own.is_plain and not sinks.is_plain
  assert [head.shift for head in far.pattern.heads] == [8, 8, 16, 24]
  assert own.pattern == patterns.local(4, 8)
  assert sinks.num_keys == 2
  plain = patterns.longmixed(4, 8)
  assert patterns.union_parts(plain) == (patterns.Part((0, 1, 2, 3), plain),)


@settings(deadline=None, max_examples=50)
@given(head_patterns(union=True), st.lists(st.integers(1, 6), min_size=1))
def test_sinks_are_those_of_the_segment(head, lengths):
  n = sum(lengths)
  starts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
  positions = np.arange(n)
  seen = head.seen(positions[:, None], positions, n, starts=starts)
  without = dataclasses.replace(head, sinks=0)
  for p, k in np.ndindex(n, n):
    sink = k <= p and k in range(starts[k], starts[k] + head.sinks)
    assert seen[p, k] == (_sees(without, p, k, n, "drop", "position") or sink)


@st.composite
def named_patterns(draw):
  n = draw(st.integers(1, 40))
  num_heads = draw(st.integers(1, 9))
  return (
    pattern_strings.make(
      draw(st.sampled_from(patterns.NAMES)), num_heads=num_heads, seq_len=n
    ),
    n,
  )


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


def test_near_is_as_drawn():
  mask = patterns.scca_near(2, 2, num_chunks=4, sinks=1).visible(8)
  np.testing.assert_array_equal(
    mask[0],
    _drawn(
      "x.......",
      "xx......",
      "xxx.....",
      "xxxx....",
      "x.xxx...",
      "x.xxxx..",
      "x...xxx.",
      "x...xxxx",
    ),
  )
  np.testing.assert_array_equal(
    mask[1],
    _drawn(
      "x.......",
      "xx......",
      "x.x.....",
      "x.xx....",
      "xx..x...",
      "xx..xx..",
      "x.xx..x.",
      "x.xx..xx",
    ),
  )


def test_a_union_that_falls_back_sees_its_own_chunk_once():
  flow = patterns.scca_flow(2, 2, 2, own_chunk=True)
  local = dataclasses.replace(flow, boundary="local")
  for pattern in (flow, local):
    np.testing.assert_array_equal(
      pattern.visible(4)[1], _drawn("x...", "xx..", "xxx.", "xxxx")
    )


def test_near_sees_two_chunks_of_an_eighth():
  n, w = 4096, 512
  pattern = pattern_strings.make("scca_near", num_heads=8, seq_len=n)
  assert pattern == patterns.scca_near(8, w, 8)
  shifts = [w * c for c in (1, 1, 2, 3, 4, 5, 6, 7)]
  assert [head.shift for head in pattern.heads] == shifts
  own, far = 8 * n * (w + 1) // 2, sum((n - shift) * w for shift in shifts)
  assert pattern.num_pairs(n) == own + far


def test_flow_shifts_are_spread_and_rotate():
  shifts = [h.shift for h in patterns.scca_flow(4, 8, 8).heads]
  assert shifts == [0, 16, 32, 48]
  shifts = [h.shift for h in patterns.scca_flow(4, 8, 8, rotate=7).heads]
  assert shifts == [56, 8, 24, 40]


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 6))
def test_heads_together_cover_every_earlier_token(num_heads, w, m):
  for n in (m * w, m * w - w + 1):
    together = patterns.scca_flow(num_heads, w, m).visible(n).any(0)
    whole = together.sum() == n * (n + 1) // 2
    if num_heads >= m:
      assert whole
    elif n == m * w:
      assert not whole
    near = patterns.scca_near(num_heads, w, m).visible(n).any(0)
    whole = near.sum() == n * (n + 1) // 2
    if num_heads >= m - 1:
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


def test_interleaving_by_devices_gives_them_equal_work():
  mixed = patterns.mix(patterns.local(4, 16), patterns.dense(4))
  for pattern in (patterns.scca_fixed(8, 16), mixed):
    shares = pattern.interleaved(2).visible(64).reshape(2, -1).sum(axis=1)
    assert shares[0] == shares[1]
    first, second = pattern.visible(64).reshape(2, -1).sum(axis=1)
    assert first != second


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
  layers = pattern_strings.make_layers(
    "scca_flow", num_heads=4, num_layers=3, seq_len=16, rotate="layer"
  )
  assert [p.heads[0].shift for p in layers] == [0, 4, 8]
  assert patterns.schedule(lambda layer: patterns.local(2, layer + 1), 2)[
    1
  ] == (patterns.local(2, 2))


def test_pairs_are_counted_some_queries_at_a_time(monkeypatch):
  monkeypatch.setattr(relation, "_BLOCK", 5)
  for pattern in (
    patterns.s2(4, 8),
    patterns.scca_near(4, 8, 4, sinks=3),
    patterns.sda(4, 3),
  ):
    assert pattern.num_pairs(32) == pattern.visible(32).sum(), pattern


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
    ({"sinks": -1}, "sinks.*-1"),
    ({"own_chunk": True}, "give a chunk_size"),
    ({"own_chunk": 1, "chunk_size": 2}, "True or False, got 1"),
    ({"sinks": 1, "dilation": 2, "select": 0}, "select=0"),
    (
      {"own_chunk": True, "chunk_size": 2, "dilation": 2, "select": 0},
      "select=0",
    ),
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
    (
      lambda: dataclasses.replace(
        patterns.scca_near(2, 4, 4), causality="slot"
      ),
      "own_chunk and sinks",
    ),
    (lambda: patterns.longmixed(4, 4, split=(1, 0)), "split"),
    (lambda: patterns.longmixed(4, 4, split=(1, 1, 1)), "sum to 1"),
    (lambda: pattern_strings.make("flow", num_heads=2, seq_len=8), "scca_flow"),
    (
      lambda: pattern_strings.make("local", num_heads=2, seq_len=8, window=3),
      "window.*chunk_size",
    ),
  ],
)
def test_patterns_that_cannot_be_are_refused(make, said):
  with pytest.raises(ValueError, match=said):
    make()


# Patterns as strings.

MODEL = {"num_heads": 8, "num_kv_heads": 4, "num_layers": 6, "seq_len": 64}


def _parse(text, **change):
  return patterns.parse(text, **(MODEL | change))


@pytest.mark.parametrize(
  ("text", "made"),
  [
    ("dense", patterns.dense(8)),
    ("dense()", patterns.dense(8)),
    (" scca_fixed\n", patterns.scca_fixed(8, 16)),
    ("scca_fixed(shift=3)", patterns.scca_fixed(8, 16, 3)),
    ("scca_flow(chunk_size=10)", patterns.scca_flow(8, 10, 7)),
    ("scca_flow", patterns.scca_flow(8, 16, 4)),
    (
      "scca_flow(own_chunk=True, sinks=3)",
      patterns.scca_flow(8, 16, 4, own_chunk=True, sinks=3),
    ),
    ("scca_near", patterns.scca_near(8, 8, 8)),
    ("scca_near(sinks=4)", patterns.scca_near(8, 8, 8, 4)),
    ("sliding", patterns.sliding(8, 16)),
    ("dna(window=3)", patterns.dna(8, 3, 4)),
    ("dna(dilation=2)", patterns.dna(8, 16, 2)),
    ("dilated(chunk_size=8)", patterns.dilated(8, 8, 8)),
    ("sda", patterns.sda(8, 4)),
    ("sda(window=5, chunk_size=None)", patterns.sda(8, 4, window=5)),
    (
      "longmixed(chunk_size=8, dilations=(2, 3), split=[.25, .25, .5])",
      patterns.longmixed(8, 8, (2, 3), (0.25, 0.25, 0.5)),
    ),
    (
      'scca_fixed(chunk_size=8, boundary="local")',
      dataclasses.replace(patterns.scca_fixed(8, 8), boundary="local"),
    ),
    (
      's2(causality="slot", interleaved=False)',
      dataclasses.replace(patterns.s2(8, 16), causality="slot"),
    ),
    ("scca_fixed(interleaved=True)", patterns.scca_fixed(8, 16).interleaved(4)),
    ("scca_fixed(interleaved=2)", patterns.scca_fixed(8, 16).interleaved(2)),
    (
      "uniform(chunk_size=8, offset=3, select=1, dilation=2)",
      AttentionPattern(
        (HeadPattern(chunk_size=8, offset=3, select=1, dilation=2),) * 8
      ),
    ),
    (
      "mix(local, sda(dilation=2), heads=(5, 3), interleaved=True)",
      patterns.mix(patterns.local(5, 16), patterns.sda(3, 2)).interleaved(4),
    ),
    (
      "mix(s2, mix(dense, s2, heads=(1, 3)), heads=[4, 4], boundary='local')",
      dataclasses.replace(
        patterns.mix(patterns.s2(4, 16), patterns.dense(1), patterns.s2(3, 16)),
        boundary="local",
      ),
    ),
    (
      'mixture(dilated(chunk_size=4, dilation=1), dense(boundary="local"))',
      patterns.mixture(
        patterns.dilated(8, 4, 1),
        dataclasses.replace(patterns.dense(8), boundary="local"),
      ),
    ),
  ],
)
def test_a_string_describes_a_pattern(text, made):
  assert _parse(text) == (made,) * 6


def test_a_string_describes_layers():
  local, sda, dense = patterns.local(8, 16), patterns.sda(8, 4), patterns.dense
  assert _parse("layers(local, sda)") == (local, sda) * 3
  assert _parse("layers(local, dense=(1, 5))") == (
    *(local, dense(8), local, local, local, dense(8)),
  )
  assert _parse("layers(mixture(local, sda), dense, dense=3)")[2:4] == (
    patterns.mixture(local, sda),
    dense(8),
  )
  flows = [patterns.scca_flow(8, 16, 4, rotate=layer) for layer in range(6)]
  assert _parse('scca_flow(rotate="layer")') == tuple(flows)
  rotated = _parse(
    'layers(mix(scca_flow(rotate="layer"), local, heads=(4, 4)), dense=0)'
  )
  assert rotated[0] == dense(8)
  assert rotated[3].heads[:4] == patterns.scca_flow(4, 16, 4, 3).heads


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("scca_fixd", "unknown pattern 'scca_fixd': did you mean 'scca_fixed'"),
    ("local(chunk_sise=3)", "did you mean 'chunk_size'.*boundary, causality"),
    ("dense(window=3)", "dense has no argument 'window'"),
    ("local(16)", "local takes arguments by name, got '16': write local"),
    ("local(chunk_size='8')", "chunk_size must be an integer, got '8'"),
    ("local(chunk_size=2.5)", "chunk_size must be an integer, got 2.5"),
    ("local(chunk_size=True)", "chunk_size must be an integer, got True"),
    ("local(chunk_size=-1)", "chunk_size must be at least 1, got -1"),
    ("local(chunk_size=4 * 4)", r"chunk_size='4 \* 4' must be a number"),
    ("local(chunk_size=print(1))", "chunk_size='print"),
    ("local(chunk_size=n)", "chunk_size='n' must be a number"),
    ("local(chunk_size=10**99)", "must be a number"),
    (f"local(chunk_size=1{'0' * 40})", "at most 2"),
    (f"local(chunk_size=1{'0' * 5000})", "cannot be read"),
    ("local(chunk_size=1, chunk_size=2)", "'chunk_size' is given twice"),
    ("local(**{'chunk_size': 2})", "name=value"),
    ("local(*(2,))", "by name"),
    ("local(boundary='wrap')", "unknown boundary 'wrap': use one of drop"),
    ("local(boundary=[1])", r"unknown boundary \[1\]"),
    ("local(boundary='local', causality='slot')", "no meaning"),
    ("local(interleaved='2')", "interleaved must be True, False or a number"),
    ("local(interleaved=3)", "interleaved must divide the 8 heads, got 3"),
    ("local(interleaved=-2)", "interleaved must divide the 8 heads, got -2"),
    ("scca_flow(rotate='layers')", "rotate must be an integer, got 'layers'"),
    ("longmixed(dilations=4)", "dilations must be a list of numbers, got 4"),
    ("longmixed(split='abc')", "split must be a list of numbers"),
    ("longmixed(dilations=(2, 'a'))", "dilations must be a list of numbers"),
    ("uniform(offset=2)", "give a chunk_size"),
    ("uniform(slot=2)", "no argument 'slot'"),
    ("scca_near(own_chunk=True)", "no argument 'own_chunk'"),
    ("scca_flow(own_chunk=2)", "own_chunk must be True or False, got 2"),
    ("scca_near(causality='slot')", "own_chunk and sinks"),
    ("mix(local, sda)", "each of its 2 patterns, 8 in all"),
    ("mix(local, sda, heads=(4, 5))", r"8 in all: got heads=\(4, 5\)"),
    ("mix(local, sda, heads=(0, 8))", "num_heads must be at least 1"),
    ("mix(local, sda, heads=(-1, 9))", "heads must be at least 0"),
    ("mix(local, mixture(sda, s2), heads=(4, 4))", "a mixture cannot be"),
    ("mix(local, sda(boundary='local'), heads=(4, 4))", "differ in boundary"),
    ("mix(s2(interleaved=True), sda, heads=(4, 4))", "mix.*interleaved=True"),
    ("mixture(mixture(local))", "a mixture cannot be a part of mixture"),
    ("mixture", "mixture needs patterns"),
    ("layers(local, dense=(1, 6))", "dense=.1, 6. must be layers of 0 to 5"),
    ("layers(local, dense='a')", "dense must be a list"),
    ("", "cannot be read"),
    ("local(", "cannot be read"),
    ("local\nsda", "cannot be read"),
    ("local\0", "cannot be read"),
    ("local()()", r"'local\(\)\(\)' is not a pattern"),
    ("os.system", "'os.system' is not a pattern"),
    ("3", "'3' is not a pattern"),
    ("lambda: local", "is not a pattern"),
    (f"{'layers(' * 90}local{')' * 90}x", "cannot be read"),
    (f"{'layers(' * 1000}local{')' * 1000}", "cannot be read"),
    (f"local(chunk_size={'-' * 50000}1)", "pattern"),
    (f"local(chunk_size={'1+' * 40000}1)", "pattern"),
    ("x" * 10**6, "at most 100000 characters, got 1000000"),
    (None, "must be a string, got None"),
  ],
)
def test_a_string_that_is_not_a_pattern_gets_one_line(text, said):
  with pytest.raises(ValueError, match=said) as error:
    _parse(text)
  assert "\n" not in str(error.value)
  assert len(str(error.value)) < 400


def test_strings_may_be_nested():
  assert _parse(f"{'layers(' * 50}local{')' * 50}")[0] == patterns.local(8, 16)


SHIFTED = [
  "s2(chunk_size=8)",
  "scca_fixed(chunk_size=8)",
  "scca_fixed(chunk_size=8, shift=3)",
  "scca_fixed(chunk_size=8, boundary='local')",
  "scca_flow(chunk_size=8, num_chunks=5)",
  "scca_flow(chunk_size=8, num_chunks=16, rotate=3)",
  "scca_flow(chunk_size=8, num_chunks=11, rotate='layer')",
  "scca_flow(chunk_size=8, num_chunks=16, own_chunk=True, sinks=2)",
  "scca_near(chunk_size=8, num_chunks=5)",
  "scca_near(chunk_size=8, num_chunks=11, sinks=4, rotate='layer')",
  "dilated(chunk_size=8, dilation=4)",
  "sda(dilation=4)",
  "sda(dilation=4, chunk_size=8)",
  "sda(dilation=4, window=3, causality='slot')",
  "longmixed(chunk_size=8)",
  "longmixed(chunk_size=8, dilations=(2, 4, 8), split=(0.5, 0.25, 0.125,"
  " 0.125))",
]


@pytest.mark.parametrize(
  "text",
  [
    "dense",
    "local(chunk_size=8)",
    "sliding(window=5)",
    "dna(window=5, dilation=3)",
    "uniform(chunk_size=8, offset=3)",
    *SHIFTED,
    *(f"{text[:-1]}, interleaved=True)" for text in SHIFTED),
    *(f"{text[:-1]}, interleaved=2)" for text in SHIFTED),
  ],
)
def test_a_constructor_comes_back_as_its_short_form(text):
  assert patterns.text(_parse(text), num_kv_heads=4) == text


@pytest.mark.parametrize(
  "text",
  [
    "mix(local(chunk_size=8), sda(dilation=2), heads=(3, 5))",
    "mixture(dilated(chunk_size=8, dilation=2), dense)",
    "layers(local(chunk_size=8), scca_fixed(chunk_size=16))",
    "layers(local(chunk_size=8), dense=(1, 5))",
    "layers(scca_flow(chunk_size=8, num_chunks=8, rotate='layer'), dense=(2,))",
  ],
)
def test_compound_forms_come_back(text):
  assert patterns.text(_parse(text)) == text


def test_one_pattern_is_every_layer():
  assert patterns.text(patterns.local(2, 4)) == "local(chunk_size=4)"
  assert patterns.text([patterns.local(2, 4)] * 3) == "local(chunk_size=4)"
  with pytest.raises(ValueError, match="at least one layer"):
    patterns.text(())


def _round_trip(layers, num_kv_heads=1):
  for known in (None, num_kv_heads):
    text = patterns.text(layers, num_kv_heads=known)
    assert (
      patterns.parse(
        text,
        num_heads=layers[0].num_heads,
        num_kv_heads=num_kv_heads,
        num_layers=len(layers),
        seq_len=77,
      )
      == layers
    ), text


@st.composite
def drawn_layers(draw):
  num_heads = draw(st.integers(1, 6))
  modes = MODES if draw(st.booleans()) else st.just(("drop", "position"))
  pattern = st.builds(
    lambda heads, mode: AttentionPattern(tuple(heads), *mode),
    st.lists(head_patterns(), min_size=num_heads, max_size=num_heads),
    modes,
  )
  named = st.builds(
    lambda name, n: pattern_strings.make(name, num_heads=num_heads, seq_len=n),
    st.sampled_from(patterns.NAMES),
    st.integers(1, 60),
  )
  union = st.builds(
    lambda heads, boundary: AttentionPattern(tuple(heads), boundary),
    st.lists(head_patterns(union=True), min_size=num_heads, max_size=num_heads),
    st.sampled_from(["drop", "local"]),
  )
  single = pattern | named | union
  kinds = single | st.builds(
    lambda members: patterns.mixture(*members),
    st.lists(single, min_size=1, max_size=3),
  )
  pool = draw(st.lists(kinds, min_size=1, max_size=3))
  return tuple(draw(st.lists(st.sampled_from(pool), min_size=1, max_size=6)))


@given(drawn_layers())
def test_text_is_the_inverse_of_parse(layers):
  _round_trip(layers)


@given(
  st.integers(1, 12),
  st.integers(1, 20),
  st.integers(1, 40),
  st.integers(-5, 50),
  st.booleans(),
)
def test_flow_is_always_recognised(num_heads, w, m, rotate, near):
  make = patterns.scca_near if near else patterns.scca_flow
  pattern = make(num_heads, w, m, rotate=rotate)
  _round_trip((pattern,) * 2)
  # Some flows are also something simpler.
  known = ("scca_near",) if near else ("scca_flow", "scca_fixed", "local")
  assert patterns.text(pattern).split("(")[0] in known


@given(st.text(max_size=30) | st.from_regex(r"(mix|layers)\(.{0,20}\)"))
def test_no_string_breaks_the_parser(text):
  try:
    made = _parse(text)
  except ValueError as error:
    assert "\n" not in str(error)
  else:
    assert len(made) == MODEL["num_layers"]


_LARGE = st.integers(1, 9) | st.integers(1, 1 << 30)


@given(
  st.integers(1, 20),
  st.none() | st.integers(1, 8),
  st.integers(0, 9) | st.integers(0, 1 << 30),
  _LARGE,
  st.none() | _LARGE,
  st.none() | st.integers(0, 30),
  st.sampled_from(
    [("drop", "position"), ("local", "position"), ("drop", "slot")]
  ),
)
def test_numbers_beyond_the_length_change_nothing(
  seq_len, chunk_size, shift, dilation, window, select, kinds
):
  head = HeadPattern(
    chunk_size=chunk_size,
    shift=shift,
    dilation=dilation,
    window=window,
    select=None if select is None else select % dilation,
  )
  pattern = AttentionPattern((head,), *kinds)
  within = pattern.within(seq_len)
  np.testing.assert_array_equal(
    within.visible(seq_len), pattern.visible(seq_len)
  )
  (head,) = within.heads
  largest = max(seq_len, shift + 1, head.select or 0, 31)
  assert head.dilation <= largest
