"""The loss on a repeated segment, by the distance of the repetition **[ours]**.

A text is interrupted twice by the same segment of another text. The loss on the
second occurrence, after a few tokens that identify it, tells whether the model
can copy over that distance.
"""

import functools

import numpy as np

from scca_jax.tasks import haystacks, prompts
from scca_jax.tasks.task import Sample, Task

_SEGMENT_LEN = 128
# Tokens of the second occurrence that belong to the prompt.
_NUM_GIVEN = 8


class Copy(Task):
  """A segment that occurs twice.

  The two are 128, 256, 512, … tokens apart, or as far as the context allows.
  The score is the loss, because a model rarely gets all 120 tokens right.
  """

  name = "copy"
  scored_by_loss = True
  max_new_tokens = _SEGMENT_LEN - _NUM_GIVEN

  def draw(
    self,
    encoder: prompts.Encoder,
    context_len: int,
    depth: int,
    rng: np.random.Generator,
  ) -> Sample:
    """Returns a sample; `depth` chooses among the distances."""
    begin = len(encoder.bos)
    farthest = context_len - begin - _SEGMENT_LEN
    if farthest < _SEGMENT_LEN:
      raise ValueError(
        f"{self.name} needs a context_len of at least"
        f" {begin + 2 * _SEGMENT_LEN:,} tokens, got {context_len:,}."
      )
    distances = [farthest]
    while (near := _SEGMENT_LEN << len(distances) - 1) < farthest:
      distances.insert(1, near)
    distance = distances[depth * len(distances) // 101]
    books = _books(encoder)
    book, other = rng.permutation(len(books))[:2]
    segment = _part(books[other], _SEGMENT_LEN, rng)
    text = _part(books[book], farthest - _SEGMENT_LEN, rng)
    place = farthest - distance
    ids = [
      *encoder.bos,
      *text[:place],
      *segment,
      *text[place:],
      *segment,
    ]
    num_answers = _SEGMENT_LEN - _NUM_GIVEN
    return Sample(
      ids[:-num_answers],
      ids[-num_answers:],
      place / max(farthest - _SEGMENT_LEN, 1),
      (encoder.tokenizer.decode(ids[-num_answers:]),),
      distance,
    )


@functools.lru_cache(maxsize=4)
def _books(encoder: prompts.Encoder) -> list[np.ndarray]:
  """Returns the ids of each test book."""
  return [
    np.asarray(ids, np.int32)
    for ids in encoder.tokenizer.encode_batch(haystacks.books())
  ]


def _part(
  ids: np.ndarray, num_tokens: int, rng: np.random.Generator
) -> list[int]:
  """Returns consecutive ids from a random place; the text wraps around."""
  return np.resize(np.roll(ids, -rng.integers(len(ids))), num_tokens).tolist()
