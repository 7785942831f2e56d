"""Needles in a haystack, RULER's eight variants (arXiv 2404.06654, table 2).

A needle says that a key has a value. The question names one key or several and
asks for all their values. The variants differ in the haystack (filler, essays,
or needles with other keys), in the kinds of keys and values, and in how many
there are. The prompts have the format of RULER's; its keys of an adjective and
a noun are any two words here, and all keys of a prompt differ **[ours]**.

In essays RULER puts needles at 40 depths, in lines anywhere; here they are at
one of the 40 depths in both **[ours]**, so that all have scores by depth.
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
# Drawn at once; more are drawn as a longer prompt needs them.
_BLOCK = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needles(Task):
  """A variant.

  Attributes:
    name: As in RULER.
    haystack: "filler" is RULER's noise, "needles" lines that are needles too.
    key_kind: What keys are.
    value_kind: What values are: seven-digit numbers, or version 4 UUIDs.
    num_keys: Keys with a needle, haystacks of needles apart.
    num_values: Values, and so needles, of each key.
    num_queries: Keys asked for.
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

    The answer is the values in the order of the keys asked for, those of one
    key in the order of the text, written like the keys in the question.
    """
    keys, values = (_draws(k, rng) for k in (self.key_kind, self.value_kind))
    asked_keys = list(itertools.islice(keys, self.num_queries))
    num_needles = self.num_keys * self.num_values
    others = [d for d in DEPTHS if d != depth]
    depths = [depth, *map(int, rng.permutation(others))][:num_needles]
    # The needles asked for come first, and one that is alone has its depth.
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
    """Returns what stands before the haystack, and the parts behind it."""
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
  """Yields keys or values that all differ."""
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
