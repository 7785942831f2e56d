"""Attention within the strips of `xla`, forward and backward.

Strips of one band go together through attention by blocks of queries, each with
all the keys that the band may hold for it: a softmax takes one pass. Blocks are
as large as they can be without visiting many more pairs, and skip the start of
a strip if it lies before the sequence. The backward pass goes by blocks of keys
and computes the weights again (Dao et al., arXiv 2205.14135). On a GPU the
products are cuBLAS's, in the dtype of the inputs; what limits it there is
writing and reading the scores, not the products.

The parts of this module: the settings of a band and its blocks (`Band`), loops
over blocks and strips, and attention (`core`).
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from scca_jax.backends import online_softmax
from scca_jax.backends.heads import finish_softmax, safe_maximum, vary_like
from scca_jax.backends.online_softmax import product

# How many times the pairs of blocks half as large a block may visit.
_MORE_PAIRS = 1.25
# How many lengths the ranges have that the blocks of a strip meet: each is a
# program of its own.
_MAX_RUNS = 8


@dataclasses.dataclass(frozen=True)
class _Run:
  """Neighbouring blocks of a strip that meet equally long ranges of it.

  Attributes:
    blocks: Where each block starts, in slots.
    size: Length of a block.
    starts: Where the range starts that it meets.
    length: Slots of a range.
  """

  blocks: tuple[int, ...]
  size: int
  starts: tuple[int, ...]
  length: int


@dataclasses.dataclass(frozen=True)
class Piece:
  """Neighbouring strips that begin with equally many slots without a key.

  Attributes:
    num_strips: Their number.
    num_empty: Slots at the start that have no key, a multiple of `block`.
    block: Length of a block, in slots; divides that of a strip.
  """

  num_strips: int
  num_empty: int
  block: int


@dataclasses.dataclass(frozen=True)
class Band:
  """The settings that all strips in one call of the core share.

  Attributes:
    lo: Smallest `slot - query` that is seen, in slots; None means no bound.
    hi: The largest one.
    num_slots: Length of a strip.
    score_bytes: Most bytes of scores, and in the backward pass of their
      gradients, to compute at once, if possible.
    scale: Factor of the scores.
    dtype: Dtype of the inputs, the output and the gradients.
    operands: Dtype that queries, keys and values are multiplied in.
    pieces: All strips, in order.
  """

  lo: int | None
  hi: int
  num_slots: int
  score_bytes: int
  scale: float
  dtype: Any
  operands: Any
  pieces: tuple[Piece, ...] = ()

  def query_runs(self, piece: Piece) -> list[_Run]:
    """Returns the blocks of queries, and the keys that each may see."""
    return self._runs(self.lo, self.hi, 0, piece.num_empty, piece.block)

  def key_runs(self, piece: Piece) -> list[_Run]:
    """Returns the blocks of keys, and the queries that may see each."""
    lo = None if self.lo is None else -self.lo
    return self._runs(-self.hi, lo, piece.num_empty, 0, piece.block)

  def _runs(
    self, lo: int | None, hi: int | None, begin: int, least: int, size: int
  ) -> list[_Run]:
    """Returns the blocks, and what lies from `lo` to `hi` beside each.

    Args:
      lo: Smallest distance from a slot of a block; None means no bound.
      hi: The largest one.
      begin: Where the first block starts.
      least: First slot that a block may meet.
      size: Length of a block.
    """
    blocks = range(begin, self.num_slots, size)
    ranges = [
      (
        least if lo is None else max(least, block + lo),
        self.num_slots
        if hi is None
        else max(least + size, min(block + size + hi, self.num_slots)),
      )
      for block in blocks
    ]
    most = max(-(-(end - first) // size) for first, end in ranges)
    step = size * -(-most // _MAX_RUNS)
    lengths = [
      min(max(1, -(-(end - first) // step)) * step, self.num_slots - least)
      for first, end in ranges
    ]
    runs = []
    for length, members in itertools.groupby(
      range(len(ranges)), lambda i: lengths[i]
    ):
      of_run = list(members)
      runs.append(
        _Run(
          tuple(blocks[i] for i in of_run),
          size,
          tuple(
            max(least, min(ranges[i][0], self.num_slots - length))
            for i in of_run
          ),
          length,
        )
      )
    return runs

  def piece(
    self, num_strips: int, num_empty: int, block: int, most: int
  ) -> Piece:
    """Returns strips, in the largest blocks that visit few more pairs.

    Args:
      num_strips: See `Piece`.
      num_empty: Likewise.
      block: The smallest blocks.
      most: Length of the largest ones.
    """

    def visited(block: int) -> int:
      runs = self.query_runs(Piece(num_strips, num_empty, block))
      return sum(len(run.blocks) * run.size * run.length for run in runs)

    while (
      2 * block <= most
      and 16 * block * self.num_slots <= self.score_bytes
      and self.num_slots % (2 * block) == num_empty % (2 * block) == 0
      and visited(2 * block) <= _MORE_PAIRS * visited(block)
    ):
      block *= 2
    return Piece(num_strips, num_empty, block)

  def together(
    self, runs: Sequence[_Run], num_strips: int, num_arrays: int
  ) -> int:
    """Returns how many strips to compute at once.

    Args:
      runs: The blocks of the strips.
      num_strips: Number of strips.
      num_arrays: Arrays of scores, or of their gradients.
    """
    largest = max(run.size * run.length for run in runs)
    most = max(1, self.score_bytes // (4 * num_arrays * largest))
    return -(-num_strips // -(-num_strips // most))

  def scores(self, query, key, query_ids, key_ids, distance) -> jax.Array:
    """Returns the scores of strips, -inf where nothing is seen.

    Args:
      query: `[strips, queries, head_dim]`.
      key: `[strips, keys, head_dim]`.
      query_ids: `[strips, queries]`.
      key_ids: `[strips, keys]`.
      distance: From the first query to the first key, in slots.
    """
    slots = jnp.arange(key.shape[1])[None, :]
    apart = distance + slots - jnp.arange(query.shape[1])[:, None]
    seen = apart <= self.hi
    if self.lo is not None:
      seen &= apart >= self.lo
    seen = seen[None] & (
      (query_ids[:, :, None] == key_ids[:, None, :])
      & (key_ids != 0)[:, None, :]
    )
    scores = self.scale * product("xqd,xkd->xqk", query, key)
    return jnp.where(seen, scores, -jnp.inf)

  def key_gradient(self, of_pairs: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the gradient of the keys or values of a block, all of it."""
    # cuBLAS may sum parts in the dtype that it stores, which in float16 could
    # overflow.
    dtype = jnp.float32
    if self.dtype == self.operands == jnp.bfloat16:
      dtype = jnp.bfloat16
    return product("xqk,xqd->xkd", of_pairs, x, dtype)


