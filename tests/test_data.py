"""Reading text, writing and opening token files, and the batches from them."""

import bz2
import collections
import contextlib
import dataclasses
import gzip
import hashlib
import json
import lzma
import resource

import numpy as np
import pytest
import zstandard

from scca_jax import data
from scca_jax.tokenizer import Tokenizer

TEXTS = ["One\r\nbook.\n", "  Ünïcödé \u2028 😀", "", "three"]
JSON_LINES = "".join(
  json.dumps({"text": text, "id": n}, ensure_ascii=bool(n % 2)) + "\n"
  for n, text in enumerate(TEXTS)
).encode()
COMPRESS = {
  "": bytes,
  ".gz": gzip.compress,
  ".xz": lzma.compress,
  ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


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


# Documents.


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".part1.JSONL"])
def test_every_kind_of_file_gives_its_texts(tmp_path, suffix, compression):
  path = tmp_path / f"books{suffix}{compression}"
  text = "\r\n".join(TEXTS)
  plain = text.encode() if suffix == ".txt" else JSON_LINES
  path.write_bytes(COMPRESS[compression](plain))
  expected = [text] if suffix == ".txt" else TEXTS
  assert list(data.read_documents(path)) == expected


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_archives_of_several_parts_are_read_whole(tmp_path, compression):
  half = JSON_LINES.index(b"\n") - 4
  path = tmp_path / f"books.jsonl{compression}"
  compress = COMPRESS[compression]
  path.write_bytes(compress(JSON_LINES[:half]) + compress(JSON_LINES[half:]))
  assert list(data.read_documents(path)) == TEXTS


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_an_archive_cut_anywhere_is_refused(tmp_path, compression):
  path = tmp_path / f"books.jsonl{compression}"
  whole = COMPRESS[compression](JSON_LINES)
  for size in range(len(whole)):
    path.write_bytes(whole[:size])
    with pytest.raises(
      ValueError, match=rf"books\.jsonl\{compression} is .*cut"
    ):
      list(data.read_documents(path))


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("place", [2, -14, None])
def test_a_damaged_archive_is_refused(tmp_path, compression, place):
  content = bytearray(COMPRESS[compression](JSON_LINES))
  if place is None:
    content = bz2.compress(JSON_LINES)
  else:
    content[place] ^= 0x55
  path = tmp_path / f"books.jsonl{compression}"
  path.write_bytes(content)
  with pytest.raises(
    ValueError, match=rf"books\.jsonl\{compression} is damaged"
  ):
    list(data.read_documents(path))


def test_a_large_archive_is_read_in_parts(tmp_path):
  text = "0123456789" * 300_000
  for compression, compress in COMPRESS.items():
    path = tmp_path / f"long.txt{compression}"
    path.write_bytes(compress(text.encode()))
    sizes = []
    assert list(data.read_documents(path, on_read=sizes.append)) == [text]
    assert sum(sizes) == path.stat().st_size


def test_a_folder_gives_its_files_by_name(tmp_path):
  (tmp_path / "b").mkdir()
  (tmp_path / ".cache").mkdir()
  (tmp_path / "b" / "1.txt").write_text("second")
  (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"first"))
  (tmp_path / "c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth"}')
  (tmp_path / "README.md").write_text("no document")
  (tmp_path / "d.gz").write_text("no document")
  (tmp_path / ".hidden.txt").write_text("no document")
  (tmp_path / ".cache" / "e.txt").write_text("no document")
  found = list(data.read_documents(tmp_path))
  assert found == ["first", "second", "third", "fourth"]


def test_blank_lines_and_byte_order_marks_are_no_text(tmp_path):
  path = tmp_path / "books.jsonl"
  path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
  assert list(data.read_documents(path)) == ["a", "b"]
  path = tmp_path / "book.txt"
  path.write_bytes(b"\xef\xbb\xbfa")
  assert list(data.read_documents(path)) == ["a"]


