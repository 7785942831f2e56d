"""The definition of the attention, short and slow: one dense mask.

Every other implementation must agree with this one.
"""

import jax
import jax.numpy as jnp

from scca_jax.backends.heads import finish_softmax, safe_maximum
from scca_jax.patterns import AttentionPattern


def segment_starts(segment_ids: jax.Array) -> jax.Array:
  """Returns the position at which each token's segment starts.

  A segment is a run of equal ids.

  Args:
    segment_ids: Integers `[batch, seq]`.

  Returns:
    An int32 array `[batch, seq]`.
  """
  begins = segment_ids[:, 1:] != segment_ids[:, :-1]
  places = jnp.where(begins, jnp.arange(1, segment_ids.shape[1]), 0)
  places = jnp.pad(places.astype(jnp.int32), ((0, 0), (1, 0)))
  return jax.lax.cummax(places, axis=1)


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

  Memory and time grow with `seq * kv_seq`, whatever the pattern. Segments are
  contiguous: if an id appears again later, a new segment starts there, with its
  own sinks.
  """
  seq_len, kv_len = query.shape[1], key.shape[1]
  group_size = query.shape[2] // key.shape[2]
  key = jnp.repeat(key, group_size, axis=2)
  value = jnp.repeat(value, group_size, axis=2)
  queries = jnp.arange(seq_len) + query_offset
  starts = jnp.zeros((1, kv_len), jnp.int32)
  if segment_ids is not None and any(head.sinks for head in pattern.heads):
    starts = segment_starts(segment_ids)
  seen = pattern.seen(
    queries[None, :, None],
    jnp.arange(kv_len)[None, None, :],
    kv_len,
    starts=starts[:, None, :],
  )
  seen = seen.swapaxes(0, 1)  # [batch or 1, heads, seq, kv_seq]
  accumulator = jnp.promote_types(query.dtype, jnp.float32)
  if segment_ids is not None:
    of_query = jax.lax.dynamic_slice_in_dim(
      segment_ids, query_offset, seq_len, axis=1
    )
    same = of_query[:, :, None] == segment_ids[:, None, :]
    seen = seen & (same & (segment_ids != 0)[:, None, :])[:, None]

  # Exact products: CPU and GPU may round float32 operands otherwise.
  attention_logits = scale * jnp.einsum(
    "bqhd,bkhd->bhqk",
    query,
    key,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=accumulator,
  )
  attention_logits = jnp.where(seen, attention_logits, -jnp.inf)
  # A query without keys gets weights of 0 and no gradient: its maximum and its
  # sum are replaced before they can produce a NaN.
  maximum = jnp.max(attention_logits, axis=-1, keepdims=True, initial=-jnp.inf)
  maximum = jax.lax.stop_gradient(safe_maximum(maximum))
  weights = jnp.exp(attention_logits - maximum)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  total, log_sum_exp = finish_softmax(maximum, total)
  output = jnp.einsum(
    "bhqk,bkhd->bqhd",
    weights / total,
    value,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=accumulator,
  )
  return output.astype(query.dtype), log_sum_exp[..., 0].swapaxes(1, 2)
