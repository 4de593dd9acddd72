"""Measure the input of a run alone: what its data, decoding and text preparation can deliver.

  python -m declip_jax.bench --config configs/clip_vit_b32_yfcc15m.py \\
      --config.data.source='cc12m/{00000..01242}.tar' --config.data.workers=8

A step of batch_size pairs must take at least batch_size / (pairs/s) seconds, or it waits for data.
Fields of the configuration can be set: try config.data.workers and config.data.threads.
"""

import contextlib
import itertools
import sys
import time
from collections.abc import Callable

import numpy as np
from absl import app, flags, logging

from declip_jax.data.image import random_resized_crop
from declip_jax.data.order import Order
from declip_jax.data.pipeline import cores
from declip_jax.data.sources import Source, open_data
from declip_jax.main import parse_flags  # and the flag --config
from declip_jax.step import Setup

flags.declare_key_flag("config")
_SECONDS = flags.DEFINE_float("seconds", 20.0, "How long to measure.", lower_bound=1.0)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 256, "Pairs a batch, of this process; a step's batches are no faster.", 1
)


def bench(config, seconds: float, batch_size: int, say: Callable[[str], None] = print) -> None:
    """Says how fast batches come, and what each pair costs one thread.

    Raises:
      ValueError: the configuration or the data cannot be used.
    """
    source = open_data(config.data)
    setup = Setup(config)
    config.batch_size = batch_size  # of what is read, not of what the method is built for
    views = [config.views[name] for name in setup.method.views.image]
    say(f"{source}: {len(source):,} records")
    say(
        f"{config.method}: {len(views)} image views of {config.model.image.resolution} pixels, "
        f"text views {', '.join(setup.method.views.text)}; batches of {batch_size}, "
        f"config.data.workers={config.data.workers}, threads={config.data.threads}, "
        f"{cores()} cores"
    )

    start = time.perf_counter()
    with contextlib.closing(setup.batches(source, log=say)) as batches:
        next(batches)
        say(f"first batch      {time.perf_counter() - start:10.2f} s")
        # What was made ahead, while the first was waited for, is not measured.
        for _ in range(config.data.prefetch * max(1, config.data.workers)):
            next(batches)
        batches.metrics()
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds or count < 2:
            next(batches)
            count += 1
        elapsed = time.perf_counter() - start
        metrics = batches.metrics()
    rate = count * batch_size / elapsed
    say(f"pairs            {rate:10,.0f} /s")
    say(f"encoded images   {rate * metrics['data/image_bytes'] / 1e6:10,.1f} MB/s")
    say(f"bad records      {100 * metrics['data/bad_share']:10.2f} %")

    reading, decoding = one_thread(source, views, config, min(seconds, 10.0))
    say(f"a pair, one thread: reading {1e6 * reading:,.0f} us, decoding and cropping "
        f"{1e6 * decoding:,.0f} us")  # fmt: skip


def one_thread(source: Source, views: list, config, seconds: float) -> tuple[float, float]:
    """Mean seconds to read a record, and to decode and crop its image, in another order."""
    order, reading, decoding = Order(source, config.seed + 1), [], []
    end = time.perf_counter() + seconds
    for sample in itertools.count():
        start = time.perf_counter()
        if start > end and reading:
            return float(np.mean(reading)), float(np.mean(decoding))
        with contextlib.suppress(ValueError):  # that it cannot be used was told above
            image = source[order[sample]]["image"]
            read = time.perf_counter()
            rng = np.random.default_rng(sample)
            random_resized_crop(image, views, rng, config.model.image.resolution)
            decoding.append(time.perf_counter() - read)
            reading.append(read - start)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: fields are set as --config.a.b=c")
    logging.set_verbosity(logging.WARNING)
    try:
        bench(flags.FLAGS.config.copy_and_resolve_references(), _SECONDS.value, _BATCH_SIZE.value)
    except KeyboardInterrupt:
        sys.exit("Stopped.")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
