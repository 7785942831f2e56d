"""GGUF files, written by the gguf library as llama.cpp lays them out."""

import json

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from scca_jax import convert, patterns, tokenizer
from scca_jax.gguf_file import GgufFile
from scca_jax.rope import RopeScaling

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCAB = 4, 2, 8, 32, 64, 40
LAYERS = 2
SHAPES = {
  "token_embd": (VOCAB, HIDDEN),
  "output_norm": (HIDDEN,),
  "output": (VOCAB, HIDDEN),
} | {
  f"blk.{i}.{name}": shape
  for i in range(LAYERS)
  for name, shape in {
    "attn_norm": (HIDDEN,),
    "attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
  }.items()
}


def _tensors(tied=False):
  rng = np.random.default_rng(0)
  return {
    f"{name}.weight": rng.normal(size=shape).astype(np.float32)
    for name, shape in SHAPES.items()
    if not (tied and name == "output")
  }


def _write(path, tensors, kind=None, arch="llama", extra=None, theta=5000.0):
  """Writes a file; matrices are quantised to `kind`."""
  writer = gguf.GGUFWriter(path, arch)
  writer.add_context_length(64)
  writer.add_embedding_length(HIDDEN)
  writer.add_block_count(LAYERS)
  writer.add_feed_forward_length(INNER)
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(KV_HEADS)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(theta)
  writer.add_rope_dimension_count(HEAD_DIM)
  if extra is not None:
    extra(writer)
  for name, value in tensors.items():
    if kind is not None and value.ndim == 2:
      writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    else:
      writer.add_tensor(name, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture
def path(tmp_path):
  return _write(tmp_path / "m.gguf", _tensors())


def _logits(model):
  tokens = jnp.arange(11, dtype=jnp.int32)[None]
  return np.asarray(model(tokens, patterns=patterns.dense(HEADS)))


def _neighbours_rotate(weight, heads):
  """Rows as llama.cpp has them: channel i, then channel i + head_dim / 2."""
  rows = []
  for head in weight.reshape(heads, HEAD_DIM, -1):
    for i in range(HEAD_DIM // 2):
      rows += [head[i], head[i + HEAD_DIM // 2]]
  return np.stack(rows)


def test_a_gguf_file_is_the_same_model_as_its_hugging_face_folder(tmp_path):
  tensors = _tensors()
  in_file = dict(tensors)
  for i in range(LAYERS):
    for name, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
      key = f"blk.{i}.{name}.weight"
      in_file[key] = _neighbours_rotate(tensors[key], heads)
  model = convert.load_model(_write(tmp_path / "m.gguf", in_file))
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
  assert (config.num_heads, config.num_kv_heads) == (HEADS, KV_HEADS)
  assert (config.hidden_size, config.intermediate_size) == (HIDDEN, INNER)
  assert (config.num_layers, config.vocab_size) == (LAYERS, VOCAB)
  assert (config.head_dim, config.context_len) == (HEAD_DIM, 64)
  assert (config.rope_theta, config.rope_scaling) == (5000.0, None)
  assert not config.tie_embeddings


def test_without_an_output_tensor_the_embeddings_are_tied(tmp_path):
  path = _write(tmp_path / "m.gguf", _tensors(tied=True))
  assert convert.load_config(path).tie_embeddings
  assert convert.load_model(path).lm_head is None


@pytest.mark.parametrize(
  ("kind", "tolerance"),
  [("F16", 2e-3), ("BF16", 1e-2), ("Q8_0", 0.03), ("Q4_0", 0.6), ("Q4_1", 0.4)],
)
def test_quantised_tensors_are_read(tmp_path, kind, tolerance):
  tensors = _tensors()
  path = _write(
    tmp_path / "m.gguf", tensors, getattr(gguf.GGMLQuantizationType, kind)
  )
  kernel = convert.load_model(path).layers.mlp.up_proj.kernel[...]
  for i in range(LAYERS):
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
  tensors = _tensors()
  rows = HIDDEN * INNER // 256
  name = "blk.0.ffn_up.weight"
  del tensors[name]

  def add(writer):
    data = np.tile(block, (INNER, 1))[: INNER // 8].reshape(INNER // 8, 144)
    assert len(data) == rows
    writer.add_tensor(
      name,
      data,
      raw_shape=data.shape,
      raw_dtype=gguf.GGMLQuantizationType.Q4_K,
    )

  # 256 weights a row: as [8, 256], which the shape of the model is not.
  path = _write(tmp_path / "m.gguf", tensors, extra=add)
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
  ],
)
def test_rope_scaling_is_read(tmp_path, extra, wanted):
  path = _write(tmp_path / "m.gguf", _tensors(), extra=extra)
  assert convert.load_config(path).rope_scaling == wanted


def test_the_rope_scaling_of_llama_3_is_read_from_its_tensor(tmp_path):
  # The formula of llama.cpp's converter.
  exponents = np.arange(0, HEAD_DIM, 2) / HEAD_DIM
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
  tensors = _tensors() | {"rope_freqs.weight": np.array(factors, np.float32)}
  path = _write(tmp_path / "m.gguf", tensors, theta=5e5)
  assert convert.load_model(path).config.rope_scaling == RopeScaling(
    kind="llama3", factor=8.0, original_max_position_embeddings=8192
  )
  tensors["rope_freqs.weight"] = np.array([1, 2, 3, 8], np.float32)
  path = _write(tmp_path / "n.gguf", tensors, theta=5e5)
  with pytest.raises(ValueError, match="Llama 3.1 to 3.3"):
    convert.load_config(path)


def _truncate(path):
  path.write_bytes(path.read_bytes()[:-100])


def _rename(path, old, new):
  tensors = _tensors()
  tensors[new] = tensors.pop(old)
  _write(path, tensors)


def _swap_shapes(path):
  tensors = _tensors()
  tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"].T.copy()
  _write(path, tensors)


def _nan(path):
  tensors = _tensors()
  tensors["blk.0.attn_q.weight"][2, 3] = np.nan
  _write(path, tensors)


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
      lambda p: _write(
        p, {k: v for k, v in _tensors().items() if "0.attn_v" not in k}
      ),
      "lacks the tensor blk.0.attn_v.weight",
    ),
    (_swap_shapes, r"blk.1.ffn_up.weight is \[32, 64\].*\[64, 32\]"),
    (_nan, "blk.0.attn_q.weight holds a NaN"),
    (lambda p: _write(p, _tensors(), arch="qwen2"), "'qwen2'"),
    (
      lambda p: _write(p, _tensors(), extra=lambda w: w.add_expert_count(8)),
      "8 experts",
    ),
    (
      lambda p: _write(p, _tensors(), extra=lambda w: w.add_key_length(0)),
      r"m.gguf: llama.attention.key_length must be an integer.* got 0\.",
    ),
    (
      lambda p: _write(
        p,
        _tensors(),
        extra=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
      ),
      "m.gguf: llama.rope.scaling.factor is missing",
    ),
  ],
)
def test_damaged_files_are_named(path, damage, said):
  damage(path)
  with pytest.raises(ValueError, match=said) as error:
    convert.load_model(path)
  assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="none.gguf"):
    convert.load_model(tmp_path / "none.gguf")


