"""Attention over a mesh of devices: sequences, heads and pieces of sequences.

Every device runs an ordinary `scca_jax.attention` on what it has. Sequences and
heads need nothing from each other. Where a sequence is cut in pieces, a head's
pattern says what a piece needs of the others:

* chunks within a piece need nothing;
* a head that looks back by less than a piece needs the keys just in front of
  it, a *halo*: half a chunk for `scca_fixed` and S2, the reach of a window;
* a head shifted by `s` tokens, a chunk or more, needs one piece's length of
  keys, from `s` tokens before it (`scca_flow`);
* a head that sees the whole sequence, dense or dilated, is exchanged: each
  device gets all tokens of some of those heads (DeepSpeed-Ulysses, arXiv
  2309.14509).

Keys from in front are put before the piece's own, with as many idle queries:
borders, shifts and distances stay what they are, positions stay in order, and
any implementation can serve the call. A halo is for the first few queries of a
piece alone: all are served by its own keys, then those once more, with a halo
in front. Where those are most of a piece, or all, one call does it, and segment
0 hides what would lie before the first token. Gradients go back the way the
keys came.

All that goes from a device to another one so many pieces on is one message, a
`ppermute`, whatever heads it is for. Where devices have heads of different
patterns (`tensor`), each takes its own branch; messages are of one size.

The module is long because what is planned, sent and computed must agree to the
token, and is read best side by side.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from scca_jax import sharding
from scca_jax.backends import registry, unions
from scca_jax.backends.contract import BackEnd, Call
from scca_jax.backends.heads import join_heads, kv_heads_of, take_heads
from scca_jax.patterns import (
  AttentionPattern,
  Boundary,
  HeadPattern,
  union_parts,
)

# Fields of a head that `_local_pattern` knows; a head that uses another one is
# exchanged whole.
_LOCAL_FIELDS = frozenset(
  {"chunk_size", "offset", "shift", "dilation", "window", "select"}
)
# What a place without a head attends to: little.
_IDLE = HeadPattern(window=1)


@dataclasses.dataclass(frozen=True)
class _Cut:
  """How a sequence is cut.

  Attributes:
    num_pieces: Pieces, one a device along the axis `sequence`.
    length: Tokens of a piece.
  """

  num_pieces: int
  length: int


@dataclasses.dataclass(frozen=True)
class _Front:
  """Keys that a piece needs of those before it.

  Attributes:
    start: They begin so many tokens before the piece.
    length: Tokens, at most a piece.
    kv_heads: Key heads.
  """

  start: int
  length: int
  kv_heads: tuple[int, ...]

  def sources(self, cut: _Cut) -> list[tuple[int, int, int]]:
    """Returns where they are, the first ones first.

    Each is how many pieces before this one, first and last token there.
    """
    found = []
    for distance in range(-(-self.start // cut.length), -1, -1):
      first = max(0, distance * cut.length - self.start)
      last = min(cut.length, distance * cut.length - self.start + self.length)
      if first < last:
        found.append((distance, first, last))
    return found


@dataclasses.dataclass(frozen=True)
class _Part:
  """Query heads that one local call serves.

  Attributes:
    heads: Their numbers on the device.
    patterns: What each attends to among its front and the piece.
    starts: Where the front of each begins, in tokens before the piece.
    length: Of the fronts, in tokens; 0 is none.
    num_queries: Of the piece, from its first on; 0 is all.
    boundary: See `AttentionPattern`.
  """

  heads: tuple[int, ...]
  patterns: tuple[HeadPattern, ...]
  starts: tuple[int, ...]
  length: int
  num_queries: int = 0
  boundary: Boundary = "drop"


@dataclasses.dataclass(frozen=True)
class _Plan:
  """How a device serves its heads.

  Attributes:
    parts: Local calls, each head in one.
    firsts: Local calls for the first queries of heads of the part without a
      front, in all pieces but the first.
    fallbacks: Those heads of `boundary="local"` that some queries meet without
      a shift, a call more; and their own patterns, which say which queries.
    whole: Heads that must have the whole sequence.
    fronts: What the calls need from in front.
  """

  parts: tuple[_Part, ...]
  firsts: tuple[_Part, ...]
  fallbacks: tuple[tuple[int, HeadPattern], ...]
  whole: tuple[int, ...]
  fronts: tuple[_Front, ...]


def _local_pattern(
  head: HeadPattern, pattern: AttentionPattern, cut: _Cut
) -> tuple[HeadPattern, int, int, int] | None:
  """Returns what a head is behind a front, and of that the start and length.

  The last is how many queries of a piece need the front, from the first on.
  None if the head needs the whole sequence.
  """
  size, length = head.chunk_size, cut.length
  if pattern.causality == "slot" or head.in_use() - _LOCAL_FIELDS:
    return None
  if head.select is not None and length % head.dilation:
    return None
  if size is None:
    falls_back = pattern.boundary == "local" and head.dilation > 1
    if head.window is None or (falls_back and head.shift):
      return None
    start = front = queries = head.shift + (head.window - 1) * head.dilation
  elif length % size:
    return None
  elif head.offset % size == 0:
    start = head.shift
    # A shift below a chunk leaves order to positions: the piece's own keys must
    # lie where they are. From a chunk on all that is in reach comes earlier.
    front, queries = (start, size) if start < size else (length, length)
  elif head.shift == 0:
    start = front = -head.offset % size
    queries = head.offset % size
  else:
    return None
  if front > length:
    return None
  local = dataclasses.replace(
    head,
    offset=0 if size is None else (head.offset + front) % size,
    # Of chunks, from the first query to the first key of the front.
    shift=front if head.shift and size is not None else head.shift,
    select=None
    if head.select is None
    else (head.select + front) % head.dilation,
  )
  return local, start, front, queries


def _plan(
  pattern: AttentionPattern,
  heads: Sequence[int],
  group_size: int,
  cut: _Cut,
) -> _Plan:
  """Returns how a device serves some heads of a pattern.

  Args:
    pattern: Of all heads.
    heads: Those of the device; it numbers them from 0.
    group_size: Query heads to a key head.
    cut: Of the sequence.
  """
  whole: list[int] = []
  fallbacks: list[tuple[int, HeadPattern]] = []
  # By length of their fronts, number of queries, and what they share.
  calls: dict[Any, list[tuple[int, HeadPattern, int]]] = {}
  for place, index in enumerate(heads):
    head = pattern.heads[index]
    found = _local_pattern(head, pattern, cut)
    if found is None:
      whole.append(place)
      continue
    local, start, front, queries = found
    if front == 0 or 2 * queries <= cut.length:
      calls.setdefault((0, 0, None), []).append((place, head, 0))
      if front:
        key = (front, queries, None)
        calls.setdefault(key, []).append((place, local, start))
      continue
    # Heads with fronts from one place share a call; those with fronts from
    # several places do if they attend alike.
    key = (front, 0, None if start == front else local)
    calls.setdefault(key, []).append((place, local, start))
    if pattern.boundary == "local" and head.shift and head.chunk_size:
      fallbacks.append((place, head))
  made = []
  for (front, queries, _), members in calls.items():
    places, locals_, starts = zip(*members, strict=True)
    boundary = "drop" if front else pattern.boundary
    made.append(_Part(places, locals_, starts, front, queries, boundary))
  fronts: dict[tuple[int, int], set[int]] = {}
  for part in made:
    if part.length:
      for place, start in zip(part.heads, part.starts, strict=True):
        kv_heads = fronts.setdefault((start, part.length), set())
        kv_heads.add(place // group_size)
  return _Plan(
    tuple(part for part in made if not part.num_queries),
    tuple(part for part in made if part.num_queries),
    tuple(fallbacks),
    tuple(whole),
    tuple(_Front(*k, tuple(sorted(kv))) for k, kv in fronts.items()),
  )


def _put(x: jax.Array, part: jax.Array, heads: Sequence[int]) -> jax.Array:
  """Returns `x` with `part` in `x[:, : part.shape[1], heads]`."""
  first, count = heads[0], len(heads)
  if list(heads) == list(range(first, first + count)):
    return lax.dynamic_update_slice_in_dim(x, part, first, axis=2)
  return x.at[:, : part.shape[1], np.array(heads)].set(part, mode="clip")


@dataclasses.dataclass(frozen=True)
class _Call:
  """What the devices of one call have in common.

  Attributes:
    patterns: The pattern of each shard of heads.
    plans: How each shard of heads is served.
    group_size: Query heads to a key head.
    cut: Of the sequence.
    axes: Mesh axes of heads and of pieces, or None where they are not cut.
    scale: Factor of the scores.
    back_ends: What the local calls try, in order.
    has_segments: Whether there are segment ids.
    needs_log_sum: Whether the log-sum-exp is wanted.
    deterministic: See `scca_jax.attention`.
  """

  patterns: tuple[AttentionPattern, ...]
  plans: tuple[_Plan, ...]
  group_size: int
  cut: _Cut
  axes: tuple[str | None, str | None]
  scale: float
  back_ends: tuple[BackEnd, ...]
  has_segments: bool
  needs_log_sum: bool
  deterministic: bool

  def by_shard(
    self, values: Sequence[Any], function: Callable[..., Any], *args: Any
  ) -> Any:
    """Returns `function(value, *args)` with the value of the shard of heads."""
    index = 0 if self.axes[0] is None else lax.axis_index(self.axes[0])
    return _switch(values, index, function, *args)

  @property
  def piece(self) -> Any:
    """Number of the device's piece."""
    return 0 if self.axes[1] is None else lax.axis_index(self.axes[1])

  def attend(
    self,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    pattern: AttentionPattern,
    segment_ids: jax.Array | None,
  ) -> tuple[jax.Array, ...]:
    """Returns the output of a local call, and the log-sum-exp if wanted."""
    output, log_sum = registry.attend(
      Call(
        query=query,
        key=key,
        value=value,
        pattern=pattern,
        scale=self.scale,
        segment_ids=segment_ids,
        needs_log_sum=self.needs_log_sum,
        deterministic=self.deterministic,
      ),
      self.back_ends,
    )
    if not self.needs_log_sum:
      return (output,)
    assert log_sum is not None
    return output, log_sum


