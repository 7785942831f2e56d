"""Intervals against scipy, resampling in plain Python, and arithmetic."""

import random
import statistics

import numpy as np
import pytest
from scipy import stats

from scca_jax import bootstrap


def _losses(*shape, seed=0):
  return np.random.default_rng(seed).gamma(2.0, size=shape)


# Which document each of seven windows belongs to.
DOCUMENTS = np.array([3, 0, 0, 3, 7, 0, 3])


def _resample_by_definition(losses, documents, num_resamples):
  """Returns means of losses, `[seeds][windows]`, by the definition's words."""
  rng = random.Random(1)
  names = sorted(set(documents.tolist()))
  inside = {
    name: [w for w, d in enumerate(documents) if d == name] for name in names
  }
  means = []
  for _ in range(num_resamples):
    windows = [
      window
      for name in rng.choices(names, k=len(names))
      for window in rng.choices(inside[name], k=len(inside[name]))
    ]
    seeds = rng.choices(range(len(losses)), k=len(losses))
    means.append(statistics.fmean(losses[s][w] for s in seeds for w in windows))
  return means


def _expect_quantiles(interval, samples, num_resamples):
  """Checks bounds against samples: both are random, by the same number.

  A bound with 2.5 % of `n` samples beyond it has that within four standard
  deviations of a binomial share, and so have the other samples.
  """
  deviation = 4 * (2 * 0.025 * 0.975 / num_resamples) ** 0.5
  samples = np.asarray(samples)
  assert abs(np.mean(samples < interval[0]) - 0.025) < deviation
  assert abs(np.mean(samples > interval[1]) - 0.025) < deviation


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_stages_are_documents_then_their_windows_then_seeds(num_seeds):
  losses = _losses(num_seeds, 7, 1)
  # A seed shifts all windows, as a model does.
  losses += np.arange(num_seeds)[:, None, None]
  found = bootstrap.estimate(losses, DOCUMENTS)
  assert found.mean == pytest.approx(losses.mean())
  samples = _resample_by_definition(
    losses[..., 0].tolist(), DOCUMENTS, bootstrap.RESAMPLES
  )
  _expect_quantiles(found.interval, samples, bootstrap.RESAMPLES)


@pytest.mark.parametrize("documents", [np.arange(30), np.zeros(30, int)])
def test_one_stage_is_the_usual_bootstrap(documents):
  """Each window a document, or all windows in one."""
  values = _losses(30, 1)
  found = bootstrap.estimate(values, documents)
  usual = stats.bootstrap(
    (values[:, 0],),
    np.mean,
    n_resamples=bootstrap.RESAMPLES,
    method="percentile",
    rng=np.random.default_rng(1),
  )
  _expect_quantiles(
    found.interval, usual.bootstrap_distribution, bootstrap.RESAMPLES
  )


def test_many_documents_give_the_interval_of_the_normal_distribution():
  values = _losses(500, 1)
  low, high = bootstrap.estimate(values, np.arange(500)).interval
  half = 1.96 * values.std() / 500**0.5
  assert high - values.mean() == pytest.approx(half, rel=0.05)
  assert values.mean() - low == pytest.approx(half, rel=0.05)


def test_windows_of_one_document_count_once():
  """Copies of a window add no information, so the interval stays as wide."""
  values = _losses(12, 1)
  alone = bootstrap.estimate(values, np.arange(12)).interval
  copied = bootstrap.estimate(
    np.repeat(values, 50, axis=0), np.repeat(np.arange(12), 50)
  ).interval
  assert np.diff(copied) == pytest.approx(np.diff(alone), rel=0.05)


def test_seeds_are_the_same_for_all_windows():
  """Two seeds one apart: the mean is 0, 1/2 or 1, each tail a quarter."""
  losses = np.broadcast_to(np.arange(2.0)[:, None, None], (2, 50, 4))
  found = bootstrap.estimate(losses, np.arange(50))
  assert (found.mean, found.interval) == (0.5, (0.0, 1.0))


def test_what_two_models_share_cancels():
  losses = _losses(7, 5).astype(np.float32) * 1000
  found = bootstrap.paired_difference(losses - 2, losses, DOCUMENTS)
  assert found.mean == pytest.approx(-2, abs=1e-3)
  assert found.interval == pytest.approx((-2, -2), abs=1e-3)


def test_difference_is_the_estimate_of_the_difference():
  losses, baseline = _losses(3, 7, 8), _losses(3, 7, 8, seed=1)
  quarter = slice(5, 7)
  found = bootstrap.paired_difference(
    losses, baseline, DOCUMENTS, positions=quarter, seed=4
  )
  expected = bootstrap.estimate(
    (losses - baseline)[..., 5:7], DOCUMENTS, seed=4
  )
  assert found.mean == pytest.approx(expected.mean)
  assert found.interval == pytest.approx(expected.interval)
  # An untuned model has no seeds.
  once = bootstrap.paired_difference(losses, baseline[0], DOCUMENTS)
  again = bootstrap.estimate(losses - baseline[0], DOCUMENTS)
  assert once.interval == pytest.approx(again.interval)


