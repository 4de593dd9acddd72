"""What all tests share: devices of a CPU, quick compiling, and runs that are trained once."""

import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that tests start, too
# Compiling takes most of the tests' time: leave out what the compiler does for speed.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Eight devices, so that every test of sharding runs on any machine. With JAX_NUM_CPU_DEVICES=1 the
# tests marked `mesh` are left out, and the others compile faster and keep their programs: on a CPU
# split into several devices, programs from the cache may wait for ever in their collectives.
DEVICES = int(os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8"))
if DEVICES == 1:
    cache = Path.home() / ".cache" / "declip_jax" / "tests"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def pytest_collection_modifyitems(config, items):
    if DEVICES == 1:
        left_out = [item for item in items if item.get_closest_marker("mesh")]
        items[:] = [item for item in items if not item.get_closest_marker("mesh")]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make) -> the folder that `make(folder)` filled, for all of xdist's processes.

    Who needs to change it takes a copy.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # that of the session

    def once(name, make) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a `make` that failed
                make(folder)
                done.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def declip_run(once) -> Path:
    """`make_runs.train_declip`: not to be changed; see `once`."""
    from tests import make_runs

    return once("declip_run", make_runs.train_declip)
