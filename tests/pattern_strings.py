"""Makes patterns from names and settings, through their strings."""

from scca_jax import patterns


def make_layers(name, *, num_heads, num_layers, seq_len, **settings):
  """Returns the pattern of each layer."""
  arguments = ", ".join(f"{key}={value!r}" for key, value in settings.items())
  return patterns.parse(
    f"{name}({arguments})",
    num_heads=num_heads,
    num_kv_heads=num_heads,
    num_layers=num_layers,
    seq_len=seq_len,
  )


def make(name, *, num_heads, seq_len, **settings):
  """Returns the pattern of a single layer."""
  (pattern,) = make_layers(
    name, num_heads=num_heads, num_layers=1, seq_len=seq_len, **settings
  )
  return pattern
