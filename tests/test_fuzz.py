"""A few cases of the drivers that damage, kill and fill; more run by hand."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


_UNSHARE = ("unshare", "-rm")  # Mounts of its own.


def _run(*args, within=()):
  return subprocess.run(
    [*within, sys.executable, "-m", *args],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.slow
def test_killed_runs_end_as_if_undisturbed_and_two_do_not_mix():
  done = _run("tests.kills", "--count=10", "--pairs=3")
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_commands_without_a_disk_end_in_one_line_and_start_again():
  if shutil.which("unshare") is None or subprocess.call([*_UNSHARE, "true"]):
    pytest.skip(
      "a disk that fills up is a tmpfs of the test's own, and this system does"
      " not let its users mount one (unshare -rm)"
    )
  done = _run("tests.disks", "--count=40", within=_UNSHARE)
  assert done.returncode == 0, done.stdout + done.stderr


def test_damaged_inputs_end_in_one_line():
  done = _run("tests.fuzz", "--count=23", "--seed=0")
  assert done.returncode == 0, done.stdout + done.stderr
  assert "23 cases" in done.stdout and " 0 wrong" in done.stdout
