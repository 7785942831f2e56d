r"""Says where a step on several GPUs spends the time that one GPU does not.

    python -m experiments.results.scaling.profile --part=sequence \
      --output=profile_sequence.json
    python -m experiments.results.scaling.profile --part=fsdp \
      --output=profile_fsdp.json

The shape is LLaMA2-7B's with fewer layers, `remat=layer`, random weights. Each
variant is timed, and then two of its steps are recorded with jax's profiler:
the table has milliseconds per step and GPU by kind of kernel, and how long no
kernel ran. Variants of the part `sequence` have equally many tokens per GPU;
with `local` nothing is received. In the part `fsdp` there are options of XLA
that may hide the gathers. The JSON has every kernel by name.

With `--chunk_size`, `--seq_len` and `--config.model` it rehearses on CPUs,
where there are no kernels to record.
"""

import dataclasses
import json
import pathlib
import re
import tempfile
import time
from typing import Any

import jax
from absl import flags

from experiments.shared import cli, resolve
from experiments.shared.config import FinetuneConfig
from experiments.shared.config_flag import ConfigFlag
from experiments.timing import clock, step_timing
from scca_jax import atomic_file, sharding, training

_CONFIG = ConfigFlag(FinetuneConfig, "llama2_7b_8k_h200")
_PART = flags.DEFINE_enum(
  "part", "sequence", ["sequence", "fsdp"], "Which variants to measure."
)
_NUM_LAYERS = flags.DEFINE_integer("num_layers", 8, "Layers of the model.")
_SEQ_LEN = flags.DEFINE_integer(
  "seq_len", None, "Tokens per GPU; 32,768, and 8,192 for fsdp."
)
_CHUNK_SIZE = flags.DEFINE_integer("chunk_size", 2048, "Chunks, in tokens.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed steps.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "Where to write JSON.")

_TRACED = 2
# By the first expression that a kernel's name contains.
_KINDS = {
  "link": "nccl|AllReduce|AllGather|SendRecv",
  "products": "gemm|cutlass|nvjet|xmma|cublas|splitk",
  "attention": "mosaic|mpmd|scca|attention|kernel_",
  "copies": "[Mm]em(cpy|set)",
  "other": "",
}


@dataclasses.dataclass(frozen=True)
class _Variant:
  """A step to measure.

  Attributes:
    pattern: Its pattern.
    mesh: Its mesh, as a flag.
    seq_len: Tokens of a sequence.
    options: XLA's options beside those of every step.
  """

  pattern: str
  mesh: str
  seq_len: int
  options: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def name(self) -> str:
    """What the table calls it."""
    pattern = self.pattern.partition("(")[0]
    options = [
      f"{k.removeprefix('xla_gpu_')}={v}" for k, v in self.options.items()
    ]
    return " ".join(
      [pattern, self.mesh or "one", f"{self.seq_len:,}", *options]
    )


def _variants() -> list[_Variant]:
  size = f"(chunk_size={_CHUNK_SIZE.value})"
  local, fixed, flow = (
    f"{x}{size}" for x in ("local", "scca_fixed", "scca_flow")
  )
  if _PART.value == "sequence":
    n = _SEQ_LEN.value or 32_768
    return [
      _Variant(fixed, "", n),
      _Variant(fixed, "sequence=2", 2 * n),
      _Variant(fixed, "data=2", n),
      _Variant(local, "sequence=2", 2 * n),
      _Variant(local, "", n),
      _Variant(flow, "sequence=2", 2 * n),
      # Half of this is what two GPUs should take.
      _Variant(flow, "", 2 * n),
    ]
  n = _SEQ_LEN.value or 8_192
  every = [
    {},
    {"xla_gpu_enable_latency_hiding_scheduler": True},
    {
      "xla_gpu_enable_latency_hiding_scheduler": True,
      "xla_gpu_enable_while_loop_double_buffering": True,
    },
    # Each matrix by itself, as XLA does unasked.
    {"xla_gpu_all_gather_combine_threshold_bytes": 1},
  ]
  return [
    _Variant(fixed, "", n),
    _Variant(fixed, "data=2", n),
    *(_Variant(fixed, "fsdp=2", n, options) for options in every),
  ]


def _model() -> str:
  """Returns a folder with the model's config, with fewer layers."""
  source = resolve.model_path(_CONFIG.read().model) / "config.json"
  config = json.loads(source.read_text("utf8"))
  config["num_hidden_layers"] = _NUM_LAYERS.value
  folder = pathlib.Path(tempfile.mkdtemp())
  atomic_file.write_json(folder / "config.json", config)
  return str(folder)


def _kernels(folder: str) -> dict[str, dict[str, float]]:
  """Returns milliseconds per step by device and kernel, and those idle."""
  found: dict[str, dict[str, float]] = {}
  for path in pathlib.Path(folder).rglob("*.xplane.pb"):
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
      if not plane.name.startswith("/device:GPU"):
        continue
      times: dict[str, float] = {}
      spans = []
      for line in plane.lines:
        if "Stream" not in line.name:
          continue  # Sums of the streams.
        for event in line.events:
          begin, length = event.start_ns, event.duration_ns
          times[event.name] = times.get(event.name, 0.0) + length
          spans.append((begin, begin + length))
      if not spans:
        continue
      spans.sort()
      idle, end = 0.0, spans[0][0]
      for begin, last in spans:
        idle += max(0.0, begin - end)
        end = max(end, last)
      times["(idle)"] = idle
      times["(from first to last)"] = end - spans[0][0]
      found[plane.name] = {k: v / 1e6 / _TRACED for k, v in times.items()}
  return found


def _by_kind(kernels: dict[str, float]) -> dict[str, float]:
  sums = dict.fromkeys(_KINDS, 0.0)
  for name, milliseconds in kernels.items():
    if not name.startswith("("):
      kind = next(k for k, v in _KINDS.items() if re.search(v, name))
      sums[kind] += milliseconds
  return sums


def _measure(variant: _Variant, model: str) -> dict[str, Any]:
  mesh = sharding.MeshConfig.parse(variant.mesh)
  run = dataclasses.replace(
    _CONFIG.read(), model=model, mesh=mesh, pattern=variant.pattern
  )
  run = dataclasses.replace(
    run,
    training=dataclasses.replace(
      run.training, remat="layer", unroll_layers=False
    ),
  )
  case = step_timing.make_case(
    run,
    variant.seq_len,
    random_weights=True,
    warmup=1,
    repeats=_REPEATS.value,
  )
  prepared = step_timing.prepare(case)
  state, frozen, batch = prepared.state, prepared.frozen, prepared.batch
  compiled = prepared.step.lower(state, frozen, batch).compile(
    compiler_options=(training.compiler_options() | variant.options)
    if variant.options
    else None
  )
  del prepared
  times = []
  for i in range(1 + _REPEATS.value):
    began = time.perf_counter()
    state, metrics = jax.block_until_ready(compiled(state, frozen, batch))
    if i:
      times.append(time.perf_counter() - began)
  step_timing.check_loss(float(metrics["loss"]), variant.name)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(_TRACED):
        state, metrics = compiled(state, frozen, batch)
      jax.block_until_ready(metrics)
    kernels = _kernels(folder)
  return clock.spread(times) | {
    "variant": dataclasses.asdict(variant),
    "kernels": kernels,
    "by_kind": {gpu: _by_kind(k) for gpu, k in kernels.items()},
  }


def main() -> None:
  """Prints a row for each variant as it ends, and writes JSON."""
  model = _model()
  rows = []
  print(
    f"{jax.devices()[0].device_kind}, jax {jax.__version__},"
    f" {_NUM_LAYERS.value} layers; milliseconds per step"
  )
  print(
    f"{'step':<44} {'median (least to most)':>26} "
    + " ".join(f"{x:>9}" for x in (*_KINDS, "idle", "whole"))
  )
  for variant in _variants():
    began = time.monotonic()
    try:
      row = _measure(variant, model)
    except Exception as error:  # The others are worth having.
      print(f"{variant.name:<44} {' '.join(str(error).split())[:200]}")
      continue
    rows.append(row)
    times = (
      f"{row['median_ms']:.1f} ({row['least_ms']:.1f}-{row['most_ms']:.1f})"
    )
    print(
      f"{variant.name:<44} {times:>26}"
      f"  ({time.monotonic() - began:.0f} s in all)",
      flush=True,
    )
    for gpu, kinds in row["by_kind"].items():
      of_gpu = row["kernels"][gpu]
      values = [
        *kinds.values(),
        of_gpu["(idle)"],
        of_gpu["(from first to last)"],
      ]
      print(f"{gpu:>71} " + " ".join(f"{x:>9.1f}" for x in values), flush=True)
    if _OUTPUT.value:
      atomic_file.write_json(_OUTPUT.value, {"rows": rows})
  for row in rows[:2]:
    for gpu, kernels in list(row["kernels"].items())[:1]:
      print(f"{row['variant']['mesh'] or 'one'}, {gpu}: longest kernels")
      longest = sorted(kernels.items(), key=lambda item: -item[1])[:18]
      for name, milliseconds in longest:
        print(f"  {milliseconds:9.2f}  {name[:100]}")


if __name__ == "__main__":
  cli.run(main, config=_CONFIG)
