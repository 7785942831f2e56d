"""Measures attention: correctness first, then time and memory beside a peer.

    python -m experiments.benchmark_attention --output=benchmark.json

The peer is `jax.nn.dot_product_attention` with `is_causal`, dense attention as
JAX users have it. A case is forward, or forward and backward (the gradients of
query, key and value). By default: 4,096 tokens, 8 heads of 64, chunks of 512,
float32; and memory alone, by compiling, at twice and four times the length.
"""

import functools
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import scca_jax
from experiments import cli
from scca_jax import dispatch, patterns

_SEQ_LENS = flags.DEFINE_list("seq_lens", ["4096"], "Lengths to time.")
_MEMORY_LENS = flags.DEFINE_list(
  "memory_lens", ["8192", "16384"], "Lengths to compile for their memory."
)
_PATTERNS = flags.DEFINE_list(
  "patterns", ["scca_fixed"], f"Any of {', '.join(patterns.NAMES)}."
)
_IMPLEMENTATIONS = flags.DEFINE_list(
  "implementations", ["xla"], f"Any of {', '.join(dispatch.AVAILABLE)}."
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16", "float16"], "Of the inputs."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Sequences.")
_NUM_HEADS = flags.DEFINE_integer("num_heads", 8, "Query heads.")
_NUM_KV_HEADS = flags.DEFINE_integer(
  "num_kv_heads", None, "Key and value heads; by default as query heads."
)
_HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "Width of a head.")
_CHUNK_SIZE = flags.DEFINE_integer(
  "chunk_size", 512, "Tokens; also the window of patterns that have one."
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls of a case.")
_OUTPUT = flags.DEFINE_string("output", None, "Where to write JSON.")

# Correctness is checked at the shortest timed length, or at this one: the
# reference holds the whole mask.
_CHECKED_LEN = 1024
# Largest error relative to the largest value, by dtype: float32 as the
# implementations promise, the others a few of their roundings.
_TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2, "float16": 5e-3}
_PEER = "jax.nn dense"

_Function = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _shapes(seq_len: int) -> list[tuple[int, int, int, int]]:
  kv_heads = _NUM_KV_HEADS.value or _NUM_HEADS.value
  return [
    (_BATCH_SIZE.value, seq_len, heads, _HEAD_DIM.value)
    for heads in (_NUM_HEADS.value, kv_heads, kv_heads)
  ]


def _inputs(seq_len: int, dtype: Any) -> list[jax.Array]:
  keys = jax.random.split(jax.random.key(0), 3)
  return [
    jax.random.normal(key, shape, dtype)
    for key, shape in zip(keys, _shapes(seq_len), strict=True)
  ]


def _make_pattern(name: str, seq_len: int) -> patterns.AttentionPattern:
  settings = {"chunk_size": _CHUNK_SIZE.value} if _has_chunks(name) else {}
  if name in ("sliding", "dna"):
    settings = {"window": _CHUNK_SIZE.value}
  return patterns.make(
    name, num_heads=_NUM_HEADS.value, seq_len=seq_len, **settings
  )


def _has_chunks(name: str) -> bool:
  return name not in ("dense", "sliding", "dna", "sda")


def _with_backward(function: _Function) -> Callable[..., Any]:
  def run(query, key, value):
    output, pull = jax.vjp(function, query, key, value)
    return output, pull(jnp.ones_like(output))

  return run


def _compile(function: Callable[..., Any], seq_len: int) -> Any:
  dtype = jnp.dtype(_DTYPE.value)
  arguments = [jax.ShapeDtypeStruct(s, dtype) for s in _shapes(seq_len)]
  return jax.jit(function).lower(*arguments).compile()


def _temporary_mib(compiled: Any) -> float:
  return compiled.memory_analysis().temp_size_in_bytes / 2**20


def _milliseconds(compiled: Any, inputs: list[jax.Array]) -> list[float]:
  jax.block_until_ready(compiled(*inputs))
  times = []
  for _ in range(_REPEATS.value):
    started = time.perf_counter()
    jax.block_until_ready(compiled(*inputs))
    times.append(1e3 * (time.perf_counter() - started))
  return times


def _check(name: str, implementation: str, seq_len: int) -> None:
  """Compares output and gradients with the reference, in float32.

  Raises:
    ValueError: They differ by more than the tolerance of the dtype.
  """
  pattern = _make_pattern(name, seq_len)
  inputs = _inputs(seq_len, jnp.dtype(_DTYPE.value))

  def result(implementation: str, inputs: list[jax.Array]) -> list[np.ndarray]:
    function = functools.partial(
      scca_jax.attention, pattern=pattern, implementation=implementation
    )
    output, grads = jax.jit(_with_backward(function))(*inputs)
    return [np.asarray(x, np.float32) for x in (output, *grads)]

  found = result(implementation, inputs)
  truth = result("reference", [x.astype(jnp.float32) for x in inputs])
  labels = ("output", "gradient of query", "of key", "of value")
  for label, a, b in zip(labels, found, truth, strict=True):
    error = float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
    if not error <= _TOLERANCE[_DTYPE.value]:
      raise ValueError(
        f"{implementation} is wrong for {name} at {seq_len} tokens, so it is"
        f" not timed: {label} differs from the reference by {error:.1e} of its"
        " largest value."
      )


