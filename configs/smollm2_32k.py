"""SmolLM2-135M from 8k to 32k with a recipe from a study of this model.

Claim (experiments/results/ablation_smollm2): of all patterns with a third of
dense attention's pairs, this one comes nearest to dense attention, and it gains
from the longer context. No key beyond the pretrained length is seen until the
last ninth of the steps, which are dense. Everything is as in the study's last
stage, 16 million tokens.

Hardware: one GPU with bfloat16, an A100 or later; on an H100, that another run
shared, it took 4 minutes. Command, with the user's own weights and data: `scca
finetune --config=configs/smollm2_32k.py --model=smollm2/ --data=train.bin
--config.data.test=test.bin`.
Expected: a perplexity of 17.7 in the last quarter of 32,768 tokens, on books
that are not trained on (23.1 for the untuned model at 8,192). The step compiles
for an A100 to 13.4 GiB (`scca plan_memory --config=configs/smollm2_32k.py
--gpu=a100-40gb`).
"""

from experiments.shared.config import (
  EvaluationConfig,
  FinetuneConfig,
  RopeConfig,
  TrainingConfig,
  to_config_dict,
)
from scca_jax.training import OptimizerConfig


def get_config():
  """Returns the settings of the run."""
  return to_config_dict(
    FinetuneConfig(
      model="smollm2-135m",
      rope=RopeConfig(kind="ntk", factor=8.0),
      tuning="full",
      pattern="local(chunk_size=8192)",
      optimizer=OptimizerConfig(
        learning_rate=3e-4, schedule="cosine", warmup_steps=10
      ),
      training=TrainingConfig(
        seq_len=32768,
        batch_size=4,
        num_micro_batches=4,
        steps=120,
        dense_fraction=1 / 9,
        dtype="bfloat16",
        remat="projections",
      ),
      evaluation=EvaluationConfig(
        context_lens=(8192, 32768), num_windows=32, batch_tokens=32768
      ),
    )
  )
