"""RULER's variable tracking, `vt` (arXiv 2404.06654, table 2).

One variable is assigned a number, and each of four others the variable before
it; the five assignments are scattered, in this order, over repeated filler
text. The question is which variables have the number. A solved example with
other variables comes first; it has at most 500 tokens, or five lines of filler.
"""

import dataclasses
import itertools
import string

import numpy as np

from scca_jax.tasks import haystacks, prompts
from scca_jax.tasks.task import Sample, Task

_NUM_HOPS = 4
_NAME_LEN, _EXAMPLE_NAME_LEN = 5, 3
_EXAMPLE_TOKENS = 500
# Examples grow by five lines of filler, the fewest that can hold a chain.
_MIN_SENTENCES = 5 * len(haystacks.FILLER)
_INSTRUCTION = (
  "Memorize and track the chain(s) of variable assignment hidden in the"
  " following text.\n\n"
)


class VariableTracking(Task):
  """A chain of assignments in filler text."""

  name = "vt"
  max_new_tokens = 30

  def draw(
    self,
    encoder: prompts.Encoder,
    context_len: int,
    depth: int,
    rng: np.random.Generator,
  ) -> Sample:
    """Returns a sample; the answer lists the names in the chain's order."""
    del depth  # The chain extends over the whole text.
    example, chain = _chain(rng, _EXAMPLE_NAME_LEN), _chain(rng, _NAME_LEN)
    num_sentences = _MIN_SENTENCES
    while (
      encoder.count(example.text(num_sentences + _MIN_SENTENCES))
      <= _EXAMPLE_TOKENS
    ):
      num_sentences += _MIN_SENTENCES
    solved = example.text(num_sentences)

    def build(num_sentences):
      text = chain.text(num_sentences)
      parts = [*solved.parts, f"{solved.answer}\n\n", *text.parts]
      return prompts.Text(parts, text.answer)

    num_sentences = prompts.most_units(
      encoder, build, context_len, minimum=_MIN_SENTENCES, name=self.name
    )
    return Sample(*encoder.encode(build(num_sentences)), None, chain.names)


@dataclasses.dataclass(frozen=True)
class _Chain:
  """Assignments of one number.

  Attributes:
    names: The variables.
    value: The number.
    places: Where each assignment is, from 0 to 1, in ascending order.
  """

  names: tuple[str, ...]
  value: int
  places: np.ndarray

  def text(self, num_sentences: int) -> prompts.Text:
    """Returns the instruction, the filler with the chain, and the question."""
    lines = haystacks.filler_lines(num_sentences)
    # No two assignments go in front of the same line, as in RULER.
    spread = len(lines) - _NUM_HOPS
    before = (self.places * spread).astype(int) + np.arange(len(self.names))
    parts, start = [_INSTRUCTION], 0
    for i, end in enumerate(before.tolist()):
      value = [f" VAR {self.names[i - 1]}\n"] if i else [f" {self.value}\n"]
      parts += itertools.chain.from_iterable(lines[start:end])
      parts += ["VAR", f" {self.names[i]}", " =", *value]
      start = end
    parts += itertools.chain.from_iterable(lines[start:])
    parts.append(
      f"Question: Find all variables that are assigned the value {self.value}"
      " in the text above. Answer: According to the chain(s) of variable"
      f" assignment in the text above, {len(self.names)} variables are assigned"
      f" the value {self.value}, they are:"
    )
    return prompts.Text(parts, f" {' '.join(self.names)}")


def _chain(rng: np.random.Generator, name_len: int) -> _Chain:
  letters = list(string.ascii_uppercase)
  names: dict[str, None] = {}
  while len(names) <= _NUM_HOPS:
    names["".join(rng.choice(letters, name_len))] = None
  return _Chain(
    tuple(names),
    int(rng.integers(10_000, 100_000)),
    np.sort(rng.random(len(names))),
  )
