r"""Which pattern and which recipe take SmolLM2-135M from 8k to 32k?

Hardware: one H100, in stages that fit a call of ten minutes each; the same
command resumes. Command, with the user's own weights and text: `python -m
experiments.ablate --config=configs/ablation_smollm2.py
--output_dir=runs/ablation_smollm2 --config.run.model=smollm2/
--config.run.data.train=train.bin --config.run.data.test=verdict.bin`, first
with `--arms=` the names of RECIPES, then of PATTERNS.
Expected: not run yet. `--dry_run` lists the arms with their pairs.

`train.bin` ends with the documents that validate; none of `verdict.bin` may be
among them. The recipe is sought one factor at a time around ntk x8, rank 32 and
a learning rate of 3e-3, which a pilot of eleven runs ended with (one seed); the
patterns have a third of dense attention's pairs, or as near as they get.
"""

import dataclasses

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

NTK8 = RopeConfig(kind="ntk", factor=8.0)
FIXED = ArmConfig(name="fixed", pattern="scca_fixed", rope=NTK8)

# One factor at a time; 4 million tokens each, half of the study's.
RECIPES = tuple(
  dataclasses.replace(FIXED, name=name, steps_fraction=0.5, **changes)
  for name, changes in {
    "rope-linear4": {"rope": RopeConfig(kind="linear", factor=4.0)},
    "rope-yarn4": {"rope": RopeConfig(kind="yarn", factor=4.0)},
    "rope-ntk4": {"rope": RopeConfig(kind="ntk", factor=4.0)},
    "rope-ntk8": {},
    "rope-ntk16": {"rope": RopeConfig(kind="ntk", factor=16.0)},
    "embeddings": {"train_embeddings": True, "embedding_ratio": 0.1},
    "lora-plus": {
      "lora_b_ratio": 16.0,
      "learning_rates": (2e-4, 5e-4),
    },
    "full": {"tuning": "full", "learning_rates": (1e-4, 3e-4)},
  }.items()
)
# At a third of the pairs, 8 million tokens each.
PATTERNS = (
  FIXED,
  *(
    ArmConfig(name=name, pattern=pattern, rope=NTK8)
    for name, pattern in {
      "s2": "s2(chunk_size=12288)",
      "sliding": "sliding(window=6016)",
      "flow": "scca_flow(boundary='local')",
      "longmixed": "longmixed(chunk_size=6144)",
      "near": "scca_near(chunk_size=5461)",
      "near-sinks": "scca_near(chunk_size=5461, sinks=4)",
    }.items()
  ),
  ArmConfig(
    name="s2-dense-eighth", pattern="s2", rope=NTK8, dense_fraction=0.125
  ),
  ArmConfig(
    name="s2-dense-layers",
    pattern="layers(s2(chunk_size=8192), dense=(3, 11, 19, 27))",
    rope=NTK8,
  ),
  ArmConfig(name="pose", rope=NTK8, skip_window=8192),
  # As many dense steps as take the seconds of `fixed` (measured: about half).
  ArmConfig(name="dense-same-seconds", rope=NTK8, steps_fraction=0.5),
)


def get_config():
  """Returns the settings of the study."""
  return to_config_dict(
    AblationConfig(
      run=FinetuneConfig(
        model="smollm2-135m",
        lora=LoraConfig(rank=32, alpha=64.0, train_embeddings=False),
        data=DataConfig(held_out=2),
        optimizer=OptimizerConfig(
          schedule="cosine", warmup_steps=10, final_fraction=0.1
        ),
        training=TrainingConfig(
          seq_len=32768,
          batch_size=4,
          num_micro_batches=4,
          steps=60,
          dtype="bfloat16",
          remat="layer",
        ),
        evaluation=EvaluationConfig(
          context_lens=(8192, 32768), num_windows=32, batch_tokens=32768
        ),
      ),
      arms=(ArmConfig(name="dense", rope=NTK8), *PATTERNS, *RECIPES),
      learning_rates=(3e-3, 6e-3),
      seeds=(0,),
      validation_windows=16,
      looks=4,
      look_windows=8,
      tasks=TasksConfig(
        names=("passkey", "niah_single_1", "niah_single_2", "copy"),
        context_lens=(8192, 16384, 32768),
        num_samples=50,
      ),
      quick=QuickConfig(arms=("fixed",), steps=2, num_windows=2, num_samples=2),
    )
  )
