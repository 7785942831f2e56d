"""Writing and opening token files."""

import bz2
import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import pickle
import resource
import tarfile
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import zstandard

from scca_jax import token_file
from scca_jax.token_file import TokenFile, write_token_file
from scca_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Bytes(Tokenizer):
  """A tokenizer with obvious ids: byte + 3, and none for white space."""

  name: str = "bytes"
  fingerprint: str = "of bytes"
  vocab_size: int = 259
  bos_id: int | None = 1
  eos_id: int | None = 2
  adds_bos: bool = True
  border: Any = None

  def encode_batch(self, texts, *, go_on=None):
    return [
      [byte + 3 for byte in text.encode()] if text.strip() else []
      for text in texts
    ]

  def decode(self, ids):
    return bytes(i - 3 for i in ids).decode()

  def with_special_tokens(self):
    return self


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


def test_few_documents_are_read_before_earlier_ones_are_encoded(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(token_file, "_BATCH_CHARACTERS", 10)
  encoded = []

  @dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
  class Counting(Bytes):
    def encode_batch(self, texts, *, go_on=None):
      encoded.extend(texts)
      return super().encode_batch(texts)

  def texts():
    for n in range(100):
      # Two batches of ten, one that is written and one that is read.
      assert n - len(encoded) <= 40
      yield "a"

  about = write_token_file(texts(), Counting(), tmp_path / "books.bin")
  assert about["tokens"] == len(encoded) == 100


def test_a_failure_to_encode_leaves_nothing(tmp_path):
  @dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
  class Failing(Bytes):
    def encode_batch(self, texts, *, go_on=None):
      raise ValueError("cannot be encoded.")

  with pytest.raises(ValueError, match="cannot be encoded"):
    write_token_file(["a"], Failing(), tmp_path / "books.bin")
  assert not list(tmp_path.iterdir())


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
    (
      b"abc",
      None,
      r"has 3 bytes, which is not divisible by 2: it is cut short",
    ),
    (
      b"abcdef",
      {"dtype": "uint32"},
      r"has 6 bytes, which is not divisible by 4",
    ),
    (_ids(1, 2), {"tokens": 3}, "has 2 tokens, but its JSON says 3: it is cut"),
    (_ids(1, 2, 10, 3, 99), None, "the id 10 at position 2, outside .* of 10"),
    (
      _ids(*range(1, 65), dtype="<u4"),
      None,
      "looks like uint32, not uint16: say so in test",
    ),
    (_ids(1, 2), "{", r"test\.json is damaged"),
    (_ids(1, 2), b"\xff", r"test\.json is damaged"),
    (_ids(1, 2), "[]", r"test\.json does not describe a token"),
    (_ids(1, 2), {"dtype": [1]}, r"test\.json does not describe a token"),
    (_ids(1, 2), "[" * 100_000, r"test\.json is damaged"),
    (_ids(1, 2), {"dtype": "float32"}, r"test\.json does not describe a token"),
    (
      _ids(1, 5, 2, 7, 5, 2),
      {"document_ends": [3, 6], "bos_id": 1, "add_bos": True},
      "the id 7 at position 3, where according to its JSON a document begins",
    ),
    (
      _ids(1, 5, 2, 1, 5, 7),
      {"eos_id": 2, "append_eos": True},
      "the id 7 at position 5, where according to its JSON a document ends",
    ),
    *(
      (_ids(1, 2, 3), {"document_ends": ends}, "do not increase up to 3")
      for ends in (
        [],
        [1, 2],
        [2, 2, 3],
        [0, 3],
        [2, 1, 3],
        [[3]],
        [1.0, 3.0],
        [True, 3],
        ["1", 3],
        [1, None, 3],
        [1, 1 << 70],
      )
    ),
    (_ids(1, 2), {"document_ends": "2"}, "document_ends must be a list, got"),
    (_ids(1, 2), {"tokens": "2"}, "tokens must be an integer, got '2'"),
    (_ids(1, 2), {"tokens": 2.0}, "tokens must be an integer, got 2.0"),
    (_ids(1, 2), {"add_bos": "no"}, "add_bos must be true or false, got 'no'"),
    (_ids(1, 2), {"bos_id": [1]}, r"bos_id must be an integer, got \[1\]"),
    (
      _ids(1, 2),
      {"tokenizer": {"vocab_size": "9"}},
      "the tokenizer's vocab_size must be an integer, got '9'",
    ),
    (
      _ids(1, 2),
      {"tokenizer": {"vocab_size": 2}},
      "the id 2 at position 1, outside the vocabulary of 2",
    ),
    (
      _ids(1, 2),
      {"documents": 2, "document_ends": [2]},
      "says documents=2, and gives 1 document_ends",
    ),
    (_ids(1, 2), {"sha256": "0" * 64}, "their sha256 differ"),
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
    with pytest.raises(FileNotFoundError, match=f"file {path} does not exist"):
      TokenFile.open(path)


def test_null_in_the_json_is_the_default(tmp_path):
  np.array([5, 7], "<u2").tofile(tmp_path / "test.bin")
  names = (
    *("tokenizer", "bos_id", "eos_id", "add_bos", "append_eos", "documents"),
    *("tokens", "text_bytes", "sha256", "sources", "document_ends"),
  )
  about = {"dtype": "uint16"} | dict.fromkeys(names)
  for nothing in (about, about | {"tokenizer": {"vocab_size": None}}):
    (tmp_path / "test.json").write_text(json.dumps(nothing))
    corpus = TokenFile.open(tmp_path / "test.bin", vocab_size=8)
    assert corpus.tokens.tolist() == [5, 7]
    assert corpus.document_ends is None
    assert corpus.vocab_size is None


# Ids as text has them: a few are frequent, and most of a vocabulary is rare.
RANKS = np.random.default_rng(0).zipf(1.1, 30_000)


def _text_like(vocab_size, count=6000):
  ids = RANKS[vocab_size > RANKS][:count] - 1
  assert len(ids) == count
  return ids


@pytest.mark.parametrize("vocab_size", [32_000, 50_257, 128_256])
@pytest.mark.parametrize("dtype", token_file.DTYPES)
def test_ids_of_every_width_are_read(tmp_path, dtype, vocab_size):
  size = min(vocab_size, np.iinfo(dtype).max)
  ids = _text_like(size, 3000)
  path = tmp_path / "test.bin"
  ids.astype(dtype).tofile(path)
  (tmp_path / "test.json").write_text(json.dumps({"dtype": dtype}))
  read = TokenFile.open(path, vocab_size=vocab_size).tokens
  np.testing.assert_array_equal(read, ids)


# The dtype of ids, the one in the JSON, and whether the ids alone show the
# difference or only a vocabulary does. Large ids may be right without one, and
# bytes may be anything.
_CONFUSED = [
  *(
    (stored, said, known)
    for stored in ("<i8", ">i8")
    for said in ("uint16", "uint32", "int32")
    for known in (True, False)
  ),
  *(
    (stored, "uint16", known)
    for stored in ("<u4", ">u4")
    for known in (True, False)
  ),
  *(
    (stored, said, True)
    for stored in ("<u2", "<u4", ">i8")
    for said in ("int64",)
  ),
  *(
    (stored, said, True)
    for stored in ("<u2", ">u4")
    for said in ("uint32", "int32")
  ),
  (">u2", "uint16", True),
]
_NAMES = {"u2": "uint16", "u4": "uint32", "i8": "int64"}


@pytest.mark.parametrize("vocab_size", [32_000, 50_257, 128_256])
@pytest.mark.parametrize(("stored", "said", "known"), _CONFUSED)
def test_another_width_or_byte_order_is_named(
  tmp_path, stored, said, known, vocab_size
):
  # uint16 cannot hold the ids of the largest vocabulary.
  vocab_size = min(vocab_size, 65_000) if stored[1:] == "u2" else vocab_size
  path = tmp_path / "test.bin"
  _text_like(vocab_size).astype(stored).tofile(path)
  (tmp_path / "test.json").write_text(json.dumps({"dtype": said}))
  name = _NAMES[stored[1:]]
  swapped = stored[0] == ">"
  with pytest.raises(ValueError) as error:
    TokenFile.open(path, vocab_size=vocab_size if known else None)
  line = str(error.value)
  assert f"looks like {'big-endian ' if swapped else ''}{name}" in line
  advice = f"'{stored}').astype('<{stored[1:]}')" if swapped else name
  assert advice in line and "\n" not in line


def _saved(save, *args, **kwargs):
  file = io.BytesIO()
  save(file, *args, **kwargs)
  return file.getvalue()


def _tar(content):
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w") as archive:
    about = tarfile.TarInfo("ids")
    about.size = len(content)
    archive.addfile(about, io.BytesIO(content))
  return file.getvalue()


_SOME = np.arange(1, 301, dtype=np.uint16)


@pytest.mark.parametrize(
  ("content", "said"),
  [
    (_saved(np.save, _SOME), r"is a \.npy file: .*numpy.load\(FILE\).tofile"),
    (_saved(np.savez, _SOME), "is a zip archive"),
    (_saved(np.savetxt, _SOME, "%d"), "is text: turn it into ids"),
    (pickle.dumps(_SOME), "is a pickled object"),
    (pickle.dumps({"a": 1}, 2), "is a pickled object"),
    (safetensors.numpy.save({"ids": _SOME}), "is a safetensors file"),
    (bz2.compress(_SOME.tobytes()), "is compressed with bzip2: decompress it"),
    ("Привет, мир! ".encode() * 90, "is text: turn it into ids"),
    ("It was the best of times. ".encode("utf-16") * 9, "is text"),
    (_tar(_SOME.tobytes()), "is a tar archive: unpack it"),
    (gzip.compress(_SOME.tobytes()), "is compressed with gzip: decompress it"),
    (lzma.compress(_SOME.tobytes()), "is compressed with xz: decompress it"),
    (zstandard.compress(_SOME.tobytes()), "is compressed with zstd"),
    # As llm.c's dev/data/data_common.py writes them.
    (
      np.array([20240520, 1, 300] + [0] * 253, "<i4").tobytes()
      + _SOME.tobytes(),
      r"has the header of llm.c .* numpy.fromfile\(FILE, 'uint16', offset=1024",
    ),
    (
      np.array([20240801, 7, 300] + [0] * 253, "<i4").tobytes()
      + _SOME.astype("<u4").tobytes(),
      r"has the header of llm.c .* numpy.fromfile\(FILE, 'uint32', offset=1024",
    ),
  ],
)
def test_what_is_not_bare_ids_is_named(tmp_path, content, said):
  (tmp_path / "test.bin").write_bytes(content)
  with pytest.raises(ValueError, match=said):
    TokenFile.open(tmp_path / "test.bin", vocab_size=65_536)


@pytest.mark.parametrize("said", ["uint8", "uint16", "uint32", "int64"])
@pytest.mark.parametrize("stored", ["float16", "float32", "float64"])
def test_ids_that_were_kept_as_floats_are_named(tmp_path, stored, said):
  ids = _text_like(32_000, 2000).astype(stored)
  ids.tofile(tmp_path / "test.bin")
  (tmp_path / "test.json").write_text(json.dumps({"dtype": said}))
  wide = np.dtype(stored).itemsize >= np.dtype(said).itemsize
  if (stored, said) == ("float16", "uint8"):
    # Two bytes may be anything.
    TokenFile.open(tmp_path / "test.bin", vocab_size=32_000)
    return
  with pytest.raises(
    ValueError, match=f"looks like {stored}" if wide else "outside"
  ):
    TokenFile.open(tmp_path / "test.bin", vocab_size=32_000)


def test_ids_beyond_any_vocabulary_are_named_without_one(tmp_path):
  np.array([300, 301, 302, 303], "<u2").tofile(tmp_path / "test.bin")
  (tmp_path / "test.json").write_text('{"dtype": "uint32"}')
  with pytest.raises(ValueError, match="id 19726636 at position 0"):
    TokenFile.open(tmp_path / "test.bin")


def test_bytes_may_be_those_of_a_text(tmp_path):
  text = b"It was the best of times, it was the worst of times.\n" * 9
  (tmp_path / "test.bin").write_bytes(text)
  (tmp_path / "test.json").write_text('{"dtype": "uint8"}')
  corpus = TokenFile.open(tmp_path / "test.bin", vocab_size=259)
  assert corpus.tokens.tobytes() == text


def test_document_ends_must_fit_the_tokens():
  with pytest.raises(ValueError, match="ends of the corpus do not increase up"):
    TokenFile(tokens=np.arange(5), document_ends=np.array([2, 4]))


def test_uint16_is_not_assumed_of_a_large_vocabulary(tmp_path):
  np.array([5, 7], "<u2").tofile(tmp_path / "test.bin")
  with pytest.raises(ValueError, match="too small for a vocabulary of 128,256"):
    TokenFile.open(tmp_path / "test.bin", vocab_size=128_256)
  (tmp_path / "test.json").write_text('{"dtype": "uint16"}')
  assert len(TokenFile.open(tmp_path / "test.bin", vocab_size=128_256)) == 2


def test_hash_of_ids_does_not_depend_on_their_dtype():
  ids = [7, 0, 65535, 300]
  expected = hashlib.sha256(b"".join(i.to_bytes(4, "little") for i in ids))
  for dtype in ("<u2", "<u4", "<i8", ">u4"):
    found = token_file.ids_sha256(np.array(ids, dtype))
    assert found == expected.hexdigest()


def test_the_last_documents_are_held_out():
  corpus = TokenFile(tokens=np.arange(9), document_ends=np.array([2, 5, 9]))
  train, rest = corpus.split(2)
  assert train.tokens.tolist() == [0, 1]
  assert rest.tokens.tolist() == [2, 3, 4, 5, 6, 7, 8]
  assert train.document_ends is not None and rest.document_ends is not None
  assert train.document_ends.tolist() == [2]
  assert rest.document_ends.tolist() == [3, 7]
  for count in (0, 3):
    with pytest.raises(ValueError, match=f"out {count} of the 3 .*1 to 2"):
      corpus.split(count)
  with pytest.raises(ValueError, match="requires the document ends"):
    TokenFile(tokens=np.arange(9)).split(1)
