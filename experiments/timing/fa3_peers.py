"""FlashAttention-3 on this package's masks, for comparison.

`flash-attn3-jax` is optional, and imported only when a peer is made; it needs a
Hopper GPU and heads of 128. Its kernels support causal masks and windows, so a
pattern is cut into *pieces* that have one of these: chunks become sequences of
a batch, and so do the residues of a dilation. As a user would compose it,
pieces are cut from the inputs and put together again (`composed`); the kernels
by themselves get pieces cut beforehand (`cut`, `on_pieces`).
"""

# Types are checked without the package too.
# pyright: reportMissingImports=false

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from scca_jax.patterns import AttentionPattern, HeadPattern

# A function like `flash_attn3_jax.flash_mha`.
Attend = Callable[..., jax.Array]


# Names of the peers in flags, and in tables.
LABELS = {"fa3": "FA3", "fa3_kernels": "FA3 kernels"}


def flash_mha() -> Attend:
  """Returns FlashAttention-3's function.

  Raises:
    NotImplementedError: It is not installed.
  """
  try:
    return importlib.import_module("flash_attn3_jax").flash_mha
  except ImportError as error:
    raise NotImplementedError(
      f"flash-attn3-jax is not installed ({error})"
    ) from error


@dataclasses.dataclass(frozen=True)
class _Piece:
  """Queries of some heads with the keys that they see, under one mask.

  Sequence `i` of the batch has every `stride`-th query from `start + step * i`
  on, and keys likewise.

  Attributes:
    heads: First head and the one after the last.
    count: Sequences.
    step: Tokens from one sequence to the next.
    stride: Tokens from one query, or key, to the next.
    query: First query of the first sequence.
    num_queries: Queries of a sequence.
    key: First key of the first sequence.
    num_keys: Keys of a sequence.
    ahead: How many keys past its own place a query sees, counting places from
      the end as FlashAttention does; None for all keys.
  """

  heads: tuple[int, int]
  count: int
  step: int
  stride: int
  query: int
  num_queries: int
  key: int
  num_keys: int
  ahead: int | None

  def _take(self, x: jax.Array, first: int, length: int) -> jax.Array:
    x = x[:, :, slice(*self.heads)]
    if self.stride > 1:
      x = x[:, first :: self.stride][:, :length]
      return x
    span = self.count * self.step if self.count > 1 else length
    x = x[:, first : first + span]
    return x.reshape(-1, length, *x.shape[2:])

  def queries(self, x: jax.Array) -> jax.Array:
    """Returns the piece's part of an array of query rows, sequences first."""
    return self._take(x, self.query, self.num_queries)

  def keys(self, x: jax.Array) -> jax.Array:
    """Returns the piece's part of keys or values."""
    return self._take(x, self.key, self.num_keys)

  @property
  def mask(self) -> dict[str, Any]:
    """The mask as FlashAttention takes it."""
    if self.ahead is None:
      return {}
    if self.ahead == 0:
      return {"is_causal": True}
    return {"window_size": (-1, self.ahead)}

  @property
  def kind(self) -> tuple[Any, ...]:
    """What pieces must have in common to form one batch."""
    num_heads = self.heads[1] - self.heads[0]
    return num_heads, self.num_queries, self.num_keys, self.ahead


