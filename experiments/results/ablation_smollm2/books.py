"""Lays out the books of the study: training, choosing, verdict.

    python -m experiments.results.ablation_smollm2.books \
      --training=train_books-00.jsonl.xz,train_books-01.jsonl.xz \
      --validation=validation_books.jsonl.xz --output_dir=books

It writes books/train, a folder whose last ten documents are those that choose
learning rates and arms, and books/verdict.jsonl, the ten that no choice sees.
"""

import json
import lzma
import pathlib
import shutil

from absl import flags

from experiments.shared import cli

# Project Gutenberg's numbers: every other book of the file, from the first on.
CHOOSING = (
  10146,
  10356,
  10008,
  10852,
  10865,
  10676,
  10111,
  10148,
  11045,
  11057,
)

_TRAINING = flags.DEFINE_list(
  "training", [], "Books to train on, .jsonl.xz, a book a line."
)
_VALIDATION = flags.DEFINE_string(
  "validation", None, "The twenty books to choose by and for the verdict."
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "books", "Folder to write.")


def main() -> None:
  """Writes the books.

  Raises:
    ValueError: A flag is missing, or a book.
    OSError: A file is missing or cannot be written.
  """
  if not _TRAINING.value or not _VALIDATION.value:
    raise ValueError("give --training=FILES and --validation=FILE.")
  with lzma.open(_VALIDATION.value, "rt", encoding="utf8") as file:
    books = {json.loads(line)["meta"]["pg_id"]: line for line in file}
  known = {int(number): line for number, line in books.items()}
  missing = [number for number in CHOOSING if number not in known]
  if missing:
    raise ValueError(f"{_VALIDATION.value} lacks the books {missing}.")
  folder = pathlib.Path(_OUTPUT_DIR.value)
  train = folder / "train"
  train.mkdir(parents=True, exist_ok=True)
  for i, source in enumerate(_TRAINING.value):
    shutil.copyfile(source, train / f"{i:02}-training.jsonl.xz")
  # Files are read by name: these come last.
  choosing = "".join(known[number] for number in CHOOSING)
  (train / "99-choosing.jsonl").write_text(choosing, encoding="utf8")
  verdict = [line for number, line in known.items() if number not in CHOOSING]
  (folder / "verdict.jsonl").write_text("".join(verdict), encoding="utf8")
  print(f"wrote {train} and {folder / 'verdict.jsonl'}: {len(verdict)} books")


if __name__ == "__main__":
  cli.run(main)
