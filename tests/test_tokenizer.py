"""Text to ids and back, with both kinds of tokenizer, and training one."""

import importlib.resources
import json
import lzma

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from scca_jax import tokenizer
from tests import model_files

ASSETS = importlib.resources.files("scca_jax") / "assets"
TEXT = "\n".join(
  f"The {a} {b} of 19{n} went {c} the hill,\n  and they never came back."
  for n, (a, b, c) in enumerate(
    (a, b, c)
    for a in ("old", "young", "other", "quiet")
    for b in ("king", "children", "travellers")
    for c in ("up", "over", "behind")
  )
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
  return tokenizer.train([TEXT], 330, path), path


def _write_hugging_face(folder, **settings):
  """Writes a byte-level tokenizer.json that pads, cuts and adds a BOS."""
  words = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab={c: i for i, c in enumerate(_ALPHABET)}, merges=[]
    )
  )
  words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  words.decoder = tokenizers.decoders.ByteLevel()
  words.add_special_tokens(["<s>", "</s>", "<end>"])
  words.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 256)]
  )
  words.enable_truncation(4)
  words.enable_padding(length=16, pad_id=258, pad_token="<end>")
  folder.mkdir(exist_ok=True)
  (folder / "tokenizer.json").write_text(words.to_str(), encoding="utf8")
  for name, content in settings.items():
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf8")
  return folder


_ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def test_embedded_tokenizer_gives_a_book_back():
  words = tokenizer.load(str(ASSETS / "tiny"))
  assert (words.vocab_size, words.bos_id, words.eos_id) == (4096, 1, 2)
  with lzma.open(str(ASSETS / "books_test.jsonl.xz"), "rt") as file:
    text = json.loads(file.readline())["text"]
  ids = words.encode(text)
  assert words.decode(ids) == text
  assert not {0, 1, 2} & set(ids)
  assert len(text.encode()) / len(ids) > 3


@given(text=st.text())
def test_any_text_comes_back(trained, text):
  words, _ = trained
  expected = text.replace("\u2581", " ")  # SentencePiece's sign for a space.
  assert words.decode(words.encode(text)) == expected


@pytest.mark.parametrize(
  "text", ["", " ", "  a", "a \n\n\tb\r\n", "1918", "é😀\u2028", "a\0b", "</s>"]
)
def test_both_kinds_give_text_back_whatever_their_settings(
  trained, tmp_path, text
):
  words, _ = trained
  hugging_face = tokenizer.load(_write_hugging_face(tmp_path / "model"))
  assert words.decode(words.encode(text)) == text
  assert hugging_face.decode(hugging_face.encode(text)) == text
  # Bytes and nothing else: no BOS, no padding, no cut at four.
  assert len(hugging_face.encode(text)) == len(text.encode())


def test_ids_beyond_the_vocabulary_stand_for_nothing(trained, tmp_path):
  for words in (trained[0], tokenizer.load(_write_hugging_face(tmp_path))):
    ids = words.encode("king")
    beyond = [words.vocab_size, *ids, words.vocab_size + 7]
    assert words.decode(beyond) == "king"


def test_what_looks_like_a_special_token_is_text(trained, tmp_path):
  hugging_face = tokenizer.load(_write_hugging_face(tmp_path / "model"))
  for words in (trained[0], hugging_face):
    ids = words.encode("<s>a</s>")
    assert words.bos_id not in ids
    assert words.eos_id not in ids


def test_many_texts_are_encoded_as_each_alone(trained, tmp_path):
  texts = ["The king", "", "went\nup ", "19"]
  for words in (trained[0], tokenizer.load(_write_hugging_face(tmp_path))):
    assert words.encode_batch(texts) == [words.encode(t) for t in texts]


