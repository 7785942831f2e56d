"""Turns a GGUF file's vocabulary into the tokenizer files of other tools.

`tokenizer_file` returns SentencePiece's `tokenizer.model` or a byte-pair
`tokenizer.json`; `tokenizer_settings` returns the `tokenizer_config.json` that
goes with it.
"""

import collections
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from scca_jax.gguf_file import LLAMA_3_PRE_TOKENIZERS, GgufFile

# How text is split before byte pairs are merged, by GGUF's name for the method;
# the expressions come from the models' own tokenizer.json.
_LLAMA_3_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = ("gpt-2", "smollm", *LLAMA_3_PRE_TOKENIZERS)
# Token types; GGUF uses SentencePiece's numbers.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6


def tokenizer_file(file: GgufFile) -> tuple[str, bytes]:
  """Returns the tokenizer as a file that other tools read.

  Returns:
    The file's name, `tokenizer.model` (SentencePiece) or `tokenizer.json`
    (byte pairs), and its content.

  Raises:
    ValueError: The vocabulary is missing, damaged or of another kind.
  """
  kind = file.vocabulary("model")
  try:
    if kind == "llama":
      return "tokenizer.model", _sentencepiece(file)
    if kind == "gpt2":
      return "tokenizer.json", _byte_pairs(file)
  except (TypeError, IndexError, UnicodeDecodeError) as error:
    raise ValueError(
      f"{file.path}: the vocabulary is damaged ({error}): copy it again."
    ) from error
  raise ValueError(
    f"{file.path} has a tokenizer of the kind {kind!r}, but only 'llama' and"
    " 'gpt2' can be read: give --tokenizer=tokenizer.json."
  )


def _pieces(file: GgufFile) -> tuple[list[str], list[int]]:
  tokens = file.vocabulary("tokens")
  kinds = file.vocabulary("token_type")
  if not tokens:
    raise ValueError(f"{file.path} has no vocabulary: give --tokenizer=FILE.")
  kinds = [_NORMAL] * len(tokens) if kinds is None else kinds
  if len(kinds) != len(tokens):
    raise ValueError(
      f"{file.path}: {len(tokens)} tokens have {len(kinds)} types: copy it"
      " again."
    )
  # llama.cpp's names for tokens without a text.
  tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
  twice = [t for t, n in collections.Counter(tokens).items() if n > 1]
  if twice:
    raise ValueError(
      f"{file.path}: the token {twice[0]!r} is in the vocabulary twice: copy it"
      " again."
    )
  if file.vocabulary("suppress_tokens"):
    raise ValueError(
      f"{file.path}: tokenizer.ggml.suppress_tokens is not supported."
    )
  return tokens, kinds


def added_tokens(file: GgufFile) -> dict[int, tokenizers.AddedToken]:
  """Returns the tokens that llama.cpp splits off from a text first, by id."""
  tokens, kinds = _pieces(file)
  return {
    i: tokenizers.AddedToken(token, normalized=False)
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
    if kind == _USER_DEFINED
  }


def _sentencepiece(file: GgufFile) -> bytes:
  from sentencepiece import sentencepiece_model_pb2

  tokens, kinds = _pieces(file)
  scores = file.vocabulary("scores")
  if scores is None or len(scores) != len(tokens):
    raise ValueError(f"{file.path} lacks the scores of its vocabulary.")
  model: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore
  for token, kind, score in zip(tokens, kinds, scores, strict=True):
    model.pieces.add(piece=token, type=kind, score=score)
  trainer = model.trainer_spec
  trainer.model_type = trainer.BPE
  trainer.vocab_size = len(tokens)
  trainer.byte_fallback = _BYTE in kinds
  trainer.pad_id = -1
  for name, field in (("unknown", "unk"), ("bos", "bos"), ("eos", "eos")):
    token_id = file.special_id(name)
    if token_id is None and name == "unknown" and _UNKNOWN in kinds:
      token_id = list(kinds).index(_UNKNOWN)
    setattr(trainer, f"{field}_id", -1 if token_id is None else token_id)
    if token_id is not None:
      # SentencePiece looks them up by name.
      setattr(trainer, f"{field}_piece", tokens[token_id])
  normalizer = model.normalizer_spec
  normalizer.name = "identity"
  normalizer.add_dummy_prefix = file.flag("add_space_prefix", True)
  # The GGUF key of that name does not matter: llama.cpp reads it only for T5.
  normalizer.remove_extra_whitespaces = False
  normalizer.escape_whitespaces = True
  return model.SerializeToString()


