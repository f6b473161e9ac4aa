"""Scoring and writing text with a trained model."""
