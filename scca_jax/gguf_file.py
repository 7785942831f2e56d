"""Models in GGUF files: sizes and weights.

The `gguf` library reads the file and dequantises; here are the names, and what
llama.cpp changes when it writes a LLaMA: query and key rows are permuted to
rotate neighbouring channels, and the rope scaling of Llama 3.1 is a tensor.
`gguf_tokenizer` makes a tokenizer of the vocabulary.
"""

import os
import pathlib
import re
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
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_ROPE_FACTORS = "rope_freqs.weight"


def _hugging_face_name(name: str) -> str:
  """Returns the Hugging Face name of a tensor; its own if it has none."""
  layer = _LAYER_TENSOR.fullmatch(name)
  if layer is not None and layer.group(2) in _NAMES:
    return f"model.layers.{layer.group(1)}.{_NAMES[layer.group(2)]}.weight"
  stem = name.removesuffix(".weight")
  return f"{_NAMES[stem]}.weight" if stem in _NAMES else name


def _channels_apart(weight: np.ndarray, num_heads: int) -> np.ndarray:
  """Undoes llama.cpp's order of query and key rows.

  It rotates channels `2i` and `2i + 1` of a head; ours are `i` and
  `i + head_dim / 2`.
  """
  pairs = weight.reshape(num_heads, -1, 2, weight.shape[-1])
  return pairs.swapaxes(1, 2).reshape(weight.shape)


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
    # Imported here, so that only those who read GGUF pay for it.
    import gguf

    self.path = pathlib.Path(path)
    if not self.path.is_file():
      raise FileNotFoundError(f"there is no GGUF file {self.path}.")
    try:
      reader = gguf.GGUFReader(self.path)
      self._fields = {
        name: field.contents()
        for name, field in reader.fields.items()
        # Long, and only for the tokenizer.
        if not name.startswith("tokenizer.ggml.")
      }
    except (
      ValueError,
      IndexError,
      KeyError,
      TypeError,
      OverflowError,
    ) as error:
      raise ValueError(
        f"{self.path} is not a GGUF file, or is damaged or cut short"
        f" ({error}): copy it again."
      ) from error
    self._reader = reader
    self._tensors = {t.name: t for t in reader.tensors}
    self._dequantize = gguf.dequantize
    self._names = {
      _hugging_face_name(name): name
      for name in self._tensors
      if name != _ROPE_FACTORS
    }
    self.config = self._read_config()

  def name_in_file(self, name: str) -> str:
    """Returns the name in the file of a tensor, given its Hugging Face name."""
    if name in self._names:
      return self._names[name]
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    stem = layer.group(2) if layer else name.removesuffix(".weight")
    for own, theirs in _NAMES.items():
      if theirs == stem:
        return (
          f"blk.{layer.group(1)}.{own}.weight" if layer else f"{own}.weight"
        )
    return name

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
        # A tensor of another size is refused by the caller.
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
    embedding = self._tensors.get("token_embd.weight")
    if embedding is None:
      raise ValueError(f"{self.path} lacks the tensor token_embd.weight.")
    try:
      return self._read_sizes(embedding.shape[-1])
    except (TypeError, ValueError) as error:
      raise ValueError(f"{self.path}: {error}") from error

  def _read_sizes(self, vocab_size: int) -> LlamaConfig:
    num_heads = self._size("attention.head_count")
    hidden_size = self._size("embedding_length")
    head_dim = self._size("attention.key_length", hidden_size // num_heads)
    rotated = self._size("rope.dimension_count", head_dim)
    if rotated != head_dim:
      raise ValueError(
        f"rope.dimension_count={rotated} is not supported, only the head_dim"
        f" {head_dim}."
      )
    context_len = self._size("context_length")
    theta = float(self._field("rope.freq_base", 10000.0))
    return LlamaConfig(
      vocab_size=int(vocab_size),
      hidden_size=hidden_size,
      intermediate_size=self._size("feed_forward_length"),
      num_layers=self._size("block_count"),
      num_heads=num_heads,
      num_kv_heads=self._size("attention.head_count_kv", num_heads),
      head_dim=head_dim,
      context_len=context_len,
      rope_theta=theta,
      rope_scaling=self._read_rope_scaling(head_dim, theta, context_len),
      rms_norm_eps=float(self._required("attention.layer_norm_rms_epsilon")),
      tie_embeddings="output.weight" not in self._tensors,
      bos_token_id=self.special_id("bos"),
      eos_token_id=self.special_id("eos"),
    )

  def _read_rope_scaling(
    self, head_dim: int, theta: float, context_len: int
  ) -> RopeScaling | None:
    if _ROPE_FACTORS in self._tensors:
      return self._llama_3_scaling(head_dim, theta)
    kind = self._field("rope.scaling.type", "none")
    # The key of files from before there were kinds.
    factor = self._field("rope.scale_linear")
    if factor is not None:
      kind = "linear"
    if kind == "none":
      return None
    if kind not in ("linear", "yarn"):
      raise ValueError(f"unknown rope scaling {kind!r}.")
    length = self._field("rope.scaling.original_context_length", context_len)
    return RopeScaling(
      kind=kind,
      factor=float(factor or self._required("rope.scaling.factor")),
      original_max_position_embeddings=int(length) if kind == "yarn" else None,
    )

  def _llama_3_scaling(self, head_dim: int, theta: float) -> RopeScaling:
    """Returns the scaling whose frequencies the file holds, divided out."""
    factors = self._values(_ROPE_FACTORS)
    scaling = RopeScaling(
      kind="llama3",
      factor=float(factors.max()),
      # The same in every Llama 3.1 to 3.3.
      original_max_position_embeddings=8192,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
    )
    plain, _ = rope.frequencies(head_dim, theta, None, 1)
    scaled, _ = rope.frequencies(head_dim, theta, scaling, 1)
    if factors.shape != plain.shape or not np.allclose(
      plain / factors, scaled, rtol=1e-3
    ):
      raise ValueError(
        f"{_ROPE_FACTORS} is not the rope scaling of Llama 3.1 to 3.3."
      )
    return scaling

  # The vocabulary.

  def vocabulary(self, name: str, default: Any = None) -> Any:
    """Returns a field of the tokenizer's metadata, `default` if missing."""
    field = self._reader.get_field(f"tokenizer.ggml.{name}")
    return default if field is None else field.contents()

  def special_id(self, kind: str) -> int | None:
    """Returns the id of the "bos", "eos" or "unknown" token, or None."""
    token = self.vocabulary(f"{kind}_token_id")
    return None if token is None else int(token)

  @property
  def adds_bos(self) -> bool:
    """Whether a prompt begins with BOS."""
    default = self.vocabulary("model") == "llama"
    return bool(self.vocabulary("add_bos_token", default))
