"""What a config stands for and what a run looks like: figures in numbers, text and pictures."""
