"""The command line of `python -m declip_jax.prepare`."""

import argparse
import importlib.util
import os
import re
import sqlite3
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from declip_jax.data import image
from declip_jax.data.input_files import InputError
from declip_jax.data.sources.paths import is_remote
from declip_jax.flags import Parser
from declip_jax.prepare.conversion import prepare
from declip_jax.prepare.synonyms import write_synonyms
from declip_jax.prepare.verify import verify


def main(arguments: Sequence[str] | None = None, prog: str = "python -m declip_jax.prepare") -> int:
    args = make_parser(prog).parse_args(arguments)
    try:
        if args.format == "synonyms":
            write_synonyms(args)
        elif args.format == "verify":
            return verify(args)
        else:
            check_arguments(args)
            prepare(args)
    except KeyboardInterrupt:
        print("\nstopped; finished shards are kept, the same command continues", file=sys.stderr)
        return 130
    except (InputError, OSError, zipfile.BadZipFile, zlib.error, sqlite3.Error) as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        return 2
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    for flag in ("output", "images", "captions"):
        if is_remote(getattr(args, flag, None) or ""):
            raise InputError(
                f"--{flag} {getattr(args, flag)}: must be on a local or mounted file system"
            )
    args.name = args.name or os.path.basename(os.path.abspath(args.output))
    for flag in ("name", "split"):
        value = getattr(args, flag)
        if not re.fullmatch(r"[A-Za-z]\w*", value, re.ASCII) or value == "all":
            raise InputError(
                f"--{flag} {value!r}: must be letters, digits and underscores, and not 'all'"
            )
    if args.max_pixels > image.MAX_PIXELS:
        raise InputError(f"--max-pixels {args.max_pixels}: at most {image.MAX_PIXELS}")
    if args.min_words and args.max_words and args.min_words > args.max_words:
        raise InputError(f"--min-words {args.min_words}: more than --max-words {args.max_words}")
    if args.format == "imagefolder":
        args.template = args.template or ["a photo of a {}."]
        for template in (*args.template, *(args.synthetic or ())):
            if "{}" not in template:
                raise InputError(f"template {template!r} has no {{}} for the name of the class")
    if args.beam is not None and importlib.util.find_spec("apache_beam") is None:
        raise InputError(
            "--beam: Apache Beam is not installed: pip install 'declip-jax[beam]', best in an "
            "environment of its own, for it wants older versions of other packages"
        )
    if args.format == "captions":
        if args.model and os.path.isdir(args.model):  # else it is a name
            args.model = os.path.abspath(args.model)
        if args.captions and not args.captions.endswith((".csv", ".jsonl", ".parquet")):
            raise InputError(f"--from {args.captions}: must end in .csv, .jsonl or .parquet")
        if args.captions and not os.path.isfile(args.captions):
            raise InputError(f"--from {args.captions}: no such file")


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def ratio(text: str) -> float:
    if not float(text) >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return float(text)


COUNT: dict[str, Any] = {"type": positive, "metavar": "N"}
NAME: dict[str, Any] = {"metavar": "NAME"}


