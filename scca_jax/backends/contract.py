"""Declares what each back end serves, and says why it refuses a call."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from scca_jax.backends.heads import varying_axes
from scca_jax.patterns import AttentionPattern
from scca_jax.target import Target

# Name under which a kernel saves its results for its backward pass, so that
# `jax.checkpoint` can keep them and recompute the rest.
SAVED = "scca_attention"


def starts_late(
  query: jax.Array,
  key: jax.Array,
  pattern: AttentionPattern,
  segment_ids: jax.Array | None,
  query_offset: int | jax.Array,
) -> bool:
  """Whether queries only start later, and every key that they see is there.

  Then there are as many keys as queries, and each query's chunk is shifted by
  at least the offset. A back end can serve such a call like one without an
  offset whose shifts are smaller by as much.
  """
  length = query.shape[1]
  return (
    isinstance(query_offset, int)
    and query_offset > 0
    and length == key.shape[1]
    and segment_ids is None
    and pattern.boundary == "drop"
    and pattern.causality == "position"
    and all(
      head.in_use() <= {"chunk_size", "offset", "shift"}
      and head.chunk_size is not None
      and head.shift >= query_offset
      and (query_offset + length - head.offset) % head.chunk_size == 0
      for head in pattern.head_groups()
    )
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """The arguments of one call of a back end.

  Attributes:
    query: `[batch, seq, heads, head_dim]`.
    key: `[batch, kv_seq, kv_heads, head_dim]`.
    value: Like `key`.
    pattern: Which keys each query head sees.
    scale: Factor of the scores.
    segment_ids: Integers `[batch, kv_seq]`, or None.
    query_offset: Position of the first query, in tokens.
    needs_log_sum: Whether the log-sum-exp is used.
    deterministic: Whether gradients must be bit-equal from run to run.
  """

  query: jax.Array
  key: jax.Array
  value: jax.Array
  pattern: AttentionPattern
  scale: float
  segment_ids: jax.Array | None = None
  query_offset: int | jax.Array = 0
  needs_log_sum: bool = False
  deterministic: bool = False

  @property
  def fields_in_use(self) -> frozenset[str]:
    """Fields of pattern and heads that differ from their defaults."""
    known = ("heads", "boundary", "causality")
    of_pattern = {
      field.name
      for field in dataclasses.fields(self.pattern)
      if field.name not in known
      and getattr(self.pattern, field.name) != field.default
    }
    return frozenset(of_pattern).union(
      *(head.in_use() for head in self.pattern.head_groups())
    )

  @property
  def varies(self) -> bool:
    """Whether the arrays' types say that they vary along axes of a mesh."""
    arrays = (self.query, self.key, self.value, self.segment_ids)
    return any(x is not None and varying_axes(x) for x in arrays)

  @property
  def is_union(self) -> bool:
    """Whether heads also see their own chunk or sinks."""
    return any(head.is_union for head in self.pattern.head_groups())

  @property
  def starts_late(self) -> bool:
    """See the function of this name."""
    return starts_late(
      self.query, self.key, self.pattern, self.segment_ids, self.query_offset
    )

  @property
  def has_cache(self) -> bool:
    """Whether queries and keys have different positions, as in decoding."""
    return (
      not isinstance(self.query_offset, int)
      or self.query_offset != 0
      or self.query.shape[1] != self.key.shape[1]
    )


Attend = Callable[..., tuple[jax.Array, jax.Array | None]]


