"""The command `show_pattern`, as a user runs it."""

import pytest

PNG = b"\x89PNG\r\n\x1a\n"


def test_a_picture_is_drawn(run_command, capsys, tmp_path):
  output = tmp_path / "new" / "pattern.png"
  status = run_command(
    "show_pattern", "--pattern=longmixed", "--seq_len=32", f"--output={output}"
  )
  assert status == 0
  assert output.read_bytes().startswith(PNG)
  printed = capsys.readouterr().out
  assert "receptive field after 3 layers: 100.0%" in printed
  assert list(output.parent.iterdir()) == [output]


def test_layers_and_mixtures_are_drawn(run_command, capsys, tmp_path):
  for pattern, reach in (
    (
      "layers(local, mixture(local, sda(dilation=2)))",
      "after 2 layers: 100.0%",
    ),
    (
      "mix(local, dense, heads=(1, 7), interleaved=True)",
      "after 1 layers: 100",
    ),
  ):
    output = tmp_path / "pattern.png"
    assert not run_command(
      "show_pattern",
      f"--pattern={pattern}",
      "--seq_len=32",
      "--num_kv_heads=4",
      f"--output={output}",
    )
    assert output.read_bytes().startswith(PNG)
    assert reach in capsys.readouterr().out


@pytest.mark.parametrize(
  ("flag", "said"),
  [
    ("--pattern=flow", "scca_flow"),
    ("--pattern=scca_fixed(shfit=2)", "shift"),
    ("--pattern=scca_fixed(chunk_size=-2)", "-2"),
    ("--pattern=scca_fixed(window=3)", "window"),
    ("--pattern=s2(causality='none')", "none"),
    ("--pattern=s2(", "s2("),
    ("--seq_len=0", "--seq_len=0"),
    ("--seq_len=100000", "--seq_len=100000"),
    ("--num_heads=0", "--num_heads=0"),
    ("--num_heads=4096", "--num_heads=4096"),
    ("--num_layers=100000000", "--num_layers=100000000"),
    ("--output=pattern.gif", "pattern.gif"),
  ],
)
def test_bad_flags_are_one_line(run_command, capsys, tmp_path, flag, said):
  output = tmp_path / "pattern.png"
  assert run_command("show_pattern", f"--output={output}", flag) == 2
  error = capsys.readouterr().err.strip().splitlines()
  assert len(error) == 1
  assert said in error[0]
  assert not output.exists()
