"""Turns the settings of a run into arguments of training and evaluation.

Three parts: the model with its patterns and devices (`resolve`), the texts
(`open_tokens`), and perplexity (`Evaluator`). Commands that have flags instead
of settings use the functions that `resolve` consists of.
"""

import dataclasses
import hashlib
import pathlib
from typing import Any

import jax.numpy as jnp
from absl import logging
from flax import nnx
from jax.sharding import Mesh

from experiments.shared import cluster, task_scores
from experiments.shared import flags as shared_flags
from experiments.shared.config import FinetuneConfig, PretrainConfig
from scca_jax import (
  adapters,
  assets,
  batches,
  convert,
  hub,
  patterns,
  perplexity,
  quantize,
  segments,
  sharding,
  training,
)
from scca_jax.documents import read_parts
from scca_jax.llama import Execution, Llama
from scca_jax.llama_config import LlamaConfig
from scca_jax.lora import LoraConfig
from scca_jax.patterns import AttentionPattern, Mixture
from scca_jax.perplexity import Perplexity
from scca_jax.rope import RopeScaling
from scca_jax.token_file import TokenFile, check_ids, write_token_file
from scca_jax.tokenizer import Tokenizer
from scca_jax.training import StepConfig

Layers = tuple[AttentionPattern | Mixture, ...]

# A rank that even models with fewer channels may have, as it does no harm.
_RANK_OF_SMALL = 256
# Bytes read at once when a file is hashed.
_BLOCK = 1 << 20


# The model, its patterns and devices.


def model_path(name: str | None) -> pathlib.Path:
  """Returns the path of a model, downloaded if necessary.

  Args:
    name: A path, a name on Hugging Face, or a known shape; None means the
      embedded model.

  Raises:
    ValueError: See `hub.find`.
  """
  if name is None:
    return assets.MODEL
  path = pathlib.Path(name)
  if path.exists() or name not in assets.SHAPES:
    return hub.find(name)
  return assets.SHAPES[name]


def base_name(name: str | None) -> str:
  """Returns how an adapter names its base: a path, or a name on Hugging Face.

  Args:
    name: See `model_path`.
  """
  return name if name and hub.is_name(name) else str(model_path(name))


def load_model(
  source: pathlib.Path, adapter: str | None, *, config: Any = None, **dtypes
) -> Llama:
  """Returns a model, with its adapter if there is one.

  Args:
    source: Hugging Face folder or GGUF file.
    adapter: Folder of the adapter, which brings its own rope scaling.
    config: Replaces the model's; None keeps its own.
    **dtypes: `dtype` and `param_dtype`.
  """
  if adapter is not None:
    model = adapters.load_adapter(source, adapter, config=config, **dtypes)
    if model.config.rope_scaling is None and not adapters.has_settings(adapter):
      logging.warning(
        "The adapter %s does not record which rope scaling it was tuned with,"
        " and none is set: if it had one, the model is much worse without it.",
        adapter,
      )
    return model
  return convert.load_model(source, config=config, **dtypes)


def extended(
  config: LlamaConfig, kind: str | None, factor: float | None, target_len: int
) -> LlamaConfig:
  """Returns the model's configuration for a longer context.

  Args:
    config: The model as it was pretrained.
    kind: Kind of rope scaling; None leaves the model unchanged.
    factor: Its factor; None means target length / pretrained length.
    target_len: Longest sequence, in tokens.

  Raises:
    ValueError: The rope scaling is unknown or would be applied twice.
  """
  if kind is None:
    return config
  if config.rope_scaling is not None:
    raise ValueError(
      f"the model already has {config.rope_scaling.kind} rope scaling: to keep"
      " it, set none (config.rope.kind=none, or no --rope_scaling)."
    )
  return dataclasses.replace(
    config,
    context_len=max(target_len, config.context_len),
    rope_scaling=RopeScaling(
      kind=kind,
      factor=max(1.0, target_len / config.context_len)
      if factor is None
      else factor,
      original_max_position_embeddings=config.context_len,
    ),
  )


