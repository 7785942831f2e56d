"""Computes sequences a segment at a time, in memory that does not grow.

With chunked attention a token sees only a few keys before its segment: in
`scca_fixed`, half a chunk for half the heads. So a sequence can go through all
layers one segment after another, each passing on only the keys and values that
later ones see. `halos` plans which, as for the shards of a mesh.

The gradients are exact. Of each segment, only what it receives is kept. The
backward pass, from the last segment to the first, recomputes each from that and
hands the gradients of those keys and values to the segments they came from.
Here that is reverse mode through a loop over `jax.checkpoint`.

Prompts are read into a cache the same way (`read_prompts`). As the cache has
all earlier keys, patterns of any reach work there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from scca_jax import llama, patterns
from scca_jax.llama import Cache, Execution, Llama, Patterns
from scca_jax.llama_config import LlamaConfig
from scca_jax.segment_attention import Messages, Segment, refuses_segments

# Name under which `jax.checkpoint` moves what is kept into the host's memory.
_RECEIVED = "scca_received"

# Of the layers of a cycle; None for a layer that receives nothing.
Received = tuple[Messages | None, ...]


def check(
  layers: Patterns,
  config: LlamaConfig,
  *,
  segment_len: int | None,
  seq_len: int,
  packed: bool = False,
  num_devices: int = 1,
) -> None:
  """Checks that a sequence can be computed a segment at a time.

  Args:
    layers: Patterns of the layers; see `Llama.hidden_states`.
    config: Sizes of the model.
    segment_len: Tokens per segment; None means the whole sequence.
    seq_len: Tokens of the sequence.
    packed: Whether it has segment ids, for packed documents.
    num_devices: Devices of a mesh.

  Raises:
    ValueError: It cannot; the message names the pattern and the reason.
  """
  if segment_len is None or seq_len <= segment_len:
    return
  check_devices(segment_len, num_devices)
  for layer in dict.fromkeys(llama.by_layer(layers, config)):
    for member in patterns.members(layer):
      reason = refuses_segments(member, segment_len, packed=packed)
      if reason is not None:
        raise ValueError(
          f"segment_len={segment_len} does not work with"
          f" {patterns.text(layer, num_kv_heads=config.num_kv_heads)}:"
          f" {reason}."
        )


def check_devices(segment_len: int, num_devices: int) -> None:
  """Checks that the devices can compute segments.

  Args:
    segment_len: Tokens per segment.
    num_devices: Devices of a mesh.

  Raises:
    ValueError: There are several.
  """
  if num_devices > 1:
    raise ValueError(
      f"segment_len={segment_len} needs a single device, not {num_devices}:"
      " leave out the mesh, or segment_len."
    )


def _map(function: Callable[..., Any], *trees: Received) -> Received:
  """Returns `function(distance, *leaves)` of every leaf; None is `first`."""

  def of_layer(*of_trees: Messages | None) -> Messages | None:
    messages = [m for m in of_trees if m is not None]
    if not messages:
      return None
    calls = zip(*(m.by_distance for m in messages), strict=True)
    firsts = [m.first for m in messages]
    return Messages(
      tuple({d: function(d, *(x[d] for x in c)) for d in c[0]} for c in calls),
      None if firsts[0] is None else function(None, *firsts),
    )

  return tuple(of_layer(*messages) for messages in zip(*trees, strict=True))


def scan(
  run: Callable[[Any, jax.Array, Received], tuple[Any, Any, Received]],
  carry: Any,
  nothing: Received,
  count: int,
  *,
  offload: bool = False,
) -> tuple[Any, Any]:
  """Returns the last carry, and the results of all segments, stacked.

  Args:
    run: Maps the carry, the index of a segment and what it receives to the new
      carry, its result and what it sends.
    carry: The first carry.
    nothing: What the first segment receives.
    count: Number of segments.
    offload: Whether what each segment receives, which the backward pass needs,
      is kept in the host's memory.
  """

  # In transit: for a distance d the last d messages, each at its segment modulo
  # d. The gradients of the first tokens come from all segments, so these are
  # carried and summed in float32.
  def empty(distance, x):
    if distance is None:
      return x.astype(jnp.float32)
    return jnp.zeros((distance, *x.shape), x.dtype)

  def turn(state: tuple[Any, Received], index: jax.Array) -> tuple[Any, Any]:
    carry, on_the_way = state

    def arriving(distance, x, like):
      if distance is None:
        return x.astype(like.dtype)
      return jax.lax.dynamic_index_in_dim(x, index % distance, keepdims=False)

    def sending(distance, x, new):
      if distance is None:
        return jnp.where(index == 0, new.astype(x.dtype), x)
      return jax.lax.dynamic_update_index_in_dim(x, new, index % distance, 0)

    # Only `run` is recomputed, and only its arguments are kept; messages in
    # transit may be much more.
    received = _map(arriving, on_the_way, nothing)
    carry, result, sent = checked(carry, index, received)
    return (carry, _map(sending, on_the_way, sent)), result

  def named(carry, index, received):
    if offload:
      received = checkpoint_name(received, _RECEIVED)
    return run(carry, index, received)

  policy = None
  if offload:
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=[_RECEIVED],
      offload_src="device",
      offload_dst="pinned_host",
    )
  checked = jax.checkpoint(named, policy=policy, prevent_cse=False)
  (carry, _), results = jax.lax.scan(
    turn, (carry, _map(empty, nothing)), jnp.arange(count)
  )
  return carry, results


def map_hidden_states(
  function: Callable[..., jax.Array],
  model: Llama,
  tokens: jax.Array,
  arrays: tuple[jax.Array, ...] = (),
  layers: Patterns = None,
  execution: Execution = llama.DEFAULT_EXECUTION,
  *,
  positions: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  rngs: nnx.Rngs | None = None,
) -> jax.Array:
  """Returns `function(hidden, *arrays)`, a segment at a time.

  The hidden states of a segment, `execution.segment_len` tokens, live only
  while the function is computed. If that is None, or the sequence is not
  longer, the whole sequence is one segment. Dropout is drawn for each segment
  separately.

  Args:
    function: Maps hidden states `[batch, n, hidden]` and the same part of the
      arrays to an array `[batch, n, ...]`, token by token.
    model: The model.
    tokens: Integers, `[batch, seq]`.
    arrays: Further arguments of the function, `[batch, seq, ...]`.
    layers: The patterns; see `Llama.hidden_states`.
    execution: See `Llama.hidden_states`.
    positions: See `Llama.hidden_states`.
    segment_ids: Packed documents; see `Llama.hidden_states`.
    rngs: See `Llama.hidden_states`.

  Returns:
    The function's results, `[batch, seq, ...]`.

  Raises:
    ValueError: Shapes or the number of patterns do not fit, there is a mesh, or
      a pattern looks back too far; see `check`.
  """
  batch, seq_len = tokens.shape
  length = execution.segment_len
  if length is None or seq_len <= length:
    hidden = model.hidden_states(
      tokens,
      layers,
      execution,
      positions=positions,
      segment_ids=segment_ids,
      rngs=rngs,
    )
    return function(hidden, *arrays)
  llama.check_tokens(tokens, positions, model.config.vocab_size)
  check(
    layers,
    model.config,
    segment_len=length,
    seq_len=seq_len,
    packed=segment_ids is not None,
    num_devices=1 if execution.mesh is None else execution.mesh.size,
  )
  if positions is None:
    positions = llama.default_positions(seq_len, segment_ids)
  count = -(-seq_len // length)
  filling = count * length - seq_len

  # The last segment is padded after the end of the sequence, where no token
  # looks.
  def filled(x):
    return jnp.pad(x, ((0, 0), (0, filling)) + ((0, 0),) * (x.ndim - 2))

  tokens, positions, segment_ids, arrays = jax.tree.map(
    filled, (tokens, positions, segment_ids, arrays)
  )
  rng = None if rngs is None else rngs.dropout()

  def run(carry: None, index: jax.Array, received: Received) -> tuple:
    def part(x):
      return jax.lax.dynamic_slice_in_dim(x, index * length, length, axis=1)

    of_segment = None
    if rng is not None:
      of_segment = nnx.Rngs(dropout=jax.random.fold_in(rng, index))
    hidden, sent = model.segment_hidden_states(
      part(tokens),
      layers,
      execution,
      segment=Segment(index, segment_ids, count, length),
      received=received,
      positions=part(positions),
      seq_len=seq_len,
      rngs=of_segment,
    )
    return carry, function(hidden, *map(part, arrays)), sent

  _, results = scan(
    run,
    None,
    model.first_messages(layers, Segment(0, None, count, length), batch),
    count,
    offload=execution.offload_segments,
  )
  joined = jnp.moveaxis(results, 0, 1)
  return joined.reshape(batch, count * length, *joined.shape[3:])[:, :seq_len]


def read_prompts(
  model: Llama,
  tokens: jax.Array,
  cache: Cache,
  last: jax.Array,
  layers: Patterns,
  execution: Execution,
  *,
  inv_freq: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
  """Returns the hidden states of the prompts' last tokens, and the cache.

  The prompts go through the layers `execution.segment_len` tokens at a time.
  Layers whose pattern `refuses_segments` turns down read the whole cache for
  each segment; the others take the time of their pattern.

  Args:
    model: The model.
    tokens: Integers `[batch, seq]`, padded after the end of a prompt.
    cache: Empty, for at least as many tokens.
    last: Position of each prompt's last token, `[batch]`.
    layers: The patterns; see `Llama.cached_hidden_states`.
    execution: See `Llama.cached_hidden_states`; without a mesh.
    inv_freq: See `Llama.cached_hidden_states`.

  Returns:
    `[batch, hidden]` and the cache with the prompts in it.

  Raises:
    ValueError: There is a mesh, or as in `Llama.cached_hidden_states`.
  """
  batch, seq_len = tokens.shape
  length = execution.segment_len or seq_len
  check_devices(length, 1 if execution.mesh is None else execution.mesh.size)
  count = -(-seq_len // length)
  # What the padding of the last segment writes beyond the cache is dropped.
  tokens = jnp.pad(tokens, ((0, 0), (0, count * length - seq_len)))

  def run(carry, index: jax.Array, received: Received) -> tuple:
    cache, found = carry
    hidden, cache, sent = model.prompt_segment(
      jax.lax.dynamic_slice_in_dim(tokens, index * length, length, axis=1),
      cache,
      layers,
      execution,
      segment=Segment(index, None, count, length),
      received=received,
      inv_freq=inv_freq,
    )
    of_last = jnp.take_along_axis(
      hidden, (last % length)[:, None, None], axis=1
    )[:, 0]
    found = jnp.where((last // length == index)[:, None], of_last, found)
    return (cache, found), None, sent

  hidden_size = model.config.hidden_size
  (cache, found), _ = scan(
    run,
    (cache, jnp.zeros((batch, hidden_size), model.dtype)),
    model.first_messages(layers, Segment(0, None, count, length), batch),
    count,
  )
  return found, cache
