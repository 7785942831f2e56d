"""Turns text into token ids and back, whatever file the vocabulary comes in.

Two kinds of files are read behind one small interface, SentencePiece's
`tokenizer.model` and the `tokenizer.json` of Hugging Face's tokenizers; a GGUF
file contains one of them. Other files in the folder, especially added tokens,
have the same effect as in transformers. `train` makes a SentencePiece model
like LLaMA's.

The parts: the interface and its two kinds, loading from a folder or a GGUF
file, the files next to SentencePiece's file and to `tokenizer.json`, training.
"""

import abc
import contextlib
import dataclasses
import functools
import hashlib
import heapq
import io
import itertools
import json
import math
import os
import pathlib
import random
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import models

from scca_jax import (
  atomic_file,
  documents,
  gguf_file,
  gguf_tokenizer,
  json_file,
  text_borders,
)

# If a folder has both, transformers uses the first.
_FILE_NAMES = ("tokenizer.json", "tokenizer.model")
_MODEL_SUFFIX = ".model"
# Files in Hugging Face folders that say which tokens begin and end a text, and
# the usual names if there are no such files.
_SETTING_FILES = (
  "tokenizer_config.json",
  "special_tokens_map.json",
  "config.json",
)
_USUAL_NAMES = {
  "bos": ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>"),
  "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>"),
}
# SentencePiece drops sentences of more than 4,192 bytes, and a character takes
# at most four. Cut after white space if there is any within reach.
_SENTENCE = re.compile(r"(?s).{1,1000}(?!\S)|.{1,1000}")
_PASSAGE_CHARACTERS = 8192
# Larger than any vocabulary.
_MAX_BYTES = 256 << 20
# Ids below it are taken whatever the size of a tokenizer.json.
_SMALL_ID = 1 << 20
# Most characters that the rules of a tokenizer.json may make of one.
_MAX_GROWTH = 256
# Texts of at least this length are worth cutting into lines.
_LONG_CHARACTERS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer(abc.ABC):
  """A vocabulary, and how to split text into its tokens.

  Attributes:
    name: Base name of the file it was read from.
    fingerprint: SHA-256 of that file, in hexadecimal; equal fingerprints mean
      equal tokens.
    vocab_size: One more than the largest id.
    bos_id: Id of the token that begins a text; None if there is none.
    eos_id: Id of the token that ends a text; None if there is none.
    adds_bos: Whether a prompt begins with `bos_id` according to its files.
    adds_eos: Whether it ends with `eos_id` according to its files.
  """

  name: str
  fingerprint: str
  vocab_size: int
  bos_id: int | None
  eos_id: int | None
  adds_bos: bool
  adds_eos: bool = False

  @abc.abstractmethod
  def encode_batch(
    self, texts: Sequence[str], *, go_on: Sequence[bool] | None = None
  ) -> list[list[int]]:
    """Returns the ids of every text, on all CPU cores; see `encode`.

    Args:
      texts: The texts.
      go_on: Which of them continue a longer text after a border, so that
        nothing is put in front of them; None means none.
    """

  @functools.cached_property
  @abc.abstractmethod
  def border(self) -> text_borders.Border | None:
    """Tells where a text can be cut; None if no place is known."""

  @abc.abstractmethod
  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids`; special tokens of SentencePiece are empty.

    Ids beyond the vocabulary are ignored, as in transformers.
    """

  @property
  def with_special_tokens(self) -> "Tokenizer":
    """The same tokenizer, which also recognises the names of special tokens.

    Chat templates write conversations with them; other text should not be read
    this way.
    """
    return self

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text` alone, without adding any token.

    Names of special tokens in the text are treated as text.
    """
    return self.encode_batch([text])[0]

  def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of every text, with the BOS and EOS of its files."""
    before = [self.bos_id] if self.adds_bos and self.bos_id is not None else []
    after = [self.eos_id] if self.adds_eos and self.eos_id is not None else []
    return [[*before, *ids, *after] for ids in self.encode_batch(texts)]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece model.

  It writes spaces as U+2581, so that character decodes as a space.

  Attributes:
    processor: Adds a space in front of a text, if the model does.
    continuing: Adds none.
    first: What is put in front of a text: "space", which leaves it to
      `processor`, or "space if none".
    after: What is put in front of the text after an added token: one of these,
      or "nothing".
    added: Tokens in addition to the pieces of the model.
  """

  processor: sentencepiece.SentencePieceProcessor
  continuing: sentencepiece.SentencePieceProcessor
  first: str
  after: str
  added: "_AddedTokens | None" = None

  def encode_batch(
    self, texts: Sequence[str], *, go_on: Sequence[bool] | None = None
  ) -> list[list[int]]:
    """Returns the ids of every text.

    Added tokens are cut out first, and long stretches of the rest are cut after
    line ends if that changes nothing: SentencePiece encodes lines in a third to
    half of the time of books, and every core gets some.
    """
    # The parts that each processor encodes, and their order in each text: a
    # processor stands for the next of its parts.
    parts: dict[sentencepiece.SentencePieceProcessor, list[str]] = {}
    orders: list[list[int | sentencepiece.SentencePieceProcessor]] = []
    for text, goes_on in zip(texts, go_on or [False] * len(texts), strict=True):
      orders.append([])
      for processor, part in self._cut(text, goes_on):
        if processor is None:
          orders[-1].append(part)
        else:
          parts.setdefault(processor, []).append(part)
          orders[-1].append(processor)
    encoded = {
      processor: iter(processor.encode(its_parts))
      for processor, its_parts in parts.items()
    }
    return [
      list(
        itertools.chain.from_iterable(
          [item] if isinstance(item, int) else next(encoded[item])
          for item in order
        )
      )
      for order in orders
    ]

  @functools.cached_property
  def border(self) -> text_borders.Border | None:
    """Tells where a text can be cut."""
    return text_borders.of_sentencepiece(
      _parse_model(self.continuing.serialized_model_proto()),
      self.added.tokens.values() if self.added is not None else (),
    )

  def _cut(
    self, text: str, goes_on: bool = False
  ) -> Iterator[tuple[sentencepiece.SentencePieceProcessor | None, Any]]:
    """Yields the parts of a text, each with its encoder; None for ids."""
    stretches: Iterable[tuple[int, int | str]] = [(0, text)]
    if self.added is not None:
      stretches = self.added.cut(text)
    for start, part in stretches:
      if isinstance(part, int):
        yield None, part
        continue
      rule = self.after if start else "nothing" if goes_on else self.first
      processor = self.continuing
      if rule == "space" or (
        rule == "space if none" and not part.startswith((" ", "\u2581"))
      ):
        processor = self.processor
      if len(part) < _LONG_CHARACTERS or self._behind_lines is None:
        yield processor, part
        continue
      for line in re.findall(r"[^\n]*\n|[^\n]+", part):
        yield processor, line
        processor = self._behind_lines

  @functools.cached_property
  def with_special_tokens(self) -> "SentencePieceTokenizer":
    """The same tokenizer, with all control tokens among the added ones."""
    tokens = dict(self.added.tokens) if self.added else {}
    for i in range(self.processor.get_piece_size()):
      if self.processor.is_control(i):
        tokens[i] = tokenizers.AddedToken(
          self.processor.id_to_piece(i), normalized=False
        )
    # A special token would be left in the text.
    for token in tokens.values():
      token.special = False
    return dataclasses.replace(self, added=_AddedTokens(tokens))

  @functools.cached_property
  def _behind_lines(self) -> sentencepiece.SentencePieceProcessor | None:
    """Encodes text after a line end; None if that depends on what came before.

    Byte-pair merges produce only pieces of the model. If no piece continues
    after a line end, nothing is merged across one, and the lines of a text can
    be encoded independently. The model must also leave the text unchanged, and
    add a space only at its start. (The best split of a unigram model is
    independent too, except for the rounding of sums over the whole text.)
    """
    model = _parse_model(self.continuing.serialized_model_proto())
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if (
      trainer.model_type != trainer.BPE
      or trainer.treat_whitespace_as_suffix
      or normalizer.precompiled_charsmap
      or normalizer.remove_extra_whitespaces
      or any("\n" in piece.piece[:-1] for piece in model.pieces)
    ):
      return None
    # Neighbouring unknown characters become one token.
    if self.continuing.unk_id() in self.continuing.encode("\n"):
      return None
    return self.continuing

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids`."""
    # A model may have more ids, which have no text.
    ids = [int(i) for i in ids if i < self.vocab_size]
    if self.added is None:
      return self.processor.decode(ids)
    texts: list[str] = []
    stretch: list[int] = []
    for token in (*ids, None):
      if token is not None and token not in self.added.texts:
        stretch.append(token)
        continue
      if stretch:
        takes_space = not texts or self.after == "space"
        processor = self.processor if takes_space else self.continuing
        texts.append(processor.decode(stretch))
        stretch = []
      if token is not None:
        texts.append(self.added.texts[token])
    return "".join(texts)


