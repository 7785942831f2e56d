"""Compares prompts with those of lm-evaluation-harness for RULER.

Random parts are masked; the rest must be the same text.
"""

import collections
import json
import random
import re
import types

import numpy as np
import pytest

_WHY = "needs pip install 'lm_eval[ruler]'"
pytest.importorskip("lm_eval", reason=_WHY)
pytest.importorskip("wonderwords", reason=_WHY)
nltk = pytest.importorskip("nltk", reason=_WHY)

from scca_jax import assets, tasks, tokenizer  # noqa: E402

_FILLER = (
  "The grass is green. The sky is blue. The sun is yellow. Here we go. There"
  " and back again."
)
_CONTEXT_LEN = 2500


@pytest.fixture(autouse=True)
def _same_draws():
  """Seeds what the harness draws: two equal names of variables end it."""
  random.seed(0)
  np.random.seed(0)


@pytest.fixture(scope="module")
def ruler():
  """The harness's modules, prevented from downloading anything."""
  patch = pytest.MonkeyPatch()
  patch.setattr(nltk, "download", lambda name: None)
  from lm_eval.tasks.ruler import (
    cwe_utils,
    fwe_utils,
    niah_utils,
    prepare_niah,
    qa_utils,
    vt_utils,
  )

  # It would download its sentence splitter.
  patch.setattr(
    prepare_niah,
    "cached_sent_tokenize",
    lambda text: re.findall(r"[^.]+\.", text),
  )
  yield types.SimpleNamespace(
    cwe=cwe_utils,
    fwe=fwe_utils,
    needles=prepare_niah,
    template=niah_utils.TEMPLATE,
    qa=qa_utils,
    vt=vt_utils,
  )
  patch.undo()


@pytest.fixture(scope="module")
def words():
  return tokenizer.load(assets.MODEL)


def _ours(task, words, context_len=_CONTEXT_LEN):
  """Returns a prompt's text, and the references."""
  (sample,) = task.samples(words, context_len, 1, 0)
  return words.decode(sample.prompt_ids), list(sample.references)


def _theirs(sample):
  return f"{sample['input']} {sample['gen_prefix']}", sample["outputs"]


def _count(text):
  """A tokenizer for the harness, which counts."""
  return types.SimpleNamespace(input_ids=re.findall(r"\w+|\W", text))


def _masked_needles(text):
  """Returns instruction, question, kinds of lines, and number of needles."""
  text = re.sub(r"[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}", "UUID", text)
  text = re.sub(r"\b\d{7}\b", "NUMBER", text)
  text = re.sub(r"(?<= for )\S+(?= is: )", "KEY", text)
  text = re.sub(
    r"(?<= for )(.+?)(?= mentioned)",
    lambda found: f"{len(re.split(', and |, ', found[1]))} KEYS",
    text,
  )
  instruction, *lines, question = text.split("\n")
  needles = re.findall(r"One of the special magic .*? is: \w+\.", text)
  # The last line of ours may hold less than all of the filler.
  kinds = {
    line for line in lines if line == _FILLER or not _FILLER.startswith(line)
  }
  return instruction, question, kinds, needles


@pytest.mark.parametrize(
  ("name", "haystack", "settings"),
  [
    ("niah_single_1", "repeat", {}),
    ("niah_single_2", "essay", {}),
    ("niah_single_3", "essay", {"type_needle_v": "uuids"}),
    ("niah_multikey_1", "essay", {"num_needle_k": 4}),
    ("niah_multikey_2", "needle", {}),
    (
      "niah_multikey_3",
      "needle",
      {"type_needle_k": "uuids", "type_needle_v": "uuids"},
    ),
    ("niah_multivalue", "essay", {"num_needle_v": 4}),
    ("niah_multiquery", "essay", {"num_needle_q": 4}),
  ],
)
def test_needles(ruler, words, name, haystack, settings):
  settings = {
    "type_needle_k": "words",
    "type_needle_v": "numbers",
    "type_haystack": haystack,
  } | settings
  essay = "It was a cold day. Nobody came. The door was open. ".split() * 40
  hay = essay if haystack == "essay" else ruler.needles.get_haystack(haystack)
  (sample,) = ruler.needles.generate_samples(
    hay,
    _count,
    max_seq_length=2000,
    template=ruler.template,
    num_samples=1,
    **settings,
  )
  ours, references = _ours(tasks.get(name), words)
  theirs, outputs = _theirs(sample)
  found, expected = _masked_needles(ours), _masked_needles(theirs)
  assert found[:2] == expected[:2]
  assert len(references) == len(outputs)
  if haystack == "essay":
    assert found[3] == expected[3]  # As many, and nothing else in the text.
  else:
    assert found[2] == expected[2]
    assert set(found[3]) == set(expected[3])