def _repeat(times: int, step: Callable[[Any, Any], Any], carry: Any) -> Any:
  """Returns what a function of a number and the carry makes of the carry."""
  if times == 1:
    return step(0, carry)
  # Under `jax.checkpoint` a scan would be split into what does not depend on
  # the arrays, and the rest: the masks of all steps would be stored.
  return jax.lax.while_loop(
    lambda state: state[0] < times,
    lambda state: (state[0] + 1, step(*state)),
    (jnp.int32(0), carry),
  )[1]


@dataclasses.dataclass(frozen=True)
class _Strips:
  """Neighbouring strips of an array, which products read in place.

  Attributes:
    array: `[strips, slots, ...]`.
    first: The first of them.
    count: Their number.
  """

  array: jax.Array
  first: Any
  count: int

  def take(self, start: Any, length: int) -> jax.Array:
    """Returns slots of these strips."""
    rest = self.array.shape[2:]
    return jax.lax.dynamic_slice(
      self.array,
      (self.first, start, *[0] * len(rest)),
      (self.count, length, *rest),
    )

  def put(self, values: jax.Array, start: Any) -> jax.Array:
    """Returns the array with other values in slots of these strips."""
    rest = self.array.shape[2:]
    return jax.lax.dynamic_update_slice(
      self.array,
      values.astype(self.array.dtype),
      (self.first, start, *[0] * len(rest)),
    )


def _over_blocks(
  runs: Sequence[_Run], meet: Callable[..., Any], results: Any
) -> Any:
  """Goes through the blocks of strips.

  Args:
    runs: The blocks.
    meet: Takes the results so far, where a block starts, where the range starts
      that it meets, and the run. Returns the results.
    results: The first ones.
  """
  for run in runs:
    # XLA slices without a copy where it knows the start.
    first = run.starts[0] if len(set(run.starts)) == 1 else None

    def step(i: Any, results: Any, run: _Run = run, first: Any = first) -> Any:
      block = run.blocks[0]
      if len(run.blocks) > 1:
        block = jnp.array(run.blocks)[i]
      start = jnp.array(run.starts)[i] if first is None else first
      return meet(results, block, start, run)

    results = _repeat(len(run.blocks), step, results)
  return results


