"""Writing and opening token files."""

import contextlib
import dataclasses
import hashlib
import json
import resource

import numpy as np
import pytest

from scca_jax import token_file
from scca_jax.token_file import TokenFile, write_token_file
from scca_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Bytes(Tokenizer):
  """A tokenizer whose truth is evident: byte + 3; white space is nothing."""

  name: str = "bytes"
  fingerprint: str = "of bytes"
  vocab_size: int = 259
  bos_id: int | None = 1
  eos_id: int | None = 2
  adds_bos: bool = True

  def encode_batch(self, texts):
    return [
      [byte + 3 for byte in text.encode()] if text.strip() else []
      for text in texts
    ]

  def decode(self, ids):
    return bytes(i - 3 for i in ids).decode()


def test_a_token_file_gives_back_the_documents(tmp_path):
  path = tmp_path / "books.bin"
  about = write_token_file(
    iter(["ab", "", "  ", "é", "c"]), Bytes(), path, sources=["x/books.txt"]
  )
  expected = np.array([100, 101, 198, 172, 102], "<u2").tobytes()
  assert path.read_bytes() == expected
  assert about == json.loads((tmp_path / "books.json").read_text())
  assert about == {
    "tokenizer": {"name": "bytes", "sha256": "of bytes", "vocab_size": 259},
    "bos_id": 1,
    "eos_id": 2,
    "add_bos": False,
    "append_eos": False,
    "dtype": "uint16",
    "documents": 3,
    "tokens": 5,
    "text_bytes": 5,
    "sha256": hashlib.sha256(expected).hexdigest(),
    "sources": ["books.txt"],
    "document_ends": [2, 4, 5],
  }
  corpus = TokenFile.open(path, vocab_size=259)
  assert len(corpus) == 5
  assert corpus.tokens.tolist() == [100, 101, 198, 172, 102]
  assert corpus.document_ends is not None
  assert corpus.document_ends.tolist() == [2, 4, 5]
  assert corpus.vocab_size == 259
  assert corpus.about == about
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "books.bin",
    "books.json",
  ]


@pytest.mark.parametrize(
  ("vocab_size", "dtype"),
  [
    (259, "uint16"),
    (65_535, "uint16"),
    (65_537, "uint32"),
    (1 << 17, "uint32"),
  ],
)
def test_ids_are_as_wide_as_the_vocabulary_needs(tmp_path, vocab_size, dtype):
  words = Bytes(vocab_size=vocab_size, eos_id=vocab_size - 1)
  path = tmp_path / "books.bin"
  about = write_token_file(["a"], words, path, append_eos=True)
  corpus = TokenFile.open(path, vocab_size=vocab_size)
  assert about["dtype"] == corpus.tokens.dtype.name == dtype
  assert corpus.tokens.tolist() == [100, vocab_size - 1]


def test_documents_begin_and_end_as_asked(tmp_path):
  path = tmp_path / "books.bin"
  write_token_file(
    ["a", "  ", "b"], Bytes(), path, add_bos=True, append_eos=True
  )
  corpus = TokenFile.open(path)
  assert corpus.tokens.tolist() == [1, 100, 2, 1, 101, 2]
  assert corpus.about["document_ends"] == [3, 6]


def test_many_documents_are_written_in_their_order(tmp_path, monkeypatch):
  monkeypatch.setattr(token_file, "_BATCH_CHARACTERS", 10)
  texts = [str(n) for n in range(100)]
  write_token_file(texts, Bytes(), tmp_path / "books.bin")
  corpus = TokenFile.open(tmp_path / "books.bin")
  assert Bytes().decode(corpus.tokens.tolist()) == "".join(texts)
  assert corpus.document_ends is not None
  assert (
    corpus.document_ends.tolist() == np.cumsum([len(t) for t in texts]).tolist()
  )


