"""Time, share of the device's matmul rate, memory and compile time of a training step.

  python benchmarks/step.py --method declip --tower ViT-B/32 --batch 2048
  python benchmarks/step.py --method clip --tower ViT-B/32 --batch 1024 --peer
  python benchmarks/step.py --method clip --tower ViT-B/16 --batch 1024 --tokens 32 \\
      --variant "" --variant model.attention=cudnn --variant model.remat=dots,batch_size=2048

The step is the whole one, with augmentation and optimizer, on a batch of random images and captions
that is already on the device: most captions have about 12 tokens, the longest fills the length.
Each variant (comma-separated settings of the configuration, "" for the recipe as it is) is timed
with every length of captions. Rounds of all of them, of a large matrix product and, with --peer, of
the same CLIP in PyTorch are interleaved, so that what else the machine does falls on all alike.

The share is that of the FLOPs that flops.py counts, at the median time, in the median rate of the
matrix product (bfloat16; float32 on a CPU). Memory is the compiler's count for one device. Exits
with 3 if nothing fits into the memory.
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from ast import literal_eval
from pathlib import Path

if "--peer" in sys.argv:  # both frameworks' memory pools must fit
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # configs are not installed
from benchmarks.flops import train_step_flops  # noqa: E402
from configs import common  # noqa: E402
from declip_jax.data.text import mask_tokens  # noqa: E402
from declip_jax.data.tokenizer import CLIP_TOKENIZER  # noqa: E402
from declip_jax.interop import openai  # noqa: E402
from declip_jax.methods import METHODS, Views  # noqa: E402
from declip_jax.models.variants import variant as tower_sizes  # noqa: E402
from declip_jax.parallel.mesh import shard_batch  # noqa: E402
from declip_jax.step import Setup  # noqa: E402

# Relative differences from PyTorch's: of the first loss and gradient norm, and of the loss after
# CHECK_STEPS updates, which has what the optimizer makes of the rounding.
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (1e-2, 5e-2)}
CHECK_STEPS = 3


def load_config(args):
    """The method's published ViT-B/32 recipe, with the tower asked for."""
    config = importlib.import_module(f"configs.{args.method}_vit_b32_yfcc15m").get_config().unlock()
    recipe = config.model.image.kind
    common.set_variant(config, args.tower)
    if config.model.image.kind != recipe:
        config.optim.frozen = ()  # layers that this tower does not have
    if args.tiny:
        common.finish(config, "tiny").unlock()
    config.batch_size = args.batch
    config.model.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if args.peer:  # what the two have in common
        config.model.text.proj_bias = False
        config.optim.frozen = ()
        config.optim.update(schedule="constant", warmup_steps=0, peak_lr=1e-4)
    return config.lock()


def parse_variant(settings: str) -> dict:
    """ "model.remat=dots,batch_size=64" as a dict; values are Python literals or else strings."""

    def value(text: str):
        try:
            return literal_eval(text)
        except (SyntaxError, ValueError):
            return text

    pairs = [setting.split("=", 1) for setting in settings.split(",") if setting]
    return {name: value(text) for name, text in pairs}


