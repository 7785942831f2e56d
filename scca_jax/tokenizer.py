"""Text to token ids and back, whatever file the vocabulary comes in.

Two kinds of file are read, SentencePiece's `tokenizer.model` and the
`tokenizer.json` of Hugging Face's tokenizers, behind one small interface; a
GGUF file holds one of them. `train` makes a SentencePiece model of the kind
LLaMA uses.
"""

import abc
import dataclasses
import hashlib
import heapq
import io
import json
import os
import pathlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sentencepiece
import tokenizers

from scca_jax import atomic_file, gguf_file, gguf_tokenizer

_FILE_NAMES = ("tokenizer.model", "tokenizer.json")
# Where Hugging Face folders say which tokens begin and end a text, and what
# the usual names are where none of these files is there.
_SETTING_FILES = (
  "tokenizer_config.json",
  "special_tokens_map.json",
  "config.json",
)
_USUAL_NAMES = {
  "bos": ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>"),
  "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>"),
}
# SentencePiece drops sentences of more than 4,192 bytes; a character takes at
# most four. Cut behind white space where there is any within reach.
_SENTENCE = re.compile(r"(?s).{1,1000}(?!\S)|.{1,1000}")
_PASSAGE_CHARACTERS = 8192


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer(abc.ABC):
  """A vocabulary and how text is cut into it.

  Attributes:
    name: Base name of the file it was read from.
    fingerprint: SHA-256 of that file, in hexadecimal: equal fingerprints,
      equal tokens.
    vocab_size: One more than the largest id, in tokens.
    bos_id: Id of the token that begins a text; None where there is none.
    eos_id: Id of the token that ends a text; None where there is none.
    adds_bos: Whether a prompt begins with `bos_id`, as its files say.
  """

  name: str
  fingerprint: str
  vocab_size: int
  bos_id: int | None
  eos_id: int | None
  adds_bos: bool

  @abc.abstractmethod
  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of every text, on all CPU cores; see `encode`."""

  @abc.abstractmethod
  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids`; special tokens of SentencePiece are empty."""

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text` alone: no token is added before or after.

    What looks like a special token in the text is text.
    """
    return self.encode_batch([text])[0]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece model.

  It writes spaces as U+2581, so that this one character decodes as a space.
  """

  processor: sentencepiece.SentencePieceProcessor

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of every text."""
    return self.processor.encode(list(texts))

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids`."""
    return self.processor.decode([int(i) for i in ids])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HuggingFaceTokenizer(Tokenizer):
  """A `tokenizer.json`, normalisation and pre-tokenisation included."""

  processor: tokenizers.Tokenizer

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of every text."""
    encodings = self.processor.encode_batch(
      list(texts), add_special_tokens=False
    )
    return [encoding.ids for encoding in encodings]

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids`, special tokens by their names."""
    return self.processor.decode(
      [int(i) for i in ids], skip_special_tokens=False
    )


def load(path: str | os.PathLike[str]) -> Tokenizer:
  """Returns the tokenizer of a file or of a model folder.

  Args:
    path: A SentencePiece `.model`, a Hugging Face tokenizer `.json`, a model
      in `.gguf`, or a folder that holds `tokenizer.model` or, else,
      `tokenizer.json`.

  Raises:
    FileNotFoundError: No such file, or no tokenizer in the folder.
    ValueError: The file is not a tokenizer of its kind.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    found = [path / name for name in _FILE_NAMES if (path / name).is_file()]
    if not found:
      raise FileNotFoundError(
        f"no {' or '.join(_FILE_NAMES)} in the folder {path}."
      )
    path = found[0]
  if path.suffix == gguf_file.SUFFIX:
    return _load_gguf(path)
  if path.suffix not in (".model", ".json"):
    raise ValueError(
      f"{path} is not a tokenizer: give a SentencePiece .model, a tokenizer"
      " .json, a .gguf or a folder holding one."
    )
  if not path.exists():
    raise FileNotFoundError(f"there is no tokenizer {path}.")
  content = path.read_bytes()
  if path.suffix == ".model":
    return _load_sentencepiece(path, content)
  return _load_hugging_face(path, content)


def _load_gguf(path: pathlib.Path) -> Tokenizer:
  file = gguf_file.GgufFile(path)
  name, content = gguf_tokenizer.tokenizer_file(file)
  read = _load_sentencepiece if name.endswith(".model") else _load_hugging_face
  return dataclasses.replace(
    read(path, content),
    bos_id=file.special_id("bos"),
    eos_id=file.special_id("eos"),
    adds_bos=file.adds_bos,
  )


def _load_sentencepiece(path: pathlib.Path, content: bytes) -> Tokenizer:
  processor = sentencepiece.SentencePieceProcessor()
  try:
    # An empty proto parses, to a model that answers everything with 0.
    if not content or not processor.LoadFromSerializedProto(content):
      raise RuntimeError("empty")
    vocab_size = processor.get_piece_size()
    bos_id, eos_id = processor.bos_id(), processor.eos_id()
  except RuntimeError as error:
    raise ValueError(
      f"{path} is not a SentencePiece model, or is damaged: copy it again."
    ) from error
  return SentencePieceTokenizer(
    name=path.name,
    fingerprint=hashlib.sha256(content).hexdigest(),
    vocab_size=vocab_size,
    bos_id=bos_id if bos_id >= 0 else None,
    eos_id=eos_id if eos_id >= 0 else None,
    # As LLaMA does.
    adds_bos=bos_id >= 0
    and bool(_setting(path.parent, "add_bos_token", default=True)),
    processor=processor,
  )


def _load_hugging_face(path: pathlib.Path, content: bytes) -> Tokenizer:
  try:
    processor = tokenizers.Tokenizer.from_buffer(content)
  except Exception as error:  # The bindings raise bare Exception.
    raise ValueError(
      f"{path} is not a tokenizer.json, or is damaged: copy it again."
    ) from error
  vocabulary = processor.get_vocab(with_added_tokens=True)
  if not vocabulary:
    raise ValueError(f"{path} has an empty vocabulary.")
  # Saved settings may truncate or pad texts, which we never want.
  processor.no_truncation()
  processor.no_padding()
  processor.encode_special_tokens = True
  bos_id = _special_id(path.parent, "bos", vocabulary)
  with_special = processor.encode("a", add_special_tokens=True).ids
  return HuggingFaceTokenizer(
    name=path.name,
    fingerprint=hashlib.sha256(content).hexdigest(),
    vocab_size=max(vocabulary.values()) + 1,
    bos_id=bos_id,
    eos_id=_special_id(path.parent, "eos", vocabulary),
    adds_bos=bos_id is not None and with_special[:1] == [bos_id],
    processor=processor,
  )


def _setting(folder: pathlib.Path, name: str, *, default: Any) -> Any:
  """Returns a setting of the tokenizer_config.json beside, if there is one."""
  path = folder / _SETTING_FILES[0]
  if not path.is_file():
    return default
  try:
    settings = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}.") from error
  value = settings.get(name) if isinstance(settings, dict) else None
  return default if value is None else value


def _special_id(
  folder: pathlib.Path, kind: str, vocabulary: dict[str, int]
) -> int | None:
  """Returns the id of the `kind` token, as the files beside name it."""
  for name in _SETTING_FILES:
    try:
      settings = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
      continue
    except ValueError as error:
      raise ValueError(f"{folder / name} is not JSON: {error}.") from error
    if not isinstance(settings, dict):
      continue
    token = settings.get(f"{kind}_token")
    if isinstance(token, dict):
      token = token.get("content")
    if isinstance(token, str) and token in vocabulary:
      return vocabulary[token]
    number = settings.get(f"{kind}_token_id")
    if isinstance(number, list):  # Llama 3 lists several ends.
      number = number[0] if number else None
    if isinstance(number, int):
      return number
  for token in _USUAL_NAMES[kind]:
    if token in vocabulary:
      return vocabulary[token]
  return None


def sample(
  texts: Iterable[str], num_bytes: int, *, seed: int = 0
) -> Iterator[str]:
  """Yields passages drawn evenly from `texts`, in their order.

  The texts are read once and only the sample is held. Every passage of about
  8,000 characters draws a number; those with the smallest stay.

  Args:
    texts: Whole documents.
    num_bytes: Largest size of the sample, in bytes of UTF-8.
    seed: Draws another sample.

  Raises:
    ValueError: `num_bytes` is not positive.
  """
  if num_bytes < 1:
    raise ValueError(f"the sample needs at least one byte, got {num_bytes}.")
  generator = random.Random(seed)
  kept: list[tuple[float, int, str, int]] = []  # Largest draw first.
  size = index = 0
  for text in texts:
    for start in range(0, len(text), _PASSAGE_CHARACTERS):
      passage = text[start : start + _PASSAGE_CHARACTERS]
      length = len(passage.encode())
      heapq.heappush(kept, (-generator.random(), index, passage, length))
      index += 1
      size += length
      while size > num_bytes and len(kept) > 1:
        size -= heapq.heappop(kept)[3]
  for _, _, passage, _ in sorted(kept, key=lambda entry: entry[1]):
    yield passage


def train(
  texts: Iterable[str], vocab_size: int, output: str | os.PathLike[str]
) -> Tokenizer:
  """Trains a tokenizer like LLaMA's, writes it to `output` and returns it.

  A SentencePiece byte-pair model: unknown 0, BOS 1, EOS 2, then the 256 bytes
  that stand for characters outside the vocabulary. The text is not normalised
  and no white space is dropped, so decoding gives the text back; digits are
  single tokens, and so is a line break, which no piece crosses. The same texts
  give the same model.

  Args:
    texts: Text to learn from; held in memory (see `sample`).
    vocab_size: Number of pieces, the 259 fixed ones included.
    output: The `.model` file; it appears only when whole.

  Raises:
    ValueError: `output` is not a `.model`, there is no text, or there is too
      little of it for `vocab_size` pieces.
  """
  output = pathlib.Path(output)
  if output.suffix != ".model":
    raise ValueError(f"a trained tokenizer is a .model file, got {output}.")
  sentences = (
    match.group() for text in texts for match in _SENTENCE.finditer(text)
  )
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=sentences,
      model_writer=model,
      vocab_size=vocab_size,
      model_type="bpe",
      character_coverage=0.99995,
      byte_fallback=True,
      split_digits=True,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      add_dummy_prefix=True,
      # Lines are learnt from as they are met in running text: the first word
      # of a line without the space that a new sentence would get.
      pretokenization_delimiter="\n",
      unk_id=0,
      bos_id=1,
      eos_id=2,
      pad_id=-1,
      minloglevel=2,
    )
  except (RuntimeError, OSError) as error:
    raise ValueError(_training_failure(vocab_size, str(error))) from error
  atomic_file.write(output, model.getvalue())
  return load(output)


def _training_failure(vocab_size: int, message: str) -> str:
  """Returns what the trainer's message means for its caller."""
  if "!sentences_.empty()" in message:
    return "there is no text to train a tokenizer on."
  limit = re.search(r"set it to a value <= (\d+)", message)
  if limit:
    return (
      f"the text is too short for vocab_size={vocab_size}: it gives at most"
      f" {limit.group(1)} pieces."
    )
  if vocab_size < 260:
    return (
      f"vocab_size={vocab_size} is too small: 256 bytes, 3 special tokens and"
      " the characters of the text need a place."
    )
  return f"SentencePiece cannot train vocab_size={vocab_size}: {message}"
