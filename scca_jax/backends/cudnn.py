"""Serves patterns that are dense attention on pieces of the sequence.

cuDNN's fused attention (`jax.nn.dot_product_attention`) has no patterns. But
dense, sliding and S2 heads, and heads shifted by whole chunks (`scca_flow`) or
by less than a chunk (`scca_fixed`), can be made of calls on slices, causal or
without a mask. No mask is built and no key is rolled, but slices are copies,
and cuDNN also needs a copy of keys that are not in order.

It returns no log-sum-exp, because the interface rounds it to the dtype of the
inputs and treats it as a constant in gradients.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scca_jax.backends.heads import join_heads, take_heads
from scca_jax.patterns import AttentionPattern, HeadPattern


@dataclasses.dataclass(frozen=True)
class _Dense:
  """Dense attention over slices of the sequence.

  Attributes:
    query: `[batch, seq, heads, head_dim]`.
    key: `[batch, seq, kv_heads, head_dim]`.
    value: Like `key`.
    scale: Factor of the scores.
    implementation: See `jax.nn.dot_product_attention`.
  """

  query: jax.Array
  key: jax.Array
  value: jax.Array
  scale: float
  implementation: Any

  @property
  def seq_len(self) -> int:
    """Tokens."""
    return self.query.shape[1]

  def _attend(self, query: Any, key: Any, value: Any, **masks: Any) -> Any:
    return jax.nn.dot_product_attention(
      query,
      key,
      value,
      scale=self.scale,
      implementation=self.implementation,
      **masks,
    )

  def nothing(self, length: int) -> jax.Array:
    """Returns the output of queries that see no key."""
    return jnp.zeros_like(self.query[:, :length])

  def whole(self, first: int, last: int, window: int | None = None) -> Any:
    """Returns causal attention within a range of positions."""
    piece = slice(first, last)
    masks = {} if window is None else {"local_window_size": (window - 1, 0)}
    return self._attend(
      self.query[:, piece],
      self.key[:, piece],
      self.value[:, piece],
      is_causal=True,
      **masks,
    )

  def _pieces(self, x: jax.Array, first: int, length: int, num: int) -> Any:
    """Returns `[batch * num, length, heads, head_dim]`, 0 after the end."""
    x = x[:, first : first + num * length]
    missing = num * length - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))
    return x.reshape(-1, length, *x.shape[2:])

  def chunks(
    self, queries: int, keys: int, length: int, num: int, is_causal: bool
  ) -> jax.Array:
    """Returns attention of chunks of queries to chunks of keys.

    Args:
      queries: Position of the first chunk of queries.
      keys: Position of the first chunk of keys.
      length: Length of a chunk, in tokens.
      num: Number of chunks.
      is_causal: Whether slots are in order; otherwise all keys are seen.

    Returns:
      `[batch, num, length, heads, head_dim]`.
    """
    output = self._attend(
      self._pieces(self.query, queries, length, num),
      self._pieces(self.key, keys, length, num),
      self._pieces(self.value, keys, length, num),
      is_causal=is_causal,
    )
    return output.reshape(self.query.shape[0], num, *output.shape[1:])


def _by_token(chunks: jax.Array) -> jax.Array:
  return chunks.reshape(chunks.shape[0], -1, *chunks.shape[3:])


def _of_chunks(dense: _Dense, first: int, length: int) -> jax.Array:
  """Returns causal attention in chunks, starting at `first`."""
  num = -(-(dense.seq_len - first) // length)
  return _by_token(dense.chunks(first, first, length, num, True))


def _of_shifted_chunks(
  dense: _Dense, head: HeadPattern, boundary: str
) -> jax.Array:
  """Returns attention to chunks a whole number of chunks earlier."""
  length, shift = head.chunk_size or 0, head.shift
  unserved = min(shift, dense.seq_len)
  if boundary == "local":
    first = _of_chunks(dense, 0, length)[:, :unserved]
  else:
    first = dense.nothing(unserved)
  if dense.seq_len <= shift:
    return first
  num = -(-(dense.seq_len - shift) // length)
  others = dense.chunks(shift, 0, length, num, False)
  return jnp.concatenate([first, _by_token(others)], axis=1)


def _of_moved_chunks(dense: _Dense, length: int, shift: int) -> jax.Array:
  """Returns attention to chunks moved by less than their length.

  A chunk of queries sees the end of the previous chunk and the start of its
  own, `length` keys in all. Its last `shift` queries see them all. The others
  are the end of a causal square over these keys; the first `shift` rows of that
  square are computed in vain. The first chunk has no previous chunk.
  """
  rest = length - shift
  first = dense.whole(0, min(rest, dense.seq_len))
  parts = [first]
  if dense.seq_len > rest:
    seen = slice(0, rest)
    parts.append(
      dense._attend(
        dense.query[:, rest:length], dense.key[:, seen], dense.value[:, seen]
      )
    )
  if dense.seq_len > length:
    num = -(-(dense.seq_len - length) // length)
    begin = length - shift
    early = dense.chunks(begin, begin, length, num, True)[:, :, shift:]
    # Chunks of queries that start with the ones that see everything.
    late = dense.chunks(begin + length, begin, length, num, False)
    parts.append(
      _by_token(jnp.concatenate([early, late[:, :, :shift]], axis=2))
    )
  return jnp.concatenate(parts, axis=1)


def _attend(dense: _Dense, head: HeadPattern, boundary: str) -> jax.Array:
  """Returns the output of heads that share a pattern, perhaps with extra rows.

  Raises:
    NotImplementedError: The pattern is not dense attention on pieces.
  """
  length, shift = head.chunk_size, head.shift
  if length is None:
    if head.window is not None and shift:
      raise NotImplementedError("cudnn does not serve shifted windows.")
    return dense.whole(0, dense.seq_len, head.window)
  if head.window is not None:
    raise NotImplementedError("cudnn does not serve windows in chunks.")
  offset = head.offset % length
  if shift == 0:
    if offset == 0:
      return _of_chunks(dense, 0, length)
    parts = [dense.whole(0, min(offset, dense.seq_len))]
    if dense.seq_len > offset:
      parts.append(_of_chunks(dense, offset, length))
    return jnp.concatenate(parts, axis=1)
  if offset:
    raise NotImplementedError("cudnn does not serve a shift with an offset.")
  if shift % length == 0:
    return _of_shifted_chunks(dense, head, boundary)
  if shift < length:
    return _of_moved_chunks(dense, length, shift)
  raise NotImplementedError(
    f"cudnn serves shifts below chunk_size={length} and multiples of it, not"
    f" {shift}."
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
  dense_implementation: str = "cudnn",
) -> tuple[jax.Array, None]:
  """Returns the output, and no log-sum-exp; see `scca_jax.attention`.

  Args:
    query: `[batch, seq, heads, head_dim]`, bfloat16 or float16.
    key: `[batch, seq, kv_heads, head_dim]`.
    value: Like `key`.
    pattern: Which keys each query head sees, with causality "position".
    segment_ids: None.
    query_offset: 0.
    scale: Factor of the scores.
    dense_implementation: Implementation of the dense calls; "xla" runs
      anywhere.

  Raises:
    NotImplementedError: It cannot be made of dense calls without a mask.
  """
  del segment_ids, query_offset
  seq_len, num_heads = query.shape[1:3]
  group_size = num_heads // key.shape[2]
  groups = pattern.head_groups()
  outputs = []
  for head, heads in groups.items():
    indices = np.array(heads)
    kv_indices = indices // group_size
    # Whole GQA groups share their keys; other heads get a copy.
    if len(heads) % group_size == 0 and np.array_equal(
      indices.reshape(-1, group_size)[:, 0], np.unique(kv_indices) * group_size
    ):
      kv_indices = np.unique(kv_indices)
    dense = _Dense(
      take_heads(query, heads),
      take_heads(key, kv_indices.tolist()),
      take_heads(value, kv_indices.tolist()),
      scale,
      dense_implementation,
    )
    outputs.append(_attend(dense, head, pattern.boundary)[:, :seq_len])
  return join_heads(outputs, list(groups.values())), None