@given(text=st.text(st.sampled_from("The old king\n\r é日1\u2581")))
def test_lines_of_a_long_text_are_encoded_as_the_whole(trained, text):
  words, _ = trained
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tokenizer, "_LONG_CHARACTERS", 0)
    lines = text.count("\n") + bool(text.rpartition("\n")[2])
    assert len(list(words._cut(text))) == lines
    assert words.encode(text) == words.processor.encode(text)


def test_a_book_is_encoded_as_by_sentencepiece():
  words = tokenizer.load(str(ASSETS / "tiny"))
  with lzma.open(str(ASSETS / "books_test.jsonl.xz"), "rt") as file:
    books = [json.loads(line)["text"] for line in file][:2]
  assert words.encode_batch(books) == words.processor.encode(books)


@pytest.mark.parametrize(
  "settings",
  [
    {"model_type": "unigram"},
    {"normalization_rule_name": "nmt_nfkc"},
    {"remove_extra_whitespaces": True},
    # A line break is unknown, and so becomes one with an unknown neighbour.
    {"byte_fallback": False},
    {"user_defined_symbols": ["g\nb"]},
    {"treat_whitespace_as_suffix": True},
  ],
)
def test_a_text_whose_lines_depend_on_each_other_is_not_cut(
  tmp_path, monkeypatch, settings
):
  monkeypatch.setattr(tokenizer, "_LONG_CHARACTERS", 0)
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXT.split("\n")),
    model_prefix=str(tmp_path / "words"),
    minloglevel=2,
    **{
      "vocab_size": 330,
      "model_type": "bpe",
      "byte_fallback": True,
      "hard_vocab_limit": False,
      "normalization_rule_name": "identity",
      "remove_extra_whitespaces": False,
      **settings,
    },
  )
  words = tokenizer.load(tmp_path / "words.model")
  text = "  The old king\n  Ж\nЖ went\n\n big\nbehind \n"
  assert words.encode(text) == words.processor.encode(text)
  assert len(list(words._cut(text))) == 1


def test_digits_and_line_breaks_are_tokens_of_their_own(trained):
  words, _ = trained
  pieces = [words.decode([i]) for i in range(words.vocab_size)]
  assert "he" in pieces
  assert {"\n", "1", "9"} <= set(pieces)
  for piece in pieces:
    alone = piece.strip(" ")
    assert len(alone) == 1 or not any(c.isdigit() for c in alone)
    assert alone == "\n" or "\n" not in alone


def test_special_ids_are_read_from_the_files_beside(tmp_path):
  def ids(name, **files):
    words = tokenizer.load(_write_hugging_face(tmp_path / name, **files))
    return words.bos_id, words.eos_id

  assert ids("usual names") == (256, 257)
  assert ids("config", config={"eos_token_id": [258, 257]}) == (256, 258)
  assert ids(
    "tokenizer_config",
    tokenizer_config={"bos_token": None, "eos_token": {"content": "<end>"}},
    config={"eos_token_id": 257},
  ) == (256, 258)
  with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
    folder = _write_hugging_face(tmp_path / "damaged")
    (folder / "config.json").write_text("{")
    tokenizer.load(folder)


def test_an_id_far_beyond_the_vocabulary_is_refused(tmp_path):
  words = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
  content = json.loads(words.to_str())
  content["model"]["vocab"]["b"] = 10**8
  (tmp_path / "gap.json").write_text(json.dumps(content))
  with pytest.raises(ValueError, match="id 100,000,000, but only 2 entries"):
    tokenizer.load(tmp_path / "gap.json")


def test_a_tokenizer_without_special_tokens_says_so(tmp_path):
  words = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 7}, []))
  (tmp_path / "plain.json").write_text(words.to_str())
  loaded = tokenizer.load(tmp_path / "plain.json")
  assert (loaded.bos_id, loaded.eos_id) == (None, None)
  assert loaded.vocab_size == 8  # The largest id decides, not their number.


