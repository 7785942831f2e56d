"""Batches of windows: what they hold, their order, and resuming."""

import collections
import dataclasses
import json

import numpy as np
import pytest

from scca_jax.batches import PACKINGS, make_batches
from scca_jax.token_file import TokenFile


def _corpus(*lengths, known=True):
  """A corpus whose ids 1, 2, 3, … tell their positions."""
  ends = np.cumsum(lengths)
  return TokenFile(
    tokens=np.arange(1, ends[-1] + 1, dtype=np.uint16),
    document_ends=ends if known else None,
  )


def _rows(batches):
  """The windows of `batches` with anything to learn, as dicts of rows."""
  return [
    {name: value[row] for name, value in batch.items()}
    for batch in batches
    for row in range(len(batch["mask"]))
    if batch["mask"][row].any() or batch["tokens"][row].any()
  ]


def _assert_equal(first, second):
  assert first.keys() == second.keys()
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], name)


CORPUS = _corpus(5, 30, 1, 17, 64, 3, 8, 9, 40, 26)  # 203 tokens.


def test_a_batch_is_tokens_what_follows_them_and_a_mask():
  batch = next(make_batches(CORPUS, seq_len=8, batch_size=4, seed=0))
  assert {n: (v.shape, v.dtype.name) for n, v in batch.items()} == {
    "tokens": ((4, 8), "int32"),
    "targets": ((4, 8), "int32"),
    "mask": ((4, 8), "float32"),
  }
  np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)
  assert batch["mask"].all()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batches_go_on_for_ever(batch_size):
  batches = make_batches(CORPUS, seq_len=101, batch_size=batch_size, seed=0)
  assert all(next(batches)["mask"].all() for _ in range(9))


@pytest.mark.parametrize("seq_len", [1, 7, 8, 101, 202])
def test_windows_cover_the_corpus_once_an_epoch(seq_len):
  offsets = set()
  for seed in range(8):
    batches = make_batches(
      CORPUS, seq_len=seq_len, batch_size=3, seed=seed, epochs=1
    )
    rows = _rows(batches)
    assert len(rows) == batches.windows_per_epoch == 202 // seq_len
    seen = np.sort(np.concatenate([row["tokens"] for row in rows]))
    np.testing.assert_array_equal(seen, seen[0] + np.arange(len(seen)))
    offsets.add(int(seen[0]) - 1)
  # Left-over tokens may be at either end.
  assert offsets <= set(range(202 % seq_len + 1))
  assert len(offsets) > 1 or 202 % seq_len == 0


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_epoch_has_every_window_in_an_order_of_its_own(packing):
  batches = make_batches(
    CORPUS, seq_len=8, batch_size=1, seed=3, packing=packing, epochs=3
  )
  starts = [tuple(row["tokens"]) for row in _rows(batches)]
  size = batches.windows_per_epoch
  epochs = [starts[n : n + size] for n in range(0, 3 * size, size)]
  assert len(starts) == 3 * size
  assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
  assert len(set(epochs[0])) == size
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_batches_run_across_epochs_and_the_last_is_filled_up():
  batches = make_batches(CORPUS, seq_len=8, batch_size=4, seed=0, epochs=3)
  all_of_them = list(batches)
  assert len(all_of_them) == 19  # 3 epochs of 25 windows are 75 windows.
  assert all(batch["mask"].all() for batch in all_of_them[:-1])
  last = all_of_them[-1]["mask"]
  assert last.shape == (4, 8)
  np.testing.assert_array_equal(last.all(axis=1), [1, 1, 1, 0])
  np.testing.assert_array_equal(last.any(axis=1), [1, 1, 1, 0])


def test_without_epochs_there_is_no_end():
  batches = make_batches(CORPUS, seq_len=8, batch_size=4, seed=0)
  for _, batch in zip(range(20), batches, strict=False):
    assert batch["mask"].all()


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_seed_decides_the_order(packing):
  def first(seed):
    batches = make_batches(
      CORPUS, seq_len=8, batch_size=4, seed=seed, packing=packing
    )
    return [next(batches) for _ in range(10)]

  for one, other in zip(first(1), first(1), strict=True):
    _assert_equal(one, other)
  assert any(
    (one["tokens"] != other["tokens"]).any()
    for one, other in zip(first(1), first(2), strict=True)
  )


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_run_goes_on_exactly_where_it_stopped(packing):
  def make():
    return make_batches(
      CORPUS, seq_len=8, batch_size=4, seed=5, packing=packing, epochs=2
    )

  expected = list(make())
  for stop in (0, 1, 7, len(expected)):
    batches = make()
    for _ in range(stop):
      next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    ahead = list(batches)
    assert len(ahead) == len(expected) - stop
    other = make()
    next(other)
    for resumed in (batches, other):
      resumed.set_state(state)
      assert resumed.get_state() == state
      rest = list(resumed)
      assert len(rest) == len(ahead)
      for one, another in zip(rest, expected[stop:], strict=True):
        _assert_equal(one, another)


