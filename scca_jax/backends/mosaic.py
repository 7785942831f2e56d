"""Block-sparse attention for Hopper GPUs (Pallas, Mosaic GPU).

Forward and backward pass visit only blocks that contain a seen pair, and mask
only those that straddle a border (`blocks`). Keys and values are read in place:
heads of one dilation `r` are one launch, over the view `[n / r, r]` of the
sequence, and launches of several dilations write into one output. Heads that
also see their own chunk or sinks are in the launch of dilation 1, with all
their parts under one softmax (`blocks.unserved_unions` names exceptions). The
kernels are in `mosaic_forward`, `mosaic_backward` and `mosaic_backward_single`.
The last is the faster backward pass, for bfloat16; `mosaic_backward` gives the
same bits in every run.

Memory beyond inputs, outputs and gradients: the log-sum-exp and, in the
backward pass, `delta`, each one float32 per query and head; the faster backward
pass also sums the gradient of the query in float32. A sequence whose length is
not divisible by `8 r` is copied once to be padded. For the backward pass
`mosaic` saves its inputs, its output and the log-sum-exp.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import ad_checkpoint

from scca_jax import target
from scca_jax.backends import (
  block_sizes,
  blocks,
  heads,
  mosaic_backward_single,
)
from scca_jax.backends.block_sizes import BlockSizes
from scca_jax.backends.contract import SAVED
from scca_jax.backends.mosaic_backward import backward_keys, backward_queries
from scca_jax.backends.mosaic_forward import forward
from scca_jax.backends.mosaic_launch import LOG2E, NO_WEIGHT, Launch
from scca_jax.patterns import AttentionPattern


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of the kernels; `queries_exact` serves float16."""

  forward: BlockSizes
  keys: BlockSizes
  queries: BlockSizes
  queries_exact: BlockSizes


# The best on an H200. Thread blocks have a fixed number of warps.
_DEFAULTS = {
  64: Sizes(
    forward=BlockSizes(128, 128, 4),
    keys=BlockSizes(128, 64, 4),
    queries=BlockSizes(128, 128, 4),
    queries_exact=BlockSizes(128, 64, 3),
  ),
  128: Sizes(
    forward=BlockSizes(128, 128, 2),
    keys=BlockSizes(128, 64, 2),
    queries=BlockSizes(128, 128, 2),
    queries_exact=BlockSizes(128, 64, 3),
  ),
}


def default_sizes(head_dim: int, dtype: Any, kind: str) -> Sizes:
  """Returns the sizes tuned for a GPU, or for an H200 if it is unknown."""
  tuned = block_sizes.tuned_sizes("mosaic", kind, dtype, head_dim)
  return dataclasses.replace(_DEFAULTS[head_dim], **tuned)


def candidates(head_dim: int, dtype: Any) -> dict[str, list[BlockSizes]]:
  """Returns the sizes worth trying for each kernel that the dtype needs.

  Sizes that take too much of a multiprocessor's memory fail to compile.
  """
  queries = "queries_exact" if dtype == jnp.float16 else "queries"
  stages = (2, 3, 4) if head_dim == 64 else (2, 3)
  return {
    kernel: [
      BlockSizes(128, columns, stage)
      for columns in (64, 128)
      for stage in stages
    ]
    for kernel in ("forward", "keys", queries)
  }


