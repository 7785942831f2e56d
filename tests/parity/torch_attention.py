"""The attention patterns as a PyTorch user would write them.

Written from the papers' descriptions, not from `scca_jax.patterns`: tensors are
rolled, folded into chunks or strided, and masked by triangles, windows or the
positions that were rolled with the keys. Nothing here evaluates a relation over
all pairs of positions.

Every function takes `query` `[batch, seq, heads, head_dim]`, `key` and `value`
`[batch, seq, kv_heads, head_dim]`, and returns the output, like `query`, and
the log-sum-exp of the scores, `[batch, seq, heads]`, -inf for a query that sees
no key. Inside, single heads are `[batch, seq, head_dim]`.

Sources: SCCA and SDA, arXiv 2312.07305; S2-Attn, arXiv 2309.12307 and the two
forward functions of its published code; LongNet, arXiv 2307.02486; DiNAT, arXiv
2209.15001.
"""

import functools
import math

import torch
import torch.nn.functional as F

# The position of a slot that holds no key: later than every query.
_NO_KEY = 2**30


def _softmax_attention(query, key, value, mask):
  """Softmax attention under a mask; a row without keys gives 0 and -inf.

  Args:
    query: `[..., n, head_dim]`.
    key: `[..., m, head_dim]`.
    value: Like `key`.
    mask: What is seen, bool, broadcasting to `[..., n, m]`.
  """
  scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
  served = mask.any(dim=-1)
  # Finite everywhere, so that no gradient is NaN: rows without keys are even
  # rows of this number, and their result is replaced.
  scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min / 2)
  output = torch.softmax(scores, dim=-1) @ value
  log_sum = torch.logsumexp(scores, dim=-1)
  output = torch.where(served[..., None], output, torch.zeros_like(output))
  return output, log_sum.masked_fill(~served, -torch.inf)


def _causal(length, device):
  return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _by_head(attend):
  """Makes attention of all heads from that of one, repeating key heads (GQA).

  `attend(query, key, value, head, num_heads, ...)` is given single heads,
  `[batch, seq, head_dim]`.
  """

  @functools.wraps(attend)
  def attend_all(query, key, value, *args, **kwargs):
    num_heads = query.shape[2]
    repeats = num_heads // key.shape[2]
    key = key.repeat_interleave(repeats, dim=2)
    value = value.repeat_interleave(repeats, dim=2)
    outputs, log_sums = zip(
      *(
        attend(
          query[:, :, head],
          key[:, :, head],
          value[:, :, head],
          head,
          num_heads,
          *args,
          **kwargs,
        )
        for head in range(num_heads)
      ),
      strict=True,
    )
    return torch.stack(outputs, dim=2), torch.stack(log_sums, dim=2)

  return attend_all


def _pad_seq(x, length, value=0.0):
  """Pads `[batch, seq, ...]` at its end."""
  return F.pad(x, (0, 0) * (x.ndim - 2) + (0, length - x.shape[1]), value=value)


def _round_up(length, multiple):
  return -(-length // multiple) * multiple


# One head, keys rolled and chunks folded into the batch.


def _fold(x, chunk_size, dilation):
  """Folds `[batch, seq, ...]` to `[batch, chunks, dilation, slots, ...]`.

  The sequence is padded to whole chunks before. Slots of one residue modulo the
  dilation are neighbours afterwards: a strided view.
  """
  batch, length, *rest = x.shape
  x = x.reshape(batch * (length // chunk_size), chunk_size, *rest)
  x = _pad_seq(x, _round_up(chunk_size, dilation))
  x = x.unflatten(1, (-1, dilation)).transpose(1, 2)
  return x.unflatten(0, (batch, -1))


def _unfold(x, chunk_size, length):
  """Undoes `_fold`."""
  x = x.transpose(2, 3).flatten(2, 3)[:, :, :chunk_size]
  return x.flatten(1, 2)[:, :length]


def _roll_attention(
  query, key, value, shift, *, chunk_size=None, dilation=1, window=None
):
  """Keys and values rolled towards the end, masked by their true positions.

  The positions are rolled with the keys; those that wrapped round are no keys.
  Padding makes room for slots of a short last chunk.
  """
  length = query.shape[1]
  chunk_size = length if chunk_size is None else chunk_size
  if chunk_size == length:
    # A whole sequence has no end that keys could move beyond.
    chunk_size += shift
  padded = _round_up(length, chunk_size)
  positions = torch.arange(padded, device=query.device)[None, :, None]
  key_positions = positions.masked_fill(positions >= length, _NO_KEY)
  query, key, value = (_pad_seq(x, padded) for x in (query, key, value))
  key, value, key_positions = (
    torch.roll(x, shift % padded, dims=1) for x in (key, value, key_positions)
  )
  key_positions = key_positions.masked_fill(positions < shift, _NO_KEY)
  fold = functools.partial(_fold, chunk_size=chunk_size, dilation=dilation)
  # Slots that folding adds are of no query and hold no key.
  query_slots, key_positions = fold(positions + 1), fold(key_positions + 1)
  mask = (key_positions > 0) & (key_positions.transpose(-1, -2) <= query_slots)
  mask = mask & (key_positions.transpose(-1, -2) > 0)
  if window is not None:
    slots = torch.arange(mask.shape[-1], device=query.device)
    distance = slots[:, None] - slots[None, :]
    mask = mask & (distance >= 0) & (distance < window)
  output, log_sum = _softmax_attention(
    fold(query), fold(key), fold(value), mask
  )
  return (
    _unfold(output, chunk_size, length),
    _unfold(log_sum[..., None], chunk_size, length)[..., 0],
  )
