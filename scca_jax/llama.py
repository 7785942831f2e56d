"""The Llama architecture in Flax NNX, with the attention pattern as argument.

Parameters are named as in Hugging Face's files. The layers' parameters are
stacked along a first axis, so that only one layer is compiled (unless
`Execution.unroll`).

In order:

    Execution           how the layers are computed: back end, memory, devices
    Layer               attention and MLP, with the modules they are made of
    Cache               keys and values of earlier tokens, for decoding
    _project            the product with the output head, and its gradient
    Llama               the model: training and evaluation (`hidden_states`),
                        of one segment (`segment_hidden_states`), decoding
                        (`cached_hidden_states`, `prompt_segment`), logits
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding

from scca_jax import rope, sharding
from scca_jax.backends.contract import SAVED
from scca_jax.dispatch import attention, segment_attention
from scca_jax.linear import Linear, apply_to_one
from scca_jax.llama_config import PROJECTIONS, LlamaConfig
from scca_jax.lora import LoraConfig
from scca_jax.patterns import AttentionPattern, Mixture, dense, members
from scca_jax.segment_attention import (
  Messages,
  Segment,
  no_messages,
  refuses_segments,
)

# The attention pattern of one layer.
LayerPattern = AttentionPattern | Mixture
# One for all layers or a tuple with one per layer; None is dense.
Patterns = LayerPattern | tuple[LayerPattern, ...] | None
REMAT = (
  "none",
  "projections",
  "offload_projections",
  "attention",
  "layer",
  "offload",
)
# The ones that recompute no product with a weight matrix.
RUN_ONCE = ("none", "projections", "offload_projections")
# Names under which `jax.checkpoint` saves the input of a layer, or of half a
# layer, and the outputs of its projections.
_INPUT, _PROJECTED = "scca_input", "scca_projected"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
  """How the layers are computed; results agree up to rounding.

  Attributes:
    implementation: Attention back end, or several to try in order; None picks
      the best for the device.
    remat: What each layer saves for the backward pass. "none": all activations.
      "attention": the layer's input and what the attention kernels for GPUs
      save, so that these run forward only once (the same as "layer" with other
      back ends). "projections": in addition, rotated queries and keys, values,
      the residual stream after attention, and the inputs of SwiGLU, so that no
      product with a frozen matrix runs forward twice; norms, SwiGLU and LoRA's
      small products do. "layer": only its input, from which the rest is
      recomputed. "offload": the inputs of attention and MLP, in the host's
      memory. "offload_projections": the same as "projections", in the host's
      memory.
    mlp_chunk: How many tokens of each sequence the MLP processes at a time, and
      recomputes in the backward pass; None means all. If a sequence is split
      over devices, this counts the tokens of each shard.
    mesh: From `sharding.make_mesh`, if parameters and tokens are spread over
      several devices; None means one device.
    deterministic: Whether attention has bit-equal gradients from run to run.
    segment_len: Tokens of a sequence that training, perplexity and the prompts
      of `generation` compute at a time, one segment after another (`segments`);
      None computes the whole sequence at once, as all other calls do.
    offload_segments: Whether the keys and values that later segments see are
      kept in the host's memory until the backward pass.
    unroll: Whether the layers are compiled one by one, not as a loop: that
      takes longer, but nothing saved is copied into stacks of all layers.
  """

  implementation: str | tuple[str, ...] | None = None
  remat: str = "none"
  mlp_chunk: int | None = None
  mesh: Mesh | None = None
  deterministic: bool = False
  segment_len: int | None = None
  offload_segments: bool = False
  unroll: bool = False

  def __post_init__(self):
    if self.remat not in REMAT:
      raise ValueError(
        f"unknown remat {self.remat!r}: use one of {', '.join(REMAT)}."
      )
    for name in ("mlp_chunk", "segment_len"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")

  def save_projected(self, projected: Any) -> Any:
    """Returns its argument, marked to be saved if `remat` says so.

    Args:
      projected: Outputs of projections.
    """
    if self.remat not in ("projections", "offload_projections"):
      return projected
    # Without the barrier XLA runs the product twice: once into the stack of all
    # layers, once for the layer.
    return checkpoint_name(jax.lax.optimization_barrier(projected), _PROJECTED)


DEFAULT_EXECUTION = Execution()


class RMSNorm(nnx.Module):
  """Division by the root mean square, then a scale (arXiv 1910.07467)."""

  def __init__(self, size: int, *, eps: float, dtype: Any):
    """Initialises the scale to 1, float32 `[size]`."""
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
    """Initialises the vectors, `[vocab, hidden]` in `param_dtype`."""
    self.embedding = nnx.Param(
      stddev
      * jax.random.normal(rngs.params(), (vocab_size, hidden_size), param_dtype)
    )
    self.dtype = jnp.dtype(dtype)

  def __call__(self, tokens: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """Returns the vectors of the tokens, `[batch, seq, hidden]`."""
    # Look up before the cast, so that the gradients of a frequent token are
    # summed in the dtype of the parameter.
    table = self.embedding[...]
    vectors = (
      table[tokens] if mesh is None else sharding.lookup(table, tokens, mesh)
    )
    return vectors.astype(self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Making:
  """Settings that all modules of a model share."""

  config: LlamaConfig
  lora: LoraConfig | None
  dtype: Any
  param_dtype: Any

  def projection(self, name: str, rngs: nnx.Rngs) -> Linear:
    """Returns one of `PROJECTIONS`, with an adapter if its name is a target."""
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
    dropout_rngs: Any,
    before: "_Before",
  ) -> tuple[jax.Array, "_After"]:
    """Returns what it adds to the residual stream, and what it sends."""
    batch, seq_len, _ = x.shape
    heads = (batch, seq_len, -1, self.head_dim)
    query, key, value = (
      projected.reshape(heads)
      for projected in apply_to_one(
        (self.q_proj, self.k_proj, self.v_proj),
        x,
        [dropout_rngs[name] for name in ("q_proj", "k_proj", "v_proj")],
      )
    )
    query = rope.apply(query, *call.rotation)
    key = rope.apply(key, *call.rotation)
    query, key, value = call.execution.save_projected((query, key, value))
    cached = isinstance(before, _LayerCache)
    after = None
    messages = before.messages if isinstance(before, _LayerCache) else before
    if messages is not None:
      assert call.segment is not None
      output, messages = segment_attention(
        query,
        key,
        value,
        pattern,
        call.segment,
        messages,
        implementation=call.execution.implementation,
        deterministic=call.execution.deterministic,
      )
      after = messages
    elif not cached or call.starts is None:
      output = attention(
        query,
        key,
        value,
        pattern,
        segment_ids=call.segment_ids,
        implementation=call.execution.implementation,
        deterministic=call.execution.deterministic,
        mesh=call.execution.mesh,
      )
    if isinstance(before, _LayerCache):
      after = before.write(key, value, call.starts)
      if messages is not None:
        after = dataclasses.replace(after, messages=messages)
      elif call.starts is not None:
        output = after.attend(query, pattern, call)
    output = output.reshape(batch, seq_len, -1)
    return self.o_proj(output, dropout_rngs["o_proj"]), after


class MLP(nnx.Module):
  """The SwiGLU feed-forward layer (arXiv 2002.05202)."""

  def __init__(self, making: _Making, rngs: nnx.Rngs):
    self.gate_proj = making.projection("gate_proj", rngs)
    self.up_proj = making.projection("up_proj", rngs)
    self.down_proj = making.projection("down_proj", rngs)

  def __call__(
    self,
    x: jax.Array,
    dropout_rngs: Any,
    execution: Execution = DEFAULT_EXECUTION,
  ) -> jax.Array:
    """Returns what the MLP adds to the residual stream, like `x`.

    Args:
      x: `[batch, seq, hidden]`.
      dropout_rngs: Randomness of the dropout by projection, or None.
      execution: How many tokens to compute at once, and what to save.
    """

    def of_chunk(x, dropout_rngs):
      gate, up = execution.save_projected(
        apply_to_one(
          (self.gate_proj, self.up_proj),
          x,
          [dropout_rngs[name] for name in ("gate_proj", "up_proj")],
        )
      )
      return self.down_proj(jax.nn.silu(gate) * up, dropout_rngs["down_proj"])

    chunk_len = execution.mlp_chunk
    batch, seq_len, hidden = x.shape
    if chunk_len is None or seq_len <= chunk_len:
      return of_chunk(x, dropout_rngs)
    num_chunks = -(-seq_len // chunk_len)
    padding = num_chunks * chunk_len - seq_len
    chunks = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
    chunks = chunks.reshape(batch, num_chunks, chunk_len, hidden)
    rngs_of_chunks = jax.tree.map(
      lambda rng: jax.random.split(rng, num_chunks), dict(dropout_rngs)
    )
    result = jax.lax.map(
      lambda chunk: jax.checkpoint(of_chunk)(*chunk),
      (jnp.swapaxes(chunks, 0, 1), rngs_of_chunks),
    )
    result = jnp.swapaxes(result, 0, 1).reshape(batch, -1, hidden)
    return result[:, :seq_len]


@dataclasses.dataclass(frozen=True)
class _Call:
  """Arguments that all layers of one call share.

  Attributes:
    rotation: Positions, frequencies and factor, the arguments of `rope.apply`.
    execution: How the layers are computed.
    segment_ids: `[batch, seq]` or None.
    starts: With a cache, the position of the first token of each sequence,
      `[batch]`; None if all sequences are new and the cache is empty.
    segment: Which segment of the sequence this is, if it is computed in
      segments.
  """

  rotation: tuple[jax.Array, np.ndarray | jax.Array, float]
  execution: Execution
  segment_ids: jax.Array | None = None
  starts: jax.Array | None = None
  segment: Segment | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of earlier tokens, so that they are computed only once.

  Attributes:
    key: Rotated keys, `[layers, batch, capacity, kv_heads, head_dim]`.
    value: Values, with the same shape.
  """

  key: jax.Array
  value: jax.Array


