"""Reads and writes adapters in PEFT's files.

An adapter folder holds what PEFT writes, `adapter_config.json` and
`adapter_model.safetensors`, and our own `scca_config.json`, which PEFT ignores.
That file records the rope scaling, which an adapter tuned with it cannot do
without, and the attention patterns of the tuning, both as the string that
commands take and as the list of heads that the string stands for.

Its parts: patterns as JSON, saving, the meaning of PEFT's settings, loading.
"""

import dataclasses
import json
import os
import pathlib
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from scca_jax import atomic_file, json_file, quantize
from scca_jax.convert import config_file, layout, reader, writer
from scca_jax.llama import Llama
from scca_jax.llama_config import PROJECTIONS, LlamaConfig
from scca_jax.lora import TARGETS, LoraConfig
from scca_jax.patterns import (
  AttentionPattern,
  HeadPattern,
  Mixture,
  parse,
  text,
)
from scca_jax.safetensors_file import SafetensorsFiles

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_OWN_CONFIG = "scca_config.json"
_PREFIX = "base_model.model."
# Settings of adapter_config.json that we read, and settings that do not affect
# the computation, or affect it only through a method that we refuse.
_READ = (
  "peft_type",
  "r",
  "lora_alpha",
  "lora_dropout",
  "target_modules",
  "use_rslora",
  "bias",
  "modules_to_save",
  "init_lora_weights",
  "ensure_weight_tying",
)
_WITHOUT_EFFECT = (
  "task_type",
  "auto_mapping",
  "peft_version",
  "base_model_name_or_path",
  "revision",
  "inference_mode",
  "layers_pattern",
  "runtime_config",
  # PEFT itself sets it to false for a linear layer.
  "fan_in_fan_out",
  "megatron_core",
  "loftq_config",
  "eva_config",
  "corda_config",
  "lora_ga_config",
  "qalora_group_size",
)
# Initialisations that leave the base unchanged.
_INITS = (True, False, "gaussian", "eva", "orthogonal")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Representative: if any matrix is quantised, this one is.
_A_KERNEL = ("layers", "self_attn", "q_proj", "kernel")


def _is_saved_whole(path: tuple[str, ...], config: LoraConfig) -> bool:
  """Whether an adapter's files hold the parameter as a trained copy."""
  if path[0] in ("embed_tokens", "lm_head"):
    return config.train_embeddings
  return path[-1] == "scale" and config.train_norms


# Writing.


def _pattern_to_json(pattern: AttentionPattern | Mixture) -> dict[str, Any]:
  if isinstance(pattern, Mixture):
    return {"mixture": [_pattern_to_json(p) for p in pattern.members]}
  groups = pattern.head_groups()
  return {
    "boundary": pattern.boundary,
    "causality": pattern.causality,
    "head_groups": [
      # Without the fields at their defaults, older versions can read it too.
      {name: getattr(head, name) for name in sorted(head.in_use())}
      | {"heads": list(indices)}
      for head, indices in groups.items()
    ],
  }


def _pattern_from_json(content: Any) -> AttentionPattern | Mixture:
  if not isinstance(content, dict):
    raise TypeError(f"the pattern {reprlib.repr(content)} is not an object.")
  if "mixture" in content:
    members = [_pattern_from_json(member) for member in content["mixture"]]
    return Mixture(tuple(members))  # pyright: ignore[reportArgumentType]
  heads: dict[int, HeadPattern] = {}
  for group in content["head_groups"]:
    if not isinstance(group, dict):
      raise TypeError(f"the head group {reprlib.repr(group)} is not an object.")
    fields = {name: value for name, value in group.items() if name != "heads"}
    indices = [json_file.integer("head", i, 0) for i in group["heads"]]
    heads |= dict.fromkeys(indices, HeadPattern(**fields))
  return AttentionPattern(
    tuple(heads[i] for i in range(len(heads))),
    content["boundary"],
    content["causality"],
  )


