"""Documents from text files, plain or compressed."""

import codecs
import gzip
import io
import itertools
import json
import lzma
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import zstandard

_COMPRESSIONS = (".gz", ".xz", ".zst")
_TEXT_SUFFIXES = (".txt", ".jsonl")
_KNOWN_SUFFIXES = ".txt or .jsonl, alone or with .gz, .xz or .zst"
_BUFFER_BYTES = 1 << 20
# A line of JSON is parsed in one go, which may take 24 times its size in
# memory.
_MAX_LINE_BYTES = 96 << 20
# Stored bytes to decompress at once: four of them can expand to 128 KiB.
_STORED_BYTES = 1 << 10


class Part(NamedTuple):
  """A part of a document.

  Attributes:
    text: The text.
    ends: Whether it is the last part of its document.
  """

  text: str
  ends: bool


class _ZstdReader(io.RawIOBase):
  """Decompresses zstd frames; unlike the library, refuses a cut frame."""

  def __init__(self, file: BinaryIO):
    self._file = file
    self._decoder = None
    self._stored = b""
    self._ready = b""

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._ready:
      self._stored = self._stored or self._file.read(_STORED_BYTES)
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
  """Returns the (text, compression) suffixes, each empty if missing."""
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
      files and hidden ones are skipped.

  Raises:
    FileNotFoundError: No such path, or no text file in the folder.
    ValueError: The name of a single file has another ending.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist: name a text file or folder."
    )
  if not path.is_dir():
    if not _suffixes(path)[0]:
      raise ValueError(
        f"{path} is not of a known kind: its name must end in"
        f" {_KNOWN_SUFFIXES}."
      )
    if not path.is_file():
      raise ValueError(
        f"{path} is a pipe or device: write the text to a file, since it is"
        " read more than once."
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
      f"the folder {path} contains no file that ends in {_KNOWN_SUFFIXES}."
    )
  return found


def read_documents(
  path: str | os.PathLike[str],
  *,
  text_field: str = "text",
  by_line: bool = False,
  on_read: Callable[[int], object] | None = None,
) -> Iterator[str]:
  """Yields the text of every document of a file or folder.

  A `.txt` is one document, and so is each line of a `.jsonl`, except blank
  ones. The text is kept as it is, line ends included; only a byte order mark at
  the start of a file is dropped. Lines end at LF or CRLF, not at the other
  characters that Unicode counts as line breaks.

  Args:
    path: See `document_files`.
    text_field: Name of the field that holds the text, in `.jsonl`.
    by_line: Makes each line of a `.txt` a document too, without its line end,
      except blank ones.
    on_read: Called with the number of stored bytes read since the last call.

  Raises:
    FileNotFoundError: See `document_files`.
    ValueError: See `document_files`; or a file is not UTF-8, not JSON Lines,
      lacks the field, has a line of more than 96 MiB, or is damaged. The
      message names file and line.
  """
  texts: list[str] = []
  for file in document_files(path):
    for part in _read_file(file, text_field, by_line, on_read):
      texts.append(part.text)
      if part.ends:
        yield "".join(texts)
        texts = []


def read_parts(
  path: str | os.PathLike[str],
  *,
  text_field: str = "text",
  on_read: Callable[[int], object] | None = None,
) -> Iterator[Part]:
  """Yields the documents of `read_documents` in parts.

  Only a small part of a `.txt`, whatever its size, is in memory at a time.

  Args:
    path: See `read_documents`.
    text_field: See there.
    on_read: See there.

  Raises:
    FileNotFoundError: See there.
    ValueError: See there.
  """
  for file in document_files(path):
    yield from _read_file(file, text_field, False, on_read)


def as_parts(documents: Iterable[str | Part]) -> Iterator[Part]:
  """Yields documents, given whole or in parts, as parts."""
  for document in documents:
    yield Part(document, True) if isinstance(document, str) else document


