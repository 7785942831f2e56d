"""`attention`: checks its arguments and chooses an implementation."""

import functools
import importlib
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from absl import logging

from scca_jax import target
from scca_jax.patterns import AttentionPattern, Mixture, members

IMPLEMENTATIONS = ("reference", "xla", "cudnn", "triton", "mosaic")

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
        f"query, key and value must have one dtype, got {query.dtype} and"
        f" {array.dtype}."
      )
  if key.shape != value.shape:
    raise ValueError(
      f"key and value must have one shape, got {key.shape} and {value.shape}."
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
      f"{query.shape[2]} query heads are no multiple of"
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
        f"the pattern has {pattern.num_heads} heads, the query"
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
        f"{seq_len} queries from query_offset={query_offset} on must lie in the"
        f" {kv_len} positions of the keys."
      )
  elif jnp.ndim(query_offset) or not jnp.issubdtype(
    jnp.result_type(query_offset), jnp.integer
  ):
    raise ValueError(f"query_offset must be an integer, got {query_offset!r}.")


def available() -> tuple[str, ...]:
  """Returns the implementations that the device can run, best first.

  The device is that of `target.current`. `cudnn` serves few calls, so it is
  never chosen where it was not asked for, and not among them.
  """
  capability = target.current().compute_capability
  if capability[0] == 9:
    return ("mosaic", "triton", "xla", "reference")
  if capability >= (8, 0):
    return ("triton", "xla", "reference")
  return ("xla", "reference")


def check_implementation(implementation: str | None) -> None:
  """Checks a name early, before anything is computed.

  Raises:
    ValueError: The name is unknown.
    NotImplementedError: The device cannot run it.
  """
  if implementation is None:
    return
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"unknown implementation {implementation!r}: use one of"
      f" {', '.join(IMPLEMENTATIONS)}."
    )
  device = target.current()
  least = {"cudnn": (8, 0), "triton": (8, 0), "mosaic": (9, 0)}.get(
    implementation, (0, 0)
  )
  if device.compute_capability < least:
    raise NotImplementedError(
      f"{implementation} needs a GPU of compute capability"
      f" {'.'.join(map(str, least))}, and this is {device.kind}: use one of"
      f" {', '.join(available())}."
    )


@functools.cache
def _tell_once(chosen: str, reasons: tuple[str, ...]) -> None:
  """Says what was chosen in place of something faster."""
  logging.warning(
    "attention falls back to %s here: %s", chosen, " ".join(reasons)
  )


def _run_one(
  name: str, needs_log_sum: bool, *args: Any, **kwargs: Any
) -> tuple[jax.Array, Any]:
  # Only what is used is imported: kernels need libraries of their GPU.
  try:
    module = importlib.import_module(f"scca_jax.backends.{name}")
  except ImportError as error:
    raise NotImplementedError(
      f"{name} does not work with jax {jax.__version__}: {error}."
    ) from error
  pattern = args[3]
  if name != "reference" and any(head.is_union for head in pattern.heads):
    raise NotImplementedError(f"{name} does not serve own_chunk and sinks.")
  output, log_sum = module.attention(*args, **kwargs)
  if log_sum is None and needs_log_sum:
    raise NotImplementedError(f"{name} gives no log-sum-exp.")
  return output, log_sum


def _run(
  implementation: str | None, needs_log_sum: bool, *args: Any, **kwargs: Any
) -> tuple[jax.Array, Any]:
  """Runs the implementation asked for, or the best that can serve the call."""
  names = available() if implementation is None else (implementation,)
  reasons: list[str] = []
  for name in names[:-1]:
    try:
      result = _run_one(name, needs_log_sum, *args, **kwargs)
    except NotImplementedError as error:
      reasons.append(str(error))
      continue
    if reasons:
      _tell_once(name, tuple(reasons))
    return result
  return _run_one(names[-1], needs_log_sum, *args, **kwargs)


def combine(
  outputs: list[jax.Array], log_sums: list[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Returns the mixture weighted by sums of exponentials (LongNet, Eq. 10)."""
  log_sum = jnp.stack(log_sums)
  maximum = jnp.max(log_sum, axis=0)
  # A query that no pattern serves has only -inf, which must not meet itself.
  maximum = jax.lax.stop_gradient(jnp.where(maximum > -jnp.inf, maximum, 0))
  weights = jnp.exp(log_sum - maximum[None])
  total = jnp.sum(weights, axis=0)
  empty = total == 0
  total = jnp.where(empty, 1, total)
  output = sum(
    (w / total)[..., None] * o.astype(jnp.float32)
    for w, o in zip(weights, outputs, strict=True)
  )
  return (
    jnp.asarray(output).astype(outputs[0].dtype),
    jnp.where(empty, -jnp.inf, maximum + jnp.log(total)),
  )


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
  implementation: str | None = None,
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
  implementation: str | None = None,
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
  implementation: str | None = None,
  return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Returns causal softmax attention over the keys that `pattern` shows.

  Scores, softmax and sums are float32 whatever the dtype of the inputs. A
  query that sees no key gets exactly 0, a log-sum-exp of -inf and gradients of
  exactly 0.

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
      have positions from 0, queries from `query_offset` on.
    scale: Factor of the scores; None takes `head_dim ** -0.5`.
    implementation: "reference" (one dense mask), "xla" (any device), "cudnn",
      "triton" or "mosaic"; None takes the best that can serve the call:
      "mosaic" on Hopper GPUs, "triton" on other GPUs from Ampere on, else
      "xla". What it falls back to, and why, is logged once.
    return_lse: Whether to return the log-sum-exp of the scores as well.

  Returns:
    The output, like `query`; with `return_lse` also the log-sum-exp, float32
    `[batch, seq, heads]`.

  Raises:
    ValueError: Shapes, dtypes or head counts do not fit, or the
      implementation is unknown.
    NotImplementedError: The implementation asked for cannot serve the call.
  """
  patterns = members(pattern)
  check(query, key, value, patterns, segment_ids, query_offset)
  check_implementation(implementation)
  results = [
    _run(
      implementation,
      return_lse or len(patterns) > 1,
      query,
      key,
      value,
      one,
      segment_ids=segment_ids,
      query_offset=query_offset,
      scale=query.shape[-1] ** -0.5 if scale is None else scale,
    )
    for one in patterns
  ]
  if len(results) == 1:
    output, log_sum_exp = results[0]
  else:
    outputs, log_sums = zip(*results, strict=True)
    output, log_sum_exp = combine(list(outputs), list(log_sums))
  return (output, log_sum_exp) if return_lse else output