def _file_tensors(
  path: tuple[str, ...], array: jax.Array, num_layers: int, dtype: Any
) -> dict[str, jax.Array]:
  """Returns a parameter as it is stored: one tensor per layer."""
  names = layout.file_names(path, num_layers)
  parts = array if path[0] == "layers" else array[None]
  return {
    _PREFIX + name: writer.file_tensor(path, part, dtype)
    for name, part in zip(names, parts, strict=True)
  }


def save_adapter(
  model: Llama,
  folder: str | os.PathLike[str],
  *,
  base_model: str,
  patterns: Sequence[AttentionPattern | Mixture] | None = None,
  dtype: Any = jnp.float32,
  plain: bool = False,
  run: dict[str, Any] | None = None,
) -> None:
  """Writes a model's adapters, and whatever was trained with them, for PEFT.

  Args:
    model: A model with adapters.
    folder: Output folder, made if missing.
    base_model: Name or path of the model they belong to.
    patterns: Attention pattern of each layer in training, to record.
    dtype: Dtype of the tensors.
    plain: Whether to write the matrices of the adapters alone, for tools that
      accept nothing else. Norms and embeddings that were trained, and the rope
      scaling, then belong to the base; see
      `convert.save_model(..., fuse=False)`.
    run: How it was trained and with what result, as JSON values to record.

  Raises:
    OSError: A file cannot be written.
    ValueError: The model has no adapters, or a value beyond the range of
      `dtype`.
  """
  folder = pathlib.Path(folder)
  config, lora = model.config, model.lora
  if lora is None:
    raise ValueError("the model has no adapter to save.")
  if plain:
    # llama.cpp always divides by the rank and ignores use_rslora.
    lora = dataclasses.replace(
      lora,
      alpha=lora.scaling * lora.rank,
      rslora=False,
      train_embeddings=False,
      train_norms=False,
    )
  tensors: dict[str, jax.Array] = {}
  saved_whole: list[str] = []
  arrays = layout.parameters(model)
  for path, array in arrays.items():
    if not layout.is_adapter(path):
      if not _is_saved_whole(path, lora):
        continue
      saved_whole.append(path[-2])
    tensors |= _file_tensors(path, array, config.num_layers, dtype)
  ties = config.tie_embeddings and lora.train_embeddings
  if ties:
    # PEFT stores a tied head under both names.
    tensors[_PREFIX + _HEAD] = tensors[_PREFIX + _EMBEDDING]
  writer.write_tensors(folder / _WEIGHTS, tensors)
  scaling = config.rope_scaling
  if plain and scaling is not None and scaling.kind == "ntk":
    # The base expresses it as a larger theta.
    scaling = None
  layers = list(patterns) if patterns is not None else []
  distinct = list(dict.fromkeys(layers))
  atomic_file.write_json(
    folder / _OWN_CONFIG,
    {
      "context_len": config.context_len,
      # The adapter compensates for this quantisation. The base that goes with a
      # plain adapter was written with rounded weights.
      "quantize": None if plain else quantize.method_of(arrays[_A_KERNEL]),
      "rope_scaling": None
      if scaling is None
      else {"kind": scaling.kind, **config_file.rope_settings(scaling)},
      "pattern": text(layers, num_kv_heads=config.num_kv_heads)
      if layers
      else None,
      "num_kv_heads": config.num_kv_heads,
      "patterns": [_pattern_to_json(p) for p in distinct],
      "pattern_of_layer": [distinct.index(p) for p in layers],
    }
    | ({} if run is None else {"run": run}),
  )
  alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
  atomic_file.write_json(
    folder / _CONFIG,
    {
      "peft_type": "LORA",
      "task_type": "CAUSAL_LM",
      "base_model_name_or_path": base_model,
      "r": lora.rank,
      "lora_alpha": alpha,
      "lora_dropout": lora.dropout,
      "target_modules": list(lora.targets),
      "use_rslora": lora.rslora,
      "bias": "none",
      "modules_to_save": sorted(set(saved_whole)) or None,
      "inference_mode": True,
    }
    # Without it PEFT would give a tied head a copy of its own.
    | ({"ensure_weight_tying": True} if ties else {}),
  )