def _listed(values: Any) -> str:
  """Returns "a, b or c"."""
  *first, last = map(str, values)
  return f"{', '.join(first)} or {last}" if first else last


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackEnd:
  """What an implementation serves; it refuses everything else.

  A back end may refuse more calls with NotImplementedError, before it computes
  anything.

  Attributes:
    name: Its name as an `implementation`.
    load: Imports its module and returns the function
      `(query, key, value, pattern, *, segment_ids, query_offset, scale) ->
      (output, log-sum-exp)` for one pattern; the log-sum-exp is float32
      `[batch, seq, heads]`.
    pattern_fields: Fields of `HeadPattern` that it obeys; None obeys all, by
      calling `AttentionPattern.seen`.
    boundaries: Values of `AttentionPattern.boundary`.
    causalities: Values of `AttentionPattern.causality`.
    dtypes: Dtypes of the inputs.
    head_dims: Lengths of a head; None serves any.
    runs_on: Whether it runs on a device.
    needs: The devices it needs, in words.
    segments: Whether it serves segment ids.
    cache: Whether queries may start at an offset, or be fewer than the keys.
    late_starts: Whether it serves `Call.starts_late`.
    log_sum: Whether it returns the log-sum-exp.
    deterministic: Whether gradients are bit-equal from run to run.
    takes_deterministic: Whether its function also takes `deterministic`, and is
      faster without.
    checked_axes: Whether it runs inside a `jax.shard_map` with
      `check_vma=True`, where every value in a kernel would have to declare
      along which mesh axes it varies.
    automatic: Whether it may be chosen without being named.
    furthest: Limit below which lengths, shifts and chunk sizes must be, in
      tokens.
    max_dilation: Largest dilation, in tokens.
    max_size: The query must have fewer elements.
    unserved_unions: Returns, in words, which of a call's union heads it does
      not serve, if it obeys `own_chunk` and `sinks`.
  """

  name: str
  load: Callable[[], Attend]
  pattern_fields: frozenset[str] | None
  boundaries: tuple[str, ...] = ("drop", "local")
  causalities: tuple[str, ...] = ("position",)
  dtypes: tuple[str, ...]
  head_dims: tuple[int, ...] | None = None
  runs_on: Callable[[Target], bool] = lambda device: True
  needs: str = "any device"
  segments: bool = True
  cache: bool = False
  late_starts: bool = False
  log_sum: bool = True
  deterministic: bool = True
  takes_deterministic: bool = False
  checked_axes: bool = False
  automatic: bool = True
  furthest: int | None = None
  max_dilation: int | None = None
  max_size: int | None = None
  unserved_unions: Callable[[Call], str | None] = lambda call: None

  def serves_unions(self, call: Call) -> bool:
    """Whether it serves the `own_chunk` and `sinks` of a call by itself."""
    union = {"own_chunk", "sinks"}
    if self.pattern_fields is not None and not union <= self.pattern_fields:
      return False
    return not self.unserved_unions(call)

  def refuses_device(self, device: Target) -> str | None:
    """Returns why it does not run on a device, or None if it does."""
    if self.runs_on(device):
      return None
    return f"{self.name} needs {self.needs}, but this is {device.kind}"

  def refuses(self, call: Call, device: Target) -> str | None:
    """Returns why it does not serve a call on a device, or None if it does."""
    reason = self.refuses_device(device) or self._refuses_arrays(call)
    return reason or self._refuses_pattern(call)

  def _refuses_arrays(self, call: Call) -> str | None:
    dtype = np.dtype(call.query.dtype).name
    if dtype not in self.dtypes:
      return f"{self.name} serves {_listed(self.dtypes)}, not {dtype}"
    head_dim = call.query.shape[3]
    if self.head_dims is not None and head_dim not in self.head_dims:
      return (
        f"{self.name} serves a head_dim of {_listed(self.head_dims)}, not"
        f" {head_dim}"
      )
    if self.max_size is not None and call.query.size >= self.max_size:
      return (
        f"{self.name} serves queries of fewer than {self.max_size} elements,"
        f" not {call.query.shape}"
      )
    if call.segment_ids is not None and not self.segments:
      return f"{self.name} does not serve segment_ids"
    late_start = self.late_starts and call.starts_late
    if call.has_cache and not (self.cache or late_start):
      return (
        f"{self.name} serves query_offset=0 and as many keys as queries, not"
        f" query_offset={call.query_offset}, {call.key.shape[1]} keys and"
        f" {call.query.shape[1]} queries"
      )
    if call.needs_log_sum and not self.log_sum:
      return f"{self.name} does not return the log-sum-exp"
    if call.deterministic and not self.deterministic:
      return f"{self.name} is not deterministic"
    if call.varies and not self.checked_axes:
      return (
        f"{self.name} does not run inside a jax.shard_map with check_vma=True"
      )
    return None

  def _refuses_pattern(self, call: Call) -> str | None:
    pattern = call.pattern
    if self.pattern_fields is not None:
      unknown = call.fields_in_use - self.pattern_fields
      if unknown:
        return f"{self.name} does not serve {_listed(sorted(unknown))}"
    if call.is_union and (unserved := self.unserved_unions(call)):
      return f"{self.name} does not serve {unserved}"
    for name, served in (
      ("boundary", self.boundaries),
      ("causality", self.causalities),
    ):
      if getattr(pattern, name) not in served:
        return (
          f'{self.name} serves {name}="{_listed(served)}", not'
          f' "{getattr(pattern, name)}"'
        )
    for head in pattern.head_groups():
      reach = max(
        call.query.shape[1], head.shift, abs(head.offset), head.chunk_size or 0
      )
      if self.furthest is not None and reach >= self.furthest:
        return (
          f"{self.name} serves lengths and shifts below {self.furthest} tokens,"
          f" not {head} with {call.query.shape[1]} tokens"
        )
      if self.max_dilation is not None and head.dilation > self.max_dilation:
        return (
          f"{self.name} serves dilations up to {self.max_dilation}, not"
          f" {head.dilation}"
        )
    return None
