"""Runs and configs as people read them: figures, the page of runs, `explain`."""
