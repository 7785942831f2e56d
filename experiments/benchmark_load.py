r"""Measures how fast the weights of a model come to the device.

    python -m experiments.benchmark_load --random_weights \
      --config=configs/llama2_7b_8k_h200.py --output=load.json

The files of the model are read plainly, into one buffer, and loaded by
`convert.load_model` as a run of the configuration loads them: transposed,
stacked by layer and checked for what is not finite. Beside it, where PyTorch
finds a GPU, load safetensors (`load_file`, a tensor each) and transformers
(`from_pretrained`).

Each has a process of its own and loads by turns *cold*, after the system was
asked to forget the files, and *cached*. What jax compiles on the way counts,
the start of jax or PyTorch does not.

With --random_weights a model of the configured shape is drawn and written to
the system's folder for temporary files (TMPDIR), and removed at the end. Where
that lies in memory, nothing is cold.
"""

import contextlib
import dataclasses
import functools
import pathlib
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

from absl import flags

from experiments.shared import cli, resolve
from experiments.shared.config import FinetuneConfig, from_config_dict
from experiments.timing import attention_peers, load_peers, load_timing
from experiments.timing.step_timing import run_alone
from scca_jax import convert

_CONFIGS = pathlib.Path(__file__).parent.parent / "configs"

_LABELS = load_timing.LABELS | load_peers.LABELS
_MAKERS = load_timing.MAKERS | load_peers.MAKERS

_CONFIG = cli.define_config(_CONFIGS / "tiny.py")
flags.declare_key_flag("config")
_MODEL = flags.DEFINE_string(
  "model", None, "Model or folder with its config; overrides config.model."
)
_RANDOM_WEIGHTS = flags.DEFINE_boolean(
  "random_weights",
  False,
  "Draw the weights and write them; of the model config.json is read alone.",
)
_PEER_NAMES = flags.DEFINE_list(
  "peers",
  list(load_peers.LABELS),
  f"Any of {', '.join(load_peers.LABELS)}; they need PyTorch and its GPU.",
)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Loads of either kind.")
_OUTPUT = flags.DEFINE_string("output", None, "Where to write JSON.")


def _print_row(row: dict[str, Any], num_bytes: int) -> None:
  cells = []
  for times in row["seconds"].values():
    median = statistics.median(times)
    cells.append(
      f"{median:>7.2f} s ({min(times):.2f} to {max(times):.2f})"
      f" {1e-6 * num_bytes / median:>7,.0f} MB/s"
    )
  print(f"{_LABELS[row['loader']]:<24} " + "   ".join(cells), flush=True)


@contextlib.contextmanager
def _prepared(run: FinetuneConfig) -> Iterator[load_timing.Job]:
  """Gives what is to be loaded; what is drawn for it is removed behind it."""
  model = pathlib.Path(resolve.model_path(run.model))
  dtype = run.training.param_dtype
  convert.load_config(model)
  if not _RANDOM_WEIGHTS.value:
    yield load_timing.Job(model, dtype, _REPEATS.value)
    return
  with tempfile.TemporaryDirectory(prefix="scca_jax_") as scratch:
    folder = pathlib.Path(scratch)
    run_alone(functools.partial(load_timing.write_random, model, folder), dtype)
    yield load_timing.Job(folder, dtype, _REPEATS.value)


def main() -> None:
  """Measures, prints a table and writes JSON.

  Raises:
    FileNotFoundError: A file of the model is missing.
    OSError: Random weights cannot be written.
    ValueError: A flag or setting is out of range, or the model is damaged.
  """
  run = from_config_dict(FinetuneConfig, cli.read_config(_CONFIG))
  if _MODEL.value is not None:
    run = dataclasses.replace(run, model=_MODEL.value)
  if _REPEATS.value < 1:
    raise ValueError(f"--repeats must be at least 1, got {_REPEATS.value}.")
  for name in _PEER_NAMES.value:
    if name not in load_peers.LABELS:
      raise ValueError(
        f"unknown peer {name!r}: use any of {', '.join(load_peers.LABELS)}."
      )
  names = [*load_timing.LABELS, *_PEER_NAMES.value]
  problem = attention_peers.problem() if _PEER_NAMES.value else None
  if problem is not None:
    print(f"{', '.join(_PEER_NAMES.value)} are left out: {problem}")
    names = list(load_timing.LABELS)
  with _prepared(run) as job:
    print(
      f"{job.num_bytes / 1e9:.2f} GB in {len(job.files)} files, held in"
      f" {job.dtype}: median (least to most) of {job.repeats} loads, cold and"
      " cached",
      flush=True,
    )
    rows = []
    for name in names:
      measure = functools.partial(load_timing.measure, name, _MAKERS[name])
      rows.append(run_alone(measure, job))
      _print_row(rows[-1], job.num_bytes)
    if _OUTPUT.value is not None:
      content = {
        "num_bytes": job.num_bytes,
        "dtype": job.dtype,
        "random_weights": _RANDOM_WEIGHTS.value,
        "rows": rows,
      }
      cli.write_json(_OUTPUT.value, content)
      print(f"wrote {_OUTPUT.value}")


if __name__ == "__main__":
  cli.run(main)
