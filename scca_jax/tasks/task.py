"""The interface of an evaluation task: prompts with one right answer."""

import abc
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from scca_jax.tasks import prompts
from scca_jax.tokenizer import Tokenizer

# Where needles lie: RULER's 40 depths, in percent of the haystack before them.
DEPTHS = tuple(int(depth) for depth in np.linspace(0, 100, 40).round())


@dataclasses.dataclass(frozen=True)
class Sample:
  """A prompt and the answer to it.

  Attributes:
    prompt_ids: Token ids of the prompt, including BOS if prompts begin with it.
    answer_ids: Token ids of the answer, tokenised together with the prompt.
    depth: Share of the context before the needle, from 0 to 1; None if there
      are several.
    references: The texts that a generated answer should contain.
    distance: How many tokens before the answer its source is, in tasks that are
      scored by distance.
  """

  prompt_ids: list[int]
  answer_ids: list[int]
  depth: float | None
  references: tuple[str, ...] = ()
  distance: int | None = None


class Task(abc.ABC):
  """A source of samples; a new task only has to define `draw`.

  Attributes:
    name: The task's key in `scca_jax.tasks.TASKS`.
    max_new_tokens: How many tokens a model may generate for an answer.
    source: Hash of the file that samples are made from, if a user gave one.
    scored_by_loss: Whether the score is the loss, because answers are too long
      to get every token right.
  """

  name: str
  max_new_tokens: int
  source = ""
  scored_by_loss = False

  @abc.abstractmethod
  def draw(
    self,
    encoder: prompts.Encoder,
    context_len: int,
    depth: int,
    rng: np.random.Generator,
  ) -> Sample:
    """Returns one sample.

    Args:
      encoder: Turns text into ids.
      context_len: Maximum length of prompt and answer together, in tokens.
      depth: Where the needle goes, in percent. Any 40 consecutive samples have
        all 40 depths. A task without a needle ignores it.
      rng: The only source of randomness.

    Raises:
      ValueError: The shortest prompt does not fit.
    """

  def samples(
    self, tokenizer: Tokenizer, context_len: int, num_samples: int, seed: int
  ) -> Iterator[Sample]:
    """Returns an iterator over samples.

    Sample `i` depends only on the seed, the task, `context_len`, `i` and the
    tokenizer.

    Args:
      tokenizer: The tokenizer.
      context_len: Length of prompt and answer together, in tokens. A sample is
        exactly this long, or too short for one more sentence, line or word.
      num_samples: How many samples.
      seed: Seed of the samples.

    Raises:
      ValueError: `num_samples` is below 1, or the shortest prompt does not fit.
    """
    if num_samples < 1:
      raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    encoder = prompts.encoder(tokenizer)
    depths = self._rng(seed, context_len, "depths").permutation(DEPTHS)

    def sample(index: int) -> Sample:
      return self.draw(
        encoder,
        context_len,
        int(depths[index % len(depths)]),
        self._rng(seed, context_len, index),
      )

    # Draw the first sample now, so that this call raises any error.
    first = sample(0)
    return itertools.chain([first], map(sample, range(1, num_samples)))

  def match(self, text: str, references: Sequence[str]) -> float:
    """Returns the share of the references found in a generated text.

    This is RULER's `string_match_all` (arXiv 2404.06654); case is ignored.
    """
    found = [reference.lower() in text.lower() for reference in references]
    return sum(found) / len(found)

  def _rng(
    self, seed: int, context_len: int, what: int | str
  ) -> np.random.Generator:
    key = f"{self.name}/{context_len}/{seed}/{what}".encode()
    number = int.from_bytes(hashlib.sha256(key).digest(), "little")
    return np.random.Generator(np.random.PCG64(number))
