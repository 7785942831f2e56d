"""Text to token files, and token files to batches.

A token file is the flat array of the ids of a corpus, document after document
(`.bin`, uint16 or uint32), as LongLoRA's PG19 and Proof-pile files are. A JSON
file of the same name beside it says what the ids are:

    {"tokenizer": {"name", "sha256", "vocab_size"}, "bos_id", "eos_id",
     "add_bos", "append_eos", "dtype", "documents", "tokens", "text_bytes",
     "sha256", "sources", "document_ends"}

`sha256` is that of the bytes of the `.bin`; `document_ends` holds, for every
document, the offset behind its last token. Without the JSON the ids are
uint16; of a JSON written by hand only `dtype` is needed.

Batches come from Grain in an order that is a function of the seed and of the
number of the batch alone, so that a run goes on exactly where it stopped.
"""

import bisect
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import lzma
import operator
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import grain
import numpy as np
import zstandard

from scca_jax import atomic_file
from scca_jax.tokenizer import Tokenizer

PACKINGS = ("concatenate", "packed")
_COMPRESSIONS = (".gz", ".xz", ".zst")
_TEXT_SUFFIXES = (".txt", ".jsonl")
_KNOWN_SUFFIXES = ".txt or .jsonl, alone or with .gz, .xz or .zst"
# Documents are encoded together until they have so many characters: enough to
# keep all cores busy, little to hold.
_BATCH_CHARACTERS = 1 << 23
# Epochs that no run ends; Grain's own endless repetition has as many windows as
# an index can count, and overflows in batches of one.
_ENDLESS = 1 << 30
# Read at once, in bytes; and checked at once, in ids.
_BLOCK = 1 << 20


# Documents.


class _ZstdReader(io.RawIOBase):
  """Decompresses zstd frames; unlike the library's, refuses half a frame."""

  def __init__(self, file: BinaryIO):
    self._file = file
    self._decoder = None
    self._stored = b""
    self._ready = b""

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._ready:
      self._stored = self._stored or self._file.read(_BLOCK)
      if not self._stored:
        if self._decoder is not None:
          raise EOFError("the last frame is cut short")
        return 0
      if self._decoder is None:
        self._decoder = zstandard.ZstdDecompressor().decompressobj()
      self._ready = self._decoder.decompress(self._stored)
      self._stored = b""
      if self._decoder.eof:
        self._stored = self._decoder.unused_data
        self._decoder = None
    size = min(len(buffer), len(self._ready))
    buffer[:size] = self._ready[:size]
    self._ready = self._ready[size:]
    return size


def _suffixes(path: pathlib.Path) -> tuple[str, str]:
  """Returns the (text, compression) suffixes, empty where there is none."""
  suffixes = [suffix.lower() for suffix in path.suffixes]
  compression = ""
  if suffixes and suffixes[-1] in _COMPRESSIONS:
    compression = suffixes.pop()
  if suffixes and suffixes[-1] in _TEXT_SUFFIXES:
    return suffixes[-1], compression
  return "", compression


