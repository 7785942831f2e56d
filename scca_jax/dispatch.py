"""`scca_jax.attention`: checks its arguments and computes attention.

`segment_attention` does the same one segment of a sequence at a time.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from scca_jax import parallel
from scca_jax.backends import heads, registry
from scca_jax.backends.contract import Call
from scca_jax.patterns import AttentionPattern, Mixture
from scca_jax.patterns import members as members_of
from scca_jax.segment_attention import Messages, Segment, attend_segment

IMPLEMENTATIONS = tuple(registry.BACK_ENDS)

available = registry.available
check_implementation = registry.check_implementation

# One pattern, or a mixture of several.
Patterns = (
  AttentionPattern
  | Mixture
  | tuple[AttentionPattern, ...]
  | list[AttentionPattern]
)


def _check_arrays(query: Any, key: Any, value: Any) -> None:
  for name, array in (("query", query), ("key", key), ("value", value)):
    if array.ndim != 4:
      raise ValueError(
        f"{name} must be [batch, seq, heads, head_dim], got {array.shape}."
      )
    if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
      raise ValueError(
        f"{name} must be float32, bfloat16 or float16, got {array.dtype}."
      )
    if array.dtype != query.dtype:
      raise ValueError(
        f"query, key and value must have the same dtype, got {query.dtype} and"
        f" {array.dtype}."
      )
  if key.shape != value.shape:
    raise ValueError(
      f"key and value must have the same shape, got {key.shape} and"
      f" {value.shape}."
    )
  if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
    raise ValueError(
      "query and key must agree in batch and head_dim, got"
      f" {query.shape} and {key.shape}."
    )
  if 0 in query.shape or 0 in key.shape:
    raise ValueError(f"empty query or key: {query.shape} and {key.shape}.")
  if query.shape[2] % key.shape[2]:
    raise ValueError(
      f"{query.shape[2]} query heads are not divisible by"
      f" {key.shape[2]} key/value heads."
    )


def check(
  query: Any,
  key: Any,
  value: Any,
  patterns: tuple[AttentionPattern, ...],
  segment_ids: Any = None,
  query_offset: Any = 0,
) -> None:
  """Checks the arguments of `attention`.

  Raises:
    ValueError: Shapes, dtypes or head counts do not fit.
  """
  _check_arrays(query, key, value)
  _check_rest(query, key, patterns, segment_ids, query_offset)


def _check_rest(
  query: Any, key: Any, patterns: Any, segment_ids: Any, query_offset: Any
) -> None:
  seq_len, kv_len = query.shape[1], key.shape[1]
  for pattern in patterns:
    if not isinstance(pattern, AttentionPattern):
      raise ValueError(
        "pattern must be an AttentionPattern, a Mixture or a sequence of"
        f" AttentionPatterns, got {pattern!r}."
      )
    if pattern.num_heads != query.shape[2]:
      raise ValueError(
        f"the pattern has {pattern.num_heads} heads, but the query has"
        f" {query.shape[2]}."
      )
  if not patterns:
    raise ValueError("pattern is an empty sequence: give at least one.")
  if segment_ids is not None:
    if segment_ids.shape != (key.shape[0], kv_len):
      raise ValueError(
        f"segment_ids must be {(key.shape[0], kv_len)}, [batch, kv_seq], got"
        f" {segment_ids.shape}."
      )
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
      raise ValueError(
        f"segment_ids must be integers, got {segment_ids.dtype}."
      )
  if isinstance(query_offset, int):
    if query_offset < 0 or query_offset + seq_len > kv_len:
      raise ValueError(
        f"{seq_len} queries starting at query_offset={query_offset} must lie"
        f" within the {kv_len} positions of the keys."
      )
  elif jnp.ndim(query_offset) or not jnp.issubdtype(
    jnp.result_type(query_offset), jnp.integer
  ):
    raise ValueError(f"query_offset must be an integer, got {query_offset!r}.")


@overload
def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  pattern: Patterns,
  *,
  segment_ids: jax.Array | None = None,
  query_offset: int | jax.Array = 0,
  scale: float | None = None,
  implementation: str | Sequence[str] | None = None,
  deterministic: bool = False,
  mesh: Mesh | None = None,
  return_lse: Literal[False] = False,
) -> jax.Array: ...


@overload
def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  pattern: Patterns,
  *,
  segment_ids: jax.Array | None = None,
  query_offset: int | jax.Array = 0,
  scale: float | None = None,
  implementation: str | Sequence[str] | None = None,
  deterministic: bool = False,
  mesh: Mesh | None = None,
  return_lse: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  pattern: Patterns,
  *,
  segment_ids: jax.Array | None = None,
  query_offset: int | jax.Array = 0,
  scale: float | None = None,
  implementation: str | Sequence[str] | None = None,
  deterministic: bool = False,
  mesh: Mesh | None = None,
  return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Returns causal softmax attention over the keys that `pattern` allows.

  Scores, softmax and sums are float32 whatever the dtype of the inputs. A query
  that sees no key gets exactly 0, a log-sum-exp of -inf and gradients of
  exactly 0. Only reverse-mode derivatives are available; forward mode
  (`jax.jvp`) needs `implementation="reference"`.

  Args:
    query: `[batch, seq, heads, head_dim]`, float32, bfloat16 or float16.
    key: `[batch, kv_seq, kv_heads, head_dim]`; query head `h` reads key head
      `h // (heads / kv_heads)`.
    value: Like `key`.
    pattern: Which keys each query head sees. The results of several patterns
      are combined by their log-sum-exp (LongNet's mixture, arXiv 2307.02486).
    segment_ids: Integers `[batch, kv_seq]`: positions of different segments
      never see each other; segment 0, padding, sees nothing and is seen by
      nothing.
    query_offset: Position of the first query, for decoding with a cache: keys
      have positions from 0, queries from `query_offset`.
    scale: Factor of the scores; None uses `head_dim ** -0.5`.
    implementation: "reference" (one dense mask), "xla" (any device), "cudnn",
      "triton" or "mosaic", or several of them, tried in order; None uses the
      best that can serve the call: "mosaic" on Hopper GPUs, "triton" on other
      GPUs since Ampere, otherwise "xla". A fallback, and the reason for it, is
      logged once.
    deterministic: Whether gradients must be bit-equal from run to run on one
      device. "cudnn" cannot promise that, and it makes "mosaic" slower, which
      otherwise accumulates the query's gradient in varying order.
    mesh: From `sharding.make_mesh`: sequences are divided along `data` and
      `fsdp`, heads along `tensor`, tokens along `sequence`; what cannot be
      divided is computed by every device. None means one device.
    return_lse: Whether to return the log-sum-exp of the scores as well.

  Returns:
    The output, like `query`; with `return_lse` also the log-sum-exp, float32
    `[batch, seq, heads]`.

  Raises:
    ValueError: Shapes, dtypes or head counts do not fit, or an implementation
      is unknown.
    NotImplementedError: The implementation asked for cannot serve the call.
  """
  members = members_of(pattern)
  check(query, key, value, members, segment_ids, query_offset)
  back_ends = registry.resolve(implementation)
  attend = functools.partial(registry.attend, back_ends=back_ends)
  if mesh is not None:
    attend = functools.partial(parallel.attend, mesh=mesh, back_ends=back_ends)
  results = [
    attend(
      Call(
        query=query,
        key=key,
        value=value,
        pattern=member.within(key.shape[1]),
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        segment_ids=segment_ids,
        query_offset=query_offset,
        needs_log_sum=return_lse or len(members) > 1,
        deterministic=deterministic,
      )
    )
    for member in members
  ]
  output, log_sum_exp = results[0]
  if len(results) > 1:
    output, log_sum_exp = heads.combine(*zip(*results, strict=True))
  if not return_lse:
    return output
  assert log_sum_exp is not None
  return output, log_sum_exp


