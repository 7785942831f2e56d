"""The linear layer and its adapter, against explicit matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scca_jax.linear import Linear
from scca_jax.lora import LoraConfig, LoraParam


def _linear(adapter, num_inputs=6, num_outputs=5, **settings):
  return Linear(
    num_inputs,
    num_outputs,
    lora=adapter,
    stddev=0.5,
    rngs=nnx.Rngs(0),
    **settings,
  )


def _random(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
  ("rslora", "scaling"), [(False, 12.0 / 4), (True, 12.0 / 2)]
)
def test_adapter_adds_its_scaled_product(rslora, scaling):
  linear = _linear(LoraConfig(rank=4, alpha=12.0, rslora=rslora))
  assert linear.lora_b is not None
  linear.lora_b[...] = _random(4, 5)
  x = _random(2, 3, 6, seed=1)
  kernel, a, b = (
    np.asarray(p[...], np.float64)
    for p in (linear.kernel, linear.lora_a, linear.lora_b)
  )
  np.testing.assert_allclose(
    linear(x), np.asarray(x) @ (kernel + scaling * a @ b), atol=1e-5
  )


def test_new_adapter_changes_nothing():
  x = _random(4, 6)
  np.testing.assert_array_equal(
    _linear(LoraConfig(rank=2))(x), _linear(None)(x)
  )


def test_without_adapter_there_are_no_arrays_for_it():
  assert len(jax.tree.leaves(nnx.state(_linear(None)))) == 1
  assert not jax.tree.leaves(nnx.state(_linear(None), LoraParam))


def test_adapters_stay_float32_and_the_product_has_the_compute_dtype():
  linear = _linear(
    LoraConfig(rank=2), dtype=jnp.bfloat16, param_dtype=jnp.float16
  )
  assert linear.kernel.dtype == jnp.float16
  assert linear.lora_a is not None and linear.lora_b is not None
  assert linear.lora_a.dtype == linear.lora_b.dtype == jnp.float32
  assert linear(_random(3, 6)).dtype == jnp.bfloat16


def test_dropout_is_on_the_adapters_input_only():
  size, rate = 200, 0.25
  linear = _linear(LoraConfig(rank=size, alpha=size, dropout=rate), size, size)
  assert linear.lora_a is not None and linear.lora_b is not None
  linear.lora_a[...] = linear.lora_b[...] = jnp.eye(size)
  x = jnp.ones((5, size))
  base = x @ linear.kernel[...]
  np.testing.assert_allclose(linear(x), base + 1, rtol=1e-4, atol=1e-4)
  added = np.asarray(linear(x, jax.random.key(3)) - base)
  dropped = np.isclose(added, 0, atol=1e-4)
  np.testing.assert_allclose(added[~dropped], 1 / (1 - rate), rtol=1e-4)
  np.testing.assert_allclose(dropped.mean(), rate, atol=0.06)
