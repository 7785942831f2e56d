"""Files are there whole or not at all, and failures name them."""

import json

import pytest

from scca_jax import atomic_file


def test_a_file_appears_only_at_the_end(tmp_path):
  path = tmp_path / "new" / "file.bin"
  with atomic_file.AtomicFile(path) as file:
    file.write(b"one, ")
    file.write(memoryview(b"two"))
    assert not path.exists()
  assert path.read_bytes() == b"one, two"
  assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_file(tmp_path):
  path = tmp_path / "file.bin"
  atomic_file.write(path, b"old")
  with pytest.raises(KeyboardInterrupt), atomic_file.AtomicFile(path) as file:
    file.write(b"new")
    raise KeyboardInterrupt
  assert path.read_bytes() == b"old"
  assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_others_open_appears_only_at_the_end(tmp_path):
  path = tmp_path / "new" / "file.bin"
  with atomic_file.replacing(path) as temporary:
    temporary.write_bytes(b"one")
    assert not path.exists() and temporary.suffix == path.suffix
  assert path.read_bytes() == b"one"
  with pytest.raises(KeyboardInterrupt), atomic_file.replacing(path) as new:
    new.write_bytes(b"two")
    raise KeyboardInterrupt
  assert path.read_bytes() == b"one"
  assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("was_there", [False, True])
def test_a_folder_is_filled_at_the_end_or_not_at_all(tmp_path, was_there):
  path = tmp_path / "new" / "folder"
  if was_there:
    path.mkdir(parents=True)
  with pytest.raises(KeyboardInterrupt), atomic_file.new_folder(path) as folder:
    (folder / "one").write_text("1")
    raise KeyboardInterrupt
  assert path.exists() == was_there
  assert not was_there or not list(path.iterdir())
  with atomic_file.new_folder(path) as folder:
    (folder / "one").write_text("1")
    (folder / "in").mkdir()
    (folder / "in" / "two").write_text("2")
  assert sorted(p.name for p in path.rglob("*")) == ["in", "one", "two"]
  (tmp_path / "file").write_text("")
  with (
    pytest.raises(OSError, match="cannot write .*file/folder"),
    atomic_file.new_folder(tmp_path / "file" / "folder"),
  ):
    pass


def test_places_that_cannot_be_written_are_named(tmp_path):
  (tmp_path / "file").write_bytes(b"")
  (tmp_path / "folder").mkdir()
  for path in (tmp_path / "file" / "inside.bin", tmp_path / "folder"):
    with pytest.raises(OSError, match=rf"cannot write {path}: "):
      atomic_file.write(path, b"new")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_json_is_written_whole_or_not_at_all(tmp_path):
  file = tmp_path / "made" / "out.json"
  atomic_file.write_json(file, {"a": [1, 2.5]})
  assert json.loads(file.read_text()) == {"a": [1, 2.5]}
  with pytest.raises(TypeError):
    atomic_file.write_json(file, {"a": object()})
  assert json.loads(file.read_text()) == {"a": [1, 2.5]}
  assert [f.name for f in file.parent.iterdir()] == ["out.json"]


def test_json_has_null_where_a_number_is_not_finite(tmp_path):
  value = {"a": [1.5, float("nan")], "b": (float("inf"), {"c": 2})}
  atomic_file.write_json(tmp_path / "x.json", value)
  text = (tmp_path / "x.json").read_text()
  assert json.loads(text) == {"a": [1.5, None], "b": [None, {"c": 2}]}
