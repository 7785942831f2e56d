"""The attention of PyTorch that benchmarks time does what its name says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the peers are PyTorch's")

from experiments.timing import attention_peers  # noqa: E402
from scca_jax import attention, patterns  # noqa: E402

MASKED = {
  "scca_fixed": patterns.scca_fixed(4, 8),
  "scca_flow": patterns.scca_flow(8, 8, 4),
  "s2": patterns.s2(4, 8),
  "sda": patterns.sda(8, 4),
  "dilated": patterns.dilated(4, 16, 2),
  "dna": patterns.dna(2, 3, 2),
  "longmixed": patterns.longmixed(8, 8),
  "no formula": patterns.AttentionPattern(
    tuple(
      patterns.HeadPattern(chunk_size=5 + i % 3, shift=(7 * i * i) % 11)
      for i in range(12)
    )
  ),
}


@pytest.mark.parametrize("name", MASKED)
def test_the_masks_of_flex_are_the_patterns(name):
  pattern, n = MASKED[name], 32
  mask = attention_peers.mask_mod(pattern, "cpu")
  h, p, k = torch.meshgrid(
    *(torch.arange(x) for x in (pattern.num_heads, n, n)), indexing="ij"
  )
  np.testing.assert_array_equal(mask(0, h, p, k).numpy(), pattern.visible(n))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
  ("name", "pattern"),
  [
    ("flex", patterns.scca_fixed(4, 16)),
    ("sdpa", patterns.dense(4)),
    ("longlora_s2", dataclasses.replace(patterns.s2(4, 16), causality="slot")),
  ],
)
def test_peers_compute_what_they_are_named_for(name, pattern, kv_heads):
  shapes = [(1, 64, n, 16) for n in (4, kv_heads, kv_heads)]
  peer = attention_peers.make(
    name,
    pattern,
    shapes=shapes,
    chunk_size=16,
    dtype="float32",
    device="cpu",
  )

  def by_token(x):
    x = x.detach() if name == "longlora_s2" else x.detach().transpose(1, 2)
    return jnp.asarray(x.numpy())

  # PyTorch has flex_attention's backward pass only on a GPU.
  if name == "flex":
    for x in peer.inputs:
      x.requires_grad_(False)
    found = peer.forward()
  else:
    found = peer.forward_backward()
  truth, vjp = jax.vjp(
    lambda *x: attention(*x, pattern, implementation="reference"),
    *(by_token(x) for x in peer.inputs),
  )
  expected = truth, *vjp(by_token(peer.d_output))
  for a, b in zip(found, expected, strict=name != "flex"):
    np.testing.assert_allclose(by_token(a), b, rtol=1e-4, atol=1e-5)
