"""Prompts that fill a context, assembled from parts that are tokenised once.

A prompt of 32,768 tokens has thousands of sentences, but few distinct ones. So
a task writes a prompt as a list of parts. Each part is tokenised once, and
counting the tokens of a prompt means adding up known numbers.

A part begins with a space, or follows a part that ends with a line break.
Tokenizers split text at these seams, so joining the ids of the parts gives the
ids of the whole text. `Encoder` checks this; if it does not hold for a
tokenizer, whole prompts are tokenised instead, which is slower.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence

from scca_jax.tokenizer import Tokenizer

# A text with every kind of seam that the tasks' prompts have.
_SEAMS = (
  "The grass is green.",
  " Here we go.\n",
  "One of the special magic numbers for",
  " broad-meadow",
  " is:",
  " 1048576.\n",
  "VAR ABC =",
  " VAR XYZ\n\n",
  "Below is a list.\n",
  "1.",
  " word",
  " 20.",
  " ...",
  " qjzkxv",
  " ...\n",
  '"Why," said he--',
  " 'tis so!\n",
  "Question:",
)
# With more known parts than this, the encoder forgets them all, to bound its
# memory.
_MOST_KNOWN = 1 << 18
# Steps of the search that interpolate; later steps bisect.
_NUM_INTERPOLATED = 8


@dataclasses.dataclass(frozen=True)
class Text:
  """A prompt and its answer.

  Attributes:
    parts: The prompt, in two or more parts (see the module).
    answer: The text that follows; begins with a space.
  """

  parts: Sequence[str]
  answer: str


class Encoder:
  """Turns prompts into token ids, part by part.

  Attributes:
    tokenizer: The tokenizer.
    bos: The ids that a prompt begins with: BOS, or none.
  """

  def __init__(self, tokenizer: Tokenizer):
    self.tokenizer = tokenizer
    self.bos: list[int] = []
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
      self.bos = [tokenizer.bos_id]
    encode = tokenizer.encode
    self._before = {text: encode(text) for text in ("", "a", "a\n")}
    self._after = {
      " a": encode("a a")[len(encode("a")) :],
      "A": encode("a\nA")[len(encode("a\n")) :],
    }
    self._known: dict[str, list[int]] = {}
    self._first: dict[str, list[int]] = {}
    self._ends: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
    self._separable = True
    self._learn_first(_SEAMS[0])
    self._learn(_SEAMS[1:])
    joined = self._first[_SEAMS[0]] + self._join(_SEAMS[1:])
    self._separable &= joined == encode("".join(_SEAMS) + " a")[: len(joined)]

  def encode(self, text: Text) -> tuple[list[int], list[int]]:
    """Returns the ids of the prompt, BOS included, and of the answer.

    Raises:
      ValueError: The prompt's ids are not the first ids of prompt and answer
        together, so the model cannot be asked for the answer alone.
    """
    first, *middle, last = text.parts
    if self._learn_all(text):
      prompt, answer = self._ends[last, text.answer]
      return self.bos + self._first[first] + self._join(middle) + prompt, answer
    prompt, answer = self._split("".join(text.parts), text.answer)
    return self.bos + prompt, answer

  def count(self, text: Text) -> int:
    """Returns how many tokens prompt and answer have, BOS included."""
    first, *middle, last = text.parts
    if not self._learn_all(text):
      return sum(len(ids) for ids in self.encode(text))
    known = self._known
    return (
      len(self.bos)
      + len(self._first[first])
      + sum([len(known[part]) for part in middle])
      + sum(len(ids) for ids in self._ends[last, text.answer])
    )

  def sizes(self, parts: Sequence[str]) -> list[int]:
    """Returns how many tokens each part has inside a text."""
    self._learn(parts)
    return [len(self._known[part]) for part in parts]

  def _learn_all(self, text: Text) -> bool:
    """Tokenises new parts of a text; returns whether ids may be joined."""
    first, *middle, last = text.parts
    if len(self._known) > _MOST_KNOWN:
      self._known.clear()
      self._ends.clear()
    if self._separable:
      self._learn_first(first)
      self._learn(middle)
      if (last, text.answer) not in self._ends:
        prompt, answer = self._split(_before(last) + last, text.answer)
        prompt = prompt[len(self._before[_before(last)]) :]
        self._ends[last, text.answer] = prompt, answer
    return self._separable

  def _learn_first(self, part: str) -> None:
    if part not in self._first:
      ids = self.tokenizer.encode(part + _after(part))
      self._first[part] = self._inner(ids, "", _after(part))

  def _learn(self, parts: Iterable[str]) -> None:
    new = [part for part in dict.fromkeys(parts) if part not in self._known]
    texts = [_before(part) + part + _after(part) for part in new]
    for part, ids in zip(
      new, self.tokenizer.encode_batch(texts) if texts else [], strict=True
    ):
      self._known[part] = self._inner(ids, _before(part), _after(part))

  def _inner(self, ids: list[int], before: str, after: str) -> list[int]:
    """Returns `ids` without those of the neighbouring text."""
    left, right = self._before[before], self._after[after]
    end = len(ids) - len(right)
    self._separable &= ids[: len(left)] == left and ids[end:] == right
    return ids[len(left) : end]

  def _join(self, parts: Sequence[str]) -> list[int]:
    known = self._known
    return list(itertools.chain.from_iterable([known[p] for p in parts]))

  def _split(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Returns the ids of a prompt and of the answer, tokenised together."""
    ids, joint = self.tokenizer.encode_batch([prompt, prompt + answer])
    if joint[: len(ids)] != ids or len(joint) == len(ids):
      raise ValueError(
        f"{self.tokenizer.name} joins the end of the prompt, {prompt[-12:]!r},"
        f" and the answer, {answer[:12]!r}, in one token: the answer cannot be"
        " scored with this tokenizer."
      )
    return ids, joint[len(ids) :]


