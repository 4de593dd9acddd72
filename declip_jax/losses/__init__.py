"""Losses: pure functions of global arrays. No rank, no parameters;
ring and late_interaction alone are told the mesh."""
