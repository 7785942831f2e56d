"""The sizes of a Llama, and a table of the matrices in its layers."""

import dataclasses

from scca_jax.rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class Projection:
  """One of the matrices of every layer.

  Attributes:
    module: The part of the layer that contains it, "self_attn" or "mlp".
    inputs: Logical axis of its inputs: "hidden", "heads", "kv_heads" or
      "inner". `LlamaConfig.axis_size` gives its size, `sharding` how devices
      share it.
    outputs: Logical axis of its outputs.
    gguf_name: Its name in GGUF files.
  """

  module: str
  inputs: str
  outputs: str
  gguf_name: str


# Keyed by the name that Hugging Face, LoRA targets and `llama` share.
PROJECTIONS = {
  "q_proj": Projection("self_attn", "hidden", "heads", "attn_q"),
  "k_proj": Projection("self_attn", "hidden", "kv_heads", "attn_k"),
  "v_proj": Projection("self_attn", "hidden", "kv_heads", "attn_v"),
  "o_proj": Projection("self_attn", "heads", "hidden", "attn_output"),
  "gate_proj": Projection("mlp", "hidden", "inner", "ffn_gate"),
  "up_proj": Projection("mlp", "hidden", "inner", "ffn_up"),
  "down_proj": Projection("mlp", "inner", "hidden", "ffn_down"),
}

# A configuration beyond these is damaged. They are checked because work grows
# with layers and heads before any tensor is read.
_MAX_LAYERS = _MAX_HEADS = 4096
_MAX_SIZE = 1 << 31
_MAX_PARAMS = 10**13


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
  """Sizes of a model.

  Attributes:
    vocab_size: Number of tokens in the vocabulary.
    hidden_size: Width of the residual stream.
    intermediate_size: Width of the MLP.
    num_layers: Number of layers.
    num_heads: Number of query heads, a multiple of `num_kv_heads`.
    num_kv_heads: Number of key and value heads.
    head_dim: Width of a head, even.
    context_len: Longest sequence that the model is meant for, in tokens.
    rope_theta: Base of the rotary frequencies.
    rope_scaling: How they are adapted to the context; None leaves them alone.
    rms_norm_eps: Added to the mean square in the norms.
    tie_embeddings: Whether the output head is the embedding.
    initializer_range: Standard deviation of new weights.
    bos_token_id: Token that starts a document, if there is one.
    eos_token_id: Token, or several, that ends a document, if there is one.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  context_len: int
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  rms_norm_eps: float = 1e-5
  tie_embeddings: bool = False
  initializer_range: float = 0.02
  bos_token_id: int | None = None
  eos_token_id: int | tuple[int, ...] | None = None

  def __post_init__(self):
    for name, limit in (
      ("vocab_size", _MAX_SIZE),
      ("hidden_size", _MAX_SIZE),
      ("intermediate_size", _MAX_SIZE),
      ("num_layers", _MAX_LAYERS),
      ("num_heads", _MAX_HEADS),
      ("num_kv_heads", _MAX_HEADS),
      ("head_dim", _MAX_SIZE),
      ("context_len", _MAX_SIZE),
    ):
      if not 1 <= getattr(self, name) <= limit:
        raise ValueError(
          f"{name} must be 1 to {limit:,}, got {getattr(self, name):,}."
        )
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads={self.num_heads} must be a multiple of"
        f" num_kv_heads={self.num_kv_heads}."
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim must be even, got {self.head_dim}.")
    if not self.rope_theta > 1:
      raise ValueError(f"rope_theta must be above 1, got {self.rope_theta}.")
    for name in ("rms_norm_eps", "initializer_range"):
      if not getattr(self, name) > 0:
        raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
    for token in (self.bos_token_id, *self.eos_token_ids):
      if token is not None and not 0 <= token < self.vocab_size:
        raise ValueError(
          "bos_token_id and eos_token_id must be below"
          f" vocab_size={self.vocab_size}, got {token}."
        )

    if self._num_params() > _MAX_PARAMS:
      raise ValueError(
        f"these sizes make a model of {self._num_params():,} parameters: more"
        f" than {_MAX_PARAMS:,} are not supported."
      )

  def _num_params(self) -> int:
    """Returns the number of weights of all matrices."""
    shapes = [self.projection_shape(name) for name in PROJECTIONS]
    return self.vocab_size * self.hidden_size + self.num_layers * sum(
      inputs * outputs for inputs, outputs in shapes
    )

  @property
  def eos_token_ids(self) -> tuple[int, ...]:
    """The tokens that end a document."""
    if self.eos_token_id is None:
      return ()
    if isinstance(self.eos_token_id, int):
      return (self.eos_token_id,)
    return self.eos_token_id

  def axis_size(self, axis: str) -> int:
    """Returns the size of a logical axis of `PROJECTIONS`, in channels."""
    return {
      "hidden": self.hidden_size,
      "heads": self.num_heads * self.head_dim,
      "kv_heads": self.num_kv_heads * self.head_dim,
      "inner": self.intermediate_size,
    }[axis]

  def projection_shape(self, name: str) -> tuple[int, int]:
    """Returns the numbers of inputs and outputs of a projection."""
    projection = PROJECTIONS[name]
    return self.axis_size(projection.inputs), self.axis_size(projection.outputs)
