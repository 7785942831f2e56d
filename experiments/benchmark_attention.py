"""Measures attention: correctness first, then time and memory beside peers.

    python -m experiments.benchmark_attention --output=benchmark.json

A case is a pattern at a length; forward, and forward with backward (the
gradients of query, key and value) are measured. Implementation and peers take
turns, round after round, so that ratios are of one heat of the chip. By
default, on a CPU: 4,096 tokens, 8 heads of 64, chunks of 512, float32, beside
`jax.nn.dot_product_attention`, dense; and memory alone, by compiling, at twice
and four times the length. On a GPU the peers are cuDNN's dense attention
(`jax.nn`), `xla` and, where PyTorch is installed, flex_attention with the same
mask, dense SDPA, and LongLoRA's S2 as its users run it.

`--tune` looks for the best sizes of the kernels instead. The module is long
because it shares the cases, the check and the clock.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

# PyTorch needs room on the GPU beside jax, which would take most of it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import scca_jax
from experiments.shared import cli
from experiments.timing import attention_peers
from scca_jax import dispatch, patterns, target
from scca_jax.backends import blocks

_SEQ_LENS = flags.DEFINE_list("seq_lens", ["4096"], "Lengths to time.")
_MEMORY_LENS = flags.DEFINE_list(
  "memory_lens",
  None,
  "Lengths to compile for their memory; by default 8192,16384 on a CPU.",
)
_PATTERNS = flags.DEFINE_list(
  "patterns", ["scca_fixed"], f"Any of {', '.join(patterns.NAMES)}."
)
_CASES = flags.DEFINE_list(
  "cases",
  None,
  "PATTERN:LENGTH,... to time just these, in place of all --patterns at all"
  " --seq_lens.",
)
_IMPLEMENTATIONS = flags.DEFINE_list(
  "implementations",
  None,
  f"Any of {', '.join(dispatch.IMPLEMENTATIONS)}; by default the best.",
)
_PEER_NAMES = ("jax.nn", "xla", *attention_peers.LABELS)
_PEERS = flags.DEFINE_list(
  "peers",
  None,
  f"Any of {', '.join(_PEER_NAMES)}; by default all on a GPU, jax.nn on a CPU.",
)
_MAX_PEER_LEN = flags.DEFINE_integer(
  "max_peer_len", 32768, "Longest sequence that peers are timed at."
)
_DTYPES = flags.DEFINE_list(
  "dtypes", ["float32"], "Any of float32, bfloat16, float16."
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
_DILATION = flags.DEFINE_integer(
  "dilation", 4, "Of the patterns that have one."
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Rounds of a case.")
_OUTPUT = flags.DEFINE_string("output", None, "Where to write JSON.")
_PLOT = flags.DEFINE_string(
  "plot", None, "Where to draw time against length, a .png."
)
_TUNE = flags.DEFINE_boolean(
  "tune", False, "Find the best sizes of mosaic or triton for the cases."
)
_SIZES_OUTPUT = flags.DEFINE_string(
  "sizes_output",
  str(blocks.SIZES_PATH),
  "Where --tune writes what it finds, beside what is there.",
)

# Correctness is checked at most at this length: the reference holds the whole
# mask. The pattern has as many chunks as at the length that is timed.
_CHECKED_LEN = 1024
# Largest error in the 2-norm, relative to the truth, by dtype.
_TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
_DENSE = "jax.nn dense"
_PARTS = ("forward", "forward_backward")
# Two products a pair forward, seven in all, of 2 head_dim operations each.
_WORK = {"forward": 4.0, "forward_backward": 14.0}
# A sample lasts at least as long on a GPU, whose calls are asynchronous.
_SAMPLE_SECONDS = 0.03

_Function = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class _Case:
  """A pattern at a length, in a dtype."""

  name: str
  seq_len: int
  dtype: str

  @property
  def pattern(self) -> patterns.AttentionPattern:
    """The pattern."""
    return _make_pattern(self.name, self.seq_len, _CHUNK_SIZE.value)

  @property
  def shapes(self) -> list[tuple[int, int, int, int]]:
    """Shapes of query, key and value."""
    return _shapes(self.seq_len)

  def row(self, implementation: str) -> dict[str, Any]:
    """Returns the begin of a row of results."""
    return {
      "seq_len": self.seq_len,
      "dtype": self.dtype,
      "pattern": self.name,
      "implementation": implementation,
    }


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
    jax.random.normal(key, shape, jnp.float32).astype(dtype)
    for key, shape in zip(keys, (*shapes, shapes[0]), strict=True)
  ]


def _make_pattern(
  name: str, seq_len: int, chunk_size: int
) -> patterns.AttentionPattern:
  settings = {}
  if name in ("sliding", "dna"):
    settings["window"] = chunk_size
  elif name not in ("dense", "sda"):
    settings["chunk_size"] = chunk_size
  if name in ("sda", "dna", "dilated"):
    settings["dilation"] = _DILATION.value
  return patterns.make(
    name, num_heads=_NUM_HEADS.value, seq_len=seq_len, **settings
  )


def _on_gpu() -> bool:
  return target.current().platform == "gpu"


def _attend(
  pattern: patterns.AttentionPattern, implementation: str
) -> _Function:
  return functools.partial(
    scca_jax.attention, pattern=pattern, implementation=implementation
  )


def _with_backward(function: _Function) -> Callable[..., Any]:
  def run(query, key, value, d_output):
    output, pull = jax.vjp(function, query, key, value)
    return output, pull(d_output)

  return run


class _JaxRun:
  """A function of jax, compiled, with its inputs."""

  def __init__(
    self,
    function: _Function,
    seq_len: int,
    dtype: str,
    parts: Sequence[str] = _PARTS,
  ):
    """Compiles the parts; nothing is run."""
    query, *rest = [jax.ShapeDtypeStruct(s, dtype) for s in _shapes(seq_len)]
    self._where = seq_len, dtype
    lowered = {
      "forward": lambda: jax.jit(function).lower(query, *rest),
      "forward_backward": lambda: jax.jit(_with_backward(function)).lower(
        query, *rest, query
      ),
    }
    self._compiled = {part: lowered[part]().compile() for part in parts}

  def forward(self) -> Any:
    """Starts the forward pass."""
    return self._compiled["forward"](*_inputs(*self._where)[:3])

  def forward_backward(self) -> Any:
    """Starts both passes."""
    return self._compiled["forward_backward"](*_inputs(*self._where))

  def wait(self, result: Any) -> None:
    """Waits for what was started last, and so for all before."""
    jax.block_until_ready(result)

  def part_temporary_mib(self, part: str) -> float:
    """Returns what the compiler allocates beside inputs and outputs."""
    analysis: Any = self._compiled[part].memory_analysis()
    return analysis.temp_size_in_bytes / 2**20


def _temporary_mib(run: Any, part: str) -> float | None:
  if isinstance(run, _JaxRun):
    return run.part_temporary_mib(part)
  return run.temporary_mib(getattr(run, part))


def _time(runs: dict[str, Any], part: str) -> dict[str, list[float]]:
  """Returns the milliseconds of each contestant in each round."""

  def sample(run: Any, calls: int) -> float:
    start = getattr(run, part)
    result = None
    started = time.perf_counter()
    for _ in range(calls):
      result = start()
    run.wait(result)
    return (time.perf_counter() - started) / calls

  calls = {}
  for name, run in runs.items():
    sample(run, 1)
    calls[name] = 1
    if _on_gpu():
      calls[name] = max(1, round(_SAMPLE_SECONDS / sample(run, 2)))
  times: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(_REPEATS.value):
    for name, run in runs.items():
      times[name].append(1e3 * sample(run, calls[name]))
  return times


def _matmul_tflops(dtype: str) -> float:
  """Returns the rate of one large square product, in TFLOP/s."""
  n = 8192 if _on_gpu() else 1024
  a, b = (
    jax.random.normal(key, (n, n), jnp.float32).astype(dtype)
    for key in jax.random.split(jax.random.key(1))
  )

  class Product:
    def forward(self):
      return multiply(a, b)

    def wait(self, result):
      jax.block_until_ready(result)

  multiply = jax.jit(jnp.dot)
  (times,) = _time({"": Product()}, "forward").values()
  return 2e-9 * n**3 / statistics.median(times)


def _check(case: _Case, implementation: str, sizes: Any = None) -> None:
  """Compares output and gradients with the reference, in float32.

  Raises:
    ValueError: They differ by more than the tolerance of the dtype.
    NotImplementedError: The implementation cannot serve the case.
  """
  seq_len = min(_CHECKED_LEN, case.seq_len)
  chunk_size = max(1, _CHUNK_SIZE.value * seq_len // case.seq_len)
  pattern = _make_pattern(case.name, seq_len, chunk_size)
  inputs = _inputs(seq_len, case.dtype)

  def result(function: _Function, inputs: list[jax.Array]) -> list[np.ndarray]:
    output, grads = jax.jit(_with_backward(function))(*inputs)
    return [np.asarray(x, np.float64) for x in (output, *grads)]

  attend = _attend(pattern, implementation)
  if sizes is not None:
    attend = _with_sizes(pattern, implementation, sizes)
  found = result(attend, inputs)
  truth = result(
    _attend(pattern, "reference"), [x.astype(jnp.float32) for x in inputs]
  )
  labels = ("output", "gradient of query", "of key", "of value")
  for label, a, b in zip(labels, found, truth, strict=True):
    error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    if not error <= _TOLERANCE[case.dtype]:
      raise ValueError(
        f"{implementation} is wrong for {case.name} at {seq_len} tokens, so it"
        f" is not timed: {label} differs from the reference by {error:.1e} of"
        " its norm."
      )


def _peer(name: str, case: _Case) -> tuple[str, Any]:
  """Returns the label of a peer and what runs it.

  Raises:
    NotImplementedError: It cannot serve the case.
  """
  if name == "jax.nn":
    cudnn = _on_gpu() and case.dtype != "float32"
    dense = functools.partial(
      jax.nn.dot_product_attention,
      is_causal=True,
      implementation="cudnn" if cudnn else None,
    )
    return _DENSE, _JaxRun(dense, case.seq_len, case.dtype)
  if name == "xla":
    return name, _JaxRun(_attend(case.pattern, "xla"), case.seq_len, case.dtype)
  return attention_peers.LABELS[name], attention_peers.make(
    name,
    case.pattern,
    shapes=case.shapes,
    chunk_size=_CHUNK_SIZE.value,
    dtype=case.dtype,
    device="cuda",
  )


def _contestants(
  case: _Case, implementations: Sequence[str], peers: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Returns what can be timed, by label, and rows of what cannot."""
  runs, skipped = {}, []

  def skip(label: str, error: Exception) -> None:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    print(f"{label} is left out of {case.name} at {case.seq_len}: {reason}")
    skipped.append(case.row(label) | {"skipped": reason})

  for name in implementations:
    try:
      _check(case, name)
      runs[name] = _JaxRun(
        _attend(case.pattern, name), case.seq_len, case.dtype
      )
    except NotImplementedError as error:
      skip(name, error)
  if case.seq_len <= _MAX_PEER_LEN.value and runs:
    for name in peers:
      if name in runs:
        continue
      try:
        label, run = _peer(name, case)
        run.wait(run.forward_backward())
        runs[label] = run
      # What is wrong with a peer, its memory for one, must not end the run.
      except Exception as error:
        skip(attention_peers.LABELS.get(name, name), error)
  return runs, skipped