def with_factor(
  source: pathlib.Path, kind: str | None, factor: float | None
) -> LlamaConfig | None:
  """Returns a model's configuration with a rope scaling; None without `kind`.

  Args:
    source: Hugging Face folder or GGUF file.
    kind: Kind of rope scaling, or None.
    factor: Its factor; the context grows by the same factor.

  Raises:
    ValueError: The factor is missing; or see `extended`.
  """
  if kind is None:
    return None
  if factor is None or not 1 <= factor < 1e6:
    raise ValueError(
      f"--rope_scaling={kind} needs --rope_factor of at least 1, got {factor}."
    )
  config = convert.load_config(source)
  return extended(config, kind, factor, int(factor * config.context_len))


def make_patterns(text: str, model: LlamaConfig, seq_len: int) -> Layers:
  """Returns the pattern of each layer of a model at `seq_len` tokens.

  Raises:
    ValueError: The string is not a pattern, or does not fit the model.
  """
  return patterns.parse(
    text,
    num_heads=model.num_heads,
    num_kv_heads=model.num_kv_heads,
    num_layers=model.num_layers,
    seq_len=seq_len,
  )


def trained_or_made(
  text: str | None, adapter: str | None, model: LlamaConfig, seq_len: int
) -> Layers | None:
  """Returns the pattern of each layer that a flag asks for; None is dense.

  Args:
    text: A pattern, or `flags.TRAINING` for the adapter's pattern.
    adapter: Folder of the adapter.
    model: Sizes of the model.
    seq_len: Length in tokens, which determines omitted sizes.

  Raises:
    ValueError: The adapter does not record its pattern; or see `make_patterns`.
  """
  if text is None:
    return None
  if text != shared_flags.TRAINING or adapter is None:
    return make_patterns(text, model, seq_len)
  layers = adapters.load_patterns(adapter)
  if layers is None:
    raise ValueError(
      f"the adapter {adapter} does not record which pattern it was tuned with:"
      f" name a pattern instead of {shared_flags.TRAINING}."
    )
  return layers


