"""Launches, tiles and masks, shared by the Mosaic kernels for Hopper GPUs.

This module, `mosaic_forward` and `mosaic_backward` are written in Pallas Mosaic
GPU, whose interface is not stable; nothing else imports it.
"""

# Pallas's types include neither scalars as indices nor its own exports.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from scca_jax.backends import blocks
from scca_jax.backends.block_sizes import BlockSizes
from scca_jax.backends.blocks import ALIGN, FIELD, RULE_FIELDS, Rule

LOG2E = math.log2(math.e)
# A log-sum-exp, in powers of 2, that makes every weight 0.
NO_WEIGHT = 1e30
# Rows of log-sum-exps have the length of whole tiles, which is at most this.
_ROW_MULTIPLE = 256
# Registers per thread, for the warpgroup that loads and those that compute.
LOADING_REGISTERS, COMPUTING_REGISTERS = 40, 232


@dataclasses.dataclass(frozen=True)
class Launch:
  """The static settings of a launch of the heads of one dilation.

  Arrays are viewed as `[batch, slots, residues * heads, head_dim]`, so that
  the slots of one residue are neighbours.

  Attributes:
    batch: Sequences.
    num_heads: Query heads of the arrays.
    num_kv_heads: Key heads of the arrays.
    head_dim: Length of a head.
    seq_len: Tokens.
    padded_len: Tokens in the arrays, a multiple of `8 * dilation`.
    dilation: Dilation of all heads of the launch.
    dtype: Dtype of the inputs.
    scale: Factor of the scores.
    heads: Query heads of the launch.
    rules: Rules of these heads.
    num_multiprocessors: Multiprocessors of the device.
    has_segments: Whether there are segment ids.
  """

  batch: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  seq_len: int
  padded_len: int
  dilation: int
  dtype: Any
  scale: float
  heads: tuple[int, ...]
  rules: tuple[Rule, ...]
  num_multiprocessors: int
  has_segments: bool

  @property
  def group_size(self) -> int:
    """Query heads that share a key head."""
    return self.num_heads // self.num_kv_heads

  @property
  def kv_heads(self) -> tuple[int, ...]:
    """Key heads of the launch."""
    return tuple(sorted({head // self.group_size for head in self.heads}))

  @property
  def has_unions(self) -> bool:
    """Whether a head may have several tiles for a block of rows."""
    return any(rule.is_union for rule in self.rules)

  @property
  def row_slots(self) -> int:
    """Slots in a row of log-sum-exps."""
    num_slots = -(-self.seq_len // self.dilation)
    return -(-num_slots // _ROW_MULTIPLE) * _ROW_MULTIPLE

  def tables(
    self,
    sizes: BlockSizes,
    inverse: bool,
    segment_ids: jax.Array | None,
    **dealing: int,
  ) -> list[jax.Array]:
    """Returns the tiles of each multiprocessor, their numbers, and the rules.

    Args:
      sizes: Tile sizes.
      inverse: Whether rows are keys.
      segment_ids: Integers `[batch, seq]`, or None.
      **dealing: See `blocks.deal`.
    """
    table, counts = _deal(self, sizes, inverse, **dealing)
    rules = np.zeros((self.num_heads, len(RULE_FIELDS)), np.int32)
    for head, rule in zip(self.heads, self.rules, strict=True):
      rules[head] = rule.numbers()
    trimmed = jnp.asarray(table)
    if segment_ids is not None:
      trimmed = blocks.trim(table, segment_ids, self.dilation, sizes)
    return [trimmed, jnp.asarray(counts), jnp.asarray(rules)]

  def output_type(self, num_heads: int) -> jax.ShapeDtypeStruct:
    """Returns the type of an output with this many heads."""
    return jax.ShapeDtypeStruct(
      (
        self.batch,
        self.padded_len // self.dilation,
        self.dilation * num_heads,
        self.head_dim,
      ),
      self.dtype,
    )

  def by_residue(self, x: jax.Array) -> jax.Array:
    """Returns the view of `[batch, seq, heads, head_dim]`.

    It is a copy only if the sequence must be padded.
    """
    missing = self.padded_len - x.shape[1]
    if missing:
      x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))
    return x.reshape(x.shape[0], -1, self.dilation * x.shape[2], self.head_dim)

  def by_token(self, x: jax.Array) -> jax.Array:
    """Undoes `by_residue`, except for the padding."""
    return x.reshape(
      x.shape[0], self.padded_len, x.shape[2] // self.dilation, x.shape[3]
    )

  @property
  def rows_shape(self) -> tuple[int, int, int]:
    """Shape of the log-sum-exps of its heads in the kernels."""
    return self.batch, self.dilation * len(self.heads), self.row_slots

  def rows_by_residue(self, x: jax.Array) -> jax.Array:
    """Returns `rows_shape` from `[batch, seq, num_heads]`, 0 at the end."""
    if len(self.heads) < self.num_heads:
      x = x[:, :, np.array(self.heads)]
    padding = self.row_slots * self.dilation - self.seq_len
    x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
    return jnp.swapaxes(x.reshape(self.batch, self.row_slots, -1), 1, 2)

  def rows_by_token(self, x: jax.Array) -> jax.Array:
    """Returns `[batch, seq, heads of the launch]` from `rows_shape`."""
    x = jnp.swapaxes(x, 1, 2).reshape(self.batch, -1, len(self.heads))
    return x[:, : self.seq_len]

  def has_row(self) -> np.ndarray:
    """Marks the rows that are in the sequence, `[residues * heads, slots]`."""
    slots = np.arange(self.row_slots)
    residues = np.arange(self.dilation).repeat(len(self.heads))
    return slots * self.dilation + residues[:, None] < self.seq_len

  def ids_by_residue(self, segment_ids: jax.Array | None) -> jax.Array:
    """Returns segment ids in the layout that `seen_pairs` reads.

    They are int32 `[batch, residues, slots]`, with zeros at the end for blocks
    that start inside the sequence.
    """
    if segment_ids is None:
      return jnp.zeros((1, 1, 1), jnp.int32)
    slots = self.row_slots + _ROW_MULTIPLE
    padding = slots * self.dilation - self.seq_len
    x = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, padding)))
    return jnp.swapaxes(x.reshape(x.shape[0], slots, self.dilation), 1, 2)


