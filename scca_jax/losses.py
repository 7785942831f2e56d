"""Next-token cross-entropy for training and evaluation, in bounded memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Returns the cross-entropy of each target in nats, float32 `[...]`.

  Args:
    logits: `[..., vocab]`, any float dtype; read in float32.
    targets: Token ids, `[...]`, int32.
  """
  logits = logits.astype(jnp.float32)
  normalizer = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return normalizer - picked


def token_losses(
  to_logits: Callable[[jax.Array], jax.Array],
  hidden: jax.Array,
  targets: jax.Array,
  chunk_len: int,
) -> jax.Array:
  """Returns `cross_entropy(to_logits(hidden), targets)`, chunk by chunk.

  The logits of a chunk, float32 `[batch, chunk_len, vocab]`, live only while
  its losses are computed; the backward pass recomputes them.

  Args:
    to_logits: Maps hidden states `[batch, n, hidden]` to logits
      `[batch, n, vocab]`.
    hidden: `[batch, seq, hidden]`.
    targets: `[batch, seq]`, int32.
    chunk_len: How many tokens of each sequence have their logits in memory at
      once; the last chunk may be shorter.

  Returns:
    The loss of each target in nats, float32 `[batch, seq]`.

  Raises:
    ValueError: `chunk_len` is below 1.
  """
  if chunk_len < 1:
    raise ValueError(f"chunk_len must be at least 1, got {chunk_len}.")
  batch, seq_len = targets.shape
  num_chunks, rest = divmod(seq_len, chunk_len)
  whole = num_chunks * chunk_len

  @jax.checkpoint
  def losses_of(chunk):
    chunk_hidden, chunk_targets = chunk
    return cross_entropy(to_logits(chunk_hidden), chunk_targets)

  parts = []
  if num_chunks:
    chunks = tuple(
      jnp.moveaxis(
        array[:, :whole].reshape(
          batch, num_chunks, chunk_len, *array.shape[2:]
        ),
        1,
        0,
      )
      for array in (hidden, targets)
    )
    found = jax.lax.map(losses_of, chunks)  # [chunks, batch, chunk_len]
    parts.append(jnp.moveaxis(found, 0, 1).reshape(batch, whole))
  if rest:
    parts.append(losses_of((hidden[:, whole:], targets[:, whole:])))
  return jnp.concatenate(parts, axis=1)
