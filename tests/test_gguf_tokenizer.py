"""Vocabularies of GGUF files split text like their own tokenizers."""

import json

import gguf
import gguf_files
import numpy as np
import pytest
import sentencepiece

from scca_jax import convert, tokenizer

TEXTS = [
  "The ship  sailed over a grey sea;\n\n\tnobody saw 1,234 of them.",
  "Grüße, 世界! Привет — déjà vu 🙂",
  "def f(x):\n    return x ** 2  # twice\n",
]


def _sentencepiece_vocabulary(path):
  """Puts the vocabulary of a SentencePiece model in a file, by its pieces."""
  processor = sentencepiece.SentencePieceProcessor(model_file=str(path))

  def extra(writer):
    size = processor.get_piece_size()
    kinds = []
    for i in range(size):
      kind = gguf.TokenType.NORMAL
      if processor.is_unknown(i):
        kind = gguf.TokenType.UNKNOWN
      elif processor.is_control(i):
        kind = gguf.TokenType.CONTROL
      elif processor.is_byte(i):
        kind = gguf.TokenType.BYTE
      kinds.append(kind)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([processor.id_to_piece(i) for i in range(size)])
    writer.add_token_scores([processor.get_score(i) for i in range(size)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

  return extra


def test_a_sentencepiece_vocabulary_cuts_text_as_its_model_does(tmp_path):
  trained = tokenizer.train(TEXTS * 20, 340, tmp_path / "t.model")
  tensors = gguf_files.tensors()
  tensors["token_embd.weight"] = np.zeros((340, gguf_files.HIDDEN), np.float32)
  tensors["output.weight"] = np.zeros((340, gguf_files.HIDDEN), np.float32)
  path = gguf_files.write(
    tmp_path / "m.gguf",
    tensors,
    extra=_sentencepiece_vocabulary(tmp_path / "t.model"),
  )
  words = tokenizer.load(path)
  assert (words.vocab_size, words.bos_id, words.eos_id) == (340, 1, 2)
  assert words.adds_bos
  for text in TEXTS:
    assert words.encode(text) == trained.encode(text)
    assert words.decode(words.encode(text)) == text
  # As a folder of its own.
  convert.copy_tokenizer(path, tmp_path / "out")
  assert tokenizer.load(tmp_path / "out").encode(TEXTS[0]) == trained.encode(
    TEXTS[0]
  )


def test_user_defined_tokens_are_cut_out_first(tmp_path):
  trained = tokenizer.train(TEXTS * 20, 340, tmp_path / "t.model")
  plain = _sentencepiece_vocabulary(tmp_path / "t.model")

  def extra(writer):
    plain(writer)
    for name, value, kind in (
      ("tokens", "grey sea", gguf.GGUFValueType.STRING),
      ("scores", 0.0, gguf.GGUFValueType.FLOAT32),
      ("token_type", gguf.TokenType.USER_DEFINED, gguf.GGUFValueType.INT32),
    ):
      key = f"tokenizer.ggml.{name}"
      values = [*writer.kv_data[0].pop(key).value, value]
      writer.add_key_value(key, values, gguf.GGUFValueType.ARRAY, kind)

  path = gguf_files.write(
    tmp_path / "m.gguf", gguf_files.tensors(), extra=extra
  )
  words = tokenizer.load(path)
  # llama.cpp puts a space in front of what follows, too.
  assert words.encode("a grey sea;") == [
    *trained.encode("a "),
    340,
    *trained.encode(";"),
  ]
  assert words.encode("grey sea") == [340]
  assert words.decode(words.encode("a grey sea;")) == "a grey sea;"


def _byte_pair_vocabulary(pre):
  # Bytes as GPT-2 writes them, some merges, and two special tokens.
  from tokenizers.pre_tokenizers import ByteLevel

  tokens = ["<|end|>", "<|pad|>", *sorted(ByteLevel.alphabet())]
  merges = [("t", "h"), ("th", "e"), ("1", "2"), ("Ġ", "s"), ("Ġ", "Ġ")]
  tokens += ["".join(merge) for merge in merges]

  def extra(writer):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(0)

  return extra, tokens


@pytest.mark.parametrize(
  ("pre", "digits"), [("gpt-2", ["12", "3"]), ("smollm", ["1", "2", "3"])]
)
def test_byte_pairs_are_cut_as_their_name_says(tmp_path, pre, digits):
  extra, tokens = _byte_pair_vocabulary(pre)
  path = gguf_files.write(
    tmp_path / "m.gguf", gguf_files.tensors(), extra=extra
  )
  words = tokenizer.load(path)
  assert (words.bos_id, words.eos_id, words.adds_bos) == (None, 0, False)
  cut = [tokens[i] for i in words.encode("the 123 sea")]
  assert cut == ["the", "Ġ", *digits, "Ġs", "e", "a"]
  for text in TEXTS:
    assert words.decode(words.encode(text)) == text
  # Special tokens that the text spells are text.
  assert 0 not in words.encode("<|end|>")
  convert.copy_tokenizer(path, tmp_path / "out")
  copied = tokenizer.load(tmp_path / "out")
  assert copied.encode(TEXTS[1]) == words.encode(TEXTS[1])
  settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
  assert settings["eos_token"] == "<|end|>"


def test_llama_3_numbers_come_in_threes(tmp_path):
  extra, tokens = _byte_pair_vocabulary("llama-bpe")
  words = tokenizer.load(
    gguf_files.write(tmp_path / "m.gguf", gguf_files.tensors(), extra=extra)
  )
  # llama.cpp starts with BOS unless the file says otherwise.
  assert words.adds_bos
  cut = [tokens[i] for i in words.encode("the 1231 23")]
  assert cut == ["the", "Ġ", "12", "3", "1", "Ġ", "2", "3"]


@pytest.mark.parametrize(
  ("extra", "said"),
  [
    (_byte_pair_vocabulary("other-cut")[0], "'other-cut'"),
    (lambda w: w.add_tokenizer_model("bert"), "'bert'"),
    (lambda w: w.add_tokenizer_model("llama"), "no vocabulary"),
    (
      lambda w: (
        w.add_tokenizer_model("llama"),
        w.add_token_list(["a", "b", "a"]),
      ),
      "token 'a' is in the vocabulary twice",
    ),
    (
      lambda w: (
        _byte_pair_vocabulary("gpt-2")[0](w),
        w.add_array("tokenizer.ggml.suppress_tokens", [3]),
      ),
      "suppress_tokens",
    ),
    (
      lambda w: (
        _byte_pair_vocabulary("gpt-2")[0](w),
        w.add_string("tokenizer.ggml.add_bos_token", "false"),
      ),
      "add_bos_token must be true or false, got 'false'",
    ),
  ],
)
def test_unknown_vocabularies_are_named(tmp_path, extra, said):
  path = gguf_files.write(
    tmp_path / "m.gguf", gguf_files.tensors(), extra=extra
  )
  with pytest.raises(ValueError, match=said):
    tokenizer.load(path)