@pytest.mark.parametrize(
  ("name", "change"),
  [
    ("seed", {"seed": 2}),
    ("seq_len", {"seq_len": 16}),
    ("batch_size", {"batch_size": 8}),
    ("packing", {"packing": "packed"}),
    ("tokens", {"token_file": _corpus(100)}),
    (
      "sha256",
      {"token_file": dataclasses.replace(CORPUS, about={"sha256": "other"})},
    ),
  ],
)
def test_a_position_in_another_order_is_refused(name, change):
  settings = {"token_file": CORPUS, "seq_len": 8, "batch_size": 4, "seed": 1}
  state = make_batches(**settings).get_state()
  with pytest.raises(ValueError, match=f"saved with {name}=.*now {name}="):
    make_batches(**{**settings, **change}).set_state(state)


@pytest.mark.parametrize("state", [{}, {"next_index": 3}])
def test_a_position_that_is_none_is_refused(state):
  batches = make_batches(CORPUS, seq_len=8, batch_size=4, seed=1)
  with pytest.raises(ValueError, match="cannot resume the data"):
    batches.set_state(state)
  whole = batches.get_state()
  for wrong in (None, "x", -1, 1.5):
    with pytest.raises(ValueError, match=f"no position {wrong!r}"):
      batches.set_state({**whole, "next_index": wrong})


@pytest.mark.parametrize("packing", PACKINGS)
def test_shards_divide_a_batch(packing):
  def make(**shard):
    return make_batches(
      CORPUS,
      seq_len=8,
      batch_size=6,
      seed=0,
      packing=packing,
      epochs=2,
      **shard,
    )

  whole = list(make())
  parts = [list(make(shard_index=n, num_shards=3)) for n in range(3)]
  for number, batch in enumerate(whole):
    joined = {
      name: np.concatenate([part[number][name] for part in parts])
      for name in batch
    }
    _assert_equal(joined, batch)
  assert [len(part) for part in parts] == [len(whole)] * 3
  # A position holds for any number of shards.
  resumed = make(shard_index=1, num_shards=2)
  ahead = make()
  next(ahead)
  resumed.set_state(ahead.get_state())
  _assert_equal(
    next(resumed), {name: value[3:] for name, value in whole[1].items()}
  )


def test_a_packed_window_by_hand():
  #        1 2 3 4 5 | 6 7 8 | 9 10
  batch = next(
    make_batches(
      _corpus(5, 3, 2),
      seq_len=4,
      batch_size=3,
      seed=0,
      packing="packed",
      epochs=1,
    )
  )
  order = np.argsort(batch["tokens"][:, 0])
  batch = {name: value[order].tolist() for name, value in batch.items()}
  assert batch == {
    "tokens": [[1, 2, 3, 4], [6, 7, 8, 5], [9, 10, 0, 0]],
    "targets": [[2, 3, 4, 5], [7, 8, 0, 0], [10, 0, 0, 0]],
    "mask": [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]],
    "segment_ids": [[1, 1, 1, 1], [1, 1, 1, 2], [1, 1, 0, 0]],
    "positions": [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 0, 0]],
  }


def test_a_packed_corpus_may_be_shorter_than_a_window():
  batch = next(
    make_batches(
      _corpus(3, 2), seq_len=8, batch_size=1, seed=0, packing="packed"
    )
  )
  assert batch["tokens"].tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]]
  assert batch["targets"].tolist() == [[2, 3, 0, 5, 0, 0, 0, 0]]
  assert batch["mask"].tolist() == [[1, 1, 0, 1, 0, 0, 0, 0]]
  assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0, 0, 0]]