@functools.lru_cache(maxsize=256)
def _deal(
  launch: Launch, sizes: BlockSizes, inverse: bool, **dealing: int
) -> tuple[np.ndarray, np.ndarray]:
  groups, costs = blocks.make_groups(
    launch.rules,
    launch.heads,
    batch=launch.batch,
    group_size=launch.group_size,
    seq_len=launch.seq_len,
    sizes=sizes,
    inverse=inverse,
    in_order=launch.has_segments,
  )
  return blocks.deal(groups, costs, launch.num_multiprocessors, **dealing)


@functools.lru_cache(maxsize=256)
def _one_interval(launch: Launch, columns: int, inverse: bool) -> bool:
  """Says if what each row sees of any block is one interval.

  Args:
    launch: The launch, with union heads.
    columns: Columns of a block.
    inverse: Whether rows are keys.
  """
  return all(
    blocks.has_wide_gaps(rule, launch.seq_len, columns, inverse)
    for rule in set(launch.rules)
    if rule.is_union
  )


class Tile:
  """The fields of a tile, read from the table on the device when needed."""

  def __init__(self, table: Any, multiprocessor: Any, index: Any):
    self._place = table, multiprocessor, index

  def __getattr__(self, name: str) -> Any:
    table, multiprocessor, index = self._place
    return table[multiprocessor, index, FIELD[name]]

  def block(self, i: Any) -> tuple[Any, Any]:
    """Returns the residue of block `i`, and where block 0 of its run starts."""
    first, second = i < self.end_0, i < self.end_1

    def pick(a: Any, b: Any, c: Any) -> Any:
      return jnp.where(first, a, jnp.where(second, b, c))

    last = jnp.where(i < self.end_2, self.start_2, self.start_3)
    return (
      pick(self.residue_0, self.residue_1, self.residue_2),
      pick(self.start_0, self.start_1, last),
    )

  def columns(self, i: Any, length: int) -> tuple[Any, Any]:
    """Returns the residue of block `i` and its slots, for a copy."""
    residue, start = self.block(i)
    return residue, pl.ds(pl.multiple_of(start + i * length, ALIGN), length)

  def rows(self, first: Any, length: int) -> Any:
    """Returns the slots of some rows of the tile, for a copy."""
    return pl.ds(pl.multiple_of(self.start + first, 64), length)


