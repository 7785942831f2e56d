"""The peers of `benchmark_step` compute the same step as this package."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

_WHY = "parity needs the extra parity"
torch = pytest.importorskip("torch", reason=_WHY)
pytest.importorskip("transformers", reason=_WHY)
pytest.importorskip("peft", reason=_WHY)

from experiments.shared.config import (  # noqa: E402
  FinetuneConfig,
  RopeConfig,
  TrainingConfig,
)
from experiments.timing import step_peers, step_timing  # noqa: E402
from scca_jax import lora, training  # noqa: E402

# PEFT asks transformers for what this version calls by another name.
pytestmark = pytest.mark.filterwarnings(
  "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

SIZES = {
  "model_type": "llama",
  "vocab_size": 97,
  "hidden_size": 32,
  "intermediate_size": 56,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 32,
}
SEQ_LEN, STEPS = 64, 3
# What each peer computes, said in our terms: S2 of LongLoRA sees the wrap.
PATTERNS = dict.fromkeys(step_peers.LABELS, "dense") | {
  "hf_s2": "s2(chunk_size=16, causality='slot')"
}


def _case(name, folder, all_trained=True, **settings):
  (folder / "config.json").write_text(json.dumps(SIZES), encoding="utf8")
  run = FinetuneConfig(
    model=str(folder),
    rope=RopeConfig(kind="linear", factor=2.0),
    lora=lora.LoraConfig(
      rank=4, train_embeddings=all_trained, train_norms=all_trained
    ),
    optimizer=training.OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
    pattern=PATTERNS[name],
    training=TrainingConfig(batch_size=2, remat="layer", **settings),
  )
  return step_timing.make_case(
    run, SEQ_LEN, random_weights=True, warmup=1, repeats=2
  )


def _plain(name):
  """The name of a parameter of PEFT's model, without PEFT's wrappers."""
  for part in ("base_model.model.", ".base_layer", ".default"):
    name = name.replace(part, "", 1)
  return name


@pytest.mark.parametrize(
  ("name", "all_trained"), [("hf_sdpa", True), ("hf_s2", False)]
)
def test_the_losses_of_steps_are_the_peers(
  name, all_trained, tmp_path, by_torch_name
):
  case = _case(name, tmp_path, all_trained)
  ours = step_timing.prepare(case)
  arrays = by_torch_name(ours.state.params) | by_torch_name(ours.frozen)
  model = step_peers.make_model(name, case, "cpu")
  trained = 0
  with torch.no_grad():
    for parameter_name, parameter in model.named_parameters():
      parameter.copy_(torch.tensor(arrays.pop(_plain(parameter_name))))
      trained += parameter.numel() * parameter.requires_grad
  assert not arrays
  assert trained == sum(
    x[...].size for _, x in nnx.to_flat_state(ours.state.params)
  )
  step, theirs = step_peers.make_step(model, case, "cpu"), []
  for _ in range(STEPS):
    theirs.append(float(step()))
  # The test waits for the compiler, not for what it compiles.
  compiled = ours.step.lower(ours.state, ours.frozen, ours.batch).compile(
    {"xla_backend_optimization_level": 0}
  )
  state, losses = ours.state, []
  for _ in range(STEPS):
    state, metrics = compiled(state, ours.frozen, ours.batch)
    losses.append(float(metrics["loss"]))
  np.testing.assert_allclose(losses, theirs, rtol=1e-5)
  # Adapters alone change little at first: B is 0.
  assert losses[-1] < losses[0] - (0.1 if all_trained else 1e-3)


@pytest.mark.parametrize("name", step_peers.LABELS)
def test_pairs_are_those_of_the_pattern(name, tmp_path):
  case = _case(name, tmp_path)
  assert step_peers.num_pairs(name, case) == 2 * sum(
    pattern.visible(SEQ_LEN).sum() for pattern in case.resolved.patterns
  )


@pytest.mark.parametrize(
  ("name", "runs"), [("hf_sdpa", 4), ("hf_half", 3), ("hf_kept", 2)]
)
def test_so_many_layers_are_checkpointed_as_it_says(name, runs, tmp_path):
  case = _case(name, tmp_path)
  model = step_peers.make_model(name, case, "cpu")
  calls = []
  for module in model.modules():
    if type(module).__name__ == "LlamaMLP":
      module.register_forward_pre_hook(lambda *_: calls.append(1))
  step_peers.make_step(model, case, "cpu")()
  # Two layers run forward once, and again where they are checkpointed.
  assert len(calls) == runs
  assert step_peers.checkpointed(name, case) == (runs - 2) / 2


def test_a_peer_is_measured_like_a_step_of_ours(tmp_path):
  row = step_peers.measure("hf_sdpa", _case("hf_sdpa", tmp_path), "cpu")
  assert len(row["all_ms"]) == 2
  assert row["first_loss"] == pytest.approx(np.log(97), rel=0.05)
  assert row["versions"]["torch"] == torch.__version__


def test_what_a_peer_cannot_do_is_refused(tmp_path):
  half = _case("hf_sdpa", tmp_path, dtype="float16", param_dtype="float16")
  with pytest.raises(NotImplementedError, match="float16"):
    step_peers.make_model("hf_sdpa", half, "cpu")
  case = _case("hf_s2", tmp_path)
  run = dataclasses.replace(case.run, pattern="s2(chunk_size=24)")
  case = dataclasses.replace(case, run=run)
  with pytest.raises(NotImplementedError, match="24"):
    step_peers.make_model("hf_s2", case, "cpu")
