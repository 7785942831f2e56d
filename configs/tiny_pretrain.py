"""Pretrains the embedded model: 4.7 M parameters, 256 tokens, on books.

Hardware: one NVIDIA H200, or any device with more time. Command and result:
scca_jax/assets/README.md; in short

    scca pretrain --config=configs/tiny_pretrain.py \
      --data=books.bin --config.data.tokenizer=books.model
"""

from experiments.shared.config import (
  EvaluationConfig,
  PretrainConfig,
  TrainingConfig,
  to_config_dict,
)
from scca_jax.training import OptimizerConfig


def get_config():
  """Returns the settings of the run."""
  return to_config_dict(
    PretrainConfig(
      save_dtype="float16",
      optimizer=OptimizerConfig(
        learning_rate=3e-3,
        schedule="cosine",
        warmup_steps=200,
        final_fraction=0.02,
        weight_decay=0.1,
      ),
      training=TrainingConfig(
        seq_len=256,
        batch_size=128,
        steps=14000,
        dtype="bfloat16",
        loss_chunk=256,
        log_every=100,
        checkpoint_every=4000,
        keep_checkpoints=1,
      ),
      evaluation=EvaluationConfig(
        context_lens=(256, 512, 1024), num_windows=64
      ),
    )
  )
