"""Runs of several processes, on one host or many: who is who, and who writes.

JAX's runtime joins the processes, and finds out by itself how SLURM's `srun`
and Open MPI's `mpirun` started them; flags say it otherwise. Every process runs
the same command. They need one file system for the output folder.

    srun --ntasks-per-node=8 python -m experiments.finetune --distributed \
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
  "This is one of several processes of a run, started by SLURM, by Open MPI, or"
  " as the three flags below say.",
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


def start() -> None:
  """Joins the other processes of the run, if there are any.

  To be called before anything else of JAX. Only process 0 prints afterwards.

  Raises:
    ValueError: It is not known how many processes there are, or where.
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
        f"--{said[0]} is of a run of several processes: add --distributed."
      )
    return
  if said and len(said) < len(given):
    missing = next(name for name, value in given.items() if value is None)
    raise ValueError(f"--{said[0]} needs --{missing} beside it.")
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
  """Returns whether this process writes for all."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits until all processes are here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def primary_first(name: str) -> Iterator[None]:
  """Lets the others begin when process 0 is through."""
  if not is_primary():
    barrier(name)
  yield
  if is_primary():
    barrier(name)


def agree(flag: bool) -> bool:
  """Returns whether the flag is set in any process; all must call it."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.asarray(flag)).any())
