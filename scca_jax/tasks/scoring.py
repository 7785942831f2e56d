"""Scores of a model on samples, with one forward pass per sample.

The model reads the prompt and the right answer together ("teacher forcing"). It
is right if each token of the answer is the most likely one after all before it,
which is when greedy decoding would write this answer.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scca_jax import losses, sharding
from scca_jax.llama import DEFAULT_EXECUTION, Execution, Patterns
from scca_jax.tasks.task import Sample

# 95 % of a normal distribution is within this many standard deviations.
_DEVIATIONS = 1.959964
# Answers are padded to a multiple of this, so that tasks share compiled code.
_ANSWER_BUCKET = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
  """How well a model did on the samples of a task.

  Attributes:
    accuracy: Share of the samples in which every answer token is the most
      likely one.
    interval: Wilson's interval of the accuracy at 95 %.
    answer_loss: Mean loss of the answers, in nats per token.
    num_samples: Number of samples.
    by_depth: A dictionary for each depth, in ascending order: "depth",
      "accuracy", "answer_loss", "num_samples", and "distance", in tokens, if
      the task has it. Empty for tasks without a depth.
    prompts_sha256: SHA-256 of the ids of all samples.
  """

  accuracy: float
  interval: tuple[float, float]
  answer_loss: float
  num_samples: int
  by_depth: list[dict[str, float]]
  prompts_sha256: str


def wilson_interval(num_right: int, num_samples: int) -> tuple[float, float]:
  """Returns the 95 % interval of a share, after Wilson (JASA 22, 1927)."""
  z2 = _DEVIATIONS**2
  share = num_right / num_samples
  middle = share + z2 / (2 * num_samples)
  half = _DEVIATIONS * math.sqrt(
    share * (1 - share) / num_samples + z2 / (4 * num_samples**2)
  )
  scale = 1 + z2 / num_samples
  return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def prompts_sha256(samples: Iterable[Sample]) -> str:
  """Returns the SHA-256 of all ids: each list's length and ids as int32."""
  digest = hashlib.sha256()
  for sample in samples:
    for ids in (sample.prompt_ids, sample.answer_ids):
      digest.update(np.asarray([len(ids), *ids], "<i4").tobytes())
  return digest.hexdigest()


@functools.partial(
  jax.jit, static_argnames=("graphdef", "answer_len", "patterns", "execution")
)
def answer_scores(
  state: nnx.State,
  tokens: jax.Array,
  starts: jax.Array,
  *,
  graphdef: nnx.GraphDef,
  answer_len: int,
  patterns: Patterns = None,
  execution: Execution = DEFAULT_EXECUTION,
) -> tuple[jax.Array, jax.Array]:
  """Returns loss in nats and rightness of tokens, both `[batch, answer_len]`.

  Logits are computed for these tokens only.

  Args:
    state: The model's variables.
    tokens: `[batch, seq]` int32.
    starts: Position of the first answer token, `[batch]`, at least 1. Results
      beyond the end of an answer are meaningless.
    graphdef: The model's structure.
    answer_len: Tokens from `starts` on.
    patterns: See `Llama.hidden_states`.
    execution: See `Llama.hidden_states`.
  """
  mesh = execution.mesh
  state = sharding.gathered(state, mesh, leave="layers")
  tokens = sharding.constrain(tokens, mesh, "batch", "seq")
  model = nnx.merge(graphdef, state)
  hidden = model.hidden_states(tokens, patterns, execution)
  places = starts[:, None] + jnp.arange(answer_len)[None]
  places = jnp.minimum(places, tokens.shape[1] - 1)
  targets = jnp.take_along_axis(tokens, places, axis=1)
  hidden = jnp.take_along_axis(hidden, places[..., None] - 1, axis=1)
  logits = model.logits(hidden)
  loss = losses.cross_entropy(logits, targets)
  right = jnp.argmax(logits, axis=-1) == targets
  return (
    sharding.constrain(loss, mesh, None, None),
    sharding.constrain(right, mesh, None, None),
  )


