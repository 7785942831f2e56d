"""Perplexity of long texts, by one of three protocols.

All three cut a corpus into windows of `context_len` tokens, `L` below, and
score predictions of the next token. They differ in which windows and
predictions count, so do not compare their numbers with each other:

* "longlora" (the evaluation of LongLoRA, arXiv 2309.12307): the corpus is one
  flat array, regardless of document borders; windows start at
  `range(0, len - L, 256)`, without the last one; no BOS is added. The loss is
  the mean over windows of the mean loss of their `L - 1` predictions. Most
  tokens count up to `L / 256` times, some with little context.
* "strided": the same windows, at a distance of `stride`, but a window scores
  only the tokens that no earlier one scored, so every token except those of the
  first window has at least `L - stride` tokens of context. The loss is the mean
  over tokens.
* "document": each document by itself, with BOS only at its start. Windows start
  every `stride` tokens, the last one ends with the document, and each scores
  only new tokens. Documents of fewer than `L` tokens, BOS not counted, are left
  out. The loss is the mean over tokens.

A lower perplexity at a greater length may just reflect adaptation to the text;
`context_gain` measures what the longer context is worth on the same tokens.

The parts: results, windows of the three protocols, their losses, `perplexity`,
and `context_gain`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scca_jax import losses, segments, sharding, token_file
from scca_jax.llama import DEFAULT_EXECUTION, Execution, Patterns
from scca_jax.token_file import TokenFile

PROTOCOLS = ("longlora", "strided", "document")
# Tokens between windows, which LongLoRA's evaluation fixes.
LONGLORA_STRIDE = 256
# Tokens of a window whose logits are in memory at once.
LOSS_CHUNK = 512
# `context_gain` scores the short context divided by this at once.
_GAIN_STRIDE = 8


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WindowLosses:
  """The loss at every position of every window that was run.

  Attributes:
    losses: `[windows, context_len - 1]` float32 nats; column `i` predicts token
      `i + 1` of the window, whether the protocol scores it or not.
    starts: `[windows]` offset of each window's first token in the corpus.
    firsts: `[windows]` position in the window of the first token it scores.
    begins: `[windows]` whether the first token is a BOS that is not in the
      corpus; it replaces the token before the document.
    documents: `[windows]` index of the document with the token in the middle of
      the window; all 0 for a corpus whose documents are not known.
  """

  losses: np.ndarray
  starts: np.ndarray
  firsts: np.ndarray
  begins: np.ndarray
  documents: np.ndarray

  @property
  def context_len(self) -> int:
    """Length of a window, in tokens."""
    return self.losses.shape[1] + 1

  @property
  def scored(self) -> np.ndarray:
    """`losses`, with NaN where the protocol does not score the prediction."""
    columns = np.arange(self.losses.shape[1])
    return np.where(
      columns >= self.firsts[:, None] - 1, self.losses, np.float32(np.nan)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
  """A perplexity and what it was measured over.

  Attributes:
    perplexity: `exp(loss)`.
    loss: Mean loss in nats, averaged as the protocol says.
    last_quarter: The perplexity over the scored predictions of tokens in the
      last `context_len // 4` positions of their window; None if there are none.
      Under "longlora" these are the last predictions of every window, each with
      at least three quarters of the context. Under the others a window scores
      only new tokens, so with `stride` up to `context_len // 4` these are all
      predictions except those of the first windows.
    num_windows: Windows that were run.
    num_tokens: Predictions that were scored.
    num_skipped: Documents left out because they are shorter than a window;
      0 unless the protocol is "document".
    protocol: "longlora", "strided" or "document".
    context_len: Length of a window, in tokens.
    by_window: Every loss, if requested.
  """

  perplexity: float
  loss: float
  last_quarter: float | None
  num_windows: int
  num_tokens: int
  num_skipped: int
  protocol: str
  context_len: int
  by_window: WindowLosses | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True)
class _Windows:
  """Where windows are in the corpus, and which tokens they score.

  Attributes:
    starts: See `WindowLosses`, also for the next two.
    firsts: `[windows]`.
    begins: `[windows]`.
    num_skipped: Documents left out.
  """

  starts: np.ndarray
  firsts: np.ndarray
  begins: np.ndarray
  num_skipped: int = 0

  def __len__(self) -> int:
    return len(self.starts)

  def __getitem__(self, index: Any) -> "_Windows":
    return _Windows(
      self.starts[index],
      self.firsts[index],
      self.begins[index],
      self.num_skipped,
    )


def check_settings(
  protocol: str,
  context_len: int,
  *,
  num_windows: int | None = None,
  stride: int = LONGLORA_STRIDE,
) -> None:
  """Checks those settings of `perplexity` that need no model and no corpus.

  Raises:
    ValueError: One is unknown or out of range.
  """
  if protocol not in PROTOCOLS:
    raise ValueError(
      f"unknown protocol {protocol!r}: use one of {', '.join(PROTOCOLS)}."
    )
  if context_len < 2:
    raise ValueError(
      f"context_len must be at least 2 to predict a token, got {context_len}."
    )
  if num_windows is not None and num_windows < 1:
    raise ValueError(
      f"num_windows must be at least 1, or None for all, got {num_windows}."
    )
  if stride < 1:
    raise ValueError(f"stride must be at least 1, got {stride}.")
  if protocol == "longlora":
    if stride != LONGLORA_STRIDE:
      raise ValueError(
        f"the longlora protocol has a stride of {LONGLORA_STRIDE}, got"
        f" {stride}: use the protocol strided for other strides."
      )
  elif stride > context_len:
    raise ValueError(
      f"stride {stride:,} exceeds context_len {context_len:,}: tokens between"
      " the windows would not be scored; use a stride up to context_len."
    )


def _flat_windows(
  num_tokens: int, context_len: int, stride: int, *, new_only: bool, name: str
) -> _Windows:
  starts = np.arange(0, num_tokens - context_len, stride)[:-1]
  if not len(starts):
    raise ValueError(
      f"{name} has {num_tokens:,} tokens, but windows of {context_len:,} need"
      f" {context_len + stride + 1:,}: use more text or a shorter context_len."
    )
  firsts = np.ones_like(starts)
  if new_only:
    firsts[1:] = max(1, context_len - stride)
  return _Windows(starts, firsts, np.zeros(len(starts), bool))


def _document_windows(
  document_ends: np.ndarray,
  context_len: int,
  stride: int,
  *,
  add_bos: bool,
  name: str,
) -> _Windows:
  """Returns the windows of each document.

  Args:
    document_ends: `[documents]` offset after each document's last token.
    context_len: Length of a window, in tokens.
    stride: Tokens between windows.
    add_bos: Whether BOS must be added; otherwise the corpus has it.
    name: The corpus's name in messages.
  """
  starts, firsts, begins = [], [], []
  previous_end = longest = num_skipped = 0
  for end in document_ends.tolist():
    # BOS comes before the document's text, inside the corpus or added.
    begin = previous_end - 1 if add_bos else previous_end
    previous_end = end
    size = end - begin
    longest = max(longest, size - 1)
    if size - 1 < context_len:
      num_skipped += 1
      continue
    inside = np.arange(0, size - context_len + 1, stride)
    if inside[-1] + context_len < size:
      inside = np.append(inside, size - context_len)
    scored = np.concatenate([[1], inside[:-1] + context_len])
    starts.append(begin + inside)
    firsts.append(np.maximum(1, scored - inside))
    begins.append((inside == 0) & add_bos)
  if not starts:
    raise ValueError(
      f"no document of {name} has {context_len:,} tokens, and the longest has"
      f" {longest:,}: use longer documents or a shorter context_len."
    )
  return _Windows(
    np.concatenate(starts),
    np.concatenate(firsts),
    np.concatenate(begins),
    num_skipped,
  )


def _evenly_spaced(windows: _Windows, num_windows: int) -> _Windows:
  """Returns the middle window of each of `num_windows` equal parts.

  The middle one, because the first window of "strided" scores more tokens than
  the others, with little context, and should be taken only in proportion.
  """
  count = min(num_windows, len(windows))
  return windows[(2 * np.arange(count) + 1) * len(windows) // (2 * count)]


@functools.partial(
  jax.jit, static_argnames=("graphdef", "patterns", "execution", "loss_chunk")
)
def window_losses(
  state: nnx.State,
  tokens: jax.Array,
  *,
  graphdef: nnx.GraphDef,
  patterns: Patterns,
  execution: Execution,
  loss_chunk: int,
) -> jax.Array:
  """Returns the loss of each prediction in nats, float32 `[batch, seq - 1]`.

  Compiled once for each shape and setting, independently of the weights.

  Args:
    state: The model's variables.
    tokens: `[batch, seq]` int32.
    graphdef: The model's structure.
    patterns: See `Llama.hidden_states`.
    execution: See `Llama.hidden_states`.
    loss_chunk: Tokens of each window whose logits are held at once.
  """
  mesh = execution.mesh
  state = sharding.gathered(state, mesh, leave="layers")
  tokens = sharding.constrain(tokens, mesh, "batch", "seq")
  model = nnx.merge(graphdef, state)

  def losses_of(hidden, targets):
    hidden, targets = (sharding.by_shard(x, mesh) for x in (hidden, targets))
    return losses.token_losses(model.logits, hidden, targets, loss_chunk)

  # The last token has no target in the window; its loss is cut off below.
  targets = jnp.roll(tokens, -1, axis=1)
  found = segments.map_hidden_states(
    losses_of, model, tokens, (targets,), patterns, execution
  )
  return sharding.constrain(
    found.reshape(tokens.shape)[:, :-1], mesh, None, None
  )


def _read(
  tokens: np.ndarray,
  windows: _Windows,
  context_len: int,
  bos_id: int,
  batch_size: int,
) -> np.ndarray:
  """Returns the windows' ids, `[batch_size, context_len]` int32.

  A short batch is zero-padded so that all batches share one shape.
  """
  rows = np.zeros((batch_size, context_len), np.int32)
  for row, start, begins in zip(
    rows, windows.starts, windows.begins, strict=False
  ):
    row[1:] = tokens[start + 1 : start + context_len]
    row[0] = bos_id if begins else tokens[start]
  return rows


def _find_windows(
  tokens: TokenFile | np.ndarray,
  vocab_size: int,
  *,
  context_len: int,
  protocol: str,
  num_windows: int | None,
  stride: int,
  document_ends: np.ndarray | None,
  bos_id: int | None,
) -> tuple[np.ndarray, _Windows, np.ndarray | None, int | None]:
  """Returns the ids, the windows to run, document ends and the BOS to add."""
  check_settings(protocol, context_len, num_windows=num_windows, stride=stride)
  name = "the corpus"
  add_bos = True
  if isinstance(tokens, TokenFile):
    name = tokens.name
    add_bos = not tokens.about.get("add_bos", False)
    if document_ends is None:
      document_ends = tokens.document_ends
    if bos_id is None:
      bos_id = tokens.about.get("bos_id")
    ids = tokens.tokens
  else:
    ids = np.asarray(tokens)
  if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(
      f"tokens must be a flat array of integers, got {ids.dtype}"
      f" {list(ids.shape)}."
    )
  token_file.check_ids(ids, vocab_size, name)
  if document_ends is not None:
    document_ends = np.asarray(document_ends)
    if not token_file.rises_to(document_ends, len(ids)):
      raise ValueError(
        f"document_ends must increase up to the {len(ids):,} tokens of the"
        " corpus."
      )
  if protocol == "document":
    if document_ends is None:
      raise ValueError(
        f"the document protocol needs the document ends of {name}: make the"
        " token file with `scca prepare_data`, or use the protocol"
        " longlora or strided."
      )
    if add_bos and (bos_id is None or not 0 <= bos_id < vocab_size):
      raise ValueError(
        f"the document protocol adds BOS to the documents of {name}: give a"
        f" bos_id within the vocabulary of {vocab_size:,}, got {bos_id}."
      )
    windows = _document_windows(
      document_ends, context_len, stride, add_bos=add_bos, name=name
    )
  else:
    windows = _flat_windows(
      len(ids),
      context_len,
      stride,
      new_only=protocol == "strided",
      name=name,
    )
  if num_windows is not None:
    windows = _evenly_spaced(windows, num_windows)
  return ids, windows, document_ends, bos_id


def _run(
  model: Any,
  ids: np.ndarray,
  windows: _Windows,
  context_len: int,
  *,
  bos_id: int | None,
  patterns: Patterns,
  batch_size: int,
  execution: Execution,
  loss_chunk: int,
  on_windows: Callable[[int], object] | None,
) -> Iterator[tuple[_Windows, np.ndarray]]:
  """Yields windows and their losses, `[windows, context_len - 1]` float32.

  Raises:
    ValueError: A size is below 1, or a scored loss is not finite.
  """
  if batch_size < 1 or loss_chunk < 1:
    raise ValueError(
      "batch_size and loss_chunk must be at least 1, got"
      f" {batch_size} and {loss_chunk}."
    )
  bos = 0 if bos_id is None else bos_id  # Without BOS no window needs it.
  graphdef, state = nnx.split(model)
  batch_size = min(batch_size, len(windows))
  for begin in range(0, len(windows), batch_size):
    part = windows[begin : begin + batch_size]
    found = window_losses(
      state,
      _read(ids, part, context_len, bos, batch_size),
      graphdef=graphdef,
      patterns=patterns,
      execution=execution,
      loss_chunk=loss_chunk,
    )
    rows = np.asarray(found)[: len(part)]
    for row, start, first in zip(rows, part.starts, part.firsts, strict=True):
      if not np.isfinite(row[first - 1 :]).all():
        raise ValueError(
          f"the loss is not finite in the window at token {start:,}:"
          " the weights are damaged, or their dtype is too narrow."
        )
    yield part, rows
    if on_windows is not None:
      on_windows(len(part))


def count_windows(
  tokens: TokenFile | np.ndarray,
  *,
  vocab_size: int,
  context_len: int,
  protocol: str = "longlora",
  num_windows: int | None = None,
  stride: int = LONGLORA_STRIDE,
  document_ends: np.ndarray | None = None,
  bos_id: int | None = None,
) -> int:
  """Returns how many windows `perplexity` would run, and checks its input.

  Args:
    tokens: The corpus; all arguments are as in `perplexity`.
    vocab_size: Vocabulary of the model.
    context_len: Length of a window, in tokens.
    protocol: "longlora", "strided" or "document".
    num_windows: Most windows to run; None runs all.
    stride: Tokens between windows.
    document_ends: `[documents]` offset behind each document's last token.
    bos_id: BOS token.

  Raises:
    ValueError: A setting is unknown or out of range, or the corpus is too
      short or does not fit the vocabulary or the protocol.
  """
  windows = _find_windows(
    tokens,
    vocab_size,
    context_len=context_len,
    protocol=protocol,
    num_windows=num_windows,
    stride=stride,
    document_ends=document_ends,
    bos_id=bos_id,
  )[1]
  return len(windows)


def read_windows(
  tokens: TokenFile, context_len: int, num_windows: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns windows of "longlora", and the document of each.

  Args:
    tokens: The corpus.
    context_len: Length of a window, in tokens.
    num_windows: Most windows, evenly spaced; None takes all.

  Returns:
    Ids, `[windows, context_len]` int32, and documents, `[windows]`; see
    `WindowLosses`.

  Raises:
    ValueError: The corpus is too short, or `num_windows` below 1.
  """
  check_settings("longlora", context_len, num_windows=num_windows)
  windows = _flat_windows(
    len(tokens), context_len, LONGLORA_STRIDE, new_only=False, name=tokens.name
  )
  if num_windows is not None:
    windows = _evenly_spaced(windows, num_windows)
  ids = _read(tokens.tokens, windows, context_len, 0, len(windows))
  return ids, _documents_of(windows, context_len, tokens.document_ends)


