"""Memory of a step on a GPU that is not here, and the command that tells it."""

import json

import pytest

from scca_jax import deviceless, lora, memory, patterns, sharding, training
from scca_jax.llama import LlamaConfig

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


def _plan(
  remat="layer", seq_len=2048, mlp_chunk=None, batch_size=1, mesh_config=None
):
  return memory.plan_step(
    "v100-16gb",
    CONFIG,
    lora_config=lora.LoraConfig(rank=8),
    optimizer=training.OptimizerConfig(),
    step=training.StepConfig(
      patterns=patterns.scca_fixed(4, 512),
      remat=remat,
      mlp_chunk=mlp_chunk,
      dtype="float16",
    ),
    param_dtype="float16",
    batch_size=batch_size,
    seq_len=seq_len,
    mesh_config=mesh_config,
  )


@needs_compiler
def test_parts_are_those_that_arithmetic_gives():
  plan = _plan()
  assert plan.capacity_bytes == deviceless.capacity_bytes("v100-16gb")
  assert plan.pool_bytes == int(0.75 * plan.capacity_bytes)
  assert plan.fits
  assert plan.parts["weights"] == 2 * 8 * LAYER
  adapters = 8 * 8 * (4 * 256 + 256 + 128 + 128 + 256)
  trained = 4 * (EMBEDDINGS + 17 * 256 + adapters)
  assert plan.parts["trainable"] == plan.parts["gradients"] == trained
  # Two moments, and the counts of steps.
  assert 2 * trained <= plan.parts["optimizer"] <= 2 * trained + 64
  assert plan.parts["residuals"] == 8 * 2048 * 256 * 2
  assert sum(plan.parts.values()) >= plan.peak_bytes


@needs_compiler
def test_a_mesh_has_a_part_on_each_gpu():
  one = _plan(seq_len=4096)
  mesh = sharding.MeshConfig(fsdp=2, sequence=2)
  plan = _plan(seq_len=4096, batch_size=2, mesh_config=mesh)
  assert plan.mesh == "fsdp=2,sequence=2"
  assert plan.parts["weights"] == one.parts["weights"] // 2
  # Two sequences over two copies and two pieces.
  assert plan.parts["residuals"] == one.parts["residuals"] // 2
  assert plan.peak_bytes < one.peak_bytes


@needs_compiler
def test_offloaded_residuals_leave_the_card():
  kept, offloaded = _plan(seq_len=8192), _plan("offload", seq_len=8192)
  saved = kept.peak_bytes - offloaded.peak_bytes
  # All but the one or two layers under way.
  assert saved >= 0.7 * kept.parts["residuals"]


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 63, 64, 65])
def test_the_search_finds_the_largest_that_fits(limit):
  tried = []

  def plan(size):
    tried.append(size)
    return memory.Plan(
      gpu="",
      seq_len=size,
      batch_size=1,
      peak_bytes=size,
      capacity_bytes=limit,
      pool_bytes=limit,
      parts={},
    )

  assert memory.search(plan, 1, 1).seq_len == limit
  assert len(tried) == len(set(tried)) <= 2 * limit.bit_length() + 2


def test_nothing_is_found_where_nothing_fits():
  def plan(size):
    return memory.Plan(
      gpu="",
      seq_len=size,
      batch_size=1,
      peak_bytes=2,
      capacity_bytes=1,
      pool_bytes=1,
      parts={},
    )

  assert memory.search(plan, 1024, 1024) is None


@needs_compiler
def test_the_command_writes_what_it_prints(run_command, capsys, tmp_path):
  output = tmp_path / "plan.json"
  assert not run_command("plan_memory", "--gpu=a100-40gb", f"--output={output}")
  plan = json.loads(output.read_text())
  assert (plan["gpu"], plan["seq_len"], plan["fits"]) == (
    "a100-40gb",
    1024,
    True,
  )
  assert 0 < plan["peak_bytes"] < plan["capacity_bytes"]
  printed = capsys.readouterr().out
  assert f"{plan['peak_bytes'] / 2**30:.2f} GiB" in printed


@needs_compiler
@pytest.mark.parametrize(
  ("config", "gpu", "most"),
  [("llama2_7b_8k", "v100-32gb", 17.5), ("llama2_7b_32k", "v100-32gb", 23.8)],
)
def test_the_papers_model_compiles_within_a_v100(
  run_command, tmp_path, config, gpu, most
):
  output = tmp_path / "plan.json"
  assert not run_command(
    "plan_memory",
    f"--config=configs/{config}.py",
    f"--gpu={gpu}",
    f"--output={output}",
  )
  plan = json.loads(output.read_text())
  assert plan["fits"]
  # Frozen weights in two bytes each are there at least.
  assert 12.0 < plan["peak_bytes"] / 2**30 <= most


@pytest.mark.parametrize(
  ("flag", "said"),
  [
    ("--gpu=b200", "b200"),
    ("--search=layers", "layers"),
    ("--mesh=sequence=3", "mesh.sequence=2"),
    ("--memory_fraction=2", "2"),
    ("--config.training.remat=all", "'all'"),
    ("--model=nowhere", "nowhere"),
  ],
)
def test_bad_flags_are_one_line(run_command, capsys, flag, said):
  assert run_command("plan_memory", flag) == 2
  errors = capsys.readouterr().err.strip().splitlines()
  assert len(errors) == 1
  assert said in errors[0]
