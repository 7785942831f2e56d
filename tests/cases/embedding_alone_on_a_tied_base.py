"""PEFT trains a copy of the embedding; without ensure_weight_tying the head stays as it was."""

import json, os, pathlib, subprocess, sys, tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, os.getcwd())
import numpy as np

work = pathlib.Path(tempfile.mkdtemp())


def verdict(right, line):
  print(("right: " if right else "WRONG: ") + line)
  sys.exit(0 if right else 1)


import jax.numpy as jnp
from safetensors.numpy import load_file, save_file
from scca_jax import adapters, convert, patterns

VOCAB, HIDDEN, INNER, HEADS, KV, DIM = 61, 32, 48, 4, 2, 8


def weights(layers=2, seed=0, tied=False):
  draw = np.random.default_rng(seed)
  made = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
  if not tied:
    made["lm_head.weight"] = (VOCAB, HIDDEN)
  for i in range(layers):
    at = f"model.layers.{i}."
    made |= {
      at + "input_layernorm.weight": (HIDDEN,),
      at + "post_attention_layernorm.weight": (HIDDEN,),
      at + "self_attn.q_proj.weight": (HEADS * DIM, HIDDEN),
      at + "self_attn.k_proj.weight": (KV * DIM, HIDDEN),
      at + "self_attn.v_proj.weight": (KV * DIM, HIDDEN),
      at + "self_attn.o_proj.weight": (HIDDEN, HEADS * DIM),
      at + "mlp.gate_proj.weight": (INNER, HIDDEN),
      at + "mlp.up_proj.weight": (INNER, HIDDEN),
      at + "mlp.down_proj.weight": (HIDDEN, INNER),
    }
  return {
    name: (np.ones(shape) if len(shape) == 1 else 0.3 * draw.normal(size=shape)).astype(np.float32)
    for name, shape in made.items()
  }


def folder(name, tensors=None, layers=2, **config):
  path = work / name
  path.mkdir()
  save_file(weights(layers) if tensors is None else tensors, path / "model.safetensors", {"format": "pt"})
  settings = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=VOCAB, hidden_size=HIDDEN,
    intermediate_size=INNER, num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=KV,
    head_dim=DIM, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=10000.0, bos_token_id=1, eos_token_id=2,
  )
  (path / "config.json").write_text(json.dumps(settings | config))
  return path


IDS = np.random.default_rng(3).integers(3, VOCAB, (1, 40))


def logits(model, ids=IDS):
  return np.asarray(model(jnp.asarray(ids), patterns=patterns.dense(HEADS)))


def far(a, b):
  return float(np.abs(a - b).max())


def adapter(name, config=(), more=(), rank=4):
  draw = np.random.default_rng(9)
  path = work / name
  path.mkdir()
  tensors = {}
  for i in range(2):
    at = f"base_model.model.model.layers.{i}.self_attn.q_proj."
    tensors[at + "lora_A.weight"] = (0.3 * draw.normal(size=(rank, HIDDEN))).astype(np.float32)
    tensors[at + "lora_B.weight"] = (0.3 * draw.normal(size=(HEADS * DIM, rank))).astype(np.float32)
  save_file(tensors | dict(more), path / "adapter_model.safetensors", {"format": "pt"})
  settings = dict(
    peft_type="LORA", task_type="CAUSAL_LM", r=rank, lora_alpha=8, lora_dropout=0.0, bias="none",
    target_modules=["q_proj"], base_model_name_or_path="base", init_lora_weights=True,
  )
  (path / "adapter_config.json").write_text(json.dumps(settings | dict(config)))
  return path


tied = weights(tied=True)
trained = (0.3 * np.random.default_rng(5).normal(size=(VOCAB, HIDDEN))).astype(np.float32)
base = folder("base", tied, tie_word_embeddings=True)
apart = folder("apart", tied | {"model.embed_tokens.weight": trained, "lm_head.weight": tied["model.embed_tokens.weight"]})
saved = adapter("saved", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": False}, {"base_model.model.model.embed_tokens.weight": trained})
expected = logits(adapters.load_adapter(apart, adapter("plain")))
try:
  found = logits(adapters.load_adapter(base, saved))
except (ValueError, NotImplementedError) as error:
  verdict("tie" in str(error), f"refused: {error}")
verdict(far(found, expected) < 1e-3, f"logits are {far(found, expected):.3g} from PEFT's")