def _masked_chain(text):
  """Returns what is left without filler, with names and numbers masked."""
  for sentence in re.findall(r"[^.]+\.", _FILLER):
    text = text.replace(sentence.strip(), "")
  text = text.replace("assgined", "assigned")  # RULER's slip.
  text = re.sub(r"\b[A-Z]{5}\b", "NAME", text)
  text = re.sub(r"\b(?!VAR\b)[A-Z]{3}\b", "name", text)
  return " ".join(re.sub(r"\d{5}", "NUMBER", text).split())


def test_variable_tracking(ruler, words):
  example = ruler.vt.sys_vartrack_w_noise_random(
    _count, num_samples=1, max_seq_length=500, incremental=5
  )[0]
  (sample,) = ruler.vt.sys_vartrack_w_noise_random(
    _count, num_samples=1, max_seq_length=2500, icl_example=example
  )
  ours, references = _ours(tasks.get("vt"), words)
  theirs, outputs = _theirs(sample)
  assert _masked_chain(ours) == _masked_chain(theirs)
  assert len(references) == len(outputs) == 5


def _masked_list(text):
  """Returns a text with its lists masked, and how often words occur in them.

  Only the numbers of the first words of a list are in its answer.
  """
  entry = r"\d+\. \D+?(?= \d+\. |\n|$)"
  lists = re.findall(rf"(?:{entry} ?)+", text)
  repeats = []
  for found in lists:
    entries = [e.split(". ", 1)[1].strip() for e in re.findall(entry, found)]
    count = collections.Counter(collections.Counter(entries).values())
    often = max(count)
    repeats.append((often, count[often], min(count)))
  return re.sub(rf"(?:{entry} ?)+", "LIST", text), repeats


@pytest.mark.parametrize("context_len", [2000, 4096])
def test_common_words(ruler, words, context_len):
  (sample,) = ruler.cwe.sys_word_pair_random(1, context_len, _count)
  text, outputs = _theirs(sample)
  theirs = f"{sample['input_example']}\n{text}"
  # RULER's example has no space here; the answers to score have one.
  theirs = theirs.replace("list are:1.", "list are: 1.")
  ours, references = _ours(tasks.get("cwe"), words, context_len)
  assert _masked_list(ours) == _masked_list(theirs)
  assert len(references) == len(outputs) == 10


def _counts(text):
  """Returns the text around the coded words, and how often they occur."""
  before, coded, after = re.fullmatch(
    r"(.* coded words\. )(.*)\n(Question: .*)", text
  ).groups()
  counts = collections.Counter(coded.split())
  assert counts.pop("...") == max([*counts.values(), 0]) or counts
  return (before, after), sorted(counts.values(), reverse=True)


def test_frequent_words(ruler, words):
  (sample,) = ruler.fwe.sys_kwext(_count, 2000, num_samples=1)
  ours, references = _ours(tasks.get("fwe"), words, 2000)
  theirs, outputs = _theirs(sample)
  assert _counts(ours)[0] == _counts(theirs)[0]
  assert len(references) == len(outputs) == 3
  for text in (ours, theirs):
    counts = _counts(text)[1]
    ranks = np.arange(2, len(counts) + 2)
    assert any(
      counts == (n * ranks**-2.0 / (np.pi**2 / 6)).astype(int).tolist()
      for n in range(10_000)
    )


def test_questions(ruler, words, tmp_path, monkeypatch):
  articles = [
    [("The Danube flows east.", "Danube"), ("Etna smokes.", "Etna")],
    [("Rye makes bread dark.", "Rye")],
  ]
  squad = {
    "data": [
      {
        "paragraphs": [
          {
            "context": text,
            "qas": [
              {
                "question": f"What is {answer}?",
                "answers": [{"text": answer}],
                "is_impossible": False,
              }
            ],
          }
          for text, answer in article
        ]
      }
      for article in articles
    ]
  }
  path = tmp_path / "squad.json"
  path.write_text(json.dumps(squad), encoding="utf8")
  monkeypatch.setattr(ruler.qa, "download_json", lambda url: squad)
  questions, documents = ruler.qa.read_squad("squad")
  # At this length all three paragraphs fit, once.
  ours, references = _ours(tasks.get("qa", path), words, 150)
  number = next(
    i for i, q in enumerate(questions) if q["outputs"] == references
  )
  theirs, _ = ruler.qa.generate_input_output(
    number, 3, qas=questions, docs=documents
  )
  prefix = ruler.qa.CONFIG["answer_prefix"]
  assert sorted(ours.split("\n")) == sorted(f"{theirs} {prefix}".split("\n"))
