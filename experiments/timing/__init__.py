"""How the benchmarks time attention, steps and loading."""
