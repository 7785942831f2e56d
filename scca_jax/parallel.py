"""Attention over a mesh: batch, heads and the sequence are sharded.

Every device calls a back end on its shard. Shards of the batch and of the heads
are independent. If the sequence is sharded, most heads need a few keys of the
shards before theirs (`halos`). A head that sees the whole sequence, dense or
dilated, is exchanged: each device gets all tokens of some of those heads
(DeepSpeed-Ulysses, arXiv 2309.14509). If there are fewer of them than devices,
keys and values go round instead (`ring`).

Everything sent to the device `d` shards ahead goes in one `ppermute`, whichever
heads it is for. If devices have heads with different patterns (`tensor`), each
takes its own branch; all messages have the same size.

The parts of this module: messages, heads exchanged whole, and the whole call
(`attend`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from scca_jax import halos, ring, sharding
from scca_jax.backends import unions
from scca_jax.backends.contract import BackEnd, Call
from scca_jax.backends.heads import kv_heads_of, take_heads
from scca_jax.halos import Plan, ShardedCall, Split
from scca_jax.patterns import AttentionPattern, HeadPattern, union_parts

# Pattern of padding heads: each query sees only itself.
_IDLE = HeadPattern(window=1)


@dataclasses.dataclass(frozen=True)
class _MeshCall(ShardedCall):
  """What the devices of one call have in common.

  Attributes:
    patterns: The pattern of each shard of the heads.
    plans: How each shard of the heads is served.
    axes: Mesh axes of the heads and of the sequence; None if not sharded.
  """

  patterns: tuple[AttentionPattern, ...]
  plans: tuple[Plan, ...]
  axes: tuple[str | None, str | None]

  def by_head_shard(
    self, values: Sequence[Any], function: Callable[..., Any], *args: Any
  ) -> Any:
    """Returns `function(value, *args)` for the device's shard of the heads."""
    index = 0 if self.axes[0] is None else lax.axis_index(self.axes[0])
    return _switch(values, index, function, *args)

  @property
  def shard_index(self) -> Any:
    """Index of the device's shard of the sequence, from 0."""
    return 0 if self.axes[1] is None else lax.axis_index(self.axes[1])


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


def _exchange(
  call: _MeshCall, key: jax.Array, value: jax.Array
) -> tuple[dict[int, jax.Array], jax.Array, jax.Array]:
  """Returns the messages received, by distance, and key and value.

  Messages are `[batch, size]`; for key and value see `halos.pack`.
  """
  sizes = halos.message_sizes(call.plans, call.split, key.shape[3])
  if not sizes:
    return {}, key, value
  pack = functools.partial(halos.pack, split=call.split, sizes=sizes)
  packed, key, value = call.by_head_shard(call.plans, pack, key, value)
  axis, shards = call.axes[1], call.split.num_shards
  received = {
    distance: lax.ppermute(
      message, axis, [(i, i + distance) for i in range(shards - distance)]
    )
    for distance, message in zip(sizes, packed, strict=True)
  }
  return received, key, value


def _segments_before(
  call: _MeshCall, segment_ids: jax.Array | None, batch: int
) -> dict[int, jax.Array]:
  """Returns the segment ids of this shard and of earlier ones, by distance.

  Before the first shard they are 0, for padding.
  """
  length, shards = call.split.length, call.split.num_shards
  found = {}
  for distance in halos.distances(call.plans, call.split):
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

  def whole_groups(plan: Plan) -> list[tuple[int, ...]] | None:
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

  They are in the order of `Plan.whole`, then padding.
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

  def unpack(both: tuple[Plan, _Assignment], *result: jax.Array):
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
  received, key, value = _exchange(call, key, value)
  segments = _segments_before(call, segment_ids, query.shape[0])
  from_whole = _attend_whole(call, query, key, value, segment_ids)
  return call.by_head_shard(
    call.plans,
    functools.partial(halos.attend_local, call),
    query,
    key,
    value,
    segments,
    received,
    from_whole,
    call.shard_index,
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
  split: Split,
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
    plans=tuple(
      halos.make_plan(
        pattern, heads, group_size, split, settings["has_segments"]
      )
      for heads in shards
    ),
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
  split = Split(shards, _shard_length(pattern, seq_len, shards))
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
  split = Split(num_shards, seq_len // num_shards)
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
  numbers = sum(halos.message_sizes(call.plans, split, head_dim).values())
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