def document_files(path: str | os.PathLike[str]) -> list[pathlib.Path]:
  """Returns the text files of a file or folder, in the order of reading.

  Args:
    path: A file of text, or a folder: every file below it whose name ends in
      .txt or .jsonl, alone or with .gz, .xz or .zst, sorted by path. Other
      and hidden files are passed over.

  Raises:
    FileNotFoundError: No such path, or no text file in the folder.
    ValueError: The name of a single file ends otherwise.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(f"there is no {path}: name a text file or folder.")
  if not path.is_dir():
    if not _suffixes(path)[0]:
      raise ValueError(
        f"{path} is of no known kind: its name must end in {_KNOWN_SUFFIXES}."
      )
    return [path]
  found = [
    file
    for file in sorted(path.rglob("*"))
    if file.is_file()
    and _suffixes(file)[0]
    and not any(p.startswith(".") for p in file.relative_to(path).parts)
  ]
  if not found:
    raise FileNotFoundError(
      f"the folder {path} holds no file that ends in {_KNOWN_SUFFIXES}."
    )
  return found


def read_documents(
  path: str | os.PathLike[str],
  *,
  text_field: str = "text",
  on_read: Callable[[int], object] | None = None,
) -> Iterator[str]:
  """Yields the text of every document of a file or folder.

  A `.txt` is one document, a line of a `.jsonl` another; blank lines of the
  latter are passed over. The text is kept as it is, line ends included; only a
  byte order mark at the start of a file goes.

  Args:
    path: See `document_files`.
    text_field: Name of the field that holds the text, in `.jsonl`.
    on_read: Called with the number of stored bytes read since the last call.

  Raises:
    FileNotFoundError: See `document_files`.
    ValueError: See `document_files`; or a file is not UTF-8, not JSON Lines,
      lacks the field or is damaged. The message names file and line.
  """
  for file in document_files(path):
    yield from _read_file(file, text_field, on_read)


def _read_file(
  path: pathlib.Path,
  text_field: str,
  on_read: Callable[[int], object] | None,
) -> Iterator[str]:
  kind, compression = _suffixes(path)
  with open(path, "rb") as stored:
    # Some readers take nothing for a whole archive of nothing.
    if compression and not stored.peek(1):
      raise ValueError(f"{path} is cut short: an archive is never empty.")
    stream: Any = stored
    if compression == ".gz":
      stream = gzip.GzipFile(fileobj=stored)
    elif compression == ".xz":
      stream = lzma.LZMAFile(stored)
    elif compression == ".zst":
      stream = io.BufferedReader(_ZstdReader(stored), _BLOCK)
    read = 0
    for where, content in _pieces(path, stream, whole=kind == ".txt"):
      if on_read is not None:
        on_read(stored.tell() - read)
        read = stored.tell()
      if kind == ".txt":
        yield _decode(where, content)
      elif content.strip():
        yield _json_text(where, content, text_field)
    if on_read is not None:
      on_read(stored.tell() - read)


def _pieces(
  path: pathlib.Path, stream: BinaryIO, *, whole: bool
) -> Iterator[tuple[str, bytes]]:
  """Yields the stream whole or in lines, each with the words to name it by."""
  number = 0
  while True:
    try:
      content = stream.read() if whole else stream.readline()
    except (
      EOFError,
      gzip.BadGzipFile,
      lzma.LZMAError,
      zlib.error,
      zstandard.ZstdError,
    ) as error:
      behind = "" if whole else f" behind line {number}"
      raise ValueError(
        f"{path} is damaged or cut short{behind}: {error}."
      ) from error
    if not content:
      return
    number += 1
    if number == 1:
      content = content.removeprefix(b"\xef\xbb\xbf")
    yield f"{path}" if whole else f"{path}, line {number}", content


def _decode(where: str, content: bytes) -> str:
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError as error:
    line = content.count(b"\n", 0, error.start) + 1
    if ", line " not in where:
      where = f"{where}, line {line}"
    raise ValueError(
      f"{where}: not UTF-8 (byte 0x{content[error.start]:02x}); convert the"
      " file to UTF-8."
    ) from error


def _json_text(where: str, content: bytes, text_field: str) -> str:
  line = _decode(where, content)
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{where}: not JSON ({error}).") from error
  if not isinstance(record, dict) or text_field not in record:
    known = ", ".join(record) if isinstance(record, dict) else "no object"
    raise ValueError(f"{where}: no field {text_field!r} ({known}).")
  text = record[text_field]
  if not isinstance(text, str):
    raise ValueError(
      f"{where}: the field {text_field!r} is {type(text).__name__}, not text."
    )
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f"{where}: half a surrogate pair, U+{ord(text[error.start]):04X}, is no"
      " character."
    ) from error
  return text


# Token files.


def _json_path(path: pathlib.Path) -> pathlib.Path:
  return path.with_suffix(".json")


def write_token_file(
  documents: Iterable[str],
  tokenizer: Tokenizer,
  output: str | os.PathLike[str],
  *,
  add_bos: bool = False,
  append_eos: bool = False,
  sources: Sequence[str] = (),
) -> dict[str, Any]:
  """Writes the tokens of `documents` to a `.bin` with its JSON beside it.

  By default the file holds the tokens of the text and nothing else, which is
  what the usual perplexity over a flat file expects. Documents without a token
  are left out. Both files appear only when whole, the `.bin` last: where it
  stands, the JSON that explains it does.

  Args:
    documents: Their texts, read once.
    tokenizer: Ids are uint16 where its vocabulary has less than 65,536.
    output: The `.bin`.
    add_bos: Begin every document with the BOS token.
    append_eos: End every document with the EOS token.
    sources: Names to record of where the documents came from.

  Returns:
    What the JSON says.

  Raises:
    ValueError: `output` is no `.bin`, the tokenizer lacks a token that is
      asked for, or the documents hold no text.
    OSError: A file cannot be written; what stood there before still does.
  """
  output = pathlib.Path(output)
  if output.suffix != ".bin":
    raise ValueError(f"a token file is a .bin file, got {output}.")
  for wanted, token, name in (
    (add_bos, tokenizer.bos_id, "BOS"),
    (append_eos, tokenizer.eos_id, "EOS"),
  ):
    if wanted and token is None:
      raise ValueError(f"the tokenizer {tokenizer.name} has no {name} token.")
  before = [tokenizer.bos_id] if add_bos else []
  after = [tokenizer.eos_id] if append_eos else []
  dtype = np.dtype("<u2" if tokenizer.vocab_size < 1 << 16 else "<u4")
  digest = hashlib.sha256()
  document_ends: list[int] = []
  num_tokens = num_bytes = 0
  with atomic_file.AtomicFile(output) as file:
    for texts in _batch_texts(documents):
      for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if not ids:  # White space, to some tokenizers.
          continue
        num_bytes += len(text.encode())
        content = np.asarray(before + ids + after, dtype).tobytes()
        file.write(content)
        digest.update(content)
        num_tokens += len(content) // dtype.itemsize
        document_ends.append(num_tokens)
    if not num_tokens:
      raise ValueError(f"the corpus is empty: no text for {output}.")
    about = {
      "tokenizer": {
        "name": tokenizer.name,
        "sha256": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
      },
      "bos_id": tokenizer.bos_id,
      "eos_id": tokenizer.eos_id,
      "add_bos": add_bos,
      "append_eos": append_eos,
      "dtype": "uint16" if dtype.itemsize == 2 else "uint32",
      "documents": len(document_ends),
      "tokens": num_tokens,
      "text_bytes": num_bytes,
      "sha256": digest.hexdigest(),
      "sources": [pathlib.PurePath(source).name for source in sources],
      "document_ends": document_ends,
    }
    file.sync()
    atomic_file.write(_json_path(output), json.dumps(about).encode() + b"\n")
  return about


def _batch_texts(documents: Iterable[str]) -> Iterator[list[str]]:
  """Yields the documents that are not empty, several at a time."""
  texts: list[str] = []
  size = 0
  for text in documents:
    if text:
      texts.append(text)
      size += len(text)
    if size >= _BATCH_CHARACTERS:
      yield texts
      texts, size = [], 0
  if texts:
    yield texts


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenFile:
  """The ids of a corpus and what is known of them.

  Attributes:
    tokens: `[tokens]` ids, uint16 or uint32; of a file, mapped and not read.
    document_ends: `[documents]` int64 offset behind each document's last
      token; None where it is not known.
    vocab_size: Vocabulary of the tokenizer that made the ids, or None.
    name: What messages call it.
    about: Everything the JSON says, empty without one.
  """

  tokens: np.ndarray
  document_ends: np.ndarray | None = None
  vocab_size: int | None = None
  name: str = "the corpus"
  about: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

  def __len__(self) -> int:
    return len(self.tokens)

  @classmethod
  def open(
    cls,
    path: str | os.PathLike[str],
    *,
    vocab_size: int | None = None,
  ) -> "TokenFile":
    """Opens a `.bin`, with the JSON beside it or without.

    Args:
      path: The `.bin`.
      vocab_size: Vocabulary of the model that is to read the ids: every id is
        checked against it. None checks nothing.

    Raises:
      FileNotFoundError: The file is not there.
      ValueError: It is empty, cut short, not what its JSON says, or has ids
        beyond `vocab_size`; or the JSON is damaged.
    """
    path = pathlib.Path(path)
    if not path.is_file():
      raise FileNotFoundError(f"there is no token file {path}.")
    about = _read_about(_json_path(path))
    dtype = np.dtype("<u4" if about.get("dtype") == "uint32" else "<u2")
    size = path.stat().st_size
    if size == 0:
      raise ValueError(f"the token file {path} is empty.")
    num_tokens, rest = divmod(size, dtype.itemsize)
    if rest:
      raise ValueError(
        f"the token file {path} has {size} bytes, no multiple of"
        f" {dtype.itemsize}: it is cut short or not {dtype.name}."
      )
    expected = about.get("tokens", num_tokens)
    if num_tokens != expected:
      raise ValueError(
        f"the token file {path} has {num_tokens} tokens, its JSON says"
        f" {expected}: it is cut short or was not written with it."
      )
    tokens = np.memmap(path, dtype, "r")
    if not about:
      _refuse_wide(path, tokens)
    if vocab_size is not None:
      _check_ids(path, tokens, vocab_size)
    made_with = about.get("tokenizer")
    return cls(
      tokens=tokens,
      document_ends=_document_ends(path, about, num_tokens),
      vocab_size=made_with.get("vocab_size")
      if isinstance(made_with, dict)
      else None,
      name=str(path),
      about=about,
    )


def _read_about(path: pathlib.Path) -> dict[str, Any]:
  """Returns what the JSON beside a token file says, {} where there is none."""
  try:
    about = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return {}
  except ValueError as error:
    raise ValueError(
      f"{path} is damaged ({error}): prepare the token file again."
    ) from error
  if not isinstance(about, dict) or about.get("dtype") not in (
    "uint16",
    "uint32",
  ):
    raise ValueError(
      f'{path} describes no token file: it needs "dtype", uint16 or uint32.'
    )
  return about


def _refuse_wide(path: pathlib.Path, tokens: np.ndarray) -> None:
  """Refuses uint32 read as uint16: every other number would be 0."""
  head = tokens[:4096]
  if len(head) >= 64 and not head[1::2].any() and head[::2].any():
    raise ValueError(
      f"the token file {path} looks like uint32: say so in"
      f' {_json_path(path).name} beside it, {{"dtype": "uint32"}}.'
    )


def _check_ids(path: pathlib.Path, tokens: np.ndarray, vocab_size: int) -> None:
  for start in range(0, len(tokens), _BLOCK):
    block = tokens[start : start + _BLOCK]
    if block.max() >= vocab_size:
      place = start + int(np.argmax(block >= vocab_size))
      raise ValueError(
        f"the token file {path} has the id {tokens[place]} at position"
        f" {place}, beyond the vocabulary of {vocab_size}: it was made with"
        " another tokenizer."
      )


def _document_ends(
  path: pathlib.Path, about: dict[str, Any], num_tokens: int
) -> np.ndarray | None:
  if "document_ends" not in about:
    return None
  try:
    ends = np.asarray(about["document_ends"], np.int64)
    sound = ends.ndim == 1 and len(ends) > 0 and ends[-1] == num_tokens
    sound = sound and ends[0] > 0 and bool(np.all(np.diff(ends) > 0))
  except (TypeError, ValueError, OverflowError):
    sound = False
  if not sound:
    raise ValueError(
      f"the document ends in {_json_path(path)} do not rise to {num_tokens}:"
      " prepare the token file again."
    )
  return ends


# Batches.


class Batches:
  """Batches of windows in a shuffled order, from any position on.

  An iterator over dicts of arrays (see `batches`). Its position is a small
  dict that JSON can hold.

  Attributes:
    windows_per_epoch: Number of windows that one pass over the corpus has.
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
      settings: What the order depends on; a position is only good for equal
        settings.
    """
    self.windows_per_epoch = windows_per_epoch
    self._settings = settings
    # Batches are copied from mapped memory: threads would gain nothing, and
    # none are left to stop.
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
    """Returns the position: what `set_state` needs to go on from here."""
    return {**self._iterator.get_state(), "settings": dict(self._settings)}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to the position that `get_state` gave, in this or another process.

    Raises:
      ValueError: It is a position in other data, or in another order.
    """
    saved = state.get("settings", {})
    for name, value in self._settings.items():
      if saved.get(name) != value:
        raise ValueError(
          f"cannot go on in the data: it was left with {name}="
          f"{saved.get(name)!r}, and now {name}={value!r}."
        )
    try:
      index = operator.index(state["next_index"])
      self._iterator.set_state({"next_index": index})
    except (KeyError, TypeError, IndexError) as error:
      raise ValueError(
        f"cannot go on in the data: no position {state.get('next_index')!r}."
      ) from error


