"""Runs of several processes, and runs that resume on other devices."""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from scca_jax import convert
from scca_jax.llama import Llama
from scca_jax.llama_config import LlamaConfig

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 4


def _start(num_devices, *args, processes=1):
  """Starts `experiments.finetune` in several processes; returns them."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  devices = f"--xla_force_host_platform_device_count={num_devices // processes}"
  # The test spends its time compiling, not running.
  quickly = "--xla_backend_optimization_level=0"
  environment = os.environ | {
    "XLA_FLAGS": f"{devices} {quickly}",
    "JAX_PLATFORMS": "cpu",
  }
  started = []
  for number in range(processes):
    command = [sys.executable, "-m", "experiments.finetune", *map(str, args)]
    if processes > 1:
      command += [
        "--distributed",
        f"--coordinator_address={address}",
        f"--num_processes={processes}",
        f"--process_id={number}",
      ]
    started.append(
      subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  return started


def _end(started, code=0):
  """Returns the output of processes that end with an exit code."""
  try:
    outputs = [process.communicate(timeout=300) for process in started]
  finally:
    for process in started:
      process.kill()
  for process, (_, errors) in zip(started, outputs, strict=True):
    assert process.returncode == code, errors
  return [output for output, _ in outputs]


def _run(*args, **settings):
  return _end(_start(*args, **settings))


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
  """A model of a few thousand parameters, words, and the settings of a run."""
  folder = tmp_path_factory.mktemp("cluster")
  from scca_jax import assets, tokenizer

  words = tokenizer.load(assets.MODEL)
  model = Llama(
    LlamaConfig(
      vocab_size=words.vocab_size,
      hidden_size=16,
      intermediate_size=24,
      num_layers=1,
      num_heads=4,
      num_kv_heads=2,
      head_dim=4,
      context_len=16,
      bos_token_id=words.bos_id,
      eos_token_id=words.eos_id,
    ),
    rngs=nnx.Rngs(0),
  )
  convert.save_model(
    model,
    folder / "model",
    dtype=np.dtype("float32"),
    tokenizer_file=assets.MODEL / "tokenizer.model",
  )
  rng = random.Random(0)
  text = "the ship sailed over a grey sea and no one saw it come home".split()
  for name, count in (("train", 3000), ("test", 1000)):
    (folder / f"{name}.txt").write_text(
      " ".join(rng.choice(text) for _ in range(count)), encoding="utf8"
    )
  return (
    f"--model={folder / 'model'}",
    f"--data={folder / 'train.txt'}",
    f"--config.data.test={folder / 'test.txt'}",
    "--config.lora.rank=4",
    "--config.training.seq_len=64",
    "--config.training.batch_size=8",
    f"--config.training.steps={STEPS}",
    "--config.training.checkpoint_every=2",
    "--config.training.implementation=reference",
    "--config.training.offload_optimizer=True",
    "--config.evaluation.context_lens=(64,)",
    "--config.evaluation.num_windows=2",
    "--config.pattern=scca_fixed(chunk_size=16)",
  )


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory):
  output = tmp_path_factory.mktemp("alone") / "run"
  _run(1, f"--output_dir={output}", *arguments)
  return output


def _losses(output):
  lines = (output / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  assert [record["step"] for record in records] == list(range(1, STEPS + 1))
  return [record["loss"] for record in records]


def _same(got, expected):
  np.testing.assert_allclose(_losses(got), _losses(expected), rtol=1e-5)
  adapters = [
    load_file(run / "adapter" / "adapter_model.safetensors")
    for run in (got, expected)
  ]
  assert adapters[0].keys() == adapters[1].keys()
  for name, value in adapters[1].items():
    np.testing.assert_allclose(
      adapters[0][name], value, rtol=0, atol=1e-5, err_msg=name
    )
  summaries = [
    json.loads((r / "summary.json").read_text()) for r in (got, expected)
  ]
  tuned = [summary["perplexity"]["tuned"] for summary in summaries]
  assert tuned[0] == pytest.approx(tuned[1], rel=1e-5)


MESH = ("--config.mesh.fsdp=2", "--config.mesh.sequence=2")


@pytest.fixture(scope="module")
def together(arguments, tmp_path_factory):
  """A run of two processes with four devices, and what they print."""
  output = tmp_path_factory.mktemp("together") / "run"
  printed = _run(4, f"--output_dir={output}", *arguments, *MESH, processes=2)
  return output, printed


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    (("--process_id=1",), "--distributed"),
    (("--distributed", "--process_id=1"), "--coordinator_address"),
    (("--config.mesh.data=3",), "mesh.data=2"),
  ],
)
def test_what_does_not_fit_is_refused_in_one_line(
  run_command, capsys, flags, said
):
  assert run_command("finetune", *flags) == 2
  errors = capsys.readouterr().err.strip().splitlines()
  assert len(errors) == 1
  assert said in errors[0]


@pytest.mark.slow
def test_two_processes_train_as_one(alone, together):
  output, printed = together
  _same(output, alone)
  # One of them writes for both. Not line by line: Gloo reports in either, from
  # threads whose lines may run into one another.
  for words in ("Tokenising", "scca_fixed", "perplexity at", "adapter:"):
    assert words in printed[0]
    assert words not in printed[1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("phase", ["config.json", "checkpoints/2", "adapter"])
def test_a_killed_process_ends_the_other_with_one_line(
  arguments, tmp_path, victim, phase
):
  output = tmp_path / "run"
  started = _start(4, f"--output_dir={output}", *arguments, *MESH, processes=2)
  deadline = time.monotonic() + 240
  while time.monotonic() < deadline and not (output / phase).exists():
    time.sleep(0.02)
  started[victim].kill()
  other = started[1 - victim]
  _, errors = other.communicate(timeout=60)
  assert other.returncode == 1, errors
  said = [x for x in errors.splitlines() if x.startswith("error: ")]
  assert len(said) == 1
  assert f"process {victim}" in said[0]
  started[victim].communicate()


@pytest.mark.slow
def test_what_fails_in_one_process_ends_both(arguments, tmp_path):
  text = tmp_path / "latin1.txt"
  text.write_bytes("caf\xe9 ".encode("latin1") * 500)
  given = (f"--output_dir={tmp_path / 'run'}", *arguments, f"--data={text}")
  started = _start(4, *given, *MESH, processes=2)
  errors = [process.communicate(timeout=120)[1] for process in started]
  assert [process.returncode for process in started] == [2, 2], errors
  # One of them says why.
  said = [sum(x.startswith("error: ") for x in e.splitlines()) for e in errors]
  assert said == [1, 0]
  assert "latin1.txt" in errors[0]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_one_step(arguments, tmp_path):
  output = tmp_path / "run"
  endless = "--config.training.steps=1000000"
  started = _start(
    4, f"--output_dir={output}", *arguments, endless, *MESH, processes=2
  )
  metrics = output / "metrics.jsonl"
  deadline = time.monotonic() + 240
  while time.monotonic() < deadline and not (
    metrics.exists() and metrics.read_text()
  ):
    time.sleep(0.1)
  started[1].send_signal(signal.SIGTERM)
  printed = _end(started, 128 + signal.SIGTERM)
  step = re.search(r"Stopped by SIGTERM after step (\d+)", printed[0])
  assert step, printed
  assert (output / "checkpoints" / step[1]).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("to", ["2x2 to 1", "1 to 8"])
def test_a_run_goes_on_on_other_devices(
  arguments, alone, together, tmp_path, to
):
  run = tmp_path / "run"
  shutil.copytree(together[0] if to == "2x2 to 1" else alone, run)
  # As a run that was killed after its third step left it.
  shutil.rmtree(run / "checkpoints" / str(STEPS))
  shutil.rmtree(run / "adapter")
  (run / "summary.json").unlink()
  mesh = ()
  if to == "1 to 8":
    mesh = tuple(f"--config.mesh.{x}=2" for x in ("data", "tensor", "sequence"))
  printed = _run(8, f"--output_dir={run}", *arguments, *mesh)
  assert "Resuming from the checkpoint of step 2." in printed[0]
  # Each step has the loss of its own samples: none is lost or seen twice.
  _same(run, alone)
