r"""Measures how fast weights of LLaMA2-7B's shape are loaded to the device.

    python -m experiments.results.llama2_7b.load --output=load_h200.json

A model with random weights is written to the folder for temporary files
(TMPDIR). Its files are read plainly, into one buffer, and loaded by
`convert.load_model`, which transposes, stacks by layer and checks for
non-finite values; then, if PyTorch finds a GPU, by safetensors (`load_file`)
and by transformers (`from_pretrained`). Each runs in its own process and loads
alternately *cold*, after the system was asked to forget the files, and
*cached*. The time includes jax's compilation, but not the start of jax or
PyTorch.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.results.llama2_7b import load_peers
from experiments.timing import attention_peers, process
from scca_jax import assets, atomic_file, convert
from scca_jax.llama import Llama


@dataclasses.dataclass(frozen=True)
class Job:
  """The load to measure.

  Attributes:
    folder: Model in Hugging Face layout.
    dtype: Dtype that the weights are held in.
    repeats: Loads of either kind, cold and cached.
  """

  folder: pathlib.Path
  dtype: str
  repeats: int

  @property
  def files(self) -> list[pathlib.Path]:
    """The files that hold the weights."""
    return sorted(self.folder.glob("*.safetensors"))


def write_random(base: pathlib.Path, folder: pathlib.Path, dtype: str) -> None:
  """Writes a model with the sizes of another and random weights."""
  config = convert.load_config(base)

  def make() -> Llama:
    return Llama(config, param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))

  graphdef, _ = nnx.split(nnx.eval_shape(make))
  # Under jit they are drawn on the device, each in its own dtype.
  state = jax.jit(lambda: nnx.state(make()))()
  convert.save_model(nnx.merge(graphdef, state), folder, dtype=dtype)


def _read(files: Sequence[pathlib.Path], dtype: str) -> Callable[[], Any]:
  del dtype
  buffer = bytearray(2**24)

  def read() -> None:
    for path in files:
      with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
          pass

  return read


def _scca_jax(files: Sequence[pathlib.Path], dtype: str) -> Callable[[], Any]:
  jax.block_until_ready(jnp.zeros(()))

  def load() -> Any:
    model = convert.load_model(files[0].parent, dtype=dtype, param_dtype=dtype)
    return jax.block_until_ready(nnx.state(model, nnx.Param))

  return load


LOADERS = {"plain read of the files": _read, "scca_jax": _scca_jax}


def _forget(files: Sequence[pathlib.Path]) -> None:
  """Makes the system drop the files from its cache."""
  for path in files:
    with path.open("rb") as file:
      # Only what has reached the disk can be dropped.
      os.fsync(file.fileno())
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(name: str, job: Job) -> dict[str, Any]:
  """Returns the seconds of each load by one of the loaders, and where."""
  load = (LOADERS | load_peers.LOADERS)[name](job.files, job.dtype)
  seconds: dict[str, list[float]] = {"cold": [], "cached": []}
  for _ in range(job.repeats):
    for kind, times in seconds.items():
      if kind == "cold":
        _forget(job.files)
      started = time.perf_counter()
      loaded = load()
      times.append(time.perf_counter() - started)
      # Not every device has room for two.
      del loaded
  row: dict[str, Any] = {"loader": name, "seconds": seconds}
  if name == "scca_jax":
    row["device"] = jax.devices()[0].device_kind
    row["versions"] = {
      "python": platform.python_version(),
      "jax": jax.__version__,
    }
  return row


def _print_row(row: dict[str, Any], num_bytes: int) -> None:
  cells = []
  for times in row["seconds"].values():
    median = statistics.median(times)
    cells.append(
      f"{median:>7.2f} s ({min(times):.2f} to {max(times):.2f})"
      f" {1e-6 * num_bytes / median:>7,.0f} MB/s"
    )
  print(f"{row['loader']:<24} " + "   ".join(cells), flush=True)


def main() -> None:
  """Measures, prints a table and writes JSON."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--repeats", type=int, default=2)
  parser.add_argument("--output", help="Where to write JSON.")
  args = parser.parse_args()
  problem = attention_peers.problem()
  if problem is not None:
    print(f"{' and '.join(load_peers.LOADERS)} are left out: {problem}")
  loaders = LOADERS if problem else LOADERS | load_peers.LOADERS
  with tempfile.TemporaryDirectory(prefix="scca_jax_") as scratch:
    folder = pathlib.Path(scratch)
    base = assets.SHAPES["llama2-7b"]
    process.run_alone(functools.partial(write_random, base, folder), args.dtype)
    job = Job(folder, args.dtype, args.repeats)
    num_bytes = sum(path.stat().st_size for path in job.files)
    print(
      f"{num_bytes / 1e9:.2f} GB in {len(job.files)} files, held in"
      f" {job.dtype}: median (least to most) of {job.repeats} loads, cold and"
      " cached",
      flush=True,
    )
    rows = []
    for name in loaders:
      rows.append(process.run_alone(functools.partial(measure, name), job))
      _print_row(rows[-1], num_bytes)
  if args.output is not None:
    atomic_file.write_json(
      args.output, {"num_bytes": num_bytes, "dtype": job.dtype, "rows": rows}
    )
    print(f"wrote {args.output}")


if __name__ == "__main__":
  main()