def shapes(
  run: FinetuneConfig | PretrainConfig,
  config: LlamaConfig,
  adapter: LoraConfig | None,
) -> Llama:
  """Returns the model of a run with shapes instead of arrays.

  Args:
    run: Its settings.
    config: Sizes of the model.
    adapter: The adapter that is trained, or None.
  """
  train = run.training
  return nnx.eval_shape(
    lambda: quantize.quantize_model(
      Llama(
        config,
        lora=adapter,
        dtype=jnp.dtype(train.dtype),
        param_dtype=jnp.dtype(train.param_dtype),
        rngs=nnx.Rngs(0),
      ),
      train.quantize,
    )
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolved:
  """What the settings of a run mean for its model.

  Attributes:
    base: Sizes of the model before training.
    target: The same at the length of training.
    mesh: Devices of the run; None means one.
    step: Settings of a training step.
  """

  base: LlamaConfig
  target: LlamaConfig
  mesh: Mesh | None
  step: StepConfig

  @property
  def patterns(self) -> Layers:
    """The pattern of each layer."""
    layers: Any = self.step.patterns
    return layers


def lay_out(
  run: FinetuneConfig | PretrainConfig,
  base: LlamaConfig,
  target: LlamaConfig,
  *,
  find_devices: bool = True,
) -> Resolved:
  """Returns what the settings of a run mean for a model.

  Args:
    run: The settings.
    base: Sizes of the model before training.
    target: The same at the length of training.
    find_devices: Whether to look for the devices of the mesh; otherwise this
      only checks that the run can be divided that way, and `mesh` is None.

  Raises:
    ValueError: A pattern does not fit the model, the mesh cannot divide the
      run, or there are too few devices.
  """
  train = run.training
  layers = make_patterns(run.pattern, base, train.seq_len)
  step = StepConfig(
    patterns=layers,
    execution=Execution(
      implementation=train.implementation,
      remat=train.remat,
      mlp_chunk=train.mlp_chunk,
      deterministic=train.deterministic,
      segment_len=train.segment_len,
      offload_segments=train.offload_segments,
      unroll=train.unroll_layers,
    ),
    num_micro_batches=train.num_micro_batches,
    loss_chunk=train.loss_chunk,
    seed=train.seed,
    offload_optimizer=train.offload_optimizer,
  )
  training.check_mesh(
    run.mesh, step, base, batch_size=train.batch_size, seq_len=train.seq_len
  )
  dense = None if train.dense_fraction else layers
  for of_steps in dict.fromkeys((layers, dense)):
    segments.check(
      of_steps,
      base,
      segment_len=train.segment_len,
      seq_len=train.seq_len,
      packed=run.data.packing == "packed",
      num_devices=run.mesh.num_devices,
    )
  mesh = sharding.make_mesh(run.mesh) if find_devices else None
  step = dataclasses.replace(
    step, execution=dataclasses.replace(step.execution, mesh=mesh)
  )
  return Resolved(base=base, target=target, mesh=mesh, step=step)


def resolve(run: FinetuneConfig, *, find_devices: bool = True) -> Resolved:
  """Resolves the settings of a run of `finetune` without reading weights.

  Raises:
    OSError: The model has no configuration.
    ValueError: The rope scaling is unknown or would be applied twice; or see
      `lay_out`.
  """
  base = convert.load_config(model_path(run.model))
  target_len = max(run.training.seq_len, run.data.skip_to or 0)
  if run.rope.kind is None and target_len > base.context_len:
    logging.warning(
      "The target length %d exceeds the pretrained length %d and no rope"
      " scaling is set: set config.rope.kind=yarn unless this is meant.",
      target_len,
      base.context_len,
    )
  widest = max(max(base.projection_shape(name)) for name in run.lora.targets)
  widest = max(widest, _RANK_OF_SMALL)
  if run.adapter and run.lora.rank > widest:
    raise ValueError(
      f"lora.rank must be at most {widest:,} for matrices of these sizes, got"
      f" {run.lora.rank:,}."
    )
  target = extended(base, run.rope.kind, run.rope.factor, target_len)
  return lay_out(run, base, target, find_devices=find_devices)


# The texts.


def open_tokens(
  path: str | pathlib.Path,
  tokenizer: Tokenizer,
  cache: pathlib.Path,
  *,
  vocab_size: int | None = None,
) -> TokenFile:
  """Returns the tokens of a token file or a text.

  Args:
    path: A `.bin`, or text: .txt, .jsonl, .jsonl.gz/.xz/.zst or a folder.
    tokenizer: Used for text.
    cache: Folder in which the token file of a text is kept. Its name contains a
      hash of text and tokenizer, so a change of either makes a new file.
    vocab_size: Vocabulary size of the model, whose embedding bounds the ids;
      None uses the tokenizer's.

  Raises:
    FileNotFoundError: The path does not exist.
    ValueError: It contains no usable tokens or text.
  """
  path = pathlib.Path(path)
  vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
  if path.suffix == ".bin":
    tokens = TokenFile.open(path, vocab_size=vocab_size)
    made_with = tokens.about.get("tokenizer")
    made_with = made_with if isinstance(made_with, dict) else {}
    if made_with.get("sha256", tokenizer.fingerprint) != tokenizer.fingerprint:
      logging.warning(
        "%s was made with the tokenizer %s, not %s of this run: unless both"
        " give the same ids, prepare it again.",
        path,
        made_with.get("name"),
        tokenizer.name,
      )
    return tokens
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist: name a file or folder.")
  digest = hashlib.sha256(tokenizer.fingerprint.encode())
  files = sorted(path.rglob("*")) if path.is_dir() else [path]
  for file in files:
    if file.is_file():
      with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
          digest.update(block)
  name = path.name.split(".")[0]
  target = cache / f"{name}-{digest.hexdigest()[:16]}.bin"
  with cluster.primary_first():
    if not target.exists():
      print(f"Tokenising {path.name}.", flush=True)
      target.parent.mkdir(parents=True, exist_ok=True)
      write_token_file(read_parts(path), tokenizer, target)
  # Messages should name the user's file, not the one in the cache.
  tokens = dataclasses.replace(TokenFile.open(target), name=str(path))
  check_ids(tokens.tokens, vocab_size, tokens.name)
  return tokens


def hold_out(
  tokens: TokenFile, num_documents: int
) -> tuple[TokenFile, TokenFile | None]:
  """Returns the text to train on, and its held-out documents, if any.

  Raises:
    ValueError: See `TokenFile.split`.
  """
  return tokens.split(num_documents) if num_documents else (tokens, None)


def make_batches(
  run: FinetuneConfig | PretrainConfig, tokens: TokenFile, mesh: Mesh | None
) -> Any:
  """Returns the batches of a run, or this process's share of them.

  Raises:
    ValueError: The text is shorter than a sequence, or than a batch.
  """
  train = run.training
  shard_index, num_shards = sharding.data_shard(mesh, train.batch_size)
  found = batches.make_batches(
    tokens,
    seq_len=train.seq_len,
    batch_size=train.batch_size,
    seed=train.seed,
    packing=run.data.packing,
    skip_to=run.data.skip_to,
    shard_index=shard_index,
    num_shards=num_shards,
  )
  if train.batch_size > found.windows_per_epoch:
    raise ValueError(
      f"training.batch_size={train.batch_size:,} is more than the"
      f" {found.windows_per_epoch:,} windows of {train.seq_len:,} tokens in"
      f" {tokens.name}: use a smaller batch or more text."
    )
  return found


# Perplexity.


class Evaluator:
  """Measures the perplexity of a run's models, with dense attention."""

  def __init__(
    self,
    run: FinetuneConfig | PretrainConfig,
    tokens: TokenFile,
    model: LlamaConfig,
    mesh: Mesh | None,
    *,
    bos_id: int | None,
    context_lens: tuple[int, ...],
  ):
    """Checks before the run whether its evaluation will work.

    Args:
      run: Its settings.
      tokens: Text to measure perplexity on.
      model: Sizes of the model.
      mesh: Devices of the run.
      bos_id: Token that starts a document, or None.
      context_lens: Lengths in tokens, unless the settings give others.

    Raises:
      ValueError: A setting is out of range, or the text is too short.
    """
    self._run, self._tokens = run, tokens
    self._execution = Execution(
      implementation=run.training.implementation, mesh=mesh
    )
    self._bos_id = bos_id
    self.context_lens = run.evaluation.context_lens or context_lens
    for length in self.context_lens:
      perplexity.count_windows(
        tokens,
        vocab_size=model.vocab_size,
        context_len=length,
        protocol=run.evaluation.protocol,
        num_windows=run.evaluation.num_windows,
        stride=run.evaluation.stride,
        bos_id=bos_id,
      )

  def _measure(
    self,
    model: Llama,
    context_len: int,
    num_windows: int | None,
    *,
    keep_losses: bool = False,
  ) -> Perplexity:
    config = self._run.evaluation
    return perplexity.perplexity(
      model,
      self._tokens,
      context_len=context_len,
      protocol=config.protocol,
      num_windows=num_windows,
      stride=config.stride,
      batch_size=max(1, config.batch_tokens // context_len),
      bos_id=self._bos_id,
      execution=self._execution,
      keep_losses=keep_losses,
    )

  def at_end(self, model: Llama) -> dict[int, Perplexity]:
    """Returns the perplexity at each length, and losses at the longest."""
    num_windows = self._run.evaluation.num_windows
    return {
      n: self._measure(
        model, n, num_windows, keep_losses=n == max(self.context_lens)
      )
      for n in self.context_lens
    }

  def score(
    self, model: Llama, vocabulary: Tokenizer, plan: task_scores.Plan
  ) -> task_scores.Scores:
    """Returns the model's scores on tasks, with dense attention."""
    return task_scores.measure(
      model,
      vocabulary,
      plan,
      patterns=dict.fromkeys(plan.context_lens),
      batch_size=lambda n: max(1, self._run.evaluation.batch_tokens // n),
      execution=self._execution,
    )

  def on_the_way(self, model: Llama) -> dict[str, float]:
    """Returns a quick measurement at the training length, for the log."""
    length = self._run.training.seq_len
    num_windows = self._run.evaluation.windows_on_the_way
    return {str(length): self._measure(model, length, num_windows).perplexity}
