"""Evaluation tasks: their prompts, checked in the decoded text."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from scca_jax import (
  assets,
  convert,
  generation,
  patterns,
  sharding,
  tasks,
  tokenizer,
)
from scca_jax.documents import read_documents
from scca_jax.llama import Execution
from scca_jax.tasks import scoring

_ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
_FILLER = (
  "The grass is green. The sky is blue. The sun is yellow. Here we go. There"
  " and back again."
)


def _byte_level(folder, merges, *, bos=False, use_regex=True):
  """Returns a tokenizer of bytes and a few pairs, with or without BOS."""
  tokens = [*_ALPHABET, *(first + second for first, second in merges)]
  words = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab={token: i for i, token in enumerate(tokens)}, merges=merges
    )
  )
  words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=use_regex
  )
  words.decoder = tokenizers.decoders.ByteLevel()
  if bos:
    words.add_special_tokens(["<s>"])
    words.post_processor = tokenizers.processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", len(tokens))]
    )
  path = folder / "tokenizer.json"
  path.write_text(words.to_str(), encoding="utf8")
  return tokenizer.load(path)


# A space is a part of the word behind it, as in GPT-2; line breaks pair up.
_PAIRS = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ġ", "1"), ("Ċ", "Ċ")]


@pytest.fixture(scope="module", params=["tiny", "bytes", "bytes_bos"])
def words(request, tmp_path_factory):
  if request.param == "tiny":
    return tokenizer.load(assets.MODEL)
  folder = tmp_path_factory.mktemp("tokenizer")
  return _byte_level(folder, _PAIRS, bos=request.param == "bytes_bos")


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


_NEEDLE = re.compile(
  r"One of the special magic (numbers|uuids) for ([\w-]+) is: ([\w-]+)\."
)
_SENTENCE_END = re.compile(r"""(?<!\b[A-Z])[.?!]["')]*\s""")
_WORDS = r"[a-z]+-[a-z]+"
_NUMBER = r"[1-9]\d{6}"
_UUID = r"[\da-f]{8}-[\da-f]{4}-4[\da-f]{3}-[89ab][\da-f]{3}-[\da-f]{12}"


def _needles(text):
  """Returns the haystack and (key, value, place) of each needle in it."""
  haystack = text[text.index("\n") + 1 : text.rindex("\n")]
  found = list(_NEEDLE.finditer(haystack))
  return haystack, [(m[2], m[3], m.start()) for m in found]


def _asked(text):
  """Returns the keys that the question names, which it does twice."""
  keys = re.findall(r"magic \w+ for (.+?) mentioned in the provided", text)
  assert len(keys) == 2 and keys[0] == keys[1]
  assert text.endswith(("provided text is", "provided text are"))
  return re.split(r", and |, ", keys[0])


# RULER's table: needles, keys, keys asked for, kinds of keys and of values.
_RULER = {
  "niah_single_1": (1, 1, 1, _WORDS, _NUMBER),
  "niah_single_2": (1, 1, 1, _WORDS, _NUMBER),
  "niah_single_3": (1, 1, 1, _WORDS, _UUID),
  "niah_multikey_1": (4, 4, 1, _WORDS, _NUMBER),
  "niah_multikey_2": (None, None, 1, _WORDS, _NUMBER),
  "niah_multikey_3": (None, None, 1, _UUID, _UUID),
  "niah_multivalue": (4, 1, 1, _WORDS, _NUMBER),
  "niah_multiquery": (4, 4, 4, _WORDS, _NUMBER),
}


@pytest.mark.parametrize("name", _RULER)
def test_needles_are_those_of_ruler(tiny, name):
  num_needles, num_keys, num_asked, key, value = _RULER[name]
  for sample in _draw(name, tiny, 2500, 4):
    text = _prompt(tiny, sample)
    haystack, needles = _needles(text)
    keys = {k for k, _, _ in needles}
    asked = _asked(text)
    assert len(asked) == num_asked and set(asked) <= keys
    for its_key, its_value, _ in needles:
      assert re.fullmatch(key, its_key) and re.fullmatch(value, its_value)
    if num_needles is None:
      # Nothing but needles, each with a key of its own.
      assert re.sub(r"\n+", "", _NEEDLE.sub("", haystack)) == ""
      assert len(keys) == len(needles) > 20
    else:
      assert (len(needles), len(keys)) == (num_needles, num_keys)
    answers = [v for k in asked for its, v, _ in needles if its == k]
    assert list(sample.references) == answers
    answer = tiny.decode(sample.answer_ids).strip()
    assert re.split(r", and |, ", answer) == answers
    if len(answers) == 1:
      assert text.startswith("A special magic")
      place = next(at for k, _, at in needles if k == asked[0])
      lines = haystack.split("\n")
      if len(lines) > 1:
        line = haystack[:place].count("\n")
        assert line == int((len(lines) - 1) * sample.depth + 1e-9)
      else:  # Depth counts sentences.
        before, after = (
          len(_SENTENCE_END.findall(_NEEDLE.sub("", part)))
          for part in (haystack[:place], haystack[place:])
        )
        share = before / (before + after)
        assert share == pytest.approx(sample.depth, abs=0.05)
    else:
      assert text.startswith("Some special magic") and sample.depth is None


