"""Instruction data: turns conversations into ids and marks the answers.

Each line of a `.jsonl` is one of

    {"messages": [{"role": "user", "content": …}, {"role": "assistant", …}, …]}
    {"prompt": …, "completion": …}
    {"instruction": …, "input": …, "output": …}

The second form is plain text (or two lists of messages, as in TRL); the others
go through the model's chat template. Training can then count the loss on the
answers alone (`TokenFile.answers`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from scca_jax.chat import ASSISTANT, ChatTemplate
from scca_jax.tokenizer import Tokenizer

# The text of a conversation, its ids, and where its answers begin and end.
Encoded = tuple[str, list[int], list[int]]


def _messages(record: Mapping[str, Any]) -> Any:
  """Returns the messages of a record, None if it is plain text."""
  if "messages" in record:
    return record["messages"]
  prompt, completion = record.get("prompt"), record.get("completion")
  if isinstance(prompt, list) and isinstance(completion, list):
    return [*prompt, *completion]
  if "instruction" in record and "output" in record:
    asked = [record["instruction"], record.get("input") or ""]
    is_text = all(isinstance(x, str) for x in asked)
    return [
      # The caller refuses anything but text.
      {
        "role": "user",
        "content": "\n\n".join(x for x in asked if x) if is_text else asked,
      },
      {"role": ASSISTANT, "content": record["output"]},
    ]
  if isinstance(prompt, str) and isinstance(completion, str):
    return None
  raise ValueError(
    "it needs messages, prompt and completion, or instruction and output, but"
    f" has {', '.join(record) or 'nothing'}."
  )


def _check(messages: Any) -> None:
  if not isinstance(messages, list) or not all(
    isinstance(m, dict)
    and isinstance(m.get("role"), str)
    and isinstance(m.get("content"), str)
    for m in messages
  ):
    raise ValueError("each message needs a role and a content, both text.")
  if not any(m["role"] == ASSISTANT for m in messages):
    raise ValueError(f"it has no answer: no message of the role {ASSISTANT!r}.")


def _common(a: Sequence[int], b: Sequence[int]) -> int:
  """Returns how many ids two texts have in common at their start."""
  pairs = enumerate(zip(a, b, strict=False))
  return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def encode(
  record: Mapping[str, Any],
  vocabulary: Tokenizer,
  template: ChatTemplate | None = None,
) -> Encoded:
  """Returns the text of a conversation, its ids, and its answers.

  An answer begins where the model would start writing and includes what ends
  it: the template's mark, or the EOS after a completion. A prompt begins with
  BOS if the tokenizer's files say so.

  Args:
    record: See above.
    vocabulary: The model's.
    template: The model's; None if it has none.

  Returns:
    The text, the ids, and where each answer begins and ends:
    `[start, end, start, end, …]`, where each end is one past the last id.

  Raises:
    ValueError: The record has none of these forms or no answer; there is no
      template, or it renders an answer differently once more messages follow.
  """
  messages = _messages(record)
  if messages is None:
    text = record["prompt"] + record["completion"]
    (prompt,) = vocabulary.encode_prompts([record["prompt"]])
    (ids,) = vocabulary.encode_prompts([text])
    if vocabulary.eos_id is not None and ids[-1:] != [vocabulary.eos_id]:
      ids = [*ids, vocabulary.eos_id]
    return text, ids, [_common(prompt, ids), len(ids)]
  _check(messages)
  if template is None:
    raise ValueError(
      "messages need a chat template, and the model has none: use the tokenizer"
      " of a model that was tuned for chat, or give prompt and completion."
    )
  words = vocabulary.with_special_tokens
  text = template.render(messages, asks=False)
  ids = words.encode(text)
  answers: list[int] = []
  for i, message in enumerate(messages):
    if message["role"] != ASSISTANT:
      continue
    asked = words.encode(template.render(messages[:i], asks=True))
    answered = words.encode(template.render(messages[: i + 1], asks=False))
    if _common(answered, ids) < len(answered):
      raise ValueError(
        f"the chat template renders message {i + 1} differently once more"
        " messages follow: give conversations whose only answer comes last."
      )
    answers += [_common(asked, answered), len(answered)]
  return text, ids, answers