def _pieces_of_head(
  head: HeadPattern, heads: tuple[int, int], seq_len: int
) -> list[_Piece]:
  """Returns the pieces of equal heads; rows outside all pieces see no key."""
  if head.in_use() - {"chunk_size", "shift", "dilation"}:
    raise NotImplementedError(f"FlashAttention-3 is not given {head}.")
  if head.chunk_size is None and head.dilation == 1:
    return [_Piece(heads, 1, seq_len, 1, 0, seq_len, 0, seq_len, 0)]
  if head.chunk_size is None:
    r = head.dilation
    if seq_len % r:
      raise NotImplementedError(
        f"FlashAttention-3 needs a multiple of {r} tokens, got {seq_len}."
      )
    pieces = []
    for residue in range(r):
      # Keys of a later residue are seen from the next slot on.
      key = (residue - head.shift) % r
      late = int(key > residue)
      length = seq_len // r - late
      pieces.append(
        _Piece(heads, 1, seq_len, r, residue + late * r, length, key, length, 0)
      )
    return pieces
  if head.dilation > 1 or seq_len % head.chunk_size:
    raise NotImplementedError(
      f"FlashAttention-3 is not given {head} on {seq_len} tokens."
    )
  width, shift = head.chunk_size, head.shift
  ahead = shift if shift < width else None
  first = -(-shift // width)
  pieces = []
  if shift % width:
    # The keys of this chunk start before the sequence.
    start = (first - 1) * width
    length = first * width - shift
    pieces.append(_Piece(heads, 1, width, 1, start, width, 0, length, ahead))
  count = seq_len // width - first
  if count > 0:
    start = first * width
    pieces.append(
      _Piece(heads, count, width, 1, start, width, start - shift, width, ahead)
    )
  return pieces


class Pieces:
  """A pattern at a length as pieces, with equal ones in one batch."""

  def __init__(self, pattern: AttentionPattern, seq_len: int, attend: Attend):
    """Cuts a pattern.

    Args:
      pattern: With boundary "drop" and causality "position".
      seq_len: Tokens.
      attend: `flash_mha`, or a replacement in tests.

    Raises:
      NotImplementedError: FlashAttention-3 cannot serve the pattern.
    """
    if not isinstance(pattern, AttentionPattern):
      raise NotImplementedError("FlashAttention-3 is given no mixture.")
    if pattern.boundary != "drop" or pattern.causality != "position":
      raise NotImplementedError(
        'FlashAttention-3 is given boundary="drop" and causality="position"'
        f' alone, not "{pattern.boundary}" and "{pattern.causality}".'
      )
    self._attend, self._seq_len = attend, seq_len
    kinds: dict[Any, list[_Piece]] = {}
    self._groups: list[list[_Piece]] = []
    first = 0
    heads = pattern.heads
    for stop in range(1, len(heads) + 1):
      if stop < len(heads) and heads[stop] == heads[first]:
        continue
      pieces = _pieces_of_head(heads[first], (first, stop), seq_len)
      self._groups.append(pieces)
      for piece in pieces:
        kinds.setdefault(piece.kind, []).append(piece)
      first = stop
    self._heads = heads
    self._batches = list(kinds.values())

  def cut(
    self, query: jax.Array, key: jax.Array, value: jax.Array
  ) -> list[list[jax.Array]]:
    """Returns query, key and value of each batch of pieces.

    Args:
      query: `[batch, seq, heads, head_dim]`.
      key: Likewise, with the same number of heads.
      value: Like `key`.

    Raises:
      NotImplementedError: Query heads share key heads.
    """
    if query.shape[2] != key.shape[2]:
      raise NotImplementedError(
        "FlashAttention-3 needs as many key heads as query heads here, got"
        f" {key.shape[2]} for {query.shape[2]}."
      )
    queries = self.cut_rows(query)
    keys, values = (
      [
        _concatenate([piece.keys(x) for piece in batch])
        for batch in self._batches
      ]
      for x in (key, value)
    )
    return [list(x) for x in zip(queries, keys, values, strict=True)]

  def cut_rows(self, x: jax.Array) -> list[jax.Array]:
    """Returns each batch's part of an array like the query."""
    return [
      _concatenate([piece.queries(x) for piece in batch])
      for batch in self._batches
    ]

  def on_pieces(self, inputs: Sequence[Sequence[jax.Array]]) -> list[jax.Array]:
    """Returns the output of each batch of pieces."""
    return [
      self._attend(*x, **batch[0].mask)
      for x, batch in zip(inputs, self._batches, strict=True)
    ]

  def join(self, outputs: Sequence[jax.Array], batch_size: int) -> jax.Array:
    """Returns `[batch, seq, heads, head_dim]` from the outputs of pieces."""
    parts: dict[_Piece, jax.Array] = {}
    for output, batch in zip(outputs, self._batches, strict=True):
      first = 0
      for piece in batch:
        length = batch_size * piece.count
        parts[piece] = output[first : first + length]
        first += length
    return _concatenate(
      [self._join_heads(x, parts, batch_size) for x in self._groups], axis=2
    )

  def _join_heads(
    self, pieces: list[_Piece], parts: dict[_Piece, jax.Array], batch_size: int
  ) -> jax.Array:
    rows = []
    for piece in pieces:
      x = parts[piece]
      rows.append(x.reshape(batch_size, -1, *x.shape[2:]))
    stride = pieces[0].stride
    length = self._seq_len // stride
    # Rows that see no key come first.
    if stride > 1:
      rows = [_pad(x, length) for x in rows]
      x = jnp.stack(rows, axis=2)
      return x.reshape(batch_size, self._seq_len, *x.shape[3:])
    return _pad(_concatenate(rows, axis=1), length)

  def composed(
    self, query: jax.Array, key: jax.Array, value: jax.Array
  ) -> jax.Array:
    """Returns the attention, cut and joined; see `cut` for the arguments."""
    outputs = self.on_pieces(self.cut(query, key, value))
    return self.join(outputs, query.shape[0])


def composed(pattern: Any) -> Callable[..., jax.Array]:
  """Returns attention by FlashAttention-3, as a user would compose it.

  The function takes query, key and value, `[batch, seq, heads, head_dim]`.
  """

  def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    pieces = Pieces(pattern, query.shape[1], flash_mha())
    return pieces.composed(query, key, value)

  return attend


def _concatenate(arrays: list[jax.Array], axis: int = 0) -> jax.Array:
  return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis)


def _pad(x: jax.Array, length: int) -> jax.Array:
  missing = length - x.shape[1]
  if not missing:
    return x
  return jnp.pad(x, ((0, 0), (missing, 0), (0, 0), (0, 0)))
