"""Adapters in the files of PEFT, written and read by hand."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import model_files
import numpy as np
import pattern_strings
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from scca_jax import adapters, convert, patterns
from scca_jax.lora import LoraConfig, trainable
from scca_jax.rope import RopeScaling

LONGER = {
  "context_len": 64,
  "rope_scaling": RopeScaling(kind="linear", factor=4.0),
}


@pytest.fixture
def folder(tmp_path):
  return model_files.write(tmp_path / "base", model_files.tensors(False))


def _adapted(folder, lora):
  """A model whose trained parameters differ from their initial values."""
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A base and an adapter of it, made once: `base/` and `adapter/`."""
  work = tmp_path_factory.mktemp("saved")
  base = model_files.write(work / "base", model_files.tensors(False))
  adapters.save_adapter(
    _adapted(base, LoraConfig(rank=2)),
    work / "adapter",
    base_model="base",
    patterns=[patterns.local(4, 8)] * 3,
  )
  return work


@pytest.fixture
def damage(saved, tmp_path):
  """Copies the adapter with changes to one of its JSON files."""

  def copy(name, change):
    folder = shutil.copytree(saved / "adapter", tmp_path / "damaged")
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | change))
    return folder

  return copy


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
  schedule = pattern_strings.make_layers(
    "scca_flow", num_heads=4, num_layers=3, seq_len=64, rotate="layer"
  )
  adapter = tmp_path / "adapter"
  adapters.save_adapter(model, adapter, base_model="base", patterns=schedule)
  back = adapters.load_adapter(folder, adapter)
  assert back.config == model.config
  assert back.lora == lora
  np.testing.assert_array_equal(
    model_files.logits(back), model_files.logits(model)
  )
  assert (
    np.abs(
      model_files.logits(back) - model_files.logits(convert.load_model(folder))
    ).max()
    > 0.1
  )
  assert adapters.load_patterns(adapter) == schedule


def test_adapter_tensors_have_the_names_and_shapes_of_peft(folder, tmp_path):
  lora = LoraConfig(rank=2)
  model = _adapted(folder, lora)
  adapters.save_adapter(model, tmp_path, base_model="base")
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
  assert adapters.load_patterns(tmp_path) is None


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
  model = adapters.load_adapter(folder, tmp_path)
  fused = model_files.tensors(False)
  for i in range(3):
    prefix = f"base_model.model.model.layers.{i}.mlp.up_proj"
    fused[f"model.layers.{i}.mlp.up_proj.weight"] += (
      3
      * tensors[f"{prefix}.lora_B.weight"]
      @ tensors[f"{prefix}.lora_A.weight"]
    )
  plain = convert.load_model(model_files.write(tmp_path / "fused", fused))
  np.testing.assert_allclose(
    model_files.logits(model), model_files.logits(plain), rtol=2e-5, atol=1e-4
  )


def test_a_fused_model_computes_what_the_adapted_did(folder, tmp_path):
  model = _adapted(folder, LoraConfig(rank=2))
  convert.save_model(model, tmp_path / "fused", dtype=jnp.float32)
  fused = convert.load_model(tmp_path / "fused")
  assert fused.config == model.config
  np.testing.assert_allclose(
    model_files.logits(fused), model_files.logits(model), rtol=2e-5, atol=1e-4
  )


