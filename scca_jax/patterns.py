"""Attention patterns of SCCA and its peers, as plain, hashable descriptions.

An `AttentionPattern` says which keys the queries of each query head see. The
sequence is cut into chunks of `w` tokens whose borders are at `o + i w`; keys
and values are moved `s` tokens towards the end, so that slot `i` holds key
`i - s`; keys are `r` slots apart. Query `p` sees key `k` if and only if

    k <= p                                       (true positions: causal)
    floor((p - o) / w) == floor((k + s - o) / w)  (its slot is in p's chunk)
    (p - k - s) mod r == 0                        (dilation)
    0 <= (p - k - s) / r < window                 (if there is a window)
    p mod r == select                             (if the head selects queries)

A union head also sees its own chunk, unshifted, or the first tokens, the sinks.
Nothing wraps round: a slot without a key is empty. The names are those of SCCA
(arXiv 2312.07305), LongLoRA (arXiv 2309.12307), LongNet (arXiv 2307.02486) and
DiNAT (arXiv 2209.15001). The full text of the SCCA paper was not available;
what it is not known to specify is marked "own choice" below and is a parameter.

The parts of this module: the relation (`HeadPattern`, `AttentionPattern`,
`Mixture`), the named constructors, and patterns as strings (`parse`, `text`).
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np

Boundary = Literal["drop", "local"]
Causality = Literal["position", "slot"]
BOUNDARIES: tuple[Boundary, ...] = get_args(Boundary)
CAUSALITIES: tuple[Causality, ...] = get_args(Causality)
# Positions and shifts are added as int32.
_MAX_INT = 2**30
# How many runs of equal heads a `repr` shows.
_MAX_RUNS = 6


def _check_int(name: str, value: Any, least: int | None) -> int:
  """Returns the value as an int of Python, if it is an integer in range."""
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


def _check_sizes(**sizes: Any) -> None:
  for name, value in sizes.items():
    _check_int(name, value, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadPattern:
  """Where one query head reads its keys and values.

  Attributes:
    chunk_size: Length `w` of the chunks the sequence is cut in, in tokens;
      None keeps it whole.
    offset: Chunk borders stand at `offset + i * chunk_size`, in tokens.
    shift: How far keys and values move towards the end, in tokens: the head
      looks back by as much. (The direction is an own choice: the other one
      would leave rows without keys under a causal mask.)
    dilation: Distance `r` between neighbouring key slots, in tokens.
    window: How many of the nearest slots are kept; None keeps all.
    select: Only queries with `p mod dilation == select` are served, the others
      get 0 (LongNet); None serves all.
    own_chunk: Whether the head also sees its own chunk, neither shifted nor
      dilated (own choice).
    sinks: The head also sees that many tokens at the start of the sequence, or
      of the query's segment (own choice; arXiv 2309.17453 names them).
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
        object.__setattr__(self, name, _check_int(name, value, least))
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
        f"select={self.select} leaves queries out, and own_chunk or sinks would"
        " serve them: use one or the other."
      )

  @property
  def is_union(self) -> bool:
    """Whether the head sees its own chunk or sinks beside its first part."""
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

  def falls_back(self, queries: Any) -> Any:
    """Marks the queries that `boundary="local"` serves without the shift.

    They are those of chunks whose whole shifted window lies before position 0
    and, of an unchunked dilated head, the first `shift` ones.

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
    """Marks the pairs that the relation holds for.

    Args:
      queries: Positions of the queries, for `select`.
      query_slots: Their slots, counted from the first chunk border.
      key_slots: Slots of the keys, counted likewise.
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

    Positions are compared, never slots: a shift cannot show the future. Only
    `causality="slot"` compares slots, and leaks where the roll wraps round.

    Args:
      queries: Positions, an integer array of numpy or jax.
      keys: Positions; it broadcasts with `queries`.
      seq_len: Length of the sequence, which a cyclic roll depends on.
      boundary: See `AttentionPattern`.
      causality: See `AttentionPattern`.
      starts: Where the segment of each key starts; it broadcasts with `keys`.
        Sinks are counted from there. That segments do not see each other is
        up to the caller.

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
  ) -> np.ndarray:
    """Returns how many keys each query sees, int64 `[seq]`, by arithmetic.

    Args:
      seq_len: Length of the sequence, in tokens.
      boundary: See `AttentionPattern`.
      causality: See `AttentionPattern`.
    """
    queries = np.arange(seq_len, dtype=np.int64)
    if causality == "slot":
      # The slots of the keys are a permutation of all, like the queries'.
      places = (queries - self.offset) % max(seq_len, 1)
      shift, offset, lowest, highest = 0, 0, 0, places
    else:
      places, offset = queries, self.offset
      shift = np.full(seq_len, self.shift)
      if boundary == "local":
        shift[self.falls_back(queries)] = 0
      # As slots: keys from 0 to the query itself.
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
    # The two other parts are keys [first, query] and [0, last], which are
    # counted, less what the first part has of them: as slots, shifted.
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
    heads: One `HeadPattern` a query head.
    boundary: What becomes of queries whose shifted keys all lie before the
      start (own choice): "drop", they see nothing there and may get 0; or
      "local", they are served without the shift (`HeadPattern.falls_back`).
    causality: "position", exact; or "slot" (own choice): keys are rolled
      cyclically and masked by slot, as code that reuses one triangular mask
      does. It leaks the future at the wrap and exists to measure the
      literature.
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
        'causality="slot" masks rolled keys by slot, which own_chunk and sinks'
        ' have none of: use causality="position".'
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
    """Returns the number of pairs seen, over all heads; no mask is built."""
    return sum(
      len(indices)
      * int(
        head.num_keys(
          seq_len, boundary=self.boundary, causality=self.causality
        ).sum()
      )
      for head, indices in self.head_groups().items()
    )

  def interleaved(self, num_kv_heads: int) -> "AttentionPattern":
    """Returns the pattern with heads permuted across GQA groups (own choice).

    With `g` query heads to a key head, head `a g + b` takes what head
    `b num_kv_heads + a` had, so that a group meets different shifts.

    Raises:
      ValueError: The number of heads is not divisible by `num_kv_heads`.
    """
    _check_sizes(num_kv_heads=num_kv_heads)
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
  """Patterns of which every head attends by each (arXiv 2307.02486, LongNet).

  The results are combined by their log-sum-exp, so that a pair that several
  members show counts once for each.

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


def mixture(*patterns: AttentionPattern) -> Mixture:
  """Returns LongNet's mixture of patterns (arXiv 2307.02486).

  Raises:
    ValueError: There is no pattern, or they differ in their number of heads.
  """
  return Mixture(patterns)


# Union heads as parts.


@dataclasses.dataclass(frozen=True)
class Part:
  """One of the disjoint parts of the pairs that a pattern shows.

  Attributes:
    heads: Query heads of the pattern that have this part, in order.
    pattern: What they see of it; without `own_chunk` and `sinks`.
    before_chunk: Whether only keys before the query's own chunk count.
    num_keys: Only the first `num_keys` keys, of the sequence or of the query's
      segment, count; None counts all.
    hidden: Pairs that this pattern shows do not count; None hides none.
  """

  heads: tuple[int, ...]
  pattern: AttentionPattern
  before_chunk: bool = False
  num_keys: int | None = None
  hidden: AttentionPattern | None = None

  @property
  def is_plain(self) -> bool:
    """Whether `pattern` says all of it."""
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
  """Returns disjoint parts that together are the pairs a pattern shows.

  A back end that serves no unions serves the parts, and combines them by their
  log-sum-exp. They are: the first part of every head, or its own chunk where
  that has all of it; the own chunks; and the sinks, less what the others show.
  A shift of a chunk or more leaves the own chunk; of a smaller one only keys
  before the chunk count. Only the sinks need XLA (`backends.xla_cache`) or a
  kernel that knows them, and shifts of less than a chunk beside an own chunk;
  what `Part.is_plain` any back end serves.

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
      # Where the head falls back, its own chunk has what it sees.
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
    parts.append(
      Part(tuple(of_head), dense(len(of_head)), num_keys=count, hidden=others)
    )
  return tuple(parts)


