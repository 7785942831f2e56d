"""The model of lm-evaluation-harness, against the harness's own `hf`."""

import dataclasses
import importlib.metadata
import json
import pathlib
import textwrap
import tomllib

import jax
import numpy as np
import pytest

_WHY = "needs the extras parity and lm_eval"
torch = pytest.importorskip("torch", reason=_WHY)
transformers = pytest.importorskip("transformers", reason=_WHY)
pytest.importorskip("lm_eval", reason=_WHY)

import lm_eval.utils  # noqa: E402
import tokenizers  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from scca_jax import (  # noqa: E402
  adapters,
  assets,
  convert,
  documents,
  generation,
  harness,
  patterns,
)
from scca_jax.convert import layout  # noqa: E402
from scca_jax.lora import LoraConfig  # noqa: E402
from scca_jax.rope import RopeScaling  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
# Nats per token.
TOLERANCE = 1e-5
WINDOW = 64
BOOK = next(iter(documents.read_documents(assets.BOOKS_TEST)))[4000:12000]
WORDS = BOOK.split()


def _words(first, count):
  return " ".join(WORDS[first : first + count])


def _requests(kind, arguments):
  return [
    Instance(request_type=kind, doc={}, arguments=given, idx=0)
    for given in arguments
  ]


def _hf(folder, **settings):
  return HFLM(
    pretrained=str(folder),
    dtype="float32",
    device="cpu",
    batch_size=2,
    **settings,
  )


