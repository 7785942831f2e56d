"""Token files: the ids of a corpus, and what is known about them.

A token file is the flat array of a corpus's ids, document after document
(`.bin`, little-endian integers), like LongLoRA's PG19 and Proof-pile files. A
JSON file of the same name next to it describes the ids:

    {"tokenizer": {"name", "sha256", "vocab_size"}, "bos_id", "eos_id",
     "add_bos", "append_eos", "dtype", "documents", "tokens", "text_bytes",
     "sha256", "sources", "document_ends"}

`sha256` is the hash of the `.bin`; `document_ends` has, for every document, the
offset just after its last token. For conversations, `answers` has where each
answer begins and ends. Without the JSON the ids are uint16; a JSON written by
hand needs only `dtype`, which may be any of `DTYPES`. A file that looks like
another width or byte order, or contains more than ids, is refused, and the
message says what it looks like.

The parts: writing, `TokenFile` and its JSON, recognising other files, and
checking ids.
"""

import codecs
import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import reprlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from scca_jax import atomic_file, json_file, text_borders
from scca_jax.documents import Part, as_parts
from scca_jax.tokenizer import Tokenizer

# Dtypes of ids by their names in the JSON.
DTYPES = {
  "uint8": np.dtype("u1"),
  "int16": np.dtype("<i2"),
  "uint16": np.dtype("<u2"),
  "int32": np.dtype("<i4"),
  "uint32": np.dtype("<u4"),
  "int64": np.dtype("<i8"),
  "uint64": np.dtype("<u8"),
}
# Encodings that are recognised, the widest first: int64 also looks like uint32.
_ENCODINGS = {
  "int64": np.dtype("<i8"),
  "big-endian int64": np.dtype(">i8"),
  "uint32": np.dtype("<u4"),
  "big-endian uint32": np.dtype(">u4"),
  "uint16": np.dtype("<u2"),
  "big-endian uint16": np.dtype(">u2"),
  "uint8": np.dtype("u1"),
}
# Integers that were stored in these dtypes by mistake.
_FLOATS = {
  "float64": np.dtype("<f8"),
  "float32": np.dtype("<f4"),
  "float16": np.dtype("<f2"),
}
# Other kinds of file by their first bytes: name and remedy.
_IDS_ALONE = "write its ids alone"
_CONTAINERS = {
  b"\x93NUMPY": (
    "a .npy file",
    f"{_IDS_ALONE}, numpy.load(FILE).tofile('corpus.bin')",
  ),
  b"PK\x03\x04": ("a zip archive (.npz, .pt)", _IDS_ALONE),
  b"\x89HDF\r\n": ("an HDF5 file", _IDS_ALONE),
  b"PAR1": ("a Parquet file", _IDS_ALONE),
  b"ARROW1\0": ("an Arrow file", _IDS_ALONE),
  b"Obj\x01": ("an Avro file", _IDS_ALONE),
  b"SQLite format 3\0": ("an SQLite database", _IDS_ALONE),
  b"\x80\x02\x8a\x0a": ("a pickled object", _IDS_ALONE),
  b"\x80\x02}q": ("a pickled object", _IDS_ALONE),
  b"\x80\x02]q": ("a pickled object", _IDS_ALONE),
  b"\x80\x04\x95": ("a pickled object", _IDS_ALONE),
  b"\x80\x05\x95": ("a pickled object", _IDS_ALONE),
  b"MMIDIDX\0": ("the index of a Megatron corpus", "give the .bin next to it"),
  b"GGUF": ("a GGUF model", "give it as --model"),
  b"\x1f\x8b\x08": ("compressed with gzip", "decompress it"),
  b"BZh9": ("compressed with bzip2", "decompress it"),
  b"\xfd7zXZ\0": ("compressed with xz", "decompress it"),
  b"\x28\xb5\x2f\xfd": ("compressed with zstd", "decompress it"),
  b"\x04\x22\x4d\x18": ("compressed with lz4", "decompress it"),
  b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it"),
}
# Where a tar archive has its mark, in bytes.
_TAR_MARK = slice(257, 262)
# llm.c and modded-nanogpt put 256 int32 in front: a magic number, a version and
# the number of ids, which are uint16 or uint32.
_LLM_C = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}
_LLM_C_HEADER = 1024
# Larger than any vocabulary, and than any byte vocabulary with special tokens.
_MAX_VOCAB_SIZE = 1 << 20
_MAX_BYTE_VOCAB_SIZE = 512
# Size that the JSON may always have, in bytes.
_MIN_JSON = 1 << 24
# Bytes to inspect in each of three places, and the fewest to judge by.
_SAMPLE = 1 << 15
_MIN_SAMPLE = 128
# Types of the JSON's fields, and their names in messages.
_FIELDS = {
  "bos_id": int,
  "eos_id": int,
  "add_bos": bool,
  "append_eos": bool,
  "documents": int,
  "tokens": int,
  "text_bytes": int,
  "sha256": str,
  "sources": list,
  "document_ends": list,
  "answers": list,
}
_KINDS = {
  int: "an integer",
  bool: "true or false",
  str: "a string",
  list: "a list",
}
# Documents are encoded in batches of about this many characters, a few batches
# ahead of writing: enough to keep all cores busy, but little memory.
_BATCH_CHARACTERS, _BATCH_PIECES = 1 << 21, 1 << 16
_BATCHES_AHEAD = 2
# Longer documents are encoded in pieces; the second number is the longest
# piece, which takes some 50 bytes of memory per character.
_PIECE_CHARACTERS, _MAX_CHARACTERS = 1 << 20, 1 << 24
# Ids of a piece of a document; the bytes of the document's text if this is its
# last piece; and where answers begin and end in it.
_Written = tuple[list[int], int | None, Sequence[int]]
# Ids that are checked against the vocabulary, or hashed, at once.
_CHECKED_IDS = 1 << 20


