"""Exported GGUF files compute in llama.cpp what they do here.

PyPI's `xllamacpp` brings llama.cpp's library and its server, which gives the
log-probability of every token of the vocabulary: the logits up to a constant.
"""

import dataclasses
import json
import random
import urllib.request

import jax
import jax.numpy as jnp
import model_files
import numpy as np
import pytest

from scca_jax import (
  assets,
  convert,
  generation,
  gguf_vocabulary,
  gguf_writer,
  tokenizer,
)
from scca_jax.rope import RopeScaling

xllamacpp = pytest.importorskip(
  "xllamacpp", reason="libllama is compared where xllamacpp is installed"
)

TEXTS = [
  "It was the best of times, it was the worst of times.",
  "  two spaces,\n\n\ttabs and 12345 digits; naïve café, мир 🙂",
  "",
]


class _Server:
  """A GGUF file in llama.cpp, in float32 wherever that can be chosen."""

  def __init__(self, path):
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 256
    params.n_parallel = 1
    params.cpuparams.n_threads = 1
    params.verbosity = 0
    params.warmup = False
    params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = (
      xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    self._server = xllamacpp.Server(params)

  def _post(self, path, **content):
    request = urllib.request.Request(
      self._server.listening_address + path,
      json.dumps(content).encode(),
      {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
      return json.load(answer)

  def ids(self, text, special=True):
    """Returns the ids of a text, with BOS where the file says so or plain."""
    answer = self._post(
      "/tokenize", content=text, add_special=special, parse_special=False
    )
    return answer["tokens"]

  def text(self, ids):
    return self._post("/detokenize", tokens=ids)["content"]

  def complete(self, prompt, num_tokens, num_probs=0, **settings):
    return self._post(
      "/completion",
      prompt=prompt,
      n_predict=num_tokens,
      n_probs=num_probs,
      temperature=0,
      cache_prompt=False,
      return_tokens=True,
      **settings,
    )

  def log_probs(self, ids, vocab_size):
    """Returns that of every token after `ids`, `[vocab]`."""
    # There are none if the token drawn is the end or half a character: draw
    # another, which leaves the probabilities of all as they were.
    answer = self.complete(ids, 1, vocab_size, logit_bias=[[300, 1000]])
    found = np.full(vocab_size, np.nan, np.float32)
    for token in answer["completion_probabilities"][0]["top_logprobs"]:
      found[token["id"]] = token["logprob"]
    return found


def _log_probs(model, ids):
  logits = model(jnp.asarray([ids]))[0, -1]
  return np.asarray(jax.nn.log_softmax(logits))


def _assert_same_ids(server, words):
  rng = random.Random(0)
  letters = "ab Z0159  \n\t.,'\"-_!éßдц你の🙂\u0301\u00a0\u2003<>|s/▁"
  drawn = [rng.choices(letters, k=rng.randint(1, 40)) for _ in range(100)]
  for text in [*TEXTS, *map("".join, drawn)]:
    assert server.ids(text, special=False) == words.encode(text), text
  for text in TEXTS:
    assert server.ids(text) == [words.bos_id, *words.encode(text)]
    assert server.text(words.encode(text)).lstrip() == text.lstrip()


def _assert_same(server, model, ids, relative):
  for length in (3, len(ids) // 2, len(ids)):
    wanted = _log_probs(model, ids[:length])
    np.testing.assert_allclose(
      server.log_probs(ids[:length], len(wanted)),
      wanted,
      rtol=0,
      atol=relative * np.abs(wanted).max(),
    )


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
  """A random model with a vocabulary of byte pairs."""
  folder = tmp_path_factory.mktemp("libllama") / "hf"
  return model_files.write_byte_level(folder)


def _save(folder, path, model, kind):
  vocabulary = gguf_vocabulary.fields(folder, model.config)
  gguf_writer.save_gguf(model, path, vocabulary=vocabulary, kind=kind)
  return path


def _assert_same_text(server, model, prompt):
  (wanted,) = generation.generate(model, [prompt], max_new_tokens=16)
  found = server.complete(prompt, 16)["tokens"]
  # The token that ends a text is ours to show.
  assert len(found) >= len(wanted) - 1
  assert found == wanted[: len(found)]


def test_sentencepiece_in_float16_is_the_same_in_llama_cpp(tmp_path):
  model = convert.load_model(assets.MODEL)
  words = tokenizer.load(assets.MODEL)
  server = _Server(_save(assets.MODEL, tmp_path / "m.gguf", model, "F16"))
  _assert_same_ids(server, words)
  ids = server.ids(TEXTS[0])
  _assert_same(server, model, ids, 1e-3)
  _assert_same_text(server, model, ids)


@pytest.mark.parametrize(
  ("kind", "tolerance"), [("F32", 1e-5), ("F16", 1e-3), ("Q8_0", 2e-2)]
)
def test_byte_pairs_are_the_same_in_llama_cpp(
  byte_level, tmp_path, kind, tolerance
):
  model = convert.load_model(byte_level)
  path = _save(byte_level, tmp_path / "m.gguf", model, kind)
  server, words = _Server(path), tokenizer.load(byte_level)
  _assert_same_ids(server, words)
  ids = server.ids(TEXTS[0] + TEXTS[1])
  # What is in the file, which in Q8_0 is not what was.
  model = convert.load_model(path)
  _assert_same(server, model, ids, tolerance)
  if kind != "Q8_0":
    _assert_same_text(server, model, ids)


@pytest.mark.parametrize(
  "scaling",
  [
    RopeScaling(kind="linear", factor=4.0),
    RopeScaling(kind="ntk", factor=4.0),
    RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32),
    RopeScaling(
      kind="yarn",
      factor=8.0,
      original_max_position_embeddings=64,
      attention_factor=1.5,
    ),
    RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=64),
  ],
  ids=lambda scaling: f"{scaling.kind}{scaling.factor:g}",
)
def test_rope_scaling_is_the_same_in_llama_cpp(byte_level, tmp_path, scaling):
  config = dataclasses.replace(
    model_files.BYTE_LEVEL, rope_scaling=scaling, initializer_range=0.15
  )
  model = convert.load_model(byte_level, config=config)
  server = _Server(_save(byte_level, tmp_path / "m.gguf", model, "F32"))
  ids = np.random.default_rng(0).integers(3, 340, 100).tolist()
  _assert_same(server, model, ids, 1e-5)
