"""The loss against log-softmax written out, whole and in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scca_jax import losses


def _draw(batch=2, seq=13, hidden=4, vocab=7):
  rng = np.random.default_rng(0)
  return (
    rng.normal(size=(batch, seq, hidden)).astype(np.float32),
    rng.normal(size=(hidden, vocab)).astype(np.float32),
    rng.integers(0, vocab, (batch, seq)).astype(np.int32),
    (rng.random((batch, seq)) < 0.8).astype(np.float32),
  )


def _expected(hidden, head, targets, mask):
  total = 0.0
  logits = hidden.astype(np.float64) @ head
  for row, targets_row, mask_row in zip(logits, targets, mask, strict=True):
    for token, target, weight in zip(row, targets_row, mask_row, strict=True):
      total += weight * (np.log(np.exp(token).sum()) - token[target])
  return total


def test_cross_entropy_is_that_of_each_target():
  hidden, head, targets, mask = _draw()
  found = losses.cross_entropy(jnp.asarray(hidden @ head), targets)
  np.testing.assert_allclose(
    jnp.sum(found * mask), _expected(hidden, head, targets, mask), rtol=1e-6
  )


@pytest.mark.parametrize("chunk_len", [1, 4, 13, 50])
def test_chunks_change_neither_loss_nor_gradient(chunk_len):
  hidden, head, targets, mask = _draw()

  def whole(hidden, head):
    return jnp.sum(losses.cross_entropy(hidden @ head, targets) * mask)

  def chunked(hidden, head):
    found = losses.token_losses(lambda h: h @ head, hidden, targets, chunk_len)
    return jnp.sum(found * mask)

  expected = jax.value_and_grad(whole, (0, 1))(hidden, head)
  got = jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden, head)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)


def test_float16_logits_are_read_in_float32():
  logits = jnp.full((1, 1, 40_000), 8.0, jnp.float16)
  zeros = jnp.zeros((1, 1), jnp.int32)
  (loss,) = losses.cross_entropy(logits, zeros)[0]
  # The sum of 40,000 times exp(8) is far beyond float16's range.
  np.testing.assert_allclose(loss, np.log(40_000), rtol=1e-6)


def test_small_probabilities_count_in_float16():
  rng = np.random.default_rng(0)
  head = rng.normal(size=(8, 1000)).astype(np.float16)
  # Only the target's logit is large: all others have probabilities of 3e-8,
  # half of float16's smallest number, but together move the gradient.
  hidden = np.eye(8, dtype=np.float16)[None, :1] * 4
  head[0] = 0
  head[0, 5] = 17.3 / 4
  targets = np.full((1, 1), 5, np.int32)

  def gradient(losses_of, dtype):
    def loss(hidden):
      return 2.0**15 * jnp.sum(losses_of(hidden, head.astype(dtype)))

    return jax.grad(loss)(jnp.asarray(hidden, dtype))

  def chunked(hidden, head):
    return losses.token_losses(lambda h: h @ head, hidden, targets, 1)

  def whole(hidden, head):
    return losses.cross_entropy(hidden @ head, targets)

  expected = gradient(whole, np.float32)
  np.testing.assert_allclose(
    gradient(chunked, np.float16), expected, rtol=1e-2, atol=1e-2
  )


def test_a_chunk_of_nothing_is_refused():
  hidden, head, targets, _ = _draw()
  with pytest.raises(ValueError, match="chunk_len.*0"):
    losses.token_losses(lambda h: h @ head, hidden, targets, 0)