def _json_path(path: pathlib.Path) -> pathlib.Path:
  return path.with_suffix(".json")


def check_output(path: str | os.PathLike[str]) -> None:
  """Checks that a token file can be written, before its ids are computed.

  Args:
    path: The `.bin`.

  Raises:
    ValueError: It is not a `.bin`, or its JSON would replace another file, such
      as a tokenizer.json.
    OSError: There is no permission to write it.
  """
  path = pathlib.Path(path)
  if path.suffix != ".bin":
    raise ValueError(f"a token file is a .bin file, got {path}.")
  atomic_file.check_writable(path)
  description = _json_path(path)
  # A killed process may leave the JSON alone.
  if path.exists() or not description.exists():
    return
  try:
    about = json_file.value(description)
  except ValueError:
    about = None
  if not isinstance(about, dict) or about.get("dtype") not in list(DTYPES):
    raise ValueError(
      f"{description} is another file, which the description of {path.name}"
      " would replace: use another name."
    )


def write_token_file(
  documents: Iterable[str | Part],
  tokenizer: Tokenizer,
  output: str | os.PathLike[str],
  *,
  add_bos: bool = False,
  append_eos: bool = False,
  sources: Sequence[str] = (),
) -> dict[str, Any]:
  """Writes the tokens of `documents` to a `.bin`, with its JSON.

  By default the file contains only the tokens of the text, as the usual
  perplexity over a flat file expects. Documents without tokens are left out.
  Both files appear only when complete, the `.bin` last, so that a `.bin` always
  has its JSON. Long documents are encoded in pieces, cut where the tokenizer's
  files show that this changes no id.

  Args:
    documents: Texts of the documents, whole or in parts, read once.
    tokenizer: The tokenizer; ids are uint16 if its vocabulary is below 65,536,
      otherwise uint32.
    output: The `.bin`.
    add_bos: Begin every document with the BOS token.
    append_eos: End every document with the EOS token.
    sources: Names of the files that the documents came from, to record.

  Returns:
    The content of the JSON.

  Raises:
    ValueError: `output` is not a `.bin`, the tokenizer lacks a requested token,
      the documents contain no text, or one is longer than 16 Mi characters and
      cannot be cut.
    OSError: A file cannot be written; an existing file is kept.
  """
  for wanted, token, name in (
    (add_bos, tokenizer.bos_id, "BOS"),
    (append_eos, tokenizer.eos_id, "EOS"),
  ):
    if wanted and token is None:
      raise ValueError(f"the tokenizer {tokenizer.name} has no {name} token.")
  before: Any = [tokenizer.bos_id] if add_bos else []
  after: Any = [tokenizer.eos_id] if append_eos else []
  with contextlib.closing(_encode(documents, tokenizer)) as encoded:
    return _write(
      _marked(encoded, before, after),
      tokenizer,
      output,
      {"add_bos": add_bos, "append_eos": append_eos},
      sources,
    )