def test_needles_lie_at_forty_depths(tiny):
  samples = _draw("niah_multikey_1", tiny, 1200, 40)
  assert sorted(s.depth * 100 for s in samples) == pytest.approx(tasks.DEPTHS)
  # RULER's: round(linspace(0, 100, 40)).
  assert tasks.DEPTHS[:4] == (0, 3, 5, 8) and tasks.DEPTHS[-2:] == (97, 100)
  assert len(set(tasks.DEPTHS)) == 40


def test_haystacks_are_filler_or_test_books(tiny):
  (sample,) = _draw("niah_single_1", tiny, 1000, 1)
  haystack, _ = _needles(_prompt(tiny, sample))
  *lines, last = [x for x in haystack.split("\n") if not _NEEDLE.match(x)]
  assert set(lines) == {_FILLER} and _FILLER.startswith(last)

  test = [" ".join(x.split()) for x in read_documents(assets.BOOKS_TEST)]
  (sample,) = _draw("niah_single_2", tiny, 1000, 1)
  haystack, _ = _needles(_prompt(tiny, sample))
  before, after = re.split(rf" ?{_NEEDLE.pattern} ?", haystack)[::4]
  assert any(f"{before} {after}".strip() in book for book in test)


def test_variables_form_a_chain_of_four_hops(tiny):
  for sample in _draw("vt", tiny, 1500, 5):
    example, text = _prompt(tiny, sample).split("\n\nMemorize")
    for part, letters in ((example, 3), (text, 5)):
      first = re.findall(r"VAR (\w+) = (\d+)\n", part)
      hops = re.findall(r"VAR (\w+) = VAR (\w+)\n", part)
      assert len(first) == 1 and len(hops) == 4
      names = [first[0][0]]
      for name, source in hops:
        assert source == names[-1]
        names.append(name)
      assert len(set(names)) == 5
      assert all(re.fullmatch(f"[A-Z]{{{letters}}}", name) for name in names)
      assert re.fullmatch(r"[1-9]\d{4}", first[0][1])
      assert part.count(first[0][1]) == 3
      noise = re.sub(r"VAR .*\n", "", part.split("\n\n")[1])
      *lines, last, _ = noise.split("\n")
      assert set(lines) == {_FILLER} and _FILLER.startswith(last)
      if part is text:
        assert list(sample.references) == names
        assert tiny.decode(sample.answer_ids).split() == names
        assert part.endswith("they are:")
      else:
        assert part.endswith(f"they are: {' '.join(names)}")
        assert 300 < len(tiny.encode(part)) <= 500


def _split_list(text):
  """Returns the words of a numbered list, whose numbers count from 1."""
  entries = re.findall(r"(\d+)\. ([a-z]+)", text)
  assert " ".join(f"{n}. {w}" for n, w in entries) == text.strip()
  assert [int(n) for n, _ in entries] == list(range(1, len(entries) + 1))
  return [word for _, word in entries]


@pytest.mark.parametrize(
  "context_len, solved, repeats",
  [(2000, (20, 3, 1), (6, 1)), (4096, (40, 10, 3), (30, 3))],
)
def test_ten_words_are_common(tiny, context_len, solved, repeats):
  for sample in _draw("cwe", tiny, context_len, 3):
    texts = _prompt(tiny, sample).split("Below is a numbered list")[1:]
    assert len(texts) == 2
    answers = [
      texts[0].rpartition(":")[2],
      tiny.decode(sample.answer_ids),
    ]
    for text, answer, (often, seldom) in zip(
      texts, answers, (solved[1:], repeats), strict=True
    ):
      words = _split_list(text.split("\n")[1])
      count = collections.Counter(words)
      common = [w for w in dict.fromkeys(words) if count[w] == often]
      assert _split_list(answer) == common and len(common) == 10
      assert {count[w] for w in set(words) - set(common)} == {seldom}
      if text is texts[0]:
        assert len(count) == solved[0]
      else:
        assert list(sample.references) == common


