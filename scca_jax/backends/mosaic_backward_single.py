"""The backward kernel for Hopper GPUs that visits each block once.

(Pallas, Mosaic GPU.) It takes five products per block where the two kernels of
`mosaic_backward` take seven, and is built like the best known kernel, that of
FlashAttention-3 (Shah et al., arXiv 2407.08608). Tiles are blocks of keys, and
each of two warpgroups has half of the keys. Scores and the gradients of the
weights are computed transposed, so that their results are operands in registers
for the gradients of values and keys. For the gradient of the queries they also
go through shared memory, where each warpgroup takes half of the product: of its
columns or, with heads of 64, of its rows; the warpgroup that loads adds it to
memory, in float32. The order in which tiles add to a block of queries varies
from run to run, and so do the last bits of the gradient.

The scores of a block are started before the previous block is done, so that
there is a product to compute while the gradient of the queries is stored.
"""

# Pallas's types include neither scalars as indices nor its own exports.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm

from scca_jax.backends.block_sizes import BlockSizes
from scca_jax.backends.blocks import ALIGN, FIRST, LAST
from scca_jax.backends.mosaic_launch import (
  LOG2E,
  Launch,
  Tile,
  columns_layout,
  full,
  load,
  over_rows,
  rem,
  run,
  seen_pairs,
  tiled,
)

# By head_dim; other sizes do not fit.
SIZES = {64: BlockSizes(128, 128, 2), 128: BlockSizes(128, 64, 2)}
# Groups of tiles per multiprocessor that are dealt out by cost. More would
# balance better, but tiles in order keep the gradients that they add to in the
# cache: with 6 the kernel takes a fifth longer (H100, scca_fixed at 8,192).
NUM_SORTED = 1
# Registers per thread: two warpgroups that compute need all there are.
_COMPUTING_REGISTERS, _LOADING_REGISTERS = 240, 24
# Blocks of queries in flight; of output gradients there are
# `BlockSizes.stages`.
_QUERY_STAGES = 3
# Columns of a matrix in shared memory, and rows of a gradient of queries.
_WIDTH = 64


def _fence() -> None:
  """Makes a thread's stores to shared memory visible to products and copies."""

  @plgpu.inline_mgpu()
  def fence(_: Any) -> None:
    nvvm.fence_proxy(
      nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta
    )

  fence()


def _zero() -> Any:
  """Returns a 0 that the compiler does not know.

  Addresses that depend on it are computed where they are used, in few
  instructions; otherwise the addresses of a whole loop fill the registers.
  """

  @plgpu.inline_mgpu(
    return_type=plgpu.ShapeDtypeStruct(
      (), jnp.int32, layout=plgpu.Layout.WG_SPLAT
    )
  )
  def zero(_: Any) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    value: Any = llvm.inline_asm(
      i32, [], "mov.b32 $0, 0;", "=r", has_side_effects=True
    )
    return mgpu.FragmentedArray.splat(value, (), is_signed=True)

  return zero()


