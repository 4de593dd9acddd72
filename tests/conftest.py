"""Eight devices on the CPU, so that every test of sharding runs on any machine."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that tests start, too

# Compiling takes most of the tests' time: leave out what LLVM, not XLA, does for speed. Nor use
# fused multiply-adds, which round otherwise on other processors: in the golden values of clip_rn a
# ReLU lies so near to zero that it goes the other way with some of them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_max_isa=AVX")

import jax  # noqa: E402  (reads the environment)

jax.config.update("jax_num_cpu_devices", 8)
