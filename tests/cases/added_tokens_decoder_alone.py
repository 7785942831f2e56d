"""A token stands in tokenizer_config.json only: transformers adds it."""

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


import tokenizers
from tokenizers import decoders, models, pre_tokenizers


def byte_level(path, added=()):
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  made = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
  made.add_tokens(list(added))
  made.save(str(path))
  return made


path = work / "model"
path.mkdir()
byte_level(path / "tokenizer.json")
token = {"content": "quxbar", "special": False, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
(path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {"258": token}}))
try:
  words = tokenizer.load(path)
except ValueError as error:
  verdict("added" in str(error), f"refused: {error}")
ids = words.encode("a quxbar")
verdict(258 in ids, f"{len(ids)} ids, transformers gives 3")
