"""Patterns as strings: `parse` reads them, `text` writes them.

The parts: a call and its arguments, `parse`, the short forms that `text` tries,
and `text`.
"""

import ast
import dataclasses
import difflib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from scca_jax.patterns.named import (
  CONSTRUCTORS,
  check_list,
  dense,
  mix,
  mixture,
)
from scca_jax.patterns.relation import (
  BOUNDARIES,
  CAUSALITIES,
  AttentionPattern,
  HeadPattern,
  Mixture,
  check_int,
  check_sizes,
)

__all__ = [
  "parse",
  "text",
]

# Longer than any list of heads, too short to keep the parser busy.
_MAX_TEXT = 100_000
_OPTIONS = ("boundary", "causality", "interleaved")
# Forms made of other forms, and the arguments that they take by name.
_COMPOUND = {"mix": ("heads",), "mixture": (), "layers": ("dense",)}
_LAYER = "layer"
# The fields that differ between the heads of a constructor, except longmixed.
_MOVED = {"shift": 0, "offset": 0, "select": None}


@dataclasses.dataclass(frozen=True)
class _Place:
  """The model and place that a form is built for.

  Attributes:
    num_heads: Query heads.
    num_kv_heads: Key heads; None in a part of `mix`, which has no GQA groups of
      its own.
    layer: The layer, from 0.
    num_layers: Layers of the model.
    seq_len: Length in tokens that determines omitted sizes.
    options: Boundary and causality of the form around this one.
  """

  num_heads: int
  num_kv_heads: int | None
  layer: int
  num_layers: int
  seq_len: int
  options: tuple[tuple[str, Any], ...] = ()


def _nearest(what: str, name: str, known: Sequence[str]) -> str:
  """Returns a message with the unknown name and the likely meaning."""
  near = difflib.get_close_matches(name, known, 1, 0.5)
  hint = f"did you mean {near[0]!r}? " if near else ""
  return f"{what} {_short(name)}: {hint}Use one of {', '.join(known)}."


def _short(text: str) -> str:
  return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _literal(name: str, node: ast.expr) -> Any:
  try:
    return ast.literal_eval(node)
  except (ValueError, TypeError, RecursionError, MemoryError):
    raise ValueError(
      f"{name}={_short(ast.unparse(node))} must be a number, a string, True,"
      " False or a list of these."
    ) from None


def _call(
  node: ast.expr,
) -> tuple[str, list[ast.expr], dict[str, ast.expr]]:
  """Returns name, parts and arguments of `NAME` or `NAME(part, name=...)`."""
  if isinstance(node, ast.Name):
    return node.id, [], {}
  if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
    raise ValueError(
      f"{_short(ast.unparse(node))} is not a pattern: write a name, or"
      " name(argument=value, ...)."
    )
  arguments = {}
  for keyword in node.keywords:
    if keyword.arg is None:
      raise ValueError("** cannot be used: write name=value.")
    if keyword.arg in arguments:
      raise ValueError(f"{_short(keyword.arg)} is given twice.")
    arguments[keyword.arg] = keyword.value
  return node.func.id, node.args, arguments


def _integers(name: str, value: Any) -> tuple[int, ...]:
  values = (value,) if isinstance(value, int) else value
  return tuple(check_int(name, x, 0) for x in check_list(name, values, int))


