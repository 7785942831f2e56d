"""How a training step is laid out over several devices.

A mesh has four axes, and one table says which of them divides which dimension:

    data      copies of the model, each with its own sequences
    fsdp      the same, but every weight is cut as well, and gathered where it
              is used, one layer at a time
    tensor    heads, the inner channels of the MLP and the vocabulary
    sequence  the tokens of a sequence (`parallel`)

`place` and `place_batch` lay arrays out, and `jax.jit` inserts the collectives.
Devices of the last axes are neighbours: in a cluster `tensor` and `sequence`
stay within a host as long as they fit.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import (
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
  Sharding,
)

from scca_jax.llama_config import PROJECTIONS

Tree = TypeVar("Tree")

DATA, FSDP, TENSOR, SEQUENCE = AXES = ("data", "fsdp", "tensor", "sequence")
# The memory kind of the host's memory that a device reads directly.
HOST = "pinned_host"

# Mesh axes that divide each logical axis; other logical axes stay whole.
_RULES: dict[str, tuple[str, ...]] = {
  "batch": (DATA, FSDP),
  "seq": (SEQUENCE,),
  "heads": (TENSOR,),
  "kv_heads": (TENSOR,),
  "inner": (TENSOR,),
  "vocab": (TENSOR,),
  "hidden": (FSDP,),
  "pieces": (DATA, FSDP, SEQUENCE),
}
# Logical axes of the inputs and outputs of each linear map.
_MAPS = {
  **{name: (p.inputs, p.outputs) for name, p in PROJECTIONS.items()},
  "lm_head": ("hidden", "vocab"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Number of devices along each axis of the mesh.

  Attributes:
    data: Copies of the model, each with its own sequences.
    fsdp: The same, with every weight divided over them.
    tensor: Shards of the heads, of the MLP and of the vocabulary.
    sequence: Shards of every sequence.
  """

  data: int = 1
  fsdp: int = 1
  tensor: int = 1
  sequence: int = 1

  def __post_init__(self):
    for axis, size in self.sizes.items():
      if size < 1:
        raise ValueError(f"mesh.{axis} must be at least 1, got {size}.")

  @property
  def sizes(self) -> dict[str, int]:
    """Number of devices by axis."""
    return {axis: getattr(self, axis) for axis in AXES}

  @property
  def num_devices(self) -> int:
    """Number of devices of the whole mesh."""
    return math.prod(self.sizes.values())

  @classmethod
  def parse(cls, text: str) -> "MeshConfig":
    """Returns the mesh that a flag describes, such as "data=2,sequence=4".

    Raises:
      ValueError: It does not have that form, or names another axis.
    """
    sizes = {}
    for item in filter(None, text.split(",")):
      axis, _, size = item.partition("=")
      if axis not in AXES or axis in sizes or not size.isdigit():
        raise ValueError(
          f"cannot read {item!r} of the mesh {text!r}: give each of"
          f" {', '.join(AXES)} at most once, as in data=2,sequence=4."
        )
      sizes[axis] = int(size)
    return cls(**sizes)


