"""Generates text token by token, with a cache of keys and values."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scca_jax import rope, segments, token_file
from scca_jax.llama import (
  DEFAULT_EXECUTION,
  Cache,
  Execution,
  Llama,
  Patterns,
)

# Yielded for a finished sequence.
FINISHED = -1
# Stands for a token when a logit is not finite.
_NOT_FINITE = -2
# Prompts are padded to multiples of this many tokens, so that few lengths are
# compiled.
_BUCKET = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How the next token is drawn.

  The filters apply in this order, as in transformers: temperature, `top_k`,
  `top_p`.

  Attributes:
    temperature: Divides the logits; 0 picks the likeliest token.
    top_k: Draws only from this many of the likeliest tokens; None sets no
      limit.
    top_p: Draws only from the likeliest tokens that together reach this
      probability; 1 sets no limit.
    seed: Seed of the draws.
  """

  temperature: float = 0.0
  top_k: int | None = None
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self):
    if not 0 <= self.temperature < np.inf:
      raise ValueError(
        f"temperature must be 0 or more, got {self.temperature}."
      )
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(f"top_k must be at least 1, got {self.top_k}.")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}.")


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
  """Returns the logits that tokens are drawn from, -inf where excluded.

  Args:
    logits: Float32 `[batch, vocab]`.
    sampling: With a temperature above 0.
  """
  logits = logits / sampling.temperature
  if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if sampling.top_p < 1:
    order = jnp.argsort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(
      jnp.take_along_axis(logits, order, axis=-1), axis=-1
    )
    # A token stays if the ones before it have not reached the sum yet.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    dropped = jnp.take_along_axis(
      before >= sampling.top_p, jnp.argsort(order, axis=-1), axis=-1
    )
    logits = jnp.where(dropped, -jnp.inf, logits)
  return logits


def _draw(logits: jax.Array, sampling: Sampling, draw: jax.Array) -> jax.Array:
  """Returns a token for each sequence, `[batch]`."""
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1)
  seed, step = draw
  rng = jax.random.fold_in(jax.random.key(seed), step)
  # One for each sequence, so that its draws do not depend on the rest of the
  # batch.
  rngs = jax.vmap(lambda i: jax.random.fold_in(rng, i))(
    jnp.arange(logits.shape[0])
  )
  return jax.vmap(jax.random.categorical)(rngs, filtered(logits, sampling))


@functools.partial(
  jax.jit,
  static_argnames=("graphdef", "patterns", "sampling", "execution"),
  donate_argnames=("cache",),
)
def next_tokens(
  state: Any,
  tokens: jax.Array,
  cache: Cache,
  last: jax.Array,
  starts: jax.Array | None,
  inv_freq: jax.Array,
  draw: jax.Array,
  *,
  graphdef: Any,
  patterns: Patterns,
  sampling: Sampling,
  execution: Execution,
) -> tuple[jax.Array, Cache]:
  """Returns the token after `tokens[:, last]` and the cache with `tokens`.

  The token is -2 if a logit is not finite. Randomness comes from `draw`, the
  seed and the number of the step, int32 `[2]`; the seed in `sampling`, which is
  static, is ignored.
  """
  model = nnx.merge(graphdef, state)
  length = execution.segment_len
  if starts is None and length is not None and length < tokens.shape[1]:
    hidden, cache = segments.read_prompts(
      model, tokens, cache, last, patterns, execution, inv_freq=inv_freq
    )
  else:
    hidden, cache = model.cached_hidden_states(
      tokens, cache, patterns, execution, starts=starts, inv_freq=inv_freq
    )
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
  logits = model.logits(hidden)
  drawn = _draw(logits, sampling, draw)
  is_finite = jnp.isfinite(logits).all(-1)
  return jnp.where(is_finite, drawn, _NOT_FINITE), cache


