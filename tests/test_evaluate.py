"""The command `evaluate` against the function it calls, and on bad input."""

import dataclasses
import json
import shutil
import types

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scca_jax import (
  adapters,
  bootstrap,
  convert,
  lora,
  loss_file,
  patterns,
  perplexity,
  tasks,
  tokenizer,
)
from scca_jax.llama import Llama
from scca_jax.llama_config import LlamaConfig
from scca_jax.rope import RopeScaling
from scca_jax.token_file import TokenFile, write_token_file

CONTEXT = 16
WORDS = "the ship sailed over a grey sea and no one saw it come home".split()


def _text(length, seed):
  return " ".join(np.random.default_rng(seed).choice(WORDS, length))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """A model without tokenizer, one with, an adapter, and a corpus."""
  folder = tmp_path_factory.mktemp("evaluate")
  texts = [_text(length, n) for n, length in enumerate((150, 5, 200))]
  (folder / "corpus.jsonl").write_text(
    "".join(json.dumps({"text": text}) + "\n" for text in texts),
    encoding="utf8",
  )
  words = tokenizer.train(texts, 300, folder / "words.model")
  write_token_file(texts, words, folder / "corpus.bin")
  tokens = np.fromfile(folder / "corpus.bin", np.uint16)
  tokens.tofile(folder / "bare.bin")
  config = LlamaConfig(
    vocab_size=words.vocab_size,
    hidden_size=8,
    intermediate_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    context_len=CONTEXT,
  )
  model = Llama(config, rngs=nnx.Rngs(0))
  convert.save_model(model, folder / "bare", dtype=jnp.float32)
  convert.save_model(
    model,
    folder / "model",
    dtype=jnp.float32,
    tokenizer_file=folder / "words.model",
  )
  extended = dataclasses.replace(
    config,
    context_len=2 * CONTEXT,
    rope_scaling=RopeScaling(
      kind="linear", factor=2.0, original_max_position_embeddings=CONTEXT
    ),
  )
  tuned = convert.load_model(
    folder / "model",
    config=extended,
    lora=lora.LoraConfig(rank=2),
    dtype=jnp.float32,
    rngs=nnx.Rngs(0),
  )
  adapter = nnx.state(tuned, lora.LoraParam)
  nnx.update(tuned, jax.tree.map(lambda x: x + 0.3, adapter))
  schedule = (patterns.s2(2, 8), patterns.local(2, 8))
  adapters.save_adapter(
    tuned,
    folder / "adapter",
    base_model=str(folder / "model"),
    patterns=schedule,
  )
  return types.SimpleNamespace(
    folder=folder,
    model=model,
    extended=extended,
    tuned=tuned,
    schedule=schedule,
    bos_id=words.bos_id,
    tokens=TokenFile.open(folder / "corpus.bin"),
  )


@pytest.fixture
def evaluate(run_command, files, tmp_path, capsys):
  """Runs the command on the tiny model; gives its JSON and what it printed."""

  def run(*args, model="model", corpus="corpus.bin"):
    output = tmp_path / "results.json"
    status = run_command(
      "evaluate",
      f"--model={files.folder / model}",
      *([f"--data={files.folder / corpus}"] if corpus else []),
      f"--output={output}",
      *args,
    )
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(output.read_text(encoding="utf8")), captured.out

  return run


def measure(model, files, context_len, **settings):
  """Returns the perplexity, in the command's batches: one compilation."""
  return perplexity.perplexity(
    model,
    files.tokens,
    context_len=context_len,
    batch_size=8192 // context_len,
    **settings,
  )


def expect(found, results):
  for name, field in (
    ("perplexity", "perplexity"),
    ("last_quarter_perplexity", "last_quarter"),
    ("num_windows", "num_windows"),
    ("num_tokens", "num_tokens"),
    ("num_skipped", "num_skipped"),
  ):
    assert found[name] == {
      str(n): pytest.approx(getattr(result, field), rel=1e-6)
      for n, result in results.items()
    }, name