def _build(node: ast.expr, place: _Place) -> AttentionPattern | Mixture:
  """Returns the pattern that a form describes, in one layer."""
  name, parts, arguments = _call(node)
  forms = (*CONSTRUCTORS, *_COMPOUND)
  if name not in forms:
    raise ValueError(_nearest("unknown pattern", name, forms))
  known = _COMPOUND.get(name)
  if known is None:
    known = CONSTRUCTORS[name].arguments
    if parts:
      raise ValueError(
        f"{name} takes arguments by name, got {_short(ast.unparse(parts[0]))}:"
        f" write {name}({(known or _OPTIONS)[0]}=...)."
      )
  elif not parts:
    raise ValueError(f"{name} needs patterns: write {name}(local, sda).")
  for argument in arguments:
    if argument not in (*known, *_OPTIONS):
      raise ValueError(
        _nearest(f"{name} has no argument", argument, (*known, *_OPTIONS))
      )
  values = {x: _literal(x, node) for x, node in arguments.items()}
  interleaved = values.pop("interleaved", False)
  if not isinstance(interleaved, bool | int):
    raise ValueError(
      "interleaved must be True, False or a number of groups, got"
      f" {interleaved!r}."
    )
  options = dict(place.options)
  for option, allowed in (("boundary", BOUNDARIES), ("causality", CAUSALITIES)):
    if option in values:
      options[option] = value = values.pop(option)
      if value not in allowed:
        raise ValueError(
          f"unknown {option} {value!r}: use one of {', '.join(allowed)}."
        )
  inner = dataclasses.replace(place, options=tuple(options.items()))
  if name in _COMPOUND:
    pattern = _build_compound(name, parts, values, inner)
  else:
    if values.get("rotate") == _LAYER:
      values["rotate"] = place.layer
    pattern = dataclasses.replace(
      CONSTRUCTORS[name](place.num_heads, place.seq_len, values), **options
    )
  if interleaved is not False:
    if place.num_kv_heads is None:
      raise ValueError(
        "a part of mix cannot be interleaved by itself: write mix(...,"
        " interleaved=True)."
      )
    groups = place.num_kv_heads if interleaved is True else interleaved
    if groups < 1 or pattern.num_heads % groups:
      raise ValueError(
        f"interleaved must divide the {pattern.num_heads} heads, got {groups}."
      )
    pattern = pattern.interleaved(groups)
  return pattern


def _build_compound(
  name: str, parts: list[ast.expr], values: dict[str, Any], place: _Place
) -> AttentionPattern | Mixture:
  if name == "layers":
    dense_layers = _integers("dense", values.get("dense", ()))
    if dense_layers and max(dense_layers) >= place.num_layers:
      raise ValueError(
        f"dense={dense_layers} must be layers of 0 to {place.num_layers - 1}."
      )
    if place.layer in dense_layers:
      return _build(ast.Name("dense"), place)
    return _build(parts[place.layer % len(parts)], place)
  if name == "mixture":
    counts = [place.num_heads] * len(parts)
  else:
    counts = _integers("heads", values.get("heads", ()))
    place = dataclasses.replace(place, num_kv_heads=None)
    if len(counts) != len(parts) or sum(counts) != place.num_heads:
      raise ValueError(
        f"mix needs the number of heads of each of its {len(parts)} patterns,"
        f" {place.num_heads} in all: got heads={counts}."
      )
  built = [
    _build(part, dataclasses.replace(place, num_heads=count))
    for part, count in zip(parts, counts, strict=True)
  ]
  single = []
  for pattern in built:
    if isinstance(pattern, Mixture):
      raise ValueError(f"a mixture cannot be a part of {name}.")
    single.append(pattern)
  return mix(*single) if name == "mix" else mixture(*single)


