"""Every pattern against PyTorch code that rolls, folds and masks tensors."""

import dataclasses
import functools

import attention_cases as shared
import numpy as np
import pytest
from attention_cases import NAMES, TOLERANCE

torch = pytest.importorskip("torch", reason="parity needs the extra parity")

import torch_attention as written  # noqa: E402

from scca_jax import attention, patterns  # noqa: E402

DENSER_PAIRS = ((8, 1), (32, 4))
SPARSER_PAIRS = ((16, 2), (64, 4))
HEADS = 8
# Of a run of all cases of one rule: length, ragged, and key heads for 8 heads.
SIZES = {
  ("drop", "position", 1): (37, 2),
  ("local", "position", 1): (63, 8),
  ("drop", "slot", 1): (63, 1),
  ("drop", "position", 2): (37, 4),
}

implementations = pytest.mark.parametrize(
  "implementation", ["reference", "xla"]
)


def _case(pattern, function, **settings):
  """A pattern, and the PyTorch function with its arguments."""
  return pattern, functools.partial(function, **settings)


CASES = {
  "dense": _case(patterns.dense(8), written.dense),
  "s2 rolled": _case(
    dataclasses.replace(patterns.s2(8, 16), causality="slot"),
    written.s2_rolled,
    chunk_size=16,
  ),
  "s2 split": _case(patterns.s2(8, 16), written.s2_split, chunk_size=16),
  "fixed": _case(patterns.scca_fixed(8, 16), written.scca_fixed, chunk_size=16),
  "fixed far": _case(
    patterns.scca_fixed(8, 8, 21),
    written.scca_fixed,
    chunk_size=8,
    shift=21,
  ),
  "fixed, one chunk": _case(
    patterns.scca_fixed(8, 64, 48),
    written.scca_fixed,
    chunk_size=64,
    shift=48,
  ),
  "fixed local": _case(
    dataclasses.replace(patterns.scca_fixed(8, 8, 21), boundary="local"),
    written.scca_fixed,
    chunk_size=8,
    shift=21,
    boundary="local",
  ),
  "fixed slot": _case(
    dataclasses.replace(patterns.scca_fixed(8, 16), causality="slot"),
    written.scca_fixed,
    chunk_size=16,
    causality="slot",
  ),
  "flow": _case(
    patterns.scca_flow(8, 8, 5), written.scca_flow, chunk_size=8, num_chunks=5
  ),
  "flow rotated": _case(
    patterns.scca_flow(8, 8, 5, 3),
    written.scca_flow,
    chunk_size=8,
    num_chunks=5,
    rotate=3,
  ),
  "flow local": _case(
    dataclasses.replace(patterns.scca_flow(8, 8, 8), boundary="local"),
    written.scca_flow,
    chunk_size=8,
    num_chunks=8,
    boundary="local",
  ),
  "flow slot": _case(
    dataclasses.replace(patterns.scca_flow(8, 8, 5), causality="slot"),
    written.scca_flow,
    chunk_size=8,
    num_chunks=5,
    causality="slot",
  ),
  "sda 2": _case(patterns.sda(8, 2), written.sda, dilation=2),
  "sda 4": _case(patterns.sda(8, 4), written.sda, dilation=4),
  "sda local": _case(
    dataclasses.replace(patterns.sda(8, 4), boundary="local"),
    written.sda,
    dilation=4,
    boundary="local",
  ),
  "sda slot": _case(
    dataclasses.replace(patterns.sda(8, 4), causality="slot"),
    written.sda,
    dilation=4,
    causality="slot",
  ),
  "sda chunked": _case(
    patterns.sda(8, 4, chunk_size=16), written.sda, dilation=4, chunk_size=16
  ),
  "sda chunks of no multiple": _case(
    patterns.sda(8, 4, chunk_size=10), written.sda, dilation=4, chunk_size=10
  ),
  "sda chunked local": _case(
    dataclasses.replace(patterns.sda(8, 4, chunk_size=2), boundary="local"),
    written.sda,
    dilation=4,
    chunk_size=2,
    boundary="local",
  ),
  "sda windowed": _case(
    patterns.sda(8, 2, window=5), written.sda, dilation=2, window=5
  ),
  "dilated": _case(
    patterns.dilated(8, 16, 4), written.dilated, chunk_size=16, dilation=4
  ),
  "dilated mixture": _case(
    tuple(patterns.dilated(8, *pair) for pair in DENSER_PAIRS),
    written.dilated_mixture,
    pairs=DENSER_PAIRS,
  ),
  "dilated mixture that serves few": _case(
    tuple(patterns.dilated(8, *pair) for pair in SPARSER_PAIRS),
    written.dilated_mixture,
    pairs=SPARSER_PAIRS,
  ),
  "dna": _case(patterns.dna(8, 5, 3), written.dna, window=5, dilation=3),
  "sliding": _case(patterns.sliding(8, 7), written.dna, window=7, dilation=1),
  "longmixed": _case(
    patterns.longmixed(8, 16), written.longmixed, chunk_size=16
  ),
  "longmixed local": _case(
    dataclasses.replace(patterns.longmixed(8, 16), boundary="local"),
    written.longmixed,
    chunk_size=16,
    boundary="local",
  ),
  "longmixed slot": _case(
    dataclasses.replace(patterns.longmixed(8, 16), causality="slot"),
    written.longmixed,
    chunk_size=16,
    causality="slot",
  ),
}


