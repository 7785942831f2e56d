"""Exported GGUF files compute in llama.cpp what they do here.

PyPI's `xllamacpp` brings llama.cpp's library and its server, which gives the
log-probability of every token of the vocabulary: the logits up to a constant.
"""

import dataclasses
import json
import urllib.request

import gguf
import gguf_files
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
  """A GGUF file in llama.cpp, in float32 wherever possible."""

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

  def ids(self, text):
    """Returns the ids of a text, with BOS if the file says so."""
    return self._post("/tokenize", content=text, add_special=True)["tokens"]

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
    """Returns the log-probability of every token after `ids`, `[vocab]`."""
    # There are none if the drawn token is the end or half a character, so draw
    # another, which does not change any probability.
    answer = self.complete(ids, 1, vocab_size, logit_bias=[[300, 1000]])
    found = np.full(vocab_size, np.nan, np.float32)
    for token in answer["completion_probabilities"][0]["top_logprobs"]:
      found[token["id"]] = token["logprob"]
    return found


def _log_probs(model, ids):
  logits = model(jnp.asarray([ids]))[0, -1]
  return np.asarray(jax.nn.log_softmax(logits))


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
  # Whether to show the end token is our choice.
  assert len(found) >= len(wanted) - 1
  assert found == wanted[: len(found)]


def test_sentencepiece_in_float16_is_the_same_in_llama_cpp(tmp_path):
  model = convert.load_model(assets.MODEL)
  words = tokenizer.load(assets.MODEL)
  server = _Server(_save(assets.MODEL, tmp_path / "m.gguf", model, "F16"))
  for text in TEXTS:
    assert server.ids(text) == [words.bos_id, *words.encode(text)]
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
  for text in TEXTS:
    assert server.ids(text) == [words.bos_id, *words.encode(text)]
    assert server.text(words.encode(text)) == text
  ids = server.ids(TEXTS[0] + TEXTS[1])
  # Read back from the file, as Q8_0 rounds.
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


# Files that others wrote, with keys of all kinds.


def _pieces(model, **flags):
  """Adds a SentencePiece vocabulary and a token that is cut out first."""
  from sentencepiece import SentencePieceProcessor

  words = SentencePieceProcessor(model_file=str(model))
  count = words.get_piece_size()
  tokens = [words.id_to_piece(i) for i in range(count)]
  kinds = [6 if words.is_byte(i) else 1 for i in range(count)]

  def add(writer):
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, "old king"])
    writer.add_token_scores([*map(words.get_score, range(count)), 0.0])
    writer.add_token_types([2, 3, 3, *kinds[3:], 4])
    for name, value in flags.items():
      getattr(writer, name)(value)

  return add, count + 1


def _bytes(pre, **flags):
  """Adds a vocabulary of byte pairs."""
  from tokenizers.pre_tokenizers import ByteLevel

  merges = ["t h", "th e", "\u0120 k"]
  tokens = ["<|end|>", "<s>", *sorted(ByteLevel.alphabet())]
  tokens += ["".join(merge.split()) for merge in merges]

  def add(writer):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, "old king"])
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2), 4])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)
    for name, value in flags.items():
      getattr(writer, name)(value)

  return add, len(tokens) + 1


def _write(path, size, *extra, monkeypatch):
  for name in ("token_embd", "output"):
    monkeypatch.setitem(gguf_files.SHAPES, name, (size, gguf_files.HIDDEN))
  tensors = {
    name: value / value.shape[-1] ** 0.5 if value.ndim == 2 else 1 + 0.2 * value
    for name, value in gguf_files.tensors().items()
  }
  return gguf_files.write(
    path,
    {name: value.astype(np.float32) for name, value in tensors.items()},
    extra=lambda writer: [add(writer) for add in extra],
  )


@pytest.mark.parametrize(
  ("kind", "flags"),
  [
    # No token is named: the usual ones.
    ("llama", {}),
    ("llama", {"add_bos_token_id": 5, "add_eos_token_id": 6}),
    ("llama", {"add_add_bos_token": False}),
    ("llama", {"add_add_eos_token": True}),
    ("llama", {"add_add_space_prefix": False}),
    ("llama", {"add_remove_extra_whitespaces": True}),
    ("gpt-2", {}),
    ("gpt-2", {"add_add_bos_token": True}),
    ("llama-bpe", {}),
    ("llama-bpe", {"add_bos_token_id": 1}),
    ("smollm", {"add_bos_token_id": 1, "add_add_eos_token": True}),
  ],
)
def test_the_vocabulary_of_a_file_is_what_it_is_to_llama_cpp(
  tmp_path, monkeypatch, kind, flags
):
  if kind == "llama":
    text = "the king of 1918 and the old queen\n" * 50
    tokenizer.train([text], 300, tmp_path / "t.model")
    add, size = _pieces(tmp_path / "t.model", **flags)
  else:
    add, size = _bytes(kind, **flags)
  path = _write(tmp_path / "m.gguf", size, add, monkeypatch=monkeypatch)
  server, words = _Server(path), tokenizer.load(path)
  for text in (
    "the king",
    "  the  king ",
    " the old king of",
    "old king",
    "a\n\nb 123 4567",
    "Gr\u00fc\u00dfe \U0001f642",
  ):
    assert words.encode_prompts([text]) == [server.ids(text)], text


@pytest.mark.parametrize(
  "keys",
  [
    {"factor": 4.0},
    {"type": "none", "factor": 4.0},
    {"type": "linear", "factor": 2.0, "old factor": 4.0},
    {"old factor": 4.0},
    {"type": "yarn", "factor": 4.0, "original_context_length": 16},
    {"type": "yarn", "factor": 4.0},
    {
      "type": "yarn",
      "factor": 4.0,
      "original_context_length": 16,
      "attn_factor": 0.5,
    },
  ],
)
def test_rope_keys_mean_what_they_mean_to_llama_cpp(
  tmp_path, monkeypatch, keys
):
  def add_rope(writer):
    for name, value in keys.items():
      key = f"llama.rope.scaling.{name}"
      if name == "old factor":
        key = "llama.rope.scale_linear"
      kind = {
        str: gguf.GGUFValueType.STRING,
        int: gguf.GGUFValueType.UINT32,
        float: gguf.GGUFValueType.FLOAT32,
      }[type(value)]
      writer.add_key_value(key, value, kind)

  # Room for the token that is drawn to read the probabilities, 300.
  tokenizer.train(TEXTS * 30, 310, tmp_path / "t.model")
  add, size = _pieces(tmp_path / "t.model")
  path = _write(
    tmp_path / "m.gguf", size, add, add_rope, monkeypatch=monkeypatch
  )
  ids = np.random.default_rng(0).integers(3, size - 1, 50).tolist()
  _assert_same(_Server(path), convert.load_model(path), ids, 1e-5)
