"""Memory of the losses that compare everything with everything, against their plain forms.

  python benchmarks/loss_memory.py --out benchmarks/results/loss_memory.json

Each is compiled at a published size, gradients included where it has some, and never executed: the
table gives the compiler's own count of temporaries, in MiB a device, on eight CPU devices that
this script makes up. Compilers for other devices schedule differently, but what has to live at the
same time is much the same. Exits with 1 if a form is above its limit.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402  (reads the environment)
import jax.numpy as jnp  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, str(Path(__file__).parent.parent))  # runs from a bare checkout, too

from declip_jax import support_set  # noqa: E402
from declip_jax.losses import contrastive, ring  # noqa: E402
from declip_jax.losses.late_interaction import filip_loss, late_interaction  # noqa: E402
from declip_jax.parallel.mesh import batch_sharding, make_mesh, replicated  # noqa: E402

BLOCK = 1024  # config.loss.block
WIDTH = 512  # of features


class Row(NamedTuple):
    what: str
    form: str
    devices: int
    mib: float  # temporaries of one device
    limit: float | None


def temporaries(function, *arguments) -> float:
    analysis = jax.jit(function).lower(*arguments).compile().memory_analysis()
    return analysis.temp_size_in_bytes / 2**20


def array(sharding, *shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def info_nce(pairs: int, limit: float | None):
    mesh = make_mesh(-1, 1)
    features = array(batch_sharding(mesh), pairs, WIDTH)

    def on_ring(x, y, scale):
        return ring.info_nce(x, y, scale, mesh=mesh, block=BLOCK)

    for form, function, most in (
        ("plain", contrastive.info_nce, None),
        ("ring", on_ring, limit),
    ):

        def loss(image, text, scale, function=function):
            return contrastive.clip_loss(image, text, scale, info_nce=function)

        gradients = jax.value_and_grad(loss, (0, 1, 2))
        mib = temporaries(gradients, features, features, array(replicated(mesh)))
        yield Row(f"InfoNCE, {pairs:,} pairs, {WIDTH} wide", form, mesh.size, mib, most)


def nearest_neighbor(queries: int, rows: int, limit: float):
    mesh = make_mesh(-1, 1)
    state = {
        "rows": array(batch_sharding(mesh), rows, WIDTH),
        "pointer": array(replicated(mesh), dtype=jnp.int32),
        "filled": array(replicated(mesh), dtype=jnp.int32),
    }

    def plain(state, queries):
        similarity = contrastive.similarity(queries, state["rows"], jnp.ones(()))
        return state["rows"][similarity.argmax(axis=1)]

    def blockwise(state, queries):
        return support_set.nearest(state, queries, mesh=mesh, block=BLOCK)

    for form, function, most in (("plain", plain, None), ("blocks", blockwise, limit)):
        mib = temporaries(function, state, array(batch_sharding(mesh), queries, WIDTH))
        what = f"support set, {queries:,} queries, {rows:,} rows, {WIDTH} wide"
        yield Row(what, form, mesh.size, mib, most)


def token_interaction(pairs: int, patches: int, context: int, width: int, limit: float):
    mesh = make_mesh(1, 1, jax.devices()[:1])
    image = array(batch_sharding(mesh), pairs, patches, width)
    text = array(batch_sharding(mesh), pairs, context, width)

    def plain(image, text):
        similarity = jnp.einsum("ipe,jte->ijpt", image, text, precision=jax.lax.Precision.HIGHEST)
        return similarity.max(axis=3).mean(axis=2), similarity.max(axis=2).mean(axis=2).T

    def blockwise(image, text):
        return late_interaction(image, text, tokens=0, mesh=mesh, block=BLOCK)

    for form, function, most in (("plain", plain, None), ("blocks", blockwise, limit)):

        def loss(image, text, scale, function=function):
            return filip_loss(*function(image, text), scale)

        gradients = jax.value_and_grad(loss, (0, 1, 2))
        mib = temporaries(gradients, image, text, array(replicated(mesh)))
        what = f"late interaction, {pairs:,} pairs, {patches} × {context} tokens, {width} wide"
        yield Row(what, form, mesh.size, mib, most)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()

    print(f"temporaries a device in MiB, float32, blocks of {BLOCK}: jax {jax.__version__}, cpu")
    print(f"{'what':<58}{'form':<8}{'devices':>8}{'MiB':>12}{'at most':>9}")
    rows = []
    for group in (
        info_nce(32_768, limit=130),
        info_nce(65_536, limit=None),
        nearest_neighbor(8192, 65_536, limit=64),
        token_interaction(1024, 49, 77, 256, limit=1.2 * 1024),
    ):
        for row in group:
            most = "" if row.limit is None else f"{row.limit:,.0f}"
            print(f"{row.what:<58}{row.form:<8}{row.devices:>8}{row.mib:>12,.1f}{most:>9}")
            rows.append(row._asdict() | {"mib": round(row.mib, 1)})
    if args.out:
        result = {
            "jax": jax.__version__,
            "platform": f"cpu, {platform.machine()}, Python {platform.python_version()}",
            "block": BLOCK,
            "rows": rows,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    over = [row["what"] for row in rows if row["limit"] and row["mib"] > row["limit"]]
    if over:
        sys.exit("above its limit: " + "; ".join(over))


if __name__ == "__main__":
    main()
