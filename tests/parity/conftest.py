"""Random models of transformers, and our parameters under their names.

Nothing here imports torch before a test asks for it; without the extra `parity`
every module in this folder is skipped.
"""

import numpy as np
import pytest
from flax import nnx

# Last part of our paths, and its name in Hugging Face and PEFT, where matrices
# are [out, in].
_LEAVES = {
  "scale": "weight",
  "embedding": "weight",
  "kernel": "weight",
  "lora_a": "lora_A.weight",
  "lora_b": "lora_B.weight",
}


def _by_torch_name(state):
  names = {}
  for path, variable in nnx.to_flat_state(state):
    *modules, leaf = map(str, path)
    array = np.asarray(variable[...])
    if leaf in ("kernel", "lora_a", "lora_b"):
      array = array.swapaxes(-1, -2)
    root = [] if modules[0] == "lm_head" else ["model"]
    if modules[0] != "layers":
      names[".".join([*root, *modules, _LEAVES[leaf]])] = array
      continue
    for i, of_layer in enumerate(array):
      of_path = [*root, "layers", str(i), *modules[1:], _LEAVES[leaf]]
      names[".".join(of_path)] = of_layer
  return names


@pytest.fixture(scope="session", autouse=True)
def one_thread():
  """Keeps PyTorch to one thread.

  The matrices are small, and if other threads, such as JAX's, want the same
  cores, PyTorch's threads wait for each other at every matrix.
  """
  import torch

  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)


@pytest.fixture(scope="session")
def by_torch_name():
  """Gives the arrays of a state as numpy, by the names that PyTorch has."""
  return _by_torch_name


@pytest.fixture
def random_llama():
  """Makes a small `LlamaForCausalLM` whose weights are all random."""
  import torch
  import transformers

  def make(seed=0, **settings):
    config = transformers.LlamaConfig(
      **{
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "attn_implementation": "eager",
        "use_cache": False,
      }
      | settings
    )
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
      for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        # Norms about 1, and matrices that preserve the size of their inputs, so
        # that every part of the model has a visible effect.
        if name.endswith("norm.weight"):
          parameter.copy_(1 + 0.2 * drawn)
        else:
          parameter.copy_(drawn / parameter.shape[-1] ** 0.5)
    return model.eval()

  return make
