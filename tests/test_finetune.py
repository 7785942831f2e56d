"""The commands `pretrain` and `finetune`, as a user runs them."""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments.shared import loop, resolve
from scca_jax import assets, file_lock, tokenizer, training

ROOT = pathlib.Path(__file__).parent.parent
# Small enough that a step takes a few milliseconds.
SHORT = (
  "--config.training.seq_len=64",
  "--config.training.batch_size=2",
  "--config.training.steps=12",
  "--config.training.checkpoint_every=3",
  "--config.evaluation.context_lens=(16,64)",
  "--config.evaluation.num_windows=2",
)


def _command(name, *args):
  return [sys.executable, "-m", f"experiments.{name}", *map(str, args)]


def _environment(**changes):
  # One device, as a user has it: the claim is bitwise there.
  flags = re.sub(r"--xla_force_host\S*", "", os.environ["XLA_FLAGS"])
  return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"} | changes


def _execute(*command, **changes):
  return subprocess.run(
    command,
    cwd=ROOT,
    env=_environment(**changes),
    capture_output=True,
    text=True,
    timeout=300,
  )


def _run(name, *args, **changes):
  return _execute(*_command(name, *args), **changes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp("corpus")
  rng = random.Random(0)
  words = "the ship sailed over a grey sea and no one saw it come home".split()
  text = " ".join(rng.choice(words) for _ in range(6000))
  (folder / "train.txt").write_text(text[:24000], encoding="utf8")
  (folder / "test.txt").write_text(text[24000:], encoding="utf8")
  return folder


@pytest.fixture(scope="module")
def base(corpus):
  """A model of a few thousand parameters, made by `pretrain`."""
  output = corpus / "pretrain"
  done = _run(
    "pretrain",
    f"--data={corpus / 'train.txt'}",
    f"--output_dir={output}",
    f"--config.data.test={corpus / 'test.txt'}",
    f"--config.data.tokenizer={assets.MODEL / 'tokenizer.model'}",
    "--config.architecture.hidden_size=16",
    "--config.architecture.intermediate_size=24",
    "--config.architecture.num_layers=2",
    "--config.architecture.num_heads=4",
    "--config.architecture.num_kv_heads=2",
    "--config.training.seq_len=16",
    "--config.training.steps=6",
    "--config.training.dtype=float32",
    "--config.evaluation.num_windows=2",
    "--config.evaluation.every=3",
    "--config.evaluation.context_lens=(16,)",
    "--config.save_dtype=float32",
  )
  assert done.returncode == 0, done.stderr
  return output / "model"


@pytest.fixture(scope="module")
def arguments(corpus, base):
  return (
    f"--model={base}",
    f"--data={corpus / 'train.txt'}",
    f"--config.data.test={corpus / 'test.txt'}",
    *SHORT,
  )


@pytest.fixture(scope="module")
def finished(corpus, arguments):
  output = corpus / "undisturbed"
  done = _run("finetune", f"--output_dir={output}", *arguments)
  assert done.returncode == 0, done.stderr
  return output, done.stdout


def _losses(output):
  lines = (output / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  return {r["step"]: r["loss"] for r in records if "loss" in r}


def _num_logged(output):
  metrics = output / "metrics.jsonl"
  return metrics.read_text().count("\n") if metrics.exists() else 0


def _same_end(a, b):
  assert _losses(a) == _losses(b)
  first = load_file(a / "adapter" / "adapter_model.safetensors")
  second = load_file(b / "adapter" / "adapter_model.safetensors")
  assert first.keys() == second.keys()
  for name, value in first.items():
    np.testing.assert_array_equal(value, second[name], err_msg=name)
  summaries = [json.loads((x / "summary.json").read_text()) for x in (a, b)]
  assert summaries[0]["perplexity"] == summaries[1]["perplexity"]


def test_a_run_leaves_all_that_was_promised(finished):
  output, printed = finished
  for name in ("config.json", "metrics.jsonl", "checkpoints", "adapter"):
    assert (output / name).exists(), name
  adapter = json.loads((output / "adapter/adapter_config.json").read_text())
  assert adapter["peft_type"] == "LORA"
  summary = json.loads((output / "summary.json").read_text())
  assert summary["pattern"] == "s2"
  assert (summary["pretrained_len"], summary["target_len"]) == (16, 64)
  assert summary["steps"] == 12
  assert summary["tokens_per_second"] > 0
  assert summary["peak_bytes"] is None  # A CPU does not say.
  perplexity = summary["perplexity"]
  assert perplexity["protocol"] == "longlora"
  for variant in ("untuned", "interpolated", "tuned"):
    assert set(perplexity[variant]) == {"16", "64"}
    assert all(value > 1 for value in perplexity[variant].values())
    assert re.search(rf"^{variant} ", printed, re.MULTILINE)
  assert perplexity["untuned"]["64"] != perplexity["interpolated"]["64"]
  assert "last quarter" in printed
  assert str(output / "adapter") in printed
  # The adapter's card has what it takes to load and to repeat it.
  card = (output / "adapter" / "README.md").read_text(encoding="utf8")
  assert "peft.PeftModel.from_pretrained" in card
  assert "'rope_type': 'yarn', 'factor': 4.0" in card
  assert "| `training.steps` | 12 |" in card
  tuned = " | ".join(f"{perplexity['tuned'][n]:.2f}" for n in ("16", "64"))
  assert f"| tuned | {tuned} |" in card
  assert sorted(_losses(output)) == list(range(1, 13))
  assert list((output / "tensorboard").glob("events*"))


def test_a_run_ends_with_a_report(finished, arguments):
  output, printed = finished
  assert f"report: {output / 'report.md'}" in printed
  assert (output / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
  report = (output / "report.md").read_text(encoding="utf8")
  assert ": 16 to 64 tokens" in report.splitlines()[0]
  assert f"scca finetune --output_dir={output}" in report
  assert "![Loss by position, and of training](report.png)" in report
  summary = json.loads((output / "summary.json").read_text())
  found, quarter = summary["perplexity"], summary["last_quarter_perplexity"]
  for name in ("untuned", "interpolated", "tuned"):
    cells = [found[name]["16"], found[name]["64"], quarter[name]["64"]]
    row = " | ".join(f"{value:.2f}" for value in cells)
    assert f"| {name} | {row} |" in report
  # Mean losses are logarithms of perplexities.
  for name in ("untuned", "interpolated"):
    pairs = [(found["tuned"]["64"], found[name]["64"])]
    pairs.append((quarter["tuned"]["64"], quarter[name]["64"]))
    row = re.search(rf"^\| tuned - {name} \| (.*) \|$", report, re.MULTILINE)
    assert row
    for cell, (tuned, other) in zip(row[1].split(" | "), pairs, strict=True):
      mean, low, high = map(float, re.findall(r"[+-][\d.]+", cell))
      assert mean == pytest.approx(np.log(tuned / other), abs=1e-4)
      assert low <= mean <= high
  losses = _losses(output)
  assert f"| loss of the last step | {losses[12]:.4f} |" in report
  assert "| `config.training.steps` | `12` | `100` |" in report
  assert "`config.training.seed`" not in report


def test_pretraining_ends_with_a_report_too(base):
  output = base.parent
  report = (output / "report.md").read_text(encoding="utf8")
  assert (output / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
  summary = json.loads((output / "summary.json").read_text())
  found = summary["perplexity"]["16"]
  assert f"| pretrained | {found:.2f} |" in report
  assert f"A model of {summary['num_params']:,} parameters" in report
  assert "| `config.architecture.hidden_size` | `16` | `256` |" in report


def test_a_log_gets_lines_and_no_bar(finished):
  output, printed = finished
  lines = re.findall(r"^step (\d+)/12: loss ([\d.]+)(.*)$", printed, re.M)
  assert [int(step) for step, _, _ in lines] == list(range(1, 13))
  losses = _losses(output)
  for step, loss, rest in lines:
    assert float(loss) == pytest.approx(losses[int(step)], abs=6e-4)
    if int(step) > 3:
      assert re.fullmatch(r", [\d,]+ tokens/s, \d+:\d\d:\d\d left", rest), rest
  assert lines[-1][2].endswith(" 0:00:00 left")


@pytest.mark.slow
def test_tasks_that_are_asked_for_are_in_the_report(
  run_command, base, arguments, tmp_path
):
  asked = (
    "--config.training.steps=1",
    "--config.evaluation.context_lens=(512,)",
    "--config.data.test=none",
    "--config.evaluation.tasks=passkey,copy",
    "--config.evaluation.num_samples=2",
  )
  output = tmp_path / "run"
  assert not run_command(
    "finetune", f"--output_dir={output}", *arguments, *asked
  )
  scores = json.loads((output / "summary.json").read_text())["tasks"]
  assert set(scores) == {"untuned", "interpolated", "tuned"}
  report = (output / "report.md").read_text(encoding="utf8")
  for task, field in (("passkey", "accuracy"), ("copy", "answer_loss")):
    cells = r" \| ".join(
      f"{scores[model][task]['512'][field]:.3f}"
      for model in ("untuned", "interpolated", "tuned")
    )
    assert re.search(
      rf"^\| {task}[\w ()]* \| 512 \| {cells} \|$",
      report,
      re.MULTILINE,
    ), report


def _records(content):
  """Yields the records of a file in LevelDB's log format."""
  place, parts = 7, b""
  while place < len(content):
    left = 32768 - place % 32768
    if left < 7:
      place += left
      continue
    length = int.from_bytes(content[place + 4 : place + 6], "little")
    kind = content[place + 6]
    parts += content[place + 7 : place + 7 + length]
    place += 7 + length
    if kind in (1, 4):  # A whole record, or the last part of one.
      yield parts
      parts = b""


@pytest.mark.slow
def test_weights_and_biases_gets_the_metrics_offline(arguments, tmp_path):
  pytest.importorskip("wandb")
  from wandb.proto import wandb_internal_pb2

  output = tmp_path / "run"
  done = _run(
    "finetune",
    f"--output_dir={output}",
    "--wandb=tests",
    *arguments,
    WANDB_MODE="offline",
    WANDB_SILENT="true",
  )
  assert done.returncode == 0, done.stderr
  (file,) = output.glob("wandb/offline-run-*/run-*.wandb")
  assert (output / "wandb_id").read_text() in file.name
  losses = {}
  for data in _records(file.read_bytes()):
    record = wandb_internal_pb2.Record()
    record.ParseFromString(data)
    if record.WhichOneof("record_type") == "history":
      items = {
        item.key or item.nested_key[0]: json.loads(item.value_json)
        for item in record.history.item
      }
      if "loss" in items:
        losses[items.get("_step", record.history.step.num)] = items["loss"]
  assert losses == _losses(output)


def test_a_run_may_tune_all_parameters_and_end_with_dense_steps(
  corpus, arguments
):
  output = corpus / "full"
  done = _run(
    "finetune",
    f"--output_dir={output}",
    *arguments,
    "--config.tuning=full",
    "--config.training.steps=4",
    "--config.training.dense_fraction=0.5",
    "--config.optimizer.rewarmup_steps=2",
    "--config.optimizer.warmup_steps=0",
    "--config.optimizer.schedule=constant",
  )
  assert done.returncode == 0, done.stderr
  assert not (output / "adapter").exists()
  assert str(output / "model") in done.stdout
  lines = (output / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  rates = [r["learning_rate"] for r in records if "learning_rate" in r]
  np.testing.assert_allclose(np.divide(rates, rates[0]), [1, 1, 0.5, 1])
  done = _run(
    "evaluate",
    f"--model={output / 'model'}",
    f"--data={corpus / 'test.txt'}",
    "--context_lens=16,64",
    "--num_windows=2",
    f"--output={output / 'again.json'}",
  )
  assert done.returncode == 0, done.stderr
  again = json.loads((output / "again.json").read_text())["perplexity"]
  summary = json.loads((output / "summary.json").read_text())["perplexity"]
  for length, value in summary["tuned"].items():
    np.testing.assert_allclose(again[length], value, rtol=1e-5)
    assert value != summary["interpolated"][length]


# Says how many bytes of arrays there are before the first step, and at each
# evaluation.
_WATCHED = """
import jax
from experiments import finetune
from experiments.shared import cli, resolve
from scca_jax import training
def watch(module, name):
  function = getattr(module, name)
  def watched(*args, **kwargs):
    print("live", sum(array.nbytes for array in jax.live_arrays()))
    return function(*args, **kwargs)
  setattr(module, name, watched)
watch(training, "compile_step")
watch(resolve.Evaluator, "at_end")
cli.run(finetune.main, config=finetune._CONFIG)
"""


def _live_bytes(*args):
  done = _execute(sys.executable, "-c", _WATCHED, *map(str, args))
  assert done.returncode == 0, done.stderr
  return [int(n) for n in re.findall(r"^live (\d+)$", done.stdout, re.M)]


def test_a_loss_that_is_not_finite_stops_a_run_and_metrics_stay_json(tmp_path):
  line = {"step": 3, "skipped_in_a_row": 1, "loss": float("nan")}
  with pytest.raises(ValueError, match="loss of step 3 is not finite"):
    loop._check_finite(line, False)
  metrics = loop.Metrics(tmp_path, 0)
  metrics.write([line, {"step": 3, "evaluation": {"64": float("inf")}}])
  text = (tmp_path / "metrics.jsonl").read_text()
  metrics.close()

  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  rows = [json.loads(x, parse_constant=refuse) for x in text.splitlines()]
  assert rows[0]["loss"] is None and rows[1]["evaluation"] == {"64": None}


def test_foreign_metrics_are_refused_and_half_a_line_is_dropped(
  tmp_path,
):
  path = tmp_path / "metrics.jsonl"
  lines = ['{"step": 1, "loss": 2.5}', '{"step": 2, "loss": null}']
  path.write_text("\n".join([*lines, '{"step": 3, "lo']))
  assert loop.read_metrics(tmp_path) == list(map(json.loads, lines))
  metrics = loop.Metrics(tmp_path, 1)
  metrics.close()
  assert path.read_text() == lines[0] + "\n"
  for foreign in (
    '{"loss": 1}',
    "[1]",
    "3",
    '{"step": "1"}',
    '{"step": 1, "loss": "1"}',
    "\udcff",
    "[" * 100_000,
    "",
  ):
    text = "\n".join([*lines, foreign, *lines, ""])
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="jsonl, line 3 is not from a run"):
      loop.read_metrics(tmp_path)


def test_what_is_no_file_of_a_run_is_named(tmp_path):
  config = tmp_path / "config.json"
  for content in ("{", "[" * 100_000):
    config.write_text(content)
    with (
      pytest.raises(ValueError, match="not valid JSON .*use another"),
      loop.output_dir(str(tmp_path), {}),
    ):
      pass
  for name in ("config.json", "metrics.jsonl"):
    (tmp_path / "config.json").unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with (
      pytest.raises(ValueError, match=f"{name} is .*use another"),
      loop.output_dir(str(tmp_path), {}),
    ):
      pass


def test_second_run_in_a_folder_ends_in_one_line(finished, arguments):
  output, _ = finished
  with file_lock.only_process(output):
    done = _run("finetune", f"--output_dir={output}", *arguments)
  assert done.returncode == 2
  assert f"{output} is in use by process {os.getpid()} on " in done.stderr
  assert not list(output.glob(".*"))


@pytest.mark.slow
def test_no_model_is_held_beside_another(base, arguments, tmp_path):
  output = tmp_path / "run"
  first, *evaluations = _live_bytes(f"--output_dir={output}", *arguments)
  weights = load_file(base / "model.safetensors").values()
  one = sum(weight.nbytes for weight in weights)
  assert len(evaluations) == 3  # Untuned, interpolated and tuned.
  assert one < max(evaluations) < 1.5 * one
  # A run that resumes starts with no more than a new one.
  shutil.rmtree(output / "checkpoints" / "12")
  again = _live_bytes(f"--output_dir={output}", *arguments)
  assert again == [first, *evaluations]


def test_a_finished_run_is_not_done_again(finished, arguments):
  output, printed = finished
  before = (output / "metrics.jsonl").read_text()
  again = _run("finetune", f"--output_dir={output}", *arguments)
  assert again.returncode == 0, again.stderr
  assert (output / "metrics.jsonl").read_text() == before
  table = [x for x in printed.splitlines() if x.startswith("tuned")]
  assert table[0] in again.stdout


def _kill_once(command, *, when):
  """Starts the command and kills it as soon as `when()` holds."""
  process = subprocess.Popen(
    command,
    cwd=ROOT,
    env=_environment(),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  deadline = time.monotonic() + 120
  while process.poll() is None and time.monotonic() < deadline and not when():
    time.sleep(0.002)
  process.kill()
  process.wait()


@pytest.mark.slow
def test_a_killed_run_ends_as_if_undisturbed(finished, arguments, tmp_path):
  output = tmp_path / "killed"
  command = _command("finetune", f"--output_dir={output}", *arguments)
  # In the middle of steps and saves: once some steps are logged, and again.
  for logged in (2, 7):
    metrics = output / "metrics.jsonl"
    _kill_once(command, when=lambda n=logged: _num_logged(output) >= n)
    # Cut in the middle of a line, as a kill during writing would leave it.
    if metrics.exists():
      with metrics.open("a") as file:
        file.write('{"step": 99, "lo')
  # Compiled again, as on another day, with bit-equal results.
  done = _run(
    "finetune",
    f"--output_dir={output}",
    *arguments,
    JAX_ENABLE_COMPILATION_CACHE="false",
  )
  assert done.returncode == 0, done.stderr
  _same_end(finished[0], output)


@pytest.mark.slow
def test_a_run_on_segments_is_that_on_whole_sequences_killed_or_not(
  corpus, tmp_path
):
  # The embedded model; the sequences are four segments and a part of one.
  arguments = (
    f"--data={corpus / 'train.txt'}",
    f"--config.data.test={corpus / 'test.txt'}",
    *SHORT,
    "--config.pattern=scca_fixed(chunk_size=32)",
    "--config.training.seq_len=270",
    "--config.training.num_micro_batches=2",
    "--config.lora.train_embeddings=True",
  )
  cut = (
    "--config.training.segment_len=64",
    "--config.training.offload_segments=True",
    "--config.training.remat=layer",
  )
  folders = {name: tmp_path / name for name in ("whole", "cut", "killed")}
  for name, settings in (("whole", ()), ("cut", cut)):
    done = _run(
      "finetune", f"--output_dir={folders[name]}", *arguments, *settings
    )
    assert done.returncode == 0, done.stderr
  whole, parts = (
    list(_losses(folders[name]).values()) for name in ("whole", "cut")
  )
  assert len(whole) == 12
  np.testing.assert_allclose(parts, whole, rtol=1e-5)
  command = _command(
    "finetune", f"--output_dir={folders['killed']}", *arguments, *cut
  )
  _kill_once(command, when=lambda: _num_logged(folders["killed"]) >= 7)
  done = _execute(*command)
  assert done.returncode == 0, done.stderr
  _same_end(folders["cut"], folders["killed"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_and_goes_on(finished, arguments, tmp_path, number):
  output = tmp_path / "stopped"
  process = subprocess.Popen(
    _command("finetune", f"--output_dir={output}", *arguments),
    cwd=ROOT,
    env=_environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )
  while process.poll() is None and _num_logged(output) < 1:
    time.sleep(0.002)
  process.send_signal(number)
  printed, _ = process.communicate(timeout=120)
  if process.returncode == 0:
    # The run was through before the signal came.
    assert sorted(_losses(output)) == list(range(1, 13))
  else:
    assert process.returncode == 128 + number
    step = int(re.search(r"after step (\d+)", printed).group(1))
    assert (output / "checkpoints" / str(step)).is_dir()
  done = _run("finetune", f"--output_dir={output}", *arguments)
  assert done.returncode == 0, done.stderr
  _same_end(finished[0], output)


@pytest.mark.slow
def test_a_full_disk_keeps_earlier_checkpoints(finished, arguments, tmp_path):
  output = tmp_path / "full"
  command = _command("finetune", f"--output_dir={output}", *arguments)
  checkpoints = output / "checkpoints"

  def whole():
    return [p.name for p in checkpoints.glob("*") if p.name.isdigit()]

  _kill_once(command, when=whole)
  before = whole()

  # Files over some KiB fail to be written, as all do on a full disk.
  full = _execute("sh", "-c", 'ulimit -f 8; exec "$@"', "sh", *command)
  assert full.returncode == 2, full.stderr
  errors = [x for x in full.stderr.splitlines() if x.startswith("error: ")]
  assert len(errors) == 1, full.stderr
  assert "Traceback" not in full.stderr
  assert before
  assert set(before) <= set(whole())
  done = _run("finetune", f"--output_dir={output}", *arguments)
  assert done.returncode == 0, done.stderr
  _same_end(finished[0], output)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (["--model={tmp}/none"], "none"),
    (["--data={tmp}/none.bin"], "none.bin"),
    (["--model={tmp}/nan"], "norm.weight holds a NaN"),
    (["--data={tmp}/empty.bin"], "empty"),
    (["--data={tmp}/odd.bin"], "odd.bin"),
    (["--data={tmp}/beyond.bin"], "60000"),
    (["--data={tmp}/short.bin"], "short"),
    (["--data={tmp}/latin1.txt"], "latin1.txt"),
    (["--config.pattern=flow"], "'flow': did you mean 'scca_flow'"),
    (["--config.pattern=scca_fixed(dilation=2)"], "dilation"),
    (["--config.pattern.name=s2"], "pattern"),
    (["--config.training.steps=many"], "steps"),
    (["--config.training.stepz=3"], "stepz"),
    (["--config={tmp}/none.py"], "none.py"),
    (["--config.lora.targets=('z_proj',)"], "z_proj"),
    (["--config.rope.kind=cubic"], "cubic"),
    (["--config.evaluation.protocol=mean"], "mean"),
    (["--config.evaluation.tasks=paskey"], "did you mean passkey"),
    (
      ["--config.evaluation.tasks=passkey"],
      "passkey needs a context_len",
    ),
    (["--config.training.segment_len=24"], "multiple of the chunk, 16"),
    (["--config.training.implementation=fast"], "fast"),
    (["--config.evaluation.context_lens=(16,99999)"], "99,?999"),
  ],
)
def test_bad_input_is_one_line(
  run_command, capsys, base, arguments, tmp_path, change, said
):
  shutil.copytree(base, tmp_path / "nan")
  tensors = load_file(base / "model.safetensors")
  tensors["model.norm.weight"][3] = np.nan
  save_file(tensors, tmp_path / "nan" / "model.safetensors")
  (tmp_path / "empty.bin").touch()
  (tmp_path / "odd.bin").write_bytes(b"\0" * 2001)
  ids = np.zeros(4000, np.uint16)
  ids.tofile(tmp_path / "short.bin")
  np.zeros(30, np.uint16).tofile(tmp_path / "short.bin")
  ids[3] = 60000
  ids.tofile(tmp_path / "beyond.bin")
  (tmp_path / "latin1.txt").write_bytes("caf\xe9 ".encode("latin1") * 500)
  change = [c.format(tmp=tmp_path) for c in change]
  output = tmp_path / "run"
  # The last of a flag counts.
  status = run_command(
    "finetune", f"--output_dir={output}", *arguments, *change
  )
  errors = [
    line
    for line in capsys.readouterr().err.splitlines()
    if line.startswith("error: ")
  ]
  assert status == 2
  assert len(errors) == 1
  assert re.search(said, errors[0])
  # Nothing that the corrected command would take for another run.
  assert not (output / "config.json").exists()


def test_a_dry_run_tells_what_it_would_do_and_writes_nothing(
  run_command, capsys, base, tmp_path
):
  np.zeros(1000, np.uint16).tofile(tmp_path / "a.bin")
  status = run_command(
    "finetune",
    "--dry_run",
    f"--model={base}",
    f"--data={tmp_path / 'a.bin'}",
    f"--output_dir={tmp_path / 'run'}",
    "--config.training.steps=50",
    "--config.training.seq_len=64",
    "--config.training.batch_size=2",
    "--config.pattern=layers(local(chunk_size=16), dense=(1,))",
    "--config.training.dense_fraction=0.2",
  )
  printed = capsys.readouterr().out
  assert status == 0
  assert not (tmp_path / "run").exists()
  assert "  config.training.steps = 50\n" in printed
  # In 4 heads: 4 chunks of 16 tokens, and all pairs up to the diagonal.
  local, dense = 4 * 4 * 16 * 17 // 2, 4 * 64 * 65 // 2
  lines = [line.split() for line in printed.splitlines()]
  assert ["0", f"{local:,}", f"{local / dense:.3f}"] in [x[:3] for x in lines]
  assert ["1", f"{dense:,}", "1.000", "dense"] in [x[:4] for x in lines]
  assert "128 tokens per step, 6,400 in 50 steps, the last 10 dense" in printed
  assert "1,000 tokens, read 6.40 times" in printed
  assert re.search(r"compiles to 0\.\d\d GiB", printed)


def test_a_dry_run_refuses_a_length_beyond_all_memory(
  run_command, capsys, base
):
  sizes = ("seq_len=1000000000", "batch_size=1000")
  args = [f"--config.training.{size}" for size in sizes]
  assert run_command("finetune", "--dry_run", f"--model={base}", *args) == 2
  said = "1,000,000,000,000 tokens of width 16 take 59,604 GiB"
  assert said in capsys.readouterr().err


def test_a_run_with_other_settings_is_not_mixed_in(
  run_command, capsys, finished, arguments
):
  status = run_command(
    "finetune",
    f"--output_dir={finished[0]}",
    *arguments,
    "--config.training.seed=7",
  )
  assert status == 2
  assert "training.seed" in capsys.readouterr().err


@pytest.mark.slow
def test_missing_rope_scaling_is_warned_of(arguments, tmp_path):
  done = _run(
    "finetune",
    f"--output_dir={tmp_path / 'run'}",
    *arguments,
    "--config.rope.kind=None",
    "--config.training.steps=1",
  )
  assert done.returncode == 0, done.stderr
  assert "exceeds the pretrained length" in done.stderr


@pytest.mark.parametrize(
  ("dtype", "said"),
  [("float16", "bfloat16 or float32"), ("float32", "lower the learning rate")],
)
def test_a_run_stops_after_many_overflows_in_a_row(dtype, said):
  line = {"step": 70, "skipped_in_a_row": training.MAX_SKIPPED_IN_A_ROW - 1}
  loop._check_finite(line, dtype)
  line["skipped_in_a_row"] += 1
  with pytest.raises(
    ValueError, match=f"30 steps in a row, up to step 70.*{said}"
  ):
    loop._check_finite(line, dtype)


@pytest.mark.slow
def test_float16_ends_where_float32_does(run_command, tmp_path):
  """The default run with PI, shortened in steps, sequences and windows."""
  ends = {}
  for dtype in ("float32", "float16"):
    folder = tmp_path / dtype
    assert not run_command(
      "finetune",
      f"--output_dir={folder}",
      f"--config.training.dtype={dtype}",
      f"--config.training.param_dtype={dtype}",
      # Without tuning it is far worse than YaRN, so there is much to learn.
      "--config.rope.kind=linear",
      "--config.training.steps=24",
      "--config.training.seq_len=512",
      "--config.evaluation.context_lens=(512,)",
      "--config.evaluation.num_windows=4",
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    losses = [step["loss"] for step in steps if "loss" in step]
    summary = json.loads((folder / "summary.json").read_text())
    # It learns: the positions it had not seen get better.
    assert np.mean(losses[-4:]) < losses[0] - 0.1
    ends[dtype] = (
      summary["final_loss"],
      np.mean(losses[-8:]),
      np.log(summary["perplexity"]["tuned"]["512"]),
    )
    assert steps[-1]["skipped_in_a_row"] == 0
  np.testing.assert_allclose(ends["float16"], ends["float32"], rtol=0.01)


def test_ids_of_a_token_file_are_bounded_by_the_model(tmp_path):
  words = tokenizer.load(assets.MODEL)
  np.asarray([5, words.vocab_size + 2] * 50, "<u2").tofile(tmp_path / "t.bin")
  wider = resolve.open_tokens(
    tmp_path / "t.bin", words, tmp_path, vocab_size=words.vocab_size + 3
  )
  assert len(wider) == 100
  with pytest.raises(ValueError, match=f"{words.vocab_size + 2}"):
    resolve.open_tokens(
      tmp_path / "t.bin", words, tmp_path, vocab_size=words.vocab_size + 2
    )
