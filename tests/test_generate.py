"""The command `generate` on the embedded model."""

import json
import shutil

import jax.numpy as jnp
import pytest
from flax import nnx

from scca_jax import (
  adapters,
  assets,
  convert,
  generation,
  lora,
  patterns,
  tokenizer,
)

PROMPT = "The ship had sailed from Boston in the month of May, and"


@pytest.fixture(scope="module")
def expected():
  """The likeliest continuation, from the library."""
  words = tokenizer.load(assets.MODEL)
  model = convert.load_model(assets.MODEL)
  prompt = [words.bos_id, *words.encode(PROMPT)]
  (new,) = generation.generate(model, [prompt], max_new_tokens=12)
  return words.decode([*prompt, *new])


def test_the_likeliest_text_is_printed(run_command, capsys, expected):
  assert (
    run_command("generate", f"--prompt={PROMPT}", "--max_new_tokens=12") == 0
  )
  assert capsys.readouterr().out == expected + "\n"


def test_a_message_begins_its_own_line(run_command, capsys, monkeypatch):
  def fails(*args, **settings):
    raise ValueError("no more.")

  monkeypatch.setattr(generation, "stream", fails)
  assert run_command("generate", "--prompt=Once") == 2
  assert capsys.readouterr().out == "Once\n"


def test_a_file_of_prompts_is_answered(run_command, capsys, tmp_path, expected):
  prompts = tmp_path / "prompts.jsonl"
  other = "It was a dark night"
  prompts.write_text(
    "".join(json.dumps({"prompt": p}) + "\n" for p in (PROMPT, other))
  )
  output = tmp_path / "out" / "answers.jsonl"
  status = run_command(
    "generate",
    f"--prompts={prompts}",
    "--max_new_tokens=12",
    f"--output={output}",
  )
  assert status == 0
  rows = [json.loads(line) for line in output.read_text().splitlines()]
  assert [row["prompt"] for row in rows] == [PROMPT, other]
  assert PROMPT + rows[0]["continuation"] == expected
  assert rows[0]["tokens"] == 12 and not rows[0]["ended"]
  assert expected in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["mesh=fsdp=2,tensor=2", "segment_len=16"])
def test_meshes_and_segments_change_no_text(
  run_command, capsys, expected, flag
):
  status = run_command(
    "generate", f"--prompt={PROMPT}", "--max_new_tokens=12", f"--{flag}"
  )
  assert status == 0
  assert capsys.readouterr().out == expected + "\n"


def test_a_question_is_asked_by_the_template_and_answered(
  run_command, capsys, tmp_path, expected
):
  folder = tmp_path / "m"
  shutil.copytree(assets.MODEL, folder)
  # The prompt of the other tests, half of it from the template.
  first, question = PROMPT[:20], PROMPT[20:]
  template = "{{ bos_token }}" + first + "{{ messages[0].content }}"
  path = folder / "tokenizer_config.json"
  settings = json.loads(path.read_text()) if path.exists() else {}
  settings |= {"bos_token": "<s>", "chat_template": template}
  path.write_text(json.dumps(settings))
  args = ("--chat", f"--prompt={question}", "--max_new_tokens=12")
  assert run_command("generate", f"--model={folder}", *args) == 0
  assert PROMPT + capsys.readouterr().out == expected + "\n"
  assert run_command("generate", *args) == 2
  assert "no chat template" in capsys.readouterr().err


def test_the_training_pattern_can_be_asked_for(run_command, capsys, tmp_path):
  model = convert.load_model(
    assets.MODEL, lora=lora.LoraConfig(rank=2), rngs=nnx.Rngs(0)
  )
  schedule = (patterns.dna(8, window=1, dilation=1),) * model.config.num_layers
  adapters.save_adapter(
    model, tmp_path / "adapter", base_model="tiny", patterns=schedule
  )
  status = run_command(
    "generate",
    f"--adapter={tmp_path / 'adapter'}",
    f"--prompt={PROMPT}",
    "--max_new_tokens=2",
    "--prefill_pattern=training",
    "--decode_pattern=training",
  )
  assert status == 0
  words = tokenizer.load(assets.MODEL)
  ids = [words.bos_id, *words.encode(PROMPT)]
  for _ in range(2):
    logits = model(jnp.asarray([ids]), patterns=schedule)
    ids.append(int(logits[0, -1].argmax()))
  assert capsys.readouterr().out == words.decode(ids) + "\n"


@pytest.mark.parametrize(
  ("args", "said"),
  [
    ((), "--prompt=TEXT or --prompts=FILE"),
    (("--prompt=a", "--prompts=b.txt"), "--prompt=TEXT or --prompts=FILE"),
    (("--prompts=none.txt",), "none.txt"),
    (("--prompt=a", "--model=none"), "none"),
    (("--prompt=a\udcff",), "--prompt: half a surrogate pair, U+DCFF"),
    (("--prompt=a", "--temperature=-1"), "temperature"),
    (("--prompt=a", f"--seed={10**20}"), "seed"),
    (("--prompt=a", "--top_p=2"), "top_p"),
    (("--prompt=a", "--max_new_tokens=0"), "max_new_tokens"),
    (("--prompt=a", "--prefill_pattern=zigzag"), "zigzag"),
    (("--prompt=a", "--decode_pattern=training"), "--adapter"),
    (("--prompt=a", "--output=a.txt"), ".jsonl"),
    (("--prompt=a", "--implementation=fast"), "fast"),
    (("--prompt=a", "--mesh=sequence=2"), "whole sequences"),
    (("--prompt=a", "--mesh=tensor=8"), "does not divide 4 key/value heads"),
    (("--prompt=a", "--mesh=data=9"), "takes 9 devices"),
    (("--prompt=a", "--mesh=data=2", "--segment_len=8"), "a single device"),
  ],
)
def test_bad_flags_end_in_one_line(run_command, capsys, args, said):
  assert run_command("generate", *args) == 2
  error = capsys.readouterr().err
  assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
  ("name", "content", "said"),
  [
    ("p.jsonl", b'{"text": "a"}\n', "line 1: no field 'prompt' (text)"),
    ("p.jsonl", b"{\n", "line 1: not JSON"),
    ("p.jsonl", b'{"prompt": "a\\ud800"}', "line 1: half a surrogate pair"),
    ("p.txt", b"\n \n", "no prompt"),
    ("p.txt", b"\xff\xfe", "not UTF-8"),
    ("p.csv", b"a", ".txt or .jsonl"),
  ],
)
def test_bad_prompts_end_in_one_line(
  run_command, capsys, tmp_path, name, content, said
):
  (tmp_path / name).write_bytes(content)
  assert run_command("generate", f"--prompts={tmp_path / name}") == 2
  error = capsys.readouterr().err
  assert said in error and error.count("\n") == 1
