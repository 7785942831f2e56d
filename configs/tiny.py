"""Extends the embedded 4.7 M model from 256 to 1,024 tokens on a CPU.

Hardware: 2 CPU cores. Command: `python -m experiments.finetune`.
"""

from experiments.config import (
  EvaluationConfig,
  FinetuneConfig,
  TrainingConfig,
  to_config_dict,
)
from scca_jax.training import OptimizerConfig


def get_config():
  """Returns the settings of the run."""
  return to_config_dict(
    FinetuneConfig(
      optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10),
      training=TrainingConfig(
        seq_len=1024,
        batch_size=4,
        steps=75,
        checkpoint_every=25,
        log_every=1,
      ),
      evaluation=EvaluationConfig(
        context_lens=(256, 512, 1024), num_windows=32
      ),
    )
  )