def test_the_text_may_be_in_another_field(tmp_path):
  path = tmp_path / "books.jsonl"
  path.write_text('{"content": "a", "text": "b"}')
  assert list(data.read_documents(path, text_field="content")) == ["a"]


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.txt", b"fine\n\xe4h", r"a\.txt, line 2: not UTF-8 \(byte 0xe4\)"),
    ("a.jsonl", b'{"text": ""}\n{"text": "\xff"}', r"line 2: not UTF-8"),
    ("a.jsonl", b'\n{"text": ""}\nplain', r"a\.jsonl, line 3: not JSON"),
    ("a.jsonl", b'{"text": "a"', r"line 1: not JSON"),
    ("a.jsonl", b"[" * 100_000, r"line 1: not JSON"),
    ("a.jsonl", b'{"body": "", "id": 1}', r"no field 'text' \(body, id\)"),
    ("a.jsonl", b'["text"]', r"line 1: no field 'text'"),
    ("a.jsonl", b'{"text": null}', r"the field 'text' is NoneType, not text"),
    ("a.jsonl", b'{"text": "\\ud800"}', r"line 1: .*U\+D800"),
    ("a.pdf", b"", r"a\.pdf is of no known kind"),
    ("a.gz", b"", r"a\.gz is of no known kind"),
  ],
)
def test_bad_text_is_refused_with_file_and_line(
  tmp_path, name, content, message
):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    list(data.read_documents(tmp_path / name))


def test_missing_text_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
    list(data.read_documents(tmp_path / "absent.txt"))
  with pytest.raises(FileNotFoundError, match=r"holds no file that ends in"):
    list(data.read_documents(tmp_path))


# Token files.


def test_a_token_file_gives_back_the_documents(tmp_path):
  path = tmp_path / "books.bin"
  about = data.write_token_file(
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
  token_file = data.TokenFile.open(path, vocab_size=259)
  assert len(token_file) == 5
  assert token_file.tokens.tolist() == [100, 101, 198, 172, 102]
  assert token_file.document_ends is not None
  assert token_file.document_ends.tolist() == [2, 4, 5]
  assert token_file.vocab_size == 259
  assert token_file.about == about
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
  about = data.write_token_file(["a"], words, path, append_eos=True)
  token_file = data.TokenFile.open(path, vocab_size=vocab_size)
  assert about["dtype"] == token_file.tokens.dtype.name == dtype
  assert token_file.tokens.tolist() == [100, vocab_size - 1]


def test_documents_begin_and_end_as_asked(tmp_path):
  path = tmp_path / "books.bin"
  data.write_token_file(
    ["a", "  ", "b"], Bytes(), path, add_bos=True, append_eos=True
  )
  token_file = data.TokenFile.open(path)
  assert token_file.tokens.tolist() == [1, 100, 2, 1, 101, 2]
  assert token_file.about["document_ends"] == [3, 6]


def test_many_documents_are_written_in_their_order(tmp_path, monkeypatch):
  monkeypatch.setattr(data, "_BATCH_CHARACTERS", 10)
  texts = [str(n) for n in range(100)]
  data.write_token_file(texts, Bytes(), tmp_path / "books.bin")
  token_file = data.TokenFile.open(tmp_path / "books.bin")
  assert Bytes().decode(token_file.tokens.tolist()) == "".join(texts)
  assert token_file.document_ends is not None
  assert (
    token_file.document_ends.tolist()
    == np.cumsum([len(t) for t in texts]).tolist()
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
    data.write_token_file(texts, words, tmp_path / output, **settings)
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
  monkeypatch.setattr(data, "_BATCH_CHARACTERS", 1)
  data.write_token_file(["old"], Bytes(), tmp_path / "books.bin")
  before = _contents(tmp_path)

  def texts():
    yield "new"
    raise ValueError("damaged.")

  with pytest.raises(ValueError, match="damaged"):
    data.write_token_file(texts(), Bytes(), tmp_path / "books.bin")
  assert _contents(tmp_path) == before


@pytest.mark.parametrize(
  ("size", "named"), [(10, r"books\.json"), (5000, r"books\.bin")]
)
def test_a_full_disk_leaves_the_old_token_file(tmp_path, size, named):
  data.write_token_file(["old"], Bytes(), tmp_path / "books.bin")
  before = _contents(tmp_path)
  with (
    _full_disk(100),
    pytest.raises(OSError, match=f"cannot write .*{named}: "),
  ):
    data.write_token_file(["x" * size], Bytes(), tmp_path / "books.bin")
  assert _contents(tmp_path) == before


def test_a_file_of_ids_alone_is_uint16(tmp_path):
  path = tmp_path / "test.bin"
  ids = [1, 31_999, 0, 0, 29_871] * 30
  np.array(ids, "<u2").tofile(path)
  token_file = data.TokenFile.open(path, vocab_size=32_000)
  assert token_file.tokens.tolist() == ids
  assert token_file.document_ends is None
  assert token_file.vocab_size is None
  assert token_file.about == {}


def test_a_json_by_hand_needs_the_width_only(tmp_path):
  path = tmp_path / "test.bin"
  np.array([70_000, 5], "<u4").tofile(path)
  (tmp_path / "test.json").write_text('{"dtype": "uint32", "tokenizer": "x"}')
  token_file = data.TokenFile.open(path)
  assert token_file.tokens.tolist() == [70_000, 5]
  assert token_file.vocab_size is None


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
    data.TokenFile.open(tmp_path / "test.bin", vocab_size=10)


def test_an_id_beyond_the_vocabulary_is_found_anywhere(tmp_path, monkeypatch):
  monkeypatch.setattr(data, "_BLOCK", 7)
  ids = np.zeros(50, "<u2")
  for place in (0, 6, 7, 49):
    ids[:] = 9
    ids[place] = 10
    ids.tofile(tmp_path / "test.bin")
    assert len(data.TokenFile.open(tmp_path / "test.bin", vocab_size=11)) == 50
    with pytest.raises(ValueError, match=f"id 10 at position {place},"):
      data.TokenFile.open(tmp_path / "test.bin", vocab_size=10)


def test_a_missing_token_file_is_named(tmp_path):
  for path in (tmp_path / "absent.bin", tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no token file {path}"):
      data.TokenFile.open(path)


# Batches.


def _corpus(*lengths, known=True):
  """A corpus whose ids are 1, 2, 3, …: each says where it stands."""
  ends = np.cumsum(lengths)
  return data.TokenFile(
    tokens=np.arange(1, ends[-1] + 1, dtype=np.uint16),
    document_ends=ends if known else None,
  )


def _rows(batches):
  """The windows of `batches` with anything to learn, as dicts of rows."""
  return [
    {name: value[row] for name, value in batch.items()}
    for batch in batches
    for row in range(len(batch["mask"]))
    if batch["mask"][row].any() or batch["tokens"][row].any()
  ]


def _assert_equal(first, second):
  assert first.keys() == second.keys()
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], name)


CORPUS = _corpus(5, 30, 1, 17, 64, 3, 8, 9, 40, 26)  # 203 tokens.


def test_a_batch_is_tokens_what_follows_them_and_a_mask():
  batch = next(data.batches(CORPUS, seq_len=8, batch_size=4, seed=0))
  assert {n: (v.shape, v.dtype.name) for n, v in batch.items()} == {
    "tokens": ((4, 8), "int32"),
    "targets": ((4, 8), "int32"),
    "mask": ((4, 8), "float32"),
  }
  np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)
  assert batch["mask"].all()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batches_go_on_for_ever(batch_size):
  batches = data.batches(CORPUS, seq_len=101, batch_size=batch_size, seed=0)
  assert all(next(batches)["mask"].all() for _ in range(9))


