"""Measures the perplexity of a GGUF model in transformers, to compare.

python -m tests.parity.real_weights --model=FILE.gguf --tokens=FILE.bin \
  --context_lens=1024,2048 --num_windows=8 --output=FILE.json

The windows follow the longlora protocol (see `experiments.evaluate`),
implemented independently here.
"""

import argparse
import json
import math
import pathlib

import numpy as np
import torch
import transformers


def load(path):
  """Returns the model of a GGUF file, dequantised by transformers."""
  path = pathlib.Path(path)
  return transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  ).eval()


def starts(num_tokens, context_len, num_windows):
  """Returns where `num_windows` evenly spaced windows begin.

  Windows begin every 256 tokens; the last is left out, as in LongLoRA; of each
  of `num_windows` equal parts the middle one is taken.
  """
  every = list(range(0, num_tokens - context_len, 256))[:-1]
  count = min(num_windows, len(every))
  return [every[(2 * i + 1) * len(every) // (2 * count)] for i in range(count)]


def perplexity(model, tokens, context_len, num_windows):
  """Returns exp of the mean over windows of their mean loss."""
  losses = []
  for start in starts(len(tokens), context_len, num_windows):
    window = torch.tensor(tokens[start : start + context_len].astype(np.int64))[
      None
    ]
    with torch.no_grad():
      logits = model(window).logits[0, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits, window[0, 1:])
    losses.append(float(loss))
  return math.exp(sum(losses) / len(losses))


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", required=True)
  parser.add_argument("--tokens", required=True)
  parser.add_argument("--context_lens", required=True)
  parser.add_argument("--num_windows", type=int, default=8)
  parser.add_argument("--output", required=True)
  args = parser.parse_args()
  model = load(args.model)
  about = json.loads(pathlib.Path(args.tokens).with_suffix(".json").read_text())
  tokens = np.fromfile(args.tokens, about["dtype"])
  found = {
    n: perplexity(model, tokens, int(n), args.num_windows)
    for n in args.context_lens.split(",")
  }
  result = {
    "perplexity": found,
    "num_windows": args.num_windows,
    "torch": torch.__version__,
    "transformers": transformers.__version__,
  }
  pathlib.Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
  print(json.dumps(result, indent=2))


if __name__ == "__main__":
  main()
