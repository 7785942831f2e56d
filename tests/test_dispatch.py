"""`scca_jax.attention`: what it computes, and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pattern_strings
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import scca_jax
from scca_jax import patterns, target
from scca_jax.backends import registry

SEQ_LEN, HEADS = 13, 4
# Unions that overlap, that have few keys, and more sinks than a chunk.
UNION = patterns.mix(
  patterns.scca_near(2, 4, 4, sinks=2),
  patterns.AttentionPattern(
    (
      patterns.HeadPattern(chunk_size=4, shift=2, own_chunk=True),
      patterns.HeadPattern(dilation=2, shift=1, window=2, sinks=3),
    )
  ),
)
# Every named pattern, under both rules for the start of the sequence.
NAMED = [
  pattern_strings.make(
    name, num_heads=HEADS, seq_len=SEQ_LEN, boundary=boundary
  )
  for name in patterns.NAMES
  for boundary in patterns.BOUNDARIES
]
NAMED.append(UNION)
# Those that run anywhere.
EVERYWHERE = ("xla", "reference")
implementations = pytest.mark.parametrize("implementation", EVERYWHERE)


# One compilation is faster than many small ones.
_jitted = jax.jit(
  functools.partial(scca_jax.attention, return_lse=True),
  static_argnames=("pattern", "scale", "implementation"),
)


def _inputs(seq_len=SEQ_LEN, kv_heads=2, dtype=jnp.float32, heads=HEADS):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = [(2, seq_len, n, 8) for n in (heads, kv_heads, kv_heads)]
  return [
    jax.random.normal(k, shape, dtype)
    for k, shape in zip(keys, shapes, strict=True)
  ]


def _by_hand(query, key, value, counts, scale):
  """Softmax over a multiset of keys, one row at a time, in float64.

  `counts` says how often each query sees each key, `[heads, seq, seq]`.
  """
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  output = np.zeros_like(query)
  log_sum = np.full(query.shape[:3], -np.inf)
  group = query.shape[2] // key.shape[2]
  for b, p, h in np.ndindex(*log_sum.shape):
    seen = np.flatnonzero(counts[h, p])
    if len(seen):
      scores = scale * key[b, seen, h // group] @ query[b, p, h]
      weights = counts[h, p, seen] * np.exp(scores)
      output[b, p, h] = weights @ value[b, seen, h // group] / weights.sum()
      log_sum[b, p, h] = np.log(weights.sum())
  return output, log_sum


@implementations
def test_attention_is_the_softmax_over_what_is_visible(implementation):
  heads = tuple(head for pattern in NAMED for head in pattern.heads)
  for boundary in patterns.BOUNDARIES:
    pattern = patterns.AttentionPattern(heads, boundary)
    query, key, value = _inputs(heads=len(heads), kv_heads=len(heads) // 2)
    output, log_sum = _jitted(
      query, key, value, pattern, implementation=implementation
    )
    expected = _by_hand(query, key, value, pattern.visible(SEQ_LEN), 8**-0.5)
    np.testing.assert_allclose(output, expected[0], atol=2e-6)
    np.testing.assert_allclose(log_sum, expected[1], atol=2e-6)


@implementations
def test_patterns_combine_by_their_log_sum_exp(implementation):
  query, key, value = _inputs()
  parts = (
    patterns.dilated(HEADS, 4, 1),
    patterns.dilated(HEADS, 8, 2),
    patterns.dilated(HEADS, 16, 4),
  )
  counts = sum(p.visible(SEQ_LEN).astype(int) for p in parts)
  output, log_sum = _jitted(
    query, key, value, parts, scale=0.7, implementation=implementation
  )
  expected = _by_hand(query, key, value, counts, 0.7)
  np.testing.assert_allclose(output, expected[0], atol=2e-6)
  np.testing.assert_allclose(log_sum, expected[1], atol=2e-6)


def test_a_mixture_may_be_a_tuple_or_a_list():
  query, key, value = _inputs()
  parts = (patterns.local(HEADS, 4), patterns.dna(HEADS, 3, 2))
  results = [
    _jitted(query, key, value, mixture, implementation="reference")
    for mixture in (patterns.mixture(*parts), parts)
  ]
  results.append(
    scca_jax.attention(
      query,
      key,
      value,
      list(parts),
      implementation="reference",
      return_lse=True,
    )
  )
  for result in results[1:]:
    for a, b in zip(result, results[0], strict=True):
      np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize(
  "pattern",
  [
    patterns.scca_fixed(HEADS, 4),
    patterns.mixture(patterns.local(HEADS, 4), patterns.sda(HEADS, 2)),
  ],
  ids=["pattern", "mixture"],
)
def test_transformations_take_patterns_as_arguments(pattern):
  query, key, value = _inputs()
  expected = scca_jax.attention(query, key, value, pattern)
  assert jax.tree.leaves(pattern) == []
  for attend in (
    jax.jit(scca_jax.attention),
    jax.checkpoint(scca_jax.attention),
  ):
    np.testing.assert_allclose(
      attend(query, key, value, pattern), expected, atol=2e-6
    )
  one_by_one = jax.vmap(scca_jax.attention, in_axes=(0, 0, 0, None))
  output = one_by_one(*(x[:, None] for x in (query, key, value)), pattern)
  np.testing.assert_allclose(output[:, 0], expected, atol=2e-6)


@implementations
def test_mixtures_that_serve_nobody_have_no_gradient(implementation):
  query, key, value = _inputs()
  # Head 1 serves odd queries only, in both parts.
  parts = (patterns.dilated(HEADS, 4, 2), patterns.dilated(HEADS, 8, 2))

  def loss(query, key, value):
    output = scca_jax.attention(
      query, key, value, parts, implementation=implementation
    )
    return jnp.sum(output**2)

  grads = jax.jit(jax.grad(loss, (0, 1, 2)))(query, key, value)
  assert all(bool(jnp.all(jnp.isfinite(g))) for g in grads)
  assert not np.any(grads[0][:, ::2, 1])
  # Position 3 is served and has more than one key to choose from.
  assert np.any(grads[0][:, 3, 1])


def _leaks(pattern, implementation):
  """Whether any output depends on a later key or value."""
  query, key, value = _inputs()

  def outputs(key, value):
    return jnp.sum(
      scca_jax.attention(
        query, key, value, pattern, implementation=implementation
      )
      ** 2,
      axis=(0, 2, 3),
    )

  for jacobian in jax.jit(jax.jacrev(outputs, (0, 1)))(key, value):
    by_position = np.abs(jacobian).sum(axis=(1, 3, 4))  # [seq, kv_seq]
    assert np.isfinite(by_position).all()
    if np.triu(by_position, 1).any():
      return True
  return False


@implementations
@pytest.mark.parametrize("boundary", patterns.BOUNDARIES)
def test_no_gradient_comes_from_the_future(implementation, boundary):
  heads = tuple(head for pattern in NAMED for head in pattern.heads)
  # Four heads at a time would be a compilation each: all at once.
  pattern = patterns.AttentionPattern(heads, boundary)
  query, key, value = _inputs(heads=len(heads), kv_heads=len(heads) // 2)

  def loss_of(position):
    def loss(key, value):
      output = scca_jax.attention(
        query, key, value, pattern, implementation=implementation
      )
      return jnp.sum(jnp.take(output, position, axis=1) ** 2)

    return jax.grad(loss, (0, 1))(key, value)

  loss_of = jax.jit(loss_of)
  for position in range(SEQ_LEN):
    for gradient in loss_of(position):
      assert np.isfinite(gradient).all()
      assert not np.any(gradient[:, position + 1 :])


@implementations
def test_slot_causality_leaks_as_it_is_known_to(implementation):
  pattern = dataclasses.replace(patterns.s2(HEADS, 4), causality="slot")
  assert _leaks(pattern, implementation)
  assert not _leaks(patterns.s2(HEADS, 4), implementation)


@implementations
def test_decoding_gives_the_rows_of_the_whole(implementation):
  query, key, value = _inputs()
  segment_ids = jnp.asarray([[1] * 5 + [2] * 6 + [0] * 2, [3] * SEQ_LEN])
  pattern = patterns.mix(
    patterns.scca_fixed(2, 4),
    patterns.sda(2, 2),
  )

  @jax.jit
  def run(query, offset):
    return scca_jax.attention(
      query,
      key,
      value,
      pattern,
      segment_ids=segment_ids,
      query_offset=offset,
      implementation=implementation,
      return_lse=True,
    )

  whole = run(query, 0)
  for offset in range(SEQ_LEN - 2):
    part = run(query[:, offset : offset + 3], offset)
    for a, b in zip(part, whole, strict=True):
      np.testing.assert_allclose(a, b[:, offset : offset + 3], atol=2e-6)


def test_the_default_is_one_of_the_implementations():
  query, key, value = _inputs()
  pattern = patterns.longmixed(HEADS, 4)
  results = [
    _jitted(query, key, value, pattern, implementation=name)[0]
    for name in (None, *EVERYWHERE)
  ]
  for result in results[1:]:
    np.testing.assert_allclose(results[0], result, atol=2e-6)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"query": jnp.zeros((2, 13, 4))}, "query"),
    ({"query": jnp.zeros((2, 13, 4, 8), jnp.int32)}, "int32"),
    ({"key": jnp.zeros((2, 13, 2, 8), jnp.float16)}, "float16"),
    ({"key": jnp.zeros((2, 12, 2, 8))}, "key and value"),
    ({"query": jnp.zeros((3, 13, 4, 8))}, "batch"),
    ({"query": jnp.zeros((2, 13, 5, 8))}, "5 query heads.*2"),
    ({"pattern": patterns.dense(3)}, "3 heads"),
    ({"pattern": ()}, "empty sequence"),
    ({"pattern": "dense"}, "'dense'"),
    ({"segment_ids": jnp.zeros((2, 12), jnp.int32)}, "segment_ids"),
    ({"segment_ids": jnp.zeros((2, 13))}, "float32"),
    ({"query_offset": 1}, "query_offset=1"),
    ({"query_offset": 0.5}, "0.5"),
    ({"implementation": "cuda"}, "'cuda'.*mosaic"),
  ],
)
def test_calls_that_do_not_fit_are_refused(change, said):
  query, key, value = _inputs()
  call = {"query": query, "key": key, "value": value} | {
    "pattern": patterns.dense(HEADS)
  }
  with pytest.raises(ValueError, match=said):
    scca_jax.attention(**(call | change))


@pytest.mark.parametrize("name", ["cudnn", "triton", "mosaic"])
def test_without_a_gpu_its_implementations_say_what_there_is(name):
  query, key, value = _inputs()
  with pytest.raises(NotImplementedError, match=f"{name}.*is cpu.*xla"):
    scca_jax.attention(
      query, key, value, patterns.dense(HEADS), implementation=name
    )


def test_falling_back_is_told_once(caplog):
  query, key, value = _inputs()
  pattern = patterns.scca_fixed(HEADS, 5)
  registry._log_once.cache_clear()
  # Kernels serve 16-bit inputs: a GPU computes float32 by XLA.
  with target.compile_for(target.Target("gpu", "a GPU", (9, 0), 132)):
    for _ in range(2):
      result = scca_jax.attention(query, key, value, pattern)
  told = [r.getMessage() for r in caplog.records if "falls back" in r.message]
  assert len(told) == 1
  assert "falls back to xla" in told[0]
  assert "mosaic serves" in told[0] and "float32" in told[0]
  expected = scca_jax.attention(
    query, key, value, pattern, implementation="xla"
  )
  np.testing.assert_array_equal(result, expected)


def test_nothing_is_told_where_the_best_serves(caplog):
  query, key, value = _inputs()
  registry._log_once.cache_clear()
  scca_jax.attention(query, key, value, patterns.dense(HEADS))
  assert not [r for r in caplog.records if "falls back" in r.message]


def test_implementations_are_tried_in_order(caplog):
  query, key, value = _inputs()
  pattern = patterns.scca_fixed(HEADS, 5)
  registry._log_once.cache_clear()
  attend = functools.partial(scca_jax.attention, query, key, value, pattern)
  np.testing.assert_array_equal(
    attend(implementation=("mosaic", "xla")), attend(implementation="xla")
  )
  assert "falls back to xla here: mosaic needs" in caplog.text
  with pytest.raises(
    NotImplementedError, match="mosaic needs.*; triton needs.*use one of xla"
  ):
    attend(implementation=["mosaic", "triton"])


@implementations
@pytest.mark.parametrize("shared", [False, True])
def test_attention_works_inside_a_checked_shard_map(implementation, shared):
  query, key, value = _inputs()
  pattern = patterns.mix(
    patterns.scca_fixed(2, 5),
    patterns.sda(1, 2),
    patterns.scca_near(1, 4, 4, sinks=2),
  )
  ids = jnp.asarray([[1] * 5 + [2] * 8, [3] * 10 + [0] * 3])
  mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
  # Shared keys are those of the first sequence, on both devices.
  keys_spec = P() if shared else P("x")

  def attend(query, key, value, ids):
    return scca_jax.attention(
      query, key, value, pattern, segment_ids=ids, implementation=implementation
    )

  def sharded(*arrays):
    if shared:
      arrays = (arrays[0], *(x[:1] for x in arrays[1:]))
    return jax.shard_map(
      attend,
      mesh=mesh,
      in_specs=(P("x"), *[keys_spec] * 3),
      out_specs=P("x"),
      check_vma=True,
    )(*arrays)

  def plain(*arrays):
    if shared:
      arrays = (arrays[0], *(jnp.repeat(x[:1], 2, 0) for x in arrays[1:]))
    return attend(*arrays)

  results = [
    jax.jit(
      jax.value_and_grad(
        lambda q, k, v, way=way: jnp.sum(jnp.sin(way(q, k, v, ids))), (0, 1, 2)
      )
    )(query, key, value)
    for way in (sharded, plain)
  ]
  for a, b in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_kernels_leave_a_checked_shard_map_to_xla():
  x = jnp.zeros((2, SEQ_LEN, HEADS, 64), jnp.bfloat16)
  mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
  attend = functools.partial(
    scca_jax.attention,
    pattern=patterns.dense(HEADS),
    implementation=("mosaic", "triton"),
  )
  with (
    target.compile_for(target.Target("gpu", "a GPU", (9, 0), 132)),
    pytest.raises(NotImplementedError, match="shard_map with check_vma=True"),
  ):
    jax.shard_map(attend, mesh=mesh, in_specs=(P("x"),) * 3, out_specs=P("x"))(
      x, x, x
    )


@implementations
def test_sinks_are_the_first_tokens_of_each_segment(implementation):
  query, key, value = _inputs()
  ids = np.array([[1] * 6 + [2] * 5 + [0] * 2, [3] * 4 + [1] * 9])
  output, log_sum = _jitted(
    query, key, value, UNION, segment_ids=ids, implementation=implementation
  )
  for row, bounds in enumerate(([0, 6, 11], [0, 4, 13])):
    for first, last in zip(bounds, bounds[1:], strict=False):
      seen = np.zeros((HEADS, SEQ_LEN, SEQ_LEN), bool)
      for h, head in enumerate(UNION.heads):
        for p in range(first, last):
          for k in range(first, p + 1):
            plain = dataclasses.replace(head, sinks=0).seen(
              np.array(p), np.array(k), SEQ_LEN
            )
            seen[h, p, k] = plain or k - first < head.sinks
      expected = _by_hand(
        *(x[row : row + 1] for x in (query, key, value)), seen, 8**-0.5
      )
      span = slice(first, last)
      for a, b in zip((output, log_sum), expected, strict=True):
        np.testing.assert_allclose(a[row, span], b[0, span], atol=2e-6)
  assert not np.any(output[0, 11:])
