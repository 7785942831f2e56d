"""The Llama architecture in Flax NNX, with the attention pattern an argument.

Parameters are named as in Hugging Face's files; those of the layers are stacked
along a first axis, so that the layers compile once.

The module is long because decoding with a cache goes through the same layers as
training, and is here beside them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import ad_checkpoint
from jax.sharding import Mesh

from scca_jax import rope, sharding
from scca_jax.backends.contract import SAVED
from scca_jax.dispatch import attention
from scca_jax.linear import Linear
from scca_jax.llama_config import PROJECTIONS, LlamaConfig
from scca_jax.lora import LoraConfig
from scca_jax.patterns import AttentionPattern

# What one layer attends by: a tuple is a mixture (see `scca_jax.attention`).
LayerPattern = AttentionPattern | tuple[AttentionPattern, ...]
# The same for all layers, or one a layer.
Patterns = AttentionPattern | tuple[LayerPattern, ...]
# What the backward pass has of each layer: all activations; its input and what
# attention gives; its input, from which all is computed anew; the inputs of
# attention and MLP, waiting in the host's memory.
REMAT = ("none", "attention", "layer", "offload")
_LAYER_INPUT = "layer_input"


class RMSNorm(nnx.Module):
  """Division by the root mean square, then a scale (arXiv 1910.07467)."""

  def __init__(self, size: int, *, eps: float, dtype: Any):
    """Makes the scale, 1 in float32, `[size]`."""
    self.scale = nnx.Param(jnp.ones((size,), jnp.float32))
    self.eps = eps
    self.dtype = jnp.dtype(dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns `x` normalised over its last axis, computed in float32."""
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
    scale = jnp.expand_dims(self.scale[...], range(x.ndim - 1))
    return (x * scale.astype(jnp.float32)).astype(self.dtype)


