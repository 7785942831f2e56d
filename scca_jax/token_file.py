"""Token files: the ids of a corpus, and what is known of them.

A token file is the flat array of the ids of a corpus, document after document
(`.bin`, uint16 or uint32), as LongLoRA's PG19 and Proof-pile files are. A JSON
file of the same name beside it says what the ids are:

    {"tokenizer": {"name", "sha256", "vocab_size"}, "bos_id", "eos_id",
     "add_bos", "append_eos", "dtype", "documents", "tokens", "text_bytes",
     "sha256", "sources", "document_ends"}

`sha256` is that of the bytes of the `.bin`; `document_ends` holds, for every
document, the offset behind its last token. Without the JSON the ids are
uint16; a JSON written by hand needs only `dtype`.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from scca_jax import atomic_file
from scca_jax.tokenizer import Tokenizer

# Documents are encoded together until they have so many characters: enough to
# keep all cores busy, and little to hold.
_BATCH_CHARACTERS = 1 << 23
# Ids that are compared with the vocabulary at once.
_CHECKED_IDS = 1 << 20


def _json_path(path: pathlib.Path) -> pathlib.Path:
  return path.with_suffix(".json")


def write_token_file(
  documents: Iterable[str],
  tokenizer: Tokenizer,
  output: str | os.PathLike[str],
  *,
  add_bos: bool = False,
  append_eos: bool = False,
  sources: Sequence[str] = (),
) -> dict[str, Any]:
  """Writes the tokens of `documents` to a `.bin` with its JSON beside it.

  By default the file holds the tokens of the text and nothing else, which is
  what the usual perplexity over a flat file expects. Documents without a token
  are left out. Both files appear only when whole, the `.bin` last: where it
  stands, the JSON that explains it does.

  Args:
    documents: Their texts, read once.
    tokenizer: Ids are uint16 where its vocabulary has less than 65,536.
    output: The `.bin`.
    add_bos: Begin every document with the BOS token.
    append_eos: End every document with the EOS token.
    sources: Names to record of where the documents came from.

  Returns:
    What the JSON says.

  Raises:
    ValueError: `output` is no `.bin`, the tokenizer lacks a token that is
      asked for, or the documents hold no text.
    OSError: A file cannot be written; what stood there before still does.
  """
  output = pathlib.Path(output)
  if output.suffix != ".bin":
    raise ValueError(f"a token file is a .bin file, got {output}.")
  for wanted, token, name in (
    (add_bos, tokenizer.bos_id, "BOS"),
    (append_eos, tokenizer.eos_id, "EOS"),
  ):
    if wanted and token is None:
      raise ValueError(f"the tokenizer {tokenizer.name} has no {name} token.")
  before = [tokenizer.bos_id] if add_bos else []
  after = [tokenizer.eos_id] if append_eos else []
  dtype = np.dtype("<u2" if tokenizer.vocab_size < 1 << 16 else "<u4")
  digest = hashlib.sha256()
  document_ends: list[int] = []
  num_tokens = num_bytes = 0
  with atomic_file.AtomicFile(output) as file:
    for texts in _batch_texts(documents):
      for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if not ids:  # White space, to some tokenizers.
          continue
        num_bytes += len(text.encode())
        content = np.asarray(before + ids + after, dtype).tobytes()
        file.write(content)
        digest.update(content)
        num_tokens += len(content) // dtype.itemsize
        document_ends.append(num_tokens)
    if not num_tokens:
      raise ValueError(f"the corpus is empty: no text for {output}.")
    about = {
      "tokenizer": {
        "name": tokenizer.name,
        "sha256": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
      },
      "bos_id": tokenizer.bos_id,
      "eos_id": tokenizer.eos_id,
      "add_bos": add_bos,
      "append_eos": append_eos,
      "dtype": "uint16" if dtype.itemsize == 2 else "uint32",
      "documents": len(document_ends),
      "tokens": num_tokens,
      "text_bytes": num_bytes,
      "sha256": digest.hexdigest(),
      "sources": [pathlib.PurePath(source).name for source in sources],
      "document_ends": document_ends,
    }
    file.sync()
    atomic_file.write(_json_path(output), json.dumps(about).encode() + b"\n")
  return about


def _batch_texts(documents: Iterable[str]) -> Iterator[list[str]]:
  """Yields the documents that are not empty, several at a time."""
  texts: list[str] = []
  size = 0
  for text in documents:
    if text:
      texts.append(text)
      size += len(text)
    if size >= _BATCH_CHARACTERS:
      yield texts
      texts, size = [], 0
  if texts:
    yield texts


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenFile:
  """The ids of a corpus and what is known of them.

  Attributes:
    tokens: `[tokens]` ids, uint16 or uint32; of a file, mapped and not read.
    document_ends: `[documents]` int64 offset behind each document's last
      token; None where it is not known.
    vocab_size: Vocabulary of the tokenizer that made the ids, or None.
    name: What messages call it.
    about: Everything the JSON says, empty without one.
  """

  tokens: np.ndarray
  document_ends: np.ndarray | None = None
  vocab_size: int | None = None
  name: str = "the corpus"
  about: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

  def __len__(self) -> int:
    return len(self.tokens)

  @classmethod
  def open(
    cls,
    path: str | os.PathLike[str],
    *,
    vocab_size: int | None = None,
  ) -> "TokenFile":
    """Opens a `.bin`, with the JSON beside it or without.

    Args:
      path: The `.bin`.
      vocab_size: Vocabulary of the model that is to read the ids: every id is
        checked against it. None checks nothing.

    Raises:
      FileNotFoundError: The file is not there.
      ValueError: It is empty, cut short, not what its JSON says, or has ids
        beyond `vocab_size`; or the JSON is damaged.
    """
    path = pathlib.Path(path)
    if not path.is_file():
      raise FileNotFoundError(f"there is no token file {path}.")
    about = _read_about(_json_path(path))
    dtype = np.dtype("<u4" if about.get("dtype") == "uint32" else "<u2")
    size = path.stat().st_size
    if size == 0:
      raise ValueError(f"the token file {path} is empty.")
    num_tokens, rest = divmod(size, dtype.itemsize)
    if rest:
      raise ValueError(
        f"the token file {path} has {size} bytes, no multiple of"
        f" {dtype.itemsize}: it is cut short or not {dtype.name}."
      )
    expected = about.get("tokens", num_tokens)
    if num_tokens != expected:
      raise ValueError(
        f"the token file {path} has {num_tokens} tokens, its JSON says"
        f" {expected}: it is cut short or was not written with it."
      )
    tokens = np.memmap(path, dtype, "r")
    if not about:
      _refuse_wide(path, tokens)
    if vocab_size is not None:
      _check_ids(path, tokens, vocab_size)
    made_with = about.get("tokenizer")
    return cls(
      tokens=tokens,
      document_ends=_document_ends(path, about, num_tokens),
      vocab_size=made_with.get("vocab_size")
      if isinstance(made_with, dict)
      else None,
      name=str(path),
      about=about,
    )


def _read_about(path: pathlib.Path) -> dict[str, Any]:
  """Returns what the JSON beside a token file says, {} where there is none."""
  try:
    about = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return {}
  except ValueError as error:
    raise ValueError(
      f"{path} is damaged ({error}): prepare the token file again."
    ) from error
  if not isinstance(about, dict) or about.get("dtype") not in (
    "uint16",
    "uint32",
  ):
    raise ValueError(
      f'{path} describes no token file: it needs "dtype", uint16 or uint32.'
    )
  return about


def _refuse_wide(path: pathlib.Path, tokens: np.ndarray) -> None:
  """Refuses uint32 read as uint16: every other number would be 0."""
  head = tokens[:4096]
  if len(head) >= 64 and not head[1::2].any() and head[::2].any():
    raise ValueError(
      f"the token file {path} looks like uint32: say so in"
      f' {_json_path(path).name} beside it, {{"dtype": "uint32"}}.'
    )


def _check_ids(path: pathlib.Path, tokens: np.ndarray, vocab_size: int) -> None:
  for start in range(0, len(tokens), _CHECKED_IDS):
    block = tokens[start : start + _CHECKED_IDS]
    if block.max() >= vocab_size:
      place = start + int(np.argmax(block >= vocab_size))
      raise ValueError(
        f"the token file {path} has the id {tokens[place]} at position"
        f" {place}, beyond the vocabulary of {vocab_size}: it was made with"
        " another tokenizer."
      )


def _document_ends(
  path: pathlib.Path, about: dict[str, Any], num_tokens: int
) -> np.ndarray | None:
  if "document_ends" not in about:
    return None
  try:
    ends = np.asarray(about["document_ends"], np.int64)
    sound = ends.ndim == 1 and len(ends) > 0 and ends[-1] == num_tokens
    sound = sound and ends[0] > 0 and bool(np.all(np.diff(ends) > 0))
  except (TypeError, ValueError, OverflowError):
    sound = False
  if not sound:
    raise ValueError(
      f"the document ends in {_json_path(path)} do not rise to {num_tokens}:"
      " prepare the token file again."
    )
  return ends
