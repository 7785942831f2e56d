"""How every command starts, and how it ends on bad input.

The user can correct a bad flag, file or setting, so the command ends with one
line on standard error and exit status 2. `--traceback` shows where the error
came from.

Compiled programs are kept between runs, in `scca_jax/compiled` of the user's
cache folder ($XDG_CACHE_HOME or ~/.cache). JAX_COMPILATION_CACHE_DIR names
another folder; JAX_ENABLE_COMPILATION_CACHE=false disables the cache.
"""

import contextlib
import functools
import inspect
import os
import pathlib
import re
import shutil
import signal
import stat
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from logging import CRITICAL, getLogger
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from experiments.shared import config_flag
from scca_jax import __version__, atomic_file

_TRACEBACK = flags.DEFINE_boolean(
  "traceback", False, "Show the Python traceback of an error in the input."
)
EXIT_BAD_INPUT = 2
_HELP = ("--help", "-help", "-h", "-?", "--helpfull", "--helpshort")
# Longest message, in characters.
_MAX_LETTERS = 480


def _one_line(error: BaseException) -> str:
  text = str(error)
  if isinstance(error, OSError) and error.filename is None:
    text = error.strerror or text  # Without its number.
  text = " ".join(text.split()) or type(error).__name__
  # A name may be of any length, and the remedy is at the end.
  if len(text) > _MAX_LETTERS:
    text = f"{text[:300]} ... {text[-150:]}"
  return text.encode(errors="backslashreplace").decode()


def _out_of_memory(error: Exception) -> ValueError | None:
  """Returns the error to report if the device ran out of memory."""
  text = str(error)
  if "RESOURCE_EXHAUSTED" not in text:
    return None
  asked = re.search(r"allocat(?:e|ing) ([\d.]+ ?\w+)", text)
  more = f" (it needed {asked[1]} more)" if asked else ""
  return ValueError(
    f"{jax.local_devices()[0].device_kind} is out of memory{more}: use smaller"
    " batches or shorter sequences, or settings that fit according to `scca"
    " plan_memory`."
  )


def _fail(error: BaseException) -> NoReturn:
  print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)
  sys.exit(EXIT_BAD_INPUT)


def _parse_flags(
  argv: list[str],
  files: Sequence[str],
  config: config_flag.ConfigFlag[Any] | None,
) -> list[str]:
  try:
    rest = flags.FLAGS(config.take(argv) if config else argv)
    if len(rest) > 1 + len(files):
      raise flags.Error(
        f"unexpected argument {rest[1 + len(files)]!r}: settings are given as"
        " --name=value."
      )
    if len(rest) < 1 + len(files):
      raise flags.Error(
        f"give the files {' '.join(files)}, got {' '.join(rest[1:]) or 'none'}."
      )
  except flags.UnrecognizedFlagError as error:
    names = [*(f.name for f in _own_flags()), *(config.names if config else ())]
    _fail(ValueError(config_flag.unknown(error.flagname, names)))
  except (flags.Error, ValueError) as error:
    _fail(error)
  return rest


def _own_flags() -> list[flags.Flag]:
  """Returns the flags of the command, by name."""
  own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
  own = {flag.name: flag for flag in [*own, flags.FLAGS["traceback"]]}
  return [own[name] for name in sorted(own)]


def _help(
  main: Callable[..., None],
  files: Sequence[str],
  config: config_flag.ConfigFlag[Any] | None,
) -> str:
  """Returns the text of `--help`: the command, its flags, its settings."""
  width = min(100, shutil.get_terminal_size().columns)
  text = inspect.cleandoc(main.__globals__["__doc__"] or "")
  spec = main.__globals__["__spec__"]
  command = spec.name if spec else pathlib.Path(sys.argv[0]).stem
  usage = ["usage: scca", command.rpartition(".")[2], *files, "[--FLAG=VALUE"]
  usage[-1] += " ...] [--config.NAME=VALUE ...]" if config else " ...]"
  lines = [" ".join(usage), "", text, "", "Flags:"]
  for flag in _own_flags():
    kind = flag.flag_type()
    choices = getattr(flag, "enum_values", None)
    if choices:
      kind = ", ".join(choices)
    default = "" if flag.default is None else f" (default {flag.default!r})"
    lines.append(f"  --{flag.name}: {kind}{default}")
    lines += textwrap.wrap(
      flag.help or "", width, initial_indent=" " * 6, subsequent_indent=" " * 6
    )
  if config:
    flags.FLAGS(config.take([a for a in sys.argv if a not in _HELP]))
    lines += ["", f"Settings (here: the value with {config.path()} and flags):"]
    lines.append(config.help(width))
  return "\n".join(lines)


