"""The environment of all tests: eight CPU devices, no implicit broadcasting."""

import os
import tempfile

# Set before jax starts: sharding is tested on simulated devices, without
# hardware, and several processes share a GPU if there is one. Tests spend their
# time compiling, not running, so the compiler optimises little, except in
# .ci/long. Each worker, with the commands it starts, compiles a program once,
# and sees nothing from earlier runs.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="scca_jax_")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import importlib.util
import runpy
import shutil
import sys

import hypothesis
import jax
import pytest
from absl import flags

# The same examples every time, so that failures come from changes;
# `--hypothesis-profile=long` draws ten times as many, new ones each time. A
# test whose examples are expensive takes a share of `max_examples`.
hypothesis.settings.register_profile(
  "fast", max_examples=100, deadline=None, derandomize=True
)
hypothesis.settings.register_profile("long", max_examples=1000, deadline=None)
hypothesis.settings.load_profile("fast")

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure():
  shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def _forget_commands():
  """Removes the flags that commands define, as each has its own `--data`."""
  for module, its_flags in flags.FLAGS.flags_by_module_dict().items():
    # A command run as a script is known by its file; `--config` counts as
    # another's. Other flags of libraries and of experiments.shared.cli stay:
    # those modules are not imported again.
    for flag in list(its_flags):
      if flag.name in flags.FLAGS and (
        module.endswith(".py") or flag.name == "config"
      ):
        delattr(flags.FLAGS, flag.name)
  flags.FLAGS.unparse_flags()


@pytest.fixture
def gpu_compiler():
  """Skips a test if nothing can compile for a GPU without having one."""
  for name in ("jax_plugins.xla_cuda12", "nvidia.cuda_nvcc"):
    try:
      found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
      found = None
    if found is None:
      pytest.skip("no compiler for GPUs: pip install 'scca_jax[plan]'")


@pytest.fixture
def run_command(monkeypatch, tmp_path):
  """Runs `python -m experiments.NAME ARGS` in this process.

  Gives the exit status; standard output and error go where capsys reads them.
  """

  # Commands keep their caches only for this test.
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

  def run(name, *args):
    _forget_commands()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
    try:
      runpy.run_module(
        f"experiments.{name}", run_name="__main__", alter_sys=False
      )
    except SystemExit as end:
      return end.code or 0
    finally:
      _forget_commands()
    return 0

  return run
