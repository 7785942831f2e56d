"""Prints paired differences between arms, with intervals.

    python experiments/results/ablation_tiny/differences.py

They are of the loss in the last quarter of 1,024 tokens, in nats a token, by a
bootstrap over documents, then windows, then seeds; `windows.npz` has the
losses.
"""

import pathlib

import numpy as np

from scca_jax import bootstrap

PAIRS = (
  # The paper's order, at its sizes and at equal pairs.
  ("fixed", "s2"),
  ("longmixed", "fixed"),
  ("longmixed", "s2"),
  ("fixed-third", "s2-third"),
  ("longmixed-third", "fixed-third"),
  ("longmixed-third", "s2-third"),
  ("near-sinks-third", "fixed-third"),
  ("near-sinks-third", "longmixed-third"),
  ("near-sinks-third", "sliding-third"),
  ("near-sinks-third", "local-third"),
  # Rope scaling.
  ("dense-yarn4", "dense"),
  ("s2-yarn4", "s2"),
  ("fixed-yarn4", "fixed"),
  ("near-sinks-yarn4", "near-sinks"),
  ("s2-yarn4", "dense-yarn4"),
  ("near-sinks-yarn4", "dense-yarn4"),
  ("fixed-yarn4", "dense-yarn4"),
  ("s2-yarn4", "near-sinks-yarn4"),
  ("s2-yarn4", "fixed-yarn4"),
  # The leak.
  ("s2-leak", "s2"),
  ("fixed-leak", "fixed"),
  ("flow-leak", "flow"),
  # Boundaries, sinks, dense steps and layers, short windows.
  ("flow-local", "flow"),
  ("near-sinks", "near"),
  ("near-sinks-third", "near-third"),
  ("s2-dense-quarter", "s2"),
  ("fixed-dense-quarter", "fixed"),
  ("near-sinks-dense-quarter", "near-sinks"),
  ("s2-dense-layer", "s2"),
  ("fixed-dense-layer", "fixed"),
  ("near-sinks-dense-layer", "near-sinks"),
  ("pose341", "near-sinks-third"),
  ("pose256", "s2-third"),
  ("near-sinks-third", "dense-third-of-steps"),
  ("dense-full", "dense"),
  ("fixed-full", "fixed"),
  ("fixed-embeddings", "fixed"),
  ("fixed-embeddings-slow", "fixed"),
  ("fixed-lora-plus", "fixed"),
  # The same under YaRN, and ntk.
  ("dense-ntk8", "dense-yarn4"),
  ("dense-ntk4", "dense-yarn4"),
  ("longmixed-yarn4", "fixed-yarn4"),
  ("longmixed-yarn4", "longmixed"),
  ("s2-dense-quarter-yarn4", "dense-yarn4"),
  ("s2-dense-quarter-yarn4", "s2-yarn4"),
  ("near-sinks-dense-quarter-yarn4", "near-sinks-yarn4"),
  ("fixed-dense-quarter-yarn4", "fixed-yarn4"),
  ("s2-dense-layer-yarn4", "s2-yarn4"),
  ("near-sinks-dense-layer-yarn4", "near-sinks-yarn4"),
  ("fixed-dense-layer-yarn4", "fixed-yarn4"),
  ("pose256-yarn4", "s2-yarn4"),
  ("pose341-yarn4", "near-sinks-yarn4"),
  ("pose341-yarn4", "dense-yarn4"),
  ("dense-full-yarn4", "dense-yarn4"),
  ("fixed-full-yarn4", "fixed-yarn4"),
  ("fixed-embeddings-yarn4", "fixed-yarn4"),
  ("fixed-embeddings-slow-yarn4", "fixed-yarn4"),
  ("fixed-lora-plus-yarn4", "fixed-yarn4"),
)
FOLDER = pathlib.Path(__file__).parent


def main() -> None:
  """Prints the table."""
  with np.load(FOLDER / "windows.npz") as windows:
    documents = windows["documents/1024"]
    print("| arm | minus | last quarter of 1,024 | first 256 tokens |")
    print("| --- | --- | --- | --- |")
    for ours, theirs in PAIRS:
      cells = []
      for length, blocks in ((1024, slice(-4, None)), (1024, slice(4))):
        found = bootstrap.paired_difference(
          windows[f"{ours}/{length}"].astype(np.float32),
          windows[f"{theirs}/{length}"].astype(np.float32),
          documents,
          positions=blocks,
        )
        low, high = found.interval
        cells.append(f"{found.mean:+.3f} [{low:+.3f}, {high:+.3f}]")
      print(f"| {ours} | {theirs} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
  main()
