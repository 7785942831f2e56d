"""Evaluation tasks: what their prompts hold, checked in the decoded text."""

import re

import pytest
import tokenizers

from scca_jax import assets, tasks, tokenizer

_ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
_FILLER = (
  "The grass is green. The sky is blue. The sun is yellow. Here we go. There"
  " and back again."
)


def _byte_level(folder, *, bos):
  """Returns a tokenizer of bytes, with or without BOS."""
  words = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab={c: i for i, c in enumerate(_ALPHABET)}, merges=[]
    )
  )
  words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  words.decoder = tokenizers.decoders.ByteLevel()
  if bos:
    words.add_special_tokens(["<s>"])
    words.post_processor = tokenizers.processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", 256)]
    )
  path = folder / "tokenizer.json"
  path.write_text(words.to_str(), encoding="utf8")
  return tokenizer.load(path)


@pytest.fixture(scope="module", params=["tiny", "bytes", "bytes_bos"])
def words(request, tmp_path_factory):
  if request.param == "tiny":
    return tokenizer.load(assets.MODEL)
  folder = tmp_path_factory.mktemp("tokenizer")
  return _byte_level(folder, bos=request.param == "bytes_bos")


@pytest.fixture(scope="module")
def tiny():
  return tokenizer.load(assets.MODEL)


def _prompt(words, sample):
  """Returns the text of a prompt, without BOS."""
  ids = sample.prompt_ids
  if words.adds_bos:
    assert ids[0] == words.bos_id
    ids = ids[1:]
  assert words.bos_id not in [*ids, *sample.answer_ids]
  return words.decode(ids)


def _draw(name, words, context_len, num_samples=8, seed=0):
  samples = tasks.TASKS[name].samples(words, context_len, num_samples, seed)
  return list(samples)


def test_passkey_is_in_the_filler_at_its_depth(tiny):
  samples = _draw("passkey", tiny, 400, 40)
  assert sorted(s.depth * 100 for s in samples) == pytest.approx(tasks.DEPTHS)
  for sample in samples:
    instruction, *lines, question = _prompt(tiny, sample).split("\n")
    assert "memorize" in instruction
    assert question == "What is the pass key? The pass key is"
    (needle,) = (line for line in lines if "pass key" in line)
    key = re.fullmatch(
      r"The pass key is (\d{5})\. Remember it\. (\d{5}) is the pass key\.",
      needle,
    )
    assert key and key[1] == key[2] == tiny.decode(sample.answer_ids).strip()
    assert sample.references == (key[1],)
    sizes = []
    place = lines.index(needle)
    for half in (lines[:place], lines[place + 1 :]):
      filler = " ".join(half)
      assert f"{_FILLER} {_FILLER * 50}".startswith(filler[: len(_FILLER)])
      sizes.append(filler.count("."))
    assert sizes[0] == int(sum(sizes) * sample.depth + 1e-9)


def test_ids_are_those_of_the_whole_text(words):
  for name in tasks.TASKS:
    for sample in _draw(name, words, 3000, 2):
      text = _prompt(words, sample)
      answer = words.decode(sample.answer_ids).strip()
      ids = words.encode(f"{text} {answer}")
      bos = [words.bos_id] * words.adds_bos
      assert bos + ids == sample.prompt_ids + sample.answer_ids
      assert bos + words.encode(text) == sample.prompt_ids


def test_samples_fill_the_context_to_the_sentence(words):
  for context_len in (1000, 1001, 1002):
    for sample in _draw("passkey", words, context_len, 5):
      size = len(sample.prompt_ids) + len(sample.answer_ids)
      longest = len(words.encode("There and back again.\n"))
      assert context_len - longest <= size <= context_len


def test_samples_depend_on_their_number_alone(tiny):
  for name in tasks.TASKS:
    many = _draw(name, tiny, 1500, 9)
    _draw(name, tiny, 1400, 3, seed=1)
    assert _draw(name, tiny, 1500, 8)[7] == many[7]
    others = _draw(name, tiny, 1500, 8, seed=1)
    assert len({str(s.prompt_ids) for s in [*many, *others]}) == 17


def test_what_does_not_fit_is_refused(tiny):
  for name in tasks.TASKS:
    with pytest.raises(ValueError, match=f"^{name} needs a context_len of at"):
      tasks.TASKS[name].samples(tiny, 20, 1, 0)


def test_a_wrong_name_or_number_is_one_line(tiny):
  with pytest.raises(ValueError, match="'paskey': did you mean passkey?"):
    tasks.get("paskey")
  with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
    tasks.TASKS["passkey"].samples(tiny, 400, 0, 0)


def test_a_token_across_prompt_and_answer_is_refused(tmp_path):
  merged = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab={c: i for i, c in enumerate([*_ALPHABET, "sĠ"])},
      merges=[("s", "Ġ")],
    )
  )
  merged.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  merged.decoder = tokenizers.decoders.ByteLevel()
  path = tmp_path / "tokenizer.json"
  path.write_text(merged.to_str(), encoding="utf8")
  with pytest.raises(ValueError, match="in one token"):
    tasks.TASKS["passkey"].samples(tokenizer.load(path), 1000, 1, 0)
