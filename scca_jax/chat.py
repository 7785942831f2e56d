"""Conversations as the text that a model reads: its chat template.

A template is a Jinja program in a model's files. It is rendered as transformers
renders it, in a sandbox, so that a file cannot run anything else.
"""

import dataclasses
import datetime
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from scca_jax import gguf_file, gguf_tokenizer, json_file
from scca_jax.tokenizer import Tokenizer

Message = Mapping[str, Any]
# The answers of the model.
ASSISTANT = "assistant"


class _Generation(jinja2.ext.Extension):
  """Reads `{% generation %}`, which marks answers for transformers' masks."""

  tags = {"generation"}

  def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
    """Returns what is between the tags."""
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
  raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
  return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


def _environment() -> jinja2.Environment:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, jinja2.ext.loopcontrols],
  )
  environment.filters["tojson"] = _to_json
  environment.globals["raise_exception"] = _refuse
  environment.globals["strftime_now"] = lambda form: (
    datetime.datetime.now().strftime(form)
  )
  return environment


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
  """How a model reads conversations.

  Attributes:
    name: The file it comes from, for messages.
    text: The template.
    special_tokens: Tokens that it may name, such as "bos_token".
  """

  name: str
  text: str
  special_tokens: Mapping[str, str]

  def render(self, messages: Sequence[Message], *, asks: bool = True) -> str:
    """Returns a conversation as text, special tokens by their names.

    Args:
      messages: Each with "role" and "content".
      asks: Whether an answer of the model begins behind it.

    Raises:
      ValueError: The template is damaged, or refuses the conversation.
    """
    try:
      template = _environment().from_string(self.text)
      return template.render(
        messages=list(messages),
        add_generation_prompt=asks,
        **self.special_tokens,
      )
    except (jinja2.TemplateError, TypeError) as error:
      raise ValueError(
        f"the chat template of {self.name} cannot render this conversation:"
        f" {error}"
      ) from error

  def encode(
    self,
    vocabulary: Tokenizer,
    messages: Sequence[Message],
    *,
    asks: bool = True,
  ) -> list[int]:
    """Returns a conversation as ids; the template says how it begins and ends.

    Args:
      vocabulary: The model's.
      messages: See `render`.
      asks: See there.

    Raises:
      ValueError: See `render`.
    """
    text = self.render(messages, asks=asks)
    return vocabulary.with_special_tokens.encode(text)


def template_text(folder: pathlib.Path) -> str | None:
  """Returns the chat template of a folder, the default one of several.

  Args:
    folder: A Hugging Face folder.

  Raises:
    ValueError: tokenizer_config.json is not JSON.
  """
  path = folder / "chat_template.jinja"
  if path.is_file():
    return path.read_text(encoding="utf-8")
  path = folder / "tokenizer_config.json"
  template = json_file.read(path).get("chat_template") if path.is_file() else ""
  if isinstance(template, list):
    by_name = {t.get("name"): t.get("template") for t in template}
    template = by_name.get("default")
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
    # Where both name a token, transformers takes tokenizer_config.json.
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
      if (folder / name).is_file():
        settings |= json_file.read(folder / name)
    text = template_text(folder)
  if not text:
    raise ValueError(
      f"{source} has no chat template: take a model that was tuned to answer,"
      " or leave it to continue the text."
    )
  tokens = {}
  for name, token in settings.items():
    content = token.get("content") if isinstance(token, dict) else token
    if name.endswith("_token") and isinstance(content, str):
      tokens[name] = content
  return ChatTemplate(name=str(source), text=text, special_tokens=tokens)
