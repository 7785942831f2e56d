"""Batches of windows of a token file.

Grain makes them, in an order that depends only on the seed and the batch
number, so a run resumes exactly where it stopped.
"""

import bisect
import functools
import operator
from typing import Any

import grain
import numpy as np

from scca_jax.token_file import TokenFile, check_ids

PACKINGS = ("concatenate", "packed")
# More epochs than any run needs. Grain's `repeat(None)` has `sys.maxsize`
# windows, and overflows at batch size 1.
_ENDLESS = 1 << 30


class Batches:
  """Shuffled batches of windows; iteration can resume from any position.

  An iterator over dicts of arrays (see `make_batches`). Its position is a small
  dict that JSON can hold.

  Attributes:
    windows_per_epoch: Number of windows in one pass over the corpus.
  """

  def __init__(
    self,
    dataset: grain.MapDataset,
    *,
    windows_per_epoch: int,
    settings: dict[str, Any],
  ):
    """Starts at the first batch.

    Args:
      dataset: Batches by number.
      windows_per_epoch: See above.
      settings: Everything that the order depends on; a position is valid only
        for equal settings.
    """
    self.windows_per_epoch = windows_per_epoch
    self._settings = settings
    # Batches are copied from mapped memory, so threads would gain nothing, and
    # without them there is nothing to shut down.
    self._iterator = iter(
      dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
      )
    )

  def __iter__(self) -> "Batches":
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    return next(self._iterator)

  def get_state(self) -> dict[str, Any]:
    """Returns the position, from which `set_state` resumes."""
    return {**self._iterator.get_state(), "settings": dict(self._settings)}

  def set_state(self, state: dict[str, Any]) -> None:
    """Resumes at a position from `get_state`, of this or another process.

    Raises:
      ValueError: It is a position in different data or in a different order.
    """
    saved = state.get("settings", {})
    for name, value in self._settings.items():
      if saved.get(name) != value:
        raise ValueError(
          f"cannot resume the data: it was saved with {name}="
          f"{saved.get(name)!r}, and now {name}={value!r}."
        )
    try:
      index = operator.index(state["next_index"])
      self._iterator.set_state({"next_index": index})
    except (KeyError, TypeError, IndexError) as error:
      raise ValueError(
        f"cannot resume the data: no position {state.get('next_index')!r}."
      ) from error


