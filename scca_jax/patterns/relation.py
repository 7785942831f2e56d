"""The relation: which keys the queries of each head see.

Patterns are plain, hashable descriptions. The sequence is cut into chunks of
`w` tokens whose borders are at `o + i w`; keys and values are moved `s` tokens
towards the end, so that slot `i` holds key `i - s`; keys are `r` slots apart.
Query `p` sees key `k` if and only if

    k <= p                                       (true positions: causal)
    floor((p - o) / w) == floor((k + s - o) / w)  (its slot is in p's chunk)
    (p - k - s) mod r == 0                        (dilation)
    0 <= (p - k - s) / r < window                 (if there is a window)
    p mod r == select                             (if the head selects queries)

A union head also sees its own chunk, unshifted, or the first tokens, called
sinks. Nothing wraps round: a slot without a key is empty. The names come from
SCCA (arXiv 2312.07305), LongLoRA (arXiv 2309.12307), LongNet (arXiv 2307.02486)
and DiNAT (arXiv 2209.15001). The full text of the SCCA paper was not available;
whatever we do not know it to specify is marked "own choice" and is a parameter.

The parts: `HeadPattern`, `AttentionPattern`, `Mixture`, and the disjoint parts
of a union.
"""

import dataclasses
import itertools
import operator
from typing import Any, Literal, get_args

import numpy as np

__all__ = [
  "AttentionPattern",
  "BOUNDARIES",
  "Boundary",
  "CAUSALITIES",
  "Causality",
  "HeadPattern",
  "Mixture",
  "Part",
  "members",
  "union_parts",
]

Boundary = Literal["drop", "local"]
Causality = Literal["position", "slot"]
BOUNDARIES: tuple[Boundary, ...] = get_args(Boundary)
CAUSALITIES: tuple[Causality, ...] = get_args(Causality)
# Positions and shifts are added as int32.
_MAX_INT = 2**30
# Queries whose keys are counted at once.
_BLOCK = 1 << 18
# How many runs of equal heads a `repr` shows.
_MAX_RUNS = 6


def check_int(name: str, value: Any, least: int | None) -> int:
  """Returns the value as a Python int, if it is an integer in range."""
  try:
    number = operator.index(value)
  except TypeError:
    raise ValueError(f"{name} must be an integer, got {value!r}.") from None
  if isinstance(value, bool):
    raise ValueError(f"{name} must be an integer, got {value}.")
  if least is not None and number < least:
    raise ValueError(f"{name} must be at least {least}, got {value}.")
  if abs(number) > _MAX_INT:
    raise ValueError(f"{name} must be at most 2**30 in size, got {value}.")
  return number


