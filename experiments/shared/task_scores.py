"""Scores models on tasks, and prints and draws the scores.

Several commands share this; the tasks themselves are in `scca_jax.tasks`.
"""

import concurrent.futures
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.shared import cli
from experiments.shared.config import EvaluationConfig
from scca_jax import atomic_file, tasks
from scca_jax.llama import Execution, Llama
from scca_jax.tasks import Sample, Task
from scca_jax.tokenizer import Tokenizer

Scores = dict[str, dict[int, tasks.Score]]

# How many tasks and lengths to make samples for while a device scores others:
# short samples are scored faster than longer ones are made.
_NUM_AHEAD = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Which samples a model is scored on.

  Attributes:
    tasks: The tasks.
    context_lens: Lengths of the samples, in tokens.
    num_samples: Samples per task and length.
    seed: Seed of the samples.
    cache: Folder in which samples are kept; None makes them every time.
  """

  tasks: Sequence[Task]
  context_lens: Sequence[int]
  num_samples: int
  seed: int
  cache: pathlib.Path | None

  @property
  def total(self) -> int:
    """Number of samples in all."""
    return len(self.tasks) * len(self.context_lens) * self.num_samples

  def first(self, vocabulary: Tokenizer) -> list[Sample]:
    """Returns the first sample of each task and length.

    Raises:
      ValueError: There is none, for example because the length is too short.
    """
    return [
      next(task.samples(vocabulary, length, self.num_samples, self.seed))
      for task, length in itertools.product(self.tasks, self.context_lens)
    ]

  def samples(
    self, vocabulary: Tokenizer
  ) -> Iterator[tuple[Task, int, list[Sample]]]:
    """Yields each task and length with its samples.

    While a device scores some, the next are made.
    """

    def make(task, context_len):
      settings = task, vocabulary, context_len, self.num_samples, self.seed
      if self.cache is not None:
        return tasks.load_or_make(self.cache, *settings)
      return list(task.samples(*settings[1:]))

    cells = list(itertools.product(self.tasks, self.context_lens))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      submitted = (pool.submit(make, *cell) for cell in cells)
      made = list(itertools.islice(submitted, _NUM_AHEAD))
      for cell in cells:
        made.extend(itertools.islice(submitted, 1))
        yield *cell, made.pop(0).result()


def of_run(
  settings: EvaluationConfig, context_lens: Sequence[int], vocabulary: Tokenizer
) -> Plan | None:
  """Returns the plan for the end of a run; None if it asks for no tasks.

  Args:
    settings: The run's settings.
    context_lens: Lengths in tokens.
    vocabulary: The tokenizer.

  Raises:
    ValueError: A task does not fit into a length, or the run has several
      processes.
  """
  if not settings.tasks:
    return None
  if jax.process_count() > 1:
    raise ValueError(
      "evaluation.tasks need a single process: leave them out, and run `scca"
      " evaluate --tasks` afterwards."
    )
  plan = Plan(
    tasks=[tasks.get(name) for name in settings.tasks],
    context_lens=context_lens,
    num_samples=settings.num_samples,
    seed=0,
    cache=cli.cache_folder("samples"),
  )
  plan.first(vocabulary)
  return plan


def measure(
  model: Llama,
  vocabulary: Tokenizer,
  plan: Plan,
  *,
  patterns: Mapping[int, Any],
  batch_size: Callable[[int], int],
  execution: Execution,
  generate: bool = False,
  on_samples: Callable[[int], object] | None = None,
) -> Scores:
  """Returns the score on each task at each length.

  Args:
    model: The model.
    vocabulary: The tokenizer.
    plan: The samples.
    patterns: The pattern for each length.
    batch_size: Returns the batch size for a length.
    execution: See `Llama.hidden_states`.
    generate: Whether the model also writes answers, which are scored as in
      RULER, except if the score is the loss.
    on_samples: Called after every batch with the number of its samples.
  """
  found: Scores = {task.name: {} for task in plan.tasks}
  for task, context_len, samples in plan.samples(vocabulary):
    settings: dict[str, Any] = {
      "batch_size": batch_size(context_len),
      "patterns": patterns[context_len],
      "execution": execution,
    }
    credits = None
    if generate and not task.scored_by_loss:
      credits = tasks.generated_credits(
        model, task, vocabulary, samples, **settings
      )
    found[task.name][context_len] = tasks.score(
      model,
      samples,
      credits=credits,
      context_len=context_len,
      on_samples=on_samples,
      **settings,
    )
  return found


def as_json(scores: Scores) -> dict[str, Any]:
  """Returns the scores in the form written to a file."""
  return {
    name: {
      str(length): {
        field: value
        for field, value in dataclasses.asdict(score).items()
        if value is not None
      }
      for length, score in by_length.items()
    }
    for name, by_length in scores.items()
  }


def table(scores: Scores) -> list[list[str]]:
  """Returns a row for each task and length, then the mean of each length.

  The means leave out tasks whose score is the loss.
  """
  cells = [s for by_length in scores.values() for s in by_length.values()]
  generated = any(score.ruler_score is not None for score in cells)
  rows = [["task", "context", "accuracy", "95 % interval", "answer loss"]]
  if generated:
    rows[0] += ["RULER score", "95 % interval"]
  for name, by_length in scores.items():
    for context_len, score in by_length.items():
      rows.append(
        [
          name,
          f"{context_len:,}",
          f"{score.accuracy:.3f}",
          _interval(score.interval),
          f"{score.answer_loss:.4f}",
        ]
      )
      if score.ruler_score is not None:
        rows[-1] += [
          f"{score.ruler_score:.3f}",
          _interval(score.ruler_interval),
        ]
  counted = [
    by_length
    for name, by_length in scores.items()
    if name not in tasks.TASKS or not tasks.TASKS[name].scored_by_loss
  ]
  if len(counted) > 1:
    for context_len in counted[0]:
      column = [by_length[context_len] for by_length in counted]
      row = [f"mean of {len(counted)}", f"{context_len:,}"]
      row += [f"{np.mean([s.accuracy for s in column]):.3f}", "", ""]
      if generated:
        row.append(f"{np.mean([s.ruler_score or 0 for s in column]):.3f}")
      rows.append(row)
  return [row + [""] * (len(rows[0]) - len(row)) for row in rows]


def _interval(interval: tuple[float, float] | None) -> str:
  return "" if interval is None else f"{interval[0]:.3f} - {interval[1]:.3f}"


def draw(path: str | os.PathLike[str], title: str, scores: Scores) -> None:
  """Writes a PNG with a panel for each task that has depths.

  A panel shows the accuracy by length and depth, or the loss by length and
  distance if that is the score.

  Args:
    path: The .png.
    title: Title of the figure.
    scores: Scores of at least one task with depths.
  """
  # Imported late, so that a bad flag does not wait for it.
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  panels = {
    name: by_length
    for name, by_length in scores.items()
    if any(score.by_depth for score in by_length.values())
  }
  num_columns = min(len(panels), 4)
  num_rows = -(-len(panels) // num_columns)
  figure, axes = plt.subplots(
    num_rows,
    num_columns,
    figsize=(3.2 * num_columns + 1, 3.4 * num_rows),
    squeeze=False,
    layout="constrained",
  )
  for axis in axes.flat[len(panels) :]:
    axis.axis("off")
  for axis, (name, by_length) in zip(axes.flat, panels.items(), strict=False):
    by_loss = name in tasks.TASKS and tasks.TASKS[name].scored_by_loss
    place, value = (
      ("distance", "answer_loss") if by_loss else ("depth", "accuracy")
    )
    places = sorted(
      {entry[place] for s in by_length.values() for entry in s.by_depth}
    )
    cells = np.full((len(places), len(by_length)), np.nan)
    for column, score in enumerate(by_length.values()):
      for entry in score.by_depth:
        cells[places.index(entry[place]), column] = entry[value]
    image = axis.imshow(
      cells,
      aspect="auto",
      interpolation="nearest",
      cmap="viridis_r" if by_loss else "RdYlGn",
      vmin=0,
      vmax=None if by_loss else 1,
    )
    figure.colorbar(
      image, ax=axis, label="nats per token" if by_loss else value
    )
    axis.set_xticks(range(len(by_length)), [f"{n:,}" for n in by_length])
    shown = range(0, len(places), max(1, len(places) // 8))
    axis.set_yticks(
      shown,
      [f"{places[i]:,}" if by_loss else f"{places[i]:.0%}" for i in shown],
    )
    axis.set_title(name, fontsize=10)
    axis.set_xlabel("tokens")
    axis.set_ylabel("distance in tokens" if by_loss else "depth")
    axis.tick_params(labelsize=7)
  figure.suptitle(title, fontsize=11)
  with atomic_file.replacing(path) as temporary:
    figure.savefig(temporary, dpi=120)
  plt.close(figure)
