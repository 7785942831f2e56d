"""How the parameters of a model lie in Hugging Face's files.

A parameter's path is its place in `Llama`, such as `("layers", "mlp",
"up_proj", "kernel")`. The files have a tensor for each layer, and hold matrices
as `[out, in]`.
"""

from typing import Any

import jax
from flax import nnx, traverse_util

from scca_jax.llama import Llama
from scca_jax.llama_config import LlamaConfig
from scca_jax.lora import LoraConfig

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

ParameterPath = tuple[str, ...]


def file_names(path: ParameterPath, num_layers: int) -> list[str]:
  """Returns the Hugging Face names of a parameter's tensors.

  Args:
    path: Path of the parameter in the model.
    num_layers: Number of layers of the model.

  Returns:
    One name per layer for parameters stacked over the layers; one name for the
    others.
  """
  *modules, leaf = path
  suffix = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}.get(
    leaf, "weight"
  )
  if modules[0] == "layers":
    rest = ".".join((*modules[1:], suffix))
    return [f"model.layers.{i}.{rest}" for i in range(num_layers)]
  prefix = "" if modules[0] == "lm_head" else "model."
  return [prefix + ".".join((*modules, suffix))]


def is_transposed(path: ParameterPath) -> bool:
  """Whether the files hold the parameter as `[out, in]`, ours `[in, out]`."""
  return path[-1] in ("kernel", "lora_a", "lora_b")


def is_adapter(path: ParameterPath) -> bool:
  """Returns whether the parameter at `path` is a matrix of an adapter."""
  return path[-1] in ("lora_a", "lora_b")


def _flatten(state: nnx.State) -> dict[ParameterPath, Any]:
  """Returns the arrays of a state by path."""
  flat: Any = traverse_util.flatten_dict(nnx.to_pure_dict(state))
  return flat


def abstract(
  config: LlamaConfig, lora: LoraConfig | None, dtype: Any, param_dtype: Any
) -> tuple[nnx.GraphDef, nnx.State, dict[ParameterPath, jax.ShapeDtypeStruct]]:
  """Returns a model's structure, and its parameters' shapes by path.

  Args:
    config: Sizes of the model.
    lora: Its adapters.
    dtype: Dtype of the computation.
    param_dtype: Dtype that weights are held in.
  """
  model = nnx.eval_shape(
    lambda: Llama(
      config,
      lora=lora,
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=nnx.Rngs(0),
    )
  )
  graphdef, state = nnx.split(model)
  return graphdef, state, _flatten(state)


def parameters(model: Llama) -> dict[ParameterPath, jax.Array]:
  """Returns a model's parameters by path."""
  return _flatten(nnx.state(model, nnx.Param))
