"""Every back end against `reference`, which is the definition.

GPU back ends run on a CPU here: Triton's kernels interpreted, cuDNN's dense
calls through XLA. What GPUs compute is tested on a GPU, in test_gpu_backends;
Pallas cannot interpret the products of `mosaic`.
"""

import dataclasses
import functools

import attention_cases as cases
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES
from hypothesis import strategies as st

import scca_jax
from scca_jax import patterns, sharding
from scca_jax.backends import registry, xla, xla_cache, xla_strips
from scca_jax.backends.contract import BackEnd, Call
from scca_jax.patterns import AttentionPattern, HeadPattern


def _anywhere(name: str, **settings) -> BackEnd:
  """A back end for GPUs, set up to run on a CPU in float32."""
  back_end = registry.BACK_ENDS[name]
  attention = functools.partial(back_end.load(), **settings)
  return dataclasses.replace(
    back_end,
    load=lambda: attention,
    runs_on=lambda device: True,
    dtypes=(*back_end.dtypes, "float32"),
    head_dims=None,
  )


def _alone(back_end: BackEnd) -> cases.Attend:
  """Attention by one back end; a refusal is an error."""

  def attend(query, key, value, pattern, *, segment_ids, query_offset):
    call = Call(
      query=query,
      key=key,
      value=value,
      pattern=pattern,
      scale=query.shape[-1] ** -0.5,
      segment_ids=segment_ids,
      query_offset=query_offset,
      needs_log_sum=back_end.log_sum,
    )
    return registry.attend(call, (back_end,))

  return attend


def _on_mesh(**sizes) -> cases.Attend:
  mesh = sharding.make_mesh(sharding.MeshConfig(**sizes))
  return functools.partial(
    scca_jax.attention, implementation="reference", mesh=mesh, return_lse=True
  )


ATTEND = {
  "xla": _alone(registry.BACK_ENDS["xla"]),
  "triton": _alone(_anywhere("triton", interpret=True)),
  "cudnn": _alone(_anywhere("cudnn", dense_implementation="xla")),
  # Of 8 shards all queries need keys from before the shard, of 2 the first few;
  # and shifts are longer than a shard, or shorter.
  "8 shards": _on_mesh(sequence=8),
  "2 shards": _on_mesh(sequence=2),
}
SHARED = ("named", "named, local", "one token", "ragged", "drawn")
RUNS = {
  "xla": (
    *SHARED,
    *("named, slot", "seven tokens", "many blocks"),
    *("odd union", "odd union, local"),
  ),
  # Some of the first are of disjoint parts, as on a mesh.
  "triton": (*SHARED, "union", "near", "whole union"),
  "cudnn": tuple(name for name in CASES if name.startswith("pieces")),
  "8 shards": ("small chunks", "near", "near, sinks"),
  "2 shards": ("small chunks, local", "near, sinks, local"),
}


@pytest.mark.parametrize(
  ("name", "case"), [(name, case) for name in RUNS for case in RUNS[name]]
)
def test_outputs_and_gradients_are_those_of_the_reference(name, case):
  cases.check_case(ATTEND[name], CASES[case])


def test_every_case_is_run():
  assert {case for runs in RUNS.values() for case in runs} == set(CASES)


@pytest.mark.parametrize("name", ["xla", "triton"])
def test_queries_may_start_late(name):
  # So far after the keys that every key they see is there.
  pattern = AttentionPattern(
    (
      HeadPattern(chunk_size=8, shift=8),
      HeadPattern(chunk_size=16, shift=40),
      HeadPattern(chunk_size=8, offset=-16, shift=13),
      HeadPattern(chunk_size=4, shift=8),
    )
  )

  def at_offset(attend, *arrays, segment_ids, query_offset):
    del query_offset
    return attend(*arrays, segment_ids=segment_ids, query_offset=8)

  inputs = cases.make_inputs(4, 40, 2)
  found, expected = (
    cases.run(
      inputs, attend=functools.partial(at_offset, attend), pattern=pattern
    )
    # Of the public function queries must lie within the keys.
    for attend in (ATTEND[name], _alone(registry.BACK_ENDS["reference"]))
  )
  cases.compare(found, expected)


