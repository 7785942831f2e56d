"""Settings on the command line: read, listed, and found when misspelt."""

import dataclasses
import re

import pytest
from absl import flags

from experiments.ablation.settings import AblationConfig
from experiments.shared import config_flag
from experiments.shared.config import (
  FinetuneConfig,
  PretrainConfig,
  flat,
  to_json,
)
from experiments.shared.config_flag import ConfigFlag

FILE = """
from experiments.shared.config import *
def get_config():
  return to_config_dict(FinetuneConfig(
    pattern="s2", training=TrainingConfig(steps=7, mlp_chunk=64)))
"""


@pytest.fixture
def config():
  """A command's settings, whose flag is taken back."""
  yield ConfigFlag(FinetuneConfig, "tiny")
  delattr(flags.FLAGS, "config")
  flags.FLAGS.unparse_flags()


def _read(config, *args):
  flags.FLAGS(config.take(["command", *args]))
  return config.read()


@pytest.mark.parametrize("last", [0, 1, 2])
def test_flags_change_the_file_in_any_order(config, tmp_path, last):
  file = tmp_path / "own.py"
  file.write_text(FILE, encoding="utf8")
  given = ["--config.training.steps=5", "--config.lora.rank=2"]
  given.insert(last, f"--config={file}")
  run = _read(config, *given)
  assert (run.training.steps, run.lora.rank) == (5, 2)
  assert (run.training.mlp_chunk, run.pattern) == (64, "s2")


OPTIONAL = [
  setting.name
  for setting in config_flag.list_settings(FinetuneConfig)
  if "None" in setting.type_name
]


@pytest.mark.parametrize("none", ["none", "None"])
def test_every_optional_setting_can_be_none(config, none):
  assert {"training.mlp_chunk", "evaluation.num_windows"} <= set(OPTIONAL)
  run = _read(config, *(f"--config.{name}={none}" for name in OPTIONAL))
  found = flat(to_json(run))
  assert all(found[name] is None for name in OPTIONAL)


@pytest.mark.parametrize(
  ("given", "name", "value"),
  [
    (["--config.training.steps", "9"], "training.steps", 9),
    (["-config.optimizer.learning_rate=1"], "optimizer.learning_rate", 1.0),
    (["--config.lora.rslora"], "lora.rslora", True),
    (["--noconfig.lora.train_norms"], "lora.train_norms", False),
    (["--config.lora.train_norms=False"], "lora.train_norms", False),
    (["--config.lora.targets=q_proj,v_proj"], "lora.targets", "q_proj v_proj"),
    (["--config.lora.targets=('q_proj',)"], "lora.targets", "q_proj"),
    (["--config.evaluation.context_lens=(4,8)"], None, (4, 8)),
    (["--config.evaluation.context_lens=4,8"], None, (4, 8)),
    (
      ["--config.pattern=local(chunk_size=4)"],
      "pattern",
      "local(chunk_size=4)",
    ),
    (["--config.pattern=s2", "--config.pattern=dense"], "pattern", "dense"),
  ],
)
def test_a_value_is_read_by_its_type(config, given, name, value):
  found = flat(to_json(_read(config, *given)))
  found = found[name or "evaluation.context_lens"]
  assert found == (tuple(value.split()) if name == "lora.targets" else value)


@pytest.mark.parametrize(
  ("given", "said"),
  [
    ("config.training.stepz=4", "did you mean --config.training.steps?"),
    ("config.steps=4", "did you mean --config.training.steps?"),
    ("config.lora.learning_rate=4", "--config.optimizer.learning_rate?"),
    (
      "config.training=4",
      "is a group of settings: .*--config.training.seq_len",
    ),
    ("config.training.steps=4.5", "steps must be of type int, got '4.5'"),
    ("config.training.steps=none", "training.steps must be of type int"),
    ("config.training.steps", "--config.training.steps needs a value"),
    ("config.lora.rslora=maybe", "lora.rslora must be of type bool.*'maybe'"),
    ("config.lora.targets=('q_proj", "lora.targets must be of type tuple"),
    ("config.lora.targets=({[]: 1},)", "lora.targets must be of type tuple"),
    ("config.zzzz=1", "see --help"),
    ("config=no.py", "no.py cannot be read: it does not exist; configs/ has"),
    ("config=configs/tinny.py", "did you mean configs/tiny.py?"),
    (
      "config.pattern.chunk_size=None",
      "config.pattern has no parts, .*give --config.pattern=VALUE",
    ),
  ],
)
def test_a_wrong_setting_is_named_with_the_nearest(config, given, said):
  with pytest.raises(ValueError, match=said):
    _read(config, f"--{given}")