def record_run(folder: str | os.PathLike[str], run: dict[str, Any]) -> None:
  """Adds to a saved adapter how it was trained and with what result.

  Args:
    folder: The adapter's folder, from `save_adapter`.
    run: JSON values to record.

  Raises:
    OSError: The file cannot be read or written.
    ValueError: It is damaged.
  """
  path = pathlib.Path(folder) / _OWN_CONFIG
  content = json.loads(path.read_text(encoding="utf-8"))
  atomic_file.write_json(path, content | {"run": run})


# Reading.


def stored_dtype(folder: str | os.PathLike[str]) -> np.dtype:
  """Returns the dtype that an adapter's matrices are stored in.

  Args:
    folder: The adapter's folder.

  Raises:
    FileNotFoundError: The file of its tensors is missing.
    ValueError: It is damaged, or contains no adapter.
  """
  tensors = SafetensorsFiles([pathlib.Path(folder) / _WEIGHTS])
  for name in tensors:
    if ".lora_A." in name:
      return tensors[name]().dtype
  raise ValueError(f"{folder} contains no LoRA matrix.")


def _targets(
  path: pathlib.Path, wanted: str | list[str], num_layers: int
) -> tuple[str, ...]:
  """Returns the projections that PEFT would adapt, in a fixed order.

  A string is a regular expression for full names; a list has full names or
  their endings.

  Raises:
    ValueError: One is unknown, or is adapted in only some of the layers.
  """
  if wanted == "all-linear":
    return TARGETS
  is_expression = isinstance(wanted, str)
  unknown = set() if is_expression else set(wanted)
  matches = _matcher(path, wanted) if is_expression else None
  found = []
  for name, projection in PROJECTIONS.items():
    in_layers = 0
    for i in range(num_layers):
      full = f"model.layers.{i}.{projection.module}.{name}"
      if matches is not None:
        in_layers += bool(matches(full))
        continue
      matching = {x for x in wanted if f".{full}".endswith(f".{x}")}
      unknown -= matching
      in_layers += bool(matching)
    if in_layers == num_layers:
      found.append(name)
    elif in_layers:
      raise ValueError(
        f"{path}: target_modules adapts {name} in {in_layers} of"
        f" {num_layers} layers, which is not supported."
      )
  for name in sorted(unknown):
    raise ValueError(
      f"{path}: unknown LoRA target {reprlib.repr(name)}: use any of"
      f" {', '.join(TARGETS)}."
    )
  if not found:
    raise ValueError(
      f"{path}: target_modules={reprlib.repr(wanted)} matches none of"
      f" {', '.join(TARGETS)}."
    )
  return tuple(found)


def _matcher(path: pathlib.Path, expression: str) -> Callable[[str], Any]:
  """Returns a matcher for a regular expression that takes linear time.

  Files may come from anywhere, and Python's own `re` can take forever.
  """
  import re2  # Few adapters need it.

  options = re2.Options()
  options.log_errors = False
  try:
    return re2.compile(expression, options).fullmatch
  except re2.error as error:
    reason = reprlib.repr(str(error.args[0], errors="replace"))
    raise ValueError(
      f"{path}: target_modules={reprlib.repr(expression)} is not a regular"
      f" expression that RE2 can match ({reason}): list the names instead."
    ) from error


