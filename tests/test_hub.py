"""Models by their names on Hugging Face, from its cache, without a network."""

import shutil

import huggingface_hub.constants
import pytest

from scca_jax import assets, hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """The embedded model in a cache as huggingface_hub lays it out; offline."""
  folder = tmp_path / "hub"
  model = folder / "models--owner--tiny"
  (model / "refs").mkdir(parents=True)
  (model / "refs" / "main").write_text(COMMIT)
  shutil.copytree(assets.MODEL, model / "snapshots" / COMMIT)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  return folder


@pytest.mark.parametrize(
  ("text", "may_be"),
  [
    ("owner/name", True),
    ("owner/name-1.5B_x", True),
    ("owner/name/model-Q8_0.gguf", True),
    ("name", False),
    ("models/", False),
    ("./owner/name", False),
    ("/owner/name", False),
    ("a/b/c", False),
  ],
)
def test_a_name_has_an_owner(text, may_be):
  assert hub.is_name(text) == may_be


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert hub.is_name("owner/name")
  (tmp_path / "owner" / "name").mkdir(parents=True)
  assert not hub.is_name("owner/name")
  assert hub.find("owner/name").samefile(tmp_path / "owner" / "name")


def test_a_command_takes_a_model_from_the_cache(run_command, capsys, cache):
  args = ("--prompt=The ship had", "--max_new_tokens=3")
  assert run_command("generate", *args) == 0
  expected = capsys.readouterr().out
  assert run_command("generate", "--model=owner/tiny", *args) == 0
  assert capsys.readouterr().out == expected


@pytest.mark.parametrize("name", ["owner/other", "owner/other/m.gguf"])
def test_without_a_network_the_download_command_is_named(
  run_command, capsys, cache, name
):
  assert run_command("generate", f"--model={name}", "--prompt=a") == 2
  error = capsys.readouterr().err.splitlines()[-1]
  command = "`hf download " + name.replace("other/", "other ") + "`"
  assert error.startswith("error: ") and command in error


def test_an_adapter_names_the_model_and_not_the_cache(cache):
  from experiments.shared import resolve

  assert resolve.base_name("owner/tiny") == "owner/tiny"
  assert resolve.base_name(None) == str(assets.MODEL)
  assert resolve.model_path("owner/tiny").name == COMMIT
