"""Measures the perplexity of a model, or of a model with an adapter.

python -m experiments.evaluate --context_lens=256,512,1024
python -m experiments.evaluate --model=llama2-7b --adapter=runs/a/adapter \
  --data=pg19_test.bin --context_lens=2048,8192 --output=perplexity.json

Attention is dense unless `--pattern` asks for another.
"""

import dataclasses
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags, logging
from tqdm import tqdm

from experiments.shared import cli, resolve
from experiments.shared import flags as shared_flags
from scca_jax import (
  assets,
  atomic_file,
  convert,
  dispatch,
  perplexity,
  tokenizer,
)
from scca_jax.llama import Llama
from scca_jax.llama_config import LlamaConfig
from scca_jax.token_file import TokenFile

_MODEL = shared_flags.define_model()
_ADAPTER = shared_flags.define_adapter()
_TOKENIZER = shared_flags.define_tokenizer()
_DTYPE = shared_flags.define_dtype(
  "float32", "Dtype of weights and computation; losses are float32."
)
_IMPLEMENTATION = shared_flags.define_implementation()
_DATA = flags.DEFINE_string(
  "data",
  None,
  "Token file (.bin), or text: .txt, .jsonl, either with .gz, .xz or .zst, or a"
  " folder of such files; by default the embedded test books.",
)
_CONTEXT_LENS = shared_flags.define_lengths(
  "context_lens",
  None,
  "Window lengths in tokens, such as 1024,2048; by default the model's context"
  " length.",
)
_PROTOCOL = flags.DEFINE_enum(
  "protocol", "longlora", perplexity.PROTOCOLS, "How perplexity is defined."
)
_NUM_WINDOWS = flags.DEFINE_integer(
  "num_windows", None, "Evenly spaced windows per length; by default all."
)
_STRIDE = flags.DEFINE_integer(
  "stride",
  perplexity.LONGLORA_STRIDE,
  "Tokens between windows (strided, document).",
)
_PATTERN = flags.DEFINE_string(
  "pattern",
  None,
  f"Attention pattern, made for each length: {shared_flags.TRAINING} (the"
  f" adapter's), or {shared_flags.PATTERN_HELP}. By default dense.",
)
_ROPE_SCALING = flags.DEFINE_string(
  "rope_scaling",
  None,
  "Extend a model that was not tuned: linear, dynamic, ntk, yarn or llama3.",
)
_ROPE_FACTOR = flags.DEFINE_float(
  "rope_factor",
  None,
  "Its factor; by default the longest of --context_lens / the model's context"
  " length.",
)
_BATCH_TOKENS = flags.DEFINE_integer(
  "batch_tokens", 8192, "Tokens per batch of windows."
)
_OUTPUT = flags.DEFINE_string("output", None, "Results, a .json.")


def _check_protocol(context_lens: tuple[int, ...]) -> None:
  for context_len in context_lens:
    perplexity.check_settings(
      _PROTOCOL.value,
      context_len,
      num_windows=_NUM_WINDOWS.value,
      stride=_STRIDE.value,
    )


def _check_flags() -> None:
  """Checks what can be checked before a file is read."""
  _check_protocol(_CONTEXT_LENS.value or ())
  if _CONTEXT_LENS.value is None and _ROPE_SCALING.value is not None:
    raise ValueError("--rope_scaling needs the lengths, --context_lens=….")
  if _ROPE_SCALING.value is None and _ROPE_FACTOR.value is not None:
    raise ValueError("--rope_factor needs --rope_scaling=linear or another.")
  if _ROPE_SCALING.value is not None and _ADAPTER.value is not None:
    raise ValueError(
      "--rope_scaling is for models without an adapter: an adapter brings the"
      " one it was tuned with."
    )
  shared_flags.check_trained(_PATTERN, _ADAPTER)
  if _BATCH_TOKENS.value < 1:
    raise ValueError(
      f"--batch_tokens must be at least 1, got {_BATCH_TOKENS.value}."
    )
  dispatch.check_implementation(_IMPLEMENTATION.value)
  shared_flags.check_exist(_MODEL, _ADAPTER, _DATA, _TOKENIZER)
  shared_flags.check_output(_OUTPUT, ".json")


def _load(folder: pathlib.Path, config: LlamaConfig | None) -> Llama:
  dtype = jnp.dtype(_DTYPE.value)
  return resolve.load_model(
    folder, _ADAPTER.value, config=config, dtype=dtype, param_dtype=dtype
  )


def _open_tokens(
  folder: pathlib.Path, config: LlamaConfig, cache: pathlib.Path
) -> tuple[TokenFile, int | None]:
  """Returns the corpus, and its BOS if a tokenizer was needed to make it."""
  path = pathlib.Path(_DATA.value or assets.BOOKS_TEST)
  if path.suffix == ".bin":
    return TokenFile.open(path, vocab_size=config.vocab_size), None
  vocabulary = tokenizer.load(_TOKENIZER.value or folder)
  tokens = resolve.open_tokens(path, vocabulary, cache)
  # Messages should name what the user gave, not the file in the cache.
  return dataclasses.replace(tokens, name=str(path)), vocabulary.bos_id