def _switch(
  values: Sequence[Any], index: Any, function: Callable[..., Any], *args: Any
) -> Any:
  """Returns `function(values[index], *args)`; equal values are one branch."""
  distinct = list(dict.fromkeys(values))
  if len(distinct) == 1:
    return function(distinct[0], *args)
  table = jnp.asarray([distinct.index(value) for value in values])
  return lax.switch(
    table[index],
    [functools.partial(function, value) for value in distinct],
    *args,
  )


# Messages from pieces before.


def _messages(plan: _Plan, cut: _Cut) -> dict[int, list[tuple[_Front, slice]]]:
  """Returns what a shard needs of each piece before, by its distance."""
  found: dict[int, list[tuple[_Front, slice]]] = {}
  for front in plan.fronts:
    for distance, first, last in front.sources(cut):
      if 0 < distance < cut.num_pieces:
        found.setdefault(distance, []).append((front, slice(first, last)))
  return found


def _message_sizes(call: _Call, head_dim: int) -> dict[int, int]:
  """Returns the length of the message for each distance, in numbers."""
  sizes: dict[int, int] = {}
  for plan in call.plans:
    for distance, items in _messages(plan, call.cut).items():
      size = sum(
        2 * (at.stop - at.start) * len(front.kv_heads) * head_dim
        for front, at in items
      )
      sizes[distance] = max(sizes.get(distance, 0), size)
  return sizes