def make_parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Turns images with captions into a training set. A run that was stopped continues when the "
        "same command is given again.",
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="COMMAND")

    def command(
        name: str, description: str, example: str, *parents: argparse.ArgumentParser
    ) -> Callable[..., Any]:
        return formats.add_parser(
            name,
            parents=parents,
            help=description,
            description=description,
            epilog=f"example:\n  {prog} {name} {example}",
        ).add_argument

    result, listed, source, columns, beam = make_parents()
    synthetic = "captions that a model wrote, for methods that read them (default: none)"
    default = "(default: %(default)s)"
    captions = {"required": True, "metavar": "FILE", "help": "a path, or else a file in the zip"}
    add = command(
        "csv",
        "A CSV file with a row for each caption.",
        "--images flickr8k.zip --subfolder images \\\n"
        "      --captions captions.csv --output /data/flickr8k --split train",
        *(listed, result, beam),
    )
    add("--captions", **captions)
    add("--image-column", default="image", **NAME, help=default)
    add("--caption-column", default="caption", **NAME, help=default)
    add("--synthetic-column", dest="synthetic", **NAME, help=synthetic)

    add = command(
        "imagefolder",
        "A folder of images for each class, and captions by template.",
        "--images cifar10.zip --subfolder test \\\n"
        '      --template "a photo of a {}." --template "a picture of a {}." \\\n'
        "      --output /data/cifar10 --split test",
        *(listed, result, beam),
    )
    text = "caption with {} for the name of the class; repeatable (default: a photo of a {}.)"
    add("--template", action="append", help=text)
    several = {"dest": "synthetic", "action": "append"}
    add("--synthetic-template", **several, metavar="TEMPLATE", help=f"the same for {synthetic}")
    text = (
        "readable names of the classes: lines of folder<TAB or =>name, or of names alone in the "
        "folders' sorted order (default: the folders' names, with spaces for underscores)"
    )
    add("--classes", metavar="FILE", help=text)

    add = command(
        "jsonl",
        "A file with a JSON object a line, one for each image.",
        "--images yfcc15m/ --captions yfcc15m.jsonl \\\n"
        "      --output /data/yfcc15m --split train --short-side 288",
        *(listed, result, beam),
    )
    add("--captions", **captions)
    add("--image-field", default="filename", **NAME, help=default)
    add("--caption-field", default="caption", **NAME, help=default)
    add("--synthetic-field", dest="synthetic", **NAME, help=synthetic)

    written = argparse.ArgumentParser(add_help=False)
    written.add_argument("--synthetic-column", **several, **NAME, help=f"{synthetic}; repeatable")
    command(
        "webdataset",
        "Tar shards, as img2dataset writes them.",
        "--source 'cc12m/{00000..01242}.tar' \\\n"
        "      --caption-column json.caption --min-side 64 \\\n"
        "      --output /data/cc12m --split train --short-side 288",
        *(source, columns, result, beam, written),
    )
    command(
        "parquet",
        "Parquet files with a column of images, as on the Hugging Face hub.",
        "--source 'pairs/train-*.parquet' \\\n"
        "      --image-column image --caption-column caption --output /data/pairs --split train",
        *(source, columns, result, beam, written),
    )
    command(
        "tfds",
        "A TFDS data set by name, prepared on this machine, or its directory.",
        "--source tfds:coco_captions --source-split train \\\n"
        "      --caption-column captions/text --output /data/coco --split train",
        *(source, columns, result, beam, written),
    )
    command(
        "array_record",
        "A directory that this program wrote, to filter it or to write it otherwise.",
        "--source /data/flickr8k --source-split train \\\n"
        "      --output /data/small --split train --short-side 256 --shards 4",
        *(source, result, beam),
    )

    add = command(
        "captions",
        "Synthetic captions, from a model or from a file, for the records of any source; "
        "they replace those that there are.",
        "--source /data/cc12m --model Salesforce/blip-image-captioning-base \\\n"
        "      --device cuda --output /data/cc12m_blip --split train\n"
        f"  {prog} captions --source /data/cc12m --from blip.jsonl \\\n"
        "      --key-field key --caption-field caption --output /data/cc12m_blip --split train",
        *(source, columns, result),
    )
    formats.choices["captions"].set_defaults(beam=None)
    which = formats.choices["captions"].add_mutually_exclusive_group(required=True)
    model = "an image-to-text model of the transformers library"
    which.add_argument("--model", metavar="NAME_OR_DIR", help=model)
    file = "a .csv, .jsonl or .parquet with captions"
    which.add_argument("--from", dest="captions", metavar="FILE", help=file)
    add("--device", default="cpu", help="of the model, such as cuda (default: cpu)")
    add("--batch-size", **COUNT, default=32, help=default)
    add("--max-new-tokens", **COUNT, default=30, help=default)
    add("--prompt", default="", metavar="TEXT", help="how all captions begin (default: as they do)")
    add("--key-field", default="key", **NAME, help=f"of --from {default}")
    add("--caption-field", default="caption", **NAME, help=f"of --from {default}")

    add = command(
        "verify",
        "Whether a data set that this program wrote is still whole; ends with 1 if it is not.",
        "/data/flickr8k --decode",
    )
    add("directory", metavar="DIR", help="what --output was")
    add("--split", help="this one alone (default: all)")
    add("--decode", action="store_true", help="decode every image too")
    add_workers(add)

    add = command(
        "synonyms",
        "Synonyms of WordNet, for the augmentation of captions.",
        "--wordnet /usr/share/wordnet --output synonyms.json.gz",
    )
    add("--wordnet", required=True, metavar="DIR", help="has data.noun, data.verb, data.adj, …")
    add("--output", required=True, metavar="FILE", help="for config.data.synonyms")
    return parser


