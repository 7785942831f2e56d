"""The three perplexity protocols against loops over windows, written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scca_jax import bootstrap, patterns, perplexity
from scca_jax.llama import Execution
from scca_jax.token_file import TokenFile

VOCAB = 11
BOS = 10
CONTEXT = 12


@dataclasses.dataclass(frozen=True)
class Config:
  vocab_size: int = VOCAB


class RunningMean(nnx.Module):
  """A stand-in for a model: each position has the mean of what it has seen.

  So every prediction depends on the whole window before it, and on nothing
  else. With a pattern, it has itself alone.
  """

  def __init__(self, rngs):
    self.config = Config()
    self.embedding = nnx.Param(2 * rngs.normal((VOCAB, 5)))
    self.head = nnx.Param(rngs.normal((5, VOCAB)))

  def hidden_states(self, tokens, patterns, execution, **given):
    assert not any(given.values())
    calls.append((tokens.shape, patterns, execution))
    hidden = jnp.take(self.embedding[...], tokens, axis=0)
    if patterns is not None:
      return hidden
    count = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.float32)
    return jnp.cumsum(hidden, axis=1) / count[None, :, None]

  def logits(self, hidden):
    calls.append(hidden.shape)
    return hidden @ self.head[...]


# How the stand-in was traced: one entry per compilation and method.
calls = []
MODEL = RunningMean(nnx.Rngs(0))
EMBEDDING = np.asarray(MODEL.embedding[...], np.float64)
HEAD = np.asarray(MODEL.head[...], np.float64)


def losses_of(window):
  """Returns the loss of predicting window[1], window[2], …"""
  losses = []
  for n in range(1, len(window)):
    logits = np.mean([EMBEDDING[i] for i in window[:n]], axis=0) @ HEAD
    probabilities = np.exp(logits) / np.sum(np.exp(logits))
    losses.append(-np.log(probabilities[window[n]]))
  return losses


def corpus(length, seed=0):
  return np.random.default_rng(seed).integers(BOS, size=length, dtype=np.uint16)


def measure(tokens, **settings):
  settings = {"context_len": CONTEXT, "batch_size": 4, **settings}
  return perplexity.perplexity(MODEL, tokens, **settings)


def check(result, scored, quarter):
  assert result.num_tokens == len(scored)
  np.testing.assert_allclose(result.loss, np.mean(scored), rtol=1e-5)
  np.testing.assert_allclose(
    result.perplexity, np.exp(np.mean(scored)), rtol=1e-5
  )
  np.testing.assert_allclose(
    result.last_quarter, np.exp(np.mean(quarter)), rtol=1e-5
  )


# 7 starts, 6 windows: a batch is left half empty.
@pytest.mark.parametrize("length", [7 * 256 + CONTEXT, 6 * 256 + CONTEXT + 1])
def test_longlora_averages_the_windows_but_the_last(length):
  tokens = corpus(length)
  starts = list(range(0, length - CONTEXT, 256))
  starts.pop()
  means, quarters = [], []
  for start in starts:
    losses = losses_of(tokens[start : start + CONTEXT])
    means.append(np.mean(losses))
    quarters.append(np.mean(losses[-(CONTEXT // 4) :]))
  result = measure(tokens)
  assert result.num_windows == len(starts) == 6
  assert result.num_tokens == 6 * (CONTEXT - 1)
  assert (result.protocol, result.context_len) == ("longlora", CONTEXT)
  assert result.num_skipped == 0
  np.testing.assert_allclose(result.loss, np.mean(means), rtol=1e-5)
  np.testing.assert_allclose(
    result.perplexity, np.exp(np.mean(means)), rtol=1e-5
  )
  np.testing.assert_allclose(
    result.last_quarter, np.exp(np.mean(quarters)), rtol=1e-5
  )


@pytest.mark.parametrize("stride", [1, 3, 5, 11, 12])
def test_strided_scores_each_token_in_the_first_window_that_predicts_it(stride):
  tokens = corpus(67)
  seen = set()
  scored, quarter = [], []
  starts = list(range(0, len(tokens) - CONTEXT, stride))[:-1]
  for start in starts:
    losses = losses_of(tokens[start : start + CONTEXT])
    for place in range(1, CONTEXT):
      if start + place not in seen:
        seen.add(start + place)
        scored.append(losses[place - 1])
        if place >= 9:
          quarter.append(losses[place - 1])
  result = measure(tokens, protocol="strided", stride=stride)
  assert result.num_windows == len(starts)
  check(result, scored, quarter)


def document_losses(document, stride):
  """Returns the losses of a document behind BOS, and of its last quarters."""
  sequence = [BOS, *document]
  starts = []
  start = 0
  while start + CONTEXT <= len(sequence):
    starts.append(start)
    start += stride
  if starts[-1] + CONTEXT != len(sequence):
    starts.append(len(sequence) - CONTEXT)
  found, quarter = {}, []
  for start in starts:
    losses = losses_of(sequence[start : start + CONTEXT])
    for place in range(1, CONTEXT):
      if start + place not in found:
        found[start + place] = losses[place - 1]
        if place >= 9:
          quarter.append(losses[place - 1])
  return [found[n] for n in sorted(found)], quarter, len(starts)


LENGTHS = (12, 5, 30, 11, 13, 12, 1, 23)


@pytest.mark.parametrize("stride", [3, 4, 11])
@pytest.mark.parametrize("with_bos", [False, True])
def test_document_scores_every_token_of_each_long_document(stride, with_bos):
  documents = [corpus(n, seed) for seed, n in enumerate(LENGTHS)]
  scored, quarter, num_windows = [], [], 0
  for document in documents:
    if len(document) >= CONTEXT:
      losses, last, count = document_losses(document, stride)
      assert len(losses) == len(document)
      scored += losses
      quarter += last
      num_windows += count
  if with_bos:  # The token file has it already.
    documents = [np.append(np.uint16(BOS), d) for d in documents]
  token_file = TokenFile(
    tokens=np.concatenate(documents),
    document_ends=np.cumsum([len(d) for d in documents]),
    about={"add_bos": with_bos, "bos_id": BOS},
  )
  result = measure(token_file, protocol="document", stride=stride)
  assert result.num_skipped == 3
  assert result.num_windows == num_windows
  check(result, scored, quarter)


def test_document_takes_its_ends_and_bos_as_arguments_too():
  documents = [corpus(n, seed) for seed, n in enumerate(LENGTHS)]
  result = measure(
    np.concatenate(documents),
    protocol="document",
    stride=4,
    document_ends=np.cumsum(LENGTHS),
    bos_id=BOS,
  )
  losses = [document_losses(d, 4)[0] for d in documents if len(d) >= CONTEXT]
  np.testing.assert_allclose(result.loss, np.mean(sum(losses, [])), rtol=1e-5)


def test_few_windows_are_evenly_spaced():
  tokens = corpus(6 * 256 + CONTEXT + 1)
  # Six windows in three parts: the later of the two in the middle of each.
  windows = [tokens[n * 256 : n * 256 + CONTEXT] for n in (1, 3, 5)]
  result = measure(tokens, num_windows=3)
  assert result.num_windows == 3
  np.testing.assert_allclose(
    result.loss, np.mean([np.mean(losses_of(w)) for w in windows]), rtol=1e-5
  )


def test_few_windows_score_what_they_would_score_among_all():
  tokens = corpus(67)
  result = measure(tokens, protocol="strided", stride=5, num_windows=2)
  # The third and the eighth of ten windows.
  scored = []
  for start in (10, 35):
    scored += losses_of(tokens[start : start + CONTEXT])[-5:]
  assert result.num_tokens == 10
  np.testing.assert_allclose(result.loss, np.mean(scored), rtol=1e-5)


def test_more_windows_than_there_are_run_all():
  tokens = corpus(6 * 256 + CONTEXT + 1)
  assert measure(tokens, num_windows=1000) == measure(tokens)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("loss_chunk", [5, 12, 512])
def test_batches_and_chunks_do_not_change_the_result(batch_size, loss_chunk):
  tokens = corpus(6 * 256 + CONTEXT + 1)
  result = measure(tokens, batch_size=batch_size, loss_chunk=loss_chunk)
  expected = measure(tokens)
  np.testing.assert_allclose(result.loss, expected.loss, rtol=1e-6)
  assert result.num_tokens == expected.num_tokens


def test_all_batches_share_one_compilation_with_other_weights_too():
  tokens = corpus(6 * 256 + CONTEXT + 1)
  measure(tokens, batch_size=5)  # 5 windows, then 1.
  calls.clear()
  measure(tokens, batch_size=5)
  perplexity.perplexity(
    RunningMean(nnx.Rngs(1)), tokens, context_len=CONTEXT, batch_size=5
  )
  assert not calls


def test_logits_are_never_held_for_the_whole_window():
  calls.clear()
  measure(corpus(300), context_len=17, batch_size=1, loss_chunk=3)
  assert sorted(calls[1:]) == [(1, 2, 5), (1, 3, 5)]


def test_the_model_gets_pattern_and_execution():
  calls.clear()
  tokens = corpus(6 * 256 + CONTEXT + 1)
  layers = (patterns.local(2, 4), patterns.s2(2, 4))
  execution = Execution(implementation="xla")
  result = measure(tokens, patterns=layers, execution=execution)
  assert calls[0] == ((4, CONTEXT), layers, execution)
  losses = [
    loss
    for start in range(0, 6 * 256, 256)
    for place in range(CONTEXT - 1)
    for loss in losses_of(tokens[start + place : start + place + 2])
  ]
  np.testing.assert_allclose(result.loss, np.mean(losses), rtol=1e-5)


def test_progress_counts_the_windows():
  seen = []
  tokens = corpus(6 * 256 + CONTEXT + 1)
  measure(tokens, on_windows=seen.append)
  assert seen == [4, 2]
  assert 6 == perplexity.count_windows(
    tokens, vocab_size=VOCAB, context_len=CONTEXT
  )


def test_short_windows_have_no_last_quarter():
  result = measure(corpus(1000), context_len=3)
  assert result.last_quarter is None
  assert result.num_tokens == 2 * result.num_windows


def test_losses_are_float32_in_any_model_dtype():
  model = RunningMean(nnx.Rngs(0))
  model.embedding = nnx.Param(model.embedding[...].astype(jnp.bfloat16))
  model.head = nnx.Param(model.head[...].astype(jnp.bfloat16))
  graphdef, state = nnx.split(model)
  losses = jax.eval_shape(
    lambda state: perplexity.window_losses(
      state,
      jnp.zeros((2, CONTEXT), jnp.int32),
      graphdef=graphdef,
      patterns=None,
      execution=Execution(),
      loss_chunk=512,
    ),
    state,
  )
  assert losses.dtype == jnp.float32
  assert losses.shape == (2, CONTEXT - 1)


LONG = 6 * 256 + CONTEXT + 1


@pytest.mark.parametrize(
  ("length", "settings", "message"),
  [
    (LONG, {"protocol": "sliding"}, "unknown protocol 'sliding': use one of"),
    (LONG, {"context_len": 1}, "context_len must be at least 2.*got 1"),
    (LONG, {"num_windows": 0}, "num_windows must be at least 1.*got 0"),
    (LONG, {"batch_size": 0}, "batch_size and loss_chunk.*0 and 512"),
    (LONG, {"loss_chunk": 0}, "batch_size and loss_chunk.*4 and 0"),
    (LONG, {"stride": 0}, "stride must be at least 1, got 0"),
    (LONG, {"stride": 64}, "longlora protocol has a stride of 256, got 64"),
    (
      LONG,
      {"protocol": "strided", "stride": 13},
      "stride 13 exceeds context_len 12",
    ),
    (
      5000,
      {"context_len": 99_999},
      "has 5,000 tokens, but windows of 99,999 need 100,256",
    ),
    (LONG - 6 * 256, {}, "has 13 tokens, but windows of 12 need 269"),
    (
      LONG,
      {"protocol": "strided", "stride": 1000, "context_len": 2000},
      "has 1,549 tokens, but windows of 2,000 need 3,001",
    ),
    (LONG, {"protocol": "document", "stride": 4}, "needs the document ends"),
    (
      LONG,
      {"protocol": "document", "stride": 4, "document_ends": [LONG]},
      "give a bos_id within the vocabulary of 11, got None",
    ),
    (
      LONG,
      {
        "protocol": "document",
        "stride": 4,
        "document_ends": [LONG],
        "bos_id": 11,
      },
      "give a bos_id within the vocabulary of 11, got 11",
    ),
    (
      LONG,
      {
        "protocol": "document",
        "stride": 4,
        "document_ends": [LONG - 1],
        "bos_id": BOS,
      },
      "document_ends must increase up to the 1,549 tokens",
    ),
    (
      LONG,
      {
        "protocol": "document",
        "context_len": 2000,
        "document_ends": [49, LONG],
        "bos_id": BOS,
      },
      "no document of the corpus has 2,000 tokens, and the longest has 1,500",
    ),
  ],
)
def test_bad_settings_are_named(length, settings, message):
  with pytest.raises(ValueError, match=message) as error:
    measure(corpus(length), **settings)
  assert "\n" not in str(error.value)


def test_the_shortest_corpus_has_one_window():
  tokens = corpus(CONTEXT + 257)
  assert measure(tokens).num_windows == 1
  with pytest.raises(ValueError, match="has 268 tokens"):
    measure(tokens[:-1])


def test_ids_outside_the_vocabulary_are_named():
  tokens = corpus(2000)
  tokens[1234] = VOCAB
  with pytest.raises(ValueError, match="the id 11 at position 1,234"):
    measure(tokens)
  with pytest.raises(ValueError, match="flat array of integers"):
    measure(np.zeros((2, 1000), np.int32))
  with pytest.raises(ValueError, match="flat array of integers"):
    measure(np.zeros(1000))


def test_a_loss_that_is_not_finite_is_refused():
  model = RunningMean(nnx.Rngs(0))
  model.head[...] = model.head[...].at[0, 0].set(jnp.nan)
  with pytest.raises(ValueError, match="not finite in the window at token 0"):
    perplexity.perplexity(model, corpus(LONG), context_len=CONTEXT)


# Every loss, and what context is worth.


def keep(tokens, **settings):
  return measure(tokens, keep_losses=True, **settings)


def test_losses_are_kept_only_if_asked_for():
  assert measure(corpus(600)).by_window is None


@pytest.mark.parametrize("protocol", ["longlora", "strided"])
def test_every_loss_of_every_window_is_kept(protocol):
  tokens = corpus(7 * 256)
  settings = {"protocol": protocol} | (
    {"stride": 5, "num_windows": 6} if protocol == "strided" else {}
  )
  found = keep(tokens, **settings)
  kept = found.by_window
  assert kept.losses.dtype == np.float32 and kept.context_len == CONTEXT
  for row, start in zip(kept.losses, kept.starts, strict=True):
    window = tokens[start : start + CONTEXT]
    np.testing.assert_allclose(row, losses_of(window), rtol=1e-5)
  # Those that count have the perplexity as their mean.
  assert np.nanmean(kept.scored) == pytest.approx(found.loss, rel=1e-5)
  assert (~np.isnan(kept.scored)).sum() == found.num_tokens
  quarter = kept.scored[:, bootstrap.last_quarter(CONTEXT)]
  assert np.exp(np.nanmean(quarter)) == pytest.approx(
    found.last_quarter, rel=1e-5
  )
  assert not kept.documents.any()


def test_windows_belong_to_the_document_of_their_middle():
  tokens = corpus(100)
  ends = [20, 21, 100]
  kept = keep(
    tokens, protocol="strided", stride=1, document_ends=np.array(ends)
  ).by_window
  assert set(kept.documents) == {0, 1, 2}
  for start, document in zip(kept.starts, kept.documents, strict=True):
    middle = start + CONTEXT // 2
    assert document == sum(end <= middle for end in ends)


def test_windows_of_documents_know_their_bos():
  documents = [corpus(n, seed=n) for n in (14, 30)]
  kept = keep(
    np.concatenate(documents),
    protocol="document",
    stride=8,
    document_ends=np.array([14, 44]),
    bos_id=BOS,
  ).by_window
  assert kept.documents.tolist() == [0, 0, 1, 1, 1, 1]
  assert kept.begins.tolist() == [True, False, True, False, False, False]
  first = [BOS, *documents[1][: CONTEXT - 1]]
  np.testing.assert_allclose(kept.losses[2], losses_of(first), rtol=1e-5)


def gain(tokens, windows, **settings):
  return perplexity.context_gain(
    MODEL, tokens, windows, **{"batch_size": 4, **settings}
  )


@pytest.mark.parametrize(
  ("context_len", "short_len", "stride"),
  [
    (CONTEXT, 4, 1),
    (CONTEXT, 1, 1),
    # Three tokens by twos; and more than there are.
    (CONTEXT, 5, 2),
    (CONTEXT, 5, 9),
    # By default an eighth: two of 16; 12 is all that is before the first.
    (66, 17, None),
    (16, 12, 3),
  ],
)
def test_gain_is_the_loss_given_less_minus_the_loss_given_all(
  context_len, short_len, stride
):
  tokens = corpus(3 * 256)
  windows = keep(tokens, context_len=context_len).by_window
  found = gain(tokens, windows, short_len=short_len, stride=stride)
  quarter = context_len // 4
  step = min(stride or short_len // 8, quarter)
  assert found.shape == (len(windows.starts), quarter)
  for start, row in zip(windows.starts, found, strict=True):
    given_all = losses_of(tokens[start : start + context_len])
    for i, value in enumerate(row):
      place = context_len - quarter + i
      # Strides count from the first token; the last stride ends at the end.
      behind = place - min(i // step * step, quarter - step)
      behind -= context_len - quarter
      few = tokens[start + place - short_len - behind : start + place + 1]
      assert short_len <= len(few) - 1 < short_len + step
      expected = losses_of(few)[-1] - given_all[place - 1]
      assert value == pytest.approx(expected, abs=2e-5)


def test_gain_over_the_same_context_is_zero():
  tokens = corpus(3 * 256)
  windows = keep(tokens, context_len=16).by_window
  found = gain(tokens, windows, short_len=12, stride=4)
  np.testing.assert_allclose(found, 0, atol=1e-6)


def test_gain_gives_bos_where_the_long_window_has_it():
  tokens = corpus(40)
  windows = keep(
    tokens,
    context_len=16,
    protocol="document",
    stride=16,
    document_ends=np.array([40]),
    bos_id=BOS,
  ).by_window
  found = gain(tokens, windows, short_len=12, stride=1, bos_id=BOS)
  # The first token scored has the same 12 before it, BOS among them.
  assert windows.begins[0] and abs(found[0, 0]) < 1e-6
  expected = losses_of(tokens[0:13])[-1] - losses_of([BOS, *tokens[:13]])[-1]
  assert found[0, 1] == pytest.approx(expected, abs=2e-5)


def test_progress_of_a_gain_counts_the_short_windows():
  tokens = corpus(3 * 256)
  windows = keep(tokens, context_len=32).by_window
  reported = []
  gain(tokens, windows, short_len=9, stride=3, on_windows=reported.append)
  starts, length = perplexity.gain_windows(32, 9, 3)
  assert starts.tolist() == [15, 18, 20] and length == 12
  assert sum(reported) == 3 * len(windows.starts)


@pytest.mark.parametrize(
  ("lengths", "message"),
  [
    ((1024, 900), "three quarters of them, got 1,024 and 900"),
    ((1024, 0), "got 1,024 and 0"),
    ((3, 1), "at least 4 tokens.*got 3 and 1"),
    ((1024, 256, 0), "stride of a gain must be at least 1, got 0"),
  ],
)
def test_a_gain_that_is_not_defined_is_refused(lengths, message):
  with pytest.raises(ValueError, match=message):
    perplexity.gain_windows(*lengths)
