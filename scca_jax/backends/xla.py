"""Block-sparse attention in plain XLA, for every device.

Time grows with the number of seen pairs, forward and backward, and memory with
the sequence. Every pattern is cut into *strips*, which all look the same:

* keys and values are rolled by the shift of their head, so that a slot is next
  to the queries that may see it;
* the sequence is cut into chunks, and a chunk into the residues of the dilation
  (a strided window is a reshape), so that neighbours in a strip are `dilation`
  tokens apart;
* in a strip, query `a` sees slot `j` if `lo <= j - a <= hi`, the slot has a
  key, and both are in one segment. True positions are in order, `k <= p`, if
  and only if `j - a <= shift // dilation`.

Strips in which no query can see a key are left out. The others go, those of one
band together, through `xla_strips`.

A union head is split into disjoint parts (`patterns.union_parts`), which are
attended one by one and combined by their log-sum-exp.

The parts of this module: from patterns to strips (`_Cut`, `_by_position`),
unions, and the back end (`attention`). Decoding with a cache is in `xla_cache`.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from scca_jax import target
from scca_jax.backends import xla_cache, xla_strips
from scca_jax.backends.contract import starts_late
from scca_jax.backends.heads import combine, join_heads, take_heads
from scca_jax.patterns import (
  AttentionPattern,
  Boundary,
  HeadPattern,
  Part,
  union_parts,
)

# Blocks of a strip, in slots: the usual one, and the largest. Smaller ones skip
# more pairs outside the band, larger ones multiply faster. And how many bytes
# of scores to compute at once, in the backward pass with their gradients: few
# launches on a GPU, but what a CPU's cache holds.
_MIN_BLOCK = 64
_BLOCK, _MAX_BLOCK, _SCORE_BYTES = 512, 2048, 128 * 2**20
_CPU_BLOCK, _CPU_MAX_BLOCK, _CPU_SCORE_BYTES = 256, 256, 4 * 2**20
# How many lengths the empty starts of strips have: each is a program of its
# own, and XLA keeps memory for each on a CPU.
_MAX_STARTS, _CPU_MAX_STARTS = 4, 1


# From patterns to strips.


@dataclasses.dataclass(frozen=True)
class _Cut:
  """How the sequence is cut into strips.

  Attributes:
    chunk_size: Tokens.
    pad: Tokens put before the first, so that a chunk starts there.
    num_chunks: Chunks, including the padding.
    dilation: Tokens between neighbours in a strip.
    lo: See `xla_strips.Band`.
    hi: See `xla_strips.Band`.
  """

  chunk_size: int
  pad: int
  num_chunks: int
  dilation: int
  lo: int | None
  hi: int

  @property
  def num_slots(self) -> int:
    """Length of a strip."""
    return -(-self.chunk_size // self.dilation)

  def apart(self, x: jax.Array) -> jax.Array:
    """Cuts `[batch, seq, heads, ...]` into `[strips, batch, slots, ...]`.

    The sequence must end with a chunk. Strips are ordered by chunk, head and
    residue.
    """
    rest = [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, [(0, 0), (self.pad, 0), *rest])
    x = x.reshape(x.shape[0], self.num_chunks, self.chunk_size, *x.shape[2:])
    missing = self.num_slots * self.dilation - self.chunk_size
    x = jnp.pad(x, [(0, 0), (0, 0), (0, missing), *rest])
    x = x.reshape(*x.shape[:2], self.num_slots, self.dilation, *x.shape[3:])
    # [batch, chunks, slots, residues, heads, ...] until then.
    x = jnp.moveaxis(x, (1, 4, 3, 0, 2), range(5))
    return x.reshape(-1, *x.shape[3:])

  def together(self, x: jax.Array) -> jax.Array:
    """Undoes `apart`, up to padding at the end: `[batch, seq, heads, ...]`."""
    x = x.reshape(self.num_chunks, -1, self.dilation, *x.shape[1:])
    x = jnp.moveaxis(x, range(5), (1, 4, 3, 0, 2))
    x = x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, : self.chunk_size]
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, self.pad :]


@dataclasses.dataclass(frozen=True)
class _Settings:
  """Settings of all strips in a call.

  Attributes:
    scale: Factor of the scores.
    dtype: Dtype of the arrays, the output and the gradients.
    operands: Dtype that queries, keys and values are multiplied in.
    before_chunk: Whether only keys before the query's own chunk count.
  """

  scale: float
  dtype: Any
  operands: Any
  before_chunk: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Arrays:
  """The arrays of one call; queries and keys have separate segment ids."""

  query: jax.Array
  key: jax.Array
  value: jax.Array
  query_ids: jax.Array
  key_ids: jax.Array


@dataclasses.dataclass(frozen=True)
class _Source:
  """A head with one shift, in the chunks where it has that shift.

  Attributes:
    head: Query head.
    shift: Tokens.
    strips: The (chunk, residue) in which a query may see a key.
    falls_back: Whether these are the chunks that `boundary="local"` serves
      without the head's own shift.
  """

  head: int
  shift: int
  strips: tuple[tuple[int, int], ...]
  falls_back: bool


def _sources_of(
  head: int, pattern: HeadPattern, seq_len: int, boundary: Boundary
) -> list[tuple[_Cut, _Source]]:
  """Returns the strips of a head; two sources if some chunks fall back."""
  dilation, window = pattern.dilation, pattern.window
  own_shift = pattern.shift
  if pattern.chunk_size is None:
    chunk_size, pad, num_chunks = seq_len, 0, 1
    if window is None:
      # Without borders a shift by the dilation changes nothing.
      own_shift %= dilation
  else:
    chunk_size = pattern.chunk_size
    pad = -pattern.offset % chunk_size
    num_chunks = -(-(pad + seq_len) // chunk_size)
  # Chunks whose whole window lies before position 0.
  num_empty = min((own_shift + pad) // chunk_size, num_chunks)

  def make(shift: int, chunks: range) -> tuple[_Cut, _Source]:
    # A chunk longer than the sequence is only as long as it has slots in use.
    length = chunk_size
    if num_chunks == 1 and pattern.chunk_size is not None:
      length = min(chunk_size, pad + seq_len + shift)
    residues = range(dilation)
    if pattern.select is not None and (
      num_chunks == 1 or chunk_size % dilation == 0
    ):
      # One strip per chunk has all the queries that the head serves.
      residues = [(pattern.select + pad) % dilation]
    lo, hi = None, min(shift // dilation, -(-length // dilation) - 1)
    if window is not None:
      lo, hi = 1 - window, 0
    return _Cut(length, pad, num_chunks, dilation, lo, hi), _Source(
      head,
      shift,
      tuple((c, r) for c in chunks for r in residues),
      shift != own_shift,
    )

  sources = [make(own_shift, range(num_empty, num_chunks))]
  if boundary == "local" and num_empty and pattern.chunk_size is not None:
    sources.append(make(0, range(num_empty)))
  return sources


def _block_size(cut: _Cut, most: int, score_bytes: int) -> int:
  """Returns the length of a block, in slots."""
  # Powers of two, like most chunks: other sizes would need padding, a copy of
  # everything.
  block = most
  while block > _MIN_BLOCK and 8 * block * cut.num_slots > score_bytes:
    block //= 2
  if cut.lo is not None:
    # Blocks much larger than the window would compute masked pairs.
    block = min(most, max(_MIN_BLOCK // 2, 1 - cut.lo))
  num_blocks = -(-cut.num_slots // block)
  return -(-cut.num_slots // num_blocks)


def _pad_seq(x: jax.Array, num_tokens: int) -> jax.Array:
  return jnp.pad(x, [(0, 0), (0, num_tokens), *[(0, 0)] * (x.ndim - 2)])


def _shifted(
  x: jax.Array, heads: Sequence[int], sources: Sequence[_Source]
) -> jax.Array:
  """Returns a head for each source, rolled by its shift.

  Args:
    x: `[batch, slots, heads, ...]`.
    heads: Which head of `x` each source takes.
    sources: Their shifts are used.
  """
  num_slots = x.shape[1]
  parts, places = [], []
  for shift in dict.fromkeys(source.shift for source in sources):
    of_shift = [i for i, s in enumerate(sources) if s.shift == shift]
    places.append(of_shift)
    part = take_heads(x, [heads[i] for i in of_shift])
    if shift:
      # Keys that the roll takes round the end do not count there.
      part = jnp.roll(part, min(shift, num_slots), axis=1)
      held = (np.arange(num_slots) >= shift).reshape(1, -1, *[1] * (x.ndim - 2))
      part = jnp.where(held, part, jnp.zeros((), x.dtype))
    parts.append(part)
  return join_heads(parts, places)


def _attend_cut(
  cut: _Cut,
  sources: Sequence[_Source],
  arrays: _Arrays,
  settings: _Settings,
) -> tuple[jax.Array, jax.Array]:
  """Returns output and log-sum-exp of the sources, `[batch, seq, sources]`.

  Queries that a source does not serve get 0 and -inf.
  """
  batch, seq_len, num_heads, head_dim = arrays.query.shape
  num_strips = cut.num_chunks * len(sources) * cut.dilation
  places = [
    ((chunk * len(sources) + i) * cut.dilation + residue, source, chunk)
    for i, source in enumerate(sources)
    for chunk, residue in source.strips
  ]
  if not places:
    shape = (batch, seq_len, len(sources))
    return (
      jnp.zeros((*shape, head_dim), settings.dtype),
      jnp.full(shape, -jnp.inf, jnp.float32),
    )
  heads = [source.head for source in sources]
  kv_heads = [h // (num_heads // arrays.key.shape[2]) for h in heads]
  # Slots after the sequence belong to its last chunk too.
  behind = cut.num_chunks * cut.chunk_size - cut.pad - seq_len

  def keys(x: jax.Array, of_source: Sequence[int]) -> jax.Array:
    return _shifted(_pad_seq(x, behind), of_source, sources)

  def ids_of_keys() -> jax.Array:
    ids = keys(arrays.key_ids[:, :, None], [0] * len(sources))
    if not settings.before_chunk:
      return ids
    # The slots of a chunk with keys from before it come first.
    places = (np.arange(ids.shape[1]) + cut.pad) % cut.chunk_size
    before = places[:, None] < [source.shift for source in sources]
    return jnp.where(before, ids, 0)

  parts = (
    _pad_seq(take_heads(arrays.query, heads), behind),
    keys(arrays.key, kv_heads),
    keys(arrays.value, kv_heads),
    _pad_seq(
      jnp.repeat(arrays.query_ids[:, :, None], len(sources), axis=2), behind
    ),
    ids_of_keys(),
  )
  usual, most, score_bytes = _BLOCK, _MAX_BLOCK, _SCORE_BYTES
  max_starts = _MAX_STARTS
  if target.current().platform == "cpu":
    usual, most, score_bytes = _CPU_BLOCK, _CPU_MAX_BLOCK, _CPU_SCORE_BYTES
    max_starts = _CPU_MAX_STARTS
  block = _block_size(cut, usual, score_bytes)
  num_blocks = -(-cut.num_slots // block)
  band = xla_strips.Band(
    lo=cut.lo,
    hi=cut.hi,
    num_slots=num_blocks * block,
    score_bytes=score_bytes,
    scale=settings.scale,
    dtype=settings.dtype,
    operands=settings.operands,
  )
  unit = block * max(1, num_blocks // max_starts)

  def num_empty(source: _Source, chunk: int) -> int:
    before = source.shift + cut.pad - chunk * cut.chunk_size
    empty = max(0, before) // cut.dilation // unit * unit
    return min(empty, band.num_slots - block)

  # Strips that are equally empty are neighbours, the emptiest first.
  in_order = sorted(
    (-num_empty(source, chunk), place) for place, source, chunk in places
  )
  order = np.array([place for _, place in in_order], np.int32)
  complete = np.array_equal(order, np.arange(num_strips))
  pieces = itertools.groupby(-empty for empty, _ in in_order)
  band = dataclasses.replace(
    band,
    pieces=tuple(
      band.piece(batch * len(list(strips)), empty, block, most)
      for empty, strips in pieces
    ),
  )

  def strips(x: jax.Array) -> jax.Array:
    """Cuts, leaves out the empty strips, and joins strips and batch."""
    x = cut.apart(x)
    if not complete:
      x = x.at[order].get(mode="promise_in_bounds", unique_indices=True)
    x = jnp.broadcast_to(x, (len(x), batch, *x.shape[2:]))
    x = x.reshape(-1, *x.shape[2:])
    return _pad_seq(x, band.num_slots - cut.num_slots)

  output, log_sum = xla_strips.core(band, *map(strips, parts))

  def whole(x: jax.Array, empty: float) -> jax.Array:
    x = x[:, : cut.num_slots]
    x = x.reshape(len(order), batch, *x.shape[1:])
    if not complete:
      full = jnp.full((num_strips, *x.shape[1:]), empty, x.dtype)
      x = full.at[order].set(x, mode="promise_in_bounds", unique_indices=True)
    return cut.together(x)[:, :seq_len]

  return whole(output, 0.0), whole(log_sum, -jnp.inf)


def _where(
  chosen: np.ndarray,
  a: tuple[jax.Array, jax.Array],
  b: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
  """Chooses between (output, log-sum-exp) pairs by `[seq, heads]`."""
  return (
    jnp.where(chosen[None, :, :, None], a[0], b[0]),
    jnp.where(chosen[None], a[1], b[1]),
  )


def _by_position(
  arrays: _Arrays,
  heads: Sequence[HeadPattern],
  boundary: Boundary,
  settings: _Settings,
) -> tuple[jax.Array, jax.Array]:
  """Returns attention by true positions; unchunked heads never fall back."""
  seq_len = arrays.query.shape[1]
  cuts: dict[_Cut, list[_Source]] = {}
  for index, head in enumerate(heads):
    for cut, source in _sources_of(index, head, seq_len, boundary):
      cuts.setdefault(cut, []).append(source)
  results = [
    _attend_cut(cut, sources, arrays, settings) for cut, sources in cuts.items()
  ]
  joined = [jnp.concatenate(x, axis=2) for x in zip(*results, strict=True)]
  in_order = [source for sources in cuts.values() for source in sources]
  places = {(s.head, s.falls_back): i for i, s in enumerate(in_order)}
  own = [places[h, False] for h in range(len(heads))]
  output, log_sum = (take_heads(x, own) for x in joined)
  if len(in_order) == len(heads):
    return output, log_sum
  local = [places.get((h, True), own[h]) for h in range(len(heads))]
  falls_back = np.stack(
    [head.falls_back(np.arange(seq_len)) for head in heads], axis=1
  )
  local_output, local_log_sum = (take_heads(x, local) for x in joined)
  return _where(falls_back, (local_output, local_log_sum), (output, log_sum))


def _unchunked_start(
  arrays: _Arrays,
  pattern: AttentionPattern,
  settings: _Settings,
  result: Any,
) -> Any:
  """Returns `result` with the queries before an unchunked head's shift served.

  They see no later keys, so the start of the sequence is enough.
  """
  seq_len = arrays.query.shape[1]
  falls_back = np.stack(
    [
      head.falls_back(np.arange(seq_len)) & (head.chunk_size is None)
      for head in pattern.heads
    ],
    axis=1,
  )
  length = int(falls_back.any(axis=1).sum())
  if not length:
    return result
  start = jax.tree.map(lambda x: x[:, :length], arrays)
  heads = [dataclasses.replace(head, shift=0) for head in pattern.heads]
  output, log_sum = _by_position(start, heads, "drop", settings)
  after = seq_len - length
  return _where(
    falls_back, (_pad_seq(output, after), _pad_seq(log_sum, after)), result
  )


def _by_slot(
  arrays: _Arrays, pattern: AttentionPattern, settings: _Settings
) -> tuple[jax.Array, jax.Array]:
  """Returns attention of keys rolled cyclically, in the order of slots."""
  group_size = arrays.query.shape[2] // arrays.key.shape[2]
  parts = []
  for head, indices in pattern.head_groups().items():
    kv_heads = [index // group_size for index in indices]
    moved = head.shift - head.offset
    rolled = _Arrays(
      jnp.roll(take_heads(arrays.query, indices), -head.offset, axis=1),
      jnp.roll(take_heads(arrays.key, kv_heads), moved, axis=1),
      jnp.roll(take_heads(arrays.value, kv_heads), moved, axis=1),
      jnp.roll(arrays.query_ids, -head.offset, axis=1),
      jnp.roll(arrays.key_ids, moved, axis=1),
    )
    # Among the slots nothing is shifted; `select` refers to positions.
    plain = dataclasses.replace(head, shift=0, offset=0, select=None)
    result = _by_position(rolled, [plain] * len(indices), "drop", settings)
    parts.append([jnp.roll(x, head.offset, axis=1) for x in result])
  outputs, log_sums = zip(*parts, strict=True)
  indices = list(pattern.head_groups().values())
  return join_heads(outputs, indices), join_heads(log_sums, indices)


def _attend_pattern(
  arrays: _Arrays, pattern: AttentionPattern, settings: _Settings
) -> tuple[jax.Array, jax.Array]:
  """Returns attention by a pattern without unions."""
  if pattern.causality == "slot":
    result = _by_slot(arrays, pattern, settings)
  else:
    result = _by_position(arrays, pattern.heads, pattern.boundary, settings)
    if pattern.boundary == "local":
      result = _unchunked_start(arrays, pattern, settings, result)
  positions = np.arange(arrays.query.shape[1])
  served = np.stack(
    [
      positions % head.dilation == (head.select or 0)
      if head.select is not None
      else np.full(len(positions), True)
      for head in pattern.heads
    ],
    axis=1,
  )
  if served.all():
    return result
  nothing = (jnp.zeros((), settings.dtype), jnp.float32(-jnp.inf))
  return _where(served, result, nothing)


# Unions.


def attend_part(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  part: Part,
  *,
  segment_ids: jax.Array | None,
  scale: float,
  operands: Any,
) -> tuple[jax.Array, jax.Array]:
  """Returns attention over one part of a union (`patterns.union_parts`).

  Args:
    query: `[batch, seq, heads, head_dim]`, all heads of the union; float32,
      so that the gradients of the parts are added before they are rounded.
    key: `[batch, seq, kv_heads, head_dim]`, float32.
    value: Like `key`.
    part: The part.
    segment_ids: Integers `[batch, seq]`, or None.
    scale: Factor of the scores.
    operands: Dtype that queries, keys and values are multiplied in.

  Returns:
    The output `[batch, seq, heads of the part, head_dim]` and the log-sum-exp,
    both float32, to be combined with other parts.
  """
  num_heads = query.shape[2]
  if len(part.heads) < num_heads:
    group_size = num_heads // key.shape[2]
    kv_heads = [head // group_size for head in part.heads]
    query = take_heads(query, part.heads)
    key, value = take_heads(key, kv_heads), take_heads(value, kv_heads)
  if part.num_keys is not None:
    return xla_cache.attend_sinks(
      part, scale, operands, query, key, value, segment_ids
    )
  if segment_ids is None:
    segment_ids = jnp.ones(query.shape[:2], jnp.int32)
  arrays = _Arrays(query, key, value, segment_ids, segment_ids)
  settings = _Settings(scale, jnp.float32, operands, part.before_chunk)
  return _attend_pattern(arrays, part.pattern, settings)


def spread_part(
  output: jax.Array, log_sum: jax.Array, part: Part, num_heads: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the results of a part for all heads: 0 and -inf for the others."""
  if len(part.heads) == num_heads:
    return output, log_sum
  others = [head for head in range(num_heads) if head not in part.heads]
  rest = jnp.zeros((*log_sum.shape[:2], len(others)), jnp.float32)
  empty = jnp.zeros((*rest.shape, output.shape[3]), output.dtype)
  places = [part.heads, others]
  return (
    join_heads([output, empty], places),
    join_heads([log_sum, rest - jnp.inf], places),
  )


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  pattern: AttentionPattern,
  *,
  segment_ids: jax.Array | None,
  query_offset: int | jax.Array,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns the output and the log-sum-exp; see `scca_jax.attention`.

  Computes in float32.
  """
  seq_len = query.shape[1]
  if starts_late(query, key, pattern, segment_ids, query_offset):
    # Idle queries in front, and keys at the end that no query sees.
    missing = int(query_offset)
    padding = ((0, 0), (missing, 0), (0, 0), (0, 0))
    query = jnp.pad(query, padding)
    key, value = (_pad_seq(x, missing) for x in (key, value))
    ids = jnp.ones(query.shape[:2], jnp.int32)
    settings = _Settings(scale, query.dtype, query.dtype)
    result = _attend_pattern(
      _Arrays(query, key, value, ids, ids), pattern, settings
    )
    output, log_sum = (x[:, missing:] for x in result)
    return output, log_sum
  from_start = (
    not isinstance(query_offset, jax.core.Tracer) and int(query_offset) == 0
  )
  if from_start and pattern.causality == "position":
    # Later keys are never seen.
    key, value = key[:, :seq_len], value[:, :seq_len]
    segment_ids = None if segment_ids is None else segment_ids[:, :seq_len]
  if not from_start or seq_len < key.shape[1]:
    return xla_cache.attend(
      pattern, scale, query, key, value, segment_ids, query_offset
    )
  parts = union_parts(pattern)
  if len(parts) == 1 and parts[0].is_plain:
    if segment_ids is None:
      segment_ids = jnp.ones(query.shape[:2], jnp.int32)
    arrays = _Arrays(query, key, value, segment_ids, segment_ids)
    settings = _Settings(scale, query.dtype, query.dtype)
    return _attend_pattern(arrays, parts[0].pattern, settings)
  dtype = query.dtype
  query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
  results = [
    spread_part(
      *attend_part(
        query,
        key,
        value,
        part,
        segment_ids=segment_ids,
        scale=scale,
        operands=dtype,
      ),
      part,
      pattern.num_heads,
    )
    for part in parts
  ]
  output, log_sum = combine(*zip(*results, strict=True))
  return output.astype(dtype), log_sum
