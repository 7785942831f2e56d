"""Plans the GPU memory of training, evaluation or generation without a GPU.

The function that would run is compiled for a described GPU (`deviceless`), and
XLA's buffer assignment is read. That leaves out the CUDA context, the workspace
of libraries and losses to fragmentation. XLA may use what jax gives it: three
quarters of the card unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.

Models have shapes instead of arrays, as `flax.nnx.eval_shape` returns them.

The parts: results and cards, bytes of a compiled program, plans of a step, of
evaluation and of generation, and the search for the largest size that fits.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from scca_jax import (
  deviceless,
  generation,
  lora,
  perplexity,
  sharding,
  traffic,
  training,
)
from scca_jax.llama import DEFAULT_EXECUTION, Cache, Execution, Llama
from scca_jax.llama_config import LlamaConfig
from scca_jax.sharding import MeshConfig
from scca_jax.training import OptimizerConfig, StepConfig

# Share of the card that jax takes by default.
DEFAULT_FRACTION = 0.75
TASKS = ("train", "evaluate", "generate")


def of_this_machine() -> int:
  """Returns the main memory of this machine, in bytes."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """The memory of one task.

  Attributes:
    task: One of `TASKS`.
    gpu: Name of the described GPU.
    seq_len: Tokens per sequence, or per prompt in generation.
    batch_size: Sequences per step or batch.
    mesh: How a step is laid out, such as "sequence=8"; empty means one GPU.
    peak_bytes: Peak allocation on each GPU.
    capacity_bytes: Memory of the card.
    pool_bytes: The share of it that jax may use.
    moved_bytes: Floats that a GPU receives from others, in bytes, by kind of
      collective; see `traffic.moved_bytes`.
    host_bytes: Bytes used in the host's memory.
    parts: Parts of `peak_bytes`, in bytes, by name. `residuals` is what remat
      saves on the device for layers and their projections (without what
      attention kernels save); without remat they cannot be told apart from the
      workspace, which is the remainder.
  """

  task: str
  gpu: str
  seq_len: int
  batch_size: int
  mesh: str = ""
  peak_bytes: int
  capacity_bytes: int
  pool_bytes: int
  host_bytes: int
  parts: dict[str, int]
  moved_bytes: dict[str, float] = dataclasses.field(default_factory=dict)

  @property
  def fits(self) -> bool:
    """Whether it fits into the memory that jax may use."""
    return self.peak_bytes <= self.pool_bytes


@dataclasses.dataclass(frozen=True)
class Card:
  """A described GPU, and how much of its memory jax may use.

  Attributes:
    gpu: One of `deviceless.GPUS`.
    memory_fraction: Share of its memory that jax may use.
  """

  gpu: str
  memory_fraction: float = DEFAULT_FRACTION

  def __post_init__(self):
    deviceless.capacity_bytes(self.gpu)
    if not 0 < self.memory_fraction <= 1:
      raise ValueError(
        f"memory_fraction must lie in (0, 1], got {self.memory_fraction}."
      )

  @property
  def capacity_bytes(self) -> int:
    """Memory of the card."""
    return deviceless.capacity_bytes(self.gpu)

  @property
  def pool_bytes(self) -> int:
    """Memory that jax may use."""
    return int(self.memory_fraction * self.capacity_bytes)


def _size(tree: Any) -> int:
  """Returns the bytes of a tree, per device if it is spread over several."""
  # In bits: two numbers of four bits share a byte.
  return sum(
    math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape)
    * jax.dtypes.itemsize_bits(x.dtype)
    // 8
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


def device_bytes(compiled: Any) -> int:
  """Returns the most memory that a compiled function allocates on its GPU.

  Compare it with `measured_bytes` on the GPU itself.

  Args:
    compiled: A `jax.stages.Compiled`, from `deviceless.compile_for` or, for a
      local GPU, from `jax.jit(...).lower(...).compile()`.
  """
  # Not peak_memory_in_bytes: if the host's memory is used too, that counts the
  # larger of the two temporary buffers.
  stats = compiled.memory_analysis()
  return (
    stats.argument_size_in_bytes
    + stats.output_size_in_bytes
    - stats.alias_size_in_bytes
    + stats.temp_size_in_bytes
    + stats.generated_code_size_in_bytes
  )


def measured_bytes(devices: Sequence[Any]) -> int | None:
  """Returns the peak allocation of this process on the fullest of `devices`.

  Args:
    devices: GPUs of this process; the result for CPUs, which keep no count, is
      None.
  """
  peaks = [
    (device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices
  ]
  return max((peak for peak in peaks if peak is not None), default=None)


def host_bytes(compiled: Any) -> int:
  """Returns the host's memory that a compiled function allocates for its GPU.

  Args:
    compiled: See `device_bytes`.
  """
  stats = compiled.memory_analysis()
  return (
    stats.host_argument_size_in_bytes
    + stats.host_output_size_in_bytes
    - stats.host_alias_size_in_bytes
    + stats.host_temp_size_in_bytes
  )


def _make_plan(
  card: Card,
  compiled: Any,
  *,
  held: dict[str, int],
  temporary: dict[str, int],
  task: str,
  batch_size: int,
  seq_len: int,
  mesh: str = "",
  moved_bytes: dict[str, float] | None = None,
) -> Plan:
  """Returns the plan of a compiled task.

  Args:
    card: The GPU.
    compiled: The compiled task.
    held: Buffers that live from start to end, in bytes, by name.
    temporary: Transient buffers in bytes, most important first; each is counted
      up to what remains of the peak.
    task: See `Plan`, also for the arguments below.
    batch_size: Sequences.
    seq_len: Tokens of each.
    mesh: How the task is laid out.
    moved_bytes: What a GPU receives from others.
  """
  peak = device_bytes(compiled)
  parts = dict(held)
  for name, size in temporary.items():
    parts[name] = max(0, min(size, peak - sum(parts.values())))
  parts["workspace"] = peak - sum(parts.values())
  return Plan(
    task=task,
    gpu=card.gpu,
    seq_len=seq_len,
    batch_size=batch_size,
    mesh=mesh,
    peak_bytes=peak,
    capacity_bytes=card.capacity_bytes,
    pool_bytes=card.pool_bytes,
    host_bytes=host_bytes(compiled),
    parts=parts,
    moved_bytes=moved_bytes or {},
  )


def _check_sizes(batch_size: int, seq_len: int) -> None:
  if batch_size < 1 or seq_len < 1:
    raise ValueError(
      "batch_size and seq_len must be at least 1, got"
      f" {batch_size} and {seq_len}."
    )


def _saved_of_token(
  config: LlamaConfig, remat: str, mesh_config: MeshConfig
) -> int:
  """Returns how many numbers per token all layers save on a device."""
  if remat not in ("projections", "layer", "attention"):
    return 0
  saved = config.hidden_size
  if remat == "projections":
    # The residual stream after attention; then what `tensor` divides.
    saved += config.hidden_size
    outputs = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    saved += (
      sum(config.projection_shape(name)[1] for name in outputs)
      // mesh_config.tensor
    )
  return config.num_layers * saved


def plan_step(
  card: Card,
  model: Llama,
  *,
  optimizer: OptimizerConfig,
  step: StepConfig,
  batch_size: int,
  seq_len: int,
  mesh_config: MeshConfig | None = None,
) -> Plan:
  """Returns the memory that a training step takes.

  Args:
    card: The GPU.
    model: The model; its adapters determine which parameters are trained.
    optimizer: Its optimiser.
    step: The step, on one device.
    batch_size: Sequences.
    seq_len: Tokens of each.
    mesh_config: Number of GPUs along each axis of the mesh; None means one GPU.

  Raises:
    ValueError: The compiler is not installed, or a size is out of range.
  """
  _check_sizes(batch_size, seq_len)
  trainable = lora.trainable(model.lora)
  graphdef, params, frozen = nnx.split(model, trainable, ...)
  rule = training.make_optimizer(optimizer, num_steps=1000)
  state = jax.eval_shape(
    lambda *parts: training.init(nnx.merge(graphdef, *parts), trainable, rule)[
      1
    ],
    params,
    frozen,
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
      mesh_config, deviceless.devices(card.gpu, mesh_config.num_devices)
    )
  if mesh is not None:
    step = dataclasses.replace(
      step, execution=dataclasses.replace(step.execution, mesh=mesh)
    )
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
  on_host = jax.tree.map(lambda _: False, (state, frozen, batch))
  if step.offload_optimizer:
    moments = jax.tree.map(lambda x: x.ndim > 0, state.optimizer)
    of_state = dataclasses.replace(on_host[0], optimizer=moments)
    on_host = (of_state, *on_host[1:])
  compiled = deviceless.compile_for(
    card.gpu,
    functools.partial(
      training.train_step, graphdef=graphdef, optimizer=rule, config=step
    ),
    state,
    frozen,
    batch,
    on_host=on_host,
    donate_argnums=(0,),
    compiler_options=training.compiler_options(
      step.execution, state.params, frozen
    ),
  )
  # One segment at a time; what segments keep is not counted.
  at_once = min(seq_len, step.execution.segment_len or seq_len)
  num_tokens = batch_size // step.num_micro_batches * at_once
  residuals = (
    model.dtype.itemsize
    * num_tokens
    * _saved_of_token(
      model.config, step.execution.remat, mesh_config or MeshConfig()
    )
  )
  if mesh_config is not None:
    # Every axis but this one divides the tokens.
    residuals //= mesh_config.num_devices // mesh_config.tensor
  return _make_plan(
    card,
    compiled,
    task="train",
    seq_len=seq_len,
    batch_size=batch_size,
    mesh="" if mesh_config is None else sharding.shown(mesh_config),
    moved_bytes={
      kind: moved["floats"]
      for kind, moved in traffic.moved_bytes(compiled).items()
    },
    held={
      "weights": _size(frozen),
      "trainable": _size(params),
      "optimizer": 0 if step.offload_optimizer else _size(state.optimizer),
    },
    temporary={
      "gradients": _size(params),
      "residuals": residuals,
    },
  )


def _inference_plan(
  card: Card,
  model: Llama,
  compiled: Any,
  *,
  task: str,
  batch_size: int,
  seq_len: int,
  cache: Cache | None = None,
) -> Plan:
  """Returns the plan of a task without optimiser and gradients."""
  return _make_plan(
    card,
    compiled,
    task=task,
    batch_size=batch_size,
    seq_len=seq_len,
    held={"weights": _size(nnx.state(model)), "trainable": 0, "optimizer": 0},
    temporary={
      "gradients": 0,
      "residuals": 0,
      **({} if cache is None else {"cache": _size(cache)}),
    },
  )


def plan_evaluation(
  card: Card,
  model: Llama,
  *,
  batch_size: int,
  seq_len: int,
  execution: Execution = DEFAULT_EXECUTION,
  loss_chunk: int = perplexity.LOSS_CHUNK,
) -> Plan:
  """Returns the memory that perplexity takes, with dense attention.

  Args:
    card: The GPU.
    model: The model.
    batch_size: Windows per batch.
    seq_len: Tokens of each.
    execution: See `perplexity.perplexity`.
    loss_chunk: See `perplexity.perplexity`.

  Raises:
    ValueError: The compiler is not installed, or a size is out of range.
  """
  _check_sizes(batch_size, seq_len)
  graphdef, state = nnx.split(model)
  compiled = deviceless.compile_for(
    card.gpu,
    functools.partial(
      perplexity.window_losses,
      graphdef=graphdef,
      patterns=None,
      execution=execution,
      loss_chunk=loss_chunk,
    ),
    state,
    jax.ShapeDtypeStruct((batch_size, seq_len), jnp.int32),
  )
  return _inference_plan(
    card,
    model,
    compiled,
    task="evaluate",
    seq_len=seq_len,
    batch_size=batch_size,
  )


def plan_generation(
  card: Card,
  model: Llama,
  *,
  batch_size: int,
  seq_len: int,
  execution: Execution = DEFAULT_EXECUTION,
) -> Plan:
  """Returns the memory that reading prompts and generating from them takes.

  That is the larger of what the prompts take and what one new token takes, with
  dense attention and greedy sampling. `parts` includes the `cache`.

  Args:
    card: The GPU.
    model: The model.
    batch_size: Prompts.
    seq_len: Tokens of each, and of the cache.
    execution: See `generation.stream`.

  Raises:
    ValueError: The compiler is not installed, or a size is out of range.
  """
  _check_sizes(batch_size, seq_len)
  graphdef, state = nnx.split(model)
  cache = nnx.eval_shape(lambda: model.init_cache(batch_size, seq_len))
  integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)

  def plan(tokens: int, starts: Sequence[jax.ShapeDtypeStruct]) -> Plan:
    def run(state, tokens, cache, last, inv_freq, draw, *starts):
      return generation.next_tokens(
        state,
        tokens,
        cache,
        last,
        starts[0] if starts else None,
        inv_freq,
        draw,
        graphdef=graphdef,
        patterns=None,
        sampling=generation.Sampling(),
        execution=execution,
      )

    compiled = deviceless.compile_for(
      card.gpu,
      run,
      state,
      integers((batch_size, tokens)),
      cache,
      integers((batch_size,)),
      jax.ShapeDtypeStruct((model.config.head_dim // 2,), jnp.float32),
      integers((2,)),
      *starts,
      donate_argnums=(2,),
    )
    return _inference_plan(
      card,
      model,
      compiled,
      task="generate",
      seq_len=seq_len,
      batch_size=batch_size,
      cache=cache,
    )

  prompt, token = plan(seq_len, ()), plan(1, (integers((batch_size,)),))
  return max(prompt, token, key=lambda plan: plan.peak_bytes)


def search(
  plan: Callable[[int], Plan], start: int, multiple: int
) -> Plan | None:
  """Returns the plan of the largest size that fits, or None if none does.

  Args:
    plan: Returns the plan for a size.
    start: Size to start from, a multiple of `multiple`.
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
