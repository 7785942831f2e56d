"""The command `benchmark_step`: what it writes, counts and refuses."""

import json
import os

import pytest

from experiments.shared.config import (
  FinetuneConfig,
  TrainingConfig,
)
from experiments.timing import flops, process, step_timing
from scca_jax import lora, patterns, quantize
from scca_jax.llama_config import LlamaConfig

SIZES = {
  "model_type": "llama",
  "vocab_size": 64,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 32,
}


@pytest.fixture
def small(tmp_path):
  """Flags for a minimal model without weights."""
  (tmp_path / "config.json").write_text(json.dumps(SIZES), encoding="utf8")
  return (
    f"--model={tmp_path}",
    "--random_weights",
    "--seq_lens=64",
    "--config.training.batch_size=2",
    "--config.pattern=scca_fixed(chunk_size=16)",
    "--config.training.remat=layer",
    "--warmup=1",
    "--repeats=3",
    "--peers=",
  )


def test_steps_are_written_with_their_rates(
  run_command, capsys, small, tmp_path
):
  output, plot = tmp_path / "step.json", tmp_path / "step.png"
  assert not run_command(
    "benchmark_step",
    *small,
    "--patterns=scca_fixed(chunk_size=16, shift=8),dense",
    f"--output={output}",
    f"--plot={plot}",
  )
  result = json.loads(output.read_text())
  assert result["config"]["lora"]["rank"] == 64
  fixed, dense = result["rows"]
  assert fixed["pattern"] == "scca_fixed(chunk_size=16, shift=8)"
  assert dense["pattern"] == "dense"
  assert fixed["num_pairs"] == (
    2 * 2 * patterns.scca_fixed(4, 16).visible(64).sum()
  )
  assert dense["num_pairs"] == 2 * 2 * 4 * 64 * 65 // 2
  for row in (fixed, dense):
    assert len(row["all_ms"]) == 3
    assert row["least_ms"] <= row["median_ms"] <= row["most_ms"]
    assert row["tokens_per_second"] == pytest.approx(
      2 * 64 / row["median_ms"] * 1e3
    )
    assert row["mfu"] == pytest.approx(
      row["operations"]["model"]
      / (1e-3 * row["median_ms"])
      / (1e12 * row["matmul_tflops"])
    )
    assert row["roofline_share"] > row["mfu"]
    assert row["compiled_peak_bytes"] > 0
    assert row["compile_seconds"] > 0
    assert row["versions"]["jax"]
  (other,) = fixed["ratios"].items()
  assert other == (
    "scca_jax dense",
    pytest.approx(fixed["tokens_per_second"] / dense["tokens_per_second"]),
  )
  assert plot.read_bytes().startswith(b"\x89PNG")
  printed = capsys.readouterr().out
  assert f"{fixed['tokens_per_second']:,.0f}" in printed


@pytest.mark.slow
def test_only_steps_of_peers_leave_memory_to_others(monkeypatch):
  name = "XLA_PYTHON_CLIENT_PREALLOCATE"
  monkeypatch.delenv(name)
  assert process.run_alone(os.getenv, name) is None
  found = process.run_alone(os.getenv, name, preallocate=False)
  assert found == "false"


def test_operations_are_those_of_arithmetic():
  config = LlamaConfig(
    vocab_size=100,
    hidden_size=8,
    intermediate_size=20,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    context_len=16,
  )
  adapters = lora.LoraConfig(
    rank=2, targets=("q_proj", "down_proj"), train_embeddings=False
  )
  layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 20
  adapter = 2 * (8 + 8) + 2 * (20 + 8)
  forward = 2 * 5 * 3 * (layer + adapter) + 4 * 2 * 7
  # Forward and the gradients of all inputs; those of the adapters; attention's
  # four products of the backward pass.
  model = 2 * forward + 2 * 2 * 5 * 800 + 2 * 5 * 3 * adapter + 4 * 2 * 7
  found = flops.step_flops(config, adapters, num_pairs=7, num_tokens=5)
  assert found == {"model": model, "with_remat": model + forward}
  adapters = lora.LoraConfig(rank=2, targets=("q_proj", "down_proj"))
  found = flops.step_flops(config, adapters, num_pairs=7, num_tokens=5)
  assert found["model"] == model + 2 * 5 * 800


