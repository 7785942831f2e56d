"""The back end `mosaic`, as far as a CPU can tell.

What it refuses is tested in test_contract, what its kernels visit in
test_blocks, that they compile in test_deviceless, and what they compute on a
GPU in test_gpu_backends. Pallas does not interpret their matrix products.
"""

import pytest

from scca_jax.backends import mosaic, registry

SERVED = registry.BACK_ENDS["mosaic"]


@pytest.mark.parametrize("head_dim", SERVED.head_dims)
@pytest.mark.parametrize("dtype", SERVED.dtypes)
def test_defaults_are_among_what_tuning_tries(head_dim, dtype):
  sizes = mosaic.default_sizes(head_dim, dtype, "a Hopper GPU")
  for kernel, tried in mosaic.candidates(head_dim, dtype).items():
    chosen = getattr(sizes, kernel)
    assert (chosen.rows, chosen.columns, chosen.stages) in [
      (x.rows, x.columns, x.stages) for x in tried
    ]
