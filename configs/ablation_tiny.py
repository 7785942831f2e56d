r"""Which pattern and which recipe take the embedded model from 256 to 1,024?

Hardware: one GPU for the whole grid; two CPU cores for `--quick`, which runs a
few arms for a few steps. Command: `scca ablate
--config=configs/ablation_tiny.py --output_dir=runs/ablation_tiny --quick`
(without `--quick` the grid).
Expected: experiments/results/ablation_tiny/README.md.

All arms have the budget of `finetune` without flags, 175 steps of 2 windows of
1,024 tokens; their lines below show the differences. Patterns are compared
under Position Interpolation, the paper's choice, at the paper's sizes (chunks
of a quarter of the length) and at equal pairs (a third of dense attention's).
"""

import dataclasses
import functools

from experiments.ablation.settings import (
  AblationConfig,
  ArmConfig,
  QuickConfig,
  TasksConfig,
)
from experiments.shared.config import (
  DataConfig,
  EvaluationConfig,
  FinetuneConfig,
  RopeConfig,
  TrainingConfig,
  to_config_dict,
)
from scca_jax.lora import LoraConfig
from scca_jax.training import OptimizerConfig

PAPER_SIZES = {
  "local": "local",
  "sliding": "sliding",
  "s2": "s2",
  "fixed": "scca_fixed",
  "flow": "scca_flow",
  "flow-local": "scca_flow(boundary='local')",
  "longmixed": "longmixed",
  "sda2": "sda(dilation=2)",
  "sda4": "sda(dilation=4)",
  "dilated": "dilated",
  "longnet": "mixture(dilated(chunk_size=256, dilation=1),"
  " dilated(chunk_size=512, dilation=2), dilated(chunk_size=1024, dilation=4))",
  "dna": "dna",
  "near": "scca_near",
  "near-sinks": "scca_near(sinks=4)",
}
# Chosen so that pairs are a third of dense attention's, or as close as
# possible.
EQUAL_PAIRS = {
  "local-third": "local(chunk_size=341)",
  "sliding-third": "sliding(window=188)",
  "s2-third": "s2(chunk_size=385)",
  "fixed-third": "scca_fixed(chunk_size=288)",
  "flow-third": "scca_flow(chunk_size=342)",
  "flow-local-third": "scca_flow(chunk_size=255, boundary='local')",
  "longmixed-third": "longmixed(chunk_size=244)",
  "sda3": "sda(dilation=3)",
  "dna-third": "dna(window=216, dilation=2)",
  "near-third": "scca_near(chunk_size=170)",
  "near-sinks-third": "scca_near(chunk_size=170, sinks=4)",
}
LEAKS = {
  "s2-leak": "s2(causality='slot')",
  "fixed-leak": "scca_fixed(causality='slot')",
  "flow-leak": "scca_flow(causality='slot')",
}
ROPES = {
  "ntk4": RopeConfig(kind="ntk", factor=4.0),
  "ntk8": RopeConfig(kind="ntk", factor=8.0),
  "yarn4": RopeConfig(kind="yarn", factor=4.0),
}
FULL = (3e-4, 1e-3, 3e-3)
# With YaRN every arm chose the lowest of the study's rates.
YARN_RATES = (5e-4, 1e-3, 2e-3)


