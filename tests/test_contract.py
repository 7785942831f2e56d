"""What back ends declare, what they refuse, and the choice between them."""

import dataclasses

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scca_jax
from scca_jax import dispatch, target
from scca_jax.backends import blocks, registry
from scca_jax.backends.contract import Call
from scca_jax.patterns import AttentionPattern, HeadPattern

AMPERE = target.Target("gpu", "an A100", (8, 0), 108)
HOPPER = target.Target("gpu", "an H100", (9, 0), 132)
BLACKWELL = target.Target("gpu", "a B200", (10, 0), 148)
TURING = target.Target("gpu", "a T4", (7, 5), 40)
CPU = target.Target("cpu", "cpu")
KERNELS = ("mosaic", "triton", "cudnn")


def _call(
  head=None,
  *,
  boundary="drop",
  causality="position",
  seq_len=32,
  kv_len=None,
  head_dim=64,
  dtype=jnp.bfloat16,
  segments=False,
  **settings,
):
  """A call with two heads and only shapes."""
  head = head or HeadPattern(chunk_size=8, shift=4)
  query = jax.ShapeDtypeStruct((1, seq_len, 2, head_dim), dtype)
  key = jax.ShapeDtypeStruct((1, kv_len or seq_len, 2, head_dim), dtype)
  ids = jax.ShapeDtypeStruct(key.shape[:2], jnp.int32)
  return Call(
    query=query,
    key=key,
    value=key,
    pattern=AttentionPattern((HeadPattern(), head), boundary, causality),
    scale=1.0,
    segment_ids=ids if segments else None,
    **settings,
  )


def _refuses(name, call, device=HOPPER):
  return registry.BACK_ENDS[name].refuses(call, device)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_serve_what_they_are_for(name):
  assert _refuses(name, _call()) is None
  assert _refuses(name, _call(boundary="local", dtype=jnp.float16)) is None