def make_batches(
  token_file: TokenFile,
  *,
  seq_len: int,
  batch_size: int,
  seed: int,
  packing: str = "concatenate",
  epochs: int | None = None,
  vocab_size: int | None = None,
  skip_to: int | None = None,
  shard_index: int = 0,
  num_shards: int = 1,
) -> Batches:
  """Returns an iterator over batches of a corpus, shuffled every epoch.

  A batch is a dict of arrays `[batch, seq]`: `tokens` int32; `targets` int32,
  the token that follows each; `mask` float32, 0 where there is no target or
  where it is not in an answer (`TokenFile.answers`); and, packed, `segment_ids`
  and `positions` int32.

  "concatenate" (LongLoRA) cuts the whole corpus, across document borders, into
  adjacent windows of `seq_len` tokens. Fewer than `seq_len` tokens are left
  over; the seed decides how many of them come before the first window.

  "packed" cuts each document into windows of its own and packs the shorter
  remainders together, longest first, each into the window where it fits most
  tightly. Segments count from 1 in every window and positions from 0 in every
  segment; padding is segment 0, token 0. In an epoch every token of the corpus
  is seen once, and every token but the first of a document is a target once.

  Args:
    token_file: The corpus; packed, its document ends must be known.
    seq_len: Length of a window, in tokens.
    batch_size: Windows of a batch over all shards.
    seed: Draws the order; equal seeds give equal batches.
    packing: "concatenate" or "packed".
    epochs: Passes over the corpus; None repeats forever. A batch may span
      two epochs. The very last batch is padded with windows whose mask is 0.
    vocab_size: Vocabulary size of the model, which every id is checked against;
      None leaves that check to `TokenFile.open`.
    skip_to: A longer length, for PoSE (arXiv 2309.10400): each window is cut in
      two at a random place, and the positions of the second part are moved up
      by a random distance, to at most `skip_to` in all. Batches then have
      `positions`. The text itself is not interrupted (our own choice).
    shard_index: Which shard of every batch to return, from 0.
    num_shards: Number of equal shards of a batch, one for each process of a
      run over several hosts.

  Raises:
    ValueError: A setting is out of range, an id is outside the vocabulary, the
      corpus is shorter than one window ("concatenate"), or its document ends
      are unknown or it has no target ("packed").
  """
  if packing not in PACKINGS:
    raise ValueError(
      f"unknown packing {packing!r}: give one of {', '.join(PACKINGS)}."
    )
  if seq_len < 1 or batch_size < 1:
    raise ValueError(
      "seq_len and batch_size must be at least 1, got"
      f" {seq_len} and {batch_size}."
    )
  if seed < 0:
    raise ValueError(f"seed must not be negative, got {seed}.")
  if epochs is not None and epochs < 1:
    raise ValueError(
      f"epochs must be at least 1, or None for no end, got {epochs}."
    )
  if num_shards < 1 or batch_size % num_shards:
    raise ValueError(
      f"batch_size={batch_size} is not divisible by num_shards={num_shards}."
    )
  if not 0 <= shard_index < num_shards:
    raise ValueError(
      f"shard_index={shard_index} is outside 0 to {num_shards - 1}."
    )
  if vocab_size is not None:
    check_ids(token_file.tokens, vocab_size, token_file.name)
  if skip_to is not None and (packing == "packed" or skip_to < seq_len):
    raise ValueError(
      f"skip_to={skip_to} must be at least seq_len={seq_len}, and the packing"
      f" 'concatenate', got {packing!r}."
    )
  if packing == "packed":
    windows = _PackedWindows(token_file, seq_len)
  else:
    windows = _ConcatenatedWindows(token_file, seq_len, seed)
  rows = batch_size // num_shards
  dataset = (
    grain.MapDataset.source(windows)
    .seed(seed)
    .shuffle()
    .repeat(_ENDLESS if epochs is None else epochs)
  )
  if skip_to is not None:
    dataset = dataset.random_map(
      functools.partial(_skip_positions, skip_to=skip_to), seed=seed
    )
  dataset = dataset.batch(
    batch_size,
    batch_fn=functools.partial(
      grain.experimental.batch_and_pad, batch_size=batch_size
    ),
  )
  if num_shards > 1:
    first = shard_index * rows
    dataset = dataset.map(
      lambda batch: {k: v[first : first + rows] for k, v in batch.items()}
    )
  return Batches(
    dataset,
    windows_per_epoch=len(windows),
    settings={
      "tokens": len(token_file),
      "sha256": token_file.about.get("sha256"),
      "seq_len": seq_len,
      "batch_size": batch_size,
      "seed": seed,
      "packing": packing,
      **({} if skip_to is None else {"skip_to": skip_to}),
    },
  )


def _skip_positions(
  window: dict[str, np.ndarray], rng: np.random.Generator, *, skip_to: int
) -> dict[str, np.ndarray]:
  """Returns the window with positions that skip a stretch (PoSE)."""
  seq_len = len(window["tokens"])
  cut = rng.integers(1, seq_len) if seq_len > 1 else 0
  skipped = rng.integers(skip_to - seq_len + 1)
  index = np.arange(seq_len, dtype=np.int32)
  positions = np.where(index < cut, index, index + skipped)
  return {**window, "positions": positions.astype(np.int32)}