def test_a_folder_and_its_file_are_the_same_tokenizer(trained, tmp_path):
  words, path = trained
  (tmp_path / "tokenizer.model").write_bytes(path.read_bytes())
  for loaded in (tokenizer.load(tmp_path), tokenizer.load(path)):
    assert loaded.name == "tokenizer.model"
    assert loaded.fingerprint == words.fingerprint
  # Where there are both, transformers takes this one.
  _write_hugging_face(tmp_path)
  other = tokenizer.load(tmp_path / "tokenizer.json")
  assert tokenizer.load(tmp_path).fingerprint == other.fingerprint
  assert other.fingerprint != words.fingerprint
  # As in the folders of Llama 3, whose tokenizer.model is of another kind.
  (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
  assert tokenizer.load(tmp_path).name == "tokenizer.json"
  (tmp_path / "tokenizer.json").unlink()
  with pytest.raises(ValueError, match="not a SentencePiece.*tokenizer.json"):
    tokenizer.load(tmp_path)


def _token(content, **flags):
  return {"content": content, "special": False, "normalized": False} | flags


def test_tokens_of_tokenizer_config_are_added_to_tokenizer_json(tmp_path):
  folder = _write_hugging_face(
    tmp_path,
    tokenizer_config={
      "added_tokens_decoder": {
        "259": _token("quxbar"),
        "260": _token("<mask>", lstrip=True),
        "261": _token("ab", single_word=True),
      }
    },
  )
  words = tokenizer.load(folder)
  expected = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  expected.no_truncation()
  expected.no_padding()
  expected.add_tokens(
    [
      tokenizers.AddedToken("quxbar", normalized=False),
      tokenizers.AddedToken("<mask>", normalized=False, lstrip=True),
      tokenizers.AddedToken("ab", normalized=False, single_word=True),
    ]
  )
  text = "a quxbar <mask> ab cab"
  ids = expected.encode(text, add_special_tokens=False).ids
  assert {259, 260, 261} <= set(ids)
  assert words.encode(text) == ids
  assert words.vocab_size == 262
  (folder / "tokenizer_config.json").unlink()
  plain = tokenizer.load(folder)
  assert plain.fingerprint != words.fingerprint
  # What older versions of transformers wrote.
  (folder / "added_tokens.json").write_text('{"quxbar": 259}')
  assert 259 in tokenizer.load(folder).encode(text)


def _sentencepiece_folder(trained, folder, **files):
  folder.mkdir(exist_ok=True)
  (folder / "tokenizer.model").write_bytes(trained[1].read_bytes())
  for name, content in files.items():
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf8")
  return folder


def test_tokens_added_to_a_sentencepiece_model_are_cut_out_first(
  trained, tmp_path
):
  words = tokenizer.load(
    _sentencepiece_folder(
      trained,
      tmp_path,
      added_tokens={"old king": 330, "<|im_end|>": 331},
      tokenizer_config={"eos_token": "<|im_end|>", "legacy": False},
    )
  )
  assert (words.vocab_size, words.eos_id, words.bos_id) == (332, 331, 1)
  plain = trained[0]
  text = "The old king of the hill"
  first, rest = plain.encode("The "), plain.encode("x of the hill")
  cut = words.encode(text)
  assert cut[: len(first) + 1] == [*first, 330]
  assert plain.decode(plain.encode("x") + cut[len(first) + 1 :]) == (
    "x of the hill"
  )
  assert rest[-3:] == cut[-3:]
  assert words.decode(cut) == text
  assert words.decode([*cut, 331]) == text + "<|im_end|>"
  # Special, and so text where a text spells it.
  assert 331 not in words.encode("a<|im_end|>")
  assert words.fingerprint != plain.fingerprint


def test_lines_between_added_tokens_are_encoded_as_the_whole(
  trained, tmp_path, monkeypatch
):
  words = tokenizer.load(
    _sentencepiece_folder(
      trained, tmp_path, added_tokens={"old king": 330, "<|im_end|>": 331}
    )
  )
  texts = ["\nThe old king\nof\n", TEXT, "", "old king", "hill\n the hill"]
  whole = [words.encode(text) for text in texts]
  monkeypatch.setattr(tokenizer, "_LONG_CHARACTERS", 0)
  assert words.encode_batch(texts) == whole
  assert len(list(words._cut(texts[0]))) == 5


@pytest.mark.parametrize(
  ("files", "said"),
  [
    ({"added_tokens": {"a": 5}}, "added token 'a' has the id 5"),
    ({"added_tokens": {"quxbar": 332}}, r"are \[332\].*without a gap"),
    ({"added_tokens": {"quxbar": "330"}}, "added_tokens.json.*damaged"),
    (
      {"tokenizer_config": {"added_tokens_decoder": {"330": "quxbar"}}},
      "tokenizer_config.json.*damaged",
    ),
    (
      {"tokenizer_config": {"added_tokens_decoder": {"330": {"id": 330}}}},
      "tokenizer_config.json.*damaged",
    ),
    (
      {"tokenizer_config": {"add_prefix_space": "no"}},
      "add_prefix_space must be true or false",
    ),
    (
      {"tokenizer_config": {"add_bos_token": "false"}},
      "tokenizer_config.json: add_bos_token must be true or false, got 'false'",
    ),
    (
      {"tokenizer_config": {"bos_token": 5}},
      "tokenizer_config.json: bos_token must be a string, got 5",
    ),
    (
      {"tokenizer_config": {"bos_token": "<|begin|>"}},
      "bos_token is '<|begin|>', which is not in the vocabulary",
    ),
  ],
)
def test_contradictions_beside_a_sentencepiece_model_are_named(
  trained, tmp_path, files, said
):
  folder = _sentencepiece_folder(trained, tmp_path, **files)
  with pytest.raises(ValueError, match=said) as error:
    tokenizer.load(folder)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    (
      {"added_tokens_decoder": {"300": _token("quxbar")}},
      "added token 'quxbar' has the id 300.* but 259",
    ),
    ({"add_prefix_space": True}, "add_prefix_space=True, but tokenizer.json"),
  ],
)
def test_contradictions_beside_tokenizer_json_are_named(
  tmp_path, settings, said
):
  folder = _write_hugging_face(tmp_path, tokenizer_config=settings)
  with pytest.raises(ValueError, match=said):
    tokenizer.load(folder)


