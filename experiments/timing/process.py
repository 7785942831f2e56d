"""Runs each contestant of a benchmark in its own process.

jax reports the peak memory of its whole process, and the memory that jax or
PyTorch keeps for reuse is freed only when the process ends.
"""

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import jax


def _start(preallocate: bool) -> None:
  """Prepares a process, before jax takes memory in it."""
  # Compilation is timed, so nothing may come from the cache.
  jax.config.update("jax_enable_compilation_cache", False)
  if not preallocate:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def run_alone(
  function: Callable[[Any], Any], argument: Any, *, preallocate: bool = True
) -> Any:
  """Returns `function(argument)`, computed in its own process.

  Args:
    function: What to compute.
    argument: Its argument.
    preallocate: Whether jax takes its memory at once, as in any other command.
      If it grows instead, the pieces cannot be joined, and a step that needs
      most of it does not fit.

  Raises:
    RuntimeError: The process ended without a result, for example for lack of
      memory. Exceptions of the function are raised here too.
  """
  with concurrent.futures.ProcessPoolExecutor(
    1,
    multiprocessing.get_context("spawn"),
    initializer=_start,
    initargs=(preallocate,),
  ) as pool:
    return pool.submit(function, argument).result()