def _adapter_config(path: pathlib.Path, num_layers: int) -> LoraConfig:
  content = json_file.read(path)
  if content.get("peft_type") != "LORA":
    raise ValueError(
      f"{path}: peft_type={content.get('peft_type')!r} is not supported, only"
      " 'LORA'."
    )
  init = content.get("init_lora_weights", True)
  if init not in _INITS:
    raise ValueError(
      f"{path}: init_lora_weights={reprlib.repr(init)} may have changed the"
      " base: convert the adapter with PEFT, save_pretrained(folder,"
      " path_initial_model_for_weight_conversion=...)."
    )
  for name, value in content.items():
    known = name in _READ or name in _WITHOUT_EFFECT
    if not known and json_file.is_on(value):
      raise ValueError(
        f"{path}: {name}={reprlib.repr(value)} is not supported."
      )
  if content.get("bias", "none") != "none":
    raise ValueError(f"{path}: bias={content['bias']!r} is not supported.")
  # PEFT's default for a Llama.
  targets = content.get("target_modules", ["q_proj", "v_proj"])
  try:
    if not isinstance(targets, str):
      targets = json_file.strings("target_modules", targets)
    whole = json_file.strings(
      "modules_to_save", content.get("modules_to_save", [])
    )
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  targets = _targets(path, targets, num_layers)
  try:
    return LoraConfig(
      rank=json_file.integer("r", content["r"]),
      alpha=json_file.number("lora_alpha", content["lora_alpha"]),
      dropout=json_file.number("lora_dropout", content.get("lora_dropout", 0)),
      targets=targets,
      rslora=json_file.boolean("use_rslora", content.get("use_rslora", False)),
      train_embeddings=any(
        module.endswith(name.removeprefix("model."))
        for module in ("embed_tokens", "lm_head")
        for name in whole
      ),
      train_norms=any(name.endswith("norm") for name in whole),
    )
  except KeyError as error:
    raise ValueError(f"{path} lacks {error.args[0]!r}.") from error
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _own_config(folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns the settings in our own file; None if PEFT wrote the adapter."""
  path = folder / _OWN_CONFIG
  return json_file.read(path) if path.is_file() else None


def has_settings(folder: str | os.PathLike[str]) -> bool:
  """Returns whether an adapter records its rope scaling; PEFT's do not.

  Args:
    folder: The adapter's folder.
  """
  return (pathlib.Path(folder) / _OWN_CONFIG).is_file()


def load_run(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
  """Returns how an adapter was trained, as `save_adapter` was told.

  Args:
    folder: The adapter's folder.

  Returns:
    What was recorded; None if nothing was.

  Raises:
    ValueError: The file that says it is damaged.
  """
  return (_own_config(pathlib.Path(folder)) or {}).get("run")


def load_patterns(
  folder: str | os.PathLike[str],
) -> tuple[AttentionPattern | Mixture, ...] | None:
  """Returns the pattern of each layer that an adapter was tuned with.

  Args:
    folder: The adapter's folder.

  Returns:
    One pattern per layer; None if none were recorded.

  Raises:
    ValueError: The file that says it is damaged.
  """
  folder = pathlib.Path(folder)
  path = folder / _OWN_CONFIG
  content = _own_config(folder) or {}
  string = content.get("pattern")
  if not content.get("patterns") and string is None:
    return None
  try:
    distinct = [_pattern_from_json(p) for p in content["patterns"]]
    layers = tuple(distinct[i] for i in content["pattern_of_layer"])
    # Older versions did not save the string.
    if string is None:
      return layers
    read = parse(
      string,
      num_heads=layers[0].num_heads,
      num_kv_heads=content["num_kv_heads"],
      num_layers=len(layers),
      seq_len=content["context_len"],
    )
  except KeyError as error:
    raise ValueError(f"{path} lacks {error.args[0]!r}.") from error
  except (IndexError, TypeError, ValueError) as error:
    raise ValueError(f"{path} is damaged: {error}") from error
  if read != layers:
    raise ValueError(
      f"{path} contradicts itself: its pattern {string!r} does not match the"
      " heads under patterns. Copy the adapter again."
    )
  return layers


def _adapted_config(folder: pathlib.Path, base: LlamaConfig) -> LlamaConfig:
  content = _own_config(folder)
  if content is None:
    return base
  try:
    context_len = json_file.integer("context_len", content["context_len"])
    scaling = content.get("rope_scaling")
    if isinstance(scaling, dict):
      scaling = config_file.rope_from_settings(
        scaling.pop("kind", None), scaling
      )
    elif scaling is not None:
      raise ValueError(
        f"rope_scaling={reprlib.repr(scaling)} is not an object."
      )
    quantize.check_method(content.get("quantize"))
    return dataclasses.replace(
      base, context_len=context_len, rope_scaling=scaling
    )
  except KeyError as error:
    raise ValueError(
      f"{folder / _OWN_CONFIG} lacks {error.args[0]!r}."
    ) from error
  except ValueError as error:
    raise ValueError(f"{folder / _OWN_CONFIG} is damaged: {error}") from error


def _stays_tied(folder: pathlib.Path, tensors: SafetensorsFiles) -> bool:
  """Whether an adapter leaves the head of a tied model tied.

  Without `ensure_weight_tying`, PEFT trains a separate copy of the embedding,
  of the head, or of both.

  Raises:
    ValueError: The adapter ties them, but they differ.
  """
  found = [
    tensors[_PREFIX + name]()
    for name in (_HEAD, _EMBEDDING)
    if _PREFIX + name in tensors
  ]
  equal = len(found) == 2 and np.array_equal(found[0], found[1])
  if not json_file.read(folder / _CONFIG).get("ensure_weight_tying"):
    return equal or not found
  if len(found) == 2 and not equal:
    raise ValueError(
      f"{folder}: ensure_weight_tying is true, but {_HEAD} differs from"
      f" {_EMBEDDING}: set it to false in adapter_config.json, or remove the"
      " wrong tensor."
    )
  return True


def load_adapter(
  base_folder: str | os.PathLike[str],
  folder: str | os.PathLike[str],
  *,
  config: LlamaConfig | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
) -> Llama:
  """Returns a model with an adapter, its rope scaling and its context.

  If the adapter was trained on quantised weights, the weights are quantised the
  same way.

  Args:
    base_folder: The model's folder.
    folder: The adapter's, from `save_adapter` or from PEFT.
    config: Replaces the model's own, for example to set the rope scaling that
      an adapter from PEFT was tuned with; see `has_settings`.
    dtype: Dtype of the computation.
    param_dtype: Dtype of the frozen weights.

  Raises:
    FileNotFoundError: A file is missing.
    ValueError: A file is damaged, or does not fit the model; the message
      names the tensor.
  """
  folder = pathlib.Path(folder)
  if config is None:
    config = config_file.load_config(base_folder)
  lora = _adapter_config(folder / _CONFIG, config.num_layers)
  config = _adapted_config(folder, config)
  tensors = SafetensorsFiles([folder / _WEIGHTS])
  tied = config.tie_embeddings and _stays_tied(folder, tensors)
  config = dataclasses.replace(config, tie_embeddings=tied)
  head, embedding = _PREFIX + _HEAD, _PREFIX + _EMBEDDING
  names, targets = {}, {}
  _, _, parameters = layout.abstract(config, lora, dtype, param_dtype)
  for path, target in parameters.items():
    of_path = [
      _PREFIX + name for name in layout.file_names(path, config.num_layers)
    ]
    if tied and of_path == [embedding] and embedding not in tensors:
      of_path = [head]
    # PEFT may train the embedding and not the head, or some of the norms.
    if layout.is_adapter(path) or (
      _is_saved_whole(path, lora) and of_path[0] in tensors
    ):
      names[path], targets[path] = of_path, target
  # Checked before a model is built with the rank that the file asks for.
  reader.check_shapes(targets, names, tensors, folder)
  used = {name for of_path in names.values() for name in of_path}
  if tied:
    used.add(head)
  for name in tensors:
    if name not in used:
      raise ValueError(
        f"{folder} has a tensor that the model does not: {name}."
      )
  model = reader.load_model(
    base_folder,
    config=config,
    lora=lora,
    dtype=dtype,
    param_dtype=param_dtype,
    quantize_by=(_own_config(folder) or {}).get("quantize"),
  )
  read = reader.read_parameters(targets, names, tensors, folder)
  state = nnx.state(model, nnx.Param)
  nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(read))
  nnx.update(model, state)
  return model
