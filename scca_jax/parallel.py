"""Attention over a mesh: batch, heads and the sequence are sharded.

Every device calls a back end on its shard. Shards of the batch and of the heads
are independent. If the sequence is sharded, a head's pattern determines what a
shard needs from the others:

* chunks within a shard need nothing;
* a head that looks back by less than a shard needs the keys just before it, a
  *halo*: half a chunk for `scca_fixed` and S2, the reach of a window;
* a head shifted by `s` tokens, a chunk or more, needs a halo of one shard's
  length that starts `s` tokens before the shard (`scca_flow`);
* a head that sees the whole sequence, dense or dilated, is exchanged: each
  device gets all tokens of some of those heads (DeepSpeed-Ulysses, arXiv
  2309.14509). If there are fewer of them than devices, keys and values go
  round instead (`ring`).

A halo is put before the shard's own keys, with as many idle queries: chunk
borders, shifts and distances stay as they are, positions stay in order, and any
back end can serve the call. A short halo matters only to the first few queries
of a shard: all queries are served with the shard's own keys, then those few
again with the halo. If they are most of a shard, a single call with the halo
serves all, and segment 0 hides whatever would come before the first token.
Gradients travel back along the messages.

Everything sent to the device `d` shards ahead goes in one `ppermute`, whichever
heads it is for. If devices have heads with different patterns (`tensor`), each
takes its own branch; all messages have the same size.

A sequence that is computed a segment at a time, on one device, uses the same
plan: a segment is a shard in time. It receives what earlier segments sent
(`attend_segment`), and no head can be exchanged whole.

The parts of this module: the plan (`_plan`), messages, local calls, heads
exchanged whole, `attend`, and segments in time.
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

from scca_jax import ring, sharding
from scca_jax.backends import registry, unions
from scca_jax.backends.contract import BackEnd, Call
from scca_jax.backends.heads import join_heads, kv_heads_of, take_heads
from scca_jax.patterns import (
  AttentionPattern,
  Boundary,
  HeadPattern,
  union_parts,
)

# Fields of a head that `_local_pattern` handles; heads that use any other field
# are exchanged whole.
_LOCAL_FIELDS = frozenset(
  {"chunk_size", "offset", "shift", "dilation", "window", "select"}
)
# Pattern of padding heads: each query sees only itself.
_IDLE = HeadPattern(window=1)


@dataclasses.dataclass(frozen=True)
class _Split:
  """How a sequence is split.

  Attributes:
    num_shards: Shards, one per device along the axis `sequence`.
    length: Tokens per shard.
  """

  num_shards: int
  length: int


@dataclasses.dataclass(frozen=True)
class _Halo:
  """Keys that a shard needs from the shards before it.

  Attributes:
    start: How many tokens before the shard they start.
    length: Number of tokens, at most a shard.
    kv_heads: Key heads.
  """

  start: int
  length: int
  kv_heads: tuple[int, ...]

  def sources(self, split: _Split) -> list[tuple[int, int, int]]:
    """Returns where the keys are, in order.

    Each entry has the distance in shards, and the first token and the end
    within that shard.
    """
    found = []
    for distance in range(-(-self.start // split.length), -1, -1):
      first = max(0, distance * split.length - self.start)
      last = min(
        split.length, distance * split.length - self.start + self.length
      )
      if first < last:
        found.append((distance, first, last))
    return found


@dataclasses.dataclass(frozen=True)
class _LocalCall:
  """Query heads that one call on the device serves.

  Attributes:
    heads: Their indices on the device.
    patterns: Pattern of each head relative to its halo.
    starts: Where each head's halo starts, in tokens before the shard.
    length: Length of the halos, in tokens; 0 means no halo.
    num_queries: How many of the shard's first queries are served; 0 means all.
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
    calls: Local calls; each head that is not exchanged is in one.
    repeated: Local calls that serve a shard's first queries again, with a halo,
      in all shards but the first.
    fallbacks: Heads that serve some queries without the shift
      (`boundary="local"`), in an additional call, and their patterns, which
      determine the queries.
    whole: Heads that need the whole sequence.
    halos: What the calls need from other shards.
  """

  calls: tuple[_LocalCall, ...]
  repeated: tuple[_LocalCall, ...]
  fallbacks: tuple[tuple[int, HeadPattern], ...]
  whole: tuple[int, ...]
  halos: tuple[_Halo, ...]


def _local_pattern(
  head: HeadPattern, pattern: AttentionPattern, split: _Split
) -> tuple[HeadPattern, int, int, int] | None:
  """Returns the head's pattern relative to its halo, and what it needs.

  The need is the halo's start and length, and how many of a shard's first
  queries depend on it. None if the head needs the whole sequence.
  """
  size, length = head.chunk_size, split.length
  if pattern.causality == "slot" or head.in_use() - _LOCAL_FIELDS:
    return None
  if head.select is not None and length % head.dilation:
    return None
  if size is None:
    falls_back = pattern.boundary == "local" and head.dilation > 1
    if head.window is None or (falls_back and head.shift):
      return None
    start = halo = queries = head.shift + (head.window - 1) * head.dilation
  elif length % size:
    return None
  elif head.offset % size == 0:
    start = head.shift
    # With a shift below a chunk, positions decide causality, and the shard's
    # own keys must stay where they are. With a chunk or more, all keys are
    # earlier.
    halo, queries = (start, size) if start < size else (length, length)
  elif head.shift == 0:
    start = halo = -head.offset % size
    queries = head.offset % size
  else:
    return None
  if halo > length:
    return None
  local = dataclasses.replace(
    head,
    offset=0 if size is None else (head.offset + halo) % size,
    # In chunks, the distance from the first query to the first halo key.
    shift=halo if head.shift and size is not None else head.shift,
    select=None
    if head.select is None
    else (head.select + halo) % head.dilation,
  )
  return local, start, halo, queries


def _plan(
  pattern: AttentionPattern,
  heads: Sequence[int],
  group_size: int,
  split: _Split,
) -> _Plan:
  """Returns how a device serves some heads of a pattern.

  Args:
    pattern: Pattern of all heads.
    heads: The heads of the device, which numbers them from 0.
    group_size: Query heads that share a key head.
    split: How the sequence is split.
  """
  whole: list[int] = []
  fallbacks: list[tuple[int, HeadPattern]] = []
  # By halo length, number of queries, and what else the heads must share.
  calls: dict[Any, list[tuple[int, HeadPattern, int]]] = {}
  for place, index in enumerate(heads):
    head = pattern.heads[index]
    found = _local_pattern(head, pattern, split)
    if found is None:
      whole.append(place)
      continue
    local, start, halo, queries = found
    if halo == 0 or 2 * queries <= split.length:
      calls.setdefault((0, 0, None), []).append((place, head, 0))
      if halo:
        key = (halo, queries, None)
        calls.setdefault(key, []).append((place, local, start))
      continue
    # Heads whose halos start at the same place share a call; others do if their
    # patterns relative to the halo are equal.
    key = (halo, 0, None if start == halo else local)
    calls.setdefault(key, []).append((place, local, start))
    if pattern.boundary == "local" and head.shift and head.chunk_size:
      fallbacks.append((place, head))
  made = []
  for (halo, queries, _), members in calls.items():
    places, locals_, starts = zip(*members, strict=True)
    boundary = "drop" if halo else pattern.boundary
    made.append(_LocalCall(places, locals_, starts, halo, queries, boundary))
  halos: dict[tuple[int, int], set[int]] = {}
  for local in made:
    if local.length:
      for place, start in zip(local.heads, local.starts, strict=True):
        kv_heads = halos.setdefault((start, local.length), set())
        kv_heads.add(place // group_size)
  return _Plan(
    tuple(local for local in made if not local.num_queries),
    tuple(local for local in made if local.num_queries),
    tuple(fallbacks),
    tuple(whole),
    tuple(_Halo(*k, tuple(sorted(kv))) for k, kv in halos.items()),
  )


def _put(x: jax.Array, part: jax.Array, heads: Sequence[int]) -> jax.Array:
  """Returns `x` with `part` in `x[:, : part.shape[1], heads]`."""
  first, count = heads[0], len(heads)
  if list(heads) == list(range(first, first + count)):
    return lax.dynamic_update_slice_in_dim(x, part, first, axis=2)
  return x.at[:, : part.shape[1], np.array(heads)].set(part, mode="clip")


@dataclasses.dataclass(frozen=True)
class _MeshCall:
  """What the devices of one call have in common.

  Attributes:
    patterns: The pattern of each shard of the heads.
    plans: How each shard of the heads is served.
    group_size: Query heads that share a key head.
    split: How the sequence is split.
    axes: Mesh axes of the heads and of the sequence; None if not sharded.
    scale: Factor of the scores.
    back_ends: Back ends that local calls try, in order.
    has_segments: Whether there are segment ids.
    needs_log_sum: Whether the log-sum-exp is needed.
    deterministic: See `scca_jax.attention`.
    index: The shard's place in the sequence if shards are segments in time;
      None if they are devices.
  """

  patterns: tuple[AttentionPattern, ...]
  plans: tuple[_Plan, ...]
  group_size: int
  split: _Split
  axes: tuple[str | None, str | None]
  scale: float
  back_ends: tuple[BackEnd, ...]
  has_segments: bool
  needs_log_sum: bool
  deterministic: bool
  index: Any = None

  def by_head_shard(
    self, values: Sequence[Any], function: Callable[..., Any], *args: Any
  ) -> Any:
    """Returns `function(value, *args)` for the device's shard of the heads."""
    index = 0 if self.axes[0] is None else lax.axis_index(self.axes[0])
    return _switch(values, index, function, *args)

  @property
  def shard_index(self) -> Any:
    """Index of the device's shard of the sequence, from 0."""
    if self.index is not None:
      return self.index
    return 0 if self.axes[1] is None else lax.axis_index(self.axes[1])

  def attend(
    self,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    pattern: AttentionPattern,
    segment_ids: jax.Array | None,
  ) -> tuple[jax.Array, ...]:
    """Returns the output of a local call, and the log-sum-exp if needed."""
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


