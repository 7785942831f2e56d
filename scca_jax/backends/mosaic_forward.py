"""The forward kernel for Hopper GPUs (Pallas, Mosaic GPU).

A thread block has a warpgroup that loads, through the bulk tensor copy engine,
and two that compute, in turns: one multiplies while the other takes
exponentials (Shah et al., arXiv 2407.08608). It stays on its multiprocessor
and works through the tiles dealt to it. Barriers come in pairs: one says that
a buffer is full, one that it is free again.
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
  full,
  over_columns,
  rem,
  rows_layout,
  run,
  seen_pairs,
  tiled,
)

# Shared memory that a thread block may fill with matrices, in bytes.
_MEMORY = 225 * 1024
# Scores below this belong to no key; the initial maximum of a row.
_LOWEST = -1e30


def forward(
  launch: Launch,
  sizes: BlockSizes,
  inputs: Sequence[jax.Array],
  tables: Sequence[jax.Array],
  ids: jax.Array,
  into: Any = None,
) -> list[jax.Array]:
  """Runs the forward kernel.

  Args:
    launch: The launch.
    sizes: Tile sizes.
    inputs: Query, key and value, `[batch, slots, residues * heads, head_dim]`.
    tables: See `Launch.tables`.
    ids: See `Launch.ids_by_residue`.
    into: An output to fill for the heads of the launch, or None.

  Returns:
    The log-sum-exp, `Launch.rows_shape`, and the output, like the query.
  """
  rows, columns, stages = sizes.rows // 2, sizes.columns, sizes.stages
  dim, dtype = launch.head_dim, launch.dtype
  # With a third block of queries, one is stored while the next is computed.
  key_bytes = 2 * stages * columns * dim * 2
  q_slots = 3 if key_bytes + 3 * sizes.rows * dim * 2 < _MEMORY else 2
  factor = launch.scale * LOG2E

  def kernel(
    table_ref,
    counts_ref,
    rules_ref,
    ids_ref,
    q_ref,
    k_ref,
    v_ref,
    lse_ref,
    out_ref,
    q_smem,
    k_smem,
    v_smem,
    lse_smem,
    q_full,
    q_free,
    k_full,
    k_free,
    v_full,
    v_free,
    turn,
  ):
    sm, wg = lax.axis_index("sm"), lax.axis_index("wg")
    num_tiles, num_empty = counts_ref[sm, 0], counts_ref[sm, 1]

    def at(tile, flag):
      """Runs code only for the first or the last tile of its rows."""
      if launch.has_unions:
        return pl.when((tile.flags & flag) != 0)
      return lambda body: body()

    def num_last(tile):
      return jnp.where((tile.flags & LAST) != 0, 1, 0)

    @pl.when(wg == 2)
    def _load():
      plgpu.set_max_registers(LOADING_REGISTERS, action="decrease")

      def load_tile(t, carry):
        group, step = carry
        tile = Tile(table_ref, sm, t)
        batch = tile.batch

        @at(tile, FIRST)
        def _():
          q_slot = rem(group, q_slots)

          @pl.when(group >= q_slots)
          def _():
            plgpu.barrier_wait(q_free.at[q_slot])

          head = tile.residue * launch.num_heads + tile.head
          for w in range(2):
            plgpu.copy_gmem_to_smem(
              q_ref.at[batch, tile.rows(w * rows, rows), head],
              q_smem.at[q_slot, w],
              q_full.at[q_slot],
            )

        def load_block(i, step):
          slot = rem(step, stages)
          residue, slots = tile.columns(i, columns)
          source = batch, slots, residue * launch.num_kv_heads + tile.kv_head

          @pl.when(step >= stages)
          def _():
            plgpu.barrier_wait(k_free.at[slot])

          plgpu.copy_gmem_to_smem(
            k_ref.at[source], k_smem.at[slot], k_full.at[slot]
          )

          @pl.when(step >= stages)
          def _():
            plgpu.barrier_wait(v_free.at[slot])

          plgpu.copy_gmem_to_smem(
            v_ref.at[source], v_smem.at[slot], v_full.at[slot]
          )
          return step + 1

        step = lax.fori_loop(0, tile.num_blocks, load_block, step)
        return group + num_last(tile), step

      lax.fori_loop(0, num_tiles, load_tile, (jnp.int32(0), jnp.int32(0)))

    @pl.when(wg < 2)
    def _compute():
      plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")

      def places(tile):
        batch, slots = tile.batch, tile.rows(wg * rows, rows)
        head = tile.residue * launch.num_heads + tile.head
        lse_head = tile.residue * len(launch.heads) + tile.place
        return (batch, slots, head), (batch, lse_head, slots)

      def take_turn():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

      # A warpgroup passes its turn on twice per block: once its first product
      # is under way, and once its exponentials are done. Between tiles it does
      # so before it stores.
      pl.when(wg == 1)(take_turn)
      plgpu.barrier_arrive(turn)

      start = (
        full((rows, dim), 0, plgpu.Layout.WGMMA),
        full((rows,), _LOWEST, rows_layout()),
        full((rows,), 0, rows_layout()),
      )

      def compute_tile(t, carry):
        group, step, *sums = carry
        tile = Tile(table_ref, sm, t)
        q_slot = rem(group, q_slots)
        mine = q_smem.at[q_slot, wg]
        at(tile, FIRST)(lambda: plgpu.barrier_wait(q_full.at[q_slot]))

        def block(i, carry, masked):
          acc, top, total, step = carry
          slot = rem(step, stages)
          plgpu.barrier_wait(k_full.at[slot])

          def scores(acc_ref):
            plgpu.wgmma(acc_ref, mine, k_smem.at[slot].transpose((1, 0)))

            @pl.when(i > 0)
            def _():
              plgpu.barrier_arrive(turn)

            plgpu.barrier_wait(turn)
            return acc_ref[...]

          s = pl.run_scoped(scores, plgpu.ACC((rows, columns), jnp.float32))
          plgpu.barrier_arrive(k_free.at[slot])
          if masked:
            seen = seen_pairs(
              launch,
              rules_ref,
              ids_ref,
              tile,
              tile.start + wg * rows,
              i,
              (rows, columns),
              False,
            )
            s = jnp.where(seen, s, -jnp.inf)
          new_top = jnp.maximum(top, s.max(axis=1) * factor)
          keep = jnp.exp2(top - new_top)
          p = jnp.exp2(s * factor - over_columns(new_top, s.shape))
          acc *= over_columns(keep, acc.shape)
          total *= keep
          p16 = p.astype(dtype)
          total += p.sum(axis=1)
          acc, total, new_top, p16 = lax.optimization_barrier(
            (acc, total, new_top, p16)
          )
          plgpu.barrier_arrive(turn)
          plgpu.barrier_wait(v_full.at[slot])
          plgpu.barrier_wait(turn)

          def weigh(acc_ref):
            plgpu.wgmma(acc_ref, p16, v_smem.at[slot])

          acc = pl.run_state(weigh)(plgpu.ACC.init(acc))
          plgpu.barrier_arrive(v_free.at[slot])
          return acc, new_top, total, step + 1

        begin = start
        if launch.has_unions:
          is_first = (tile.flags & FIRST) != 0
          begin = [
            lax.select(jnp.full(x.shape, is_first), x, y)
            for x, y in zip(start, sums, strict=True)
          ]
        num_masked = tile.num_blocks if launch.has_segments else tile.num_masked

        carry = lax.fori_loop(
          0, num_masked, functools.partial(block, masked=True), (*begin, step)
        )
        acc, top, total, step = lax.fori_loop(
          num_masked,
          tile.num_blocks,
          functools.partial(block, masked=False),
          carry,
        )

        @pl.when((t + 1 < num_tiles) | (wg == 0))
        def _():
          plgpu.barrier_arrive(turn)

        @at(tile, LAST)
        def _():
          empty = total == 0
          divisor = jnp.where(empty, 1.0, total)
          result = acc * over_columns(1 / divisor, acc.shape)
          # In natural logarithms, as the caller expects.
          lse = jnp.where(
            empty, -jnp.inf, (top + jnp.log2(divisor)) * (1 / LOG2E)
          )
          # The store of the last tile but one is finished.
          if q_slots == 3:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(group >= 1)
            def _():
              plgpu.barrier_arrive(
                q_free.at[rem(group + (q_slots - 1), q_slots)]
              )

          mine[...] = result.astype(dtype)
          lse_smem[rem(group, 2), wg] = lse
          plgpu.commit_smem()
          out_place, lse_place = places(tile)
          plgpu.copy_smem_to_gmem(
            mine, out_ref.at[out_place], commit_group=False
          )
          plgpu.copy_smem_to_gmem(
            lse_smem.at[rem(group, 2), wg], lse_ref.at[lse_place]
          )
          if q_slots == 2:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_free.at[q_slot])

        carry = group + num_last(tile), step
        return (*carry, acc, top, total) if launch.has_unions else carry

      carry = jnp.int32(0), jnp.int32(0)
      lax.fori_loop(
        0,
        num_tiles,
        compute_tile,
        (*carry, *start) if launch.has_unions else carry,
      )

      @pl.when(wg == 0)
      def _():
        plgpu.barrier_wait(turn)

      plgpu.wait_smem_to_gmem(0)

      @pl.when(num_empty > 0)
      def _():
        zeros = q_smem.at[0, wg]
        zeros[...] = full((rows, dim), 0, plgpu.Layout.WGMMA).astype(dtype)
        lse_smem[0, wg] = full((rows,), -jnp.inf, rows_layout())
        plgpu.commit_smem()

        def clear(t, _):
          tile = Tile(table_ref, sm, t)
          out_place, lse_place = places(tile)
          plgpu.copy_smem_to_gmem(
            zeros, out_ref.at[out_place], commit_group=False
          )
          plgpu.copy_smem_to_gmem(lse_smem.at[0, wg], lse_ref.at[lse_place])

        lax.fori_loop(num_tiles, num_tiles + num_empty, clear, None)
        plgpu.wait_smem_to_gmem(0)

  transforms = tiled()
  one = functools.partial(plgpu.Barrier, num_arrivals=1)
  two = functools.partial(plgpu.Barrier, num_arrivals=2)
  return run(
    launch,
    kernel,
    [
      jax.ShapeDtypeStruct(launch.rows_shape, jnp.float32),
      *([launch.output_type(launch.num_heads)] if into is None else []),
    ],
    [] if into is None else [into],
    [
      plgpu.SMEM((q_slots, 2, rows, dim), dtype, transforms=transforms),
      plgpu.SMEM((stages, columns, dim), dtype, transforms=transforms),
      plgpu.SMEM((stages, columns, dim), dtype, transforms=transforms),
      plgpu.SMEM((2, 2, rows), jnp.float32),
      two(num_barriers=q_slots),
      two(num_barriers=q_slots),
      one(num_barriers=stages),
      two(num_barriers=stages),
      one(num_barriers=stages),
      two(num_barriers=stages),
      plgpu.Barrier(num_arrivals=2),
    ],
    *tables,
    ids,
    *inputs,
  )
