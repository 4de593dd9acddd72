"""Images a second that the input pipeline makes, beside a PyTorch DataLoader with PIL.

  python benchmarks/input.py --images photographs.zip --out benchmarks/results/input.json
  python benchmarks/input.py --quick

Both are given the same JPEGs in memory (quality 90, 4:2:0), made from the photographs in --images
or drawn, at each size, and make batches of random crops of 224 pixels, shares of the area from 0.5
to 1 as for CLIP. Three views come from one decoding in both.

  declip_jax  `train_batches`: decoded by simplejpeg, resized by OpenCV, to uint8, as the training
              step takes it; captions are drawn and tokenized, too.
  torch       a dataset that opens an image with PIL, crops and resizes it as torchvision's
              RandomResizedCrop, makes a float tensor and normalizes it. No captions.
  uint8       the same without the last two steps, for these would fit on the device as well.

With 0 or 1 worker processes a pipeline has one core for all it does, with 2 workers two; the
processes inherit the affinity. Each pipeline is a process that runs a few batches when asked and
is stopped (SIGSTOP) otherwise, so that it makes none ahead while others are timed; the first batch
of a round, which may lie ready, is not timed. Rounds of all are interleaved, and ratios are medians
over the rounds of one to the other in the same round.

PSNR is that of our crops to PIL's, decoded whole and resized by bicubic with antialiasing from the
same boxes.
"""

import argparse
import importlib.util
import io
import json
import math
import multiprocessing
import os
import platform
import random
import signal
import statistics
import sys
import time
import zipfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import simplejpeg

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs from a bare checkout, too

from configs import common  # noqa: E402
from declip_jax.data import image  # noqa: E402
from declip_jax.data.options import Data  # noqa: E402
from declip_jax.data.pipeline import train_batches  # noqa: E402
from declip_jax.data.sources import Source  # noqa: E402
from declip_jax.data.tokenizer import CLIP_TOKENIZER  # noqa: E402

RESOLUTION = 224
LENGTH = 2**20  # records that both see, in a new order; grain is slow to shuffle very few
SCALE, RATIO = (0.5, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VIEW = SimpleNamespace(crop_scale=SCALE, crop_ratio=RATIO)
WORDS = "a the dog cat man woman two red blue small on in with and of street grass water".split()
PIPELINES = {  # name: what makes the batches, worker processes
    "declip_jax": ("declip_jax", 0),
    "declip_jax, 1 worker": ("declip_jax", 1),
    "declip_jax, 2 workers": ("declip_jax", 2),
    "torch": ("torch", 0),
    "torch, 1 worker": ("torch", 1),
    "torch, 2 workers": ("torch", 2),
    "uint8": ("uint8", 0),
}
RATIOS = {  # name: the one, the other, each a core
    "0 workers": ("declip_jax", "torch"),
    "0 workers, uint8": ("declip_jax", "uint8"),
    "1 worker": ("declip_jax, 1 worker", "torch, 1 worker"),
    "2 workers": ("declip_jax, 2 workers", "torch, 2 workers"),
    "2 workers to 1": ("declip_jax, 2 workers", "declip_jax, 1 worker"),
    "torch's 2 workers to 1": ("torch, 2 workers", "torch, 1 worker"),
}


class InMemory(Source):
    """LENGTH records of fewer images."""

    def __init__(self, images: list[bytes]):
        self._images = images

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> dict:
        caption = " ".join(random.Random(index).choices(WORDS, k=10))
        encoded = self._images[index % len(self._images)]
        return {"image": encoded, "captions": [caption], "key": str(index)}


class PilCrops:
    """What a DataLoader asks for items: [V, 3, R, R] floats, or [V, R, R, 3] bytes."""

    def __init__(self, images: list[bytes], views: int, floats: bool, bicubic: bool):
        from PIL import Image

        self._images, self._views, self._floats, self._open = images, views, floats, Image.open
        self._filter = Image.BICUBIC if bicubic else Image.BILINEAR

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int):
        import torch

        picture = self._open(io.BytesIO(self._images[index % len(self._images)])).convert("RGB")
        views = []
        for _ in range(self._views):
            crop = picture.crop(self._box(*picture.size)).resize((RESOLUTION,) * 2, self._filter)
            pixels = torch.from_numpy(np.array(crop))
            if self._floats:
                pixels = pixels.permute(2, 0, 1).contiguous().float().div(255)
                mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
                pixels.sub_(mean).div_(std)
            views.append(pixels)
        return torch.stack(views)

    @staticmethod
    def _box(width: int, height: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = width * height * random.uniform(*SCALE)
            aspect = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w <= width and h <= height:
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                return left, top, left + w, top + h
        return 0, 0, width, height


def run_pipeline(connection, name: str, cores: list[int], images: list[bytes], views: int, args):
    """A process: for each number of batches that it is sent, sends the seconds that they took."""
    os.setsid()  # its workers are stopped with it
    what, workers = PIPELINES[name]
    os.sched_setaffinity(0, cores)
    if what == "declip_jax":
        batches = train_batches(
            InMemory(images),
            Data.read(dict(common.get_config().data) | {"workers": workers}, "config.data"),
            image_views=[VIEW] * views,
            text_views=["caption"],
            resolution=RESOLUTION,
            context=77,
            batch_size=args.batch,
            seed=0,
            tokenizer=CLIP_TOKENIZER,
            padded=True,
        )
    else:
        import torch

        torch.set_num_threads(1)
        crops = PilCrops(images, views, what == "torch", args.filter == "bicubic")
        batches = iter(
            torch.utils.data.DataLoader(
                crops,
                args.batch,
                shuffle=True,
                num_workers=workers,
                multiprocessing_context="spawn" if workers else None,
            )
        )
    for _ in range(8 * max(workers, 1)):  # all processes have begun, and have touched their memory
        next(batches)
    connection.send("ready")
    while count := connection.recv():
        next(batches)
        start = time.perf_counter()
        for _ in range(count):
            next(batches)
        connection.send(time.perf_counter() - start)
    if what == "declip_jax":
        batches.close()
    else:
        os.killpg(0, signal.SIGKILL)  # told to end, torch's spawned workers abort with a trace


class Pipeline:
    """`run_pipeline`, stopped when it is not asked for anything."""

    def __init__(self, name: str, images: list[bytes], views: int, args):
        cores = sorted(os.sched_getaffinity(0))[: max(PIPELINES[name][1], 1)]
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        parameters = (other, name, cores, images, views, args)
        self._process = context.Process(target=run_pipeline, args=parameters)
        self._process.start()
        other.close()
        self._receive()
        self.cores, self.rates = len(cores), []

    def _receive(self):
        try:
            answer = self._connection.recv()
        except EOFError:
            sys.exit("error: a pipeline's process ended; what it says is above.")
        os.killpg(self._process.pid, signal.SIGSTOP)
        return answer

    def round(self, batches: int, batch_size: int) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)
        self._connection.send(batches)
        self.rates.append(batches * batch_size / self._receive() / self.cores)

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)
        self._connection.send(0)
        self._process.join()


