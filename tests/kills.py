"""Kills runs at moments drawn at random, and compares how they end.

    python -m tests.kills --count=200 --seed=1

A run of `finetune` is killed before one of its file operations (opening,
renaming, making or removing a file: tokens, metrics, checkpoint, adapter,
summary or report), or at some time, and restarted until it ends. It must end
like an undisturbed run: with the same metrics, adapter and summary, and no
partial file. With `--pairs=N`, two runs are started on one folder, at the same
time or one during the other: one must end in one line, the other as if alone.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import threading
import time

from tests.children import in_child, prepare, run_command, wait, write_inputs

_STEPS = 12
_ARGS = [
  "--model=model",
  "--data=train.txt",
  "--config.data.test=train.txt",
  "--config.training.seq_len=16",
  "--config.training.batch_size=1",
  f"--config.training.steps={_STEPS}",
  "--config.training.checkpoint_every=3",
  "--config.training.log_every=2",
  "--config.evaluation.context_lens=(16,)",
  "--config.evaluation.num_windows=1",
  "--config.evaluation.every=4",
  "--config.rope.kind=none",
  "--output_dir=run",
]
# The audit events about files that a run writes.
_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
# Speeds differ from run to run.
_VARIES = ("tokens_per_second", "peak_bytes")


class _Killer:
  """Counts operations on a run's files, and can kill the process at one."""

  def __init__(self, folder: pathlib.Path, at: int | None):
    self._folder, self._at, self._count = str(folder), at, 0
    self._lock = threading.Lock()

  def __call__(self, event: str, args: tuple) -> None:
    if event not in _EVENTS or not str(args[0]).startswith(
      (self._folder, "run/", "./run/")
    ):
      return
    with self._lock:
      self._count += 1
      if self._count == self._at:
        os.kill(os.getpid(), signal.SIGKILL)

  def report(self) -> None:
    """Writes the count to a file next to the run."""
    pathlib.Path("operations").write_text(str(self._count))


def _run(at: int | None = None, seconds: float | None = None) -> None:
  """Runs the command; in a child.

  Args:
    at: The operation on files before which it is killed.
    seconds: The time after which it is.
  """
  killer = _Killer(pathlib.Path("run").absolute(), at)
  sys.addaudithook(killer)
  if seconds is not None:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
  try:
    run_command("finetune", _ARGS)
  finally:
    killer.report()


def _end(folder: pathlib.Path) -> dict:
  """Returns the results of a run."""
  from safetensors.numpy import load_file

  lines = [
    json.loads(line)
    for line in (folder / "metrics.jsonl").read_text().splitlines()
  ]
  summary = json.loads((folder / "summary.json").read_text())
  tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
  return {
    "metrics": [
      {k: v for k, v in line.items() if k not in _VARIES} for line in lines
    ],
    "summary": {k: v for k, v in summary.items() if k not in _VARIES},
    "adapter": {name: x.tobytes() for name, x in tensors.items()},
    "files": sorted(
      str(path.relative_to(folder))
      for path in folder.rglob("*")
      # TensorBoard starts a new file every time.
      if "tensorboard" not in path.parts
      and path.is_file()
      # How a checkpoint's arrays are cut into files is up to TensorStore.
      and "checkpoints" not in path.parts
    ),
    "checkpoints": sorted(x.name for x in (folder / "checkpoints").iterdir()),
  }


def _differences(found: dict, expected: dict) -> str:
  """Returns what differs, with the names of files."""
  texts = []
  for name in expected:
    if found[name] == expected[name]:
      continue
    texts.append(name)
    if name in ("files", "checkpoints"):
      more = sorted(set(found[name]) - set(expected[name]))
      less = sorted(set(expected[name]) - set(found[name]))
      texts.append(f"{more} too many, {less} missing")
  return ", ".join(texts)


def _killed(
  copy: pathlib.Path, output: pathlib.Path, rng: random.Random, last: int
) -> str:
  """Kills a run, perhaps several times, lets it end, and returns when."""
  when = []
  while not when or rng.random() < 0.4:
    at = rng.randrange(1, last + 1) if rng.random() < 0.8 else None
    seconds = None if at else rng.uniform(0, 6)
    wait(in_child(lambda a=at, s=seconds: _run(a, s), output, copy))
    when.append(f"operation {at}" if at else f"{seconds:.2f} s")
  status, why = wait(in_child(_run, output, copy))
  if status:
    when.append(f"status {status} {why} {output.read_text()[-300:]}")
  return ", ".join(when)


def _pair(
  copy: pathlib.Path, output: pathlib.Path, rng: random.Random
) -> tuple[str, str]:
  """Starts two runs on a folder; returns when, and what is wrong."""
  other = output.with_name("printed_by_other")
  delay = rng.choice((0.0, rng.uniform(0, 4)))
  first = in_child(_run, output, copy)
  time.sleep(delay)
  second = in_child(_run, other, copy)
  ends = sorted(
    [(wait(first)[0], output), (wait(second)[0], other)], key=lambda x: x[0]
  )
  when = f"two runs, {delay:.2f} s apart"
  if [status for status, _ in ends] == [0, 0]:
    # The first had ended before the second began.
    return when, "" if delay else "both ran"
  said = [x for x in ends[1][1].read_text().splitlines() if "in use by" in x]
  if [status for status, _ in ends] != [0, 2] or len(said) != 1:
    return when, f"ended with {[status for status, _ in ends]}: {said}"
  return when, ""


def main() -> int:
  """Runs all; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--count", type=int, default=200)
  parser.add_argument("--pairs", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", type=int, help="Only the case of this number.")
  flags = parser.parse_args()
  folder = pathlib.Path(tempfile.mkdtemp(prefix="kills-"))
  prepare(folder)
  output, whole = folder / "printed", folder / "whole"
  write_inputs(whole, output)
  shutil.rmtree(whole / "run")
  copy = folder / "case"
  shutil.copytree(whole, copy)
  status, why = wait(in_child(_run, output, copy))
  assert status == 0, output.read_text() + why
  expected = _end(copy / "run")
  last = int((copy / "operations").read_text())
  print(f"an undisturbed run has {last} operations on files", flush=True)
  bad = 0
  numbers = range(flags.count + flags.pairs)
  for number in numbers if flags.only is None else [flags.only]:
    rng = random.Random(f"{flags.seed}/{number}")
    shutil.rmtree(copy)
    shutil.copytree(whole, copy)
    wrong = ""
    if number < flags.count:
      when = _killed(copy, output, rng, last)
    else:
      when, wrong = _pair(copy, output, rng)
    try:
      wrong = wrong or _differences(_end(copy / "run"), expected)
    except (OSError, ValueError) as error:
      wrong = f"{error}; {output.read_text()[-300:]}"
    if wrong:
      bad += 1
      print(f"{number}: {when}: {wrong}", flush=True)
  print(
    f"seed {flags.seed}: {flags.count} killed, {flags.pairs} pairs,"
    f" {bad} did not end as an undisturbed run"
  )
  shutil.rmtree(folder)
  return bool(bad)


if __name__ == "__main__":
  sys.exit(main())
