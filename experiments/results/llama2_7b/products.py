"""Counts the matrix products of a compiled step, from XLA's dump of it.

    XLA_FLAGS="--xla_dump_to=dump" python -m experiments.plan_memory \
      --config=configs/llama2_7b_8k_h200.py --gpu=h100-80gb
    python -m experiments.results.llama2_7b.products \
      dump/*train_step*after_optimizations.txt

Products computed by cuBLAS are counted, as often as their loops run; products
in the attention kernels are not.
"""

import collections
import math
import pathlib
import re
import sys

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
  r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)"
)
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OPERANDS = re.compile(r"custom-call\(([^)]*)\), custom_call_target=\"__cublas")
_SUMMED = re.compile(r'"lhs_contracting_dimensions":\["(\d+)"\]')


def _sizes(shape: str) -> list[int]:
  """Returns the sizes of the first array of a shape."""
  found = re.search(r"\[([\d,]*)\]", shape)
  return [int(n) for n in found[1].split(",") if n] if found else []


def products(text: str) -> collections.Counter[tuple[int, int]]:
  """Returns how often a call of a compiled function computes each product.

  Args:
    text: Its HLO, optimised for a GPU.

  Returns:
    How often, by the numbers of the result and the terms of each.
  """
  lines: dict[str, list[str]] = {}
  entry = name = ""
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      name = header[2]
      lines[name] = []
      entry = name if header[1] else entry
    elif name:
      lines[name].append(line)
  found: collections.Counter[tuple[int, int]] = collections.Counter()

  def visit(name: str, times: int) -> None:
    shapes = {}
    for line in lines[name]:
      instruction = _INSTRUCTION.match(line)
      if not instruction:
        continue
      shapes[instruction[1]] = instruction[2]
      operands = _OPERANDS.search(line)
      if operands:
        summed = _SUMMED.search(line)
        if summed is None:
          raise ValueError(f"cannot read a product: {line.strip()}")
        first = re.findall(r"%([\w.\-]+)", operands[1])[0]
        terms = _sizes(shapes[first])[int(summed[1])]
        found[math.prod(_sizes(instruction[2])), terms] += times
      turns = _TURNS.search(line)
      for called in _CALLED.findall(line):
        visit(called, times * int(turns[1] if turns else 1))

  visit(entry, 1)
  return found


def main() -> None:
  """Prints the products of each file, largest first."""
  for path in sys.argv[1:]:
    found = products(pathlib.Path(path).read_text(encoding="utf8"))
    operations = {key: 2 * math.prod(key) * n for key, n in found.items()}
    print(f"{path}: {sum(operations.values()) / 1e12:,.1f} TFLOP")
    for key, size in sorted(operations.items(), key=lambda x: -x[1]):
      print(
        f"  {found[key]:>6} with {key[0]:>11,} results of {key[1]:>6,} terms:"
        f" {size / 1e12:,.1f} TFLOP"
      )


if __name__ == "__main__":
  main()
