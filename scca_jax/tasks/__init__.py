"""Evaluation tasks: does a model find what it read long before?

A task is one file in this folder and one line of `TASKS`. Samples are made from
embedded text, for any tokenizer and length; nothing is downloaded.
"""

import difflib

from scca_jax.tasks import niah
from scca_jax.tasks.copying import Copy
from scca_jax.tasks.passkey import Passkey
from scca_jax.tasks.scoring import Score, score
from scca_jax.tasks.task import DEPTHS, Sample, Task
from scca_jax.tasks.variable_tracking import VariableTracking
from scca_jax.tasks.word_extraction import CommonWords, FrequentWords

__all__ = ["DEPTHS", "TASKS", "Sample", "Score", "Task", "get", "score"]

TASKS: dict[str, Task] = {
  task.name: task
  for task in (
    Passkey(),
    *niah.VARIANTS,
    VariableTracking(),
    CommonWords(),
    FrequentWords(),
    Copy(),
  )
}


def get(name: str) -> Task:
  """Returns a task by its name.

  Raises:
    ValueError: There is no such task.
  """
  if name in TASKS:
    return TASKS[name]
  nearest = difflib.get_close_matches(name, TASKS, n=1)
  advice = f"did you mean {nearest[0]}?" if nearest else "use one of"
  names = "" if nearest else f" {', '.join(TASKS)}."
  raise ValueError(f"unknown task {name!r}: {advice}{names}")
