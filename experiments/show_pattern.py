"""Draws an attention pattern: each head's mask, their union, the reach.

python -m experiments.show_pattern --pattern=longmixed --seq_len=64
"""

import math
import os
import pathlib
from typing import Any

import numpy as np
from absl import flags

from experiments.shared import cli
from scca_jax import patterns, receptive_field

_PATTERN = flags.DEFINE_string(
  "pattern", "scca_fixed", f"One of {', '.join(patterns.NAMES)}."
)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 64, "Length, in tokens.")
_NUM_HEADS = flags.DEFINE_integer("num_heads", 8, "Query heads.")
_NUM_LAYERS = flags.DEFINE_integer(
  "num_layers", 3, "Layers to show the receptive field after."
)
_CHUNK_SIZE = flags.DEFINE_integer(
  "chunk_size", None, "Tokens; by default a quarter of the length."
)
_SHIFT = flags.DEFINE_integer("shift", None, "Tokens (scca_fixed).")
_NUM_CHUNKS = flags.DEFINE_integer("num_chunks", None, "Chunks (scca_flow).")
_WINDOW = flags.DEFINE_integer("window", None, "Slots (sliding, dna, sda).")
_DILATION = flags.DEFINE_integer(
  "dilation", None, "Tokens between keys (dilated, dna, sda)."
)
_BOUNDARY = flags.DEFINE_string("boundary", "drop", '"drop" or "local".')
_CAUSALITY = flags.DEFINE_string(
  "causality", "position", '"position", or "slot", which leaks.'
)
_ROTATE_BY_LAYER = flags.DEFINE_boolean(
  "rotate_by_layer", False, "Whether layers rotate the shifts of scca_flow."
)
_OUTPUT = flags.DEFINE_string("output", "pattern.png", "The picture.")

# A picture with more pixels than a screen shows nothing more, and the masks
# would take gigabytes.
_MAX_SEQ_LEN = 2048
_COLUMNS = 4


def _draw(
  path: pathlib.Path, title: str, panels: list[tuple[str, np.ndarray]]
) -> None:
  """Writes the masks side by side, queries downwards, keys to the right."""
  # Imported here: a bad flag should not wait for it.
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  columns = min(_COLUMNS, len(panels))
  rows = math.ceil(len(panels) / columns)
  figure, axes = pyplot.subplots(
    rows,
    columns,
    figsize=(3 * columns, 3.3 * rows + 0.5),
    squeeze=False,
    layout="constrained",
  )
  for axis in axes.flat[len(panels) :]:
    axis.axis("off")
  for axis, (name, mask) in zip(axes.flat, panels, strict=False):
    axis.imshow(mask, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(name, fontsize=9)
    axis.tick_params(labelsize=7)
  figure.suptitle(title)
  temporary = path.with_name(f".{path.name}.partial")
  try:
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
    pyplot.close(figure)


def main() -> None:
  """Draws the picture and prints what is seen.

  Raises:
    ValueError: A flag is out of range.
  """
  seq_len = _SEQ_LEN.value
  if not 1 <= seq_len <= _MAX_SEQ_LEN:
    raise ValueError(
      f"--seq_len must be 1 to {_MAX_SEQ_LEN}, got {seq_len}: the masks of"
      " longer sequences cannot be drawn."
    )
  output = pathlib.Path(_OUTPUT.value)
  if output.suffix != ".png":
    raise ValueError(f"--output must end in .png, got {output}.")
  settings: dict[str, Any] = {
    flag.name: flag.value
    for flag in (_CHUNK_SIZE, _SHIFT, _NUM_CHUNKS, _WINDOW, _DILATION)
    if flag.value is not None
  }
  if _ROTATE_BY_LAYER.value:
    settings["rotate"] = "layer"
  layers = patterns.make_schedule(
    _PATTERN.value,
    num_heads=_NUM_HEADS.value,
    num_layers=_NUM_LAYERS.value,
    seq_len=seq_len,
    boundary=_BOUNDARY.value,
    causality=_CAUSALITY.value,
    **settings,
  )
  output.parent.mkdir(parents=True, exist_ok=True)
  first = layers[0]
  causal_pairs = seq_len * (seq_len + 1) // 2
  pairs = first.num_pairs(seq_len)
  print(
    f"{_PATTERN.value}: {first.num_heads} heads, {seq_len:,} tokens, {pairs:,}"
    f" pairs, {pairs / (first.num_heads * causal_pairs):.1%} of dense"
  )
  panels = [
    (f"head {head}", mask) for head, mask in enumerate(first.visible(seq_len))
  ]
  panels.append(("heads together", receptive_field.union(first, seq_len)))
  for layer, (share, field) in enumerate(
    zip(
      receptive_field.coverage(layers, seq_len),
      receptive_field.reach(layers, seq_len),
      strict=True,
    ),
    start=1,
  ):
    panels.append((f"reach after {layer}: {share:.1%}", field))
    print(f"receptive field after {layer} layers: {share:.1%}")
  _draw(output, f"{_PATTERN.value}, {seq_len} tokens", panels)
  print(f"wrote {output}")


if __name__ == "__main__":
  cli.run(main)
