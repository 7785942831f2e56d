"""Adapters, their gradients and their training against PEFT and PyTorch."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

_WHY = "parity needs the extra parity"
torch = pytest.importorskip("torch", reason=_WHY)
transformers = pytest.importorskip("transformers", reason=_WHY)
peft = pytest.importorskip("peft", reason=_WHY)

from scca_jax import adapters, convert, lora, patterns, training  # noqa: E402

# PEFT uses a name that this version of transformers has changed.
pytestmark = pytest.mark.filterwarnings(
  "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

DENSE = patterns.dense(4)
LENGTH = 37
# The tests spend their time compiling, not running.
QUICKLY = {"xla_backend_optimization_level": 0}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EMBEDDINGS = ("embed_tokens", "lm_head")
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
# Settings of PEFT, whether embeddings are tied, and settings of ours.
CASES = {
  "attention": (
    {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
    False,
    lora.LoraConfig(train_embeddings=False, train_norms=False),
  ),
  "rsLoRA of every matrix": (
    {
      "r": 3,
      "lora_alpha": 5.0,
      "use_rslora": True,
      "target_modules": lora.TARGETS,
    },
    False,
    lora.LoraConfig(
      rank=3,
      alpha=5.0,
      rslora=True,
      targets=lora.TARGETS,
      train_embeddings=False,
      train_norms=False,
    ),
  ),
  "LoRA+": (
    {
      "r": 4,
      "lora_alpha": 8,
      "target_modules": ATTENTION,
      "modules_to_save": [*EMBEDDINGS, *NORMS],
    },
    False,
    lora.LoraConfig(rank=4, alpha=8.0),
  ),
  "LoRA+, tied": (
    {
      "r": 4,
      "lora_alpha": 8,
      "target_modules": ("q_proj", "v_proj", "down_proj"),
      "modules_to_save": ["embed_tokens", *NORMS],
      "ensure_weight_tying": True,
    },
    True,
    lora.LoraConfig(
      rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj")
    ),
  ),
}
OPTIMIZER = training.OptimizerConfig(learning_rate=1e-3, warmup_steps=2)
# Of the three steps: a warm-up of two, then the whole.
LEARNING_RATES = (0.5e-3, 1e-3, 1e-3)


def _batch(seed):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 97, (2, LENGTH + 1)).astype(np.int32)
  return {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "mask": np.ones((2, LENGTH), np.float32),
  }


def _plain(name):
  """The name of a parameter of PEFT's model, without PEFT's wrappers."""
  for part in ("base_model.model.", ".modules_to_save", ".default"):
    name = name.replace(part, "", 1)
  return name


def _trained(theirs):
  return {
    _plain(name): parameter
    for name, parameter in theirs.named_parameters()
    if parameter.requires_grad
  }


def _loss(theirs, batch):
  logits = theirs(torch.tensor(batch["tokens"]).long()).logits
  targets = torch.tensor(batch["targets"]).long()
  return logits, torch.nn.functional.cross_entropy(
    logits.flatten(0, 1), targets.flatten()
  )


@pytest.fixture
def pair(request, tmp_path, random_llama):
  """A model with a random adapter, PEFT's, and what is loaded of its files.

  PEFT's computes in float64, so that no error but ours counts.
  """
  settings, tied, expected = CASES[request.param]
  base = random_llama(tie_word_embeddings=tied)
  base.save_pretrained(tmp_path / "base")
  theirs = peft.get_peft_model(
    base, peft.LoraConfig(task_type="CAUSAL_LM", **settings)
  )
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for name, parameter in _trained(theirs).items():
      drawn = torch.randn(parameter.shape, generator=generator)
      if "lora_" in name:
        # Half as large as the weights. Much more would make attention so sharp
        # that rounding alone exceeds the tolerance.
        size = 0.5 / expected.scaling if "lora_B" in name else 1.0
        parameter.copy_(drawn * size / parameter.shape[-1] ** 0.5)
      else:
        parameter.add_(0.05 * drawn)
  theirs.save_pretrained(tmp_path / "adapter")
  ours = adapters.load_adapter(tmp_path / "base", tmp_path / "adapter")
  assert ours.lora == expected
  return theirs.double(), ours


@functools.partial(
  jax.jit, static_argnames="graphdef", compiler_options=QUICKLY
)
def _loss_and_gradients(graphdef, params, frozen, batch):
  def loss_of(params):
    logits = nnx.merge(graphdef, params, frozen)(
      batch["tokens"], patterns=DENSE
    )
    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs, batch["targets"][..., None], -1)
    return -jnp.mean(picked), logits

  return jax.grad(loss_of, has_aux=True)(params)


@pytest.mark.parametrize("pair", CASES, indirect=True)
def test_outputs_and_gradients_equal_those_of_peft(pair, by_torch_name):
  theirs, ours = pair
  batch = _batch(0)
  graphdef, params, frozen = nnx.split(ours, lora.trainable(ours.lora), ...)
  gradients, logits = _loss_and_gradients(graphdef, params, frozen, batch)
  expected, loss = _loss(theirs, batch)
  loss.backward()
  np.testing.assert_allclose(
    logits, expected.detach().numpy(), rtol=0, atol=1e-5
  )
  with theirs.disable_adapter():
    without, _ = _loss(theirs, batch)
  assert (without - expected).abs().max() > 1
  found, trained = by_torch_name(gradients), _trained(theirs)
  assert found.keys() == trained.keys()
  for name, parameter in trained.items():
    np.testing.assert_allclose(
      found[name], parameter.grad.numpy(), rtol=1e-5, atol=1e-6, err_msg=name
    )


@pytest.mark.parametrize(
  "pair", ["rsLoRA of every matrix", "LoRA+, tied"], indirect=True
)
def test_three_steps_of_adamw_train_what_pytorch_trains(pair, by_torch_name):
  theirs, ours = pair
  graphdef, params, frozen = nnx.split(ours, lora.trainable(ours.lora), ...)
  before = by_torch_name(params)
  rule = training.make_optimizer(OPTIMIZER, num_steps=3)
  graphdef, state, frozen = training.init(ours, lora.trainable(ours.lora), rule)
  step = training.compile_step(
    graphdef, rule, training.StepConfig(), state, frozen
  )
  step = step.lower(state, frozen, _batch(0)).compile(QUICKLY)
  trained = _trained(theirs)
  optimizer = torch.optim.AdamW(
    trained.values(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
  )
  for i, learning_rate in enumerate(LEARNING_RATES):
    state, metrics = step(state, frozen, _batch(i))
    _, loss = _loss(theirs, _batch(i))
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
    optimizer.param_groups[0]["lr"] = learning_rate
    optimizer.step()
    np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], norm.item(), rtol=1e-5)
  found = by_torch_name(state.params)
  assert found.keys() == trained.keys()
  for name, parameter in trained.items():
    after = parameter.detach().numpy()
    # Adam divides gradients by their size, so rounding shows if one happens to
    # be near 0. That is rare, and little of the 0.0025 that parameters move.
    assert np.median(np.abs(after - before[name])) > 5e-4, name
    error = np.abs(found[name] - after)
    assert error.max() < 1e-5 and error.mean() < 1e-7, name


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying:UserWarning")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True:UserWarning")
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
  "whole", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]]
)
def test_trained_copies_on_a_tied_base_are_what_they_are_to_peft(
  tmp_path, random_llama, whole, together
):
  """PEFT unties matrices that it trains copies of, unless told not to."""

  def load(adapter):
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    return peft.PeftModel.from_pretrained(base, adapter).eval()

  def in_torch(model):
    with torch.no_grad():
      return model(torch.tensor(tokens).long()).logits.numpy()

  tokens = _batch(0)["tokens"]
  base = random_llama(tie_word_embeddings=True)
  base.save_pretrained(tmp_path / "base")
  theirs = peft.get_peft_model(
    base,
    peft.LoraConfig(
      target_modules=["q_proj"],
      modules_to_save=whole,
      task_type="CAUSAL_LM",
      ensure_weight_tying=together,
    ),
  )
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for parameter in _trained(theirs).values():
      parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
  theirs.save_pretrained(tmp_path / "adapter")
  wanted = in_torch(load(tmp_path / "adapter"))
  ours = adapters.load_adapter(tmp_path / "base", tmp_path / "adapter")
  assert ours.config.tie_embeddings == together
  np.testing.assert_allclose(
    ours(jnp.asarray(tokens), patterns=DENSE), wanted, rtol=0, atol=1e-5
  )
  # And back, as an adapter and fused.
  adapters.save_adapter(ours, tmp_path / "back", base_model="base")
  np.testing.assert_allclose(
    in_torch(load(tmp_path / "back")), wanted, rtol=0, atol=1e-5
  )
  convert.save_model(ours, tmp_path / "fused", dtype=jnp.float32)
  fused = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
  np.testing.assert_allclose(in_torch(fused), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  "settings",
  [
    {},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"lora_alpha": 0.5, "lora_dropout": 0.3, "fan_in_fan_out": True},
    {"target_modules": "all-linear", "layers_to_transform": None},
    {"target_modules": r".*\.(q|k)_proj"},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"modules_to_save": ["model.norm", "lm_head", "tokens"]},
  ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")
def test_settings_that_are_let_through_mean_what_they_mean_to_peft(
  tmp_path, random_llama, settings
):
  base = random_llama()
  base.save_pretrained(tmp_path / "base")
  theirs = peft.get_peft_model(
    base, peft.LoraConfig(task_type="CAUSAL_LM", **settings)
  )
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for parameter in _trained(theirs).values():
      parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
  theirs.save_pretrained(tmp_path / "adapter")
  tokens = _batch(0)["tokens"]
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
  again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
  with torch.no_grad():
    wanted = again(torch.tensor(tokens).long()).logits.numpy()
  ours = adapters.load_adapter(tmp_path / "base", tmp_path / "adapter")
  np.testing.assert_allclose(
    ours(jnp.asarray(tokens), patterns=DENSE), wanted, rtol=0, atol=1e-5
  )


def test_every_setting_of_peft_is_known_or_refused(tmp_path):
  """Fields that PEFT adds are refused until somebody looks at them."""
  harmless = {
    *("task_type", "auto_mapping", "peft_version", "revision"),
    *("base_model_name_or_path", "inference_mode", "runtime_config"),
    # Says where the layers are that another setting, which is refused, picks.
    "layers_pattern",
    # Read, or of a method whose own setting is read or refused.
    *("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules"),
    *("use_rslora", "bias", "modules_to_save", "init_lora_weights"),
    *("ensure_weight_tying", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    # PEFT itself sets it to false for a linear layer.
    "fan_in_fan_out",
  }
  sizes = transformers.LlamaConfig(num_hidden_layers=1)
  sizes.save_pretrained(tmp_path)
  path = tmp_path / "adapter_config.json"
  plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
  for field in dataclasses.fields(peft.LoraConfig):
    if field.name in harmless:
      continue
    for value in (True, 1, [0], {"a": 1}, "x"):
      path.write_text(json.dumps(plain | {field.name: value}))
      with pytest.raises(ValueError, match=f"{field.name}=.* not supported"):
        adapters.load_adapter(tmp_path, tmp_path)
