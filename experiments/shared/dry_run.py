"""`--dry_run`: prints what a run would do, without doing it."""

import itertools
import pathlib
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.shared import resolve
from experiments.shared.config import (
  FinetuneConfig,
  PretrainConfig,
  flat,
  to_json,
)
from scca_jax import lora, memory, patterns, training
from scca_jax.llama import Llama
from scca_jax.token_file import TokenFile


def show(
  run: FinetuneConfig | PretrainConfig,
  resolved: resolve.Resolved,
  text: str | pathlib.Path,
  adapter: lora.LoraConfig | None,
) -> None:
  """Prints settings, shapes, pairs, tokens and memory; writes nothing.

  The training step is compiled for the devices at hand, using only shapes.

  Args:
    run: The settings.
    resolved: The resolved settings.
    text: The text it would train on.
    adapter: The adapter to train; None trains every parameter.

  Raises:
    ValueError: The token file is damaged, or a batch too large to plan for.
  """
  _check_length(run, resolved)
  print("settings")
  for name, value in flat(to_json(run)).items():
    print(f"  config.{name} = {value!r}")
  model = resolve.shapes(run, resolved.target, adapter)
  trainable = lora.trainable(adapter)
  _, trained, frozen = nnx.split(model, trainable, ...)
  sizes = [_size(tree) for tree in (trained, frozen)]
  c = resolved.target
  scaling = c.rope_scaling
  rope = f"{scaling.kind} x {scaling.factor:g}" if scaling else "none"
  print(
    f"model\n  {c.num_layers} layers of width {c.hidden_size:,}, MLP"
    f" {c.intermediate_size:,}, {c.num_heads} heads of {c.head_dim} on"
    f" {c.num_kv_heads} key heads, {c.vocab_size:,} tokens in the vocabulary\n"
    f"  {sum(sizes):,} parameters, {sizes[0]:,} of them trained\n"
    f"  {resolved.base.context_len:,} -> {c.context_len:,} tokens of context,"
    f" rope scaling {rope}"
  )
  _show_pairs(run, resolved)
  _show_tokens(run, text)
  print(f"memory\n  {_memory(run, resolved, model, trainable)}")
  print("nothing was trained or written.")


def _check_length(
  run: FinetuneConfig | PretrainConfig, resolved: resolve.Resolved
) -> None:
  """Refuses lengths of which this machine could not even hold one layer."""
  train, width = run.training, resolved.target.hidden_size
  tokens = train.batch_size // train.num_micro_batches * train.seq_len
  needed = tokens * width * jnp.dtype(train.dtype).itemsize
  there = memory.of_this_machine()
  if needed > there:
    raise ValueError(
      f"{tokens:,} tokens of width {width:,} take {needed >> 30:,} GiB, and"
      f" this machine has {there >> 30}, too little to plan for them: use a"
      " shorter seq_len or a smaller batch_size."
    )


def _size(tree: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _show_pairs(
  run: FinetuneConfig | PretrainConfig, resolved: resolve.Resolved
) -> None:
  seq_len, heads = run.training.seq_len, resolved.base.num_heads
  dense = patterns.dense(heads).num_pairs(seq_len)
  print("layer  pairs of a sequence  of dense  pattern")
  first = 0
  for pattern, same in itertools.groupby(resolved.patterns):
    last = first + len(list(same)) - 1
    pairs = pattern.num_pairs(seq_len)
    layers = f"{first}-{last}" if last > first else f"{first}"
    text = patterns.text(pattern, num_kv_heads=resolved.base.num_kv_heads)
    text = textwrap.shorten(text, 200)
    print(f"{layers:>5}  {pairs:>19,}  {pairs / dense:>8.3f}  {text}")
    first = last + 1


def _show_tokens(
  run: FinetuneConfig | PretrainConfig, text: str | pathlib.Path
) -> None:
  train = run.training
  a_step = train.batch_size * train.seq_len
  dense_from = training.first_dense_step(train.steps, train.dense_fraction)
  parts, num_dense = train.num_micro_batches, train.steps - dense_from
  print(
    f"batch\n  [{train.batch_size}, {train.seq_len}]"
    + (f" in {parts} micro batches" if parts > 1 else "")
    + f": {a_step:,} tokens per step, {train.steps * a_step:,} in"
    f" {train.steps:,} steps"
    + (f", the last {num_dense:,} dense" if num_dense else "")
  )
  path = pathlib.Path(text)
  if path.suffix == ".bin":
    count = len(TokenFile.open(path))
    times = train.steps * a_step / count
    print(f"  {path}: {count:,} tokens, read {times:.2f} times")
  else:
    print(f"  {path.name}: text, to be tokenised when the run starts")


def _memory(
  run: FinetuneConfig | PretrainConfig,
  resolved: resolve.Resolved,
  model: Llama,
  trainable: Any,
) -> str:
  """Returns what a compiled step allocates, or why that is unknown."""
  train, step = run.training, resolved.step
  optimizer = training.make_optimizer(run.optimizer, train.steps)
  graphdef, params, frozen = nnx.split(model, trainable, ...)
  state = jax.eval_shape(
    lambda *parts: training.init(
      nnx.merge(graphdef, *parts), trainable, optimizer
    )[1],
    params,
    frozen,
  )
  batch = {
    name: jax.ShapeDtypeStruct((train.batch_size, train.seq_len), dtype)
    for name, dtype in (
      ("tokens", jnp.int32),
      ("targets", jnp.int32),
      ("mask", jnp.float32),
    )
  }
  device = jax.devices()[0]
  compiled = training.compile_step(graphdef, optimizer, step, state, frozen)
  try:
    found = memory.device_bytes(compiled.lower(state, frozen, batch).compile())
  except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
    return f"unknown: the step does not compile here: {error}"
  limit = (device.memory_stats() or {}).get("bytes_limit")
  of = f" of {limit / 2**30:.2f} GiB" if limit else ""
  other = (
    ""
    if device.platform == "gpu"
    else "; `scca plan_memory` plans for a GPU that you do not have"
  )
  return (
    f"a step compiles to {found / 2**30:.2f} GiB{of} on each"
    f" {device.device_kind}{other}"
  )
