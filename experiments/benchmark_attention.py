"""Measures attention: correctness first, then time and memory beside peers.

    python -m experiments.benchmark_attention --output=benchmark.json

Output and gradients are compared with the reference; what is wrong is not
timed. Then everything of one length and dtype, peers included, is timed in
rounds, forward and forward with backward: a chip's clock falls as it warms, so
ratios come from the same rounds. By default: 4,096 tokens, 8 heads of 64,
chunks of 512, float32; on a CPU also memory alone, by compiling, at twice and
four times the length.

`--tune` times the kernels' tile sizes instead and writes the best to the table
that the package reads.
"""

import os

# Before jax starts: PyTorch, in this process too, needs memory of the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import io
import json
import math
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import scca_jax
from experiments import attention_peers, cli
from scca_jax import dispatch, files, patterns
from scca_jax.backends import blocks

_SEQ_LENS = flags.DEFINE_list("seq_lens", ["4096"], "Lengths to time.")
_MEMORY_LENS = flags.DEFINE_list(
  "memory_lens",
  None,
  "Lengths to compile for their memory; by default 8192 and 16384 on a CPU.",
)
_PATTERNS = flags.DEFINE_list(
  "patterns", ["scca_fixed"], f"Any of {', '.join(patterns.NAMES)}."
)
_CASES = flags.DEFINE_list(
  "cases", None, "PATTERN:LENGTH, in place of all --patterns at all --seq_lens."
)
_IMPLEMENTATIONS = flags.DEFINE_list(
  "implementations",
  None,
  f"Any of {', '.join(dispatch.IMPLEMENTATIONS)}; by default the device's best"
  " and xla.",
)
_DENSE = "jax.nn"
_PEER_LABELS = {_DENSE: "jax.nn dense", "xla": "xla"} | attention_peers.LABELS
_PEERS = flags.DEFINE_list(
  "peers",
  ["auto"],
  f"Any of {', '.join(_PEER_LABELS)}; by default all on a GPU, jax.nn on a CPU.",
)
_MAX_PEER_LEN = flags.DEFINE_integer(
  "max_peer_len", 32768, "Length above which no peer is timed."
)
_DTYPES = flags.DEFINE_list("dtypes", ["float32"], "Of the inputs.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Sequences.")
_NUM_HEADS = flags.DEFINE_integer("num_heads", 8, "Query heads.")
_NUM_KV_HEADS = flags.DEFINE_integer(
  "num_kv_heads", None, "Key and value heads; by default as query heads."
)
_HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "Width of a head.")
_CHUNK_SIZE = flags.DEFINE_integer(
  "chunk_size", 512, "Tokens; also the window of patterns that have one."
)
_DILATION = flags.DEFINE_integer(
  "dilation", 4, "Tokens between keys (sda, dna, dilated)."
)
_REPEATS = flags.DEFINE_integer(
  "repeats", None, "Timed rounds; by default 9 on a GPU, 5 on a CPU."
)
_CHECK_LEN = flags.DEFINE_integer(
  "check_len",
  1024,
  "Length at which the reference, whole masks, is compared with, at most; there"
  " a chunk is at most a quarter of it.",
)
_OUTPUT = flags.DEFINE_string("output", None, "Where to write JSON.")
_PLOT = flags.DEFINE_string("plot", None, "Where to draw time against length.")
_TUNE = flags.DEFINE_boolean("tune", False, "Time tile sizes instead.")
_SIZES_OUTPUT = flags.DEFINE_string(
  "sizes_output", str(blocks.SIZES_PATH), "Where --tune puts the best sizes."
)

