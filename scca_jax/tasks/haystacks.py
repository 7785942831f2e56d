"""Text to hide needles in, and words to make needles of.

RULER downloads essays and takes words from a package. We use the embedded books
for both **[ours]**: sentences of the test books, since models may have been
tuned on the others, and words of the tuning books.
"""

import collections
import functools
import re
from collections.abc import Sequence

import numpy as np

from scca_jax import assets, documents

# The filler of Landmark Attention (arXiv 2305.16300), and RULER's noise.
FILLER = (
  " The grass is green.",
  " The sky is blue.",
  " The sun is yellow.",
  " Here we go.",
  " There and back again.",
)
# A word must occur in this many of the 12 tuning books.
_NUM_BOOKS = 4
_WORD = re.compile(r"(?<![\w'-])[a-z]{4,10}(?![\w'-])")
_LEFT_OUT = re.compile("negro|nigg")
# The end of a sentence, but not of a title or an initial.
_SENTENCE_END = re.compile(
  r"""(?<=[.!?])(?<!\bMr.)(?<!\bMrs.)(?<!\bDr.)(?<!\bSt.)(?<!\b[A-Z].)["')]*"""
  r"""\s+(?=["'(]*[A-Z])"""
)


def line(parts: Sequence[str]) -> list[str]:
  """Returns the parts of a line of text; none if there are none.

  Args:
    parts: Each begins with a space; the first loses it.
  """
  parts = list(parts)
  if parts:
    parts[0] = parts[0][1:]
    parts[-1] += "\n"
  return parts


def filler(num_sentences: int) -> list[str]:
  """Returns sentences of the filler; each begins with a space."""
  whole, rest = divmod(num_sentences, len(FILLER))
  return [*FILLER * whole, *FILLER[:rest]]


def filler_lines(num_sentences: int) -> list[list[str]]:
  """Returns the filler in lines of five sentences; the last may have fewer."""
  step = len(FILLER)
  return [
    line(filler(min(step, num_sentences - start)))
    for start in range(0, num_sentences, step)
  ]


@functools.cache
def books() -> tuple[str, ...]:
  """Returns the test books, with each run of white space as one space."""
  texts = documents.read_documents(assets.BOOKS_TEST)
  return tuple(" ".join(text.split()) for text in texts)


@functools.cache
def sentences() -> tuple[str, ...]:
  """Returns the sentences of all test books; each begins with a space."""
  found = []
  for book in books():
    start = 0
    for end in _SENTENCE_END.finditer(book):
      found.append(f" {book[start : end.end()].rstrip()}")
      start = end.end()
    found.append(f" {book[start:]}")
  return tuple(found)


def essay(num_sentences: int, start: int) -> list[str]:
  """Returns consecutive sentences of the test books, which wrap around."""
  all_sentences = sentences()
  whole, rest = divmod(num_sentences, len(all_sentences))
  turned = all_sentences[start:] + all_sentences[:start]
  return [*turned * whole, *turned[:rest]]


@functools.cache
def words() -> tuple[str, ...]:
  """Returns some 8,000 ordinary English words, in alphabetical order.

  They have 4 to 10 lower-case letters and occur in several tuning books.
  """
  count = collections.Counter()
  for text in documents.read_documents(assets.BOOKS_TUNE):
    count.update(set(_WORD.findall(text)))
  return tuple(
    sorted(
      word
      for word, num_books in count.items()
      if num_books >= _NUM_BOOKS and not _LEFT_OUT.match(word)
    )
  )


def shuffled_words(rng: np.random.Generator) -> list[str]:
  """Returns all words in a random order."""
  return [words()[i] for i in rng.permutation(len(words()))]
