"""Files of Hugging Face and PEFT, written and read by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from scca_jax import convert, patterns
from scca_jax.llama_config import LlamaConfig
from scca_jax.lora import LoraConfig, trainable
from scca_jax.rope import RopeScaling

SIZES = {
  "model_type": "llama",
  "vocab_size": 23,
  "hidden_size": 8,
  "intermediate_size": 12,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 16,
  "rms_norm_eps": 1e-5,
  "rope_theta": 5000.0,
}
TOKENS = jnp.arange(10, dtype=jnp.int32)[None, :] % 23


def _tensors(tied, dtype=np.float32):
  """Tensors as Hugging Face lays them out, `[out, in]`."""
  shapes = {"model.embed_tokens.weight": (23, 8), "model.norm.weight": (8,)}
  if not tied:
    shapes["lm_head.weight"] = (23, 8)
  for i in range(3):
    shapes |= {
      f"model.layers.{i}.{name}.weight": shape
      for name, shape in {
        "input_layernorm": (8,),
        "post_attention_layernorm": (8,),
        "self_attn.q_proj": (8, 8),
        "self_attn.k_proj": (4, 8),
        "self_attn.v_proj": (4, 8),
        "self_attn.o_proj": (8, 8),
        "mlp.gate_proj": (12, 8),
        "mlp.up_proj": (12, 8),
        "mlp.down_proj": (8, 12),
      }.items()
    }
  rng = np.random.default_rng(0)
  return {
    name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()
  }


def _write(folder, tensors, **config):
  folder.mkdir(parents=True, exist_ok=True)
  save_file(tensors, folder / "model.safetensors", {"format": "pt"})
  (folder / "config.json").write_text(json.dumps(SIZES | config))
  return folder


@pytest.fixture
def folder(tmp_path):
  return _write(tmp_path / "base", _tensors(False))


def _logits(model):
  return np.asarray(
    model(TOKENS, patterns=patterns.dense(4), implementation="reference")
  )


def test_weights_are_transposed_and_stacked(folder):
  tensors = _tensors(False)
  model = convert.load_model(folder)
  for i in range(3):
    for part, name in (("self_attn", "k_proj"), ("mlp", "down_proj")):
      kernel = getattr(getattr(model.layers, part), name).kernel[...]
      np.testing.assert_array_equal(
        kernel[i], tensors[f"model.layers.{i}.{part}.{name}.weight"].T
      )
    np.testing.assert_array_equal(
      model.layers.post_attention_layernorm.scale[...][i],
      tensors[f"model.layers.{i}.post_attention_layernorm.weight"],
    )
  np.testing.assert_array_equal(
    model.embed_tokens.embedding[...], tensors["model.embed_tokens.weight"]
  )
  np.testing.assert_array_equal(
    model.lm_head.kernel[...], tensors["lm_head.weight"].T
  )
  np.testing.assert_array_equal(
    model.norm.scale[...], tensors["model.norm.weight"]
  )


def test_sizes_come_from_config_json(folder):
  assert convert.load_config(folder) == LlamaConfig(
    vocab_size=23,
    hidden_size=8,
    intermediate_size=12,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    context_len=16,
    rope_theta=5000.0,
  )


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_both_spellings_of_rope_are_read(tmp_path, spelling):
  yarn = {"factor": 4.0, "beta_fast": 16.0}
  if spelling == "rope_parameters":
    config = {spelling: yarn | {"rope_type": "yarn", "rope_theta": 7.0}}
  else:
    config = {spelling: yarn | {"type": "yarn"}, "rope_theta": 7.0}
  read = convert.load_config(_write(tmp_path, _tensors(True), **config))
  assert read.rope_theta == 7
  assert read.rope_scaling == RopeScaling(
    kind="yarn",
    factor=4.0,
    beta_fast=16.0,
    original_max_position_embeddings=16,
  )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
  "dtype",
  [np.float32, np.float16, ml_dtypes.bfloat16],
  ids=lambda d: d.__name__,
)
def test_a_round_trip_keeps_every_bit(tmp_path, tied, dtype):
  tensors = _tensors(tied, dtype)
  source = _write(tmp_path / "in", tensors, tie_word_embeddings=tied)
  model = convert.load_model(source, param_dtype=dtype)
  convert.save_model(model, tmp_path / "out", dtype=dtype)
  written = load_file(tmp_path / "out" / "model.safetensors")
  assert written.keys() == tensors.keys()
  for name, value in tensors.items():
    assert written[name].dtype == value.dtype
    np.testing.assert_array_equal(
      written[name].view(np.uint8), value.view(np.uint8), err_msg=name
    )
  assert convert.load_config(tmp_path / "out") == model.config


def test_shards_are_read_through_their_index(folder, tmp_path):
  tensors = _tensors(False)
  names = sorted(tensors)
  parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
  shards = tmp_path / "shards"
  shards.mkdir()
  for file, part in parts.items():
    save_file({name: tensors[name] for name in part}, shards / file)
  index = {name: file for file, part in parts.items() for name in part}
  (shards / "model.safetensors.index.json").write_text(
    json.dumps({"weight_map": index})
  )
  (shards / "config.json").write_text(json.dumps(SIZES))
  np.testing.assert_array_equal(
    _logits(convert.load_model(shards)), _logits(convert.load_model(folder))
  )
  (shards / "b.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match="b.safetensors"):
    convert.load_model(shards)


def test_tied_models_may_keep_the_head(tmp_path):
  tensors = _tensors(False)
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(1)
  source = _write(tmp_path, tensors, tie_word_embeddings=True)
  assert convert.load_model(source).lm_head is None


LONGER = {
  "context_len": 64,
  "rope_scaling": RopeScaling(kind="linear", factor=4.0),
}


def _adapted(folder, lora):
  """A model with what is trained moved from where it starts."""
  config = dataclasses.replace(convert.load_config(folder), **LONGER)
  model = convert.load_model(folder, config=config, lora=lora)
  graphdef, trained, frozen = nnx.split(model, trainable(lora), ...)
  leaves, structure = jax.tree.flatten(trained)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  moved = [
    leaf + 0.1 * jax.random.normal(key, leaf.shape)
    for key, leaf in zip(keys, leaves, strict=True)
  ]
  return nnx.merge(graphdef, jax.tree.unflatten(structure, moved), frozen)


@pytest.mark.parametrize(
  "lora",
  [
    LoraConfig(rank=2),
    LoraConfig(
      rank=3,
      targets=("v_proj", "down_proj"),
      rslora=True,
      train_embeddings=False,
      train_norms=False,
    ),
  ],
)
def test_an_adapter_comes_back_with_all_it_needs(folder, tmp_path, lora):
  model = _adapted(folder, lora)
  schedule = patterns.make_schedule(
    "scca_flow", num_heads=4, num_layers=3, seq_len=64, rotate="layer"
  )
  adapter = tmp_path / "adapter"
  convert.save_adapter(model, adapter, base_model="base", patterns=schedule)
  back = convert.load_adapter(folder, adapter)
  assert back.config == model.config
  assert back.lora == lora
  np.testing.assert_array_equal(_logits(back), _logits(model))
  assert np.abs(_logits(back) - _logits(convert.load_model(folder))).max() > 0.1
  assert convert.load_patterns(adapter) == schedule


def test_adapter_tensors_have_the_names_and_shapes_of_peft(folder, tmp_path):
  lora = LoraConfig(rank=2)
  model = _adapted(folder, lora)
  convert.save_adapter(model, tmp_path, base_model="base")
  tensors = load_file(tmp_path / "adapter_model.safetensors")
  prefix = "base_model.model.model.layers.1.self_attn.k_proj"
  lora_a = tensors[f"{prefix}.lora_A.weight"]
  lora_b = tensors[f"{prefix}.lora_B.weight"]
  assert (lora_a.shape, lora_b.shape) == ((2, 8), (4, 2))
  k_proj = model.layers.self_attn.k_proj
  np.testing.assert_array_equal(lora_a, k_proj.lora_a[...][1].T)
  np.testing.assert_array_equal(lora_b, k_proj.lora_b[...][1].T)
  for name in (
    "base_model.model.model.embed_tokens.weight",
    "base_model.model.lm_head.weight",
    "base_model.model.model.norm.weight",
    "base_model.model.model.layers.2.input_layernorm.weight",
  ):
    assert name in tensors
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  assert config["r"] == 2
  assert config["lora_alpha"] == 16
  assert config["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
  assert set(config["modules_to_save"]) == {
    "embed_tokens",
    "lm_head",
    "norm",
    "input_layernorm",
    "post_attention_layernorm",
  }
  assert convert.load_patterns(tmp_path) is None


def test_an_adapter_of_peft_alone_is_read(folder, tmp_path):
  """Only LoRA matrices, as PEFT saves them without `modules_to_save`."""
  rng = np.random.default_rng(1)
  tensors = {}
  for i in range(3):
    prefix = f"base_model.model.model.layers.{i}.mlp.up_proj"
    tensors[f"{prefix}.lora_A.weight"] = rng.normal(size=(2, 8))
    tensors[f"{prefix}.lora_B.weight"] = rng.normal(size=(12, 2))
  tensors = {name: x.astype(np.float32) for name, x in tensors.items()}
  save_file(tensors, tmp_path / "adapter_model.safetensors")
  (tmp_path / "adapter_config.json").write_text(
    json.dumps(
      {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["up_proj"],
      }
    )
  )
  model = convert.load_adapter(folder, tmp_path)
  fused = _tensors(False)
  for i in range(3):
    prefix = f"base_model.model.model.layers.{i}.mlp.up_proj"
    fused[f"model.layers.{i}.mlp.up_proj.weight"] += (
      3
      * tensors[f"{prefix}.lora_B.weight"]
      @ tensors[f"{prefix}.lora_A.weight"]
    )
  plain = convert.load_model(_write(tmp_path / "fused", fused))
  np.testing.assert_allclose(
    _logits(model), _logits(plain), rtol=2e-5, atol=1e-4
  )


def test_a_fused_model_computes_what_the_adapted_did(folder, tmp_path):
  model = _adapted(folder, LoraConfig(rank=2))
  convert.save_model(model, tmp_path / "fused", dtype=jnp.float32)
  fused = convert.load_model(tmp_path / "fused")
  assert fused.config == model.config
  np.testing.assert_allclose(
    _logits(fused), _logits(model), rtol=2e-5, atol=1e-4
  )


def test_ntk_is_written_as_another_base(tmp_path):
  source = _write(tmp_path / "in", _tensors(True), tie_word_embeddings=True)
  config = dataclasses.replace(
    convert.load_config(source), rope_scaling=RopeScaling(kind="linear")
  )
  model = convert.load_model(source, config=config)
  # Heads of 4 channels: the base grows by factor^(4 / 2).
  model.config = dataclasses.replace(
    config, rope_scaling=RopeScaling(kind="ntk", factor=3.0), head_dim=4
  )
  convert.save_model(model, tmp_path / "out", dtype=jnp.float32)
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  assert written["rope_theta"] == 5000.0 * 9
  assert written["rope_scaling"] is None
  assert written["rope_parameters"]["rope_type"] == "default"


def test_arrays_of_numpy_are_written_like_others(folder, tmp_path):
  model = _adapted(folder, LoraConfig(rank=2))
  graphdef, state = nnx.split(model)
  on_host = nnx.merge(graphdef, jax.tree.map(np.asarray, state))
  for name, each in (("jax", model), ("numpy", on_host)):
    convert.save_adapter(each, tmp_path / name, base_model=str(folder))
    convert.save_model(each, tmp_path / name, dtype=jnp.float32)
  for file in ("adapter_model.safetensors", "model.safetensors"):
    expected, got = (load_file(tmp_path / n / file) for n in ("jax", "numpy"))
    assert expected.keys() == got.keys()
    for name, value in expected.items():
      np.testing.assert_array_equal(got[name], value, err_msg=name)


def _drop(folder, name):
  tensors = _tensors(False)
  del tensors[name]
  _write(folder, tensors)


def _add(folder, name, shape):
  _write(folder, _tensors(False) | {name: np.zeros(shape, np.float32)})


def _cut(folder):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-7])


def _put_nan(folder):
  tensors = _tensors(False)
  tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = np.nan
  _write(folder, tensors)


def _only_pickled(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _set(folder, **config):
  (folder / "config.json").write_text(json.dumps(SIZES | config))


def _unset(folder, name):
  config = {key: value for key, value in SIZES.items() if key != name}
  (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
  ("damage", "said"),
  [
    (
      lambda f: _drop(f, "model.layers.1.mlp.up_proj.weight"),
      "lacks.*1.mlp.up",
    ),
    (lambda f: _add(f, "model.extra.weight", (2,)), "model.extra.weight"),
    (
      lambda f: _add(f, "model.layers.2.mlp.up_proj.weight", (12, 9)),
      r"2.mlp.up_proj.weight is \[12, 9\].*\[12, 8\]",
    ),
    (_cut, "cut short"),
    (_put_nan, "0.mlp.up_proj.weight holds a NaN"),
    (_only_pickled, "pytorch_model.bin.*safe_serialization"),
    (lambda f: _set(f, model_type="gpt2"), "gpt2"),
    (lambda f: _set(f, hidden_act="gelu"), "gelu"),
    (lambda f: _set(f, attention_bias=True), "attention_bias"),
    (lambda f: _set(f, num_key_value_heads=3), "num_kv_heads=3"),
    (
      lambda f: _set(f, hidden_size="big"),
      "config.json: hidden_size must be an integer.*'big'",
    ),
    (lambda f: _set(f, rms_norm_eps="low"), "rms_norm_eps.*number.*'low'"),
    (lambda f: _set(f, rope_theta=None), "rope_theta.*number.*None"),
    (lambda f: _set(f, rope_scaling={"type": "cubic"}), "cubic"),
    (
      lambda f: _set(f, rope_scaling={"type": "linear", "factors": 2}),
      "factors",
    ),
    (lambda f: _unset(f, "hidden_size"), "lacks 'hidden_size'"),
    (lambda f: (f / "config.json").write_text("{"), "no JSON"),
  ],
)
def test_damaged_models_are_named(folder, damage, said):
  damage(folder)
  with pytest.raises(ValueError, match=said) as error:
    convert.load_model(folder)
  assert "\n" not in str(error.value)


def test_missing_files_are_named(tmp_path, folder):
  with pytest.raises(FileNotFoundError, match="config.json"):
    convert.load_model(tmp_path / "none")
  with pytest.raises(FileNotFoundError, match="adapter_config.json"):
    convert.load_adapter(folder, tmp_path / "none")


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"peft_type": "IA3"}, "IA3"),
    ({"use_dora": True}, "use_dora"),
    ({"bias": "all"}, "bias"),
    ({"target_modules": "neither_.*"}, "neither_.*"),
    ({"target_modules": ["c_attn"]}, "c_attn"),
    ({"r": 3}, r"lora_A.weight is \[2, 8\]"),
    ({"modules_to_save": None}, "lm_head.weight"),
  ],
)
def test_adapters_that_do_not_fit_are_named(folder, tmp_path, change, said):
  model = _adapted(folder, LoraConfig(rank=2))
  convert.save_adapter(model, tmp_path / "a", base_model="base")
  path = tmp_path / "a" / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(ValueError, match=said):
    convert.load_adapter(folder, tmp_path / "a")


@pytest.fixture
def sharded(tmp_path, folder):
  model = convert.load_model(folder)
  # 23 x 8 float32 are 736 bytes: no other tensor fits beside an embedding.
  convert.save_model(
    model, tmp_path / "shards", dtype=jnp.float32, max_shard_bytes=800
  )
  return tmp_path / "shards"


def test_shards_hold_what_one_file_holds(sharded):
  tensors = _tensors(False)
  index = json.loads((sharded / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == sum(
    t.nbytes for t in tensors.values()
  )
  files = sorted(sharded.glob("model-*.safetensors"))
  assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
  found = {}
  for file in files:
    in_file = load_file(file)
    assert sum(t.nbytes for t in in_file.values()) <= 800
    assert {index["weight_map"][name] for name in in_file} == {file.name}
    found |= in_file
  assert found.keys() == tensors.keys() == index["weight_map"].keys()
  for name, value in tensors.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_shards_are_read(sharded, folder):
  np.testing.assert_array_equal(
    _logits(convert.load_model(sharded)), _logits(convert.load_model(folder))
  )


def _index(folder):
  return json.loads((folder / "model.safetensors.index.json").read_text())


def _change_index(folder, change):
  index = _index(folder)
  change(index["weight_map"])
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
  ("damage", "kind", "said"),
  [
    (
      lambda f: _change_index(
        f, lambda m: m.update({NORM: m["lm_head.weight"]})
      ),
      ValueError,
      "index.json says.*model.norm.weight",
    ),
    (
      lambda f: _change_index(f, lambda m: m.pop(NORM)),
      ValueError,
      "model.norm.weight, which model.safetensors.index.json does not list",
    ),
    (
      lambda f: _change_index(f, lambda m: m.update({NORM: "gone"})),
      FileNotFoundError,
      "gone",
    ),
    (lambda f: _change_index(f, lambda m: m.clear()), ValueError, "weight_map"),
    (
      lambda f: (f / _index(f)["weight_map"][NORM]).unlink(),
      FileNotFoundError,
      "model-000.*lacks a file",
    ),
    (
      lambda f: (f / _index(f)["weight_map"][NORM]).write_bytes(b"1234"),
      ValueError,
      "cut short",
    ),
    (
      lambda f: save_file(
        {NORM: np.zeros(9, np.float32)}, f / _index(f)["weight_map"][NORM]
      ),
      ValueError,
      "index.json says|norm.weight is",
    ),
  ],
)
def test_damaged_shards_are_named(sharded, damage, kind, said):
  damage(sharded)
  with pytest.raises(kind, match=said) as error:
    convert.load_model(sharded)
  assert "\n" not in str(error.value)


def test_weights_beyond_float16_are_named(tmp_path):
  tensors = _tensors(True)
  tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
  source = _write(tmp_path / "in", tensors, tie_word_embeddings=True)
  with pytest.raises(ValueError, match="1.mlp.up_proj.weight exceeds float16"):
    convert.load_model(source, param_dtype=jnp.float16)
  model = convert.load_model(source)
  with pytest.raises(ValueError, match="mlp.up_proj.kernel.*beyond float16"):
    convert.save_model(model, tmp_path / "out", dtype=jnp.float16)
  assert not (tmp_path / "out" / "config.json").exists()


def test_several_ends_are_kept(tmp_path):
  source = _write(tmp_path / "in", _tensors(False), eos_token_id=[2, 5])
  model = convert.load_model(source)
  assert model.config.eos_token_ids == (2, 5)
  convert.save_model(model, tmp_path / "out", dtype=jnp.float32)
  assert convert.load_config(tmp_path / "out") == model.config


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_an_adapter_round_trip_keeps_every_bit(folder, tmp_path, dtype):
  model = _adapted(folder, LoraConfig(rank=2))
  convert.save_adapter(model, tmp_path / "a", base_model="base", dtype=dtype)
  read = convert.load_adapter(folder, tmp_path / "a")
  convert.save_adapter(read, tmp_path / "b", base_model="base", dtype=dtype)
  assert convert.stored_dtype(tmp_path / "b") == dtype
  for name in ("adapter_model.safetensors", "adapter_config.json"):
    assert (tmp_path / "a" / name).read_bytes() == (
      tmp_path / "b" / name
    ).read_bytes()


@pytest.mark.parametrize(
  ("targets", "wanted"),
  [
    (r".*\.self_attn\.(q|v)_proj", ("q_proj", "v_proj")),
    (r"model\.layers\.\d+\.mlp\..*", ("gate_proj", "up_proj", "down_proj")),
  ],
)
def test_targets_may_be_a_regular_expression(folder, tmp_path, targets, wanted):
  model = _adapted(folder, LoraConfig(rank=2, targets=wanted))
  convert.save_adapter(model, tmp_path / "a", base_model="base")
  path = tmp_path / "a" / "adapter_config.json"
  content = json.loads(path.read_text()) | {"target_modules": targets}
  path.write_text(json.dumps(content))
  read = convert.load_adapter(folder, tmp_path / "a")
  assert read.lora.targets == wanted
  np.testing.assert_array_equal(_logits(read), _logits(model))
