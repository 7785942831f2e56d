"""Attention as PyTorch users run it, for comparison with this package.

PyTorch is optional, and imported only when a peer is made. Arrays are
`[1, heads, seq, head_dim]` for `flex` and `sdpa`, and
`[1, seq, heads, head_dim]` for `longlora_s2`, as for its users.
"""

# Types are checked without PyTorch too.
# pyright: reportMissingImports=false

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from scca_jax.patterns import (
  AttentionPattern,
  HeadPattern,
  Mixture,
  members,
)

# Names of the peers in the flag, and in tables.
LABELS = {
  "flex": "flex_attention",
  "sdpa": "SDPA dense",
  "longlora_s2": "LongLoRA S2",
}
# Fields of `HeadPattern` that the mask of flex_attention obeys.
_FLEX_FIELDS = frozenset(
  ("chunk_size", "offset", "shift", "dilation", "window", "select")
)
# Patterns of more runs of heads than this are looked up in tables.
_MAX_RUNS = 8


def problem() -> str | None:
  """Returns why PyTorch cannot be used on a GPU here, or None if it can."""
  try:
    import torch
  except ImportError as error:
    return f"torch is not installed ({error})"
  if not torch.cuda.is_available():
    return f"torch {torch.__version__} finds no CUDA GPU"
  return None


def version() -> str:
  """Returns the version of PyTorch."""
  import torch

  return torch.__version__


def release() -> None:
  """Releases the GPU memory that PyTorch keeps for reuse."""
  import torch

  if torch.cuda.is_available():
    torch.cuda.empty_cache()


