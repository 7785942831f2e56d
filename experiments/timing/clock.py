"""Times calls, and the rates of the device to compare them with."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Minimum duration of a sample on a GPU, in seconds: a single call may be
# shorter than the clock's resolution and the host's work around it.
_SAMPLE_SECONDS = 0.03
# How often a rate is measured; the median counts.
_RATE_REPEATS = 5


def on_gpu() -> bool:
  """Returns whether jax computes on a GPU."""
  return jax.default_backend() == "gpu"


def spread(seconds: list[float]) -> dict[str, Any]:
  """Returns the median, minimum and maximum of times, in milliseconds."""
  times = [1e3 * s for s in seconds]
  return {
    "median_ms": statistics.median(times),
    "least_ms": min(times),
    "most_ms": max(times),
    "all_ms": times,
  }


def _seconds_a_call(
  start: Callable[[], Any], wait: Callable[[Any], None], calls: int
) -> float:
  result = None
  started = time.perf_counter()
  for _ in range(calls):
    result = start()
  wait(result)
  return (time.perf_counter() - started) / calls


def take_turns(
  contestants: Mapping[str, tuple[Callable[[], Any], Callable[[Any], None]]],
  repeats: int,
  in_flight: bool = True,
) -> dict[str, list[float]]:
  """Returns the milliseconds of a call of each contestant in each round.

  Contestants take turns, round after round, so that ratios compare calls at the
  same temperature of the chip; in another order each round, so that none always
  follows the one that leaves the chip hottest.

  Args:
    contestants: By name, a function that starts a call and one that waits for
      it.
    repeats: Rounds.
    in_flight: Whether a GPU gets the next call before the last one is done, as
      in a training step; otherwise a call includes its launch.
  """
  calls = {}
  for name, (start, wait) in contestants.items():
    _seconds_a_call(start, wait, 1)
    calls[name] = 1
    if on_gpu() and in_flight:
      calls[name] = max(
        1, round(_SAMPLE_SECONDS / _seconds_a_call(start, wait, 2))
      )
  times: dict[str, list[float]] = {name: [] for name in contestants}
  order = random.Random(0)
  for _ in range(repeats):
    for name in order.sample(list(contestants), len(contestants)):
      start, wait = contestants[name]
      times[name].append(1e3 * _seconds_a_call(start, wait, calls[name]))
  return times


def _calls_a_second(start: Callable[[], Any], calls: int) -> float:
  """Returns the median rate of a function of jax, compiled beforehand."""
  jax.block_until_ready(start())
  return 1 / statistics.median(
    _seconds_a_call(start, jax.block_until_ready, calls)
    for _ in range(_RATE_REPEATS)
  )


def matmul_tflops(dtype: str) -> float:
  """Returns the rate of one large square matrix product, in TFLOP/s."""
  n, calls = (8192, 20) if on_gpu() else (1024, 2)
  a, b = (
    jax.random.normal(key, (n, n), jnp.float32).astype(dtype)
    for key in jax.random.split(jax.random.key(1))
  )
  multiply = jax.jit(jnp.dot)
  return 2e-12 * n**3 * _calls_a_second(lambda: multiply(a, b), calls)


def link_rate(mesh: Mesh) -> float:
  """Returns the bytes per second that a device receives from its neighbour.

  All devices of the mesh send at once, each to the next.
  """
  axes, n = mesh.axis_names, mesh.size
  numbers, calls = (2**27, 20) if on_gpu() else (2**16, 2)
  layout = NamedSharding(mesh, PartitionSpec(axes))
  x = jax.jit(lambda: jnp.ones((n * numbers,)), out_shardings=layout)()
  send = jax.jit(
    jax.shard_map(
      lambda x: lax.ppermute(x, axes, [(i, (i + 1) % n) for i in range(n)]),
      mesh=mesh,
      in_specs=layout.spec,
      out_specs=layout.spec,
    )
  )

  def start() -> jax.Array:
    nonlocal x
    x = send(x)
    return x

  return 4 * numbers * _calls_a_second(start, calls)
