"""Plots of the loss against the position in the window."""

import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scca_jax import atomic_file
from scca_jax.bootstrap import Curve


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
  """One picture of a figure.

  Attributes:
    curves: What is drawn, by label, each with its band.
    title: Above the panel.
    label: Label of the vertical axis, with the unit.
    zero: Whether a line marks 0.
  """

  curves: Mapping[str, Curve]
  title: str = ""
  label: str = "nats per token"
  zero: bool = False


def make_figure(num_rows: int, num_columns: int) -> tuple[Any, np.ndarray]:
  """Returns a figure of matplotlib and its axes, `[rows, columns]`."""
  # Imported late, so that a bad flag does not wait for it.
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  return plt.subplots(
    num_rows,
    num_columns,
    figsize=(2 + 4.5 * num_columns, 0.5 + 3.5 * num_rows),
    squeeze=False,
    layout="constrained",
  )


def draw_panel(axis: Any, panel: Panel) -> None:
  """Draws a panel on an axis of matplotlib."""
  for label, curve in panel.curves.items():
    # The middle of a bin's positions on this axis.
    places = np.sqrt(curve.edges[:-1] * (curve.edges[1:] - 1.0))
    axis.plot(places, curve.mean, label=label)
    axis.fill_between(places, curve.low, curve.high, alpha=0.2)
  if panel.zero:
    axis.axhline(0, color="gray", linewidth=0.8)
  axis.set_xscale("log", base=2)
  axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
  axis.set(xlabel="tokens before", ylabel=panel.label, title=panel.title)
  axis.grid(alpha=0.3)
  axis.legend(fontsize="small")


def save(path: str | os.PathLike[str], figure: Any) -> None:
  """Writes a figure to a .png and closes it.

  Raises:
    OSError: It cannot be written; an existing file is kept.
  """
  from matplotlib import pyplot as plt

  content = io.BytesIO()
  figure.savefig(content, format="png", dpi=120)
  plt.close(figure)
  atomic_file.write(path, content.getvalue())


def draw(
  path: str | os.PathLike[str], title: str, rows: Sequence[Sequence[Panel]]
) -> None:
  """Writes rows of panels to a .png; all rows have the same number.

  Raises:
    OSError: It cannot be written; an existing file is kept.
  """
  figure, axes = make_figure(len(rows), len(rows[0]))
  for panels, row in zip(rows, axes, strict=True):
    for panel, axis in zip(panels, row, strict=True):
      draw_panel(axis, panel)
  figure.suptitle(title)
  save(path, figure)