def test_every_scored_prediction_counts_once():
  losses = np.array([[1.0, 2.0, 3.0], [np.nan, np.nan, 10.0]])
  found = bootstrap.estimate(losses, np.array([0, 1]))
  assert found.mean == 4.0
  # Both windows once, or either one twice.
  assert found.interval == (2.0, 10.0)


def test_seed_decides_the_interval():
  losses = _losses(7, 3)
  first, same, other = (
    bootstrap.estimate(losses, DOCUMENTS, seed=seed) for seed in (1, 1, 2)
  )
  assert first == same
  assert first.mean == other.mean and first.interval != other.interval


def test_last_quarter_holds_predictions_of_the_last_tokens():
  """Column i predicts token i + 1."""
  for context_len in (4, 16, 18):
    tokens = np.arange(context_len)
    predicted = tokens[1:][bootstrap.last_quarter(context_len)]
    assert predicted.tolist() == tokens[-(context_len // 4) :].tolist()


def test_curve_averages_positions_between_edges():
  losses = _losses(2, 7, 15)
  edges = bootstrap.log_edges(16, per_octave=1)
  assert edges.tolist() == [1, 2, 4, 8, 16]
  curve = bootstrap.by_position(losses, DOCUMENTS, edges=edges)
  for i, columns in enumerate([slice(0, 1), slice(1, 3), slice(3, 7)]):
    # One prediction has one token before it, two have two or three, ...
    assert curve.mean[i] == pytest.approx(losses[..., columns].mean())
    alone = bootstrap.estimate(losses, DOCUMENTS, positions=columns)
    assert (curve.low[i], curve.high[i]) == pytest.approx(alone.interval)
  constant = bootstrap.by_position(
    losses, DOCUMENTS, edges=edges, baseline=losses + 1
  )
  assert constant.low == pytest.approx(-1) and constant.high == pytest.approx(
    -1
  )


def test_curve_has_no_value_where_nothing_is_scored():
  losses = np.array([[np.nan, 1.0], [np.nan, 2.0]])
  curve = bootstrap.by_position(losses, np.arange(2), edges=np.array([1, 2, 3]))
  assert np.isnan([curve.mean[0], curve.low[0], curve.high[0]]).all()
  assert (curve.mean[1], curve.low[1], curve.high[1]) == (1.5, 1.0, 2.0)


@pytest.mark.parametrize("context_len", [2, 3, 100, 1024])
def test_edges_cover_every_position(context_len):
  edges = bootstrap.log_edges(context_len)
  assert edges[0] == 1 and edges[-1] == context_len
  assert (np.diff(edges) > 0).all()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"losses": np.ones(3)}, r"\[windows, positions\].*got \[3\]"),
    ({"losses": np.ones((0, 3))}, r"got \[0, 3\]"),
    ({"losses": np.full((2, 3), np.inf)}, "infinite"),
    ({"losses": np.full((2, 3), np.nan)}, "no prediction is scored"),
    ({"positions": slice(3, None)}, "no prediction is scored"),
    ({"documents": np.zeros(3, int)}, r"documents must be \[2\].*got \[3\]"),
    ({"confidence": 1.0}, "between 0 and 1, got 10000 and 1.0"),
    ({"num_resamples": 0}, "at least 1"),
    (
      {"losses": np.array([[[1.0, 2.0]], [[np.nan, 2.0]]])},
      "seeds must be scored at the same",
    ),
  ],
)
def test_bad_input_is_named(change, message):
  given = {"losses": np.ones((2, 3)), "documents": np.zeros(2, int)} | change
  with pytest.raises(ValueError, match=message):
    bootstrap.estimate(**given)


@pytest.mark.parametrize(
  "baseline",
  [
    np.ones((3, 3)),
    np.ones((3, 2, 3)),
    np.array([[np.nan, 1.0, 1.0], [1.0, 1.0, 1.0]]),
  ],
)
def test_losses_that_are_no_pairs_are_refused(baseline):
  with pytest.raises(ValueError, match="paired losses must have the same"):
    bootstrap.paired_difference(np.ones((2, 2, 3)), baseline, np.zeros(2, int))


def test_edges_that_do_not_rise_are_refused():
  with pytest.raises(ValueError, match="edges must rise"):
    bootstrap.by_position(np.ones((2, 3)), np.arange(2), edges=np.array([2, 2]))