def write_conversations(
  conversations: Iterable[tuple[str, list[int], list[int]]],
  tokenizer: Tokenizer,
  output: str | os.PathLike[str],
  *,
  sources: Sequence[str] = (),
) -> dict[str, Any]:
  """Writes a token file of conversations that records where the answers are.

  Args:
    conversations: Text, ids and answers of each, as `conversations.encode`
      returns them; read once.
    tokenizer: The tokenizer that encoded them.
    output: The `.bin`.
    sources: See `write_token_file`.

  Returns:
    The content of the JSON.

  Raises:
    ValueError: `output` is not a `.bin`, or there is no conversation.
    OSError: A file cannot be written; a file from before is kept.
  """
  pieces = (
    (ids, len(text.encode()), answers) for text, ids, answers in conversations
  )
  return _write(pieces, tokenizer, output, {}, sources)


def _marked(
  encoded: "Iterable[tuple[_Piece, list[int]]]",
  before: list[int],
  after: list[int],
) -> Iterator[_Written]:
  """Yields pieces of documents, with BOS and EOS added to the documents."""
  begun, text_bytes = False, 0
  for piece, ids in encoded:
    text_bytes += len(piece.text.encode())
    if ids and not begun:
      begun, ids = True, before + ids
    if begun and piece.ends:
      ids = ids + after
    # Some tokenizers have no token for white space.
    yield ids, text_bytes if begun and piece.ends else None, ()
    if piece.ends:
      begun, text_bytes = False, 0


def _write(
  pieces: Iterable[_Written],
  tokenizer: Tokenizer,
  output: str | os.PathLike[str],
  marks: dict[str, bool],
  sources: Sequence[str],
) -> dict[str, Any]:
  """Writes a token file of pieces of documents."""
  output = pathlib.Path(output)
  check_output(output)
  dtype = np.dtype("<u2" if tokenizer.vocab_size < 1 << 16 else "<u4")
  digest = hashlib.sha256()
  document_ends: list[int] = []
  answers: list[int] = []
  num_tokens = num_bytes = 0
  with atomic_file.AtomicFile(output) as file:
    for ids, text_bytes, places in pieces:
      content = np.asarray(ids, dtype).tobytes()
      file.write(content)
      digest.update(content)
      answers += [num_tokens + place for place in places]
      num_tokens += len(ids)
      if text_bytes is not None:
        document_ends.append(num_tokens)
        num_bytes += text_bytes
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
      **marks,
      "dtype": "uint16" if dtype.itemsize == 2 else "uint32",
      "documents": len(document_ends),
      "tokens": num_tokens,
      "text_bytes": num_bytes,
      "sha256": digest.hexdigest(),
      "sources": [pathlib.PurePath(source).name for source in sources],
      "document_ends": document_ends,
      **({"answers": answers} if answers else {}),
    }
    with atomic_file.AtomicFile(_json_path(output)) as description:
      description.write(json.dumps(about).encode() + b"\n")
      description.sync()
      # Both are on the disk, so that they get their names in quick succession.
      file.sync()
  return about