def _over_strips(
  band: Band,
  runs_of: Callable[[Piece], list[_Run]],
  compute: Callable[..., Any],
  arrays: Sequence[jax.Array],
  results: tuple[jax.Array, ...],
  num_arrays: int,
) -> tuple[jax.Array, ...]:
  """Goes through all strips, some at a time.

  Each step waits for the one before, so that only its scores are in memory.

  Args:
    band: What the strips have in common.
    runs_of: Returns the blocks of a piece.
    compute: Takes the blocks, the results so far, and the strips at hand of
      each array and of each result. Returns the results.
    arrays: `[strips, slots, ...]`.
    results: The first ones, likewise.
    num_arrays: See `Band.together`.
  """
  begin = 0
  for piece in band.pieces:
    runs = runs_of(piece)
    count = band.together(runs, piece.num_strips, num_arrays)

    def step(
      i: Any,
      results: Any,
      runs: Sequence[_Run] = runs,
      count: int = count,
      begin: int = begin,
      piece: Piece = piece,
    ) -> Any:
      strip = i * count
      if piece.num_strips % count:
        # The last two steps have strips in common.
        strip = jnp.minimum(strip, piece.num_strips - count)

      def at_hand(x: jax.Array) -> _Strips:
        return _Strips(x, begin + strip, count)

      return compute(runs, results, at_hand, *map(at_hand, arrays))

    results = _repeat(-(-piece.num_strips // count), step, results)
    begin += piece.num_strips
  return results


def _core_forward(band: Band, query, key, value, query_ids, key_ids):
  """Returns the results of `core`, with a float32 output."""

  def compute(runs, results, at_hand, query, key, value, query_ids, key_ids):
    def meet(results, block, first, run):
      scores = band.scores(
        query.take(block, run.size),
        key.take(first, run.length),
        query_ids.take(block, run.size),
        key_ids.take(first, run.length),
        first - block,
      )
      maximum = safe_maximum(jnp.max(scores, axis=-1))
      weights = jnp.exp(scores - maximum[..., None])
      output = product("xqk,xkd->xqd", weights, value.take(first, run.length))
      total, log_sum = finish_softmax(maximum, jnp.sum(weights, axis=-1))
      outputs, log_sums = map(at_hand, results)
      return (
        outputs.put(output / total[..., None], block),
        log_sums.put(log_sum, block),
      )

    return _over_blocks(runs, meet, results)

  zeros = online_softmax.zeros_like(query)
  return _over_strips(
    band,
    band.query_runs,
    compute,
    (query, key, value, query_ids, key_ids),
    (zeros, zeros[..., 0]),
    num_arrays=1,
  )


def _core_primal(
  band: Band,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  query_ids: jax.Array,
  key_ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns attention within strips.

  Args:
    band: Which slots a query may see.
    query: `[strips, slots, head_dim]`, of the band's dtype.
    key: Like `query`.
    value: Like `query`.
    query_ids: Segments of the queries, int32 `[strips, slots]`.
    key_ids: Segments of the keys; 0 where the slot has no key.

  Returns:
    The output, like `query`, and its log-sum-exp, float32 `[strips, slots]`.
  """
  results, _ = _core_save(band, query, key, value, query_ids, key_ids)
  return results


core = jax.custom_vjp(_core_primal, nondiff_argnums=(0,))


def _core_save(band: Band, query, key, value, query_ids, key_ids):
  query, key, value = (x.astype(band.operands) for x in (query, key, value))
  output, log_sum = _core_forward(band, query, key, value, query_ids, key_ids)
  saved = (query, key, value, query_ids, key_ids, output, log_sum)
  return (output.astype(band.dtype), log_sum), saved


def _core_backward(band: Band, saved, cotangents):
  query, key, value, query_ids, key_ids, output, log_sum = saved
  d_output, d_log_sum = cotangents
  # Sums that start from a constant would be allocated before everything else in
  # a layer's backward pass.
  zero, d_output = jax.lax.optimization_barrier((jnp.float32(0), d_output))
  delta = online_softmax.delta(output, log_sum, d_output, d_log_sum)

  log_sum = safe_maximum(log_sum)

  def compute(
    runs,
    gradients,
    at_hand,
    query,
    key,
    value,
    query_ids,
    key_ids,
    d_output,
    log_sum,
    delta,
  ):
    def meet(state, block, first, run):
      d_query, d_key, d_value = state

      def rows(x: _Strips) -> jax.Array:
        return x.take(first, run.length)

      def columns(x: _Strips) -> jax.Array:
        return x.take(block, run.size)

      scores = band.scores(
        rows(query),
        columns(key),
        rows(query_ids),
        columns(key_ids),
        block - first,
      )
      d_weights = product("xqd,xkd->xqk", rows(d_output), columns(value))
      weights, d_scores = online_softmax.weights_and_gradient(
        scores, rows(log_sum), d_weights, rows(delta), band.scale
      )
      d_query = _Strips(d_query, 0, query.count)
      d_rows = product("xqk,xkd->xqd", d_scores, columns(key))
      d_columns = band.key_gradient(d_scores, rows(query))
      d_values = band.key_gradient(weights, rows(d_output))
      return (
        d_query.put(rows(d_query) + d_rows, first),
        at_hand(d_key).put(d_columns, block),
        at_hand(d_value).put(d_values, block),
      )

    d_query, d_key, d_value = gradients
    shape = (query.count, *query.array.shape[1:])
    sums = vary_like(jnp.broadcast_to(zero, shape), query.array)
    sums, d_key, d_value = _over_blocks(runs, meet, (sums, d_key, d_value))
    return at_hand(d_query).put(sums, 0), d_key, d_value

  zeros = jnp.broadcast_to(zero, query.shape).astype(band.dtype)
  zeros = vary_like(zeros, query)
  gradients = _over_strips(
    band,
    band.key_runs,
    compute,
    (query, key, value, query_ids, key_ids, d_output, log_sum, delta),
    (zeros, zeros, zeros),
    num_arrays=2,
  )
  return *gradients, None, None


core.defvjp(_core_save, _core_backward)