def _keep_compiled() -> None:
  """Tells jax where to keep compiled programs, unless the user did."""
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
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
  except OSError:
    # The cache folder is not writable: skip caching.
    return None
  # Compiled programs are run, so nobody else may write them.
  if found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH:
    logging.warning(
      "%s can be written by others, so it is not used as a cache.", folder
    )
    return None
  return folder


@functools.cache
def _quieten_orbax() -> None:
  """Silences Orbax's log; the command reports its errors."""
  # Whichever handlers the logger has.
  logging.get_absl_logger().addFilter(
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


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
  """Raises `Stopped` on SIGINT and SIGTERM, so that everything is cleaned up.

  A second signal of the same kind ends the process at once.
  """

  def stop(number: int, frame: Any) -> NoReturn:
    del frame
    signal.signal(number, signal.SIG_DFL)
    raise config_flag.Stopped(number)

  previous = {
    number: signal.signal(number, stop)
    for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def run(
  main: Callable[..., None],
  *,
  config: config_flag.ConfigFlag[Any] | None = None,
  files: Sequence[str] = (),
  has_flags: bool = True,
) -> None:
  """Parses the flags, runs `main(*files)` and exits.

  `--help` lists flags and settings, `--version` prints the version; both exit
  with status 0.

  Args:
    main: The command. Its ValueError, OSError and NotImplementedError concern
      the input: their message is printed as one line and the exit status is 2.
      The same goes for a device that is out of memory. On SIGINT and SIGTERM it
      ends with one line and status 128 + the signal's number.
    config: The settings of the command, if it has any.
    files: Names, for messages, of the files that the command takes besides
      flags.
    has_flags: Whether to parse the command line here; otherwise `main` does it.
  """

  def guarded(argv: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
      # Orbax reports every step of every save.
      logging.set_verbosity(logging.WARNING)
    _quieten_orbax()
    _keep_compiled()
    try:
      with _stopped_by_signals():
        main(*argv[1:])
    except config_flag.Stopped as stopped:
      (number,) = stopped.args
      atomic_file.remove_own()
      print(
        f"\nStopped by {signal.Signals(number).name}: no file is half-written;"
        " the same command starts again, or resumes, unless its output is"
        " complete.",
        file=sys.stderr,
        flush=True,
      )
      sys.exit(128 + number)
    except (ValueError, OSError, NotImplementedError) as error:
      if _TRACEBACK.value:
        raise
      _fail(error)
    except MemoryError as error:
      if _TRACEBACK.value:
        raise
      _fail(MemoryError(f"the input needs too much memory ({error})."))
    except jax.errors.JaxRuntimeError as error:
      exhausted = _out_of_memory(error)
      if exhausted is None or _TRACEBACK.value:
        raise
      _fail(exhausted)

  def parse(argv: list[str]) -> list[str]:
    if not has_flags:
      return flags.FLAGS(argv[:1])
    # absl reads such a file whatever it is, /dev/zero included.
    if any(re.match("--?flagfile(=|$)", word) for word in argv):
      _fail(ValueError("--flagfile is not supported: give the flags."))
    if "--version" in argv:
      print(f"scca_jax {__version__}")
      sys.exit()
    if any(word in _HELP for word in argv):
      try:
        print(_help(main, files, config))
      except (flags.Error, ValueError) as error:
        _fail(error)
      sys.exit()
    return _parse_flags(argv, files, config)

  app.run(guarded, flags_parser=parse)
