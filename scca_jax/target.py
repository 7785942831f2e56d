"""The device that attention is compiled for."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Target:
  """What the implementations need to know about a device.

  Attributes:
    platform: "cpu", "gpu" or "tpu".
    kind: Its name, such as "NVIDIA H200".
    compute_capability: That of a CUDA GPU, such as (9, 0); else (0, 0).
    num_multiprocessors: Multiprocessors of a GPU; else 0.
  """

  platform: str
  kind: str
  compute_capability: tuple[int, int] = (0, 0)
  num_multiprocessors: int = 0


# A user context is part of the key of jax's tracing cache.
_compiled_for = jax.make_user_context(None)


@contextlib.contextmanager
def compile_for(target: Target) -> Iterator[None]:
  """Chooses implementations for a device that may not be present."""
  with _compiled_for(target):
    yield


def of_device(device: Any) -> Target:
  """Returns the target that a `jax.Device` is."""
  capability = str(getattr(device, "compute_capability", ""))
  major, _, minor = capability.partition(".")
  is_cuda = device.platform == "gpu" and minor.isdigit()
  return Target(
    platform=device.platform,
    kind=device.device_kind,
    compute_capability=(int(major), int(minor)) if is_cuda else (0, 0),
    num_multiprocessors=int(getattr(device, "core_count", 0)) if is_cuda else 0,
  )


def current() -> Target:
  """Returns the device that a call is compiled for.

  It is that of `compile_for`, or jax's default device.
  """
  if _compiled_for.value is not None:
    return _compiled_for.value
  config: Any = jax.config
  device = config.jax_default_device
  if device is None:
    device = jax.devices()[0]
  elif isinstance(device, str):
    device = jax.devices(device)[0]
  return of_device(device)
