"""LLaMA2-7B from 4k to 8k on one H200: llama2_7b_8k, for speed.

It differs in using bfloat16 and more memory: no large product is computed twice
for the backward pass, layers are compiled one by one (25 s instead of 9), and
MLP and loss are computed in large pieces. Hardware: one GPU of 80 GB, Ampere or
later. Command: `scca finetune --config=configs/llama2_7b_8k_h200.py
--model=llama2-7b/ --data=train.bin --config.data.test=test.bin`.
Expected: the tokens per second and the memory of
experiments/results/llama2_7b/step_h200.md. It was not run with LLaMA2's
weights.

`--config.training.unroll_layers=False` takes 5 GiB less and 6 % longer. With
it, `--config.training.remat=layer` recomputes each layer: 20 GiB less, 27 %
longer. With both, `--config.training.mlp_chunk=2048` takes 0.3 GiB less and 4 %
longer.
"""

from configs import llama2_7b_8k


def get_config():
  """Returns the settings of the run."""
  config = llama2_7b_8k.get_config()
  config.training.dtype = "bfloat16"
  config.training.param_dtype = "bfloat16"
  config.training.remat = "projections"
  config.training.unroll_layers = True
  config.training.offload_optimizer = False
  config.training.mlp_chunk = None
  config.training.loss_chunk = 1024
  return config
