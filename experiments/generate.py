"""Continues prompts with a model, or with a model and its adapter.

python -m experiments.generate --prompt="It was the best of times"
python -m experiments.generate --model=llama/ --adapter=runs/a/adapter \
  --prompts=prompts.jsonl --output=answers.jsonl --temperature=0.8 --top_p=0.95

One prompt is answered on the terminal as it is made; the prompts of a file go
through the model together.
"""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
from absl import flags, logging

from experiments.shared import cli
from scca_jax import (
  adapters,
  assets,
  atomic_file,
  convert,
  dispatch,
  documents,
  generation,
  patterns,
  tokenizer,
)

_TRAINING = "training"
_DENSE = "dense"

_MODEL = flags.DEFINE_string(
  "model",
  None,
  "Hugging Face folder or .gguf file; by default the embedded model.",
)
_ADAPTER = flags.DEFINE_string(
  "adapter", None, "Folder of an adapter to put on it."
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer",
  None,
  "tokenizer.model or tokenizer.json; by default the model's.",
)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
_PROMPTS = flags.DEFINE_string(
  "prompts",
  None,
  "Texts to continue: .jsonl with a field prompt, or .txt, a line each.",
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 128, "Most tokens that a prompt gets."
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.0, "Divides the logits; 0 takes the likeliest token."
)
_TOP_K = flags.DEFINE_integer(
  "top_k", None, "Draw among this many of the likeliest tokens."
)
_TOP_P = flags.DEFINE_float(
  "top_p", 1.0, "Draw among the likeliest that reach this probability."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the randomness.")
_PATTERN_HELP = f"{_TRAINING} (the adapter's) or one of " + ", ".join(
  patterns.NAMES
)
_PREFILL_PATTERN = flags.DEFINE_string(
  "prefill_pattern", _DENSE, f"Attention in the prompt: {_PATTERN_HELP}."
)
_DECODE_PATTERN = flags.DEFINE_string(
  "decode_pattern", _DENSE, f"Attention of new tokens: {_PATTERN_HELP}."
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  "float32",
  ("float32", "bfloat16", "float16"),
  "Dtype of weights and computation.",
)
_IMPLEMENTATION = flags.DEFINE_string(
  "implementation",
  None,
  "Attention back end; by default the best for the device.",
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "Prompts and continuations, a .jsonl."
)


def _check_flags() -> None:
  """Checks what can be checked before a file is read."""
  if (_PROMPT.value is None) == (_PROMPTS.value is None):
    raise ValueError("give either --prompt=TEXT or --prompts=FILE.")
  for flag in (_PREFILL_PATTERN, _DECODE_PATTERN):
    if flag.value not in (_TRAINING, *patterns.NAMES):
      raise ValueError(
        f"unknown --{flag.name}={flag.value}: use {_TRAINING} or one of"
        f" {', '.join(patterns.NAMES)}."
      )
    if flag.value == _TRAINING and _ADAPTER.value is None:
      raise ValueError(
        f"--{flag.name}=training needs the --adapter that was trained."
      )
  dispatch.check_implementation(_IMPLEMENTATION.value)
  documents.check_text("--prompt", _PROMPT.value or "")
  for flag in (_MODEL, _ADAPTER, _TOKENIZER, _PROMPTS):
    if flag.value is not None and not pathlib.Path(flag.value).exists():
      raise FileNotFoundError(f"--{flag.name}={flag.value} is not there.")
  if _OUTPUT.value is not None:
    output = pathlib.Path(_OUTPUT.value)
    if output.suffix != ".jsonl" or output.is_dir():
      raise ValueError(f"--output must be a file in .jsonl, got {output}.")


def read_prompts(path: pathlib.Path) -> list[str]:
  """Returns the prompts of a file, one a line; see `documents.read_documents`.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: It is of another kind, damaged or empty.
  """
  prompts = list(
    documents.read_documents(path, text_field="prompt", by_line=True)
  )
  if not prompts:
    raise ValueError(f"{path} has no prompt.")
  return prompts


def _make_patterns(name: str, config: Any, seq_len: int) -> Any:
  if name == _DENSE:
    return None
  if name == _TRAINING:
    schedule = adapters.load_patterns(_ADAPTER.value or "")
    if schedule is None:
      raise ValueError(
        f"the adapter {_ADAPTER.value} does not say what pattern it was tuned"
        " with: give the name of a pattern."
      )
    return schedule
  return patterns.make_schedule(
    name,
    num_heads=config.num_heads,
    num_layers=config.num_layers,
    seq_len=seq_len,
  )


class _Printer:
  """Prints the text of tokens as they come.

  A character may take several tokens, and a token's text depends on those
  before it, so all are decoded and what is new is printed.
  """

  def __init__(self, words: tokenizer.Tokenizer, prompt: list[int]):
    self._words = words
    self._ids = list(prompt)
    self._shown = words.decode(self._ids)

  def show(self, token: int) -> None:
    """Prints what a token adds, once its character is whole."""
    self._ids.append(token)
    text = self._words.decode(self._ids)
    if text.startswith(self._shown) and not text.endswith("\ufffd"):
      print(text[len(self._shown) :], end="", flush=True)
      self._shown = text


def main() -> None:
  """Runs the command.

  Raises:
    ValueError: A flag is out of range, or the input is not what it should be.
    OSError: A file is missing or cannot be written.
  """
  _check_flags()
  sampling = generation.Sampling(
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    seed=_SEED.value,
  )
  texts = (
    [_PROMPT.value]
    if _PROMPT.value is not None
    else read_prompts(pathlib.Path(_PROMPTS.value or ""))
  )
  source = pathlib.Path(_MODEL.value or assets.MODEL)
  words = tokenizer.load(_TOKENIZER.value or source)
  bos = [words.bos_id] if words.adds_bos and words.bos_id is not None else []
  prompts = [[*bos, *ids] for ids in words.encode_batch(texts)]
  dtype = jnp.dtype(_DTYPE.value)
  if _ADAPTER.value is None:
    model = convert.load_model(source, dtype=dtype, param_dtype=dtype)
  else:
    model = adapters.load_adapter(
      source, _ADAPTER.value, dtype=dtype, param_dtype=dtype
    )
  total = max(map(len, prompts)) + _MAX_NEW_TOKENS.value
  if total > model.config.context_len:
    logging.warning(
      "The longest prompt and its continuation, %s tokens, exceed the model's"
      " context of %s.",
      f"{total:,}",
      f"{model.config.context_len:,}",
    )
  printer = None
  if _PROMPT.value is not None:
    print(_PROMPT.value, end="", flush=True)
    printer = _Printer(words, prompts[0])
  answers: list[list[int]] = [[] for _ in prompts]
  for tokens in generation.stream(
    model,
    prompts,
    max_new_tokens=_MAX_NEW_TOKENS.value,
    sampling=sampling,
    prefill_patterns=_make_patterns(
      _PREFILL_PATTERN.value, model.config, total
    ),
    decode_patterns=_make_patterns(_DECODE_PATTERN.value, model.config, total),
    implementation=_IMPLEMENTATION.value,
  ):
    for answer, token in zip(answers, tokens, strict=True):
      if token != generation.FINISHED:
        answer.append(int(token))
        ended = int(token) in model.config.eos_token_ids
        if printer is not None and not ended:
          printer.show(int(token))
  ends = set(model.config.eos_token_ids)
  rows = []
  for text, prompt, answer in zip(texts, prompts, answers, strict=True):
    kept = [token for token in answer if token not in ends]
    whole = words.decode([*prompt, *kept])
    rows.append(
      {
        "prompt": text,
        "continuation": whole[len(words.decode(prompt)) :],
        "tokens": len(answer),
        "ended": len(kept) < len(answer),
      }
    )
  if printer is not None:
    print(flush=True)
  else:
    for row in rows:
      print(f"{row['prompt']}{row['continuation']}\n", flush=True)
  if _OUTPUT.value is not None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    atomic_file.write(_OUTPUT.value, "".join(lines).encode())


if __name__ == "__main__":
  cli.run(main)
