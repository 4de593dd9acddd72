"""What goes on in the training pipeline: how fast it is, and which records it could not use."""

import collections
import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from declip_jax.data.sources import Source

_NAMED = 10  # so many records that cannot be used are named; the others are counted


class Report(NamedTuple):
    """What is told of a batch beside its arrays."""

    bad: list[tuple[int, str, str]]  # index, reason and details of records that cannot be used
    seconds: float  # that this process was busy since its last report
    image_bytes: int  # encoded


class Busy:
    """While open in any thread, time counts as busy; overlapping threads count once."""

    def __init__(self):
        self._lock, self._open, self._since, self._seconds = threading.Lock(), 0, 0.0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._open:
                self._since = time.perf_counter()
            self._open += 1

    def __exit__(self, *_) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                self._seconds += time.perf_counter() - self._since

    def take(self) -> float:
        """Busy seconds since the last call."""
        with self._lock:
            if self._open:
                now = time.perf_counter()
                self._seconds += now - self._since
                self._since = now
            seconds, self._seconds = self._seconds, 0.0
            return seconds


class InHand:
    """The records that worker processes have in hand, known even when one is killed.

    Each thread keeps its one in a file, mapped into memory: writing costs nothing, and what was
    written outlives the process. Can be pickled.
    """

    def __init__(self):
        self._folder = tempfile.mkdtemp(prefix="declip_jax_workers_")

    @contextlib.contextmanager
    def __call__(self, index: int) -> Iterator[None]:
        """This thread has record `index` in hand."""
        if getattr(_thread, "folder", None) != self._folder:
            path = os.path.join(self._folder, f"{os.getpid()}-{threading.get_ident()}")
            _thread.folder, _thread.file = self._folder, np.memmap(path, np.int64, "w+", shape=1)
        _thread.file[0] = index + 1
        try:
            yield
        finally:
            _thread.file[0] = 0

    def of_dead_workers(self) -> list[int]:
        """The records that processes had in hand that are no more."""
        found = set()
        for name in os.listdir(self._folder):
            if not _is_alive(int(name.partition("-")[0])):
                number = np.fromfile(os.path.join(self._folder, name), np.int64)
                found.update((number[number > 0] - 1).tolist())
        return sorted(found)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


_thread = threading.local()  # its file: the number of the record in hand plus one, or 0


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:  # one of another user may not be sent signals
        return not isinstance(error, ProcessLookupError)
    return True


class BadRecords:
    """Counts the records of a source that cannot be used, names the first, and ends a run that has
    too many: more than the share `most` of the last `window` samples. `log` takes lines.
    """

    def __init__(self, source: Source, most: float, window: int, log: Callable[[str], Any]):
        self._source, self._most, self._window, self._log = source, most, window, log
        self._recent: collections.deque[tuple[int, int]] = collections.deque()  # samples, bad ones
        self._named = 0

    def add(self, samples: int, bad: list[tuple[int, str, str]]) -> None:
        """Counts a batch; raises ValueError if the share is exceeded."""
        for index, _, details in bad[: _NAMED - self._named]:
            self._log(f"Cannot use {self._source.locate(index)}: {details}. Another replaces it.")
            self._named += 1
            if self._named == _NAMED:
                self._log("Further records that cannot be used are only counted.")
        self._recent.append((samples, len(bad)))
        while sum(count for count, _ in self._recent) - self._recent[0][0] >= self._window:
            self._recent.popleft()
        samples, refused = map(sum, zip(*self._recent, strict=True))
        if refused > self._most * max(self._window, samples):
            index, _, details = bad[-1]
            raise ValueError(
                f"{refused} records of the last {samples:,} samples of {self._source} "
                f"cannot be used, more than config.data.max_bad_fraction={self._most} of a window "
                f"of config.data.bad_window={self._window:,}; the last is "
                f"{self._source.locate(index)}: {details}. Mend the data (python -m "
                "declip_jax.prepare leaves such records out), or allow for more."
            )