@dataclasses.dataclass(frozen=True)
class _Settings:
  """The static settings of a call.

  Attributes:
    pattern: Which keys each query head sees.
    scale: Factor of the scores.
    sizes: Kernel tile sizes.
    num_multiprocessors: Multiprocessors of the device.
    deterministic: Whether gradients must be bit-equal from run to run.
    query_offset: Position of the first query.
  """

  pattern: AttentionPattern
  scale: float
  sizes: Sizes
  num_multiprocessors: int
  deterministic: bool
  query_offset: int = 0

  def visits_once(self, query: jax.Array) -> bool:
    """Whether the backward pass is a single kernel instead of two."""
    return (
      not self.deterministic
      # For float16, see `_backward_pass`.
      and query.dtype == jnp.bfloat16
      # It fills arrays, see `_merging_batches`.
      and jax.__version_info__ >= (0, 11)
    )

  @property
  def num_launches(self) -> int:
    """Number of dilations in the pattern."""
    return len({head.dilation for head in self.pattern.heads})

  def launches(
    self, query: jax.Array, key: jax.Array, segment_ids: jax.Array | None
  ) -> list[Launch]:
    """Returns the launches, one for each dilation."""
    heads_of: dict[int, list[int]] = {}
    for index, head in enumerate(self.pattern.heads):
      heads_of.setdefault(head.dilation, []).append(index)
    batch, seq_len, num_heads, head_dim = query.shape
    multiple = blocks.ALIGN * math.lcm(*heads_of)
    return [
      Launch(
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=key.shape[2],
        head_dim=head_dim,
        seq_len=seq_len,
        padded_len=-(-seq_len // multiple) * multiple,
        dilation=dilation,
        dtype=query.dtype,
        scale=self.scale,
        heads=tuple(members),
        rules=tuple(
          blocks.Rule.of(
            self.pattern.heads[i], self.pattern.boundary, self.query_offset
          )
          for i in members
        ),
        num_multiprocessors=self.num_multiprocessors,
        has_segments=segment_ids is not None,
      )
      for dilation, members in heads_of.items()
    ]


def _merging_batches(
  function: Callable[..., Any], has_refs: bool
) -> Callable[..., Any]:
  """Returns a function of `[batch, ...]`; its vmap is a longer batch."""
  # jax < 0.11 allows no mutable arrays inside, so launches that fill arrays
  # together or in place cannot be vmapped there.
  if jax.__version_info__ < (0, 11) and has_refs:
    return function
  function = jax.custom_batching.custom_vmap(function)

  def rule(axis_size: int, is_mapped: Any, *args: Any) -> tuple[Any, Any]:
    def merge(mapped: bool, x: jax.Array) -> jax.Array:
      if not mapped:
        x = jnp.broadcast_to(x[None], (axis_size, *x.shape))
      return x.reshape(-1, *x.shape[2:])

    merged = jax.tree.map(merge, tuple(is_mapped), args)
    results = jax.tree.map(
      lambda x: x.reshape(axis_size, -1, *x.shape[1:]), function(*merged)
    )
    return results, jax.tree.map(lambda _: True, results)

  function.def_vmap(rule)
  return function


def _assemble(
  parts: list[jax.Array], heads_of: list[tuple[int, ...]], num_heads: int
) -> jax.Array:
  """Returns `[batch, seq, num_heads, ...]` from parts with some heads each.

  If a head is in several parts, they are summed.
  """
  if sorted(sum(heads_of, ())) == list(range(num_heads)):
    return heads.join_heads(parts, heads_of)
  total = jnp.zeros(
    (*parts[0].shape[:2], num_heads, *parts[0].shape[3:]), jnp.float32
  )
  for part, of_part in zip(parts, heads_of, strict=True):
    total = total.at[:, :, np.array(of_part)].add(part.astype(jnp.float32))
  return total.astype(parts[0].dtype)


def _forward_pass(
  settings: _Settings,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
) -> tuple[Any, list[jax.Array]]:
  """Returns the output, and the log-sum-exp of each launch in its layout."""
  output: Any = None
  log_sums = []
  for launch in settings.launches(query, key, segment_ids):
    log_sum, output = forward(
      launch,
      settings.sizes.forward,
      [launch.by_residue(x) for x in (query, key, value)],
      launch.tables(settings.sizes.forward, False, segment_ids),
      launch.ids_by_residue(segment_ids),
      into=None if output is None else launch.by_residue(output),
    )
    output = launch.by_token(output)
    log_sums.append(log_sum)
  return output[:, : query.shape[1]], log_sums


def _backward_pass(
  settings: _Settings,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
  output: jax.Array,
  log_sums: list[jax.Array],
  d_output: jax.Array,
  d_log_sum: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the gradients of query, key and value.

  With `p` the weights and `dp` their gradients, those of the scores are
  `p (dp - delta)`, where `delta = sum(output d_output) - d_log_sum`.
  """
  seq_len, sizes = query.shape[1], settings.sizes
  launches = settings.launches(query, key, segment_ids)
  # The gradient as it is stored, and as the kernels read it: XLA may compute
  # with more digits, which would not cancel.
  d_output = jax.lax.optimization_barrier(d_output.astype(query.dtype))
  delta = jnp.sum(
    output.astype(jnp.float32) * d_output.astype(jnp.float32), axis=-1
  )
  delta = delta - d_log_sum
  if any(launch.dilation > 1 for launch in launches):
    # XLA would sum and transpose in one kernel, which takes six times as long
    # (H100, four residues of 32,768 tokens).
    delta = jax.lax.optimization_barrier(delta)
  kv_heads = [launch.kv_heads for launch in launches]
  # If each key head belongs to a single launch, the launches share an output.
  alone = sorted(sum(kv_heads, ())) == list(range(key.shape[2]))
  # With float16 scores can be large; bfloat16 is as coarse as the error.
  exact = query.dtype == jnp.float16
  query_sizes = sizes.queries_exact if exact else sizes.queries
  visits_once = settings.visits_once(query)
  d_query: Any = None
  d_queries: list[jax.Array] = []
  d_keys: list[list[jax.Array]] = []
  for launch, log_sum in zip(launches, log_sums, strict=True):
    ids = launch.ids_by_residue(segment_ids)
    inputs = [launch.by_residue(x) for x in (query, key, value)]
    d_out = launch.by_residue(d_output)
    has_key = launch.has_row()[None] & (log_sum > -jnp.inf)
    rows = [
      jnp.where(has_key, launch.rows_by_residue(x), 0.0)
      for x in (delta, d_log_sum)
    ]
    lse = jnp.where(has_key, log_sum * LOG2E, NO_WEIGHT)
    into = d_keys.pop() if alone and d_keys else None
    if into is not None:
      into = [launch.by_residue(x) for x in into]
    if visits_once:
      of_queries, of_keys = mosaic_backward_single.backward(
        launch,
        inputs,
        launch.tables(
          mosaic_backward_single.SIZES[launch.head_dim],
          True,
          segment_ids,
          num_sorted=mosaic_backward_single.NUM_SORTED,
        ),
        ids,
        d_out,
        lse,
        rows[0],
        into=into,
        alone=alone,
      )
      d_queries.append(of_queries)
      d_keys.append([launch.by_token(x) for x in of_keys])
      continue
    d_query, *mended = backward_queries(
      launch,
      query_sizes,
      inputs,
      launch.tables(query_sizes, False, segment_ids),
      ids,
      d_out,
      lse,
      rows[0],
      into=None if d_query is None else launch.by_residue(d_query),
      d_lse=rows[1] if exact else None,
    )
    d_query = launch.by_token(d_query)
    of_keys = backward_keys(
      launch,
      sizes.keys,
      inputs,
      launch.tables(sizes.keys, True, segment_ids),
      ids,
      d_out,
      lse,
      mended[0] if mended else rows[0],
      into=into,
      alone=alone,
    )
    d_keys.append([launch.by_token(x) for x in of_keys])
  if visits_once:
    d_query = _assemble(d_queries, [x.heads for x in launches], query.shape[2])
  if alone:
    (parts,) = d_keys
  else:
    parts = [
      _assemble(list(x), kv_heads, key.shape[2])
      for x in zip(*d_keys, strict=True)
    ]
  d_query, d_key, d_value = (x[:, :seq_len] for x in (d_query, *parts))
  return d_query, d_key, d_value


def _log_sum_by_token(
  settings: _Settings,
  query: jax.Array,
  key: jax.Array,
  segment_ids: jax.Array | None,
  log_sums: list[jax.Array],
) -> jax.Array:
  launches = settings.launches(query, key, segment_ids)
  return _assemble(
    [
      launch.rows_by_token(x)
      for launch, x in zip(launches, log_sums, strict=True)
    ],
    [launch.heads for launch in launches],
    query.shape[2],
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
  settings: _Settings,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Returns the output and the log-sum-exp, float32 `[batch, seq, heads]`."""
  return _attend_and_save(settings, query, key, value, segment_ids)[0]


def _attend_and_save(
  settings: _Settings,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
) -> tuple[Any, Any]:
  run = _merging_batches(
    functools.partial(_forward_pass, settings), settings.num_launches > 1
  )
  # Without the barrier, if saved results go straight into the stack of all
  # layers, XLA would run the kernel once for that and once for the layer.
  output, log_sums = ad_checkpoint.checkpoint_name(
    jax.lax.optimization_barrier(run(query, key, value, segment_ids)),
    SAVED,
  )
  log_sum = _log_sum_by_token(settings, query, key, segment_ids, log_sums)
  saved = query, key, value, segment_ids, output, log_sums
  return (output, log_sum), saved


def _attend_backward(
  settings: _Settings, saved: Any, cotangents: Any
) -> tuple[Any, ...]:
  has_refs = (
    settings.num_launches > 1
    or saved[0].dtype == jnp.float16
    or settings.visits_once(saved[0])
  )
  run = _merging_batches(functools.partial(_backward_pass, settings), has_refs)
  return *run(*saved, *cotangents), None


_attend.defvjp(_attend_and_save, _attend_backward)


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  pattern: AttentionPattern,
  *,
  segment_ids: jax.Array | None,
  query_offset: int | jax.Array,
  scale: float,
  deterministic: bool = False,
  sizes: Sizes | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns the output and the log-sum-exp; see `scca_jax.attention`.

  Args:
    query: `[batch, seq, heads, head_dim]`, bfloat16 or float16; `head_dim` is
      64 or 128.
    key: `[batch, seq, kv_heads, head_dim]`.
    value: Like `key`.
    pattern: Which keys each query head sees, with causality "position".
    segment_ids: Integers `[batch, seq]`, or None.
    query_offset: 0, or as in `contract.starts_late`.
    scale: Factor of the scores.
    deterministic: Whether gradients must be bit-equal from run to run.
    sizes: Kernel tile sizes; None uses `default_sizes`.
  """
  device = target.current()
  if sizes is None:
    sizes = default_sizes(query.shape[3], query.dtype, device.kind)
  settings = _Settings(
    pattern,
    float(scale),
    sizes,
    device.num_multiprocessors,
    deterministic,
    int(query_offset),
  )
  return _attend(settings, query, key, value, segment_ids)
