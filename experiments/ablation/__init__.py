"""The parts of `experiments.ablate`."""
