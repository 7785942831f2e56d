"""Flags that several commands share, and their checks.

A command calls these functions at its top; the flags then count as its own,
also in `--help`.
"""

import importlib.util
import pathlib
from collections.abc import Iterable
from typing import Any

from absl import flags

from experiments.shared.config import DTYPES
from scca_jax import adapters, atomic_file, hub, patterns
from scca_jax.sharding import MeshConfig

Holder = flags.FlagHolder[Any]

# The pattern that an adapter was trained with, as a value of a pattern flag.
TRAINING = "training"
PATTERN_HELP = (
  "a name, or name(argument=value, ...), as `scca_jax.patterns.parse` reads it:"
  f" {', '.join(patterns.NAMES)}, mix, mixture, layers"
)

# Outputs that were given such a name were meant to go elsewhere.
_OF_MODELS = (
  "adapter_config.json",
  "config.json",
  "generation_config.json",
  "model.safetensors.index.json",
  "special_tokens_map.json",
  "tokenizer.json",
  "tokenizer_config.json",
)

# The flags below belong to the commands that call these functions.
flags.disclaim_key_flags()


def split_patterns(text: str) -> list[str]:
  """Splits a text at the commas outside parentheses."""
  parts, depth = [""], 0
  for letter in text:
    depth += (letter in "([") - (letter in ")]")
    if letter == "," and depth == 0:
      parts.append("")
    else:
      parts[-1] += letter
  return [part.strip() for part in parts if part.strip()]


class _CommasSerializer(flags.ArgumentSerializer[Any]):
  """Writes a list in the form that the parsers below read."""

  def serialize(self, value: Any) -> str:
    """Returns the list with commas between."""
    return ",".join(map(str, value))


class _PatternsParser(flags.ArgumentParser[list[str]]):
  """Reads patterns, or texts with one each, separated by commas."""

  syntactic_help = "patterns, separated by commas"

  def parse(self, argument: Any) -> list[str]:
    """Returns the patterns, as strings."""
    return (
      split_patterns(argument) if isinstance(argument, str) else list(argument)
    )


class _LengthsParser(flags.ArgumentParser[tuple[int, ...]]):
  """Reads lengths in tokens, separated by commas."""

  syntactic_help = "lengths in tokens, separated by commas"

  def __init__(self, least: int):
    """Stores the smallest number of lengths."""
    self._least = least

  def parse(self, argument: Any) -> tuple[int, ...]:
    """Returns the lengths, without repetitions.

    Raises:
      ValueError: One is not an integer above 0, or there are too few.
    """
    words = argument.split(",") if isinstance(argument, str) else argument
    words = [str(word).strip() for word in words if str(word).strip()]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
      raise ValueError(
        f"must be lengths in tokens such as 1024,2048, got {argument}."
      )
    if len(words) < self._least:
      raise ValueError("is empty: give lengths such as 1024,2048.")
    return tuple(dict.fromkeys(map(int, words)))


def define_lengths(
  name: str, default: Iterable[int] | None, text: str, *, least: int = 1
) -> Holder:
  """Returns a flag of lengths in tokens, separated by commas.

  Args:
    name: The flag.
    default: Its default value.
    text: Its help.
    least: The smallest number of lengths.
  """
  return flags.DEFINE(
    _LengthsParser(least),
    name,
    default,
    text,
    serializer=_CommasSerializer(),
  )


def define_patterns(name: str, default: list[str] | None, text: str) -> Holder:
  """Returns a flag of patterns, separated by commas outside parentheses."""
  return flags.DEFINE(
    _PatternsParser(),
    name,
    default,
    text,
    serializer=_CommasSerializer(),
  )


def define_model() -> Holder:
  """Returns the flag `--model`."""
  return flags.DEFINE_string(
    "model",
    None,
    "Hugging Face folder, .gguf file, or a name on Hugging Face such as"
    " HuggingFaceTB/SmolLM2-135M; by default the embedded model.",
  )


def define_adapter(text: str = "Folder of an adapter to apply.") -> Holder:
  """Returns the flag `--adapter`."""
  return flags.DEFINE_string("adapter", None, text)


def define_tokenizer() -> Holder:
  """Returns the flag `--tokenizer`."""
  return flags.DEFINE_string(
    "tokenizer",
    None,
    "tokenizer.model or tokenizer.json; by default the model's.",
  )


def define_dtype(default: str | None, text: str) -> Holder:
  """Returns the flag `--dtype`."""
  return flags.DEFINE_enum("dtype", default, DTYPES, text)


def define_implementation() -> Holder:
  """Returns the flag `--implementation`."""
  return flags.DEFINE_string(
    "implementation",
    None,
    "Attention back end; by default the best for the device.",
  )


def define_training_data() -> Holder:
  """Returns the flag `--data` of commands that train."""
  return flags.DEFINE_string(
    "data",
    None,
    "Token file or text to train on; overrides config.data.train.",
  )


