"""The training step against optimisation written out by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pattern_strings
import pytest
import tiny_llama
from flax import nnx

from scca_jax import lora, losses, patterns, sharding, training
from scca_jax.llama import Execution, Llama

CONFIG = dataclasses.replace(
  tiny_llama.CONFIG, vocab_size=17, head_dim=4, tie_embeddings=True
)
LORA = lora.LoraConfig(rank=2)
PATTERN = patterns.scca_fixed(4, 4)
OPTIMIZER = training.OptimizerConfig(learning_rate=1e-2, warmup_steps=2)


def _batch(batch=4, seq=12, seed=0):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, CONFIG.vocab_size, (batch, seq + 1)).astype(np.int32)
  mask = np.ones((batch, seq), np.float32)
  mask[0, :5] = 0
  return {
    "tokens": jnp.asarray(tokens[:, :-1]),
    "targets": jnp.asarray(tokens[:, 1:]),
    "mask": jnp.asarray(mask),
  }


@functools.cache
def _made(adapter, dtype, optimizer, num_steps):
  model = Llama(CONFIG, lora=adapter, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
  return *nnx.split(model), training.make_optimizer(optimizer, num_steps)


def _start(
  adapter=LORA, dtype="float32", optimizer=OPTIMIZER, num_steps=10, **settings
):
  graphdef, state, rule = _made(adapter, dtype, optimizer, num_steps)
  # A step takes over the buffers of its state, so each run has its own.
  model = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))
  graphdef, state, frozen = training.init(
    model, lora.trainable(adapter), rule, **settings
  )
  return graphdef, frozen, rule, state


@functools.cache
def _step(graphdef, rule, config):
  # State and parameters are only needed for their layout on a mesh.
  return training.compile_step(graphdef, rule, config, None, None)


def _run(num_steps=3, batch_of=_batch, start=None, **step_settings):
  graphdef, frozen, rule, state = start or _start()
  config = training.StepConfig(patterns=PATTERN, **step_settings)
  step = _step(graphdef, rule, config)
  history = []
  for i in range(num_steps):
    state, metrics = step(state, frozen, batch_of(seed=i))
    history.append(jax.device_get(metrics))
  return state, history


def _assert_close(a, b, **tolerance):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, **tolerance)


def test_a_step_is_clipped_adamw_on_the_mean_loss():
  graphdef, frozen, _, state = _start()
  rule = optax.chain(
    optax.clip_by_global_norm(1.0),
    # Warm-up over two steps: a half, then the whole of 1e-2.
    optax.adamw(
      lambda count: jnp.where(count == 0, 0.5e-2, 1e-2),
      b1=0.9,
      b2=0.95,
      weight_decay=0.0,
    ),
  )

  def loss_of(params, batch):
    model = nnx.merge(graphdef, params, frozen)
    logits = model(batch["tokens"], patterns=PATTERN)
    of_tokens = losses.cross_entropy(logits, batch["targets"])
    return jnp.sum(of_tokens * batch["mask"]) / batch["mask"].sum()

  @jax.jit
  def step(params, moments, batch):
    loss, grads = jax.value_and_grad(loss_of)(params, batch)
    updates, moments = rule.update(grads, moments, params)
    return loss, optax.apply_updates(params, updates), moments

  params, moments = state.params, rule.init(state.params)
  expected_losses = []
  for i in range(3):
    loss, params, moments = step(params, moments, _batch(seed=i))
    expected_losses.append(float(loss))
  got, history = _run()
  np.testing.assert_allclose(
    [h["loss"] for h in history], expected_losses, rtol=1e-5
  )
  _assert_close(got.params, params, rtol=1e-3, atol=1e-5)


def test_only_the_trainable_part_has_optimizer_state():
  _, frozen, _, state = _start()
  trained = sum(x.size for x in jax.tree.leaves(state.params))
  moments = sum(x.size for x in jax.tree.leaves(state.optimizer))
  # Two moments a parameter, and the counts of steps.
  assert 2 * trained <= moments <= 2 * trained + 4
  assert sum(x.size for x in jax.tree.leaves(frozen)) > trained


def test_accumulated_gradients_equal_those_of_the_whole_batch():
  whole, whole_history = _run(num_micro_batches=1)
  parts, parts_history = _run(num_micro_batches=4)
  for a, b in zip(whole_history, parts_history, strict=True):
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)
  _assert_close(whole.params, parts.params, rtol=1e-3, atol=1e-5)


def test_a_batch_that_cannot_be_cut_is_refused():
  graphdef, frozen, rule, state = _start()
  config = training.StepConfig(patterns=PATTERN, num_micro_batches=3)
  with pytest.raises(ValueError, match="4 sequences.*3 micro"):
    jax.eval_shape(
      functools.partial(
        training.train_step, graphdef=graphdef, optimizer=rule, config=config
      ),
      state,
      frozen,
      _batch(),
    )


@pytest.mark.parametrize(
  ("mesh", "said"),
  [
    ({"tensor": 4}, r"mesh\.tensor=4.*10 key/value.*mesh\.tensor=5\."),
    ({"data": 3}, r"mesh\.data=3 .*8 sequences.*mesh\.data=2\."),
    (
      {"fsdp": 4, "data": 4},
      r"mesh\.fsdp=4, times 4,.*mesh\.fsdp=2, or num_micro_batches=1\.",
    ),
    ({"sequence": 16}, r"mesh\.sequence=16.*64 tokens.*of 8.*sequence=8\."),
    ({"sequence": 7}, r"mesh\.sequence=7.*sequence=8\."),
  ],
)
def test_a_mesh_that_does_not_fit_names_the_axis_and_what_fits(mesh, said):
  step = training.StepConfig(
    patterns=patterns.mixture(patterns.local(10, 8), patterns.dense(10)),
    num_micro_batches=2,
  )
  model = dataclasses.replace(CONFIG, num_heads=10, num_kv_heads=10)
  with pytest.raises(ValueError, match=said):
    training.check_mesh(
      sharding.MeshConfig(**mesh), step, model, batch_size=16, seq_len=64
    )


def test_remat_and_chunks_change_no_number():
  plain, plain_history = _run()
  lean, lean_history = _run(
    execution=Execution(remat="layer", mlp_chunk=5),
    loss_chunk=5,
  )
  for a, b in zip(plain_history, lean_history, strict=True):
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
  _assert_close(plain.params, lean.params, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
  ("dtype", "tolerance"),
  [
    ("float32", 1e-4),
    pytest.param("float16", 2e-2, marks=pytest.mark.slow),
  ],
)
def test_steps_on_segments_are_those_on_whole_sequences(dtype, tolerance):
  # Three segments of four tokens: a chunk each.
  whole, history = _run(start=_start(dtype=dtype))
  parts, history_of_parts = _run(
    start=_start(dtype=dtype),
    num_micro_batches=2,
    execution=Execution(
      implementation="reference", remat="layer", segment_len=4
    ),
  )
  for a, b in zip(history, history_of_parts, strict=True):
    assert b["skipped"] == 0
    for name in ("loss", "grad_norm"):
      np.testing.assert_allclose(a[name], b[name], rtol=tolerance)
  if dtype == "float32":
    _assert_close(whole.params, parts.params, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rotate", [0, "layer"])
def test_the_backward_pass_keeps_no_second_copy_of_the_weights(rotate):
  schedule = pattern_strings.make_layers(
    "scca_flow", num_heads=4, num_layers=8, seq_len=8, rotate=rotate
  )
  config = dataclasses.replace(CONFIG, num_layers=8)
  model = nnx.eval_shape(lambda: Llama(config, lora=LORA, rngs=nnx.Rngs(0)))
  graphdef, params, frozen = nnx.split(model, lora.trainable(LORA), ...)
  tokens = jnp.zeros((1, 8), jnp.int32)

  def kept(params, frozen):
    def hidden(params):
      return nnx.merge(graphdef, params, frozen).hidden_states(
        tokens, schedule, Execution(remat="layer")
      )

    return jax.vjp(hidden, params)[1]

  jaxpr = jax.make_jaxpr(kept)(params, frozen)
  (scan,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
  # Besides the last layer's output the scan saves the inputs of all layers;
  # everything else it must take from the weights themselves.
  layer_inputs = config.num_layers * 8 * config.hidden_size
  assert sum(x.aval.size for x in scan.outvars) <= 1.2 * layer_inputs


def test_offloaded_moments_change_no_number():
  plain, plain_history = _run()
  start = _start(offload_optimizer=True)
  state = start[3]
  params = state.params

  def places(state):
    return [(x.committed, x.sharding) for x in jax.tree.leaves(state)]

  before = places(state)
  assert all(x.committed for x in jax.tree.leaves(state))
  lean, lean_history = _run(start=start, offload_optimizer=True)
  moments = [x for x in jax.tree.leaves(lean.optimizer) if x.ndim]
  assert {x.sharding.memory_kind for x in moments} == {"pinned_host"}
  # The second step has what the first one compiled.
  assert places(lean) == before
  # The first one took the parameters themselves, not copies of them.
  assert all(x.is_deleted() for x in jax.tree.leaves(params))
  for a, b in zip(plain_history, lean_history, strict=True):
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
  _assert_close(plain.params, lean.params, rtol=1e-6)


def test_an_overflow_changes_only_the_loss_scale():
  start = _start(dtype="float16")
  graphdef, frozen, rule, state = start
  # A scale that no float16 gradient survives.
  state = dataclasses.replace(
    state,
    loss_scale=dataclasses.replace(
      state.loss_scale, scale=jnp.asarray(2.0**24, jnp.float32)
    ),
  )
  # Kept as copies, because the step takes over its argument's buffers.
  before = jax.tree.map(jnp.copy, (state.params, state.optimizer))
  step = _step(graphdef, rule, training.StepConfig(patterns=PATTERN))
  state, metrics = step(state, frozen, _batch())
  assert not np.isfinite(metrics["grad_norm"])
  assert metrics["skipped"] == metrics["skipped_in_a_row"] == 1
  assert state.loss_scale.scale == 2.0**23
  assert state.step == 1
  _assert_close((state.params, state.optimizer), before, rtol=0)
  for _ in range(24):
    state, metrics = step(state, frozen, _batch())
  assert metrics["skipped_in_a_row"] == 0 < metrics["skipped"]
  assert np.isfinite(metrics["loss"])


def test_float16_follows_float32():
  _, exact = _run(num_steps=4)
  _, half = _run(num_steps=4, start=_start(dtype="float16"))
  for a, b in zip(exact, half, strict=True):
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-2)


def test_micro_batches_do_not_drive_float16_to_underflow():
  def grad_norm(parts, dtype):
    # A scale so small that a quarter of it loses gradients.
    start = _start(dtype=dtype)
    small = dataclasses.replace(
      start[3].loss_scale, scale=jnp.asarray(2.0**-10, jnp.float32)
    )
    start = (*start[:3], dataclasses.replace(start[3], loss_scale=small))
    _, history = _run(1, start=start, num_micro_batches=parts)
    return history[0]["grad_norm"]

  errors = [
    abs(grad_norm(parts, "float16") / grad_norm(parts, "float32") - 1)
    for parts in (1, 4)
  ]
  assert 1e-4 < errors[0]
  assert errors[1] < 2 * errors[0]


def test_the_loss_scale_doubles_after_good_steps():
  scale = training.LossScale.create(jnp.float16)
  scale = dataclasses.replace(
    scale, good_steps=jnp.asarray(training._GROWTH_INTERVAL - 1, jnp.int32)
  )
  grown = scale.update(jnp.asarray(True))
  assert grown.scale == 2 * scale.scale
  assert grown.good_steps == 0


@pytest.mark.parametrize("adapter", [None, LORA])
def test_weight_decay_spares_norms_alone(adapter):
  config = dataclasses.replace(OPTIMIZER, weight_decay=0.5, clip_norm=None)
  graphdef, _, rule, state = _start(adapter=adapter, optimizer=config)
  # All of them 1: a new adapter has zeros, which nothing shrinks.
  params = jax.tree.map(jnp.ones_like, state.params)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = rule.update(zeros, state.optimizer, params)
  for path, update in jax.tree_util.tree_flatten_with_path(updates)[0]:
    name = jax.tree_util.keystr(path)
    assert bool(jnp.any(update != 0)) != ("norm" in name), name


def test_schedules_warm_up_from_the_first_step():
  config = training.OptimizerConfig(
    learning_rate=1.0, warmup_steps=4, schedule="cosine", final_fraction=0.1
  )
  rate = training.learning_rate_schedule(config, 14)
  np.testing.assert_allclose([rate(i) for i in range(4)], [0.25, 0.5, 0.75, 1])
  np.testing.assert_allclose(rate(9), 0.55, rtol=1e-5)
  np.testing.assert_allclose(rate(14), 0.1, rtol=1e-5)
  constant = training.learning_rate_schedule(
    dataclasses.replace(config, schedule="constant", warmup_steps=0), 14
  )
  assert constant(0) == constant(13) == 1


def test_the_rate_warms_up_again_when_training_turns_dense():
  assert training.first_dense_step(10, 0.4) == 6
  assert training.first_dense_step(10, 0.0) == 10
  config = training.OptimizerConfig(
    learning_rate=1.0, warmup_steps=0, rewarmup_steps=4
  )
  rate = training.learning_rate_schedule(config, 10, rewarm_at=6)
  np.testing.assert_allclose(
    [rate(i) for i in range(10)], [1] * 6 + [0.25, 0.5, 0.75, 1]
  )


def test_embeddings_and_second_matrices_have_rates_of_their_own():
  config = dataclasses.replace(OPTIMIZER, clip_norm=None)
  ratios = {"embedding_ratio": 0.25, "lora_b_ratio": 16.0}

  def updates(config, **given):
    _, _, _, state = _start(optimizer=config)
    rule = training.make_optimizer(config, 10, **given)
    ones = jax.tree.map(jnp.ones_like, state.params)
    return rule.update(ones, state.optimizer, state.params)[0]

  plain = updates(config)
  several = updates(dataclasses.replace(config, **ratios), learning_rate=2e-2)
  found = jax.tree_util.tree_flatten_with_path(several)[0]
  for (path, x), y in zip(found, jax.tree.leaves(plain), strict=True):
    name = jax.tree_util.keystr(path)
    ratio = 0.25 if "embed" in name else 16 if "lora_b" in name else 1
    np.testing.assert_allclose(x, 2 * ratio * y, rtol=1e-6, err_msg=name)


def test_dropout_is_of_the_seed_and_the_step():
  dropout = dataclasses.replace(LORA, dropout=0.5)

  def losses_of(seed):
    # Adapters start at zero: dropout shows from the second step on.
    _, history = _run(start=_start(adapter=dropout), seed=seed)
    return [float(h["loss"]) for h in history]

  assert losses_of(0) == losses_of(0)
  assert losses_of(0) != losses_of(1)


def test_what_the_user_tells_the_compiler_holds(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
  assert training.compiler_options() == {"xla_gpu_enable_triton_gemm": False}
  monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
  assert training.compiler_options() == {}


def test_matrices_of_a_layer_are_gathered_together():
  params = {
    "embed_tokens": {"embedding": jax.ShapeDtypeStruct((9, 8), jnp.float32)},
    "layers": {
      "q_proj": {"kernel": jax.ShapeDtypeStruct((3, 8, 4), jnp.bfloat16)},
      "norm": {"scale": jax.ShapeDtypeStruct((3, 8), jnp.float32)},
    },
  }
  name = "xla_gpu_all_gather_combine_threshold_bytes"
  for sizes, expected in (({"fsdp": 2}, 8 * 4 * 2 + 8 * 4), ({"data": 2}, 0)):
    mesh = sharding.make_mesh(sharding.MeshConfig(**sizes))
    options = training.compiler_options(Execution(mesh=mesh), params, {})
    assert options.get(name, 0) == expected


def test_only_segments_on_the_host_lift_the_limit_of_memory(monkeypatch):
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  name = "xla_gpu_memory_limit_slop_factor"
  segments = Execution(segment_len=64)
  on_host = dataclasses.replace(segments, offload_segments=True)
  whole = dataclasses.replace(on_host, segment_len=None)
  assert [
    name in training.compiler_options(x) for x in (segments, on_host, whole)
  ] == [False, True, False]
  monkeypatch.setenv("XLA_FLAGS", f"--{name}=80")
  assert name not in training.compiler_options(on_host)
