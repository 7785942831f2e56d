"""Settings of low-rank adapters (LoRA, arXiv 2106.09685): what is trained."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from scca_jax.llama_config import PROJECTIONS

TARGETS = tuple(PROJECTIONS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """Adapters and what else is trained; the defaults are LongLoRA's.

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
    """Factor of the adapter's output."""
    return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraParam(nnx.Param):
  """A matrix of an adapter."""


def init_lora_a(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns the first matrix of new adapters, initialised as in PEFT.

  That is `kaiming_uniform` with `a = sqrt(5)`: uniform within plus or minus the
  inverse square root of the number of inputs.

  Args:
    rng: Randomness.
    shape: `[..., in, rank]`.
  """
  bound = shape[-2] ** -0.5
  return jax.random.uniform(rng, shape, jnp.float32, -bound, bound)


def trainable(config: LoraConfig | None) -> Any:
  """Returns the `nnx` filter of the trained parameters.

  `nnx.split(model, trainable(config), ...)` separates them from the frozen
  ones.

  Args:
    config: The adapter; None trains every parameter.
  """
  if config is None:
    return nnx.Param
  filters: list[Any] = [LoraParam]
  # A tied head is the embedding.
  if config.train_embeddings:
    filters += [nnx.PathContains("embed_tokens"), nnx.PathContains("lm_head")]
  if config.train_norms:
    filters += [nnx.PathContains("scale")]
  return nnx.Any(*filters)
