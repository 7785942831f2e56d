"""Ring attention with equal work for all devices.

Keys and values go round the devices that share a sequence, and in each turn a
device attends from its queries to those that it holds (arXiv 2310.01889). Only
earlier keys count, so in the order of the sequence the last device would have
twice the mean work. Therefore the sequence is cut into two pieces per device,
and device `i` of `n` takes pieces `i` and `2n - 1 - i`, as in Llama 3's
training (arXiv 2407.21783, section 3.3.2). In each turn it then has two pairs
of pieces in which all keys are earlier than all queries:

* pieces from a device before it: both of its own with the lower of the two;
* pieces from a device behind it: the higher of its own with both.

Results are combined by their log-sum-exp. The backward pass goes round once
more with keys, values and their gradients, and computes each pair again, so
that memory is that of one shard, whatever the number of devices.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from scca_jax.backends.contract import SAVED
from scca_jax.backends.heads import combine, safe_maximum
from scca_jax.patterns import AttentionPattern, HeadPattern

# Attention within a call: query, key and value `[batch, seq, heads, head_dim]`
# and segment ids `[batch, seq]` or None, to the output and the log-sum-exp.
Attend = Callable[..., tuple[jax.Array, ...]]


@dataclasses.dataclass(frozen=True)
class Ring:
  """How the devices of a ring attend.

  Attributes:
    axis: Mesh axis of the sequence.
    num_devices: Its size.
    attend_own: Attention from a device's two pieces to themselves.
    attend_pair: Attention from the second half of a sequence to its first half,
      by the patterns of `pair_pattern`.
  """

  axis: str
  num_devices: int
  attend_own: Attend
  attend_pair: Attend


def pair_pattern(
  head: HeadPattern, pattern: AttentionPattern, piece: int
) -> HeadPattern | None:
  """Returns a pattern by which one piece sees an earlier one, or None.

  The earlier piece is the first half of a sequence, and the queries are the
  second half. None means that the head cannot be served by a ring: what a query
  sees depends on more than the distance modulo the dilation.

  Args:
    head: A head of the pattern.
    pattern: The pattern.
    piece: Tokens of a piece.
  """
  if (
    pattern.causality == "slot"
    or head.in_use() - {"dilation", "shift", "select"}
    or (pattern.boundary == "local" and head.shift)
    or piece % head.dilation
  ):
    return None
  # The first key moves to the first query, and the first key of the second half
  # out of the chunk.
  size = piece + head.shift % head.dilation
  return dataclasses.replace(
    head, chunk_size=size, shift=size, offset=piece % size
  )


def bytes_received(
  num_heads: int,
  num_kv_heads: int,
  *,
  num_devices: int,
  length: int,
  head_dim: int,
  itemsize: int,
  backward: bool,
) -> int:
  """Returns the bytes that a device receives for one sequence.

  Args:
    num_heads: Query heads.
    num_kv_heads: Key heads.
    num_devices: Devices of the ring.
    length: Tokens per device.
    head_dim: Length of a head.
    itemsize: Bytes per element.
    backward: Whether to count the backward pass instead of the forward pass.
  """
  token = head_dim * length
  keys = 2 * num_kv_heads * token
  # Queries, keys, values and outputs change places, then keys and values go
  # round. Their gradients do in float32, but for the last turn.
  received = (2 * num_heads * token + keys + num_devices * keys) * itemsize
  return received + backward * keys * (4 * (num_devices - 1) + itemsize)


def attend(
  ring: Ring,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
  *,
  needs_log_sum: bool,
) -> tuple[jax.Array, ...]:
  """Returns a device's output, and the log-sum-exp if needed.

  Args:
    ring: The devices.
    query: The device's shard of the sequence, `[batch, length, heads,
      head_dim]`; the length is even.
    key: `[batch, length, kv_heads, head_dim]`.
    value: Like `key`.
    segment_ids: `[batch, length]`, or None.
    needs_log_sum: Whether the log-sum-exp is needed.
  """
  heads = [query.shape[2], query.shape[2] + key.shape[2]]
  joined = jnp.concatenate([query, key, value], axis=2)
  query, key, value = jnp.split(_deal(ring, joined), heads, axis=2)
  if segment_ids is not None:
    segment_ids = _deal(ring, segment_ids)
  output, log_sum = _go_round(ring, query, key, value, segment_ids)
  result = (output, log_sum) if needs_log_sum else (output,)
  return tuple(_undo(ring, x) for x in result)


# Pieces.


def _moves(ring: Ring, odd: int) -> list[tuple[int, int]]:
  """Returns where pieces with even or odd numbers go: (from, to)."""
  last = 2 * ring.num_devices - 1
  pieces = range(odd, last + 1, 2)
  return [(piece // 2, min(piece, last - piece)) for piece in pieces]


def _sort(
  ring: Ring, first: jax.Array, second: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns two pieces, the even before the odd one from lower and higher.

  It is its own inverse: on devices with odd numbers they change places.
  """
  is_even = lax.axis_index(ring.axis) % 2 == 0
  return jnp.where(is_even, first, second), jnp.where(is_even, second, first)


def _deal(ring: Ring, x: jax.Array) -> jax.Array:
  """Returns the device's two pieces of a sequence, `[batch, length, ...]`."""
  moved = [
    lax.ppermute(part, ring.axis, _moves(ring, odd))
    for odd, part in enumerate(jnp.split(x, 2, axis=1))
  ]
  return jnp.concatenate(_sort(ring, *moved), axis=1)


def _undo(ring: Ring, x: jax.Array) -> jax.Array:
  """Undoes `_deal`."""
  parts = _sort(ring, *jnp.split(x, 2, axis=1))
  moved = [
    lax.ppermute(part, ring.axis, [(b, a) for a, b in _moves(ring, odd)])
    for odd, part in enumerate(parts)
  ]
  return jnp.concatenate(moved, axis=1)


def _queries(x: jax.Array, from_before: jax.Array) -> jax.Array:
  """Returns the piece of queries of each pair, `[2 * batch, piece, ...]`."""
  lower, higher = jnp.split(x, 2, axis=1)
  return jnp.concatenate([jnp.where(from_before, lower, higher), higher])


def _keys(x: jax.Array, from_before: jax.Array) -> jax.Array:
  """Returns the piece of keys of each pair, `[2 * batch, piece, ...]`."""
  lower, higher = jnp.split(x, 2, axis=1)
  return jnp.concatenate([lower, jnp.where(from_before, lower, higher)])


def _attend_pairs(
  ring: Ring,
  from_before: jax.Array,
  ids: tuple[jax.Array, jax.Array] | None,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
) -> tuple[jax.Array, ...]:
  """Returns the results of both pairs, `[2 * batch, piece, heads, ...]`."""
  query = _queries(query, from_before)
  key, value = _keys(key, from_before), _keys(value, from_before)
  piece = query.shape[1]
  before, after = ((0, 0), (piece, 0)), ((0, 0), (0, piece))
  rest = ((0, 0), (0, 0))
  both = None
  if ids is not None:
    both = jnp.concatenate(
      [_keys(ids[1], from_before), _queries(ids[0], from_before)], axis=1
    )
  result = ring.attend_pair(
    jnp.pad(query, before + rest),
    jnp.pad(key, after + rest),
    jnp.pad(value, after + rest),
    both,
  )
  return tuple(x[:, piece:] for x in result)


# Turns.


def _next(ring: Ring, tree: Any) -> Any:
  """Returns what the device before holds."""
  count = ring.num_devices
  moves = [(i, (i + 1) % count) for i in range(count)]
  return jax.tree.map(lambda x: lax.ppermute(x, ring.axis, moves), tree)


def _turns(
  ring: Ring, step: Callable[[jax.Array, Any], Any], state: Any
) -> Any:
  """Returns the state after all turns.

  Args:
    ring: The devices.
    step: Takes whether the keys come from a device before, and the state.
    state: The first state.
  """
  index = lax.axis_index(ring.axis)

  def turn(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
    number, state = carry
    return number + 1, step(number <= index, state)

  # Not a scan, which `jax.checkpoint` would split (see `backends.xla_strips`).
  return lax.while_loop(
    lambda carry: carry[0] < ring.num_devices, turn, (jnp.int32(1), state)
  )[1]


def _forward(
  ring: Ring,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Returns output and log-sum-exp of a device's two pieces."""
  arriving = _next(ring, (key, value, segment_ids))
  output, log_sum = ring.attend_own(query, key, value, segment_ids)

  def step(from_before: jax.Array, state: Any) -> Any:
    held, output, log_sum = state
    arriving = _next(ring, held)
    key, value, key_ids = held
    ids = None if segment_ids is None else (segment_ids, key_ids)
    parts, part_sums = _attend_pairs(ring, from_before, ids, query, key, value)
    of_lower, of_higher = zip(
      *(jnp.split(x, 2, axis=1) for x in (output, log_sum)), strict=True
    )
    first, second = zip(
      *(jnp.split(x, 2) for x in (parts, part_sums)), strict=True
    )
    lower = combine(
      [of_lower[0], first[0]],
      [of_lower[1], jnp.where(from_before, first[1], -jnp.inf)],
    )
    higher = combine(
      [of_higher[0], first[0], second[0]],
      [
        of_higher[1],
        jnp.where(from_before, -jnp.inf, first[1]),
        second[1],
      ],
    )
    output, log_sum = (
      jnp.concatenate(x, axis=1) for x in zip(lower, higher, strict=True)
    )
    return arriving, output, log_sum

  state = (arriving, output.astype(jnp.float32), log_sum)
  _, output, log_sum = _turns(ring, step, state)
  return output.astype(query.dtype), log_sum


_go_round = jax.custom_vjp(_forward, nondiff_argnums=(0,))


def _save(ring: Ring, query, key, value, segment_ids):
  result = _forward(ring, query, key, value, segment_ids)
  result = checkpoint_name(result, SAVED)
  return result, (query, key, value, segment_ids, *result)


def _backward(ring: Ring, saved: Any, cotangents: Any) -> Any:
  query, key, value, segment_ids, output, log_sum = saved
  rows = (
    output.astype(jnp.float32),
    safe_maximum(log_sum),
    cotangents[0].astype(jnp.float32),
    cotangents[1],
  )

  def gradients(function: Callable[..., Any], rows: Any, *arrays: jax.Array):
    """Returns the gradients of a part, by its weight in the whole."""
    (part, part_sum), pull = jax.vjp(function, *arrays)
    output, log_sum, d_output, d_log_sum = rows
    weight = jnp.exp(part_sum - log_sum)
    d_weight = jnp.sum(d_output * (part.astype(jnp.float32) - output), axis=-1)
    found = pull(
      (
        (weight[..., None] * d_output).astype(part.dtype),
        weight * (d_weight + d_log_sum),
      )
    )
    return tuple(x.astype(jnp.float32) for x in found)

  def step(from_before: jax.Array, state: Any) -> Any:
    held, d_query, *d_held = state
    # Travel while the pairs are computed.
    arriving, d_held = _next(ring, held), _next(ring, d_held)
    key, value, key_ids = held
    found = gradients(
      functools.partial(
        _attend_pairs,
        ring,
        from_before,
        None if segment_ids is None else (segment_ids, key_ids),
      ),
      [_queries(x, from_before) for x in rows],
      query,
      key,
      value,
    )
    d_held = [a + b for a, b in zip(d_held, found[1:], strict=True)]
    return arriving, d_query + found[0], *d_held

  arriving = _next(ring, (key, value, segment_ids))
  own = gradients(
    lambda q, k, v: ring.attend_own(q, k, v, segment_ids),
    rows,
    query,
    key,
    value,
  )
  _, d_query, *d_held = _turns(ring, step, (arriving, *own))
  d_query, *d_held = (x.astype(query.dtype) for x in (d_query, *d_held))
  return d_query, *_next(ring, d_held), None


_go_round.defvjp(_save, _backward)
