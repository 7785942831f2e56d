"""Scores of the embedded model on tasks, against transformers."""

import dataclasses

import numpy as np
import pytest

_WHY = "parity needs the extra parity"
torch = pytest.importorskip("torch", reason=_WHY)
transformers = pytest.importorskip("transformers", reason=_WHY)

from scca_jax import assets, convert, tasks, tokenizer  # noqa: E402

CONTEXT_LEN = 320


def _greedy(model, sample):
  """Returns the sample with transformers' output as its answer."""
  size = len(sample.answer_ids)
  ids = model.generate(
    torch.tensor([sample.prompt_ids]),
    max_new_tokens=size,
    min_new_tokens=size,
    do_sample=False,
  )
  return dataclasses.replace(sample, answer_ids=ids[0, -size:].tolist())


def test_no_answer_differs_from_that_of_transformers():
  words = tokenizer.load(assets.MODEL)
  ours = convert.load_model(assets.MODEL)
  theirs = transformers.LlamaForCausalLM.from_pretrained(
    assets.MODEL, dtype=torch.float32
  )
  for name in ("passkey", "niah_single_1", "copy"):
    samples = list(tasks.TASKS[name].samples(words, CONTEXT_LEN, 4, 0))
    samples[0] = _greedy(theirs, samples[0])
    right, losses = [], []
    for sample in samples:
      size = len(sample.answer_ids)
      ids = torch.tensor([sample.prompt_ids + sample.answer_ids])
      with torch.no_grad():
        logits = theirs(ids).logits[0, -size - 1 : -1]
      targets = ids[0, -size:]
      right.append(bool((logits.argmax(dim=-1) == targets).all()))
      log_probabilities = torch.log_softmax(logits, dim=-1)
      losses += (-log_probabilities[torch.arange(size), targets]).tolist()
    score = tasks.score(ours, samples, context_len=CONTEXT_LEN, batch_size=4)
    assert right[0]
    assert score.accuracy == sum(right) / len(right)
    assert score.answer_loss == pytest.approx(np.mean(losses), abs=1e-5)
