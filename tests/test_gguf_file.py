"""GGUF files, written by the gguf library as llama.cpp lays them out."""

import math
import struct

import gguf
import gguf_files
import jax.numpy as jnp
import numpy as np
import pytest

from scca_jax import convert, patterns
from scca_jax.gguf_file import GgufFile
from scca_jax.rope import RopeScaling


@pytest.fixture
def path(tmp_path):
  return gguf_files.write(tmp_path / "m.gguf", gguf_files.tensors())


def _logits(model):
  tokens = jnp.arange(11, dtype=jnp.int32)[None]
  return np.asarray(model(tokens, patterns=patterns.dense(gguf_files.HEADS)))


def _neighbours_rotate(weight, heads):
  """Rows as llama.cpp has them: channel i, then channel i + head_dim / 2."""
  rows = []
  for head in weight.reshape(heads, gguf_files.HEAD_DIM, -1):
    for i in range(gguf_files.HEAD_DIM // 2):
      rows += [head[i], head[i + gguf_files.HEAD_DIM // 2]]
  return np.stack(rows)


def test_a_gguf_file_is_the_same_model_as_its_hugging_face_folder(tmp_path):
  tensors = gguf_files.tensors()
  in_file = dict(tensors)
  for i in range(gguf_files.LAYERS):
    for name, heads in (
      ("attn_q", gguf_files.HEADS),
      ("attn_k", gguf_files.KV_HEADS),
    ):
      key = f"blk.{i}.{name}.weight"
      in_file[key] = _neighbours_rotate(tensors[key], heads)
  model = convert.load_model(gguf_files.write(tmp_path / "m.gguf", in_file))
  np.testing.assert_array_equal(
    np.asarray(model.layers.self_attn.q_proj.kernel[...])[1],
    tensors["blk.1.attn_q.weight"].T,
  )
  np.testing.assert_array_equal(
    np.asarray(model.layers.self_attn.k_proj.kernel[...])[0],
    tensors["blk.0.attn_k.weight"].T,
  )
  np.testing.assert_array_equal(
    np.asarray(model.layers.mlp.down_proj.kernel[...])[1],
    tensors["blk.1.ffn_down.weight"].T,
  )
  np.testing.assert_array_equal(
    np.asarray(model.lm_head.kernel[...]), tensors["output.weight"].T
  )
  convert.save_model(model, tmp_path / "hf", dtype=jnp.float32)
  again = convert.load_model(tmp_path / "hf")
  assert again.config == model.config
  np.testing.assert_array_equal(_logits(again), _logits(model))


def test_sizes_come_from_the_metadata(path):
  config = convert.load_config(path)
  assert (config.num_heads, config.num_kv_heads) == (
    gguf_files.HEADS,
    gguf_files.KV_HEADS,
  )
  assert (config.hidden_size, config.intermediate_size) == (
    gguf_files.HIDDEN,
    gguf_files.INNER,
  )
  assert (config.num_layers, config.vocab_size) == (
    gguf_files.LAYERS,
    gguf_files.VOCAB,
  )
  assert (config.head_dim, config.context_len) == (gguf_files.HEAD_DIM, 64)
  assert (config.rope_theta, config.rope_scaling) == (5000.0, None)
  assert not config.tie_embeddings


def test_without_an_output_tensor_the_embeddings_are_tied(tmp_path):
  path = gguf_files.write(tmp_path / "m.gguf", gguf_files.tensors(tied=True))
  assert convert.load_config(path).tie_embeddings
  assert convert.load_model(path).lm_head is None


@pytest.mark.parametrize(
  ("kind", "tolerance"),
  [("F16", 2e-3), ("BF16", 1e-2), ("Q8_0", 0.03), ("Q4_0", 0.6), ("Q4_1", 0.4)],
)
def test_quantised_tensors_are_read(tmp_path, kind, tolerance):
  tensors = gguf_files.tensors()
  path = gguf_files.write(
    tmp_path / "m.gguf", tensors, getattr(gguf.GGMLQuantizationType, kind)
  )
  kernel = convert.load_model(path).layers.mlp.up_proj.kernel[...]
  for i in range(gguf_files.LAYERS):
    error = np.abs(np.asarray(kernel[i]).T - tensors[f"blk.{i}.ffn_up.weight"])
    assert 0 < error.max() < tolerance


def test_k_quants_are_read(tmp_path):
  # The library only reads them. A block of Q4_K is 256 weights in 144 bytes:
  # scale and least scale (float16), 12 bytes of scales, 128 of nibbles.
  block = np.zeros(144, np.uint8)
  block[:4] = np.array([0.5, 0.25], np.float16).view(np.uint8)
  block[4:8] = 2  # Scales of the first four groups of 32 weights.
  block[8:12] = 3  # Their minima.
  block[16:] = 0x51  # Low nibbles 1, high nibbles 5.
  tensors = gguf_files.tensors()
  rows = gguf_files.HIDDEN * gguf_files.INNER // 256
  name = "blk.0.ffn_up.weight"
  del tensors[name]

  def add(writer):
    data = np.tile(block, (gguf_files.INNER, 1))[
      : gguf_files.INNER // 8
    ].reshape(gguf_files.INNER // 8, 144)
    assert len(data) == rows
    writer.add_tensor(
      name,
      data,
      raw_shape=data.shape,
      raw_dtype=gguf.GGMLQuantizationType.Q4_K,
    )

  # 256 weights a row: as [8, 256], which the shape of the model is not.
  path = gguf_files.write(tmp_path / "m.gguf", tensors, extra=add)
  values = GgufFile(path)["model.layers.0.mlp.up_proj.weight"]()
  assert values.shape == (8, 256)
  # Weight = scale * nibble - minimum: 0.5*2*1 - 0.25*3 and 0.5*2*5 - 0.25*3.
  np.testing.assert_allclose(values[:, :32], 0.25)
  np.testing.assert_allclose(values[:, 32:64], 4.25)
  with pytest.raises(ValueError, match=r"blk.0.ffn_up.weight is \[8, 256\]"):
    convert.load_model(path)


@pytest.mark.parametrize(
  ("extra", "wanted"),
  [
    (
      lambda w: (
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
        w.add_rope_scaling_factor(4.0),
      ),
      RopeScaling(kind="linear", factor=4.0),
    ),
    (
      lambda w: (
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
        w.add_rope_scaling_factor(2.0),
        w.add_rope_scaling_orig_ctx_len(32),
      ),
      RopeScaling(kind="yarn", factor=2.0, original_max_position_embeddings=32),
    ),
    # llama.cpp's meaning of a factor without a type.
    (
      lambda w: w.add_rope_scaling_factor(4.0),
      RopeScaling(kind="linear", factor=4.0),
    ),
    (
      lambda w: w.add_float32("llama.rope.scale_linear", 4.0),
      RopeScaling(kind="linear", factor=4.0),
    ),
    (
      lambda w: (
        w.add_rope_scaling_type(gguf.RopeScalingType.NONE),
        w.add_rope_scaling_factor(4.0),
      ),
      None,
    ),
    (
      lambda w: (
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
        w.add_rope_scaling_factor(2.0),
        w.add_rope_scaling_attn_factors(0.5),
      ),
      RopeScaling(
        kind="yarn",
        factor=2.0,
        original_max_position_embeddings=64,
        attention_factor=0.5 * (1 + 0.1 * math.log(2)),
      ),
    ),
    (
      # The defaults of keys that are refused otherwise.
      lambda w: (
        w.add_float32("llama.rope.scaling.yarn_beta_fast", 32.0),
        w.add_causal_attention(True),
        w.add_vocab_size(gguf_files.VOCAB),
        w.add_value_length(gguf_files.HEAD_DIM),
      ),
      None,
    ),
  ],
)
def test_rope_scaling_is_read(tmp_path, extra, wanted):
  path = gguf_files.write(
    tmp_path / "m.gguf", gguf_files.tensors(), extra=extra
  )
  assert convert.load_config(path).rope_scaling == wanted


def test_the_rope_scaling_of_llama_3_is_read_from_its_tensor(tmp_path):
  # The formula of llama.cpp's converter.
  exponents = np.arange(0, gguf_files.HEAD_DIM, 2) / gguf_files.HEAD_DIM
  factors = []
  for frequency in 5e5**-exponents:
    wavelength = 2 * np.pi / frequency
    if wavelength < 8192 / 4:
      factors.append(1.0)
    elif wavelength > 8192 / 1:
      factors.append(8.0)
    else:
      smooth = (8192 / wavelength - 1) / (4 - 1)
      factors.append(1 / ((1 - smooth) / 8 + smooth))
  assert factors[0] == 1 and 1 < factors[2] < 8 and factors[3] == 8
  tensors = gguf_files.tensors() | {
    "rope_freqs.weight": np.array(factors, np.float32)
  }
  path = gguf_files.write(tmp_path / "m.gguf", tensors, theta=5e5)
  assert convert.load_model(path).config.rope_scaling == RopeScaling(
    kind="llama3", factor=8.0, original_max_position_embeddings=8192
  )
  tensors["rope_freqs.weight"] = np.array([1, 2, 3, 8], np.float32)
  path = gguf_files.write(tmp_path / "n.gguf", tensors, theta=5e5)
  with pytest.raises(ValueError, match="not a rope scaling of Llama 3's kind"):
    convert.load_config(path)


def test_pieces_of_a_split_file_are_read_as_one(tmp_path):
  tensors = gguf_files.tensors()
  whole = gguf_files.write(tmp_path / "whole.gguf", tensors)
  gguf_files.write(tmp_path / "m.gguf", tensors, split_max_tensors=5)
  first, *others = sorted(tmp_path.glob("m-*-of-*.gguf"))
  assert len(others) == 4
  np.testing.assert_array_equal(
    _logits(convert.load_model(first)), _logits(convert.load_model(whole))
  )
  with pytest.raises(ValueError, match=f"not the first.*give .*{first.name}"):
    convert.load_config(others[0])
  moved = first.rename(tmp_path / "moved.gguf")
  with pytest.raises(ValueError, match="one of 5 pieces.*model-00001-of-00005"):
    convert.load_config(moved)
  moved.rename(first)
  others[1].write_bytes(others[2].read_bytes())
  with pytest.raises(ValueError, match=f"{others[1].name} is not piece 3"):
    convert.load_config(first)
  others[1].unlink()
  with pytest.raises(FileNotFoundError, match=others[1].name):
    convert.load_config(first)


@pytest.mark.parametrize(
  "end", ["eos", "eot", "eom", "<|eot_id|>", "<|im_end|>"]
)
def test_generation_ends_where_llama_cpp_ends(tmp_path, end):
  def extra(writer):
    tokens = [f"w{i}" for i in range(gguf_files.VOCAB)]
    if end.startswith("<"):
      tokens[7] = end
    else:
      getattr(writer, f"add_{end}_token_id")(7)
    if end != "eos":
      writer.add_eos_token_id(9)
    writer.add_token_list(tokens)

  path = gguf_files.write(
    tmp_path / "m.gguf", gguf_files.tensors(), extra=extra
  )
  ends = convert.load_config(path).eos_token_ids
  assert ends == ((7,) if end == "eos" else (9, 7))


@pytest.mark.parametrize(
  ("model", "named", "wanted"),
  [
    # llama.cpp's defaults where a file does not name them, or names nothing.
    ("llama", {}, (1, (2,))),
    ("gpt2", {}, (None, (11,))),
    ("llama", {"bos": 5, "eos": 6}, (5, (6,))),
    ("llama", {"bos": 900, "eos": 901}, (1, (2,))),
  ],
)
def test_tokens_that_are_not_named_are_the_usual(
  tmp_path, model, named, wanted
):
  def extra(writer):
    writer.add_tokenizer_model(model)
    writer.add_token_list([f"w{i}" for i in range(gguf_files.VOCAB)])
    for kind, token in named.items():
      getattr(writer, f"add_{kind}_token_id")(token)

  path = gguf_files.write(
    tmp_path / "m.gguf", gguf_files.tensors(), extra=extra
  )
  config = convert.load_config(path)
  assert (config.bos_token_id, config.eos_token_ids) == wanted


def _truncate(path):
  path.write_bytes(path.read_bytes()[:-100])


def _rename(path, old, new):
  tensors = gguf_files.tensors()
  tensors[new] = tensors.pop(old)
  gguf_files.write(path, tensors)


def _swap_shapes(path):
  tensors = gguf_files.tensors()
  tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"].T.copy()
  gguf_files.write(path, tensors)


def _nan(path):
  tensors = gguf_files.tensors()
  tensors["blk.0.attn_q.weight"][2, 3] = np.nan
  gguf_files.write(path, tensors)


@pytest.mark.parametrize(
  ("damage", "said"),
  [
    (_truncate, "cut short"),
    (lambda p: p.write_bytes(b""), "damaged"),
    (lambda p: p.write_bytes(b"GGUF" + bytes(100)), "damaged"),
    (lambda p: p.write_bytes(p.read_bytes()[:200]), "cut short"),
    (
      lambda p: _rename(p, "blk.1.ffn_up.weight", "blk.1.ffn_upp.weight"),
      "blk.1.ffn_upp.weight",
    ),
    (
      lambda p: gguf_files.write(
        p,
        {k: v for k, v in gguf_files.tensors().items() if "0.attn_v" not in k},
      ),
      "lacks the tensor blk.0.attn_v.weight",
    ),
    (_swap_shapes, r"blk.1.ffn_up.weight is \[32, 64\].*\[64, 32\]"),
    (_nan, "blk.0.attn_q.weight holds a NaN"),
    (
      lambda p: gguf_files.write(p, gguf_files.tensors(), arch="qwen2"),
      "'qwen2'",
    ),
    (
      lambda p: gguf_files.write(
        p, gguf_files.tensors(), extra=lambda w: w.add_expert_count(8)
      ),
      "8 experts",
    ),
    (
      lambda p: gguf_files.write(
        p, gguf_files.tensors(), extra=lambda w: w.add_key_length(0)
      ),
      r"m.gguf: llama.attention.key_length must be an integer.* got 0\.",
    ),
    (
      lambda p: gguf_files.write(
        p,
        gguf_files.tensors(),
        extra=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
      ),
      "m.gguf: llama.rope.scaling.factor is missing",
    ),
    (
      lambda p: gguf_files.write(
        p, gguf_files.tensors(), endianess=gguf.GGUFEndian.BIG
      ),
      "m.gguf is big-endian.*gguf-convert-endian",
    ),
    *(
      (
        lambda p, key=key, value=value: gguf_files.write(
          p,
          gguf_files.tensors(),
          extra=lambda w: w.add_float32(f"llama.{key}", value),
        ),
        f"m.gguf: (llama.)?{key}",
      )
      for key, value in {
        "rope.scaling.attn_factor": 0.5,
        "rope.scaling.yarn_ext_factor": 1.0,
        "rope.scaling.yarn_attn_factor": 0.5,
        "rope.scaling.yarn_beta_fast": 16.0,
        "rope.scaling.yarn_beta_slow": 2.0,
        "rope.scaling.yarn_log_multiplier": 0.1,
        "attention.scale": 0.5,
        "attention.clamp_kqv": 8.0,
        "logit_scale": 0.5,
        "final_logit_softcapping": 30.0,
      }.items()
    ),
    *(
      (
        lambda p, add=add: gguf_files.write(
          p, gguf_files.tensors(), extra=lambda w: add(w)
        ),
        f"m.gguf: {said}",
      )
      for add, said in (
        # Off is not what leaves these without effect.
        (lambda w: w.add_causal_attention(False), "llama.attention.causal"),
        (
          lambda w: w.add_float32("llama.rope.scaling.yarn_ext_factor", 0.0),
          "llama.rope.scaling.yarn_ext_factor=0",
        ),
        (
          lambda w: w.add_string("llama.rope.scaling.factor", "4"),
          "llama.rope.scaling.factor must be a number, got '4'",
        ),
        (
          lambda w: w.add_string("tokenizer.ggml.eos_token_id", "2"),
          "tokenizer.ggml.eos_token_id must be an integer.*'2'",
        ),
      )
    ),
    (
      lambda p: gguf_files.write(
        p,
        gguf_files.tensors()
        | {"rope_freqs.weight": np.ones(gguf_files.HEAD_DIM // 2, np.float32)},
        extra=lambda w: w.add_rope_scaling_factor(4.0),
      ),
      "rope_freqs.weight and rope.scaling.factor=4",
    ),
    (
      lambda p: gguf_files.write(
        p, gguf_files.tensors(), extra=lambda w: w.add_vocab_size(41)
      ),
      "vocab_size=41, but token_embd.weight has 40 rows",
    ),
    (
      lambda p: gguf_files.write(
        p, gguf_files.tensors(), extra=lambda w: w.add_value_length(4)
      ),
      "attention.value_length=4",
    ),
  ],
)
def test_damaged_files_are_named(path, damage, said):
  damage(path)
  with pytest.raises(ValueError, match=said) as error:
    convert.load_model(path)
  assert "\n" not in str(error.value)


def test_lists_that_nest_too_deep_are_named(tmp_path):
  path = tmp_path / "m.gguf"
  key = b"x" * 8
  content = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
  content += struct.pack("<Q", 8) + key + struct.pack("<I", 9)
  path.write_bytes(content + struct.pack("<IQ", 9, 1) * 5000)
  with pytest.raises(ValueError, match="m.gguf is not a GGUF file"):
    convert.load_model(path)


def test_a_list_longer_than_its_file_is_named(tmp_path):
  path = tmp_path / "m.gguf"
  content = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"x"
  path.write_bytes(content + struct.pack("<IIQ", 9, 0, 1 << 60))
  with pytest.raises(ValueError, match="a list of 1,152,921,504,606,846,976"):
    convert.load_model(path)


@pytest.mark.parametrize(
  ("name", "value"),
  [("tokens", 3), ("tokens", [1]), ("merges", [1]), ("model", ["gpt2"])],
)
def test_a_vocabulary_of_the_wrong_type_is_named(tmp_path, name, value):
  path, name = tmp_path / "m.gguf", f"tokenizer.ggml.{name}"

  def add(writer):
    (writer.add_array if isinstance(value, list) else writer.add_uint32)(
      name, value
    )

  gguf_files.write(path, gguf_files.tensors(), extra=add)
  with pytest.raises(ValueError, match=f"{name} has the wrong type"):
    GgufFile(path).vocabulary(name.rpartition(".")[2])


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="none.gguf"):
    convert.load_model(tmp_path / "none.gguf")
