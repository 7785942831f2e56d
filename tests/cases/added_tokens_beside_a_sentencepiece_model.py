"""tokenizer.json has a token that tokenizer.model has not."""

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
from tokenizers import models, normalizers, decoders

path = sentencepiece_folder("both")
inner = tokenizer.load(path).processor
vocabulary = [(inner.id_to_piece(i), inner.get_score(i)) for i in range(inner.get_piece_size())]
made = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
made.add_tokens(["quxbar"])
made.save(str(path / "tokenizer.json"))
(path / "added_tokens.json").write_text(json.dumps({"quxbar": 330}))
try:
  words = tokenizer.load(path)
except ValueError as error:
  verdict("added" in str(error), f"refused: {error}")
ids = words.encode("the quxbar")
verdict(330 in ids and words.vocab_size == 331, f"{len(ids)} ids, none of them the added 330; vocabulary {words.vocab_size} of 331")
