"""Conversations have the ids that transformers gives them."""

import json
import shutil

import pytest

_WHY = "parity needs the extra parity"
pytest.importorskip("torch", reason=_WHY)
transformers = pytest.importorskip("transformers", reason=_WHY)

from scca_jax import assets, chat, conversations, tokenizer  # noqa: E402
from tests import model_files  # noqa: E402

CHAT_ML = (
  "{% for m in messages %}{{ '<|begin_of_text|>' + m['role'] + '\n' +"
  " m['content'] | trim + '<|eot_id|>' + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}"
  "{{ '<|begin_of_text|>assistant\n' }}{% endif %}"
)
# As in LLaMA 2: control tokens of SentencePiece between words.
INSTRUCT = (
  "{% for m in messages %}{% if m['role'] == 'user' %}"
  "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
  "{% elif m['role'] == 'assistant' %}"
  "{{ ' ' + m['content'] + ' ' + eos_token }}{% else %}"
  "{{ raise_exception('unknown role') }}{% endif %}{% endfor %}"
)
TALKS = (
  [{"role": "user", "content": "Who sailed, and  where?"}],
  [
    {"role": "user", "content": "the king\n"},
    {"role": "assistant", "content": " an old one: </s><|eot_id|>"},
    {"role": "user", "content": "über 12 <think>"},
  ],
)


@pytest.mark.parametrize("legacy", [None, False])
@pytest.mark.parametrize("kind", ["byte pairs", "sentencepiece"])
def test_conversations_have_the_ids_of_transformers(tmp_path, kind, legacy):
  folder = tmp_path / "m"
  if kind == "byte pairs":
    model_files.write_byte_level(folder)
    changes = {"chat_template": CHAT_ML}
  else:
    folder.mkdir()
    for name in ("config.json", "tokenizer.model"):
      shutil.copy(assets.MODEL / name, folder)
    changes = {
      "chat_template": INSTRUCT,
      "tokenizer_class": "LlamaTokenizer",
      "bos_token": "<s>",
      "eos_token": "</s>",
    }
  path = folder / "tokenizer_config.json"
  settings = json.loads(path.read_text()) if path.exists() else {}
  if legacy is not None:
    settings["legacy"] = legacy
  path.write_text(json.dumps(settings | changes))
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  words, template = tokenizer.load(folder), chat.load(folder)
  for talk in TALKS:
    for asks in (True, False):
      settings = {"add_generation_prompt": asks}
      text = theirs.apply_chat_template(talk, tokenize=False, **settings)
      assert template.render(talk, asks=asks) == text
      wanted = theirs.apply_chat_template(talk, return_dict=False, **settings)
      assert template.encode(words, talk, asks=asks) == wanted, text


def test_answers_are_those_that_transformers_marks(tmp_path):
  folder = model_files.write_byte_level(tmp_path / "m")
  path = folder / "tokenizer_config.json"
  template = (
    "{% for m in messages %}{{ '<|begin_of_text|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "<|eot_id|>{% endgeneration %}{% else %}{{ m['content'] }}<|eot_id|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|begin_of_text|>assistant\n' }}{% endif %}"
  )
  settings = json.loads(path.read_text()) | {"chat_template": template}
  path.write_text(json.dumps(settings))
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  talk = [*TALKS[1], {"role": "assistant", "content": "Twelve."}]
  wanted = theirs.apply_chat_template(
    talk, return_dict=True, return_assistant_tokens_mask=True
  )
  _, ids, answers = conversations.encode(
    {"messages": talk}, tokenizer.load(folder), chat.load(folder)
  )
  marks = [0] * len(ids)
  for start, end in zip(answers[::2], answers[1::2], strict=True):
    marks[start:end] = [1] * (end - start)
  assert ids == wanted["input_ids"]
  assert marks == wanted["assistant_masks"]
