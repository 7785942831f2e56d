"""Adapters' first matrices and settings."""

import jax
import numpy as np
import pytest

from scca_jax.lora import LoraConfig, init_lora_a


def test_first_matrix_fills_the_bound_of_peft():
  # kaiming_uniform of a [rank, in] weight with a = sqrt(5):
  # sqrt(6 / ((1 + 5) * in)).
  a = np.asarray(init_lora_a(jax.random.key(0), (3, 64, 32)))
  bound = np.sqrt(6 / (6 * 64))
  assert np.abs(a).max() <= bound
  assert np.abs(a).max() > 0.99 * bound
  np.testing.assert_allclose(a.std(), bound / np.sqrt(3), rtol=0.05)
  np.testing.assert_allclose(a.mean(), 0, atol=0.02 * bound)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"rank": 0}, "rank.*0"),
    ({"alpha": 0.0}, "alpha.*0"),
    ({"dropout": 1.0}, "dropout.*1.0"),
    ({"dropout": -0.1}, "dropout.*-0.1"),
    ({"targets": ()}, "targets.*at least one"),
    ({"targets": "q_proj"}, "tuple.*'q_proj'"),
    ({"targets": ("q_proj", "w1")}, "'w1'.*gate_proj"),
  ],
)
def test_impossible_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message) as error:
    LoraConfig(**settings)
  assert "\n" not in str(error.value)
