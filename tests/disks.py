"""Takes the disk away from commands while they write.

    unshare -rm python -m tests.disks --count=300 --seed=1  # or as root

Before one of a command's file operations in its output folder, drawn at random,
or before the first, the disk is full, or read-only, or the folder is removed,
or the process gets SIGINT or SIGTERM. The command must end in one line, or as
an undisturbed run does; nothing may be half-written; and the same command must
then end as an undisturbed run. The outputs are in a tmpfs, of Linux.
"""

import argparse
import collections
import ctypes
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import threading

from tests.children import in_child, prepare, run_command, wait, write_inputs

_SIZE = 1 << 28
_RUN_STEPS = (
  "--config.training.steps=6",
  "--config.training.checkpoint_every=2",
  "--config.training.log_every=2",
  "--config.evaluation.every=4",
)
_MS_RDONLY, _MS_REMOUNT = 1, 32
# The audit events about files.
_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_FAULTS = ("full", "read-only", "removed", "SIGINT", "SIGTERM")
# Speeds and times differ from run to run.
_VARIES = ("tokens_per_second", "peak_bytes", "seconds")
_VARYING_FILES = ("table.md", "report.md")
# A study of two arms; the other commands are in `tests.fuzz.calls`.
_STUDY = """
from experiments.ablation.settings import *
from experiments.shared.config import *
from scca_jax.lora import LoraConfig

def get_config():
  return to_config_dict(AblationConfig(
    run=FinetuneConfig(
      model="model",
      lora=LoraConfig(rank=2, train_embeddings=False),
      data=DataConfig(train="books.jsonl", test="books.jsonl", held_out=1),
      training=TrainingConfig(
        seq_len=32, batch_size=1, steps=2, implementation="reference"
      ),
      evaluation=EvaluationConfig(context_lens=(16, 32), num_windows=2),
    ),
    arms=(
      ArmConfig(name="dense", rope=RopeConfig(kind=None)),
      ArmConfig(
        name="s2", pattern="s2(chunk_size=16)", rope=RopeConfig(kind=None)
      ),
    ),
    learning_rates=(1e-3,),
    seeds=(0,),
    validation_windows=2,
    looks=1,
    look_windows=2,
  ))
"""


@dataclasses.dataclass(frozen=True)
class _Call:
  """A command that writes below `disk/in`; paths are relative to a case."""

  command: str
  args: tuple[str, ...]


def _calls() -> list[_Call]:
  """Returns the calls."""
  from tests.fuzz.calls import CALLS

  found = []
  for call in CALLS:
    args = [
      f"--{name}=disk/in/{value}" if name in ("output", "output_dir") else arg
      for arg in call.args
      if arg not in ("--dry_run", "--quick")
      for name, _, value in [arg[2:].partition("=")]
    ]
    if tuple(args) == call.args or "--config=config.py" in args:
      continue
    if call.command in ("finetune", "pretrain"):
      args += _RUN_STEPS
    if call.command == "ablate":
      args.append("--config=study.py")
    if call.command in ("benchmark_attention", "compare"):
      args.append("--plot=disk/in/o.png")
    if "--output=disk/in/o.json" in args and call.command == "evaluate":
      args.append("--positions=disk/in/o.npz")
    found.append(_Call(call.command, tuple(args)))
  found += [
    # A folder that is there already, and empty.
    _Call("export", ("--model=model", "--output_dir=disk/in")),
    _Call(
      "evaluate",
      (
        "--model=model",
        "--tasks=passkey",
        "--num_samples=1",
        "--context_lens=256",
        "--output=disk/in/o.json",
        "--heat_map=disk/in/o.png",
        "--sample_cache=disk/in/samples",
      ),
    ),
    _Call(
      "benchmark_step",
      (
        "--model=model",
        "--random_weights",
        "--seq_lens=16",
        "--config.training.batch_size=1",
        "--config.pattern=dense",
        "--warmup=1",
        "--repeats=1",
        "--peers=",
        "--output=disk/in/o.json",
        "--plot=disk/in/o.png",
      ),
    ),
  ]
  return found


def _mount(folder: pathlib.Path, flags: int, size: int) -> int:
  """Mounts, or changes, a tmpfs; returns the error number."""
  library = ctypes.CDLL(None, use_errno=True)
  data = f"size={size}".encode()
  failed = library.mount(b"tmpfs", bytes(folder), b"tmpfs", flags, data)
  return ctypes.get_errno() if failed else 0


def _used(folder: pathlib.Path) -> int:
  found = os.statvfs(folder)
  return (found.f_blocks - found.f_bfree) * found.f_frsize