def test_three_coded_words_are_frequent(tiny):
  for sample in _draw("fwe", tiny, 2000, 3):
    text = _prompt(tiny, sample).split("coded words. ")[1].split("\n")[0]
    (noise, dots), *others = collections.Counter(text.split()).most_common()
    assert noise == "..."
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in others)
    assert len(others) < 2000 // 50
    answer = re.split(r", and |, ", tiny.decode(sample.answer_ids).strip())
    assert answer == list(sample.references) == [w for w, _ in others[:3]]
    counts = [n for _, n in others]
    assert counts[:4] == sorted(set(counts[:4]), reverse=True)
    # Zipf's law with the exponent 2: counts go down as one over rank squared.
    for rank, num in enumerate(counts[:5], start=2):
      assert num == pytest.approx(counts[0] * 4 / rank**2, abs=1)
    assert dots == pytest.approx(counts[0] * 4, rel=0.1)


def test_a_segment_comes_twice_at_its_distance(tiny):
  samples = _draw("copy", tiny, 1001, 40)
  for sample in samples:
    assert len(sample.answer_ids) == 120
    ids = sample.prompt_ids + sample.answer_ids
    assert len(ids) == 1001 and ids[0] == 1
    assert ids[-128:] == ids[-128 - sample.distance :][:128]
  found = {sample.distance for sample in samples}
  assert found == {128, 256, 512, 1001 - 1 - 128}
  assert {s.depth for s in samples if s.distance == max(found)} == {0}


def _check_ids(words, name, context_len):
  for sample in _draw(name, words, context_len, 2):
    text = _prompt(words, sample)
    answer = words.decode(sample.answer_ids).strip()
    bos = [words.bos_id] * words.adds_bos
    prompt, joint = words.encode_batch([text, f"{text} {answer}"])
    assert bos + joint == sample.prompt_ids + sample.answer_ids
    assert bos + prompt == sample.prompt_ids


def test_ids_are_those_of_the_whole_text(words):
  for name in set(tasks.TASKS) - {"copy"}:  # Its segments begin anywhere.
    _check_ids(words, name, 3000)


def test_ids_are_right_where_tokens_join_sentences(tmp_path):
  words = _byte_level(tmp_path, [(".", "Ġ")], use_regex=False)
  for name in ("passkey", "niah_single_2", "cwe"):
    _check_ids(words, name, 2000)


def test_samples_fill_the_context_to_the_sentence(words):
  longest = len(words.encode("There and back again.\n"))
  for name in ("passkey", "niah_single_1", "vt"):
    for context_len in (2000, 2001):
      for sample in _draw(name, words, context_len, 2):
        size = len(sample.prompt_ids) + len(sample.answer_ids)
        assert context_len - longest <= size <= context_len
  for name in tasks.TASKS:
    (sample,) = _draw(name, words, 3000, 1)
    size = len(sample.prompt_ids) + len(sample.answer_ids)
    shortest = {"copy": 3000, "cwe": 2998, "fwe": 2997}.get(name, 2500)
    assert shortest <= size <= 3000, name


def test_samples_depend_on_their_number_alone(tiny):
  for name in tasks.TASKS:
    many = _draw(name, tiny, 1500, 9)
    _draw(name, tiny, 1400, 3, seed=1)
    assert _draw(name, tiny, 1500, 8)[7] == many[7]
    others = _draw(name, tiny, 1500, 8, seed=1)
    assert len({str(s.prompt_ids) for s in [*many, *others]}) == 17


def test_samples_are_the_same_on_every_python(tiny):
  """Recorded results name the hash of their prompts, so it must not change.

  First computed with Python 3.11 and NumPy 2.4, and 3.12 and 2.5. If you change
  a prompt on purpose, put the new hash here.
  """
  samples = (_draw(name, tiny, 1500, 8)[7] for name in sorted(tasks.TASKS))
  assert scoring.prompts_sha256(samples) == (
    "04b497d4d07282a687cb2de82106aa5f0af2bcfe7b05f6240194aaf09a8760a3"
  )


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
  words = _byte_level(tmp_path, [("s", "Ġ")], use_regex=False)
  with pytest.raises(ValueError, match="in one token"):
    tasks.TASKS["passkey"].samples(words, 1000, 1, 0)


@pytest.fixture(scope="module")
def model():
  return convert.load_model(assets.MODEL)


DENSE = patterns.dense(8)


