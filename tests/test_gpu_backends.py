"""The GPU implementations against dense attention, on a GPU.

    JAX_PLATFORMS=cuda XLA_FLAGS=--xla_gpu_autotune_level=0 pytest -m gpu

Without that flag XLA times many kernels for each dense product of the
comparison, which takes most of the time. Every case compares outputs, the
log-sum-exp and every gradient, also through the log-sum-exp, with float32.
Twice the error of dense attention with products in the same dtype is allowed.
"""

import dataclasses
import functools

import attention_cases as cases
import jax.numpy as jnp
import numpy as np
import pytest

from scca_jax import attention, patterns, target
from scca_jax.backends import registry
from scca_jax.patterns import AttentionPattern, HeadPattern

pytestmark = pytest.mark.gpu

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
  "near": (
    patterns.scca_near(8, 256, 4, sinks=64),
    1000,
    128,
    4,
    BF16,
    {"batch": 2},
  ),
  "near, segments": (
    patterns.scca_near(8, 128, 8),
    1000,
    64,
    8,
    F16,
    {"segments": 5},
  ),
  "near, GQA": (patterns.scca_near(8, 200, 5), 1001, 128, 2, BF16, {}),
  "near, exact": (
    patterns.scca_near(4, 128, 8, sinks=200),
    1000,
    128,
    4,
    F16,
    {},
  ),
  "sinks beside all": (
    patterns.mix(
      AttentionPattern((HeadPattern(window=100, sinks=4),) * 4),
      patterns.sda(4, 3),
      patterns.scca_near(4, 128, 8, sinks=9),
    ),
    999,
    128,
    12,
    BF16,
    {},
  ),
  "flow, own chunk, local": (
    dataclasses.replace(
      patterns.scca_flow(8, 128, 8, own_chunk=True, sinks=5), boundary="local"
    ),
    1000,
    64,
    2,
    BF16,
    {},
  ),
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


def _skip_unless_it_runs(name):
  # The suite is for any GPU, but mosaic's kernels need a Hopper one.
  reason = registry.BACK_ENDS[name].refuses_device(target.current())
  if reason:
    pytest.skip(reason)


@pytest.fixture(params=["triton", "mosaic"])
def implementation(request):
  _skip_unless_it_runs(request.param)
  return request.param


def _segment_ids(segments, batch, seq_len):
  """Documents of random lengths, and padding after every third one."""
  random = np.random.default_rng(segments)
  cuts = np.sort(random.integers(0, seq_len, (batch, segments)), axis=1)
  positions = np.arange(seq_len)
  ids = [np.searchsorted(cut, positions, side="right") + 1 for cut in cuts]
  return jnp.asarray(np.stack(ids) % 4, jnp.int32)


def _inputs(case):
  """Returns the arrays of a case, and its segment ids."""
  pattern, seq_len, head_dim, kv_heads, dtype, more = case
  batch = more.get("batch", 1)
  query, *others, d_log_sum = cases.make_inputs(
    pattern.num_heads, seq_len, kv_heads, head_dim=head_dim, batch=batch
  )
  arrays = (more.get("size", 1) * query, *others)
  ids = None
  if "segments" in more:
    ids = _segment_ids(more["segments"], batch, seq_len)
  return (*(x.astype(dtype) for x in arrays), d_log_sum), ids


def _attend(implementation, return_lse=True, **settings):
  attend = functools.partial(
    attention,
    implementation=implementation,
    return_lse=return_lse,
    **settings,
  )
  return attend if return_lse else lambda *x, **more: (attend(*x, **more), None)


def _check(attend, case):
  pattern = case[0]
  inputs, ids = _inputs(case)
  found = cases.run(inputs, ids, attend=attend, pattern=pattern)
  has_log_sum = "log_sum" in found
  if not has_log_sum:
    inputs = (*inputs[:4], jnp.zeros_like(inputs[4]))
  wide = tuple(x.astype(jnp.float32) for x in inputs)
  truth = cases.run(wide, ids, attend=cases.dense, pattern=pattern)
  rounded = cases.run(inputs, ids, attend=cases.dense, pattern=pattern)
  log_sum = np.asarray(truth.pop("log_sum"))
  empty = log_sum == -np.inf
  if has_log_sum:
    ours = np.asarray(found.pop("log_sum"))
    np.testing.assert_array_equal(ours == -np.inf, empty)
    np.testing.assert_allclose(
      ours[~empty], log_sum[~empty], rtol=1e-3, atol=1e-3
    )
  assert all(x.dtype == case[4] for x in found.values())
  # In the 2-norm.
  cases.compare_half(found, rounded, truth, order=2, slack=1e-6)
  for name in ("output", "d_query"):
    assert not np.any(np.asarray(found[name], np.float32)[empty]), name


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_as_exact_as_dense_attention(implementation, name):
  _check(_attend(implementation), CASES[name])


@pytest.mark.parametrize(
  "name",
  [
    *("scca_fixed", "fixed, GQA", "anything, local", "segments", "near"),
    "near, exact",
  ],
)
def test_deterministic_gradients_are_as_exact(name):
  _skip_unless_it_runs("mosaic")
  _check(_attend("mosaic", deterministic=True), CASES[name])


def test_deterministic_gradients_have_the_same_bits(implementation):
  inputs = cases.make_inputs(8, 4096, 8, head_dim=128, batch=1)
  inputs = (*(x.astype(BF16) for x in inputs[:4]), inputs[4])
  gradients = functools.partial(
    cases.run,
    inputs,
    attend=_attend(implementation, deterministic=True),
    pattern=patterns.scca_fixed(8, 1024),
  )
  first = gradients()
  for _ in range(100):
    again = gradients()
    assert all(jnp.array_equal(x, again[name]) for name, x in first.items())


@pytest.mark.parametrize(
  "name", ["dense", "local", "sliding", "s2", "fixed, GQA", "flow, local"]
)
def test_cudnn_is_as_exact_as_dense_attention(name):
  _skip_unless_it_runs("cudnn")
  _check(_attend("cudnn", return_lse=False), CASES[name])


@pytest.mark.parametrize(
  "name", ["longmixed, shared keys", "near", "large scores"]
)
def test_gradients_are_equal_in_every_run(implementation, name):
  attend = _attend(implementation, deterministic=True)
  inputs, ids = _inputs(CASES[name])
  first, second = (
    cases.run(inputs, ids, attend=attend, pattern=CASES[name][0])
    for _ in range(2)
  )
  for name, x in first.items():
    np.testing.assert_array_equal(x, second[name], err_msg=name)


def test_gradients_of_shared_keys_are_equal_in_every_run_by_xla():
  pattern = patterns.longmixed(16, 128).interleaved(2)
  inputs = cases.make_inputs(16, 1000, 2, head_dim=64)
  attend = _attend("xla", deterministic=True)
  first, second = (
    cases.run(inputs, attend=attend, pattern=pattern) for _ in range(2)
  )
  for name, x in first.items():
    np.testing.assert_array_equal(x, second[name], err_msg=name)


def test_transformations_change_nothing(implementation):
  inputs = cases.make_inputs(4, 500, head_dim=64, batch=3)
  cases.check_transformations(
    _attend(implementation, return_lse=True),
    1e-5,
    [x.astype(BF16) for x in inputs],
    patterns.longmixed(4, 128),
    segmented=False,
  )
