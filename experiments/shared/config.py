"""Settings of a run: typed, checked, and saved with every result.

A file in `configs/` returns a `ConfigDict`, made by `to_config_dict` from the
dataclasses here, so every setting has its default, type and description in one
place. Flags change single settings (`--config.training.steps=100`). When a
command starts, the `ConfigDict` becomes a dataclass again, and an unknown
setting or one of the wrong type ends the command with its name.
"""

import dataclasses
import difflib
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import ml_collections
from ml_collections import config_dict

from scca_jax import batches, llama, perplexity, quantize, tasks
from scca_jax.lora import LoraConfig
from scca_jax.sharding import MeshConfig
from scca_jax.training import OptimizerConfig

Settings = TypeVar("Settings")
DTYPES = ("float32", "bfloat16", "float16")
TUNINGS = ("lora", "full")
# Numbers must be below it; no sensible size, seed or rate is larger.
_LIMIT = 1 << 31


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """How the positions are adapted to the longer context.

  Attributes:
    kind: "yarn", "linear" (Position Interpolation), "dynamic", "ntk" or
      "llama3"; None keeps the model's RoPE.
    factor: Factor of the scaling; None means target length / pretrained length.
      "ntk" needs about twice that.
  """

  kind: str | None = "yarn"
  factor: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """The texts.

  Attributes:
    train: A token file (.bin), or text (.txt, .jsonl, compressed or a folder);
      None uses the embedded books.
    test: The same, for perplexity; it must not share documents with `train`.
    tokenizer: `tokenizer.model` or `tokenizer.json`; None uses the model's.
    packing: "concatenate" (documents run on, as in LongLoRA) or "packed"
      (attention stays within a document).
    held_out: Number of documents at the end of `train` that are not trained on,
      so that settings can be chosen on them; `ablate` validates on them.
    skip_to: Length that positions reach by skipping within shorter windows, for
      PoSE; see `batches.make_batches`. None skips nothing.
  """

  train: str | None = None
  test: str | None = None
  tokenizer: str | None = None
  packing: str = "concatenate"
  held_out: int = 0
  skip_to: int | None = None

  def __post_init__(self):
    if self.held_out < 0:
      raise ValueError(
        f"data.held_out must not be negative, got {self.held_out}."
      )
    if self.packing not in batches.PACKINGS:
      raise ValueError(
        f"data.packing must be one of {', '.join(batches.PACKINGS)}, got"
        f" {self.packing!r}."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
  """The training loop.

  Attributes:
    seq_len: Length of a training sequence in tokens: the target context.
    batch_size: Sequences per optimiser step.
    num_micro_batches: Parts that a batch is cut into (gradient accumulation).
    steps: Optimiser steps.
    dense_fraction: Share of the steps, at the end, with dense attention instead
      of the pattern. The optimiser's moments are kept, and the learning rate
      warms up again over `optimizer.rewarmup_steps`.
    seed: Seed of initialisation, shuffling and dropout.
    dtype: Compute dtype, "float32", "bfloat16" or "float16".
    param_dtype: Dtype of the frozen weights.
    quantize: "int8" or "nf4" for the frozen matrices of the layers; None keeps
      them in `param_dtype`.
    remat: What each layer saves for the backward pass: "none", all activations;
      "layer", only its input, from which the rest is recomputed; "attention",
      also what the attention kernels save; "projections", also the outputs of
      the projections, so that no large product runs forward twice; "offload",
      the inputs of attention and MLP, in the host's memory;
      "offload_projections", the same as "projections", in the host's memory.
    offload_optimizer: Whether the optimiser's moments stay in the host's
      memory between updates.
    mlp_chunk: How many tokens of each sequence the MLP processes at a time;
      None means all.
    loss_chunk: How many tokens of each sequence have their logits in memory at
      once.
    segment_len: Tokens of a sequence that go through the layers at a time, with
      exact gradients, so that memory does not grow with the length of the
      sequence. None means all. The pattern must have a limited reach, so not
      dense attention.
    offload_segments: Whether the keys and values that later segments see are
      kept in the host's memory until the backward pass.
    unroll_layers: Whether the layers are compiled one by one, not as a loop:
      that takes longer, but nothing saved is copied into stacks of all layers.
    log_every: Steps between writes of the metrics (each step has its own line).
    checkpoint_every: Steps between checkpoints; the last step has one too.
    keep_checkpoints: How many of the newest checkpoints are kept.
    implementation: Attention back end; None picks the best for the device.
    deterministic: Whether attention has bit-equal gradients from run to run, so
      that a run that is killed and resumed on a GPU ends exactly as it would
      have; otherwise it ends within noise of that, and may be faster.
  """

  seq_len: int = 1024
  batch_size: int = 8
  num_micro_batches: int = 1
  steps: int = 100
  dense_fraction: float = 0.0
  seed: int = 0
  dtype: str = "float32"
  param_dtype: str = "float32"
  quantize: str | None = None
  remat: str = "none"
  offload_optimizer: bool = False
  mlp_chunk: int | None = None
  loss_chunk: int = 512
  segment_len: int | None = None
  offload_segments: bool = False
  unroll_layers: bool = False
  log_every: int = 10
  checkpoint_every: int = 100
  keep_checkpoints: int = 2
  implementation: str | None = None
  deterministic: bool = False

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type is int and field.name != "seed" and value < 1:
        raise ValueError(
          f"training.{field.name} must be at least 1, got {value}."
        )
    if not 0 <= self.dense_fraction <= 1:
      raise ValueError(
        "training.dense_fraction must lie in [0, 1], got"
        f" {self.dense_fraction}."
      )
    if self.seed < 0:
      raise ValueError(f"training.seed must not be negative, got {self.seed}.")
    for name in ("dtype", "param_dtype"):
      if getattr(self, name) not in DTYPES:
        raise ValueError(
          f"training.{name} must be one of {', '.join(DTYPES)}, got"
          f" {getattr(self, name)!r}."
        )
    quantize.check_method(self.quantize)
    if self.remat not in llama.REMAT:
      raise ValueError(
        f"training.remat must be one of {', '.join(llama.REMAT)}, got"
        f" {self.remat!r}."
      )
    for name in ("mlp_chunk", "segment_len"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(
          f"training.{name} must be at least 1 or None, got {value}."
        )
    if self.offload_segments and self.segment_len is None:
      raise ValueError(
        "training.offload_segments=True moves what segments keep: set"
        " training.segment_len."
      )
    if self.batch_size % self.num_micro_batches:
      raise ValueError(
        f"training.batch_size={self.batch_size} is not divisible by"
        f" training.num_micro_batches={self.num_micro_batches}."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
  """Perplexity, during training and at its end.

  Attributes:
    context_lens: Lengths in tokens; None means the pretrained and the target
      length.
    protocol: "longlora", "strided" or "document".
    num_windows: Evenly spaced windows per length; None uses all.
    stride: Tokens between windows; "longlora" always has 256.
    batch_tokens: Tokens per batch of windows.
    every: Steps between evaluations during training; 0 means none.
    windows_on_the_way: Number of windows of those evaluations, at the target
      length.
    tasks: Tasks to score at the end, such as "passkey", at the same lengths;
      see `scca_jax.tasks`.
    num_samples: Samples of each task at each length.
  """

  context_lens: tuple[int, ...] | None = None
  protocol: str = "longlora"
  num_windows: int | None = 64
  stride: int = perplexity.LONGLORA_STRIDE
  batch_tokens: int = 8192
  every: int = 0
  windows_on_the_way: int = 16
  tasks: tuple[str, ...] = ()
  num_samples: int = 50

  def __post_init__(self):
    for name in self.tasks:
      tasks.get(name)
    for name, least in (
      ("num_samples", 1),
      ("batch_tokens", 1),
      ("every", 0),
      ("windows_on_the_way", 1),
    ):
      if getattr(self, name) < least:
        raise ValueError(
          f"evaluation.{name} must be at least {least}, got"
          f" {getattr(self, name)}."
        )
    for context_len in self.context_lens or ():
      perplexity.check_settings(
        self.protocol,
        context_len,
        num_windows=self.num_windows,
        stride=self.stride,
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
  """A run of `scca finetune`.

  Rope scaling, pattern and learning rate are what two studies found best for
  adapters (experiments/results/ablation_tiny, ablation_smollm2).

  Attributes:
    model: Hugging Face folder, .gguf file, or a name on Hugging Face such as
      "HuggingFaceTB/SmolLM2-135M"; None uses the embedded model.
    rope: Rope scaling.
    tuning: What is trained: "lora", an adapter and what else `lora` selects; or
      "full", every parameter.
    lora: The adapter, and what else is trained.
    pattern: Attention pattern of training, such as "s2" or
      "scca_fixed(chunk_size=2048)"; see `scca_jax.patterns.parse`.
    data: Texts.
    optimizer: Optimiser.
    training: Loop.
    mesh: Layout of the run on several devices.
    evaluation: Perplexity.
  """

  model: str | None = None
  rope: RopeConfig = RopeConfig()
  tuning: str = "lora"
  lora: LoraConfig = LoraConfig()
  pattern: str = "s2"
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3)
  training: TrainingConfig = TrainingConfig()
  mesh: MeshConfig = MeshConfig()
  evaluation: EvaluationConfig = EvaluationConfig()

  def __post_init__(self):
    if self.tuning not in TUNINGS:
      raise ValueError(
        f"tuning must be one of {', '.join(TUNINGS)}, got {self.tuning!r}."
      )
    if self.tuning == "full" and self.training.quantize is not None:
      raise ValueError(
        f"training.quantize={self.training.quantize!r} makes weights that"
        " cannot be trained: leave it out, or use tuning='lora'."
      )

  @property
  def adapter(self) -> LoraConfig | None:
    """The adapter to train; None if every parameter is trained."""
    return self.lora if self.tuning == "lora" else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArchitectureConfig:
  """Sizes of a model that is trained from scratch.

  Attributes:
    hidden_size: Width of the residual stream.
    intermediate_size: Width of the MLP.
    num_layers: Number of layers.
    num_heads: Number of query heads.
    num_kv_heads: Number of key and value heads.
    head_dim: Width of a head; None means hidden_size / num_heads.
    rope_theta: Base of the rotary frequencies.
    tie_embeddings: Whether the output head is the embedding.
  """

  hidden_size: int = 256
  intermediate_size: int = 704
  num_layers: int = 5
  num_heads: int = 8
  num_kv_heads: int = 4
  head_dim: int | None = None
  rope_theta: float = 10000.0
  tie_embeddings: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
  """A run of `scca pretrain`.

  Attributes:
    architecture: Sizes of the model.
    save_dtype: Dtype of the weights written at the end.
    pattern: Attention pattern of training, such as "s2" or
      "scca_fixed(chunk_size=2048)"; see `scca_jax.patterns.parse`.
    data: Texts; `data.tokenizer` must be given.
    optimizer: Optimiser.
    training: Loop.
    mesh: Layout of the run on several devices.
    evaluation: Perplexity.
  """

  architecture: ArchitectureConfig = ArchitectureConfig()
  save_dtype: str = "float32"
  pattern: str = "dense"
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  training: TrainingConfig = TrainingConfig()
  mesh: MeshConfig = MeshConfig()
  evaluation: EvaluationConfig = EvaluationConfig()

  def __post_init__(self):
    if self.save_dtype not in DTYPES:
      raise ValueError(
        f"save_dtype must be one of {', '.join(DTYPES)}, got"
        f" {self.save_dtype!r}."
      )


def without_none(kind: Any) -> Any:
  """Returns `T` for `T | None`, and any other annotation unchanged."""
  if isinstance(kind, types.UnionType) or typing.get_origin(kind) is (
    typing.Union
  ):
    return next(a for a in typing.get_args(kind) if a is not type(None))
  return kind


def to_config_dict(settings: Any) -> ml_collections.ConfigDict:
  """Returns the `ConfigDict` of a settings dataclass, for a config file.

  A setting that may be None keeps its type, so that a flag can set it.
  """
  hints = typing.get_type_hints(type(settings))
  result = ml_collections.ConfigDict()
  for field in dataclasses.fields(settings):
    value = getattr(settings, field.name)
    if dataclasses.is_dataclass(value):
      value = to_config_dict(value)
    elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
      value = tuple(map(to_config_dict, value))
    elif (kind := without_none(hints[field.name])) is not hints[field.name]:
      value = config_dict.FieldReference(value, typing.get_origin(kind) or kind)
    result[field.name] = value
  return result


def _checked(value: Any, kind: Any, name: str) -> Any:
  """Returns the value if it has the annotated type."""
  allowed = without_none(kind)
  # The only way for a flag to say None.
  if allowed is not kind and (value is None or value in ("None", "none")):
    return None
  if dataclasses.is_dataclass(allowed):
    return from_config_dict(allowed, value, prefix=f"{name}.")  # pyright: ignore
  if typing.get_origin(allowed) is tuple and isinstance(value, list | tuple):
    item_kind = typing.get_args(allowed)[0]
    return tuple(_checked(item, item_kind, name) for item in value)
  if type(value) in (int, float) and not abs(value) < _LIMIT:
    raise ValueError(
      f"setting {name} must be a number below 2^31, got {reprlib.repr(value)}."
    )
  if allowed is float and type(value) is int:
    return float(value)
  if isinstance(allowed, type) and type(value) is allowed:
    return value
  kind_name = getattr(allowed, "__name__", str(allowed))
  if typing.get_origin(allowed) is tuple:
    kind_name = str(allowed)
  raise ValueError(
    f"setting {name} must be of type {kind_name}, got"
    f" {reprlib.repr(value)} ({type(value).__name__})."
  )


def from_config_dict(
  kind: type[Settings], settings: Any, *, prefix: str = ""
) -> Settings:
  """Returns the settings dataclass of a `ConfigDict` or plain dict.

  Args:
    kind: The dataclass.
    settings: Its settings, nested; missing ones get their defaults.
    prefix: Prefix of names in messages.

  Raises:
    ValueError: A setting is unknown, ill-typed or out of range.
  """
  if not isinstance(settings, dict | ml_collections.ConfigDict):
    raise ValueError(
      f"setting {prefix.rstrip('.')} must be a group of settings, got"
      f" {settings!r}."
    )
  hints = typing.get_type_hints(kind)
  names = [f.name for f in dataclasses.fields(kind)]  # pyright: ignore
  for name in settings:
    if name not in names:
      near = difflib.get_close_matches(str(name), names, n=1)
      hint = (
        f"did you mean {prefix}{near[0]}"
        if near
        else "known are " + (", ".join(prefix + n for n in names))
      )
      raise ValueError(f"unknown setting {prefix}{name}: {hint}?")
  return kind(
    **{
      name: _checked(settings[name], hints[name], prefix + name)
      for name in settings
    }
  )


def to_json(settings: Any) -> dict[str, Any]:
  """Returns the settings as JSON types, to save with a result."""
  return dataclasses.asdict(settings)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns settings from `to_json` by dotted name."""
  found = {}
  for name, value in settings.items():
    if isinstance(value, dict):
      found |= flat(value, f"{prefix}{name}.")
    else:
      found[prefix + name] = value
  return found