def add_workers(add: Callable[..., Any]) -> None:
    text = "processes; any number gives the same result (default: %(default)s)"
    add("--workers", **COUNT, default=os.cpu_count(), help=text)


def make_parents() -> list[argparse.ArgumentParser]:
    """Flags that several commands have: of the result, listed images, sources, columns and Beam."""
    result, listed, source, columns, beam = (
        argparse.ArgumentParser(add_help=False) for _ in range(5)
    )
    add = result.add_argument
    add("--output", required=True, metavar="DIR", help="the data set; a second split joins it")
    add("--split", default="train", help="the split to write (default: train)")
    add("--name", help="of the data set (default: the last part of --output)")
    shrink = "shrink larger images to N pixels and encode them as JPEG, quality 95 "
    add("--short-side", **COUNT, help=f"{shrink}(default: all images keep their bytes)")
    large = "refuse larger images, unseen but for their header (default, and most: %(default)s)"
    add("--max-pixels", **COUNT, default=image.MAX_PIXELS, help=large)
    add("--min-side", **COUNT, help="refuse images with a side of fewer pixels")
    long = "refuse images more than R times as long as wide"
    add("--max-aspect", type=ratio, metavar="R", help=long)
    add("--min-words", **COUNT, help="leave out captions of fewer words")
    add("--max-words", **COUNT, help="leave out captions of more words")
    chinese = "leave out captions with Chinese characters, as DeCLIP does"
    add("--language-filter", choices=["declip"], help=chinese)
    add("--no-decode", action="store_true", help="do not decode each image to prove it whole")
    add("--shards", **COUNT, help="files to write (default: by number of images)")
    add_workers(add)

    add = listed.add_argument
    add("--images", required=True, metavar="FOLDER_OR_ZIP", help="where the images are")
    add("--subfolder", default="", **NAME, help="folder in --images to begin in")
    listed.set_defaults(deduplicate=None)  # a list names each image once

    add = source.add_argument
    add("--source", required=True, help="what config.data.source may be: see docs/data.md")
    part = "of the source, or a part of one such as train[:90%%] (default: train)"
    add("--source-split", default="train", metavar="SPLIT", help=part)
    add("--cache", default="", metavar="DIR", help="where indices of shards go")
    first = "of all records with the same key, keep the first"
    add("--deduplicate", action="store_true", default=None, help=first)
    unnamed = {f"{field}_column": None for field in ("image", "caption", "key", "label")}
    source.set_defaults(captions=None, synthetic=None, **unnamed)

    add = columns.add_argument
    usual = "(default: the usual names)"
    add("--image-column", **NAME, help=usual)
    add("--caption-column", action="append", **NAME, help=f"repeatable {usual}")
    add("--key-column", **NAME, help=usual)
    add("--label-column", **NAME, help="number of the class (default: none)")

    beam.add_argument(
        "--beam",
        metavar="OPTIONS",
        help="write with Apache Beam instead of --workers, for example "
        '--beam="--runner=DirectRunner --direct_num_workers=2"; all its workers must see the '
        "input and --output under the same paths",
    )
    return [result, listed, source, columns, beam]
