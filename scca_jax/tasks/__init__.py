"""Evaluation tasks: does a model find what it read long before?

A task is one file in this folder and one line of `TASKS`. Samples are made from
embedded text, for any tokenizer and length; nothing is downloaded.
"""

import difflib
import os

from scca_jax.tasks import niah
from scca_jax.tasks.cache import load_or_make
from scca_jax.tasks.copying import Copy
from scca_jax.tasks.passkey import Passkey
from scca_jax.tasks.question_answering import QuestionAnswering
from scca_jax.tasks.scoring import Score, generated_credits, score
from scca_jax.tasks.task import DEPTHS, Sample, Task
from scca_jax.tasks.variable_tracking import VariableTracking
from scca_jax.tasks.word_extraction import CommonWords, FrequentWords

__all__ = [
  "DEPTHS",
  "NAMES",
  "TASKS",
  "Sample",
  "Score",
  "Task",
  "generated_credits",
  "get",
  "load_or_make",
  "score",
]

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
# The names in TASKS, and the task whose texts the user has to provide.
NAMES = (*TASKS, QuestionAnswering.name)


def get(name: str, qa_data: str | os.PathLike[str] | None = None) -> Task:
  """Returns a task by its name.

  Args:
    name: One of `NAMES`.
    qa_data: File of the task "qa"; see `QuestionAnswering`.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: There is no such task, or "qa" has no file or a wrong one.
  """
  if name in TASKS:
    return TASKS[name]
  if name == QuestionAnswering.name:
    if qa_data is None:
      raise ValueError(
        "the task qa needs a file with questions like SQuAD's: --qa_data=FILE."
      )
    return QuestionAnswering(qa_data)
  nearest = difflib.get_close_matches(name, NAMES, n=1)
  advice = f"did you mean {nearest[0]}?" if nearest else "use one of"
  names = "" if nearest else f" {', '.join(NAMES)}."
  raise ValueError(f"unknown task {name!r}: {advice}{names}")
