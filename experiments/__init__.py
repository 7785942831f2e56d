"""Commands: each runs as `scca NAME`, or `python -m experiments.NAME`."""