RULES = ({"boundary": "drop"}, {"boundary": "local"}, {"causality": "slot"})


@hypothesis.settings(
  max_examples=hypothesis.settings.default.max_examples // 40
)
@hypothesis.given(
  heads=st.lists(
    cases.heads_drawn(st.integers(1, 24), st.integers(-30, 30)),
    min_size=3,
    max_size=3,
  ),
  rule=st.sampled_from(RULES),
  seq_len=st.integers(1, 40),
  segmented=st.booleans(),
)
def test_drawn_patterns_have_their_outputs_and_gradients(
  heads, rule, seq_len, segmented
):
  pattern = AttentionPattern(tuple(heads), **rule)
  case = cases.Case(pattern, seq_len, 1, segmented)
  cases.check_case(ATTEND["xla"], case)


@hypothesis.settings(
  max_examples=hypothesis.settings.default.max_examples // 40
)
@hypothesis.given(
  heads=st.lists(cases.unions_drawn(), min_size=3, max_size=3),
  boundary=st.sampled_from(patterns.BOUNDARIES),
  seq_len=st.integers(1, 40),
  segmented=st.booleans(),
)
def test_drawn_unions_have_their_outputs_and_gradients(
  heads, boundary, seq_len, segmented
):
  pattern = AttentionPattern(tuple(heads), boundary)
  case = cases.Case(pattern, seq_len, 1, segmented)
  cases.check_case(ATTEND["xla"], case)


def test_unions_of_many_sinks_and_segments(monkeypatch):
  # Several blocks of queries and of keys.
  monkeypatch.setattr(xla_cache, "_SCORE_BYTES", 4 * 64 * 100)
  monkeypatch.setattr(xla_cache, "_BLOCK", 16)
  pattern = patterns.mix(
    patterns.scca_near(2, 20, 5, sinks=30), patterns.scca_flow(2, 20, 5)
  )
  ids = jnp.asarray(
    [np.repeat(np.arange(1, 11), 10), np.repeat([3, 0, 4, 5], 25)]
  )
  inputs = cases.make_inputs(4, 100)
  cases.check(ATTEND["xla"], pattern, inputs, ids)
  cases.check(ATTEND["xla"], pattern, inputs)


