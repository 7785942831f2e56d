r"""Measures a training step: tokens per second, utilisation and peak memory.

    scca benchmark_step --random_weights \
      --config=configs/llama2_7b_8k_h200.py --patterns=scca_fixed,dense \
      --seq_lens=8192,32768 --output=step.json --plot=step.png

A step is forward, backward and update of one micro batch of the configuration.
For comparison it runs the steps of Hugging Face's transformers with PEFT, dense
and with LongLoRA's S2, with more and less checkpointing and with Liger's
kernels, if PyTorch finds a GPU (`step_peers`), up to `--max_peer_len`. To train
only adapters: --config.lora.train_embeddings=False
--config.lora.train_norms=False.

--mesh lays the step out on several devices, and may be repeated to compare
meshes; each copy of the model then has its own micro batch:

    scca benchmark_step --random_weights \
      --config=configs/llama2_7b_8k_h200.py --mesh= --mesh=data=2 \
      --mesh=fsdp=2 --peers= --output=step.json

It then prints the bytes that a device receives, read from the program, the
bytes that the pattern needs between the shards of a sequence, and the bytes
that ring attention would move.

Contestants run one after another, by length, in the order of the table, each in
its own process, so that its memory peak is its own. Times are for single steps
after `--warmup` steps: median, minimum and maximum.

* MFU is the rate of the model's operations (`flops.step_flops`, without
  recomputation in the backward pass), as a share of the rate of a matrix
  product, measured after the steps.
* The roofline is the rate of a step that does those operations, and one more
  forward pass of the layers, at the rate of a matrix product.
* Peak memory is reported by the allocator of jax or PyTorch, next to the
  compiler's expectation.
"""

import dataclasses
import functools
from typing import Any

from absl import flags

from experiments.shared import cli
from experiments.shared import flags as shared_flags
from experiments.shared.config import FinetuneConfig, to_json
from experiments.shared.config_flag import ConfigFlag
from experiments.timing import (
  flops,
  peers,
  plot,
  process,
  step_peers,
  step_timing,
)
from experiments.timing.step_timing import Case
from scca_jax import atomic_file, llama, sharding

