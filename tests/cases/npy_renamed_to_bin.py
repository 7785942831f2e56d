"""A .npy under the name .bin: its header is no tokens."""

import json, os, pathlib, subprocess, sys, tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, os.getcwd())
import numpy as np

work = pathlib.Path(tempfile.mkdtemp())


def verdict(right, line):
  print(("right: " if right else "WRONG: ") + line)
  sys.exit(0 if right else 1)


from scca_jax import token_file

ids = np.random.default_rng(0).integers(1, 50000, 6000).astype("<u2")
np.save(work / "x.npy", ids)
(work / "x.npy").rename(work / "corpus.bin")
try:
  read = token_file.TokenFile.open(work / "corpus.bin", vocab_size=65000)
except ValueError as error:
  verdict(True, f"refused: {str(error)[-90:]}")
verdict(len(read) == len(ids), f"{len(read)} tokens, the array has {len(ids)}; they begin {read.tokens[:3].tolist()}")
