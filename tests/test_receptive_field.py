"""The receptive field against a walk through the masks."""

import pattern_strings
import pytest

from scca_jax import patterns, receptive_field


def _walk(layers, n):
  """Shares of reached pairs, by following edges from each query."""
  shares = []
  for depth in range(1, len(layers) + 1):
    masks = [p.visible(n).any(0) for p in layers[:depth]]
    reached = 0
    for query in range(n):
      places = {query}
      for mask in reversed(masks):
        places |= {k for p in places for k in range(n) if mask[p, k]}
      reached += sum(k <= query for k in places)
    shares.append(reached / (n * (n + 1) / 2))
  return shares


@pytest.mark.parametrize(
  "name", ["local", "s2", "scca_fixed", "dna", "dilated"]
)
def test_coverage_counts_what_can_be_walked_to(name):
  layers = pattern_strings.make_layers(
    name, num_heads=4, num_layers=4, seq_len=21
  )
  assert receptive_field.coverage(layers, 21) == pytest.approx(
    _walk(layers, 21)
  )


def test_layers_that_differ_are_taken_in_order():
  layers = (patterns.local(1, 4), patterns.dna(1, 2, 5), patterns.local(1, 3))
  assert receptive_field.coverage(layers, 17) == pytest.approx(
    _walk(layers, 17)
  )
  back = layers[::-1]
  assert receptive_field.coverage(back, 17) == pytest.approx(_walk(back, 17))


def test_chunks_alone_never_reach_further():
  shares = receptive_field.coverage([patterns.local(2, 4)] * 3, 16)
  assert shares == [4 * 10 / 136] * 3


def test_fixed_shift_reaches_everything_in_a_few_layers():
  shares = receptive_field.coverage([patterns.scca_fixed(2, 4)] * 8, 16)
  assert shares == sorted(shares)
  assert shares[-1] == 1


def test_no_tokens_are_refused():
  with pytest.raises(ValueError, match="seq_len"):
    receptive_field.coverage([patterns.dense(1)], 0)


def test_members_of_a_mixture_see_together():
  mixture = patterns.mixture(
    patterns.dilated(2, 8, 2), patterns.dna(2, window=2, dilation=3)
  )
  together = receptive_field.union(mixture, 21)
  for query in range(21):
    for key in range(21):
      assert together[query, key] == any(
        member.visible(21)[head, query, key]
        for member in mixture.members
        for head in range(2)
      )


def test_fields_and_their_shares_are_those_of_coverage():
  layers = (
    patterns.local(2, 5),
    patterns.scca_near(2, 4, 5),
    patterns.s2(2, 6),
  )
  shares = [
    receptive_field.share(field) for field in receptive_field.reach(layers, 19)
  ]
  assert shares == receptive_field.coverage(layers, 19)
  assert shares == pytest.approx(_walk(layers, 19))
