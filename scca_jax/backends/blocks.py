"""Which blocks of keys and queries meet, for the GPU kernels.

Keys are read in place: a shift is an index, and a dilation `r` a stride. The
positions of one *residue* (equal modulo `r`) are its *slots*. For one shift a
query sees an interval of keys, and a key is seen by an interval of queries,
both in closed form (`key_bounds`, `query_bounds`), so that both the forward and
the backward pass know their blocks.

A *tile* is a block of rows (queries or, in the inverse direction, keys) with
the blocks of columns that it meets. Tiles are made on the host, once per shape:
`make_groups` lists them. Within a tile, blocks that straddle a border, and so
need a mask, come first. The kernels read tiles from a table and use the same
bounds for the masks.

The tiles of a union head have the blocks of all its parts: the keys that it
sees by its shift, its own chunk (`own_chunk`), and the sinks (`more_bounds`).
No column is in two blocks, and the mask of a block covers all parts. If the
blocks are not just a few runs, each part has its own tile.

The parts: the rule of a head, the bounds of its keys and queries, blocks of a
tile, tiles of union heads, and `make_groups`.
"""

import dataclasses
import functools
import heapq
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from scca_jax.backends.block_sizes import BlockSizes
from scca_jax.patterns import AttentionPattern, HeadPattern

# Exceeds any sequence length.
FAR = 1 << 29
# Positions in a whole tile must fit into 32 bits.
MAX_DILATION = 1 << 20
# Blocks of columns begin at a multiple of this slot: the copy engine of a
# Hopper GPU fills tiles of 8 rows.
ALIGN = 8
# How many positions `trim` summarises the segment ids of.
_GRANULE = 64
# Costs measured on an H200, in units of a block without a mask: a mask, a tile
# with blocks, and a tile without.
_MASK_COST, _TILE_COST, _EMPTY_TILE_COST = 0.25, 0.7, 0.2
# Groups of tiles per multiprocessor that `deal` orders by falling cost.
_NUM_SORTED = 6

# Fields of a tile. Block `i` begins at slot `start_j + i * columns` of
# `residue_j`, where `j` is 0 for `i < end_0`, else 1 for `i < end_1`, else 2;
# tiles of union heads, of residue 0, have a fourth run from `end_2` on.
FIELDS = (
  "batch",
  "head",  # of the queries
  "kv_head",
  "place",  # of the query head among those of the launch
  "kv_place",  # of the key head among those of the launch
  "residue",
  "start",  # first row, a slot
  "num_blocks",
  "num_masked",  # this many, from the first on, need a mask
  "end_0",
  "end_1",
  "residue_0",
  "start_0",
  "residue_1",
  "start_1",
  "residue_2",
  "start_2",
  "end_2",
  "start_3",
  "flags",
)
FIELD = {name: i for i, name in enumerate(FIELDS)}
# Flags of a tile: it is the first or the last of its rows; all its blocks are
# for queries that fall back (`HeadPattern.falls_back`); only its first run is.
FIRST, LAST, FALLS_BACK, MIXED = 1, 2, 4, 8


