"""Attention patterns of SCCA and its peers, as plain, hashable descriptions.

An `AttentionPattern` says of every query head which keys its queries see. The
sequence is cut in chunks of `w` tokens whose borders stand at `o + i w`; keys
and values are moved `s` tokens towards the end, so that slot `i` holds key
`i - s`; keys are `r` slots apart. Query `p` sees key `k` if and only if

    k <= p                                       (true positions: causal)
    floor((p - o) / w) == floor((k + s - o) / w)  (its slot is in p's chunk)
    (p - k - s) mod r == 0                        (dilation)
    0 <= (p - k - s) / r < window                 (if there is a window)
    p mod r == select                             (if the head selects queries)

Nothing wraps round: a slot without a key is empty. The names are those of SCCA
(arXiv 2312.07305), LongLoRA (arXiv 2309.12307), LongNet (arXiv 2307.02486) and
DiNAT (arXiv 2209.15001). The paper's full text was not to be had; what it is
not known to say is marked "own choice" below and is a parameter.
"""

import dataclasses
import inspect
import itertools
import operator
from collections.abc import Callable, Sequence
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
  """

  chunk_size: int | None = None
  offset: int = 0
  shift: int = 0
  dilation: int = 1
  window: int | None = None
  select: int | None = None

  def __post_init__(self):
    for name, least in (
      ("chunk_size", 1),
      ("offset", None),
      ("shift", 0),
      ("dilation", 1),
      ("window", 1),
      ("select", 0),
    ):
      value = getattr(self, name)
      if value is not None or name in ("offset", "shift", "dilation"):
        object.__setattr__(self, name, _check_int(name, value, least))
    if self.offset and self.chunk_size is None:
      raise ValueError(
        f"offset={self.offset} moves the borders of chunks: give a chunk_size."
      )
    if self.select is not None and self.select >= self.dilation:
      raise ValueError(
        f"select={self.select} must be below dilation={self.dilation}."
      )

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

    if boundary == "drop" or self.shift == 0:
      return shifted(self.shift)
    falls_back = self.falls_back(queries)
    return (shifted(0) & falls_back) | (shifted(self.shift) & ~falls_back)

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
    if self.chunk_size is not None:
      start = (places - offset) // self.chunk_size * self.chunk_size + offset
      lowest = np.maximum(lowest, start)
      highest = np.minimum(highest, start + self.chunk_size - 1)
    if self.window is not None:
      lowest = np.maximum(lowest, places - (self.window - 1) * self.dilation)
      highest = np.minimum(highest, places)
    # Slots of the query's residue in [lowest, highest].
    counts = (highest - places) // self.dilation - (
      lowest - 1 - places
    ) // self.dilation
    counts = np.maximum(counts, 0)
    if self.select is not None:
      counts[queries % self.dilation != self.select] = 0
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

  def seen(self, queries: Any, keys: Any, seq_len: int) -> Any:
    """Marks the pairs of positions in which the query sees the key.

    Args:
      queries: Positions, an integer array of numpy or jax (also traced).
      keys: Positions; it broadcasts with `queries`.
      seq_len: Length of the sequence, in tokens.

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
      )
      for head in self.head_groups()
    }
    library = (queries - keys).__array_namespace__()
    return library.stack([of_head[head] for head in self.heads])

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


# The named patterns. A string may leave sizes out: those that `_named` lists
# follow from the length then.


@dataclasses.dataclass(frozen=True)
class _Constructor:
  """A named pattern and which of its arguments follow from the length.

  Attributes:
    make: Takes the number of heads and the arguments, by name.
    sizes: Arguments that follow from the length where they are left out.
    num_chunks: How many chunks the length is then cut into.
  """

  make: Callable[..., AttentionPattern]
  sizes: tuple[str, ...]
  num_chunks: int

  @property
  def arguments(self) -> tuple[str, ...]:
    """Names of the arguments, without the number of heads."""
    return tuple(inspect.signature(self.make).parameters)[1:]

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
    _CONSTRUCTORS[make.__name__] = _Constructor(make, sizes, num_chunks)
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
  num_heads: int, chunk_size: int, num_chunks: int, rotate: int = 0
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
  """
  _check_sizes(
    num_heads=num_heads, chunk_size=chunk_size, num_chunks=num_chunks
  )
  _check_int("rotate", rotate, None)
  heads = tuple(
    HeadPattern(
      chunk_size=chunk_size,
      shift=(h * num_chunks // num_heads + rotate) % num_chunks * chunk_size,
    )
    for h in range(num_heads)
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
