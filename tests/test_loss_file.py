"""Files of losses: round trips, and which pairs are refused."""

import dataclasses
import zipfile

import numpy as np
import pytest

from scca_jax import loss_file
from scca_jax.perplexity import WindowLosses

ABOUT = {"protocol": "strided", "tokens_sha256": "0a", "model": "tiny"}


def _windows(length, **changes):
  rng = np.random.default_rng(length)
  given = {
    "losses": rng.random((3, length - 1), np.float32),
    "starts": np.array([0, 4, 8]),
    "firsts": np.array([1, 4, 4]),
    "begins": np.array([True, False, False]),
    "documents": np.array([0, 0, 1]),
  }
  return WindowLosses(**given | changes)


def _file(name="a.npz", about=None, **by_length):
  lengths = {int(key[1:]): windows for key, windows in by_length.items()}
  return loss_file.LossFile(
    name=name,
    about=ABOUT | (about or {}),
    by_length=lengths or {8: _windows(8)},
  )


def test_what_is_written_is_read(tmp_path):
  by_length = {16: _windows(16), 8: _windows(8)}
  path = tmp_path / "new" / "losses.npz"
  loss_file.write(path, by_length, ABOUT)
  found = loss_file.read(path)
  assert (found.about, found.name) == (ABOUT, str(path))
  assert list(found.by_length) == [8, 16]
  for length, windows in found.by_length.items():
    for field in dataclasses.fields(WindowLosses):
      expected = getattr(by_length[length], field.name)
      value = getattr(windows, field.name)
      assert value.dtype == expected.dtype
      np.testing.assert_array_equal(value, expected)


def test_unscored_predictions_are_nan():
  windows = _windows(8)
  expected = windows.losses.copy()
  expected[1:, :3] = np.nan  # Tokens 1 to 3.
  np.testing.assert_array_equal(windows.scored, expected)


def _write(path, **arrays):
  complete = {
    "about": np.array('{"protocol": "strided", "tokens_sha256": "0a"}'),
    **{
      f"{field.name}_8": getattr(_windows(8), field.name)
      for field in dataclasses.fields(WindowLosses)
    },
  }
  kept = {k: v for k, v in (complete | arrays).items() if v is not None}
  np.savez(path, **kept)


@pytest.mark.parametrize(
  "arrays",
  [
    {"about": None},
    {"about": np.array("{")},
    {"about": np.array("[]")},
    {"about": np.array('{"protocol": "strided"}')},
    {"about": np.array({}, object)},
    {"starts_8": None},
    {"starts_8": np.arange(2)},
    {"losses_8": np.ones(3, np.float32)},
    {"losses_8": np.ones((3, 7))},
    {"losses_8": None},
    {"losses_long": np.ones((3, 7), np.float32)},
  ],
)
def test_other_archives_are_refused(tmp_path, arrays):
  path = tmp_path / "other.npz"
  _write(path)
  loss_file.read(path)
  _write(path, **arrays)
  with pytest.raises(ValueError, match="other.npz is not a file of losses"):
    loss_file.read(path)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", None])
def test_damaged_files_are_refused(tmp_path, content):
  path = tmp_path / "damaged.npz"
  loss_file.write(path, {8: _windows(8)}, ABOUT)
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2] if content is None else content)
  with pytest.raises(ValueError, match="damaged.npz is not a file of losses"):
    loss_file.read(path)


def test_what_numpy_and_zipfile_raise_otherwise_is_named(tmp_path):
  path = tmp_path / "damaged.npz"
  with zipfile.ZipFile(path, "w") as file:
    header = b"{'descr': '<f4', (\n"
    start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
    file.writestr("about.npy", start + header)
  with pytest.raises(ValueError, match="damaged.npz is not a file of losses"):
    loss_file.read(path)
  content = bytearray(path.read_bytes())
  content[6] = content[content.index(b"PK\x01\x02") + 8] = 1  # Encrypted.
  path.write_bytes(content)
  with pytest.raises(ValueError, match="damaged.npz is not a file of losses"):
    loss_file.read(path)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="the file of losses"):
    loss_file.read(tmp_path / "no.npz")


def test_pairs_are_compared_at_the_lengths_they_share():
  a = _file(_8=_windows(8), _16=_windows(16), _32=_windows(32))
  b = _file("b.npz", {"model": "other"}, _32=_windows(32), _8=_windows(8))
  assert loss_file.check_pair(a, b) == [8, 32]


@pytest.mark.parametrize(
  ("other", "message"),
  [
    (
      {"about": {"tokens_sha256": "0b"}},
      "a.npz and b.npz do not have the same tokens",
    ),
    (
      {"about": {"protocol": "longlora"}},
      "do not have the same protocol: strided and longlora",
    ),
    ({"_16": _windows(16)}, "no length in common: 8 and 16 tokens"),
    (
      {"_8": _windows(8, starts=np.array([0, 4, 9]))},
      r"do not have the same windows of 8 tokens \(starts differ\)",
    ),
    ({"_8": _windows(8, documents=np.zeros(3, int))}, "documents differ"),
    ({"_8": _windows(8, firsts=np.array([1, 1, 1]))}, "firsts differ"),
  ],
)
def test_losses_of_other_tokens_are_not_paired(other, message):
  with pytest.raises(ValueError, match=message):
    loss_file.check_pair(_file(), _file("b.npz", **other))
