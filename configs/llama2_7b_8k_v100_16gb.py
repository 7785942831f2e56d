"""LLaMA2-7B from 4k to 8k on a V100 of 16 GB: llama2_7b_8k on an int8 base.

Claim: with the frozen matrices in int8 the recipe fits the smaller card.
Trained parameters are float32 as there, and the adapter compensates for the
rounding; it is used with the same int8 base.

Hardware: one V100 of 16 GB, float16, and 6 GiB of the host's memory. Command:
as for llama2_7b_8k, with this config. Expected: the step compiles for that card
to 10.0 GiB (`scca plan_memory
--config=configs/llama2_7b_8k_v100_16gb.py --gpu=v100-16gb`); see
experiments/results/llama2_7b. It was not run on a V100, nor with LLaMA2's
weights.
"""

from configs import llama2_7b_8k


def get_config():
  """Returns the settings of the run."""
  config = llama2_7b_8k.get_config()
  config.training.quantize = "int8"
  return config
