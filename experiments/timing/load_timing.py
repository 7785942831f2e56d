"""Loads of `benchmark_load`, each timed in a process of its own."""

import dataclasses
import os
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from scca_jax import convert, gguf_file
from scca_jax.llama import Llama

# By their names, as tables show them.
LABELS = {"read": "plain read of the files", "scca_jax": "scca_jax"}


@dataclasses.dataclass(frozen=True)
class Job:
  """What is loaded.

  Attributes:
    model: Folder or GGUF file.
    dtype: That the weights are held in.
    repeats: Loads of either kind.
  """

  model: pathlib.Path
  dtype: str
  repeats: int

  @property
  def files(self) -> list[pathlib.Path]:
    """The files that hold the weights.

    Raises:
      FileNotFoundError: There are none.
    """
    if self.model.suffix == gguf_file.SUFFIX:
      return [self.model]
    files = sorted(self.model.glob("*.safetensors"))
    if not files:
      raise FileNotFoundError(
        f"{self.model} has no .safetensors: name a folder that has, or have"
        " weights drawn with --random_weights."
      )
    return files

  @property
  def num_bytes(self) -> int:
    """Their size."""
    return sum(path.stat().st_size for path in self.files)


def _forget(files: Sequence[pathlib.Path]) -> None:
  """Has the system drop what it keeps of files in memory."""
  for path in files:
    with path.open("rb") as file:
      # What is not yet on the disk cannot be dropped.
      os.fsync(file.fileno())
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _reader(job: Job) -> Callable[[], Any]:
  buffer = bytearray(2**24)

  def read() -> None:
    for path in job.files:
      with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
          pass

  return read


def _loader(job: Job) -> Callable[[], Any]:
  jax.block_until_ready(jnp.zeros(()))

  def load() -> Any:
    model = convert.load_model(
      job.model, dtype=job.dtype, param_dtype=job.dtype
    )
    return jax.block_until_ready(nnx.state(model, nnx.Param))

  return load


MAKERS = {"read": _reader, "scca_jax": _loader}


def measure(
  name: str, make: Callable[[Job], Callable[[], Any]], job: Job
) -> dict[str, Any]:
  """Returns the seconds of each load, and where.

  Args:
    name: Of the contestant.
    make: Prepares the device, and returns what loads.
    job: What is loaded.

  Raises:
    FileNotFoundError: A file of the model is missing.
    ValueError: The model is damaged.
  """
  load = make(job)
  seconds: dict[str, list[float]] = {"cold": [], "cached": []}
  for _ in range(job.repeats):
    for kind, times in seconds.items():
      if kind == "cold":
        _forget(job.files)
      started = time.perf_counter()
      loaded = load()
      times.append(time.perf_counter() - started)
      # Two do not fit every device.
      del loaded
  row: dict[str, Any] = {"loader": name, "seconds": seconds}
  if name == "scca_jax":
    row |= {
      "device": jax.devices()[0].device_kind,
      "versions": {
        "python": platform.python_version(),
        "jax": jax.__version__,
      },
    }
  return row


def write_random(base: pathlib.Path, folder: pathlib.Path, dtype: str) -> None:
  """Writes a model of the sizes of another with weights that are drawn."""
  config = convert.load_config(base)

  def make() -> Llama:
    return Llama(config, param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))

  graphdef, _ = nnx.split(nnx.eval_shape(make))
  # Under jit they are drawn on the device, each in its own dtype.
  state = jax.jit(lambda: nnx.state(make()))()
  convert.save_model(nnx.merge(graphdef, state), folder, dtype=dtype)