class _ConcatenatedWindows:
  """Adjacent windows of a corpus, by number."""

  def __init__(self, token_file: TokenFile, seq_len: int, seed: int):
    if len(token_file) < seq_len + 1:
      raise ValueError(
        f"{token_file.name} has {len(token_file)} tokens, but a window of"
        f" seq_len={seq_len} and its last target take {seq_len + 1}: give more"
        " text or a shorter seq_len."
      )
    self._file = token_file
    self._seq_len = seq_len
    # The last token serves only as a target.
    self._num_windows, rest = divmod(len(token_file) - 1, seq_len)
    self._offset = int(np.random.default_rng(seed).integers(rest + 1))

  def __len__(self) -> int:
    return self._num_windows

  def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
    start = self._offset + int(index) * self._seq_len
    end = start + self._seq_len + 1
    ids = self._file.tokens[start:end].astype(np.int32)
    return {
      "tokens": ids[:-1],
      "targets": ids[1:],
      "mask": self._file.counted(start + 1, end),
    }


class _PackedWindows:
  """Windows filled with whole or cut documents, by number.

  The document ends determine once which documents share a window, so any window
  can be made without the ones before it. (Grain's own packing works along an
  iterator and cannot tell how many windows it will make.)
  """

  def __init__(self, token_file: TokenFile, seq_len: int):
    if token_file.document_ends is None:
      raise ValueError(
        f"packing='packed' needs the document ends of {token_file.name}: make"
        " the token file with `scca prepare_data`, or use"
        " packing='concatenate'."
      )
    if np.max(np.diff(token_file.document_ends, prepend=0)) < 2:
      raise ValueError(
        f"no document of {token_file.name} has two tokens: there is nothing to"
        " predict."
      )
    self._file, self._tokens = token_file, token_file.tokens
    self._seq_len = seq_len
    self._windows = _best_fit(token_file.document_ends, seq_len)

  def __len__(self) -> int:
    return len(self._windows)

  def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
    names = ("tokens", "targets", "segment_ids", "positions")
    window = {name: np.zeros(self._seq_len, np.int32) for name in names}
    mask = np.zeros(self._seq_len, np.float32)
    filled = 0
    for segment, (start, stop, end) in enumerate(self._windows[int(index)], 1):
      here = slice(filled, filled + stop - start)
      # The last token of a document has no target.
      followed = slice(filled, filled + min(stop, end - 1) - start)
      window["tokens"][here] = self._tokens[start:stop]
      window["segment_ids"][here] = segment
      window["positions"][here] = np.arange(stop - start)
      ends = min(stop + 1, end)
      window["targets"][followed] = self._tokens[start + 1 : ends]
      mask[followed] = self._file.counted(start + 1, ends)
      filled = here.stop
    return {**window, "mask": mask}


def _best_fit(
  document_ends: np.ndarray, seq_len: int
) -> list[list[tuple[int, int, int]]]:
  """Returns the document spans that fill each window.

  Args:
    document_ends: `[documents]` offsets.
    seq_len: Length of a window, in tokens.

  Returns:
    The spans of each window as (start, stop, end of the document), offsets in
    tokens.
  """
  windows: list[list[tuple[int, int, int]]] = []
  rests: list[tuple[int, int, int]] = []
  start = 0
  for end in document_ends.tolist():
    while end - start >= seq_len:
      windows.append([(start, start + seq_len, end)])
      start += seq_len
    if start < end:
      rests.append((start, end, end))
    start = end
  rests.sort(key=lambda piece: piece[0] - piece[1])  # Stable: ties in order.
  open_windows: dict[int, list[int]] = {}  # Room left -> windows, last first.
  rooms: list[int] = []  # Its keys, sorted.
  for piece in rests:
    length = piece[1] - piece[0]
    place = bisect.bisect_left(rooms, length)
    if place == len(rooms):
      number = len(windows)
      windows.append([])
      room = seq_len
    else:
      room = rooms[place]
      number = open_windows[room].pop()
      if not open_windows[room]:
        del open_windows[room], rooms[place]
    windows[number].append(piece)
    room -= length
    if room and room not in open_windows:
      bisect.insort(rooms, room)
    if room:
      open_windows.setdefault(room, []).append(number)
  return windows