@pytest.fixture(autouse=True)
def _log_to_pytest(monkeypatch):
  """Keeps the harness from logging to a stream that ends with its test."""
  monkeypatch.setattr(lm_eval.utils, "_LOGGING_CONFIGURED", True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """The embedded model in float32, as `experiments.export` writes it."""
  folder = tmp_path_factory.mktemp("exported")
  convert.copy_tokenizer(assets.MODEL, folder)
  convert.save_model(convert.load_model(assets.MODEL), folder, dtype=np.float32)
  return folder


def _assert_same_likelihoods(ours, theirs, pairs):
  """Compares log likelihoods and greediness; returns the latter."""
  requests = _requests("loglikelihood", pairs)
  found = ours.loglikelihood(requests, disable_tqdm=True)
  expected = theirs.loglikelihood(requests, disable_tqdm=True)
  for pair, (total, greedy), (their_total, their_greedy) in zip(
    pairs, found, expected, strict=True
  ):
    size = len(theirs.tok_encode(pair[1], add_special_tokens=False))
    assert total == pytest.approx(their_total, abs=TOLERANCE * size), pair
    assert greedy == their_greedy, pair
  return [greedy for _, greedy in found]


def _assert_same_rolling(ours, theirs, texts):
  requests = _requests("loglikelihood_rolling", [(text,) for text in texts])
  found = ours.loglikelihood_rolling(requests, disable_tqdm=True)
  expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
  for text, total, their_total in zip(texts, found, expected, strict=True):
    size = len(theirs.tok_encode(text))
    assert total == pytest.approx(their_total, abs=TOLERANCE * size), text


def _assert_same_texts(ours, theirs, contexts, settings):
  requests = _requests("generate_until", [(c, settings) for c in contexts])
  found = ours.generate_until(requests, disable_tqdm=True)
  assert found == theirs.generate_until(requests, disable_tqdm=True)
  return found


PAIRS = [
  (_words(0, 12), " " + _words(12, 3)),
  # The space belongs to what follows.
  (_words(20, 9) + "  ", _words(29, 2)),
  # No space between the two.
  (_words(40, 5), ", and"),
  ("", _words(50, 4)),
  ("", "<s>Once"),
  ("<s>" + _words(60, 4), " " + _words(64, 4)),
  ("naïve 日本 ", "“snowman” ☃"),
  # Longer than the window, and as long as that.
  (_words(100, 90), " " + _words(190, 5)),
  (_words(300, 40), " " + _words(340, 30)),
  # Choices of one token, after the same context.
  *((_words(400, 10), choice) for choice in (" the", " of", " to", " and")),
]


@pytest.mark.parametrize(
  "settings", [{}, {"add_bos_token": True}, {"prefix_token_id": 2}]
)
def test_numbers_and_texts_are_those_of_hf(exported, settings):
  settings |= {"max_length": WINDOW}
  ours = harness.SccaLM(str(exported), batch_size=4, **settings)
  theirs = _hf(exported, **settings)
  contexts = [_words(500, 8), _words(600, 90), "It was", _words(700, 11)]
  said = _assert_same_texts(
    ours, theirs, contexts, {"until": [",", "\n\n"], "max_gen_toks": 12}
  )
  # With what the model itself would say, so that some are greedy.
  own = [
    (context, f" {text.split()[0]}")
    for context, text in zip(contexts, said, strict=True)
    if text.split()
  ]
  greedy = _assert_same_likelihoods(ours, theirs, [*PAIRS, *own])
  # Both answers occur: agreeing on one of them alone would show little.
  assert set(greedy) == {True, False}, own
  lengths = [1, 30, WINDOW - 1, WINDOW, WINDOW + 1, 150]
  ids = theirs.tok_encode(BOOK, add_special_tokens=False)
  _assert_same_rolling(
    ours, theirs, ["", *(theirs.tok_decode(ids[:n]) for n in lengths)]
  )


def test_a_model_ends_where_its_config_says(tmp_path, exported):
  ours = harness.SccaLM(str(exported))
  request = {"until": [], "max_gen_toks": 8}
  (text,) = ours.generate_until(
    _requests("generate_until", [("It was", request)]), disable_tqdm=True
  )
  third = ours.tok_encode(text, add_special_tokens=False)[2]
  config = json.loads((exported / "config.json").read_text())
  for path in exported.iterdir():
    (tmp_path / path.name).symlink_to(path)
  (tmp_path / "config.json").unlink()
  (tmp_path / "config.json").write_text(
    json.dumps(config | {"eos_token_id": [2, third]})
  )
  said = _assert_same_texts(
    harness.SccaLM(str(tmp_path), batch_size=2),
    _hf(tmp_path),
    ["It was", _words(0, 9)],
    request,
  )
  assert text.startswith(said[0]) and len(said[0]) < len(text)


_TEMPLATE = (
  "{% for m in messages %}"
  "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
  "<|{{ m.role }}|>{{ m.content }}{{ eos_token }}"
  "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _byte_tokenizer(folder, **settings):
  """Writes a tokenizer of bytes without BOS."""
  words = tokenizers.Tokenizer(tokenizers.models.BPE())
  words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  words.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  words.train_from_iterator([BOOK], trainer)
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=words, chat_template=_TEMPLATE, **settings
  ).save_pretrained(folder)
  return str(folder)


def test_without_bos_a_text_begins_behind_eos(exported, tmp_path):
  settings = {
    "tokenizer": _byte_tokenizer(tmp_path, eos_token="<|end|>"),
    "max_length": WINDOW,
  }
  ours = harness.SccaLM(str(exported), batch_size=4, **settings)
  theirs = _hf(exported, **settings)
  assert ours.prefix_token_id == theirs.prefix_token_id == 0
  pairs = [pair for pair in PAIRS if len(theirs.tok_encode(pair[1])) < WINDOW]
  _assert_same_likelihoods(ours, theirs, pairs)
  _assert_same_rolling(ours, theirs, [_words(0, 5), _words(0, 60)])
  _assert_same_texts(ours, theirs, [_words(0, 5)], {"max_gen_toks": 6})


@pytest.mark.parametrize("asks", [True, False])
def test_chats_are_those_of_hf(exported, tmp_path, asks):
  settings = {"tokenizer": _byte_tokenizer(tmp_path, eos_token="<|end|>")}
  ours = harness.SccaLM(str(exported), **settings)
  theirs = _hf(exported, **settings)
  assert ours.chat_template(True) == theirs.chat_template(True) == _TEMPLATE
  assert ours.tokenizer_name == theirs.tokenizer_name
  chat = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Well"},
  ][: 2 if asks else 3]
  text = ours.apply_chat_template(chat, add_generation_prompt=asks)
  assert text == theirs.apply_chat_template(chat, add_generation_prompt=asks)
  assert text.startswith("<|user|>Hello")
  # The tokens of a template are tokens, not text.
  assert ours.tok_encode(text) == theirs.tok_encode(text)
  assert {0, 1, 2} <= set(ours.tok_encode(text))


