"""How much GPU memory a training step takes, without the GPU.

The very step is compiled for a described GPU (`deviceless`), and XLA's buffer
assignment read. That leaves out the CUDA context, the workspace of libraries
and what a fragmented pool loses. XLA may use what jax gives it: three quarters
of the card unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from scca_jax import deviceless, lora, sharding, traffic, training
from scca_jax.llama import Llama, LlamaConfig
from scca_jax.lora import LoraConfig
from scca_jax.sharding import MeshConfig
from scca_jax.training import OptimizerConfig, StepConfig

# Share of the card that jax takes by default.
DEFAULT_FRACTION = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """The memory of one training step.

  Attributes:
    gpu: Name of the described GPU.
    seq_len: Tokens of a sequence.
    batch_size: Sequences of the step.
    mesh: How the step is laid out, such as "sequence=8"; empty is one GPU.
    peak_bytes: Most that is allocated at once, on each GPU.
    capacity_bytes: Memory of the card.
    pool_bytes: What jax may use of it.
    moved_bytes: Floats that a GPU receives from others, in bytes, by kind of
      collective; see `traffic.moved_bytes`.
    parts: What `peak_bytes` is made of, in bytes, by name. `residuals` are the
      inputs of the layers where remat keeps them on the device; without remat
      they cannot be told from the workspace, which is the rest.
  """

  gpu: str
  seq_len: int
  batch_size: int
  mesh: str = ""
  peak_bytes: int
  capacity_bytes: int
  pool_bytes: int
  parts: dict[str, int]
  moved_bytes: dict[str, float] = dataclasses.field(default_factory=dict)

  @property
  def fits(self) -> bool:
    """Whether it fits in what jax may use."""
    return self.peak_bytes <= self.pool_bytes


def _size(tree: Any) -> int:
  """Returns the bytes of a tree, or of the part that each device has of it."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape)
    * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def _laid_out(tree: Any, layout: Any) -> Any:
  """Returns the shapes of a tree with their shardings."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    tree,
    layout,
  )


def plan_step(
  gpu: str,
  config: LlamaConfig,
  *,
  lora_config: LoraConfig | None,
  optimizer: OptimizerConfig,
  step: StepConfig,
  param_dtype: str,
  batch_size: int,
  seq_len: int,
  mesh_config: MeshConfig | None = None,
  memory_fraction: float = DEFAULT_FRACTION,
) -> Plan:
  """Returns the memory that a training step takes on a GPU.

  Args:
    gpu: One of `deviceless.GPUS`.
    config: Sizes of the model.
    lora_config: Its adapters; None trains all parameters.
    optimizer: Its optimiser.
    step: The step.
    param_dtype: Dtype that frozen weights are held in.
    batch_size: Sequences.
    seq_len: Tokens of each.
    mesh_config: Number of GPUs along each axis; None is one.
    memory_fraction: Share of the card that jax may use.

  Raises:
    ValueError: The GPU is unknown, the compiler is not installed, or a size is
      out of range.
  """
  if not 0 < memory_fraction <= 1:
    raise ValueError(
      f"memory_fraction must lie in (0, 1], got {memory_fraction}."
    )
  if batch_size < 1 or seq_len < 1:
    raise ValueError(
      "batch_size and seq_len must be at least 1, got"
      f" {batch_size} and {seq_len}."
    )
  capacity = deviceless.capacity_bytes(gpu)
  model = nnx.eval_shape(
    lambda: Llama(
      config,
      lora=lora_config,
      dtype=jnp.dtype(step.dtype),
      param_dtype=jnp.dtype(param_dtype),
      rngs=nnx.Rngs(0),
    )
  )
  graphdef, params, frozen = nnx.split(model, lora.trainable(lora_config), ...)
  rule = training.make_optimizer(optimizer, num_steps=1000)
  state = jax.eval_shape(
    lambda params: training.init_state(params, rule, step.dtype), params
  )
  batch = {
    name: jax.ShapeDtypeStruct((batch_size, seq_len), dtype)
    for name, dtype in (
      ("tokens", jnp.int32),
      ("targets", jnp.int32),
      ("mask", jnp.float32),
    )
  }
  mesh = None
  if mesh_config is not None and mesh_config.num_devices > 1:
    mesh = sharding.make_mesh(
      mesh_config, deviceless.devices(gpu, mesh_config.num_devices)
    )
  if mesh is not None:
    step = dataclasses.replace(step, mesh=mesh)
    state, frozen = _laid_out(
      (state, frozen), sharding.shardings((state, frozen), mesh)
    )
    params = state.params
    batch = {
      name: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding.batch_sharding(mesh)
      )
      for name, x in batch.items()
    }
  compiled = deviceless.compile_for(
    gpu,
    functools.partial(
      training.train_step, graphdef=graphdef, optimizer=rule, config=step
    ),
    state,
    frozen,
    batch,
    donate_argnums=(0,),
  )
  # Not peak_memory_in_bytes: where the host's memory is used too, it counts
  # whichever of the two temporary buffers is larger.
  stats = compiled.memory_analysis()
  peak = (
    stats.argument_size_in_bytes
    + stats.output_size_in_bytes
    - stats.alias_size_in_bytes
    + stats.temp_size_in_bytes
    + stats.generated_code_size_in_bytes
  )
  of_micro_batch = batch_size // step.num_micro_batches
  layer_inputs = (
    config.num_layers
    * of_micro_batch
    * seq_len
    * config.hidden_size
    * jnp.dtype(step.dtype).itemsize
  )
  if mesh_config is not None:
    # They lie along every axis but this one.
    layer_inputs //= mesh_config.num_devices // mesh_config.tensor
  parts = {
    "weights": _size(frozen),
    "trainable": _size(params),
    "optimizer": _size(state.optimizer),
    "gradients": _size(params),
    "residuals": layer_inputs if step.remat == "layer" else 0,
  }
  # Gradients and residuals are not all there at the peak.
  parts["workspace"] = max(0, peak - sum(parts.values()))
  return Plan(
    gpu=gpu,
    seq_len=seq_len,
    batch_size=batch_size,
    mesh="" if mesh_config is None else sharding.shown(mesh_config),
    peak_bytes=peak,
    capacity_bytes=capacity,
    pool_bytes=int(memory_fraction * capacity),
    parts=parts,
    moved_bytes={
      kind: moved["floats"]
      for kind, moved in traffic.moved_bytes(compiled).items()
    },
  )


def search(
  plan: Callable[[int], Plan], start: int, multiple: int
) -> Plan | None:
  """Returns the plan of the largest size that fits, or None if none does.

  Args:
    plan: Gives the plan of a size.
    start: Size to begin with, a multiple of `multiple`.
    multiple: Sizes tried are multiples of it.
  """
  best, low, high, size = None, 0, None, start
  while size > low:
    found = plan(size)
    if found.fits:
      best, low = found, size
    else:
      high = size
    size = 2 * low if high is None else (low + high) // 2
    size = size // multiple * multiple
  return best