@pytest.mark.parametrize(
  ("texts", "output", "settings", "message"),
  [
    ([], "a.bin", {}, "the corpus is empty"),
    (["", " "], "a.bin", {"append_eos": True}, "the corpus is empty"),
    (["a"], "a.npy", {}, r"a \.bin file, got .*a\.npy"),
    (["a"], "a.bin", {"add_bos": True}, "no BOS token"),
    (["a"], "a.bin", {"append_eos": True}, "no EOS token"),
  ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(
  tmp_path, texts, output, settings, message
):
  words = Bytes(bos_id=None, eos_id=None) if texts == ["a"] else Bytes()
  with pytest.raises(ValueError, match=message):
    write_token_file(texts, words, tmp_path / output, **settings)
  assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def _full_disk(size):
  """Lets no file grow beyond `size` bytes."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_failure_midway_leaves_the_old_token_file(tmp_path, monkeypatch):
  monkeypatch.setattr(token_file, "_BATCH_CHARACTERS", 1)
  write_token_file(["old"], Bytes(), tmp_path / "books.bin")
  before = _contents(tmp_path)

  def texts():
    yield "new"
    raise ValueError("damaged.")

  with pytest.raises(ValueError, match="damaged"):
    write_token_file(texts(), Bytes(), tmp_path / "books.bin")
  assert _contents(tmp_path) == before


@pytest.mark.parametrize(
  ("size", "named"), [(10, r"books\.json"), (5000, r"books\.bin")]
)
def test_a_full_disk_leaves_the_old_token_file(tmp_path, size, named):
  write_token_file(["old"], Bytes(), tmp_path / "books.bin")
  before = _contents(tmp_path)
  with (
    _full_disk(100),
    pytest.raises(OSError, match=f"cannot write .*{named}: "),
  ):
    write_token_file(["x" * size], Bytes(), tmp_path / "books.bin")
  assert _contents(tmp_path) == before


def test_a_file_of_ids_alone_is_uint16(tmp_path):
  path = tmp_path / "test.bin"
  ids = [1, 31_999, 0, 0, 29_871] * 30
  np.array(ids, "<u2").tofile(path)
  corpus = TokenFile.open(path, vocab_size=32_000)
  assert corpus.tokens.tolist() == ids
  assert corpus.document_ends is None
  assert corpus.vocab_size is None
  assert corpus.about == {}


def test_a_json_by_hand_needs_the_width_only(tmp_path):
  path = tmp_path / "test.bin"
  np.array([70_000, 5], "<u4").tofile(path)
  (tmp_path / "test.json").write_text('{"dtype": "uint32", "tokenizer": "x"}')
  corpus = TokenFile.open(path)
  assert corpus.tokens.tolist() == [70_000, 5]
  assert corpus.vocab_size is None


def _ids(*values, dtype="<u2"):
  return np.array(values, dtype).tobytes()


@pytest.mark.parametrize(
  ("content", "about", "message"),
  [
    (b"", None, r"test\.bin is empty"),
    (b"abc", None, r"has 3 bytes, no multiple of 2: it is cut short"),
    (b"abcdef", {"dtype": "uint32"}, r"has 6 bytes, no multiple of 4"),
    (_ids(1, 2), {"tokens": 3}, "has 2 tokens, its JSON says 3: it is cut"),
    (_ids(1, 2, 10, 3, 99), None, "the id 10 at position 2, beyond .* of 10"),
    (
      _ids(*range(1, 65), dtype="<u4"),
      None,
      "looks like uint32: say so in test",
    ),
    (_ids(1, 2), "{", r"test\.json is damaged"),
    (_ids(1, 2), b"\xff", r"test\.json is damaged"),
    (_ids(1, 2), "[]", r"test\.json describes no token file"),
    (_ids(1, 2), {"dtype": "int32"}, r"test\.json describes no token file"),
    *(
      (_ids(1, 2, 3), {"document_ends": ends}, "do not rise to 3")
      for ends in (
        [],
        [1, 2],
        [2, 2, 3],
        [0, 3],
        [2, 1, 3],
        "3",
        None,
        3,
        [[3]],
      )
    ),
  ],
)
def test_a_bad_token_file_is_refused(tmp_path, content, about, message):
  (tmp_path / "test.bin").write_bytes(content)
  if isinstance(about, dict):
    about = json.dumps({"dtype": "uint16", **about})
  if about is not None:
    about = about if isinstance(about, bytes) else about.encode()
    (tmp_path / "test.json").write_bytes(about)
  with pytest.raises(ValueError, match=message):
    TokenFile.open(tmp_path / "test.bin", vocab_size=10)


def test_an_id_beyond_the_vocabulary_is_found_anywhere(tmp_path, monkeypatch):
  monkeypatch.setattr(token_file, "_CHECKED_IDS", 7)
  ids = np.zeros(50, "<u2")
  for place in (0, 6, 7, 49):
    ids[:] = 9
    ids[place] = 10
    ids.tofile(tmp_path / "test.bin")
    assert len(TokenFile.open(tmp_path / "test.bin", vocab_size=11)) == 50
    with pytest.raises(ValueError, match=f"id 10 at position {place},"):
      TokenFile.open(tmp_path / "test.bin", vocab_size=10)


def test_a_missing_token_file_is_named(tmp_path):
  for path in (tmp_path / "absent.bin", tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no token file {path}"):
      TokenFile.open(path)