@dataclasses.dataclass(frozen=True)
class Rule:
  """What a head sees, as Python numbers or as scalars in a kernel.

  Attributes:
    chunk_size: Length of the chunks, `2 * FAR` without chunks.
    offset: A chunk border, in tokens; not positive.
    shift: Shift of the keys, in tokens.
    reach: Largest distance of a slot in a window, in tokens, or `FAR`.
    windowed: Whether there is a window, 0 or 1.
    limit: Queries before this position are served without the shift.
    dilation: Distance between neighbouring slots.
    select: Residue of the queries that are served, or -1.
    own_chunk: Whether queries also see their own chunk, 0 or 1.
    sinks: Keys at the start that all queries also see.
    ahead: How far after a query a key may be, in tokens: with a `query_offset`
      it has an earlier position all the same.
  """

  chunk_size: Any
  offset: Any
  shift: Any
  reach: Any
  windowed: Any
  limit: Any
  dilation: Any
  select: Any
  own_chunk: Any = 0
  sinks: Any = 0
  ahead: Any = 0

  @classmethod
  def of(
    cls, head: HeadPattern, boundary: str, query_offset: int = 0
  ) -> "Rule":
    """Returns the rule of a head.

    Args:
      head: The head.
      boundary: See `AttentionPattern`.
      query_offset: Position of the first query; see `contract.starts_late`.
    """
    shift, limit = head.shift - query_offset, 0
    if head.own_chunk:
      # Where the head falls back, its own chunk contains what it sees.
      boundary = "drop"
    if head.chunk_size is None:
      if head.window is None:
        # Without borders only the residue of the shift matters.
        shift %= head.dilation
      chunk_size, offset = 2 * FAR, -FAR
      if boundary == "local" and head.dilation > 1:
        limit = head.shift
    else:
      chunk_size = head.chunk_size
      offset = (head.offset - query_offset) % chunk_size - chunk_size
      if boundary == "local" and head.shift:
        whole_chunks = (head.shift - head.offset) // chunk_size
        limit = max(0, head.offset + whole_chunks * chunk_size)
    reach = FAR
    if head.window is not None:
      reach = min((head.window - 1) * head.dilation, FAR)
    return cls(
      chunk_size=chunk_size,
      offset=offset,
      shift=shift,
      reach=reach,
      windowed=int(head.window is not None),
      limit=limit,
      dilation=head.dilation,
      select=-1 if head.select is None else head.select,
      own_chunk=int(head.own_chunk),
      sinks=head.sinks,
      ahead=query_offset,
    )

  @property
  def is_union(self) -> bool:
    """Whether a head sees more than one interval of keys (numbers only)."""
    return bool(self.own_chunk or self.sinks)

  @property
  def of_own_chunk(self) -> "Rule":
    """The rule of a head that sees only its own chunk."""
    return dataclasses.replace(self, shift=0, reach=FAR, windowed=0, limit=0)

  def numbers(self) -> list[int]:
    """Returns the fields in the order of `RULE_FIELDS`."""
    return [int(getattr(self, name)) for name in RULE_FIELDS]


def unserved_unions(pattern: AttentionPattern, segmented: bool) -> str | None:
  """Returns, in words, which union heads tiles cannot describe, or None.

  Args:
    pattern: The pattern.
    segmented: Whether there are segment ids.
  """
  for head in filter(lambda head: head.is_union, pattern.head_groups()):
    if head.dilation > 1:
      return "own_chunk or sinks with a dilation"
    if head.sinks and segmented:
      return "sinks of segments"
    if Rule.of(head, pattern.boundary).limit:
      return "sinks with a shift that falls back"
  return None


RULE_FIELDS = tuple(field.name for field in dataclasses.fields(Rule))


def _div(a: Any, b: Any) -> Any:
  """Returns `a // b` for `a >= 0`, without code for signs in kernels."""
  if isinstance(a, jax.Array):
    return lax.div(a, jnp.broadcast_to(jnp.asarray(b, a.dtype), a.shape))
  return a // b


def _library(*arrays: Any) -> Any:
  return jnp if any(isinstance(a, jax.Array) for a in arrays) else np


def _maximum(a: Any, b: Any) -> Any:
  return _library(a, b).maximum(a, b)


def _minimum(a: Any, b: Any) -> Any:
  return _library(a, b).minimum(a, b)


def key_bounds(rule: Rule, queries: Any, shift: Any) -> tuple[Any, Any]:
  """Returns the first and the last key that each query sees.

  It sees the keys of one residue between them. There are none if the last comes
  before the first. Causality is left out, except with a window: if the shift is
  not negative, the last key is at most the query.

  Args:
    rule: Rule of the head.
    queries: Positions.
    shift: 0 for queries that fall back, else the rule's.
  """
  chunk = rule.offset + rule.chunk_size * _div(
    queries - rule.offset, rule.chunk_size
  )
  first = _maximum(_maximum(chunk - shift, queries - shift - rule.reach), 0)
  last = _minimum(
    chunk + (rule.chunk_size - 1) - shift,
    queries - (shift * rule.windowed - rule.ahead),
  )
  return first, last


def query_bounds(rule: Rule, keys: Any, shift: Any) -> tuple[Any, Any]:
  """Returns the first and the last query that sees each key, as `key_bounds`.

  The last may lie beyond the end of the sequence.
  """
  chunk = rule.offset + rule.chunk_size * _div(
    keys + shift - rule.offset, rule.chunk_size
  )
  first = _maximum(keys + (shift * rule.windowed - rule.ahead), chunk)
  last = _minimum(chunk + (rule.chunk_size - 1), keys + shift + rule.reach)
  return first, last


