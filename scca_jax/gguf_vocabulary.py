"""Writes tokenizers into the metadata of GGUF files, for llama.cpp.

`fields` returns the vocabulary of a folder or of another GGUF file. llama.cpp
knows a few named ways to split text; we choose the one that gives the
tokenizer's ids for many kinds of text and for every token by itself. A
tokenizer that none of them agrees with is refused.
"""

import json
import os
import pathlib
import reprlib
import types
from collections.abc import Iterator
from typing import Any

from scca_jax import chat, gguf_file, gguf_tokenizer, tokenizer
from scca_jax.llama_config import LlamaConfig

# Types of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_PREFIX = "tokenizer.ggml."
# Below the score of any piece in use.
_LEAST = -1e6
_TEMPLATE = "tokenizer.chat_template"
# Texts that distinguish ways of splitting: contractions, runs of digits and
# spaces, line ends, scripts, emoji, characters that normalisation would change.
_PROBES = (
  "It's the best of times; we'll see: I'VE 'S they'RE.",
  "1 12 123 1234 12345 3.14159 1,234,567 ١٢٣ ½ x2y33",
  "a  b   c    d\t\te \n\n\n f\r\n  g \n",
  " leading space",
  "  two",
  "trailing  ",
  "\n\nlines\n \n",
  " ",
  "",
  "Grüße, Привет, мир! 你好，世界。こんにちは 안녕 नमस्ते สวัสดี",
  "cafe\u0301 naïve ﬁ ａｂｃ Ⅳ \u00a0 \u2003 \u2028 \u200b \ufeff",
  "🙂👩‍👩‍👧🇩🇪 ∑∫√ →←",
  "def f(x: int) -> str:\n    return f'{x!r:>10}'  # !!! ??? ...\n",
  "<s> </s> <|endoftext|> <unk> <0x0A> ▁ ▁▁a",
  "camelCaseWord ALLCAPS snake_case http://a.b/c?d=e&f=g",
)


class _Metadata:
  """Metadata with the interface of the gguf library's reader."""

  def __init__(self, fields: dict[str, Any]):
    self._fields = fields

  def get_field(self, name: str) -> Any:
    """Returns a field, None if there is none."""
    value = self._fields.get(name)
    if value is None:
      return None
    return types.SimpleNamespace(contents=lambda: value, data=value)


class _Vocabulary(gguf_file.GgufFile):
  """How a file with this metadata would be read; it has no tensors."""

  def __init__(self, path: pathlib.Path, fields: dict[str, Any]):
    """Stores the metadata, and the path for messages."""
    self.path = path
    self._reader = _Metadata(fields)
    self._fields = {}


def _of_pieces(words: tokenizer.SentencePieceTokenizer) -> dict[str, Any]:
  """Returns the vocabulary of a SentencePiece model."""
  from sentencepiece import sentencepiece_model_pb2

  model: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore
  model.ParseFromString(words.processor.serialized_model_proto())
  if model.trainer_spec.model_type != model.trainer_spec.BPE:
    raise ValueError(
      "it does not use byte pairs, and llama.cpp supports no other"
      " SentencePiece models: export for transformers (hf)."
    )
  tokens = [piece.piece for piece in model.pieces]
  scores = [piece.score for piece in model.pieces]
  kinds = [piece.type for piece in model.pieces]
  for i, token in (words.added.tokens if words.added else {}).items():
    if i == len(tokens):
      tokens.append(token.content)
      scores.append(_LEAST)
      kinds.append(_NORMAL)
    kinds[i] = _CONTROL if token.special else _USER_DEFINED
  return {
    "model": "llama",
    "pre": "default",
    "tokens": tokens,
    "scores": scores,
    "token_type": kinds,
    "add_space_prefix": model.normalizer_spec.add_dummy_prefix,
    "unknown_token_id": words.processor.unk_id(),
  }


