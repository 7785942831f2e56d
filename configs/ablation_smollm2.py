"""Which pattern and which recipe take SmolLM2-135M from 8k to 32k?

Hardware: one H100, in stages that fit a call of ten minutes each; the same
command resumes. Commands, with the user's own weights and text, and results:
experiments/results/ablation_smollm2.
`scca ablate --dry_run --config=configs/ablation_smollm2.py` lists the arms with
their pairs.

`train.bin` ends with the ten books for validation; `verdict.bin` has ten
others. The recipe is searched one factor at a time: rope scaling with two
patterns, then the rest with the best scaling. The patterns have a third of
dense attention's pairs, or as close as possible.
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

# The scaling with which the other factors, and then the patterns, are tried.
ROPE = RopeConfig(kind="ntk", factor=8.0)
RATE = 3e-3
# The best of RECIPES tunes all parameters.
FULL_RATE = 3e-4
# Tried for dense attention and the best three patterns.
FULL_RATES = (1e-4, FULL_RATE, 1e-3)
SWEPT = ("pose", "s2-dense-eighth", "s2")

# Nothing tuned: the model as it is, and rope scaling by itself.
UNTUNED = (
  ArmConfig(name="untuned", tuning="none", rope=RopeConfig(kind=None)),
  ArmConfig(
    name="untuned-linear4", tuning="none", rope=RopeConfig(kind="linear")
  ),
  ArmConfig(name="untuned-scaled", tuning="none", rope=ROPE),
)
# 4 million tokens each, half of what the patterns get.
ROPES = tuple(
  ArmConfig(
    name=f"{pattern.removeprefix('scca_')}-{kind}{factor}",
    pattern=pattern,
    rope=RopeConfig(kind=kind, factor=float(factor)),
    steps_fraction=0.5,
    learning_rates=(RATE,),
  )
  for pattern in ("scca_fixed", "s2")
  for kind, factor in (
    ("linear", 4),
    ("yarn", 4),
    ("yarn", 8),
    ("ntk", 4),
    ("ntk", 8),
    ("ntk", 12),
    ("ntk", 16),
  )
)
_S2 = ArmConfig(
  name="s2", pattern="s2", rope=ROPE, steps_fraction=0.5, learning_rates=(RATE,)
)
RECIPES = tuple(
  dataclasses.replace(_S2, name=f"s2-{name}", **changes)
  for name, changes in {
    "rates": {"learning_rates": (1e-3, 1e-2)},
    "rank8": {"rank": 8},
    "rank128": {"rank": 128},
    "adapters-alone": {"train_norms": False},
    "embeddings": {"train_embeddings": True, "embedding_ratio": 0.1},
    "lora-plus": {"lora_b_ratio": 16.0, "learning_rates": (3e-4, 1e-3)},
    "full": {"tuning": "full", "learning_rates": (1e-4, FULL_RATE, 1e-3)},
  }.items()
)
# 8 million tokens each, at a third of the pairs.
PATTERNS = tuple(
  ArmConfig(
    name=name,
    pattern=pattern,
    rope=ROPE,
    tuning="full",
    learning_rates=FULL_RATES if name in SWEPT else (FULL_RATE,),
    **changes,
  )
  for name, pattern, changes in (
    ("fixed", "scca_fixed", {}),
    ("s2", "s2(chunk_size=12288)", {}),
    ("sliding", "sliding(window=6016)", {}),
    ("flow", "scca_flow(boundary='local')", {}),
    ("longmixed", "longmixed(chunk_size=6144)", {}),
    ("near", "scca_near(chunk_size=5461)", {}),
    ("near-sinks", "scca_near(chunk_size=5461, sinks=4)", {}),
    ("s2-dense-eighth", "s2", {"dense_fraction": 0.125}),
    (
      "s2-dense-layers",
      "layers(s2(chunk_size=8192), dense=(3, 11, 19, 27))",
      {},
    ),
    ("pose", "dense", {"skip_window": 8192}),
    # As many dense steps as fit into the seconds of `fixed`, about half.
    ("dense-same-seconds", "dense", {"steps_fraction": 0.5}),
    # Each token sees 8k, the length of pretraining.
    ("dense-8k", "local(chunk_size=8192)", {}),
    # Added after registration: dense steps at the end had helped S2.
    (
      "dense-8k-dense-ninth",
      "local(chunk_size=8192)",
      {"dense_fraction": 1 / 9},
    ),
  )
)
# Added after registration: x12 found more passkeys in stage 1.
PATTERNS += (
  dataclasses.replace(
    next(arm for arm in PATTERNS if arm.name == "s2-dense-eighth"),
    name="s2-dense-eighth-ntk12",
    rope=RopeConfig(kind="ntk", factor=12.0),
    learning_rates=(FULL_RATE,),
  ),
)
# The best that adapters can do, for those who cannot tune all parameters.
LORA = tuple(
  ArmConfig(
    name=f"{name}-lora",
    pattern=pattern,
    rope=ROPE,
    train_embeddings=True,
    embedding_ratio=0.1,
    dense_fraction=dense_fraction,
    learning_rates=(RATE,),
  )
  for name, pattern, dense_fraction in (
    ("dense", "dense", 0.0),
    ("s2-dense-eighth", "s2", 0.125),
  )
)


def get_config():
  """Returns the settings of the study."""
  return to_config_dict(
    AblationConfig(
      run=FinetuneConfig(
        model="smollm2-135m",
        lora=LoraConfig(rank=32, alpha=64.0, train_embeddings=False),
        data=DataConfig(held_out=10),
        optimizer=OptimizerConfig(
          schedule="cosine", warmup_steps=10, final_fraction=0.1
        ),
        training=TrainingConfig(
          seq_len=32768,
          batch_size=4,
          num_micro_batches=4,
          steps=60,
          dtype="bfloat16",
          remat="projections",
        ),
        evaluation=EvaluationConfig(
          context_lens=(8192, 32768), num_windows=32, batch_tokens=32768
        ),
      ),
      arms=(
        ArmConfig(
          name="dense",
          rope=ROPE,
          tuning="full",
          learning_rates=FULL_RATES,
        ),
        *UNTUNED,
        *PATTERNS,
        *LORA,
        *ROPES,
        *RECIPES,
      ),
      learning_rates=(RATE,),
      seeds=(0,),
      validation_windows=32,
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
