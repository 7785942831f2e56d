"""Measures losses and task scores of several models at once.

Losses are kept by window and position, in equal blocks of positions, so that
arms can be compared window by window and by the context a token has. A block
has the mean loss of its predictions; the first block has one fewer, because the
first token is not predicted.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.ablation.pairs import Weights
from scca_jax import perplexity, tasks
from scca_jax.llama import Execution
from scca_jax.token_file import TokenFile
from scca_jax.tokenizer import Tokenizer

# Blocks of positions in a window.
NUM_BLOCKS = 16
_QUARTER = NUM_BLOCKS // 4


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
  """Windows that all arms are measured on.

  Attributes:
    ids: `[windows, context_len]` int32.
    documents: `[windows]` the document that each belongs to.
    block: Tokens of a block of positions.
  """

  ids: np.ndarray
  documents: np.ndarray
  block: int

  @classmethod
  def read(
    cls, tokens: TokenFile, context_len: int, num_windows: int | None
  ) -> "Windows":
    """Returns windows of the "longlora" protocol.

    Raises:
      ValueError: The text is too short, or the length is not divisible into
        blocks.
    """
    if context_len % NUM_BLOCKS:
      raise ValueError(
        f"context length {context_len} must be divisible by {NUM_BLOCKS}: a"
        " study keeps losses in that many blocks of positions."
      )
    found = perplexity.read_windows(tokens, context_len, num_windows)
    return cls(*found, context_len // NUM_BLOCKS)

  def short(self, short_len: int) -> "Windows":
    """Returns windows with little more than `short_len` tokens of context.

    Each old window is replaced by its `perplexity.gain_windows`, whose last
    blocks together are the tokens of its last quarter.

    Raises:
      ValueError: The quarter cannot be cut that way.
    """
    context_len = self.ids.shape[1]
    starts, length = perplexity.gain_windows(context_len, short_len)
    block = length - short_len
    if short_len % block or (context_len // 4) % block:
      raise ValueError(
        f"the pretrained length {short_len} and a quarter of {context_len} must"
        f" be divisible by {block} tokens, for the gain from context."
      )
    ids = self.ids[:, starts[:, None] + np.arange(length)]
    return Windows(
      ids.reshape(-1, length), np.repeat(self.documents, len(starts)), block
    )


@functools.partial(
  jax.jit, static_argnames=("graphdef", "block", "execution", "loss_chunk")
)
def _pair_losses(
  params: nnx.State,
  frozen: nnx.State,
  tokens: jax.Array,
  *,
  graphdef: nnx.GraphDef,
  block: int,
  execution: Execution,
  loss_chunk: int,
) -> jax.Array:
  """Returns the mean loss of each block, `[pairs, windows, blocks]`."""

  def of_pair(params):
    found = perplexity.window_losses(
      nnx.merge_state(params, frozen),
      tokens,
      graphdef=graphdef,
      patterns=None,
      execution=execution,
      loss_chunk=loss_chunk,
    )
    blocks = jnp.pad(found, ((0, 0), (1, 0)))
    blocks = blocks.reshape(len(tokens), -1, block)
    count = np.full((1, blocks.shape[1]), block, np.float32)
    count[0, 0] -= 1
    return blocks.sum(axis=-1) / count

  return jax.vmap(of_pair)(params)


def losses(
  weights: Weights,
  windows: Windows,
  *,
  execution: Execution,
  batch_tokens: int,
  loss_chunk: int,
) -> np.ndarray:
  """Returns dense attention's losses, `[pairs, windows, blocks]` float32.

  Args:
    weights: The models.
    windows: The windows.
    execution: How the layers are computed.
    batch_tokens: Tokens of windows that each model reads at once.
    loss_chunk: Tokens of a window whose logits are held at once.
  """
  count, context_len = windows.ids.shape
  size = min(count, max(1, batch_tokens // context_len))
  # A short last batch is padded, so that all batches have the same shape.
  padded = np.pad(windows.ids, ((0, -count % size), (0, 0)))
  found = [
    _pair_losses(
      weights.params,
      weights.frozen,
      padded[begin : begin + size],
      graphdef=weights.graphdef,
      block=windows.block,
      execution=execution,
      loss_chunk=loss_chunk,
    )
    for begin in range(0, count, size)
  ]
  return np.concatenate(jax.device_get(found), axis=1)[:, :count]


def mean(blocks: np.ndarray, context_len: int) -> np.ndarray:
  """Returns mean losses of whole windows, `[...]`, from `[..., NUM_BLOCKS]`."""
  counts = np.full(NUM_BLOCKS, context_len // NUM_BLOCKS)
  counts[0] -= 1
  return np.average(np.asarray(blocks, np.float64), axis=-1, weights=counts)


def last_quarter(blocks: np.ndarray) -> np.ndarray:
  """Returns the mean loss of the last quarter, `[...]`."""
  return np.asarray(blocks, np.float64)[..., -_QUARTER:].mean(axis=-1)


@functools.lru_cache(maxsize=64)
def _samples(
  name: str, vocabulary: Tokenizer, context_len: int, num_samples: int
) -> list[tasks.Sample]:
  return list(tasks.get(name).samples(vocabulary, context_len, num_samples, 0))


def score_task(
  model: Any,
  name: str,
  vocabulary: Tokenizer,
  context_len: int,
  num_samples: int,
  *,
  execution: Execution,
  batch_tokens: int,
) -> dict[str, Any]:
  """Returns a model's score on a task, as JSON types; see `tasks.Score`."""
  found = tasks.score(
    model,
    _samples(name, vocabulary, context_len, num_samples),
    context_len=context_len,
    batch_size=max(1, batch_tokens // context_len),
    execution=execution,
  )
  return dataclasses.asdict(found)
