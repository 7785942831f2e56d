"""The console command `scca`; a wheel has all that it needs."""

import os
import pathlib
import subprocess
import sys
import tomllib

import pytest

import scca_jax
from scca_jax import __main__ as scca

ROOT = pathlib.Path(__file__).parent.parent


def _run(monkeypatch, *args):
  monkeypatch.setattr(sys, "argv", ["scca", *args])
  with pytest.raises(SystemExit) as end:
    scca.main()
  return end.value.code or 0


@pytest.mark.parametrize("args", [(), ("--help",)])
def test_help_says_what_each_command_does(monkeypatch, capsys, args):
  assert _run(monkeypatch, *args) == 0
  printed = capsys.readouterr().out
  for path in (ROOT / "experiments").glob("[a-z]*.py"):
    line = next(
      x for x in printed.splitlines() if x.startswith(f"  {path.stem} ")
    )
    assert line.split(None, 1)[1].strip() in path.read_text(encoding="utf8")


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
  assert _run(monkeypatch, "--version") == 0
  assert capsys.readouterr().out == f"scca_jax {scca_jax.__version__}\n"


@pytest.mark.parametrize(
  ("name", "said"), [("finetun", "did you mean finetune?"), ("x", "--help")]
)
def test_an_unknown_command_is_one_line(monkeypatch, capsys, name, said):
  assert _run(monkeypatch, name) == 2
  error = capsys.readouterr().err
  assert said in error and error.count("\n") == 1


def test_a_command_runs_from_any_folder(tmp_path):
  ended = subprocess.run(
    [
      *(sys.executable, "-m", "scca_jax", "plan_memory"),
      *("--config=configs/llama2_7b_8k.py", "--mesh=rows=2"),
    ],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )
  # It has read the config, and then says what is wrong with the mesh.
  assert ended.returncode == 2
  assert "error: " in ended.stderr and "rows" in ended.stderr


def test_a_wheel_has_every_package():
  settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))
  listed = set(settings["tool"]["setuptools"]["packages"])
  found = set()
  for folder in ("scca_jax", "configs", "experiments"):
    for path in (ROOT / folder).rglob("__init__.py"):
      name = ".".join(path.parent.relative_to(ROOT).parts)
      found.add(name if folder == "scca_jax" else f"scca_jax._commands.{name}")
  assert listed == found


def test_every_file_names_the_same_version():
  check = [sys.executable, str(ROOT / ".ci" / "check_version")]
  ended = subprocess.run(check, capture_output=True, text=True)
  assert ended.stdout.strip() == scca_jax.__version__, ended.stderr
  assert subprocess.run([*check, "0.0.1"], capture_output=True).returncode == 1


@pytest.mark.parametrize(
  "command", [("experiments.prepare_data",), ("scca_jax", "prepare_data")]
)
def test_a_signal_during_the_imports_ends_in_one_line(tmp_path, command):
  # Like libraries that try one import after the other.
  (tmp_path / "tqdm.py").write_text(
    "import os, signal\n"
    "try:\n  os.kill(os.getpid(), signal.SIGINT)\n"
    "except BaseException:\n  pass\n"
  )
  ended = subprocess.run(
    [sys.executable, "-m", *command],
    env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 130
  assert ended.stderr.count("Stopped by SIGINT") == 1
  assert "Traceback" not in ended.stderr
