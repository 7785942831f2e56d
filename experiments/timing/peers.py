"""Which peers of a benchmark can be timed on this machine."""

from collections.abc import Callable, Collection, Sequence


def choose(
  names: Sequence[str],
  known: Collection[str],
  *,
  of_torch: Collection[str],
  problem: Callable[[], str | None],
) -> list[str]:
  """Returns the peers that can be timed here, and prints why others cannot.

  Args:
    names: The requested peers.
    known: All peers.
    of_torch: Peers that need PyTorch and its GPU.
    problem: Returns why they cannot run here, or None; called only if one of
      them is requested.

  Raises:
    ValueError: A name is unknown.
  """
  for name in names:
    if name not in known:
      raise ValueError(f"unknown peer {name!r}: use any of {', '.join(known)}.")
  asked = [name for name in names if name in of_torch]
  why = problem() if asked else None
  if why is None:
    return list(names)
  print(f"{', '.join(asked)} are left out: {why}")
  return [name for name in names if name not in asked]
