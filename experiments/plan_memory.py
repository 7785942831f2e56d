"""Plans how much GPU memory training takes, without needing the GPU.

It compiles the training step of the config (or evaluation, or generation with
its model) for a GPU that this machine may not have; see `scca_jax.memory`.
`pip install 'scca_jax[plan]'` brings the compiler. Weights are not read:
config.json is enough.

    scca plan_memory --config=configs/llama2_7b_8k.py \
      --gpu=v100-32gb --output=plan.json
    scca plan_memory --config=configs/llama2_7b_8k.py \
      --gpu=v100-32gb --task=generate --search=seq_len
    scca plan_memory --config=configs/llama2_7b_8k_h200.py \
      --gpu=h200 --mesh=sequence=8 --config.training.seq_len=131072
"""

import dataclasses

import jax
from absl import flags

from experiments.shared import cli, resolve
from experiments.shared.config import FinetuneConfig
from experiments.shared.config_flag import ConfigFlag
from scca_jax import atomic_file, deviceless, memory, sharding
from scca_jax.llama import Execution

# --search tries contexts that are multiples of this, in tokens.
_SEARCH_MULTIPLE = 1024
_MAX_TOKENS = 1 << 26

_CONFIG = ConfigFlag(FinetuneConfig, "tiny")
_MODEL = flags.DEFINE_string(
  "model", None, "Folder with a config.json; overrides config.model."
)
_GPU = flags.DEFINE_enum(
  "gpu", "v100-32gb", deviceless.GPUS, "The GPU to compile for."
)
_TASK = flags.DEFINE_enum(
  "task",
  "train",
  memory.TASKS,
  "What to compile: the training step, or perplexity or generation with the"
  " tuned model and dense attention.",
)
_SEARCH = flags.DEFINE_enum(
  "search",
  None,
  ["seq_len", "batch_size"],
  "Find the longest context (a multiple of 1,024), or the largest batch, that"
  " fits.",
)
_MESH = flags.DEFINE_string(
  "mesh",
  None,
  "GPUs that share the step, such as fsdp=2,sequence=4; overrides config.mesh."
  " Each copy of the model, along data and fsdp, has a micro batch of its own.",
)
_FRACTION = flags.DEFINE_float(
  "memory_fraction",
  memory.DEFAULT_FRACTION,
  "Share of the card that jax may use (XLA_PYTHON_CLIENT_MEM_FRACTION).",
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.")


def _plan(run: FinetuneConfig, batch_size: int, seq_len: int) -> memory.Plan:
  """Returns the plan of a micro batch, of windows or of prompts."""
  train = run.training
  copies = run.mesh.data * run.mesh.fsdp
  run = dataclasses.replace(
    run,
    training=dataclasses.replace(
      train,
      seq_len=seq_len,
      batch_size=batch_size * train.num_micro_batches * copies,
    ),
  )
  train = run.training
  resolved = resolve.resolve(run, find_devices=False)
  card = memory.Card(_GPU.value, _FRACTION.value)
  model = resolve.shapes(run, resolved.target, run.adapter)
  if _TASK.value == "train":
    return memory.plan_step(
      card,
      model,
      optimizer=run.optimizer,
      step=resolved.step,
      batch_size=train.batch_size,
      seq_len=seq_len,
      mesh_config=run.mesh,
    )
  if run.mesh.num_devices > 1:
    raise ValueError(
      f"--task={_TASK.value} is planned for one GPU: leave out --mesh and"
      " config.mesh."
    )
  plan = {
    "evaluate": memory.plan_evaluation,
    "generate": memory.plan_generation,
  }[_TASK.value]
  return plan(
    card,
    model,
    batch_size=batch_size,
    seq_len=seq_len,
    execution=Execution(implementation=train.implementation),
  )


def _print(plan: memory.Plan) -> None:
  peak, pool, capacity, host = (
    f"{size / 2**30:.2f} GiB"
    for size in (
      plan.peak_bytes,
      plan.pool_bytes,
      plan.capacity_bytes,
      plan.host_bytes,
    )
  )
  each = f" on each of {plan.mesh}" if plan.mesh else ""
  beside = f"; {host} of the host's memory" if plan.host_bytes else ""
  print(
    f"{plan.gpu}{each}, {plan.task}, {plan.batch_size} x {plan.seq_len:,}"
    f" tokens: peak {peak} of {pool} that jax may use ({capacity} on the card):"
    f" {'fits' if plan.fits else 'does not fit'}{beside}",
    flush=True,
  )


def main() -> None:
  """Compiles, prints a table and writes JSON.

  Raises:
    ValueError: A setting or flag does not fit, nothing fits, or the compiler
      is missing.
  """
  if _OUTPUT.value is not None:
    atomic_file.check_writable(_OUTPUT.value)
  # Nothing runs, so leave the memory of this machine's GPU alone.
  jax.config.update("jax_platforms", "cpu")
  run = _CONFIG.read()
  if _MODEL.value is not None:
    run = dataclasses.replace(run, model=_MODEL.value)
  if _MESH.value is not None:
    run = dataclasses.replace(run, mesh=sharding.MeshConfig.parse(_MESH.value))
  train = run.training
  seq_len = train.seq_len
  if _TASK.value == "train":
    batch_size = train.batch_size // train.num_micro_batches
  elif _TASK.value == "evaluate":
    # As at the end of `finetune`.
    seq_len = max(run.evaluation.context_lens or (seq_len,))
    batch_size = max(1, run.evaluation.batch_tokens // seq_len)
  else:
    batch_size = 1
  if seq_len > _MAX_TOKENS:
    raise ValueError(
      f"plans are made for sequences of up to {_MAX_TOKENS:,} tokens, got"
      f" {seq_len:,}: compiling would take too long."
    )
  if batch_size * seq_len >= 1 << 31:
    raise ValueError(
      "plans are made for batches of fewer than 2^31 tokens, got"
      f" {batch_size:,} x {seq_len:,}."
    )

  def of_size(size: int) -> memory.Plan:
    if _SEARCH.value == "seq_len":
      plan = _plan(run, batch_size, size)
    else:
      plan = _plan(run, size, seq_len)
    _print(plan)
    return plan

  if _SEARCH.value is None:
    plan = _plan(run, batch_size, seq_len)
    _print(plan)
  else:
    multiple = _SEARCH_MULTIPLE if _SEARCH.value == "seq_len" else 1
    plan = memory.search(of_size, multiple, multiple)
    if plan is None:
      raise ValueError(
        f"nothing fits on {_GPU.value}: even {_SEARCH.value}={multiple} takes"
        " more than jax may use."
      )
    print("the largest that fits:")
    _print(plan)
  for name, size in plan.parts.items():
    print(f"  {name:<10} {size / 2**30:>7.2f} GiB")
  for kind, size in plan.moved_bytes.items():
    print(f"  receives   {size / 2**30:>7.2f} GiB of floats by {kind}")
  if _OUTPUT.value is not None:
    atomic_file.write_json(
      _OUTPUT.value, dataclasses.asdict(plan) | {"fits": plan.fits}
    )
    print(f"wrote {_OUTPUT.value}")


if __name__ == "__main__":
  cli.run(main, config=_CONFIG)
