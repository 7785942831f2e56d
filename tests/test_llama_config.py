"""Sizes of a model, and the table of its projections."""

import dataclasses

import pytest
from flax import nnx
from tiny_llama import CONFIG

from scca_jax.llama import Llama
from scca_jax.llama_config import PROJECTIONS


def test_the_table_lists_the_matrices_of_a_layer_with_their_shapes():
  model = nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0)))
  found = {}
  for path, leaf in nnx.to_flat_state(nnx.state(model.layers)):
    if path[-1] == "kernel":
      module, name, _ = path
      assert PROJECTIONS[name].module == module
      found[name] = leaf.shape[1:]
  assert found == {
    "q_proj": (16, 24),
    "k_proj": (16, 12),
    "v_proj": (16, 12),
    "o_proj": (24, 16),
    "gate_proj": (16, 24),
    "up_proj": (16, 24),
    "down_proj": (24, 16),
  }
  assert found == {name: CONFIG.projection_shape(name) for name in PROJECTIONS}


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"vocab_size": 0}, "vocab_size.*0"),
    ({"num_layers": -1}, "num_layers.*-1"),
    ({"context_len": 0}, "context_len.*0"),
    ({"num_kv_heads": 3}, "num_heads=4.*num_kv_heads=3"),
    ({"head_dim": 5}, "head_dim must be even, got 5"),
    ({"rope_theta": 1.0}, "rope_theta.*1.0"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
    ({"eos_token_id": 23}, "eos_token_id.*vocab_size=23.*23"),
  ],
)
def test_impossible_sizes_are_refused(settings, message):
  with pytest.raises(ValueError, match=message) as error:
    dataclasses.replace(CONFIG, **settings)
  assert "\n" not in str(error.value)
