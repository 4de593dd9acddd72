"""The same shards written by Apache Beam, on as many machines as one of its runners has."""

import shlex
from collections.abc import Sequence

import apache_beam
from apache_beam.options.pipeline_options import PipelineOptions

from declip_jax.data.input_files import InputError
from declip_jax.prepare.shards import Job, WriteShard


def write_shards(write: WriteShard, missing: Sequence[Job], options: str) -> None:
    """Runs a pipeline with one element for each missing shard, and waits for its end.

    All workers must see the output folder, and the input, under the same paths. Raises InputError
    for options that Beam does not know, or a pipeline that failed.
    """
    if not missing:
        return
    try:
        settings = PipelineOptions(shlex.split(options))
        with apache_beam.Pipeline(options=settings) as pipeline:
            (
                pipeline
                | "Missing shards" >> apache_beam.Create(missing)
                | "Spread" >> apache_beam.Reshuffle()
                | "Write" >> apache_beam.ParDo(_Write(write))
            )
    except Exception as error:  # of any kind: each runner raises its own, after logging it
        raise InputError(
            f"--beam {options!r}: the pipeline failed; the same command continues: {error}"
        ) from error


class _Write(apache_beam.DoFn):
    def __init__(self, write: WriteShard):
        self._write = write
        self._images = apache_beam.metrics.Metrics.counter("prepare", "images")

    def process(self, job):  # a Job; Beam takes annotations for checks, and knows no such type
        self._write(job, self._images.inc)