@pytest.mark.parametrize(
  ("names", "change", "said"),
  [
    (KERNELS, {"dtype": jnp.float32}, "not float32"),
    (("mosaic", "triton"), {"head_dim": 80}, "not 80"),
    (("mosaic", "triton"), {"head_dim": 8}, "not 8"),
    (("mosaic",), {"head_dim": 32}, "not 32"),
    (KERNELS, {"causality": "slot"}, 'causality="position", not "slot"'),
    (KERNELS, {"query_offset": 3}, "query_offset=3"),
    (KERNELS, {"query_offset": np.int32(0)}, "query_offset"),
    (KERNELS, {"kv_len": 40}, "40 keys and 32 queries"),
    (("triton",), {"seq_len": blocks.FAR // 2 + 1}, "fewer than 2147483648"),
    (
      ("mosaic", "triton"),
      {"head": HeadPattern(chunk_size=8, shift=1 << 30)},
      "shift=1073741824",
    ),
    (
      ("mosaic", "triton"),
      {"head": HeadPattern(dilation=1 << 21)},
      "not 2097152",
    ),
    (("cudnn",), {"head": HeadPattern(dilation=2)}, "dilation"),
    (("cudnn",), {"segments": True}, "segment_ids"),
    (("cudnn",), {"needs_log_sum": True}, "log-sum-exp"),
    (("cudnn",), {"deterministic": True}, "not deterministic"),
  ],
)
def test_what_is_not_declared_is_refused(names, change, said):
  for name in names:
    assert said in (_refuses(name, _call(**change)) or ""), name
    assert _refuses("reference", _call(**change)) is None


def test_only_the_reference_computes_in_float64():
  query = np.zeros((1, 32, 2, 64))
  call = dataclasses.replace(_call(), query=query, key=query, value=query)
  assert _refuses("reference", call) is None
  for name in ("xla", *KERNELS):
    assert "not float64" in (_refuses(name, call) or "")


@pytest.mark.parametrize("name", ["mosaic", "triton"])
@pytest.mark.parametrize(
  ("head", "segments", "said"),
  [
    # Sinks of a document lie anywhere.
    (HeadPattern(chunk_size=8, sinks=4), True, "sinks"),
    # Pairs that both parts see would count twice.
    (
      HeadPattern(chunk_size=8, shift=4, dilation=2, own_chunk=True),
      False,
      "own_chunk",
    ),
  ],
)
def test_unions_without_disjoint_parts_are_refused(name, head, segments, said):
  call = _call(head, segments=segments)
  with (
    target.compile_for(HOPPER),
    pytest.raises(NotImplementedError, match=f"{name} does not serve {said}"),
  ):
    registry.attend(call, (registry.BACK_ENDS[name],))


def test_kernels_serve_overlapping_parts():
  call = _call(HeadPattern(chunk_size=8, shift=4, own_chunk=True))
  assert _refuses("mosaic", call) is None
  assert _refuses("triton", call) is None


def test_all_but_cudnn_promise_equal_gradients_in_every_run():
  for name in ("mosaic", "triton", "xla", "reference"):
    assert _refuses(name, _call(deterministic=True)) is None


@dataclasses.dataclass(frozen=True)
class _NewPattern(AttentionPattern):
  """A pattern with such a field."""

  softcap: float | None = None


@pytest.mark.parametrize("name", registry.BACK_ENDS)
def test_unknown_fields_are_refused_once_they_are_used(name):
  known = _call()
  used = _call(cases.NewHead(chunk_size=8, parity=1))
  unused = _call(cases.NewHead(chunk_size=8))
  softer = dataclasses.replace(
    known, pattern=_NewPattern(known.pattern.heads, softcap=30.0)
  )
  assert _refuses(name, unused) is None
  if name == "reference":
    assert _refuses(name, used) is None
  else:
    assert _refuses(name, used) == f"{name} does not serve parity"
    assert _refuses(name, softer) == f"{name} does not serve softcap"


def test_unknown_fields_fall_through_to_the_reference():
  heads = (cases.NewHead(chunk_size=8, parity=1), cases.NewHead())
  pattern = AttentionPattern(heads)
  random = np.random.default_rng(0)
  query, key, value = (
    jnp.asarray(random.normal(size=(1, 16, 2, 8)), jnp.float32)
    for _ in range(3)
  )
  np.testing.assert_array_equal(
    scca_jax.attention(query, key, value, pattern),
    scca_jax.attention(query, key, value, pattern, implementation="reference"),
  )


@pytest.mark.parametrize(
  ("device", "names"),
  [
    (CPU, ("xla", "reference")),
    (target.Target("gpu", "a V100", (7, 0), 80), ("xla", "reference")),
    (TURING, ("xla", "reference")),
    (AMPERE, ("triton", "xla", "reference")),
    (target.Target("gpu", "an L4", (8, 9), 58), ("triton", "xla", "reference")),
    (HOPPER, ("mosaic", "triton", "xla", "reference")),
    # The instructions of mosaic's kernels are Hopper's alone.
    (BLACKWELL, ("triton", "xla", "reference")),
    (
      target.Target("gpu", "an RTX 5090", (12, 0), 170),
      ("triton", "xla", "reference"),
    ),
  ],
)
def test_the_device_decides_what_there_is_to_choose_from(device, names):
  with target.compile_for(device):
    assert dispatch.available() == names
    for name in registry.BACK_ENDS:
      if name in names or (name == "cudnn" and "triton" in names):
        dispatch.check_implementation(name)
      else:
        said = f"{name} needs .*, but this is {device.kind}: .*{names[0]}"
        with pytest.raises(NotImplementedError, match=said):
          dispatch.check_implementation(name)


def test_names_may_be_one_or_several():
  resolved = registry.resolve(("mosaic", "xla"))
  assert [back_end.name for back_end in resolved] == ["mosaic", "xla"]
  with target.compile_for(CPU):
    dispatch.check_implementation(["mosaic", "xla"])
    with pytest.raises(NotImplementedError, match="mosaic needs.*triton needs"):
      dispatch.check_implementation(["mosaic", "triton"])
  for wrong in ("cuda", ["xla", "cuda"]):
    with pytest.raises(ValueError, match="'cuda': use one of mosaic, .*xla"):
      registry.resolve(wrong)
  with pytest.raises(ValueError, match="at least one"):
    registry.resolve(())