@dataclasses.dataclass(frozen=True)
class _Piece:
  """What is encoded at once.

  Attributes:
    text: A document, or the part between two of its borders.
    goes_on: Whether it comes after a border.
    ends: Whether it is the last piece of the document.
  """

  text: str
  goes_on: bool
  ends: bool


def _pieces(
  documents: Iterable[str | Part], tokenizer: Tokenizer
) -> Iterator[_Piece]:
  """Yields documents, splitting long ones into pieces."""
  text, seen, goes_on = "", 0, False
  for more, ends in as_parts(documents):
    text += more
    start = 0
    while len(text) - start > _PIECE_CHARACTERS and tokenizer.border:
      place = text_borders.find(
        text, start + max(_PIECE_CHARACTERS, seen), tokenizer.border
      )
      if place is None:
        break
      yield _Piece(text[start:place], goes_on, False)
      start, seen, goes_on = place, 0, True
    text = text[start:]
    seen = len(text)
    if seen > _MAX_CHARACTERS:
      raise ValueError(
        f"{tokenizer.name} finds no place to cut a document in {seen:,}"
        f" characters, and encodes at most {_MAX_CHARACTERS:,} at once: split"
        " the document."
      )
    if ends:
      yield _Piece(text, goes_on, True)
      text, seen, goes_on = "", 0, False


