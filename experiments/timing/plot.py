"""Plots of measurements against the length of the sequence."""

import dataclasses
from collections.abc import Mapping, Sequence

from scca_jax import atomic_file


@dataclasses.dataclass(frozen=True)
class Panel:
  """One picture of a figure.

  Attributes:
    lines: By label, the points `(tokens, value)`.
    label: Label of the vertical axis, with the unit.
    title: Above the panel.
    logarithmic: Whether the vertical axis is logarithmic; otherwise it starts
      at 0.
  """

  lines: Mapping[str, Sequence[tuple[int, float]]]
  label: str
  title: str = ""
  logarithmic: bool = False


def draw(path: str, title: str, panels: Sequence[Panel]) -> None:
  """Writes the panels side by side to a .png."""
  # Imported late, so that a bad flag does not wait for it.
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(
    1, len(panels), figsize=(12, 5), squeeze=False, layout="constrained"
  )
  for panel, axis in zip(panels, axes[0], strict=True):
    for label, points in panel.lines.items():
      if points:
        axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axis.set_xscale("log", base=2)
    if panel.logarithmic:
      axis.set_yscale("log")
    else:
      axis.set_ylim(bottom=0)
    axis.set(xlabel="tokens", ylabel=panel.label, title=panel.title)
    axis.grid(alpha=0.3)
  axes[0][0].legend(fontsize="small")
  figure.suptitle(title)
  with atomic_file.replacing(path) as temporary:
    figure.savefig(temporary, dpi=120)
  plt.close(figure)