def test_without_bos_and_eos_a_text_needs_a_prefix(exported, tmp_path):
  tokenizer = _byte_tokenizer(tmp_path)
  ours = harness.SccaLM(str(exported), tokenizer=tokenizer)
  with pytest.raises(ValueError, match="neither BOS nor EOS: give prefix_"):
    ours.loglikelihood_rolling(_requests("loglikelihood_rolling", [("a",)]))
  ours = harness.SccaLM(
    str(exported), tokenizer=tokenizer, prefix_token_id=5, max_length=WINDOW
  )
  theirs = _hf(
    exported, tokenizer=tokenizer, prefix_token_id=5, max_length=WINDOW
  )
  _assert_same_rolling(ours, theirs, [_words(0, 5)])


PATTERN = "scca_fixed(chunk_size=16, boundary='local')"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
  """An adapter for twice the context, and the model that it makes, fused."""
  work = tmp_path_factory.mktemp("adapter")
  config = convert.load_config(assets.MODEL)
  scaling = RopeScaling(
    kind="linear", factor=2.0, original_max_position_embeddings=256
  )
  model = convert.load_model(
    assets.MODEL,
    config=dataclasses.replace(config, context_len=512, rope_scaling=scaling),
    lora=LoraConfig(rank=2),
  )
  for i, path in enumerate(sorted(layout.parameters(model))):
    if path[-1] == "lora_b":
      leaf = model
      for name in path:
        leaf = getattr(leaf, name)
      leaf[...] = 0.02 * jax.random.normal(jax.random.key(i), leaf.shape)
  layers = patterns.parse(
    PATTERN, num_heads=8, num_kv_heads=4, num_layers=5, seq_len=512
  )
  adapters.save_adapter(
    model, work / "adapter", base_model=str(assets.MODEL), patterns=layers
  )
  convert.copy_tokenizer(assets.MODEL, work / "fused", context_len=512)
  convert.save_model(model, work / "fused", dtype=np.float32)
  return work


def test_an_adapter_brings_its_context_and_rope_scaling(adapter):
  ours = harness.SccaLM(adapter=str(adapter / "adapter"))
  theirs = _hf(adapter / "fused")
  assert ours.max_length == theirs.max_length == 512
  _assert_same_rolling(ours, theirs, [_words(0, 700)])


def test_a_pattern_is_what_every_layer_attends_by(adapter):
  """Against transformers with the heads' masks."""
  theirs = transformers.LlamaForCausalLM.from_pretrained(
    adapter / "fused", dtype=torch.float32, attn_implementation="eager"
  )
  (pattern, *_) = patterns.parse(
    PATTERN, num_heads=8, num_kv_heads=4, num_layers=5, seq_len=512
  )

  def log_probabilities(ids):
    seen = torch.from_numpy(np.array(pattern.visible(len(ids))))[None]
    assert seen.any(-1).all()
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    with torch.no_grad():
      logits = theirs(torch.tensor([ids]), attention_mask=mask).logits[0]
    return torch.log_softmax(logits, dim=-1)

  for settings in ({"pattern": PATTERN}, {"pattern": "training"}):
    ours = harness.SccaLM(
      adapter=str(adapter / "adapter"), max_length=WINDOW, **settings
    )
    context, continuation = _words(0, 25), " " + _words(25, 6)
    ((total, _),) = ours.loglikelihood(
      _requests("loglikelihood", [(context, continuation)]), disable_tqdm=True
    )
    ids, tail = ours._encode_pair(context, continuation)
    found = log_probabilities(ids + tail)[len(ids) - 1 : -1]
    expected = found[torch.arange(len(tail)), torch.tensor(tail)].sum()
    assert total == pytest.approx(float(expected), abs=TOLERANCE * len(tail))
    said = ours.generate_until(
      _requests("generate_until", [(context, {"max_gen_toks": 5})]),
      disable_tqdm=True,
    )
    for _ in range(5):
      ids.append(int(log_probabilities(ids)[-1].argmax()))
    assert said == [ours.tokenizer.decode(ids[-5:])]


