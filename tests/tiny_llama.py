"""Sizes of a model small enough to compare with equations written out."""

from scca_jax.llama_config import LlamaConfig

CONFIG = LlamaConfig(
  vocab_size=23,
  hidden_size=16,
  intermediate_size=24,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  context_len=16,
)
