"""The training loop that `pretrain` and `finetune` share.

A run writes into its output folder:

    config.json      the settings; a run that resumes must have the same, but
                     may use another mesh
    metrics.jsonl    one line per step, and one per evaluation
    tensorboard/     the same, for TensorBoard; wandb/ with --wandb
    checkpoints/     the newest few, through Orbax

The parts: the folder and its settings, metrics, requests to stop, results, and
`fit`.
"""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import pathlib
import secrets
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

import jax
import numpy as np
import tensorboardX
from flax import nnx
from jax.sharding import Mesh

from experiments.shared import cluster
from experiments.shared.config import (
  FinetuneConfig,
  PretrainConfig,
  TrainingConfig,
  to_json,
)
from experiments.shared.progress import Progress
from scca_jax import (
  atomic_file,
  checkpoint,
  file_lock,
  json_file,
  sharding,
  training,
)

# Steps at the start that say nothing about speed, as the first one compiles.
_UNTIMED_STEPS = 2


@contextlib.contextmanager
def output_dir(path: str, settings: dict[str, Any]) -> Iterator[pathlib.Path]:
  """Gives the run's folder and keeps other runs out of it.

  All processes of a run must enter it together. If the `with` block writes
  nothing, a new folder is removed again.

  Args:
    path: The folder; may be missing.
    settings: The run's settings, as JSON types.

  Raises:
    ValueError: It contains a run with different settings, a run in progress, or
      metrics that no run wrote.
    OSError: The folder cannot be written to.
  """
  folder = pathlib.Path(path)
  with contextlib.ExitStack() as stack:
    with cluster.primary_first():
      if cluster.is_primary():
        stack.enter_context(file_lock.only_process(folder))
        _check_settings(folder, settings)
        read_metrics(folder)
        atomic_file.remove_dead(folder)
    yield folder


def _check_settings(folder: pathlib.Path, settings: dict[str, Any]) -> None:
  """Refuses a folder with a run that has different settings."""
  file = folder / "config.json"
  # In JSON's form, where tuples are lists.
  settings = json.loads(json.dumps(settings))
  if file.exists():
    try:
      earlier = json_file.value(file)
    except ValueError as error:
      raise ValueError(
        f"{str(error).rstrip('.')}: remove {folder}, or use another"
        " --output_dir."
      ) from error
    differing = [
      name
      for name in _differing(earlier, settings)
      if not name.startswith("mesh.")
    ]
    if differing:
      raise ValueError(
        f"{folder} contains a run with different settings"
        f" ({', '.join(differing)}): use another --output_dir, or remove it."
      )


def _differing(a: Any, b: Any, name: str = "") -> list[str]:
  """Returns the dotted names of the settings that differ."""
  if isinstance(a, dict) and isinstance(b, dict):
    return [
      found
      for key in sorted(a.keys() | b.keys())
      for found in _differing(
        a.get(key), b.get(key), f"{name}.{key}" if name else key
      )
    ]
  return [] if a == b else [name]


