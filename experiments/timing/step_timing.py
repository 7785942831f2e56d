"""Times this package's step, as a contestant of `benchmark_step`.

Each contestant is measured in its own process (see `process.run_alone`).
"""

import dataclasses
import math
import platform
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from experiments.shared import loop, resolve
from experiments.shared.config import FinetuneConfig
from experiments.shared.resolve import Resolved
from experiments.timing import clock
from scca_jax import (
  convert,
  lora,
  memory,
  parallel,
  patterns,
  quantize,
  sharding,
  traffic,
  training,
)
from scca_jax.llama import Llama
from scca_jax.training import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A step to be timed.

  Attributes:
    run: Settings; the step takes `training.batch_size` sequences of
      `training.seq_len` tokens at once.
    random_weights: Whether to draw the weights on the device instead of reading
      them; a config.json is then enough.
    warmup: Steps before the timed ones.
    repeats: Timed steps.
  """

  run: FinetuneConfig
  random_weights: bool
  warmup: int
  repeats: int

  @property
  def resolved(self) -> Resolved:
    """Model and step, without the devices of the mesh."""
    return resolve.resolve(self.run, find_devices=False)

  def tokens(self) -> np.ndarray:
    """Returns the tokens of the step, drawn once, `[batch, seq]`."""
    train = self.run.training
    return np.random.default_rng(train.seed).integers(
      0,
      self.resolved.base.vocab_size,
      (train.batch_size, train.seq_len),
      np.int32,
    )


def make_case(
  run: FinetuneConfig,
  seq_len: int,
  *,
  random_weights: bool,
  warmup: int,
  repeats: int,
) -> Case:
  """Returns the case of a run at a length.

  Each copy of the model, along `data` and `fsdp`, has one micro batch.

  Raises:
    ValueError: The pattern is unknown, or a setting does not fit.
  """
  train = run.training
  copies = run.mesh.data * run.mesh.fsdp
  train = dataclasses.replace(
    train,
    seq_len=seq_len,
    batch_size=train.batch_size // train.num_micro_batches * copies,
    num_micro_batches=1,
  )
  case = Case(
    run=dataclasses.replace(run, training=train),
    random_weights=random_weights,
    warmup=warmup,
    repeats=repeats,
  )
  # Checks the settings.
  _ = case.resolved
  return case


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A step and its arguments.

  Attributes:
    step: From `training.compile_step`.
    state: The training state; the step donates its buffers.
    frozen: All other parameters.
    batch: See `training.train_step`.
    mesh: Devices of the step; None means one.
  """

  step: Any
  state: TrainState
  frozen: nnx.State
  batch: dict[str, jax.Array]
  mesh: Mesh | None


def prepare(case: Case) -> Prepared:
  """Returns the step of a case with its arrays on the device.

  Raises:
    ValueError: The weights cannot be read, or do not fit the configuration.
  """
  run, train = case.run, case.run.training
  settings: dict[str, Any] = {
    "lora": run.lora,
    "dtype": jnp.dtype(train.dtype),
    "param_dtype": jnp.dtype(train.param_dtype),
  }
  optimizer = training.make_optimizer(run.optimizer, train.steps)
  resolved = resolve.resolve(run)
  config, mesh = resolved.target, resolved.mesh
  if case.random_weights:

    def make() -> Llama:
      model = Llama(config, rngs=nnx.Rngs(train.seed), **settings)
      return quantize.quantize_model(model, train.quantize)

    # Under jit they are drawn on the device, each in its own dtype.
    graphdef, shapes = nnx.split(nnx.eval_shape(make))
    layout = None if mesh is None else sharding.shardings(shapes, mesh)
    draw = jax.jit(lambda: nnx.split(make())[1], out_shardings=layout)
    model = nnx.merge(graphdef, draw())
  else:
    model = loop.load(
      lambda: convert.load_model(
        resolve.model_path(run.model),
        config=config,
        quantize_by=train.quantize,
        rngs=nnx.Rngs(train.seed),
        **settings,
      ),
      mesh,
    )
  graphdef, state, frozen = training.init(
    model,
    lora.trainable(run.lora),
    optimizer,
    mesh,
    offload_optimizer=train.offload_optimizer,
  )
  step = training.compile_step(
    graphdef, optimizer, resolved.step, state, frozen
  )
  tokens = case.tokens()
  # The peers shift the tokens, so the last one has no target.
  mask = np.ones(tokens.shape, np.float32)
  mask[:, -1] = 0
  batch = {
    "tokens": tokens,
    "targets": np.roll(tokens, -1, axis=1),
    "mask": mask,
  }
  if mesh is None:
    batch = jax.tree.map(jnp.asarray, batch)
  batch = sharding.place_batch(batch, mesh, train.batch_size)
  return Prepared(step, state, frozen, batch, mesh)