def test_results_are_those_of_the_function_and_say_what_they_are(
  evaluate, files
):
  results = {n: measure(files.model, files, n) for n in (16, 8)}
  found, printed = evaluate("--context_lens=16,8")
  expect(found, results)
  assert found["model"] == str(files.folder / "model")
  assert found["data"] == str(files.folder / "corpus.bin")
  assert found["adapter"] is None and found["rope_scaling"] is None
  assert (found["protocol"], found["pattern"]) == ("longlora", "dense")
  assert (found["stride"], found["jax"]) == (256, jax.__version__)
  assert found["device"] == jax.devices()[0].device_kind
  lines = printed.splitlines()
  assert "longlora protocol, dense attention, windows every 256" in lines[1]
  assert len({len(line) for line in lines[2:5]}) == 1
  assert lines[3].split() == [
    "16",
    f"{results[16].num_windows}",
    f"{results[16].num_tokens:,}",
    f"{results[16].perplexity:.3f}",
    f"{results[16].last_quarter:.3f}",
  ]


def test_positions_are_the_losses_of_the_function(evaluate, files, tmp_path):
  path = tmp_path / "losses.npz"
  flags = ("--protocol=strided", "--stride=8")
  _, printed = evaluate("--context_lens=16,8", f"--positions={path}", *flags)
  assert f"wrote {path}" in printed
  found = loss_file.read(path)
  assert list(found.by_length) == [8, 16]
  for length, windows in found.by_length.items():
    kept = measure(
      files.model,
      files,
      length,
      protocol="strided",
      stride=8,
      keep_losses=True,
    ).by_window
    for field in dataclasses.fields(windows):
      np.testing.assert_allclose(
        getattr(windows, field.name), getattr(kept, field.name), rtol=1e-6
      )
  assert found.about["protocol"] == "strided"
  assert found.about["model"] == str(files.folder / "model")
  assert found.about["data"] == str(files.folder / "corpus.bin")
  # The same ids without their JSON: only the documents are not known.
  bare = tmp_path / "bare.npz"
  evaluate(f"--positions={bare}", *flags, model="bare", corpus="bare.bin")
  again = loss_file.read(bare)
  assert again.about["tokens_sha256"] == found.about["tokens_sha256"]
  assert not again.by_length[16].documents.any()
  assert found.by_length[16].documents.any()


def test_gain_is_the_estimate_of_the_functions_gain(evaluate, files):
  flags = ("--context_lens=16", "--num_windows=3")
  found, printed = evaluate(
    *flags, "--context_gain=16:4,16:12", "--gain_stride=1"
  )
  windows = measure(
    files.model, files, 16, num_windows=3, keep_losses=True
  ).by_window
  for short_len in (4, 12):
    gain = perplexity.context_gain(
      files.model, files.tokens, windows, short_len=short_len, stride=1
    )
    expected = bootstrap.estimate(gain, windows.documents)
    result = found["context_gain"]["16"][str(short_len)]
    assert result["mean"] == pytest.approx(expected.mean, abs=1e-6)
    assert result["interval"] == pytest.approx(expected.interval, abs=1e-6)
    assert result["stride"] == 1
  assert printed.splitlines()[-2].split()[:2] == ["16", "12"]


def test_bare_ids_need_no_tokenizer_and_default_to_the_models_length(
  evaluate, files
):
  found, _ = evaluate(model="bare", corpus="bare.bin")
  expect(
    found,
    {CONTEXT: measure(files.model, files, CONTEXT)},
  )


@pytest.mark.parametrize("protocol", perplexity.PROTOCOLS[1:])
def test_text_gives_what_its_token_file_gives(evaluate, files, protocol):
  result = measure(
    files.model,
    files,
    CONTEXT,
    protocol=protocol,
    stride=5,
    num_windows=7,
    bos_id=files.bos_id,
  )
  flags = (f"--protocol={protocol}", "--stride=5", "--num_windows=7")
  found, printed = evaluate(*flags, corpus="corpus.jsonl")
  expect(found, {CONTEXT: result})
  assert result.num_skipped == (protocol == "document")
  assert ("skipped" in printed) == (protocol == "document")
  assert f"{protocol} protocol" in printed
  assert "up to 7 evenly spaced windows" in printed
  again, _ = evaluate(*flags)
  assert again["perplexity"] == found["perplexity"]


