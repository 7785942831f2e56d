r"""Measures attention: correctness, then time and memory compared with peers.

    scca benchmark_attention --output=benchmark.json \
      --patterns='scca_fixed(chunk_size=512),sda(dilation=4)'

A case is a pattern at a length; forward, and forward with backward (the
gradients of query, key and value) are measured. Implementation and peers take
turns, round after round, so that ratios compare calls at the same temperature
of the chip. By default, on a CPU: 4,096 tokens, 8 heads of 64, chunks of 512,
float32, compared with dense `jax.nn.dot_product_attention`; and only the
memory, by compiling, at twice and four times the length. On a GPU the peers are
cuDNN's dense attention (`jax.nn`), `xla`, FlashAttention-3
(`pip install flash-attn3-jax`), both as a user would compose it and its kernels
alone, and, if PyTorch is installed, flex_attention with the same mask, dense
SDPA, and LongLoRA's S2 as its users run it. Times are for calls in flight and,
in addition, for single calls; the backward pass alone is the difference of the
two.

`--tune` searches for the best kernel sizes instead.
"""

import math
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

# PyTorch needs room on the GPU, and jax would take most of it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
from absl import flags

from experiments.shared import cli
from experiments.shared import flags as shared_flags
from experiments.timing import (
  attention_peers,
  attention_timing,
  clock,
  peers,
  plot,
  tune,
)
from experiments.timing.attention_timing import DENSE, PARTS, PEERS, Case
from scca_jax import atomic_file, dispatch, memory, patterns
from scca_jax.backends import block_sizes

