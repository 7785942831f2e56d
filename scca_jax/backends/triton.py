"""Block-sparse attention for NVIDIA GPUs from Ampere on (Pallas, Triton).

Forward and backward pass visit only blocks that contain a seen pair, and mask
only those that straddle a border (`blocks`). All heads are one launch a pass,
also those of different dilations: a program reads its tiles from a table, and
every row of `head_dim` numbers where it lies, so that nothing is copied, padded
or rolled. Triton takes gathered rows as well as neighbouring ones. Heads that
also see their own chunk or sinks are in the launch, their parts under one
softmax (`blocks.unserved_unions` names exceptions).

Memory beyond inputs, outputs and gradients: the log-sum-exp and `delta`, each
one float32 per query and head. If query heads of several dilations share a key
head, each dilation has a gradient of that head before they are summed.

jax deprecates the interface since 0.11, so it is used only in this module. The
parts: tile sizes, tables of tiles, code shared by the kernels, the kernels, the
call.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import ad_checkpoint, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from scca_jax import target
from scca_jax.backends import block_sizes, blocks, heads
from scca_jax.backends.block_sizes import BlockSizes
from scca_jax.backends.blocks import FIELD, FIELDS, RULE_FIELDS, Rule
from scca_jax.backends.contract import SAVED
from scca_jax.patterns import AttentionPattern

_LOG2E = math.log2(math.e)
# The initial maximum of a row, in powers of 2: below every score.
_LOWEST = -1e30
# A log-sum-exp, in powers of 2, that makes every weight 0.
_NO_WEIGHT = 1e30


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of the kernels: forward, of key gradients, of query gradients."""

  forward: BlockSizes
  keys: BlockSizes
  queries: BlockSizes


_SMALL = Sizes(
  forward=BlockSizes(128, 64, 3, 4),
  keys=BlockSizes(64, 64, 3, 4),
  queries=BlockSizes(64, 64, 3, 4),
)
_DEFAULTS = {
  16: _SMALL,
  32: _SMALL,
  64: _SMALL,
  128: Sizes(
    forward=BlockSizes(128, 64, 3, 8),
    keys=BlockSizes(64, 64, 2, 8),
    queries=BlockSizes(64, 64, 2, 4),
  ),
  256: Sizes(
    forward=BlockSizes(64, 32, 2, 8),
    keys=BlockSizes(32, 32, 2, 8),
    queries=BlockSizes(32, 32, 2, 8),
  ),
}
# So that tests have many blocks.
_INTERPRETED = Sizes(*[BlockSizes(16, 16, 1, 1)] * 3)


def default_sizes(head_dim: int, dtype: Any, kind: str = "") -> Sizes:
  """Returns the sizes tuned for a GPU, or safe ones if it is unknown."""
  sizes = _DEFAULTS[head_dim]
  if dtype == jnp.float16 and head_dim == 128:
    # Its query gradients take one more product, see `_Call.exact`.
    queries = dataclasses.replace(sizes.queries, warps=8)
    sizes = dataclasses.replace(sizes, queries=queries)
  tuned = block_sizes.tuned_sizes("triton", kind, dtype, head_dim)
  return dataclasses.replace(sizes, **tuned)


def candidates(head_dim: int, dtype: Any) -> dict[str, list[BlockSizes]]:
  """Returns the sizes worth trying for each kernel, for any dtype.

  Sizes that take too much of a multiprocessor's memory fail to compile.
  """
  del dtype
  sizes = [
    BlockSizes(rows, columns, stages, warps)
    for rows in ((64, 128) if head_dim <= 128 else (32, 64))
    for columns in (32, 64, 128)
    for stages in (2, 3)
    for warps in (4, 8)
  ]
  return {kernel: sizes for kernel in ("forward", "keys", "queries")}