@functools.partial(jax.jit, static_argnames="graphdef")
def _logits(state, tokens, graphdef):
  return nnx.merge(graphdef, state)(tokens, patterns=DENSE)


def _by_hand(model, sample, context_len):
  """Returns the answer that greedy decoding gives, and the true one's loss.

  The whole sequence is run for each new token.
  """
  graphdef, state = nnx.split(model)
  num_prompt, size = len(sample.prompt_ids), len(sample.answer_ids)
  ids = np.zeros((1, context_len), np.int32)
  ids[0, :num_prompt] = sample.prompt_ids
  for place in range(num_prompt, num_prompt + size):
    logits = _logits(state, ids, graphdef)[0, place - 1]
    ids[0, place] = int(jnp.argmax(logits))
  greedy = ids[0, num_prompt : num_prompt + size].tolist()
  ids[0, num_prompt : num_prompt + size] = sample.answer_ids
  rows = _logits(state, ids, graphdef)[0, num_prompt - 1 :][:size]
  rows = np.asarray(rows, np.float64)
  rows -= np.log(np.exp(rows).sum(axis=-1, keepdims=True))
  return greedy, -rows[np.arange(size), sample.answer_ids].mean()


def test_scores_are_those_of_greedy_decoding(tiny, model):
  context_len = 160
  drawn = _draw("passkey", tiny, context_len, 5)
  found = [_by_hand(model, sample, context_len) for sample in drawn]
  # Two samples that are right, and one in which the last token is wrong.
  for number, wrong in ((1, 0), (3, 0), (4, 1)):
    answer = list(found[number][0])
    answer[-1] = (answer[-1] + wrong) % model.config.vocab_size
    drawn[number] = dataclasses.replace(drawn[number], answer_ids=answer)
    found[number] = _by_hand(model, drawn[number], context_len)
  right = [
    greedy == sample.answer_ids
    for (greedy, _), sample in zip(found, drawn, strict=True)
  ]
  assert right[1] and right[3] and not right[4]
  # The last batch has a single sample.
  score = tasks.score(model, drawn, context_len=context_len, batch_size=2)
  assert score.accuracy == sum(right) / 5 and score.num_samples == 5
  assert score.answer_loss == pytest.approx(
    np.mean([loss for _, loss in found]), abs=1e-4
  )
  assert [entry["depth"] for entry in score.by_depth] == sorted(
    sample.depth for sample in drawn
  )
  for entry in score.by_depth:
    number = [sample.depth for sample in drawn].index(entry["depth"])
    assert entry["accuracy"] == right[number] and entry["num_samples"] == 1
    assert entry["answer_loss"] == pytest.approx(found[number][1], abs=1e-4)


def test_scores_on_several_devices_are_those_of_one(tiny, model):
  samples = _draw("passkey", tiny, 160, 4)
  expected = tasks.score(model, samples, context_len=160, batch_size=2)
  mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, sequence=2))
  graphdef, state = nnx.split(model)
  placed = nnx.merge(graphdef, sharding.place(state, mesh))
  found = tasks.score(
    placed,
    samples,
    context_len=160,
    batch_size=2,
    execution=Execution(mesh=mesh),
  )
  assert found.answer_loss == pytest.approx(expected.answer_loss, abs=1e-4)
  assert found.by_depth == [
    {**entry, "answer_loss": pytest.approx(entry["answer_loss"], abs=1e-4)}
    for entry in expected.by_depth
  ]


@pytest.mark.parametrize(
  "num_right, num_samples, interval",
  # Newcombe, Statistics in Medicine 17 (1998), table I.
  [
    (81, 263, (0.2553, 0.3662)),
    (15, 148, (0.0624, 0.1605)),
    (0, 20, (0.0, 0.1611)),
    (1, 29, (0.0061, 0.1718)),
  ],
)
def test_interval_is_wilsons(num_right, num_samples, interval):
  found = scoring.wilson_interval(num_right, num_samples)
  assert found == pytest.approx(interval, abs=5e-5)


def test_hash_tells_prompts_apart(tiny):
  samples = _draw("passkey", tiny, 200, 3)
  found = scoring.prompts_sha256(samples)
  assert found == scoring.prompts_sha256(_draw("passkey", tiny, 200, 3))
  assert found != scoring.prompts_sha256(samples[::-1])
  moved = dataclasses.replace(
    samples[0],
    prompt_ids=samples[0].prompt_ids + samples[0].answer_ids[:1],
    answer_ids=samples[0].answer_ids[1:],
  )
  assert found != scoring.prompts_sha256([moved, *samples[1:]])


