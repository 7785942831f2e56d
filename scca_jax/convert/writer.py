"""Writes models and their tokenizers in Hugging Face's files."""

import json
import logging
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import safetensors.flax

from scca_jax import (
  atomic_file,
  gguf_file,
  gguf_tokenizer,
  json_file,
  quantize,
  tokenizer,
)
from scca_jax.convert.config_file import CONFIG, GENERATION, config_to_json
from scca_jax.convert.layout import (
  INDEX,
  WEIGHTS,
  ParameterPath,
  file_names,
  is_adapter,
  is_transposed,
  parameters,
)
from scca_jax.llama import Llama

_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER_SETTINGS = (
  _TOKENIZER_CONFIG,
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  GENERATION,
)
_MAX_COPIED_BYTES = 256 << 20
# Fields that limit the length of a text, in tokens, by file.
_LIMITS = {
  _TOKENIZER_CONFIG: ("model_max_length",),
  "tokenizer.json": ("truncation", "max_length"),
  GENERATION: ("max_length",),
}


def file_tensor(path: ParameterPath, part: jax.Array, dtype: Any) -> jax.Array:
  """Returns a parameter, or one layer of it, in the layout of the files.

  Args:
    path: Path of the parameter in the model.
    part: The parameter without the layer dimension.
    dtype: Dtype of the tensor.

  Raises:
    ValueError: A value is not finite, or beyond the range of float16.
  """
  # safetensors writes raw memory: a transposed numpy view would be written
  # untransposed.
  part = jnp.asarray(part)
  tensor = (part.T if is_transposed(path) else part).astype(dtype)
  if not jnp.all(jnp.isfinite(tensor)):
    raise ValueError(
      f"{'.'.join(path)} has values beyond float16: write bfloat16 or float32."
      if jnp.all(jnp.isfinite(part))
      else f"{'.'.join(path)} holds a NaN or an infinity, so it is not written:"
      " if it was just trained, lower the learning rate."
    )
  return tensor


def write_tensors(path: pathlib.Path, tensors: dict[str, jax.Array]) -> None:
  """Writes a safetensors file, completely or not at all.

  Raises:
    OSError: It cannot be written; an existing file is kept.
  """
  # Transformers requires this metadata.
  content = safetensors.flax.save(tensors, metadata={"format": "pt"})
  atomic_file.write(path, content)


def fused(
  arrays: dict[ParameterPath, jax.Array],
  path: ParameterPath,
  layer: int,
  scaling: float,
) -> jax.Array:
  """Returns a parameter of one layer, with its adapter fused into it.

  Args:
    arrays: A model's parameters, from `parameters`.
    path: Path of the parameter.
    layer: The layer; ignored for parameters outside the layers.
    scaling: What the adapter's product is multiplied by.
  """
  array = arrays[path]
  part = array[layer] if path[0] == "layers" else array
  lora_a = arrays.get((*path[:-1], "lora_a"))
  lora_b = arrays.get((*path[:-1], "lora_b"))
  if quantize.method_of(part) is not None:
    part = quantize.dequantize(part, jnp.float32)
  if lora_a is None or lora_b is None:
    return part
  product = jnp.matmul(
    lora_a[layer], lora_b[layer], precision=jax.lax.Precision.HIGHEST
  )
  return part.astype(jnp.float32) + scaling * product


def _shards(
  sizes: dict[str, int], max_shard_bytes: int
) -> dict[str, list[str]]:
  """Returns the names of the tensors of each file, in order."""
  groups: list[list[str]] = [[]]
  used = 0
  for name, size in sizes.items():
    if groups[-1] and used + size > max_shard_bytes:
      groups.append([])
      used = 0
    groups[-1].append(name)
    used += size
  if len(groups) == 1:
    return {WEIGHTS: groups[0]}
  stem, suffix = WEIGHTS.split(".")
  return {
    f"{stem}-{i:05d}-of-{len(groups):05d}.{suffix}": group
    for i, group in enumerate(groups, start=1)
  }


