"""Runs on one HTML page that needs nothing but itself, to be looked at and sent.

cli reads the command line, runs the workdirs; figures are the plots, examples what single captions
find, scores the evaluations beside published numbers; page puts them together.
"""

from declip_jax.report.cli import main

__all__ = ["main"]
