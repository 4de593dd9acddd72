"""Turns data as it is found into a training set: array_record shards in a TFDS directory.

    python -m declip_jax.prepare csv --images flickr8k.zip --subfolder images \\
        --captions captions.csv --output /data/flickr8k --split train

What belongs to which shard follows from the input alone, and a shard has its name only when it is
whole. So a run that was stopped continues with the shards that are missing, and its result has the
same bytes as that of an uninterrupted run, for any number of workers.

cli reads the command line, conversion is what a run does from beginning to end; it uses inputs
(what there is to write), filters (what of it is good enough), shards (writing), parallel or beam
(in many processes) and manifest (what is known about the result). captions, verify and synonyms are
commands of their own.
"""

from declip_jax.prepare.cli import main

__all__ = ["main"]