def _measure(
  case: _Case,
  implementations: Sequence[str],
  peers: Sequence[str],
  matmul: float,
) -> list[dict[str, Any]]:
  """Returns a row for each contestant of a case."""
  runs, rows = _contestants(case, implementations, peers)
  pairs = _BATCH_SIZE.value * case.pattern.num_pairs(case.seq_len)
  dense = patterns.dense(_NUM_HEADS.value).num_pairs(case.seq_len)
  of_label = {name: case.row(name) for name in runs}
  for name, row in of_label.items():
    row["is_peer"] = name not in implementations
    # Peers without the pattern see pairs of their own; S2 has as many as ours
    # in a chunk, but its users' form sees those of the wrap as well.
    if name in (*implementations, "xla", attention_peers.LABELS["flex"]):
      row["num_pairs"] = pairs
    elif name in (_DENSE, attention_peers.LABELS["sdpa"]):
      row["num_pairs"] = _BATCH_SIZE.value * dense
  for part in _PARTS:
    times = _time(runs, part)
    for name, row in of_label.items():
      median = statistics.median(times[name])
      row[part] = {
        "median_ms": median,
        "least_ms": min(times[name]),
        "most_ms": max(times[name]),
        "temporary_mib": _temporary_mib(runs[name], part),
      }
      if "num_pairs" in row:
        work = _WORK[part] * _HEAD_DIM.value * row["num_pairs"]
        row[part]["tflops"] = 1e-9 * work / median
        row[part]["matmul_share"] = row[part]["tflops"] / matmul
    for name, row in of_label.items():
      if not row["is_peer"]:
        row[part]["ratios"] = {
          other: of_label[other][part]["median_ms"] / row[part]["median_ms"]
          for other in runs
          if other != name
        }
  return [*of_label.values(), *rows]