def _byte_pairs(file: GgufFile) -> bytes:
  tokens, kinds = _pieces(file)
  merges = file.vocabulary("merges")
  if not merges:
    raise ValueError(f"{file.path} lacks the merges of its vocabulary.")
  name = file.vocabulary("pre", "")
  if name not in PRE_TOKENIZERS:
    raise ValueError(
      f"{file.path}: unknown pre-tokenizer {name!r}, known are"
      f" {', '.join(PRE_TOKENIZERS)}: give --tokenizer=tokenizer.json."
    )
  is_llama_3 = name in LLAMA_3_PRE_TOKENIZERS
  processor = tokenizers.Tokenizer(
    models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=[tuple(merge.split(" ", 1)) for merge in merges],
      ignore_merges=is_llama_3,
    )
  )
  steps: list[Any] = []
  if name == "smollm":
    steps.append(pre_tokenizers.Digits(individual_digits=True))
  if is_llama_3:
    steps.append(
      pre_tokenizers.Split(tokenizers.Regex(_LLAMA_3_SPLIT), "isolated")
    )
  steps.append(
    # add_space_prefix does not matter: llama.cpp reads it only for
    # SentencePiece.
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not is_llama_3)
  )
  processor.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore
  processor.decoder = decoders.ByteLevel()  # pyright: ignore
  for of_kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
    added = [
      tokenizers.AddedToken(token, special=special, normalized=False)
      for token, kind in zip(tokens, kinds, strict=True)
      if kind == of_kind
    ]
    if special:
      processor.add_special_tokens(added)
    else:
      processor.add_tokens(added)
  _add_ends(file, processor, tokens)
  return processor.to_str().encode()


def _add_ends(
  file: GgufFile, processor: tokenizers.Tokenizer, tokens: list[str]
) -> None:
  """Makes a tokenizer add BOS and EOS to a text as llama.cpp does.

  Transformers reads this from here, not from `tokenizer_config.json`.
  """
  bos, eos = (
    [] if token is None or not wanted else [(tokens[token], token)]
    for token, wanted in (
      (file.special_id("bos"), file.adds_bos),
      (file.special_id("eos"), file.adds_eos),
    )
  )
  if not bos and not eos:
    return
  begin, end = ([name for name, _ in special] for special in (bos, eos))
  processor.post_processor = processors.TemplateProcessing(  # pyright: ignore
    single=[*begin, "$A", *end],
    pair=[*begin, "$A", *end, *begin, "$B:1", *end],
    special_tokens=[*{*bos, *eos}],
  )


def tokenizer_settings(file: GgufFile) -> dict[str, Any]:
  """Returns the `tokenizer_config.json` that goes with the tokenizer."""
  tokens, kinds = _pieces(file)
  settings: dict[str, Any] = {
    "add_bos_token": file.adds_bos,
    "add_eos_token": file.adds_eos,
    "clean_up_tokenization_spaces": False,
  }
  if file.vocabulary("model") == "llama":
    settings |= {
      # No class is named: transformers' class for LLaMA adds no space after a
      # special token.
      "added_tokens_decoder": {
        str(i): {
          "content": token,
          "special": kind != _USER_DEFINED,
          "normalized": False,
          "lstrip": False,
          "rstrip": False,
          "single_word": False,
        }
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
      },
    }
  else:
    # Not LlamaTokenizer, which does not support byte pairs.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
  for name, kind in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown")):
    token_id = file.special_id(kind)
    if token_id is not None:
      settings[f"{name}_token"] = tokens[token_id]
  if file.chat_template is not None:
    settings["chat_template"] = file.chat_template
  return settings
