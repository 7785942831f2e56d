"""Commands: each runs as `python -m experiments.NAME`."""
