"""Loads weights as PyTorch's users do, for comparison in `load`.

PyTorch is optional, and imported only when a peer loads.
"""

# Types are checked without PyTorch too.
# pyright: reportMissingImports=false

import pathlib
from collections.abc import Callable, Sequence
from typing import Any


def _safetensors(
  files: Sequence[pathlib.Path], dtype: str
) -> Callable[[], Any]:
  import safetensors.torch
  import torch

  del dtype  # That of the files.

  torch.zeros(1, device="cuda")

  def load() -> Any:
    tensors = [
      safetensors.torch.load_file(path, device="cuda") for path in files
    ]
    torch.cuda.synchronize()
    return tensors

  return load


def _transformers(
  files: Sequence[pathlib.Path], dtype: str
) -> Callable[[], Any]:
  import torch
  import transformers

  torch.zeros(1, device="cuda")
  transformers.utils.logging.disable_progress_bar()

  def load() -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
      files[0].parent, dtype=getattr(torch, dtype), device_map="cuda"
    )
    torch.cuda.synchronize()
    return model

  return load


LOADERS = {"safetensors, torch": _safetensors, "transformers": _transformers}
