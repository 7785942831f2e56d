"""Frozen weights in eight or four bits, with qwix's arrays.

Only the matrices of the layers are quantised. Each is converted to a float
dtype where it is used, one layer at a time; trained parameters (adapters,
norms, embeddings) stay float32 (QLoRA, arXiv 2305.14314). qwix is imported only
when something is quantised.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# "int8": integers from -128 to 127, with a scale per output channel. "nf4": 16
# values spaced for normally distributed weights, with a scale per output
# channel and block of inputs. Scales are float32.
METHODS = ("int8", "nf4")
# Inputs that share a scale, as in QLoRA; fewer if they are not divisible by it.
NF4_BLOCK = 64


def check_method(method: str | None) -> None:
  """Checks the name of a method; None is float weights.

  Raises:
    ValueError: It is unknown.
  """
  if method is not None and method not in METHODS:
    raise ValueError(
      f"unknown quantisation {method!r}: use one of {', '.join(METHODS)} or"
      " None."
    )


@functools.partial(jax.jit, static_argnames="method")
def quantize_matrix(kernel: jax.Array, method: str) -> Any:
  """Returns a matrix as a `qwix.QArray`.

  Args:
    kernel: `[in, out]`, any float dtype.
    method: One of `METHODS`.
  """
  import qwix

  settings: dict[str, Any]
  if method == "int8":
    settings = {"qtype": jnp.int8, "channelwise_axes": (1,)}
  else:
    block = math.gcd(kernel.shape[-2], NF4_BLOCK)
    settings = {
      "qtype": "nf4",
      "channelwise_axes": (1,),
      "tiled_axes": {0: block},
    }
  return qwix.quantize(kernel.astype(jnp.float32), **settings)


@functools.partial(jax.jit, static_argnames="method")
def quantize_layers(kernel: jax.Array, method: str) -> Any:
  """Returns stacked matrices, `[layers, in, out]`, each quantised by itself."""
  # One layer at a time: a float32 copy of all would take twice the space.
  return jax.lax.map(lambda layer: quantize_matrix(layer, method), kernel)


def dequantize(kernel: Any, dtype: Any) -> jax.Array:
  """Returns a matrix in a float dtype, whether it was quantised or not.

  Args:
    kernel: An array or a `qwix.QArray`, `[..., in, out]`.
    dtype: The dtype wanted.
  """
  if method_of(kernel) is None:
    return kernel.astype(dtype)
  import qwix

  return qwix.dequantize(kernel).astype(dtype)


def method_of(kernel: Any) -> str | None:
  """Returns the method that a matrix was quantised with, or None."""
  qtype = getattr(kernel, "qtype", None)
  return qtype if qtype in (None, "nf4") else "int8"


def is_quantizable(path: tuple[Any, ...]) -> bool:
  """Whether a parameter is a matrix of the layers, given its path of names."""
  return path[0] == "layers" and path[-1] == "kernel"


def quantize_model(model: Any, method: str | None) -> Any:
  """Returns a `Llama` whose layers have quantised matrices.

  Args:
    model: With float weights, which must be frozen: a quantised matrix has no
      gradient.
    method: One of `METHODS`; None changes nothing.

  Raises:
    ValueError: The method is unknown.
  """
  check_method(method)
  if method is None:
    return model
  graphdef, state = nnx.split(model)
  flat = dict(nnx.to_flat_state(state))
  for path, variable in flat.items():
    if is_quantizable(path):
      flat[path] = variable.replace(quantize_layers(variable[...], method))
  return nnx.merge(graphdef, nnx.from_flat_state(flat))
