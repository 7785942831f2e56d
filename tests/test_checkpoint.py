"""Checkpoints are complete or absent, and the newest complete one counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scca_jax import checkpoint, training


class _Matrix(nnx.Module):
  """The part of a model that a training state needs."""

  dtype = jnp.dtype("float16")

  def __init__(self, seed, width):
    self.kernel = nnx.Param(jax.random.normal(jax.random.key(seed), (3, width)))


def _state(seed, width=4, **settings):
  rule = training.make_optimizer(training.OptimizerConfig(), 10)
  return training.init(_Matrix(seed, width), nnx.Param, rule, **settings)[1]


def _equal(a, b):
  return all(
    np.array_equal(x, y) and x.dtype == y.dtype
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def _open(tmp_path, keep=2):
  return checkpoint.Checkpointer(tmp_path / "checkpoints", keep=keep)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
  saved = _open(tmp_path)
  assert saved.latest_step() is None
  for step in (3, 5, 9):
    saved.save(step, _state(step), {"next": step, "inner": [1, {"a": 2}]})
  saved.close()
  again = _open(tmp_path)
  assert again.latest_step() == 9
  state, position = again.restore(9, _state(0))
  assert _equal(state, _state(9))
  assert position == {"next": 9, "inner": [1, {"a": 2}]}
  assert _equal(again.restore(5, _state(0))[0], _state(5))
  assert not (tmp_path / "checkpoints" / "3").exists()
  again.close()


def test_moments_come_back_to_the_memory_they_were_in(tmp_path):
  saved = _open(tmp_path)
  saved.save(3, _state(3, offload_optimizer=True), {})
  state, _ = saved.restore(3, _state(0, offload_optimizer=True))
  saved.close()
  assert _equal(state, _state(3))
  kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state.params)}
  moments = [x for x in jax.tree.leaves(state.optimizer) if x.ndim]
  assert {x.sharding.memory_kind for x in moments} == {"pinned_host"}
  assert "pinned_host" not in kinds


def test_a_truncated_checkpoint_is_named(tmp_path):
  saved = _open(tmp_path)
  saved.save(3, _state(3), {})
  saved.save(5, _state(5), {})
  saved.close()
  for file in (tmp_path / "checkpoints" / "5" / "state").rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[:20])
  again = _open(tmp_path)
  with pytest.raises(ValueError, match="checkpoints/5 cannot be read") as e:
    again.restore(5, _state(0))
  assert "\n" not in str(e.value)
  assert _equal(again.restore(3, _state(0))[0], _state(3))
  again.close()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
  saved = _open(tmp_path)
  saved.save(3, _state(3), {})
  saved.wait()
  with pytest.raises(ValueError, match="another model"):
    saved.restore(3, _state(0, width=5))
  saved.close()


def test_a_half_written_checkpoint_is_not_the_latest(tmp_path):
  saved = _open(tmp_path)
  saved.save(3, _state(3), {})
  saved.close()
  # As left by a process that was killed while writing.
  half = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
  (half / "state").mkdir(parents=True)
  again = _open(tmp_path)
  assert again.latest_step() == 3
  again.save(7, _state(7), {})
  again.wait()
  assert again.latest_step() == 7
  again.close()


def test_keep_must_be_a_number_of_checkpoints(tmp_path):
  with pytest.raises(ValueError, match="keep.*0"):
    _open(tmp_path, keep=0)


def test_old_checkpoints_that_a_killed_run_left_are_removed(tmp_path):
  saved = _open(tmp_path, keep=None)
  for step in (1, 2, 3, 4):
    saved.save(step, _state(step), {})
  saved.close()
  again = _open(tmp_path, keep=2)
  assert again.latest_step() == 4
  names = sorted(x.name for x in (tmp_path / "checkpoints").iterdir())
  assert names == ["3", "4"]
  state, _ = again.restore(3, _state(0))
  assert _equal(state, _state(3))


def test_arrays_keep_their_dtype(tmp_path):
  saved = _open(tmp_path)
  state = _state(3)
  halves = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16) if x.ndim else x, state
  )
  saved.save(3, halves, {})
  restored, _ = saved.restore(3, halves)
  assert _equal(restored, halves)
  saved.close()
