"""The attention patterns as a PyTorch user would write them.

Written from the papers' descriptions, not from `scca_jax.patterns`: tensors are
rolled, split, strided and folded into chunks, and masked by triangles or by the
positions that were rolled with the keys. No relation is evaluated over all
pairs of positions.

Every function takes `query` `[batch, seq, heads, head_dim]` and `key` and
`value` `[batch, seq, kv_heads, head_dim]`. It returns the output, like `query`,
and the log-sum-exp of the scores, `[batch, seq, heads]`: 0 and -inf for a query
that sees no key.

Sources: SCCA and SDA are arXiv 2312.07305; S2-Attn is arXiv 2309.12307 and its
published code; LongNet is arXiv 2307.02486; DiNAT is arXiv 2209.15001.
"""

import functools
import itertools
import math

import torch
import torch.nn.functional as F

# The position of a slot that holds no key: it is later than every query.
_NO_KEY = 2**30


def _softmax_attention(query, key, value, mask):
  """Returns softmax attention under a mask, and the log-sum-exp.

  Args:
    query: `[..., n, head_dim]`.
    key: `[..., m, head_dim]`.
    value: Like `key`.
    mask: What is seen, bool, broadcasting to `[..., n, m]`.
  """
  scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
  served = mask.any(dim=-1)
  # A finite number: the softmax of a row of -inf would have NaN gradients.
  scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min / 2)
  output = torch.softmax(scores, dim=-1) @ value
  log_sum = torch.logsumexp(scores, dim=-1)
  return (
    output.masked_fill(~served[..., None], 0.0),
    log_sum.masked_fill(~served, -torch.inf),
  )


def _triangle(length):
  return torch.ones(length, length, dtype=torch.bool).tril()