def random_batch(config, views: Views, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    size, longest = config.model.image.resolution, min(length, config.model.text.context)
    shape = (config.batch_size, len(views.text), 1)
    ends = np.clip(rng.normal(12, 3, shape).astype(int), 4, longest) - 1
    ends[0] = longest - 1
    place = np.arange(length)
    words = rng.integers(1, CLIP_TOKENIZER.start, (*shape[:2], length))
    tokens = np.where(place < ends, words, (place == ends) * CLIP_TOKENIZER.end).astype(np.int32)
    tokens[..., 0] = CLIP_TOKENIZER.start
    images = (config.batch_size, len(views.image), size, size, 3)
    batch = {"image": rng.integers(0, 256, images, np.uint8), "tokens": tokens}
    if "masked" in views.text:
        masked = tokens[:, views.text.index("masked")]  # [B, L], a view
        pairs = [mask_tokens(row, config.data.mask_rate, CLIP_TOKENIZER, rng) for row in masked]
        masked[:], batch["mlm_labels"] = (np.stack(column) for column in zip(*pairs, strict=True))
    return batch


class Timed:
    """Something to time in rounds: `run(steps)` -> seconds a step."""

    def __init__(self):
        self.seconds = []

    def round(self, steps: int) -> None:
        self.seconds.append(self.run(steps))

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Step(Timed):
    """A compiled training step with its state and a batch."""

    def __init__(self, config, length: int | None):
        super().__init__()
        setup = Setup(config)
        views, context = setup.method.views, config.model.text.context
        # as Setup.batches: even lengths, but for losses that see the padding
        self.length = length or (context if views.padded else context + context % 2)
        self.batch_size, self.devices = config.batch_size, setup.mesh.size
        self.host_batch = random_batch(config, views, self.length)
        labels = self.host_batch.get("mlm_labels", np.full(1, -1))
        self.flops = train_step_flops(
            config,
            tokens=self.length,
            mlm_words=(labels >= 0).sum() / config.batch_size,
        )
        self.batch = shard_batch(self.host_batch, setup.mesh)
        self.state = setup.init_state()
        start = time.perf_counter()
        self.step = setup.jit_train_step().lower(self.state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - start
        memory = self.step.memory_analysis()
        self.bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        self.bytes += memory.output_size_in_bytes - memory.alias_size_in_bytes

    def run(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            self.state, self.metrics = self.step(self.state, self.batch)
        jax.block_until_ready(self.metrics)
        return (time.perf_counter() - start) / steps


class Matmul(Timed):
    """A square product on one device."""

    def __init__(self):
        super().__init__()
        cpu = jax.default_backend() == "cpu"
        self.size, self.dtype = (2048, jnp.float32) if cpu else (8192, jnp.bfloat16)
        self.times = 3 if cpu else 30
        keys = jax.random.split(jax.random.key(0))
        shape = (self.size, self.size)
        self.operands = [jax.random.normal(key, shape, self.dtype) for key in keys]
        self.product = jax.jit(jnp.matmul)

    def run(self, steps: int) -> float:
        del steps
        start = time.perf_counter()
        for _ in range(self.times):
            result = self.product(*self.operands)
        result.block_until_ready()
        return (time.perf_counter() - start) / self.times

    @property
    def rate(self) -> float:
        return 2 * self.size**3 / self.median


class Peer(Timed):
    """torch_peer.py in a process of its own, with the weights and the batch of `step`."""

    def __init__(self, config, step: Step):
        super().__init__()
        self.batch_size = step.batch_size
        image = {
            n: config.model.image[n] for n in ("resolution", "patch", "width", "layers", "heads")
        }
        text = dict(config.model.text)
        del text["proj_bias"]
        spec = {
            "image": image,
            "text": text,
            "embed_dim": config.model.embed_dim,
            "dtype": config.model.dtype,
            "mean": config.image_mean,
            "std": config.image_std,
            "lr": config.optim.peak_lr,
            "betas": (config.optim.b1, config.optim.b2),
            "eps": config.optim.eps,
            "weight_decay": config.optim.weight_decay,
            "logit_scale_range": config.loss.logit_scale_range,
            "check_steps": CHECK_STEPS,
        }
        parameters = openai.dump({"params": step.state.params})
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "peer.npz"
            np.savez(
                path,
                spec=np.frombuffer(json.dumps(spec).encode(), np.uint8),
                image=step.host_batch["image"][:, 0],
                tokens=step.host_batch["tokens"][:, 0, : text["context"]],
                **{f"param/{name}": value for name, value in parameters.items()},
            )
            self.process = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("torch_peer.py"), path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self.first = self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit("error: the PyTorch process ended; what it says is above.")
        return json.loads(line)

    def run(self, steps: int) -> float:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        self.last = self._answer()
        return self.last["seconds"]

    def check(self, step: Step, dtype: str) -> dict:
        """Compares the first steps; `step` must be at its start."""
        losses, norms = [], []
        for _ in range(CHECK_STEPS + 1):
            step.run(1)
            losses.append(float(step.metrics["loss"]))
            norms.append(float(step.metrics["grad_norm"]))
        theirs = self.first
        at_once, later = TOLERANCE[dtype]
        result = {}
        for what, ours, other, tolerance in (
            ("first loss", losses[0], theirs["losses"][0], at_once),
            ("first gradient norm", norms[0], theirs["grad_norm"], at_once),
            (f"loss after {CHECK_STEPS} steps", losses[-1], theirs["losses"][-1], later),
        ):
            print(f"{what}: {ours:.6f}, PyTorch {other:.6f}, at most {tolerance:g} apart")
            if not abs(ours - other) <= tolerance * abs(other):
                sys.exit(f"error: {what} differs from PyTorch's: this is not the same model.")
            result[what] = (ours, other)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="clip", choices=METHODS)
    parser.add_argument("--tower", default="ViT-B/32", help="a name of models/variants.py")
    parser.add_argument("--batch", type=int, default=2048, help="pairs, over all devices")
    parser.add_argument("--tokens", type=int, nargs="+", help="default: the context, and 32")
    parser.add_argument("--variant", action="append", default=[], help="e.g. model.scan=False")
    parser.add_argument(
        "--peer",
        action="store_true",
        help="also the same CLIP in PyTorch, at the first length of captions; vision transformers "
        "only. The recipe then has no frozen parameters and no bias on the text projection",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="in each round")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try this script")
    parser.add_argument("--out", type=Path, help="JSON file, a list, that the result is added to")
    args = parser.parse_args()
    try:
        kind = tower_sizes(args.tower)["image"]["kind"]
    except ValueError as error:
        parser.error(str(error))
    if args.peer and (args.method, kind) != ("clip", "vit"):
        parser.error("--peer: the PyTorch model is CLIP with a vision transformer (--method clip).")
    if args.peer and jax.device_count() > 1:
        parser.error("--peer: PyTorch runs on one device, so give JAX one too.")
    if args.peer and importlib.util.find_spec("torch") is None:
        parser.error("--peer needs PyTorch: pip install -e '.[torch]'")
    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # compile times are those of a cold one

    base = load_config(args)
    padded = Setup(base).method.views.padded
    lengths = args.tokens or ([None] if padded or args.tiny else [None, 32])
    steps: dict[str, Step] = {}
    peer, check = None, None
    for variant in args.variant or [""]:
        config = base.copy_and_resolve_references().unlock()
        try:
            config.update_from_flattened_dict(parse_variant(variant))
        except (KeyError, TypeError, ValueError) as error:
            parser.error(f"--variant {variant}: {error}")
        for length in lengths:
            name = variant or "recipe"
            try:
                step = Step(config.lock(), length)
                if args.peer and peer is None:
                    peer = Peer(config, step)
                    check = peer.check(step, config.model.dtype)
                step.run(2)  # the first steps allocate
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                print(f"{name}, {length or 'all'} tokens: does not fit into the device's memory")
                continue
            steps[f"{name}, {step.length} tokens"] = step
    if not steps:
        sys.exit(3)

    matmul = Matmul()
    matmul.run(1)
    timed = [*steps.values(), matmul, *([peer] if peer else [])]
    for _ in range(args.rounds):
        for one in timed:
            one.round(args.steps)

    device = jax.devices()[0]
    result = {
        "method": args.method,
        "tower": args.tower + (" (tiny)" if args.tiny else ""),
        "dtype": base.model.dtype,
        "devices": f"{jax.device_count()} × {device.device_kind}",
        "host": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "jax": jax.__version__,
        "matmul": {
            "what": f"{matmul.size}³, {jnp.dtype(matmul.dtype).name}",
            "tflop_per_s": round(matmul.rate / 1e12, 3),
        },
        "rows": {},
    }
    print(
        f"{args.method} {result['tower']}, {result['dtype']}, {result['devices']}, "
        f"jax {jax.__version__}; {result['matmul']['what']}: {matmul.rate / 1e12:.3g} TFLOP/s"
    )
    print(
        f"{'variant':<44}{'batch':>7}{'ms median':>11}{'fastest':>10}{'pairs/s':>10}{'GF/pair':>9}"
        f"{'share':>7}{'GiB':>7}{'compile s':>11}"
    )
    for name, step in steps.items():
        share = step.flops / step.devices / step.median / matmul.rate
        row = {
            "batch_size": step.batch_size,
            "tokens": step.length,
            "ms_per_step": [round(1e3 * s, 2) for s in step.seconds],
            "pairs_per_s": round(step.batch_size / step.median, 2),
            "gflop_per_pair": round(step.flops / step.batch_size / 1e9, 2),
            "share_of_matmul_rate": round(share, 3),
            "gib_a_device": round(step.bytes / 2**30, 2),
            "compile_seconds": round(step.compile_seconds, 1),
        }
        result["rows"][name] = row
        print(
            f"{name:<44}{step.batch_size:>7}{1e3 * step.median:>11.1f}"
            f"{1e3 * min(step.seconds):>10.1f}{row['pairs_per_s']:>10,.6g}"
            f"{row['gflop_per_pair']:>9.1f}{share:>7.1%}{row['gib_a_device']:>7.1f}"
            f"{step.compile_seconds:>11.1f}"
        )
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if peak:
        result["peak_gib"] = round(peak / 2**30, 2)
        print(f"peak of the device's memory in this process: {result['peak_gib']} GiB")
    if peer:
        rate = peer.batch_size / peer.median
        tokens = next(iter(steps.values())).length
        name = f"PyTorch {peer.first['torch']}, {tokens} tokens"
        result["peer"] = {
            **peer.first,
            "tokens": tokens,
            "agreement": check,
            "ms_per_step": [round(1e3 * s, 2) for s in peer.seconds],
            "pairs_per_s": round(rate, 2),
            "peak_gib": peer.last["peak_gib"],
        }
        print(
            f"{name:<44}{peer.batch_size:>7}{1e3 * peer.median:>11.1f}"
            f"{1e3 * min(peer.seconds):>10.1f}{rate:>10,.6g}"
        )
        for name, step in steps.items():
            per_pair = [s / step.batch_size for s in step.seconds]
            ratios = [p / peer.batch_size / s for p, s in zip(peer.seconds, per_pair, strict=True)]
            median = statistics.median(ratios)
            fastest = min(peer.seconds) / peer.batch_size / min(per_pair)
            result["rows"][name]["times_peer"] = round(median, 3)
            result["rows"][name]["times_peer_fastest"] = round(fastest, 3)
            print(f"{name}: {median:.2f} × PyTorch (fastest rounds: {fastest:.2f})")
    if args.out:
        results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
        args.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([*results, result], indent=1, ensure_ascii=False)
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
