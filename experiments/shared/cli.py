"""How every command starts, and how it ends on bad input.

A bad flag, file or setting is for the user to correct, so the command ends with
one line on standard error and exit status 2. `--traceback` shows where the
error came from.

What jax compiles is kept between runs, in `scca_jax/compiled` of the user's
cache folder ($XDG_CACHE_HOME, ~/.cache). JAX_COMPILATION_CACHE_DIR names
another folder; JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
"""

import functools
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from logging import CRITICAL, getLogger
from typing import Any, NoReturn

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

_TRACEBACK = flags.DEFINE_boolean(
  "traceback", False, "Show the Python traceback of an error in the input."
)
EXIT_BAD_INPUT = 2

_CONFIGS = pathlib.Path(__file__).parents[2] / "configs"

# `--config` belongs to the command that asks for it.
flags.disclaim_key_flags()


def _one_line(error: BaseException) -> str:
  text = " ".join(str(error).split())
  return text or type(error).__name__


def _out_of_memory(error: Exception) -> ValueError | None:
  """Returns the error to report if the device ran out of memory."""
  text = str(error)
  if "RESOURCE_EXHAUSTED" not in text:
    return None
  asked = re.search(r"allocat(?:e|ing) ([\d.]+ ?\w+)", text)
  more = f", {asked[1]} more were asked for" if asked else ""
  return ValueError(
    f"{jax.local_devices()[0].device_kind} is out of memory{more}: take fewer"
    " or shorter sequences at once, or the settings that"
    " experiments.plan_memory finds to fit."
  )


def _fail(error: BaseException) -> NoReturn:
  print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)
  sys.exit(EXIT_BAD_INPUT)


def _parse_flags(argv: list[str], files: Sequence[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
    if len(rest) > 1 + len(files):
      raise flags.Error(
        f"unexpected argument {rest[1 + len(files)]!r}: settings are given as"
        " --name=value."
      )
    if len(rest) < 1 + len(files):
      raise flags.Error(
        f"give the files {' '.join(files)}, got {' '.join(rest[1:]) or 'none'}."
      )
  except Exception as error:  # A config file may fail in any way of its own.
    _fail(error)
  return rest


def define_config(default: str) -> flags.FlagHolder:
  """Returns the flag `--config`, with `--config.name` for each setting.

  Defining the flag reads the settings, so a wrong one ends the command here.

  Args:
    default: Name in `configs/` of the config if no other is given.
  """
  try:
    return config_flags.DEFINE_config_file(
      "config",
      str(_CONFIGS / f"{default}.py"),
      "Settings of the run (configs/*.py).",
    )
  except (AttributeError, KeyError) as error:
    text = str(error.args[0])
    near = re.search(r'(\w+)\W+n?Did you mean "(\w+)"', text)
    if near:
      text = f"{near[1]}: did you mean {near[2]}?"
    text = text.strip(" '\"")
    _fail(ValueError(f"unknown setting {text}"))
  except TypeError:
    # One of them has a dot behind a setting that is not a group.
    given = [a.split("=")[0] for a in sys.argv if a.startswith("--config.")]
    _fail(ValueError(f"unknown setting among {', '.join(given)}."))
  except Exception as error:  # A config file may fail in any way of its own.
    _fail(error)


def read_config(flag: flags.FlagHolder) -> ml_collections.ConfigDict:
  """Returns the settings behind `--config`.

  Raises:
    ValueError: The file is missing or fails.
  """
  settings = flag.value
  if not isinstance(settings, ml_collections.ConfigDict):
    # ml_collections keeps the failure and raises it on the first access.
    try:
      _ = settings.settings
    except Exception as error:
      raise ValueError(f"the config file cannot be read: {error}") from error
    raise ValueError(
      "get_config() of the config file must return a ConfigDict."
    )
  return settings


def _keep_compiled() -> None:
  """Tells jax where to keep what it compiles, unless the user has."""
  settings: Any = jax.config
  if (
    settings.jax_compilation_cache_dir
    or not settings.jax_enable_compilation_cache
  ):
    return
  folder = cache_folder("compiled")
  if folder is not None:
    jax.config.update("jax_compilation_cache_dir", str(folder))


def cache_folder(name: str) -> pathlib.Path | None:
  """Returns `scca_jax/NAME` in the user's cache folder; None if it has none."""
  cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
  folder = cache.expanduser() / "scca_jax" / name
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError:
    # The cache folder is not writable: skip caching.
    return None
  return folder


@functools.cache
def _quieten_orbax() -> None:
  """Hides what Orbax logs; the command reports its errors."""
  logging.get_absl_handler().addFilter(
    lambda record: "orbax" not in pathlib.PurePath(record.pathname).parts
  )
  # When several writes fail at once, Orbax raises one error; asyncio, which
  # nothing else here uses, may report the others when it collects them.
  getLogger("asyncio").setLevel(CRITICAL)
  hook = sys.unraisablehook

  def unraisable(raised: Any) -> None:
    # Writes that failed with others end after their event loop has closed.
    if str(raised.exc_value) != "Event loop is closed":
      hook(raised)

  sys.unraisablehook = unraisable


def run(
  main: Callable[..., None],
  *,
  files: Sequence[str] = (),
  has_flags: bool = True,
) -> None:
  """Runs `main(*files)` with the flags parsed; does not return.

  Args:
    main: The command. Its ValueError, OSError and NotImplementedError are about
      its input: their message is printed as one line and the exit status is 2.
      The same holds for a device that is out of memory.
    files: What messages call the files that the command takes beside flags.
    has_flags: Whether the command line is ours to parse; otherwise `main` does.
  """

  def guarded(argv: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
      # Orbax reports every step of every save.
      logging.set_verbosity(logging.WARNING)
    _quieten_orbax()
    _keep_compiled()
    try:
      main(*argv[1:])
    except (ValueError, OSError, NotImplementedError) as error:
      if _TRACEBACK.value:
        raise
      _fail(error)
    except jax.errors.JaxRuntimeError as error:
      exhausted = _out_of_memory(error)
      if exhausted is None or _TRACEBACK.value:
        raise
      _fail(exhausted)

  def parse(argv: list[str]) -> list[str]:
    return _parse_flags(argv, files) if has_flags else flags.FLAGS(argv[:1])

  app.run(guarded, flags_parser=parse)