def s2_chunk_size(pattern: AttentionPattern | Mixture, seq_len: int) -> int:
  """Returns the chunk size to use for LongLoRA's S2, in tokens.

  It is the chunk size of the pattern's first head or, failing that, a quarter
  of the sequence, as in LongLoRA.
  """
  own = members(pattern)[0].heads[0].chunk_size
  return own or max(1, seq_len // 4)


# The mask of flex_attention. Its kernel evaluates the function at every pair of
# a block that straddles a border: arithmetic costs little, numbers read from
# tables cost more than the attention itself. So heads are gathered in runs
# whose numbers follow a formula of the head index.


@dataclasses.dataclass(frozen=True)
class _Formula:
  """A number of head `i` of a run: `base + unit * ((step + start) % count)`.

  Attributes:
    base: The smallest number.
    unit: Distance between two numbers.
    count: How many numbers there are.
    start: The first head's place among them.
    num_heads: Heads of the run if they go through the numbers once, with
      `step = i * count // num_heads`; None if each takes the next one,
      `step = i`.
  """

  base: int
  unit: int = 0
  count: int = 1
  start: int = 0
  num_heads: int | None = None

  def __call__(self, i: Any) -> Any:
    """Returns the number of head `i`, an int or an integer tensor."""
    if self.count == 1:
      return self.base
    if self.num_heads is not None:
      i = i * self.count // self.num_heads
    if self.start or self.num_heads is None:
      i = (i + self.start) % self.count
    return self.base + self.unit * i


def _find_formula(numbers: Sequence[int]) -> _Formula | None:
  levels = sorted(set(numbers))
  if len(levels) == 1:
    return _Formula(levels[0])
  unit = levels[1] - levels[0]
  start = (numbers[0] - levels[0]) // unit
  for num_heads in (len(numbers), None):
    formula = _Formula(levels[0], unit, len(levels), start, num_heads)
    if [formula(i) for i in range(len(numbers))] == list(numbers):
      return formula
  return None


@dataclasses.dataclass(frozen=True)
class _Run:
  """Neighbouring heads that differ by formulas."""

  first: int
  last: int
  head: HeadPattern
  offset: _Formula
  shift: _Formula
  select: _Formula

  @classmethod
  def of(cls, heads: Sequence[HeadPattern], first: int) -> "_Run | None":
    """Returns the run of these heads, or None if there is no formula."""
    head = heads[0]
    fixed = ("chunk_size", "dilation", "window")
    for other in heads:
      if any(getattr(other, x) != getattr(head, x) for x in fixed):
        return None
      if (other.select is None) != (head.select is None):
        return None
    # A border at or before position 0: no negative number is divided.
    width = head.chunk_size or 1
    offset = _find_formula([h.offset % width - width for h in heads])
    shift = _find_formula([h.shift for h in heads])
    select = _find_formula([h.select or 0 for h in heads])
    if offset is None or shift is None or select is None:
      return None
    return cls(first, first + len(heads) - 1, head, offset, shift, select)


def _find_runs(pattern: AttentionPattern) -> list[_Run]:
  """Returns the heads in few runs, each as long as possible."""
  runs: list[_Run] = []
  first = 0
  while first < pattern.num_heads:
    for stop in range(pattern.num_heads, first, -1):
      run = _Run.of(pattern.heads[first:stop], first)
      if run is not None:
        runs.append(run)
        first = stop
        break
  return runs


def _seen_by(run: _Run, h: Any, p: Any, k: Any) -> Any:
  """Returns whether a query sees a key, ignoring causality."""
  i = h - run.first
  shifted = k + run.shift(i)
  distance, dilation = p - shifted, run.head.dilation
  parts = []
  if run.head.chunk_size is not None:
    width, offset = run.head.chunk_size, run.offset(i)
    parts.append((p - offset) // width == (shifted - offset) // width)
  if dilation > 1:
    parts.append(distance % dilation == 0)
  if run.head.window is not None:
    parts.append(distance >= 0)
    parts.append(distance < run.head.window * dilation)
  if run.head.select is not None:
    parts.append(p % dilation == run.select(i))
  return functools.reduce(lambda a, b: a & b, parts) if parts else None


def _tabled_mask(pattern: AttentionPattern, device: str) -> Callable[..., Any]:
  """Returns the mask of any pattern, with numbers looked up by head."""
  import torch

  far = 1 << 29

  def table(number: Callable[[HeadPattern], int]) -> Any:
    numbers = [number(head) for head in pattern.heads]
    return torch.tensor(numbers, dtype=torch.int32, device=device)

  widths = table(lambda x: x.chunk_size or 2 * far)
  # Before position 0, as in a run.
  offsets = table(
    lambda x: x.offset % x.chunk_size - x.chunk_size if x.chunk_size else -far
  )
  shifts = table(lambda x: x.shift)
  dilations = table(lambda x: x.dilation)
  # Without a window, distances may be negative as well.
  least = table(lambda x: -far if x.window is None else 0)
  most = table(lambda x: far if x.window is None else x.window * x.dilation)
  moduli = table(lambda x: 1 if x.select is None else x.dilation)
  selected = table(lambda x: x.select or 0)

  def mask(b: Any, h: Any, p: Any, k: Any) -> Any:
    del b
    shifted = k + shifts[h]
    distance = p - shifted
    width, offset = widths[h], offsets[h]
    # No `seen &= ...`: inductor cannot lower it.
    return (
      (k <= p)
      & ((p - offset) // width == (shifted - offset) // width)
      & (distance % dilations[h] == 0)
      & (distance >= least[h])
      & (distance < most[h])
      & (p % moduli[h] == selected[h])
    )

  return mask


def mask_mod(
  pattern: AttentionPattern | Mixture, device: str
) -> Callable[..., Any]:
  """Returns the `mask_mod` of flex_attention for a pattern.

  Args:
    pattern: With boundary "drop" and causality "position".
    device: Where to keep the tables of a pattern that no formula describes.

  Raises:
    NotImplementedError: The pattern is a mixture, has another boundary or
      causality, or restricts keys in a way that the mask does not support.
  """
  if isinstance(pattern, Mixture):
    raise NotImplementedError("flex supports single patterns, not mixtures.")
  used = frozenset().union(*(head.in_use() for head in pattern.heads))
  if unknown := sorted(used - _FLEX_FIELDS):
    raise NotImplementedError(f"the mask of flex has no {', '.join(unknown)}.")
  if pattern.boundary != "drop" or pattern.causality != "position":
    raise NotImplementedError(
      'flex supports only boundary="drop" and causality="position", not'
      f' "{pattern.boundary}" and "{pattern.causality}".'
    )
  runs = _find_runs(pattern)
  if len(runs) > _MAX_RUNS:
    return _tabled_mask(pattern, device)

  def mask(b: Any, h: Any, p: Any, k: Any) -> Any:
    del b
    if len(runs) == 1:
      seen = _seen_by(runs[0], h, p, k)
      return k <= p if seen is None else (k <= p) & seen
    branches = []
    for run in runs:
      branch = (h >= run.first) & (h <= run.last)
      seen = _seen_by(run, h, p, k)
      branches.append(branch if seen is None else branch & seen)
    return (k <= p) & functools.reduce(lambda a, b: a | b, branches)

  return mask


# The peers.


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
  import torch
  from torch.nn.attention import flex_attention

  # Each mask and length is a compilation of its own.
  torch._dynamo.config.recompile_limit = 64
  return torch.compile(flex_attention.flex_attention, dynamic=False)


def _flex(
  pattern: AttentionPattern | Mixture, seq_len: int, device: str
) -> Any:
  """Returns flex_attention with the pattern's mask."""
  from torch.nn.attention import flex_attention

  # On a CPU only tests run it, with small inputs and without a compiler.
  on_gpu = device == "cuda"
  run = _compiled_flex() if on_gpu else flex_attention.flex_attention
  mask = flex_attention.create_block_mask(
    mask_mod(pattern, device),
    None,
    pattern.num_heads,
    seq_len,
    seq_len,
    device=device,
    _compile=on_gpu,
  )

  def attend(query: Any, key: Any, value: Any) -> Any:
    shared = query.shape[1] != key.shape[1]
    return run(query, key, value, block_mask=mask, enable_gqa=shared)

  return attend


def _sdpa(query: Any, key: Any, value: Any) -> Any:
  """Returns dense causal attention, with the kernel that PyTorch chooses."""
  from torch.nn import functional

  return functional.scaled_dot_product_attention(
    query,
    key,
    value,
    is_causal=True,
    enable_gqa=query.shape[1] != key.shape[1],
  )


def longlora_s2(query: Any, key: Any, value: Any, *, chunk_size: int) -> Any:
  """Returns S2-Attn as LongLoRA trains with it (arXiv 2309.12307).

  The second half of the heads is rolled by half a chunk, round the end; chunks
  become sequences of a batch for FlashAttention; the result is rolled back.
  """
  import torch
  from torch.nn import attention, functional

  group_size = query.shape[2] // key.shape[2]
  if group_size > 1:
    key = key.repeat_interleave(group_size, dim=2)
    value = value.repeat_interleave(group_size, dim=2)
  batch, seq_len, num_heads, head_dim = query.shape
  half = num_heads // 2

  def rolled(x: Any, tokens: int) -> Any:
    return torch.cat((x[:, :, :half], x[:, :, half:].roll(tokens, 1)), dim=2)

  def chunked(x: Any) -> Any:
    x = rolled(x, -(chunk_size // 2))
    return x.reshape(-1, chunk_size, num_heads, head_dim).transpose(1, 2)

  kernels = attention.SDPBackend
  # FlashAttention, if it supports the dtype and the device.
  with attention.sdpa_kernel(
    [kernels.FLASH_ATTENTION, kernels.EFFICIENT_ATTENTION, kernels.MATH]
  ):
    output = functional.scaled_dot_product_attention(
      chunked(query), chunked(key), chunked(value), is_causal=True
    )
  output = output.transpose(1, 2).reshape(batch, seq_len, num_heads, head_dim)
  return rolled(output, chunk_size // 2)


class Peer:
  """A peer with its inputs.

  Attributes:
    inputs: Query, key and value.
    d_output: The gradient of the output, which the backward pass starts from.
  """

  def __init__(
    self,
    function: Callable[..., Any],
    shapes: Sequence[Sequence[int]],
    dtype: str,
    device: str,
  ):
    """Draws the inputs.

    Args:
      function: The attention.
      shapes: Shapes of query, key and value.
      dtype: Its name.
      device: "cuda" or, for tests, "cpu".
    """
    import torch

    self._function, self._device = function, device
    options = {"dtype": getattr(torch, dtype), "device": device}
    self.inputs = [
      torch.randn(*shape, **options).requires_grad_() for shape in shapes
    ]
    self.d_output = torch.randn(*shapes[0], **options)

  def forward(self) -> Any:
    """Starts the forward pass."""
    import torch

    with torch.no_grad():
      return [self._function(*self.inputs)]

  def forward_backward(self) -> Any:
    """Starts both passes; returns the output and the gradients."""
    import torch

    output = self._function(*self.inputs)
    return [output, *torch.autograd.grad(output, self.inputs, self.d_output)]

  def wait(self, result: Any) -> None:
    """Waits until the GPU has finished."""
    import torch

    del result
    if self._device == "cuda":
      torch.cuda.synchronize()

  def temporary_mib(self, start: Callable[[], Any]) -> float | None:
    """Returns the memory of a call beyond its inputs and outputs, if known."""
    import torch

    if self._device != "cuda":
      return None
    self.wait(start())
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = start()
    self.wait(result)
    outputs = sum(x.untyped_storage().nbytes() for x in result)
    peak = torch.cuda.max_memory_allocated() - before
    return max(0, peak - outputs) / 2**20


def make(
  name: str,
  pattern: AttentionPattern | Mixture,
  *,
  shapes: Sequence[Sequence[int]],
  chunk_size: int,
  dtype: str,
  device: str,
) -> Peer:
  """Returns a peer, ready to be timed.

  Args:
    name: One of `LABELS`.
    pattern: Pattern for `flex`; the others have their own.
    shapes: Shapes of query, key and value, `[batch, seq, heads, head_dim]`.
    chunk_size: Chunk size of `longlora_s2`, in tokens.
    dtype: Name of the inputs' dtype.
    device: "cuda" or, for tests, "cpu".

  Raises:
    NotImplementedError: The peer cannot serve the call.
  """
  seq_len = shapes[0][1]
  if name == "longlora_s2":
    if seq_len % chunk_size:
      raise NotImplementedError(
        f"LongLoRA S2 needs a multiple of {chunk_size} tokens, not {seq_len}."
      )
    s2 = functools.partial(longlora_s2, chunk_size=chunk_size)
    return Peer(s2, shapes, dtype, device)
  by_head = [(b, heads, n, width) for b, n, heads, width in shapes]
  if name == "flex":
    function = _flex(pattern, seq_len, device)
  else:
    function = _sdpa
  return Peer(function, by_head, dtype, device)
