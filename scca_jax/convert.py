"""Reads and writes models in Hugging Face's files; reads GGUF.

A model folder holds `config.json` and safetensors, in one file or in shards; a
GGUF file holds a whole model. The parts of this module: configurations, names
of tensors, reading, writing. PEFT's files are read in `adapters`.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
import reprlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax
from flax import nnx, traverse_util

from scca_jax import (
  atomic_file,
  gguf_file,
  gguf_tokenizer,
  json_file,
  quantize,
  tokenizer,
)
from scca_jax.llama import Llama
from scca_jax.llama_config import LlamaConfig
from scca_jax.lora import LoraConfig, init_lora_a
from scca_jax.rope import RopeScaling
from scca_jax.safetensors_file import SafetensorsFiles

_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Settings of config.json that are read.
_READ = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
  "num_key_value_heads",
  "head_dim",
  "max_position_embeddings",
  "original_max_position_embeddings",
  "rope_theta",
  "rope_scaling",
  "rope_parameters",
  "rms_norm_eps",
  "tie_word_embeddings",
  "initializer_range",
  "bos_token_id",
  "eos_token_id",
)
# Settings that `Llama` supports only at some values.
_SERVED: dict[str, tuple[Any, ...]] = {
  "model_type": ("llama",),
  "architectures": (
    ["LlamaForCausalLM"],
    ["LLaMAForCausalLM"],
    ["LlamaModel"],
  ),
  "hidden_act": ("silu", "swish"),
  "attention_bias": (False,),
  "mlp_bias": (False,),
  "attention_dropout": (0,),
  "partial_rotary_factor": (1,),
}
# Settings that do not change what a Llama computes: where it came from, how
# transformers runs and reports it, how it is sampled from (`generation` has
# settings of its own), and settings that only other models read.
_IGNORED = frozenset(
  """
  _name_or_path name_or_path _commit_hash transformers_version auto_map
  tokenizer_class unsloth_version unsloth_fixed is_llama_config
  dtype torch_dtype use_cache pretraining_tp gradient_checkpointing
  attn_implementation _attn_implementation _attn_implementation_autoset
  _attn_implementation_internal _experts_implementation_internal
  _flash_attn_2_enabled
  return_dict output_hidden_states output_attentions output_scores
  return_dict_in_generate tie_last_hidden_states chunk_size_feed_forward
  keys_to_ignore_at_inference torchscript use_bfloat16 tf_legacy_loss
  is_decoder cross_attention_hidden_size decoder_start_token_id
  sep_token_id pad_token_id prefix max_sequence_length
  finetuning_task task_specific_params problem_type num_labels id2label label2id
  max_length min_length max_new_tokens min_new_tokens do_sample early_stopping
  num_beams num_beam_groups diversity_penalty length_penalty
  temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff
  repetition_penalty encoder_repetition_penalty no_repeat_ngram_size
  encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
  forced_bos_token_id forced_eos_token_id remove_invalid_values
  exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
  num_assistant_tokens num_assistant_tokens_schedule
  assistant_confidence_threshold assistant_lookbehind target_lookbehind
  """.split()
)
# Settings of generation_config.json that change even greedy output, and the
# values at which they do not; null and empty never do.
_STEERING = {
  "repetition_penalty": 1,
  "encoder_repetition_penalty": 1,
  "no_repeat_ngram_size": 0,
  "encoder_no_repeat_ngram_size": 0,
  "num_beams": 1,
  "guidance_scale": 1,
  "min_length": 0,
  "min_new_tokens": 0,
  "bad_words_ids": None,
  "sequence_bias": None,
  "suppress_tokens": None,
  "begin_suppress_tokens": None,
  "forced_bos_token_id": None,
  "forced_eos_token_id": None,
  "exponential_decay_length_penalty": None,
  "stop_strings": None,
}
# Kinds of rope scaling that config.json can name; "ntk" is not one of them.
_HF_ROPE_KINDS = ("linear", "dynamic", "yarn", "llama3")
_ORIGINAL = "original_max_position_embeddings"
_ROPE_SETTINGS = {field.name for field in dataclasses.fields(RopeScaling)} - {
  "kind"
}
# What transformers requires besides the factor.
_REQUIRED = {"llama3": ("low_freq_factor", "high_freq_factor")}
# Settings found in published models, and the values that change nothing.
_WITHOUT_EFFECT = {
  "partial_rotary_factor": (1,),
  "extrapolation_factor": (1,),
  "attn_factor": (1,),
  "finetuned": (True, False),
}
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER_SETTINGS = (
  _TOKENIZER_CONFIG,
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  _GENERATION,
)

_MAX_COPIED_BYTES = 256 << 20
# Tensors read concurrently: with four, an H200 waits only for the disk.
_NUM_READERS = 4

_Path = tuple[str, ...]


def _is_gguf(path: str | os.PathLike[str]) -> bool:
  return pathlib.Path(path).suffix == gguf_file.SUFFIX


# Configurations.


def _rope_settings(config: dict[str, Any], name: str) -> dict[str, Any]:
  """Returns the settings under one spelling, without the null ones."""
  settings = config.get(name, {})
  if not isinstance(settings, dict):
    raise ValueError(
      f"{name} must be an object with rope_type and factor, got"
      f" {reprlib.repr(settings)}."
    )
  return {key: value for key, value in settings.items() if value is not None}


def _rope_scaling(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
  """Returns the base and the scaling that transformers would use."""
  # If both spellings are present, transformers uses the old one and the base
  # next to it.
  old = _rope_settings(config, "rope_scaling")
  new = _rope_settings(config, "rope_parameters")
  settings = old or new
  theta = settings.pop("rope_theta", config.get("rope_theta", 10000.0))
  theta = json_file.number("rope_theta", theta)
  if old and new.get("rope_theta", theta) != theta:
    raise ValueError(
      f"rope_parameters has rope_theta={new['rope_theta']!r}, but rope_scaling"
      f" next to it makes it {theta}: remove the wrong one."
    )
  old_kind = settings.pop("type", "default")
  kind = settings.pop("rope_type", old_kind)
  if kind not in ("default", *_HF_ROPE_KINDS):
    raise ValueError(
      f"unknown rope scaling {reprlib.repr(kind)}; known are"
      f" {', '.join(_HF_ROPE_KINDS)}."
    )
  for name, allowed in _WITHOUT_EFFECT.items():
    if settings.get(name, allowed[0]) in allowed:
      settings.pop(name, None)
  if kind == "default":
    for name in settings:
      if name not in _ROPE_SETTINGS:
        raise ValueError(f"unknown setting {name!r} of {kind} rope.")
    if settings.get("factor", 1) != 1:
      raise ValueError(
        f"the rope scaling has factor={settings['factor']!r} and no rope_type:"
        ' add it, such as "rope_type": "linear".'
      )
    return theta, None
  name = "max_position_embeddings"
  context_len = json_file.integer(name, config[name])
  original = config.get(_ORIGINAL, settings.pop(_ORIGINAL, context_len))
  # "dynamic" uses no other length; "linear" needs none.
  if kind == "dynamic":
    original = context_len
  if kind != "linear":
    settings[_ORIGINAL] = json_file.integer(_ORIGINAL, original)
  # To "yarn" a null factor, unlike a missing one, means the ratio of lengths.
  given = config.get("rope_scaling") or config.get("rope_parameters") or {}
  if kind == "yarn" and "factor" in given:
    settings.setdefault("factor", context_len / settings[_ORIGINAL])
  scaling = rope_from_settings(kind, settings)
  for name in ("factor", *_REQUIRED.get(kind, ())):
    if name not in settings:
      raise ValueError(f"{kind} rope lacks {name!r}.")
  return theta, scaling


def rope_from_settings(kind: Any, settings: dict[str, Any]) -> RopeScaling:
  """Returns the rope scaling that a file describes.

  Args:
    kind: One of `rope.KINDS`.
    settings: Other fields of `RopeScaling`, from JSON.

  Raises:
    ValueError: A setting is unknown, of the wrong type or out of range.
  """
  checks = {_ORIGINAL: json_file.integer, "truncate": json_file.boolean}
  for name in settings:
    if name not in _ROPE_SETTINGS:
      raise ValueError(f"unknown setting {name!r} of {kind} rope.")
  checked: dict[str, Any] = {
    name: checks.get(name, json_file.number)(name, value)
    for name, value in settings.items()
    if value is not None
  }
  return RopeScaling(kind=kind, **checked)


def load_config(source: str | os.PathLike[str]) -> LlamaConfig:
  """Returns the sizes of a model.

  Args:
    source: A folder with `config.json`, or a GGUF file.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: It is damaged, or describes a model that `Llama` does not
      support.
  """
  if _is_gguf(source):
    return gguf_file.GgufFile(source).config
  path = pathlib.Path(source) / _CONFIG
  config = json_file.read(path)
  _check_settings(path, config)
  ends = _ends(path.parent)
  try:
    # Checked even if another file decides.
    _token_ids("eos_token_id", config.get("eos_token_id"))
    return _config(config | ends)
  except KeyError as error:
    raise ValueError(f"{path} lacks {error.args[0]!r}.") from error
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _check_settings(path: pathlib.Path, config: dict[str, Any]) -> None:
  """Refuses settings that may change the computation in unknown ways."""
  for name, value in config.items():
    if name in _SERVED:
      if value not in _SERVED[name]:
        raise ValueError(
          f"{path}: {name}={reprlib.repr(value)} is not supported, only"
          f" {_SERVED[name][0]!r}."
        )
    elif name == "layer_types" and isinstance(value, list):
      if others := [kind for kind in value if kind != "full_attention"]:
        raise ValueError(
          f"{path}: layer_types has {reprlib.repr(others[0])}, which is not"
          " supported, only 'full_attention'."
        )
    elif name not in _READ and name not in _IGNORED and json_file.is_on(value):
      raise ValueError(
        f"{path}: {name}={reprlib.repr(value)} is not supported: remove it from"
        " the file if the model is the same without it."
      )


def _ends(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the tokens that end generation; empty if config.json decides.

  For transformers, config.json decides only if there is no
  generation_config.json at all.
  """
  path = folder / _GENERATION
  if not path.is_file():
    return {}
  ends = json_file.read(path).get("eos_token_id")
  _token_ids(f"{path}: eos_token_id", ends)
  return {"eos_token_id": ends}


