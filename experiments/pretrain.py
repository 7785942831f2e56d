"""Trains a LLaMA from its initialisation, all parameters.

It writes the model in Hugging Face layout, with its tokenizer, and prints its
perplexity. The embedded model was made so (scca_jax/assets/README.md):

    python -m experiments.pretrain --config=configs/tiny_pretrain.py \
      --data=train.bin --output_dir=runs/pretrain
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from experiments.shared import cli, cluster, loop, resolve
from experiments.shared.config import PretrainConfig, from_config_dict, to_json
from scca_jax import atomic_file, convert, dispatch, lora, sharding, tokenizer
from scca_jax.batches import make_batches
from scca_jax.llama import Llama
from scca_jax.llama_config import LlamaConfig

_CONFIGS = pathlib.Path(__file__).parent.parent / "configs"

_CONFIG = cli.define_config(_CONFIGS / "tiny_pretrain.py")
flags.declare_key_flag("config")
_DATA = flags.DEFINE_string(
  "data",
  None,
  "Token file or text to train on; overrides config.data.train.",
)
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir",
  "runs/pretrain",
  "Where the run is kept, and goes on from if it was interrupted.",
)


def _read_settings() -> PretrainConfig:
  run = from_config_dict(PretrainConfig, cli.read_config(_CONFIG))
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
      "no tokenizer: give --config.data.tokenizer=FILE; `python -m"
      " experiments.prepare_data --train_tokenizer` makes one."
    )
  return run


def main() -> None:
  """Runs the command."""
  cluster.start()
  run = _read_settings()
  train, sizes = run.training, run.architecture
  if train.quantize is not None:
    raise ValueError(
      f"training.quantize={train.quantize!r} holds weights that cannot be"
      " trained, and pretraining trains all: leave it out."
    )
  dispatch.check_implementation(train.implementation)
  words = tokenizer.load(run.data.tokenizer or "")
  model_config = LlamaConfig(
    vocab_size=words.vocab_size,
    hidden_size=sizes.hidden_size,
    intermediate_size=sizes.intermediate_size,
    num_layers=sizes.num_layers,
    num_heads=sizes.num_heads,
    num_kv_heads=sizes.num_kv_heads,
    head_dim=sizes.head_dim or sizes.hidden_size // sizes.num_heads,
    context_len=train.seq_len,
    rope_theta=sizes.rope_theta,
    tie_embeddings=sizes.tie_embeddings,
    bos_token_id=words.bos_id,
    eos_token_id=words.eos_id,
  )
  schedule = resolve.make_patterns(run.pattern, model_config, train.seq_len)
  mesh = resolve.make_mesh(run.mesh, train, model_config, schedule)
  output_dir = loop.open_output_dir(_OUTPUT_DIR.value, to_json(run))
  cache = output_dir / "tokens"
  train_tokens = resolve.open_tokens(run.data.train or "", words, cache)
  test_tokens = None
  if run.data.test is not None:
    test_tokens = resolve.open_tokens(run.data.test, words, cache)
  shard_index, num_shards = sharding.data_shard(mesh, train.batch_size)
  batches = make_batches(
    train_tokens,
    seq_len=train.seq_len,
    batch_size=train.batch_size,
    seed=train.seed,
    packing=run.data.packing,
    shard_index=shard_index,
    num_shards=num_shards,
  )
  model = loop.load(
    lambda: Llama(
      model_config,
      dtype=jnp.dtype(train.dtype),
      param_dtype=jnp.dtype(train.param_dtype),
      rngs=nnx.Rngs(train.seed),
    ),
    mesh,
  )
  num_params = sum(
    leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))
  )

  context_lens = run.evaluation.context_lens or (train.seq_len,)
  if test_tokens is not None:
    resolve.check_evaluation(
      test_tokens, context_lens, run.evaluation, model_config, words.bos_id
    )

  def measure(
    model: Any, lengths: tuple[int, ...], num_windows: int | None
  ) -> dict[str, float]:
    if test_tokens is None:
      return {}
    results = resolve.perplexities(
      model,
      test_tokens,
      lengths,
      run.evaluation,
      num_windows=num_windows,
      bos_id=words.bos_id,
      implementation=train.implementation,
      mesh=mesh,
    )
    return {str(n): result.perplexity for n, result in results.items()}

  print(
    f"{num_params:,} parameters, {len(train_tokens):,} tokens to train"
    f" on, {train.steps * train.batch_size * train.seq_len:,} in all steps;"
    f" {output_dir}",
    flush=True,
  )
  result = loop.fit(
    model,
    trainable=lora.trainable(None),
    batches=batches,
    step_config=resolve.step_config(train, schedule, mesh),
    optimizer_config=run.optimizer,
    config=train,
    output_dir=output_dir,
    settings=to_json(run),
    mesh=mesh,
    evaluate=None
    if test_tokens is None
    else lambda model: measure(
      model, (train.seq_len,), run.evaluation.windows_on_the_way
    ),
    evaluate_every=run.evaluation.every,
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
  summary = {
    "pattern": run.pattern.name,
    "context_len": train.seq_len,
    "num_params": num_params,
    "steps": train.steps,
    "final_loss": result.final_loss,
    "tokens_per_second": result.tokens_per_second,
  }
  if test_tokens is not None:
    summary["perplexity"] = {
      "protocol": run.evaluation.protocol,
      **measure(result.model, context_lens, run.evaluation.num_windows),
    }
    for length in context_lens:
      print(
        f"perplexity at {length:,} ({run.evaluation.protocol}):"
        f" {summary['perplexity'][str(length)]:.2f}"
      )
  if not cluster.is_primary():
    return
  atomic_file.write_json(output_dir / "summary.json", summary)
  print(f"model: {folder}\nsummary: {output_dir / 'summary.json'}")


if __name__ == "__main__":
  cli.run(main)
