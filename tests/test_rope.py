"""Rotary positions against hand-computed numbers and written-out formulas."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from scca_jax import rope
from scca_jax.rope import RopeScaling


def _plain(head_dim, theta):
  return np.array([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)])


def _random(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _rotate(x, positions, inv_freq, factor=1.0):
  """RoPE as a rotation of complex numbers, in float64."""
  half = x.shape[-1] // 2
  z = np.asarray(x[..., :half], np.float64) + 1j * np.asarray(x[..., half:])
  angles = np.asarray(positions, np.float64)[:, :, None, None] * inv_freq
  z = z * np.exp(1j * angles) * factor
  return np.concatenate([z.real, z.imag], axis=-1)


def test_frequencies_are_those_of_roformer():
  inv_freq, factor = rope.frequencies(4, 100.0, None, 8)
  np.testing.assert_allclose(inv_freq, [1.0, 0.1], rtol=1e-6)
  assert inv_freq.dtype == np.float32
  assert factor == 1.0


def test_pairs_are_half_a_head_apart():
  x = jnp.asarray([1.0, 0.0, 0.0, 2.0])[None, None, None]
  angle = np.array([1.0, 0.1]) * 3
  rotated = rope.apply(x, jnp.asarray([[3]]), np.array([1.0, 0.1]))
  np.testing.assert_allclose(
    rotated[0, 0, 0],
    [
      math.cos(angle[0]),
      -2 * math.sin(angle[1]),
      math.sin(angle[0]),
      2 * math.cos(angle[1]),
    ],
    rtol=1e-6,
  )


def test_each_sequence_is_rotated_by_its_own_positions():
  x = _random(2, 5, 3, 8)
  positions = np.array([[0, 1, 2, 3, 4], [7, 0, 30, 2, 2]])
  inv_freq, _ = rope.frequencies(8, 10000.0, None, 5)
  np.testing.assert_allclose(
    rope.apply(x, jnp.asarray(positions), inv_freq, 1.5),
    _rotate(x, positions, _plain(8, 10000.0), 1.5),
    atol=1e-5,
  )


def test_scores_depend_on_the_distance_only():
  query, key = _random(1, 1, 1, 16), _random(1, 1, 1, 16, seed=1)
  inv_freq, _ = rope.frequencies(16, 10000.0, None, 1)

  def score(p, k):
    q_rotated = rope.apply(query, jnp.asarray([[p]]), inv_freq)
    k_rotated = rope.apply(key, jnp.asarray([[k]]), inv_freq)
    return float(jnp.vdot(q_rotated, k_rotated))

  np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-4)
  np.testing.assert_allclose(score(9, 4), score(5, 0), rtol=1e-4)
  assert abs(score(9, 4) - score(9, 3)) > 1e-2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rotation_is_computed_in_float32(dtype):
  x = _random(1, 3, 2, 8).astype(dtype)
  positions = np.array([[4001, 4003, 8191]])
  inv_freq, _ = rope.frequencies(8, 10000.0, None, 3)
  rotated = rope.apply(x, jnp.asarray(positions), inv_freq)
  assert rotated.dtype == dtype
  expected = _rotate(x.astype(jnp.float32), positions, _plain(8, 10000.0))
  # One rounding of the result, and float32's of the angle.
  np.testing.assert_allclose(
    np.asarray(rotated, np.float32), expected, rtol=2.0**-8, atol=4e-3
  )


def test_linear_equals_positions_divided_by_the_factor():
  x = _random(1, 6, 1, 8)
  scaling = RopeScaling(kind="linear", factor=4.0)
  inv_freq, factor = rope.frequencies(8, 10000.0, scaling, 24)
  positions = np.arange(6)[None] * 4
  assert factor == 1.0
  np.testing.assert_allclose(
    rope.apply(x, jnp.asarray(positions), inv_freq),
    _rotate(x, positions / 4, _plain(8, 10000.0)),
    atol=1e-5,
  )


def test_ntk_keeps_the_first_pair_and_stretches_the_last_by_the_factor():
  plain = _plain(16, 10000.0)
  scaling = RopeScaling(kind="ntk", factor=4.0)
  inv_freq, factor = rope.frequencies(16, 10000.0, scaling, 999)
  assert factor == 1.0
  np.testing.assert_allclose(
    inv_freq, _plain(16, 10000.0 * 4.0 ** (16 / 14)), rtol=1e-6
  )
  np.testing.assert_allclose(inv_freq[0], plain[0])
  np.testing.assert_allclose(inv_freq[-1], plain[-1] / 4, rtol=1e-6)


def test_dynamic_changes_nothing_within_the_pretrained_length():
  scaling = RopeScaling(
    kind="dynamic", factor=2.0, original_max_position_embeddings=64
  )
  for seq_len in (1, 64):
    inv_freq, _ = rope.frequencies(16, 10000.0, scaling, seq_len)
    np.testing.assert_allclose(inv_freq, _plain(16, 10000.0), rtol=1e-6)


def test_dynamic_stretches_with_the_length():
  scaling = RopeScaling(
    kind="dynamic", factor=2.0, original_max_position_embeddings=64
  )
  # 2 * 128 / 64 - (2 - 1) = 3.
  inv_freq, _ = rope.frequencies(16, 10000.0, scaling, 128)
  np.testing.assert_allclose(
    inv_freq, _plain(16, 10000.0 * 3.0 ** (16 / 14)), rtol=1e-6
  )


# Of Llama 2: 32 turns within 4,096 tokens fall on pair 20.94, one on 45.03.
YARN = {
  "kind": "yarn",
  "factor": 4.0,
  "original_max_position_embeddings": 4096,
}


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones():
  plain = _plain(128, 10000.0)
  inv_freq, factor = rope.frequencies(128, 10000.0, RopeScaling(**YARN), 16384)
  np.testing.assert_allclose(inv_freq[:21], plain[:21], rtol=1e-6)
  np.testing.assert_allclose(inv_freq[46:], plain[46:] / 4, rtol=1e-6)
  # Half way between 20 and 46: the mean of both.
  np.testing.assert_allclose(inv_freq[33], plain[33] * 5 / 8, rtol=1e-6)
  np.testing.assert_allclose(factor, 0.1 * math.log(4) + 1)


def test_yarn_bounds_can_lie_between_pairs():
  plain = _plain(128, 10000.0)
  low = 64 * math.log(4096 / (64 * math.pi)) / math.log(10000)
  high = 64 * math.log(4096 / (2 * math.pi)) / math.log(10000)
  np.testing.assert_allclose([low, high], [20.94, 45.03], atol=0.01)
  ramp = np.clip((np.arange(64) - low) / (high - low), 0, 1)
  inv_freq, _ = rope.frequencies(
    128, 10000.0, RopeScaling(**YARN, truncate=False), 16384
  )
  np.testing.assert_allclose(
    inv_freq, plain * (1 - ramp) + plain / 4 * ramp, rtol=1e-6
  )


@pytest.mark.parametrize(
  ("settings", "expected"),
  [
    ({"attention_factor": 0.7}, 0.7),
    (
      {"mscale": 0.5, "mscale_all_dim": 2.0},
      (0.05 * math.log(4) + 1) / (0.2 * math.log(4) + 1),
    ),
    # One of the two alone is ignored, as in transformers.
    ({"mscale": 0.5}, 0.1 * math.log(4) + 1),
    ({"factor": 1.0}, 1.0),
  ],
)
def test_yarn_attention_factor(settings, expected):
  scaling = RopeScaling(**(YARN | settings))
  _, factor = rope.frequencies(128, 10000.0, scaling, 1)
  np.testing.assert_allclose(factor, expected)


def test_llama3_follows_the_definition_pair_by_pair():
  theta, factor, low, high, length = 500000.0, 8.0, 1.0, 4.0, 8192
  scaling = RopeScaling(
    kind="llama3", factor=factor, original_max_position_embeddings=length
  )
  inv_freq, attention = rope.frequencies(128, theta, scaling, 1)
  assert attention == 1.0
  kinds = set()
  for got, plain in zip(inv_freq, _plain(128, theta), strict=True):
    wavelength = 2 * math.pi / plain
    if wavelength < length / high:
      kinds.add("kept")
      expected = plain
    elif wavelength > length / low:
      kinds.add("divided")
      expected = plain / factor
    else:
      kinds.add("between")
      smooth = (length / wavelength - low) / (high - low)
      expected = (1 - smooth) * plain / factor + smooth * plain
    np.testing.assert_allclose(got, expected, rtol=1e-6)
  assert kinds == {"kept", "between", "divided"}


@pytest.mark.parametrize("kind", rope.KINDS)
def test_a_factor_of_one_changes_nothing(kind):
  scaling = RopeScaling(kind=kind, original_max_position_embeddings=64)
  inv_freq, factor = rope.frequencies(16, 10000.0, scaling, 64)
  np.testing.assert_allclose(inv_freq, _plain(16, 10000.0), rtol=1e-6)
  assert factor == 1.0


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"kind": "bent"}, "unknown rope scaling 'bent'.*linear, dynamic"),
    ({"kind": "linear", "factor": 0.5}, "at least 1, got 0.5"),
    ({"kind": "linear", "factor": math.nan}, "got nan"),
    ({"kind": "yarn", "factor": 2.0}, "yarn.*original_max_position"),
    ({"kind": "dynamic"}, "dynamic.*original_max_position"),
    ({"kind": "llama3"}, "llama3.*original_max_position"),
    ({"kind": "ntk", "original_max_position_embeddings": 0}, "got 0"),
    (YARN | {"beta_slow": 40.0}, "beta_slow=40"),
    (YARN | {"attention_factor": 0.0}, "attention_factor.*got 0"),
    ({"kind": "ntk", "low_freq_factor": 4.0}, "low_freq_factor"),
  ],
)
def test_impossible_scalings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message) as error:
    RopeScaling(**settings)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("head_dim", "theta", "kind", "message"),
  [
    (7, 10.0, None, "head_dim.*7"),
    (0, 10.0, None, "head_dim.*0"),
    (4, 1.0, None, "theta.*1.0"),
    (2, 10.0, "ntk", "ntk.*head_dim above 2"),
  ],
)
def test_impossible_frequencies_are_refused(head_dim, theta, kind, message):
  scaling = None if kind is None else RopeScaling(kind=kind, factor=2.0)
  with pytest.raises(ValueError, match=message):
    rope.frequencies(head_dim, theta, scaling, 8)