# Messages from earlier shards.


def _messages(
  plan: _Plan, split: _Split
) -> dict[int, list[tuple[_Halo, slice]]]:
  """Returns what a shard needs from each earlier shard, by distance."""
  found: dict[int, list[tuple[_Halo, slice]]] = {}
  for halo in plan.halos:
    for distance, first, last in halo.sources(split):
      if 0 < distance < split.num_shards:
        found.setdefault(distance, []).append((halo, slice(first, last)))
  return found


def _message_sizes(call: _MeshCall, head_dim: int) -> dict[int, int]:
  """Returns the number of elements of the message for each distance."""
  sizes: dict[int, int] = {}
  for plan in call.plans:
    for distance, items in _messages(plan, call.split).items():
      size = sum(
        2 * (at.stop - at.start) * len(halo.kv_heads) * head_dim
        for halo, at in items
      )
      sizes[distance] = max(sizes.get(distance, 0), size)
  return sizes


def _pack(
  plan: _Plan,
  key: jax.Array,
  value: jax.Array,
  *,
  split: _Split,
  sizes: dict[int, int],
) -> list[jax.Array]:
  """Returns the messages to later shards, `[batch, size]`, as in `sizes`."""
  batch = key.shape[0]
  messages = _messages(plan, split)
  packed = []
  for distance, size in sizes.items():
    parts = [
      take_heads(x[:, at], halo.kv_heads).reshape(batch, -1)
      for halo, at in messages.get(distance, [])
      for x in (key, value)
    ]
    parts = parts or [jnp.zeros((batch, 0), key.dtype)]
    message = jnp.concatenate(parts, axis=1)
    rest = size - message.shape[1]
    packed.append(jnp.pad(message, ((0, 0), (0, rest))))
  return packed