@dataclasses.dataclass(frozen=True)
class _LayerCache:
  """One layer of a cache that is carried through the layers.

  Attributes:
    cache: The cache of all layers.
    layer: Which one it is.
    messages: In a prompt that is computed in segments, what earlier segments
      sent; None if the layer's pattern needs the whole cache.
  """

  cache: Cache
  layer: Any
  messages: Messages | None = None

  def write(
    self, key: jax.Array, value: jax.Array, starts: jax.Array | None
  ) -> "_LayerCache":
    """Writes keys and values, `[batch, seq, ...]`, starting at `starts`."""
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

    Slots that are still empty come after every query, where a pattern with
    position causality never looks.
    """

    def of_sequence(query, key, value, start):
      return attention(
        query[None],
        key[None],
        value[None],
        pattern,
        query_offset=start,
        implementation=call.execution.implementation,
      )[0]

    return jax.vmap(of_sequence)(
      query,
      self.cache.key[self.layer],
      self.cache.value[self.layer],
      call.starts,
    )


# What a layer gets from earlier tokens and passes on to later ones: a cache, or
# messages from segment to segment.
_Before = _LayerCache | Messages | None
_After = _LayerCache | Messages | None


def _by_projection(
  dropout_rng: jax.Array | None,
) -> dict[str, jax.Array | None]:
  """Returns the randomness of each projection, None without dropout."""
  if dropout_rng is None:
    return dict.fromkeys(PROJECTIONS)
  split = jax.random.split(dropout_rng, len(PROJECTIONS))
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
    dropout_rng: jax.Array | None,
    before: _Before = None,
  ) -> tuple[jax.Array, _After]:
    """Returns the residual stream, `[batch, seq, hidden]`, and what to send."""
    x, after = self.attend(x, pattern, call, dropout_rng, before)
    return self.feed_forward(x, call, dropout_rng), after

  def attend(
    self,
    x: jax.Array,
    pattern: LayerPattern,
    call: _Call,
    dropout_rng: jax.Array | None,
    before: _Before = None,
  ) -> tuple[jax.Array, _After]:
    """Returns the residual stream after attention, and what to send."""
    attended, after = self.self_attn(
      self.input_layernorm(x),
      pattern,
      call,
      _by_projection(dropout_rng),
      before,
    )
    return call.execution.save_projected(x + attended), after

  def feed_forward(
    self, x: jax.Array, call: _Call, dropout_rng: jax.Array | None
  ) -> jax.Array:
    """Returns the residual stream after the MLP."""
    normalised = self.post_attention_layernorm(x)
    shards = sharding.by_shard(normalised, call.execution.mesh)
    result = self.mlp(shards, _by_projection(dropout_rng), call.execution)
    return x + result.reshape(x.shape)


def _project_primal(
  axis: int, hidden: jax.Array, kernel: jax.Array, cast: jax.Array
) -> jax.Array:
  """Returns the float32 product of hidden states and the output head.

  JAX's own rule for a product with a float32 result multiplies in float32 in
  the backward pass: slow on a GPU, with a float32 copy of the head and a
  gradient rounded to the compute dtype. Here the operands of both products have
  the compute dtype, and the gradient of the head comes out of the accumulators
  as float32.

  Args:
    axis: The axis of the head that is summed over.
    hidden: `[..., hidden]`.
    kernel: The parameter, `[hidden, vocab]` or `[vocab, hidden]`, which
      receives the gradient.
    cast: `kernel` in the dtype of `hidden`, which the products use.
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