def make_mesh(
  config: MeshConfig, devices: Sequence[Any] | None = None
) -> Mesh | None:
  """Returns the mesh, or None for one device of one process.

  Args:
    config: Its sizes.
    devices: Devices to use; None uses those of all processes. A single process
      may leave its last devices unused.

  Raises:
    ValueError: There are too few devices, or some of several processes would be
      left out.
  """
  devices = jax.devices() if devices is None else devices
  num_processes = len({device.process_index for device in devices})
  wanted, there = config.num_devices, len(devices)
  if wanted > there or (num_processes > 1 and wanted != there):
    axis = max(AXES, key=lambda axis: config.sizes[axis])
    # Suggest another size of the largest axis.
    most = max(1, there // (wanted // config.sizes[axis]))
    raise ValueError(
      f"the mesh {shown(config)} takes {wanted} devices, but"
      f" {'all ' if num_processes > 1 else ''}{there} are here: the nearest"
      f" that fits is mesh.{axis}={most}."
    )
  if wanted == 1:
    return None
  return jax.make_mesh(
    tuple(config.sizes.values()),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=devices[:wanted],
  )


def shown(config: MeshConfig) -> str:
  """Returns a mesh as `MeshConfig.parse` reads it; empty for one device."""
  return ",".join(f"{axis}={n}" for axis, n in config.sizes.items() if n > 1)


# From arrays to partition specs.


def _names(path: tuple[Any, ...]) -> list[str]:
  return [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]


def logical_axes(path: tuple[Any, ...]) -> tuple[str | None, ...]:
  """Returns the logical axes of a parameter's last dimensions.

  A parameter is recognised by the names in its path. Whatever is derived from
  it, such as the optimiser's moments or quantised values with their scales, has
  the same names in its path.

  Raises:
    ValueError: The parameter is unknown.
  """
  names = _names(path)
  if "embedding" in names:
    return "vocab", "hidden"
  for name, (inputs, outputs) in _MAPS.items():
    if name in names:
      if "kernel" in names:
        return inputs, outputs
      if "lora_a" in names:
        return inputs, None
      if "lora_b" in names:
        return None, outputs
  if "scale" in names:  # Norms are whole on every device.
    return ()
  raise ValueError(
    f"the parameter {'.'.join(names)} has no logical axes: add them to"
    " scca_jax/sharding.py, or every device would hold all of it."
  )


def _spec(
  mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]
) -> PartitionSpec:
  """Returns the partition spec of the last dimensions of a shape.

  A dimension that cannot be divided into equal parts stays whole, such as the
  few scales of a quantised matrix along its inputs.
  """
  axes = axes[max(0, len(axes) - len(shape)) :]
  axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
  cuts: list[tuple[str, ...] | None] = []
  for axis, size in zip(axes, shape, strict=True):
    cut = tuple(
      name for name in _RULES.get(axis or "", ()) if mesh.shape[name] > 1
    )
    parts = math.prod(mesh.shape[name] for name in cut)
    cuts.append(cut if cut and size % parts == 0 else None)
  return PartitionSpec(*cuts)


def shardings(tree: Tree, mesh: Mesh) -> Tree:
  """Returns the sharding of every array of a tree of parameters.

  Args:
    tree: Parameters of `Llama`, or a training state: arrays or shapes.
    mesh: From `make_mesh`.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(
      mesh, _spec(mesh, logical_axes(path) if leaf.ndim else (), leaf.shape)
    ),
    tree,
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch's arrays, `[batch, seq]`."""
  return NamedSharding(mesh, PartitionSpec(_RULES["batch"], _RULES["seq"]))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def activation_spec(
  mesh: Mesh, shape: Sequence[int], *axes: str | None
) -> PartitionSpec:
  """Returns the partition spec of an activation by its logical axes."""
  return _spec(mesh, axes, shape)


def constrain(x: jax.Array, mesh: Mesh | None, *axes: str | None) -> jax.Array:
  """Returns an activation, constrained to the sharding of its logical axes.

  Args:
    x: `[*axes]`.
    mesh: None leaves it as it is.
    *axes: A logical axis for each dimension, or None for one that is whole.
  """
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(
    x, NamedSharding(mesh, _spec(mesh, axes, x.shape))
  )


