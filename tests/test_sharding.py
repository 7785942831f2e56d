"""A training step on a mesh against the same step on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pattern_strings
import pytest
from flax import nnx

from scca_jax import lora, patterns, quantize, sharding, training
from scca_jax.llama import Execution, Llama
from scca_jax.llama_config import LlamaConfig

CONFIG = LlamaConfig(
  vocab_size=32,
  hidden_size=16,
  intermediate_size=24,
  num_layers=2,
  num_heads=20,
  num_kv_heads=10,
  head_dim=4,
  context_len=64,
)
LORA = lora.LoraConfig(rank=2)
SEQ = 64
CHUNKED = ("local", "s2", "scca_fixed", "scca_flow", "dilated", "longmixed")
# The tests spend their time compiling, not running.
QUICKLY = {"xla_backend_optimization_level": 0}
MESHES = {
  "data": {"data": 8},
  "fsdp": {"fsdp": 8},
  "tensor": {"tensor": 2},
  "sequence": {"sequence": 8},
  "mixed": {"data": 2, "tensor": 2, "sequence": 2},
  "all": {"fsdp": 2, "tensor": 2, "sequence": 2},
}


# Two heads of every named pattern: one compilation serves them all.
PATTERN = patterns.mix(
  *(
    pattern_strings.make(
      name,
      num_heads=2,
      seq_len=SEQ,
      **({"chunk_size": 8} if name in CHUNKED else {}),
      **({"window": 5} if name in ("sliding", "dna") else {}),
      **({"dilation": 2} if name in ("sda", "dna", "dilated") else {}),
    )
    for name in patterns.NAMES
    if name != "scca_near"
  )
)


def _batch(batch=8, packed=False, seed=0):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, CONFIG.vocab_size, (batch, SEQ + 1)).astype(np.int32)
  mask = np.ones((batch, SEQ), np.float32)
  mask[0, :5] = 0
  content = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}
  if packed:
    ends = [SEQ // 3, SEQ - 5]
    ids = np.searchsorted(ends, np.arange(SEQ), side="right") + 1
    starts = np.array([0, 0, *ends])[ids]
    content["segment_ids"] = np.tile(ids % 3, (batch, 1)).astype(np.int32)
    content["positions"] = np.tile(np.arange(SEQ) - starts, (batch, 1)).astype(
      np.int32
    )
  return content


def _random(state):
  """Returns a state with all weights random, second matrices of LoRA too."""
  leaves, tree = jax.tree.flatten(state)
  rng = np.random.default_rng(1)
  return jax.tree.unflatten(
    tree,
    [jnp.asarray(rng.normal(0.5, 0.3, x.shape), x.dtype) for x in leaves],
  )


def _split(adapter=LORA):
  model = nnx.eval_shape(lambda: Llama(CONFIG, lora=adapter, rngs=nnx.Rngs(0)))
  graphdef, params, frozen = nnx.split(model, lora.trainable(adapter), ...)
  return graphdef, _random(params), _random(frozen)


def _loss_and_gradients(pattern, mesh, batch, adapter=None, remat="layer"):
  """Returns the loss, and the gradients of all parameters."""
  return _gradients(*_split(adapter), pattern, mesh, batch, remat)


def _gradients(graphdef, params, frozen, pattern, mesh, batch, remat="layer"):
  """Returns the loss, and the gradients of `params`."""
  config = training.StepConfig(
    patterns=pattern,
    execution=Execution(
      implementation="reference", remat=remat, mlp_chunk=6, mesh=mesh
    ),
    loss_chunk=6,
  )

  @functools.partial(jax.jit, compiler_options=QUICKLY)
  def run(params, frozen, batch):
    return jax.value_and_grad(training._batch_loss)(
      params, graphdef, frozen, batch, jax.random.key(0), config
    )

  params, frozen = sharding.place((params, frozen), mesh)
  batch = sharding.place_batch(batch, mesh, len(batch["tokens"]))
  return run(params, frozen, batch)


def _assert_close(got, expected, tolerance=1e-5):
  paths = jax.tree_util.tree_flatten_with_path(expected)[0]
  for (path, b), a in zip(paths, jax.tree.leaves(got), strict=True):
    # Relative to the largest: sums over thousands of tokens come in any order.
    size = max(1.0, float(np.max(np.abs(b))))
    np.testing.assert_allclose(
      a, b, rtol=0, atol=tolerance * size, err_msg=jax.tree_util.keystr(path)
    )


@functools.cache
def _expected(packed):
  return _loss_and_gradients(PATTERN, None, _batch(packed=packed))


# A single axis is slow, since each is also an axis of the mixed mesh or of the
# one that training resumes on.
@pytest.mark.parametrize(
  "mesh",
  [
    pytest.param(mesh, marks=[] if mesh == "mixed" else [pytest.mark.slow])
    for mesh in MESHES
  ],
)
def test_loss_and_gradients_are_those_of_one_device(mesh):
  mixed = mesh == "mixed"
  mesh = sharding.make_mesh(sharding.MeshConfig(**MESHES[mesh]))
  got = _loss_and_gradients(
    PATTERN,
    mesh,
    _batch(packed=mixed),
    remat="projections" if mixed else "layer",
  )
  _assert_close(got, _expected(mixed))


def _steps(mesh, num_steps=2, offload_optimizer=False):
  """Returns the state after some steps of LoRA training, and the metrics."""
  graphdef, params, frozen = _split(LORA)
  rule = training.make_optimizer(training.OptimizerConfig(warmup_steps=0), 10)
  config = training.StepConfig(
    patterns=patterns.scca_fixed(CONFIG.num_heads, 8),
    execution=Execution(implementation="reference", mesh=mesh),
    num_micro_batches=2,
    offload_optimizer=offload_optimizer,
  )
  graphdef, state, frozen = training.init(
    nnx.merge(graphdef, params, frozen),
    lora.trainable(LORA),
    rule,
    mesh,
    offload_optimizer=offload_optimizer,
  )
  step = training.compile_step(graphdef, rule, config, state, frozen)
  step = step.lower(
    state, frozen, sharding.place_batch(_batch(), mesh, 8)
  ).compile(QUICKLY)
  for i in range(num_steps):
    batch = sharding.place_batch(_batch(seed=i), mesh, 8)
    state, metrics = step(state, frozen, batch)
  return state, frozen, jax.device_get(metrics)


@functools.cache
def _steps_on_one_device():
  return _steps(None)


# With offloading, test_cluster compares a run on a mesh with one device.
@pytest.mark.parametrize(
  "offload", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_training_goes_as_on_one_device(offload):
  expected, _, metrics = _steps_on_one_device()
  mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2, sequence=2))
  state, frozen, got = _steps(mesh, offload_optimizer=offload)
  for name, value in metrics.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)
  # Adam divides by the root of gradients that may be nearly 0.
  for a, b in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
  # Each device holds its part of weights, adapters and moments.
  for tree, name, parts in (
    (frozen, "['q_proj']['kernel']", 4),
    (frozen, "['down_proj']['kernel']", 4),
    (state.optimizer, "['o_proj']['lora_a']", 2),
    (state.params, "['embedding']", 4),
    (state.optimizer, "['lm_head']['kernel']", 4),
    (state.params, "['norm']['scale']", 1),
  ):
    found = [
      leaf
      for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
      if name in jax.tree_util.keystr(path)
    ]
    assert found, name
    for leaf in found:
      assert leaf.addressable_shards[0].data.size == leaf.size // parts, name
  kinds = {
    leaf.sharding.memory_kind
    for leaf in jax.tree.leaves(state.optimizer)
    if leaf.ndim
  }
  assert kinds == {sharding.HOST if offload else "device"}


def test_too_few_devices_are_said():
  with pytest.raises(
    ValueError, match=r"fsdp=8,tensor=2 takes 16.*8 are here.*mesh\.fsdp=4\."
  ):
    sharding.make_mesh(sharding.MeshConfig(fsdp=8, tensor=2))
  assert sharding.make_mesh(sharding.MeshConfig()) is None


def test_a_mesh_is_read_from_a_flag():
  parsed = sharding.MeshConfig.parse("data=2,sequence=4")
  assert parsed == sharding.MeshConfig(data=2, sequence=4)
  assert sharding.MeshConfig.parse("") == sharding.MeshConfig()
  for text in ("rows=2", "data=two", "data=2,data=2", "data"):
    with pytest.raises(ValueError, match="data, fsdp, tensor, sequence"):
      sharding.MeshConfig.parse(text)
  with pytest.raises(ValueError, match="mesh.data.*0"):
    sharding.MeshConfig(data=0)


def test_what_cannot_be_cut_evenly_stays_whole():
  mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
  shapes = {
    "layers": {
      "q_proj": {
        # Values and scales of a quantised matrix, in tiles of its inputs.
        "kernel": {
          "qvalue": jax.ShapeDtypeStruct((3, 64, 32), jnp.int8),
          "scale": jax.ShapeDtypeStruct((3, 2, 32), jnp.float32),
        },
        "lora_a": jax.ShapeDtypeStruct((3, 64, 8), jnp.float32),
      }
    },
    "embed_tokens": {"embedding": jax.ShapeDtypeStruct((33, 64), jnp.float32)},
    "norm": {"scale": jax.ShapeDtypeStruct((64,), jnp.float32)},
    "count": jax.ShapeDtypeStruct((), jnp.int32),
  }
  found = jax.tree.map(
    lambda x: tuple(x.spec), sharding.shardings(shapes, mesh)
  )
  fsdp, tensor = "fsdp", "tensor"
  assert found == {
    "layers": {
      "q_proj": {
        "kernel": {
          "qvalue": (None, fsdp, tensor),
          "scale": (None, None, tensor),
        },
        "lora_a": (None, fsdp, None),
      }
    },
    "embed_tokens": {"embedding": (None, fsdp)},
    "norm": {"scale": (None,)},
    "count": (),
  }


@pytest.mark.slow
@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_quantised_weights_are_cut_like_others(method):
  mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2))
  pattern = patterns.scca_fixed(CONFIG.num_heads, 8)
  found = []
  for layout in (None, mesh):
    graphdef, params, frozen = _split(LORA)
    model = quantize.quantize_model(nnx.merge(graphdef, params, frozen), method)
    graphdef, params, frozen = nnx.split(model, lora.trainable(LORA), ...)
    frozen = sharding.place(frozen, layout)
    found.append(
      _gradients(graphdef, params, frozen, pattern, layout, _batch())
    )
  _assert_close(found[1], found[0])
  kernel = frozen["layers"]["self_attn"]["q_proj"]["kernel"][...]
  values = kernel.qvalue
  assert values.addressable_shards[0].data.size == values.size // 4


def test_an_unknown_parameter_is_refused():
  mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2))
  bias = {"layers": {"self_attn": {"q_proj": {"bias": jnp.zeros((2, 8))}}}}
  with pytest.raises(ValueError, match=r"layers.self_attn.q_proj.bias"):
    sharding.shardings(bias, mesh)
