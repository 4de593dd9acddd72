"""What is good enough to be written, and in what shape."""

import argparse
import struct
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import simplejpeg

from declip_jax.data import image
from declip_jax.data.records import BadRecord, Record
from declip_jax.prepare.inputs import Reader

# A record as it is to be written, or None if it is refused, and what is refused of it, by name.
Loaded = tuple[Record | None, list[tuple[str, BadRecord]]]


def load(args: argparse.Namespace, reader: Reader, item: Any) -> Loaded:
    """Reads an item and applies the filters to it."""
    refused = []
    try:
        record = reader.read(item)
        record["captions"], failed = check_captions(args, record["captions"])
        refused += [(reader.name(item), error) for error in failed]
        if not record["captions"]:
            raise BadRecord("no caption left", "none passes the filters")
        record["image"] = check_image(args, record["image"])
    except BadRecord as error:
        return None, [*refused, (reader.name(item), error)]
    return record, refused


def check_captions(
    args: argparse.Namespace, captions: Sequence[str]
) -> tuple[list[str], list[BadRecord]]:
    """The captions that pass the filters, and why the others do not."""
    kept, failed = [], []
    for caption in captions:
        words = len(caption.split())
        if args.min_words and words < args.min_words:
            failed.append(BadRecord("too few words", f"{words}: {caption:.80}"))
        elif args.max_words and words > args.max_words:
            failed.append(BadRecord("too many words", f"{words}: {caption:.80}"))
        elif args.language_filter == "declip" and has_han_character(caption):
            failed.append(BadRecord("Chinese characters", f"{caption:.80}"))
        else:
            kept.append(caption)
    return kept, failed


def has_han_character(text: str) -> bool:
    """DeCLIP's rule: any character from U+4E00 to U+9FA5, the ideographs of Unicode 1.1.

    So is `ClipDataset.is_contains_chinese` in prototype/data/datasets/clip_dataset.py of
    https://github.com/Sense-GVT/DeCLIP. There a hit among an image's captions costs the image, and
    kana and Hangul pass.
    """
    return any("\u4e00" <= character <= "\u9fa5" for character in text)


def check_image(args: argparse.Namespace, encoded: bytes | np.ndarray) -> bytes:
    """The image as it came, or re-encoded if --short-side shrinks it.

    An array becomes a PNG, which loses nothing. Raises BadRecord if it is damaged or fails a
    filter.
    """
    if isinstance(encoded, np.ndarray):
        encoded = cv2.imencode(".png", cv2.cvtColor(encoded, cv2.COLOR_RGB2BGR))[1].tobytes()
    try:
        height, width = image.header_size(encoded)
        short, long = min(height, width), max(height, width)
        if short < 1:
            raise BadRecord("unreadable image", f"{width} x {height} pixels")
        if height * width > args.max_pixels:
            raise BadRecord("too many pixels", f"{width} x {height}, at most {args.max_pixels:,}")
        if args.min_side and short < args.min_side:
            raise BadRecord("too small", f"{width} x {height}, at least {args.min_side}")
        if args.max_aspect and long > args.max_aspect * short:
            raise BadRecord("too long", f"{width} x {height}, at most {args.max_aspect:g} to 1")
        shrinks = args.short_side is not None and short > args.short_side
        if args.no_decode and not shrinks:
            return encoded
        pixels = image.decode(encoded)
        if not shrinks:
            return encoded
        scale = args.short_side / short
        # Of the pixels, not of the header: decoding may have turned the image.
        size = round(pixels.shape[1] * scale), round(pixels.shape[0] * scale)
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        return simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="420")
    except BadRecord:
        raise
    except (ValueError, struct.error, cv2.error) as error:
        raise BadRecord("unreadable image", str(error)) from None
