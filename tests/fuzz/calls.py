"""Calls of every command that end well, on the files of `inputs`."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Call:
  """A call of a command that ends well.

  Attributes:
    command: Name of the command.
    args: Its arguments; paths are relative to a copy of the inputs.
    files: The files among them that may be damaged.
  """

  command: str
  args: tuple[str, ...]
  files: tuple[str, ...] = ()


_MODEL_FILES = tuple(
  f"model/{name}"
  for name in (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
  )
)
_ADAPTER_FILES = tuple(
  f"adapter/{name}"
  for name in (
    "adapter_config.json",
    "adapter_model.safetensors",
    "scca_config.json",
  )
)
_MEASURE = ("--context_lens=16", "--num_windows=1", "--batch_tokens=16")
_RUN = (
  "--model=model",
  "--data=train.txt",
  "--config.data.test=train.txt",
  "--config.training.seq_len=16",
  "--config.training.batch_size=1",
  "--config.training.steps=1",
  "--config.evaluation.context_lens=(16,)",
  "--config.evaluation.num_windows=1",
  "--config.rope.kind=none",
  "--output_dir=run",
)
CALLS = (
  Call(
    "evaluate",
    ("--model=model", "--data=tokens.bin", *_MEASURE, "--output=o.json"),
    (*_MODEL_FILES, "tokens.bin", "tokens.json"),
  ),
  Call(
    "evaluate",
    ("--model=model", "--adapter=adapter", "--data=docs.jsonl", *_MEASURE),
    (*_ADAPTER_FILES, "docs.jsonl"),
  ),
  Call(
    "evaluate",
    ("--model=model.gguf", "--data=train.txt", *_MEASURE),
    ("model.gguf",),
  ),
  Call(
    "generate",
    ("--model=model", "--prompt=It was", "--max_new_tokens=2"),
    _MODEL_FILES,
  ),
  Call(
    "generate",
    (
      "--model=model",
      "--adapter=adapter",
      "--prompts=prompts.jsonl",
      "--max_new_tokens=2",
      "--output=o.jsonl",
    ),
    (*_ADAPTER_FILES, "prompts.jsonl"),
  ),
  Call(
    "export",
    ("--model=model", "--adapter=adapter", "--output_dir=out"),
    (*_MODEL_FILES, *_ADAPTER_FILES),
  ),
  Call(
    "export",
    ("--model=model", "--format=gguf", "--output_dir=out"),
    _MODEL_FILES,
  ),
  Call(
    "export",
    (
      "--model=model.gguf",
      "--adapter=adapter",
      "--format=peft_plain",
      "--output_dir=out",
    ),
    ("model.gguf", *_ADAPTER_FILES),
  ),
  *(
    Call(
      "prepare_data",
      (f"--input={name}", f"--tokenizer={words}", "--output=o.bin"),
      (name, words),
    )
    for name, words in (
      ("docs.jsonl", "model/tokenizer.json"),
      ("train.txt", "pieces.model"),
      ("docs.jsonl.gz", "pieces.model"),
      ("docs.jsonl.xz", "pieces.model"),
      ("train.txt.zst", "model/tokenizer.json"),
    )
  ),
  Call(
    "prepare_data",
    (
      "--input=train.txt",
      "--train_tokenizer",
      "--vocab_size=300",
      "--output=o.bin",
    ),
    ("train.txt",),
  ),
  Call(
    "show_pattern",
    ("--pattern=scca_fixed", "--seq_len=16", "--num_heads=4", "--output=o.png"),
  ),
  Call(
    "benchmark_attention",
    (
      "--seq_lens=16",
      "--memory_lens=16",
      "--num_heads=2",
      "--repeats=1",
      "--patterns=s2",
      "--output=o.json",
    ),
  ),
  Call("compare", ("a.npz", "b.npz", "--output=o.json"), ("a.npz", "b.npz")),
  Call(
    "finetune",
    _RUN,
    (*_MODEL_FILES, "train.txt", "run/metrics.jsonl", "run/config.json"),
  ),
  Call(
    "finetune",
    ("--config=config.py", "--dry_run", *_RUN),
    ("config.py", "model/config.json"),
  ),
  Call(
    "pretrain",
    (
      *(arg for arg in _RUN if "model" not in arg and "rope" not in arg),
      "--config.data.tokenizer=pieces.model",
      "--config.architecture.hidden_size=16",
      "--config.architecture.intermediate_size=16",
      "--config.architecture.num_layers=1",
      "--config.architecture.num_heads=2",
      "--config.architecture.num_kv_heads=1",
    ),
    ("pieces.model", "train.txt"),
  ),
  Call("ablate", ("--dry_run", "--quick", "--output_dir=study")),
)
