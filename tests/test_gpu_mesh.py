"""A training step on two GPUs, or on four, against the same step on one.

    JAX_PLATFORMS=cuda,cpu pytest -m gpu tests/test_gpu_mesh.py

XLA compiles a program differently for several GPUs than for several CPUs, on
which `test_sharding` runs: a gradient was once wrong only on GPUs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from scca_jax import lora, patterns, sharding, training
from scca_jax.llama import Execution, Llama
from scca_jax.llama_config import LlamaConfig

# Not needed elsewhere: `test_sharding` compares on CPUs.
pytestmark = [
  pytest.mark.gpu,
  pytest.mark.skipif(
    jax.default_backend() != "gpu" or len(jax.devices()) < 2,
    reason="needs two GPUs",
  ),
]

NUM_GPUS = 4 if len(jax.devices()) >= 4 else 2
# A head that sees the whole sequence, fewer than there are GPUs.
RING = "mix(scca_fixed, dense, heads=(3, 1))"
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
# Turns a step into its gradients, without much rounding.
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


def _run(
  rule,
  num_steps=1,
  *,
  sizes=None,
  pattern="scca_fixed",
  offload_optimizer=False,
):
  """Returns parameters before, the state after some steps, and the loss."""
  mesh = sharding.make_mesh(sharding.MeshConfig(**(sizes or {})))
  model = Llama(CONFIG, lora=LORA, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  graphdef, state, frozen = training.init(
    model,
    lora.trainable(LORA),
    rule,
    mesh,
    offload_optimizer=offload_optimizer,
  )
  before = jax.device_get(state.params)
  config = training.StepConfig(
    patterns=patterns.parse(
      pattern,
      num_heads=CONFIG.num_heads,
      num_kv_heads=CONFIG.num_kv_heads,
      num_layers=CONFIG.num_layers,
      seq_len=SEQ,
    ),
    execution=Execution(remat="layer", mesh=mesh),
    num_micro_batches=2,
    offload_optimizer=offload_optimizer,
  )
  step = training.compile_step(graphdef, rule, config, state, frozen)
  batch = sharding.place_batch(_batch(), mesh, BATCH)
  for _ in range(num_steps):
    state, metrics = step(state, frozen, batch)
  return before, state, float(metrics["loss"])


@functools.cache
def _gradients(pattern, **sizes):
  """Returns the loss of a step of two micro batches, and its gradients."""
  before, state, loss = _run(optax.scale(-SCALE), pattern=pattern, sizes=sizes)
  gradients = jax.tree.map(
    lambda old, new: (old - np.asarray(new)) / SCALE, before, state.params
  )
  return loss, gradients


def _assert_close(got, expected):
  paths = jax.tree_util.tree_flatten_with_path(expected)[0]
  for (path, b), a in zip(paths, jax.tree.leaves(got), strict=True):
    # bfloat16, summed in another order.
    error = np.linalg.norm(np.asarray(a) - np.asarray(b))
    size = np.linalg.norm(b)
    name = jax.tree_util.keystr(path)
    assert error <= 0.03 * size, f"{name}: {error / size:.3f}"


@pytest.mark.parametrize(
  ("axis", "pattern"),
  [
    *((axis, "scca_fixed") for axis in sharding.AXES),
    *(("sequence", name) for name in ("scca_flow", "longmixed", "dense")),
    pytest.param("sequence", RING, id="sequence-ring"),
  ],
)
def test_gradients_on_several_gpus_are_those_of_one(axis, pattern):
  expected_loss, expected = _gradients(pattern)
  loss, gradients = _gradients(pattern, **{axis: NUM_GPUS})
  assert loss == pytest.approx(expected_loss, rel=1e-4)
  _assert_close(gradients, expected)


@pytest.mark.parametrize("sizes", [{}, {"data": NUM_GPUS}, {"fsdp": NUM_GPUS}])
def test_moments_may_wait_on_the_host(sizes):
  rule = training.make_optimizer(training.OptimizerConfig(), 10)
  _, expected, _ = _run(rule, 2, sizes=sizes)
  _, state, _ = _run(rule, 2, sizes=sizes, offload_optimizer=True)
  moments = [x for x in jax.tree.leaves(state.optimizer) if x.ndim]
  assert {x.sharding.memory_kind for x in moments} == {sharding.HOST}
  _assert_close(state.optimizer, expected.optimizer)
