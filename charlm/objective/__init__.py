"""The objective: the table of prediction tasks, their weights over training, and the loss they add up to."""
