r"""Compares ways to extend a context: patterns, rope scalings, recipes.

A config lists arms as data. Each is trained with every learning rate and seed;
the rate is chosen on held-out documents, and the verdict is on test text, with
intervals of the paired difference to the baseline. The work of a killed run is
kept: the same command resumes from there.

    scca ablate --config=configs/ablation_tiny.py \
      --output_dir=runs/ablation --quick

With --mesh=data=4, four arms are trained side by side, one on each device.

It writes results.json, table.md, windows.npz, loss_by_position.png,
quality_by_pairs.png, quality_by_seconds.png and retrieval_by_length.png.
"""

import concurrent.futures
import dataclasses
import pathlib
import queue
import time
from typing import Any

import jax
from absl import flags

from experiments.ablation import report, study
from experiments.ablation.settings import AblationConfig, ArmConfig
from experiments.ablation.store import Store
from experiments.shared import cli, loop
from experiments.shared.config import to_json
from experiments.shared.config_flag import ConfigFlag
from scca_jax import atomic_file, dispatch, sharding

_CONFIG = ConfigFlag(AblationConfig, "ablation_tiny")
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir",
  "runs/ablation",
  "Folder of the study; an interrupted study resumes from it.",
)
_ARMS = flags.DEFINE_list(
  "arms", [], "Only these arms and the baseline; by default all."
)
_QUICK = flags.DEFINE_boolean(
  "quick", False, "Few arms, steps and windows: minutes on a CPU."
)
_DRY_RUN = flags.DEFINE_boolean(
  "dry_run", False, "List the arms with their pairs and tokens; train nothing."
)
_SHARED = flags.DEFINE_boolean(
  "shared_device",
  False,
  "Other programs use the device too, so leave seconds out of the report.",
)
_MESH = flags.DEFINE_string(
  "mesh",
  "",
  "Devices, such as data=4, on which arms are trained side by side, one arm on"
  " each; by default one.",
)
_TIME_LIMIT = flags.DEFINE_float(
  "time_limit",
  None,
  "Seconds after which no further arm is started; the report covers the arms"
  " that are done.",
)


def _read_settings() -> AblationConfig:
  found = _CONFIG.read()
  if _QUICK.value:
    found = found.quickened()
  if _ARMS.value:
    names = [arm.name for arm in found.arms]
    for name in _ARMS.value:
      if name not in names:
        raise ValueError(
          f"unknown arm {name!r}: the arms are {', '.join(names)}."
        )
  return found


def _print_arms(settings: AblationConfig) -> None:
  print(f"{'arm':<28}{'pairs':>8}{'tokens':>12}  runs  pattern")
  for arm in settings.arms:
    print(
      f"{arm.name:<28}{study.pairs_share(settings, arm):>8.3f}"
      f"{study.num_tokens(settings, arm):>12,}"
      f"{len(settings.rates(arm)) * len(settings.seeds):>6}  {arm.pattern}"
    )


def main() -> None:
  """Runs the command.

  Raises:
    ValueError: A setting is out of range, or a text is too short.
    OSError: A file is missing or cannot be written.
  """
  begin = time.perf_counter()
  settings = _read_settings()
  devices = _devices()
  dispatch.check_implementation(settings.run.training.implementation)
  study.check(settings)
  if _DRY_RUN.value:
    _print_arms(settings)
    return
  saved = to_json(settings)
  # Arms may be added to a study that has already started.
  fixed = {
    name: x for name, x in saved.items() if name not in ("arms", "quick")
  }
  with loop.output_dir(_OUTPUT_DIR.value, fixed) as folder:
    _run(settings, fixed, folder, devices, begin)


def _devices() -> list[Any]:
  """Returns the devices of the mesh; None stands for the default one.

  Raises:
    ValueError: There are too few, or an arm would be divided among several.
  """
  config = sharding.MeshConfig.parse(_MESH.value)
  if config.num_devices > config.data:
    raise ValueError(
      f"an arm is trained on one device, so --mesh has only data, got"
      f" {_MESH.value!r}: give data=N for N arms side by side."
    )
  mesh = sharding.make_mesh(config)
  return [None] if mesh is None else list(mesh.devices.flat)


def _run(
  settings: AblationConfig,
  fixed: dict[str, Any],
  folder: pathlib.Path,
  devices: list[Any],
  begin: float,
) -> None:
  """Runs the arms and writes the report, all in the folder of the study."""
  texts = study.Texts.open(settings, folder / "tokens")
  file = folder / "config.json"
  if not file.exists():
    atomic_file.write_json(file, fixed)
  store = Store(folder)
  runner = study.Runner(settings, store, texts, timed=not _SHARED.value)
  by_name = {arm.name: arm for arm in settings.arms}
  free = queue.SimpleQueue()
  for device in devices:
    free.put(device)

  def run(arm: ArmConfig) -> bool:
    limit = _TIME_LIMIT.value
    if limit is not None and time.perf_counter() - begin > limit:
      print(f"{arm.name}: not started, the time is up", flush=True)
      return False
    device = free.get()
    try:
      with jax.default_device(device):
        runner.run(arm)
    finally:
      free.put(device)
    return True

  # The baseline comes first, because everything is compared with it.
  names = dict.fromkeys((settings.baseline, *(_ARMS.value or by_name)))
  arms = [by_name[name] for name in names]
  if len(devices) == 1:  # In this thread, so that Ctrl-C stops it at once.
    ran = list(map(run, arms))
  else:
    with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
      ran = list(pool.map(run, arms))
  done = [arm for arm, is_done in zip(arms, ran, strict=True) if is_done]
  settings = dataclasses.replace(
    settings,
    arms=tuple(done),
    quick=dataclasses.replace(settings.quick, arms=()),
  )
  report.write(settings, store, texts, folder)
  print(f"{folder / 'results.json'}")


if __name__ == "__main__":
  cli.run(main, config=_CONFIG)
