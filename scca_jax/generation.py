"""Text from a model, token by token, with a cache of keys and values."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scca_jax import patterns as patterns_lib
from scca_jax import rope
from scca_jax.llama import Cache, Llama, Patterns

# What a finished sequence yields.
FINISHED = -1
# Prompts are padded to multiples, so that few lengths are compiled, in tokens.
_BUCKET = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How the next token is drawn.

  The filters apply in this order, as in transformers: temperature, `top_k`,
  `top_p`.

  Attributes:
    temperature: Divides the logits; 0 takes the likeliest token.
    top_k: Only this many of the likeliest tokens; None has no limit.
    top_p: Only the likeliest tokens that together reach this probability;
      1 has no limit.
    seed: Of the randomness.
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
  """Returns the logits that tokens are drawn from, -inf where none may be.

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
    # A token stays if those before it do not reach the sum yet.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    dropped = jnp.take_along_axis(
      before >= sampling.top_p, jnp.argsort(order, axis=-1), axis=-1
    )
    logits = jnp.where(dropped, -jnp.inf, logits)
  return logits


def _draw(logits: jax.Array, sampling: Sampling, step: jax.Array) -> jax.Array:
  """Returns a token for each sequence, `[batch]`."""
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1)
  key = jax.random.fold_in(jax.random.key(sampling.seed), step)
  # A key a sequence: the others of a batch do not change what it draws.
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(
    jnp.arange(logits.shape[0])
  )
  return jax.vmap(jax.random.categorical)(keys, filtered(logits, sampling))


@functools.partial(
  jax.jit,
  static_argnames=("graphdef", "patterns", "sampling", "implementation"),
  donate_argnames=("cache",),
)
def next_tokens(
  state: Any,
  tokens: jax.Array,
  cache: Cache,
  last: jax.Array,
  starts: jax.Array | None,
  inv_freq: jax.Array,
  step: jax.Array,
  *,
  graphdef: Any,
  patterns: Patterns,
  sampling: Sampling,
  implementation: str | None,
) -> tuple[jax.Array, Cache]:
  """Returns the token after `tokens[:, last]` and the cache with `tokens`."""
  model = nnx.merge(graphdef, state)
  hidden, cache = model.cached_hidden_states(
    tokens,
    cache,
    patterns=patterns,
    starts=starts,
    inv_freq=inv_freq,
    implementation=implementation,
  )
  hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
  return _draw(model.logits(hidden), sampling, step), cache


def _check(
  model: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
  if max_new_tokens < 1:
    raise ValueError(
      f"max_new_tokens must be at least 1, got {max_new_tokens}."
    )
  if not prompts:
    raise ValueError("there is no prompt.")
  for i, prompt in enumerate(prompts):
    if not prompt:
      raise ValueError(f"prompt {i} has no token: give it some text.")
    if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
      raise ValueError(
        f"prompt {i} has ids outside the vocabulary of"
        f" {model.config.vocab_size} tokens."
      )


def stream(
  model: Llama,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  sampling: Sampling | None = None,
  prefill_patterns: Patterns | None = None,
  decode_patterns: Patterns | None = None,
  eos_ids: Sequence[int] | None = None,
  implementation: str | None = None,
) -> Iterator[np.ndarray]:
  """Yields the next token of every sequence, step by step, int32 `[batch]`.

  A sequence ends with a token of `eos_ids`; from then on it yields `FINISHED`.
  The iterator ends with the last sequence.

  Args:
    model: The model.
    prompts: Token ids, of any lengths.
    max_new_tokens: Most tokens a sequence gets.
    sampling: How tokens are drawn; None takes the likeliest.
    prefill_patterns: Attention among the tokens of the prompts; None is dense.
    decode_patterns: Attention of new tokens; None is dense. Both as in
      `Llama.hidden_states`, with position causality.
    eos_ids: Tokens that end a sequence; None takes the model's.
    implementation: Attention back end; None takes the best for the device.

  Raises:
    ValueError: A prompt is empty or beyond the vocabulary, or a setting is out
      of range.
  """
  _check(model, prompts, max_new_tokens)
  config = model.config
  sampling = Sampling() if sampling is None else sampling
  dense = patterns_lib.dense(config.num_heads)
  eos = np.asarray(
    config.eos_token_ids if eos_ids is None else tuple(eos_ids), np.int64
  )
  lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
  longest = int(lengths.max())
  # Padded at their ends, which no token of a prompt sees and new tokens
  # overwrite: positions stay what they are in training.
  padded = -(-longest // _BUCKET) * _BUCKET
  tokens = np.zeros((len(prompts), padded), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  capacity = -(-(longest + max_new_tokens) // _BUCKET) * _BUCKET
  graphdef, state = nnx.split(model)

  def run(tokens, cache, last, starts, patterns, seq_len, step):
    inv_freq, _ = rope.frequencies(
      config.head_dim, config.rope_theta, config.rope_scaling, seq_len
    )
    return next_tokens(
      state,
      jnp.asarray(tokens),
      cache,
      jnp.asarray(last),
      None if starts is None else jnp.asarray(starts),
      jnp.asarray(inv_freq),
      jnp.asarray(step, jnp.int32),
      graphdef=graphdef,
      patterns=dense if patterns is None else patterns,
      sampling=sampling,
      implementation=implementation,
    )

  new, cache = run(
    tokens,
    model.init_cache(len(prompts), capacity),
    lengths - 1,
    None,
    prefill_patterns,
    longest,
    0,
  )
  finished = np.zeros(len(prompts), bool)
  first = np.zeros(len(prompts), np.int32)
  for step in range(1, max_new_tokens + 1):
    found = np.asarray(new, np.int32)
    yield np.where(finished, FINISHED, found)
    finished |= np.isin(found, eos)
    if finished.all() or step == max_new_tokens:
      return
    new, cache = run(
      found[:, None],
      cache,
      first,
      lengths + step - 1,
      decode_patterns,
      longest + step,
      step,
    )


def generate(
  model: Llama, prompts: Sequence[Sequence[int]], **settings: Any
) -> list[list[int]]:
  """Returns the new tokens of every prompt, the one that ended it included.

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
