"""Compiles for GPUs that this machine does not have.

XLA can compile for a described GPU on any machine with its CUDA plugin and the
assembler `ptxas` (`pip install 'scca_jax[plan]'`), though the programs cannot
run there. The descriptions are in `assets/gpu_specs`.
"""

import contextlib
import importlib.util
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import (
  AbstractDevice,
  AbstractMesh,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from scca_jax import target
from scca_jax.sharding import HOST

_SPECS = pathlib.Path(__file__).parent / "assets" / "gpu_specs"
_GPUS_OF_HOST = 8
GPUS = tuple(sorted(path.stem for path in _SPECS.glob("*.txtpb")))
_MISSING = "pip install 'scca_jax[plan]', with jax-cuda12-pjrt of jax's version"


def _spec(gpu: str) -> str:
  if gpu not in GPUS:
    raise ValueError(f"unknown GPU {gpu!r}: use one of {', '.join(GPUS)}.")
  return (_SPECS / f"{gpu}.txtpb").read_text(encoding="utf8")


def _number(gpu: str, name: str) -> int:
  """Returns a number from the description, 0 if it is not given."""
  found = re.search(rf"\b{name}: (\d+)", _spec(gpu))
  return int(found[1]) if found else 0


def target_of(gpu: str) -> target.Target:
  """Returns a described GPU as a target for the attention implementations.

  Raises:
    ValueError: The name is unknown.
  """
  kind = re.search(r'device_description_str: "(.*)"', _spec(gpu))
  return target.Target(
    platform="gpu",
    kind=kind[1] if kind else gpu,
    compute_capability=(
      _number(gpu, r"cuda_compute_capability {.*\bmajor"),
      _number(gpu, r"cuda_compute_capability {.*\bminor"),
    ),
    num_multiprocessors=_number(gpu, "core_count"),
  )


def capacity_bytes(gpu: str) -> int:
  """Returns the memory of a described GPU, in bytes.

  Raises:
    ValueError: The name is unknown.
  """
  return _number(gpu, "device_memory_size")


def _cuda_folder() -> pathlib.Path:
  """Returns the folder with bin/ptxas and nvvm/libdevice.

  Raises:
    ValueError: There is none.
  """
  spec = importlib.util.find_spec("nvidia")
  for root in (spec and spec.submodule_search_locations) or ():
    for name in ("cuda_nvcc", "cu13"):
      folder = pathlib.Path(root) / name
      if (folder / "bin" / "ptxas").exists():
        return folder
  raise ValueError(f"found no ptxas, needed to compile for a GPU: {_MISSING}.")


def devices(gpu: str, number: int = 1) -> list[Any]:
  """Returns described GPUs, eight per host.

  Args:
    gpu: One of `GPUS`.
    number: How many; above 8, a multiple of 8.

  Raises:
    ValueError: The GPU is unknown, the compiler is not installed, or the last
      host would not be full.
  """
  hosts, rest = divmod(number, _GPUS_OF_HOST)
  if hosts and rest:
    raise ValueError(
      f"{number} GPUs do not fill whole hosts of {_GPUS_OF_HOST}: use up to"
      f" {_GPUS_OF_HOST}, or a multiple of it."
    )
  shape = f"1x{hosts or 1}x{_GPUS_OF_HOST if hosts else number}"
  _cuda_folder()
  try:
    topology = topologies.get_topology_desc(
      "", platform="cuda", target_config=_spec(gpu), topology=shape
    )
  except RuntimeError as error:
    raise ValueError(
      f"this jax cannot compile for a GPU: {_MISSING} ({error})."
    ) from error
  return list(topology.devices)


def _in_host_memory(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """Returns an argument that has a sharding, moved to the host's memory."""
  # Topology devices have no memory kinds, and a concrete sharding drops them;
  # one over an abstract mesh keeps them.
  there = NamedSharding(
    x.sharding.mesh.abstract_mesh, x.sharding.spec, memory_kind=HOST
  )
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
  """Disables the compilation cache, which cannot load deviceless programs."""
  settings: Any = jax.config
  enabled = settings.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  # JAX reads the setting only once.
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()


@contextlib.contextmanager
def _cuda_in_environment(folder: pathlib.Path) -> Iterator[None]:
  """Lets Pallas, which searches for the assembler itself, find it."""
  names = ("CUDA_ROOT", "PATH")
  before = {name: os.environ.get(name) for name in names}
  os.environ["CUDA_ROOT"] = str(folder)
  os.environ["PATH"] = os.pathsep.join(
    filter(None, (str(folder / "bin"), before["PATH"]))
  )
  try:
    yield
  finally:
    for name, value in before.items():
      if value is None:
        del os.environ[name]
      else:
        os.environ[name] = value


def compile_for(
  gpu: str,
  function: Callable[..., Any],
  *args: Any,
  on_host: Any = None,
  donate_argnums: Sequence[int] = (),
  compiler_options: dict[str, Any] | None = None,
) -> Any:
  """Returns a function compiled for described GPUs.

  Args:
    gpu: One of `GPUS`.
    function: The function.
    *args: Its arguments, pytrees of anything with a shape and a dtype. With a
      sharding, they are spread over several of `devices`.
    on_host: Which arguments are in the host's memory, a pytree of bools like
      them; None keeps all on the device.
    donate_argnums: See `jax.jit`.
    compiler_options: See `jax.jit`.

  Returns:
    A `jax.stages.Compiled`, which provides `memory_analysis()`.

  Raises:
    ValueError: The GPU is unknown, or the compiler is not installed.
  """
  device = target_of(gpu)
  folder = _cuda_folder()
  if all(
    getattr(leaf, "sharding", None) is None for leaf in jax.tree.leaves(args)
  ):
    mesh = Mesh(np.array(devices(gpu)), ("device",))
    whole = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), args
    )
  if on_host is not None:
    args = jax.tree.map(
      lambda x, there: _in_host_memory(x) if there else x, args, on_host
    )
  described = AbstractMesh(
    (),
    (),
    abstract_device=AbstractDevice(
      device_kind=device.kind, num_cores=None, platform="gpu"
    ),
  )
  with (
    target.compile_for(device),
    jax.sharding.use_abstract_mesh(described),
    _cuda_in_environment(folder),
  ):
    lowered = (
      jax.jit(function, donate_argnums=donate_argnums)
      .trace(*args)
      .lower(lowering_platforms=("cuda",))
    )
  with _no_cache(), _cuda_in_environment(folder):
    return lowered.compile(
      {"xla_gpu_cuda_data_dir": str(folder)} | (compiler_options or {})
    )
