"""The imports run one way, so that the picture in README stays true."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "scca_jax"

# Each module may import those in layers above it, never below.
LAYERS = (
  (
    "patterns",
    "assets",
    "atomic_file",
    "target",
    "sharding",
    "traffic",
    "safetensors_file",
  ),
  ("receptive_field", "backends", "backends.blocks"),
  ("deviceless",),
  ("backends.mosaic_launch",),
  ("backends.mosaic_forward", "backends.mosaic_backward"),
  (
    "backends.reference",
    "backends.xla",
    "backends.cudnn",
    "backends.triton",
    "backends.mosaic",
  ),
  ("dispatch", "rope", "quantize"),
  ("lora", "llama_config"),
  ("parallel",),
  ("llama", "gguf_file"),
  ("convert", "tokenizer", "generation"),
  ("data", "losses"),
  ("training", "perplexity"),
  ("checkpoint", "memory"),
)


def _imported(path: pathlib.Path) -> set[str]:
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
      found.add(node.module)
  return found


def _module(path: pathlib.Path) -> str:
  parts = path.relative_to(PACKAGE).with_suffix("").parts
  return ".".join(part for part in parts if part != "__init__")


def _rank(module: str) -> int:
  for rank, names in enumerate(LAYERS):
    if module in names:
      return rank
  raise KeyError(module)


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if _module(p))


@pytest.mark.parametrize("path", MODULES, ids=_module)
def test_imports_run_one_way(path):
  names = {name for layer in LAYERS for name in layer}
  assert _module(path) in names, "give the new module its layer"
  for name in _imported(path):
    module = name.removeprefix("scca_jax.")
    if name.startswith("scca_jax.") and module in names:
      assert _rank(module) <= _rank(_module(path)), name
    assert not name.startswith(("experiments", "configs", "tests"))


@pytest.mark.parametrize("path", MODULES, ids=_module)
def test_only_commands_read_flags(path):
  assert not any(
    name.startswith(("absl.flags", "absl.app", "ml_collections"))
    for name in _imported(path)
  )


def test_torch_stays_in_parity_tests_and_peers():
  for folder in ("scca_jax", "configs", "experiments", "tests"):
    for path in (ROOT / folder).rglob("*.py"):
      if "parity" not in path.parts and not path.stem.endswith("_peers"):
        assert not any(
          name.split(".")[0] == "torch" for name in _imported(path)
        ), path


@pytest.mark.parametrize(
  "path",
  sorted(ROOT.glob("experiments/timing/*_peers.py")),
  ids=lambda p: p.stem,
)
def test_types_of_peers_are_checked_without_torch(path):
  assert "# pyright: reportMissingImports=false\n" in path.read_text("utf8")