_SEQ_LENS = shared_flags.define_lengths(
  "seq_lens", (4096,), "Lengths to time, in tokens."
)
_MEMORY_LENS = shared_flags.define_lengths(
  "memory_lens",
  None,
  "Lengths to compile for only to measure memory; by default 8192,16384 on a"
  " CPU.",
  least=0,
)
_PATTERNS = shared_flags.define_patterns(
  "patterns",
  ["scca_fixed(chunk_size=512)"],
  f"Patterns to time: {shared_flags.PATTERN_HELP}.",
)
_CASES = shared_flags.define_patterns(
  "cases",
  None,
  "PATTERN:LENGTH,... to time only these, instead of all --patterns at all"
  " --seq_lens.",
)
_IMPLEMENTATIONS = flags.DEFINE_list(
  "implementations",
  None,
  f"Any of {', '.join(dispatch.IMPLEMENTATIONS)}; by default the best.",
)
_PEERS = flags.DEFINE_list(
  "peers",
  None,
  f"Any of {', '.join(PEERS)}; by default all on a GPU, jax.nn on a CPU.",
)
_MAX_PEER_LEN = flags.DEFINE_integer(
  "max_peer_len", 32768, "Longest sequence that peers are timed at."
)
_DTYPES = flags.DEFINE_list(
  "dtypes", ["float32"], "Any of float32, bfloat16, float16."
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 1, "Sequences.", lower_bound=1, upper_bound=1 << 20
)
_NUM_HEADS = flags.DEFINE_integer(
  "num_heads", 8, "Query heads.", lower_bound=1, upper_bound=4096
)
_NUM_KV_HEADS = flags.DEFINE_integer(
  "num_kv_heads",
  None,
  "Key and value heads; by default as many as query heads.",
  lower_bound=1,
  upper_bound=4096,
)
_HEAD_DIM = flags.DEFINE_integer(
  "head_dim", 64, "Width of a head.", lower_bound=1, upper_bound=1 << 16
)
_REPEATS = flags.DEFINE_integer(
  "repeats", 5, "Rounds per case.", lower_bound=1, upper_bound=10_000
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.")
_PLOT = flags.DEFINE_string(
  "plot", None, "Plot of time against length, a .png."
)
_TUNE = flags.DEFINE_boolean(
  "tune",
  False,
  "Find the best kernel sizes for the cases instead of timing them.",
)
_SIZES_OUTPUT = flags.DEFINE_string(
  "sizes_output",
  str(block_sizes.SIZES_PATH),
  "Table into which --tune writes the sizes it finds; other entries stay.",
)


def _print_row(row: dict[str, Any]) -> None:
  for part in PARTS if "skipped" not in row else ():
    values = row[part]
    cells = [
      f"{row['seq_len']:>8,}  {row['pattern']:<26} {row['implementation']:<15}",
      f"{part.replace('_', '+'):<17}",
    ]
    if "median_ms" in values:
      cells.append(
        f"{values['median_ms']:>9.3f} ({values['least_ms']:.3f} to"
        f" {values['most_ms']:.3f})"
      )
    if "tflops" in values:
      cells.append(f"{values['tflops']:>8.3f} {values['matmul_share']:>4.0%}")
    if values["temporary_mib"] is not None:
      cells.append(f"{values['temporary_mib']:>9.1f} MiB")
    if "single_call_ms" in values:
      cells.append(f"{values['single_call_ms']:>9.3f} a single call")
    cells += [f"{r:.2f}x {n}" for n, r in values.get("ratios", {}).items()]
    print(" ".join(cells), flush=True)
  if "backward" in row:
    values = row["backward"]
    rate = f", {values['tflops']:.3f} TFLOP/s" if "tflops" in values else ""
    print(f"{'':>12}the backward pass alone: {values['median_ms']:.3f}{rate}")


def _draw(rows: list[dict[str, Any]], title: str, path: str) -> None:
  """Draws time against length, one line per contestant and pattern."""
  panels: dict[str, dict[str, list[tuple[int, float]]]] = {
    part: {} for part in PARTS
  }
  for row in rows:
    if "median_ms" not in row.get("forward", {}):
      continue
    label = f"{row['implementation']}, {row['dtype']}"
    if row["implementation"] not in (DENSE, "SDPA dense", "LongLoRA S2"):
      label = f"{row['pattern']}, {label}"
    for part, lines in panels.items():
      lines.setdefault(label, []).append(
        (row["seq_len"], row[part]["median_ms"])
      )
  plot.draw(
    path,
    title,
    [
      plot.Panel(
        lines,
        label="milliseconds",
        title=part.replace("_", " and "),
        logarithmic=True,
      )
      for part, lines in panels.items()
    ],
  )


def _case(name: str, seq_len: int, dtype: str) -> Case:
  num_kv_heads = _NUM_KV_HEADS.value or _NUM_HEADS.value
  (pattern,) = patterns.parse(
    name,
    num_heads=_NUM_HEADS.value,
    num_kv_heads=num_kv_heads,
    num_layers=1,
    seq_len=seq_len,
  )
  case = Case(
    name=name,
    pattern=pattern,
    seq_len=seq_len,
    dtype=dtype,
    batch_size=_BATCH_SIZE.value,
    num_kv_heads=num_kv_heads,
    head_dim=_HEAD_DIM.value,
  )
  # Inputs and their gradients.
  needed = 2 * sum(map(math.prod, case.shapes)) * jnp.dtype(dtype).itemsize
  there = memory.of_this_machine()
  if needed > there:
    raise ValueError(
      f"{seq_len:,} tokens take at least {needed >> 30:,} GiB, but this machine"
      f" has {there >> 30}: take fewer tokens, heads or sequences."
    )
  return case


def _cases(dtype: str) -> list[Case]:
  if _CASES.value is None:
    return [
      _case(name, seq_len, dtype)
      for seq_len in _SEQ_LENS.value
      for name in _PATTERNS.value
    ]
  cases = []
  for text in _CASES.value:
    name, _, length = text.rpartition(":")
    if not length.isdecimal() or int(length) < 1:
      raise ValueError(f"--cases must be PATTERN:LENGTH,..., got {text!r}.")
    cases.append(_case(name, int(length), dtype))
  return cases


def _choose_peers() -> list[str]:
  default = PEERS if clock.on_gpu() else ("jax.nn",)
  return peers.choose(
    default if _PEERS.value is None else _PEERS.value,
    PEERS,
    of_torch=attention_peers.LABELS,
    problem=attention_peers.problem,
  )


def _tune(implementations: Sequence[str]) -> None:
  for name in implementations:
    if not tune.can_tune(name):
      raise ValueError(
        f"--tune is for implementations whose kernels have sizes, not {name}."
      )
    for dtype in _DTYPES.value:
      tune.tune(
        _cases(dtype),
        name,
        repeats=_REPEATS.value,
        output=pathlib.Path(_SIZES_OUTPUT.value),
      )


def main() -> None:
  """Measures, prints a table and writes JSON, or tunes.

  Raises:
    ValueError: A flag is out of range, or an implementation is wrong.
    NotImplementedError: The device lacks a requested implementation.
  """
  for path in (_OUTPUT.value, _PLOT.value):
    if path is not None:
      atomic_file.check_writable(path)
  for dtype in _DTYPES.value:
    if dtype not in attention_timing.TOLERANCE:
      raise ValueError(
        f"unknown dtype {dtype!r}: use any of"
        f" {', '.join(attention_timing.TOLERANCE)}."
      )
  memory_lens = _MEMORY_LENS.value
  if memory_lens is None:
    memory_lens = () if clock.on_gpu() else (8192, 16384)
  cases = [case for dtype in _DTYPES.value for case in _cases(dtype)]
  memory_cases = [
    _case(name, seq_len, dtype)
    for seq_len in memory_lens
    for name in dict.fromkeys(case.name for case in cases)
    for dtype in _DTYPES.value
  ]
  implementations = _IMPLEMENTATIONS.value or [dispatch.available()[0]]
  for name in implementations:
    dispatch.check_implementation(name)
  if _TUNE.value:
    _tune(implementations)
    return
  chosen = _choose_peers()
  uses_torch = any(name in attention_peers.LABELS for name in chosen)
  facts = {
    "device": jax.devices()[0].device_kind,
    "machine": platform.machine(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "torch": attention_peers.version() if uses_torch else None,
    "batch_size": _BATCH_SIZE.value,
    "num_heads": _NUM_HEADS.value,
    "num_kv_heads": _NUM_KV_HEADS.value or _NUM_HEADS.value,
    "head_dim": _HEAD_DIM.value,
    "repeats": _REPEATS.value,
  }
  title = (
    f"{facts['device']}, Python {facts['python']}, jax {facts['jax']}"
    + (f", torch {facts['torch']}" if uses_torch else "")
    + f", batch {facts['batch_size']}, {facts['num_heads']} heads of"
    f" {facts['head_dim']}"
  )
  print(
    f"{title}: median of {facts['repeats']} (least to most) in milliseconds,"
    " useful TFLOP/s, share of the rate of a matrix product, temporary memory,"
    " times faster than"
  )
  matmul = {dtype: clock.matmul_tflops(dtype) for dtype in _DTYPES.value}
  for dtype, rate in matmul.items():
    print(f"matrix product, {dtype}: {rate:.3f} TFLOP/s")
  rows = []
  for case in cases:
    of_case = attention_timing.measure(
      case,
      implementations,
      chosen if case.seq_len <= _MAX_PEER_LEN.value else (),
      repeats=_REPEATS.value,
      matmul_tflops=matmul[case.dtype],
    )
    for row in of_case:
      _print_row(row)
    rows += of_case
    if uses_torch:
      attention_peers.release()
  print("outputs and gradients agree with the reference")
  for case in memory_cases:
    for name in implementations:
      rows.append(attention_timing.measure_memory(case, name))
      _print_row(rows[-1])
  if _PLOT.value is not None:
    _draw(rows, title, _PLOT.value)
  if _OUTPUT.value is not None:
    atomic_file.write_json(
      _OUTPUT.value, facts | {"matmul_tflops": matmul, "rows": rows}
    )
    print(f"wrote {_OUTPUT.value}")


if __name__ == "__main__":
  cli.run(main)