def perplexity(
  model: Any,
  tokens: TokenFile | np.ndarray,
  *,
  context_len: int,
  protocol: str = "longlora",
  patterns: Patterns = None,
  num_windows: int | None = None,
  stride: int = LONGLORA_STRIDE,
  batch_size: int = 1,
  document_ends: np.ndarray | None = None,
  bos_id: int | None = None,
  execution: Execution = DEFAULT_EXECUTION,
  loss_chunk: int = LOSS_CHUNK,
  keep_losses: bool = False,
  on_windows: Callable[[int], object] | None = None,
) -> Perplexity:
  """Returns the perplexity of a model on a corpus.

  If `num_windows` is below the number of windows, evenly spaced ones are run;
  each scores the tokens that it would score among all of them. (This choice and
  `last_quarter` are our own.)

  Losses are float32, their sums float64. If the documents of a token file
  already begin with BOS, none is added.

  Args:
    model: A `Llama`.
    tokens: The corpus: a token file, or a flat array of ids.
    context_len: Length of a window, in tokens.
    protocol: "longlora", "strided" or "document"; see the module.
    patterns: See `Llama.hidden_states`; None is dense.
    num_windows: Most windows to run; None runs all.
    stride: Tokens between windows; 256 under "longlora". A stride of
      `context_len` leaves the first token of every later window unscored.
    batch_size: Windows per batch.
    document_ends: `[documents]` offset after each document's last token, for
      "document"; None uses those of the token file.
    bos_id: BOS token, for "document"; None uses that of the token file.
    execution: See `Llama.hidden_states`.
    loss_chunk: Tokens of each window whose logits are held at once.
    keep_losses: Whether to keep every loss in the result, 4 bytes each.
    on_windows: Called after every batch with the number of its windows.

  Raises:
    ValueError: A setting is unknown or out of range, the corpus is too short
      or does not fit the model or the protocol, or a loss is not finite.
  """
  ids, windows, document_ends, bos_id = _find_windows(
    tokens,
    model.config.vocab_size,
    context_len=context_len,
    protocol=protocol,
    num_windows=num_windows,
    stride=stride,
    document_ends=document_ends,
    bos_id=bos_id,
  )
  quarter_start = context_len - context_len // 4
  total = quarter_total = 0.0
  num_tokens = quarter_tokens = 0
  kept = []
  for part, rows in _run(
    model,
    ids,
    windows,
    context_len,
    bos_id=bos_id,
    patterns=patterns,
    batch_size=batch_size,
    execution=execution,
    loss_chunk=loss_chunk,
    on_windows=on_windows,
  ):
    if keep_losses:
      kept.append(rows)
    for row, first in zip(rows.astype(np.float64), part.firsts, strict=True):
      scored = row[first - 1 :]
      in_quarter = row[max(first, quarter_start) - 1 :]
      # All windows of "longlora" score the same number of tokens, so the mean
      # over windows of their means is the mean over tokens, as in the others.
      total += scored.sum()
      num_tokens += len(scored)
      quarter_total += in_quarter.sum()
      quarter_tokens += len(in_quarter)
  loss = total / num_tokens
  return Perplexity(
    perplexity=float(np.exp(loss)),
    loss=float(loss),
    last_quarter=(
      float(np.exp(quarter_total / quarter_tokens)) if quarter_tokens else None
    ),
    num_windows=len(windows),
    num_tokens=num_tokens,
    num_skipped=windows.num_skipped,
    protocol=protocol,
    context_len=context_len,
    by_window=(
      _by_window(windows, np.concatenate(kept), document_ends) if kept else None
    ),
  )


