"""Measure the input of a run alone: what its data, decoding and text preparation can deliver.

  python -m declip_jax.bench --config configs/clip_vit_b32_yfcc15m.py \\
      --config.data.source='cc12m/{00000..01242}.tar' --config.data.workers=8

A step of batch_size pairs must take at least batch_size / (pairs/s) seconds, or it waits for data.
Fields of the configuration can be set: try config.data.workers and config.data.threads.
"""

from collections.abc import Sequence

from declip_jax.flags import Parser, at_least, mistakes_in_a_line


def main(arguments: Sequence[str] | None = None, prog: str = "python -m declip_jax.bench"):
    parser = Parser(prog, __doc__, config=True)
    add = parser.add_argument
    add("--seconds", type=at_least(1, float), default=20.0, help="how long to measure (20)")
    pairs = "pairs a batch, of this process; a step's batches are no faster (256)"
    add("--batch-size", "--batch_size", type=at_least(1), default=256, help=pairs)
    args = parser.parse_args(arguments)
    with mistakes_in_a_line():
        from declip_jax.step import Setup  # after the flags: --help need not wait for JAX
        from declip_jax.throughput import measure

        measure(Setup(args.config), args.seconds, args.batch_size)


if __name__ == "__main__":
    main()
