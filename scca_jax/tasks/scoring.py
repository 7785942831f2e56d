"""Scores of a model on samples, with one forward pass per sample.

The model reads the prompt and the right answer together ("teacher forcing"). It
is right if each token of the answer is the most likely one given all tokens
before it, so that greedy decoding would write this answer.

RULER instead lets the model write and looks for the references in its text
(`generated_credits`).
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scca_jax import generation, losses, sharding
from scca_jax.llama import DEFAULT_EXECUTION, Execution, Patterns
from scca_jax.tasks.task import Sample, Task
from scca_jax.tokenizer import Tokenizer

# 95 % of a normal distribution is within this many standard deviations.
_DEVIATIONS = 1.959964
# Answers are padded to a multiple of this, so that tasks share compiled code.
_ANSWER_BUCKET = 128
# Tokens of each answer whose logits are held at once.
_LOGITS_CHUNK = 16


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
    ruler_score: Mean share of the references in generated text, the only score
      here that is comparable with RULER's; None if nothing was generated.
    ruler_interval: Its interval, from `wilson_interval`.
  """

  accuracy: float
  interval: tuple[float, float]
  answer_loss: float
  num_samples: int
  by_depth: list[dict[str, float]]
  prompts_sha256: str
  ruler_score: float | None = None
  ruler_interval: tuple[float, float] | None = None


class Answer(NamedTuple):
  """How well a model predicted the answer of a sample.

  Attributes:
    loss: Loss of each token, in nats, `[answer]` float64.
    hits: Whether each token was the most likely one, `[answer]` bool.
  """

  loss: np.ndarray
  hits: np.ndarray

  @property
  def right(self) -> bool:
    """Whether all tokens were."""
    return bool(self.hits.all())


