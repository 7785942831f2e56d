"""The parts of `scca ablate`."""
