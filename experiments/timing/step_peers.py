"""The training step of Hugging Face's transformers with PEFT, for comparison.

PyTorch is optional, and imported only when a peer is made. A peer is what its
users run: `LlamaForCausalLM` in one dtype, with whole logits and loss, LoRA by
PEFT, gradient checkpointing of each layer if the configuration recomputes
layers, fused AdamW, nothing compiled. Variants checkpoint every second layer or
none, or use Liger's kernels for norms, rotary positions, SwiGLU and the loss.
All train the same parameters as this package, but embeddings and norms in the
dtype of the model, as LongLoRA does; this package holds them in float32.
"""

# Types are checked without PyTorch too.
# pyright: reportMissingImports=false

import dataclasses
import functools
import importlib.metadata
import math
import platform
import time
from collections.abc import Callable
from typing import Any

from experiments.timing import attention_peers, clock
from experiments.timing.step_timing import Case, check_loss
from scca_jax.convert.config_file import config_to_json


@dataclasses.dataclass(frozen=True)
class _Peer:
  """How a peer runs.

  Attributes:
    label: Its name in tables.
    pattern: Pattern of its attention, the same in all heads and layers.
    checkpointed: Share of the layers that are recomputed for the backward pass,
      0, 1/2 (every second) or 1; None means all if the configuration recomputes
      layers.
    liger: Whether it uses Liger's kernels.
  """

  label: str
  pattern: str = "dense"
  checkpointed: float | None = None
  liger: bool = False


# By their names in the flag.
_PEERS = {
  "hf_sdpa": _Peer("HF + PEFT"),
  "hf_s2": _Peer("HF + PEFT LongLoRA", pattern="s2"),
  "hf_half": _Peer("HF + PEFT, half checkpointed", checkpointed=0.5),
  "hf_kept": _Peer("HF + PEFT, not checkpointed", checkpointed=0.0),
  "liger": _Peer("HF + PEFT + Liger", liger=True),
  "liger_half": _Peer(
    "HF + PEFT + Liger, half checkpointed", checkpointed=0.5, liger=True
  ),
  "liger_kept": _Peer(
    "HF + PEFT + Liger, not checkpointed", checkpointed=0.0, liger=True
  ),
}
LABELS = {name: peer.label for name, peer in _PEERS.items()}
PATTERNS = {name: peer.pattern for name, peer in _PEERS.items()}


def problem() -> str | None:
  """Returns why no peer can be timed here, or None if they can."""
  why = attention_peers.problem()
  if why is not None:
    return why
  try:
    import peft
    import transformers
  except ImportError as error:
    return f"transformers and peft are not both installed ({error})"
  del peft, transformers
  return None


def checkpointed(name: str, case: Case) -> float:
  """Returns the share of the layers that a peer computes forward twice."""
  share = _PEERS[name].checkpointed
  if share is None:
    return float(case.run.training.remat != "none")
  return share


def _chunk_size(case: Case) -> int:
  """Returns the chunk size of S2, in tokens."""
  seq_len = case.run.training.seq_len
  size = attention_peers.s2_chunk_size(case.resolved.patterns[0], seq_len)
  if seq_len % size:
    raise NotImplementedError(
      f"LongLoRA S2 needs a multiple of {size} tokens, not {seq_len}."
    )
  return size


def num_pairs(name: str, case: Case) -> int:
  """Returns the pairs that a peer sees, over sequences, heads and layers."""
  train, config = case.run.training, case.resolved.base
  length = _chunk_size(case) if PATTERNS[name] == "s2" else train.seq_len
  of_head = train.seq_len // length * length * (length + 1) // 2
  return train.batch_size * config.num_layers * config.num_heads * of_head


def _s2(
  module: Any,
  query: Any,
  key: Any,
  value: Any,
  attention_mask: Any,
  *,
  chunk_size: int,
  **settings: Any,
) -> tuple[Any, None]:
  """Returns S2 as transformers calls attention, `[batch, heads, seq, ...]`."""
  del module, attention_mask, settings
  return attention_peers.longlora_s2(
    *(x.transpose(1, 2) for x in (query, key, value)), chunk_size=chunk_size
  ), None


def _use_liger(model: Any) -> None:
  """Makes a model and its module use Liger's kernels and functions.

  Raises:
    NotImplementedError: Liger is not installed.
  """
  try:
    from liger_kernel.transformers import apply_liger_kernel_to_llama
  except ImportError as error:
    raise NotImplementedError(f"Liger cannot be imported ({error}).") from error
  apply_liger_kernel_to_llama(model=model)


