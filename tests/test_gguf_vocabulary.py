"""Tokenizers in GGUF files give the ids of the folders they come from.

`test_libllama` compares with llama.cpp itself.
"""

import dataclasses
import json
import shutil

import gguf_files
import model_files
import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers

from scca_jax import assets, convert, gguf_vocabulary, gguf_writer, tokenizer

TEXTS = [
  "It was the best of times; we'll see 12345 of them.",
  "  two  spaces,\n\n\ttabs; Grüße, мир 🙂 ",
]


def _through_gguf(folder, path, config):
  """Returns the tokenizer of a file that has only that."""
  fields = gguf_vocabulary.fields(folder, config)

  def extra(writer):
    for name, value in fields.items():
      gguf_writer._add(writer, name, value)

  return tokenizer.load(
    gguf_files.write(path, gguf_files.tensors(), extra=extra)
  )


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe"])
def test_byte_pairs_get_the_name_of_how_they_cut(tmp_path, pre):
  folder = model_files.write_byte_level(tmp_path / "hf", pre)
  config = convert.load_config(folder)
  fields = gguf_vocabulary.fields(folder, config)
  assert fields["tokenizer.ggml.pre"] == pre
  assert fields["tokenizer.ggml.add_bos_token"]
  assert fields["tokenizer.ggml.bos_token_id"] == 0
  assert fields["tokenizer.ggml.eos_token_id"] == 1
  assert fields["tokenizer.ggml.eot_token_id"] == 2
  assert fields["tokenizer.chat_template"].endswith("<|eot_id|>")
  kinds = fields["tokenizer.ggml.token_type"]
  words = tokenizer.load(folder)
  # Control, normal, user-defined, and unused up to the rows of the embedding.
  assert kinds[:3] == [3, 3, 3] and kinds[words.vocab_size - 1] == 4
  assert kinds[words.vocab_size :] == [5] * (
    config.vocab_size - words.vocab_size
  )
  back = _through_gguf(folder, tmp_path / "m.gguf", config)
  assert (back.bos_id, back.eos_id, back.adds_bos) == (0, 1, True)
  for text in [*TEXTS, "a <think> b"]:
    assert back.encode(text) == words.encode(text)
    assert back.decode(words.encode(text)) == text


def test_a_sentencepiece_model_keeps_its_scores(tmp_path):
  config = convert.load_config(assets.MODEL)
  fields = gguf_vocabulary.fields(assets.MODEL, config)
  processor = sentencepiece.SentencePieceProcessor(
    model_file=str(assets.MODEL / "tokenizer.model")
  )
  size = processor.get_piece_size()
  assert fields["tokenizer.ggml.scores"] == [
    processor.get_score(i) for i in range(size)
  ]
  assert fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
  back = _through_gguf(assets.MODEL, tmp_path / "m.gguf", config)
  words = tokenizer.load(assets.MODEL)
  assert back.adds_bos
  for text in TEXTS:
    assert back.encode(text) == words.encode(text)


def _as_tokenizer_json(folder, prefix):
  """The embedded vocabulary as Hugging Face converts SentencePiece's."""
  model = sentencepiece_model_pb2.ModelProto()
  model.ParseFromString((assets.MODEL / "tokenizer.model").read_bytes())
  pieces = {piece.piece: i for i, piece in enumerate(model.pieces)}
  scores = {piece.piece: piece.score for piece in model.pieces}
  merges = sorted(
    (-scores[piece], left, piece[len(left) :])
    for piece in pieces
    for left in (piece[:i] for i in range(1, len(piece)))
    if left in pieces and piece[len(left) :] in pieces
  )
  words = tokenizers.Tokenizer(
    models.BPE(
      vocab=pieces,
      merges=[(left, right) for _, left, right in merges],
      unk_token="<unk>",
      byte_fallback=True,
      fuse_unk=True,
    )
  )
  steps = [normalizers.Replace(" ", "▁")]
  if prefix:
    steps.insert(0, normalizers.Prepend("▁"))
  words.normalizer = normalizers.Sequence(steps)
  words.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  )
  words.add_special_tokens(["<unk>", "<s>", "</s>"])
  folder.mkdir()
  words.save(str(folder / "tokenizer.json"))
  return folder


