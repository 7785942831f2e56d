"""Throws damaged inputs at all commands, and lists what did not end well.

    python -m tests.fuzz --seconds=600 --seed=1

Every case runs in a child of its own, which may take 60 seconds and 3 GiB. It
ends well with status 0, or with status 2 and one line on standard error that
begins with "error:" and has at most 500 characters. A case depends on seed and
number alone: `--only=N` runs one again and prints what it printed.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings

_SECONDS, _BYTES = 60, 3 << 30
_POLL = 0.02


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--seconds", type=float, default=600)
  parser.add_argument("--count", type=int, default=10**9)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", type=int, default=None)
  parser.add_argument("--commands", default="")
  parser.add_argument("--verbose", action="store_true")
  return parser.parse_args()


def _in_child(function, output: pathlib.Path, folder: pathlib.Path) -> int:
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


def _wait(pid: int) -> tuple[int | None, str]:
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


def _command(name: str, args: list[str]) -> None:
  sys.argv = [f"{name}.py", *args]
  runpy.run_module(f"experiments.{name}", run_name="__main__")


def _write_inputs() -> None:
  # It starts jax's devices, which no parent may.
  from tests.fuzz import inputs

  inputs.write(pathlib.Path())


def _judge(status: int | None, why: str, printed: str) -> str:
  """Returns what is wrong with how a case ended; nothing if it ended well."""
  if why:
    return why
  lines = [x for x in printed.splitlines() if x.startswith("error:")]
  if "Traceback (most" in printed:
    return f"traceback: {printed.strip().splitlines()[-1][:200]}"
  if status == 0:
    return "accepted with an error line" if lines else ""
  if status != 2:
    return f"status {status}: {printed.strip()[-200:]}"
  if len(lines) != 1 or len(lines[0]) > 500:
    return f"{len(lines)} lines: {[line[:200] for line in lines]}"
  return ""


def main() -> int:
  """Runs the cases; returns the exit status."""
  flags = _parse()
  # Libraries start threads as they are imported, which wait.
  warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
  folder = pathlib.Path(tempfile.mkdtemp(prefix="fuzz-"))
  os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "XDG_CACHE_HOME": str(folder / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "HF_HUB_OFFLINE": "1",
  }
  # Imported once, and before any child: none of them starts jax's devices.
  import experiments.ablation.study  # noqa: F401
  import experiments.shared.loop  # noqa: F401
  import experiments.shared.task_scores  # noqa: F401
  from tests.fuzz import damage
  from tests.fuzz.calls import CALLS

  output, whole = folder / "printed", folder / "whole"
  whole.mkdir()
  status, why = _wait(_in_child(_write_inputs, output, whole))
  assert status == 0, output.read_text() + why
  names = flags.commands.split(",") if flags.commands else None
  calls = [x for x in CALLS if not names or x.command in names]
  begin, ends, bad = time.monotonic(), collections.Counter(), 0
  numbers = range(flags.count) if flags.only is None else [flags.only]
  for number in numbers:
    if time.monotonic() - begin > flags.seconds:
      break
    rng = random.Random(f"{flags.seed}/{number}")
    call = calls[number % len(calls)]
    copy = folder / "case"
    shutil.copytree(whole, copy)
    args, text = damage.draw(call, copy, rng)
    done, why = _wait(
      _in_child(lambda c=call, a=args: _command(c.command, a), output, copy)
    )
    printed = output.read_text(errors="replace")
    wrong = _judge(done, why, printed)
    if not wrong and list(copy.rglob("*.partial")):
      wrong = f"left {[p.name for p in copy.rglob('*.partial')]}"
    ends["wrong" if wrong else "refused" if done else "accepted"] += 1
    bad += bool(wrong)
    if wrong or flags.verbose or flags.only is not None:
      said = wrong or (printed.strip().splitlines() or [""])[-1][:300]
      print(f"{number} {call.command}: {text}\n    {said}", flush=True)
    if flags.only is not None:
      print(args, printed, sep="\n")
    shutil.rmtree(copy)
  total = sum(ends.values())
  print(
    f"seed {flags.seed}: {total} cases in {time.monotonic() - begin:.0f} s,"
    f" {ends['refused']} refused in one line, {ends['accepted']} accepted,"
    f" {ends['wrong']} wrong"
  )
  shutil.rmtree(folder)
  return bool(bad)


if __name__ == "__main__":
  sys.exit(main())