def test_arrays_of_numpy_are_written_like_others(folder, tmp_path):
  model = _adapted(folder, LoraConfig(rank=2))
  graphdef, state = nnx.split(model)
  on_host = nnx.merge(graphdef, jax.tree.map(np.asarray, state))
  for name, each in (("jax", model), ("numpy", on_host)):
    adapters.save_adapter(each, tmp_path / name, base_model=str(folder))
    convert.save_model(each, tmp_path / name, dtype=jnp.float32)
  for file in ("adapter_model.safetensors", "model.safetensors"):
    expected, got = (load_file(tmp_path / n / file) for n in ("jax", "numpy"))
    assert expected.keys() == got.keys()
    for name, value in expected.items():
      np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"peft_type": "IA3"}, "IA3"),
    ({"use_dora": True}, "use_dora"),
    ({"bias": "all"}, "bias"),
    ({"target_modules": "neither_.*"}, "neither_.*"),
    ({"target_modules": ["c_attn"]}, "c_attn"),
    ({"layers_to_transform": 0}, "layers_to_transform=0 is not supported"),
    ({"layers_to_transform": [1]}, r"layers_to_transform=\[1\]"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
    ({"kasa_config": {"beta": 1e-4}}, "kasa_config"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    ({"of_next_year": True}, "of_next_year=True is not supported"),
    *(
      ({"init_lora_weights": init}, f"init_lora_weights='{init}' may have")
      for init in (
        "pissa",
        "pissa_niter_4",
        "olora",
        "corda",
        "loftq",
        "lora_ga",
      )
    ),
    ({"r": 2.0}, "adapter_config.json: r must be an integer.*2.0"),
    ({"r": None}, "adapter_config.json lacks 'r'"),
    ({"lora_alpha": "16"}, "lora_alpha must be a number, got '16'"),
    ({"lora_dropout": [0]}, "lora_dropout must be a number"),
    ({"use_rslora": "no"}, "use_rslora must be true or false, got 'no'"),
    ({"target_modules": {"q_proj": 1}}, "target_modules must be a list"),
    ({"modules_to_save": "norm"}, "modules_to_save must be a list.*'norm'"),
    ({"r": 3}, r"lora_A.weight is \[2, 8\]"),
    ({"r": 2 * 10**9}, r"lora_A.weight is \[2, 8\].* asks for \[2000000000, 8"),
    # Python's own module would take years.
    ({"target_modules": "(([a-z_.0-9]+)+)+!"}, "matches none of"),
    ({"target_modules": "(q_proj"}, r"not a regular .* \(.*missing \)"),
    ({"target_modules": "(?!v)._proj"}, r"RE2 can match \(.*\(\?!"),
    ({"modules_to_save": None}, "lm_head.weight"),
  ],
)
def test_adapters_that_do_not_fit_are_named(saved, damage, change, said):
  damaged = damage("adapter_config.json", change)
  with pytest.raises(ValueError, match=said):
    adapters.load_adapter(saved / "base", damaged)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_an_adapter_round_trip_keeps_every_bit(folder, tmp_path, dtype):
  model = _adapted(folder, LoraConfig(rank=2))
  adapters.save_adapter(model, tmp_path / "a", base_model="base", dtype=dtype)
  read = adapters.load_adapter(folder, tmp_path / "a")
  adapters.save_adapter(read, tmp_path / "b", base_model="base", dtype=dtype)
  assert adapters.stored_dtype(tmp_path / "b") == dtype
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
  adapters.save_adapter(model, tmp_path / "a", base_model="base")
  path = tmp_path / "a" / "adapter_config.json"
  content = json.loads(path.read_text()) | {"target_modules": targets}
  path.write_text(json.dumps(content))
  read = adapters.load_adapter(folder, tmp_path / "a")
  assert read.lora.targets == wanted
  np.testing.assert_array_equal(
    model_files.logits(read), model_files.logits(model)
  )


def test_a_missing_adapter_is_named(folder, tmp_path):
  with pytest.raises(FileNotFoundError, match="adapter_config.json"):
    adapters.load_adapter(folder, tmp_path / "none")


# Written by hand: how adapters recorded patterns before there were strings.
# Layers 0 and 2 are dense, layer 1 has a shifted pair of heads.
HEAD_LISTS = """{
  "context_len": 64,
  "quantize": null,
  "rope_scaling": {"kind": "linear", "factor": 4.0},
  "patterns": [
    {"boundary": "drop", "causality": "position", "head_groups": [
      {"chunk_size": null, "shift": 0, "dilation": 1, "offset": 0,
       "window": null, "select": null, "heads": [0, 1, 2, 3]}]},
    {"boundary": "local", "causality": "position", "head_groups": [
      {"chunk_size": 8, "shift": 0, "dilation": 1, "offset": 0,
       "window": null, "select": null, "heads": [0, 1]},
      {"chunk_size": 8, "shift": 4, "dilation": 1, "offset": 0,
       "window": null, "select": null, "heads": [2, 3]}]}
  ],
  "pattern_of_layer": [0, 1, 0]
}
"""


