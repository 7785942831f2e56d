"""Files and folders that are complete or absent.

Unfinished content is in a private hidden folder next to its destination, whose
name ends in .partial. A killed process leaves it behind; the next one that
writes the same file or folder removes it.
"""

import contextlib
import glob
import json
import math
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from scca_jax import file_lock

_PARTIAL = ".partial"
# Locked while the writing process is alive.
_LOCK = ".lock"
# File systems take names of 255 bytes.
_NAME_LETTERS = 50
# The hidden folders of this process, from before each is made until it is gone.
_workplaces: set[pathlib.Path] = set()


def _prefix(path: pathlib.Path) -> str:
  return f".{path.name[:_NAME_LETTERS]}."


def _remove_if_dead(partial: pathlib.Path) -> None:
  with contextlib.suppress(OSError):
    try:
      lock = os.open(partial / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
      partial.rmdir()
      return
    try:
      if file_lock.try_lock(lock):
        shutil.rmtree(partial)
    finally:
      os.close(lock)


def _remove_dead(path: pathlib.Path) -> None:
  """Removes what killed processes left behind while writing `path`."""
  pattern = glob.escape(_prefix(path)) + "*" + glob.escape(_PARTIAL)
  for partial in path.parent.glob(pattern):
    _remove_if_dead(partial)


def remove_dead(folder: str | os.PathLike[str]) -> None:
  """Removes what killed processes left behind while writing below a folder.

  A file that was complete when its process was killed is not written again, so
  that nobody else would remove what is left beside it.
  """
  for partial in sorted(pathlib.Path(folder).rglob(f".*{_PARTIAL}")):
    _remove_if_dead(partial)


def _remove(workplace: pathlib.Path) -> None:
  shutil.rmtree(workplace, ignore_errors=True)
  _workplaces.discard(workplace)


def remove_own() -> None:
  """Removes what this process has begun to write and not finished.

  A signal may interrupt the process while it makes or removes such files.
  """
  for workplace in list(_workplaces):
    _remove(workplace)


def _new_workplace(path: pathlib.Path) -> tuple[pathlib.Path, int]:
  """Returns a new hidden folder next to `path`, and its lock."""
  while True:
    name = f"{_prefix(path)}{secrets.token_hex(8)}{_PARTIAL}"
    folder = path.absolute().parent / name
    _workplaces.add(folder)
    try:
      folder.mkdir(0o700)
      # Until the folder is locked, another process may take it for a dead
      # one's.
      with contextlib.suppress(FileNotFoundError):
        lock = os.open(
          folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600
        )
        try:
          if file_lock.try_lock(lock) and (folder / _LOCK).exists():
            return folder, lock
        except BaseException:
          os.close(lock)
          raise
        os.close(lock)
    except BaseException:
      _remove(folder)
      raise


@contextlib.contextmanager
def _workplace(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a hidden folder next to `path`, in which to prepare it.

  Missing folders are created.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  _remove_dead(path)
  folder, lock = _new_workplace(path)
  try:
    yield folder
  finally:
    os.close(lock)  # NFS cannot remove open files.
    _remove(folder)


def _put(temporary: pathlib.Path, path: pathlib.Path) -> None:
  """Moves a file or folder to its destination, and waits for the disk."""
  os.replace(temporary, path)
  folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
  try:
    with contextlib.suppress(OSError):  # Not all file systems can.
      os.fsync(folder)
  finally:
    os.close(folder)


def _failure(path: pathlib.Path, error: OSError) -> OSError:
  return OSError(error.errno, f"cannot write {path}: {error.strerror}")


def _check_replaceable(path: pathlib.Path) -> None:
  """Refuses folders, and what root would replace by renaming: /dev/null."""
  if path.is_dir():
    raise IsADirectoryError(f"cannot write {path}: it is a folder")
  if path.exists() and not (path.is_file() or path.is_symlink()):
    raise OSError(
      f"cannot write {path}: it is a pipe or device, which the file would"
      " replace"
    )


def check_writable(path: str | os.PathLike[str]) -> None:
  """Checks that a file can be written, before starting to compute it.

  Raises:
    OSError: It cannot; the message names it.
  """
  path = pathlib.Path(path)
  _check_replaceable(path)
  parents = path.absolute().parents
  nearest = next(folder for folder in parents if folder.exists())
  if not nearest.is_dir():
    raise NotADirectoryError(f"cannot write {path}: {nearest} is a file")
  if not os.access(nearest, os.W_OK | os.X_OK):
    raise PermissionError(
      f"cannot write {path}: no permission to write to {nearest}"
    )


class AtomicFile:
  """A binary file that gets its name only when it is complete.

  It is written next to its destination, flushed to the disk and renamed at the
  end of the `with` block. An error in the block, or a full disk, leaves an
  existing file unchanged.

  Every failure to write raises an OSError that names the file.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Starts the file; missing folders are created."""
    self.path = pathlib.Path(path)
    _check_replaceable(self.path)
    self._resources = contextlib.ExitStack()
    try:
      folder = self._resources.enter_context(_workplace(self.path))
      self._temporary = folder / self.path.name
      # Unbuffered, so that an error belongs to the write that caused it.
      self._file = self._resources.enter_context(
        open(self._temporary, "xb", buffering=0)
      )
    except OSError as error:
      self._resources.close()
      raise _failure(self.path, error) from error

  def write(self, content: bytes | memoryview) -> None:
    """Appends `content`."""
    rest = memoryview(content).cast("B")
    try:
      while rest:
        rest = rest[self._file.write(rest) :]
    except OSError as error:
      raise _failure(self.path, error) from error

  def sync(self) -> None:
    """Waits until everything written so far is on the disk."""
    try:
      os.fsync(self._file.fileno())
    except OSError as error:
      raise _failure(self.path, error) from error

  def __enter__(self) -> "AtomicFile":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    """Renames the file, or removes it if the block failed."""
    with self._resources:
      if kind is None:
        self.sync()
        try:
          _put(self._temporary, self.path)
        except OSError as failure:
          raise _failure(self.path, failure) from failure


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Gives the path of a temporary file, for callers that open it themselves.

  At the end of the `with` block it is renamed to `path`; an error in the block
  removes it. It has the name of `path`, in another folder.

  Raises:
    OSError: It cannot be written; the message names `path`.
  """
  path = pathlib.Path(path)
  _check_replaceable(path)
  try:
    with _workplace(path) as folder:
      temporary = folder / path.name
      yield temporary
      with temporary.open("rb") as file:
        os.fsync(file.fileno())
      _put(temporary, path)
  except OSError as error:
    raise _failure(path, error) from error


def is_free(path: str | os.PathLike[str]) -> bool:
  """Returns whether there is nothing at `path`, or an empty folder.

  Leftovers of a killed process that was writing it are removed.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    return not os.path.lexists(path)
  _remove_dead(path / path.name)
  return not any(path.iterdir())


def _move_up(content: pathlib.Path, path: pathlib.Path) -> None:
  """Moves what is in a folder into an empty one: everything or nothing."""
  moved = {entry: path / entry.name for entry in sorted(content.iterdir())}
  try:
    for entry, place in moved.items():
      _put(entry, place)
  except BaseException:
    for place in moved.values():
      if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
      else:
        place.unlink(missing_ok=True)
    raise


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Gives a temporary folder that becomes `path` at the end.

  It is next to `path` and is renamed. If `path` is already an empty folder,
  which may be a mount point, the temporary folder is inside it, and its
  contents are moved up. An error in the `with` block removes it.

  Raises:
    OSError: It cannot be written; the message names `path`.
  """
  path = pathlib.Path(path)
  was_there = path.is_dir()
  content = path
  try:
    with _workplace(path / path.name if was_there else path) as folder:
      content = folder / path.name
      content.mkdir()
      yield content
      if was_there:
        _move_up(content, path)
      else:
        _put(content, path)
  except OSError as error:
    if error.filename is not None:
      raise _failure(path, error) from error
    if not error.strerror:
      raise
    # A file in the folder, under the name that it would have got.
    text = error.strerror.replace(str(content), str(path))
    raise OSError(error.errno, text) from error


def write(path: str | os.PathLike[str], content: bytes) -> None:
  """Writes a whole file at once; see `AtomicFile`."""
  with AtomicFile(path) as file:
    file.write(content)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  """Writes `value` as indented JSON; see `AtomicFile`.

  Numbers that are not finite become null, as JSON has none.
  """
  content = json.dumps(without_nan(value), indent=2, allow_nan=False)
  write(path, content.encode() + b"\n")


def without_nan(value: Any) -> Any:
  """Returns a value for JSON, with null for numbers that JSON lacks."""
  if isinstance(value, dict):
    return {name: without_nan(entry) for name, entry in value.items()}
  if isinstance(value, list | tuple):
    return [without_nan(entry) for entry in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
