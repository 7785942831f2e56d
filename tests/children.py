"""Runs commands in children of a process that has imported all they need."""

import contextlib
import os
import pathlib
import runpy
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable

# Limits of a child.
_SECONDS, _BYTES = 60, 3 << 30
_POLL = 0.02


def prepare(folder: pathlib.Path) -> None:
  """Imports the commands, so that children start at once.

  No import starts jax's devices, which would not survive a fork.

  Args:
    folder: Where the children keep their compiled programs.
  """
  os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "XDG_CACHE_HOME": str(folder / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "HF_HUB_OFFLINE": "1",
  }
  # Libraries start threads on import, but these only wait.
  warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
  import experiments.ablation.study  # noqa: F401
  import experiments.shared.loop  # noqa: F401
  import experiments.shared.task_scores  # noqa: F401


def in_child(
  function: Callable[[], object], output: pathlib.Path, folder: pathlib.Path
) -> int:
  """Runs a function in a child; returns its pid."""
  pid = os.fork()
  if pid:
    return pid
  status = 1
  try:
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", errors="backslashreplace", closefd=False)
    os.chdir(folder)
    function()
    status = 0
  except SystemExit as error:
    status = error.code if isinstance(error.code, int) else bool(error.code)
  except BaseException:
    traceback.print_exc()
  finally:
    with contextlib.suppress(Exception):
      sys.stdout.flush()
      sys.stderr.flush()
    os._exit(status & 255)


def _resident(pid: int) -> int:
  """Returns the bytes that a process holds in memory, without shared files."""
  try:
    with open(f"/proc/{pid}/statm") as file:
      _, resident, shared, *_ = map(int, file.read().split())
  except OSError:
    return 0
  return (resident - shared) * os.sysconf("SC_PAGESIZE")


def wait(pid: int) -> tuple[int | None, str]:
  """Returns the status of a child, or why it was stopped."""
  begin, most = time.monotonic(), 0
  while True:
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
      return os.waitstatus_to_exitcode(status), ""
    most = max(most, _resident(pid))
    why = ""
    if most > _BYTES:
      why = f"more than {_BYTES >> 30} GiB"
    elif time.monotonic() - begin > _SECONDS:
      why = f"not ended in {_SECONDS} s"
    if why:
      os.killpg(pid, signal.SIGKILL)
      os.waitpid(pid, 0)
      return None, why
    time.sleep(_POLL)


def run_command(name: str, args: list[str]) -> None:
  sys.argv = [f"{name}.py", *args]
  runpy.run_module(f"experiments.{name}", run_name="__main__")


def write_inputs(folder: pathlib.Path, output: pathlib.Path) -> None:
  """Writes the inputs of `tests.fuzz` to a new folder, in a child.

  Args:
    folder: The folder.
    output: File for what the child prints.
  """

  def write():
    from tests.fuzz import inputs

    inputs.write(pathlib.Path())

  folder.mkdir()
  status, why = wait(in_child(write, output, folder))
  assert status == 0, output.read_text() + why
