"""How a run shows its progress: a bar on a terminal, lines in a log."""

import datetime
import sys
import time
from typing import Any

import tqdm

# Approximate number of lines in a run.
_NUM_LINES = 50


class Progress:
  """Steps done, with the loss, the speed and the time left.

  On a terminal it is a bar. Otherwise a line is printed every few steps,
  because a bar would fill a log with one long line.
  """

  def __init__(self, total: int, done: int, *, every: int, shown: bool):
    """Starts at a step.

    Args:
      total: Steps of the run.
      done: Steps done before this process.
      every: Minimum number of steps between two lines.
      shown: Whether to show anything.
    """
    self._total, self._done = total, done
    self._every = max(every, -(-total // _NUM_LINES))
    terminal = sys.stdout.isatty() and sys.stderr.isatty()
    self._prints = shown and not terminal
    self._timed: tuple[int, float] | None = None
    self._bar = tqdm.tqdm(
      total=total,
      initial=done,
      unit="step",
      dynamic_ncols=True,
      disable=not (shown and terminal),
    )

  def start_clock(self) -> None:
    """Starts measuring the time; earlier steps say little about the rest."""
    self._timed = self._done, time.perf_counter()

  def advance(self) -> None:
    """Counts a step."""
    self._done += 1
    self._bar.update()

  def show(self, line: dict[str, Any]) -> None:
    """Shows the metrics of the last step."""
    loss, speed = f"{line['loss']:.3f}", line.get("tokens_per_second")
    shown = {"loss": loss} | ({"tok/s": f"{speed:,.0f}"} if speed else {})
    self._bar.set_postfix(shown, refresh=False)
    if self._done % self._every and self._done != self._total:
      return
    if self._prints:
      text = f"step {self._done:,}/{self._total:,}: loss {loss}"
      if speed:
        text += f", {speed:,.0f} tokens/s"
      print(text + self._time_left(), flush=True)

  def _time_left(self) -> str:
    if self._timed is None or self._done <= self._timed[0]:
      return ""
    step, since = self._timed
    each = (time.perf_counter() - since) / (self._done - step)
    left = round(each * (self._total - self._done))
    return f", {datetime.timedelta(seconds=left)} left"

  def close(self) -> None:
    """Finishes the bar."""
    self._bar.close()