def segment_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  pattern: Patterns,
  segment: Segment,
  received: Messages,
  *,
  implementation: str | Sequence[str] | None = None,
  deterministic: bool = False,
) -> tuple[jax.Array, Messages]:
  """Returns attention of one segment of a sequence, and what later ones need.

  Called for one segment after the other, it gives the results of `attention` on
  the whole sequence.

  Args:
    query: Queries of the segment, `[batch, length, heads, head_dim]`.
    key: Likewise, `[batch, length, kv_heads, head_dim]`.
    value: Like `key`.
    pattern: As for `attention`; its positions are those in the sequence.
    segment: Which segment this is.
    received: What earlier segments sent; for the first segment,
      `segment_attention.no_messages`.
    implementation: See `attention`.
    deterministic: See `attention`.

  Raises:
    ValueError: Shapes, dtypes or head counts do not fit.
    NotImplementedError: The pattern needs more from earlier segments than is
      kept, or the implementation cannot serve the call.
  """
  members = members_of(pattern)
  ids = None
  if segment.document_ids is not None:
    ids = segment.ids_before(0, query.shape[0])
  check(query, key, value, members, ids)
  results, sent = attend_segment(
    [
      Call(
        query=query,
        key=key,
        value=value,
        pattern=member,
        scale=query.shape[-1] ** -0.5,
        segment_ids=ids,
        needs_log_sum=len(members) > 1,
        deterministic=deterministic,
      )
      for member in members
    ],
    segment,
    received,
    registry.resolve(implementation),
  )
  output = results[0][0]
  if len(results) > 1:
    output, _ = heads.combine(*zip(*results, strict=True))
  return output, sent
