"""Planned memory of a step on a described GPU, and the command for it."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest
from flax import nnx

from scca_jax import (
  deviceless,
  lora,
  memory,
  patterns,
  quantize,
  sharding,
  training,
)
from scca_jax.llama import Execution, Llama
from scca_jax.llama_config import LlamaConfig

ROOT = pathlib.Path(__file__).parent.parent
needs_compiler = pytest.mark.usefixtures("gpu_compiler")
CONFIG = LlamaConfig(
  vocab_size=512,
  hidden_size=256,
  intermediate_size=512,
  num_layers=8,
  num_heads=4,
  num_kv_heads=2,
  head_dim=64,
  context_len=4096,
)
# A parameter of all layers: attention and MLP, then the norms.
LAYER = 256 * (256 + 128 + 128 + 256) + 3 * 256 * 512
EMBEDDINGS = 2 * 512 * 256
# The usual length, so that a plan is compiled once for several tests.
SEQ = 4096


class _Device:
  def __init__(self, stats):
    self.memory_stats = lambda: stats


def test_the_measured_peak_is_that_of_the_fullest_device():
  gpus = [_Device({"bytes_in_use": 1, "peak_bytes_in_use": n}) for n in (5, 7)]
  assert memory.measured_bytes(gpus) == 7
  assert memory.measured_bytes([_Device(None)]) is None


CARD = memory.Card("v100-16gb")


def _model(method=None):
  return nnx.eval_shape(
    lambda: quantize.quantize_model(
      Llama(
        CONFIG,
        lora=lora.LoraConfig(rank=8),
        dtype=jnp.float16,
        param_dtype=jnp.float16,
        rngs=nnx.Rngs(0),
      ),
      method,
    )
  )


@functools.cache
def _plan(
  remat="layer",
  seq_len=SEQ,
  mlp_chunk=None,
  method=None,
  batch_size=1,
  mesh_config=None,
  segment_len=None,
  **settings,
):
  return memory.plan_step(
    CARD,
    _model(method),
    optimizer=training.OptimizerConfig(),
    step=training.StepConfig(
      patterns=patterns.scca_fixed(4, 512),
      execution=Execution(
        remat=remat,
        mlp_chunk=mlp_chunk,
        segment_len=segment_len,
        offload_segments=segment_len is not None,
      ),
      **settings,
    ),
    batch_size=batch_size,
    seq_len=seq_len,
    mesh_config=mesh_config,
  )


MESH = sharding.MeshConfig(fsdp=2, sequence=2)
ADAPTERS = 8 * 8 * (4 * 256 + 256 + 128 + 128 + 256)
TRAINED = 4 * (EMBEDDINGS + 17 * 256 + ADAPTERS)


@needs_compiler
def test_parts_are_those_that_arithmetic_gives():
  plan = _plan()
  assert plan.capacity_bytes == deviceless.capacity_bytes("v100-16gb")
  assert plan.pool_bytes == int(0.75 * plan.capacity_bytes)
  assert plan.fits
  assert plan.parts["weights"] == 2 * 8 * LAYER
  assert plan.parts["trainable"] == plan.parts["gradients"] == TRAINED
  # Two moments, and the counts of steps.
  assert 2 * TRAINED <= plan.parts["optimizer"] <= 2 * TRAINED + 64
  assert plan.parts["residuals"] == 8 * SEQ * 256 * 2
  assert sum(plan.parts.values()) == plan.peak_bytes
  assert plan.parts["workspace"] > 0
  assert plan.host_bytes == 0


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
  ("method", "bytes_of_layer"),
  [
    # A scale for each of the outputs; for each of them and 64 inputs.
    ("int8", LAYER + 4 * (256 + 128 + 128 + 256 + 2 * 512 + 256)),
    ("nf4", LAYER // 2 + 4 * LAYER // 64),
  ],
)
def test_quantised_weights_are_counted_as_they_are_held(method, bytes_of_layer):
  pytest.importorskip("qwix")
  # Short sequences: with longer ones, how the buffers of attention are packed
  # moves the peak by more than a layer.
  plan, whole = _plan(method=method, seq_len=512), _plan(seq_len=512)
  assert plan.parts["weights"] == 8 * bytes_of_layer
  assert plan.parts["trainable"] == whole.parts["trainable"]
  # Only one layer is dequantised at a time.
  saved = whole.parts["weights"] - plan.parts["weights"]
  one_layer = 2 * LAYER
  assert plan.peak_bytes <= whole.peak_bytes - saved + one_layer


# The paper's model, below, is planned with offloaded moments too.
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
  ("num_parts", "settings"),
  [(1, {}), (2, {"batch_size": 2, "mesh_config": MESH})],
  ids=["alone", "mesh"],
)
def test_offloaded_moments_leave_the_card(num_parts, settings):
  kept = _plan(**settings)
  offloaded = _plan(**settings, offload_optimizer=True)
  assert offloaded.parts["optimizer"] == 0
  assert sum(offloaded.parts.values()) == offloaded.peak_bytes
  # The norms are whole on each of them.
  assert offloaded.host_bytes >= 2 * TRAINED // num_parts
  assert kept.peak_bytes - offloaded.peak_bytes >= TRAINED // num_parts


@needs_compiler
@pytest.mark.slow
def test_evaluation_and_generation_hold_weights_and_cache_only():
  weights = 2 * 8 * LAYER + TRAINED
  read = memory.plan_evaluation(CARD, _model(), batch_size=2, seq_len=1024)
  asked = memory.plan_generation(CARD, _model(), batch_size=2, seq_len=1024)
  cache = 2 * 8 * 2 * 1024 * 2 * 64 * 2
  assert read.parts["weights"] == asked.parts["weights"] == weights
  assert asked.parts["cache"] == cache
  for plan in (read, asked):
    assert sum(plan.parts.values()) == plan.peak_bytes
    assert not any(
      plan.parts[name]
      for name in ("trainable", "optimizer", "gradients", "residuals")
    )
  # The logits of all tokens in float32 are 4 MiB: of 512 at a time, 2.
  assert read.parts["workspace"] < 64 * 2**20


@needs_compiler
@pytest.mark.slow
def test_a_mesh_has_a_part_on_each_gpu():
  one, plan = _plan(), _plan(batch_size=2, mesh_config=MESH)
  assert plan.mesh == "fsdp=2,sequence=2"
  assert plan.parts["weights"] == one.parts["weights"] // 2
  # Two sequences over two copies and two pieces.
  assert plan.parts["residuals"] == one.parts["residuals"] // 2
  assert plan.peak_bytes < one.peak_bytes


@needs_compiler
@pytest.mark.slow
def test_only_the_host_keeps_more_of_more_segments():
  short, long = (_plan(seq_len=n, segment_len=1024) for n in (2048, 4096))
  # Of each segment and layer: keys and values of half a chunk, for the one key
  # head that the two shifted heads share.
  kept = 8 * 2 * 256 * 64 * 2
  assert short.host_bytes == 2 * kept
  assert long.host_bytes == 4 * kept
  assert short.parts["residuals"] == long.parts["residuals"]
  # Tokens, targets, positions, weights, losses and their gradients have four
  # bytes per token, where a single layer would keep 256 numbers of two bytes.
  assert long.peak_bytes - short.peak_bytes <= 8 * 4 * (4096 - 2048)


@needs_compiler
@pytest.mark.slow
def test_offloaded_residuals_leave_the_card():
  kept, offloaded = _plan(), _plan("offload")
  saved = kept.peak_bytes - offloaded.peak_bytes
  # All but the one or two layers under way.
  assert saved >= 0.7 * kept.parts["residuals"]
  # The inputs of both halves of each layer.
  assert offloaded.host_bytes == 2 * kept.parts["residuals"]


@needs_compiler
@pytest.mark.slow
def test_what_projections_gave_takes_what_arithmetic_says():
  layer, kept, offloaded = (
    _plan(),
    _plan("projections"),
    _plan("offload_projections"),
  )
  # The residual stream twice, queries, keys and values, gate and up.
  of_token = 2 * (2 * 256 + 256 + 2 * 128 + 2 * 512)
  assert kept.parts["residuals"] == 8 * SEQ * of_token
  added = kept.parts["residuals"] - layer.parts["residuals"]
  # How the rest is packed moves the peak by less than one layer's.
  one_layer = SEQ * of_token
  assert abs(kept.peak_bytes - layer.peak_bytes - added) <= one_layer
  assert offloaded.host_bytes == kept.parts["residuals"]
  assert offloaded.peak_bytes <= layer.peak_bytes + one_layer


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 63, 64, 65])
def test_the_search_finds_the_largest_that_fits(limit):
  tried = []

  def plan(size):
    tried.append(size)
    return memory.Plan(
      task="train",
      gpu="",
      seq_len=size,
      batch_size=1,
      peak_bytes=size,
      capacity_bytes=limit,
      pool_bytes=limit,
      host_bytes=0,
      parts={},
    )

  assert memory.search(plan, 1, 1).seq_len == limit
  assert len(tried) == len(set(tried)) <= 2 * limit.bit_length() + 2


def test_nothing_is_found_where_nothing_fits():
  def plan(size):
    return memory.Plan(
      task="train",
      gpu="",
      seq_len=size,
      batch_size=1,
      peak_bytes=2,
      capacity_bytes=1,
      pool_bytes=1,
      host_bytes=0,
      parts={},
    )

  assert memory.search(plan, 1024, 1024) is None


@needs_compiler
# A training step is planned for the paper's model, below.
@pytest.mark.parametrize("task", sorted({*memory.TASKS} - {"train"}))
def test_the_command_writes_what_it_prints(run_command, capsys, tmp_path, task):
  output = tmp_path / "plan.json"
  assert not run_command(
    "plan_memory", "--gpu=a100-40gb", f"--task={task}", f"--output={output}"
  )
  plan = json.loads(output.read_text())
  assert (plan["gpu"], plan["seq_len"], plan["fits"]) == (
    "a100-40gb",
    1024,
    True,
  )
  assert plan["task"] == task
  assert 0 < plan["peak_bytes"] < plan["capacity_bytes"]
  assert sum(plan["parts"].values()) == plan["peak_bytes"]
  printed = capsys.readouterr().out
  assert f"{plan['peak_bytes'] / 2**30:.2f} GiB" in printed


@needs_compiler
def test_planning_looks_for_no_gpu_and_keeps_nothing(tmp_path):
  environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
  for name in ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR"):
    environment.pop(name, None)
  planned = subprocess.run(
    [sys.executable, "-m", "experiments.plan_memory", "--task=generate"],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert planned.returncode == 0, planned.stderr
  assert "Traceback" not in planned.stderr
  assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


# Upper bounds, in GiB. The pool of a V100 of 32 GB is 23.8.
V100 = (
  # With the moments on the card, the residuals in the host's memory.
  pytest.param(
    "llama2_7b_8k",
    "v100-32gb",
    17.5,
    ("--config.training.offload_optimizer=False",),
    id="8k",
    marks=pytest.mark.slow,
  ),
  pytest.param("llama2_7b_8k", "v100-32gb", 16.1, (), id="8k offloaded"),
  pytest.param(
    "llama2_7b_32k", "v100-32gb", 20.0, (), id="32k", marks=pytest.mark.slow
  ),
  pytest.param(
    "llama2_7b_8k_v100_16gb",
    "v100-16gb",
    11.8,
    (),
    id="8k int8",
    marks=pytest.mark.slow,
  ),
)


@needs_compiler
@pytest.mark.parametrize(("config", "gpu", "most", "settings"), V100)
def test_the_papers_model_compiles_within_a_v100(
  run_command, capsys, tmp_path, config, gpu, most, settings
):
  output = tmp_path / "plan.json"
  assert not run_command(
    "plan_memory",
    f"--config=configs/{config}.py",
    f"--gpu={gpu}",
    f"--output={output}",
    *settings,
  )
  plan = json.loads(output.read_text())
  assert plan["fits"] and plan["task"] == "train"
  assert plan["parts"]["weights"] < plan["peak_bytes"] <= most * 2**30
  assert sum(plan["parts"].values()) == plan["peak_bytes"]
  assert f"{plan['peak_bytes'] / 2**30:.2f} GiB" in capsys.readouterr().out
  # The paper's recipe: embeddings, norms and adapters are trained, in float32.
  norms = 65 * 4096
  adapters = 32 * 4 * 8 * 2 * 4096
  trained = 2 * 32000 * 4096 + norms + adapters
  assert plan["parts"]["trainable"] == 4 * trained


@pytest.mark.parametrize(
  ("flag", "said"),
  [
    ("--gpu=b200", "b200"),
    ("--search=layers", "layers"),
    ("--mesh=sequence=3", "mesh.sequence=2"),
    ("--task=pretrain", "pretrain"),
    ("--memory_fraction=2", "2"),
    ("--config.training.remat=all", "'all'"),
    ("--config.training.seq_len=1000000000", "up to 67,108,864 tokens"),
    ("--model=nowhere", "nowhere"),
  ],
)
def test_bad_flags_are_one_line(run_command, capsys, flag, said):
  assert run_command("plan_memory", flag) == 2
  errors = capsys.readouterr().err.strip().splitlines()
  assert len(errors) == 1
  assert said in errors[0]


@needs_compiler
@pytest.mark.slow
def test_a_million_tokens_compile_within_a_v100(run_command, tmp_path):
  output = tmp_path / "plan.json"
  assert not run_command(
    "plan_memory",
    "--config=configs/llama2_7b_1m.py",
    "--gpu=v100-32gb",
    f"--output={output}",
  )
  plan = json.loads(output.read_text())
  assert plan["fits"] and plan["peak_bytes"] <= 20.6 * 2**30
  # 64 segments of half a chunk for half the heads, keys and values.
  assert plan["host_bytes"] == 64 * 32 * 1024 * 16 * 128 * 2 * 2 == 16 * 2**30


@needs_compiler
@pytest.mark.slow
def test_a_million_tokens_in_chunks_of_32k_compile_within_a_v100(
  run_command, tmp_path
):
  pytest.importorskip("qwix")
  output = tmp_path / "plan.json"
  assert not run_command(
    "plan_memory",
    "--config=configs/llama2_7b_1m.py",
    "--gpu=v100-32gb",
    "--config.pattern=scca_fixed(chunk_size=32768)",
    "--config.training.segment_len=65536",
    "--config.training.quantize=nf4",
    "--config.training.remat=offload",
    f"--output={output}",
  )
  plan = json.loads(output.read_text())
  assert plan["fits"] and plan["peak_bytes"] <= 23.6 * 2**30
  # Half a chunk of each of 16 segments for half the heads, keys and values;
  # the inputs of attention and MLP of one segment.
  passed_on = 16 * 32 * 16384 * 16 * 128 * 2 * 2
  inputs = 32 * 2 * 65536 * 4096 * 2
  assert plan["host_bytes"] == passed_on + inputs == 96 * 2**30


@needs_compiler
@pytest.mark.slow
def test_160k_tokens_compile_within_a_card_of_24_gb(run_command, tmp_path):
  pytest.importorskip("qwix")
  output = tmp_path / "plan.json"
  assert not run_command(
    "plan_memory",
    "--config=configs/llama2_7b_8k.py",
    "--gpu=rtx4090-24gb",
    "--config.lora.train_embeddings=False",
    "--config.lora.train_norms=False",
    "--config.training.dtype=bfloat16",
    "--config.training.param_dtype=bfloat16",
    "--config.training.quantize=nf4",
    "--config.training.offload_optimizer=False",
    "--config.training.seq_len=163840",
    f"--output={output}",
  )
  plan = json.loads(output.read_text())
  assert plan["fits"] and plan["peak_bytes"] <= 15.6 * 2**30
  # The inputs of attention and MLP of each layer.
  assert plan["host_bytes"] == 32 * 2 * 163840 * 4096 * 2


def test_a_plan_of_too_many_tokens_is_refused(run_command, capsys):
  assert (
    run_command("plan_memory", "--config.training.batch_size=2147483647") == 2
  )
  assert "fewer than 2^31 tokens" in capsys.readouterr().err
