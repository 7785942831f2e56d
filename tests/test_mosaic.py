"""The back end `mosaic`, as far as a CPU can tell.

test_contract tests what it refuses, test_blocks what its kernels visit,
test_deviceless that they compile, and test_gpu_backends what they compute on a
GPU. Pallas cannot interpret their matrix products.
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
