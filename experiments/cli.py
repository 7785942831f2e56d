"""How every command starts, and how it ends on bad input.

A bad flag, file or setting is the user's to mend, so it ends in one line on
standard error and exit status 2. `--traceback` shows where it came from.
"""

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging

from scca_jax import files

_TRACEBACK = flags.DEFINE_boolean(
  "traceback", False, "Show the Python traceback of an error in the input."
)
EXIT_BAD_INPUT = 2


def _one_line(error: BaseException) -> str:
  text = " ".join(str(error).split())
  return text or type(error).__name__


def _fail(error: BaseException) -> None:
  print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)
  sys.exit(EXIT_BAD_INPUT)


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise flags.Error(
        f"unexpected argument {rest[1]!r}: settings are given as --name=value."
      )
  except Exception as error:  # A config file may fail in any way of its own.
    _fail(error)
  return rest


def run(main: Callable[[], None]) -> None:
  """Runs `main()` with the flags parsed; does not return.

  Args:
    main: The command. ValueError, OSError and NotImplementedError that it
      raises speak of its input: their message is printed as one line and the
      exit status is 2.
  """

  def guarded(argv: list[str]) -> None:
    del argv
    if not flags.FLAGS["verbosity"].present:
      # Orbax reports every step of every save.
      logging.set_verbosity(logging.WARNING)
    try:
      main()
    except (ValueError, OSError, NotImplementedError) as error:
      if _TRACEBACK.value:
        raise
      _fail(error)

  app.run(guarded, flags_parser=_parse_flags)


def write_json(path: str | pathlib.Path, value: Any) -> None:
  """Writes `value` as indented JSON, all of it or nothing.

  Raises:
    OSError: It cannot be written; what stood there before still does.
  """
  files.write(path, json.dumps(value, indent=2).encode() + b"\n")
