"""Small valid inputs of every command."""

import gzip
import json
import lzma
import pathlib

import numpy as np
import zstandard
from flax import nnx

from scca_jax import (
  adapters,
  convert,
  gguf_vocabulary,
  gguf_writer,
  loss_file,
  patterns,
  token_file,
  tokenizer,
)
from scca_jax.llama import Llama
from scca_jax.lora import LoraConfig
from scca_jax.perplexity import WindowLosses
from tests import model_files

TEXT = model_files.LETTERS * 40
CONFIG = """
from experiments.shared.config import *
def get_config():
  return to_config_dict(FinetuneConfig(training=TrainingConfig(steps=1)))
"""


def write(folder: pathlib.Path) -> None:
  """Writes all inputs of the calls."""
  model_files.write_byte_level(folder / "model")
  (folder / "model" / "generation_config.json").write_text(
    json.dumps({"eos_token_id": [1, 2], "temperature": 0.6})
  )
  config = model_files.BYTE_LEVEL
  model = Llama(config, lora=LoraConfig(rank=2), rngs=nnx.Rngs(1))
  layers = patterns.parse(
    "scca_fixed",
    num_heads=config.num_heads,
    num_kv_heads=config.num_kv_heads,
    num_layers=config.num_layers,
    seq_len=config.context_len,
  )
  adapters.save_adapter(
    model, folder / "adapter", base_model="model", patterns=layers
  )
  gguf_writer.save_gguf(
    convert.load_model(folder / "model"),
    folder / "model.gguf",
    vocabulary=gguf_vocabulary.fields(folder / "model", config),
    kind="F32",
  )
  (folder / "train.txt").write_text(TEXT, encoding="utf8")
  documents = "".join(
    json.dumps({"text": TEXT[i : i + 500], "id": i}) + "\n"
    for i in range(0, 2000, 500)
  )
  (folder / "docs.jsonl").write_text(documents)
  (folder / "prompts.jsonl").write_text('{"prompt": "It was"}\n')
  (folder / "docs.jsonl.gz").write_bytes(gzip.compress(documents.encode()))
  (folder / "docs.jsonl.xz").write_bytes(lzma.compress(documents.encode()))
  (folder / "train.txt.zst").write_bytes(
    zstandard.ZstdCompressor().compress(TEXT.encode())
  )
  token_file.write_token_file(
    [TEXT, TEXT], tokenizer.load(folder / "model"), folder / "tokens.bin"
  )
  tokenizer.train([TEXT], 330, folder / "pieces.model")
  (folder / "config.py").write_text(CONFIG)
  (folder / "run").mkdir()
  (folder / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
  rng = np.random.default_rng(0)
  for name in ("a.npz", "b.npz"):
    _losses(folder / name, rng)


def _losses(path: pathlib.Path, rng: np.random.Generator) -> None:
  windows = WindowLosses(
    losses=rng.uniform(1, 2, (4, 15)).astype(np.float32),
    starts=np.arange(4) * 16,
    firsts=np.ones(4, np.int64),
    begins=np.zeros(4, bool),
    documents=np.zeros(4, np.int64),
  )
  about = {"tokens_sha256": "0", "protocol": "longlora", "stride": 256}
  loss_file.write(path, {16: windows}, about)
