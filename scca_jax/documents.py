"""Documents from text files, plain or compressed."""

import gzip
import io
import json
import lzma
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import zstandard

_COMPRESSIONS = (".gz", ".xz", ".zst")
_TEXT_SUFFIXES = (".txt", ".jsonl")
_KNOWN_SUFFIXES = ".txt or .jsonl, alone or with .gz, .xz or .zst"
_BUFFER_BYTES = 1 << 20


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
      self._stored = self._stored or self._file.read(_BUFFER_BYTES)
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
      files and hidden ones are skipped.

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
  by_line: bool = False,
  on_read: Callable[[int], object] | None = None,
) -> Iterator[str]:
  """Yields the text of every document of a file or folder.

  A `.txt` is one document, a line of a `.jsonl` another; blank lines of the
  latter are skipped. The text is kept as it is, line ends included; only a byte
  order mark at the start of a file is dropped. A line ends at LF or CRLF, not
  at the other characters that Unicode counts as line breaks.

  Args:
    path: See `document_files`.
    text_field: Name of the field that holds the text, in `.jsonl`.
    by_line: Makes each line of a `.txt` a document too, without its line end;
      blank lines are skipped.
    on_read: Called with the number of stored bytes read since the last call.

  Raises:
    FileNotFoundError: See `document_files`.
    ValueError: See `document_files`; or a file is not UTF-8, not JSON Lines,
      lacks the field or is damaged. The message names file and line.
  """
  for file in document_files(path):
    yield from _read_file(file, text_field, by_line, on_read)


def _read_file(
  path: pathlib.Path,
  text_field: str,
  by_line: bool,
  on_read: Callable[[int], object] | None,
) -> Iterator[str]:
  kind, compression = _suffixes(path)
  whole = kind == ".txt" and not by_line
  with open(path, "rb") as stored:
    # Some readers accept an empty file as an archive of nothing.
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
    for where, content in _pieces(path, stream, whole=whole):
      if on_read is not None:
        on_read(stored.tell() - read)
        read = stored.tell()
      if whole:
        yield _decode(where, content)
      elif not content.strip():
        continue
      elif kind == ".txt":
        yield _decode(where, content.removesuffix(b"\n").removesuffix(b"\r"))
      else:
        yield _json_text(where, content, text_field)
    if on_read is not None:
      on_read(stored.tell() - read)


def _pieces(
  path: pathlib.Path, stream: BinaryIO, *, whole: bool
) -> Iterator[tuple[str, bytes]]:
  """Yields the stream whole or in lines, each with a name for messages."""
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
  check_text(where, text)
  return text


def check_text(name: str, text: str) -> None:
  """Checks that a text can be encoded: JSON and flags can hold what cannot.

  Args:
    name: What the message calls it.
    text: The text.

  Raises:
    ValueError: It has half a surrogate pair.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f"{name}: half a surrogate pair, U+{ord(text[error.start]):04X}, is not a"
      " character: take it out."
    ) from error