def test_missing_tokenizers_are_named(tmp_path):
  with pytest.raises(
    FileNotFoundError, match=r"tokenizer .*absent\.model does not"
  ):
    tokenizer.load(tmp_path / "absent.model")
  with pytest.raises(FileNotFoundError, match="in the folder"):
    tokenizer.load(tmp_path)


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("words.txt", b"words"),
    ("empty.model", b""),
    ("damaged.model", b"\xff\xfe no model"),
    ("cut.model", None),
    ("empty.json", b""),
    ("other.json", b'{"dtype": "uint16"}'),
    ("damaged.json", b"\xff{"),
  ],
)
def test_files_that_are_no_tokenizer_are_named(
  trained, tmp_path, name, content
):
  if content is None:
    content = trained[1].read_bytes()[:-100]
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=name.replace(".", r"\.")):
    tokenizer.load(tmp_path / name)


@pytest.mark.parametrize(
  ("part", "rule"),
  [
    ("normalizer", {"pattern": {"String": "a"}, "content": "aa"}),
    ("normalizer", {"pattern": {"Regex": "x"}, "content": "a"}),
    ("decoder", {"pattern": {"String": "a"}, "content": "aa"}),
  ],
)
def test_rules_that_double_a_text_forty_times_are_refused(tmp_path, part, rule):
  folder = _write_hugging_face(tmp_path / "long")
  path = folder / "tokenizer.json"
  content = json.loads(path.read_text())
  steps = [{"type": "Replace", **rule}] * 40
  content[part] = {"type": "Sequence", f"{part}s": steps}
  path.write_text(json.dumps(content))
  with pytest.raises(ValueError, match=rf"the {part} of .* 1,099,511,627,776"):
    tokenizer.load(path)


