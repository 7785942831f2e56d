"""The list of back ends, and the choice between them.

A new back end is a module with a function `attention` and an entry here. The
modules are imported on first use, because kernels need the libraries of their
GPU.
"""

import functools
from collections.abc import Sequence

import jax
from absl import logging

from scca_jax import target
from scca_jax.backends import blocks, unions
from scca_jax.backends.contract import Attend, BackEnd, Call
from scca_jax.backends.heads import vary_alike

_HEAD_FIELDS = frozenset(
  {"chunk_size", "offset", "shift", "dilation", "window", "select"}
)
_UNION_FIELDS = frozenset({"own_chunk", "sinks"})
_HALF = ("bfloat16", "float16")


def _load_mosaic() -> Attend:
  from scca_jax.backends import mosaic

  return mosaic.attention


def _load_triton() -> Attend:
  from scca_jax.backends import triton

  return triton.attention


def _load_cudnn() -> Attend:
  from scca_jax.backends import cudnn

  return cudnn.attention


def _load_xla() -> Attend:
  from scca_jax.backends import xla

  return xla.attention


def _load_reference() -> Attend:
  from scca_jax.backends import reference

  return reference.attention


def _unserved_by_tiles(call: Call) -> str | None:
  return blocks.unserved_unions(call.pattern, call.segment_ids is not None)


# Best first.
BACK_ENDS: dict[str, BackEnd] = {
  back_end.name: back_end
  for back_end in (
    BackEnd(
      name="mosaic",
      load=_load_mosaic,
      pattern_fields=_HEAD_FIELDS | _UNION_FIELDS,
      dtypes=_HALF,
      head_dims=(64, 128),
      # Its instructions (wgmma) exist only on Hopper, not on later GPUs.
      runs_on=lambda device: device.compute_capability[0] == 9,
      needs="a Hopper GPU (compute capability 9.0)",
      furthest=blocks.FAR // 2,
      max_dilation=blocks.MAX_DILATION,
      late_starts=True,
      takes_deterministic=True,
      unserved_unions=_unserved_by_tiles,
    ),
    BackEnd(
      name="triton",
      load=_load_triton,
      pattern_fields=_HEAD_FIELDS | _UNION_FIELDS,
      dtypes=_HALF,
      head_dims=(16, 32, 64, 128, 256),
      runs_on=lambda device: device.compute_capability >= (8, 0),
      needs="an NVIDIA GPU of compute capability 8.0 or later",
      furthest=blocks.FAR // 2,
      max_dilation=blocks.MAX_DILATION,
      late_starts=True,
      # Indices into an array have 32 bits.
      max_size=1 << 31,
      unserved_unions=_unserved_by_tiles,
    ),
    BackEnd(
      name="cudnn",
      load=_load_cudnn,
      pattern_fields=frozenset({"chunk_size", "offset", "shift", "window"}),
      dtypes=_HALF,
      runs_on=lambda device: device.compute_capability >= (8, 0),
      needs="an NVIDIA GPU of compute capability 8.0 or later",
      segments=False,
      log_sum=False,
      # cuDNN's flash attention sums the query gradient with atomics.
      deterministic=False,
      # It serves too few calls to be worth trying.
      automatic=False,
    ),
    BackEnd(
      name="xla",
      load=_load_xla,
      pattern_fields=_HEAD_FIELDS | _UNION_FIELDS,
      causalities=("position", "slot"),
      # It computes in float32.
      dtypes=(*_HALF, "float32"),
      cache=True,
      checked_axes=True,
    ),
    BackEnd(
      name="reference",
      load=_load_reference,
      pattern_fields=None,
      causalities=("position", "slot"),
      dtypes=(*_HALF, "float32", "float64"),
      cache=True,
      checked_axes=True,
    ),
  )
}


def available() -> tuple[str, ...]:
  """Returns the implementations available on the device, best first.

  The device is `target.current`.
  """
  device = target.current()
  return tuple(
    back_end.name
    for back_end in BACK_ENDS.values()
    if back_end.automatic and back_end.runs_on(device)
  )


def check_implementation(implementation: str | Sequence[str] | None) -> None:
  """Checks the names before anything is computed.

  Raises:
    ValueError: A name is unknown.
    NotImplementedError: None of them runs on the device.
  """
  device = target.current()
  reasons = [b.refuses_device(device) for b in resolve(implementation)]
  if all(reasons):
    raise NotImplementedError(
      f"{'; '.join(filter(None, reasons))}: use one of"
      f" {', '.join(available())}."
    )


def resolve(
  implementation: str | Sequence[str] | None,
) -> tuple[BackEnd, ...]:
  """Returns the back ends to try, in order.

  Raises:
    ValueError: A name is unknown, or no name is given.
  """
  if implementation is None:
    implementation = available()
  names = (
    (implementation,)
    if isinstance(implementation, str)
    else tuple(implementation)
  )
  if not names:
    raise ValueError("implementation is empty: name at least one.")
  for name in names:
    if name not in BACK_ENDS:
      raise ValueError(
        f"unknown implementation {name!r}: use one of {', '.join(BACK_ENDS)}."
      )
  return tuple(BACK_ENDS[name] for name in names)


@functools.cache
def _log_once(chosen: str, reasons: tuple[str, ...]) -> None:
  """Logs what was chosen instead of something faster."""
  logging.warning(
    "attention falls back to %s here: %s.", chosen, "; ".join(reasons)
  )


def _run(back_end: BackEnd, call: Call) -> tuple[jax.Array, jax.Array | None]:
  """Runs a back end; raises NotImplementedError if it refuses the call."""
  if (
    call.is_union
    and not back_end.serves_unions(call)
    and not unions.refuses(call)
  ):
    return unions.attend(call, functools.partial(_run, back_end))
  reason = back_end.refuses(call, target.current())
  if reason:
    raise NotImplementedError(reason)
  try:
    attention = back_end.load()
  except ImportError as error:
    raise NotImplementedError(
      f"{back_end.name} does not work with jax {jax.__version__}: {error}"
    ) from error
  query, key, value, segment_ids = vary_alike(
    [call.query, call.key, call.value, call.segment_ids]
  )
  options = {}
  if back_end.takes_deterministic:
    options["deterministic"] = call.deterministic
  return attention(
    query,
    key,
    value,
    call.pattern,
    segment_ids=segment_ids,
    query_offset=call.query_offset,
    scale=call.scale,
    **options,
  )


def attend(
  call: Call, back_ends: Sequence[BackEnd]
) -> tuple[jax.Array, jax.Array | None]:
  """Returns output and log-sum-exp of the first back end that serves the call.

  Raises:
    NotImplementedError: None does; the message gives each one's reason.
  """
  reasons: list[str] = []
  for back_end in back_ends:
    try:
      result = _run(back_end, call)
    except NotImplementedError as error:
      reasons.append(str(error).removesuffix("."))
      continue
    if reasons:
      _log_once(back_end.name, tuple(reasons))
    return result
  tried = {back_end.name for back_end in back_ends}
  others = [name for name in available() if name not in tried]
  remedy = f": use one of {', '.join(others)}" if others else ""
  raise NotImplementedError(f"{'; '.join(reasons)}{remedy}.")