@pytest.mark.parametrize("prefix", [True, False])
def test_a_tokenizer_json_of_pieces_becomes_scores(tmp_path, prefix):
  folder = _as_tokenizer_json(tmp_path / "hf", prefix)
  config = convert.load_config(assets.MODEL)
  fields = gguf_vocabulary.fields(folder, config)
  assert fields["tokenizer.ggml.model"] == "llama"
  assert fields["tokenizer.ggml.add_space_prefix"] == prefix
  back = _through_gguf(folder, tmp_path / "m.gguf", config)
  words = tokenizer.load(folder)
  for text in TEXTS:
    assert back.encode(text) == words.encode(text)


def test_transformers_own_class_for_llama_is_taken(tmp_path):
  folder = tmp_path / "hf"
  folder.mkdir()
  shutil.copy(assets.MODEL / "tokenizer.model", folder)
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False})
  )
  config = convert.load_config(assets.MODEL)
  back = _through_gguf(folder, tmp_path / "m.gguf", config)
  words = tokenizer.load(folder)
  assert back.encode(TEXTS[0]) == words.encode(TEXTS[0])
  # It puts no space in front of a space. llama.cpp does.
  assert len(back.encode(" a")) == 2 and len(words.encode(" a")) == 1


def test_the_tokenizer_of_a_gguf_file_is_kept_as_it_is(tmp_path):
  folder = model_files.write_byte_level(tmp_path / "hf", "smollm")
  config = convert.load_config(folder)
  fields = gguf_vocabulary.fields(folder, config)
  path = tmp_path / "m.gguf"
  gguf_writer.save_gguf(convert.load_model(folder), path, vocabulary=fields)
  assert gguf_vocabulary.fields(path, config) == fields


def _normalises(folder):
  path = folder / "tokenizer.json"
  words = tokenizers.Tokenizer.from_file(str(path))
  words.normalizer = normalizers.NFC()
  words.save(str(path))


def _cuts_otherwise(folder):
  path = folder / "tokenizer.json"
  words = tokenizers.Tokenizer.from_file(str(path))
  words.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Digits(individual_digits=False),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True),
    ]
  )
  words.save(str(path))


def _is_of_words(folder):
  words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
  words.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (_normalises, "no name for the way it splits"),
    (_cuts_otherwise, "no name for the way it splits"),
    (_is_of_words, "no WordLevel vocabulary"),
  ],
)
def test_what_llama_cpp_lacks_is_refused(tmp_path, change, said):
  folder = model_files.write_byte_level(tmp_path / "hf")
  config = convert.load_config(folder)
  change(folder)
  with pytest.raises(ValueError, match=f"tokenizer.json.*{said}"):
    gguf_vocabulary.fields(folder, config)


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path):
  folder = model_files.write_byte_level(tmp_path / "hf")
  config = dataclasses.replace(convert.load_config(folder), vocab_size=300)
  with pytest.raises(ValueError, match="321 tokens, more than the 300"):
    gguf_vocabulary.fields(folder, config)


def test_the_default_of_several_chat_templates_is_kept(tmp_path):
  folder = model_files.write_byte_level(tmp_path / "hf")
  path = folder / "tokenizer_config.json"
  settings = json.loads(path.read_text())
  settings["chat_template"] = [
    {"name": "tools", "template": "with tools"},
    {"name": "default", "template": "without"},
  ]
  path.write_text(json.dumps(settings))
  config = convert.load_config(folder)
  fields = gguf_vocabulary.fields(folder, config)
  assert fields["tokenizer.chat_template"] == "without"
  (folder / "chat_template.jinja").write_text("of its own")
  fields = gguf_vocabulary.fields(folder, config)
  assert fields["tokenizer.chat_template"] == "of its own"