@pytest.mark.parametrize(
  ("flag", "meant"),
  [
    ("--steps=4", "--config.training.steps"),
    ("--learning_rate=4", "--config.optimizer.learning_rate"),
    ("--batchsize=4", "--config.training.batch_size"),
    ("--modle=x", "--model"),
    ("--output-dir=x", "--output_dir"),
  ],
)
def test_an_unknown_flag_gets_the_nearest(run_command, capsys, flag, meant):
  assert run_command("finetune", flag) == 2
  errors = [
    line
    for line in capsys.readouterr().err.splitlines()
    if line.startswith("error: ")
  ]
  assert errors == [
    f"error: unknown flag {flag.split('=')[0]}: did you mean {meant}?"
  ]


@pytest.mark.parametrize(
  ("command", "kind"),
  [
    ("finetune", FinetuneConfig),
    ("pretrain", PretrainConfig),
    ("ablate", AblationConfig),
  ],
)
def test_help_lists_every_setting_and_succeeds(
  run_command, capsys, command, kind
):
  assert run_command(command, "--help") == 0
  printed = capsys.readouterr().out
  entries = dict(
    re.findall(r"^  --config\.([\w.\[\]]+): (.*)$", printed, re.MULTILINE)
  )
  # Independent of how they are listed: the fields, by recursion.
  expected = []

  def collect(settings, prefix):
    for field in dataclasses.fields(settings):
      value = getattr(settings, field.name)
      if dataclasses.is_dataclass(value):
        collect(value, f"{prefix}{field.name}.")
      else:
        expected.append((f"{prefix}{field.name}", value))

  if kind is AblationConfig:
    collect(FinetuneConfig(), "run.")
    assert "arms[].pattern" in entries
  else:
    collect(kind(), "")
  for name, value in expected:
    assert repr(value) in entries[name], name
  assert "--traceback" in printed and "usage: scca " + command in printed
  assert ("--coordinator_address" in printed) == (command != "ablate")
  words = " ".join(printed.split())
  assert "Share of the adapter's inputs that training drops." in words or (
    command == "pretrain"
  )


def test_every_setting_has_a_description():
  for kind in (FinetuneConfig, PretrainConfig, AblationConfig):
    for setting in config_flag.list_settings(kind):
      assert setting.text, setting.name


def test_help_shows_what_the_file_and_flags_make_of_it(run_command, capsys):
  args = ("--config=configs/llama2_7b_8k.py", "--config.lora.rank=5")
  assert run_command("finetune", "--help", *args) == 0
  printed = capsys.readouterr().out
  assert "--config.lora.rank: int (default 8; here 5)" in printed
  assert "--config.training.seq_len: int (default 1024; here 8192)" in printed


@pytest.mark.parametrize("command", ["finetune", "evaluate", "show_pattern"])
def test_a_command_tells_its_version(run_command, capsys, command):
  assert run_command(command, "--version") == 0
  assert re.fullmatch(r"scca_jax [\d.]+\w*\n", capsys.readouterr().out)


def test_a_shipped_config_is_found_in_any_folder(config, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  flags.FLAGS(["command", "--config=configs/tiny.py"])
  assert config.read().pattern == "s2"
  (tmp_path / "configs").mkdir()
  own = FILE.replace("s2", "local")
  (tmp_path / "configs" / "tiny.py").write_text(own, encoding="utf8")
  assert config.read().pattern == "local"


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("x = 1", "no function get_config"),
    ("def get_config(): return 3", "must return a ConfigDict"),
    ("def get_config(): return 1 / 0", "division by zero"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("class Own(BaseException): pass\nraise Own", "Own"),
    (
      "import ml_collections as m\n"
      "wanted = m.config_dict.placeholder(str, required=True)\n"
      "def get_config(): return m.ConfigDict({'pattern': wanted})",
      "None value found in required",
    ),
  ],
)
def test_a_config_file_that_fails_is_named(config, tmp_path, text, said):
  file = tmp_path / "own.py"
  file.write_text(text, encoding="utf8")
  with pytest.raises(ValueError, match=f"own.py.*{said}"):
    _read(config, f"--config={file}")


def test_a_setting_in_the_place_of_a_group_is_named(config, tmp_path):
  file = tmp_path / "own.py"
  file.write_text(
    "import ml_collections\n"
    "def get_config(): return ml_collections.ConfigDict({'training': 3})",
    encoding="utf8",
  )
  with pytest.raises(ValueError, match="training must be a group.*got 3"):
    _read(config, f"--config={file}", "--config.training.steps=1")
