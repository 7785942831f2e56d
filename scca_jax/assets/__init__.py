"""The embedded model and book text; their README says where they are from.

`SHAPES` has the sizes of known models, without weights.
"""

import pathlib

_FOLDER = pathlib.Path(__file__).parent

# Hugging Face layout: config.json, model.safetensors, tokenizer.model.
MODEL = _FOLDER / "tiny"
# Whole books in the public domain: to tune on, and to measure on.
BOOKS_TUNE = _FOLDER / "books_tune.jsonl.xz"
BOOKS_TEST = _FOLDER / "books_test.jsonl.xz"
# Folders with a config.json only, by name.
SHAPES = {path.name: path for path in sorted((_FOLDER / "shapes").iterdir())}
