"""Losses: pure functions of global arrays. No mesh, no rank, no parameters."""
