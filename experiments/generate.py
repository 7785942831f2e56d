"""Continues prompts with a model, or with a model and its adapter.

scca generate --prompt="It was the best of times"
scca generate --model=llama/ --adapter=runs/a/adapter \
  --prompts=prompts.jsonl --output=answers.jsonl --temperature=0.8 --top_p=0.95
scca generate --model=llama-chat/ --chat --prompt="Who?"

The answer to a single prompt is printed as it is generated; the prompts of a
file go through the model together.
"""

import json
import pathlib

import jax.numpy as jnp
from absl import flags, logging

from experiments.shared import cli, loop, resolve
from experiments.shared import flags as shared_flags
from scca_jax import (
  atomic_file,
  chat,
  convert,
  dispatch,
  documents,
  generation,
  segments,
  sharding,
  tokenizer,
  training,
)
from scca_jax.llama import Execution

_MODEL = shared_flags.define_model()
_ADAPTER = shared_flags.define_adapter()
_ROPE_SCALING, _ROPE_FACTOR = shared_flags.define_rope(
  "the context grows by it as well"
)
_TOKENIZER = shared_flags.define_tokenizer()
_DTYPE = shared_flags.define_dtype(
  "float32", "Dtype of weights and computation."
)
_IMPLEMENTATION = shared_flags.define_implementation()
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
_PROMPTS = flags.DEFINE_string(
  "prompts",
  None,
  "Texts to continue: .jsonl with a field prompt, or .txt with one per line.",
)
_CHAT = flags.DEFINE_boolean(
  "chat",
  False,
  "Ask each prompt as a user's question, through the model's chat template, and"
  " show only the answer.",
)
_SYSTEM = flags.DEFINE_string(
  "system", None, "System message before each question, with --chat."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens",
  128,
  "Maximum number of new tokens per prompt.",
  lower_bound=1,
  # Their keys and values are allocated at the start.
  upper_bound=1 << 20,
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.0, "Divides the logits; 0 picks the likeliest token."
)
_TOP_K = flags.DEFINE_integer(
  "top_k", None, "Draw from this many of the likeliest tokens."
)
_TOP_P = flags.DEFINE_float(
  "top_p", 1.0, "Draw from the likeliest that reach this probability."
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Seed of the draws.", lower_bound=0, upper_bound=(1 << 31) - 1
)
_PREFILL_PATTERN = flags.DEFINE_string(
  "prefill_pattern",
  None,
  f"Attention in the prompt: {shared_flags.TRAINING} (the adapter's), or"
  f" {shared_flags.PATTERN_HELP}. By default dense.",
)
_DECODE_PATTERN = flags.DEFINE_string(
  "decode_pattern",
  None,
  "Attention of new tokens, in the same form; by default dense.",
)
_MESH = flags.DEFINE_string(
  "mesh",
  "",
  "Devices that share the work, such as data=2,tensor=2: data divides the"
  " prompts, tensor the heads, fsdp prompts and weights; by default one.",
)
_SEGMENT_LEN = flags.DEFINE_integer(
  "segment_len",
  None,
  "Tokens of the prompts that go through the layers at a time, so that memory"
  " grows with their length only by the keys and values. Best together with a"
  " --prefill_pattern of limited reach, in whole chunks: layers with other"
  " patterns read all keys and values for each segment.",
  lower_bound=1,
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "Prompts and continuations, a .jsonl."
)


def _check_flags() -> None:
  """Checks what can be checked before a file is read."""
  if (_PROMPT.value is None) == (_PROMPTS.value is None):
    raise ValueError("give either --prompt=TEXT or --prompts=FILE.")
  if _SYSTEM.value is not None and not _CHAT.value:
    raise ValueError("--system is a chat message: give --chat too.")
  documents.check_text("--system", _SYSTEM.value or "")
  for pattern in (_PREFILL_PATTERN, _DECODE_PATTERN):
    shared_flags.check_trained(pattern, _ADAPTER)
  dispatch.check_implementation(_IMPLEMENTATION.value)
  documents.check_text("--prompt", _PROMPT.value or "")
  shared_flags.check_exist(_MODEL, _ADAPTER, _TOKENIZER, _PROMPTS)
  shared_flags.check_rope(_ROPE_SCALING, _ROPE_FACTOR, _ADAPTER)
  shared_flags.check_whole_sequences(_MESH)
  if _SEGMENT_LEN.value is not None:
    segments.check_devices(
      _SEGMENT_LEN.value, sharding.MeshConfig.parse(_MESH.value).num_devices
    )
  shared_flags.check_output(_OUTPUT, ".jsonl")


def read_prompts(path: pathlib.Path) -> list[str]:
  """Returns the prompts of a file, one per line; see `read_documents`.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: It is of another kind, damaged or empty.
  """
  prompts = list(
    documents.read_documents(path, text_field="prompt", by_line=True)
  )
  if not prompts:
    raise ValueError(f"{path} has no prompts.")
  return prompts


