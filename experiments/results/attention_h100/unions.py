r"""Times union heads on a GPU, compared with their parts and `scca_flow`.

    python -m experiments.results.attention_h100.unions --output=unions.json

8,192 tokens, 32 heads of 128, bfloat16, `mosaic`, calls in flight. Outputs and
gradients at 1,024 tokens are compared with float32 `reference` first.
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import scca_jax
from experiments.shared import cli
from scca_jax import atomic_file, patterns

_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.")
_SEQ_LEN, _CHECKED_LEN, _NUM_HEADS, _HEAD_DIM = 8192, 1024, 32, 128
_CALLS, _ROUNDS = 10, 9
# Relative to the norm of the truth; bfloat16 has 8 bits.
_TOLERANCE = 1e-2
_UNIONS = ("scca_near", "scca_near(sinks=64)")
_CHECKED = (*_UNIONS, "scca_flow(own_chunk=True, sinks=16)")
_FLOW = "scca_flow(chunk_size=2048)"


def _parse(text: str, seq_len: int) -> Any:
  return patterns.parse(
    text,
    num_heads=_NUM_HEADS,
    num_kv_heads=_NUM_HEADS,
    num_layers=1,
    seq_len=seq_len,
  )[0]


def _attend(pattern: Any, implementation: str = "mosaic") -> Any:
  return lambda query, key, value: scca_jax.attention(
    query, key, value, pattern, implementation=implementation
  )


def _with_gradients(attend: Any, d_output: jax.Array) -> Any:
  def run(*inputs):
    output, pull = jax.vjp(attend, *inputs)
    return output, *pull(d_output.astype(output.dtype))

  return jax.jit(run)


def _error(found: Any, truth: Any) -> float:
  found, truth = (np.asarray(x, np.float32) for x in (found, truth))
  return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def _check(arrays: Any) -> None:
  *inputs, d_output = (x[:, :_CHECKED_LEN] for x in arrays)
  wide = [x.astype(jnp.float32) for x in inputs]
  for text in _CHECKED:
    pattern = _parse(text, _CHECKED_LEN)
    truth = _with_gradients(_attend(pattern, "reference"), d_output)(*wide)
    for implementation in ("mosaic", "triton"):
      run = _with_gradients(_attend(pattern, implementation), d_output)
      errors = [_error(*pair) for pair in zip(run(*inputs), truth, strict=True)]
      if max(errors) > _TOLERANCE:
        raise ValueError(f"{implementation} is {max(errors)} off for {text}.")


def _clock(function: Any, inputs: Any) -> Any:
  jax.block_until_ready(function(*inputs))

  def sample():
    start = time.perf_counter()
    for _ in range(_CALLS):
      result = function(*inputs)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / _CALLS * 1e3

  return sample


def main() -> None:
  """Checks, times and prints."""
  *inputs, d_output = arrays = [
    jax.random.normal(
      rng, (1, _SEQ_LEN, _NUM_HEADS, _HEAD_DIM), dtype=jnp.bfloat16
    )
    for rng in jax.random.split(jax.random.key(0), 4)
  ]
  _check(arrays)
  contestants = {text: _parse(text, _SEQ_LEN) for text in (*_UNIONS, _FLOW)}
  for i, part in enumerate(patterns.union_parts(contestants["scca_near"])):
    contestants[f"part {i} of scca_near"] = part.pattern
  clocks = {}
  for name, pattern in contestants.items():
    attend = _attend(pattern)
    clocks[name, "forward"] = _clock(jax.jit(attend), inputs)
    clocks[name, "both"] = _clock(_with_gradients(attend, d_output), inputs)
  samples = {key: [] for key in clocks}
  for _ in range(_ROUNDS):
    for key, sample in clocks.items():
      samples[key].append(sample())
  rows = {}
  for (name, what), times in samples.items():
    median = statistics.median(times)
    # Two products per pair forward, seven with the backward pass.
    work = contestants[name].num_pairs(_SEQ_LEN) * _HEAD_DIM
    work *= 4 if what == "forward" else 14
    rows[f"{name}, {what}"] = {
      "milliseconds": median,
      "least": min(times),
      "most": max(times),
      "useful_tflops": work / median / 1e9,
    }
    print(
      f"{name:22} {what:8} {median:.3f} ({min(times):.3f} to"
      f" {max(times):.3f}) ms, {work / median / 1e9:.0f} TFLOP/s"
    )
  if _OUTPUT.value:
    atomic_file.write_json(_OUTPUT.value, rows)


if __name__ == "__main__":
  cli.run(main)
