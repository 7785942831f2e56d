"""Prints paired differences between arms, with intervals.

    python experiments/results/ablation_smollm2/differences.py

They are of the loss in the last quarter of 32,768 tokens, in nats a token, by a
bootstrap over documents, then windows, then seeds; `windows.npz` of each stage
has the losses. The last column compares with `dense-8k` on the same tokens,
each given only the 8,192 to 9,215 tokens before it.
"""

import pathlib

import numpy as np

from scca_jax import bootstrap

FOLDER = pathlib.Path(__file__).parent
STAGES = ("patterns", "verdict")
OTHERS = ("dense", "dense-8k", "pose", "longmixed")


def _cell(ours: np.ndarray, theirs: np.ndarray, documents: np.ndarray) -> str:
  found = bootstrap.paired_difference(
    ours[..., None], theirs[..., None], documents
  )
  low, high = found.interval
  return f"{found.mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _print(stage: str) -> None:
  with np.load(FOLDER / stage / "windows.npz") as file:
    windows = {name: file[name].astype(np.float64) for name in file.files}
  documents = windows["documents/32768"]
  quarter = {
    name.removesuffix("/32768"): blocks[..., -4:].mean(axis=-1)
    for name, blocks in windows.items()
    if name.endswith("/32768") and blocks.ndim == 3
  }
  columns = {
    f"minus {name}": quarter[name] for name in OTHERS if name in quarter
  }
  if "dense-8k/short" in windows:
    columns["minus dense-8k, given 8,192"] = windows["dense-8k/short"]
  print(f"| {stage} | {' | '.join(columns)} |")
  print("| --- " * (1 + len(columns)) + "|")
  for arm, ours in quarter.items():
    cells = [_cell(ours, theirs, documents) for theirs in columns.values()]
    print(f"| {arm} | {' | '.join(cells)} |")


def main() -> None:
  """Prints a table for each stage."""
  for stage in STAGES:
    _print(stage)
    print()


if __name__ == "__main__":
  main()
