"""Trains many (learning rate, seed) pairs of an arm at once.

One compiled step serves all pairs of an arm: learning rate, seed and data are
its arguments, and `jax.vmap` runs several pairs side by side. Trained
parameters have a leading axis of pairs; frozen weights are shared.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.ablation.settings import AblationConfig, ArmConfig
from experiments.shared import resolve
from experiments.shared.config import FinetuneConfig
from scca_jax import convert, lora, training
from scca_jax.llama import Llama
from scca_jax.token_file import TokenFile

# A learning rate and a seed.
Pair = tuple[float, int]
# Steps that are not timed, as the first one compiles.
_UNTIMED_STEPS = 2


@dataclasses.dataclass(frozen=True)
class Weights:
  """The models of several pairs, in two parts.

  Attributes:
    graphdef: Structure of each model.
    params: Trained parameters, `[pairs, ...]`.
    frozen: All other parameters, which pairs share.
  """

  graphdef: nnx.GraphDef
  params: nnx.State
  frozen: nnx.State

  def model(self, index: int) -> Llama:
    """Returns the model of one pair."""
    params = jax.tree.map(lambda leaf: leaf[index], self.params)
    return nnx.merge(self.graphdef, params, self.frozen)


@dataclasses.dataclass(frozen=True)
class Look:
  """A validation loss measured during training.

  Attributes:
    steps: Steps done.
    seconds: Training seconds per pair until then, without compilation: the
      seconds of all pairs trained at once, divided by their number.
    losses: `[pairs]` nats.
  """

  steps: int
  seconds: float
  losses: np.ndarray


@functools.lru_cache(maxsize=8)
def _load(
  model: str | None,
  adapter: lora.LoraConfig | None,
  dtypes: tuple[str, str],
  seed: int,
  device: Any,
) -> Llama:
  """Returns a model on a device, which must be the default one."""
  del device  # Part of the key: each device needs arrays of its own.
  dtype, param_dtype = map(jnp.dtype, dtypes)
  return convert.load_model(
    resolve.model_path(model),
    lora=adapter,
    dtype=dtype,
    param_dtype=param_dtype,
    rngs=nnx.Rngs(seed),
  )


def _new_model(
  run: FinetuneConfig,
  adapter: lora.LoraConfig | None,
  resolved: resolve.Resolved,
  seed: int,
) -> Llama:
  """Returns the model that a run starts from, sharing its arrays."""
  dtypes = run.training.dtype, run.training.param_dtype
  # Only new adapters depend on the seed.
  seed = 0 if adapter is None else seed
  device = jax.config.jax_default_device
  loaded = _load(run.model, adapter, dtypes, seed, device)
  model = nnx.merge(*nnx.split(loaded))
  model.config = resolved.target
  return model


def untuned(run: FinetuneConfig, resolved: resolve.Resolved) -> Weights:
  """Returns the model of an arm that tunes nothing, as a single pair."""
  model = _new_model(run, None, resolved, 0)
  graphdef, params, frozen = nnx.split(model, nnx.Param, ...)
  return Weights(graphdef, jax.tree.map(lambda x: x[None], params), frozen)


def stack(trees: list[Any]) -> Any:
  """Returns trees of arrays as one tree with a leading axis of pairs."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _states(
  run: FinetuneConfig, resolved: resolve.Resolved, seeds: list[int]
) -> tuple[nnx.GraphDef, training.TrainState, nnx.State]:
  """Returns the start of training; the state has an axis of pairs."""
  optimizer = training.make_optimizer(run.optimizer, run.training.steps)
  trainable = lora.trainable(run.adapter)
  by_seed = {
    seed: training.init(
      _new_model(run, run.adapter, resolved, seed), trainable, optimizer
    )
    for seed in set(seeds)
  }
  graphdef, _, frozen = by_seed[seeds[0]]
  return graphdef, stack([by_seed[seed][1] for seed in seeds]), frozen


def initial(
  run: FinetuneConfig, resolved: resolve.Resolved, seeds: list[int]
) -> Weights:
  """Returns the models before the first step, a pair for each seed."""
  graphdef, state, frozen = _states(run, resolved, seeds)
  return Weights(graphdef, state.params, frozen)


@functools.lru_cache(maxsize=8)
def make_step(
  graphdef: nnx.GraphDef,
  config: training.StepConfig,
  optimizer: training.OptimizerConfig,
  num_steps: int,
  dense_from: int,
) -> Callable[..., Any]:
  """Returns a step of several pairs, compiled once for similar calls.

  It takes the state `[pairs, ...]`, the frozen weights, batches
  `[pairs, batch, seq]`, learning rates and seeds `[pairs]`, and returns the
  state and the metrics, as `training.train_step` does for one.

  Args:
    graphdef: The model's structure.
    config: Settings of the step; its seed is ignored.
    optimizer: The optimiser; its learning rate is ignored.
    num_steps: Steps of the run.
    dense_from: Step at which training becomes dense, for the second warm-up.
  """

  def step(state, frozen, batch, rate, seed):
    return training.train_step(
      state,
      frozen,
      batch,
      graphdef=graphdef,
      optimizer=training.make_optimizer(
        optimizer, num_steps, rewarm_at=dense_from, learning_rate=rate
      ),
      config=dataclasses.replace(config, seed=seed),
    )

  return jax.jit(
    jax.vmap(step, in_axes=(0, None, 0, 0, 0)),
    donate_argnums=0,
    compiler_options=training.compiler_options(),
  )


