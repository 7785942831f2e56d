"""The model's linear layer, with or without an adapter."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scca_jax import quantize
from scca_jax.lora import LoraConfig, LoraParam, init_lora_a


class Linear(nnx.Module):
  """A linear map without bias, optionally with a LoRA adapter.

  Attributes:
    kernel: `[in, out]` in `param_dtype`, or quantised.
    lora_a: `[in, rank]`, float32, or None.
    lora_b: `[rank, out]`, float32, initially 0, or None.
  """

  def __init__(
    self,
    num_inputs: int,
    num_outputs: int,
    *,
    lora: LoraConfig | None = None,
    stddev: float,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Initialises the weights.

    Args:
      num_inputs: Channels of the input.
      num_outputs: Channels of the output.
      lora: The adapter; None adds no arrays.
      stddev: Standard deviation of the new kernel.
      dtype: Dtype of the computation.
      param_dtype: Dtype that the kernel is held in.
      rngs: Its stream `params` initialises the weights. The kernel does not
        depend on whether there is an adapter.
    """
    rng = rngs.params()
    self.kernel = nnx.Param(
      stddev * jax.random.normal(rng, (num_inputs, num_outputs), param_dtype)
    )
    self.dtype = jnp.dtype(dtype)
    if lora is None:
      self.scaling = self.dropout = 0.0
      self.lora_a = self.lora_b = None
    else:
      self.scaling, self.dropout = lora.scaling, lora.dropout
      self.lora_a = LoraParam(
        init_lora_a(jax.random.fold_in(rng, 1), (num_inputs, lora.rank))
      )
      self.lora_b = LoraParam(jnp.zeros((lora.rank, num_outputs), jnp.float32))

  def __call__(
    self,
    x: jax.Array,
    dropout_rng: jax.Array | None = None,
    down: jax.Array | None = None,
  ) -> jax.Array:
    """Returns `x W + scaling (dropout(x) A) B` in the compute dtype.

    Args:
      x: `[..., in]`.
      dropout_rng: Randomness of the dropout; None drops nothing.
      down: `dropout(x) A`, `[..., rank]`, if it is known.
    """
    x = x.astype(self.dtype)
    y = x @ quantize.dequantize(self.kernel[...], self.dtype)
    if self.lora_a is None or self.lora_b is None:
      return y
    if down is None:
      if self.drops(dropout_rng):
        assert dropout_rng is not None
        kept = jax.random.bernoulli(dropout_rng, 1 - self.dropout, x.shape)
        x = jnp.where(kept, x / (1 - self.dropout), 0)
      down = x @ self.lora_a[...].astype(self.dtype)
    # Scale the small matrix: scaling the product would be one more pass over
    # memory, forward and backward.
    return y + down @ (self.scaling * self.lora_b[...]).astype(self.dtype)

  def drops(self, dropout_rng: jax.Array | None) -> bool:
    """Returns whether a call with this randomness has dropout."""
    return self.dropout > 0 and dropout_rng is not None


def apply_to_one(
  maps: Sequence[Linear],
  x: jax.Array,
  dropout_rngs: Sequence[jax.Array | None],
) -> list[jax.Array]:
  """Returns the results of several maps of one input.

  `x A` of all their adapters is one product. So the gradient of `x` has one
  term from adapters; a term for each would be two passes over memory more.

  Args:
    maps: The maps.
    x: `[..., in]`.
    dropout_rngs: Randomness of each map's dropout; None drops nothing.
  """
  pairs = list(zip(maps, dropout_rngs, strict=True))
  downs: list[jax.Array | None] = [None] * len(pairs)
  first = {i: m.lora_a for i, m in enumerate(maps) if m.lora_a is not None}
  if len(first) > 1 and not any(m.drops(rng) for m, rng in pairs):
    dtype = maps[0].dtype
    joined = jnp.concatenate(
      [a[...].astype(dtype) for a in first.values()], axis=1
    )
    ends = np.cumsum([a.shape[1] for a in first.values()])[:-1]
    parts = jnp.split(x.astype(dtype) @ joined, ends, axis=-1)
    for i, part in zip(first, parts, strict=True):
      downs[i] = part
  return [m(x, rng, down) for (m, rng), down in zip(pairs, downs, strict=True)]
