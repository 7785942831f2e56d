"""Which blocks meet: every tile against the mask, pair by pair."""

import dataclasses

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from scca_jax import patterns
from scca_jax.backends import block_sizes, blocks
from scca_jax.backends.block_sizes import BlockSizes
from scca_jax.backends.blocks import FIELD
from scca_jax.patterns import AttentionPattern, HeadPattern


def _field(tile, name):
  return int(tile[FIELD[name]])


def _seen_in(tile, rule, seq_len, rows, columns, inverse):
  """Yields the positions of rows and columns of each block, and its mask."""
  r = rule.dilation
  row_slots = _field(tile, "start") + np.arange(rows)
  row = row_slots * r + _field(tile, "residue")
  row = row[row < seq_len]
  for i in range(_field(tile, "num_blocks")):
    run = sum(i >= _field(tile, f"end_{j}") for j in range(3))
    start = _field(tile, f"start_{run}") + i * columns
    residue = _field(tile, f"residue_{min(run, 2)}")
    assert start >= 0 and start % blocks.ALIGN == 0
    column = (start + np.arange(columns)) * r + residue
    flags = _field(tile, "flags")
    falls_back = flags & blocks.FALLS_BACK or (
      flags & blocks.MIXED and i < _field(tile, "end_0")
    )
    shift = 0 if falls_back else rule.shift
    least = 0 if falls_back else rule.limit
    end = rule.limit if falls_back else blocks.FAR
    if inverse:
      first, last = blocks.query_bounds(rule, row, shift)
      first, last = np.maximum(first, least), np.minimum(last, end - 1)
    else:
      first, last = blocks.key_bounds(rule, row, shift)
      last = np.where((row < least) | (row >= end), -1, last)
    bounds = [blocks.to_slots(first, last, residue, r)]
    if rule.is_union:
      bounds += blocks.more_bounds(rule, row, inverse)
      if blocks.has_wide_gaps(rule, seq_len, columns, inverse):
        end = start + columns - 1
        bounds = [
          blocks.hull(
            [(np.maximum(a, start), np.minimum(b, end)) for a, b in bounds]
          )
        ]
    slots = start + np.arange(columns)
    seen = np.zeros((len(row), columns), bool)
    for first, last in bounds:
      seen |= (slots >= first[:, None]) & (slots <= last[:, None])
    yield i, row, column, seen & (column < seq_len)


def _check(
  head, boundary, seq_len, rows, columns, inverse, in_order, query_offset=0
):
  pattern = AttentionPattern((head,), boundary)
  hypothesis.assume(not blocks.unserved_unions(pattern, False))
  positions = np.arange(seq_len)
  visible = head.seen(
    positions[:, None] + query_offset,
    positions,
    seq_len,
    boundary=boundary,
  )
  if inverse:
    visible = visible.T
  rule = blocks.Rule.of(head, boundary, query_offset)
  tiles = blocks.tiles_of_head(rule, seq_len, rows, columns, inverse, in_order)
  count = np.zeros((seq_len, seq_len), int)
  for tile in tiles.reshape(-1, len(blocks.FIELDS)):
    for i, row, column, seen in _seen_in(
      tile, rule, seq_len, rows, columns, inverse
    ):
      assert seen.any(), "a block without a seen pair"
      if i >= _field(tile, "num_masked"):
        assert seen.all(), "a block that needs a mask"
      pairs = np.argwhere(seen)
      count[row[pairs[:, 0]], column[pairs[:, 1]]] += 1
  np.testing.assert_array_equal(count, visible)


@st.composite
def _heads(draw):
  chunk_size = draw(st.none() | st.integers(1, 120))
  dilation = draw(st.sampled_from([1, 1, 2, 3, 5]))
  return HeadPattern(
    chunk_size=chunk_size,
    offset=draw(st.integers(-40, 40)) if chunk_size else 0,
    shift=draw(st.just(0) | st.integers(0, 200)),
    dilation=dilation,
    window=draw(st.none() | st.integers(1, 60)),
    select=draw(st.none() | st.integers(0, dilation - 1)),
  )


@st.composite
def _unions(draw):
  chunk_size = draw(st.none() | st.integers(1, 120))
  return HeadPattern(
    chunk_size=chunk_size,
    offset=draw(st.integers(-40, 40)) if chunk_size else 0,
    shift=draw(st.just(0) | st.integers(0, 200)),
    window=draw(st.none() | st.integers(1, 60)),
    own_chunk=chunk_size is not None and draw(st.booleans()),
    sinks=draw(st.integers(0, 70)),
  )


@hypothesis.settings(max_examples=3 * hypothesis.settings.default.max_examples)
@hypothesis.given(
  head=_heads() | _unions(),
  boundary=st.sampled_from(patterns.BOUNDARIES),
  seq_len=st.integers(1, 260),
  rows=st.sampled_from([16, 32]),
  columns=st.sampled_from([8, 16, 32]),
  inverse=st.booleans(),
  in_order=st.booleans(),
)
def test_every_seen_pair_is_in_one_block_and_no_block_is_in_vain(
  head, boundary, seq_len, rows, columns, inverse, in_order
):
  _check(head, boundary, seq_len, rows, columns, inverse, in_order)


