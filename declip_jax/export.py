"""Write a trained model as files that PyTorch programs load.

  python -m declip_jax.export --workdir runs/mine --format huggingface --output mine_hf --verify

Formats: open_clip (create_model_and_transforms("local-dir:DIR")), huggingface (CLIPModel and
CLIPProcessor .from_pretrained(DIR)), openai, declip and alip (the names of those programs' state
dicts). Weights are safetensors. The model is the newest checkpoint of the workdir (or --step), its
moving average if it has one. With --init a model of another program is written instead: from
DeCLIP's .pth.tar to Transformers, say.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from declip_jax.flags import Parser, mistakes_in_a_line
from declip_jax.interop.formats import FORMATS


def main(arguments: Sequence[str] | None = None, prog: str = "python -m declip_jax.export"):
    parser = Parser(prog, __doc__)
    add = parser.add_argument
    of = parser.add_mutually_exclusive_group()
    of.add_argument("--workdir", type=Path, help="folder of a training run")
    of.add_argument("--init", type=Path, help="weights of another program instead, see evaluate")
    add("--format", choices=FORMATS, required=True)
    add("--output", type=Path, help="folder to write: new, or empty")
    add("--step", default="newest", help="a number, 'best', or 'newest' (default)")
    average = "the moving average of the parameters; default: if there is one"
    add("--ema", action=argparse.BooleanOptionalAction, help=average)
    add("--init-format", choices=FORMATS, default="", help="of --init, if names do not tell it")
    names = "only print which array has which name: of all models, or of the one that is named"
    add("--list", action="store_true", help=names)
    compare = "compare with the library that the format is for, if it is installed"
    add("--verify", action="store_true", help=compare)
    add("--data", default="scenes", help="verify: real images (default: scenes)")
    add("--split", default="test", help="verify: of --data (default: test)")
    args = parser.parse_args(arguments)
    if not args.list and not (args.output and (args.workdir or args.init)):
        parser.error("--output, and --workdir or --init, are needed (or --list)")
    if args.init_format and not args.init:
        parser.error("--init-format is for --init")
    if args.init and (args.step != "newest" or args.ema is not None):
        parser.error("--step and --ema are for --workdir")
    with mistakes_in_a_line():
        # After the flags: --help need not wait for JAX.
        from declip_jax import exporting, trained
        from declip_jax.interop import writing

        model, notes = None, {}
        if args.workdir:
            model, step, samples, config = trained.read_run(args.workdir, args.step, args.ema)
            notes = {"step": step, "samples": samples}
            notes["ema"] = config.ema_decay > 0 and args.ema is not False
        elif args.init:
            model = trained.complete(trained.read(args.init, args.init_format))
        if args.list:
            adapted = model and writing.adapt(model, args.format)[0]
            exporting.print_table(args.format, adapted)
            return
        print(f"{model.describe()}.")
        for note in model.notes:
            print(f"Note: {note}.")
        written, changes = exporting.export(model, args.format, args.output, notes)
        for change in changes:
            print(f"Note: {change}.")
        sizes = sum(file.stat().st_size for file in args.output.iterdir()) / 1e6
        names = ", ".join(sorted(file.name for file in args.output.iterdir()))
        print(f"Wrote {args.output} ({sizes:,.1f} MB): {names}.")
        if args.verify:
            exporting.check(model, written, args.format, args.output, args.data, args.split)


if __name__ == "__main__":
    main()
