"""Tile sizes of the kernels, including the tuned ones."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """Tile sizes of one kernel.

  Attributes:
    rows: Rows of a tile.
    columns: Columns of a block.
    stages: Blocks of columns in flight.
    warps: Warps per program, if the kernel leaves the choice.
  """

  rows: int = 128
  columns: int = 128
  stages: int = 2
  warps: int = 8


# Found by `experiments.benchmark_attention --tune`, by implementation, GPU,
# dtype, head_dim and kernel.
SIZES_PATH = pathlib.Path(__file__).with_name("block_sizes.json")


def tuned_sizes(
  implementation: str, kind: str, dtype: Any, head_dim: int
) -> dict[str, BlockSizes]:
  """Returns the sizes found by tuning, by kernel; empty for an unknown GPU.

  Args:
    implementation: Name of the back end.
    kind: Name of the GPU.
    dtype: Dtype of the inputs.
    head_dim: Length of a head.
  """
  found = _all_tuned_sizes().get(implementation, {}).get(kind, {})
  found = found.get(np.dtype(dtype).name, {}).get(str(head_dim), {})
  return {kernel: BlockSizes(**sizes) for kernel, sizes in found.items()}


@functools.cache
def _all_tuned_sizes() -> dict[str, Any]:
  return json.loads(SIZES_PATH.read_text(encoding="utf8"))
