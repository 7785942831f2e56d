"""Reads models from GGUF files: sizes and weights.

The `gguf` library reads the file and dequantises. This module translates the
names and undoes what llama.cpp changes when it writes a LLaMA: query and key
rows are permuted to rotate neighbouring channels, and Llama 3.1's rope scaling
becomes a tensor. Metadata is interpreted as llama.cpp interprets it; keys with
an unknown effect are refused. `gguf_tokenizer` turns the vocabulary into a
tokenizer.

The parts: keys and tokens as llama.cpp knows them, names and channels of
weights, and `GgufFile`.
"""

import functools
import math
import os
import pathlib
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from scca_jax import rope
from scca_jax.llama_config import PROJECTIONS, LlamaConfig
from scca_jax.rope import RopeScaling

SUFFIX = ".gguf"

_NAMES = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
  "attn_norm": "input_layernorm",
  "ffn_norm": "post_attention_layernorm",
  **{p.gguf_name: f"{p.module}.{name}" for name, p in PROJECTIONS.items()},
}
_GGUF_NAMES = {theirs: own for own, theirs in _NAMES.items()}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
ROPE_FACTORS = "rope_freqs.weight"
_PIECE = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")
# Keys that we read, then keys that are allowed at the values that change
# nothing. All others must be off: 0, false or empty.
_READ = (
  "vocab_size",
  "context_length",
  "embedding_length",
  "feed_forward_length",
  "block_count",
  "expert_count",
  "attention.head_count",
  "attention.head_count_kv",
  "attention.key_length",
  "attention.value_length",
  "attention.layer_norm_rms_epsilon",
  "rope.dimension_count",
  "rope.freq_base",
  "rope.scale_linear",
  "rope.scaling.type",
  "rope.scaling.factor",
  "rope.scaling.original_context_length",
  "rope.scaling.attn_factor",
  # Only says how the file was made.
  "tensor_data_layout",
  "rope.scaling.finetuned",
)
_WITHOUT_EFFECT = {
  "attention.causal": (True,),
  "logit_scale": (0.0, 1.0),
  "residual_scale": (0.0, 1.0),
  "embedding_scale": (0.0, 1.0),
  "rope.scaling.yarn_ext_factor": (-1.0,),
  "rope.scaling.yarn_attn_factor": (1.0,),
  "rope.scaling.yarn_beta_fast": (32.0,),
  "rope.scaling.yarn_beta_slow": (1.0,),
}
# Types of the vocabulary's fields, or of the items of those that are lists.
_VOCABULARY_LISTS = ("tokens", "merges", "token_type", "scores")
_VOCABULARY: dict[str, Any] = {
  "model": str,
  "pre": str,
  "tokens": str,
  "merges": str,
  "token_type": int,
  "scores": int | float,
}
# llama.cpp's default special tokens, by the kind of vocabulary.
_USUAL_IDS = {
  "llama": {"bos": 1, "eos": 2, "unknown": 0},
  "gpt2": {"bos": 11, "eos": 11},
}
# Tokens that always end generation in llama.cpp, whatever the metadata says:
# ends of a text or turn, then the padding and separators of infilling.
_END_TEXTS = (
  "</s>",
  "<eos>",
  "[EOS]",
  "<|end_of_text|>",
  "<|endoftext|>",
  "<|eot_id|>",
  "<|eom_id|>",
  "<|im_end|>",
  "<|end|>",
  "<end_of_turn>",
  "<end_of_utterance>",
  "<EOT>",
  "_<EOT>",
  "[EOT]",
  "[e~[",
  "<|return|>",
  "<|call|>",
  "<|calls|>",
  "<|flush|>",
  "<turn|>",
  "<|tool_response>",
  "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
# Of these, tokens that do not end generation if the vocabulary has all tokens
# of one of the sets.
_NO_END_BESIDE = {
  "<|end|>": ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"}),
  "</s>": ({"<|tool_response>"},),
}
_INFILL_TEXTS = {
  "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
  "fim_rep": (
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
  ),
  "fim_sep": ("<|file_sep|>",),
}
# Byte-pair vocabularies whose texts begin with BOS by default.
LLAMA_3_PRE_TOKENIZERS = ("llama-bpe", "llama3", "llama-v3")


def _hugging_face_name(name: str) -> str:
  """Returns the Hugging Face name of a tensor; its own if it has none."""
  layer = _LAYER_TENSOR.fullmatch(name)
  if layer is not None and layer.group(2) in _NAMES:
    return f"model.layers.{layer.group(1)}.{_NAMES[layer.group(2)]}.weight"
  stem = name.removesuffix(".weight")
  return f"{_NAMES[stem]}.weight" if stem in _NAMES else name


def gguf_name(name: str) -> str:
  """Returns a tensor's name in GGUF files, given its Hugging Face name.

  Names without a counterpart are returned unchanged.
  """
  layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
  stem = layer.group(2) if layer else name.removesuffix(".weight")
  if stem not in _GGUF_NAMES:
    return name
  prefix = f"blk.{layer.group(1)}." if layer else ""
  return f"{prefix}{_GGUF_NAMES[stem]}.weight"


def _channels_apart(weight: np.ndarray, num_heads: int) -> np.ndarray:
  """Undoes llama.cpp's order of query and key rows.

  llama.cpp rotates channels `2i` and `2i + 1` of a head together; we rotate `i`
  and `i + head_dim / 2`.
  """
  pairs = weight.reshape(num_heads, -1, 2, weight.shape[-1])
  return pairs.swapaxes(1, 2).reshape(weight.shape)


def channels_together(weight: np.ndarray, num_heads: int) -> np.ndarray:
  """Returns query or key rows in llama.cpp's order.

  Channels `i` and `i + head_dim / 2` of a head become neighbours.

  Args:
    weight: `[heads * head_dim, in]`.
    num_heads: Number of heads.
  """
  halves = weight.reshape(num_heads, 2, -1, weight.shape[-1])
  return halves.swapaxes(1, 2).reshape(weight.shape)


def _open(path: pathlib.Path) -> Any:
  """Returns the gguf library's reader of one file.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: It is damaged or has the other byte order.
  """
  import gguf

  class Reader(gguf.GGUFReader):
    """Reads vocabularies in a third of the time: memmap's slices are slow."""

    def _build_fields(self, *args: Any) -> Any:
      self.data: Any = self.data.view(np.ndarray)
      return super()._build_fields(*args)

    def _get_field_parts(self, offs: int, kind: int) -> Any:
      # The library goes through all items of a list, even beyond the end.
      if kind == gguf.GGUFValueType.ARRAY:
        (length,) = self._get(offs + 4, np.uint64)
        if length > len(self.data) - offs:
          raise ValueError(f"a list of {length:,} items")
      return super()._get_field_parts(offs, kind)

  if not path.is_file():
    raise FileNotFoundError(f"the GGUF file {path} does not exist.")
  try:
    reader = Reader(path)
    for name, field in reader.fields.items():
      if not name.startswith("tokenizer.ggml."):
        field.contents()
  except (
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    RecursionError,
  ) as error:
    raise ValueError(
      f"{path} is not a GGUF file, or is damaged or cut short ({error}): copy"
      " it again."
    ) from error
  if reader.byte_order == "S":
    order = reader.endianess.name.lower()
    raise ValueError(
      f"{path} is {order}-endian, unlike this machine: convert it with"
      f" `gguf-convert-endian {path.name} native` of the gguf package."
    )
  return reader


def _fitted_bounds(
  factors: np.ndarray, plain: np.ndarray, length: int
) -> Iterator[tuple[float, float]]:
  """Yields Llama 3's low and high frequency factors that explain a file.

  Between the two, the share of a frequency that is kept is linear in the
  frequency.

  Args:
    factors: Divisors of the frequencies, `[head_dim / 2]`.
    plain: The unscaled frequencies, like `factors`.
    length: The pretrained length in tokens, which the bounds are relative to.
  """
  largest = factors.max()
  between = (factors > 1) & (factors < largest)
  if between.sum() < 2:
    return
  kept = (1 / factors - 1 / largest) / (1 - 1 / largest)
  slope, start = np.polyfit(
    plain[between].astype(np.float64), kept[between].astype(np.float64), 1
  )
  width = length / (2 * math.pi * slope)
  low, high = -start * width, (1 - start) * width
  if 0 < low < high:
    yield round(low, 4), round(high, 4)
    yield float(low), float(high)


class GgufFile(Mapping[str, Callable[[], np.ndarray]]):
  """A model of the Llama architecture in a GGUF file.

  It maps the Hugging Face name of each tensor to a function that reads it:
  dequantised, float32, in Hugging Face's layout.

  Attributes:
    path: The file.
    config: Sizes of the model.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Opens a file and checks its metadata; tensors are read later.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It is damaged, or not a model of the Llama architecture.
    """
    # Imported here because only GGUF files need it.
    import gguf

    self.path = pathlib.Path(path)
    self._reader = _open(self.path)
    self._fields = {
      name: field.contents()
      for name, field in self._reader.fields.items()
      # Long, and mostly needed by the tokenizer.
      if not name.startswith("tokenizer.ggml.")
    }
    self._tensors = {}
    for piece in self._pieces():
      for tensor in piece.tensors:
        if tensor.name in self._tensors:
          raise ValueError(
            f"{self.path}: two pieces have the tensor {tensor.name}: copy all"
            " of them again."
          )
        self._tensors[tensor.name] = tensor
    total = self._fields.get("split.tensors.count", len(self._tensors))
    if total != len(self._tensors):
      raise ValueError(
        f"{self.path}: its pieces have {len(self._tensors)} tensors instead of"
        f" {total}: copy all of them again."
      )
    self._dequantize = gguf.dequantize
    self._names = {
      _hugging_face_name(name): name
      for name in self._tensors
      if name != ROPE_FACTORS
    }
    self.config = self._read_config()

  def _pieces(self) -> Iterator[Any]:
    """Yields the reader of each file that the model is split into."""
    yield self._reader
    count = self._fields.get("split.count", 0)
    if count < 2:
      return
    name = _PIECE.fullmatch(self.path.name)
    if name is None or int(name.group(2)) != count:
      raise ValueError(
        f"{self.path} is one of {count} pieces of a split model: name it as"
        f" llama.cpp does, such as model-00001-of-{count:05d}.gguf."
      )
    stem = name.group(1)
    if self._fields.get("split.no", 0) != 0:
      raise ValueError(
        f"{self.path} is not the first piece of a split model: give"
        f" {stem}-00001-of-{count:05d}.gguf."
      )
    for i in range(2, count + 1):
      path = self.path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf")
      piece = _open(path)
      field = piece.get_field("split.no")
      if field is None or field.contents() != i - 1:
        raise ValueError(
          f"{path} is not piece {i} of a split model: copy it again."
        )
      yield piece

  def name_in_file(self, name: str) -> str:
    """Returns a tensor's name in the file, given its Hugging Face name."""
    return self._names.get(name) or gguf_name(name)

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor, given its Hugging Face name."""
    return tuple(int(n) for n in self._tensors[self._names[name]].shape[::-1])

  def _values(self, name: str) -> np.ndarray:
    tensor = self._tensors[name]
    try:
      values = self._dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
      raise ValueError(
        f"{self.path}: the gguf library does not dequantise"
        f" {tensor.tensor_type.name}, the type of {name}: convert the file to"
        " another, such as Q8_0."
      ) from error
    return values.reshape([int(n) for n in tensor.shape[::-1]])

  def __getitem__(self, name: str) -> Callable[[], np.ndarray]:
    """Returns a function that reads the tensor."""
    in_file = self._names[name]

    def read() -> np.ndarray:
      values = self._values(in_file)
      for suffix, num_heads in (
        ("q_proj.weight", self.config.num_heads),
        ("k_proj.weight", self.config.num_kv_heads),
      ):
        # The caller refuses a tensor of another size.
        if name.endswith(suffix) and values.shape[0] == (
          num_heads * self.config.head_dim
        ):
          values = _channels_apart(values, num_heads)
      return values

    return read

  def __iter__(self) -> Iterator[str]:
    """Returns the Hugging Face names."""
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)

  # The metadata.

  def _field(self, name: str, default: Any = None) -> Any:
    return self._fields.get(f"llama.{name}", default)

  def _required(self, name: str) -> Any:
    value = self._field(name)
    if value is None:
      raise ValueError(f"llama.{name} is missing in its metadata.")
    return value

  def _size(self, name: str, default: int | None = None) -> int:
    value = self._field(name, default)
    if value is None:
      value = self._required(name)
    if not isinstance(value, int) or value < 1:
      raise ValueError(
        f"llama.{name} must be an integer of at least 1, got {value!r}."
      )
    return value

  def _number(self, name: str, default: float | None = None) -> float:
    value: Any = self._required(name) if default is None else self._field(name)
    value = default if value is None else value
    if type(value) not in (int, float):
      raise ValueError(f"llama.{name} must be a number, got {value!r}.")
    return float(value)

  def _read_config(self) -> LlamaConfig:
    architecture = self._fields.get("general.architecture")
    if architecture != "llama":
      raise ValueError(
        f"{self.path} holds a model of the architecture {architecture!r}:"
        " only 'llama' can be read."
      )
    if self._field("expert_count"):
      raise ValueError(
        f"{self.path} holds a mixture of {self._field('expert_count')} experts:"
        " only dense models can be read."
      )
    for key, value in self._fields.items():
      name = key.removeprefix("llama.")
      harmless = value in _WITHOUT_EFFECT.get(name, ()) or (
        not value and name not in _WITHOUT_EFFECT
      )
      if name == key or name in _READ or harmless:
        continue
      raise ValueError(
        f"{self.path}: {key}={reprlib.repr(value)} is not supported."
      )
    embedding = self._tensors.get("token_embd.weight")
    if embedding is None:
      raise ValueError(f"{self.path} lacks the tensor token_embd.weight.")
    bos_id, ends = self.special_id("bos"), self.end_ids()
    try:
      return self._read_sizes(int(embedding.shape[-1]), bos_id, ends)
    except (TypeError, ValueError) as error:
      raise ValueError(f"{self.path}: {error}") from error

  def _read_sizes(
    self, vocab_size: int, bos_id: int | None, ends: tuple[int, ...]
  ) -> LlamaConfig:
    num_heads = self._size("attention.head_count")
    hidden_size = self._size("embedding_length")
    head_dim = self._size("attention.key_length", hidden_size // num_heads)
    values = self._size("attention.value_length", head_dim)
    if values != head_dim:
      raise ValueError(
        f"attention.value_length={values} is not supported, only the head_dim"
        f" {head_dim}."
      )
    if self._size("vocab_size", vocab_size) != vocab_size:
      raise ValueError(
        f"vocab_size={self._field('vocab_size')}, but token_embd.weight has"
        f" {vocab_size} rows: copy it again."
      )
    rotated = self._size("rope.dimension_count", head_dim)
    if rotated != head_dim:
      raise ValueError(
        f"rope.dimension_count={rotated} is not supported, only the head_dim"
        f" {head_dim}."
      )
    context_len = self._size("context_length")
    theta = self._number("rope.freq_base", 10000.0)
    return LlamaConfig(
      vocab_size=vocab_size,
      hidden_size=hidden_size,
      intermediate_size=self._size("feed_forward_length"),
      num_layers=self._size("block_count"),
      num_heads=num_heads,
      num_kv_heads=self._size("attention.head_count_kv", num_heads),
      head_dim=head_dim,
      context_len=context_len,
      rope_theta=theta,
      rope_scaling=self._read_rope_scaling(head_dim, theta, context_len),
      rms_norm_eps=self._number("attention.layer_norm_rms_epsilon"),
      tie_embeddings="output.weight" not in self._tensors,
      bos_token_id=bos_id,
      eos_token_id=ends[0] if len(ends) == 1 else ends or None,
    )

  def _read_rope_scaling(
    self, head_dim: int, theta: float, context_len: int
  ) -> RopeScaling | None:
    # A factor alone means linear.
    kind = self._field("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
      raise ValueError(f"unknown rope scaling {kind!r}.")
    # The key used before there were kinds.
    factor = self._number("rope.scale_linear", 0.0)
    factor = self._number("rope.scaling.factor", factor)
    if not factor and self._field("rope.scaling.type") in ("linear", "yarn"):
      raise ValueError("llama.rope.scaling.factor is missing in its metadata.")
    factor = 1.0 if kind == "none" else factor or 1.0
    attention = self._number("rope.scaling.attn_factor", 1.0)
    is_llama_3 = ROPE_FACTORS in self._tensors
    if attention != 1 and (kind != "yarn" or is_llama_3):
      raise ValueError(
        f"rope.scaling.attn_factor={attention:g} is supported for yarn rope"
        " scaling only."
      )
    if is_llama_3:
      if factor != 1:
        raise ValueError(
          f"both the tensor {ROPE_FACTORS} and rope.scaling.factor="
          f"{factor:g} scale the rope: only one of them is supported."
        )
      return self._llama_3_scaling(head_dim, theta)
    if kind == "linear":
      return None if factor == 1 else RopeScaling(kind=kind, factor=factor)
    if kind == "none":
      return None
    length = self._size("rope.scaling.original_context_length", context_len)
    return RopeScaling(
      kind="yarn",
      factor=factor,
      original_max_position_embeddings=length,
      # Applied on top of YaRN's own factor.
      attention_factor=None
      if attention == 1
      else attention * (0.1 * math.log(factor) + 1),
    )

  def _llama_3_scaling(self, head_dim: int, theta: float) -> RopeScaling:
    """Returns the scaling that the file's frequency divisors come from."""
    factors = self._values(ROPE_FACTORS)
    plain, _ = rope.frequencies(head_dim, theta, None, 1)
    # llama.cpp's converter leaves it out; Llama 3.1 to 3.3 have 8,192.
    length = self._size("rope.scaling.original_context_length", 8192)
    if factors.shape == plain.shape:
      for low, high in ((1.0, 4.0), *_fitted_bounds(factors, plain, length)):
        scaling = RopeScaling(
          kind="llama3",
          factor=float(factors.max()),
          original_max_position_embeddings=length,
          low_freq_factor=low,
          high_freq_factor=high,
        )
        scaled, _ = rope.frequencies(head_dim, theta, scaling, 1)
        if np.allclose(plain / factors, scaled, rtol=1e-4, atol=0):
          return scaling
    raise ValueError(f"{ROPE_FACTORS} is not a rope scaling of Llama 3's kind.")

  # The vocabulary.

  def vocabulary(self, name: str, default: Any = None) -> Any:
    """Returns a field of the tokenizer's metadata, `default` if missing."""
    field = self._reader.get_field(f"tokenizer.ggml.{name}")
    if field is None:
      return default
    value = field.contents()
    kind = _VOCABULARY.get(name)
    items = value if name in _VOCABULARY_LISTS else [value]
    if kind is not None and (
      not isinstance(items, list) or not all(isinstance(x, kind) for x in items)
    ):
      raise ValueError(
        f"{self.path}: tokenizer.ggml.{name} has the wrong type, got"
        f" {reprlib.repr(value)}: copy it again."
      )
    return value

  def tokenizer_fields(self) -> dict[str, Any]:
    """Returns all of the tokenizer's metadata, its chat template included."""
    return {
      name: field.contents()
      for name, field in self._reader.fields.items()
      if name.startswith("tokenizer.")
    }

  def flag(self, name: str, default: bool) -> bool:
    """Returns a field of the tokenizer's metadata that is true or false."""
    value = self.vocabulary(name, default)
    if type(value) is not bool:
      raise ValueError(
        f"{self.path}: tokenizer.ggml.{name} must be true or false, got"
        f" {reprlib.repr(value)}."
      )
    return value

  def special_id(self, kind: str) -> int | None:
    """Returns the id of the "bos", "eos" or another token, or None.

    Like llama.cpp, falls back to the default of the kind of vocabulary.
    """
    token = self.vocabulary(f"{kind}_token_id")
    if token is not None and (type(token) is not int or token < 0):
      raise ValueError(
        f"{self.path}: tokenizer.ggml.{kind}_token_id must be an integer of at"
        f" least 0, got {reprlib.repr(token)}."
      )
    if not self._num_tokens or (token is not None and token < self._num_tokens):
      return token
    model = self.vocabulary("model")
    if model == "gpt2" and kind == "bos" and not self.adds_bos:
      # A token that never begins a text is of no use here.
      return None
    usual = _USUAL_IDS.get(model, {}).get(kind)
    return usual if usual is not None and usual < self._num_tokens else None

  @functools.cached_property
  def _num_tokens(self) -> int:
    return len(self.vocabulary("tokens", ()))

  def end_ids(self) -> tuple[int, ...]:
    """Returns the tokens that end generation in llama.cpp, EOS first."""
    id_of: dict[str, int] = {}
    for i, token in enumerate(self.vocabulary("tokens", [])):
      id_of.setdefault(token, i)
    first = self.special_id("eos")
    texts = {text for text in _END_TEXTS if text in id_of}
    for text, sets in _NO_END_BESIDE.items():
      if any(others <= texts for others in sets):
        texts.discard(text)
        first = None if first == id_of.get(text) else first
    ends = {id_of[text] for text in texts}
    ends |= {self.special_id("eot"), self.special_id("eom")}
    for kind, names in _INFILL_TEXTS.items():
      token = self.special_id(kind)
      found = [id_of[name] for name in names if name in id_of]
      ends.add(min(found, default=None) if token is None else token)
    others = sorted(ends - {None, first})  # pyright: ignore
    return tuple(i for i in (first, *others) if i is not None)

  @property
  def chat_template(self) -> str | None:
    """The chat template, in Jinja; None if the file has none."""
    return self._fields.get("tokenizer.chat_template")

  @property
  def adds_bos(self) -> bool:
    """Whether a prompt begins with BOS."""
    default = (
      self.vocabulary("model") == "llama"
      or self.vocabulary("pre") in LLAMA_3_PRE_TOKENIZERS
    )
    return self.flag("add_bos_token", default)

  @property
  def adds_eos(self) -> bool:
    """Whether a prompt ends with EOS."""
    return self.flag("add_eos_token", False)
