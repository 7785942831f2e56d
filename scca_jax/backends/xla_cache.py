"""Attention of some queries over all keys of a cache, in plain XLA.

Time grows with the keys times the queries, memory with their sum: every query
meets every block of keys in an online softmax, and the pattern is only a mask.
`attend` is for decoding, and `attend_sinks` for the few keys that union heads
share.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from scca_jax.backends import online_softmax
from scca_jax.backends.heads import safe_maximum
from scca_jax.backends.online_softmax import product
from scca_jax.backends.reference import segment_starts
from scca_jax.patterns import AttentionPattern, Part

# Keys in a block.
_BLOCK = 512
# Target size for the scores of one block of keys, in bytes.
_SCORE_BYTES = 16 * 2**20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Mask:
  """Where queries and keys are; all integers.

  Attributes:
    offset: Position of the first query.
    query_ids: Segments of the queries, `[batch, seq]`.
    key_ids: Segments of the keys, `[batch, kv_seq]`; 0 for no key.
    keys: Positions of the keys, `[batch or 1, kv_seq]`.
    starts: Where their segments start, in the same shape.
    num_keys: Only the first `num_keys` keys count; None if all may count.
  """

  offset: jax.Array
  query_ids: jax.Array
  key_ids: jax.Array
  keys: jax.Array
  starts: jax.Array
  num_keys: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class _Settings:
  """What a call is compiled for.

  Attributes:
    pattern: Which keys are seen.
    scale: Factor of the scores.
    dtype: Dtype of the arrays, the output and the gradients.
    operands: Dtype that queries, keys and values are multiplied in.
  """

  pattern: AttentionPattern | Part
  scale: float
  dtype: Any
  operands: Any


def _to_blocks(x: jax.Array) -> jax.Array:
  """Returns `[blocks, batch, keys, ...]` from `[batch, kv_seq, ...]`."""
  kv_len = x.shape[1]
  num_blocks = -(-kv_len // _BLOCK)
  # Blocks of similar length need little padding.
  block = -(-kv_len // num_blocks)
  missing = num_blocks * block - kv_len
  x = jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])
  return jnp.moveaxis(
    x.reshape(x.shape[0], num_blocks, block, *x.shape[2:]), 1, 0
  )


def _from_blocks(x: jax.Array, kv_len: int) -> jax.Array:
  """Undoes `_to_blocks`."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :kv_len]


def _grouped(x: jax.Array, kv_heads: int) -> jax.Array:
  """Returns `[batch, kv_heads, group, seq, ...]` of `[batch, seq, heads, ...]`.

  Query heads that share a key head are then neighbours.
  """
  x = jnp.moveaxis(x, 2, 1)
  return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])


def _ungrouped(x: jax.Array) -> jax.Array:
  """Undoes `_grouped`."""
  return jnp.moveaxis(x.reshape(x.shape[0], -1, *x.shape[3:]), 1, 2)


def _blocks(key: jax.Array, value: jax.Array, mask: _Mask) -> tuple[Any, ...]:
  """Returns the inputs of a scan over the blocks of keys."""
  of_keys = (key, value, mask.key_ids, mask.keys, mask.starts)
  blocks = tuple(_to_blocks(x) for x in of_keys)
  num_blocks, _, length = blocks[0].shape[:3]
  return (*blocks, jnp.arange(num_blocks) * length)


def _scores(
  settings: _Settings,
  kv_len: int,
  query: jax.Array,
  mask: _Mask,
  block: tuple[Any, ...],
) -> jax.Array:
  """Returns `[batch, kv_heads, group, seq, keys]`, -inf where not seen."""
  key, _, ids, keys, starts, _ = block
  batch, kv_heads, _, seq_len, _ = query.shape
  queries = mask.offset + jnp.arange(seq_len)
  # Padding has segment 0.
  same = mask.query_ids[:, :, None] == ids[:, None, :]
  same = same & (ids != 0)[:, None, :]
  seen = settings.pattern.seen(
    queries[None, :, None], keys[:, None, :], kv_len, starts=starts[:, None, :]
  )
  seen = seen.swapaxes(0, 1)  # [batch or 1, heads, seq, keys]
  seen = seen.reshape(seen.shape[0], kv_heads, -1, seq_len, key.shape[1])
  scores = settings.scale * product("bhgqd,bkhd->bhgqk", query, key)
  return jnp.where(
    seen & same.reshape(batch, 1, 1, seq_len, -1), scores, -jnp.inf
  )


def _forward(settings: _Settings, query, key, value, mask):
  """Returns the results of `_attend`, grouped, with a float32 output."""
  kv_len, kv_heads = key.shape[1:3]
  query = _grouped(query, kv_heads)

  def meet(sums, block):
    scores = _scores(settings, kv_len, query, mask, block)
    return online_softmax.accumulate(
      sums, scores, block[1], "bhgqk,bkhd->bhgqd"
    )

  def step(sums, block):
    if mask.num_keys is None:
      return meet(sums, block), None
    counts = block[-1] < mask.num_keys
    return jax.lax.cond(counts, meet, lambda sums, _: sums, sums, block), None

  sums, _ = jax.lax.scan(
    step, online_softmax.start(query), _blocks(key, value, mask)
  )
  return online_softmax.finish(sums)


def _attend_primal(
  settings: _Settings,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: _Mask,
) -> tuple[jax.Array, jax.Array]:
  """Returns the output and the log-sum-exp."""
  results, _ = _save(settings, query, key, value, mask)
  return results


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(0,))


