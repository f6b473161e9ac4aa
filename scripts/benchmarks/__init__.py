"""How fast charlm is beside its peers: `scripts/benchmark.py`."""