def parse(
  text: str, *, num_heads: int, num_kv_heads: int, num_layers: int, seq_len: int
) -> tuple[AttentionPattern | Mixture, ...]:
  """Returns the pattern of each layer that a string describes.

  The string is a name of this module, such as `scca_fixed`, or a call with
  arguments by name, such as `longmixed(chunk_size=2048, dilations=(2, 4, 8))`.
  Nothing but literals is evaluated. Sizes left out follow from `seq_len`:
  `chunk_size` is a quarter of it (in `scca_near` an eighth), `window` a chunk,
  `num_chunks` and `dilation` the number of chunks.

  * Every form takes `boundary=` and `causality=`, which also apply to the forms
    inside it, and `interleaved=True` or a number of groups (see
    `AttentionPattern`).
  * `scca_flow` and `scca_near` take `rotate="layer"`: one more chunk in each
    layer.
  * `mix(A, B, heads=(4, 5))` divides the heads between several patterns.
  * `mixture(A, B)` lets every head attend by both (see `Mixture`).
  * `layers(A, B)` gives layer `l` the pattern `l mod 2`; with `dense=(3, 11)`
    those layers are dense.
  * `uniform(...)` takes fields of `HeadPattern` and applies them to all heads.

  Args:
    text: The string.
    num_heads: Query heads.
    num_kv_heads: Key heads, for `interleaved=True`.
    num_layers: Layers.
    seq_len: Length to train at, in tokens.

  Raises:
    ValueError: The string is not a pattern or does not fit the model. The
      message is one line.
  """
  check_sizes(
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    num_layers=num_layers,
    seq_len=seq_len,
  )
  if not isinstance(text, str):
    raise ValueError(f"a pattern must be a string, got {text!r}.")
  if len(text) > _MAX_TEXT:
    raise ValueError(
      f"a pattern must have at most {_MAX_TEXT} characters, got {len(text)}."
    )
  try:
    tree = ast.parse(text.strip(), mode="eval").body
  except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
    said = error.msg if isinstance(error, SyntaxError) else "nested too deeply"
    raise ValueError(
      f"the pattern {_short(text)} cannot be read: {said}. Write a name, or"
      " name(argument=value, ...)."
    ) from None
  try:
    return tuple(
      _build(tree, _Place(num_heads, num_kv_heads, layer, num_layers, seq_len))
      for layer in range(num_layers)
    )
  except ValueError as error:
    raise ValueError(f"the pattern {_short(text)}: {error}") from None
  except RecursionError:
    raise ValueError(
      f"the pattern {_short(text)} is nested too deeply."
    ) from None


def _written(name: str, parts: Sequence[str] = (), /, **arguments: Any) -> str:
  """Returns a form as a string; arguments of None are left out."""
  given = [f"{k}={v!r}" for k, v in arguments.items() if v is not None]
  inside = ", ".join([*parts, *given])
  return f"{name}({inside})" if inside else name


