"""The console command `scca`: a subcommand for each command of `experiments/`.

    scca --help
    scca finetune --output_dir=runs/a

A wheel carries the folders `experiments` and `configs` inside this package, in
`_commands`: at the top level they would collide with those of other projects.
`scca` puts that folder on the path of its own process, where commands and
configs import `experiments.shared` as they do in a checkout.
"""

import ast
import difflib
import importlib
import pathlib
import runpy
import sys

from scca_jax import __version__

_PACKAGE = pathlib.Path(__file__).parent
_EXIT_BAD_INPUT = 2


def _find_root() -> pathlib.Path:
  """Returns the folder that holds `experiments` and `configs`."""
  installed = _PACKAGE / "_commands"
  return installed if installed.is_dir() else _PACKAGE.parent


def _list_commands(root: pathlib.Path) -> dict[str, str]:
  """Returns what each command does, by its name; imports none of them."""
  commands = {}
  for path in sorted((root / "experiments").glob("*.py")):
    if path.stem != "__init__":
      tree = ast.parse(path.read_text(encoding="utf8"))
      commands[path.stem] = (ast.get_docstring(tree) or "").split("\n")[0]
  return commands


def main() -> None:
  """Runs a subcommand and exits."""
  root = _find_root()
  commands = _list_commands(root)
  name, *arguments = sys.argv[1:] or ["--help"]
  if name in ("--version", "-V"):
    print(f"scca_jax {__version__}")
    sys.exit()
  if name in ("--help", "-h", "help"):
    width = max(map(len, commands))
    print("usage: scca COMMAND [--flag=value ...]\n")
    for command, text in commands.items():
      print(f"  {command:<{width}}  {text}")
    print("\n`scca COMMAND --help` lists the flags of a command.")
    sys.exit()
  if name not in commands:
    near = difflib.get_close_matches(name, commands, 1)
    hint = f"did you mean {near[0]}?" if near else "see scca --help."
    print(f"error: unknown command {name!r}: {hint}", file=sys.stderr)
    sys.exit(_EXIT_BAD_INPUT)
  sys.path.insert(0, str(root))
  sys.argv[1:] = arguments
  importlib.import_module("experiments").end_on_signals()
  runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
