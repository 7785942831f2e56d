"""Adds pages to mkdocs from other files: results, recipes, settings.

A number lives in one place, so the site shows the files of the repository as
they are. Links between them lead to their pages; a link to a file without a
page becomes the file's name.
"""

import os
import pathlib
import re
import sys

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent.parent
_RESULTS = "experiments/results"
_IMAGES = (".png", ".svg")
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_CODE = re.compile(
  r"(^```.*?^```|^    .*?$|`[^`\n]*`)", re.DOTALL | re.MULTILINE
)


def _sources():
  """Returns the page of each file of the repository that has one."""
  found = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "scca_jax/assets/README.md": "results/assets.md",
    "tests/cases/README.md": "results/cases.md",
  }
  for path in sorted((ROOT / _RESULTS).rglob("*.md")):
    name = path.relative_to(ROOT / _RESULTS)
    page = name.parent.as_posix() if name.stem == "README" else name.as_posix()
    found[path.relative_to(ROOT).as_posix()] = (
      f"results/{page.removesuffix('.md')}.md"
    )
  for path in sorted((ROOT / "experiments/recipes").glob("*.md")):
    if path.stem != "README":
      found[path.relative_to(ROOT).as_posix()] = f"recipes/{path.name}"
  return found


def _convert(text, source, page, pages, images):
  """Returns a file's text with its links pointing into the site."""

  def link(match):
    bang, label, target = match.groups()
    if "://" in target or target.startswith("#"):
      return match[0]
    target, _, anchor = target.partition("#")
    file = os.path.normpath(os.path.join(os.path.dirname(source), target))
    if (ROOT / file).is_dir():
      file = f"{file}/README.md"
    if file in pages:
      place = pages[file]
    elif file.endswith(_IMAGES) and (ROOT / file).is_file():
      place = images[file] = f"results/pictures/{file.replace('/', '-')}"
    else:
      return label if label.startswith("`") else f"{label} (`{file}`)"
    place = os.path.relpath(place, os.path.dirname(page) or ".")
    return f"{bang}[{label}]({place}{'#' + anchor if anchor else ''})"

  parts = _CODE.split(text)
  parts[::2] = [_LINK.sub(link, part) for part in parts[::2]]
  return "".join(parts)


def _section(readme, title):
  """Returns a section of README as a page, with its heading as the title."""
  found = re.search(
    rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", readme, re.DOTALL | re.MULTILINE
  )
  if not found:
    raise ValueError(f"README has no section {title!r}: correct docs/hooks.py.")
  return found[0].replace("## ", "# ", 1)


def _settings():
  """Returns the page of all settings, from their dataclasses."""
  # The commands are not installed under this name.
  sys.path.insert(0, str(ROOT))
  from experiments.shared import config, config_flag

  lines = [
    "# Settings\n",
    "These are the settings of `scca finetune`. Each is a flag, such as"
    " `--config.training.steps=100`;"
    " `none` stands for `None`. `scca finetune --help --config=FILE` also"
    " shows the values in a config file.\n",
  ]
  group = None
  for setting in config_flag.list_settings(config.FinetuneConfig):
    prefix = setting.name.rpartition(".")[0]
    if prefix != group:
      group = prefix
      lines.append(f"\n## {prefix or 'The run'}\n")
      if setting.group:
        lines.append(f"{setting.group}\n")
      lines.append("| setting | type | default | |\n|---|---|---|---|")
    cells = [
      f"`{setting.name}`",
      # A bar would end the cell.
      f"`{setting.type_name.replace(' | ', '` or `')}`",
      f"`{setting.default!r}`",
      setting.text.replace("|", "\\|"),
    ]
    lines.append(f"| {' | '.join(cells)} |")
  lines.append(
    "\n`scca pretrain` has the same settings except `model`, `rope`, `tuning`"
    " and `lora`, and in addition:\n"
  )
  lines.append("| setting | type | default | |\n|---|---|---|---|")
  ours = {s.name for s in config_flag.list_settings(config.FinetuneConfig)}
  for setting in config_flag.list_settings(config.PretrainConfig):
    if setting.name not in ours:
      kind = setting.type_name.replace(" | ", "` or `")
      lines.append(
        f"| `{setting.name}` | `{kind}` | `{setting.default!r}` |"
        f" {setting.text} |"
      )
  return "\n".join(lines) + "\n"


def on_files(files, config):
  """Adds the pages."""
  pages, images = _sources(), {}
  readme = (ROOT / "README.md").read_text(encoding="utf8")
  texts = {page: (ROOT / file, file) for file, page in pages.items()}
  made = {
    page: _convert(path.read_text(encoding="utf8"), file, page, pages, images)
    for page, (path, file) in texts.items()
  }
  for page, title in (
    ("which_pattern.md", "Which pattern, which recipe?"),
    ("results/index.md", "Reproduction"),
  ):
    text = _section(readme, title)
    made[page] = _convert(text, "README.md", page, pages, images)
  made["settings.md"] = _settings()
  for page, text in made.items():
    files.append(File.generated(config, page, content=text))
  for file, place in images.items():
    files.append(File.generated(config, place, abs_src_path=str(ROOT / file)))
  return files