@pytest.mark.parametrize("pattern", [None, "training", "scca_fixed"])
def test_adapter_is_measured_with_its_rope_scaling_and_any_pattern(
  evaluate, files, pattern
):
  schedule = {
    None: None,
    "training": files.schedule,
    "scca_fixed": patterns.scca_fixed(2, chunk_size=8),
  }[pattern]
  found, _ = evaluate(
    f"--adapter={files.folder / 'adapter'}",
    *([f"--pattern={pattern}"] if pattern else []),
  )
  expect(
    found,
    {2 * CONTEXT: measure(files.tuned, files, 2 * CONTEXT, patterns=schedule)},
  )
  if pattern == "training":
    # As a string that says it all.
    layers = patterns.parse(
      found["pattern"], num_heads=2, num_kv_heads=1, num_layers=2, seq_len=8
    )
    assert layers == files.schedule
  else:
    assert found["pattern"] == (pattern or "dense")
  assert found["rope_scaling"]["factor"] == 2.0


def test_a_model_is_interpolated_to_the_longest_length(
  evaluate, files, monkeypatch
):
  warnings = []
  monkeypatch.setattr(
    absl.logging, "warning", lambda text, *args: warnings.append(text % args)
  )
  interpolated = convert.load_model(
    files.folder / "model", config=files.extended, dtype=jnp.float32
  )
  found, _ = evaluate("--context_lens=16,32", "--rope_scaling=linear")
  expect(
    found,
    {n: measure(interpolated, files, n) for n in (16, 32)},
  )
  assert not warnings
  evaluate("--context_lens=32", "--num_windows=1")
  assert len(warnings) == 1 and "32 exceeds the model's 16" in warnings[0]


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--protocol=sliding"], "--protocol=sliding"),
    (["--dtype=int8"], "--dtype=int8"),
    (["--context_lens=16,long"], "got 16,long"),
    (["--context_lens="], "give lengths such as 1024,2048"),
    (["--context_lens=1"], "context_len must be at least 2"),
    (["--num_windows=0"], "num_windows must be at least 1"),
    (["--stride=8"], "stride of 256, got 8"),
    (
      ["--protocol=strided", "--stride=17"],
      "stride 17 exceeds context_len 16",
    ),
    (["--context_lens=99999"], "windows of 99,999 need 100,256"),
    (["--pattern=zigzag"], "unknown pattern 'zigzag'"),
    (["--pattern=training"], "needs the --adapter"),
    (["--implementation=magic"], "unknown implementation 'magic'"),
    (["--segment_len=8"], "segment_len=8 does not work with dense"),
    (["--batch_tokens=0"], "--batch_tokens must be at least 1"),
    (["--rope_factor=2"], "--rope_factor needs --rope_scaling"),
    (["--rope_scaling=linear"], "--rope_scaling needs the lengths"),
    (["--rope_scaling=bent", "--context_lens=32"], "bent"),
    (["--model=no-model"], "--model=no-model does not exist"),
    (["--adapter=no/adapter"], "--adapter=no/adapter does not exist"),
    (["--data=no.bin"], "--data=no.bin does not exist"),
    (["--tokenizer=no.model"], "--tokenizer=no.model does not exist"),
    (["--output=results.txt"], "--output must be a .json file"),
    (["--positions=losses.npy"], "--positions must be a .npz file"),
    (["--context_gain=16"], "pairs such as 32768:8192, got 16"),
    (["--context_gain=16:13"], "three quarters of them, got 16 and 13"),
    (["--context_gain=32:8"], "needs 32 among --context_lens, got 16"),
    (["--gain_stride=1"], "--gain_stride needs --context_gain"),
    (["--context_gain=16:8", "--gain_stride=0"], "at least 1, got 0"),
    (["--tasks=passkey,cew"], "unknown task 'cew': did you mean cwe?"),
    (["--tasks=qa"], "the task qa needs a file"),
    (["--tasks=qa", "--qa_data=no.json"], "--qa_data=no.json does not exist"),
    (["--generate"], "--generate needs --tasks"),
    (["--heat_map=a.png"], "--heat_map needs --tasks"),
    (["--tasks=vt", "--heat_map=a.jpg"], "--heat_map must be a .png file"),
    (["--tasks=vt", "--generate", "--mesh=sequence=2"], "whole sequences"),
    (["--mesh=rows=2"], "cannot read 'rows=2' of the mesh"),
    (["--mesh=sequence=3"], "mesh.sequence=3 cannot cut 16 tokens"),
    (["--mesh=tensor=2"], "mesh.tensor=2 does not divide 1 key/value heads"),
    (
      ["--protocol=document", "--stride=4"],
      "needs the document ends",
    ),
  ],
)
def test_bad_flags_end_in_one_line(
  run_command, files, capsys, monkeypatch, flags, message
):
  def refuse(*args, **kwargs):
    raise AssertionError("weights were loaded before the flags were checked")

  monkeypatch.setattr(convert, "load_model", refuse)
  status = run_command(
    "evaluate",
    f"--model={files.folder / 'bare'}",
    f"--data={files.folder / 'bare.bin'}",
    *flags,
  )
  captured = capsys.readouterr()
  assert status == 2
  assert captured.out == ""
  assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
  assert message in captured.err