def _exchange(
  call: _Call, key: jax.Array, value: jax.Array
) -> dict[int, jax.Array]:
  """Returns the messages received, `[batch, size]` by distance."""
  batch, _, _, head_dim = key.shape
  sizes = _message_sizes(call, head_dim)

  def pack(plan: _Plan, key: jax.Array, value: jax.Array) -> list[jax.Array]:
    messages = _messages(plan, call.cut)
    packed = []
    for distance, size in sizes.items():
      parts = [
        take_heads(x[:, at], front.kv_heads).reshape(batch, -1)
        for front, at in messages.get(distance, [])
        for x in (key, value)
      ]
      parts = parts or [jnp.zeros((batch, 0), key.dtype)]
      message = jnp.concatenate(parts, axis=1)
      rest = size - message.shape[1]
      packed.append(jnp.pad(message, ((0, 0), (0, rest))))
    return packed

  if not sizes:
    return {}
  packed = call.by_shard(call.plans, pack, key, value)
  axis, pieces = call.axes[1], call.cut.num_pieces
  return {
    distance: lax.ppermute(
      message, axis, [(i, i + distance) for i in range(pieces - distance)]
    )
    for distance, message in zip(sizes, packed, strict=True)
  }


def _segments_before(
  call: _Call, segment_ids: jax.Array | None, batch: int
) -> dict[int, jax.Array]:
  """Returns the segments of this piece and of those before it, by distance.

  Where there is no piece they are 0: padding.
  """
  length, pieces = call.cut.length, call.cut.num_pieces
  distances = {0}
  for plan in call.plans:
    for front in plan.fronts:
      distances |= {distance for distance, _, _ in front.sources(call.cut)}
  found = {}
  for distance in sorted(distances):
    if segment_ids is None:
      there = (call.piece >= distance) * jnp.ones((), jnp.int32)
      found[distance] = jnp.broadcast_to(there, (batch, length))
    elif distance == 0:
      found[distance] = segment_ids
    elif distance >= pieces:
      found[distance] = jnp.zeros_like(segment_ids)
    else:
      found[distance] = lax.ppermute(
        segment_ids,
        call.axes[1],
        [(i, i + distance) for i in range(pieces - distance)],
      )
  return found


