"""Files are complete or absent, and failures name them."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

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


_WRITE = """
import sys, time
sys.path.insert(0, sys.argv[1])
sys.modules["scca_jax"] = type(sys)("scca_jax")
sys.modules["scca_jax"].__path__ = [sys.argv[1]]
from scca_jax import atomic_file
with atomic_file.AtomicFile(sys.argv[2] + "/file") as file, \\
     atomic_file.new_folder(sys.argv[2] + "/folder") as folder:
  (folder / "one").write_text("1")
  print("begun", flush=True)
  time.sleep(60)
"""


def test_partial_files_of_the_dead_are_removed_and_of_the_living_kept(tmp_path):
  package = pathlib.Path(atomic_file.__file__).parent
  with subprocess.Popen(
    [sys.executable, "-c", _WRITE, package, tmp_path],
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout.readline() == "begun\n"
    partial = sorted(tmp_path.iterdir())
    assert len(partial) == 2
    for name in ("file", "folder"):
      atomic_file.write(tmp_path / name, b"mine")
      (tmp_path / name).unlink()
    assert sorted(tmp_path.iterdir()) == partial
    process.kill()
  # Leftovers of other files are left alone.
  (tmp_path / "below" / ".other.x.partial").mkdir(parents=True)
  atomic_file.write(tmp_path / "file", b"mine")
  with atomic_file.new_folder(tmp_path / "folder"):
    pass
  names = sorted(p.name for p in tmp_path.rglob("*"))
  assert names == [".other.x.partial", "below", "file", "folder"]
  atomic_file.remove_dead(tmp_path)
  assert not list((tmp_path / "below").iterdir())


def test_nobody_else_can_put_a_link_where_a_file_is_written(tmp_path):
  with atomic_file.AtomicFile(tmp_path / "file") as file:
    file.write(b"1")
    (partial,) = tmp_path.iterdir()
    assert partial.stat().st_mode & 0o777 == 0o700
    name = partial.name
  with atomic_file.AtomicFile(tmp_path / "file"):
    assert name not in [p.name for p in tmp_path.iterdir()]
  mask = os.umask(0o022)
  os.umask(mask)
  assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


def test_folder_with_the_rest_of_a_killed_attempt_is_free(tmp_path):
  path = tmp_path / "folder"
  assert atomic_file.is_free(path)
  path.mkdir()
  with pytest.raises(KeyboardInterrupt), atomic_file.new_folder(path):
    (rest,) = path.iterdir()
    kept = tmp_path / "kept"
    shutil.copytree(rest, kept)
    raise KeyboardInterrupt
  kept.rename(rest)
  assert atomic_file.is_free(path)
  assert not list(path.iterdir())
  (path / "mine").touch()
  assert not atomic_file.is_free(path)
  assert not atomic_file.is_free(path / "mine")


def test_places_that_cannot_be_written_are_named(tmp_path):
  (tmp_path / "file").write_bytes(b"")
  (tmp_path / "folder").mkdir()
  for path in (tmp_path / "file" / "inside.bin", tmp_path / "folder"):
    with pytest.raises(OSError, match=rf"cannot write {path}: "):
      atomic_file.write(path, b"new")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_pipes_and_devices_are_not_replaced(tmp_path):
  pipe = tmp_path / "pipe"
  os.mkfifo(pipe)
  for write in (
    lambda: atomic_file.write(pipe, b"x"),
    lambda: atomic_file.check_writable(pipe),
    lambda: atomic_file.replacing(pipe).__enter__(),
  ):
    with pytest.raises(OSError, match=r"pipe: it is a pipe or device"):
      write()
  assert pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]


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


def test_what_cannot_be_written_is_known_before(tmp_path, monkeypatch):
  atomic_file.check_writable(tmp_path / "new" / "folder" / "file")
  assert not list(tmp_path.iterdir())
  (tmp_path / "file").touch()
  for path, said in (
    (tmp_path, "it is a folder"),
    (tmp_path / "file" / "x", "is a file"),
  ):
    with pytest.raises(OSError, match=f"cannot write {path}: .*{said}"):
      atomic_file.check_writable(path)
  # Root may write everywhere.
  monkeypatch.setattr(os, "access", lambda *args: False)
  with pytest.raises(PermissionError, match=f"to write to {tmp_path}"):
    atomic_file.check_writable(tmp_path / "new" / "file")


def test_what_a_signal_left_is_removed(tmp_path, monkeypatch):
  def interrupted(*args, **settings):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(shutil, "rmtree", interrupted)
    atomic_file.write(tmp_path / "file", b"x")
  assert len(os.listdir(tmp_path)) == 2
  atomic_file.remove_own()
  assert os.listdir(tmp_path) == ["file"]


def test_a_file_in_a_new_folder_is_named_as_it_would_have_been(tmp_path):
  path = tmp_path / "folder"
  with (
    pytest.raises(OSError, match=f"cannot write {path}/a/b: "),
    atomic_file.new_folder(path) as folder,
  ):
    (folder / "a").touch()
    atomic_file.write(folder / "a" / "b", b"x")


def test_an_empty_folder_is_filled_or_stays_empty(tmp_path, monkeypatch):
  moved = []

  def fails(source, place):
    if moved:
      raise OSError(5, "no more")
    moved.append(os.rename(source, place))

  monkeypatch.setattr(os, "replace", fails)
  with (
    pytest.raises(OSError, match=f"cannot write {tmp_path}|no more"),
    atomic_file.new_folder(tmp_path) as folder,
  ):
    (folder / "a").touch()
    (folder / "b").touch()
  assert moved and not os.listdir(tmp_path)