def unapplied_generation(source: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns the settings that make transformers generate different text.

  These are the settings of generation_config.json that change even greedy
  output; `generation` supports none of them.

  Args:
    source: A model's folder, or a GGUF file, which has no such settings.

  Raises:
    ValueError: The file is damaged.
  """
  path = pathlib.Path(source) / _GENERATION
  settings = json_file.read(path) if path.is_file() else {}
  return {
    name: settings[name]
    for name, without in _STEERING.items()
    if settings.get(name, without) not in (without, [], {}, "")
  }


def _token_ids(name: str, value: Any) -> int | tuple[int, ...] | None:
  """Returns one token id, or several (Llama 3 has several end tokens)."""
  if value is None:
    return None
  if isinstance(value, list):
    return tuple(json_file.integer(name, token, 0) for token in value)
  return json_file.integer(name, value, 0)


def _config(config: dict[str, Any]) -> LlamaConfig:
  def size(name: str, default: int | None = None) -> int:
    value = config[name] if default is None else config.get(name, default)
    return json_file.integer(name, value)

  theta, scaling = _rope_scaling(config)
  num_heads, hidden_size = size("num_attention_heads"), size("hidden_size")
  bos_id = config.get("bos_token_id")
  return LlamaConfig(
    vocab_size=size("vocab_size"),
    hidden_size=hidden_size,
    intermediate_size=size("intermediate_size"),
    num_layers=size("num_hidden_layers"),
    num_heads=num_heads,
    num_kv_heads=size("num_key_value_heads", num_heads),
    head_dim=size("head_dim", hidden_size // num_heads),
    context_len=size("max_position_embeddings"),
    rope_theta=theta,
    rope_scaling=scaling,
    rms_norm_eps=json_file.number(
      "rms_norm_eps", config.get("rms_norm_eps", 1e-6)
    ),
    tie_embeddings=json_file.boolean(
      "tie_word_embeddings", config.get("tie_word_embeddings", False)
    ),
    initializer_range=json_file.number(
      "initializer_range", config.get("initializer_range", 0.02)
    ),
    bos_token_id=None
    if bos_id is None
    else json_file.integer("bos_token_id", bos_id, 0),
    eos_token_id=_token_ids("eos_token_id", config.get("eos_token_id")),
  )


def rope_settings(scaling: RopeScaling) -> dict[str, Any]:
  """Returns the settings of a rope scaling that differ from the defaults."""
  return {
    field.name: getattr(scaling, field.name)
    for field in dataclasses.fields(RopeScaling)
    if field.name != "kind" and getattr(scaling, field.name) != field.default
  }


def _old_rope(rope: dict[str, Any]) -> dict[str, Any] | None:
  """Returns the spelling that transformers used before `rope_parameters`."""
  if rope["rope_type"] == "default":
    return None
  if rope["rope_type"] == "linear":
    # The first versions accept only these two fields.
    return {"type": "linear", "factor": rope["factor"]}
  return rope


def config_to_json(config: LlamaConfig, dtype: Any) -> dict[str, Any]:
  """Returns config.json, with the rope scaling in both spellings.

  Args:
    config: Sizes of the model.
    dtype: Dtype of the weights, which the file names.
  """
  theta, scaling = config.rope_theta, config.rope_scaling
  context_len = config.context_len
  rope = {"rope_type": "default"}
  if scaling is not None and scaling.kind == "ntk":
    # A larger base is equivalent, and other tools understand it.
    theta *= scaling.factor ** (config.head_dim / (config.head_dim - 2))
  elif scaling is not None:
    # Transformers requires some of them, default or not.
    required = {"factor": scaling.factor}
    if scaling.kind == "llama3":
      required["low_freq_factor"] = scaling.low_freq_factor
      required["high_freq_factor"] = scaling.high_freq_factor
    rope = {"rope_type": scaling.kind, **required, **rope_settings(scaling)}
    if scaling.kind == "dynamic":
      # Transformers scales beyond this length and has no other setting for it.
      context_len = scaling.original_max_position_embeddings or context_len
  dtype_name = jnp.dtype(dtype).name
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": context_len,
    "rope_theta": theta,
    "rope_scaling": _old_rope(rope),
    "rope_parameters": {"rope_theta": theta, **rope},
    "rms_norm_eps": config.rms_norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
    "initializer_range": config.initializer_range,
    "bos_token_id": config.bos_token_id,
    "eos_token_id": config.eos_token_id,
    "dtype": dtype_name,
    "torch_dtype": dtype_name,
  }


# Names.


def file_names(path: _Path, num_layers: int) -> list[str]:
  """Returns the Hugging Face names of a parameter's tensors.

  Args:
    path: Path of the parameter in the model.
    num_layers: Number of layers of the model.

  Returns:
    One name per layer for parameters stacked over the layers; one name for the
    others.
  """
  *modules, leaf = path
  suffix = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}.get(
    leaf, "weight"
  )
  if modules[0] == "layers":
    rest = ".".join((*modules[1:], suffix))
    return [f"model.layers.{i}.{rest}" for i in range(num_layers)]
  prefix = "" if modules[0] == "lm_head" else "model."
  return [prefix + ".".join((*modules, suffix))]


def _is_matrix(path: _Path) -> bool:
  """Whether the files hold the parameter as `[out, in]`, ours `[in, out]`."""
  return path[-1] in ("kernel", "lora_a", "lora_b")


def is_adapter(path: _Path) -> bool:
  """Returns whether the parameter at `path` is a matrix of an adapter."""
  return path[-1] in ("lora_a", "lora_b")


# Reading.


def _open_folder(folder: pathlib.Path) -> SafetensorsFiles:
  """Returns the tensors of a model's folder."""
  path = folder / _INDEX
  # If there is also a single file, transformers uses that.
  if path.is_file() and not (folder / _WEIGHTS).is_file():
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
  if not (folder / _WEIGHTS).is_file():
    pickled = sorted(
      [*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")]
    )
    if pickled:
      raise ValueError(
        f"{pickled[0]} is pickled, and reading it could run any code: convert"
        " the model with transformers, model.save_pretrained(folder,"
        " safe_serialization=True)."
      )
  return SafetensorsFiles([folder / _WEIGHTS])


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
  path: _Path,
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
  is_matrix = _is_matrix(path)
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
  targets: dict[_Path, jax.ShapeDtypeStruct],
  names: dict[_Path, list[str]],
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
    wanted = shape[::-1] if _is_matrix(path) else shape
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
  targets: dict[_Path, jax.ShapeDtypeStruct],
  names: dict[_Path, list[str]],
  tensors: SafetensorsFiles | gguf_file.GgufFile,
  source: pathlib.Path,
  quantize_by: str | None = None,
) -> dict[_Path, Any]:
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


def _flatten(state: nnx.State) -> dict[_Path, Any]:
  """Returns the arrays of a state by path."""
  flat: Any = traverse_util.flatten_dict(nnx.to_pure_dict(state))
  return flat


def abstract(
  config: LlamaConfig, lora: LoraConfig | None, dtype: Any, param_dtype: Any
) -> tuple[nnx.GraphDef, nnx.State, dict[_Path, jax.ShapeDtypeStruct]]:
  """Returns a model's structure, and its parameters' shapes by path.

  Args:
    config: Sizes of the model.
    lora: Its adapters.
    dtype: Dtype of the computation.
    param_dtype: Dtype that weights are held in.
  """
  model = nnx.eval_shape(
    lambda: Llama(
      config,
      lora=lora,
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=nnx.Rngs(0),
    )
  )
  graphdef, state = nnx.split(model)
  return graphdef, state, _flatten(state)


def _merge(
  graphdef: nnx.GraphDef, state: nnx.State, arrays: dict[_Path, jax.Array]
) -> Llama:
  nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(arrays))
  return nnx.merge(graphdef, state)


