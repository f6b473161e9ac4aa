"""A pretended GPU: what the real loop would ask of a CUDA device, counted on a machine that has none."""
