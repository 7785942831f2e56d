"""Serves union heads as disjoint parts, for back ends without unions.

The first part of a head, its own chunk and the sinks become separate calls
(`patterns.union_parts`), combined by their log-sum-exp. Gradients are exact,
because back ends also differentiate their log-sum-exp.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from scca_jax import patterns
from scca_jax.backends.contract import Call
from scca_jax.backends.heads import (
  combine,
  finish_softmax,
  join_heads,
  kv_heads_of,
  safe_maximum,
  take_heads,
)
from scca_jax.patterns import Part

Run = Callable[[Call], tuple[jax.Array, jax.Array | None]]


def refuses(call: Call) -> str | None:
  """Returns why a call has no disjoint parts, or None if it has."""
  parts = patterns.union_parts(call.pattern)
  if any(part.before_chunk for part in parts):
    return "own_chunk cannot be separated from a shift below chunk_size"
  has_sinks = any(part.num_keys is not None for part in parts)
  if has_sinks and call.segment_ids is not None:
    return "sinks of segments cannot be separated"
  return None


def attend(
  call: Call, run: Run, at_start: Call | None = None
) -> tuple[jax.Array, jax.Array]:
  """Returns the output and the log-sum-exp of a call that `refuses` accepts.

  Args:
    call: The call.
    run: Serves the parts that are plain patterns, in order.
    at_start: The same call with the first keys of the sequence, for sinks, if
      `call` does not have them; None uses `call`.
  """
  parts = patterns.union_parts(call.pattern)
  at_start = call if at_start is None else at_start
  results = [
    _attend_part(call, part, run)
    if part.num_keys is None
    else _attend_first_keys(at_start, part)
    for part in parts
  ]
  # Heads that have the same parts are combined together.
  groups: dict[tuple[int, ...], list[int]] = {}
  for head in range(call.pattern.num_heads):
    having = tuple(i for i, part in enumerate(parts) if head in part.heads)
    groups.setdefault(having, []).append(head)
  combined = []
  for having, heads in groups.items():
    taken = [
      [
        take_heads(x, [parts[i].heads.index(head) for head in heads])
        for x in results[i]
      ]
      for i in having
    ]
    combined.append(
      taken[0]
      if len(taken) == 1
      else combine(*(list(x) for x in zip(*taken, strict=True)))
    )
  outputs, log_sums = zip(*combined, strict=True)
  order = list(groups.values())
  return join_heads(outputs, order), join_heads(log_sums, order)


def _attend_part(
  call: Call, part: Part, run: Run
) -> tuple[jax.Array, jax.Array]:
  """Returns attention of the heads of a part that is a plain pattern."""
  group_size = call.query.shape[2] // call.key.shape[2]
  kv_heads = kv_heads_of(part.heads, group_size)
  output, log_sum = run(
    dataclasses.replace(
      call,
      query=take_heads(call.query, part.heads),
      key=take_heads(call.key, kv_heads),
      value=take_heads(call.value, kv_heads),
      pattern=part.pattern,
      needs_log_sum=True,
    )
  )
  assert log_sum is not None
  return output, log_sum


def _attend_first_keys(call: Call, part: Part) -> tuple[jax.Array, jax.Array]:
  """Returns attention to the few keys at the start that a part counts.

  The scores of all queries and these keys are one array, which the backward
  pass recomputes.
  """
  seq_len, kv_len = call.query.shape[1], call.key.shape[1]
  num_keys = min(part.num_keys or 0, kv_len)
  group_size = call.query.shape[2] // call.key.shape[2]
  kv_heads = [head // group_size for head in part.heads]
  # Only the keys that count are passed.
  counted = dataclasses.replace(part, num_keys=None)
  exact = call.query.dtype == jnp.float32
  precision = jax.lax.Precision.HIGHEST if exact else None

  @jax.checkpoint
  def attend_dense(
    query: jax.Array, key: jax.Array, value: jax.Array, query_offset: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    queries = query_offset + jnp.arange(seq_len)[:, None]
    keys = jnp.arange(num_keys)[None, :]
    seen = counted.seen(queries, keys, kv_len)
    scores = call.scale * jnp.einsum(
      "bqhd,bkhd->bhqk",
      query,
      key,
      precision=precision,
      preferred_element_type=jnp.float32,
    )
    scores = jnp.where(seen[None], scores, -jnp.inf)
    maximum = jnp.max(scores, axis=-1, keepdims=True)
    maximum = jax.lax.stop_gradient(safe_maximum(maximum))
    weights = jnp.exp(scores - maximum)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total, log_sum = finish_softmax(maximum, total)
    output = jnp.einsum(
      "bhqk,bkhd->bqhd",
      (weights / total).astype(value.dtype),
      value,
      precision=precision,
      preferred_element_type=jnp.float32,
    )
    return output.astype(query.dtype), log_sum[..., 0].swapaxes(1, 2)

  return attend_dense(
    take_heads(call.query, part.heads),
    take_heads(call.key[:, :num_keys], kv_heads),
    take_heads(call.value[:, :num_keys], kv_heads),
    jnp.asarray(call.query_offset),
  )
