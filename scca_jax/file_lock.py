"""File locks that are released when their process ends.

The kernel holds them (flock), so a crash leaves no lock behind. They work
between hosts if the file system has locks, as NFS does with its usual lock
service. On a file system without locks every attempt succeeds.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
import platform
from collections.abc import Iterator

_LOCK = ".lock"
# Errors from a file system without locks.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def try_lock(descriptor: int) -> bool:
  """Locks an open file, unless it is locked already.

  Args:
    descriptor: The file, open for writing. Closing it releases the lock.

  Returns:
    Whether the lock is ours.
  """
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      raise
  return True


def _open(path: pathlib.Path) -> int:
  """Returns the locked file at `path`; see `only_process`."""
  while True:
    descriptor = os.open(
      path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666
    )
    try:
      if not try_lock(descriptor):
        holder = os.read(descriptor, 300).decode("utf8", "replace").strip()
        raise ValueError(
          f"{path.parent} is in use by {holder or 'another process'}: wait"
          " until that ends, or use another folder."
        )
      with contextlib.suppress(FileNotFoundError):
        # The previous process may have removed it since we opened it.
        if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
          os.ftruncate(descriptor, 0)
          name = f"process {os.getpid()} on {platform.node()}\n"
          os.write(descriptor, name.encode())
          return descriptor
    except BaseException:
      os.close(descriptor)
      raise
    os.close(descriptor)


@contextlib.contextmanager
def only_process(folder: str | os.PathLike[str]) -> Iterator[None]:
  """Claims a folder for this process during a `with` block.

  The folder is created if missing, and removed again if the block leaves it
  empty.

  Raises:
    ValueError: Another process has claimed it; the message names host and
      process.
    OSError: The folder cannot be made or written to, or was removed during the
      block; the message names it.
  """
  folder = pathlib.Path(folder)
  is_new = not folder.exists()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _open(folder / _LOCK)
  except OSError as error:
    raise OSError(
      error.errno, f"cannot write to {folder}: {error.strerror}"
    ) from error

  def is_ours() -> bool:
    try:
      found = os.lstat(folder / _LOCK)
    except OSError:
      return False
    return os.path.samestat(os.fstat(descriptor), found)

  try:
    yield
    if not is_ours():
      # Later files may have made it again.
      raise OSError(
        f"{folder} was removed during the run, with what was in it: remove the"
        " rest of its folder and start the same command again."
      )
  finally:
    if is_ours():
      with contextlib.suppress(OSError):  # It need not be empty.
        (folder / _LOCK).unlink()
        if is_new:
          folder.rmdir()
    os.close(descriptor)
