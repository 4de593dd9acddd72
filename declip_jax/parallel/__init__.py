"""The device mesh, how arrays lie on it, and how host batches get there."""