def _measure_memory(case: _Case, implementation: str) -> dict[str, Any]:
  run = _JaxRun(_attend(case.pattern, implementation), case.seq_len, case.dtype)
  return case.row(implementation) | {
    part: {"temporary_mib": _temporary_mib(run, part)} for part in _PARTS
  }


def _print_row(row: dict[str, Any]) -> None:
  for part in _PARTS if "skipped" not in row else ():
    values = row[part]
    cells = [
      f"{row['seq_len']:>8,}  {row['pattern']:<11} {row['implementation']:<15}",
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
    cells += [f"{r:.2f}x {n}" for n, r in values.get("ratios", {}).items()]
    print(" ".join(cells), flush=True)


def _draw(rows: list[dict[str, Any]], title: str, path: str) -> None:
  """Draws time against length, a line a contestant and pattern."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  lines: dict[str, list[dict[str, Any]]] = {}
  for row in rows:
    if "median_ms" in row.get("forward", {}):
      label = f"{row['implementation']}, {row['dtype']}"
      if row["implementation"] not in (_DENSE, "SDPA dense", "LongLoRA S2"):
        label = f"{row['pattern']}, {label}"
      lines.setdefault(label, []).append(row)
  figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
  for part, axis in zip(_PARTS, axes, strict=True):
    for label, points in lines.items():
      points = sorted(points, key=lambda row: row["seq_len"])
      axis.loglog(
        [row["seq_len"] for row in points],
        [row[part]["median_ms"] for row in points],
        marker="o",
        label=label,
      )
    axis.set(
      xlabel="tokens",
      ylabel="milliseconds",
      title=part.replace("_", " and "),
    )
    axis.grid(alpha=0.3)
  axes[0].legend(fontsize="small")
  figure.suptitle(title)
  figure.savefig(path, dpi=120)
  plt.close(figure)


# Tuning.


def _with_sizes(
  pattern: patterns.AttentionPattern, implementation: str, sizes: Any
) -> _Function:
  module = importlib.import_module(f"scca_jax.backends.{implementation}")

  def attend(query, key, value):
    return module.attention(
      query,
      key,
      value,
      pattern,
      segment_ids=None,
      query_offset=0,
      scale=query.shape[-1] ** -0.5,
      sizes=sizes,
    )[0]

  return attend


def _tune(cases: Sequence[_Case], implementation: str, dtype: str) -> None:
  """Times all sizes of each kernel and writes the best.

  Raises:
    ValueError: No sizes of a kernel work, or the best are wrong.
  """
  module = importlib.import_module(f"scca_jax.backends.{implementation}")
  kind, head_dim = target.current().kind, _HEAD_DIM.value
  best = module.default_sizes(head_dim, jnp.dtype(dtype), kind)
  tried = module.candidates(head_dim, jnp.dtype(dtype))
  for kernel, candidates in tried.items():
    part = "forward" if kernel == "forward" else "forward_backward"

    def compiled(
      sizes: Any, kernel: str = kernel, part: str = part, others: Any = best
    ) -> list[_JaxRun]:
      trial = dataclasses.replace(others, **{kernel: sizes})
      return [
        _JaxRun(
          _with_sizes(case.pattern, implementation, trial),
          case.seq_len,
          dtype,
          parts=(part,),
        )
        for case in cases
      ]

    totals: dict[Any, float] = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      jobs = {
        sizes: pool.submit(compiled, sizes)
        for sizes in dict.fromkeys([getattr(best, kernel), *candidates])
      }
    for sizes, job in jobs.items():
      try:
        times = [_time({"": run}, part)[""] for run in job.result()]
      # Sizes that do not fit the device fail in as many ways.
      except Exception as error:
        reason = " ".join(str(error).split())[:100]
        print(f"{implementation} {kernel} {sizes}: {reason}")
        continue
      totals[sizes] = sum(map(statistics.median, times))
      print(
        f"{implementation} {kernel} {sizes}: {totals[sizes]:.3f} ms", flush=True
      )
    if not totals:
      raise ValueError(f"no sizes of {kernel} of {implementation} work here.")
    chosen = min(totals, key=lambda sizes: totals[sizes])
    best = dataclasses.replace(best, **{kernel: chosen})
  for case in cases:
    _check(case, implementation, best)
  path = pathlib.Path(_SIZES_OUTPUT.value)
  table = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
  of_dtype = (
    table.setdefault(implementation, {})
    .setdefault(kind, {})
    .setdefault(jnp.dtype(dtype).name, {})
  )
  of_dtype.setdefault(str(head_dim), {}).update(
    {kernel: dataclasses.asdict(getattr(best, kernel)) for kernel in tried}
  )
  cli.write_json(path, table)
  print(f"wrote {path}")


# The command.


def _lengths(flag: flags.FlagHolder, default: Sequence[str] = ()) -> list[int]:
  values = default if flag.value is None else flag.value
  try:
    lengths = [int(value) for value in values]
  except ValueError as error:
    raise ValueError(
      f"--{flag.name} must be lengths in tokens: {error}."
    ) from error
  if any(length < 1 for length in lengths):
    raise ValueError(f"--{flag.name} must be at least 1, got {values}.")
  return lengths


def _cases(dtype: str) -> list[_Case]:
  if _CASES.value is None:
    return [
      _Case(name, seq_len, dtype)
      for seq_len in _lengths(_SEQ_LENS)
      for name in _PATTERNS.value
    ]
  cases = []
  for text in _CASES.value:
    name, _, length = text.partition(":")
    if not length.isdigit() or int(length) < 1:
      raise ValueError(f"--cases must be PATTERN:LENGTH,..., got {text!r}.")
    cases.append(_Case(name, int(length), dtype))
  return cases


def _choose_peers() -> list[str]:
  """Returns the peers that can be timed here."""
  default = _PEER_NAMES if _on_gpu() else ("jax.nn",)
  names = default if _PEERS.value is None else _PEERS.value
  for name in names:
    if name not in _PEER_NAMES:
      raise ValueError(
        f"unknown peer {name!r}: use any of {', '.join(_PEER_NAMES)}."
      )
  of_torch = [name for name in names if name in attention_peers.LABELS]
  problem = attention_peers.problem() if of_torch else None
  if problem is not None:
    print(f"{', '.join(of_torch)} are left out: {problem}")
    names = [name for name in names if name not in of_torch]
  return list(names)


def main() -> None:
  """Measures, prints a table and writes JSON, or tunes.

  Raises:
    ValueError: A flag is out of range, or an implementation is wrong.
    NotImplementedError: The device lacks an implementation asked for.
  """
  for dtype in _DTYPES.value:
    if dtype not in _TOLERANCE:
      raise ValueError(
        f"unknown dtype {dtype!r}: use any of {', '.join(_TOLERANCE)}."
      )
  memory_default = () if _on_gpu() else ("8192", "16384")
  memory_lens = _lengths(_MEMORY_LENS, memory_default)
  cases = [case for dtype in _DTYPES.value for case in _cases(dtype)]
  if _REPEATS.value < 1:
    raise ValueError(f"--repeats must be at least 1, got {_REPEATS.value}.")
  for case in cases:
    _ = case.pattern
  implementations = _IMPLEMENTATIONS.value or [dispatch.available()[0]]
  for name in implementations:
    dispatch.check_implementation(name)
  if _TUNE.value:
    for name in implementations:
      if name not in ("mosaic", "triton"):
        raise ValueError(f"--tune is for mosaic and triton, not {name}.")
      for dtype in _DTYPES.value:
        _tune(_cases(dtype), name, dtype)
    return
  peers = _choose_peers()
  uses_torch = any(name in attention_peers.LABELS for name in peers)
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
    "chunk_size": _CHUNK_SIZE.value,
    "repeats": _REPEATS.value,
  }
  title = (
    f"{facts['device']}, Python {facts['python']}, jax {facts['jax']}"
    + (f", torch {facts['torch']}" if uses_torch else "")
    + f", batch {facts['batch_size']}, {facts['num_heads']} heads of"
    f" {facts['head_dim']}, chunks of {facts['chunk_size']}"
  )
  print(
    f"{title}: median of {facts['repeats']} (least to most) in milliseconds,"
    " useful TFLOP/s, share of the rate of a matrix product, temporary memory,"
    " times faster than"
  )
  matmul = {dtype: _matmul_tflops(dtype) for dtype in _DTYPES.value}
  for dtype, rate in matmul.items():
    print(f"matrix product, {dtype}: {rate:.3f} TFLOP/s")
  rows = []
  for case in cases:
    of_case = _measure(case, implementations, peers, matmul[case.dtype])
    for row in of_case:
      _print_row(row)
    rows += of_case
    if uses_torch:
      attention_peers.release()
  print("outputs and gradients agree with the reference")
  for seq_len in memory_lens:
    for case in (
      _Case(name, seq_len, dtype)
      for name in dict.fromkeys(case.name for case in cases)
      for dtype in _DTYPES.value
    ):
      for name in implementations:
        rows.append(_measure_memory(case, name))
        _print_row(rows[-1])
  if _PLOT.value is not None:
    _draw(rows, title, _PLOT.value)
  if _OUTPUT.value is not None:
    cli.write_json(
      _OUTPUT.value, facts | {"matmul_tflops": matmul, "rows": rows}
    )
    print(f"wrote {_OUTPUT.value}")


if __name__ == "__main__":
  cli.run(main)
