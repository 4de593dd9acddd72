"""Decoding, random-resized-crop and evaluation crops, on the host. Images are RGB uint8 [H, W, 3].

Wherever an image is taken, it is either encoded (bytes) or already such an array.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import simplejpeg

# One image is too little work to share out; the pipeline decodes many at a time.
cv2.setNumThreads(1)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # errors are raised here

MAX_PIXELS = 64 * 2**20  # of an encoded image; a small file can claim any size
MAX_SCANS = 100  # of a progressive JPEG, which usually has ten; each goes over the whole image
MAX_PARTS = 2**16  # of a file: segments of a JPEG before its scans, chunks of a PNG or WebP

PNG = b"\x89PNG\r\n\x1a\n"

Box = tuple[int, int, int, int]  # top, left, bottom, right


def size(image: bytes | np.ndarray) -> tuple[int, int]:
    """Height and width of an image, turned as it should be seen; encoded ones are not decoded.

    Raises:
      ValueError: not a JPEG, PNG, WebP, GIF or BMP; more than MAX_PIXELS, MAX_SCANS or MAX_PARTS;
        or a PNG that is cut off.
    """
    if isinstance(image, np.ndarray):
        return image.shape[:2]
    height, width = header_size(image)
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise ValueError(f"image of {width} x {height} pixels: expected 1 to {MAX_PIXELS:,} pixels")
    names = {name for name, *_ in _parts(image)}
    # A file of one frame with few scans says so. Others are searched, which takes time.
    if _is_jpeg(image) and names.isdisjoint((b"\xff\xc0", b"\xff\xc1")):
        scans = image.count(b"\xff\xda")
        if scans > MAX_SCANS:
            raise ValueError(f"progressive JPEG of {scans} scans: expected at most {MAX_SCANS}")
    return height, width


def header_size(data: bytes) -> tuple[int, int]:
    """`size` that an encoded image claims, however large."""
    try:
        height, width = _stored_size(data)
    except struct.error as error:
        raise ValueError(f"image header is cut off: {len(data)} bytes") from error
    return (width, height) if _orientation(data) > 4 else (height, width)


def _stored_size(data: bytes) -> tuple[int, int]:
    if _is_jpeg(data):
        return simplejpeg.decode_jpeg_header(data)[:2]
    if data.startswith(PNG):
        width, height = struct.unpack_from(">II", data, 16)
    elif data.startswith((b"GIF87a", b"GIF89a")):
        width, height = struct.unpack_from("<HH", data, 6)
    elif data.startswith(b"BM"):
        width, height = struct.unpack_from("<ii", data, 18)
        height = abs(height)  # negative: stored from the top
    elif data.startswith(b"RIFF") and data[8:15] == b"WEBPVP8":
        kind = data[15:16]
        if kind == b"X":  # 24 bits each, minus one
            low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", data, 24)
            width = (high_width << 16) + low_width + 1
            height = (high_height << 16) + low_height + 1
        elif kind == b"L":  # 14 bits each, minus one
            (bits,) = struct.unpack_from("<I", data, 21)
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        else:  # 14 bits each, with two bits of scaling above
            width, height = (v & 0x3FFF for v in struct.unpack_from("<HH", data, 26))
    else:
        raise ValueError(
            f"not an image that can be read (it starts with {data[:8]!r}): expected JPEG, PNG, "
            "WebP, GIF or BMP"
        )
    return height, width


def _orientation(data: bytes) -> int:
    """Of a JPEG, PNG or WebP, by its Exif tag, 1 to 8; 1 if there is none that can be read."""
    for name, start, end in _parts(data):
        exif = data[start:end] if name in (b"\xff\xe1", b"eXIf", b"EXIF") else b""
        exif = exif.removeprefix(b"Exif\0\0")
        if exif.startswith((b"II*\0", b"MM\0*")):
            order = "<" if exif.startswith(b"II") else ">"
            try:
                (place,) = struct.unpack_from(order + "I", exif, 4)
                (count,) = struct.unpack_from(order + "H", exif, place)
                for entry in range(count):
                    tag, kind, _, value = struct.unpack_from(
                        order + "HHIH", exif, place + 2 + 12 * entry
                    )
                    if tag == 0x0112:
                        return value if kind == 3 and 1 <= value <= 8 else 1  # 3: 16 bits
            except struct.error:  # cut off, or points outside
                pass
            return 1
    return 1


def _parts(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of what is in a JPEG's segments or in a PNG's or WebP's chunks.

    A JPEG's up to the first scan; of other formats none.
    """
    jpeg, png = _is_jpeg(data), data.startswith(PNG)
    if not (jpeg or png or data.startswith(b"RIFF")):
        return
    place, head = (2, ">2sH") if jpeg else (8, ">I4s") if png else (12, "<4sI")
    for _ in range(MAX_PARTS):
        try:
            name, length = struct.unpack_from(head, data, place)
        except struct.error:
            return
        if png:
            name, length = length, name
        start = place + struct.calcsize(head)
        end = start + length - 2 * jpeg  # whose lengths count themselves
        if png and end > len(data):  # OpenCV would take as much memory as it says
            raise ValueError(f"PNG is cut off: {len(data)} bytes")
        place = end + (0 if jpeg else 4 if png else end % 2)  # a PNG has a checksum
        if name == b"\xff\xda" or end < start:
            return
        yield name, start, end
        if name == b"IEND":
            return
    raise ValueError(f"image of more than {MAX_PARTS:,} segments or chunks")


def _is_jpeg(image: bytes | np.ndarray) -> bool:
    return isinstance(image, bytes) and image.startswith(b"\xff\xd8")


