"""Looks for information from the future in patterns drawn at random.

    python -m tests.leaks --cases=10000 --seed=1

A case is a head's pattern, including unions and sinks, with random inputs. By
gradient, no output may depend on a later key or value, and each must depend on
exactly the values that the relation shows. Many heads, all with patterns of
their own, and several draws are one compiled call.
"""

import argparse
import os
import random
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


def main() -> int:
  """Runs the cases; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--cases", type=int, default=10_000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--implementation", default="xla")
  flags = parser.parse_args()
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

  import jax
  import jax.numpy as jnp
  import numpy as np

  import scca_jax
  from scca_jax import patterns

  begin, cases, leaks, differ = time.monotonic(), 0, 0, 0
  distinct: set = set()
  number = 0
  while cases < flags.cases:
    rng = random.Random(f"{flags.seed}/{number}")
    heads: list = []
    while len(heads) < _HEADS:
      head = _draw(rng)
      if head not in distinct:
        distinct.add(head)
        heads.append(head)
    pattern = patterns.AttentionPattern(
      tuple(heads), rng.choice(patterns.BOUNDARIES)
    )
    seq_len = rng.randrange(9, 20)
    shape = (3, _DRAWS, seq_len, _HEADS, _HEAD_DIM)
    inputs = jax.random.normal(jax.random.key(rng.randrange(1 << 30)), shape)

    def gradients(query, key, value, position, pattern=pattern):
      def loss(key, value):
        output = scca_jax.attention(
          query, key, value, pattern, implementation=flags.implementation
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
    of_key, of_value = (
      np.transpose(x, (1, 3, 0, 2)) for x in (of_key, of_value)
    )
    future = np.triu(np.ones((seq_len, seq_len), bool), 1)
    leaking = ((of_key != 0) | (of_value != 0)) & future
    seen = pattern.visible(seq_len)
    other = (of_value != 0) != seen
    for draw, head in np.argwhere(leaking.any(axis=(2, 3))):
      print(f"{number}: draw {draw}, {heads[head]} leaks", flush=True)
    for draw, head in np.argwhere(other.any(axis=(2, 3))):
      print(f"{number}: draw {draw}, {heads[head]} sees otherwise", flush=True)
    leaks += int(leaking.any(axis=(2, 3)).sum())
    differ += int(other.any(axis=(2, 3)).sum())
    cases += _HEADS * _DRAWS
    number += 1
  print(
    f"seed {flags.seed}, {flags.implementation}: {cases:,} cases of"
    f" {len(distinct):,} patterns in {number} calls and"
    f" {time.monotonic() - begin:.0f} s; {leaks} leak, {differ} see other keys"
    " than the relation shows"
  )
  return bool(leaks or differ)


if __name__ == "__main__":
  sys.exit(main())
