"""How commands start and end: kept compilations, bad input in one line."""

import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.shared import cli
from scca_jax import atomic_file


def _end(monkeypatch, main, *args):
  monkeypatch.setattr(sys, "argv", ["command", *args])
  flags.FLAGS.unparse_flags()
  with pytest.raises(SystemExit) as end:
    cli.run(main)
  return end.value.code or 0


@pytest.mark.parametrize(
  "error",
  [
    ValueError("no such\n  pattern 'x'."),
    FileNotFoundError(2, "No such file or directory", "missing.bin"),
    NotImplementedError("no kernel for float64."),
  ],
)
def test_bad_input_is_one_line_and_status_2(monkeypatch, capsys, error):
  def main():
    raise error

  assert _end(monkeypatch, main) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1
  assert lines[0].startswith("error: ")
  assert lines[0].split()[-1].strip("'.") in str(error)


@pytest.mark.parametrize(
  ("flag", "named"),
  [
    ("--no_such=1", "no_such"),
    ("word", "'word'"),
    ("--flagfile=/dev/zero", "--flagfile is not supported"),
  ],
)
def test_a_bad_flag_is_named(monkeypatch, capsys, flag, named):
  assert _end(monkeypatch, lambda: None, flag) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1
  assert named in lines[0]


def test_too_little_memory_is_one_line(monkeypatch, capsys):
  # 256 TiB: no machine has them.
  assert _end(monkeypatch, lambda: jnp.zeros(2**46)) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1
  assert "281474976710656 bytes more" in lines[0]
  assert "`scca plan_memory`" in lines[0]
  monkeypatch.setattr(sys, "argv", ["command"])
  with (
    flagsaver.flagsaver(traceback=True),
    pytest.raises(jax.errors.JaxRuntimeError),
  ):
    cli.run(lambda: jnp.zeros(2**46))


def test_a_bug_keeps_its_traceback(monkeypatch):
  def main():
    raise KeyError("a bug")

  monkeypatch.setattr(sys, "argv", ["command"])
  flags.FLAGS.unparse_flags()
  with pytest.raises(KeyError, match="a bug"):
    cli.run(main)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_with_a_line_and_nothing_half_written(
  monkeypatch, capsys, tmp_path, number
):
  before = signal.getsignal(number)

  def main():
    with atomic_file.AtomicFile(tmp_path / "file") as file:
      file.write(b"half")
      os.kill(os.getpid(), number)
      time.sleep(60)

  assert _end(monkeypatch, main) == 128 + number
  lines = capsys.readouterr().err.split("\n")
  assert len(lines) == 3 and lines[1].startswith(f"Stopped by {number.name}: ")
  assert not list(tmp_path.iterdir())
  assert signal.getsignal(number) == before


COMMAND = """
import jax
from experiments.shared import cli
cli.run(lambda: print(jax.jit(lambda x: 3 * x)(14)))
"""


def _compiled(folder):
  return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("chosen", [False, True])
def test_what_is_compiled_is_kept(tmp_path, chosen):
  own = tmp_path / "own"
  environment = os.environ | {
    "XDG_CACHE_HOME": str(tmp_path / "cache"),
    "JAX_COMPILATION_CACHE_DIR": str(own) if chosen else "",
  }
  subprocess.run(
    [sys.executable, "-c", COMMAND],
    env=environment,
    check=True,
    capture_output=True,
  )
  default = tmp_path / "cache" / "scca_jax" / "compiled"
  used, unused = (own, default) if chosen else (default, own)
  assert _compiled(used)
  assert not _compiled(unused)


def test_a_home_that_cannot_be_written_ends_no_command(monkeypatch, tmp_path):
  file = tmp_path / "file"
  file.touch()
  monkeypatch.setenv("XDG_CACHE_HOME", str(file))
  chosen = jax.config.values["jax_compilation_cache_dir"]
  jax.config.update("jax_compilation_cache_dir", None)
  try:
    assert not _end(monkeypatch, lambda: None)
  finally:
    jax.config.update("jax_compilation_cache_dir", chosen)


# Many arrays to one checkpoint, and no file may grow over 8 KiB, as if the disk
# were full: most writes fail, of which Orbax raises one.
FULL_DISK = """
import resource, signal, sys
import numpy as np
from experiments.shared import cli
from scca_jax import checkpoint

def main():
  resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  state = {str(i): np.random.rand(64, 64) for i in range(60)}
  for attempt in range(5):
    saving = checkpoint.Checkpointer(f"{folder}/{attempt}", keep=None)
    try:
      saving.save(1, state, 0)
      saving.close()
    except OSError as error:
      last = error
  raise last

folder = sys.argv.pop()
cli.run(main)
"""


def test_writes_that_fail_together_are_one_line(tmp_path):
  ended = subprocess.run(
    [sys.executable, "-c", FULL_DISK, str(tmp_path)],
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 2
  assert "Traceback" not in ended.stderr
  assert "never retrieved" not in ended.stderr
  assert ended.stderr.splitlines()[-1].startswith("error: a checkpoint could")
