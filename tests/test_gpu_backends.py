"""The GPU implementations against dense attention, on a GPU.

    JAX_PLATFORMS=cuda XLA_FLAGS=--xla_gpu_autotune_level=0 pytest -m gpu

Without that flag XLA times many kernels for each dense product that is compared
with, which takes most of the time.
Every case compares outputs, the log-sum-exp and every gradient, also through
the log-sum-exp, with float32; what is allowed is twice the error of a dense
attention with products of the dtype.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scca_jax import attention, patterns, target
from scca_jax.patterns import AttentionPattern, HeadPattern

pytestmark = pytest.mark.gpu

# Smallest compute capability of each.
LEAST = {"triton": (8, 0), "mosaic": (9, 0)}
NAMES = ("output", "d_query", "d_key", "d_value")
BF16, F16 = jnp.bfloat16, jnp.float16
ODD = AttentionPattern(
  (
    HeadPattern(chunk_size=100, offset=37, shift=61),
    HeadPattern(chunk_size=300, shift=555),
    HeadPattern(chunk_size=77, shift=7, window=30),
    HeadPattern(),
  ),
  "local",
)
# Pattern, tokens, head_dim, key heads, dtype and what else differs.
CASES = {
  "dense": (patterns.dense(4), 1500, 128, 2, BF16, {}),
  "local": (patterns.local(4, 256), 1024, 64, 4, F16, {}),
  "sliding": (patterns.sliding(4, 200), 1000, 128, 1, BF16, {}),
  "s2": (patterns.s2(8, 256), 1000, 64, 8, BF16, {}),
  "scca_fixed": (patterns.scca_fixed(8, 512), 2048, 128, 8, BF16, {}),
  "fixed, GQA": (
    patterns.scca_fixed(8, 256),
    1000,
    128,
    2,
    BF16,
    {"batch": 2},
  ),
  "scca_flow": (patterns.scca_flow(32, 256, 8), 2048, 128, 32, BF16, {}),
  "flow, local": (
    dataclasses.replace(patterns.scca_flow(16, 256, 4), boundary="local"),
    1000,
    64,
    4,
    F16,
    {},
  ),
  "dilated": (patterns.dilated(8, 256, 4), 1024, 128, 8, BF16, {}),
  "dna": (patterns.dna(4, 40, 3), 777, 128, 1, BF16, {}),
  "sda": (patterns.sda(8, 4), 1001, 64, 4, BF16, {}),
  "sda in chunks, local": (
    dataclasses.replace(patterns.sda(8, 4, chunk_size=100), boundary="local"),
    999,
    128,
    8,
    F16,
    {},
  ),
  "longmixed": (
    dataclasses.replace(patterns.longmixed(8, 256), boundary="local"),
    1024,
    128,
    4,
    BF16,
    {},
  ),
  "longmixed, shared keys": (
    patterns.longmixed(8, 128).interleaved(2),
    1000,
    64,
    2,
    BF16,
    {},
  ),
  "anything, local": (ODD, 1111, 128, 2, BF16, {"batch": 2}),
  "short": (patterns.scca_fixed(2, 4), 9, 64, 1, BF16, {}),
  "large scores": (patterns.scca_fixed(4, 256), 1024, 64, 4, F16, {"size": 60}),
  "segments": (
    patterns.scca_fixed(8, 256),
    1000,
    128,
    4,
    BF16,
    {"segments": 6},
  ),
  "segments, dilated": (
    patterns.longmixed(8, 300),
    1700,
    64,
    4,
    BF16,
    {"segments": 4, "batch": 2},
  ),
  "segments, local": (
    AttentionPattern((*ODD.heads, *patterns.sda(4, 3).heads), "local"),
    1300,
    64,
    8,
    F16,
    {"segments": 9},
  ),
}


@pytest.fixture(params=LEAST)
def implementation(request):
  capability = target.current().compute_capability
  if capability < LEAST[request.param] or (
    request.param == "mosaic" and capability[0] != 9
  ):
    pytest.skip(f"{request.param} does not run on {target.current().kind}")
  return request.param


def _segment_ids(segments, batch, seq_len):
  """Documents of random lengths, and padding after every third one."""
  random = np.random.default_rng(segments)
  cuts = np.sort(random.integers(0, seq_len, (batch, segments)), axis=1)
  positions = np.arange(seq_len)
  ids = [np.searchsorted(cut, positions, side="right") + 1 for cut in cuts]
  return jnp.asarray(np.stack(ids) % 4, jnp.int32)


def _dense(query, key, value, seen, scale, dtype):
  """Returns dense attention with products of the dtype."""
  group_size = query.shape[2] // key.shape[2]
  query, key, value = (x.astype(dtype) for x in (query, key, value))
  key, value = (jnp.repeat(x, group_size, axis=2) for x in (key, value))
  product = functools.partial(
    jnp.einsum, preferred_element_type=jnp.float32, precision="highest"
  )
  scores = scale * product("bqhd,bkhd->bhqk", query, key)
  scores = jnp.where(seen, scores, -1e30)
  top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
  weights = jnp.where(seen, jnp.exp(scores - top), 0)
  total = weights.sum(axis=-1, keepdims=True)
  total = jnp.where(total == 0, 1, total)
  output = product("bhqk,bkhd->bqhd", (weights / total).astype(dtype), value)
  log_sum = (top + jnp.log(total))[..., 0]
  return output, jnp.swapaxes(log_sum, 1, 2)


def _error(found, truth):
  """Returns the error in the 2-norm, relative to the truth."""
  found, truth = (np.asarray(x, np.float64) for x in (found, truth))
  assert np.isfinite(found).all()
  return np.linalg.norm(found - truth) / max(np.linalg.norm(truth), 1e-30)


def _check(implementation, case, with_log_sum=True, deterministic=False):
  pattern, seq_len, head_dim, kv_heads, dtype, more = case
  batch, size = more.get("batch", 1), more.get("size", 1)
  heads = pattern.num_heads
  random = np.random.default_rng(0)
  arrays = [
    jnp.asarray(
      factor * random.normal(size=(batch, seq_len, n, head_dim)), dtype
    )
    for n, factor in ((heads, size), (kv_heads, 1), (kv_heads, 1), (heads, 1))
  ]
  seen = jnp.asarray(pattern.visible(seq_len))[None]
  ids = None
  if "segments" in more:
    ids = _segment_ids(more["segments"], batch, seq_len)
    same = (ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, None, :]
    seen = seen & same[:, None]
  empty = np.asarray(~seen.any(axis=-1)).swapaxes(1, 2)
  empty = np.broadcast_to(empty, (batch, seq_len, heads))
  d_log_sum = random.normal(size=empty.shape)
  d_log_sum = jnp.asarray(np.where(empty, 0, d_log_sum), jnp.float32)
  d_log_sum = d_log_sum if with_log_sum else 0 * d_log_sum
  scale = head_dim**-0.5

  @jax.jit
  def ours(query, key, value, d_output):
    def attend(*x):
      return attention(
        *x,
        pattern,
        segment_ids=ids,
        implementation=implementation,
        return_lse=with_log_sum,
        deterministic=deterministic,
      )

    if not with_log_sum:
      output, vjp = jax.vjp(attend, query, key, value)
      return output, None, *vjp(d_output)
    (output, log_sum), vjp = jax.vjp(attend, query, key, value)
    return output, log_sum, *vjp((d_output, d_log_sum))

  @functools.partial(jax.jit, static_argnums=4)
  def dense(query, key, value, d_output, dtype):
    wide = [x.astype(jnp.float32) for x in (query, key, value)]
    attend = functools.partial(_dense, seen=seen, scale=scale, dtype=dtype)
    (output, log_sum), vjp = jax.vjp(attend, *wide)
    return output, log_sum, *vjp((d_output.astype(jnp.float32), d_log_sum))

  found = ours(*arrays)
  truth = dense(*arrays, jnp.float32)
  rounded = dense(*arrays, dtype)
  for i, name in zip((0, 2, 3, 4), NAMES, strict=True):
    assert found[i].dtype == dtype
    allowed = 2 * _error(rounded[i].astype(dtype), truth[i]) + 1e-6
    assert _error(found[i], truth[i]) <= allowed, name
  for i in (0, 2):
    assert not np.any(np.asarray(found[i], np.float32)[empty])
  if with_log_sum:
    log_sum = np.asarray(found[1])
    np.testing.assert_array_equal(log_sum == -np.inf, empty)
    np.testing.assert_allclose(
      log_sum[~empty], np.asarray(truth[1])[~empty], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_as_exact_as_dense_attention(implementation, name):
  _check(implementation, CASES[name])


@pytest.mark.parametrize(
  "name", ["scca_fixed", "fixed, GQA", "anything, local", "segments"]
)
def test_deterministic_gradients_are_as_exact(name):
  if target.current().compute_capability[0] != 9:
    pytest.skip(f"mosaic does not run on {target.current().kind}")
  _check("mosaic", CASES[name], deterministic=True)


def test_deterministic_gradients_have_the_same_bits(implementation):
  shape = 1, 4096, 8, 128
  random = np.random.default_rng(0)
  arrays = [jnp.asarray(random.normal(size=shape), BF16) for _ in range(4)]

  @jax.jit
  def gradients(*inputs, d_output):
    def attend(*x):
      return attention(
        *x,
        patterns.scca_fixed(8, 1024),
        implementation=implementation,
        deterministic=True,
      )

    return jax.vjp(attend, *inputs)[1](d_output)

  first = gradients(*arrays[:3], d_output=arrays[3])
  for _ in range(100):
    again = gradients(*arrays[:3], d_output=arrays[3])
    assert all(map(jnp.array_equal, first, again))


@pytest.mark.parametrize(
  "name", ["dense", "local", "sliding", "s2", "fixed, GQA", "flow, local"]
)
def test_cudnn_is_as_exact_as_dense_attention(name):
  if target.current().compute_capability < (8, 0):
    pytest.skip(f"cudnn does not run on {target.current().kind}")
  _check("cudnn", CASES[name], with_log_sum=False)


def test_transformations_change_nothing(implementation):
  pattern = patterns.longmixed(4, 128)
  random = np.random.default_rng(0)
  query, key, value = (
    jnp.asarray(random.normal(size=(3, 500, n, 64)), BF16) for n in (4, 2, 2)
  )

  def attend(*x):
    return attention(*x, pattern, implementation=implementation)

  def one_by_one(*x):
    return jax.vmap(attend)(*(y[:, None] for y in x))[:, 0]

  def loss(way, *x):
    return jnp.sum(jnp.sin(way(*x).astype(jnp.float32)))

  results = [
    jax.jit(jax.value_and_grad(functools.partial(loss, way), (0, 1, 2)))(
      query, key, value
    )
    for way in (attend, one_by_one, jax.checkpoint(attend))
  ]
  for result in results[1:]:
    for a, b in zip(
      jax.tree.leaves(results[0]), jax.tree.leaves(result), strict=True
    ):
      np.testing.assert_allclose(
        np.asarray(a, np.float32), np.asarray(b, np.float32), 1e-5, 1e-6
      )