def _ask(
  template: chat.ChatTemplate, vocabulary: tokenizer.Tokenizer, texts: list[str]
) -> list[list[int]]:
  """Returns the ids of each text as a user's question."""
  first = (
    [{"role": "system", "content": _SYSTEM.value}] if _SYSTEM.value else []
  )
  return [
    template.encode(vocabulary, [*first, {"role": "user", "content": text}])
    for text in texts
  ]


class _Printer:
  """Prints the text of tokens as they come.

  A character may take several tokens, and a token's text depends on the ones
  before it, so everything is decoded and only the new part is printed.
  """

  def __init__(self, vocabulary: tokenizer.Tokenizer, prompt: list[int]):
    self._vocabulary = vocabulary
    self._ids = list(prompt)
    self._shown = vocabulary.decode(self._ids)

  def show(self, token: int) -> None:
    """Prints what a token adds, once its character is complete."""
    self._ids.append(token)
    text = self._vocabulary.decode(self._ids)
    if text.startswith(self._shown) and not text.endswith("\ufffd"):
      print(text[len(self._shown) :], end="", flush=True)
      self._shown = text


def main() -> None:
  """Runs the command.

  Raises:
    ValueError: A flag is out of range, or the input is damaged.
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
  source = resolve.model_path(_MODEL.value)
  vocabulary = tokenizer.load(_TOKENIZER.value or source)
  if _CHAT.value:
    prompts = _ask(chat.load(_TOKENIZER.value or source), vocabulary, texts)
  else:
    prompts = vocabulary.encode_prompts(texts)
  mesh_config = sharding.MeshConfig.parse(_MESH.value)
  mesh = sharding.make_mesh(mesh_config)
  training.check_mesh(
    mesh_config,
    training.StepConfig(),
    convert.load_config(source),
    # Prompts that cannot be divided go to every device.
    batch_size=mesh_config.data * mesh_config.fsdp,
    seq_len=1,
  )
  dtype = jnp.dtype(_DTYPE.value)
  model = loop.load(
    lambda: resolve.load_model(
      source,
      _ADAPTER.value,
      config=resolve.with_factor(
        source, _ROPE_SCALING.value, _ROPE_FACTOR.value
      ),
      dtype=dtype,
      param_dtype=dtype,
    ),
    mesh,
  )
  for name, value in convert.unapplied_generation(source).items():
    logging.warning(
      "generation_config.json has %s=%r, which is not applied here, so"
      " transformers would generate different text.",
      name,
      value,
    )
  total = max(map(len, prompts)) + _MAX_NEW_TOKENS.value
  if total > model.config.context_len:
    logging.warning(
      "The longest prompt and its continuation, %s tokens, exceed the model's"
      " context of %s.",
      f"{total:,}",
      f"{model.config.context_len:,}",
    )
  prefill_layers, decode_layers = (
    resolve.trained_or_made(flag.value, _ADAPTER.value, model.config, total)
    for flag in (_PREFILL_PATTERN, _DECODE_PATTERN)
  )
  printer = None
  if _PROMPT.value is not None:
    if not _CHAT.value:
      print(_PROMPT.value, end="", flush=True)
    printer = _Printer(vocabulary, prompts[0])
  answers: list[list[int]] = [[] for _ in prompts]
  try:
    for tokens in generation.stream(
      model,
      prompts,
      max_new_tokens=_MAX_NEW_TOKENS.value,
      sampling=sampling,
      prefill_patterns=prefill_layers,
      decode_patterns=decode_layers,
      execution=Execution(
        implementation=_IMPLEMENTATION.value,
        mesh=mesh,
        segment_len=_SEGMENT_LEN.value,
      ),
    ):
      for answer, token in zip(answers, tokens, strict=True):
        if token != generation.FINISHED:
          answer.append(int(token))
          ended = int(token) in model.config.eos_token_ids
          if printer is not None and not ended:
            printer.show(int(token))
  finally:
    if printer is not None:  # Messages get a line of their own.
      print(flush=True)
  ends = set(model.config.eos_token_ids)
  rows = []
  for text, prompt, answer in zip(texts, prompts, answers, strict=True):
    kept = [token for token in answer if token not in ends]
    whole = vocabulary.decode([*prompt, *kept])
    rows.append(
      {
        "prompt": text,
        "continuation": whole[len(vocabulary.decode(prompt)) :],
        "tokens": len(answer),
        "ended": len(kept) < len(answer),
      }
    )
  if printer is None:
    for row in rows:
      asked = f"{row['prompt']}\n\n" if _CHAT.value else row["prompt"]
      print(f"{asked}{row['continuation']}\n", flush=True)
  if _OUTPUT.value is not None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    atomic_file.write(_OUTPUT.value, "".join(lines).encode())


if __name__ == "__main__":
  cli.run(main)
