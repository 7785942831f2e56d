"""Instruction data: ids of conversations, and training on answers alone."""

import json

import numpy as np
import pytest

from scca_jax import batches, conversations, tokenizer
from scca_jax.chat import ChatTemplate
from scca_jax.token_file import TokenFile, write_conversations
from tests import model_files

# The vocabulary of `model_files.byte_level` begins with these.
BOS, EOS, TURN = 0, 1, 2
TEMPLATE = ChatTemplate(
  name="m",
  text="{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|eot_id|>"
  "{% endfor %}{% if add_generation_prompt %}a:{% endif %}",
  special_tokens={},
)
TALK = [
  {"role": "user", "content": "Who?"},
  {"role": "assistant", "content": "The king."},
  {"role": "user", "content": "Where?"},
  {"role": "assistant", "content": "At sea."},
]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  return tokenizer.load(
    model_files.write_byte_level(tmp_path_factory.mktemp("m"))
  )


def _answers(words, ids, places):
  """The texts of the answers, special tokens by their names."""
  pairs = zip(places[::2], places[1::2], strict=True)
  return [words.decode(ids[start:end]) for start, end in pairs]


def test_answers_of_a_conversation_end_with_their_turn(words):
  text, ids, places = conversations.encode({"messages": TALK}, words, TEMPLATE)
  assert text == (
    "u:Who?<|eot_id|>a:The king.<|eot_id|>u:Where?<|eot_id|>a:At sea.<|eot_id|>"
  )
  assert words.decode(ids) == text and ids.count(TURN) == 4
  assert _answers(words, ids, places) == [
    "The king.<|eot_id|>",
    "At sea.<|eot_id|>",
  ]


@pytest.mark.parametrize(
  "record",
  [
    {"prompt": TALK[:3], "completion": TALK[3:]},
    {"instruction": "Who?", "output": "The king."},
    {"instruction": "Who", "input": "is it?", "output": "The king."},
  ],
)
def test_other_forms_are_the_messages_that_they_stand_for(words, record):
  if "prompt" in record:
    messages = TALK
  else:
    asked = "Who?" if "input" not in record else "Who\n\nis it?"
    messages = [{"role": "user", "content": asked}, TALK[1]]
  found = conversations.encode(record, words, TEMPLATE)
  assert found == conversations.encode({"messages": messages}, words, TEMPLATE)


def test_a_completion_goes_on_the_prompt_and_ends(words):
  record = {"prompt": "the old ", "completion": "king"}
  text, ids, places = conversations.encode(record, words)
  assert text == "the old king"
  assert ids == [BOS, *words.encode("the old king"), EOS]
  (answer,) = _answers(words, ids, places)
  assert answer == "king<|end_of_text|>"


@pytest.mark.parametrize(
  ("record", "template", "said"),
  [
    ({"messages": TALK}, None, "need a chat template"),
    ({"messages": TALK[:1]}, TEMPLATE, "no answer"),
    ({"messages": [{"role": "user"}]}, TEMPLATE, "a role and a content"),
    ({"instruction": 3, "output": "a"}, TEMPLATE, "a role and a content"),
    ({"text": "a"}, TEMPLATE, "needs messages.*but has text"),
    (
      {"messages": TALK},
      ChatTemplate(
        name="m",
        text="{% for m in messages %}{{ m.content if loop.last else '-' }}"
        "{% endfor %}",
        special_tokens={},
      ),
      "message 2 differently once more messages follow",
    ),
  ],
)
def test_what_cannot_be_used_is_named(words, record, template, said):
  with pytest.raises(ValueError, match=said):
    conversations.encode(record, words, template)


@pytest.mark.parametrize("packing", ["concatenate", "packed"])
def test_training_counts_the_answers_alone(words, tmp_path, packing):
  talks = [
    conversations.encode({"messages": TALK[: 2 + 2 * (i % 2)]}, words, TEMPLATE)
    for i in range(7)
  ]
  about = write_conversations(talks, words, tmp_path / "a.bin")
  file = TokenFile.open(tmp_path / "a.bin")
  expected = [
    i
    for _, ids, places in talks
    for a, b in zip(places[::2], places[1::2], strict=True)
    for i in ids[a:b]
  ]
  assert sum(about["answers"][1::2]) - sum(about["answers"][::2]) == len(
    expected
  )
  found = batches.make_batches(
    file, seq_len=16, batch_size=1, seed=0, packing=packing, epochs=1
  )
  counted, others = [], 0
  for batch in found:
    counted += batch["targets"][batch["mask"] == 1].tolist()
    others += np.sum(batch["mask"] == 0)
  # Windows of "concatenate" leave a few tokens over.
  missing = len(expected) - len(counted)
  assert missing == 0 if packing == "packed" else 0 <= missing < 16
  if packing == "packed":
    assert sorted(counted) == sorted(expected)
  assert others > 0


def test_held_out_documents_keep_their_answers(words, tmp_path):
  talks = [conversations.encode({"messages": TALK}, words, TEMPLATE)] * 3
  write_conversations(talks, words, tmp_path / "a.bin")
  first, second = TokenFile.open(tmp_path / "a.bin").split(1)
  for part, number in ((first, 2), (second, 1)):
    ids = part.tokens[part.counted(0, len(part)) == 1].tolist()
    assert words.decode(ids) == number * "The king.<|eot_id|>At sea.<|eot_id|>"


def test_a_damaged_list_of_answers_is_refused(words, tmp_path):
  talk = conversations.encode({"messages": TALK}, words, TEMPLATE)
  path = tmp_path / "a.json"
  for bad in ([1], [4, 2], [0, 10**6], ["a", "b"], "x"):
    write_conversations([talk], words, tmp_path / "a.bin")
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"answers": bad}))
    with pytest.raises(ValueError, match="answers"):
      TokenFile.open(tmp_path / "a.bin")