def test_requests_of_all_lengths_share_a_few_shapes(exported):
  ours = harness.SccaLM(str(exported), batch_size=3)
  before = harness._score._cache_size(), generation.next_tokens._cache_size()
  for shift in range(3):
    pairs = [
      (_words(shift, n), " " + _words(99, 1 + n % 7))
      for n in range(2 + shift, 50, 4)
    ]
    ours.loglikelihood(_requests("loglikelihood", pairs), disable_tqdm=True)
    ours.generate_until(
      _requests(
        "generate_until",
        [(context, {"max_gen_toks": 2}) for context, _ in pairs],
      ),
      disable_tqdm=True,
    )
  after = harness._score._cache_size(), generation.next_tokens._cache_size()
  # 64 and 128 tokens; to generate takes a first step and others.
  assert after[0] - before[0] <= 2
  assert after[1] - before[1] <= 4


TASKS = {
  "pages": """
    output_type: loglikelihood_rolling
    doc_to_text: ""
    doc_to_target: "{{page}}"
    metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
  """,
  "endings": """
    output_type: multiple_choice
    doc_to_text: "{{start}}"
    doc_to_choice: "{{ends}}"
    doc_to_target: 0
    metric_list: [{metric: acc}, {metric: acc_norm}]
  """,
  "going_on": """
    output_type: generate_until
    doc_to_text: "{{start}}"
    doc_to_target: "{{ends[0]}}"
    generation_kwargs: {until: [",", "\\n\\n"], max_gen_toks: 16}
    metric_list: [{metric: exact_match}]
  """,
}


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
  """Local tasks: a description and a file of data for each."""
  folder = tmp_path_factory.mktemp("tasks")
  rows = {
    "pages": [{"page": _words(900 * i, 40 + 90 * i)} for i in range(3)],
    "endings": [
      {
        "start": _words(50 * i, 20),
        "ends": [_words(50 * i + 20, 3), _words(7 * i, 2), _words(9 * i, 4)],
      }
      for i in range(6)
    ],
  }
  rows["going_on"] = rows["endings"][:3]
  for name, text in TASKS.items():
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    (folder / f"{name}.yaml").write_text(
      textwrap.dedent(f"""
        task: local_{name}
        dataset_path: json
        dataset_kwargs:
          data_files: {{test: {data}}}
          cache_dir: {folder / "cache"}
        test_split: test
      """)
      + textwrap.dedent(text)
    )
  return folder


def _evaluate(model, folder, tasks, **settings):
  found = lm_eval.simple_evaluate(
    model=model,
    tasks=tasks,
    task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    bootstrap_iters=0,
    **settings,
  )
  assert found is not None
  return found


# What loading a file of data warns of.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_command_scores_tasks_as_hf_does(
  exported, task_folder, tmp_path, run_command, capsys
):
  names = [f"local_{name}" for name in TASKS]
  status = run_command(
    "lm_eval",
    *("--model", "scca_jax", "--model_args", f"model={exported}"),
    *("--tasks", ",".join(names), "--include_path", task_folder),
    *("--batch_size", "auto", "--log_samples", "--output_path", tmp_path),
  )
  assert status == 0, capsys.readouterr().err
  (path,) = tmp_path.rglob("results_*.json")
  found = json.loads(path.read_text())
  expected = _evaluate(_hf(exported), task_folder, names)
  for name in names:
    for metric, value in expected["results"][name].items():
      if "stderr" not in metric and isinstance(value, float):
        assert found["results"][name][metric] == pytest.approx(value, rel=1e-5)
    (path,) = tmp_path.rglob(f"samples_{name}_*.jsonl")
    samples = map(json.loads, path.read_text().splitlines())
    for ours, theirs in zip(samples, expected["samples"][name], strict=True):
      assert ours["doc_hash"] == theirs["doc_hash"]
      for our_answer, their_answer in zip(
        ours["resps"], theirs["resps"], strict=True
      ):
        if name == "local_going_on":
          assert our_answer == their_answer
        elif name == "local_endings":
          assert our_answer[0][1] == str(their_answer[0][1])


