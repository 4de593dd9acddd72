"""Eight devices on the CPU, so that every test of sharding runs on any machine."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
