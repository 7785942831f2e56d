"""GPU kernels, compiled for GPUs that this machine does not have."""

import dataclasses
import functools
import math
import os
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments.results.llama2_7b import products
from scca_jax import (
  attention,
  deviceless,
  losses,
  patterns,
  quantize,
  sharding,
  target,
  training,
)
from scca_jax.llama import Execution, Llama
from scca_jax.llama_config import LlamaConfig

needs_compiler = pytest.mark.usefixtures("gpu_compiler")
BF16, F16 = jnp.bfloat16, jnp.float16
# How to recognise an implementation's kernel in a compiled program.
CALLS = {"mosaic": "mosaic_gpu", "triton": "__gpu$xla.gpu.triton", "xla": ""}


def _step(pattern, segmented, implementation, query, key, value, ids, d_output):
  """Returns the output, the log-sum-exp and the gradients."""

  def attend(*x):
    return attention(
      *x,
      pattern,
      segment_ids=ids if segmented else None,
      implementation=implementation,
      return_lse=True,
    )

  (output, log_sum), vjp = jax.vjp(attend, query, key, value)
  return output, log_sum, vjp((d_output, log_sum))


def _compile(
  gpu,
  pattern,
  *,
  seq_len=1000,
  head_dim=128,
  kv_heads=2,
  dtype=BF16,
  segmented=False,
  implementation=None,
):
  query, key = (
    jax.ShapeDtypeStruct((1, seq_len, n, head_dim), dtype)
    for n in (pattern.num_heads, kv_heads)
  )
  ids = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)
  step = functools.partial(_step, pattern, segmented, implementation)
  return deviceless.compile_for(gpu, step, query, key, key, ids, query)


@needs_compiler
@pytest.mark.parametrize(
  ("gpu", "implementation"),
  [("h200", "mosaic"), ("a100-40gb", "triton")],
)
@pytest.mark.parametrize(
  ("pattern", "settings"),
  [
    (
      dataclasses.replace(patterns.scca_fixed(4, 256), boundary="local"),
      {"dtype": F16},
    ),
    pytest.param(
      patterns.dna(4, 40, 3),
      {"head_dim": 64, "segmented": True},
      marks=pytest.mark.slow,
    ),
    (patterns.scca_near(4, 128, 8, sinks=40), {}),
  ],
  ids=["fixed float16", "dna segments", "near"],
)
def test_kernels_compile_for_their_gpus(gpu, implementation, pattern, settings):
  compiled = _compile(gpu, pattern, implementation=implementation, **settings)
  assert CALLS[implementation] in compiled.as_text()


@needs_compiler
@pytest.mark.parametrize(
  ("gpu", "implementation"),
  [
    ("v100-32gb", "xla"),
    ("a100-40gb", "triton"),
    # Less shared memory than sm_80.
    ("a10-24gb", "triton"),
    ("rtx4090-24gb", "triton"),
    ("h200", "mosaic"),
  ],
)
def test_each_gpu_gets_its_kernels(gpu, implementation):
  text = _compile(gpu, patterns.scca_fixed(4, 256), dtype=F16).as_text()
  found = {name for name, call in CALLS.items() if call and call in text}
  assert found == {implementation} - {"xla"}


@needs_compiler
@pytest.mark.parametrize(
  "implementation",
  [pytest.param("mosaic", marks=pytest.mark.slow), "triton"],
)
def test_neither_keys_nor_scores_are_stored(implementation):
  seq_len, heads = 8192, 32
  # Shifted heads, and dilated ones.
  compiled = _compile(
    "h200",
    patterns.longmixed(heads, 2048),
    seq_len=seq_len,
    kv_heads=heads,
    implementation=implementation,
  )
  assert CALLS[implementation] in compiled.as_text()
  # A rolled key alone would be 64 MiB; a float32 a row and head is 1 MiB.
  allowed = 8 * 2**20
  if implementation == "mosaic":
    # It sums the gradient of the query in float32.
    allowed += 4 * seq_len * heads * 128
  assert compiled.memory_analysis().temp_size_in_bytes <= allowed


