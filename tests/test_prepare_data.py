"""The command that turns text into a token file."""

import json
import lzma

import numpy as np
import pytest

from scca_jax import tokenizer
from scca_jax.token_file import TokenFile

TEXTS = [
  "".join(f"{word} {n}\n" for n in range(60))
  for word in ("first", "second", "third")
]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  path = tmp_path_factory.mktemp("words") / "tokenizer.model"
  tokenizer.train(TEXTS, 290, path)
  return path


@pytest.fixture
def books(tmp_path):
  folder = tmp_path / "books"
  folder.mkdir()
  lines = "".join(
    json.dumps({"text": t, "body": "b"}) + "\n" for t in TEXTS[:2]
  )
  (folder / "0.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
  (folder / "1.txt").write_text(TEXTS[2])
  return folder


def _documents(path, tokenizer_path):
  token_file = TokenFile.open(path)
  assert token_file.document_ends is not None
  parts = np.split(token_file.tokens, token_file.document_ends[:-1])
  loaded = tokenizer.load(tokenizer_path)
  return [loaded.decode(part.tolist()) for part in parts]


def test_the_token_file_holds_the_books(
  run_command, capsys, tmp_path, books, words
):
  output = tmp_path / "new" / "books.bin"
  assert not run_command(
    "prepare_data",
    f"--input={books}",
    f"--tokenizer={words}",
    f"--output={output}",
  )
  assert _documents(output, words) == TEXTS
  about = TokenFile.open(output).about
  assert about["sources"] == ["0.jsonl.xz", "1.txt"]
  assert about["text_bytes"] == len("".join(TEXTS))
  printed = capsys.readouterr()
  assert f"wrote {output}: 3 documents, {about['tokens']:,} tokens" in (
    printed.out
  )
  assert not printed.err
  assert sorted(p.name for p in output.parent.iterdir()) == [
    "books.bin",
    "books.json",
  ]


def test_a_trained_tokenizer_is_kept_beside_the_tokens(
  run_command, tmp_path, books
):
  for name in ("one", "two"):
    assert not run_command(
      "prepare_data",
      f"--input={books}",
      "--train_tokenizer",
      "--vocab_size=290",
      f"--output={tmp_path / name}.bin",
    )
  assert _documents(tmp_path / "one.bin", tmp_path / "one.model") == TEXTS
  for suffix in (".bin", ".model"):
    one, two = (tmp_path / f"{name}{suffix}" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
  assert TokenFile.open(tmp_path / "one.bin").vocab_size == 290


def test_documents_get_their_ends_and_other_fields_are_read(
  run_command, tmp_path, books, words
):
  assert not run_command(
    "prepare_data",
    f"--input={books / '0.jsonl.xz'}",
    f"--tokenizer={words.parent}",
    f"--output={tmp_path / 'books.bin'}",
    "--text_field=body",
    "--add_bos",
    "--append_eos",
  )
  loaded = tokenizer.load(words)
  document = [loaded.bos_id, *loaded.encode("b"), loaded.eos_id]
  tokens = TokenFile.open(tmp_path / "books.bin").tokens
  assert tokens.tolist() == document * 2


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"input": None}, "give the text as --input=PATH"),
    ({"output": None}, "give the text as --input=PATH, and --output=FILE.bin"),
    ({"output": "books.npy"}, "--output must end in .bin, got books.npy"),
    ({"output": "other.bin"}, "other.json is another file"),
    ({"tokenizer": None}, "give either --tokenizer=FILE or --train_tokenizer"),
    ({"train_tokenizer": "true"}, "give either --tokenizer"),
    (
      {"tokenizer": "absent.model"},
      "the tokenizer absent.model does not exist",
    ),
    ({"input": "absent"}, "absent does not exist"),
    ({"input": "old.bin"}, "old.bin is not of a known kind"),
    ({"input": "empty.txt"}, "the corpus is empty"),
    ({"input": "damaged.txt"}, "damaged.txt, line 1: not UTF-8"),
    ({"text_field": "words"}, "0.jsonl.xz, line 1: no field 'words'"),
    ({"output": "empty.txt/books.bin"}, "cannot write empty.txt/books.bin"),
    (
      {"tokenizer": None, "train_tokenizer": "true", "vocab_size": "99999"},
      "too short for vocab_size=99999",
    ),
    (
      {"tokenizer": None, "train_tokenizer": "true", "sample_bytes": "0"},
      "at least one byte, got 0",
    ),
    ({"vocab_size": "many"}, "vocab_size=many"),
  ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(
  run_command, monkeypatch, capsys, tmp_path, books, words, change, message
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "old.bin").write_bytes(b"old")
  (tmp_path / "other.json").write_text('{"dtype": "float32"}')
  (tmp_path / "empty.txt").write_bytes(b"")
  (tmp_path / "damaged.txt").write_bytes(b"\xff")
  before = sorted(tmp_path.rglob("*"))
  flags = {"input": books, "tokenizer": words, "output": "old.bin", **change}
  status = run_command(
    "prepare_data",
    *(
      f"--{name}={value}" for name, value in flags.items() if value is not None
    ),
  )
  printed = capsys.readouterr()
  assert status == 2
  assert not printed.out
  assert len(printed.err.splitlines()) == 1
  assert printed.err.startswith("error: ")
  assert message in printed.err
  assert sorted(tmp_path.rglob("*")) == before
  assert (tmp_path / "old.bin").read_bytes() == b"old"
  assert (tmp_path / "other.json").read_text() == '{"dtype": "float32"}'
