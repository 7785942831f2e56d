"""A small Llama in the files of Hugging Face, for the tests that read them."""

import json

import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from scca_jax import convert
from scca_jax.llama import Execution, Llama
from scca_jax.llama_config import LlamaConfig

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


LETTERS = (
  "It was the best of times, it was the worst; we'll see 1234 of them."
  " Gr\u00fc\u00dfe, \u043c\u0438\u0440! caf\u00e9   two\n\n\tlines: f(x) = y\n"
)
BYTE_LEVEL = LlamaConfig(
  vocab_size=352,
  hidden_size=64,
  intermediate_size=96,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  context_len=128,
  # Larger than usual, so that logits distinguish tokens.
  initializer_range=0.15,
  bos_token_id=0,
  eos_token_id=(1, 2),
)
_LLAMA_3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(pre="llama-bpe"):
  """A byte-pair vocabulary that splits text like Llama 3, SmolLM or GPT-2."""
  words = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
  steps = {
    "llama-bpe": [pre_tokenizers.Split(tokenizers.Regex(_LLAMA_3), "isolated")],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "gpt-2": [],
  }[pre]
  last = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=pre != "llama-bpe"
  )
  words.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
  words.decoder = decoders.ByteLevel()
  names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
  words.train_from_iterator(
    [LETTERS] * 5,
    trainers.BpeTrainer(
      vocab_size=345,
      special_tokens=names,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  words.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
  words.post_processor = processors.TemplateProcessing(
    single=f"{names[0]} $A", special_tokens=[(names[0], 0)]
  )
  return words


def write_byte_level(folder, pre="llama-bpe", config=BYTE_LEVEL):
  """A random model with such a vocabulary, and seven more embedding rows."""
  folder.mkdir(parents=True, exist_ok=True)
  byte_level(pre).save(str(folder / "tokenizer.json"))
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|end_of_text|>",
    "chat_template": "{{ messages[0]['content'] }}<|eot_id|>",
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  model = Llama(config, rngs=nnx.Rngs(0))
  convert.save_model(model, folder, dtype=jnp.float32)
  return folder
