"""LLaMA2-7B from 4k to 32k on one V100: differs from llama2_7b_8k in length.

Claim: the step of 32,768 tokens fits the same card. Hardware and command are as
there, with this config and 18 GiB of the host's memory. Expected: the step
compiles for that card to 17.4 GiB (`scca plan_memory
--config=configs/llama2_7b_32k.py --gpu=v100-32gb`); see
experiments/results/llama2_7b. It was not run on a V100, nor with LLaMA2's
weights.
"""

from configs import llama2_7b_8k


def get_config():
  """Returns the settings of the run."""
  config = llama2_7b_8k.get_config()
  config.pattern = "scca_fixed(chunk_size=8192)"
  config.training.seq_len = 32768
  config.evaluation.context_lens = (4096, 32768)
  return config
