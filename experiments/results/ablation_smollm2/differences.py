"""Prints paired differences between arms of the verdict, with intervals.

    python experiments/results/ablation_smollm2/differences.py

They are of the loss in the last quarter of 32,768 tokens, in nats a token, by a
bootstrap over documents, then windows, then seeds; `verdict/windows.npz` has
the losses. The last column compares with `dense-8k` on the same tokens, each
given only the 8,192 to 9,215 tokens before it.
"""

import pathlib

import numpy as np

from scca_jax import bootstrap

FOLDER = pathlib.Path(__file__).parent / "verdict"
OTHERS = ("dense", "pose", "longmixed", "dense-8k")


def _cell(ours: np.ndarray, theirs: np.ndarray, documents: np.ndarray) -> str:
  found = bootstrap.paired_difference(
    ours[..., None], theirs[..., None], documents
  )
  low, high = found.interval
  return f"{found.mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def main() -> None:
  """Prints the table."""
  with np.load(FOLDER / "windows.npz") as file:
    windows = {name: file[name].astype(np.float64) for name in file.files}
  documents = windows["documents/32768"]
  arms = [
    name.removesuffix("/32768")
    for name in windows
    if name.endswith("/32768") and not name.startswith("documents")
  ]
  quarter = {
    arm: windows[f"{arm}/32768"][..., -4:].mean(axis=-1) for arm in arms
  }
  columns = [*OTHERS, "dense-8k, given 8,192"]
  print("| arm | " + " | ".join(f"minus {name}" for name in columns) + " |")
  print("| --- " * (1 + len(columns)) + "|")
  for arm in arms:
    cells = [_cell(quarter[arm], quarter[other], documents) for other in OTHERS]
    cells.append(_cell(quarter[arm], windows["dense-8k/short"], documents))
    print(f"| {arm} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
  main()
