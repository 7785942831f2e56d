"""Writes models as GGUF files, with adapters fused into the weights.

The `gguf` library does the writing. This module provides what llama.cpp expects
of a LLaMA: names, order of query and key rows, and rope scaling. The vocabulary
comes from `gguf_vocabulary`.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from scca_jax import atomic_file, gguf_file, rope
from scca_jax.convert.layout import file_names, is_adapter, parameters
from scca_jax.convert.writer import file_tensor, fused
from scca_jax.llama import Llama
from scca_jax.llama_config import LlamaConfig
from scca_jax.rope import RopeScaling

KINDS = ("F32", "F16", "Q8_0")
# Weights that share a scale in Q8_0.
_BLOCK = 32
_FLOAT16_MAX = float(np.finfo(np.float16).max)


def _rope(config: LlamaConfig) -> tuple[dict[str, Any], np.ndarray | None]:
  """Returns the metadata of a model's RoPE, and its `rope_freqs.weight`.

  Raises:
    ValueError: llama.cpp has no such scaling.
  """
  theta, scaling = config.rope_theta, config.rope_scaling
  if scaling is None:
    return {"rope.freq_base": theta}, None
  head_dim = config.head_dim
  _, attention = rope.frequencies(head_dim, theta, scaling, 1)
  if scaling.kind == "ntk":
    # A larger base is equivalent.
    theta *= scaling.factor ** (head_dim / (head_dim - 2))
    return {"rope.freq_base": theta}, None
  fields: dict[str, Any] = {"rope.freq_base": theta}
  if scaling.kind == "llama3":
    # The length is for our own reader; llama.cpp needs only the tensor.
    fields["rope.scaling.original_context_length"] = scaling.pretrained_len
    plain, _ = rope.frequencies(head_dim, theta, None, 1)
    scaled, _ = rope.frequencies(head_dim, theta, scaling, 1)
    return fields, plain / scaled
  if scaling.kind not in ("linear", "yarn"):
    raise ValueError(
      f"GGUF has no {scaling.kind} rope scaling: tune with linear, ntk, yarn or"
      " llama3, or export for transformers (hf)."
    )
  fields["rope.scaling.type"] = scaling.kind
  fields["rope.scaling.factor"] = scaling.factor
  if scaling.kind == "yarn":
    # llama.cpp rounds the bounds and reads no others for a LLaMA.
    usual = RopeScaling(kind="linear")
    for name in ("beta_fast", "beta_slow", "truncate"):
      if getattr(scaling, name) != getattr(usual, name):
        raise ValueError(
          f"GGUF has no yarn rope scaling with"
          f" {name}={getattr(scaling, name)} for a LLaMA: export for"
          " transformers (hf)."
        )
    fields["rope.scaling.original_context_length"] = scaling.pretrained_len
    # The factor on top of YaRN's own.
    own = 0.1 * np.log(scaling.factor) + 1
    if not np.isclose(attention, own, rtol=1e-6):
      fields["rope.scaling.attn_factor"] = float(attention / own)
  return fields, None


def _sizes(config: LlamaConfig) -> dict[str, int | float]:
  """Returns the metadata of a model, except RoPE's."""
  return {
    "vocab_size": config.vocab_size,
    "context_length": config.context_len,
    "embedding_length": config.hidden_size,
    "block_count": config.num_layers,
    "feed_forward_length": config.intermediate_size,
    "attention.head_count": config.num_heads,
    "attention.head_count_kv": config.num_kv_heads,
    "attention.key_length": config.head_dim,
    "attention.value_length": config.head_dim,
    "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    "rope.dimension_count": config.head_dim,
  }


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where a tensor of the file comes from in a model.

  Attributes:
    name: Its Hugging Face name.
    path: Path of the parameter.
    layer: The layer.
    shape: Its shape in files.
  """

  name: str
  path: tuple[str, ...]
  layer: int
  shape: tuple[int, ...]


def _places(model: Llama) -> list[_Place]:
  """Returns the tensors of a model, layer by layer."""
  places = []
  for path, array in parameters(model).items():
    if is_adapter(path):
      continue
    names = file_names(path, model.config.num_layers)
    shape = array.shape[1:] if path[0] == "layers" else array.shape
    if path[-1] == "kernel":
      shape = shape[::-1]
    places += [_Place(name, path, i, shape) for i, name in enumerate(names)]
  return sorted(places, key=lambda place: (place.layer, place.name))


def _values(
  model: Llama, arrays: dict[tuple[str, ...], jax.Array], place: _Place
) -> np.ndarray:
  """Returns a tensor in llama.cpp's layout, float32."""
  scaling = model.lora.scaling if model.lora is not None else 0.0
  part = fused(arrays, place.path, place.layer, scaling)
  values = np.asarray(file_tensor(place.path, part, np.float32))
  for suffix, num_heads in (
    ("q_proj.weight", model.config.num_heads),
    ("k_proj.weight", model.config.num_kv_heads),
  ):
    if place.name.endswith(suffix):
      values = gguf_file.channels_together(values, num_heads)
  return values


