"""Damage to files and arguments, drawn at random, by kind."""

import json
import os
import pathlib
import random
import re
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from tests.fuzz.calls import Call

# Values that a number, text or object of a file may be replaced with.
NUMBERS = (
  *(0, -1, 1, 2, 3, 7, 1.5, -0.0, 1e-300, 1e308, 2**31, 2**31 - 1, 2**63),
  *(2**64 + 1, -(2**65), 10**9, 2_000_000, 10**400),
  *(float("nan"), float("inf"), float("-inf")),
)
OTHERS = (
  *(None, True, False, "", "x", "\0", "../../etc/passwd", "/dev/zero"),
  *("(([a-z_.0-9]+)+)+!", "\ud800", "é" * 1000, [], [1], {}, {"x": 1}),
  *([[[[]]]], ["q_proj", 3]),
)
FLAGS = (
  *("", "0", "-1", "1", "3", "1.5", "nan", "inf", "-inf", "1e308", "none"),
  *("1000000000", str(2**31), str(2**65), "9" * 5000, "x", "\0x", "é"),
  *("/dev/zero", "/dev/null", ".", "absent", "(1,2)", "((((((((((", "true"),
  *("1,2,3", "-5,4", "../x", "\udcff\udcfe", "x" * 3000, "{}", "[1]"),
  *("scca_flow(num_chunks=1000000000)", "sda(dilation=2147483647)"),
  *("local(chunk_size=1)", "mix(" * 300, "s2(boundary='x')"),
  *("sliding(window=1000000000)", "mix(local,sda(dilation=2147483647))"),
)
EXPRESSIONS = ("(a+)+$", "(.*)*x", "((", "(?=q).*", "a{1,1000}{1,1000}", "\\1")
PROGRAMS = (
  "def get_config():\n  return None\n",
  "def get_config():\n  return 3\n",
  "raise RuntimeError('boom')\n",
  "import sys; sys.exit(0)\n",
  "raise KeyboardInterrupt\n",
  "def get_config():\n  return get_config()\n",
  "x = (\n",
  "\0",
  "def get_config(a):\n  return a\n",
  "import absent_module\n",
)


def _places(value: Any, path: tuple = ()) -> list[tuple]:
  """Returns the path of every entry of a JSON value."""
  found = [path] if path else []
  entries = ()
  if isinstance(value, dict):
    entries = list(value.items())
  elif isinstance(value, list):
    entries = list(enumerate(value))
  for key, entry in entries[:200]:
    found += _places(entry, (*path, key))
  return found


def _json(path: pathlib.Path, rng: random.Random) -> str:
  """Replaces, removes or adds an entry of a JSON file, or of a line."""
  lines = [path.read_text()]
  if path.suffix == ".jsonl":
    lines = lines[0].splitlines(keepends=True)
  at = rng.randrange(len(lines))
  value = json.loads(lines[at])
  way = rng.random()
  if way < 0.1:
    depth = rng.choice((50, 5000, 200_000))
    lines[at] = rng.choice(("[", '{"a":')) * depth
    path.write_text("".join(lines))
    return f"{path.name}: {depth} levels"
  places = _places(value)
  # Otherwise vocabularies would get almost all damage.
  top = [place for place in places if len(place) < 3]
  place = rng.choice(top if rng.random() < 0.8 else places)
  *outer, last = place
  holder = value
  for key in outer:
    holder = holder[key]
  if way < 0.2:
    del holder[last]
    new = "nothing"
  else:
    pool = NUMBERS if rng.random() < 0.5 else OTHERS
    new = holder[last] = rng.choice(pool)
    if rng.random() < 0.1:
      new = holder[last] = rng.choice(EXPRESSIONS)
  lines[at] = json.dumps(value) + ("\n" if path.suffix == ".jsonl" else "")
  path.write_text("".join(lines))
  return f"{path.name}: {'.'.join(map(str, place))} = {repr(new)[:60]}"


def _bytes(path: pathlib.Path, rng: random.Random) -> str:
  """Cuts a file, or overwrites or repeats a part of it."""
  content = bytearray(path.read_bytes())
  # The start of a file matters most.
  limit = rng.choice((16, 256, len(content) or 1))
  place = rng.randrange(min(len(content), limit) or 1)
  way = rng.choice(("cut", "flip", "huge", "zeros", "repeat", "empty", "tail"))
  if way == "cut":
    del content[place:]
  elif way == "flip" and content:
    content[place] ^= 1 << rng.randrange(8)
  elif way == "huge":
    number = rng.choice((2**31 - 1, 2**32 - 1, 2**62, 2**64 - 1, 2**20))
    content[place : place + 8] = struct.pack("<Q", number)
  elif way == "zeros":
    content[place : place + rng.randrange(1, 64)] = bytes(rng.randrange(64))
  elif way == "repeat":
    content[place:place] = content[place : place + 1000] * rng.randrange(1, 9)
  elif way == "tail":
    content += os.urandom(0) + rng.randbytes(rng.randrange(1, 100))
  else:
    content.clear()
  path.write_bytes(content)
  return f"{path.name}: {way} at {place}"