@pytest.mark.parametrize("seq_len", [1, 7, 8, 101, 202])
def test_windows_cover_the_corpus_once_an_epoch(seq_len):
  offsets = set()
  for seed in range(8):
    batches = data.batches(
      CORPUS, seq_len=seq_len, batch_size=3, seed=seed, epochs=1
    )
    rows = _rows(batches)
    assert len(rows) == batches.windows_per_epoch == 202 // seq_len
    seen = np.sort(np.concatenate([row["tokens"] for row in rows]))
    np.testing.assert_array_equal(seen, seen[0] + np.arange(len(seen)))
    offsets.add(int(seen[0]) - 1)
  # What is left over may fall at either end.
  assert offsets <= set(range(202 % seq_len + 1))
  assert len(offsets) > 1 or 202 % seq_len == 0


@pytest.mark.parametrize("packing", data.PACKINGS)
def test_every_epoch_has_every_window_in_an_order_of_its_own(packing):
  batches = data.batches(
    CORPUS, seq_len=8, batch_size=1, seed=3, packing=packing, epochs=3
  )
  starts = [tuple(row["tokens"]) for row in _rows(batches)]
  size = batches.windows_per_epoch
  epochs = [starts[n : n + size] for n in range(0, 3 * size, size)]
  assert len(starts) == 3 * size
  assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
  assert len(set(epochs[0])) == size
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_batches_run_across_epochs_and_the_last_is_filled_up():
  batches = data.batches(CORPUS, seq_len=8, batch_size=4, seed=0, epochs=3)
  all_of_them = list(batches)
  assert len(all_of_them) == 19  # 3 epochs of 25 windows are 75 windows.
  assert all(batch["mask"].all() for batch in all_of_them[:-1])
  last = all_of_them[-1]["mask"]
  assert last.shape == (4, 8)
  np.testing.assert_array_equal(last.all(axis=1), [1, 1, 1, 0])
  np.testing.assert_array_equal(last.any(axis=1), [1, 1, 1, 0])


