"""Implementations of `scca_jax.attention`, one module each.

Every module that is there has one function,

    attention(query, key, value, pattern, *, segment_ids, query_offset, scale)
        -> (output, log-sum-exp)

for one `AttentionPattern`, with the shapes of `scca_jax.attention`, the
log-sum-exp in float32 `[batch, seq, heads]`. It raises NotImplementedError for
what it cannot serve, before it computes anything.
"""
