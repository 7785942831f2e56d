"""Turns text into a token file: ids in a `.bin`, their description in a JSON.

    python -m experiments.prepare_data --input=books/ \
      --tokenizer=tokenizer.model --output=books.bin
    python -m experiments.prepare_data --input=books.jsonl.xz \
      --train_tokenizer --vocab_size=4096 --output=books.bin

The second also writes the tokenizer it trained, books.model.
"""

import pathlib
import time
from collections.abc import Iterator

from absl import flags
from tqdm import tqdm

from experiments.shared import cli
from scca_jax import tokenizer
from scca_jax.documents import Part, document_files, read_parts
from scca_jax.token_file import write_token_file

_INPUT = flags.DEFINE_string(
  "input",
  None,
  "Text to read: .txt (one document), .jsonl (one a line), either with .gz, .xz"
  " or .zst, or a folder of such files.",
)
_OUTPUT = flags.DEFINE_string("output", None, "The token file, a .bin.")
_TOKENIZER = flags.DEFINE_string(
  "tokenizer",
  None,
  "SentencePiece .model, tokenizer.json, or a folder holding one.",
)
_TRAIN_TOKENIZER = flags.DEFINE_boolean(
  "train_tokenizer",
  False,
  "Train a SentencePiece model on the text and write it beside the output,"
  " as .model.",
)
_VOCAB_SIZE = flags.DEFINE_integer(
  "vocab_size", 4096, "Pieces of the tokenizer to train."
)
_SAMPLE_BYTES = flags.DEFINE_integer(
  "sample_bytes",
  20_000_000,
  "Most text to train the tokenizer on, in bytes, drawn evenly from the input.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of that sample.")
_TEXT_FIELD = flags.DEFINE_string(
  "text_field", "text", "Field of a .jsonl line that holds the text."
)
_ADD_BOS = flags.DEFINE_boolean(
  "add_bos", False, "Start every document with the BOS token."
)
_APPEND_EOS = flags.DEFINE_boolean(
  "append_eos",
  False,
  "End every document with the EOS token: for pretraining. Without it the file"
  " holds the tokens of the text alone, as perplexity needs them.",
)


def _documents(source: str, action: str) -> Iterator[Part]:
  """Yields the documents under a progress bar over the bytes of `source`."""
  size = sum(f.stat().st_size for f in document_files(source))
  with tqdm(
    total=size,
    desc=action,
    unit="B",
    unit_scale=True,
    mininterval=0.5,
    disable=None,  # In a log it would be a line every half second.
  ) as bar:
    yield from read_parts(
      source, text_field=_TEXT_FIELD.value, on_read=bar.update
    )


def main() -> None:
  """Writes the token file, and the tokenizer if one is to be trained.

  Raises:
    ValueError: A flag is missing, or the input is damaged.
    OSError: A file is missing or cannot be written.
  """
  source = _INPUT.value
  if not source or not _OUTPUT.value:
    raise ValueError("give the text as --input=PATH and --output=FILE.bin.")
  if (_TOKENIZER.value is None) != _TRAIN_TOKENIZER.value:
    raise ValueError("give either --tokenizer=FILE or --train_tokenizer.")
  output = pathlib.Path(_OUTPUT.value)
  if output.suffix != ".bin":
    raise ValueError(f"--output must end in .bin, got {output}.")
  started = time.monotonic()
  if _TOKENIZER.value is None:
    vocabulary = tokenizer.train(
      tokenizer.sample(
        _documents(source, "sampling"), _SAMPLE_BYTES.value, seed=_SEED.value
      ),
      _VOCAB_SIZE.value,
      output.with_suffix(".model"),
    )
    print(
      f"wrote {output.with_suffix('.model')}: {vocabulary.vocab_size} pieces"
    )
  else:
    vocabulary = tokenizer.load(_TOKENIZER.value)
  about = write_token_file(
    _documents(source, "encoding"),
    vocabulary,
    output,
    add_bos=_ADD_BOS.value,
    append_eos=_APPEND_EOS.value,
    sources=[file.name for file in document_files(source)],
  )
  print(
    f"wrote {output}: {about['documents']:,} documents,"
    f" {about['tokens']:,} tokens ({about['dtype']}),"
    f" {about['text_bytes'] / about['tokens']:.3f} bytes a token,"
    f" {time.monotonic() - started:.1f} s"
  )


if __name__ == "__main__":
  cli.run(main)