def backward(
  launch: Launch,
  inputs: Sequence[jax.Array],
  tables: Sequence[jax.Array],
  ids: jax.Array,
  d_output: Any,
  lse: Any,
  delta: Any,
  into: Any = None,
  alone: bool = True,
) -> tuple[jax.Array, list[jax.Array]]:
  """Runs the kernel for the gradients of query, key and value.

  Args:
    launch: The launch, with a head_dim that `SIZES` has.
    inputs: As in `mosaic_forward.forward`.
    tables: Likewise, for the inverse direction and `SIZES`.
    ids: Likewise.
    d_output: Like the query.
    lse: Log-sum-exp in powers of 2, `Launch.rows_shape`; `NO_WEIGHT` where
      there is no key or no row.
    delta: `sum(output * d_output)` minus the gradient of the log-sum-exp, 0
      where `lse` is `NO_WEIGHT`.
    into: Gradients of key and value to fill for the key heads of the launch, or
      None.
    alone: Whether no other launch adds to these key heads. The gradients then
      have all key heads, otherwise only those of the launch.

  Returns:
    The gradient of the query, `[batch, padded_len, heads of the launch,
    head_dim]`, and those of key and value, like the key.
  """
  num_kv_heads = launch.num_kv_heads if alone else len(launch.kv_heads)
  dim, dtype = launch.head_dim, launch.dtype
  sizes = SIZES[dim]
  rows, columns, stages = sizes.rows // 2, sizes.columns, sizes.stages
  # The two parts of a gradient of queries differ in columns or in rows.
  num_parts, num_row_parts = dim // _WIDTH, columns // _WIDTH
  factor = launch.scale * LOG2E
  shape = (rows, columns)
  d_query = jnp.zeros(
    (
      launch.batch,
      launch.padded_len // launch.dilation,
      launch.dilation * len(launch.heads),
      num_parts,
      _WIDTH,
    ),
    jnp.float32,
  )

  def kernel(
    table_ref,
    counts_ref,
    rules_ref,
    ids_ref,
    q_ref,
    k_ref,
    v_ref,
    do_ref,
    lse_ref,
    delta_ref,
    *rest,
  ):
    # Arrays to fill come after new ones.
    if into is None:
      dk_ref, dv_ref, dq_ref, *rest = rest
    else:
      dq_ref, dk_ref, dv_ref, *rest = rest
    (
      k_smem,
      v_smem,
      q_smem,
      do_smem,
      ds_smem,
      dq_smem,
      lse_smem,
      delta_smem,
      kv_full,
      kv_free,
      k_done,
      q_full,
      q_free,
      do_full,
      do_free,
      ds_full,
      dq_full,
      dq_free,
    ) = rest
    sm, wg = lax.axis_index("sm"), lax.axis_index("wg")
    num_tiles, num_empty = counts_ref[sm, 0], counts_ref[sm, 1]

    @pl.when(wg == 2)
    def _load():
      plgpu.set_max_registers(_LOADING_REGISTERS, action="decrease")

      def store(place):
        """Adds the gradient of a block of queries to memory."""
        batch, start, head = place
        plgpu.barrier_wait(dq_full)
        for w in range(2):
          first = start + w % num_row_parts * _WIDTH
          slots = pl.ds(pl.multiple_of(first, ALIGN), _WIDTH)
          plgpu.copy_smem_to_gmem(
            dq_smem.at[w],
            dq_ref.at[batch, slots, head, w % num_parts],
            commit_group=w == 1,
            reduction_op="add",
          )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(dq_free)

      def store_all(pending, places):
        for j in range(stages):
          pl.when(pending >= stages - j)(
            functools.partial(store, places[3 * j : 3 * j + 3])
          )

      def load_tile(t, carry):
        group, step, pending, *places = carry
        tile = Tile(table_ref, sm, t)
        flags, batch = tile.flags, tile.batch
        is_first = (flags & FIRST) != 0

        @pl.when(is_first)
        def _():
          # The last block waits for this, and these keys wait for the last
          # block.
          store_all(pending, places)

          @pl.when(group >= 1)
          def _():
            plgpu.barrier_wait(kv_free)

          head = tile.residue * launch.num_kv_heads + tile.kv_head
          for w in range(2):
            source = batch, tile.rows(w * rows, rows), head
            for h in range(num_parts):
              plgpu.copy_gmem_to_smem(
                k_ref.at[(*source, pl.ds(h * _WIDTH, _WIDTH))],
                k_smem.at[0, w, h],
                kv_full,
              )
            plgpu.copy_gmem_to_smem(v_ref.at[source], v_smem.at[0, w], kv_full)

        pending = jnp.where(is_first, 0, pending)

        def load_block(i, carry):
          step, pending, *places = carry
          residue, start = tile.block(i)
          start += i * columns
          slots = pl.ds(pl.multiple_of(start, ALIGN), columns)
          head = residue * launch.num_heads + tile.head
          row = residue * len(launch.heads) + tile.place
          slot = rem(step, _QUERY_STAGES)

          @pl.when(step >= _QUERY_STAGES)
          def _():
            plgpu.barrier_wait(q_free.at[slot])

          plgpu.copy_gmem_to_smem(
            q_ref.at[batch, slots, head], q_smem.at[slot], q_full.at[slot]
          )
          for ref, smem in ((lse_ref, lse_smem), (delta_ref, delta_smem)):
            plgpu.copy_gmem_to_smem(
              ref.at[batch, row, slots], smem.at[slot], q_full.at[slot]
            )
          slot = rem(step, stages)

          @pl.when(step >= stages)
          def _():
            plgpu.barrier_wait(do_free.at[slot])

          plgpu.copy_gmem_to_smem(
            do_ref.at[batch, slots, head], do_smem.at[slot], do_full.at[slot]
          )

          # The gradients of the block that has just made room.
          @pl.when(pending >= stages)
          def _():
            store(places[:3])

          return step + 1, pending + 1, *places[3:], batch, start, row

        step, pending, *places = lax.fori_loop(
          0, tile.num_blocks, load_block, (step, pending, *places)
        )
        group += jnp.where((flags & LAST) != 0, 1, 0)
        return group, step, pending, *places

      _, _, pending, *places = lax.fori_loop(
        0, num_tiles, load_tile, (jnp.int32(0),) * (3 + 3 * stages)
      )
      store_all(pending, places)
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg < 2)
    def _compute():
      plgpu.set_max_registers(_COMPUTING_REGISTERS, action="increase")
      my_v = v_smem.at[0, wg]
      # Its part of a gradient of queries.
      of_rows, of_columns = (wg, 0) if num_row_parts == 2 else (0, wg)

      def kv_place(tile):
        head = tile.kv_head if alone else tile.kv_place
        return (
          tile.batch,
          tile.rows(wg * rows, rows),
          tile.residue * num_kv_heads + head,
        )

      def start_scores(s_acc, step):
        """Starts the scores of a block, minus their log-sum-exp."""
        slot = rem(step, _QUERY_STAGES)
        k = k_smem.at[_zero(), wg]
        lse = load(lse_smem.at[slot], columns_layout())
        s_acc[...] = over_rows(lse, shape)
        for h in range(num_parts):
          q = q_smem.at[slot, :, pl.ds(h * _WIDTH, _WIDTH)]
          plgpu.wgmma(s_acc, k.at[h], q.transpose((1, 0)))

      def compute_tile(t, carry):
        dk, dv, step = carry
        tile = Tile(table_ref, sm, t)
        flags, num_blocks = tile.flags, tile.num_blocks

        @pl.when((flags & FIRST) != 0)
        def _():
          plgpu.barrier_wait(kv_full)

        def block(i, carry, masked):
          dk, dv, s, step = carry
          q_slot, do_slot = rem(step, _QUERY_STAGES), rem(step, stages)
          ds_slot = rem(step, 2)
          zero = _zero()

          def weigh(dp_acc, dv_acc):
            """Returns the gradients of the scores."""
            delta = load(delta_smem.at[q_slot], columns_layout())
            dp_acc[...] = over_rows(delta, shape)
            plgpu.barrier_wait(do_full.at[do_slot])
            d_out = do_smem.at[do_slot]
            plgpu.wgmma(dp_acc, v_smem.at[zero, wg], d_out.transpose((1, 0)))
            p = jnp.exp2(s * factor)  # pyright: ignore
            if masked:
              seen = seen_pairs(
                launch,
                rules_ref,
                ids_ref,
                tile,
                tile.start + wg * rows,
                i,
                shape,
                True,
              )
              p = jnp.where(seen, p, 0.0)
            plgpu.wgmma(dv_acc, p.astype(dtype), d_out)
            dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)
            return (p * dp).astype(dtype)

          def multiply(dq_acc, dk_acc, ds):
            """Sums the gradients of keys and queries; stores the latter."""
            for w in range(2):
              plgpu.wgmma(
                dq_acc,
                ds_smem.at[ds_slot, w, of_rows].transpose((1, 0)),
                k_smem.at[zero, w, of_columns],
              )
            plgpu.wgmma(dk_acc, ds, q_smem.at[q_slot])
            dq = plgpu.wgmma_accumulator_load(dq_acc, wait_n=1)
            plgpu.barrier_arrive(do_free.at[do_slot])

            @pl.when(step >= 1)
            def _():
              plgpu.barrier_wait(dq_free)

            dq_smem[wg] = dq

          def whole(refs):
            dk_acc, dv_acc, s_acc = refs
            ds = pl.run_scoped(
              functools.partial(weigh, dv_acc=dv_acc),
              plgpu.ACC(shape, jnp.float32),
            )
            # This buffer is free: the other warpgroup multiplied with it before
            # it filled the other one.
            for j in range(num_row_parts):
              ds_smem[ds_slot, wg, j] = lax.slice(
                ds, (0, j * _WIDTH), (rows, (j + 1) * _WIDTH)
              )
            _fence()
            plgpu.barrier_arrive(ds_full)
            plgpu.barrier_wait(ds_full)
            pl.run_scoped(
              functools.partial(multiply, dk_acc=dk_acc, ds=ds),
              plgpu.ACC((_WIDTH, _WIDTH), jnp.float32),
            )

            @pl.when(i + 1 < num_blocks)
            def _():
              plgpu.barrier_wait(q_full.at[rem(step + 1, _QUERY_STAGES)])

            # The scores of the next block; after the last block they are not
            # used.
            start_scores(s_acc, step + 1)
            _fence()
            plgpu.barrier_arrive(dq_full)

          init = plgpu.ACC.init
          dk, dv, s = pl.run_state(whole)((init(dk), init(dv), init(s)))
          plgpu.barrier_arrive(q_free.at[q_slot])
          return dk, dv, s, step + 1

        def first_scores(s_acc):
          start_scores(s_acc, step)
          return s_acc[...]

        plgpu.barrier_wait(q_full.at[rem(step, _QUERY_STAGES)])
        s = pl.run_scoped(first_scores, plgpu.ACC(shape, jnp.float32))
        old = jnp.where((flags & FIRST) != 0, 0.0, 1.0)
        num_masked = num_blocks if launch.has_segments else tile.num_masked
        carry = lax.fori_loop(
          0,
          num_masked,
          functools.partial(block, masked=True),
          (dk * old, dv * old, s, step),
        )
        dk, dv, _, step = lax.fori_loop(
          num_masked,
          num_blocks,
          functools.partial(block, masked=False),
          carry,
        )

        @pl.when((flags & LAST) != 0)
        def _():
          # Both warpgroups have read all keys.
          plgpu.barrier_arrive(k_done)
          plgpu.barrier_wait(k_done)
          my_v[...] = dv.astype(dtype)
          for h in range(num_parts):
            part = lax.slice(dk, (0, h * _WIDTH), (rows, (h + 1) * _WIDTH))
            k_smem[0, wg, h] = (part * launch.scale).astype(dtype)
          plgpu.commit_smem()
          place = kv_place(tile)
          for h in range(num_parts):
            plgpu.copy_smem_to_gmem(
              k_smem.at[0, wg, h],
              dk_ref.at[(*place, pl.ds(h * _WIDTH, _WIDTH))],
              commit_group=False,
            )
          plgpu.copy_smem_to_gmem(my_v, dv_ref.at[place])
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          plgpu.barrier_arrive(kv_free)

        return dk, dv, step

      zeros = full((rows, dim), 0, plgpu.Layout.WGMMA)
      lax.fori_loop(0, num_tiles, compute_tile, (zeros, zeros, jnp.int32(0)))
      plgpu.wait_smem_to_gmem(0)

      @pl.when(num_empty > 0)
      def _():
        my_v[...] = zeros.astype(dtype)
        plgpu.commit_smem()

        def clear(t, _):
          tile = Tile(table_ref, sm, t)
          place = kv_place(tile)
          plgpu.copy_smem_to_gmem(my_v, dk_ref.at[place], commit_group=False)
          plgpu.copy_smem_to_gmem(my_v, dv_ref.at[place])

        lax.fori_loop(num_tiles, num_tiles + num_empty, clear, None)
        plgpu.wait_smem_to_gmem(0)

  transforms = tiled()
  barrier = plgpu.Barrier
  results = run(
    launch,
    kernel,
    [launch.output_type(num_kv_heads)] * 2 if into is None else [],
    [d_query, *([] if into is None else into)],
    [
      # The first axis is for an index that the compiler does not know.
      plgpu.SMEM((1, 2, num_parts, rows, _WIDTH), dtype, transforms=transforms),
      plgpu.SMEM((1, 2, rows, dim), dtype, transforms=transforms),
      plgpu.SMEM((_QUERY_STAGES, columns, dim), dtype, transforms=transforms),
      plgpu.SMEM((stages, columns, dim), dtype, transforms=transforms),
      plgpu.SMEM(
        (2, 2, num_row_parts, rows, _WIDTH), dtype, transforms=transforms
      ),
      plgpu.SMEM((2, _WIDTH, _WIDTH), jnp.float32, transforms=tiled(4)),
      plgpu.SMEM((_QUERY_STAGES, columns), jnp.float32),
      plgpu.SMEM((_QUERY_STAGES, columns), jnp.float32),
      barrier(num_arrivals=2 * (num_parts + 1)),
      barrier(num_arrivals=2),
      barrier(num_arrivals=2),
      barrier(num_arrivals=3, num_barriers=_QUERY_STAGES),
      barrier(num_arrivals=2, num_barriers=_QUERY_STAGES),
      barrier(num_barriers=stages),
      barrier(num_arrivals=2, num_barriers=stages),
      barrier(num_arrivals=2),
      barrier(num_arrivals=2),
      barrier(),
    ],
    *tables,
    ids,
    *inputs,
    d_output,
    # Initial values of the products, which they add to.
    lse * (-1 / factor),
    -delta,
    auto_barriers=False,
  )
  if into is None:
    *d_keys, d_query = results
  else:
    d_query, *d_keys = results
  d_query = (d_query * launch.scale).astype(dtype)
  return (
    d_query.reshape(
      launch.batch, launch.padded_len, len(launch.heads), launch.head_dim
    ),
    d_keys,
  )
