"""Sequences computed in segments, against the same sequences in one piece."""

import dataclasses

import attention_cases as cases
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama
from flax import nnx
from hypothesis import strategies as st

from scca_jax import (
  dispatch,
  llama,
  lora,
  patterns,
  perplexity,
  quantize,
  segments,
  training,
)
from scca_jax.llama import Execution, Llama
from scca_jax.patterns import AttentionPattern, members
from scca_jax.segment_attention import Segment, no_messages, refuses_segments

SEQ, LENGTH = 61, 16
LOCAL = {"boundary": "local"}
SERVED = {
  "local": patterns.local(4, 8),
  "sliding": patterns.sliding(4, 7),
  "sliding by a segment": patterns.sliding(4, 17),
  "s2": patterns.s2(4, 8),
  "fixed": patterns.scca_fixed(4, 8),
  "fixed, a chunk a segment": patterns.scca_fixed(4, 16),
  "fixed, local": cases.ruled(patterns.scca_fixed(4, 16), **LOCAL),
  "flow": patterns.scca_flow(4, 8, 8),
  "flow, local": cases.ruled(patterns.scca_flow(4, 8, 8), **LOCAL),
  "flow, own chunk and sinks": patterns.scca_flow(
    4, 8, 8, own_chunk=True, sinks=3
  ),
  "near": patterns.scca_near(4, 8, 8),
  "near, sinks": patterns.scca_near(4, 8, 8, sinks=3),
  "dna": patterns.dna(4, 5, 3),
  "dilated": patterns.dilated(4, 8, 2),
  "sda, a window": patterns.sda(4, 2, window=6),
  "mixture": patterns.mixture(
    patterns.dilated(4, 4, 2), patterns.scca_fixed(4, 16)
  ),
}
# Heads of most kinds in one pattern, so that one compilation has them all.
ALL = patterns.mix(
  patterns.sliding(2, 7),
  patterns.s2(2, 8),
  patterns.scca_fixed(2, 8),
  patterns.scca_flow(2, 8, 8),
  patterns.dna(2, 5, 3),
  patterns.dilated(2, 8, 2),
  patterns.scca_near(2, 8, 8),
)
# The others.
APART = (
  "fixed, a chunk a segment",
  "flow, local",
  "near, sinks",
  "sda, a window",
  "mixture",
)


def _attend(query, key, value, pattern, *, segment_ids, query_offset):
  """Attends a segment at a time, by the definition."""
  del query_offset
  batch, seq_len, _, head_dim = query.shape
  count = -(-seq_len // LENGTH)
  rest = (0, count * LENGTH - seq_len)
  query, key, value = (
    jnp.pad(x, ((0, 0), rest, (0, 0), (0, 0))) for x in (query, key, value)
  )
  if segment_ids is not None:
    segment_ids = jnp.pad(segment_ids, ((0, 0), rest))

  def run(carry, index, received):
    parts = (
      jax.lax.dynamic_slice_in_dim(x, index * LENGTH, LENGTH, axis=1)
      for x in (query, key, value)
    )
    output, sent = dispatch.segment_attention(
      *parts,
      pattern,
      Segment(index, segment_ids, count, LENGTH),
      received[0],
      implementation="reference",
    )
    return carry, output, (sent,)

  nothing = no_messages(
    members(pattern),
    Segment(0, None, count, LENGTH),
    batch=batch,
    num_kv_heads=key.shape[2],
    head_dim=head_dim,
    dtype=key.dtype,
  )
  _, outputs = segments.scan(run, None, (nothing,), count)
  return jnp.moveaxis(outputs, 0, 1).reshape(query.shape)[:, :seq_len], None


def _documents(seq_len):
  """Documents that end within segments, and padding."""
  ends = [seq_len // 3, seq_len // 3 * 2, seq_len - 3]
  ids = np.searchsorted(ends, np.arange(seq_len), side="right") + 1
  return jnp.asarray(np.stack([ids % 4, np.full(seq_len, 7)]), jnp.int32)


def _has_sinks(pattern):
  return any(head.sinks for m in members(pattern) for head in m.heads)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=() if name in APART else pytest.mark.slow)
    for name in SERVED
  ],
)
def test_attention_and_its_gradients_are_those_of_one_piece(name):
  pattern = SERVED[name]
  ids = None if _has_sinks(pattern) else _documents(SEQ)
  cases.check(_attend, pattern, cases.make_inputs(4, SEQ), ids)


@hypothesis.settings(
  max_examples=hypothesis.settings.default.max_examples // 40
)
@hypothesis.given(
  heads=st.lists(
    cases.heads_drawn(
      st.sampled_from([2, 4, 8, 16]), st.sampled_from([0, 0, 3, 8])
    ).filter(
      lambda head: not refuses_segments(AttentionPattern((head,)), LENGTH)
    ),
    min_size=4,
    max_size=4,
  ),
  boundary=st.sampled_from(["drop", "local"]),
  seq_len=st.integers(20, 64),
  documents=st.booleans(),
)
def test_drawn_heads_are_served_exactly_or_refused(
  heads, boundary, seq_len, documents
):
  pattern = AttentionPattern(tuple(heads), boundary)
  inputs = cases.make_inputs(len(heads), seq_len)
  ids = _documents(seq_len) if documents else None
  if refuses_segments(pattern, LENGTH):
    with pytest.raises(NotImplementedError, match="local"):
      cases.run(inputs, ids, attend=_attend, pattern=pattern)
  else:
    cases.check(_attend, pattern, inputs, ids)


