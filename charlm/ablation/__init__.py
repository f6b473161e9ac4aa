"""Variants of a configuration, trained and compared."""
