"""What all tests share: devices of a CPU, quick compiling, and a cache of compiled programs."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that tests start, too
# Eight devices, so that every test of sharding runs on any machine.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Compiling takes most of the tests' time: leave out what the compiler does for speed.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