class Embedding(nnx.Module):
  """A vector for each token."""

  def __init__(
    self,
    vocab_size: int,
    hidden_size: int,
    *,
    stddev: float,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
  ):
    """Draws the vectors, `[vocab, hidden]` in `param_dtype`."""
    self.embedding = nnx.Param(
      stddev
      * jax.random.normal(rngs.params(), (vocab_size, hidden_size), param_dtype)
    )
    self.dtype = jnp.dtype(dtype)

  def __call__(self, tokens: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """Returns the vectors of the tokens, `[batch, seq, hidden]`."""
    # Taken before the cast: gradients of a token that occurs often are summed
    # in the dtype of the parameter.
    table = self.embedding[...]
    vectors = (
      table[tokens] if mesh is None else sharding.lookup(table, tokens, mesh)
    )
    return vectors.astype(self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Making:
  """What the modules of a model are made with."""

  config: LlamaConfig
  lora: LoraConfig | None
  dtype: Any
  param_dtype: Any

  def projection(self, name: str, rngs: nnx.Rngs) -> Linear:
    """Returns one of `PROJECTIONS`, adapted if its name is a target."""
    adapted = self.lora is not None and name in self.lora.targets
    return Linear(
      *self.config.projection_shape(name),
      lora=self.lora if adapted else None,
      stddev=self.config.initializer_range,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      rngs=rngs,
    )

  def norm(self) -> RMSNorm:
    """Returns a norm over the residual stream."""
    return RMSNorm(
      self.config.hidden_size, eps=self.config.rms_norm_eps, dtype=self.dtype
    )


class SelfAttention(nnx.Module):
  """Grouped-query attention with rotary positions."""

  def __init__(self, making: _Making, rngs: nnx.Rngs):
    self.q_proj = making.projection("q_proj", rngs)
    self.k_proj = making.projection("k_proj", rngs)
    self.v_proj = making.projection("v_proj", rngs)
    self.o_proj = making.projection("o_proj", rngs)
    self.head_dim = making.config.head_dim

  def __call__(
    self,
    x: jax.Array,
    pattern: LayerPattern,
    call: "_Call",
    keys: Any,
    cache: "_LayerCache | None",
  ) -> tuple[jax.Array, "_LayerCache | None"]:
    """Returns its part of the residual stream, like `x`, and the cache."""
    batch, seq_len, _ = x.shape
    heads = (batch, seq_len, -1, self.head_dim)
    query = self.q_proj(x, keys["q_proj"]).reshape(heads)
    key = self.k_proj(x, keys["k_proj"]).reshape(heads)
    value = self.v_proj(x, keys["v_proj"]).reshape(heads)
    query = rope.apply(query, *call.rotation)
    key = rope.apply(key, *call.rotation)
    if cache is None or call.starts is None:
      output = attention(
        query,
        key,
        value,
        pattern,
        segment_ids=call.segment_ids,
        implementation=call.implementation,
        mesh=call.mesh,
      )
    if cache is not None:
      cache = cache.write(key, value, call.starts)
      if call.starts is not None:
        output = cache.attend(query, pattern, call)
    output = output.reshape(batch, seq_len, -1)
    return self.o_proj(output, keys["o_proj"]), cache


class MLP(nnx.Module):
  """The SwiGLU feed-forward layer (arXiv 2002.05202)."""

  def __init__(self, making: _Making, rngs: nnx.Rngs):
    self.gate_proj = making.projection("gate_proj", rngs)
    self.up_proj = making.projection("up_proj", rngs)
    self.down_proj = making.projection("down_proj", rngs)

  def __call__(
    self, x: jax.Array, keys: Any, chunk_len: int | None = None
  ) -> jax.Array:
    """Returns the MLP's part of the residual stream, like `x`.

    Args:
      x: `[batch, seq, hidden]`.
      keys: Randomness of the dropout by projection, or None.
      chunk_len: Tokens of each sequence whose inner activations are held at
        once, in the backward pass too; None takes all.
    """

    def of_chunk(x, keys):
      gate = jax.nn.silu(self.gate_proj(x, keys["gate_proj"]))
      inner = gate * self.up_proj(x, keys["up_proj"])
      return self.down_proj(inner, keys["down_proj"])

    batch, seq_len, hidden = x.shape
    if chunk_len is None or seq_len <= chunk_len:
      return of_chunk(x, keys)
    num_chunks = -(-seq_len // chunk_len)
    padding = num_chunks * chunk_len - seq_len
    chunks = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
    chunks = chunks.reshape(batch, num_chunks, chunk_len, hidden)
    of_chunks = jax.tree.map(
      lambda key: jax.random.split(key, num_chunks), dict(keys)
    )
    result = jax.lax.map(
      lambda of: jax.checkpoint(of_chunk)(*of),
      (jnp.swapaxes(chunks, 0, 1), of_chunks),
    )
    result = jnp.swapaxes(result, 0, 1).reshape(batch, -1, hidden)
    return result[:, :seq_len]


@dataclasses.dataclass(frozen=True)
class _Call:
  """What all layers of one call share.

  Attributes:
    rotation: Positions, frequencies and factor: arguments of `rope.apply`.
    segment_ids: `[batch, seq]` or None.
    implementation: Attention back end.
    mlp_chunk: See `MLP`.
    mesh: Devices that the call is laid out on, or None.
    starts: With a cache: position of the first token of each sequence,
      `[batch]`; None is the start of all, where no key is in the cache yet.
  """

  rotation: tuple[jax.Array, np.ndarray | jax.Array, float]
  segment_ids: jax.Array | None
  implementation: str | None
  mlp_chunk: int | None = None
  mesh: Mesh | None = None
  starts: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of the tokens before, so that they are computed once.

  Attributes:
    key: Rotated keys, `[layers, batch, capacity, kv_heads, head_dim]`.
    value: Values, likewise.
  """

  key: jax.Array
  value: jax.Array


@dataclasses.dataclass(frozen=True)
class _LayerCache:
  """The part of one layer, `layer`, of a cache that is carried along."""

  cache: Cache
  layer: Any

  def write(
    self, key: jax.Array, value: jax.Array, starts: jax.Array | None
  ) -> "_LayerCache":
    """Puts keys and values, `[batch, seq, ...]`, at `starts` and after."""
    batch, seq_len = key.shape[:2]
    rows = jnp.arange(batch)[:, None]
    columns = jnp.arange(seq_len)[None, :]
    if starts is not None:
      columns = columns + starts[:, None]
    return dataclasses.replace(
      self,
      cache=Cache(
        self.cache.key.at[self.layer, rows, columns].set(key),
        self.cache.value.at[self.layer, rows, columns].set(value),
      ),
    )

  def attend(
    self, query: jax.Array, pattern: LayerPattern, call: _Call
  ) -> jax.Array:
    """Returns attention over the cache, each sequence from its own start.

    Keys that are not written yet lie behind every query: no pattern with
    position causality shows them.
    """

    def of_sequence(query, key, value, start):
      return attention(
        query[None],
        key[None],
        value[None],
        pattern,
        query_offset=start,
        implementation=call.implementation,
      )[0]

    return jax.vmap(of_sequence)(
      query,
      self.cache.key[self.layer],
      self.cache.value[self.layer],
      call.starts,
    )


def _split(dropout_key: jax.Array | None) -> dict[str, jax.Array | None]:
  """Returns a key for each projection, or None for all."""
  if dropout_key is None:
    return dict.fromkeys(PROJECTIONS)
  split = jax.random.split(dropout_key, len(PROJECTIONS))
  return dict(zip(PROJECTIONS, split, strict=True))


class Layer(nnx.Module):
  """One layer: attention and MLP, each on the normalised residual stream."""

  def __init__(self, making: _Making, rngs: nnx.Rngs):
    self.input_layernorm = making.norm()
    self.self_attn = SelfAttention(making, rngs)
    self.post_attention_layernorm = making.norm()
    self.mlp = MLP(making, rngs)

  def __call__(
    self,
    x: jax.Array,
    pattern: LayerPattern,
    call: _Call,
    dropout_key: jax.Array | None,
    cache: _LayerCache | None = None,
  ) -> tuple[jax.Array, _LayerCache | None]:
    """Returns the residual stream, `[batch, seq, hidden]`, and the cache."""
    x, cache = self.attend(x, pattern, call, dropout_key, cache)
    return self.feed_forward(x, call, dropout_key), cache

  def attend(
    self,
    x: jax.Array,
    pattern: LayerPattern,
    call: _Call,
    dropout_key: jax.Array | None,
    cache: _LayerCache | None = None,
  ) -> tuple[jax.Array, _LayerCache | None]:
    """Returns the residual stream after attention, and the cache."""
    attended, cache = self.self_attn(
      self.input_layernorm(x), pattern, call, _split(dropout_key), cache
    )
    return x + attended, cache

  def feed_forward(
    self, x: jax.Array, call: _Call, dropout_key: jax.Array | None
  ) -> jax.Array:
    """Returns the residual stream after the MLP."""
    normalised = self.post_attention_layernorm(x)
    pieces = sharding.by_piece(normalised, call.mesh)
    result = self.mlp(pieces, _split(dropout_key), call.mlp_chunk)
    return x + result.reshape(x.shape)


def _project_primal(
  axis: int, hidden: jax.Array, kernel: jax.Array, cast: jax.Array
) -> jax.Array:
  """Returns the float32 product of hidden states and the output head.

  The rule that JAX has for a product with a float32 result multiplies in
  float32 when it goes back: slow on a GPU, with a float32 copy of the head and
  a gradient rounded to the dtype of the computation. Here both products have
  operands of that dtype, and the gradient of the head is float32 as it leaves
  the accumulators.

  Args:
    axis: The axis of the head that is summed over.
    hidden: `[..., hidden]`.
    kernel: The parameter, `[hidden, vocab]` or `[vocab, hidden]`; the gradient
      goes to it.
    cast: The same in the dtype of `hidden`; this is multiplied with.
  """
  del kernel
  return jax.lax.dot_general(
    hidden,
    cast,
    (((hidden.ndim - 1,), (axis,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


_project = jax.custom_vjp(_project_primal, nondiff_argnums=(0,))


def _project_save(axis, hidden, kernel, cast):
  return _project_primal(axis, hidden, kernel, cast), (hidden, kernel, cast)


def _project_backward(axis, saved, d_logits):
  hidden, kernel, cast = saved
  d_logits = d_logits.astype(hidden.dtype)
  leading = tuple(range(hidden.ndim - 1))
  d_hidden = jax.lax.dot_general(
    d_logits, cast, (((hidden.ndim - 1,), (1 - axis,)), ((), ()))
  )
  operands = (d_logits, hidden) if axis == 1 else (hidden, d_logits)
  d_kernel = jax.lax.dot_general(
    *operands,
    ((leading, leading), ((), ())),
    preferred_element_type=jnp.float32,
  )
  return d_hidden, d_kernel.astype(kernel.dtype), None


_project.defvjp(_project_save, _project_backward)


def _period(patterns: Patterns, num_layers: int) -> tuple[LayerPattern, ...]:
  """Returns the shortest cycle of patterns that gives each layer its own.

  Its length divides the number of layers.
  """
  if isinstance(patterns, AttentionPattern):
    return (patterns,)
  if not isinstance(patterns, tuple) or len(patterns) != num_layers:
    found = (
      f"a tuple of {len(patterns)}"
      if isinstance(patterns, tuple)
      else repr(patterns)
    )
    raise ValueError(
      "patterns must be an AttentionPattern or a tuple of one for each of the"
      f" {num_layers} layers, got {found}."
    )
  length = next(
    n
    for n in range(1, num_layers + 1)
    if num_layers % n == 0 and patterns == patterns[:n] * (num_layers // n)
  )
  return patterns[:length]


def _default_positions(
  seq_len: int, segment_ids: jax.Array | None
) -> jax.Array:
  """Returns positions that restart at each segment, `[batch or 1, seq]`."""
  index = jnp.arange(seq_len, dtype=jnp.int32)[None, :]
  if segment_ids is None:
    return index
  starts = jnp.pad(
    segment_ids[:, 1:] != segment_ids[:, :-1],
    ((0, 0), (1, 0)),
    constant_values=True,
  )
  start = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
  return index - start


def _check_tokens(tokens: Any, positions: Any) -> None:
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(
      "tokens must be integers [batch, seq], got"
      f" {tokens.dtype} {list(tokens.shape)}."
    )
  if positions is not None and positions.shape not in (
    tokens.shape,
    (1, tokens.shape[1]),
  ):
    raise ValueError(
      f"positions must be {list(tokens.shape)}, [batch, seq], got"
      f" {list(positions.shape)}."
    )


class Llama(nnx.Module):
  """A decoder of the Llama family (arXiv 2302.13971).

  Norms, rotary positions, softmax and logits are float32 whatever the dtype of
  the computation. The parameters of all layers are stacked, `[layers, ...]`.
  """

  def __init__(
    self,
    config: LlamaConfig,
    *,
    lora: LoraConfig | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Draws the weights.

    Args:
      config: Sizes.
      lora: Adapters; None has none.
      dtype: Dtype of the computation: float32, bfloat16 or float16.
      param_dtype: Dtype that weights are held in. Norms and adapters are
        float32, and so are embeddings that are trained beside adapters.
      rngs: Its stream `params` draws the weights.
    """
    self.config = config
    self.lora = lora
    self.dtype = jnp.dtype(dtype)
    making = _Making(
      config=config, lora=lora, dtype=dtype, param_dtype=param_dtype
    )
    embedding_dtype = (
      jnp.float32 if lora is not None and lora.train_embeddings else param_dtype
    )
    self.embed_tokens = Embedding(
      config.vocab_size,
      config.hidden_size,
      stddev=config.initializer_range,
      dtype=dtype,
      param_dtype=embedding_dtype,
      rngs=rngs,
    )

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap
    def make_layers(rngs: nnx.Rngs) -> Layer:
      return Layer(making, rngs)

    self.layers = make_layers(rngs)
    self.norm = making.norm()
    self.lm_head = (
      None
      if config.tie_embeddings
      else Linear(
        config.hidden_size,
        config.vocab_size,
        stddev=config.initializer_range,
        dtype=dtype,
        param_dtype=embedding_dtype,
        rngs=rngs,
      )
    )

  def __call__(
    self,
    tokens: jax.Array,
    *,
    patterns: Patterns,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
    remat: str = "none",
    mlp_chunk: int | None = None,
    mesh: Mesh | None = None,
    deterministic: bool = True,
    rngs: nnx.Rngs | None = None,
  ) -> jax.Array:
    """Returns the logits of the next tokens, float32 `[batch, seq, vocab]`.

    The arguments are those of `hidden_states`.
    """
    hidden = self.hidden_states(
      tokens,
      patterns=patterns,
      positions=positions,
      segment_ids=segment_ids,
      implementation=implementation,
      remat=remat,
      mlp_chunk=mlp_chunk,
      mesh=mesh,
      deterministic=deterministic,
      rngs=rngs,
    )
    return self.logits(hidden)

  def hidden_states(
    self,
    tokens: jax.Array,
    *,
    patterns: Patterns,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
    remat: str = "none",
    mlp_chunk: int | None = None,
    mesh: Mesh | None = None,
    deterministic: bool = True,
    rngs: nnx.Rngs | None = None,
  ) -> jax.Array:
    """Returns what the output head reads, `[batch, seq, hidden]`.

    Args:
      tokens: Integers, `[batch, seq]`.
      patterns: Attention pattern of all layers, or a tuple of one a layer;
        static under jit. A schedule that repeats compiles one cycle of it.
      positions: Integers for RoPE, `[batch, seq]`; None counts from 0, anew in
        each segment. The patterns have positions of their own: those in the
        sequence.
      segment_ids: Documents packed in one sequence, `[batch, seq]`; see
        `scca_jax.attention`.
      implementation: Attention back end; None takes the best for the device.
      remat: What the backward pass has of each layer: "none", all activations;
        "layer", its input only, from which it is computed anew; "attention",
        beside it what the attention kernels for GPUs save, so that they run
        forward but once (with other back ends this is "layer"); "offload", the
        inputs of attention and MLP, which wait in the host's memory.
      mlp_chunk: Tokens of each sequence whose MLP is computed at once, and anew
        in the backward pass; None takes all.
      mesh: From `sharding.make_mesh`, if parameters and tokens lie on several
        devices. Of a sequence in pieces, `mlp_chunk` is of each piece.
      deterministic: Whether dropout is off.
      rngs: Its stream `dropout` is used if there is dropout.

    Raises:
      ValueError: Shapes or the number of patterns do not fit, or dropout has
        no `rngs`.
    """
    _check_tokens(tokens, positions)
    config = self.config
    cycle = _period(patterns, config.num_layers)
    num_cycles = config.num_layers // len(cycle)
    if positions is None:
      positions = _default_positions(tokens.shape[1], segment_ids)
    inv_freq, attention_scaling = rope.frequencies(
      config.head_dim, config.rope_theta, config.rope_scaling, tokens.shape[1]
    )
    if remat not in REMAT:
      raise ValueError(
        f"unknown remat {remat!r}: use one of {', '.join(REMAT)}."
      )
    if mlp_chunk is not None and mlp_chunk < 1:
      raise ValueError(f"mlp_chunk must be at least 1, got {mlp_chunk}.")
    call = _Call(
      (positions, inv_freq, attention_scaling),
      segment_ids,
      implementation,
      mlp_chunk,
      mesh,
    )
    graphdef, state = nnx.split(self.layers)

    def attend(layer, x, pattern, key):
      return layer.attend(x, pattern, call, key)[0]

    def feed_forward(layer, x, pattern, key):
      del pattern
      return layer.feed_forward(x, call, key)

    def run_part(part, x, of_cycle, i):
      if remat == "offload":
        x = ad_checkpoint.checkpoint_name(x, _LAYER_INPUT)
      state, key = jax.tree.map(lambda leaf: leaf[i], of_cycle)
      layer = nnx.merge(graphdef, sharding.gathered(state, mesh))
      x = part(layer, x, cycle[i], key)
      return sharding.constrain(x, mesh, "batch", "seq", None)

    def whole(layer, x, pattern, key):
      return layer(x, pattern, call, key)[0]

    # Offloaded inputs take no room on the device: with one for each half of a
    # layer, the backward pass of one half needs nothing of the other's.
    parts = (attend, feed_forward) if remat == "offload" else (whole,)
    if remat != "none":
      # A scan of one step is inlined, and the compiler may then merge what is
      # computed anew with what was computed first: this forbids it. It also
      # keeps the halves of a layer one after the other. The weights are taken
      # as the scan has them: a slice would be saved with each layer's input, a
      # second copy of the model.
      policies = jax.checkpoint_policies
      policy = {
        "attention": policies.save_only_these_names(SAVED),
        "layer": None,
        "offload": policies.save_and_offload_only_these_names(
          names_which_can_be_saved=[],
          names_which_can_be_offloaded=[_LAYER_INPUT],
          offload_src="device",
          offload_dst="pinned_host",
        ),
      }[remat]
      run_part = jax.checkpoint(
        run_part,
        prevent_cse=num_cycles == 1 or remat == "offload",
        policy=policy,
        static_argnums=(0, 3),
      )

    def run_cycle(x, of_cycle):
      for i in range(len(cycle)):
        for part in parts:
          x = run_part(part, x, of_cycle, i)
      return x, None

    # jax.lax.scan over the pure state, not nnx.scan: layers change no variable,
    # and nnx.scan has one body for one layer where a schedule needs a cycle of
    # layers, each with its own static pattern.
    of_layers = (state, self._dropout_keys(deterministic, rngs))
    of_cycles = jax.tree.map(
      lambda leaf: leaf.reshape(num_cycles, len(cycle), *leaf.shape[1:]),
      of_layers,
    )
    x = self.embed_tokens(tokens, mesh)
    x = sharding.constrain(x, mesh, "batch", "seq", None)
    x, _ = jax.lax.scan(run_cycle, x, of_cycles)
    return self.norm(x)

  def init_cache(self, batch: int, capacity: int) -> Cache:
    """Returns an empty cache for sequences of up to `capacity` tokens."""
    config = self.config
    shape = (
      config.num_layers,
      batch,
      capacity,
      config.num_kv_heads,
      config.head_dim,
    )
    return Cache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))

  def cached_hidden_states(
    self,
    tokens: jax.Array,
    cache: Cache,
    *,
    patterns: Patterns,
    starts: jax.Array | None = None,
    inv_freq: jax.Array | np.ndarray | None = None,
    implementation: str | None = None,
  ) -> tuple[jax.Array, Cache]:
    """Returns the hidden states of tokens that go on from a cache.

    Args:
      tokens: Integers, `[batch, seq]`.
      cache: From `init_cache` or from an earlier call.
      patterns: As in `hidden_states`, with position causality.
      starts: Position of the first token of each sequence, integers `[batch]`;
        None begins the sequences, at the cost of the pattern: later calls read
        the whole cache. What the cache has from there on is overwritten.
      inv_freq: Frequencies of RoPE, `[head_dim / 2]`; None takes those of the
        cache's capacity, of which only "dynamic" scaling depends.
      implementation: Attention back end; None takes the best for the device.

    Returns:
      `[batch, seq, hidden]` and the cache with the tokens in it.

    Raises:
      ValueError: Shapes or the number of patterns do not fit, or a pattern is
        causal by slot.
    """
    _check_tokens(tokens, None)
    config = self.config
    cycle = _period(patterns, config.num_layers)
    for pattern in cycle:
      for one in pattern if isinstance(pattern, tuple) else (pattern,):
        if one.causality != "position":
          raise ValueError(
            "a cache needs patterns with causality='position', got"
            f" {one.causality!r}."
          )
    seq_len = tokens.shape[1]
    if cache.key.shape[1] != tokens.shape[0] or cache.key.shape[2] < seq_len:
      raise ValueError(
        f"the cache has {cache.key.shape[1]} sequences of"
        f" {cache.key.shape[2]} tokens, the tokens are {list(tokens.shape)}."
      )
    default, attention_scaling = rope.frequencies(
      config.head_dim,
      config.rope_theta,
      config.rope_scaling,
      cache.key.shape[2],
    )
    positions = jnp.arange(seq_len, dtype=jnp.int32)[None, :]
    if starts is not None:
      positions = positions + starts[:, None]
    rotation = (
      positions,
      default if inv_freq is None else inv_freq,
      attention_scaling,
    )
    call = _Call(rotation, None, implementation, starts=starts)
    graphdef, state = nnx.split(self.layers)

    def run_cycle(carry, of_cycle):
      x, cache = carry
      for i, pattern in enumerate(cycle):
        state, layer = jax.tree.map(lambda leaf, i=i: leaf[i], of_cycle)
        x, of_layer = nnx.merge(graphdef, state)(
          x, pattern, call, None, _LayerCache(cache, layer)
        )
        cache = of_layer.cache  # pyright: ignore[reportOptionalMemberAccess]
      return (x, cache), None

    # The cache is carried, not scanned over: it is written in place.
    num_cycles = config.num_layers // len(cycle)
    of_cycles = jax.tree.map(
      lambda leaf: leaf.reshape(num_cycles, len(cycle), *leaf.shape[1:]),
      (state, jnp.arange(config.num_layers)),
    )
    (x, cache), _ = jax.lax.scan(
      run_cycle, (self.embed_tokens(tokens), cache), of_cycles
    )
    return self.norm(x), cache

  def _dropout_keys(
    self, deterministic: bool, rngs: nnx.Rngs | None
  ) -> jax.Array | None:
    """Returns a key for each layer, `[layers]`, or None without dropout."""
    if deterministic or self.lora is None or self.lora.dropout == 0:
      return None
    if rngs is None:
      raise ValueError(
        f"dropout {self.lora.dropout} needs rngs: pass"
        " rngs=nnx.Rngs(dropout=seed) or deterministic=True."
      )
    return jax.random.split(rngs.dropout(), self.config.num_layers)

  def _head(self) -> tuple[jax.Array, int]:
    """Returns the output head, and its axis that is as wide as the states."""
    if self.lm_head is None:
      return self.embed_tokens.embedding[...], 1
    return self.lm_head.kernel[...], 0

  def head(self, hidden: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Returns `logits` for parts of `hidden`, for a training step.

    Its weights are brought to the dtype of the computation once, for a loop
    over parts of the sequence, and not before the hidden states are there: the
    compiler would move that out of the loop over micro batches, and keep the
    result while the layers run.

    Args:
      hidden: From `hidden_states`.
    """
    kernel, axis = self._head()
    _, cast = jax.lax.optimization_barrier(
      jax.lax.stop_gradient((hidden, kernel))
    )
    cast = cast.astype(self.dtype)
    return lambda hidden: _project(
      axis, hidden.astype(self.dtype), kernel, cast
    )

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Returns the logits of hidden states, float32 `[..., vocab]`.

    Args:
      hidden: From `hidden_states`, or a part of it: `[..., hidden]`.
    """
    kernel, axis = self._head()
    cast = jax.lax.stop_gradient(kernel).astype(self.dtype)
    return _project(axis, hidden.astype(self.dtype), kernel, cast)
