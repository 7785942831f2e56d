"""Writes a model or an adapter in a form that other tools read.

scca export --adapter=runs/scca_fixed/adapter --format=hf \
  --output_dir=extended

* `hf`: a Hugging Face folder with the adapter fused into the weights and the
  rope scaling in its config.json.
* `gguf`: the same in one file for llama.cpp, tokenizer included.
* `peft`: the adapter for PEFT, with the norms and embeddings that were trained.
* `peft_plain`: for tools that only take LoRA matrices (vLLM, SGLang, llama.cpp,
  Ollama): a base with norms, embeddings and rope scaling, and the adapter
  separately.

Every folder gets a model card, README.md. The model may be a GGUF file.
"""

import pathlib
from typing import Any

import jax.numpy as jnp
from absl import flags, logging

from experiments.shared import cli, model_card, resolve
from experiments.shared import flags as shared_flags
from scca_jax import (
  adapters,
  atomic_file,
  convert,
  gguf_file,
  gguf_vocabulary,
  gguf_writer,
)
from scca_jax.llama import Llama

_MODEL = shared_flags.define_model()
_ADAPTER = shared_flags.define_adapter(
  "Folder of the adapter to fuse or write."
)
_DTYPE = shared_flags.define_dtype(
  None, "Dtype of the tensors; by default the dtype of the input files."
)
_ROPE_SCALING, _ROPE_FACTOR = shared_flags.define_rope(
  "the context grows by it as well"
)
_FORMAT = flags.DEFINE_enum(
  "format",
  "hf",
  ("hf", "gguf", "peft", "peft_plain"),
  "hf, gguf: a fused model; peft: the adapter; peft_plain: the adapter without"
  " trained norms and embeddings, and a base that has them.",
)
_GGUF_TYPE = flags.DEFINE_enum(
  "gguf_type",
  None,
  gguf_writer.KINDS,
  "Type of a GGUF's matrices; by default F16.",
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
    raise ValueError("no folder to write to: give --output_dir=FOLDER.")
  output_dir = pathlib.Path(_OUTPUT_DIR.value)
  if not atomic_file.is_free(output_dir):
    raise ValueError(
      f"--output_dir={output_dir} is not empty: use a new folder."
    )
  atomic_file.check_writable(output_dir / "config.json")
  if _FORMAT.value.startswith("peft") and _ADAPTER.value is None:
    raise ValueError(
      f"--format={_FORMAT.value} writes an adapter: give --adapter=FOLDER."
    )
  if _FORMAT.value == "gguf" and _DTYPE.value is not None:
    raise ValueError(
      "--dtype does not apply to gguf: give --gguf_type, one of"
      f" {', '.join(gguf_writer.KINDS)}."
    )
  if _FORMAT.value != "gguf" and _GGUF_TYPE.value is not None:
    raise ValueError(
      f"--gguf_type={_GGUF_TYPE.value} needs --format=gguf, not"
      f" {_FORMAT.value}."
    )
  if not 0 < _MAX_SHARD_GB.value < 1e9:
    raise ValueError(
      "--max_shard_gb must be above 0 and below 10^9, got"
      f" {_MAX_SHARD_GB.value}."
    )
  shared_flags.check_exist(_MODEL, _ADAPTER)
  shared_flags.check_rope(_ROPE_SCALING, _ROPE_FACTOR, _ADAPTER)
  return output_dir


def _save_model(
  model: Llama, source: pathlib.Path, folder: pathlib.Path, dtype: Any, **card
) -> None:
  """Writes a model's folder, with its adapter fused except for peft_plain."""
  convert.copy_tokenizer(source, folder, context_len=model.config.context_len)
  convert.save_model(
    model,
    folder,
    dtype=dtype,
    max_shard_bytes=max(1, int(_MAX_SHARD_GB.value * 10**9)),
    fuse=_FORMAT.value == "hf",
  )
  model_card.write(folder, library="transformers", **card)


def _save_gguf(
  model: Llama,
  source: pathlib.Path,
  folder: pathlib.Path,
  output_dir: pathlib.Path,
  **card,
) -> str:
  """Writes a folder with a single file, and returns its path."""
  kind = _GGUF_TYPE.value or "F16"
  name = f"{output_dir.resolve().name}-{kind}.gguf"
  vocabulary = gguf_vocabulary.fields(source, model.config)
  gguf_writer.save_gguf(model, folder / name, vocabulary=vocabulary, kind=kind)
  ends = set(gguf_file.GgufFile(folder / name).config.eos_token_ids)
  if ends != set(model.config.eos_token_ids):
    logging.warning(
      "llama.cpp ends generation at the tokens %s, not at %s: it recognises end"
      " tokens by name, and allows two besides the end of the text.",
      sorted(ends),
      sorted(model.config.eos_token_ids),
    )
  loading = model_card.for_llama_cpp(
    output_dir / name,
    model.config.context_len,
    of_pieces=vocabulary.get("tokenizer.ggml.model") == "llama",
  )
  model_card.write(folder, loading, library="gguf", **card)
  return name


def _warn_of_peft(model: Llama, source: pathlib.Path) -> None:
  """Warns of what PEFT, and tools that read its files, would not see."""
  lora: Any = model.lora
  if lora.train_embeddings or lora.train_norms:
    logging.warning(
      "vLLM and SGLang refuse an adapter with trained norms or embeddings;"
      " llama.cpp and Ollama refuse the embeddings and ignore the norms:"
      " --format=peft_plain writes what they accept."
    )
  base, scaling = convert.load_config(source), model.config.rope_scaling
  if scaling is not None and scaling != base.rope_scaling:
    logging.warning(
      "PEFT sees neither this adapter's rope scaling (%s, factor %g) nor its"
      " pattern: set the rope scaling on the base as the adapter's README.md"
      " shows, or use --format=peft_plain.",
      scaling.kind,
      scaling.factor,
    )


def _save_adapter(
  model: Any,
  source: pathlib.Path,
  folder: pathlib.Path,
  output_dir: pathlib.Path,
  dtype: Any,
  **card,
) -> None:
  """Writes an adapter and, for peft_plain, its base."""
  path = _ADAPTER.value or ""
  settings: dict[str, Any] = {
    "base_model": card["base"],
    "patterns": card["layers"],
    "run": card["run"],
    "dtype": jnp.dtype(_DTYPE.value or adapters.stored_dtype(path)),
  }
  if _FORMAT.value == "peft":
    _warn_of_peft(model, source)
    loading = model_card.for_peft(output_dir, card["base"], model.config)
  else:
    base = output_dir / "base"
    loading = model_card.for_plain_peft(
      output_dir / "adapter", base, model.config, model.lora.rank
    )
    _save_model(model, source, folder / "base", dtype, loading=loading, **card)
    folder /= "adapter"
    settings |= {"plain": True, "base_model": str(base)}
    card["base"] = str(base)
  adapters.save_adapter(model, folder, **settings)
  model_card.write(folder, loading, library="peft", **card)


def main() -> None:
  """Runs the command.

  Raises:
    ValueError: A flag is out of range, or the input is damaged.
    OSError: A file is missing or cannot be written.
  """
  output_dir = _check_flags()
  source = resolve.model_path(_MODEL.value)
  param_dtype = convert.stored_dtype(source)
  model: Any = resolve.load_model(
    source,
    _ADAPTER.value,
    config=resolve.with_factor(source, _ROPE_SCALING.value, _ROPE_FACTOR.value),
    param_dtype=param_dtype,
  )
  dtype = jnp.dtype(_DTYPE.value or param_dtype)
  card: dict[str, Any] = {
    "title": output_dir.resolve().name,
    "base": str(source),
    "config": model.config,
  }
  if _ADAPTER.value is not None:
    card |= {
      "layers": adapters.load_patterns(_ADAPTER.value),
      "adapter": model.lora,
      "run": adapters.load_run(_ADAPTER.value),
    }
  written = str(output_dir)
  with atomic_file.new_folder(output_dir) as folder:
    if _FORMAT.value == "gguf":
      name = _save_gguf(model, source, folder, output_dir, **card)
      written = str(output_dir / name)
    elif _FORMAT.value == "hf":
      loading = model_card.for_transformers(output_dir)
      _save_model(model, source, folder, dtype, loading=loading, **card)
    else:
      _save_adapter(model, source, folder, output_dir, dtype, **card)
  scaling = model.config.rope_scaling
  print(
    f"{written}: {_FORMAT.value}, {model.config.context_len:,} tokens of"
    f" context, {scaling.kind if scaling else 'no'} rope scaling"
  )


if __name__ == "__main__":
  cli.run(main)
