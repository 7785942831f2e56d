"""Files of window losses by position, written by `--positions`.

Each is an `.npz`. For every measured length `L` it has the arrays of
`perplexity.WindowLosses` as `losses_L`, `starts_L` and so on, and a JSON string
`about` with protocol, stride, hash of the tokens, and whatever the writer adds.
"""

import dataclasses
import io
import json
import os
import pathlib
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from scca_jax import atomic_file
from scca_jax.perplexity import WindowLosses

# What numpy and zipfile raise when they read a damaged archive.
DAMAGED = (
  AttributeError,
  EOFError,
  KeyError,
  MemoryError,  # For an array whose header asks for too much.
  RuntimeError,  # Encrypted, nested too deep, or of an unknown method.
  TypeError,
  ValueError,
  tokenize.TokenError,
  zipfile.BadZipFile,
  zlib.error,
)
_ARRAYS = [field.name for field in dataclasses.fields(WindowLosses)]
# What must agree between losses to compare, with its name for messages.
_SAME = {
  "tokens_sha256": "tokens",
  "protocol": "protocol",
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LossFile:
  """The losses of one model on one corpus.

  Attributes:
    by_length: The losses at each context length, in tokens.
    about: JSON values; `check_pair` compares "protocol" and "tokens_sha256"
      (see `token_file.ids_sha256`).
    name: Its name in messages.
  """

  by_length: dict[int, WindowLosses]
  about: dict[str, Any]
  name: str


def write(
  path: str | os.PathLike[str],
  by_length: Mapping[int, WindowLosses],
  about: dict[str, Any],
) -> None:
  """Writes a file of losses; see `LossFile` and `atomic_file.AtomicFile`."""
  arrays = {
    f"{name}_{length}": getattr(windows, name)
    for length, windows in by_length.items()
    for name in _ARRAYS
  }
  content = io.BytesIO()
  np.savez(content, about=np.array(json.dumps(about)), **arrays)
  with atomic_file.AtomicFile(path) as file:
    file.write(content.getbuffer())


def read(path: str | os.PathLike[str]) -> LossFile:
  """Returns the content of a file of losses.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: It is damaged, or something else.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"the file of losses {path} does not exist.")
  try:
    _refuse_compressed(path)
    # numpy closes only files that it opened and understood.
    with path.open("rb") as stored, np.load(stored) as file:
      arrays = dict(file)
    about = json.loads(str(arrays["about"]))
    lengths = [
      int(name.removeprefix("losses_"))
      for name in arrays
      if name.startswith("losses_")
    ]
    by_length = {
      length: _windows({name: arrays[f"{name}_{length}"] for name in _ARRAYS})
      for length in sorted(lengths)
    }
    missing = [name for name in _SAME if name not in about]
    if missing or not lengths:
      raise KeyError(*missing)
  except DAMAGED as error:
    raise ValueError(
      f"{path} is not a file of losses, or is damaged: write it with"
      " scca evaluate --positions=FILE.npz."
    ) from error
  return LossFile(by_length=by_length, about=about, name=str(path))


def _refuse_compressed(path: pathlib.Path) -> None:
  """Refuses a compressed archive, as we never write one."""
  with zipfile.ZipFile(path) as archive:
    if sum(x.file_size for x in archive.infolist()) > path.stat().st_size:
      raise ValueError("it is compressed.")


def _windows(arrays: dict[str, np.ndarray]) -> WindowLosses:
  losses = arrays["losses"]
  if losses.ndim != 2 or losses.dtype != np.float32:
    raise ValueError("losses must be float32 [windows, positions].")
  if any(
    x.shape != losses.shape[:1] for x in arrays.values() if x is not losses
  ):
    raise ValueError("there must be one of each per window.")
  return WindowLosses(**arrays)


def check_pair(a: LossFile, b: LossFile) -> list[int]:
  """Returns the lengths at which two models ran on the same windows.

  Raises:
    ValueError: They ran on different tokens, protocols, lengths or windows.
  """
  for key, name in _SAME.items():
    if a.about[key] != b.about[key]:
      found = (
        f": {a.about[key]} and {b.about[key]}" if key == "protocol" else ""
      )
      raise ValueError(
        f"{a.name} and {b.name} do not have the same {name}{found}; run `scca"
        " evaluate` with the same --data and --protocol for both."
      )
  lengths = [length for length in a.by_length if length in b.by_length]
  if not lengths:
    raise ValueError(
      f"{a.name} and {b.name} have no length in common:"
      f" {_list(a)} and {_list(b)} tokens."
    )
  for length in lengths:
    one, other = a.by_length[length], b.by_length[length]
    for name in _ARRAYS[1:]:
      if not np.array_equal(getattr(one, name), getattr(other, name)):
        raise ValueError(
          f"{a.name} and {b.name} do not have the same windows of {length:,}"
          f" tokens ({name} differ): run `scca evaluate` with the same"
          " --num_windows and --stride for both."
        )
  return lengths


def _list(file: LossFile) -> str:
  return ", ".join(f"{length:,}" for length in file.by_length)