CONFIG = dataclasses.replace(
  tiny_llama.CONFIG, vocab_size=17, num_kv_heads=2, initializer_range=0.3
)
LORA = lora.LoraConfig(rank=2)


def _model(num_heads, method=None):
  config = dataclasses.replace(CONFIG, num_heads=num_heads)
  model = Llama(config, lora=LORA, rngs=nnx.Rngs(0))
  if method is not None:
    model = quantize.quantize_model(model, method)
  graphdef, params, frozen = nnx.split(model, lora.trainable(LORA), ...)
  # The second matrices of new adapters are 0, and so gradients of the first.
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params
  )
  return graphdef, params, frozen


def _batch(batch=2, seq=SEQ, documents=True):
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, CONFIG.vocab_size, (batch, seq + 1), np.int32)
  found = {
    "tokens": jnp.asarray(tokens[:, :-1]),
    "targets": jnp.asarray(tokens[:, 1:]),
    # Weights of tokens, some of them 0.
    "mask": jnp.asarray(
      np.maximum(0, rng.normal(size=(batch, seq))), jnp.float32
    ),
  }
  if documents:
    ids = jnp.tile(_documents(seq), (batch // 2, 1))
    positions = llama.default_positions(seq, ids)
    # As with skipped positions (PoSE): not those that are the default.
    found |= {"segment_ids": ids, "positions": positions + 3}
  return found


def _gradients(model, batch, layers, execution):
  graphdef, params, frozen = model
  config = training.StepConfig(
    patterns=layers, execution=execution, loss_chunk=10
  )

  def loss_of(params):
    return training._batch_loss(
      params, graphdef, frozen, batch, jax.random.key(0), config
    )

  compiled = jax.jit(
    jax.value_and_grad(loss_of), compiler_options=cases.QUICKLY
  )
  return compiled(params)


def _check_gradients(layers, *, method=None, documents=True, **settings):
  """Compares losses and gradients of segments with those of one piece."""
  first = layers[0] if isinstance(layers, tuple) else layers
  model = _model(first.num_heads, method)
  batch = _batch(documents=documents)
  whole, parts = (
    _gradients(model, batch, layers, Execution(implementation="reference", **x))
    for x in ({}, {"segment_len": LENGTH} | settings)
  )
  np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5)
  for a, b in zip(*map(jax.tree.leaves, (parts, whole)), strict=True):
    largest = np.abs(b).max()
    assert largest > 0
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


def test_gradients_of_the_model_are_those_of_one_piece():
  pytest.importorskip("qwix")
  # Different layers, documents, a ragged end, and everything combined.
  _check_gradients(
    (ALL, patterns.scca_fixed(ALL.num_heads, 16)),
    method="int8",
    remat="offload_projections",
    offload_segments=True,
    mlp_chunk=5,
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_gradients_of_each_pattern_are_those_of_one_piece(name):
  pattern = SERVED[name]
  _check_gradients(pattern, documents=not _has_sinks(pattern), remat="offload")


@pytest.mark.parametrize(
  ("pattern", "length", "said"),
  [
    (patterns.dense(4), 16, "dense.*whole sequence"),
    (patterns.sda(4, 2), 16, r"sda\(.*whole sequence"),
    (patterns.longmixed(4, 8), 16, "longmixed.*whole sequence"),
    (patterns.scca_fixed(4, 32), 16, "scca_fixed.*multiple of the chunk, 32"),
    (patterns.dilated(4, 9, 3), 18, None),
    (patterns.dilated(4, 8, 3), 16, "multiple of the dilation, 3"),
    (patterns.sliding(4, 18), 16, "sliding.*back by 17 tokens"),
    (
      cases.ruled(patterns.scca_fixed(4, 8), causality="slot"),
      16,
      "wrap round",
    ),
    (patterns.scca_near(4, 8, 8, sinks=17), 16, "17 sinks"),
  ],
)
def test_a_pattern_that_is_not_served_is_named(pattern, length, said):
  config = dataclasses.replace(tiny_llama.CONFIG, num_heads=4, num_kv_heads=2)

  def check(**settings):
    segments.check(
      pattern, config, **{"segment_len": length, "seq_len": SEQ} | settings
    )

  # One segment is the whole sequence.
  check(seq_len=length)
  if said is None:
    return check()
  with pytest.raises(ValueError, match=f"segment_len={length} .*{said}"):
    check()


def test_sinks_of_packed_documents_and_meshes_are_refused():
  config = dataclasses.replace(tiny_llama.CONFIG, num_heads=4, num_kv_heads=2)
  sinks = patterns.scca_near(4, 8, 8, sinks=2)
  with pytest.raises(ValueError, match="scca_near.*packed documents"):
    segments.check(sinks, config, segment_len=16, seq_len=SEQ, packed=True)
  with pytest.raises(ValueError, match="a single device, not 2.*mesh"):
    segments.check(
      SERVED["fixed"], config, segment_len=16, seq_len=SEQ, num_devices=2
    )


def test_perplexity_a_segment_at_a_time_is_that_of_the_whole_window():
  config = dataclasses.replace(CONFIG, num_heads=4)
  graphdef, state = nnx.split(Llama(config, rngs=nnx.Rngs(0)))

  def losses_of(**settings):
    return perplexity.window_losses(
      state,
      _batch()["tokens"],
      graphdef=graphdef,
      patterns=SERVED["near, sinks"],
      execution=Execution(implementation="reference", **settings),
      loss_chunk=10,
    )

  whole = losses_of()
  assert whole.shape == (2, SEQ - 1)
  np.testing.assert_allclose(
    losses_of(segment_len=LENGTH), whole, rtol=1e-5, atol=1e-5
  )