def test_without_epochs_there_is_no_end():
  batches = data.batches(CORPUS, seq_len=8, batch_size=4, seed=0)
  for _, batch in zip(range(20), batches, strict=False):
    assert batch["mask"].all()


@pytest.mark.parametrize("packing", data.PACKINGS)
def test_the_seed_decides_the_order(packing):
  def first(seed):
    batches = data.batches(
      CORPUS, seq_len=8, batch_size=4, seed=seed, packing=packing
    )
    return [next(batches) for _ in range(10)]

  for one, other in zip(first(1), first(1), strict=True):
    _assert_equal(one, other)
  assert any(
    (one["tokens"] != other["tokens"]).any()
    for one, other in zip(first(1), first(2), strict=True)
  )


@pytest.mark.parametrize("packing", data.PACKINGS)
def test_a_run_goes_on_exactly_where_it_stopped(packing):
  def make():
    return data.batches(
      CORPUS, seq_len=8, batch_size=4, seed=5, packing=packing, epochs=2
    )

  expected = list(make())
  for stop in (0, 1, 7, len(expected)):
    batches = make()
    for _ in range(stop):
      next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    ahead = list(batches)
    assert len(ahead) == len(expected) - stop
    other = make()
    next(other)
    for resumed in (batches, other):
      resumed.set_state(state)
      assert resumed.get_state() == state
      rest = list(resumed)
      assert len(rest) == len(ahead)
      for one, another in zip(rest, expected[stop:], strict=True):
        _assert_equal(one, another)


@pytest.mark.parametrize(
  ("name", "change"),
  [
    ("seed", {"seed": 2}),
    ("seq_len", {"seq_len": 16}),
    ("batch_size", {"batch_size": 8}),
    ("packing", {"packing": "packed"}),
    ("tokens", {"token_file": _corpus(100)}),
    (
      "sha256",
      {"token_file": dataclasses.replace(CORPUS, about={"sha256": "other"})},
    ),
  ],
)
def test_a_position_in_another_order_is_refused(name, change):
  settings = {"token_file": CORPUS, "seq_len": 8, "batch_size": 4, "seed": 1}
  state = data.batches(**settings).get_state()
  with pytest.raises(ValueError, match=f"left with {name}=.*now {name}="):
    data.batches(**{**settings, **change}).set_state(state)


@pytest.mark.parametrize("state", [{}, {"next_index": 3}])
def test_a_position_that_is_none_is_refused(state):
  batches = data.batches(CORPUS, seq_len=8, batch_size=4, seed=1)
  with pytest.raises(ValueError, match="cannot go on in the data"):
    batches.set_state(state)
  whole = batches.get_state()
  for wrong in (None, "x", -1, 1.5):
    with pytest.raises(ValueError, match=f"no position {wrong!r}"):
      batches.set_state({**whole, "next_index": wrong})


@pytest.mark.parametrize("packing", data.PACKINGS)
def test_shards_divide_a_batch(packing):
  def make(**shard):
    return data.batches(
      CORPUS,
      seq_len=8,
      batch_size=6,
      seed=0,
      packing=packing,
      epochs=2,
      **shard,
    )

  whole = list(make())
  parts = [list(make(shard_index=n, num_shards=3)) for n in range(3)]
  for number, batch in enumerate(whole):
    joined = {
      name: np.concatenate([part[number][name] for part in parts])
      for name in batch
    }
    _assert_equal(joined, batch)
  assert [len(part) for part in parts] == [len(whole)] * 3
  # A position holds for any number of shards.
  resumed = make(shard_index=1, num_shards=2)
  ahead = make()
  next(ahead)
  resumed.set_state(ahead.get_state())
  _assert_equal(
    next(resumed), {name: value[3:] for name, value in whole[1].items()}
  )


