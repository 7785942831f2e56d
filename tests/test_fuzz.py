"""A few cases of `tests.fuzz` and `tests.kills`; many more run by hand."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def _run(*args):
  return subprocess.run(
    [sys.executable, "-m", *args],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.slow
def test_killed_runs_end_as_if_undisturbed_and_two_do_not_mix():
  done = _run("tests.kills", "--count=10", "--pairs=3")
  assert done.returncode == 0, done.stdout + done.stderr


def test_damaged_inputs_end_in_one_line():
  done = _run("tests.fuzz", "--count=23", "--seed=0")
  assert done.returncode == 0, done.stdout + done.stderr
  assert "23 cases" in done.stdout and " 0 wrong" in done.stdout
