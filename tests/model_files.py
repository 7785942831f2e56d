"""A small Llama in the files of Hugging Face, for the tests that read them."""

import json

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from scca_jax.llama import Execution

SIZES = {
  "model_type": "llama",
  "vocab_size": 23,
  "hidden_size": 8,
  "intermediate_size": 12,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 16,
  "rms_norm_eps": 1e-5,
  "rope_theta": 5000.0,
}
TOKENS = jnp.arange(10, dtype=jnp.int32)[None, :] % 23


def tensors(tied, dtype=np.float32):
  """Tensors as Hugging Face lays them out, `[out, in]`."""
  shapes = {"model.embed_tokens.weight": (23, 8), "model.norm.weight": (8,)}
  if not tied:
    shapes["lm_head.weight"] = (23, 8)
  for i in range(3):
    shapes |= {
      f"model.layers.{i}.{name}.weight": shape
      for name, shape in {
        "input_layernorm": (8,),
        "post_attention_layernorm": (8,),
        "self_attn.q_proj": (8, 8),
        "self_attn.k_proj": (4, 8),
        "self_attn.v_proj": (4, 8),
        "self_attn.o_proj": (8, 8),
        "mlp.gate_proj": (12, 8),
        "mlp.up_proj": (12, 8),
        "mlp.down_proj": (8, 12),
      }.items()
    }
  rng = np.random.default_rng(0)
  return {
    name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()
  }


def write(folder, tensors, **config):
  folder.mkdir(parents=True, exist_ok=True)
  save_file(tensors, folder / "model.safetensors", {"format": "pt"})
  (folder / "config.json").write_text(json.dumps(SIZES | config))
  return folder


def logits(model):
  return np.asarray(
    model(TOKENS, execution=Execution(implementation="reference"))
  )