def test_gpus_take_larger_blocks_and_skip_empty_starts(monkeypatch):
  # As on a GPU, some strips at a time, but of lengths that a test has.
  monkeypatch.setattr(xla, "_CPU_MAX_STARTS", xla._MAX_STARTS)
  monkeypatch.setattr(xla, "_MIN_BLOCK", 8)
  monkeypatch.setattr(xla, "_CPU_BLOCK", 8)
  monkeypatch.setattr(xla, "_CPU_SCORE_BYTES", 3 * 4 * 32 * 32)
  pieces = []
  core = xla_strips.core
  monkeypatch.setattr(
    xla_strips,
    "core",
    lambda band, *x: pieces.extend(band.pieces) or core(band, *x),
  )
  ids = jnp.asarray([np.arange(61) // 23, np.arange(61) // 60 + 1])
  cases.check(
    ATTEND["xla"], patterns.scca_fixed(2, 32), cases.make_inputs(2, 61), ids
  )
  assert {piece.num_empty for piece in pieces} == {0, 16}
  assert {piece.block for piece in pieces} >= {16, 32}


# At 60 or 150 scores exceed what float16 can hold. A CPU leaves the weights of
# `xla` exact, so that it is compared with the reference.
@pytest.mark.parametrize(
  ("name", "dtype", "size", "dense"),
  [
    *(
      ("xla", dtype, size, cases.reference)
      for dtype in (jnp.bfloat16, jnp.float16)
      for size in (3.0, 150.0)
    ),
    ("triton", jnp.bfloat16, 1.0, cases.dense),
    ("triton", jnp.float16, 60.0, cases.dense),
  ],
)
def test_half_precision_is_as_exact_as_dense(name, dtype, size, dense):
  sinks = 2 if name == "xla" else 0
  cases.check_half(ATTEND[name], dtype, size, dense, sinks)


# Of float16, as the programs of the test above; Triton's do most for it.
@pytest.mark.parametrize("name", ["xla", "triton"])
def test_queries_without_keys_get_exactly_nothing(name):
  cases.check_empty_rows(ATTEND[name], jnp.float16, 2 if name == "xla" else 0)


@pytest.mark.parametrize(
  ("rule", "kv_heads"),
  [({"boundary": "local"}, 3), ({"causality": "slot"}, 1)],
  ids=["local", "slot"],
)
def test_decoding_has_its_outputs_and_gradients(rule, kv_heads):
  kv_len, seq_len = 600, 5
  members = [patterns.longmixed(4, 150), patterns.s2(2, 150)]
  if "boundary" in rule:
    members.append(patterns.scca_near(3, 75, 8, 9))
  pattern = cases.ruled(patterns.mix(*members), **rule)
  ids = cases.make_segments(kv_len)
  inputs = cases.make_inputs(
    pattern.num_heads, seq_len, kv_heads, kv_len=kv_len
  )
  for offset in (0, 148, kv_len - seq_len):
    cases.check(ATTEND["xla"], pattern, inputs, ids, offset)


def test_a_prompt_meets_a_longer_cache():
  pattern = cases.ruled(patterns.longmixed(4, 12), boundary="local")
  inputs = cases.make_inputs(4, 30, kv_len=50)
  cases.check(ATTEND["xla"], pattern, inputs, cases.make_segments(50))


@pytest.mark.parametrize(
  ("name", "tolerance"), [("xla", 1e-6), ("triton", 1e-5)]
)
def test_transformations_change_nothing(name, tolerance):
  cases.check_transformations(
    ATTEND[name],
    tolerance,
    cases.make_inputs(4, 30),
    patterns.scca_fixed(4, 12),
  )


def _temp_bytes(attend, num_heads, seq_len):
  """Returns the temporary memory of forward and backward, in bytes."""

  def step(query, key, value, d_output):
    output, vjp = jax.vjp(attend, query, key, value)
    return output, vjp(d_output)

  array = jax.ShapeDtypeStruct((1, seq_len, num_heads, 64), jnp.float32)
  compiled = jax.jit(step).lower(*[array] * 4).compile(cases.QUICKLY)
  return compiled.memory_analysis().temp_size_in_bytes


def _by_xla(pattern):
  return functools.partial(
    scca_jax.attention, pattern=pattern, implementation="xla"
  )


def test_memory_is_a_tenth_of_dense_attention():
  attend = _by_xla(patterns.scca_fixed(8, 512))
  dense = functools.partial(jax.nn.dot_product_attention, is_causal=True)
  assert _temp_bytes(attend, 8, 4096) <= _temp_bytes(dense, 8, 4096) / 10


@pytest.mark.parametrize(
  "pattern",
  [
    pytest.param(patterns.scca_fixed(8, 512), marks=pytest.mark.slow),
    pytest.param(
      patterns.mix(patterns.sda(6, 4), patterns.sliding(2, 64)),
      marks=pytest.mark.slow,
    ),
    patterns.scca_near(8, 512, 4, sinks=4),
  ],
  ids=["scca_fixed", "unchunked", "near"],
)
def test_memory_grows_with_the_sequence(pattern):
  attend = _by_xla(pattern)
  short, long = (_temp_bytes(attend, 8, n) for n in (8192, 16384))
  assert long <= 2.2 * short
