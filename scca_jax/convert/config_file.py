"""Reads and writes config.json: the sizes of a model, and its rope scaling.

Settings that may change the computation in unknown ways are refused. How a
model ends its texts comes from generation_config.json, if there is one.
"""

import dataclasses
import os
import pathlib
import reprlib
from typing import Any

import jax.numpy as jnp

from scca_jax import gguf_file, json_file
from scca_jax.llama_config import LlamaConfig
from scca_jax.rope import RopeScaling

CONFIG = "config.json"
GENERATION = "generation_config.json"
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
  if pathlib.Path(source).suffix == gguf_file.SUFFIX:
    return gguf_file.GgufFile(source).config
  path = pathlib.Path(source) / CONFIG
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
  path = folder / GENERATION
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
  path = pathlib.Path(source) / GENERATION
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
