"""A case of `benchmark_attention`: a pattern at a length, checked and timed."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import scca_jax
from experiments.timing import attention_peers, clock, fa3_peers
from scca_jax import patterns
from scca_jax.patterns import AttentionPattern, HeadPattern, Mixture

# Names of the peers in the flag; PyTorch's are in `attention_peers`.
PEERS = ("jax.nn", "xla", *fa3_peers.LABELS, *attention_peers.LABELS)
DENSE = "jax.nn dense"
# Largest error in the 2-norm, relative to the truth, by dtype.
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
PARTS = ("forward", "forward_backward")

# Correctness is checked up to this length, because the reference builds the
# whole mask. The pattern has as many chunks as at the length that is timed.
_CHECKED_LEN = 1024
# Two products per pair forward, seven in all, of 2 head_dim operations each.
_WORK = {"forward": 4.0, "forward_backward": 14.0}

Pattern = AttentionPattern | Mixture
Function = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A pattern at a length, in a dtype.

  Attributes:
    name: The pattern as given in the flag.
    pattern: The pattern.
    seq_len: Tokens.
    dtype: Name of the inputs' dtype.
    batch_size: Sequences.
    num_kv_heads: Key and value heads.
    head_dim: Width of a head.
  """

  name: str
  pattern: Pattern
  seq_len: int
  dtype: str
  batch_size: int
  num_kv_heads: int
  head_dim: int

  @property
  def shapes(self) -> tuple[tuple[int, int, int, int], ...]:
    """Shapes of query, key and value, `[batch, seq, heads, head_dim]`."""
    return tuple(
      (self.batch_size, self.seq_len, heads, self.head_dim)
      for heads in (
        self.pattern.num_heads,
        self.num_kv_heads,
        self.num_kv_heads,
      )
    )

  def row(self, implementation: str) -> dict[str, Any]:
    """Returns the columns that identify a row of results."""
    return {
      "seq_len": self.seq_len,
      "dtype": self.dtype,
      "pattern": self.name,
      "implementation": implementation,
    }


def _shortened(case: Case) -> Case:
  """Returns the case at a length that the reference can check."""
  seq_len = min(_CHECKED_LEN, case.seq_len)

  def scaled(number: int | None) -> int | None:
    return None if number is None else number * seq_len // case.seq_len

  def shorten(head: HeadPattern) -> HeadPattern:
    # Shifts of dilated heads choose among neighbouring keys, at any length.
    moves = head.chunk_size is not None and head.dilation == 1
    return dataclasses.replace(
      head,
      chunk_size=head.chunk_size and max(1, scaled(head.chunk_size) or 0),
      offset=scaled(head.offset) or 0,
      shift=scaled(head.shift) or 0 if moves else head.shift,
      window=head.window and max(1, scaled(head.window) or 0),
    )

  def shortened(pattern: AttentionPattern) -> AttentionPattern:
    heads = tuple(map(shorten, pattern.heads))
    return dataclasses.replace(pattern, heads=heads)

  pattern = case.pattern
  if isinstance(pattern, Mixture):
    pattern = Mixture(tuple(map(shortened, pattern.members)))
  else:
    pattern = shortened(pattern)
  return dataclasses.replace(case, pattern=pattern, seq_len=seq_len)


@functools.lru_cache(maxsize=1)
def _inputs(
  shapes: tuple[tuple[int, int, int, int], ...], dtype: str
) -> list[jax.Array]:
  """Returns query, key, value and the gradient of the output."""
  rngs = jax.random.split(jax.random.key(0), 4)
  return [
    jax.random.normal(rng, shape, jnp.float32).astype(dtype)
    for rng, shape in zip(rngs, (*shapes, shapes[0]), strict=True)
  ]


def attend(pattern: Pattern, implementation: str) -> Function:
  """Returns `scca_jax.attention` with a pattern and an implementation."""
  return functools.partial(
    scca_jax.attention, pattern=pattern, implementation=implementation
  )


def _with_backward(function: Function) -> Callable[..., Any]:
  def run(query, key, value, d_output):
    output, pull = jax.vjp(function, query, key, value)
    return output, pull(d_output)

  return run


