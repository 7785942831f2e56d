"""Finds models by their names on Hugging Face.

A name is like "HuggingFaceTB/SmolLM2-135M". huggingface_hub downloads a model
once, into its own cache. HF_HOME, HF_HUB_OFFLINE and HF_TOKEN have their usual
meaning.
"""

import pathlib
import re

import huggingface_hub
from huggingface_hub import errors

# Weights, settings and tokenizer, but no folders of other formats.
_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")
_NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:/(.+\.gguf))?")


def is_name(text: str) -> bool:
  """Whether a text may name a model on Hugging Face: no local file matches.

  Args:
    text: ORGANISATION/NAME, or ORGANISATION/NAME/FILE.gguf.
  """
  return bool(_NAME.fullmatch(text)) and not pathlib.Path(text).exists()


def find(name: str) -> pathlib.Path:
  """Returns the folder or GGUF file of a model, downloaded if necessary.

  Args:
    name: See `is_name`; any other text is returned as a path.

  Raises:
    ValueError: There is no such model, or it is not in the cache and cannot be
      downloaded.
  """
  if not is_name(name):
    return pathlib.Path(name)
  found = _NAME.fullmatch(name)
  repository, file = found.groups() if found else (name, None)
  try:
    if file is not None:
      return pathlib.Path(huggingface_hub.hf_hub_download(repository, file))
    folder = huggingface_hub.snapshot_download(
      repository, allow_patterns=list(_FILES)
    )
    return pathlib.Path(folder)
  except errors.GatedRepoError as error:
    raise ValueError(
      f"{repository} requires its licence to be accepted: do so on its page at"
      " huggingface.co, then run `hf auth login`."
    ) from error
  except (
    errors.RepositoryNotFoundError,
    errors.RemoteEntryNotFoundError,
    errors.HFValidationError,
  ) as error:
    raise ValueError(
      f"{name} is neither a local folder nor a model on Hugging Face; for a"
      " private model run `hf auth login` first."
    ) from error
  except (
    errors.HfHubHTTPError,
    errors.LocalEntryNotFoundError,
    OSError,
  ) as error:
    command = f"hf download {repository}" + (f" {file}" if file else "")
    raise ValueError(
      f"{name} is neither a local folder nor in Hugging Face's cache, and it"
      f" cannot be downloaded now: run `{command}` on a machine with a network,"
      " or name a folder."
    ) from error