def _encode(
  documents: Iterable[str | Part], tokenizer: Tokenizer
) -> Generator[tuple[_Piece, list[int]], None, None]:
  """Yields the pieces of the documents and their ids, in order.

  Tokenizers encode the texts of a batch in threads, which wait for the longest
  text. In the meantime another batch is encoded, and others are read and
  written.
  """
  pool = concurrent.futures.ThreadPoolExecutor(_BATCHES_AHEAD)
  waiting = collections.deque()

  def encode(batch: list[_Piece]) -> list[list[int]]:
    return tokenizer.encode_batch(
      [piece.text for piece in batch], go_on=[piece.goes_on for piece in batch]
    )

  try:
    for batch in _batches(_pieces(documents, tokenizer)):
      waiting.append((batch, pool.submit(encode, batch)))
      if len(waiting) > _BATCHES_AHEAD:
        batch, ids = waiting.popleft()
        yield from zip(batch, ids.result(), strict=True)
    while waiting:
      batch, ids = waiting.popleft()
      yield from zip(batch, ids.result(), strict=True)
  finally:
    pool.shutdown(cancel_futures=True)


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
  """Yields lists of pieces."""
  batch: list[_Piece] = []
  size = 0
  for piece in pieces:
    batch.append(piece)
    size += len(piece.text)
    if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_PIECES:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenFile:
  """The ids of a corpus and what is known about them.

  Attributes:
    tokens: `[tokens]` integer ids; memory-mapped if they come from a file.
    document_ends: `[documents]` int64 offset just after each document's
      last token; None if not known.
    vocab_size: Vocabulary of the tokenizer that made the ids, or None.
    answers: `[2 * answers]` int64 offsets of each answer's first token and of
      the token after it, increasing; training counts only answers. None counts
      every token.
    name: Its name in messages.
    about: Everything in the JSON, empty without one.
  """

  tokens: np.ndarray
  document_ends: np.ndarray | None = None
  answers: np.ndarray | None = None
  vocab_size: int | None = None
  name: str = "the corpus"
  about: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

  def __post_init__(self):
    ends = self.document_ends
    if ends is not None and not rises_to(ends, len(self.tokens)):
      raise ValueError(
        f"the document ends of {self.name} do not increase up to its"
        f" {len(self.tokens):,} tokens."
      )

  def __len__(self) -> int:
    return len(self.tokens)

  def counted(self, start: int, stop: int) -> np.ndarray:
    """Returns which tokens from `start` to `stop` training counts.

    Args:
      start: Offset of the first token.
      stop: Offset after the last token.

    Returns:
      `[stop - start]` float32: 1 in answers, or everywhere if none are known.
    """
    if self.answers is None:
      return np.ones(stop - start, np.float32)
    places = np.arange(start, stop)
    begun = np.searchsorted(self.answers, places, side="right")
    return (begun % 2).astype(np.float32)

  def split(self, num_held_out: int) -> tuple["TokenFile", "TokenFile"]:
    """Returns two parts: all but the last documents, and those for validation.

    Args:
      num_held_out: Documents in the second part, at least 1.

    Raises:
      ValueError: The document ends are not known, or the first part would be
        left without a document.
    """
    if self.document_ends is None:
      raise ValueError(
        f"holding out documents requires the document ends of {self.name}: make"
        " the token file with `scca prepare_data`."
      )
    count = len(self.document_ends)
    if not 1 <= num_held_out < count:
      raise ValueError(
        f"cannot hold out {num_held_out} of the {count} documents of"
        f" {self.name}: give 1 to {count - 1}."
      )
    cut = count - num_held_out
    place = int(self.document_ends[cut - 1])
    before = after = self.answers
    if self.answers is not None:
      # An answer never crosses documents.
      number = int(np.searchsorted(self.answers[::2], place)) * 2
      before, after = self.answers[:number], self.answers[number:] - place
    first = dataclasses.replace(
      self,
      tokens=self.tokens[:place],
      document_ends=self.document_ends[:cut],
      answers=before,
    )
    second = dataclasses.replace(
      self,
      tokens=self.tokens[place:],
      document_ends=self.document_ends[cut:] - place,
      answers=after,
    )
    return first, second

  @classmethod
  def open(
    cls,
    path: str | os.PathLike[str],
    *,
    vocab_size: int | None = None,
  ) -> "TokenFile":
    """Opens a `.bin`, with or without a JSON.

    Args:
      path: The `.bin`.
      vocab_size: Vocabulary of the model that will read the ids: every id is
        checked against it. None skips the check.

    Raises:
      FileNotFoundError: The file does not exist.
      ValueError: It is empty, cut short, not bare ids of the dtype that its
        JSON says, or has ids outside the vocabulary; or the JSON is damaged or
        contradicts the file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
      raise FileNotFoundError(f"the token file {path} does not exist.")
    about = _read_about(_json_path(path))
    dtype = DTYPES[about.get("dtype", "uint16")]
    size = path.stat().st_size
    if size == 0:
      raise ValueError(f"the token file {path} is empty.")
    _refuse_containers(path, dtype)
    num_tokens, rest = divmod(size, dtype.itemsize)
    if rest:
      raise ValueError(
        f"the token file {path} has {size} bytes, which is not divisible by"
        f" {dtype.itemsize}: it is cut short or not {dtype.name}."
      )
    if about.get("tokens", num_tokens) != num_tokens:
      raise ValueError(
        f"the token file {path} has {num_tokens} tokens, but its JSON says"
        f" {about['tokens']}: it is cut short or was not written with it."
      )
    tokens = np.memmap(path, dtype, "r")
    made_with = _vocab_size(about)
    _refuse_wider(path, tokens, vocab_size or made_with or _MAX_VOCAB_SIZE)
    if not about and vocab_size is not None and vocab_size > 1 << 16:
      raise ValueError(
        f"the token file {path} has no JSON, so its ids are uint16, too"
        f" small for a vocabulary of {vocab_size:,}: give their dtype in"
        f' {_json_path(path).name}, {{"dtype": "uint32"}}.'
      )
    bounds = [size for size in (vocab_size, made_with) if size is not None]
    if bounds or dtype.itemsize > 2:
      _check_vocabulary(path, tokens, min([*bounds, _MAX_VOCAB_SIZE]))
    _check_digest(path, about)
    document_ends = _document_ends(path, about, num_tokens)
    _check_marks(path, about, tokens, document_ends)
    return cls(
      tokens=tokens,
      document_ends=document_ends,
      answers=_answers(path, about, num_tokens),
      vocab_size=made_with,
      name=str(path),
      about=about,
    )


def _read_about(path: pathlib.Path) -> dict[str, Any]:
  """Returns the content of a token file's JSON, {} if there is none."""
  try:
    # A document has at least one token, and its end at most 20 digits.
    num_bytes = path.with_suffix(".bin").stat().st_size
    about = json_file.value(path, max_bytes=_MIN_JSON + 20 * num_bytes)
  except FileNotFoundError:
    return {}
  except ValueError as error:
    raise ValueError(
      f"{path} is damaged ({error}): prepare the token file again."
    ) from error
  if not isinstance(about, dict) or about.get("dtype") not in list(DTYPES):
    raise ValueError(
      f'{path} does not describe a token file: it needs "dtype", one of'
      f" {', '.join(DTYPES)}."
    )
  # A null means the same as a missing entry.
  about = {name: value for name, value in about.items() if value is not None}
  known = {name: about[name] for name in _FIELDS if name in about}
  made_with = _vocab_size(about)
  if made_with is not None:
    known["the tokenizer's vocab_size"] = made_with
  for name, value in known.items():
    kind = _FIELDS.get(name, int)
    if type(value) is not kind:
      raise ValueError(
        f"{path}: {name} must be {_KINDS[kind]}, got {reprlib.repr(value)}:"
        " prepare the token file again."
      )
  ends = about.get("document_ends", ())
  if about.get("documents", len(ends)) != len(ends) and ends:
    raise ValueError(
      f"{path} says documents={about['documents']}, and gives"
      f" {len(ends)} document_ends: prepare the token file again."
    )
  return about