def test_rope_scaling_is_not_put_on_an_adapter(run_command, files, capsys):
  status = run_command(
    "evaluate",
    f"--model={files.folder / 'model'}",
    f"--adapter={files.folder / 'adapter'}",
    "--rope_scaling=linear",
    "--context_lens=32",
  )
  assert status == 2
  assert (
    "the adapter comes with the one it was tuned" in capsys.readouterr().err
  )


def test_rope_scaling_can_be_said_for_an_adapter_of_peft(
  evaluate, files, tmp_path, monkeypatch
):
  warnings = []
  monkeypatch.setattr(
    absl.logging, "warning", lambda text, *args: warnings.append(text % args)
  )
  # What PEFT writes has no scca_config.json.
  plain = tmp_path / "plain"
  shutil.copytree(files.folder / "adapter", plain)
  (plain / "scca_config.json").unlink()
  found, _ = evaluate(
    f"--adapter={plain}",
    f"--context_lens={2 * CONTEXT}",
    "--rope_scaling=linear",
  )
  expect(found, {2 * CONTEXT: measure(files.tuned, files, 2 * CONTEXT)})
  assert not warnings
  evaluate(f"--adapter={plain}", "--num_windows=1")
  assert "does not record which rope scaling" in warnings[0]


def test_an_adapter_without_its_pattern_cannot_be_run_with_it(
  run_command, files, tmp_path, capsys
):
  adapters.save_adapter(files.tuned, tmp_path / "adapter", base_model="model")
  status = run_command(
    "evaluate",
    f"--model={files.folder / 'model'}",
    f"--adapter={tmp_path / 'adapter'}",
    f"--data={files.folder / 'corpus.bin'}",
    "--pattern=training",
  )
  assert status == 2
  assert "does not record which pattern" in capsys.readouterr().err


def test_text_that_is_too_short_is_named_by_its_own_path(
  run_command, files, capsys
):
  status = run_command(
    "evaluate",
    f"--model={files.folder / 'model'}",
    f"--data={files.folder / 'corpus.jsonl'}",
    "--context_lens=99999",
  )
  assert status == 2
  assert f"{files.folder / 'corpus.jsonl'} has" in capsys.readouterr().err


def test_scores_of_tasks_are_those_of_the_function(evaluate, files):
  flags = ("--tasks=passkey,copy,vt", "--num_samples=3", "--seed=5")
  found, printed = evaluate(*flags, "--context_lens=2000", corpus=None)
  words = tokenizer.load(files.folder / "model")
  assert list(found["tasks"]) == ["passkey", "copy", "vt"]
  for name, scores in found["tasks"].items():
    samples = tasks.get(name).samples(words, 2000, 3, 5)
    score = tasks.score(files.model, samples, context_len=2000, batch_size=4)
    expected = json.loads(json.dumps(dataclasses.asdict(score)))
    assert expected.pop("ruler_score") is None
    assert expected.pop("ruler_interval") is None
    assert scores == {"2000": expected}
  assert found["seed"] == 5 and "perplexity" not in found
  lines = printed.splitlines()
  assert lines[1] == "3 samples each, dense attention, seed 5"
  assert [line.split()[0] for line in lines[2:6]] == [
    "task",
    "passkey",
    "copy",
    "vt",
  ]
  # The loss on copies is no accuracy.
  assert lines[6].split()[:3] == ["mean", "of", "2"]