def by_shard(x: jax.Array, mesh: Mesh | None) -> jax.Array:
  """Returns an activation in which each shard of a sequence is a sequence.

  A loop over chunks of tokens then runs on all shards at once, each on its
  device. A reshape undoes it.

  Args:
    x: `[batch, seq, ...]`.
    mesh: None leaves it as it is.

  Returns:
    `[batch * shards, seq / shards, ...]`.
  """
  pieces = 1 if mesh is None else mesh.shape[SEQUENCE]
  if pieces == 1 or x.shape[1] % pieces:
    return x
  x = x.reshape(x.shape[0] * pieces, x.shape[1] // pieces, *x.shape[2:])
  return constrain(x, mesh, "pieces", *[None] * (x.ndim - 1))


def gathered(
  tree: Tree, mesh: Mesh | None, *, leave: str | None = None
) -> Tree:
  """Returns parameters gathered along `fsdp`.

  Call it where weights are used: otherwise XLA may cut the activations instead
  of gathering the weights, or gather them in every iteration of a loop.

  Args:
    tree: Parameters.
    mesh: From `make_mesh`, or None.
    leave: Parameters with this name in their path are not gathered.
  """
  if mesh is None or mesh.shape[FSDP] == 1:
    return tree

  def gather(path, leaf):
    if leave is not None and leave in _names(path):
      return leaf
    axes = [a if a != "hidden" else None for a in logical_axes(path)]
    return jax.lax.with_sharding_constraint(
      leaf, NamedSharding(mesh, _spec(mesh, axes, leaf.shape))
    )

  return jax.tree_util.tree_map_with_path(gather, tree)


def layer_bytes(tree: Any) -> int:
  """Returns the bytes of one layer's parameters, over all devices.

  Args:
    tree: Parameters, those of all layers stacked.
  """
  return sum(
    leaf.size // leaf.shape[0] * leaf.dtype.itemsize
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if "layers" in _names(path)
  )


def lookup(table: jax.Array, tokens: jax.Array, mesh: Mesh) -> jax.Array:
  """Returns the embeddings of tokens; each device looks up its own tokens.

  XLA's own partition of `table[tokens]` is wrong on GPUs with jax 0.10.2 and
  0.11.2 (openxla/xla issue 49143): where the gradient is summed over micro
  batches, all devices but one drop their sum at every micro batch but the
  first.

  Args:
    table: `[vocab, hidden]`.
    tokens: Integers, `[batch, seq]`.
    mesh: From `make_mesh`.

  Returns:
    `[batch, seq, hidden]`.
  """
  of_table = _spec(mesh, ("vocab", None), table.shape)
  of_tokens = _spec(mesh, ("batch", "seq"), tokens.shape)

  def local(table, tokens):
    if of_table[0] is None:
      return table[tokens]
    num_rows = table.shape[0]
    row = tokens - jax.lax.axis_index(TENSOR) * num_rows
    inside = (row >= 0) & (row < num_rows)
    rows = table[jnp.where(inside, row, 0)]
    return jax.lax.psum(jnp.where(inside[..., None], rows, 0), TENSOR)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(of_table, of_tokens),
    out_specs=PartitionSpec(*of_tokens, None),
  )(table, tokens)


# Placing.


def place(tree: Tree, mesh: Mesh | None) -> Tree:
  """Returns parameters or a training state, laid out on a mesh.

  Args:
    tree: Arrays, with the same values in every process.
    mesh: From `make_mesh`; None leaves them where they are.
  """
  if mesh is None:
    return tree
  return jax.tree.map(put, tree, shardings(tree, mesh))


def put(array: Any, sharding: Sharding) -> jax.Array:
  """Returns an array with a sharding; all processes have the same values.

  An array that already has the sharding is not copied.
  """
  if isinstance(array, jax.Array) and array.sharding == sharding:
    return array
  if sharding.is_fully_addressable:
    return jax.device_put(array, sharding)
  # Every process has the whole array and fills its own devices.
  host = np.asarray(array)
  return jax.make_array_from_callback(
    host.shape, sharding, lambda index: host[index]
  )


@contextlib.contextmanager
def on_host() -> Iterator[None]:
  """Makes new arrays on the CPU, for what no single device could hold."""
  try:
    device = jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # JAX_PLATFORMS may exclude the CPU.
    yield
    return
  with jax.default_device(device):
    yield


def data_shard(mesh: Mesh | None, batch_size: int) -> tuple[int, int]:
  """Returns which part of every batch this process loads.

  Args:
    mesh: From `make_mesh`.
    batch_size: Sequences of a whole batch.

  Returns:
    The part's number and the number of parts, for `batches.make_batches`.
    Processes whose devices hold shards of the same sequences load the same
    part.
  """
  if mesh is None:
    return 0, 1
  shape = (batch_size, mesh.shape[SEQUENCE])
  mine = batch_sharding(mesh).addressable_devices_indices_map(shape)
  rows = [index[0].indices(batch_size) for index in mine.values() if index]
  start, stop = min(r[0] for r in rows), max(r[1] for r in rows)
  size = stop - start
  # Equal parts do not match these rows, so load all of them.
  if batch_size % size or start % size:
    return 0, 1
  return start // size, batch_size // size


def place_batch(
  batch: dict[str, np.ndarray], mesh: Mesh | None, batch_size: int
) -> dict[str, Any]:
  """Returns a batch, laid out on a mesh.

  Args:
    batch: Arrays `[rows, seq]`, the part given by `data_shard`.
    mesh: From `make_mesh`; None leaves it as it is.
    batch_size: Sequences of the whole batch.
  """
  if mesh is None:
    return batch
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(
      sharding, array, (batch_size, array.shape[1])
    )
    for name, array in batch.items()
  }


def to_host(tree: Tree) -> Tree:
  """Returns a tree of whole numpy arrays, in every process.

  All processes of a run must call it. Arrays are gathered one at a time.
  """

  def whole(array: Any) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
      return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)

  return jax.tree.map(whole, tree)
