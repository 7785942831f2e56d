"""RULER's question answering, `qa`, on a user's file (arXiv 2404.06654).

The file is JSON like SQuAD's: articles of paragraphs with questions. The
paragraph that answers the question lies among others, those of its article
before those of other articles, in random order; if the file has too few, they
repeat, as in RULER. The paragraph asked about occurs once, at one of 40 depths
**[ours]**.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from scca_jax import json_file
from scca_jax.tasks import prompts
from scca_jax.tasks.task import Sample, Task

_ANSWER_ONLY = (
  "Answer the question based on the given documents. Only give me the answer"
  " and do not output any other words.\n\n"
)


@dataclasses.dataclass(frozen=True)
class _Question:
  """A question with its paragraph.

  Attributes:
    text: The question.
    answers: What may answer it; the first is the one that is scored.
    paragraph: The paragraph that has the answer.
    article: All paragraphs of its article.
  """

  text: str
  answers: tuple[str, ...]
  paragraph: str
  article: tuple[str, ...]


class QuestionAnswering(Task):
  """Questions about one of many paragraphs."""

  name = "qa"
  max_new_tokens = 32

  def __init__(self, path: str | os.PathLike[str]):
    """Reads the questions.

    Args:
      path: JSON, `{"data": [{"paragraphs": [{"context": text, "qas":
        [{"question": text, "answers": [{"text": text}]}]}]}]}`. Questions
        marked `is_impossible` are left out.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It is of another form, or has no question or no second
        paragraph.
    """
    path = pathlib.Path(path)
    content = json_file.read(path)
    self.source = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
      self._questions = _questions(content)
    except (AttributeError, KeyError, TypeError) as error:
      raise ValueError(
        f"{path} is not like SQuAD ({type(error).__name__}: {error}): it needs"
        " data[].paragraphs[].context, and qas[].question and"
        " qas[].answers[].text in each paragraph."
      ) from error
    self._paragraphs = sorted(
      {text for question in self._questions for text in question.article}
    )
    if len(self._paragraphs) < 2:
      raise ValueError(
        f"{path} has {len(self._questions):,} questions with answers, about"
        f" {len(self._paragraphs)} paragraphs: at least two paragraphs are"
        " needed."
      )

  def draw(
    self,
    encoder: prompts.Encoder,
    context_len: int,
    depth: int,
    rng: np.random.Generator,
  ) -> Sample:
    """Returns a sample; the answer is the first that the file gives."""
    question = self._questions[rng.integers(len(self._questions))]
    near = [text for text in question.article if text != question.paragraph]
    far = sorted(set(self._paragraphs) - set(question.article))
    others = [
      texts[i] for texts in (near, far) for i in rng.permutation(len(texts))
    ]
    order = rng.random(2 * context_len)

    def build(num_others):
      documents = [
        others[i % len(others)] for i in np.argsort(order[:num_others])
      ]
      documents.insert(num_others * depth // 100, question.paragraph)
      parts = [_ANSWER_ONLY, "The following are given documents.\n\n"]
      for number, text in enumerate(documents, start=1):
        parts += [f"Document {number}:\n", f"{text}\n\n"]
      parts += [_ANSWER_ONLY, f"Question: {question.text} Answer:"]
      return prompts.Text(parts, f" {question.answers[0]}")

    num_others = prompts.most_units(
      encoder, build, context_len, minimum=0, name=self.name
    )
    ids = encoder.encode(build(num_others))
    return Sample(*ids, depth / 100, question.answers)

  def match(self, text: str, references: Sequence[str]) -> float:
    """Returns 1 if one of the references is in a generated text, or else 0.

    This is RULER's `string_match_part`; case is ignored.
    """
    return float(any(r.lower() in text.lower() for r in references))


def _questions(content: dict[str, Any]) -> list[_Question]:
  questions = []
  for entry in content["data"]:
    paragraphs = entry["paragraphs"]
    article = tuple(dict.fromkeys(p["context"].strip() for p in paragraphs))
    for paragraph in paragraphs:
      for item in paragraph["qas"]:
        texts = (answer["text"].strip() for answer in item["answers"])
        answers = tuple(dict.fromkeys(filter(None, texts)))
        if answers and not item.get("is_impossible", False):
          questions.append(
            _Question(
              item["question"].strip(),
              answers,
              paragraph["context"].strip(),
              article,
            )
          )
  return questions
