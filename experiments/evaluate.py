"""Measures the perplexity of a model or adapter, or scores it on tasks.

scca evaluate --context_lens=256,512,1024
scca evaluate --model=llama2-7b --adapter=runs/a/adapter \
  --data=pg19_test.bin --context_lens=2048,8192 --output=perplexity.json
scca evaluate --model=smollm2.gguf --context_lens=1024,4096 \
  --tasks=passkey,niah_single_1,vt --heat_map=tasks.png --output=tasks.json
scca evaluate --context_lens=256,1024 \
  --context_gain=1024:256 --positions=losses.npz

Attention is dense unless `--pattern` names a pattern. With `--tasks`,
perplexity is measured only if `--data` is given too.

The parts: flags and their checks, measuring, and output.
"""

import dataclasses
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags, logging
from jax.sharding import Mesh
from tqdm import tqdm

from experiments.shared import cli, loop, resolve, task_scores
from experiments.shared import flags as shared_flags
from scca_jax import (
  assets,
  atomic_file,
  bootstrap,
  convert,
  dispatch,
  loss_file,
  patterns,
  perplexity,
  segments,
  sharding,
  tasks,
  token_file,
  tokenizer,
  training,
)
from scca_jax.llama import Execution, Llama
from scca_jax.llama_config import LlamaConfig
from scca_jax.token_file import TokenFile

