r"""Compares gradients of segments with those of one piece, in bfloat16.

    python -m experiments.results.one_million.gradients --seq_len=65536 \
      --segment_len=16384 --output=gradients.json

A model of the shape of `--model` with random weights in bfloat16 and adapters
alone to train; both matrices of each are drawn, so that no gradient is 0. The
truth is one piece computed in float32, from the same weights. It prints, for
each kind of adapter, the largest error over the largest entry of the truth, of
segments in bfloat16 and of one piece in bfloat16, and ends with status 1 if the
first is more than twice the second somewhere (SPEC 3, for 16 bits).
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from experiments.shared import cli, resolve
from scca_jax import atomic_file, convert, lora, losses, segments
from scca_jax.llama import Execution, Llama

_MODEL = flags.DEFINE_string(
  "model", "llama2-7b", "Shape, or folder with a config.json."
)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 65536, "Tokens of the sequence.")
_SEGMENT_LEN = flags.DEFINE_integer("segment_len", 16384, "Of a segment.")
_PATTERN = flags.DEFINE_string(
  "pattern", "scca_fixed(chunk_size=2048)", "Attention pattern."
)
_OUTPUT = flags.DEFINE_string("output", None, "Where to write JSON.")
_LORA = lora.LoraConfig(rank=8, train_embeddings=False, train_norms=False)


def _gradients(dtype: Any, segment_len: int | None) -> dict[str, np.ndarray]:
  """Returns the gradient of each adapter, of all layers, by its name."""
  config = convert.load_config(resolve.model_path(_MODEL.value))
  layers = resolve.make_patterns(_PATTERN.value, config, _SEQ_LEN.value)
  execution = Execution(
    # The truth is the one of all layers: kernels serve 16 bits.
    implementation="xla" if dtype == jnp.float32 else None,
    remat="layer",
    mlp_chunk=1024,
    segment_len=segment_len,
    offload_segments=segment_len is not None,
  )

  def make() -> Llama:
    return Llama(
      config,
      lora=_LORA,
      dtype=dtype,
      param_dtype=jnp.bfloat16,
      rngs=nnx.Rngs(0),
    )

  graphdef, shapes, _ = nnx.split(
    nnx.eval_shape(make), lora.trainable(_LORA), ...
  )
  # Under jit they are drawn on the device, each in its own dtype.
  frozen = jax.jit(lambda: nnx.split(make(), lora.trainable(_LORA), ...)[2])()
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(0.02 * rng.normal(size=x.shape), x.dtype), shapes
  )
  tokens = rng.integers(0, config.vocab_size, (1, _SEQ_LEN.value + 1))

  def loss_of(params, frozen, tokens):
    model = nnx.merge(graphdef, params, frozen)

    def losses_of(hidden, targets):
      return losses.token_losses(model.head(hidden), hidden, targets, 512)

    of_tokens = segments.map_hidden_states(
      losses_of, model, tokens[:, :-1], (tokens[:, 1:],), layers, execution
    )
    return jnp.mean(of_tokens)

  # float32 products on a GPU would otherwise have the 10 bits of TF32.
  with jax.default_matmul_precision("highest"):
    found = jax.jit(jax.grad(loss_of))(
      params, frozen, jnp.asarray(tokens, jnp.int32)
    )
  return {
    jax.tree_util.keystr(path): np.asarray(leaf, np.float64)
    for path, leaf in jax.tree_util.tree_flatten_with_path(found)[0]
  }


def main() -> None:
  """Compares, prints a table and writes JSON."""
  truth = _gradients(jnp.float32, None)
  piece = _gradients(jnp.bfloat16, None)
  parts = _gradients(jnp.bfloat16, _SEGMENT_LEN.value)
  rows = {}
  for name, true in truth.items():
    errors = {
      which: float(np.abs(found[name] - true).max() / np.abs(true).max())
      for which, found in (("segments", parts), ("one piece", piece))
    }
    rows[name] = errors
    print(name, *(f"{key}: {x:.2e}" for key, x in errors.items()), flush=True)
  within = all(x["segments"] <= 2 * x["one piece"] for x in rows.values())
  result = {
    "model": _MODEL.value,
    "pattern": _PATTERN.value,
    "seq_len": _SEQ_LEN.value,
    "segment_len": _SEGMENT_LEN.value,
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "errors": rows,
    "within": within,
  }
  if _OUTPUT.value is not None:
    atomic_file.write_json(_OUTPUT.value, result)
  if not within:
    sys.exit(1)


if __name__ == "__main__":
  cli.run(main)
