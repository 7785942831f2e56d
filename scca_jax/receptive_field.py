"""What the heads of a layer, and several layers together, can see."""

from collections.abc import Iterator, Sequence

import numpy as np

from scca_jax.patterns import AttentionPattern, Mixture, members


def union(pattern: AttentionPattern | Mixture, seq_len: int) -> np.ndarray:
  """Returns what the heads see together, numpy bool `[query seq, key seq]`.

  Args:
    pattern: The pattern of one layer; the members of a mixture count together.
    seq_len: Length of the sequence, in tokens.
  """
  positions = np.arange(seq_len)
  result = np.zeros((seq_len, seq_len), bool)
  for member in members(pattern):
    for head in member.head_groups():
      result |= head.seen(
        positions[:, None],
        positions[None, :],
        seq_len,
        boundary=member.boundary,
        causality=member.causality,
      )
  return result


def reach(
  patterns_by_layer: Sequence[AttentionPattern | Mixture], seq_len: int
) -> Iterator[np.ndarray]:
  """Yields the receptive field after each layer, bool `[query seq, key seq]`.

  `R_l = (I or V_l) R_(l-1)` with `R_0 = I`: information stays at its position
  through the residual connection or moves along what the heads of layer `l`
  see together, `V_l`.

  Args:
    patterns_by_layer: The first layer first.
    seq_len: Length of the sequence, in tokens; time grows with its cube.
  """
  identity = np.eye(seq_len, dtype=bool)
  field = identity
  for pattern in patterns_by_layer:
    step = (union(pattern, seq_len) | identity).astype(np.float32)
    field = step @ field.astype(np.float32) > 0
    yield field


def share(field: np.ndarray) -> float:
  """Returns the share of causal pairs in a receptive field.

  Args:
    field: Bool `[query seq, key seq]`, from `reach`.
  """
  seq_len = len(field)
  causal = seq_len * (seq_len + 1) // 2
  return float(np.count_nonzero(np.tril(field)) / causal)


def coverage(
  patterns_by_layer: Sequence[AttentionPattern | Mixture], seq_len: int
) -> list[float]:
  """Returns the share of causal pairs in the receptive field after each layer.

  Args:
    patterns_by_layer: The first layer first.
    seq_len: Length of the sequence, in tokens; time grows with its cube.

  Returns:
    One number in (0, 1] per layer; 1 if information from every earlier position
    reaches every position.

  Raises:
    ValueError: `seq_len` is below 1.
  """
  if seq_len < 1:
    raise ValueError(f"seq_len must be at least 1, got {seq_len}.")
  return [share(field) for field in reach(patterns_by_layer, seq_len)]
