"""Writes a model, or an adapter, in the form that other tools read.

python -m experiments.export --adapter=runs/scca_fixed/adapter --format=hf \
  --output_dir=extended

`--format=hf` fuses the adapter into the weights and writes a Hugging Face
folder whose config.json has the rope scaling; `--format=peft` writes the
adapter for PEFT, embeddings and norms included. A GGUF file can be the model.
"""

import pathlib
from typing import Any

import jax.numpy as jnp
from absl import flags

from experiments.shared import cli, resolve
from experiments.shared import flags as shared_flags
from scca_jax import adapters, assets, convert

_MODEL = shared_flags.define_model()
_ADAPTER = shared_flags.define_adapter(
  "Folder of the adapter to fuse or write."
)
_DTYPE = shared_flags.define_dtype(
  None, "Dtype of the tensors; by default that of the files read."
)
_ROPE_SCALING, _ROPE_FACTOR = shared_flags.define_rope(
  "the context grows by it as well"
)
_FORMAT = flags.DEFINE_enum(
  "format", "hf", ("hf", "peft"), "hf: a fused model; peft: the adapter."
)
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir", None, "Folder to write; new or empty."
)
_MAX_SHARD_GB = flags.DEFINE_float(
  "max_shard_gb", 5.0, "Largest file of weights, in 10^9 bytes."
)


def _check_flags() -> pathlib.Path:
  """Returns the folder to write."""
  if not _OUTPUT_DIR.value:
    raise ValueError("say where to write: --output_dir=FOLDER.")
  output_dir = pathlib.Path(_OUTPUT_DIR.value)
  if output_dir.exists() and (
    not output_dir.is_dir() or any(output_dir.iterdir())
  ):
    raise ValueError(
      f"--output_dir={output_dir} is not empty: name a new folder."
    )
  if _FORMAT.value == "peft" and _ADAPTER.value is None:
    raise ValueError("--format=peft writes an adapter: give --adapter=FOLDER.")
  if not _MAX_SHARD_GB.value > 0:
    raise ValueError(
      f"--max_shard_gb must be above 0, got {_MAX_SHARD_GB.value}."
    )
  shared_flags.check_exist(_MODEL, _ADAPTER)
  shared_flags.check_rope(_ROPE_SCALING, _ROPE_FACTOR, _ADAPTER)
  return output_dir


def main() -> None:
  """Runs the command.

  Raises:
    ValueError: A flag is out of range, or the input is damaged.
    OSError: A file is missing or cannot be written.
  """
  output_dir = _check_flags()
  source = pathlib.Path(_MODEL.value or assets.MODEL)
  param_dtype = convert.stored_dtype(source)
  model: Any = resolve.load_model(
    source,
    _ADAPTER.value,
    config=resolve.with_factor(source, _ROPE_SCALING.value, _ROPE_FACTOR.value),
    param_dtype=param_dtype,
  )
  if _FORMAT.value == "hf":
    dtype = jnp.dtype(_DTYPE.value or param_dtype)
    convert.copy_tokenizer(
      source, output_dir, context_len=model.config.context_len
    )
    convert.save_model(
      model,
      output_dir,
      dtype=dtype,
      max_shard_bytes=max(1, int(_MAX_SHARD_GB.value * 10**9)),
    )
    config = model.config
    kind = config.rope_scaling.kind if config.rope_scaling else "no"
    print(
      f"{output_dir}: {dtype.name}, {config.context_len:,} tokens of context,"
      f" {kind} rope scaling"
    )
    return
  dtype = jnp.dtype(_DTYPE.value or adapters.stored_dtype(_ADAPTER.value or ""))
  adapters.save_adapter(
    model,
    output_dir,
    base_model=str(source),
    patterns=adapters.load_patterns(_ADAPTER.value or ""),
    dtype=dtype,
  )
  print(f"{output_dir}: {dtype.name}, LoRA rank {model.lora.rank}")


if __name__ == "__main__":
  cli.run(main)