def _flow_rotations(shifts: Sequence[int]) -> Iterator[tuple[int, int]]:
  """Yields the (num_chunks, rotate) that may have produced shifts in chunks.

  Head `h` has `h m // H`, rotated. From one head to the next the shift grows by
  `m / H`, rounded, and once, at the wrap, it drops by `m`.
  """
  heads = len(shifts)
  drops = [a - b for a, b in itertools.pairwise(shifts) if a > b]
  spread = drops[0] if drops else shifts[-1] - shifts[0]
  few = max(heads - 1, 1)
  lowest = max(max(shifts) + 1, (spread - 1) * heads // few)
  highest = max(lowest, (spread + 2) * heads // few + 1)
  for num_chunks in range(lowest, highest + 1):
    yield num_chunks, shifts[0]


def _constructions(
  heads: tuple[HeadPattern, ...],
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields names and arguments that may have made these heads.

  Arguments at their default value are None.
  """
  first, last = heads[0], heads[-1]
  chunk_size, dilation, window = last.chunk_size, last.dilation, last.window
  yield "dense", {}
  if chunk_size is None:
    if window is not None:
      yield "sliding", {"window": window}
      yield "dna", {"window": window, "dilation": dilation}
    yield "sda", {"dilation": dilation, "window": window}
  else:
    yield "local", {"chunk_size": chunk_size}
    yield "s2", {"chunk_size": chunk_size}
    shift = None if last.shift == chunk_size // 2 else last.shift
    yield "scca_fixed", {"chunk_size": chunk_size, "shift": shift}
    yield "dilated", {"chunk_size": chunk_size, "dilation": dilation}
    yield (
      "sda",
      {"dilation": dilation, "chunk_size": chunk_size, "window": window},
    )
    shifts = [head.shift // chunk_size for head in heads]
    sinks = last.sinks or None
    for num_chunks, rotate in _flow_rotations([shift - 1 for shift in shifts]):
      yield (
        "scca_near",
        {
          "chunk_size": chunk_size,
          "num_chunks": num_chunks + 1,
          "sinks": sinks,
          "rotate": rotate or None,
        },
      )
    for num_chunks, rotate in _flow_rotations(shifts):
      yield (
        "scca_flow",
        {
          "chunk_size": chunk_size,
          "num_chunks": num_chunks,
          "rotate": rotate or None,
          "own_chunk": last.own_chunk or None,
          "sinks": sinks,
        },
      )
  if first.chunk_size is not None:
    yield from _longmixed_constructions(heads)


def _longmixed_constructions(
  heads: tuple[HeadPattern, ...],
) -> Iterator[tuple[str, dict[str, Any]]]:
  chunk_size = heads[0].chunk_size
  yield "longmixed", {"chunk_size": chunk_size}
  # The head groups of SDA: each begins where the dilation changes.
  runs = [
    (dilation, len(list(run)))
    for dilation, run in itertools.groupby(
      heads, lambda head: head.dilation if head.chunk_size is None else 0
    )
  ]
  dilations = tuple(dilation for dilation, _ in runs[1:])
  counts = [count for _, count in runs]
  yield "longmixed", {"chunk_size": chunk_size, "dilations": dilations}
  yield (
    "longmixed",
    {
      "chunk_size": chunk_size,
      "dilations": dilations,
      "split": tuple(count / len(heads) for count in counts),
    },
  )


def _short_forms(
  heads: tuple[HeadPattern, ...],
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields the constructors and arguments that make exactly these heads."""
  for name, arguments in _constructions(heads):
    try:
      made = CONSTRUCTORS[name](len(heads), 1, arguments)
    except ValueError:
      continue
    if made.heads == heads:
      yield name, arguments


def _options(pattern: AttentionPattern) -> dict[str, Any]:
  return {
    "boundary": None if pattern.boundary == "drop" else pattern.boundary,
    "causality": None if pattern.causality == "position" else pattern.causality,
  }


def _runs(
  heads: tuple[HeadPattern, ...], key: Callable[[HeadPattern], Any]
) -> list[tuple[HeadPattern, ...]]:
  return [tuple(run) for _, run in itertools.groupby(heads, key)]


def _pieces(
  heads: tuple[HeadPattern, ...],
) -> Iterator[tuple[int, str, dict[str, Any]]]:
  """Yields forms and their numbers of heads that make these heads in turn."""
  short = next(_short_forms(heads), None)
  alike = _runs(heads, lambda head: dataclasses.replace(head, **_MOVED))
  if short is not None:
    yield len(heads), *short
  elif len(alike) > 1:
    for run in alike:
      yield from _pieces(run)
  else:
    for run in _runs(heads, lambda head: head):
      fields = sorted(run[0].in_use())
      yield len(run), "uniform", {x: getattr(run[0], x) for x in fields}


def _written_heads(heads: tuple[HeadPattern, ...], **options: Any) -> str:
  """Returns heads as one form, or as a `mix`."""
  counts, names, arguments = zip(*_pieces(heads), strict=True)
  if len(counts) == 1:
    return _written(names[0], **arguments[0], **options)
  parts = [_written(x, **y) for x, y in zip(names, arguments, strict=True)]
  return _written("mix", parts, heads=counts, **options)


def _written_pattern(
  pattern: AttentionPattern | Mixture, num_kv_heads: int | None
) -> str:
  if isinstance(pattern, Mixture):
    return _written(
      "mixture",
      [_written_pattern(member, num_kv_heads) for member in pattern.members],
    )
  return min(
    (
      _written_heads(order.heads, **options)
      for order, options in _orders(pattern, num_kv_heads)
    ),
    key=len,
  )


def _orders(
  pattern: AttentionPattern, num_kv_heads: int | None
) -> Iterator[tuple[AttentionPattern, dict[str, Any]]]:
  """Yields the pattern, and those that it may be interleaved from."""
  yield pattern, _options(pattern)
  if num_kv_heads is not None and pattern.num_heads % num_kv_heads == 0:
    # Interleaving by the size of a group undoes that by the number of groups.
    before = pattern.interleaved(pattern.num_heads // num_kv_heads)
    yield before, _options(pattern) | {"interleaved": True}
  for groups in range(2, pattern.num_heads):
    if groups != num_kv_heads and pattern.num_heads % groups == 0:
      before = pattern.interleaved(pattern.num_heads // groups)
      yield before, _options(pattern) | {"interleaved": groups}


def _written_rotated(
  layers: dict[int, AttentionPattern | Mixture], num_kv_heads: int | None
) -> str | None:
  """Returns the form with `rotate="layer"` that makes all layers, if any."""
  first = next(iter(layers.values()))
  if isinstance(first, Mixture) or len(set(layers.values())) < 2:
    return None
  for pattern, options in _orders(first, num_kv_heads):
    for name, arguments in _short_forms(pattern.heads):
      if "rotate" not in arguments:
        continue
      form = _written(name, **(arguments | {"rotate": _LAYER}), **options)
      made = parse(
        form,
        num_heads=first.num_heads,
        num_kv_heads=num_kv_heads or 1,
        num_layers=max(layers) + 1,
        seq_len=1,
      )
      if all(made[i] == pattern for i, pattern in layers.items()):
        return form
  return None


def text(
  patterns: AttentionPattern | Mixture | Sequence[AttentionPattern | Mixture],
  *,
  num_kv_heads: int | None = None,
) -> str:
  """Returns the string that `parse` reads as these patterns, at any length.

  All sizes are written out. Heads that no constructor makes become a `mix` of
  shorter runs of heads.

  Args:
    patterns: One pattern per layer, or one for all layers.
    num_kv_heads: Key heads of the model; with it, interleaved heads are
      recognised.

  Raises:
    ValueError: There are no layers.
  """
  if isinstance(patterns, AttentionPattern | Mixture):
    patterns = (patterns,)
  if not patterns:
    raise ValueError("text needs the pattern of at least one layer, got none.")
  everywhere = dense(patterns[0].num_heads)
  sparse = {i: p for i, p in enumerate(patterns) if p != everywhere}
  dense_layers = [i for i, p in enumerate(patterns) if p == everywhere]
  if not sparse:
    return "dense"
  every = {"dense": tuple(dense_layers) or None}
  rotated = _written_rotated(sparse, num_kv_heads)
  if rotated is not None:
    return _written("layers", [rotated], **every) if dense_layers else rotated
  written = {
    pattern: _written_pattern(pattern, num_kv_heads)
    for pattern in dict.fromkeys(patterns)
  }
  found = []
  for layers, arguments in ((dict(enumerate(patterns)), {}), (sparse, every)):
    cycle = _cycle(layers, len(patterns))
    parts = [written[pattern] for pattern in cycle]
    if len(parts) == 1 and not any(arguments.values()):
      found.append(parts[0])
    else:
      found.append(_written("layers", parts, **arguments))
  return min(found, key=len)


def _cycle(
  layers: dict[int, AttentionPattern | Mixture], num_layers: int
) -> list[AttentionPattern | Mixture]:
  """Returns the shortest list in which layer `l` has entry `l mod count`."""
  for count in range(1, num_layers + 1):
    cycle: dict[int, AttentionPattern | Mixture] = {}
    if all(
      cycle.setdefault(layer % count, pattern) == pattern
      for layer, pattern in layers.items()
    ):
      first = next(iter(layers.values()))
      return [cycle.get(i, first) for i in range(count)]
  raise AssertionError("a list of all layers gives each its own.")