class JaxRun:
  """A function of jax, compiled, with its inputs."""

  def __init__(
    self, function: Function, case: Case, parts: Sequence[str] = PARTS
  ):
    """Compiles the parts without running them."""
    query, *rest = [jax.ShapeDtypeStruct(s, case.dtype) for s in case.shapes]
    self._inputs = case.shapes, case.dtype
    lowered = {
      "forward": lambda: jax.jit(function).lower(query, *rest),
      "forward_backward": lambda: jax.jit(_with_backward(function)).lower(
        query, *rest, query
      ),
    }
    self._compiled = {part: lowered[part]().compile() for part in parts}

  def forward(self) -> Any:
    """Starts the forward pass."""
    return self._compiled["forward"](*_inputs(*self._inputs)[:3])

  def forward_backward(self) -> Any:
    """Starts both passes."""
    return self._compiled["forward_backward"](*_inputs(*self._inputs))

  def wait(self, result: Any) -> None:
    """Waits for the call started last, and so for all before."""
    jax.block_until_ready(result)

  def part_temporary_mib(self, part: str) -> float:
    """Returns the compiler's temporary allocation, in MiB."""
    analysis: Any = self._compiled[part].memory_analysis()
    return analysis.temp_size_in_bytes / 2**20


class _PiecesRun(JaxRun):
  """FlashAttention-3's kernels on pieces cut beforehand."""

  def __init__(self, case: Case):
    if not isinstance(case.pattern, AttentionPattern):
      raise NotImplementedError("FlashAttention-3 does not support mixtures.")
    pieces = fa3_peers.Pieces(case.pattern, case.seq_len, fa3_peers.flash_mha())
    *inputs, d_output = _inputs(case.shapes, case.dtype)
    self._pieces = jax.jit(pieces.cut)(*inputs)
    self._d_outputs = jax.jit(pieces.cut_rows)(d_output)

    def with_backward(inputs: Any, d_outputs: Any) -> Any:
      outputs, pull = jax.vjp(pieces.on_pieces, inputs)
      return outputs, pull(d_outputs)

    self._compiled = {
      "forward": jax.jit(pieces.on_pieces).lower(self._pieces).compile(),
      "forward_backward": jax.jit(with_backward)
      .lower(self._pieces, self._d_outputs)
      .compile(),
    }

  def forward(self) -> Any:
    """Starts the forward pass."""
    return self._compiled["forward"](self._pieces)

  def forward_backward(self) -> Any:
    """Starts both passes."""
    return self._compiled["forward_backward"](self._pieces, self._d_outputs)


def _temporary_mib(run: Any, part: str) -> float | None:
  if isinstance(run, JaxRun):
    return run.part_temporary_mib(part)
  return run.temporary_mib(getattr(run, part))


def time_part(
  runs: dict[str, Any], part: str, repeats: int, in_flight: bool = True
) -> dict[str, list[float]]:
  """Returns the milliseconds of each contestant in each round.

  Args:
    runs: By name, a `JaxRun` or an `attention_peers.Peer`.
    part: One of `PARTS`.
    repeats: Rounds.
    in_flight: See `clock.take_turns`.
  """
  contestants = {
    name: (getattr(run, part), run.wait) for name, run in runs.items()
  }
  return clock.take_turns(contestants, repeats, in_flight)


def check(
  case: Case,
  implementation: str,
  make: Callable[[Pattern], Function] | None = None,
) -> None:
  """Compares output and gradients with the reference, in float32.

  Args:
    case: The case to be timed; the check may use a shorter length.
    implementation: Its name, for messages.
    make: Returns the function to check for a pattern; None means
      `scca_jax.attention` with that implementation.

  Raises:
    ValueError: They differ by more than the tolerance of the dtype.
    NotImplementedError: The implementation cannot serve the case.
  """
  short = _shortened(case)
  inputs = _inputs(short.shapes, short.dtype)

  def result(function: Function, inputs: list[jax.Array]) -> list[np.ndarray]:
    output, grads = jax.jit(_with_backward(function))(*inputs)
    return [np.asarray(x, np.float64) for x in (output, *grads)]

  if make is None:
    make = functools.partial(attend, implementation=implementation)
  found = result(make(short.pattern), inputs)
  truth = result(
    attend(short.pattern, "reference"),
    [x.astype(jnp.float32) for x in inputs],
  )
  labels = ("output", "gradient of query", "of key", "of value")
  for label, a, b in zip(labels, found, truth, strict=True):
    error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    if not error <= TOLERANCE[case.dtype]:
      raise ValueError(
        f"{implementation} is wrong for {case.name} at {short.seq_len} tokens,"
        f" so it is not timed: {label} differs from the reference by"
        f" {error:.1e} of its norm."
      )


