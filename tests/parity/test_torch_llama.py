"""The model and each of its parts against transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

_WHY = "parity needs the extra parity"
torch = pytest.importorskip("torch", reason=_WHY)
modeling = pytest.importorskip(
  "transformers.models.llama.modeling_llama", reason=_WHY
)

from scca_jax import convert, llama, losses, patterns, rope  # noqa: E402
from scca_jax.lora import TARGETS  # noqa: E402

# Logits are a few units large, gradients about a tenth.
LOGITS_ATOL = 1e-5
GRADIENT_TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
PART_TOLERANCE = {"rtol": 1e-5, "atol": 5e-6}
# The tests spend their time compiling, not running.
QUICKLY = {"xla_backend_optimization_level": 0}
DENSE = patterns.dense(4)
REFERENCE = llama.Execution(implementation="reference")
NO_DROPOUT = dict.fromkeys(TARGETS)
ORIGINAL_LEN = 32
# Values of transformers' `rope_parameters`.
ROPES = {
  "default": {},
  "linear": {"factor": 4.0},
  "dynamic": {"factor": 4.0},
  "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL_LEN},
  "llama3": {
    "factor": 8.0,
    "original_max_position_embeddings": ORIGINAL_LEN,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
  },
}


def _rope(kind, **settings):
  """Settings of a model whose pretrained length is that of every kind."""
  grown = "original_max_position_embeddings" in ROPES[kind]
  return {
    "max_position_embeddings": ORIGINAL_LEN * (4 if grown else 1),
    "rope_parameters": {
      "rope_type": kind,
      "rope_theta": 10000.0,
      **ROPES[kind],
      **settings,
    },
  }


def _tokens(length):
  rng = np.random.default_rng(length)
  return rng.integers(0, 97, (2, length))


@functools.partial(
  jax.jit, static_argnames="graphdef", compiler_options=QUICKLY
)
def _loss_and_gradients(graphdef, state, tokens):
  def loss_of(state):
    model = nnx.merge(graphdef, state)
    logits = model(tokens, patterns=DENSE)
    loss = losses.cross_entropy(logits[:, :-1], tokens[:, 1:])
    return jnp.mean(loss), logits

  return jax.value_and_grad(loss_of, has_aux=True)(state)


@pytest.mark.parametrize(
  ("kv_heads", "tied", "kind", "length"),
  [
    pytest.param(4, False, "default", 31, id="MHA"),
    pytest.param(2, True, "default", 31, id="GQA, tied"),
    pytest.param(1, True, "linear", 63, id="MQA, tied, linear"),
    pytest.param(2, False, "dynamic", 29, id="dynamic, within the length"),
    pytest.param(2, False, "dynamic", 63, id="dynamic, beyond the length"),
    pytest.param(4, True, "yarn", 63, id="MHA, tied, yarn"),
    pytest.param(1, False, "llama3", 63, id="MQA, llama3"),
  ],
)
def test_logits_and_every_gradient_equal_those_of_transformers(
  tmp_path, random_llama, by_torch_name, kv_heads, tied, kind, length
):
  theirs = random_llama(
    num_key_value_heads=kv_heads,
    tie_word_embeddings=tied,
    **_rope(kind),
  )
  theirs.save_pretrained(tmp_path)
  tokens = _tokens(length)
  # In float64, so that no error but ours counts.
  expected = theirs.double()(torch.tensor(tokens)).logits
  torch.nn.functional.cross_entropy(
    expected[:, :-1].flatten(0, 1), torch.tensor(tokens)[:, 1:].flatten()
  ).backward()

  graphdef, state = nnx.split(convert.load_model(tmp_path))
  (_, logits), gradients = _loss_and_gradients(graphdef, state, tokens)
  np.testing.assert_allclose(
    logits, expected.detach().numpy(), rtol=0, atol=LOGITS_ATOL
  )
  named = dict(theirs.named_parameters())
  found = by_torch_name(gradients)
  assert found.keys() == named.keys()
  for name, parameter in named.items():
    np.testing.assert_allclose(
      found[name], parameter.grad.numpy(), **GRADIENT_TOLERANCE, err_msg=name
    )


# The parts, one by one.


@pytest.fixture
def pair(tmp_path, random_llama):
  """A model with GQA, theirs and ours."""
  theirs = random_llama(**_rope("linear"))
  theirs.save_pretrained(tmp_path)
  return theirs, convert.load_model(tmp_path)


def _hidden(length=37):
  rng = np.random.default_rng(1)
  return rng.normal(size=(2, length, 32)).astype(np.float32)


def _layer(model, index):
  """One layer of ours: their parameters are stacked."""
  graphdef, state = nnx.split(model.layers)
  return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], state))


def _call(model, length):
  """The arguments that layers share, for `length` tokens."""
  config = model.config
  rotation = rope.frequencies(
    config.head_dim, config.rope_theta, config.rope_scaling, length
  )
  positions = jnp.arange(length)[None]
  return llama._Call((positions, *rotation), REFERENCE)


def _around(theirs, hidden):
  """The arguments of one of their layers, besides its input."""
  length = hidden.shape[1]
  mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
  positions = torch.arange(length)[None]
  return {
    "attention_mask": mask,
    "position_embeddings": theirs.model.rotary_emb(hidden, positions),
  }


def _assert_equal(ours, theirs):
  np.testing.assert_allclose(ours, theirs.detach().numpy(), **PART_TOLERANCE)


def test_embeddings_equal(pair):
  theirs, ours = pair
  tokens = _tokens(37)
  expected = theirs.model.embed_tokens(torch.tensor(tokens))
  np.testing.assert_array_equal(
    ours.embed_tokens(jnp.asarray(tokens)), expected.detach().numpy()
  )


def test_norms_equal(pair):
  theirs, ours = pair
  # Small and large rows: the epsilon counts in one, and not in the other.
  x = _hidden() * np.logspace(-4, 2, 37, dtype=np.float32)[:, None]
  for i, layer in enumerate(theirs.model.layers):
    for name in ("input_layernorm", "post_attention_layernorm"):
      expected = getattr(layer, name)(torch.tensor(x))
      _assert_equal(getattr(_layer(ours, i), name)(x), expected)
  _assert_equal(ours.norm(x), theirs.model.norm(torch.tensor(x)))


def test_mlps_equal(pair):
  theirs, ours = pair
  x = _hidden()
  for i, layer in enumerate(theirs.model.layers):
    _assert_equal(
      _layer(ours, i).mlp(jnp.asarray(x), NO_DROPOUT),
      layer.mlp(torch.tensor(x)),
    )


def test_self_attention_equals(pair):
  theirs, ours = pair
  x = torch.tensor(_hidden())
  for i, layer in enumerate(theirs.model.layers):
    expected, _ = layer.self_attn(x, **_around(theirs, x))
    output, _ = _layer(ours, i).self_attn(
      jnp.asarray(x), DENSE, _call(ours, x.shape[1]), NO_DROPOUT, None
    )
    _assert_equal(output, expected)


def test_whole_layers_equal(pair):
  theirs, ours = pair
  x = torch.tensor(_hidden())
  for i, layer in enumerate(theirs.model.layers):
    output, _ = _layer(ours, i)(
      jnp.asarray(x), DENSE, _call(ours, x.shape[1]), None
    )
    _assert_equal(output, layer(x, **_around(theirs, x)))


@pytest.mark.parametrize(
  ("kind", "settings"),
  [
    ("default", {}),
    ("linear", {}),
    ("dynamic", {}),
    ("yarn", {}),
    ("yarn", {"truncate": False, "beta_fast": 8.0, "beta_slow": 2.0}),
    ("yarn", {"attention_factor": 0.7}),
    ("yarn", {"mscale": 0.7, "mscale_all_dim": 1.3}),
    ("llama3", {}),
    ("llama3", {"low_freq_factor": 2.0, "high_freq_factor": 3.0}),
  ],
)
@pytest.mark.parametrize("length", [31, 131])
def test_rope_tables_equal(tmp_path, random_llama, kind, settings, length):
  theirs = random_llama(**_rope(kind, **settings))
  theirs.config.save_pretrained(tmp_path)
  config = convert.load_config(tmp_path)
  inv_freq, scaling = rope.frequencies(
    config.head_dim, config.rope_theta, config.rope_scaling, length
  )
  rng = np.random.default_rng(0)
  query, key = rng.normal(size=(2, 2, 4, length, 16)).astype(np.float32)
  positions = np.arange(length)[None]
  query, key = torch.tensor(query), torch.tensor(key)
  table = theirs.model.rotary_emb(query, torch.tensor(positions))
  expected = modeling.apply_rotary_pos_emb(query, key, *table)
  for x, rotated in zip((query, key), expected, strict=True):
    ours = rope.apply(
      jnp.asarray(x.transpose(1, 2)), jnp.asarray(positions), inv_freq, scaling
    )
    _assert_equal(ours, rotated.transpose(1, 2))