def _save(settings: _Settings, query, key, value, mask):
  query, key, value = (x.astype(settings.operands) for x in (query, key, value))
  output, log_sum = _forward(settings, query, key, value, mask)
  results = _ungrouped(output.astype(settings.dtype)), _ungrouped(log_sum)
  return results, (query, key, value, mask, output, log_sum)


def _backward(settings: _Settings, saved, cotangents):
  query, key, value, mask, output, log_sum = saved
  kv_len, kv_heads = key.shape[1:3]
  grouped = _grouped(query, kv_heads)
  d_output, d_log_sum = (_grouped(x, kv_heads) for x in cotangents)
  delta = online_softmax.delta(output, log_sum, d_output, d_log_sum)
  log_sum = safe_maximum(log_sum)

  def meet(d_query, block):
    key, value, *_ = block
    scores = _scores(settings, kv_len, grouped, mask, block)
    d_weights = product("bhgqd,bkhd->bhgqk", d_output, value)
    weights, d_scores = online_softmax.weights_and_gradient(
      scores, log_sum, d_weights, delta, settings.scale
    )
    return d_query + product("bhgqk,bkhd->bhgqd", d_scores, key), (
      product("bhgqk,bhgqd->bkhd", d_scores, grouped).astype(settings.dtype),
      product("bhgqk,bhgqd->bkhd", weights, d_output).astype(settings.dtype),
    )

  def skip(d_query, block):
    zeros = jnp.zeros_like(block[0], settings.dtype)
    return d_query, (zeros, zeros)

  def step(d_query, block):
    if mask.num_keys is None:
      return meet(d_query, block)
    return jax.lax.cond(block[-1] < mask.num_keys, meet, skip, d_query, block)

  d_query, of_keys = jax.lax.scan(
    step, online_softmax.zeros_like(grouped), _blocks(key, value, mask)
  )
  d_key, d_value = (_from_blocks(x, kv_len) for x in of_keys)
  d_query = _ungrouped(d_query.astype(settings.dtype))
  return d_query, d_key, d_value, None


_attend.defvjp(_save, _backward)


def attend(
  pattern: AttentionPattern,
  scale: float,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
  query_offset: int | jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns attention over a cache of keys; see `scca_jax.attention`."""
  batch, kv_len = key.shape[:2]
  starts = jnp.zeros((1, kv_len), jnp.int32)
  if segment_ids is None:
    segment_ids = jnp.ones((batch, kv_len), jnp.int32)
  elif any(head.sinks for head in pattern.heads):
    starts = segment_starts(segment_ids)
  mask = _Mask(
    offset=jnp.asarray(query_offset),
    query_ids=jax.lax.dynamic_slice_in_dim(
      segment_ids, query_offset, query.shape[1], axis=1
    ),
    key_ids=segment_ids,
    keys=jnp.arange(kv_len)[None],
    starts=starts,
  )
  settings = _Settings(pattern, scale, query.dtype, query.dtype)
  return _attend(settings, query, key, value, mask)


def attend_sinks(
  part: Part,
  scale: float,
  operands: Any,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Returns attention over the sinks of a union.

  Time grows with the queries times the sinks of all segments together.

  Args:
    part: One with `num_keys`, from `patterns.union_parts`.
    scale: Factor of the scores.
    operands: Dtype that queries, keys and values are multiplied in.
    query: `[batch, seq, heads of the part, head_dim]`, float32.
    key: `[batch, seq, kv_heads, head_dim]`, float32.
    value: Like `key`.
    segment_ids: Integers `[batch, seq]`, or None.

  Returns:
    The output, like `query`, and the log-sum-exp, float32.
  """
  assert part.num_keys is not None
  batch, seq_len, num_heads, _ = query.shape
  if segment_ids is None:
    key, value = key[:, : part.num_keys], value[:, : part.num_keys]
    query_ids = jnp.ones((batch, seq_len), jnp.int32)
    key_ids = query_ids[:, : part.num_keys]
    positions = jnp.arange(key.shape[1])[None]
    starts, num_keys = jnp.zeros_like(positions), None
  else:
    # Sinks come first, so the blocks after them are left out.
    starts = segment_starts(segment_ids)
    sinks = (jnp.arange(seq_len)[None] - starts < part.num_keys) & (
      segment_ids != 0
    )
    positions = jnp.argsort(~sinks, axis=1, stable=True)
    num_keys = jnp.max(jnp.sum(sinks, axis=1))
    query_ids = segment_ids
    key_ids, starts = (
      jnp.take_along_axis(x, positions, axis=1) for x in (segment_ids, starts)
    )
    key, value = (
      jnp.take_along_axis(x, positions[:, :, None, None], axis=1)
      for x in (key, value)
    )
  in_block = batch * num_heads * min(key.shape[1], _BLOCK)
  length = max(_SCORE_BYTES // (4 * in_block), 1)
  num_blocks = -(-seq_len // length)
  length = -(-seq_len // num_blocks)

  def split(x: jax.Array) -> jax.Array:
    rest = [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, [(0, 0), (0, num_blocks * length - seq_len), *rest])
    x = x.reshape(batch, num_blocks, length, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def of_block(block: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    query, ids, offset = block
    mask = _Mask(offset, ids, key_ids, positions, starts, num_keys)
    settings = _Settings(part, scale, jnp.float32, operands)
    return _attend(settings, query, key, value, mask)

  blocks = (split(query), split(query_ids), jnp.arange(num_blocks) * length)
  if num_blocks == 1:
    return of_block(tuple(x[0] for x in blocks))
  output, log_sum = (
    jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :seq_len]
    for x in jax.lax.map(of_block, blocks)
  )
  return output, log_sum