def _repeat_heads(x, num_heads):
  """Returns key or value heads repeated for each query head (GQA)."""
  return x.repeat_interleave(num_heads // x.shape[2], dim=2)


def _pad(x, length, value=0):
  """Returns `[batch, seq, ...]` padded at its end to `length`."""
  widths = (0, 0) * (x.ndim - 2) + (0, length - x.shape[1])
  return F.pad(x, widths, value=value)


def _round_up(length, multiple):
  return -(-length // multiple) * multiple


def _over_heads(attend, query, key, value):
  """Returns attention of all heads from that of one.

  Args:
    attend: Called with the head's index and its `[batch, seq, head_dim]`
      query, key and value; returns `[batch, seq, head_dim]` and `[batch, seq]`.
    query: `[batch, seq, heads, head_dim]`.
    key: `[batch, seq, kv_heads, head_dim]`.
    value: Like `key`.
  """
  num_heads = query.shape[2]
  key, value = (_repeat_heads(x, num_heads) for x in (key, value))
  heads = [
    attend(h, query[:, :, h], key[:, :, h], value[:, :, h])
    for h in range(num_heads)
  ]
  outputs, log_sums = zip(*heads, strict=True)
  return torch.stack(outputs, dim=2), torch.stack(log_sums, dim=2)


def dense(query, key, value):
  """Returns PyTorch's own causal attention, and the log-sum-exp."""
  num_heads = query.shape[2]
  key, value = (_repeat_heads(x, num_heads) for x in (key, value))
  query, key, value = (x.transpose(1, 2) for x in (query, key, value))
  output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
  _, log_sum = _softmax_attention(query, key, value, _triangle(query.shape[2]))
  return output.transpose(1, 2), log_sum.transpose(1, 2)


def s2_rolled(query, key, value, chunk_size):
  """Returns S2-Attn as LongLoRA's path without FlashAttention computes it.

  Half of the heads are rolled by half a chunk, chunks are folded into the
  batch, and one triangular mask serves them all: where the roll wraps round,
  early queries see late keys. The roll comes before the padding of a last
  chunk that is short, which LongLoRA does not have.

  Args:
    query: `[batch, seq, heads, head_dim]`.
    key: `[batch, seq, kv_heads, head_dim]`.
    value: Like `key`.
    chunk_size: Tokens, even.
  """
  batch, length, num_heads, head_dim = query.shape
  padded = _round_up(length, chunk_size)
  first = num_heads // 2

  def roll(x, shift):
    return torch.cat(
      [x[:, :, :first], x[:, :, first:].roll(shift, dims=1)], dim=2
    )

  def fold(x):
    x = _pad(roll(_repeat_heads(x, num_heads), -chunk_size // 2), padded)
    return x.reshape(-1, chunk_size, num_heads, head_dim).transpose(1, 2)

  def unfold(x):
    x = x.transpose(1, 2).reshape(batch, padded, num_heads, -1)
    return roll(x[:, :length], chunk_size // 2)

  output, log_sum = _softmax_attention(
    fold(query), fold(key), fold(value), _triangle(chunk_size)
  )
  return unfold(output), unfold(log_sum[..., None])[..., 0]


def s2_split(query, key, value, chunk_size):
  """Returns S2-Attn as LongLoRA's path with FlashAttention computes it.

  Nothing is rolled: half of the heads have a half chunk at the start and what
  is left at the end (`cu_seqlens` there), and nothing leaks.

  Args:
    query: `[batch, seq, heads, head_dim]`.
    key: `[batch, seq, kv_heads, head_dim]`.
    value: Like `key`.
    chunk_size: Tokens, even.
  """
  length, num_heads = query.shape[1:3]

  def attend(head, *arrays):
    start = chunk_size if head < num_heads // 2 else chunk_size // 2
    borders = [0, *range(start, length, chunk_size), length]
    sizes = [stop - start for start, stop in itertools.pairwise(borders)]
    parts = [
      _softmax_attention(*part, _triangle(part[0].shape[1]))
      for part in zip(*(x.split(sizes, dim=1) for x in arrays), strict=True)
    ]
    outputs, log_sums = zip(*parts, strict=True)
    return torch.cat(outputs, dim=1), torch.cat(log_sums, dim=1)

  return _over_heads(attend, query, key, value)


def _fold(x, chunk_size, dilation, empty=0):
  """Returns chunks as a batch, and slots a dilation apart as neighbours.

  Args:
    x: `[batch, seq, ...]`, padded to whole chunks.
    chunk_size: Tokens.
    dilation: Tokens.
    empty: What fills chunks up to a multiple of the dilation.

  Returns:
    `[batch, chunks, dilation, slots, ...]`.
  """
  batch, length = x.shape[:2]
  x = x.reshape(batch * (length // chunk_size), chunk_size, *x.shape[2:])
  x = _pad(x, _round_up(chunk_size, dilation), empty)
  return (
    x.unflatten(1, (-1, dilation)).transpose(1, 2).unflatten(0, (batch, -1))
  )


def _unfold(x, chunk_size, length):
  """Undoes `_fold`, and the padding."""
  x = x.transpose(2, 3).flatten(2, 3)[:, :, :chunk_size]
  return x.flatten(1, 2)[:, :length]


def _rolled_head(
  query,
  key,
  value,
  shift,
  chunk_size=None,
  dilation=1,
  window=None,
  causality="position",
):
  """Returns attention of one head to keys rolled towards the end.

  By position, the true positions are rolled with the keys and compared, and a
  key that wraps round is gone. Padding comes first: the slots of a last chunk
  that is short hold keys that were moved there. By slot, the sequence itself is
  rolled, then padded, and one triangular mask serves all chunks.

  Args:
    query: `[batch, seq, head_dim]`.
    key: Like `query`.
    value: Like `query`.
    shift: Tokens.
    chunk_size: Tokens; None is one chunk.
    dilation: Tokens.
    window: Slots; None is all.
    causality: "position" or "slot".
  """
  length = query.shape[1]
  chunk_size = length if chunk_size is None else chunk_size
  padded = _round_up(length, chunk_size)
  fold = functools.partial(_fold, chunk_size=chunk_size, dilation=dilation)
  if causality == "slot":
    key, value = (x.roll(shift, dims=1) for x in (key, value))
  query, key, value = (_pad(x, padded) for x in (query, key, value))
  if causality == "position":
    key, value = (x.roll(shift, dims=1) for x in (key, value))
    positions = torch.arange(padded)[None]
    moved = torch.where(positions < length, positions, _NO_KEY)
    moved = moved.roll(shift, dims=1).masked_fill(positions < shift, _NO_KEY)
    mask = (
      fold(moved, empty=_NO_KEY)[..., None, :]
      <= fold(positions, empty=-1)[..., :, None]
    )
  else:
    mask = _triangle(_round_up(chunk_size, dilation) // dilation)
  if window is not None:
    slots = torch.arange(mask.shape[-1])
    behind = slots[:, None] - slots[None, :]
    mask = mask & (behind >= 0) & (behind < window)
  output, log_sum = _softmax_attention(
    fold(query), fold(key), fold(value), mask
  )
  return tuple(_unfold(x, chunk_size, length) for x in (output, log_sum))


def _head(query, key, value, shift, boundary="drop", **settings):
  """Returns `_rolled_head`, by either rule for the start of the sequence.

  With "local", chunks that are given no key at all by the roll, and the first
  queries of a head without chunks, have the keys as they are.
  """
  rolled = _rolled_head(query, key, value, shift, **settings)
  if boundary == "drop":
    return rolled
  plain = _rolled_head(query, key, value, 0, **settings)
  length, chunk_size = query.shape[1], settings.get("chunk_size")
  if chunk_size is None:
    num_local = shift
  else:
    num_local = shift // chunk_size * chunk_size
  local = torch.arange(length) < num_local
  return (
    torch.where(local[None, :, None], plain[0], rolled[0]),
    torch.where(local[None, :], plain[1], rolled[1]),
  )


def scca_fixed(query, key, value, chunk_size, shift=None, **settings):
  """Returns SCCA fixed: half of the heads roll keys and values by `shift`."""
  shift = chunk_size // 2 if shift is None else shift
  first = query.shape[2] // 2

  def attend(head, *arrays):
    return _head(
      *arrays, shift if head >= first else 0, chunk_size=chunk_size, **settings
    )

  return _over_heads(attend, query, key, value)


def scca_flow(query, key, value, chunk_size, num_chunks, rotate=0, **settings):
  """Returns SCCA flow: each head rolls by its own number of whole chunks."""
  shifts = torch.arange(query.shape[2]) * num_chunks // query.shape[2] + rotate

  def attend(head, *arrays):
    chunks = int(shifts[head]) % num_chunks
    return _head(
      *arrays, chunks * chunk_size, chunk_size=chunk_size, **settings
    )

  return _over_heads(attend, query, key, value)


def sda(query, key, value, dilation, **settings):
  """Returns SDA: a dilated head whose keys are rolled by `head % dilation`."""

  def attend(head, *arrays):
    return _head(*arrays, head % dilation, dilation=dilation, **settings)

  return _over_heads(attend, query, key, value)


def longmixed(query, key, value, chunk_size, **settings):
  """Returns LongMixed: a half SCCA fixed, a quarter each SDA-2 and SDA-4."""
  num_heads = query.shape[2]
  key, value = (_repeat_heads(x, num_heads) for x in (key, value))
  cuts = [0, round(num_heads / 2), round(num_heads * 3 / 4), num_heads]
  parts = [
    attend(*(x[:, :, start:stop] for x in (query, key, value)), **settings)
    for attend, start, stop in (
      (functools.partial(scca_fixed, chunk_size=chunk_size), *cuts[0:2]),
      (functools.partial(sda, dilation=2), *cuts[1:3]),
      (functools.partial(sda, dilation=4), *cuts[2:4]),
    )
  ]
  outputs, log_sums = zip(*parts, strict=True)
  return torch.cat(outputs, dim=2), torch.cat(log_sums, dim=2)


def dilated(query, key, value, chunk_size, dilation):
  """Returns LongNet's dilated attention (Eqs. 6 to 9).

  Of each segment, head `h` gathers the rows `h mod dilation, + dilation, ...`
  of query, key and value, attends among them, and scatters the result; other
  rows get nothing.

  Args:
    query: `[batch, seq, heads, head_dim]`.
    key: `[batch, seq, kv_heads, head_dim]`.
    value: Like `key`.
    chunk_size: Length of a segment, a multiple of the dilation, in tokens.
    dilation: Tokens.
  """
  length = query.shape[1]
  padded = _round_up(length, chunk_size)

  def attend(head, *arrays):
    def gather(x):
      x = _pad(x, padded).unflatten(1, (-1, chunk_size))
      return x[:, :, head % dilation :: dilation]

    def scatter(part, empty):
      shape = (part.shape[0], padded // chunk_size, chunk_size, *part.shape[3:])
      whole = part.new_full(shape, empty)
      whole[:, :, head % dilation :: dilation] = part
      return whole.flatten(1, 2)[:, :length]

    output, log_sum = _softmax_attention(
      *(gather(x) for x in arrays), _triangle(chunk_size // dilation)
    )
    return scatter(output, 0.0), scatter(log_sum, -torch.inf)

  return _over_heads(attend, query, key, value)


def dilated_mixture(query, key, value, pairs):
  """Returns LongNet's mixture, weighted by the softmax denominators (Eq. 10).

  Gradients pass through the weights, as the equation has it; LongNet's
  published code holds them constant.

  Args:
    query: `[batch, seq, heads, head_dim]`.
    key: `[batch, seq, kv_heads, head_dim]`.
    value: Like `key`.
    pairs: Of chunk size and dilation.
  """
  outputs, log_sums = zip(
    *(dilated(query, key, value, *pair) for pair in pairs), strict=True
  )
  log_sums = torch.stack(log_sums)
  served = log_sums.isfinite().any(dim=0)
  log_sums = log_sums.masked_fill(~served, 0.0)
  weights = torch.softmax(log_sums, dim=0)[..., None]
  log_sum = torch.logsumexp(log_sums, dim=0)
  return (
    (weights * torch.stack(outputs)).sum(dim=0),
    log_sum.masked_fill(~served, -torch.inf),
  )


def dna(query, key, value, window, dilation):
  """Returns causal dilated neighbourhood attention.

  The neighbours of all queries are gathered by rolling the keys once for each
  of the `window` neighbours; those that wrap round are masked.
  """
  length, num_heads = query.shape[1:3]
  steps = [i * dilation for i in range(window)]

  def neighbours(x):
    x = _repeat_heads(x, num_heads)
    return torch.stack([x.roll(step, dims=1) for step in steps], dim=3)

  mask = torch.arange(length)[:, None] >= torch.tensor(steps)[None, :]
  output, log_sum = _softmax_attention(
    query[:, :, :, None],
    neighbours(key),
    neighbours(value),
    mask[:, None, None, :],
  )
  return output[:, :, :, 0], log_sum[:, :, :, 0]
