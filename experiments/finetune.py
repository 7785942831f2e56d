"""Extends the context of a LLaMA with LoRA, rope scaling, a sparse pattern.

Without flags it extends the embedded model from 256 to 1,024 tokens on the
embedded books, on a CPU, in minutes. At the end it prints the perplexity of the
model untuned, with rope scaling alone, and tuned, all with dense attention, and
writes a report with the loss by position.

    scca finetune --config=configs/tiny.py --output_dir=runs/a
"""

import dataclasses
import math
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from experiments.shared import (
  cli,
  cluster,
  dry_run,
  loop,
  model_card,
  report,
  resolve,
  task_scores,
)
from experiments.shared import flags as shared_flags
from experiments.shared.config import FinetuneConfig, to_json
from experiments.shared.config_flag import ConfigFlag
from scca_jax import (
  adapters,
  assets,
  atomic_file,
  convert,
  dispatch,
  lora,
  memory,
  tokenizer,
)
from scca_jax.llama_config import LlamaConfig
from scca_jax.perplexity import Perplexity

_CONFIG = ConfigFlag(FinetuneConfig, "tiny")
_MODEL = flags.DEFINE_string(
  "model",
  None,
  "Hugging Face folder, .gguf file or name on Hugging Face to start from;"
  " overrides config.model.",
)
_DATA = shared_flags.define_training_data()
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir",
  None,
  "Folder of the run; an interrupted run resumes from it. By default runs/ and"
  " the pattern.",
)
_WANDB = shared_flags.define_wandb()
flags.adopt_module_key_flags(cluster)
_DRY_RUN = shared_flags.define_dry_run()


def _read_settings() -> FinetuneConfig:
  run = _CONFIG.read()
  if _MODEL.value is not None:
    run = dataclasses.replace(run, model=_MODEL.value)
  if _DATA.value is not None:
    run = dataclasses.replace(
      run, data=dataclasses.replace(run.data, train=_DATA.value)
    )
  return run


def _load(
  run: FinetuneConfig,
  config: LlamaConfig,
  adapter: lora.LoraConfig | None,
  mesh: Any,
) -> Any:
  """Returns the model of a run, with or without a new adapter."""
  train = run.training
  return loop.load(
    lambda: convert.load_model(
      resolve.model_path(run.model),
      config=config,
      lora=adapter,
      dtype=jnp.dtype(train.dtype),
      param_dtype=jnp.dtype(train.param_dtype),
      quantize_by=train.quantize,
      rngs=nnx.Rngs(train.seed),
    ),
    mesh,
  )