def _vocab_size(about: dict[str, Any]) -> Any:
  """Returns the vocabulary size of the tokenizer in the JSON, or None."""
  tokenizer = about.get("tokenizer")
  # In a JSON written by hand it may be a name.
  return tokenizer.get("vocab_size") if isinstance(tokenizer, dict) else None


def _document_ends(
  path: pathlib.Path, about: dict[str, Any], num_tokens: int
) -> np.ndarray | None:
  ends = about.get("document_ends")
  if ends is None:
    return None
  if not all(type(end) is int for end in ends) or not rises_to(
    np.asarray(ends, object), num_tokens
  ):
    raise ValueError(
      f"the document ends in {_json_path(path)} do not increase up to"
      f" {num_tokens}: prepare the token file again."
    )
  return np.asarray(ends, np.int64)


def _answers(
  path: pathlib.Path, about: dict[str, Any], num_tokens: int
) -> np.ndarray | None:
  answers = about.get("answers")
  if answers is None:
    return None
  bounds = [0, *answers, num_tokens]
  if (
    not all(type(place) is int for place in answers)
    or len(answers) % 2
    or any(a > b for a, b in itertools.pairwise(bounds))
  ):
    raise ValueError(
      f"the answers in {_json_path(path)} are not pairs that increase up to"
      f" {num_tokens}: prepare the token file again."
    )
  return np.asarray(answers, np.int64)


def _check_marks(
  path: pathlib.Path,
  about: dict[str, Any],
  tokens: np.ndarray,
  document_ends: np.ndarray | None,
) -> None:
  """Checks that documents begin and end with the tokens named in the JSON."""
  ends = np.asarray([len(tokens)]) if document_ends is None else document_ends
  starts = np.concatenate([[0], ends[:-1]])
  marks: Any = (
    ("add_bos", "bos_id", "begins", starts),
    ("append_eos", "eos_id", "ends", ends - 1),
  )
  for wanted, kind, name, places in marks:
    token = about.get(kind)
    if not about.get(wanted) or token is None:
      continue
    other = np.flatnonzero(tokens[places] != token)
    if len(other):
      place = int(places[other[0]])
      raise ValueError(
        f"the token file {path} has the id {tokens[place]} at position"
        f" {place:,}, where according to its JSON a document {name} with"
        f" {token}: prepare it again."
      )


