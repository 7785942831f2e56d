"""The definition of the attention, short and slow: one dense mask.

Every other implementation must agree with this one.
"""

import jax
import jax.numpy as jnp

from scca_jax.patterns import AttentionPattern


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

  Memory and time grow with `seq * kv_seq`, whatever the pattern.
  """
  seq_len, kv_len = query.shape[1], key.shape[1]
  group_size = query.shape[2] // key.shape[2]
  key = jnp.repeat(key, group_size, axis=2)
  value = jnp.repeat(value, group_size, axis=2)
  queries = jnp.arange(seq_len) + query_offset
  seen = pattern.seen(queries[:, None], jnp.arange(kv_len)[None, :], kv_len)
  seen = seen[None]  # [1, heads, seq, kv_seq]
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
  # sum are replaced before they could make a NaN.
  maximum = jnp.max(attention_logits, axis=-1, keepdims=True, initial=-jnp.inf)
  maximum = jax.lax.stop_gradient(jnp.where(maximum > -jnp.inf, maximum, 0))
  weights = jnp.exp(attention_logits - maximum)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  empty = total == 0
  total = jnp.where(empty, 1, total)
  output = jnp.einsum(
    "bhqk,bkhd->bqhd",
    weights / total,
    value,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=accumulator,
  )
  log_sum_exp = jnp.where(empty, -jnp.inf, maximum + jnp.log(total))
  return output.astype(query.dtype), log_sum_exp[..., 0].swapaxes(1, 2)