class _AddedTokens:
  """Tokens that are cut out of a text before SentencePiece sees the rest.

  Attributes:
    tokens: The tokens by id.
    texts: The text of each id.
  """

  # Stands for everything that is not an added token.
  _REST = "\0"

  def __init__(self, tokens: dict[int, tokenizers.AddedToken]):
    self.tokens = tokens
    self.texts = {i: token.content for i, token in tokens.items()}
    self._ids = {text: i for i, text in self.texts.items()}
    # The library's own search, combined with a model that knows no words.
    self._cutter = tokenizers.Tokenizer(
      models.WordLevel({self._REST: 0}, unk_token=self._REST)
    )
    self._cutter.encode_special_tokens = True
    self._cutter.add_tokens(list(tokens.values()))

  def cut(self, text: str) -> Iterator[tuple[int, int | str]]:
    """Yields where each part begins, and its id or else its text."""
    encoding = self._cutter.encode(text)
    for token, (start, end) in zip(
      encoding.tokens, encoding.offsets, strict=True
    ):
      yield start, self._ids.get(token, text[start:end])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HuggingFaceTokenizer(Tokenizer):
  """A `tokenizer.json`, normalisation and pre-tokenisation included."""

  processor: tokenizers.Tokenizer

  def encode_batch(
    self, texts: Sequence[str], *, go_on: Sequence[bool] | None = None
  ) -> list[list[int]]:
    """Returns the ids of every text."""
    flags = go_on or [False] * len(texts)
    encoded = {
      goes_on: iter(
        self._encode(
          self._continuing if goes_on else self.processor,
          [t for t, flag in zip(texts, flags, strict=True) if flag == goes_on],
        )
      )
      for goes_on in set(flags)
    }
    return [next(encoded[flag]) for flag in flags]

  def _encode(
    self, processor: tokenizers.Tokenizer, texts: Sequence[str]
  ) -> list[list[int]]:
    # The fast method does not compute where each token is in the text.
    with _in_library(self.name):
      encodings = processor.encode_batch_fast(
        list(texts), add_special_tokens=False
      )
    return [encoding.ids for encoding in encodings]

  @functools.cached_property
  def with_special_tokens(self) -> "HuggingFaceTokenizer":
    """The same tokenizer, with special tokens cut out of the text."""
    processor = tokenizers.Tokenizer.from_str(self.processor.to_str())
    processor.encode_special_tokens = False
    return dataclasses.replace(self, processor=processor)

  @functools.cached_property
  def border(self) -> text_borders.Border | None:
    """Tells where a text can be cut."""
    step = self.processor.pre_tokenizer
    return text_borders.of_hugging_face(
      json.loads(self.processor.to_str()),
      # The name of a special token is text, unless requested otherwise.
      [
        token
        for token in self.processor.get_added_tokens_decoder().values()
        if not (token.special and self.processor.encode_special_tokens)
      ],
      step.pre_tokenize_str if step is not None else None,
    )

  @functools.cached_property
  def _continuing(self) -> tokenizers.Tokenizer:
    """Encodes text after a border."""
    content = json.loads(self.processor.to_str())
    plain = text_borders.without_prefix(content)
    if plain["normalizer"] == content["normalizer"]:
      return self.processor
    processor = tokenizers.Tokenizer.from_str(json.dumps(plain))
    processor.encode_special_tokens = self.processor.encode_special_tokens
    return processor

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids`, with the names of special tokens."""
    with _in_library(self.name):
      return self.processor.decode(
        [int(i) for i in ids], skip_special_tokens=False
      )


def file_name(folder: str | os.PathLike[str]) -> str | None:
  """Returns the name of the file with a folder's vocabulary, or None.

  Args:
    folder: The folder.
  """
  for name in _FILE_NAMES:
    if (pathlib.Path(folder) / name).is_file():
      return name
  return None


def load(path: str | os.PathLike[str]) -> Tokenizer:
  """Returns the tokenizer of a file or of a model folder.

  Args:
    path: A SentencePiece `.model`, a Hugging Face tokenizer `.json`, a model in
      `.gguf`, or a folder with `tokenizer.json` or, failing that,
      `tokenizer.model`. Related files in the folder are read too.

  Raises:
    FileNotFoundError: No such file, or no tokenizer in the folder.
    ValueError: The file is not a tokenizer of its kind, or related files
      contradict it.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    name = file_name(path)
    if name is None:
      raise FileNotFoundError(
        f"no {' or '.join(_FILE_NAMES)} in the folder {path}."
      )
    path /= name
  if path.suffix == gguf_file.SUFFIX:
    return from_gguf(gguf_file.GgufFile(path))
  if path.suffix not in (".model", ".json"):
    raise ValueError(
      f"{path} is not a tokenizer: give a SentencePiece .model, a tokenizer"
      " .json, a .gguf or a folder with one."
    )
  if not path.exists():
    raise FileNotFoundError(f"the tokenizer {path} does not exist.")
  if not path.is_file() or path.stat().st_size > _MAX_BYTES:
    raise ValueError(
      f"{path} is not a tokenizer, which would be a file of at most"
      f" {_MAX_BYTES >> 20} MiB."
    )
  content = path.read_bytes()
  if path.suffix == ".model":
    return _load_sentencepiece(path, content)
  return _load_hugging_face(path, content)


def from_gguf(file: gguf_file.GgufFile) -> Tokenizer:
  """Returns the tokenizer of an open GGUF file.

  Raises:
    ValueError: The vocabulary is missing, damaged or of an unknown kind.
  """
  path = file.path
  name, content = gguf_tokenizer.tokenizer_file(file)
  if name.endswith(_MODEL_SUFFIX):
    words = _sentencepiece(
      path,
      content,
      gguf_tokenizer.added_tokens(file),
      first="space",
      after="space",
    )
  else:
    words = _hugging_face(path, content, {})
  return dataclasses.replace(
    words,
    bos_id=file.special_id("bos"),
    eos_id=file.special_id("eos"),
    adds_bos=file.adds_bos,
    adds_eos=file.adds_eos,
  )


def _load_sentencepiece(path: pathlib.Path, content: bytes) -> Tokenizer:
  settings = _settings(path.parent)

  def flag(name: str, default: bool) -> bool:
    try:
      return json_file.boolean(name, settings.get(name, default))
    except ValueError as error:
      raise ValueError(f"{path.parent / _SETTING_FILES[0]}: {error}") from error

  # By default only transformers' class for LLaMA is not legacy.
  of_llama = str(_class_name(path.parent)).startswith(
    ("LlamaTokenizer", "CodeLlamaTokenizer")
  )
  legacy = flag("legacy", not of_llama)
  space = "space if none" if of_llama or not legacy else "space"
  prefix = flag("add_prefix_space", True)
  words = _sentencepiece(
    path,
    content,
    _added_tokens(path.parent),
    first=space,
    after=space if legacy else "nothing",
    # Other classes follow the model.
    prefix=prefix if of_llama else None,
  )
  pieces = words.processor.get_piece_size()
  ids: dict[str, int] = {
    words.processor.id_to_piece(i): i for i in range(pieces)
  }
  if words.added is not None:
    ids |= {text: i for i, text in words.added.texts.items()}
  bos_id = _id_named(path.parent, "bos", ids, words.bos_id)
  eos_id = _id_named(path.parent, "eos", ids, words.eos_id)
  return dataclasses.replace(
    words,
    bos_id=bos_id,
    eos_id=eos_id,
    # LLaMA's behaviour by default. (Transformers 5 adds none unless told to.)
    adds_bos=bos_id is not None and flag("add_bos_token", True),
    adds_eos=eos_id is not None and flag("add_eos_token", False),
  )


def _class_name(folder: pathlib.Path) -> Any:
  """Returns the class that transformers reads a folder's tokenizer with."""
  path = folder / _SETTING_FILES[2]
  found = _settings(folder).get("tokenizer_class")
  if found is None and path.is_file():
    found = json_file.read(path).get("tokenizer_class")
  return found


def _id_named(
  folder: pathlib.Path, kind: str, ids: dict[str, int], otherwise: int | None
) -> int | None:
  """Returns the id of the `kind` token named in the tokenizer's settings.

  As in transformers, special_tokens_map.json is read, and takes precedence, if
  tokenizer_config.json does not list its tokens.

  Args:
    folder: The folder of the settings.
    kind: "bos" or "eos".
    ids: The vocabulary.
    otherwise: The id if the settings name none.

  Raises:
    ValueError: The vocabulary lacks the token.
  """
  path, other = (folder / name for name in _SETTING_FILES[:2])
  paths = [path]
  if "added_tokens_decoder" not in _settings(folder):
    paths = [other, path]
  for path in paths:
    token = json_file.read(path).get(f"{kind}_token") if path.is_file() else ""
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
      raise ValueError(
        f"{path}: {kind}_token must be a string, got {reprlib.repr(token)}."
      )
    if not token:
      continue
    if token not in ids:
      raise ValueError(
        f"{path}: {kind}_token is {reprlib.repr(token)}, which is not in the"
        " vocabulary: correct it, or list it among the added tokens."
      )
    return ids[token]
  return otherwise


def _processor(
  path: pathlib.Path, content: bytes
) -> sentencepiece.SentencePieceProcessor:
  processor = sentencepiece.SentencePieceProcessor()
  try:
    # An empty proto is parsed as a model that returns 0 for everything.
    if not content or not processor.LoadFromSerializedProto(content):
      raise RuntimeError("empty")
  except RuntimeError as error:
    raise ValueError(
      f"{path} is not a SentencePiece model, or is damaged: copy it again, or"
      " add its tokenizer.json."
    ) from error
  return processor


def _parse_model(content: bytes) -> Any:
  from sentencepiece import sentencepiece_model_pb2

  model: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore
  model.ParseFromString(content)
  return model


def _with_prefix(content: bytes, prefix: bool) -> bytes:
  """Returns a SentencePiece model that does or does not add a leading space."""
  model = _parse_model(content)
  if model.normalizer_spec.add_dummy_prefix == prefix:
    return content
  model.normalizer_spec.add_dummy_prefix = prefix
  return model.SerializeToString()


def _sentencepiece(
  path: pathlib.Path,
  content: bytes,
  added: dict[int, tokenizers.AddedToken],
  *,
  first: str,
  after: str,
  prefix: bool | None = None,
) -> SentencePieceTokenizer:
  """Returns a SentencePiece tokenizer.

  Args:
    path: The file, for messages.
    content: The model.
    added: Tokens in addition to its pieces, by id.
    first: See `SentencePieceTokenizer`.
    after: See `SentencePieceTokenizer`.
    prefix: Whether the text gets a leading space; None follows the model.
  """
  processor = _processor(path, content)
  fingerprint = hashlib.sha256(content)
  if prefix is not None and _with_prefix(content, prefix) != content:
    fingerprint.update(b"prefix" if prefix else b"no prefix")
    content = _with_prefix(content, prefix)
    processor = _processor(path, content)
  num_pieces = processor.get_piece_size()
  bos_id, eos_id = processor.bos_id(), processor.eos_id()
  new = [i for i in added if i >= num_pieces]
  if new != list(range(num_pieces, num_pieces + len(new))):
    raise ValueError(
      f"{path} has {num_pieces:,} pieces, but the ids of the tokens added to it"
      f" are {reprlib.repr(new)}: they must continue without a gap."
    )
  for i, token in added.items():
    if i < num_pieces and processor.id_to_piece(i) != token.content:
      raise ValueError(
        f"{path}: the added token {token.content!r} has the id {i}, which is"
        f" {processor.id_to_piece(i)!r} there: correct one of the files."
      )
  added = {
    i: token
    for i, token in added.items()
    if i >= num_pieces or not token.special
  }
  if added:
    fingerprint.update(repr((after, added)).encode())
  if first != "space":
    fingerprint.update(first.encode())
  return SentencePieceTokenizer(
    name=path.name,
    fingerprint=fingerprint.hexdigest(),
    vocab_size=num_pieces + len(new),
    bos_id=bos_id if bos_id >= 0 else None,
    eos_id=eos_id if eos_id >= 0 else None,
    adds_bos=bos_id >= 0,
    processor=processor,
    continuing=_processor(path, _with_prefix(content, False)),
    first=first,
    after=after,
    added=_AddedTokens(added) if added else None,
  )


def _load_hugging_face(path: pathlib.Path, content: bytes) -> Tokenizer:
  words = _hugging_face(path, content, _added_tokens(path.parent))
  prefix = _settings(path.parent).get("add_prefix_space")
  if prefix is not None and prefix != _adds_prefix(content):
    raise ValueError(
      f"{path.parent / _SETTING_FILES[0]} has add_prefix_space={prefix!r}, but"
      f" {path.name} does otherwise: correct one of them."
    )
  return words


def _adds_prefix(content: bytes) -> bool:
  """Whether a tokenizer.json adds a space in front of a text."""
  steps = [json.loads(content).get(k) for k in ("normalizer", "pre_tokenizer")]
  while steps:
    step = steps.pop() or {}
    steps += step.get("normalizers", []) + step.get("pretokenizers", [])
    kind = step.get("type")
    if kind == "Prepend" or (
      kind in ("ByteLevel", "Metaspace")
      and step.get("add_prefix_space", kind == "Metaspace")
      and step.get("prepend_scheme") != "never"
    ):
      return True
  return False


@contextlib.contextmanager
def _in_library(name: object) -> Iterator[None]:
  """Names the file in errors of the tokenizers library.

  Its errors are bare Exceptions, or panics, which are not even that.
  """
  try:
    yield
  except BaseException as error:
    if type(error).__name__ != "PanicException" and not isinstance(
      error, Exception
    ):
      raise
    raise ValueError(
      f"{name} is not a tokenizer.json, or is damaged: copy it again."
      f" ({reprlib.repr(str(error))})"
    ) from error


def _growth(step: Any) -> float:
  """Returns how many characters or ids a step of a tokenizer.json makes of one.

  Args:
    step: A normaliser, decoder or post-processor.
  """
  if step["type"] == "Sequence":
    names = ("normalizers", "decoders", "processors")
    inner = [x for name in names for x in step.get(name, ())]
    return math.prod(map(_growth, inner))
  if step["type"] == "TemplateProcessing":
    return max(1, len(step["single"]))
  if step["type"] == "Prepend":
    return max(1, len(step["prepend"]))
  if step["type"] != "Replace":
    return 1
  # An expression may match single characters, and an empty text between them.
  shortest = len(step["pattern"].get("String", ""))
  found = len(step["content"])
  return max(1, found / shortest) if shortest else 1 + found


def _check_growth(path: pathlib.Path, processor: tokenizers.Tokenizer) -> None:
  """Refuses rules that make long texts of short ones."""
  for name in ("normalizer", "decoder", "post_processor"):
    step: Any = getattr(processor, name)
    if step is None:
      continue
    growth = _growth(json.loads(step.__getstate__()))
    if growth > _MAX_GROWTH:
      raise ValueError(
        f"the {name} of {path} makes a text up to {growth:,.0f} times as long:"
        f" at most {_MAX_GROWTH} is supported."
      )


def _hugging_face(
  path: pathlib.Path,
  content: bytes,
  added: dict[int, tokenizers.AddedToken],
) -> HuggingFaceTokenizer:
  with _in_library(path):
    processor = tokenizers.Tokenizer.from_buffer(content)
  _check_growth(path, processor)
  fingerprint = hashlib.sha256(content)
  before = processor.get_added_tokens_decoder()
  for i, token in added.items():
    if repr(before.get(i)) == repr(token):
      continue
    fingerprint.update(repr((i, token)).encode())
    with _in_library(path):
      processor.add_tokens([token])
    found = processor.token_to_id(token.content)
    if found != i:
      raise ValueError(
        f"{path}: the added token {token.content!r} has the id {i} in other"
        f" files of the folder, but {found} here: correct one of them."
      )
  vocabulary = processor.get_vocab(with_added_tokens=True)
  if not vocabulary:
    raise ValueError(f"{path} has an empty vocabulary.")
  # The library goes through all ids up to the largest.
  largest = max(vocabulary.values())
  if largest >= max(len(content), _SMALL_ID):
    raise ValueError(
      f"{path} has the id {largest:,}, but only {len(vocabulary):,} entries:"
      " copy it again."
    )
  # Saved settings may truncate or pad texts, which we never want.
  processor.no_truncation()
  processor.no_padding()
  processor.encode_special_tokens = True
  bos_id, eos_id = (
    _id_named(
      path.parent, kind, vocabulary, _usual_id(path.parent, kind, vocabulary)
    )
    for kind in ("bos", "eos")
  )
  with _in_library(path):
    with_special = processor.encode("a", add_special_tokens=True).ids
  return HuggingFaceTokenizer(
    name=path.name,
    fingerprint=fingerprint.hexdigest(),
    vocab_size=largest + 1,
    bos_id=bos_id,
    eos_id=eos_id,
    adds_bos=bos_id is not None and with_special[:1] == [bos_id],
    adds_eos=eos_id is not None and with_special[-1:] == [eos_id],
    processor=processor,
  )


def _settings(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the tokenizer_config.json of a folder; empty if it has none."""
  path = folder / _SETTING_FILES[0]
  return json_file.read(path) if path.is_file() else {}


def _added_tokens(folder: pathlib.Path) -> dict[int, tokenizers.AddedToken]:
  """Returns the tokens that other files add to a vocabulary, by id.

  As in transformers, added_tokens.json counts only if tokenizer_config.json has
  no list of its own.
  """
  settings = _settings(folder)
  found: dict[int, tokenizers.AddedToken] = {}
  path = folder / _SETTING_FILES[0]
  listed = settings.get("added_tokens_decoder")
  try:
    if listed is not None:
      for i, token in listed.items():
        found[int(i)] = tokenizers.AddedToken(token.pop("content"), **token)
    else:
      path = folder / "added_tokens.json"
      special = {
        token["content"] if isinstance(token, dict) else token
        for name, value in settings.items()
        if name.endswith(("_token", "_special_tokens"))
        for token in (value if isinstance(value, list) else [value])
      }
      for token, i in (json_file.read(path) if path.is_file() else {}).items():
        found[json_file.integer(token, i, 0)] = tokenizers.AddedToken(
          token, normalized=token not in special, special=token in special
        )
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"{path}: the list of added tokens is damaged ({error}): copy it again."
    ) from error
  return dict(sorted(found.items()))


def _usual_id(
  folder: pathlib.Path, kind: str, vocabulary: dict[str, int]
) -> int | None:
  """Returns the `kind` token from config.json, or one with a usual name."""
  path = folder / _SETTING_FILES[2]
  name = f"{kind}_token_id"
  number = json_file.read(path).get(name) if path.is_file() else None
  if isinstance(number, list):  # Llama 3 lists several end tokens.
    number = number[0] if number else None
  if number is not None:
    return json_file.integer(f"{path}: {name}", number, 0)
  found = [vocabulary.get(token) for token in _USUAL_NAMES[kind]]
  return next((token for token in found if token is not None), None)


def _passages(texts: Iterable[str | documents.Part]) -> Iterator[str]:
  """Yields documents in passages of `_PASSAGE_CHARACTERS` or, last, fewer."""
  rest = ""
  for text, ends in documents.as_parts(texts):
    text = rest + text
    whole = len(text) if ends else len(text) - len(text) % _PASSAGE_CHARACTERS
    for start in range(0, whole, _PASSAGE_CHARACTERS):
      yield text[start : start + _PASSAGE_CHARACTERS]
    rest = text[whole:]


def sample(
  texts: Iterable[str | documents.Part], num_bytes: int, *, seed: int = 0
) -> Iterator[str]:
  """Yields passages drawn evenly from `texts`, in order.

  The texts are read once and only the sample is kept in memory. Every passage
  of about 8,000 characters draws a number; those with the smallest stay.

  Args:
    texts: Documents, whole or in parts.
    num_bytes: Largest size of the sample, in bytes of UTF-8.
    seed: Seed of the draws.

  Raises:
    ValueError: `num_bytes` is not positive.
  """
  if num_bytes < 1:
    raise ValueError(f"the sample needs at least one byte, got {num_bytes}.")
  generator = random.Random(seed)
  kept: list[tuple[float, int, str, int]] = []  # Largest draw first.
  size = index = 0
  for passage in _passages(texts):
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
    texts: Text to learn from, kept in memory (see `sample`).
    vocab_size: Number of pieces, including the 259 fixed ones.
    output: The `.model` file; it appears only when complete.

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
      # Learn from lines as in running text: the first word of a line without
      # the space that a new sentence would get.
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
  """Returns the trainer's message in terms of our arguments."""
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
