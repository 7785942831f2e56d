"""The command `compare` on losses whose difference is known."""

import dataclasses
import json

import numpy as np
import pytest

from scca_jax import bootstrap, loss_file
from scca_jax.perplexity import WindowLosses

LENGTHS = (16, 64)
WINDOWS = 6
# How much better A is at each length; from the last quarter on, twice that.
BETTER = {16: 0.5, 64: 0.25}
ABOUT = {"protocol": "strided", "tokens_sha256": "0a"}


def _losses(length, seed):
  """Windows that differ much, the first scored whole, the others in part."""
  rng = np.random.default_rng(seed)
  hardness = rng.gamma(2, 3, size=(WINDOWS, 1))
  noise = rng.normal(0, 0.01, size=(WINDOWS, length - 1))
  return WindowLosses(
    losses=(hardness + noise).astype(np.float32),
    starts=np.arange(WINDOWS) * 4,
    firsts=np.array([1] + [length // 2] * (WINDOWS - 1)),
    begins=np.zeros(WINDOWS, bool),
    documents=np.array([0, 0, 1, 1, 2, 2]),
  )


@pytest.fixture
def files(tmp_path, monkeypatch):
  """B, and A that is better by a known amount."""
  monkeypatch.chdir(tmp_path)
  b = {length: _losses(length, 0) for length in LENGTHS}
  a = {}
  for length, windows in b.items():
    losses = windows.losses - BETTER[length]
    losses[:, -(length // 4) :] -= BETTER[length]
    a[length] = dataclasses.replace(windows, losses=losses)
  loss_file.write("a.npz", a, ABOUT | {"model": "tuned"})
  loss_file.write("b.npz", b, ABOUT | {"model": "untuned"})
  return a, b


def test_known_difference_is_found(run_command, files, capsys):
  a, b = files
  assert not run_command(
    "compare", "a.npz", "b.npz", "--output=c.json", "--plot=c.png"
  )
  with open("c.json", encoding="utf8") as file:
    found = json.load(file)
  assert found["a"]["model"] == "tuned" and found["b"]["file"] == "b.npz"
  assert found["protocol"] == "strided"
  for length in LENGTHS:
    result = found["lengths"][str(length)]
    assert (result["num_windows"], result["num_documents"]) == (WINDOWS, 3)
    quarter = result["last_quarter"]
    assert quarter["difference"]["mean"] == pytest.approx(
      -2 * BETTER[length], abs=1e-5
    )
    # All windows agree on the difference, and on nothing else.
    low, high = quarter["difference"]["interval"]
    assert high - low < 1e-5
    assert np.diff(quarter["a"]["interval"]) > 1
    # Only scored predictions count: the mean is the one behind a perplexity.
    scored = a[length].losses, b[length].losses
    firsts = a[length].firsts
    rows = [
      np.concatenate(
        [row[first - 1 :] for row, first in zip(x, firsts, strict=True)]
      )
      for x in scored
    ]
    for side, values in zip("ab", rows, strict=True):
      assert result["all"][side]["mean"] == pytest.approx(values.mean())
    assert result["all"]["difference"]["mean"] == pytest.approx(
      rows[0].mean() - rows[1].mean(), abs=1e-5
    )
  printed = capsys.readouterr().out.splitlines()
  assert printed[:3] == [
    "A: a.npz",
    "B: b.npz",
    "strided protocol, nats per token",
  ]
  assert printed[5].split()[:3] == ["16", "last", "quarter"]
  assert printed[5].split()[5] == "-1.0000"
  with open("c.png", "rb") as file:
    assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_intervals_are_those_of_the_bootstrap(run_command, files):
  a, _ = files
  other = _losses(16, 1)
  loss_file.write("other.npz", {16: other}, ABOUT)
  run_command("compare", "a.npz", "other.npz", "--output=c.json", "--seed=3")
  with open("c.json", encoding="utf8") as file:
    found = json.load(file)
  assert list(found["lengths"]) == ["16"]
  expected = bootstrap.paired_difference(
    a[16].scored, other.scored, other.documents, seed=3
  )
  assert found["lengths"]["16"]["all"]["difference"] == {
    "mean": pytest.approx(expected.mean),
    "interval": pytest.approx(list(expected.interval)),
  }


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "give the files A.npz B.npz, got none"),
    (["a.npz"], "give the files A.npz B.npz, got a.npz"),
    (["a.npz", "b.npz", "c.npz"], "unexpected argument 'c.npz'"),
    (["a.npz", "no.npz"], "the file of losses no.npz does not exist"),
    (["a.npz", "text.npz"], "text.npz is not a file of losses"),
    (["a.npz", "other.npz"], "a.npz and other.npz do not have the same tokens"),
    (["a.npz", "b.npz", "--output=c.txt"], "--output must be a .json file"),
    (["a.npz", "b.npz", "--plot=c.pdf"], "--plot must be a .png file"),
  ],
)
def test_bad_input_ends_in_one_line(
  run_command, files, capsys, arguments, message
):
  loss_file.write("other.npz", files[0], ABOUT | {"tokens_sha256": "0b"})
  with open("text.npz", "w", encoding="utf8") as file:
    file.write("text")
  status = run_command("compare", *arguments)
  captured = capsys.readouterr()
  assert status == 2 and captured.out == ""
  assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
  assert message in captured.err
