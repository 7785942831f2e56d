"""RULER's common and frequent words (arXiv 2404.06654, table 2).

`cwe`: a numbered list in which ten words occur more often than the others,
after a short solved example. `fwe`: made-up words whose frequencies follow
Zipf's law; the most frequent one is noise, and the question is which three
come next.
"""

import string

import numpy as np

from scca_jax.tasks import haystacks, prompts
from scca_jax.tasks.task import Sample, Task

_NUM_COMMON = 10
# In contexts of at least this many tokens, RULER repeats words more often.
_LONG = 4096
# Unused words among which `_lengthened` looks for longer ones.
_NUM_EXCHANGED = 100
_WORD_LEN = 6
_EXPONENT = 2.0
_ZETA = np.pi**2 / 6  # The sum over ranks of rank ** -2.
# With at least this many words, ranks 2 to 5 have different (rounded) counts.
_MIN_WORDS = 74


class CommonWords(Task):
  """The ten most common words of a list."""

  name = "cwe"
  max_new_tokens = 120

  def draw(
    self,
    encoder: prompts.Encoder,
    context_len: int,
    depth: int,
    rng: np.random.Generator,
  ) -> Sample:
    """Returns a sample; the answer lists the words in order of appearance.

    All ten are equally common, so the order is our choice **[ours]**, also in
    the solved example. Unlike RULER's, the example has a space in front of its
    answer, like the answer that is scored.
    """
    del depth  # The words are everywhere.
    if context_len < _LONG:
      num_solved, solved_repeats, repeats = 20, (3, 1), (6, 1)
    else:
      num_solved, solved_repeats, repeats = 40, (10, 3), (30, 3)
    words = haystacks.shuffled_words(rng)
    solved = _list(
      words[:num_solved], solved_repeats, rng.random(num_solved * 10)
    )
    del words[:num_solved]
    order = rng.random(repeats[0] * _NUM_COMMON + repeats[1] * len(words))
    front = [*solved.parts, f"{solved.answer}\n"]

    def build(num_words, words=words):
      if num_words > len(words):
        raise ValueError(
          f"{self.name} has words for lists of {len(words):,}, too few for a"
          f" context_len of {context_len:,}."
        )
      text = _list(words[:num_words], repeats, order)
      return prompts.Text([*front, *text.parts], text.answer)

    num_words = prompts.most_units(
      encoder, build, context_len, minimum=_NUM_COMMON + 1, name=self.name
    )
    text = build(num_words)
    spare = (context_len - encoder.count(text)) // repeats[1]
    longer = build(num_words, _lengthened(encoder, words, num_words, spare))
    if encoder.count(longer) <= context_len:
      text = longer
    references = tuple(text.answer.split()[1::2])
    return Sample(*encoder.encode(text), None, references)


def _lengthened(
  encoder: prompts.Encoder, words: list[str], num_used: int, spare: int
) -> list[str]:
  """Returns the words with some uncommon ones exchanged for longer ones.

  Args:
    encoder: Counts tokens.
    words: The common words first; those after the first `num_used` are unused.
    num_used: Number of words in the list.
    spare: Tokens by which the words may grow in total.
  """
  words = words[: num_used + _NUM_EXCHANGED]
  sizes = encoder.sizes([f" {word}" for word in words])
  for place in reversed(range(_NUM_COMMON, num_used)):
    longer = [
      other
      for other in range(num_used, len(words))
      if sizes[place] < sizes[other] <= sizes[place] + spare
    ]
    if longer:
      other = max(longer, key=sizes.__getitem__)
      spare -= sizes[other] - sizes[place]
      words[place], words[other] = words[other], words[place]
      sizes[place], sizes[other] = sizes[other], sizes[place]
    if spare == 0:
      break
  return words


def _list(
  words: list[str], repeats: tuple[int, int], order: np.ndarray
) -> prompts.Text:
  """Returns a list, the question and its answer.

  Args:
    words: The common words first.
    repeats: How often a common word and another word are repeated.
    order: Random numbers, at least one per entry.
  """
  common, others = words[:_NUM_COMMON], words[_NUM_COMMON:]
  entries = common * repeats[0] + others * repeats[1]
  shuffled = [entries[i] for i in np.argsort(order[: len(entries)])]
  first_seen = [word for word in dict.fromkeys(shuffled) if word in set(common)]
  parts = [
    "Below is a numbered list of words. In these words, some appear more often"
    " than others. Memorize the ones that appear most often.\n",
    *haystacks.line(_numbered(shuffled)),
    f"Question: What are the {_NUM_COMMON} most common words in the above list?"
    f" Answer: The top {_NUM_COMMON} words that appear most often in the list"
    " are:",
  ]
  return prompts.Text(parts, "".join(_numbered(first_seen)))


def _numbered(words: list[str]) -> list[str]:
  return [
    part
    for number, word in enumerate(words, start=1)
    for part in (f" {number}.", f" {word}")
  ]


class FrequentWords(Task):
  """The three most frequent words of a coded text."""

  name = "fwe"
  max_new_tokens = 50

  def draw(
    self,
    encoder: prompts.Encoder,
    context_len: int,
    depth: int,
    rng: np.random.Generator,
  ) -> Sample:
    """Returns a sample; the answer lists the most frequent word first.

    The word of rank `k` occurs `int(n / (zeta(2) k^2))` times; rank 1 is the
    noise, "...". More noise fills the rest of the context **[ours]**.
    """
    del depth  # The words are everywhere.
    letters = np.array(list(string.ascii_lowercase))
    coded: dict[str, None] = {}
    num_ranks = max(5, context_len // 50)
    while len(coded) < num_ranks - 1:
      for row in rng.choice(letters, (num_ranks, _WORD_LEN)):
        coded["".join(row)] = None
    ranks = np.arange(1, num_ranks + 1)
    names = np.array([" ...", *(f" {word}" for word in coded)][:num_ranks])
    references = tuple(coded)[:3]
    order = rng.random(2 * context_len)
    instruction = (
      "Read the following coded text and track the frequency of each coded"
      " word. Find the three most frequently appeared coded words."
    )
    question = (
      "Question: Do not provide any explanation. Please ignore the dots '....'."
      " What are the three most frequently appeared words in the above coded"
      " text? Answer: According to the coded text above, the three most"
      " frequently appeared words are:"
    )

    def build(num_words, more_noise=0):
      counts = (num_words * ranks**-_EXPONENT / _ZETA).astype(int)
      counts[0] += more_noise
      entries = np.repeat(names, counts)
      shuffled = entries[np.argsort(order[: len(entries)])].tolist()
      shuffled[-1] += "\n"
      return prompts.Text(
        [instruction, *shuffled, question],
        f" {prompts.listed(references)}",
      )

    num_words = prompts.most_units(
      encoder, build, context_len, minimum=_MIN_WORDS, name=self.name
    )
    more_noise = prompts.most_units(
      encoder,
      lambda more: build(num_words, more),
      context_len,
      minimum=0,
      name=self.name,
    )
    ids = encoder.encode(build(num_words, more_noise))
    return Sample(*ids, None, references)