def read_metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines of a run's `metrics.jsonl`.

  A last half line, which a killed run may leave, is left out.

  Args:
    folder: The run's folder, with or without the file.

  Raises:
    ValueError: No run wrote them; the message names the first such line.
  """
  path = folder / "metrics.jsonl"
  if not path.exists():
    return []
  if not path.is_file():
    raise ValueError(f"{path} is not a file: use another --output_dir.")
  lines = path.read_bytes().split(b"\n")
  found = []
  for number, line in enumerate(lines[:-1], start=1):
    try:
      found.append(json.loads(line))
      json_file.integer("step", found[-1]["step"], 0)
      for value in found[-1].values():
        if not isinstance(value, int | float | dict | None):
          raise TypeError(f"{value} is not a number")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
      raise ValueError(
        f"{path}, line {number} is not from a run, which writes a step and"
        " numbers: remove the line, or use another --output_dir."
      ) from error
  return found


class Metrics:
  """Writes `metrics.jsonl`, TensorBoard and optionally Weights & Biases.

  There is one line per step and one per evaluation.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    step: int,
    wandb_project: str | None = None,
    settings: Any = None,
  ):
    """Opens the files to continue after `step`; later lines are dropped.

    An interrupted run wrote those after its last checkpoint; their steps will
    be repeated.

    Args:
      folder: The run's folder.
      step: Steps that are done.
      wandb_project: Project of Weights & Biases, or None.
      settings: Settings of the run, which Weights & Biases shows.

    Raises:
      ValueError: Weights & Biases refuses the run.
    """
    self._folder = folder
    self._board = self._wandb = None
    if not cluster.is_primary():  # Only one of several processes writes.
      return
    kept = [line for line in read_metrics(folder) if line["step"] <= step]
    lines = "".join(json.dumps(line) + "\n" for line in kept)
    atomic_file.write(folder / "metrics.jsonl", lines.encode())
    self._board = tensorboardX.SummaryWriter(
      str(folder / "tensorboard"), purge_step=step + 1
    )
    if wandb_project is not None:
      self._wandb = _open_wandb(folder, wandb_project, settings)

  def write(self, lines: list[dict[str, Any]]) -> None:
    """Appends lines; each has `step` and numbers, or dicts of numbers.

    They are on the disk when this returns, as checkpoints saved later rely on
    them.
    """
    if self._board is None:
      return
    with _open_to_append(self._folder / "metrics.jsonl") as file:
      for line in lines:
        file.write(json.dumps(atomic_file.without_nan(line)) + "\n")
      file.flush()
      os.fsync(file.fileno())
    for line in lines:
      numbers = {}
      for name, value in line.items():
        values = value if isinstance(value, dict) else {"": value}
        for key, number in values.items():
          if name != "step" and isinstance(number, int | float):
            numbers[f"{name}/{key}" if key else name] = number
      for tag, number in numbers.items():
        self._board.add_scalar(tag, number, line["step"])
      if self._wandb is not None:
        self._wandb.log(numbers, step=line["step"])
    self._board.flush()

  def read(self) -> list[dict[str, Any]]:
    """Returns all lines so far; all processes must call it."""
    cluster.barrier("metrics")
    return read_metrics(self._folder)

  def close(self) -> None:
    """Closes the files."""
    if self._board is not None:
      self._board.close()
    if self._wandb is not None:
      self._wandb.finish()


def _open_to_append(path: pathlib.Path) -> TextIO:
  """Opens a file that must exist; without it, the lines before are lost."""
  try:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"{path} was removed during the run: remove the rest of its folder and"
      " start the same command again."
    ) from error
  return open(descriptor, "w", encoding="utf8")


