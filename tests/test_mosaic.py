"""The back end `mosaic`, as far as a CPU can tell: what it refuses.

What its kernels visit is tested in test_blocks, that they compile in
test_deviceless, and what they compute on a GPU in test_gpu_backends. Pallas
does not interpret their matrix products.
"""

import jax
import jax.numpy as jnp
import pytest

from scca_jax import target
from scca_jax.backends import mosaic
from scca_jax.patterns import AttentionPattern, HeadPattern

HOPPER = target.Target("gpu", "a Hopper GPU", (9, 0), 132)


def _attend(head=None, causality="position", gpu=HOPPER, **change):
  shape = {"seq_len": 32, "kv_len": 32, "head_dim": 64} | change
  dtype = change.get("dtype", jnp.bfloat16)
  query, key = (
    jax.ShapeDtypeStruct((1, n, 2, shape["head_dim"]), dtype)
    for n in (shape["seq_len"], shape["kv_len"])
  )
  pattern = AttentionPattern((head or HeadPattern(),) * 2, causality=causality)
  with target.compile_for(gpu):
    mosaic.attention(
      query,
      key,
      key,
      pattern,
      segment_ids=None,
      query_offset=change.get("query_offset", 0),
      scale=1.0,
    )


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"gpu": target.Target("gpu", "an A100", (8, 0), 108)}, "an A100"),
    ({"gpu": target.Target("gpu", "a B200", (10, 0), 148)}, "a B200"),
    ({"dtype": jnp.float32}, "float32"),
    ({"head_dim": 80}, "80"),
    ({"causality": "slot"}, "slot"),
    ({"query_offset": 1}, "query_offset"),
    ({"kv_len": 40}, "40 keys and 32 queries"),
    ({"head": HeadPattern(chunk_size=8, shift=1 << 30)}, "1073741824"),
  ],
)
def test_what_the_kernels_cannot_serve_is_refused(change, said):
  with pytest.raises(NotImplementedError, match=said):
    _attend(**change)


@pytest.mark.parametrize("head_dim", mosaic.HEAD_DIMS)
@pytest.mark.parametrize("dtype", mosaic.DTYPES)
def test_defaults_are_among_what_tuning_tries(head_dim, dtype):
  sizes = mosaic.default_sizes(head_dim, dtype, "a Hopper GPU")
  for kernel, tried in mosaic.candidates(head_dim, dtype).items():
    chosen = getattr(sizes, kernel)
    assert (chosen.rows, chosen.columns, chosen.stages) in [
      (x.rows, x.columns, x.stages) for x in tried
    ]
