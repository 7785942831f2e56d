"""The command `benchmark_load`: what it writes and refuses."""

import json

import pytest

from experiments.timing import load_timing
from scca_jax import assets

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
# Embedding and head, and of two layers q and o, k and v, the MLP and the norms.
NUM_WEIGHTS = 2 * 64 * 32 + 2 * (
  2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
)


def test_a_drawn_model_is_written_read_and_removed(
  run_command, capsys, tmp_path, monkeypatch
):
  (tmp_path / "config.json").write_text(json.dumps(SIZES), encoding="utf8")
  scratch, output = tmp_path / "scratch", tmp_path / "load.json"
  scratch.mkdir()
  monkeypatch.setattr("tempfile.tempdir", str(scratch))
  assert not run_command(
    "benchmark_load",
    f"--model={tmp_path}",
    "--random_weights",
    "--config.training.param_dtype=bfloat16",
    "--peers=",
    "--repeats=2",
    f"--output={output}",
  )
  result = json.loads(output.read_text())
  # The last norm, and the header that names the tensors.
  assert 0 < result["num_bytes"] - 2 * (NUM_WEIGHTS + 32) < 4096
  read, load = result["rows"]
  assert (read["loader"], load["loader"]) == ("read", "scca_jax")
  for row in (read, load):
    assert {len(times) for times in row["seconds"].values()} == {2}
    assert min(min(times) for times in row["seconds"].values()) > 0
  assert load["device"] == "cpu"
  assert "MB/s" in capsys.readouterr().out
  assert not list(scratch.iterdir())


def test_the_files_of_a_model_are_those_with_weights():
  job = load_timing.Job(assets.MODEL, "float32", 1)
  assert [path.name for path in job.files] == ["model.safetensors"]
  row = load_timing.measure("read", load_timing.MAKERS["read"], job)
  assert len(row["seconds"]["cold"]) == len(row["seconds"]["cached"]) == 1


@pytest.mark.parametrize(
  ("flag", "said"),
  [
    ("--repeats=0", "--repeats must be at least 1, got 0"),
    ("--peers=torch", "unknown peer 'torch': use any of safetensors"),
    ("--model=llama2-7b", "has no .safetensors"),
    ("--model=nowhere", "nowhere/config.json"),
  ],
)
def test_bad_flags_are_one_line(run_command, capsys, flag, said):
  assert run_command("benchmark_load", "--peers=", flag) == 2
  errors = capsys.readouterr().err.strip().splitlines()
  assert len(errors) == 1
  assert said in errors[0]
