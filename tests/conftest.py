"""What every test runs under: four CPU devices, no implicit broadcasting."""

import os

# Before jax starts: sharding is tested on simulated devices, without hardware.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
