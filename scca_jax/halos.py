"""What a shard of a sequence needs from earlier ones, and its attention.

A shard is a device's share of the tokens (`parallel`), or a segment of a
sequence that one device computes a segment at a time (`segment_attention`). A
head's pattern determines what a shard needs from earlier ones:

* chunks within a shard need nothing;
* a head that looks back by less than a shard needs the keys just before it, a
  *halo*: half a chunk for `scca_fixed` and S2, the reach of a window;
* a head shifted by `s` tokens, a chunk or more, needs a halo of one shard's
  length that starts `s` tokens before the shard (`scca_flow`), and none of the
  shard's own keys;
* a head that sees the whole sequence, dense or dilated, has no halo.

A head of the third kind is served with the halo's keys in place of the shard's
own, as if its queries came a chunk later. Any other halo is put before the
shard's own keys, with as many idle queries: chunk borders, shifts and distances
stay as they are, positions stay in order, and any back end can serve the call.
A short halo matters only to the first few queries of a shard: all queries are
served with the shard's own keys, then those few again with the halo. If they
are most of a shard, a single call with the halo serves all, and segment 0 hides
whatever would come before the first token. Gradients travel back along the
messages.

The parts of this module: the plan (`make_plan`), gradients written in place
(`_lend`), messages (`pack`), and local calls (`attend_local`).
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from scca_jax.backends import registry
from scca_jax.backends.contract import BackEnd, Call
from scca_jax.backends.heads import join_heads, kv_heads_of, take_heads
from scca_jax.patterns import AttentionPattern, Boundary, HeadPattern

# Fields of a head that `local_pattern` handles; heads that use any other field
# have no halo.
LOCAL_FIELDS = frozenset(
  {"chunk_size", "offset", "shift", "dilation", "window", "select"}
)


@dataclasses.dataclass(frozen=True)
class Split:
  """How a sequence is split.

  Attributes:
    num_shards: Shards: devices along the axis `sequence`, or segments in time.
    length: Tokens per shard.
  """

  num_shards: int
  length: int


@dataclasses.dataclass(frozen=True)
class Halo:
  """Keys that a shard needs from the shards before it.

  Attributes:
    start: How many tokens before the shard they start.
    length: Number of tokens, at most a shard.
    kv_heads: Key heads.
  """

  start: int
  length: int
  kv_heads: tuple[int, ...]

  def sources(self, split: Split) -> list[tuple[int, int, int]]:
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
class LocalCall:
  """Query heads that one call on the device serves.

  Attributes:
    heads: Their indices on the device.
    patterns: Pattern of each head relative to its halo.
    starts: Where each head's halo starts, in tokens before the shard.
    length: Length of the halos, in tokens; 0 means no halo.
    num_queries: How many of the shard's first queries are served; 0 means all.
    boundary: See `AttentionPattern`.
    far_chunk: If not 0, a query sees the chunk of the halo in its own chunk's
      place, all of it and nothing else; chunks have this size, in tokens.
  """

  heads: tuple[int, ...]
  patterns: tuple[HeadPattern, ...]
  starts: tuple[int, ...]
  length: int
  num_queries: int = 0
  boundary: Boundary = "drop"
  far_chunk: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
  """How the heads of a device are served.

  Attributes:
    calls: Local calls; each head that does not need the whole sequence is in
      one.
    repeated: Local calls that serve a shard's first queries again, with a halo,
      in all shards but the first.
    fallbacks: Heads that serve some queries without the shift
      (`boundary="local"`), in an additional call, and their patterns, which
      determine the queries.
    whole: Heads that need the whole sequence.
    halos: What the calls need from other shards.
  """

  calls: tuple[LocalCall, ...]
  repeated: tuple[LocalCall, ...]
  fallbacks: tuple[tuple[int, HeadPattern], ...]
  whole: tuple[int, ...]
  halos: tuple[Halo, ...]


def local_pattern(
  head: HeadPattern, pattern: AttentionPattern, split: Split
) -> tuple[HeadPattern, int, int, int] | None:
  """Returns the head's pattern relative to its halo, and what it needs.

  The need is the halo's start and length, and how many of a shard's first
  queries depend on it. None if the head needs the whole sequence.

  Args:
    head: A head of `pattern`.
    pattern: Pattern of all heads.
    split: How the sequence is split.
  """
  size, length = head.chunk_size, split.length
  if pattern.causality == "slot" or head.in_use() - LOCAL_FIELDS:
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


def _is_far(head: HeadPattern, start: int) -> bool:
  """Whether a head sees whole chunks of a halo that starts so far back."""
  return (
    head.in_use() <= {"chunk_size", "offset", "shift"}
    and head.chunk_size is not None
    and start >= head.chunk_size
    and start % head.chunk_size == 0
  )


def make_plan(
  pattern: AttentionPattern,
  heads: Sequence[int],
  group_size: int,
  split: Split,
  has_segments: bool = False,
) -> Plan:
  """Returns how a device serves some heads of a pattern.

  Args:
    pattern: Pattern of all heads.
    heads: The heads of the device, which numbers them from 0.
    group_size: Query heads that share a key head.
    split: How the sequence is split.
    has_segments: Whether there are segment ids. They do not change the halos.
  """
  whole: list[int] = []
  fallbacks: list[tuple[int, HeadPattern]] = []
  # By halo length, number of queries, and what else the heads must share.
  calls: dict[Any, list[tuple[int, HeadPattern, int]]] = {}
  for place, index in enumerate(heads):
    head = pattern.heads[index]
    found = local_pattern(head, pattern, split)
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
    if _is_far(head, start) and not has_segments:
      key = (halo, 0, head.chunk_size)
    calls.setdefault(key, []).append((place, local, start))
    if pattern.boundary == "local" and head.shift and head.chunk_size:
      fallbacks.append((place, head))
  made = []
  for (halo, queries, kind), members in calls.items():
    places, locals_, starts = zip(*members, strict=True)
    boundary = "drop" if halo else pattern.boundary
    far_chunk = kind if isinstance(kind, int) else 0
    made.append(
      LocalCall(places, locals_, starts, halo, queries, boundary, far_chunk)
    )
  halos: dict[tuple[int, int], set[int]] = {}
  for local in made:
    if local.length:
      for place, start in zip(local.heads, local.starts, strict=True):
        kv_heads = halos.setdefault((start, local.length), set())
        kv_heads.add(place // group_size)
  return Plan(
    tuple(local for local in made if not local.num_queries),
    tuple(local for local in made if local.num_queries),
    tuple(fallbacks),
    tuple(whole),
    tuple(Halo(*k, tuple(sorted(kv))) for k, kv in halos.items()),
  )


@dataclasses.dataclass(frozen=True)
class ShardedCall:
  """What the shards of one call have in common.

  Attributes:
    group_size: Query heads that share a key head.
    split: How the sequence is split.
    scale: Factor of the scores.
    back_ends: Back ends that local calls try, in order.
    has_segments: Whether there are segment ids.
    needs_log_sum: Whether the log-sum-exp is needed.
    deterministic: See `scca_jax.attention`.
  """

  group_size: int
  split: Split
  scale: float
  back_ends: tuple[BackEnd, ...]
  has_segments: bool
  needs_log_sum: bool
  deterministic: bool

  def attend(
    self,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    pattern: AttentionPattern,
    segment_ids: jax.Array | None,
    query_offset: int = 0,
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
        query_offset=query_offset,
        needs_log_sum=self.needs_log_sum,
        deterministic=self.deterministic,
      ),
      self.back_ends,
    )
    if not self.needs_log_sum:
      return (output,)
    assert log_sum is not None
    return output, log_sum


# Gradients written in place.


def _put(
  x: jax.Array, part: jax.Array, start: int, heads: Sequence[int]
) -> jax.Array:
  """Returns `x` with `part` in `x[:, start : start + part.shape[1], heads]`."""
  first, count = heads[0], len(heads)
  if list(heads) == list(range(first, first + count)):
    at = (0, start, first, *(0,) * (x.ndim - 3))
    return lax.dynamic_update_slice(x, part, at)
  tokens = slice(start, start + part.shape[1])
  return x.at[:, tokens, np.array(heads)].set(part, mode="clip")


def _is_small(size: int, of: int) -> bool:
  """Whether writing a part in place pays: a large one takes more memory."""
  return 8 * size <= of


def _taken(
  x: jax.Array, start: int, end: int, heads: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
  """Returns `x`, to be written to, and `x[:, start:end, heads]`.

  XLA writes to an array in place only if the same kernel does not read it.
  """
  part = take_heads(x[:, start:end], heads)
  x, part = lax.optimization_barrier((x, part))
  return x, part


def _lend(
  x: jax.Array, start: int, end: int, heads: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
  """Returns `x`, to be used from now on, and `x[:, start:end, heads]`.

  A small part's gradient is added to that of `x` in place. By itself XLA would
  pad it with zeros, and add two arrays of the size of `x`.
  """
  part = take_heads(x[:, start:end], heads)
  if not _is_small(part.size, x.size):
    return x, part

  @jax.custom_vjp
  def lend(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, take_heads(x[:, start:end], heads)

  def backward(_: None, gradients: Any) -> tuple[jax.Array]:
    d_x, d_part = gradients
    d_x, before = _taken(d_x, start, end, heads)
    return (_put(d_x, before + d_part, start, heads),)

  lend.defvjp(lambda x: (lend(x), None), backward)
  result: Any = lend(x)
  return result


def _replace_first(
  x: jax.Array, part: jax.Array, is_kept: jax.Array, heads: tuple[int, ...]
) -> jax.Array:
  """Returns `x` with `part` as its first tokens, unless `x` is to be kept.

  If the part is small, the gradient is written in place, as with `_lend`.
  """
  length = part.shape[1]
  if not _is_small(part.size, x.size):
    first = take_heads(x[:, :length], heads)
    return _put(x, jnp.where(is_kept, first, part), 0, heads)

  @jax.custom_vjp
  def replace(x: jax.Array, part: jax.Array, is_kept: jax.Array) -> jax.Array:
    x, first = _taken(x, 0, length, heads)
    return _put(x, jnp.where(is_kept, first, part), 0, heads)

  def backward(is_kept: jax.Array, d_x: jax.Array) -> tuple[Any, ...]:
    d_x, d_first = _taken(d_x, 0, length, heads)
    d_x = _put(d_x, jnp.where(is_kept, d_first, 0), 0, heads)
    return d_x, jnp.where(is_kept, 0, d_first), None

  replace.defvjp(
    lambda x, part, is_kept: (replace(x, part, is_kept), is_kept), backward
  )
  result: Any = replace(x, part, is_kept)
  return result


# Messages from earlier shards.


def _messages(plan: Plan, split: Split) -> dict[int, list[tuple[Halo, slice]]]:
  """Returns what a shard needs from each earlier shard, by distance."""
  found: dict[int, list[tuple[Halo, slice]]] = {}
  for halo in plan.halos:
    for distance, first, last in halo.sources(split):
      if 0 < distance < split.num_shards:
        found.setdefault(distance, []).append((halo, slice(first, last)))
  return found


def distances(plans: Iterable[Plan], split: Split) -> list[int]:
  """Returns how many shards back the tokens of the halos are, from 0.

  Args:
    plans: The plan of each shard of the heads.
    split: How the sequence is split.
  """
  found = {0}
  for plan in plans:
    for halo in plan.halos:
      found |= {distance for distance, _, _ in halo.sources(split)}
  return sorted(found)


def message_sizes(
  plans: Iterable[Plan], split: Split, head_dim: int
) -> dict[int, int]:
  """Returns the number of elements of the message for each distance.

  Args:
    plans: The plan of each shard of the heads. Devices with different shards
      send equally large messages.
    split: How the sequence is split.
    head_dim: Length of a head.
  """
  sizes: dict[int, int] = {}
  for plan in plans:
    for distance, items in _messages(plan, split).items():
      size = sum(
        2 * (at.stop - at.start) * len(halo.kv_heads) * head_dim
        for halo, at in items
      )
      sizes[distance] = max(sizes.get(distance, 0), size)
  return sizes


def pack(
  plan: Plan,
  key: jax.Array,
  value: jax.Array,
  *,
  split: Split,
  sizes: dict[int, int],
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
  """Returns the messages to later shards, `[batch, size]`, as in `sizes`.

  Key and value are returned too, to be used from then on: gradients of what is
  sent are added to theirs in place.

  Args:
    plan: How the heads are served.
    key: Keys of the shard, `[batch, length, kv_heads, head_dim]`.
    value: Like `key`.
    split: How the sequence is split.
    sizes: From `message_sizes`.
  """
  batch = key.shape[0]
  messages = _messages(plan, split)
  packed = []
  for distance, size in sizes.items():
    parts = []
    for halo, at in messages.get(distance, []):
      key, of_key = _lend(key, at.start, at.stop, halo.kv_heads)
      value, of_value = _lend(value, at.start, at.stop, halo.kv_heads)
      parts += [of_key.reshape(batch, -1), of_value.reshape(batch, -1)]
    parts = parts or [jnp.zeros((batch, 0), key.dtype)]
    message = jnp.concatenate(parts, axis=1)
    rest = size - message.shape[1]
    packed.append(jnp.pad(message, ((0, 0), (0, rest))))
  return packed, key, value


@dataclasses.dataclass(frozen=True)
class _HaloArrays:
  """The arrays of a halo, `[batch, length, ...]`."""

  key: jax.Array
  value: jax.Array
  segment_ids: jax.Array


def _lend_own(
  plan: Plan, split: Split, key: jax.Array, value: jax.Array
) -> tuple[dict[Halo, list[jax.Array]], jax.Array, jax.Array]:
  """Returns the part of each halo in the shard itself, and key and value."""
  own = {}
  for halo in plan.halos:
    for distance, first, last in halo.sources(split):
      if distance == 0:
        key, of_key = _lend(key, first, last, halo.kv_heads)
        value, of_value = _lend(value, first, last, halo.kv_heads)
        own[halo] = [of_key, of_value]
  return own, key, value


def _unpack(
  call: ShardedCall,
  plan: Plan,
  own: dict[Halo, list[jax.Array]],
  segments: dict[int, jax.Array],
  received: dict[int, jax.Array],
  head_dim: int,
  dtype: Any,
) -> dict[tuple[int, int], _HaloArrays]:
  """Returns the halos of a plan, by start and length."""
  batch, split = segments[0].shape[0], call.split
  parts: dict[tuple[Halo, int], list[jax.Array]] = {
    (halo, 0): arrays for halo, arrays in own.items()
  }
  # In the order of `pack`.
  for distance, items in _messages(plan, split).items():
    message = received[distance]
    shapes = [
      (batch, at.stop - at.start, len(halo.kv_heads), head_dim)
      for halo, at in items
      for _ in range(2)
    ]
    sizes = [math.prod(shape[1:]) for shape in shapes]
    # Its gradient is one concatenation, unlike that of slices.
    pieces = lax.split(message, [*sizes, message.shape[1] - sum(sizes)], axis=1)
    arrays = [
      x.reshape(shape) for x, shape in zip(pieces, shapes, strict=False)
    ]
    for i, (halo, _) in enumerate(items):
      parts[halo, distance] = arrays[2 * i : 2 * i + 2]
  halos = {}
  for halo in plan.halos:
    keys, values, ids = [], [], []
    for distance, first, last in halo.sources(split):
      shape = (batch, last - first, len(halo.kv_heads), head_dim)
      nothing = jnp.zeros(shape, dtype)
      of_key, of_value = parts.get((halo, distance), [nothing, nothing])
      keys.append(of_key)
      values.append(of_value)
      ids.append(segments[distance][:, first:last])
    halos[halo.start, halo.length] = _HaloArrays(
      *(jnp.concatenate(x, axis=1) for x in (keys, values, ids))
    )
  return halos


# Local calls.


def _run_local_call(
  call: ShardedCall,
  plan: Plan,
  local: LocalCall,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
  halos: dict[tuple[int, int], _HaloArrays],
) -> tuple[jax.Array, ...]:
  """Returns the results of a local call, `[batch, queries, heads, ...]`.

  Args:
    call: What the shards have in common.
    plan: How the heads are served.
    local: The local call.
    query: Its queries.
    key: As many keys, of the heads `kv_heads_of` its heads.
    value: Like `key`.
    segment_ids: As many segment ids, or None.
    halos: From `_unpack`.
  """
  kv_heads = [place // call.group_size for place in local.heads]
  pattern = AttentionPattern(local.patterns, local.boundary)
  if not local.length:
    return call.attend(query, key, value, pattern, segment_ids)
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
      jnp.concatenate([take_heads(before, places), own], axis=1)
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


def _run_far_call(
  call: ShardedCall,
  plan: Plan,
  local: LocalCall,
  query: jax.Array,
  halos: dict[tuple[int, int], _HaloArrays],
  index: Any,
) -> tuple[jax.Array, ...]:
  """Returns the results of a local call with a `far_chunk`.

  Keys and values before the sequence are 0, as received. So is the result of a
  query that sees no others: it needs no mask, and passes no gradient on.
  """
  numbers = {
    halo.start: halo.kv_heads
    for halo in plan.halos
    if halo.length == local.length
  }
  wanted = [
    (start, place // call.group_size)
    for start, place in zip(local.starts, local.heads, strict=True)
  ]
  # Query heads next to each other may share a key head.
  unique = list(dict.fromkeys(wanted))
  count = len(wanted) // len(unique)
  if wanted == [x for x in unique for _ in range(count)]:
    wanted = unique
  chosen = [
    (halos[start, local.length], [numbers[start].index(head)])
    for start, head in wanted
  ]
  key, value = (
    jnp.concatenate(x, axis=2)
    for x in (
      [take_heads(halo.key, place) for halo, place in chosen],
      [take_heads(halo.value, place) for halo, place in chosen],
    )
  )
  size = local.far_chunk
  head = HeadPattern(chunk_size=size, shift=size)
  pattern = AttentionPattern((head,) * len(local.heads))
  output, *log_sum = call.attend(query, key, value, pattern, None, size)
  positions = index * call.split.length + jnp.arange(query.shape[1])
  sees_none = positions[:, None] < np.array([local.starts])
  return output, *(jnp.where(sees_none, -jnp.inf, x) for x in log_sum)


def _lend_first(
  call: ShardedCall,
  local: LocalCall,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array, jax.Array]:
  """Returns the first tokens of a call's heads, and the arrays, see `_lend`."""
  end, shared = local.num_queries, kv_heads_of(local.heads, call.group_size)
  kv_heads = tuple(sorted(set(shared)))
  query, of_query = _lend(query, 0, end, local.heads)
  key, of_key = _lend(key, 0, end, kv_heads)
  value, of_value = _lend(value, 0, end, kv_heads)
  places = [kv_heads.index(head) for head in shared]
  of_key, of_value = (take_heads(x, places) for x in (of_key, of_value))
  return (of_query, of_key, of_value), query, key, value