def read_records(
  path: str | os.PathLike[str],
  *,
  on_read: Callable[[int], object] | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields every line of JSON Lines as an object, with its file and line.

  Args:
    path: See `document_files`; text files are refused.
    on_read: See `read_documents`.

  Raises:
    FileNotFoundError: See `document_files`.
    ValueError: See `read_documents`; or a line is not an object.
  """
  for file in document_files(path):
    if _suffixes(file)[0] == ".txt":
      raise ValueError(f"{file} is text, not JSON Lines: give a .jsonl.")
    yield from _read_file(file, None, False, on_read)


def _read_file(
  path: pathlib.Path,
  text_field: str | None,
  by_line: bool,
  on_read: Callable[[int], object] | None,
) -> Iterator[Any]:
  kind, compression = _suffixes(path)
  whole = kind == ".txt" and not by_line
  with open(path, "rb") as stored:
    # Some readers accept an empty file as an empty archive.
    if compression and not stored.peek(1):
      raise ValueError(f"{path} is cut short: an archive is never empty.")
    stream: Any = stored
    if compression == ".gz":
      stream = gzip.GzipFile(fileobj=stored)
    elif compression == ".xz":
      stream = lzma.LZMAFile(stored)
    elif compression == ".zst":
      stream = io.BufferedReader(_ZstdReader(stored), _BUFFER_BYTES)
    read = 0

    def pieces(by_line: bool) -> Iterator[tuple[str, bytes]]:
      nonlocal read
      for where, content in _pieces(path, stream, by_line=by_line):
        if on_read is not None:
          on_read(stored.tell() - read)
          read = stored.tell()
        yield where, content

    if whole:
      yield from _whole(path, pieces(False))
    else:
      for where, content in pieces(True):
        if not content.strip():
          continue
        if kind == ".txt":
          content = content.removesuffix(b"\n").removesuffix(b"\r")
          yield Part(_decode(where, content), True)
        elif text_field is None:
          yield where, _json_object(where, content)
        else:
          yield Part(_json_text(where, content, text_field), True)
    if on_read is not None:
      on_read(stored.tell() - read)


def _whole(
  path: pathlib.Path, pieces: Iterator[tuple[str, bytes]]
) -> Iterator[Part]:
  """Yields the parts of a file that is a single document."""
  decoder, line, last = codecs.getincrementaldecoder("utf-8")(), 1, None

  def decode(content: bytes, final: bool = False) -> str:
    try:
      return decoder.decode(content, final)
    except UnicodeDecodeError as error:
      lines = error.object.count(b"\n", 0, error.start)
      raise _not_utf8(f"{path}, line {line + lines}", error) from error

  for _, content in pieces:
    text = decode(content)
    line += content.count(b"\n")
    if last is not None:
      yield Part(last, False)
    last = text
  if last is not None:
    yield Part(last + decode(b"", final=True), True)


def _pieces(
  path: pathlib.Path, stream: BinaryIO, *, by_line: bool
) -> Iterator[tuple[str, bytes]]:
  """Yields the stream in lines or blocks, each with its place for messages."""
  number = 0
  while True:
    try:
      content = (
        stream.readline(_MAX_LINE_BYTES + 1)
        if by_line
        else stream.read(_BUFFER_BYTES)
      )
    except (
      EOFError,
      gzip.BadGzipFile,
      lzma.LZMAError,
      zlib.error,
      zstandard.ZstdError,
    ) as error:
      behind = f" after line {number}" if by_line else ""
      raise ValueError(
        f"{path} is damaged or cut short{behind}: {error}."
      ) from error
    if not content:
      return
    number += 1
    if len(content) > _MAX_LINE_BYTES:
      raise ValueError(
        f"{path}, line {number} has more than {_MAX_LINE_BYTES >> 20} MiB:"
        " cut it into several documents, or write it as a .txt of its own."
      )
    if number == 1:
      content = content.removeprefix(b"\xef\xbb\xbf")
    yield f"{path}, line {number}", content


def _not_utf8(where: str, error: UnicodeDecodeError) -> ValueError:
  return ValueError(
    f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x}); convert the"
    " file to UTF-8."
  )


def _decode(where: str, content: bytes) -> str:
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError as error:
    raise _not_utf8(where, error) from error


def _json_object(where: str, content: bytes) -> dict[str, Any]:
  line = _decode(where, content)
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{where}: not JSON ({error}).") from error
  if not isinstance(record, dict):
    raise ValueError(f"{where}: not a JSON object.")
  return record


def _json_text(where: str, content: bytes, text_field: str) -> str:
  record = _json_object(where, content)
  if text_field not in record:
    known = ", ".join(name[:30] for name in itertools.islice(record, 6))
    known += ", ..." if len(record) > 6 else ""
    raise ValueError(f"{where}: no field {text_field!r} ({known}).")
  text = record[text_field]
  if not isinstance(text, str):
    raise ValueError(
      f"{where}: the field {text_field!r} is {type(text).__name__}, not text."
    )
  check_text(where, text)
  return text


def check_text(name: str, text: str) -> None:
  """Checks that a text can be encoded, which not all JSON or flags can.

  Args:
    name: Its name in the message.
    text: The text.

  Raises:
    ValueError: It has half a surrogate pair.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f"{name}: half a surrogate pair, U+{ord(text[error.start]):04X}, is not a"
      " character: remove it."
    ) from error
