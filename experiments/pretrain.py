"""Trains all parameters of a LLaMA from scratch.

It writes the model in Hugging Face layout, with its tokenizer, and prints its
perplexity. The embedded model was made this way (scca_jax/assets/README.md):

    scca pretrain --config=configs/tiny_pretrain.py \
      --data=train.bin --output_dir=runs/pretrain
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from experiments.shared import cli, cluster, dry_run, loop, report, resolve
from experiments.shared import flags as shared_flags
from experiments.shared.config import PretrainConfig, to_json
from experiments.shared.config_flag import ConfigFlag
from scca_jax import atomic_file, convert, dispatch, lora, memory, tokenizer
from scca_jax.llama import Llama
from scca_jax.llama_config import LlamaConfig

_CONFIG = ConfigFlag(PretrainConfig, "tiny_pretrain")
_DATA = shared_flags.define_training_data()
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir",
  "runs/pretrain",
  "Folder of the run; an interrupted run resumes from it.",
)
_WANDB = shared_flags.define_wandb()
flags.adopt_module_key_flags(cluster)
_DRY_RUN = shared_flags.define_dry_run()


def _read_settings() -> PretrainConfig:
  run = _CONFIG.read()
  if _DATA.value is not None:
    run = dataclasses.replace(
      run, data=dataclasses.replace(run.data, train=_DATA.value)
    )
  if run.data.train is None:
    raise ValueError(
      "no text to train on: give --data=FILE, a token file or text."
    )
  if run.data.tokenizer is None:
    raise ValueError(
      "no tokenizer: give --config.data.tokenizer=FILE; `scca"
      " prepare_data --train_tokenizer` makes one."
    )
  if run.training.quantize is not None:
    raise ValueError(
      f"training.quantize={run.training.quantize!r} makes weights that cannot"
      " be trained, but pretraining trains them all: leave it out."
    )
  return run


def _model_config(
  run: PretrainConfig, vocabulary: tokenizer.Tokenizer
) -> LlamaConfig:
  sizes = run.architecture
  return LlamaConfig(
    vocab_size=vocabulary.vocab_size,
    hidden_size=sizes.hidden_size,
    intermediate_size=sizes.intermediate_size,
    num_layers=sizes.num_layers,
    num_heads=sizes.num_heads,
    num_kv_heads=sizes.num_kv_heads,
    head_dim=sizes.head_dim or sizes.hidden_size // sizes.num_heads,
    context_len=run.training.seq_len,
    rope_theta=sizes.rope_theta,
    tie_embeddings=sizes.tie_embeddings,
    bos_token_id=vocabulary.bos_id,
    eos_token_id=vocabulary.eos_id,
  )


def _check_memory(num_params: int) -> None:
  """Refuses more parameters than fit into a CPU's memory."""
  needed = num_params * 4 * 4  # Weights, gradients and two moments in float32.
  there = memory.of_this_machine()
  if jax.default_backend() == "cpu" and needed > there:
    raise ValueError(
      f"{num_params:,} parameters take at least {needed >> 30:,} GiB in"
      f" training, but this machine has {there >> 30}: use a smaller"
      " architecture."
    )


def main() -> None:
  """Runs the command."""
  with cluster.joined():
    _run()


def _run() -> None:
  shared_flags.check_wandb(_WANDB)
  run = _read_settings()
  dispatch.check_implementation(run.training.implementation)
  vocabulary = tokenizer.load(run.data.tokenizer or "")
  config = _model_config(run, vocabulary)
  resolved = resolve.lay_out(run, config, config)
  if _DRY_RUN.value:
    dry_run.show(run, resolved, run.data.train or "", None)
    return
  with loop.output_dir(_OUTPUT_DIR.value, to_json(run)) as output_dir:
    _pretrain(run, resolved, vocabulary, output_dir)


def _pretrain(
  run: PretrainConfig,
  resolved: resolve.Resolved,
  vocabulary: tokenizer.Tokenizer,
  output_dir: pathlib.Path,
) -> None:
  """Trains and measures, all in the folder of the run."""
  train, config = run.training, resolved.base
  cache = output_dir / "tokens"
  tokens = resolve.open_tokens(run.data.train or "", vocabulary, cache)
  tokens, _ = resolve.hold_out(tokens, run.data.held_out)
  batches = resolve.make_batches(run, tokens, resolved.mesh)
  evaluator = None
  if run.data.test is not None:
    evaluator = resolve.Evaluator(
      run,
      resolve.open_tokens(run.data.test, vocabulary, cache),
      config,
      resolved.mesh,
      bos_id=vocabulary.bos_id,
      context_lens=(train.seq_len,),
    )

  def make() -> Llama:
    return Llama(
      config,
      dtype=jnp.dtype(train.dtype),
      param_dtype=jnp.dtype(train.param_dtype),
      rngs=nnx.Rngs(train.seed),
    )

  shapes = nnx.state(nnx.eval_shape(make), nnx.Param)
  num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  _check_memory(num_params)
  print(
    f"{num_params:,} parameters, {len(tokens):,} tokens to train"
    f" on, {train.steps * train.batch_size * train.seq_len:,} in all steps;"
    f" {output_dir}",
    flush=True,
  )
  result = loop.fit(
    loop.load(make, resolved.mesh),
    run=run,
    step=resolved.step,
    trainable=lora.trainable(None),
    batches=batches,
    output_dir=output_dir,
    evaluate=evaluator.on_the_way if evaluator else None,
    wandb_project=_WANDB.value,
  )
  folder = output_dir / "model"
  trained = loop.to_host(result.model, lora.trainable(None))
  if cluster.is_primary():
    convert.save_model(
      trained,
      folder,
      dtype=jnp.dtype(run.save_dtype),
      tokenizer_file=run.data.tokenizer,
    )
  summary: dict[str, Any] = {
    "pattern": run.pattern,
    "context_len": train.seq_len,
    "num_params": num_params,
    "steps": train.steps,
    "final_loss": result.final_loss,
    "tokens_per_second": result.tokens_per_second,
    "peak_bytes": memory.measured_bytes(jax.local_devices()),
  }
  rows = {}
  if evaluator is not None:
    protocol, found = run.evaluation.protocol, evaluator.at_end(result.model)
    rows["pretrained"] = found
    summary["perplexity"] = {"protocol": protocol} | {
      str(n): measured.perplexity for n, measured in found.items()
    }
    for length, measured in found.items():
      print(f"perplexity at {length:,} ({protocol}): {measured.perplexity:.2f}")
  if not cluster.is_primary():
    return
  atomic_file.write_json(output_dir / "summary.json", summary)
  title = f"A model of {num_params:,} parameters, {train.seq_len:,} tokens"
  path = report.write(output_dir, title, run, rows, summary)
  print(f"model: {folder}\nsummary: {output_dir / 'summary.json'}")
  print(f"report: {path}")


if __name__ == "__main__":
  cli.run(main, config=_CONFIG)