_DTYPE_NAMES = ("float32", "bfloat16", "float16")
# Beyond twice the dtype's own error, of the largest value.
_TOLERANCE = 2e-5
# How far tile sizes may be from others, of the largest value.
_SIZES_TOLERANCE = {"float32": 4e-5, "bfloat16": 2e-2, "float16": 4e-3}
_TUNED = ("mosaic", "triton")
# On a GPU a timed sample lasts so long: many calls in a row, as in training.
_SAMPLE_MS = 30.0
_MAX_CALLS = 300
# 4 head_dim flops a seen pair forward (two products), 3.5 times that in all.
_PARTS = {"forward": 1.0, "forward_backward": 3.5}

_Case = tuple[str, int]


# Inputs.


def _shapes(seq_len: int) -> list[tuple[int, int, int, int]]:
  kv_heads = _NUM_KV_HEADS.value or _NUM_HEADS.value
  return [
    (_BATCH_SIZE.value, seq_len, heads, _HEAD_DIM.value)
    for heads in (_NUM_HEADS.value, kv_heads, kv_heads)
  ]


@functools.lru_cache(maxsize=1)
def _inputs(seq_len: int, dtype: str) -> list[jax.Array]:
  """Returns query, key, value and the gradient of the output."""
  shapes = _shapes(seq_len)
  keys = jax.random.split(jax.random.key(0), 4)
  return [
    jax.random.normal(key, shape, jnp.dtype(dtype))
    for key, shape in zip(keys, (*shapes, shapes[0]), strict=True)
  ]


def _make_pattern(
  name: str, seq_len: int, chunk_size: int | None = None
) -> patterns.AttentionPattern:
  chunk_size = chunk_size or _CHUNK_SIZE.value
  settings = {}
  if name not in ("dense", "sliding", "dna", "sda"):
    settings["chunk_size"] = chunk_size
  if name in ("sliding", "dna"):
    settings["window"] = chunk_size
  if name in ("sda", "dna", "dilated"):
    settings["dilation"] = _DILATION.value
  return patterns.make(
    name, num_heads=_NUM_HEADS.value, seq_len=seq_len, **settings
  )


def _dense(dtype: str) -> Callable[..., jax.Array]:
  # Elsewhere the whole mask is held, as it is by default.
  fused = jax.default_backend() == "gpu" and dtype != "float32"
  return functools.partial(
    jax.nn.dot_product_attention,
    is_causal=True,
    implementation="cudnn" if fused else None,
  )


def _ours(
  implementation: str, pattern: patterns.AttentionPattern
) -> Callable[..., jax.Array]:
  return functools.partial(
    scca_jax.attention, pattern=pattern, implementation=implementation
  )


def _with_backward(function: Callable[..., jax.Array]) -> Callable[..., Any]:
  def run(query, key, value, d_output):
    output, pull = jax.vjp(function, query, key, value)
    return output, *pull(d_output)

  return run


# Correctness.


