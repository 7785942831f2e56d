"""Draws an attention pattern: each head's mask, their union and their reach.

scca show_pattern --pattern=longmixed --seq_len=64
scca show_pattern --pattern='scca_flow(rotate="layer")'
"""

import functools
import math
import pathlib

import numpy as np
from absl import flags

from experiments.shared import cli
from experiments.shared import flags as shared_flags
from scca_jax import atomic_file, patterns, receptive_field

# A picture with more pixels than a screen shows no more, and the masks would
# take gigabytes.
_MAX_SEQ_LEN, _MAX_PAIRS = 2048, 1 << 28
_MAX_HEADS = _MAX_LAYERS = 128
_COLUMNS = 4

_PATTERN = flags.DEFINE_string(
  "pattern", "scca_fixed", f"A pattern: {shared_flags.PATTERN_HELP}."
)
_SEQ_LEN = flags.DEFINE_integer(
  "seq_len", 64, "Length, in tokens.", lower_bound=1, upper_bound=_MAX_SEQ_LEN
)
_NUM_HEADS = flags.DEFINE_integer(
  "num_heads", 8, "Query heads.", lower_bound=1, upper_bound=_MAX_HEADS
)
_NUM_KV_HEADS = flags.DEFINE_integer(
  "num_kv_heads",
  None,
  "Key and value heads, for interleaved=True; by default as many as query"
  " heads.",
)
_NUM_LAYERS = flags.DEFINE_integer(
  "num_layers",
  3,
  "Number of layers to show the receptive field of.",
  lower_bound=1,
  upper_bound=_MAX_LAYERS,
)
_OUTPUT = flags.DEFINE_string("output", "pattern.png", "The picture.")


def _draw(
  path: pathlib.Path, title: str, panels: list[tuple[str, np.ndarray]]
) -> None:
  """Draws the masks side by side, queries downwards, keys to the right."""
  # Imported late, so that a bad flag does not wait for it.
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
  try:
    with atomic_file.replacing(path) as temporary:
      figure.savefig(temporary, format="png", dpi=120)
  finally:
    pyplot.close(figure)


def main() -> None:
  """Draws the picture and prints the numbers of pairs.

  Raises:
    ValueError: A flag is out of range.
  """
  seq_len = _SEQ_LEN.value
  if _NUM_HEADS.value * seq_len**2 > _MAX_PAIRS:
    raise ValueError(
      f"--num_heads={_NUM_HEADS.value} masks of {seq_len:,} tokens are too many"
      f" to draw: use at most {_MAX_PAIRS // seq_len**2} heads."
    )
  output = pathlib.Path(_OUTPUT.value)
  if output.suffix != ".png":
    raise ValueError(f"--output must end in .png, got {output}.")
  layers = patterns.parse(
    _PATTERN.value,
    num_heads=_NUM_HEADS.value,
    num_kv_heads=_NUM_KV_HEADS.value or _NUM_HEADS.value,
    num_layers=_NUM_LAYERS.value,
    seq_len=seq_len,
  )
  first = layers[0]
  causal_pairs = seq_len * (seq_len + 1) // 2
  pairs = first.num_pairs(seq_len)
  print(
    f"{_PATTERN.value}: {first.num_heads} heads, {seq_len:,} tokens, {pairs:,}"
    f" pairs, {pairs / (first.num_heads * causal_pairs):.1%} of dense"
  )
  # A head of a mixture attends by all members.
  masks = functools.reduce(
    np.logical_or, (x.visible(seq_len) for x in patterns.members(first))
  )
  panels = [(f"head {head}", mask) for head, mask in enumerate(masks)]
  panels.append(("heads together", receptive_field.union(first, seq_len)))
  for layer, field in enumerate(
    receptive_field.reach(layers, seq_len), start=1
  ):
    share = receptive_field.share(field)
    panels.append((f"reach after {layer}: {share:.1%}", field))
    print(f"receptive field after {layer} layers: {share:.1%}")
  _draw(output, f"{_PATTERN.value}, {seq_len} tokens", panels)
  print(f"wrote {output}")


if __name__ == "__main__":
  cli.run(main)