def _check(
  model: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
  if max_new_tokens < 1:
    raise ValueError(
      f"max_new_tokens must be at least 1, got {max_new_tokens}."
    )
  if not prompts:
    raise ValueError("no prompt was given: give at least one.")
  for i, prompt in enumerate(prompts):
    if not prompt:
      raise ValueError(f"prompt {i} has no tokens: give it some text.")
    token_file.check_ids(
      np.asarray(prompt), model.config.vocab_size, f"prompt {i}"
    )


class _Decoder:
  """Continues the sequences of a batch, step by step.

  Attributes:
    step: Number of the next step, counted from 0.
  """

  def __init__(
    self,
    model: Llama,
    batch: int,
    capacity: int,
    sampling: Sampling,
    execution: Execution,
  ):
    self._config = model.config
    self._cache = model.init_cache(batch, capacity, execution.mesh)
    self._graphdef, self._state = nnx.split(model)
    self._sampling = sampling
    self._execution = execution
    self.step = 0

  def next_tokens(
    self,
    tokens: np.ndarray,
    lengths: np.ndarray,
    patterns: Patterns,
    *,
    first: bool = False,
  ) -> np.ndarray:
    """Returns the token after each sequence, int32 `[batch]`.

    Args:
      tokens: Tokens that the cache does not have yet, `[batch, seq]`, padded
        after the end of a sequence.
      lengths: Length of each whole sequence in tokens, `[batch]`.
      patterns: Attention patterns for these tokens.
      first: Whether `tokens` are the whole sequences.
    """
    config = self._config
    inv_freq, _ = rope.frequencies(
      config.head_dim,
      config.rope_theta,
      config.rope_scaling,
      int(lengths.max()),
    )
    last = lengths - 1 if first else np.zeros_like(lengths)
    found, self._cache = next_tokens(
      self._state,
      jnp.asarray(tokens),
      self._cache,
      jnp.asarray(last),
      None if first else jnp.asarray(lengths - 1),
      jnp.asarray(inv_freq),
      jnp.asarray([self._sampling.seed, self.step], jnp.int32),
      graphdef=self._graphdef,
      patterns=patterns,
      sampling=dataclasses.replace(self._sampling, seed=0),
      execution=self._execution,
    )
    self.step += 1
    return np.asarray(found, np.int32)


def stream(
  model: Llama,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  sampling: Sampling | None = None,
  prefill_patterns: Patterns | None = None,
  decode_patterns: Patterns | None = None,
  eos_ids: Sequence[int] | None = None,
  execution: Execution = DEFAULT_EXECUTION,
  prompt_len: int | None = None,
) -> Iterator[np.ndarray]:
  """Yields the next token of every sequence, step by step, int32 `[batch]`.

  A sequence ends with a token of `eos_ids` and yields `FINISHED` after that.
  The iterator ends with the last sequence.

  Args:
    model: The model.
    prompts: Token ids, of any lengths.
    max_new_tokens: Maximum number of new tokens per sequence.
    sampling: How tokens are drawn; None picks the likeliest.
    prefill_patterns: Attention patterns for the prompts; None is dense.
    decode_patterns: Attention patterns for new tokens; None is dense. Both as
      in `Llama.hidden_states`, with position causality.
    eos_ids: Tokens that end a sequence; None uses the model's.
    execution: As in `Llama.cached_hidden_states`. With `segment_len` the
      prompts go through the layers that many tokens at a time.
    prompt_len: Padded length of the prompts, in tokens; None uses what the
      longest needs. Calls with the same length share a compiled program.

  Raises:
    ValueError: A prompt is empty or beyond the vocabulary, a setting is out of
      range, or a logit is not finite.
  """
  _check(model, prompts, max_new_tokens)
  eos = np.asarray(
    model.config.eos_token_ids if eos_ids is None else tuple(eos_ids), np.int64
  )
  lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
  longest = int(lengths.max())
  # Padded at the end: no token of a prompt sees the padding, and new tokens
  # overwrite it. Positions are the same as in training.
  if prompt_len is None:
    prompt_len = longest
  elif prompt_len < longest:
    raise ValueError(
      f"prompt_len must be at least the {longest} tokens of the longest prompt,"
      f" got {prompt_len}."
    )
  padded = -(-prompt_len // _BUCKET) * _BUCKET
  tokens = np.zeros((len(prompts), padded), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  decoder = _Decoder(
    model,
    len(prompts),
    -(-(prompt_len + max_new_tokens) // _BUCKET) * _BUCKET,
    Sampling() if sampling is None else sampling,
    execution,
  )
  found = decoder.next_tokens(tokens, lengths, prefill_patterns, first=True)
  finished = np.zeros(len(prompts), bool)
  for num_new in range(1, max_new_tokens + 1):
    for i in np.flatnonzero((found == _NOT_FINITE) & ~finished):
      raise ValueError(
        f"a logit of token {num_new:,} after prompt {i} is not finite: compute"
        " in bfloat16 or float32 (--dtype), or look for damaged weights."
      )
    yield np.where(finished, FINISHED, found)
    finished |= np.isin(found, eos)
    if finished.all() or num_new == max_new_tokens:
      return
    found = decoder.next_tokens(
      found[:, None], lengths + num_new, decode_patterns
    )


def generate(
  model: Llama, prompts: Sequence[Sequence[int]], **settings: Any
) -> list[list[int]]:
  """Returns the new tokens of every prompt, including one that ends it.

  Args:
    model: The model.
    prompts: Token ids, of any lengths.
    **settings: See `stream`.
  """
  results: list[list[int]] = [[] for _ in prompts]
  for tokens in stream(model, prompts, **settings):
    for result, token in zip(results, tokens, strict=True):
      if token != FINISHED:
        result.append(int(token))
  return results
