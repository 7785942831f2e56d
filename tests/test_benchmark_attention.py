"""The command `benchmark_attention`: what it writes and what it refuses."""

import dataclasses
import json
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from scca_jax import backends, dispatch, patterns
from scca_jax.backends import xla
from scca_jax.backends.block_sizes import BlockSizes

SMALL = (
  "--seq_lens=64",
  "--memory_lens=128",
  "--num_heads=4",
  "--num_kv_heads=2",
  "--head_dim=8",
  "--patterns=scca_fixed(chunk_size=16)",
  "--repeats=2",
)


def test_time_and_memory_are_written_beside_the_peer(
  run_command, capsys, tmp_path
):
  output = tmp_path / "benchmark.json"
  assert not run_command("benchmark_attention", *SMALL, f"--output={output}")
  rows = json.loads(output.read_text())["rows"]
  ours, peer, longer = rows
  assert (peer["implementation"], peer["is_peer"]) == ("jax.nn dense", True)
  pairs = patterns.scca_fixed(4, 16).visible(64).sum()
  assert ours["num_pairs"] == pairs
  assert peer["num_pairs"] == 4 * 64 * 65 // 2
  # Two products of 2 head_dim operations a pair, seven with the backward pass.
  for part, products in (("forward", 2), ("forward_backward", 7)):
    median = ours[part]["median_ms"]
    assert ours[part]["ratios"] == {
      "jax.nn dense": pytest.approx(peer[part]["median_ms"] / median)
    }
    assert ours[part]["tflops"] == pytest.approx(
      2 * 8 * products * pairs / median / 1e9
    )
    assert ours[part]["least_ms"] <= median <= ours[part]["most_ms"]
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
  assert "xla is wrong for scca_fixed(chunk_size=16)" in printed.err
  assert "scca_fixed" not in printed.out


@pytest.mark.slow
def test_cases_choose_what_is_timed(run_command, capsys, tmp_path):
  output, plot = tmp_path / "benchmark.json", tmp_path / "benchmark.png"
  assert not run_command(
    "benchmark_attention",
    *SMALL,
    "--cases=sda(dilation=4, chunk_size=8):32,scca_flow:48",
    "--implementations=xla,reference",
    "--dtypes=float32,bfloat16",
    "--max_peer_len=32",
    "--memory_lens=",
    f"--output={output}",
    f"--plot={plot}",
  )
  result = json.loads(output.read_text())
  assert set(result["matmul_tflops"]) == {"float32", "bfloat16"}
  found = [
    (row["pattern"], row["seq_len"], row["dtype"], row["implementation"])
    for row in result["rows"]
  ]
  assert found == [
    (*case, dtype, implementation)
    for dtype in ("float32", "bfloat16")
    for case, who in (
      (
        ("sda(dilation=4, chunk_size=8)", 32),
        ("xla", "reference", "jax.nn dense"),
      ),
      (("scca_flow", 48), ("xla", "reference")),
    )
    for implementation in who
  ]
  assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_served_is_left_out(
  run_command, capsys, monkeypatch, tmp_path
):
  def refuse(*args, **kwargs):
    raise NotImplementedError("xla serves nothing today.")

  monkeypatch.setattr(xla, "attention", refuse)
  output = tmp_path / "benchmark.json"
  assert not run_command(
    "benchmark_attention",
    *SMALL,
    "--memory_lens=",
    "--implementations=xla,reference",
    f"--output={output}",
  )
  rows = json.loads(output.read_text())["rows"]
  skipped = [row for row in rows if "skipped" in row]
  assert [row["implementation"] for row in skipped] == ["xla"]
  assert "xla serves nothing today" in capsys.readouterr().out


@dataclasses.dataclass(frozen=True)
class Sizes:
  """A back end with two kernels, the best of which is known."""

  forward: BlockSizes = BlockSizes(1, 1)
  keys: BlockSizes = BlockSizes(1, 1)


@pytest.mark.slow
def test_tuning_writes_the_fastest_sizes(run_command, monkeypatch, tmp_path):
  def attend(query, key, value, pattern, *, sizes, **settings):
    if sizes.keys.rows == 3:
      raise ValueError("too much memory")
    result = xla.attention(query, key, value, pattern, **settings)
    # Work that takes its time.
    for _ in range(0 if sizes.forward.rows == 2 else 60):
      result = jax.tree.map(
        lambda x: x + 0 * jnp.sum(jnp.sin(jnp.cumsum(x))), result
      )
    return result

  fake = types.SimpleNamespace(
    Sizes=Sizes,
    attention=attend,
    default_sizes=lambda *_: Sizes(),
    candidates=lambda *_: {
      "forward": [BlockSizes(1, 1), BlockSizes(2, 1)],
      "keys": [BlockSizes(1, 1), BlockSizes(3, 1)],
    },
  )
  monkeypatch.setitem(sys.modules, "scca_jax.backends.triton", fake)
  monkeypatch.setattr(backends, "triton", fake, raising=False)
  monkeypatch.setattr(dispatch, "check_implementation", lambda _: None)
  table = tmp_path / "sizes.json"
  table.write_text('{"mosaic": {"a GPU": {}}}')
  assert not run_command(
    "benchmark_attention",
    *SMALL,
    "--tune",
    "--implementations=triton",
    f"--sizes_output={table}",
  )
  found = json.loads(table.read_text())
  assert found["mosaic"] == {"a GPU": {}}
  (kind,) = found["triton"]
  of_kernel = found["triton"][kind]["float32"]["8"]
  assert of_kernel["forward"]["rows"] == 2
  assert of_kernel["keys"]["rows"] == 1


@pytest.mark.parametrize(
  ("flag", "said"),
  [
    ("--num_heads=1000000000", "4096"),
    ("--seq_lens=many", "many"),
    ("--seq_lens=0", "seq_lens"),
    ("--seq_lens=1000000000", "GiB, but this machine has"),
    ("--memory_lens=1000000000", "GiB, but this machine has"),
    ("--patterns=flow", "scca_flow"),
    ("--patterns=s2,local(chunk=8)", "chunk_size"),
    ("--implementations=cuda", "cuda"),
    ("--implementations=triton", "triton"),
    ("--repeats=0", "repeats"),
    ("--dtypes=int8", "int8"),
    ("--peers=flash", "flash"),
    ("--cases=scca_fixed", "scca_fixed"),
    ("--cases=scca_fixed:x", "scca_fixed:x"),
    ("--cases=flow:64", "flow"),
    ("--tune", "xla"),
  ],
)
def test_bad_flags_are_one_line(run_command, capsys, flag, said):
  assert run_command("benchmark_attention", *SMALL, flag) == 2
  errors = capsys.readouterr().err.strip().splitlines()
  assert len(errors) == 1
  assert said in errors[0]