def test_patterns_kept_as_lists_of_heads_are_read(tmp_path):
  (tmp_path / "scca_config.json").write_text(HEAD_LISTS)
  dense = patterns.AttentionPattern((patterns.HeadPattern(),) * 4)
  own = patterns.HeadPattern(chunk_size=8)
  shifted = patterns.HeadPattern(chunk_size=8, shift=4)
  chunked = patterns.AttentionPattern(
    (own, own, shifted, shifted), boundary="local"
  )
  assert adapters.load_patterns(tmp_path) == (dense, chunked, dense)


@pytest.mark.parametrize(
  "pattern",
  [
    "scca_flow(chunk_size=16, num_chunks=4, rotate='layer', interleaved=True)",
    "layers(scca_fixed(chunk_size=8, boundary='local'), dense)",
    "mixture(local(chunk_size=8), sda(dilation=4))",
  ],
)
def test_patterns_are_kept_as_a_string_and_as_heads(folder, tmp_path, pattern):
  layers = patterns.parse(
    pattern, num_heads=4, num_kv_heads=2, num_layers=3, seq_len=64
  )
  model = _adapted(folder, LoraConfig(rank=2))
  adapters.save_adapter(model, tmp_path, base_model="base", patterns=layers)
  assert adapters.load_patterns(tmp_path) == layers
  path = tmp_path / "scca_config.json"
  content = json.loads(path.read_text())
  assert content["pattern"] == pattern
  # The list alone is enough; if both are there, they must agree.
  del content["pattern"]
  path.write_text(json.dumps(content))
  assert adapters.load_patterns(tmp_path) == layers
  path.write_text(json.dumps(content | {"pattern": "local(chunk_size=4)"}))
  with pytest.raises(ValueError, match="contradicts itself.*chunk_size=4"):
    adapters.load_patterns(tmp_path)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"pattern": "locl"}, "scca_config.json is damaged.*did you mean 'local'"),
    ({"pattern": 3}, "scca_config.json is damaged.*must be a string, got 3"),
    ({"patterns": []}, "scca_config.json is damaged"),
    ({"patterns": [3]}, "damaged: the pattern 3 is not an object"),
    ({"patterns": [{"head_groups": ["x"]}]}, "group 'x' is not an object"),
    (
      {"patterns": [{"head_groups": [{"heads": [[0]]}]}]},
      r"head must be an integer of at least 0, got \[0\]",
    ),
    ({"pattern_of_layer": [0, 0, 9]}, "scca_config.json is damaged"),
    ({"num_kv_heads": None}, "scca_config.json lacks 'num_kv_heads'"),
  ],
)
def test_damaged_patterns_are_named(damage, change, said):
  damaged = damage("scca_config.json", change)
  with pytest.raises(ValueError, match=said) as error:
    adapters.load_patterns(damaged)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"context_len": "64"}, "context_len must be an integer.*'64'"),
    ({"rope_scaling": "linear"}, "rope_scaling='linear' is not an object"),
    ({"rope_scaling": {"factor": 4.0}}, "unknown rope scaling None"),
    (
      {"rope_scaling": {"kind": "linear", "factor": "4"}},
      "factor must be a number, got '4'",
    ),
    (
      {"rope_scaling": {"kind": "linear", "speed": 4}},
      "unknown setting 'speed' of linear",
    ),
    ({"quantize": "nf5"}, "scca_config.json is damaged: .*nf5"),
  ],
)
def test_damaged_settings_of_ours_are_named(saved, damage, change, said):
  damaged = damage("scca_config.json", change)
  with pytest.raises(ValueError, match=said) as error:
    adapters.load_adapter(saved / "base", damaged)
  assert "\n" not in str(error.value)


def test_null_in_an_adapter_is_the_default(folder, tmp_path):
  model = _adapted(folder, LoraConfig(rank=2, targets=("q_proj", "v_proj")))
  adapters.save_adapter(model, tmp_path, base_model="base")
  path = tmp_path / "adapter_config.json"
  content = json.loads(path.read_text())
  # PEFT's targets of a Llama are those that were trained here.
  unset = ("bias", "lora_dropout", "use_rslora", "target_modules", "use_dora")
  path.write_text(json.dumps(content | dict.fromkeys(unset)))
  read = adapters.load_adapter(folder, tmp_path)
  np.testing.assert_array_equal(
    model_files.logits(read), model_files.logits(model)
  )