def define_dry_run() -> Holder:
  """Returns the flag `--dry_run` of commands that train one model."""
  return flags.DEFINE_boolean(
    "dry_run",
    False,
    "Print what the run would do: settings, shapes, pairs, tokens, memory.",
  )


def define_wandb() -> Holder:
  """Returns the flag `--wandb`."""
  return flags.DEFINE_string(
    "wandb",
    None,
    "Weights & Biases project that gets the metrics, in addition to"
    " metrics.jsonl and TensorBoard (pip install 'scca_jax[wandb]');"
    " WANDB_MODE=offline keeps them local.",
  )


def check_wandb(flag: Holder) -> None:
  """Checks before any work that the flag of `define_wandb` can be served.

  Raises:
    ValueError: Weights & Biases is not installed.
  """
  found = importlib.util.find_spec("wandb") if flag.value else None
  # A folder of that name, such as one with its logs, has no origin.
  if flag.value and (found is None or found.origin is None):
    raise ValueError(
      "--wandb needs Weights & Biases: pip install 'scca_jax[wandb]'."
    )


def define_rope(text: str) -> tuple[Holder, Holder]:
  """Defines `--rope_scaling` and `--rope_factor`.

  Args:
    text: The default of the factor, in words.
  """
  return (
    flags.DEFINE_string(
      "rope_scaling",
      None,
      "Rope scaling for a model that was not tuned, or whose adapter does not"
      " record its scaling: linear, dynamic, ntk, yarn or llama3.",
    ),
    flags.DEFINE_float("rope_factor", None, f"Its factor; {text}."),
  )


def check_rope(scaling: Holder, factor: Holder, adapter: Holder) -> None:
  """Checks the flags of `define_rope`.

  Raises:
    ValueError: They are given for an adapter with its own settings, or the
      factor is given without the scaling.
  """
  if scaling.value is None and factor.value is not None:
    raise ValueError("--rope_factor needs --rope_scaling=linear or another.")
  if (
    scaling.value is not None
    and adapter.value is not None
    and adapters.has_settings(adapter.value)
  ):
    raise ValueError(
      f"--rope_scaling cannot replace the scaling of {adapter.value}: the"
      " adapter comes with the one it was tuned with."
    )


def check_exist(*paths: Holder) -> None:
  """Checks that the paths in some flags exist, or may be downloaded.

  Raises:
    FileNotFoundError: One does not exist.
  """
  for flag in paths:
    if flag.value is None or (flag.name == "model" and hub.is_name(flag.value)):
      continue
    if not pathlib.Path(flag.value).exists():
      raise FileNotFoundError(f"--{flag.name}={flag.value} does not exist.")


def check_output(flag: Holder, suffix: str) -> None:
  """Checks that a flag, if given, names a file of a kind that can be written.

  Raises:
    ValueError: It names a folder, a file of another kind, a file that another
      flag names, the description of a token file, or a file of a model.
    OSError: There is no permission to write it.
  """
  if flag.value is None:
    return
  path = pathlib.Path(flag.value)
  if path.suffix != suffix or path.is_dir():
    raise ValueError(f"--{flag.name} must be a {suffix} file, got {path}.")
  if suffix == ".json" and path.exists() and path.with_suffix(".bin").exists():
    raise ValueError(
      f"--{flag.name}={path} would replace the description of"
      f" {path.with_suffix('.bin').name}: use another name."
    )
  if suffix == ".json" and path.exists() and path.name in _OF_MODELS:
    raise ValueError(
      f"--{flag.name}={path} would replace a file of a model: use another name."
    )
  for name in flags.FLAGS:
    value = flags.FLAGS[name].value
    named = value if isinstance(value, list) else [value]
    if name != flag.name and any(_is_same(path, other) for other in named):
      raise ValueError(
        f"--{flag.name}={path} would replace --{name}: use another name."
      )
  atomic_file.check_writable(path)


def _is_same(path: pathlib.Path, other: Any) -> bool:
  """Returns whether a flag's value is the name of an existing file."""
  try:
    return isinstance(other, str) and path.samefile(other)
  except (OSError, ValueError):
    return False


def check_whole_sequences(flag: Holder) -> None:
  """Checks that a mesh suits generation, which needs whole sequences.

  Raises:
    ValueError: It cannot be read, or divides sequences.
  """
  if MeshConfig.parse(flag.value).sequence > 1:
    raise ValueError(
      f"generation needs whole sequences, got --{flag.name}={flag.value}: use"
      " data, fsdp or tensor."
    )


def check_trained(pattern: Holder, adapter: Holder) -> None:
  """Checks that there is an adapter if its pattern is requested.

  Raises:
    ValueError: There is none.
  """
  if pattern.value == TRAINING and adapter.value is None:
    raise ValueError(
      f"--{pattern.name}={TRAINING} needs the --adapter that was trained."
    )