class _Fault:
  """Counts operations on a folder's files, and disturbs one of them."""

  def __init__(self, disk: pathlib.Path, kind: str, at: int | None):
    self._disk, self._kind, self._at, self._count = disk, kind, at, 0
    self._lock = threading.Lock()
    self._refuses = False

  def __call__(self, event: str, args: tuple) -> None:
    if event not in _EVENTS or not os.path.abspath(
      os.fsdecode(
        "" if isinstance(args[0], int) or args[0] is None else args[0]
      )
    ).startswith(str(self._disk / "in")):
      return
    with self._lock:
      self._count += 1
      now = self._count == self._at
    if now:
      self.happen()
    if self._refuses and (event != "open" or args[2] & _WRITING):
      raise OSError(errno.EROFS, os.strerror(errno.EROFS), args[0])

  def happen(self) -> None:
    if self._kind == "full":
      # Of a size 0 there would be no limit.
      assert not _mount(self._disk, _MS_REMOUNT, max(4096, _used(self._disk)))
    elif self._kind == "read-only":
      # The kernel refuses it while a file is open for writing.
      self._refuses = bool(_mount(self._disk, _MS_REMOUNT | _MS_RDONLY, _SIZE))
    elif self._kind == "removed":
      shutil.rmtree(self._disk / "in", ignore_errors=True)
    else:
      os.kill(os.getpid(), getattr(signal, self._kind))

  def report(self) -> None:
    """Writes the count to a file beside the disk."""
    self._disk.with_name("operations").write_text(str(self._count))


def _run(call: _Call, kind: str = "", at: int | None = None) -> None:
  """Runs a command in a child."""
  fault = _Fault(pathlib.Path("disk").absolute(), kind, at)
  if at == 0:
    fault.happen()
  sys.addaudithook(fault)
  try:
    run_command(call.command, list(call.args))
  finally:
    fault.report()


def _without_times(value):
  if isinstance(value, dict):
    return {k: _without_times(v) for k, v in value.items() if k not in _VARIES}
  return [*map(_without_times, value)] if isinstance(value, list) else value


def _content(path: pathlib.Path) -> str:
  content = path.read_bytes()
  if path.suffix in (".json", ".jsonl"):
    lines = content.splitlines() if path.suffix == ".jsonl" else [content]
    content = json.dumps(
      [_without_times(json.loads(x)) for x in lines]
    ).encode()
  return hashlib.sha256(content).hexdigest()


def _outputs(folder: pathlib.Path) -> dict[str, str]:
  """Returns the hashes of all outputs by name; caches are not among them."""
  return {
    str(path.relative_to(folder)): _content(path)
    for path in folder.rglob("*")
    if path.is_file()
    and not {"tensorboard", "checkpoints", "samples"} & set(path.parts)
  }


def _differences(found: dict, expected: dict, varying: set) -> str:
  """Returns the names that one of two lacks, and what differs."""
  differing = [
    name
    for name in sorted(found.keys() & expected.keys() - varying)
    if found[name] != expected[name]
  ]
  more, less = sorted(found.keys() - expected), sorted(expected.keys() - found)
  return "".join(
    f" {names} {what}"
    for names, what in (
      (more, "added"),
      (less, "missing"),
      (differing, "differ"),
    )
    if names
  )


def _judge(kind: str, status: int | None, printed: str) -> str:
  """Returns what is wrong with the end of a disturbed command, if anything."""
  if "Traceback (most" in printed:
    return f"traceback: {printed.strip().splitlines()[-1][:300]}"
  lines = [x for x in printed.splitlines() if x.startswith("error:")]
  if status == 0:
    return "status 0 with an error line" if lines else ""
  if kind.startswith("SIG"):
    stops = [x for x in printed.splitlines() if x.startswith("Stopped by")]
    if status == 128 + getattr(signal, kind) and len(stops) == 1 and not lines:
      return ""
  elif status == 2 and len(lines) == 1 and len(lines[0]) <= 500:
    return ""
  return f"status {status}: {printed.strip()[-300:]}"


