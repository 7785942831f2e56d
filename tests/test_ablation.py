"""Studies: many runs under vmap, resumed, chosen on validation text alone."""

import dataclasses
import json
import pathlib
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.ablation import pairs, study
from experiments.ablation.settings import (
  AblationConfig,
  ArmConfig,
  QuickConfig,
  TasksConfig,
)
from experiments.ablation.store import Store
from experiments.shared import loop, resolve
from experiments.shared.config import (
  DataConfig,
  EvaluationConfig,
  FinetuneConfig,
  RopeConfig,
  TrainingConfig,
)
from scca_jax import assets, convert, lora, tokenizer, training
from scca_jax.llama import Llama
from scca_jax.llama_config import LlamaConfig
from scca_jax.token_file import write_token_file

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
TUNED = ArmConfig(
  name="near", pattern="scca_near", rope=RopeConfig(kind="linear", factor=4.0)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A model of a few thousand parameters, and texts of three documents."""
  folder = tmp_path_factory.mktemp("study")
  vocabulary = assets.MODEL / "tokenizer.model"
  config = LlamaConfig(
    vocab_size=4096,
    hidden_size=8,
    intermediate_size=12,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    context_len=16,
  )
  model = Llama(config, rngs=nnx.Rngs(0))
  convert.save_model(
    model, folder / "model", dtype=jnp.float32, tokenizer_file=vocabulary
  )
  rng = random.Random(0)
  words = "the ship sailed over a grey sea and no one saw it come home".split()
  for name in ("train", "test"):
    texts = [" ".join(rng.choices(words, k=1500)) for _ in range(3)]
    write_token_file(
      texts, tokenizer.load(assets.MODEL), folder / f"{name}.bin"
    )
  return folder


def _study(folder, *arms, **changes):
  settings = {
    "run": FinetuneConfig(
      model=str(folder / "model"),
      lora=lora.LoraConfig(rank=2, train_embeddings=False),
      data=DataConfig(
        train=str(folder / "train.bin"),
        test=str(folder / "test.bin"),
        held_out=1,
      ),
      optimizer=training.OptimizerConfig(warmup_steps=2),
      training=TrainingConfig(
        seq_len=64,
        batch_size=2,
        steps=4,
        loss_chunk=64,
        implementation="reference",
      ),
      evaluation=EvaluationConfig(context_lens=(16, 64), num_windows=4),
    ),
    "arms": (
      ArmConfig(name="dense", rope=RopeConfig(kind="linear", factor=4.0)),
      *arms,
    ),
    "learning_rates": (1e-2, 1e-3),
    "seeds": (0, 1),
    "validation_windows": 4,
    "looks": 2,
    "look_windows": 2,
    "pairs_at_once": 4,
    "quick": QuickConfig(steps=2, num_windows=2, num_samples=1),
  }
  return AblationConfig(**(settings | changes))


def _train(settings, arm, some):
  texts = resolve.open_tokens(
    settings.run.data.train, tokenizer.load(assets.MODEL), pathlib.Path()
  )
  tokens, _ = texts.split(1)
  return pairs.train(
    settings, arm, some, tokens, lambda weights: np.zeros(len(some))
  )


def _close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **TOLERANCE), a, b)


def test_pairs_trained_at_once_end_as_each_alone(folder):
  settings = _study(folder, TUNED)
  some = [(1e-2, 0), (1e-3, 1)]
  together, looks, _ = _train(settings, TUNED, some)
  assert [look.steps for look in looks] == [2, 4]
  _train(settings, TUNED, [(3e-3, 5), (2e-3, 4)])
  resolved = resolve.resolve(settings.settings(TUNED))
  step = pairs.make_step(
    together.graphdef, resolved.step, settings.run.optimizer, 4, 4
  )
  assert step._cache_size() == 1  # Rates and seeds are arguments.
  for i, pair in enumerate(some):
    alone, _, _ = _train(settings, TUNED, [pair])
    _close(
      jax.tree.map(lambda leaf, i=i: leaf[i], together.params),
      jax.tree.map(lambda leaf: leaf[0], alone.params),
    )


@pytest.mark.parametrize(
  "arm",
  [
    dataclasses.replace(TUNED, dense_fraction=0.5, lora_b_ratio=4.0),
    ArmConfig(
      name="pose", rope=RopeConfig(kind="linear", factor=4.0), skip_window=16
    ),
    pytest.param(
      ArmConfig(name="full", pattern="s2", tuning="full"),
      marks=pytest.mark.slow,
    ),
  ],
  ids=lambda arm: arm.name,
)
def test_an_arm_takes_the_steps_of_finetune(folder, tmp_path, arm):
  settings = _study(folder, arm)
  found, _, _ = _train(settings, arm, [(1e-2, 1)])
  run = settings.settings(arm)
  run = dataclasses.replace(
    run,
    optimizer=dataclasses.replace(run.optimizer, learning_rate=1e-2),
    training=dataclasses.replace(run.training, seed=1),
  )
  resolved = resolve.resolve(run)
  tokens = resolve.open_tokens(
    run.data.train, tokenizer.load(assets.MODEL), tmp_path
  )
  tokens, _ = resolve.hold_out(tokens, run.data.held_out)
  trainable = lora.trainable(run.adapter)
  done = loop.fit(
    convert.load_model(
      run.model, config=resolved.target, lora=run.adapter, rngs=nnx.Rngs(1)
    ),
    run=run,
    step=resolved.step,
    trainable=trainable,
    batches=resolve.make_batches(run, tokens, None),
    output_dir=tmp_path,
  )
  _, params, _ = nnx.split(done.model, trainable, ...)
  _close(jax.tree.map(lambda leaf: leaf[0], found.params), params)


def _config_file(path, settings):
  path.write_text(
    "from experiments.ablation.settings import *\n"
    "from experiments.shared.config import *\n"
    "from scca_jax.lora import LoraConfig\n"
    "from scca_jax.sharding import MeshConfig\n"
    "from scca_jax.training import OptimizerConfig\n"
    f"def get_config():\n  return to_config_dict({settings!r})\n"
  )
  return path


def _without_times(whole):
  if isinstance(whole, dict):
    return {
      key: _without_times(value)
      for key, value in whole.items()
      if key not in ("seconds", "cost_to_target", "pairs_at_once")
    }
  return whole


def test_a_killed_study_resumes_to_the_same_results(
  folder, tmp_path, run_command, monkeypatch, capsys
):
  untuned = ArmConfig(name="as-is", rope=RopeConfig(kind=None), tuning="none")
  settings = _study(folder, TUNED, untuned, pairs_at_once=1)
  config = _config_file(tmp_path / "config.py", settings)
  args = (f"--config={config}", "--output_dir")
  assert run_command("ablate", *args, tmp_path / "a") == 0
  whole = json.loads((tmp_path / "a/results.json").read_text())

  write, written = Store.write_trained, []

  def killed(*given):
    if len(written) == 5:
      raise KeyboardInterrupt
    written.append(write(*given))

  with monkeypatch.context() as patch:
    patch.setattr(Store, "write_trained", killed)
    with pytest.raises(KeyboardInterrupt):
      run_command("ablate", *args, tmp_path / "b")
  assert not (tmp_path / "b/results.json").exists()
  assert run_command("ablate", *args, tmp_path / "b") == 0
  resumed = json.loads((tmp_path / "b/results.json").read_text())
  assert _without_times(resumed) == _without_times(whole)

  # Only what is missing is measured.
  assert capsys.readouterr().out.count("near: 1 pairs") == 2 * 4
  assert not list((tmp_path / "b").rglob("*.params.npz"))
  dense = whole["arms"]["dense"]
  assert dense["against_dense"] == {"mean": 0, "interval": [0, 0]}
  assert dense["pairs_share"] == 1 and dense["tokens"] == 4 * 2 * 64
  assert whole["arms"]["as-is"]["tokens"] == 0
  with np.load(tmp_path / "b/windows.npz") as windows:
    kept = windows["near/64"]
    assert kept.shape == (2, 4, 16)
    difference = kept[..., -4:] - windows["dense/64"][..., -4:].astype(float)
  np.testing.assert_allclose(
    whole["arms"]["near"]["against_dense"]["mean"], difference.mean(), atol=2e-3
  )
  table = (tmp_path / "b/table.md").read_text()
  assert all(f"| {name} |" in table for name in whole["arms"])


@pytest.mark.slow
def test_arms_on_devices_of_their_own_end_as_on_one(
  folder, tmp_path, run_command, monkeypatch, capsys
):
  settings = _study(folder, TUNED, seeds=(0,), learning_rates=(1e-3,))
  config = _config_file(tmp_path / "config.py", settings)
  train, used = pairs.train, []

  def watched(*args):
    found = train(*args)
    used.append(
      {d for x in jax.tree.leaves(found[0].params) for d in x.devices()}
    )
    return found

  monkeypatch.setattr(pairs, "train", watched)
  found = []
  for mesh in ("", "data=2"):
    path = tmp_path / f"runs{mesh}"
    args = (f"--config={config}", f"--output_dir={path}", f"--mesh={mesh}")
    assert run_command("ablate", *args) == 0
    found.append(json.loads((path / "results.json").read_text()))
  assert _without_times(found[0]) == _without_times(found[1])
  assert used[:2] == [{jax.devices()[0]}] * 2
  assert {d for some in used[2:] for d in some} == set(jax.devices()[:2])

  args = (f"--config={config}", f"--output_dir={tmp_path / 'c'}")
  for mesh, message in (("fsdp=2", "data=N"), ("data=9", "takes 9 devices")):
    assert run_command("ablate", *args, f"--mesh={mesh}") == 2
    assert message in capsys.readouterr().err
  assert not (tmp_path / "c").exists()


def test_an_arm_is_not_changed_under_its_name(folder, tmp_path, run_command):
  settings = _study(folder, seeds=(0,), learning_rates=(1e-3,))
  config = _config_file(tmp_path / "config.py", settings)
  args = (f"--config={config}", f"--output_dir={tmp_path / 'a'}", "--quick")
  assert run_command("ablate", *args) == 0
  other = ArmConfig(name="dense", rope=RopeConfig(kind="ntk", factor=4.0))
  _config_file(config, dataclasses.replace(settings, arms=(other,)))
  assert run_command("ablate", *args) == 2


def test_an_arm_from_before_a_setting_existed_is_the_same_arm(
  folder, tmp_path, monkeypatch
):
  settings = _study(folder, TUNED, seeds=(0,), learning_rates=(1e-2,))
  store = Store(tmp_path)
  about = dataclasses.asdict(TUNED)
  del about["rank"], about["learning_rates"]
  losses = {"validation": np.zeros((4, 16)), "test_64": np.zeros((4, 16))}
  store.write_trained("near", (1e-2, 0), (), losses, {"arm": about})
  store.write_scores("near", (1e-2, 0), losses, {"tasks": {}})
  monkeypatch.setattr(pairs, "train", None)
  texts = study.Texts.open(settings, tmp_path)
  study.Runner(settings, store, texts).run(TUNED)
  with pytest.raises(ValueError, match="other settings"):
    study.Runner(settings, store, texts).run(dataclasses.replace(TUNED, rank=3))


def test_the_rate_is_chosen_on_validation_text_alone(folder, tmp_path):
  settings = _study(folder, seeds=(0,))
  store, arm = Store(tmp_path), settings.arms[0]
  # The better rate on held-out text is the worse one on test text.
  for rate, validation, test in ((1e-2, 3.0, 5.0), (1e-3, 4.0, 1.0)):
    pair = (rate, 0)
    store.write_trained(
      arm.name, pair, (), {"validation": np.full((4, 16), validation)}, {}
    )
    store.write_scores(
      arm.name, pair, {"test_64": np.full((4, 16), test)}, {"tasks": {}}
    )
  assert study.chosen_pairs(settings, store, arm) == [(1e-2, 0)]


def test_a_rate_that_diverged_is_not_chosen(folder, tmp_path):
  settings = _study(folder, seeds=(0,))
  store, arm = Store(tmp_path), settings.arms[0]
  for rate, loss in ((1e-2, np.nan), (1e-3, 4.0)):
    store.write_trained(
      arm.name, (rate, 0), (), {"validation": np.full((4, 16), loss)}, {}
    )
  assert study.chosen_pairs(settings, store, arm) == [(1e-3, 0)]


def test_pairs_count_what_an_arm_trains_with(folder):
  dense_part = dataclasses.replace(
    TUNED, pattern="local", name="half", dense_fraction=0.5
  )
  pose = ArmConfig(name="pose", skip_window=16)
  fewer = ArmConfig(name="fewer", steps_fraction=0.5)
  settings = _study(folder, dense_part, pose, fewer)
  dense, local = 64 * 65 / 2, 4 * 16 * 17 / 2
  expected = {
    "dense": 1.0,
    "half": (dense + local) / (2 * dense),
    "pose": local / dense,
    "fewer": 0.5,
  }
  for arm in settings.arms:
    assert study.pairs_share(settings, arm) == pytest.approx(expected[arm.name])
  tokens = [study.num_tokens(settings, arm) for arm in settings.arms]
  assert tokens == [512, 512, 512, 256]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"arms": ()}, "no arms"),
    ({"seeds": ()}, "no seeds"),
    ({"baseline": "sparse"}, "unknown arm 'sparse'"),
    ({"learning_rates": (0.0,)}, "must be above 0: 0.0"),
    ({"learning_rates": ()}, "no learning rates"),
    ({"arms": (TUNED, TUNED), "baseline": "near"}, "two arms have the name"),
    ({"looks": 0}, "looks must be at least 1, got 0"),
    (
      {"arms": (ArmConfig(name="dense", tuning="none"),)},
      "the baseline dense is not tuned",
    ),
  ],
)
def test_bad_settings_are_refused(folder, changes, message):
  with pytest.raises(ValueError, match=message):
    _study(folder, **changes)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: ArmConfig(name="a/b"), "got 'a/b'"),
    (lambda: ArmConfig(name="a", tuning="prefix"), "got 'prefix'"),
    (lambda: ArmConfig(name="a", steps_fraction=0.0), "got 0.0"),
    (lambda: ArmConfig(name="a", learning_rates=(-1.0,)), "arm a .*: -1.0"),
    (lambda: TasksConfig(names=("passkye",)), "did you mean passkey"),
    (lambda: TasksConfig(longest_samples=0), "tasks.longest_samples .* got 0"),
  ],
)
def test_bad_arms_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_the_longest_context_may_have_samples_of_its_own():
  config = TasksConfig(
    context_lens=(64, 16), num_samples=50, longest_samples=200
  )
  assert [config.samples(n) for n in (16, 64)] == [50, 200]
  assert TasksConfig(context_lens=(16,)).samples(16) == 50


@pytest.mark.parametrize(
  ("arm", "message"),
  [
    (ArmConfig(name="a", pattern="scca_fxed"), "arm a: .*scca_fixed"),
    (ArmConfig(name="a", rope=RopeConfig(kind="nkt")), "arm a: unknown rope"),
    (ArmConfig(name="a", skip_window=65), "skip_window of arm a .* got 65"),
  ],
)
def test_bad_arms_end_the_command_before_it_begins(
  folder, tmp_path, run_command, capsys, arm, message
):
  config = _config_file(tmp_path / "config.py", _study(folder, arm))
  status = run_command(
    "ablate", f"--config={config}", f"--output_dir={tmp_path / 'a'}"
  )
  error = capsys.readouterr().err.strip()
  assert status == 2 and len(error.splitlines()) == 1
  assert re.search(message, error)
  assert not (tmp_path / "a").exists()
