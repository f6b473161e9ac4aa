"""Text in, verified ids in three splits out, and the windows that training and evaluation look through."""
