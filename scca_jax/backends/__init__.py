"""Implementations of `scca_jax.attention`, one module each.

Each of these modules has a function

    attention(query, key, value, pattern, *, segment_ids, query_offset, scale)
        -> (output, log-sum-exp)

for one `AttentionPattern`, with the shapes of `scca_jax.attention`, the
log-sum-exp in float32 `[batch, seq, heads]`. It raises NotImplementedError for
calls that it cannot serve, before computing anything.
"""
