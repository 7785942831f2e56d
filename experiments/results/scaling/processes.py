r"""Fine-tunes with one process per GPU, kills one, and resumes on fewer GPUs.

    python -m experiments.results.scaling.processes --output=processes.json

All GPUs of one host, the embedded model, `data` as wide as there are GPUs. The
processes find each other through SLURM's variables, as if started by `srun`.
The script compares the losses with those of one process with all GPUs, sends
SIGKILL to one process, measures how long the others go on, and resumes from the
checkpoint in one process with half of the GPUs. With `JAX_PLATFORMS=cpu` it
rehearses all of this on CPUs.
"""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

from experiments.shared import cli
from scca_jax import atomic_file

_OUTPUT = flags.DEFINE_string("output", None, "Where to write JSON.")
_NUM_GPUS = flags.DEFINE_integer(
  "num_gpus", None, "Number of GPUs to use.", lower_bound=2, required=True
)
_STEPS = flags.DEFINE_integer("steps", 12, "Steps of a run.", lower_bound=9)
_CHECKPOINT_EVERY = 4
_LONGEST_RUN = 240
# How many seconds the others may go on after one was killed.
_LONGEST_END = 120


@dataclasses.dataclass(frozen=True)
class _Job:
  processes: list[subprocess.Popen]

  def wait(self, seconds: float) -> list[int | None]:
    """Returns exit statuses; None is one that had to be killed."""
    deadline = time.monotonic() + seconds
    codes = []
    for process in self.processes:
      try:
        codes.append(process.wait(max(0.1, deadline - time.monotonic())))
      except subprocess.TimeoutExpired:
        process.kill()
        codes.append(None)
    return codes


def _start(
  folder: pathlib.Path, num_gpus: int, num_processes: int, steps: int
) -> _Job:
  command = [
    sys.executable,
    "-m",
    "experiments.finetune",
    f"--output_dir={folder}",
    f"--config.mesh.data={num_gpus}",
    "--config.training.batch_size=8",
    f"--config.training.steps={steps}",
    f"--config.training.checkpoint_every={_CHECKPOINT_EVERY}",
    "--config.evaluation.num_windows=2",
    "--config.evaluation.context_lens=(256,)",
  ]
  environment = dict(os.environ)
  if environment.get("JAX_PLATFORMS") == "cpu":
    count = num_gpus // num_processes
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
  # The last digits choose the port.
  job_id = str(random.randrange(4096))
  processes = []
  for number in range(num_processes):
    mine = dict(environment)
    if num_processes > 1:
      mine |= {
        "SLURM_JOB_ID": job_id,
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(num_processes),
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
      }
    log = open(folder.with_suffix(f".{number}.log"), "ab")  # noqa: SIM115
    processes.append(
      subprocess.Popen(
        command + ["--distributed"] * (num_processes > 1),
        env=mine,
        stdout=log,
        stderr=subprocess.STDOUT,
      )
    )
  return _Job(processes)


def _losses(folder: pathlib.Path) -> dict[int, float]:
  path = folder / "metrics.jsonl"
  if not path.exists():
    return {}
  rows = [json.loads(line) for line in path.read_text("utf8").splitlines()]
  return {row["step"]: row["loss"] for row in rows if "loss" in row}


def _difference(losses: dict[int, float], truth: dict[int, float]) -> float:
  if losses.keys() != truth.keys():
    raise ValueError(f"steps {sorted(losses)} instead of {sorted(truth)}.")
  return max(abs(losses[step] - truth[step]) for step in truth)


def _last_lines(path: pathlib.Path) -> list[str]:
  return path.read_text("utf8", errors="replace").splitlines()[-3:]


def _report(result: dict[str, Any], name: str, part: dict[str, Any]) -> None:
  """Adds a part; what is known is printed and written at once."""
  result[name] = part
  print(f"{name}: {part}", flush=True)
  if _OUTPUT.value:
    atomic_file.write_json(_OUTPUT.value, result)


def main() -> None:
  """Runs the four runs and reports each as it ends."""
  num_gpus, steps = _NUM_GPUS.value, _STEPS.value
  root = pathlib.Path(tempfile.mkdtemp())
  single, several, killed = root / "single", root / "several", root / "killed"
  result = {"num_gpus": num_gpus, "steps": steps}

  # Side by side, as nearly all of it is starting and compiling.
  began = time.monotonic()
  jobs = {
    single: _start(single, num_gpus, 1, steps),
    several: _start(several, num_gpus, num_gpus, steps),
  }
  codes = {folder: job.wait(_LONGEST_RUN) for folder, job in jobs.items()}
  truth = _losses(single)
  _report(
    result,
    "single",
    {
      "statuses": codes[single],
      "losses": list(truth.values()),
      "last": _last_lines(root / "single.0.log"),
    },
  )
  _report(
    result,
    "several",
    {
      "statuses": codes[several],
      "seconds_of_both": time.monotonic() - began,
      "largest_difference_of_losses": _difference(_losses(several), truth),
      "last": _last_lines(root / "several.0.log"),
    },
  )

  job = _start(killed, num_gpus, num_gpus, steps)
  deadline = time.monotonic() + _LONGEST_RUN
  while not (killed / "checkpoints" / str(_CHECKPOINT_EVERY)).exists():
    if time.monotonic() > deadline:
      raise ValueError(f"no checkpoint: {_last_lines(root / 'killed.0.log')}")
    time.sleep(0.05)
  victim = num_gpus - 1
  job.processes[victim].send_signal(signal.SIGKILL)
  began = time.monotonic()
  codes = job.wait(_LONGEST_END)
  _report(
    result,
    "killed",
    {
      "process": victim,
      "statuses": codes,
      "seconds_until_all_ended": time.monotonic() - began,
      "steps_written": sorted(_losses(killed)),
      "last": [_last_lines(root / f"killed.{i}.log") for i in range(num_gpus)],
    },
  )
  codes = _start(killed, num_gpus // 2, 1, steps).wait(_LONGEST_RUN)
  _report(
    result,
    "resumed",
    {
      "num_gpus": num_gpus // 2,
      "statuses": codes,
      "largest_difference_of_losses": _difference(_losses(killed), truth),
      "last": _last_lines(root / "killed.0.log"),
    },
  )


if __name__ == "__main__":
  cli.run(main)
