"""Models in the files of Hugging Face, written and read by hand."""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import model_files
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from scca_jax import convert
from scca_jax.llama_config import LlamaConfig
from scca_jax.rope import RopeScaling


@pytest.fixture
def folder(tmp_path):
  return model_files.write(tmp_path / "base", model_files.tensors(False))


def test_weights_are_transposed_and_stacked(folder):
  tensors = model_files.tensors(False)
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


def test_null_is_the_default(folder):
  # As transformers writes what it was not told.
  unset = (
    *("head_dim", "rope_scaling", "rope_theta", "rms_norm_eps", "hidden_act"),
    *("tie_word_embeddings", "initializer_range", "attention_bias", "mlp_bias"),
    *("bos_token_id", "eos_token_id", "model_type", "num_key_value_heads"),
    "architectures",
  )
  names = {"rope_parameters"} | set(unset)
  path = folder / "config.json"
  given = {k: v for k, v in model_files.SIZES.items() if k not in names}
  path.write_text(json.dumps(given))
  absent = convert.load_config(folder)
  path.write_text(json.dumps(given | dict.fromkeys(names)))
  assert convert.load_config(folder) == absent


def test_settings_that_change_nothing_are_let_through(folder):
  wanted = convert.load_config(folder)
  _set(
    folder,
    architectures=["LlamaForCausalLM"],
    hidden_act="swish",
    attention_dropout=0.0,
    pretraining_tp=2,
    pad_token_id=-1,
    use_cache=False,
    torch_dtype="float16",
    transformers_version="4.28.1",
    temperature=0.6,
    layer_types=["full_attention"] * 3,
    # Unknown, and off.
    use_qk_norm=False,
    sliding_window=None,
    final_logit_softcapping=0.0,
    pruned_heads={},
    quantization_config={},
  )
  assert convert.load_config(folder) == wanted


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_both_spellings_of_rope_are_read(tmp_path, spelling):
  yarn = {"factor": 4.0, "beta_fast": 16.0}
  if spelling == "rope_parameters":
    config = {spelling: yarn | {"rope_type": "yarn", "rope_theta": 7.0}}
  else:
    config = {spelling: yarn | {"type": "yarn"}, "rope_theta": 7.0}
  read = convert.load_config(
    model_files.write(tmp_path, model_files.tensors(True), **config)
  )
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
  tensors = model_files.tensors(tied, dtype)
  source = model_files.write(tmp_path / "in", tensors, tie_word_embeddings=tied)
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
  tensors = model_files.tensors(False)
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
  (shards / "config.json").write_text(json.dumps(model_files.SIZES))
  np.testing.assert_array_equal(
    model_files.logits(convert.load_model(shards)),
    model_files.logits(convert.load_model(folder)),
  )
  (shards / "b.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match="b.safetensors"):
    convert.load_model(shards)


def test_tied_models_may_keep_the_head(tmp_path):
  tensors = model_files.tensors(False)
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(1)
  source = model_files.write(tmp_path, tensors, tie_word_embeddings=True)
  assert convert.load_model(source).lm_head is None
  tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
  model_files.write(tmp_path, tensors, tie_word_embeddings=True)
  with pytest.raises(ValueError, match="lm_head.weight differs from model.emb"):
    convert.load_model(source)


def test_tied_models_may_be_saved_under_the_head(tmp_path):
  tensors = model_files.tensors(True)
  usual = model_files.write(
    tmp_path / "usual", tensors, tie_word_embeddings=True
  )
  tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
  head = model_files.write(tmp_path / "head", tensors, tie_word_embeddings=True)
  np.testing.assert_array_equal(
    model_files.logits(convert.load_model(head)),
    model_files.logits(convert.load_model(usual)),
  )


def test_a_single_file_counts_before_an_index(folder):
  wanted = model_files.logits(convert.load_model(folder))
  (folder / "model.safetensors.index.json").write_text(
    json.dumps({"weight_map": {"model.norm.weight": "of_an_older_save"}})
  )
  np.testing.assert_array_equal(
    model_files.logits(convert.load_model(folder)), wanted
  )


def test_ntk_is_written_as_another_base(tmp_path):
  source = model_files.write(
    tmp_path / "in", model_files.tensors(True), tie_word_embeddings=True
  )
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


def _drop(folder, name):
  tensors = model_files.tensors(False)
  del tensors[name]
  model_files.write(folder, tensors)


def _add(folder, name, shape):
  model_files.write(
    folder, model_files.tensors(False) | {name: np.zeros(shape, np.float32)}
  )


def _cut(folder):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-7])


