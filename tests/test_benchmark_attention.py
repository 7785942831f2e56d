"""The command `benchmark_attention`: what it writes and what it refuses."""

import json

import pytest

from scca_jax import patterns
from scca_jax.backends import xla

SMALL = (
  "--seq_lens=64",
  "--memory_lens=128",
  "--num_heads=4",
  "--num_kv_heads=2",
  "--head_dim=8",
  "--chunk_size=16",
  "--repeats=2",
)


def test_time_and_memory_are_written_beside_the_peer(
  run_command, capsys, tmp_path
):
  output = tmp_path / "benchmark.json"
  assert not run_command("benchmark_attention", *SMALL, f"--output={output}")
  rows = json.loads(output.read_text())["rows"]
  peer, ours, longer = rows
  assert peer["implementation"] == "jax.nn dense"
  assert ours["num_pairs"] == patterns.scca_fixed(4, 16).visible(64).sum()
  for part in ("forward", "forward_backward"):
    assert ours[part]["speed_ratio"] == pytest.approx(
      peer[part]["median_ms"] / ours[part]["median_ms"]
    )
    assert longer[part]["temporary_mib"] > 0
  assert "agree with the reference" in capsys.readouterr().out


def test_what_is_wrong_is_not_timed(run_command, capsys, monkeypatch):
  right = xla.attention

  def wrong(query, *args, **kwargs):
    output, log_sum = right(query, *args, **kwargs)
    return 1.001 * output, log_sum

  monkeypatch.setattr(xla, "attention", wrong)
  assert run_command("benchmark_attention", *SMALL) == 2
  printed = capsys.readouterr()
  assert "xla is wrong for scca_fixed" in printed.err
  assert "faster" not in printed.out


@pytest.mark.parametrize(
  ("flag", "said"),
  [
    ("--seq_lens=many", "many"),
    ("--seq_lens=0", "seq_lens"),
    ("--patterns=flow", "flow"),
    ("--implementations=cuda", "cuda"),
    ("--implementations=triton", "triton"),
    ("--repeats=0", "repeats"),
    ("--dtype=int8", "int8"),
  ],
)
def test_bad_flags_are_one_line(run_command, capsys, flag, said):
  assert run_command("benchmark_attention", *SMALL, flag) == 2
  errors = capsys.readouterr().err.strip().splitlines()
  assert len(errors) == 1
  assert said in errors[0]