# Vocabularies.

TEXTS = [
  "The ship  sailed over a grey sea;\n\n\tnobody saw 1,234 of them.",
  "Grüße, 世界! Привет — déjà vu 🙂",
  "def f(x):\n    return x ** 2  # twice\n",
]


def _sentencepiece_vocabulary(path):
  """Puts the vocabulary of a SentencePiece model in a file, by its pieces."""
  processor = sentencepiece.SentencePieceProcessor(model_file=str(path))

  def extra(writer):
    size = processor.get_piece_size()
    kinds = []
    for i in range(size):
      kind = gguf.TokenType.NORMAL
      if processor.is_unknown(i):
        kind = gguf.TokenType.UNKNOWN
      elif processor.is_control(i):
        kind = gguf.TokenType.CONTROL
      elif processor.is_byte(i):
        kind = gguf.TokenType.BYTE
      kinds.append(kind)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([processor.id_to_piece(i) for i in range(size)])
    writer.add_token_scores([processor.get_score(i) for i in range(size)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

  return extra


def test_a_sentencepiece_vocabulary_cuts_text_as_its_model_does(tmp_path):
  trained = tokenizer.train(TEXTS * 20, 340, tmp_path / "t.model")
  tensors = _tensors()
  tensors["token_embd.weight"] = np.zeros((340, HIDDEN), np.float32)
  tensors["output.weight"] = np.zeros((340, HIDDEN), np.float32)
  path = _write(
    tmp_path / "m.gguf",
    tensors,
    extra=_sentencepiece_vocabulary(tmp_path / "t.model"),
  )
  words = tokenizer.load(path)
  assert (words.vocab_size, words.bos_id, words.eos_id) == (340, 1, 2)
  assert words.adds_bos
  for text in TEXTS:
    assert words.encode(text) == trained.encode(text)
    assert words.decode(words.encode(text)) == text
  # As a folder of its own.
  convert.copy_tokenizer(path, tmp_path / "out")
  assert tokenizer.load(tmp_path / "out").encode(TEXTS[0]) == trained.encode(
    TEXTS[0]
  )


def _byte_pair_vocabulary(pre):
  # Bytes as GPT-2 writes them, some merges, and two special tokens.
  from tokenizers.pre_tokenizers import ByteLevel

  tokens = ["<|end|>", "<|pad|>", *sorted(ByteLevel.alphabet())]
  merges = [("t", "h"), ("th", "e"), ("1", "2"), ("Ġ", "s"), ("Ġ", "Ġ")]
  tokens += ["".join(merge) for merge in merges]

  def extra(writer):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(0)

  return extra, tokens


@pytest.mark.parametrize(
  ("pre", "digits"), [("gpt-2", ["12", "3"]), ("smollm", ["1", "2", "3"])]
)
def test_byte_pairs_are_cut_as_their_name_says(tmp_path, pre, digits):
  extra, tokens = _byte_pair_vocabulary(pre)
  path = _write(tmp_path / "m.gguf", _tensors(), extra=extra)
  words = tokenizer.load(path)
  assert (words.bos_id, words.eos_id, words.adds_bos) == (None, 0, False)
  cut = [tokens[i] for i in words.encode("the 123 sea")]
  assert cut == ["the", "Ġ", *digits, "Ġs", "e", "a"]
  for text in TEXTS:
    assert words.decode(words.encode(text)) == text
  # Special tokens that the text spells are text.
  assert 0 not in words.encode("<|end|>")
  convert.copy_tokenizer(path, tmp_path / "out")
  copied = tokenizer.load(tmp_path / "out")
  assert copied.encode(TEXTS[1]) == words.encode(TEXTS[1])
  settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
  assert settings["eos_token"] == "<|end|>"


def test_llama_3_numbers_come_in_threes(tmp_path):
  extra, tokens = _byte_pair_vocabulary("llama-bpe")
  words = tokenizer.load(_write(tmp_path / "m.gguf", _tensors(), extra=extra))
  cut = [tokens[i] for i in words.encode("the 1231 23")]
  assert cut == ["the", "Ġ", "12", "3", "1", "Ġ", "2", "3"]


@pytest.mark.parametrize(
  ("extra", "said"),
  [
    (_byte_pair_vocabulary("other-cut")[0], "'other-cut'"),
    (lambda w: w.add_tokenizer_model("bert"), "'bert'"),
    (lambda w: w.add_tokenizer_model("llama"), "no vocabulary"),
  ],
)
def test_unknown_vocabularies_are_named(tmp_path, extra, said):
  path = _write(tmp_path / "m.gguf", _tensors(), extra=extra)
  with pytest.raises(ValueError, match=said):
    tokenizer.load(path)
