"""LLaMA2-7B from 4k to 8k on one V100, as in the SCCA paper.

Claim (arXiv 2312.07305): SCCA with Position Interpolation and LoRA extends
LLaMA2-7B from 4k to 8k on a single V100. The recipe is LongLoRA's: Position
Interpolation, rank 8 on the attention projections, embeddings and norms trained
too, AdamW at 2e-5, 1,000 steps of 64 sequences. Shift and pattern are this
project's choices. On the two small models that were studied, other recipes are
better (experiments/results/ablation_smollm2).

Hardware: one V100 of 32 GB, float16, and 6 GiB of the host's memory for
offloaded arrays. Command, with the user's own weights and data:
`scca finetune --config=configs/llama2_7b_8k.py
--model=llama2-7b/ --data=train.bin --config.data.test=test.bin`.
Expected: the step compiles for that card to 16.0 GiB, as `scca
plan_memory --config=configs/llama2_7b_8k.py --gpu=v100-32gb` says;
see experiments/results/llama2_7b. It was not run on a V100, nor with LLaMA2's
weights.
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
      model="llama2-7b",
      rope=RopeConfig(kind="linear"),
      lora=LoraConfig(rank=8, alpha=16.0),
      pattern="scca_fixed(chunk_size=2048)",
      optimizer=OptimizerConfig(learning_rate=2e-5),
      training=TrainingConfig(
        seq_len=8192,
        batch_size=64,
        num_micro_batches=64,
        steps=1000,
        dtype="float16",
        param_dtype="float16",
        remat="offload",
        offload_optimizer=True,
        mlp_chunk=1024,
        loss_chunk=256,
        checkpoint_every=100,
      ),
      evaluation=EvaluationConfig(context_lens=(4096, 8192)),
    )
  )
