"""The cases that every implementation of the attention is tested on.

`attend` is a function `(query, key, value, pattern, *, segment_ids,
query_offset) -> (output, log-sum-exp)`; the log-sum-exp may be None.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import scca_jax
from scca_jax import patterns
from scca_jax.patterns import AttentionPattern, HeadPattern, Mixture

NAMES = ("output", "log_sum", "d_query", "d_key", "d_value")
# Absolute and relative (SPEC 3). Half precision may have twice the error of
# dense attention, see `compare_half`.
TOLERANCE = 2e-5
# The tests spend their time compiling, not running.
QUICKLY = (
  {"xla_backend_optimization_level": 0}
  if jax.default_backend() == "cpu"
  else {}
)

Attend = Callable[..., tuple[jax.Array, jax.Array | None]]


# Cases.


@dataclasses.dataclass(frozen=True)
class Case:
  """A pattern, and the arrays to call it with.

  Attributes:
    pattern: Which keys each query head sees.
    seq_len: Tokens.
    kv_heads: Key heads; None is half the query heads.
    segmented: Whether there are segment ids.
  """

  pattern: AttentionPattern
  seq_len: int
  kv_heads: int | None = None
  segmented: bool = False


def ruled(pattern: AttentionPattern, **rules: Any) -> AttentionPattern:
  """Returns the pattern with another boundary or causality."""
  return dataclasses.replace(pattern, **rules)


def named(
  names: tuple[str, ...], seq_len: int, chunk_size: int | None = None
) -> AttentionPattern:
  """Returns heads of named patterns in one pattern, to compile only once."""
  chunk_size = chunk_size or seq_len // 4
  num_chunks = -(-seq_len // chunk_size)
  of_name = {
    "dense": patterns.dense(4),
    "local": patterns.local(4, chunk_size),
    "sliding": patterns.sliding(4, chunk_size),
    "s2": patterns.s2(4, chunk_size),
    "scca_fixed": patterns.scca_fixed(4, chunk_size),
    "scca_flow": patterns.scca_flow(4, chunk_size, num_chunks),
    "dilated": patterns.dilated(4, chunk_size, num_chunks),
    "dna": patterns.dna(4, chunk_size, num_chunks),
    "sda": patterns.sda(4, num_chunks),
    "longmixed": patterns.longmixed(4, chunk_size),
    "sda in chunks": patterns.sda(2, 3, chunk_size=seq_len // 3),
    "sda with a window": patterns.sda(2, 2, window=seq_len // 5),
  }
  return patterns.mix(*(of_name[name] for name in names))


SHIFTED = ("scca_fixed", "scca_flow", "sda", "longmixed")
ODD_SDA = ("sda in chunks", "sda with a window")
ALL = (
  *("dense", "local", "sliding", "s2", "scca_fixed", "scca_flow"),
  *("dilated", "dna", "sda", "longmixed", *ODD_SDA),
)
ROLLED = ("dense", "s2", "scca_fixed", "scca_flow", "dna", "dilated")
ODD = AttentionPattern(
  (
    HeadPattern(chunk_size=16, offset=5, shift=9),
    HeadPattern(dilation=3, shift=4),
    HeadPattern(chunk_size=16, dilation=3, shift=18, window=4, select=1),
  ),
  boundary="local",
)
# Heads whose parts are one piece of the keys, with and without a shift.
UNION = patterns.mix(
  patterns.scca_near(4, 8, 5, sinks=3),
  patterns.scca_flow(4, 8, 5, own_chunk=True, sinks=3),
  AttentionPattern(
    (
      HeadPattern(window=5, sinks=3),
      HeadPattern(dilation=2, shift=1, sinks=3),
      HeadPattern(chunk_size=8, offset=3, sinks=20),
      HeadPattern(chunk_size=8, offset=3, shift=19, own_chunk=True),
    )
  ),
)
NEAR = patterns.mix(
  patterns.scca_near(4, 8, 5), patterns.scca_flow(4, 8, 5, own_chunk=True)
)
# Heads whose parts overlap, fall back and lie in few chunks.
ODD_UNION = patterns.mix(
  patterns.scca_near(4, 8, 6, sinks=3),
  patterns.scca_flow(2, 16, 4, own_chunk=True),
  AttentionPattern(
    (
      HeadPattern(chunk_size=12, shift=5, own_chunk=True),
      HeadPattern(
        chunk_size=12, offset=-5, shift=7, dilation=3, own_chunk=True
      ),
      HeadPattern(dilation=2, shift=3, window=4, sinks=5),
      HeadPattern(chunk_size=100, shift=90, window=3, own_chunk=True, sinks=20),
    )
  ),
  patterns.local(2, 8),
)
# Heads whose parts overlap or are many blocks apart, beside heads without.
WHOLE_UNION = patterns.mix(
  patterns.scca_near(4, 40, 5, sinks=20),
  patterns.sda(2, 2),
  AttentionPattern(
    (
      HeadPattern(chunk_size=40, offset=13, shift=25, own_chunk=True),
      HeadPattern(chunk_size=40, shift=90, window=30, own_chunk=True, sinks=50),
      HeadPattern(window=18, sinks=7),
      HeadPattern(chunk_size=70, shift=35, sinks=20),
    )
  ),
  patterns.local(2, 40),
)
# Dense on pieces of the sequence.
PIECES = patterns.mix(
  patterns.dense(4),
  patterns.local(4, 16),
  patterns.sliding(4, 10),
  patterns.s2(4, 16),
  patterns.scca_fixed(4, 16),
  patterns.scca_flow(4, 16, 4),
  AttentionPattern(
    (HeadPattern(chunk_size=20, offset=-13), HeadPattern(chunk_size=200))
  ),
)


def _drawn(num_heads: int) -> AttentionPattern:
  random = np.random.default_rng(3)
  heads = []
  for _ in range(num_heads):
    chunk_size = int(random.integers(1, 24)) if random.random() < 0.6 else None
    dilation = int(random.integers(1, 5))
    heads.append(
      HeadPattern(
        chunk_size=chunk_size,
        offset=int(random.integers(-30, 30)) if chunk_size else 0,
        shift=int(random.integers(0, 40)),
        dilation=dilation,
        window=int(random.integers(1, 12)) if random.random() < 0.4 else None,
        select=int(random.integers(dilation))
        if random.random() < 0.3
        else None,
      )
    )
  return AttentionPattern(tuple(heads), "local")


CASES = {
  "named": Case(named(ALL, 63), 63, segmented=True),
  "named, local": Case(
    ruled(named((*SHIFTED, *ODD_SDA), 50), boundary="local"), 50
  ),
  "named, slot": Case(
    ruled(named((*ROLLED, *ODD_SDA), 41), causality="slot"), 41, segmented=True
  ),
  # On a mesh, chunks have to fit a device's shard.
  "small chunks": Case(named(ALL, 64, 8), 64, segmented=True),
  "small chunks, local": Case(ruled(named(ALL, 64, 8), boundary="local"), 64),
  "one token": Case(ODD, 1, 1),
  "seven tokens": Case(ODD, 7, 1),
  "ragged": Case(ODD, 100, 3),
  "many blocks": Case(
    AttentionPattern(
      (
        HeadPattern(),
        HeadPattern(window=100),
        HeadPattern(chunk_size=600, offset=250, shift=310),
        HeadPattern(dilation=2, shift=1),
      )
    ),
    700,
    segmented=True,
  ),
  "drawn": Case(_drawn(12), 53, 4, segmented=True),
  "union": Case(ruled(UNION, boundary="local"), 64, 6),
  "near": Case(NEAR, 41, segmented=True),
  "near, sinks": Case(patterns.scca_near(4, 8, 5, sinks=3), 40),
  "near, sinks, local": Case(
    ruled(
      patterns.scca_flow(4, 8, 5, own_chunk=True, sinks=3), boundary="local"
    ),
    40,
  ),
  "whole union": Case(WHOLE_UNION, 200, 6),
  "odd union": Case(ODD_UNION, 50, 4),
  "odd union, local": Case(
    ruled(ODD_UNION, boundary="local"), 61, 4, segmented=True
  ),
  **{f"pieces of {n}": Case(PIECES, n) for n in (5, 37, 64)},
  "pieces, local": Case(
    ruled(patterns.scca_flow(4, 16, 4), boundary="local"), 37
  ),
  "pieces across groups": Case(
    patterns.scca_fixed(6, 12, 3).interleaved(2), 37, 2
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewHead(HeadPattern):
  """A head with a field that no back end knows."""

  parity: int | None = None

  def seen(self, queries, keys, seq_len, **rules):
    """Marks the pairs seen, only with keys of one parity if it is set."""
    seen = super().seen(queries, keys, seq_len, **rules)
    return seen if self.parity is None else seen & (keys % 2 == self.parity)


def with_empty_rows(seq_len: int, sinks: int) -> AttentionPattern:
  """Returns a pattern in which some queries see nothing."""
  return patterns.mix(
    patterns.scca_fixed(2, seq_len // 4),
    patterns.sda(2, 2),
    patterns.dilated(2, seq_len // 2, 2),
    patterns.scca_near(2, seq_len // 4, 4, sinks=sinks),
  )


def heads_drawn(
  chunk_sizes: st.SearchStrategy, offsets: st.SearchStrategy
) -> st.SearchStrategy:
  """Draws a `HeadPattern`; without a chunk size the offset is 0."""
  return st.builds(
    lambda chunk_size, offset, shift, dilation, window, select: HeadPattern(
      chunk_size=chunk_size,
      offset=offset if chunk_size else 0,
      shift=shift,
      dilation=dilation,
      window=window,
      select=None if select is None else select % dilation,
    ),
    st.none() | chunk_sizes,
    offsets,
    st.integers(0, 40),
    st.integers(1, 5),
    st.none() | st.integers(1, 12),
    st.none() | st.integers(0, 4),
  )


def unions_drawn() -> st.SearchStrategy:
  """Draws a `HeadPattern` with `own_chunk` or `sinks`, or without."""
  return st.builds(
    lambda chunk_size, offset, shift, dilation, window, own, sinks: HeadPattern(
      chunk_size=chunk_size,
      offset=offset if chunk_size else 0,
      shift=shift,
      dilation=dilation,
      window=window,
      own_chunk=own and chunk_size is not None,
      sinks=sinks,
    ),
    st.none() | st.integers(1, 24),
    st.integers(-30, 30),
    st.integers(0, 40),
    st.integers(1, 5),
    st.none() | st.integers(1, 12),
    st.booleans(),
    st.integers(0, 12),
  )


# Arrays.


def make_inputs(
  num_heads: int,
  seq_len: int,
  kv_heads: int | None = None,
  *,
  kv_len: int | None = None,
  size: float = 1.0,
  head_dim: int = 8,
  batch: int = 2,
  seed: Any = 0,
) -> tuple[jax.Array, ...]:
  """Returns query, key, value and the cotangents of output and log-sum-exp.

  `size` is that of the queries and keys.
  """
  random = np.random.default_rng(seed)
  kv_heads = num_heads // 2 if kv_heads is None else kv_heads
  query_shape = (batch, seq_len, num_heads, head_dim)
  key_shape = (batch, kv_len or seq_len, kv_heads, head_dim)
  arrays = (
    size * random.normal(size=query_shape),
    size * random.normal(size=key_shape),
    random.normal(size=key_shape),
    random.normal(size=query_shape),
    random.normal(size=query_shape[:3]),
  )
  return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def make_segments(seq_len: int) -> jax.Array:
  """Two documents and padding, and a sequence of one document."""
  ends = [seq_len // 3, seq_len - seq_len // 5]
  first = np.searchsorted(ends, np.arange(seq_len), side="right") + 1
  return jnp.asarray(np.stack([first % 3, np.full(seq_len, 7)]), jnp.int32)


# Comparing.


def reference(query, key, value, pattern, *, segment_ids, query_offset):
  """Attention by the definition."""
  return scca_jax.attention(
    query,
    key,
    value,
    pattern,
    segment_ids=segment_ids,
    query_offset=query_offset,
    implementation="reference",
    return_lse=True,
  )


def dense(query, key, value, pattern, *, segment_ids, query_offset):
  """Attention with products in the inputs' dtype, as in kernels."""
  seq_len, dtype = query.shape[1], query.dtype
  group_size = query.shape[2] // key.shape[2]
  key, value = (jnp.repeat(x, group_size, axis=2) for x in (key, value))
  seen = jnp.asarray(pattern.visible(seq_len))[None]
  if segment_ids is not None:
    seen = seen & _same_segment(segment_ids)[:, None]
  product = functools.partial(
    jnp.einsum, preferred_element_type=jnp.float32, precision="highest"
  )
  scores = query.shape[-1] ** -0.5 * product("bqhd,bkhd->bhqk", query, key)
  empty = ~seen.any(axis=3, keepdims=True)
  scores = jnp.where(seen | empty, scores, -jnp.inf)
  log_sum = jax.nn.logsumexp(scores, axis=3, keepdims=True)
  weights = jnp.where(empty, 0.0, jnp.exp(scores - log_sum))
  log_sum = jnp.where(empty, -jnp.inf, log_sum)
  output = product("bhqk,bkhd->bqhd", weights.astype(dtype), value)
  return output.astype(dtype), jnp.swapaxes(log_sum[..., 0], 1, 2)


