"""Extends the context of a LLaMA: LoRA, rope scaling, a sparse pattern.

With no flag it takes the embedded model from 256 to 1,024 tokens on the
embedded books, on a CPU, in minutes. It ends with the perplexity of the model
untuned, with rope scaling alone, and tuned, all with dense attention.

    python -m experiments.finetune --config=configs/tiny.py --output_dir=runs/a
"""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from experiments.shared import cli, cluster, loop, resolve
from experiments.shared.config import FinetuneConfig, from_config_dict, to_json
from scca_jax import (
  adapters,
  assets,
  atomic_file,
  convert,
  dispatch,
  lora,
  memory,
  perplexity,
  sharding,
  tokenizer,
)
from scca_jax.batches import make_batches
from scca_jax.llama_config import LlamaConfig

_CONFIGS = pathlib.Path(__file__).parent.parent / "configs"

_CONFIG = cli.define_config(_CONFIGS / "tiny.py")
flags.declare_key_flag("config")
_MODEL = flags.DEFINE_string(
  "model",
  None,
  "Hugging Face folder or .gguf file to start from; overrides config.model.",
)
_DATA = flags.DEFINE_string(
  "data",
  None,
  "Token file or text to train on; overrides config.data.train.",
)
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir",
  None,
  "Where the run is kept, and goes on from if it was interrupted; by default"
  " runs/ and the pattern's name.",
)


def _read_settings() -> FinetuneConfig:
  run = from_config_dict(FinetuneConfig, cli.read_config(_CONFIG))
  if _MODEL.value is not None:
    run = dataclasses.replace(run, model=_MODEL.value)
  if _DATA.value is not None:
    run = dataclasses.replace(
      run, data=dataclasses.replace(run.data, train=_DATA.value)
    )
  return run


def print_table(rows: dict[str, dict[int, perplexity.Perplexity]]) -> None:
  """Prints perplexity by context length, a line a model.

  The last columns are of the last quarter of the longest windows.
  """
  context_lens = sorted(next(iter(rows.values())))
  longest = context_lens[-1]
  heads = [f"{n:,}" for n in context_lens] + [f"last quarter of {longest:,}"]
  print(f"{'perplexity at':<14}" + "".join(f"  {h:>10}" for h in heads))
  for name, results in rows.items():
    values = [results[n].perplexity for n in context_lens]
    last_quarter = results[longest].last_quarter
    values.append(math.nan if last_quarter is None else last_quarter)
    print(
      f"{name:<14}"
      + "".join(
        f"  {value:>{max(10, len(head))}.2f}"
        for value, head in zip(values, heads, strict=True)
      )
    )


def main() -> None:
  """Runs the command."""
  cluster.start()
  run = _read_settings()
  train = run.training
  dispatch.check_implementation(train.implementation)
  model_folder = resolve.model_path(run.model)
  base_config = convert.load_config(model_folder)
  target_config = resolve.extended(base_config, run)
  schedule = resolve.make_patterns(run.pattern, base_config, train.seq_len)
  mesh = resolve.make_mesh(run.mesh, train, base_config, schedule)
  words = tokenizer.load(run.data.tokenizer or model_folder)
  output_dir = loop.open_output_dir(
    _OUTPUT_DIR.value or f"runs/{run.pattern.name}", to_json(run)
  )
  cache = output_dir / "tokens"
  train_tokens = resolve.open_tokens(
    run.data.train or assets.BOOKS_TUNE, words, cache
  )
  test_tokens = resolve.open_tokens(
    run.data.test or assets.BOOKS_TEST, words, cache
  )
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
  dtype = jnp.dtype(train.dtype)
  param_dtype = jnp.dtype(train.param_dtype)

  def load(config: LlamaConfig, adapter: lora.LoraConfig | None) -> Any:
    def make() -> Any:
      return convert.load_model(
        model_folder,
        config=config,
        lora=adapter,
        dtype=dtype,
        param_dtype=param_dtype,
        quantize_by=train.quantize,
        rngs=nnx.Rngs(train.seed),
      )

    return loop.load(make, mesh)

  pretrained_len = base_config.context_len
  context_lens = run.evaluation.context_lens or tuple(
    sorted({pretrained_len, train.seq_len})
  )

  resolve.check_evaluation(
    test_tokens, context_lens, run.evaluation, base_config, words.bos_id
  )
  measure = functools.partial(
    resolve.perplexities,
    tokens=test_tokens,
    config=run.evaluation,
    bos_id=words.bos_id,
    implementation=train.implementation,
    mesh=mesh,
  )

  def on_the_way(model: Any) -> dict[str, Any]:
    results = measure(
      model,
      context_lens=(train.seq_len,),
      num_windows=run.evaluation.windows_on_the_way,
    )
    return {str(n): result.perplexity for n, result in results.items()}

  print(
    f"{model_folder.name}: {pretrained_len:,} -> {train.seq_len:,} tokens,"
    f" {run.pattern.name}, LoRA rank {run.lora.rank},"
    f" {len(train_tokens):,} tokens to train on; {output_dir}",
    flush=True,
  )
  trainable = lora.trainable(run.lora)
  result = loop.fit(
    load(target_config, run.lora),
    trainable=trainable,
    batches=batches,
    step_config=resolve.step_config(train, schedule, mesh),
    optimizer_config=run.optimizer,
    config=train,
    output_dir=output_dir,
    settings=to_json(run),
    mesh=mesh,
    evaluate=on_the_way,
    evaluate_every=run.evaluation.every,
  )
  adapter = output_dir / "adapter"
  trained = loop.to_host(result.model, trainable)
  if cluster.is_primary():
    adapters.save_adapter(
      trained, adapter, base_model=str(model_folder), patterns=schedule
    )
  final_loss, speed = result.final_loss, result.tokens_per_second
  measure_all = functools.partial(
    measure,
    context_lens=context_lens,
    num_windows=run.evaluation.num_windows,
  )
  tuned = measure_all(result.model)
  # One model is gone before the next is read: the device that trained one may
  # have no room for two.
  del result, trained
  rows = {
    "untuned": measure_all(load(base_config, None)),
    "interpolated": measure_all(load(target_config, None)),
    "tuned": tuned,
  }
  if not cluster.is_primary():
    return
  peak_bytes = memory.measured_bytes(jax.local_devices())
  atomic_file.write_json(
    output_dir / "summary.json",
    {
      "pattern": run.pattern.name,
      "pretrained_len": pretrained_len,
      "target_len": train.seq_len,
      "steps": train.steps,
      "final_loss": final_loss,
      "tokens_per_second": speed,
      "peak_bytes": peak_bytes,
      "perplexity": {
        "protocol": run.evaluation.protocol,
        "num_windows": {
          str(n): rows["tuned"][n].num_windows for n in context_lens
        },
        **{
          name: {str(n): r.perplexity for n, r in results.items()}
          for name, results in rows.items()
        },
      },
      "last_quarter_perplexity": {
        name: {str(n): r.last_quarter for n, r in results.items()}
        for name, results in rows.items()
      },
    },
  )
  longest = max(context_lens)
  windows = rows["tuned"][longest].num_windows
  print(
    f"\n{run.evaluation.protocol} protocol, {windows} windows a length,"
    " dense attention"
  )
  print_table(rows)
  if peak_bytes is not None:
    print(f"\nmost memory on a device: {peak_bytes / 2**30:.2f} GiB")
  print(f"\nadapter: {adapter}\nsummary: {output_dir / 'summary.json'}")


if __name__ == "__main__":
  cli.run(main)
