"""LLaMA2-7B from 4k to 32k on one V100: differs from llama2_7b_8k in length.

Hardware, command and what was not run are as there, with this config. Expected:
`python -m experiments.plan_memory --config=configs/llama2_7b_32k.py
--gpu=v100-32gb`; experiments/results/memory.
"""

from configs import llama2_7b_8k


def get_config():
  """Returns the settings of the run."""
  config = llama2_7b_8k.get_config()
  config.pattern.chunk_size = 8192
  config.training.seq_len = 32768
  config.evaluation.context_lens = (4096, 32768)
  return config
