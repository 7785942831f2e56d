"""Makes samples once and keeps them in a file.

Models and patterns are compared on the same samples, which take longer to make
than to read. A file contains the samples of one task, length, seed and
tokenizer; its name has a hash of everything that they depend on, this code
included.
"""

import functools
import hashlib
import io
import json
import pathlib

import numpy as np
from absl import logging

from scca_jax import assets, atomic_file
from scca_jax.tasks.task import Sample, Task
from scca_jax.tokenizer import Tokenizer

# A file begins with the SHA-256 of the rest, in bytes.
_HASH_SIZE = 32


def load_or_make(
  folder: pathlib.Path,
  task: Task,
  tokenizer: Tokenizer,
  context_len: int,
  num_samples: int,
  seed: int,
) -> list[Sample]:
  """Returns `task.samples(...)`, from a file if there is one.

  A file with too few samples, or a damaged one, is replaced. If it cannot be
  written, a warning says so.

  Args:
    folder: Where the files are.
    task: The task.
    tokenizer: See `Task.samples`, also for the arguments below.
    context_len: Length of prompt and answer, in tokens.
    num_samples: How many samples.
    seed: Seed of the samples.

  Raises:
    ValueError: See `Task.samples`.
  """
  path = folder / _name(task, tokenizer, context_len, seed)
  kept = _read(path)
  if len(kept) < num_samples or num_samples < 1:
    kept = list(task.samples(tokenizer, context_len, num_samples, seed))
    try:
      atomic_file.write(path, _packed(kept))
    except OSError as error:
      # As at a full disk; making them next time costs only time.
      logging.warning("The samples are not kept for the next run: %s", error)
  return kept[:num_samples]


@functools.cache
def _sources() -> str:
  """Returns a hash of the code and the texts that samples are made from."""
  digest = hashlib.sha256()
  for path in (
    *sorted(pathlib.Path(__file__).parent.glob("*.py")),
    assets.BOOKS_TEST,
    assets.BOOKS_TUNE,
  ):
    digest.update(path.read_bytes())
  return digest.hexdigest()


def _name(task: Task, tokenizer: Tokenizer, context_len: int, seed: int) -> str:
  made_from = (
    _sources(),
    task.source,
    tokenizer.fingerprint,
    tokenizer.adds_bos,
    tokenizer.bos_id,
  )
  digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
  return f"{task.name}-{context_len}-{seed}-{digest[:16]}.samples"


def _packed(samples: list[Sample]) -> bytes:
  ids = np.asarray(
    [i for s in samples for i in (*s.prompt_ids, *s.answer_ids)], np.uint32
  )
  rest = [
    [len(s.prompt_ids), len(s.answer_ids), s.depth, s.references, s.distance]
    for s in samples
  ]
  file = io.BytesIO()
  np.savez(
    file,
    ids=ids.astype(np.uint16) if ids.max() < 1 << 16 else ids,
    rest=np.frombuffer(json.dumps(rest).encode(), np.uint8),
  )
  content = file.getvalue()
  return hashlib.sha256(content).digest() + content


def _read(path: pathlib.Path) -> list[Sample]:
  """Returns the samples in a file; none if it is missing or damaged."""
  try:
    content = path.read_bytes()
  except OSError:
    return []
  if hashlib.sha256(content[_HASH_SIZE:]).digest() != content[:_HASH_SIZE]:
    return []
  with np.load(io.BytesIO(content[_HASH_SIZE:])) as file:
    ids = file["ids"].tolist()
    rest = json.loads(file["rest"].tobytes())
  samples, start = [], 0
  for num_prompt, num_answer, depth, references, distance in rest:
    middle, end = start + num_prompt, start + num_prompt + num_answer
    samples.append(
      Sample(
        ids[start:middle], ids[middle:end], depth, tuple(references), distance
      )
    )
    start = end
  return samples
