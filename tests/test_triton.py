"""The Triton kernels' own properties: sizes, scales, launches, tables.

What they compute is tested in test_backends, what they refuse in test_contract.
"""

import functools

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scca_jax import patterns
from scca_jax.backends import blocks, reference, triton
from scca_jax.backends.block_sizes import BlockSizes
from scca_jax.patterns import AttentionPattern, HeadPattern


def _check(pattern, inputs, *, scale=0.3, **settings):
  """Compares outputs and gradients with the reference, both of that scale."""
  results = [
    cases.run(inputs, attend=functools.partial(f, scale=scale), pattern=pattern)
    for f in (
      functools.partial(triton.attention, interpret=True, **settings),
      reference.attention,
    )
  ]
  cases.compare(*results)


def test_blocks_may_have_any_size():
  pattern = AttentionPattern(
    (
      HeadPattern(),
      HeadPattern(window=50),
      HeadPattern(chunk_size=160, offset=70, shift=90),
      HeadPattern(dilation=2, shift=1),
    )
  )
  sizes = triton.Sizes(
    BlockSizes(32, 16), BlockSizes(16, 32), BlockSizes(16, 16)
  )
  _check(pattern, cases.make_inputs(4, 200), sizes=sizes)


def test_scales_need_not_be_positive():
  _check(patterns.local(1, 12), cases.make_inputs(1, 20, 1), scale=-0.7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_a_pass_is_few_launches_whatever_the_dilations(dtype, kv_heads, pass_):
  pattern = patterns.longmixed(8, 32)
  shapes = [(1, 64, heads, 8) for heads in (8, kv_heads, kv_heads)]
  arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]

  def attend(query, key, value):
    return triton.attention(
      query,
      key,
      value,
      pattern,
      segment_ids=None,
      query_offset=0,
      scale=1.0,
      interpret=True,
    )

  def gradients(query, key, value):
    output, vjp = jax.vjp(attend, query, key, value)
    return vjp(output)

  function = attend if pass_ == "forward" else gradients
  text = str(jax.make_jaxpr(function)(*arrays))
  assert text.count("= pallas_call[") == (1 if pass_ == "forward" else 3)
  # Inputs are neither padded nor gathered outside the kernels.
  assert "= pad[" not in text


@pytest.mark.parametrize("inverse", [False, True])
def test_long_programs_start_first(inverse):
  pattern = patterns.mix(patterns.dense(2), patterns.sda(2, 4))
  rules = tuple(blocks.Rule.of(head, "drop") for head in pattern.heads)
  table, counts = triton._make_table(
    rules, 2, 200, BlockSizes(16, 16), inverse, False
  )
  num_blocks = table[:, :, blocks.FIELD["num_blocks"]].sum(axis=1)
  assert table.shape[1] == counts.max() == (2 if inverse else 1)
  # A mask costs a quarter of a block.
  assert (np.diff(num_blocks) <= 0.25 * num_blocks[1:] + 1).all()