@needs_compiler
@pytest.mark.parametrize(
  ("gpu", "implementation", "calls"),
  [
    # Forward, again, and the two of the backward pass.
    pytest.param(
      "h200",
      "mosaic",
      {"layer": 4, "projections": 3},
      marks=pytest.mark.slow,
    ),
    ("a100-40gb", "triton", {"attention": 3}),
  ],
)
def test_attention_that_is_kept_is_not_computed_anew(
  gpu, implementation, calls
):
  config = LlamaConfig(
    vocab_size=128,
    hidden_size=128,
    intermediate_size=128,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=64,
    context_len=512,
  )
  model = nnx.eval_shape(lambda: Llama(config, dtype=BF16, rngs=nnx.Rngs(0)))
  graphdef, state = nnx.split(model)
  tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)

  def num_calls(remat):
    def loss(state, tokens):
      hidden = nnx.merge(graphdef, state).hidden_states(
        tokens, patterns.scca_fixed(2, 128), Execution(remat=remat)
      )
      return jnp.sum(hidden.astype(jnp.float32))

    text = deviceless.compile_for(gpu, jax.grad(loss), state, tokens).as_text()
    return text.count(f'custom_call_target="{CALLS[implementation]}')

  assert {remat: num_calls(remat) for remat in calls} == calls


@needs_compiler
@pytest.mark.parametrize(
  ("mlp_chunk", "quantised", "unroll"),
  [
    pytest.param(None, None, False, marks=pytest.mark.slow),
    pytest.param(None, None, True, marks=pytest.mark.slow),
    (256, "int8", False),
  ],
)
def test_no_product_runs_forward_twice(mlp_chunk, quantised, unroll):
  config = LlamaConfig(
    vocab_size=128,
    hidden_size=256,
    intermediate_size=384,
    num_layers=3,
    num_heads=2,
    num_kv_heads=2,
    head_dim=128,
    context_len=512,
  )
  model = nnx.eval_shape(
    lambda: quantize.quantize_model(
      Llama(config, dtype=BF16, param_dtype=BF16, rngs=nnx.Rngs(0)), quantised
    )
  )
  # The gradients of the embedding go through all layers; none of a matrix.
  graphdef, trained, frozen = nnx.split(
    model, nnx.PathContains("embed_tokens"), ...
  )

  def operations(remat):
    def loss(trained, frozen, tokens):
      hidden = nnx.merge(graphdef, trained, frozen).hidden_states(
        tokens,
        patterns.scca_fixed(2, 128),
        Execution(remat=remat, mlp_chunk=mlp_chunk, unroll=unroll),
      )
      return jnp.sum(hidden.astype(jnp.float32) ** 2)

    compiled = deviceless.compile_for(
      "h100-80gb",
      jax.value_and_grad(loss),
      trained,
      frozen,
      jax.ShapeDtypeStruct((1, 512), jnp.int32),
      compiler_options=training.compiler_options(),
    )
    text = compiled.as_text()
    # With a loop, what is saved goes into stacks.
    assert unroll or "dynamic-update-slice" in text
    assert not unroll or "dynamic-update-slice" not in text
    found = products.products(text)
    return sum(2 * math.prod(key) * times for key, times in found.items())

  # Forward and backward; then all but down_proj once more.
  down = 2 * 512 * 3 * 256 * 384
  forward = 2 * 512 * 3 * 4 * 256**2 + 3 * down
  assert operations("projections") == 2 * forward
  if mlp_chunk is None:
    assert operations("layer") == 3 * forward - down


@needs_compiler
@pytest.mark.parametrize(
  ("trains_head", "num_products"),
  # Logits and the gradient of their input; for the gradient of the head, the
  # logits again.
  [(False, 2), (True, 4)],
)
def test_a_frozen_head_is_multiplied_once_each_way(trains_head, num_products):
  head = jax.ShapeDtypeStruct((256, 512), BF16)
  hidden = jax.ShapeDtypeStruct((1, 512, 256), BF16)
  targets = jax.ShapeDtypeStruct((1, 512), jnp.int32)

  def loss(hidden, head, targets):
    return jnp.sum(
      losses.token_losses(lambda h: h @ head, hidden, targets, 128)
    )

  compiled = deviceless.compile_for(
    "h100-80gb",
    jax.value_and_grad(loss, (0, 1) if trains_head else 0),
    hidden,
    head,
    targets,
    compiler_options=training.compiler_options(),
  )
  found = products.products(compiled.as_text())
  assert sum(math.prod(key) * times for key, times in found.items()) == (
    num_products * 512 * 256 * 512
  )