def test_samples_that_do_not_fit_the_model_are_refused(tiny, model):
  (sample,) = _draw("passkey", tiny, 200, 1)
  for samples, context_len, message in (
    ([], 200, "no samples"),
    ([sample], 100, "more than the context_len of 100"),
    (
      [dataclasses.replace(sample, answer_ids=[5000])],
      200,
      "ids outside the model's vocabulary of 4,096",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      tasks.score(model, samples, context_len=context_len)


def test_references_are_matched_as_in_ruler():
  task = tasks.get("niah_multivalue")
  assert task.match("It is 12, then ABC.", ("12", "abc", "7", "then")) == 0.75


def test_generated_answers_get_the_share_of_their_references(tiny, model):
  task = tasks.get("niah_multivalue")
  samples = _draw("niah_multivalue", tiny, 300, 3)
  written = [
    tiny.decode(ids)
    for ids in generation.generate(
      model,
      [sample.prompt_ids for sample in samples],
      max_new_tokens=task.max_new_tokens,
    )
  ]
  # Of four references, the model writes two, all, and none.
  references = [
    (written[0][5:10], "x" * 99, written[0][:4], "y" * 99),
    (written[1][:8].upper(),) * 4,
    ("z" * 99,) * 4,
  ]
  samples = [
    dataclasses.replace(sample, references=its)
    for sample, its in zip(samples, references, strict=True)
  ]
  credits = tasks.generated_credits(model, task, tiny, samples, batch_size=3)
  assert credits == [0.5, 1.0, 0.0]
  score = tasks.score(
    model, samples, credits=credits, context_len=300, batch_size=3
  )
  assert score.ruler_score == 0.5
  assert score.ruler_interval == scoring.wilson_interval(1.5, 3)


def _no_samples(*args):
  raise AssertionError("samples were made again")


def test_samples_are_made_once(tiny, tmp_path, monkeypatch):
  for name in ("passkey", "vt", "copy"):
    task = tasks.get(name)
    made = _draw(name, tiny, 1000, 5, seed=3)
    assert tasks.load_or_make(tmp_path, task, tiny, 1000, 5, 3) == made
    with monkeypatch.context() as patch:
      patch.setattr(type(task), "draw", _no_samples)
      for num in (5, 2):
        found = tasks.load_or_make(tmp_path, task, tiny, 1000, num, 3)
        assert found == made[:num]
    assert len(tasks.load_or_make(tmp_path, task, tiny, 1000, 7, 3)) == 7
  assert len(list(tmp_path.iterdir())) == 3
  with pytest.raises(ValueError, match="num_samples must be at least 1"):
    tasks.load_or_make(tmp_path, tasks.get("vt"), tiny, 1000, 0, 3)


def test_samples_are_kept_by_all_that_they_follow_from(tiny, tmp_path):
  others = [
    (tasks.get("passkey"), tiny, 400, 0),
    (tasks.get("vt"), tiny, 1000, 0),
    (tasks.get("passkey"), tiny, 500, 0),
    (tasks.get("passkey"), tiny, 400, 1),
    (tasks.get("passkey"), dataclasses.replace(tiny, adds_bos=False), 400, 0),
    (tasks.get("passkey"), _byte_level(tmp_path, _PAIRS), 400, 0),
  ]
  folder = tmp_path / "cache"
  for task, words, context_len, seed in others:
    made = list(task.samples(words, context_len, 2, seed))
    found = tasks.load_or_make(folder, task, words, context_len, 2, seed)
    assert found == made
  assert len(list(folder.iterdir())) == len(others)


@pytest.mark.parametrize("damage", [0, 10, 300, -30])
def test_a_damaged_file_of_samples_is_made_again(tiny, tmp_path, damage):
  task = tasks.get("passkey")
  made = tasks.load_or_make(tmp_path, task, tiny, 400, 2, 0)
  (path,) = tmp_path.iterdir()
  whole = path.read_bytes()
  broken = bytearray(whole)
  broken[damage] ^= 255
  for content in (bytes(broken), whole[:damage]):
    path.write_bytes(content)
    assert tasks.load_or_make(tmp_path, task, tiny, 400, 2, 0) == made
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_only_warns(tiny, tmp_path, caplog):
  (tmp_path / "file").touch()
  task = tasks.get("passkey")
  made = list(task.samples(tiny, 400, 2, 0))
  folder = tmp_path / "file" / "folder"
  assert tasks.load_or_make(folder, task, tiny, 400, 2, 0) == made
  assert "not kept" in caplog.text
