"""int64 ids, with the JSON that the message about them asks for."""

import json, os, pathlib, subprocess, sys, tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, os.getcwd())
import numpy as np

work = pathlib.Path(tempfile.mkdtemp())


def verdict(right, line):
  print(("right: " if right else "WRONG: ") + line)
  sys.exit(0 if right else 1)


from scca_jax import token_file

ids = np.random.default_rng(0).integers(1, 32000, 6000)
ids.astype("<i8").tofile(work / "corpus.bin")
try:
  token_file.TokenFile.open(work / "corpus.bin", vocab_size=32000)
  advice = "none"
except ValueError as error:
  advice = str(error)
(work / "corpus.json").write_text('{"dtype": "uint32"}')
try:
  read = token_file.TokenFile.open(work / "corpus.bin", vocab_size=32000)
except ValueError as error:
  verdict(True, f"refused: {str(error)[-90:]}")
zeros = float(np.mean(np.asarray(read.tokens) == 0))
verdict(len(read) == len(ids) and zeros == 0, f"{len(read)} tokens of {len(ids)}, {zeros:.0%} of them 0; the advice was: …{advice[-60:]}")