def wilson_interval(num_right: float, num_samples: int) -> tuple[float, float]:
  """Returns the 95 % interval of a share, after Wilson (JASA 22, 1927).

  Args:
    num_right: With partial credit, the sum of the shares; the interval is then
      wider than necessary.
    num_samples: Number of samples.
  """
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
  """Returns the loss of tokens in nats and whether each was the most likely.

  Both are `[batch, answer_len]`.

  Logits are computed for these tokens only.

  Args:
    state: The model's variables.
    tokens: `[batch, seq]` int32.
    starts: Position of the first answer token, `[batch]`, at least 1. Results
      beyond the end of an answer are meaningless.
    graphdef: The model's structure.
    answer_len: Number of tokens, starting at `starts`.
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

  def of_token(token):
    hidden, targets = token
    logits = model.logits(hidden)
    hits = jnp.argmax(logits, axis=-1) == targets
    return losses.cross_entropy(logits, targets), hits

  loss, hits = jax.lax.map(
    of_token,
    (jnp.moveaxis(hidden, 1, 0), targets.T),
    batch_size=min(_LOGITS_CHUNK, answer_len),
  )
  return (
    sharding.constrain(loss.T, mesh, None, None),
    sharding.constrain(hits.T, mesh, None, None),
  )


def answers(
  model: Any,
  samples: Sequence[Sample],
  *,
  context_len: int,
  batch_size: int = 1,
  patterns: Patterns = None,
  execution: Execution = DEFAULT_EXECUTION,
  on_samples: Callable[[int], object] | None = None,
) -> list[Answer]:
  """Returns how well a model predicts the answer of each sample.

  Args:
    model: A `Llama`.
    samples: From a task's `samples`.
    context_len: Length that samples are padded to at their end, in tokens.
    batch_size: Maximum number of samples per batch.
    patterns: See `Llama.hidden_states`; None is dense.
    execution: See `Llama.hidden_states`.
    on_samples: Called after every batch with the number of its samples.

  Raises:
    ValueError: There are no samples, or one is longer than `context_len` or has
      ids outside the model's vocabulary; or a loss is not finite.
  """
  _check(samples, context_len, batch_size, model.config.vocab_size)
  graphdef, state = nnx.split(model)
  longest = max(len(sample.answer_ids) for sample in samples)
  answer_len = math.ceil(longest / _ANSWER_BUCKET) * _ANSWER_BUCKET
  batch_size = min(batch_size, len(samples))
  if execution.mesh is None:
    # The same number of batches, but of equal sizes, so that the last has no
    # empty rows.
    num_batches = math.ceil(len(samples) / batch_size)
    batch_size = math.ceil(len(samples) / num_batches)

  def run():
    for begin in range(0, len(samples), batch_size):
      part = samples[begin : begin + batch_size]
      tokens = np.zeros((batch_size, context_len), np.int32)
      starts = np.ones(batch_size, np.int32)
      for row, sample in enumerate(part):
        ids = sample.prompt_ids + sample.answer_ids
        tokens[row, : len(ids)] = ids
        starts[row] = len(sample.prompt_ids)
      yield (
        part,
        answer_scores(
          state,
          tokens,
          starts,
          graphdef=graphdef,
          answer_len=answer_len,
          patterns=patterns,
          execution=execution,
        ),
      )

  results = []
  for part, found in _one_ahead(run()):
    batch_loss, batch_hits = map(np.asarray, found)
    for row, sample in enumerate(part):
      size = len(sample.answer_ids)
      loss = batch_loss[row, :size].astype(np.float64)
      if not np.isfinite(loss).all():
        raise ValueError(
          f"the loss is not finite in sample {len(results)}: the weights are"
          " damaged, or their dtype is too narrow."
        )
      results.append(Answer(loss, batch_hits[row, :size]))
    if on_samples is not None:
      on_samples(len(part))
  return results


def _one_ahead(items: Iterable[Any]) -> Iterator[Any]:
  """Yields each item once the next one is made.

  This way the device computes a batch while the host prepares the next.
  """
  waiting = []
  for item in items:
    waiting.append(item)
    if len(waiting) > 1:
      yield waiting.pop(0)
  yield from waiting


def generated_credits(
  model: Any,
  task: Task,
  tokenizer: Tokenizer,
  samples: Sequence[Sample],
  *,
  batch_size: int = 1,
  patterns: Patterns = None,
  execution: Execution = DEFAULT_EXECUTION,
) -> list[float]:
  """Returns the share of the references that the model writes, by sample.

  Decoding is greedy, for at most as many tokens as RULER allows.

  Args:
    model: A `Llama`.
    task: The task of the samples.
    tokenizer: The tokenizer that they were made with.
    samples: From the task's `samples`.
    batch_size: Samples per batch.
    patterns: Pattern for prompts and new tokens; None is dense.
    execution: See `generation.stream`.

  Raises:
    ValueError: See `generation.stream`.
  """
  ends = set(model.config.eos_token_ids)
  credits = []
  for begin in range(0, len(samples), batch_size):
    part = samples[begin : begin + batch_size]
    written = generation.generate(
      model,
      [sample.prompt_ids for sample in part],
      max_new_tokens=task.max_new_tokens,
      prefill_patterns=patterns,
      decode_patterns=patterns,
      execution=execution,
    )
    for sample, ids in zip(part, written, strict=True):
      text = tokenizer.decode([i for i in ids if i not in ends])
      credits.append(task.match(text, sample.references))
  return credits


def score(
  model: Any,
  samples: Iterable[Sample],
  *,
  credits: Sequence[float] | None = None,
  **settings: Any,
) -> Score:
  """Returns the score of a model on the samples of a task.

  Args:
    model: A `Llama`.
    samples: From a task's `samples`.
    credits: From `generated_credits`, if the model also wrote answers.
    **settings: See `answers`.
  """
  samples = list(samples)
  found = answers(model, samples, **settings)
  num_right = sum(answer.right for answer in found)
  by_depth = _by_depth(samples, found, credits)
  return Score(
    accuracy=num_right / len(samples),
    interval=wilson_interval(num_right, len(samples)),
    answer_loss=float(np.concatenate([a.loss for a in found]).mean()),
    num_samples=len(samples),
    by_depth=by_depth,
    prompts_sha256=prompts_sha256(samples),
    ruler_score=None if credits is None else sum(credits) / len(samples),
    ruler_interval=(
      None if credits is None else wilson_interval(sum(credits), len(samples))
    ),
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
  samples: Sequence[Sample],
  found: Sequence[Answer],
  credits: Sequence[float] | None,
) -> list[dict[str, float]]:
  by_place: dict[tuple[float, int | None], list[int]] = {}
  for number, sample in enumerate(samples):
    if sample.depth is not None:
      place = sample.depth, sample.distance
      by_place.setdefault(place, []).append(number)
  entries = []
  for (depth, distance), numbers in sorted(by_place.items()):
    entry: dict[str, float] = {"depth": depth}
    if distance is not None:
      entry["distance"] = distance
    entry["accuracy"] = sum(found[i].right for i in numbers) / len(numbers)
    loss = np.concatenate([found[i].loss for i in numbers])
    entry["answer_loss"] = float(loss.mean())
    if credits is not None:
      entry["ruler_score"] = sum(credits[i] for i in numbers) / len(numbers)
    entry["num_samples"] = len(numbers)
    entries.append(entry)
  return entries
