"""RULER's eight needle-in-a-haystack tasks (arXiv 2404.06654, table 2).

A needle is a sentence that gives a key a value. The question names one or
several keys and asks for all their values. The tasks differ in the haystack
(filler, essays, or needles with other keys) and in the kinds and numbers of
keys and values. Prompts have RULER's format, with these choices **[ours]**:

* RULER's word keys are an adjective and a noun; ours are any two words. All
  keys of a prompt differ.
* RULER puts needles at one of 40 depths in essays, and at any line of the other
  haystacks. We use the 40 depths everywhere, for scores by depth.
"""

import dataclasses
import itertools
import uuid
from collections.abc import Iterator
from typing import Literal

import numpy as np

from scca_jax.tasks import haystacks, prompts
from scca_jax.tasks.task import DEPTHS, Sample, Task

Kind = Literal["words", "numbers", "uuids"]
# Keys or values that are drawn at a time.
_BLOCK = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needles(Task):
  """One of the needle tasks.

  Attributes:
    name: As in RULER.
    haystack: "filler" repeats five sentences (RULER's noise); "essay" quotes a
      book; "needles" consists of needles with other keys.
    key_kind: Kind of the keys.
    value_kind: Kind of the values; numbers have seven digits, UUIDs version 4.
    num_keys: Number of keys, not counting those of the haystack.
    num_values: Values, each in its own needle, per key.
    num_queries: Number of keys that the question asks for.
    max_new_tokens: RULER's limit.
  """

  name: str
  haystack: Literal["filler", "essay", "needles"]
  key_kind: Kind = "words"
  value_kind: Kind = "numbers"
  num_keys: int = 1
  num_values: int = 1
  num_queries: int = 1
  max_new_tokens: int = 128

  def draw(
    self,
    encoder: prompts.Encoder,
    context_len: int,
    depth: int,
    rng: np.random.Generator,
  ) -> Sample:
    """Returns a sample: needles in a haystack, and the question.

    The answer lists the values in the order of the keys in the question; the
    values of one key are in the order of the text.
    """
    keys, values = (_draws(k, rng) for k in (self.key_kind, self.value_kind))
    asked_keys = list(itertools.islice(keys, self.num_queries))
    num_needles = self.num_keys * self.num_values
    others = [d for d in DEPTHS if d != depth]
    depths = [depth, *map(int, rng.permutation(others))][:num_needles]
    # Needles that are asked for come first: a single one gets `depth`.
    owners = [
      *(key for key in asked_keys for _ in range(self.num_values)),
      *itertools.islice(keys, self.num_keys - self.num_queries),
    ]
    needles = [
      (d, key, next(values)) for d, key in zip(depths, owners, strict=True)
    ]
    references = tuple(
      value
      for key in asked_keys
      for _, owner, value in sorted(needles)
      if owner == key
    )
    hidden = [
      (d, self._needle(key, value)) for d, key, value in sorted(needles)
    ]
    start = int(rng.integers(len(haystacks.sentences())))
    distractors: list[list[str]] = []

    def build(num_units):
      if self.haystack == "essay":
        units = [[part] for part in haystacks.essay(num_units, start)]
      elif self.haystack == "filler":
        units = haystacks.filler_lines(num_units)
      else:
        while len(distractors) < num_units:
          needle = self._needle(next(keys), next(values))
          distractors.append(haystacks.line(needle))
        units = distractors[:num_units]
      parts = _with_needles(units, hidden, lines=self.haystack != "essay")
      instruction, question = self._frame(prompts.listed(asked_keys))
      answer = f" {prompts.listed(references)}"
      return prompts.Text([instruction, *parts, *question], answer)

    num_units = prompts.most_units(
      encoder, build, context_len, minimum=1, name=self.name
    )
    ids = encoder.encode(build(num_units))
    single = len(references) == 1
    return Sample(*ids, depth / 100 if single else None, references)

  def _needle(self, key: str, value: str) -> list[str]:
    return [
      f" One of the special magic {self.value_kind} for",
      f" {key}",
      " is:",
      f" {value}.",
    ]

  def _frame(self, query: str) -> tuple[str, list[str]]:
    """Returns the text before the haystack, and the parts after it."""
    if self.num_queries * self.num_values == 1:
      what = self.value_kind.removesuffix("s")
      begin, ask = f"A special magic {what} is", "What is the"
      verb = "is"
    else:
      what = self.value_kind
      begin, ask = f"Some special magic {what} are", "What are all the"
      verb = "are"
    instruction = (
      f"{begin} hidden within the following text. Make sure to memorize it. I"
      f" will quiz you about the {what} afterwards.\n"
    )
    question = [
      f"{ask} special magic {what} for",
      f" {query}",
      " mentioned in the provided text?",
      f" The special magic {what} for",
      f" {query}",
      f" mentioned in the provided text {verb}",
    ]
    return instruction, question


def _with_needles(
  units: list[list[str]], hidden: list[tuple[int, list[str]]], *, lines: bool
) -> list[str]:
  """Returns the parts of the haystack with the needles at their depths.

  Args:
    units: The parts of each line, or of each sentence of one long line.
    hidden: The depth in percent and the parts of each needle, by depth.
    lines: Whether units and needles are lines.
  """
  pieces: list[list[str]] = []
  start = 0
  for depth, needle in hidden:
    end = len(units) * depth // 100
    pieces += units[start:end]
    pieces.append(haystacks.line(needle) if lines else needle)
    start = end
  pieces += units[start:]
  parts = list(itertools.chain.from_iterable(pieces))
  return parts if lines else haystacks.line(parts)


def _draws(kind: Kind, rng: np.random.Generator) -> Iterator[str]:
  """Yields distinct keys or values."""
  words = haystacks.words()
  drawn = set()
  while True:
    if kind == "words":
      pairs = rng.integers(len(words), size=(_BLOCK, 2)).tolist()
      block = [f"{words[first]}-{words[second]}" for first, second in pairs]
    elif kind == "numbers":
      block = map(str, rng.integers(10**6, 10**7, size=_BLOCK).tolist())
    else:
      data = rng.bytes(16 * _BLOCK)
      block = [
        str(uuid.UUID(bytes=data[i : i + 16], version=4))
        for i in range(0, len(data), 16)
      ]
    for item in block:
      if item not in drawn:
        drawn.add(item)
        yield item


VARIANTS = (
  Needles(name="niah_single_1", haystack="filler"),
  Needles(name="niah_single_2", haystack="essay"),
  Needles(name="niah_single_3", haystack="essay", value_kind="uuids"),
  Needles(name="niah_multikey_1", haystack="essay", num_keys=4),
  Needles(name="niah_multikey_2", haystack="needles"),
  Needles(
    name="niah_multikey_3",
    haystack="needles",
    key_kind="uuids",
    value_kind="uuids",
  ),
  Needles(name="niah_multivalue", haystack="essay", num_values=4),
  Needles(name="niah_multiquery", haystack="essay", num_keys=4, num_queries=4),
)
