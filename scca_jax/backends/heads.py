"""Shared by back ends: heads of arrays, the end of a softmax, `shard_map`."""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np


def _is_range(heads: Sequence[int]) -> bool:
  return list(heads) == list(range(heads[0], heads[0] + len(heads)))


def take_heads(x: jax.Array, heads: Sequence[int]) -> jax.Array:
  """Returns `x[:, :, heads]`, as a slice if the heads are neighbours.

  If a head is taken repeatedly, its gradient is summed in a fixed order, unlike
  with a scatter on a GPU.

  Args:
    x: `[batch, seq, heads, ...]`.
    heads: Indices, in any order.
  """
  heads = [int(head) for head in heads]
  if heads == list(range(x.shape[2])):
    return x
  if _is_range(heads):
    return x[:, :, heads[0] : heads[0] + len(heads)]
  unique = list(dict.fromkeys(heads))
  if len(unique) == len(heads):
    return jnp.take(
      x, np.array(heads), axis=2, mode="clip", unique_indices=True
    )
  repeats = len(heads) // len(unique)
  if heads == [head for head in unique for _ in range(repeats)]:
    return jnp.repeat(take_heads(x, unique), repeats, axis=2)
  # The first, the second, ... appearance of each head, so that none has a head
  # twice.
  seen: dict[int, int] = {}
  rounds: list[list[int]] = []
  for place, head in enumerate(heads):
    turn = seen[head] = seen.get(head, -1) + 1
    if turn == len(rounds):
      rounds.append([])
    rounds[turn].append(place)
  return join_heads(
    [take_heads(x, [heads[place] for place in turn]) for turn in rounds], rounds
  )


def join_heads(
  parts: Sequence[jax.Array], heads: Sequence[Sequence[int]]
) -> jax.Array:
  """Returns `[batch, seq, heads, ...]` from parts with some heads each.

  Args:
    parts: `[batch, seq, some heads, ...]`.
    heads: Indices of the heads of each part; each index occurs once.
  """
  order = [head for of_part in heads for head in of_part]
  joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)
  return take_heads(joined, np.argsort(order).tolist())


def kv_heads_of(heads: Sequence[int], group_size: int) -> list[int]:
  """Returns the key heads for a call with only some query heads.

  Each is returned once if equally many consecutive query heads share it;
  otherwise one is returned per query head.

  Args:
    heads: Query heads.
    group_size: Query heads that share a key head.
  """
  kv_heads = [head // group_size for head in heads]
  unique = list(dict.fromkeys(kv_heads))
  count = len(kv_heads) // len(unique)
  shared = [head for head in unique for _ in range(count)]
  return unique if kv_heads == shared else kv_heads


def safe_maximum(maximum: jax.Array) -> jax.Array:
  """Returns 0 for -inf, so that a row without keys avoids inf - inf."""
  return jnp.where(maximum == -jnp.inf, 0.0, maximum)


def finish_softmax(
  maximum: jax.Array, total: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the divisor of the weighted values, and the log-sum-exp.

  A row without keys is divided by 1, which keeps its 0, and has a log-sum-exp
  of -inf.

  Args:
    maximum: What was subtracted from the scores before `exp`; finite.
    total: Sum of the weights.
  """
  empty = total == 0
  total = jnp.where(empty, 1.0, total)
  return total, jnp.where(empty, -jnp.inf, maximum + jnp.log(total))


def combine(
  outputs: Sequence[jax.Array], log_sums: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Returns attention over all keys from attention over disjoint parts.

  The parts are weighted by their sums of exponentials (LongNet, Eq. 10 of arXiv
  2307.02486); a key in several parts counts several times.

  Args:
    outputs: `[batch, seq, heads, head_dim]` each.
    log_sums: Their log-sum-exps, float32 `[batch, seq, heads]` each.

  Returns:
    The output, and its log-sum-exp.
  """
  log_sum = jnp.stack(log_sums)
  # A query that no part serves has only -inf, and -inf - -inf must be avoided.
  maximum = jax.lax.stop_gradient(safe_maximum(jnp.max(log_sum, axis=0)))
  weights = jnp.exp(log_sum - maximum[None])
  total, combined = finish_softmax(maximum, jnp.sum(weights, axis=0))
  output = sum(
    (w / total)[..., None] * o.astype(jnp.float32)
    for w, o in zip(weights, outputs, strict=True)
  )
  return jnp.asarray(output).astype(outputs[0].dtype), combined


def vary_alike(arrays: Sequence[jax.Array | None]) -> list[jax.Array | None]:
  """Returns the arrays, all varying along the union of their mesh axes.

  Inside a `jax.shard_map` with `check_vma=True` the type of an array says along
  which axes it varies; loops and custom gradients must preserve it. The
  gradient of an array that all devices hold is then summed over them.
  """
  axes: set[str] = set()
  for x in arrays:
    if x is not None:
      axes |= varying_axes(x)
  return [x if x is None else _vary(x, axes) for x in arrays]


def vary_like(x: jax.Array, like: jax.Array) -> jax.Array:
  """Returns `x`, such as a loop's first carry, varying like `like`."""
  return _vary(x, varying_axes(like))


def varying_axes(x: jax.Array) -> frozenset[str]:
  """Returns the mesh axes along which an array's type says it varies."""
  return jax.typeof(x).manual_axis_type.varying


def _vary(x: jax.Array, axes: Iterable[str]) -> jax.Array:
  missing = tuple(sorted(set(axes) - varying_axes(x)))
  return jax.lax.pcast(x, missing, to="varying") if missing else x