@needs_compiler
@pytest.mark.parametrize("num_gpus", [1, 2])
def test_arguments_in_the_hosts_memory_are_fetched(num_gpus):
  layout = None
  if num_gpus > 1:
    devices = deviceless.devices("v100-16gb", num_gpus)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=num_gpus), devices)
    layout = sharding.batch_sharding(mesh)
  x = jax.ShapeDtypeStruct((256, 1024), jnp.float32, sharding=layout)

  def product(there, here):
    fetched = jax.device_put(there, jax.memory.Space.Device)
    return jnp.sum(fetched * here)

  def memory(on_host):
    compiled = deviceless.compile_for(
      "v100-16gb", product, x, x, on_host=on_host
    )
    return compiled.memory_analysis()

  size = 4 * x.size // num_gpus
  there, here = memory((True, False)), memory(None)
  assert there.host_argument_size_in_bytes == size
  assert there.argument_size_in_bytes == size
  assert there.temp_size_in_bytes >= size
  assert here.host_argument_size_in_bytes == 0
  assert here.argument_size_in_bytes == 2 * size
  assert here.temp_size_in_bytes < size


def _compile_step(mesh_config, num_layers, num_micro_batches, **execution):
  """A step of a small model on two GPUs."""
  config = LlamaConfig(
    vocab_size=768,
    hidden_size=64,
    intermediate_size=128,
    num_layers=num_layers,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    context_len=64,
  )
  mesh = sharding.make_mesh(mesh_config, deviceless.devices("h100-80gb", 2))
  model = nnx.eval_shape(
    lambda: Llama(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  )
  graphdef, params, frozen = nnx.split(model, nnx.Param, ...)
  rule = training.make_optimizer(training.OptimizerConfig(), 10)
  state = jax.eval_shape(
    lambda *parts: training.init(nnx.merge(graphdef, *parts), nnx.Param, rule)[
      1
    ],
    params,
    frozen,
  )
  state = jax.tree.map(
    lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
    state,
    sharding.shardings(state, mesh),
  )
  batch = {
    name: jax.ShapeDtypeStruct(
      (8, 64), dtype, sharding=sharding.batch_sharding(mesh)
    )
    for name, dtype in (
      ("tokens", jnp.int32),
      ("targets", jnp.int32),
      ("mask", jnp.float32),
    )
  }
  step = training.StepConfig(
    patterns=patterns.scca_fixed(4, 16),
    execution=Execution(mesh=mesh, **execution),
    num_micro_batches=num_micro_batches,
  )
  return deviceless.compile_for(
    "h100-80gb",
    functools.partial(
      training.train_step, graphdef=graphdef, optimizer=rule, config=step
    ),
    state,
    frozen,
    batch,
    compiler_options=training.compiler_options(
      step.execution, state.params, frozen
    ),
  )


@needs_compiler
@pytest.mark.slow
def test_matrices_of_a_layer_are_gathered_in_one_message():
  compiled = _compile_step(
    sharding.MeshConfig(fsdp=2), 3, 1, unroll=True, remat="projections"
  )
  # Once for each layer's forward pass and once for its backward pass, and the
  # embedding and the head. One by one, matrices would be 7 messages each time.
  gathered = re.findall(r" all-gather(?:-start)?\(", compiled.as_text())
  assert 0 < len(gathered) <= 2 * 3 + 2


@needs_compiler
@pytest.mark.slow
def test_no_device_drops_what_it_has_summed():
  compiled = _compile_step(sharding.MeshConfig(data=2), 1, 2)
  # XLA sums a gradient over devices once, after the micro batches. If it had
  # split the gradient's scatter among devices, all but the first device lost
  # their sum at each micro batch, by a choice on the device's number, which
  # occurs nowhere else in this step.
  assert "partition-id" not in compiled.as_text()


def test_descriptions_say_what_dispatch_needs():
  assert deviceless.target_of("v100-32gb").compute_capability == (7, 0)
  assert deviceless.target_of("a100-40gb").compute_capability == (8, 0)
  assert deviceless.target_of("h200") == target.Target(
    "gpu", "NVIDIA H200", (9, 0), 132
  )


@needs_compiler
def test_compiling_leaves_the_environment_as_it_was(monkeypatch):
  monkeypatch.delenv("CUDA_ROOT", raising=False)
  before = dict(os.environ)
  deviceless.compile_for(
    "h200", jnp.sum, jax.ShapeDtypeStruct((8,), jnp.float32)
  )
  assert dict(os.environ) == before


def test_unknown_gpus_are_refused():
  with pytest.raises(ValueError, match="'h300'.*h200"):
    deviceless.compile_for("h300", lambda: None)
