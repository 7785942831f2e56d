"""Compares two models loss by loss: the paired difference, by position.

Both files come from `scca evaluate --positions=FILE.npz` on the same text:
every loss of A has its partner in B, so that differences in difficulty between
windows cancel.

    scca compare tuned.npz untuned.npz \
      --output=compared.json --plot=compared.png

A difference is the loss of A minus the loss of B, in nats per token; below 0, A
is better. Intervals are bootstrap intervals at 95 % over documents and windows
(`scca_jax.bootstrap`).
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from absl import flags

from experiments.shared import cli, position_plot
from experiments.shared import flags as shared_flags
from scca_jax import atomic_file, bootstrap, loss_file
from scca_jax.perplexity import WindowLosses

_OUTPUT = flags.DEFINE_string("output", None, "Results, a .json.")
_PLOT = flags.DEFINE_string(
  "plot", None, "Plot of loss and difference against the position, a .png."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the resamples.")


def _compare(
  a: WindowLosses, b: WindowLosses, positions: slice
) -> dict[str, Any]:
  """Returns both mean losses and their difference, each with an interval."""
  settings: Any = {"positions": positions, "seed": _SEED.value}
  found = {
    "a": bootstrap.estimate(a.scored, a.documents, **settings),
    "b": bootstrap.estimate(b.scored, a.documents, **settings),
    "difference": bootstrap.paired_difference(
      a.scored, b.scored, a.documents, **settings
    ),
  }
  return {name: dataclasses.asdict(value) for name, value in found.items()}


def _print(results: dict[str, dict[str, Any]]) -> None:
  rows = [["context", "tokens", "A", "B", "A - B", "95 % interval"]]
  for length, result in results.items():
    for name in ("all", "last quarter"):
      part = result[name.replace(" ", "_")]
      if part is None:
        continue
      low, high = part["difference"]["interval"]
      rows.append(
        [
          f"{int(length):,}",
          name,
          *(f"{part[side]['mean']:.4f}" for side in "ab"),
          f"{part['difference']['mean']:+.4f}",
          f"{low:+.4f} to {high:+.4f}",
        ]
      )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for row in rows:
    cells = [f"{c:>{w}}" for c, w in zip(row, widths, strict=True)]
    print("  ".join(cells))


def _draw(
  path: str, a: loss_file.LossFile, b: loss_file.LossFile, lengths: list[int]
) -> None:
  """Draws the losses above their difference, one column per length."""
  above, below = [], []
  for length in lengths:
    one, other = a.by_length[length], b.by_length[length]
    settings: Any = {
      "edges": bootstrap.log_edges(length),
      "seed": _SEED.value,
    }
    curves = {
      f"{side}: {pathlib.Path(file.name).name}": bootstrap.by_position(
        windows.losses, one.documents, **settings
      )
      for side, file, windows in (("A", a, one), ("B", b, other))
    }
    difference = bootstrap.by_position(
      one.losses, one.documents, baseline=other.losses, **settings
    )
    title = f"{length:,} tokens, {len(one.starts):,} windows"
    above.append(position_plot.Panel(curves=curves, title=title))
    below.append(
      position_plot.Panel(
        curves={"A - B": difference},
        label="difference, nats per token",
        zero=True,
      )
    )
  position_plot.draw(path, "loss by position", [above, below])


def main(first: str, second: str) -> None:
  """Runs the command.

  Args:
    first: File of the losses of A.
    second: File of the losses of B.

  Raises:
    ValueError: A file is damaged, or the windows differ.
    OSError: A file is missing or cannot be written.
  """
  shared_flags.check_output(_OUTPUT, ".json")
  shared_flags.check_output(_PLOT, ".png")
  a, b = loss_file.read(first), loss_file.read(second)
  lengths = loss_file.check_pair(a, b)
  results = {}
  for length in lengths:
    one, other = a.by_length[length], b.by_length[length]
    quarter = bootstrap.last_quarter(length)
    results[str(length)] = {
      "num_windows": len(one.starts),
      "num_documents": len(np.unique(one.documents)),
      "all": _compare(one, other, slice(None)),
      "last_quarter": _compare(one, other, quarter) if length >= 4 else None,
    }
  protocol = a.about["protocol"]
  print(f"A: {first}\nB: {second}\n{protocol} protocol, nats per token")
  _print(results)
  if _OUTPUT.value is not None:
    found = {
      "a": {"file": first, **a.about},
      "b": {"file": second, **b.about},
      "protocol": protocol,
      "confidence": bootstrap.CONFIDENCE,
      "num_resamples": bootstrap.RESAMPLES,
      "seed": _SEED.value,
      "lengths": results,
    }
    atomic_file.write_json(_OUTPUT.value, found)
    print(f"wrote {_OUTPUT.value}")
  if _PLOT.value is not None:
    _draw(_PLOT.value, a, b, lengths)
    print(f"wrote {_PLOT.value}")


if __name__ == "__main__":
  cli.run(main, files=("A.npz", "B.npz"))