def _exchange(
  call: _MeshCall, key: jax.Array, value: jax.Array
) -> dict[int, jax.Array]:
  """Returns the messages received, `[batch, size]` by distance."""
  sizes = _message_sizes(call, key.shape[3])
  if not sizes:
    return {}
  pack = functools.partial(_pack, split=call.split, sizes=sizes)
  packed = call.by_head_shard(call.plans, pack, key, value)
  axis, shards = call.axes[1], call.split.num_shards
  return {
    distance: lax.ppermute(
      message, axis, [(i, i + distance) for i in range(shards - distance)]
    )
    for distance, message in zip(sizes, packed, strict=True)
  }


def _segments_before(
  call: _MeshCall, segment_ids: jax.Array | None, batch: int
) -> dict[int, jax.Array]:
  """Returns the segment ids of this shard and of earlier ones, by distance.

  Before the first shard they are 0, for padding.
  """
  length, shards = call.split.length, call.split.num_shards
  distances = {0}
  for plan in call.plans:
    for halo in plan.halos:
      distances |= {distance for distance, _, _ in halo.sources(call.split)}
  found = {}
  for distance in sorted(distances):
    if segment_ids is None:
      there = (call.shard_index >= distance) * jnp.ones((), jnp.int32)
      found[distance] = jnp.broadcast_to(there, (batch, length))
    elif distance == 0:
      found[distance] = segment_ids
    elif distance >= shards:
      found[distance] = jnp.zeros_like(segment_ids)
    else:
      found[distance] = lax.ppermute(
        segment_ids,
        call.axes[1],
        [(i, i + distance) for i in range(shards - distance)],
      )
  return found


@dataclasses.dataclass(frozen=True)
class _HaloArrays:
  """The arrays of a halo, `[batch, length, ...]`."""

  key: jax.Array
  value: jax.Array
  segment_ids: jax.Array


def _unpack(
  call: _MeshCall,
  plan: _Plan,
  key: jax.Array,
  value: jax.Array,
  segments: dict[int, jax.Array],
  received: dict[int, jax.Array],
) -> dict[tuple[int, int], _HaloArrays]:
  """Returns the halos of a plan, by start and length."""
  batch, _, _, head_dim = key.shape
  used = dict.fromkeys(received, 0)
  messages: dict[_Halo, dict[int, list[jax.Array]]] = {}
  # In the order of `_exchange`.
  for distance, items in _messages(plan, call.split).items():
    for halo, at in items:
      shape = (batch, at.stop - at.start, len(halo.kv_heads), head_dim)
      size = math.prod(shape[1:])
      arrays = []
      for _ in range(2):
        begin = used[distance]
        used[distance] += size
        arrays.append(
          received[distance][:, begin : begin + size].reshape(shape)
        )
      messages.setdefault(halo, {})[distance] = arrays
  halos = {}
  for halo in plan.halos:
    keys, values, ids = [], [], []
    for distance, first, last in halo.sources(call.split):
      at = slice(first, last)
      if distance == 0:
        arrays = [take_heads(x[:, at], halo.kv_heads) for x in (key, value)]
      elif distance >= call.split.num_shards:
        shape = (batch, last - first, len(halo.kv_heads), head_dim)
        arrays = [jnp.zeros(shape, key.dtype)] * 2
      else:
        arrays = messages[halo][distance]
      keys.append(arrays[0])
      values.append(arrays[1])
      ids.append(segments[distance][:, at])
    halos[halo.start, halo.length] = _HaloArrays(
      *(jnp.concatenate(x, axis=1) for x in (keys, values, ids))
    )
  return halos


# Local calls.