def _same_segment(ids: Any) -> Any:
  return (ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, None, :]


@functools.partial(
  jax.jit, static_argnames=("attend", "pattern"), compiler_options=QUICKLY
)
def run(
  inputs: tuple[jax.Array, ...],
  segment_ids: jax.Array | None = None,
  query_offset: int | jax.Array | None = None,
  *,
  attend: Attend,
  pattern: AttentionPattern | Mixture,
) -> dict[str, jax.Array]:
  """Returns outputs and gradients by name; `query_offset=None` is a plain 0."""
  *arrays, d_output, d_log_sum = inputs

  def both(query, key, value):
    output, log_sum = attend(
      query,
      key,
      value,
      pattern,
      segment_ids=segment_ids,
      query_offset=0 if query_offset is None else query_offset,
    )
    if log_sum is None:
      return (output,), None
    # -inf cannot be differentiated, so it is left out.
    return (output, jnp.where(log_sum > -jnp.inf, log_sum, 0.0)), log_sum

  outputs, vjp, log_sum = jax.vjp(both, *arrays, has_aux=True)
  cotangents = (d_output.astype(outputs[0].dtype), d_log_sum)
  gradients = vjp(cotangents[: len(outputs)])
  found = dict(zip(NAMES, (outputs[0], log_sum, *gradients), strict=True))
  return {name: x for name, x in found.items() if x is not None}


