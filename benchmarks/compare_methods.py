"""The methods against each other at one small budget: same towers, same pairs seen, same optimizer.

  python benchmarks/compare_methods.py --out benchmarks/results/compare_methods_scenes.json
  python benchmarks/compare_methods.py --data data/cifar10 \\
      --out benchmarks/results/compare_methods_cifar10.json

Every method trains on the quickstart's scenes, or on a prepared set with classes and synthetic
captions, with the quickstart's towers. Its loss weights are those of its published configuration,
but that FILIP's global term has weight 1: the scores are those of the global embeddings, which its
published weights leave as they were drawn. What differs is what the method is: its views and its
loss. The table gives mean and spread over seeds of the scores after the last step. Finished runs
are kept in --workdir and not repeated.

A method may have settings of its own, to ask what a part of it does, and the data may be a part, to
ask what few pairs seen often give:

  python benchmarks/compare_methods.py --split "train[:1000]" \\
      --methods clip declip declip,loss.contrast_masked=False
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import time
from ast import literal_eval
from pathlib import Path

import jax
import ml_collections

sys.path.insert(0, str(Path(__file__).parent.parent))  # configs are not installed
from configs import quickstart  # noqa: E402
from declip_jax.config import Config  # noqa: E402
from declip_jax.digests import digest  # noqa: E402
from declip_jax.methods import METHODS  # noqa: E402
from declip_jax.metrics import read_metrics  # noqa: E402
from declip_jax.train import train  # noqa: E402

SCORES = {
    "zero-shot top-1": "val/zeroshot/top1",
    "image → text R@1": "val/retrieval/image_to_text_r1",
    "text → image R@1": "val/retrieval/text_to_image_r1",
}


def config_of(variant: str, seed: int, args) -> ml_collections.ConfigDict:
    method, *settings = variant.split(",")
    config = quickstart.get_config().unlock()
    config.method = method
    config.seed = seed
    config.batch_size = args.batch_size
    config.total_steps = args.steps
    limits = config.loss.logit_scale_range
    published = importlib.import_module(f"configs.{method}_vit_b32_yfcc15m").get_config().unlock()
    config.loss, config.data.mask_rate = published.loss, published.data.mask_rate
    config.loss.logit_scale_range = limits
    config.loss.support_set.size = args.support_set
    config.loss.mlm_capacity = 0.12  # half of the positions are padding
    if method == "filip":
        config.loss.weights.clip = 1.0
    config.data.eda = ("swap", "delete")  # synonyms would need a file
    config.model.heads.update(projector=128, predictor=64, simclr_hidden=256, simclr=64, dense=64)
    config.optim.peak_lr = args.peak_lr
    config.optim.warmup_steps = min(config.optim.warmup_steps, args.steps // 2)
    # Color is what captions tell: no gray, no turn of the hue, in any view.
    config.views.strong.update(
        crop_scale=(0.8, 1.0), jitter=(0.2, 0.2, 0.2, 0.0), jitter_prob=0.8, grayscale_prob=0.0
    )
    config.views.strong.update(flip=0.0, blur_prob=0.0)
    config.compilation_cache = str(args.workdir / "cache")  # seeds share their programs
    config.eval.every = args.steps
    config.checkpoint.update(every=args.steps, best_metric="")
    config.data.split = args.split
    if args.data:
        config.data.source = args.data
        config.views.weak.update(crop_scale=(0.6, 1.0), flip=0.5)
        config.views.strong.update(crop_scale=(0.4, 1.0), flip=0.5)
        config.eval.zeroshot.update(source=args.data, split="test")
        config.eval.zeroshot.templates = ("a photo of a {}.",)
        config.eval.retrieval.source = ""
    pairs = (setting.split("=", 1) for setting in settings)
    config.update_from_flattened_dict({name: literal_eval(value) for name, value in pairs})
    return config.lock()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--peak-lr", type=float, default=4e-3)
    parser.add_argument("--support-set", type=int, default=2048, help="rows")
    parser.add_argument("--data", default="", help="prepared set with classes; default: scenes")
    parser.add_argument("--split", default="train", help="of the pairs, e.g. train[:2000]")
    parser.add_argument("--workdir", type=Path, default=Path("runs/compare_methods"))
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    unknown = {variant.split(",")[0] for variant in args.methods} - set(METHODS)
    if unknown:
        parser.error(f"--methods: {sorted(unknown)} are none of {sorted(METHODS)}.")

    name = f"{Path(args.data).name or 'scenes'} {args.split}"
    runs = {}
    for seed in range(args.seeds):  # a whole round of methods before the next seed
        for method in args.methods:
            config = config_of(method, seed, args)
            # Other settings, code's or argument's, are another run.
            settings = digest(Config.read(config).record())[:8]
            workdir = args.workdir / f"{method}_{seed}_{settings}"
            started = time.perf_counter()
            if train(config, workdir).step < args.steps:
                sys.exit(f"Interrupted. The same command continues with {method}, seed {seed}.")
            print(f"{method} seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
            last = read_metrics(workdir / "metrics.jsonl")[-1]
            runs.setdefault(method, []).append(
                {key: last[metric] for key, metric in SCORES.items() if metric in last}
            )
            jax.clear_caches()

    scores = list(next(iter(runs.values()))[0])
    pairs = args.steps * args.batch_size
    print(f"\n{name}: {pairs:,} pairs seen, {args.seeds} seeds, mean ± standard deviation, %")
    print(f"{'method':<32}" + "".join(f"{score:>22}" for score in scores))
    for method, results in runs.items():
        cells = []
        for score in scores:
            values = [100 * result[score] for result in results]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):6.1f} ± {spread:4.1f}")
        print(f"{method:<32}" + "".join(f"{cell:>22}" for cell in cells))
    if args.out:
        result = {
            "data": name,
            "steps": args.steps,
            "batch_size": args.batch_size,
            "peak_lr": args.peak_lr,
            "support_set": args.support_set,
            "host": f"{os.cpu_count()} cores, {platform.machine()}, "
            f"Python {platform.python_version()}, jax {jax.__version__}",
            "runs": runs,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