@dataclasses.dataclass(frozen=True)
class _Call:
  """The static settings of a call.

  Attributes:
    batch: Sequences.
    seq_len: Tokens.
    num_heads: Query heads.
    num_kv_heads: Key heads.
    head_dim: Length of a head.
    dtype: Dtype of the inputs.
    scale: Factor of the scores.
    rules: Rules of the query heads.
    has_segments: Whether there are segment ids.
    sizes: Kernel tile sizes.
    interpret: Whether the kernels are interpreted.
  """

  batch: int
  seq_len: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  dtype: Any
  scale: float
  rules: tuple[Rule, ...]
  has_segments: bool
  sizes: Sizes
  interpret: bool

  @property
  def group_size(self) -> int:
    """Query heads that share a key head."""
    return self.num_heads // self.num_kv_heads

  @property
  def has_unions(self) -> bool:
    """Whether a head may see several intervals of keys."""
    return any(rule.is_union for rule in self.rules)

  @property
  def places(self) -> list[tuple[int, int]]:
    """Key head and dilation of each gradient of keys, in order."""
    return _find_places(self.rules, self.group_size)

  @property
  def exact(self) -> bool:
    """Whether to correct the error of `delta`.

    It comes from rounding the output. With float16 scores can be large;
    bfloat16 is as coarse as the error.
    """
    return self.dtype == jnp.float16

  def arrays(self, num_heads: int) -> jax.ShapeDtypeStruct:
    """Returns the type of an output `[batch * seq * heads, head_dim]`."""
    shape = self.batch * self.seq_len * num_heads, self.head_dim
    return jax.ShapeDtypeStruct(shape, self.dtype)

  @property
  def numbers(self) -> jax.ShapeDtypeStruct:
    """Returns the type of an output with one float32 per query and head."""
    length = self.batch * self.seq_len * self.num_heads
    return jax.ShapeDtypeStruct((length,), jnp.float32)


# Tables.