def print_table(rows: dict[str, dict[int, Perplexity]]) -> None:
  """Prints perplexity by context length, one line per model.

  The last column is the last quarter of the longest windows.
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


def _summary(
  run: FinetuneConfig,
  pretrained_len: int,
  final_loss: float,
  speed: float | None,
  rows: dict[str, dict[int, Perplexity]],
) -> dict[str, Any]:
  """Returns the content of `summary.json`."""

  def by_length(results: dict[int, Perplexity], field: str) -> dict[str, Any]:
    return {str(n): getattr(result, field) for n, result in results.items()}

  return {
    "pattern": run.pattern,
    "pretrained_len": pretrained_len,
    "target_len": run.training.seq_len,
    "steps": run.training.steps,
    "final_loss": final_loss,
    "tokens_per_second": speed,
    "peak_bytes": memory.measured_bytes(jax.local_devices()),
    "perplexity": {
      "protocol": run.evaluation.protocol,
      "num_windows": by_length(rows["tuned"], "num_windows"),
      **{name: by_length(x, "perplexity") for name, x in rows.items()},
    },
    "last_quarter_perplexity": {
      name: by_length(x, "last_quarter") for name, x in rows.items()
    },
  }


def main() -> None:
  """Runs the command."""
  with cluster.joined():
    _run()


def _run() -> None:
  shared_flags.check_wandb(_WANDB)
  run = _read_settings()
  dispatch.check_implementation(run.training.implementation)
  model_folder = resolve.model_path(run.model)
  resolved = resolve.resolve(run)
  if _DRY_RUN.value:
    text = run.data.train or assets.BOOKS_TUNE
    dry_run.show(run, resolved, text, run.adapter)
    return
  vocabulary = tokenizer.load(run.data.tokenizer or model_folder)
  folder_name = re.sub(r"[^\w.-]+", "-", run.pattern).strip("-")
  path = _OUTPUT_DIR.value or f"runs/{folder_name}"
  with loop.output_dir(path, to_json(run)) as output_dir:
    _finetune(run, resolved, vocabulary, output_dir)


def _finetune(
  run: FinetuneConfig,
  resolved: resolve.Resolved,
  vocabulary: tokenizer.Tokenizer,
  output_dir: pathlib.Path,
) -> None:
  """Trains, measures and reports, all in the folder of the run."""
  train = run.training
  base, target, mesh = resolved.base, resolved.target, resolved.mesh
  model_folder = resolve.model_path(run.model)
  cache = output_dir / "tokens"
  train_tokens = resolve.open_tokens(
    run.data.train or assets.BOOKS_TUNE,
    vocabulary,
    cache,
    vocab_size=base.vocab_size,
  )
  train_tokens, _ = resolve.hold_out(train_tokens, run.data.held_out)
  test_tokens = resolve.open_tokens(
    run.data.test or assets.BOOKS_TEST,
    vocabulary,
    cache,
    vocab_size=base.vocab_size,
  )
  batches = resolve.make_batches(run, train_tokens, mesh)
  evaluator = resolve.Evaluator(
    run,
    test_tokens,
    base,
    mesh,
    bos_id=vocabulary.bos_id,
    context_lens=tuple(sorted({base.context_len, train.seq_len})),
  )
  plan = task_scores.of_run(run.evaluation, evaluator.context_lens, vocabulary)
  scores: dict[str, task_scores.Scores] = {}

  def measure(name: str, model: Any) -> dict[int, Perplexity]:
    if plan is not None:
      scores[name] = evaluator.score(model, vocabulary, plan)
    return evaluator.at_end(model)

  print(
    f"{model_folder.name}: {base.context_len:,} -> {train.seq_len:,} tokens,"
    f" {run.pattern},"
    f" {f'LoRA rank {run.lora.rank}' if run.adapter else 'all parameters'},"
    f" {len(train_tokens):,} tokens to train on; {output_dir}",
    flush=True,
  )
  trainable = lora.trainable(run.adapter)
  result = loop.fit(
    _load(run, target, run.adapter, mesh),
    run=run,
    step=resolved.step,
    trainable=trainable,
    batches=batches,
    output_dir=output_dir,
    evaluate=evaluator.on_the_way,
    wandb_project=_WANDB.value,
  )
  tuned_to = output_dir / ("adapter" if run.adapter else "model")
  trained = loop.to_host(result.model, trainable)
  if cluster.is_primary():
    if run.adapter:
      adapters.save_adapter(
        trained,
        tuned_to,
        base_model=resolve.base_name(run.model),
        patterns=resolved.patterns,
        run={"recipe": model_card.recipe(run)},
      )
    else:
      convert.copy_tokenizer(
        model_folder, tuned_to, context_len=target.context_len
      )
      convert.save_model(trained, tuned_to, dtype=jnp.dtype(train.param_dtype))
  final_loss, speed = result.final_loss, result.tokens_per_second
  tuned = measure("tuned", result.model)
  # Free one model before reading the next: the device may not have room for
  # two.
  del result, trained
  rows = {
    "untuned": measure("untuned", _load(run, base, None, mesh)),
    "interpolated": measure("interpolated", _load(run, target, None, mesh)),
    "tuned": tuned,
  }
  if not cluster.is_primary():
    return
  summary = _summary(run, base.context_len, final_loss, speed, rows)
  if scores:
    summary["tasks"] = {
      name: task_scores.as_json(scores[name]) for name in rows
    }
  atomic_file.write_json(output_dir / "summary.json", summary)
  record = {
    "recipe": model_card.recipe(run),
    "perplexity": summary["perplexity"]
    | {"last_quarter": summary["last_quarter_perplexity"]},
  }
  if run.adapter:
    adapters.record_run(tuned_to, record)
  model_card.write(
    tuned_to,
    model_card.for_peft(tuned_to, resolve.base_name(run.model), target)
    if run.adapter
    else model_card.for_transformers(tuned_to),
    title=output_dir.resolve().name,
    library="peft" if run.adapter else "transformers",
    base=resolve.base_name(run.model),
    config=target,
    layers=resolved.patterns,
    adapter=run.adapter,
    run=record,
  )
  title = (
    f"{run.model or 'The embedded model'}: {base.context_len:,} to"
    f" {train.seq_len:,} tokens"
  )
  report_path = report.write(output_dir, title, run, rows, summary)
  windows = tuned[max(tuned)].num_windows
  print(
    f"\n{run.evaluation.protocol} protocol, {windows} windows per length,"
    " dense attention"
  )
  print_table(rows)
  if summary["peak_bytes"] is not None:
    print(f"\npeak memory of a device: {summary['peak_bytes'] / 2**30:.2f} GiB")
  print(
    f"\n{tuned_to.name}: {tuned_to}\nsummary: {output_dir / 'summary.json'}"
  )
  print(f"report: {report_path}")


if __name__ == "__main__":
  cli.run(main, config=_CONFIG)
