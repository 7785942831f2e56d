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
from scca_jax import (
  adapters,
  assets,
  atomic_file,
  convert,
  dispatch,
  patterns,
  perplexity,
  tokenizer,
)
from scca_jax.llama_config import LlamaConfig
from scca_jax.rope import RopeScaling
from scca_jax.token_file import TokenFile

# The value of --pattern that means the adapter's own.
_TRAINING = "training"

_MODEL = flags.DEFINE_string(
  "model",
  None,
  "Hugging Face folder or .gguf file; by default the embedded model.",
)
_ADAPTER = flags.DEFINE_string(
  "adapter", None, "Folder of an adapter to put on it."
)
_DATA = flags.DEFINE_string(
  "data",
  None,
  "Token file (.bin), or text: .txt, .jsonl, either with .gz, .xz or .zst, or a"
  " folder of such files; by default the embedded test books.",
)
_CONTEXT_LENS = flags.DEFINE_list(
  "context_lens",
  None,
  "Window lengths in tokens, such as 1024,2048; by default the model's context"
  " length.",
)
_PROTOCOL = flags.DEFINE_enum(
  "protocol", "longlora", perplexity.PROTOCOLS, "How perplexity is defined."
)
_NUM_WINDOWS = flags.DEFINE_integer(
  "num_windows", None, "Evenly spaced windows a length; by default all."
)
_STRIDE = flags.DEFINE_integer(
  "stride",
  perplexity.LONGLORA_STRIDE,
  "Tokens between windows (strided, document).",
)
_PATTERN = flags.DEFINE_string(
  "pattern",
  None,
  f"Attention pattern: {_TRAINING} (the adapter's), or one of"
  f" {', '.join(patterns.NAMES)} made for each length; by default dense.",
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer",
  None,
  "tokenizer.model or tokenizer.json for text; by default the model's.",
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
_DTYPE = flags.DEFINE_enum(
  "dtype",
  "float32",
  ("float32", "bfloat16", "float16"),
  "Dtype of weights and computation; losses are float32.",
)
_BATCH_TOKENS = flags.DEFINE_integer(
  "batch_tokens", 8192, "Tokens of a batch of windows."
)
_IMPLEMENTATION = flags.DEFINE_string(
  "implementation",
  None,
  "Attention back end; by default the best for the device.",
)
_OUTPUT = flags.DEFINE_string("output", None, "Results, a .json.")


def _read_context_lens() -> tuple[int, ...] | None:
  if _CONTEXT_LENS.value is None:
    return None
  try:
    lens = tuple(dict.fromkeys(int(n) for n in _CONTEXT_LENS.value))
  except ValueError as error:
    raise ValueError(
      "--context_lens must be lengths in tokens such as 1024,2048, got"
      f" {','.join(_CONTEXT_LENS.value)}."
    ) from error
  if not lens:
    raise ValueError("--context_lens is empty: give lengths such as 1024,2048.")
  return lens


def _check_protocol(context_lens: tuple[int, ...]) -> None:
  for context_len in context_lens:
    perplexity.check_settings(
      _PROTOCOL.value,
      context_len,
      num_windows=_NUM_WINDOWS.value,
      stride=_STRIDE.value,
    )


def _check_flags(context_lens: tuple[int, ...] | None) -> None:
  """Checks what can be checked before a file is read."""
  _check_protocol(context_lens or ())
  if context_lens is None and _ROPE_SCALING.value is not None:
    raise ValueError("--rope_scaling needs the lengths, --context_lens=….")
  if _ROPE_SCALING.value is None and _ROPE_FACTOR.value is not None:
    raise ValueError("--rope_factor needs --rope_scaling=linear or another.")
  if _ROPE_SCALING.value is not None and _ADAPTER.value is not None:
    raise ValueError(
      "--rope_scaling is for models without an adapter: an adapter brings the"
      " one it was tuned with."
    )
  if _PATTERN.value == _TRAINING and _ADAPTER.value is None:
    raise ValueError("--pattern=training needs the --adapter that was trained.")
  if _PATTERN.value not in (None, _TRAINING, *patterns.NAMES):
    raise ValueError(
      f"unknown --pattern={_PATTERN.value}: use {_TRAINING} or one of"
      f" {', '.join(patterns.NAMES)}."
    )
  if _BATCH_TOKENS.value < 1:
    raise ValueError(
      f"--batch_tokens must be at least 1, got {_BATCH_TOKENS.value}."
    )
  dispatch.check_implementation(_IMPLEMENTATION.value)
  for flag in (_MODEL, _ADAPTER, _DATA, _TOKENIZER):
    if flag.value is not None and not pathlib.Path(flag.value).exists():
      raise FileNotFoundError(f"--{flag.name}={flag.value} is not there.")
  if _OUTPUT.value is not None:
    output = pathlib.Path(_OUTPUT.value)
    if output.suffix != ".json" or output.is_dir():
      raise ValueError(f"--output must be a file in .json, got {output}.")
    output.parent.mkdir(parents=True, exist_ok=True)


def _extended(
  config: LlamaConfig, context_lens: tuple[int, ...]
) -> LlamaConfig:
  """Returns the model's configuration with the rope scaling asked for."""
  if _ROPE_SCALING.value is None:
    return config
  if config.rope_scaling is not None:
    raise ValueError(
      f"the model has {config.rope_scaling.kind} rope scaling already: leave"
      " out --rope_scaling to keep it."
    )
  longest = max(context_lens)
  factor = _ROPE_FACTOR.value
  if factor is None:
    factor = max(1.0, longest / config.context_len)
  return dataclasses.replace(
    config,
    context_len=max(longest, config.context_len),
    rope_scaling=RopeScaling(
      kind=_ROPE_SCALING.value,
      factor=factor,
      original_max_position_embeddings=config.context_len,
    ),
  )


def _load(folder: pathlib.Path, config: LlamaConfig) -> Any:
  dtype = jnp.dtype(_DTYPE.value)
  if _ADAPTER.value is None:
    return convert.load_model(
      folder, config=config, dtype=dtype, param_dtype=dtype
    )
  return adapters.load_adapter(
    folder, pathlib.Path(_ADAPTER.value), dtype=dtype, param_dtype=dtype
  )


def _make_patterns(config: LlamaConfig, context_len: int) -> Any:
  """Returns the pattern of each layer, or None for dense."""
  if _PATTERN.value is None:
    return None
  if _PATTERN.value == _TRAINING and _ADAPTER.value is not None:
    schedule = adapters.load_patterns(_ADAPTER.value)
    if schedule is None:
      raise ValueError(
        f"the adapter {_ADAPTER.value} does not say what pattern it was tuned"
        " with: give --pattern=NAME."
      )
    return schedule
  return patterns.make_schedule(
    _PATTERN.value,
    num_heads=config.num_heads,
    num_layers=config.num_layers,
    seq_len=context_len,
  )


def _open_tokens(
  folder: pathlib.Path, config: LlamaConfig, cache: pathlib.Path
) -> tuple[TokenFile, int | None]:
  """Returns the corpus, and its BOS if a tokenizer was needed to make it."""
  path = pathlib.Path(_DATA.value or assets.BOOKS_TEST)
  if path.suffix == ".bin":
    return TokenFile.open(path, vocab_size=config.vocab_size), None
  words = tokenizer.load(_TOKENIZER.value or folder)
  tokens = resolve.open_tokens(path, words, cache)
  # Messages should name what the user gave, not the file in the cache.
  return dataclasses.replace(tokens, name=str(path)), words.bos_id


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
    ValueError: A flag is out of range, or the input is not what it should be.
    OSError: A file is missing or cannot be written.
  """
  context_lens = _read_context_lens()
  _check_flags(context_lens)
  folder = pathlib.Path(_MODEL.value or assets.MODEL)
  config = convert.load_config(folder)
  model = None
  if _ADAPTER.value is not None:
    model = _load(folder, config)
    config = model.config
  if context_lens is None:
    context_lens = (config.context_len,)
    _check_protocol(context_lens)
  config = _extended(config, context_lens)
  schedules = {n: _make_patterns(config, n) for n in context_lens}
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
          patterns=schedules[context_len],
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
