"""Gives damaged inputs to all commands, and lists the ones that end badly.

    python -m tests.fuzz --seconds=600 --seed=1

Every case runs in its own child, which may take 60 seconds and 3 GiB. It ends
well with status 0, or with status 2 and one line on standard error that begins
with "error:" and has at most 500 characters. A case depends only on seed and
number: `--only=N` repeats one and prints its output.
"""

import argparse
import collections
import pathlib
import random
import shutil
import sys
import tempfile
import time

from tests.children import in_child, prepare, run_command, wait, write_inputs


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--seconds", type=float, default=600)
  parser.add_argument("--count", type=int, default=10**9)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", type=int, default=None)
  parser.add_argument("--commands", default="")
  parser.add_argument("--verbose", action="store_true")
  return parser.parse_args()


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
  folder = pathlib.Path(tempfile.mkdtemp(prefix="fuzz-"))
  prepare(folder)
  from tests.fuzz import damage
  from tests.fuzz.calls import CALLS

  output, whole = folder / "printed", folder / "whole"
  write_inputs(whole, output)
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
    done, why = wait(
      in_child(lambda c=call, a=args: run_command(c.command, a), output, copy)
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