def batches(
  token_file: TokenFile,
  *,
  seq_len: int,
  batch_size: int,
  seed: int,
  packing: str = "concatenate",
  epochs: int | None = None,
  shard_index: int = 0,
  num_shards: int = 1,
) -> Batches:
  """Returns an iterator over batches of a corpus, shuffled every epoch.

  A batch is a dict of arrays `[batch, seq]`: `tokens` int32; `targets` int32,
  the token that follows each; `mask` float32, 0 where there is no target; and,
  packed, `segment_ids` and `positions` int32.

  "concatenate" (LongLoRA) cuts the whole corpus, document borders or not, in
  windows of `seq_len` tokens that meet but do not overlap. The fewer than
  `seq_len` tokens left over are divided between start and end by the seed.

  "packed" cuts each document in windows of its own and fills windows with what
  is shorter, the longest first, each where it leaves the least room. Segments
  count from 1 in every window and positions from 0 in every segment; padding
  is segment 0, token 0. Every token of the corpus is seen once an epoch, and
  every one that is not the first of its document is a target once.

  Args:
    token_file: The corpus; packed, its document ends must be known.
    seq_len: Length of a window, in tokens.
    batch_size: Windows of a batch over all shards.
    seed: Draws the order; equal seeds give equal batches.
    packing: "concatenate" or "packed".
    epochs: Passes over the corpus; None goes on for ever. Batches run across
      the border of epochs. The last batch of all is filled up with windows
      whose mask is 0.
    shard_index: Which part of every batch to return, from 0.
    num_shards: Number of equal parts that a batch is divided in, one for each
      process of a run over several hosts.

  Raises:
    ValueError: A setting is out of range, the corpus is shorter than a
      window, or document ends are wanted and not known.
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
      f"batch_size={batch_size} is no multiple of num_shards={num_shards}."
    )
  if not 0 <= shard_index < num_shards:
    raise ValueError(
      f"shard_index={shard_index} is outside 0 to {num_shards - 1}."
    )
  if len(token_file) < seq_len + 1:
    raise ValueError(
      f"{token_file.name} has {len(token_file)} tokens, a window of"
      f" seq_len={seq_len} and its last target take {seq_len + 1}: give more"
      " text or a shorter seq_len."
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
    .batch(
      batch_size,
      batch_fn=functools.partial(
        grain.experimental.batch_and_pad, batch_size=batch_size
      ),
    )
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
    },
  )


class _ConcatenatedWindows:
  """Windows of a corpus that meet but do not overlap, by number."""

  def __init__(self, token_file: TokenFile, seq_len: int, seed: int):
    self._tokens = token_file.tokens
    self._seq_len = seq_len
    # The last token is a target only.
    self._num_windows, rest = divmod(len(token_file) - 1, seq_len)
    self._offset = int(np.random.default_rng(seed).integers(rest + 1))

  def __len__(self) -> int:
    return self._num_windows

  def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
    start = self._offset + int(index) * self._seq_len
    ids = self._tokens[start : start + self._seq_len + 1].astype(np.int32)
    return {
      "tokens": ids[:-1],
      "targets": ids[1:],
      "mask": np.ones(self._seq_len, np.float32),
    }


class _PackedWindows:
  """Windows filled with whole or cut documents, by number.

  Which documents share a window follows from the document ends by arithmetic,
  once, so that any window can be had without those before it. (Grain's own
  packing works along an iterator and does not know how many windows it makes.)
  """

  def __init__(self, token_file: TokenFile, seq_len: int):
    if token_file.document_ends is None:
      raise ValueError(
        f"packing='packed' needs the document ends of {token_file.name}: make"
        " the token file with experiments.prepare_data, or take"
        " packing='concatenate'."
      )
    self._tokens = token_file.tokens
    self._ends = token_file.document_ends
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
      window["targets"][followed] = self._tokens[start + 1 : min(stop + 1, end)]
      mask[followed] = 1
      filled = here.stop
    return {**window, "mask": mask}


def _best_fit(
  document_ends: np.ndarray, seq_len: int
) -> list[list[tuple[int, int, int]]]:
  """Returns which pieces of documents fill each window.

  Args:
    document_ends: `[documents]` offsets.
    seq_len: Length of a window, in tokens.

  Returns:
    For each window its pieces (start, stop, end of the document), offsets in
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
