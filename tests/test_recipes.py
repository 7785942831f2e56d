"""The recipes' commands, on a few documents laid out like the download."""

import gzip
import json
import pathlib
import re
import shlex

import pytest
import zstandard

from scca_jax import documents, tokenizer
from scca_jax.assets import BOOKS_TEST
from scca_jax.token_file import TokenFile
from tests import model_files

RECIPES = pathlib.Path(__file__).parent.parent / "experiments" / "recipes"


def _commands(name):
  """The `prepare_data` lines of a recipe, as lists of arguments."""
  text = (RECIPES / f"{name}.md").read_text(encoding="utf8")
  found = re.findall(r"^scca prepare_data (.*)$", text, re.MULTILINE)
  assert found
  return [shlex.split(line) for line in found]


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Where the command runs; it has the two models that recipes name."""
  for name in ("llama", "llama-chat"):
    model_files.write_byte_level(tmp_path / name)
  path = tmp_path / "llama-chat" / "tokenizer_config.json"
  template = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
  )
  settings = json.loads(path.read_text()) | {"chat_template": template}
  path.write_text(json.dumps(settings))
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.fixture(scope="module")
def books():
  """Beginnings of real books, of Project Gutenberg as PG19 is."""
  return [text[:3000] for text in documents.read_documents(BOOKS_TEST)]


def _check(path, texts):
  """Compares a token file with the ids of its documents."""
  file = TokenFile.open(path)
  words = tokenizer.load("llama")
  expected = [words.encode(text) for text in texts]
  assert file.document_ends is not None
  start = 0
  for ids, end in zip(expected, file.document_ends, strict=True):
    assert file.tokens[start:end].tolist() == ids
    start = end


def test_pg19_as_files_and_as_json_lines(run_command, folder, books):
  (folder / "pg19" / "test").mkdir(parents=True)
  for i, text in enumerate(books):
    path = folder / "pg19" / "test" / f"{10000 + i}.txt"
    path.write_bytes(text.encode())
  lines = [
    json.dumps({"short_book_title": "a", "url": "b", "text": text}) + "\n"
    for text in books
  ]
  (folder / "pg19-test.jsonl").write_text("".join(lines))
  for command in _commands("pg19"):
    assert run_command("prepare_data", *command) == 0
    _check("pg19-test.bin", books)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_proof_pile(run_command, folder, books, suffix):
  (folder / "proof-pile" / "test").mkdir(parents=True)
  pack = gzip.compress if suffix == ".gz" else zstandard.compress
  for i, text in enumerate(books):
    line = json.dumps({"text": text, "meta": "{'config': 'arxiv'}"}) + "\n"
    name = f"proofpile_test_{i}.jsonl{suffix}"
    (folder / "proof-pile" / "test" / name).write_bytes(pack(line.encode()))
  (command,) = _commands("proof_pile")
  assert run_command("prepare_data", *command) == 0
  _check("proof-pile-test.bin", books)


def test_instructions_with_the_loss_on_answers(
  run_command, capsys, folder, books
):
  text = (RECIPES / "instructions.md").read_text(encoding="utf8")
  forms = re.search(r"```json\n(.*?)```", text, re.DOTALL)
  assert forms
  rows = [json.loads(line) for line in forms[1].splitlines()]
  long = {"instruction": books[0], "file": "a.txt", "output": "A sea."}
  lines = [json.dumps(row) + "\n" for row in [*rows, long]]
  (folder / "longalpaca.jsonl").write_text("".join(lines))
  (command,) = _commands("instructions")
  assert run_command("prepare_data", *command) == 0
  file = TokenFile.open("longalpaca.bin")
  words = tokenizer.load("llama-chat")
  answers = words.decode(file.tokens[file.counted(0, len(file)) == 1].tolist())
  king = "The king."
  assert answers == (
    f"{king}<|eot_id|>{king}<|end_of_text|>{king}<|eot_id|>A sea.<|eot_id|>"
  )
  assert "4 answers, 0% of the tokens" not in capsys.readouterr().out
  (folder / "longalpaca.jsonl").write_text('{"text": "a"}\n')
  assert run_command("prepare_data", *command) == 2
  assert (
    "longalpaca.jsonl, line 1: it needs messages" in capsys.readouterr().err
  )
