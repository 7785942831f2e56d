"""The commands in README, guides and recipes exist and run."""

import pathlib
import re

import pytest

from experiments.ablation.settings import AblationConfig
from experiments.shared.config import FinetuneConfig, PretrainConfig
from experiments.shared.config_flag import list_settings
from scca_jax import patterns

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
  ROOT / "README.md",
  *sorted((ROOT / "docs").glob("*.md")),
  *sorted((ROOT / "experiments" / "recipes").glob("*.md")),
]
COMMANDS = {path.stem for path in (ROOT / "experiments").glob("[a-z]*.py")}
SETTINGS = {
  setting.name
  for kind in (FinetuneConfig, PretrainConfig, AblationConfig)
  for setting in list_settings(kind)
}


def _blocks(path, language):
  text = path.read_text(encoding="utf8")
  return re.findall(
    rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE
  )


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_commands_flags_and_configs_exist(path):
  text = path.read_text(encoding="utf8")
  shell = "\n".join(_blocks(path, "sh")) + "\n"
  shell += "\n".join(re.findall(r"`(scca [^`]*)`", text))
  for name in re.findall(r"\bscca ([a-z_]+)", shell):
    assert name in COMMANDS, name
  for name in re.findall(r"--config\.([\w.]+)", text):
    assert name in SETTINGS or name == "NAME", name
  for name in re.findall(r"\bconfigs/\w+\.py", text):
    assert (ROOT / name).is_file(), name
  for command in re.split(r"\n(?=scca )", shell.replace("\\\n", " ")):
    found = re.match(r"(?:.*\n)*?.*?scca ([a-z_]+)(.*)", command)
    if not found or found[1] == "lm_eval":  # Its flags are not ours.
      continue
    source = "".join(
      p.read_text(encoding="utf8")
      for p in (
        ROOT / "experiments" / f"{found[1]}.py",
        *(ROOT / "experiments" / "shared").glob("*.py"),
      )
    )
    for flag in re.findall(r"--([a-z_]+)(?=[= ]|$)", found[2]):
      assert f'"{flag}"' in source or flag in ("help", "version"), flag


@pytest.mark.parametrize(
  "path", [p for p in PAGES if _blocks(p, "python")], ids=lambda p: p.stem
)
def test_python_in_guides_runs(path, capsys):
  for block in _blocks(path, "python"):
    exec(compile(block, str(path), "exec"), {})
  if path.stem == "patterns":
    share, text = capsys.readouterr().out.split("\n")[:2]
    # Four chunks see a quarter; borders that move by half see a little less.
    assert 0.2 < float(share) < 0.25
    assert text.startswith("layers(s2(chunk_size=256), dense")


def test_patterns_of_the_guide_are_read():
  text = (ROOT / "docs" / "patterns.md").read_text(encoding="utf8")
  forms = re.findall(r"^\| `([a-z]+\(.*\))` \|", text, re.MULTILINE)
  assert len(forms) >= 4
  for form in forms:
    layers = patterns.parse(
      form, num_heads=8, num_kv_heads=4, num_layers=12, seq_len=64
    )
    assert len(layers) == 12, form