@dataclasses.dataclass(frozen=True)
class _FrontArrays:
  """A front as it has come: `[batch, length, ...]`."""

  key: jax.Array
  value: jax.Array
  segment_ids: jax.Array


def _unpack(
  call: _Call,
  plan: _Plan,
  key: jax.Array,
  value: jax.Array,
  segments: dict[int, jax.Array],
  received: dict[int, jax.Array],
) -> dict[tuple[int, int], _FrontArrays]:
  """Returns the fronts of a plan, by start and length."""
  batch, _, _, head_dim = key.shape
  used = dict.fromkeys(received, 0)
  pieces: dict[_Front, dict[int, list[jax.Array]]] = {}
  # In the order in which they were packed.
  for distance, items in _messages(plan, call.cut).items():
    for front, at in items:
      shape = (batch, at.stop - at.start, len(front.kv_heads), head_dim)
      size = math.prod(shape[1:])
      arrays = []
      for _ in range(2):
        begin = used[distance]
        used[distance] += size
        arrays.append(
          received[distance][:, begin : begin + size].reshape(shape)
        )
      pieces.setdefault(front, {})[distance] = arrays
  fronts = {}
  for front in plan.fronts:
    keys, values, ids = [], [], []
    for distance, first, last in front.sources(call.cut):
      at = slice(first, last)
      if distance == 0:
        arrays = [take_heads(x[:, at], front.kv_heads) for x in (key, value)]
      elif distance >= call.cut.num_pieces:
        shape = (batch, last - first, len(front.kv_heads), head_dim)
        arrays = [jnp.zeros(shape, key.dtype)] * 2
      else:
        arrays = pieces[front][distance]
      keys.append(arrays[0])
      values.append(arrays[1])
      ids.append(segments[distance][:, at])
    fronts[front.start, front.length] = _FrontArrays(
      *(jnp.concatenate(x, axis=1) for x in (keys, values, ids))
    )
  return fronts


# Local calls.


