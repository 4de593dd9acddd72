"""Zero-shot evaluation beside the model alone: images/s, prompts/s, and memory.

  python benchmarks/eval.py --out benchmarks/results/eval_cpu.json
  python benchmarks/eval.py --images 50000 --classes 1000 --prompts 80 --batch 512 --out …

What it compares, in interleaved rounds, all on batches of one size: "training forward", the loss of
the training step, images and captions, without gradients; "image tower" alone; both on batches that
lie on the device; "arrays", evaluation of decoded images; "jpegs", evaluation of encoded ones. Then
the text side, computed and from the cache, and how much memory a four times larger set takes.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import cv2
import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs from a bare checkout, too
from configs import common  # noqa: E402
from declip_jax import augment  # noqa: E402
from declip_jax.data.eval_images import eval_images  # noqa: E402
from declip_jax.data.sources import Source  # noqa: E402
from declip_jax.data.tokenizer import CLIP_TOKENIZER  # noqa: E402
from declip_jax.evals.cache import Cache  # noqa: E402
from declip_jax.evals.zeroshot import class_embeddings, zeroshot  # noqa: E402
from declip_jax.parallel.mesh import shard_batch  # noqa: E402
from declip_jax.step import Setup  # noqa: E402


class Repeated(Source):
    """So many records of a few images."""

    def __init__(self, images: list, count: int, classes: int):
        self._images, self._count = images, count
        self.class_names = tuple(f"class {n}" for n in range(classes))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict:
        return {
            "image": self._images[index % len(self._images)],
            "captions": ["a photo"],
            "key": str(index),
            "label": index % len(self.class_names),
        }


def gib() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=128, help="a round")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=8, help="a class")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the script")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    args.images = max(1, args.images // args.batch) * args.batch
    config = common.get_config("tiny" if args.tiny else "").unlock()
    config.batch_size = config.eval.batch_size = args.batch
    if jax.default_backend() == "cpu":
        config.model.dtype = "float32"
    setup = Setup(config)
    state = setup.init_state()
    seen, encoder = setup.config.preprocess, setup.encoder()
    encoder = encoder.use(state.eval_params, state.model_state)
    reading = dict(
        resolution=seen.resolution, resize=seen.short_side, batch_size=config.eval.batch_size
    )

    rng = np.random.default_rng(0)
    # Photographs compress like smooth noise.
    pictures = [
        cv2.resize(rng.integers(0, 256, (24, 32, 3), np.uint8), (500, 375)) for _ in range(32)
    ]
    jpegs = [cv2.imencode(".jpg", picture)[1].tobytes() for picture in pictures]
    side = (seen.short_side, seen.short_side)
    sources = {
        "arrays": Repeated([cv2.resize(p, side) for p in pictures], args.images, args.classes),
        "jpegs": Repeated(jpegs, args.images, args.classes),
    }

    def embed() -> dict[str, np.ndarray]:
        templates = [f"a photo of a {{}}, number {n}." for n in range(args.prompts)]
        names = sources["arrays"].class_names
        return {"embeddings": class_embeddings(encoder.encode_texts, names, templates)}

    encoder.encode_texts(["compiles"])
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            embeddings = Cache(Path(folder)).get("prompts", embed)["embeddings"]
            seconds.append(time.perf_counter() - start)

    pixels = rng.integers(0, 256, (args.batch, 1, *[seen.resolution] * 2, 3), np.uint8)
    tokens = CLIP_TOKENIZER.encode(["a photograph of something"] * args.batch, encoder.context)
    # As the training step has them: one view of each image, one of each caption.
    batch = shard_batch({"image": pixels, "tokens": tokens[:, None]}, setup.mesh)

    @jax.jit
    def images_of(batch):
        return augment.normalize(batch["image"] / 255.0, seen.mean, seen.std)

    @jax.jit
    def loss(params, model_state, batch):
        return setup.method.loss(
            params, model_state, {**batch, "image": images_of(batch)}, jax.random.PRNGKey(0)
        )[0]

    @jax.jit
    def tower(params, model_state, batch):
        return setup.method.encode_image(params, model_state, images_of(batch)[:, 0])

    def repeated(program):
        def run() -> None:
            for _ in range(args.images // args.batch):
                out = program(state.eval_params, state.model_state, batch)
            out.block_until_ready()

        return run

    def evaluation(source: Source):
        return lambda: zeroshot(encoder.encode_image, eval_images(source, **reading), embeddings)

    runs = {"training forward": repeated(loss), "image tower": repeated(tower)}
    runs |= {name: evaluation(source) for name, source in sources.items()}
    rates = {name: [] for name in runs}
    for round_ in range(args.rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_:  # the first one compiles
                rates[name].append(args.images / (time.perf_counter() - start))
    before = gib()
    evaluation(Repeated(jpegs, 4 * args.images, args.classes))()
    ratios = {
        f"{name} to {other}": statistics.median(
            a / b for a, b in zip(rates[name], rates[other], strict=True)
        )
        for name in sources
        for other in ("training forward", "image tower")
    }
    device = jax.devices()[0]
    result = {
        "device": f"{jax.device_count()} × {device.device_kind}",
        "host": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "versions": {p: version(p) for p in ("jax", "flax", "grain", "numpy")},
        "model": f"{config.method}, {config.model.image.to_dict()}, {config.model.dtype}",
        "batch": args.batch,
        "images": args.images,
        "images_per_s": {name: [round(r, 1) for r in values] for name, values in rates.items()},
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "prompts": args.classes * args.prompts,
        "prompts_per_s": round(args.classes * args.prompts / seconds[0], 1),
        "seconds_from_cache": round(seconds[1], 4),
        "gib_at_most": {"images": round(before, 3), "4 × images": round(gib(), 3)},
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
