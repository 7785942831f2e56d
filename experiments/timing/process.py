"""A process for each contestant of a benchmark.

The peak of memory that jax reports is that of its process, and the memory that
jax or PyTorch keeps for reuse is freed only when theirs ends.
"""

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import jax


def _start() -> None:
  """Prepares a process, before jax takes memory in it."""
  # Compiling is timed, so nothing may come from the cache.
  jax.config.update("jax_enable_compilation_cache", False)


def run_alone(function: Callable[[Any], Any], argument: Any) -> Any:
  """Returns `function(argument)`, computed in a process of its own.

  Raises:
    RuntimeError: The process ended without a result, for want of memory for
      example. What the function raises is raised here as well.
  """
  # Memory is allocated as needed, so that the peak is what was needed.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  with concurrent.futures.ProcessPoolExecutor(
    1, multiprocessing.get_context("spawn"), initializer=_start
  ) as pool:
    return pool.submit(function, argument).result()
