"""A training step on two GPUs against the same step on one.

    JAX_PLATFORMS=cuda pytest -m gpu tests/test_gpu_mesh.py

What XLA makes of a program for several GPUs is not what it makes for several
CPUs, on which `test_sharding` runs: a gradient was wrong on these alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from scca_jax import lora, patterns, sharding, training
from scca_jax.llama import Llama, LlamaConfig

pytestmark = pytest.mark.gpu

CONFIG = LlamaConfig(
  vocab_size=512,
  hidden_size=256,
  intermediate_size=512,
  num_layers=2,
  num_heads=4,
  num_kv_heads=4,
  head_dim=64,
  context_len=1024,
)
LORA = lora.LoraConfig(rank=8)
BATCH, SEQ = 8, 1024
# Makes of a step its gradients, without much rounding.
SCALE = 1000.0


def _batch():
  rng = np.random.default_rng(0)
  # As in text, some tokens occur often.
  tokens = rng.zipf(1.3, (BATCH, SEQ + 1)) % CONFIG.vocab_size
  tokens = tokens.astype(np.int32)
  return {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "mask": np.ones((BATCH, SEQ), np.float32),
  }


@functools.cache
def _gradients(**sizes):
  """Returns the loss of a step of two micro batches, and its gradients."""
  mesh = sharding.make_mesh(sharding.MeshConfig(**sizes))
  model = Llama(CONFIG, lora=LORA, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  graphdef, params, frozen = nnx.split(model, lora.trainable(LORA), ...)
  before = jax.device_get(params)
  params, frozen = sharding.place((params, frozen), mesh)
  rule = optax.scale(-SCALE)
  state = training.init_state(params, rule, "bfloat16", mesh)
  config = training.StepConfig(
    patterns=patterns.scca_fixed(CONFIG.num_heads, 256),
    num_micro_batches=2,
    remat="layer",
    dtype="bfloat16",
    mesh=mesh,
  )
  step = training.compile_step(graphdef, rule, config, state, frozen)
  batch = sharding.place_batch(_batch(), mesh, BATCH)
  state, metrics = step(state, frozen, batch)
  gradients = jax.tree.map(
    lambda old, new: (old - np.asarray(new)) / SCALE, before, state.params
  )
  return float(metrics["loss"]), gradients


@pytest.mark.parametrize("axis", sharding.AXES)
def test_gradients_on_two_gpus_are_those_of_one(axis):
  if len(jax.devices()) < 2:
    pytest.skip("needs two GPUs")
  expected_loss, expected = _gradients()
  loss, gradients = _gradients(**{axis: 2})
  assert loss == pytest.approx(expected_loss, rel=1e-4)
  paths = jax.tree_util.tree_flatten_with_path(expected)[0]
  for (path, b), a in zip(paths, jax.tree.leaves(gradients), strict=True):
    # bfloat16, summed in another order.
    error = np.linalg.norm(a - b)
    assert error <= 0.03 * np.linalg.norm(b), jax.tree_util.keystr(path)