_CONFIG = ConfigFlag(FinetuneConfig, "tiny")
_MODEL = flags.DEFINE_string(
  "model", None, "Model or folder with its config; overrides config.model."
)
_RANDOM_WEIGHTS = flags.DEFINE_boolean(
  "random_weights",
  False,
  "Draw the weights on the device and read only the model's config.json.",
)
_PATTERNS = shared_flags.define_patterns(
  "patterns",
  None,
  f"Patterns to time: {shared_flags.PATTERN_HELP}. By default the pattern of"
  " the configuration.",
)
_MESH = flags.DEFINE_multi_string(
  "mesh",
  None,
  "Devices that share the step, such as data=2,sequence=4; empty means one. By"
  " default the mesh of the configuration.",
)
_SEQ_LENS = shared_flags.define_lengths(
  "seq_lens",
  None,
  "Lengths to time, in tokens; by default the length of the configuration.",
)
_PEERS = flags.DEFINE_list(
  "peers",
  list(step_peers.LABELS),
  f"Any of {', '.join(step_peers.LABELS)}; they need PyTorch and its GPU.",
)
_MAX_PEER_LEN = flags.DEFINE_integer(
  "max_peer_len", 8192, "Longest sequence that peers are timed at."
)
_WARMUP = flags.DEFINE_integer(
  "warmup", 2, "Steps that are not timed.", lower_bound=0, upper_bound=10_000
)
_REPEATS = flags.DEFINE_integer(
  "repeats", 8, "Steps that are timed.", lower_bound=1, upper_bound=10_000
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.")
_PLOT = flags.DEFINE_string(
  "plot", None, "Plot of tokens per second against length, a .png."
)

_GIB, _MIB = 2**30, 2**20


def _measure(case: Case, peer: str | None) -> dict[str, Any]:
  """Returns the row of a contestant, or the reason why it cannot run."""
  row: dict[str, Any] = {
    "implementation": step_peers.LABELS[peer] if peer else "scca_jax",
    "pattern": step_peers.PATTERNS[peer] if peer else case.run.pattern,
    "seq_len": case.run.training.seq_len,
    "batch_size": case.run.training.batch_size,
    "mesh": "" if peer else sharding.shown(case.run.mesh),
    "is_peer": peer is not None,
    # Share of the layers that run forward twice.
    "recomputed": step_peers.checkpointed(peer, case)
    if peer
    else float(case.run.training.remat not in llama.RUN_ONCE),
  }
  try:
    if peer is None:
      return row | process.run_alone(step_timing.measure, case)
    measure = functools.partial(step_peers.measure, peer)
    # The memory is PyTorch's.
    return row | process.run_alone(measure, case, preallocate=False)
  except Exception as error:
    # From this package, these errors concern the input.
    if peer is None and isinstance(
      error, ValueError | OSError | NotImplementedError
    ):
      raise
    # Any other failure, such as too little memory, must not stop the others.
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return row | {"skipped": reason}


def _add_rates(row: dict[str, Any], case: Case, matmul: float | None) -> None:
  """Adds rates that follow from the time; `matmul` is the rate of a product."""
  num_tokens = row["batch_size"] * row["seq_len"]
  work = flops.step_flops(
    case.resolved.target, case.run.lora, row["num_pairs"], num_tokens
  )
  row["operations"] = work
  row["tokens_per_second"] = 1e3 * num_tokens / row["median_ms"]
  row["model_tflops"] = 1e-9 * work["model"] / row["median_ms"]
  if matmul is not None:
    # The rate of all the row's devices together.
    rate = matmul * row.get("num_devices", 1)
    again = work["with_remat"] - work["model"]
    operations = work["model"] + row["recomputed"] * again
    roofline = 1e12 * rate * num_tokens / operations
    row["mfu"] = row["model_tflops"] / rate
    row["roofline_tokens_per_second"] = roofline
    row["roofline_share"] = row["tokens_per_second"] / roofline


def _name(row: dict[str, Any]) -> str:
  return " ".join(
    filter(None, (row["implementation"], row["pattern"], row["mesh"]))
  )


def _add_ratios(rows: list[dict[str, Any]]) -> None:
  """Adds and prints how much faster our steps are than the others'."""
  timed = [row for row in rows if "median_ms" in row]
  for row in timed:
    if row["is_peer"]:
      continue
    row["ratios"] = {
      _name(other): (row["tokens_per_second"] / other["tokens_per_second"])
      for other in timed
      if other is not row
    }
    ratios = [f"{r:.2f}x {name}" for name, r in row["ratios"].items()]
    if ratios:
      print(
        f"{row['seq_len']:>7,}  {row['pattern']} {row['mesh']}:"
        f" {', '.join(ratios)}",
        flush=True,
      )


_COLUMNS = (
  f"{'tokens':>7}  {'step':<42} {'milliseconds':>26} {'tokens/s':>9}"
  f" {'MFU':>5} {'roofline':>8} {'peak GiB':>8} {'compiled':>8}"
  f" {'compile s':>9}"
)


def _print_row(row: dict[str, Any]) -> None:
  start = f"{row['seq_len']:>7,}  {_name(row):<42}"
  if "skipped" in row:
    print(f"{start} left out: {row['skipped']}", flush=True)
    return
  times = (
    f"{row['median_ms']:.1f} ({row['least_ms']:.1f} to {row['most_ms']:.1f})"
  )
  shares = [
    f"{row[name]:.0%}" if name in row else "-"
    for name in ("mfu", "roofline_share")
  ]
  sizes = [
    "-" if row[name] is None else f"{row[name] / _GIB:.2f}"
    for name in ("peak_bytes", "compiled_peak_bytes")
  ]
  seconds = row["compile_seconds"]
  print(
    f"{start} {times:>26} {row['tokens_per_second']:>9,.0f}"
    f" {shares[0]:>5} {shares[1]:>8} {sizes[0]:>8} {sizes[1]:>8}"
    f" {'-' if seconds is None else f'{seconds:.1f}':>9}",
    flush=True,
  )
  moved = row.get("moved_bytes")
  if moved:
    of_kind = [f"{k} {v / _MIB:,.2f}" for k, v in moved["compiled"].items()]
    print(
      f"{'':>7}  MiB of floats that a device receives:"
      f" {', '.join(of_kind) or 'none'}"
      + "".join(
        f"; {label} {moved[name] / _MIB:,.2f}"
        for name, label in (
          ("attention", "attention by the closed form"),
          ("ring_attention", "ring attention"),
        )
        if name in moved
      )
      + f"; a neighbour sends {row['link_bytes_per_second'] / 1e9:.3g} GB/s",
      flush=True,
    )


def _title(row: dict[str, Any], run: FinetuneConfig) -> str:
  versions = ", ".join(f"{k} {v}" for k, v in row["versions"].items())
  train = run.training
  trained = ["embeddings"] * run.lora.train_embeddings
  trained += ["norms"] * run.lora.train_norms
  return (
    f"{row['device']}, {versions}; {run.model or 'the embedded model'},"
    f" {train.dtype}, batch {row['batch_size']}, remat {train.remat}, LoRA rank"
    f" {run.lora.rank}" + (f" with {' and '.join(trained)}" if trained else "")
  )


def _draw(rows: list[dict[str, Any]], title: str, path: str) -> None:
  """Draws tokens per second and peak memory, one line per contestant."""
  rows = [row for row in rows if "median_ms" in row]

  def lines(name: str, unit: int) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
      points = found.setdefault(_name(row), [])
      if row[name] is not None:
        points.append((row["seq_len"], row[name] / unit))
    return found

  plot.draw(
    path,
    title,
    [
      plot.Panel(lines("tokens_per_second", 1), "tokens per second"),
      plot.Panel(lines("peak_bytes", _GIB), "peak memory in GiB"),
    ],
  )


def main() -> None:
  """Measures, prints a table and writes JSON.

  Raises:
    ValueError: A flag or setting is out of range, or a loss is not finite.
    NotImplementedError: The device lacks the requested implementation.
  """
  for path in (_OUTPUT.value, _PLOT.value):
    if path is not None:
      atomic_file.check_writable(path)
  run = _CONFIG.read()
  if run.adapter is None:
    raise ValueError(
      f"tuning={run.tuning!r} cannot be timed, only LoRA: leave it out."
    )
  if _MODEL.value is not None:
    run = dataclasses.replace(run, model=_MODEL.value)
  meshes = [run.mesh]
  if _MESH.value is not None:
    meshes = [sharding.MeshConfig.parse(text) for text in _MESH.value]
  cases = {
    seq_len: [
      step_timing.make_case(
        dataclasses.replace(run, mesh=mesh, pattern=pattern),
        seq_len,
        random_weights=_RANDOM_WEIGHTS.value,
        warmup=_WARMUP.value,
        repeats=_REPEATS.value,
      )
      for pattern in _PATTERNS.value or [run.pattern]
      for mesh in meshes
    ]
    for seq_len in _SEQ_LENS.value or (run.training.seq_len,)
  }
  chosen = peers.choose(
    _PEERS.value,
    step_peers.LABELS,
    of_torch=step_peers.LABELS,
    problem=step_peers.problem,
  )
  rows: list[dict[str, Any]] = []
  title, matmul = "", None

  def write() -> None:
    if _OUTPUT.value is not None:
      content = {
        "title": title,
        "random_weights": _RANDOM_WEIGHTS.value,
        "warmup": _WARMUP.value,
        "repeats": _REPEATS.value,
        "config": to_json(run),
        "rows": rows,
      }
      atomic_file.write_json(_OUTPUT.value, content)

  for seq_len, of_length in cases.items():
    contestants: list[tuple[Case, str | None]] = [(c, None) for c in of_length]
    if seq_len <= _MAX_PEER_LEN.value:
      contestants += [(of_length[0], peer) for peer in chosen]
    start = len(rows)
    for case, peer in contestants:
      row = _measure(case, peer)
      if "median_ms" in row:
        matmul = row["matmul_tflops"] or matmul
        _add_rates(row, case, matmul)
        if not title:
          title = _title(row, run)
          print(
            f"{title}: median (least to most) of {_REPEATS.value} steps\n"
            f"{_COLUMNS}"
          )
      _print_row(row)
      rows.append(row)
      # A long run that is stopped keeps its rows.
      write()
    _add_ratios(rows[start:])
    write()
  if _PLOT.value is not None:
    _draw(rows, title, _PLOT.value)
  for path in (_OUTPUT.value, _PLOT.value):
    if path is not None:
      print(f"wrote {path}")


if __name__ == "__main__":
  cli.run(main, config=_CONFIG)
