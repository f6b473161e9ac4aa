"""Runs and configs for people: figures, the page, `explain`."""