def score(
  model: Any,
  samples: Iterable[Sample],
  *,
  context_len: int,
  batch_size: int = 1,
  patterns: Patterns = None,
  execution: Execution = DEFAULT_EXECUTION,
  on_samples: Callable[[int], object] | None = None,
) -> Score:
  """Returns the score of a model on the samples of a task.

  Args:
    model: A `Llama`.
    samples: From a task's `samples`.
    context_len: Length that samples are padded to at their end, in tokens.
    batch_size: Samples that are run at once.
    patterns: See `Llama.hidden_states`; None is dense.
    execution: See `Llama.hidden_states`.
    on_samples: Called after every batch with the number of its samples.

  Raises:
    ValueError: There are no samples, or one is longer than `context_len` or has
      ids outside the model's vocabulary; or a loss is not finite.
  """
  samples = list(samples)
  _check(samples, context_len, batch_size, model.config.vocab_size)
  graphdef, state = nnx.split(model)
  longest = max(len(sample.answer_ids) for sample in samples)
  answer_len = math.ceil(longest / _ANSWER_BUCKET) * _ANSWER_BUCKET
  batch_size = min(batch_size, len(samples))
  loss, right = [], []
  for begin in range(0, len(samples), batch_size):
    part = samples[begin : begin + batch_size]
    tokens = np.zeros((batch_size, context_len), np.int32)
    starts = np.ones(batch_size, np.int32)
    for row, sample in enumerate(part):
      ids = sample.prompt_ids + sample.answer_ids
      tokens[row, : len(ids)] = ids
      starts[row] = len(sample.prompt_ids)
    found = answer_scores(
      state,
      tokens,
      starts,
      graphdef=graphdef,
      answer_len=answer_len,
      patterns=patterns,
      execution=execution,
    )
    batch_loss, batch_right = map(np.asarray, found)
    for row, sample in enumerate(part):
      size = len(sample.answer_ids)
      loss.append(batch_loss[row, :size].astype(np.float64))
      right.append(bool(batch_right[row, :size].all()))
      if not np.isfinite(loss[-1]).all():
        raise ValueError(
          f"the loss is not finite in sample {begin + row}: the weights are"
          " damaged, or their dtype is too narrow."
        )
    if on_samples is not None:
      on_samples(len(part))
  return Score(
    accuracy=sum(right) / len(samples),
    interval=wilson_interval(sum(right), len(samples)),
    answer_loss=float(np.concatenate(loss).mean()),
    num_samples=len(samples),
    by_depth=_by_depth(samples, loss, right),
    prompts_sha256=prompts_sha256(samples),
  )


def _check(
  samples: Sequence[Sample], context_len: int, batch_size: int, vocab_size: int
) -> None:
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
  if not samples:
    raise ValueError("there are no samples to score.")
  for number, sample in enumerate(samples):
    ids = sample.prompt_ids + sample.answer_ids
    if not sample.prompt_ids or not sample.answer_ids:
      raise ValueError(f"sample {number} has no prompt or no answer.")
    if len(ids) > context_len:
      raise ValueError(
        f"sample {number} has {len(ids):,} tokens, more than the context_len"
        f" of {context_len:,}."
      )
    if not 0 <= min(ids) <= max(ids) < vocab_size:
      raise ValueError(
        f"sample {number} has ids outside the model's vocabulary of"
        f" {vocab_size:,}: it was made with another tokenizer."
      )


def _by_depth(
  samples: Sequence[Sample], loss: Sequence[np.ndarray], right: Sequence[bool]
) -> list[dict[str, float]]:
  by_place: dict[tuple[float, int | None], list[int]] = {}
  for number, sample in enumerate(samples):
    if sample.depth is not None:
      place = sample.depth, sample.distance
      by_place.setdefault(place, []).append(number)
  return [
    {
      "depth": depth,
      **({} if distance is None else {"distance": distance}),
      "accuracy": sum(right[i] for i in numbers) / len(numbers),
      "answer_loss": float(np.concatenate([loss[i] for i in numbers]).mean()),
      "num_samples": len(numbers),
    }
    for (depth, distance), numbers in sorted(by_place.items())
  ]
