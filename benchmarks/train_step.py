"""Time of the training step, variants of a configuration against each other.

  python benchmarks/train_step.py --config configs/clip_vit_b32_yfcc15m.py --batch-size 1024 \\
      --variant model.scan=True --variant model.scan=False --out benchmarks/results/step.json

Each variant is a comma-separated list of settings. Batches are random and already on the device:
the input pipeline is not measured. Rounds are interleaved, so that what else the machine does
falls on all variants alike; the table gives the median and the fastest round.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from ast import literal_eval
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # configs are not installed
from declip_jax.parallel.mesh import shard_batch  # noqa: E402
from declip_jax.train import Setup  # noqa: E402


def load_config(argument: str):
    path, _, variant = argument.partition(":")
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def parse(settings: str) -> dict:
    pairs = [setting.split("=", 1) for setting in settings.split(",") if setting]
    return {name: literal_eval(value) for name, value in pairs}


class Runner:
    """A compiled training step with its state and one random batch."""

    def __init__(self, config):
        setup = Setup(config)
        rng = np.random.default_rng(0)
        size, context = config.model.image.resolution, config.model.text.context
        views, texts = (len(names) for names in setup.method.views)
        tokens = rng.integers(1, 49_000, (config.batch_size, texts, context)).astype(np.int32)
        tokens[:, :, -1] = config.model.text.eot_id
        images = rng.integers(0, 256, (config.batch_size, views, size, size, 3), np.uint8)
        self.batch = shard_batch({"image": images, "tokens": tokens}, setup.mesh)
        self.state = setup.init_state()
        start = time.perf_counter()
        self.step = setup.jit_train_step().lower(self.state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - start
        self.batch_size = config.batch_size
        self.seconds = []

    def round(self, steps: int) -> None:
        start = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready(metrics)
        self.seconds.append((time.perf_counter() - start) / steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch-size", type=int, help="default: the configuration's")
    parser.add_argument("--variant", action="append", default=[], help="e.g. model.scan=False")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="in each round")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()

    runners = {}
    for variant in args.variant or [""]:
        config = load_config(args.config).unlock()
        config.batch_size = args.batch_size or config.batch_size
        config.update_from_flattened_dict(parse(variant))
        runners[variant or "as configured"] = Runner(config.lock())
    for runner in runners.values():
        runner.round(1)  # first steps allocate
        runner.seconds.clear()
    for _ in range(args.rounds):
        for runner in runners.values():
            runner.round(args.steps)

    device = jax.devices()[0]
    result = {
        "config": args.config,
        "devices": f"{jax.device_count()} × {device.device_kind}",
        "host": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "jax": jax.__version__,
        "variants": {},
    }
    print(f"{args.config}: {result['devices']}, jax {jax.__version__}")
    print(f"{'variant':<40}{'ms median':>12}{'ms fastest':>12}{'pairs/s':>12}{'compile s':>12}")
    for name, runner in runners.items():
        median, fastest = statistics.median(runner.seconds), min(runner.seconds)
        rate = runner.batch_size / median
        print(
            f"{name:<40}{1e3 * median:>12.1f}{1e3 * fastest:>12.1f}{rate:>12,.0f}"
            f"{runner.compile_seconds:>12.1f}"
        )
        result["variants"][name] = {
            "batch_size": runner.batch_size,
            "ms_per_step": [round(1e3 * s, 2) for s in runner.seconds],
            "pairs_per_s": round(rate, 1),
            "compile_seconds": round(runner.compile_seconds, 1),
        }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
