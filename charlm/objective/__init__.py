"""Prediction tasks, their weights over training, and the loss that they add up to."""
