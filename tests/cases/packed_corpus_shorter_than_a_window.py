"""Packed documents fill a window with padding, so a small corpus is enough."""

import json, os, pathlib, subprocess, sys, tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, os.getcwd())
import numpy as np

work = pathlib.Path(tempfile.mkdtemp())


def verdict(right, line):
  print(("right: " if right else "WRONG: ") + line)
  sys.exit(0 if right else 1)


from scca_jax import batches, token_file, tokenizer

TEXT = ["Nine small boats cross the bay while the wind turns, and nobody on the pier minds the rain. " * 40]


def sentencepiece_folder(name, pieces=330, settings=()):
  path = work / name
  path.mkdir()
  tokenizer.train(TEXT, pieces, path / "tokenizer.model")
  plain = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
  (path / "tokenizer_config.json").write_text(json.dumps(plain | dict(settings)))
  return path


ends = np.array([30, 50, 58])
corpus = token_file.TokenFile(tokens=np.arange(58, dtype=np.uint16), document_ends=ends)
try:
  batch = next(batches.make_batches(corpus, seq_len=64, batch_size=1, seed=0, packing="packed"))
except ValueError as error:
  verdict(False, f"refused: {str(error)[:110]}")
verdict(int(batch["mask"].sum()) == 55, f"{int(batch['mask'].sum())} targets of 55")
