"""Answers of a GGUF model to tasks, here and in transformers.

python -m tests.parity.task_answers --model=FILE.gguf \
  --tasks=passkey,niah_single_1,copy --context_lens=1024,2048 \
  --num_samples=50 --output=FILE.json

Both read the same prompts and right answers in float32, on a GPU if there is
one. The script counts the answers and tokens that only one of them ranks first.
"""

import argparse
import json
import os
import pathlib

# PyTorch needs some of the GPU's memory, and float32 should mean float32.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from scca_jax import convert, tasks, tokenizer
from scca_jax.tasks import scoring
from tests.parity import real_weights


def theirs(model, sample):
  """Returns loss and correctness of each token of an answer."""
  size = len(sample.answer_ids)
  ids = torch.tensor(
    [sample.prompt_ids + sample.answer_ids], device=model.device
  )
  with torch.no_grad():
    logits = model(ids, logits_to_keep=size + 1).logits[0, :-1].float()
  targets = ids[0, -size:]
  loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
  return loss.cpu().numpy(), (logits.argmax(dim=-1) == targets).cpu().numpy()


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", required=True)
  parser.add_argument("--tasks", default="passkey,niah_single_1,copy")
  parser.add_argument("--context_lens", required=True)
  parser.add_argument("--num_samples", type=int, default=50)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--batch_tokens", type=int, default=8192)
  parser.add_argument("--output", required=True)
  args = parser.parse_args()
  words = tokenizer.load(args.model)
  model = real_weights.load(args.model)
  if torch.cuda.is_available():
    model = model.cuda()
  ours = convert.load_model(
    args.model, dtype=jnp.float32, param_dtype=jnp.float32
  )
  rows = []
  for name in args.tasks.split(","):
    for context_len in map(int, args.context_lens.split(",")):
      samples = list(
        tasks.get(name).samples(words, context_len, args.num_samples, args.seed)
      )
      found = scoring.answers(
        ours,
        samples,
        context_len=context_len,
        batch_size=max(1, args.batch_tokens // context_len),
      )
      answers = tokens = 0
      difference = 0.0
      right = {"scca_jax": 0, "transformers": 0}
      for sample, answer in zip(samples, found, strict=True):
        loss, hits = theirs(model, sample)
        answers += bool(hits.all()) != answer.right
        tokens += int((hits != answer.hits).sum())
        difference = max(difference, np.abs(loss - answer.loss).max())
        right["scca_jax"] += answer.right
        right["transformers"] += bool(hits.all())
      rows.append(
        {
          "task": name,
          "context_len": context_len,
          "num_samples": len(samples),
          "right": right,
          "answers_that_differ": answers,
          "tokens_that_differ": tokens,
          "largest_loss_difference": float(difference),
          "prompts_sha256": scoring.prompts_sha256(samples),
        }
      )
      print(rows[-1], flush=True)
  result = {
    "answers": rows,
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "torch": torch.__version__,
    "transformers": transformers.__version__,
  }
  pathlib.Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  main()