RULER = pathlib.Path(lm_eval.__file__).parent / "tasks" / "ruler"


def test_the_needles_of_ruler_are_found_as_by_hf(adapter, tmp_path):
  """The harness's own `niah_single_1`, which needs no data from elsewhere."""
  pytest.importorskip("wonderwords", reason="RULER's words need wonderwords")
  import nltk

  # The harness downloads nltk's tokenizer unless it is there; the haystack of
  # this task is one sentence over and over, so nothing is read from it.
  (tmp_path / "tokenizers" / "punkt_tab").mkdir(parents=True)
  nltk.data.path.append(str(tmp_path))
  (tmp_path / "needles.yaml").write_text(f"""
include: {RULER / "niah_single_1.yaml"}
task: needles
metric_list:
  - metric: "512"
    aggregation: !function lm_eval.tasks.ruler.common_utils.aggregate_metrics
    higher_is_better: true
metadata: {{max_seq_lengths: [512], tokenizer: {adapter / "fused"}}}
""")
  models = (
    harness.SccaLM(str(adapter / "fused"), batch_size=2),
    _hf(adapter / "fused"),
  )
  ours, theirs = (
    _evaluate(model, tmp_path, ["needles"], limit=2) for model in models
  )
  assert ours["samples"] == theirs["samples"]
  assert ours["results"] == theirs["results"]


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    ({"pretrained": "llama"}, "unknown model_args pretrained: use model,"),
    ({"model": "missing"}, "model=missing does not exist"),
    ({"adapter": "missing"}, "adapter=missing does not exist"),
    ({"tokenizer": "missing"}, "tokenizer=missing does not exist"),
    ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got"),
    ({"batch_size": "many"}, "batch_size must be a number of at least 1, got"),
    ({"max_length": 0}, "max_length must be a number of at least 1, got 0"),
    ({"device": "cuda:1"}, "device=cuda:1: jax runs on cpu here"),
    ({"pattern": "training"}, "needs an adapter that records the pattern"),
    ({"pattern": "nothing"}, "nothing"),
    ({"pattern": "s2(causality='slot')"}, "depend on how far a batch is padd"),
  ],
)
def test_bad_model_args_are_one_line(settings, said):
  with pytest.raises((ValueError, FileNotFoundError)) as error:
    get_model("scca_jax").create_from_arg_obj(settings)
  assert said in str(error.value) and "\n" not in str(error.value)


def test_bad_requests_are_one_line(exported):
  ours = harness.SccaLM(str(exported), max_length=WINDOW)

  def generate(**settings):
    ours.generate_until(_requests("generate_until", [("a", settings)]))

  for settings, said in (
    ({"num_beams": 2}, "unknown gen_kwargs num_beams: use until,"),
    ({"max_gen_toks": WINDOW}, "max_gen_toks=64 must be at least 1 and below"),
  ):
    with pytest.raises(ValueError, match=said):
      generate(**settings)
  for pair in (("a", ""), ("a", _words(0, 2 * WINDOW))):
    with pytest.raises(ValueError, match="may be 1 to max_length=64"):
      ours.loglikelihood(_requests("loglikelihood", [pair]))
  ours = harness.SccaLM(str(exported), prefix_token_id=4096)
  with pytest.raises(ValueError, match="has the token 4096, but the model's"):
    ours.loglikelihood(_requests("loglikelihood", [("", "a")]))


def test_a_command_with_bad_model_args_ends_with_one_line(
  task_folder, run_command, capsys
):
  status = run_command(
    "lm_eval",
    *("--model", "scca_jax", "--model_args", "model=missing"),
    *("--tasks", str(task_folder / "pages.yaml")),
  )
  assert status == 2
  assert capsys.readouterr().err.splitlines()[-1] == (
    "error: model=missing does not exist."
  )


def test_its_entry_point_names_the_model_that_is_registered():
  settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
  group = "lm_eval.models"
  for name, value in settings["project"]["entry-points"][group].items():
    point = importlib.metadata.EntryPoint(name, value, group)
    assert point.load() is get_model(name) is harness.SccaLM