# Mean, interval and stride of a gain, by the longer and the shorter length.
Gains = dict[int, dict[int, dict[str, Any]]]

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
  "Text to measure perplexity on: a token file (.bin), or .txt, .jsonl, either"
  " with .gz, .xz or .zst, or a folder of such files; by default the embedded"
  " test books.",
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
_POSITIONS = flags.DEFINE_string(
  "positions",
  None,
  "File for the loss of every window at every position, an .npz for `scca"
  " compare`.",
)
_CONTEXT_GAIN = flags.DEFINE_list(
  "context_gain",
  [],
  "What a longer context is worth: L:l, such as 32768:8192, measures the loss"
  " of the tokens in the last quarters of windows of L given only the l tokens"
  " before them, minus their loss given all.",
)
_GAIN_STRIDE = flags.DEFINE_integer(
  "gain_stride",
  None,
  "For --context_gain, tokens get l to l + stride - 1 tokens of context: 1 is"
  " exact but slow. By default l / 8.",
)
_TASKS = flags.DEFINE_list(
  "tasks",
  [],
  f"Tasks to score instead of perplexity: {', '.join(tasks.NAMES)}.",
)
_NUM_SAMPLES = flags.DEFINE_integer(
  "num_samples", 200, "Samples per task and length."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the samples.")
_QA_DATA = flags.DEFINE_string(
  "qa_data", None, "Questions for the task qa, a .json like SQuAD's."
)
_GENERATE = flags.DEFINE_boolean(
  "generate",
  False,
  "Also let the model write answers, and score them as RULER does: the mean"
  " share of the references found in its text.",
)
_SAMPLE_CACHE = flags.DEFINE_string(
  "sample_cache",
  None,
  "Folder in which the tokens of samples are kept for the next run; by default"
  " scca_jax/samples in the user's cache folder. An empty value keeps none.",
)
_HEAT_MAP = flags.DEFINE_string(
  "heat_map", None, "Plot of accuracy by length and depth, a .png."
)
_MESH = flags.DEFINE_string(
  "mesh",
  "",
  "Devices that share the work, such as fsdp=2,sequence=4; by default one.",
)
_PATTERN = flags.DEFINE_string(
  "pattern",
  None,
  f"Attention pattern, made for each length: {shared_flags.TRAINING} (the"
  f" adapter's), or {shared_flags.PATTERN_HELP}. By default dense.",
)
_ROPE_SCALING, _ROPE_FACTOR = shared_flags.define_rope(
  "by default the longest of --context_lens / the model's context length"
)
_SEGMENT_LEN = flags.DEFINE_integer(
  "segment_len",
  None,
  "Tokens of a window that go through the layers at a time, for longer windows"
  " and a --pattern with limited reach. Of the tasks, only the prompts of"
  " --generate are computed in segments.",
  lower_bound=1,
)
_BATCH_TOKENS = flags.DEFINE_integer(
  "batch_tokens", 8192, "Tokens per batch of windows or samples."
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


def _gains() -> list[tuple[int, int]]:
  """Returns the pairs of `--context_gain`: a length and a shorter one.

  Raises:
    ValueError: One is not a pair, or its gain is not defined.
  """
  pairs = []
  for text in _CONTEXT_GAIN.value:
    words = text.split(":")
    if len(words) != 2 or not all(word.strip().isdecimal() for word in words):
      raise ValueError(
        f"--context_gain must be pairs such as 32768:8192, got {text}."
      )
    context_len, short_len = map(int, words)
    perplexity.gain_windows(context_len, short_len, _GAIN_STRIDE.value)
    pairs.append((context_len, short_len))
  return pairs


def _check_flags() -> None:
  """Checks what can be checked before a file is read."""
  _check_protocol(_CONTEXT_LENS.value or ())
  if _TASKS.value and _DATA.value is None:
    for flag in (_POSITIONS, _CONTEXT_GAIN):
      if flag.value:
        raise ValueError(
          f"--{flag.name} is measured on text: give --data as well as --tasks."
        )
  if _GAIN_STRIDE.value is not None and not _CONTEXT_GAIN.value:
    raise ValueError("--gain_stride needs --context_gain=L:l.")
  if _CONTEXT_LENS.value is None and _ROPE_SCALING.value is not None:
    raise ValueError("--rope_scaling needs the lengths, --context_lens=….")
  for name in _TASKS.value:
    if name not in tasks.NAMES or _QA_DATA.value is None:
      tasks.get(name)
  for flag in (_GENERATE, _HEAT_MAP):
    if flag.value and not _TASKS.value:
      raise ValueError(f"--{flag.name} needs --tasks=….")
  if _GENERATE.value:
    shared_flags.check_whole_sequences(_MESH)
  shared_flags.check_trained(_PATTERN, _ADAPTER)
  if _BATCH_TOKENS.value < 1:
    raise ValueError(
      f"--batch_tokens must be at least 1, got {_BATCH_TOKENS.value}."
    )
  dispatch.check_implementation(_IMPLEMENTATION.value)
  shared_flags.check_exist(_MODEL, _ADAPTER, _DATA, _TOKENIZER, _QA_DATA)
  shared_flags.check_rope(_ROPE_SCALING, _ROPE_FACTOR, _ADAPTER)
  shared_flags.check_output(_OUTPUT, ".json")
  shared_flags.check_output(_POSITIONS, ".npz")
  shared_flags.check_output(_HEAT_MAP, ".png")


def _load(folder: pathlib.Path, config: LlamaConfig | None) -> Llama:
  dtype = jnp.dtype(_DTYPE.value)

  def make() -> Llama:
    return resolve.load_model(
      folder, _ADAPTER.value, config=config, dtype=dtype, param_dtype=dtype
    )

  return loop.load(make, _mesh())


def _mesh() -> Mesh | None:
  return sharding.make_mesh(sharding.MeshConfig.parse(_MESH.value))


def _execution() -> Execution:
  return Execution(
    implementation=_IMPLEMENTATION.value,
    mesh=_mesh(),
    segment_len=_SEGMENT_LEN.value,
  )


def _open_tokens(
  folder: pathlib.Path, config: LlamaConfig, cache: pathlib.Path
) -> tuple[TokenFile, int | None]:
  """Returns the corpus, and its BOS if it had to be tokenised."""
  path = pathlib.Path(_DATA.value or assets.BOOKS_TEST)
  if path.suffix == ".bin":
    return TokenFile.open(path, vocab_size=config.vocab_size), None
  vocabulary = tokenizer.load(_TOKENIZER.value or folder)
  tokens = resolve.open_tokens(
    path, vocabulary, cache, vocab_size=config.vocab_size
  )
  return tokens, vocabulary.bos_id


def _print_rows(rows: list[list[str]]) -> None:
  """Prints a table with aligned columns."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for row in rows:
    cells = [f"{c:>{w}}" for c, w in zip(row, widths, strict=True)]
    print("  ".join(cells).rstrip())


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
  _print_rows(rows)


def _plan(context_lens: tuple[int, ...]) -> task_scores.Plan:
  """Returns the plan of the samples to score."""
  cache = None
  if _SAMPLE_CACHE.value is None:
    cache = cli.cache_folder("samples")
  elif _SAMPLE_CACHE.value:
    cache = pathlib.Path(_SAMPLE_CACHE.value)
  return task_scores.Plan(
    tasks=[tasks.get(name, _QA_DATA.value) for name in _TASKS.value],
    context_lens=context_lens,
    num_samples=_NUM_SAMPLES.value,
    seed=_SEED.value,
    cache=cache,
  )


def _bar(total: int, unit: str) -> tqdm:
  """Returns a progress bar; not in a log, where it would be one long line."""
  return tqdm(total=total, unit=unit, mininterval=0.5, disable=None)


def _measure(
  model: Llama,
  tokens: TokenFile,
  layers: dict[int, Any],
  bos_id: int | None,
  num_windows: int,
) -> dict[int, perplexity.Perplexity]:
  """Returns the perplexity at each length.

  Args:
    model: The model.
    tokens: The corpus.
    layers: The patterns at each length.
    bos_id: Token that starts a document, or None.
    num_windows: Windows of all lengths together.
  """
  with _bar(num_windows, "window") as bar:
    return {
      context_len: perplexity.perplexity(
        model,
        tokens,
        context_len=context_len,
        protocol=_PROTOCOL.value,
        patterns=of_length,
        num_windows=_NUM_WINDOWS.value,
        stride=_STRIDE.value,
        batch_size=_batch_size(context_len),
        bos_id=bos_id,
        execution=_execution(),
        keep_losses=bool(_POSITIONS.value or _CONTEXT_GAIN.value),
        on_windows=bar.update,
      )
      for context_len, of_length in layers.items()
    }


def _measure_gains(
  model: Llama,
  tokens: TokenFile,
  pairs: list[tuple[int, int]],
  results: dict[int, perplexity.Perplexity],
  layers: dict[int, Any],
  bos_id: int | None,
) -> Gains:
  """Returns what each length is worth compared with the shorter one."""
  gains: Gains = {}
  for context_len, short_len in pairs:
    windows: Any = results[context_len].by_window
    starts, size = perplexity.gain_windows(
      context_len, short_len, _GAIN_STRIDE.value
    )
    with _bar(len(starts) * len(windows.starts), "window") as bar:
      gain = perplexity.context_gain(
        model,
        tokens,
        windows,
        short_len=short_len,
        stride=_GAIN_STRIDE.value,
        patterns=layers[context_len],
        batch_size=_batch_size(size),
        bos_id=bos_id,
        execution=_execution(),
        on_windows=bar.update,
      )
    found = bootstrap.estimate(gain, windows.documents)
    gains.setdefault(context_len, {})[short_len] = dataclasses.asdict(found) | {
      "stride": size - short_len
    }
  return gains


def _write_positions(
  path: str,
  results: dict[int, perplexity.Perplexity],
  tokens: TokenFile,
  about: dict[str, Any],
) -> None:
  losses: Any = {n: result.by_window for n, result in results.items()}
  about = about | {
    "data": _DATA.value or assets.BOOKS_TEST.name,
    "tokens_sha256": token_file.ids_sha256(tokens.tokens),
    "protocol": _PROTOCOL.value,
    "stride": _STRIDE.value,
  }
  loss_file.write(path, losses, about)
  print(f"wrote {path}")


def _batch_size(context_len: int) -> int:
  """Returns the sequences per batch, equally many for each shard."""
  config = sharding.MeshConfig.parse(_MESH.value)
  shards = config.data * config.fsdp
  return shards * max(1, _BATCH_TOKENS.value // context_len // shards)


def _check_parts(config: LlamaConfig, layers: dict[int, Any]) -> None:
  """Checks that mesh and segments can divide the windows of each length."""
  for context_len, of_length in layers.items():
    segments.check(
      of_length,
      config,
      segment_len=_SEGMENT_LEN.value,
      seq_len=context_len,
      num_devices=sharding.MeshConfig.parse(_MESH.value).num_devices,
    )
    training.check_mesh(
      sharding.MeshConfig.parse(_MESH.value),
      training.StepConfig(patterns=of_length),
      config,
      batch_size=_batch_size(context_len),
      seq_len=context_len,
    )


def main() -> None:
  """Runs the command.

  Raises:
    ValueError: A flag is out of range, or the input is damaged or too short.
    OSError: A file is missing or cannot be written.
  """
  _check_flags()
  folder = resolve.model_path(_MODEL.value)
  config = convert.load_config(folder)
  if _ROPE_SCALING.value is not None:
    config = resolve.extended(
      config,
      _ROPE_SCALING.value,
      _ROPE_FACTOR.value,
      max(_CONTEXT_LENS.value or ()),
    )
  model = None
  if _ADAPTER.value is not None:
    model = _load(folder, config)
    config = model.config
  context_lens = _CONTEXT_LENS.value or (config.context_len,)
  _check_protocol(context_lens)
  gains = _gains()
  for context_len, short_len in gains:
    if context_len not in context_lens:
      raise ValueError(
        f"--context_gain={context_len}:{short_len} needs {context_len} among"
        f" --context_lens, got {','.join(map(str, context_lens))}."
      )
  layers = {
    n: resolve.trained_or_made(_PATTERN.value, _ADAPTER.value, config, n)
    for n in context_lens
  }
  _check_parts(config, layers)
  vocabulary = plan = None
  if _TASKS.value:
    vocabulary = tokenizer.load(_TOKENIZER.value or folder)
    plan = _plan(context_lens)
    # Refuse lengths that are too short before loading the weights.
    first = plan.first(vocabulary)
    if _HEAT_MAP.value and all(sample.depth is None for sample in first):
      raise ValueError(
        "--heat_map needs a task with depths, such as passkey:"
        f" {', '.join(_TASKS.value)} has none."
      )
  with tempfile.TemporaryDirectory() as cache:
    tokens = bos_id = None
    num_windows = 0
    if _DATA.value is not None or not _TASKS.value:
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
    about = _about(config, layers[context_lens[0]])
    results, found_gains = {}, {}
    if tokens is not None:
      results = _measure(model, tokens, layers, bos_id, num_windows)
      found_gains = _measure_gains(
        model, tokens, gains, results, layers, bos_id
      )
      if _POSITIONS.value is not None:
        _write_positions(_POSITIONS.value, results, tokens, about)
  scores: task_scores.Scores = {}
  if vocabulary is not None and plan is not None:
    with _bar(plan.total, "sample") as bar:
      scores = task_scores.measure(
        model,
        vocabulary,
        plan,
        patterns=layers,
        batch_size=_batch_size,
        execution=_execution(),
        generate=_GENERATE.value,
        on_samples=bar.update,
      )
  _print(results, scores)
  if _HEAT_MAP.value is not None:
    task_scores.draw(_HEAT_MAP.value, _title(), scores)
    print(f"wrote {_HEAT_MAP.value}")
  if found_gains:
    _print_gains(found_gains)
  if _OUTPUT.value is not None:
    found = _result(about, results, found_gains, scores)
    atomic_file.write_json(_OUTPUT.value, found)
    print(f"wrote {_OUTPUT.value}")


def _title() -> str:
  """Returns the name of what is measured."""
  name = _MODEL.value or assets.MODEL.name
  return f"{name} with {_ADAPTER.value}" if _ADAPTER.value else name


def _print(
  results: dict[int, perplexity.Perplexity],
  scores: task_scores.Scores,
) -> None:
  """Prints a table of perplexities, one of scores, or both."""
  attention = f"{_PATTERN.value or 'dense'} attention"
  if results:
    if _NUM_WINDOWS.value is None:
      windows = f"windows every {_STRIDE.value:,} tokens"
    else:
      windows = f"up to {_NUM_WINDOWS.value:,} evenly spaced windows"
    print(
      f"{_title()} on {_DATA.value or assets.BOOKS_TEST.name}\n"
      f"{_PROTOCOL.value} protocol, {attention}, {windows}"
    )
    print_table(results)
  if scores:
    print(
      f"{_title()} on tasks\n"
      f"{_NUM_SAMPLES.value:,} samples each, {attention}, seed {_SEED.value}"
    )
    _print_rows(task_scores.table(scores))


def _print_gains(gains: Gains) -> None:
  rows = [["context", "against", "gain in nats", "95 % interval"]]
  for context_len, by_short in gains.items():
    for short_len, gain in by_short.items():
      low, high = gain["interval"]
      rows.append(
        [
          f"{context_len:,}",
          f"{short_len:,}",
          f"{gain['mean']:.4f}",
          f"{low:.4f} to {high:.4f}",
        ]
      )
  print("gain from the longer context, per token")
  _print_rows(rows)


def _about(config: LlamaConfig, layers: Any) -> dict[str, Any]:
  """Returns facts about the measurement: model, attention and device."""
  pattern = _PATTERN.value or "dense"
  if pattern == shared_flags.TRAINING:
    pattern = patterns.text(layers, num_kv_heads=config.num_kv_heads)
  rope_scaling = config.rope_scaling
  return {
    "model": _MODEL.value or assets.MODEL.name,
    "adapter": _ADAPTER.value,
    "pattern": pattern,
    "rope_scaling": rope_scaling and dataclasses.asdict(rope_scaling),
    "dtype": _DTYPE.value,
    "implementation": _IMPLEMENTATION.value,
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    "mesh": _MESH.value,
  }


def _result(
  about: dict[str, Any],
  results: dict[int, perplexity.Perplexity],
  gains: Gains,
  scores: task_scores.Scores,
) -> dict[str, Any]:
  """Returns the content of the JSON file."""

  def by_length(field: str) -> dict[str, Any]:
    return {str(n): getattr(result, field) for n, result in results.items()}

  found = dict(about)
  if results:
    found |= {
      "data": _DATA.value or assets.BOOKS_TEST.name,
      "protocol": _PROTOCOL.value,
      "stride": _STRIDE.value,
      "num_windows": by_length("num_windows"),
      "num_tokens": by_length("num_tokens"),
      "num_skipped": by_length("num_skipped"),
      "perplexity": by_length("perplexity"),
      "last_quarter_perplexity": by_length("last_quarter"),
    }
  if gains:
    found["context_gain"] = {
      str(n): {str(short): gain for short, gain in by_short.items()}
      for n, by_short in gains.items()
    }
  if scores:
    found["seed"] = _SEED.value
    found["tasks"] = task_scores.as_json(scores)
  return found


if __name__ == "__main__":
  cli.run(main)