def _attend_part(
  call: _Call,
  plan: _Plan,
  part: _Part,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
  fronts: dict[tuple[int, int], _FrontArrays],
) -> tuple[jax.Array, ...]:
  """Returns what the part's heads attend to, `[batch, queries, heads, ...]`."""
  if part.num_queries:
    query, key, value = (x[:, : part.num_queries] for x in (query, key, value))
    if segment_ids is not None:
      segment_ids = segment_ids[:, : part.num_queries]
  query = take_heads(query, part.heads)
  kv_heads = [place // call.group_size for place in part.heads]
  pattern = AttentionPattern(part.patterns, part.boundary)
  if not part.length:
    shared = kv_heads_of(part.heads, call.group_size)
    return call.attend(
      query,
      take_heads(key, shared),
      take_heads(value, shared),
      pattern,
      segment_ids,
    )
  query = jnp.pad(query, ((0, 0), (part.length, 0), (0, 0), (0, 0)))
  numbers = {
    front.start: front.kv_heads
    for front in plan.fronts
    if front.length == part.length
  }
  if len(set(part.starts)) == 1:
    start, shared = part.starts[0], kv_heads_of(part.heads, call.group_size)
    front = fronts[start, part.length]
    places = [numbers[start].index(head) for head in shared]
    keys, values = (
      jnp.concatenate(
        [take_heads(before, places), take_heads(own, shared)], axis=1
      )
      for before, own in ((front.key, key), (front.value, value))
    )
    ids = None
    if segment_ids is not None:
      ids = jnp.concatenate([front.segment_ids, segment_ids], axis=1)
    result = call.attend(query, keys, values, pattern, ids)
    return tuple(x[:, part.length :] for x in result)
  # Heads with fronts from several places attend alike but have segments of
  # their own: each is a sequence of the batch. They see no key of their piece.
  assert segment_ids is not None
  batch, num_heads = query.shape[0], len(part.heads)
  own = ((0, 0), (0, query.shape[1] - part.length), (0, 0), (0, 0))
  chosen = [
    (fronts[start, part.length], [numbers[start].index(head)])
    for start, head in zip(part.starts, kv_heads, strict=True)
  ]
  keys, values = (
    jnp.pad(jnp.concatenate(x, axis=2), own)
    for x in (
      [take_heads(front.key, place) for front, place in chosen],
      [take_heads(front.value, place) for front, place in chosen],
    )
  )
  ids = jnp.stack(
    [
      jnp.concatenate([front.segment_ids, segment_ids], axis=1)
      for front, _ in chosen
    ],
    axis=1,
  )

  def fold(x: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, 2, 1)
    return x.reshape(batch * num_heads, x.shape[2], 1, *x.shape[3:])

  result = call.attend(
    fold(query),
    fold(keys),
    fold(values),
    AttentionPattern(part.patterns[:1]),
    ids.reshape(batch * num_heads, -1),
  )

  def unfold(x: jax.Array) -> jax.Array:
    x = x[:, part.length :, 0]
    return jnp.moveaxis(x.reshape(batch, num_heads, *x.shape[1:]), 1, 2)

  return tuple(unfold(x) for x in result)


def _attend_local(
  call: _Call,
  plan: _Plan,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segments: dict[int, jax.Array],
  received: dict[int, jax.Array],
  from_whole: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
  """Returns what all heads of the device attend to, in their order."""
  own_ids = segments[0] if call.has_segments else None
  fronts = _unpack(call, plan, key, value, segments, received)
  results = [
    _attend_part(
      call,
      plan,
      part,
      query,
      key,
      value,
      segments[0] if part.length else own_ids,
      fronts,
    )
    for part in plan.parts
  ]
  places = [part.heads for part in plan.parts]
  if plan.whole:
    results.append(tuple(x[:, :, : len(plan.whole)] for x in from_whole))
    places.append(plan.whole)
  result = tuple(join_heads(x, places) for x in zip(*results, strict=True))
  if plan.firsts:
    # Keys may travel until here: compilers would not wait for the long kernel.
    received, result = lax.optimization_barrier((received, result))
    fronts = _unpack(call, plan, key, value, segments, received)
  for part in plan.firsts:
    # The first piece has no front, and has been served.
    firsts = _attend_part(call, plan, part, query, key, value, own_ids, fronts)
    result = tuple(
      _put(
        x,
        jnp.where(
          call.piece == 0, take_heads(x[:, : y.shape[1]], part.heads), y
        ),
        part.heads,
      )
      for x, y in zip(result, firsts, strict=True)
    )
  if not plan.fallbacks:
    return result
  unshifted_heads = tuple(place for place, _ in plan.fallbacks)
  plain = tuple(
    dataclasses.replace(head, shift=0) for _, head in plan.fallbacks
  )
  part = _Part(unshifted_heads, plain, (0,) * len(plain), 0)
  unshifted = _attend_part(call, plan, part, query, key, value, own_ids, {})
  positions = call.piece * call.cut.length + jnp.arange(call.cut.length)
  heads = {place: head for place, head in plan.fallbacks}
  falls_back = jnp.stack(
    [
      heads[place].falls_back(positions)
      if place in heads
      else jnp.zeros(positions.shape, bool)
      for place in range(query.shape[2])
    ],
    axis=1,
  )[None]
  of_place = [
    unshifted_heads.index(place) if place in heads else 0
    for place in range(query.shape[2])
  ]
  return tuple(
    jnp.where(
      falls_back if x.ndim == 3 else falls_back[..., None],
      take_heads(other, of_place),
      x,
    )
    for x, other in zip(result, unshifted, strict=True)
  )


# Heads that need the whole sequence.


@dataclasses.dataclass(frozen=True)
class _Seats:
  """Which heads go to which device, of one shard of heads.

  Attributes:
    heads: Query heads in the order in which they are sent; None is a place
      without a head.
    kv_heads: The key heads sent with them.
    patterns: For each device what its heads attend to.
  """

  heads: tuple[int | None, ...]
  kv_heads: tuple[int, ...]
  patterns: tuple[AttentionPattern, ...]


def _seat(call: _Call) -> tuple[_Seats, ...] | None:
  """Returns where the heads that need the whole sequence go, by shard."""
  if not any(plan.whole for plan in call.plans):
    return None
  pieces, size = call.cut.num_pieces, call.group_size

  def whole_groups(plan: _Plan) -> list[tuple[int, ...]] | None:
    """Returns the heads by key head, if all of each are there."""
    groups: dict[int, tuple[int, ...]] = {}
    for place in plan.whole:
      groups[place // size] = (*groups.get(place // size, ()), place)
    if len(groups) % pieces or any(len(g) != size for g in groups.values()):
      return None
    return list(groups.values())

  by_group = [whole_groups(plan) for plan in call.plans]
  grouped = (
    None not in by_group
    and len({len(g) for g in by_group if g}) == 1
    and all(by_group)
  )
  most = max(len(plan.whole) for plan in call.plans)
  count = -(-most // pieces) * pieces
  seats = []
  for plan, pattern, groups in zip(
    call.plans, call.patterns, by_group, strict=True
  ):
    units = groups if grouped and groups else [(h,) for h in plan.whole]
    # Alike ones are dealt out in turn, so that devices have alike work.
    alike = {
      tuple(pattern.heads[h] for h in unit): i for i, unit in enumerate(units)
    }
    units = sorted(
      units, key=lambda unit: alike[tuple(pattern.heads[h] for h in unit)]
    )
    dealt: list[list[int | None]] = [
      [h for unit in units[device::pieces] for h in unit]
      for device in range(pieces)
    ]
    dealt = [d + [None] * (count // pieces - len(d)) for d in dealt]
    heads = tuple(h for d in dealt for h in d)
    kv_heads = [(h or 0) // size for h in heads]
    if grouped:
      kv_heads = kv_heads[::size]
    seats.append(
      _Seats(
        heads,
        tuple(kv_heads),
        tuple(
          AttentionPattern(
            tuple(_IDLE if h is None else pattern.heads[h] for h in d),
            pattern.boundary,
            pattern.causality,
          )
          for d in dealt
        ),
      )
    )
  return tuple(seats)


def _attend_whole(
  call: _Call,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
) -> tuple[jax.Array, ...]:
  """Returns what those heads attend to, `[batch, length, places, ...]`.

  They are in the order of `_Plan.whole`.
  """
  seats = _seat(call)
  if seats is None:
    return ()
  axis, pieces = call.axes[1], call.cut.num_pieces

  def pack(of: _Seats, query: jax.Array, key: jax.Array, value: jax.Array):
    return (
      take_heads(query, [h or 0 for h in of.heads]),
      take_heads(key, of.kv_heads),
      take_heads(value, of.kv_heads),
    )

  exchange = functools.partial(
    lax.all_to_all, axis_name=axis, split_axis=2, concat_axis=1, tiled=True
  )
  arrays = [exchange(x) for x in call.by_shard(seats, pack, query, key, value)]
  if segment_ids is not None:
    segment_ids = lax.all_gather(segment_ids, axis, axis=1, tiled=True)
  by_device = [pattern for of in seats for pattern in of.patterns]
  index = call.piece
  if call.axes[0] is not None:
    index = lax.axis_index(call.axes[0]) * pieces + index
  result = _switch(
    by_device,
    index,
    lambda pattern, q, k, v: call.attend(q, k, v, pattern, segment_ids),
    *arrays,
  )
  result = [
    lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True)
    for x in result
  ]

  def unpack(both: tuple[_Plan, _Seats], *result: jax.Array):
    plan, of = both
    places = [of.heads.index(h) for h in plan.whole]
    places += [0] * (len(of.heads) - len(places))
    return tuple(take_heads(x, places) for x in result)

  return call.by_shard(
    list(zip(call.plans, seats, strict=True)), unpack, *result
  )


# All of it.


def _attend(
  call: _Call,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
) -> tuple[jax.Array, ...]:
  """Returns the device's part of the output, and of the log-sum-exp."""
  if call.axes[1] is None:
    return call.by_shard(
      call.patterns,
      lambda pattern, q, k, v: call.attend(q, k, v, pattern, segment_ids),
      query,
      key,
      value,
    )
  received = _exchange(call, key, value)
  segments = _segments_before(call, segment_ids, query.shape[0])
  from_whole = _attend_whole(call, query, key, value, segment_ids)
  return call.by_shard(
    call.plans,
    functools.partial(_attend_local, call),
    query,
    key,
    value,
    segments,
    received,
    from_whole,
  )


def _piece_length(pattern: AttentionPattern, seq_len: int, pieces: int) -> int:
  """Returns the tokens of a piece: whole chunks, if that costs little."""
  least = -(-seq_len // pieces)
  units = [head.chunk_size or 1 for head in pattern.heads]
  units += [h.dilation for h in pattern.heads if h.select is not None]
  unit = math.lcm(*units)
  whole = -(-least // unit) * unit
  return whole if whole <= 2 * least else least


def _make_call(
  pattern: AttentionPattern,
  num_kv_heads: int,
  cut: _Cut,
  num_shards: int,
  **settings: Any,
) -> _Call:
  """Returns what the devices of a call have in common."""
  group_size = pattern.num_heads // num_kv_heads
  count = pattern.num_heads // num_shards
  shards = [range(i * count, (i + 1) * count) for i in range(num_shards)]
  return _Call(
    patterns=tuple(
      dataclasses.replace(pattern, heads=[pattern.heads[h] for h in heads])
      for heads in shards
    ),
    plans=tuple(_plan(pattern, heads, group_size, cut) for heads in shards),
    group_size=group_size,
    cut=cut,
    **settings,
  )


def attend(
  call: Call, mesh: Mesh, back_ends: tuple[BackEnd, ...]
) -> tuple[jax.Array, jax.Array | None]:
  """Returns the output of a call on a mesh, and the log-sum-exp if needed.

  Sequences lie along `data` and `fsdp`, heads along `tensor`, tokens along
  `sequence`; what cannot be divided is computed by all.

  Args:
    call: The call, with all sequences, heads and tokens.
    mesh: From `sharding.make_mesh`.
    back_ends: What the calls on each device try, in order.

  Raises:
    NotImplementedError: No back end serves a call; there is a cache; or a
      pattern that wraps round meets a length that cannot be divided.
  """
  if call.has_cache:
    raise NotImplementedError(
      "attention over a mesh serves query_offset=0 and as many keys as queries,"
      f" not query_offset={call.query_offset}, {call.key.shape[1]} keys and"
      f" {call.query.shape[1]} queries."
    )
  if (
    call.is_union
    and mesh.shape[sharding.SEQUENCE] > 1
    and not unions.refuses(call)
  ):
    run = functools.partial(attend, mesh=mesh, back_ends=back_ends)
    return unions.attend(call, run)
  query, key, value, pattern = call.query, call.key, call.value, call.pattern
  segment_ids = call.segment_ids
  seq_len, kv_heads = query.shape[1], key.shape[2]
  pieces = mesh.shape[sharding.SEQUENCE]
  cut = _Cut(pieces, _piece_length(pattern, seq_len, pieces))
  padding = pieces * cut.length - seq_len
  if padding and pattern.causality == "slot":
    raise NotImplementedError(
      f'causality="slot" wraps round the end of a sequence: its {seq_len}'
      f" tokens are not divisible by {pieces} devices, take another length."
    )
  if padding:
    # Behind the sequence, where no query sees it.
    query, key, value = (
      jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)))
      for x in (query, key, value)
    )
    if segment_ids is not None:
      segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
  shards = mesh.shape[sharding.TENSOR]
  shards = shards if kv_heads % shards == 0 else 1
  mesh_call = _make_call(
    pattern,
    kv_heads,
    cut,
    shards,
    axes=(
      sharding.TENSOR if shards > 1 else None,
      sharding.SEQUENCE if pieces > 1 else None,
    ),
    scale=call.scale,
    back_ends=back_ends,
    has_segments=segment_ids is not None,
    needs_log_sum=call.needs_log_sum,
    deterministic=call.deterministic,
  )
  heads = "heads" if shards > 1 else None
  spec = sharding.activation_spec(
    mesh, query.shape, "batch", "seq", heads, None
  )
  batch_seq = PartitionSpec(*spec[:2])
  outputs = (spec, PartitionSpec(*spec[:3]))
  result = jax.shard_map(
    functools.partial(_attend, mesh_call),
    mesh=mesh,
    in_specs=(spec, spec, spec, None if segment_ids is None else batch_seq),
    out_specs=outputs if call.needs_log_sum else outputs[:1],
    # Kernels do not say along which axes their results differ.
    check_vma=False,
  )(query, key, value, segment_ids)
  output, *log_sum = (x[:, :seq_len] for x in result)
  return output, log_sum[0] if log_sum else None


def bytes_received(
  pattern: AttentionPattern,
  *,
  seq_len: int,
  num_pieces: int,
  num_kv_heads: int,
  head_dim: int,
  itemsize: int,
  batch: int = 1,
) -> int:
  """Returns the bytes of keys, values and the like that a device receives.

  They are those of one forward pass of one layer, for a device in the middle;
  the first ones need less. The backward pass moves as many. Segment ids are
  not counted.

  Args:
    pattern: Of the layer.
    seq_len: Tokens, a multiple of `num_pieces`.
    num_pieces: Devices that share a sequence.
    num_kv_heads: Key heads on the device.
    head_dim: Length of a head.
    itemsize: Bytes of a number.
    batch: Sequences on the device.
  """
  parts = union_parts(pattern)
  if len(parts) > 1 and not any(part.before_chunk for part in parts):
    group_size = pattern.num_heads // num_kv_heads
    total = 0
    for part in parts:
      kv_heads = len(kv_heads_of(part.heads, group_size))
      if part.num_keys is not None:
        # Of sinks all devices receive the keys and values.
        numbers = 2 * min(part.num_keys, seq_len) * kv_heads * head_dim
        total += batch * numbers * itemsize
        continue
      total += bytes_received(
        part.pattern,
        seq_len=seq_len,
        num_pieces=num_pieces,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        itemsize=itemsize,
        batch=batch,
      )
    return total
  cut = _Cut(num_pieces, seq_len // num_pieces)
  call = _make_call(
    pattern,
    num_kv_heads,
    cut,
    1,
    axes=(None, sharding.SEQUENCE),
    scale=1.0,
    back_ends=(),
    has_segments=False,
    needs_log_sum=False,
    deterministic=False,
  )
  numbers = sum(_message_sizes(call, head_dim).values())
  seats = _seat(call)
  if seats is not None:
    # Queries and outputs, keys and values; a share of them stays.
    heads = 2 * len(seats[0].heads) + 2 * len(seats[0].kv_heads)
    numbers += cut.length * heads * head_dim * (num_pieces - 1) // num_pieces
  return batch * numbers * itemsize
