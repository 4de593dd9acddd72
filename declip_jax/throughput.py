"""How fast the input of a run is, by itself."""

import contextlib
import itertools
import time
from collections.abc import Callable

import numpy as np

from declip_jax.data.image import random_resized_crop
from declip_jax.data.order import Order
from declip_jax.data.parallel import cores
from declip_jax.data.sources import Source, open_data
from declip_jax.step import Setup


def measure(setup: Setup, seconds: float, batch_size: int, say: Callable = print) -> None:
    """Says, in lines, how fast batches come, and what each pair costs one thread.

    `batch_size` is that of what is read, whatever the method is built for. Raises ValueError if the
    configuration or the data cannot be used.
    """
    config = setup.config
    source = open_data(config.data)
    views = [config.views[name] for name in setup.method.views.image]
    resolution = config.model.image.resolution
    say(f"{source}: {len(source):,} records")
    say(
        f"{config.method}: {len(views)} image views of {resolution} pixels, "
        f"text views {', '.join(setup.method.views.text)}; batches of {batch_size}, "
        f"config.data.workers={config.data.workers}, threads={config.data.threads}, "
        f"{cores()} cores"
    )

    start = time.perf_counter()
    with contextlib.closing(setup.batches(source, log=say, batch_size=batch_size)) as batches:
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

    reading, decoding = one_thread(source, views, resolution, config.seed, min(seconds, 10.0))
    each = f"reading {1e6 * reading:,.0f} us, decoding and cropping {1e6 * decoding:,.0f} us"
    say(f"a pair, one thread: {each}")


def one_thread(
    source: Source, views: list, resolution: int, seed: int, seconds: float
) -> tuple[float, float]:
    """Mean seconds to read a record, and to decode and crop its image, in another order."""
    order, reading, decoding = Order(source, seed + 1), [], []
    end = time.perf_counter() + seconds
    for sample in itertools.count():
        start = time.perf_counter()
        if start > end and reading:
            return float(np.mean(reading)), float(np.mean(decoding))
        with contextlib.suppress(ValueError):  # that it cannot be used was told above
            image = source[order[sample]]["image"]
            read = time.perf_counter()
            rng = np.random.default_rng(sample)
            random_resized_crop(image, views, rng, resolution)
            decoding.append(time.perf_counter() - read)
            reading.append(read - start)
