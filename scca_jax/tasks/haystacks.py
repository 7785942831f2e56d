"""Text to hide a needle in."""

from collections.abc import Sequence

# The filler of Landmark Attention (arXiv 2305.16300), and RULER's noise.
FILLER = (
  "The grass is green.",
  "The sky is blue.",
  "The sun is yellow.",
  "Here we go.",
  "There and back again.",
)


def in_line(sentences: Sequence[str]) -> list[str]:
  """Returns the parts of a line of sentences; none if there are none."""
  parts = [f" {sentence}" for sentence in sentences]
  if parts:
    parts[0] = parts[0][1:]
    parts[-1] += "\n"
  return parts


def filler(num_sentences: int, start: int = 0) -> list[str]:
  """Returns so many sentences of the filler, from sentence `start` on."""
  return [FILLER[i % len(FILLER)] for i in range(start, start + num_sentences)]
