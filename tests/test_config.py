"""Settings are checked on entry, and a wrong one is named."""

import pathlib
import runpy

import pytest

from experiments.ablation import study
from experiments.ablation.settings import AblationConfig
from experiments.shared.config import (
  FinetuneConfig,
  PretrainConfig,
  from_config_dict,
  to_config_dict,
  to_json,
)

CONFIGS = sorted(
  p
  for p in (pathlib.Path(__file__).parent.parent / "configs").glob("*.py")
  if p.stem != "__init__"
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_file_is_a_run_and_opens_with_its_claim(path):
  module = runpy.run_path(str(path))
  settings = module["get_config"]()
  assert "scca " in module["__doc__"].replace("\n", " ")
  if "arms" in settings:
    study.check(from_config_dict(AblationConfig, settings))
    settings = settings.run
  kind = PretrainConfig if "architecture" in settings else FinetuneConfig
  assert isinstance(from_config_dict(kind, settings), kind)
  # Flags set what has a type.
  for group in (settings, settings.training, settings.evaluation):
    assert type(None) not in {group.get_type(name) for name in group}


@pytest.mark.parametrize("kind", [FinetuneConfig, PretrainConfig])
def test_defaults_go_through_a_config_dict_unchanged(kind):
  assert from_config_dict(kind, to_config_dict(kind())) == kind()
  assert from_config_dict(kind, to_json(kind())) == kind()


def test_a_setting_that_is_none_keeps_its_type():
  settings = to_config_dict(FinetuneConfig())
  settings.training.mlp_chunk = 128
  assert from_config_dict(FinetuneConfig, settings).training.mlp_chunk == 128
  settings.training.mlp_chunk = None
  settings.training.mlp_chunk = 64
  with pytest.raises(TypeError):
    settings.training.mlp_chunk = "long"


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"optimiser": {}}, "unknown setting optimiser: did you mean optimizer"),
    ({"training": {"step": 3}}, "training.step: did you mean training.steps"),
    ({"training": {"steps": "3"}}, "training.steps must be of type int"),
    ({"training": {"steps": True}}, "training.steps must be of type int"),
    ({"training": {"steps": 0}}, "training.steps must be at least 1, got 0"),
    ({"training": {"dtype": "float8"}}, "training.dtype.*'float8'"),
    ({"training": {"seed": -1}}, "training.seed must not be negative, got -1"),
    ({"training": 3}, "setting training must be a group"),
    ({"pattern": {"name": "s2"}}, "setting pattern must be of type str"),
    ({"data": {"packing": "tight"}}, "data.packing must be.* got 'tight'"),
    ({"evaluation": {"batch_tokens": 0}}, "batch_tokens must be at least 1"),
    ({"evaluation": {"every": -5}}, "evaluation.every must be.*0, got -5"),
    ({"evaluation": {"context_lens": (8, 1)}}, "context_len must be.*2.*got 1"),
    ({"optimizer": {"learning_rate": "x"}}, "optimizer.learning_rate"),
    ({"optimizer": {"learning_rate": -1.0}}, "learning_rate must be above 0"),
    ({"optimizer": {"learning_rate": float("inf")}}, "learning_rate.* got inf"),
    ({"optimizer": {"weight_decay": float("nan")}}, "weight_decay.* got nan"),
    ({"training": {"seed": 1 << 64}}, "training.seed must be .*below 2.31"),
    ({"rope": {"factor": -(10**400)}}, "rope.factor must be .*below 2.31"),
    ({"optimizer": {"schedule": "linear"}}, "unknown schedule 'linear'"),
    ({"lora": {"targets": ("q_proj", 3)}}, "lora.targets must be of type str"),
    (
      {"training": {"batch_size": 4, "num_micro_batches": 3}},
      "training.batch_size=4 is not divisible",
    ),
  ],
)
def test_a_bad_setting_is_named(change, said):
  with pytest.raises(ValueError, match=said):
    from_config_dict(FinetuneConfig, change)


def test_weights_are_saved_in_a_float():
  with pytest.raises(ValueError, match="save_dtype must be .* got 'int8'"):
    from_config_dict(PretrainConfig, {"save_dtype": "int8"})