def _put_nan(folder):
  tensors = model_files.tensors(False)
  tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = np.nan
  model_files.write(folder, tensors)


def _only_pickled(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _set(folder, **config):
  (folder / "config.json").write_text(json.dumps(model_files.SIZES | config))


def _unset(folder, name):
  config = {
    key: value for key, value in model_files.SIZES.items() if key != name
  }
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
    (lambda f: _set(f, rope_theta="big"), "rope_theta.*number.*'big'"),
    (lambda f: _set(f, rope_theta=True), "rope_theta.*number.*True"),
    (lambda f: _set(f, rms_norm_eps=float("nan")), "rms_norm_eps.*number.*nan"),
    (lambda f: _set(f, rope_theta=10**400), "rope_theta.*number.*0000"),
    (
      lambda f: _set(f, tie_word_embeddings="no"),
      "tie_word.*true or false.*no",
    ),
    (lambda f: _set(f, eos_token_id="2"), "eos_token_id.*integer.*'2'"),
    (lambda f: _set(f, eos_token_id=[2, None]), "eos_token_id.*integer.*None"),
    (lambda f: _set(f, bos_token_id=1.0), "bos_token_id.*integer.*1.0"),
    (
      lambda f: _set(
        f,
        max_position_embeddings="16",
        rope_scaling={"type": "yarn", "factor": 4.0},
      ),
      "config.json: max_position_embeddings must be an integer.*'16'",
    ),
    (
      lambda f: _set(f, num_hidden_layers=10**9),
      "config.json: num_layers must be 1 to 4,096, got 1,000,000,000",
    ),
    (
      lambda f: _set(f, num_hidden_layers=4000),
      "has .* tensors, too few for the 4,000 layers",
    ),
    # As float32 these would be petabytes, then 48 gigabytes.
    (
      lambda f: _set(f, intermediate_size=10**9, hidden_size=10**6),
      "these sizes make a model of .* parameters",
    ),
    (
      lambda f: _set(f, intermediate_size=2 * 10**9),
      r"proj.weight is \[.*\], but the model's configuration asks for \[",
    ),
    (
      lambda f: _set(f, num_hidden_layers=10**30),
      "config.json: num_hidden_layers is too large",
    ),
    (lambda f: _set(f, hidden_act=["silu"]), "hidden_act=.*not supported"),
    (lambda f: _set(f, partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    *(
      (lambda f, n=name, x=value: _set(f, **{n: x}), f"config.json: {name}")
      for name, value in (
        ("architectures", ["MistralForCausalLM"]),
        ("attention_dropout", 0.1),
        ("sliding_window", 4096),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("logits_scaling", 8.0),
        ("attention_multiplier", 0.1),
        ("final_logit_softcapping", 30.0),
        ("num_local_experts", 8),
        ("no_rope_layers", [0]),
        ("pruned_heads", {"0": [1]}),
        ("per_layer_config", {"0": {"rms_norm_eps": 1e-3}}),
        ("use_qk_norm", True),
        ("first_dense_layer", 0),
        ("of_next_year", "on"),
      )
    ),
    *(
      (lambda f, x=x: _set(f, rope_scaling=x), "config.json: rope_scaling must")
      for x in ([1], "linear", 2.0, True)
    ),
    *(
      (lambda f, x=x: _set(f, rope_scaling=x), f"config.json: .*{said}")
      for x, said in (
        ({"type": "linear"}, "linear rope lacks 'factor'"),
        ({"type": "linear", "factor": None}, "linear rope lacks 'factor'"),
        ({"type": "linear", "factor": "4"}, "factor must be a number, got '4'"),
        ({"factor": 4.0}, "factor=4.0 and no rope_type"),
        ({"type": ["yarn"], "factor": 4.0}, "unknown rope scaling"),
        ({"type": "llama3", "factor": 4.0}, "llama3 rope lacks 'low_freq"),
        (
          {"type": "yarn", "factor": 4.0, "extrapolation_factor": 0.5},
          "unknown setting 'extrapolation_factor'",
        ),
        (
          {"type": "yarn", "factor": 4.0, "truncate": "no"},
          "truncate must be true or false, got 'no'",
        ),
        ({"full_attention": {"rope_type": "default"}}, "'full_attention'"),
      )
    ),
    (
      lambda f: _set(
        f,
        rope_scaling={"type": "linear", "factor": 2.0},
        rope_parameters={"rope_theta": 7.0},
      ),
      "config.json: rope_parameters has rope_theta=7.0, but .* 5000.0",
    ),
    (lambda f: _set(f, rope_scaling={"type": "cubic"}), "cubic"),
    (
      lambda f: _set(f, rope_scaling={"type": "linear", "factors": 2}),
      "factors",
    ),
    (lambda f: _unset(f, "hidden_size"), "lacks 'hidden_size'"),
    (lambda f: (f / "config.json").write_text("{"), "is not valid JSON"),
  ],
)
def test_damaged_models_are_named(folder, damage, said):
  damage(folder)
  with pytest.raises(ValueError, match=said) as error:
    convert.load_model(folder)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b"])
def test_an_index_names_no_file_elsewhere(folder, name):
  (folder / "model.safetensors").unlink()
  index = {"weight_map": {"model.norm.weight": name}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(ValueError, match=f"'{name}', which is not a file in"):
    convert.load_model(folder)


def test_a_tokenizer_file_that_is_a_link_to_elsewhere_is_told(tmp_path, caplog):
  (tmp_path / "elsewhere").write_text("{}")
  hub = tmp_path / "models--a--b"
  for folder in (tmp_path / "model", hub / "snapshots" / "1"):
    folder.mkdir(parents=True)
  (hub / "blobs").mkdir()
  (hub / "blobs" / "0").write_text("{}")
  (hub / "snapshots" / "1" / "added_tokens.json").symlink_to("../../blobs/0")
  convert.copy_tokenizer(hub / "snapshots" / "1", tmp_path / "a")
  assert not caplog.text
  (tmp_path / "model" / "added_tokens.json").symlink_to("../elsewhere")
  convert.copy_tokenizer(tmp_path / "model", tmp_path / "b")
  assert f"copying {tmp_path / 'elsewhere'}" in caplog.text


def test_missing_files_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="config.json"):
    convert.load_model(tmp_path / "none")


@pytest.fixture
def sharded(tmp_path, folder):
  model = convert.load_model(folder)
  # 23 x 8 float32 are 736 bytes: no other tensor fits next to an embedding.
  convert.save_model(
    model, tmp_path / "shards", dtype=jnp.float32, max_shard_bytes=800
  )
  return tmp_path / "shards"


def test_shards_hold_what_one_file_holds(sharded):
  tensors = model_files.tensors(False)
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
    model_files.logits(convert.load_model(sharded)),
    model_files.logits(convert.load_model(folder)),
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


def test_settings_that_steer_generation_are_told(folder):
  assert convert.unapplied_generation(folder) == {}
  harmless = {
    "do_sample": True,
    "temperature": 0.6,
    "repetition_penalty": 1.0,
    "num_beams": 1,
    "bad_words_ids": None,
    "suppress_tokens": [],
  }
  steering = {"no_repeat_ngram_size": 3, "forced_eos_token_id": 2}
  path = folder / "generation_config.json"
  path.write_text(json.dumps(harmless | steering))
  assert convert.unapplied_generation(folder) == steering


def test_a_wrong_end_is_named_with_its_file(folder):
  (folder / "generation_config.json").write_text('{"eos_token_id": "2"}')
  with pytest.raises(ValueError, match="generation_config.json: eos_token_id"):
    convert.load_config(folder)


def test_weights_beyond_float16_are_named(tmp_path):
  tensors = model_files.tensors(True)
  tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
  source = model_files.write(tmp_path / "in", tensors, tie_word_embeddings=True)
  with pytest.raises(ValueError, match="1.mlp.up_proj.weight exceeds float16"):
    convert.load_model(source, param_dtype=jnp.float16)
  model = convert.load_model(source)
  with pytest.raises(ValueError, match="mlp.up_proj.kernel.*beyond float16"):
    convert.save_model(model, tmp_path / "out", dtype=jnp.float16)
  assert not (tmp_path / "out" / "config.json").exists()


def test_several_ends_are_kept(tmp_path):
  source = model_files.write(
    tmp_path / "in", model_files.tensors(False), eos_token_id=[2, 5]
  )
  model = convert.load_model(source)
  assert model.config.eos_token_ids == (2, 5)
  convert.save_model(model, tmp_path / "out", dtype=jnp.float32)
  assert convert.load_config(tmp_path / "out") == model.config