def _run_local_call(
  call: _MeshCall,
  plan: _Plan,
  local: _LocalCall,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
  halos: dict[tuple[int, int], _HaloArrays],
) -> tuple[jax.Array, ...]:
  """Returns the results of a local call, `[batch, queries, heads, ...]`."""
  if local.num_queries:
    query, key, value = (x[:, : local.num_queries] for x in (query, key, value))
    if segment_ids is not None:
      segment_ids = segment_ids[:, : local.num_queries]
  query = take_heads(query, local.heads)
  kv_heads = [place // call.group_size for place in local.heads]
  pattern = AttentionPattern(local.patterns, local.boundary)
  if not local.length:
    shared = kv_heads_of(local.heads, call.group_size)
    return call.attend(
      query,
      take_heads(key, shared),
      take_heads(value, shared),
      pattern,
      segment_ids,
    )
  query = jnp.pad(query, ((0, 0), (local.length, 0), (0, 0), (0, 0)))
  numbers = {
    halo.start: halo.kv_heads
    for halo in plan.halos
    if halo.length == local.length
  }
  if len(set(local.starts)) == 1:
    start, shared = local.starts[0], kv_heads_of(local.heads, call.group_size)
    halo = halos[start, local.length]
    places = [numbers[start].index(head) for head in shared]
    keys, values = (
      jnp.concatenate(
        [take_heads(before, places), take_heads(own, shared)], axis=1
      )
      for before, own in ((halo.key, key), (halo.value, value))
    )
    ids = None
    if segment_ids is not None:
      ids = jnp.concatenate([halo.segment_ids, segment_ids], axis=1)
    result = call.attend(query, keys, values, pattern, ids)
    return tuple(x[:, local.length :] for x in result)
  # Heads whose halos start at different places have equal patterns but their
  # own segment ids, so each becomes a sequence of the batch. They see no key of
  # their own shard.
  assert segment_ids is not None
  batch, num_heads = query.shape[0], len(local.heads)
  own = ((0, 0), (0, query.shape[1] - local.length), (0, 0), (0, 0))
  chosen = [
    (halos[start, local.length], [numbers[start].index(head)])
    for start, head in zip(local.starts, kv_heads, strict=True)
  ]
  keys, values = (
    jnp.pad(jnp.concatenate(x, axis=2), own)
    for x in (
      [take_heads(halo.key, place) for halo, place in chosen],
      [take_heads(halo.value, place) for halo, place in chosen],
    )
  )
  ids = jnp.stack(
    [
      jnp.concatenate([halo.segment_ids, segment_ids], axis=1)
      for halo, _ in chosen
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
    AttentionPattern(local.patterns[:1]),
    ids.reshape(batch * num_heads, -1),
  )

  def unfold(x: jax.Array) -> jax.Array:
    x = x[:, local.length :, 0]
    return jnp.moveaxis(x.reshape(batch, num_heads, *x.shape[1:]), 1, 2)

  return tuple(unfold(x) for x in result)


def _attend_local(
  call: _MeshCall,
  plan: _Plan,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segments: dict[int, jax.Array],
  received: dict[int, jax.Array],
  from_whole: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
  """Returns the results of all heads of the device, in order."""
  own_ids = segments[0] if call.has_segments else None
  halos = _unpack(call, plan, key, value, segments, received)
  results = [
    _run_local_call(
      call,
      plan,
      local,
      query,
      key,
      value,
      segments[0] if local.length else own_ids,
      halos,
    )
    for local in plan.calls
  ]
  places = [local.heads for local in plan.calls]
  if plan.whole:
    results.append(tuple(x[:, :, : len(plan.whole)] for x in from_whole))
    places.append(plan.whole)
  result = tuple(join_heads(x, places) for x in zip(*results, strict=True))
  if plan.repeated:
    # Lets keys travel while the calls above run, which XLA would not do by
    # itself.
    received, result = lax.optimization_barrier((received, result))
    halos = _unpack(call, plan, key, value, segments, received)
  for local in plan.repeated:
    # The first shard has no halo, so its results are final.
    again = _run_local_call(
      call, plan, local, query, key, value, own_ids, halos
    )
    result = tuple(
      _put(
        x,
        jnp.where(
          call.shard_index == 0, take_heads(x[:, : y.shape[1]], local.heads), y
        ),
        local.heads,
      )
      for x, y in zip(result, again, strict=True)
    )
  if not plan.fallbacks:
    return result
  unshifted_heads = tuple(place for place, _ in plan.fallbacks)
  plain = tuple(
    dataclasses.replace(head, shift=0) for _, head in plan.fallbacks
  )
  local = _LocalCall(unshifted_heads, plain, (0,) * len(plain), 0)
  unshifted = _run_local_call(call, plan, local, query, key, value, own_ids, {})
  positions = call.shard_index * call.split.length + jnp.arange(
    call.split.length
  )
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
class _Assignment:
  """Which heads go to which device, for one shard of the heads.

  Attributes:
    heads: Query heads in the order in which they are sent; None is padding.
    kv_heads: The key heads sent with them.
    patterns: The pattern of each device's heads.
  """

  heads: tuple[int | None, ...]
  kv_heads: tuple[int, ...]
  patterns: tuple[AttentionPattern, ...]


def _assign(call: _MeshCall) -> tuple[_Assignment, ...] | None:
  """Assigns the heads that need the whole sequence, by shard of the heads."""
  if not any(plan.whole for plan in call.plans):
    return None
  shards, size = call.split.num_shards, call.group_size

  def whole_groups(plan: _Plan) -> list[tuple[int, ...]] | None:
    """Returns the heads by key head, if whole groups divide evenly."""
    groups: dict[int, tuple[int, ...]] = {}
    for place in plan.whole:
      groups[place // size] = (*groups.get(place // size, ()), place)
    if len(groups) % shards or any(len(g) != size for g in groups.values()):
      return None
    return list(groups.values())

  by_group = [whole_groups(plan) for plan in call.plans]
  grouped = (
    None not in by_group
    and len({len(g) for g in by_group if g}) == 1
    and all(by_group)
  )
  most = max(len(plan.whole) for plan in call.plans)
  count = -(-most // shards) * shards
  assignments = []
  for plan, pattern, groups in zip(
    call.plans, call.patterns, by_group, strict=True
  ):
    units = groups if grouped and groups else [(h,) for h in plan.whole]
    # Equal heads are dealt out in turn, so that devices get equal work.
    alike = {
      tuple(pattern.heads[h] for h in unit): i for i, unit in enumerate(units)
    }
    units = sorted(
      units, key=lambda unit: alike[tuple(pattern.heads[h] for h in unit)]
    )
    dealt: list[list[int | None]] = [
      [h for unit in units[device::shards] for h in unit]
      for device in range(shards)
    ]
    dealt = [d + [None] * (count // shards - len(d)) for d in dealt]
    heads = tuple(h for d in dealt for h in d)
    kv_heads = [(h or 0) // size for h in heads]
    if grouped:
      kv_heads = kv_heads[::size]
    assignments.append(
      _Assignment(
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
  return tuple(assignments)


@dataclasses.dataclass(frozen=True)
class _RingHeads:
  """The heads that a ring serves, for one shard of the heads.

  Attributes:
    heads: Query heads.
    kv_heads: Their key heads, for `kv_heads_of`.
    own: Their pattern.
    pair: Their pattern between two pieces (`ring.pair_pattern`).
  """

  heads: tuple[int, ...]
  kv_heads: tuple[int, ...]
  own: AttentionPattern
  pair: AttentionPattern


def _ring_heads(call: _MeshCall) -> tuple[_RingHeads, ...] | None:
  """Returns the heads by shard of the heads, or None if they are exchanged.

  With fewer heads than devices an exchange would leave some devices idle.
  """
  found = []
  for plan, pattern in zip(call.plans, call.patterns, strict=True):
    if not 0 < len(plan.whole) < call.split.num_shards or call.split.length % 2:
      return None
    heads = tuple(pattern.heads[h] for h in plan.whole)
    piece = call.split.length // 2
    pairs = [ring.pair_pattern(head, pattern, piece) for head in heads]
    pair = tuple(head for head in pairs if head is not None)
    if len(pair) < len(heads):
      return None
    found.append(
      _RingHeads(
        plan.whole,
        tuple(kv_heads_of(plan.whole, call.group_size)),
        dataclasses.replace(pattern, heads=heads),
        AttentionPattern(pair),
      )
    )
  # Devices with different shards of the heads send equally large messages.
  sizes = {(len(of.heads), len(of.kv_heads)) for of in found}
  return tuple(found) if len(sizes) == 1 else None


def _attend_ring(
  call: _MeshCall,
  by_shard: tuple[_RingHeads, ...],
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
) -> tuple[jax.Array, ...]:
  """Returns the results of those heads, `[batch, length, heads, ...]`."""
  axis = call.axes[1]
  assert axis is not None
  summed = dataclasses.replace(call, needs_log_sum=True)

  def attend(pattern: AttentionPattern, query, key, value, segment_ids):
    return summed.attend(query, key, value, pattern, segment_ids)

  def pack(of: _RingHeads, query: jax.Array, key: jax.Array, value: jax.Array):
    return (
      take_heads(query, of.heads),
      take_heads(key, of.kv_heads),
      take_heads(value, of.kv_heads),
    )

  own, pair = ([of.own for of in by_shard], [of.pair for of in by_shard])
  devices = ring.Ring(
    axis,
    call.split.num_shards,
    functools.partial(call.by_head_shard, own, attend),
    functools.partial(call.by_head_shard, pair, attend),
  )
  query, key, value = call.by_head_shard(by_shard, pack, query, key, value)
  return ring.attend(
    devices, query, key, value, segment_ids, needs_log_sum=call.needs_log_sum
  )


def _attend_whole(
  call: _MeshCall,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
) -> tuple[jax.Array, ...]:
  """Returns the results of those heads, `[batch, length, heads, ...]`.

  They are in the order of `_Plan.whole`, then padding.
  """
  in_ring = _ring_heads(call)
  if in_ring is not None:
    return _attend_ring(call, in_ring, query, key, value, segment_ids)
  assignments = _assign(call)
  if assignments is None:
    return ()
  axis, shards = call.axes[1], call.split.num_shards

  def pack(of: _Assignment, query: jax.Array, key: jax.Array, value: jax.Array):
    return (
      take_heads(query, [h or 0 for h in of.heads]),
      take_heads(key, of.kv_heads),
      take_heads(value, of.kv_heads),
    )

  exchange = functools.partial(
    lax.all_to_all, axis_name=axis, split_axis=2, concat_axis=1, tiled=True
  )
  arrays = [
    exchange(x)
    for x in call.by_head_shard(assignments, pack, query, key, value)
  ]
  if segment_ids is not None:
    segment_ids = lax.all_gather(segment_ids, axis, axis=1, tiled=True)
  by_device = [pattern for of in assignments for pattern in of.patterns]
  index = call.shard_index
  if call.axes[0] is not None:
    index = lax.axis_index(call.axes[0]) * shards + index
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

  def unpack(both: tuple[_Plan, _Assignment], *result: jax.Array):
    plan, of = both
    places = [of.heads.index(h) for h in plan.whole]
    places += [0] * (len(of.heads) - len(places))
    return tuple(take_heads(x, places) for x in result)

  return call.by_head_shard(
    list(zip(call.plans, assignments, strict=True)), unpack, *result
  )


# The whole call.


def _attend(
  call: _MeshCall,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
) -> tuple[jax.Array, ...]:
  """Returns the device's shard of the output, and of the log-sum-exp."""
  if call.axes[1] is None:
    return call.by_head_shard(
      call.patterns,
      lambda pattern, q, k, v: call.attend(q, k, v, pattern, segment_ids),
      query,
      key,
      value,
    )
  received = _exchange(call, key, value)
  segments = _segments_before(call, segment_ids, query.shape[0])
  from_whole = _attend_whole(call, query, key, value, segment_ids)
  return call.by_head_shard(
    call.plans,
    functools.partial(_attend_local, call),
    query,
    key,
    value,
    segments,
    received,
    from_whole,
  )


def _shard_length(pattern: AttentionPattern, seq_len: int, shards: int) -> int:
  """Returns the tokens per shard: whole chunks, if that pads little."""
  least = -(-seq_len // shards)
  units = [head.chunk_size or 1 for head in pattern.heads]
  units += [h.dilation for h in pattern.heads if h.select is not None]
  if pattern.causality == "position":
    # The two pieces of a shard in a ring.
    units += [
      2 * head.dilation
      for head in pattern.heads
      if head.chunk_size is None and head.window is None
    ]
  unit = math.lcm(*units)
  whole = -(-least // unit) * unit
  return whole if whole <= 2 * least else least


def _make_call(
  pattern: AttentionPattern,
  num_kv_heads: int,
  split: _Split,
  num_shards: int,
  **settings: Any,
) -> _MeshCall:
  """Returns what the devices of a call have in common."""
  group_size = pattern.num_heads // num_kv_heads
  count = pattern.num_heads // num_shards
  shards = [range(i * count, (i + 1) * count) for i in range(num_shards)]
  return _MeshCall(
    patterns=tuple(
      dataclasses.replace(pattern, heads=[pattern.heads[h] for h in heads])
      for heads in shards
    ),
    plans=tuple(_plan(pattern, heads, group_size, split) for heads in shards),
    group_size=group_size,
    split=split,
    **settings,
  )


def attend(
  call: Call, mesh: Mesh, back_ends: tuple[BackEnd, ...]
) -> tuple[jax.Array, jax.Array | None]:
  """Returns the output of a call on a mesh, and the log-sum-exp if needed.

  Sequences are divided along `data` and `fsdp`, heads along `tensor`, tokens
  along `sequence`; what cannot be divided is computed by every device.

  Args:
    call: The call, with all sequences, heads and tokens.
    mesh: From `sharding.make_mesh`.
    back_ends: What the calls on each device try, in order.

  Raises:
    NotImplementedError: No back end serves a call; there is a cache; or the
      pattern wraps round and the length is not divisible.
  """
  if call.has_cache:
    raise NotImplementedError(
      "attention over a mesh needs query_offset=0 and as many keys as queries,"
      f" got query_offset={call.query_offset}, {call.key.shape[1]} keys and"
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
  shards = mesh.shape[sharding.SEQUENCE]
  split = _Split(shards, _shard_length(pattern, seq_len, shards))
  padding = shards * split.length - seq_len
  if padding and pattern.causality == "slot":
    raise NotImplementedError(
      f'causality="slot" wraps round the end of a sequence: its {seq_len}'
      f" tokens are not divisible by {shards} devices, take another length."
    )
  if padding:
    # Padded after the end of the sequence, where no query sees it.
    query, key, value = (
      jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)))
      for x in (query, key, value)
    )
    if segment_ids is not None:
      segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
  head_shards = mesh.shape[sharding.TENSOR]
  head_shards = head_shards if kv_heads % head_shards == 0 else 1
  mesh_call = _make_call(
    pattern,
    kv_heads,
    split,
    head_shards,
    axes=(
      sharding.TENSOR if head_shards > 1 else None,
      sharding.SEQUENCE if shards > 1 else None,
    ),
    scale=call.scale,
    back_ends=back_ends,
    has_segments=segment_ids is not None,
    needs_log_sum=call.needs_log_sum,
    deterministic=call.deterministic,
  )
  heads = "heads" if head_shards > 1 else None
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
    # Kernels do not declare along which axes their results vary.
    check_vma=False,
  )(query, key, value, segment_ids)
  output, *log_sum = (x[:, :seq_len] for x in result)
  return output, log_sum[0] if log_sum else None


def bytes_received(
  pattern: AttentionPattern,
  *,
  seq_len: int,
  num_shards: int,
  num_kv_heads: int,
  head_dim: int,
  itemsize: int,
  batch: int = 1,
  backward: bool = False,
) -> int:
  """Returns the bytes that a device receives for one layer's attention.

  They are counted for a device in the middle; the first ones need less. Segment
  ids are not counted.

  Args:
    pattern: Pattern of the layer.
    seq_len: Tokens, a multiple of `num_shards`.
    num_shards: Devices that share a sequence.
    num_kv_heads: Key heads on the device.
    head_dim: Length of a head.
    itemsize: Bytes per element.
    batch: Sequences on the device.
    backward: Whether to count the backward pass instead of the forward pass. It
      moves as much, or more if keys and values go round the devices.
  """
  parts = union_parts(pattern)
  if len(parts) > 1 and not any(part.before_chunk for part in parts):
    group_size = pattern.num_heads // num_kv_heads
    total = 0
    for part in parts:
      kv_heads = len(kv_heads_of(part.heads, group_size))
      if part.num_keys is not None:
        # Every device receives the keys and values of the sinks.
        numbers = 2 * min(part.num_keys, seq_len) * kv_heads * head_dim
        total += batch * numbers * itemsize
        continue
      total += bytes_received(
        part.pattern,
        seq_len=seq_len,
        num_shards=num_shards,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        itemsize=itemsize,
        batch=batch,
        backward=backward,
      )
    return total
  split = _Split(num_shards, seq_len // num_shards)
  call = _make_call(
    pattern,
    num_kv_heads,
    split,
    1,
    axes=(None, sharding.SEQUENCE),
    scale=1.0,
    back_ends=(),
    has_segments=False,
    needs_log_sum=False,
    deterministic=False,
  )
  numbers = sum(_message_sizes(call, head_dim).values())
  in_ring, assignments = _ring_heads(call), _assign(call)
  if in_ring is not None:
    return batch * (
      numbers * itemsize
      + ring.bytes_received(
        len(in_ring[0].heads),
        len(in_ring[0].kv_heads),
        num_devices=num_shards,
        length=split.length,
        head_dim=head_dim,
        itemsize=itemsize,
        backward=backward,
      )
    )
  if assignments is not None:
    # Queries and outputs, keys and values; some of them stay.
    heads = 2 * len(assignments[0].heads) + 2 * len(assignments[0].kv_heads)
    numbers += split.length * heads * head_dim * (num_shards - 1) // num_shards
  return batch * numbers * itemsize


# Segments in time.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segment:
  """A segment of a sequence.

  Attributes:
    index: Its place, from 0; may be traced.
    count: Number of segments in the sequence.
    length: Tokens per segment.
    document_ids: Segment ids in the sense of packed documents, for the whole
      sequence, `[batch, count * length]`, or None.
  """

  index: Any
  document_ids: jax.Array | None
  count: int = dataclasses.field(metadata={"static": True})
  length: int = dataclasses.field(metadata={"static": True})

  def ids_before(self, distance: int, batch: int) -> jax.Array:
    """Returns the ids of the segment `distance` before, 0 before the first."""
    is_there = self.index >= distance
    if self.document_ids is None:
      there = is_there * jnp.ones((), jnp.int32)
      return jnp.broadcast_to(there, (batch, self.length))
    start = jnp.maximum(self.index - distance, 0) * self.length
    ids = lax.dynamic_slice_in_dim(
      self.document_ids, start, self.length, axis=1
    )
    return jnp.where(is_there, ids, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Messages:
  """Keys and values that travel from a segment to later ones, in one layer.

  Attributes:
    by_distance: For each call of `attend_segment`, by the distance in segments
      that they travel, `[batch, numbers]`.
    first: Keys and values of the first tokens of the sequence, for sinks in any
      later segment, `[2, batch, tokens, kv_heads, head_dim]`; None without
      sinks.
  """

  by_distance: tuple[dict[int, jax.Array], ...]
  first: jax.Array | None


def _num_sinks(patterns: Sequence[AttentionPattern]) -> int:
  """Returns how many tokens at the start are seen by all segments."""
  return max(head.sinks for pattern in patterns for head in pattern.heads)


def _segment_call(
  pattern: AttentionPattern,
  num_kv_heads: int,
  segment: Segment,
  **settings: Any,
) -> _MeshCall:
  """Returns a call whose shards are the segments."""
  return _make_call(
    pattern,
    num_kv_heads,
    _Split(segment.count, segment.length),
    1,
    axes=(None, None),
    index=segment.index,
    **settings,
  )


def no_messages(
  patterns: Sequence[AttentionPattern],
  segment: Segment,
  *,
  batch: int,
  num_kv_heads: int,
  head_dim: int,
  dtype: Any,
) -> Messages:
  """Returns what the first segment receives: messages of zeros.

  Args:
    patterns: The pattern of the layer, or the members of its mixture.
    segment: Any segment.
    batch: Sequences.
    num_kv_heads: Key heads.
    head_dim: Length of a head.
    dtype: Of keys and values.
  """
  group_size = patterns[0].num_heads // num_kv_heads
  by_distance = []
  for pattern in patterns:
    for part in union_parts(pattern):
      if part.num_keys is None:
        call = _segment_call(
          part.pattern,
          len(kv_heads_of(part.heads, group_size)),
          segment,
          scale=1.0,
          back_ends=(),
          has_segments=False,
          needs_log_sum=False,
          deterministic=False,
        )
        by_distance.append(
          {
            distance: jnp.zeros((batch, size), dtype)
            for distance, size in _message_sizes(call, head_dim).items()
          }
        )
  sinks = _num_sinks(patterns)
  first = jnp.zeros((2, batch, sinks, num_kv_heads, head_dim), dtype)
  return Messages(tuple(by_distance), first if sinks else None)


def attend_segment(
  calls: Sequence[Call],
  segment: Segment,
  received: Messages,
  back_ends: tuple[BackEnd, ...],
) -> tuple[list[tuple[jax.Array, jax.Array | None]], Messages]:
  """Returns attention of a segment's queries, and what it sends.

  Args:
    calls: Queries, keys and values of the segment with its segment ids, one
      call for each member of a mixture.
    segment: The segment.
    received: What earlier segments sent; zeros if there are none.
    back_ends: What the calls try, in order.

  Returns:
    The output and the log-sum-exp, if it is needed, of each call; the messages.

  Raises:
    NotImplementedError: No back end serves a call, or a pattern needs more from
      earlier segments than can be kept (`refuses_segments`).
  """
  sent: list[dict[int, jax.Array]] = []
  sinks = _num_sinks([call.pattern for call in calls])
  key, value = calls[0].key, calls[0].value
  first = jnp.stack([key[:, :sinks], value[:, :sinks]]) if sinks else None

  def run(call: Call) -> tuple[jax.Array, jax.Array | None]:
    batch, _, kv_heads, head_dim = call.key.shape
    made = _segment_call(
      call.pattern,
      kv_heads,
      segment,
      scale=call.scale,
      back_ends=back_ends,
      has_segments=call.segment_ids is not None,
      needs_log_sum=call.needs_log_sum,
      deterministic=call.deterministic,
    )
    (plan,) = made.plans
    arrived = received.by_distance[len(sent)]
    distances = {0}
    for halo in plan.halos:
      distances |= {distance for distance, _, _ in halo.sources(made.split)}
    output, *log_sum = _attend_local(
      made,
      plan,
      call.query,
      call.key,
      call.value,
      {d: segment.ids_before(d, batch) for d in sorted(distances)},
      arrived,
      (),
    )
    sizes = _message_sizes(made, head_dim)
    packed = _pack(plan, call.key, call.value, split=made.split, sizes=sizes)
    sent.append(dict(zip(sizes, packed, strict=True)))
    return output, log_sum[0] if log_sum else None

  results = []
  for call in calls:
    reason = refuses_segments(
      call.pattern, segment.length, packed=call.segment_ids is not None
    )
    if reason is not None:
      raise NotImplementedError(reason)
    if not call.is_union:
      results.append(run(call))
      continue
    at_start = call
    if first is not None and received.first is not None:
      keys, values = jnp.where(segment.index == 0, first, received.first)
      at_start = dataclasses.replace(
        call,
        key=keys,
        value=values,
        query_offset=segment.index * segment.length,
      )
    results.append(unions.attend(call, run, at_start))
  return results, Messages(tuple(sent), first)


def refuses_segments(
  pattern: AttentionPattern, length: int, *, packed: bool = False
) -> str | None:
  """Returns why a pattern cannot be computed in segments, or None if it can.

  Args:
    pattern: Pattern of a layer, or a member of its mixture.
    length: Tokens of a segment.
    packed: Whether there are segment ids, for packed documents.
  """
  for part in union_parts(pattern):
    if part.before_chunk:
      return "own_chunk with a shift below chunk_size is not supported"
    if part.num_keys is not None:
      if packed:
        return "sinks of packed documents are not kept"
      if part.num_keys > length:
        return (
          f"it has {part.num_keys} sinks, more than a segment: use longer"
          " segments"
        )
      continue
    # Two segments show everything that more would.
    split = _Split(2, length)
    for head in part.pattern.head_groups():
      if _local_pattern(head, part.pattern, split) is None:
        return _why_whole(head, part.pattern, length)
  return None


def _why_whole(
  head: HeadPattern, pattern: AttentionPattern, length: int
) -> str:
  """Returns why a head needs the whole sequence (see `_local_pattern`)."""
  if pattern.causality == "slot":
    return 'with causality="slot" keys wrap round the end of the sequence'
  if unknown := head.in_use() - _LOCAL_FIELDS:
    return f"{', '.join(sorted(unknown))} of {head} is not supported"
  if head.select is not None and length % head.dilation:
    return (
      f"a segment must be a multiple of the dilation, {head.dilation} tokens"
    )
  size = head.chunk_size
  if size is not None:
    if length % size:
      return f"a segment must be a multiple of the chunk, {size} tokens"
    return (
      f"chunks that are both moved and shifted, as in {head}, are not supported"
    )
  if head.window is None:
    return (
      "it has heads that see the whole sequence before them: use a pattern with"
      " limited reach, such as scca_fixed, or no segments"
    )
  if head.shift and head.dilation > 1 and pattern.boundary == "local":
    return 'boundary="local" of dilated heads without chunks is not supported'
  reach = head.shift + (head.window - 1) * head.dilation
  return (
    f"it reaches back by {reach} tokens: use segments of at least that length"
  )
