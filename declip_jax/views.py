"""Draw what a run trains on: image views as augmented, text views as the model reads them.

  python -m declip_jax.views --config configs/declip_vit_b32_yfcc15m.py --out views.png

shows the first samples of the run's training data. "draw 1" is what the first step of a run in one
process sees: the same crops, captions and random operations, to rounding. Further draws show what
else these samples may become; the run itself draws otherwise when it comes to them again. Fields of
the configuration can be set: --config.views.strong.blur_prob=1.
"""

from collections.abc import Sequence

from declip_jax.flags import Parser, at_least, mistakes_in_a_line


def main(arguments: Sequence[str] | None = None, prog: str = "python -m declip_jax.views"):
    parser = Parser(prog, __doc__, config=True)
    add = parser.add_argument
    add("--out", default="views.png", help="picture to write, a PNG (views.png)")
    add("--records", type=at_least(1), default=6, help="how many samples to show (6)")
    add("--draws", type=at_least(1), default=2, help="how often to draw each one's views (2)")
    args = parser.parse_args(arguments)
    with mistakes_in_a_line():
        from declip_jax import drawing  # after the flags: --help need not wait for JAX
        from declip_jax.step import Setup

        args.config.data.workers = 0
        setup = Setup(args.config)
        config, names = setup.config, setup.method.views
        samples = drawing.draw_samples(setup, args.records, args.draws)
        titles = [drawing.image_title(name, config.views[name]) for name in names.image]
        titles += [drawing.text_title(names.text, config.model.text.context, config.data)]
        drawing.draw_page(samples, titles, args.out)
    print(f"{config.method}, first samples of {config.data.source!r}: {args.out}")


if __name__ == "__main__":
    main()