def _recipes(suffix: str, rope: RopeConfig) -> list[ArmConfig]:
  """Returns arms that differ in more than the pattern, at a rope scaling."""
  rates = YARN_RATES if rope.kind == "yarn" else ()
  # Short windows with skipped positions: a quarter and a third of the pairs.
  found = [
    ArmConfig(
      name=f"pose{window}{suffix}",
      rope=rope,
      skip_window=window,
      learning_rates=rates,
    )
    for window in (256, 341)
  ]
  # Dense steps at the end, and dense layers.
  for name in ("s2", "fixed", "near-sinks"):
    pattern = PAPER_SIZES[name]
    found += [
      ArmConfig(
        name=f"{name}-dense-quarter{suffix}",
        pattern=pattern,
        rope=rope,
        dense_fraction=0.25,
        learning_rates=rates,
      ),
      ArmConfig(
        name=f"{name}-dense-layer{suffix}",
        pattern=f"layers({pattern}, dense=(2,))",
        rope=rope,
        learning_rates=rates,
      ),
    ]
  # What is trained.
  fixed = ArmConfig(
    name=f"fixed-{suffix}",
    pattern="scca_fixed",
    rope=rope,
    learning_rates=rates,
  )
  changed = functools.partial(dataclasses.replace, fixed)
  return found + [
    changed(
      name=f"fixed-lora-plus{suffix}",
      lora_b_ratio=16.0,
      learning_rates=(1.25e-4, 2.5e-4, 5e-4),
    ),
    changed(name=f"fixed-embeddings{suffix}", train_embeddings=True),
    changed(
      name=f"fixed-embeddings-slow{suffix}",
      train_embeddings=True,
      embedding_ratio=0.1,
    ),
    changed(name=f"fixed-full{suffix}", tuning="full", learning_rates=FULL),
    changed(
      name=f"dense-full{suffix}",
      pattern="dense",
      tuning="full",
      learning_rates=FULL,
    ),
  ]


def arms() -> tuple[ArmConfig, ...]:
  """Returns the arms."""
  linear = RopeConfig(kind="linear", factor=4.0)
  patterns = PAPER_SIZES | EQUAL_PAIRS | LEAKS
  found = [ArmConfig(name="dense", pattern="dense", rope=linear)]
  # Nothing tuned: as pretrained, and with rope scaling by itself.
  untuned = {"as-is": RopeConfig(kind=None), "linear4": linear} | ROPES
  found += [
    ArmConfig(name=f"untuned-{name}", rope=rope, tuning="none")
    for name, rope in untuned.items()
  ]
  found += [
    ArmConfig(name=name, pattern=pattern, rope=linear)
    for name, pattern in patterns.items()
  ]
  # Rope scaling.
  for kind, rope in ROPES.items():
    for name in ("dense", "s2", "fixed", "longmixed", "near-sinks"):
      found.append(
        ArmConfig(
          name=f"{name}-{kind}",
          pattern=PAPER_SIZES.get(name, name),
          rope=rope,
          learning_rates=YARN_RATES if rope.kind == "yarn" else (),
        )
      )
  # Dense attention for fewer tokens: a third of the steps, and as many as fit
  # into the seconds of `fixed` on a CPU.
  for name, share in (("third-of-steps", 1 / 3), ("same-seconds", 0.8)):
    found.append(
      ArmConfig(name=f"dense-{name}", rope=linear, steps_fraction=share)
    )
  for kind, rope in {"": linear, "-yarn4": ROPES["yarn4"]}.items():
    found += _recipes(kind, rope)
  return tuple(found)


def get_config():
  """Returns the settings of the study."""
  return to_config_dict(
    AblationConfig(
      run=FinetuneConfig(
        lora=LoraConfig(rank=64, alpha=128.0, train_embeddings=False),
        data=DataConfig(held_out=1),
        optimizer=OptimizerConfig(
          schedule="cosine", warmup_steps=10, final_fraction=0.1
        ),
        training=TrainingConfig(seq_len=1024, batch_size=2, steps=175),
        evaluation=EvaluationConfig(
          context_lens=(256, 512, 1024), num_windows=96
        ),
      ),
      arms=arms(),
      learning_rates=(1e-3, 2e-3, 4e-3),
      seeds=(0, 1, 2, 3, 4),
      validation_windows=48,
      looks=5,
      pairs_at_once=15,
      tasks=TasksConfig(
        names=("copy", "passkey"), context_lens=(512, 1024), num_samples=100
      ),
      quick=QuickConfig(
        arms=("s2", "fixed", "longmixed", "near-sinks"), steps=20
      ),
    )
  )