def test_a_packed_window_by_hand():
  #        1 2 3 4 5 | 6 7 8 | 9 10
  batch = next(
    data.batches(
      _corpus(5, 3, 2),
      seq_len=4,
      batch_size=3,
      seed=0,
      packing="packed",
      epochs=1,
    )
  )
  order = np.argsort(batch["tokens"][:, 0])
  batch = {name: value[order].tolist() for name, value in batch.items()}
  assert batch == {
    "tokens": [[1, 2, 3, 4], [6, 7, 8, 5], [9, 10, 0, 0]],
    "targets": [[2, 3, 4, 5], [7, 8, 0, 0], [10, 0, 0, 0]],
    "mask": [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]],
    "segment_ids": [[1, 1, 1, 1], [1, 1, 1, 2], [1, 1, 0, 0]],
    "positions": [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 0, 0]],
  }


@pytest.mark.parametrize("draw", range(8))
def test_packed_windows_keep_documents_apart(draw):
  random = np.random.default_rng(draw)
  seq_len = int(random.integers(2, 20))
  lengths = random.integers(1, 50, random.integers(2, 40))
  corpus = _corpus(*lengths, seq_len)  # Never shorter than a window.
  batches = data.batches(
    corpus, seq_len=seq_len, batch_size=4, seed=draw, packing="packed", epochs=1
  )
  assert corpus.document_ends is not None
  document = np.repeat(
    np.arange(len(corpus.document_ends)),
    np.diff(corpus.document_ends, prepend=0),
  )
  tokens, targets, filled = collections.Counter(), collections.Counter(), []
  rows = _rows(batches)
  assert len(rows) == batches.windows_per_epoch
  for row in rows:
    assert all(v.shape == (seq_len,) for v in row.values())
    used = row["segment_ids"] > 0
    filled.append(used.sum())
    assert used[: filled[-1]].all()  # Padding is at the end.
    for name in ("tokens", "targets", "mask", "positions"):
      assert not row[name][~used].any()
    # Segments count from 1 without a gap.
    segments = row["segment_ids"][used]
    assert segments[0] == 1
    assert set(np.diff(segments)) <= {0, 1}
    for segment in range(1, segments[-1] + 1):
      here = row["segment_ids"] == segment
      ids = row["tokens"][here]
      np.testing.assert_array_equal(ids, ids[0] + np.arange(len(ids)))
      assert len(set(document[ids - 1])) == 1
      np.testing.assert_array_equal(row["positions"][here], np.arange(len(ids)))
    tokens.update(row["tokens"][used].tolist())
    scored = row["mask"] == 1
    assert set(row["mask"]) <= {0, 1}
    assert not row["targets"][~scored].any()
    np.testing.assert_array_equal(
      row["targets"][scored], row["tokens"][scored] + 1
    )
    targets.update(row["targets"][scored].tolist())
  firsts = {1, *(corpus.document_ends[:-1] + 1).tolist()}
  every = range(1, len(corpus) + 1)
  assert tokens == collections.Counter(every)
  assert targets == collections.Counter(n for n in every if n not in firsts)
  # Two windows no more than half full would have been one.
  assert sum(size <= seq_len / 2 for size in filled) <= 1


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"packing": "padded"}, "'padded': give one of concatenate, packed"),
    ({"seq_len": 0}, "at least 1, got 0 and 4"),
    ({"batch_size": 0}, "at least 1, got 8 and 0"),
    ({"epochs": 0}, "epochs must be at least 1.* got 0"),
    ({"seed": -1}, "seed must not be negative, got -1"),
    ({"num_shards": 3}, "batch_size=4 is no multiple of num_shards=3"),
    ({"num_shards": 0}, "num_shards=0"),
    ({"shard_index": 2, "num_shards": 2}, "shard_index=2 is outside 0 to 1"),
    ({"shard_index": -1}, "shard_index=-1 is outside"),
    ({"seq_len": 203}, "has 203 tokens, .*seq_len=203 .* take 204"),
    (
      {"token_file": _corpus(50, known=False), "packing": "packed"},
      "needs the document ends of the corpus",
    ),
  ],
)
def test_bad_settings_are_refused(change, message):
  settings = {"token_file": CORPUS, "seq_len": 8, "batch_size": 4, "seed": 0}
  with pytest.raises(ValueError, match=message):
    data.batches(**{**settings, **change})
