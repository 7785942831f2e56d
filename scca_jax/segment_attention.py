"""Attention of a sequence that one device computes a segment at a time.

A segment is a shard in time: as on a mesh, it needs a few keys of earlier ones,
which arrive in messages (`halos`). A head that needs the whole sequence cannot
be served, except for sinks: the first tokens' keys travel along to all
segments. `segments` takes whole models through a sequence this way.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from scca_jax import halos
from scca_jax.backends import unions
from scca_jax.backends.contract import BackEnd, Call
from scca_jax.backends.heads import kv_heads_of
from scca_jax.patterns import AttentionPattern, HeadPattern, union_parts


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

  @property
  def split(self) -> halos.Split:
    """How the sequence is split."""
    return halos.Split(self.count, self.length)

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


def _plan(
  pattern: AttentionPattern,
  group_size: int,
  segment: Segment,
  has_segments: bool = False,
) -> halos.Plan:
  """Returns how the heads of a pattern are served."""
  return halos.make_plan(
    pattern, range(pattern.num_heads), group_size, segment.split, has_segments
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
        kv_heads = len(kv_heads_of(part.heads, group_size))
        of_part = part.pattern.num_heads // kv_heads
        plan = _plan(part.pattern, of_part, segment)
        sizes = halos.message_sizes([plan], segment.split, head_dim)
        by_distance.append(
          {
            distance: jnp.zeros((batch, size), dtype)
            for distance, size in sizes.items()
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
    group_size, split = call.query.shape[2] // kv_heads, segment.split
    has_segments = call.segment_ids is not None
    plan = _plan(call.pattern, group_size, segment, has_segments)
    distances = halos.distances([plan], split)
    sizes = halos.message_sizes([plan], split, head_dim)
    packed, key, value = halos.pack(
      plan, call.key, call.value, split=split, sizes=sizes
    )
    output, *log_sum = halos.attend_local(
      halos.ShardedCall(
        group_size=group_size,
        split=split,
        scale=call.scale,
        back_ends=back_ends,
        has_segments=has_segments,
        needs_log_sum=call.needs_log_sum,
        deterministic=call.deterministic,
      ),
      plan,
      call.query,
      key,
      value,
      {d: segment.ids_before(d, batch) for d in distances},
      received.by_distance[len(sent)],
      (),
      segment.index,
    )
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
    split = halos.Split(2, length)
    for head in part.pattern.head_groups():
      if halos.local_pattern(head, part.pattern, split) is None:
        return _why_whole(head, part.pattern, length)
  return None


def _why_whole(
  head: HeadPattern, pattern: AttentionPattern, length: int
) -> str:
  """Returns why a head needs the whole sequence (see `halos.local_pattern`)."""
  if pattern.causality == "slot":
    return 'with causality="slot" keys wrap round the end of the sequence'
  if unknown := head.in_use() - halos.LOCAL_FIELDS:
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