def _open_wandb(folder: pathlib.Path, project: str, settings: Any) -> Any:
  """Returns the run at Weights & Biases; a resumed run keeps its own."""
  wandb: Any = importlib.import_module("wandb")
  file = folder / "wandb_id"
  if not file.exists():
    atomic_file.write(file, secrets.token_hex(4).encode())
  try:
    return wandb.init(
      project=project,
      dir=folder,
      id=file.read_text(encoding="utf8"),
      name=folder.resolve().name,
      resume="allow",
      config=settings,
    )
  except wandb.Error as error:
    raise ValueError(f"Weights & Biases refuses the run: {error}") from error


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
  """Collects SIGINT and SIGTERM; a second one ends the process."""
  received: list[int] = []

  def note(number, frame):
    del frame
    received.append(number)
    signal.signal(number, previous[number])

  previous = {
    number: signal.signal(number, note)
    for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield received
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


@dataclasses.dataclass(frozen=True)
class Result:
  """How training ended.

  Attributes:
    model: The trained model.
    tokens_per_second: Median over the steps, for all the run's processes; None
      if there were too few steps.
    final_loss: Loss of the last step, in nats per token.
  """

  model: Any
  tokens_per_second: float | None
  final_loss: float


def _check_finite(line: dict[str, Any], scaled: bool) -> None:
  """Stops a run whose loss, or gradients for many steps, are not finite."""
  if not math.isfinite(line.get("loss", 0.0)):
    # The loss scale cannot help: it only acts on the gradients.
    raise ValueError(
      f"the loss of step {line['step']} is not finite: lower the learning rate"
      " or compute in bfloat16 or float32."
    )
  if line["skipped_in_a_row"] >= training.MAX_SKIPPED_IN_A_ROW:
    remedy = (
      "the loss scale has reached its floor, so lower the learning rate or"
      " compute in bfloat16 or float32"
      if scaled
      else "lower the learning rate"
    )
    raise ValueError(
      f"the gradients were not finite for {training.MAX_SKIPPED_IN_A_ROW}"
      f" steps in a row, up to step {line['step']}: {remedy}."
    )


def load(make: Callable[[], Any], mesh: Mesh | None) -> Any:
  """Returns a model on a mesh, without any device holding all of it.

  Args:
    make: Reads the model.
    mesh: From `sharding.make_mesh`, or None.
  """
  if mesh is None:
    return make()
  with sharding.on_host():
    graphdef, state = nnx.split(make())
  return nnx.merge(graphdef, sharding.place(state, mesh))


def to_host(model: Any, trainable: Any) -> Any:
  """Returns the model with its trained parameters on the host, for saving.

  All processes must call it.
  """
  graphdef, params, frozen = nnx.split(model, trainable, ...)
  return nnx.merge(graphdef, sharding.to_host(params), frozen)


@dataclasses.dataclass(kw_only=True)
class _Run:
  """The state of a run between two steps.

  Attributes:
    graphdef: Structure of the model.
    state: The training state.
    frozen: Parameters that are not trained.
    step_fn: From `training.compile_step`.
    dense_step_fn: The same with dense attention; None if there are no dense
      steps.
    dense_from: The first dense step, counted from 0.
    batches: Iterator of batches.
    checkpoints: Where the state is saved.
    metrics: Where the metrics are written.
    rates: The learning rate by step.
    config: Settings of the loop.
    mesh: Devices of the run; None means one.
    done: Steps so far.
  """

  graphdef: Any
  state: training.TrainState
  frozen: Any
  step_fn: Callable[..., Any]
  dense_step_fn: Callable[..., Any] | None
  dense_from: int
  batches: Any
  checkpoints: checkpoint.Checkpointer
  metrics: Metrics
  rates: Callable[..., Any]
  config: TrainingConfig
  mesh: Mesh | None
  done: int

  def __post_init__(self):
    # Measure the speed from here: compilation slows down the steps before.
    self.timed_from = self.done + _UNTIMED_STEPS
    self._saved = self.done
    # Steps not yet written, with their metrics on the device.
    self._waiting: list[tuple[int, Any]] = []
    self._last_flush = time.perf_counter()

  @property
  def model(self) -> Any:
    """The model as trained so far."""
    return nnx.merge(self.graphdef, self.state.params, self.frozen)

  def step(self) -> None:
    """Starts the next step; the device may still be busy with it."""
    step_fn = self.step_fn
    if self.dense_step_fn is not None and self.done >= self.dense_from:
      step_fn = self.dense_step_fn
    self.done += 1
    batch = sharding.place_batch(
      next(self.batches), self.mesh, self.config.batch_size
    )
    self.state, values = step_fn(self.state, self.frozen, batch)
    self._waiting.append((self.done, values))

  def flush(self) -> dict[str, Any]:
    """Waits for the steps since the last call; writes and checks their metrics.

    Returns:
      The metrics of the last one.

    Raises:
      ValueError: Training diverged.
    """
    fetched = jax.device_get([values for _, values in self._waiting])
    now = time.perf_counter()
    lines: list[dict[str, Any]] = []
    for (step, _), values in zip(self._waiting, fetched, strict=True):
      rate = float(np.asarray(self.rates(step - 1)))
      lines.append({"step": step, "learning_rate": rate})
      lines[-1] |= {name: float(value) for name, value in values.items()}
    if lines[0]["step"] > self.timed_from:
      tokens = sum(line["num_targets"] for line in lines)
      for line in lines:
        line["tokens_per_second"] = tokens / (now - self._last_flush)
    self._waiting.clear()
    self._last_flush = now
    self.metrics.write(lines)
    for line in lines:
      _check_finite(line, self.state.loss_scale.dynamic)
    return lines[-1]

  def evaluate(self, evaluate: Callable[[Any], dict[str, Any]]) -> None:
    """Evaluates the model and writes the results."""
    numbers = evaluate(self.model)
    self.metrics.write([{"step": self.done, "evaluation": numbers}])
    self._last_flush = time.perf_counter()

  def save(self) -> None:
    """Starts saving a checkpoint, unless this step has one."""
    if self.done != self._saved:
      self.checkpoints.save(self.done, self.state, self.batches.get_state())
      self._saved = self.done
    self._last_flush = time.perf_counter()

  def stop(self, number: int) -> NoReturn:
    """Ends the process after a signal, once the checkpoint is saved."""
    self.checkpoints.wait()
    print(
      f"Stopped by {signal.Signals(number).name} after step {self.done}; the"
      " same command resumes from there.",
      flush=True,
    )
    raise SystemExit(128 + number)

  def result(self) -> Result:
    """Returns the result of the run, once everything is saved."""
    self.checkpoints.wait()
    lines = [line for line in self.metrics.read() if "loss" in line]
    speeds = [
      line["tokens_per_second"] for line in lines if "tokens_per_second" in line
    ]
    return Result(
      self.model,
      statistics.median(speeds) if speeds else None,
      # Someone may have removed the metrics of a finished run.
      lines[-1]["loss"] if lines else math.nan,
    )

  def close(self) -> None:
    """Closes the files."""
    self.metrics.close()
    self.checkpoints.close()


def fit(
  model: Any,
  *,
  run: FinetuneConfig | PretrainConfig,
  step: training.StepConfig,
  trainable: Any,
  batches: Any,
  output_dir: pathlib.Path,
  evaluate: Callable[[Any], dict[str, Any]] | None = None,
  wandb_project: str | None = None,
) -> Result:
  """Trains a model, from the newest checkpoint in `output_dir` if there is one.

  On SIGINT or SIGTERM the current step is finished, a checkpoint saved, and
  the process ends with status 128 + the signal's number.

  Args:
    model: The model before the first step.
    run: The settings. They are written to `config.json` only now, after all
      input has been read, so that bad input leaves no run behind.
    step: Settings of a step, and its devices; a checkpoint may come from a run
      on other devices.
    trainable: The nnx filter of the parameters to train.
    batches: Iterator of batches with `get_state` and `set_state`.
    output_dir: Where checkpoints and metrics go.
    evaluate: Returns numbers for the log from a model; called every
      `run.evaluation.every` steps.
    wandb_project: Project of Weights & Biases, or None.

  Raises:
    ValueError: A checkpoint cannot be read, or training diverged.
    OSError: A checkpoint or the metrics cannot be written.
  """
  config, every = run.training, run.evaluation.every
  file = output_dir / "config.json"
  if cluster.is_primary() and not file.exists():
    atomic_file.write_json(file, to_json(run))
  dense_from = training.first_dense_step(config.steps, config.dense_fraction)
  optimizer = training.make_optimizer(
    run.optimizer, config.steps, rewarm_at=dense_from
  )
  graphdef, state, frozen = training.init(
    model,
    trainable,
    optimizer,
    step.mesh,
    offload_optimizer=config.offload_optimizer,
  )
  # The state holds the model's arrays. A checkpoint replaces them, which frees
  # them if nothing else refers to them.
  del model
  checkpoints = checkpoint.Checkpointer(
    output_dir / "checkpoints", keep=config.keep_checkpoints
  )
  done = checkpoints.latest_step() or 0
  if done:
    state, position = checkpoints.restore(done, state)
    batches.set_state(position)
    print(f"Resuming from the checkpoint of step {done}.", flush=True)

  current = _Run(
    graphdef=graphdef,
    state=state,
    frozen=frozen,
    step_fn=training.compile_step(graphdef, optimizer, step, state, frozen),
    dense_step_fn=training.compile_step(
      graphdef,
      optimizer,
      dataclasses.replace(step, patterns=None),
      state,
      frozen,
    )
    if config.dense_fraction
    else None,
    dense_from=dense_from,
    batches=batches,
    checkpoints=checkpoints,
    metrics=Metrics(output_dir, done, wandb_project, to_json(run)),
    rates=training.learning_rate_schedule(
      run.optimizer, config.steps, rewarm_at=dense_from
    ),
    config=config,
    mesh=step.mesh,
    done=done,
  )
  del state
  progress = Progress(
    config.steps, done, every=config.log_every, shown=cluster.is_primary()
  )
  with contextlib.closing(current):
    with _stop_requests() as received, contextlib.closing(progress):
      while current.done < config.steps:
        current.step()
        done, last = current.done, current.done == config.steps
        logging = done % config.log_every == 0
        evaluating = every and (done % every == 0 or last)
        stopping = bool(received)
        if jax.process_count() > 1:
          # All stop after the same step, one at which all of them check.
          stopping = logging and cluster.agree(stopping)
        saving = done % config.checkpoint_every == 0 or last or stopping
        progress.advance()
        if logging or saving or evaluating or done == current.timed_from:
          progress.show(current.flush())
        if done == current.timed_from:
          progress.start_clock()
        if evaluating and evaluate is not None:
          current.evaluate(evaluate)
        if saving:
          current.save()
        if stopping and not last:
          progress.close()
          current.stop(received[0] if received else signal.SIGTERM)
    return current.result()