def save_model(
  model: Llama,
  folder: str | os.PathLike[str],
  *,
  dtype: Any,
  tokenizer_file: str | os.PathLike[str] | None = None,
  max_shard_bytes: int = 5 * 10**9,
  fuse: bool = True,
) -> None:
  """Writes a model in Hugging Face's layout, adapters fused into the weights.

  Adapter products are computed in float32. Only one shard is in memory besides
  the model. `config.json` is written last: a folder without it is incomplete.

  Args:
    model: The model.
    folder: Output folder, made if missing.
    dtype: Dtype of the tensors.
    tokenizer_file: A `.model` or `tokenizer.json` to copy into the folder.
    max_shard_bytes: Larger weights are written in several files of at most
      this size, with an index.
    fuse: False leaves the adapters out and writes the base, with the norms and
      embeddings that were trained along with them.

  Raises:
    OSError: A file cannot be written.
    ValueError: The tokenizer is of neither kind, or a weight is beyond the
      range of `dtype`.
  """
  folder = pathlib.Path(folder)
  if max_shard_bytes < 1:
    raise ValueError(f"max_shard_bytes must be above 0, got {max_shard_bytes}.")
  if tokenizer_file is not None:
    tokenizer_file = pathlib.Path(tokenizer_file)
    if tokenizer_file.suffix not in (".model", ".json"):
      raise ValueError(
        f"the tokenizer {tokenizer_file} is neither a .model nor a .json."
      )
    name = _TOKENIZER_FILES[tokenizer_file.suffix == ".json"]
    atomic_file.write(folder / name, tokenizer_file.read_bytes())
    _state_ends(folder)
  num_layers = model.config.num_layers
  scaling = model.lora.scaling if model.lora is not None else 0.0
  arrays = parameters(model)
  if not fuse:
    arrays = {p: array for p, array in arrays.items() if not is_adapter(p)}
  # The parameter and layer of each tensor, in the order that other tools use.
  places: dict[str, tuple[ParameterPath, int]] = {}
  sizes: dict[str, int] = {}
  for path, array in arrays.items():
    if is_adapter(path):
      continue
    names = file_names(path, num_layers)
    places |= {name: (path, i) for i, name in enumerate(names)}
    size = math.prod(array.shape) // len(names) * jnp.dtype(dtype).itemsize
    sizes |= dict.fromkeys(names, size)
  order = sorted(places, key=lambda name: (places[name][1], name))
  shards = _shards({name: sizes[name] for name in order}, max_shard_bytes)
  for file_name, names in shards.items():
    tensors = {}
    for name in names:
      path, layer = places[name]
      part = fused(arrays, path, layer, scaling)
      tensors[name] = file_tensor(path, part, dtype)
    write_tensors(folder / file_name, tensors)
  if len(shards) > 1:
    index = {
      "metadata": {"total_size": sum(sizes.values())},
      "weight_map": {n: file for file, names in shards.items() for n in names},
    }
    atomic_file.write_json(folder / INDEX, index)
  atomic_file.write_json(folder / CONFIG, config_to_json(model.config, dtype))


def _with_limit(name: str, content: bytes, context_len: int) -> bytes:
  """Returns a file with any limit on texts raised to `context_len` tokens."""
  try:
    settings = json.loads(content)
    *outer, last = _LIMITS[name]
    place = settings
    for key in outer:
      place = place.get(key) or {}
    limit = place.get(last)
  except (AttributeError, ValueError, RecursionError) as error:
    raise ValueError(
      f"{name} is not valid ({error}): copy it again."
    ) from error
  if not isinstance(limit, int | float) or limit >= context_len:
    return content
  place[last] = context_len
  return json.dumps(settings, indent=2, ensure_ascii=False).encode() + b"\n"


def _read_copied(path: pathlib.Path) -> bytes:
  """Returns the content of a file to copy; warns if it is a link to elsewhere.

  A downloaded folder may link to a private file that should not be published.
  Snapshots in Hugging Face's cache link to other places of the same folder.
  """
  folder = path.parent.resolve()
  if folder.parent.name == "snapshots":
    folder = folder.parents[1]
  if not path.resolve().is_relative_to(folder):
    logging.getLogger(__name__).warning(
      "%s is a link: copying %s.", path, path.resolve()
    )
  if path.stat().st_size > _MAX_COPIED_BYTES:
    raise ValueError(
      f"{path} is too large for a tokenizer's file: at most"
      f" {_MAX_COPIED_BYTES >> 20} MiB."
    )
  return path.read_bytes()


def copy_tokenizer(
  source: str | os.PathLike[str],
  folder: str | os.PathLike[str],
  *,
  context_len: int = 1,
) -> None:
  """Writes a model's tokenizer to a folder, in the files that other tools read.

  Args:
    source: A model's folder, whose tokenizer files are copied, or a GGUF file.
    folder: Output folder, made if missing.
    context_len: Longest sequence of the exported model, in tokens. Lower limits
      in the files are raised to it.

  Raises:
    OSError: A file cannot be written.
    ValueError: The GGUF file's vocabulary, or one of the files, cannot be read.
  """
  folder = pathlib.Path(folder)
  if pathlib.Path(source).suffix == gguf_file.SUFFIX:
    file = gguf_file.GgufFile(source)
    name, content = gguf_tokenizer.tokenizer_file(file)
    atomic_file.write(folder / name, content)
    atomic_file.write_json(
      folder / _TOKENIZER_CONFIG, gguf_tokenizer.tokenizer_settings(file)
    )
    return
  for name in (*_TOKENIZER_FILES, *_TOKENIZER_SETTINGS):
    path = pathlib.Path(source) / name
    if path.is_file():
      content = _read_copied(path)
      if name in _LIMITS:
        content = _with_limit(name, content, context_len)
      atomic_file.write(folder / name, content)
  _state_ends(folder)


def _state_ends(folder: pathlib.Path) -> None:
  """Adds to tokenizer_config.json how texts begin and end, if it does not say.

  A SentencePiece model does not record that, and versions of transformers
  differ.
  """
  if tokenizer.file_name(folder) != "tokenizer.model":
    return
  words: Any = tokenizer.load(folder)
  path = folder / _TOKENIZER_CONFIG
  settings = json_file.read(path) if path.is_file() else {}
  stated = {"add_bos_token": words.adds_bos, "add_eos_token": words.adds_eos}
  for name, token in (
    ("bos_token", words.bos_id),
    ("eos_token", words.eos_id),
    ("unk_token", words.processor.unk_id()),
  ):
    if token is not None and 0 <= token < words.processor.get_piece_size():
      stated[name] = words.processor.id_to_piece(token)
  if not settings.keys() >= stated.keys():
    atomic_file.write_json(path, stated | settings)