@pytest.mark.parametrize("draw", range(8))
def test_packed_windows_keep_documents_apart(draw):
  random = np.random.default_rng(draw)
  seq_len = int(random.integers(2, 20))
  lengths = random.integers(1, 50, random.integers(2, 40))
  corpus = _corpus(*lengths, seq_len)  # Never shorter than a window.
  batches = make_batches(
    corpus, seq_len=seq_len, batch_size=4, seed=draw, packing="packed", epochs=1
  )
  assert corpus.document_ends is not None
  document = np.repeat(
    np.arange(len(corpus.document_ends)),
    np.diff(corpus.document_ends, prepend=0),
  )
  tokens, targets, filled = collections.Counter(), collections.Counter(), []
  rows = _rows(batches)
  assert len(rows) == batches.windows_per_epoch
  for row in rows:
    assert all(v.shape == (seq_len,) for v in row.values())
    used = row["segment_ids"] > 0
    filled.append(used.sum())
    assert used[: filled[-1]].all()  # Padding is at the end.
    for name in ("tokens", "targets", "mask", "positions"):
      assert not row[name][~used].any()
    # Segments count from 1 without a gap.
    segments = row["segment_ids"][used]
    assert segments[0] == 1
    assert set(np.diff(segments)) <= {0, 1}
    for segment in range(1, segments[-1] + 1):
      here = row["segment_ids"] == segment
      ids = row["tokens"][here]
      np.testing.assert_array_equal(ids, ids[0] + np.arange(len(ids)))
      assert len(set(document[ids - 1])) == 1
      np.testing.assert_array_equal(row["positions"][here], np.arange(len(ids)))
    tokens.update(row["tokens"][used].tolist())
    scored = row["mask"] == 1
    assert set(row["mask"]) <= {0, 1}
    assert not row["targets"][~scored].any()
    np.testing.assert_array_equal(
      row["targets"][scored], row["tokens"][scored] + 1
    )
    targets.update(row["targets"][scored].tolist())
  firsts = {1, *(corpus.document_ends[:-1] + 1).tolist()}
  every = range(1, len(corpus) + 1)
  assert tokens == collections.Counter(every)
  assert targets == collections.Counter(n for n in every if n not in firsts)
  # Two windows no more than half full would have been one.
  assert sum(size <= seq_len / 2 for size in filled) <= 1


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"packing": "padded"}, "'padded': give one of concatenate, packed"),
    ({"seq_len": 0}, "at least 1, got 0 and 4"),
    ({"batch_size": 0}, "at least 1, got 8 and 0"),
    ({"epochs": 0}, "epochs must be at least 1.* got 0"),
    ({"seed": -1}, "seed must not be negative, got -1"),
    ({"num_shards": 3}, "batch_size=4 is not divisible by num_shards=3"),
    ({"num_shards": 0}, "num_shards=0"),
    ({"shard_index": 2, "num_shards": 2}, "shard_index=2 is outside 0 to 1"),
    ({"shard_index": -1}, "shard_index=-1 is outside"),
    ({"seq_len": 203}, "has 203 tokens, .*seq_len=203 .* take 204"),
    (
      {"token_file": _corpus(50, known=False), "packing": "packed"},
      "needs the document ends of the corpus",
    ),
    (
      {"token_file": _corpus(1, 1, 1), "packing": "packed"},
      "no document of the corpus has two tokens",
    ),
  ],
)
def test_bad_settings_are_refused(change, message):
  settings = {"token_file": CORPUS, "seq_len": 8, "batch_size": 4, "seed": 0}
  with pytest.raises(ValueError, match=message):
    make_batches(**{**settings, **change})


def test_ids_are_checked_against_the_vocabulary_of_a_model():
  corpus = TokenFile(tokens=np.arange(40), name="test.bin")
  make_batches(corpus, seq_len=4, batch_size=2, seed=0, vocab_size=40)
  with pytest.raises(ValueError, match="test.bin has the id 39 at position 39"):
    make_batches(corpus, seq_len=4, batch_size=2, seed=0, vocab_size=39)


def test_positions_skip_once_and_reach_the_longer_length():
  given = {"seq_len": 8, "batch_size": 4, "seed": 1}
  batches = make_batches(CORPUS, **given, skip_to=32)
  plain = make_batches(CORPUS, **given)
  steps, last = set(), 0
  for _ in range(50):
    batch, other = next(batches), next(plain)
    positions = batch.pop("positions")
    _assert_equal(batch, other)  # The text runs on.
    assert (positions[:, 0] == 0).all() and positions.dtype == np.int32
    gaps = np.diff(positions)
    assert (gaps >= 1).all() and ((gaps > 1).sum(axis=1) <= 1).all()
    steps |= set(np.flatnonzero(gaps > 1) % 7)
    last = max(last, positions.max())
  assert steps == set(range(7)) and last == 31


def test_a_skip_resumes_and_is_refused_where_it_cannot_be():
  given = {"seq_len": 8, "batch_size": 4, "seed": 1, "skip_to": 32}
  batches = make_batches(CORPUS, **given)
  next(batches)
  state = batches.get_state()
  expected = next(batches)
  other = make_batches(CORPUS, **given)
  other.set_state(state)
  _assert_equal(next(other), expected)
  with pytest.raises(ValueError, match="skip_to=32.*skip_to=31"):
    make_batches(CORPUS, **(given | {"skip_to": 31})).set_state(state)
  with pytest.raises(ValueError, match="skip_to=7 must be at least seq_len=8"):
    make_batches(CORPUS, **(given | {"skip_to": 7}))
  with pytest.raises(ValueError, match="packing"):
    make_batches(CORPUS, packing="packed", **given)
