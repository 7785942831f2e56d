"""Written GGUF files, read by the library and by our reader."""

import dataclasses

import gguf
import jax.numpy as jnp
import model_files
import numpy as np
import pytest
from flax import nnx

from scca_jax import convert, gguf_file, gguf_writer, lora, rope
from scca_jax.convert import layout
from scca_jax.llama import Llama
from scca_jax.rope import RopeScaling

CONFIG = model_files.BYTE_LEVEL


def _model(seed=0, adapter=None, **settings):
  config = dataclasses.replace(CONFIG, **settings)
  return Llama(config, lora=adapter, rngs=nnx.Rngs(seed))


def _save(model, path, **settings):
  vocabulary = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.eot_token_id": 2,
  }
  gguf_writer.save_gguf(model, path, vocabulary=vocabulary, **settings)
  return path


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_a_model_comes_back_with_every_bit(tmp_path, kind, tied):
  model = _model(tie_embeddings=tied)
  dtype = {"F32": jnp.float32, "F16": jnp.float16}[kind]
  back = convert.load_model(_save(model, tmp_path / "m.gguf", kind=kind))
  assert back.config == dataclasses.replace(
    model.config,
    # GGUF has float32 where JSON has float64, and nothing of training.
    rms_norm_eps=float(np.float32(model.config.rms_norm_eps)),
    initializer_range=0.02,
  )
  wanted, found = layout.parameters(model), layout.parameters(back)
  assert wanted.keys() == found.keys()
  for path, array in wanted.items():
    of_file = jnp.float32 if path[-1] == "scale" else dtype
    np.testing.assert_array_equal(
      found[path], np.asarray(array, of_file), err_msg=str(path)
    )


def test_q8_0_has_the_rounding_of_the_library(tmp_path):
  model = _model(intermediate_size=48)
  file = gguf_file.GgufFile(_save(model, tmp_path / "m.gguf", kind="Q8_0"))
  kernel = model.layers.mlp.gate_proj.kernel[0].T
  kind = gguf.GGMLQuantizationType.Q8_0
  np.testing.assert_array_equal(
    file["model.layers.0.mlp.gate_proj.weight"](),
    gguf.dequantize(gguf.quantize(np.asarray(kernel), kind), kind),
  )
  # Rows of 48 are not whole blocks.
  np.testing.assert_array_equal(
    file["model.layers.1.mlp.down_proj.weight"](),
    np.asarray(model.layers.mlp.down_proj.kernel[1].T, np.float16),
  )


def test_query_rows_lie_as_the_converter_of_llama_cpp_puts_them(tmp_path):
  model = _model()
  reader = gguf.GGUFReader(_save(model, tmp_path / "m.gguf", kind="F32"))
  tensors = {tensor.name: tensor.data for tensor in reader.tensors}
  for name, num_heads in (("q", 4), ("k", 2)):
    part = getattr(model.layers.self_attn, f"{name}_proj").kernel[1].T
    # LlamaModel.permute of convert_hf_to_gguf.py.
    wanted = (
      np.asarray(part)
      .reshape(num_heads, 2, part.shape[0] // num_heads // 2, part.shape[1])
      .swapaxes(1, 2)
      .reshape(part.shape)
    )
    np.testing.assert_array_equal(tensors[f"blk.1.attn_{name}.weight"], wanted)


def test_adapters_are_fused(tmp_path):
  model = _model(adapter=lora.LoraConfig(rank=2))
  part = model.layers.self_attn.v_proj
  part.lora_b[...] = jnp.ones_like(part.lora_b[...])
  back = convert.load_model(_save(model, tmp_path / "m.gguf", kind="F32"))
  np.testing.assert_allclose(
    back.layers.self_attn.v_proj.kernel[...],
    part.kernel[...] + 8 * part.lora_a[...] @ part.lora_b[...],
    atol=1e-6,
  )


@pytest.mark.parametrize(
  "scaling",
  [
    RopeScaling(kind="linear", factor=4.0),
    RopeScaling(kind="ntk", factor=4.0),
    RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32),
    RopeScaling(
      kind="yarn",
      factor=4.0,
      original_max_position_embeddings=32,
      attention_factor=1.5,
    ),
    RopeScaling(
      kind="yarn",
      factor=4.0,
      original_max_position_embeddings=32,
      mscale=0.707,
      mscale_all_dim=1.2,
    ),
    RopeScaling(
      kind="llama3", factor=8.0, original_max_position_embeddings=8192
    ),
    RopeScaling(
      kind="llama3",
      factor=16.0,
      original_max_position_embeddings=512,
      low_freq_factor=1.5,
      high_freq_factor=6.0,
    ),
  ],
)
def test_rope_scaling_comes_back(tmp_path, scaling):
  # Wide enough for all three bands of Llama 3.
  model = _model(head_dim=64, rope_scaling=scaling, rope_theta=5e5)
  file = gguf_file.GgufFile(_save(model, tmp_path / "m.gguf"))
  config = file.config
  found = rope.frequencies(64, config.rope_theta, config.rope_scaling, 1)
  wanted = rope.frequencies(64, 5e5, scaling, 1)
  np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
  assert found[1] == pytest.approx(wanted[1], rel=1e-6)
  assert config.context_len == CONFIG.context_len


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    ({"kind": "dynamic"}, "no dynamic rope scaling"),
    ({"kind": "yarn", "beta_slow": 2.0}, "beta_slow=2.0"),
    ({"kind": "yarn", "beta_fast": 16.0}, "beta_fast=16.0"),
    ({"kind": "yarn", "truncate": False}, "truncate=False"),
  ],
)
def test_rope_scaling_that_llama_cpp_lacks_is_refused(tmp_path, settings, said):
  scaling = RopeScaling(
    factor=2.0, original_max_position_embeddings=64, **settings
  )
  with pytest.raises(ValueError, match=said):
    _save(_model(rope_scaling=scaling), tmp_path / "m.gguf")
  assert not list(tmp_path.iterdir())


def test_a_weight_beyond_float16_is_named_and_nothing_is_left(tmp_path):
  model = _model()
  kernel = model.layers.mlp.up_proj.kernel
  kernel[...] = kernel[...].at[1, 0, 0].set(1e5)
  (tmp_path / "m.gguf").write_text("before")
  with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight.*F16"):
    _save(model, tmp_path / "m.gguf")
  assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
  assert (tmp_path / "m.gguf").read_text() == "before"


def test_an_unknown_kind_is_named(tmp_path):
  with pytest.raises(ValueError, match="kind='Q4_K'.*F32, F16, Q8_0"):
    _save(_model(), tmp_path / "m.gguf", kind="Q4_K")


def test_a_file_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match="cannot write .*m.gguf"):
    _save(_model(), tmp_path / "file" / "m.gguf")
