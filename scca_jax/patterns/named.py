"""The named patterns: functions that return an `AttentionPattern`.

A string may leave out the sizes that `_named` lists; they then follow from the
length. To add a pattern, write its constructor here and list it in `__all__`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from scca_jax.patterns.relation import (
  AttentionPattern,
  HeadPattern,
  Mixture,
  check_int,
  check_sizes,
)

__all__ = [
  "NAMES",
  "dense",
  "dilated",
  "dna",
  "local",
  "longmixed",
  "mix",
  "mixture",
  "s2",
  "scca_fixed",
  "scca_flow",
  "scca_near",
  "schedule",
  "sda",
  "sliding",
  "uniform",
]


@dataclasses.dataclass(frozen=True)
class Constructor:
  """A named pattern and which of its arguments follow from the length.

  Attributes:
    make: Makes the pattern from the number of heads and arguments by name.
    arguments: Names of the arguments.
    sizes: Arguments that follow from the length if left out.
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
    check_sizes(seq_len=seq_len)
    given = {name: x for name, x in settings.items() if x is not None}
    chunk_size = given.get("chunk_size", max(1, seq_len // self.num_chunks))
    check_sizes(chunk_size=chunk_size)
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


CONSTRUCTORS: dict[str, Constructor] = {}


def _named(*sizes: str, num_chunks: int = 4) -> Callable[..., Any]:
  """Registers a constructor under its name; see `Constructor`."""

  def register(make: Callable[..., AttentionPattern]) -> Any:
    _, *arguments = inspect.signature(make).parameters
    CONSTRUCTORS[make.__name__] = Constructor(
      make, tuple(arguments), sizes, num_chunks
    )
    return make

  return register


@_named()
def dense(num_heads: int) -> AttentionPattern:
  """Returns full causal attention."""
  check_sizes(num_heads=num_heads)
  return AttentionPattern((HeadPattern(),) * num_heads)


@_named("chunk_size")
def local(num_heads: int, chunk_size: int) -> AttentionPattern:
  """Returns attention within chunks, the baseline of the SCCA abstract."""
  check_sizes(num_heads=num_heads, chunk_size=chunk_size)
  return AttentionPattern((HeadPattern(chunk_size=chunk_size),) * num_heads)


@_named("window")
def sliding(num_heads: int, window: int) -> AttentionPattern:
  """Returns attention to the `window` nearest keys (like Mistral's)."""
  check_sizes(num_heads=num_heads, window=window)
  return AttentionPattern((HeadPattern(window=window),) * num_heads)


@_named("chunk_size")
def s2(num_heads: int, chunk_size: int) -> AttentionPattern:
  """Returns LongLoRA's S2-Attn (arXiv 2309.12307).

  Half of the heads attend within chunks; in the other half the chunk borders
  are moved by half a chunk, so that queries move with their keys.
  """
  check_sizes(num_heads=num_heads, chunk_size=chunk_size)
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
    chunk_size: In tokens.
    shift: In tokens; None uses half a chunk (own choice).
  """
  check_sizes(num_heads=num_heads, chunk_size=chunk_size)
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
  """Returns SCCA flow: each head has its own shift (arXiv 2312.07305).

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
  check_sizes(num_heads=num_heads, chunk_size=chunk_size, num_chunks=num_chunks)
  check_int("rotate", rotate, None)
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
  check_sizes(num_heads=num_heads, chunk_size=chunk_size, num_chunks=num_chunks)
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
  check_sizes(num_heads=num_heads, chunk_size=chunk_size, dilation=dilation)
  heads = tuple(
    HeadPattern(chunk_size=chunk_size, dilation=dilation, select=h % dilation)
    for h in range(num_heads)
  )
  return AttentionPattern(heads)


@_named("window", "dilation")
def dna(num_heads: int, window: int, dilation: int) -> AttentionPattern:
  """Returns causal dilated neighbourhood attention, DNA (arXiv 2209.15001)."""
  check_sizes(num_heads=num_heads, window=window, dilation=dilation)
  head = HeadPattern(dilation=dilation, window=window)
  return AttentionPattern((head,) * num_heads)


def _sda_heads(
  num_heads: int, dilation: int, chunk_size: int | None, window: int | None
) -> tuple[HeadPattern, ...]:
  check_sizes(dilation=dilation)
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

  Head `h` is shifted by `h mod dilation` tokens, so that the heads together see
  every earlier token, if there are at least `dilation` heads, no chunks and no
  window. SDA-2 and SDA-4 are dilations 2 and 4 of the whole sequence.
  """
  check_sizes(num_heads=num_heads)
  return AttentionPattern(_sda_heads(num_heads, dilation, chunk_size, window))


def check_list(name: str, values: Any, kinds: Any) -> tuple[Any, ...]:
  """Returns a list of numbers as a tuple, and refuses anything else."""
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
    chunk_size: Chunk size of the SCCA fixed heads, in tokens.
    dilations: One for each SDA head group; these have no chunks.
    split: Share of the heads for SCCA fixed and for each SDA group (own
      choice); they sum to 1.

  Raises:
    ValueError: The number of shares is wrong, or they do not sum to 1.
  """
  check_sizes(num_heads=num_heads, chunk_size=chunk_size)
  dilations = check_list("dilations", dilations, int)
  split = check_list("split", split, int | float)
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


NAMES = tuple(CONSTRUCTORS)


def uniform(num_heads: int, **fields: Any) -> AttentionPattern:
  """Returns identical heads (own choice).

  With `mix`, strings can then describe any list of heads.

  Args:
    num_heads: Query heads.
    **fields: Fields of `HeadPattern`.
  """
  check_sizes(num_heads=num_heads)
  return AttentionPattern((HeadPattern(**fields),) * num_heads)


CONSTRUCTORS["uniform"] = Constructor(
  uniform, tuple(field.name for field in dataclasses.fields(HeadPattern))
)


def mix(*patterns: AttentionPattern) -> AttentionPattern:
  """Returns the heads of several patterns, one after another.

  Each pattern is made for its own number of heads.

  Raises:
    ValueError: No pattern is given, or they differ in boundary or causality.
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


def mixture(*patterns: AttentionPattern) -> Mixture:
  """Returns LongNet's mixture of patterns (arXiv 2307.02486).

  Raises:
    ValueError: No pattern is given, or they differ in their number of heads.
  """
  return Mixture(patterns)


def schedule(
  make: Callable[[int], AttentionPattern], num_layers: int
) -> tuple[AttentionPattern, ...]:
  """Returns `make(layer)` for each layer, counted from 0."""
  check_sizes(num_layers=num_layers)
  return tuple(make(layer) for layer in range(num_layers))