def compare(found: Any, expected: Any) -> None:
  """Compares what was found, by name, with what was expected, in float32."""
  for name, x in found.items():
    np.testing.assert_allclose(
      x, expected[name], rtol=TOLERANCE, atol=TOLERANCE, err_msg=name
    )


def compare_half(
  found: Any,
  rounded: Any,
  truth: Any,
  order: float = np.inf,
  slack: float = TOLERANCE,
) -> None:
  """Compares 16-bit results: their error is at most twice that of `rounded`.

  Args:
    found: Results by name.
    rounded: Those of dense attention in the same dtype.
    truth: Those in float32.
    order: Norm of the errors.
    slack: Relative to the truth. Sums are float32, and their own rounding is
      not an error of the dtype.
  """
  for name, true in truth.items():
    values, others, true = (
      np.where(x == -np.inf, 0, x).ravel()
      for x in (
        np.asarray(r, np.float64) for r in (found[name], rounded[name], true)
      )
    )
    assert np.isfinite(values).all(), name
    allowed = 2 * np.linalg.norm(others - true, order)
    allowed += slack * np.linalg.norm(true, order)
    assert np.linalg.norm(values - true, order) <= allowed, name


def check(
  attend: Attend,
  pattern: AttentionPattern | Mixture,
  inputs: tuple[jax.Array, ...],
  segment_ids: jax.Array | None = None,
  query_offset: int | None = None,
) -> dict[str, jax.Array]:
  """Compares outputs and gradients with the reference, and returns them."""
  result = run(
    inputs, segment_ids, query_offset, attend=attend, pattern=pattern
  )
  if "log_sum" not in result:
    inputs = (*inputs[:4], jnp.zeros_like(inputs[4]))
  expected = run(
    inputs, segment_ids, query_offset, attend=reference, pattern=pattern
  )
  compare(result, expected)
  return result


