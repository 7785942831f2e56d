"""One contestant of `benchmark_step`: the step of this package, timed.

Each is measured in a process of its own (see `process.run_alone`).
"""

import dataclasses
import math
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from experiments.shared import loop, resolve
from experiments.shared.config import FinetuneConfig, PatternConfig
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
from scca_jax.llama_config import LlamaConfig
from scca_jax.training import TrainState

# Patterns whose chunks the configuration may set.
_CHUNKED = ("local", "s2", "scca_fixed", "scca_flow", "dilated", "longmixed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A step to be timed.

  Attributes:
    run: Settings; the step takes `training.batch_size` sequences of
      `training.seq_len` tokens at once.
    random_weights: Whether weights are drawn where they are used, and those of
      the model not read: its config.json is enough.
    warmup: Steps that are not timed.
    repeats: Steps that are.
  """

  run: FinetuneConfig
  random_weights: bool
  warmup: int
  repeats: int

  @property
  def base(self) -> LlamaConfig:
    """Sizes of the model as it was pretrained."""
    return convert.load_config(resolve.model_path(self.run.model))

  @property
  def model(self) -> LlamaConfig:
    """Sizes of the model at the length of the case."""
    return resolve.extended(self.base, self.run)

  @property
  def schedule(self) -> tuple[patterns.AttentionPattern, ...]:
    """The pattern of each layer."""
    return resolve.make_patterns(
      self.run.pattern, self.base, self.run.training.seq_len
    )

  def make_mesh(self) -> Mesh | None:
    """Returns the devices of the step, or None for one.

    Raises:
      ValueError: The step cannot be cut in that way, or there are not so many.
    """
    return resolve.make_mesh(
      self.run.mesh, self.run.training, self.base, self.schedule
    )

  def tokens(self) -> np.ndarray:
    """Returns the tokens of the step, drawn once, `[batch, seq]`."""
    train = self.run.training
    return np.random.default_rng(train.seed).integers(
      0, self.base.vocab_size, (train.batch_size, train.seq_len), np.int32
    )


def make_case(
  run: FinetuneConfig,
  pattern: str,
  seq_len: int,
  *,
  random_weights: bool,
  warmup: int,
  repeats: int,
) -> Case:
  """Returns the case of a pattern at a length.

  Each copy of the model, along `data` and `fsdp`, has one micro batch. The
  pattern of the configuration keeps its settings; others have its
  `chunk_size`, if they have chunks.

  Raises:
    ValueError: The pattern is unknown, or a setting does not fit it.
  """
  train = run.training
  if pattern != run.pattern.name:
    run = dataclasses.replace(
      run,
      pattern=PatternConfig(
        name=pattern,
        chunk_size=run.pattern.chunk_size if pattern in _CHUNKED else None,
      ),
    )
  case = Case(
    run=dataclasses.replace(
      run,
      training=dataclasses.replace(
        train,
        seq_len=seq_len,
        batch_size=train.batch_size
        // train.num_micro_batches
        * (run.mesh.data * run.mesh.fsdp),
        num_micro_batches=1,
      ),
    ),
    random_weights=random_weights,
    warmup=warmup,
    repeats=repeats,
  )
  _ = case.model, case.schedule
  resolve.check_mesh(run.mesh, case.run.training, case.base, case.schedule)
  return case


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A step, and what it is called with.

  Attributes:
    step: From `training.compile_step`.
    state: The training state; the step takes its buffers.
    frozen: All other parameters.
    batch: See `training.train_step`.
  """

  step: Any
  state: TrainState
  frozen: nnx.State
  batch: dict[str, jax.Array]


def prepare(case: Case) -> Prepared:
  """Returns the step of a case with its arrays on the device.

  Raises:
    ValueError: The weights cannot be read, or do not fit the configuration.
  """
  run, train = case.run, case.run.training
  trainable = lora.trainable(run.lora)
  settings: dict[str, Any] = {
    "lora": run.lora,
    "dtype": jnp.dtype(train.dtype),
    "param_dtype": jnp.dtype(train.param_dtype),
  }
  optimizer = training.make_optimizer(run.optimizer, train.steps)
  mesh = case.make_mesh()
  if case.random_weights:

    def make() -> Llama:
      model = Llama(case.model, rngs=nnx.Rngs(train.seed), **settings)
      return quantize.quantize_model(model, train.quantize)

    # Under jit they are drawn on the device, each in its own dtype.
    graphdef, *shapes = nnx.split(nnx.eval_shape(make), trainable, ...)
    layout = None
    if mesh is not None:
      layout = sharding.shardings(tuple(shapes), mesh)
    params, frozen = jax.jit(
      lambda: tuple(nnx.split(make(), trainable, ...)[1:]),
      out_shardings=layout,
    )()
  else:
    model = loop.load(
      lambda: convert.load_model(
        resolve.model_path(run.model),
        config=case.model,
        quantize_by=train.quantize,
        rngs=nnx.Rngs(train.seed),
        **settings,
      ),
      mesh,
    )
    graphdef, params, frozen = nnx.split(model, trainable, ...)
  state = training.init_state(
    params,
    optimizer,
    train.dtype,
    mesh,
    offload_optimizer=train.offload_optimizer,
  )
  step = training.compile_step(
    graphdef,
    optimizer,
    resolve.step_config(train, case.schedule, mesh),
    state,
    frozen,
  )
  tokens = case.tokens()
  # As the peers shift the tokens: the last has no target.
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
  return Prepared(step, state, frozen, batch)


def moved_bytes(case: Case, compiled: Any) -> dict[str, Any]:
  """Returns what a device receives in a step, in bytes of floats.

  Args:
    case: What was compiled.
    compiled: The step.

  Returns:
    `compiled`, by kind of collective, as read from the program; of what
    attention moves between pieces of a sequence, `attention`, in closed form,
    and `ring_attention`, the same for keys and values that go round all
    devices. A layer goes forward once, once more where it is computed anew for
    the backward pass, and back.
  """
  run, mesh = case.run, case.run.mesh
  sizes = {
    "seq_len": run.training.seq_len,
    "num_pieces": mesh.sequence,
    "num_kv_heads": case.base.num_kv_heads // mesh.tensor,
    "head_dim": case.base.head_dim,
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
    result["attention"] = (forward + 1) * sum(
      parallel.bytes_received(pattern, **sizes) for pattern in case.schedule
    )
    result["ring_attention"] = (
      (forward + 2) * len(case.schedule) * traffic.ring_bytes(**sizes)
    )
  return result


def check_loss(loss: float, who: str) -> float:
  """Returns the loss.

  Raises:
    ValueError: It is not finite: what computes that is not timed.
  """
  if not math.isfinite(loss):
    raise ValueError(f"the loss of {who} is {loss}: its step is not timed.")
  return loss


def measure(case: Case) -> dict[str, Any]:
  """Returns what a step of this package takes.

  Steps are timed one by one, each from its call until all it gives is there.

  Raises:
    ValueError: The loss is not finite.
    NotImplementedError: The device cannot run the implementation asked for.
  """
  prepared = prepare(case)
  state, frozen, batch = prepared.state, prepared.frozen, prepared.batch
  started = time.perf_counter()
  compiled = prepared.step.lower(state, frozen, batch).compile()
  compile_seconds = time.perf_counter() - started
  # The step takes the buffers of the state it is given.
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
  mesh = case.make_mesh()
  moved = moved_bytes(case, compiled) if mesh is not None else None
  del state, frozen, batch, metrics
  train = case.run.training
  num_pairs = train.batch_size * sum(
    pattern.num_pairs(train.seq_len) for pattern in case.schedule
  )
  return clock.spread(times) | {
    "first_loss": loss,
    "compile_seconds": compile_seconds,
    "peak_bytes": peak,
    "num_devices": num_devices,
    "moved_bytes": moved,
    "compiled_peak_bytes": memory.device_bytes(compiled),
    "num_pairs": num_pairs,
    "device": jax.devices()[0].device_kind,
    "versions": {
      "python": platform.python_version(),
      "jax": jax.__version__,
    },
    # Of the same process and heat.
    "matmul_tflops": clock.matmul_tflops(train.dtype),
    "link_bytes_per_second": None if mesh is None else clock.link_rate(mesh),
  }
