"""Quantised weights against their formats, written out in numpy."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from scca_jax import (
  adapters,
  assets,
  convert,
  lora,
  patterns,
  quantize,
  training,
)
from scca_jax.llama import Execution, Llama
from scca_jax.llama_config import LlamaConfig

CONFIG = LlamaConfig(
  vocab_size=17,
  hidden_size=32,
  intermediate_size=48,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  context_len=16,
)
LORA = lora.LoraConfig(rank=2)
# The sixteen values of arXiv 2305.14314, appendix E.
NF4 = np.array(
  [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
  ]
)


def _kernel(layers=3, num_inputs=128, num_outputs=5, dtype=np.float32):
  rng = np.random.default_rng(0)
  kernel = rng.normal(0, 0.02, (layers, num_inputs, num_outputs))
  # Channels of other sizes, and one that is all zero.
  kernel[1] *= 100
  kernel[2, :, 3] = 0
  return kernel.astype(dtype)


def _round_trip(kernel, method):
  held = quantize.quantize_layers(jnp.asarray(kernel), method)
  return held, np.asarray(quantize.dequantize(held, jnp.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_int8_is_the_nearest_of_its_levels(dtype):
  kernel = _kernel(dtype=dtype)
  held, got = _round_trip(kernel, "int8")
  exact = kernel.astype(np.float64)
  step = np.abs(exact).max(axis=1, keepdims=True) / 127.5
  step = np.where(step == 0, 1, step)
  levels = got / step
  assert np.abs(levels - np.rint(levels)).max() < 1e-4
  assert (-128.001 < levels).all() and (levels < 127.001).all()
  # The largest weight of a channel is half a step from two levels.
  assert (np.abs(got - exact) <= 0.5001 * step).all()
  assert held.qvalue.dtype == jnp.int8
  assert held.scale.shape == (3, 1, 5)


@pytest.mark.parametrize("num_inputs", [128, 96, 40])
def test_nf4_is_the_nearest_of_its_values(num_inputs):
  kernel = _kernel(num_inputs=num_inputs)
  held, got = _round_trip(kernel, "nf4")
  block = {128: 64, 96: 32, 40: 8}[num_inputs]
  blocks = kernel.reshape(3, -1, block, 5).astype(np.float64)
  largest = np.abs(blocks).max(axis=2, keepdims=True)
  largest = np.where(largest == 0, 1, largest)
  distances = np.abs((blocks / largest)[..., None] - NF4)
  expected = NF4[distances.argmin(axis=-1)] * largest
  np.testing.assert_allclose(
    got, expected.reshape(kernel.shape), rtol=1e-5, atol=1e-7
  )
  # Half the widest gap between two values, times the largest of the block.
  bound = 0.5001 * np.diff(NF4).max() * largest
  assert (np.abs(expected - blocks) <= bound).all()
  assert jax.dtypes.itemsize_bits(held.qvalue.dtype) == 4
  assert held.scale.size == kernel.size // block


def test_floats_are_only_cast():
  kernel = jnp.asarray(_kernel())
  assert quantize.method_of(kernel) is None
  np.testing.assert_array_equal(
    quantize.dequantize(kernel, jnp.float16), kernel.astype(jnp.float16)
  )


def test_unknown_methods_are_refused():
  with pytest.raises(ValueError, match="'int3'.*int8, nf4"):
    quantize.check_method("int3")


def _model(method, dtype=jnp.float32):
  """Returns a model with quantised weights, and one with the same as floats."""
  model = Llama(CONFIG, lora=LORA, dtype=dtype, rngs=nnx.Rngs(0))
  quantised = quantize.quantize_model(model, method)
  graphdef, state = nnx.split(quantised)
  flat = dict(nnx.to_flat_state(state))
  count = 0
  for path, variable in flat.items():
    value = variable[...]
    count += quantize.method_of(value) == method
    flat[path] = variable.replace(quantize.dequantize(value, jnp.float32))
  assert count == len(lora.TARGETS)
  return quantised, nnx.merge(graphdef, nnx.from_flat_state(flat))


@pytest.mark.parametrize(
  ("method", "remat"),
  [
    pytest.param("int8", "offload", marks=pytest.mark.slow),
    ("nf4", "projections"),
  ],
)
def test_a_step_is_that_of_the_dequantised_weights(method, remat):
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, CONFIG.vocab_size, (2, 13)).astype(np.int32)
  batch = {
    "tokens": jnp.asarray(tokens[:, :-1]),
    "targets": jnp.asarray(tokens[:, 1:]),
    "mask": jnp.ones((2, 12), jnp.float32),
  }
  step_config = training.StepConfig(
    patterns=patterns.scca_fixed(4, 4),
    # The implementation that compiles fastest.
    execution=Execution(implementation="reference", remat=remat),
  )
  rule = training.make_optimizer(
    training.OptimizerConfig(learning_rate=1e-2, warmup_steps=0), 10
  )
  plain = dataclasses.replace(
    step_config, execution=Execution(implementation="reference")
  )
  results = []
  for model, config in zip(_model(method), (step_config, plain), strict=True):
    graphdef, params, frozen = nnx.split(model, lora.trainable(LORA), ...)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    # Copies, because a step takes over the buffers, which both models share.
    params = jax.tree.map(jnp.copy, params)
    graphdef, state, frozen = training.init(
      nnx.merge(graphdef, params, frozen), lora.trainable(LORA), rule
    )
    step = training.compile_step(graphdef, rule, config, state, frozen)
    for _ in range(3):
      state, metrics = step(state, frozen, batch)
    results.append((state.params, metrics))
  (params, metrics), (float_params, float_metrics) = results
  for name in ("loss", "grad_norm"):
    np.testing.assert_allclose(metrics[name], float_metrics[name], rtol=1e-5)
  for a, b in zip(
    jax.tree.leaves(params), jax.tree.leaves(float_params), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
  "method", [pytest.param("int8", marks=pytest.mark.slow), "nf4"]
)
def test_an_adapter_finds_the_weights_it_was_trained_on(tmp_path, method):
  model = convert.load_model(assets.MODEL, lora=LORA, quantize_by=method)
  tokens = jnp.arange(24).reshape(2, 12)
  dense = patterns.dense(model.config.num_heads)
  # An adapter that changes something.
  model.layers.self_attn.q_proj.lora_b[...] += 0.1
  logits = functools.partial(
    lambda m: np.asarray(m(tokens, patterns=dense)),
  )
  adapters.save_adapter(model, tmp_path, base_model=str(assets.MODEL))
  again = adapters.load_adapter(assets.MODEL, tmp_path)
  np.testing.assert_array_equal(logits(again), logits(model))
  kept = json.loads((tmp_path / "scca_config.json").read_text())
  assert kept["quantize"] == method
  # Fused, the weights are floats: those that training saw.
  convert.save_model(again, tmp_path / "fused", dtype=jnp.float32)
  fused = convert.load_model(tmp_path / "fused")
  np.testing.assert_allclose(logits(fused), logits(model), atol=2e-4)
  plain = convert.load_model(assets.MODEL)
  assert np.abs(logits(fused) - logits(plain)).max() > 1e-2


@pytest.mark.slow
def test_a_quantised_run_goes_on_and_is_evaluated(run_command, tmp_path):
  settings = [
    "--config.training.quantize=int8",
    "--config.training.offload_optimizer=True",
    "--config.training.seq_len=64",
    "--config.training.batch_size=2",
    "--config.training.steps=4",
    "--config.training.checkpoint_every=2",
    "--config.evaluation.context_lens=(64,)",
    "--config.evaluation.num_windows=2",
  ]
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  assert not run_command("finetune", f"--output_dir={whole}", *settings)
  # As if it had been killed after its third step.
  shutil.copytree(whole, parts)
  shutil.rmtree(parts / "checkpoints" / "4")
  shutil.rmtree(parts / "adapter")
  assert not run_command("finetune", f"--output_dir={parts}", *settings)
  expected, got = (
    load_file(folder / "adapter" / "adapter_model.safetensors")
    for folder in (whole, parts)
  )
  for name, value in expected.items():
    np.testing.assert_allclose(got[name], value, atol=1e-7, err_msg=name)
  output = tmp_path / "perplexity.json"
  assert not run_command(
    "evaluate",
    f"--adapter={parts / 'adapter'}",
    "--context_lens=64",
    "--num_windows=2",
    f"--output={output}",
  )
  summary = json.loads((parts / "summary.json").read_text())
  np.testing.assert_allclose(
    json.loads(output.read_text())["perplexity"]["64"],
    summary["perplexity"]["tuned"]["64"],
    rtol=1e-5,
  )


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_what_cannot_be_quantised_is_refused(run_command, capsys, command):
  method = "int8" if command == "pretrain" else "int3"
  arguments = [f"--config.training.quantize={method}"]
  if command == "pretrain":
    arguments += ["--data=books.txt", "--config.data.tokenizer=tokenizer.json"]
  assert run_command(command, *arguments) == 2
  errors = capsys.readouterr().err.strip().splitlines()
  assert len(errors) == 1
  assert f"'{method}'" in errors[0]