# The named patterns. A string may leave sizes out: those that `_named` lists
# follow from the length then.


@dataclasses.dataclass(frozen=True)
class _Constructor:
  """A named pattern and which of its arguments follow from the length.

  Attributes:
    make: Takes the number of heads and the arguments, by name.
    arguments: Their names.
    sizes: Arguments that follow from the length where they are left out.
    num_chunks: How many chunks the length is then cut into.
  """

  make: Callable[..., AttentionPattern]
  arguments: tuple[str, ...]
  sizes: tuple[str, ...] = ()
  num_chunks: int = 4

  def __call__(
    self, num_heads: int, seq_len: int, settings: dict[str, Any]
  ) -> AttentionPattern:
    """Returns the pattern; `settings` are the arguments that were given."""
    _check_sizes(seq_len=seq_len)
    given = {name: x for name, x in settings.items() if x is not None}
    chunk_size = given.get("chunk_size", max(1, seq_len // self.num_chunks))
    _check_sizes(chunk_size=chunk_size)
    num_chunks = -(-seq_len // chunk_size)
    follow = {
      "chunk_size": chunk_size,
      "window": chunk_size,
      "num_chunks": num_chunks,
      "dilation": num_chunks,
    }
    return self.make(
      num_heads, **({name: follow[name] for name in self.sizes} | given)
    )


_CONSTRUCTORS: dict[str, _Constructor] = {}


def _named(*sizes: str, num_chunks: int = 4) -> Callable[..., Any]:
  """Registers a constructor under its name; see `_Constructor`."""

  def register(make: Callable[..., AttentionPattern]) -> Any:
    _, *arguments = inspect.signature(make).parameters
    _CONSTRUCTORS[make.__name__] = _Constructor(
      make, tuple(arguments), sizes, num_chunks
    )
    return make

  return register


@_named()
def dense(num_heads: int) -> AttentionPattern:
  """Returns full causal attention."""
  _check_sizes(num_heads=num_heads)
  return AttentionPattern((HeadPattern(),) * num_heads)


@_named("chunk_size")
def local(num_heads: int, chunk_size: int) -> AttentionPattern:
  """Returns attention within chunks, the baseline of the SCCA abstract."""
  _check_sizes(num_heads=num_heads, chunk_size=chunk_size)
  return AttentionPattern((HeadPattern(chunk_size=chunk_size),) * num_heads)


@_named("window")
def sliding(num_heads: int, window: int) -> AttentionPattern:
  """Returns attention to the `window` nearest keys (like Mistral's)."""
  _check_sizes(num_heads=num_heads, window=window)
  return AttentionPattern((HeadPattern(window=window),) * num_heads)


@_named("chunk_size")
def s2(num_heads: int, chunk_size: int) -> AttentionPattern:
  """Returns LongLoRA's S2-Attn (arXiv 2309.12307).

  The first half of the heads has chunks, the second chunks whose borders are
  moved by half a chunk: queries move with their keys.
  """
  _check_sizes(num_heads=num_heads, chunk_size=chunk_size)
  first = HeadPattern(chunk_size=chunk_size)
  second = HeadPattern(chunk_size=chunk_size, offset=chunk_size // 2)
  half = num_heads // 2
  return AttentionPattern((first,) * half + (second,) * (num_heads - half))


def _fixed_heads(
  num_heads: int, chunk_size: int, shift: int | None
) -> tuple[HeadPattern, ...]:
  first = HeadPattern(chunk_size=chunk_size)
  second = HeadPattern(
    chunk_size=chunk_size, shift=chunk_size // 2 if shift is None else shift
  )
  half = num_heads // 2
  return (first,) * half + (second,) * (num_heads - half)


@_named("chunk_size")
def scca_fixed(
  num_heads: int, chunk_size: int, shift: int | None = None
) -> AttentionPattern:
  """Returns SCCA fixed: half the heads read shifted keys (arXiv 2312.07305).

  Args:
    num_heads: Query heads; the first `num_heads // 2` are not shifted.
    chunk_size: Tokens.
    shift: Tokens; None takes half a chunk (own choice).
  """
  _check_sizes(num_heads=num_heads, chunk_size=chunk_size)
  return AttentionPattern(_fixed_heads(num_heads, chunk_size, shift))


@_named("chunk_size", "num_chunks")
def scca_flow(
  num_heads: int,
  chunk_size: int,
  num_chunks: int,
  rotate: int = 0,
  own_chunk: bool = False,
  sinks: int = 0,
) -> AttentionPattern:
  """Returns SCCA flow: each head has a shift of its own (arXiv 2312.07305).

  Head `h` is shifted by `(h num_chunks // num_heads + rotate) mod num_chunks`
  chunks. With at least as many heads as chunks, and no more tokens than
  `num_chunks * chunk_size`, the heads together see every earlier token.

  Args:
    num_heads: Query heads.
    chunk_size: Tokens.
    num_chunks: Chunks at the training length.
    rotate: Chunks added to every shift, for layers that differ.
    own_chunk: Whether every head also sees its own chunk (own choice).
    sinks: Tokens at the start that every head also sees (own choice).
  """
  _check_sizes(
    num_heads=num_heads, chunk_size=chunk_size, num_chunks=num_chunks
  )
  _check_int("rotate", rotate, None)
  heads = tuple(
    HeadPattern(
      chunk_size=chunk_size,
      shift=(h * num_chunks // num_heads + rotate) % num_chunks * chunk_size,
      own_chunk=own_chunk,
      sinks=sinks,
    )
    for h in range(num_heads)
  )
  return AttentionPattern(heads)


@_named("chunk_size", "num_chunks", num_chunks=8)
def scca_near(
  num_heads: int,
  chunk_size: int,
  num_chunks: int,
  sinks: int = 0,
  rotate: int = 0,
) -> AttentionPattern:
  """Returns heads that see their own chunk and one further back (own choice).

  Head `h` also sees the chunk that is `1 + (h (num_chunks - 1) // num_heads +
  rotate) mod (num_chunks - 1)` before its own. With at least `num_chunks - 1`
  heads, and no more tokens than `num_chunks * chunk_size`, the heads together
  see every earlier token.

  Args:
    num_heads: Query heads.
    chunk_size: Tokens.
    num_chunks: Chunks at the training length.
    sinks: Tokens at the start that every head also sees.
    rotate: Chunks added to every shift, for layers that differ.
  """
  _check_sizes(
    num_heads=num_heads, chunk_size=chunk_size, num_chunks=num_chunks
  )
  far = scca_flow(
    num_heads, chunk_size, max(num_chunks - 1, 1), rotate, True, sinks
  )
  heads = tuple(
    dataclasses.replace(head, shift=head.shift + chunk_size)
    for head in far.heads
  )
  return AttentionPattern(heads)


@_named("chunk_size", "dilation")
def dilated(num_heads: int, chunk_size: int, dilation: int) -> AttentionPattern:
  """Returns LongNet's dilated attention, DA (arXiv 2307.02486).

  Head `h` serves only the queries and reads only the keys whose position in
  the chunk (LongNet's segment) is `h` modulo the dilation. LongNet combines
  several pairs of chunk size and dilation: see `mixture`.
  """
  _check_sizes(num_heads=num_heads, chunk_size=chunk_size, dilation=dilation)
  heads = tuple(
    HeadPattern(chunk_size=chunk_size, dilation=dilation, select=h % dilation)
    for h in range(num_heads)
  )
  return AttentionPattern(heads)


@_named("window", "dilation")
def dna(num_heads: int, window: int, dilation: int) -> AttentionPattern:
  """Returns causal dilated neighbourhood attention, DNA (arXiv 2209.15001)."""
  _check_sizes(num_heads=num_heads, window=window, dilation=dilation)
  head = HeadPattern(dilation=dilation, window=window)
  return AttentionPattern((head,) * num_heads)


def _sda_heads(
  num_heads: int, dilation: int, chunk_size: int | None, window: int | None
) -> tuple[HeadPattern, ...]:
  _check_sizes(dilation=dilation)
  return tuple(
    HeadPattern(
      chunk_size=chunk_size,
      shift=h % dilation,
      dilation=dilation,
      window=window,
    )
    for h in range(num_heads)
  )


@_named("dilation")
def sda(
  num_heads: int,
  dilation: int,
  chunk_size: int | None = None,
  window: int | None = None,
) -> AttentionPattern:
  """Returns Shifted Dilated Attention, SDA (arXiv 2312.07305).

  Head `h` is shifted by `h mod dilation` tokens, so that the heads together
  see every earlier token if there are at least `dilation` of them, no chunks
  and no window. SDA-2 and SDA-4 are dilations 2 and 4 of the whole sequence.
  """
  _check_sizes(num_heads=num_heads)
  return AttentionPattern(_sda_heads(num_heads, dilation, chunk_size, window))


def _check_list(name: str, values: Any, kinds: Any) -> tuple[Any, ...]:
  if not isinstance(values, tuple | list) or not all(
    isinstance(x, kinds) and not isinstance(x, bool) for x in values
  ):
    raise ValueError(f"{name} must be a list of numbers, got {values!r}.")
  return tuple(values)


@_named("chunk_size")
def longmixed(
  num_heads: int,
  chunk_size: int,
  dilations: Sequence[int] = (2, 4),
  split: Sequence[float] = (1 / 2, 1 / 4, 1 / 4),
) -> AttentionPattern:
  """Returns LongMixed: SCCA fixed, SDA-2 and SDA-4 (arXiv 2312.07305).

  Args:
    num_heads: Query heads.
    chunk_size: Chunks of the SCCA fixed heads, in tokens.
    dilations: One for each SDA head group; these have no chunks.
    split: Shares of the heads of SCCA fixed and of each SDA group (own
      choice); they sum to 1.

  Raises:
    ValueError: There is not one share a head group, or they do not sum to 1.
  """
  _check_sizes(num_heads=num_heads, chunk_size=chunk_size)
  dilations = _check_list("dilations", dilations, int)
  split = _check_list("split", split, int | float)
  if len(split) != len(dilations) + 1 or not min(split) >= 0:
    raise ValueError(
      f"split={split} must have one share for SCCA fixed and one for each of"
      f" dilations={dilations}."
    )
  if not abs(sum(split) - 1) <= 1e-6:
    raise ValueError(f"split={split} must sum to 1, got {sum(split)}.")
  cuts = [round(num_heads * float(c)) for c in np.cumsum(split)]
  heads = _fixed_heads(cuts[0], chunk_size, None)
  for dilation, start, stop in zip(dilations, cuts, cuts[1:], strict=False):
    heads += _sda_heads(stop - start, dilation, None, None)
  return AttentionPattern(heads)


NAMES = tuple(_CONSTRUCTORS)


def uniform(num_heads: int, **fields: Any) -> AttentionPattern:
  """Returns heads that are all alike (own choice).

  With `mix`, it gives strings a way to say any list of heads.

  Args:
    num_heads: Query heads.
    **fields: Fields of `HeadPattern`.
  """
  _check_sizes(num_heads=num_heads)
  return AttentionPattern((HeadPattern(**fields),) * num_heads)


_CONSTRUCTORS["uniform"] = _Constructor(
  uniform, tuple(field.name for field in dataclasses.fields(HeadPattern))
)


def mix(*patterns: AttentionPattern) -> AttentionPattern:
  """Returns the heads of several patterns one after another.

  Each is made for its own number of heads.

  Raises:
    ValueError: There is none, or they differ in boundary or causality.
  """
  if not patterns:
    raise ValueError("mix needs at least one pattern, got none.")
  for name in ("boundary", "causality"):
    values = sorted({getattr(pattern, name) for pattern in patterns})
    if len(values) > 1:
      raise ValueError(
        f"the patterns to mix differ in {name}: {', '.join(values)}."
      )
  return AttentionPattern(
    tuple(head for pattern in patterns for head in pattern.heads),
    patterns[0].boundary,
    patterns[0].causality,
  )


def schedule(
  make: Callable[[int], AttentionPattern], num_layers: int
) -> tuple[AttentionPattern, ...]:
  """Returns `make(layer)` for each layer, counted from 0."""
  _check_sizes(num_layers=num_layers)
  return tuple(make(layer) for layer in range(num_layers))


def make(
  name: str,
  *,
  num_heads: int,
  seq_len: int,
  boundary: Boundary = "drop",
  causality: Causality = "position",
  **settings: Any,
) -> AttentionPattern:
  """Returns the pattern of that name, for configs and commands.

  Sizes that `settings` lacks follow from the length: `chunk_size` is a quarter
  of it, `window` a chunk, `num_chunks` and `dilation` the number of chunks.

  Args:
    name: A constructor of this module.
    num_heads: Query heads.
    seq_len: Length to train at, in tokens.
    boundary: See `AttentionPattern`.
    causality: See `AttentionPattern`.
    **settings: Arguments of the constructor.

  Raises:
    ValueError: The name or a setting is unknown, or out of range.
  """
  if name not in _CONSTRUCTORS:
    raise ValueError(
      f"unknown pattern {name!r}: use one of {', '.join(NAMES)}."
    )
  constructor = _CONSTRUCTORS[name]
  for setting in settings:
    if setting not in constructor.arguments:
      raise ValueError(
        f"the pattern {name} has no setting {setting!r}: it has"
        f" {', '.join((*constructor.arguments, 'boundary', 'causality'))}."
      )
  return dataclasses.replace(
    constructor(num_heads, seq_len, settings),
    boundary=boundary,
    causality=causality,
  )


def make_schedule(
  name: str, *, num_heads: int, num_layers: int, seq_len: int, **settings: Any
) -> tuple[AttentionPattern, ...]:
  """Returns the pattern of each layer; see `make`.

  Args:
    name: A constructor of this module.
    num_heads: Query heads.
    num_layers: Layers.
    seq_len: Length to train at, in tokens.
    **settings: Arguments of the constructor; `rotate="layer"` rotates the
      shifts of `scca_flow` by one chunk more in each layer.

  Raises:
    ValueError: See `make`.
  """

  def of_layer(layer: int) -> AttentionPattern:
    given = dict(settings)
    if given.get("rotate") == "layer":
      given["rotate"] = layer
    return make(name, num_heads=num_heads, seq_len=seq_len, **given)

  return schedule(of_layer, num_layers)


# Patterns as strings: `parse` reads them, `text` writes them.

# Longer than any list of heads, shorter than what would keep a parser busy.
_MAX_TEXT = 100_000
_OPTIONS = ("boundary", "causality", "interleaved")
# Forms whose parts are forms too, and the arguments that they take by name.
_COMPOUND = {"mix": ("heads",), "mixture": (), "layers": ("dense",)}
_LAYER = "layer"
# What differs between the heads of one constructor, longmixed apart.
_MOVED = {"shift": 0, "offset": 0, "select": None}


@dataclasses.dataclass(frozen=True)
class _Place:
  """What a form is built for.

  Attributes:
    num_heads: Query heads.
    num_kv_heads: Key heads; None in a part of `mix`, which has no GQA groups
      of its own.
    layer: Counted from 0.
    num_layers: Layers of the model.
    seq_len: Length that sizes follow from, in tokens.
    options: Boundary and causality of the form around this one.
  """

  num_heads: int
  num_kv_heads: int | None
  layer: int
  num_layers: int
  seq_len: int
  options: tuple[tuple[str, Any], ...] = ()


def _nearest(what: str, name: str, known: Sequence[str]) -> str:
  """Returns a line that names the unknown and what may have been meant."""
  near = difflib.get_close_matches(name, known, 1, 0.5)
  hint = f"did you mean {near[0]!r}? " if near else ""
  return f"{what} {_short(name)}: {hint}Use one of {', '.join(known)}."


def _short(text: str) -> str:
  return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _literal(name: str, node: ast.expr) -> Any:
  try:
    return ast.literal_eval(node)
  except (ValueError, TypeError, RecursionError, MemoryError):
    raise ValueError(
      f"{name}={_short(ast.unparse(node))} must be a number, a string, True,"
      " False or a list of these."
    ) from None


def _call(
  node: ast.expr,
) -> tuple[str, list[ast.expr], dict[str, ast.expr]]:
  """Returns name, parts and arguments of `NAME` or `NAME(part, name=...)`."""
  if isinstance(node, ast.Name):
    return node.id, [], {}
  if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
    raise ValueError(
      f"{_short(ast.unparse(node))} is not a pattern: write a name, or"
      " name(argument=value, ...)."
    )
  arguments = {}
  for keyword in node.keywords:
    if keyword.arg is None:
      raise ValueError("** cannot be used: write name=value.")
    if keyword.arg in arguments:
      raise ValueError(f"{_short(keyword.arg)} is given twice.")
    arguments[keyword.arg] = keyword.value
  return node.func.id, node.args, arguments


def _integers(name: str, value: Any) -> tuple[int, ...]:
  values = (value,) if isinstance(value, int) else value
  return tuple(_check_int(name, x, 0) for x in _check_list(name, values, int))


def _build(node: ast.expr, place: _Place) -> AttentionPattern | Mixture:
  """Returns the pattern that a form describes, in one layer."""
  name, parts, arguments = _call(node)
  forms = (*_CONSTRUCTORS, *_COMPOUND)
  if name not in forms:
    raise ValueError(_nearest("unknown pattern", name, forms))
  known = _COMPOUND.get(name)
  if known is None:
    known = _CONSTRUCTORS[name].arguments
    if parts:
      raise ValueError(
        f"{name} takes arguments by name, got {_short(ast.unparse(parts[0]))}:"
        f" write {name}({(known or _OPTIONS)[0]}=...)."
      )
  elif not parts:
    raise ValueError(f"{name} needs patterns: write {name}(local, sda).")
  for argument in arguments:
    if argument not in (*known, *_OPTIONS):
      raise ValueError(
        _nearest(f"{name} has no argument", argument, (*known, *_OPTIONS))
      )
  values = {x: _literal(x, node) for x, node in arguments.items()}
  interleaved = values.pop("interleaved", False)
  if not isinstance(interleaved, bool):
    raise ValueError(f"interleaved must be True or False, got {interleaved!r}.")
  options = dict(place.options)
  for option, allowed in (("boundary", BOUNDARIES), ("causality", CAUSALITIES)):
    if option in values:
      options[option] = value = values.pop(option)
      if value not in allowed:
        raise ValueError(
          f"unknown {option} {value!r}: use one of {', '.join(allowed)}."
        )
  inner = dataclasses.replace(place, options=tuple(options.items()))
  if name in _COMPOUND:
    pattern = _build_compound(name, parts, values, inner)
  else:
    if values.get("rotate") == _LAYER:
      values["rotate"] = place.layer
    pattern = dataclasses.replace(
      _CONSTRUCTORS[name](place.num_heads, place.seq_len, values), **options
    )
  if interleaved:
    if place.num_kv_heads is None:
      raise ValueError(
        "a part of mix cannot be interleaved: write mix(..., interleaved=True)."
      )
    pattern = pattern.interleaved(place.num_kv_heads)
  return pattern


def _build_compound(
  name: str, parts: list[ast.expr], values: dict[str, Any], place: _Place
) -> AttentionPattern | Mixture:
  if name == "layers":
    dense_layers = _integers("dense", values.get("dense", ()))
    if dense_layers and max(dense_layers) >= place.num_layers:
      raise ValueError(
        f"dense={dense_layers} must be layers of 0 to {place.num_layers - 1}."
      )
    if place.layer in dense_layers:
      return _build(ast.Name("dense"), place)
    return _build(parts[place.layer % len(parts)], place)
  if name == "mixture":
    counts = [place.num_heads] * len(parts)
  else:
    counts = _integers("heads", values.get("heads", ()))
    place = dataclasses.replace(place, num_kv_heads=None)
    if len(counts) != len(parts) or sum(counts) != place.num_heads:
      raise ValueError(
        f"mix needs the number of heads of each of its {len(parts)} patterns,"
        f" {place.num_heads} in all: got heads={counts}."
      )
  built = [
    _build(part, dataclasses.replace(place, num_heads=count))
    for part, count in zip(parts, counts, strict=True)
  ]
  single = []
  for pattern in built:
    if isinstance(pattern, Mixture):
      raise ValueError(f"a mixture cannot be a part of {name}.")
    single.append(pattern)
  return mix(*single) if name == "mix" else mixture(*single)


def parse(
  text: str, *, num_heads: int, num_kv_heads: int, num_layers: int, seq_len: int
) -> tuple[AttentionPattern | Mixture, ...]:
  """Returns the pattern of each layer that a string describes.

  The string is a name of this module, such as `scca_fixed`, or a call with
  arguments by name, such as `longmixed(chunk_size=2048, dilations=(2, 4, 8))`.
  Nothing but literals is evaluated. Sizes left out follow from `seq_len`:
  `chunk_size` is a quarter of it (in `scca_near` an eighth), `window` a chunk,
  `num_chunks` and `dilation` the number of chunks.

  * Every form takes `boundary=` and `causality=`, which hold for the forms in
    it too, and `interleaved=True` (see `AttentionPattern`).
  * `scca_flow` and `scca_near` take `rotate="layer"`: one chunk more in each
    layer.
  * `mix(A, B, heads=(4, 5))` gives the heads to several patterns in sequence.
  * `mixture(A, B)` lets every head attend by both (see `Mixture`).
  * `layers(A, B)` gives layer `l` pattern `l mod 2`; with `dense=(3, 11)`
    those layers are dense.
  * `uniform(...)` takes the fields of `HeadPattern`, for all heads.

  Args:
    text: The string.
    num_heads: Query heads.
    num_kv_heads: Key heads, for `interleaved=True`.
    num_layers: Layers.
    seq_len: Length to train at, in tokens.

  Raises:
    ValueError: The string is not a pattern, or does not fit the model; one
      line that names the fault.
  """
  _check_sizes(
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    num_layers=num_layers,
    seq_len=seq_len,
  )
  if not isinstance(text, str):
    raise ValueError(f"a pattern must be a string, got {text!r}.")
  if len(text) > _MAX_TEXT:
    raise ValueError(
      f"a pattern must have at most {_MAX_TEXT} characters, got {len(text)}."
    )
  try:
    tree = ast.parse(text.strip(), mode="eval").body
  except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
    said = error.msg if isinstance(error, SyntaxError) else "nested too deeply"
    raise ValueError(
      f"the pattern {_short(text)} cannot be read: {said}. Write a name, or"
      " name(argument=value, ...)."
    ) from None
  try:
    return tuple(
      _build(tree, _Place(num_heads, num_kv_heads, layer, num_layers, seq_len))
      for layer in range(num_layers)
    )
  except ValueError as error:
    raise ValueError(f"the pattern {_short(text)}: {error}") from None
  except RecursionError:
    raise ValueError(
      f"the pattern {_short(text)} is nested too deeply."
    ) from None


def _written(name: str, parts: Sequence[str] = (), /, **arguments: Any) -> str:
  """Returns a form as a string; arguments of None are left out."""
  given = [f"{k}={v!r}" for k, v in arguments.items() if v is not None]
  inside = ", ".join([*parts, *given])
  return f"{name}({inside})" if inside else name


def _flow_rotations(shifts: Sequence[int]) -> Iterator[tuple[int, int]]:
  """Yields the (num_chunks, rotate) that may have given shifts in chunks.

  Head `h` has `h m // H`, rotated. From one head to the next that is `m / H`
  more, rounded, and once, at the wrap, `m` less.
  """
  heads = len(shifts)
  drops = [a - b for a, b in itertools.pairwise(shifts) if a > b]
  spread = drops[0] if drops else shifts[-1] - shifts[0]
  few = max(heads - 1, 1)
  lowest = max(max(shifts) + 1, (spread - 1) * heads // few)
  highest = max(lowest, (spread + 2) * heads // few + 1)
  for num_chunks in range(lowest, highest + 1):
    yield num_chunks, shifts[0]


def _constructions(
  heads: tuple[HeadPattern, ...],
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields names and arguments that may have made these heads.

  Arguments that have their default value are None.
  """
  first, last = heads[0], heads[-1]
  chunk_size, dilation, window = last.chunk_size, last.dilation, last.window
  yield "dense", {}
  if chunk_size is None:
    if window is not None:
      yield "sliding", {"window": window}
      yield "dna", {"window": window, "dilation": dilation}
    yield "sda", {"dilation": dilation, "window": window}
  else:
    yield "local", {"chunk_size": chunk_size}
    yield "s2", {"chunk_size": chunk_size}
    shift = None if last.shift == chunk_size // 2 else last.shift
    yield "scca_fixed", {"chunk_size": chunk_size, "shift": shift}
    yield "dilated", {"chunk_size": chunk_size, "dilation": dilation}
    yield (
      "sda",
      {"dilation": dilation, "chunk_size": chunk_size, "window": window},
    )
    shifts = [head.shift // chunk_size for head in heads]
    sinks = last.sinks or None
    for num_chunks, rotate in _flow_rotations([shift - 1 for shift in shifts]):
      yield (
        "scca_near",
        {
          "chunk_size": chunk_size,
          "num_chunks": num_chunks + 1,
          "sinks": sinks,
          "rotate": rotate or None,
        },
      )
    for num_chunks, rotate in _flow_rotations(shifts):
      yield (
        "scca_flow",
        {
          "chunk_size": chunk_size,
          "num_chunks": num_chunks,
          "rotate": rotate or None,
          "own_chunk": last.own_chunk or None,
          "sinks": sinks,
        },
      )
  if first.chunk_size is not None:
    yield from _longmixed_constructions(heads)


def _longmixed_constructions(
  heads: tuple[HeadPattern, ...],
) -> Iterator[tuple[str, dict[str, Any]]]:
  chunk_size = heads[0].chunk_size
  yield "longmixed", {"chunk_size": chunk_size}
  # The head groups of SDA: each begins where the dilation changes.
  runs = [
    (dilation, len(list(run)))
    for dilation, run in itertools.groupby(
      heads, lambda head: head.dilation if head.chunk_size is None else 0
    )
  ]
  dilations = tuple(dilation for dilation, _ in runs[1:])
  counts = [count for _, count in runs]
  yield "longmixed", {"chunk_size": chunk_size, "dilations": dilations}
  yield (
    "longmixed",
    {
      "chunk_size": chunk_size,
      "dilations": dilations,
      "split": tuple(count / len(heads) for count in counts),
    },
  )


def _short_forms(
  heads: tuple[HeadPattern, ...],
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields the constructors and arguments that make exactly these heads."""
  for name, arguments in _constructions(heads):
    try:
      made = _CONSTRUCTORS[name](len(heads), 1, arguments)
    except ValueError:
      continue
    if made.heads == heads:
      yield name, arguments


def _options(pattern: AttentionPattern) -> dict[str, Any]:
  return {
    "boundary": None if pattern.boundary == "drop" else pattern.boundary,
    "causality": None if pattern.causality == "position" else pattern.causality,
  }


def _runs(
  heads: tuple[HeadPattern, ...], key: Callable[[HeadPattern], Any]
) -> list[tuple[HeadPattern, ...]]:
  return [tuple(run) for _, run in itertools.groupby(heads, key)]


def _pieces(
  heads: tuple[HeadPattern, ...],
) -> Iterator[tuple[int, str, dict[str, Any]]]:
  """Yields the forms, with their numbers of heads, that make these in turn."""
  short = next(_short_forms(heads), None)
  alike = _runs(heads, lambda head: dataclasses.replace(head, **_MOVED))
  if short is not None:
    yield len(heads), *short
  elif len(alike) > 1:
    for run in alike:
      yield from _pieces(run)
  else:
    for run in _runs(heads, lambda head: head):
      fields = sorted(run[0].in_use())
      yield len(run), "uniform", {x: getattr(run[0], x) for x in fields}


def _written_heads(heads: tuple[HeadPattern, ...], **options: Any) -> str:
  """Returns heads as one form, or as a `mix`."""
  counts, names, arguments = zip(*_pieces(heads), strict=True)
  if len(counts) == 1:
    return _written(names[0], **arguments[0], **options)
  parts = [_written(x, **y) for x, y in zip(names, arguments, strict=True)]
  return _written("mix", parts, heads=counts, **options)


def _written_pattern(
  pattern: AttentionPattern | Mixture, num_kv_heads: int | None
) -> str:
  if isinstance(pattern, Mixture):
    return _written(
      "mixture",
      [_written_pattern(member, num_kv_heads) for member in pattern.members],
    )
  return min(
    (
      _written_heads(order.heads, **options)
      for order, options in _orders(pattern, num_kv_heads)
    ),
    key=len,
  )


def _orders(
  pattern: AttentionPattern, num_kv_heads: int | None
) -> Iterator[tuple[AttentionPattern, dict[str, Any]]]:
  """Yields the pattern, and what interleaving would have made it from."""
  yield pattern, _options(pattern)
  if num_kv_heads is not None and pattern.num_heads % num_kv_heads == 0:
    # Interleaving by the size of a group undoes that by the number of groups.
    before = pattern.interleaved(pattern.num_heads // num_kv_heads)
    yield before, _options(pattern) | {"interleaved": True}


def _written_rotated(
  layers: dict[int, AttentionPattern | Mixture], num_kv_heads: int | None
) -> str | None:
  """Returns the form with `rotate="layer"` that gives each layer, if any."""
  first = next(iter(layers.values()))
  if isinstance(first, Mixture) or len(set(layers.values())) < 2:
    return None
  for pattern, options in _orders(first, num_kv_heads):
    for name, arguments in _short_forms(pattern.heads):
      if "rotate" not in arguments:
        continue
      form = _written(name, **(arguments | {"rotate": _LAYER}), **options)
      made = parse(
        form,
        num_heads=first.num_heads,
        num_kv_heads=num_kv_heads or 1,
        num_layers=max(layers) + 1,
        seq_len=1,
      )
      if all(made[i] == pattern for i, pattern in layers.items()):
        return form
  return None


def text(
  patterns: AttentionPattern | Mixture | Sequence[AttentionPattern | Mixture],
  *,
  num_kv_heads: int | None = None,
) -> str:
  """Returns the string that `parse` reads as these patterns, whatever length.

  All sizes are written. Heads that no constructor makes are a `mix` of shorter
  runs of heads.

  Args:
    patterns: One pattern a layer, or one for all layers.
    num_kv_heads: Key heads of the model; with it, interleaved heads are
      recognised.

  Raises:
    ValueError: There is no layer.
  """
  if isinstance(patterns, AttentionPattern | Mixture):
    patterns = (patterns,)
  if not patterns:
    raise ValueError("text needs the pattern of at least one layer, got none.")
  everywhere = dense(patterns[0].num_heads)
  sparse = {i: p for i, p in enumerate(patterns) if p != everywhere}
  dense_layers = [i for i, p in enumerate(patterns) if p == everywhere]
  if not sparse:
    return "dense"
  every = {"dense": tuple(dense_layers) or None}
  rotated = _written_rotated(sparse, num_kv_heads)
  if rotated is not None:
    return _written("layers", [rotated], **every) if dense_layers else rotated
  written = {
    pattern: _written_pattern(pattern, num_kv_heads)
    for pattern in dict.fromkeys(patterns)
  }
  found = []
  for layers, arguments in ((dict(enumerate(patterns)), {}), (sparse, every)):
    cycle = _cycle(layers, len(patterns))
    parts = [written[pattern] for pattern in cycle]
    if len(parts) == 1 and not any(arguments.values()):
      found.append(parts[0])
    else:
      found.append(_written("layers", parts, **arguments))
  return min(found, key=len)


def _cycle(
  layers: dict[int, AttentionPattern | Mixture], num_layers: int
) -> list[AttentionPattern | Mixture]:
  """Returns the shortest list that gives layer `l` its entry `l mod count`."""
  for count in range(1, num_layers + 1):
    cycle: dict[int, AttentionPattern | Mixture] = {}
    if all(
      cycle.setdefault(layer % count, pattern) == pattern
      for layer, pattern in layers.items()
    ):
      first = next(iter(layers.values()))
      return [cycle.get(i, first) for i in range(count)]
  raise AssertionError("a list of all layers gives each its own.")
