"""Reads models from folders with safetensors, and from GGUF files."""

import collections
import concurrent.futures
import functools
import os
import pathlib
import reprlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from scca_jax import gguf_file, json_file, quantize
from scca_jax.convert.config_file import load_config
from scca_jax.convert.layout import (
  INDEX,
  WEIGHTS,
  ParameterPath,
  abstract,
  file_names,
  is_adapter,
  is_transposed,
)
from scca_jax.llama import Llama
from scca_jax.llama_config import LlamaConfig
from scca_jax.lora import LoraConfig, init_lora_a
from scca_jax.safetensors_file import SafetensorsFiles

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Tensors read concurrently: with four, an H200 waits only for the disk.
_NUM_READERS = 4


def _open_folder(folder: pathlib.Path) -> SafetensorsFiles:
  """Returns the tensors of a model's folder."""
  path = folder / INDEX
  # If there is also a single file, transformers uses that.
  if path.is_file() and not (folder / WEIGHTS).is_file():
    shard_of = json_file.read(path).get("weight_map")
    if (
      not isinstance(shard_of, dict)
      or not shard_of
      or not all(isinstance(name, str) for name in shard_of.values())
    ):
      raise ValueError(
        f"{path} has no weight_map of tensors to files: copy it again."
      )
    for shard in shard_of.values():
      if pathlib.PurePath(shard).name != shard:
        raise ValueError(
          f"{path}: weight_map names {reprlib.repr(shard)}, which is not a file"
          " in its folder: copy it again."
        )
    tensors = SafetensorsFiles(
      [folder / n for n in sorted(set(shard_of.values()))]
    )
    for name, shard in shard_of.items():
      if name not in tensors or tensors.path_of(name).name != shard:
        raise ValueError(
          f"{path} says that {shard} has the tensor {name}, but it does not:"
          " copy both again."
        )
    for name in tensors:
      if name not in shard_of:
        raise ValueError(
          f"{tensors.path_of(name)} contains the tensor {name}, which"
          f" {path.name} does not list: copy both again."
        )
    return tensors
  if not (folder / WEIGHTS).is_file():
    pickled = sorted(
      [*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")]
    )
    if pickled:
      raise ValueError(
        f"{pickled[0]} is pickled, and reading it could run any code: convert"
        " the model with transformers, model.save_pretrained(folder,"
        " safe_serialization=True)."
      )
  return SafetensorsFiles([folder / WEIGHTS])


@functools.partial(jax.jit, static_argnames=("dtype", "is_matrix"))
def _turn(
  value: jax.Array, dtype: jnp.dtype, is_matrix: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns a tensor in our layout, and whether it is finite.

  Args:
    value: The tensor in the file's layout.
    dtype: Dtype to convert to.
    is_matrix: Whether the file holds it transposed.

  Returns:
    The tensor, whether it was finite in the file, and whether it still is.
  """
  turned = (value.T if is_matrix else value).astype(dtype)
  finite = jnp.isfinite(value).all()
  if value.dtype == dtype:
    return turned, finite, finite
  return turned, finite, jnp.isfinite(turned).all()


@functools.partial(jax.jit, donate_argnums=0)
def _place(stack: jax.Array, tensor: jax.Array, index: int) -> jax.Array:
  """Returns the bits of a stack with those of a tensor copied to `index`."""
  bits = jax.lax.bitcast_convert_type(tensor, stack.dtype)
  return jax.lax.dynamic_update_index_in_dim(stack, bits, index, 0)


def _room(
  target: jax.ShapeDtypeStruct, quantize_by: str | None, platform: str
) -> Any:
  """Returns zeros for all layers of a parameter, for `_fill` to fill."""

  def zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    dtype = leaf.dtype
    if platform == "cpu" and jnp.issubdtype(dtype, jnp.floating):
      # As bits: updating 16-bit floats on a CPU converts all of them to 32
      # bits.
      dtype = jnp.dtype(f"uint{8 * dtype.itemsize}")
    return jnp.zeros(leaf.shape, dtype)

  return jax.tree.map(zeros, _held(target, quantize_by))


def _held(target: jax.ShapeDtypeStruct, quantize_by: str | None) -> Any:
  """Returns the shapes in which the model holds a parameter of its layers."""
  if quantize_by is None:
    return target
  return jax.eval_shape(
    functools.partial(quantize.quantize_layers, method=quantize_by), target
  )


def _fill(
  room: Any,
  target: jax.ShapeDtypeStruct,
  path: ParameterPath,
  names: Sequence[str],
  tensors: SafetensorsFiles | gguf_file.GgufFile,
  source: pathlib.Path,
  *,
  quantize_by: str | None = None,
) -> Any:
  """Returns a parameter, read from the tensors of its layers and checked.

  Reads up to `_NUM_READERS` tensors concurrently.

  Args:
    room: From `_room`; None for a parameter that is not stacked by layer.
    target: The parameter before it is quantised.
    path: Its path.
    names: Names of its tensors.
    tensors: All tensors of the source.
    source: What messages name.
    quantize_by: How it is quantised, or None.
  """
  is_matrix = is_transposed(path)
  device = _default_device()

  def shown(name: str) -> str:
    if isinstance(tensors, gguf_file.GgufFile):
      return tensors.name_in_file(name)
    return name

  def read(name: str) -> tuple[Any, jax.Array, jax.Array]:
    value = tensors[name]()
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise ValueError(
        f"{source}: the tensor {shown(name)} is {value.dtype}; float32,"
        " bfloat16 and float16 can be read."
      )
    # The default device is per thread.
    with jax.default_device(device):
      if is_matrix and device.platform == "cpu":
        # Transpose while copying: doing it afterwards takes twice as long.
        turned = _turn(jax.device_put(value.T), target.dtype, False)
      else:
        turned = _turn(value, target.dtype, is_matrix)
      if quantize_by is None:
        return turned
      return quantize.quantize_matrix(turned[0], quantize_by), *turned[1:]

  with concurrent.futures.ThreadPoolExecutor(_NUM_READERS) as pool:
    ahead = collections.deque(
      pool.submit(read, name) for name in names[:_NUM_READERS]
    )
    for i, name in enumerate(names):
      tensor, value_finite, part_finite = ahead.popleft().result()
      if i + _NUM_READERS < len(names):
        ahead.append(pool.submit(read, names[i + _NUM_READERS]))
      if not part_finite:
        reason = (
          f"exceeds {target.dtype}: load it as bfloat16 or float32"
          if value_finite
          else "holds a NaN or an infinity: copy the model again"
        )
        raise ValueError(f"{source}: the tensor {shown(name)} {reason}.")
      if room is None:
        return tensor
      # A separate step: on a CPU, a transposition fused into an update is slow.
      room = jax.tree.map(functools.partial(_place, index=i), room, tensor)
  return jax.tree.map(
    lambda leaf, held: (
      leaf
      if leaf.dtype == held.dtype
      else jax.lax.bitcast_convert_type(leaf, held.dtype)
    ),
    room,
    _held(target, quantize_by),
  )


def check_num_layers(
  config: LlamaConfig,
  tensors: SafetensorsFiles | gguf_file.GgufFile,
  source: str | os.PathLike[str],
) -> None:
  """Checks that a file has tensors for all layers of its configuration.

  Work and memory grow with the number of layers, so it is checked first.

  Args:
    config: Sizes of the model.
    tensors: Its tensors.
    source: The file's name, for the message.

  Raises:
    ValueError: It has too few.
  """
  if config.num_layers > len(tensors):
    raise ValueError(
      f"{source} has {len(tensors)} tensors, too few for the"
      f" {config.num_layers:,} layers that its configuration asks for: copy it"
      " again."
    )


def check_shapes(
  targets: dict[ParameterPath, jax.ShapeDtypeStruct],
  names: dict[ParameterPath, list[str]],
  tensors: SafetensorsFiles | gguf_file.GgufFile,
  source: pathlib.Path,
) -> None:
  """Checks that all tensors exist with the right shape, without reading them.

  Args:
    targets: See `read_parameters`.
    names: See there.
    tensors: See there.
    source: See there.

  Raises:
    ValueError: A tensor is missing or of another shape; the message names it.
  """
  for path, target in targets.items():
    shape = target.shape[1:] if path[0] == "layers" else target.shape
    wanted = shape[::-1] if is_transposed(path) else shape
    for name in names[path]:
      shown = name
      if isinstance(tensors, gguf_file.GgufFile):
        shown = tensors.name_in_file(name)
      if name not in tensors:
        raise ValueError(f"{source} lacks the tensor {shown}.")
      if tensors.shape(name) != wanted:
        raise ValueError(
          f"{source}: the tensor {shown} is {list(tensors.shape(name))}, but"
          f" the model's configuration asks for {list(wanted)}."
        )


def read_parameters(
  targets: dict[ParameterPath, jax.ShapeDtypeStruct],
  names: dict[ParameterPath, list[str]],
  tensors: SafetensorsFiles | gguf_file.GgufFile,
  source: pathlib.Path,
  quantize_by: str | None = None,
) -> dict[ParameterPath, Any]:
  """Returns parameters, read from their tensors and checked.

  Nothing is allocated until all shapes are known to be right, because a
  configuration may ask for more than fits into memory.

  Args:
    targets: Shape and dtype of each by path, before it is quantised.
    names: Names of the tensors of each; see `file_names`.
    tensors: All tensors of the source.
    source: What messages name.
    quantize_by: How the layers' matrices are quantised, or None.

  Raises:
    ValueError: A tensor is missing, of the wrong shape or not finite; the
      message names it.
  """
  check_shapes(targets, names, tensors, source)
  platform = _default_device().platform
  in_layers, others = [], []
  for path in sorted(targets):
    (in_layers if path[0] == "layers" else others).append(path)
  # Allocate the parameters before the temporaries of reading: a training step
  # needs the remaining memory in one piece.
  arrays = {
    path: _fill(None, targets[path], path, names[path], tensors, source)
    for path in others
  }
  methods = {
    path: quantize_by if quantize.is_quantizable(path) else None
    for path in in_layers
  }
  rooms = {
    path: _room(targets[path], method, platform)
    for path, method in methods.items()
  }
  for path, method in methods.items():
    arrays[path] = _fill(
      rooms.pop(path),
      targets[path],
      path,
      names[path],
      tensors,
      source,
      quantize_by=method,
    )
  return arrays


def _default_device() -> Any:
  """Returns the device that new arrays are made on."""
  (device,) = jnp.zeros(()).devices()
  return device


def _merge(
  graphdef: nnx.GraphDef,
  state: nnx.State,
  arrays: dict[ParameterPath, jax.Array],
) -> Llama:
  nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(arrays))
  return nnx.merge(graphdef, state)


def load_model(
  source: str | os.PathLike[str],
  *,
  config: LlamaConfig | None = None,
  lora: LoraConfig | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  quantize_by: str | None = None,
  rngs: nnx.Rngs | None = None,
) -> Llama:
  """Returns the model in a folder or GGUF file, optionally with new adapters.

  Only a few tensors are in flight at a time, so the model is never held twice.

  Args:
    source: A Hugging Face folder, which holds `config.json` and
      `model.safetensors`, or shards and their index; or a GGUF file, which is
      dequantised.
    config: Replaces the source's, for example for a longer context. Its sizes
      must match the weights. If it unties a tied head, the head starts as a
      copy of the embedding.
    lora: New adapters, which start as zero.
    dtype: Dtype of the computation.
    param_dtype: Dtype that weights are held in.
    quantize_by: How the layers' matrices are quantised as they are read, one of
      `quantize.METHODS`; None leaves them as they are.
    rngs: Its stream `params` initialises the adapters; None uses seed 0.

  Raises:
    FileNotFoundError: A file is missing.
    ValueError: A file is damaged or pickled, or a tensor is missing, unknown,
      of the wrong shape or not finite; the message names it.
  """
  quantize.check_method(quantize_by)
  source = pathlib.Path(source)
  tensors: SafetensorsFiles | gguf_file.GgufFile
  if source.suffix == gguf_file.SUFFIX:
    tensors = gguf_file.GgufFile(source)
    own = tensors.config
  else:
    own = load_config(source)
    tensors = _open_folder(source)
  config = own if config is None else config
  check_num_layers(config, tensors, source)
  graphdef, state, targets = abstract(config, lora, dtype, param_dtype)
  names = {
    path: file_names(path, config.num_layers)
    for path in targets
    if not is_adapter(path)
  }
  if own.tie_embeddings:
    _check_tied(tensors, source)
    # A tied matrix may be saved under either name.
    for name, other in ((_EMBEDDING, _HEAD), (_HEAD, _EMBEDDING)):
      if name not in tensors:
        names = {
          path: [other] if of_path == [name] else of_path
          for path, of_path in names.items()
        }
  known = {name for of_path in names.values() for name in of_path}
  for name in tensors:
    # Old files contain RoPE's frequencies, and tied models may contain the
    # head.
    ignored = name.endswith("rotary_emb.inv_freq") or (
      own.tie_embeddings and name == _HEAD
    )
    if name not in known and not ignored:
      raise ValueError(
        f"{source} has a tensor that the model does not: {name}."
      )
  # This comes first because it checks the sizes in the configuration.
  arrays = read_parameters(
    {path: targets[path] for path in names}, names, tensors, source, quantize_by
  )
  rngs = nnx.Rngs(0) if rngs is None else rngs
  for path, target in sorted(targets.items()):
    if path[-1] == "lora_a":
      arrays[path] = init_lora_a(rngs.params(), target.shape)
    elif path[-1] == "lora_b":
      arrays[path] = jnp.zeros(target.shape, target.dtype)
  return _merge(graphdef, state, arrays)


def _check_tied(
  tensors: SafetensorsFiles | gguf_file.GgufFile, source: pathlib.Path
) -> None:
  """Checks that a tied head equals the embedding, if the file has both.

  If they differ, versions of transformers disagree about which one to use.
  """
  if (
    _HEAD in tensors
    and _EMBEDDING in tensors
    and not np.array_equal(tensors[_HEAD](), tensors[_EMBEDDING]())
  ):
    raise ValueError(
      f"{source}: tie_word_embeddings is true, but {_HEAD} differs from"
      f" {_EMBEDDING}: set it to false in config.json, or remove the wrong"
      " tensor."
    )


def stored_dtype(source: str | os.PathLike[str]) -> np.dtype:
  """Returns the dtype that a model's matrices are stored in.

  Args:
    source: A model's folder, or a GGUF file, which is dequantised to float32.

  Raises:
    FileNotFoundError: A file is missing.
    ValueError: A file is damaged.
  """
  source = pathlib.Path(source)
  if source.suffix == gguf_file.SUFFIX:
    return np.dtype(np.float32)
  tensors = _open_folder(source)
  for name in tensors:
    if name.endswith("_proj.weight"):
      return tensors[name]().dtype
  raise ValueError(f"{source} contains no weights of a Llama's layers.")
