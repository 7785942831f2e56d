"""The command `export` writes the model that it was given."""

import dataclasses
import json
import shutil

import absl.logging
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

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


def test_a_file_beside_that_is_nested_too_deeply_is_named(
  run_command, tmp_path, adapted, capsys
):
  base, out = tmp_path / "base", tmp_path / "hf"
  shutil.copytree(assets.MODEL, base)
  (base / "tokenizer.json").write_text("[" * 5000 + "]" * 5000)
  args = (f"--model={base}", f"--adapter={adapted[1]}", f"--output_dir={out}")
  assert run_command("export", *args) == 2
  assert "tokenizer.json is not valid" in capsys.readouterr().err
  assert not out.exists()


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


def _block(card, language):
  """Returns the first block of code of a card."""
  return card.split(f"```{language}\n")[1].split("```")[0]


@pytest.mark.parametrize(("kind", "atol"), [("F32", 2e-4), ("F16", 2e-2)])
def test_a_gguf_file_computes_what_the_adapter_does(
  run_command, tmp_path, adapted, kind, atol
):
  model, folder = adapted
  out = tmp_path / "tuned"
  args = ("--format=gguf", f"--gguf_type={kind}", f"--output_dir={out}")
  assert run_command("export", f"--adapter={folder}", *args) == 0
  assert sorted(path.name for path in out.iterdir()) == [
    "README.md",
    f"tuned-{kind}.gguf",
  ]
  file = out / f"tuned-{kind}.gguf"
  fused = convert.load_model(file)
  assert fused.config.rope_scaling == model.config.rope_scaling
  assert fused.config.context_len == model.config.context_len
  np.testing.assert_allclose(_logits(fused), _logits(model), atol=atol)
  text = "It was the best  of times\n"
  words, own = tokenizer.load(file), tokenizer.load(assets.MODEL)
  assert words.encode(text) == own.encode(text)
  card = (out / "README.md").read_text()
  assert f"llama-cli -m {file} -c 1024" in _block(card, "sh")


def test_a_plain_adapter_on_its_base_computes_what_the_adapter_does(
  run_command, tmp_path, adapted
):
  model, folder = adapted
  out = tmp_path / "plain"
  args = (f"--adapter={folder}", "--dtype=float32", f"--output_dir={out}")
  assert run_command("export", "--format=peft_plain", *args) == 0
  content = json.loads((out / "adapter" / "adapter_config.json").read_text())
  assert content["base_model_name_or_path"] == str(out / "base")
  assert content["modules_to_save"] is None
  assert "ensure_weight_tying" not in content
  tensors = load_file(out / "adapter" / "adapter_model.safetensors")
  assert tensors and all(".lora_" in name for name in tensors)
  base = convert.load_model(out / "base")
  assert base.config == model.config
  np.testing.assert_array_equal(base.norm.scale[...], model.norm.scale[...])
  back = adapters.load_adapter(out / "base", out / "adapter")
  np.testing.assert_array_equal(_logits(back), _logits(model))
  assert adapters.load_patterns(out / "adapter") == adapters.load_patterns(
    folder
  )
  # Exported again, it is another adapter of ours.
  again = (f"--model={out / 'base'}", f"--adapter={out / 'adapter'}")
  args = (*again, f"--output_dir={tmp_path / 'hf'}", "--dtype=float32")
  assert run_command("export", *args) == 0
  fused = convert.load_model(tmp_path / "hf")
  np.testing.assert_allclose(_logits(fused), _logits(model), atol=2e-4)


@pytest.mark.parametrize(
  "scaling",
  [
    RopeScaling(kind="ntk", factor=4.0),
    RopeScaling(
      kind="dynamic", factor=4.0, original_max_position_embeddings=16
    ),
  ],
)
def test_the_base_of_a_plain_adapter_has_the_rope_scaling_once(
  run_command, tmp_path, scaling
):
  config = convert.load_config(assets.MODEL)
  model = convert.load_model(
    assets.MODEL,
    config=dataclasses.replace(config, context_len=1024, rope_scaling=scaling),
    # What llama.cpp does not read.
    lora=lora.LoraConfig(rank=4, rslora=True),
  )
  part = model.layers.self_attn.v_proj.lora_b
  part[...] = 0.1 * jnp.ones_like(part[...])
  adapters.save_adapter(model, tmp_path / "a", base_model="tiny")
  out = tmp_path / "plain"
  args = (f"--adapter={tmp_path / 'a'}", f"--output_dir={out}")
  assert run_command("export", "--format=peft_plain", *args) == 0
  back = adapters.load_adapter(out / "base", out / "adapter")
  np.testing.assert_allclose(_logits(back), _logits(model), atol=1e-4)
  content = json.loads((out / "adapter" / "adapter_config.json").read_text())
  assert (content["lora_alpha"], content["use_rslora"]) == (32, False)


