"""A fine-tuning run compared with the same one in PyTorch."""

import dataclasses
import itertools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

_WHY = "parity needs the extra parity"
torch = pytest.importorskip("torch", reason=_WHY)
transformers = pytest.importorskip("transformers", reason=_WHY)
peft = pytest.importorskip("peft", reason=_WHY)

import torch_attention  # noqa: E402

from experiments.shared import loop  # noqa: E402
from experiments.shared.config import FinetuneConfig, TrainingConfig  # noqa: E402
from scca_jax import (  # noqa: E402
  adapters,
  assets,
  convert,
  lora,
  patterns,
  tokenizer,
  training,
)
from scca_jax.batches import make_batches  # noqa: E402
from scca_jax.convert import layout  # noqa: E402
from scca_jax.documents import read_documents  # noqa: E402
from scca_jax.rope import RopeScaling  # noqa: E402
from scca_jax.token_file import TokenFile, write_token_file  # noqa: E402

# PEFT asks transformers for what this version calls by another name.
pytestmark = pytest.mark.filterwarnings(
  "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

# The last chunk is short.
SEQ_LEN, CHUNK_SIZE, BATCH_SIZE, STEPS = 300, 80, 2, 20
FACTOR, WARMUP_STEPS, PEAK, LAST = 4.0, 5, 1e-3, 0.1
# Gradient norms are taken before clipping.
TOLERANCES = {"learning_rate": 1e-6, "loss": 1e-5, "grad_norm": 1e-4}
# With norms and the embedding, which is the output head as well.
ADAPTER = lora.LoraConfig()
OPTIMIZER = training.OptimizerConfig(
  learning_rate=PEAK,
  schedule="cosine",
  warmup_steps=WARMUP_STEPS,
  final_fraction=LAST,
)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
  """The first of the embedded books."""
  path = tmp_path_factory.mktemp("tokens") / "book.bin"
  books = itertools.islice(read_documents(assets.BOOKS_TUNE), 1)
  write_token_file(books, tokenizer.load(assets.MODEL), path)
  return TokenFile.open(path)


def _batches(tokens):
  return make_batches(tokens, seq_len=SEQ_LEN, batch_size=BATCH_SIZE, seed=0)


def _start():
  """The embedded model with interpolated positions and new adapters."""
  config = convert.load_config(assets.MODEL)
  config = dataclasses.replace(
    config,
    context_len=int(FACTOR) * config.context_len,
    rope_scaling=RopeScaling(kind="linear", factor=FACTOR),
  )
  return convert.load_model(
    assets.MODEL, config=config, lora=ADAPTER, rngs=nnx.Rngs(0)
  )


def _train_ours(model, tokens, folder):
  """Returns the metrics of each step of the loop that the commands run."""
  config = TrainingConfig(
    seq_len=SEQ_LEN,
    batch_size=BATCH_SIZE,
    steps=STEPS,
    checkpoint_every=STEPS,
  )
  loop.fit(
    model,
    trainable=lora.trainable(model.lora),
    batches=_batches(tokens),
    run=FinetuneConfig(optimizer=OPTIMIZER, training=config),
    step=training.StepConfig(
      patterns=patterns.scca_fixed(model.config.num_heads, CHUNK_SIZE)
    ),
    output_dir=folder,
  )
  lines = (folder / "metrics.jsonl").read_text(encoding="utf8").splitlines()
  return [json.loads(line) for line in lines]


def _attend(
  module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs
):
  """SCCA fixed as transformers calls attention, `[batch, heads, seq, ...]`."""
  del module, scaling, kwargs
  assert attention_mask is None and dropout == 0
  heads_last = (x.transpose(1, 2) for x in (query, key, value))
  output, _ = torch_attention.scca_fixed(*heads_last, CHUNK_SIZE)
  return output, None


def _learning_rate(step):
  if step < WARMUP_STEPS:
    return PEAK * (step + 1) / WARMUP_STEPS
  share = (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)
  return PEAK * (LAST + (1 - LAST) * (1 + math.cos(math.pi * share)) / 2)


def _train_theirs(adapter, tokens):
  """Returns the same of a loop in PyTorch; PEFT reads the adapter."""
  transformers.AttentionInterface.register("scca_fixed", _attend)
  config = transformers.LlamaConfig.from_pretrained(assets.MODEL)
  config.rope_parameters = {
    "rope_type": "linear",
    "factor": FACTOR,
    "rope_theta": 10000.0,
  }
  base = transformers.LlamaForCausalLM.from_pretrained(
    assets.MODEL,
    config=config,
    dtype=torch.float32,
    attn_implementation="scca_fixed",
  )
  model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(
    trained, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
  )
  history = []
  for step, batch in enumerate(itertools.islice(_batches(tokens), STEPS)):
    logits = model(torch.tensor(batch["tokens"]).long(), use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
      logits.flatten(0, 1), torch.tensor(batch["targets"]).long().flatten()
    )
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.param_groups[0]["lr"] = _learning_rate(step)
    optimizer.step()
    history.append(
      {
        "loss": loss.item(),
        "grad_norm": norm.item(),
        "learning_rate": _learning_rate(step),
      }
    )
  return history


def test_a_fine_tuning_run_has_the_losses_of_pytorch(tokens, tmp_path):
  model = _start()
  # Before training, because the step takes over its arguments' buffers.
  adapters.save_adapter(
    model, tmp_path / "adapter", base_model=str(assets.MODEL)
  )
  ours = _train_ours(model, tokens, tmp_path)
  theirs = _train_theirs(tmp_path / "adapter", tokens)
  assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
  for name, tolerance in TOLERANCES.items():
    np.testing.assert_allclose(
      [line[name] for line in ours],
      [line[name] for line in theirs],
      rtol=tolerance,
      err_msg=name,
    )
  assert ours[-1]["loss"] < ours[0]["loss"] - 0.1


def test_weight_decay_acts_on_what_it_does_in_the_trainer(tmp_path):
  model = _start()
  adapters.save_adapter(model, tmp_path, base_model=str(assets.MODEL))
  theirs = peft.PeftModel.from_pretrained(
    transformers.LlamaForCausalLM.from_pretrained(assets.MODEL),
    tmp_path,
    is_trainable=True,
  )
  decays = transformers.Trainer.get_decay_parameter_names(None, theirs)
  trained = {n for n, p in theirs.named_parameters() if p.requires_grad}
  wanted = trained & set(decays)
  _, params, _ = nnx.split(model, lora.trainable(model.lora), ...)
  ones = jax.tree.map(jnp.ones_like, params)
  rule = training.make_optimizer(
    training.OptimizerConfig(weight_decay=0.1, clip_norm=None), 10
  )
  zeros = jax.tree.map(jnp.zeros_like, ones)
  updates, _ = rule.update(zeros, rule.init(ones), ones)
  shrunk = set()
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    if bool(jnp.any(update != 0)):
      path = tuple(k.key for k in path if hasattr(k, "key"))
      shrunk |= set(layout.file_names(path, model.config.num_layers))
  assert shrunk == {
    re.sub(r"base_model\.model\.|\.modules_to_save|\.default", "", name)
    for name in wanted
  }


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"beta1": 0.5, "beta2": 0.8},
    {"epsilon": 1e-2},
    {"weight_decay": 0.3},
    {"clip_norm": 0.1},
    {"schedule": "cosine", "final_fraction": 0.0},
    {"schedule": "cosine", "final_fraction": 0.3, "weight_decay": 0.1},
    {"warmup_steps": 0},
  ],
)
def test_each_setting_of_the_optimiser_does_what_it_does_in_the_trainer(
  changes,
):
  config = dataclasses.replace(
    training.OptimizerConfig(
      learning_rate=0.1, warmup_steps=4, clip_norm=None, epsilon=1e-8
    ),
    **changes,
  )
  steps = 12
  rng = np.random.default_rng(0)
  start = rng.normal(size=(3, 4))
  gradients = rng.normal(size=(steps, 3, 4))
  theirs = torch.nn.Parameter(torch.tensor(start))
  optimizer = torch.optim.AdamW(
    [theirs],
    lr=config.learning_rate,
    betas=(config.beta1, config.beta2),
    eps=config.epsilon,
    weight_decay=config.weight_decay,
  )
  name, settings = "constant_with_warmup", {}
  if config.schedule == "cosine":
    name = "cosine_with_min_lr"
    settings["min_lr_rate"] = config.final_fraction
  schedule = transformers.get_scheduler(
    name,
    optimizer,
    num_warmup_steps=config.warmup_steps,
    num_training_steps=steps,
    scheduler_specific_kwargs=settings,
  )
  rule = training.make_optimizer(config, steps)
  ours = {"kernel": jnp.asarray(start, jnp.float32)}
  state = rule.init(ours)
  rate = training.learning_rate_schedule(config, steps)
  for i, gradient in enumerate(gradients):
    if i < config.warmup_steps:
      # Our warm-up is a step ahead: the Trainer's first has no effect.
      optimizer.param_groups[0]["lr"] = (
        config.learning_rate * (i + 1) / config.warmup_steps
      )
    expected = optimizer.param_groups[0]["lr"]
    assert float(rate(i)) == pytest.approx(expected, rel=1e-5)
    theirs.grad = torch.tensor(gradient)
    if config.clip_norm is not None:
      torch.nn.utils.clip_grad_norm_([theirs], config.clip_norm)
    optimizer.step()
    schedule.step()
    updates, state = rule.update(
      {"kernel": jnp.asarray(gradient, jnp.float32)}, state, ours
    )
    ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(
      ours["kernel"], theirs.detach().numpy(), rtol=1e-5, atol=2e-6
    )