def print_table(results: dict[int, perplexity.Perplexity]) -> None:
  """Prints a line for each context length."""
  skipped = any(result.num_skipped for result in results.values())
  columns = ["context", "windows", "tokens", "perplexity", "last quarter"]
  columns += ["skipped"] if skipped else []
  rows = [columns]
  for context_len, result in results.items():
    last = result.last_quarter
    row = [
      f"{context_len:,}",
      f"{result.num_windows:,}",
      f"{result.num_tokens:,}",
      f"{result.perplexity:.3f}",
      "-" if last is None else f"{last:.3f}",
    ]
    rows.append(row + ([f"{result.num_skipped:,}"] if skipped else []))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for row in rows:
    print("  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)))


def main() -> None:
  """Runs the command.

  Raises:
    ValueError: A flag is out of range, or the input is damaged or too short.
    OSError: A file is missing or cannot be written.
  """
  _check_flags()
  folder = pathlib.Path(_MODEL.value or assets.MODEL)
  config = convert.load_config(folder)
  model = None
  if _ADAPTER.value is not None:
    model = _load(folder, config)
    config = model.config
  context_lens = _CONTEXT_LENS.value or (config.context_len,)
  _check_protocol(context_lens)
  config = resolve.extended(
    config, _ROPE_SCALING.value, _ROPE_FACTOR.value, max(context_lens)
  )
  layers = {
    n: resolve.trained_or_made(_PATTERN.value, _ADAPTER.value, config, n)
    for n in context_lens
  }
  with tempfile.TemporaryDirectory() as cache:
    tokens, bos_id = _open_tokens(folder, config, pathlib.Path(cache))
    num_windows = sum(
      perplexity.count_windows(
        tokens,
        vocab_size=config.vocab_size,
        context_len=context_len,
        protocol=_PROTOCOL.value,
        num_windows=_NUM_WINDOWS.value,
        stride=_STRIDE.value,
        bos_id=bos_id,
      )
      for context_len in context_lens
    )
    if max(context_lens) > config.context_len:
      logging.warning(
        "The context length %s exceeds the model's %s.",
        f"{max(context_lens):,}",
        f"{config.context_len:,}",
      )
    if model is None:
      model = _load(folder, config)
    with tqdm(total=num_windows, unit="window", mininterval=0.5) as bar:
      results = {
        context_len: perplexity.perplexity(
          model,
          tokens,
          context_len=context_len,
          protocol=_PROTOCOL.value,
          patterns=layers[context_len],
          num_windows=_NUM_WINDOWS.value,
          stride=_STRIDE.value,
          batch_size=max(1, _BATCH_TOKENS.value // context_len),
          bos_id=bos_id,
          implementation=_IMPLEMENTATION.value,
          on_windows=bar.update,
        )
        for context_len in context_lens
      }
  pattern = _PATTERN.value or "dense"
  name = _MODEL.value or assets.MODEL.name
  source = _DATA.value or assets.BOOKS_TEST.name
  if _NUM_WINDOWS.value is None:
    windows = f"windows every {_STRIDE.value:,} tokens"
  else:
    windows = f"up to {_NUM_WINDOWS.value:,} evenly spaced windows"
  adapted = f" with {_ADAPTER.value}" if _ADAPTER.value else ""
  print(
    f"{name}{adapted} on {source}\n"
    f"{_PROTOCOL.value} protocol, {pattern} attention, {windows}"
  )
  print_table(results)
  if _OUTPUT.value is None:
    return

  def by_length(field: str) -> dict[str, Any]:
    return {str(n): getattr(result, field) for n, result in results.items()}

  atomic_file.write_json(
    _OUTPUT.value,
    {
      "model": name,
      "adapter": _ADAPTER.value,
      "data": source,
      "protocol": _PROTOCOL.value,
      "pattern": pattern,
      "stride": _STRIDE.value,
      "rope_scaling": config.rope_scaling
      and dataclasses.asdict(config.rope_scaling),
      "num_windows": by_length("num_windows"),
      "num_tokens": by_length("num_tokens"),
      "num_skipped": by_length("num_skipped"),
      "perplexity": by_length("perplexity"),
      "last_quarter_perplexity": by_length("last_quarter"),
      "dtype": _DTYPE.value,
      "implementation": _IMPLEMENTATION.value,
      "jax": jax.__version__,
      "device": jax.devices()[0].device_kind,
    },
  )
  print(f"wrote {_OUTPUT.value}")


if __name__ == "__main__":
  cli.run(main)