def _find_places(
  rules: Sequence[Rule], group_size: int
) -> list[tuple[int, int]]:
  """Returns key head and dilation of each gradient of keys, in order."""
  return sorted(
    {(head // group_size, rule.dilation) for head, rule in enumerate(rules)}
  )


@functools.lru_cache(maxsize=256)
def _make_table(
  rules: tuple[Rule, ...],
  group_size: int,
  seq_len: int,
  sizes: BlockSizes,
  inverse: bool,
  in_order: bool,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the tiles of each program for one sequence.

  Programs are sorted by falling cost: the device starts them in order, and so
  ends with the shortest.

  Args:
    rules: Rules of the query heads.
    group_size: Query heads that share a key head.
    seq_len: Tokens.
    sizes: Tile sizes.
    inverse: Whether rows are keys.
    in_order: See `blocks.tiles_of_head`.

  Returns:
    The table, int32 `[programs, most tiles, fields]`, and how many tiles each
    program has, int32 `[programs]`.
  """
  places = _find_places(rules, group_size)
  of_dilation: dict[int, list[int]] = {}
  for head, rule in enumerate(rules):
    # Forward, a program has rows of one head: heads need not have anything in
    # common.
    of_dilation.setdefault(rule.dilation if inverse else 0, []).append(head)
  groups: list[np.ndarray] = []
  costs = []
  for dilation, members in of_dilation.items():
    these, their_costs = blocks.make_groups(
      [rules[head] for head in members],
      members,
      batch=1,
      group_size=group_size,
      seq_len=seq_len,
      sizes=sizes,
      inverse=inverse,
      in_order=in_order,
    )
    if inverse:
      for group in these:
        place = int(group[0, FIELD["kv_head"]]), dilation
        group[:, FIELD["kv_place"]] = places.index(place)
    groups += these
    costs.append(their_costs)
  order = np.argsort(-np.concatenate(costs), kind="stable")
  counts = np.array([len(groups[i]) for i in order], np.int32)
  table = np.zeros((len(order), counts.max(), len(FIELDS)), np.int32)
  for row, index in zip(table, order, strict=True):
    row[: len(groups[index])] = groups[index]
  return table, counts


def _tables(
  call: _Call,
  sizes: BlockSizes,
  inverse: bool,
  segment_ids: jax.Array | None,
) -> tuple[tuple[int, int], list[jax.Array]]:
  """Returns the table's size and the first arguments of each kernel.

  Args:
    call: The call.
    sizes: Tile sizes.
    inverse: Whether rows are keys.
    segment_ids: Integers `[batch, seq]`, or None.

  Returns:
    The numbers of programs and of a program's tiles; the table, flat, of one
    sequence or, with segment ids, of all; the numbers of tiles; the rules,
    flat; the segment ids, int32, flat.
  """
  table, counts = _make_table(
    call.rules,
    call.group_size,
    call.seq_len,
    sizes,
    inverse,
    call.has_segments,
  )
  rules = np.array([rule.numbers() for rule in call.rules], np.int32)
  ids = jnp.zeros((1,), jnp.int32)
  trimmed = jnp.asarray(table)
  if segment_ids is not None:
    ids = segment_ids.astype(jnp.int32)
    dilation = rules[:, RULE_FIELDS.index("dilation")]
    dilation = dilation[table[..., FIELD["head"]]]
    trimmed = jax.vmap(
      lambda ids: blocks.trim(table, ids[None], dilation, sizes)
    )(ids)
  num_programs, most, _ = table.shape
  return (num_programs, most), [
    trimmed.reshape(-1),
    jnp.asarray(counts),
    jnp.asarray(rules.reshape(-1)),
    ids.reshape(-1),
  ]


# Shared by the kernels.


class _Tile:
  """A tile, its rows and what they see, read once.

  Attributes:
    rule: Rule of its head.
    positions: Positions of its rows, int32 `[rows]`; positions outside the
      sequence come last.
    has_row: Whether they are in the sequence, `[rows]`.
  """

  def __init__(
    self,
    call: _Call,
    sizes: BlockSizes,
    inverse: bool,
    tables: Any,
    program: Any,
    batch: Any,
    table_size: tuple[int, int],
    index: Any = 0,
  ):
    """Reads the tile.

    Args:
      call: The call.
      sizes: Tile sizes.
      inverse: Whether rows are keys.
      tables: See `_tables`.
      program: Index of the program.
      batch: Sequence.
      table_size: Numbers of programs and of a program's tiles.
      index: Number of the tile within the program.
    """
    table, _, rules, ids = tables
    num_programs, most = table_size
    place = program * most + index
    if call.has_segments:
      place += batch * (num_programs * most)
    self._call, self._sizes, self._ids = call, sizes, ids
    self._field = {
      name: table[place * len(FIELDS) + i]
      for i, name in enumerate(FIELDS)
      if name != "batch"
    }
    self.batch = batch
    # Fields that are the same for all heads are constants, so that the compiler
    # can drop code.
    shared = zip(*(rule.numbers() for rule in call.rules), strict=True)
    self.rule = Rule(
      **{
        name: values[0]
        if len(set(values)) == 1
        else rules[self.head * len(RULE_FIELDS) + i]
        for i, (name, values) in enumerate(
          zip(RULE_FIELDS, shared, strict=True)
        )
      }
    )
    self.positions = self._positions(self.residue, self.start, sizes.rows)
    self.has_row = self.positions < call.seq_len
    self._bounds = self._find_bounds(inverse)
    # Heads that are no unions get empty intervals: their dilation is no matter.
    self._more_bounds = (
      blocks.more_bounds(self.rule, self.positions, inverse)
      if call.has_unions
      else []
    )
    self._row_ids: Any = None
    if call.has_segments:
      row_ids = self._ids_of(self.positions)
      self._row_ids = jnp.where(row_ids == 0, -1, row_ids)

  def __getattr__(self, name: str) -> Any:
    try:
      return self.__dict__["_field"][name]
    except KeyError:
      raise AttributeError(name) from None

  def _positions(self, residue: Any, first_slot: Any, length: int) -> Any:
    """Returns the positions of neighbouring slots."""
    r = self.rule.dilation
    return (residue + r * first_slot) + r * lax.iota(jnp.int32, length)

  def _ids_of(self, positions: Any) -> Any:
    seq_len = self._call.seq_len
    return plgpu.load(
      self._ids.at[self.batch * seq_len + positions],
      mask=positions < seq_len,
      other=0,
    )

  def _find_bounds(self, inverse: bool) -> list[tuple[Any, Any]]:
    """Returns the first and the last slot that each row sees.

    The second pair, if any, is for blocks of queries that fall back.
    """
    rule, rows = self.rule, self.positions
    bounds = blocks.query_bounds if inverse else blocks.key_bounds
    pairs = [(bounds(rule, rows, rule.shift), self.residue_2)]
    if any(x.limit for x in self._call.rules):
      (first, last), residue = pairs[0]
      first_0, last_0 = bounds(rule, rows, 0)
      if inverse:
        first = jnp.maximum(first, rule.limit)
        last_0 = jnp.minimum(last_0, rule.limit - 1)
      else:
        falls_back = rows < rule.limit
        last = jnp.where(falls_back, -1, last)
        last_0 = jnp.where(falls_back, last_0, -1)
      pairs = [((first, last), residue), ((first_0, last_0), self.residue_0)]
    if isinstance(rule.dilation, int) and rule.dilation == 1:
      return [pair for pair, _ in pairs]
    return [
      blocks.to_slots(first, last, residue, rule.dilation)
      for (first, last), residue in pairs
    ]

  def block(self, i: Any, masked: bool) -> tuple[Any, Any, Any]:
    """Returns the columns of block `i`.

    Args:
      i: Its index.
      masked: Whether it may need a mask.

    Returns:
      The positions, `[columns]`, with those outside the sequence last; whether
      they are in the sequence, `[columns]`, and the seen pairs,
      `[rows, columns]`, both None if all are.
    """
    length = self._sizes.columns
    if not masked and not self._call.has_unions:
      first_slot = self.start_2 + i * length
      return self._positions(self.residue_2, first_slot, length), None, None
    first_run, second_run = i < self.end_0, i < self.end_1

    def pick(a: Any, b: Any, c: Any) -> Any:
      return jnp.where(first_run, a, jnp.where(second_run, b, c))

    residue = pick(self.residue_0, self.residue_1, self.residue_2)
    start = self.start_2
    if self._call.has_unions:
      start = jnp.where(i < self.end_2, start, self.start_3)
    first_slot = pick(self.start_0, self.start_1, start) + i * length
    columns = self._positions(residue, first_slot, length)
    if not masked:
      return columns, None, None
    has_column = columns < self._call.seq_len
    first, last = self._bounds[0]
    if len(self._bounds) > 1:
      falls_back = ((self.flags & blocks.FALLS_BACK) != 0) | (
        ((self.flags & blocks.MIXED) != 0) & first_run
      )
      first, last = (
        jnp.where(falls_back, b, a) for a, b in zip(*self._bounds, strict=True)
      )
    slots = lax.iota(jnp.int32, length)[None, :]

    def between(first: Any, last: Any) -> jax.Array:
      return (slots >= (first - first_slot)[:, None]) & (
        slots <= (last - first_slot)[:, None]
      )

    seen = between(first, last)
    for bounds in self._more_bounds:
      seen |= between(*bounds)
    if self._row_ids is not None:
      seen &= self._row_ids[:, None] == self._ids_of(columns)[None, :]
    return columns, has_column, seen

  def visit(self, body: Callable[..., Any], carry: Any) -> Any:
    """Returns the carry after applying `body` to block after block.

    Args:
      body: Takes a block's columns, see `block`, and the carry.
      carry: The initial carry.
    """

    def step(masked: bool) -> Callable[..., Any]:
      return lambda i, carry: body(*self.block(i, masked), carry)

    if self._call.has_segments:
      return lax.fori_loop(jnp.int32(0), self.num_blocks, step(True), carry)
    carry = lax.fori_loop(jnp.int32(0), self.num_masked, step(True), carry)
    return lax.fori_loop(self.num_masked, self.num_blocks, step(False), carry)

  def _place(
    self, positions: Any, head: Any, num_heads: int
  ) -> tuple[Any, Any]:
    first = self.batch * self._call.seq_len
    index = (first + positions) * num_heads + head
    dims = lax.iota(jnp.int32, self._call.head_dim)
    return index[:, None], dims[None, :]

  def load(
    self, ref: Any, positions: Any, inside: Any, head: Any, num_heads: int
  ) -> jax.Array:
    """Returns `[positions, head_dim]`, 0 beyond the end of the sequence.

    Args:
      ref: Array `[batch * seq * heads, head_dim]`.
      positions: Positions.
      inside: Whether they are in the sequence, or None if all are.
      head: The head of the array.
      num_heads: Heads of the array.
    """
    ref = ref.at[self._place(positions, head, num_heads)]
    if inside is None:
      return plgpu.load(ref)
    return plgpu.load(ref, mask=inside[:, None], other=0.0)

  def store(self, ref: Any, rows: Any, head: Any, num_heads: int) -> None:
    """Writes `[rows, head_dim]`, see `load`."""
    place = self._place(self.positions, head, num_heads)
    plgpu.store(ref.at[place], rows, mask=self.has_row[:, None])

  def numbers_at(self, positions: Any) -> Any:
    """Returns the head's places in a flat `[batch, heads, seq]`."""
    num_heads, seq_len = self._call.num_heads, self._call.seq_len
    return (self.batch * num_heads + self.head) * seq_len + positions

  def load_numbers(
    self, ref: Any, positions: Any, inside: Any, other: float
  ) -> jax.Array:
    """Returns `[positions]`, with `other` beyond the end of the sequence."""
    ref = ref.at[self.numbers_at(positions)]
    if inside is None:
      return plgpu.load(ref)
    return plgpu.load(ref, mask=inside, other=other)


def _dot(a: jax.Array, b: jax.Array, b_dim: int) -> jax.Array:
  """Returns the float32 product over `a`'s last and `b`'s dimension `b_dim`."""
  # Float32 is only used when interpreted, and then exact.
  exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(
    a,
    b,
    (((1,), (b_dim,)), ((), ())),
    precision=exact,
    preferred_element_type=jnp.float32,
  )


def _scores(call: _Call, a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the products of rows that `_factor` turns into powers of 2."""
  scores = _dot(a, b, 1)
  return scores if call.scale > 0 else scores * (call.scale * _LOG2E)


def _factor(call: _Call) -> float:
  """Returns a positive factor, so that the largest score stays largest."""
  return call.scale * _LOG2E if call.scale > 0 else 1.0


def _weights(call: _Call, scores: jax.Array, maximum: jax.Array) -> jax.Array:
  """Returns `2 ** (scores * _factor(call) - maximum)`.

  Args:
    call: The call.
    scores: See `_scores`.
    maximum: Numbers that broadcast against them.
  """
  factor = _factor(call)
  if call.interpret:
    return jnp.exp2(scores * factor - maximum)
  # Two instructions. The compiler would need six: it does not fuse a product
  # with a sum, and handles results too small for a normal number.
  bits = np.float32(factor).view(np.uint32)
  (weights,) = plgpu.elementwise_inline_asm(
    "{ .reg .f32 x;"
    f" fma.rn.ftz.f32 x, $1, 0f{bits:08X}, $2;"
    " ex2.approx.ftz.f32 $0, x; }",
    args=[scores, jnp.broadcast_to(-maximum, scores.shape)],
    constraints="=f,f,f",
    pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(scores.shape, jnp.float32)],
  )
  return weights


# Kernels.


def _reader(
  call: _Call,
  sizes: BlockSizes,
  inverse: bool,
  tables: Any,
  table_size: tuple[int, int],
) -> Callable[..., _Tile]:
  """Returns what reads a tile of the program, the first by default."""
  return functools.partial(
    _Tile,
    call,
    sizes,
    inverse,
    tables,
    pl.program_id(0),
    pl.program_id(1),
    table_size,
  )


def _over_tiles(
  tables: Any,
  table_size: tuple[int, int],
  read: Callable[..., _Tile],
  first: _Tile,
  add: Callable[[_Tile, Any], Any],
  carry: Any,
) -> Any:
  """Returns what `add` makes of the carry, tile after tile of a program.

  Args:
    tables: See `_tables`.
    table_size: Numbers of programs and of a program's tiles.
    read: See `_reader`.
    first: The first tile; all have its rows.
    add: Takes a tile and the carry.
    carry: The first carry.
  """
  if table_size[1] == 1:
    return add(first, carry)
  return lax.fori_loop(
    jnp.int32(0),
    tables[1][pl.program_id(0)],
    lambda i, carry: add(read(i), carry),
    carry,
  )


def _forward_kernel(
  call: _Call, table_size: tuple[int, int], *refs: Any
) -> None:
  """Computes rows of the output and of the log-sum-exp."""
  *tables, q_ref, k_ref, v_ref, out_ref, lse_ref = refs
  sizes, factor = call.sizes.forward, _factor(call)
  read = _reader(call, sizes, False, tables, table_size)
  tile = read()
  query = tile.load(
    q_ref, tile.positions, tile.has_row, tile.head, call.num_heads
  )

  def body(columns: Any, inside: Any, seen: Any, carry: Any) -> Any:
    accumulator, maximum, total = carry
    key, value = (
      tile.load(ref, columns, inside, tile.kv_head, call.num_kv_heads)
      for ref in (k_ref, v_ref)
    )
    scores = _scores(call, query, key)
    if seen is not None:
      scores = jnp.where(seen, scores, -jnp.inf)
    new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=1) * factor)
    weights = _weights(call, scores, new_maximum[:, None])
    kept = jnp.exp2(maximum - new_maximum)
    total = total * kept + jnp.sum(weights, axis=1)
    accumulator = accumulator * kept[:, None]
    accumulator += _dot(weights.astype(value.dtype), value, 0)
    return accumulator, new_maximum, total

  accumulator, maximum, total = _over_tiles(
    tables,
    table_size,
    read,
    tile,
    lambda tile, carry: tile.visit(body, carry),
    (
      jnp.zeros((sizes.rows, call.head_dim), jnp.float32),
      jnp.full((sizes.rows,), _LOWEST, jnp.float32),
      jnp.zeros((sizes.rows,), jnp.float32),
    ),
  )
  total, lse = heads.finish_softmax(maximum / _LOG2E, total)
  output = (accumulator / total[:, None]).astype(call.dtype)
  tile.store(out_ref, output, tile.head, call.num_heads)
  index = tile.batch * call.seq_len + tile.positions
  index = index * call.num_heads + tile.head
  plgpu.store(lse_ref.at[index], lse, mask=tile.has_row)


def _queries_kernel(
  call: _Call, table_size: tuple[int, int], *refs: Any
) -> None:
  """Computes rows of the queries' gradient and, if `exact`, of `delta`."""
  tables, (q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref) = (
    refs[:4],
    refs[4:10],
  )
  read = _reader(call, call.sizes.queries, False, tables, table_size)
  tile = read()
  rows = tile.positions, tile.has_row
  query, d_output = (
    tile.load(ref, *rows, tile.head, call.num_heads) for ref in (q_ref, do_ref)
  )
  lse = tile.load_numbers(lse_ref, *rows, _NO_WEIGHT)
  delta = tile.load_numbers(delta_ref, *rows, 0.0)

  def body(columns: Any, inside: Any, seen: Any, carry: Any) -> Any:
    key, value = (
      tile.load(ref, columns, inside, tile.kv_head, call.num_kv_heads)
      for ref in (k_ref, v_ref)
    )
    scores = _scores(call, query, key)
    weights = _weights(call, scores, lse[:, None])
    if seen is not None:
      weights = jnp.where(seen, weights, 0.0)
    d_scores = weights * (_dot(d_output, value, 1) - delta[:, None])
    d_query = carry[0] + _dot(d_scores.astype(key.dtype), key, 0)
    if not call.exact:
      return (d_query,)
    mean_key = carry[1] + _dot(weights.astype(key.dtype), key, 0)
    return d_query, mean_key, carry[2] + jnp.sum(d_scores, axis=1)

  zeros = jnp.zeros((call.sizes.queries.rows, call.head_dim), jnp.float32)
  carry: Any = (zeros,)
  if call.exact:
    d_lse_ref, d_query_ref, mended_ref = refs[10:]
    # The gradients of a row's scores sum to the gradient of its log-sum-exp.
    carry = zeros, zeros, -tile.load_numbers(d_lse_ref, *rows, 0.0)
  else:
    (d_query_ref,) = refs[10:]
  d_query, *rest = _over_tiles(
    tables,
    table_size,
    read,
    tile,
    lambda tile, carry: tile.visit(body, carry),
    carry,
  )
  if call.exact:
    mean_key, error = rest
    # Without keys there is nothing to correct.
    error = jnp.where(lse == _NO_WEIGHT, 0.0, error)
    d_query -= error[:, None] * mean_key
    index = tile.numbers_at(tile.positions)
    plgpu.store(mended_ref.at[index], delta + error, mask=tile.has_row)
  d_query = (d_query * call.scale).astype(call.dtype)
  tile.store(d_query_ref, d_query, tile.head, call.num_heads)


def _keys_kernel(call: _Call, table_size: tuple[int, int], *refs: Any) -> None:
  """Computes rows of the keys' and the values' gradients."""
  *tables, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dk_ref, dv_ref = (
    refs
  )
  read = _reader(call, call.sizes.keys, True, tables, table_size)
  first = read()
  key, value = (
    first.load(
      ref, first.positions, first.has_row, first.kv_head, call.num_kv_heads
    )
    for ref in (k_ref, v_ref)
  )

  def add(tile: _Tile, carry: Any) -> Any:
    def body(columns: Any, inside: Any, seen: Any, carry: Any) -> Any:
      d_key, d_value = carry
      query, d_output = (
        tile.load(ref, columns, inside, tile.head, call.num_heads)
        for ref in (q_ref, do_ref)
      )
      lse = tile.load_numbers(lse_ref, columns, inside, _NO_WEIGHT)
      delta = tile.load_numbers(delta_ref, columns, inside, 0.0)
      scores = _scores(call, key, query)
      weights = _weights(call, scores, lse[None, :])
      if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
      d_value += _dot(weights.astype(d_output.dtype), d_output, 0)
      d_scores = weights * (_dot(value, d_output, 1) - delta[None, :])
      d_key += _dot(d_scores.astype(query.dtype), query, 0)
      return d_key, d_value

    return tile.visit(body, carry)

  zeros = jnp.zeros((call.sizes.keys.rows, call.head_dim), jnp.float32)
  d_key, d_value = _over_tiles(
    tables, table_size, read, first, add, (zeros, zeros)
  )
  num_places = len(call.places)
  for ref, rows in ((dk_ref, d_key * call.scale), (dv_ref, d_value)):
    first.store(ref, rows.astype(call.dtype), first.kv_place, num_places)


def _launch(
  call: _Call,
  kernel: Callable[..., None],
  sizes: BlockSizes,
  tables: tuple[tuple[int, int], list[jax.Array]],
  out_types: Sequence[jax.ShapeDtypeStruct],
  *operands: jax.Array,
) -> list[jax.Array]:
  """Runs a kernel.

  Args:
    call: The call.
    kernel: Gets `call`, the table's size, operands and outputs.
    sizes: Tile sizes.
    tables: See `_tables`.
    out_types: Shapes and dtypes of its outputs.
    *operands: Its inputs after the tables; arrays `[..., head_dim]` are viewed
      as matrices, others as vectors.
  """
  # Known, see above. jax warns when it compiles the traced kernel.
  warnings.filterwarnings(
    "ignore", "The Pallas Triton backend is deprecated", DeprecationWarning
  )
  table_size, leading = tables
  return pl.pallas_call(
    functools.partial(kernel, call, table_size),
    grid=(table_size[0], call.batch),
    out_shape=list(out_types),
    compiler_params=plgpu.CompilerParams(
      num_warps=sizes.warps, num_stages=sizes.stages
    ),
    interpret=call.interpret,
    name=f"scca{kernel.__name__}",
  )(
    *leading,
    *(x.reshape((-1, call.head_dim) if x.ndim == 4 else -1) for x in operands),
  )


# The call.


def _forward(
  call: _Call,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  sizes = call.sizes.forward
  output, lse = _launch(
    call,
    _forward_kernel,
    sizes,
    _tables(call, sizes, False, segment_ids),
    [call.arrays(call.num_heads), call.numbers],
    query,
    key,
    value,
  )
  return output.reshape(query.shape), lse.reshape(query.shape[:3])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
  call: _Call,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Returns the output and the log-sum-exp, float32 `[batch, seq, heads]`."""
  return _forward(call, query, key, value, segment_ids)


def _attend_and_save(
  call: _Call,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
) -> tuple[Any, Any]:
  output, lse = ad_checkpoint.checkpoint_name(
    _forward(call, query, key, value, segment_ids), SAVED
  )
  return (output, lse), (query, key, value, segment_ids, output, lse)


def _sum_places(call: _Call, x: jax.Array) -> jax.Array:
  """Returns `[batch, seq, kv_heads, head_dim]` of the kernel's gradients."""
  x = x.reshape(call.batch, call.seq_len, -1, call.head_dim)
  if x.shape[2] == call.num_kv_heads:
    return x
  of_head: list[list[jax.Array]] = [[] for _ in range(call.num_kv_heads)]
  for place, (head, _) in enumerate(call.places):
    of_head[head].append(x[:, :, place].astype(jnp.float32))
  return jnp.stack(
    [functools.reduce(jnp.add, parts) for parts in of_head], axis=2
  ).astype(call.dtype)


def _attend_backward(
  call: _Call, saved: Any, cotangents: Any
) -> tuple[Any, ...]:
  """Returns the gradients of query, key and value.

  With `p` the weights and `dp` their gradients, those of the scores are
  `p (dp - delta)`, where `delta = sum(output d_output) - d_lse`.
  """
  query, key, value, segment_ids, output, lse = saved
  d_output, d_lse = cotangents
  # The gradient as it is stored, and as the kernels read it: XLA may compute
  # with more digits, which would not cancel.
  d_output = lax.optimization_barrier(d_output.astype(call.dtype))
  delta = jnp.sum(
    output.astype(jnp.float32) * d_output.astype(jnp.float32), axis=-1
  )
  empty = lse == -jnp.inf
  d_lse = jnp.where(empty, 0.0, d_lse)
  delta = jnp.where(empty, 0.0, delta - d_lse)
  lse = jnp.where(empty, _NO_WEIGHT, lse * _LOG2E)
  # A head's numbers become neighbours, because the kernels read them in a loop.
  d_lse, delta, lse = (jnp.swapaxes(x, 1, 2) for x in (d_lse, delta, lse))
  inputs = query, key, value, d_output, lse

  sizes = call.sizes.queries
  arrays = call.arrays(call.num_heads)
  d_query, *mended = _launch(
    call,
    _queries_kernel,
    sizes,
    _tables(call, sizes, False, segment_ids),
    [arrays, call.numbers] if call.exact else [arrays],
    *inputs,
    delta,
    *([d_lse] if call.exact else []),
  )
  if mended:
    (delta,) = mended
  sizes = call.sizes.keys
  d_key, d_value = _launch(
    call,
    _keys_kernel,
    sizes,
    _tables(call, sizes, True, segment_ids),
    [call.arrays(len(call.places))] * 2,
    *inputs,
    delta,
  )
  return (
    d_query.reshape(query.shape),
    _sum_places(call, d_key),
    _sum_places(call, d_value),
    None,
  )


_attend.defvjp(_attend_and_save, _attend_backward)


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  pattern: AttentionPattern,
  *,
  segment_ids: jax.Array | None,
  query_offset: int | jax.Array,
  scale: float,
  sizes: Sizes | None = None,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Returns the output and the log-sum-exp; see `scca_jax.attention`.

  Args:
    query: `[batch, seq, heads, head_dim]`, bfloat16 or float16; `head_dim` is
      a power of two from 16 to 256.
    key: `[batch, seq, kv_heads, head_dim]`.
    value: Like `key`.
    pattern: Which keys each query head sees, with causality "position".
    segment_ids: Integers `[batch, seq]`, or None.
    query_offset: 0, or as in `contract.starts_late`.
    scale: Factor of the scores.
    sizes: Kernel tile sizes; None uses `default_sizes`.
    interpret: Whether to interpret the kernels, on any device; float32 and any
      `head_dim` are then served too.
  """
  batch, seq_len, num_heads, head_dim = query.shape
  if sizes is None:
    sizes = (
      _INTERPRETED
      if interpret
      else default_sizes(head_dim, query.dtype, target.current().kind)
    )
  call = _Call(
    batch=batch,
    seq_len=seq_len,
    num_heads=num_heads,
    num_kv_heads=key.shape[2],
    head_dim=head_dim,
    dtype=query.dtype,
    scale=float(scale),
    rules=tuple(
      Rule.of(head, pattern.boundary, int(query_offset))
      for head in pattern.heads
    ),
    has_segments=segment_ids is not None,
    sizes=sizes,
    interpret=interpret,
  )
  return _attend(call, query, key, value, segment_ids)