def _type_of(shape: tuple[int, ...], kind: str) -> Any:
  """Returns the type in which llama.cpp keeps a tensor of this shape."""
  import gguf

  types = gguf.GGMLQuantizationType
  if len(shape) == 1 or kind == "F32":
    return types.F32
  if kind == "Q8_0" and shape[-1] % _BLOCK == 0:
    return types.Q8_0
  return types.F16


def _announce(
  writer: Any, name: str, shape: tuple[int, ...], kind: Any
) -> None:
  """Lists a tensor that will be written."""
  import gguf

  size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
  writer.add_tensor_info(
    name,
    shape,
    np.dtype(np.float32),
    math.prod(shape) // size * num_bytes,
    raw_dtype=kind,
  )


def _add(writer: Any, name: str, value: Any) -> None:
  """Adds an entry to the metadata, with the type that llama.cpp expects."""
  if isinstance(value, bool):
    writer.add_bool(name, value)
  elif isinstance(value, int):
    writer.add_uint32(name, value)
  elif isinstance(value, float):
    writer.add_float32(name, value)
  elif isinstance(value, str):
    writer.add_string(name, value)
  else:
    writer.add_array(name, value)


def _file_type(kind: str) -> int:
  """Returns llama.cpp's number for a file whose matrices are of `kind`."""
  import gguf

  types = gguf.LlamaFileType
  return types.ALL_F32 if kind == "F32" else types[f"MOSTLY_{kind}"]


def _encoded(name: str, values: np.ndarray, kind: Any) -> np.ndarray:
  """Returns a tensor as it is written.

  Raises:
    ValueError: A value is beyond the range of its type.
  """
  import gguf

  # The scales of Q8_0 are float16.
  limit = _FLOAT16_MAX * (127 if kind.name == "Q8_0" else 1)
  if kind.name != "F32" and not np.all(np.abs(values) <= limit):
    raise ValueError(
      f"{name} has values beyond {kind.name}: export for transformers (hf)"
      " with --dtype=bfloat16 or float32."
    )
  return gguf.quantize(np.ascontiguousarray(values), kind)


def save_gguf(
  model: Llama,
  path: str | os.PathLike[str],
  *,
  vocabulary: Mapping[str, Any],
  kind: str = "F16",
) -> None:
  """Writes a model as a GGUF file for llama.cpp, completely or not at all.

  Norms are float32, and so are adapter products before rounding. Only one
  tensor is in memory besides the model.

  Args:
    model: The model.
    path: The `.gguf` file; its folder is made if missing.
    vocabulary: Metadata of the tokenizer, from `gguf_vocabulary.fields`.
    kind: Type of the matrices, one of `KINDS`. With Q8_0, matrices whose rows
      are not divisible by 32 stay F16, as in llama.cpp.

  Raises:
    OSError: The file cannot be written.
    ValueError: GGUF has no such rope scaling, or a weight is beyond the range
      of `kind`.
  """
  import gguf

  if kind not in KINDS:
    raise ValueError(
      f"kind={kind!r} cannot be written, only {', '.join(KINDS)}."
    )
  path = pathlib.Path(path)
  rotation, factors = _rope(model.config)
  arrays = parameters(model)
  with atomic_file.replacing(path) as temporary:
    writer = gguf.GGUFWriter(temporary, "llama")
    try:
      writer.add_type("model")
      writer.add_name(path.stem)
      writer.add_file_type(_file_type(kind))
      writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
      for name, value in (_sizes(model.config) | rotation).items():
        _add(writer, f"llama.{name}", value)
      for name, value in vocabulary.items():
        _add(writer, name, value)
      places = _places(model)
      for place in places:
        name, kind_here = (
          gguf_file.gguf_name(place.name),
          _type_of(place.shape, kind),
        )
        _announce(writer, name, place.shape, kind_here)
      if factors is not None:
        f32 = _type_of(factors.shape, kind)
        _announce(writer, gguf_file.ROPE_FACTORS, factors.shape, f32)
      writer.write_header_to_file()
      writer.write_kv_data_to_file()
      writer.write_ti_data_to_file()
      for place in places:
        values = _values(model, arrays, place)
        tensor_kind = _type_of(place.shape, kind)
        writer.write_tensor_data(_encoded(place.name, values, tensor_kind))
      if factors is not None:
        writer.write_tensor_data(factors.astype(np.float32))
    finally:
      writer.close()
