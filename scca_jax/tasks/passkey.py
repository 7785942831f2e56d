"""The passkey task of Landmark Attention (arXiv 2305.16300, section 4.2).

A five-digit number is hidden in repeated filler text and asked for at the end.
The paper cuts the filler after any character, on both sides of the key; here it
consists of whole sentences, and the key is at one of 40 depths **[ours]**.
"""

import numpy as np

from scca_jax.tasks import haystacks, prompts
from scca_jax.tasks.task import Sample, Task

_INSTRUCTION = (
  "There is an important info hidden inside a lot of irrelevant text. Find it"
  " and memorize them. I will quiz you about the important information there.\n"
)
_QUESTION = "What is the pass key? The pass key is"


class Passkey(Task):
  """A number hidden in filler text."""

  name = "passkey"
  max_new_tokens = 10

  def draw(
    self,
    encoder: prompts.Encoder,
    context_len: int,
    depth: int,
    rng: np.random.Generator,
  ) -> Sample:
    """Returns a sample: the filler, the key in it, and the question."""
    key = str(rng.integers(10_000, 100_000))
    needle = f"The pass key is {key}. Remember it. {key} is the pass key.\n"

    def build(num_sentences):
      before = num_sentences * depth // 100
      after = num_sentences - before
      return prompts.Text(
        [
          _INSTRUCTION,
          *haystacks.line(haystacks.filler(before)),
          needle,
          *haystacks.line(haystacks.filler(after)),
          _QUESTION,
        ],
        f" {key}",
      )

    num_sentences = prompts.most_units(
      encoder, build, context_len, minimum=0, name=self.name
    )
    ids = encoder.encode(build(num_sentences))
    return Sample(*ids, depth / 100, (key,))
