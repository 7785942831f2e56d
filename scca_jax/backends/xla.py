"""Block-sparse attention in plain XLA, for every device.

Time grows with the pairs that are seen, forward and backward, and memory with
the sequence. Every pattern is cut into *strips*, which all look the same:

* keys and values are rolled by the shift of their head, so that a slot lies
  beside the queries that may see it;
* the sequence is cut in chunks, and a chunk in the residues of the dilation
  (a strided window is a reshape), so that neighbours in a strip are `dilation`
  tokens apart;
* in a strip, query `a` sees slot `j` if `lo <= j - a <= hi`, the slot holds a
  key, and both are of one segment. True positions are in order, `k <= p`, if
  and only if `j - a <= shift // dilation`.

Strips in which no query can see a key are left out. The others go, all of one
band together, through one attention with an online softmax over blocks (Rabe
and Staats, arXiv 2112.05682; Dao et al., arXiv 2205.14135) that visits no block
outside the band, and whose backward pass computes the weights anew.

The module is long because cutting, attending and putting together, forward and
backward, are of one layout of strips.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from scca_jax.backends.heads import (
  finish_softmax,
  join_heads,
  safe_maximum,
  take_heads,
  vary_like,
)
from scca_jax.patterns import AttentionPattern, HeadPattern

# Blocks of a strip, in slots. Smaller ones leave out more of what the band
# does not hold, larger ones multiply faster.
_MIN_BLOCK, _MAX_BLOCK = 128, 256
# The scores of one block of all strips aim at no more than this, in bytes.
_SCORE_BYTES = 16 * 2**20
# Keys read at once where a few queries meet a cache.
_CACHE_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class _Band:
  """What the strips of one call of the core have in common.

  Attributes:
    lo: Smallest `slot - query` that is seen, in slots; None has no bound.
    hi: Largest one.
    block: Length of a block, in slots.
    num_blocks: Blocks of a strip.
    scale: Factor of the scores.
  """

  lo: int | None
  hi: int
  block: int
  num_blocks: int
  scale: float

  def key_blocks(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the first key block that query block `i` meets, and the end."""
    first = jnp.zeros_like(i)
    if self.lo is not None:
      first = jnp.maximum(first, (i * self.block + self.lo) // self.block)
    last = ((i + 1) * self.block - 1 + self.hi) // self.block
    return first, jnp.minimum(last + 1, self.num_blocks)

  def holds(self, i: jax.Array, j: jax.Array) -> jax.Array:
    """Marks the pairs of two blocks that lie in the band, `[block, block]`."""
    inside = jnp.arange(self.block)
    distance = (j - i) * self.block + inside[None, :] - inside[:, None]
    held = distance <= self.hi
    return held if self.lo is None else held & (distance >= self.lo)


def _precision(dtype: Any) -> jax.lax.Precision:
  """Asks for exact float32 products, where a GPU would round operands."""
  if dtype == jnp.float32:
    return jax.lax.Precision.HIGHEST
  return jax.lax.Precision.DEFAULT


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns an einsum, accumulated and given in float32.

  A float32 `a` that meets a smaller `b` is rounded to its dtype, for the
  matrix units of a GPU. A CPU would only widen it again: it is left exact.
  """

  def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(
      subscripts,
      a,
      b,
      precision=_precision(a.dtype),
      preferred_element_type=jnp.float32,
    )

  if a.dtype == b.dtype:
    return multiply(a, b)
  return jax.lax.platform_dependent(
    a,
    b,
    cpu=multiply,
    default=lambda a, b: multiply(a.astype(b.dtype), b),
  )


def _to_blocks(x: jax.Array, num_blocks: int) -> jax.Array:
  """Returns `[blocks, strips, block, ...]` of `[strips, slots, ...]`."""
  blocks = x.reshape(x.shape[0], num_blocks, -1, *x.shape[2:])
  return jnp.moveaxis(blocks, 1, 0)


def _from_blocks(x: jax.Array) -> jax.Array:
  """Returns `[strips, slots, ...]` of `[blocks, strips, block, ...]`."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _scores(band: _Band, query, key, query_ids, key_ids, i, j) -> jax.Array:
  """Returns the scores of two blocks, -inf where nothing is seen."""
  seen = band.holds(i, j)[None] & (
    (query_ids[:, :, None] == key_ids[:, None, :]) & (key_ids != 0)[:, None, :]
  )
  scores = band.scale * _product("xqd,xkd->xqk", query, key)
  return jnp.where(seen, scores, -jnp.inf)


def _zeros_like(x: jax.Array) -> jax.Array:
  return vary_like(jnp.zeros(x.shape, jnp.float32), x)


def _empty_sums(query: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns maximum, total and output before any key is met."""
  zeros = _zeros_like(query)
  maximum = jnp.full(query.shape[:-1], -jnp.inf, jnp.float32)
  return vary_like(maximum, query), zeros[..., 0], zeros


def _core_forward(band: _Band, query, key, value, query_ids, key_ids):
  """Returns what `_core` does, the output in float32."""
  split = functools.partial(_to_blocks, num_blocks=band.num_blocks)
  queries, keys, values = split(query), split(key), split(value)
  ids_q, ids_k = split(query_ids), split(key_ids)

  def of_query_block(_, i):
    def meet(j, carry):
      maximum, total, output = carry
      scores = _scores(band, queries[i], keys[j], ids_q[i], ids_k[j], i, j)
      new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
      shift = safe_maximum(new_maximum)
      weights = jnp.exp(scores - shift[:, :, None])
      keep = jnp.exp(maximum - shift)
      part = _product("xqk,xkd->xqd", weights, values[j])
      return (
        new_maximum,
        keep * total + jnp.sum(weights, axis=-1),
        keep[:, :, None] * output + part,
      )

    maximum, total, output = jax.lax.fori_loop(
      *band.key_blocks(i),
      meet,
      _empty_sums(queries[i]),
    )
    total, log_sum = finish_softmax(safe_maximum(maximum), total)
    return None, (output / total[:, :, None], log_sum)

  _, (output, log_sum) = jax.lax.scan(
    of_query_block, None, jnp.arange(band.num_blocks)
  )
  return _from_blocks(output), _from_blocks(log_sum)


def _core_primal(
  band: _Band,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  query_ids: jax.Array,
  key_ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns attention within strips.

  Args:
    band: Which slots a query may see.
    query: `[strips, slots, head_dim]`.
    key: Like `query`.
    value: Like `query`.
    query_ids: Segments of the queries, int32 `[strips, slots]`.
    key_ids: Segments of the keys; 0 where the slot holds none.

  Returns:
    The output, like `query`, and its log-sum-exp, float32 `[strips, slots]`.
  """
  output, log_sum = _core_forward(band, query, key, value, query_ids, key_ids)
  return output.astype(query.dtype), log_sum


_core = jax.custom_vjp(_core_primal, nondiff_argnums=(0,))


def _core_save(band: _Band, query, key, value, query_ids, key_ids):
  output, log_sum = _core_forward(band, query, key, value, query_ids, key_ids)
  # Float32: where one key has nearly all the weight, the gradient of the
  # scores is what dp - sum(do o) leaves, and a rounded o would drown it.
  saved = (query, key, value, query_ids, key_ids, output, log_sum)
  return (output.astype(query.dtype), log_sum), saved


def _core_backward(band: _Band, saved, cotangents):
  query, key, value, query_ids, key_ids, output, log_sum = saved
  d_output, d_log_sum = cotangents
  # Sums that start from a constant would be allocated before all else that the
  # backward pass of a layer does.
  zero, d_output = jax.lax.optimization_barrier((jnp.float32(0), d_output))
  empty = log_sum == -jnp.inf
  # With p the weights, ds = p (dp - sum(do o) + dlse).
  delta = jnp.sum(d_output.astype(jnp.float32) * output, axis=-1)
  delta = delta - jnp.where(empty, 0.0, d_log_sum)
  split = functools.partial(_to_blocks, num_blocks=band.num_blocks)
  queries, keys, values = split(query), split(key), split(value)
  ids_q, ids_k = split(query_ids), split(key_ids)
  d_outputs, deltas, log_sums = (
    split(d_output),
    split(delta),
    split(safe_maximum(log_sum)),
  )

  def of_query_block(carry, i):
    def meet(j, carry):
      d_query, d_keys, d_values = carry
      scores = _scores(band, queries[i], keys[j], ids_q[i], ids_k[j], i, j)
      weights = jnp.exp(scores - log_sums[i][:, :, None])
      d_weights = _product("xqd,xkd->xqk", d_outputs[i], values[j])
      d_scores = band.scale * weights * (d_weights - deltas[i][:, :, None])
      return (
        d_query + _product("xqk,xkd->xqd", d_scores, keys[j]),
        d_keys.at[j].add(_product("xqk,xqd->xkd", d_scores, queries[i])),
        d_values.at[j].add(_product("xqk,xqd->xkd", weights, d_outputs[i])),
      )

    d_query, d_keys, d_values = jax.lax.fori_loop(
      *band.key_blocks(i),
      meet,
      (_zeros_like(queries[i]), *carry),
    )
    return (d_keys, d_values), d_query.astype(query.dtype)

  zeros = vary_like(jnp.broadcast_to(zero, keys.shape), keys)
  (d_keys, d_values), d_queries = jax.lax.scan(
    of_query_block, (zeros, zeros), jnp.arange(band.num_blocks)
  )
  return (
    _from_blocks(d_queries),
    _from_blocks(d_keys).astype(key.dtype),
    _from_blocks(d_values).astype(value.dtype),
    None,
    None,
  )


_core.defvjp(_core_save, _core_backward)


# From patterns to strips.


@dataclasses.dataclass(frozen=True)
class _Cut:
  """How the sequence is cut in strips.

  Attributes:
    chunk_size: Tokens.
    pad: Tokens put before the first, so that a chunk begins there.
    num_chunks: Chunks, the padding included.
    dilation: Tokens between neighbours in a strip.
    lo: See `_Band`.
    hi: See `_Band`.
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
    """Cuts `[batch, seq, heads, ...]` in `[batch, strips, slots, ...]`.

    The sequence must end with a chunk. Strips are ordered by head, chunk and
    residue.
    """
    rest = [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, [(0, 0), (self.pad, 0), *rest])
    x = x.reshape(x.shape[0], self.num_chunks, self.chunk_size, *x.shape[2:])
    missing = self.num_slots * self.dilation - self.chunk_size
    x = jnp.pad(x, [(0, 0), (0, 0), (0, missing), *rest])
    x = x.reshape(*x.shape[:2], self.num_slots, self.dilation, *x.shape[3:])
    # [batch, chunks, slots, residues, heads, ...]: heads first, slots last.
    x = jnp.moveaxis(x, (4, 1, 3, 2), (1, 2, 3, 4))
    return x.reshape(x.shape[0], -1, self.num_slots, *x.shape[5:])

  def together(self, x: jax.Array) -> jax.Array:
    """Undoes `apart`, but for what follows: `[batch, seq or more, heads]`."""
    shape = (self.num_chunks, self.dilation, self.num_slots)
    x = x.reshape(x.shape[0], -1, *shape, *x.shape[3:])
    x = jnp.moveaxis(x, (1, 2, 3, 4), (4, 1, 3, 2))
    x = x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, : self.chunk_size]
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, self.pad :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Arrays:
  """The arrays of one call, with the segments of queries and keys apart."""

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
  head: int, pattern: HeadPattern, seq_len: int, boundary: str
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
      # One strip a chunk has all the queries that the head serves.
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


def _block_size(num_strips: int, cut: _Cut) -> int:
  """Returns the length of a block, in slots."""
  # Powers of two, like most chunks: others would need padding, a copy of all.
  block = math.isqrt(_SCORE_BYTES // (4 * num_strips))
  block = 1 << max(block.bit_length() - 1, 0)
  block = min(max(block, _MIN_BLOCK), _MAX_BLOCK)
  if cut.lo is not None:
    # Much larger blocks than the window would compute what is masked.
    block = min(block, max(_MIN_BLOCK // 4, 1 - cut.lo))
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
    sources: They say the shifts.
  """
  num_slots = x.shape[1]
  parts, places = [], []
  for shift in dict.fromkeys(source.shift for source in sources):
    of_shift = [i for i, s in enumerate(sources) if s.shift == shift]
    places.append(of_shift)
    part = take_heads(x, [heads[i] for i in of_shift])
    if shift:
      # What the roll takes round the end is no key there.
      part = jnp.roll(part, min(shift, num_slots), axis=1)
      held = (np.arange(num_slots) >= shift).reshape(1, -1, *[1] * (x.ndim - 2))
      part = jnp.where(held, part, jnp.zeros((), x.dtype))
    parts.append(part)
  return join_heads(parts, places)


def _attend_cut(
  cut: _Cut,
  sources: Sequence[_Source],
  arrays: _Arrays,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns output and log-sum-exp of the sources, `[batch, seq, sources]`.

  What a source does not serve is 0 and -inf.
  """
  batch, seq_len, num_heads, head_dim = arrays.query.shape
  order = np.array(
    [
      (i * cut.num_chunks + chunk) * cut.dilation + residue
      for i, source in enumerate(sources)
      for chunk, residue in source.strips
    ],
    np.int32,
  )
  num_strips = len(sources) * cut.num_chunks * cut.dilation
  if not len(order):
    shape = (batch, seq_len, len(sources))
    return (
      jnp.zeros((*shape, head_dim), arrays.query.dtype),
      jnp.full(shape, -jnp.inf, jnp.float32),
    )
  complete = len(order) == num_strips
  heads = [source.head for source in sources]
  kv_heads = [h // (num_heads // arrays.key.shape[2]) for h in heads]
  # Slots behind the sequence belong to its last chunk too.
  behind = cut.num_chunks * cut.chunk_size - cut.pad - seq_len

  def keys(x: jax.Array, of_source: Sequence[int]) -> jax.Array:
    return _shifted(_pad_seq(x, behind), of_source, sources)

  key_ids = arrays.key_ids[:, :, None]
  parts = (
    _pad_seq(take_heads(arrays.query, heads), behind),
    keys(arrays.key, kv_heads),
    keys(arrays.value, kv_heads),
    _pad_seq(
      jnp.repeat(arrays.query_ids[:, :, None], len(sources), axis=2), behind
    ),
    keys(key_ids, [0] * len(sources)),
  )
  block = _block_size(batch * len(order), cut)
  num_blocks = -(-cut.num_slots // block)
  missing = num_blocks * block - cut.num_slots

  def strips(x: jax.Array) -> jax.Array:
    """Cuts, leaves out what is empty, and joins batch and strips."""
    x = cut.apart(x)
    if not complete:
      x = x.at[:, order].get(mode="promise_in_bounds", unique_indices=True)
    x = jnp.broadcast_to(x, (batch, *x.shape[1:]))
    x = x.reshape(batch * len(order), *x.shape[2:])
    return _pad_seq(x, missing)

  band = _Band(cut.lo, cut.hi, block, num_blocks, scale)
  output, log_sum = _core(band, *map(strips, parts))

  def whole(x: jax.Array, empty: float) -> jax.Array:
    x = x[:, : cut.num_slots]
    x = x.reshape(batch, len(order), *x.shape[1:])
    if not complete:
      full = jnp.full((batch, num_strips, *x.shape[2:]), empty, x.dtype)
      x = full.at[:, order].set(
        x, mode="promise_in_bounds", unique_indices=True
      )
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
  arrays: _Arrays, heads: Sequence[HeadPattern], boundary: str, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Returns attention by true positions; unchunked heads never fall back."""
  seq_len = arrays.query.shape[1]
  cuts: dict[_Cut, list[_Source]] = {}
  for index, head in enumerate(heads):
    for cut, source in _sources_of(index, head, seq_len, boundary):
      cuts.setdefault(cut, []).append(source)
  results = [
    _attend_cut(cut, sources, arrays, scale) for cut, sources in cuts.items()
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
  arrays: _Arrays, pattern: AttentionPattern, scale: float, result: Any
) -> Any:
  """Returns `result` with the queries before an unchunked head's shift served.

  They see no key behind them, so that the start of the sequence is enough.
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
  output, log_sum = _by_position(start, heads, "drop", scale)
  after = seq_len - length
  return _where(
    falls_back, (_pad_seq(output, after), _pad_seq(log_sum, after)), result
  )


def _by_slot(
  arrays: _Arrays, pattern: AttentionPattern, scale: float
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
    # Among the slots nothing is shifted; `select` speaks of positions.
    plain = dataclasses.replace(head, shift=0, offset=0, select=None)
    result = _by_position(rolled, [plain] * len(indices), "drop", scale)
    parts.append([jnp.roll(x, head.offset, axis=1) for x in result])
  outputs, log_sums = zip(*parts, strict=True)
  indices = list(pattern.head_groups().values())
  return join_heads(outputs, indices), join_heads(log_sums, indices)


# Queries beside a cache of keys.


def _cache_blocks(x: jax.Array) -> jax.Array:
  """Returns `[blocks, batch, keys, ...]` of `[batch, kv_seq, ...]`."""
  kv_len = x.shape[1]
  num_blocks = -(-kv_len // _CACHE_BLOCK)
  # Blocks alike in length: little is padded.
  block = -(-kv_len // num_blocks)
  return _to_blocks(_pad_seq(x, num_blocks * block - kv_len), num_blocks)


def _grouped(x: jax.Array, kv_heads: int) -> jax.Array:
  """Returns `[batch, kv_heads, group, seq, ...]` of `[batch, seq, heads, ...]`.

  Query heads that share a key head then lie together.
  """
  x = jnp.moveaxis(x, 2, 1)
  return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])


def _ungrouped(x: jax.Array) -> jax.Array:
  """Undoes `_grouped`."""
  return jnp.moveaxis(x.reshape(x.shape[0], -1, *x.shape[3:]), 1, 2)


def _cache_scores(
  pattern: AttentionPattern,
  scale: float,
  kv_len: int,
  query: jax.Array,
  query_ids: jax.Array,
  offset: jax.Array,
  block: tuple[jax.Array, jax.Array, jax.Array],
) -> jax.Array:
  """Returns `[batch, kv_heads, group, seq, keys]`, -inf where not seen."""
  key, ids, index = block
  batch, kv_heads, _, seq_len, _ = query.shape
  queries = offset + jnp.arange(seq_len)[:, None]
  keys = (index * key.shape[1] + jnp.arange(key.shape[1]))[None, :]
  # Padding has segment 0.
  same = query_ids[:, :, None] == ids[:, None, :]
  same = same & (ids != 0)[:, None, :]
  seen = pattern.seen(queries, keys, kv_len)
  seen = seen.reshape(1, kv_heads, -1, seq_len, key.shape[1])
  scores = scale * _product("bhgqd,bkhd->bhgqk", query, key)
  return jnp.where(
    seen & same.reshape(batch, 1, 1, seq_len, -1), scores, -jnp.inf
  )


def _with_cache_forward(
  pattern, scale, query, key, value, query_ids, key_ids, offset
):
  """Returns what `_with_cache` does, grouped and the output in float32."""
  kv_len, kv_heads = key.shape[1:3]
  query = _grouped(query, kv_heads)

  def meet(carry, block):
    maximum, total, output = carry
    key, value, ids, index = block
    scores = _cache_scores(
      pattern, scale, kv_len, query, query_ids, offset, (key, ids, index)
    )
    new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
    base = safe_maximum(new_maximum)
    weights = jnp.exp(scores - base[..., None])
    keep = jnp.exp(maximum - base)
    part = _product("bhgqk,bkhd->bhgqd", weights, value)
    return (
      new_maximum,
      keep * total + jnp.sum(weights, axis=-1),
      keep[..., None] * output + part,
    ), None

  blocks = [_cache_blocks(x) for x in (key, value, key_ids)]
  (maximum, total, output), _ = jax.lax.scan(
    meet,
    _empty_sums(query),
    (*blocks, jnp.arange(len(blocks[0]))),
  )
  total, log_sum = finish_softmax(safe_maximum(maximum), total)
  return output / total[..., None], log_sum


def _with_cache_primal(
  pattern: AttentionPattern,
  scale: float,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  query_ids: jax.Array,
  key_ids: jax.Array,
  offset: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns attention of queries from `offset` on over a cache of keys.

  Every key is read: time grows with the keys times the queries, memory with
  their sum.
  """
  output, log_sum = _with_cache_forward(
    pattern, scale, query, key, value, query_ids, key_ids, offset
  )
  return _ungrouped(output.astype(query.dtype)), _ungrouped(log_sum)


_with_cache = jax.custom_vjp(_with_cache_primal, nondiff_argnums=(0, 1))


def _with_cache_save(pattern, scale, *arrays):
  output, log_sum = _with_cache_forward(pattern, scale, *arrays)
  results = _ungrouped(output.astype(arrays[0].dtype)), _ungrouped(log_sum)
  return results, (*arrays, output, log_sum)


def _with_cache_backward(pattern, scale, saved, cotangents):
  query, key, value, query_ids, key_ids, offset, output, log_sum = saved
  kv_len, kv_heads = key.shape[1:3]
  grouped = _grouped(query, kv_heads)
  d_output, d_log_sum = (_grouped(x, kv_heads) for x in cotangents)
  # As in `_core_backward`.
  delta = jnp.sum(d_output.astype(jnp.float32) * output, axis=-1)
  delta = delta - jnp.where(log_sum == -jnp.inf, 0.0, d_log_sum)
  log_sum = safe_maximum(log_sum)

  def meet(d_query, block):
    key, value, ids, index = block
    scores = _cache_scores(
      pattern, scale, kv_len, grouped, query_ids, offset, (key, ids, index)
    )
    weights = jnp.exp(scores - log_sum[..., None])
    d_weights = _product("bhgqd,bkhd->bhgqk", d_output, value)
    d_scores = scale * weights * (d_weights - delta[..., None])
    return d_query + _product("bhgqk,bkhd->bhgqd", d_scores, key), (
      _product("bhgqk,bhgqd->bkhd", d_scores, grouped).astype(key.dtype),
      _product("bhgqk,bhgqd->bkhd", weights, d_output).astype(value.dtype),
    )

  blocks = [_cache_blocks(x) for x in (key, value, key_ids)]
  d_query, of_keys = jax.lax.scan(
    meet,
    _zeros_like(grouped),
    (*blocks, jnp.arange(len(blocks[0]))),
  )
  d_key, d_value = (_from_blocks(x)[:, :kv_len] for x in of_keys)
  d_query = _ungrouped(d_query.astype(query.dtype))
  return d_query, d_key, d_value, None, None, None


_with_cache.defvjp(_with_cache_save, _with_cache_backward)


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
  from_start = (
    not isinstance(query_offset, jax.core.Tracer) and int(query_offset) == 0
  )
  if from_start and pattern.causality == "position":
    # Later keys are never seen.
    key, value = key[:, :seq_len], value[:, :seq_len]
    segment_ids = None if segment_ids is None else segment_ids[:, :seq_len]
  kv_len = key.shape[1]
  if segment_ids is None:
    segment_ids = jnp.ones((query.shape[0], kv_len), jnp.int32)
  if not from_start or seq_len < kv_len:
    query_ids = jax.lax.dynamic_slice_in_dim(
      segment_ids, query_offset, seq_len, axis=1
    )
    return _with_cache(
      pattern,
      scale,
      query,
      key,
      value,
      query_ids,
      segment_ids,
      jnp.asarray(query_offset),
    )
  arrays = _Arrays(query, key, value, segment_ids, segment_ids)
  if pattern.causality == "slot":
    result = _by_slot(arrays, pattern, scale)
  else:
    result = _by_position(arrays, pattern.heads, pattern.boundary, scale)
    if pattern.boundary == "local":
      result = _unchunked_start(arrays, pattern, scale, result)
  positions = np.arange(seq_len)
  served = np.stack(
    [
      positions % head.dilation == (head.select or 0)
      if head.select is not None
      else np.full(seq_len, True)
      for head in pattern.heads
    ],
    axis=1,
  )
  if served.all():
    return result
  nothing = (jnp.zeros((), query.dtype), jnp.float32(-jnp.inf))
  return _where(served, result, nothing)
