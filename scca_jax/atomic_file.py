"""Files and folders that are complete or absent."""

import contextlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from types import TracebackType
from typing import Any


class AtomicFile:
  """A binary file that gets its name only when it is complete.

  It is written under a temporary name in the same folder, flushed to the disk
  and renamed at the end of the `with` block. An error in the block, or a full
  disk, leaves an earlier file as it was.

  Every failure to write raises an OSError that names the file.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Starts the file; folders that are missing are made."""
    self.path = pathlib.Path(path)
    self._temporary = self.path.with_name(
      f".{self.path.name}.{os.getpid()}.partial"
    )
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      # Unbuffered: an error belongs to the write that met it.
      self._file = open(self._temporary, "wb", buffering=0)
    except OSError as error:
      raise self._failure(error) from error

  def _failure(self, error: OSError) -> OSError:
    return OSError(error.errno, f"cannot write {self.path}: {error.strerror}")

  def write(self, content: bytes | memoryview) -> None:
    """Appends `content`."""
    rest = memoryview(content).cast("B")
    try:
      while rest:
        rest = rest[self._file.write(rest) :]
    except OSError as error:
      raise self._failure(error) from error

  def sync(self) -> None:
    """Waits until the disk has what was written so far."""
    try:
      os.fsync(self._file.fileno())
    except OSError as error:
      raise self._failure(error) from error

  def __enter__(self) -> "AtomicFile":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    """Names the file, or removes what was written if the block failed."""
    try:
      if kind is None:
        self.sync()
        self._file.close()
        try:
          os.replace(self._temporary, self.path)
        except OSError as failure:
          raise self._failure(failure) from failure
    finally:
      self._file.close()
      self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Gives a temporary file's path to those who open it themselves.

  At the end of the `with` block it is named `path`; an error in the block
  removes it. Its suffix is that of `path`.

  Raises:
    OSError: It cannot be written; the message names `path`.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    yield temporary
    with temporary.open("rb") as file:
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as error:
    raise OSError(
      error.errno, f"cannot write {path}: {error.strerror}"
    ) from error
  finally:
    if temporary.exists():
      temporary.unlink()


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Gives a temporary folder whose content gets its place at the end.

  It lies in `path`, which is new or empty. An error in the `with` block removes
  it, and `path` if that was new.

  Raises:
    OSError: It cannot be written; the message names `path`.
  """
  path = pathlib.Path(path)
  was_there = path.is_dir()
  partial = path / f".{os.getpid()}.partial"
  try:
    partial.mkdir(parents=True)
    yield partial
    for entry in sorted(partial.iterdir()):
      entry.rename(path / entry.name)
    partial.rmdir()
  except BaseException as error:
    shutil.rmtree(partial if was_there else path, ignore_errors=True)
    if isinstance(error, OSError) and error.filename is not None:
      raise OSError(
        error.errno, f"cannot write {path}: {error.strerror}"
      ) from error
    raise


def write(path: str | os.PathLike[str], content: bytes) -> None:
  """Writes a whole file at once; see `AtomicFile`."""
  with AtomicFile(path) as file:
    file.write(content)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  """Writes `value` as indented JSON; see `AtomicFile`.

  Numbers that are not finite become null: JSON lacks them.
  """
  content = json.dumps(without_nan(value), indent=2, allow_nan=False)
  write(path, content.encode() + b"\n")


def without_nan(value: Any) -> Any:
  """Returns what is to be written as JSON, with null for what that lacks."""
  if isinstance(value, dict):
    return {name: without_nan(entry) for name, entry in value.items()}
  if isinstance(value, list | tuple):
    return [without_nan(entry) for entry in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
