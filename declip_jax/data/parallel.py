"""Work in several threads or processes, and how far it is."""

import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from declip_jax.data.input_files import InputError

Job, Result = TypeVar("Job"), TypeVar("Result")
Tick = Callable[[], None]  # to be called for every image


def cores() -> int:
    """That this process may use."""
    # Not on all systems can a process be held to some.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@functools.cache
def pool(threads: int) -> futures.ThreadPoolExecutor:
    """One in each process. The decoders and resizing release the GIL."""
    return futures.ThreadPoolExecutor(threads, thread_name_prefix="decode")


def iterate(dataset: Iterable[Any]) -> Iterator[Any]:
    """What a pipeline gives; closing this ends its threads and processes."""
    batches = iter(dataset)
    try:
        yield from batches
    finally:
        batches.close()


class Progress:
    """How far the run is: on one line of a terminal, elsewhere a line now and then."""

    def __init__(self, done: int, total: int, unit: str = "images"):
        self.first, self.done, self.total, self.unit = done, done, total, unit
        self.start = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def tick(self) -> None:
        self.show(self.done + 1)

    def show(self, done: int) -> None:
        self.done = done
        now = time.monotonic()
        if now - self.shown >= (0.5 if self.terminal else 30):
            self.shown = now
            line = tqdm.format_meter(
                done,
                self.total,
                now - self.start,
                initial=self.first,
                unit=f" {self.unit}",
                bar_format=f"{{n:,}} of {{total:,}} {self.unit}, {{rate_fmt}}, {{remaining}} left",
            )
            print(line, end="   \r" if self.terminal else "\n", file=sys.stderr, flush=True)


def parallel(
    work: Callable[[Job, Tick], Result], jobs: Sequence[Job], workers: int, progress: Progress
) -> Iterator[tuple[Job, Result]]:
    """Yields each job with work(job, tick), in any order; the ticks advance `progress`.

    Args:
      work: goes to each process once, pickled; with one worker it is called in this process.
      jobs: pickled, one at a time.
      workers: processes, at most.

    Raises InputError: a worker process was killed.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        for job in jobs:
            yield job, work(job, progress.tick)
        return
    # Spawned, because array_record and OpenCV have threads, which forking does not survive.
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", progress.done), context.Event()
    with futures.ProcessPoolExecutor(
        workers, context, initializer=_start_worker, initargs=(work, counter, stop)
    ) as pool:
        try:
            pending = {pool.submit(_call_work, job): job for job in jobs}
            while pending:
                finished, _ = futures.wait(pending, 0.5, futures.FIRST_COMPLETED)
                for future in finished:
                    yield pending.pop(future), future.result()
                progress.show(counter.value)
        except BrokenProcessPool:
            raise InputError(
                "a worker process was killed, perhaps because memory ran out; the same command "
                "continues, and may have fewer workers"
            ) from None
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def follow_parent() -> None:
    """In a process that was started for another: it ends with that one, and leaves Ctrl-C to it.

    A terminal sends Ctrl-C to all processes; the main one decides, and may still need the others.
    """

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()


class Stopped(Exception):
    """Ends a worker when another one failed or the user interrupts."""


def _start_worker(work: Callable[[Any, Tick], Any], counter, stop) -> None:
    def tick() -> None:
        if stop.is_set():
            raise Stopped
        with counter.get_lock():
            counter.value += 1

    follow_parent()  # which sets `stop` at Ctrl-C
    global _work, _tick
    _work, _tick = work, tick


_work: Callable[[Any, Tick], Any]  # in a worker process
_tick: Tick


def _call_work(job: Any) -> Any:
    return _work(job, _tick)
