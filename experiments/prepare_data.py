"""Turns text into a token file: ids in a `.bin`, their description in a JSON.

    scca prepare_data --input=books/ \
      --tokenizer=tokenizer.model --output=books.bin
    scca prepare_data --input=books.jsonl.xz \
      --train_tokenizer --vocab_size=4096 --output=books.bin

    scca prepare_data --input=talks.jsonl --conversations \
      --tokenizer=llama-chat/ --output=talks.bin

The second command also writes the tokenizer that it trained, books.model.
"""

import contextlib
import pathlib
import time
from collections.abc import Iterator

from absl import flags
from tqdm import tqdm

from experiments.shared import cli
from scca_jax import chat, conversations, token_file, tokenizer
from scca_jax.documents import Part, document_files, read_parts, read_records
from scca_jax.token_file import write_conversations, write_token_file

_INPUT = flags.DEFINE_string(
  "input",
  None,
  "Text to read: .txt (one document), .jsonl (one per line), either with .gz,"
  " .xz or .zst, or a folder of such files.",
)
_OUTPUT = flags.DEFINE_string("output", None, "The token file, a .bin.")
_TOKENIZER = flags.DEFINE_string(
  "tokenizer",
  None,
  "SentencePiece .model, tokenizer.json, or a folder with one.",
)
_TRAIN_TOKENIZER = flags.DEFINE_boolean(
  "train_tokenizer",
  False,
  "Train a SentencePiece model on the text and write it next to the output, as"
  " .model.",
)
_VOCAB_SIZE = flags.DEFINE_integer(
  "vocab_size", 4096, "Pieces of the tokenizer to train."
)
_SAMPLE_BYTES = flags.DEFINE_integer(
  "sample_bytes",
  20_000_000,
  "Maximum amount of text to train the tokenizer on, in bytes, drawn evenly"
  " from the input.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of that sample.")
_TEXT_FIELD = flags.DEFINE_string(
  "text_field", "text", "Field of a .jsonl line that has the text."
)
_ADD_BOS = flags.DEFINE_boolean(
  "add_bos", False, "Start every document with the BOS token."
)
_APPEND_EOS = flags.DEFINE_boolean(
  "append_eos",
  False,
  "End every document with the EOS token, for pretraining. Without it the file"
  " has only the tokens of the text, as perplexity needs them.",
)


_CONVERSATIONS = flags.DEFINE_boolean(
  "conversations",
  False,
  "Each line of the .jsonl is a conversation: messages, prompt and completion,"
  " or instruction and output. It is rendered by the tokenizer's chat template,"
  " and training counts only the answers.",
)


def _bar(source: str, action: str) -> tqdm:
  """Returns a progress bar over the bytes of `source`."""
  return tqdm(
    total=sum(f.stat().st_size for f in document_files(source)),
    desc=action,
    unit="B",
    unit_scale=True,
    mininterval=0.5,
    disable=None,  # In a log it would print a line every half second.
  )


def _documents(source: str, action: str) -> Iterator[Part]:
  """Yields the documents under a progress bar."""
  with _bar(source, action) as bar:
    yield from read_parts(
      source, text_field=_TEXT_FIELD.value, on_read=bar.update
    )


def _conversations(
  source: str, vocabulary: tokenizer.Tokenizer
) -> Iterator[conversations.Encoded]:
  """Yields the conversations under a progress bar.

  Raises:
    ValueError: One is damaged; the message names its line.
  """
  template = None
  with contextlib.suppress(ValueError):  # Plain prompts do not need one.
    template = chat.load(_TOKENIZER.value or "")
  with _bar(source, "encoding") as bar:
    for where, record in read_records(source, on_read=bar.update):
      try:
        yield conversations.encode(record, vocabulary, template)
      except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def main() -> None:
  """Writes the token file, and the tokenizer if one is to be trained.

  Raises:
    ValueError: A flag is missing, or the input is damaged.
    OSError: A file is missing or cannot be written.
  """
  source = _INPUT.value
  if not source or not _OUTPUT.value:
    raise ValueError("give the text as --input=PATH, and --output=FILE.bin.")
  if (_TOKENIZER.value is None) != _TRAIN_TOKENIZER.value:
    raise ValueError("give either --tokenizer=FILE or --train_tokenizer.")
  output = pathlib.Path(_OUTPUT.value)
  if output.suffix != ".bin":
    raise ValueError(f"--output must end in .bin, got {output}.")
  token_file.check_output(output)
  if _CONVERSATIONS.value and (
    _TRAIN_TOKENIZER.value or _ADD_BOS.value or _APPEND_EOS.value
  ):
    raise ValueError(
      "--conversations needs the --tokenizer of a model, which determines how"
      " texts begin and end: leave out --train_tokenizer, --add_bos and"
      " --append_eos."
    )
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
  sources = [file.name for file in document_files(source)]
  if _CONVERSATIONS.value:
    about = write_conversations(
      _conversations(source, vocabulary), vocabulary, output, sources=sources
    )
    answers = about["answers"]
    share = (sum(answers[1::2]) - sum(answers[::2])) / about["tokens"]
    print(f"{len(answers) // 2:,} answers, {share:.0%} of the tokens")
  else:
    about = write_token_file(
      _documents(source, "encoding"),
      vocabulary,
      output,
      add_bos=_ADD_BOS.value,
      append_eos=_APPEND_EOS.value,
      sources=sources,
    )
  print(
    f"wrote {output}: {about['documents']:,} documents, {about['tokens']:,}"
    f" tokens ({about['dtype']}), {about['text_bytes'] / about['tokens']:.3f}"
    f" bytes per token, {time.monotonic() - started:.1f} s"
  )


if __name__ == "__main__":
  cli.run(main)