def check_case(attend: Attend, case: Case) -> None:
  """Compares a case with the reference."""
  inputs = make_inputs(case.pattern.num_heads, case.seq_len, case.kv_heads)
  ids = make_segments(case.seq_len) if case.segmented else None
  check(attend, case.pattern, inputs, ids)


def check_half(
  attend: Attend,
  dtype: Any,
  size: float,
  dense: Attend,
  sinks: int = 0,
  seq_len: int = 48,
) -> None:
  """Compares 16-bit inputs with float32: the error is at most twice `dense`'s.

  Queries and keys are of that size; some heads have sinks.
  """
  pattern = with_empty_rows(seq_len, sinks)
  *arrays, d_log_sum = make_inputs(pattern.num_heads, seq_len, size=size)
  halves = (*(x.astype(dtype) for x in arrays), d_log_sum)
  wide = (*(x.astype(jnp.float32) for x in halves[:4]), d_log_sum)
  ids = make_segments(seq_len)
  truth = run(wide, ids, attend=reference, pattern=pattern)
  rounded = run(halves, ids, attend=dense, pattern=pattern)
  result = run(halves, ids, attend=attend, pattern=pattern)
  empty = np.asarray(truth["log_sum"]) == -np.inf
  assert empty.any()
  np.testing.assert_array_equal(np.asarray(result["log_sum"]) == -np.inf, empty)
  for name, x in result.items():
    assert x.dtype == (jnp.float32 if name == "log_sum" else dtype)
  compare_half(result, rounded, truth)


