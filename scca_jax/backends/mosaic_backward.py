"""The backward kernels for Hopper GPUs (Pallas, Mosaic GPU).

One computes the gradients of keys and values; its tiles are blocks of keys with
the queries that see them. The other computes the gradient of the queries, over
the tiles of the forward pass. Both recompute the weights from the log-sum-exp,
and are built like the forward kernel (`mosaic_forward`).
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
from jax.experimental.pallas import mosaic_gpu as plgpu

from scca_jax.backends.block_sizes import BlockSizes
from scca_jax.backends.blocks import FIRST, LAST
from scca_jax.backends.mosaic_launch import (
  COMPUTING_REGISTERS,
  LOADING_REGISTERS,
  LOG2E,
  Launch,
  Tile,
  columns_layout,
  full,
  load,
  over_columns,
  over_rows,
  rem,
  rows_layout,
  run,
  seen_pairs,
  tiled,
)


def backward_keys(
  launch: Launch,
  sizes: BlockSizes,
  inputs: Sequence[jax.Array],
  tables: Sequence[jax.Array],
  ids: jax.Array,
  d_output: Any,
  lse: Any,
  delta: Any,
  into: Any = None,
  alone: bool = True,
) -> list[jax.Array]:
  """Runs the kernel for the gradients of keys and values.

  Args:
    launch: The launch.
    sizes: Tile sizes; rows are keys.
    inputs: As in `forward`.
    tables: As in `forward`.
    ids: As in `forward`.
    d_output: Like the query.
    lse: Log-sum-exp in powers of 2, `Launch.rows_shape`; `NO_WEIGHT` where
      there is no key or no row.
    delta: `sum(output * d_output)` minus the gradient of the log-sum-exp, 0
      where `lse` is `NO_WEIGHT`.
    into: Gradients to fill for the key heads of the launch, or None.
    alone: Whether no other launch adds to these key heads. The outputs then
      have all key heads, otherwise only those of the launch.

  Returns:
    The gradients, like the key.
  """
  num_kv_heads = launch.num_kv_heads if alone else len(launch.kv_heads)
  rows, columns, stages = sizes.rows // 2, sizes.columns, sizes.stages
  dim, dtype = launch.head_dim, launch.dtype
  factor = launch.scale * LOG2E
  shape = (rows, columns)

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
    dk_ref,
    dv_ref,
    k_smem,
    v_smem,
    q_smem,
    do_smem,
    lse_smem,
    delta_smem,
    kv_full,
    kv_free,
    q_full,
    q_free,
    do_full,
    do_free,
  ):
    sm, wg = lax.axis_index("sm"), lax.axis_index("wg")
    num_tiles, num_empty = counts_ref[sm, 0], counts_ref[sm, 1]

    @pl.when(wg == 2)
    def _load():
      plgpu.set_max_registers(LOADING_REGISTERS, action="decrease")

      def load_tile(t, carry):
        group, step = carry
        tile = Tile(table_ref, sm, t)
        kv_slot = rem(group, 2)
        flags, batch = tile.flags, tile.batch

        @pl.when((flags & FIRST) != 0)
        def _():
          @pl.when(group >= 2)
          def _():
            plgpu.barrier_wait(kv_free.at[kv_slot])

          head = tile.residue * launch.num_kv_heads + tile.kv_head
          for w in range(2):
            source = batch, tile.rows(w * rows, rows), head
            plgpu.copy_gmem_to_smem(
              k_ref.at[source], k_smem.at[kv_slot, w], kv_full.at[kv_slot]
            )
            plgpu.copy_gmem_to_smem(
              v_ref.at[source], v_smem.at[kv_slot, w], kv_full.at[kv_slot]
            )

        def load_block(i, step):
          slot = rem(step, stages)
          residue, slots = tile.columns(i, columns)
          head = residue * launch.num_heads + tile.head
          along = batch, residue * len(launch.heads) + tile.place, slots

          @pl.when(step >= stages)
          def _():
            plgpu.barrier_wait(q_free.at[slot])

          plgpu.copy_gmem_to_smem(
            q_ref.at[batch, slots, head],
            q_smem.at[slot],
            q_full.at[slot],
          )
          plgpu.copy_gmem_to_smem(
            lse_ref.at[along],
            lse_smem.at[slot],
            q_full.at[slot],
          )

          @pl.when(step >= stages)
          def _():
            plgpu.barrier_wait(do_free.at[slot])

          plgpu.copy_gmem_to_smem(
            do_ref.at[batch, slots, head],
            do_smem.at[slot],
            do_full.at[slot],
          )
          plgpu.copy_gmem_to_smem(
            delta_ref.at[along],
            delta_smem.at[slot],
            do_full.at[slot],
          )
          return step + 1

        step = lax.fori_loop(0, tile.num_blocks, load_block, step)
        return group + jnp.where((flags & LAST) != 0, 1, 0), step

      lax.fori_loop(0, num_tiles, load_tile, (jnp.int32(0), jnp.int32(0)))

    @pl.when(wg < 2)
    def _compute():
      plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")

      def kv_place(tile):
        head = tile.kv_head if alone else tile.kv_place
        return (
          tile.batch,
          tile.rows(wg * rows, rows),
          tile.residue * num_kv_heads + head,
        )

      def compute_tile(t, carry):
        dk, dv, group, step = carry
        tile = Tile(table_ref, sm, t)
        kv_slot = rem(group, 2)
        flags = tile.flags
        my_k, my_v = k_smem.at[kv_slot, wg], v_smem.at[kv_slot, wg]

        @pl.when((flags & FIRST) != 0)
        def _():
          plgpu.barrier_wait(kv_full.at[kv_slot])

        def block(i, carry, masked):
          dk, dv, step = carry
          slot = rem(step, stages)
          plgpu.barrier_wait(q_full.at[slot])

          def scores(acc_ref):
            plgpu.wgmma(acc_ref, my_k, q_smem.at[slot].transpose((1, 0)))
            return acc_ref[...]

          s = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))
          lse = load(lse_smem.at[slot], columns_layout())
          p = jnp.exp2(s * factor - over_rows(lse, shape))
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
          plgpu.barrier_wait(do_full.at[slot])

          def weigh(refs):
            dv_ref, dp_ref = refs
            plgpu.wgmma(dv_ref, p.astype(dtype), do_smem.at[slot])
            plgpu.wgmma(dp_ref, my_v, do_smem.at[slot].transpose((1, 0)))

          dv, dp = pl.run_state(weigh)(
            (
              plgpu.ACC.init(dv),
              plgpu.ACC.init(full(shape, 0, plgpu.Layout.WGMMA)),
            )
          )
          delta = load(delta_smem.at[slot], columns_layout())
          plgpu.barrier_arrive(do_free.at[slot])
          ds = p * (dp - over_rows(delta, shape))  # pyright: ignore
          ds = ds.astype(dtype)

          def multiply(acc_ref):
            plgpu.wgmma(acc_ref, ds, q_smem.at[slot])

          dk = pl.run_state(multiply)(plgpu.ACC.init(dk))
          plgpu.barrier_arrive(q_free.at[slot])
          return dk, dv, step + 1

        is_first = (flags & FIRST) != 0
        old = jnp.where(is_first, 0.0, 1.0)
        num_masked = tile.num_blocks if launch.has_segments else tile.num_masked
        carry = lax.fori_loop(
          0,
          num_masked,
          functools.partial(block, masked=True),
          (dk * old, dv * old, step),
        )
        dk, dv, step = lax.fori_loop(
          num_masked,
          tile.num_blocks,
          functools.partial(block, masked=False),
          carry,
        )

        @pl.when((flags & LAST) != 0)
        def _():
          my_k[...] = (dk * launch.scale).astype(dtype)
          my_v[...] = dv.astype(dtype)
          plgpu.commit_smem()
          place = kv_place(tile)
          plgpu.copy_smem_to_gmem(my_k, dk_ref.at[place], commit_group=False)
          plgpu.copy_smem_to_gmem(my_v, dv_ref.at[place])
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          plgpu.barrier_arrive(kv_free.at[kv_slot])

        return dk, dv, group + jnp.where((flags & LAST) != 0, 1, 0), step

      zeros = full((rows, dim), 0, plgpu.Layout.WGMMA)
      lax.fori_loop(
        0,
        num_tiles,
        compute_tile,
        (zeros, zeros, jnp.int32(0), jnp.int32(0)),
      )
      plgpu.wait_smem_to_gmem(0)

      @pl.when(num_empty > 0)
      def _():
        none = k_smem.at[0, wg]
        none[...] = zeros.astype(dtype)
        plgpu.commit_smem()

        def clear(t, _):
          tile = Tile(table_ref, sm, t)
          place = kv_place(tile)
          plgpu.copy_smem_to_gmem(none, dk_ref.at[place], commit_group=False)
          plgpu.copy_smem_to_gmem(none, dv_ref.at[place])

        lax.fori_loop(num_tiles, num_tiles + num_empty, clear, None)
        plgpu.wait_smem_to_gmem(0)

  transforms = tiled()
  barrier = plgpu.Barrier
  return run(
    launch,
    kernel,
    [launch.output_type(num_kv_heads)] * 2 if into is None else [],
    [] if into is None else list(into),
    [
      plgpu.SMEM((2, 2, rows, dim), dtype, transforms=transforms),
      plgpu.SMEM((2, 2, rows, dim), dtype, transforms=transforms),
      plgpu.SMEM((stages, columns, dim), dtype, transforms=transforms),
      plgpu.SMEM((stages, columns, dim), dtype, transforms=transforms),
      plgpu.SMEM((stages, columns), jnp.float32),
      plgpu.SMEM((stages, columns), jnp.float32),
      barrier(num_arrivals=4, num_barriers=2),
      barrier(num_arrivals=2, num_barriers=2),
      barrier(num_arrivals=2, num_barriers=stages),
      barrier(num_arrivals=2, num_barriers=stages),
      barrier(num_arrivals=2, num_barriers=stages),
      barrier(num_arrivals=2, num_barriers=stages),
    ],
    *tables,
    ids,
    *inputs,
    d_output,
    lse,
    delta,
  )


def backward_queries(
  launch: Launch,
  sizes: BlockSizes,
  inputs: Sequence[jax.Array],
  tables: Sequence[jax.Array],
  ids: jax.Array,
  d_output: Any,
  lse: Any,
  delta: Any,
  into: Any = None,
  d_lse: Any = None,
) -> list[jax.Array]:
  """Runs the kernel for the gradient of the queries.

  `delta` is computed from the rounded output. If one key has nearly all the
  weight, that error drowns the gradient of the scores. But their sum over the
  keys is known: given `d_lse`, the kernel derives the error of `delta` from it,
  at the cost of one more product, and corrects both the gradient and `delta`.

  Args:
    launch: See `backward_keys`, also for the arguments below.
    sizes: Tile sizes.
    inputs: Query, key and value.
    tables: Tables of tiles.
    ids: Segment ids.
    d_output: Gradient of the output.
    lse: Log-sum-exp.
    delta: Its delta.
    into: A gradient to fill for the heads of the launch, or None.
    d_lse: The gradient of the log-sum-exp, laid out like `lse`, or None.

  Returns:
    The gradient, like `query`, and with `d_lse` the corrected `delta`.
  """
  exact = d_lse is not None
  rows, columns, stages = sizes.rows // 2, sizes.columns, sizes.stages
  dim, dtype = launch.head_dim, launch.dtype
  factor = launch.scale * LOG2E
  shape = (rows, columns)

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
    last_ref,
    dq_ref,
    *rest,
  ):
    # The corrected array is an output, and its other input is the last one.
    delta_ref = d_lse_ref = last_ref
    if exact:
      delta_ref, rest = rest[0], rest[1:]
    (
      q_smem,
      do_smem,
      dq_smem,
      k_smem,
      v_smem,
      row_smem,
      q_full,
      q_free,
      k_full,
      k_free,
      v_full,
      v_free,
    ) = rest
    # Rows of lse, delta, d_lse, and of the corrected delta.
    lse_smem, delta_smem = row_smem.at[0], row_smem.at[1]
    sm, wg = lax.axis_index("sm"), lax.axis_index("wg")
    num_tiles, num_empty = counts_ref[sm, 0], counts_ref[sm, 1]

    @pl.when(wg == 2)
    def _load():
      plgpu.set_max_registers(LOADING_REGISTERS, action="decrease")

      def load_tile(t, step):
        tile = Tile(table_ref, sm, t)
        batch = tile.batch

        @pl.when((tile.flags & FIRST) != 0)
        def _():
          @pl.when(t >= 1)
          def _():
            plgpu.barrier_wait(q_free)

          head = tile.residue * launch.num_heads + tile.head
          row = tile.residue * len(launch.heads) + tile.place
          for w in range(2):
            slots = tile.rows(w * rows, rows)
            source, along = (batch, slots, head), (batch, row, slots)
            for ref, smem in ((q_ref, q_smem), (do_ref, do_smem)):
              plgpu.copy_gmem_to_smem(ref.at[source], smem.at[w], q_full)
            for ref, smem in (
              (lse_ref, lse_smem),
              (delta_ref, delta_smem),
              *([(d_lse_ref, row_smem.at[2])] if exact else []),
            ):
              plgpu.copy_gmem_to_smem(ref.at[along], smem.at[w], q_full)

        def load_block(i, step):
          slot = rem(step, stages)
          residue, slots = tile.columns(i, columns)
          source = batch, slots, residue * launch.num_kv_heads + tile.kv_head

          @pl.when(step >= stages)
          def _():
            plgpu.barrier_wait(v_free.at[slot])

          plgpu.copy_gmem_to_smem(
            v_ref.at[source], v_smem.at[slot], v_full.at[slot]
          )

          @pl.when(step >= stages)
          def _():
            plgpu.barrier_wait(k_free.at[slot])

          plgpu.copy_gmem_to_smem(
            k_ref.at[source], k_smem.at[slot], k_full.at[slot]
          )
          return step + 1

        return lax.fori_loop(0, tile.num_blocks, load_block, step)

      lax.fori_loop(0, num_tiles, load_tile, jnp.int32(0))

    @pl.when(wg < 2)
    def _compute():
      plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")

      def q_place(tile):
        return (
          tile.batch,
          tile.rows(wg * rows, rows),
          tile.residue * launch.num_heads + tile.head,
        )

      zeros = full((rows, dim), 0, plgpu.Layout.WGMMA)

      def compute_tile(t, carry):
        step, *sums = carry
        tile = Tile(table_ref, sm, t)
        is_first, is_last = ((tile.flags & flag) != 0 for flag in (FIRST, LAST))
        my_q, my_do, mine = q_smem.at[wg], do_smem.at[wg], dq_smem.at[wg]
        pl.when(is_first)(lambda: plgpu.barrier_wait(q_full))
        lse = load(lse_smem.at[wg], rows_layout())
        delta = load(delta_smem.at[wg], rows_layout())

        def block(i, carry, masked):
          dq, pk, error, step = carry
          slot = rem(step, stages)
          plgpu.barrier_wait(k_full.at[slot])

          def products(s_ref, dp_ref):
            plgpu.wgmma(s_ref, my_q, k_smem.at[slot].transpose((1, 0)))
            plgpu.barrier_wait(v_full.at[slot])
            plgpu.wgmma(dp_ref, my_do, v_smem.at[slot].transpose((1, 0)))
            # The exponentials overlap the second product.
            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
            p = jnp.exp2(s * factor - over_columns(lse, shape))
            if masked:
              seen = seen_pairs(
                launch,
                rules_ref,
                ids_ref,
                tile,
                tile.start + wg * rows,
                i,
                shape,
                False,
              )
              p = jnp.where(seen, p, 0.0)
            return p, dp_ref[...]

          p, dp = pl.run_scoped(
            products,
            plgpu.ACC(shape, jnp.float32),
            plgpu.ACC(shape, jnp.float32),
          )
          plgpu.barrier_arrive(v_free.at[slot])
          ds = p * (dp - over_columns(delta, shape))  # pyright: ignore
          if exact:
            error += ds.sum(axis=1)

            def multiply_both(refs):
              pk_ref, dq_ref = refs
              plgpu.wgmma(pk_ref, p.astype(dtype), k_smem.at[slot])
              plgpu.wgmma(dq_ref, ds.astype(dtype), k_smem.at[slot])

            pk, dq = pl.run_state(multiply_both)(
              (plgpu.ACC.init(pk), plgpu.ACC.init(dq))
            )
          else:

            def multiply(acc_ref):
              plgpu.wgmma(acc_ref, ds.astype(dtype), k_smem.at[slot])

            dq = pl.run_state(multiply)(plgpu.ACC.init(dq))
          plgpu.barrier_arrive(k_free.at[slot])
          return dq, pk, error, step + 1

        begin: Any = (zeros, None, None)
        if exact:
          d_lse_rows = load(row_smem.at[2, wg], rows_layout())
          begin = zeros, zeros, 0 - d_lse_rows
        if launch.has_unions:
          begin = jax.tree.map(
            lambda x, y: lax.select(jnp.full(x.shape, is_first), x, y),
            begin,
            tuple(sums),
          )
        num_masked = tile.num_blocks if launch.has_segments else tile.num_masked
        carry = lax.fori_loop(
          0,
          num_masked,
          functools.partial(block, masked=True),
          (*begin, step),
        )
        dq, pk, error, step = lax.fori_loop(
          num_masked,
          tile.num_blocks,
          functools.partial(block, masked=False),
          carry,
        )

        @pl.when(is_last)
        def _():
          plgpu.barrier_arrive(q_free)
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          result = dq
          if exact:
            result -= over_columns(error, dq.shape) * pk
            row_smem[3, wg] = delta + error
          mine[...] = (result * launch.scale).astype(dtype)
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(mine, dq_ref.at[q_place(tile)])
          if exact:
            row = tile.residue * len(launch.heads) + tile.place
            along = tile.batch, row, tile.rows(wg * rows, rows)
            plgpu.copy_smem_to_gmem(row_smem.at[3, wg], delta_ref.at[along])

        return (step, dq, pk, error) if launch.has_unions else (step,)

      carry: Any = (jnp.int32(0),)
      if launch.has_unions:
        no_error = full((rows,), 0, rows_layout())
        carry += (zeros, *((zeros, no_error) if exact else (None, None)))
      lax.fori_loop(0, num_tiles, compute_tile, carry)
      plgpu.wait_smem_to_gmem(0)

      @pl.when(num_empty > 0)
      def _():
        none = dq_smem.at[wg]
        none[...] = zeros.astype(dtype)
        plgpu.commit_smem()

        def clear(t, _):
          tile = Tile(table_ref, sm, t)
          plgpu.copy_smem_to_gmem(none, dq_ref.at[q_place(tile)])

        lax.fori_loop(num_tiles, num_tiles + num_empty, clear, None)
        plgpu.wait_smem_to_gmem(0)

  transforms = tiled()
  barrier = plgpu.Barrier
  return run(
    launch,
    kernel,
    [launch.output_type(launch.num_heads)] if into is None else [],
    [*([] if into is None else [into]), *([delta] if exact else [])],
    [
      plgpu.SMEM((2, rows, dim), dtype, transforms=transforms),
      plgpu.SMEM((2, rows, dim), dtype, transforms=transforms),
      plgpu.SMEM((2, rows, dim), dtype, transforms=transforms),
      plgpu.SMEM((stages, columns, dim), dtype, transforms=transforms),
      plgpu.SMEM((stages, columns, dim), dtype, transforms=transforms),
      plgpu.SMEM((4 if exact else 2, 2, rows), jnp.float32),
      barrier(num_arrivals=10 if exact else 8),
      barrier(num_arrivals=2),
      barrier(num_barriers=stages),
      barrier(num_arrivals=2, num_barriers=stages),
      barrier(num_barriers=stages),
      barrier(num_arrivals=2, num_barriers=stages),
    ],
    *tables,
    ids,
    *inputs,
    d_output,
    lse,
    d_lse if exact else delta,
  )
