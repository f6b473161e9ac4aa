"""From a text to verified ids in three splits, and the windows of training and evaluation."""
