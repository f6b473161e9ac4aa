"""Races of charlm against its peers: `scripts/benchmark.py`."""
