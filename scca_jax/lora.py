"""Low-rank adapters (LoRA, arXiv 2106.09685) and what a run trains."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from scca_jax import quantize

TARGETS = (
  "q_proj",
  "k_proj",
  "v_proj",
  "o_proj",
  "gate_proj",
  "up_proj",
  "down_proj",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """Adapters, and what is trained beside them; the defaults are LongLoRA's.

  Attributes:
    rank: Inner size of the adapters.
    alpha: The adapter's output is multiplied by `alpha / rank`.
    dropout: Share of the adapter's inputs that training drops.
    targets: Names of the adapted projections, from `TARGETS`.
    rslora: Whether the factor is `alpha / sqrt(rank)` (arXiv 2312.03732).
    train_embeddings: Whether embeddings and output head are trained too.
    train_norms: Whether the norms are trained too. With both, this is the
      LoRA+ of LongLoRA (arXiv 2309.12307).
  """

  rank: int = 8
  alpha: float = 16.0
  dropout: float = 0.0
  targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
  rslora: bool = False
  train_embeddings: bool = True
  train_norms: bool = True

  def __post_init__(self):
    if self.rank < 1:
      raise ValueError(f"the rank of LoRA must be at least 1, got {self.rank}.")
    if not self.alpha > 0:
      raise ValueError(f"alpha of LoRA must be above 0, got {self.alpha}.")
    if not 0 <= self.dropout < 1:
      raise ValueError(
        f"dropout of LoRA must lie in [0, 1), got {self.dropout}."
      )
    if not isinstance(self.targets, tuple) or not self.targets:
      raise ValueError(
        "targets of LoRA must be a tuple of at least one of"
        f" {', '.join(TARGETS)}, got {self.targets!r}."
      )
    for name in self.targets:
      if name not in TARGETS:
        raise ValueError(
          f"unknown LoRA target {name!r}: use any of {', '.join(TARGETS)}."
        )

  @property
  def scaling(self) -> float:
    """What the adapter's output is multiplied by."""
    return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraParam(nnx.Param):
  """A matrix of an adapter."""


def init_lora_a(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns the first matrix of new adapters, as PEFT draws it.

  That is `kaiming_uniform` with `a = sqrt(5)`: uniform within the inverse
  square root of the number of inputs.

  Args:
    key: Randomness.
    shape: `[..., in, rank]`.
  """
  bound = shape[-2] ** -0.5
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


class Linear(nnx.Module):
  """A linear map without bias, with a LoRA adapter if it has one.

  Attributes:
    kernel: `[in, out]` in `param_dtype`, or a quantised one.
    lora_a: `[in, rank]`, float32, or None.
    lora_b: `[rank, out]`, float32, 0 at first, or None.
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
    """Draws the weights.

    Args:
      num_inputs: Channels of the input.
      num_outputs: Channels of the output.
      lora: The adapter; None has no arrays for it.
      stddev: Standard deviation of the kernel at first.
      dtype: Dtype of the computation.
      param_dtype: Dtype that the kernel is held in.
      rngs: Its stream `params` draws the weights. The kernel does not depend
        on whether there is an adapter.
    """
    key = rngs.params()
    self.kernel = nnx.Param(
      stddev * jax.random.normal(key, (num_inputs, num_outputs), param_dtype)
    )
    self.dtype = jnp.dtype(dtype)
    if lora is None:
      self.scaling = self.dropout = 0.0
      self.lora_a = self.lora_b = None
    else:
      self.scaling, self.dropout = lora.scaling, lora.dropout
      self.lora_a = LoraParam(
        init_lora_a(jax.random.fold_in(key, 1), (num_inputs, lora.rank))
      )
      self.lora_b = LoraParam(jnp.zeros((lora.rank, num_outputs), jnp.float32))

  def __call__(
    self, x: jax.Array, dropout_key: jax.Array | None = None
  ) -> jax.Array:
    """Returns `x W + scaling (dropout(x) A) B` in the compute dtype.

    Args:
      x: `[..., in]`.
      dropout_key: Randomness of the dropout; None drops nothing.
    """
    x = x.astype(self.dtype)
    y = x @ quantize.dequantized(self.kernel[...], self.dtype)
    if self.lora_a is None or self.lora_b is None:
      return y
    if self.dropout > 0 and dropout_key is not None:
      kept = jax.random.bernoulli(dropout_key, 1 - self.dropout, x.shape)
      x = jnp.where(kept, x / (1 - self.dropout), 0)
    down = x @ self.lora_a[...].astype(self.dtype)
    # The small matrix is scaled, not the product: that would be a pass over
    # memory of its own, forward and backward.
    return y + down @ (self.scaling * self.lora_b[...]).astype(self.dtype)


def trainable(config: LoraConfig | None) -> Any:
  """Returns the `nnx` filter of what a run trains.

  `nnx.split(model, trainable(config), ...)` parts it from what is frozen.

  Args:
    config: The adapter; None trains every parameter.
  """
  if config is None:
    return nnx.Param
  filters: list[Any] = [LoraParam]
  # Tied or not: without a matrix of its own the head is the embedding.
  if config.train_embeddings:
    filters += [nnx.PathContains("embed_tokens"), nnx.PathContains("lm_head")]
  if config.train_norms:
    filters += [nnx.PathContains("scale")]
  return nnx.Any(*filters)