def attend_local(
  call: ShardedCall,
  plan: Plan,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segments: dict[int, jax.Array],
  received: dict[int, jax.Array],
  from_whole: tuple[jax.Array, ...],
  index: Any,
) -> tuple[jax.Array, ...]:
  """Returns the results of all heads of the device, in order.

  Args:
    call: What the shards have in common.
    plan: How the heads are served.
    query: Queries of the shard, `[batch, length, heads, head_dim]`.
    key: Likewise, `[batch, length, kv_heads, head_dim]`.
    value: Like `key`.
    segments: Segment ids, `[batch, length]`, of the shards that lie as far back
      as `distances` says; 0 before the first shard.
    received: The messages from earlier shards, by distance; see `pack`.
    from_whole: Results of the heads that need the whole sequence, in the order
      of `Plan.whole`; empty without such heads.
    index: Place of the shard in the sequence, from 0; may be traced.

  Returns:
    The output, `[batch, length, heads, head_dim]`, and the log-sum-exp,
    `[batch, length, heads]`, if it is needed.
  """
  own_ids = segments[0] if call.has_segments else None
  # The first tokens, for the calls that serve them again: small parts are lent
  # before the calls for all tokens, large ones are taken when they are needed.
  firsts = {}
  for local in plan.repeated:
    size = local.num_queries * len(local.heads)
    if _is_small(size, of=math.prod(query.shape[1:3])):
      firsts[local], query, key, value = _lend_first(
        call, local, query, key, value
      )
  own, key, value = _lend_own(plan, call.split, key, value)
  unpack = functools.partial(_unpack, head_dim=key.shape[3], dtype=key.dtype)
  halos = unpack(call, plan, own, segments, received)

  def run(local: LocalCall, ids: jax.Array | None) -> tuple[jax.Array, ...]:
    queries = take_heads(query, local.heads)
    if local.far_chunk:
      return _run_far_call(call, plan, local, queries, halos, index)
    shared = kv_heads_of(local.heads, call.group_size)
    keys, values = take_heads(key, shared), take_heads(value, shared)
    return _run_local_call(call, plan, local, queries, keys, values, ids, halos)

  results = [
    run(local, segments[0] if local.length else own_ids) for local in plan.calls
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
    halos = unpack(call, plan, own, segments, received)
  for local in plan.repeated:
    ids = None if own_ids is None else own_ids[:, : local.num_queries]
    if local in firsts:
      queries, keys, values = firsts[local]
    else:
      (queries, keys, values), *_ = _lend_first(call, local, query, key, value)
    again = _run_local_call(
      call, plan, local, queries, keys, values, ids, halos
    )
    # The first shard has no halo, so its results are final.
    result = tuple(
      _replace_first(x, y, index == 0, local.heads)
      for x, y in zip(result, again, strict=True)
    )
  if not plan.fallbacks:
    return result
  unshifted_heads = tuple(place for place, _ in plan.fallbacks)
  plain = tuple(
    dataclasses.replace(head, shift=0) for _, head in plan.fallbacks
  )
  local = LocalCall(unshifted_heads, plain, (0,) * len(plain), 0)
  unshifted = run(local, own_ids)
  positions = index * call.split.length + jnp.arange(call.split.length)
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