def train(
  study: AblationConfig,
  arm: ArmConfig,
  pairs: list[Pair],
  tokens: TokenFile,
  evaluate: Callable[[Weights], np.ndarray],
) -> tuple[Weights, list[Look], float]:
  """Trains the pairs of an arm.

  Args:
    study: The study.
    arm: The arm.
    pairs: Learning rates and seeds.
    tokens: Text to train on.
    evaluate: Returns the validation loss of each pair, for the looks.

  Returns:
    The trained models, the looks on the way, and the seconds that compilation
    and loading took.
  """
  begin = time.perf_counter()
  run = study.settings(arm)
  resolved = resolve.resolve(run)
  rates, seeds = map(list, zip(*pairs, strict=True))
  graphdef, state, frozen = _states(run, resolved, seeds)
  batches = {
    seed: resolve.make_batches(
      dataclasses.replace(
        run, training=dataclasses.replace(run.training, seed=seed)
      ),
      tokens,
      None,
    )
    for seed in dict.fromkeys(seeds)
  }
  num_steps = run.training.steps
  dense_from = training.first_dense_step(num_steps, run.training.dense_fraction)
  step_fns = {
    is_dense: make_step(graphdef, config, run.optimizer, num_steps, dense_from)
    for is_dense, config in (
      (False, resolved.step),
      (True, dataclasses.replace(resolved.step, patterns=None)),
    )
  }
  arguments = jnp.asarray(rates, jnp.float32), jnp.asarray(seeds, jnp.int32)
  look_at = {
    round(num_steps * (i + 1) / study.looks) for i in range(study.looks)
  }
  clock = _Clock(len(pairs))
  found: list[tuple[int, dict[bool, int], np.ndarray]] = []
  cuts = sorted({0, dense_from, num_steps, *look_at})
  for first, last in itertools.pairwise(cuts):
    is_dense = first >= dense_from
    for number in range(first, last):
      batch = _stacked([next(batches[seed]) for seed in batches], seeds)
      state, metrics = step_fns[is_dense](state, frozen, batch, *arguments)
      clock.stepped(is_dense, metrics, number - first, last - first)
    if last in look_at:
      losses = evaluate(Weights(graphdef, state.params, frozen))
      found.append((last, dict(clock.done), losses))
  looks = [Look(n, clock.seconds(done), losses) for n, done, losses in found]
  overhead = time.perf_counter() - begin - clock.total
  return Weights(graphdef, state.params, frozen), looks, overhead


def _stacked(
  batches: list[dict[str, np.ndarray]], seeds: list[int]
) -> dict[str, np.ndarray]:
  """Returns the batch of each pair, from one for each distinct seed."""
  place = {seed: i for i, seed in enumerate(dict.fromkeys(seeds))}
  return {
    name: np.stack([batches[place[seed]][name] for seed in seeds])
    for name in batches[0]
  }


class _Clock:
  """Seconds of the steps with the pattern, and of the dense steps.

  A step counts with the average of the others of its kind, so that compilation
  does not count.
  """

  def __init__(self, num_pairs: int):
    self._num_pairs = num_pairs
    self._since = time.perf_counter()
    self._seconds = dict.fromkeys((False, True), 0.0)
    self._timed = dict.fromkeys((False, True), 0)
    self.done = dict.fromkeys((False, True), 0)

  def stepped(self, kind: bool, metrics: Any, index: int, count: int) -> None:
    """Records the start of step `index` in a stretch of `count` steps."""
    self.done[kind] += 1
    if index == min(_UNTIMED_STEPS, count - 1) - 1:
      jax.block_until_ready(metrics)
      self._since = time.perf_counter()
    if index == count - 1:
      jax.block_until_ready(metrics)
      if count > 1:
        self._seconds[kind] += time.perf_counter() - self._since
        self._timed[kind] += count - min(_UNTIMED_STEPS, count - 1)

  @property
  def total(self) -> float:
    """Seconds that were measured."""
    return sum(self._seconds.values())

  def seconds(self, done: dict[bool, int]) -> float:
    """Returns the seconds per pair for these numbers of steps of each kind."""
    return (
      sum(
        count * self._seconds[kind] / max(1, self._timed[kind])
        for kind, count in done.items()
      )
      / self._num_pairs
    )
