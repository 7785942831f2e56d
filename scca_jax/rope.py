"""Rotary position embeddings and their scalings to longer contexts.

A scaling changes only the frequencies at which pairs of channels rotate. All
kinds except "ntk" are those of Hugging Face transformers, with its field names
and defaults.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("linear", "dynamic", "ntk", "yarn", "llama3")
# These depend on the length of pretraining.
_NEED_ORIGINAL_LENGTH = ("dynamic", "yarn", "llama3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """How RoPE is adapted to contexts longer than in pretraining.

  * "linear": Position Interpolation (arXiv 2306.15595), positions / `factor`.
  * "dynamic": the base grows with the sequence beyond the pretrained length.
  * "ntk": base * factor^(d / (d - 2)) whatever the length. (Own choice: not a
    kind of transformers.)
  * "yarn": arXiv 2309.00071, fast pairs stay, slow ones are interpolated.
  * "llama3": the same idea with the bounds of Llama 3.1.

  Attributes:
    kind: One of `KINDS`.
    factor: Target length / pretrained length, at least 1.
    original_max_position_embeddings: Pretrained length in tokens; "dynamic",
      "yarn" and "llama3" need it.
    beta_fast: "yarn": pairs that turn more often than this within the
      pretrained length stay as they are.
    beta_slow: "yarn": pairs that turn less often than this are interpolated.
    attention_factor: "yarn": multiplies cosine and sine; None uses 0.1
      ln(factor) + 1.
    mscale: "yarn": with `mscale_all_dim`, another way to give that factor: (0.1
      mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1).
    mscale_all_dim: See `mscale`.
    truncate: "yarn": whether the bounds are rounded to whole pairs.
    low_freq_factor: "llama3": pairs that turn less often than this within the
      pretrained length are interpolated.
    high_freq_factor: "llama3": pairs that turn more often than this stay as
      they are.
  """

  kind: str
  factor: float = 1.0
  original_max_position_embeddings: int | None = None
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool = True
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0

  @property
  def pretrained_len(self) -> int:
    """Length of pretraining in tokens, for the kinds that need it."""
    length = self.original_max_position_embeddings
    if length is None:
      raise ValueError(f"{self.kind} rope scaling has no pretrained length.")
    return length

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(
        f"unknown rope scaling {self.kind!r}: use one of {', '.join(KINDS)}."
      )
    if not 1 <= self.factor < math.inf:
      raise ValueError(
        f"the factor of a rope scaling must be at least 1, got {self.factor}."
      )
    length = self.original_max_position_embeddings
    if length is None:
      if self.kind in _NEED_ORIGINAL_LENGTH:
        raise ValueError(
          f"{self.kind} rope scaling needs original_max_position_embeddings,"
          " the pretrained length in tokens."
        )
    elif length < 1:
      raise ValueError(
        f"original_max_position_embeddings must be at least 1, got {length}."
      )
    if not 0 < self.beta_slow <= self.beta_fast:
      raise ValueError(
        "beta_slow must be above 0 and at most beta_fast, got"
        f" beta_slow={self.beta_slow} and beta_fast={self.beta_fast}."
      )
    if self.attention_factor is not None and not self.attention_factor > 0:
      raise ValueError(
        f"attention_factor must be above 0, got {self.attention_factor}."
      )
    if not 0 < self.low_freq_factor < self.high_freq_factor:
      raise ValueError(
        "low_freq_factor must be above 0 and below high_freq_factor, got"
        f" {self.low_freq_factor} and {self.high_freq_factor}."
      )


def _yarn_bounds(
  head_dim: int, theta: float, scaling: RopeScaling
) -> tuple[float, float]:
  """Returns the pairs between which YaRN blends the two methods."""

  def pair_that_turns(times: float) -> float:
    # length * theta^(-2i/d) = 2 pi * times, solved for i.
    turns = scaling.pretrained_len / (times * 2 * math.pi)
    return head_dim * math.log(turns) / (2 * math.log(theta))

  low = pair_that_turns(scaling.beta_fast)
  high = pair_that_turns(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, head_dim - 1)
  return low, high + 0.001 if low == high else high


def _yarn_attention_scaling(scaling: RopeScaling) -> float:
  if scaling.attention_factor is not None:
    return scaling.attention_factor

  def magnitude(mscale: float) -> float:
    return 0.1 * mscale * math.log(scaling.factor) + 1

  if scaling.mscale and scaling.mscale_all_dim:
    return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
  return magnitude(1.0)


def frequencies(
  head_dim: int, theta: float, scaling: RopeScaling | None, seq_len: int
) -> tuple[np.ndarray, float]:
  """Returns how fast each pair of channels rotates, and a factor for it.

  Args:
    head_dim: Channels of a head, even.
    theta: Base of the frequencies, above 1.
    scaling: None means plain RoPE (arXiv 2104.09864).
    seq_len: Tokens of the sequence; only "dynamic" depends on it.

  Returns:
    The frequencies in radians per token, float32 `[head_dim / 2]`, and the
    factor of cosine and sine (1 unless the kind is "yarn").

  Raises:
    ValueError: `head_dim` is not even and positive, `theta` is not above 1, or
      `head_dim` is 2 with "dynamic" or "ntk".
  """
  if head_dim < 2 or head_dim % 2:
    raise ValueError(f"head_dim must be even and positive, got {head_dim}.")
  if not theta > 1:
    raise ValueError(f"the base theta of RoPE must be above 1, got {theta}.")
  kind = None if scaling is None else scaling.kind
  # float64, rounded once at the end, because a far position multiplies the
  # error of its angle.
  exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
  attention_scaling = 1.0
  if scaling is not None and kind in ("dynamic", "ntk"):
    if head_dim == 2:
      raise ValueError(f"{kind} rope scaling needs a head_dim above 2.")
    stretch = scaling.factor
    if kind == "dynamic":
      length = scaling.pretrained_len
      stretch = scaling.factor * max(seq_len, length) / length - (
        scaling.factor - 1
      )
    theta *= stretch ** (head_dim / (head_dim - 2))
  inv_freq = theta**-exponents

  if scaling is None or kind in ("dynamic", "ntk"):
    pass
  elif kind == "linear":
    inv_freq = inv_freq / scaling.factor
  elif kind == "yarn":
    low, high = _yarn_bounds(head_dim, theta, scaling)
    interpolated = np.clip(
      (np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0
    )
    inv_freq = inv_freq * (1 - interpolated + interpolated / scaling.factor)
    attention_scaling = _yarn_attention_scaling(scaling)
  else:
    turns = scaling.pretrained_len * inv_freq / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    inv_freq = inv_freq * (kept + (1 - kept) / scaling.factor)
  return inv_freq.astype(np.float32), attention_scaling


def apply(
  x: jax.Array,
  positions: jax.Array,
  inv_freq: jax.Array | np.ndarray,
  attention_scaling: float = 1.0,
) -> jax.Array:
  """Returns `x` with each pair of channels rotated by its position.

  Channel `i` is paired with `i + head_dim / 2` (the layout of the weights that
  Hugging Face publishes), not with its neighbour.

  Args:
    x: Queries or keys, `[batch, seq, heads, head_dim]`.
    positions: Integers, `[batch, seq]` or `[1, seq]`.
    inv_freq: From `frequencies`, `[head_dim / 2]`.
    attention_scaling: From `frequencies`.

  Returns:
    An array like `x`; the rotation is computed in float32.
  """
  angles = (
    positions.astype(jnp.float32)[:, :, None, None]
    * jnp.asarray(inv_freq, jnp.float32)[None, None, None, :]
  )
  cos = jnp.cos(angles) * attention_scaling
  sin = jnp.sin(angles) * attention_scaling
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x.dtype)