def test_a_template_that_repeats_a_text_is_refused(tmp_path):
  path = _write_hugging_face(tmp_path / "long") / "tokenizer.json"
  content = json.loads(path.read_text())
  content["post_processor"]["single"] *= 1000
  path.write_text(json.dumps(content))
  with pytest.raises(ValueError, match=r"the post_processor of .* 2,000 times"):
    tokenizer.load(path)


def test_the_same_text_trains_the_same_tokenizer(trained, tmp_path):
  words, path = trained
  again = tokenizer.train(iter([TEXT]), 330, tmp_path / "again.model")
  assert again.vocab_size == 330
  assert again.fingerprint == words.fingerprint
  assert (tmp_path / "again.model").read_bytes() == path.read_bytes()


def test_text_without_line_breaks_is_learnt_from(tmp_path):
  words = tokenizer.train(["abracadabra" * 2000], 270, tmp_path / "long.model")
  assert len(words.encode("abracadabra")) < 6


@pytest.mark.parametrize(
  ("texts", "vocab_size", "message"),
  [
    ([], 300, "no text"),
    (["", ""], 300, "no text"),
    ([TEXT], 100_000, r"too short for vocab_size=100000.* at most \d+"),
    ([TEXT], 100, "vocab_size=100 is too small"),
    ([TEXT], 0, "vocab_size=0 is too small"),
  ],
)
def test_failed_training_says_why_and_leaves_the_old_file(
  tmp_path, texts, vocab_size, message
):
  output = tmp_path / "words.model"
  output.write_bytes(b"old")
  with pytest.raises(ValueError, match=message):
    tokenizer.train(texts, vocab_size, output)
  assert [p.name for p in tmp_path.iterdir()] == ["words.model"]
  assert output.read_bytes() == b"old"


def test_training_writes_a_model_file_only(tmp_path):
  with pytest.raises(ValueError, match=r"words\.bin"):
    tokenizer.train([TEXT], 330, tmp_path / "words.bin")


def test_a_sample_is_passages_in_their_order_within_its_size():
  texts = [chr(97 + n) * 20_000 for n in range(20)]
  passages = list(tokenizer.sample(texts, 50_000))
  assert passages == list(tokenizer.sample(iter(texts), 50_000))
  assert passages == sorted(passages)
  assert all(any(p in text for text in texts) for p in passages)
  # Full up to a passage, and from all over the texts.
  assert 50_000 - 8192 < sum(map(len, passages)) <= 50_000
  assert passages != list(tokenizer.sample(texts, 50_000, seed=1))
  seen = {
    p[0] for n in range(30) for p in tokenizer.sample(texts, 50_000, seed=n)
  }
  assert len(seen) == 20


def test_a_sample_of_little_text_is_all_of_it():
  texts = ["é" * 10_000, "", "b"]
  assert "".join(tokenizer.sample(texts, 20_001)) == "".join(texts)
  assert list(tokenizer.sample([], 10)) == []
  with pytest.raises(ValueError, match="got 0"):
    list(tokenizer.sample(texts, 0))


@pytest.mark.parametrize(
  "change",
  # The first makes the library panic, the second raise when it is used.
  [{"continuing_subword_prefix": "(?=q).*"}, {"unk_token": "absent"}],
)
def test_a_tokenizer_on_which_the_library_fails_is_named(tmp_path, change):
  content = json.loads(model_files.byte_level("gpt-2").to_str())
  content["model"] |= change
  if "unk_token" in change:
    content["model"] |= {"vocab": {"b": 0}, "merges": []}
    content["pre_tokenizer"] = None
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
    tokenizer.load(tmp_path).encode("a")
