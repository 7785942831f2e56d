"""TinyLlama-1.1B from 2k to 8k: the recipe of llama2_7b_8k on a small model.

Claim: none of the paper's; a model that anyone can download, on one GPU.

Hardware: one GPU with bfloat16, an A100 or later, and 7 GiB of its memory.
Command, with the user's own weights and data:
`scca finetune --config=configs/tinyllama_8k.py
--model=tinyllama/ --data=train.bin --config.data.test=test.bin`.
Expected: the step compiles for an A100 to 6.4 GiB (`scca
plan_memory --config=configs/tinyllama_8k.py --gpu=a100-40gb`). It
was not run with TinyLlama's weights.
"""

from configs import llama2_7b_8k


def get_config():
  """Returns the settings of the run."""
  config = llama2_7b_8k.get_config()
  config.model = "tinyllama-1.1b"
  training = config.training
  training.batch_size, training.num_micro_batches = 64, 32
  training.dtype = training.param_dtype = "bfloat16"
  training.remat, training.offload_optimizer = "layer", False
  training.mlp_chunk = None
  training.loss_chunk = 1024
  config.evaluation.context_lens = (2048, 8192)
  return config