def test_tasks_alone_have_no_positions(run_command, files, capsys):
  status = run_command(
    "evaluate",
    f"--model={files.folder / 'model'}",
    "--tasks=copy",
    "--positions=losses.npz",
  )
  assert status == 2
  assert "--positions is measured on text: give --data" in (
    capsys.readouterr().err
  )


def test_tasks_and_perplexity_are_measured_together(evaluate, files):
  found, _ = evaluate("--tasks=copy", "--num_samples=1", "--context_lens=260")
  expect(found, {260: measure(files.model, files, 260)})
  assert found["tasks"]["copy"]["260"]["num_samples"] == 1


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (
      ["--tasks=copy", "--context_lens=100"],
      "copy needs a context_len of at least 257 tokens, got 100.",
    ),
    (
      ["--tasks=copy", "--context_lens=300", "--num_samples=0"],
      "num_samples must be at least 1, got 0.",
    ),
    (
      ["--tasks=vt", "--context_lens=2000", "--heat_map=a.png"],
      "--heat_map needs a task with depths, such as passkey: vt has none.",
    ),
  ],
)
def test_tasks_that_cannot_be_made_end_in_one_line(
  run_command, files, capsys, monkeypatch, flags, message
):
  monkeypatch.delattr(convert, "load_model")
  status = run_command("evaluate", f"--model={files.folder / 'model'}", *flags)
  captured = capsys.readouterr()
  assert status == 2 and captured.out == ""
  assert captured.err == f"error: {message}\n"


def test_tasks_are_generated_drawn_and_kept(
  evaluate, files, tmp_path, monkeypatch
):
  flags = ("--tasks=passkey,vt", "--num_samples=2", "--context_lens=1600")
  plot = tmp_path / "heat.png"
  found, printed = evaluate(
    *flags, "--generate", f"--heat_map={plot}", corpus=None
  )
  assert plot.read_bytes().startswith(b"\x89PNG")
  for scores in found["tasks"].values():
    # The model is random: it writes none of the references.
    assert scores["1600"]["ruler_score"] == 0
    assert scores["1600"]["ruler_interval"] == scores["1600"]["interval"]
  assert "RULER score" in printed.splitlines()[2]
  cache = tmp_path / "cache" / "scca_jax" / "samples"
  kept = {path.name.split("-")[0] for path in cache.iterdir()}
  assert kept == {"passkey", "vt"}
  monkeypatch.delattr(tasks.cache, "_packed")
  again, _ = evaluate(*flags, corpus=None)
  for name, scores in again["tasks"].items():
    hashes = [
      t[name]["1600"]["prompts_sha256"]
      for t in (again["tasks"], found["tasks"])
    ]
    assert hashes[0] == hashes[1] and "ruler_score" not in scores["1600"]


def test_a_mesh_changes_no_result(evaluate, files):
  flags = (
    "--tasks=passkey,copy",
    "--num_samples=3",
    "--context_lens=264",
    "--num_windows=3",
  )
  one, _ = evaluate(*flags)
  mesh, _ = evaluate(*flags, "--mesh=fsdp=2,sequence=2")
  assert mesh["mesh"] == "fsdp=2,sequence=2"
  assert mesh["perplexity"]["264"] == pytest.approx(
    one["perplexity"]["264"], rel=1e-5
  )
  for name, scores in one["tasks"].items():
    found = mesh["tasks"][name]["264"]
    for field, value in scores["264"].items():
      if field == "answer_loss":
        assert found[field] == pytest.approx(value, rel=1e-5)
      elif field != "by_depth":
        assert found[field] == value