def decode(image: bytes | np.ndarray, shrink: int = 1) -> np.ndarray:
    """Decodes to uint8 [ceil(H / shrink), ceil(W / shrink), 3] RGB, turned as its Exif tag says.

    Gray and CMYK become RGB, alpha is dropped, 16 bits become 8. The array may be a view of another
    with turned axes; one that is given is returned as it is. `shrink` is 1; for JPEG also 2, 4 or
    8, which leaves most of the decoding out.

    Raises ValueError: see `size`; or the data are cut off or damaged.
    """
    if isinstance(image, np.ndarray):
        return image
    height, width = size(image)
    orientation = _orientation(image)
    if orientation > 4:
        height, width = width, height
    if _is_jpeg(image):
        # Strict, because libjpeg otherwise paints what is missing gray. The bounds keep it from
        # choosing a factor between, like 3/8, whose pixels would lie across the crop's edges.
        pixels = simplejpeg.decode_jpeg(
            image,
            min_factor=shrink,
            min_height=-(-height // shrink),
            min_width=-(-width // shrink),
            strict=True,
        )
    else:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        try:
            pixels = cv2.imdecode(np.frombuffer(image, np.uint8), flags)
        except cv2.error:
            pixels = None
        if pixels is None or pixels.shape[:2] != (height, width):
            raise ValueError(f"image of {width} x {height} pixels is cut off or damaged")
    # What must be done to see it: mirrored at the diagonal, at the horizontal axis, the vertical.
    if orientation > 4:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def random_resized_crop(
    image: bytes | np.ndarray, views: Sequence, rng: np.random.Generator, resolution: int
) -> np.ndarray:
    """Random crops resized to a square, all from one decoding: uint8 [V, R, R, 3].

    As torchvision's RandomResizedCrop with antialiasing, but for the boxes, see `sample_boxes`.
    Where Exif mirrors an image that is decoded smaller, these are off by less than that factor.

    Args:
      views: V objects with crop_scale, the (lowest, highest) share of the image's area, and
        crop_ratio, the (lowest, highest) width / height.
      resolution: R, pixels.

    Raises ValueError: see `decode`.
    """
    boxes, shrink = sample_boxes(image, views, rng, resolution)
    pixels = decode(image, shrink)
    crops = np.empty((len(boxes), resolution, resolution, 3), np.uint8)
    for crop, box in zip(crops, boxes, strict=True):
        top, left, bottom, right = (edge // shrink for edge in box)
        crop[:] = resize(pixels[top:bottom, left:right], resolution, resolution)
    return crops


def sample_boxes(
    image: bytes | np.ndarray, views: Sequence, rng: np.random.Generator, resolution: int
) -> tuple[list[Box], int]:
    """The boxes of `random_resized_crop`, and the factor by which a large JPEG is decoded smaller.

    The edges are multiples of the factor: 1, 2, 4 or 8, by which all boxes stay large enough.
    """
    height, width = size(image)
    boxes = [_sample_box(height, width, view, rng) for view in views]
    shrink = 1
    if _is_jpeg(image):
        smallest = min(min(bottom - top, right - left) for top, left, bottom, right in boxes)
        shrink = max(k for k in (1, 2, 4, 8) if k == 1 or smallest >= k * resolution)
    return [tuple(round(edge / shrink) * shrink for edge in box) for box in boxes], shrink


def _sample_box(height: int, width: int, view: Any, rng: np.random.Generator) -> Box:
    ratio = view.crop_ratio
    for _ in range(10):
        area = height * width * rng.uniform(*view.crop_scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return top, left, top + box_height, left + box_width
    # The image is much longer than wide, or the reverse: the largest allowed crop of its center.
    box_height = min(height, max(1, round(width / ratio[0])))
    box_width = min(width, max(1, round(height * ratio[1])))
    top, left = (height - box_height) // 2, (width - box_width) // 2
    return top, left, top + box_height, left + box_width


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] -> [height, width, 3], antialiased."""
    # Enlarged to the next 2^n times the size wanted, then halved until it has that: closer to
    # bicubic with antialiasing than area averaging is, and faster, unless it shrinks a lot.
    now, wanted = image.shape[:2], (height, width)
    if any(a > 4 * b for a, b in zip(now, wanted, strict=True)):
        now = tuple(min(a, b) for a, b in zip(now, wanted, strict=True))
        image = cv2.resize(image, now[::-1], interpolation=cv2.INTER_AREA)
    now = tuple(b << ((a - 1) // b).bit_length() for a, b in zip(now, wanted, strict=True))
    image = cv2.resize(image, now[::-1], interpolation=cv2.INTER_CUBIC)
    while now != wanted:
        now = tuple(max(a // 2, b) for a, b in zip(now, wanted, strict=True))
        image = cv2.resize(image, now[::-1], interpolation=cv2.INTER_LINEAR)  # means of pairs
    return image


def resize_center_crop(image: bytes | np.ndarray, short_side: int, resolution: int) -> np.ndarray:
    """For evaluation: the short side resized, then the square of the center, uint8 [R, R, 3].

    Both sizes are in pixels, and `short_side` is at least R, the resolution. Raises ValueError as
    `decode` does.
    """
    pixels = decode(image)
    short = min(pixels.shape[:2])
    # Only the middle of a long strip matters, and scaled up as a whole it might not fit in memory.
    pixels = _center(pixels, min(pixels.shape[0], 4 * short), min(pixels.shape[1], 4 * short))
    height, width = (side * short_side // short for side in pixels.shape[:2])
    return _center(resize(pixels, height, width), resolution, resolution)


def _center(image: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width]
