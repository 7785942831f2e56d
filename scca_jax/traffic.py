"""How many bytes a compiled step moves between devices.

Numbers are what one device receives, read from the compiled program; a
collective in a loop counts once per iteration. With the usual algorithms, a
device receives `(n - 1) / n` of the result of an all-gather or all-to-all among
`n` devices, `n - 1` times the result of a reduce-scatter, and twice
`(n - 1) / n` of the result of an all-reduce.
"""

import math
import re
from typing import Any

# Bytes per element, by XLA's names.
_BYTES = {
  "pred": 1,
  "s4": 0.5,
  "u4": 0.5,
  "s8": 1,
  "u8": 1,
  "s16": 2,
  "u16": 2,
  "f16": 2,
  "bf16": 2,
  "s32": 4,
  "u32": 4,
  "f32": 4,
  "s64": 8,
  "u64": 8,
  "f64": 8,
}
_FLOATS = ("f16", "bf16", "f32", "f64")
KINDS = (
  "collective-permute",
  "all-to-all",
  "all-gather",
  "reduce-scatter",
  "all-reduce",
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
  r"^\s+(?:ROOT )?%?[\w.\-]+ = (?P<shape>.*?) (?P<name>[a-z\-]+)\("
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|true_computation|false_computation)"
  r"=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# Devices by number, a grid of them, or axes of a mesh, whole or in part.
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_GRID = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_AXES = re.compile(r"replica_groups=\w+\[([^\]]*)\][^{]*\{([^}]*)\}")


def _group_size(line: str) -> int:
  """Returns how many devices take part in a collective."""
  found = _GRID.search(line)
  if found:
    return int(found[1])
  found = _LISTED.search(line)
  if found:
    return found[1].count(",") + 1
  found = _AXES.search(line)
  if not found:
    raise ValueError(f"cannot read the devices of a collective: {line}")
  sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
  names = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
  return math.prod(int(part or sizes[name]) for name, part in names)


def _received(kind: str, line: str, shape: str) -> tuple[float, float]:
  """Returns the bytes of a collective: of floats and of everything else."""
  arrays = _ARRAY.findall(shape)
  # Some versions of XLA list only the results of an all-reduce.
  if "-start(" in line and (kind != "all-reduce" or shape.startswith("((")):
    # Operands come before results, and XLA's own integers last.
    arrays = [
      (dtype, dimensions)
      for dtype, dimensions in arrays
      if dimensions or dtype in _FLOATS
    ]
    arrays = arrays[len(arrays) // 2 :]
  n = 1 if kind == "collective-permute" else _group_size(line)
  share = {
    "collective-permute": 1.0,
    "all-to-all": (n - 1) / n,
    "all-gather": (n - 1) / n,
    "reduce-scatter": n - 1.0,
    "all-reduce": 2 * (n - 1) / n,
  }[kind]
  sizes = {True: 0.0, False: 0.0}
  for dtype, dimensions in arrays:
    if dtype not in _BYTES:
      raise ValueError(f"unknown dtype {dtype} in a collective: {line.strip()}")
    numbers = math.prod(int(d) for d in dimensions.split(",") if d)
    sizes[dtype in _FLOATS] += share * numbers * _BYTES[dtype]
  return sizes[True], sizes[False]


def moved_bytes(compiled: Any) -> dict[str, dict[str, float]]:
  """Returns what one device receives in one call of a compiled function.

  Args:
    compiled: A `jax.stages.Compiled`, or the text of its HLO.

  Returns:
    For each kind of collective that occurs: `floats`, the bytes of
    floating-point numbers, and `others`, the bytes of everything else.
  """
  text = compiled if isinstance(compiled, str) else compiled.as_text()
  own: dict[str, list[tuple[str, float, float]]] = {}
  calls: dict[str, list[tuple[str, int]]] = {}
  entry = name = ""
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      name = header[1]
      own[name], calls[name] = [], []
      if line.startswith("ENTRY"):
        entry = name
      continue
    found = _INSTRUCTION.match(line)
    if not found:
      continue
    kind = found["name"].removesuffix("-start")
    if kind in KINDS and not found["name"].endswith("-done"):
      own[name].append((kind, *_received(kind, line, found["shape"])))
    if found["name"].endswith(("-done", "-update")):
      continue  # It was counted where it started.
    turns = _TURNS.search(line)
    times = int(turns[1]) if turns and found["name"] == "while" else 1
    called = _CALLED.findall(line)
    branches = _BRANCHES.search(line)
    if branches:
      # Only one of them runs, but ours contain no collectives.
      called += [b.strip().lstrip("%") for b in branches[1].split(",")]
    calls[name] += [(c, times) for c in called]
  totals: dict[str, dict[str, float]] = {}

  def add(name: str, times: int) -> None:
    for kind, floats, others in own.get(name, []):
      total = totals.setdefault(kind, {"floats": 0.0, "others": 0.0})
      total["floats"] += times * floats
      total["others"] += times * others
    for called, turns in calls.get(name, []):
      add(called, times * turns)

  add(entry, 1)
  return totals


def ring_bytes(
  *,
  seq_len: int,
  num_shards: int,
  num_kv_heads: int,
  head_dim: int,
  itemsize: int,
  batch: int = 1,
) -> int:
  """Returns what a device receives in ring attention (arXiv 2310.01889).

  In the forward pass of one layer, that is all keys and values but its own. The
  backward pass moves twice as much: keys and values, and their gradients.

  Args:
    seq_len: Tokens.
    num_shards: Devices that share a sequence.
    num_kv_heads: Key heads on the device.
    head_dim: Width of a head.
    itemsize: Bytes of an element.
    batch: Sequences on the device.
  """
  others = seq_len // num_shards * (num_shards - 1)
  return 2 * batch * others * num_kv_heads * head_dim * itemsize
