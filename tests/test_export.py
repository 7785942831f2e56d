"""The command `export`: what it writes is what was there."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from scca_jax import adapters, assets, convert, lora, patterns, tokenizer
from scca_jax.rope import RopeScaling

TOKENS = jnp.arange(3, 60, dtype=jnp.int32)[None, :]


def _logits(model):
  return np.asarray(model(TOKENS, patterns=patterns.dense(8)))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
  """The embedded model with an adapter that changes it, and its folder."""
  config = convert.load_config(assets.MODEL)
  model = convert.load_model(
    assets.MODEL,
    config=dataclasses.replace(
      config,
      context_len=4 * config.context_len,
      rope_scaling=RopeScaling(kind="linear", factor=4.0),
    ),
    lora=lora.LoraConfig(rank=4),
  )
  rng = np.random.default_rng(0)
  for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
    part = getattr(model.layers.self_attn, name).lora_b
    part[...] = jnp.asarray(0.1 * rng.normal(size=part.shape), jnp.float32)
  model.norm.scale[...] = 1.1 * model.norm.scale[...]
  folder = tmp_path_factory.mktemp("export") / "adapter"
  schedule = (patterns.scca_fixed(8, 256),) * config.num_layers
  adapters.save_adapter(model, folder, base_model="tiny", patterns=schedule)
  return model, folder


def test_a_fused_model_computes_what_the_adapter_does(
  run_command, tmp_path, adapted
):
  model, folder = adapted
  status = run_command(
    "export",
    f"--adapter={folder}",
    f"--output_dir={tmp_path / 'hf'}",
    "--dtype=float32",
    "--max_shard_gb=0.005",
  )
  assert status == 0
  fused = convert.load_model(tmp_path / "hf")
  assert fused.config == model.config
  assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
  np.testing.assert_allclose(_logits(fused), _logits(model), atol=2e-4)
  assert not np.allclose(
    _logits(fused), _logits(convert.load_model(assets.MODEL)), atol=0.1
  )
  words = tokenizer.load(tmp_path / "hf")
  assert words.fingerprint == tokenizer.load(assets.MODEL).fingerprint
  config = json.loads((tmp_path / "hf" / "config.json").read_text())
  assert config["max_position_embeddings"] == model.config.context_len
  assert config["rope_scaling"] == {"type": "linear", "factor": 4.0}
  assert config["rope_parameters"] == {
    "rope_theta": model.config.rope_theta,
    "rope_type": "linear",
    "factor": 4.0,
  }


def test_an_adapter_of_peft_is_exported_with_the_rope_scaling_that_is_said(
  run_command, tmp_path, adapted
):
  model, folder = adapted
  plain = tmp_path / "plain"
  shutil.copytree(folder, plain)
  (plain / "scca_config.json").unlink()
  args = (
    f"--adapter={plain}",
    f"--output_dir={tmp_path / 'hf'}",
    "--dtype=float32",
    "--rope_scaling=linear",
  )
  assert run_command("export", *args) == 2
  assert run_command("export", *args, "--rope_factor=4") == 0
  fused = convert.load_model(tmp_path / "hf")
  assert (
    dataclasses.replace(fused.config, rope_scaling=model.config.rope_scaling)
    == model.config
  )
  np.testing.assert_allclose(_logits(fused), _logits(model), atol=2e-4)


def test_files_beside_do_not_keep_the_old_limit(run_command, tmp_path, adapted):
  model, folder = adapted
  base = tmp_path / "base"
  shutil.copytree(assets.MODEL, base)
  words = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
  words.enable_truncation(64)
  words.save(str(base / "tokenizer.json"))
  for name, content in {
    "tokenizer_config": {"model_max_length": 64, "bos_token": "é"},
    "generation_config": {"max_length": 64, "eos_token_id": 2},
  }.items():
    (base / f"{name}.json").write_text(json.dumps(content))
  out = tmp_path / "hf"
  args = (f"--model={base}", f"--adapter={folder}", f"--output_dir={out}")
  assert run_command("export", *args) == 0
  length = model.config.context_len
  read = {
    name: json.loads((out / f"{name}.json").read_text(encoding="utf8"))
    for name in ("tokenizer_config", "generation_config", "config")
  }
  assert read == {
    "tokenizer_config": {"model_max_length": length, "bos_token": "é"},
    "generation_config": {"max_length": length, "eos_token_id": 2},
    "config": read["config"],
  }
  assert read["config"]["max_position_embeddings"] == length > 64
  limits = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
  assert limits.truncation["max_length"] == length


def test_a_model_without_adapter_keeps_every_bit(run_command, tmp_path):
  assert run_command("export", f"--output_dir={tmp_path / 'hf'}") == 0
  wanted = load_file(assets.MODEL / "model.safetensors")
  found = load_file(tmp_path / "hf" / "model.safetensors")
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    assert found[name].dtype == value.dtype == np.float16
    np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_an_adapter_is_written_again_with_every_bit(
  run_command, tmp_path, adapted
):
  _, folder = adapted
  status = run_command(
    "export",
    f"--adapter={folder}",
    "--format=peft",
    f"--output_dir={tmp_path / 'peft'}",
  )
  assert status == 0
  for name in ("adapter_model.safetensors", "scca_config.json"):
    assert (tmp_path / "peft" / name).read_bytes() == (
      folder / name
    ).read_bytes()


def test_an_adapter_can_be_written_in_another_dtype(
  run_command, tmp_path, adapted
):
  _, folder = adapted
  status = run_command(
    "export",
    f"--adapter={folder}",
    "--format=peft",
    "--dtype=bfloat16",
    f"--output_dir={tmp_path / 'peft'}",
  )
  assert status == 0
  assert adapters.stored_dtype(tmp_path / "peft") == jnp.bfloat16


@pytest.mark.parametrize(
  ("args", "said"),
  [
    ((), "--output_dir=FOLDER"),
    (("--output_dir={full}",), "is not empty"),
    (("--output_dir={new}", "--format=peft"), "--adapter=FOLDER"),
    (("--output_dir={new}", "--model=none"), "--model=none"),
    (("--output_dir={new}", "--adapter={full}"), "adapter_config.json"),
    (("--output_dir={new}", "--max_shard_gb=0"), "--max_shard_gb"),
    (("--output_dir={new}", "--format=onnx"), "onnx"),
  ],
)
def test_bad_flags_end_in_one_line(run_command, capsys, tmp_path, args, said):
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "file").write_text("kept")
  places = {"full": tmp_path / "full", "new": tmp_path / "new"}
  assert run_command("export", *(a.format(**places) for a in args)) == 2
  error = capsys.readouterr().err
  assert said in error and error.count("\n") == 1
  assert not (tmp_path / "new").exists()
  assert (tmp_path / "full" / "file").read_text() == "kept"
