"""Checkpoints of a run: training state and data position, through Orbax.

A checkpoint appears under its final name only once it is complete (Orbax writes
to a temporary name and renames), so a run that is killed at any moment resumes
from the last complete one.
"""

import errno
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from scca_jax.training import TrainState

_STATE = "state"
_DATA = "data"


def _to_save(state: TrainState) -> dict[str, Any]:
  """Returns the state as plain dicts and arrays, which later code can read."""
  leaves = jax.tree_util.tree_flatten_with_path(state)[0]
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


class Checkpointer:
  """Saves and restores a run's `TrainState` and data position.

  Saving is asynchronous: `save` returns once the arrays are copied, and an
  error while writing (a full disk) is raised by the next `save` or by `close`.
  """

  def __init__(self, folder: str | pathlib.Path, *, keep: int | None):
    """Opens or makes the folder of checkpoints.

    Args:
      folder: Where they are kept, one folder per step.
      keep: How many of the newest to keep; None keeps all.

    Raises:
      ValueError: `keep` is below 1.
    """
    if keep is not None and keep < 1:
      raise ValueError(f"keep must be at least 1 checkpoint, got {keep}.")
    self._folder = pathlib.Path(folder).absolute()
    self._manager = ocp.CheckpointManager(
      self._folder,
      item_handlers={
        _STATE: ocp.StandardCheckpointHandler(),
        _DATA: ocp.JsonCheckpointHandler(),
      },
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=True,
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
      ),
    )
    # A process may have been killed between saving the last checkpoint and
    # removing the oldest.
    for step in sorted(self._manager.all_steps())[: -keep if keep else 0]:
      self._manager.delete(step)

  def latest_step(self) -> int | None:
    """Returns the step of the newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, data_position: Any) -> None:
    """Starts saving a checkpoint.

    Args:
      step: Steps done.
      state: The training state after them.
      data_position: What the data iterator needs to continue from there, in
        JSON types.

    Raises:
      OSError: An earlier checkpoint could not be written.
    """
    self._guard(
      lambda: self._manager.save(
        step,
        args=ocp.args.Composite(
          **{
            _STATE: ocp.args.StandardSave(_to_save(state)),
            _DATA: ocp.args.JsonSave({"position": data_position}),
          }
        ),
      )
    )

  def restore(self, step: int, like: TrainState) -> tuple[TrainState, Any]:
    """Returns the state and the data position saved after `step` steps.

    Args:
      step: Which checkpoint, from `latest_step`.
      like: A state of the same structure, shapes and dtypes; it says where
        each array goes.

    Raises:
      ValueError: The checkpoint is damaged or belongs to another model.
      OSError: An earlier checkpoint could not be written.
    """
    self.wait()
    abstract = {
      name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
      for name, leaf in _to_save(like).items()
    }
    try:
      # Checked before reading, as Orbax abandons its other reads at the first
      # error.
      saved = self._manager.item_metadata(step)[_STATE]
      for name, leaf in abstract.items():
        if tuple(saved[name].shape) != leaf.shape:
          raise ValueError(
            f"{name} has the shape {saved[name].shape}, not {leaf.shape}"
          )
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          **{
            _STATE: ocp.args.StandardRestore(abstract),
            _DATA: ocp.args.JsonRestore(),
          }
        ),
      )
      saved, position = restored[_STATE], restored[_DATA]["position"]
    except Exception as error:  # Orbax and TensorStore raise many kinds.
      reason = " ".join(str(error).split())[:300] or type(error).__name__
      raise ValueError(
        f"the checkpoint {self._folder / str(step)} cannot be read: it is"
        " damaged or belongs to another model. Remove that folder to resume"
        f" from the one before it, or use another output folder. ({reason})"
      ) from error
    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    state = jax.tree_util.tree_unflatten(
      tree, [saved[jax.tree_util.keystr(path)] for path, _ in leaves]
    )
    return state, position

  def wait(self) -> None:
    """Waits until everything saved is on disk.

    Raises:
      OSError: A checkpoint could not be written.
    """
    self._guard(self._manager.wait_until_finished)

  def close(self) -> None:
    """Waits for pending writes, then releases the folder.

    Raises:
      OSError: A checkpoint could not be written.
    """
    try:
      self.wait()
    finally:
      self._guard(self._manager.close)

  def _guard(self, write) -> None:
    try:
      write()
    except Exception as error:  # Whatever the writing thread raised.
      reason = " ".join(str(error).split())[:300] or type(error).__name__
      full = os.strerror(errno.ENOSPC)
      if full in str(error):  # TensorStore puts it after all of its paths.
        reason = full
      raise OSError(
        f"a checkpoint could not be written to {self._folder}: {reason}."
        " Earlier checkpoints are intact; free some space and start the same"
        " command again."
      ) from error
