"""Where a text can be cut so that its parts have the ids of the whole.

A tokenizer's files say what can span two characters: a piece of the vocabulary,
an added token, a rule of the normaliser or of the pre-tokeniser. Between two
characters that nothing can span there is a border. If a tokenizer has a rule
that we do not know, there are no borders, and a text has to be tokenised as a
whole.

The part after a border is encoded without what the tokenizer puts in front of a
text.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# Whether there is a border between two characters.
Border = Callable[[str, str], bool]

_SPACE = "\u2581"
# Steps of tokenizer.json that change each character by itself or look only at
# neighbours other than white space.
_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase")
# Steps that split a text further, independently of its words.
_CUTTERS = ("Digits", "Punctuation", "UnicodeScripts")
# Groups of a regular expression that look beyond what they match; the one that
# is allowed looks for the end of white space.
_LOOKS = re.compile(r"\(\?(?!:|i:|!\\S\))|\\[AbBGzZ1-9]|(?<!\[)\^|\$")
# Letters before white space, as in most texts, and before the other kinds of
# characters that a rule may treat differently.
_PROBES = ("a b", "ab cd", "A Bc", "don't I", "x 1", "\u00e9 .", "\u65e5 b")


def find(text: str, start: int, border: Border) -> int | None:
  """Returns the first place after a border, from `start` on, or None."""
  for place in range(max(start, 1), len(text)):
    if border(text[place - 1], text[place]):
      return place
  return None


def _pairs(pieces: Iterable[str]) -> set[str]:
  """Returns the neighbouring characters in pieces."""
  return {
    first + second
    for piece in pieces
    for first, second in itertools.pairwise(piece)
  }


def of_sentencepiece(model: Any, added: Iterable[Any]) -> Border | None:
  """Returns the borders of a SentencePiece model, None if none are known.

  Byte-pair merges produce only pieces of the model, so none crosses two
  characters that no piece has side by side. (The best split of a unigram model
  is independent too, except for the rounding of sums over the whole text.)

  Args:
    model: The parsed file.
    added: Tokens in addition to it, `tokenizers.AddedToken`.
  """
  trainer, normalizer = model.trainer_spec, model.normalizer_spec
  added = list(added)
  if (
    trainer.model_type != trainer.BPE
    or trainer.treat_whitespace_as_suffix
    or normalizer.precompiled_charsmap
    or normalizer.remove_extra_whitespaces
    or any(token.lstrip or token.rstrip or token.single_word for token in added)
  ):
    return None
  pieces = [piece.piece for piece in model.pieces]
  texts = [token.content for token in added]
  spanned = _pairs(pieces) | _pairs(x.replace(" ", _SPACE) for x in texts)
  known = {piece for piece in pieces if len(piece) == 1}
  # Text after an added token may get a space in front.
  ends = {text[-1] for text in texts}

  def border(before: str, behind: str) -> bool:
    pair = (before + behind).replace(" ", _SPACE)
    # Neighbouring unknown characters become one token, unless they become
    # bytes.
    merged = not trainer.byte_fallback and not known & set(pair)
    return pair not in spanned and before not in ends and not merged

  return border


def _steps(step: Any, name: str) -> Iterator[dict[str, Any]]:
  """Yields the steps of a part of tokenizer.json, one after the other."""
  if step is None:
    return
  if step.get("type") == "Sequence":
    for inner in step[name]:
      yield from _steps(inner, name)
  else:
    yield step


def without_prefix(content: dict[str, Any]) -> dict[str, Any]:
  """Returns a tokenizer.json that puts nothing in front of a text.

  Args:
    content: The object in the file.
  """
  kept = [
    step
    for step in _steps(content.get("normalizer"), "normalizers")
    if step.get("type") != "Prepend"
  ]
  sequence = {"type": "Sequence", "normalizers": kept}
  return content | {"normalizer": sequence if kept else None}


def of_hugging_face(
  content: dict[str, Any],
  added: Iterable[Any],
  pre_tokenize: Callable[[str], Iterable[tuple[str, tuple[int, int]]]] | None,
) -> Border | None:
  """Returns the borders of a tokenizer.json, None if none are known.

  They lie between a letter and white space.

  Args:
    content: The object in the file.
    added: Tokens that are found in a text, `tokenizers.AddedToken`.
    pre_tokenize: Returns the words of a text and their places; None if the file
      has no such step.
  """
  added = list(added)
  spanned = _pairs(token.content for token in added)
  if any(token.lstrip or token.rstrip or token.single_word for token in added):
    return None
  marks_spaces = False
  for step in _steps(content.get("normalizer"), "normalizers"):
    kind = step.get("type")
    if kind == "Replace" and step.get("pattern") == {"String": " "}:
      marks_spaces = step.get("content") == _SPACE
      if not marks_spaces:
        return None
    elif kind == "Prepend" and added:
      return None  # It comes after each of them, too.
    elif kind != "Prepend" and kind not in _NORMALIZERS:
      return None
  # A step that adds a space in front of a text adds none in front of a space.
  spaces, cuts = " \n", False
  for step in _steps(content.get("pre_tokenizer"), "pretokenizers"):
    kind = step.get("type")
    if kind == "Split":
      expression = step.get("pattern", {}).get("Regex", "^")
      if step.get("behavior") != "Isolated" or _LOOKS.search(expression):
        return None
      cuts = True
    elif kind == "ByteLevel":
      cuts = cuts or step.get("use_regex", True)
      spaces = " " if step.get("add_prefix_space", True) else spaces
    elif kind == "Metaspace":
      marks_spaces, spaces = True, " "
      cuts = cuts or step.get("split", True)
    elif kind not in _CUTTERS:
      return None
  if cuts and pre_tokenize is not None:
    for probe in _PROBES:
      starts = {start for _, (start, _) in pre_tokenize(probe)}
      if probe.rindex(" ") not in starts:
        return None
  elif marks_spaces and content.get("model", {}).get("type") == "BPE":
    # No step splits here, so the merges must not join: they make only pieces of
    # the model.
    spanned |= {
      pair.replace(_SPACE, " ") for pair in _pairs(content["model"]["vocab"])
    }
    spaces = " "
  else:
    return None

  def border(before: str, behind: str) -> bool:
    return (
      behind in spaces
      and before.isalpha()
      and (cuts or before.isascii())
      and before + behind not in spanned
    )

  return border