def _replace(path: pathlib.Path, rng: random.Random) -> str:
  """Replaces a file by something that is not a file, or not text."""
  way = rng.choice(
    ("fifo", "zero", "null", "folder", "gone", "loop", "bomb", "line", "text")
  )
  path.unlink()
  if way == "fifo":
    os.mkfifo(path)
  elif way in ("zero", "null"):
    path.symlink_to(f"/dev/{way}")
  elif way == "folder":
    path.mkdir()
  elif way == "loop":
    path.symlink_to(path.name)
  elif way == "bomb":
    _bomb(path)
  elif way == "line":
    path.write_bytes(b"[" * 30_000_000)
  elif way == "text":
    path.write_bytes(rng.randbytes(3000))
  return f"{path.name}: {way}"


def _bomb(path: pathlib.Path) -> None:
  """Writes a small archive with a huge content, in the format of the name."""
  import gzip
  import lzma

  import zstandard

  zeros = bytes(1 << 26)
  if path.suffix == ".npz":
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
      header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999,)"
      header += b", }"
      header = header.ljust(117) + b"\n"
      start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
      file.writestr("losses_16.npy", start + zeros)
  elif path.suffix == ".xz":
    path.write_bytes(lzma.compress(zeros) * 40)
  elif path.suffix == ".zst":
    path.write_bytes(zstandard.ZstdCompressor(19).compress(zeros) * 60)
  else:
    path.write_bytes(gzip.compress(zeros) * 20)


def _argument(args: list[str], rng: random.Random) -> str:
  """Replaces the value of an argument."""
  # Without --dry_run a study takes minutes.
  at = rng.choice([i for i, arg in enumerate(args) if arg != "--dry_run"])
  name, equals, _ = args[at].partition("=")
  args[at] = f"{name}{equals or '='}{rng.choice(FLAGS)}"
  return repr(args[at])[:100]


def _number(args: list[str], rng: random.Random) -> str:
  """Replaces a number in an argument by another."""
  places = [i for i, arg in enumerate(args) if re.search(r"\d", arg)]
  if not places:
    return _argument(args, rng)
  at = rng.choice(places)
  # Large amounts of requested work legitimately take time and memory.
  new = str(rng.choice([x for x in NUMBERS[:-4] if x != 2_000_000]))
  args[at] = re.sub(r"\d+", lambda _: new, args[at], count=1)
  return repr(args[at])[:100]


def _setting(args: list[str], rng: random.Random) -> str:
  """Adds a setting that is out of range, or of another type."""
  from experiments.shared import config_flag
  from experiments.shared.config import FinetuneConfig

  settings = config_flag.list_settings(FinetuneConfig)
  setting = rng.choice([s for s in settings if s.name != "training.steps"])
  args.append(f"--config.{setting.name}={rng.choice(FLAGS)}")
  return repr(args[-1])[:100]


def draw(call: Call, folder: pathlib.Path, rng: random.Random) -> tuple:
  """Damages one input of a call.

  Args:
    call: The call.
    folder: A copy of the inputs, which is changed.
    rng: Draws the damage.

  Returns:
    The arguments, and a description of the damage.
  """
  args = list(call.args)
  # At most a tenth are errors of arguments alone, where there are files.
  if not call.files or rng.random() < 0.1:
    ways: list[Callable[[list[str], random.Random], str]] = [_argument, _number]
    if call.command in ("finetune", "pretrain"):
      ways.append(_setting)
    return args, rng.choice(ways)(args, rng)
  if call.command in ("finetune", "pretrain") and rng.random() < 0.3:
    return args, _setting(args, rng)
  path = folder / rng.choice(call.files)
  if path.name == "config.py" and rng.random() < 0.7:
    program = rng.choice(PROGRAMS)
    path.write_text(program)
    return args, repr(program)
  if path.suffix in (".json", ".jsonl") and rng.random() < 0.7:
    if path.exists():
      return args, _json(path, rng)
  if not path.exists():  # A file that a run may find in its folder.
    path.write_text("{}")
  return args, rng.choice((_bytes, _bytes, _replace))(path, rng)
