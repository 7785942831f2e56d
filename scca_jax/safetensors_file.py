"""Tensors of safetensors files, mapped to memory.

The library checks a file and lists its tensors, but copies what it reads. Here
a tensor is an array over the mapped file, so that it reaches a device as fast
as the disk delivers it. Files must not change in the meantime.
"""

import dataclasses
import math
import mmap
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import safetensors

# By the format's names; jax adds bfloat16 to numpy.
_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": jnp.bfloat16,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U8": np.uint8,
  "BOOL": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class _Stored:
  """Where a tensor is in a file."""

  path: pathlib.Path
  memory: mmap.mmap
  offset: int
  shape: tuple[int, ...]
  dtype: str

  @property
  def num_bytes(self) -> int:
    """Its size in the file, in bytes."""
    return math.prod(self.shape) * np.dtype(_DTYPES[self.dtype]).itemsize

  def view(self) -> np.ndarray:
    """Returns the tensor, without copying it."""
    begin = self.offset // mmap.PAGESIZE * mmap.PAGESIZE
    end = self.offset + self.num_bytes
    if self.num_bytes:
      # Request all of it, so that the disk reads ahead.
      self.memory.madvise(mmap.MADV_WILLNEED, begin, end - begin)
    array = np.frombuffer(
      self.memory,
      _DTYPES[self.dtype],
      count=math.prod(self.shape),
      offset=self.offset,
    )
    return array.reshape(self.shape)


def _open(path: pathlib.Path) -> dict[str, _Stored]:
  """Returns the tensors of a safetensors file, which is mapped to memory."""
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist: the model lacks a file.")
  found = {}
  try:
    # It checks that the tensors fill the file without gaps.
    with safetensors.safe_open(path, framework="numpy") as file:
      with path.open("rb") as raw:
        memory = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
      offset = 8 + int.from_bytes(memory[:8], "little")
      for name in file.offset_keys():
        part = file.get_slice(name)
        tensor = _Stored(
          path, memory, offset, tuple(part.get_shape()), part.get_dtype()
        )
        if tensor.dtype not in _DTYPES:
          raise ValueError(
            f"{path}: the tensor {name} is {tensor.dtype}; float32, bfloat16"
            " and float16 can be read."
          )
        found[name] = tensor
        offset += tensor.num_bytes
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(
      f"{path} is damaged or cut short ({error}): copy it again."
    ) from error
  return found


class SafetensorsFiles(Mapping[str, Callable[[], np.ndarray]]):
  """The tensors of files by name, as functions that return them uncopied."""

  def __init__(self, paths: Sequence[pathlib.Path]):
    """Maps the files to memory.

    Args:
      paths: The files.

    Raises:
      FileNotFoundError: One is missing.
      ValueError: One is damaged, or a tensor has a dtype that numpy lacks or is
        in two files; the message names it.
    """
    self._stored: dict[str, _Stored] = {}
    for path in paths:
      for name, tensor in _open(path).items():
        if name in self._stored:
          raise ValueError(
            f"the tensor {name} is in two files, {self.path_of(name)} and"
            f" {path}: remove the one that does not belong to this model."
          )
        self._stored[name] = tensor

  def path_of(self, name: str) -> pathlib.Path:
    """Returns the file that contains a tensor."""
    return self._stored[name].path

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor without reading it."""
    return self._stored[name].shape

  def __getitem__(self, name: str) -> Callable[[], np.ndarray]:
    """Returns a function that returns the tensor."""
    return self._stored[name].view

  def __iter__(self) -> Iterator[str]:
    return iter(self._stored)

  def __len__(self) -> int:
    return len(self._stored)
