"""Eight devices on the CPU, so that every test of sharding runs on any machine."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that tests start, too

import jax  # noqa: E402  (reads the environment)

jax.config.update("jax_num_cpu_devices", 8)
