"""The training loss: next-token cross-entropy that never holds all logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def cross_entropy(
  logits: jax.Array, targets: jax.Array, mask: jax.Array
) -> jax.Array:
  """Returns the summed cross-entropy of the targets, in nats.

  Args:
    logits: `[..., vocab]`, any float dtype; read in float32.
    targets: Token ids, `[...]`, int32.
    mask: Weight of each target, `[...]`, float32; 0 leaves it out.

  Returns:
    A float32 scalar: the sum over targets, weighted by `mask`.
  """
  logits = logits.astype(jnp.float32)
  normalizer = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jnp.sum((normalizer - picked) * mask)


def chunked_cross_entropy(
  to_logits: Callable[[jax.Array], jax.Array],
  hidden: jax.Array,
  targets: jax.Array,
  mask: jax.Array,
  chunk_len: int,
) -> jax.Array:
  """Returns `cross_entropy` of `to_logits(hidden)`, `chunk_len` tokens a time.

  The logits of a chunk live only while that chunk is summed, in the backward
  pass too, where they are computed anew: `[batch, chunk_len, vocab]` float32 in
  place of `[batch, seq, vocab]`.

  Args:
    to_logits: Maps hidden states `[batch, n, hidden]` to logits
      `[batch, n, vocab]`.
    hidden: `[batch, seq, hidden]`.
    targets: `[batch, seq]`, int32.
    mask: `[batch, seq]`, float32.
    chunk_len: Tokens of each sequence whose logits are held at once; the last
      chunk may be shorter.

  Returns:
    A float32 scalar: the sum over targets, weighted by `mask`.

  Raises:
    ValueError: `chunk_len` is below 1.
  """
  if chunk_len < 1:
    raise ValueError(f"chunk_len must be at least 1, got {chunk_len}.")
  batch, seq_len, _ = hidden.shape

  @jax.checkpoint
  def loss_of(chunk):
    chunk_hidden, chunk_targets, chunk_mask = chunk
    return cross_entropy(to_logits(chunk_hidden), chunk_targets, chunk_mask)

  num_chunks, rest = divmod(seq_len, chunk_len)
  whole = num_chunks * chunk_len
  total = jnp.zeros((), jnp.float32)
  if num_chunks:
    chunks = tuple(
      jnp.moveaxis(
        array[:, :whole].reshape(
          batch, num_chunks, chunk_len, *array.shape[2:]
        ),
        1,
        0,
      )
      for array in (hidden, targets, mask)
    )

    def add(total, chunk):
      return total + loss_of(chunk), None

    total, _ = jax.lax.scan(add, total, chunks)
  if rest:
    total += loss_of(tuple(a[:, whole:] for a in (hidden, targets, mask)))
  return total