@functools.lru_cache(maxsize=4)
def encoder(tokenizer: Tokenizer) -> Encoder:
  """Returns the encoder of a tokenizer, the same one each time."""
  return Encoder(tokenizer)


def _before(part: str) -> str:
  """Returns a text that may precede a part."""
  return "a" if part[0] == " " else "a\n"


def _after(part: str) -> str:
  """Returns a text that may follow a part."""
  return "A" if part[-1] == "\n" else " a"


def listed(items: Sequence[str]) -> str:
  """Returns `items` as a list in prose: a, b, and c."""
  *others, last = items
  return f"{', '.join(others)}, and {last}" if others else last


def most_units(
  encoder: Encoder,
  build: Callable[[int], Text],
  context_len: int,
  *,
  minimum: int,
  name: str,
) -> int:
  """Returns the number of units of the longest text that fits a context.

  Args:
    encoder: Counts tokens.
    build: Makes the text of a number of units (sentences, lines, words); more
      units make it longer.
    context_len: Most tokens of prompt and answer, BOS included.
    minimum: Fewest units that the task needs.
    name: The task, for the error message.

  Raises:
    ValueError: The text of `minimum` units does not fit.
  """
  low, low_size = minimum, encoder.count(build(minimum))
  if low_size > context_len:
    raise ValueError(
      f"{name} needs a context_len of at least {low_size:,} tokens with"
      f" {encoder.tokenizer.name}, got {context_len:,}."
    )
  high = None  # The fewest units known not to fit.
  slope = float(encoder.count(build(minimum + 1)) - low_size)
  num_tried = 0
  while high != low + 1:
    num_tried += 1
    guess = low + int((context_len - low_size) / max(slope, 1.0))
    if high is not None and num_tried > _NUM_INTERPOLATED:
      guess = (low + high) // 2
    guess = max(guess, low + 1)
    if high is not None:
      guess = min(guess, high - 1)
    size = encoder.count(build(guess))
    slope = (size - low_size) / (guess - low)
    if size <= context_len:
      low, low_size = guess, size
    else:
      high = guess
  return low
