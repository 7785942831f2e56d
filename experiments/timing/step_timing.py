"""One contestant of `benchmark_step`: the step of this package, timed.

Each is measured in a process of its own (see `run_alone`): the peak of memory
that jax reports is that of its process, and what PyTorch or jax keep for reuse
is gone with theirs.
"""

import concurrent.futures
import dataclasses
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.shared import loop, resolve
from experiments.shared.config import FinetuneConfig, PatternConfig
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
from scca_jax.llama_config import PROJECTIONS, LlamaConfig
from scca_jax.lora import LoraConfig
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


def operations(
  config: LlamaConfig, adapter: LoraConfig, num_pairs: int, num_tokens: int
) -> dict[str, float]:
  """Returns the floating-point operations of a step.

  A product with `n` weights takes `2 n` a token, forward; the gradient of its
  input as many; that of the weights as many where they are trained. Attention
  takes two products of `2 head_dim` a seen pair forward, and four backward.
  Lookups, norms and the optimiser count as nothing.

  Args:
    config: Sizes of the model.
    adapter: What is trained.
    num_pairs: Pairs that attention sees, over sequences, heads and layers.
    num_tokens: Tokens.

  Returns:
    `model`: what the mathematics asks for. `with_remat`: with each layer, but
    not the head, computed forward once more for the backward pass.
  """
  shapes = {name: config.projection_shape(name) for name in PROJECTIONS}
  frozen = config.num_layers * sum(a * b for a, b in shapes.values())
  adapted = (
    config.num_layers
    * adapter.rank
    * sum(sum(shapes[name]) for name in adapter.targets)
  )
  head = config.hidden_size * config.vocab_size
  attention = 4 * config.head_dim * num_pairs
  forward = 2 * num_tokens * (frozen + adapted) + attention
  trained = adapted + (head if adapter.train_embeddings else 0)
  of_head = 2 * num_tokens * head
  model = (
    forward
    + of_head
    + 2 * num_tokens * (frozen + adapted + head + trained)
    + 2 * attention
  )
  return {"model": float(model), "with_remat": float(model + forward)}


# The step of this package.


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


def spread(seconds: list[float]) -> dict[str, Any]:
  """Returns the median, least and most of what was timed, in milliseconds."""
  times = [1e3 * s for s in seconds]
  return {
    "median_ms": statistics.median(times),
    "least_ms": min(times),
    "most_ms": max(times),
    "all_ms": times,
  }


def check_loss(loss: float, who: str) -> float:
  """Returns the loss.

  Raises:
    ValueError: It is not finite: what computes that is not timed.
  """
  if not math.isfinite(loss):
    raise ValueError(f"the loss of {who} is {loss}: its step is not timed.")
  return loss


def _matmul_tflops(dtype: str) -> float:
  """Returns the rate of one large square product here, in TFLOP/s."""
  n, calls = (8192, 20) if jax.default_backend() == "gpu" else (1024, 2)
  a, b = (
    jax.random.normal(key, (n, n), jnp.float32).astype(dtype)
    for key in jax.random.split(jax.random.key(1))
  )
  multiply = jax.jit(jnp.dot)
  jax.block_until_ready(multiply(a, b))
  rates = []
  for _ in range(5):
    started = time.perf_counter()
    product = None
    for _ in range(calls):
      product = multiply(a, b)
    jax.block_until_ready(product)
    rates.append(2e-12 * calls * n**3 / (time.perf_counter() - started))
  return statistics.median(rates)


def _link_rate(mesh: Mesh) -> float:
  """Returns the bytes a second that a device receives of its neighbour.

  All devices of the mesh send at once, each to the next.
  """
  axes, n = mesh.axis_names, mesh.size
  numbers, calls = (2**27, 20) if jax.default_backend() == "gpu" else (2**16, 2)
  layout = NamedSharding(mesh, PartitionSpec(axes))
  x = jax.jit(lambda: jnp.ones((n * numbers,)), out_shardings=layout)()
  send = jax.jit(
    jax.shard_map(
      lambda x: lax.ppermute(x, axes, [(i, (i + 1) % n) for i in range(n)]),
      mesh=mesh,
      in_specs=layout.spec,
      out_specs=layout.spec,
    )
  )
  jax.block_until_ready(send(x))
  rates = []
  for _ in range(5):
    started = time.perf_counter()
    for _ in range(calls):
      x = send(x)
    jax.block_until_ready(x)
    rates.append(calls * 4 * numbers / (time.perf_counter() - started))
  return statistics.median(rates)


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
  return spread(times) | {
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
    "matmul_tflops": _matmul_tflops(train.dtype),
    "link_bytes_per_second": None if mesh is None else _link_rate(mesh),
  }


# A process for each.


def _start() -> None:
  """Prepares a process, before jax takes memory in it."""
  # Compiling is timed: nothing is to be found already compiled.
  jax.config.update("jax_enable_compilation_cache", False)


def run_alone(function: Callable[[Any], Any], case: Any) -> Any:
  """Returns `function(case)`, computed in a process of its own.

  Raises:
    RuntimeError: The process ended without a result, for want of memory for
      example. What the function raises is raised here as well.
  """
  # Memory is asked for as it is needed, so that the peak is what was needed.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  with concurrent.futures.ProcessPoolExecutor(
    1, multiprocessing.get_context("spawn"), initializer=_start
  ) as pool:
    return pool.submit(function, case).result()
