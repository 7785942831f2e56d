"""Reads and writes models in Hugging Face's files; reads GGUF.

A model folder holds `config.json` and safetensors, in one file or in shards; a
GGUF file holds a whole model. `config_file` has the sizes of a model, `layout`
the names of its tensors, `reader` and `writer` the rest; the package exports
what reads and writes whole files. PEFT's files are read in `adapters`.
"""

from scca_jax.convert.config_file import load_config, unapplied_generation
from scca_jax.convert.reader import load_model, stored_dtype
from scca_jax.convert.writer import copy_tokenizer, save_model

__all__ = [
  "copy_tokenizer",
  "load_config",
  "load_model",
  "save_model",
  "stored_dtype",
  "unapplied_generation",
]
