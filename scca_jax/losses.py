"""Next-token cross-entropy for training and evaluation, in bounded memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Factor of gradients before the backward pass brings the loss scale: in float16
# small probabilities would become 0. A power of 2 rounds nothing.
_SCALE = 1024.0


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


def _chunk_losses(
  to_logits: Callable[..., jax.Array],
  hidden: jax.Array,
  targets: jax.Array,
  head: tuple[jax.Array, ...],
) -> jax.Array:
  """Returns the losses of a chunk; its forward pass computes the gradient.

  The loss of a token depends only on its own hidden state, so the gradient of
  each can be computed while its logits are there, and multiplied by what the
  backward pass brings. The logits are computed again only for the gradient of
  the output head, if that is trained; otherwise the compiler drops it.

  Args:
    to_logits: Maps hidden states and `head` to logits.
    hidden: `[batch, n, hidden]`.
    targets: `[batch, n]`.
    head: The output head.
  """
  return cross_entropy(to_logits(hidden, *head), targets)


_chunk_losses = jax.custom_vjp(_chunk_losses, nondiff_argnums=(0,))


def _gradient_of_logits(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Returns `_SCALE` times the gradient of each target's loss, float32."""
  # Elementwise, unlike the gradient of `take_along_axis`, so that it is one
  # pass over the logits.
  probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
  is_target = jax.nn.one_hot(targets, logits.shape[-1], dtype=jnp.float32)
  return _SCALE * (probabilities - is_target)


def _save(to_logits, hidden, targets, head):
  logits, pull = jax.vjp(lambda x: to_logits(x, *head), hidden)
  (d_hidden,) = pull(_gradient_of_logits(logits, targets).astype(logits.dtype))
  saved = (d_hidden, hidden, targets, head)
  return cross_entropy(logits, targets), saved


def _backward(to_logits, saved, d_losses):
  d_hidden, hidden, targets, head = saved
  logits, pull = jax.vjp(lambda *head: to_logits(hidden, *head), *head)
  factors = d_losses[..., None] / _SCALE
  d_logits = _gradient_of_logits(logits, targets) * factors
  d_head = pull(d_logits.astype(logits.dtype))
  return (d_hidden * factors).astype(d_hidden.dtype), None, d_head


_chunk_losses.defvjp(_save, _backward)


def token_losses(
  to_logits: Callable[[jax.Array], jax.Array],
  hidden: jax.Array,
  targets: jax.Array,
  chunk_len: int,
) -> jax.Array:
  """Returns `cross_entropy(to_logits(hidden), targets)`, chunk by chunk.

  The logits of a chunk, float32 `[batch, chunk_len, vocab]`, live only while
  its losses and their gradient are computed; if the output head is trained, the
  backward pass recomputes them.

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

  def losses_of(chunk):
    chunk_hidden, chunk_targets = chunk
    # What the function closes over, so that it gets its gradient.
    with_head, head = jax.closure_convert(to_logits, chunk_hidden)
    return _chunk_losses(with_head, chunk_hidden, chunk_targets, tuple(head))

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
