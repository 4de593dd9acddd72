"""Eight devices on the CPU, so that every test of sharding runs on any machine."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that tests start, too

# Compiling takes most of the tests' time: leave out what LLVM, not XLA, does for speed.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax  # noqa: E402  (reads the environment)

jax.config.update("jax_num_cpu_devices", 8)