def more_bounds(rule: Rule, rows: Any, inverse: bool) -> list[tuple[Any, Any]]:
  """Returns the intervals that each row sees by `own_chunk` and `sinks`.

  Args:
    rule: Rule of the head, of dilation 1.
    rows: Positions of queries or, if `inverse`, of keys.
    inverse: Whether rows are keys.

  Returns:
    The first and the last column of each interval.
  """
  library, own = _library(rows), rule.own_chunk
  if inverse:
    first, last = query_bounds(rule.of_own_chunk, rows, 0)
    last = last * own + (own - 1)
    # Both begin at the key.
    return [(rows, library.where(rows < rule.sinks, FAR, last))]
  first, last = key_bounds(rule.of_own_chunk, rows, 0)
  return [
    (first, last * own + (own - 1)),
    (_minimum(rows, 0), _minimum(rows, rule.sinks - 1)),
  ]


def hull(intervals: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
  """Returns the smallest interval that contains those that are not empty."""
  where = _library(*intervals[0]).where
  firsts = [where(first > last, FAR, first) for first, last in intervals]
  lasts = [where(first > last, -1, last) for first, last in intervals]
  return functools.reduce(_minimum, firsts), functools.reduce(_maximum, lasts)


def has_wide_gaps(
  rule: Rule, seq_len: int, columns: int, inverse: bool
) -> bool:
  """Says if no block has both sides of a gap in what a row sees.

  Args:
    rule: Rule of a union head.
    seq_len: Tokens.
    columns: Columns of a block.
    inverse: Whether rows are keys.
  """
  rows = np.arange(seq_len)
  bounds_of = query_bounds if inverse else key_bounds
  intervals = [
    bounds_of(rule, rows, rule.shift),
    *more_bounds(rule, rows, inverse),
  ]
  first, last = (
    np.array([np.broadcast_to(x[side], rows.shape) for x in intervals])
    for side in range(2)
  )
  # In order, with the empty ones behind the others.
  first = np.where(first > last, 3 * FAR, first)
  order = np.argsort(first, axis=0)
  first, last = (np.take_along_axis(x, order, axis=0) for x in (first, last))
  gap = first[1:] - np.maximum.accumulate(last, axis=0)[:-1]
  return bool(np.all((gap <= 1) | (gap >= columns)))


def to_slots(
  first: Any, last: Any, residue: Any, dilation: Any
) -> tuple[Any, Any]:
  """Returns an interval of positions as an interval of a residue's slots."""
  where = _library(first, last).where
  first = _div(first - residue + (dilation - 1), dilation)
  last = where(last < residue, -1, _div(_maximum(last - residue, 0), dilation))
  return first, last


def _run(
  first: Sequence[np.ndarray],
  last: Sequence[np.ndarray],
  columns: int,
  least: np.ndarray | int = 0,
) -> tuple[np.ndarray, ...]:
  """Returns where the blocks of each tile start and which need a mask.

  Bounds grow with the rows, so the first and the last row suffice.

  Args:
    first: First column that the first and the last row see.
    last: Last column that they see.
    columns: Columns of a block.
    least: Where the first block may start.

  Returns:
    The first column, the number of blocks, and how many of them need a mask at
    the start and at the end.
  """
  start = np.maximum(first[0] // ALIGN * ALIGN, least)
  count = np.maximum(0, -(-(last[1] + 1 - start) // columns))
  count = np.where(last[1] < first[0], 0, count)
  before = np.clip(-(-(first[1] - start) // columns), 0, count)
  after = count - np.clip((last[0] + 1 - start) // columns, before, count)
  return start, count, before, after


def _blocks_of(
  rule: Rule,
  seq_len: int,
  residue: int,
  positions: tuple[np.ndarray, np.ndarray],
  columns: int,
  inverse: bool,
  falls_back: bool,
) -> tuple[Any, ...]:
  """Returns the columns' residue and the `_run` of each tile, for one shift.

  Args:
    rule: Rule of the head.
    seq_len: Tokens.
    residue: Residue of the rows.
    positions: Positions of the first and the last row of each tile.
    columns: Columns of a block.
    inverse: Whether rows are keys.
    falls_back: Whether only queries before the rule's limit count, which have
      shift 0; otherwise only the others.
  """
  shift = 0 if falls_back else rule.shift
  none: Any
  if inverse:
    other = (residue + shift) % rule.dilation
    bounds = [query_bounds(rule, x, shift) for x in positions]
    least = 0 if falls_back else rule.limit
    end = min(seq_len, rule.limit) if falls_back else seq_len
    bounds = [
      (np.maximum(first, least), np.minimum(last, end - 1))
      for first, last in bounds
    ]
    none = rule.select not in (-1, other)
  else:
    other = (residue - shift) % rule.dilation
    first_row, last_row = positions
    if falls_back:
      last_row = np.minimum(last_row, rule.limit - 1)
    else:
      first_row = np.maximum(first_row, rule.limit)
    bounds = [key_bounds(rule, x, shift) for x in (first_row, last_row)]
    none = (first_row > last_row) | (rule.select not in (-1, residue))
  slots = [
    to_slots(first, np.where(none, -1, last), other, rule.dilation)
    for first, last in bounds
  ]
  return other, *_run([x[0] for x in slots], [x[1] for x in slots], columns)


# Consecutive blocks: the residue of their columns, the first column, the number
# of blocks.
_BlockRun = tuple[Any, Any, Any]


def _runs(
  runs: Sequence[_BlockRun], num_masked: Any, columns: int, flags: int = 0
) -> dict[str, Any]:
  """Returns the fields of tiles that say where their blocks start.

  Args:
    runs: The runs of blocks of each tile, three or, for residue 0, four.
    num_masked: How many blocks need a mask, from the first on.
    columns: Columns of a block.
    flags: Flags of the tiles.
  """
  fields: dict[str, Any] = {"num_masked": num_masked, "flags": flags}
  end = 0
  for i, (residue, start, count) in enumerate(runs):
    if i < 3:
      fields[f"residue_{i}"] = residue
    fields[f"start_{i}"] = start - end * columns
    end = end + count
    fields[f"end_{i}"] = end
  fields.pop("end_3", None)
  return fields | {"num_blocks": end}


def _masked_first(
  residue: Any,
  start: np.ndarray,
  count: np.ndarray,
  before: np.ndarray,
  after: np.ndarray,
  columns: int,
  flags: int = 0,
) -> dict[str, Any]:
  """Returns fields of tiles with the blocks to mask, at both ends, first."""
  between = count - before - after
  return _runs(
    (
      (residue, start, before),
      (residue, start + (count - after) * columns, after),
      (residue, start + before * columns, between),
    ),
    before + after,
    columns,
    flags,
  )


def _runs_of_parts(
  rule: Rule,
  seq_len: int,
  positions: tuple[np.ndarray, np.ndarray],
  columns: int,
  inverse: bool,
) -> list[tuple[Any, Any, Any, Any]]:
  """Returns the `_run` of each part of a union head, for each tile.

  Args:
    rule: Rule of the head, of dilation 1.
    seq_len: Tokens.
    positions: Positions of the first and the last row of each tile.
    columns: Columns of a block.
    inverse: Whether rows are keys.
  """
  bounds_of = query_bounds if inverse else key_bounds
  parts = [[bounds_of(rule, x, rule.shift) for x in positions]]
  if rule.own_chunk:
    parts.append([bounds_of(rule.of_own_chunk, x, 0) for x in positions])
  if rule.sinks:
    top, bottom = positions
    if inverse:
      # The queries from each key on; a tile's last rows may not be sinks.
      whole = bottom < rule.sinks
      sees = np.where(top < rule.sinks, FAR, -1)
      parts.append([(top, sees), (np.where(whole, bottom, FAR), sees)])
    else:
      parts.append([(0 * x, np.minimum(x, rule.sinks - 1)) for x in positions])
  # Sorted by the first column; of those that start together the longest is
  # first.
  first, last = (
    np.array([[row[side] for row in part] for part in parts], np.int64)
    for side in range(2)
  )
  last = np.minimum(last, seq_len - 1)
  order = np.argsort(first[:, 0] * (2 * FAR) - last[:, 1], axis=0)
  first, last = (
    np.take_along_axis(x, order[:, None], axis=0) for x in (first, last)
  )
  runs, least = [], 0
  for part_first, part_last in zip(first, last, strict=True):
    start, count, before, after = _run(part_first, part_last, columns, least)
    runs.append((start, count, before, after))
    least = np.where(count > 0, start + count * columns, least)
  return runs


def _join_parts(
  parts: Sequence[tuple[Any, Any, Any, Any]], columns: int
) -> list[dict[str, Any]]:
  """Returns fields of the tiles of a union head, for each part.

  If the blocks are at most four runs, the first part has them all.

  Args:
    parts: See `_runs_of_parts`.
    columns: Columns of a block.
  """
  fields = [_masked_first(0, *part, columns) for part in parts]
  masked, full = [], []
  for start, count, before, after in parts:
    masked += [(start, before), (start + (count - after) * columns, after)]
    full.append((start + before * columns, count - before - after))
  starts, counts = (np.array(x) for x in zip(*masked, *full, strict=True))
  order = np.argsort(counts == 0, axis=0, kind="stable")
  starts, counts = (
    np.take_along_axis(x, order, axis=0) for x in (starts, counts)
  )
  joins = (counts > 0).sum(axis=0) <= 4
  joined = _runs(
    [(0, *run) for run in zip(starts[:4], counts[:4], strict=True)],
    sum(part["num_masked"] for part in fields),
    columns,
  )
  first, *others = fields
  return [
    {
      name: np.where(joins, x, first.get(name, 0)) for name, x in joined.items()
    },
    *(
      part | {"num_blocks": np.where(joins, 0, part["num_blocks"])}
      for part in others
    ),
  ]


@functools.lru_cache(maxsize=1024)
def tiles_of_head(
  rule: Rule,
  seq_len: int,
  rows: int,
  columns: int,
  inverse: bool,
  in_order: bool,
) -> np.ndarray:
  """Returns the tiles of one head for its rows, with batch and head 0.

  A union head has tiles for each part, some without blocks; others have one.

  Args:
    rule: Rule of the head.
    seq_len: Tokens.
    rows: Rows of a tile, queries or, if `inverse`, keys.
    columns: Columns of a block.
    inverse: Whether the rows are keys.
    in_order: Whether blocks go from the first to the last, all of them masked,
      as `trim` needs them; otherwise blocks that need a mask go first.

  Returns:
    Int32 `[blocks of rows, parts, fields]`.
  """
  r = rule.dilation
  residues = []
  for residue in range(min(r, seq_len)):
    num_rows = -(-(seq_len - residue) // r)
    starts = np.arange(0, num_rows, rows, dtype=np.int64)
    first = starts * r + residue
    last = (np.minimum(starts + rows, num_rows) - 1) * r + residue
    if rule.is_union:
      runs = _runs_of_parts(rule, seq_len, (first, last), columns, inverse)
      if in_order:
        parts = [
          _masked_first(0, start, count, count, 0 * count, columns)
          for start, count, *_ in runs
        ]
      else:
        parts = _join_parts(runs, columns)
    else:
      other, start, count, before, after = _blocks_of(
        rule, seq_len, residue, (first, last), columns, inverse, False
      )
      if in_order:
        before, after = count, 0 * count
      parts = [_masked_first(other, start, count, before, after, columns)]
    if rule.limit:
      (fields,) = parts
      other_0, start_0, count_0, before_0, after_0 = _blocks_of(
        rule, seq_len, residue, (first, last), columns, inverse, True
      )
      if in_order:
        before_0, after_0 = count_0, 0 * count_0
      alone = _masked_first(
        other_0, start_0, count_0, before_0, after_0, columns, FALLS_BACK
      )
      # Rows that fall back and rows that do not: two runs, all masked.
      num_blocks = count_0 + count
      both = _runs(
        (
          (other_0, start_0, count_0),
          (other, start, count),
          (other, num_blocks * columns, 0),
        ),
        num_blocks,
        columns,
        MIXED,
      )
      if inverse:
        is_alone = (count_0 > 0) & (count == 0)
        is_both = (count_0 > 0) & (count > 0)
      else:
        is_alone = last < rule.limit
        is_both = (first < rule.limit) & ~is_alone
      parts = [
        {
          name: np.where(
            is_both, both[name], np.where(is_alone, alone[name], x)
          )
          for name, x in fields.items()
        }
      ]
    tiles = np.zeros((len(starts), len(parts), len(FIELDS)), np.int32)
    for part, fields in enumerate(parts):
      for name, x in (fields | {"residue": residue, "start": starts}).items():
        tiles[:, part, FIELD[name]] = x
    residues.append(tiles)
  tiles = np.concatenate(residues)
  tiles.setflags(write=False)
  return tiles


def make_groups(
  rules: Sequence[Rule],
  heads: Sequence[int],
  *,
  batch: int,
  group_size: int,
  seq_len: int,
  sizes: BlockSizes,
  inverse: bool,
  in_order: bool,
) -> tuple[list[np.ndarray], np.ndarray]:
  """Returns the tiles of a launch, in groups that belong together.

  A group has the consecutive tiles of one block of rows: for a query head or,
  in the inverse direction, for the query heads that read a block of keys.

  Args:
    rules: Rules of the heads.
    heads: Their indices.
    batch: Sequences.
    group_size: Query heads that share a key head.
    seq_len: Tokens.
    sizes: Tile sizes.
    inverse: Whether the rows are keys; the heads then have one dilation.
    in_order: See `tiles_of_head`.

  Returns:
    The groups, int32 `[tiles, fields]` each, and the cost of each, in blocks.
  """
  kv_heads = sorted({head // group_size for head in heads})
  of_head = []
  for place, (rule, head) in enumerate(zip(rules, heads, strict=True)):
    tiles = tiles_of_head(
      rule, seq_len, sizes.rows, sizes.columns, inverse, in_order
    ).copy()
    kv_head = head // group_size
    tiles[..., FIELD["head"]] = head
    tiles[..., FIELD["kv_head"]] = kv_head
    tiles[..., FIELD["place"]] = place
    tiles[..., FIELD["kv_place"]] = kv_heads.index(kv_head)
    of_head.append(tiles)
  if inverse:
    of_head = [
      np.concatenate(
        [
          tiles
          for tiles, head in zip(of_head, heads, strict=True)
          if head // group_size == kv_head
        ],
        axis=1,
      )
      for kv_head in kv_heads
    ]
  groups: list[np.ndarray] = []
  for index in range(batch):
    for tiles in of_head:
      mine = tiles.copy()
      mine[..., FIELD["batch"]] = index
      for group in mine:
        # A tile without blocks adds nothing.
        used = group[group[:, FIELD["num_blocks"]] > 0]
        used = used if len(used) else group[:1].copy()
        used[0, FIELD["flags"]] |= FIRST
        used[-1, FIELD["flags"]] |= LAST
        groups.append(used)
  costs = [
    group[:, FIELD["num_blocks"]].sum()
    + _MASK_COST * group[:, FIELD["num_masked"]].sum()
    + (_TILE_COST if group[0, FIELD["num_blocks"]] else _EMPTY_TILE_COST)
    for group in groups
  ]
  return groups, np.array(costs, np.float64)


def deal(
  groups: Sequence[np.ndarray],
  costs: np.ndarray,
  num_hands: int,
  num_sorted: int = _NUM_SORTED,
) -> tuple[np.ndarray, np.ndarray]:
  """Assigns tile groups to multiprocessors so that all finish together.

  Groups are assigned in order, which keeps shared keys in the cache, each to
  the multiprocessor that is free first; the last few per multiprocessor are
  assigned by falling cost. If some groups would end far too late, as those of
  keys that all queries see, all go in the order in which they must begin.

  Args:
    groups: See `make_groups`.
    costs: See `make_groups`.
    num_hands: Number of multiprocessors.
    num_sorted: How many groups per multiprocessor are sorted by cost.

  Returns:
    The table, int32 `[num_hands, most tiles, fields]`, and how many tiles each
    multiprocessor has, int32 `[num_hands, 2]`: tiles with blocks, which come
    first, and tiles without.
  """
  empty = np.array([g[0, FIELD["num_blocks"]] == 0 for g in groups], bool)
  order = np.flatnonzero(~empty)
  cost = costs[order]
  begin = (np.cumsum(cost) - cost) / num_hands
  latest = cost.sum() / num_hands - cost
  # Otherwise even a few groups out of order cost more than they gain: 8 % of
  # both passes (scca_fixed at 32,768, calls in flight, H100).
  if len(order) and (begin - latest).max() > 2 * np.median(cost):
    order = order[np.argsort(np.minimum(begin, latest), kind="stable")]
  split = max(0, len(order) - num_sorted * num_hands)
  end = order[split:]
  order[split:] = end[np.argsort(-costs[end], kind="stable")]
  free = [(0.0, hand) for hand in range(num_hands)]
  dealt: list[list[np.ndarray]] = [[] for _ in range(num_hands)]
  counts = np.zeros((num_hands, 2), np.int32)
  for index in (*order.tolist(), *np.flatnonzero(empty).tolist()):
    time, hand = heapq.heappop(free)
    dealt[hand].append(groups[index])
    counts[hand, int(empty[index])] += len(groups[index])
    heapq.heappush(free, (time + float(costs[index]), hand))
  most = max(int(counts.sum(axis=1).max()), 1)
  table = np.zeros((num_hands, most, len(FIELDS)), np.int32)
  for hand, tiles in enumerate(dealt):
    if tiles:
      table[hand, : counts[hand].sum()] = np.concatenate(tiles)
  return table, counts


def trim(
  table: np.ndarray,
  segment_ids: jax.Array,
  dilation: np.ndarray | int,
  sizes: BlockSizes,
) -> jax.Array:
  """Drops blocks whose segment ids cannot match any row of their tile.

  A tile keeps the blocks from the first to the last that may share an id with
  its rows, but at least one; a tile of two runs keeps all.

  Args:
    table: Tiles made `in_order`, int32 `[..., fields]`.
    segment_ids: Integers `[batch, seq]`.
    dilation: Dilation of the tiles' heads, a number or `[...]`.
    sizes: Tile sizes.
  """
  field = {name: jnp.asarray(table[..., i]) for name, i in FIELD.items()}
  lowest, highest = np.iinfo(np.int32).min, np.iinfo(np.int32).max
  ids = segment_ids.astype(jnp.int32)

  def extremes(length: int) -> tuple[jax.Array, jax.Array]:
    """Returns min and max id per `length` positions, `[batch, pieces]`."""
    x = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % length)))
    x = x.reshape(x.shape[0], -1, length)
    return (
      jnp.where(x == 0, highest, x).min(axis=2),
      jnp.where(x == 0, lowest, x).max(axis=2),
    )

  first_slot = jnp.zeros_like(field["start"])
  last_slot = first_slot
  for r in np.unique(dilation).tolist():
    row_least, row_most = (x[:, :, None] for x in extremes(sizes.rows * r))
    least, most = (x[:, None, :] for x in extremes(_GRANULE * r))
    # [batch, tiles of rows, granules]; padding matches nothing.
    meet = (least <= row_most) & (most >= row_least)
    first = jnp.argmax(meet, axis=2)
    last = meet.shape[2] - 1 - jnp.argmax(meet[:, :, ::-1], axis=2)
    first = jnp.where(meet.any(axis=2), first, 0)
    last = jnp.where(meet.any(axis=2), last, -1)
    place = field["batch"], field["start"] // sizes.rows
    mine = jnp.asarray(np.broadcast_to(dilation == r, table.shape[:-1]))
    first_slot = jnp.where(
      mine, first.astype(jnp.int32).at[place].get() * _GRANULE, first_slot
    )
    last_slot = jnp.where(
      mine,
      last.astype(jnp.int32).at[place].get() * _GRANULE + _GRANULE - 1,
      last_slot,
    )
  count = field["num_blocks"]
  begin = jnp.maximum(first_slot - field["start_0"], 0) // sizes.columns
  begin = jnp.clip(begin, 0, jnp.maximum(count - 1, 0))
  end = -(-(last_slot + 1 - field["start_0"]) // sizes.columns)
  kept = jnp.clip(end, begin + 1, count) - begin
  keep_all = (field["flags"] & MIXED) != 0
  kept = jnp.where(keep_all | (count == 0), count, kept)
  start = jnp.where(
    keep_all, field["start_0"], field["start_0"] + begin * sizes.columns
  )
  field["num_blocks"] = field["num_masked"] = kept
  field["start_0"] = start
  for name in ("end_0", "end_1", "end_2"):
    field[name] = jnp.where(keep_all, field[name], kept)
  return jnp.stack([field[name] for name in FIELDS], axis=-1)
