"""The model against LLaMA's equations in plain numpy."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_llama import CONFIG

from scca_jax import llama, lora, patterns
from scca_jax.llama import Execution, Llama
from scca_jax.rope import RopeScaling

FOUR_LAYERS = dataclasses.replace(CONFIG, num_layers=4)
LORA = lora.LoraConfig(rank=3, alpha=6.0)
DENSE = patterns.dense(4)
FIXED = patterns.scca_fixed(4, 4)
SEQ = 11
REFERENCE = Execution(implementation="reference")


def _tokens(batch=2, seq=SEQ, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, CONFIG.vocab_size, (batch, seq)))


@functools.cache
def _model(config=CONFIG, adapter=None, dtype=jnp.float32):
  """A model with all weights random: norms and the second matrices too.

  Weights of one name and shape are the same in all such models.
  """
  model = nnx.eval_shape(
    lambda: Llama(config, lora=adapter, dtype=dtype, rngs=nnx.Rngs(0))
  )

  def draw(path, leaf):
    name = jax.tree_util.keystr(path)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    mean = 1.0 if "scale" in name else 0.0
    return jnp.asarray(rng.normal(mean, 0.3, leaf.shape), leaf.dtype)

  nnx.update(model, jax.tree_util.tree_map_with_path(draw, nnx.state(model)))
  return model


@functools.partial(jax.jit, static_argnames=("graphdef", "patterns"))
def _run(state, tokens, graphdef, patterns, **settings):
  return nnx.merge(graphdef, state)(tokens, patterns, REFERENCE, **settings)


def _logits(model, tokens, patterns, **settings):
  graphdef, state = nnx.split(model)
  return np.asarray(_run(state, tokens, graphdef, patterns, **settings))


def _equations(model, tokens, masks, inv_freq=None):
  """LLaMA in float64, one head and one layer after the other.

  Args:
    model: Where the weights are taken from.
    tokens: `[batch, seq]`.
    masks: Which keys each query sees, a bool `[heads, seq, seq]` a layer.
    inv_freq: Frequencies of RoPE, or None for the plain ones.
  """
  config = model.config
  weights = jax.tree.map(
    lambda leaf: np.asarray(leaf, np.float64),
    nnx.to_pure_dict(nnx.state(model)),
  )
  layers, d = weights["layers"], config.head_dim
  if inv_freq is None:
    inv_freq = config.rope_theta ** (-2 * np.arange(d // 2) / d)

  def norm(x, scale):
    mean_square = (x**2).mean(-1, keepdims=True)
    return x / np.sqrt(mean_square + config.rms_norm_eps) * scale

  def project(part, name, x, i):
    w = layers[part][name]
    matrix = w["kernel"][i]
    if "lora_a" in w:
      factor = model.lora.alpha / model.lora.rank
      matrix = matrix + factor * w["lora_a"][i] @ w["lora_b"][i]
    return x @ matrix

  def rotate(x):
    z = x[:, : d // 2] + 1j * x[:, d // 2 :]
    z = z * np.exp(1j * np.arange(len(x))[:, None] * inv_freq)
    return np.concatenate([z.real, z.imag], axis=1)

  def attend(x, i):
    q, k, v = (project("self_attn", f"{n}_proj", x, i) for n in "qkv")
    heads = []
    for h in range(config.num_heads):
      g = h // (config.num_heads // config.num_kv_heads)
      query = rotate(q[:, h * d : (h + 1) * d])
      key = rotate(k[:, g * d : (g + 1) * d])
      weight = np.exp(query @ key.T / np.sqrt(d)) * masks[i][h]
      total = weight.sum(1, keepdims=True)
      weight = np.divide(weight, total, where=total > 0, out=weight)
      heads.append(weight @ v[:, g * d : (g + 1) * d])
    return project("self_attn", "o_proj", np.concatenate(heads, axis=1), i)

  logits = []
  for sequence in np.asarray(tokens):
    x = weights["embed_tokens"]["embedding"][sequence]
    for i in range(config.num_layers):
      x = x + attend(norm(x, layers["input_layernorm"]["scale"][i]), i)
      y = norm(x, layers["post_attention_layernorm"]["scale"][i])
      gate = project("mlp", "gate_proj", y, i)
      gate = gate / (1 + np.exp(-gate))
      y = gate * project("mlp", "up_proj", y, i)
      x = x + project("mlp", "down_proj", y, i)
    head = (
      weights["embed_tokens"]["embedding"].T
      if config.tie_embeddings
      else weights["lm_head"]["kernel"]
    )
    logits.append(norm(x, weights["norm"]["scale"]) @ head)
  return np.stack(logits)


def _triangles(num_layers, seq=SEQ):
  return [np.tril(np.ones((4, seq, seq), bool))] * num_layers


@pytest.mark.parametrize("tied", [False, True])
def test_logits_follow_the_equations(tied):
  model = _model(dataclasses.replace(CONFIG, tie_embeddings=tied))
  expected = _equations(model, _tokens(), _triangles(2))
  np.testing.assert_allclose(
    _logits(model, _tokens(), DENSE), expected, rtol=1e-5, atol=1e-5
  )


def test_rope_scaling_reaches_the_layers():
  scaling = RopeScaling(kind="linear", factor=4.0)
  model = _model(dataclasses.replace(CONFIG, rope_scaling=scaling))
  inv_freq = 10000.0 ** (-np.arange(3) / 3) / 4
  expected = _equations(model, _tokens(), _triangles(2), inv_freq)
  np.testing.assert_allclose(
    _logits(model, _tokens(), DENSE), expected, rtol=1e-5, atol=1e-5
  )
  plain = _equations(model, _tokens(), _triangles(2))
  assert np.abs(plain - expected).max() > 1e-2


def test_adapters_act_as_their_product():
  targets = lora.TARGETS
  model = _model(CONFIG, dataclasses.replace(LORA, targets=targets))
  expected = _equations(model, _tokens(), _triangles(2))
  np.testing.assert_allclose(
    _logits(model, _tokens(), DENSE), expected, rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize(
  ("schedule", "period"),
  [
    ((FIXED,) * 4, 1),
    ((FIXED, DENSE) * 2, 2),
    ((FIXED, DENSE, DENSE, FIXED), 4),
  ],
)
def test_each_layer_has_its_own_pattern(schedule, period, monkeypatch):
  traced = []
  real = llama.attention

  def counted(query, key, value, pattern, **settings):
    traced.append(pattern)
    return real(query, key, value, pattern, **settings)

  monkeypatch.setattr(llama, "attention", counted)
  model = _model(FOUR_LAYERS)
  masks = [pattern.visible(SEQ) for pattern in schedule]
  np.testing.assert_allclose(
    _logits(model, _tokens(), schedule),
    _equations(model, _tokens(), masks),
    rtol=1e-5,
    atol=1e-5,
  )
  # What repeats is compiled once.
  assert tuple(traced) == schedule[:period]


def test_one_pattern_serves_all_layers():
  model = _model()
  np.testing.assert_array_equal(
    _logits(model, _tokens(), FIXED), _logits(model, _tokens(), (FIXED, FIXED))
  )


def test_without_a_pattern_attention_is_dense():
  np.testing.assert_array_equal(
    _logits(_model(), _tokens(), None), _logits(_model(), _tokens(), DENSE)
  )


def test_a_layer_may_attend_by_a_mixture():
  model = _model()
  # Dense attention mixed with itself is dense attention.
  np.testing.assert_allclose(
    _logits(model, _tokens(), patterns.mixture(DENSE, DENSE)),
    _logits(model, _tokens(), DENSE),
    rtol=1e-5,
    atol=1e-5,
  )


@functools.cache
def _gradient(schedule, execution):
  graphdef, state = nnx.split(_model())

  @jax.jit
  @jax.grad
  def gradient(state):
    logits = nnx.merge(graphdef, state)(_tokens(), schedule, execution)
    return jnp.mean(logits**2)

  return gradient(state)


@pytest.mark.parametrize("schedule", [FIXED, (FIXED, DENSE)])
@pytest.mark.parametrize(
  "lever",
  [
    {"remat": "layer"},
    {"remat": "attention"},
    {"remat": "offload"},
    {"remat": "projections"},
    {"remat": "offload_projections"},
    {"remat": "projections", "mlp_chunk": 4},
    {"remat": "projections", "unroll": True},
    {"mlp_chunk": 4},
  ],
  ids=lambda lever: " ".join(map(str, lever.values())),
)
def test_levers_of_memory_change_no_gradient(schedule, lever):
  plain = _gradient(schedule, REFERENCE)
  lean = _gradient(schedule, dataclasses.replace(REFERENCE, **lever))
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(lean), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("lever", "said"),
  [({"remat": "all"}, "'all'.*offload"), ({"mlp_chunk": 0}, "mlp_chunk.*0")],
)
def test_unknown_levers_of_memory_are_refused(lever, said):
  with pytest.raises(ValueError, match=said):
    Execution(**lever)


def test_remat_keeps_of_each_layer_its_input_only():
  # Sizes that no weight and no other activation shares.
  config = dataclasses.replace(FOUR_LAYERS, intermediate_size=29)
  graphdef, state = nnx.split(_model(config))
  tokens = _tokens(3, 13)

  def kept(remat):
    def hidden(state):
      return nnx.merge(graphdef, state).hidden_states(
        tokens, FIXED, dataclasses.replace(REFERENCE, remat=remat)
      )

    residuals = jax.eval_shape(lambda s: jax.vjp(hidden, s)[1], state)
    # Those of the scan: a first axis of layers, then one a group of one.
    return {
      leaf.shape
      for leaf in jax.tree.leaves(residuals)
      if leaf.shape[0] == 4 and {3, 13} & set(leaf.shape)
    }

  assert kept("layer") == {(4, 3, 13, 16)}
  # Besides, queries of four heads, keys and values of two; gate and up.
  assert kept("projections") == {
    (4, 3, 13, 16),
    (4, 3, 13, 4, 6),
    (4, 3, 13, 2, 6),
    (4, 3, 13, 29),
  }
  assert (4, 3, 13, 29) in kept("none")


def test_packed_documents_equal_documents_alone():
  model = _model()
  segment_ids = np.array([[1] * 5 + [2] * 4 + [0] * 2, [3] * 4 + [7] * 7])
  tokens = np.asarray(_tokens())
  got = _logits(model, tokens, DENSE, segment_ids=jnp.asarray(segment_ids))
  assert np.isfinite(got).all()
  for row, segment in ((0, 1), (0, 2), (1, 3), (1, 7)):
    where = segment_ids[row] == segment
    document = tokens[row][None, where]
    expected = _equations(model, document, _triangles(2, document.shape[1]))
    np.testing.assert_allclose(
      got[row, where], expected[0], rtol=1e-5, atol=1e-5
    )


def test_positions_can_be_given():
  model = _model()
  positions = jnp.asarray(np.stack([np.arange(SEQ), 3 * np.arange(SEQ)]))
  got = _logits(model, _tokens(), DENSE, positions=positions)
  plain = 10000.0 ** (-np.arange(3) / 3)
  for row, inv_freq in ((0, plain), (1, 3 * plain)):
    tokens = _tokens()[row : row + 1]
    expected = _equations(model, tokens, _triangles(2), inv_freq)
    np.testing.assert_allclose(got[row], expected[0], rtol=1e-5, atol=1e-5)


@functools.cache
def _drawn(adapter):
  # All matrices of one shape: drawing compiles once.
  config = dataclasses.replace(
    CONFIG,
    vocab_size=24,
    hidden_size=24,
    num_kv_heads=4,
    initializer_range=0.1,
  )
  return Llama(config, lora=adapter, rngs=nnx.Rngs(3))


def test_new_adapter_changes_nothing():
  np.testing.assert_array_equal(
    _logits(_drawn(LORA), _tokens(), FIXED),
    _logits(_drawn(None), _tokens(), FIXED),
  )


def test_every_matrix_is_drawn_anew_within_the_initializer_range():
  matrices = {}
  for name, leaf in _flat(nnx.state(_drawn(None))).items():
    values = np.asarray(leaf)
    if name.endswith("scale"):
      assert (values == 1).all()
    else:
      for i, matrix in enumerate(values.reshape(-1, 24, 24)):
        matrices[name, i] = matrix
  assert len(matrices) == 2 + 2 * 7
  for matrix in matrices.values():
    np.testing.assert_allclose(matrix.std(), 0.1, rtol=0.15)
  assert len({m.tobytes() for m in matrices.values()}) == len(matrices)


def test_no_position_sees_the_future():
  # All tokens differ, so the gradient of an embedding is the gradient of a
  # position.
  tokens = jnp.arange(SEQ)[None]
  graphdef, embedding, rest = nnx.split(
    _model(), nnx.PathContains("embed_tokens"), ...
  )

  @jax.jit
  @jax.jacrev
  def jacobian(embedding):
    model = nnx.merge(graphdef, embedding, rest)
    logits = model(tokens, FIXED, REFERENCE)
    return logits[0].sum(axis=-1)

  gradient = jax.tree.leaves(jacobian(embedding))[0]  # [seq, vocab, hidden]
  gradient = np.abs(gradient).sum(axis=-1)
  reached = gradient[:, :SEQ] > 0
  assert not np.triu(reached, 1).any()
  # Two layers of this pattern reach from one end to the other.
  assert reached.diagonal().all() and reached[-1].sum() > 4


NAMES = {
  "embed_tokens.embedding": (23, 16),
  "layers.input_layernorm.scale": (2, 16),
  "layers.post_attention_layernorm.scale": (2, 16),
  "layers.self_attn.q_proj.kernel": (2, 16, 24),
  "layers.self_attn.k_proj.kernel": (2, 16, 12),
  "layers.self_attn.v_proj.kernel": (2, 16, 12),
  "layers.self_attn.o_proj.kernel": (2, 24, 16),
  "layers.mlp.gate_proj.kernel": (2, 16, 24),
  "layers.mlp.up_proj.kernel": (2, 16, 24),
  "layers.mlp.down_proj.kernel": (2, 24, 16),
  "norm.scale": (16,),
  "lm_head.kernel": (16, 23),
}
ADAPTERS = {
  "layers.self_attn.q_proj.lora_a": (2, 16, 3),
  "layers.self_attn.q_proj.lora_b": (2, 3, 24),
  "layers.self_attn.v_proj.lora_a": (2, 16, 3),
  "layers.self_attn.v_proj.lora_b": (2, 3, 12),
}
QV = dataclasses.replace(LORA, targets=("q_proj", "v_proj"))


def _flat(state):
  return {
    ".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)
  }


@functools.cache
def _abstract(adapter=None, tied=False, param_dtype=jnp.float32):
  config = dataclasses.replace(CONFIG, tie_embeddings=tied)
  return nnx.eval_shape(
    lambda: Llama(
      config, lora=adapter, param_dtype=param_dtype, rngs=nnx.Rngs(0)
    )
  )


def test_parameters_have_stacked_hugging_face_names():
  def shapes(model):
    return {n: leaf.shape for n, leaf in _flat(nnx.state(model)).items()}

  assert shapes(_abstract()) == NAMES
  assert shapes(_abstract(QV)) == NAMES | ADAPTERS
  without_head = {n: s for n, s in NAMES.items() if n != "lm_head.kernel"}
  assert shapes(_abstract(tied=True)) == without_head


EMBEDDINGS = {"embed_tokens.embedding", "lm_head.kernel"}
NORMS = {n for n in NAMES if n.endswith(".scale")}


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_only_what_is_named_is_trained(embeddings, norms):
  adapter = dataclasses.replace(
    QV, train_embeddings=embeddings, train_norms=norms
  )
  _, trained, frozen = nnx.split(
    _abstract(adapter), lora.trainable(adapter), ...
  )
  expected = set(ADAPTERS)
  expected |= EMBEDDINGS if embeddings else set()
  expected |= NORMS if norms else set()
  assert set(_flat(trained)) == expected
  assert set(_flat(frozen)) == (set(NAMES) | set(ADAPTERS)) - expected


def test_without_adapter_everything_is_trained():
  _, trained, frozen = nnx.split(_abstract(), lora.trainable(None), ...)
  assert set(_flat(trained)) == set(NAMES)
  assert not _flat(frozen)


@pytest.mark.parametrize("embeddings", [False, True])
def test_frozen_weights_are_held_in_param_dtype(embeddings):
  adapter = dataclasses.replace(QV, train_embeddings=embeddings)
  model = _abstract(adapter, param_dtype=jnp.bfloat16)
  wide = set(ADAPTERS) | NORMS | (EMBEDDINGS if embeddings else set())
  for name, leaf in _flat(nnx.state(model)).items():
    assert leaf.dtype == (jnp.float32 if name in wide else jnp.bfloat16), name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_gives_float32_logits_near_those_of_float32(dtype):
  exact = _model(CONFIG, LORA)
  graphdef, state = nnx.split(_model(CONFIG, LORA, dtype))

  def loss(state):
    logits = _run(state, _tokens(), graphdef, FIXED)
    return jnp.mean(logits**2), logits

  grads, logits = jax.grad(loss, has_aux=True)(state)
  assert logits.dtype == jnp.float32
  # Two layers of about ten roundings each.
  expected = _logits(exact, _tokens(), FIXED)
  error = np.sqrt(np.mean((np.asarray(logits) - expected) ** 2))
  assert 0 < error < 20 * jnp.finfo(dtype).eps * np.std(expected)
  for name, grad in _flat(grads).items():
    assert grad.dtype == jnp.float32, name
    assert np.isfinite(grad[...]).all(), name
    assert np.abs(grad[...]).max() > 0, name


def test_hidden_states_have_the_compute_dtype():
  graphdef, state = nnx.split(_model(CONFIG, None, jnp.bfloat16))

  def hidden_of(state):
    return nnx.merge(graphdef, state).hidden_states(
      _tokens(1, 3), DENSE, REFERENCE
    )

  hidden = jax.eval_shape(hidden_of, state)
  assert hidden.dtype == jnp.bfloat16 and hidden.shape == (1, 3, 16)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_a_part_are_a_part_of_the_logits(tied):
  model = _model(dataclasses.replace(CONFIG, tie_embeddings=tied))
  hidden = jax.random.normal(jax.random.key(0), (1, 3, 16))
  np.testing.assert_allclose(
    model.logits(hidden)[:, 1:], model.logits(hidden[:, 1:]), rtol=1e-6
  )


def test_every_layer_and_projection_drops_inputs_of_its_own(monkeypatch):
  found = []

  def spy(query, key, value, pattern, **settings):
    del pattern, settings
    jax.debug.callback(lambda *x: found.extend(map(np.ravel, x)), key, value)
    return query

  monkeypatch.setattr(llama, "attention", spy)
  adapter = lora.LoraConfig(rank=12, dropout=0.5)
  model = nnx.clone(_model(CONFIG, adapter))
  for name in ("k_proj", "v_proj"):
    linear = getattr(model.layers.self_attn, name)
    linear.kernel[...] *= 0
    linear.lora_a[...] = jnp.tile(jnp.eye(16, 12), (2, 1, 1))
    linear.lora_b[...] = jnp.tile(jnp.eye(12), (2, 1, 1))

  graphdef, state = nnx.split(model)

  @jax.jit
  def run(seed):
    rngs = None if seed is None else nnx.Rngs(dropout=jax.random.key(seed))
    return nnx.merge(graphdef, state).hidden_states(_tokens(1, 1), rngs=rngs)

  def dropped(seed):
    found.clear()
    run(seed)
    jax.effects_barrier()
    assert len(found) == 4
    return {tuple(x == 0) for x in found}

  assert dropped(None) == {(False,) * 12}
  assert len(dropped(0)) == 4
  assert dropped(0) == dropped(0) != dropped(1)


def test_patterns_are_static_arguments_of_jit():
  @functools.partial(nnx.jit, static_argnames="patterns")
  def run(model, tokens, patterns):
    return model(tokens, patterns, REFERENCE)

  model = _model()
  np.testing.assert_allclose(
    run(model, _tokens(), patterns=(FIXED, DENSE)),
    _logits(model, _tokens(), (FIXED, DENSE)),
    rtol=1e-5,
    atol=1e-6,
  )


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"patterns": (DENSE,) * 3}, "2 layers, got a tuple of 3"),
    ({"patterns": "dense"}, "2 layers, got 'dense'"),
    ({"patterns": ((DENSE, DENSE), DENSE)}, "layer 0 must be.*Mixture"),
    ({"tokens": jnp.zeros(4, jnp.int32)}, r"\[batch, seq\].*\[4\]"),
    ({"tokens": jnp.zeros((1, 4))}, "integers.*float32"),
    ({"positions": jnp.zeros((2, 4), jnp.int32)}, r"\[1, 4\].*\[2, 4\]"),
    ({"patterns": patterns.dense(8)}, "8 heads.*4"),
  ],
)
def test_calls_that_do_not_fit_are_refused(settings, message):
  arguments = {"tokens": jnp.zeros((1, 4), jnp.int32), "patterns": DENSE}
  arguments |= {"execution": REFERENCE} | settings
  with pytest.raises(ValueError, match=message) as error:
    _model().hidden_states(**arguments)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_multiplies_in_its_dtype_and_sums_in_float32(tied):
  config = dataclasses.replace(CONFIG, tie_embeddings=tied)
  graphdef, state = nnx.split(_model(config, dtype=jnp.float16))
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(2, 400, 16)).astype(np.float16)
  d_logits = rng.normal(size=(2, 400, 23)).astype(np.float32)

  def logits(state, hidden):
    return nnx.merge(graphdef, state).logits(hidden)

  got, vjp = jax.vjp(logits, state, jnp.asarray(hidden))
  d_state, d_hidden = vjp(jnp.asarray(d_logits))
  name = "embed_tokens" if tied else "lm_head"
  part = "embedding" if tied else "kernel"
  kernel = np.asarray(state[name][part][...])
  # The products' inputs are rounded, their sums are not.
  rounded = kernel.astype(np.float16).astype(np.float64)
  rounded = rounded.T if tied else rounded
  d_rounded = d_logits.astype(np.float16).astype(np.float64)
  d_kernel = np.einsum("bsh,bsv->hv", hidden.astype(np.float64), d_rounded)
  found = np.asarray(d_state[name][part][...])
  assert (got.dtype, d_hidden.dtype) == (jnp.float32, jnp.float16)
  assert found.dtype == kernel.dtype == np.float32
  np.testing.assert_allclose(got, hidden @ rounded, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(
    found.T if tied else found, d_kernel, rtol=1e-5, atol=1e-4
  )
  np.testing.assert_allclose(
    d_hidden, d_rounded @ rounded.T, rtol=1e-3, atol=1e-3
  )


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("token", [-1, CONFIG.vocab_size])
def test_ids_that_the_embedding_lacks_are_named(array, token):
  model = Llama(CONFIG, rngs=nnx.Rngs(0))
  tokens = np.ones((2, 4), np.int32)
  tokens[1, 2] = token
  said = f"sequence 1 has the id {token} at position 2, outside the vocabulary"
  with pytest.raises(ValueError, match=said):
    model(array(tokens))