class _Checks:
  """Compares implementations with the reference, each once."""

  def __init__(self, seq_len: int):
    """Remembers the length to check at."""
    self._seq_len = seq_len

  def _pattern(self, name: str) -> patterns.AttentionPattern:
    # Some borders of chunks must lie in the sequence.
    chunk_size = min(_CHUNK_SIZE.value, max(1, self._seq_len // 4))
    return _make_pattern(name, self._seq_len, chunk_size)

  def _run(
    self, name: str, implementation: str, inputs: list[jax.Array]
  ) -> list[np.ndarray]:
    function = _ours(implementation, self._pattern(name))
    results = jax.jit(_with_backward(function))(*inputs)
    return [np.asarray(x, np.float32) for x in results]

  @functools.cache  # noqa: B019 (lives as long as the command)
  def _truth(
    self, name: str, dtype: str
  ) -> tuple[list[np.ndarray], list[float]]:
    """Returns the results in float32 and the errors that are allowed."""
    inputs = _inputs(self._seq_len, dtype)
    wide = [x.astype(jnp.float32) for x in inputs]
    truth = rounded = self._run(name, "reference", wide)
    if dtype != "float32":
      rounded = self._run(name, "reference", inputs)
    return truth, [
      2 * float(np.max(np.abs(a - b))) + _TOLERANCE * float(np.max(np.abs(b)))
      for a, b in zip(rounded, truth, strict=True)
    ]

  def check(self, name: str, implementation: str, dtype: str) -> None:
    """Compares output and gradients with the reference in float32.

    Raises:
      ValueError: They differ by more than twice what dense attention in the
        dtype does.
      NotImplementedError: The implementation cannot serve the pattern.
    """
    inputs = _inputs(self._seq_len, dtype)
    found = self._run(name, implementation, inputs)
    truth, allowed = self._truth(name, dtype)
    labels = ("output", "gradient of query", "of key", "of value")
    for label, a, b, most in zip(labels, found, truth, allowed, strict=True):
      error = float(np.max(np.abs(a - b)))
      if not error <= most:
        raise ValueError(
          f"{implementation} is wrong for {name} at {self._seq_len} tokens of"
          f" {dtype}, so it is not timed: {label} differs from the reference by"
          f" {error:.1e}, and {most:.1e} is allowed."
        )


# Time.


@dataclasses.dataclass
class _Run:
  """Something to time.

  Attributes:
    start: Starts a call; returns what to wait for.
    wait: Waits for it.
    calls: Calls in a sample.
    times: Milliseconds of a call, a sample each.
  """

  start: Callable[[], Any]
  wait: Callable[[Any], Any] = jax.block_until_ready
  calls: int = 1
  times: list[float] = dataclasses.field(default_factory=list)

  def _sample(self) -> float:
    began = time.perf_counter()
    for _ in range(self.calls):
      result = self.start()
    self.wait(result)
    return 1e3 * (time.perf_counter() - began) / self.calls

  def warm_up(self) -> None:
    """Calls it twice; on a GPU chooses the number of calls in a sample."""
    once = [self._sample() for _ in range(2)][-1]
    if jax.default_backend() == "gpu":
      self.calls = min(_MAX_CALLS, max(1, math.ceil(_SAMPLE_MS / once)))

  def time(self) -> None:
    """Takes one more sample."""
    self.times.append(self._sample())

  @property
  def median(self) -> float:
    """The median of the samples, in milliseconds."""
    return statistics.median(self.times)


@dataclasses.dataclass
class _Entry:
  """A row of the results with what it takes to fill it.

  Attributes:
    row: As it is written. `skipped` says why there are no numbers.
    function: Of JAX; None for a peer that `make` returns.
    make: Returns a peer of PyTorch.
    runs: What is timed, by part.
  """

  row: dict[str, Any]
  function: Callable[..., Any] | None = None
  make: Callable[[], attention_peers.Peer] | None = None
  runs: dict[str, _Run] = dataclasses.field(default_factory=dict)

  @contextlib.contextmanager
  def may_fail(self) -> Iterator[None]:
    """Turns what an implementation or a peer cannot do into a line.

    Anything may go wrong in a peer, and costs only its row.
    """
    expected: tuple[type[Exception], ...] = (Exception,)
    if self.function is not None and self.make is None:
      expected = (NotImplementedError, jax.errors.JaxRuntimeError)
    try:
      yield
    except expected as error:
      self.skip(error)

  def skip(self, error: Exception) -> None:
    """Says and remembers why there are no numbers."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    self.row["skipped"] = reason
    self.runs.clear()
    print(
      f"{self.row['implementation']} cannot serve {self.row['pattern']}"
      f" ({self.row['seq_len']} tokens, {self.row['dtype']}): {reason}",
      flush=True,
    )

  def prepare(self) -> None:
    """Makes the runs of a peer of PyTorch, and measures their memory."""
    if self.make is None or "skipped" in self.row:
      return
    with self.may_fail():
      peer = self.make()
      for part in _PARTS:
        start = getattr(peer, part)
        self.row[part] = {"temporary_mib": peer.temporary_mib(start)}
        self.runs[part] = _Run(start, peer.wait)


def _compile(entries: list[_Entry], seq_len: int, dtype: str) -> None:
  """Compiles what is JAX's, several at a time, and notes its memory."""
  shapes = _shapes(seq_len)
  types = [
    jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    for shape in (*shapes, shapes[0])
  ]
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    jobs = []
    for entry in entries:
      if entry.function is None or "skipped" in entry.row:
        continue
      with entry.may_fail():
        parts = zip(
          _PARTS,
          (entry.function, _with_backward(entry.function)),
          (types[:3], types),
          strict=True,
        )
        for part, function, arguments in parts:
          lowered = jax.jit(function).lower(*arguments)
          jobs.append((entry, part, pool.submit(lowered.compile)))
    for entry, part, job in jobs:
      with entry.may_fail():
        compiled = job.result()
        if "skipped" in entry.row:
          continue
        memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
        entry.row[part] = {"temporary_mib": memory}
        count = len(types) if part == "forward_backward" else 3
        # Inputs are looked up when it starts: entries that are not timed need
        # none.
        entry.runs[part] = _Run(
          lambda compiled=compiled, count=count: compiled(
            *_inputs(seq_len, dtype)[:count]
          )
        )


def _num_repeats() -> int:
  if _REPEATS.value is not None:
    return _REPEATS.value
  return 9 if jax.default_backend() == "gpu" else 5


def _time(entries: list[_Entry]) -> None:
  """Times entries in turns: each round has a sample of all."""
  for entry in entries:
    with entry.may_fail():
      for run in entry.runs.values():
        run.warm_up()
  for _ in range(_num_repeats()):
    for part in _PARTS:
      for entry in entries:
        if part in entry.runs:
          with entry.may_fail():
            entry.runs[part].time()
  for entry in entries:
    for part, run in entry.runs.items():
      entry.row[part] |= {
        "median_ms": run.median,
        "least_ms": min(run.times),
        "most_ms": max(run.times),
      }


@functools.cache
def _matmul_tflops(dtype: str) -> float:
  """Returns the rate of a large product, which attention cannot exceed."""
  size = 8192 if jax.default_backend() == "gpu" else 1024
  a, b = (
    jax.random.normal(key, (size, size), jnp.dtype(dtype))
    for key in jax.random.split(jax.random.key(1))
  )
  dot = jax.jit(jnp.dot)
  run = _Run(lambda: dot(a, b))
  run.warm_up()
  for _ in range(_num_repeats()):
    run.time()
  return 2e-9 * size**3 / run.median


# Rows.


def _peer_entries(
  peers: list[str], names: list[str], seq_len: int, dtype: str
) -> list[_Entry]:
  """Returns the peers of one length, other than `xla`.

  Dense peers and S2 are there once, flex_attention once a pattern.
  """
  num_heads = _NUM_HEADS.value
  dense = patterns.dense(num_heads)
  s2 = patterns.s2(num_heads, _CHUNK_SIZE.value, causality="slot")
  entries = []
  for peer in peers:
    if peer == "xla":
      continue
    seen = {name: _make_pattern(name, seq_len) for name in names}
    if peer != "flex":
      seen = {"s2": s2} if peer == "longlora_s2" else {"dense": dense}
    for name, pattern in seen.items():
      row = _row(name, seq_len, dtype, _PEER_LABELS[peer], pattern)
      if peer == _DENSE:
        entry = _Entry(row, _dense(dtype))
      else:
        on_gpu = jax.default_backend() == "gpu"
        make = functools.partial(
          attention_peers.make,
          peer,
          pattern,
          shapes=_shapes(seq_len),
          chunk_size=_CHUNK_SIZE.value,
          dtype=dtype,
          device="cuda" if on_gpu else "cpu",
        )
        entry = _Entry(row, make=make)
      entries.append(entry)
  return entries


def _row(
  name: str,
  seq_len: int,
  dtype: str,
  implementation: str,
  pattern: patterns.AttentionPattern,
) -> dict[str, Any]:
  return {
    "seq_len": seq_len,
    "pattern": name,
    "implementation": implementation,
    "dtype": dtype,
    "num_pairs": _BATCH_SIZE.value * pattern.num_pairs(seq_len),
  }


def _own_entries(
  implementations: list[str], names: list[str], seq_len: int, dtype: str
) -> list[_Entry]:
  entries = []
  for name in names:
    pattern = _make_pattern(name, seq_len)
    for implementation in implementations:
      row = _row(name, seq_len, dtype, implementation, pattern)
      entries.append(_Entry(row, _ours(implementation, pattern)))
  return entries


def _derive(rows: list[dict[str, Any]], peers: list[str]) -> None:
  """Adds rates, and ratios to the peers, to the rows of one length."""
  for part, factor in _PARTS.items():
    timed = [row for row in rows if "skipped" not in row]
    for row in timed:
      own = row[part]
      flops = 4 * factor * _HEAD_DIM.value * row["num_pairs"]
      own["gflops"] = 1e-6 * flops / own["median_ms"]
      own["matmul_share"] = 1e-3 * own["gflops"] / _matmul_tflops(row["dtype"])
    for row in timed:
      if row["implementation"] not in dispatch.IMPLEMENTATIONS:
        continue
      own = row[part]
      own["speed_ratios"] = {}
      for label in (_PEER_LABELS[peer] for peer in peers):
        for other in timed:
          # Those of LongLoRA and dense attention have a pattern of their own.
          if other["implementation"] != label or other is row:
            continue
          if label in ("xla", _PEER_LABELS["flex"]) and (
            other["pattern"] != row["pattern"]
          ):
            continue
          ratio = other[part]["median_ms"] / own["median_ms"]
          own["speed_ratios"][label] = ratio
          if label == _PEER_LABELS[_DENSE]:
            own["speed_ratio"] = ratio
            own["memory_ratio"] = own["temporary_mib"] / max(
              other[part]["temporary_mib"], 2**-20
            )


_COLUMNS = (
  ("tokens", 8),
  ("dtype", 9),
  ("pattern", 11),
  ("implementation", 15),
  ("pass", 8),
  ("ms", 10),
  ("least", 10),
  ("most", 10),
  ("TFLOP/s", 9),
  ("matmul", 7),
  ("MiB", 9),
)


def _print_cells(cells: list[str], peers: list[str]) -> None:
  columns = [*_COLUMNS, *((f"/ {peer}", len(peer) + 3) for peer in peers)]
  line = "  ".join(
    f"{cell:<{width}}" if name in ("dtype", "pattern", "implementation", "pass")
    else f"{cell:>{width}}"
    for cell, (name, width) in zip(cells, columns, strict=True)
  )
  print(line.rstrip(), flush=True)


def _print_row(row: dict[str, Any], peers: list[str]) -> None:
  for part, short in zip(_PARTS, ("fwd", "fwd+bwd"), strict=True):
    if part not in row or "skipped" in row:
      continue
    values = row[part]

    def cell(name: str, form: str, values: dict[str, Any] = values) -> str:
      return format(values[name], form) if values.get(name) is not None else ""

    ratios = values.get("speed_ratios", {})
    _print_cells(
      [
        f"{row['seq_len']:,}",
        row["dtype"],
        row["pattern"],
        row["implementation"],
        short,
        *(cell(name, ".3f") for name in ("median_ms", "least_ms", "most_ms")),
        f"{1e-3 * values['gflops']:.3g}" if "gflops" in values else "",
        cell("matmul_share", ".1%"),
        cell("temporary_mib", ",.1f"),
        *(
          f"{ratios[label]:.2f}x" if label in ratios else ""
          for label in (_PEER_LABELS[peer] for peer in peers)
        ),
      ],
      peers,
    )