def rises_to(document_ends: np.ndarray, num_tokens: int) -> bool:
  """Returns whether document ends increase up to the end of the corpus."""
  return (
    document_ends.ndim == 1
    and len(document_ends) > 0
    and bool(np.all(np.diff(document_ends, prepend=0) > 0))
    and document_ends[-1] == num_tokens
  )


def _check_digest(path: pathlib.Path, about: dict[str, Any]) -> None:
  expected = about.get("sha256")
  if expected is None:
    return
  with path.open("rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest()
  if found != expected:
    raise ValueError(
      f"the token file {path} is not the one that its JSON describes: their"
      " sha256 differ. Prepare it again, or remove the JSON."
    )


# Recognising other files.


def _refuse_containers(path: pathlib.Path, wanted: np.dtype) -> None:
  """Refuses files that contain anything but bare ids."""
  size = path.stat().st_size
  with path.open("rb") as file:
    head = file.read(_LLM_C_HEADER)
  for magic, (kind, remedy) in _CONTAINERS.items():
    if head.startswith(magic):
      raise ValueError(f"the token file {path} is {kind}: {remedy}.")
  if len(head) == _LLM_C_HEADER:
    number, _, count = (int(x) for x in np.frombuffer(head, "<i4")[:3])
    dtype = _LLM_C.get(number)
    if dtype is not None and size == _LLM_C_HEADER + count * dtype.itemsize:
      raise ValueError(
        f"the token file {path} has the header of llm.c in front of its"
        f" {dtype.name}: remove it, numpy.fromfile(FILE, '{dtype.name}',"
        f" offset={_LLM_C_HEADER}).tofile('corpus.bin')."
      )
  if head[_TAR_MARK] == b"ustar":
    raise ValueError(f"the token file {path} is a tar archive: unpack it.")
  if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < size:
    raise ValueError(
      f"the token file {path} is a safetensors file: {_IDS_ALONE}."
    )
  # Ids of bytes may look like text.
  if wanted.itemsize > 1 and len(head) >= _MIN_SAMPLE and _is_text(head):
    raise ValueError(
      f"the token file {path} is text: turn it into ids with `scca"
      " prepare_data`."
    )


def _is_text(head: bytes) -> bool:
  """Whether a file begins like text in UTF-8 or, with its mark, UTF-16."""
  if head.startswith((b"\xff\xfe", b"\xfe\xff")):
    encoding = "utf-16"
  else:
    encoding = "utf-8"
  # The bytes may end within a character.
  text = codecs.getincrementaldecoder(encoding)()
  try:
    found = text.decode(head)
  except UnicodeDecodeError:
    return False
  controls = {chr(i) for i in range(32)} - set("\t\n\r\f") | {"\x7f"}
  return not controls & set(found)


def _samples(path: pathlib.Path, dtype: np.dtype) -> np.ndarray:
  """Returns some of the values in a file, read as `dtype`.

  They come from its start, middle and end.
  """
  values = np.memmap(path, dtype, "r")
  count = _SAMPLE // dtype.itemsize
  starts = {0, max(len(values) - count, 0) // 2, max(len(values) - count, 0)}
  return np.concatenate([values[i : i + count] for i in sorted(starts)])


def _remedy(path: pathlib.Path, encoding: str) -> str:
  if encoding in DTYPES:
    return f'say so in {_json_path(path).name}, {{"dtype": "{encoding}"}}'
  if encoding in _FLOATS:
    return (
      "write integers, numpy.fromfile(FILE,"
      f" '{encoding}').astype('<u4').tofile('corpus.bin')"
    )
  code = _ENCODINGS[encoding].str
  return (
    f"swap its bytes, numpy.fromfile(FILE, '{code}')"
    f".astype('{code.replace('>', '<')}').tofile('corpus.bin')"
  )


def _refuse_wider(
  path: pathlib.Path, tokens: np.ndarray, vocab_size: int
) -> None:
  """Refuses ids that are read in halves or quarters, or were stored as floats.

  Halves of ids have mostly zeros in every second place; narrow ids taken
  together make numbers beyond any vocabulary, or fractions. Two bytes may be
  anything.
  """
  size, width = path.stat().st_size, tokens.dtype.itemsize
  bound = max(vocab_size, 1 << 16)
  for encoding, dtype in (_ENCODINGS | _FLOATS).items():
    is_float = dtype.kind == "f"
    narrowest = width if is_float else width + 1
    if width == 1:
      narrowest = 4
    if size % dtype.itemsize or dtype.itemsize < narrowest:
      continue
    values = _samples(path, dtype)
    # Ids may be any float, NaN among them.
    with np.errstate(all="ignore"):
      fits = np.all((values >= 0) & (values < bound)) and not (
        is_float and np.any(values != np.floor(values))
      )
    if (
      fits
      and values.nbytes >= _MIN_SAMPLE
      and np.count_nonzero(values) > len(values) // 2
    ):
      raise ValueError(
        f"the token file {path} looks like {encoding}, not"
        f" {tokens.dtype.name}: {_remedy(path, encoding)}."
      )


def check_ids(tokens: np.ndarray, vocab_size: int, name: str) -> None:
  """Checks that ids are within a vocabulary.

  Args:
    tokens: Integers, `[tokens]`.
    vocab_size: Ids must be below it.
    name: The tokens' name in messages.

  Raises:
    ValueError: An id is outside; the message names the first one.
  """
  for start in range(0, len(tokens), _CHECKED_IDS):
    block = tokens[start : start + _CHECKED_IDS]
    outside = (block < 0) | (block >= vocab_size)
    if outside.any():
      place = start + int(np.argmax(outside))
      raise ValueError(
        f"{name} has the id {tokens[place]} at position {place:,}, outside the"
        f" vocabulary of {vocab_size:,}: it was made with another tokenizer."
      )


def ids_sha256(tokens: np.ndarray) -> str:
  """Returns the SHA-256 of ids as uint32, independently of a file's dtype.

  Args:
    tokens: `[tokens]` integers from 0 to below 2**32.
  """
  digest = hashlib.sha256()
  for start in range(0, len(tokens), _CHECKED_IDS):
    digest.update(tokens[start : start + _CHECKED_IDS].astype("<u4").tobytes())
  return digest.hexdigest()


def _check_vocabulary(
  path: pathlib.Path, tokens: np.ndarray, vocab_size: int
) -> None:
  """Checks ids, and says what the file looks like if some are outside."""
  try:
    check_ids(tokens, vocab_size, f"the token file {path}")
  except ValueError as error:
    found = _samples(path, tokens.dtype)
    most_outside = np.mean((found < 0) | (found >= vocab_size)) > 0.5
    for encoding, dtype in _ENCODINGS.items():
      if path.stat().st_size % dtype.itemsize or not (
        (dtype.itemsize == tokens.itemsize and dtype.str.startswith(">"))
        or (dtype.itemsize < tokens.itemsize and most_outside)
      ):
        continue
      # Bytes are within any but a small vocabulary.
      if dtype.itemsize == 1 and vocab_size > _MAX_BYTE_VOCAB_SIZE:
        continue
      values = _samples(path, dtype)
      if values.nbytes >= _MIN_SAMPLE and np.all(
        (values >= 0) & (values < vocab_size)
      ):
        raise ValueError(
          f"{error} It looks like {encoding}: {_remedy(path, encoding)}."
        ) from None
    raise
