"""The files of a study: one for each pair of an arm, complete or absent.

runs/ARM/RATE-SEED.npz          validation loss, and its looks on the way
runs/ARM/RATE-SEED.params.npz   what was trained, until the arm is scored
runs/ARM/RATE-SEED.scores.npz   test losses and tasks, of the chosen rate
"""

import dataclasses
import io
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.ablation.pairs import Pair
from scca_jax import atomic_file, loss_file

_ABOUT = "about"


@dataclasses.dataclass(frozen=True)
class Store:
  """The files of a study in a folder.

  Attributes:
    folder: The folder.
  """

  folder: pathlib.Path

  def _path(self, arm: str, pair: Pair, kind: str) -> pathlib.Path:
    rate, seed = pair
    return self.folder / "runs" / arm / f"{rate:g}-{seed}{kind}.npz"

  def _write(
    self, path: pathlib.Path, arrays: dict[str, Any], about: dict[str, Any]
  ) -> None:
    content = io.BytesIO()
    everything: Any = arrays | {_ABOUT: np.asarray(json.dumps(about))}
    np.savez_compressed(content, **everything)
    atomic_file.write(path, content.getvalue())

  def _read(self, path: pathlib.Path) -> dict[str, Any] | None:
    if not path.exists():
      return None
    try:
      with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
      return json.loads(str(arrays.pop(_ABOUT))) | arrays
    except loss_file.DAMAGED as error:
      raise ValueError(
        f"{path} is damaged ({error}): remove it to have it made again."
      ) from error

  def trained(self, arm: str, pair: Pair) -> dict[str, Any] | None:
    """Returns the results of a trained pair, None if it is not trained."""
    return self._read(self._path(arm, pair, ""))

  def write_trained(
    self,
    arm: str,
    pair: Pair,
    params: Any,
    arrays: dict[str, np.ndarray],
    about: dict[str, Any],
  ) -> None:
    """Writes a trained pair, parameters first so that both files exist."""
    leaves = jax.device_get(jax.tree.leaves(params))
    content = io.BytesIO()
    # numpy's files have no bfloat16; float32 represents it exactly.
    np.savez(content, *(np.asarray(leaf, np.float32) for leaf in leaves))
    atomic_file.write(self._path(arm, pair, ".params"), content.getvalue())
    self._write(self._path(arm, pair, ""), arrays, about)

  def read_params(self, arm: str, pair: Pair, like: Any) -> Any | None:
    """Returns the parameters of a trained pair; None if they are gone.

    Args:
      arm: The arm.
      pair: Learning rate and seed.
      like: A tree of arrays of the same shapes and dtypes.
    """
    path = self._path(arm, pair, ".params")
    if not path.exists():
      return None
    leaves, treedef = jax.tree.flatten(like)
    with np.load(path) as file:
      read = [
        jnp.asarray(file[f"arr_{i}"], leaf.dtype)
        for i, leaf in enumerate(leaves)
      ]
    return jax.tree.unflatten(treedef, read)

  def remove_params(self, arm: str) -> None:
    """Removes the parameters of an arm."""
    for path in (self.folder / "runs" / arm).glob("*.params.npz"):
      path.unlink()

  def scores(self, arm: str, pair: Pair) -> dict[str, Any] | None:
    """Returns a pair's test losses and task scores, None if there are none."""
    return self._read(self._path(arm, pair, ".scores"))

  def write_scores(
    self,
    arm: str,
    pair: Pair,
    arrays: dict[str, np.ndarray],
    about: dict[str, Any],
  ) -> None:
    """Writes a pair's test losses and task scores."""
    self._write(self._path(arm, pair, ".scores"), arrays, about)
