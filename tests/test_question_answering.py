"""RULER's question answering on a user's file, read back from the prompts."""

import json
import re

import pytest

from scca_jax import assets, tasks, tokenizer

ARTICLES = [
  [
    ("The Danube flows east. It ends in the Black Sea.", "Danube"),
    (" Etna stands on Sicily;\nit smokes. ", "Etna"),
    ("Lake Garda is deep.", None),
  ],
  [("Rye makes bread dark.", "Rye"), ("Oats feed horses.", "Oats")],
]


def _squad(articles, **more):
  return {
    "version": "v2.0",
    "data": [
      {
        "title": "any",
        "paragraphs": [
          {
            "context": text,
            "qas": [
              {
                "question": f"What is {answer}?",
                "answers": [{"text": answer}, {"text": answer.upper()}],
                **more,
              }
            ]
            if answer
            else [{"question": "None?", "answers": [], "is_impossible": True}],
          }
          for text, answer in article
        ],
      }
      for article in articles
    ],
  }


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp("qa") / "squad.json"
  path.write_text(json.dumps(_squad(ARTICLES)), encoding="utf8")
  return path


@pytest.fixture(scope="module")
def words():
  return tokenizer.load(assets.MODEL)


_ONLY = (
  "Answer the question based on the given documents. Only give me the answer"
  " and do not output any other words."
)


def test_prompts_are_those_of_ruler(path, words):
  task = tasks.get("qa", path)
  found = set()
  for sample in task.samples(words, 500, 40, 0):
    assert len(sample.prompt_ids) + len(sample.answer_ids) <= 500
    text = words.decode(sample.prompt_ids)
    head = f"{_ONLY}\n\nThe following are given documents.\n\n"
    middle = f"\n\n{_ONLY}\n\nQuestion: "
    assert text.startswith(head)
    listing, question = text[len(head) :].split(middle)
    documents = re.split(r"(?:^|\n\n)Document \d+:\n", listing)[1:]
    numbers = re.findall(r"^Document (\d+):$", listing, re.MULTILINE)
    assert [int(n) for n in numbers] == list(range(1, len(documents) + 1))
    answer = words.decode(sample.answer_ids).strip()
    assert question == f"What is {answer}? Answer:"
    assert sample.references == (answer, answer.upper())
    # The paragraph asked about occurs once, at its depth.
    place = [i for i, text in enumerate(documents) if answer in text]
    assert place == [int((len(documents) - 1) * sample.depth + 1e-9)]
    assert set(documents) == {t.strip() for a in ARTICLES for t, _ in a}
    found.add(answer)
  assert found == {"Danube", "Etna", "Rye", "Oats"}


def test_paragraphs_of_the_same_article_come_first(path, words):
  task = tasks.get("qa", path)
  for sample in task.samples(words, 150, 12, 0):
    text = words.decode(sample.prompt_ids)
    answer = words.decode(sample.answer_ids).strip()
    own, other = sorted(ARTICLES, key=lambda a: answer not in dict(a).values())
    shown = {t for a in ARTICLES for t, _ in a if t.strip() in text}
    if shown & {t for t, _ in other}:
      assert shown >= {t for t, _ in own}


def test_any_reference_counts_once(path):
  task = tasks.get("qa", path)
  assert task.match("It is the danube.", ("Danube", "Danube River")) == 1
  assert task.match("It is the Rhine.", ("Danube", "Donau")) == 0


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ([], "does not contain a JSON object"),
    ({"questions": []}, r"is not like SQuAD \(KeyError: 'data'\)"),
    ({"data": [{"paragraphs": [{"context": "a"}]}]}, "'qas'"),
    ({"data": ["text"]}, "is not like SQuAD"),
    (_squad(ARTICLES, is_impossible=True), "has 0 questions with answers"),
    (_squad([ARTICLES[0][:1]]), "about 1 paragraphs: at least two"),
  ],
)
def test_a_file_of_another_form_is_refused_by_name(tmp_path, content, message):
  path = tmp_path / "other.json"
  path.write_text(json.dumps(content), encoding="utf8")
  with pytest.raises(ValueError, match=message) as error:
    tasks.get("qa", path)
  assert "other.json" in str(error.value)


def test_the_file_must_be_given_and_be_there(tmp_path):
  with pytest.raises(ValueError, match="--qa_data=FILE"):
    tasks.get("qa")
  with pytest.raises(FileNotFoundError, match="does not exist"):
    tasks.get("qa", tmp_path / "no.json")


def test_a_length_that_is_too_short_is_refused(path, words):
  with pytest.raises(ValueError, match="qa needs a context_len of at least"):
    tasks.get("qa", path).samples(words, 40, 1, 0)
