"""Tensors over a file against what the library reads from it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from scca_jax.safetensors_file import SafetensorsFiles


def _write(path, header, content):
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + content)


@pytest.mark.parametrize(
  "dtype",
  ["float64", "float32", "float16", "bfloat16", "int64", "int8", "bool"],
)
def test_a_tensor_is_what_the_library_reads(tmp_path, dtype):
  path = tmp_path / "model.safetensors"
  random = np.random.default_rng(0)
  # Longer than a page, and of no size.
  shapes = {"long": (77, 99), "short": (3,), "none": (0, 4), "scalar": ()}
  save_file(
    {
      name: np.asarray(random.normal(size=shape) * 9).astype(jnp.dtype(dtype))
      for name, shape in shapes.items()
    },
    path,
  )
  tensors = SafetensorsFiles([path])
  expected = load_file(path)
  assert set(tensors) == set(expected)
  for name, value in expected.items():
    got = tensors[name]()
    assert (got.dtype, got.shape) == (value.dtype, value.shape)
    np.testing.assert_array_equal(got, value, err_msg=name)
    assert tensors.path_of(name) == path


def test_a_dtype_that_numpy_has_not_is_named(tmp_path):
  path = tmp_path / "model.safetensors"
  entry = {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}
  _write(path, {"scale": entry}, b"1234")
  with pytest.raises(ValueError, match="the tensor scale is F8_E4M3"):
    SafetensorsFiles([path])


def test_a_damaged_file_is_named(tmp_path):
  path = tmp_path / "model.safetensors"
  with pytest.raises(FileNotFoundError, match="model.safetensors"):
    SafetensorsFiles([path])
  entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
  for header, content in (({"a": entry}, b"1234"), ({}, b"")):
    _write(path, header, content)
    if header:
      with pytest.raises(ValueError, match="damaged or cut short"):
        SafetensorsFiles([path])
    else:
      assert not list(SafetensorsFiles([path]))
  path.write_bytes(b"")
  with pytest.raises(ValueError, match="damaged or cut short"):
    SafetensorsFiles([path])


def test_a_tensor_in_two_files_is_named(tmp_path):
  paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
  for path in paths:
    save_file({"weight": np.ones(2, np.float32)}, path)
  with pytest.raises(ValueError, match="weight is in two files"):
    SafetensorsFiles(paths)
