"""Lossless compression of texts with a trained model."""