def make_model(name: str, case: Case, device: str) -> Any:
  """Returns the model of a peer with random weights and new adapters.

  Args:
    name: One of `LABELS`.
    case: The case; its pattern only determines the chunk size of S2.
    device: "cuda" or, for tests, "cpu".

  Raises:
    NotImplementedError: The peer cannot serve the case.
  """
  import peft
  import torch
  import transformers

  run, train = case.run, case.run.training
  if train.quantize is not None:
    raise NotImplementedError(
      f"peers need float weights, not {train.quantize}."
    )
  if train.dtype == "float16" or train.dtype != train.param_dtype:
    raise NotImplementedError(
      "peers compute in float32 or bfloat16, with weights in the same dtype,"
      f" not in {train.dtype} with weights in {train.param_dtype}."
    )
  attention = "sdpa"
  if PATTERNS[name] == "s2":
    attention = "longlora_s2"
    transformers.AttentionInterface.register(
      attention, functools.partial(_s2, chunk_size=_chunk_size(case))
    )
  config = transformers.LlamaConfig.from_dict(
    config_to_json(case.resolved.target, train.dtype)
  )
  torch.manual_seed(train.seed)
  with torch.device(device):
    base = transformers.AutoModelForCausalLM.from_config(
      config,
      dtype=getattr(torch, train.dtype),
      attn_implementation=attention,
    )
    if _PEERS[name].liger:
      _use_liger(base)
    model = peft.get_peft_model(
      base,
      peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=run.lora.rank,
        lora_alpha=run.lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=run.lora.dropout,
        target_modules=list(run.lora.targets),
        use_rslora=run.lora.rslora,
      ),
    )
  trained = []
  if run.lora.train_embeddings:
    trained += ["embed_tokens", "lm_head"]
  if run.lora.train_norms:
    trained += ["norm"]
  for parameter_name, parameter in model.named_parameters():
    if any(part in parameter_name for part in trained):
      parameter.requires_grad_()
  share = checkpointed(name, case)
  if share:
    arguments = {"use_reentrant": False}
    # Versions of transformers 5 use one or the other name.
    if hasattr(model, "activation_checkpointing_enable"):
      model.activation_checkpointing_enable(arguments)
    else:
      model.gradient_checkpointing_enable(arguments)
    for i, layer in enumerate(base.model.layers):
      layer.gradient_checkpointing = share == 1 or i % 2 == 0
  return model.train()


def make_step(model: Any, case: Case, device: str) -> Callable[[], Any]:
  """Returns a function that does one step and returns its loss, a tensor."""
  import torch

  rule = case.run.optimizer
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(
    trained,
    lr=rule.learning_rate,
    betas=(rule.beta1, rule.beta2),
    eps=rule.epsilon,
    weight_decay=rule.weight_decay,
    fused=device == "cuda",
  )
  tokens = torch.tensor(case.tokens(), device=device).long()

  def step() -> Any:
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    if rule.clip_norm is not None:
      torch.nn.utils.clip_grad_norm_(trained, rule.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()

  return step


def measure(name: str, case: Case, device: str = "cuda") -> dict[str, Any]:
  """Returns the cost of a peer's step, like `step_timing.measure`.

  Raises:
    NotImplementedError: The peer cannot serve the case.
    ValueError: Its loss is not finite.
  """
  import peft
  import torch
  import transformers

  versions = {}
  if _PEERS[name].liger:
    versions["liger-kernel"] = importlib.metadata.version("liger-kernel")
  on_gpu = device == "cuda"

  def wait() -> None:
    if on_gpu:
      torch.cuda.synchronize()

  step = make_step(make_model(name, case, device), case, device)
  times, losses = [], []
  for i in range(case.warmup + case.repeats):
    wait()
    started = time.perf_counter()
    losses.append(step())
    wait()
    if i >= case.warmup:
      times.append(time.perf_counter() - started)
  first, last = float(losses[0]), float(losses[-1])
  check_loss(first if math.isfinite(last) else last, LABELS[name])
  return clock.spread(times) | {
    "first_loss": first,
    "compile_seconds": None,
    "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    "compiled_peak_bytes": None,
    "num_pairs": num_pairs(name, case),
    "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    "versions": {
      "python": platform.python_version(),
      "torch": torch.__version__,
      "transformers": transformers.__version__,
      "peft": peft.__version__,
      **versions,
    },
    "matmul_tflops": None,
  }
