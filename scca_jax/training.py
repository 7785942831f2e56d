"""Optimiser, training state and one training step, as pure functions.

The state has everything that training changes: the trainable parameters, their
optimiser state and the loss scale. Frozen weights are a separate argument: they
have no gradient and no optimiser state, and are not in checkpoints.

The parts: optimiser and schedule, loss scale, state and its layout, the step,
and its compilation.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from scca_jax import llama, losses, patterns, segments, sharding
from scca_jax.llama import DEFAULT_EXECUTION, Execution, Llama, Patterns
from scca_jax.llama_config import LlamaConfig
from scca_jax.sharding import MeshConfig

SCHEDULES = ("constant", "cosine")
# The scale that float16 starts from, its maximum, and after how many steps
# without overflow it doubles (the usual values of mixed-precision training,
# arXiv 1710.03740).
_INITIAL_LOSS_SCALE = 2.0**15
_MAX_LOSS_SCALE = 2.0**24
_GROWTH_INTERVAL = 2000
# More overflows in a row than the scale needs to find its range: 24 lead from
# the largest scale to 1.
MAX_SKIPPED_IN_A_ROW = 30
# XLA's Triton GEMMs first copy each layer's weights out of the stacked array;
# cuBLAS reads them in place. Only GPUs look at the option.
_COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
# In percent of the GPU's memory. XLA counts what segments keep on the host as
# if it were on the GPU, finds too little memory there, and computes products
# again to save some: a third of a step's work, and more, for nothing.
_GATHERED_AT_ONCE = "xla_gpu_all_gather_combine_threshold_bytes"
_OF_OFFLOADED_SEGMENTS = {"xla_gpu_memory_limit_slop_factor": 1000}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW with warm-up; the defaults are LongLoRA's (arXiv 2309.12307).

  Attributes:
    learning_rate: Peak learning rate, reached after the warm-up.
    schedule: What follows the warm-up: "constant", or "cosine" down to
      `final_fraction` of the peak at the last step.
    warmup_steps: Steps of linear warm-up from 0.
    final_fraction: Share of the peak at which "cosine" ends.
    beta1: Decay of the first moment.
    beta2: Decay of the second moment.
    epsilon: Added to the root of the second moment.
    weight_decay: Decoupled decay of everything that is trained except norms, as
      in the Trainer of transformers: adapters, matrices, embedding and head,
      tied or not.
    clip_norm: Largest global norm of the gradient; None leaves it as it is.
    embedding_ratio: The learning rate of the embedding and the output head, as
      a multiple of the general one.
    lora_b_ratio: The same for the second matrices of adapters; LoRA+ (arXiv
      2402.12354) uses 16.
    rewarmup_steps: Steps of linear warm-up after a change of the pattern
      (`first_dense_step`).
  """

  learning_rate: float = 2e-5
  schedule: str = "constant"
  warmup_steps: int = 20
  final_fraction: float = 0.1
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float | None = 1.0
  embedding_ratio: float = 1.0
  lora_b_ratio: float = 1.0
  rewarmup_steps: int = 5

  def __post_init__(self):
    if self.schedule not in SCHEDULES:
      raise ValueError(
        f"unknown schedule {self.schedule!r}: use one of"
        f" {', '.join(SCHEDULES)}."
      )
    for name in (
      "learning_rate",
      "epsilon",
      "embedding_ratio",
      "lora_b_ratio",
    ):
      if not getattr(self, name) > 0:
        raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
    for name in ("beta1", "beta2"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(
          f"{name} must lie in [0, 1), got {getattr(self, name)}."
        )
    if not 0 <= self.final_fraction <= 1:
      raise ValueError(
        f"final_fraction must lie in [0, 1], got {self.final_fraction}."
      )
    for name in ("warmup_steps", "weight_decay", "rewarmup_steps"):
      if getattr(self, name) < 0:
        raise ValueError(
          f"{name} must not be negative, got {getattr(self, name)}."
        )
    if self.clip_norm is not None and not self.clip_norm > 0:
      raise ValueError(
        f"clip_norm must be above 0 or None, got {self.clip_norm}."
      )


def first_dense_step(num_steps: int, dense_fraction: float) -> int:
  """Returns the step, counted from 0, at which training becomes dense.

  Args:
    num_steps: Steps of the run, also returned if there are no dense steps.
    dense_fraction: Share of the steps, at the end, with dense attention.
  """
  return num_steps - round(num_steps * dense_fraction)


def learning_rate_schedule(
  config: OptimizerConfig,
  num_steps: int,
  *,
  rewarm_at: int = 0,
  peak: float | jax.Array | None = None,
) -> optax.Schedule:
  """Returns the learning rate as a function of the step, counted from 0.

  Args:
    config: The optimiser.
    num_steps: Steps of the run.
    rewarm_at: Step at which a second, short warm-up starts, for a change of the
      pattern; 0 means none.
    peak: Replaces the learning rate of `config`; may be traced.
  """
  peak = config.learning_rate if peak is None else peak
  warmup_steps = config.warmup_steps
  decay_steps = max(1, num_steps - warmup_steps)

  def warmed(step, start, num_steps):
    # The first update uses 1 / num_steps of the rate, not 0, so no step is
    # lost.
    return jnp.clip((step - start + 1) / num_steps, 0.0, 1.0)

  decay = (
    optax.constant_schedule(1.0)
    if config.schedule == "constant"
    else optax.cosine_decay_schedule(1.0, decay_steps, config.final_fraction)
  )

  def rate(step):
    factor = decay(jnp.maximum(step - warmup_steps, 0))
    if warmup_steps:
      factor = factor * warmed(step, 0, warmup_steps)
    if rewarm_at and config.rewarmup_steps:
      second = warmed(step, rewarm_at, config.rewarmup_steps)
      factor = factor * jnp.where(step < rewarm_at, 1.0, second)
    return peak * factor

  return rate


def _decays(path: tuple[Any, ...]) -> bool:
  """Whether weight decay acts on the parameter at `path`; norms have none."""
  return all(getattr(key, "key", None) != "scale" for key in path)


def _rate_ratio(path: tuple[Any, ...], config: OptimizerConfig) -> float:
  """Returns the multiple of the learning rate for the parameter at `path`."""
  names = {getattr(key, "key", None) for key in path}
  if names & {"embed_tokens", "lm_head"}:
    return config.embedding_ratio
  return config.lora_b_ratio if "lora_b" in names else 1.0


def make_optimizer(
  config: OptimizerConfig,
  num_steps: int,
  *,
  rewarm_at: int = 0,
  learning_rate: float | jax.Array | None = None,
) -> optax.GradientTransformation:
  """Returns AdamW according to `config`, for a run of `num_steps` steps.

  Args:
    config: The optimiser.
    num_steps: Steps of the run.
    rewarm_at: See `learning_rate_schedule`.
    learning_rate: Replaces that of `config`. It may be traced, so that one
      compiled step serves all rates.
  """
  steps = []
  if config.clip_norm is not None:
    steps.append(optax.clip_by_global_norm(config.clip_norm))
  steps.append(optax.scale_by_adam(config.beta1, config.beta2, config.epsilon))
  if config.weight_decay:
    steps.append(
      optax.add_decayed_weights(
        config.weight_decay,
        mask=functools.partial(
          jax.tree_util.tree_map_with_path, lambda path, _: _decays(path)
        ),
      )
    )
  if (config.embedding_ratio, config.lora_b_ratio) != (1.0, 1.0):
    steps.append(
      optax.stateless(
        lambda updates, _: jax.tree_util.tree_map_with_path(
          lambda path, x: x * _rate_ratio(path, config), updates
        )
      )
    )
  schedule = learning_rate_schedule(
    config, num_steps, rewarm_at=rewarm_at, peak=learning_rate
  )
  steps.append(optax.scale_by_learning_rate(schedule))
  return optax.chain(*steps)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
  """The factor that keeps float16 gradients above underflow.

  Attributes:
    scale: The factor, float32 scalar.
    good_steps: Steps without overflow since it last changed, int32 scalar.
    skipped: Number of steps skipped because of an overflow, int32 scalar.
    skipped_in_a_row: The same since the last step that was not skipped, int32
      scalar.
    dynamic: Whether the scale changes; static under jit.
  """

  scale: jax.Array
  good_steps: jax.Array
  skipped: jax.Array
  skipped_in_a_row: jax.Array
  dynamic: bool = dataclasses.field(metadata={"static": True})

  @classmethod
  def create(cls, dtype: jnp.dtype) -> "LossScale":
    """Returns the initial scale: always 1 unless dtype is float16."""
    dynamic = dtype == jnp.float16
    # Separate arrays: the step donates its state, and a buffer can be donated
    # only once.
    return cls(
      jnp.asarray(_INITIAL_LOSS_SCALE if dynamic else 1.0, jnp.float32),
      jnp.zeros((), jnp.int32),
      jnp.zeros((), jnp.int32),
      jnp.zeros((), jnp.int32),
      dynamic,
    )

  def update(self, finite: jax.Array) -> "LossScale":
    """Returns the scale after a step whose gradients were finite or not."""
    good_steps = jnp.where(finite, self.good_steps + 1, 0)
    scale = self.scale
    if self.dynamic:
      grow = good_steps >= _GROWTH_INTERVAL
      scale = jnp.where(grow, scale * 2, scale)
      scale = jnp.where(finite, scale, scale / 2)
      scale = jnp.clip(scale, 1.0, _MAX_LOSS_SCALE)
      good_steps = jnp.where(grow, 0, good_steps)
    overflow = jnp.logical_not(finite).astype(jnp.int32)
    return LossScale(
      scale,
      good_steps,
      self.skipped + overflow,
      (self.skipped_in_a_row + 1) * overflow,
      self.dynamic,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What a training step changes.

  Attributes:
    step: Steps done, int32 scalar.
    params: The trainable parameters.
    optimizer: Their optimiser state.
    loss_scale: The loss scale and the overflow counts.
  """

  step: jax.Array
  params: nnx.State
  optimizer: optax.OptState
  loss_scale: LossScale


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
  """Settings of a step, apart from the optimiser; static under jit.

  Attributes:
    patterns: Pattern of all layers, or a tuple with one per layer; None is
      dense.
    execution: How the layers are computed; state and batch are laid out on its
      mesh.
    num_micro_batches: Parts that the batch is cut into; their gradients are
      summed before the update (gradient accumulation).
    loss_chunk: How many tokens of each sequence have their logits in memory at
      once. If a sequence is split over devices, this counts the tokens of each
      shard.
    seed: Seed of the dropout.
    offload_optimizer: Whether the optimiser's moments stay in the host's memory
      between updates; see `init`.
  """

  patterns: Patterns = None
  execution: Execution = DEFAULT_EXECUTION
  num_micro_batches: int = 1
  loss_chunk: int = 512
  seed: int = 0
  offload_optimizer: bool = False

  @property
  def mesh(self) -> Mesh | None:
    """Mesh of the state and the batch; None means one device."""
    return self.execution.mesh


def _nearest(size: int, fits: Iterable[int]) -> int:
  """Returns the candidate nearest to a size, or the smaller one of two."""
  return min(fits, key=lambda other: (abs(other - size), other))


def _divisors(number: int) -> list[int]:
  return [n for n in range(1, number + 1) if number % n == 0]


def check_mesh(
  config: MeshConfig,
  step: StepConfig,
  model: LlamaConfig,
  *,
  batch_size: int,
  seq_len: int,
) -> None:
  """Checks that a mesh can divide a training step.

  Args:
    config: The mesh.
    step: Settings of the step; its own mesh is ignored.
    model: Sizes of the model.
    batch_size: Sequences per step.
    seq_len: Tokens of a sequence.

  Raises:
    ValueError: It cannot; the message names the axis and the nearest size that
      fits.
  """
  tensor, shards = config.tensor, config.sequence
  num_kv_heads = model.num_kv_heads
  if num_kv_heads % tensor:
    nearest = _nearest(tensor, _divisors(num_kv_heads))
    raise ValueError(
      f"mesh.tensor={tensor} does not divide {num_kv_heads} key/value heads:"
      f" the nearest that fits is mesh.tensor={nearest}."
    )
  micro_batch = batch_size // step.num_micro_batches
  if micro_batch % (config.data * config.fsdp):
    axis, other = (
      ("fsdp", config.data)
      if config.fsdp >= config.data
      else ("data", config.fsdp)
    )
    size = config.sizes[axis]
    fits = [n for n in _divisors(micro_batch) if micro_batch % (n * other) == 0]
    remedy = (
      f"the nearest that fits is mesh.{axis}={_nearest(size, fits)}"
      if fits
      else "use a larger batch"
    )
    fewer, rest = divmod(batch_size, config.data * config.fsdp)
    if fewer and not rest:
      remedy += f", or num_micro_batches={fewer}"
    raise ValueError(
      f"mesh.{axis}={size}{f', times {other},' if other > 1 else ''} does not"
      f" divide the {micro_batch} sequences of a micro batch: {remedy}."
    )
  unit = math.lcm(
    *{
      head.chunk_size or 1
      for layer in llama.by_layer(step.patterns, model)
      for pattern in patterns.members(layer)
      for head in pattern.heads
    }
  )
  if shards > 1 and seq_len % (shards * unit):
    whole = [n for n in _divisors(seq_len) if seq_len % (n * unit) == 0]
    remedy = (
      f"the nearest that fits is mesh.sequence={_nearest(shards, whole)}"
      if whole
      else f"use a length divisible by {shards * unit}"
    )
    of_chunks = f" of whole chunks of {unit} tokens" if unit > 1 else ""
    raise ValueError(
      f"mesh.sequence={shards} cannot cut {seq_len} tokens into equal"
      f" shards{of_chunks}: {remedy}."
    )


def _placed(tree: Any, space: Any) -> Any:
  """Returns the tree with its arrays (not scalars) in a memory space."""
  return jax.tree.map(
    lambda leaf: jax.device_put(leaf, space) if leaf.ndim else leaf, tree
  )


def state_shardings(
  state: TrainState, mesh: Mesh, *, offload_optimizer: bool = False
) -> TrainState:
  """Returns the sharding of every array of a training state.

  Args:
    state: Arrays or shapes.
    mesh: From `sharding.make_mesh`.
    offload_optimizer: Whether the moments are in the memory of the hosts.
  """
  layout = sharding.shardings(state, mesh)
  return _offloaded(state, layout) if offload_optimizer else layout


def _offloaded(state: TrainState, layout: TrainState) -> TrainState:
  """Returns the layout with the moments (not scalars) on the host."""
  return dataclasses.replace(
    layout,
    optimizer=jax.tree.map(
      lambda leaf, at: at.with_memory_kind(sharding.HOST) if leaf.ndim else at,
      state.optimizer,
      layout.optimizer,
    ),
  )


def init(
  model: Llama,
  trainable: Any,
  optimizer: optax.GradientTransformation,
  mesh: Mesh | None = None,
  *,
  offload_optimizer: bool = False,
) -> tuple[nnx.GraphDef, TrainState, nnx.State]:
  """Returns the start of a run; its arrays are the model's, not copies.

  Args:
    model: The model before the first step.
    trainable: The `nnx` filter of the parameters to train (`lora.trainable`).
    optimizer: From `make_optimizer`.
    mesh: Devices to lay everything out on; arrays already laid out stay.
    offload_optimizer: Whether the moments are put in the host's memory, for
      `StepConfig.offload_optimizer`.

  Returns:
    The model's structure, the state before the first step, and all parameters
    that are not trained.
  """
  graphdef, params, frozen = nnx.split(model, trainable, ...)
  params, frozen = sharding.place((params, frozen), mesh)
  dtype = model.dtype

  def rest(params):
    return (
      jnp.zeros((), jnp.int32),
      optimizer.init(params),
      LossScale.create(dtype),
    )

  if offload_optimizer:
    # On the CPU: the device may have no room for the moments, and freeing them
    # later would fragment its memory.
    shapes = jax.eval_shape(lambda tree: tree, params)
    with sharding.on_host():
      step, moments, loss_scale = rest(shapes)
    state = TrainState(step, params, moments, loss_scale)
    # Commit every array to a device: the step returns committed arrays, and an
    # uncommitted input would recompile it. The parameters are not copied, as
    # they are already in place.
    if mesh is not None:
      layout = sharding.shardings(state, mesh)
      state = jax.tree.map(sharding.put, state, _offloaded(state, layout))
    else:
      (device,) = jax.tree.leaves(params)[0].devices()
      layout = jax.tree.map(lambda _: SingleDeviceSharding(device), state)
      state = jax.device_put(state, _offloaded(state, layout))
    return graphdef, state, frozen
  make = rest
  if mesh is not None:
    layout = sharding.shardings(jax.eval_shape(rest, params), mesh)
    make = jax.jit(rest, out_shardings=layout)
  step, moments, loss_scale = make(params)
  return graphdef, TrainState(step, params, moments, loss_scale), frozen


def _batch_loss(params, graphdef, frozen, batch, rng, config: StepConfig):
  # Gather the head here, because every iteration of the loss's loop uses it;
  # the layers gather their own weights.
  params, frozen = sharding.gathered(
    (params, frozen), config.mesh, leave="layers"
  )
  model = nnx.merge(graphdef, params, frozen)

  def losses_of(hidden, targets):
    hidden, targets = (
      sharding.by_shard(x, config.mesh) for x in (hidden, targets)
    )
    return losses.token_losses(
      model.head(hidden), hidden, targets, config.loss_chunk
    )

  of_tokens = segments.map_hidden_states(
    losses_of,
    model,
    batch["tokens"],
    (batch["targets"],),
    config.patterns,
    config.execution,
    positions=batch.get("positions"),
    segment_ids=batch.get("segment_ids"),
    rngs=nnx.Rngs(dropout=rng),
  )
  return jnp.sum(of_tokens * sharding.by_shard(batch["mask"], config.mesh))


def _global_norm(tree) -> jax.Array:
  return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))


def train_step(
  state: TrainState,
  frozen: nnx.State,
  batch: dict[str, jax.Array],
  *,
  graphdef: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  config: StepConfig,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Returns the state after one optimiser step, and its metrics.

  The loss is the mean over all targets of the whole batch, however it is cut
  into micro batches. A step with non-finite gradients changes only the loss
  scale and the counts.

  Args:
    state: The state before.
    frozen: All other parameters and variables of the model.
    batch: `tokens`, `targets` (int32) and `mask` (float32), `[batch, seq]`;
      packed documents add `segment_ids` and `positions` (int32).
    graphdef: The model's structure, from `nnx.split`.
    optimizer: From `make_optimizer`.
    config: Settings of the step.

  Returns:
    The state, and float32 scalars `loss` (nats per target), `grad_norm` (before
    clipping), `num_targets`, `loss_scale`, `skipped` and `skipped_in_a_row`.

  Raises:
    ValueError: The batch is not divisible by `num_micro_batches`.
  """
  batch_size = batch["tokens"].shape[0]
  parts = config.num_micro_batches
  if batch_size % parts:
    raise ValueError(
      f"a batch of {batch_size} sequences cannot be cut into {parts} micro"
      " batches of the same size."
    )
  rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
  num_targets = jnp.maximum(jnp.sum(batch["mask"]), 1.0)
  scale = state.loss_scale.scale
  # Micro batch i takes the sequences i, i + parts, ..., equally many per
  # device.
  micro_batches = jax.tree.map(
    lambda x: jnp.swapaxes(
      x.reshape(batch_size // parts, parts, *x.shape[1:]), 0, 1
    ),
    batch,
  )
  leaves, treedef = jax.tree.flatten(state.params)
  zeros = jax.tree.map(jnp.zeros_like, state.params)
  if config.mesh is not None:
    zeros = jax.lax.with_sharding_constraint(
      zeros, sharding.shardings(zeros, config.mesh)
    )
  # Each gradient is summed in place, to avoid a second copy of it.
  sums = [jax.new_ref(zero) for zero in jax.tree.leaves(zeros)]

  def accumulate(total, micro):
    micro_batch, micro_rng = micro

    def loss_of(leaves):
      params = jax.tree.unflatten(treedef, leaves)
      return _batch_loss(
        params, graphdef, frozen, micro_batch, micro_rng, config
      )

    loss, pull_back = jax.vjp(loss_of, leaves)
    # Scale each micro batch as if it were the whole batch; dividing by their
    # number here would underflow float16. The barrier makes XLA compute the
    # loss before the backward pass. Nothing in there needs the loss, so XLA
    # would otherwise keep its inputs until the end.
    cotangent, loss = jax.lax.optimization_barrier(
      (scale * parts / num_targets, loss)
    )
    pull_back.with_refs(sums)(cotangent)
    return total + loss, None

  loss, _ = jax.lax.scan(
    accumulate,
    jnp.zeros((), jnp.float32),
    (micro_batches, jax.random.split(rng, parts)),
  )
  grads = jax.tree.unflatten(treedef, [jax.freeze(total) for total in sums])
  grads = jax.tree.map(lambda g: g / (scale * parts).astype(g.dtype), grads)
  grad_norm = _global_norm(grads)
  finite = jnp.isfinite(grad_norm)

  of_optimizer = state.optimizer
  if config.offload_optimizer:
    # Only once the gradients exist: otherwise XLA would fetch the moments at
    # the very start, and nothing would be gained.
    of_optimizer, finite = jax.lax.optimization_barrier((of_optimizer, finite))
    of_optimizer = _placed(of_optimizer, jax.memory.Space.Device)
  updates, new_optimizer = optimizer.update(grads, of_optimizer, state.params)
  new_params = optax.apply_updates(state.params, updates)
  keep = functools.partial(jnp.where, finite)
  new_optimizer = jax.tree.map(keep, new_optimizer, of_optimizer)
  if config.offload_optimizer:
    new_optimizer = _placed(new_optimizer, jax.memory.Space.Host)
  loss_scale = state.loss_scale.update(finite)
  new_state = TrainState(
    state.step + 1,
    jax.tree.map(keep, new_params, state.params),
    new_optimizer,
    loss_scale,
  )
  metrics = {
    "loss": loss / num_targets,
    "grad_norm": grad_norm,
    "num_targets": num_targets,
    "loss_scale": scale,
    "skipped": loss_scale.skipped.astype(jnp.float32),
    "skipped_in_a_row": loss_scale.skipped_in_a_row.astype(jnp.float32),
  }
  return new_state, metrics


def compiler_options(
  execution: Execution | None = None, *trees: Any
) -> dict[str, Any]:
  """Returns the XLA options that a step is compiled with.

  Options in the user's XLA_FLAGS take precedence.

  Args:
    execution: How the step computes the layers, if that is known.
    *trees: The parameters, frozen ones too, arrays or shapes.
  """
  options: dict[str, Any] = dict(_COMPILER_OPTIONS)
  if execution and execution.segment_len and execution.offload_segments:
    options |= _OF_OFFLOADED_SEGMENTS
  mesh = execution.mesh if execution else None
  if mesh is not None and mesh.shape[sharding.FSDP] > 1:
    # All matrices of a layer in one message: XLA fetches that while the layer
    # before is computed. Of single matrices it fetches every other one only
    # when it is needed.
    options[_GATHERED_AT_ONCE] = sharding.layer_bytes(trees)
  flags = os.environ.get("XLA_FLAGS", "")
  return {name: value for name, value in options.items() if name not in flags}


def compile_step(
  graphdef: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  config: StepConfig,
  state: TrainState,
  frozen: nnx.State,
):
  """Returns `train_step` under jit, called with `(state, frozen, batch)`.

  The state's buffers are donated, so the state passed in is unusable
  afterwards.

  Args:
    graphdef: See `train_step`.
    optimizer: See `train_step`.
    config: See `train_step`.
    state: A state, arrays or shapes; on a mesh it stays laid out as
      `state_shardings` says.
    frozen: The frozen parameters, arrays or shapes.
  """
  layout, trees = {}, ()
  if config.mesh is not None:
    trees = state.params, frozen
    of_state = state_shardings(
      state, config.mesh, offload_optimizer=config.offload_optimizer
    )
    layout = {
      "in_shardings": (
        of_state,
        sharding.shardings(frozen, config.mesh),
        sharding.batch_sharding(config.mesh),
      ),
      "out_shardings": (of_state, sharding.replicated(config.mesh)),
    }
  return jax.jit(
    functools.partial(
      train_step, graphdef=graphdef, optimizer=optimizer, config=config
    ),
    donate_argnums=0,
    compiler_options=compiler_options(config.execution, *trees),
    **layout,
  )
