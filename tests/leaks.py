"""Looks for information from the future in patterns drawn at random.

    python -m tests.leaks --cases=10000 --seed=1

A case is a head's pattern, including unions and sinks, with random inputs. By
gradient, no output may depend on a later key or value, and each must depend on
exactly the values that the relation shows. Many heads, all with patterns of
their own, and several draws are one compiled call. 10,000 cases take
about ten minutes on two cores.
"""

import argparse
import concurrent.futures
import functools
import multiprocessing
import os
import random
import resource
import sys
import time

_HEADS, _DRAWS, _HEAD_DIM = 14, 3, 4


def _draw(rng: random.Random):
  """Returns a head's pattern, in a sequence of up to some 20 tokens."""
  from scca_jax.patterns import HeadPattern

  chunk_size = rng.choice((None, *range(1, 10)))
  dilation = rng.choice((1, 1, 2, 3, 4, 7))
  is_union = rng.random() < 0.4
  own_chunk = is_union and chunk_size is not None and rng.random() < 0.6
  select = None
  if not is_union and rng.random() < 0.3:
    select = rng.randrange(dilation)
  return HeadPattern(
    chunk_size=chunk_size,
    offset=rng.randrange(-3, 9) if chunk_size else 0,
    shift=rng.choice(
      (0, rng.randrange(20), (chunk_size or 1) * rng.randrange(4))
    ),
    dilation=dilation,
    window=rng.choice((None, None, *range(1, 7))),
    select=select,
    own_chunk=own_chunk,
    sinks=rng.choice((0, rng.randrange(9))) if is_union else 0,
  )


def _cut(head) -> tuple:
  """Returns a key that puts heads side by side that are computed alike."""
  chunk_size = head.chunk_size or 1
  return (
    *(head.chunk_size or 0, head.offset % chunk_size, head.dilation),
    *(head.own_chunk, head.sinks, head.window or 0, head.shift),
  )


def _groups(seed: int, cases: int) -> list[tuple[int, list]]:
  """Returns the heads of each call; no pattern comes twice.

  Most of the time is compilation. Heads of a call that are cut alike share it.
  """
  rng = random.Random(seed)
  num_heads = -(-cases // (_HEADS * _DRAWS)) * _HEADS
  distinct: dict = {}
  while len(distinct) < num_heads:
    distinct[_draw(rng)] = None
  in_order = sorted(distinct, key=_cut)
  groups = []
  for start in range(0, num_heads, _HEADS):
    heads = in_order[start : start + _HEADS]
    rng.shuffle(heads)
    groups.append((rng.randrange(1 << 30), heads))
  return groups


def _check(
  implementation: str, seed: int, heads: list
) -> tuple[int, int, list[str]]:
  """Checks the patterns of a call.

  Args:
    implementation: Attention back end.
    seed: Draws length, boundary and inputs.
    heads: The patterns.

  Returns:
    How many cases leak, how many see other keys than the relation shows, and a
    line on each.
  """
  import jax
  import jax.numpy as jnp
  import numpy as np

  import scca_jax
  from scca_jax import patterns

  rng = random.Random(seed)
  pattern = patterns.AttentionPattern(
    tuple(heads), rng.choice(patterns.BOUNDARIES)
  )
  seq_len = rng.randrange(9, 20)
  shape = (3, _DRAWS, seq_len, _HEADS, _HEAD_DIM)
  inputs = np.random.default_rng(seed).normal(size=shape).astype(np.float32)

  def gradients(query, key, value, position):
    def loss(key, value):
      output = scca_jax.attention(
        query, key, value, pattern, implementation=implementation
      )
      return jnp.sum(jnp.take(output, position, axis=1) ** 2)

    return jax.grad(loss, (0, 1))(key, value)

  compiled = jax.jit(gradients)
  rows = [compiled(*inputs, position) for position in range(seq_len)]
  of_key, of_value = (
    np.abs(np.stack(x)).sum(axis=-1) for x in zip(*rows, strict=True)
  )
  assert np.isfinite(of_key).all() and np.isfinite(of_value).all()
  # [query, draw, key, head] to [draw, head, query, key].
  of_key, of_value = (np.transpose(x, (1, 3, 0, 2)) for x in (of_key, of_value))
  future = np.triu(np.ones((seq_len, seq_len), bool), 1)
  leaking = ((of_key != 0) | (of_value != 0)) & future
  other = (of_value != 0) != pattern.visible(seq_len)
  leaking, other = leaking.any(axis=(2, 3)), other.any(axis=(2, 3))
  lines = [f"draw {d}, {heads[h]} leaks" for d, h in np.argwhere(leaking)]
  lines += [
    f"draw {d}, {heads[h]} sees otherwise" for d, h in np.argwhere(other)
  ]
  # Each call compiles programs of its own.
  jax.clear_caches()
  return int(leaking.sum()), int(other.sum()), lines


def main() -> int:
  """Runs the cases; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--cases", type=int, default=10_000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--jobs", type=int, default=os.cpu_count())
  parser.add_argument("--implementation", default="xla")
  flags = parser.parse_args()
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
  begin, leaks, differ = time.monotonic(), 0, 0
  groups = _groups(flags.seed, flags.cases)
  with concurrent.futures.ProcessPoolExecutor(
    flags.jobs, multiprocessing.get_context("spawn")
  ) as pool:
    found = pool.map(
      functools.partial(_check, flags.implementation),
      *zip(*groups, strict=True),
    )
    for number, (leaking, other, lines) in enumerate(found):
      leaks, differ = leaks + leaking, differ + other
      for line in lines:
        print(f"{number}: {line}", flush=True)
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  print(
    f"seed {flags.seed}, {flags.implementation}:"
    f" {len(groups) * _HEADS * _DRAWS:,} cases of {len(groups) * _HEADS:,}"
    f" patterns in {len(groups)} calls, {time.monotonic() - begin:.0f} s and"
    f" {used.ru_utime + used.ru_stime:.0f} s of CPU time; {leaks} leak,"
    f" {differ} see other keys than the relation shows"
  )
  return bool(leaks or differ)


if __name__ == "__main__":
  sys.exit(main())
