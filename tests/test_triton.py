"""The Triton kernels, interpreted on a CPU, against the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scca_jax import patterns
from scca_jax.backends import blocks, reference, triton
from scca_jax.backends.block_sizes import BlockSizes
from scca_jax.patterns import AttentionPattern, HeadPattern

NAMES = ("output", "log_sum", "d_query", "d_key", "d_value")
TOLERANCE = 2e-5
# The tests wait for the compiler, not for what it compiles.
QUICKLY = {"xla_backend_optimization_level": 0}


interpreted = functools.partial(triton.attention, interpret=True)


def _inputs(pattern, seq_len, *, kv_heads=None, size=1.0, head_dim=8):
  """Returns query, key, value and the cotangents of output and log-sum-exp."""
  random = np.random.default_rng(0)
  kv_heads = pattern.num_heads // 2 if kv_heads is None else kv_heads
  query_shape = (2, seq_len, pattern.num_heads, head_dim)
  key_shape = (2, seq_len, kv_heads, head_dim)
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


def _run(attention, pattern, inputs, segment_ids=None, **kwargs):
  """Returns outputs and gradients by name."""
  scale = kwargs.pop("scale", inputs[0].shape[-1] ** -0.5)

  def both(query, key, value, segment_ids):
    output, log_sum = attention(
      query,
      key,
      value,
      pattern,
      segment_ids=segment_ids,
      query_offset=0,
      scale=scale,
      **kwargs,
    )
    # -inf is no number to differentiate: whoever uses it leaves it out.
    return (output, jnp.where(log_sum > -jnp.inf, log_sum, 0.0)), log_sum

  def run(segment_ids, query, key, value, d_output, d_log_sum):
    (output, _), vjp, log_sum = jax.vjp(
      functools.partial(both, segment_ids=segment_ids),
      query,
      key,
      value,
      has_aux=True,
    )
    gradients = vjp((d_output.astype(output.dtype), d_log_sum))
    return dict(zip(NAMES, (output, log_sum, *gradients), strict=True))

  return jax.jit(run, compiler_options=QUICKLY)(segment_ids, *inputs)


def _check(pattern, inputs, segment_ids=None, **kwargs):
  """Compares outputs and gradients with the reference, and returns them."""
  result = _run(interpreted, pattern, inputs, segment_ids, **kwargs)
  kwargs.pop("sizes", None)
  expected = _run(reference.attention, pattern, inputs, segment_ids, **kwargs)
  for name in NAMES:
    np.testing.assert_allclose(
      result[name],
      expected[name],
      rtol=TOLERANCE,
      atol=TOLERANCE,
      err_msg=name,
    )
  return result


@pytest.mark.parametrize(
  ("boundary", "names", "seq_len", "segmented"),
  [
    (
      "drop",
      tuple(name for name in patterns.NAMES if name != "scca_near"),
      63,
      True,
    ),
    ("local", ("scca_fixed", "scca_flow", "sda", "longmixed"), 50, False),
  ],
)
def test_every_named_pattern_has_its_outputs_and_gradients(
  boundary, names, seq_len, segmented
):
  made = [
    patterns.make(name, num_heads=4, seq_len=seq_len, boundary=boundary)
    for name in names
  ]
  made.append(
    dataclasses.replace(
      patterns.sda(2, 3, chunk_size=seq_len // 3), boundary=boundary
    )
  )
  made.append(
    dataclasses.replace(
      patterns.sda(2, 2, window=seq_len // 5), boundary=boundary
    )
  )
  # All in one: a compilation serves them all, key heads are shared by two.
  pattern = patterns.mix(*made)
  _check(
    pattern,
    _inputs(pattern, seq_len),
    _segments(seq_len) if segmented else None,
  )


@pytest.mark.parametrize(("seq_len", "kv_heads"), [(1, 1), (100, 3)])
def test_lengths_need_not_fit(seq_len, kv_heads):
  pattern = AttentionPattern(
    (
      HeadPattern(chunk_size=16, offset=5, shift=9),
      HeadPattern(dilation=3, shift=4),
      HeadPattern(chunk_size=16, dilation=3, shift=18, window=4, select=1),
    ),
    boundary="local",
  )
  _check(pattern, _inputs(pattern, seq_len, kv_heads=kv_heads))


def test_long_chunks_take_many_blocks():
  seq_len = 200
  pattern = AttentionPattern(
    (
      HeadPattern(),
      HeadPattern(window=50),
      HeadPattern(chunk_size=160, offset=70, shift=90),
      HeadPattern(dilation=2, shift=1),
    )
  )
  sizes = triton.Sizes(
    BlockSizes(32, 16), BlockSizes(16, 32), BlockSizes(16, 16)
  )
  _check(pattern, _inputs(pattern, seq_len), sizes=sizes)


def test_scales_need_not_be_positive():
  pattern = patterns.local(1, 12)
  _check(pattern, _inputs(pattern, 20, kv_heads=1), scale=-0.7)


def test_drawn_patterns_have_their_outputs_and_gradients():
  random = np.random.default_rng(3)
  seq_len = 53
  heads = []
  for _ in range(12):
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
  pattern = AttentionPattern(tuple(heads), "local")
  _check(pattern, _inputs(pattern, seq_len, kv_heads=4), _segments(seq_len))


def _with_empty_rows(seq_len):
  return patterns.mix(
    patterns.scca_fixed(2, seq_len // 4),
    patterns.sda(2, 2),
    patterns.dilated(2, seq_len // 2, 2),
  )


def _dense(query, key, value, pattern, *, segment_ids, query_offset, scale):
  """Returns dense attention with products of the dtype."""
  seq_len, dtype = query.shape[1], query.dtype
  group_size = query.shape[2] // key.shape[2]
  key, value = (jnp.repeat(x, group_size, axis=2) for x in (key, value))
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  same = same & (segment_ids != 0)[:, None, :]
  seen = pattern.visible(seq_len)[None] & same[:, None]
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  scores = scale * product("bqhd,bkhd->bhqk", query, key)
  empty = ~seen.any(axis=3, keepdims=True)
  scores = jnp.where(seen | empty, scores, -jnp.inf)
  log_sum = jax.nn.logsumexp(scores, axis=3, keepdims=True)
  weights = jnp.where(empty, 0.0, jnp.exp(scores - log_sum))
  log_sum = jnp.where(empty, -jnp.inf, log_sum)
  output = product("bhqk,bkhd->bqhd", weights.astype(dtype), value)
  return output.astype(dtype), jnp.swapaxes(log_sum[..., 0], 1, 2)


# At 60 scores are many thousands.
@pytest.mark.parametrize(
  ("dtype", "size"), [(jnp.bfloat16, 1.0), (jnp.float16, 60.0)]
)
def test_half_precision_is_as_exact_as_dense(dtype, size):
  seq_len = 48
  pattern = _with_empty_rows(seq_len)
  *arrays, d_log_sum = _inputs(pattern, seq_len, size=size)
  halves = (*(x.astype(dtype) for x in arrays), d_log_sum)
  wide = (*(x.astype(jnp.float32) for x in halves[:4]), d_log_sum)
  ids = _segments(seq_len)
  truth = _run(reference.attention, pattern, wide, ids)
  dense = _run(_dense, pattern, halves, ids)
  result = _run(interpreted, pattern, halves, ids)
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


def test_queries_without_keys_get_exactly_nothing():
  seq_len = 48
  pattern = _with_empty_rows(seq_len)
  *inputs, d_log_sum = _inputs(pattern, seq_len)
  # The kernels do most for float16.
  inputs = (*(x.astype(jnp.float16) for x in inputs), d_log_sum)
  result = _run(interpreted, pattern, inputs, _segments(seq_len))
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


def test_transformations_change_nothing():
  seq_len = 30
  pattern = patterns.scca_fixed(4, 12)
  query, key, value, *_ = _inputs(pattern, seq_len)
  ids = _segments(seq_len)

  def attend(query, key, value, ids):
    return interpreted(
      query, key, value, pattern, segment_ids=ids, query_offset=0, scale=0.3
    )[0]

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
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_a_pass_is_few_launches_whatever_the_dilations(dtype, kv_heads, pass_):
  pattern = patterns.longmixed(8, 32)
  shapes = [(1, 64, heads, 8) for heads in (8, kv_heads, kv_heads)]
  arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]

  def attend(query, key, value):
    return interpreted(
      query, key, value, pattern, segment_ids=None, query_offset=0, scale=1.0
    )

  def gradients(query, key, value):
    output, vjp = jax.vjp(attend, query, key, value)
    return vjp(output)

  function = attend if pass_ == "forward" else gradients
  text = str(jax.make_jaxpr(function)(*arrays))
  assert text.count("= pallas_call[") == (1 if pass_ == "forward" else 3)
  # Inputs are neither padded nor gathered outside the kernels.
  assert "= pad[" not in text


@pytest.mark.parametrize("inverse", [False, True])
def test_long_programs_start_first(inverse):
  pattern = patterns.mix(patterns.dense(2), patterns.sda(2, 4))
  rules = tuple(blocks.Rule.of(head, "drop") for head in pattern.heads)
  table, counts = triton._make_table(
    rules, 2, 200, BlockSizes(16, 16), inverse, False
  )
  num_blocks = table[:, :, blocks.FIELD["num_blocks"]].sum(axis=1)
  assert table.shape[1] == counts.max() == (2 if inverse else 1)
  # A mask costs a quarter of a block.
  assert (np.diff(num_blocks) <= 0.25 * num_blocks[1:] + 1).all()