def by_layer(
  patterns: Patterns, config: LlamaConfig
) -> tuple[LayerPattern, ...]:
  """Returns the attention pattern of each layer.

  Raises:
    ValueError: It is neither a pattern nor a tuple with one for each layer.
  """
  num_layers = config.num_layers
  if patterns is None:
    patterns = dense(config.num_heads)
  if isinstance(patterns, LayerPattern):
    return (patterns,) * num_layers
  if not isinstance(patterns, tuple) or len(patterns) != num_layers:
    found = (
      f"a tuple of {len(patterns)}"
      if isinstance(patterns, tuple)
      else repr(patterns)
    )
    raise ValueError(
      "patterns must be an AttentionPattern, a Mixture or a tuple with one for"
      f" each of the {num_layers} layers, got {found}."
    )
  for layer, pattern in enumerate(patterns):
    if not isinstance(pattern, LayerPattern):
      raise ValueError(
        f"the pattern of layer {layer} must be an AttentionPattern or a"
        f" Mixture, got {pattern!r}."
      )
  return patterns


def _period(
  patterns: Patterns, config: LlamaConfig
) -> tuple[LayerPattern, ...]:
  """Returns the shortest cycle of patterns that gives each layer its own.

  Its length divides the number of layers.
  """
  layers = by_layer(patterns, config)
  length = next(
    n
    for n in range(1, len(layers) + 1)
    if len(layers) % n == 0 and layers == layers[:n] * (len(layers) // n)
  )
  return layers[:length]


def _scan_layers(
  run: Callable[[Any, Any, int, Any], tuple[Any, Any]],
  carry: Any,
  of_layers: Any,
  cycle_len: int,
  received: Any = None,
  *,
  unroll: bool = False,
) -> tuple[Any, Any]:
  """Runs the layers as a scan that compiles one cycle of patterns.

  This is jax.lax.scan over the pure state, not nnx.scan: layers change no
  variable, and nnx.scan has one body for one layer where a schedule needs a
  cycle of layers, each with its own static pattern.

  Args:
    run: Maps the carry, a cycle of `of_layers`, the layer's index in it and
      what it received to the new carry and what the layer sends.
    carry: The first layer's carry.
    of_layers: A tree of arrays `[layers, ...]`.
    cycle_len: Layers per cycle.
    received: What the layers receive: for each layer of a cycle a tree of
      arrays `[cycles, ...]`; None means nothing.
    unroll: Whether all cycles are compiled.

  Returns:
    The last layer's carry; what the layers send, like `received`.
  """
  received = (None,) * cycle_len if received is None else received
  of_cycles = jax.tree.map(
    lambda leaf: leaf.reshape(-1, cycle_len, *leaf.shape[1:]), of_layers
  )

  def run_cycle(carry, of_cycle):
    of_cycle, received = of_cycle
    sent = []
    for i in range(cycle_len):
      carry, of_layer = run(carry, of_cycle, i, received[i])
      sent.append(of_layer)
    return carry, tuple(sent)

  return jax.lax.scan(run_cycle, carry, (of_cycles, received), unroll=unroll)


def default_positions(seq_len: int, segment_ids: jax.Array | None) -> jax.Array:
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


def check_tokens(tokens: Any, positions: Any, vocab_size: int) -> None:
  """Checks the arguments of `Llama.hidden_states`.

  Raises:
    ValueError: A shape, dtype or id does not fit.
  """
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(
      "tokens must be integers [batch, seq], got"
      f" {tokens.dtype} {list(tokens.shape)}."
    )
  # A lookup beyond the embedding would silently give its last row. Under jit,
  # whoever makes the tokens has to check them.
  is_here = not isinstance(tokens, Tracer) and (
    isinstance(tokens, np.ndarray) or tokens.is_fully_addressable
  )
  if is_here:
    ids = np.asarray(tokens)
    outside = np.argwhere((ids < 0) | (ids >= vocab_size))
    if len(outside):
      row, place = map(int, outside[0])
      raise ValueError(
        f"sequence {row} has the id {ids[row, place]} at position {place:,},"
        f" outside the vocabulary of {vocab_size:,}."
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
    """Initialises the weights.

    Args:
      config: Sizes.
      lora: Adapters; None adds none.
      dtype: Dtype of the computation: float32, bfloat16 or float16.
      param_dtype: Dtype that weights are held in. Norms and adapters are
        float32, and so are embeddings that are trained along with adapters.
      rngs: Its stream `params` initialises the weights.
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
    patterns: Patterns = None,
    execution: Execution = DEFAULT_EXECUTION,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    rngs: nnx.Rngs | None = None,
  ) -> jax.Array:
    """Returns the logits of the next tokens, float32 `[batch, seq, vocab]`.

    The arguments are those of `hidden_states`.
    """
    hidden = self.hidden_states(
      tokens,
      patterns,
      execution,
      positions=positions,
      segment_ids=segment_ids,
      rngs=rngs,
    )
    return self.logits(hidden)

  def hidden_states(
    self,
    tokens: jax.Array,
    patterns: Patterns = None,
    execution: Execution = DEFAULT_EXECUTION,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    rngs: nnx.Rngs | None = None,
  ) -> jax.Array:
    """Returns the input of the output head, `[batch, seq, hidden]`.

    Args:
      tokens: Integers, `[batch, seq]`.
      patterns: Pattern of all layers, or a tuple with one per layer; None is
        dense. Static under jit; only one cycle of a repeating schedule is
        compiled.
      execution: How the layers are computed; static under jit.
      positions: Integers for RoPE, `[batch, seq]`; None counts from 0 at the
        start of each segment. Patterns use the place in the sequence instead.
      segment_ids: Documents packed in one sequence, `[batch, seq]`; see
        `scca_jax.attention`.
      rngs: Its stream `dropout` decides what dropout drops; None drops nothing.

    Raises:
      ValueError: Shapes or the number of patterns do not fit.
    """
    check_tokens(tokens, positions, self.config.vocab_size)
    if positions is None:
      positions = default_positions(tokens.shape[1], segment_ids)
    rotation = (positions, *self._frequencies(tokens.shape[1]))
    call = _Call(rotation, execution, segment_ids)
    return self._run_layers(tokens, patterns, call, rngs)[0]

  def segment_hidden_states(
    self,
    tokens: jax.Array,
    patterns: Patterns,
    execution: Execution,
    *,
    segment: Segment,
    received: tuple[Messages | None, ...],
    positions: jax.Array,
    seq_len: int,
    rngs: nnx.Rngs | None = None,
  ) -> tuple[jax.Array, tuple[Messages | None, ...]]:
    """Returns the hidden states of a segment, and what later ones need.

    `segments.map_hidden_states` calls it for one segment after another.

    Args:
      tokens: Integers of the segment, `[batch, length]`.
      patterns: As in `hidden_states`.
      execution: As in `hidden_states`, without a mesh.
      segment: Which segment this is.
      received: What earlier segments sent; `first_messages` for the first.
      positions: Integers for RoPE, `[batch or 1, length]`.
      seq_len: Length of the whole sequence in tokens, which some rope scalings
        depend on.
      rngs: As in `hidden_states`.

    Raises:
      NotImplementedError: A pattern needs more from earlier segments than is
        kept.
    """
    if None in received:
      raise NotImplementedError(
        "a pattern needs more from earlier segments than is kept."
      )
    rotation = (positions, *self._frequencies(seq_len))
    call = _Call(rotation, execution, segment=segment)
    return self._run_layers(tokens, patterns, call, rngs, received)

  def first_messages(
    self, patterns: Patterns, segment: Segment, batch: int
  ) -> tuple[Messages | None, ...]:
    """Returns what the layers of the first segment receive: zeros.

    For each layer of the cycle of patterns, they are arrays `[cycles, ...]`, or
    None for a pattern that `refuses_segments`.

    Args:
      patterns: As in `hidden_states`.
      segment: Any segment.
      batch: Sequences.
    """
    config = self.config
    cycle = _period(patterns, config)
    num_cycles = config.num_layers // len(cycle)

    def of_layer(pattern: LayerPattern) -> Messages | None:
      if any(refuses_segments(m, segment.length) for m in members(pattern)):
        return None
      messages = no_messages(
        members(pattern),
        segment,
        batch=batch,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=self.dtype,
      )
      return jax.tree.map(
        lambda x: jnp.zeros((num_cycles, *x.shape), x.dtype), messages
      )

    return tuple(of_layer(pattern) for pattern in cycle)

  def _frequencies(self, seq_len: int) -> tuple[Any, float]:
    """Returns RoPE's frequencies and factor for a length."""
    config = self.config
    return rope.frequencies(
      config.head_dim, config.rope_theta, config.rope_scaling, seq_len
    )

  def _run_layers(
    self,
    tokens: jax.Array,
    patterns: Patterns,
    call: _Call,
    rngs: nnx.Rngs | None,
    received: tuple[Messages | None, ...] | None = None,
  ) -> tuple[jax.Array, Any]:
    """Returns the hidden states, and what the layers send (if they receive)."""
    config, execution = self.config, call.execution
    mesh, remat = execution.mesh, execution.remat
    cycle = _period(patterns, config)
    graphdef, state = nnx.split(self.layers)

    def attend(layer, x, pattern, rng, received):
      return layer.attend(x, pattern, call, rng, received)

    def feed_forward(layer, x, pattern, rng, received):
      del pattern, received
      return layer.feed_forward(x, call, rng), None

    def whole(layer, x, pattern, rng, received):
      return layer(x, pattern, call, rng, received)

    def run_part(part, x, of_cycle, i, received):
      if remat in ("offload", "offload_projections"):
        x = checkpoint_name(x, _INPUT)
      state, rng = jax.tree.map(lambda leaf: leaf[i], of_cycle)
      layer = nnx.merge(graphdef, sharding.gathered(state, mesh))
      x, sent = part(layer, x, cycle[i], rng, received)
      return sharding.constrain(x, mesh, "batch", "seq", None), sent

    # Offloaded inputs take no room on the device. With one for each half of a
    # layer, the backward pass of one half needs nothing from the other.
    parts = (attend, feed_forward) if remat == "offload" else (whole,)
    if remat != "none":
      # XLA inlines a scan of one step, and may then merge what is recomputed
      # with what was computed first: prevent_cse forbids that. It also keeps
      # the halves of a layer one after the other. `run_part` slices the stacked
      # weights itself: a slice made outside would be saved with each layer's
      # input, a second copy of the model.
      policies = jax.checkpoint_policies
      save = policies.save_only_these_names
      offload = functools.partial(
        policies.save_and_offload_only_these_names,
        names_which_can_be_saved=[],
        offload_src="device",
        offload_dst="pinned_host",
      )
      policy = {
        "projections": save(_PROJECTED, SAVED),
        "offload_projections": offload(
          names_which_can_be_offloaded=[_INPUT, _PROJECTED, SAVED]
        ),
        "attention": save(SAVED),
        "layer": None,
        "offload": offload(names_which_can_be_offloaded=[_INPUT]),
      }[remat]
      run_part = jax.checkpoint(
        run_part,
        prevent_cse=(
          len(cycle) == config.num_layers
          or remat == "offload"
          or (execution.unroll and remat != "projections")
        ),
        policy=policy,
        static_argnums=(0, 3),
      )

    def run_layer(x, of_cycle, i, received):
      x, sent = run_part(parts[0], x, of_cycle, i, received)
      for part in parts[1:]:
        x, _ = run_part(part, x, of_cycle, i, None)
      return x, sent

    x = self.embed_tokens(tokens, mesh)
    x = sharding.constrain(x, mesh, "batch", "seq", None)
    of_layers = (state, self._dropout_rngs(rngs))
    x, sent = _scan_layers(
      run_layer,
      x,
      of_layers,
      len(cycle),
      received,
      unroll=execution.unroll,
    )
    return self.norm(x), sent

  def init_cache(
    self, batch: int, capacity: int, mesh: Mesh | None = None
  ) -> Cache:
    """Returns an empty cache for sequences of up to `capacity` tokens.

    Args:
      batch: Sequences.
      capacity: Tokens of each.
      mesh: Devices that it is divided over, by sequences and heads.
    """
    config = self.config
    shape = (
      config.num_layers,
      batch,
      capacity,
      config.num_kv_heads,
      config.head_dim,
    )
    device = None
    if mesh is not None:
      device = NamedSharding(
        mesh,
        sharding.activation_spec(
          mesh, shape, None, "batch", None, "kv_heads", None
        ),
      )
    return Cache(
      jnp.zeros(shape, self.dtype, device=device),
      jnp.zeros(shape, self.dtype, device=device),
    )

  def cached_hidden_states(
    self,
    tokens: jax.Array,
    cache: Cache,
    patterns: Patterns = None,
    execution: Execution = DEFAULT_EXECUTION,
    *,
    starts: jax.Array | None = None,
    inv_freq: jax.Array | np.ndarray | None = None,
  ) -> tuple[jax.Array, Cache]:
    """Returns the hidden states of tokens that continue cached sequences.

    Args:
      tokens: Integers, `[batch, seq]`.
      cache: From `init_cache` or from an earlier call.
      patterns: As in `hidden_states`, with position causality.
      execution: As in `hidden_states`; its mesh does not divide sequences.
      starts: Position of the first token of each sequence, integers `[batch]`;
        later entries of the cache are overwritten. None starts new sequences,
        at the cost of the pattern; calls with `starts` read the whole cache.
      inv_freq: Frequencies of RoPE, `[head_dim / 2]`; None uses those for the
        cache's capacity, which matters only for "dynamic" scaling.

    Returns:
      `[batch, seq, hidden]` and the cache with the tokens in it.

    Raises:
      ValueError: Shapes or the number of patterns do not fit, or a pattern is
        causal by slot.
      NotImplementedError: The mesh divides sequences.
    """
    hidden, cache, _ = self._run_cached(
      tokens, cache, patterns, execution, starts, inv_freq
    )
    return hidden, cache

  def prompt_segment(
    self,
    tokens: jax.Array,
    cache: Cache,
    patterns: Patterns,
    execution: Execution,
    *,
    segment: Segment,
    received: tuple[Messages | None, ...],
    inv_freq: jax.Array | np.ndarray | None = None,
  ) -> tuple[jax.Array, Cache, tuple[Messages | None, ...]]:
    """Returns the hidden states of a segment of new sequences.

    `segments.read_prompts` calls it for one segment after another. Layers that
    receive messages attend by those, the others over the whole cache.

    Args:
      tokens: Integers of the segment, `[batch, length]`.
      cache: With all segments before.
      patterns: As in `cached_hidden_states`.
      execution: As in `hidden_states`, without a mesh.
      segment: Which segment this is.
      received: What earlier segments sent; `first_messages` for the first.
      inv_freq: As in `cached_hidden_states`.

    Returns:
      `[batch, length, hidden]`, the cache with the segment in it, and what the
      segment sends.

    Raises:
      ValueError: As in `cached_hidden_states`.
    """
    starts = jnp.full(tokens.shape[:1], segment.index * segment.length)
    return self._run_cached(
      tokens, cache, patterns, execution, starts, inv_freq, segment, received
    )

  def _run_cached(
    self,
    tokens: jax.Array,
    cache: Cache,
    patterns: Patterns,
    execution: Execution,
    starts: jax.Array | None,
    inv_freq: jax.Array | np.ndarray | None,
    segment: Segment | None = None,
    received: tuple[Messages | None, ...] | None = None,
  ) -> tuple[jax.Array, Cache, Any]:
    """Returns the hidden states, the cache, and what the layers send."""
    check_tokens(tokens, None, self.config.vocab_size)
    config, mesh = self.config, execution.mesh
    if mesh is not None and mesh.shape[sharding.SEQUENCE] > 1:
      raise NotImplementedError(
        "a cache holds whole sequences: leave sequence out of the mesh."
      )
    cycle = _period(patterns, config)
    for pattern in cycle:
      for member in members(pattern):
        if member.causality != "position":
          raise ValueError(
            "a cache needs patterns with causality='position', got"
            f" {member.causality!r}."
          )
    seq_len = tokens.shape[1]
    if cache.key.shape[1] != tokens.shape[0] or cache.key.shape[2] < seq_len:
      raise ValueError(
        f"the cache has {cache.key.shape[1]} sequences of {cache.key.shape[2]}"
        f" tokens, but the tokens are {list(tokens.shape)}."
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
    call = _Call(rotation, execution, starts=starts, segment=segment)
    graphdef, state = nnx.split(self.layers)

    def run_layer(carry, of_cycle, i, received):
      x, cache = carry
      state, layer = jax.tree.map(lambda leaf: leaf[i], of_cycle)
      x, of_layer = nnx.merge(graphdef, sharding.gathered(state, mesh))(
        x, cycle[i], call, None, _LayerCache(cache, layer, received)
      )
      assert isinstance(of_layer, _LayerCache)
      x = sharding.constrain(x, mesh, "batch", None, None)
      return (x, of_layer.cache), of_layer.messages

    # The cache is carried, not scanned over, so that it is updated in place.
    (x, cache), sent = _scan_layers(
      run_layer,
      (self.embed_tokens(tokens, mesh), cache),
      (state, jnp.arange(config.num_layers)),
      len(cycle),
      received,
    )
    return self.norm(x), cache, sent

  def _dropout_rngs(self, rngs: nnx.Rngs | None) -> jax.Array | None:
    """Returns the randomness of each layer, `[layers]`, or None."""
    if rngs is None or self.lora is None or self.lora.dropout == 0:
      return None
    return jax.random.split(rngs.dropout(), self.config.num_layers)

  def _head(self) -> tuple[jax.Array, int]:
    """Returns the output head, and its axis that is summed over."""
    if self.lm_head is None:
      return self.embed_tokens.embedding[...], 1
    return self.lm_head.kernel[...], 0

  def head(self, hidden: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Returns `logits` for parts of `hidden`, for a training step.

    The head is cast to the compute dtype once, for a loop over parts of the
    sequence, and only once `hidden` exists: otherwise XLA hoists the cast out
    of the micro-batch loop and keeps the copy alive while the layers run.

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