def moved_bytes(case: Case, compiled: Any) -> dict[str, Any]:
  """Returns what a device receives in a step, in bytes of floats.

  Args:
    case: What was compiled.
    compiled: The step.

  Returns:
    `compiled`, by kind of collective, as read from the program; `attention`,
    what attention moves between the shards of a sequence, in closed form; and
    `ring_attention`, the same if keys and values went round all devices. A
    layer runs forward once, again if the backward pass recomputes it, and
    backward.
  """
  run, mesh, resolved = case.run, case.run.mesh, case.resolved
  sizes: dict[str, Any] = {
    "seq_len": run.training.seq_len,
    "num_shards": mesh.sequence,
    "num_kv_heads": resolved.base.num_kv_heads // mesh.tensor,
    "head_dim": resolved.base.head_dim,
    "itemsize": jnp.dtype(run.training.dtype).itemsize,
    "batch": run.training.batch_size // (mesh.data * mesh.fsdp),
  }
  forward = 1 if run.training.remat == "none" else 2
  result: dict[str, Any] = {
    "compiled": {
      kind: moved["floats"]
      for kind, moved in traffic.moved_bytes(compiled).items()
    }
  }
  if mesh.sequence > 1 and mesh.tensor == 1:
    result["attention"] = sum(
      forward * parallel.bytes_received(pattern, **sizes)
      + parallel.bytes_received(pattern, **sizes, backward=True)
      for layer in resolved.patterns
      for pattern in patterns.members(layer)
    )
    result["ring_attention"] = (
      (forward + 2) * len(resolved.patterns) * traffic.ring_bytes(**sizes)
    )
  return result


def check_loss(loss: float, who: str) -> float:
  """Returns the loss.

  Raises:
    ValueError: It is not finite, so the step is wrong and not timed.
  """
  if not math.isfinite(loss):
    raise ValueError(f"the loss of {who} is {loss}: its step is not timed.")
  return loss


def measure(case: Case) -> dict[str, Any]:
  """Returns the cost of a step of this package.

  Steps are timed one by one, each from its call until its results are ready.

  Raises:
    ValueError: The loss is not finite.
    NotImplementedError: The device cannot run the requested implementation.
  """
  prepared = prepare(case)
  state, frozen, batch = prepared.state, prepared.frozen, prepared.batch
  mesh = prepared.mesh
  started = time.perf_counter()
  compiled = prepared.step.lower(state, frozen, batch).compile()
  compile_seconds = time.perf_counter() - started
  # The step donates the buffers of its state.
  del prepared
  times, loss = [], math.nan
  for i in range(case.warmup + case.repeats):
    started = time.perf_counter()
    state, metrics = jax.block_until_ready(compiled(state, frozen, batch))
    if i >= case.warmup:
      times.append(time.perf_counter() - started)
    if i == 0:
      loss = check_loss(float(metrics["loss"]), "scca_jax")
  check_loss(float(metrics["loss"]), "scca_jax")
  num_devices = case.run.mesh.num_devices
  peak = memory.measured_bytes(jax.devices()[:num_devices])
  moved = moved_bytes(case, compiled) if mesh is not None else None
  del state, frozen, batch, metrics
  train = case.run.training
  num_pairs = train.batch_size * sum(
    pattern.num_pairs(train.seq_len) for pattern in case.resolved.patterns
  )
  return clock.spread(times) | {
    "first_loss": loss,
    "compile_seconds": compile_seconds,
    "peak_bytes": peak,
    "num_devices": num_devices,
    "moved_bytes": moved,
    "compiled_peak_bytes": memory.device_bytes(compiled),
    "compiled_host_bytes": memory.host_bytes(compiled),
    # Linux counts in KiB. This includes loading and compiling.
    "resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    "num_pairs": num_pairs,
    "device": jax.devices()[0].device_kind,
    "versions": {
      "python": platform.python_version(),
      "jax": jax.__version__,
    },
    # In the same process, so that the chip has the same temperature.
    "matmul_tflops": clock.matmul_tflops(train.dtype),
    "link_bytes_per_second": None if mesh is None else clock.link_rate(mesh),
  }
