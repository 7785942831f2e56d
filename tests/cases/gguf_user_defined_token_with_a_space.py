"""A user-defined token with a space in a SentencePiece GGUF vocabulary."""

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
from scca_jax import convert, patterns

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


import gguf


def gguf_tensors(tensors, layers=2):
  names = dict(
    attn_norm="input_layernorm", attn_q="self_attn.q_proj", attn_k="self_attn.k_proj", attn_v="self_attn.v_proj",
    attn_output="self_attn.o_proj", ffn_norm="post_attention_layernorm", ffn_gate="mlp.gate_proj",
    ffn_up="mlp.up_proj", ffn_down="mlp.down_proj",
  )
  made = {
    "token_embd.weight": tensors["model.embed_tokens.weight"], "output_norm.weight": tensors["model.norm.weight"],
    "output.weight": tensors["lm_head.weight"],
  }
  for i in range(layers):
    for short, long in names.items():
      value = tensors[f"model.layers.{i}.{long}.weight"]
      if short in ("attn_q", "attn_k"):  # llama.cpp rotates neighbours
        heads = HEADS if short == "attn_q" else KV
        value = value.reshape(heads, 2, DIM // 2, -1).swapaxes(1, 2).reshape(value.shape)
      made[f"blk.{i}.{short}.weight"] = np.ascontiguousarray(value)
  return made


def gguf_file(name, extra=None, tensors=None, **writer_settings):
  writer = gguf.GGUFWriter(work / name, "llama", **writer_settings)
  writer.add_context_length(64)
  writer.add_embedding_length(HIDDEN)
  writer.add_block_count(2)
  writer.add_feed_forward_length(INNER)
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(KV)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(10000.0)
  writer.add_rope_dimension_count(DIM)
  if extra is not None:
    extra(writer)
  for key, value in (gguf_tensors(weights()) if tensors is None else tensors).items():
    writer.add_tensor(key, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return work / name


from scca_jax import tokenizer

TEXT = ["Nine small boats cross the bay while the wind turns, and nobody on the pier minds the rain. " * 40]


def sentencepiece_folder(name, pieces=330, settings=()):
  path = work / name
  path.mkdir()
  tokenizer.train(TEXT, pieces, path / "tokenizer.model")
  plain = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
  (path / "tokenizer_config.json").write_text(json.dumps(plain | dict(settings)))
  return path


inner = tokenizer.train(TEXT, 330, work / "t.model").processor
size = inner.get_piece_size()
pieces = [inner.id_to_piece(i) for i in range(size)] + ["qux bar"]
kinds = [2 if inner.is_unknown(i) else 3 if inner.is_control(i) else 6 if inner.is_byte(i) else 1 for i in range(size)] + [4]


def extra(writer):
  writer.add_tokenizer_model("llama")
  writer.add_tokenizer_pre("default")
  writer.add_token_list(pieces)
  writer.add_token_scores([inner.get_score(i) for i in range(size)] + [0.0])
  writer.add_token_types(kinds)
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)


ids = tokenizer.load(gguf_file("s.gguf", extra)).encode("the qux bar")
verdict(size in ids, f"{len(ids)} ids, none of them the token {size}, which llama.cpp cuts out first")
