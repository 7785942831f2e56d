"""Imports run one way: top to bottom in the layout in CONTRIBUTING."""

import ast
import functools
import graphlib
import itertools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MAX_LEVELS = 9


def _module(path: pathlib.Path) -> str:
  return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


PATHS = {
  _module(path.relative_to(ROOT)): path
  for folder in ("scca_jax", "experiments", "configs")
  for path in sorted((ROOT / folder).rglob("*.py"))
}


def _imported(source: str, package: str) -> set[str]:
  """Returns the full names that are imported, in functions too.

  An import is deferred to make a start fast, not to hide a dependency.
  """
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = [node.module] if node.module else []
      if node.level:
        parents = package.split(".")
        base = parents[: len(parents) - node.level + 1] + base
      found |= {".".join([*base, alias.name]) for alias in node.names}
    elif (
      isinstance(node, ast.Call)
      and ast.unparse(node.func).endswith("import_module")
      and isinstance(node.args[0], ast.JoinedStr)
    ):
      # What follows a prefix at run time may be any module that has it.
      prefix = str(ast.literal_eval(node.args[0].values[0]))
      found |= {name for name in PATHS if name.startswith(prefix)}
  return found


def _imports(module: str) -> set[str]:
  path = PATHS[module]
  package = module if path.stem == "__init__" else module.rpartition(".")[0]
  return _imported(path.read_text(encoding="utf8"), package)


@functools.cache
def _graph() -> dict[str, set[str]]:
  """Returns which of our modules each of them imports."""
  graph = {}
  for module in PATHS:
    # `from package.module import name` depends on the module.
    names = {
      name if name in PATHS else name.rpartition(".")[0]
      for name in _imports(module)
    }
    graph[module] = names & PATHS.keys() - {module}
  return graph


def _levels(graph: dict[str, set[str]]) -> dict[str, int]:
  """Returns the length of the longest chain of imports that ends in each."""
  levels = {}
  for name in graphlib.TopologicalSorter(graph).static_order():
    levels[name] = 1 + max((levels[i] for i in graph[name]), default=0)
  return levels


def _layout() -> list[str]:
  """Returns modules and folders in the order of the layout in CONTRIBUTING.

  A line holds an indentation, names that end in `.py` or `/`, and behind two
  spaces what they are; other lines continue the description.
  """
  text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf8")
  found = re.search(r"## Layout\n.*?```\n(.*?)```", text, re.DOTALL)
  assert found
  names, parents = [], {0: ""}
  for line in found[1].splitlines():
    head = re.match(r"( *)((?:\w+(?:\.py|/) ?)+)(?:  |$)", line)
    if not head:
      continue
    depth = len(head[1])
    for entry in head[2].split():
      name = parents[depth] + re.sub(r"\.py$|/$", "", entry)
      names.append(name)
      if entry.endswith("/"):
        parents[depth + 2] = f"{name}."
  return names


def test_no_imports_form_a_cycle():
  try:
    _levels(_graph())
  except graphlib.CycleError as error:
    pytest.fail(" -> ".join(error.args[1]))


def test_imports_have_at_most_nine_levels():
  """Between the modules and folders of `scca_jax`."""
  unit = {name: ".".join(name.split(".")[:2]) for name in PATHS}
  graph = {}
  for module, names in _graph().items():
    if module.split(".")[0] == "scca_jax":
      units = {unit[name] for name in names} - {unit[module]}
      graph.setdefault(unit[module], set()).update(units)
  levels = _levels(graph)
  assert max(levels.values()) <= MAX_LEVELS, levels


def test_layout_lists_every_module():
  listed = _layout()
  assert len(listed) == len(set(listed))
  for name in listed:
    assert (ROOT / name.replace(".", "/")).is_dir() or name in PATHS, name
  # Either all modules of a folder are listed, or none.
  whole = {name.rpartition(".")[0] for name in listed}
  for module, path in PATHS.items():
    if path.stem != "__init__" and module.rpartition(".")[0] in whole:
      assert module in listed, f"list {module} in CONTRIBUTING's layout"


def test_modules_import_only_what_stands_above_them_in_the_layout():
  places = {name: place for place, name in enumerate(_layout())}
  # A package itself may join what it holds, and so stands behind that; where
  # CONTRIBUTING lists a folder alone, all in it stands there.
  for name, place in list(places.items()):
    parent = name.rpartition(".")[0]
    places[parent] = max(places.get(parent, 0), place)

  def find(module):
    while module not in places:
      module = module.rpartition(".")[0]
    return places[module]

  backwards = [
    f"{module} imports {name}"
    for module, names in _graph().items()
    for name in names
    if find(name) > find(module)
  ]
  assert not backwards


def test_package_imports_no_commands():
  for module in PATHS:
    if module.startswith("scca_jax"):
      assert not any(
        name.split(".")[0] in ("experiments", "configs", "tests")
        for name in _imports(module)
      ), module


def test_commands_do_not_import_each_other():
  commands = {
    name for name in PATHS if re.fullmatch(r"experiments\.\w+", name)
  } - {"experiments.shared", "experiments.timing", "experiments.ablation"}
  for module, names in _graph().items():
    assert not names & commands, module


def test_only_commands_read_flags():
  for module in PATHS:
    if module.startswith("scca_jax"):
      assert not any(
        name.startswith(("absl.flags", "absl.app", "ml_collections"))
        for name in _imports(module)
      ), module


def test_torch_stays_in_parity_tests_and_peers():
  tests = (ROOT / "tests").rglob("*.py")
  for path in itertools.chain(PATHS.values(), tests):
    if "parity" not in path.parts and not path.stem.endswith("_peers"):
      assert not any(
        name.split(".")[0] == "torch"
        for name in _imported(path.read_text(encoding="utf8"), "")
      ), path


@pytest.mark.parametrize(
  "path",
  sorted(ROOT.glob("experiments/timing/*_peers.py")),
  ids=lambda p: p.stem,
)
def test_types_of_peers_are_checked_without_torch(path):
  assert "# pyright: reportMissingImports=false\n" in path.read_text("utf8")


@pytest.mark.parametrize(
  ("source", "name"),
  [
    ("from .llama import Llama", "scca_jax.llama.Llama"),
    ("from . import llama", "scca_jax.llama"),
    ("def f():\n  from scca_jax import llama", "scca_jax.llama"),
    ("import scca_jax.llama as model", "scca_jax.llama"),
    (
      'importlib.import_module(f"scca_jax.backends.{name}")',
      "scca_jax.backends.xla",
    ),
  ],
)
def test_every_form_of_import_is_found(source, name):
  assert name in _imported(source, "scca_jax")