def check_sizes(**sizes: Any) -> None:
  """Checks that all sizes are integers of at least 1."""
  for name, value in sizes.items():
    check_int(name, value, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadPattern:
  """Where one query head reads its keys and values.

  Attributes:
    chunk_size: Length `w` of the chunks that the sequence is cut into, in
      tokens; None keeps it whole.
    offset: Chunk borders are at `offset + i * chunk_size`, in tokens.
    shift: How far keys and values move towards the end, in tokens: the head
      looks back that far. (The direction is our own choice: the opposite one
      would leave rows without keys under a causal mask.)
    dilation: Distance `r` between neighbouring key slots, in tokens.
    window: How many of the nearest slots are kept; None keeps all.
    select: Only queries with `p mod dilation == select` are served; the others
      get 0 (LongNet). None serves all.
    own_chunk: Whether the head also sees its own chunk, neither shifted nor
      dilated (own choice).
    sinks: The head also sees this many tokens at the start of the sequence, or
      of the query's segment (own choice; the term is from arXiv 2309.17453).
  """

  chunk_size: int | None = None
  offset: int = 0
  shift: int = 0
  dilation: int = 1
  window: int | None = None
  select: int | None = None
  own_chunk: bool = False
  sinks: int = 0

  def __post_init__(self):
    for name, least in (
      ("chunk_size", 1),
      ("offset", None),
      ("shift", 0),
      ("dilation", 1),
      ("window", 1),
      ("select", 0),
      ("sinks", 0),
    ):
      value = getattr(self, name)
      if value is not None or getattr(HeadPattern, name) is not None:
        object.__setattr__(self, name, check_int(name, value, least))
    if self.offset and self.chunk_size is None:
      raise ValueError(
        f"offset={self.offset} moves the borders of chunks: give a chunk_size."
      )
    if self.select is not None and self.select >= self.dilation:
      raise ValueError(
        f"select={self.select} must be below dilation={self.dilation}."
      )
    if not isinstance(self.own_chunk, bool):
      raise ValueError(
        f"own_chunk must be True or False, got {self.own_chunk!r}."
      )
    if self.own_chunk and self.chunk_size is None:
      raise ValueError("own_chunk=True needs chunks: give a chunk_size.")
    if self.is_union and self.select is not None:
      raise ValueError(
        f"select={self.select} leaves out queries that own_chunk or sinks would"
        " serve: use one or the other."
      )

  @property
  def is_union(self) -> bool:
    """Whether the head also sees its own chunk or sinks."""
    return self.own_chunk or self.sinks > 0

  def __repr__(self) -> str:
    settings = (
      f"{field.name}={getattr(self, field.name)!r}"
      for field in dataclasses.fields(self)
      if field.name in self.in_use()
    )
    return f"HeadPattern({', '.join(settings)})"

  def in_use(self) -> frozenset[str]:
    """Returns the names of the fields that differ from their defaults.

    A back end refuses a head that uses a field it does not serve.
    """
    return frozenset(
      field.name
      for field in dataclasses.fields(self)
      if getattr(self, field.name) != field.default
    )

  def within(self, seq_len: int) -> "HeadPattern":
    """Returns a head that sees the same among the first `seq_len` positions.

    Its dilation and window are limited to the distances that occur, so that
    work grows with the sequence and not with the size of a number.

    Args:
      seq_len: Length of the sequence, in tokens.
    """
    # With a larger dilation, only a distance of 0 is divisible.
    enough = max(seq_len, self.shift + 1, (self.select or 0) + 1)
    dilation = min(self.dilation, enough)
    window = self.window
    if window is not None:
      window = min(window, (seq_len - 1) // dilation + 1)
    if dilation == self.dilation and (self.window or 0) * dilation <= _MAX_INT:
      return self
    return dataclasses.replace(self, dilation=dilation, window=window)

  def falls_back(self, queries: Any) -> Any:
    """Marks the queries that `boundary="local"` serves without the shift.

    These are the queries in chunks whose whole shifted window lies before
    position 0 and, in an unchunked dilated head, the first `shift` queries.

    Args:
      queries: Positions, an integer array of numpy or jax.
    """
    if self.chunk_size is None:
      return queries < (self.shift if self.dilation > 1 else 0)
    ends = (queries - self.offset) // self.chunk_size * self.chunk_size + (
      self.chunk_size + self.offset
    )
    return (ends <= self.shift) & (self.shift > 0)

  def _seen(
    self, queries: Any, query_slots: Any, key_slots: Any, in_order: Any
  ) -> Any:
    """Marks the pairs for which the relation holds.

    Args:
      queries: Positions of the queries, for `select`.
      query_slots: Their slots, counted from the first chunk border.
      key_slots: Slots of the keys, counted the same way.
      in_order: Whether each pair is in causal order.
    """
    seen = in_order
    if self.chunk_size is not None:
      seen = seen & (
        query_slots // self.chunk_size == key_slots // self.chunk_size
      )
    distance = query_slots - key_slots
    if self.dilation > 1:
      seen = seen & (distance % self.dilation == 0)
    if self.window is not None:
      seen = seen & (distance >= 0) & (distance < self.window * self.dilation)
    if self.select is not None:
      seen = seen & (queries % self.dilation == self.select)
    return seen

  def seen(
    self,
    queries: Any,
    keys: Any,
    seq_len: int,
    *,
    boundary: Boundary = "drop",
    causality: Causality = "position",
    starts: Any = 0,
  ) -> Any:
    """Marks the pairs of positions in which the query sees the key.

    Positions are compared, never slots, so a shift cannot show the future. Only
    `causality="slot"` compares slots, and leaks where the roll wraps round.

    Args:
      queries: Positions, an integer array of numpy or jax.
      keys: Positions; it broadcasts with `queries`.
      seq_len: Length of the sequence, which a cyclic roll depends on.
      boundary: See `AttentionPattern`.
      causality: See `AttentionPattern`.
      starts: Where the segment of each key starts; it broadcasts with `keys`.
        Sinks are counted from there. The caller has to hide segments from each
        other.

    Returns:
      A boolean array of the broadcast shape.
    """
    if causality == "slot":
      query_slots = (queries - self.offset) % seq_len
      key_slots = (keys + (self.shift - self.offset)) % seq_len
      return self._seen(
        queries, query_slots, key_slots, key_slots <= query_slots
      )

    def shifted(shift: int) -> Any:
      return self._seen(
        queries,
        queries - self.offset,
        keys + (shift - self.offset),
        keys <= queries,
      )

    seen = shifted(self.shift)
    if boundary == "local" and self.shift:
      falls_back = self.falls_back(queries)
      seen = (shifted(0) & falls_back) | (seen & ~falls_back)
    if self.own_chunk:
      seen = seen | HeadPattern(
        chunk_size=self.chunk_size, offset=self.offset
      ).seen(queries, keys, seq_len)
    if self.sinks:
      seen = seen | ((keys <= queries) & (keys - starts < self.sinks))
    return seen

  def num_keys(
    self,
    seq_len: int,
    *,
    boundary: Boundary = "drop",
    causality: Causality = "position",
    at: range | None = None,
  ) -> np.ndarray:
    """Returns how many keys each query sees, by arithmetic.

    Args:
      seq_len: Length of the sequence, in tokens.
      boundary: See `AttentionPattern`.
      causality: See `AttentionPattern`.
      at: Positions of the queries; None means all.

    Returns:
      int64 `[queries]`.
    """
    at = range(seq_len) if at is None else at
    queries = np.arange(at.start, at.stop, dtype=np.int64)
    if causality == "slot":
      # The keys' slots are a permutation of all slots, like the queries'.
      places = (queries - self.offset) % max(seq_len, 1)
      shift, offset, lowest, highest = 0, 0, 0, places
    else:
      places, offset = queries, self.offset
      shift = np.full(len(queries), self.shift)
      if boundary == "local":
        shift[self.falls_back(queries)] = 0
      # In slots: keys from 0 to the query itself.
      lowest, highest = shift, places + shift
    start = np.zeros_like(places)
    if self.chunk_size is not None:
      start = (places - offset) // self.chunk_size * self.chunk_size + offset
      lowest = np.maximum(lowest, start)
      highest = np.minimum(highest, start + self.chunk_size - 1)
    if self.window is not None:
      lowest = np.maximum(lowest, places - (self.window - 1) * self.dilation)
      highest = np.minimum(highest, places)

    def count(first: Any, last: Any) -> np.ndarray:
      """Counts the slots of the query's residue in [first, last]."""
      counts = (last - places) // self.dilation
      return np.maximum(counts - (first - 1 - places) // self.dilation, 0)

    counts = count(lowest, highest)
    if self.select is not None:
      counts[queries % self.dilation != self.select] = 0
    if not self.is_union:
      return counts
    # The two other parts are keys [first, query] and [0, last]. They are
    # counted without the keys that the first part already has, in shifted
    # slots.
    first = np.maximum(start, 0) if self.own_chunk else queries + 1
    last = np.minimum(self.sinks - 1, queries)
    for low, high in ((first, queries), (0, np.minimum(last, first - 1))):
      counts += np.maximum(high - low + 1, 0)
      counts -= count(
        np.maximum(lowest, low + shift), np.minimum(highest, high + shift)
      )
    return counts


@dataclasses.dataclass(frozen=True)
class AttentionPattern:
  """Which keys each query head sees.

  Attributes:
    heads: One `HeadPattern` per query head.
    boundary: What a query sees if its shifted keys all lie before the start
      (own choice): with "drop" nothing, so that it may get 0; with "local" what
      the head sees without the shift (`HeadPattern.falls_back`).
    causality: "position", exact; or "slot" (own choice): keys are rolled
      cyclically and masked by slot, as in code that reuses one triangular mask.
      It leaks the future at the wrap, and exists to measure that.
  """

  heads: tuple[HeadPattern, ...]
  boundary: Boundary = "drop"
  causality: Causality = "position"

  def __post_init__(self):
    object.__setattr__(self, "heads", tuple(self.heads))
    if not self.heads:
      raise ValueError("a pattern needs at least one head, got none.")
    for name, known in (("boundary", BOUNDARIES), ("causality", CAUSALITIES)):
      value = getattr(self, name)
      if value not in known:
        raise ValueError(
          f"unknown {name} {value!r}: use one of {', '.join(known)}."
        )
    if self.boundary == "local" and self.causality == "slot":
      raise ValueError(
        'boundary="local" has no meaning with causality="slot", which wraps'
        ' round: use boundary="drop".'
      )
    if self.causality == "slot" and any(head.is_union for head in self.heads):
      raise ValueError(
        'causality="slot" masks rolled keys by slot, and own_chunk and sinks'
        ' have no slots: use causality="position".'
      )

  def __repr__(self) -> str:
    runs = [
      (head, len(list(run))) for head, run in itertools.groupby(self.heads)
    ]
    shown = [
      f"{count} x {head}" if count > 1 else f"{head}"
      for head, count in runs[:_MAX_RUNS]
    ]
    if rest := sum(count for _, count in runs[_MAX_RUNS:]):
      shown.append(f"{rest} more heads")
    shown += [
      f"{name}={getattr(self, name)!r}"
      for name in ("boundary", "causality")
      if getattr(self, name) != getattr(AttentionPattern, name)
    ]
    return f"AttentionPattern({', '.join(shown)})"

  @property
  def num_heads(self) -> int:
    """Number of query heads."""
    return len(self.heads)

  def head_groups(self) -> dict[HeadPattern, tuple[int, ...]]:
    """Returns the heads that share each `HeadPattern`, by first appearance."""
    groups: dict[HeadPattern, tuple[int, ...]] = {}
    for index, head in enumerate(self.heads):
      groups[head] = (*groups.get(head, ()), index)
    return groups

  def within(self, seq_len: int) -> "AttentionPattern":
    """Returns a pattern that sees the same; see `HeadPattern.within`."""
    heads = {head: head.within(seq_len) for head in self.head_groups()}
    return dataclasses.replace(
      self, heads=tuple(heads[head] for head in self.heads)
    )

  def seen(
    self, queries: Any, keys: Any, seq_len: int, *, starts: Any = 0
  ) -> Any:
    """Marks the pairs of positions in which the query sees the key.

    Args:
      queries: Positions, an integer array of numpy or jax (also traced).
      keys: Positions; it broadcasts with `queries`.
      seq_len: Length of the sequence, in tokens.
      starts: Where the segment of each key starts; see `HeadPattern.seen`.

    Returns:
      A boolean array `[heads, *broadcast]`, of the library of the inputs.
    """
    of_head = {
      head: head.seen(
        queries,
        keys,
        seq_len,
        boundary=self.boundary,
        causality=self.causality,
        starts=starts,
      )
      for head in self.head_groups()
    }
    library = (queries - keys).__array_namespace__()
    return library.stack(
      library.broadcast_arrays(*(of_head[head] for head in self.heads))
    )

  def visible(self, seq_len: int) -> np.ndarray:
    """Returns the mask, numpy bool `[heads, query seq, key seq]`."""
    positions = np.arange(seq_len)
    return self.seen(positions[:, None], positions[None, :], seq_len)

  def num_pairs(self, seq_len: int) -> int:
    """Returns the number of pairs that all heads see; builds no mask."""
    how: Any = {"boundary": self.boundary, "causality": self.causality}
    return sum(
      len(indices)
      * int(
        head.num_keys(
          seq_len, **how, at=range(first, min(first + _BLOCK, seq_len))
        ).sum()
      )
      for head, indices in self.head_groups().items()
      for first in range(0, seq_len, _BLOCK)
    )

  def interleaved(self, num_kv_heads: int) -> "AttentionPattern":
    """Returns the pattern with heads permuted across GQA groups (own choice).

    With `g` query heads per key head, head `a g + b` gets the pattern of head
    `b num_kv_heads + a`, so that a group has different shifts.

    Raises:
      ValueError: The number of heads is not divisible by `num_kv_heads`.
    """
    check_sizes(num_kv_heads=num_kv_heads)
    size, rest = divmod(self.num_heads, num_kv_heads)
    if rest:
      raise ValueError(
        f"{self.num_heads} heads are not divisible by"
        f" num_kv_heads={num_kv_heads}."
      )
    heads = tuple(
      self.heads[b * num_kv_heads + a]
      for a in range(num_kv_heads)
      for b in range(size)
    )
    return dataclasses.replace(self, heads=heads)


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Several patterns that every head attends by (LongNet, arXiv 2307.02486).

  The results are combined by their log-sum-exp, so a pair that several members
  see counts once for each.

  Attributes:
    members: The patterns, each for the same number of heads.
  """

  members: tuple[AttentionPattern, ...]

  def __post_init__(self):
    object.__setattr__(self, "members", tuple(self.members))
    if not self.members:
      raise ValueError("a mixture needs at least one pattern, got none.")
    for member in self.members:
      if not isinstance(member, AttentionPattern):
        raise ValueError(
          f"a mixture is made of AttentionPatterns, got {member!r}."
        )
    counts = [member.num_heads for member in self.members]
    if len(set(counts)) > 1:
      raise ValueError(
        "the patterns of a mixture must have the same number of heads, got"
        f" {', '.join(map(str, counts))}."
      )

  @property
  def num_heads(self) -> int:
    """Number of query heads."""
    return self.members[0].num_heads

  def num_pairs(self, seq_len: int) -> int:
    """Returns the number of pairs seen, over all heads and members."""
    return sum(member.num_pairs(seq_len) for member in self.members)

  def interleaved(self, num_kv_heads: int) -> "Mixture":
    """Returns the mixture with the heads of each member interleaved."""
    return Mixture(
      tuple(member.interleaved(num_kv_heads) for member in self.members)
    )


def members(
  pattern: AttentionPattern
  | Mixture
  | tuple[AttentionPattern, ...]
  | list[AttentionPattern],
) -> tuple[AttentionPattern, ...]:
  """Returns the patterns whose results `scca_jax.attention` combines."""
  if isinstance(pattern, Mixture):
    return pattern.members
  if isinstance(pattern, tuple | list):
    return tuple(pattern)
  return (pattern,)


# Union heads as parts.


@dataclasses.dataclass(frozen=True)
class Part:
  """One of the disjoint parts of the pairs that a pattern sees.

  Attributes:
    heads: Query heads of the pattern that have this part, in order.
    pattern: What these heads see, without `own_chunk` and `sinks`.
    before_chunk: Whether only keys before the query's own chunk count.
    num_keys: Only the first `num_keys` keys of the sequence, or of the query's
      segment, count; None counts all.
    hidden: Pairs that this pattern sees do not count; None hides none.
  """

  heads: tuple[int, ...]
  pattern: AttentionPattern
  before_chunk: bool = False
  num_keys: int | None = None
  hidden: AttentionPattern | None = None

  @property
  def is_plain(self) -> bool:
    """Whether `pattern` alone describes the part."""
    return self == Part(self.heads, self.pattern)

  def seen(
    self, queries: Any, keys: Any, seq_len: int, *, starts: Any = 0
  ) -> Any:
    """Marks the pairs of the part; see `AttentionPattern.seen`."""
    seen = self.pattern.seen(queries, keys, seq_len)
    if self.num_keys is not None:
      seen = seen & (keys - starts < self.num_keys)[None]
    if self.hidden is not None:
      seen = seen & ~self.hidden.seen(queries, keys, seq_len)
    if self.before_chunk:
      own = [
        HeadPattern(chunk_size=head.chunk_size, offset=head.offset)
        for head in self.pattern.heads
      ]
      seen = seen & ~AttentionPattern(tuple(own)).seen(queries, keys, seq_len)
    return seen


def union_parts(pattern: AttentionPattern) -> tuple[Part, ...]:
  """Returns disjoint parts that together are the pairs a pattern sees.

  A back end without unions serves the parts and combines them by their
  log-sum-exp. They are: the first part of every head, or its own chunk if that
  contains it; the own chunks; and the sinks, without what the others see. A
  shift of a chunk or more leaves the own chunk; with a smaller one, only keys
  before the chunk count. Sinks, and shifts of less than a chunk together with
  an own chunk, need XLA (`backends.xla_cache`) or a kernel that knows them; any
  back end serves a part that `is_plain`.

  Args:
    pattern: Any pattern; one without unions is its only part.
  """
  if not any(head.is_union for head in pattern.heads):
    return (Part(tuple(range(pattern.num_heads)), pattern),)
  # The heads that share a part, and what they see of it.
  firsts: dict[tuple[Boundary, bool], dict[int, HeadPattern]] = {}
  owns: dict[int, HeadPattern] = {}
  sinks: dict[int, dict[int, HeadPattern]] = {}
  for index, head in enumerate(pattern.heads):
    first = dataclasses.replace(head, own_chunk=False, sinks=0)
    boundary, overlaps = pattern.boundary, False
    if head.own_chunk:
      own = HeadPattern(chunk_size=head.chunk_size, offset=head.offset)
      # Where the head falls back, its own chunk contains what it sees.
      boundary = "drop"
      if head.shift:
        owns[index] = own
        overlaps = head.shift < (head.chunk_size or 0)
      else:
        first = own
    firsts.setdefault((boundary, overlaps), {})[index] = first
    if head.sinks:
      others = dataclasses.replace(head, sinks=0)
      sinks.setdefault(head.sinks, {})[index] = others
  parts = [
    Part(
      tuple(of_head),
      AttentionPattern(tuple(of_head.values()), boundary),
      before_chunk=overlaps,
    )
    for (boundary, overlaps), of_head in firsts.items()
  ]
  if owns:
    parts.append(Part(tuple(owns), AttentionPattern(tuple(owns.values()))))
  for count, of_head in sinks.items():
    others = AttentionPattern(tuple(of_head.values()), pattern.boundary)
    everything = AttentionPattern((HeadPattern(),) * len(of_head))
    parts.append(
      Part(tuple(of_head), everything, num_keys=count, hidden=others)
    )
  return tuple(parts)
