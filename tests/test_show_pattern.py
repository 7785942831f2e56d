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


@pytest.mark.parametrize(
  ("flag", "said"),
  [
    ("--pattern=flow", "scca_flow"),
    ("--seq_len=0", "got 0"),
    ("--seq_len=100000", "100000"),
    ("--num_heads=0", "num_heads"),
    ("--chunk_size=-2", "-2"),
    ("--window=3", "window"),
    ("--output=pattern.gif", "pattern.gif"),
    ("--causality=none", "none"),
  ],
)
def test_bad_flags_are_one_line(run_command, capsys, tmp_path, flag, said):
  output = tmp_path / "pattern.png"
  assert run_command("show_pattern", f"--output={output}", flag) == 2
  error = capsys.readouterr().err.strip().splitlines()
  assert len(error) == 1
  assert said in error[0]
  assert not output.exists()
