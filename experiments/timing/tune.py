"""Finds the best tile sizes of a back end's kernels for some cases."""

import concurrent.futures
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from experiments.timing import attention_timing
from experiments.timing.attention_timing import Case, Function, JaxRun, Pattern
from scca_jax import atomic_file, target
from scca_jax.patterns import Mixture


def _module(implementation: str) -> Any:
  return importlib.import_module(f"scca_jax.backends.{implementation}")


def can_tune(implementation: str) -> bool:
  """Returns whether a back end's kernels have sizes to choose from."""
  return hasattr(_module(implementation), "candidates")


def _with_sizes(pattern: Pattern, implementation: str, sizes: Any) -> Function:
  if isinstance(pattern, Mixture):
    raise ValueError("tuning needs single patterns, not mixtures.")
  module = _module(implementation)
  # The sizes of mosaic's other backward pass are fixed.
  options = {"deterministic": True} if implementation == "mosaic" else {}

  def attend(query, key, value):
    return module.attention(
      query,
      key,
      value,
      pattern,
      segment_ids=None,
      query_offset=0,
      scale=query.shape[-1] ** -0.5,
      sizes=sizes,
      **options,
    )[0]

  return attend


def _write(
  path: pathlib.Path, names: Sequence[str], sizes: dict[str, Any]
) -> None:
  """Writes the sizes of some kernels into a table, under nested names."""
  table = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
  inner = table
  for name in names:
    inner = inner.setdefault(name, {})
  inner.update(sizes)
  atomic_file.write_json(path, table)


def tune(
  cases: Sequence[Case],
  implementation: str,
  *,
  repeats: int,
  output: pathlib.Path,
) -> None:
  """Times all sizes of each kernel and writes the best.

  Args:
    cases: Cases to time, all with the same dtype and head_dim.
    implementation: A back end for which `can_tune` holds.
    repeats: Rounds per case.
    output: Table of sizes (`block_sizes`); other entries stay.

  Raises:
    ValueError: No sizes of a kernel work, or the best give wrong results.
  """
  module, kind = _module(implementation), target.current().kind
  head_dim, dtype = cases[0].head_dim, jnp.dtype(cases[0].dtype)
  best = module.default_sizes(head_dim, dtype, kind)
  tried = module.candidates(head_dim, dtype)
  for kernel, candidates in tried.items():
    part = "forward" if kernel == "forward" else "forward_backward"

    def compiled(
      sizes: Any, kernel: str = kernel, part: str = part, others: Any = best
    ) -> list[JaxRun]:
      trial = dataclasses.replace(others, **{kernel: sizes})
      return [
        JaxRun(
          _with_sizes(case.pattern, implementation, trial), case, parts=(part,)
        )
        for case in cases
      ]

    totals: dict[Any, float] = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      jobs = {
        sizes: pool.submit(compiled, sizes)
        for sizes in dict.fromkeys([getattr(best, kernel), *candidates])
      }
    for sizes, job in jobs.items():
      try:
        times = [
          attention_timing.time_part({"": run}, part, repeats)[""]
          for run in job.result()
        ]
      # Sizes that do not fit the device fail in many ways.
      except Exception as error:
        reason = " ".join(str(error).split())[:100]
        print(f"{implementation} {kernel} {sizes}: {reason}")
        continue
      totals[sizes] = sum(map(statistics.median, times))
      print(
        f"{implementation} {kernel} {sizes}: {totals[sizes]:.3f} ms", flush=True
      )
    if not totals:
      raise ValueError(f"no sizes of {kernel} of {implementation} work here.")
    chosen = min(totals, key=lambda sizes: totals[sizes])
    best = dataclasses.replace(best, **{kernel: chosen})
  for case in cases:
    attention_timing.check(
      case,
      implementation,
      functools.partial(_with_sizes, implementation=implementation, sizes=best),
    )
  _write(
    output,
    (implementation, kind, dtype.name, str(head_dim)),
    {kernel: dataclasses.asdict(getattr(best, kernel)) for kernel in tried},
  )
  print(f"wrote {output}")
