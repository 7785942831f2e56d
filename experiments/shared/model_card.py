"""Model cards: the README.md of the models and adapters that commands write.

A card shows how to load the model or adapter, with the paths given to the
command, the relevant settings and, if they are known, the recipe and the
perplexities.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from experiments.shared.config import FinetuneConfig, to_json
from scca_jax import atomic_file, gguf_file, patterns
from scca_jax.convert.config_file import config_to_json, rope_settings
from scca_jax.llama_config import LlamaConfig
from scca_jax.lora import LoraConfig
from scca_jax.patterns import AttentionPattern, Mixture

FILE_NAME = "README.md"
# Settings of a run that determine its result.
_RECIPE = {
  "optimizer": None,
  "data": ("packing", "skip_to"),
  "training": (
    "seq_len",
    "batch_size",
    "steps",
    "dense_fraction",
    "seed",
    "dtype",
    "param_dtype",
    "quantize",
  ),
}
# Ranks that vLLM can be started with.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


# How to load it.


def for_transformers(folder: pathlib.Path) -> str:
  """Returns how to load a model's folder."""
  return f"""\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})
```
"""


def for_peft(folder: pathlib.Path, base: str, config: LlamaConfig) -> str:
  """Returns how to load an adapter whose base has no rope scaling yet."""
  settings = config_to_json(config, "float32")
  rope = settings["rope_parameters"]
  lines = f"""\
```python
import peft
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained({base!r})
config.max_position_embeddings = {settings["max_position_embeddings"]}
config.rope_parameters = {rope!r}
base = AutoModelForCausalLM.from_pretrained({base!r}, config=config)
model = peft.PeftModel.from_pretrained(base, {str(folder)!r})
```

PEFT ignores `scca_config.json`, which has the rope scaling and the pattern. The
lines above set the scaling; the pattern only matters for further training."""
  if base.endswith(gguf_file.SUFFIX):
    lines = "The base is a GGUF file, and PEFT cannot put an adapter on one."
  return f"""\
{lines} vLLM, llama.cpp, Ollama and SGLang refuse trained norms and embeddings
or ignore them. `--format=peft_plain` writes a base and an adapter for all of
these:

```sh
scca export --format=peft_plain --output_dir=plain \\
  --model={base} --adapter={folder}
```

Here it works as it is:

```sh
scca generate --prompt='Once' \\
  --model={base} --adapter={folder}
```
"""


def for_plain_peft(
  folder: pathlib.Path, base: pathlib.Path, config: LlamaConfig, rank: int
) -> str:
  """Returns how to load an adapter whose base has everything but LoRA."""
  max_rank = next((r for r in _VLLM_RANKS if r >= rank), rank)
  return f"""\
```python
import peft
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({str(base)!r})
model = peft.PeftModel.from_pretrained(base, {str(folder)!r})
```

The base has the rope scaling and the trained norms and embeddings: the adapter
is useless on any other.

```sh
vllm serve {base} --enable-lora --max-lora-rank {max_rank} \\
  --lora-modules tuned={folder}
python -m sglang.launch_server --model-path {base} --lora-paths tuned={folder}
# llama.cpp; the two scripts are in its repository.
python convert_hf_to_gguf.py {base} --outfile base.gguf
python convert_lora_to_gguf.py {folder} --base {base} --outfile lora.gguf
llama-cli -m base.gguf --lora lora.gguf -c {config.context_len}
```

In a Modelfile of Ollama, with the two files made for llama.cpp:
`FROM ./base.gguf`, `ADAPTER ./lora.gguf` and
`PARAMETER num_ctx {config.context_len}`.
"""


def for_llama_cpp(
  file: pathlib.Path, context_len: int, *, of_pieces: bool
) -> str:
  """Returns how to load a GGUF file.

  Args:
    file: The file.
    context_len: Longest sequence, in tokens.
    of_pieces: Whether its tokenizer is SentencePiece's.
  """
  note = (
    "\nllama.cpp puts a space in front of a text that begins with one, too; not"
    "\nevery tokenizer of transformers does.\n"
  )
  return f"""\
```sh
llama-cli -m {file} -c {context_len}
scca generate --model={file} --prompt='Once'
```

In a Modelfile of Ollama: `FROM ./{file.name}` and
`PARAMETER num_ctx {context_len}`.
{note if of_pieces else ""}"""


# What is known about it.


