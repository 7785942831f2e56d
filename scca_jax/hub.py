"""Models by their names on Hugging Face, such as "HuggingFaceTB/SmolLM2-135M".

huggingface_hub downloads them, once, into its own cache. HF_HOME,
HF_HUB_OFFLINE and HF_TOKEN mean what they mean to transformers.
"""

import pathlib
import re

import huggingface_hub
from huggingface_hub import errors

# Without folders of other formats: weights, settings and tokenizer.
_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")
_NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:/(.+\.gguf))?")


def is_name(text: str) -> bool:
  """Whether a text may be the name of a model: nothing here is called so.

  Args:
    text: ORGANISATION/NAME, or ORGANISATION/NAME/FILE.gguf.
  """
  return bool(_NAME.fullmatch(text)) and not pathlib.Path(text).exists()


def find(name: str) -> pathlib.Path:
  """Returns the folder or GGUF file of a model, downloaded if need be.

  Args:
    name: See `is_name`; any other text is a path already.

  Raises:
    ValueError: There is no such model, or it is neither in the cache nor can be
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
      f"{repository} asks for its licence to be accepted: do so on its page at"
      " huggingface.co, then run `hf auth login`."
    ) from error
  except (
    errors.RepositoryNotFoundError,
    errors.RemoteEntryNotFoundError,
    errors.HFValidationError,
  ) as error:
    raise ValueError(
      f"there is neither a folder {name} here nor such a model on Hugging Face;"
      " a private one needs `hf auth login`."
    ) from error
  except (
    errors.HfHubHTTPError,
    errors.LocalEntryNotFoundError,
    OSError,
  ) as error:
    command = f"hf download {repository}" + (f" {file}" if file else "")
    raise ValueError(
      f"there is no folder {name} here, the cache of Hugging Face does not have"
      " the model, and it cannot be downloaded now: run"
      f" `{command}` where there is a network, or name a folder."
    ) from error
