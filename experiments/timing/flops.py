"""Floating-point operations of a training step, by arithmetic."""

from scca_jax.llama_config import PROJECTIONS, LlamaConfig
from scca_jax.lora import LoraConfig


def step_flops(
  config: LlamaConfig, adapter: LoraConfig, num_pairs: int, num_tokens: int
) -> dict[str, float]:
  """Returns the floating-point operations of a step.

  A product with `n` weights takes `2 n` operations per token forward, as many
  for the gradient of its input, and as many for the weights' gradient if they
  are trained. Attention takes two products of `2 head_dim` operations per seen
  pair forward, and four backward. Lookups, norms and the optimiser are not
  counted.

  Args:
    config: Sizes of the model.
    adapter: Determines what is trained.
    num_pairs: Pairs that attention sees, over sequences, heads and layers.
    num_tokens: Tokens of the step.

  Returns:
    `model`: the operations that the mathematics requires. `with_remat`: the
    same with each layer, but not the head, computed forward again for the
    backward pass.
  """
  shapes = {name: config.projection_shape(name) for name in PROJECTIONS}
  frozen = config.num_layers * sum(a * b for a, b in shapes.values())
  adapted = (
    config.num_layers
    * adapter.rank
    * sum(sum(shapes[name]) for name in adapter.targets)
  )
  head = config.hidden_size * config.vocab_size
  attention = 4 * config.head_dim * num_pairs
  forward = 2 * num_tokens * (frozen + adapted) + attention
  trained = adapted + (head if adapter.train_embeddings else 0)
  head_forward = 2 * num_tokens * head
  model = (
    forward
    + head_forward
    + 2 * num_tokens * (frozen + adapted + head + trained)
    + 2 * attention
  )
  return {"model": float(model), "with_remat": float(model + forward)}