def check_empty_rows(
  attend: Attend, dtype: Any, sinks: int = 0, seq_len: int = 48
) -> None:
  """Queries without a key, and keys that no query sees, get exactly 0."""
  pattern = with_empty_rows(seq_len, sinks)
  *inputs, d_log_sum = make_inputs(pattern.num_heads, seq_len)
  inputs = (*(x.astype(dtype) for x in inputs), d_log_sum)
  ids = make_segments(seq_len)
  result = run(inputs, ids, attend=attend, pattern=pattern)
  seen = pattern.visible(seq_len)[None]
  seen = seen & _same_segment(np.asarray(ids))[:, None]
  empty = ~seen.any(axis=-1).swapaxes(1, 2)  # [batch, seq, heads]
  assert empty.any() and not empty.all()
  np.testing.assert_array_equal(np.asarray(result["log_sum"]) == -np.inf, empty)
  for name in ("output", "d_query"):
    assert not np.any(np.asarray(result[name])[empty]), name
  unseen = ~seen.any(axis=2).reshape(2, -1, 2, seq_len).any(axis=2)
  for name in ("d_key", "d_value"):
    assert not np.any(np.asarray(result[name])[unseen.swapaxes(1, 2)]), name


def check_transformations(
  attend: Attend,
  tolerance: float,
  inputs: Any,
  pattern: AttentionPattern,
  segmented: bool = True,
) -> None:
  """Vmap and remat change nothing."""
  query, key, value = inputs[:3]
  ids = (make_segments(query.shape[1]),) if segmented else ()

  def plain(query, key, value, segment_ids=None):
    return attend(
      query, key, value, pattern, segment_ids=segment_ids, query_offset=0
    )[0]

  def one_by_one(*arrays):
    return jax.vmap(plain)(*(x[:, None] for x in arrays))[:, 0]

  # The outputs are compared, not their sum, whose terms cancel: it would depend
  # on the order of summation, which differs between versions of XLA.
  def loss(way, *arrays):
    output = way(*arrays, *ids)
    return jnp.sum(jnp.sin(output.astype(jnp.float32))), output

  expected, *others = (
    jax.jit(
      jax.grad(functools.partial(loss, way), argnums=(0, 1, 2), has_aux=True),
      compiler_options=QUICKLY,
    )(query, key, value)
    for way in (plain, one_by_one, jax.checkpoint(plain))
  )
  for found in others:
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
      np.testing.assert_allclose(
        np.asarray(a, np.float32),
        np.asarray(b, np.float32),
        rtol=tolerance,
        atol=1e-6,
      )
