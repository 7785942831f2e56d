"""Plots of a study."""

import io
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.ablation import scoring
from scca_jax import atomic_file


def write(
  whole: dict[str, Any], losses: dict[str, np.ndarray], folder: pathlib.Path
) -> None:
  """Writes the plots.

  Args:
    whole: The content of results.json.
    losses: `[seeds, windows, blocks]` test losses of each arm, at the study's
      length.
    folder: The folder to write to.
  """
  baseline = whole["baseline"]
  _save(
    folder / "loss_by_position.png",
    lambda axes: _positions(axes[0], losses, baseline),
  )
  for name, field, label in (
    ("pairs", "pairs_share", "query-key pairs, as a share of dense"),
    ("seconds", "seconds", "training seconds of a run"),
  ):
    _save(
      folder / f"quality_by_{name}.png",
      lambda axes, field=field, label=label: _quality(
        axes[0], whole, field, label
      ),
    )
  tasks = sorted(
    {task for arm in whole["arms"].values() for task in arm["tasks"]}
  )
  if tasks:
    _save(
      folder / "retrieval_by_length.png",
      lambda axes: _retrieval(axes, whole, tasks),
      num_panels=len(tasks),
    )


def _save(
  path: pathlib.Path,
  draw: Callable[[Sequence[Any]], None],
  num_panels: int = 1,
) -> None:
  import matplotlib

  matplotlib.use("agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(
    1,
    num_panels,
    figsize=(9 if num_panels == 1 else 2 + 3 * num_panels, 6),
    layout="constrained",
    squeeze=False,
  )
  try:
    draw(axes[0])
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    atomic_file.write(path, content.getvalue())
  finally:
    pyplot.close(figure)


def _style(index: int) -> dict[str, Any]:
  return {
    "color": f"C{index % 10}",
    "linestyle": ("-", "--", ":", "-.")[index // 10 % 4],
  }


def _positions(axes: Any, losses: dict[str, np.ndarray], baseline: str) -> None:
  places = (np.arange(scoring.NUM_BLOCKS) + 0.5) / scoring.NUM_BLOCKS
  means = {name: blocks.mean(axis=(0, 1)) for name, blocks in losses.items()}
  for index, (name, curve) in enumerate(means.items()):
    axes.plot(
      places, curve - means[baseline], label=name, lw=1, **_style(index)
    )
  axes.set_yscale("symlog", linthresh=0.1)
  axes.set_xlabel("position, as a share of the length")
  axes.set_ylabel(f"loss - {baseline} (nats per token)")
  _legend(axes)


def _legend(axes: Any) -> None:
  axes.legend(fontsize=6, ncols=2, loc="upper left", bbox_to_anchor=(1, 1))


def _quality(axes: Any, whole: dict[str, Any], field: str, label: str) -> None:
  tuned = {
    name: arm
    for name, arm in whole["arms"].items()
    if arm["tokens"] and arm[field] is not None
  }
  for index, (name, arm) in enumerate(tuned.items()):
    found = arm["against_dense"]
    low, high = found["interval"]
    axes.errorbar(
      [arm[field]],
      [found["mean"]],
      yerr=[
        [max(0.0, found["mean"] - low)],
        [max(0.0, high - found["mean"])],
      ],
      fmt="o",
      ms=3,
      lw=1,
      color=f"C{index % 10}",
    )
    axes.annotate(name, (arm[field], found["mean"]), fontsize=6)
  axes.axhline(0, color="grey", lw=0.5)
  axes.set_xlabel(label)
  axes.set_ylabel(f"loss of the last quarter - {whole['baseline']} (nats)")
  axes.set_yscale("symlog", linthresh=0.1)


def _retrieval(
  panels: Sequence[Any], whole: dict[str, Any], tasks: Sequence[str]
) -> None:
  for axes, task in zip(panels, tasks, strict=True):
    scores = {
      name: arm["tasks"].get(task, {}) for name, arm in whole["arms"].items()
    }
    # Where the loss is kept by distance, the answer is too long to be right.
    by_loss = any(
      "answer_loss_by_distance" in score
      for by_length in scores.values()
      for score in by_length.values()
    )
    field = "answer_loss" if by_loss else "accuracy"
    for index, (name, by_length) in enumerate(scores.items()):
      lengths = sorted(map(int, by_length))
      axes.plot(
        [f"{n:,}" for n in lengths],
        [by_length[str(n)][field] for n in lengths],
        marker="o",
        ms=3,
        lw=1,
        label=name,
        **_style(index),
      )
    if field == "accuracy":
      axes.set_ylim(-0.02, 1.02)
    axes.set_title(f"{task}, {field.replace('_', ' ')}", fontsize=9)
    axes.tick_params(labelsize=7)
  panels[0].set_xlabel("context length (tokens)")
  _legend(panels[-1])
