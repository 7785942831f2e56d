"""Plots of a study."""

import io
import pathlib
from collections.abc import Callable
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
  _save(folder / "loss_by_position.png", lambda ax: _positions(ax, losses))
  for name, field, label in (
    ("pairs", "pairs_share", "query-key pairs, as a share of dense"),
    ("seconds", "seconds", "training seconds of a run"),
  ):
    _save(
      folder / f"quality_by_{name}.png",
      lambda ax, field=field, label=label: _quality(ax, whole, field, label),
    )
  if any(arm["tasks"] for arm in whole["arms"].values()):
    _save(folder / "retrieval_by_length.png", lambda ax: _retrieval(ax, whole))


def _save(path: pathlib.Path, draw: Callable[[Any], None]) -> None:
  import matplotlib

  matplotlib.use("agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
  try:
    draw(axes)
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


def _positions(axes: Any, losses: dict[str, np.ndarray]) -> None:
  places = (np.arange(scoring.NUM_BLOCKS) + 0.5) / scoring.NUM_BLOCKS
  for index, (name, blocks) in enumerate(losses.items()):
    axes.plot(
      places, blocks.mean(axis=(0, 1)), label=name, lw=1, **_style(index)
    )
  middle = np.median([x.mean(axis=(0, 1))[-1] for x in losses.values()])
  lowest = min(x.mean(axis=(0, 1)).min() for x in losses.values())
  axes.set_ylim(lowest - 0.05, middle + 1)
  axes.set_xlabel("position, as a share of the length")
  axes.set_ylabel("loss (nats per token)")
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


def _retrieval(axes: Any, whole: dict[str, Any]) -> None:
  for index, (name, arm) in enumerate(whole["arms"].items()):
    for task, by_length in arm["tasks"].items():
      lengths = sorted(map(int, by_length))
      axes.plot(
        lengths,
        [by_length[str(n)]["answer_loss"] for n in lengths],
        marker="o",
        ms=3,
        lw=1,
        label=f"{name}, {task}",
        **_style(index),
      )
  axes.set_xlabel("context length (tokens)")
  axes.set_ylabel("loss of the answer (nats per token)")
  axes.set_xscale("log", base=2)
  axes.legend(fontsize=5, ncols=2, loc="upper left", bbox_to_anchor=(1, 1))