def _of_json(
  words: tokenizer.HuggingFaceTokenizer,
) -> Iterator[dict[str, Any]]:
  """Yields the ways llama.cpp may read the vocabulary of a `tokenizer.json`."""
  content = json.loads(words.processor.to_str())
  model = content["model"]
  if model["type"] != "BPE":
    raise ValueError(
      f"llama.cpp has no {model['type']} vocabulary for a LLaMA: export for"
      " transformers (hf)."
    )
  merges = [
    merge.split(" ", 1) if isinstance(merge, str) else merge
    for merge in model["merges"]
  ]
  size = max(i for i in words.processor.get_vocab().values()) + 1
  tokens = [f"[PAD{i}]" for i in range(size)]
  kinds = [_UNUSED] * size
  for token, i in model["vocab"].items():
    tokens[i], kinds[i] = token, _NORMAL
  for token in content["added_tokens"]:
    tokens[token["id"]] = token["content"]
    kinds[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
  if not model.get("byte_fallback"):
    for name in gguf_tokenizer.PRE_TOKENIZERS:
      yield {
        "model": "gpt2",
        "pre": name,
        "tokens": tokens,
        "token_type": kinds,
        "merges": [" ".join(merge) for merge in merges],
      }
    return
  # As in SentencePiece, what is merged first has the highest score.
  scores = [-float(len(merges))] * size
  for rank, merge in reversed(list(enumerate(merges))):
    scores[model["vocab"]["".join(merge)]] = -float(rank)
  for i, token in enumerate(tokens):
    if token == model.get("unk_token"):
      kinds[i] = _UNKNOWN
    elif len(token) == 6 and token.startswith("<0x") and token[-1] == ">":
      kinds[i] = _BYTE
  for prefix in (True, False):
    yield {
      "model": "llama",
      "pre": "default",
      "tokens": tokens,
      "scores": scores,
      "token_type": kinds,
      "add_space_prefix": prefix,
      "unknown_token_id": model["vocab"].get(model.get("unk_token")),
    }


def _candidates(words: tokenizer.Tokenizer) -> Iterator[dict[str, Any]]:
  """Yields the ways llama.cpp may read a vocabulary."""
  if isinstance(words, tokenizer.SentencePieceTokenizer):
    yield _of_pieces(words)
  elif isinstance(words, tokenizer.HuggingFaceTokenizer):
    yield from _of_json(words)


def _special_tokens(
  words: tokenizer.Tokenizer, config: LlamaConfig
) -> dict[str, Any]:
  """Returns the tokens that begin and end a text or a turn."""
  ends = list(config.eos_token_ids)
  eos = words.eos_id if words.eos_id is not None else next(iter(ends), None)
  turns = [i for i in ends if i != eos]
  return {
    "bos_token_id": words.bos_id,
    "eos_token_id": eos,
    "eot_token_id": next(iter(turns), None),
    "eom_token_id": next(iter(turns[1:]), None),
    "add_bos_token": words.adds_bos,
    "add_eos_token": words.adds_eos,
  }


def _parts(words: Any, text: str) -> Any:
  """Returns a text as a `tokenizer.json` splits it before merging pairs."""
  step = words.processor.pre_tokenizer
  return text if step is None else step.pre_tokenize_str(text)


def _difference(
  theirs: tokenizer.Tokenizer, ours: tokenizer.Tokenizer, size: int
) -> str | None:
  """Returns a text that two tokenizers split differently, or None."""
  probes = list(_PROBES)
  tokens = [theirs.decode([i]) for i in range(size)]
  if isinstance(ours, tokenizer.HuggingFaceTokenizer):
    # Compared before pairs are merged, which may hide a difference.
    for text in probes:
      if _parts(theirs, text) != _parts(ours, text):
        return text
  else:
    # llama.cpp puts a space in front of any text. For a text that begins with a
    # space, transformers does so only with tokenizers of the old kind.
    probes, tokens = (
      [text for text in texts if not text.startswith((" ", "\u2581"))]
      for texts in (probes, tokens)
    )
  for texts in (probes, tokens, [f"a {token}b" for token in tokens]):
    for text, wanted, found in zip(
      texts, theirs.encode_batch(texts), ours.encode_batch(texts), strict=True
    ):
      if wanted != found:
        return text
  return None


def _with_unused(found: dict[str, Any], vocab_size: int) -> dict[str, Any]:
  """Returns a vocabulary with a token for every row of the embedding."""
  size = len(found["tokens"])
  if size > vocab_size:
    raise ValueError(
      f"it has {size:,} tokens, more than the {vocab_size:,} of the model:"
      " llama.cpp refuses such a file; export for transformers (hf)."
    )
  unused = range(size, vocab_size)
  more = {
    "tokens": [f"[PAD{i}]" for i in unused],
    "token_type": [_UNUSED for _ in unused],
    "scores": [_LEAST for _ in unused],
  }
  return found | {
    name: [*found[name], *values]
    for name, values in more.items()
    if name in found
  }


def fields(
  source: str | os.PathLike[str], config: LlamaConfig
) -> dict[str, Any]:
  """Returns the metadata of GGUF that holds a model's tokenizer.

  Args:
    source: The model's folder, or a GGUF file, whose tokenizer is copied
      unchanged.
    config: The model. Tokens that its tokenizer lacks are marked as unused.

  Raises:
    FileNotFoundError: There is no tokenizer.
    ValueError: A file is damaged, or llama.cpp would split text differently.
      (With SentencePiece, transformers and llama.cpp always differ on texts
      that begin with a space, whatever is exported.)
  """
  source = pathlib.Path(source)
  if source.suffix == gguf_file.SUFFIX:
    return gguf_file.GgufFile(source).tokenizer_fields()
  words = tokenizer.load(source)
  path = source / words.name
  try:
    for found in _candidates(words):
      found |= _special_tokens(words, config)
      found = _with_unused(found, config.vocab_size)
      found = {
        _PREFIX + name: value
        for name, value in found.items()
        if value is not None
      }
      read = tokenizer.from_gguf(_Vocabulary(path, found))
      difference = _difference(words, read, words.vocab_size)
      if difference is None:
        template = chat.template_text(source)
        return found | ({_TEMPLATE: template} if template else {})
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  raise ValueError(
    f"{path}: llama.cpp has no name for the way it splits text, such as"
    f" {reprlib.repr(difference)}: export for transformers (hf)."
  )