def _parts(name):
  """The patterns of a case that are combined by their log-sum-exp."""
  pattern, _ = CASES[name]
  return pattern if isinstance(pattern, tuple) else (pattern,)


def _rule(name):
  first, *_ = _parts(name)
  return first.boundary, first.causality, len(_parts(name))


@functools.cache
def _inputs(name):
  """Query, key, value, and the cotangents of output and log-sum-exp."""
  length, kv_heads = SIZES[_rule(name)]
  return shared.make_inputs(
    HEADS, length, kv_heads, seed=list(CASES).index(name)
  )


@functools.cache
def _ours_of_rule(rule, implementation):
  """Results of all cases of a rule, side by side: it is compiled once."""
  names = [name for name in CASES if _rule(name) == rule]
  pattern = tuple(
    patterns.mix(*parts)
    for parts in zip(*(_parts(name) for name in names), strict=True)
  )
  columns = zip(*(_inputs(name) for name in names), strict=True)
  results = shared.run(
    tuple(np.concatenate(column, axis=2) for column in columns),
    attend=functools.partial(
      attention, implementation=implementation, return_lse=True
    ),
    pattern=pattern,
  )
  split = {
    key: np.split(np.asarray(x), len(names), axis=2)
    for key, x in results.items()
  }
  return {
    name: {key: x[i] for key, x in split.items()}
    for i, name in enumerate(names)
  }


def _ours(name, implementation):
  return _ours_of_rule(_rule(name), implementation)[name]


@functools.cache
def _theirs(name):
  _, function = CASES[name]
  # In float64, so that no error but ours counts.
  arrays = (torch.tensor(np.asarray(x)).double() for x in _inputs(name))
  *inputs, d_output, d_log_sum = arrays
  inputs = [x.requires_grad_() for x in inputs]
  output, log_sum = function(*inputs)
  finite = log_sum.masked_fill(log_sum == -torch.inf, 0.0)
  torch.autograd.backward([output, finite], [d_output, d_log_sum])
  found = (output, log_sum, *(x.grad for x in inputs))
  return {
    name: x.detach().numpy() for name, x in zip(NAMES, found, strict=True)
  }


@implementations
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_those_of_pytorch(name, implementation):
  shared.compare(_ours(name, implementation), _theirs(name))


@implementations
@pytest.mark.parametrize(
  ("name", "by_head"),
  [
    ("flow", [0, 0, 8, 8, 16, 24, 24, 32]),
    ("fixed far", [0] * 4 + [16] * 4),
    ("sda 4", [0, 1, 2, 3] * 2),
    ("dilated", [27, 28, 28, 28] * 2),
    ("dilated mixture that serves few", [18, 19] * 4),
  ],
)
def test_queries_without_keys_get_exactly_nothing(
  name, by_head, implementation
):
  ours = _ours(name, implementation)
  empty = _theirs(name)["log_sum"] == -np.inf  # [batch, seq, heads]
  assert empty.sum(axis=1).tolist() == [by_head] * 2
  np.testing.assert_array_equal(ours["log_sum"] == -np.inf, empty)
  for key in ("output", "d_query"):
    assert not ours[key][empty].any(), key
  assert ours["output"][~empty].any(axis=-1).all()


@implementations
def test_the_roll_of_s2_changes_only_queries_that_wrap_round(implementation):
  inputs = [torch.tensor(np.asarray(x)) for x in _inputs("s2 split")[:3]]
  rolled, _ = written.s2_rolled(*inputs, chunk_size=16)
  exact = _ours("s2 split", implementation)["output"]
  differs = np.abs(rolled.numpy() - exact).max(axis=(0, 3)) > TOLERANCE
  expected = np.zeros((37, HEADS), bool)
  expected[:8, 4:] = True
  np.testing.assert_array_equal(differs, expected)
