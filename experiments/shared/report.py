"""Writes `report.md` and `report.png` at the end of a run.

The report says what was run and how well it went: perplexities with paired
intervals, the settings that differ from their defaults, speed, memory, versions
and the command. The picture shows the loss by position in the window, before
and after, and the training loss.
"""

import math
import pathlib
import platform
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import flax
import jax

from experiments.shared import loop, position_plot
from experiments.shared.config import (
  FinetuneConfig,
  PretrainConfig,
  flat,
  to_json,
)
from scca_jax import __version__, atomic_file, bootstrap, tasks
from scca_jax.perplexity import Perplexity

# A band in a picture needs fewer resamples than a number.
_RESAMPLES = 1000


def write(
  folder: pathlib.Path,
  title: str,
  run: FinetuneConfig | PretrainConfig,
  rows: Mapping[str, Mapping[int, Perplexity]],
  summary: Mapping[str, Any],
) -> pathlib.Path:
  """Writes the report of a run and returns its path.

  Args:
    folder: The run's, with its `metrics.jsonl`.
    title: What the run does.
    run: Its settings.
    rows: The measurements, by model and length, including losses; the last
      model is compared with the others. May be empty.
    summary: The content of `summary.json`.

  Raises:
    OSError: A file cannot be written.
  """
  longest = {name: found[max(found)] for name, found in rows.items()}
  _draw(folder, longest)
  parts = [f"# {title}\n", f"```sh\n{_command()}\n```\n"]
  if rows:
    parts.append(_results(rows))
  if "tasks" in summary:
    parts.append(_tasks(summary["tasks"]))
  parts += [
    "![Loss by position, and of training](report.png)\n",
    _facts(summary),
    _settings(run),
  ]
  path = folder / "report.md"
  atomic_file.write(path, "\n".join(parts).encode())
  return path


def _command() -> str:
  """Returns the command that started this process."""
  spec = getattr(sys.modules.get("__main__"), "__spec__", None)
  name = (spec and spec.name) or f"experiments.{pathlib.Path(sys.argv[0]).stem}"
  return shlex.join(["scca", name.rpartition(".")[2], *sys.argv[1:]])


def _table(head: list[str], lines: list[list[str]]) -> str:
  rows = [head, ["---"] * len(head), *lines]
  return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _number(value: float | None) -> str:
  return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def _results(rows: Mapping[str, Mapping[int, Perplexity]]) -> str:
  """Returns the tables of perplexities and of paired differences."""
  *_, last = rows
  lengths = sorted(rows[last])
  longest = lengths[-1]
  measured = rows[last][longest]
  lines = [
    [
      name,
      *(_number(results[n].perplexity) for n in lengths),
      _number(results[longest].last_quarter),
    ]
    for name, results in rows.items()
  ]
  head = ["perplexity at", *(f"{n:,}" for n in lengths)]
  found = (
    f"{measured.protocol} protocol, {measured.num_windows:,} windows of"
    f" {longest:,} tokens, dense attention.\n\n"
  )
  found += _table([*head, f"last quarter of {longest:,}"], lines)
  ours: Any = rows[last][longest].by_window
  differences = []
  for name, results in rows.items():
    theirs: Any = results[longest].by_window
    if name == last:
      continue
    cells = [f"{last} - {name}"]
    for positions in (slice(None), bootstrap.last_quarter(longest)):
      if longest < 4 and positions != slice(None):
        cells.append("-")
        continue
      difference = bootstrap.paired_difference(
        ours.scored, theirs.scored, ours.documents, positions=positions
      )
      low, high = difference.interval
      cells.append(f"{difference.mean:+.4f} ({low:+.4f} to {high:+.4f})")
    differences.append(cells)
  if not differences:
    return found
  found += (
    "\nDifferences in nats per token on the same windows, with 95 % bootstrap"
    " intervals over documents\nand windows:\n\n"
  )
  return found + _table(
    ["", f"{longest:,} tokens", "last quarter"], differences
  )


def _tasks(scores: Mapping[str, Any]) -> str:
  """Returns the table of accuracies, or of answer losses if those count."""
  lines = []
  for task, lengths in next(iter(scores.values())).items():
    by_loss = tasks.TASKS[task].scored_by_loss
    field = "answer_loss" if by_loss else "accuracy"
    for length in lengths:
      cells = [found[task][length] for found in scores.values()]
      lines.append(
        [
          task + (" (nats per token)" if by_loss else ""),
          f"{int(length):,}",
          *(f"{cell[field]:.3f}" for cell in cells),
        ]
      )
  return (
    "Share of answers that are right, by teacher forcing, with dense"
    " attention:\n\n" + _table(["task", "tokens", *scores], lines)
  )


def _facts(summary: Mapping[str, Any]) -> str:
  """Returns speed, memory, devices and versions."""
  speed, memory = summary["tokens_per_second"], summary["peak_bytes"]
  devices = jax.devices()
  lines = [
    ["steps", f"{summary['steps']:,}"],
    ["loss of the last step", f"{summary['final_loss']:.4f}"],
    ["tokens per second", "-" if speed is None else f"{speed:,.0f}"],
    [
      "peak memory of a device",
      "not known" if memory is None else f"{memory / 2**30:.2f} GiB",
    ],
    ["devices", f"{len(devices)} x {devices[0].device_kind}"],
    [
      "versions",
      f"scca_jax {__version__}, jax {jax.__version__}, flax {flax.__version__},"
      f" Python {platform.python_version()}",
    ],
  ]
  return _table(["run", ""], lines)


def _settings(run: FinetuneConfig | PretrainConfig) -> str:
  """Returns the settings that differ from the defaults of their class."""
  defaults = flat(to_json(type(run)()))
  lines = [
    [f"`config.{name}`", f"`{value}`", f"`{defaults.get(name)}`"]
    for name, value in flat(to_json(run)).items()
    if value != defaults.get(name)
  ]
  if not lines:
    return "All settings are the defaults.\n"
  return _table(["setting", "value", "default"], lines)


def _draw(folder: pathlib.Path, results: Mapping[str, Perplexity]) -> None:
  """Draws the loss by position in the longest windows, and by step."""
  curves = {}
  context_len = num_windows = 0
  for name, result in results.items():
    windows: Any = result.by_window
    context_len, num_windows = result.context_len, result.num_windows
    curves[name] = bootstrap.by_position(
      windows.losses,
      windows.documents,
      edges=bootstrap.log_edges(context_len),
      num_resamples=_RESAMPLES,
    )
  figure, axes = position_plot.make_figure(1, 2 if curves else 1)
  if curves:
    position_plot.draw_panel(
      axes[0, 0],
      position_plot.Panel(
        curves=curves,
        title=f"loss in {num_windows:,} windows of {context_len:,} tokens",
      ),
    )
  steps = [s for s in loop.read_metrics(folder) if s.get("loss") is not None]
  axis = axes[0, -1]
  axis.plot([s["step"] for s in steps], [s["loss"] for s in steps])
  axis.set(xlabel="step", ylabel="nats per token", title="training loss")
  axis.grid(alpha=0.3)
  position_plot.save(folder / "report.png", figure)
