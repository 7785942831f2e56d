"""Peers of `benchmark_load`: what PyTorch's users load weights with.

PyTorch is optional: it is imported where a peer loads.
"""

# Types are checked without PyTorch too.
# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

from experiments.timing.load_timing import Job

# By their names, as tables show them.
LABELS = {"safetensors": "safetensors, torch", "transformers": "transformers"}


def _safetensors(job: Job) -> Callable[[], Any]:
  import safetensors.torch
  import torch

  torch.zeros(1, device="cuda")

  def load() -> Any:
    tensors = [
      safetensors.torch.load_file(path, device="cuda") for path in job.files
    ]
    torch.cuda.synchronize()
    return tensors

  return load


def _transformers(job: Job) -> Callable[[], Any]:
  import torch
  import transformers

  torch.zeros(1, device="cuda")
  transformers.utils.logging.disable_progress_bar()

  def load() -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
      job.model, dtype=getattr(torch, job.dtype), device_map="cuda"
    )
    torch.cuda.synchronize()
    return model

  return load


MAKERS = {"safetensors": _safetensors, "transformers": _transformers}
