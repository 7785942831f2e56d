"""Settings on the command line: `--config=FILE` and `--config.NAME=VALUE`.

The dataclasses of a run define the settings with type, default and description.
This module reads their values, lists them for `--help`, and suggests the
nearest one for a misspelt name.
"""

import ast
import dataclasses
import difflib
import inspect
import pathlib
import re
import reprlib
import runpy
import textwrap
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import ml_collections
from absl import flags

from experiments.shared.config import from_config_dict, without_none

Run = TypeVar("Run")

# Contains `configs/`, in a checkout and in a wheel.
_ROOT = pathlib.Path(__file__).parents[2]
_CHANGE = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")

# `--config` counts as a flag of the command that defines it.
flags.disclaim_key_flags()


class Stopped(BaseException):
  """A request to end the process; its argument is the signal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """One setting, as `--help` lists it.

  Attributes:
    name: Its name with those of its groups, such as "training.steps".
    kind: Its type.
    default: Its default.
    text: Its description.
    group: Description of its group.
  """

  name: str
  kind: Any
  default: Any
  text: str
  group: str

  @property
  def type_name(self) -> str:
    """Its type as people write it, such as "int | None"."""
    if items := _items(self.kind):
      return f"tuple of {items.__name__}"
    is_class = isinstance(self.kind, type) and not typing.get_args(self.kind)
    return self.kind.__name__ if is_class else str(self.kind)


def _describe(kind: type) -> dict[str, str]:
  """Returns the description of each attribute in a dataclass's docstring."""
  _, _, text = (inspect.getdoc(kind) or "").partition("Attributes:\n")
  found = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", text, re.MULTILINE)
  return {name: " ".join(words.split()) for name, words in found}


def _items(kind: Any) -> type | None:
  """Returns `T` for `tuple[T, ...]` of a dataclass, otherwise None."""
  first = next(iter(typing.get_args(kind)), None)
  return first if dataclasses.is_dataclass(first) else None  # pyright: ignore


def list_settings(
  kind: type, prefix: str = "", group: str = ""
) -> list[Setting]:
  """Returns the settings of a dataclass, those of its groups last.

  Args:
    kind: The dataclass.
    prefix: Prefix of names.
    group: Description of the dataclass, if it is a group in another one.
  """
  hints, texts = typing.get_type_hints(kind), _describe(kind)
  own, groups = [], []
  for field in dataclasses.fields(kind):
    name, text = prefix + field.name, texts.get(field.name, "")
    hint = hints[field.name]
    if dataclasses.is_dataclass(hint):
      found = list_settings(hint, f"{name}.", text)  # pyright: ignore
      default = field.default
      # A group may have different defaults from its class.
      groups += [
        dataclasses.replace(x, default=_get(default, x.name[len(name) + 1 :]))
        for x in found
      ]
    else:
      own.append(
        Setting(
          name=name, kind=hint, default=field.default, text=text, group=group
        )
      )
      if items := _items(hint):
        groups += list_settings(
          items, f"{name}[].", f"{text} They are set in the config file."
        )
  return own + groups


def _get(settings: Any, name: str) -> Any:
  """Returns the value of a dotted name, or None for one in a list."""
  for part in name.split("."):
    if part.endswith("[]"):
      return None
    settings = getattr(settings, part)
  return settings


def _read_bool(text: str) -> bool:
  if text.lower() in _TRUE + _FALSE:
    return text.lower() in _TRUE
  raise ValueError("neither true nor false")


def _read_tuple(text: str) -> Any:
  if text.strip().startswith(("(", "[")):
    return ast.literal_eval(text)
  words = [word.strip() for word in text.split(",") if word.strip()]
  try:
    return tuple(ast.literal_eval(word) for word in words)
  except (ValueError, SyntaxError):
    return tuple(words)


def read_value(text: str, setting: Setting) -> Any:
  """Returns the value that a flag gives a setting.

  Args:
    text: The text after the "=". "none", in upper or lower case, means None if
      the setting may be None; a tuple needs no parentheses.
    setting: The setting.

  Raises:
    ValueError: It cannot be read as the setting's type.
  """
  kind = without_none(setting.kind)
  if kind is not setting.kind and text.lower() == "none":
    return None
  if _items(kind):
    raise ValueError(
      f"setting {setting.name} is a list of groups: set it in the config file."
    )
  reader: Any = kind
  if typing.get_origin(kind) is tuple:
    reader = _read_tuple
  elif kind is bool:
    reader = _read_bool
  try:
    return reader(text)
  except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
    raise ValueError(
      f"setting {setting.name} must be of type {setting.type_name}, got"
      f" {text!r}."
    ) from None


def nearest(given: str, names: Iterable[str]) -> list[str]:
  """Returns the names that may have been meant, the likeliest first.

  Args:
    given: An unknown flag without its dashes, such as "steps".
    names: Flags and settings, such as "config.training.steps".
  """
  names, last = list(names), given.rpartition(".")[2]
  same = [name for name in names if name.rpartition(".")[2] == last]
  if same:
    return same[:3]
  near = difflib.get_close_matches(given, names, 1, 0.8)
  if near:
    return near
  lasts = {name.rpartition(".")[2]: name for name in reversed(names)}
  return [lasts[x] for x in difflib.get_close_matches(last, lasts, 1)]