def parameters(model: Llama) -> dict[_Path, jax.Array]:
  """Returns a model's parameters by path."""
  return _flatten(nnx.state(model, nnx.Param))


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
  if _is_gguf(source):
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


# Writing.


def file_tensor(path: _Path, part: jax.Array, dtype: Any) -> jax.Array:
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
  tensor = (part.T if _is_matrix(path) else part).astype(dtype)
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
  arrays: dict[_Path, jax.Array], path: _Path, layer: int, scaling: float
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
    return {_WEIGHTS: groups[0]}
  stem, suffix = _WEIGHTS.split(".")
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
  places: dict[str, tuple[_Path, int]] = {}
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
    atomic_file.write_json(folder / _INDEX, index)
  atomic_file.write_json(folder / _CONFIG, config_to_json(model.config, dtype))


# Fields that limit the length of a text, in tokens, by file.
_LIMITS = {
  _TOKENIZER_CONFIG: ("model_max_length",),
  "tokenizer.json": ("truncation", "max_length"),
  _GENERATION: ("max_length",),
}


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
  if _is_gguf(source):
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


def stored_dtype(source: str | os.PathLike[str]) -> np.dtype:
  """Returns the dtype that a model's matrices are stored in.

  Args:
    source: A model's folder, or a GGUF file, which is dequantised to float32.

  Raises:
    FileNotFoundError: A file is missing.
    ValueError: A file is damaged.
  """
  if _is_gguf(source):
    return np.dtype(np.float32)
  tensors = _open_folder(pathlib.Path(source))
  for name in tensors:
    if name.endswith("_proj.weight"):
      return tensors[name]().dtype
  raise ValueError(f"{source} contains no weights of a Llama's layers.")
