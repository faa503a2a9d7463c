"""Tuners measured: exactness, memory, what they learn and what they forget. `python -m benchmarks.tuners`."""
