"""Conversations as text and ids, by the template of a model."""

import json

import pytest

from scca_jax import assets, chat, tokenizer
from tests import model_files

TALK = (
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "Who?"},
)
CHAT_ML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] +"
  " '<|im_end|>' + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _template(text, **tokens):
  return chat.ChatTemplate(name="t", text=text, special_tokens=tokens)


def test_a_conversation_becomes_the_text_of_its_template():
  asked = _template(CHAT_ML).render(TALK)
  assert asked == (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nWho?<|im_end|>\n"
    "<|im_start|>assistant\n"
  )
  assert asked == _template(CHAT_ML).render(TALK, asks=False) + (
    "<|im_start|>assistant\n"
  )


@pytest.mark.parametrize(
  ("text", "shown"),
  [
    ("{{ bos_token }}{{ messages[1].content }}", "<s>Who?"),
    ("{% generation %}a{% endgeneration %}b", "ab"),
    ("{% for m in messages %}{% break %}{% endfor %}x", "x"),
    ("{{ {'é': 1} | tojson }}", '{"é": 1}'),
    ("{% if true %}\n  y\n  {% endif %}\nz", "  y\nz"),
  ],
)
def test_templates_may_use_what_transformers_gives_them(text, shown):
  assert _template(text, bos_token="<s>").render(TALK) == shown


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{% for %}", "t cannot render"),
    ("{{ messages.append(3) }}", "not safely callable|unsafe"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
    ("{{ messages[9].content }}", "t cannot render"),
    ("{{ 1 // 0 }}", "division"),
    ("{{ '\\ud800' }}", "surrogate"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ("{{ 'a' * 9999999999 }}", "memory"),
    ("{{ 'a' * 99999999 }}", "characters"),
  ],
)
def test_a_template_that_fails_or_reaches_out_is_one_line(text, said):
  with pytest.raises(ValueError, match=said):
    _template(text).render(TALK)


def test_a_template_without_end_is_stopped(monkeypatch, tmp_path):
  text = chat._PROGRAM.read_text().replace(
    "SECONDS, _BYTES, _CHARACTERS = 10", "SECONDS, _BYTES, _CHARACTERS = 1"
  )
  (tmp_path / "template_process.py").write_text(text)
  monkeypatch.setattr(chat, "_PROGRAM", tmp_path / "template_process.py")
  with pytest.raises(ValueError, match="too much time"):
    _template("{{ 10 ** (10 ** 10) }}").render(TALK)
  # The next conversation gets another process.
  assert _template("x").render(TALK) == "x"


def test_special_tokens_of_the_template_are_tokens(tmp_path):
  folder = model_files.write_byte_level(tmp_path / "m")
  settings = json.loads((folder / "tokenizer_config.json").read_text())
  settings["chat_template"] = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ m.content }}<|eot_id|>{% endfor %}"
  )
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  words = tokenizer.load(folder)
  ids = chat.load(folder).encode(words, TALK)
  texts = [words.encode(m["content"]) for m in TALK]
  # The vocabulary begins with its special tokens: 0, 1 and 2.
  assert ids == [0, *texts[0], 2, *texts[1], 2]
  # As before, they are text elsewhere.
  assert 2 not in words.encode("<|eot_id|>")


def test_control_tokens_of_sentencepiece_are_tokens():
  words = tokenizer.load(assets.MODEL)
  template = _template(
    "{{ bos_token }}{{ messages[1].content }}</s>", bos_token="<s>"
  )
  ids = template.encode(words, TALK)
  assert (ids[0], ids[-1]) == (words.bos_id, words.eos_id)
  assert words.decode(ids[1:-1]) == "Who?"


def test_the_files_say_which_template_and_tokens(tmp_path):
  (tmp_path / "special_tokens_map.json").write_text(
    json.dumps({"bos_token": {"content": "<a>"}, "eos_token": "<b>"})
  )
  settings = {"eos_token": "<c>", "chat_template": "of tokenizer_config.json"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  found = chat.load(tmp_path)
  assert found.special_tokens == {"bos_token": "<a>", "eos_token": "<c>"}
  assert found.text == "of tokenizer_config.json"
  (tmp_path / "chat_template.jinja").write_text("of its own")
  assert chat.load(tmp_path).text == "of its own"


def test_a_model_without_a_template_is_named():
  with pytest.raises(ValueError, match="tiny has no chat template"):
    chat.load(assets.MODEL)