def _measure(function: _Function, seq_len: int, timed: bool) -> dict[str, Any]:
  """Returns time and temporary memory, forward and with the backward pass."""
  result: dict[str, Any] = {}
  for part, run in (
    ("forward", function),
    ("forward_backward", _with_backward(function)),
  ):
    compiled = _compile(run, seq_len)
    result[part] = {"temporary_mib": _temporary_mib(compiled)}
    if timed:
      times = _milliseconds(compiled, _inputs(seq_len, jnp.dtype(_DTYPE.value)))
      result[part] |= {
        "median_ms": statistics.median(times),
        "least_ms": min(times),
        "most_ms": max(times),
      }
  return result


def _lengths(flag: flags.FlagHolder) -> list[int]:
  try:
    lengths = [int(value) for value in flag.value]
  except ValueError as error:
    raise ValueError(
      f"--{flag.name} must be lengths in tokens: {error}."
    ) from error
  if any(length < 1 for length in lengths):
    raise ValueError(f"--{flag.name} must be at least 1, got {flag.value}.")
  return lengths


def _print_row(row: dict[str, Any]) -> None:
  for part in ("forward", "forward_backward"):
    values = row[part]
    cells = [
      f"{row['seq_len']:>8,}  {row['pattern']:<11} {row['implementation']:<13}",
      f"{part.replace('_', '+'):<17}",
    ]
    if "median_ms" in values:
      cells.append(
        f"{values['median_ms']:>10.1f} ({values['least_ms']:.1f} to"
        f" {values['most_ms']:.1f})"
      )
    if "gflops" in values:
      cells.append(f"{values['gflops']:>8.1f}")
    cells.append(f"{values['temporary_mib']:>10.1f} MiB")
    if "speed_ratio" in values:
      cells.append(
        f"{values['speed_ratio']:>8.1f}x faster,"
        f" {values['memory_ratio']:.1%} of the peer's memory"
      )
    print(" ".join(cells), flush=True)


def main() -> None:
  """Measures, prints a table and writes JSON.

  Raises:
    ValueError: A flag is out of range, or an implementation is wrong.
  """
  seq_lens, memory_lens = _lengths(_SEQ_LENS), _lengths(_MEMORY_LENS)
  if _REPEATS.value < 1:
    raise ValueError(f"--repeats must be at least 1, got {_REPEATS.value}.")
  for name in _PATTERNS.value:
    for seq_len in (*seq_lens, *memory_lens):
      _make_pattern(name, seq_len)
  for implementation in _IMPLEMENTATIONS.value:
    dispatch.check_implementation(implementation)
  device = jax.devices()[0].device_kind
  print(
    f"{device}, {platform.machine()}, Python {platform.python_version()}, jax"
    f" {jax.__version__}, {_DTYPE.value}, batch {_BATCH_SIZE.value},"
    f" {_NUM_HEADS.value} heads of {_HEAD_DIM.value}, median of"
    f" {_REPEATS.value} (least to most) in milliseconds, useful GFLOP/s,"
    " temporary memory"
  )
  for implementation in _IMPLEMENTATIONS.value:
    for name in _PATTERNS.value:
      _check(name, implementation, min([_CHECKED_LEN, *seq_lens]))
  print("outputs and gradients agree with the reference")
  dense = functools.partial(jax.nn.dot_product_attention, is_causal=True)
  rows = []
  for seq_len in seq_lens:
    peer = _measure(dense, seq_len, timed=True)
    rows.append(
      {"seq_len": seq_len, "pattern": "dense", "implementation": _PEER} | peer
    )
    _print_row(rows[-1])
    for name in _PATTERNS.value:
      pattern = _make_pattern(name, seq_len)
      pairs = _BATCH_SIZE.value * pattern.num_pairs(seq_len)
      for implementation in _IMPLEMENTATIONS.value:
        function = functools.partial(
          scca_jax.attention, pattern=pattern, implementation=implementation
        )
        row = {
          "seq_len": seq_len,
          "pattern": name,
          "implementation": implementation,
          "num_pairs": pairs,
        } | _measure(function, seq_len, timed=True)
        # 4 head_dim a pair forward (two products), 3.5 times that in all.
        for part, factor in (("forward", 1.0), ("forward_backward", 3.5)):
          own, other = row[part], peer[part]
          own["gflops"] = (
            4e-6 * factor * _HEAD_DIM.value * pairs / own["median_ms"]
          )
          own["speed_ratio"] = other["median_ms"] / own["median_ms"]
          own["memory_ratio"] = own["temporary_mib"] / other["temporary_mib"]
        rows.append(row)
        _print_row(row)
  for seq_len in memory_lens:
    for name in _PATTERNS.value:
      for implementation in _IMPLEMENTATIONS.value:
        function = functools.partial(
          scca_jax.attention,
          pattern=_make_pattern(name, seq_len),
          implementation=implementation,
        )
        rows.append(
          {
            "seq_len": seq_len,
            "pattern": name,
            "implementation": implementation,
          }
          | _measure(function, seq_len, timed=False)
        )
        _print_row(rows[-1])
  if _OUTPUT.value is not None:
    cli.write_json(
      _OUTPUT.value,
      {
        "device": device,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "dtype": _DTYPE.value,
        "batch_size": _BATCH_SIZE.value,
        "num_heads": _NUM_HEADS.value,
        "num_kv_heads": _NUM_KV_HEADS.value or _NUM_HEADS.value,
        "head_dim": _HEAD_DIM.value,
        "chunk_size": _CHUNK_SIZE.value,
        "repeats": _REPEATS.value,
        "rows": rows,
      },
    )
    print(f"wrote {_OUTPUT.value}")


if __name__ == "__main__":
  cli.run(main)
