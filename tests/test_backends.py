"""Every implementation against `reference`, which is the definition."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from scca_jax import attention, patterns
from scca_jax.backends import xla_cache
from scca_jax.patterns import AttentionPattern, HeadPattern

# Those that run anywhere; those of GPUs have suites of their own.
implementations = pytest.mark.parametrize("implementation", ["xla"])
NAMES = ("output", "log_sum", "d_query", "d_key", "d_value")
TOLERANCE = 2e-5
# The tests wait for the compiler, not for what it compiles.
QUICKLY = {"xla_backend_optimization_level": 0}
RULES = {
  "drop": {"boundary": "drop"},
  "local": {"boundary": "local"},
  "slot": {"causality": "slot"},
}
# Named patterns that each rule means something for.
NAMED = {
  "drop": patterns.NAMES,
  "local": ("scca_fixed", "scca_flow", "sda", "longmixed"),
  "slot": ("dense", "s2", "scca_fixed", "scca_flow", "dna", "dilated"),
}


def _named(rule, seq_len):
  """Heads of every named pattern in one: a compilation serves them all."""
  made = [
    patterns.make(name, num_heads=4, seq_len=seq_len, **RULES[rule])
    for name in NAMED[rule]
  ]
  made.append(
    dataclasses.replace(
      patterns.sda(2, 3, chunk_size=seq_len // 3), **RULES[rule]
    )
  )
  made.append(
    dataclasses.replace(patterns.sda(2, 2, window=seq_len // 5), **RULES[rule])
  )
  return patterns.mix(*made)


def _inputs(pattern, seq_len, *, kv_heads=None, kv_len=None, size=1.0):
  """Returns query, key, value and the cotangents of output and log-sum-exp.

  `size` is that of the queries and keys.
  """
  random = np.random.default_rng(0)
  kv_heads = pattern.num_heads // 2 if kv_heads is None else kv_heads
  query_shape = (2, seq_len, pattern.num_heads, 8)
  key_shape = (2, seq_len if kv_len is None else kv_len, kv_heads, 8)
  arrays = (
    size * random.normal(size=query_shape),
    size * random.normal(size=key_shape),
    random.normal(size=key_shape),
    random.normal(size=query_shape),
    random.normal(size=query_shape[:3]),
  )
  return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def _segments(seq_len):
  """A sequence of two documents and padding, and one of one document."""
  ends = [seq_len // 3, seq_len - seq_len // 5]
  first = np.searchsorted(ends, np.arange(seq_len), side="right") + 1
  return jnp.asarray(np.stack([first % 3, np.full(seq_len, 7)]), jnp.int32)


@functools.partial(
  jax.jit,
  static_argnames=("pattern", "implementation"),
  compiler_options=QUICKLY,
)
def _run(inputs, segment_ids, query_offset, *, pattern, implementation):
  """Returns outputs and gradients by name; `query_offset=None` is a plain 0."""
  query, key, value, d_output, d_log_sum = inputs

  def both(query, key, value):
    output, log_sum = attention(
      query,
      key,
      value,
      pattern,
      segment_ids=segment_ids,
      query_offset=0 if query_offset is None else query_offset,
      implementation=implementation,
      return_lse=True,
    )
    # -inf is no number to differentiate: whoever uses it leaves it out.
    return (output, jnp.where(log_sum > -jnp.inf, log_sum, 0.0)), log_sum

  (output, _), vjp, log_sum = jax.vjp(both, query, key, value, has_aux=True)
  gradients = vjp((d_output.astype(output.dtype), d_log_sum))
  return dict(zip(NAMES, (output, log_sum, *gradients), strict=True))


def _check(
  implementation, pattern, inputs, segment_ids=None, query_offset=None
):
  """Compares outputs and gradients with the reference, and returns them."""
  result, expected = (
    _run(
      inputs, segment_ids, query_offset, pattern=pattern, implementation=name
    )
    for name in (implementation, "reference")
  )
  for name in NAMES:
    np.testing.assert_allclose(
      result[name],
      expected[name],
      rtol=TOLERANCE,
      atol=TOLERANCE,
      err_msg=name,
    )
  return result


@implementations
@pytest.mark.parametrize(
  ("rule", "seq_len", "segmented"),
  [("drop", 63, True), ("local", 50, False), ("slot", 41, True)],
)
def test_every_named_pattern_has_its_outputs_and_gradients(
  implementation, rule, seq_len, segmented
):
  pattern = _named(rule, seq_len)
  _check(
    implementation,
    pattern,
    _inputs(pattern, seq_len),
    _segments(seq_len) if segmented else None,
  )


@implementations
@pytest.mark.parametrize(("seq_len", "kv_heads"), [(1, 1), (7, 3), (100, 1)])
def test_lengths_need_not_fit(implementation, seq_len, kv_heads):
  pattern = AttentionPattern(
    (
      HeadPattern(chunk_size=16, offset=5, shift=9),
      HeadPattern(dilation=3, shift=4),
      HeadPattern(chunk_size=16, dilation=3, shift=18, window=4, select=1),
    ),
    boundary="local",
  )
  inputs = _inputs(pattern, seq_len, kv_heads=kv_heads)
  _check(implementation, pattern, inputs)


@implementations
def test_long_chunks_take_many_blocks(implementation):
  seq_len = 700
  pattern = AttentionPattern(
    (
      HeadPattern(),
      HeadPattern(window=100),
      HeadPattern(chunk_size=600, offset=250, shift=310),
      HeadPattern(dilation=2, shift=1),
    )
  )
  _check(implementation, pattern, _inputs(pattern, seq_len), _segments(seq_len))


def _heads():
  return st.builds(
    lambda chunk_size, offset, shift, dilation, window, select: HeadPattern(
      chunk_size=chunk_size,
      offset=offset if chunk_size else 0,
      shift=shift,
      dilation=dilation,
      window=window,
      select=None if select is None else select % dilation,
    ),
    st.none() | st.integers(1, 24),
    st.integers(-30, 30),
    st.integers(0, 40),
    st.integers(1, 5),
    st.none() | st.integers(1, 12),
    st.none() | st.integers(0, 4),
  )


@implementations
@hypothesis.settings(
  max_examples=hypothesis.settings.default.max_examples // 25
)
@hypothesis.given(
  heads=st.lists(_heads(), min_size=3, max_size=3),
  rule=st.sampled_from(list(RULES)),
  seq_len=st.integers(1, 40),
  segmented=st.booleans(),
)
def test_drawn_patterns_have_their_outputs_and_gradients(
  implementation, heads, rule, seq_len, segmented
):
  pattern = AttentionPattern(tuple(heads), **RULES[rule])
  _check(
    implementation,
    pattern,
    _inputs(pattern, seq_len, kv_heads=1),
    _segments(seq_len) if segmented else None,
  )


def _unions(boundary="drop"):
  """Heads whose parts are plain, overlap, fall back and lie in few chunks."""
  heads = (
    HeadPattern(chunk_size=12, shift=5, own_chunk=True),
    HeadPattern(chunk_size=12, offset=-5, shift=7, dilation=3, own_chunk=True),
    HeadPattern(dilation=2, shift=3, window=4, sinks=5),
    HeadPattern(chunk_size=100, shift=90, window=3, own_chunk=True, sinks=20),
  )
  return dataclasses.replace(
    patterns.mix(
      patterns.scca_near(4, 8, 6, sinks=3),
      patterns.scca_flow(2, 16, 4, own_chunk=True),
      AttentionPattern(heads),
      patterns.local(2, 8),
    ),
    boundary=boundary,
  )


@implementations
@pytest.mark.parametrize(
  ("boundary", "seq_len", "segmented"),
  [("drop", 50, False), ("local", 61, True)],
)
def test_unions_have_their_outputs_and_gradients(
  implementation, boundary, seq_len, segmented
):
  pattern = _unions(boundary)
  _check(
    implementation,
    pattern,
    _inputs(pattern, seq_len, kv_heads=4),
    _segments(seq_len) if segmented else None,
  )


def _union_heads():
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


@implementations
@hypothesis.settings(max_examples=4, deadline=None, derandomize=True)
@hypothesis.given(
  heads=st.lists(_union_heads(), min_size=3, max_size=3),
  boundary=st.sampled_from(patterns.BOUNDARIES),
  seq_len=st.integers(1, 40),
  segmented=st.booleans(),
)
def test_drawn_unions_have_their_outputs_and_gradients(
  implementation, heads, boundary, seq_len, segmented
):
  pattern = AttentionPattern(tuple(heads), boundary)
  _check(
    implementation,
    pattern,
    _inputs(pattern, seq_len, kv_heads=1),
    _segments(seq_len) if segmented else None,
  )


@implementations
def test_unions_of_many_sinks_and_segments(implementation, monkeypatch):
  # Several blocks of queries and of keys.
  monkeypatch.setattr(xla_cache, "_SCORE_BYTES", 4 * 64 * 100)
  monkeypatch.setattr(xla_cache, "_BLOCK", 16)
  pattern = patterns.mix(
    patterns.scca_near(2, 20, 5, sinks=30), patterns.scca_flow(2, 20, 5)
  )
  ids = jnp.asarray(
    [np.repeat(np.arange(1, 11), 10), np.repeat([3, 0, 4, 5], 25)]
  )
  _check(implementation, pattern, _inputs(pattern, 100), ids)
  _check(implementation, pattern, _inputs(pattern, 100))


def _with_empty_rows(seq_len):
  return patterns.mix(
    patterns.scca_fixed(2, seq_len // 4),
    patterns.sda(2, 2),
    patterns.dilated(2, seq_len // 2, 2),
    patterns.scca_near(2, seq_len // 4, 4, sinks=2),
  )


@implementations
@pytest.mark.parametrize("size", [3.0, 150.0])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_as_exact_as_dense(implementation, dtype, size):
  seq_len = 48
  pattern = _with_empty_rows(seq_len)
  # At 150 scores exceed what float16 can hold.
  *arrays, d_log_sum = _inputs(pattern, seq_len, size=size)
  halves = (*(x.astype(dtype) for x in arrays), d_log_sum)
  wide = (*(x.astype(jnp.float32) for x in halves[:4]), d_log_sum)
  ids = _segments(seq_len)
  run = functools.partial(_run, pattern=pattern)
  truth = run(wide, ids, None, implementation="reference")
  dense = run(halves, ids, None, implementation="reference")
  result = run(halves, ids, None, implementation=implementation)
  empty = np.asarray(truth["log_sum"]) == -np.inf
  assert empty.any()
  np.testing.assert_array_equal(np.asarray(result["log_sum"]) == -np.inf, empty)
  for name in NAMES:
    assert result[name].dtype == (jnp.float32 if name == "log_sum" else dtype)
    values, dense_values, true_values = (
      np.where(x == -np.inf, 0, x)
      for x in (np.asarray(r[name], np.float64) for r in (result, dense, truth))
    )
    assert np.isfinite(values).all(), name
    allowed = 2 * np.abs(dense_values - true_values).max()
    # Both sums are float32: their own rounding is no error of the dtype.
    allowed += TOLERANCE * np.abs(true_values).max()
    assert np.abs(values - true_values).max() <= allowed, name


@implementations
def test_queries_without_keys_get_exactly_nothing(implementation):
  seq_len = 48
  pattern = _with_empty_rows(seq_len)
  result = _check(
    implementation, pattern, _inputs(pattern, seq_len), _segments(seq_len)
  )
  ids = np.asarray(_segments(seq_len))
  same = (ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, None, :]
  seen = pattern.visible(seq_len)[None] & same[:, None]
  empty = ~seen.any(axis=-1).swapaxes(1, 2)  # [batch, seq, heads]
  assert empty.any() and not empty.all()
  np.testing.assert_array_equal(np.asarray(result["log_sum"]) == -np.inf, empty)
  for name in ("output", "d_query"):
    assert not np.any(np.asarray(result[name])[empty]), name
  unseen = ~seen.any(axis=2).reshape(2, -1, 2, seq_len).any(axis=2)
  for name in ("d_key", "d_value"):
    assert not np.any(np.asarray(result[name])[unseen.swapaxes(1, 2)]), name


@implementations
@pytest.mark.parametrize("rule", ["local", "slot"])
def test_decoding_has_its_outputs_and_gradients(implementation, rule):
  kv_len, seq_len = 600, 5
  pattern = patterns.mix(
    dataclasses.replace(patterns.longmixed(4, 150), **RULES[rule]),
    dataclasses.replace(patterns.s2(2, 150), **RULES[rule]),
  )
  if rule == "local":
    pattern = patterns.mix(
      pattern,
      dataclasses.replace(patterns.scca_near(3, 75, 8, 9), boundary="local"),
    )
  for kv_heads in (1, 3):
    inputs = _inputs(pattern, seq_len, kv_heads=kv_heads, kv_len=kv_len)
    for offset in (0, 148, kv_len - seq_len):
      _check(implementation, pattern, inputs, _segments(kv_len), offset)


@implementations
def test_a_prompt_meets_a_longer_cache(implementation):
  pattern = dataclasses.replace(patterns.longmixed(4, 12), boundary="local")
  inputs = _inputs(pattern, 30, kv_len=50)
  _check(implementation, pattern, inputs, _segments(50))


@implementations
def test_transformations_change_nothing(implementation):
  seq_len = 30
  pattern = patterns.scca_fixed(4, 12)
  query, key, value, *_ = _inputs(pattern, seq_len)
  ids = _segments(seq_len)

  def attend(query, key, value, ids):
    return attention(
      query, key, value, pattern, segment_ids=ids, implementation=implementation
    )

  def loss(attend, *arrays):
    return jnp.sum(jnp.sin(attend(*arrays, ids)))

  def one_by_one(*arrays):
    alone = jax.vmap(attend)(*(x[:, None] for x in arrays))
    return alone[:, 0]

  of = {
    name: jax.jit(
      jax.value_and_grad(functools.partial(loss, way), argnums=(0, 1, 2)),
      compiler_options=QUICKLY,
    )(query, key, value)
    for name, way in {
      "plain": attend,
      "vmap": one_by_one,
      "remat": jax.checkpoint(attend),
    }.items()
  }
  for name in ("vmap", "remat"):
    for a, b in zip(
      jax.tree.leaves(of[name]), jax.tree.leaves(of["plain"]), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=name)


def _temp_bytes(attend, num_heads, seq_len):
  """Returns the temporary memory of forward and backward, in bytes."""

  def step(query, key, value, d_output):
    output, vjp = jax.vjp(attend, query, key, value)
    return output, vjp(d_output)

  array = jax.ShapeDtypeStruct((1, seq_len, num_heads, 64), jnp.float32)
  compiled = jax.jit(step).lower(*[array] * 4).compile(QUICKLY)
  return compiled.memory_analysis().temp_size_in_bytes


def _using(implementation, pattern):
  return functools.partial(
    attention, pattern=pattern, implementation=implementation
  )


@implementations
def test_memory_is_a_tenth_of_dense_attention(implementation):
  attend = _using(implementation, patterns.scca_fixed(8, 512))
  dense = functools.partial(jax.nn.dot_product_attention, is_causal=True)
  assert _temp_bytes(attend, 8, 4096) <= _temp_bytes(dense, 8, 4096) / 10


@implementations
@pytest.mark.parametrize(
  "pattern",
  [
    patterns.scca_fixed(8, 512),
    patterns.mix(patterns.sda(6, 4), patterns.sliding(2, 64)),
    patterns.scca_near(8, 512, 4, sinks=4),
  ],
  ids=["scca_fixed", "unchunked", "near"],
)
def test_memory_grows_with_the_sequence(implementation, pattern):
  attend = _using(implementation, pattern)
  short, long = (_temp_bytes(attend, 8, n) for n in (8192, 16384))
  assert long <= 2.2 * short
