"""Flags that commands share."""

import sys
import types

import pytest

from experiments.shared import flags as shared_flags


@pytest.mark.parametrize(
  ("text", "parts"),
  [
    ("dense", ["dense"]),
    ("s2, local", ["s2", "local"]),
    (
      "sda(dilation=2, window=3),mix(s2, layers(sda, s2), heads=(4, 5))",
      ["sda(dilation=2, window=3)", "mix(s2, layers(sda, s2), heads=(4, 5))"],
    ),
    (
      "longmixed(dilations=[2, 4]):64,s2:32",
      ["longmixed(dilations=[2, 4]):64", "s2:32"],
    ),
    ("", []),
    # Left to the parser of patterns to refuse.
    ("s2(,local", ["s2(,local"]),
  ],
)
def test_commas_in_parentheses_divide_no_patterns(text, parts):
  assert shared_flags.split_patterns(text) == parts


@pytest.mark.parametrize("in_folder", [False, True])
def test_weights_and_biases_is_missed_before_any_work(
  monkeypatch, tmp_path, in_folder
):
  monkeypatch.setattr(sys, "path", [str(tmp_path)])
  monkeypatch.delitem(sys.modules, "wandb", raising=False)
  if in_folder:  # Its logs lie in a folder of the same name.
    (tmp_path / "wandb").mkdir()
  shared_flags.check_wandb(types.SimpleNamespace(value=None))
  with pytest.raises(ValueError, match=r"scca_jax\[wandb\]"):
    shared_flags.check_wandb(types.SimpleNamespace(value="project"))


def parse(argument, least=1):
  return shared_flags._LengthsParser(least).parse(argument)


def test_lengths_are_read_once_each():
  assert parse("64, 32,64") == (64, 32)
  assert parse("", least=0) == ()


@pytest.mark.parametrize("argument", ["", "many", "0", "-4", "1.5", "8,x"])
def test_what_is_no_length_is_refused(argument):
  with pytest.raises(ValueError, match="1024,2048"):
    parse(argument)


def test_no_output_replaces_the_description_of_a_token_file(tmp_path):
  output = types.SimpleNamespace(
    name="output", value=str(tmp_path / "books.json")
  )
  shared_flags.check_output(output, ".json")
  (tmp_path / "books.bin").write_bytes(b"ids")
  shared_flags.check_output(output, ".json")
  (tmp_path / "books.json").write_text("{}")
  with pytest.raises(ValueError, match=r"the description of books\.bin"):
    shared_flags.check_output(output, ".json")


def test_no_output_replaces_an_input(tmp_path, run_command, capsys):
  file = tmp_path / "prompts.jsonl"
  file.write_text('{"prompt": "a"}')
  assert run_command("generate", f"--prompts={file}", f"--output={file}") == 2
  assert "would replace --prompts" in capsys.readouterr().err
  model = tmp_path / "config.json"
  output = types.SimpleNamespace(name="output", value=str(model))
  shared_flags.check_output(output, ".json")
  model.write_text("{}")
  with pytest.raises(ValueError, match="a file of a model"):
    shared_flags.check_output(output, ".json")
