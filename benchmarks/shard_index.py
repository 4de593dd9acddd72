"""The index of webdataset shards at full size: seconds to open, bytes on disk and in memory.

  python benchmarks/shard_index.py --out benchmarks/results/shard_index_cpu.json

Makes shards in a folder that it removes again: each is a sparse file of its full size that has one
real sample, its first, and an index file as if it had been scanned, whose other spans are made up.
From there on everything is what training does: sizes and times of all shards are compared with
the index, which is put together and mapped, by one process, and opened, by another. The real
samples are read through it at last, so that spans and shards are known to belong together. Exits
with 1 above a limit.
"""

import argparse
import io
import json
import os
import pickle
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs from a bare checkout, too
from declip_jax.data.sources import Columns, paths, tar_index  # noqa: E402
from declip_jax.data.sources.tar import BLOCK, key_hash  # noqa: E402
from declip_jax.data.sources.tar_index import RECORD  # noqa: E402
from declip_jax.data.sources.webdataset import WebDataset  # noqa: E402

MAX_GIB = 2.0  # of the process that has opened the index and touched all of it
MAX_SECONDS = 10.0  # to open it
BLOCKS = 95  # a sample: 47 KB of image, and text
LOOKUPS = 100_000
READS = 1000


def make_shards(folder: Path, records: int, shards: int) -> None:
    (folder / ".declip_index").mkdir()
    names = [f"{folder}/{shard:05d}.tar" for shard in range(shards)]
    counts = np.diff(np.linspace(0, records, shards + 1).astype(int))
    for shard, (name, count) in enumerate(zip(names, counts, strict=True)):
        with open(name, "wb") as stream:
            with tarfile.open(fileobj=stream, mode="w") as tar:
                for extension, data in (("jpg", bytes(100)), ("txt", b"a caption")):
                    info = tarfile.TarInfo(key(shard) + "." + extension)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                real = tar.offset // BLOCK
            stream.truncate(int(count) * BLOCKS * BLOCK)
    files, _ = tar_index._place(folder / ".declip_index", names, paths.versions(names))
    rng = np.random.default_rng(0)
    for shard, (file, count) in enumerate(zip(files, counts, strict=True)):
        index = np.empty(count, RECORD)
        index["block"] = np.arange(count) * BLOCKS
        index["blocks"] = BLOCKS
        index["key"] = rng.integers(2**64, size=count, dtype=np.uint64)
        index[0] = 0, real, key_hash(key(shard))
        np.savez(file, records=index, refused="{}")


def key(shard: int) -> str:
    return f"{shard:05d}0000"


def gib() -> float:
    """Resident memory of this process, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 2**20


def measure(folder: str) -> dict[str, float]:
    """Opens the shards in this process."""
    result = {"gib_before": gib()}
    start = time.perf_counter()
    source = WebDataset(folder, Columns())
    source._span(0)  # maps it
    result |= {"seconds_to_open": time.perf_counter() - start, "gib_open": gib()}
    result |= {"records": len(source), "pickled_kb": len(pickle.dumps(source)) / 1e3}
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(source), size=LOOKUPS).tolist()
    start = time.perf_counter()
    for index in chosen:
        source._span(index)
    result["us_a_lookup"] = 1e6 * (time.perf_counter() - start) / LOOKUPS
    result["gib_after_lookups"] = gib()
    source.key_hashes().max()
    result["gib_after_all"] = gib()
    firsts = source._firsts[:-1]
    for shard in rng.integers(len(firsts), size=READS):
        record = source[int(firsts[shard])]
        if record["key"] != key(shard) or record["captions"] != ["a caption"]:
            sys.exit(f"error: record {firsts[shard]} is {record['key']}, not {key(shard)}")
    return result


def measured_apart(folder: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", folder]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(process.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=100_000_000)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    if not 1 <= args.shards <= args.records:
        parser.error(f"--shards {args.shards}: expected 1 to {args.records}, one record in each")

    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), args.records, args.shards)
        built = measured_apart(folder)
        opened = measured_apart(folder)
        sizes = {p: p.stat().st_size for p in Path(folder, ".declip_index").iterdir()}
    result = {
        "platform": f"{os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}, numpy {np.__version__}",
        "records": opened["records"],
        "shards": args.shards,
        "gib_on_disk": sum(n for p, n in sizes.items() if p.suffix != ".npz") / 2**30,
        "gib_on_disk_a_shard_each": sum(n for p, n in sizes.items() if p.suffix == ".npz") / 2**30,
        "seconds_to_put_together": built["seconds_to_open"],
        "seconds_to_open": opened["seconds_to_open"],
        "gib_before": opened["gib_before"],
        "gib_open": opened["gib_open"],
        "gib_after_lookups": opened["gib_after_lookups"],
        "gib_after_all": opened["gib_after_all"],
        "us_a_lookup": opened["us_a_lookup"],
        "pickled_kb": opened["pickled_kb"],
    }
    result = {name: round(v, 3) if isinstance(v, float) else v for name, v in result.items()}
    print(f"{args.records:,} records in {args.shards:,} shards; {result['platform']}")
    for what, value, unit in (
        ("index on disk, mapped", result["gib_on_disk"], "GiB"),
        (
            "index files of the shards, for when some change",
            result["gib_on_disk_a_shard_each"],
            "GiB",
        ),
        ("put together from these and opened", result["seconds_to_put_together"], "s"),
        ("opened again, all shards looked at", result["seconds_to_open"], "s"),
        ("memory of the process before", result["gib_before"], "GiB"),
        ("memory once it is open", result["gib_open"], "GiB"),
        (f"memory after {LOOKUPS:,} random look-ups", result["gib_after_lookups"], "GiB"),
        ("memory once all of it was touched", result["gib_after_all"], "GiB"),
        ("a random look-up", result["us_a_lookup"], "µs"),
        ("source, pickled for a worker", result["pickled_kb"], "kB"),
    ):
        print(f"{what:<50}{value:>12,.3f} {unit}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=1, ensure_ascii=False)
        args.out.write_text(text + "\n", encoding="utf-8")
    if result["gib_after_all"] > MAX_GIB or result["seconds_to_open"] > MAX_SECONDS:
        sys.exit(f"above a limit: {MAX_GIB} GiB, {MAX_SECONDS} s")


if __name__ == "__main__":
    main()