def recipe(run: FinetuneConfig) -> dict[str, Any]:
  """Returns the settings of a run that are kept with its adapter."""
  settings = to_json(run)
  return {
    f"{section}.{name}": value
    for section, names in _RECIPE.items()
    for name, value in settings[section].items()
    if names is None or name in names
  }


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  lines = [head, ["---"] * len(head), *rows]
  return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _number(value: float | None) -> str:
  return "-" if value is None else f"{value:.2f}"


def _perplexity(measured: dict[str, Any]) -> str:
  """Returns a table of perplexities by context length."""
  protocol, num_windows = measured["protocol"], measured["num_windows"]
  quarter = measured.get("last_quarter", {})
  lengths = sorted(num_windows, key=int)
  rows = [
    [name, *(_number(measured[name][n]) for n in lengths)]
    + [_number(quarter.get(name, {}).get(lengths[-1]))]
    for name in ("untuned", "interpolated", "tuned")
    if name in measured
  ]
  head = [f"{int(n):,}" for n in lengths]
  windows = ", ".join(f"{num_windows[n]:,}" for n in lengths)
  return (
    _table(
      ["perplexity at", *head, f"last quarter of {head[-1]}"],
      rows,
    )
    + f"\nMeasured after training: `{protocol}` protocol, dense attention,"
    f" {windows} windows; interpolated is the rope scaling alone.\n"
  )


def write(
  folder: pathlib.Path,
  loading: str,
  *,
  title: str,
  library: str,
  base: str,
  config: LlamaConfig,
  layers: Sequence[AttentionPattern | Mixture] | None = None,
  adapter: LoraConfig | None = None,
  run: dict[str, Any] | None = None,
) -> None:
  """Writes the card of a model or adapter.

  Args:
    folder: Where it is.
    loading: How to load it, in Markdown.
    title: Its name.
    library: The library that loads it: "transformers", "peft" or "gguf".
    base: The model that it was made from.
    config: Sizes, rope scaling and context.
    layers: Pattern of each layer in training.
    adapter: Its LoRA settings, if it was trained.
    run: From `adapters.load_run`.

  Raises:
    OSError: The card cannot be written.
    ValueError: The record of the run is damaged.
  """
  run = run or {}
  scaling = config.rope_scaling
  rope = "none"
  if scaling is not None:
    rope = ", ".join(
      [scaling.kind] + [f"{k}={v}" for k, v in rope_settings(scaling).items()]
    )
  rows = [
    ["base", base],
    ["context", f"{config.context_len:,} tokens"],
    ["rope scaling", rope],
  ]
  if layers:
    pattern = patterns.text(layers, num_kv_heads=config.num_kv_heads)
    rows.append(["attention pattern in training", f"`{pattern}`"])
  if adapter is not None:
    beside = [
      name
      for name, trained in (
        ("embeddings", adapter.train_embeddings),
        ("norms", adapter.train_norms),
      )
      if trained
    ]
    rows.append(
      [
        "LoRA",
        f"rank {adapter.rank}, alpha {adapter.alpha:g}, on"
        f" {', '.join(adapter.targets)}"
        + (f"; {' and '.join(beside)} trained too" if beside else ""),
      ]
    )
  parts = [
    # No base_model, which would have to be a name on the Hub, not a path.
    f"---\nlibrary_name: {library}\ntags:\n- scca_jax\n- long-context\n---\n",
    f"# {title}\n",
    f"{'A LoRA adapter that gives a' if library == 'peft' else 'A'} LLaMA"
    f"{'' if library == 'peft' else ' with'} {config.context_len:,} tokens of"
    " context, written by scca_jax."
    " Attention is dense unless a pattern is asked for.\n",
    f"## Loading\n\n{loading}",
    "## Settings\n\n" + _table(["what", "value"], rows),
  ]
  try:
    if run.get("recipe"):
      settings = [
        [f"`{name}`", value]
        for name, value in run["recipe"].items()
        if value is not None
      ]
      parts.append("## Recipe\n\n" + _table(["setting", "value"], settings))
    if run.get("perplexity"):
      parts.append("## Perplexity\n\n" + _perplexity(run["perplexity"]))
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"the adapter's record of its run is damaged ({error!r}): remove"
      ' "run" from its scca_config.json.'
    ) from error
  atomic_file.write(folder / FILE_NAME, "\n".join(parts).encode())
