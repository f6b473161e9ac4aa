"""Ablations: variants of one configuration, trained with several seeds and compared in a table."""