def photographs(path: Path, count: int) -> list[np.ndarray]:
    """`count` images of a folder or a zip, spread evenly, RGB."""
    suffixes = (".jpg", ".jpeg", ".png", ".webp")
    if path.is_dir():
        names = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
        read = Path.read_bytes
    else:
        archive = zipfile.ZipFile(path)
        names = sorted(name for name in archive.namelist() if name.lower().endswith(suffixes))
        read = archive.read
    if not names:
        sys.exit(f"error: --images {path}: no {', '.join(suffixes)} in there.")
    count = min(count, len(names))
    return [image.decode(read(names[i * len(names) // count])) for i in range(count)]


def drawn(count: int) -> list[np.ndarray]:
    """Noise whose contrast falls with its fineness, as in photographs, mostly gray."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        pixels = np.full((768, 1024, 3), 120, np.float32)
        for octave in range(8):
            shape = (3 << octave, 4 << octave)
            noise = rng.normal(size=(*shape, 1)) + 0.3 * rng.normal(size=(*shape, 3))
            noise = (60 * 0.6**octave * noise).astype(np.float32)
            pixels += cv2.resize(noise, (1024, 768), interpolation=cv2.INTER_CUBIC)
        pictures.append(pixels.clip(0, 255).astype(np.uint8))
    return pictures


def encode(pictures: list[np.ndarray], width: int, height: int) -> list[bytes]:
    """As JPEGs of one size, cut to its shape."""
    encoded = []
    for pixels in pictures:
        rows, columns = pixels.shape[:2]
        h, w = min(rows, columns * height // width), min(columns, rows * width // height)
        top, left = (rows - h) // 2, (columns - w) // 2
        pixels = image.resize(pixels[top : top + h, left : left + w], height, width)
        encoded.append(simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="420"))
    return encoded


def psnr(images: list[bytes]) -> dict[str, float]:
    """Of one crop of each image: the mean, what 5 % of the crops are below, and the least."""
    from PIL import Image

    result = []
    for seed, encoded in enumerate(images):
        (crop,), ((box,), _) = (
            function(encoded, [VIEW], np.random.default_rng(seed), RESOLUTION)
            for function in (image.random_resized_crop, image.sample_boxes)
        )
        top, left, bottom, right = box
        picture = Image.open(io.BytesIO(encoded)).crop((left, top, right, bottom))
        expected = np.asarray(picture.resize((RESOLUTION,) * 2, Image.BICUBIC), float)
        result.append(10 * math.log10(255**2 / np.mean((expected - crop) ** 2)))
    values = np.mean(result), np.percentile(result, 5), np.min(result)
    return dict(zip(("mean", "5 %", "least"), np.round(values, 1).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder or zip of photographs; default: drawn")
    parser.add_argument("--count", type=int, default=128, help="different images")
    parser.add_argument("--sizes", nargs="+", default=["500x375", "1024x768"], help="WxH")
    parser.add_argument("--views", nargs="+", type=int, default=[1, 3], help="of each image")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--filter", choices=["bicubic", "bilinear"], default="bicubic", help="of PIL"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=6, help="timed in each round")
    parser.add_argument("--quick", action="store_true", help="a short try: the numbers mean little")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    for package in ("torch", "PIL"):
        if importlib.util.find_spec(package) is None:
            parser.error("this needs PyTorch and PIL: pip install -e '.[torch,test]'")
    if args.quick:
        args.count, args.batch, args.rounds, args.batches = 16, 16, 2, 2
    cores = len(os.sched_getaffinity(0))
    names = [name for name, (_, workers) in PIPELINES.items() if workers <= cores]
    pictures = photographs(args.images, args.count) if args.images else drawn(args.count)

    packages = "torch pillow simplejpeg opencv-python-headless tokenizers grain numpy".split()
    result = {
        "host": f"{cpu_model()}, {cores} cores, {platform.machine()}",
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "images": f"{len(pictures)} {'photographs' if args.images else 'drawn'}, JPEG 90, 4:2:0",
        "batch": args.batch,
        "peer_filter": args.filter,
        "rows": [],
    }
    print(f"{result['host']}; " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()))
    print(f"{result['images']}; batches of {args.batch}; PIL's {args.filter}\n")
    print("images/s a core: median over the rounds\n")
    print(f"| images | views | {' | '.join(names)} | PSNR: mean, 5 %, least, dB |")
    print("|---|---|" + "---|" * (len(names) + 1))
    for size in args.sizes:
        width, height = map(int, size.split("x"))
        images = encode(pictures, width, height)
        quality = psnr(images)
        for views in args.views:
            pipelines = {name: Pipeline(name, images, views, args) for name in names}
            for _ in range(args.rounds):
                for pipeline in pipelines.values():
                    pipeline.round(args.batches, args.batch)
            for pipeline in pipelines.values():
                pipeline.close()
            rates = {name: pipeline.rates for name, pipeline in pipelines.items()}
            row = {
                "size": size,
                "kilobytes": round(statistics.mean(map(len, images)) / 1000, 1),
                "views": views,
                "images_per_s_per_core": {k: [round(r, 1) for r in v] for k, v in rates.items()},
                "ratio": ratios(rates, pipelines),
                "psnr_db": quality,
            }
            result["rows"].append(row)
            medians = " | ".join(f"{statistics.median(rates[name]):,.0f}" for name in names)
            print(
                f"| {size}, {row['kilobytes']:.0f} kB | {views} | {medians} | "
                f"{quality['mean']}, {quality['5 %']}, {quality['least']} |",
                flush=True,
            )
    shown = result["rows"][0]["ratio"]
    print("\ndeclip_jax's rate a core to torch's; of all cores, where workers are compared\n")
    print(f"| images | views | {' | '.join(shown)} |\n|---|---|" + "---|" * len(shown))
    for row in result["rows"]:
        values = " | ".join(f"{value:.2f}" for value in row["ratio"].values())
        print(f"| {row['size']} | {row['views']} | {values} |")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=1, ensure_ascii=False)
        args.out.write_text(text + "\n", encoding="utf-8")


def ratios(rates: dict[str, list[float]], pipelines: dict[str, Pipeline]) -> dict[str, float]:
    result = {}
    for name, (one, other) in RATIOS.items():
        if one in rates and other in rates:
            cores = pipelines[one].cores / pipelines[other].cores
            pairs = zip(rates[one], rates[other], strict=True)
            result[name] = round(statistics.median(a / b for a, b in pairs) * cores, 3)
    return result


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
