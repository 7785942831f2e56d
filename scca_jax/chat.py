"""Conversations as the text that a model reads: its chat template.

A template is a Jinja program in a model's files. It is rendered as in
transformers, in a sandbox, so that a file cannot run anything else, and in a
separate process (`template_process`), so that its time and memory are bounded.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from scca_jax import documents, gguf_file, gguf_tokenizer, json_file
from scca_jax.tokenizer import Tokenizer

Message = Mapping[str, Any]
# The answers of the model.
ASSISTANT = "assistant"
# Largest template file.
_MAX_BYTES = 1 << 20
_PROGRAM = pathlib.Path(__file__).with_name("template_process.py")


def _end(process: subprocess.Popen[str]) -> None:
  process.kill()
  # Unread input cannot be written any more.
  with contextlib.suppress(BrokenPipeError), process:
    pass


class _Renderer:
  """The process that renders a template."""

  def __init__(self, text: str):
    """Starts the process."""
    self._process: subprocess.Popen[str] = subprocess.Popen(
      # Without -P, modules of this package would shadow others.
      [sys.executable, "-P", str(_PROGRAM)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
      encoding="ascii",
    )
    weakref.finalize(self, _end, self._process)
    self._lock = threading.Lock()
    self._write(text)

  def _write(self, value: Any) -> None:
    pipe: Any = self._process.stdin
    with contextlib.suppress(BrokenPipeError):  # It ended, so no answer comes.
      pipe.write(json.dumps(value) + "\n")
      pipe.flush()

  def render(self, values: dict[str, Any]) -> str:
    """Returns the text that the template makes from some values.

    Raises:
      ValueError: The template is damaged, refuses them, or takes too much.
    """
    pipe: Any = self._process.stdout
    with self._lock:
      self._write(values)
      answer = pipe.readline()
    if not answer:
      _renderer.cache_clear()
      raise ValueError("it takes too much time or memory")
    answer = json.loads(answer)
    if "error" in answer:
      raise ValueError(answer["error"])
    return answer["text"]


@functools.lru_cache(maxsize=1)
def _renderer(text: str) -> _Renderer:
  return _Renderer(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
  """How a model reads conversations.

  Attributes:
    name: The file it comes from, for error messages.
    text: The template.
    special_tokens: Tokens that it may refer to, such as "bos_token".
  """

  name: str
  text: str
  special_tokens: Mapping[str, str]

  def render(self, messages: Sequence[Message], *, asks: bool = True) -> str:
    """Returns a conversation as text, with special tokens spelt out.

    Args:
      messages: Each with "role" and "content".
      asks: Whether to end where the model's next answer would begin.

    Raises:
      ValueError: The template is damaged, refuses the conversation, or takes
        more than 10 seconds or 1 GiB.
    """
    values = {"messages": list(messages), "add_generation_prompt": asks}
    try:
      text = _renderer(self.text).render(values | dict(self.special_tokens))
      documents.check_text("its text", text)
    except (ValueError, RecursionError) as error:
      raise ValueError(
        f"the chat template of {self.name} cannot render this conversation:"
        f" {error}"
      ) from error
    return text

  def encode(
    self,
    vocabulary: Tokenizer,
    messages: Sequence[Message],
    *,
    asks: bool = True,
  ) -> list[int]:
    """Returns a conversation as ids; BOS and EOS are up to the template.

    Args:
      vocabulary: The model's.
      messages: See `render`.
      asks: See `render`.

    Raises:
      ValueError: See `render`.
    """
    text = self.render(messages, asks=asks)
    return vocabulary.with_special_tokens.encode(text)


def template_text(folder: pathlib.Path) -> str | None:
  """Returns the chat template in a folder, or the default one of several.

  Args:
    folder: A Hugging Face folder.

  Raises:
    ValueError: tokenizer_config.json is not JSON, or the template is not text.
  """
  path = folder / "chat_template.jinja"
  if path.is_file():
    if path.stat().st_size > _MAX_BYTES:
      raise ValueError(f"{path} has more than {_MAX_BYTES >> 20} MiB.")
    try:
      return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
      raise ValueError(f"{path} is not UTF-8: copy it again.") from error
  path = folder / "tokenizer_config.json"
  template = json_file.read(path).get("chat_template") if path.is_file() else ""
  if isinstance(template, list):
    named = [t for t in template if isinstance(t, dict)]
    by_name = {str(t.get("name")): t.get("template") for t in named}
    template = by_name.get("default")
  if template is not None and not isinstance(template, str):
    raise ValueError(f"the chat_template in {path} is not text.")
  return template


def load(source: str | os.PathLike[str]) -> ChatTemplate:
  """Returns the chat template of a model.

  Args:
    source: Its folder, a tokenizer file in it, or a .gguf.

  Raises:
    ValueError: It has none, or its files are damaged.
  """
  source = pathlib.Path(source)
  if source.suffix == gguf_file.SUFFIX:
    settings = gguf_tokenizer.tokenizer_settings(gguf_file.GgufFile(source))
    text = settings.get("chat_template")
  else:
    folder = source if source.is_dir() else source.parent
    settings = {}
    # Where both name a token, transformers follows tokenizer_config.json.
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
      if (folder / name).is_file():
        settings |= json_file.read(folder / name)
    text = template_text(folder)
  if not text or not isinstance(text, str):
    raise ValueError(
      f"{source} has no chat template: use a model that was tuned for chat, or"
      " leave --chat out to let it continue the text."
    )
  tokens = {}
  for name, token in settings.items():
    content = token.get("content") if isinstance(token, dict) else token
    if name.endswith("_token") and isinstance(content, str):
      tokens[name] = content
  return ChatTemplate(name=str(source), text=text, special_tokens=tokens)
