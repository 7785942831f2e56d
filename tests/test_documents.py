"""Documents from files of text, plain and compressed."""

import bz2
import gzip
import json
import lzma
import os

import pytest
import zstandard

from scca_jax import documents

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


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".part1.JSONL"])
def test_every_kind_of_file_gives_its_texts(tmp_path, suffix, compression):
  path = tmp_path / f"books{suffix}{compression}"
  text = "\r\n".join(TEXTS)
  plain = text.encode() if suffix == ".txt" else JSON_LINES
  path.write_bytes(COMPRESS[compression](plain))
  expected = [text] if suffix == ".txt" else TEXTS
  assert list(documents.read_documents(path)) == expected


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_archives_of_several_parts_are_read_whole(tmp_path, compression):
  half = JSON_LINES.index(b"\n") - 4
  path = tmp_path / f"books.jsonl{compression}"
  compress = COMPRESS[compression]
  path.write_bytes(compress(JSON_LINES[:half]) + compress(JSON_LINES[half:]))
  assert list(documents.read_documents(path)) == TEXTS


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_an_archive_cut_anywhere_is_refused(tmp_path, compression):
  path = tmp_path / f"books.jsonl{compression}"
  whole = COMPRESS[compression](JSON_LINES)
  for size in range(len(whole)):
    path.write_bytes(whole[:size])
    with pytest.raises(
      ValueError, match=rf"books\.jsonl\{compression} is .*cut"
    ):
      list(documents.read_documents(path))


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
    list(documents.read_documents(path))


def test_a_large_archive_is_read_in_parts(tmp_path):
  text = "0123456789" * 300_000
  for compression, compress in COMPRESS.items():
    path = tmp_path / f"long.txt{compression}"
    path.write_bytes(compress(text.encode()))
    sizes = []
    assert list(documents.read_documents(path, on_read=sizes.append)) == [text]
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
  found = list(documents.read_documents(tmp_path))
  assert found == ["first", "second", "third", "fourth"]


def test_blank_lines_and_byte_order_marks_are_no_text(tmp_path):
  path = tmp_path / "books.jsonl"
  path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
  assert list(documents.read_documents(path)) == ["a", "b"]
  path = tmp_path / "book.txt"
  path.write_bytes(b"\xef\xbb\xbfa")
  assert list(documents.read_documents(path)) == ["a"]


def test_lines_may_be_documents(tmp_path):
  # Only LF and CRLF end a line: str.splitlines() knows eight more.
  lines = ["one\x0cpage", "", "two\u2028three\x85 ", "  \t", "four\rfive"]
  path = tmp_path / "lines.txt"
  for end in ("\n", "\r\n"):
    path.write_bytes(b"\xef\xbb\xbf" + end.join(lines).encode())
    found = list(documents.read_documents(path, by_line=True))
    assert found == [lines[0], lines[2], lines[4]]
  path = tmp_path / "lines.jsonl"
  path.write_text(
    json.dumps({"text": lines[2]}, ensure_ascii=False) + "\n", "utf-8"
  )
  assert list(documents.read_documents(path, by_line=True)) == [lines[2]]


def test_the_text_may_be_in_another_field(tmp_path):
  path = tmp_path / "books.jsonl"
  path.write_text('{"content": "a", "text": "b"}')
  assert list(documents.read_documents(path, text_field="content")) == ["a"]


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.txt", b"fine\n\xe4h", r"a\.txt, line 2: not UTF-8 \(byte 0xe4\)"),
    ("a.jsonl", b'{"text": ""}\n{"text": "\xff"}', r"line 2: not UTF-8"),
    ("a.jsonl", b'\n{"text": ""}\nplain', r"a\.jsonl, line 3: not JSON"),
    ("a.jsonl", b'{"text": "a"', r"line 1: not JSON"),
    ("a.jsonl", b"[" * 100_000, r"line 1: not JSON"),
    ("a.jsonl", b'{"body": "", "id": 1}', r"no field 'text' \(body, id\)"),
    ("a.jsonl", b'["text"]', r"line 1: not a JSON object"),
    ("a.jsonl", b'{"text": null}', r"the field 'text' is NoneType, not text"),
    ("a.jsonl", b'{"text": "\\ud800"}', r"line 1: .*U\+D800"),
    ("a.pdf", b"", r"a\.pdf is not of a known kind"),
    ("a.gz", b"", r"a\.gz is not of a known kind"),
  ],
)
def test_bad_text_is_refused_with_file_and_line(
  tmp_path, name, content, message
):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    list(documents.read_documents(tmp_path / name))


def test_missing_text_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
    list(documents.read_documents(tmp_path / "absent.txt"))
  with pytest.raises(FileNotFoundError, match=r"contains no file that ends in"):
    list(documents.read_documents(tmp_path))


def test_parts_of_a_document_are_its_text(tmp_path):
  # A character of four bytes crosses the border of two blocks.
  text = "a" * ((1 << 20) - 2) + "😀" + "b\n" * 700_000
  (tmp_path / "a.txt").write_text(text, encoding="utf8")
  (tmp_path / "b.jsonl").write_text('{"text": "c"}\n{"text": ""}\n')
  (tmp_path / "empty.txt").touch()
  parts = list(documents.read_parts(tmp_path))
  assert [part.ends for part in parts] == [False, False, True, True, True]
  assert max(len(part.text) for part in parts) <= 1 << 20
  assert "".join(part.text for part in parts[:3]) == text
  assert list(documents.read_documents(tmp_path)) == [text, "c", ""]


@pytest.mark.parametrize("end", [b"\xf0\x9f\x98", b"\xff"])
def test_the_line_of_a_bad_byte_is_named_far_into_a_text(tmp_path, end):
  (tmp_path / "a.txt").write_bytes(b"line\n" * 500_000 + end)
  with pytest.raises(ValueError, match=r"a\.txt, line 500001: not UTF-8"):
    list(documents.read_documents(tmp_path / "a.txt"))


def test_pipes_and_devices_are_refused_unread(tmp_path):
  os.mkfifo(tmp_path / "pipe.txt")
  (tmp_path / "zero.txt").symlink_to("/dev/zero")
  for name in ("pipe.txt", "zero.txt"):
    with pytest.raises(ValueError, match=f"{name} is a pipe or device"):
      list(documents.read_documents(tmp_path / name))
  (tmp_path / "a.txt").write_text("a")
  assert list(documents.read_documents(tmp_path)) == ["a"]


def test_a_small_archive_of_a_large_text_is_read_in_parts(tmp_path):
  # 64 MiB in 6 KiB.
  compress = zstandard.ZstdCompressor(level=19).compress
  (tmp_path / "a.txt.zst").write_bytes(compress(bytes(1 << 26)))
  sizes = [len(part.text) for part in documents.read_parts(tmp_path)]
  assert sum(sizes) == 1 << 26 and max(sizes) == 1 << 20


def test_a_line_beyond_the_limit_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(documents, "_MAX_LINE_BYTES", 20)
  (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "0123456789"}\n')
  with pytest.raises(ValueError, match=r"a\.jsonl, line 2 has more than"):
    list(documents.read_documents(tmp_path))


def test_many_fields_are_not_all_listed(tmp_path):
  record = {f"field {i}": i for i in range(5000)}
  (tmp_path / "a.jsonl").write_text(json.dumps(record))
  with pytest.raises(ValueError, match=r"'text' \(field 0, .*, \.\.\.\)") as e:
    list(documents.read_documents(tmp_path))
  assert len(str(e.value)) < 400