def _documents_of(
  windows: _Windows, context_len: int, document_ends: np.ndarray | None
) -> np.ndarray:
  """Returns the document at the middle of each window."""
  if document_ends is None:
    return np.zeros(len(windows), np.int64)
  middles = windows.starts + context_len // 2
  return np.searchsorted(document_ends, middles, side="right")


def _by_window(
  windows: _Windows, losses: np.ndarray, document_ends: np.ndarray | None
) -> WindowLosses:
  return WindowLosses(
    losses=losses,
    starts=windows.starts,
    firsts=windows.firsts,
    begins=windows.begins,
    documents=_documents_of(windows, losses.shape[1] + 1, document_ends),
  )


def gain_windows(
  context_len: int, short_len: int, stride: int | None = None
) -> tuple[np.ndarray, int]:
  """Returns the short windows that `context_gain` runs in each long one.

  Args:
    context_len: Length of a long window, in tokens.
    short_len: See `context_gain`.
    stride: See `context_gain`.

  Returns:
    `[short windows]` the position in the long window at which each starts, and
    their length in tokens.

  Raises:
    ValueError: A length is out of range.
  """
  quarter = context_len // 4
  if not 1 <= short_len <= context_len - quarter or quarter < 1:
    raise ValueError(
      f"a context gain needs windows of at least 4 tokens and a shorter context"
      f" of at most three quarters of them, got {context_len:,} and"
      f" {short_len:,}."
    )
  if stride is None:
    stride = max(1, short_len // _GAIN_STRIDE)
  if stride < 1:
    raise ValueError(f"the stride of a gain must be at least 1, got {stride}.")
  stride = min(stride, quarter)
  scored = np.arange(context_len - quarter, context_len, stride)
  # The last one ends where the long window ends.
  return np.minimum(scored, context_len - stride) - short_len, (
    short_len + stride
  )


def context_gain(
  model: Any,
  tokens: TokenFile | np.ndarray,
  windows: WindowLosses,
  *,
  short_len: int,
  stride: int | None = None,
  patterns: Patterns = None,
  batch_size: int = 1,
  bos_id: int | None = None,
  execution: Execution = DEFAULT_EXECUTION,
  loss_chunk: int = LOSS_CHUNK,
  on_windows: Callable[[int], object] | None = None,
) -> np.ndarray:
  """Returns what the long context is worth, for each token (SPEC 5).

  That is a token's loss given only the `short_len` tokens before it, minus its
  loss given all tokens of its window, for the last `L // 4` tokens of every
  window of `L`. `bootstrap.estimate(gain, windows.documents)` is its mean with
  an interval.

  Giving each token exactly `short_len` tokens would take a forward pass per
  token. Instead, windows of `short_len + stride` tokens score their last
  `stride`, so that a token has at least `short_len` and fewer than
  `short_len + stride` tokens before it. If more context helps, the gain is
  understated, never overstated; with a stride of 1 it is exact. The cost is
  about `L / 4 * (short_len / stride + 1)` tokens per window, `2.25 L` with the
  default stride. (The stride is our own choice.)

  Args:
    model: A `Llama`.
    tokens: The corpus.
    windows: The losses of the long windows: `perplexity(model, tokens,
      keep_losses=True, ...).by_window`. All tokens of their last quarters
      count, whether the protocol scored them or not.
    short_len: Tokens of the shorter context, at most `L - L // 4`.
    stride: Tokens that a short window scores; None means an eighth of
      `short_len`.
    patterns: See `Llama.hidden_states`; the same as for `windows`.
    batch_size: Short windows per batch.
    bos_id: See `perplexity`.
    execution: See `Llama.hidden_states`.
    loss_chunk: Tokens of each window whose logits are held at once.
    on_windows: Called after every batch with the number of its short windows;
      each long window has `len(gain_windows(...)[0])` of them.

  Returns:
    `[windows, L // 4]` float32 nats; column `i` is token `L - L // 4 + i`.

  Raises:
    ValueError: A length is out of range, or a loss is not finite.
  """
  context_len = windows.context_len
  inside, length = gain_windows(context_len, short_len, stride)
  ids = tokens
  if isinstance(tokens, TokenFile):
    ids = tokens.tokens
    bos_id = tokens.about.get("bos_id") if bos_id is None else bos_id
  # The last short window may overlap with what the one before it scored.
  new = context_len - context_len // 4
  new += np.arange(len(inside)) * (length - short_len)
  short = _Windows(
    (windows.starts[:, None] + inside).ravel(),
    np.tile(new - inside, len(windows.starts)),
    (windows.begins[:, None] & (inside == 0)).ravel(),
  )
  given_few = []
  for part, rows in _run(
    model,
    np.asarray(ids),
    short,
    length,
    bos_id=bos_id,
    patterns=patterns,
    batch_size=batch_size,
    execution=execution,
    loss_chunk=loss_chunk,
    on_windows=on_windows,
  ):
    given_few += [
      row[first - 1 :] for row, first in zip(rows, part.firsts, strict=True)
    ]
  given_all = windows.losses[:, -(context_len // 4) :]
  return np.concatenate(given_few).reshape(given_all.shape) - given_all
