"""Extends the embedded 4.7 M model from 256 to 1,024 tokens on a CPU.

Hardware: 2 CPU cores, under 4 minutes. Command:
`scca finetune`.
Expected: experiments/results/tiny/README.md.

Pattern, rope scaling and learning rate are the best of a study of this model
(experiments/results/ablation_tiny). A model this small needs a larger adapter
than the paper's rank of 8, with the same factor alpha / rank, and a higher
learning rate to finish in minutes. Its embeddings are not trained, as so few
tokens would only make them worse.
"""

from experiments.shared.config import (
  EvaluationConfig,
  FinetuneConfig,
  RopeConfig,
  TrainingConfig,
  to_config_dict,
)
from scca_jax.lora import LoraConfig
from scca_jax.training import OptimizerConfig


def get_config():
  """Returns the settings of the run."""
  return to_config_dict(
    FinetuneConfig(
      rope=RopeConfig(kind="yarn"),
      lora=LoraConfig(rank=64, alpha=128.0, train_embeddings=False),
      pattern="s2",
      optimizer=OptimizerConfig(
        learning_rate=1e-3,
        schedule="cosine",
        warmup_steps=10,
        final_fraction=0.1,
      ),
      training=TrainingConfig(
        seq_len=1024,
        batch_size=2,
        steps=175,
        checkpoint_every=50,
        log_every=1,
      ),
      evaluation=EvaluationConfig(
        context_lens=(256, 512, 1024), num_windows=24
      ),
    )
  )
