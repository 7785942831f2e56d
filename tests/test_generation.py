"""Cached decoding against the model run from the start for every token."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scca_jax import generation, patterns, segments, sharding
from scca_jax.generation import FINISHED, Sampling
from scca_jax.llama import Execution, Llama
from scca_jax.llama_config import LlamaConfig
from scca_jax.rope import RopeScaling
from scca_jax.sharding import MeshConfig

CONFIG = LlamaConfig(
  vocab_size=37,
  hidden_size=24,
  intermediate_size=32,
  num_layers=4,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  context_len=64,
  # Larger than usual: logits that tell tokens apart.
  initializer_range=0.4,
)
PROMPTS = [
  np.random.default_rng(length).integers(0, 37, length).tolist()
  for length in (9, 1, 23)
]
NEW = 12
FIXED = patterns.scca_fixed(4, chunk_size=8)
SDA = patterns.sda(4, dilation=2)


@functools.cache
def _model(**changes):
  return Llama(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(1))


@functools.partial(jax.jit, static_argnames=("graphdef", "pattern"))
def _all_logits(state, tokens, graphdef, pattern):
  return nnx.merge(graphdef, state)(tokens, patterns=pattern)


def _without_cache(model, prompt, pattern, num_new=NEW):
  """The likeliest tokens, the whole sequence run for each of them."""
  graphdef, state = nnx.split(model)
  # One length for all: what is padded lies in the future.
  ids = np.zeros((1, max(map(len, PROMPTS)) + num_new), np.int32)
  ids[0, : len(prompt)] = prompt
  for i in range(len(prompt), len(prompt) + num_new):
    logits = _all_logits(state, jnp.asarray(ids), graphdef, pattern)
    ids[0, i] = int(logits[0, i - 1].argmax())
  return ids[0, len(prompt) : len(prompt) + num_new].tolist()


@pytest.mark.parametrize(
  "pattern",
  [
    patterns.scca_flow(4, chunk_size=8, num_chunks=5),
    patterns.longmixed(4, chunk_size=8),
    patterns.dna(4, window=3, dilation=2),
    (FIXED, SDA, FIXED, patterns.dense(4)),
  ],
  ids=["flow", "longmixed", "dna", "schedule"],
)
def test_the_cache_changes_no_token(pattern):
  model = _model()
  found = generation.generate(
    model,
    PROMPTS,
    max_new_tokens=NEW,
    prefill_patterns=pattern,
    decode_patterns=pattern,
  )
  assert found == [_without_cache(model, p, pattern) for p in PROMPTS]


# The longest prompt, 23 tokens, takes several segments and ends within one; the
# others end in the first. Some layers receive messages from one segment before
# or several, or sinks; some, with unlimited reach or chunks that do not fit the
# segment, read the cache.
@pytest.mark.parametrize(
  ("pattern", "length"),
  [
    # The last layer of the schedule is dense too.
    pytest.param(patterns.dense(4), 8, marks=pytest.mark.slow),
    (FIXED, 5),
    (patterns.scca_near(4, 8, 5, sinks=3), 8),
    (
      (
        patterns.mixture(patterns.dilated(4, 4, 2), FIXED),
        SDA,
        patterns.sliding(4, 7),
        patterns.dense(4),
      ),
      8,
    ),
  ],
  ids=["dense", "ragged", "sinks", "schedule"],
)
def test_a_prompt_in_segments_has_the_logits_of_one_piece(pattern, length):
  model = _model()
  tokens = np.zeros((len(PROMPTS), 24), np.int32)
  for row, prompt in zip(tokens, PROMPTS, strict=True):
    row[: len(prompt)] = prompt
  last = jnp.asarray([len(prompt) - 1 for prompt in PROMPTS])
  graphdef, state = nnx.split(model)

  @jax.jit
  def read(state, empty):
    model = nnx.merge(graphdef, state)
    found = segments.read_prompts(
      model, tokens, empty, last, pattern, Execution(segment_len=length)
    )
    whole = model.cached_hidden_states(jnp.asarray(tokens), empty, pattern)
    return *found, whole[1]

  hidden, cache, whole = read(state, model.init_cache(3, 24))
  for i, prompt in enumerate(PROMPTS):
    wanted = _all_logits(
      state, jnp.asarray(tokens[i : i + 1]), graphdef, pattern
    )[0, len(prompt) - 1]
    np.testing.assert_allclose(
      model.logits(hidden[i]), wanted, rtol=2e-5, atol=2e-5
    )
  for i, prompt in enumerate(PROMPTS):
    for found, wanted in ((cache.key, whole.key), (cache.value, whole.value)):
      np.testing.assert_allclose(
        found[:, i, : len(prompt)],
        wanted[:, i, : len(prompt)],
        rtol=2e-5,
        atol=2e-5,
      )


def test_segments_change_no_token():
  prompts = [*PROMPTS, np.random.default_rng(0).integers(0, 37, 70).tolist()]
  settings: dict[str, Any] = {
    "max_new_tokens": NEW,
    "prefill_patterns": FIXED,
  }
  found = generation.generate(
    _model(), prompts, execution=Execution(segment_len=24), **settings
  )
  assert found == generation.generate(_model(), prompts, **settings)


def test_segments_and_meshes_do_not_go_together():
  mesh = sharding.make_mesh(MeshConfig(data=2))
  with pytest.raises(ValueError, match="segment_len=8.*single device, not 2"):
    generation.generate(
      _model(),
      PROMPTS[:2],
      max_new_tokens=1,
      execution=Execution(segment_len=8, mesh=mesh),
    )


@pytest.mark.parametrize("pattern", [None, FIXED], ids=["dense", "fixed"])
def test_memory_of_a_prompt_is_that_of_a_segment(pattern):
  graphdef, state = nnx.split(_model())

  def working_memory(seq_len):
    """Bytes beside the arguments, of which the cache is one."""

    def read(state, tokens, cache, last):
      return segments.read_prompts(
        nnx.merge(graphdef, state),
        tokens,
        cache,
        last,
        pattern,
        Execution(segment_len=256, implementation="xla"),
      )

    shapes = jax.eval_shape(lambda: _model().init_cache(1, seq_len))
    compiled = (
      jax.jit(read, donate_argnums=2)
      .lower(
        state,
        jax.ShapeDtypeStruct((1, seq_len), jnp.int32),
        shapes,
        jax.ShapeDtypeStruct((1,), jnp.int32),
      )
      .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes

  short, long = working_memory(1024), working_memory(4096)
  # Dense attention holds one layer's keys and values, twice.
  of_layer = 2 * 2 * 4 * 2 * 8 * (4096 - 1024)
  assert long - short <= (2 * of_layer if pattern is None else 4 * 2 * 3072)


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "llama3"])
def test_rope_scaling_holds_in_the_cache(kind):
  model = _model(
    rope_scaling=RopeScaling(
      kind=kind, factor=4.0, original_max_position_embeddings=16
    )
  )
  dense = patterns.dense(4)
  found = generation.generate(model, PROMPTS, max_new_tokens=NEW)
  assert found == [_without_cache(model, p, dense) for p in PROMPTS]


@pytest.mark.parametrize(
  "mesh",
  [
    MeshConfig(data=2, tensor=2),
    MeshConfig(fsdp=2),
    MeshConfig(data=3),  # Of which four prompts cannot make equal shares.
  ],
  ids=sharding.shown,
)
def test_a_mesh_changes_no_token(mesh):
  prompts, model = [*PROMPTS, PROMPTS[0]], _model()
  graphdef, state = nnx.split(model)
  devices = sharding.make_mesh(mesh)
  placed = nnx.merge(graphdef, sharding.place(state, devices))
  found = generation.generate(
    placed,
    prompts,
    max_new_tokens=NEW,
    prefill_patterns=FIXED,
    decode_patterns=FIXED,
    execution=Execution(mesh=devices),
  )
  wanted = [_without_cache(model, p, FIXED) for p in PROMPTS]
  assert found == [*wanted, wanted[0]]


def test_a_cache_is_divided_over_the_mesh():
  mesh = sharding.make_mesh(MeshConfig(data=2, tensor=2, sequence=2))
  cache = _model().init_cache(4, 8, mesh)
  assert cache.key.sharding.shard_shape(cache.key.shape) == (4, 2, 8, 1, 8)
  with pytest.raises(NotImplementedError, match="leave sequence out"):
    _model().cached_hidden_states(
      jnp.zeros((4, 2), int), cache, execution=Execution(mesh=mesh)
    )


def test_prompts_go_alone_as_together():
  settings = {
    "max_new_tokens": NEW,
    "prefill_patterns": FIXED,
  }
  together = generation.generate(_model(), PROMPTS, **settings)
  for prompt, wanted in zip(PROMPTS, together, strict=True):
    assert generation.generate(_model(), [prompt], **settings) == [wanted]


def test_a_sequence_ends_with_its_end():
  free = generation.generate(_model(), PROMPTS, max_new_tokens=NEW)
  eos = free[0][3]
  found = generation.generate(
    _model(), PROMPTS, max_new_tokens=NEW, eos_ids=(eos,)
  )
  for with_end, without in zip(found, free, strict=True):
    end = without.index(eos) + 1 if eos in without else NEW
    assert with_end == without[:end]
  steps = list(
    generation.stream(_model(), PROMPTS[:1], max_new_tokens=NEW, eos_ids=(eos,))
  )
  assert len(steps) == len(found[0])
  # The model's own ends, of which there may be several.
  model = _model(eos_token_id=(free[0][3], 36))
  assert (
    generation.generate(model, PROMPTS[:1], max_new_tokens=NEW) == (found[:1])
  )


def test_finished_sequences_say_so():
  free = generation.generate(_model(), PROMPTS, max_new_tokens=NEW)
  eos = next(t for t in free[0] if t not in free[1][: NEW // 2])
  steps = np.stack(
    list(
      generation.stream(
        _model(), PROMPTS[:2], max_new_tokens=NEW, eos_ids=(eos,)
      )
    )
  )
  after = free[0].index(eos) + 1
  assert (steps[after:, 0] == FINISHED).all()
  assert (steps[:after, 0] != FINISHED).all()


LOGITS = np.log(
  np.array([[0.4, 0.05, 0.25, 0.2, 0.1], [0.1, 0.6, 0.1, 0.15, 0.05]])
).astype(np.float32)


@pytest.mark.parametrize(
  ("sampling", "kept"),
  [
    (Sampling(temperature=1.0), [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
    (Sampling(temperature=2.0, top_k=2), [[0, 2], [1, 3]]),
    (Sampling(temperature=1.0, top_p=0.6), [[0, 2], [1]]),
    (Sampling(temperature=1.0, top_p=0.62), [[0, 2], [1, 3]]),
    # The probabilities that top_p sums are those within top_k.
    (Sampling(temperature=1.0, top_k=2, top_p=0.61), [[0], [1]]),
    (Sampling(temperature=1.0, top_p=1e-6), [[0], [1]]),
  ],
)
def test_filters_keep_the_likeliest(sampling, kept):
  found = np.asarray(generation.filtered(jnp.asarray(LOGITS), sampling))
  for row, logits, tokens in zip(found, LOGITS, kept, strict=True):
    assert np.flatnonzero(row > -np.inf).tolist() == tokens
    np.testing.assert_allclose(
      row[tokens], logits[tokens] / sampling.temperature, rtol=1e-6
    )


def test_tokens_are_drawn_with_their_probabilities():
  sampling = Sampling(temperature=0.5, top_k=4)
  draws = generation._draw(
    jnp.tile(jnp.asarray(LOGITS[:1]), (20_000, 1)),
    sampling,
    jnp.zeros(2, jnp.int32),
  )
  wanted = np.array([0.4, 0, 0.25, 0.2, 0.1]) ** 2
  wanted /= wanted.sum()
  share = np.bincount(np.asarray(draws), minlength=5) / 20_000
  # Five standard deviations.
  np.testing.assert_allclose(share, wanted, atol=5 * 0.5 / 20_000**0.5)


def test_a_seed_gives_the_same_text_again():
  def run(seed):
    return generation.generate(
      _model(),
      PROMPTS,
      max_new_tokens=NEW,
      sampling=Sampling(temperature=1.0, seed=seed),
    )

  assert run(3) == run(3)
  assert run(3) != run(4)


def test_prompts_with_the_same_room_share_what_is_compiled():
  def run(prompt, seed):
    return generation.generate(
      _model(),
      [prompt],
      max_new_tokens=3,
      sampling=Sampling(temperature=0.1, seed=seed),
      prompt_len=100,
    )

  run(PROMPTS[0], 0)
  before = generation.next_tokens._cache_size()
  run(PROMPTS[2], 1)
  assert generation.next_tokens._cache_size() == before


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    ({"temperature": -1.0}, "temperature"),
    ({"top_k": 0}, "top_k"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
  ],
)
def test_sampling_out_of_range_is_named(settings, said):
  with pytest.raises(ValueError, match=said):
    Sampling(**settings)


@pytest.mark.parametrize(
  ("prompts", "settings", "said"),
  [
    ([], {}, "no prompt"),
    ([[1], []], {}, "prompt 1 has no token"),
    ([[1, 37]], {}, "vocabulary of 37"),
    ([[1, -1]], {}, "vocabulary of 37"),
    ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
    ([[1, 2]], {"prompt_len": 1}, "prompt_len must be at least the 2 tokens"),
    (
      [[1]],
      {"prefill_patterns": dataclasses.replace(FIXED, causality="slot")},
      "causality",
    ),
    ([[1]], {"decode_patterns": (FIXED,) * 3}, "4 layers"),
  ],
)
def test_bad_input_is_named(prompts, settings, said):
  with pytest.raises(ValueError, match=said):
    generation.generate(_model(), prompts, **({"max_new_tokens": 2} | settings))


def test_a_cache_that_is_too_small_is_named():
  model = _model()
  with pytest.raises(ValueError, match="1 sequences of 4 tokens"):
    model.cached_hidden_states(
      jnp.zeros((1, 5), jnp.int32),
      model.init_cache(1, 4),
      patterns=patterns.dense(4),
    )


def test_a_logit_that_is_not_finite_ends_generation():
  model = Llama(CONFIG, rngs=nnx.Rngs(1))
  # Only what follows token 5 overflows.
  embedding = model.embed_tokens.embedding
  embedding[...] = embedding[...].at[5].set(jnp.inf)
  settings = {"max_new_tokens": 3, "eos_ids": ()}
  for sampling in (None, Sampling(temperature=1.0, top_k=3)):
    with pytest.raises(
      ValueError, match="token 1 after prompt 1 is not finite"
    ):
      generation.generate(
        model, [[1, 2], [1, 5]], sampling=sampling, **settings
      )
  assert len(generation.generate(model, [[1, 2]], **settings)[0]) == 3
