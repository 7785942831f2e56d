"""Softmax over keys that come in blocks, forward and backward, in float32.

Milakov and Gimelshein (arXiv 1805.02867); the backward pass recomputes the
weights from the log-sum-exp (Dao et al., arXiv 2205.14135). Scores are
`[..., queries, keys]` with any leading axes, and the subscripts of products say
how scores and values combine.
"""

from typing import Any

import jax
import jax.numpy as jnp

from scca_jax.backends.heads import finish_softmax, safe_maximum, vary_like

# Maximum and sum of the exponentials, and the weighted values: `[..., queries]`
# twice and `[..., queries, head_dim]`.
Sums = tuple[jax.Array, jax.Array, jax.Array]


def _precision(dtype: Any) -> jax.lax.Precision:
  """Requests exact float32 products, as a GPU would round operands."""
  if dtype == jnp.float32:
    return jax.lax.Precision.HIGHEST
  return jax.lax.Precision.DEFAULT


def product(
  subscripts: str, a: jax.Array, b: jax.Array, dtype: Any = jnp.float32
) -> jax.Array:
  """Returns an einsum, accumulated in float32.

  A float32 `a` is rounded to the dtype of a narrower `b`, for the matrix units
  of a GPU. On a CPU, which would only widen it again, it stays exact.

  Args:
    subscripts: As `jnp.einsum` takes them.
    a: The first operand.
    b: The second one.
    dtype: Dtype of the result.
  """

  def multiply(a: jax.Array, b: jax.Array, dtype: Any = dtype) -> jax.Array:
    return jnp.einsum(
      subscripts,
      a,
      b,
      precision=_precision(a.dtype),
      preferred_element_type=dtype,
    )

  if a.dtype == b.dtype:
    return multiply(a, b)
  return jax.lax.platform_dependent(
    a,
    b,
    cpu=lambda a, b: multiply(a, b, jnp.float32).astype(dtype),
    default=lambda a, b: multiply(a.astype(b.dtype), b),
  )


def zeros_like(x: jax.Array) -> jax.Array:
  """Returns float32 zeros that vary over a mesh like `x`."""
  return vary_like(jnp.zeros(x.shape, jnp.float32), x)


def start(query: jax.Array) -> Sums:
  """Returns the initial sums."""
  zeros = zeros_like(query)
  maximum = jnp.full(query.shape[:-1], -jnp.inf, jnp.float32)
  return vary_like(maximum, query), zeros[..., 0], zeros


def accumulate(
  sums: Sums, scores: jax.Array, value: jax.Array, subscripts: str
) -> Sums:
  """Returns the sums after another block of keys.

  Args:
    sums: The sums so far.
    scores: Scores of the block, -inf where a query does not see a key.
    value: Values of the block.
    subscripts: Product of weights and values.
  """
  maximum, total, output = sums
  new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
  base = safe_maximum(new_maximum)
  weights = jnp.exp(scores - base[..., None])
  keep = jnp.exp(maximum - base)
  part = product(subscripts, weights, value)
  return (
    new_maximum,
    keep * total + jnp.sum(weights, axis=-1),
    keep[..., None] * output + part,
  )


def finish(sums: Sums) -> tuple[jax.Array, jax.Array]:
  """Returns the output and the log-sum-exp."""
  maximum, total, output = sums
  total, log_sum = finish_softmax(safe_maximum(maximum), total)
  return output / total[..., None], log_sum


def delta(
  output: jax.Array,
  log_sum: jax.Array,
  d_output: jax.Array,
  d_log_sum: jax.Array,
) -> jax.Array:
  """Returns the common term of each query's score gradients.

  With `p` the weights, `ds = p (dp - delta)`, `delta = sum(do o) - dlse`. The
  output is float32: if one key has nearly all the weight, the gradient is a
  small difference, which a rounded output would drown.
  """
  shared = jnp.sum(d_output.astype(jnp.float32) * output, axis=-1)
  return shared - jnp.where(log_sum == -jnp.inf, 0.0, d_log_sum)


def weights_and_gradient(
  scores: jax.Array,
  log_sum: jax.Array,
  d_weights: jax.Array,
  delta: jax.Array,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns the weights of a block and the gradient of its products `q k`.

  Args:
    scores: Scores of the block, `scale` times the products.
    log_sum: Over all keys; finite, 0 for a query without keys.
    d_weights: Gradient of the weights.
    delta: See `delta`.
    scale: Factor of the scores.
  """
  weights = jnp.exp(scores - log_sum[..., None])
  return weights, scale * weights * (d_weights - delta[..., None])
