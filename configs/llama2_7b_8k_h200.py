"""LLaMA2-7B from 4k to 8k on one H200: llama2_7b_8k, for speed.

It differs in bfloat16, and in memory spent where there is plenty: what the
backward pass needs stays on the device, and MLP and loss are computed in large
pieces. Hardware: one H200, or another GPU of 40 GB or more from Ampere on.
Command:
`python -m experiments.finetune --config=configs/llama2_7b_8k_h200.py
--model=llama2-7b/ --data=train.bin --config.data.test=test.bin`.
Expected: the tokens a second and the memory of
experiments/results/llama2_7b/step_h200.md. It was not run with LLaMA2's
weights.

`--config.training.remat=attention` runs the attention kernels forward once
instead of twice, 9 ms of 591 for 1.8 GiB more at 8,192 tokens; `projections`
runs no large product forward twice, a quarter of the operations less, and
compiles to 39 GiB (not yet run); `none` compiles to 73 GiB, and to more
operations than `layer`. `--config.training.mlp_chunk=2048` takes 0.3 GiB less
and 4 % longer.
"""

from configs import llama2_7b_8k


def get_config():
  """Returns the settings of the run."""
  config = llama2_7b_8k.get_config()
  config.training.dtype = "bfloat16"
  config.training.param_dtype = "bfloat16"
  config.training.remat = "layer"
  config.training.offload_optimizer = False
  config.training.mlp_chunk = None
  config.training.loss_chunk = 1024
  return config
