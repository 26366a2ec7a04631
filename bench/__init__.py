"""Benchmarks: `python -m bench.NAME --json`, each with its machine, its sizes and the peer measured in the same run."""
