"""The training loop that `pretrain` and `finetune` share.

What a run leaves in its output folder:

    config.json      the settings; a run that goes on must have the same, but
                     may be laid out on other devices
    metrics.jsonl    one line a step, and one an evaluation
    tensorboard/     the same, for TensorBoard
    checkpoints/     the newest few, through Orbax
"""

import collections
import contextlib
import dataclasses
import json
import pathlib
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm
from flax import nnx
from jax.sharding import Mesh

from experiments.shared import cluster
from experiments.shared.config import TrainingConfig
from scca_jax import atomic_file, checkpoint, sharding, training

# Steps at the start that say nothing about speed: the first one compiles.
_UNTIMED_STEPS = 2


def open_output_dir(path: str, settings: dict[str, Any]) -> pathlib.Path:
  """Returns the run's folder, if no other run is in it; writes nothing.

  Args:
    path: The folder; it need not be there.
    settings: The run's settings, of JSON types.

  Raises:
    ValueError: A run with other settings is there.
  """
  folder = pathlib.Path(path)
  file = folder / "config.json"
  # As JSON has it: tuples are lists there.
  settings = json.loads(json.dumps(settings))
  if file.exists():
    try:
      earlier = json.loads(file.read_text(encoding="utf8"))
    except ValueError as error:
      raise ValueError(
        f"{file} is not valid JSON ({error}): remove {folder}, or name another"
        " --output_dir."
      ) from error
    differing = [
      name
      for name in _differing(earlier, settings)
      if not name.startswith("mesh.")
    ]
    if differing:
      raise ValueError(
        f"{folder} holds a run with other settings ({', '.join(differing)}):"
        " name another --output_dir, or remove it."
      )
  return folder


def _differing(a: Any, b: Any, name: str = "") -> list[str]:
  """Returns the dotted names of the settings in which the two differ."""
  if isinstance(a, dict) and isinstance(b, dict):
    return [
      found
      for key in sorted(a.keys() | b.keys())
      for found in _differing(
        a.get(key), b.get(key), f"{name}.{key}" if name else key
      )
    ]
  return [] if a == b else [name]


class Metrics:
  """`metrics.jsonl` and TensorBoard: one line a step, one an evaluation."""

  def __init__(self, folder: pathlib.Path, step: int):
    """Opens the files to go on after `step`; later lines are dropped.

    They are of steps that an interrupted run did after its last checkpoint,
    and that will be done again.
    """
    self._path = folder / "metrics.jsonl"
    self._board = None
    if not cluster.is_primary():  # Of several processes one writes.
      return
    kept = []
    if self._path.exists():
      for line in self._path.read_text(encoding="utf8").splitlines():
        # A killed run may leave half a line; it is later than `step`.
        with contextlib.suppress(ValueError):
          if json.loads(line)["step"] <= step:
            kept.append(line + "\n")
    temporary = self._path.with_name(".metrics.jsonl.partial")
    temporary.write_text("".join(kept), encoding="utf8")
    temporary.replace(self._path)
    self._board = tensorboardX.SummaryWriter(
      str(folder / "tensorboard"), purge_step=step + 1
    )

  def write(self, lines: list[dict[str, Any]]) -> None:
    """Adds lines; each has `step` and numbers, or dicts of numbers."""
    if self._board is None:
      return
    with self._path.open("a", encoding="utf8") as file:
      for line in lines:
        file.write(json.dumps(line) + "\n")
    for line in lines:
      for name, value in line.items():
        values = value if isinstance(value, dict) else {"": value}
        for key, number in values.items():
          if name != "step" and isinstance(number, int | float):
            tag = f"{name}/{key}" if key else name
            self._board.add_scalar(tag, number, line["step"])
    self._board.flush()

  def read(self) -> list[dict[str, Any]]:
    """Returns all lines so far; every process must call it."""
    cluster.barrier("metrics")
    text = self._path.read_text(encoding="utf8")
    return [json.loads(line) for line in text.splitlines()]

  def close(self) -> None:
    """Closes the files."""
    if self._board is not None:
      self._board.close()


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
  """Collects SIGINT and SIGTERM; a second one of a kind ends the process."""
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
  """What training ends with.

  Attributes:
    model: The trained model.
    tokens_per_second: Median over the steps, in all the run's processes; None
      if there were too few.
    final_loss: Of the last step, nats a token.
  """

  model: Any
  tokens_per_second: float | None
  final_loss: float


def _check_finite(line: dict[str, Any], dtype: str) -> None:
  """Stops a run whose gradients have not been finite for many steps."""
  if line["skipped_in_a_row"] >= training.MAX_SKIPPED_IN_A_ROW:
    remedy = (
      "the loss scale has reached its floor, so lower the learning rate or"
      " compute in bfloat16 or float32"
      if dtype == "float16"
      else "lower the learning rate"
    )
    raise ValueError(
      f"the gradients were not finite for {training.MAX_SKIPPED_IN_A_ROW}"
      f" steps in a row, up to step {line['step']}: {remedy}."
    )


def load(make: Callable[[], Any], mesh: Mesh | None) -> Any:
  """Returns a model, placed on a mesh; no device has to hold all of it.

  Args:
    make: Reads it.
    mesh: From `sharding.make_mesh`, or None.
  """
  if mesh is None:
    return make()
  with sharding.on_host():
    graphdef, state = nnx.split(make())
  return nnx.merge(graphdef, sharding.place(state, mesh))


def to_host(model: Any, trainable: Any) -> Any:
  """Returns the model with what was trained on the host, to be saved.

  All processes must call it.
  """
  graphdef, params, frozen = nnx.split(model, trainable, ...)
  return nnx.merge(graphdef, sharding.to_host(params), frozen)


