"""Runs of several processes, on one host or many.

JAX's runtime joins the processes. It detects how SLURM's `srun` and Open MPI's
`mpirun` started them; otherwise flags describe it. Every process runs the same
command, and the output folder must be on a shared file system.

    srun --ntasks-per-node=8 scca finetune --distributed \
      --config=configs/llama2_7b_32k.py --config.mesh.fsdp=16
"""

import contextlib
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

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
# And of those that end because another one did, at any time.
_OTHER_FAILED = 1
# Missed heartbeats, in seconds, after which jax ends a run: for hosts that are
# lost without a word, as `_Watch` sees everything else.
_HEARTBEAT_TIMEOUT = 50
# How long a process may take to end by itself when another has ended, and to
# leave jax's runtime after an error, in seconds.
_GRACE = 10
# What a process says before it ends: all is well, or it has said what failed.
_GOODBYE, _FAILED = b".", b"!"
# Of a token, a port and a host's name, in bytes.
_LONGEST_NAME = 512


@contextlib.contextmanager
def joined() -> Iterator[None]:
  """Joins the other processes of the run, if there are any, for a block.

  Enter it before anything else in JAX. Only process 0 prints in the block. If a
  process of the run dies, all others end at once, with one line each; if it
  fails, only that one says why.

  Raises:
    ValueError: The number of processes or their address is unknown.
  """
  _start()
  if not _DISTRIBUTED.value:
    yield
    return
  watch = _Watch()
  try:
    yield
  except SystemExit:  # All processes have agreed to end.
    watch.say(_GOODBYE)
    raise
  except BaseException as error:
    # Collectives fail too when another process has died.
    watch.end_if_lost()
    watch.say(_FAILED)
    watch.end_soon(2 if isinstance(error, ValueError | OSError) else 1)
    raise
  watch.say(_GOODBYE)


class _Watch:
  """Connections from process 0 to all others, to see when one has ended.

  The system closes them when a process ends, however it does.
  """

  def __init__(self):
    """Connects; all processes must call it together."""
    self._sockets: list[socket.socket] = []
    # Is set when another process has ended unexpectedly; then, what to print.
    self._seen = threading.Event()
    self._line = ""
    listener, said = None, ""
    if is_primary():
      listener = socket.create_server(("", 0), backlog=jax.process_count())
      port = listener.getsockname()[1]
      said = f"{secrets.token_hex()} {port} {socket.gethostname()}"
    told = np.frombuffer(said.encode().ljust(_LONGEST_NAME), np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(told))
    token, port, host = told.astype(np.uint8).tobytes().decode().split()
    if listener is not None:
      self._spawn(self._accept, listener, token.encode())
      return
    given = (_COORDINATOR.value or "").rpartition(":")[0]
    for candidate in filter(None, (given, host)):
      # Without a connection, missed heartbeats remain.
      with contextlib.suppress(OSError):
        connection = socket.create_connection((candidate, int(port)), _GRACE)
        connection.settimeout(None)
        connection.sendall(token.encode() + jax.process_index().to_bytes(4))
        self._sockets.append(connection)
        self._spawn(self._wait, connection, 0)
        return

  def _spawn(self, function, *args) -> None:
    threading.Thread(target=function, args=args, daemon=True).start()

  def _accept(self, listener: socket.socket, token: bytes) -> None:
    while len(self._sockets) < jax.process_count() - 1:
      connection, _ = listener.accept()
      connection.settimeout(_GRACE)
      try:
        said = connection.recv(len(token) + 4, socket.MSG_WAITALL)
      except OSError:
        continue
      if not said.startswith(token):  # Not a process of the run.
        continue
      number = int.from_bytes(said[len(token) :])
      connection.settimeout(None)
      self._sockets.append(connection)
      self._spawn(self._wait, connection, number)

  def _wait(self, connection: socket.socket, number: int) -> None:
    try:
      said = connection.recv(1)
    except OSError:
      said = b""
    if said == _GOODBYE:
      return
    if said == _FAILED:
      self._seen.set()
      time.sleep(_GRACE)
    else:
      self._line = (
        f"error: process {number} of the run has ended, so this one ends too:"
        " the same command resumes from the last checkpoint."
      )
      self._seen.set()
    # Before jax does it, which prints a hundred lines.
    self._end()

  def _end(self) -> NoReturn:
    if self._line:
      print(self._line, file=sys.stderr, flush=True)
    else:
      self.say(_FAILED)
    # Not sys.exit, which would wait for the other process.
    os._exit(_OTHER_FAILED)

  def end_if_lost(self) -> None:
    """Ends this process if another one has ended unexpectedly."""
    if self._seen.wait(1):
      self._end()

  def say(self, word: bytes) -> None:
    """Tells the others how this process ends."""
    for connection in self._sockets:
      with contextlib.suppress(OSError):
        connection.sendall(word)

  def end_soon(self, status: int) -> None:
    """Ends this process soon, whatever it waits for at its end."""

    def end() -> None:
      time.sleep(_GRACE)
      os._exit(status)

    self._spawn(end)


def _start() -> None:
  """Joins the other processes of the run, if there are any.

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
    jax.distributed.initialize(
      **given, heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT
    )
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