@hypothesis.given(
  chunk_size=st.integers(1, 60),
  num_chunks=st.integers(1, 5),
  query_offset=st.integers(1, 90),
  further=st.integers(0, 150),
  rows=st.sampled_from([16, 32]),
  columns=st.sampled_from([8, 16, 32]),
  inverse=st.booleans(),
  in_order=st.booleans(),
)
def test_queries_may_have_later_positions_than_keys(
  chunk_size,
  num_chunks,
  query_offset,
  further,
  rows,
  columns,
  inverse,
  in_order,
):
  # See `contract.starts_late`.
  head = HeadPattern(
    chunk_size=chunk_size,
    offset=query_offset % chunk_size,
    shift=query_offset + further,
  )
  seq_len = num_chunks * chunk_size
  _check(head, "drop", seq_len, rows, columns, inverse, in_order, query_offset)


def _groups(pattern, **settings):
  rules = [blocks.Rule.of(h, pattern.boundary) for h in pattern.heads]
  call = {
    "batch": 2,
    "group_size": 2,
    "seq_len": 300,
    "sizes": BlockSizes(32, 16),
    "inverse": False,
    "in_order": False,
  } | settings
  return blocks.make_groups(rules, range(pattern.num_heads), **call)


@pytest.mark.parametrize("inverse", [False, True])
def test_dealing_loses_no_tile(inverse):
  pattern = patterns.mix(patterns.scca_flow(4, 64, 4), patterns.sda(4, 3))
  groups, costs = _groups(pattern, inverse=inverse)
  table, counts = blocks.deal(groups, costs, 7)
  dealt = []
  for hand, (num_tiles, num_empty) in zip(table, counts, strict=True):
    has_blocks = hand[:, FIELD["num_blocks"]] > 0
    assert has_blocks[:num_tiles].all()
    assert not has_blocks[num_tiles : num_tiles + num_empty].any()
    dealt.extend(map(tuple, hand[: num_tiles + num_empty].tolist()))
  made = [tuple(tile) for group in groups for tile in group.tolist()]
  assert sorted(dealt) == sorted(made)


def test_query_heads_of_a_key_head_are_one_group():
  groups, _ = _groups(patterns.scca_fixed(8, 64), inverse=True)
  for group in groups:
    same = ("batch", "kv_head", "residue", "start")
    for name in same:
      assert len(set(group[:, FIELD[name]])) == 1
    flags = group[:, FIELD["flags"]]
    assert np.flatnonzero(flags & blocks.FIRST).tolist() == [0]
    assert np.flatnonzero(flags & blocks.LAST).tolist() == [len(group) - 1]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("boundary", patterns.BOUNDARIES)
def test_trimmed_tiles_keep_what_segments_let_see(inverse, boundary):
  seq_len, sizes = 700, BlockSizes(32, 16)
  pattern = patterns.mix(
    dataclasses.replace(patterns.dense(2), boundary=boundary),
    dataclasses.replace(patterns.scca_fixed(2, 300), boundary=boundary),
    dataclasses.replace(patterns.sda(2, 3), boundary=boundary),
    dataclasses.replace(patterns.scca_near(2, 150, 5), boundary=boundary),
  )
  groups, _ = _groups(
    pattern,
    seq_len=seq_len,
    sizes=sizes,
    inverse=inverse,
    in_order=True,
  )
  table = np.concatenate(groups)
  ids = np.repeat([[3, 1, 0, 2, 5, 0, 4]], 2, axis=0).repeat(100, axis=1)
  ids[1] = 6
  dilations = np.array([pattern.heads[h].dilation for h in table[:, 1]])
  trimmed = np.asarray(
    blocks.trim(table, jnp.asarray(ids, jnp.int32), dilations, sizes)
  )
  assert trimmed.shape == table.shape
  before, after = (x[:, FIELD["num_blocks"]].sum() for x in (table, trimmed))
  assert after < 0.8 * before
  visible = pattern.visible(seq_len)
  same = (ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, None, :]
  left = visible[None] & same[:, None]
  for tile in trimmed:
    head, batch = _field(tile, "head"), _field(tile, "batch")
    rule = blocks.Rule.of(pattern.heads[head], boundary)
    for _, row, column, seen in _seen_in(
      tile, rule, seq_len, sizes.rows, sizes.columns, inverse
    ):
      rows, columns = np.nonzero(seen)
      pairs = (row[rows], column[columns])
      left[(batch, head, *(pairs[::-1] if inverse else pairs))] = False
  assert not left.any()


def test_tuned_sizes_are_of_known_kernels():
  assert block_sizes.tuned_sizes("mosaic", "no GPU", jnp.bfloat16, 128) == {}
  for gpus in block_sizes._all_tuned_sizes().values():
    for kind, dtypes in gpus.items():
      for dtype, dims in dtypes.items():
        for head_dim in dims:
          found = block_sizes.tuned_sizes("mosaic", kind, dtype, int(head_dim))
          assert all(isinstance(x, BlockSizes) for x in found.values())
