"""One process per folder, and no lock left by a process that is gone."""

import shutil
import signal
import subprocess
import sys

import pytest

from scca_jax import file_lock

# By the file alone: the package would take seconds to import.
_HOLD = f"""
import importlib.util, sys, time
PATH = {file_lock.__file__!r}
spec = importlib.util.spec_from_file_location("file_lock", PATH)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
with module.only_process(sys.argv[1]):
  print("locked", flush=True)
  time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-c", _HOLD, tmp_path / "run"],
    stdout=subprocess.PIPE,
    text=True,
  )
  with process:
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()


def test_second_process_is_told_who_is_in_the_folder(tmp_path, holder):
  with (
    pytest.raises(ValueError, match=rf"run is in use by .*{holder.pid} on \w"),
    file_lock.only_process(tmp_path / "run"),
  ):
    pass


def test_killed_process_leaves_the_folder_free(tmp_path, holder):
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  with file_lock.only_process(tmp_path / "run"):
    with (
      pytest.raises(ValueError, match="in use"),
      file_lock.only_process(tmp_path / "run"),
    ):
      pass
    (tmp_path / "run" / "kept").touch()
  assert [p.name for p in (tmp_path / "run").iterdir()] == ["kept"]


def test_new_folder_that_stays_empty_is_removed(tmp_path):
  with file_lock.only_process(tmp_path / "a" / "b"):
    pass
  assert not (tmp_path / "a" / "b").exists()


def test_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").touch()
  with (
    pytest.raises(OSError, match="cannot write to .*file/run: Not a directory"),
    file_lock.only_process(tmp_path / "file" / "run"),
  ):
    pass


def test_lock_does_not_follow_links(tmp_path):
  other = tmp_path / "other"
  other.write_text("kept")
  (tmp_path / ".lock").symlink_to(other)
  with (
    pytest.raises(OSError, match="cannot write"),
    file_lock.only_process(tmp_path),
  ):
    pass
  assert other.read_text() == "kept"


def test_folder_that_is_removed_meanwhile_is_named(tmp_path):
  run = tmp_path / "run"
  with (
    pytest.raises(OSError, match="run was removed during the run"),
    file_lock.only_process(run),
  ):
    shutil.rmtree(run)
    run.mkdir()
    (run / ".lock").write_text("another's")
  assert (run / ".lock").exists()
