"""LLaMA2-7B on sequences of 1,048,576 tokens on one V100, a segment at a time.

Claim: with chunks of 2,048 a step on a million tokens fits the memory that jax
has on a V100 of 32 GB: 64 segments go through the layers one after another, and
hand on half a chunk of keys and values for half the heads. Adapters alone are
trained. A sequence is not a context: through all 32 layers a token reaches back
by at most 66,559 tokens, a chunk a layer and half a chunk more.

Hardware: one V100 of 32 GB, float16, and 16 GiB of the host's memory. Command,
with the user's own weights and data: `scca finetune
--config=configs/llama2_7b_1m.py --model=llama2-7b/ --data=train.bin
--config.data.test=test.bin`. Expected: the step compiles for that card to 20.4
GiB (`scca plan_memory --config=configs/llama2_7b_1m.py --gpu=v100-32gb`), or to
19.3 with `--config.training.mlp_chunk=1024 --config.training.loss_chunk=256`.
No V100 has run it; an H100 did within that card's pool, in bfloat16, in 112 s,
of which pinning the host's memory took 11: see experiments/results/one_million.
"""

from configs import llama2_7b_8k


def get_config():
  """Returns the settings of the run."""
  config = llama2_7b_8k.get_config()
  config.lora.train_embeddings = False
  config.lora.train_norms = False
  training = config.training
  training.seq_len = 1 << 20
  training.batch_size = training.num_micro_batches = 1
  training.remat = "layer"
  training.mlp_chunk = 16384
  training.loss_chunk = 1024
  training.segment_len = 16384
  training.offload_segments = True
  training.offload_optimizer = False
  config.evaluation.context_lens = (4096,)
  return config
