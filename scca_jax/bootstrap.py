"""Mean losses over windows, with bootstrap intervals.

Windows of one book are alike, and so are all windows under one seed: a mean
over windows is less certain than their number suggests. A resample therefore
draws in three stages, each with replacement: as many documents as there are,
for each one drawn as many of its windows as it has, and as many seeds as there
are. Seeds are drawn once for all windows, because each seed is one model that
ran on all of them. (The stages are SPEC 6; that seeds and windows are crossed
is our own choice.) The interval is between percentiles of the resampled means.

Such intervals are somewhat too narrow for fewer than about ten documents, and
far too narrow where long windows of a single document overlap. They do not
measure seeds where there is only one.

Losses are arrays `[windows, positions]`, or `[seeds, windows, positions]`: as
`perplexity.window_losses` returns them, where column `i` predicts token `i + 1`
of the window. NaN marks predictions that were not scored.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """A mean and how certain it is.

  Attributes:
    mean: Mean over seeds of the mean over scored predictions, in nats.
    interval: Lower and upper bound, in nats.
  """

  mean: float
  interval: tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
  """Means by position in the window, each with its own interval.

  Attributes:
    edges: `[bins + 1]` bin `i` holds the predictions that have
      `edges[i] … edges[i + 1] - 1` tokens of the window before them.
    mean: `[bins]` nats; NaN where no prediction is scored.
    low: `[bins]` lower bound.
    high: `[bins]` upper bound.
  """

  edges: np.ndarray
  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray


def last_quarter(context_len: int) -> slice:
  """Returns the columns that predict the last `context_len // 4` tokens."""
  return slice(context_len - context_len // 4 - 1, context_len - 1)


def log_edges(context_len: int, per_octave: int = 2) -> np.ndarray:
  """Returns edges of bins of equal width on a logarithmic axis.

  Args:
    context_len: Length of a window, in tokens.
    per_octave: Bins per doubling of the position; there are fewer where they
      would be narrower than a token.

  Returns:
    `[bins + 1]` int, from 1 to `context_len`.
  """
  octaves = np.arange(0, np.log2(context_len), 1 / per_octave)
  return np.unique(np.append(np.rint(2**octaves).astype(int), context_len))


def estimate(
  losses: np.ndarray,
  documents: np.ndarray,
  *,
  positions: slice = slice(None),
  seed: int = 0,
  num_resamples: int = RESAMPLES,
  confidence: float = CONFIDENCE,
) -> Estimate:
  """Returns the mean loss and its interval.

  Args:
    losses: `[windows, positions]` or `[seeds, windows, positions]` nats.
    documents: `[windows]` which document each window belongs to, any integers.
    positions: The columns that count, such as `last_quarter(context_len)`.
    seed: Seed of the resamples; equal seeds give equal intervals.
    num_resamples: How many are drawn.
    confidence: Share of the resamples inside the interval.

  Raises:
    ValueError: The shapes disagree, a loss is infinite, seeds are not scored at
      the same positions, or nothing is scored.
  """
  parts = [_Sums.of(losses, [positions])]
  return _one(*_estimates(parts, documents, seed, num_resamples, confidence))


def paired_difference(
  losses: np.ndarray,
  baseline: np.ndarray,
  documents: np.ndarray,
  *,
  positions: slice = slice(None),
  seed: int = 0,
  num_resamples: int = RESAMPLES,
  confidence: float = CONFIDENCE,
) -> Estimate:
  """Returns the mean of `losses - baseline` and its interval.

  Each window is compared with itself and each seed with the same seed, so
  differences in difficulty between windows cancel. A negative result means
  lower losses than the baseline's.

  Args:
    losses: `[windows, positions]` or `[seeds, windows, positions]` nats.
    baseline: Losses of the same windows, with the same seeds or, without that
      axis, the same for all seeds.
    documents: See `estimate`, also for the arguments below.
    positions: The columns that count.
    seed: Seed of the resamples.
    num_resamples: How many are drawn.
    confidence: Share of the resamples inside the interval.

  Raises:
    ValueError: See `estimate`; or the two are not scored at the same positions.
  """
  parts = [_Sums.of(x, [positions]) for x in (losses, baseline)]
  return _one(*_estimates(parts, documents, seed, num_resamples, confidence))


def by_position(
  losses: np.ndarray,
  documents: np.ndarray,
  *,
  edges: np.ndarray,
  baseline: np.ndarray | None = None,
  seed: int = 0,
  num_resamples: int = RESAMPLES,
  confidence: float = CONFIDENCE,
) -> Curve:
  """Returns the mean loss by position, or that of a paired difference.

  Args:
    losses: `[windows, positions]` or `[seeds, windows, positions]` nats.
    documents: See `estimate`.
    edges: `[bins + 1]` rising edges of the bins, such as `log_edges` gives; see
      `Curve`.
    baseline: What is subtracted; see `paired_difference`.
    seed: Seed of the resamples.
    num_resamples: How many are drawn.
    confidence: Share of the resamples inside each interval.

  Raises:
    ValueError: See `paired_difference`; or the edges do not rise.
  """
  edges = np.asarray(edges)
  if len(edges) < 2 or edges[0] < 1 or np.any(np.diff(edges) < 1):
    raise ValueError(f"edges must rise from 1 or later, got {edges.tolist()}.")
  slices = [
    slice(a - 1, b - 1) for a, b in zip(edges[:-1], edges[1:], strict=True)
  ]
  arrays = [losses] if baseline is None else [losses, baseline]
  parts = [_Sums.of(x, slices) for x in arrays]
  means, low, high = _estimates(
    parts, documents, seed, num_resamples, confidence
  )
  return Curve(edges=edges, mean=means, low=low, high=high)


@dataclasses.dataclass(frozen=True)
class _Sums:
  """Losses summed over columns.

  Attributes:
    sums: `[seeds, windows, slices]` float64.
    counts: `[windows, slices]` predictions in each sum.
  """

  sums: np.ndarray
  counts: np.ndarray

  @classmethod
  def of(cls, losses: np.ndarray, slices: Sequence[slice]) -> "_Sums":
    """Returns the sums over each of the slices of columns."""
    losses = np.asarray(losses)
    if losses.ndim not in (2, 3) or 0 in losses.shape:
      raise ValueError(
        "losses must be [windows, positions] or [seeds, windows, positions],"
        f" got {list(losses.shape)}."
      )
    if np.isinf(losses).any():
      raise ValueError("a loss is infinite: the model that made it diverged.")
    losses = losses.reshape(-1, *losses.shape[-2:])
    sums, counts = [], []
    for columns in slices:
      part = losses[..., columns]
      scored = ~np.isnan(part)
      if not (scored == scored[:1]).all():
        raise ValueError("seeds must be scored at the same positions.")
      sums.append(part.sum(axis=-1, dtype=np.float64, where=scored))
      counts.append(scored[0].sum(axis=-1))
    return cls(np.stack(sums, axis=-1), np.stack(counts, axis=-1))


def _one(means: np.ndarray, low: np.ndarray, high: np.ndarray) -> Estimate:
  if np.isnan(means[0]):
    raise ValueError("no prediction is scored at the positions asked for.")
  return Estimate(
    mean=float(means[0]), interval=(float(low[0]), float(high[0]))
  )


def _estimates(
  parts: Sequence[_Sums],
  documents: np.ndarray,
  seed: int,
  num_resamples: int,
  confidence: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns `[slices]` means and bounds of the first part minus the second."""
  documents = np.asarray(documents)
  sums, counts = parts[0].sums, parts[0].counts
  num_seeds, num_windows, num_slices = sums.shape
  if documents.shape != (num_windows,):
    raise ValueError(
      f"documents must be [{num_windows}], one per window, got"
      f" {list(documents.shape)}."
    )
  if num_resamples < 1 or not 0 < confidence < 1:
    raise ValueError(
      "num_resamples must be at least 1 and confidence between 0 and 1, got"
      f" {num_resamples} and {confidence}."
    )
  for other in parts[1:]:
    if (
      other.sums.shape[1:] != sums.shape[1:]
      or other.sums.shape[0] not in (1, num_seeds)
      or not np.array_equal(other.counts, counts)
    ):
      raise ValueError(
        "paired losses must have the same seeds, windows and scored positions,"
        f" got {list(sums.shape[:2])} and {list(other.sums.shape[:2])} seeds"
        " and windows, or different positions."
      )
    sums = sums - other.sums
  rng = np.random.default_rng(seed)
  # [resamples, seeds, slices] and [resamples, slices].
  numerator = np.zeros((num_resamples, num_seeds, num_slices))
  denominator = np.zeros((num_resamples, num_slices))
  _, documents = np.unique(documents, return_inverse=True)
  num_documents = documents.max() + 1
  # Drawing with replacement takes each item a multinomial number of times. If a
  # document of n windows is drawn c times, c n of its windows are drawn.
  times = _draws(rng, num_documents, np.full(num_resamples, num_documents))
  for document in range(num_documents):
    inside = np.flatnonzero(documents == document)
    weights = _draws(rng, len(inside), times[:, document] * len(inside))
    numerator += np.tensordot(weights, sums[:, inside], axes=(1, 1))
    denominator += weights @ counts[inside]
  of_seeds = _draws(rng, num_seeds, np.full(num_resamples, num_seeds))
  resampled = np.einsum("rs,rsi->ri", of_seeds / num_seeds, numerator)
  total = counts.sum(axis=0)
  with np.errstate(invalid="ignore"):  # 0 / 0 where nothing is scored.
    resampled /= denominator
    means = sums.sum(axis=1).mean(axis=0) / total
  bounds = np.full((2, num_slices), np.nan)
  tail = (1 - confidence) / 2
  for i in np.flatnonzero(total):
    # A resample may miss the only windows that score a position.
    defined = resampled[~np.isnan(resampled[:, i]), i]
    bounds[:, i] = np.quantile(defined, [tail, 1 - tail])
  return means, bounds[0], bounds[1]


def _draws(
  rng: np.random.Generator, num_items: int, num_draws: np.ndarray
) -> np.ndarray:
  """Returns how often each item is drawn, `[resamples, items]`.

  Args:
    rng: Source of randomness.
    num_items: Number of items, all equally likely.
    num_draws: `[resamples]` number of draws, with replacement.
  """
  return rng.multinomial(num_draws, np.full(num_items, 1 / num_items))