def rem(a: Any, b: int) -> Any:
  """Returns `a % b` for `a >= 0`."""
  return lax.rem(a, jnp.asarray(b, a.dtype))


def rows_layout() -> Any:
  """Returns the layout of one number per row of a product."""
  return plgpu.Layout.WGMMA.reduce(1)


def columns_layout() -> Any:
  """Returns the layout of one number per column of a product."""
  return plgpu.Layout.WGMMA.reduce(0)


def load(ref: Any, layout: Any, optimized: bool = True) -> jax.Array:
  """Returns the value of a reference, in registers."""
  # Before jax 0.11 the index was an argument, now deprecated.
  index = ((),) if jax.__version_info__ < (0, 11) else ()
  return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
  """Returns a float32 array of one value in registers."""
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def over_columns(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns one number per row, repeated over the columns."""
  return lax.broadcast_in_dim(x, shape, [0])


def over_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns one number per column, repeated over the rows."""
  return lax.broadcast_in_dim(x, shape, [1])


def seen_pairs(
  launch: Launch,
  rules: Any,
  ids: Any,
  tile: Tile,
  first_row: Any,
  i: Any,
  shape: tuple[int, int],
  inverse: bool,
) -> jax.Array:
  """Marks the seen pairs of rows and columns of block `i`.

  Args:
    launch: The launch.
    rules: The table of rules.
    ids: See `Launch.ids_by_residue`.
    tile: The tile.
    first_row: Slot of the first row.
    i: Block of the tile.
    shape: Rows and columns.
    inverse: Whether rows are keys.
  """
  head, r = tile.head, launch.dilation
  rule = Rule(
    **{name: rules[head, place] for place, name in enumerate(RULE_FIELDS)}
  )
  rule = dataclasses.replace(rule, dilation=r)
  if not any(x.ahead for x in launch.rules):
    rule = dataclasses.replace(rule, ahead=0)
  residue, start = tile.block(i)
  start += i * shape[1]
  rows = plgpu.broadcasted_iota(jnp.int32, (shape[0],), 0, layout=rows_layout())
  rows += first_row
  if r > 1:
    rows = rows * r + tile.residue
  shift, falls_back = rule.shift, None
  if any(x.limit for x in launch.rules):
    flags = tile.flags
    falls_back = ((flags & blocks.FALLS_BACK) != 0) | (
      ((flags & blocks.MIXED) != 0) & (i < tile.end_0)
    )
    shift = jnp.where(falls_back, 0, shift)
  if inverse:
    first, last = blocks.query_bounds(rule, rows, shift)
    if falls_back is not None:
      first = jnp.maximum(first, jnp.where(falls_back, 0, rule.limit))
      last = jnp.minimum(
        last, jnp.where(falls_back, rule.limit - 1, blocks.FAR)
      )
  else:
    first, last = blocks.key_bounds(rule, rows, shift)
    if falls_back is not None:
      other = (rows < jnp.where(falls_back, 0, rule.limit)) | (
        rows >= jnp.where(falls_back, rule.limit, blocks.FAR)
      )
      last = jnp.where(other, -1, last)
  if r > 1:
    first, last = blocks.to_slots(first, last, residue, r)
  columns = plgpu.broadcasted_iota(
    jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA
  )

  def between(first: Any, last: Any) -> jax.Array:
    return (columns >= over_columns(first - start, shape)) & (
      columns <= over_columns(last - start, shape)
    )

  intervals = [(first, last)]
  if launch.has_unions:
    intervals += blocks.more_bounds(rule, rows, inverse)
    if _one_interval(launch, shape[1], inverse):
      # Masks are dear, so one comparison of each pair must do.
      end = start + (shape[1] - 1)
      first, last = blocks.hull(
        [(jnp.maximum(a, start), jnp.minimum(b, end)) for a, b in intervals]
      )
      intervals = [(first, last)]
  seen = functools.reduce(
    operator.or_, (between(*bounds) for bounds in intervals)
  )
  if not launch.has_segments:
    return seen
  row_ids = load(
    ids.at[tile.batch, tile.residue, pl.ds(first_row, shape[0])],
    rows_layout(),
    optimized=False,
  )
  column_ids = load(
    ids.at[tile.batch, residue, pl.ds(start, shape[1])],
    columns_layout(),
    optimized=False,
  )
  row_ids = jnp.where(row_ids == 0, -1, row_ids)
  return seen & (over_columns(row_ids, shape) == over_rows(column_ids, shape))


def tiled(itemsize: int = 2) -> tuple[Any, Any]:
  """Returns the layout in shared memory of a matrix with this item size."""
  # jax 0.11.2 leaves methods abstract that kernels do not call.
  tiling = plgpu.TilingTransform((8, 128 // itemsize))  # pyright: ignore
  return tiling, plgpu.SwizzleTransform(128)  # pyright: ignore


def run(
  launch: Launch,
  kernel: Callable[..., None],
  out_types: Sequence[Any],
  into: Sequence[jax.Array],
  scratch: Sequence[Any],
  *operands: jax.Array,
  auto_barriers: bool = True,
) -> list[jax.Array]:
  """Runs a kernel of three warpgroups on every multiprocessor.

  Args:
    launch: The launch.
    kernel: Gets operands, outputs, arrays to fill partly, and scratch.
    out_types: Shapes and dtypes of its outputs.
    into: Arrays to fill partly, in place.
    scratch: Its scratch.
    *operands: Its inputs.
    auto_barriers: Whether a warpgroup waits for all its threads before and
      after it reads or writes shared memory.

  Returns:
    The outputs and the filled arrays.
  """
  # No reduction here crosses warps, so they need hardly any room.
  params = plgpu.CompilerParams(
    approx_math=True,
    reduction_scratch_bytes=512,
    unsafe_no_auto_barriers=not auto_barriers,
  )
  settings = {
    "grid": (launch.num_multiprocessors,),
    "grid_names": ("sm",),
    "num_threads": 3,
    "thread_name": "wg",
  }
  if not into:
    return plgpu.kernel(
      kernel,
      out_type=list(out_types),
      scratch_types=list(scratch),
      compiler_params=params,
      **settings,
    )(*operands)
  num_inputs, num_filled = len(operands), len(into)

  def with_scratch(*refs):
    # Mutable arrays are operands, which come before outputs.
    inputs, filled = refs[:num_inputs], refs[num_inputs:][:num_filled]
    outputs = refs[num_inputs + num_filled :]
    pl.run_scoped(
      functools.partial(kernel, *inputs, *outputs, *filled),
      *scratch,
      collective_axes="wg",
    )

  filled = [jax.new_ref(x) for x in into]
  outputs: Any = pl.kernel(
    with_scratch,
    out_type=list(out_types),
    mesh=plgpu.Mesh(**settings),
    compiler_params=params,
  )(*operands, *filled)
  return [*(outputs or ()), *(ref.freeze(x) for x in filled)]
