"""Reads JSON objects and checks the types of their values.

A null means the same as a missing entry: the default.
"""

import json
import pathlib
import reprlib
from typing import Any

# Sizes and ids must be below it.
_LIMIT = 1 << 31
# Largest file that is read.
_MAX_BYTES = 96 << 20


def value(path: pathlib.Path, *, max_bytes: int = _MAX_BYTES) -> Any:
  """Returns the content of a JSON file.

  Args:
    path: The file.
    max_bytes: Largest size allowed; the content may take 24 times as much
      memory.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: It is not JSON, not a regular file, or too large.
  """
  if path.exists() and not path.is_file():
    raise ValueError(f"{path} is a folder, pipe or device, not a JSON file.")
  if path.stat().st_size > max_bytes:
    raise ValueError(
      f"{path} is larger than {max_bytes >> 20} MiB, the most that is read."
    )
  try:
    return json.loads(path.read_text(encoding="utf-8-sig"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is not valid JSON ({error})") from error


def read(path: pathlib.Path) -> dict[str, Any]:
  """Returns the object in a file, without its null entries.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: It does not contain a JSON object.
  """
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} does not exist: name a folder with {path.name}."
    )
  try:
    content = value(path)
  except ValueError as error:
    raise ValueError(f"{str(error).rstrip('.')}: copy it again.") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path} does not contain a JSON object: copy it again.")
  return {name: entry for name, entry in content.items() if entry is not None}


def is_on(value: Any) -> bool:
  """Returns whether a setting is on; null, false and empty are off.

  The integer 0 counts as on, as it may be the number of a layer.

  Args:
    value: From JSON.
  """
  return bool(value) or type(value) is int


def integer(name: str, value: Any, at_least: int = 1) -> int:
  """Returns `value` if it is an integer.

  Args:
    name: What the message calls it.
    value: From JSON.
    at_least: The smallest allowed value.

  Raises:
    ValueError: It is not, or it is too small or too large.
  """
  if type(value) is not int or value < at_least:
    raise ValueError(
      f"{name} must be an integer of at least {at_least}, got"
      f" {reprlib.repr(value)}."
    )
  if value >= _LIMIT:
    raise ValueError(f"{name} is too large, got {reprlib.repr(value)}.")
  return value


def number(name: str, value: Any) -> float:
  """Returns `value` as a float if it is a finite number.

  Args:
    name: What the message calls it.
    value: From JSON.

  Raises:
    ValueError: It is not.
  """
  # JSON integers may exceed the range of a float.
  if type(value) not in (int, float) or not -1e300 < value < 1e300:
    raise ValueError(f"{name} must be a number, got {reprlib.repr(value)}.")
  return float(value)


def boolean(name: str, value: Any) -> bool:
  """Returns `value` if it is true or false.

  Args:
    name: What the message calls it.
    value: From JSON.

  Raises:
    ValueError: It is not.
  """
  if type(value) is not bool:
    raise ValueError(
      f"{name} must be true or false, got {reprlib.repr(value)}."
    )
  return value


def strings(name: str, value: Any) -> list[str]:
  """Returns `value` if it is a list of strings.

  Args:
    name: What the message calls it.
    value: From JSON.

  Raises:
    ValueError: It is not.
  """
  if type(value) is not list or not all(type(x) is str for x in value):
    raise ValueError(
      f"{name} must be a list of strings, got {reprlib.repr(value)}."
    )
  return value