def main() -> int:
  """Runs the cases; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--count", type=int, default=300)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", type=int, help="Only the case of this number.")
  parser.add_argument("--commands", default="")
  parser.add_argument("--verbose", action="store_true")
  flags = parser.parse_args()
  folder = pathlib.Path(tempfile.mkdtemp(prefix="disks-"))
  prepare(folder)
  output, case = folder / "printed", folder / "case"
  write_inputs(case, output)
  (case / "study.py").write_text(_STUDY)
  book = json.dumps({"text": (case / "train.txt").read_text()}) + "\n"
  (case / "books.jsonl").write_text(book * 3)
  disk = case / "disk"
  disk.mkdir()
  if _mount(disk, 0, _SIZE):
    sys.exit("cannot mount a tmpfs: run it as root or under unshare -rm.")

  def run(call: _Call, kind: str = "", at: int | None = None):
    status, why = wait(in_child(lambda: _run(call, kind, at), output, case))
    return status, output.read_text(errors="replace") + why

  def clean() -> None:
    assert not _mount(disk, _MS_REMOUNT, _SIZE)
    shutil.rmtree(disk / "in", ignore_errors=True)
    (disk / "in").mkdir()

  def undisturbed(call: _Call) -> tuple[int, dict, set]:
    ends = []
    for _ in range(2):
      clean()
      status, printed = run(call)
      assert status == 0, f"{call.command} {call.args} {printed}"
      ends.append(_outputs(disk / "in"))
    operations = int((case / "operations").read_text())
    varying = {
      name
      for name in ends[0]
      if ends[0][name] != ends[1][name] or name.endswith(_VARYING_FILES)
    }
    assert ends[0].keys() == ends[1].keys()
    return operations, ends[0], varying

  names = flags.commands.split(",") if flags.commands else None
  calls = [x for x in _calls() if not names or x.command in names]
  known: dict[int, tuple[int, dict, set]] = {}
  ends: collections.Counter = collections.Counter()
  numbers = range(flags.count) if flags.only is None else [flags.only]
  try:
    for number in numbers:
      rng = random.Random(f"{flags.seed}/{number}")
      which = number % len(calls)
      kind = _FAULTS[number // len(calls) % len(_FAULTS)]
      call = calls[which]
      if which not in known:
        known[which] = undisturbed(call)
      operations, expected, varying = known[which]
      at = rng.choice((0, 1, *[rng.randrange(1, operations + 1)] * 6))
      if kind.startswith("SIG"):
        at = max(at, 1)
      clean()
      status, printed = run(call, kind, at)
      wrong = _judge(kind, status, printed)
      assert not _mount(disk, _MS_REMOUNT, _SIZE)
      found = _outputs(disk / "in") if (disk / "in").exists() else {}
      if kind == "read-only":  # Nothing can be removed from it.
        found = {x: v for x, v in found.items() if ".partial" not in x}
      is_run = call.command in ("finetune", "pretrain", "ablate")
      if not wrong and status == 0:
        # What was removed after it was written is not missed.
        gone = {} if is_run or kind != "removed" else expected
        wrong = _differences(gone | found, expected, varying)
      if not wrong and not is_run:
        kept = {x: v for x, v in found.items() if ".partial" not in x}
        for name in kept.keys() - varying:
          if kept[name] != expected.get(name):
            wrong = f"{name} is half-written"
      if not wrong and kind not in ("read-only",):
        left = [str(x.name) for x in disk.rglob("*.partial")]
        wrong = f"left {left}" if left else ""
      if not wrong and status != 0:
        if "remove the rest of its folder" in printed or (
          kind == "read-only" and "--output_dir=disk/in" in call.args
        ):
          shutil.rmtree(disk / "in", ignore_errors=True)
        (disk / "in").mkdir(exist_ok=True)
        again, said = run(call)
        if "is not empty" in said and found == expected:
          again = 0  # It was stopped when all was done.
        if again != 0:
          wrong = f"again: status {again}: {said.strip()[-300:]}"
        else:
          wrong = _differences(_outputs(disk / "in"), expected, varying)
          wrong = f"again:{wrong}" if wrong else ""
      ends["wrong" if wrong else "complete" if status == 0 else "ended"] += 1
      if wrong or flags.verbose or flags.only is not None:
        last = (printed.strip().splitlines() or [""])[-1][:300]
        print(
          f"{number} {call.command} {call.args[-1]}: {kind} at operation {at}"
          f" of {operations}\n    {wrong or 'right'}\n    {last}",
          flush=True,
        )
      if flags.only is not None:
        print(call.args, printed, sep="\n")
  finally:
    ctypes.CDLL(None).umount2(bytes(disk), 2)
  print(
    f"seed {flags.seed}: {sum(ends.values())} cases, {ends['ended']} ended in"
    f" one line, {ends['complete']} complete, {ends['wrong']} wrong"
  )
  shutil.rmtree(folder)
  return bool(ends["wrong"])


if __name__ == "__main__":
  sys.exit(main())
