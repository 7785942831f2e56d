"""Commands: each runs as `scca NAME`, or `python -m experiments.NAME`."""

import os
import signal
import sys
from typing import Any, NoReturn


def _end(number: int, frame: Any) -> NoReturn:
  del frame
  print(
    f"\nStopped by {signal.Signals(number).name}: no file is half-written.",
    file=sys.stderr,
    flush=True,
  )
  os._exit(128 + number)


def end_on_signals() -> None:
  """Ends the process in one line on SIGINT and SIGTERM, from its start on.

  An exception could be lost in the imports, which take seconds. `shared.cli`
  replaces the handlers while the command runs.
  """
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, _end)


if sys.argv[:1] == ["-m"]:  # Python is about to run one of the modules.
  end_on_signals()
