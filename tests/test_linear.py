"""The linear layer and its adapter, against explicit matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scca_jax.linear import Linear, apply_to_one
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


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_maps_of_one_input_are_those_of_each_by_itself(dropout):
  adapted = LoraConfig(rank=2, dropout=dropout)
  maps = [
    _linear(adapted),
    _linear(None, num_outputs=3),
    _linear(LoraConfig(rank=3, dropout=dropout), num_outputs=4),
  ]
  for i, linear in enumerate(maps):
    if linear.lora_b is not None:
      linear.lora_b[...] = _random(*linear.lora_b.shape, seed=i)
  rngs = list(jax.random.split(jax.random.key(0), 3))
  graphdef, state = nnx.split(maps)

  def alone(maps, x):
    return [m(x, rng) for m, rng in zip(maps, rngs, strict=True)]

  def together(maps, x):
    return apply_to_one(maps, x, rngs)

  def of(function):
    def total(state, x):
      results = function(nnx.merge(graphdef, state), x)
      return sum(jnp.sum(jnp.sin(y)) for y in results), results

    return jax.value_and_grad(total, (0, 1), has_aux=True)

  x = _random(2, 5, 6, seed=9)
  found = jax.tree.leaves(of(together)(state, x))
  wanted = jax.tree.leaves(of(alone)(state, x))
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
