"""SmolLM2-135M from 8k to 32k: the recipe of llama2_7b_8k on a small model.

Claim: none of the paper's; the smallest model that transformers' users know, at
a length where dense attention is most of the work. Chunks are a quarter of the
length. Its embedding is also the output head.

Hardware: one GPU with bfloat16, an A100 or later. Command, with the user's own
weights and data: `scca finetune
--config=configs/smollm2_32k.py --model=smollm2/ --data=train.bin
--config.data.test=test.bin`.
Expected: the step compiles for an A100 to 2.4 GiB (`scca
plan_memory --config=configs/smollm2_32k.py --gpu=a100-40gb`). It
was not run with SmolLM2's weights.
"""

from configs import tinyllama_8k


def get_config():
  """Returns the settings of the run."""
  config = tinyllama_8k.get_config()
  config.model = "smollm2-135m"
  config.pattern = "scca_fixed(chunk_size=8192)"
  training = config.training
  training.seq_len = 32768
  training.batch_size, training.num_micro_batches = 16, 16
  config.evaluation.context_lens = (8192, 32768)
  return config
