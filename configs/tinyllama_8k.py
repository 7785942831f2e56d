"""TinyLlama-1.1B from 2k to 8k on one GPU, with adapters.

Claim: none of the paper's; a model that anyone can download. Rope scaling and
pattern are those of configs/smollm2_32k.py, which were best on a smaller model
at the same ratio of lengths.

Hardware: one GPU with bfloat16, an A100 or later, and 5 GiB of its memory.
Command, with the user's own weights and data:
`scca finetune --config=configs/tinyllama_8k.py
--model=tinyllama/ --data=train.bin --config.data.test=test.bin`.
Expected: the step compiles for an A100 to 4.8 GiB (`scca
plan_memory --config=configs/tinyllama_8k.py --gpu=a100-40gb`). It
was not run with TinyLlama's weights.
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
      model="tinyllama-1.1b",
      rope=RopeConfig(kind="ntk", factor=8.0),
      pattern="local(chunk_size=2048)",
      lora=LoraConfig(rank=32, alpha=64.0, train_embeddings=False),
      optimizer=OptimizerConfig(
        learning_rate=1e-3, schedule="cosine", warmup_steps=20
      ),
      training=TrainingConfig(
        seq_len=8192,
        batch_size=16,
        num_micro_batches=8,
        steps=500,
        dense_fraction=1 / 9,
        dtype="bfloat16",
        param_dtype="bfloat16",
        remat="layer",
        loss_chunk=1024,
        checkpoint_every=100,
      ),
      evaluation=EvaluationConfig(context_lens=(2048, 8192)),
    )
  )