@pytest.mark.parametrize(
  "run", [3, {"recipe": 3}, {"perplexity": {"protocol": "longlora"}}]
)
def test_a_damaged_record_of_a_run_is_one_line(
  run_command, tmp_path, adapted, capsys, run
):
  _, folder = adapted
  shutil.copytree(folder, tmp_path / "bad")
  adapters.record_run(tmp_path / "bad", run)
  args = (f"--adapter={tmp_path / 'bad'}", f"--output_dir={tmp_path / 'out'}")
  assert run_command("export", *args) == 2
  error = capsys.readouterr().err
  assert 'remove "run" from its scca_config.json' in error
  assert error.count("\n") == 1
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["hf", "gguf", "peft_plain"])
def test_what_cannot_be_exported_leaves_nothing(
  run_command, tmp_path, adapted, capsys, kind
):
  _, folder = adapted
  bad = tmp_path / "bad"
  shutil.copytree(folder, bad)
  path = bad / "adapter_model.safetensors"
  tensors = load_file(path)
  name = "base_model.model.model.embed_tokens.weight"
  tensors[name] = tensors[name] + np.float32(1e5)
  tensors["base_model.model.lm_head.weight"] = tensors[name]
  save_file(tensors, path, {"format": "pt"})
  out = tmp_path / "out"
  args = (f"--adapter={bad}", f"--format={kind}", f"--output_dir={out}")
  assert run_command("export", *args) == 2
  assert "beyond" in capsys.readouterr().err
  assert not out.exists()


def test_what_peft_would_lose_is_said(
  run_command, tmp_path, adapted, monkeypatch
):
  _, folder = adapted
  said = []
  monkeypatch.setattr(
    absl.logging, "warning", lambda text, *args: said.append(text % args)
  )
  args = (f"--adapter={folder}", "--format=peft")
  assert run_command("export", *args, f"--output_dir={tmp_path / 'a'}") == 0
  tools, rope = said
  assert "\n" not in tools + rope
  assert all(t in tools for t in ("vLLM", "llama.cpp", "Ollama", "SGLang"))
  assert "linear, factor 4" in rope
  # An adapter of which PEFT and the others see everything.
  plain = convert.load_model(
    assets.MODEL,
    lora=lora.LoraConfig(train_embeddings=False, train_norms=False),
  )
  adapters.save_adapter(plain, tmp_path / "plain", base_model="tiny")
  args = (f"--adapter={tmp_path / 'plain'}", "--format=peft")
  assert run_command("export", *args, f"--output_dir={tmp_path / 'b'}") == 0
  assert len(said) == 2


def test_cards_have_recipe_pattern_rope_scaling_and_perplexities(
  run_command, tmp_path, adapted
):
  _, folder = adapted
  kept = tmp_path / "kept"
  shutil.copytree(folder, kept)
  perplexity = {
    "protocol": "longlora",
    "num_windows": {"256": 24, "1024": 8},
    "untuned": {"256": 29.09, "1024": 232.4},
    "tuned": {"256": 33.15, "1024": 32.24},
    "last_quarter": {"untuned": {"256": 1.0, "1024": 416.88}},
  }
  recipe = {"optimizer.learning_rate": 2e-5, "training.quantize": None}
  adapters.record_run(kept, {"recipe": recipe, "perplexity": perplexity})
  for kind, card in {
    "hf": "README.md",
    "gguf": "README.md",
    "peft": "README.md",
    "peft_plain": "adapter/README.md",
  }.items():
    args = (f"--adapter={kept}", f"--format={kind}")
    assert run_command("export", *args, f"--output_dir={tmp_path / kind}") == 0
    text = (tmp_path / kind / card).read_text()
    for line in (
      "| rope scaling | linear, factor=4.0 |",
      "| attention pattern in training | `scca_fixed(",
      "| `optimizer.learning_rate` | 2e-05 |",
      "| perplexity at | 256 | 1,024 | last quarter of 1,024 |",
      "| untuned | 29.09 | 232.40 | 416.88 |",
      "| tuned | 33.15 | 32.24 | - |",
    ):
      assert line in text, (kind, line)
    assert "None" not in text
    assert text.startswith("---\nlibrary_name: ")


@pytest.mark.parametrize(
  ("args", "said"),
  [
    ((), "--output_dir=FOLDER"),
    (("--output_dir={full}",), "is not empty"),
    (("--output_dir={new}", "--format=peft"), "--adapter=FOLDER"),
    (("--output_dir={new}", "--format=peft_plain"), "--adapter=FOLDER"),
    (("--output_dir={new}", "--gguf_type=F16"), "needs --format=gguf"),
    (
      ("--output_dir={new}", "--format=gguf", "--dtype=float16"),
      "give --gguf_type",
    ),
    (
      ("--output_dir={new}", "--format=gguf", "--gguf_type=Q4_K"),
      "<F32|F16|Q8_0>",
    ),
    (
      (
        "--output_dir={new}",
        "--format=gguf",
        "--rope_scaling=dynamic",
        "--rope_factor=2",
      ),
      "no dynamic rope scaling",
    ),
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