def fit(
  model: Any,
  *,
  trainable: Any,
  batches: Any,
  step_config: training.StepConfig,
  optimizer_config: training.OptimizerConfig,
  config: TrainingConfig,
  output_dir: pathlib.Path,
  settings: dict[str, Any] | None = None,
  mesh: Mesh | None = None,
  evaluate: Callable[[Any], dict[str, Any]] | None = None,
  evaluate_every: int = 0,
) -> Result:
  """Trains a model, from the newest checkpoint in `output_dir` if there is one.

  On SIGINT or SIGTERM the step in hand is finished, a checkpoint saved, and
  the process ends with status 128 + the signal's number.

  Args:
    model: The model as it is before the first step.
    trainable: The nnx filter of the parameters to train.
    batches: Iterator of batches with `get_state` and `set_state`.
    step_config: What a step does.
    optimizer_config: The optimiser.
    config: The loop.
    output_dir: Where checkpoints and metrics go.
    settings: What goes to `config.json` there: only now, when all input has
      been read, so that bad input leaves no run behind.
    mesh: Devices that the run is laid out on; a checkpoint may be of a run on
      others.
    evaluate: Gives numbers for the log from a model.
    evaluate_every: Steps between calls of it; 0 has none.

  Raises:
    ValueError: A checkpoint cannot be read, or training diverged.
    OSError: A checkpoint or the metrics cannot be written.
  """
  file = output_dir / "config.json"
  if settings is not None and cluster.is_primary() and not file.exists():
    atomic_file.write_json(file, settings)
  optimizer = training.make_optimizer(optimizer_config, config.steps)
  schedule = training.learning_rate_schedule(optimizer_config, config.steps)
  graphdef, params, frozen = nnx.split(model, trainable, ...)
  params, frozen = sharding.place((params, frozen), mesh)
  state = training.init_state(
    params,
    optimizer,
    config.dtype,
    mesh,
    offload_optimizer=config.offload_optimizer,
  )
  # The state has them; a checkpoint's come in their place, not beside them.
  del model, params
  checkpoints = checkpoint.Checkpointer(
    output_dir / "checkpoints", keep=config.keep_checkpoints
  )
  done = checkpoints.latest_step() or 0
  if done:
    state, position = checkpoints.restore(done, state)
    batches.set_state(position)
    print(f"Going on from the checkpoint of step {done}.", flush=True)
  metrics = Metrics(output_dir, done)
  step_fn = training.compile_step(
    graphdef, optimizer, step_config, state, frozen
  )
  waiting: collections.deque[tuple[int, Any]] = collections.deque()
  last_flush = time.perf_counter()
  timed_from = done + _UNTIMED_STEPS
  saved = done

  def flush() -> dict[str, Any]:
    """Writes the steps done since, and returns the last; waits for them."""
    nonlocal last_flush
    fetched = jax.device_get([values for _, values in waiting])
    now = time.perf_counter()
    first = waiting[0][0]
    lines = []
    for (step, _), values in zip(waiting, fetched, strict=True):
      line = {
        "step": step,
        "learning_rate": float(np.asarray(schedule(step - 1))),
      }
      line |= {name: float(value) for name, value in values.items()}
      lines.append(line)
    if first > timed_from:
      tokens = sum(line["num_targets"] for line in lines)
      for line in lines:
        line["tokens_per_second"] = tokens / (now - last_flush)
    waiting.clear()
    last_flush = now
    metrics.write(lines)
    for line in lines:
      _check_finite(line, config.dtype)
    return lines[-1]

  def save(step: int) -> None:
    nonlocal saved
    if step != saved:
      checkpoints.save(step, state, batches.get_state())
      saved = step

  progress = tqdm.tqdm(
    total=config.steps,
    initial=done,
    unit="step",
    dynamic_ncols=True,
    disable=not cluster.is_primary(),
  )
  try:
    with _stop_requests() as received, progress:
      for step in range(done + 1, config.steps + 1):
        batch = sharding.place_batch(next(batches), mesh, config.batch_size)
        state, values = step_fn(state, frozen, batch)
        waiting.append((step, values))
        last = step == config.steps
        logging = step % config.log_every == 0
        stopping = bool(received)
        if jax.process_count() > 1:
          # They stop after the same step: one at which all look up.
          stopping = logging and cluster.agree(stopping)
        evaluating = evaluate_every and (step % evaluate_every == 0 or last)
        saving = step % config.checkpoint_every == 0 or last or stopping
        if logging or saving or evaluating or step == timed_from:
          line = flush()
          shown = {"loss": f"{line['loss']:.3f}"}
          if "tokens_per_second" in line:
            shown["tok/s"] = f"{line['tokens_per_second']:,.0f}"
          progress.set_postfix(shown, refresh=False)
        progress.update()
        if evaluating and evaluate is not None:
          numbers = evaluate(nnx.merge(graphdef, state.params, frozen))
          metrics.write([{"step": step, "evaluation": numbers}])
          last_flush = time.perf_counter()
        if saving:
          save(step)
          last_flush = time.perf_counter()
        if stopping and not last:
          checkpoints.wait()
          number = received[0] if received else signal.SIGTERM
          name = signal.Signals(number).name
          progress.close()
          print(
            f"Stopped by {name} after step {step}; the same command goes on"
            " from there.",
            flush=True,
          )
          raise SystemExit(128 + number)
    checkpoints.wait()
    lines = [line for line in metrics.read() if "loss" in line]
  finally:
    metrics.close()
    checkpoints.close()
  speeds = [
    line["tokens_per_second"] for line in lines if "tokens_per_second" in line
  ]
  return Result(
    nnx.merge(graphdef, state.params, frozen),
    statistics.median(speeds) if speeds else None,
    lines[-1]["loss"],
  )