def test_a_case_is_one_micro_batch_at_its_length():
  run = FinetuneConfig(
    pattern="scca_fixed(shift=8)",
    training=TrainingConfig(batch_size=6, num_micro_batches=3),
  )
  case = step_timing.make_case(
    run, 128, random_weights=True, warmup=1, repeats=1
  )
  heads = case.resolved.base.num_heads
  # What the string leaves out follows from the length.
  assert case.resolved.patterns[0] == patterns.scca_fixed(heads, 32, 8)
  assert case.resolved.target.context_len >= 128
  assert case.tokens().shape == (2, 128)


@pytest.mark.parametrize("method", quantize.METHODS)
def test_the_step_that_is_timed_has_the_weights_of_the_configuration(
  method, tmp_path
):
  (tmp_path / "config.json").write_text(json.dumps(SIZES), encoding="utf8")
  case = step_timing.make_case(
    FinetuneConfig(
      model=str(tmp_path),
      pattern="scca_fixed(chunk_size=16)",
      training=TrainingConfig(batch_size=2, quantize=method),
    ),
    64,
    random_weights=True,
    warmup=1,
    repeats=1,
  )
  prepared = step_timing.prepare(case)
  kernel = prepared.frozen["layers"]["self_attn"]["q_proj"][
    "kernel"
  ].get_value()
  assert quantize.method_of(kernel) == method


@pytest.mark.slow
def test_a_mesh_is_timed_beside_one_device(
  run_command, capsys, small, tmp_path
):
  output = tmp_path / "step.json"
  assert not run_command(
    "benchmark_step",
    *small,
    "--config.training.implementation=reference",
    "--mesh=",
    "--mesh=fsdp=2,sequence=2",
    f"--output={output}",
  )
  one, four = json.loads(output.read_text())["rows"]
  assert (one["mesh"], four["mesh"]) == ("", "fsdp=2,sequence=2")
  assert (one["num_devices"], four["num_devices"]) == (1, 4)
  # Both copies of the model have a batch, all their own.
  assert (one["batch_size"], four["batch_size"]) == (2, 4)
  assert one["moved_bytes"] is one["link_bytes_per_second"] is None
  assert four["link_bytes_per_second"] > 0
  # Two layers, forward, again and back; two sequences, one key head that two
  # shifted heads share, eight tokens.
  moved = four["moved_bytes"]
  assert moved["attention"] == 2 * 3 * 2 * (1 * 8 * 2 * 8) * 4
  assert moved["compiled"]["collective-permute"] == moved["attention"]
  assert moved["compiled"]["all-gather"] > 0
  # Two key heads, a piece of 32 tokens.
  assert moved["ring_attention"] == 2 * 4 * 2 * (2 * 32 * 2 * 8) * 4
  assert "ring attention" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("flag", "said"),
  [
    ("--seq_lens=many", "many"),
    ("--seq_lens=0", "seq_lens"),
    ("--patterns=flow", "flow"),
    ("--peers=hf", "hf_sdpa"),
    ("--repeats=0", "repeats"),
    ("--model=nowhere", "nowhere"),
    ("--mesh=rows=2", "rows"),
    ("--mesh=sequence=8", "sequence=4"),
    ("--mesh=data=16", "data=8"),
    ("--config.training.remat=all", "'all'"),
    ("--config.training.implementation=cuda", "cuda"),
    ("--config.tuning=full", "tuning='full'"),
    ("--norandom_weights", "model.safetensors"),
  ],
)
def test_bad_flags_are_one_line(run_command, capsys, small, flag, said):
  assert run_command("benchmark_step", *small, flag) == 2
  errors = capsys.readouterr().err.strip().splitlines()
  assert len(errors) == 1
  assert said in errors[0]
