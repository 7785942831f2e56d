"""A program that renders chat templates within limits.

A template is a Jinja program from a model's files. Jinja's sandbox lets it see
only its values, but limits neither time nor memory, so it runs in a separate
process. That reads a line of JSON with the template, then one for each
conversation, and answers each with a line, {"text": ...} or {"error": ...}. It
imports nothing else from this package, to start quickly.
"""

import contextlib
import datetime
import json
import resource
import signal
import sys
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

# Limits of a conversation, in seconds of CPU time, bytes and characters.
SECONDS, _BYTES, _CHARACTERS = 10, 1 << 30, 1 << 24


class _Generation(jinja2.ext.Extension):
  """Accepts `{% generation %}`, which marks answers for transformers' masks."""

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


def _render(text: str, template: list, values: dict[str, Any]) -> str:
  """Returns a conversation as text.

  Args:
    text: The template.
    template: Has the template once it is compiled.
    values: Its variables.
  """
  if not template:
    template.append(_environment().from_string(text))
  rendered = template[0].render(values)
  if len(rendered) > _CHARACTERS:
    raise ValueError(f"the text has more than {_CHARACTERS:,} characters")
  return rendered


def main() -> None:
  """Answers line by line."""
  # The parent ends this process.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
  text = json.loads(sys.stdin.readline())
  template: list = []
  for line in sys.stdin:
    # Its signal ends the process, whatever it is doing.
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
      answer = {"text": _render(text, template, json.loads(line))}
    except MemoryError:
      answer = {"error": f"it takes more than {_BYTES >> 30} GiB of memory"}
    # A template can raise anything.
    except Exception as error:
      answer = {"error": str(error)[:300] or type(error).__name__}
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
  main()
