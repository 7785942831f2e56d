"""Texts are cut only where the parts keep the ids of the whole."""

import json
import re

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from scca_jax import assets, text_borders, token_file, tokenizer
from tests import model_files

LETTERS = [*"ab kK.,'s19\n\té日\u2581<\x00", "<t>"]
TEXT = st.lists(st.sampled_from(LETTERS), max_size=40).map("".join)
WORDS = "a king's book, 1999: the<t> b\u00e9 \u65e5\u65e5 as\n  is k K kb\n" * 9


def _like_llama(model, **steps):
  """Spaces as U+2581, one more in front of a text, and no words."""
  words = tokenizers.Tokenizer(model)
  words.normalizer = steps.get("normalizer")
  words.pre_tokenizer = steps.get("pre_tokenizer")
  return words


def _save(folder, words, trainer=None):
  if trainer is not None:
    words.train_from_iterator(WORDS.split(" "), trainer)
  if folder.name != "no_words":
    words.add_tokens([tokenizers.AddedToken("<t>", normalized=False)])
  folder.mkdir()
  words.save(str(folder / "tokenizer.json"))
  return tokenizer.load(folder)


@pytest.fixture(scope="module")
def all_words(tmp_path_factory):
  """Tokenizers that cut words in several ways, or not at all."""
  root = tmp_path_factory.mktemp("words")
  bpe = trainers.BpeTrainer(vocab_size=90, show_progress=False)
  marked = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
  found = {
    "pieces": tokenizer.load(assets.MODEL),
    "no words": _save(
      root / "no_words",
      _like_llama(
        models.BPE(byte_fallback=True, fuse_unk=True),
        normalizer=normalizers.Sequence(marked),
      ),
      bpe,
    ),
    "metaspace": _save(
      root / "metaspace",
      _like_llama(models.BPE(), pre_tokenizer=pre_tokenizers.Metaspace()),
      bpe,
    ),
    "unigram": _save(
      root / "unigram",
      _like_llama(
        models.Unigram(),
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.Metaspace(),
      ),
      trainers.UnigramTrainer(
        vocab_size=60,
        unk_token="<unk>",
        special_tokens=["<unk>"],
        show_progress=False,
      ),
    ),
    "prefix": _save(
      root / "prefix",
      _like_llama(models.BPE(), pre_tokenizer=pre_tokenizers.ByteLevel()),
      trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
      ),
    ),
  }
  for pre in ("llama-bpe", "smollm", "gpt-2"):
    found[pre] = _save(root / pre, model_files.byte_level(pre))
  return found


@given(text=TEXT)
def test_ids_of_parts_are_those_of_the_whole(all_words, text):
  for name, words in all_words.items():
    place, start = 0, 0
    whole, ids = words.encode(text), []
    while start < len(text):
      place = text_borders.find(text, start + 1, words.border)
      part = text[start:place]
      ids += words.encode_batch([part], go_on=[start > 0])[0]
      start = len(text) if place is None else place
    assert ids == whole, name


def test_there_are_borders_in_prose(all_words):
  for name, words in all_words.items():
    places = [
      place
      for place in range(1, len(WORDS))
      if text_borders.find(WORDS[: place + 1], place, words.border)
    ]
    assert len(places) > 40, name
    # Where a word ends is one of them.
    assert WORDS.index(" book") in places, name


def test_documents_in_pieces_have_the_ids_of_the_whole(
  all_words, tmp_path, monkeypatch
):
  texts = [WORDS, "", "a", " ", WORDS[5:]]
  for name, words in all_words.items():
    expected = token_file.write_token_file(texts, words, tmp_path / "a.bin")
    with monkeypatch.context() as patch:
      patch.setattr(token_file, "_PIECE_CHARACTERS", 30)
      pieces = list(token_file._pieces(texts, words))
      assert len(pieces) > 20
      assert max(len(piece.text) for piece in pieces) < 80
      found = token_file.write_token_file(
        pieces_of(texts), words, tmp_path / "b.bin"
      )
    assert found == expected, name


def pieces_of(texts):
  """The documents as they are read, in parts of 7 characters."""
  for text in texts:
    starts = list(range(0, len(text), 7)) or [0]
    for start in starts:
      yield token_file.Part(text[start : start + 7], start == starts[-1])


def test_a_long_document_without_borders_is_refused(
  all_words, tmp_path, monkeypatch
):
  monkeypatch.setattr(token_file, "_PIECE_CHARACTERS", 50)
  monkeypatch.setattr(token_file, "_MAX_CHARACTERS", 100)
  with pytest.raises(
    ValueError, match="no place to cut a document in 101 char"
  ):
    token_file.write_token_file(
      ["a" * 101], all_words["gpt-2"], tmp_path / "a.bin"
    )
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "change",
  [
    {"normalizer": {"type": "Strip"}},
    {"normalizer": {"type": "Replace", "pattern": {"Regex": "a b"}}},
    {"pre_tokenizer": {"type": "Unheard"}},
    {"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}},
    *(
      {
        "pre_tokenizer": {
          "type": "Split",
          "pattern": {"Regex": expression},
          "behavior": "Isolated",
        }
      }
      for expression in (r"(?<=a) |\S+", r"\w+(?= )", r"^\w+", r"\b", r"a\1")
    ),
    {
      "pre_tokenizer": {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
      }
    },
  ],
)
def test_steps_that_may_look_around_have_no_borders(change):
  content = json.loads(model_files.byte_level("llama-bpe").to_str())
  assert text_borders.of_hugging_face(content, [], _split)
  assert not text_borders.of_hugging_face(content | change, [], _split)


def _split(text):
  return [(m[0], m.span()) for m in re.finditer(r" ?\S+", text)]


def test_words_that_hold_the_space_behind_them_have_no_borders():
  content = json.loads(model_files.byte_level("llama-bpe").to_str())

  def behind(text):
    return [(m[0], m.span()) for m in re.finditer(r"\S+ ?", text)]

  assert not text_borders.of_hugging_face(content, [], behind)


def test_a_prefix_behind_each_added_token_allows_no_cut():
  content = json.loads(model_files.byte_level("llama-bpe").to_str())
  content["normalizer"] = {"type": "Prepend", "prepend": " "}
  assert text_borders.of_hugging_face(content, [], _split)
  token = tokenizers.AddedToken("<x>")
  assert not text_borders.of_hugging_face(content, [token], _split)


def test_added_tokens_that_take_white_space_along_allow_no_cut():
  content = json.loads(model_files.byte_level("llama-bpe").to_str())
  for flag in ("lstrip", "rstrip", "single_word"):
    token = tokenizers.AddedToken("<x>", **{flag: True})
    assert not text_borders.of_hugging_face(content, [token], _split)
