"""Turns the settings of a run into what training takes: tokens, patterns."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable
from typing import Any

from absl import logging
from jax.sharding import Mesh

from experiments.shared import cluster
from experiments.shared.config import (
  EvaluationConfig,
  FinetuneConfig,
  PatternConfig,
  TrainingConfig,
)
from scca_jax import assets, patterns, perplexity, sharding
from scca_jax.documents import read_documents
from scca_jax.llama_config import LlamaConfig
from scca_jax.rope import RopeScaling
from scca_jax.token_file import TokenFile, write_token_file
from scca_jax.tokenizer import Tokenizer
from scca_jax.training import StepConfig

# Read at once when a file is hashed, in bytes.
_BLOCK = 1 << 20


def open_tokens(
  path: str | pathlib.Path, tokenizer: Tokenizer, cache: pathlib.Path
) -> TokenFile:
  """Returns the tokens of a token file or of text.

  Args:
    path: A `.bin`, or text: .txt, .jsonl, .jsonl.gz/.xz/.zst or a folder.
    tokenizer: Used for text; and its vocabulary bounds the ids of a `.bin`.
    cache: Folder in which the token file of a text is kept. Its name has a
      hash of text and tokenizer, so it is made anew when either changes.

  Raises:
    FileNotFoundError: The path is not there.
    ValueError: It holds no usable tokens or text.
  """
  path = pathlib.Path(path)
  if path.suffix == ".bin":
    return TokenFile.open(path, vocab_size=tokenizer.vocab_size)
  if not path.exists():
    raise FileNotFoundError(f"{path} is not there: name a file or folder.")
  digest = hashlib.sha256(tokenizer.fingerprint.encode())
  files = sorted(path.rglob("*")) if path.is_dir() else [path]
  for file in files:
    if file.is_file():
      with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
          digest.update(block)
  name = path.name.split(".")[0]
  target = cache / f"{name}-{digest.hexdigest()[:16]}.bin"
  with cluster.primary_first(str(target)):
    if not target.exists():
      print(f"Tokenising {path.name}.", flush=True)
      target.parent.mkdir(parents=True, exist_ok=True)
      write_token_file(read_documents(path), tokenizer, target)
  return TokenFile.open(target, vocab_size=tokenizer.vocab_size)


def make_patterns(
  config: PatternConfig, model: LlamaConfig, seq_len: int
) -> tuple[patterns.AttentionPattern, ...]:
  """Returns the pattern of each layer for training at `seq_len` tokens.

  Raises:
    ValueError: The pattern is unknown, or a setting does not fit it.
  """
  settings = {
    name: getattr(config, name)
    for name in (
      "chunk_size",
      "shift",
      "num_chunks",
      "rotate",
      "window",
      "dilation",
      "boundary",
      "causality",
    )
    if getattr(config, name) is not None
  }
  if config.rotate_by_layer:
    settings["rotate"] = "layer"
  schedule = patterns.make_schedule(
    config.name,
    num_heads=model.num_heads,
    num_layers=model.num_layers,
    seq_len=seq_len,
    **settings,
  )
  if config.interleaved:
    schedule = tuple(p.interleaved(model.num_kv_heads) for p in schedule)
  return schedule


def check_mesh(
  config: sharding.MeshConfig,
  train: TrainingConfig,
  model: LlamaConfig,
  schedule: tuple[patterns.AttentionPattern, ...],
) -> None:
  """Checks that a run can be cut as a mesh says.

  Raises:
    ValueError: It cannot; the message says what can.
  """
  sharding.check(
    config,
    num_kv_heads=model.num_kv_heads,
    batch_size=train.batch_size,
    num_micro_batches=train.num_micro_batches,
    seq_len=train.seq_len,
    chunk_sizes={h.chunk_size for pattern in schedule for h in pattern.heads},
  )


def make_mesh(
  config: sharding.MeshConfig,
  train: TrainingConfig,
  model: LlamaConfig,
  schedule: tuple[patterns.AttentionPattern, ...],
) -> Mesh | None:
  """Returns the devices of a run, or None for one device.

  Raises:
    ValueError: The run cannot be cut in that way, or there are not so many
      devices.
  """
  check_mesh(config, train, model, schedule)
  return sharding.make_mesh(config)


def step_config(
  train: TrainingConfig,
  schedule: tuple[patterns.AttentionPattern, ...],
  mesh: Mesh | None = None,
) -> StepConfig:
  """Returns what a training step does.

  Args:
    train: The settings of the loop.
    schedule: The pattern of each layer.
    mesh: Devices of the run.
  """
  return StepConfig(
    patterns=schedule,
    num_micro_batches=train.num_micro_batches,
    loss_chunk=train.loss_chunk,
    remat=train.remat,
    mlp_chunk=train.mlp_chunk,
    seed=train.seed,
    implementation=train.implementation,
    dtype=train.dtype,
    mesh=mesh,
    offload_optimizer=train.offload_optimizer,
  )


def model_path(name: str | None) -> pathlib.Path:
  """Returns where a model is: a path, a known shape, or the embedded one."""
  if name is None:
    return assets.MODEL
  path = pathlib.Path(name)
  return path if path.exists() else assets.SHAPES.get(name, path)


def extended(config: LlamaConfig, run: FinetuneConfig) -> LlamaConfig:
  """Returns the model's configuration for the target length.

  Raises:
    ValueError: The rope scaling is unknown or would be applied twice.
  """
  target_len = run.training.seq_len
  if run.rope.kind is None:
    if target_len > config.context_len:
      logging.warning(
        "The target length %d exceeds the pretrained length %d and no rope"
        " scaling is set: set config.rope.kind=linear unless this is meant.",
        target_len,
        config.context_len,
      )
    return config
  if config.rope_scaling is not None:
    raise ValueError(
      f"the model has {config.rope_scaling.kind} rope scaling already: set"
      " config.rope.kind=None to keep it."
    )
  factor = run.rope.factor
  if factor is None:
    factor = max(1.0, target_len / config.context_len)
  return dataclasses.replace(
    config,
    context_len=max(target_len, config.context_len),
    rope_scaling=RopeScaling(
      kind=run.rope.kind,
      factor=factor,
      original_max_position_embeddings=config.context_len,
    ),
  )


def check_evaluation(
  tokens: TokenFile,
  context_lens: Iterable[int],
  config: EvaluationConfig,
  model: LlamaConfig,
  bos_id: int | None,
) -> None:
  """Checks what evaluation after a run will need, before the run.

  Raises:
    ValueError: A setting is out of range, or the corpus is too short.
  """
  for length in context_lens:
    perplexity.count_windows(
      tokens,
      vocab_size=model.vocab_size,
      context_len=length,
      protocol=config.protocol,
      num_windows=config.num_windows,
      stride=config.stride,
      bos_id=bos_id,
    )


def perplexities(
  model: Any,
  tokens: TokenFile,
  context_lens: Iterable[int],
  config: EvaluationConfig,
  *,
  num_windows: int | None,
  bos_id: int | None,
  implementation: str | None,
  mesh: Mesh | None = None,
) -> dict[int, perplexity.Perplexity]:
  """Returns the perplexity at each length, with dense attention."""
  return {
    length: perplexity.perplexity(
      model,
      tokens,
      context_len=length,
      protocol=config.protocol,
      num_windows=num_windows,
      stride=config.stride,
      batch_size=max(1, config.batch_tokens // length),
      bos_id=bos_id,
      implementation=implementation,
      mesh=mesh,
    )
    for length in context_lens
  }
