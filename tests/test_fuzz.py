"""A few cases of `tests.fuzz`; by hand it runs for longer."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def test_damaged_inputs_end_in_one_line():
  done = subprocess.run(
    [sys.executable, "-m", "tests.fuzz", "--count=23", "--seed=0"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert "23 cases" in done.stdout and " 0 wrong" in done.stdout