class ConfigFlag(Generic[Run]):
  """The settings of a command: a file, and the changes made by flags."""

  def __init__(self, kind: type[Run], default: str):
    """Defines the flag `--config`.

    Args:
      kind: Dataclass of the settings.
      default: Name in `configs/` of the default config.
    """
    self._kind = kind
    self._settings = {s.name: s for s in list_settings(kind)}
    self._changes: dict[str, Any] = {}
    self._file = flags.DEFINE_string(
      "config",
      f"configs/{default}.py",
      "Settings of the run: a Python program, which is executed, so do not use"
      " files from strangers. --config.NAME=VALUE changes a setting.",
    )

  @property
  def names(self) -> list[str]:
    """The settings as flags, without dashes."""
    return [f"config.{name}" for name in self._settings]

  def take(self, argv: Sequence[str]) -> list[str]:
    """Takes changes of settings out of a command line; returns the rest.

    Raises:
      ValueError: A setting is unknown, or its value cannot be read.
    """
    self._changes, rest, words = {}, [], iter(argv)
    for word in words:
      found = re.fullmatch(
        r"--?(no)?config\.([^=]*)(?:=(.*))?", word, re.DOTALL
      )
      if word == "--":
        rest += [word, *words]
      elif found:
        self._change(found[2], found[3], bool(found[1]), words)
      else:
        rest.append(word)
    return rest

  def _change(
    self, name: str, value: str | None, no: bool, words: Iterator[str]
  ) -> None:
    setting = self._settings.get(name)
    if setting is None or name.count("[]"):
      if any(known.startswith(f"{name}.") for known in self._settings):
        raise ValueError(
          f"config.{name} is a group of settings: set one of them, such as"
          f" --{next(x for x in self.names if x.startswith(f'config.{name}.'))}"
          "=VALUE."
        )
      parent = name.rpartition(".")[0]
      if parent in self._settings:
        raise ValueError(
          f"config.{parent} has no parts, so --config.{name} cannot be set:"
          f" give --config.{parent}=VALUE"
          f" ({self._settings[parent].text.rstrip('.')})."
        )
      raise ValueError(unknown(f"config.{name}", self.names))
    if value is None:
      if setting.kind is bool:
        value = "false" if no else "true"
      else:
        value = next(words, None)
    elif no:
      raise ValueError(f"--noconfig.{name} takes no value, got {value!r}.")
    if value is None:
      raise ValueError(f"--config.{name} needs a value.")
    self._changes[name] = read_value(value, setting)

  def path(self) -> pathlib.Path:
    """Returns the config file; the shipped ones are found from any folder."""
    path = pathlib.Path(self._file.value or "")
    shipped = _ROOT / path
    return shipped if not path.exists() and shipped.is_file() else path

  def _shipped(self, name: str) -> str:
    """Returns, in words, the shipped config with the nearest name, or all."""
    names = sorted(file.stem for file in (_ROOT / "configs").glob("[!_]*.py"))
    near = difflib.get_close_matches(name, names, 1)
    if near:
      return f"did you mean configs/{near[0]}.py?"
    return f"configs/ has {', '.join(names)}."

  def _load(self) -> dict[str, Any]:
    """Returns the settings of the file, nested.

    Raises:
      ValueError: The file is missing or fails.
    """
    path = self.path()
    if path.exists() and not path.is_file():
      raise ValueError(f"the config file {path} is not a file.")
    try:
      settings = runpy.run_path(str(path))["get_config"]()
      if isinstance(settings, ml_collections.ConfigDict):
        return settings.to_dict()
    except Stopped:
      raise
    # A config file may fail in any way, but must not end the command.
    except BaseException as error:
      text = str(error) or type(error).__name__
      if isinstance(error, FileNotFoundError):
        text = f"it does not exist; {self._shipped(path.stem)}"
      elif isinstance(error, KeyError) and error.args == ("get_config",):
        text = "it has no function get_config"
      raise ValueError(
        f"the config file {path} cannot be read: {text}"
      ) from error
    raise ValueError(f"get_config() of {path} must return a ConfigDict.")

  def read(self) -> Run:
    """Returns the settings of the run.

    Raises:
      ValueError: The config file cannot be read, or a setting is wrong.
    """
    settings = self._load()
    for name, value in self._changes.items():
      *groups, last = name.split(".")
      group = settings
      for part in groups:
        group = group.setdefault(part, {})
        if not isinstance(group, dict):
          raise ValueError(
            f"setting {part} must be a group of settings, got"
            f" {reprlib.repr(group)}."
          )
      group[last] = value
    return from_config_dict(self._kind, settings)

  def help(self, width: int) -> str:
    """Returns the list of all settings, grouped.

    Args:
      width: Length of a line.
    """
    run = self.read()
    lines, group = [], ""
    for setting in self._settings.values():
      if setting.group != group:
        group = setting.group
        lines += ["", *textwrap.wrap(group, width, initial_indent="  ")]
      about = [f"default {setting.default!r}"]
      if setting.default is dataclasses.MISSING:
        about = []
      if "[]" not in setting.name and not _items(setting.kind):
        value = _get(run, setting.name)
        if value != setting.default:
          about.append(f"here {value!r}")
      lines.append(
        f"  --config.{setting.name}: {setting.type_name}"
        + (f" ({'; '.join(about)})" if about else "")
      )
      lines += textwrap.wrap(
        setting.text, width, initial_indent=" " * 6, subsequent_indent=" " * 6
      )
    return "\n".join(lines)


def unknown(given: str, names: Iterable[str]) -> str:
  """Returns a message for an unknown flag or setting, with the nearest ones.

  Args:
    given: The flag without its dashes.
    names: See `nearest`.
  """
  kind = "setting" if given.startswith("config.") else "flag"
  near = " or ".join(f"--{name}" for name in nearest(given, names))
  hint = f"did you mean {near}?" if near else "see --help for the list."
  return f"unknown {kind} --{given}: {hint}"
