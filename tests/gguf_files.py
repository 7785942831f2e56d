"""Writes GGUF files as llama.cpp lays them out, for several tests."""

import gguf
import numpy as np

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCAB = 4, 2, 8, 32, 64, 40
LAYERS = 2
SHAPES = {
  "token_embd": (VOCAB, HIDDEN),
  "output_norm": (HIDDEN,),
  "output": (VOCAB, HIDDEN),
} | {
  f"blk.{i}.{name}": shape
  for i in range(LAYERS)
  for name, shape in {
    "attn_norm": (HIDDEN,),
    "attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
  }.items()
}


def tensors(tied=False):
  rng = np.random.default_rng(0)
  return {
    f"{name}.weight": rng.normal(size=shape).astype(np.float32)
    for name, shape in SHAPES.items()
    if not (tied and name == "output")
  }


def write(
  path, tensors, kind=None, arch="llama", extra=None, theta=5000.0, **settings
):
  """Writes a file; matrices are quantised to `kind`.

  `settings` are those of the writer: byte order, or how to split.
  """
  writer = gguf.GGUFWriter(path, arch, **settings)
  writer.add_context_length(64)
  writer.add_embedding_length(HIDDEN)
  writer.add_block_count(LAYERS)
  writer.add_feed_forward_length(INNER)
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(KV_HEADS)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(theta)
  writer.add_rope_dimension_count(HEAD_DIM)
  if extra is not None:
    extra(writer)
  for name, value in tensors.items():
    if kind is not None and value.ndim == 2:
      writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    else:
      writer.add_tensor(name, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path