def _peer(name: str, case: Case) -> tuple[str, Any]:
  """Returns the label of a peer and an object that runs it.

  Raises:
    NotImplementedError: It cannot serve the case.
  """
  if name == "jax.nn":
    cudnn = clock.on_gpu() and case.dtype != "float32"
    dense = functools.partial(
      jax.nn.dot_product_attention,
      is_causal=True,
      implementation="cudnn" if cudnn else None,
    )
    return DENSE, JaxRun(dense, case)
  if name == "xla":
    return name, JaxRun(attend(case.pattern, "xla"), case)
  if name in fa3_peers.LABELS:
    label = fa3_peers.LABELS[name]
    check(case, label, fa3_peers.composed)
    if name == "fa3_kernels":
      return label, _PiecesRun(case)
    return label, JaxRun(fa3_peers.composed(case.pattern), case)
  return attention_peers.LABELS[name], attention_peers.make(
    name,
    case.pattern,
    shapes=case.shapes,
    chunk_size=attention_peers.s2_chunk_size(case.pattern, case.seq_len),
    dtype=case.dtype,
    device="cuda",
  )


def _contestants(
  case: Case, implementations: Sequence[str], peers: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Returns what can be timed, by label, and rows for the rest."""
  runs, skipped = {}, []

  def skip(label: str, error: Exception) -> None:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    print(f"{label} is left out of {case.name} at {case.seq_len}: {reason}")
    skipped.append(case.row(label) | {"skipped": reason})

  for name in implementations:
    try:
      check(case, name)
      runs[name] = JaxRun(attend(case.pattern, name), case)
    except NotImplementedError as error:
      skip(name, error)
  for name in peers if runs else ():
    if name in runs:
      continue
    try:
      label, run = _peer(name, case)
      run.wait(run.forward_backward())
      runs[label] = run
    # A peer's failure, such as out of memory, must not end the run.
    except Exception as error:
      labels = attention_peers.LABELS | fa3_peers.LABELS
      skip(labels.get(name, name), error)
  return runs, skipped


def measure(
  case: Case,
  implementations: Sequence[str],
  peers: Sequence[str],
  *,
  repeats: int,
  matmul_tflops: float,
) -> list[dict[str, Any]]:
  """Returns a row for each contestant of a case.

  Args:
    case: The case.
    implementations: Names of implementations of `scca_jax.attention`.
    peers: Names from `PEERS`, timed if at least one implementation is.
    repeats: Rounds.
    matmul_tflops: Rate of a matrix product on the device.

  Raises:
    ValueError: An implementation is wrong.
  """
  runs, skipped = _contestants(case, implementations, peers)
  pairs = case.batch_size * case.pattern.num_pairs(case.seq_len)
  dense = patterns.dense(case.pattern.num_heads).num_pairs(case.seq_len)
  rows = {name: case.row(name) for name in runs}
  for name, row in rows.items():
    row["is_peer"] = name not in implementations
    # Peers without the pattern see different pairs; S2 has as many as ours in a
    # chunk, but its users' form also sees the pairs at the wrap.
    same = ("xla", attention_peers.LABELS["flex"], *fa3_peers.LABELS.values())
    if name in (*implementations, *same):
      row["num_pairs"] = pairs
    elif name in (DENSE, attention_peers.LABELS["sdpa"]):
      row["num_pairs"] = case.batch_size * dense
  for part in PARTS:
    times = time_part(runs, part, repeats)
    single = {}
    if clock.on_gpu():
      single = time_part(runs, part, repeats, in_flight=False)
    for name, row in rows.items():
      median = statistics.median(times[name])
      row[part] = {
        "median_ms": median,
        "least_ms": min(times[name]),
        "most_ms": max(times[name]),
        "temporary_mib": _temporary_mib(runs[name], part),
      }
      if name in single:
        row[part]["single_call_ms"] = statistics.median(single[name])
      if "num_pairs" in row:
        work = _WORK[part] * case.head_dim * row["num_pairs"]
        row[part]["tflops"] = 1e-9 * work / median
        row[part]["matmul_share"] = row[part]["tflops"] / matmul_tflops
    for name, row in rows.items():
      if not row["is_peer"]:
        row[part]["ratios"] = {
          other: rows[other][part]["median_ms"] / row[part]["median_ms"]
          for other in runs
          if other != name
        }
  for row in rows.values():
    forward, both = (row[part] for part in PARTS)
    median = both["median_ms"] - forward["median_ms"]
    row["backward"] = {"median_ms": median}
    if "num_pairs" in row:
      work = _WORK["forward_backward"] - _WORK["forward"]
      work *= case.head_dim * row["num_pairs"]
      row["backward"]["tflops"] = 1e-9 * work / median
  return [*rows.values(), *skipped]


def measure_memory(case: Case, implementation: str) -> dict[str, Any]:
  """Returns a row with only the temporary memory, by compiling."""
  run = JaxRun(attend(case.pattern, implementation), case)
  return case.row(implementation) | {
    part: {"temporary_mib": _temporary_mib(run, part)} for part in PARTS
  }
