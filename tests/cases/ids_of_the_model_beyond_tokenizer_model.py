"""Ids of added tokens, which the model has and tokenizer.model has not, are good training data."""

import json, os, pathlib, subprocess, sys, tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, os.getcwd())
import numpy as np

work = pathlib.Path(tempfile.mkdtemp())


def verdict(right, line):
  print(("right: " if right else "WRONG: ") + line)
  sys.exit(0 if right else 1)


from scca_jax import tokenizer

TEXT = ["Nine small boats cross the bay while the wind turns, and nobody on the pier minds the rain. " * 40]


def sentencepiece_folder(name, pieces=330, settings=()):
  path = work / name
  path.mkdir()
  tokenizer.train(TEXT, pieces, path / "tokenizer.model")
  plain = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
  (path / "tokenizer_config.json").write_text(json.dumps(plain | dict(settings)))
  return path


import contextlib
from experiments.shared import resolve

path = sentencepiece_folder("model")
(path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 333}))
ids = np.random.default_rng(0).integers(3, 330, 3000).astype("<u2")
ids[::100] = 331
ids.tofile(work / "train.bin")
(path / "added_tokens.json").write_text(json.dumps({"<a>": 330, "<b>": 331, "<c>": 332}))
try:
  resolve.open_tokens(work / "train.bin", tokenizer.load(path), work)
  verdict(True, "read")
except ValueError as error:
  verdict(False, f"refused, though the model has 333: {str(error)[-90:]}")
