"""Runs of several processes, on one host or many.

JAX's runtime joins the processes. It detects how SLURM's `srun` and Open MPI's
`mpirun` started them; otherwise flags describe it. Every process runs the same
command, and the output folder must be on a shared file system.

    srun --ntasks-per-node=8 scca finetune --distributed \
      --config=configs/llama2_7b_32k.py --config.mesh.fsdp=16
"""

import contextlib
import os
import sys
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

_DISTRIBUTED = flags.DEFINE_boolean(
  "distributed",
  False,
  "Whether this is one of several processes of a run, started by SLURM, by Open"
  " MPI, or as described by the next three flags.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator_address", None, "HOST:PORT of process 0, the same in all."
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Number of processes of the run."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Number of this process, from 0."
)

# Exit status of processes that end because process 0 did: the status for bad
# input, since all got the same input.
_PRIMARY_FAILED = 2


def start() -> None:
  """Joins the other processes of the run, if there are any.

  Call it before anything else in JAX. Only process 0 prints afterwards.

  Raises:
    ValueError: The number of processes or their address is unknown.
  """
  given = {
    "coordinator_address": _COORDINATOR.value,
    "num_processes": _NUM_PROCESSES.value,
    "process_id": _PROCESS_ID.value,
  }
  said = [name for name, value in given.items() if value is not None]
  if not _DISTRIBUTED.value:
    if said:
      raise ValueError(
        f"--{said[0]} is for runs of several processes: add --distributed."
      )
    return
  if said and len(said) < len(given):
    missing = next(name for name, value in given.items() if value is None)
    raise ValueError(f"--{said[0]} also needs --{missing}.")
  try:
    jax.distributed.initialize(**given)
  except (ValueError, RuntimeError) as error:
    raise ValueError(
      "the processes of the run cannot be joined: start them with srun or"
      " mpirun, or give --coordinator_address, --num_processes and"
      f" --process_id ({error})."
    ) from error
  if not is_primary():
    sys.stdout = open(os.devnull, "w", encoding="utf8")  # noqa: SIM115


def is_primary() -> bool:
  """Returns whether this is process 0, which prints and writes for all."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits until all processes arrive."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def agree(flag: bool) -> bool:
  """Returns whether the flag is set in any process; all must call it."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


@contextlib.contextmanager
def primary_first() -> Iterator[None]:
  """Runs a block in process 0, then in the other processes.

  If process 0 raises in the block, the others end too, silently, because one
  message is enough.

  Raises:
    SystemExit: Process 0 has failed, and this is a different process.
  """
  if not is_primary():
    if agree(False):
      sys.exit(_PRIMARY_FAILED)
    yield
    return
  failed = True
  try:
    yield
    failed = False
  finally:
    # The others wait here, whatever happened.
    agree(failed)
