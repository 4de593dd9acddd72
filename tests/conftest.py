"""Eight devices on the CPU, so that every test of sharding runs on any machine.

Compiled programs are shared by the tests of one session, in this process and in those it starts.
"""

import os
import tempfile

_CACHE = tempfile.TemporaryDirectory(prefix="declip_jax_tests_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402  (reads the environment)

jax.config.update("jax_num_cpu_devices", 8)
